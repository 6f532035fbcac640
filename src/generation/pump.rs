//! The loop between the provider and the log: reads windows of bytes, appends events, keeps the clocks.
//!
//! Invariants: what is sent is durable at most a second later; the idle clock counts the provider's data events only, so
//! that comments cannot hide a stall; a wish to stop ends the loop at once, and dropping the connection closes it.

use futures::future::{Either, select};

use super::engine::Engine;
use super::event::Event;
use super::live::{Live, StopWish};
use super::{Ending, Job, meter, store};
use crate::config::Config;
use crate::error::ApiError;
use crate::llm::answer::{Answer, Broken};
use crate::llm::client::{self, Connection};
use crate::platform::sql::SqlError;
use crate::platform::{clock, log};
use crate::quota::EndReason;

/// The pump looks at its clocks this often, ms: the grain of every limit below.
const TICK_MS: u64 = 200;
/// Events are made durable at least this often, ms.
const FLUSH_MS: i64 = 800;
/// A running generation renews its hold this often, ms.
const RENEW_MS: i64 = 60_000;
/// The first renewal, ms after the start at the latest.
pub const FIRST_RENEWAL_MS: u64 = 15_000;
/// After the provider's `finish_reason`, usage and `[DONE]` may take this long, ms.
const TAIL_MS: i64 = 5_000;

/// A provider that has begun, and what it has said so far.
pub struct Primed {
    /// Where more comes from; the wish that stopped it before the provider answered.
    pub source: Result<Connection, StopWish>,
    /// What it said.
    pub answer: Answer,
    /// The same as pieces of text.
    pub pieces: Vec<String>,
    /// Whether it broke off already.
    pub result: Result<(), Broken>,
}

impl Primed {
    /// Stopped before the provider answered: nothing was said.
    #[must_use]
    pub fn stopped(wish: StopWish) -> Self {
        Self { source: Err(wish), answer: Answer::of_tokens(0), pieces: Vec::new(), result: Ok(()) }
    }
}

/// How often a hold is renewed, ms: every minute, more often where it lapses sooner.
#[must_use]
pub fn renew_every_ms(config: &Config) -> u64 {
    u64::try_from(RENEW_MS.min(config.hold_ttl_ms / 3).max(1)).unwrap_or(60_000)
}

/// Why the pump stopped reading.
pub enum Outcome {
    /// The provider said that it is complete.
    Complete,
    /// Somebody wished the end.
    Stopped(StopWish),
    /// The provider was silent too long.
    Stalled,
    /// The stream broke off.
    Broken(Broken),
}

/// The loop's state.
pub struct Pump<'a> {
    engine: &'a Engine,
    job: &'a Job,
    live: &'a Live,
    answer: Answer,
    /// Events of the log that are durable; those after them are only sent.
    durable: usize,
    /// The id of the next event.
    pub next_seq: u64,
    delivered: u64,
    flushed_at: i64,
    heard_at: i64,
    beat_at: i64,
    /// When the hold was renewed; the first time comes sooner, because its first term is short.
    renewed_at: Option<i64>,
    started_at: i64,
    finish_at: Option<i64>,
}

impl<'a> Pump<'a> {
    /// A loop for `job`, after the provider's first event.
    pub fn new(engine: &'a Engine, job: &'a Job, live: &'a Live, answer: Answer) -> Self {
        let now = clock::now_ms();
        Self {
            engine,
            job,
            live,
            answer,
            // The meta event is written with the messages.
            durable: 1,
            next_seq: 2,
            delivered: 0,
            flushed_at: now,
            heard_at: now,
            beat_at: now,
            renewed_at: None,
            started_at: now,
            finish_at: None,
        }
    }

    /// Reads to the end, whatever it is.
    pub async fn read(&mut self, connection: Connection, so_far: Result<(), Broken>) -> Outcome {
        let Ok(config) = Config::of(&self.engine.env) else { return Outcome::Stalled };
        if let Err(outcome) = self.check(so_far) {
            return outcome;
        }
        let mut next = Box::pin(connection.next());
        let mut wait = Box::pin(select(Box::pin(self.live.stopped()), clock::sleep_ms(TICK_MS)));
        loop {
            match select(next.as_mut(), wait.as_mut()).await {
                Either::Left((Ok(Some(bytes)), _)) => {
                    if let Err(outcome) = self.take(&bytes) {
                        return outcome;
                    }
                    next = Box::pin(connection.next());
                }
                Either::Left((Ok(None), _)) => {
                    return self.answer.end().map_or_else(Outcome::Broken, |()| Outcome::Complete);
                }
                Either::Left((Err(_), _)) => {
                    // Some providers reset instead of closing: what they had called complete is complete.
                    return self.answer.end().map_or_else(Outcome::Broken, |()| Outcome::Complete);
                }
                Either::Right((Either::Left((wish, _)), _)) => return Outcome::Stopped(wish),
                Either::Right((Either::Right(_), _)) => {
                    if let Some(outcome) = self.tick(&config) {
                        return outcome;
                    }
                    wait = Box::pin(select(Box::pin(self.live.stopped()), clock::sleep_ms(TICK_MS)));
                }
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Outcome> {
        let (mut pieces, events) = (Vec::new(), self.answer.events);
        let result = self.answer.feed(bytes, |piece| pieces.push(piece.to_owned()));
        if self.answer.events > events {
            self.heard_at = clock::now_ms();
        }
        self.deliver(pieces);
        self.check(result)
    }

    fn check(&mut self, result: Result<(), Broken>) -> Result<(), Outcome> {
        result.map_err(Outcome::Broken)?;
        if self.answer.done {
            return Err(Outcome::Complete);
        }
        if self.answer.finish.is_some() && self.finish_at.is_none() {
            self.finish_at = Some(clock::now_ms());
        }
        Ok(())
    }

    /// Appends pieces of text as events.
    pub fn deliver(&mut self, pieces: Vec<String>) {
        let events = pieces.into_iter().map(|piece| {
            self.delivered += 1;
            Event::Delta(piece, self.delivered)
        });
        let events: Vec<Event> = events.collect();
        self.append(events);
    }

    fn append(&mut self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        let first = self.next_seq;
        self.next_seq += events.len() as u64;
        self.live.extend((first..).zip(events));
        let now = clock::now_ms();
        self.beat_at = now;
        if now - self.flushed_at >= FLUSH_MS {
            self.flush_or_log(now);
        }
    }

    /// Makes what was sent durable.
    ///
    /// # Errors
    /// When SQLite refuses; it is tried again with what comes next.
    pub fn flush(&mut self, now: i64) -> Result<(), SqlError> {
        self.flushed_at = now;
        let id = &self.job.ids.request_id;
        let sent = self.live.after(self.durable, |events| store::append(&self.engine.sql, id, events).map(|()| events.len()))?;
        self.durable += sent;
        Ok(())
    }

    fn flush_or_log(&mut self, now: i64) {
        if let Err(cause) = self.flush(now) {
            log::error("flush", &self.job.ids.request_id, &cause);
        }
    }

    fn tick(&mut self, config: &Config) -> Option<Outcome> {
        self.append(self.live.take_news().into_iter().map(|crossing| Event::Quota(Box::new(crossing))).collect());
        let now = clock::now_ms();
        if now - self.flushed_at >= FLUSH_MS {
            self.flush_or_log(now);
        }
        if now - self.beat_at >= config.heartbeat_ms {
            self.beat_at = now;
            self.live.beat();
        }
        let due = match self.renewed_at {
            Some(at) => at.saturating_add_unsigned(renew_every_ms(config)),
            None => self.started_at.saturating_add_unsigned(renew_every_ms(config).min(FIRST_RENEWAL_MS)),
        };
        if now >= due {
            self.renewed_at = Some(now);
            self.engine.renew(self.job, config.hold_ttl_ms);
        }
        if self.finish_at.is_some_and(|at| now - at >= TAIL_MS.min(config.stream_idle_ms)) {
            return Some(Outcome::Complete);
        }
        (now - self.heard_at >= config.stream_idle_ms).then_some(Outcome::Stalled)
    }

    /// Hands over the answer.
    pub fn finish(&mut self) -> Answer {
        std::mem::replace(&mut self.answer, Answer::of_tokens(0))
    }
}

/// How a generation ended, what it is charged, and the error it ends with, if any.
pub fn ending(job: &Job, answer: &Answer, outcome: &Outcome) -> Ending {
    let (reason, finish_reason, error) = match outcome {
        Outcome::Complete => (EndReason::Finish, answer.finish.as_deref().unwrap_or("stop"), None),
        Outcome::Stopped(StopWish::Author) => (EndReason::Stop, "stopped", None),
        Outcome::Stopped(StopWish::Time) => (EndReason::Time, "time", None),
        Outcome::Stalled => (EndReason::Stall, "error", Some(ApiError::provider_timeout())),
        Outcome::Broken(Broken::Cut) => (EndReason::Cut, "error", Some(refusal(&Broken::Cut))),
        Outcome::Broken(broken) => (EndReason::ProviderError, "error", Some(refusal(broken))),
    };
    let usage = meter::usage(answer, job.prompt_typical, job.context_window);
    let duration_ms = u64::try_from(clock::now_ms() - job.started_at).unwrap_or(0);
    Ending { reason, finish_reason: finish_reason.to_owned(), usage, duration_ms, error }
}

/// What a broken-off stream means to a caller.
#[must_use]
pub fn refusal(broken: &Broken) -> ApiError {
    match broken {
        Broken::ProviderError(status) => client::error_of_status(*status),
        Broken::Unreadable(why) => ApiError::provider_bad_answer(why),
        Broken::Cut => ApiError::provider_bad_answer("the model service ended without saying that it was complete"),
    }
}
