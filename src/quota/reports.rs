//! What is read from D1 about spending: transactions, statistics, usage, explanations, notifications, the users' list.
//!
//! Invariant: every query of a user's rows names that user; a movement makes one row per quota type, so whatever counts
//! requests, tokens or cost looks at the `total` rows alone. Times are unix ms, amounts tokens, costs micro-credits.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use worker::wasm_bindgen::JsValue;
use worker::{D1PreparedStatement, Env, query};

use super::books::Entry;

/// One transaction.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs, reason = "columns of migrations/0002_quota.sql, documented there")]
pub struct Transaction {
    pub id: String,
    pub user_id: String,
    pub quota_type: String,
    pub period: String,
    pub r#type: String,
    pub amount: u64,
    pub before_balance: u64,
    pub after_balance: u64,
    pub service: String,
    pub model: String,
    pub request_id: String,
    pub message_id: String,
    pub hold_id: String,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub reasoning_tokens: u64,
    pub cached_tokens: u64,
    pub estimated: u8,
    pub hostile: u8,
    pub cost_micro: u64,
    pub price_version: String,
    pub written_off: u64,
    pub reason: String,
    pub duration_ms: u64,
    pub at: i64,
}

impl Transaction {
    /// The row that `entry` of `user_id` becomes in D1.
    #[must_use]
    pub fn of(user_id: &str, entry: &Entry) -> Self {
        Self {
            id: format!("{user_id}/{}", entry.id),
            user_id: user_id.to_owned(),
            quota_type: entry.quota_type.as_str().to_owned(),
            period: entry.period.clone(),
            r#type: entry.kind.as_str().to_owned(),
            amount: entry.amount,
            before_balance: entry.before,
            after_balance: entry.after,
            service: entry.service.as_str().to_owned(),
            model: entry.model.clone(),
            request_id: entry.request_id.clone(),
            message_id: entry.message_id.clone(),
            hold_id: entry.hold_id.clone(),
            input_tokens: entry.usage.input,
            output_tokens: entry.usage.output,
            reasoning_tokens: entry.usage.reasoning,
            cached_tokens: entry.usage.cached,
            estimated: u8::from(entry.usage.estimated),
            hostile: u8::from(entry.usage.hostile),
            cost_micro: entry.cost_micro,
            price_version: entry.price_version.clone(),
            written_off: entry.written_off,
            reason: entry.reason.clone(),
            duration_ms: entry.duration_ms,
            at: entry.at,
        }
    }
}

/// Which transactions.
#[derive(Debug, Default)]
pub struct Filter<'a> {
    /// Whose.
    pub user_id: &'a str,
    /// `consume`, `recharge`, `reset`.
    pub kind: Option<&'a str>,
    /// `daily`, `monthly`, `total`.
    pub quota_type: Option<&'a str>,
    /// Which feature.
    pub service: Option<&'a str>,
    /// Which model.
    pub model: Option<&'a str>,
    /// Not before, unix ms.
    pub from: Option<i64>,
    /// Before, unix ms.
    pub to: Option<i64>,
    /// Older than this transaction: stable paging while new entries arrive.
    pub after: Option<&'a str>,
}

impl Filter<'_> {
    fn conditions(&self) -> (String, Vec<JsValue>) {
        let mut conditions = vec!["user_id = ?".to_owned()];
        let mut values: Vec<JsValue> = vec![self.user_id.into()];
        for (column, value) in
            [("type", self.kind), ("quota_type", self.quota_type), ("service", self.service), ("model", self.model)]
        {
            if let Some(value) = value {
                conditions.push(format!("{column} = ?"));
                values.push(value.into());
            }
        }
        for (comparison, value) in [("at >= ?", self.from), ("at < ?", self.to)] {
            if let Some(at) = value {
                conditions.push(comparison.to_owned());
                values.push(JsValue::from_f64(at as f64));
            }
        }
        if let Some(id) = self.after {
            conditions.push("(at, id) < (SELECT at, id FROM quota_transactions WHERE id = ? AND user_id = ?)".to_owned());
            values.extend([id.into(), self.user_id.into()]);
        }
        (conditions.join(" AND "), values)
    }
}

/// A page of transactions, newest first, and how many the filter finds.
///
/// # Errors
/// When D1 refuses or is away.
pub async fn transactions(env: &Env, filter: &Filter<'_>, limit: u64, offset: u64) -> worker::Result<(Vec<Transaction>, u64)> {
    #[derive(Deserialize)]
    struct Count {
        n: u64,
    }
    let db = env.d1("DB")?;
    let (conditions, mut values) = filter.conditions();
    let count = db.prepare(format!("SELECT count(*) AS n FROM quota_transactions WHERE {conditions}")).bind(&values)?;
    values.extend([JsValue::from_f64(limit as f64), JsValue::from_f64(offset as f64)]);
    let page = format!("SELECT * FROM quota_transactions WHERE {conditions} ORDER BY at DESC, id DESC LIMIT ? OFFSET ?");
    let page = db.prepare(page).bind(&values)?;
    let results = db.batch(vec![count, page]).await?;
    let (Some(count), Some(page)) = (results.first(), results.get(1)) else { return Ok((Vec::new(), 0)) };
    Ok((page.results()?, count.results::<Count>()?.first().map_or(0, |count| count.n)))
}

/// The entries of one message's generations, of one quota type each, newest first.
///
/// # Errors
/// As [`transactions`].
pub async fn of_message(env: &Env, user_id: &str, message_id: &str) -> worker::Result<Vec<Transaction>> {
    let db = env.d1("DB")?;
    let rows = query!(
        &db,
        "SELECT * FROM quota_transactions WHERE user_id = ?1 AND message_id = ?2 AND message_id <> '' ORDER BY at DESC, id",
        user_id,
        message_id
    )?;
    read(rows).await
}

/// Sums over one group of entries.
#[derive(Debug, Clone, Deserialize)]
pub struct Sum {
    /// What they have in common: a day, a service, a model, or nothing.
    pub key: String,
    /// The second part of the key where there are two (the model of a day).
    #[serde(default)]
    pub key2: Option<String>,
    /// Generations.
    pub requests: u64,
    /// Prompt tokens.
    pub input: u64,
    /// Completion tokens.
    pub output: u64,
    /// Tokens charged.
    pub charged: u64,
    /// Micro-credits.
    pub cost_micro: u64,
    /// Mean duration, ms.
    pub avg_ms: Option<f64>,
}

/// What entries are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// All in one.
    All,
    /// Feature.
    Service,
    /// Model.
    Model,
    /// Local day.
    Day,
    /// Local day and model.
    DayAndModel,
}

/// Sums of a user's consumption in `[from, to)` (unix ms), one per group.
///
/// # Errors
/// As [`transactions`].
pub async fn sums(
    env: &Env,
    user_id: &str,
    (from, to): (i64, i64),
    model: Option<&str>,
    group: Group,
    offset_ms: i64,
) -> worker::Result<Vec<Sum>> {
    let day = format!("strftime('%Y-%m-%d', (at + {offset_ms}) / 1000, 'unixepoch')");
    let (key, key2) = match group {
        Group::All => ("''".to_owned(), "NULL"),
        Group::Service => ("service".to_owned(), "NULL"),
        Group::Model => ("model".to_owned(), "NULL"),
        Group::Day => (day, "NULL"),
        Group::DayAndModel => (day, "model"),
    };
    let statement = format!(
        "SELECT {key} AS key, {key2} AS key2, count(*) AS requests, sum(input_tokens) AS input, sum(output_tokens) AS output,
          sum(amount) AS charged, sum(cost_micro) AS cost_micro, avg(duration_ms) AS avg_ms
         FROM quota_transactions
         WHERE user_id = ?1 AND quota_type = 'total' AND type = 'consume' AND at >= ?2 AND at < ?3 AND (?4 IS NULL OR model = ?4)
         GROUP BY 1, 2 ORDER BY 1, 2"
    );
    let db = env.d1("DB")?;
    let statement = query!(&db, &statement, user_id, from, to, model)?;
    Ok(read::<Sum>(statement).await?.into_iter().filter(|sum| sum.requests > 0).collect())
}

/// The most expensive generations of a user since `from` (unix ms).
///
/// # Errors
/// As [`transactions`].
pub async fn most_expensive(env: &Env, user_id: &str, from: i64, count: u64) -> worker::Result<Vec<Transaction>> {
    let db = env.d1("DB")?;
    let count = i64::try_from(count).unwrap_or(10);
    let rows = query!(
        &db,
        "SELECT * FROM quota_transactions WHERE user_id = ?1 AND quota_type = 'total' AND type = 'consume' AND at >= ?2
         ORDER BY cost_micro DESC, at DESC LIMIT ?3",
        user_id,
        from,
        count
    )?;
    read(rows).await
}

/// What D1 holds of one period of one type.
#[derive(Debug, Clone, Deserialize)]
pub struct Fold {
    /// Quota type.
    pub quota_type: String,
    /// Period.
    pub period: String,
    /// Consumed less given back, tokens.
    pub used: i64,
    /// Entries.
    pub entries: u64,
}

/// The fold of a user's entries in D1, per type and period of `periods`.
///
/// # Errors
/// As [`transactions`].
pub async fn folds(env: &Env, user_id: &str, periods: &[String]) -> worker::Result<Vec<Fold>> {
    let db = env.d1("DB")?;
    let rows = query!(
        &db,
        "SELECT quota_type, period, count(*) AS entries,
          sum(CASE type WHEN 'consume' THEN amount WHEN 'reset' THEN -amount ELSE 0 END) AS used
         FROM quota_transactions
         WHERE user_id = ?1 AND reason <> 'period_closed' AND period IN (SELECT value FROM json_each(?2)) GROUP BY 1, 2",
        user_id,
        serde_json::to_string(periods)?
    )?;
    read(rows).await
}

/// A notification.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs, reason = "columns of migrations/0002_quota.sql, documented there")]
pub struct Notification {
    pub id: String,
    pub kind: String,
    pub payload: String,
    pub webhook: String,
    pub created_at: i64,
    pub read_at: Option<i64>,
}

/// A user's notifications, newest first.
///
/// # Errors
/// As [`transactions`].
pub async fn notifications(
    env: &Env,
    user_id: &str,
    unread_only: bool,
    limit: u64,
    offset: u64,
) -> worker::Result<Vec<Notification>> {
    let db = env.d1("DB")?;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let rows = query!(
        &db,
        "SELECT id, kind, payload, webhook, created_at, read_at FROM notifications
         WHERE user_id = ?1 AND (?2 = 0 OR read_at IS NULL) ORDER BY created_at DESC, id LIMIT ?3 OFFSET ?4",
        user_id,
        i64::from(unread_only),
        number(limit),
        number(offset)
    )?;
    read(rows).await
}

/// Marks one notification (or all of them) as read; answers how many rows there were to mark.
///
/// # Errors
/// As [`transactions`].
pub async fn mark_read(env: &Env, user_id: &str, id: Option<&str>, now_ms: i64) -> worker::Result<usize> {
    let db = env.d1("DB")?;
    let statement = "UPDATE notifications SET read_at = coalesce(read_at, ?3) WHERE user_id = ?1 AND (?2 IS NULL OR id = ?2)";
    let result = query!(&db, statement, user_id, id, now_ms)?.run().await?;
    Ok(result.meta()?.and_then(|meta| meta.changes).unwrap_or(0))
}

/// A line of the operator's list.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs, reason = "columns of migrations/0002_quota.sql, documented there")]
pub struct UserLine {
    pub user_id: String,
    pub role: String,
    pub suspended: u8,
    pub quotas: String,
    pub used_today: u64,
    pub used_month: u64,
    pub used_total: u64,
    pub last_active_at: i64,
}

/// How the operator's list is sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserOrder {
    /// Last activity first.
    Activity,
    /// Most spent in all first.
    Used,
}

/// A page of the operator's list, and how many users there are.
///
/// # Errors
/// As [`transactions`].
pub async fn users(
    env: &Env,
    order: UserOrder,
    suspended: Option<bool>,
    role: Option<&str>,
    limit: u64,
    offset: u64,
) -> worker::Result<(Vec<UserLine>, u64)> {
    #[derive(Deserialize)]
    struct Count {
        n: u64,
    }
    let db = env.d1("DB")?;
    let order = match order {
        UserOrder::Activity => "last_active_at DESC, user_id",
        UserOrder::Used => "used_total DESC, user_id",
    };
    let condition = "(?1 IS NULL OR suspended = ?1) AND (?2 IS NULL OR role = ?2)";
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let suspended = suspended.map(i64::from);
    let count = query!(&db, &format!("SELECT count(*) AS n FROM quota_users WHERE {condition}"), suspended, role)?;
    let page = format!("SELECT * FROM quota_users WHERE {condition} ORDER BY {order} LIMIT ?3 OFFSET ?4");
    let page = query!(&db, &page, suspended, role, number(limit), number(offset))?;
    let results = db.batch(vec![count, page]).await?;
    let (Some(count), Some(page)) = (results.first(), results.get(1)) else { return Ok((Vec::new(), 0)) };
    Ok((page.results()?, count.results::<Count>()?.first().map_or(0, |count| count.n)))
}

async fn read<T: DeserializeOwned>(statement: D1PreparedStatement) -> worker::Result<Vec<T>> {
    statement.all().await?.results()
}
