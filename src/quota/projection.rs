//! The ledger's copy in D1: what lists and statistics read. Fed by the outbox, never asked for admission.
//!
//! Invariant: rows are inserted by entry id and never changed, so that a batch may be sent any number of times.

use serde::Serialize;
use worker::{Env, query};

use super::books::Entry;

/// Entries per statement; they travel as one JSON parameter.
pub const BATCH: i64 = 200;

const INSERT: &str = "INSERT OR IGNORE INTO quota_transactions
 (id, user_id, quota_type, period, type, amount, before_balance, after_balance, service, model, request_id, message_id, hold_id,
  input_tokens, output_tokens, reasoning_tokens, cached_tokens, estimated, hostile, cost_micro, price_version, written_off, reason, at)
 SELECT value ->> 'id', ?1, value ->> 'quota_type', value ->> 'period', value ->> 'kind', value ->> 'amount', value ->> 'before',
  value ->> 'after', value ->> 'service', value ->> 'model', value ->> 'request_id', value ->> 'message_id', value ->> 'hold_id',
  value ->> '$.usage.input', value ->> '$.usage.output', value ->> '$.usage.reasoning', value ->> '$.usage.cached',
  value ->> '$.usage.estimated', value ->> '$.usage.hostile', value ->> 'cost_micro', value ->> 'price_version',
  value ->> 'written_off', value ->> 'reason', value ->> 'at'
 FROM json_each(?2)";

/// Copies `entries` of one user into D1.
///
/// # Errors
/// When D1 refuses or is away; the cause is for the log.
pub async fn insert(env: &Env, user_id: &str, entries: &[Entry]) -> worker::Result<()> {
    #[derive(Serialize)]
    #[serde(transparent)]
    struct Rows<'a>(&'a [Entry]);
    let db = env.d1("DB")?;
    let rows = serde_json::to_string(&Rows(entries))?;
    query!(&db, INSERT, user_id, rows)?.run().await.map(|_| ())
}
