//! Opens a provider's stream and hands over its bytes, a window at a time.
//!
//! Invariant: the key goes into the request's header and nowhere else; a provider's body is never shown or logged; a
//! connection that is dropped here is closed, so nobody pays for an answer that nobody reads.

use wasm_bindgen::prelude::wasm_bindgen;
use worker::js_sys::Uint8Array;
use worker::wasm_bindgen::{JsCast, JsValue};
use worker::{AbortController, Fetch, Headers, Method, Request, RequestInit, RequestRedirect, ResponseBody};

use super::ChatRequest;
use crate::config::Config;
use crate::error::ApiError;
use crate::platform::log;

/// Bytes that came within this long are handed over together, ms.
const WINDOW_MS: f64 = 10.0;
/// Most bytes handed over at once.
const WINDOW_BYTES_MAX: f64 = 65_536.0;

#[wasm_bindgen(module = "/src/llm/window.js")]
extern "C" {
    type WindowReader;
    #[wasm_bindgen(constructor, catch)]
    fn new(stream: &worker::web_sys::ReadableStream, window_ms: f64, max_bytes: f64) -> Result<WindowReader, JsValue>;
    #[wasm_bindgen(method, catch)]
    async fn next(this: &WindowReader) -> Result<JsValue, JsValue>;
    #[wasm_bindgen(method)]
    fn cancel(this: &WindowReader);
}

/// An open stream. Dropping it closes the provider's connection.
pub struct Connection {
    reader: WindowReader,
    abort: Option<AbortController>,
    ended: std::cell::Cell<bool>,
}

impl Connection {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn next(&self) -> Result<Option<Vec<u8>>, ApiError> {
        match self.reader.next().await {
            Ok(value) if value.is_undefined() => {
                self.ended.set(true);
                Ok(None)
            }
            Ok(value) => Ok(Some(value.unchecked_into::<Uint8Array>().to_vec())),
            Err(_) => Err(ApiError::provider_unavailable()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.ended.get() {
            self.reader.cancel();
            if let Some(abort) = self.abort.take() {
                abort.abort();
            }
        }
    }
}

/// Sends `request` and answers its stream once the provider has answered 200.
/// Dropping the returned future closes the connection.
///
/// # Errors
/// Contract 5 row 42: 401/403 → 502/5004, 429 → 429/3503 with `Retry-After`, 5xx or refused → 503/3501.
pub async fn open(config: &Config, request: &ChatRequest, request_id: &str) -> Result<Connection, ApiError> {
    let failed = |cause: &dyn std::fmt::Display| {
        log::error("provider_call", request_id, cause);
        ApiError::provider_unavailable()
    };
    let abort = AbortOnDrop(Some(AbortController::default()));
    let signal = abort.signal();
    let prepared = prepare(config, request).map_err(|e| failed(&e))?;
    let response = Fetch::Request(prepared).send_with_signal(&signal).await.map_err(|e| failed(&e))?;
    match response.status_code() {
        200..=299 => {}
        429 => {
            let wait = response.headers().get("retry-after").ok().flatten().and_then(|text| text.trim().parse().ok());
            return Err(ApiError::provider_rate_limited(wait));
        }
        status if status >= 500 => return Err(failed(&format!("status {status}"))),
        status => {
            log::error("provider_call", request_id, &format!("status {status}"));
            return Err(ApiError::provider_bad_answer("the model service refused the request"));
        }
    }
    let body = match response.body() {
        ResponseBody::Stream(stream) => stream.clone(),
        _ => return Err(ApiError::provider_bad_answer("the model service sent no body")),
    };
    let reader = WindowReader::new(&body, WINDOW_MS, WINDOW_BYTES_MAX).map_err(|_| failed(&"body is locked"))?;
    Ok(Connection { reader, abort: abort.keep(), ended: std::cell::Cell::new(false) })
}

/// The error a broken-off stream means to a caller who has seen nothing of it yet, by the status in its error object.
#[must_use]
pub fn error_of_status(status: Option<u16>) -> ApiError {
    match status {
        Some(429) => ApiError::provider_rate_limited(None),
        Some(500..) => ApiError::provider_unavailable(),
        _ => ApiError::provider_bad_answer("the model service sent an error"),
    }
}

fn prepare(config: &Config, request: &ChatRequest) -> worker::Result<Request> {
    let headers = Headers::new();
    headers.set("Content-Type", "application/json")?;
    headers.set("Accept", "text/event-stream")?;
    if let Some(key) = &config.llm_api_key {
        headers.set("Authorization", &format!("Bearer {key}"))?;
    }
    let body = serde_json::to_string(request)?;
    let mut init = RequestInit::new();
    init.with_method(Method::Post).with_headers(headers).with_body(Some(JsValue::from_str(&body)));
    // A redirect would carry the key to another host.
    init.with_redirect(RequestRedirect::Manual);
    Request::new_with_init(&format!("{}/chat/completions", config.llm_base_url), &init)
}

/// Aborts a fetch whose future is dropped before it answered.
struct AbortOnDrop(Option<AbortController>);

impl AbortOnDrop {
    fn signal(&self) -> worker::AbortSignal {
        self.0.as_ref().map_or_else(worker::AbortSignal::abort, AbortController::signal)
    }

    fn keep(mut self) -> Option<AbortController> {
        self.0.take()
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(abort) = self.0.take() {
            abort.abort();
        }
    }
}
