//! Log lines: one JSON object each, made here so that what may be logged is decided in one place.
//!
//! Invariant: no key, token, prompt or answer. Callers pass a fixed `what`, the request id and a technical cause; causes
//! come from the runtime, never from a body.

use serde_json::json;

/// The longest technical cause kept, characters.
const CAUSE_CHARS_MAX: usize = 300;

/// Something failed that the operator should know of.
pub fn error(what: &str, request_id: &str, cause: &dyn std::fmt::Display) {
    let cause: String = cause.to_string().lines().next().unwrap_or_default().chars().take(CAUSE_CHARS_MAX).collect();
    worker::console_error!("{}", json!({"level": "error", "what": what, "request_id": request_id, "cause": cause}));
}
