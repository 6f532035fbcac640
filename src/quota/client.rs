//! How the rest of the Worker talks to a user's ledger.
//!
//! Invariant: a call is bounded in time and safe to repeat: every command carries its own id (hold or key), so a repeated
//! one moves nothing twice.

use worker::Env;

use super::{Call, Command, EndReason, QuotaState, Reply, Reserve, Settlement, Usage};
use crate::error::ApiError;
use crate::identity::Caller;
use crate::platform::{call, clock};

/// The binding of the ledger objects.
const BINDING: &str = "QUOTA_LEDGER";
/// A ledger answers in milliseconds; longer than this means that it is unreachable, ms.
const LIMIT_MS: u64 = 10_000;
/// Waits between repeated settlements, ms.
const RETRY_MS: [u64; 3] = [200, 1_000, 3_000];

/// One user's ledger, addressed by the verified caller and by nothing else.
#[derive(Clone)]
pub struct LedgerClient {
    env: Env,
    caller: Caller,
}

impl LedgerClient {
    /// The ledger of `caller`.
    #[must_use]
    pub fn of(env: &Env, caller: &Caller) -> Self {
        Self { env: env.clone(), caller: caller.clone() }
    }

    async fn ask(&self, command: Command) -> Result<Reply, ApiError> {
        let call = Call { caller: self.caller.clone(), command };
        call::ask(&self.env, BINDING, &self.caller.user_id, &call, LIMIT_MS).await
    }

    /// Takes a hold; answers the output tokens it covers.
    ///
    /// # Errors
    /// 429/3010 or 403/3011; 503/3511 when the ledger cannot answer (nothing is spent then).
    pub async fn reserve(&self, ask: Reserve) -> Result<u64, ApiError> {
        match self.ask(Command::Reserve(ask)).await {
            Ok(Reply::Granted { output_tokens }) => Ok(output_tokens),
            Err(error) if error.code != 5000 => Err(error),
            _ => Err(ApiError::quota_unavailable()),
        }
    }

    /// Charges what was used, trying again while the ledger cannot be reached.
    ///
    /// # Errors
    /// When it stays unreachable: the caller keeps the settlement for its alarm.
    pub async fn settle(&self, hold_id: &str, usage: Usage, reason: EndReason) -> Result<Settlement, ApiError> {
        let command = Command::Settle { hold_id: hold_id.to_owned(), usage, reason };
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
                Ok(reply) => return Ok(reply),
                Err(_) => clock::sleep_ms(wait_ms).await,
            }
        }
        self.ask(command.clone()).await
    }

    /// Keeps a hold for another `ttl_ms`.
    ///
    /// # Errors
    /// When the ledger cannot be reached.
    pub async fn renew(&self, hold_id: &str, ttl_ms: i64) -> Result<(), ApiError> {
        self.ask(Command::Renew { hold_id: hold_id.to_owned(), ttl_ms }).await.map(|_| ())
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

    /// Binds an idempotency key to `target`; answers the target it is bound to (this or an earlier one).
    ///
    /// # Errors
    /// 409/1006 when the key was used with another request.
    pub async fn claim(&self, key: &str, fingerprint: &str, target: &str) -> Result<String, ApiError> {
        let command = Command::Claim { key: key.to_owned(), fingerprint: fingerprint.to_owned(), target: target.to_owned() };
        match self.ask(command).await? {
            Reply::Claimed { target, .. } => Ok(target),
            _ => Err(ApiError::internal()),
        }
    }
}
