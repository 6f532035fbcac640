//! Tells the platform that a threshold was crossed, by a signed request (`NOTIFY_WEBHOOK_URL`).
//!
//! Invariant: signed like a service request (design.md) with the first of `SERVICE_KEYS`, so that the platform can check
//! who speaks; tried again with growing waits, and given up visibly on the notification.

use serde_json::json;
use worker::wasm_bindgen::JsValue;
use worker::{Fetch, Headers, Method, Request, RequestInit, RequestRedirect};

use super::books::Notice;
use crate::config::Config;
use crate::identity::signature;
use crate::platform::{clock, ids};

/// Tries before it is given up.
pub const ATTEMPTS_MAX: u32 = 8;
/// The first wait, ms; each further one is four times as long, up to an hour.
const FIRST_WAIT_MS: i64 = 6_000;
const WAIT_MAX_MS: i64 = 3_600_000;
/// The platform must answer within this, ms.
const LIMIT_MS: u64 = 5_000;

/// How a delivery went.
pub enum Outcome {
    /// No URL is configured.
    NotWanted,
    /// The platform answered 2xx.
    Delivered,
    /// Anything else.
    Failed,
}

/// The wait after try number `attempts` (from 0), ms.
#[must_use]
pub fn wait_ms(attempts: u32) -> i64 {
    FIRST_WAIT_MS.saturating_mul(4_i64.saturating_pow(attempts)).min(WAIT_MAX_MS)
}

/// Sends `notice` once.
pub async fn deliver(config: &Config, user_id: &str, notice: &Notice) -> Outcome {
    let Some(url) = &config.notify_webhook_url else { return Outcome::NotWanted };
    let body = json!({
        "event": "quota.warning", "id": notice.id, "userId": user_id, "period": notice.period,
        "quotaType": notice.crossing.quota_type, "level": notice.crossing.level,
        "totalQuota": notice.crossing.total_quota, "remainingQuota": notice.crossing.remaining_quota,
        "timestamp": config.zone.rfc3339(notice.at),
    })
    .to_string();
    let Ok(request) = prepare(config, url, &body) else { return Outcome::Failed };
    match clock::within(LIMIT_MS, Fetch::Request(request).send()).await {
        Some(Ok(response)) if (200..300).contains(&response.status_code()) => Outcome::Delivered,
        _ => Outcome::Failed,
    }
}

fn prepare(config: &Config, url: &str, body: &str) -> worker::Result<Request> {
    let headers = Headers::new();
    headers.set("Content-Type", "application/json")?;
    if let Some((key_id, secret)) = config.service_keys.iter().next() {
        let now_ms = clock::now_ms();
        let nonce = ids::new_id(now_ms);
        // Path and query as sent: what follows the host.
        let path = url.splitn(4, '/').nth(3).map_or_else(|| "/".to_owned(), |rest| format!("/{rest}"));
        let signed =
            signature::Signed { timestamp_s: now_ms / 1000, nonce: &nonce, method: "POST", path: &path, body: body.as_bytes() };
        headers.set("X-Key-Id", key_id)?;
        headers.set("X-Timestamp", &signed.timestamp_s.to_string())?;
        headers.set("X-Nonce", &nonce)?;
        headers.set("X-Signature", &signed.sign(secret.as_bytes()))?;
    }
    let mut init = RequestInit::new();
    init.with_method(Method::Post).with_headers(headers).with_body(Some(JsValue::from_str(body)));
    init.with_redirect(RequestRedirect::Manual);
    Request::new_with_init(url, &init)
}
