//! `UserQuota` as the wire has it (contract 2.7): the specification's keys and the web client's aliases.
//!
//! PURE.

use serde_json::{Value, json};

use super::Limit;
use super::period::Zone;
use super::{QuotaState, SAFE_INTEGER_MAX};

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
