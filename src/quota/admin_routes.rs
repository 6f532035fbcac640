//! What administrators and signed services do to users' quotas: recharge, `/admin/quota…`, `/admin/quota-codes…`
//! (contract 2.7).
//!
//! Invariant: the router has checked the administrator's role or the service's signature before anything here runs, so an
//! ordinary user gets 403 before validation, and nobody credits himself.

use serde::Deserialize;
use serde_json::{Value, json};
use worker::Response;

use super::client::LedgerClient;
use super::codes::{self, Batch, Code};
use super::reports::{self, UserOrder};
use super::routes::{from_d1, on_wire};
use super::{Governance, QuotaState, QuotaType, SAFE_INTEGER_MAX, wire};
use crate::error::ApiError;
use crate::identity::{Role, is_user_id};
use crate::platform::request::{Body, Ctx};
use crate::platform::{clock, ids, respond};

type Answer = Result<Response, ApiError>;

/// Longest order id, bytes.
const ORDER_BYTES_MAX: usize = 128;
/// Most codes of one batch.
const CODES_MAX: u64 = 1_000;
/// Letters of a code: none that reads like another.
const CODE_LETTERS: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Recharge {
    user_id: String,
    amount: u64,
    order_id: String,
    #[serde(default)]
    quota_type: Option<QuotaType>,
    #[serde(default)]
    reason: Option<String>,
}

/// `POST /ai/quota/recharge`: credits an order once.
///
/// # Errors
/// 400/1001 naming the field; 409/1006 for an order that was made for something else.
pub async fn recharge(mut ctx: Ctx) -> Answer {
    let Body { value: order, .. } = ctx.body_naming_users::<Recharge>().await?;
    if !is_user_id(&order.user_id) {
        return Err(ApiError::invalid("userId", "不是有效的用户"));
    }
    if !(1..=SAFE_INTEGER_MAX).contains(&order.amount) {
        return Err(ApiError::invalid("amount", "必须是 1 到 2^53 − 1 之间的整数"));
    }
    if order.order_id.trim().is_empty() || order.order_id.len() > ORDER_BYTES_MAX || order.order_id.chars().any(char::is_control)
    {
        return Err(ApiError::invalid("orderId", format!("长度必须在 1 到 {ORDER_BYTES_MAX} 字节之间")));
    }
    let quota_type = order.quota_type.unwrap_or(QuotaType::Total);
    let reason: String = order.reason.unwrap_or_else(|| "充值".to_owned()).chars().take(200).collect();
    let ledger = LedgerClient::of_user(&ctx.env, &order.user_id);
    let credited = ledger.recharge(&order.order_id, order.amount, quota_type, &reason).await?;
    let data = json!({
        "quota": on_wire(&ctx, &order.user_id, &credited.quota),
        "transaction": wire::entry(&order.user_id, &credited.entry, ctx.config.zone),
        "repeated": credited.repeated,
    });
    respond::ok(&ctx.request_id, "充值成功", &data)
}

fn quota_array(ctx: &Ctx, user_id: &str, states: &[QuotaState]) -> Value {
    Value::Array(states.iter().map(|state| on_wire(ctx, user_id, state)).collect())
}

async fn govern(ctx: &Ctx, act: Governance, message: &str) -> Answer {
    let user_id = ctx.user_id(0)?;
    let states = LedgerClient::of_user(&ctx.env, &user_id).govern(act).await?;
    respond::ok(&ctx.request_id, message, &quota_array(ctx, &user_id, &states))
}

/// `GET /admin/quota/:user`: the three quotas.
///
/// # Errors
/// 503 when the ledger is away.
pub async fn read(ctx: Ctx) -> Answer {
    let user_id = ctx.user_id(0)?;
    let states = LedgerClient::of_user(&ctx.env, &user_id).quotas().await?;
    respond::ok(&ctx.request_id, "获取成功", &quota_array(&ctx, &user_id, &states))
}

/// `PUT /admin/quota/:user` `{totalQuota, quotaType}`: sets a limit; 0 is a limit.
///
/// # Errors
/// 400/1001 naming the field.
pub async fn set_limit(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Set {
        total_quota: u64,
        quota_type: QuotaType,
    }
    let Body { value: set, .. } = ctx.body_naming_users::<Set>().await?;
    if set.total_quota > SAFE_INTEGER_MAX {
        return Err(ApiError::invalid("totalQuota", "不能超过 2^53 − 1"));
    }
    govern(&ctx, Governance::SetLimit { quota_type: set.quota_type, tokens: set.total_quota }, "更新成功").await
}

/// A role by its wire word; `author` is a writer.
fn role(word: &str) -> Result<Role, ApiError> {
    Role::from_claim(word).ok_or_else(|| ApiError::invalid("role", "必须是 reader、writer、vip 或 admin"))
}

/// `PUT /admin/quota/:user/role` `{role}`: sets the role; tokens no longer change it.
///
/// # Errors
/// 400/1001 naming the field.
pub async fn set_role(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    struct Set {
        role: String,
    }
    let Body { value: set, .. } = ctx.body_naming_users::<Set>().await?;
    govern(&ctx, Governance::SetRole { role: role(&set.role)? }, "更新成功").await
}

/// `POST /admin/quota/:user/suspend`.
///
/// # Errors
/// 503 when the ledger is away.
pub async fn suspend(ctx: Ctx) -> Answer {
    govern(&ctx, Governance::Suspend, "暂停成功").await
}

/// `POST /admin/quota/:user/activate`.
///
/// # Errors
/// 503 when the ledger is away.
pub async fn activate(ctx: Ctx) -> Answer {
    govern(&ctx, Governance::Activate, "激活成功").await
}

/// `POST /admin/quota/:user/reset` `{quotaType?}`: gives back what the current period has used.
///
/// # Errors
/// 400/1001 naming the field.
pub async fn reset(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Reset {
        #[serde(default)]
        quota_type: Option<QuotaType>,
    }
    let Body { value: reset, .. } = ctx.body_naming_users::<Reset>().await?;
    let reset_id = ids::new_id(clock::now_ms());
    govern(&ctx, Governance::Reset { quota_type: reset.quota_type, reset_id }, "操作成功").await
}

/// `POST /admin/quota/:user/initialize` `{role?}`: back to the role's limits; what was recharged stays.
///
/// # Errors
/// 400/1001 naming the field.
pub async fn initialize(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    struct Initialize {
        #[serde(default)]
        role: Option<String>,
    }
    let Body { value: wanted, .. } = ctx.body_naming_users::<Initialize>().await?;
    let role = wanted.role.as_deref().map(role).transpose()?;
    govern(&ctx, Governance::Initialize { role }, "操作成功").await
}

/// `GET /admin/quota/:user/reconcile`: balance, fold of entries, open holds and D1's copy, and whether they agree.
///
/// # Errors
/// 503 when the ledger is away; 500/5001.
pub async fn reconcile(ctx: Ctx) -> Answer {
    let user_id = ctx.user_id(0)?;
    let audit = LedgerClient::of_user(&ctx.env, &user_id).audit().await?;
    let periods: Vec<String> = audit.quotas.iter().map(|quota| quota.period.clone()).collect();
    let folds = from_d1(&ctx, reports::folds(&ctx.env, &user_id, &periods)).await?;
    let compare = |quota: &QuotaState| {
        let fold = folds.iter().find(|fold| fold.quota_type == quota.quota_type.as_str() && fold.period == quota.period);
        let projected = fold.map_or(0, |fold| fold.used);
        let same = |entry: &&super::books::Entry| entry.quota_type == quota.quota_type && entry.period == quota.period;
        let waiting: i64 = audit.waiting.iter().filter(same).map(super::books::Entry::moved).sum();
        let used = i64::try_from(quota.used).unwrap_or(i64::MAX);
        let status = match () {
            () if projected == used && waiting == 0 => "equal",
            () if projected.saturating_add(waiting) == used => "behind",
            () => "differs",
        };
        json!({
            "quotaType": quota.quota_type, "period": quota.period, "status": status,
            "usedQuota": quota.used, "reservedQuota": quota.reserved,
            "projected": projected, "projectedEntries": fold.map_or(0, |fold| fold.entries), "waiting": waiting,
        })
    };
    let types: Vec<Value> = audit.quotas.iter().map(compare).collect();
    let has = |status: &str| types.iter().any(|row| row.get("status").and_then(Value::as_str) == Some(status));
    let status = if has("differs") {
        "differs"
    } else if has("behind") || !audit.waiting.is_empty() {
        "behind"
    } else {
        "equal"
    };
    let hold = |hold: &super::books::Hold| {
        json!({
            "id": hold.id, "amount": hold.amount, "service": hold.service, "model": hold.model, "requestId": hold.request_id,
            "takenAt": ctx.config.zone.rfc3339(hold.taken_at), "expiresAt": ctx.config.zone.rfc3339(hold.expires_at),
        })
    };
    let data = json!({
        "userId": user_id, "status": status, "types": types,
        "openHolds": audit.holds.iter().map(hold).collect::<Vec<_>>(),
        "outboxPending": audit.waiting.len(),
    });
    respond::ok(&ctx.request_id, "获取成功", &data)
}

/// `GET /admin/quota`: users by use, state and last activity, paged.
///
/// # Errors
/// 400/1001 naming the parameter; 500/5001.
pub async fn users(ctx: Ctx) -> Answer {
    let (page, size) = match ctx.page()? {
        Some(page) => page,
        None => {
            let (limit, offset) = (ctx.number("limit", 20, 1..=1_000)?, ctx.number("offset", 0, 0..=10_000_000)?);
            (offset / limit + 1, limit)
        }
    };
    let order = match ctx.param("sort") {
        None | Some("activity") => UserOrder::Activity,
        Some("used") => UserOrder::Used,
        Some(_) => return Err(ApiError::invalid("sort", "必须是 activity 或 used")),
    };
    let suspended = match ctx.param("status") {
        None => None,
        Some("suspended") => Some(true),
        Some("active") => Some(false),
        Some(_) => return Err(ApiError::invalid("status", "必须是 active 或 suspended")),
    };
    let role = ctx.param("role").map(role).transpose()?.map(Role::as_str);
    let (rows, total) = from_d1(&ctx, reports::users(&ctx.env, order, suspended, role, size, (page - 1) * size)).await?;
    let rows: Vec<Value> = rows.iter().map(|row| wire::user_line(row, ctx.config.zone)).collect();
    respond::page(&ctx.request_id, rows, total, page, size)
}

fn code_json(ctx: &Ctx, code: &Code, now_ms: i64) -> Value {
    let zone = ctx.config.zone;
    let expired = code.expires_at.is_some_and(|at| at <= now_ms);
    let status = match () {
        () if code.voided_at.is_some() => "void",
        () if expired => "expired",
        () if code.used >= code.uses => "used",
        () => "active",
    };
    json!({
        "code": code.code, "amount": code.amount, "quotaType": code.quota_type, "uses": code.uses, "used": code.used,
        "status": status, "expiresAt": code.expires_at.map(|at| zone.rfc3339(at)),
        "createdBy": code.created_by, "createdAt": zone.rfc3339(code.created_at),
    })
}

/// `GET /admin/quota-codes`: codes, newest first.
///
/// # Errors
/// 400/1001 naming the parameter; 500/5001.
pub async fn codes(ctx: Ctx) -> Answer {
    let (limit, offset) = (ctx.number("limit", 50, 1..=1_000)?, ctx.number("offset", 0, 0..=1_000_000)?);
    let rows = from_d1(&ctx, codes::list(&ctx.env, limit, offset)).await?;
    let now_ms = clock::now_ms();
    let rows: Vec<Value> = rows.iter().map(|code| code_json(&ctx, code, now_ms)).collect();
    respond::ok(&ctx.request_id, "获取成功", &json!(rows))
}

/// `POST /admin/quota-codes` `{amount, quotaType?, count?, uses?, expiresAt?}`: a batch of new codes, 201.
///
/// # Errors
/// 400/1001 naming the field; 500/5001.
pub async fn create_codes(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Create {
        amount: u64,
        #[serde(default)]
        quota_type: Option<QuotaType>,
        #[serde(default)]
        count: Option<u64>,
        #[serde(default)]
        uses: Option<u64>,
        #[serde(default)]
        expires_at: Option<String>,
    }
    let Body { value: wanted, .. } = ctx.body_naming_users::<Create>().await?;
    let ranged = |name: &str, value: u64, max: u64| match value {
        1.. if value <= max => Ok(value),
        _ => Err(ApiError::invalid(name, format!("必须是 1 到 {max} 之间的整数"))),
    };
    let now_ms = clock::now_ms();
    let amount = ranged("amount", wanted.amount, SAFE_INTEGER_MAX)?;
    let count = ranged("count", wanted.count.unwrap_or(1), CODES_MAX)?;
    let uses = ranged("uses", wanted.uses.unwrap_or(1), 1_000_000)?;
    let expires_at = match wanted.expires_at.as_deref() {
        None => None,
        Some(text) => {
            let at = ctx.config.zone.instant(text, true).filter(|at| *at > now_ms);
            Some(at.ok_or_else(|| ApiError::invalid("expiresAt", "必须是将来的时间"))?)
        }
    };
    let codes: Vec<String> = (0..count).map(|_| new_code(now_ms)).collect();
    let created_by = ctx.caller()?.user_id.clone();
    let quota_type = wanted.quota_type.unwrap_or(QuotaType::Total);
    let batch = Batch { codes: &codes, amount, quota_type, uses, expires_at, created_by: &created_by, created_at: now_ms };
    from_d1(&ctx, codes::create(&ctx.env, &batch)).await?;
    let row = |code: &String| Code {
        code: code.clone(),
        amount,
        quota_type,
        uses,
        used: 0,
        expires_at,
        voided_at: None,
        created_by: created_by.clone(),
        created_at: now_ms,
    };
    let rows: Vec<Value> = codes.iter().map(|code| code_json(&ctx, &row(code), now_ms)).collect();
    respond::created(&ctx.request_id, &json!(rows))
}

/// Sixteen letters of 32: 80 random bits.
fn new_code(now_ms: i64) -> String {
    let random = ids::new_id(now_ms);
    let bytes = hex::decode(random.get(12..).unwrap_or_default()).unwrap_or_default();
    let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect::<Vec<u8>>();
    let letter = |five: &[u8]| {
        let at = five.iter().fold(0_usize, |at, bit| at << 1 | usize::from(*bit));
        char::from(CODE_LETTERS.get(at).copied().unwrap_or(b'A'))
    };
    let letters: Vec<char> = bits.chunks(5).map(letter).collect();
    letters.chunks(4).map(|four| four.iter().collect::<String>()).collect::<Vec<_>>().join("-")
}

/// `DELETE /admin/quota-codes/:code`: makes a code worthless; what it credited stays.
///
/// # Errors
/// 404 for an unknown code; 500/5001.
pub async fn void_code(ctx: Ctx) -> Answer {
    let code = ctx.params.first().map(|code| code.to_uppercase()).unwrap_or_default();
    if from_d1(&ctx, codes::find(&ctx.env, &code)).await?.is_none() {
        return Err(ApiError::not_found("兑换码"));
    }
    from_d1(&ctx, codes::void(&ctx.env, &code, clock::now_ms())).await?;
    respond::ok(&ctx.request_id, "操作成功", &json!({}))
}
