//! A platform's backend that signs what it asks (design.md, "Signed service request"). Signed here by the words of the
//! design, not by the Worker's own code, so that the two check each other.

use hmac::{Hmac, Mac as _};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::client::{Request, User};
use super::{token, unique};

/// `SERVICE_KEYS` of the Workers under test: two keys, as while they change. The first signs webhooks.
pub fn keys() -> Value {
    json!({"backend": "e2e-service-secret-backend", "billing": "e2e-service-secret-billing"})
}

/// One signed request, of which every part can be another than what was signed.
#[derive(Clone)]
pub struct Signed {
    /// The headers as they will be sent.
    pub headers: Vec<(&'static str, String)>,
    /// The path below `/api/v1`, with its query.
    pub path: String,
    /// The body as it will be sent.
    pub body: String,
}

impl Signed {
    /// A POST of `body` by the key `billing`, signed at `at` (unix seconds).
    pub fn post(path: &str, body: &Value, at: i64) -> Self {
        let (timestamp, nonce, body) = (at.to_string(), unique(), body.to_string());
        let signature = signature(secret("billing"), &timestamp, &nonce, "POST", &format!("/api/v1{path}"), body.as_bytes());
        let headers =
            vec![("X-Key-Id", "billing".into()), ("X-Timestamp", timestamp), ("X-Nonce", nonce), ("X-Signature", signature)];
        Self { headers, path: path.to_owned(), body }
    }

    /// The same, signed now.
    pub fn now(path: &str, body: &Value) -> Self {
        Self::post(path, body, token::now_s())
    }

    /// With another value of a header.
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.to_owned()));
        self
    }

    /// Without a header.
    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self
    }

    /// The request, ready to be sent to `user`'s Worker; the user's token goes with it, if there is one.
    pub fn request(&self, user: &User) -> Request {
        let request = user.request(Method::POST, &self.path).body(self.body.clone());
        self.headers.iter().fold(request, |request, (name, value)| request.header(name, value))
    }
}

/// The secret of a key.
pub fn secret(key_id: &str) -> String {
    keys()[key_id].as_str().expect("a known key").to_owned()
}

/// The signature of design.md over these parts, lower-case hex.
pub fn signature(secret: String, timestamp: &str, nonce: &str, method: &str, path: &str, body: &[u8]) -> String {
    let hash = hex::encode(Sha256::digest(body));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any key length");
    mac.update(format!("v1\n{timestamp}\n{nonce}\n{method}\n{path}\n{hash}").as_bytes());
    hex::encode(mac.finalize().into_bytes())
}
