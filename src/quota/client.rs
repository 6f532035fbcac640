//! How the rest of the Worker talks to a user's ledger.
//!
//! Invariant: a call is bounded in time and safe to repeat: every command carries its own id (hold or key), so a repeated
//! one moves nothing twice.

use std::future::Future;

use worker::Env;

use super::books::Entry;
use super::{Audit, Call, Command, EndReason, Governance, QuotaState, QuotaType, Reply, Reserve, Settlement, Usage};
use crate::error::ApiError;
use crate::identity::Caller;
use crate::platform::{call, clock};

/// The binding of the ledger objects.
const BINDING: &str = "QUOTA_LEDGER";
/// A ledger answers in milliseconds; longer than this means that it is unreachable, ms.
const LIMIT_MS: u64 = 10_000;
/// Waits between repeated settlements, ms.
const RETRY_MS: [u64; 3] = [200, 1_000, 3_000];

/// How long an idempotency key of a generation is kept, ms (design.md invariant 5).
const KEY_MS: i64 = 24 * 3_600_000;
/// Orders are kept for good, ms: a hundred years.
const ORDER_MS: i64 = 100 * 365 * KEY_MS;

/// One user's ledger.
#[derive(Clone)]
pub struct LedgerClient {
    env: Env,
    /// The user in person; absent when another acts on the ledger.
    caller: Option<Caller>,
    name: String,
}

/// A recharge as it was made.
pub struct Credited {
    /// Its line in the books.
    pub entry: Entry,
    /// The quota it raised.
    pub quota: QuotaState,
    /// An earlier call made it.
    pub repeated: bool,
}

impl LedgerClient {
    /// The ledger of `caller`, addressed by the verified token and by nothing else.
    #[must_use]
    pub fn of(env: &Env, caller: &Caller) -> Self {
        Self { env: env.clone(), name: caller.user_id.clone(), caller: Some(caller.clone()) }
    }

    /// The ledger of the user `user_id`, for an administrator or a service.
    #[must_use]
    pub fn of_user(env: &Env, user_id: &str) -> Self {
        Self { env: env.clone(), name: user_id.to_owned(), caller: None }
    }

    /// An object that is nobody's ledger and keeps keys for `what`; no user id can hold the control character.
    fn of_keys(env: &Env, what: &str) -> Self {
        Self { env: env.clone(), name: format!("\u{1f}{what}"), caller: None }
    }

    /// Sends a command at once; see [`call::raw`].
    fn ask(&self, command: Command) -> impl Future<Output = Result<Reply, ApiError>> + use<> {
        let call = Call { caller: self.caller.clone(), command };
        let sent = call::raw(&self.env, BINDING, &self.name, &call, LIMIT_MS);
        async move {
            let unreachable = |error: ApiError| if error.code == 5000 { ApiError::quota_unavailable() } else { error };
            let answer = async { call::outcome(BINDING, sent.await?).await };
            answer.await.map_err(unreachable)
        }
    }

    /// Takes a hold; answers the output tokens it covers. The request is sent at once, before the future is polled.
    ///
    /// # Errors
    /// 429/3010 or 403/3011; 503/3511 when the ledger cannot answer (nothing is spent then).
    pub fn reserve(&self, ask: Reserve) -> impl Future<Output = Result<u64, ApiError>> + use<> {
        let sent = self.ask(Command::Reserve(ask));
        async move {
            match sent.await? {
                Reply::Granted { output_tokens } => Ok(output_tokens),
                _ => Err(ApiError::quota_unavailable()),
            }
        }
    }

    /// Charges what was used, trying again while the ledger cannot be reached.
    ///
    /// # Errors
    /// When it stays unreachable: the caller keeps the settlement for its alarm.
    pub async fn settle(&self, hold_id: &str, usage: Usage, reason: EndReason, duration_ms: u64) -> Result<Settlement, ApiError> {
        let command = Command::Settle { hold_id: hold_id.to_owned(), usage, reason, duration_ms };
        match self.ask_again(&command).await? {
            Reply::Settled(settlement) => Ok(settlement),
            _ => Err(ApiError::quota_unavailable()),
        }
    }

    /// Frees a hold, trying again while the ledger cannot be reached.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub async fn release(&self, hold_id: &str) -> Result<(), ApiError> {
        self.ask_again(&Command::Release { hold_id: hold_id.to_owned() }).await.map(|_| ())
    }

    async fn ask_again(&self, command: &Command) -> Result<Reply, ApiError> {
        for wait_ms in RETRY_MS {
            match self.ask(command.clone()).await {
                Err(error) if error.code == 3511 && error.details.is_none() => clock::sleep_ms(wait_ms).await,
                definite => return definite,
            }
        }
        self.ask(command.clone()).await
    }

    /// Keeps a hold for another `ttl_ms`; false when it no longer stands.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub fn renew(&self, hold_id: &str, ttl_ms: i64) -> impl Future<Output = Result<bool, ApiError>> + use<> {
        let sent = self.ask(Command::Renew { hold_id: hold_id.to_owned(), ttl_ms });
        async move { Ok(matches!(sent.await?, Reply::Renewed { open: true })) }
    }

    /// The three quotas.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub async fn quotas(&self) -> Result<Vec<QuotaState>, ApiError> {
        match self.ask(Command::Read).await? {
            Reply::Quotas { quotas } => Ok(quotas),
            _ => Err(ApiError::internal()),
        }
    }

    /// Binds an idempotency key to `target` for 24 h; answers the target it is bound to and whether an
    /// earlier call bound it.
    ///
    /// # Errors
    /// 409/1006 when the key was used with another request.
    pub async fn claim(&self, key: &str, fingerprint: &str, target: &str) -> Result<(String, bool), ApiError> {
        self.bind(key, fingerprint, target, KEY_MS).await
    }

    /// Frees a key whose request was refused: it started nothing.
    pub async fn unclaim(&self, key: &str, fingerprint: &str) {
        let (key, fingerprint) = (key.to_owned(), fingerprint.to_owned());
        let _ = self.ask(Command::Unclaim { key, fingerprint }).await;
    }

    async fn bind(&self, key: &str, fingerprint: &str, target: &str, ttl_ms: i64) -> Result<(String, bool), ApiError> {
        let (key, fingerprint, target) = (key.to_owned(), fingerprint.to_owned(), target.to_owned());
        match self.ask(Command::Claim { key, fingerprint, target, ttl_ms }).await? {
            Reply::Claimed { target, existed } => Ok((target, existed)),
            _ => Err(ApiError::internal()),
        }
    }

    /// Raises a limit, once per order: orders are unique over all users.
    ///
    /// # Errors
    /// 409/1006 when the order was made for another user, amount or quota; 400/1001 beyond 2^53 − 1.
    pub async fn recharge(&self, order_id: &str, amount: u64, quota_type: QuotaType, reason: &str) -> Result<Credited, ApiError> {
        let what = format!("{}\n{amount}\n{}", self.name, quota_type.as_str());
        Self::of_keys(&self.env, &format!("order/{order_id}")).bind(order_id, &what, &self.name, ORDER_MS).await?;
        let (order_id, reason) = (order_id.to_owned(), reason.to_owned());
        match self.ask_again(&Command::Recharge { order_id, amount, quota_type, reason }).await? {
            Reply::Credited { entry, quota, repeated } => Ok(Credited { entry: *entry, quota: *quota, repeated }),
            _ => Err(ApiError::internal()),
        }
    }

    /// Makes an administrator's change; answers the three quotas after it.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub async fn govern(&self, act: Governance) -> Result<Vec<QuotaState>, ApiError> {
        match self.ask(Command::Govern(act)).await? {
            Reply::Quotas { quotas } => Ok(quotas),
            _ => Err(ApiError::internal()),
        }
    }

    /// Counts a try of a redemption code.
    ///
    /// # Errors
    /// 429/4000 when too many were tried.
    pub async fn try_code(&self) -> Result<(), ApiError> {
        self.ask(Command::TryCode).await.map(|_| ())
    }

    /// Brings D1 up to date before a read that must see its own writes; answers how many parcels still wait.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub async fn flush(&self) -> Result<u64, ApiError> {
        match self.ask(Command::Flush).await? {
            Reply::Flushed { waiting } => Ok(waiting),
            _ => Err(ApiError::internal()),
        }
    }

    /// The ledger laid open.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub async fn audit(&self) -> Result<Audit, ApiError> {
        match self.ask(Command::Audit).await? {
            Reply::Audited(audit) => Ok(*audit),
            _ => Err(ApiError::internal()),
        }
    }

    /// Uses up a nonce of a service key; false when it was used before.
    ///
    /// # Errors
    /// When the keeper of nonces cannot be reached.
    pub async fn use_nonce(env: &Env, key_id: &str, nonce: &str, request: &str, ttl_ms: i64) -> Result<bool, ApiError> {
        // The request id makes every use a different one: even the same bytes twice are a replay.
        match Self::of_keys(env, &format!("nonces/{key_id}")).bind(nonce, request, request, ttl_ms).await {
            Ok((_, existed)) => Ok(!existed),
            Err(error) if error.code == 1006 => Ok(false),
            Err(error) => Err(error),
        }
    }
}
