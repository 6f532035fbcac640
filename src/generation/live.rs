//! A running generation as those who watch it see it: its log in memory, its phase, and the wish to stop it.
//!
//! One writer (the engine's pump), any number of readers (streams, waiting callers), all in one object's thread.
//! Invariant: events are appended in order and never changed; a reader holds a position, not a queue, so a slow reader
//! costs no memory of its own and gets larger writes later; no borrow lives across an await. PURE.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use futures::Stream;

use super::event::{Event, Mode, Renderer};
use super::store::IdempotencyKey;
use super::{Ending, Ids};
use crate::error::ApiError;
use crate::quota::Crossing;

/// Most bytes of one write to a client: what a slow reader makes us hold.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// Where a generation stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// The provider has not answered yet.
    Starting,
    /// Text is coming.
    Streaming,
    /// It failed before its first event: an HTTP error, no stream.
    Refused(ApiError),
    /// It ended; the last event is in the log.
    Ended(Box<Finished>),
}

/// What callers who wait for the whole answer get.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The text.
    pub text: String,
    /// How it ended.
    pub ending: Ending,
    /// Tokens charged; less than the usage where some was written off.
    pub charged: u64,
}

/// Who wishes the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopWish {
    /// The author.
    Author,
    /// A caller whose time is up.
    Time,
}

struct Inner {
    phase: Phase,
    events: Vec<(u64, Event)>,
    beats: u64,
    stop: Option<StopWish>,
    /// Thresholds another generation of the same user crossed, for the pump to log.
    news: Vec<Crossing>,
    /// Readers and waiting callers.
    watchers: Vec<Waker>,
    /// The pump, waiting for a wish to stop: woken by that alone.
    stoppers: Vec<Waker>,
}

impl Inner {
    fn new(phase: Phase, events: Vec<(u64, Event)>) -> RefCell<Self> {
        RefCell::new(Self { phase, events, beats: 0, stop: None, news: Vec::new(), watchers: Vec::new(), stoppers: Vec::new() })
    }
}

/// Remembers whom to wake; the same task only once, however often it looks.
fn remember(wakers: &mut Vec<Waker>, waker: &Waker) {
    if !wakers.iter().any(|known| known.will_wake(waker)) {
        wakers.push(waker.clone());
    }
}

/// A generation's shared state.
pub struct Live {
    /// Its ids.
    pub ids: Ids,
    /// The key that makes a repeated request this generation.
    pub key: Option<IdempotencyKey>,
    inner: RefCell<Inner>,
}

impl Live {
    /// A generation that is about to start.
    #[must_use]
    pub fn new(ids: Ids, key: Option<IdempotencyKey>) -> Rc<Self> {
        Rc::new(Self { ids, key, inner: Inner::new(Phase::Starting, Vec::new()) })
    }

    /// A generation read back from its log: nothing more will come.
    #[must_use]
    pub fn replay(ids: Ids, events: Vec<(u64, Event)>, finished: Finished) -> Rc<Self> {
        Rc::new(Self { ids, key: None, inner: Inner::new(Phase::Ended(Box::new(finished)), events) })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let (answer, watchers) = {
            let mut inner = self.inner.borrow_mut();
            (change(&mut inner), std::mem::take(&mut inner.watchers))
        };
        watchers.into_iter().for_each(Waker::wake);
        answer
    }

    /// Appends events and says that text is coming.
    pub fn append(&self, events: &[(u64, Event)]) {
        self.change(|inner| {
            if inner.phase == Phase::Starting {
                inner.phase = Phase::Streaming;
            }
            inner.events.extend_from_slice(events);
        });
    }

    /// Appends events of a generation that has begun.
    pub fn extend(&self, events: impl IntoIterator<Item = (u64, Event)>) {
        self.change(|inner| inner.events.extend(events));
    }

    /// Shows the events after the first `known` ones.
    pub fn after<T>(&self, known: usize, show: impl FnOnce(&[(u64, Event)]) -> T) -> T {
        show(self.inner.borrow().events.get(known..).unwrap_or_default())
    }

    /// Ends it: the terminal event must have been appended.
    pub fn end(&self, finished: Finished) {
        self.change(|inner| inner.phase = Phase::Ended(Box::new(finished)));
    }

    /// Refuses it: it failed before its first event.
    pub fn refuse(&self, error: ApiError) {
        self.change(|inner| inner.phase = Phase::Refused(error));
    }

    /// Thresholds were crossed elsewhere: the pump will log them.
    pub fn announce(&self, crossings: &[Crossing]) {
        self.inner.borrow_mut().news.extend_from_slice(crossings);
    }

    /// Thresholds that were announced since the last look.
    pub fn take_news(&self) -> Vec<Crossing> {
        std::mem::take(&mut self.inner.borrow_mut().news)
    }

    /// A heartbeat: every reader that has nothing to write writes a comment.
    pub fn beat(&self) {
        self.change(|inner| inner.beats += 1);
    }

    /// Wishes the end; the first wish counts.
    pub fn wish_stop(&self, wish: StopWish) {
        let stoppers = self.change(|inner| {
            inner.stop.get_or_insert(wish);
            std::mem::take(&mut inner.stoppers)
        });
        stoppers.into_iter().for_each(Waker::wake);
    }

    /// Waits for `look` to find something in the state.
    async fn until<T>(&self, mut look: impl FnMut(&Inner) -> Option<T>) -> T {
        poll_fn(|context| {
            let mut inner = self.inner.borrow_mut();
            match look(&inner) {
                Some(found) => Poll::Ready(found),
                None => {
                    remember(&mut inner.watchers, context.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Waits for the wish to stop.
    pub async fn stopped(&self) -> StopWish {
        poll_fn(|context| {
            let mut inner = self.inner.borrow_mut();
            match inner.stop {
                Some(wish) => Poll::Ready(wish),
                None => {
                    remember(&mut inner.stoppers, context.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Waits until the provider has begun.
    ///
    /// # Errors
    /// What it was refused with.
    pub async fn primed(&self) -> Result<(), ApiError> {
        self.until(|inner| match &inner.phase {
            Phase::Starting => None,
            Phase::Refused(error) => Some(Err(error.clone())),
            Phase::Streaming | Phase::Ended(_) => Some(Ok(())),
        })
        .await
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// What it was refused with.
    pub async fn finished(&self) -> Result<Finished, ApiError> {
        self.until(|inner| match &inner.phase {
            Phase::Starting | Phase::Streaming => None,
            Phase::Refused(error) => Some(Err(error.clone())),
            Phase::Ended(finished) => Some(Ok((**finished).clone())),
        })
        .await
    }

    /// A reader's bytes in `mode`: every event whose id is above `after`, then the end.
    /// After an `error` event the stream breaks instead of closing, so that a client cannot take it for complete
    /// (contract 3.5 rule 16).
    #[must_use]
    pub fn stream(self: &Rc<Self>, mode: Mode, after: u64) -> EventStream {
        EventStream {
            live: self.clone(),
            renderer: Renderer::new(mode, self.ids.clone()),
            position: 0,
            after,
            beats: self.inner.borrow().beats,
            state: Reading::Open,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Open,
    Closing,
    Breaking,
}

/// One reader of a [`Live`].
pub struct EventStream {
    live: Rc<Live>,
    renderer: Renderer,
    position: usize,
    after: u64,
    beats: u64,
    state: Reading,
}

impl EventStream {
    fn take(&mut self, out: &mut Vec<u8>) {
        let live = self.live.clone();
        let inner = live.inner.borrow();
        for (seq, event) in inner.events.iter().skip(self.position) {
            if *seq > self.after {
                self.renderer.render(*seq, event, out);
            } else {
                self.renderer.skip(event);
            }
            self.position += 1;
            match event {
                Event::Done { .. } => self.state = Reading::Closing,
                Event::Error { .. } => self.state = Reading::Breaking,
                _ => {}
            }
            if out.len() >= WRITE_BYTES_MAX {
                break;
            }
        }
        let last = inner.events.last().map_or(0, |(seq, _)| *seq);
        if out.is_empty() && self.state != Reading::Open && self.after > last {
            // The client claims events that never were: an empty stream would look complete to it.
            self.renderer.render(self.after.saturating_add(1), &Event::error(&ApiError::beyond_the_log()), out);
            self.state = Reading::Breaking;
        }
        if out.is_empty() && inner.beats > self.beats {
            out.extend_from_slice(b": ping\n\n");
        }
        self.beats = inner.beats;
    }
}

impl Stream for EventStream {
    type Item = Result<Vec<u8>, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut out = Vec::new();
        if self.state == Reading::Open {
            self.take(&mut out);
        }
        if !out.is_empty() {
            return Poll::Ready(Some(Ok(out)));
        }
        match self.state {
            Reading::Closing => Poll::Ready(None),
            Reading::Breaking => {
                self.state = Reading::Closing;
                Poll::Ready(Some(Err(ApiError::interrupted())))
            }
            Reading::Open => {
                remember(&mut self.live.inner.borrow_mut().watchers, context.waker());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;
    use crate::quota::EndReason;

    fn finished() -> Finished {
        let ending =
            Ending { reason: EndReason::Finish, finish_reason: "stop".to_owned(), usage: None, duration_ms: 0, error: None };
        Finished { text: "ab".to_owned(), ending, charged: 0 }
    }

    fn delta(seq: u64) -> (u64, Event) {
        (seq, Event::Delta(format!("t{seq}"), seq))
    }

    fn done(seq: u64) -> (u64, Event) {
        (seq, Event::Done { finish: "stop".to_owned(), model: "m".to_owned(), usage: Box::default() })
    }

    fn text(item: Option<Option<Result<Vec<u8>, ApiError>>>) -> String {
        String::from_utf8(item.unwrap().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn readers_get_every_event_after_theirs_and_then_the_end() {
        let live = Live::new(Ids::default(), None);
        let mut first = live.stream(Mode::Delta, 0);
        let mut second = live.stream(Mode::Delta, 2);
        assert!(first.next().now_or_never().is_none());
        live.append(&[delta(1), delta(2)]);
        assert_eq!(text(first.next().now_or_never()).matches("event: message").count(), 2, "what waits is joined");
        assert!(second.next().now_or_never().is_none());
        live.append(&[delta(3), done(4)]);
        live.end(finished());
        assert_eq!(text(first.next().now_or_never()), text(second.next().now_or_never()));
        assert!(first.next().now_or_never().unwrap().is_none() && second.next().now_or_never().unwrap().is_none());
    }

    #[test]
    fn a_beat_is_a_comment_between_events() {
        let live = Live::new(Ids::default(), None);
        live.append(&[delta(1)]);
        let mut reader = live.stream(Mode::Delta, 0);
        live.beat();
        assert!(text(reader.next().now_or_never()).starts_with("id: 1"), "events come first");
        live.beat();
        assert_eq!(text(reader.next().now_or_never()), ": ping\n\n");
        assert!(reader.next().now_or_never().is_none());
    }

    #[test]
    fn an_error_is_told_and_then_breaks_the_stream() {
        let live = Live::new(Ids::default(), None);
        live.append(&[delta(1), (9, Event::error(&ApiError::provider_timeout()))]);
        live.end(finished());
        let mut reader = live.stream(Mode::Delta, 0);
        assert!(text(reader.next().now_or_never()).contains("event: error"));
        assert!(reader.next().now_or_never().unwrap().unwrap().is_err());
        assert!(reader.next().now_or_never().unwrap().is_none());
        // A client that saw more than was stored (ids 2..9) is told the end all the same.
        let mut beyond = live.stream(Mode::Delta, 5);
        assert!(text(beyond.next().now_or_never()).starts_with("id: 9\nevent: error"));
        let mut claimed = live.stream(Mode::Delta, 70);
        assert!(text(claimed.next().now_or_never()).starts_with("id: 71\nevent: error"));
        let mut told = live.stream(Mode::Delta, 9);
        assert!(told.next().now_or_never().unwrap().unwrap().is_err(), "told before: only broken");
    }

    #[test]
    fn waiting_callers_see_the_phase() {
        let live = Live::new(Ids::default(), None);
        assert!(live.primed().now_or_never().is_none());
        live.wish_stop(StopWish::Time);
        live.wish_stop(StopWish::Author);
        assert_eq!(live.stopped().now_or_never(), Some(StopWish::Time));
        live.append(&[delta(1)]);
        assert_eq!(live.primed().now_or_never(), Some(Ok(())));
        assert!(live.finished().now_or_never().is_none());
        live.end(finished());
        assert_eq!(live.finished().now_or_never(), Some(Ok(finished())));
        let refused = Live::new(Ids::default(), None);
        refused.refuse(ApiError::provider_unavailable());
        assert_eq!(refused.primed().now_or_never(), Some(Err(ApiError::provider_unavailable())));
    }
}
