//! A request on its way to a handler: who calls, with which id, and a body that is read under a cap.
//!
//! Invariant: a body over [`BODY_BYTES_MAX`] is refused by its declared length and again while reading; JSON deeper than
//! serde_json's 128 levels, bad UTF-8 and lone surrogates are refused by the parser; and
//! no body may name a role or another user (contract 5 row 41).

use std::rc::Rc;

use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};
use worker::{Env, Request};

use crate::config::Config;
use crate::error::ApiError;
use crate::identity::{Caller, is_user_id};

/// The largest body that is read, bytes.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Fields no ordinary caller may send: rights come from the token alone.
const RIGHTS_FIELDS: [&str; 4] = ["role", "roles", "userId", "user_id"];

/// What a handler gets.
pub struct Ctx {
    /// The request; its body is read once, through [`Self::body`].
    pub request: Request,
    /// Bindings.
    pub env: Env,
    /// Configuration.
    pub config: Rc<Config>,
    /// The path's parameters in order.
    pub params: Vec<String>,
    /// The decoded query.
    pub query: Vec<(String, String)>,
    /// The verified caller; `None` only on public routes.
    pub caller: Option<Caller>,
    /// The body, if it was read before the handler ran (to check a signature).
    pub bytes: Option<Vec<u8>>,
    /// The request's id: the caller's `X-Request-ID`, or ours.
    pub request_id: String,
}

/// A parsed body and the hash that tells whether a repeated key carries the same request.
pub struct Body<T> {
    /// The body.
    pub value: T,
    /// Hash over method, path and body bytes, hex.
    pub fingerprint: String,
}

impl Ctx {
    /// The caller of an authenticated route.
    ///
    /// # Errors
    /// 401 on a route that forgot to ask for one.
    pub fn caller(&self) -> Result<&Caller, ApiError> {
        self.caller.as_ref().ok_or_else(ApiError::token_missing)
    }

    /// The path parameter number `at`, the id of a user: what a token could name.
    ///
    /// # Errors
    /// 404 when no token could.
    pub fn user_id(&self, at: usize) -> Result<String, ApiError> {
        let id = self.params.get(at).map_or("", String::as_str);
        if is_user_id(id) { Ok(id.to_owned()) } else { Err(ApiError::not_found("用户")) }
    }

    /// Page and size when the client pages (`page`, `pageSize` or `page_size`), `None` when it does not.
    ///
    /// # Errors
    /// 400/1001 naming the parameter.
    pub fn page(&self) -> Result<Option<(u64, u64)>, ApiError> {
        let size = if self.param("page_size").is_some() { "page_size" } else { "pageSize" };
        if self.param("page").is_none() && self.param(size).is_none() {
            return Ok(None);
        }
        Ok(Some((self.number("page", 1, 1..=1_000_000)?, self.number(size, 20, 1..=1_000)?)))
    }

    /// The path parameter number `at`, an id: 1–64 characters of `[A-Za-z0-9_-]`. Anything else names nothing.
    ///
    /// # Errors
    /// 404 when it cannot be an id of ours.
    pub fn id(&self, at: usize, what: &str) -> Result<String, ApiError> {
        let id = self.params.get(at).map_or("", String::as_str);
        if is_id(id) { Ok(id.to_owned()) } else { Err(ApiError::not_found(what)) }
    }

    /// A query parameter, `None` when absent or empty.
    #[must_use]
    pub fn param(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// A whole number from the query within `range`, or `default` when absent.
    ///
    /// # Errors
    /// 400/1001 naming the parameter.
    pub fn number(&self, name: &str, default: u64, range: std::ops::RangeInclusive<u64>) -> Result<u64, ApiError> {
        let Some(text) = self.param(name) else { return Ok(default) };
        text.parse()
            .ok()
            .filter(|value| range.contains(value))
            .ok_or_else(|| ApiError::invalid(name, format!("必须是 {} 到 {} 之间的整数", range.start(), range.end())))
    }

    /// A request header, `None` when absent or empty.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<String> {
        self.request.headers().get(name).ok().flatten().filter(|value| !value.is_empty())
    }

    /// Reads and parses the JSON body; an empty one counts as `{}`.
    ///
    /// # Errors
    /// 413/3521 over the cap, 400/1001 naming the field otherwise.
    pub async fn body<T: DeserializeOwned>(&mut self) -> Result<Body<T>, ApiError> {
        let body = self.body_naming_users::<Value>().await?;
        if let Some(field) = RIGHTS_FIELDS.iter().find(|field| body.value.get(**field).is_some()) {
            return Err(ApiError::invalid(field, "不允许出现在请求中，身份与权限只来自访问令牌"));
        }
        Ok(Body { value: typed(body.value)?, fingerprint: body.fingerprint })
    }

    /// As [`Self::body`], for administrators and services: it may name users and roles.
    ///
    /// # Errors
    /// As [`Self::body`].
    pub async fn body_naming_users<T: DeserializeOwned>(&mut self) -> Result<Body<T>, ApiError> {
        let bytes = self.read().await?;
        let mut hash = Sha256::new();
        // A streaming route and its whole twin are the same request: a client may fall back from one to the other.
        let path = self.request.path();
        hash.update(format!("{:?}\n{}\n", self.request.method(), path.strip_suffix("/stream").unwrap_or(&path)));
        hash.update(&bytes);
        let fingerprint = hex::encode(hash.finalize());
        let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        Ok(Body { value: typed(object(bytes)?)?, fingerprint })
    }

    /// Reads the body's bytes, once.
    ///
    /// # Errors
    /// 413/3521 over the cap.
    pub async fn read(&mut self) -> Result<Vec<u8>, ApiError> {
        if let Some(bytes) = self.bytes.take() {
            return Ok(bytes);
        }
        let too_large = || ApiError::body_too_large(BODY_BYTES_MAX);
        let unreadable = |_| ApiError::invalid("body", "无法读取");
        match self.header("content-length").map(|text| text.parse::<usize>()) {
            Some(Ok(length)) if length > BODY_BYTES_MAX => return Err(too_large()),
            // HTTP/1.1 and 2 both hold a body to its declared length: one crossing reads it all.
            Some(Ok(_)) => return self.request.bytes().await.map_err(unreadable),
            _ => {}
        }
        if self.request.inner().body().is_none() {
            return Ok(Vec::new());
        }
        let mut stream = self.request.stream().map_err(unreadable)?;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            bytes.extend(chunk.map_err(unreadable)?);
            if bytes.len() > BODY_BYTES_MAX {
                return Err(too_large());
            }
        }
        Ok(bytes)
    }
}

/// Whether `text` has the shape of an id of ours.
#[must_use]
pub fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Parses a JSON object.
fn object(bytes: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| ApiError::invalid("body", format!("不是有效的 JSON（第 {} 行第 {} 列）", e.line(), e.column())))?;
    if value.is_object() { Ok(value) } else { Err(ApiError::invalid("body", "必须是 JSON 对象")) }
}

/// Reads `T` out of a JSON object, naming the field that is wrong.
fn typed<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner().to_string();
        match inner.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
            Some(field) if path == "." => ApiError::invalid(field, "不能为空"),
            Some(field) => ApiError::invalid(&format!("{path}.{field}"), "不能为空"),
            // serde quotes the offending value, which may be an author's text: only what was expected is told.
            None => {
                let expected = inner.split("expected ").nth(1).unwrap_or("another value");
                ApiError::invalid(if path == "." { "body" } else { &path }, format!("类型或取值不正确，应为 {expected}"))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize, Debug)]
    #[allow(dead_code)]
    struct Sample {
        message: String,
        options: Option<Options>,
    }

    #[derive(serde::Deserialize, Debug)]
    #[allow(dead_code)]
    struct Options {
        temperature: f64,
    }

    #[test]
    fn a_wrong_field_is_named() {
        let cases: [(&[u8], &str); 7] = [
            (b"{}", "message"),
            (b"[]", "body"),
            (b"{\"message\":7}", "message"),
            (b"{\"message\":\"a\",\"options\":{\"temperature\":\"hot\"}}", "options.temperature"),
            (b"{\"message\":\"a\",\"options\":{}}", "options.temperature"),
            (b"{\"message\":\"\\ud800\"}", "body"),
            (b"{\"message\":\"\xff\"}", "body"),
        ];
        for (bytes, field) in cases {
            let error = object(bytes).and_then(typed::<Sample>).unwrap_err();
            assert_eq!((error.status, error.code), (400, 1001));
            assert!(error.details.as_deref().unwrap_or_default().starts_with(&format!("{field}: ")), "{error:?}");
        }
        assert!(object(b"{\"message\":\"a\",\"unknown\":1}").and_then(typed::<Sample>).is_ok());
    }

    #[test]
    fn a_bomb_of_depth_is_refused() {
        let deep = format!("{{\"message\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(object(deep.as_bytes()).unwrap_err().code, 1001);
    }
}
