//! The ledger's decisions that are not a generation's: recharges, limits, roles, suspension, resets, tries of codes.
//!
//! Invariants: an order credits once; a recharge raises the limit for good, whatever is reset, set or spent later; a limit
//! that was set stands through role changes until `initialize`; a reset gives back what was spent, as an entry, so that
//! settled stays the fold of entries. PURE.

use super::books::{Change, Entry, EntryKind, Order, Window};
use super::ledger::{Decision, Refusal};
use super::{Governance, Level, Limit, QuotaType, SAFE_INTEGER_MAX, Service, Usage};

/// Codes that may be tried in vain within [`CODE_TRIES_MS`].
pub const CODE_TRIES_MAX: usize = 5;
/// How long a try counts, ms.
pub const CODE_TRIES_MS: i64 = 10 * 60_000;

impl Decision {
    /// Adds `amount` tokens to a limit. The same order again answers the first one's entry: (entry, repeated).
    ///
    /// # Errors
    /// [`Refusal::OrderDiffers`] when the order was made for something else, [`Refusal::TooMuch`] beyond 2^53 − 1.
    pub fn recharge(
        &mut self,
        order_id: &str,
        amount: u64,
        quota_type: QuotaType,
        reason: &str,
    ) -> Result<(Entry, bool), Refusal> {
        if let Some(order) = self.ledger.orders.iter().find(|order| order.id == order_id) {
            let same = order.entry.amount == amount && order.entry.quota_type == quota_type;
            return if same { Ok((order.entry.clone(), true)) } else { Err(Refusal::OrderDiffers(order_id.to_owned())) };
        }
        let Some(mut account) = self.ledger.account.clone() else { return Err(Refusal::Unknown) };
        let so_far = match self.ledger.limit(quota_type) {
            Limit::Tokens(tokens) => tokens,
            Limit::Unlimited => account.credit.get(&quota_type).copied().unwrap_or(0),
        };
        if amount == 0 || so_far.checked_add(amount).is_none_or(|sum| sum > SAFE_INTEGER_MAX) {
            return Err(Refusal::TooMuch);
        }
        let before = self.left(quota_type);
        *account.credit.entry(quota_type).or_default() += amount;
        account.updated_at = self.now_ms;
        self.change(Change::Account(account));
        self.relevel(quota_type);
        let entry = self.line(format!("recharge:{order_id}"), quota_type, EntryKind::Recharge, amount, before, reason);
        let entry = Entry { request_id: order_id.to_owned(), ..entry };
        self.change(Change::Entry(entry.clone()));
        self.change(Change::Order(Order { id: order_id.to_owned(), entry: entry.clone() }));
        Ok((entry, false))
    }

    /// Makes an administrator's change.
    pub fn govern(&mut self, act: &Governance) {
        let Some(mut account) = self.ledger.account.clone() else { return };
        match act {
            Governance::SetLimit { quota_type, tokens } => {
                account.limits.insert(*quota_type, (*tokens).min(SAFE_INTEGER_MAX));
            }
            Governance::SetRole { role } => {
                account.role = *role;
                account.role_set = true;
            }
            Governance::Suspend => account.suspended = true,
            Governance::Activate => account.suspended = false,
            Governance::Initialize { role } => {
                account.limits.clear();
                account.role_set = role.is_some();
                account.role = role.unwrap_or(account.role);
            }
            Governance::Reset { quota_type, reset_id } => {
                for quota_type in QuotaType::ALL.into_iter().filter(|each| quota_type.is_none_or(|wanted| wanted == *each)) {
                    self.reset(quota_type, reset_id);
                }
            }
        }
        account.updated_at = self.now_ms;
        self.change(Change::Account(account));
        QuotaType::ALL.into_iter().for_each(|quota_type| self.relevel(quota_type));
    }

    /// After the limit has moved: a threshold that no longer holds may be told again when it is next crossed.
    fn relevel(&mut self, quota_type: QuotaType) {
        let period = self.zone.period(quota_type, self.now_ms);
        let limit = self.ledger.limit(quota_type);
        let Some(window) = self.ledger.window(quota_type, &period).cloned() else { return };
        let level = Level::of(limit, window.used).min(window.level);
        if level != window.level {
            self.change(Change::Window(Window { level, ..window }));
        }
    }

    /// Counts a try of a code.
    ///
    /// # Errors
    /// [`Refusal::CodesTried`] with the seconds to wait.
    pub fn try_code(&mut self) -> Result<(), Refusal> {
        let Some(mut account) = self.ledger.account.clone() else { return Err(Refusal::Unknown) };
        account.code_tries.retain(|at| self.now_ms - at < CODE_TRIES_MS);
        if let (Some(oldest), true) = (account.code_tries.first(), account.code_tries.len() >= CODE_TRIES_MAX) {
            let wait_ms = (oldest + CODE_TRIES_MS - self.now_ms).max(1_000);
            return Err(Refusal::CodesTried(u64::try_from(wait_ms / 1_000).unwrap_or(1)));
        }
        account.code_tries.push(self.now_ms);
        self.change(Change::Account(account));
        Ok(())
    }

    /// Takes back a try: the code was good.
    pub fn forgive_try(&mut self) {
        if let Some(mut account) = self.ledger.account.clone() {
            account.code_tries.pop();
            self.change(Change::Account(account));
        }
    }

    fn reset(&mut self, quota_type: QuotaType, reset_id: &str) {
        let window = self.window_of(quota_type, &self.zone.period(quota_type, self.now_ms));
        if window.used == 0 {
            return;
        }
        let (amount, before) = (window.used, self.left(quota_type));
        self.change(Change::Window(Window { used: 0, level: Level::Normal, ..window }));
        let id = format!("reset:{reset_id}:{}", quota_type.as_str());
        let entry = self.line(id, quota_type, EntryKind::Reset, amount, before, "admin_reset");
        self.change(Change::Entry(entry));
    }

    /// Tokens of the current period that are not settled; 0 where unlimited.
    fn left(&self, quota_type: QuotaType) -> u64 {
        match self.ledger.limit(quota_type) {
            Limit::Tokens(tokens) => {
                tokens.saturating_sub(self.ledger.used(quota_type, &self.zone.period(quota_type, self.now_ms)))
            }
            Limit::Unlimited => 0,
        }
    }

    /// A line of the books that no generation caused; `before` was left, what is left now is `after`.
    fn line(&self, id: String, quota_type: QuotaType, kind: EntryKind, amount: u64, before: u64, reason: &str) -> Entry {
        Entry {
            id,
            quota_type,
            period: self.zone.period(quota_type, self.now_ms),
            kind,
            amount,
            before,
            after: self.left(quota_type),
            service: Service::System,
            model: String::new(),
            request_id: String::new(),
            message_id: String::new(),
            hold_id: String::new(),
            usage: Usage::default(),
            cost_micro: 0,
            price_version: String::new(),
            written_off: 0,
            reason: reason.to_owned(),
            duration_ms: 0,
            at: self.now_ms,
        }
    }
}
