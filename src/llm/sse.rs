//! Reads Server-Sent Events out of bytes, by the WHATWG rules ("9.2.6 Interpreting an event stream").
//!
//! Invariant: bytes are cut at line ends only and decoded when a line is whole, so no character is ever split, wherever
//! the network cut the stream. CR, LF and CRLF end lines (a CRLF may be split), one leading BOM is dropped, one space
//! after the colon is dropped, several `data` lines join with LF, comments and unfinished events are dropped.
//! A line, and an event's data, may have at most [`LINE_BYTES_MAX`] bytes. PURE.

/// The longest line and the longest event that are read, bytes.
pub const LINE_BYTES_MAX: usize = 1024 * 1024;

/// The stream cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line or an event is over the cap.
    #[error("a line or event is over {LINE_BYTES_MAX} bytes")]
    TooLong,
}

/// The parser's state between two pieces of bytes.
#[derive(Debug, Default)]
pub struct SseParser {
    /// The bytes of a line whose end has not come yet.
    line: Vec<u8>,
    /// The data of the event being read; `None` until its first `data` line.
    data: Option<Vec<u8>>,
    /// The last byte was a CR: a LF that follows belongs to it.
    after_cr: bool,
    /// The first line has been read: a BOM is text from here on.
    begun: bool,
}

impl SseParser {
    /// Takes the next bytes and calls `event` with the data of every event they complete.
    ///
    /// # Errors
    /// [`SseError::TooLong`]; the parser is of no use afterwards.
    pub fn feed(&mut self, mut bytes: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), SseError> {
        if self.after_cr
            && let Some((&first, rest)) = bytes.split_first()
        {
            self.after_cr = false;
            if first == b'\n' {
                bytes = rest;
            }
        }
        while let Some(end) = bytes.iter().position(|&b| b == b'\n' || b == b'\r') {
            let (head, tail) = bytes.split_at(end);
            if self.line.is_empty() {
                // The common case: the whole line is in this piece and needs no copy.
                self.end_line(head, &mut event)?;
            } else {
                self.line.extend_from_slice(head);
                let line = std::mem::take(&mut self.line);
                self.end_line(&line, &mut event)?;
            }
            bytes = match tail {
                [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] => rest,
                [b'\r'] => {
                    self.after_cr = true;
                    &[]
                }
                [_, rest @ ..] => rest,
                [] => &[],
            };
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > LINE_BYTES_MAX { Err(SseError::TooLong) } else { Ok(()) }
    }

    fn end_line(&mut self, line: &[u8], event: &mut impl FnMut(&[u8])) -> Result<(), SseError> {
        let line = if self.begun { line } else { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line) };
        self.begun = true;
        if line.len() > LINE_BYTES_MAX {
            return Err(SseError::TooLong);
        }
        if line.is_empty() {
            if let Some(data) = self.data.take().filter(|data| !data.is_empty()) {
                event(&data);
            }
            return Ok(());
        }
        let value = match line.strip_prefix(b"data") {
            Some([]) => &[][..],
            Some([b':', b' ', value @ ..] | [b':', value @ ..]) => value,
            // Comments (a leading colon) and the fields `event`, `id`, `retry` carry nothing an answer needs.
            _ => return Ok(()),
        };
        match &mut self.data {
            None => self.data = Some(value.to_vec()),
            Some(data) => {
                data.push(b'\n');
                data.extend_from_slice(value);
                if data.len() > LINE_BYTES_MAX {
                    return Err(SseError::TooLong);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(pieces: &[&[u8]]) -> Result<Vec<String>, SseError> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for piece in pieces {
            parser.feed(piece, |data| events.push(String::from_utf8(data.to_vec()).unwrap()))?;
        }
        Ok(events)
    }

    #[test]
    fn the_specification_s_own_examples() {
        let cases: [(&str, &[&str]); 12] = [
            ("data: YHOO\ndata: +2\ndata: 10\n\n", &["YHOO\n+2\n10"]),
            (
                ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
                &["first event", "second event", " third event"],
            ),
            ("data\n\ndata\ndata\n\ndata:", &["\n"]),
            ("data:test\n\ndata: test\n\n", &["test", "test"]),
            ("\u{feff}data: a\n\n", &["a"]),
            ("\u{feff}\u{feff}data: a\n\ndata: b\n\n", &["b"]),
            ("data: a\r\rdata: b\r\n\r\ndata: c\n\r\n", &["a", "b", "c"]),
            ("data: unfinished\n", &[]),
            ("event: x\nretry: 5\nid: 7\ndata: a\nfoo: b\n\n", &["a"]),
            ("datax: a\n\n", &[]),
            ("data: :\n\n", &[":"]),
            (" data: a\n\n", &[]),
        ];
        for (text, events) in cases {
            assert_eq!(all(&[text.as_bytes()]).unwrap(), events, "{text:?}");
        }
    }

    #[test]
    fn ten_kilobytes_cut_at_every_offset_and_bytewise_stay_the_same() {
        let prose = "砚台里的墨🖋️，写到第一章：「他说——👩‍👩‍👧」。".repeat(140);
        for end in ["\n", "\r", "\r\n"] {
            let stream: String = prose
                .as_bytes()
                .chunks(61)
                .scan(0, |_, _| Some(()))
                .zip(prose.chars().collect::<Vec<_>>().chunks(17))
                .map(|((), part)| format!("data: {}{end}{end}", part.iter().collect::<String>()))
                .collect();
            let bytes = stream.as_bytes();
            assert!(bytes.len() > 6_000);
            let whole = all(&[bytes]).unwrap();
            assert!(!whole.concat().contains('\u{fffd}'));
            for cut in 0..=bytes.len() {
                let (left, right) = bytes.split_at(cut);
                assert_eq!(all(&[left, right]).unwrap(), whole, "cut at {cut}");
            }
            let singles: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(all(&singles).unwrap(), whole);
        }
    }

    #[test]
    fn a_line_may_be_as_long_as_the_cap_and_no_longer() {
        for (extra, fits) in [(-1_i64, true), (0, true), (1, false)] {
            let length = usize::try_from(i64::try_from(LINE_BYTES_MAX).unwrap() + extra).unwrap() - "data:".len();
            let line = format!("data:{}\n\n", "x".repeat(length));
            assert_eq!(all(&[line.as_bytes()]).is_ok(), fits, "cap {extra:+}");
            let pieces: Vec<&[u8]> = line.as_bytes().chunks(65_536).collect();
            assert_eq!(all(&pieces).is_ok(), fits, "cap {extra:+} in pieces");
        }
        let endless = vec![b'x'; 64 * 1024];
        let mut parser = SseParser::default();
        let refused = (0..1024).any(|_| parser.feed(&endless, |_| ()).is_err());
        assert!(refused && parser.line.len() <= LINE_BYTES_MAX + endless.len());
        let many = "data:x\n".repeat(LINE_BYTES_MAX);
        assert_eq!(all(&[many.as_bytes()]), Err(SseError::TooLong));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_read_alike(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b' '), Just(b'd'), any::<u8>()], 0..300), cut in 0..300_usize) {
            let collect = |pieces: &[&[u8]]| {
                let mut parser = SseParser::default();
                let mut events: Vec<Vec<u8>> = Vec::new();
                for piece in pieces {
                    parser.feed(piece, |data| events.push(data.to_vec())).unwrap();
                }
                events
            };
            let (left, right) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(collect(&[&bytes]), collect(&[left, right]));
        }
    }
}
