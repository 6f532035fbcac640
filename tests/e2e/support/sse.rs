//! Reads a Server-Sent Events response as it arrives, keeping each event's exact bytes: tests compare what was sent, not
//! what a lenient parser made of it. Dropping the reader disconnects.

use std::time::Duration;

use serde_json::Value;

use super::{PATIENCE, within};

/// One event as it stood on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The `id:` field.
    pub id: Option<u64>,
    /// The `event:` field.
    pub name: String,
    /// The `data:` lines joined by line feeds.
    pub data: String,
    /// The block with its blank line.
    pub raw: String,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The body ended as HTTP says it should.
    Clean,
    /// The connection broke.
    Broken,
}

/// A live stream of events.
pub struct EventStream {
    response: reqwest::Response,
    buffered: Vec<u8>,
    /// Comment lines seen so far.
    pub comments: Vec<String>,
    /// Set once the stream is over.
    pub ending: Option<Ending>,
}

impl Event {
    /// The data as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error} in the data of {self:?}"))
    }

    fn parse(block: &str) -> Option<Self> {
        let mut event = Self { id: None, name: String::new(), data: String::new(), raw: block.to_owned() };
        let mut data = Vec::new();
        for line in block.lines().filter(|line| !line.is_empty() && !line.starts_with(':')) {
            match line.split_once(": ") {
                Some(("id", id)) => event.id = Some(id.parse().unwrap_or_else(|_| panic!("id {id:?} is no number"))),
                Some(("event", name)) => event.name = name.to_owned(),
                Some(("data", text)) => data.push(text),
                Some(("retry", _)) => {}
                _ => panic!("the client's reader knows no line {line:?} in {block:?}"),
            }
        }
        event.data = data.join("\n");
        (!event.name.is_empty() || !data.is_empty()).then_some(event)
    }
}

impl EventStream {
    /// Reads events from a response.
    pub fn new(response: reqwest::Response) -> Self {
        Self { response, buffered: Vec::new(), comments: Vec::new(), ending: None }
    }

    /// A response header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).map(|value| value.to_str().expect("an ASCII header"))
    }

    /// The next event, or `None` at the end.
    pub async fn next(&mut self) -> Option<Event> {
        self.next_within(PATIENCE).await
    }

    /// The next event, which must come within `limit`.
    pub async fn next_within(&mut self, limit: Duration) -> Option<Event> {
        within(limit, "an event", self.read()).await
    }

    /// The next `count` events.
    pub async fn take(&mut self, count: usize) -> Vec<Event> {
        let mut events = Vec::new();
        while events.len() < count {
            let event = self.next().await;
            events.push(event.unwrap_or_else(|| panic!("the stream ended after {events:?}")));
        }
        events
    }

    /// Everything up to the end.
    pub async fn rest(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }

    async fn read(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.buffered.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.buffered.drain(..end + 2).collect();
                let block = String::from_utf8(block).expect("an event stream is UTF-8");
                assert!(!block.contains('\r'), "line ends are \\n: {block:?}");
                self.comments.extend(block.lines().filter(|line| line.starts_with(':')).map(str::to_owned));
                if let Some(event) = Event::parse(&block) {
                    return Some(event);
                }
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.buffered.extend_from_slice(&bytes),
                Ok(None) => {
                    let left = String::from_utf8_lossy(&self.buffered);
                    assert!(left.is_empty(), "a stream ends with a blank line, not with {left:?}");
                    self.ending.get_or_insert(Ending::Clean);
                    return None;
                }
                Err(_) => {
                    self.ending.get_or_insert(Ending::Broken);
                    return None;
                }
            }
        }
    }
}

/// The text that the `message` events carry.
pub fn text_of(events: &[Event]) -> String {
    let messages = events.iter().filter(|event| event.name == "message");
    messages.map(|event| event.json()["delta"].as_str().expect("a delta").to_owned()).collect()
}

/// The stream's last event, which must have this name and be the only one of the two that end a stream.
#[track_caller]
pub fn terminal<'a>(events: &'a [Event], name: &str) -> &'a Event {
    let last = events.last().expect("at least one event");
    assert_eq!(last.name, name, "the stream's end, in {}", raw_of(events));
    let ends = events.iter().filter(|event| event.name == "done" || event.name == "error").count();
    assert_eq!(ends, 1, "exactly one end, in {}", raw_of(events));
    last
}

/// The bytes of all events.
pub fn raw_of(events: &[Event]) -> String {
    events.iter().map(|event| event.raw.as_str()).collect()
}
