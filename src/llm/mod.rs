//! Talking to an OpenAI-compatible provider: what is sent, what comes back, how many tokens it is.
//!
//! [`client`] fetches, [`sse`] cuts the byte stream into events, [`answer`] folds events into the answer, [`tokens`]
//! estimates. All but the client are PURE.

pub mod answer;
pub mod client;
pub mod sse;
pub mod tokens;

use serde::{Deserialize, Serialize};

/// Who speaks in a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// Instructions.
    System,
    /// The author.
    User,
    /// The model.
    Assistant,
}

/// One message of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptMessage {
    /// Who speaks.
    pub role: Speaker,
    /// What is said.
    pub content: String,
}

/// Sampling settings; absent ones are left to the provider.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Sampling {
    /// 0.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// 0.0–1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// −2.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// −2.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
}

/// A call of `POST {base}/chat/completions`, always streamed, always asking for usage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatRequest {
    /// The provider's name of the model.
    pub model: String,
    /// The prompt.
    pub messages: Vec<PromptMessage>,
    /// Most output tokens: what the hold covers.
    pub max_tokens: u64,
    /// Sampling.
    #[serde(flatten)]
    pub sampling: Sampling,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl ChatRequest {
    /// A streamed call.
    #[must_use]
    pub const fn new(model: String, messages: Vec<PromptMessage>, max_tokens: u64, sampling: Sampling) -> Self {
        Self { model, messages, max_tokens, sampling, stream: true, stream_options: StreamOptions { include_usage: true } }
    }
}
