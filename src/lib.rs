//! Inkstone (砚): an AI writing backend for novel platforms, one Worker at the edge.
//!
//! A crate map: [`router`] is the table of routes; each capability has a folder ([`chat`], [`quota`], [`system`]) whose
//! `routes` parse requests, whose `object` is its Durable Object, whose `store` holds SQL, and whose other files are pure
//! decisions. [`generation`] is the engine every generated text runs on, [`llm`] the provider, [`identity`] the caller,
//! [`platform`] thin glue to the runtime, [`error`] the one error, [`config`] the operator's settings.
//!
//! Invariant: only edge files know the runtime (`tests/tidy.rs` lists their names: `routes`, `object`, `store`, `client` and
//! a few more, `platform` and the root files); everything else is native Rust with time and ids as arguments.

pub mod chat;
pub mod config;
pub mod error;
pub mod generation;
pub mod identity;
pub mod llm;
pub mod platform;
pub mod quota;
pub mod router;
pub mod system;

pub use chat::object::ChatSession;
pub use quota::object::QuotaLedger;

use worker::{Context, Env, Request, Response, ScheduleContext, ScheduledEvent, event};

/// A panic is a bug that has no caller to tell: say where it was, in the log.
#[event(start)]
fn start() {
    console_error_panic_hook::set_once();
}

/// Every HTTP request.
#[event(fetch)]
async fn fetch(request: Request, env: Env, _context: Context) -> worker::Result<Response> {
    router::serve(request, env).await
}

/// Every cron firing: closes ended quota periods in D1. Nobody's quota depends on it.
#[event(scheduled)]
async fn scheduled(event: ScheduledEvent, env: Env, _context: ScheduleContext) {
    quota::periods::close(&env, event.schedule()).await;
}
