//! The ledger's copy in D1: what lists and statistics read. Fed by the outbox, never asked for admission.
//!
//! Invariant: entries and notices are inserted by their ids and never changed, so that a batch may be sent any number of
//! times; a row that breaks any other rule fails its whole batch, which then waits, instead of vanishing. A user's line is
//! only replaced by a newer one.

use worker::{D1Database, D1PreparedStatement, Env, query};

use super::books::{Entry, Notice};
use super::{QuotaState, QuotaType};

/// Parcels per statement; they travel as one JSON parameter.
pub const BATCH: i64 = 200;

const INSERT_ENTRIES: &str = "INSERT INTO quota_transactions
 (id, user_id, quota_type, period, type, amount, before_balance, after_balance, service, model, request_id, message_id, hold_id,
  input_tokens, output_tokens, reasoning_tokens, cached_tokens, estimated, hostile, cost_micro, price_version, written_off, reason,
  duration_ms, at)
 SELECT ?1 || '/' || (value ->> 'id'), ?1, value ->> 'quota_type', value ->> 'period', value ->> 'kind', value ->> 'amount',
  value ->> 'before', value ->> 'after', value ->> 'service', value ->> 'model', value ->> 'request_id', value ->> 'message_id',
  value ->> 'hold_id', value ->> '$.usage.input', value ->> '$.usage.output', value ->> '$.usage.reasoning',
  value ->> '$.usage.cached', value ->> '$.usage.estimated', value ->> '$.usage.hostile', value ->> 'cost_micro',
  value ->> 'price_version', value ->> 'written_off', value ->> 'reason', value ->> 'duration_ms', value ->> 'at'
 FROM json_each(?2) WHERE true ON CONFLICT (id) DO NOTHING";

const INSERT_NOTICES: &str = "INSERT INTO notifications (user_id, id, kind, payload, created_at)
 SELECT ?1, value ->> 'id', 'quota', json_set(value ->> 'crossing', '$.period', value ->> 'period'), value ->> 'at' FROM json_each(?2)
 WHERE true ON CONFLICT (user_id, id) DO NOTHING";

const UPSERT_USER: &str = "INSERT INTO quota_users
 (user_id, role, suspended, quotas, used_today, used_month, used_total, last_active_at, updated_at)
 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
 ON CONFLICT (user_id) DO UPDATE SET role = ?2, suspended = ?3, quotas = ?4, used_today = ?5, used_month = ?6, used_total = ?7,
  last_active_at = max(last_active_at, ?8), updated_at = ?9 WHERE updated_at <= ?9";

/// Copies a user's entries, notices and line of the operator's list into D1, all or none, in one call.
///
/// # Errors
/// When D1 refuses or is away; the cause is for the log.
pub async fn insert(
    env: &Env,
    user_id: &str,
    entries: &[Entry],
    notices: &[Notice],
    quotas: &[QuotaState],
    now_ms: i64,
) -> worker::Result<()> {
    let db = env.d1("DB")?;
    let mut statements: Vec<D1PreparedStatement> = Vec::with_capacity(3);
    if !entries.is_empty() {
        statements.push(query!(&db, INSERT_ENTRIES, user_id, serde_json::to_string(entries)?)?);
    }
    if !notices.is_empty() {
        statements.push(query!(&db, INSERT_NOTICES, user_id, serde_json::to_string(notices)?)?);
    }
    statements.extend(upsert_user(&db, user_id, quotas, now_ms)?);
    db.batch(statements).await.map(|_| ())
}

/// Writes a user's line of the operator's list; nothing before the account is open.
fn upsert_user(
    db: &D1Database,
    user_id: &str,
    quotas: &[QuotaState],
    now_ms: i64,
) -> worker::Result<Option<D1PreparedStatement>> {
    let Some(first) = quotas.first() else { return Ok(None) };
    let used = |quota_type: QuotaType| {
        let quota = quotas.iter().find(|quota| quota.quota_type == quota_type);
        i64::try_from(quota.map_or(0, |quota| quota.used)).unwrap_or(i64::MAX)
    };
    let active = quotas.iter().filter_map(|quota| quota.last_consumed_at).max().unwrap_or(first.updated_at);
    query!(
        db,
        UPSERT_USER,
        user_id,
        first.role.as_str(),
        i64::from(first.suspended),
        serde_json::to_string(quotas)?,
        used(QuotaType::Daily),
        used(QuotaType::Monthly),
        used(QuotaType::Total),
        active,
        now_ms
    )
    .map(Some)
}

/// Notes on a notification how its webhook went: `delivered` or `failed`.
///
/// # Errors
/// As [`insert`].
pub async fn webhook_state(env: &Env, user_id: &str, id: &str, state: &str) -> worker::Result<()> {
    let db = env.d1("DB")?;
    query!(&db, "UPDATE notifications SET webhook = ?3 WHERE user_id = ?1 AND id = ?2", user_id, id, state)?
        .run()
        .await
        .map(|_| ())
}

const CLOSE_PERIODS: &str = "INSERT INTO quota_transactions
 (id, user_id, quota_type, period, type, amount, before_balance, after_balance, service, model, request_id, message_id, hold_id,
  input_tokens, output_tokens, reasoning_tokens, cached_tokens, estimated, hostile, cost_micro, price_version, written_off, reason,
  duration_ms, at)
 SELECT user_id || '/period:' || quota_type || ':' || period, user_id, quota_type, period, 'reset',
  sum(CASE type WHEN 'consume' THEN amount WHEN 'reset' THEN -amount ELSE 0 END), 0, 0, 'system', '', '', '', '',
  0, 0, 0, 0, 0, 0, 0, '', 0, 'period_closed', 0, ?3
 FROM quota_transactions AS t
 WHERE quota_type = ?1 AND period < ?2 AND reason <> 'period_closed'
  AND NOT EXISTS (SELECT 1 FROM quota_transactions c WHERE c.id = t.user_id || '/period:' || t.quota_type || ':' || t.period)
 GROUP BY user_id, period
 LIMIT 500
 ON CONFLICT (id) DO NOTHING";

/// Writes the reset entries of every period of `quota_type` that ended before `period` began, each once; answers how many.
///
/// # Errors
/// As [`insert`].
pub async fn close_periods(env: &Env, quota_type: QuotaType, period: &str, now_ms: i64) -> worker::Result<usize> {
    let db = env.d1("DB")?;
    let result = query!(&db, CLOSE_PERIODS, quota_type.as_str(), period, now_ms)?.run().await?;
    Ok(result.meta()?.and_then(|meta| meta.changes).unwrap_or(0))
}
