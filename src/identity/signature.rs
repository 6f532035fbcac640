//! Signed service requests (design.md): `X-Key-Id`, `X-Timestamp`, `X-Nonce`, `X-Signature` = lower-case hex of
//! HMAC-SHA-256 over `v1\n{timestamp}\n{nonce}\n{METHOD}\n{path?query}\n{hex sha256 of the body}`.
//!
//! Invariant: compared in constant time; the window is ±300 s; that a nonce works once is the caller's business (it takes
//! a store). PURE.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// How far a timestamp may be from now, seconds.
pub const WINDOW_S: i64 = 300;
/// Longest nonce, bytes.
const NONCE_BYTES_MAX: usize = 128;

/// What a signature covers.
pub struct Signed<'a> {
    /// Unix seconds.
    pub timestamp_s: i64,
    /// Works once.
    pub nonce: &'a str,
    /// Upper case.
    pub method: &'a str,
    /// Path and query as sent, prefix included.
    pub path: &'a str,
    /// The body's bytes.
    pub body: &'a [u8],
}

impl Signed<'_> {
    fn mac(&self, secret: &[u8]) -> Option<Hmac<Sha256>> {
        let body = hex::encode(Sha256::digest(self.body));
        let text = format!("v1\n{}\n{}\n{}\n{}\n{body}", self.timestamp_s, self.nonce, self.method, self.path);
        // HMAC takes keys of any length; only the type says that it might not.
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).ok()?;
        mac.update(text.as_bytes());
        Some(mac)
    }

    /// The signature, lower-case hex.
    #[must_use]
    pub fn sign(&self, secret: &[u8]) -> String {
        self.mac(secret).map(|mac| hex::encode(mac.finalize().into_bytes())).unwrap_or_default()
    }

    /// Checks window, nonce and signature.
    ///
    /// # Errors
    /// 401/1002.
    pub fn verify(&self, keys: &BTreeMap<String, String>, key_id: &str, signature: &str, now_s: i64) -> Result<(), ApiError> {
        let secret = keys.get(key_id).ok_or_else(ApiError::signature_invalid)?;
        let in_window = (now_s - WINDOW_S..=now_s + WINDOW_S).contains(&self.timestamp_s);
        let nonce_fits = (8..=NONCE_BYTES_MAX).contains(&self.nonce.len()) && self.nonce.bytes().all(|b| b.is_ascii_graphic());
        let lower = signature.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let bytes = hex::decode(signature).map_err(|_| ApiError::signature_invalid())?;
        let mac = self.mac(secret.as_bytes()).ok_or_else(ApiError::signature_invalid)?;
        if in_window && nonce_fits && lower && mac.verify_slice(&bytes).is_ok() {
            Ok(())
        } else {
            Err(ApiError::signature_invalid())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn request<'a>() -> Signed<'a> {
        Signed {
            timestamp_s: NOW,
            nonce: "nonce-0001",
            method: "POST",
            path: "/api/v1/ai/quota/recharge?x=1",
            body: b"{\"a\":1}",
        }
    }

    fn keys() -> BTreeMap<String, String> {
        BTreeMap::from([("old".to_owned(), "secret-1".to_owned()), ("new".to_owned(), "secret-2".to_owned())])
    }

    #[test]
    fn a_signature_holds_for_its_key_and_window() {
        let signature = request().sign(b"secret-1");
        assert_eq!(signature.len(), 64);
        for (now, holds) in [(NOW, true), (NOW + 299, true), (NOW - 299, true), (NOW + 301, false), (NOW - 301, false)] {
            assert_eq!(request().verify(&keys(), "old", &signature, now).is_ok(), holds, "{now}");
        }
        assert!(request().verify(&keys(), "new", &signature, NOW).is_err());
        assert!(request().verify(&keys(), "gone", &signature, NOW).is_err());
    }

    #[test]
    fn anything_changed_breaks_it() {
        let signature = request().sign(b"secret-1");
        let changed = [
            Signed { timestamp_s: NOW + 1, ..request() },
            Signed { nonce: "nonce-0002", ..request() },
            Signed { method: "PUT", ..request() },
            Signed { path: "/api/v1/ai/quota/recharge?x=2", ..request() },
            Signed { body: b"{\"a\":2}", ..request() },
        ];
        for signed in changed {
            assert!(signed.verify(&keys(), "old", &signature, NOW).is_err());
        }
        for at in 0..signature.len() {
            let mut forged = signature.clone().into_bytes();
            forged[at] = if forged[at] == b'0' { b'1' } else { b'0' };
            let forged = String::from_utf8(forged).unwrap();
            assert!(request().verify(&keys(), "old", &forged, NOW).is_err(), "{at}");
        }
        for forged in ["", "00", &signature[..62], &signature.to_uppercase(), "zz"] {
            assert!(request().verify(&keys(), "old", forged, NOW).is_err());
        }
    }
}
