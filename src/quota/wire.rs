//! Quotas, transactions and notifications as the wire has them (contract 2.7): the specification's keys and the web
//! client's aliases.
//!
//! PURE.

use serde_json::{Value, json};

use super::Limit;
use super::books::Entry;
use super::ledger::OUTPUT_TOKENS_MIN;
use super::period::Zone;
use super::reports::{Notification, Sum, Transaction, UserLine};
use super::{Estimate, QuotaState, SAFE_INTEGER_MAX};

/// One quota as JSON. Unlimited reads as 0 of 0 with `unlimited: true`.
#[must_use]
pub fn user_quota(user_id: &str, quota: &QuotaState, zone: Zone, now_ms: i64) -> Value {
    let (total, unlimited) = match quota.limit {
        Limit::Tokens(tokens) => (tokens, false),
        Limit::Unlimited => (0, true),
    };
    let remaining = total.saturating_sub(quota.used.saturating_add(quota.reserved));
    let status = match () {
        () if quota.suspended => "suspended",
        () if !unlimited && quota.used >= total => "exhausted",
        () => "active",
    };
    let reset_at = quota.resets_at.map(|at| zone.rfc3339(at));
    let days_open = now_ms.saturating_sub(quota.created_at).max(0) / 86_400_000 + 1;
    let average = quota.used / u64::try_from(days_open).unwrap_or(1).max(1);
    let id = format!("{user_id}:{}", quota.quota_type.as_str());
    json!({
        "id": id, "quotaId": id,
        "userId": user_id,
        "quotaType": quota.quota_type,
        "totalQuota": total.min(SAFE_INTEGER_MAX),
        "usedQuota": quota.used,
        "reservedQuota": quota.reserved,
        "remainingQuota": remaining,
        "unlimited": unlimited,
        "status": status, "isActive": status == "active",
        "resetAt": reset_at, "resetDate": reset_at,
        "metadata": {
            "userRole": quota.role,
            "membershipLevel": quota.role,
            "lastConsumedAt": quota.last_consumed_at.map(|at| zone.rfc3339(at)),
            "totalConsumptions": quota.consumptions,
            "averagePerDay": average,
        },
        "createdAt": zone.rfc3339(quota.created_at),
        "updatedAt": zone.rfc3339(quota.last_consumed_at.unwrap_or(quota.updated_at).max(quota.updated_at)),
    })
}

/// One transaction as JSON.
#[must_use]
pub fn transaction(row: &Transaction, zone: Zone) -> Value {
    let at = zone.rfc3339(row.at);
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    json!({
        "id": row.id,
        "userId": row.user_id,
        "quotaType": row.quota_type,
        "period": row.period,
        "amount": row.amount,
        "type": row.r#type,
        "service": row.service,
        "model": some(&row.model),
        "requestId": some(&row.request_id),
        "messageId": some(&row.message_id),
        "holdId": some(&row.hold_id),
        "description": describe(row),
        "reason": row.reason,
        "beforeBalance": row.before_balance, "balanceBefore": row.before_balance,
        "afterBalance": row.after_balance, "balanceAfter": row.after_balance,
        "inputTokens": row.input_tokens, "outputTokens": row.output_tokens,
        "reasoningTokens": row.reasoning_tokens, "cachedTokens": row.cached_tokens,
        "costMicro": row.cost_micro, "priceVersion": some(&row.price_version),
        "writtenOff": row.written_off,
        "estimated": row.estimated != 0, "flagged": row.hostile != 0,
        "durationMs": row.duration_ms,
        "timestamp": at, "createdAt": at,
    })
}

/// A line of the books that may not be in D1 yet, as a transaction.
#[must_use]
pub fn entry(user_id: &str, entry: &Entry, zone: Zone) -> Value {
    transaction(&Transaction::of(user_id, entry), zone)
}

/// Why a transaction is what it is, for its author.
#[must_use]
pub fn describe(row: &Transaction) -> String {
    let ended = match row.reason.as_str() {
        "finish" => "正常完成",
        "stop" => "由您停止，按已生成内容计费",
        "time" => "到达同步等待时限，按已生成内容计费",
        "provider_error" => "AI服务中途出错，按已收到内容计费",
        "stall" => "AI服务停止响应，按已收到内容计费",
        "cut" => "AI服务中断，按已收到内容计费",
        "interrupted" => "服务重启，按已保存内容计费",
        "period_closed" => return format!("周期 {} 结束，共使用 {} tokens", row.period, row.amount),
        _ if row.r#type == "recharge" => return format!("充值 {} tokens：{}", row.amount, row.reason),
        _ if row.r#type == "reset" => return format!("管理员重置，退回 {} tokens", row.amount),
        other => other,
    };
    let counted = if row.estimated != 0 { "（模型未上报用量，按估算）" } else { "" };
    let off = if row.written_off > 0 { format!("，其中 {} tokens 未计费", row.written_off) } else { String::new() };
    format!("{ended}：输入 {} + 输出 {} tokens{counted}{off}", row.input_tokens, row.output_tokens)
}

/// A notification as JSON.
#[must_use]
pub fn notification(row: &Notification, zone: Zone) -> Value {
    let payload: Value = serde_json::from_str(&row.payload).unwrap_or_default();
    let text = |key: &str| payload.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = match text("quotaType").as_str() {
        "daily" => "今日",
        "monthly" => "本月",
        _ => "总",
    };
    let message = match text("level").as_str() {
        "warning" => format!("{kind}AI配额剩余不足 20%"),
        "critical" => format!("{kind}AI配额剩余不足 10%"),
        _ => format!("{kind}AI配额已用尽，服务已暂停"),
    };
    json!({
        "id": row.id, "type": row.kind, "message": message, "payload": payload, "webhook": row.webhook,
        "read": row.read_at.is_some(), "readAt": row.read_at.map(|at| zone.rfc3339(at)), "createdAt": zone.rfc3339(row.created_at),
    })
}

/// Micro-credits as credits: for display only, the integers are `costMicro`.
#[must_use]
pub fn credits(cost_micro: u64) -> f64 {
    cost_micro as f64 / 1e6
}

/// A sum in the shape of a usage row (contract 2.8).
#[must_use]
pub fn sum(sum: &Sum) -> Value {
    json!({
        "requests": sum.requests,
        "tokens": {"input": sum.input, "output": sum.output, "total": sum.input + sum.output},
        "charged": sum.charged,
        "cost": credits(sum.cost_micro), "costMicro": sum.cost_micro,
        "avgResponseTime": sum.avg_ms.unwrap_or(0.0).round(),
    })
}

/// A line of the operator's list.
#[must_use]
pub fn user_line(row: &UserLine, zone: Zone) -> Value {
    json!({
        "userId": row.user_id, "role": row.role, "suspended": row.suspended != 0,
        "usedToday": row.used_today, "usedMonth": row.used_month, "usedTotal": row.used_total,
        "lastActiveAt": zone.rfc3339(row.last_active_at),
    })
}

/// What a generation would hold and at most cost, and whether it fits. The output a hold is clamped to is shown, too.
#[must_use]
pub fn quote(estimate: &Estimate, quotas: &[QuotaState]) -> Value {
    let free = |quota: &QuotaState| quota.limit.left(quota.used.saturating_add(quota.reserved));
    let least = quotas.iter().map(free).min().unwrap_or(0);
    let suspended = quotas.iter().any(|quota| quota.suspended);
    let output = estimate.output_tokens.min(least.saturating_sub(estimate.prompt_tokens));
    let fits = !suspended && output > 0 && output >= OUTPUT_TOKENS_MIN.min(estimate.output_tokens);
    let cost_micro = estimate.price.cost_micro(estimate.prompt_tokens, if fits { output } else { estimate.output_tokens });
    let held = estimate.prompt_tokens + if fits { output } else { estimate.output_tokens };
    json!({
        "model": estimate.model,
        "promptTokens": estimate.prompt_tokens, "maxOutputTokens": estimate.output_tokens,
        "grantedOutputTokens": if fits { output } else { 0 },
        "holdTokens": held, "maxCostMicro": cost_micro, "maxCost": credits(cost_micro),
        "fits": fits, "clamped": fits && output < estimate.output_tokens, "suspended": suspended,
        "remaining": quotas.iter().map(|quota| (quota.quota_type.as_str().to_owned(), free(quota).into())).collect::<serde_json::Map<_, _>>(),
    })
}
