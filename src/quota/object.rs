//! QuotaLedger: one Durable Object per user; the only authority on what that user may spend.
//!
//! State (SQLite): the account, settled tokens per type and period, holds, entries on their way to D1, idempotency keys.
//! Invariant: load → decide → write happens in one synchronous stretch, with no `.await` between the first read and the
//! last write. workerd runs nothing else of this object meanwhile, and commits the writes as one: that, not a lock, is
//! why no two requests can both pass the check. D1 is a projection fed afterwards; nothing here waits for it.
//!
//! Commands: [`super::Command`]. Idempotency keys live here because they are per user, whatever session they end in.

#![allow(missing_docs, reason = "the durable_object macro writes methods without docs")]

use std::cell::Cell;
use std::rc::Rc;

use worker::wasm_bindgen;
use worker::{DurableObject, Env, Request, Response, State, durable_object};

use super::ledger::{Decision, Refusal};
use super::store::Claim;
use super::{Call, Command, Reply, projection, store};
use crate::config::Config;
use crate::error::ApiError;
use crate::platform::sql::{Sql, SqlError};
use crate::platform::{call, clock, log};

/// How long an idempotency key is kept, ms (design.md invariant 5).
const CLAIM_MS: i64 = 24 * 3_600_000;
/// Entries are gathered this long before they are sent to D1 in one statement, ms.
const GATHER_MS: u64 = 300;
/// The alarm that sends what a killed instance left behind, ms after the movement.
const BACKSTOP_MS: i64 = 30_000;

/// One user's ledger.
#[durable_object]
pub struct QuotaLedger {
    state: State,
    env: Env,
    books: Rc<Books>,
}

/// What outlives one request: the database, and whether a copy to D1 is under way.
struct Books {
    sql: Sql,
    migrated: Cell<bool>,
    copying: Cell<bool>,
    /// When the alarm is set to, as far as this instance knows; 0: not known.
    armed_at: Cell<i64>,
}

impl DurableObject for QuotaLedger {
    fn new(state: State, env: Env) -> Self {
        let sql = Sql::of(&state);
        let books = Books { sql, migrated: Cell::new(false), copying: Cell::new(false), armed_at: Cell::new(0) };
        Self { state, env, books: Rc::new(books) }
    }

    async fn fetch(&self, mut request: Request) -> worker::Result<Response> {
        let result = match request.text().await.map(|text| serde_json::from_str::<Call>(&text)) {
            Ok(Ok(call)) => self.serve(&call).await,
            _ => Err(ApiError::internal()),
        };
        call::answer(&result)
    }

    async fn alarm(&self) -> worker::Result<Response> {
        self.books.armed_at.set(0);
        if let Err(cause) = self.expire() {
            log::error("ledger_alarm", "", &cause);
        }
        let user_id = self.state.id().name().unwrap_or_default();
        self.books.copy(&self.env, &user_id).await;
        self.arm(None).await;
        Response::ok("")
    }
}

impl QuotaLedger {
    async fn serve(&self, call: &Call) -> Result<Reply, ApiError> {
        let config = Config::of(&self.env)?;
        let now_ms = clock::now_ms();
        let reply = self.decide(call, &config, now_ms)?;
        match &reply {
            Reply::Granted { .. } => self.arm(None).await,
            Reply::Settled(_) => {
                self.arm(Some(now_ms + BACKSTOP_MS)).await;
                self.copy_soon(call.caller.user_id.clone());
            }
            _ => {}
        }
        Ok(reply)
    }

    /// Load, decide, write: synchronous from first to last.
    fn decide(&self, call: &Call, config: &Config, now_ms: i64) -> Result<Reply, ApiError> {
        let failed = |cause| {
            log::error("ledger", "", &cause);
            ApiError::quota_unavailable()
        };
        self.migrate().map_err(failed)?;
        if let Command::Claim { key, fingerprint, target } = &call.command {
            return self.claim(key, fingerprint, target, now_ms).map_err(failed)?;
        }
        let sql = &self.books.sql;
        let ledger = store::load(sql, Some(&call.command), config.zone, now_ms).map_err(failed)?;
        let mut decision = Decision::begin(ledger, &call.caller, config.zone, now_ms);
        let result = match &call.command {
            Command::Reserve(ask) => decision.reserve(ask).map(|output_tokens| Reply::Granted { output_tokens }),
            Command::Settle { hold_id, usage, reason } => decision.settle(hold_id, *usage, *reason).map(Reply::Settled),
            Command::Release { hold_id } => {
                decision.release(hold_id);
                Ok(Reply::Released)
            }
            Command::Renew { hold_id, ttl_ms } => Ok(Reply::Renewed { open: decision.renew(hold_id, *ttl_ms) }),
            Command::Read | Command::Claim { .. } => Ok(Reply::Quotas { quotas: decision.ledger().quotas(config.zone, now_ms) }),
        };
        store::save(sql, decision.finish().1).map_err(failed)?;
        result.map_err(refused)
    }

    fn claim(&self, key: &str, fingerprint: &str, target: &str, now_ms: i64) -> Result<Result<Reply, ApiError>, SqlError> {
        let sql = &self.books.sql;
        if let Some(claim) = store::claim(sql, key, now_ms)? {
            if claim.fingerprint != fingerprint {
                return Ok(Err(ApiError::conflict("相同的 Idempotency-Key 已用于另一个请求，请换一个新的键")));
            }
            return Ok(Ok(Reply::Claimed { target: claim.target, existed: true }));
        }
        let claim = Claim { fingerprint: fingerprint.to_owned(), target: target.to_owned() };
        store::bind(sql, key, &claim, now_ms + CLAIM_MS)?;
        Ok(Ok(Reply::Claimed { target: target.to_owned(), existed: false }))
    }

    fn migrate(&self) -> Result<(), SqlError> {
        if !self.books.migrated.get() {
            store::migrate(&self.books.sql)?;
            self.books.migrated.set(true);
        }
        Ok(())
    }

    fn expire(&self) -> Result<(), SqlError> {
        self.migrate()?;
        let now_ms = clock::now_ms();
        let Ok(config) = Config::of(&self.env) else { return Ok(()) };
        let ledger = store::load(&self.books.sql, None, config.zone, now_ms)?;
        store::save(&self.books.sql, Decision::begin_unattended(ledger, config.zone, now_ms).finish().1)?;
        store::prune(&self.books.sql, now_ms)
    }

    /// Sets the alarm to the earliest of `wanted`, the next hold's expiry and, if entries wait, the backstop.
    async fn arm(&self, wanted: Option<i64>) {
        let expiry = store::next_expiry(&self.books.sql).ok().flatten();
        let waiting = store::outbox(&self.books.sql, 1).is_ok_and(|rows| !rows.is_empty());
        let backstop = waiting.then(|| clock::now_ms() + BACKSTOP_MS);
        let Some(at) = [wanted, expiry, backstop].into_iter().flatten().min() else { return };
        let armed = self.books.armed_at.get();
        if armed != 0 && armed <= at {
            return;
        }
        self.books.armed_at.set(at);
        let when = worker::js_sys::Date::new(&(at as f64).into());
        if let Err(cause) = self.state.storage().set_alarm(worker::ScheduledTime::new(when)).await {
            self.books.armed_at.set(0);
            log::error("ledger_arm", "", &cause);
        }
    }

    fn copy_soon(&self, user_id: String) {
        if self.books.copying.replace(true) {
            return;
        }
        let (books, env) = (self.books.clone(), self.env.clone());
        self.state.wait_until(async move {
            clock::sleep_ms(GATHER_MS).await;
            books.copying.set(false);
            books.copy(&env, &user_id).await;
        });
    }
}

impl Books {
    /// Copies waiting entries to D1. Inserting is idempotent by entry id, so a copy that was cut is simply made again.
    async fn copy(&self, env: &Env, user_id: &str) {
        loop {
            let rows = match store::outbox(&self.sql, projection::BATCH) {
                Ok(rows) if !rows.is_empty() => rows,
                Ok(_) => return,
                Err(cause) => return log::error("outbox_read", "", &cause),
            };
            let last = rows.last().map_or(0, |row| row.seq);
            let entries = rows.iter().filter_map(|row| store::entry(row).ok()).collect::<Vec<_>>();
            if let Err(cause) = projection::insert(env, user_id, &entries).await {
                return log::error("outbox_copy", "", &cause);
            }
            if let Err(cause) = store::outbox_sent(&self.sql, last) {
                return log::error("outbox_sent", "", &cause);
            }
        }
    }
}

fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Suspended => ApiError::quota_suspended(),
        Refusal::Insufficient { quota_type, left } => ApiError::quota_insufficient(quota_type.as_str(), left),
        Refusal::Closed | Refusal::Unknown => ApiError::quota_unavailable().with_details(refusal.to_string()),
    }
}
