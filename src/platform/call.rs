//! Calls from one isolate to an object: one JSON command per request, one JSON `Result` back, always with a time limit.
//!
//! Invariant: whatever goes wrong on the way, the caller gets an `ApiError` within the limit and the cause is logged.

use std::future::{Future, ready};

use futures::FutureExt;
use futures::future::Either;
use serde::Serialize;
use serde::de::DeserializeOwned;
use worker::wasm_bindgen::JsValue;
use worker::{Env, Method, Request, RequestInit, Response, Stub};

use super::{clock, log};
use crate::error::ApiError;

/// Sends `command` to the object `name` of `binding` at once, before the returned future is polled, and answers its raw
/// response. At once matters inside an object: what is sent after a write waits until that write is durable.
///
/// # Errors
/// When the object cannot be reached or does not answer within `limit_ms`.
pub fn raw<C: Serialize>(
    env: &Env,
    binding: &str,
    name: &str,
    command: &C,
    limit_ms: u64,
) -> impl Future<Output = Result<Response, ApiError>> + use<C> {
    let binding = binding.to_owned();
    let sent = prepare(env, &binding, name, command).map(|(stub, request)| {
        let mut fetch = Box::pin(async move { stub.fetch_with_request(request).await });
        // The first poll sends the request; its waker is replaced by the next.
        match (&mut fetch).now_or_never() {
            Some(answer) => Either::Left(ready(answer)),
            None => Either::Right(fetch),
        }
    });
    async move {
        let failed = |cause: &dyn std::fmt::Display| {
            log::error("object_call", &binding, cause);
            ApiError::internal()
        };
        match clock::within(limit_ms, sent.map_err(|e| failed(&e))?).await {
            Some(answer) => answer.map_err(|e| failed(&e)),
            None => Err(failed(&"no answer in time")),
        }
    }
}

fn prepare(env: &Env, binding: &str, name: &str, command: &impl Serialize) -> worker::Result<(Stub, Request)> {
    let body = serde_json::to_string(command)?;
    let mut init = RequestInit::new();
    init.with_method(Method::Post).with_body(Some(JsValue::from_str(&body)));
    let request = Request::new_with_init("https://object/", &init)?;
    Ok((env.durable_object(binding)?.get_by_name(name)?, request))
}

/// Reads an object's JSON `Result` out of its response.
///
/// # Errors
/// The object's own refusal, or `internal` when the answer is unreadable.
pub async fn outcome<R: DeserializeOwned>(binding: &str, mut response: Response) -> Result<R, ApiError> {
    let unreadable = |cause: &dyn std::fmt::Display| {
        log::error("object_answer", binding, cause);
        ApiError::internal()
    };
    let text = response.text().await.map_err(|e| unreadable(&e))?;
    serde_json::from_str::<Result<R, ApiError>>(&text).map_err(|e| unreadable(&e))?
}

/// [`raw`] and [`outcome`] in one.
///
/// # Errors
/// As both.
pub async fn ask<R: DeserializeOwned>(
    env: &Env,
    binding: &str,
    name: &str,
    command: &impl Serialize,
    limit_ms: u64,
) -> Result<R, ApiError> {
    outcome(binding, raw(env, binding, name, command, limit_ms).await?).await
}

/// The object's side: a JSON `Result` as a response.
///
/// # Errors
/// When it cannot be serialised.
pub fn answer<R: Serialize>(result: &Result<R, ApiError>) -> worker::Result<Response> {
    Response::from_json(result)
}
