//! The ledger's rows: account, windows, holds, entries; what they add up to, and how a changed row takes its place.
//!
//! Invariant: balance = limit − settled − held, and settled is the fold of entries. Rows say how things are; what may
//! happen to them is decided in [`super::ledger`]. PURE.

use serde::{Deserialize, Serialize};

use super::period::Zone;
use super::price::Price;
use super::{EndReason, Level, Limit, QuotaState, QuotaType, Service, Settlement, Usage};
use crate::identity::Role;

/// Who the user is to the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The role whose defaults apply.
    pub role: Role,
    /// `iat` of the token the role came from, unix seconds.
    pub role_issued_at: i64,
    /// New holds are refused; running ones settle.
    pub suspended: bool,
    /// First touch, unix ms.
    pub created_at: i64,
    /// Last change, unix ms.
    pub updated_at: i64,
}

/// What was settled in one period of one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Which quota.
    pub quota_type: QuotaType,
    /// Which period: `2026-11-23`, `2026-11`, `total`.
    pub period: String,
    /// Settled tokens.
    pub used: u64,
    /// Settlements.
    pub consumptions: u64,
    /// The last one, unix ms.
    pub last_at: Option<i64>,
    /// The highest level already told: each is told once a period.
    pub level: Level,
}

/// State of a hold. All but `Open` are terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldState {
    /// Tokens are set aside.
    Open,
    /// Charged; the rest was freed.
    Settled,
    /// Freed, nothing charged.
    Released,
    /// Freed because nobody renewed it.
    Expired,
}

/// Tokens set aside for one generation, in all three types at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The caller's id for it.
    pub id: String,
    /// The generation's request id.
    pub request_id: String,
    /// The message it answers with.
    pub message_id: String,
    /// Which feature.
    pub service: Service,
    /// Which model.
    pub model: String,
    /// Price when it was taken.
    pub price: Price,
    /// Tokens set aside: estimated prompt + granted output.
    pub amount: u64,
    /// Of those, output.
    pub output_tokens: u64,
    /// The day it was taken in.
    pub day: String,
    /// The month it was taken in.
    pub month: String,
    /// When, unix ms.
    pub taken_at: i64,
    /// When it lapses unless renewed, unix ms.
    pub expires_at: i64,
    /// Where it stands.
    pub state: HoldState,
    /// What its settlement did: a repeated settle gets the same answer.
    pub outcome: Option<Settlement>,
}

impl Hold {
    /// The period of `quota_type` this hold belongs to.
    #[must_use]
    pub fn period(&self, quota_type: QuotaType) -> &str {
        match quota_type {
            QuotaType::Daily => &self.day,
            QuotaType::Monthly => &self.month,
            QuotaType::Total => "total",
        }
    }
}

/// One movement of one quota: an append-only line of the books, and a row of `GET /ai/quota/transactions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `{hold}:{type}`: inserting it twice is inserting it once.
    pub id: String,
    /// Which quota.
    pub quota_type: QuotaType,
    /// Which period.
    pub period: String,
    /// `consume`.
    pub kind: EntryKind,
    /// Tokens moved.
    pub amount: u64,
    /// Left before, tokens (0 where unlimited).
    pub before: u64,
    /// Left after, tokens (0 where unlimited).
    pub after: u64,
    /// Which feature.
    pub service: Service,
    /// Which model.
    pub model: String,
    /// The generation's request id.
    pub request_id: String,
    /// The message it made.
    pub message_id: String,
    /// The hold it resolved.
    pub hold_id: String,
    /// What was used.
    pub usage: Usage,
    /// What it cost, micro-credits.
    pub cost_micro: u64,
    /// By which price.
    pub price_version: String,
    /// Used but not charged, tokens.
    pub written_off: u64,
    /// Why the generation ended.
    pub reason: EndReason,
    /// When, unix ms.
    pub at: i64,
}

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// Tokens were spent.
    Consume,
}

/// The rows a decision looks at: the account, the windows of every period in play, every open hold, and the hold the
/// command names whatever its state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Missing before the first touch.
    pub account: Option<Account>,
    /// Windows; a missing one has nothing settled.
    pub windows: Vec<Window>,
    /// Holds.
    pub holds: Vec<Hold>,
}

/// A row as it must be after the decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The account.
    Account(Account),
    /// A window.
    Window(Window),
    /// A hold.
    Hold(Hold),
    /// A new entry, for the books and the outbox.
    Entry(Entry),
}

impl Ledger {
    /// Puts a changed row in its place.
    pub fn apply(&mut self, change: &Change) {
        fn put<T: Clone>(rows: &mut Vec<T>, row: &T, same: impl Fn(&T) -> bool) {
            match rows.iter_mut().find(|other| same(other)) {
                Some(slot) => *slot = row.clone(),
                None => rows.push(row.clone()),
            }
        }
        match change {
            Change::Account(account) => self.account = Some(account.clone()),
            Change::Window(window) => {
                put(&mut self.windows, window, |other| other.quota_type == window.quota_type && other.period == window.period);
            }
            Change::Hold(hold) => put(&mut self.holds, hold, |other| other.id == hold.id),
            Change::Entry(_) => {}
        }
    }

    /// Settled tokens of a period.
    #[must_use]
    pub fn used(&self, quota_type: QuotaType, period: &str) -> u64 {
        self.window(quota_type, period).map_or(0, |window| window.used)
    }

    /// Tokens held in a period.
    #[must_use]
    pub fn held(&self, quota_type: QuotaType, period: &str) -> u64 {
        let open = self.holds.iter().filter(|hold| hold.state == HoldState::Open && hold.period(quota_type) == period);
        open.fold(0, |sum, hold| sum.saturating_add(hold.amount))
    }

    /// The limit of a type.
    #[must_use]
    pub fn limit(&self, quota_type: QuotaType) -> Limit {
        Limit::of_role(self.account.as_ref().map_or(Role::Reader, |account| account.role), quota_type)
    }

    /// Tokens of a period that are neither settled nor held.
    #[must_use]
    pub fn free(&self, quota_type: QuotaType, period: &str) -> u64 {
        self.limit(quota_type).left(self.used(quota_type, period).saturating_add(self.held(quota_type, period)))
    }

    pub(super) fn window(&self, quota_type: QuotaType, period: &str) -> Option<&Window> {
        self.windows.iter().find(|window| window.quota_type == quota_type && window.period == period)
    }

    pub(super) fn hold(&self, id: &str) -> Option<&Hold> {
        self.holds.iter().find(|hold| hold.id == id)
    }

    /// The three quotas as they stand at `now_ms`.
    #[must_use]
    pub fn quotas(&self, zone: Zone, now_ms: i64) -> Vec<QuotaState> {
        let Some(account) = &self.account else { return Vec::new() };
        let state = |quota_type| {
            let period = zone.period(quota_type, now_ms);
            let window = self.window(quota_type, &period);
            QuotaState {
                quota_type,
                role: account.role,
                limit: self.limit(quota_type),
                used: window.map_or(0, |window| window.used),
                reserved: self.held(quota_type, &period),
                suspended: account.suspended,
                consumptions: window.map_or(0, |window| window.consumptions),
                last_consumed_at: window.and_then(|window| window.last_at),
                resets_at: zone.resets_at(quota_type, now_ms),
                created_at: account.created_at,
                updated_at: account.updated_at,
            }
        };
        QuotaType::ALL.into_iter().map(state).collect()
    }
}
