//! One generation: reserve → prime → pump → log → settle. Written once; objects differ only in what they do with the text.
//!
//! [`event`] is what clients see, [`live`] is what a running generation shares with those who watch it, [`meter`] is the
//! charging policy, [`store`] are its rows in the owning object, [`engine`] runs it and
//! [`pump`] is its loop. All but the last three are PURE.

pub mod engine;
pub mod event;
pub mod live;
pub mod meter;
pub mod pump;
pub mod store;

use serde::{Deserialize, Serialize};

use crate::identity::Caller;
use crate::llm::{PromptMessage, Sampling};
use crate::quota::books::Watcher;
use crate::quota::price::Price;
use crate::quota::{EndReason, Service, Usage};

/// The ids a generation's events carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct Ids {
    /// The chat session, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// The message being written.
    pub message_id: String,
    /// The generation itself: its key in the object's rows and in the ledger.
    pub request_id: String,
}

/// Everything one generation needs, decided before it starts and kept until it has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its ids.
    pub ids: Ids,
    /// Who pays.
    pub caller: Caller,
    /// Which feature.
    pub service: Service,
    /// The hold in the payer's ledger.
    pub hold_id: String,
    /// The object this runs in: the ledger tells it of thresholds.
    pub watcher: Watcher,
    /// When it was asked for, unix ms.
    pub started_at: i64,
    /// Catalogue id of the model.
    pub model: String,
    /// The provider's name of the model.
    pub upstream: String,
    /// Prompt and output together, tokens: usage beyond it cannot be true.
    pub context_window: u64,
    /// Price at the start.
    pub price: Price,
    /// Upper estimate of the prompt, for the hold, tokens.
    pub prompt_upper: u64,
    /// Close estimate of the prompt, for a charge without reported usage, tokens.
    pub prompt_typical: u64,
    /// Output asked for, tokens.
    pub max_output: u64,
    /// Sampling.
    pub sampling: Sampling,
    /// The prompt; not kept in rows.
    #[serde(skip)]
    pub prompt: Vec<PromptMessage>,
    /// What the owner needs to make the messages once the provider has begun (its own JSON).
    pub owner: serde_json::Value,
}

/// How a generation ended: saved with its message, told in its last event, charged by the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ending {
    /// Why.
    pub reason: EndReason,
    /// The wire's `finishReason`: the provider's word, or `stopped`, `time`, `error`, `interrupted`.
    pub finish_reason: String,
    /// What was used; `None` when nothing was delivered.
    pub usage: Option<Usage>,
    /// How long it took, ms.
    #[serde(default)]
    pub duration_ms: u64,
    /// The error a cut answer ends with; `None` when it ends in `done`.
    pub error: Option<crate::error::ApiError>,
}

impl Ending {
    /// Message status on the wire (contract 2.2).
    #[must_use]
    pub const fn status(&self) -> &'static str {
        match self.reason {
            EndReason::Finish => "complete",
            EndReason::Stop | EndReason::Time => "stopped",
            EndReason::Interrupted => "interrupted",
            EndReason::ProviderError | EndReason::Stall | EndReason::Cut => "failed",
        }
    }
}
