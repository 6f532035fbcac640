//! Folds a provider's stream into an answer: text as it comes, how it ended, what it used.
//!
//! Invariant: an answer is complete only if the provider said so, by a `finish_reason` or `[DONE]`. An error object in the
//! stream, unreadable JSON before the end, or a stream that just ends make it broken, whatever the HTTP status was.
//! Usage is believed only if it can be true; else it is marked hostile and never used as a number. PURE.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::sse::{SseError, SseParser};
use crate::quota::SAFE_INTEGER_MAX;

/// The longest answer that is kept, bytes: it must fit a row (2 MB). Beyond, it ends as if cut by length.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// More bytes than any tokenizer's tokens have on average: a provider that sends more ignores the `max_tokens` it got.
const BYTES_PER_TOKEN_MAX: usize = 64;
/// What even the shortest answer may have, bytes.
const TEXT_BYTES_MIN: usize = 4 * 1024;

/// Why an answer broke off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// The provider sent an error object; its HTTP-like status if it told one.
    ProviderError(Option<u16>),
    /// Bytes that are not an answer (which kind, for the log and for engineers).
    Unreadable(&'static str),
    /// The stream ended without a word that it was complete.
    Cut,
}

/// Token counts a provider reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reported {
    /// Prompt tokens.
    pub input: u64,
    /// Completion tokens.
    pub output: u64,
    /// Of the output: reasoning.
    pub reasoning: u64,
    /// Of the input: cached.
    pub cached: u64,
}

/// The answer so far.
#[derive(Debug)]
pub struct Answer {
    parser: SseParser,
    /// Bytes of text after which it ends as if cut by length.
    text_bytes_max: usize,
    /// The text so far.
    pub text: String,
    /// Reasoning the model showed, kept apart from the text.
    pub reasoning: String,
    /// Pieces of text and reasoning so far.
    pub deltas: u64,
    /// Data events so far: zero means that the provider has not begun.
    pub events: u64,
    /// The provider's `finish_reason`.
    pub finish: Option<String>,
    /// `[DONE]` came.
    pub done: bool,
    /// The last believable usage.
    pub usage: Option<Reported>,
    /// A usage came that cannot be true.
    pub hostile: bool,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    /// `error` in providers that put an error's fields at the top.
    #[serde(borrow, default)]
    object: Option<Cow<'a, str>>,
    /// The code of such an error.
    #[serde(borrow, default)]
    code: Option<&'a RawValue>,
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    /// Only the first choice is the answer.
    #[serde(default)]
    index: u64,
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    /// A string, or a list of parts with text.
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning_content: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    reasoning: Option<Cow<'a, str>>,
}

impl Answer {
    /// An answer of at most `max_tokens` tokens, by what the provider was asked.
    #[must_use]
    pub fn of_tokens(max_tokens: u64) -> Self {
        let bytes = usize::try_from(max_tokens).unwrap_or(usize::MAX).saturating_mul(BYTES_PER_TOKEN_MAX);
        Self {
            parser: SseParser::default(),
            text_bytes_max: bytes.clamp(TEXT_BYTES_MIN, TEXT_BYTES_MAX),
            text: String::new(),
            reasoning: String::new(),
            deltas: 0,
            events: 0,
            finish: None,
            done: false,
            usage: None,
            hostile: false,
        }
    }

    /// Takes the next bytes; calls `delta` with each new piece of text.
    ///
    /// # Errors
    /// Why the answer broke off; what came before is kept.
    pub fn feed(&mut self, bytes: &[u8], mut delta: impl FnMut(&str)) -> Result<(), Broken> {
        let mut parser = std::mem::take(&mut self.parser);
        let mut result = Ok(());
        let read = parser.feed(bytes, |data| {
            if result.is_ok() && !self.done {
                result = self.event(data, &mut delta);
            }
        });
        self.parser = parser;
        result?;
        read.map_err(|SseError::TooLong| Broken::Unreadable("line over 1 MiB"))
    }

    /// The provider closed the stream.
    ///
    /// # Errors
    /// [`Broken::Cut`] unless it had said that the answer was complete.
    pub fn end(&self) -> Result<(), Broken> {
        if self.done || self.finish.is_some() { Ok(()) } else { Err(Broken::Cut) }
    }

    fn event(&mut self, data: &[u8], delta: &mut impl FnMut(&str)) -> Result<(), Broken> {
        self.events += 1;
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk<'_> = match serde_json::from_slice(data) {
            Ok(chunk) => chunk,
            // After the finish only usage follows: one that is not even JSON is a lie, not a broken answer.
            Err(_) if self.finish.is_some() => {
                self.hostile = true;
                return Ok(());
            }
            Err(_) => return Err(Broken::Unreadable("event is not JSON of a completion")),
        };
        if let Some(error) = chunk.error.filter(|error| error.get() != "null") {
            return Err(Broken::ProviderError(error_status(error)));
        }
        if chunk.object.as_deref() == Some("error") {
            return Err(Broken::ProviderError(chunk.code.and_then(|code| status(&serde_json::from_str(code.get()).ok()?))));
        }
        for choice in chunk.choices.into_iter().flatten().filter(|choice| choice.index == 0) {
            self.choice(choice, delta)?;
        }
        if let Some(usage) = chunk.usage.filter(|usage| usage.get() != "null") {
            match reported(usage) {
                Some(usage) => self.usage = Some(usage),
                None => self.hostile = true,
            }
        }
        Ok(())
    }

    fn choice(&mut self, choice: Choice<'_>, delta: &mut impl FnMut(&str)) -> Result<(), Broken> {
        if let Some(piece) = choice.delta {
            if let Some(text) = piece.content.map(content).transpose()?.filter(|text| !text.is_empty()) {
                let room = self.text_bytes_max.saturating_sub(self.text.len());
                let mut fits = room.min(text.len());
                while !text.is_char_boundary(fits) {
                    fits -= 1;
                }
                let kept = text.get(..fits).unwrap_or_default();
                if kept.len() < text.len() {
                    self.finish = Some("length".to_owned());
                    self.done = true;
                }
                if !kept.is_empty() {
                    self.deltas += 1;
                    self.text.push_str(kept);
                    delta(kept);
                }
            }
            if let Some(thought) = piece.reasoning_content.or(piece.reasoning).filter(|thought| !thought.is_empty()) {
                self.deltas += 1;
                if self.reasoning.len() + thought.len() <= self.text_bytes_max {
                    self.reasoning.push_str(&thought);
                } else {
                    self.finish = Some("length".to_owned());
                    self.done = true;
                }
            }
        }
        if let Some(reason) = choice.finish_reason.filter(|reason| !reason.is_empty()) {
            self.finish.get_or_insert_with(|| reason.chars().take(32).collect());
        }
        Ok(())
    }
}

/// A delta's text: a string, or the texts of its parts.
fn content(raw: &RawValue) -> Result<Cow<'_, str>, Broken> {
    #[derive(Deserialize)]
    struct Part {
        #[serde(default)]
        text: Option<String>,
    }
    let unreadable = |_| Broken::Unreadable("content is neither text nor parts");
    match raw.get().as_bytes().first() {
        Some(b'"') => serde_json::from_str::<Text<'_>>(raw.get()).map(|text| text.0).map_err(unreadable),
        Some(b'[') => {
            let parts: Vec<Part> = serde_json::from_str(raw.get()).map_err(unreadable)?;
            Ok(Cow::Owned(parts.into_iter().filter_map(|part| part.text).collect()))
        }
        Some(b'n') => Ok(Cow::Borrowed("")),
        _ => Err(Broken::Unreadable("content is neither text nor parts")),
    }
}

/// A JSON string, borrowed where nothing in it is escaped.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The HTTP-like status of an error object: `code` or `status`, as a number or a string of digits.
fn error_status(error: &RawValue) -> Option<u16> {
    let error: Value = serde_json::from_str(error.get()).ok()?;
    ["code", "status"].iter().find_map(|key| status(error.get(key)?))
}

/// A number that is an HTTP error status, or a string of its digits.
fn status(value: &Value) -> Option<u16> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok())?;
    u16::try_from(number).ok().filter(|status| (400..600).contains(status))
}

/// A usage object, if its totals are whole numbers of tokens that JavaScript could count. Details only explain totals:
/// dialects differ in them, so they are made to fit and never disqualify a report.
fn reported(usage: &RawValue) -> Option<Reported> {
    let usage: Value = serde_json::from_str(usage.get()).ok()?;
    let detail = |group: &str, key: &str| usage.get(group).and_then(|group| tokens(group.get(key)?)).unwrap_or(0);
    let (input, mut output) = (tokens(usage.get("prompt_tokens")?)?, tokens(usage.get("completion_tokens")?)?);
    let reasoning = detail("completion_tokens_details", "reasoning_tokens");
    // Some count reasoning apart from the completion; their total tells.
    let total = usage.get("total_tokens").and_then(tokens);
    if reasoning > 0 && total == input.checked_add(output).and_then(|sum| sum.checked_add(reasoning)) {
        output += reasoning;
    }
    let cached = detail("prompt_tokens_details", "cached_tokens").min(input);
    Some(Reported { input, output, reasoning: reasoning.min(output), cached })
}

/// A whole number of tokens, also one written as `50.0`.
fn tokens(value: &Value) -> Option<u64> {
    let whole =
        |number: f64| (number.fract() == 0.0 && (0.0..=SAFE_INTEGER_MAX as f64).contains(&number)).then_some(number as u64);
    value.as_u64().or_else(|| whole(value.as_f64()?)).filter(|tokens| *tokens <= SAFE_INTEGER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(text: &str) -> String {
        let json =
            serde_json::json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}], "usage": null});
        format!("data: {json}\n\n")
    }

    const FINISH: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";

    fn read(stream: &str) -> (Answer, Vec<String>, Result<(), Broken>) {
        let mut answer = Answer::of_tokens(u64::MAX);
        let mut pieces = Vec::new();
        let result = answer.feed(stream.as_bytes(), |piece| pieces.push(piece.to_owned()));
        let result = result.and_then(|()| answer.end());
        (answer, pieces, result)
    }

    #[test]
    fn a_good_stream_is_text_finish_and_usage() {
        let usage = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":3,\"completion_tokens_details\":{\"reasoning_tokens\":1},\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n";
        let (answer, pieces, result) = read(&format!("{}{}{FINISH}{usage}data: [DONE]\n\n", delta("从前"), delta("有座山")));
        assert_eq!(result, Ok(()));
        assert_eq!((answer.text.as_str(), pieces.len(), answer.finish.as_deref()), ("从前有座山", 2, Some("stop")));
        assert_eq!(answer.usage, Some(Reported { input: 9, output: 3, reasoning: 1, cached: 4 }));
    }

    #[test]
    fn odd_but_honest_streams_are_read() {
        let cases = [
            format!("{}data: {{\"choices\":null}}\n\n{FINISH}", delta("a")),
            format!("{}{FINISH}", delta("a")),
            format!("{}data: [DONE]\n\n", delta("a")),
            format!("{}data: {{\"choices\":[{{\"index\":1,\"delta\":{{\"content\":\"b\"}}}}]}}\n\n{FINISH}", delta("a")),
            format!(": ping\n\n{}\n\n{FINISH}", delta("a")),
            format!("data: {{\"choices\":[{{\"delta\":{{\"reasoning_content\":\"hm\"}}}}]}}\n\n{}{FINISH}", delta("a")),
            format!(
                "data: {{\"choices\":[{{\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}}}}]}}\n\n{}{FINISH}",
                delta("a")
            ),
        ];
        for stream in cases {
            let (answer, _, result) = read(&stream);
            assert_eq!((result, answer.text.as_str()), (Ok(()), "a"), "{stream}");
        }
        let (answer, _, result) = read(FINISH);
        assert_eq!((result, answer.text.as_str()), (Ok(()), ""), "finish without text");
    }

    #[test]
    fn broken_streams_say_how() {
        let cases = [
            (delta("a"), Broken::Cut),
            (String::new(), Broken::Cut),
            (
                format!("{}data: {{\"error\":{{\"message\":\"x\",\"code\":429}}}}\n\n", delta("a")),
                Broken::ProviderError(Some(429)),
            ),
            ("data: {\"error\":{\"message\":\"x\",\"code\":\"oops\"}}\n\n".to_owned(), Broken::ProviderError(None)),
            ("data: {\"error\":\"x\"}\n\n".to_owned(), Broken::ProviderError(None)),
            (format!("{}data: <html>\n\n", delta("a")), Broken::Unreadable("event is not JSON of a completion")),
            (format!("data: {}\n\n", "x".repeat(1 << 20)), Broken::Unreadable("line over 1 MiB")),
        ];
        for (stream, broken) in cases {
            assert_eq!(read(&stream).2, Err(broken), "{}", stream.chars().take(80).collect::<String>());
        }
    }

    #[test]
    fn dialects_of_usage_are_understood() {
        for (usage, input, output, reasoning, cached) in [
            (r#"{"prompt_tokens":50.0,"completion_tokens":9}"#, 50, 9, 0, 0),
            (
                r#"{"prompt_tokens":50,"completion_tokens":9,"total_tokens":359,"completion_tokens_details":{"reasoning_tokens":300}}"#,
                50,
                309,
                300,
                0,
            ),
            (r#"{"prompt_tokens":50,"completion_tokens":9,"completion_tokens_details":{"reasoning_tokens":300}}"#, 50, 9, 9, 0),
            (r#"{"prompt_tokens":50,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":64}}"#, 50, 9, 0, 50),
        ] {
            let (answer, _, _) = read(&format!("{}{FINISH}data: {{\"choices\":[],\"usage\":{usage}}}\n\n", delta("a")));
            assert_eq!((answer.usage, answer.hostile), (Some(Reported { input, output, reasoning, cached }), false), "{usage}");
        }
    }

    #[test]
    fn parts_are_text_and_errors_at_the_top_are_errors() {
        let parts = "data: {\"choices\":[{\"delta\":{\"content\":[{\"type\":\"text\",\"text\":\"甲\"},{\"type\":\"text\",\"text\":\"乙\"}]}}]}\n\n";
        let (answer, _, result) = read(&format!("{parts}{FINISH}"));
        assert_eq!((result, answer.text.as_str()), (Ok(()), "甲乙"));
        let error = "data: {\"object\":\"error\",\"message\":\"x\",\"code\":500}\n\ndata: [DONE]\n\n";
        assert_eq!(read(&format!("{}{error}", delta("a"))).2, Err(Broken::ProviderError(Some(500))));
    }

    #[test]
    fn hostile_usage_is_flagged_and_never_a_number() {
        for usage in [
            r#"{"prompt_tokens":-1,"completion_tokens":3}"#,
            r#"{"prompt_tokens":9223372036854775808,"completion_tokens":3}"#,
            r#"{"prompt_tokens":1e309,"completion_tokens":3}"#,
            r#"{"prompt_tokens":NaN,"completion_tokens":3}"#,
            r#"{"prompt_tokens":"12","completion_tokens":3}"#,
            r#"{"prompt_tokens":1.5,"completion_tokens":3}"#,
            r#"{"completion_tokens":3}"#,
            r#"[1]"#,
            r#""12""#,
        ] {
            let (answer, _, result) = read(&format!("{}{FINISH}data: {{\"choices\":[],\"usage\":{usage}}}\n\n", delta("a")));
            assert_eq!((result, answer.usage, answer.hostile), (Ok(()), None, true), "{usage}");
        }
    }

    #[test]
    fn a_provider_that_ignores_max_tokens_is_cut() {
        let mut answer = Answer::of_tokens(100);
        answer.feed(delta(&"字".repeat(10_000)).as_bytes(), |_| ()).unwrap();
        assert!(answer.done && answer.text.len() <= 6_400, "{}", answer.text.len());
    }

    #[test]
    fn an_endless_answer_ends_at_the_cap() {
        let piece = delta(&"字".repeat(100_000));
        let mut answer = Answer::of_tokens(u64::MAX);
        for _ in 0..5 {
            answer.feed(piece.as_bytes(), |_| ()).unwrap();
        }
        assert!(answer.text.len() <= TEXT_BYTES_MAX && answer.text.len() > TEXT_BYTES_MAX - 3);
        assert_eq!((answer.finish.as_deref(), answer.done), (Some("length"), true));
    }
}
