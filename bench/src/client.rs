//! One virtual client: a kept-alive HTTP/1.1 connection that posts and times the answer's body.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A connection that ended before it said anything.
const SILENT: &str = "closed without an answer";

/// A client's connection to `host`.
pub struct Client {
    host: String,
    socket: Option<TcpStream>,
}

/// An answer that came whole.
pub struct Answer {
    /// From sending the request to the first byte of the body.
    pub first: Duration,
    /// To its last.
    pub total: Duration,
    /// The body.
    pub body: String,
}

impl Client {
    /// A client of `host:port`; connects when it first asks.
    pub fn new(host: &str) -> Self {
        Self { host: host.to_owned(), socket: None }
    }

    /// Posts `body` and reads the answer, which must be a 200 and end as HTTP says.
    pub fn post(&mut self, path: &str, token: &str, body: &str) -> Result<Answer, String> {
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Accept: text/event-stream\r\nContent-Length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        );
        loop {
            let kept = self.socket.take();
            let reused = kept.is_some();
            let mut socket = match kept {
                Some(socket) => socket,
                None => TcpStream::connect(&self.host).and_then(|s| s.set_nodelay(true).map(|()| s)).map_err(told)?,
            };
            let sent = Instant::now();
            match socket.write_all(request.as_bytes()).map_err(told).and_then(|()| read(&mut socket, sent)) {
                Ok(answer) => {
                    self.socket = Some(socket);
                    return Ok(answer);
                }
                // The server had closed the kept connection.
                Err(why) if reused && why == SILENT => {}
                Err(why) => return Err(why),
            }
        }
    }
}

fn told(error: std::io::Error) -> String {
    error.to_string()
}

/// Reads a chunked answer to its last chunk.
fn read(socket: &mut TcpStream, sent: Instant) -> Result<Answer, String> {
    let (mut raw, mut body, mut piece, mut first) = (Vec::new(), Vec::new(), [0; 65_536], None);
    let mut head_read = false;
    loop {
        let count = socket.read(&mut piece).unwrap_or(0);
        if count == 0 {
            return Err(if raw.is_empty() && !head_read { SILENT.to_owned() } else { "the answer was cut".to_owned() });
        }
        raw.extend_from_slice(&piece[..count]);
        if !head_read {
            let Some(end) = find(&raw, b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&raw[..end]).to_ascii_lowercase();
            if !head.starts_with("http/1.1 200") || !head.contains("transfer-encoding: chunked") {
                return Err(String::from_utf8_lossy(&raw).into_owned());
            }
            raw.drain(..end + 4);
            head_read = true;
        }
        let ended = unchunk(&mut raw, &mut body)?;
        if first.is_none() && !body.is_empty() {
            first = Some(sent.elapsed());
        }
        if ended {
            let (total, body) = (sent.elapsed(), String::from_utf8(body).map_err(|e| e.to_string())?);
            return Ok(Answer { first: first.unwrap_or(total), total, body });
        }
    }
}

/// Moves the whole chunks of `raw` into `body`; true after the last.
fn unchunk(raw: &mut Vec<u8>, body: &mut Vec<u8>) -> Result<bool, String> {
    let mut at = 0;
    let ended = loop {
        let Some(line) = find(&raw[at..], b"\r\n") else { break false };
        let size = std::str::from_utf8(&raw[at..at + line]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        let (start, size) = (at + line + 2, size.ok_or("a chunk without a size")?);
        if raw.len() < start + size + 2 {
            break false;
        }
        body.extend_from_slice(&raw[start..start + size]);
        at = start + size + 2;
        if size == 0 {
            break true;
        }
    };
    raw.drain(..at);
    Ok(ended)
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|window| window == needle)
}
