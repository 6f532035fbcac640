//! The cron's work: closes ended periods in D1 and writes their reset entries.
//!
//! Invariant: a period is closed once however often this runs, and only when it has ended by our own clock: an instant
//! ahead of it closes nothing. Users never wait for it: their objects roll over by themselves. (Edge: D1.)

use worker::Env;

use super::{QuotaType, projection};
use crate::config::Config;
use crate::platform::{clock, log};

/// Statements per type and firing: what is left waits for the next one.
const ROUNDS_MAX: usize = 200;

/// Closes every period that ended before the instant the cron was scheduled for (unix ms).
pub async fn close(env: &Env, scheduled_ms: f64) {
    let now_ms = clock::now_ms();
    let Ok(config) = Config::of(env) else { return };
    // An instant ahead of the clock is a test or a mistake: it must not end a period that still runs.
    let at_ms = if scheduled_ms.is_finite() { (scheduled_ms as i64).min(now_ms) } else { now_ms };
    for quota_type in [QuotaType::Daily, QuotaType::Monthly] {
        let period = config.zone.period(quota_type, at_ms);
        for _ in 0..ROUNDS_MAX {
            match projection::close_periods(env, quota_type, &period, at_ms).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(cause) => {
                    log::error("close_periods", quota_type.as_str(), &cause);
                    break;
                }
            }
        }
    }
}
