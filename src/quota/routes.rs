//! `GET /ai/quota`, `/ai/quota/all` (contract 2.7).

use serde_json::{Map, Value};
use worker::Response;

use super::client::LedgerClient;
use super::{QuotaType, wire};
use crate::error::ApiError;
use crate::platform::request::Ctx;
use crate::platform::{clock, respond};

/// `GET /ai/quota?type=`: one quota, the daily one unless asked.
///
/// # Errors
/// 400/1001 for an unknown type; 503 when the ledger is away.
pub async fn one(ctx: Ctx) -> Result<Response, ApiError> {
    let word = ctx.param("type").unwrap_or("daily");
    let wanted = QuotaType::parse(word).ok_or_else(|| ApiError::invalid("type", "必须是 daily、monthly 或 total"))?;
    let row = quotas(&ctx).await?.into_iter().find(|(quota_type, _)| *quota_type == wanted);
    let (_, row) = row.ok_or_else(ApiError::internal)?;
    respond::ok(&ctx.request_id, "获取成功", &row)
}

/// `GET /ai/quota/all`: the three quotas as an array, or by type with `?view=map`.
///
/// # Errors
/// 503 when the ledger is away.
pub async fn all(ctx: Ctx) -> Result<Response, ApiError> {
    let rows = quotas(&ctx).await?;
    let data = if ctx.param("view") == Some("map") {
        Value::Object(rows.into_iter().map(|(quota_type, row)| (quota_type.as_str().to_owned(), row)).collect::<Map<_, _>>())
    } else {
        Value::Array(rows.into_iter().map(|(_, row)| row).collect())
    };
    respond::ok(&ctx.request_id, "获取成功", &data)
}

async fn quotas(ctx: &Ctx) -> Result<Vec<(QuotaType, Value)>, ApiError> {
    let caller = ctx.caller()?;
    let now_ms = clock::now_ms();
    let states = LedgerClient::of(&ctx.env, caller).quotas().await?;
    let row = |state: &super::QuotaState| wire::user_quota(&caller.user_id, state, ctx.config.zone, now_ms);
    Ok(states.iter().map(|state| (state.quota_type, row(state))).collect())
}
