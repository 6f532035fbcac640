//! What a ledger object is asked and what it answers: one JSON command per call.
//!
//! Every command is safe to repeat: it carries the id (of a hold, an order, a key, a reset) that makes it one. PURE.

use serde::{Deserialize, Serialize};

use super::price::Price;
use super::{EndReason, QuotaState, QuotaType, Service, Settlement, Usage, books};
use crate::identity::{Caller, Role};

/// Asks for a hold: the worst case of one generation, taken before the provider is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve {
    /// Unique; a repeated reserve with it is the same hold.
    pub hold_id: String,
    /// The generation's request id, on every entry it causes.
    pub request_id: String,
    /// The message the generation answers with.
    pub message_id: String,
    /// The object that runs the generation: it is told when a threshold is crossed.
    #[serde(default)]
    pub watcher: Option<books::Watcher>,
    /// Which feature asks.
    pub service: Service,
    /// Catalogue id of the model.
    pub model: String,
    /// Price at the time of the hold; the settlement uses it.
    pub price: Price,
    /// Estimated prompt tokens.
    pub prompt_tokens: u64,
    /// Output tokens asked for; the grant may be less.
    pub output_tokens: u64,
    /// How long the hold lasts unrenewed, ms.
    pub ttl_ms: i64,
}

/// What a ledger object is asked, one JSON command per call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// Takes a hold, clamped to what is left.
    Reserve(Reserve),
    /// Charges what was used against the hold and frees the rest.
    Settle {
        /// The hold.
        hold_id: String,
        /// What was used.
        usage: Usage,
        /// Why the generation ended.
        reason: EndReason,
        /// How long it ran, ms.
        #[serde(default)]
        duration_ms: u64,
    },
    /// Frees the hold: nothing was delivered.
    Release {
        /// The hold.
        hold_id: String,
    },
    /// Keeps a running generation's hold for another term.
    Renew {
        /// The hold.
        hold_id: String,
        /// The term, ms.
        ttl_ms: i64,
    },
    /// Reads the three quotas, opening the account at first touch.
    Read,
    /// Binds an idempotency key to a target, or finds the one it is bound to.
    Claim {
        /// The caller's key.
        key: String,
        /// Hash of method, path and body: the same key with another is a conflict.
        fingerprint: String,
        /// Where the generation lives if the key is new.
        target: String,
        /// How long the key is kept, ms.
        ttl_ms: i64,
    },
    /// Frees a key that was bound by a request which was then refused.
    Unclaim {
        /// The key.
        key: String,
        /// What it was bound with.
        fingerprint: String,
    },
    /// Raises a limit for good. The same order again is the same recharge.
    Recharge {
        /// The platform's id for the payment, or the code's.
        order_id: String,
        /// Tokens.
        amount: u64,
        /// Which limit.
        quota_type: QuotaType,
        /// Why, for the books.
        reason: String,
    },
    /// An administrator's change.
    Govern(Governance),
    /// Asks whether another redemption code may be tried, and counts the try.
    TryCode,
    /// Sends what waits for D1 now; answers how much still waits.
    Flush,
    /// The books as they are, for reconciliation.
    Audit,
}

/// What an administrator may do to a user's quota.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "snake_case")]
pub enum Governance {
    /// Sets a limit, tokens; it stands until `Initialize`.
    SetLimit {
        /// Which.
        quota_type: QuotaType,
        /// How much.
        tokens: u64,
    },
    /// Sets the role; tokens no longer change it.
    SetRole {
        /// To what.
        role: Role,
    },
    /// Refuses new holds.
    Suspend,
    /// Takes them again.
    Activate,
    /// Gives back what was spent in the current period of one type, or of all.
    Reset {
        /// Which; all if absent.
        quota_type: Option<QuotaType>,
        /// Makes the entries unique.
        reset_id: String,
    },
    /// Back to the role's limits; what was recharged stays.
    Initialize {
        /// A role to set, if any.
        role: Option<Role>,
    },
}

/// A command to the ledger it is sent to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The user in person, whose token's role opens the account and is followed; absent when an administrator or a
    /// service acts on the user's ledger.
    pub caller: Option<Caller>,
    /// What to do.
    pub command: Command,
}

/// What the ledger answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// A hold stands.
    Granted {
        /// Output tokens the hold covers: what `max_tokens` must be.
        output_tokens: u64,
    },
    /// A settlement was made (now or by an earlier, equal call).
    Settled(Settlement),
    /// The hold is free, or was already closed.
    Released,
    /// Whether the hold still stands.
    Renewed {
        /// False: it had expired; the settlement will be written off.
        open: bool,
    },
    /// The three quotas.
    Quotas {
        /// Daily, monthly, total.
        quotas: Vec<QuotaState>,
    },
    /// Where the key's generation lives.
    Claimed {
        /// The target bound to the key.
        target: String,
        /// The key was bound by an earlier call.
        existed: bool,
    },
    /// A recharge was made (now or by an earlier, equal call).
    Credited {
        /// Its line in the books.
        entry: Box<books::Entry>,
        /// The quota it raised.
        quota: Box<QuotaState>,
        /// An earlier call made it.
        repeated: bool,
    },
    /// Another code may be tried.
    MayTry,
    /// How many parcels still wait for D1.
    Flushed {
        /// Parcels.
        waiting: u64,
    },
    /// The books.
    Audited(Box<Audit>),
}

/// A ledger laid open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    /// The three quotas.
    pub quotas: Vec<QuotaState>,
    /// Windows of the current periods.
    pub windows: Vec<books::Window>,
    /// Open holds.
    pub holds: Vec<books::Hold>,
    /// Entries that are not in D1 yet.
    pub waiting: Vec<books::Entry>,
}

/// A generation priced before it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// The model it would run on.
    pub model: String,
    /// Prompt, by the upper estimate, tokens.
    pub prompt_tokens: u64,
    /// Output it may take, tokens.
    pub output_tokens: u64,
    /// Its price.
    pub price: Price,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reply_survives_the_trip_from_the_object() {
        let replies = [
            Reply::Granted { output_tokens: 7 },
            Reply::Settled(Settlement { charged: 1, ..Settlement::default() }),
            Reply::Released,
            Reply::Renewed { open: false },
            Reply::Quotas { quotas: Vec::new() },
            Reply::Claimed { target: "s".to_owned(), existed: true },
            Reply::MayTry,
            Reply::Flushed { waiting: 3 },
            Reply::Audited(Box::new(Audit { quotas: vec![], windows: vec![], holds: vec![], waiting: vec![] })),
        ];
        for reply in replies {
            let json = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&json).unwrap(), reply);
        }
    }
}
