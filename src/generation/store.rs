//! A generation's rows in the object that owns it: what it is, where it stands, its event log.
//!
//! Invariant: a row exists from the provider's first event on, in the same commit as its messages, and says what a later
//! instance must do about it: `running` without a living pump was interrupted; `settling` has its ending written but not
//! charged or told; `unsettled` is told but not charged; `done` is both. Rows and logs are kept 24 h after the end, for
//! resumes and repeated keys.

use serde::Deserialize;
use serde_json::{from_str, to_string};

use super::event::Event;
use super::{Ending, Job};
use crate::platform::log;
use crate::platform::sql::{Sql, SqlError, int};

const SCHEMA: [&str; 6] = [
    "CREATE TABLE IF NOT EXISTS generation (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, message_id TEXT NOT NULL, state TEXT NOT NULL, idempotency_key TEXT,
     fingerprint TEXT, doc TEXT NOT NULL, ending TEXT, charged INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, ended_at INTEGER)",
    "CREATE INDEX IF NOT EXISTS generation_open ON generation (seq) WHERE state <> 'done'",
    "CREATE INDEX IF NOT EXISTS generation_ended ON generation (ended_at) WHERE state = 'done'",
    "CREATE INDEX IF NOT EXISTS generation_message ON generation (message_id)",
    "CREATE INDEX IF NOT EXISTS generation_key ON generation (idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE TABLE IF NOT EXISTS event_log (generation_id TEXT NOT NULL, first_seq INTEGER NOT NULL, events TEXT NOT NULL,
     PRIMARY KEY (generation_id, first_seq)) WITHOUT ROWID",
];

/// How long an ended generation can be resumed and its key repeated, ms (design.md invariant 5).
pub const KEPT_MS: i64 = 24 * 3_600_000;

/// Events in one row of the log: a row may have 2 MB, and an answer's text has at most half of that in all.
const PART_EVENTS: usize = 4_096;

/// A generation as stored.
#[derive(Debug)]
pub struct Row {
    /// What it is.
    pub job: Job,
    /// Where it stands.
    pub state: String,
    /// Hash of the request that started it.
    pub fingerprint: Option<String>,
    /// How it ended.
    pub ending: Option<Ending>,
    /// Tokens charged.
    pub charged: u64,
}

/// A key that makes a repeated request the same generation, and the hash of the request.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct IdempotencyKey {
    /// The caller's key.
    pub key: String,
    /// Hash over method, path and body.
    pub fingerprint: String,
}

#[derive(Deserialize)]
struct Raw {
    doc: String,
    state: String,
    fingerprint: Option<String>,
    ending: Option<String>,
    charged: f64,
}

const COLUMNS: &str = "SELECT doc, state, fingerprint, ending, charged FROM generation";

/// Creates the tables.
///
/// # Errors
/// When SQLite refuses.
pub fn migrate(sql: &Sql) -> Result<(), SqlError> {
    sql.run(&SCHEMA.join(";"), vec![]).map(|_| ())
}

fn row(raw: Raw) -> Result<Row, SqlError> {
    Ok(Row {
        job: from_str(&raw.doc)?,
        state: raw.state,
        fingerprint: raw.fingerprint,
        ending: raw.ending.map(|ending| from_str(&ending)).transpose()?,
        charged: raw.charged as u64,
    })
}

fn find(sql: &Sql, condition: &str, value: &str) -> Result<Option<Row>, SqlError> {
    sql.first::<Raw>(&format!("{COLUMNS} WHERE {condition} ORDER BY seq DESC LIMIT 1"), vec![value.into()])?.map(row).transpose()
}

/// Writes a generation that has begun: `running`.
///
/// # Errors
/// When SQLite refuses.
pub fn insert(sql: &Sql, job: &Job, key: Option<&IdempotencyKey>, now_ms: i64) -> Result<(), SqlError> {
    sql.run(
        "INSERT INTO generation (id, message_id, state, idempotency_key, fingerprint, doc, created_at) VALUES (?, ?, 'running', ?, ?, ?, ?)",
        vec![
            job.ids.request_id.as_str().into(),
            job.ids.message_id.as_str().into(),
            key.map(|key| key.key.as_str()).into(),
            key.map(|key| key.fingerprint.as_str()).into(),
            to_string(job)?.into(),
            now_ms.into(),
        ],
    )
    .map(|_| ())
}

/// Every generation that still needs something done.
///
/// # Errors
/// As [`newest`].
pub fn unfinished(sql: &Sql) -> Result<Vec<Row>, SqlError> {
    let rows = sql.rows::<Raw>(&format!("{COLUMNS} WHERE state <> 'done'"), vec![])?;
    // A row that cannot be read (a newer version's, say) must not keep the others from being taken up.
    let read = |raw: Raw| row(raw).inspect_err(|cause| log::error("generation_row", "", cause)).ok();
    Ok(rows.into_iter().filter_map(read).collect())
}

/// The newest generation of a message.
///
/// # Errors
/// As [`newest`].
pub fn of_message(sql: &Sql, message_id: &str) -> Result<Option<Row>, SqlError> {
    find(sql, "message_id = ?", message_id)
}

/// The newest generation.
///
/// # Errors
/// When SQLite refuses or a row is unreadable.
pub fn newest(sql: &Sql) -> Result<Option<Row>, SqlError> {
    find(sql, "?1 = ''", "")
}

/// The generation a key started.
///
/// # Errors
/// As [`newest`].
pub fn of_key(sql: &Sql, key: &str) -> Result<Option<Row>, SqlError> {
    find(sql, "idempotency_key = ?", key)
}

/// It has ended: how is written, the charge not yet made.
///
/// # Errors
/// When SQLite refuses.
pub fn ended(sql: &Sql, id: &str, ending: &Ending, now_ms: i64) -> Result<(), SqlError> {
    let values = vec![to_string(ending)?.into(), now_ms.into(), id.into()];
    sql.run("UPDATE generation SET state = 'settling', ending = ?, ended_at = ? WHERE id = ?", values).map(|_| ())
}

/// Its end is told; `charged` tokens were charged, or `None` if the ledger could not be reached yet.
///
/// # Errors
/// When SQLite refuses.
pub fn told(sql: &Sql, id: &str, charged: Option<u64>) -> Result<(), SqlError> {
    let state = if charged.is_some() { "done" } else { "unsettled" };
    let values = vec![state.into(), int(charged.unwrap_or(0)), id.into()];
    sql.run("UPDATE generation SET state = ?, charged = ? WHERE id = ?", values).map(|_| ())
}

/// Appends events to the log.
///
/// # Errors
/// When SQLite refuses.
pub fn append(sql: &Sql, id: &str, events: &[(u64, Event)]) -> Result<(), SqlError> {
    for part in events.chunks(PART_EVENTS) {
        let first = part.first().map_or(0, |(seq, _)| *seq);
        sql.run("INSERT OR REPLACE INTO event_log VALUES (?, ?, ?)", vec![id.into(), int(first), to_string(part)?.into()])?;
    }
    Ok(())
}

/// The whole log, in order.
///
/// # Errors
/// When SQLite refuses or a row is unreadable.
pub fn log(sql: &Sql, id: &str) -> Result<Vec<(u64, Event)>, SqlError> {
    #[derive(Deserialize)]
    struct Part {
        events: String,
    }
    let parts = sql.rows::<Part>("SELECT events FROM event_log WHERE generation_id = ? ORDER BY first_seq", vec![id.into()])?;
    let mut events = Vec::new();
    for part in parts {
        events.extend(from_str::<Vec<(u64, Event)>>(&part.events)?);
    }
    Ok(events)
}

/// Forgets generations whose time is over; answers when the next one's is, unix ms.
///
/// # Errors
/// When SQLite refuses.
pub fn prune(sql: &Sql, now_ms: i64) -> Result<Option<i64>, SqlError> {
    #[derive(Deserialize)]
    struct Next {
        at: Option<i64>,
    }
    let before = now_ms - KEPT_MS;
    sql.run(
        "DELETE FROM event_log WHERE generation_id IN (SELECT id FROM generation WHERE state = 'done' AND ended_at < ?)",
        vec![before.into()],
    )?;
    sql.run("DELETE FROM generation WHERE state = 'done' AND ended_at < ?", vec![before.into()])?;
    let next = sql.first::<Next>("SELECT min(ended_at) AS at FROM generation WHERE state = 'done'", vec![])?;
    Ok(next.and_then(|next| next.at).map(|at| at + KEPT_MS + 1))
}
