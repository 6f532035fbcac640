//! Quota: what a user may spend, what is held for running generations, what was spent.
//!
//! The vocabulary of the capability: quota types, limits, commands to the ledger object and its replies. The rows
//! are [`books`], the decisions in [`ledger`], the object that makes them durable in [`object`], what other objects call in [`client`].
//! Unit: tokens. Money is micro-credits beside it, never instead of it.

pub mod admin;
pub mod admin_routes;
pub mod books;
pub mod client;
pub mod codes;
pub mod command;
pub mod ledger;
pub mod object;
pub mod outbox;
pub mod period;
pub mod periods;
pub mod price;
pub mod projection;
pub mod reports;
pub mod routes;
pub mod store;
pub mod webhook;
pub mod wire;

use serde::{Deserialize, Serialize};

use crate::identity::Role;
pub use command::{Audit, Call, Command, Estimate, Governance, Reply, Reserve};

/// The largest integer JSON readers in JavaScript keep exactly: 2^53 − 1.
pub const SAFE_INTEGER_MAX: u64 = (1 << 53) - 1;

/// The three limits every generation must fit in and is charged to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuotaType {
    /// Resets at local midnight.
    Daily,
    /// Resets at local midnight before the first of the month.
    Monthly,
    /// Never resets.
    Total,
}

impl QuotaType {
    /// All three, in the order they are listed on the wire.
    pub const ALL: [Self; 3] = [Self::Daily, Self::Monthly, Self::Total];

    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Daily => "daily",
            Self::Monthly => "monthly",
            Self::Total => "total",
        }
    }

    /// The type a wire word names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quota_type| quota_type.as_str() == word)
    }
}

/// How much may be spent. Unlimited is a case of its own, not the number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// At most so many tokens.
    Tokens(u64),
    /// No limit (administrators).
    Unlimited,
}

impl Limit {
    /// A role's limit, in tokens (design.md "Quota").
    #[must_use]
    pub const fn of_role(role: Role, quota_type: QuotaType) -> Self {
        let (daily, monthly, total) = match role {
            Role::Reader => (10_000, 200_000, 5_000_000),
            Role::Writer => (50_000, 1_000_000, 20_000_000),
            Role::Vip => (100_000, 2_000_000, 50_000_000),
            Role::Admin => return Self::Unlimited,
        };
        Self::Tokens(match quota_type {
            QuotaType::Daily => daily,
            QuotaType::Monthly => monthly,
            QuotaType::Total => total,
        })
    }

    /// What is left after `spent` tokens; never below zero.
    #[must_use]
    pub const fn left(self, spent: u64) -> u64 {
        match self {
            Self::Tokens(limit) => limit.saturating_sub(spent),
            // What is settled must stay countable even where nothing limits it.
            Self::Unlimited => SAFE_INTEGER_MAX.saturating_sub(spent),
        }
    }
}

/// Which feature spent the tokens: `service` of a transaction (contract 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    /// Chat turns.
    Chat,
    /// Nobody's generation: recharges and resets.
    System,
}

impl Service {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::System => "system",
        }
    }
}

/// Why a generation ended; kept on its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The provider said it was complete.
    Finish,
    /// The author stopped it.
    Stop,
    /// The caller's time was up (non-streaming calls).
    Time,
    /// The provider failed after its first event.
    ProviderError,
    /// The provider was silent too long.
    Stall,
    /// The provider's stream ended without saying that it was complete.
    Cut,
    /// The object was killed; a later instance settled.
    Interrupted,
}

impl EndReason {
    /// The word on entries.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::Stop => "stop",
            Self::Time => "time",
            Self::ProviderError => "provider_error",
            Self::Stall => "stall",
            Self::Cut => "cut",
            Self::Interrupted => "interrupted",
        }
    }
}

/// Tokens a generation used, as reported by the provider or estimated here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Usage {
    /// Prompt tokens.
    pub input: u64,
    /// Completion tokens, reasoning included.
    pub output: u64,
    /// Of the output: tokens the model reasoned with.
    #[serde(default)]
    pub reasoning: u64,
    /// Of the input: tokens the provider had cached.
    #[serde(default)]
    pub cached: u64,
    /// Counted here, because the provider reported nothing (or nothing believable).
    #[serde(default)]
    pub estimated: bool,
    /// The provider's report could not be true and was replaced by an estimate.
    #[serde(default)]
    pub hostile: bool,
}

impl Usage {
    /// What is charged: prompt and completion tokens.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.input.saturating_add(self.output)
    }
}

/// What a settlement moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Settlement {
    /// Tokens charged, to each of the three types.
    pub charged: u64,
    /// Tokens used but not charged: over the balance, or after the hold had expired.
    pub written_off: u64,
    /// Cost of what was used, micro-credits.
    pub cost_micro: u64,
    /// Thresholds crossed by this settlement.
    #[serde(default)]
    pub crossings: Vec<Crossing>,
}

/// How little is left (design.md: 20 %, 10 %, 0 %). Ordered: a period's level only rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// More than 20 % left.
    #[default]
    Normal,
    /// At most 20 % left.
    Warning,
    /// At most 10 % left.
    Critical,
    /// Nothing left.
    Exhausted,
}

impl Level {
    /// The level of `used` tokens of `limit`.
    #[must_use]
    pub fn of(limit: Limit, used: u64) -> Self {
        let Limit::Tokens(limit) = limit else { return Self::Normal };
        let left = u128::from(limit.saturating_sub(used));
        let limit = u128::from(limit);
        match () {
            () if left == 0 => Self::Exhausted,
            () if left * 10 <= limit => Self::Critical,
            () if left * 5 <= limit => Self::Warning,
            () => Self::Normal,
        }
    }
}

/// A threshold crossed: payload of the SSE `quota` event (contract 2.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Crossing {
    /// Which quota.
    pub quota_type: QuotaType,
    /// Its limit, tokens.
    pub total_quota: u64,
    /// What is left of it, tokens.
    pub remaining_quota: u64,
    /// The level reached.
    pub level: Level,
}

/// One quota as read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaState {
    /// Which one.
    pub quota_type: QuotaType,
    /// The current period: `2026-11-23`, `2026-11`, `total`.
    pub period: String,
    /// The user's role.
    pub role: Role,
    /// The limit.
    pub limit: Limit,
    /// Settled tokens of the current period.
    pub used: u64,
    /// Tokens held by running generations of the current period.
    pub reserved: u64,
    /// New holds are refused.
    pub suspended: bool,
    /// Settlements of the current period.
    pub consumptions: u64,
    /// The last one, unix ms.
    pub last_consumed_at: Option<i64>,
    /// When the period ends, unix ms.
    pub resets_at: Option<i64>,
    /// First touch of the account, unix ms.
    pub created_at: i64,
    /// Last change, unix ms.
    pub updated_at: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_reached_at_20_10_and_0_percent_left() {
        let of = |used| Level::of(Limit::Tokens(1_000), used);
        assert_eq!([of(799), of(800), of(899), of(900), of(999), of(1_000)].map(|level| level as u8), [0, 1, 1, 2, 2, 3]);
        assert_eq!(Level::of(Limit::Unlimited, u64::MAX), Level::Normal);
        assert_eq!(Level::of(Limit::Tokens(0), 0), Level::Exhausted);
    }
}
