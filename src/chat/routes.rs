//! `/ai/chat…` (contract 2.2, 2.3): parse and check the request, ask the session's object, shape the answer.
//!
//! Invariant: the object's name is made from the verified caller and an id of ours, so no route can reach another's session.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use worker::Response;

use super::index::{self, Filter};
use super::settings::Settings;
use super::turn::{self, ClientMessage};
use super::{BINDING, Call, Command, Delivery, Page, Patch, Status, Turn, TurnKind, WholeAnswer, object_name, wire};
use crate::error::ApiError;
use crate::generation::event::{Mode, usage_json};
use crate::generation::store::IdempotencyKey;
use crate::platform::request::{Body, Ctx, is_id};
use crate::platform::{call, clock, ids, log, respond};
use crate::quota::Estimate;
use crate::quota::client::LedgerClient;
use crate::quota::wire as quota_wire;

/// A non-streaming answer is given after this at the latest, with what there is, ms (contract 3.5 rule 8: aim for 12 s).
const WHOLE_MS: i64 = 12_000;
/// An object answers everything but a turn within this, ms.
const CALL_MS: u64 = 10_000;
/// What a turn may take beyond the provider's first event, ms.
const TURN_SLACK_MS: u64 = 30_000;
/// Longest idempotency key (as Stripe's), bytes.
const KEY_BYTES_MAX: usize = 255;
/// The list in D1 must answer within this, ms.
const LIST_MS: u64 = 8_000;

type Answer = Result<Response, ApiError>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Say {
    #[serde(default)]
    message: Option<String>,
    /// The specification's name for it.
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    session_id: Option<String>,
    #[serde(default)]
    project_id: Option<String>,
    #[serde(default)]
    options: Option<Settings>,
    #[serde(default)]
    history: Option<Vec<ClientMessage>>,
}

#[derive(Deserialize)]
struct Edit {
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    options: Option<Settings>,
    #[serde(default)]
    stream: Option<bool>,
}

#[derive(Deserialize)]
struct Again {
    #[serde(default)]
    options: Option<Settings>,
    #[serde(default)]
    stream: Option<bool>,
}

/// `POST /ai/chat`: a turn, answered whole within the client's 15 s.
///
/// # Errors
/// 400, 404, 409, 413, 429, 5xx by contract 1.4.
pub async fn send(mut ctx: Ctx) -> Answer {
    let body = ctx.body::<Say>().await?;
    say(&ctx, body, whole()).await
}

/// `POST /ai/chat/stream`: a turn as events.
///
/// # Errors
/// As [`send`], before the first event.
pub async fn send_stream(mut ctx: Ctx) -> Answer {
    let mode = stream_mode(&ctx)?;
    let body = ctx.body::<Say>().await?;
    say(&ctx, body, Delivery::Stream(mode)).await
}

async fn say(ctx: &Ctx, body: Body<Say>, delivery: Delivery) -> Answer {
    let Body { value: say, fingerprint } = body;
    let content = turn::checked_message(say.message, say.content)?;
    turn::checked_history(say.history.as_deref().unwrap_or_default())?;
    let named = say.session_id.filter(|id| !id.is_empty());
    if named.as_deref().is_some_and(|id| !is_id(id)) {
        return Err(ApiError::not_found("会话"));
    }
    let create = named.is_none();
    let kind = TurnKind::Ask {
        content,
        history: if create { say.history.unwrap_or_default() } else { Vec::new() },
        project_id: say.project_id.filter(|id| !id.is_empty()),
        create,
    };
    let session_id = named.unwrap_or_else(|| ids::new_id(clock::now_ms()));
    run(ctx, session_id, kind, say.options.unwrap_or_default(), fingerprint, delivery).await
}

/// `PUT …/messages/:message`: another wording of a question, answered anew. Whole, or as events if asked for.
///
/// # Errors
/// As [`send`]; 400/1017 for an answer's id.
pub async fn edit(mut ctx: Ctx) -> Answer {
    let (session_id, message_id) = (ctx.id(0, "会话")?, ctx.id(1, "消息")?);
    let Body { value: edit, fingerprint } = ctx.body::<Edit>().await?;
    let content = turn::checked_message(edit.message, edit.content)?;
    let options = edit.options.unwrap_or_default();
    let delivery = delivery(&ctx, edit.stream.or(options.stream))?;
    run(&ctx, session_id, TurnKind::Edit { message_id, content }, options, fingerprint, delivery).await
}

/// `POST …/messages/:message/regenerate`: another answer to the same question. Whole, or as events if asked for.
///
/// # Errors
/// As [`send`].
pub async fn regenerate(mut ctx: Ctx) -> Answer {
    let (session_id, message_id) = (ctx.id(0, "会话")?, ctx.id(1, "消息")?);
    let Body { value: again, fingerprint } = ctx.body::<Again>().await?;
    let options = again.options.unwrap_or_default();
    let delivery = delivery(&ctx, again.stream.or(options.stream))?;
    run(&ctx, session_id, TurnKind::Again { message_id }, options, fingerprint, delivery).await
}

fn whole() -> Delivery {
    Delivery::Whole { until: clock::now_ms() + WHOLE_MS }
}

fn delivery(ctx: &Ctx, stream: Option<bool>) -> Result<Delivery, ApiError> {
    let accepts = ctx.header("accept").is_some_and(|accept| accept.contains("text/event-stream"));
    let asked = ctx.param("stream").map(|word| word == "true");
    if stream.or(asked).unwrap_or(accepts) { Ok(Delivery::Stream(stream_mode(ctx)?)) } else { Ok(whole()) }
}

fn stream_mode(ctx: &Ctx) -> Result<Mode, ApiError> {
    Mode::parse(ctx.param("stream_mode")).ok_or_else(|| ApiError::invalid("stream_mode", "必须是 delta、cumulative 或 text"))
}

/// Sends a turn to its session. With an idempotency key, the caller's ledger tells which session its first try went to.
async fn run(
    ctx: &Ctx,
    session_id: String,
    kind: TurnKind,
    options: Settings,
    fingerprint: String,
    delivery: Delivery,
) -> Answer {
    let started_ms = clock::now_ms();
    let ledger = LedgerClient::of(&ctx.env, ctx.caller()?);
    let (key, session_id, claimed) = match ctx.header("idempotency-key") {
        None => (None, session_id, false),
        Some(key) if key.len() > KEY_BYTES_MAX => {
            return Err(ApiError::invalid("Idempotency-Key", format!("不能超过 {KEY_BYTES_MAX} 字节")));
        }
        Some(key) => {
            let (bound, existed) = ledger.claim(&key, &fingerprint, &session_id).await?;
            (Some(IdempotencyKey { key, fingerprint }), bound, !existed)
        }
    };
    let turn = Turn { kind, options, key: key.clone(), delivery };
    let answer = deliver(ctx, &session_id, turn, started_ms).await;
    // A refused request has started nothing: its key is free for a corrected one. An answer that broke off has ids.
    if let (Err(error), Some(key), true) = (&answer, key, claimed)
        && !error.data.contains_key("requestId")
    {
        ledger.unclaim(&key.key, &key.fingerprint).await;
    }
    answer
}

async fn deliver(ctx: &Ctx, session_id: &str, turn: Turn, started_ms: i64) -> Answer {
    let delivery = turn.delivery;
    let limit_ms = u64::try_from(ctx.config.stream_idle_ms).unwrap_or(0) + TURN_SLACK_MS;
    let response = ask(ctx, session_id, Command::Turn(Box::new(turn)), limit_ms).await?;
    match delivery {
        Delivery::Stream(_) => events(response).await,
        Delivery::Whole { .. } => {
            let answer: WholeAnswer = call::outcome(BINDING, response).await?;
            respond::ok(&ctx.request_id, "操作成功", &whole_answer(ctx, &answer, started_ms))
        }
    }
}

/// The superset both clients read (contract 2.2 and 5 row 8).
fn whole_answer(ctx: &Ctx, answer: &WholeAnswer, started_ms: i64) -> Value {
    let now_ms = clock::now_ms();
    let created = ctx.config.zone.rfc3339(now_ms);
    let ids = &answer.ids;
    json!({
        "sessionId": ids.session_id,
        "messageId": ids.message_id,
        "requestId": ids.request_id,
        "message": {
            "id": ids.message_id, "role": "assistant", "content": answer.text,
            "timestamp": created, "createdAt": created, "metadata": {},
        },
        "reply": answer.text,
        "tokensUsed": answer.usage.total(),
        "model": answer.model,
        "contextUsed": answer.context_used,
        "finishReason": answer.finish_reason,
        "responseTime": (now_ms - started_ms).saturating_mul(1_000_000),
        "usage": usage_json(&answer.usage),
        "estimated": answer.usage.estimated,
    })
}

/// Hands an object's events on untouched, or its refusal as an error.
async fn events(response: Response) -> Answer {
    let is_stream =
        response.headers().get("content-type").ok().flatten().is_some_and(|kind| kind.starts_with("text/event-stream"));
    if is_stream {
        return Ok(response);
    }
    match call::outcome::<Value>(BINDING, response).await {
        Err(error) => Err(error),
        Ok(_) => Err(ApiError::internal()),
    }
}

async fn ask(ctx: &Ctx, session_id: &str, command: Command, limit_ms: u64) -> Answer {
    let caller = ctx.caller()?.clone();
    let name = object_name(&caller.user_id, session_id);
    let call = Call { caller, session_id: session_id.to_owned(), command };
    call::raw(&ctx.env, BINDING, &name, &call, limit_ms).await
}

async fn ask_for<R: DeserializeOwned>(ctx: &Ctx, command: Command) -> Result<R, ApiError> {
    let session_id = ctx.id(0, "会话")?;
    call::outcome(BINDING, ask(ctx, &session_id, command, CALL_MS).await?).await
}

/// `GET …/sessions/:id/stream?messageId=`: goes on after `Last-Event-ID`, or from the first event.
///
/// # Errors
/// 404 when there is nothing to go on with; 400 for an id that is no number.
pub async fn resume(ctx: Ctx) -> Answer {
    let session_id = ctx.id(0, "会话")?;
    let after = match ctx.header("last-event-id") {
        None => 0,
        Some(text) => text.trim().parse().map_err(|_| ApiError::invalid("Last-Event-ID", "必须是事件的序号"))?,
    };
    let message_id = ctx.param("messageId").map(str::to_owned);
    let command = Command::Resume { message_id, after, mode: stream_mode(&ctx)? };
    let limit_ms = u64::try_from(ctx.config.stream_idle_ms).unwrap_or(0) + TURN_SLACK_MS;
    events(ask(&ctx, &session_id, command, limit_ms).await?).await
}

/// `POST /ai/quota/quote`: what the body of a chat turn would hold and at most cost, and whether it fits. Nothing is
/// called, held or stored.
///
/// # Errors
/// As [`send`] for the body; 503 when the ledger is away.
pub async fn quote(mut ctx: Ctx) -> Answer {
    let Body { value: say, .. } = ctx.body::<Say>().await?;
    let content = turn::checked_message(say.message, say.content)?;
    turn::checked_history(say.history.as_deref().unwrap_or_default())?;
    let named = say.session_id.filter(|id| !id.is_empty());
    if named.as_deref().is_some_and(|id| !is_id(id)) {
        return Err(ApiError::not_found("会话"));
    }
    let kind = TurnKind::Ask { content, history: say.history.unwrap_or_default(), project_id: None, create: named.is_none() };
    let command = Command::Quote { kind, options: say.options.unwrap_or_default() };
    // A turn without a session is quoted by an object that never becomes one.
    let response = ask(&ctx, named.as_deref().unwrap_or("quote"), command, CALL_MS).await?;
    let estimate: Estimate = call::outcome(BINDING, response).await?;
    let quotas = LedgerClient::of(&ctx.env, ctx.caller()?).quotas().await?;
    respond::ok(&ctx.request_id, "获取成功", &quota_wire::quote(&estimate, &quotas))
}

/// `POST …/sessions/:id/stop`: stops the running generation; what was delivered is kept and charged.
///
/// # Errors
/// 404 for an unknown session.
pub async fn stop(ctx: Ctx) -> Answer {
    let data: Value = ask_for(&ctx, Command::Stop).await?;
    respond::ok(&ctx.request_id, "操作成功", &data)
}

/// `GET /ai/chat/sessions`: the caller's sessions, newest change first.
///
/// # Errors
/// 400/1001 for a bad filter; 500/5001 when the list cannot be read.
pub async fn list(ctx: Ctx) -> Answer {
    let paged = ctx.page()?;
    let (limit, offset) = match paged {
        Some((page, size)) => (size, (page - 1) * size),
        None => (ctx.number("limit", 20, 1..=1_000_000)?, ctx.number("offset", 0, 0..=10_000_000)?),
    };
    let status = match ctx.param("status") {
        None => None,
        Some("active") => Some(Status::Active),
        Some("archived") => Some(Status::Archived),
        Some(_) => return Err(ApiError::invalid("status", "必须是 active 或 archived")),
    };
    let filter = Filter {
        user_id: &ctx.caller()?.user_id,
        project_id: ctx.param("projectId"),
        title: ctx.param("q"),
        tag: ctx.param("tag"),
        status,
        limit,
        offset,
        counted: paged.is_some(),
    };
    let failed = |cause: &dyn std::fmt::Display| {
        log::error("session_list", &ctx.request_id, cause);
        ApiError::database()
    };
    let found = clock::within(LIST_MS, index::list(&ctx.env, &filter)).await.ok_or_else(|| failed(&"no answer in time"))?;
    let (sessions, total) = found.map_err(|e| failed(&e))?;
    let rows: Vec<Value> = sessions.iter().map(|session| wire::session(session, &ctx.config)).collect();
    match paged {
        Some((page, size)) => respond::page(&ctx.request_id, rows, total, page, size),
        None => respond::ok(&ctx.request_id, "获取成功", &json!(rows)),
    }
}

/// `POST /ai/chat/sessions`: an empty session, 201.
///
/// # Errors
/// 400/1001 naming the field.
pub async fn create(mut ctx: Ctx) -> Answer {
    let Body { value: fields, .. } = ctx.body::<Map<String, Value>>().await?;
    let project_id = match fields.get("projectId") {
        None | Some(Value::Null) => None,
        Some(Value::String(id)) if id.len() <= 128 => Some(id.clone()).filter(|id| !id.is_empty()),
        Some(_) => return Err(ApiError::invalid("projectId", "必须是不超过 128 个字符的字符串")),
    };
    let mut patch = patch(&fields)?;
    // An empty title at creation means none yet.
    patch.title = patch.title.filter(|title| !title.trim().is_empty());
    turn::check_patch(&ctx.config, &patch)?;
    let session_id = ids::new_id(clock::now_ms());
    let response = ask(&ctx, &session_id, Command::Create { project_id, patch }, CALL_MS).await?;
    let data: Value = call::outcome(BINDING, response).await?;
    respond::created(&ctx.request_id, &data)
}

/// `PUT …/sessions/:id`: title, status, tags, settings (as an object or flat).
///
/// # Errors
/// 400/1001 naming the field, 404.
pub async fn update(mut ctx: Ctx) -> Answer {
    let Body { value: fields, .. } = ctx.body::<Map<String, Value>>().await?;
    let patch = patch(&fields)?;
    turn::check_patch(&ctx.config, &patch)?;
    let data: Value = ask_for(&ctx, Command::Update(patch)).await?;
    respond::ok(&ctx.request_id, "更新成功", &data)
}

/// A session's changes from a body that may hold the settings as an object, flat, or both.
fn patch(fields: &Map<String, Value>) -> Result<Patch, ApiError> {
    #[derive(Deserialize)]
    struct Plain {
        title: Option<String>,
        status: Option<Status>,
        tags: Option<Vec<String>>,
    }
    fn read<T: DeserializeOwned>(value: Value, under: &str) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(value)
            .map_err(|e| ApiError::invalid(&format!("{under}{}", e.path()), "类型或取值不正确"))
    }
    let plain: Plain = read(Value::Object(fields.clone()), "")?;
    let flat: Settings = read(Value::Object(fields.clone()), "")?;
    let settings = match fields.get("settings") {
        None | Some(Value::Null) => flat,
        Some(nested) => flat.overlaid(&read(nested.clone(), "settings.")?),
    };
    Ok(Patch { title: plain.title, status: plain.status, tags: plain.tags, settings })
}

/// `GET …/sessions/:id`: the session with a page of its messages; `?view=history` is the old backend's nested form.
///
/// # Errors
/// 400/1001 for a bad page, 404.
pub async fn read(ctx: Ctx) -> Answer {
    let Page { session, messages, total, limit, offset } = page(&ctx).await?;
    if ctx.param("view") == Some("history") {
        let history = json!({"messages": messages, "total": total, "limit": limit, "offset": offset});
        return respond::ok(&ctx.request_id, "获取成功", &json!({"session": session, "messages": history}));
    }
    let mut data = session.clone();
    if let Some(fields) = data.as_object_mut() {
        fields.insert("session".to_owned(), session);
        fields.insert("messages".to_owned(), messages.into());
        fields.insert("messagesTotal".to_owned(), total.into());
        fields.insert("limit".to_owned(), limit.into());
        fields.insert("offset".to_owned(), offset.into());
    }
    respond::ok(&ctx.request_id, "获取成功", &data)
}

async fn page(ctx: &Ctx) -> Result<Page, ApiError> {
    let (limit, offset) = (ctx.number("limit", 50, 1..=100)?, ctx.number("offset", 0, 0..=10_000_000)?);
    ask_for(ctx, Command::Read { limit, offset }).await
}

/// `GET …/sessions/:id/messages`: a page of the active path, oldest first.
///
/// # Errors
/// As [`read`].
pub async fn messages(ctx: Ctx) -> Answer {
    let Page { messages, total, limit, offset, .. } = page(&ctx).await?;
    let data = json!({"messages": messages, "total": total, "limit": limit, "offset": offset});
    respond::ok(&ctx.request_id, "获取成功", &data)
}

/// `DELETE …/sessions/:id/messages`: clears the history.
///
/// # Errors
/// 404; 409 while a turn runs.
pub async fn clear(ctx: Ctx) -> Answer {
    let data: Value = ask_for(&ctx, Command::Clear).await?;
    respond::ok(&ctx.request_id, "操作成功", &data)
}

/// `DELETE …/sessions/:id`: deletes the session; a running turn is stopped and charged.
///
/// # Errors
/// 404.
pub async fn delete(ctx: Ctx) -> Answer {
    let data: Value = ask_for(&ctx, Command::Delete).await?;
    respond::ok(&ctx.request_id, "操作成功", &data)
}

/// `PUT …/sessions/:id/path` `{messageId}`: shows the path through that message.
///
/// # Errors
/// 400/1001, 404, 409 while a turn runs.
pub async fn set_path(mut ctx: Ctx) -> Answer {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Path {
        message_id: String,
    }
    let Body { value: path, .. } = ctx.body::<Path>().await?;
    let data: Value = ask_for(&ctx, Command::SetPath { message_id: path.message_id }).await?;
    respond::ok(&ctx.request_id, "更新成功", &data)
}
