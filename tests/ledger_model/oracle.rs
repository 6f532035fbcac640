//! What the ledger should have done, worked out apart from it: from the entries it wrote, the calls it got and the rules of
//! design.md, never from its own sums.
//!
//! Invariant: `left`, `held` and limits are computed here by the plainest way there is. A rule that does not hold is an
//! `Err` that says so; [`super::world`] adds where.

use std::collections::HashMap;

use inkstone::identity::{Caller, Role};
use inkstone::quota::books::{Change, Entry, EntryKind, Hold, HoldState, Ledger, Notice};
use inkstone::quota::ledger::{OUTPUT_TOKENS_MIN, Refusal};
use inkstone::quota::period::Zone;
use inkstone::quota::{Call, Command, Governance, Level, Limit, QuotaType, Reserve, SAFE_INTEGER_MAX, Settlement, Usage};

use super::world::{D1, Disk, Outcome};

/// Whether everything holds, and what does not.
pub type Verdict = Result<(), String>;

/// Wrong codes that may be tried within [`TRIES_MS`].
const TRIES_MAX: usize = 5;
const TRIES_MS: i64 = 600_000;

macro_rules! hold {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err(format!($($what)+));
        }
    };
}

/// The books as they should be.
#[derive(Default)]
pub struct Oracle {
    role: Option<Role>,
    role_set: bool,
    /// `iat` of the token the role came from; `None` while no token was seen.
    role_of: Option<i64>,
    limits: HashMap<QuotaType, u64>,
    credit: HashMap<QuotaType, u64>,
    suspended: bool,
    tries: Vec<i64>,
    entries: HashMap<String, Entry>,
    notices: HashMap<String, Notice>,
    orders: HashMap<String, Entry>,
    /// Consumed less given back, by type and period.
    folds: HashMap<(QuotaType, String), i128>,
    levels: HashMap<(QuotaType, String), Level>,
    /// Closed holds, and the first answer of each settlement.
    closed: HashMap<String, HoldState>,
    settled: HashMap<String, Settlement>,
}

impl Oracle {
    /// Looks at a call that was committed: its `outcome` and `changes`, and the `rows` after it.
    pub fn observe(
        &mut self,
        call: &Call,
        outcome: &Outcome,
        changes: &[Change],
        rows: &Ledger,
        zone: Zone,
        now_ms: i64,
    ) -> Verdict {
        self.meet(call.caller.as_ref());
        // A hold whose time is up is closed before the call is looked at.
        for change in changes {
            if let Change::Hold(hold) = change
                && hold.state == HoldState::Expired
            {
                self.closed.entry(hold.id.clone()).or_insert(hold.state);
            }
        }
        let before = |quota_type| self.left(quota_type, &zone.period(quota_type, now_ms));
        let before = QuotaType::ALL.map(before);
        match (&call.command, outcome) {
            (Command::Reserve(ask), outcome) => {
                let taken = |change: &Change| matches!(change, Change::Hold(hold) if hold.id == ask.hold_id && hold.is_open());
                self.reserved(ask, outcome, changes.iter().any(taken), rows, |each| zone.period(each, now_ms))?;
            }
            (Command::Settle { hold_id, usage, .. }, outcome) => self.settlement(hold_id, *usage, outcome, changes, rows)?,
            (Command::Recharge { order_id, amount, quota_type, .. }, outcome) => {
                self.recharged((order_id, *amount, *quota_type), outcome, changes)?;
            }
            (Command::TryCode, outcome) => self.tried(outcome, now_ms)?,
            (Command::Renew { hold_id, .. }, Outcome::Renewed(open)) => {
                let stands = find(rows, hold_id).is_some_and(Hold::is_open);
                hold!(*open == stands, "renewed: {open}, but open: {stands}");
            }
            (Command::Release { hold_id }, Outcome::Done) => {
                // Also one that is not known yet: its reserve may still be on the way.
                hold!(find(rows, hold_id).is_some_and(|hold| !hold.is_open()), "{hold_id} is not closed by its release");
            }
            (Command::Govern(act), Outcome::Done) => self.govern(act),
            (_, Outcome::Done) => {}
            (command, outcome) => return Err(format!("{command:?} was answered by {outcome:?}")),
        }
        self.watch(changes, rows, now_ms)?;
        // A limit that moved may undo a threshold: it is told again when it is crossed again.
        let moved = match (&call.command, outcome) {
            (Command::Govern(_), _) => QuotaType::ALL.to_vec(),
            (Command::Recharge { quota_type, .. }, Outcome::Credited(_, false)) => vec![*quota_type],
            _ => Vec::new(),
        };
        for quota_type in moved {
            let period = zone.period(quota_type, now_ms);
            let stands = self.limit(quota_type).map_or(Level::Normal, |limit| level(self.left(quota_type, &period), limit));
            if let Some(told) = self.levels.get_mut(&(quota_type, period)) {
                *told = stands.min(*told);
            }
        }
        for entry in entries(changes) {
            let told = self.levels.get(&(entry.quota_type, entry.period.clone())).copied().unwrap_or_default();
            let reached = self.limit(entry.quota_type).map_or(Level::Normal, |limit| level(entry.after, limit));
            hold!(entry.kind != EntryKind::Consume || told >= reached, "{reached:?} is not told: {entry:?}");
        }
        // An administrator's reset gives back all that was spent in the current period; nothing else gives anything back.
        for entry in entries(changes).filter(|entry| entry.kind == EntryKind::Reset) {
            hold!(matches!(&call.command, Command::Govern(Governance::Reset { .. })), "a reset without a reset: {entry:?}");
            hold!(entry.period == zone.period(entry.quota_type, now_ms), "a reset of another period: {entry:?}");
            hold!(self.fold(entry.quota_type, &entry.period) == 0, "a reset leaves something: {entry:?}");
            let place = QuotaType::ALL.iter().position(|each| *each == entry.quota_type).unwrap();
            hold!(entry.before == before[place], "{} left before {entry:?}", before[place]);
        }
        self.compare(rows, zone, now_ms)
    }

    /// Looks at what was written, whoever asked for it.
    pub fn watch(&mut self, changes: &[Change], rows: &Ledger, now_ms: i64) -> Verdict {
        for change in changes {
            match change {
                Change::Entry(entry) => self.entry(entry, now_ms)?,
                Change::Notice(notice) => self.notice(notice)?,
                Change::Hold(hold) => match (self.closed.get(&hold.id), hold.state) {
                    (None, HoldState::Open) => hold!(hold.expires_at > now_ms, "{hold:?} is open and due"),
                    (None, state) => drop(self.closed.insert(hold.id.clone(), state)),
                    (Some(first), state) => hold!(*first == state, "hold {} was {first:?}, then {state:?}", hold.id),
                },
                Change::Account(_) | Change::Window(_) | Change::Order(_) => {}
            }
        }
        for hold in rows.holds.iter().filter(|hold| hold.is_open()) {
            hold!(hold.expires_at > now_ms, "{hold:?} outlived its time");
            hold!(!self.closed.contains_key(&hold.id), "{hold:?} is open again");
        }
        for window in &rows.windows {
            let fold = self.fold(window.quota_type, &window.period);
            hold!(i128::from(window.used) == fold, "{window:?}: the entries fold to {fold}");
        }
        Ok(())
    }

    fn meet(&mut self, caller: Option<&Caller>) {
        let Some(caller) = caller else {
            self.role.get_or_insert(Role::Reader);
            return;
        };
        let newest = self.role_of.is_none_or(|issued_at| caller.issued_at >= issued_at);
        if self.role.is_none() || (newest && !self.role_set) {
            (self.role, self.role_of) = (Some(caller.role), Some(caller.issued_at));
        }
    }

    fn govern(&mut self, act: &Governance) {
        match act {
            Governance::SetLimit { quota_type, tokens } => drop(self.limits.insert(*quota_type, (*tokens).min(SAFE_INTEGER_MAX))),
            Governance::SetRole { role } => (self.role, self.role_set) = (Some(*role), true),
            Governance::Suspend => self.suspended = true,
            Governance::Activate => self.suspended = false,
            Governance::Reset { .. } => {}
            Governance::Initialize { role } => {
                self.limits.clear();
                self.role_set = role.is_some();
                self.role = role.or(self.role);
            }
        }
    }

    /// The limit of a type; `None` is unlimited.
    fn limit(&self, quota_type: QuotaType) -> Option<u64> {
        let of_role = || match Limit::of_role(self.role.unwrap_or_default(), quota_type) {
            Limit::Tokens(tokens) => Some(tokens),
            Limit::Unlimited => None,
        };
        let base = self.limits.get(&quota_type).copied().or_else(of_role)?;
        Some((base + self.credit.get(&quota_type).unwrap_or(&0)).min(SAFE_INTEGER_MAX))
    }

    fn fold(&self, quota_type: QuotaType, period: &str) -> i128 {
        self.folds.get(&(quota_type, period.to_owned())).copied().unwrap_or(0)
    }

    /// What an entry shows as left: the limit less what is settled, 0 where there is no limit.
    fn left(&self, quota_type: QuotaType, period: &str) -> u64 {
        let left = |limit| u64::try_from(i128::from(limit) - self.fold(quota_type, period)).unwrap_or(0);
        self.limit(quota_type).map_or(0, left)
    }

    /// What a new hold could take: the limit, or all that can be counted, less what is settled and held.
    fn free(&self, rows: &Ledger, quota_type: QuotaType, period: &str, besides: &str) -> u64 {
        let held = rows.holds.iter().filter(|hold| hold.is_open() && hold.id != besides && hold.period(quota_type) == period);
        let held: i128 = held.map(|hold| i128::from(hold.amount)).sum();
        let limit = i128::from(self.limit(quota_type).unwrap_or(SAFE_INTEGER_MAX));
        u64::try_from(limit - self.fold(quota_type, period) - held).unwrap_or(0)
    }

    fn reserved(
        &self,
        ask: &Reserve,
        outcome: &Outcome,
        taken: bool,
        rows: &Ledger,
        period: impl Fn(QuotaType) -> String,
    ) -> Verdict {
        if let Some(state) = self.closed.get(&ask.hold_id) {
            // A closed hold that was forgotten meanwhile is not asked for again: calls are not repeated for so long.
            hold!(matches!(outcome, Outcome::Refused(Refusal::Closed)), "{state:?} hold: {outcome:?}");
            return Ok(());
        }
        let hold = find(rows, &ask.hold_id);
        if let (Some(hold), Outcome::Granted(granted)) = (hold, outcome)
            && !taken
        {
            hold!(hold.output_tokens == *granted, "repeated: {granted} of {hold:?}");
            return Ok(());
        }
        let free = |quota_type| self.free(rows, quota_type, &period(quota_type), &ask.hold_id);
        let least = QuotaType::ALL.into_iter().map(free).min().unwrap_or(0);
        let room = least.saturating_sub(ask.prompt_tokens);
        let output = ask.output_tokens.min(room);
        let fits = output > 0 && output >= OUTPUT_TOKENS_MIN.min(ask.output_tokens);
        match outcome {
            Outcome::Granted(granted) => {
                hold!(!self.suspended, "granted while suspended");
                hold!(fits && *granted == output, "{granted} granted where {output} fit ({least} free)");
                let hold = hold.ok_or("granted without a hold")?;
                hold!(hold.amount <= least, "{hold:?} is more than {least}");
                let whole = ask.prompt_tokens.saturating_add(*granted).min(SAFE_INTEGER_MAX);
                hold!(hold.amount == whole, "prompt and output are {whole}: {hold:?}");
                hold!(QuotaType::ALL.iter().all(|each| hold.period(*each) == period(*each)), "in another period: {hold:?}");
            }
            Outcome::Refused(Refusal::Suspended) => hold!(self.suspended, "not suspended"),
            Outcome::Refused(Refusal::Insufficient { left, .. }) => {
                hold!(!fits, "refused where {output} fit ({least} free)");
                hold!(least == *left, "{left} said to be left of {least}");
                hold!(hold.is_none(), "refused, and held");
            }
            outcome => return Err(format!("a reserve was answered by {outcome:?}")),
        }
        Ok(())
    }

    fn settlement(&mut self, hold_id: &str, usage: Usage, outcome: &Outcome, changes: &[Change], rows: &Ledger) -> Verdict {
        let posted = entries(changes).count();
        if let Some(first) = self.settled.get(hold_id) {
            match outcome {
                Outcome::Settled(again) => {
                    let same = (again.charged, again.written_off, again.cost_micro, again.crossings.len())
                        == (first.charged, first.written_off, first.cost_micro, 0);
                    hold!(same && posted == 0, "settled again: {again:?} after {first:?}");
                }
                // Forgotten after two days.
                Outcome::Refused(Refusal::Unknown) => hold!(posted == 0, "an unknown hold moves something"),
                outcome => return Err(format!("settled again: {outcome:?}")),
            }
            return Ok(());
        }
        let settled = match outcome {
            Outcome::Settled(settled) => settled,
            Outcome::Refused(Refusal::Unknown) => {
                hold!(find(rows, hold_id).is_none() && posted == 0, "the hold is known");
                return Ok(());
            }
            Outcome::Refused(Refusal::Closed) => {
                let released = self.closed.get(hold_id) == Some(&HoldState::Released);
                hold!(released && posted == 0, "only a released hold cannot be settled");
                return Ok(());
            }
            outcome => return Err(format!("a settlement was answered by {outcome:?}")),
        };
        let hold = find(rows, hold_id).ok_or("settled without a hold")?;
        let used = usage.total().min(SAFE_INTEGER_MAX);
        hold!(settled.charged.checked_add(settled.written_off) == Some(used), "{settled:?} of {used}");
        let owed = usage.input.saturating_add(usage.output.min(hold.output_tokens));
        let room = if hold.state == HoldState::Expired {
            0
        } else {
            // What the hold set aside is its own, whatever the limit is by now; beyond it, what is free beside it.
            let free = |quota_type| self.free(rows, quota_type, hold.period(quota_type), hold_id).max(hold.amount);
            QuotaType::ALL.into_iter().map(free).min().unwrap_or(0)
        };
        hold!(settled.charged == owed.min(room), "{} charged of {owed}, {room} there: {hold:?}", settled.charged);
        let at_home = |entry: &Entry| entry.period == hold.period(entry.quota_type);
        hold!(entries(changes).all(at_home), "settled in other periods than those of {hold:?}");
        hold!(posted == QuotaType::ALL.len(), "{posted} entries of one settlement");
        self.settled.insert(hold_id.to_owned(), settled.clone());
        Ok(())
    }

    fn recharged(&mut self, (id, amount, quota_type): (&str, u64, QuotaType), outcome: &Outcome, changes: &[Change]) -> Verdict {
        let posted = entries(changes).count();
        let code = id.starts_with("code:");
        match (self.orders.get(id), outcome) {
            (Some(first), Outcome::Credited(entry, true)) => {
                let same = (first.amount, first.quota_type) == (amount, quota_type);
                hold!(same && **entry == *first && posted == 0, "repeated: {entry:?} after {first:?}");
                if code {
                    self.tries.pop();
                }
            }
            (Some(first), Outcome::Refused(Refusal::OrderDiffers(_))) => {
                let same = (first.amount, first.quota_type) == (amount, quota_type);
                hold!(!same && posted == 0, "the order was made for the same: {first:?}");
            }
            (None, Outcome::Credited(entry, false)) => {
                hold!((entry.amount, entry.quota_type, posted) == (amount, quota_type, 1), "{amount} credited by {entry:?}");
                *self.credit.entry(quota_type).or_default() += amount;
                self.orders.insert(id.to_owned(), (**entry).clone());
                if code {
                    self.tries.pop();
                }
            }
            (None, Outcome::Refused(Refusal::TooMuch)) => {
                let credit = self.credit.get(&quota_type).copied().unwrap_or(0);
                let sum = self.limit(quota_type).unwrap_or(credit).checked_add(amount);
                hold!(amount == 0 || sum.is_none_or(|sum| sum > SAFE_INTEGER_MAX), "{amount} is not too much");
            }
            (first, outcome) => return Err(format!("order {id}, first {first:?}: {outcome:?}")),
        }
        Ok(())
    }

    fn tried(&mut self, outcome: &Outcome, now_ms: i64) -> Verdict {
        self.tries.retain(|at| now_ms - at < TRIES_MS);
        match outcome {
            Outcome::Done => {
                hold!(self.tries.len() < TRIES_MAX, "a sixth wrong code: {:?}", self.tries);
                self.tries.push(now_ms);
            }
            Outcome::Refused(Refusal::CodesTried(seconds)) => {
                hold!(self.tries.len() >= TRIES_MAX, "refused after {:?}", self.tries);
                hold!((1..=600).contains(seconds), "{seconds} s to wait");
            }
            outcome => return Err(format!("a code was answered by {outcome:?}")),
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, now_ms: i64) -> Verdict {
        hold!(self.entries.insert(entry.id.clone(), entry.clone()).is_none(), "entry {} twice", entry.id);
        hold!(entry.at == now_ms, "{entry:?} at {now_ms}");
        let fold = self.folds.entry((entry.quota_type, entry.period.clone())).or_default();
        match entry.kind {
            EntryKind::Consume => *fold += i128::from(entry.amount),
            EntryKind::Reset => *fold -= i128::from(entry.amount),
            EntryKind::Recharge => {}
        }
        hold!((0..=i128::from(SAFE_INTEGER_MAX)).contains(fold), "{fold} settled after {entry:?}");
        if entry.kind == EntryKind::Reset {
            self.levels.remove(&(entry.quota_type, entry.period.clone()));
        }
        let left = self.left(entry.quota_type, &entry.period);
        hold!(entry.after == left, "{left} left after {entry:?}");
        // Where the limit was lowered below what is settled, nothing is left on either side of a charge.
        let limited = self.limit(entry.quota_type).is_some();
        let moved = match entry.kind {
            EntryKind::Consume => entry.before.saturating_sub(entry.amount) == entry.after,
            EntryKind::Recharge | EntryKind::Reset => entry.before.saturating_add(entry.amount) >= entry.after,
        };
        hold!(moved || !limited, "{entry:?} moves something else");
        Ok(())
    }

    fn notice(&mut self, notice: &Notice) -> Verdict {
        hold!(self.notices.insert(notice.id.clone(), notice.clone()).is_none(), "notice {} twice", notice.id);
        let crossing = &notice.crossing;
        let key = (crossing.quota_type, notice.period.clone());
        let told = self.levels.insert(key, crossing.level).unwrap_or_default();
        hold!(crossing.level > told, "{crossing:?} after {told:?}");
        hold!(self.limit(crossing.quota_type) == Some(crossing.total_quota), "{crossing:?}");
        let left = self.left(crossing.quota_type, &notice.period);
        hold!(left == crossing.remaining_quota, "{left} left at {crossing:?}");
        hold!(crossing.level == level(left, crossing.total_quota), "{left} left at {crossing:?}");
        Ok(())
    }

    /// The quotas as they are read are the ones expected.
    fn compare(&self, rows: &Ledger, zone: Zone, now_ms: i64) -> Verdict {
        for quota in rows.quotas(zone, now_ms) {
            let limit = self.limit(quota.quota_type).map_or(Limit::Unlimited, Limit::Tokens);
            hold!(quota.limit == limit, "{limit:?} expected of {quota:?}");
            hold!(Some(quota.role) == self.role && quota.suspended == self.suspended, "{:?} expected of {quota:?}", self.role);
        }
        let account = rows.account.as_ref().ok_or("no account after a call")?;
        for quota_type in QuotaType::ALL {
            let recharged = account.credit.get(&quota_type).copied().unwrap_or(0);
            hold!(recharged == self.credit.get(&quota_type).copied().unwrap_or(0), "{recharged} recharged: {quota_type:?}");
        }
        Ok(())
    }

    /// Everything D1 has is in the books, as it stands there.
    pub fn projected(&self, d1: &D1) -> Verdict {
        let strange = d1.entries.values().find(|entry| self.entries.get(&entry.id) != Some(*entry));
        hold!(strange.is_none(), "D1 has {strange:?}");
        let strange = d1.notices.values().find(|notice| self.notices.get(&notice.id) != Some(*notice));
        hold!(strange.is_none(), "D1 has {strange:?}");
        Ok(())
    }

    /// All holds are over, and all parcels delivered.
    pub fn settled(&self, disk: &Disk, d1: &D1) -> Verdict {
        let open = disk.rows.holds.iter().find(|hold| hold.is_open());
        hold!(open.is_none(), "{open:?} is still open");
        hold!(disk.outbox.is_empty(), "{} parcels are left", disk.outbox.len());
        self.projected(d1)?;
        let all = (d1.entries.len(), d1.notices.len()) == (self.entries.len(), self.notices.len());
        hold!(all, "D1 has {} of {} entries", d1.entries.len(), self.entries.len());
        Ok(())
    }
}

/// The level of `left` tokens of `limit` (design.md: 20 %, 10 %, 0 %).
fn level(left: u64, limit: u64) -> Level {
    let (left, limit) = (u128::from(left), u128::from(limit));
    match () {
        () if left == 0 => Level::Exhausted,
        () if left * 10 <= limit => Level::Critical,
        () if left * 5 <= limit => Level::Warning,
        () => Level::Normal,
    }
}

fn entries(changes: &[Change]) -> impl Iterator<Item = &Entry> {
    changes.iter().filter_map(|change| if let Change::Entry(entry) = change { Some(entry) } else { None })
}

fn find<'a>(rows: &'a Ledger, id: &str) -> Option<&'a Hold> {
    rows.holds.iter().find(|hold| hold.id == id)
}
