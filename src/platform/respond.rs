//! Responses: the envelope of contract 1.1, the superset error body of 1.3, CORS by exact allowlist (5 row 40).
//!
//! Invariant: every response leaves through [`finish`], which adds the request id and CORS headers; a stream's body is
//! handed on as the runtime's own stream, so that its bytes never cross into WASM twice.

use serde_json::{Value, json};
use worker::{Headers, Response, ResponseBody, ResponseBuilder};

use super::clock;
use crate::error::ApiError;

const ALLOW_HEADERS: &str = "Origin, Content-Type, Content-Length, Accept, Accept-Encoding, Authorization, X-Request-ID, \
     Idempotency-Key, Last-Event-ID, If-Match";
const EXPOSE_HEADERS: &str =
    "Content-Length, X-Request-ID, ETag, Retry-After, x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset";

/// A success envelope with HTTP 200.
///
/// # Errors
/// When it cannot be serialised.
pub fn ok(request_id: &str, message: &str, data: &Value) -> Result<Response, ApiError> {
    with_status(200, request_id, message, data)
}

/// A success envelope with HTTP 201.
///
/// # Errors
/// When it cannot be serialised.
pub fn created(request_id: &str, data: &Value) -> Result<Response, ApiError> {
    with_status(201, request_id, "创建成功", data)
}

/// A page with the paginated envelope (contract 1.2), in both spellings (3.5 rule 4).
///
/// # Errors
/// When it cannot be serialised.
pub fn page(request_id: &str, rows: Vec<Value>, total: u64, page: u64, page_size: u64) -> Result<Response, ApiError> {
    let total_pages = total.div_ceil(page_size.max(1));
    let (next, previous) = (page < total_pages, page > 1);
    let body = json!({
        "code": 0, "message": "获取成功", "data": rows,
        "pagination": {
            "total": total, "page": page,
            "page_size": page_size, "pageSize": page_size,
            "total_pages": total_pages, "totalPages": total_pages,
            "has_next": next, "hasNext": next,
            "has_previous": previous, "hasPrev": previous,
        },
        "timestamp": clock::now_ms(), "request_id": request_id, "requestId": request_id,
    });
    Response::from_json(&body).map_err(|_| ApiError::internal())
}

fn with_status(status: u16, request_id: &str, message: &str, data: &Value) -> Result<Response, ApiError> {
    let body = json!({
        "code": 0, "message": message, "data": data,
        "timestamp": clock::now_ms(), "request_id": request_id, "requestId": request_id,
    });
    ResponseBuilder::new().with_status(status).from_json(&body).map_err(|_| ApiError::internal())
}

/// The error body: one superset for everything that can go wrong.
#[must_use]
pub fn refuse(request_id: &str, error: &ApiError) -> Response {
    let mut body = json!({
        "code": error.code, "message": error.message, "error": error.error,
        "timestamp": clock::now_ms(), "request_id": request_id, "requestId": request_id,
    });
    let mut data = error.data.clone();
    if let (Some(details), Some(fields)) = (&error.details, body.as_object_mut()) {
        fields.insert("details".to_owned(), details.clone().into());
        data.insert("details".to_owned(), details.clone().into());
    }
    data.insert("error".to_owned(), error.error.clone().into());
    if let Some(fields) = body.as_object_mut() {
        fields.insert("data".to_owned(), Value::Object(data));
    }
    let headers = Headers::new();
    let _ = headers.set("Content-Type", "application/json");
    let _ = error.retry_after.map(|seconds| headers.set("Retry-After", &seconds.to_string()));
    let _ = error.allow.as_ref().map(|allow| headers.set("Allow", allow));
    ResponseBuilder::new().with_status(error.status).with_headers(headers).body(ResponseBody::Body(body.to_string().into_bytes()))
}

/// Headers of an event stream (contract 2.3).
///
/// # Errors
/// Never in practice: the names and values are fixed.
pub fn event_stream_headers() -> worker::Result<Headers> {
    let headers = Headers::new();
    headers.set("Content-Type", "text/event-stream")?;
    headers.set("Cache-Control", "no-cache, no-transform")?;
    headers.set("X-Accel-Buffering", "no")?;
    Ok(headers)
}

/// Adds what every response carries. The body passes through untouched.
///
/// # Errors
/// When the runtime refuses a header.
pub fn finish(response: Response, request_id: &str, origin: Option<&str>, allowed: &[String]) -> worker::Result<Response> {
    let status = response.status_code();
    let headers = Headers::new();
    for (name, value) in response.headers().entries() {
        headers.append(&name, &value)?;
    }
    headers.set("X-Request-ID", request_id)?;
    headers.set("X-Content-Type-Options", "nosniff")?;
    headers.append("Vary", "Origin")?;
    if let Some(origin) = origin.filter(|origin| allowed.iter().any(|known| known == origin)) {
        headers.set("Access-Control-Allow-Origin", origin)?;
        headers.set("Access-Control-Expose-Headers", EXPOSE_HEADERS)?;
    }
    let (_, body) = response.into_parts();
    Ok(ResponseBuilder::new().with_status(status).with_headers(headers).body(body))
}

/// The answer to a preflight: 204; the allow headers only for an allowed origin.
///
/// # Errors
/// When the runtime refuses a header.
pub fn preflight(request_id: &str, origin: Option<&str>, allowed: &[String]) -> worker::Result<Response> {
    let headers = Headers::new();
    if origin.is_some_and(|origin| allowed.iter().any(|known| known == origin)) {
        headers.set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS")?;
        headers.set("Access-Control-Allow-Headers", ALLOW_HEADERS)?;
        headers.set("Access-Control-Max-Age", "86400")?;
    }
    finish(ResponseBuilder::new().with_status(204).with_headers(headers).empty(), request_id, origin, allowed)
}
