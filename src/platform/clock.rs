//! The only place that reads the wall clock, and the only one that waits.
//!
//! workerd freezes the clock between two I/O events, so two reads in one synchronous stretch are equal.

use std::future::Future;
use std::time::Duration;

use futures::future::{Either, select};
use worker::{Date, Delay};

/// Now, unix ms.
#[must_use]
pub fn now_ms() -> i64 {
    i64::try_from(Date::now().as_millis()).unwrap_or(i64::MAX)
}

/// Waits `ms` milliseconds.
#[must_use]
pub fn sleep_ms(ms: u64) -> Delay {
    Delay::from(Duration::from_millis(ms))
}

/// `Some` of what `future` answers within `ms` milliseconds, else `None`; the future is dropped then.
pub async fn within<T>(ms: u64, future: impl Future<Output = T>) -> Option<T> {
    match select(std::pin::pin!(future), std::pin::pin!(sleep_ms(ms))).await {
        Either::Left((value, _)) => Some(value),
        Either::Right(_) => None,
    }
}
