//! The rows of a ChatSession object: the session and its message tree.
//!
//! Invariant: messages form a tree (`parent_id`, empty at the roots); the active path is the rows with `active = 1`, whose
//! depths run 0, 1, 2, … without a gap. So a page of it is a range of depths, and its length the last depth plus one:
//! neither depends on how many messages the session has. Nothing is ever removed: clearing and switching only mark.

use serde::Deserialize;
use serde_json::{from_str, to_string};

use super::Session;
use crate::llm::{PromptMessage, Speaker, tokens};
use crate::platform::sql::{Sql, SqlError, int};

const SCHEMA: [&str; 4] = [
    "CREATE TABLE IF NOT EXISTS session (k INTEGER PRIMARY KEY CHECK (k = 0), indexed_rev INTEGER NOT NULL DEFAULT 0, doc TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS message (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, parent_id TEXT NOT NULL,
     depth INTEGER NOT NULL, active INTEGER NOT NULL, cleared INTEGER NOT NULL DEFAULT 0, role TEXT NOT NULL, content TEXT NOT NULL,
     reasoning TEXT, token_used INTEGER NOT NULL DEFAULT 0, status TEXT NOT NULL, finish_reason TEXT, model TEXT, created_at INTEGER NOT NULL)",
    "CREATE UNIQUE INDEX IF NOT EXISTS message_path ON message (depth) WHERE active = 1",
    "CREATE INDEX IF NOT EXISTS message_children ON message (parent_id, seq)",
];

/// Rows read at once when walking up a path.
const WALK_ROWS: i64 = 64;

/// A message as stored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    /// Its id.
    pub id: String,
    /// The message it follows; empty at a root.
    pub parent_id: String,
    /// Its distance from the root.
    pub depth: i64,
    /// `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
    /// Tokens its generation used; for a question, an estimate.
    pub token_used: i64,
    /// `complete`, `streaming`, `stopped`, `interrupted`, `failed`.
    pub status: String,
    /// Why its generation ended.
    pub finish_reason: Option<String>,
    /// The model that wrote it.
    pub model: Option<String>,
    /// Unix ms.
    pub created_at: i64,
}

const MESSAGE: &str =
    "SELECT id, parent_id, depth, role, content, token_used, status, finish_reason, model, created_at FROM message";

/// Whether the object holds a session (its tables exist), without making any.
///
/// # Errors
/// When SQLite refuses.
pub fn exists(sql: &Sql) -> Result<bool, SqlError> {
    #[derive(Deserialize)]
    struct Name {}
    Ok(sql.first::<Name>("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'session'", vec![])?.is_some())
}

/// Creates the tables.
///
/// # Errors
/// When SQLite refuses.
pub fn migrate(sql: &Sql) -> Result<(), SqlError> {
    sql.run(&SCHEMA.join(";"), vec![]).map(|_| ())
}

/// The session, and the revision that is in D1.
///
/// # Errors
/// When SQLite refuses or the row is unreadable.
pub fn session(sql: &Sql) -> Result<Option<(Session, u64)>, SqlError> {
    #[derive(Deserialize)]
    struct Row {
        doc: String,
        indexed_rev: f64,
    }
    let row = sql.first::<Row>("SELECT doc, indexed_rev FROM session", vec![])?;
    row.map(|row| Ok((from_str(&row.doc)?, row.indexed_rev as u64))).transpose()
}

/// Writes the session.
///
/// # Errors
/// When SQLite refuses.
pub fn save(sql: &Sql, session: &Session) -> Result<(), SqlError> {
    let doc = to_string(session)?;
    sql.run("INSERT INTO session (k, doc) VALUES (0, ?1) ON CONFLICT DO UPDATE SET doc = ?1", vec![doc.into()]).map(|_| ())
}

/// Remembers that revision `rev` is in D1.
///
/// # Errors
/// When SQLite refuses.
pub fn indexed(sql: &Sql, rev: u64) -> Result<(), SqlError> {
    sql.run("UPDATE session SET indexed_rev = max(indexed_rev, ?)", vec![int(rev)]).map(|_| ())
}

/// The last message of the active path.
///
/// # Errors
/// When SQLite refuses.
pub fn leaf(sql: &Sql) -> Result<Option<Message>, SqlError> {
    sql.first(&format!("{MESSAGE} WHERE active = 1 ORDER BY depth DESC LIMIT 1"), vec![])
}

/// How many messages the active path has.
///
/// # Errors
/// When SQLite refuses.
pub fn path_length(sql: &Sql) -> Result<u64, SqlError> {
    Ok(leaf(sql)?.and_then(|leaf| u64::try_from(leaf.depth + 1).ok()).unwrap_or(0))
}

/// A page of the active path, oldest first.
///
/// # Errors
/// When SQLite refuses.
pub fn page(sql: &Sql, offset: u64, limit: u64) -> Result<Vec<Message>, SqlError> {
    sql.rows(&format!("{MESSAGE} WHERE active = 1 AND depth >= ? ORDER BY depth LIMIT ?"), vec![int(offset), int(limit)])
}

/// A message that was not cleared.
///
/// # Errors
/// When SQLite refuses.
pub fn message(sql: &Sql, id: &str) -> Result<Option<Message>, SqlError> {
    sql.first(&format!("{MESSAGE} WHERE id = ? AND cleared = 0"), vec![id.into()])
}

/// Ids of the messages that share a parent and a role with one of `messages`, itself included, oldest first:
/// (parent, role, id).
///
/// # Errors
/// When SQLite refuses.
pub fn siblings(sql: &Sql, messages: &[Message]) -> Result<Vec<(String, String, String)>, SqlError> {
    #[derive(Deserialize)]
    struct Row {
        parent_id: String,
        role: String,
        id: String,
    }
    let parents: Vec<&str> = messages.iter().map(|message| message.parent_id.as_str()).collect();
    let rows = sql.rows::<Row>(
        "SELECT parent_id, role, id FROM message WHERE cleared = 0 AND parent_id IN (SELECT value FROM json_each(?)) ORDER BY seq",
        vec![to_string(&parents)?.into()],
    )?;
    Ok(rows.into_iter().map(|row| (row.parent_id, row.role, row.id)).collect())
}

/// Walks up from `id` (included), newest first, handing each message with text to `take` until it declines.
///
/// # Errors
/// When SQLite refuses.
pub fn walk_up(sql: &Sql, id: &str, mut take: impl FnMut(PromptMessage) -> bool) -> Result<(), SqlError> {
    #[derive(Deserialize)]
    struct Row {
        parent_id: String,
        role: String,
        content: String,
    }
    let mut from = id.to_owned();
    while !from.is_empty() {
        let rows = sql.rows::<Row>(
            "WITH RECURSIVE up (parent_id, role, content, n) AS (
               SELECT parent_id, role, content, 1 FROM message WHERE id = ?1
               UNION ALL SELECT m.parent_id, m.role, m.content, n + 1 FROM message m JOIN up ON m.id = up.parent_id WHERE n < ?2)
             SELECT parent_id, role, content FROM up ORDER BY n",
            vec![from.as_str().into(), WALK_ROWS.into()],
        )?;
        from = rows.last().map(|row| row.parent_id.clone()).unwrap_or_default();
        for row in rows {
            let role = if row.role == "user" { Speaker::User } else { Speaker::Assistant };
            if !row.content.is_empty() && !take(PromptMessage { role, content: row.content }) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Appends a message below `parent_id` and makes it the end of the active path.
///
/// # Errors
/// When SQLite refuses.
pub fn append(sql: &Sql, message: &Message) -> Result<(), SqlError> {
    end_path_at(sql, &message.parent_id)?;
    let values = vec![
        message.id.as_str().into(),
        message.parent_id.as_str().into(),
        message.depth.into(),
        message.role.as_str().into(),
        message.content.as_str().into(),
        message.token_used.into(),
        message.status.as_str().into(),
        message.model.as_deref().into(),
        message.created_at.into(),
    ];
    sql.run(
        "INSERT INTO message (id, parent_id, depth, active, role, content, token_used, status, model, created_at)
         VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?, ?)",
        values,
    )
    .map(|_| ())
}

/// A new question or a new, empty answer below `parent`.
#[must_use]
pub fn below(parent: Option<&Message>, id: &str, role: &str, content: &str, now_ms: i64) -> Message {
    let answer = role == "assistant";
    Message {
        id: id.to_owned(),
        parent_id: parent.map_or_else(String::new, |parent| parent.id.clone()),
        depth: parent.map_or(0, |parent| parent.depth + 1),
        role: role.to_owned(),
        content: content.to_owned(),
        token_used: if answer { 0 } else { i64::try_from(tokens::typical(content)).unwrap_or(i64::MAX) },
        status: if answer { "streaming" } else { "complete" }.to_owned(),
        finish_reason: None,
        model: None,
        created_at: now_ms,
    }
}

/// Makes the path from the root to `id` active and everything deeper inactive; an empty id deactivates all.
fn end_path_at(sql: &Sql, id: &str) -> Result<(), SqlError> {
    #[derive(Deserialize)]
    struct At {
        depth: i64,
        active: i64,
    }
    let at = sql.first::<At>("SELECT depth, active FROM message WHERE id = ?", vec![id.into()])?;
    let depth = at.as_ref().map_or(-1, |at| at.depth);
    if at.is_none_or(|at| at.active == 1) {
        return sql.run("UPDATE message SET active = 0 WHERE active = 1 AND depth > ?", vec![depth.into()]).map(|_| ());
    }
    // Off the path: everything below the nearest active ancestor changes sides.
    let up = "WITH RECURSIVE up (id, parent_id, depth) AS (
        SELECT id, parent_id, depth FROM message WHERE id = ?1
        UNION ALL SELECT m.id, m.parent_id, m.depth FROM message m JOIN up ON m.id = up.parent_id WHERE m.active = 0)";
    sql.run(
        &format!("{up} UPDATE message SET active = 0 WHERE active = 1 AND depth >= (SELECT min(depth) FROM up)"),
        vec![id.into()],
    )?;
    sql.run(&format!("{up} UPDATE message SET active = 1 WHERE id IN (SELECT id FROM up)"), vec![id.into()]).map(|_| ())
}

/// Makes the path through `id` active, down to the newest leaf below it.
///
/// # Errors
/// When SQLite refuses.
pub fn switch_path(sql: &Sql, id: &str) -> Result<(), SqlError> {
    #[derive(Deserialize)]
    struct Id {
        id: String,
    }
    let mut leaf = id.to_owned();
    let newest_child = "SELECT id FROM message WHERE parent_id = ? AND cleared = 0 ORDER BY seq DESC LIMIT 1";
    while let Some(child) = sql.first::<Id>(newest_child, vec![leaf.as_str().into()])? {
        leaf = child.id;
    }
    end_path_at(sql, &leaf)
}

/// What a generation leaves in its message.
pub struct Written<'a> {
    /// The text.
    pub content: &'a str,
    /// Reasoning, kept apart.
    pub reasoning: &'a str,
    /// Message status.
    pub status: &'a str,
    /// Why it ended.
    pub finish_reason: &'a str,
    /// Tokens used.
    pub token_used: u64,
}

/// Saves an ended generation's text.
///
/// # Errors
/// When SQLite refuses.
pub fn finish(sql: &Sql, id: &str, written: &Written<'_>) -> Result<(), SqlError> {
    let reasoning = Some(written.reasoning).filter(|text| !text.is_empty());
    sql.run(
        "UPDATE message SET content = ?, reasoning = ?, status = ?, finish_reason = ?, token_used = ? WHERE id = ?",
        vec![
            written.content.into(),
            reasoning.into(),
            written.status.into(),
            written.finish_reason.into(),
            int(written.token_used),
            id.into(),
        ],
    )
    .map(|_| ())
}

/// Marks every message as cleared: kept, but shown and used no more.
///
/// # Errors
/// When SQLite refuses.
pub fn clear(sql: &Sql) -> Result<(), SqlError> {
    sql.run("UPDATE message SET active = 0, cleared = 1 WHERE cleared = 0", vec![]).map(|_| ())
}
