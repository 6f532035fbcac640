//! End-to-end tests: the real Worker in workerd under `wrangler dev`, over HTTP, against a provider that fails on
//! command. Needs `make build`. One binary, because its tests share Workers and one provider.
//!
//! One file per capability; `support` holds what they stand on. Every test has users of its own and picks the provider's
//! behaviour by a marker in its message, so that all of them run in parallel.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail like tests do, and stand outside the test functions that clippy.toml exempts"
)]

mod access;
mod chat;
mod codes;
mod dialects;
mod edges;
mod faults;
mod governance;
mod http;
mod idempotency;
mod kill;
mod model;
mod outages;
mod policy;
mod quota;
mod recharge;
mod reports;
mod resume;
mod sessions;
mod signed;
mod stop;
mod support;
mod thresholds;
mod tokens;
mod tree;
