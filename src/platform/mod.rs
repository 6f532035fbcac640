//! Thin glue to the runtime: clock, ids, SQL rows, calls between objects, requests in, responses out.
//!
//! Invariant: nothing here decides anything about chats, quotas or prompts; it only moves bytes and time.

pub mod call;
pub mod clock;
pub mod ids;
pub mod log;
pub mod request;
pub mod respond;
pub mod sql;
