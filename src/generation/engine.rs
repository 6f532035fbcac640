//! The engine: takes the hold, calls the provider, pumps its stream into log and message, settles, tells the end.
//!
//! It runs in the owning object's `wait_until`, never in a client's request: whoever watches may leave. Invariants:
//! - nothing is called before the hold stands, and every way out resolves the hold (a kill before the provider has begun
//!   leaves no row: that hold lapses);
//! - a client's HTTP answer begins only after the provider's first event, so that its failures get a real status;
//! - the log is durable at most a second behind what was sent, and complete before the end is told;
//! - the text and how it ended are saved before the charge, the charge is made before the end is told; a kill anywhere
//!   leaves a row from which [`Engine::recover`] goes on.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;

use futures::future::{Either, LocalBoxFuture, join, select};
use worker::{Env, State};

use super::event::Event;
use super::live::{Finished, Live};
use super::pump::{self, Primed, Pump, ending, refusal};
use super::store::{self, IdempotencyKey, Row};
use super::{Ending, Job, meter};
use crate::config::Config;
use crate::error::ApiError;
use crate::llm::answer::Answer;
use crate::llm::client;
use crate::llm::{ChatRequest, tokens};
use crate::platform::sql::{Sql, SqlError};
use crate::platform::{clock, log};
use crate::quota::client::LedgerClient;
use crate::quota::{Crossing, EndReason, Reserve, Usage};

/// A hold's first term, ms: a kill before the provider has begun leaves no row that could free it, so it lapses soon.
const FIRST_TERM_MS: i64 = 45_000;
/// A refused caller waits at most this for the hold to be freed, ms.
const RELEASE_MS: u64 = 500;
/// The index in D1 may delay the end of a stream by at most this, ms.
const PUBLISH_MS: u64 = 2_000;
/// Ids above the stored log that an interrupted generation may have sent: an answer has at most 2^20 bytes and every
/// event at least one, so the end told after a kill lies above any id sent before it.
const UNSTORED_IDS_MAX: u64 = (1 << 20) + 64;

/// What an owner does with a generation's text. The calls are synchronous: each is one commit with the engine's rows.
pub trait Owner {
    /// The provider has begun: make the messages.
    ///
    /// # Errors
    /// When they cannot be written.
    fn begun(&self, job: &Job) -> Result<(), SqlError>;
    /// It has ended: save the text and how.
    ///
    /// # Errors
    /// When it cannot be written.
    fn ended(&self, job: &Job, text: &str, reasoning: &str, ending: &Ending) -> Result<(), SqlError>;
    /// Bring indexes up to date; may fail quietly, the owner tries again.
    fn publish(self: Rc<Self>) -> LocalBoxFuture<'static, ()>;
}

/// The engine of one object.
pub struct Engine {
    /// For work beside a request.
    pub(super) state: Rc<State>,
    pub(super) env: Env,
    pub(super) sql: Sql,
    lives: RefCell<HashMap<String, Rc<Live>>>,
}

impl Engine {
    /// The engine of `state`'s object.
    #[must_use]
    pub fn new(state: Rc<State>, env: Env) -> Rc<Self> {
        let sql = Sql::of(&state);
        Rc::new(Self { state, env, sql, lives: RefCell::new(HashMap::new()) })
    }

    /// The living generation of that id, if this instance runs it.
    #[must_use]
    pub fn live(&self, id: &str) -> Option<Rc<Live>> {
        self.lives.borrow().get(id).cloned()
    }

    /// Tells every living generation's readers that thresholds were crossed, by another generation of the same user.
    pub fn tell(&self, crossings: &[Crossing]) {
        for live in self.lives.borrow().values() {
            live.announce(crossings);
        }
    }

    /// A generation to read from: the living one, or its log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn attach(&self, row: &Row) -> Result<Rc<Live>, SqlError> {
        if let Some(live) = self.live(&row.job.ids.request_id) {
            return Ok(live);
        }
        let events = store::log(&self.sql, &row.job.ids.request_id)?;
        let ending = row.ending.clone().unwrap_or_else(|| interrupted(None));
        let finished = Finished { text: text_of(&events), ending, charged: row.charged };
        Ok(Live::replay(row.job.ids.clone(), events, finished))
    }

    /// Starts `job`, which runs whether or not anybody stays to watch. Until the provider has begun it leaves no trace
    /// but its hold: a kill before that undoes it, and the hold lapses.
    pub fn start(self: &Rc<Self>, owner: Rc<dyn Owner>, job: Job, key: Option<IdempotencyKey>, hold_ttl_ms: i64) -> Rc<Live> {
        let hold = LedgerClient::of(&self.env, &job.caller).reserve(reservation(&job, hold_ttl_ms.min(FIRST_TERM_MS)));
        let live = self.register(&job, key);
        let (engine, shared) = (self.clone(), live.clone());
        self.state.wait_until(async move { engine.run(owner, job, shared, hold).await });
        live
    }

    /// The generation that this instance runs now, if any.
    #[must_use]
    pub fn busy(&self) -> Option<Rc<Live>> {
        self.lives.borrow().values().next().cloned()
    }

    fn register(&self, job: &Job, key: Option<IdempotencyKey>) -> Rc<Live> {
        let live = Live::new(job.ids.clone(), key);
        self.lives.borrow_mut().insert(job.ids.request_id.clone(), live.clone());
        live
    }

    /// Takes up what an earlier instance left: interrupted generations are closed and charged for what they had
    /// delivered, unfinished settlements are finished. Synchronous up to the charge, which runs by itself.
    ///
    /// # Errors
    /// When rows cannot be read or written.
    pub fn recover(self: &Rc<Self>, owner: &Rc<dyn Owner>) -> Result<(), SqlError> {
        for row in store::unfinished(&self.sql)? {
            let id = row.job.ids.request_id.clone();
            if self.live(&id).is_some() {
                continue;
            }
            let events = store::log(&self.sql, &id)?;
            let text = text_of(&events);
            let last = events.last().map_or(0, |(seq, _)| *seq);
            let (ending, next_seq) = match (row.state.as_str(), row.ending) {
                ("unsettled", Some(ending)) => {
                    self.settle_later(row.job, ending);
                    continue;
                }
                (_, Some(ending)) => (ending, last + 1),
                (_, None) => {
                    let ending = interrupted(estimate(&row.job, &text, &events));
                    self.save_end(owner, &row.job, &text, "", &ending)?;
                    (ending, last + UNSTORED_IDS_MAX)
                }
            };
            let live = self.register(&row.job, None);
            live.append(&events);
            let (engine, owner) = (self.clone(), owner.clone());
            self.state.wait_until(async move { engine.conclude(owner, row.job, live, text, ending, next_seq).await });
        }
        Ok(())
    }

    fn settle_later(self: &Rc<Self>, job: Job, ending: Ending) {
        let engine = self.clone();
        self.state.wait_until(async move {
            let (charged, _) = engine.charge(&job, &ending).await;
            if let Err(cause) = store::told(&engine.sql, &job.ids.request_id, charged) {
                log::error("settle_later", &job.ids.request_id, &cause);
            }
        });
    }

    /// One commit: the text and how it ended.
    fn save_end(&self, owner: &Rc<dyn Owner>, job: &Job, text: &str, reasoning: &str, ending: &Ending) -> Result<(), SqlError> {
        let (owner, sql, job, ending) = (owner.clone(), self.sql.clone(), job.clone(), ending.clone());
        let (text, reasoning) = (text.to_owned(), reasoning.to_owned());
        self.sql.transaction(move || {
            owner.ended(&job, &text, &reasoning, &ending)?;
            store::ended(&sql, &job.ids.request_id, &ending, clock::now_ms())
        })
    }

    async fn run(
        self: Rc<Self>,
        owner: Rc<dyn Owner>,
        job: Job,
        live: Rc<Live>,
        hold: impl Future<Output = Result<u64, ApiError>>,
    ) {
        let id = job.ids.request_id.clone();
        let primed = match self.prime(&job, &live, hold).await {
            Ok(primed) => self.begin(&owner, &job, &live).map(|()| primed).map_err(|cause| {
                log::error("begin", &id, &cause);
                ApiError::internal()
            }),
            Err(error) => Err(error),
        };
        match primed {
            Ok(primed) => self.pump(owner, job, live, primed).await,
            Err(error) => {
                self.lives.borrow_mut().remove(&id);
                if [3010, 3011].contains(&error.code) {
                    return live.refuse(error);
                }
                // The hold may stand. Its end is waited for a moment, so that a retry finds the tokens free, but not for
                // a ledger that is away: what cannot be freed lapses.
                let ledger = LedgerClient::of(&self.env, &job.caller);
                let mut release = Box::pin(ledger.release(&job.hold_id));
                let freed = clock::within(RELEASE_MS, release.as_mut()).await;
                live.refuse(error);
                let freed = match freed {
                    Some(freed) => freed,
                    None => release.await,
                };
                if let Err(cause) = freed {
                    log::error("release", &id, &cause);
                }
            }
        }
    }

    /// Waits for the hold, calls the provider and waits for its first event.
    async fn prime(&self, job: &Job, live: &Live, hold: impl Future<Output = Result<u64, ApiError>>) -> Result<Primed, ApiError> {
        let config = Config::of(&self.env)?;
        let granted = hold.await?;
        let request = ChatRequest::new(job.upstream.clone(), job.prompt.clone(), granted, job.sampling);
        let first_event = async {
            let connection = client::open(&config, &request, &job.ids.request_id).await?;
            let (mut answer, mut pieces, mut result) = (Answer::of_tokens(granted), Vec::new(), Ok(()));
            while answer.events == 0 && result.is_ok() {
                let Some(bytes) = connection.next().await? else { break };
                result = answer.feed(&bytes, |piece| pieces.push(piece.to_owned()));
            }
            // What came before a break is delivered; a break with nothing before it is a refusal.
            if let (Err(broken), true) = (&result, pieces.is_empty()) {
                return Err(refusal(broken));
            }
            if answer.events == 0 {
                return Err(ApiError::provider_bad_answer("the model service ended without an event"));
            }
            Ok(Primed { source: Ok(connection), answer, pieces, result })
        };
        let limit_ms = u64::try_from(config.stream_idle_ms).unwrap_or(30_000);
        let first_event = self.holding(job, &config, clock::within(limit_ms, first_event));
        match select(std::pin::pin!(first_event), std::pin::pin!(live.stopped())).await {
            Either::Left((Some(primed), _)) => primed,
            Either::Left((None, _)) => Err(ApiError::provider_timeout()),
            Either::Right((wish, _)) => Ok(Primed::stopped(wish)),
        }
    }

    /// Waits for `work`, renewing the hold meanwhile.
    async fn holding<T>(&self, job: &Job, config: &Config, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match select(work.as_mut(), clock::sleep_ms(pump::renew_every_ms(config).min(pump::FIRST_RENEWAL_MS))).await {
                Either::Left((done, _)) => return done,
                Either::Right(_) => self.renew(job, config.hold_ttl_ms),
            }
        }
    }

    /// Renews the hold, beside whatever runs.
    pub(super) fn renew(&self, job: &Job, ttl_ms: i64) {
        let renewed = LedgerClient::of(&self.env, &job.caller).renew(&job.hold_id, ttl_ms);
        let id = job.ids.request_id.clone();
        self.state.wait_until(async move {
            match renewed.await {
                Ok(true) => {}
                Ok(false) => log::error("renew", &id, &"the hold has expired: what follows will be written off"),
                Err(cause) => log::error("renew", &id, &cause),
            }
        });
    }

    /// One commit: the messages are there, the generation runs.
    fn begin(&self, owner: &Rc<dyn Owner>, job: &Job, live: &Live) -> Result<(), SqlError> {
        let meta = [(1, Event::Meta { model: job.model.clone() })];
        let (owner, sql, job, key, first) = (owner.clone(), self.sql.clone(), job.clone(), live.key.clone(), meta.clone());
        self.sql.transaction(move || {
            owner.begun(&job)?;
            store::insert(&sql, &job, key.as_ref(), clock::now_ms())?;
            store::append(&sql, &job.ids.request_id, &first)
        })?;
        live.append(&meta);
        Ok(())
    }

    async fn pump(self: Rc<Self>, owner: Rc<dyn Owner>, job: Job, live: Rc<Live>, primed: Primed) {
        let mut pump = Pump::new(&self, &job, &live, primed.answer);
        pump.deliver(primed.pieces);
        let outcome = match primed.source {
            Ok(connection) => pump.read(connection, primed.result).await,
            Err(wish) => pump::Outcome::Stopped(wish),
        };
        let (answer, logged, next_seq) = (pump.finish(), pump.flush(clock::now_ms()), pump.next_seq);
        let ending = ending(&job, &answer, &outcome);
        let saved = logged.and_then(|()| self.save_end(&owner, &job, &answer.text, &answer.reasoning, &ending));
        if let Err(cause) = saved {
            // Not saved is not ended: the row still says that it runs, and the alarm's recovery closes it from the log.
            log::error("save_answer", &job.ids.request_id, &cause);
            self.lives.borrow_mut().remove(&job.ids.request_id);
            let error = ApiError::interrupted();
            live.append(&[(next_seq, Event::error(&error))]);
            let ending = interrupted(None);
            live.end(Finished { text: answer.text, ending, charged: 0 });
            return;
        }
        self.conclude(owner, job, live, answer.text, ending, next_seq).await;
    }

    /// Charges, tells the end, forgets the living state. The text and the ending are saved by now.
    async fn conclude(
        self: Rc<Self>,
        owner: Rc<dyn Owner>,
        job: Job,
        live: Rc<Live>,
        text: String,
        ending: Ending,
        next_seq: u64,
    ) {
        let publish = clock::within(PUBLISH_MS, owner.publish());
        let charge = self.charge(&job, &ending);
        let ((charged, crossings), _) = match Config::of(&self.env) {
            Ok(config) => join(self.holding(&job, &config, charge), publish).await,
            Err(_) => join(charge, publish).await,
        };
        let terminal = match &ending.error {
            Some(error) => Event::error(error),
            None => Event::Done {
                finish: ending.finish_reason.clone(),
                model: job.model.clone(),
                usage: Box::new(ending.usage.unwrap_or_default()),
            },
        };
        // What others crossed since the pump last looked is told, too.
        let crossings = live.take_news().into_iter().chain(crossings);
        let last = crossings.map(|crossing| Event::Quota(Box::new(crossing))).chain([terminal]);
        let events: Vec<(u64, Event)> = (next_seq..).zip(last).collect();
        let id = &job.ids.request_id;
        if let Err(cause) = store::append(&self.sql, id, &events).and_then(|()| store::told(&self.sql, id, charged)) {
            log::error("tell_end", id, &cause);
        }
        self.lives.borrow_mut().remove(id);
        live.append(&events);
        live.end(Finished { text, ending, charged: charged.unwrap_or(0) });
    }

    /// Settles or releases the hold; `None` when the ledger stayed unreachable (the owner's alarm tries again).
    async fn charge(&self, job: &Job, ending: &Ending) -> (Option<u64>, Vec<Crossing>) {
        let ledger = LedgerClient::of(&self.env, &job.caller);
        let outcome = match ending.usage {
            Some(usage) => ledger
                .settle(&job.hold_id, usage, ending.reason, ending.duration_ms)
                .await
                .map(|done| (done.charged, done.crossings)),
            None => ledger.release(&job.hold_id).await.map(|()| (0, Vec::new())),
        };
        match outcome {
            Ok((charged, crossings)) => (Some(charged), crossings),
            // The ledger answered and will not change its mind: the hold is gone, nothing can be charged.
            Err(error) if error.details.is_some() => {
                log::error("settle_refused", &job.ids.request_id, &error);
                (Some(0), Vec::new())
            }
            Err(error) => {
                log::error("settle", &job.ids.request_id, &error);
                (None, Vec::new())
            }
        }
    }
}

fn reservation(job: &Job, ttl_ms: i64) -> Reserve {
    Reserve {
        hold_id: job.hold_id.clone(),
        request_id: job.ids.request_id.clone(),
        message_id: job.ids.message_id.clone(),
        watcher: Some(job.watcher.clone()),
        service: job.service,
        model: job.model.clone(),
        price: job.price,
        prompt_tokens: job.prompt_upper,
        output_tokens: job.max_output,
        ttl_ms,
    }
}

fn interrupted(usage: Option<Usage>) -> Ending {
    Ending {
        reason: EndReason::Interrupted,
        finish_reason: "interrupted".to_owned(),
        usage,
        duration_ms: 0,
        error: Some(ApiError::interrupted()),
    }
}

fn text_of(events: &[(u64, Event)]) -> String {
    events.iter().filter_map(|(_, event)| if let Event::Delta(text, _) = event { Some(text.as_str()) } else { None }).collect()
}

fn estimate(job: &Job, text: &str, events: &[(u64, Event)]) -> Option<Usage> {
    let deltas = events.iter().filter(|(_, event)| matches!(event, Event::Delta(..))).count() as u64;
    (!text.is_empty()).then(|| meter::estimate(text, "", deltas, job.prompt_typical, false))
}

/// Upper estimate of a prompt for the hold, and a close one for the charge, in tokens.
#[must_use]
pub fn prompt_tokens(prompt: &[crate::llm::PromptMessage]) -> (u64, u64) {
    (tokens::upper_prompt(prompt), tokens::typical_prompt(prompt))
}
