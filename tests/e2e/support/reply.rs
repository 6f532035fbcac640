//! What the provider can be told to answer: a happy OpenAI stream, and one builder for each way in which real providers
//! were seen to break it. A reply is a list of steps; a test changes the happy one where its fault lies.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

/// One answer of the provider.
#[derive(Clone, Debug)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    pub(super) before_headers: Duration,
    pub(super) steps: Vec<Step>,
    pub(super) framing: Framing,
}

/// One thing the provider does while it sends a body.
#[derive(Clone, Debug)]
pub enum Step {
    /// Writes these bytes in one write (one HTTP chunk).
    Bytes(Vec<u8>),
    /// Writes these bytes again and again until the client leaves.
    Repeat {
        /// What to write.
        bytes: Vec<u8>,
        /// The wait between two writes.
        every: Duration,
    },
    /// Waits this long: a provider's own pace, not a way to wait for something.
    Pause(Duration),
    /// Waits until the test releases it.
    Gate,
    /// Never goes on.
    Hang,
    /// Closes the connection without the terminating chunk.
    Truncate,
    /// Resets the connection.
    Reset,
}

/// How the body's end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// The connection's close ends the body.
    UntilClose,
}

/// The last event of a complete OpenAI stream.
pub const DONE: &str = "[DONE]";

impl Reply {
    /// A stream of these event payloads, one write each.
    pub fn events(payloads: &[String]) -> Self {
        Self {
            status: 200,
            headers: vec![("Content-Type".into(), "text/event-stream; charset=utf-8".into())],
            before_headers: Duration::ZERO,
            steps: payloads.iter().map(|payload| Step::Bytes(event(payload))).collect(),
            framing: Framing::Chunked,
        }
    }

    /// Everything as OpenAI sends it: role, deltas, finish reason, usage (prompt, completion), `[DONE]`.
    pub fn happy(deltas: &[&str], usage: (u64, u64)) -> Self {
        Self::happy_with(deltas, &usage_json(usage))
    }

    /// As [`Reply::happy`], with the `usage` object as raw JSON text, so that it can be anything.
    pub fn happy_with(deltas: &[&str], usage: &str) -> Self {
        Self::events(&[opening(deltas), vec![finish("stop"), usage_event(usage), DONE.into()]].concat())
    }

    /// A complete answer without a usage chunk.
    pub fn no_usage(deltas: &[&str]) -> Self {
        Self::events(&[opening(deltas), vec![finish("stop"), DONE.into()]].concat())
    }

    /// A finish reason and usage, then a clean close without `[DONE]`.
    pub fn no_done(deltas: &[&str], usage: (u64, u64)) -> Self {
        Self::events(&[opening(deltas), vec![finish("stop"), usage_event(&usage_json(usage))]].concat())
    }

    /// Closes cleanly with neither a finish reason nor `[DONE]`.
    pub fn no_finish(deltas: &[&str]) -> Self {
        Self::events(&opening(deltas))
    }

    /// An error object inside a 200 after these deltas; with none it is the stream's very first event.
    pub fn error_in_200(deltas: &[&str]) -> Self {
        let error = json!({"error": {"message": "The server had an error", "type": "server_error", "code": 500}});
        let before = if deltas.is_empty() { Vec::new() } else { opening(deltas) };
        Self::events(&[before, vec![error.to_string()]].concat())
    }

    /// An error status with OpenAI's JSON error body.
    pub fn status(status: u16) -> Self {
        let body = json!({"error": {"message": "Incorrect API key provided: sk-e2e", "type": "upstream_says_no"}});
        let mut reply = Self::events(&[]);
        reply.status = status;
        reply.headers = vec![("Content-Type".into(), "application/json".into())];
        reply.steps = vec![Step::Bytes(body.to_string().into_bytes())];
        reply
    }

    /// These deltas, then silence with an open connection.
    pub fn stall(deltas: &[&str]) -> Self {
        Self::no_finish(deltas).then(Step::Hang)
    }

    /// These deltas, then nothing but `: ping` comments.
    pub fn stall_behind_pings(deltas: &[&str]) -> Self {
        let every = Duration::from_millis(200);
        Self::no_finish(deltas).then(Step::Repeat { bytes: b": ping\n\n".to_vec(), every })
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Waits this long before it sends the status line.
    pub fn slow_headers(mut self, wait: Duration) -> Self {
        self.before_headers = wait;
        self
    }

    /// Ends the body by closing instead of by a last chunk.
    pub fn until_close(mut self) -> Self {
        self.framing = Framing::UntilClose;
        self
    }

    /// Adds a step at the end.
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Puts a step before everything else.
    pub fn first(mut self, step: Step) -> Self {
        self.steps.insert(0, step);
        self
    }

    /// Puts bytes into the first write, before what it has.
    pub fn first_bytes(mut self, bytes: &str) -> Self {
        match self.steps.first_mut() {
            Some(Step::Bytes(first)) => first.splice(0..0, bytes.bytes()),
            other => panic!("{other:?} has no bytes to add to"),
        };
        self
    }

    /// Puts a step after the `count`-th delta of a stream that opens with a role chunk.
    pub fn step_after_delta(mut self, count: usize, step: Step) -> Self {
        self.steps.insert(count + 1, step);
        self
    }

    /// A gate before every write: the test releases them one by one.
    pub fn gated(mut self) -> Self {
        self.steps = self.steps.into_iter().flat_map(|step| [Step::Gate, step]).collect();
        self
    }

    /// Rewrites each write's bytes.
    pub fn map(mut self, rewrite: impl Fn(&str) -> String) -> Self {
        let before = self.bytes();
        for step in &mut self.steps {
            if let Step::Bytes(bytes) = step {
                *bytes = rewrite(std::str::from_utf8(bytes).expect("replies are built as text")).into_bytes();
            }
        }
        assert_ne!(self.bytes(), before, "a rewrite that changes nothing tests nothing");
        self
    }

    /// One byte per write.
    pub fn single_bytes(mut self) -> Self {
        self.steps = self.bytes().into_iter().map(|byte| Step::Bytes(vec![byte])).collect();
        self
    }

    /// The whole body in one write.
    pub fn one_write(mut self) -> Self {
        self.steps = vec![Step::Bytes(self.bytes())];
        self
    }

    /// The body compressed, and said so.
    pub fn gzip(mut self) -> Self {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        packed.write_all(&self.bytes()).expect("memory takes any write");
        self.steps = vec![Step::Bytes(packed.finish().expect("memory takes any write"))];
        self.header("Content-Encoding", "gzip")
    }

    /// The status line and headers.
    pub(super) fn head(&self) -> String {
        let mut head = format!("HTTP/1.1 {} Scripted\r\nConnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if self.framing == Framing::Chunked {
            head.push_str("Transfer-Encoding: chunked\r\n");
        }
        head.push_str("\r\n");
        head
    }

    /// The bytes on the wire of one write.
    pub(super) fn frame(&self, bytes: &[u8]) -> Vec<u8> {
        match self.framing {
            Framing::UntilClose => bytes.to_vec(),
            Framing::Chunked => [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let part = |step: &Step| match step {
            Step::Bytes(bytes) => bytes.clone(),
            other => panic!("{other:?} has no bytes to rearrange"),
        };
        self.steps.iter().flat_map(part).collect()
    }
}

impl From<Reply> for Vec<Reply> {
    fn from(reply: Reply) -> Self {
        vec![reply]
    }
}

/// `data: …` and the blank line.
fn event(payload: &str) -> Vec<u8> {
    format!("data: {payload}\n\n").into_bytes()
}

fn opening(deltas: &[&str]) -> Vec<String> {
    let role = delta(json!({"role": "assistant", "content": ""}));
    std::iter::once(role).chain(deltas.iter().map(|text| delta(json!({"content": text})))).collect()
}

/// A chunk with this delta, shaped like OpenAI's.
pub fn delta(delta: Value) -> String {
    chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]))
}

/// The chunk that says why generation ended.
pub fn finish(reason: &str) -> String {
    chunk(json!([{"index": 0, "delta": {}, "finish_reason": reason}]))
}

/// A chunk with these choices.
pub fn chunk(choices: Value) -> String {
    json!({
        "id": "chatcmpl-e2e", "object": "chat.completion.chunk", "created": 1_790_000_000, "model": "upstream-model",
        "choices": choices,
    })
    .to_string()
}

/// The chunk with empty choices that carries usage, given as raw JSON text.
pub fn usage_event(usage: &str) -> String {
    let head = chunk(json!([]));
    let open = head.strip_suffix('}').expect("a JSON object");
    format!("{open},\"usage\":{usage}}}")
}

/// OpenAI's usage object.
pub fn usage_json((prompt, completion): (u64, u64)) -> String {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}).to_string()
}
