//! Redemption codes: made in batches by administrators, used by authors. D1 is their authority: one statement decides.
//!
//! Invariant: a code is used at most `uses` times and at most once by each user; the credit follows by an order id made of
//! the code, so that a redemption that was cut between the two is finished by trying again, and credits once.

use serde::Deserialize;
use worker::{Env, query};

use super::QuotaType;

/// A code as its administrators see it.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs, reason = "columns of migrations/0002_quota.sql, documented there")]
pub struct Code {
    pub code: String,
    pub amount: u64,
    pub quota_type: QuotaType,
    pub uses: u64,
    pub used: u64,
    pub expires_at: Option<i64>,
    pub voided_at: Option<i64>,
    pub created_by: String,
    pub created_at: i64,
}

/// What a batch of codes is made with.
pub struct Batch<'a> {
    /// The codes.
    pub codes: &'a [String],
    /// Tokens each.
    pub amount: u64,
    /// Which limit.
    pub quota_type: QuotaType,
    /// Uses each.
    pub uses: u64,
    /// Unix ms.
    pub expires_at: Option<i64>,
    /// The administrator.
    pub created_by: &'a str,
    /// Unix ms.
    pub created_at: i64,
}

const LIST: &str = "SELECT c.*, (SELECT count(*) FROM quota_redemptions r WHERE r.code = c.code) AS used FROM quota_codes c";

/// Writes a batch.
///
/// # Errors
/// When D1 refuses or is away.
pub async fn create(env: &Env, batch: &Batch<'_>) -> worker::Result<()> {
    let db = env.d1("DB")?;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    query!(
        &db,
        "INSERT INTO quota_codes (code, amount, quota_type, uses, expires_at, created_by, created_at)
         SELECT value, ?2, ?3, ?4, ?5, ?6, ?7 FROM json_each(?1)",
        serde_json::to_string(batch.codes)?,
        number(batch.amount),
        batch.quota_type.as_str(),
        number(batch.uses),
        batch.expires_at,
        batch.created_by,
        batch.created_at
    )?
    .run()
    .await
    .map(|_| ())
}

/// Codes, newest first.
///
/// # Errors
/// As [`create`].
pub async fn list(env: &Env, limit: u64, offset: u64) -> worker::Result<Vec<Code>> {
    let db = env.d1("DB")?;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let statement = format!("{LIST} ORDER BY created_at DESC, code LIMIT ?1 OFFSET ?2");
    query!(&db, &statement, number(limit), number(offset))?.all().await?.results()
}

/// One code.
///
/// # Errors
/// As [`create`].
pub async fn find(env: &Env, code: &str) -> worker::Result<Option<Code>> {
    let db = env.d1("DB")?;
    let found: Vec<Code> = query!(&db, &format!("{LIST} WHERE c.code = ?1"), code)?.all().await?.results()?;
    Ok(found.into_iter().next())
}

/// Makes a code worthless; what it credited stays.
///
/// # Errors
/// As [`create`].
pub async fn void(env: &Env, code: &str, now_ms: i64) -> worker::Result<()> {
    let db = env.d1("DB")?;
    query!(&db, "UPDATE quota_codes SET voided_at = coalesce(voided_at, ?2) WHERE code = ?1", code, now_ms)?
        .run()
        .await
        .map(|_| ())
}

/// Uses a code for `user_id`, if it is good; answers whether this user has used it, now or earlier.
///
/// # Errors
/// As [`create`].
pub async fn redeem(env: &Env, code: &str, user_id: &str, now_ms: i64) -> worker::Result<bool> {
    #[derive(Deserialize)]
    struct Mine {
        n: u64,
    }
    let db = env.d1("DB")?;
    let take = query!(
        &db,
        "INSERT INTO quota_redemptions (code, user_id, at)
         SELECT code, ?2, ?3 FROM quota_codes WHERE code = ?1 AND voided_at IS NULL AND (expires_at IS NULL OR expires_at > ?3)
          AND (SELECT count(*) FROM quota_redemptions r WHERE r.code = ?1) < uses
         ON CONFLICT (code, user_id) DO NOTHING",
        code,
        user_id,
        now_ms
    )?;
    let mine = query!(&db, "SELECT count(*) AS n FROM quota_redemptions WHERE code = ?1 AND user_id = ?2", code, user_id)?;
    let results = db.batch(vec![take, mine]).await?;
    let mine = results.get(1).map(|result| result.results::<Mine>()).transpose()?.unwrap_or_default();
    Ok(mine.first().is_some_and(|mine| mine.n > 0))
}
