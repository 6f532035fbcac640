//! QuotaLedger: one Durable Object per user; the only authority on what that user may spend.
//!
//! State (SQLite): the account, settled tokens per type and period, holds, orders, parcels on their way to D1,
//! idempotency keys. Invariant: load → decide → write happens in one synchronous stretch, with no `.await` between the
//! first read and the last write. workerd runs nothing else of this object meanwhile, and commits the writes as one:
//! that, not a lock, is why no two requests can both pass the check. D1 is a projection fed afterwards; nothing here
//! waits for it.
//!
//! Commands: [`super::Command`]. Keys live here because they are per user, whatever session they end in; objects of
//! reserved names (a control character no user id can hold) keep the keys that are nobody's: orders and nonces.

#![allow(missing_docs, reason = "the durable_object macro writes methods without docs")]

use std::cell::Cell;
use std::rc::Rc;

use worker::wasm_bindgen;
use worker::{DurableObject, Env, Request, Response, State, durable_object};

use super::books::{Entry, Parcel};
use super::ledger::{Decision, Refusal};
use super::store::Claim;
use super::{Audit, Call, Command, QuotaType, Reply, outbox, store};
use crate::config::Config;
use crate::error::ApiError;
use crate::platform::sql::{Sql, SqlError};
use crate::platform::{call, clock, log};

/// The alarm that sends what a killed instance left behind, ms after the movement.
const BACKSTOP_MS: i64 = 30_000;
/// The alarm fires no sooner than this after it is set, ms.
const ALARM_GRAIN_MS: i64 = 2_000;
/// Most entries shown by an audit as still on their way.
const AUDIT_WAITING: i64 = 10_000;
/// A read that needs its own writes in D1 waits at most this for them, ms.
const FLUSH_MS: u64 = 3_000;

/// One user's ledger.
#[durable_object]
pub struct QuotaLedger {
    state: State,
    env: Env,
    outbox: Rc<outbox::Outbox>,
    sql: Sql,
    migrated: Cell<bool>,
    /// When the alarm is set to, as far as this instance knows; 0: not known.
    armed_at: Cell<i64>,
}

impl DurableObject for QuotaLedger {
    fn new(state: State, env: Env) -> Self {
        let sql = Sql::of(&state);
        let user_id = state.id().name().unwrap_or_default();
        let outbox = Rc::new(outbox::Outbox::new(sql.clone(), env.clone(), user_id));
        Self { state, env, outbox, sql, migrated: Cell::new(false), armed_at: Cell::new(0) }
    }

    async fn fetch(&self, mut request: Request) -> worker::Result<Response> {
        let result = match request.text().await.map(|text| serde_json::from_str::<Call>(&text)) {
            Ok(Ok(call)) => self.serve(&call).await,
            _ => Err(ApiError::internal()),
        };
        call::answer(&result)
    }

    async fn alarm(&self) -> worker::Result<Response> {
        self.armed_at.set(0);
        if let Err(cause) = self.expire() {
            log::error("ledger_alarm", "", &cause);
        }
        self.outbox.send().await;
        self.arm(None).await;
        Response::ok("")
    }
}

impl QuotaLedger {
    async fn serve(&self, call: &Call) -> Result<Reply, ApiError> {
        let config = Config::of(&self.env)?;
        let now_ms = clock::now_ms();
        if call.command == Command::Flush {
            self.migrate().map_err(unavailable)?;
            let _ = clock::within(FLUSH_MS, self.outbox.copy()).await;
            return Ok(Reply::Flushed { waiting: store::waiting(&self.sql).map_err(unavailable)? });
        }
        let moved = self.decide(call, &config, now_ms)?;
        if moved.held {
            self.arm(None).await;
        }
        if moved.posted {
            self.arm(Some(now_ms + BACKSTOP_MS)).await;
            let outbox = self.outbox.clone();
            self.state.wait_until(async move { outbox.send_soon().await });
        }
        if let Reply::Settled(settlement) = &moved.reply {
            let news = settlement.crossings.clone();
            if !news.is_empty() {
                let (outbox, holds) = (self.outbox.clone(), moved.watchers);
                self.state.wait_until(async move { outbox.tell(&holds, &news).await });
            }
        }
        Ok(moved.reply)
    }

    /// Load, decide, write: synchronous from first to last.
    fn decide(&self, call: &Call, config: &Config, now_ms: i64) -> Result<Moved, ApiError> {
        self.migrate().map_err(unavailable)?;
        if let Command::Claim { key, fingerprint, target, ttl_ms } = &call.command {
            let claim = Claim { fingerprint: fingerprint.clone(), target: target.clone() };
            return self.claim(key, claim, now_ms, *ttl_ms).map_err(unavailable)?.map(Moved::nothing);
        }
        if let Command::Unclaim { key, fingerprint } = &call.command {
            store::unbind(&self.sql, key, fingerprint).map_err(unavailable)?;
            return Ok(Moved::nothing(Reply::Released));
        }
        let ledger = store::load(&self.sql, Some(&call.command), config.zone, now_ms).map_err(unavailable)?;
        // A settlement carries the token its generation began with: an old one, which must not set the role back.
        let newest = matches!(call.command, Command::Reserve(_) | Command::Read);
        let mut decision = Decision::begin(ledger, call.caller.as_ref().filter(|_| newest), config.zone, now_ms);
        let result = self.apply(&mut decision, &call.command, config, now_ms)?;
        let (ledger, changes) = decision.finish();
        let posted = changes.iter().any(|change| {
            use super::books::Change::{Account, Entry, Notice};
            matches!(change, Entry(_) | Notice(_) | Account(_))
        });
        store::save(&self.sql, changes).map_err(unavailable)?;
        let reply = result.map_err(refused)?;
        let watchers = ledger.holds.into_iter().filter(|hold| hold.is_open()).filter_map(|hold| hold.watcher).collect();
        Ok(Moved { held: matches!(reply, Reply::Granted { .. }), posted, watchers, reply })
    }

    fn apply(
        &self,
        decision: &mut Decision,
        command: &Command,
        config: &Config,
        now_ms: i64,
    ) -> Result<Result<Reply, Refusal>, ApiError> {
        let quotas = |decision: &Decision| decision.ledger().quotas(config.zone, now_ms);
        Ok(match command {
            Command::Reserve(ask) => decision.reserve(ask).map(|output_tokens| Reply::Granted { output_tokens }),
            Command::Settle { hold_id, usage, reason, duration_ms } => {
                decision.settle(hold_id, *usage, *reason, *duration_ms).map(Reply::Settled)
            }
            Command::Release { hold_id } => {
                decision.release(hold_id);
                Ok(Reply::Released)
            }
            Command::Renew { hold_id, ttl_ms } => Ok(Reply::Renewed { open: decision.renew(hold_id, *ttl_ms) }),
            Command::Recharge { order_id, amount, quota_type, reason } => {
                decision.recharge(order_id, *amount, *quota_type, reason).and_then(|(entry, repeated)| {
                    let quota = quotas(decision).into_iter().find(|quota| quota.quota_type == *quota_type);
                    let quota = Box::new(quota.ok_or(Refusal::Unknown)?);
                    if order_id.starts_with("code:") {
                        decision.forgive_try();
                    }
                    Ok(Reply::Credited { entry: Box::new(entry), quota, repeated })
                })
            }
            Command::Govern(act) => {
                decision.govern(act);
                Ok(Reply::Quotas { quotas: quotas(decision) })
            }
            Command::TryCode => decision.try_code().map(|()| Reply::MayTry),
            Command::Audit => {
                let ledger = decision.ledger();
                let current = |quota_type: QuotaType| config.zone.period(quota_type, now_ms);
                Ok(Reply::Audited(Box::new(Audit {
                    quotas: quotas(decision),
                    windows: ledger.windows.iter().filter(|w| w.period == current(w.quota_type)).cloned().collect(),
                    holds: ledger.holds.iter().filter(|hold| hold.is_open()).cloned().collect(),
                    waiting: self.waiting_entries().map_err(unavailable)?,
                })))
            }
            Command::Read | Command::Claim { .. } | Command::Unclaim { .. } | Command::Flush => {
                Ok(Reply::Quotas { quotas: quotas(decision) })
            }
        })
    }

    fn waiting_entries(&self) -> Result<Vec<Entry>, SqlError> {
        let parcels = store::outbox(&self.sql, AUDIT_WAITING)?;
        let parcels = parcels.iter().map(store::parcel).collect::<Result<Vec<_>, _>>()?;
        Ok(parcels.into_iter().filter_map(|parcel| if let Parcel::Entry(entry) = parcel { Some(*entry) } else { None }).collect())
    }

    fn claim(&self, key: &str, wanted: Claim, now_ms: i64, ttl_ms: i64) -> Result<Result<Reply, ApiError>, SqlError> {
        if let Some(bound) = store::claim(&self.sql, key, now_ms)? {
            return Ok(if bound.fingerprint == wanted.fingerprint {
                Ok(Reply::Claimed { target: bound.target, existed: true })
            } else {
                Err(ApiError::conflict("相同的幂等键或订单号已用于另一个请求，请换一个新的"))
            });
        }
        store::forget_claims(&self.sql, now_ms)?;
        store::bind(&self.sql, key, &wanted, now_ms.saturating_add(ttl_ms))?;
        Ok(Ok(Reply::Claimed { target: wanted.target, existed: false }))
    }

    fn migrate(&self) -> Result<(), SqlError> {
        if !self.migrated.get() {
            store::migrate(&self.sql)?;
            self.migrated.set(true);
        }
        Ok(())
    }

    /// The alarm's decision: expire what is due, forget what is old.
    fn expire(&self) -> Result<(), SqlError> {
        self.migrate()?;
        let now_ms = clock::now_ms();
        let Ok(config) = Config::of(&self.env) else { return Ok(()) };
        let ledger = store::load(&self.sql, None, config.zone, now_ms)?;
        if ledger.account.is_some() {
            store::save(&self.sql, Decision::begin(ledger, None, config.zone, now_ms).finish().1)?;
        }
        store::prune(&self.sql, now_ms)
    }

    /// Sets the alarm to the earliest of `wanted`, the next hold's expiry and, if parcels wait, the backstop.
    async fn arm(&self, wanted: Option<i64>) {
        let now_ms = clock::now_ms();
        let expiry = store::next_expiry(&self.sql).ok().flatten();
        let waiting = store::outbox(&self.sql, 1).is_ok_and(|rows| !rows.is_empty());
        let webhook = store::next_webhook(&self.sql).ok().flatten();
        let wishes = [wanted, expiry, webhook, waiting.then_some(now_ms + BACKSTOP_MS)];
        let Some(at) = wishes.into_iter().flatten().min() else { return };
        // An alarm that could not do its work (a bad configuration, say) must not fire again at once.
        let at = at.max(now_ms + ALARM_GRAIN_MS);
        let armed = self.armed_at.get();
        if armed > now_ms && armed <= at {
            return;
        }
        self.armed_at.set(at);
        let when = worker::js_sys::Date::new(&(at as f64).into());
        if let Err(cause) = self.state.storage().set_alarm(worker::ScheduledTime::new(when)).await {
            self.armed_at.set(0);
            log::error("ledger_arm", "", &cause);
        }
    }
}

/// What a command did, for what follows it.
struct Moved {
    reply: Reply,
    /// A hold was taken: its expiry needs an alarm.
    held: bool,
    /// Something waits for D1.
    posted: bool,
    /// Objects that run generations of this user.
    watchers: Vec<super::books::Watcher>,
}

impl Moved {
    const fn nothing(reply: Reply) -> Self {
        Self { reply, held: false, posted: false, watchers: Vec::new() }
    }
}

fn unavailable(cause: SqlError) -> ApiError {
    log::error("ledger", "", &cause);
    ApiError::quota_unavailable()
}

fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Suspended => ApiError::quota_suspended(),
        Refusal::Insufficient { quota_type, left } => ApiError::quota_insufficient(quota_type.as_str(), left),
        Refusal::OrderDiffers(_) => ApiError::conflict("该订单号已用于另一笔充值"),
        Refusal::TooMuch => ApiError::invalid("amount", "累计额度不能超过 2^53 − 1"),
        Refusal::CodesTried(seconds) => ApiError::too_many("兑换码错误次数过多，请稍后再试", seconds),
        Refusal::Closed | Refusal::Unknown => ApiError::quota_unavailable().with_details(refusal.to_string()),
    }
}
