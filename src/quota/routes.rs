//! What an author asks of their own quota: `/ai/quota…`, `/ai/usage`, `/ai/notifications…` (contract 2.7, 2.8).
//!
//! Invariant: every ledger and every query is the verified caller's. Reads from D1 first let the caller's own ledger send
//! what it still holds, so that an author sees what they have just done.

use std::future::Future;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use worker::Response;

use super::client::LedgerClient;
use super::reports::{self, Filter, Group};
use super::{Limit, QuotaState, QuotaType, codes, wire};
use crate::error::ApiError;
use crate::platform::request::{Body, Ctx};
use crate::platform::{clock, log, respond};

type Answer = Result<Response, ApiError>;

/// D1 must answer a read within this, ms.
const READ_MS: u64 = 8_000;
/// One day, ms.
const DAY_MS: i64 = 86_400_000;

/// Waits for D1, within a limit; the cause of a failure is logged, never told.
///
/// # Errors
/// 500/5001.
pub(super) async fn from_d1<T>(ctx: &Ctx, read: impl Future<Output = worker::Result<T>>) -> Result<T, ApiError> {
    let failed = |cause: &dyn std::fmt::Display| {
        log::error("quota_read", &ctx.request_id, cause);
        ApiError::database()
    };
    clock::within(READ_MS, read).await.ok_or_else(|| failed(&"no answer in time"))?.map_err(|e| failed(&e))
}

/// `GET /ai/quota?type=`: one quota, the daily one unless asked.
///
/// # Errors
/// 400/1001 for an unknown type; 503 when the ledger is away.
pub async fn one(ctx: Ctx) -> Answer {
    let wanted = quota_type(&ctx, "type")?.unwrap_or(QuotaType::Daily);
    let row = quotas(&ctx).await?.into_iter().find(|(quota_type, _)| *quota_type == wanted);
    let (_, row) = row.ok_or_else(ApiError::internal)?;
    respond::ok(&ctx.request_id, "获取成功", &row)
}

/// `GET /ai/quota/all`: the three quotas as an array, or by type with `?view=map`.
///
/// # Errors
/// 503 when the ledger is away.
pub async fn all(ctx: Ctx) -> Answer {
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
    let states = LedgerClient::of(&ctx.env, caller).quotas().await?;
    Ok(states.iter().map(|state| (state.quota_type, on_wire(ctx, &caller.user_id, state))).collect())
}

pub(super) fn on_wire(ctx: &Ctx, user_id: &str, state: &QuotaState) -> Value {
    wire::user_quota(user_id, state, ctx.config.zone, clock::now_ms())
}

pub(super) fn quota_type(ctx: &Ctx, name: &str) -> Result<Option<QuotaType>, ApiError> {
    ctx.param(name)
        .map(|word| QuotaType::parse(word).ok_or_else(|| ApiError::invalid(name, "必须是 daily、monthly 或 total")))
        .transpose()
}

/// An instant of the query under the first of `names` that is there.
fn instant(ctx: &Ctx, names: [&str; 2], whole_day: bool) -> Result<Option<i64>, ApiError> {
    let Some((name, text)) = names.iter().find_map(|name| ctx.param(name).map(|text| (*name, text))) else { return Ok(None) };
    let wrong = || ApiError::invalid(name, "必须是日期（2026-11-23）、RFC 3339 时间或毫秒时间戳");
    ctx.config.zone.instant(text, whole_day).map(Some).ok_or_else(wrong)
}

/// `GET /ai/quota/transactions`: newest first; by `limit`/`offset` or `page`/`pageSize`; `after=<id>` goes on stably.
///
/// # Errors
/// 400/1001 naming the parameter; 500/5001.
pub async fn transactions(ctx: Ctx) -> Answer {
    let caller = ctx.caller()?;
    // The contract's `type` is the movement's; a quota type under that name is understood, too.
    let by_type = ctx.param("type").and_then(QuotaType::parse);
    let filter = Filter {
        user_id: &caller.user_id,
        kind: ctx.param("type").filter(|_| by_type.is_none()),
        quota_type: quota_type(&ctx, "quotaType")?.or(by_type).map(QuotaType::as_str),
        service: ctx.param("service"),
        model: ctx.param("model"),
        from: instant(&ctx, ["from", "startDate"], false)?,
        to: instant(&ctx, ["to", "endDate"], true)?,
        after: ctx.param("after"),
    };
    if filter.kind.is_some_and(|kind| !["consume", "recharge", "reset", "restore"].contains(&kind)) {
        return Err(ApiError::invalid("type", "必须是 consume、recharge、reset、restore，或 daily、monthly、total"));
    }
    let paged = ctx.page()?;
    let (limit, offset) = match paged {
        Some((page, size)) => (size, (page - 1) * size),
        None => (ctx.number("limit", 20, 1..=1_000)?, ctx.number("offset", 0, 0..=10_000_000)?),
    };
    let _ = LedgerClient::of(&ctx.env, caller).flush().await;
    let (rows, total) = from_d1(&ctx, reports::transactions(&ctx.env, &filter, limit, offset)).await?;
    let rows: Vec<Value> = rows.iter().map(|row| wire::transaction(row, ctx.config.zone)).collect();
    match paged {
        Some((page, size)) => respond::page(&ctx.request_id, rows, total, page, size),
        None => respond::ok(&ctx.request_id, "获取成功", &json!(rows)),
    }
}

/// `GET /ai/quota/statistics`: sums over the types, by service, by model, the last 30 days, the dearest answers.
///
/// # Errors
/// 503 when the ledger is away; 500/5001.
pub async fn statistics(ctx: Ctx) -> Answer {
    let caller = ctx.caller()?;
    let ledger = LedgerClient::of(&ctx.env, caller);
    let _ = ledger.flush().await;
    let states = ledger.quotas().await?;
    let (user_id, now_ms, offset_ms) = (&caller.user_id, clock::now_ms(), ctx.config.zone.offset_ms());
    let (ever, month) = ((0, now_ms + DAY_MS), (now_ms - 30 * DAY_MS, now_ms + DAY_MS));
    let sums = |span, group| reports::sums(&ctx.env, user_id, span, None, group, offset_ms);
    let services = from_d1(&ctx, sums(ever, Group::Service)).await?;
    let models = from_d1(&ctx, sums(ever, Group::Model)).await?;
    let days = from_d1(&ctx, sums(month, Group::Day)).await?;
    let dearest = from_d1(&ctx, reports::most_expensive(&ctx.env, user_id, month.0, 10)).await?;
    let everything = Filter { user_id, ..Filter::default() };
    let (_, total_transactions) = from_d1(&ctx, reports::transactions(&ctx.env, &everything, 1, 0)).await?;
    let limit = |state: &QuotaState| if let Limit::Tokens(tokens) = state.limit { tokens } else { 0 };
    let total: u64 = states.iter().map(limit).sum();
    let used: u64 = states.iter().map(|state| state.used).sum();
    let reserved: u64 = states.iter().map(|state| state.reserved).sum();
    let by = |pick: fn(&reports::Sum) -> u64, sums: &[reports::Sum]| -> Value {
        Value::Object(sums.iter().map(|sum| (sum.key.clone(), pick(sum).into())).collect())
    };
    let month_charged: u64 = days.iter().map(|day| day.charged).sum();
    let by_type: Map<String, Value> =
        states.iter().map(|state| (state.quota_type.as_str().to_owned(), state.used.into())).collect();
    let left = |state: &QuotaState| limit(state).saturating_sub(state.used + state.reserved);
    let data = json!({
        "userId": user_id,
        "totalQuota": total, "usedQuota": used, "reservedQuota": reserved,
        "remainingQuota": states.iter().map(left).sum::<u64>(),
        "usagePercentage": if total == 0 { 0.0 } else { (used as f64 * 10_000.0 / total as f64).round() / 100.0 },
        "totalTransactions": total_transactions,
        "dailyAverage": month_charged / 30,
        "quotaByType": by_type,
        "quotaByService": by(|sum| sum.charged, &services),
        "quotaByModel": by(|sum| sum.charged, &models),
        "costByService": by(|sum| sum.cost_micro, &services),
        "costMicro": services.iter().map(|sum| sum.cost_micro).sum::<u64>(),
        "daily": days.iter().map(|day| with_key(day, "date")).collect::<Vec<_>>(),
        "mostExpensive": dearest.iter().map(|row| wire::transaction(row, ctx.config.zone)).collect::<Vec<_>>(),
    });
    respond::ok(&ctx.request_id, "获取成功", &data)
}

fn with_key(sum: &reports::Sum, name: &str) -> Value {
    let mut row = wire::sum(sum);
    if let Some(fields) = row.as_object_mut() {
        fields.insert(name.to_owned(), sum.key.clone().into());
        if let Some(model) = &sum.key2 {
            fields.insert("model".to_owned(), model.clone().into());
        }
    }
    row
}

/// `GET /ai/usage?startDate&endDate&model&groupBy=`: what was used and what it cost.
///
/// # Errors
/// 400/1001 naming the parameter; 500/5001.
pub async fn usage(ctx: Ctx) -> Answer {
    let caller = ctx.caller()?;
    let now_ms = clock::now_ms();
    let to = instant(&ctx, ["endDate", "to"], true)?.unwrap_or(now_ms + DAY_MS);
    let from = instant(&ctx, ["startDate", "from"], false)?.unwrap_or(now_ms - 30 * DAY_MS);
    if from >= to {
        return Err(ApiError::invalid("startDate", "必须早于 endDate"));
    }
    let group = match ctx.param("groupBy").or_else(|| ctx.param("group")) {
        None | Some("day") => Group::DayAndModel,
        Some("model") => Group::Model,
        Some("service") => Group::Service,
        Some(_) => return Err(ApiError::invalid("groupBy", "必须是 day、model 或 service")),
    };
    let _ = LedgerClient::of(&ctx.env, caller).flush().await;
    let sums =
        |group| reports::sums(&ctx.env, &caller.user_id, (from, to), ctx.param("model"), group, ctx.config.zone.offset_ms());
    let all = from_d1(&ctx, sums(Group::All)).await?;
    let services = from_d1(&ctx, sums(Group::Service)).await?;
    let rows = from_d1(&ctx, sums(group)).await?;
    let none = reports::Sum {
        key: String::new(),
        key2: None,
        requests: 0,
        input: 0,
        output: 0,
        charged: 0,
        cost_micro: 0,
        avg_ms: None,
    };
    let key = match group {
        Group::Model => "model",
        Group::Service => "service",
        _ => "date",
    };
    let row = |sum: &reports::Sum| {
        let mut row = with_key(sum, key);
        if let Some(fields) = row.as_object_mut() {
            fields.insert("provider".to_owned(), crate::config::PROVIDER.into());
        }
        row
    };
    let rows: Vec<Value> = rows.iter().map(row).collect();
    let by_service: Map<String, Value> = services.iter().map(|sum| (sum.key.clone(), wire::sum(sum))).collect();
    let mut data = json!({"summary": wire::sum(all.first().unwrap_or(&none)), "byService": by_service, "daily": []});
    if let Some(fields) = data.as_object_mut() {
        let name = if key == "date" { "daily" } else { "groups" };
        fields.insert(name.to_owned(), rows.into());
    }
    respond::ok(&ctx.request_id, "获取成功", &data)
}

/// `GET /ai/quota/explain?messageId=`: why one answer cost what it did.
///
/// # Errors
/// 400/1001 without an id; 404 when nothing was charged for it.
pub async fn explain(ctx: Ctx) -> Answer {
    let caller = ctx.caller()?;
    let message_id = ctx.param("messageId").ok_or_else(|| ApiError::invalid("messageId", "不能为空"))?;
    let _ = LedgerClient::of(&ctx.env, caller).flush().await;
    let rows = from_d1(&ctx, reports::of_message(&ctx.env, &caller.user_id, message_id)).await?;
    let first = rows.iter().find(|row| row.quota_type == "total").or_else(|| rows.first());
    let first = first.ok_or_else(|| ApiError::not_found("该回复的计费记录"))?;
    let (price_in, price_out) = first.price_version.split_once('/').unwrap_or(("0", "0"));
    let price = |micro: &str| micro.parse::<u64>().unwrap_or(0);
    let data = json!({
        "messageId": message_id, "requestId": first.request_id, "holdId": first.hold_id,
        "model": first.model, "service": first.service, "reason": first.reason,
        "inputTokens": first.input_tokens, "outputTokens": first.output_tokens,
        "reasoningTokens": first.reasoning_tokens, "cachedTokens": first.cached_tokens,
        "charged": first.amount, "writtenOff": first.written_off, "estimated": first.estimated != 0,
        "price": {"inputMicroPer1k": price(price_in), "outputMicroPer1k": price(price_out), "version": first.price_version},
        "costMicro": first.cost_micro, "cost": wire::credits(first.cost_micro),
        "explanation": wire::describe(first),
        "formula": "costMicro = ⌈(输入 × 输入单价 + 输出 × 输出单价) ÷ 1000⌉",
        "transactions": rows.iter().map(|row| wire::transaction(row, ctx.config.zone)).collect::<Vec<_>>(),
    });
    respond::ok(&ctx.request_id, "获取成功", &data)
}

/// `POST /ai/quota/redeem` `{code}`: uses a code, once.
///
/// # Errors
/// 429/4000 after too many wrong codes; 404 for a wrong, void, expired or used-up code; 409/1006 for one already used.
pub async fn redeem(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    struct Redeem {
        code: String,
    }
    let Body { value: Redeem { code }, .. } = ctx.body::<Redeem>().await?;
    let code = code.trim().to_uppercase();
    if code.is_empty() || code.len() > 64 {
        return Err(ApiError::invalid("code", "长度必须在 1 到 64 个字符之间"));
    }
    let caller = ctx.caller()?;
    let ledger = LedgerClient::of(&ctx.env, caller);
    ledger.try_code().await?;
    let wrong = || ApiError::not_found("可用的兑换码");
    if !from_d1(&ctx, codes::redeem(&ctx.env, &code, &caller.user_id, clock::now_ms())).await? {
        return Err(wrong());
    }
    let found = from_d1(&ctx, codes::find(&ctx.env, &code)).await?.ok_or_else(wrong)?;
    let order_id = format!("code:{code}:{}", caller.user_id);
    let credited = ledger.recharge(&order_id, found.amount, found.quota_type, "兑换码").await?;
    if credited.repeated {
        return Err(ApiError::conflict("您已使用过该兑换码"));
    }
    let data = json!({
        "quota": on_wire(&ctx, &caller.user_id, &credited.quota),
        "transaction": wire::entry(&caller.user_id, &credited.entry, ctx.config.zone),
    });
    respond::ok(&ctx.request_id, "操作成功", &data)
}

/// `GET /ai/notifications?unread=true`: newest first.
///
/// # Errors
/// 400/1001 naming the parameter; 500/5001.
pub async fn notifications(ctx: Ctx) -> Answer {
    let caller = ctx.caller()?;
    let (limit, offset) = (ctx.number("limit", 20, 1..=200)?, ctx.number("offset", 0, 0..=1_000_000)?);
    let _ = LedgerClient::of(&ctx.env, caller).flush().await;
    let unread = ctx.param("unread") == Some("true");
    let rows = from_d1(&ctx, reports::notifications(&ctx.env, &caller.user_id, unread, limit, offset)).await?;
    let rows: Vec<Value> = rows.iter().map(|row| wire::notification(row, ctx.config.zone)).collect();
    respond::ok(&ctx.request_id, "获取成功", &json!(rows))
}

/// `POST /ai/notifications/:notification/read`: marks one as read.
///
/// # Errors
/// 404 for an unknown one.
pub async fn read_one(ctx: Ctx) -> Answer {
    let id = ctx.params.first().cloned().unwrap_or_default();
    let marked = from_d1(&ctx, reports::mark_read(&ctx.env, &ctx.caller()?.user_id, Some(&id), clock::now_ms())).await?;
    if marked == 0 {
        return Err(ApiError::not_found("通知"));
    }
    respond::ok(&ctx.request_id, "操作成功", &json!({"marked": marked}))
}

/// `POST /ai/notifications/read`: marks all as read.
///
/// # Errors
/// 500/5001.
pub async fn read_all(ctx: Ctx) -> Answer {
    let marked = from_d1(&ctx, reports::mark_read(&ctx.env, &ctx.caller()?.user_id, None, clock::now_ms())).await?;
    respond::ok(&ctx.request_id, "操作成功", &json!({"marked": marked}))
}
