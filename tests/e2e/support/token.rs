//! Tokens of every kind a test may want to present: good ones, and forgeries whose header, claims and signature are
//! chosen freely. Made by hand (base64url over JSON), because a library would refuse to make the bad ones.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::Signer as _;
use hmac::{Hmac, Mac as _};
use p256::ecdsa;
use serde_json::{Value, json};
use sha2::{Sha256, Sha384, Sha512};

/// `JWT_SECRET` of the Workers under test.
pub const SECRET: &str = "e2e-jwt-secret-that-no-log-may-ever-show-0123456789";

/// `kid` of the Ed25519 key in [`jwks`].
pub const ED_KID: &str = "e2e-ed";
/// `kid` of the P-256 key in [`jwks`].
pub const ES_KID: &str = "e2e-es";
/// `kid` of a second Ed25519 key in [`jwks`]: old and new stand side by side while keys change.
pub const OLD_ED_KID: &str = "e2e-ed-old";

/// Unix seconds.
pub fn now_s() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().expect("a clock after 1970");
    i64::try_from(since.as_secs()).expect("a sane clock")
}

/// The claims of an ordinary access token.
pub fn claims(user: &str, role: &str) -> Value {
    let now = now_s();
    json!({"user_id": user, "roles": [role], "token_type": "access", "iat": now, "exp": now + 7200})
}

/// A good HS256 token.
pub fn access(user: &str, role: &str) -> String {
    hs256(&json!({"alg": "HS256", "typ": "JWT"}), &claims(user, role), SECRET.as_bytes())
}

/// A token signed by HMAC-SHA-256, whatever the header says.
pub fn hs256(header: &Value, claims: &Value, key: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any key length");
    signed(header, claims, |input| {
        mac.update(input);
        mac.finalize().into_bytes().to_vec()
    })
}

/// The same by HMAC-SHA-384.
pub fn hs384(header: &Value, claims: &Value, key: &[u8]) -> String {
    let mut mac = Hmac::<Sha384>::new_from_slice(key).expect("any key length");
    signed(header, claims, |input| {
        mac.update(input);
        mac.finalize().into_bytes().to_vec()
    })
}

/// The same by HMAC-SHA-512.
pub fn hs512(header: &Value, claims: &Value, key: &[u8]) -> String {
    let mut mac = Hmac::<Sha512>::new_from_slice(key).expect("any key length");
    signed(header, claims, |input| {
        mac.update(input);
        mac.finalize().into_bytes().to_vec()
    })
}

/// A token signed by the Ed25519 key made of this seed byte.
pub fn eddsa(header: &Value, claims: &Value, key: &ed25519_dalek::SigningKey) -> String {
    signed(header, claims, |input| key.sign(input).to_bytes().to_vec())
}

/// A token signed by this P-256 key.
pub fn es256(header: &Value, claims: &Value, key: &ecdsa::SigningKey) -> String {
    signed(header, claims, |input| {
        let signature: ecdsa::Signature = key.sign(input);
        signature.to_bytes().to_vec()
    })
}

/// A token whose signature is whatever `sign` makes of `header.claims`.
pub fn signed(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    raw(header.to_string().as_bytes(), claims.to_string().as_bytes(), sign)
}

/// As [`signed`], with parts that need not be JSON.
pub fn raw(header: &[u8], claims: &[u8], sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let input = format!("{}.{}", base64url(header), base64url(claims));
    let signature = sign(input.as_bytes());
    format!("{input}.{}", base64url(&signature))
}

/// The Ed25519 key behind [`ED_KID`].
pub fn ed_key() -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(&[7; 32])
}

/// The Ed25519 key behind [`OLD_ED_KID`].
pub fn old_ed_key() -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(&[8; 32])
}

/// An Ed25519 key that the Worker does not know.
pub fn strange_ed_key() -> ed25519_dalek::SigningKey {
    ed25519_dalek::SigningKey::from_bytes(&[9; 32])
}

/// The P-256 key behind [`ES_KID`].
pub fn es_key() -> ecdsa::SigningKey {
    ecdsa::SigningKey::from_slice(&[5; 32]).expect("a scalar in range")
}

/// A P-256 key that the Worker does not know.
pub fn strange_es_key() -> ecdsa::SigningKey {
    ecdsa::SigningKey::from_slice(&[6; 32]).expect("a scalar in range")
}

/// `JWT_JWKS` of the Workers under test.
pub fn jwks() -> Value {
    let ed = |kid: &str, key: &ed25519_dalek::SigningKey| {
        let x = base64url(key.verifying_key().as_bytes());
        json!({"kty": "OKP", "crv": "Ed25519", "kid": kid, "alg": "EdDSA", "use": "sig", "x": x})
    };
    let point = es_key().verifying_key().to_encoded_point(false);
    let coordinate = |bytes: Option<&p256::FieldBytes>| base64url(bytes.expect("an uncompressed point"));
    let es = json!({
        "kty": "EC", "crv": "P-256", "kid": ES_KID, "alg": "ES256", "use": "sig",
        "x": coordinate(point.x()), "y": coordinate(point.y()),
    });
    json!({"keys": [ed(ED_KID, &ed_key()), ed(OLD_ED_KID, &old_ed_key()), es]})
}

/// Base64url without padding.
pub fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}
