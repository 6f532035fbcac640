//! What leaves a ledger after it has decided: parcels to D1, thresholds to running streams and to the platform's webhook.
//!
//! Invariant: a parcel is forgotten only after D1 has it, and D1 takes it by its id, so sending twice is sending once.
//! Nothing here is waited for by a decision.

use std::cell::Cell;

use serde_json::json;
use worker::Env;

use super::books::{Entry, Notice, Parcel, Watcher};
use super::{Crossing, QuotaState, projection, store, webhook};
use crate::config::Config;
use crate::platform::sql::{Sql, SqlError};
use crate::platform::{call, clock, log};

/// Parcels are gathered this long before they are sent to D1 in one statement, ms.
const GATHER_MS: u64 = 1_000;
/// A stream that is told of a threshold must take it within this, ms.
const TELL_MS: u64 = 2_000;

/// One ledger's outbox.
pub struct Outbox {
    sql: Sql,
    env: Env,
    user_id: String,
    gathering: Cell<bool>,
}

impl Outbox {
    /// The outbox of `user_id`'s ledger.
    #[must_use]
    pub const fn new(sql: Sql, env: Env, user_id: String) -> Self {
        Self { sql, env, user_id, gathering: Cell::new(false) }
    }

    /// Sends what waits, together with what comes within a moment.
    pub async fn send_soon(&self) {
        if self.gathering.replace(true) {
            return;
        }
        clock::sleep_ms(GATHER_MS).await;
        self.gathering.set(false);
        self.send().await;
    }

    /// Sends what waits. What D1 or the platform does not take stays for the alarm.
    pub async fn send(&self) {
        self.copy().await;
        if let Err(cause) = self.send_webhooks().await {
            log::error("webhook", "", &cause);
        }
    }

    /// Copies what waits to D1.
    pub async fn copy(&self) {
        if let Err(cause) = self.copy_all().await {
            log::error("outbox", "", &cause);
        }
    }

    async fn send_webhooks(&self) -> Result<(), SqlError> {
        let Ok(config) = Config::of(&self.env) else { return Ok(()) };
        let now_ms = clock::now_ms();
        for (notice, attempts) in store::webhooks_due(&self.sql, now_ms)? {
            // Counted before it is tried: whoever looks next, meanwhile or after a kill, finds it taken.
            store::webhook_tried(&self.sql, &notice.id, now_ms + webhook::wait_ms(attempts))?;
            let outcome = webhook::deliver(&config, &self.user_id, &notice).await;
            let told = match outcome {
                webhook::Outcome::NotWanted => None,
                webhook::Outcome::Delivered => Some("delivered"),
                webhook::Outcome::Failed if attempts + 1 >= webhook::ATTEMPTS_MAX => Some("failed"),
                webhook::Outcome::Failed => continue,
            };
            store::webhook_over(&self.sql, &notice.id)?;
            if let Some(state) = told
                && let Err(cause) = projection::webhook_state(&self.env, &self.user_id, &notice.id, state).await
            {
                log::error("webhook_state", "", &cause);
            }
        }
        Ok(())
    }

    async fn copy_all(&self) -> Result<(), worker::Error> {
        let broken = |cause: SqlError| worker::Error::RustError(cause.to_string());
        loop {
            let rows = store::outbox(&self.sql, projection::BATCH).map_err(broken)?;
            let Some(last) = rows.last().map(|row| row.seq) else { return Ok(()) };
            let (mut entries, mut notices): (Vec<Entry>, Vec<Notice>) = (Vec::new(), Vec::new());
            for row in &rows {
                match store::parcel(row) {
                    Ok(Parcel::Entry(entry)) => entries.push(*entry),
                    Ok(Parcel::Notice(notice)) => notices.push(notice),
                    Ok(Parcel::User) => {}
                    Err(cause) => {
                        log::error("outbox_row", "", &cause);
                        store::set_aside(&self.sql, row.seq).map_err(broken)?;
                    }
                }
            }
            let (quotas, now_ms) = (self.quotas().map_err(broken)?, clock::now_ms());
            projection::insert(&self.env, &self.user_id, &entries, &notices, &quotas, now_ms).await?;
            store::outbox_sent(&self.sql, last).map_err(broken)?;
        }
    }

    /// The quotas as they stand: the user's line in the operator's list.
    fn quotas(&self) -> Result<Vec<QuotaState>, SqlError> {
        let Ok(config) = Config::of(&self.env) else { return Ok(Vec::new()) };
        let now_ms = clock::now_ms();
        Ok(store::load(&self.sql, None, config.zone, now_ms)?.quotas(config.zone, now_ms))
    }

    /// Tells every object that runs a generation of this user that thresholds were crossed.
    pub async fn tell(&self, watchers: &[Watcher], news: &[Crossing]) {
        let command = json!({"op": "quota_event", "crossings": news});
        for watcher in watchers {
            if call::raw(&self.env, &watcher.binding, &watcher.object, &command, TELL_MS).await.is_err() {
                log::error("tell_stream", "", &"a running stream was not told of a threshold");
            }
        }
    }
}
