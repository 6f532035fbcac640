//! The ledger's rows: account, windows, holds, entries; what they add up to, and how a changed row takes its place.
//!
//! Invariant: balance = limit − settled − held, and settled is the fold of entries. Rows say how things are; what may
//! happen to them is decided in [`super::ledger`]. PURE.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::period::Zone;
use super::price::Price;
use super::{Crossing, Level, Limit, QuotaState, QuotaType, SAFE_INTEGER_MAX, Service, Settlement, Usage};
use crate::identity::Role;

/// Who the user is to the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The role whose defaults apply.
    pub role: Role,
    /// `iat` of the token the role came from, unix seconds.
    pub role_issued_at: i64,
    /// An administrator set the role: tokens no longer change it.
    #[serde(default)]
    pub role_set: bool,
    /// Limits an administrator set, tokens; they stand until `initialize`.
    #[serde(default)]
    pub limits: BTreeMap<QuotaType, u64>,
    /// Tokens recharged; they add to the limit for good.
    #[serde(default)]
    pub credit: BTreeMap<QuotaType, u64>,
    /// When codes were tried that did not redeem, unix ms; only recent ones.
    #[serde(default)]
    pub code_tries: Vec<i64>,
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
    /// The object that runs the generation: it is told when a threshold is crossed.
    #[serde(default)]
    pub watcher: Option<Watcher>,
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
    /// Whether tokens are set aside.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == HoldState::Open
    }

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
    /// Unique by what caused it: inserting it twice is inserting it once.
    pub id: String,
    /// Which quota.
    pub quota_type: QuotaType,
    /// Which period.
    pub period: String,
    /// What it does.
    pub kind: EntryKind,
    /// Tokens moved.
    pub amount: u64,
    /// Left before, tokens (0 where unlimited).
    pub before: u64,
    /// Left after, tokens (0 where unlimited).
    pub after: u64,
    /// Which feature.
    pub service: Service,
    /// Which model; empty where none took part.
    pub model: String,
    /// The generation's request id, or the order's.
    pub request_id: String,
    /// The message it made; empty where none was.
    pub message_id: String,
    /// The hold it resolved; empty where none was.
    pub hold_id: String,
    /// What was used.
    pub usage: Usage,
    /// What it cost, micro-credits.
    pub cost_micro: u64,
    /// By which price; empty where none applies.
    pub price_version: String,
    /// Used but not charged, tokens.
    pub written_off: u64,
    /// Why the generation ended, or why the quota was moved.
    pub reason: String,
    /// How long the generation ran, ms.
    #[serde(default)]
    pub duration_ms: u64,
    /// When, unix ms.
    pub at: i64,
}

impl Entry {
    /// What it adds to the settled tokens of its period; what was given back counts against.
    #[must_use]
    pub fn moved(&self) -> i64 {
        let amount = i64::try_from(self.amount).unwrap_or(i64::MAX);
        match self.kind {
            EntryKind::Consume => amount,
            EntryKind::Reset => -amount,
            EntryKind::Recharge => 0,
        }
    }
}

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// Tokens were spent.
    Consume,
    /// The limit was raised.
    Recharge,
    /// What was spent in a period was given back.
    Reset,
}

impl EntryKind {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Consume => "consume",
            Self::Recharge => "recharge",
            Self::Reset => "reset",
        }
    }
}

/// A recharge that was made: the same order again is the same recharge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The platform's id for it.
    pub id: String,
    /// What it did.
    pub entry: Entry,
}

/// A threshold crossed, for its user to read later. At most one per type, period and level.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Unique by type, period, level (and reset).
    pub id: String,
    /// Which period.
    pub period: String,
    /// What was crossed.
    pub crossing: Crossing,
    /// When, unix ms.
    pub at: i64,
}

/// An object to be told of a threshold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watcher {
    /// The binding of its namespace.
    pub binding: String,
    /// Its name.
    pub object: String,
}

/// What travels to D1 through the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parcel {
    /// A line of the books.
    Entry(Box<Entry>),
    /// A notification.
    Notice(Notice),
    /// The account changed: the user's line in the operator's list must follow. (It does with every parcel.)
    User,
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
    /// The order the command names, if it was made.
    pub orders: Vec<Order>,
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
    /// A new notification, for the outbox.
    Notice(Notice),
    /// A recharge that was made.
    Order(Order),
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
            Change::Order(order) => put(&mut self.orders, order, |other| other.id == order.id),
            Change::Entry(_) | Change::Notice(_) => {}
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

    /// The limit of a type: what an administrator set, else the role's, and what was recharged on top.
    #[must_use]
    pub fn limit(&self, quota_type: QuotaType) -> Limit {
        let Some(account) = &self.account else { return Limit::of_role(Role::Reader, quota_type) };
        let base =
            account.limits.get(&quota_type).map_or_else(|| Limit::of_role(account.role, quota_type), |set| Limit::Tokens(*set));
        match base {
            Limit::Tokens(tokens) => {
                let credit = account.credit.get(&quota_type).copied().unwrap_or(0);
                Limit::Tokens(tokens.saturating_add(credit).min(SAFE_INTEGER_MAX))
            }
            Limit::Unlimited => Limit::Unlimited,
        }
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
            let reserved = self.held(quota_type, &period);
            QuotaState {
                quota_type,
                period,
                role: account.role,
                limit: self.limit(quota_type),
                used: window.map_or(0, |window| window.used),
                reserved,
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
