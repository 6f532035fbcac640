//! The rows of a QuotaLedger object.
//!
//! Invariant: the rows written are exactly the changes decided, in one transaction. Rows are JSON documents beside the
//! few columns that are searched: the ledger's shape lives in its types, not twice in SQL.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{from_str, to_string};

use super::books::{Change, Hold, Ledger, Notice, Parcel};
use super::period::Zone;
use super::{Command, QuotaType};
use crate::platform::sql::{Sql, SqlError};

const SCHEMA: [&str; 9] = [
    "CREATE TABLE IF NOT EXISTS account (k INTEGER PRIMARY KEY CHECK (k = 0), doc TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS period (quota_type TEXT NOT NULL, period TEXT NOT NULL, doc TEXT NOT NULL, PRIMARY KEY (quota_type, period)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS hold (id TEXT PRIMARY KEY, open INTEGER NOT NULL, expires_at INTEGER NOT NULL, doc TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS hold_open ON hold (expires_at) WHERE open = 1",
    "CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, doc TEXT NOT NULL, dead INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS credit_order (id TEXT PRIMARY KEY, doc TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS webhook (id TEXT PRIMARY KEY, doc TEXT NOT NULL, attempts INTEGER NOT NULL, next_at INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS claim (key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, target TEXT NOT NULL, expires_at INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS claim_expiry ON claim (expires_at)",
];

/// How long a closed hold is remembered after its expiry, so that a repeated settle finds its answer, ms.
const CLOSED_HOLD_MS: i64 = 48 * 3_600_000;

#[derive(Deserialize)]
struct Doc {
    doc: String,
}

#[derive(Deserialize)]
struct Next {
    at: Option<i64>,
}

/// An idempotency key and what it is bound to.
#[derive(Deserialize)]
pub struct Claim {
    /// Hash of the request it was first sent with.
    pub fingerprint: String,
    /// Where that request's generation lives.
    pub target: String,
}

/// A parcel waiting to be copied to D1.
#[derive(Deserialize)]
pub struct Waiting {
    /// Its place in the queue.
    pub seq: i64,
    /// The parcel as JSON.
    pub doc: String,
}

/// Creates the tables.
///
/// # Errors
/// When SQLite refuses.
pub fn migrate(sql: &Sql) -> Result<(), SqlError> {
    sql.run(&SCHEMA.join(";"), vec![]).map(|_| ())
}

/// Loads the rows `command` is decided on at `now_ms`.
///
/// # Errors
/// When SQLite refuses or a row is unreadable.
pub fn load(sql: &Sql, command: Option<&Command>, zone: Zone, now_ms: i64) -> Result<Ledger, SqlError> {
    let account = sql.first::<Doc>("SELECT doc FROM account", vec![])?.map(|row| from_str(&row.doc)).transpose()?;
    let hold_id = match command {
        Some(Command::Reserve(ask)) => ask.hold_id.as_str(),
        Some(Command::Settle { hold_id, .. } | Command::Release { hold_id } | Command::Renew { hold_id, .. }) => hold_id,
        _ => "",
    };
    let orders = match command {
        Some(Command::Recharge { order_id, .. }) => {
            sql.rows::<Doc>("SELECT doc FROM credit_order WHERE id = ?", vec![order_id.as_str().into()])?
        }
        _ => Vec::new(),
    };
    let orders = orders.iter().map(|row| from_str(&row.doc)).collect::<Result<_, _>>()?;
    let holds =
        sql.rows::<Doc>("SELECT doc FROM hold WHERE open = 1 UNION SELECT doc FROM hold WHERE id = ?", vec![hold_id.into()])?;
    let holds = holds.iter().map(|row| from_str(&row.doc)).collect::<Result<Vec<Hold>, _>>()?;
    let mut periods: BTreeSet<String> = QuotaType::ALL.into_iter().map(|quota_type| zone.period(quota_type, now_ms)).collect();
    for hold in &holds {
        periods.extend([hold.day.clone(), hold.month.clone()]);
    }
    let windows = sql.rows::<Doc>(
        "SELECT doc FROM period WHERE period IN (SELECT value FROM json_each(?))",
        vec![to_string(&periods)?.into()],
    )?;
    let windows = windows.iter().map(|row| from_str(&row.doc)).collect::<Result<_, _>>()?;
    Ok(Ledger { account, windows, holds, orders })
}

/// Writes what was decided, all of it or nothing.
///
/// # Errors
/// When SQLite refuses; nothing is written then.
pub fn save(sql: &Sql, changes: Vec<Change>) -> Result<(), SqlError> {
    if changes.is_empty() {
        return Ok(());
    }
    let inside = sql.clone();
    sql.transaction(move || changes.iter().try_for_each(|change| write(&inside, change)))
}

fn write(sql: &Sql, change: &Change) -> Result<(), SqlError> {
    match change {
        Change::Account(account) => {
            post(sql, &Parcel::User)?;
            sql.run("INSERT INTO account VALUES (0, ?1) ON CONFLICT DO UPDATE SET doc = ?1", vec![to_string(account)?.into()])
        }
        Change::Window(window) => sql.run(
            "INSERT INTO period VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET doc = ?3",
            vec![window.quota_type.as_str().into(), window.period.as_str().into(), to_string(window)?.into()],
        ),
        Change::Hold(hold) => sql.run(
            "INSERT INTO hold VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET open = ?2, expires_at = ?3, doc = ?4",
            vec![hold.id.as_str().into(), i64::from(hold.is_open()).into(), hold.expires_at.into(), to_string(hold)?.into()],
        ),
        Change::Entry(entry) => post(sql, &Parcel::Entry(Box::new(entry.clone()))),
        Change::Notice(notice) => {
            sql.run(
                "INSERT OR IGNORE INTO webhook VALUES (?, ?, 0, 0)",
                vec![notice.id.as_str().into(), to_string(notice)?.into()],
            )?;
            post(sql, &Parcel::Notice(notice.clone()))
        }
        Change::Order(order) => {
            sql.run("INSERT INTO credit_order VALUES (?, ?)", vec![order.id.as_str().into(), to_string(order)?.into()])
        }
    }
    .map(|_| ())
}

fn post(sql: &Sql, parcel: &Parcel) -> Result<usize, SqlError> {
    sql.run("INSERT INTO outbox (doc) VALUES (?)", vec![to_string(parcel)?.into()])
}

/// The oldest parcels not yet in D1, at most `count`.
///
/// # Errors
/// When SQLite refuses.
pub fn outbox(sql: &Sql, count: i64) -> Result<Vec<Waiting>, SqlError> {
    sql.rows("SELECT seq, doc FROM outbox WHERE dead = 0 ORDER BY seq LIMIT ?", vec![count.into()])
}

/// Forgets parcels up to `seq`: they are in D1.
///
/// # Errors
/// When SQLite refuses.
pub fn outbox_sent(sql: &Sql, seq: i64) -> Result<(), SqlError> {
    sql.run("DELETE FROM outbox WHERE seq <= ? AND dead = 0", vec![seq.into()]).map(|_| ())
}

/// When the next open hold expires, unix ms.
///
/// # Errors
/// When SQLite refuses.
pub fn next_expiry(sql: &Sql) -> Result<Option<i64>, SqlError> {
    Ok(sql.first::<Next>("SELECT min(expires_at) AS at FROM hold WHERE open = 1", vec![])?.and_then(|row| row.at))
}

/// Forgets closed holds and idempotency keys whose time is over.
///
/// # Errors
/// When SQLite refuses.
pub fn prune(sql: &Sql, now_ms: i64) -> Result<(), SqlError> {
    sql.run("DELETE FROM hold WHERE open = 0 AND expires_at < ?", vec![(now_ms - CLOSED_HOLD_MS).into()])?;
    forget_claims(sql, now_ms)
}

/// Forgets keys whose time is over.
///
/// # Errors
/// When SQLite refuses.
pub fn forget_claims(sql: &Sql, now_ms: i64) -> Result<(), SqlError> {
    sql.run("DELETE FROM claim WHERE expires_at < ?", vec![now_ms.into()]).map(|_| ())
}

/// Frees a key: the request it was bound by was refused.
///
/// # Errors
/// When SQLite refuses.
pub fn unbind(sql: &Sql, key: &str, fingerprint: &str) -> Result<(), SqlError> {
    sql.run("DELETE FROM claim WHERE key = ? AND fingerprint = ?", vec![key.into(), fingerprint.into()]).map(|_| ())
}

/// The live claim of an idempotency key.
///
/// # Errors
/// When SQLite refuses.
pub fn claim(sql: &Sql, key: &str, now_ms: i64) -> Result<Option<Claim>, SqlError> {
    sql.first("SELECT fingerprint, target FROM claim WHERE key = ? AND expires_at >= ?", vec![key.into(), now_ms.into()])
}

/// Binds an idempotency key until `expires_at` (unix ms).
///
/// # Errors
/// When SQLite refuses.
pub fn bind(sql: &Sql, key: &str, claim: &Claim, expires_at: i64) -> Result<(), SqlError> {
    sql.run(
        "INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?)",
        vec![key.into(), claim.fingerprint.as_str().into(), claim.target.as_str().into(), expires_at.into()],
    )
    .map(|_| ())
}

/// Reads an outbox row's parcel.
///
/// # Errors
/// When the row is unreadable.
pub fn parcel(row: &Waiting) -> Result<Parcel, SqlError> {
    Ok(from_str(&row.doc)?)
}

/// Sets a parcel aside that cannot be read: kept for the operator, in nobody's way.
///
/// # Errors
/// When SQLite refuses.
pub fn set_aside(sql: &Sql, seq: i64) -> Result<(), SqlError> {
    sql.run("UPDATE outbox SET dead = 1 WHERE seq = ?", vec![seq.into()]).map(|_| ())
}

/// How many parcels wait for D1.
///
/// # Errors
/// When SQLite refuses.
pub fn waiting(sql: &Sql) -> Result<u64, SqlError> {
    #[derive(Deserialize)]
    struct Count {
        n: f64,
    }
    Ok(sql.first::<Count>("SELECT count(*) AS n FROM outbox WHERE dead = 0", vec![])?.map_or(0, |count| count.n as u64))
}

/// Notifications whose webhook is due, with how often it was tried.
///
/// # Errors
/// When SQLite refuses or a row is unreadable.
pub fn webhooks_due(sql: &Sql, now_ms: i64) -> Result<Vec<(Notice, u32)>, SqlError> {
    #[derive(Deserialize)]
    struct Row {
        doc: String,
        attempts: u32,
    }
    let rows =
        sql.rows::<Row>("SELECT doc, attempts FROM webhook WHERE next_at <= ? ORDER BY next_at LIMIT 20", vec![now_ms.into()])?;
    rows.into_iter().map(|row| Ok((from_str(&row.doc)?, row.attempts))).collect()
}

/// When the next webhook is due, unix ms.
///
/// # Errors
/// When SQLite refuses.
pub fn next_webhook(sql: &Sql) -> Result<Option<i64>, SqlError> {
    Ok(sql.first::<Next>("SELECT min(next_at) AS at FROM webhook", vec![])?.and_then(|row| row.at))
}

/// A webhook is being tried; unless it gets through, it is tried again at `next_at` (unix ms).
///
/// # Errors
/// When SQLite refuses.
pub fn webhook_tried(sql: &Sql, id: &str, next_at: i64) -> Result<(), SqlError> {
    sql.run("UPDATE webhook SET attempts = attempts + 1, next_at = ? WHERE id = ?", vec![next_at.into(), id.into()]).map(|_| ())
}

/// A webhook is through, or given up.
///
/// # Errors
/// When SQLite refuses.
pub fn webhook_over(sql: &Sql, id: &str) -> Result<(), SqlError> {
    sql.run("DELETE FROM webhook WHERE id = ?", vec![id.into()]).map(|_| ())
}
