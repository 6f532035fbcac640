//! What a client sees of a generation, and its exact bytes (contract 2.3 "P, default wire" and 3.5).
//!
//! Invariant: bytes are a function of the event and the ids, so that a resumed stream equals the first one byte for byte.
//! Every event has an `id:` (its sequence number), one `data: ` line of one JSON object, `\n` line ends and a blank line.
//! Exactly one of `content`/`delta`/`text` stands in text events, none in the others. PURE.

use std::io::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Ids;
use crate::error::ApiError;
use crate::quota::{Crossing, Usage};

/// An event of a generation's log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// First: ids and model.
    #[serde(rename = "m")]
    Meta {
        /// Catalogue id of the model.
        model: String,
    },
    /// A piece of text, and the tokens of all text so far (estimated while it runs).
    #[serde(rename = "d")]
    Delta(String, u64),
    /// A quota threshold was crossed.
    #[serde(rename = "q")]
    Quota(Box<Crossing>),
    /// Last: complete, or stopped by the author.
    #[serde(rename = "f")]
    Done {
        /// Why it ended.
        finish: String,
        /// Catalogue id of the model.
        model: String,
        /// What was used.
        usage: Box<Usage>,
    },
    /// Last: broken off.
    #[serde(rename = "e")]
    Error {
        /// Stable code.
        code: u32,
        /// For people.
        message: String,
        /// Whether trying again may help.
        retryable: bool,
    },
}

impl Event {
    /// The terminal event of an error.
    #[must_use]
    pub fn error(error: &ApiError) -> Self {
        Self::Error { code: error.code, message: error.message.clone(), retryable: error.retryable() }
    }

    /// Whether nothing follows.
    #[must_use]
    pub const fn is_terminal(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Error { .. })
    }
}

/// How a client wants its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Deltas as JSON.
    #[default]
    Delta,
    /// The old backend's payloads: cumulative `content` beside each delta.
    Cumulative,
    /// The specification's literal form: the text chunk itself as data.
    Text,
}

impl Mode {
    /// The mode `?stream_mode=` names.
    #[must_use]
    pub fn parse(word: Option<&str>) -> Option<Self> {
        match word {
            None | Some("delta" | "default") => Some(Self::Delta),
            Some("cumulative") => Some(Self::Cumulative),
            Some("text") => Some(Self::Text),
            Some(_) => None,
        }
    }
}

/// `usage` as SDKs know it.
#[must_use]
pub fn usage_json(usage: &Usage) -> serde_json::Value {
    json!({"prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": usage.total()})
}

/// Writes one client's events in its mode. Must be given every event from the first, also those it need not write:
/// cumulative content grows with them.
pub struct Renderer {
    mode: Mode,
    ids: Ids,
    /// `"sessionId":"…","messageId":"…",` or with `requestId`: the same in every delta.
    delta_head: String,
    content: String,
}

impl Renderer {
    /// A renderer for the generation `ids`.
    #[must_use]
    pub fn new(mode: Mode, ids: Ids) -> Self {
        let (key, value) = match &ids.session_id {
            Some(session_id) => ("sessionId", session_id),
            None => ("requestId", &ids.request_id),
        };
        let head = json!({key: value, "messageId": ids.message_id}).to_string();
        let delta_head = head.strip_suffix('}').unwrap_or(&head).to_owned();
        Self { mode, ids, delta_head, content: String::new() }
    }

    /// Appends the bytes of `event` to `out`.
    pub fn render(&mut self, seq: u64, event: &Event, out: &mut Vec<u8>) {
        self.note(event);
        match self.mode {
            Mode::Delta => self.render_delta(seq, event, out),
            Mode::Cumulative => self.render_cumulative(seq, event, out),
            Mode::Text => self.render_text(seq, event, out),
        }
    }

    /// Takes an event into account without writing it: the client has it already.
    pub fn skip(&mut self, event: &Event) {
        self.note(event);
    }

    fn note(&mut self, event: &Event) {
        if let (Mode::Cumulative, Event::Delta(text, _)) = (self.mode, event) {
            self.content.push_str(text);
        }
    }

    fn render_delta(&self, seq: u64, event: &Event, out: &mut Vec<u8>) {
        match event {
            Event::Meta { model } => frame(out, seq, "meta", &with(&self.ids, json!({"model": model}))),
            Event::Delta(text, tokens) => {
                // The hot path: one per token, so nothing is built that is not written. Writing to a Vec cannot fail.
                let _ = write!(out, "id: {seq}\nevent: message\ndata: {},\"seq\":{seq},\"delta\":", self.delta_head);
                let _ = serde_json::to_writer(&mut *out, text);
                let _ = write!(out, ",\"tokens\":{tokens}}}\n\n");
            }
            Event::Quota(crossing) => frame(out, seq, "quota", &json!(crossing)),
            Event::Done { finish, model, usage } => {
                let facts = json!({
                    "tokensUsed": usage.total(), "model": model, "finishReason": finish,
                    "usage": usage_json(usage), "estimated": usage.estimated,
                });
                frame(out, seq, "done", &with(&self.ids, facts));
            }
            Event::Error { code, message, retryable } => {
                frame(out, seq, "error", &with(&self.ids, json!({"error": message, "code": code, "retryable": retryable})));
            }
        }
    }

    fn render_cumulative(&self, seq: u64, event: &Event, out: &mut Vec<u8>) {
        let session = self.ids.session_id.as_ref();
        let ids = match session {
            Some(session_id) => json!({"sessionId": session_id, "messageId": self.ids.message_id}),
            None => json!({"requestId": self.ids.request_id}),
        };
        match event {
            Event::Meta { .. } | Event::Quota(_) => {}
            Event::Delta(text, tokens) => {
                frame(out, seq, "message", &merge(ids, json!({"delta": text, "content": self.content, "tokens": tokens})));
            }
            Event::Done { model, usage, .. } => {
                frame(
                    out,
                    seq,
                    "done",
                    &merge(ids, json!({"content": self.content, "tokensUsed": usage.total(), "model": model})),
                );
            }
            Event::Error { message, .. } => frame(out, seq, "error", &json!({"error": message})),
        }
    }

    fn render_text(&self, seq: u64, event: &Event, out: &mut Vec<u8>) {
        match event {
            Event::Delta(text, _) => {
                let _ = write!(out, "id: {seq}\nevent: message\n");
                // A line end within the text starts another data line, which the reader joins again with \n.
                for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
                    let _ = writeln!(out, "data: {line}");
                }
                out.push(b'\n');
            }
            Event::Meta { .. } | Event::Quota(_) | Event::Done { .. } | Event::Error { .. } => self.render_delta(seq, event, out),
        }
    }
}

fn frame(out: &mut Vec<u8>, seq: u64, name: &str, data: &serde_json::Value) {
    let _ = write!(out, "id: {seq}\nevent: {name}\ndata: {data}\n\n");
}

fn with(ids: &Ids, facts: serde_json::Value) -> serde_json::Value {
    merge(json!(ids), facts)
}

fn merge(mut left: serde_json::Value, right: serde_json::Value) -> serde_json::Value {
    if let (Some(fields), serde_json::Value::Object(more)) = (left.as_object_mut(), right) {
        fields.extend(more);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Level, QuotaType};

    fn ids() -> Ids {
        Ids { session_id: Some("s".to_owned()), message_id: "m".to_owned(), request_id: "r".to_owned() }
    }

    fn events() -> Vec<Event> {
        vec![
            Event::Meta { model: "gpt-4".to_owned() },
            Event::Delta("他说：\"走\"\n".to_owned(), 1),
            Event::Delta("吧".to_owned(), 2),
            Event::Quota(Box::new(Crossing {
                quota_type: QuotaType::Daily,
                total_quota: 10,
                remaining_quota: 1,
                level: Level::Critical,
            })),
            Event::Done {
                finish: "stop".to_owned(),
                model: "gpt-4".to_owned(),
                usage: Box::new(Usage { input: 5, output: 2, ..Usage::default() }),
            },
        ]
    }

    fn render(mode: Mode, from: usize) -> String {
        let (mut renderer, mut out) = (Renderer::new(mode, ids()), Vec::new());
        for (at, event) in events().iter().enumerate() {
            if at < from { renderer.skip(event) } else { renderer.render(at as u64 + 1, event, &mut out) }
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_default_wire_is_this_to_the_byte() {
        let golden = concat!(
            "id: 1\nevent: meta\ndata: {\"messageId\":\"m\",\"model\":\"gpt-4\",\"requestId\":\"r\",\"sessionId\":\"s\"}\n\n",
            "id: 2\nevent: message\ndata: {\"messageId\":\"m\",\"sessionId\":\"s\",\"seq\":2,\"delta\":\"他说：\\\"走\\\"\\n\",\"tokens\":1}\n\n",
            "id: 3\nevent: message\ndata: {\"messageId\":\"m\",\"sessionId\":\"s\",\"seq\":3,\"delta\":\"吧\",\"tokens\":2}\n\n",
            "id: 4\nevent: quota\ndata: {\"level\":\"critical\",\"quotaType\":\"daily\",\"remainingQuota\":1,\"totalQuota\":10}\n\n",
            "id: 5\nevent: done\ndata: {\"estimated\":false,\"finishReason\":\"stop\",\"messageId\":\"m\",\"model\":\"gpt-4\",\"requestId\":\"r\",\"sessionId\":\"s\",",
            "\"tokensUsed\":7,\"usage\":{\"completion_tokens\":2,\"prompt_tokens\":5,\"total_tokens\":7}}\n\n",
        );
        assert_eq!(render(Mode::Delta, 0), golden);
    }

    #[test]
    fn other_modes_show_the_same_answer() {
        let cumulative = render(Mode::Cumulative, 0);
        assert!(cumulative.contains("\"content\":\"他说：\\\"走\\\"\\n吧\",\"delta\":\"吧\""), "{cumulative}");
        assert!(!cumulative.contains("event: meta"));
        let text = render(Mode::Text, 0);
        assert!(text.contains("id: 2\nevent: message\ndata: 他说：\"走\"\ndata: \n\n"), "{text}");
    }

    #[test]
    fn a_resumed_stream_is_the_tail_of_the_first() {
        for mode in [Mode::Delta, Mode::Cumulative, Mode::Text] {
            let whole = render(mode, 0);
            for from in 0..=events().len() {
                assert!(whole.ends_with(&render(mode, from)), "{mode:?} from {from}");
            }
        }
    }

    #[test]
    fn only_text_events_have_a_text_key() {
        let mut renderer = Renderer::new(Mode::Delta, ids());
        for (seq, event) in [Event::error(&ApiError::provider_timeout())].iter().chain(&events()).enumerate() {
            let mut out = Vec::new();
            renderer.render(seq as u64, event, &mut out);
            let data = String::from_utf8(out).unwrap().lines().find_map(|l| l.strip_prefix("data: ").map(str::to_owned)).unwrap();
            let data: serde_json::Value = serde_json::from_str(&data).unwrap();
            let texts = ["content", "delta", "text"].iter().filter(|key| data.get(**key).is_some()).count();
            assert_eq!(texts, usize::from(matches!(event, Event::Delta(..))));
        }
    }
}
