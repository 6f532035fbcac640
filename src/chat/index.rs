//! The list of sessions in D1: written from each session's object, read by `GET /ai/chat/sessions`.
//!
//! Invariant: a row is only ever replaced by a newer revision of the same session, and every read names the owner.

use serde::Deserialize;
use worker::wasm_bindgen::JsValue;
use worker::{Env, query};

use super::settings::Settings;
use super::{Session, Status};

const UPSERT: &str = "INSERT INTO chat_sessions
 (id, user_id, project_id, title, status, settings, tags, message_count, token_count, created_at, updated_at, last_message_at, rev)
 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
 ON CONFLICT (id) DO UPDATE SET project_id = ?3, title = ?4, status = ?5, settings = ?6, tags = ?7, message_count = ?8,
 token_count = ?9, updated_at = ?11, last_message_at = ?12, rev = ?13 WHERE rev < ?13 AND user_id = ?2";

/// Writes `session` into the list.
///
/// # Errors
/// When D1 refuses or is away; the cause is for the log.
pub async fn upsert(env: &Env, session: &Session) -> worker::Result<()> {
    let db = env.d1("DB")?;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    query!(
        &db,
        UPSERT,
        session.id,
        session.user_id,
        session.project_id,
        session.title,
        session.status.as_str(),
        serde_json::to_string(&session.settings)?,
        serde_json::to_string(&session.tags)?,
        number(session.message_count),
        number(session.token_count),
        session.created_at,
        session.updated_at,
        session.last_message_at,
        number(session.rev)
    )?
    .run()
    .await
    .map(|_| ())
}

/// What a list asks for.
pub struct Filter<'a> {
    /// Whose sessions.
    pub user_id: &'a str,
    /// Of this project.
    pub project_id: Option<&'a str>,
    /// With this in the title.
    pub title: Option<&'a str>,
    /// With this tag.
    pub tag: Option<&'a str>,
    /// In this state; without, all that are not deleted.
    pub status: Option<Status>,
    /// Rows at most.
    pub limit: u64,
    /// Rows to pass over.
    pub offset: u64,
    /// How many there are in all is wanted, too.
    pub counted: bool,
}

#[derive(Deserialize)]
struct Row {
    id: String,
    user_id: String,
    project_id: Option<String>,
    title: String,
    status: Status,
    settings: String,
    tags: String,
    message_count: u64,
    token_count: u64,
    created_at: i64,
    updated_at: i64,
    last_message_at: Option<i64>,
    rev: u64,
}

impl Row {
    fn session(self) -> Session {
        Session {
            id: self.id,
            user_id: self.user_id,
            project_id: self.project_id,
            title: self.title,
            title_set: true,
            status: self.status,
            settings: serde_json::from_str::<Settings>(&self.settings).unwrap_or_default(),
            tags: serde_json::from_str(&self.tags).unwrap_or_default(),
            message_count: self.message_count,
            token_count: self.token_count,
            created_at: self.created_at,
            updated_at: self.updated_at,
            last_message_at: self.last_message_at,
            rev: self.rev,
        }
    }
}

/// Sessions of a user, newest change first, and how many there are in all.
///
/// # Errors
/// When D1 refuses or is away.
pub async fn list(env: &Env, filter: &Filter<'_>) -> worker::Result<(Vec<Session>, u64)> {
    #[derive(Deserialize)]
    struct Count {
        total: u64,
    }
    let mut conditions = vec!["user_id = ?"];
    let mut values: Vec<JsValue> = vec![filter.user_id.into()];
    if let Some(project_id) = filter.project_id {
        conditions.push("project_id = ?");
        values.push(project_id.into());
    }
    if let Some(title) = filter.title {
        // instr, not LIKE: no wildcards to escape, and LIKE's pattern is capped at 50 bytes.
        conditions.push("instr(lower(title), lower(?)) > 0");
        values.push(title.into());
    }
    if let Some(tag) = filter.tag {
        conditions.push("EXISTS (SELECT 1 FROM json_each(tags) WHERE json_each.value = ?)");
        values.push(tag.into());
    }
    match filter.status {
        Some(status) => {
            conditions.push("status = ?");
            values.push(status.as_str().into());
        }
        None => conditions.push("status <> 'deleted'"),
    }
    let condition = conditions.join(" AND ");
    let db = env.d1("DB")?;
    let count = db.prepare(format!("SELECT count(*) AS total FROM chat_sessions WHERE {condition}")).bind(&values)?;
    values.extend([JsValue::from_f64(filter.limit as f64), JsValue::from_f64(filter.offset as f64)]);
    let rows = db
        .prepare(format!("SELECT * FROM chat_sessions WHERE {condition} ORDER BY updated_at DESC, id DESC LIMIT ? OFFSET ?"))
        .bind(&values)?;
    let results = db.batch(if filter.counted { vec![rows, count] } else { vec![rows] }).await?;
    let rows: Vec<Row> = results.first().map(|result| result.results()).transpose()?.unwrap_or_default();
    let total: Vec<Count> = results.get(1).map(|result| result.results()).transpose()?.unwrap_or_default();
    Ok((rows.into_iter().map(Row::session).collect(), total.first().map_or(0, |count| count.total)))
}
