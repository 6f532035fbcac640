//! The session object's turns: from a command to a running generation, and what the engine's text does to the tree.
//!
//! Invariant: [`prepare`] reads and decides without writing; the messages appear only when the provider has begun, so that
//! a refused turn leaves nothing behind; then question and empty answer are written together with the session.
//! (Edge: rows of the object, bindings for the index.)

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use futures::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use worker::{Env, State};

use super::prompt::Window;
use super::store::{self, Message, Written};
use super::turn::{self, Plan};
use super::{Session, Status, Turn, TurnKind, UNTITLED, index};
use crate::config::Config;
use crate::error::ApiError;
use crate::generation::engine::{Owner, prompt_tokens};
use crate::generation::{Ending, Ids, Job};
use crate::identity::Caller;
use crate::platform::sql::{Sql, SqlError};
use crate::platform::{clock, ids, log};
use crate::quota::Service;
use crate::quota::books::Watcher;

/// What the messages of a turn will be, kept with its job until the provider begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Pending {
    /// The session, when this turn makes it.
    draft: Option<Session>,
    /// The question to write; `None` where the answer is another one to an old question.
    question: Option<Question>,
    /// The message the question (or, without one, the answer) follows; empty at the root.
    parent_id: String,
    /// Whether the prompt held more than the question.
    context_used: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Question {
    id: String,
    content: String,
}

/// The part of a session object that outlives a request.
pub struct Desk {
    /// Its database.
    pub sql: Sql,
    /// Bindings.
    pub env: Env,
    state: Rc<State>,
    /// When the alarm is set to, as far as this instance knows; 0: not known.
    armed_at: Cell<i64>,
}

/// While a generation runs, an alarm looks after it this often, ms: the longest a killed one stays unnoticed.
pub const WATCH_MS: i64 = 30_000;

fn broken(cause: SqlError) -> ApiError {
    log::error("session", "", &cause);
    ApiError::internal()
}

/// Decides a turn: which session, which prompt, which model. Reads rows, writes none.
///
/// # Errors
/// 404 for what is not there, 409 for an archived session, 400 for what does not fit or make sense.
pub fn prepare(sql: &Sql, config: &Config, caller: &Caller, session_id: &str, turn: &Turn, now_ms: i64) -> Result<Job, ApiError> {
    let stored = store::session(sql).map_err(broken)?.map(|(session, _)| session);
    let (session, draft) = match (stored, &turn.kind) {
        (Some(session), _) => (session, None),
        (None, TurnKind::Ask { create: true, project_id, .. }) => {
            let session = Session::new(session_id, &caller.user_id, project_id.clone(), now_ms);
            (session.clone(), Some(session))
        }
        (None, _) => return Err(ApiError::not_found("会话")),
    };
    match session.status {
        Status::Active => {}
        Status::Archived => return Err(ApiError::conflict("会话已归档，恢复后才能继续对话")),
        Status::Deleted => return Err(ApiError::not_found("会话")),
    }
    let plan = turn::plan(config, &session.settings, &turn.options)?;
    let target = target(sql, &turn.kind)?;
    let system = plan.system_prompt.as_deref();
    let mut window = Window::new(plan.model.context_window, plan.max_output, system, &target.question)?;
    if target.history_from.is_empty() {
        if let TurnKind::Ask { history, .. } = &turn.kind {
            turn::client_history(history, &target.question).into_iter().all(|message| window.take(message));
        }
    } else {
        store::walk_up(sql, &target.history_from, |message| window.take(message)).map_err(broken)?;
    }
    let prompt = window.finish();
    let context_used = prompt.len() > 1;
    let question = target.new_question.map(|content| Question { id: ids::new_id(now_ms), content });
    let pending = Pending { draft, question, parent_id: target.parent_id, context_used };
    job(session_id, caller, &plan, prompt, &pending, now_ms)
}

/// Where in the tree a turn goes.
struct Target {
    /// The newest message of the prompt.
    question: String,
    /// The question's row, when it is a new one.
    new_question: Option<String>,
    /// What the new row follows.
    parent_id: String,
    /// Where the history of the prompt ends; empty: nowhere.
    history_from: String,
}

fn target(sql: &Sql, kind: &TurnKind) -> Result<Target, ApiError> {
    let find = |id: &str| store::message(sql, id).map_err(broken)?.ok_or_else(|| ApiError::not_found("消息"));
    match kind {
        TurnKind::Ask { content, .. } => {
            let leaf = store::leaf(sql).map_err(broken)?.map(|leaf| leaf.id).unwrap_or_default();
            Ok(Target {
                question: content.clone(),
                new_question: Some(content.clone()),
                parent_id: leaf.clone(),
                history_from: leaf,
            })
        }
        TurnKind::Edit { message_id, content } => {
            let old = find(message_id)?;
            if old.role != "user" {
                return Err(ApiError::invalid_operation("只能修改自己的提问，回答请使用重新生成"));
            }
            let parent_id = old.parent_id;
            Ok(Target {
                question: content.clone(),
                new_question: Some(content.clone()),
                parent_id: parent_id.clone(),
                history_from: parent_id,
            })
        }
        TurnKind::Again { message_id } => {
            let named = find(message_id)?;
            let question = if named.role == "user" { named } else { find(&named.parent_id)? };
            Ok(Target {
                question: question.content,
                new_question: None,
                parent_id: question.id,
                history_from: question.parent_id,
            })
        }
    }
}

fn job(
    session_id: &str,
    caller: &Caller,
    plan: &Plan,
    prompt: Vec<crate::llm::PromptMessage>,
    pending: &Pending,
    now_ms: i64,
) -> Result<Job, ApiError> {
    let (prompt_upper, prompt_typical) = prompt_tokens(&prompt);
    Ok(Job {
        ids: Ids { session_id: Some(session_id.to_owned()), message_id: ids::new_id(now_ms), request_id: ids::new_id(now_ms) },
        caller: caller.clone(),
        service: Service::Chat,
        hold_id: ids::new_id(now_ms),
        watcher: Watcher { binding: super::BINDING.to_owned(), object: super::object_name(&caller.user_id, session_id) },
        started_at: now_ms,
        model: plan.model.id.clone(),
        upstream: plan.model.upstream.clone(),
        context_window: plan.model.context_window,
        price: plan.model.price,
        prompt_upper,
        prompt_typical,
        max_output: plan.max_output,
        sampling: plan.sampling,
        prompt,
        owner: serde_json::to_value(pending).map_err(|_| ApiError::internal())?,
    })
}

/// Whether a job's prompt held more than the question: `contextUsed` of the answer.
#[must_use]
pub fn context_used(job: &Job) -> bool {
    serde_json::from_value::<Pending>(job.owner.clone()).is_ok_and(|pending| pending.context_used)
}

impl Desk {
    /// The desk of `state`'s object.
    #[must_use]
    pub fn new(state: Rc<State>, env: Env) -> Self {
        Self { sql: Sql::of(&state), env, state, armed_at: Cell::new(0) }
    }

    /// The alarm has fired: none is set now.
    pub fn alarm_fired(&self) {
        self.armed_at.set(0);
    }

    /// Sets the alarm to `wait_ms` from now, unless it is set earlier already.
    pub fn arm(&self, wait_ms: i64) -> impl Future<Output = ()> + use<> {
        let (now_ms, armed) = (clock::now_ms(), self.armed_at.get());
        let needed = armed <= now_ms || armed > now_ms + wait_ms;
        if needed {
            self.armed_at.set(now_ms + wait_ms);
        }
        let storage = self.state.storage();
        async move {
            let wait = Duration::from_millis(u64::try_from(wait_ms).unwrap_or(0));
            if needed && let Err(cause) = storage.set_alarm(wait).await {
                log::error("session_arm", "", &cause);
            }
        }
    }

    /// Changes the session in one commit, with a new revision.
    ///
    /// # Errors
    /// When SQLite refuses, or there is no session.
    pub fn change(&self, change: impl FnOnce(&mut Session)) -> Result<Option<Session>, SqlError> {
        let Some((mut session, _)) = store::session(&self.sql)? else { return Ok(None) };
        change(&mut session);
        session.rev += 1;
        session.updated_at = clock::now_ms();
        store::save(&self.sql, &session)?;
        Ok(Some(session))
    }

    /// Brings the list in D1 up to date, if it is behind.
    ///
    /// # Errors
    /// When D1 or SQLite refuses; the alarm tries again.
    pub async fn index(&self) -> worker::Result<()> {
        let Some((session, indexed)) = store::session(&self.sql).map_err(|e| worker::Error::RustError(e.to_string()))? else {
            return Ok(());
        };
        if session.rev > indexed {
            index::upsert(&self.env, &session).await?;
            store::indexed(&self.sql, session.rev).map_err(|e| worker::Error::RustError(e.to_string()))?;
        }
        Ok(())
    }

    fn write_begun(sql: &Sql, job: &Job) -> Result<(), SqlError> {
        let pending: Pending = serde_json::from_value(job.owner.clone())?;
        let now_ms = clock::now_ms();
        let mut parent = store::message(sql, &pending.parent_id)?;
        let mut session = match (store::session(sql)?, pending.draft) {
            (Some((session, _)), _) | (None, Some(session)) => session,
            (None, None) => return Ok(()),
        };
        if let Some(question) = pending.question {
            let row = store::below(parent.as_ref(), &question.id, "user", &question.content, now_ms);
            store::append(sql, &row)?;
            if !session.title_set && row.depth == 0 && session.title == UNTITLED {
                session.title = turn::title_of(&row.content);
            }
            parent = Some(row);
        }
        let answer = store::below(parent.as_ref(), &job.ids.message_id, "assistant", "", now_ms);
        let length = u64::try_from(answer.depth + 1).unwrap_or(0);
        store::append(sql, &Message { model: Some(job.model.clone()), ..answer })?;
        session.message_count = length;
        session.rev += 1;
        session.updated_at = now_ms;
        session.last_message_at = Some(now_ms);
        store::save(sql, &session)
    }
}

impl Owner for Desk {
    fn begun(&self, job: &Job) -> Result<(), SqlError> {
        Self::write_begun(&self.sql, job)?;
        self.state.wait_until(self.arm(WATCH_MS));
        // A session made by this turn is listed while its first answer still runs.
        if let Ok(Some((_, 0))) = store::session(&self.sql) {
            let desk = Self::new(self.state.clone(), self.env.clone());
            self.state.wait_until(async move {
                if let Err(cause) = desk.index().await {
                    log::error("index", "", &cause);
                }
            });
        }
        Ok(())
    }

    fn ended(&self, job: &Job, text: &str, reasoning: &str, ending: &Ending) -> Result<(), SqlError> {
        let used = ending.usage.map_or(0, |usage| usage.total());
        let written =
            Written { content: text, reasoning, status: ending.status(), finish_reason: &ending.finish_reason, token_used: used };
        store::finish(&self.sql, &job.ids.message_id, &written)?;
        self.change(|session| {
            session.token_count = session.token_count.saturating_add(used);
            session.last_message_at = Some(clock::now_ms());
        })
        .map(|_| ())
    }

    fn publish(self: Rc<Self>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            if let Err(cause) = self.index().await {
                log::error("index", "", &cause);
            }
        })
    }
}
