//! ChatSession: one Durable Object per session, named `{user}/{session}`; the truth about its messages and its turns.
//!
//! State (SQLite): the session, its message tree, its generations and their event logs for 24 h. Invariants:
//! - the name is made from the verified caller, so another's id names another, empty object: 404;
//! - one turn at a time: look for a running one, decide, write its row, all without an `.await` between;
//! - an instance that finds a generation running which it does not run itself was preceded by one that was killed: it
//!   closes and charges it before it answers anything (`Engine::recover`). An alarm does so where nobody asks.
//!
//! Commands: [`super::Command`].

#![allow(missing_docs, reason = "the durable_object macro writes methods without docs")]

use std::cell::Cell;
use std::rc::Rc;

use futures::StreamExt;
use serde_json::{Value, json};
use worker::wasm_bindgen;
use worker::{DurableObject, Env, Request, Response, State, durable_object};

use super::turns::{self, Desk, WATCH_MS};
use super::{Call, Command, Delivery, Incoming, Page, Patch, Session, Status, Turn, TurnKind, WholeAnswer, store, wire};
use crate::config::Config;
use crate::error::ApiError;
use crate::generation::Ids;
use crate::generation::engine::{Engine, Owner};
use crate::generation::event::Mode;
use crate::generation::live::{Live, StopWish};
use crate::generation::store as generations;
use crate::platform::sql::SqlError;
use crate::platform::{call, clock, log, respond};
use crate::quota::Estimate;

/// A list entry that could not be written to D1 is tried again after this, ms.
const REINDEX_MS: i64 = 5_000;
/// A caller who stops a generation waits at most this long for its end, ms.
const STOP_WAIT_MS: u64 = 5_000;
/// A whole answer whose time is up must be charged and saved within this, ms: the client gives up at 15 s.
const WHOLE_END_MS: u64 = 2_000;
/// A stream is broken off this long after its `error` event, ms.
const BREAK_AFTER_MS: u64 = 250;
/// The list in D1 may delay an answer by at most this, ms.
const INDEX_MS: u64 = 2_000;

/// One chat session.
#[durable_object]
pub struct ChatSession {
    env: Env,
    engine: Rc<Engine>,
    desk: Rc<Desk>,
    ready: Cell<bool>,
}

impl DurableObject for ChatSession {
    fn new(state: State, env: Env) -> Self {
        let state = Rc::new(state);
        let engine = Engine::new(state.clone(), env.clone());
        let desk = Rc::new(Desk::new(state, env.clone()));
        Self { env, engine, desk, ready: Cell::new(false) }
    }

    async fn fetch(&self, mut request: Request) -> worker::Result<Response> {
        let call = match request.text().await.map(|text| serde_json::from_str::<Incoming>(&text)) {
            Ok(Ok(Incoming::Call(call))) => call,
            Ok(Ok(Incoming::Word(Command::QuotaEvent { crossings }))) => {
                self.engine.tell(&crossings);
                return call::answer(&Ok(json!({})));
            }
            _ => return call::answer::<Value>(&Err(ApiError::internal())),
        };
        match self.serve(call).await {
            Ok(Answer::Whole(value)) => call::answer(&Ok(value)),
            Ok(Answer::Events(live, mode, after)) => {
                let events = live.stream(mode, after).then(break_late);
                Ok(Response::from_stream(events)?.with_headers(respond::event_stream_headers()?))
            }
            Err(error) => call::answer::<Value>(&Err(error)),
        }
    }

    async fn alarm(&self) -> worker::Result<Response> {
        self.desk.alarm_fired();
        if let Err(cause) = self.look_after().await {
            log::error("session_alarm", "", &cause);
            self.desk.arm(REINDEX_MS).await;
        }
        Response::ok("")
    }
}

enum Answer {
    Whole(Value),
    Events(Rc<Live>, Mode, u64),
}

impl From<SqlError> for ApiError {
    fn from(cause: SqlError) -> Self {
        log::error("session_rows", "", &cause);
        Self::internal()
    }
}

impl ChatSession {
    async fn serve(&self, call: Call) -> Result<Answer, ApiError> {
        let config = Config::of(&self.env)?;
        let makes = matches!(&call.command, Command::Create { .. })
            || matches!(&call.command, Command::Turn(turn) if matches!(turn.kind, TurnKind::Ask { create: true, .. }))
            || matches!(&call.command, Command::Quote { kind: TurnKind::Ask { create: true, .. }, .. });
        if !self.ready(makes)? {
            return Err(ApiError::not_found("会话"));
        }
        match call.command {
            Command::Turn(turn) => self.turn(&config, &call.caller, &call.session_id, &turn).await,
            Command::Resume { message_id, after, mode } => self.resume(message_id.as_deref(), after, mode).await,
            Command::Stop => self.stop().await.map(Answer::Whole),
            Command::Create { project_id, patch } => {
                let mut session = Session::new(&call.session_id, &call.caller.user_id, project_id, clock::now_ms());
                patch_session(&mut session, patch);
                store::save(&self.desk.sql, &session)?;
                self.publish().await;
                Ok(Answer::Whole(wire::session(&session, &config)))
            }
            Command::Read { limit, offset } => self.read(&config, limit, offset).map(Answer::Whole),
            Command::Update(patch) => {
                self.session()?;
                let session =
                    self.desk.change(|session| patch_session(session, patch))?.ok_or_else(|| ApiError::not_found("会话"))?;
                self.publish().await;
                Ok(Answer::Whole(wire::session(&session, &config)))
            }
            Command::Delete => {
                self.session()?;
                // Marked before anything is awaited: no turn can start in between.
                self.desk.change(|session| session.status = Status::Deleted)?;
                self.stop_running().await?;
                self.publish().await;
                Ok(Answer::Whole(json!({})))
            }
            Command::Clear => {
                self.session()?;
                self.idle()?;
                store::clear(&self.desk.sql)?;
                self.desk.change(|session| session.message_count = 0)?;
                self.publish().await;
                Ok(Answer::Whole(json!({})))
            }
            Command::SetPath { message_id } => self.set_path(&message_id).await.map(Answer::Whole),
            Command::Quote { kind, options } => {
                let turn = Turn { kind, options, key: None, delivery: Delivery::Stream(Mode::Delta) };
                let job = turns::prepare(&self.desk.sql, &config, &call.caller, &call.session_id, &turn, clock::now_ms())?;
                Ok(Answer::Whole(json!(Estimate {
                    model: job.model,
                    prompt_tokens: job.prompt_upper,
                    output_tokens: job.max_output,
                    price: job.price,
                })))
            }
            Command::QuotaEvent { .. } => Err(ApiError::internal()),
        }
    }

    /// Makes the tables (only for a command that makes a session) and takes up what a killed instance left.
    /// False: there is no session here. Synchronous, so nothing sees a half-recovered object.
    fn ready(&self, makes: bool) -> Result<bool, ApiError> {
        if self.ready.get() {
            return Ok(true);
        }
        if !makes && !store::exists(&self.desk.sql)? {
            return Ok(false);
        }
        store::migrate(&self.desk.sql)?;
        generations::migrate(&self.desk.sql)?;
        let owner: Rc<dyn Owner> = self.desk.clone();
        self.engine.recover(&owner)?;
        self.ready.set(true);
        Ok(true)
    }

    /// The session, unless it is deleted.
    fn session(&self) -> Result<Session, ApiError> {
        let session = store::session(&self.desk.sql)?.map(|(session, _)| session);
        session.filter(|session| session.status != Status::Deleted).ok_or_else(|| ApiError::not_found("会话"))
    }

    /// Refuses while a turn runs.
    fn idle(&self) -> Result<(), ApiError> {
        match self.engine.busy() {
            None => Ok(()),
            Some(live) => Err(ApiError::conflict("上一条回复还在生成，请等待完成或先停止")
                .with_data("messageId", live.ids.message_id.clone())
                .with_retry_after(2)),
        }
    }

    async fn turn(
        &self,
        config: &Config,
        caller: &crate::identity::Caller,
        session_id: &str,
        turn: &Turn,
    ) -> Result<Answer, ApiError> {
        let (live, own) = match self.repeated(turn)? {
            Some(live) => (live, false),
            None => {
                self.idle()?;
                let job = turns::prepare(&self.desk.sql, config, caller, session_id, turn, clock::now_ms())?;
                (self.engine.start(self.desk.clone(), job, turn.key.clone(), config.hold_ttl_ms), true)
            }
        };
        match turn.delivery {
            Delivery::Stream(mode) => {
                live.primed().await?;
                Ok(Answer::Events(live, mode, 0))
            }
            Delivery::Whole { until } => self.whole(&live, until, own).await.map(Answer::Whole),
        }
    }

    /// The generation an equal request has already started.
    fn repeated(&self, turn: &Turn) -> Result<Option<Rc<Live>>, ApiError> {
        let Some(key) = &turn.key else { return Ok(None) };
        if store::session(&self.desk.sql)?.is_some_and(|(session, _)| session.status == Status::Deleted) {
            return Err(ApiError::not_found("会话"));
        }
        let live = self.engine.busy().filter(|live| live.key.as_ref().is_some_and(|known| known.key == key.key));
        let row = if live.is_some() { None } else { generations::of_key(&self.desk.sql, &key.key)? };
        let (fingerprint, live) = match (live, row) {
            (Some(live), _) => (live.key.as_ref().map(|known| known.fingerprint.clone()), live),
            (None, Some(row)) => (row.fingerprint.clone(), self.engine.attach(&row)?),
            (None, None) => return Ok(None),
        };
        if fingerprint.as_deref() != Some(key.fingerprint.as_str()) {
            return Err(ApiError::conflict("相同的 Idempotency-Key 已用于另一个请求，请换一个新的键"));
        }
        Ok(Some(live))
    }

    /// Waits for the whole answer; who started it (`own`) ends it when the time is up.
    async fn whole(&self, live: &Rc<Live>, until: i64, own: bool) -> Result<Value, ApiError> {
        let limit_ms = u64::try_from(until - clock::now_ms()).unwrap_or(0);
        let finished = match clock::within(limit_ms, live.finished()).await {
            Some(finished) => finished?,
            // Another request's generation is not this one's to end: its author can read on by resuming.
            None if !own => {
                return Err(ApiError::conflict("该回复还在生成，请稍后用续传接口读取")
                    .with_data("messageId", live.ids.message_id.clone())
                    .with_data("requestId", live.ids.request_id.clone())
                    .with_retry_after(2));
            }
            None => {
                live.wish_stop(StopWish::Time);
                clock::within(WHOLE_END_MS, live.finished()).await.ok_or_else(ApiError::provider_timeout)??
            }
        };
        let ids = &live.ids;
        if let Some(error) = finished.ending.error {
            return Err(error
                .with_data("sessionId", ids.session_id.clone())
                .with_data("messageId", ids.message_id.clone())
                .with_data("requestId", ids.request_id.clone()));
        }
        let row = generations::of_message(&self.desk.sql, &ids.message_id)?.ok_or_else(ApiError::internal)?;
        Ok(json!(WholeAnswer {
            ids: ids.clone(),
            text: finished.text,
            finish_reason: finished.ending.finish_reason,
            context_used: turns::context_used(&row.job),
            model: row.job.model,
            usage: finished.ending.usage.unwrap_or_default(),
        }))
    }

    async fn resume(&self, message_id: Option<&str>, after: u64, mode: Mode) -> Result<Answer, ApiError> {
        self.session()?;
        let live = match self.engine.busy().filter(|live| message_id.is_none_or(|id| id == live.ids.message_id)) {
            Some(live) => live,
            None => {
                let row = match message_id {
                    Some(id) => generations::of_message(&self.desk.sql, id)?,
                    None => generations::newest(&self.desk.sql)?,
                };
                self.engine.attach(&row.ok_or_else(|| ApiError::not_found("可续传的生成（只保留 24 小时）"))?)?
            }
        };
        live.primed().await?;
        Ok(Answer::Events(live, mode, after))
    }

    async fn stop(&self) -> Result<Value, ApiError> {
        let session = self.session()?;
        let Some((ids, finish_reason)) = self.stop_running().await? else {
            return Ok(json!({"stopped": false, "sessionId": session.id}));
        };
        Ok(json!({
            "stopped": finish_reason.as_deref().is_none_or(|reason| reason == "stopped"),
            "sessionId": session.id, "messageId": ids.message_id, "requestId": ids.request_id, "finishReason": finish_reason,
        }))
    }

    /// Stops the running generation, if any, and waits a while for its end: its ids and why it ended.
    async fn stop_running(&self) -> Result<Option<(Ids, Option<String>)>, ApiError> {
        let Some(live) = self.engine.busy() else { return Ok(None) };
        live.wish_stop(StopWish::Author);
        let finished = clock::within(STOP_WAIT_MS, live.finished()).await;
        Ok(Some((live.ids.clone(), finished.and_then(Result::ok).map(|finished| finished.ending.finish_reason))))
    }

    fn read(&self, config: &Config, limit: u64, offset: u64) -> Result<Value, ApiError> {
        let session = self.session()?;
        let page = store::page(&self.desk.sql, offset, limit)?;
        let siblings = store::siblings(&self.desk.sql, &page)?;
        let messages: Vec<Value> = page.iter().map(|message| wire::message(message, &siblings, config.zone)).collect();
        let total = store::path_length(&self.desk.sql)?;
        Ok(json!(Page { session: wire::session(&session, config), messages, total, limit, offset }))
    }

    async fn set_path(&self, message_id: &str) -> Result<Value, ApiError> {
        let session = self.session()?;
        self.idle()?;
        let message = store::message(&self.desk.sql, message_id)?.ok_or_else(|| ApiError::not_found("消息"))?;
        let (sql, id) = (self.desk.sql.clone(), message.id);
        self.desk.sql.transaction(move || store::switch_path(&sql, &id))?;
        let (leaf, total) = (store::leaf(&self.desk.sql)?, store::path_length(&self.desk.sql)?);
        self.desk.change(|session| session.message_count = total)?;
        self.publish().await;
        Ok(json!({"sessionId": session.id, "leafId": leaf.map(|leaf| leaf.id), "messagesTotal": total}))
    }

    /// Brings the list up to date, as far as D1 lets it within the limit; the alarm does the rest.
    async fn publish(&self) {
        match clock::within(INDEX_MS, self.desk.index()).await {
            Some(Ok(())) => {}
            Some(Err(cause)) => {
                log::error("index", "", &cause);
                self.desk.arm(REINDEX_MS).await;
            }
            None => self.desk.arm(REINDEX_MS).await,
        }
    }

    /// The alarm's work: recover, index, prune, and set the next alarm.
    async fn look_after(&self) -> Result<(), ApiError> {
        if !self.ready(false)? {
            return Ok(());
        }
        let indexed = clock::within(INDEX_MS * 2, self.desk.index()).await.is_some_and(|result| result.is_ok());
        let next_prune = generations::prune(&self.desk.sql, clock::now_ms())?;
        let open = generations::unfinished(&self.desk.sql)?;
        let owner: Rc<dyn Owner> = self.desk.clone();
        self.engine.recover(&owner)?;
        let now_ms = clock::now_ms();
        let wishes = [
            (!indexed).then_some(REINDEX_MS),
            (!open.is_empty()).then_some(WATCH_MS),
            next_prune.map(|at| (at - now_ms).max(WATCH_MS)),
        ];
        if let Some(wait_ms) = wishes.into_iter().flatten().min() {
            self.desk.arm(wait_ms).await;
        }
        Ok(())
    }
}

/// Lets an `error` event reach its client before the stream is broken off: breaking discards what is still on its way.
async fn break_late(item: Result<Vec<u8>, ApiError>) -> worker::Result<Vec<u8>> {
    match item {
        Ok(bytes) => Ok(bytes),
        Err(error) => {
            clock::sleep_ms(BREAK_AFTER_MS).await;
            Err(worker::Error::RustError(error.error))
        }
    }
}

fn patch_session(session: &mut Session, patch: Patch) {
    if let Some(title) = patch.title {
        session.title = title.trim().to_owned();
        session.title_set = true;
    }
    if let Some(status) = patch.status {
        session.status = status;
    }
    if let Some(tags) = patch.tags {
        session.tags = tags;
    }
    session.settings = session.settings.overlaid(&patch.settings);
}
