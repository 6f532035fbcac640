//! The HTTP side of a test: one user of one Worker. Nothing is retried or followed here, so that a test sees what a
//! client would.

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::Value;

use super::sse::EventStream;
use super::{PATIENCE, token, unique, within};

/// A caller of a Worker: everyone has an id of his own, so that tests never meet.
#[derive(Clone, Debug)]
pub struct User {
    /// The user id in the token.
    pub id: String,
    /// The bearer token; `None` sends no header.
    pub token: Option<String>,
    /// The Worker's address.
    pub origin: String,
    http: reqwest::Client,
}

/// A request being put together.
#[must_use]
pub struct Request {
    builder: reqwest::RequestBuilder,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Response headers.
    pub headers: HeaderMap,
    /// The body as sent.
    pub text: String,
    /// The body as JSON; `Null` when it is none.
    pub body: Value,
}

impl User {
    /// A new user with this role.
    pub fn new(origin: &str, role: &str) -> Self {
        let id = format!("user-{}", unique());
        let token = Some(token::access(&id, role));
        Self { id, token, http: http(), origin: origin.to_owned() }
    }

    /// The same caller with another token.
    pub fn with_token(&self, token: Option<String>) -> Self {
        Self { token, ..self.clone() }
    }

    /// A request to a path below `/api/v1`, with the token.
    pub fn request(&self, method: Method, path: &str) -> Request {
        let builder = self.http.request(method, format!("{}/api/v1{path}", self.origin));
        let builder = match &self.token {
            Some(token) => builder.bearer_auth(token),
            None => builder,
        };
        Request { builder }
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Answer {
        self.request(Method::GET, path).send().await
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.request(Method::POST, path).json(body).send().await
    }

    /// PUT with a JSON body.
    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.request(Method::PUT, path).json(body).send().await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Answer {
        self.request(Method::DELETE, path).send().await
    }
}

impl Request {
    /// Adds a header.
    pub fn header(self, name: &str, value: &str) -> Self {
        Self { builder: self.builder.header(name, value) }
    }

    /// A JSON body.
    pub fn json(self, body: &Value) -> Self {
        Self { builder: self.builder.json(body) }
    }

    /// Any other body, as JSON by its content type.
    pub fn body(self, body: impl Into<reqwest::Body>) -> Self {
        Self { builder: self.builder.header("Content-Type", "application/json").body(body) }
    }

    /// Sends and reads the whole answer.
    pub async fn send(self) -> Answer {
        Answer::read(self.response().await).await
    }

    /// Sends and expects an event stream.
    #[track_caller]
    pub fn stream(self) -> impl Future<Output = EventStream> {
        let caller = std::panic::Location::caller();
        async move {
            match self.open().await {
                Ok(stream) => stream,
                Err(answer) => panic!("{caller}: expected a stream, got {} {}", answer.status, answer.text),
            }
        }
    }

    /// Sends; an event stream is `Ok`, anything else `Err`.
    pub async fn open(self) -> Result<EventStream, Answer> {
        let response = self.response().await;
        let kind = response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if response.status() == 200 && kind.starts_with("text/event-stream") {
            Ok(EventStream::new(response))
        } else {
            Err(Answer::read(response).await)
        }
    }

    /// Sends; a broken connection is an error instead of a failed test.
    pub async fn try_response(self) -> reqwest::Result<reqwest::Response> {
        within(PATIENCE, "an answer", self.builder.send()).await
    }

    async fn response(self) -> reqwest::Response {
        self.try_response().await.unwrap_or_else(|error| panic!("the Worker gave no answer: {error:?}"))
    }
}

impl Answer {
    async fn read(response: reqwest::Response) -> Self {
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let text = within(PATIENCE, "a body", response.text()).await.expect("a whole body");
        let body = serde_json::from_str(&text).unwrap_or_default();
        Self { status, headers, text, body }
    }

    /// A response header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("an ASCII header"))
    }

    /// Checks the success envelope (contract 1.1, 3.5 rules 2 and 3) and returns its `data`.
    #[track_caller]
    pub fn data(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.body["code"], 0, "{}", self.text);
        assert!(self.body["message"].is_string(), "{}", self.text);
        self.check_envelope();
        assert!(self.body["data"].is_object() || self.body["data"].is_array(), "data is always there: {}", self.text);
        self.body["data"].clone()
    }

    /// Checks that this is a success with 200 and returns its `data`.
    #[track_caller]
    pub fn ok(self) -> Value {
        self.data(200)
    }

    /// Checks the error envelope (contract 1.3, 3.5 rule 5).
    #[track_caller]
    pub fn error(self, status: u16, code: u64) -> Self {
        assert_eq!((self.status, &self.body["code"]), (status, &Value::from(code)), "{}", self.text);
        for key in ["message", "error"] {
            assert!(self.body[key].as_str().is_some_and(|text| !text.is_empty()), "{key} in {}", self.text);
        }
        let chinese = self.body["message"].as_str().is_some_and(|text| text.chars().any(|letter| letter > '\u{2e80}'));
        assert!(chinese, "the message is for people, in Chinese: {}", self.text);
        self.check_envelope();
        self
    }

    /// Checks that this is some error in the right envelope, and returns its status and code.
    #[track_caller]
    pub fn any_error(self) -> (u16, u64) {
        assert!(self.status >= 400, "an error, not {} {}", self.status, self.text);
        let (status, code) = (self.status, self.body["code"].as_u64().unwrap_or_default());
        self.error(status, code);
        (status, code)
    }

    #[track_caller]
    fn check_envelope(&self) {
        assert!(self.header("content-type").is_some_and(|kind| kind.starts_with("application/json")), "{self:?}");
        assert!(self.body["timestamp"].as_i64().is_some_and(|ms| ms > 1_600_000_000_000), "{}", self.text);
        let id = self.body["request_id"].as_str().expect("request_id");
        assert!(!id.is_empty(), "{}", self.text);
        assert_eq!(self.header("x-request-id"), Some(id), "one request id in header and body");
        if self.status >= 400 {
            assert_eq!(self.body["requestId"], id, "{}", self.text);
        }
    }
}

/// Connections are not kept: a Worker that was killed and restarted would leave dead ones in the pool.
fn http() -> reqwest::Client {
    reqwest::Client::builder().pool_max_idle_per_host(0).build().expect("a plain HTTP client")
}
