//! The ledger's decisions: given the rows that matter, a command and the time, which rows change and what is answered.
//!
//! Invariants, for each user, quota type and period, after every decision:
//! - settled + held ≤ limit at the time a hold is granted; what is left is never below zero;
//! - a hold has one terminal state (settled, released or expired) and moves tokens at most once;
//! - a settlement charges all three types by the same amount, in the periods the hold was taken in;
//! - what cannot be charged is recorded as written off, never lost and never carried into the next balance.
//!
//! A decision is a list of after-images ([`Change`]); the object writes them in the same synchronous stretch. PURE.

use std::collections::BTreeMap;

use super::books::{Account, Change, Entry, EntryKind, Hold, HoldState, Ledger, Notice, Window};
use super::period::Zone;
use super::price::Price;
use super::{Crossing, EndReason, Level, Limit, QuotaType, Reserve, SAFE_INTEGER_MAX, Service, Settlement, Usage};
use crate::identity::{Caller, Role};

/// A generation must get at least this many output tokens (or all it asked for), else it is refused.
pub const OUTPUT_TOKENS_MIN: u64 = 64;

/// Why a reserve is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The account is suspended.
    #[error("suspended")]
    Suspended,
    /// Too little is left.
    #[error("{quota_type:?}: {left} tokens left")]
    Insufficient {
        /// The type with the least left.
        quota_type: QuotaType,
        /// Tokens left in it.
        left: u64,
    },
    /// The id belongs to a hold that is already closed.
    #[error("hold is closed")]
    Closed,
    /// No such hold.
    #[error("hold is unknown")]
    Unknown,
    /// The order was made before, for something else.
    #[error("order {0} was made for another amount or quota")]
    OrderDiffers(String),
    /// The sum is more than can be counted exactly.
    #[error("more than 2^53 − 1 tokens")]
    TooMuch,
    /// Too many codes were tried; the next one may be in so many seconds.
    #[error("too many wrong codes")]
    CodesTried(u64),
}

/// One decision in the making: the rows as they would be, and what changed.
pub struct Decision {
    pub(super) ledger: Ledger,
    changes: Vec<Change>,
    pub(super) zone: Zone,
    pub(super) now_ms: i64,
}

impl Decision {
    /// Starts from the rows at `now_ms`: expires every hold whose time is up, and meets the `caller` if there is one
    /// (opens the account at first touch, follows the newest token's role). Without one the account opens as a reader's.
    #[must_use]
    pub fn begin(ledger: Ledger, caller: Option<&Caller>, zone: Zone, now_ms: i64) -> Self {
        let mut decision = Self { ledger, changes: Vec::new(), zone, now_ms };
        decision.meet(caller);
        decision.expire_due();
        decision
    }

    /// The rows as decided, and the changes that lead there, in order.
    #[must_use]
    pub fn finish(self) -> (Ledger, Vec<Change>) {
        (self.ledger, self.changes)
    }

    /// The rows as decided so far.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub(super) fn change(&mut self, change: Change) {
        self.ledger.apply(&change);
        self.changes.push(change);
    }

    fn meet(&mut self, caller: Option<&Caller>) {
        let account = match (&self.ledger.account, caller) {
            (None, caller) => Account {
                role: caller.map_or(Role::Reader, |caller| caller.role),
                role_issued_at: caller.map_or(i64::MIN, |caller| caller.issued_at),
                role_set: false,
                limits: BTreeMap::new(),
                credit: BTreeMap::new(),
                code_tries: Vec::new(),
                suspended: false,
                created_at: self.now_ms,
                updated_at: self.now_ms,
            },
            (Some(account), Some(caller)) => {
                let newer = caller.issued_at > account.role_issued_at;
                let other = caller.issued_at == account.role_issued_at && caller.role != account.role;
                if account.role_set || !(newer || other) {
                    return;
                }
                Account { role: caller.role, role_issued_at: caller.issued_at, ..account.clone() }
            }
            (Some(_), None) => return,
        };
        self.change(Change::Account(account));
    }

    fn expire_due(&mut self) {
        let due: Vec<Hold> = self
            .ledger
            .holds
            .iter()
            .filter(|hold| hold.state == HoldState::Open && hold.expires_at <= self.now_ms)
            .cloned()
            .collect();
        for hold in due {
            self.change(Change::Hold(Hold { state: HoldState::Expired, ..hold }));
        }
    }

    /// Takes a hold of prompt + output tokens, clamping the output to what is free in all three types.
    /// Answers the output tokens granted. The same id again is the same hold.
    ///
    /// # Errors
    /// [`Refusal::Suspended`], [`Refusal::Insufficient`], or [`Refusal::Closed`] for the id of a closed hold.
    pub fn reserve(&mut self, ask: &Reserve) -> Result<u64, Refusal> {
        match self.ledger.hold(&ask.hold_id) {
            Some(hold) if hold.state == HoldState::Open => return Ok(hold.output_tokens),
            Some(_) => return Err(Refusal::Closed),
            None => {}
        }
        if self.ledger.account.as_ref().is_some_and(|account| account.suspended) {
            return Err(Refusal::Suspended);
        }
        let free = |quota_type| (self.ledger.free(quota_type, &self.zone.period(quota_type, self.now_ms)), quota_type);
        let (free, scarcest) = QuotaType::ALL.into_iter().map(free).min().unwrap_or((0, QuotaType::Daily));
        let output_tokens = ask.output_tokens.min(free.saturating_sub(ask.prompt_tokens));
        if output_tokens < OUTPUT_TOKENS_MIN.min(ask.output_tokens) || output_tokens == 0 {
            return Err(Refusal::Insufficient { quota_type: scarcest, left: free });
        }
        let hold = Hold {
            id: ask.hold_id.clone(),
            request_id: ask.request_id.clone(),
            message_id: ask.message_id.clone(),
            watcher: ask.watcher.clone(),
            service: ask.service,
            model: ask.model.clone(),
            price: ask.price,
            amount: ask.prompt_tokens.saturating_add(output_tokens).min(SAFE_INTEGER_MAX),
            output_tokens,
            day: self.zone.period(QuotaType::Daily, self.now_ms),
            month: self.zone.period(QuotaType::Monthly, self.now_ms),
            taken_at: self.now_ms,
            expires_at: self.now_ms.saturating_add(ask.ttl_ms),
            state: HoldState::Open,
            outcome: None,
        };
        self.change(Change::Hold(hold));
        Ok(output_tokens)
    }

    /// Charges what was used and frees the rest of the hold. Output is charged up to what the hold granted; a prompt that
    /// the provider counts higher than we estimated, as far as the balance goes; after an expiry nothing is. Whatever is
    /// not charged is written off on the entries.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] for an id no hold has, [`Refusal::Closed`] for a released one.
    pub fn settle(&mut self, hold_id: &str, usage: Usage, reason: EndReason, duration_ms: u64) -> Result<Settlement, Refusal> {
        let hold = self.ledger.hold(hold_id).cloned().ok_or(Refusal::Unknown)?;
        if let Some(outcome) = hold.outcome {
            return Ok(Settlement { crossings: Vec::new(), ..outcome });
        }
        let state = match hold.state {
            HoldState::Open => HoldState::Settled,
            HoldState::Expired => HoldState::Expired,
            HoldState::Settled | HoldState::Released => return Err(Refusal::Closed),
        };
        let used = usage.total().min(SAFE_INTEGER_MAX);
        // No provider may sell more output than it was asked for.
        let owed = usage.input.saturating_add(usage.output.min(hold.output_tokens)).min(SAFE_INTEGER_MAX);
        let chargeable = if state == HoldState::Settled { hold.amount.saturating_add(self.free_beside(&hold)) } else { 0 };
        let charged = owed.min(chargeable);
        let mut outcome = Settlement {
            charged,
            written_off: used - charged,
            cost_micro: hold.price.cost_micro(usage.input, usage.output),
            crossings: Vec::new(),
        };
        self.change(Change::Hold(Hold { state, outcome: Some(outcome.clone()), ..hold.clone() }));
        for quota_type in QuotaType::ALL {
            outcome.crossings.extend(self.post(&hold, quota_type, usage, &outcome, (reason, duration_ms)));
        }
        Ok(outcome)
    }

    /// Tokens free in every type, in the periods of `hold`.
    fn free_beside(&self, hold: &Hold) -> u64 {
        QuotaType::ALL.into_iter().map(|quota_type| self.ledger.free(quota_type, hold.period(quota_type))).min().unwrap_or(0)
    }

    /// Writes one type's window and entry; answers the threshold it crossed.
    fn post(
        &mut self,
        hold: &Hold,
        quota_type: QuotaType,
        usage: Usage,
        outcome: &Settlement,
        (reason, duration_ms): (EndReason, u64),
    ) -> Option<Crossing> {
        let period = hold.period(quota_type);
        let limit = self.ledger.limit(quota_type);
        let window = self.window_of(quota_type, period);
        let used = window.used.saturating_add(outcome.charged).min(SAFE_INTEGER_MAX);
        let left = |used| if limit == Limit::Unlimited { 0 } else { limit.left(used) };
        let level = Level::of(limit, used);
        let crossing = (level > window.level).then(|| Crossing {
            quota_type,
            total_quota: if let Limit::Tokens(tokens) = limit { tokens } else { 0 },
            remaining_quota: left(used),
            level,
        });
        self.change(Change::Entry(Entry {
            id: format!("{}:{}", hold.id, quota_type.as_str()),
            quota_type,
            period: period.to_owned(),
            kind: EntryKind::Consume,
            amount: outcome.charged,
            before: left(window.used),
            after: left(used),
            service: hold.service,
            model: hold.model.clone(),
            request_id: hold.request_id.clone(),
            message_id: hold.message_id.clone(),
            hold_id: hold.id.clone(),
            usage,
            cost_micro: outcome.cost_micro,
            price_version: hold.price.version(),
            written_off: outcome.written_off,
            reason: reason.as_str().to_owned(),
            duration_ms,
            at: self.now_ms,
        }));
        self.change(Change::Window(Window {
            used,
            consumptions: window.consumptions.saturating_add(1),
            last_at: Some(self.now_ms),
            level: level.max(window.level),
            ..window
        }));
        if let Some(crossing) = &crossing {
            let id = format!("{}:{period}:{level:?}:{}", quota_type.as_str(), hold.id);
            self.change(Change::Notice(Notice { id, period: period.to_owned(), crossing: crossing.clone(), at: self.now_ms }));
        }
        crossing
    }

    /// The window of a period; an empty one where nothing was settled yet.
    pub(super) fn window_of(&self, quota_type: QuotaType, period: &str) -> Window {
        self.ledger.window(quota_type, period).cloned().unwrap_or_else(|| Window {
            quota_type,
            period: period.to_owned(),
            used: 0,
            consumptions: 0,
            last_at: None,
            level: Level::Normal,
        })
    }

    /// Frees a hold: nothing was delivered. Releasing an unknown id closes it for good, so that a reserve that was
    /// overtaken by its own release cannot leave a hold behind.
    pub fn release(&mut self, hold_id: &str) {
        let released = match self.ledger.hold(hold_id).cloned() {
            Some(hold) if hold.state == HoldState::Open => Hold { state: HoldState::Released, ..hold },
            Some(_) => return,
            None => Hold {
                id: hold_id.to_owned(),
                request_id: String::new(),
                message_id: String::new(),
                watcher: None,
                service: Service::System,
                model: String::new(),
                price: Price::default(),
                amount: 0,
                output_tokens: 0,
                day: self.zone.period(QuotaType::Daily, self.now_ms),
                month: self.zone.period(QuotaType::Monthly, self.now_ms),
                taken_at: self.now_ms,
                expires_at: self.now_ms,
                state: HoldState::Released,
                outcome: None,
            },
        };
        self.change(Change::Hold(released));
    }

    /// Keeps an open hold until `ttl_ms` from now; false when it is no longer open.
    pub fn renew(&mut self, hold_id: &str, ttl_ms: i64) -> bool {
        match self.ledger.hold(hold_id).cloned() {
            Some(hold) if hold.state == HoldState::Open => {
                let expires_at = hold.expires_at.max(self.now_ms.saturating_add(ttl_ms));
                self.change(Change::Hold(Hold { expires_at, ..hold }));
                true
            }
            _ => false,
        }
    }
}
