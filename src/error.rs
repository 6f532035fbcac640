//! The one error a caller can receive, and the only place where an HTTP status and a numeric code are chosen.
//!
//! Invariant: nothing internal (SQL, stack, provider body, key, prompt) is ever put into an `ApiError`; what went
//! wrong inside is logged where it happened, and the caller gets a Chinese sentence telling what to do.
//! Codes: contract 1.4. `ApiError` is serialisable because objects hand it to the Worker across their own boundary.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A refusal as the caller sees it: HTTP status, stable numeric code, Chinese message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
#[serde(rename_all = "camelCase")]
pub struct ApiError {
    /// HTTP status, always 4xx or 5xx.
    pub status: u16,
    /// Stable numeric code of contract 1.4.
    pub code: u32,
    /// For people, in Chinese: what is wrong and what to do.
    pub message: String,
    /// Short English reason for engineers.
    pub error: String,
    /// What is wrong in detail, usually which field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<String>,
    /// Ids the caller can go on with (a session whose answer was cut, say).
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub data: Map<String, Value>,
    /// Seconds to wait before trying again, sent as `Retry-After`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
    /// Methods the path does serve, sent as `Allow` with a 405.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<String>,
}

impl ApiError {
    fn new(status: u16, code: u32, error: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            error: error.to_owned(),
            details: None,
            data: Map::new(),
            retry_after: None,
            allow: None,
        }
    }

    /// Adds what is wrong in detail.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = Some(details.into());
        self
    }

    /// Adds an id the caller can go on with.
    #[must_use]
    pub fn with_data(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.data.insert(key.to_owned(), value.into());
        self
    }

    /// Adds `Retry-After`, in seconds.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Whether the same call may succeed later: what SSE `error` events tell as `retryable`.
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(self.code, 3501..=3503 | 3511 | 4000 | 4007 | 5000..=5013)
    }

    /// 400/1001: a field is missing or wrong. `field` is named in the message and in `details`.
    #[must_use]
    pub fn invalid(field: &str, why: impl AsRef<str>) -> Self {
        let why = why.as_ref();
        Self::new(400, 1001, "invalid_parameter", format!("参数错误：{field} {why}")).with_details(format!("{field}: {why}"))
    }

    /// 400/1017: the request is well formed but makes no sense here.
    #[must_use]
    pub fn invalid_operation(message: impl Into<String>) -> Self {
        Self::new(400, 1017, "invalid_operation", message)
    }

    /// 401/2010: no token.
    #[must_use]
    pub fn token_missing() -> Self {
        Self::new(401, 2010, "token_missing", "请先登录：缺少访问令牌")
    }

    /// 401/2009: the `Authorization` header is not `Bearer <token>`.
    #[must_use]
    pub fn token_malformed() -> Self {
        Self::new(401, 2009, "token_malformed", "访问令牌格式不正确，应为 Bearer <token>")
    }

    /// 401/2008: signature, issuer, audience, claims or kind of the token do not hold.
    #[must_use]
    pub fn token_invalid() -> Self {
        Self::new(401, 2008, "token_invalid", "访问令牌无效，请重新登录")
    }

    /// 401/2007: the token was good once.
    #[must_use]
    pub fn token_expired() -> Self {
        Self::new(401, 2007, "token_expired", "登录已过期，请重新登录")
    }

    /// 401/1002: a signed service request whose signature, time, key or nonce does not hold.
    #[must_use]
    pub fn signature_invalid() -> Self {
        Self::new(401, 1002, "signature_invalid", "服务签名无效或已过期")
    }

    /// 403/1003: known, but not allowed.
    #[must_use]
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, 1003, "forbidden", message)
    }

    /// 404/1004: no such thing for this caller (it may be another's).
    #[must_use]
    pub fn not_found(what: &str) -> Self {
        Self::new(404, 1004, "not_found", format!("{what}不存在"))
    }

    /// 405/1019: the path exists, not with this method.
    #[must_use]
    pub fn method_not_allowed(allow: String) -> Self {
        let mut error = Self::new(405, 1019, "method_not_allowed", format!("不支持的请求方法，可用：{allow}"));
        error.allow = Some(allow);
        error
    }

    /// 409/1006: the state of things does not allow it now.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(409, 1006, "conflict", message)
    }

    /// 413/3521: the body is over the cap.
    #[must_use]
    pub fn body_too_large(cap_bytes: usize) -> Self {
        Self::new(413, 3521, "body_too_large", format!("请求内容过大，上限 {cap_bytes} 字节"))
    }

    /// 400/3522: the newest message does not fit the model's window.
    #[must_use]
    pub fn context_too_long(tokens: u64, limit: u64) -> Self {
        Self::new(
            400,
            3522,
            "context_too_long",
            format!("内容过长：约 {tokens} tokens，超过模型可用的 {limit} tokens，请缩短后重试"),
        )
        .with_details(format!("message: about {tokens} tokens, {limit} fit"))
    }

    /// 404/3530: no such model in the catalogue.
    #[must_use]
    pub fn model_unknown(model: &str) -> Self {
        let shown: String = model.chars().take(64).collect();
        Self::new(404, 3530, "model_unknown", format!("模型不存在：{shown}")).with_details("options.model")
    }

    /// 429/3010: the quota does not cover the call.
    #[must_use]
    pub fn quota_insufficient(quota_type: &str, remaining: u64) -> Self {
        Self::new(429, 3010, "quota_insufficient", "您的AI配额不足，请等待重置、充值或升级会员")
            .with_details(format!("{quota_type}: {remaining} tokens left"))
    }

    /// 429/4000: too many of these calls; the next may come in `seconds`.
    #[must_use]
    pub fn too_many(message: &str, seconds: u64) -> Self {
        Self::new(429, 4000, "too_many_requests", message).with_retry_after(seconds)
    }

    /// 403/3011: the account is suspended.
    #[must_use]
    pub fn quota_suspended() -> Self {
        Self::new(403, 3011, "quota_suspended", "配额已暂停，请联系管理员")
    }

    /// 503/3511: the ledger did not answer; nothing was spent.
    #[must_use]
    pub fn quota_unavailable() -> Self {
        Self::new(503, 3511, "quota_unavailable", "配额检查失败，请稍后重试").with_retry_after(2)
    }

    /// 503/3501: the model service refused, failed or cannot be reached.
    #[must_use]
    pub fn provider_unavailable() -> Self {
        Self::new(503, 3501, "provider_unavailable", "AI服务暂时不可用，请稍后重试")
    }

    /// 504/3502: the model service was silent too long.
    #[must_use]
    pub fn provider_timeout() -> Self {
        Self::new(504, 3502, "provider_timeout", "AI服务响应超时，请稍后重试")
    }

    /// 429/3503: the model service limits us.
    #[must_use]
    pub fn provider_rate_limited(retry_after: Option<u64>) -> Self {
        Self::new(429, 3503, "provider_rate_limited", "AI服务繁忙，请稍后重试").with_retry_after(retry_after.unwrap_or(5))
    }

    /// 502/5004: the model service answered something that is not an answer (wrong key on our side included).
    #[must_use]
    pub fn provider_bad_answer(why: &str) -> Self {
        Self::new(502, 5004, "provider_bad_answer", "AI服务返回异常，请稍后重试").with_details(why)
    }

    /// 503/5002: the generation was cut by a restart of ours; what was delivered is saved.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(503, 5002, "interrupted", "生成被中断，已保存收到的内容，可重新生成")
    }

    /// 400/1001: a client wants to go on after an event that never was.
    #[must_use]
    pub fn beyond_the_log() -> Self {
        Self::invalid("Last-Event-ID", "超出该生成的事件记录，请不带序号重新读取")
    }

    /// 500/5000: ours. The cause is in the log under the request id, never here.
    #[must_use]
    pub fn internal() -> Self {
        Self::new(500, 5000, "internal", "服务器内部错误")
    }

    /// 500/5001: the database failed; the cause is logged.
    #[must_use]
    pub fn database() -> Self {
        Self::new(500, 5001, "database", "数据服务暂时不可用，请稍后重试")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_trip_between_object_and_worker() {
        let error = ApiError::provider_rate_limited(Some(7)).with_data("sessionId", "s1");
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(serde_json::from_str::<ApiError>(&json).unwrap(), error);
    }

    #[test]
    fn codes_that_the_client_treats_as_login_trouble_are_kept_for_login_trouble() {
        // Contract 3.5 rule 6: 401, 1002, 1102, 1103 only for authentication; 1007 never.
        let others = [
            ApiError::quota_insufficient("daily", 0),
            ApiError::quota_suspended(),
            ApiError::provider_bad_answer("401"),
            ApiError::conflict(""),
            ApiError::internal(),
        ];
        for error in others {
            assert_ne!(error.status, 401);
            assert!(![1002, 1102, 1103, 1007].contains(&error.code));
        }
    }
}
