//! Verifies bearer tokens (RFC 7519, RFC 8725) with `jwt-compact`.
//!
//! Invariant: the token's header never chooses what is trusted. `HS256` is checked with `JWT_SECRET` only; `EdDSA` and
//! `ES256` only with the key of exactly that algorithm that `kid` names in `JWT_JWKS`; every other `alg`, a `kid` that
//! is not in the set, and critical extensions are refused. `jwt-compact` checks signatures, not times: times, issuer,
//! audience and kind are checked here, against a clock that is an argument.
//!
//! PURE.

use std::collections::HashMap;

use jwt_compact::Algorithm;
use jwt_compact::alg::{Ed25519, Es256, Hs256, Hs256Key};
use jwt_compact::jwk::JsonWebKey;
use jwt_compact::prelude::*;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{Caller, Role, is_user_id};
use crate::error::ApiError;

/// Clocks may differ by this much, seconds: forgiven at `exp` and `nbf`.
const LEEWAY_S: i64 = 30;
/// A token longer than this is not read, bytes.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// The shortest secret HS256 is safe with (RFC 7518 section 3.2), bytes.
pub const SECRET_BYTES_MIN: usize = 32;

type EdKey = <Ed25519 as Algorithm>::VerifyingKey;
type EcKey = <Es256 as Algorithm>::VerifyingKey;

enum PublicKey {
    EdDsa(EdKey),
    Es256(Box<EcKey>),
}

/// The keys and expectations tokens are checked against.
pub struct Verifier {
    secret: Option<Hs256Key>,
    keys: HashMap<String, PublicKey>,
    issuer: Option<String>,
    audience: Option<String>,
}

#[derive(Deserialize, Clone)]
struct JwksKey {
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
}

/// Claims beside `exp`, `nbf`, `iat`.
#[derive(Deserialize, serde::Serialize, Clone)]
struct Custom {
    #[serde(default)]
    user_id: Option<String>,
    #[serde(default)]
    sub: Option<String>,
    #[serde(default, deserialize_with = "words")]
    role: Vec<String>,
    #[serde(default, deserialize_with = "words")]
    roles: Vec<String>,
    #[serde(default)]
    token_type: Option<String>,
    #[serde(default)]
    iss: Option<String>,
    #[serde(default, deserialize_with = "words")]
    aud: Vec<String>,
}

/// Header fields that change what a token means.
#[derive(Deserialize, serde::Serialize, Clone)]
struct Extra {
    #[serde(default)]
    crit: Option<Value>,
    #[serde(default)]
    b64: Option<Value>,
}

/// One word or a list of words: `role` and `aud` come in both forms.
fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        One(String),
        Many(Vec<String>),
        None(()),
    }
    Ok(match Words::deserialize(deserializer)? {
        Words::One(word) => vec![word],
        Words::Many(words) => words,
        Words::None(()) => Vec::new(),
    })
}

impl Verifier {
    /// Builds a verifier. `jwks` is a JWK Set (RFC 7517 section 5) of EdDSA (Ed25519) and ES256 (P-256) public keys,
    /// each with its own `kid`.
    ///
    /// # Errors
    /// An English sentence for the operator when a key is too short, unreadable, private, unnamed or of another kind.
    pub fn new(secret: Option<&str>, jwks: Option<&str>, issuer: Option<&str>, audience: Option<&str>) -> Result<Self, String> {
        let secret = match secret {
            Some(secret) if secret.len() >= SECRET_BYTES_MIN => Some(Hs256Key::new(secret)),
            Some(_) => return Err(format!("JWT_SECRET must have at least {SECRET_BYTES_MIN} bytes")),
            None => None,
        };
        let keys = jwks.map_or_else(|| Ok(HashMap::new()), parse_jwks)?;
        if secret.is_none() && keys.is_empty() {
            return Err("set JWT_SECRET or JWT_JWKS: without either no token can be checked".to_owned());
        }
        Ok(Self { secret, keys, issuer: issuer.map(str::to_owned), audience: audience.map(str::to_owned) })
    }

    /// Verifies `token` at `now_s` (unix seconds).
    ///
    /// # Errors
    /// 401 with code 2007 (expired) or 2008 (anything else).
    pub fn verify(&self, token: &str, now_s: i64) -> Result<Caller, ApiError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(ApiError::token_invalid());
        }
        let token = UntrustedToken::<Extra>::try_from(token).map_err(|_| ApiError::token_invalid())?;
        if token.header().other_fields.crit.is_some() || token.header().other_fields.b64.is_some() {
            return Err(ApiError::token_invalid());
        }
        let claims = self.verify_signature(&token)?;
        self.check_times(&claims, now_s)?;
        self.caller(&claims)
    }

    fn verify_signature(&self, token: &UntrustedToken<'_, Extra>) -> Result<Claims<Custom>, ApiError> {
        let invalid = |_| ApiError::token_invalid();
        let token = match (token.algorithm(), token.header().key_id.as_deref(), &self.secret) {
            ("HS256", None, Some(secret)) => Hs256.validator(secret).validate(token).map_err(invalid)?,
            ("EdDSA", Some(kid), _) => match self.keys.get(kid) {
                Some(PublicKey::EdDsa(key)) => Ed25519.validator(key).validate(token).map_err(invalid)?,
                _ => return Err(ApiError::token_invalid()),
            },
            ("ES256", Some(kid), _) => match self.keys.get(kid) {
                Some(PublicKey::Es256(key)) => Es256.validator(key.as_ref()).validate(token).map_err(invalid)?,
                _ => return Err(ApiError::token_invalid()),
            },
            _ => return Err(ApiError::token_invalid()),
        };
        Ok(token.into_parts().1)
    }

    fn check_times(&self, claims: &Claims<Custom>, now_s: i64) -> Result<(), ApiError> {
        let expires = claims.expiration.ok_or_else(ApiError::token_invalid)?.timestamp();
        if now_s > expires.saturating_add(LEEWAY_S) {
            return Err(ApiError::token_expired());
        }
        if claims.not_before.is_some_and(|from| now_s < from.timestamp().saturating_sub(LEEWAY_S)) {
            return Err(ApiError::token_invalid());
        }
        let custom = &claims.custom;
        let issuer_holds = self.issuer.as_ref().is_none_or(|wanted| custom.iss.as_ref() == Some(wanted));
        let audience_holds = self.audience.as_ref().is_none_or(|wanted| custom.aud.contains(wanted));
        if !issuer_holds || !audience_holds || custom.token_type.as_deref() == Some("refresh") {
            return Err(ApiError::token_invalid());
        }
        Ok(())
    }

    fn caller(&self, claims: &Claims<Custom>) -> Result<Caller, ApiError> {
        let custom = &claims.custom;
        let user_id = custom.user_id.as_deref().or(custom.sub.as_deref()).unwrap_or_default();
        if !is_user_id(user_id) {
            return Err(ApiError::token_invalid());
        }
        let role = custom.role.iter().chain(&custom.roles).filter_map(|word| Role::from_claim(word)).max().unwrap_or_default();
        let issued_at = claims.issued_at.map_or(0, |at| at.timestamp());
        Ok(Caller { user_id: user_id.to_owned(), role, issued_at })
    }
}

fn parse_jwks(text: &str) -> Result<HashMap<String, PublicKey>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_str(text).map_err(|e| format!("JWT_JWKS is no JWK Set: {e}"))?;
    let mut keys = HashMap::new();
    for (at, value) in set.keys.iter().enumerate() {
        let head: JwksKey = serde_json::from_value(value.clone()).map_err(|e| format!("JWT_JWKS key {at}: {e}"))?;
        let kid = head.kid.filter(|kid| !kid.is_empty()).ok_or(format!("JWT_JWKS key {at} has no kid"))?;
        if value.get("d").is_some() {
            return Err(format!("JWT_JWKS key {kid} is a private key: publish only its public half"));
        }
        if head.usage.is_some_and(|usage| usage != "sig") {
            continue;
        }
        let jwk: JsonWebKey<'_> = serde_json::from_value(value.clone()).map_err(|e| format!("JWT_JWKS key {kid}: {e}"))?;
        let (key, algorithm) = match value.get("crv").and_then(Value::as_str) {
            Some("Ed25519") => {
                (PublicKey::EdDsa(EdKey::try_from(&jwk).map_err(|e| format!("JWT_JWKS key {kid}: {e}"))?), "EdDSA")
            }
            Some("P-256") => {
                (PublicKey::Es256(Box::new(EcKey::try_from(&jwk).map_err(|e| format!("JWT_JWKS key {kid}: {e}"))?)), "ES256")
            }
            _ => return Err(format!("JWT_JWKS key {kid}: only Ed25519 and P-256 keys are used")),
        };
        if head.alg.is_some_and(|alg| alg != algorithm) {
            return Err(format!("JWT_JWKS key {kid}: its alg does not fit its curve"));
        }
        if keys.insert(kid.clone(), key).is_some() {
            return Err(format!("JWT_JWKS has two keys named {kid}"));
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
    use ed25519_dalek::Signer as _;
    use hmac::{Hmac, Mac};
    use serde_json::json;

    use super::*;

    const SECRET: &str = "0123456789abcdef0123456789abcdef";
    const NOW: i64 = 1_800_000_000;

    fn hs(secret: &[u8], header: &Value, claims: &Value) -> String {
        let head = format!("{}.{}", B64.encode(header.to_string()), B64.encode(claims.to_string()));
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret).unwrap();
        mac.update(head.as_bytes());
        format!("{head}.{}", B64.encode(mac.finalize().into_bytes()))
    }

    fn ed(key: &ed25519_dalek::SigningKey, header: &Value, claims: &Value) -> String {
        let head = format!("{}.{}", B64.encode(header.to_string()), B64.encode(claims.to_string()));
        let signature = key.sign(head.as_bytes());
        format!("{head}.{}", B64.encode(signature.to_bytes()))
    }

    fn es(key: &p256::ecdsa::SigningKey, header: &Value, claims: &Value) -> String {
        let head = format!("{}.{}", B64.encode(header.to_string()), B64.encode(claims.to_string()));
        let signature: p256::ecdsa::Signature = p256::ecdsa::signature::Signer::sign(key, head.as_bytes());
        format!("{head}.{}", B64.encode(signature.to_bytes()))
    }

    fn keys() -> (ed25519_dalek::SigningKey, p256::ecdsa::SigningKey, String) {
        let ed = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let ec = p256::ecdsa::SigningKey::from_slice(&[9; 32]).unwrap();
        let point = ec.verifying_key().to_encoded_point(false);
        let jwks = json!({"keys": [
            {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": B64.encode(ed.verifying_key().to_bytes())},
            {"kty": "EC", "crv": "P-256", "kid": "ec", "alg": "ES256", "x": B64.encode(point.x().unwrap()), "y": B64.encode(point.y().unwrap())},
        ]});
        (ed, ec, jwks.to_string())
    }

    fn good() -> Value {
        json!({"user_id": "u1", "roles": ["author"], "exp": NOW + 60})
    }

    #[test]
    fn good_tokens_of_each_algorithm_name_their_caller() {
        let (ed_key, ec_key, jwks) = keys();
        let verifier = Verifier::new(Some(SECRET), Some(&jwks), None, None).unwrap();
        for token in [
            hs(SECRET.as_bytes(), &json!({"alg": "HS256", "typ": "JWT"}), &good()),
            ed(&ed_key, &json!({"alg": "EdDSA", "kid": "ed"}), &good()),
            es(&ec_key, &json!({"alg": "ES256", "kid": "ec"}), &good()),
        ] {
            let caller = verifier.verify(&token, NOW).unwrap();
            assert_eq!((caller.user_id.as_str(), caller.role), ("u1", Role::Writer));
        }
    }

    #[test]
    fn claims_give_user_and_the_highest_role() {
        let verifier = Verifier::new(Some(SECRET), None, None, None).unwrap();
        let cases = [
            (json!({"sub": "s", "exp": NOW}), "s", Role::Reader),
            (json!({"sub": "s", "user_id": "u", "exp": NOW, "role": "vip", "roles": ["reader", "author"]}), "u", Role::Vip),
            (json!({"sub": "s", "exp": NOW, "roles": "admin"}), "s", Role::Admin),
            (json!({"sub": "s", "exp": NOW, "roles": ["root", "superuser"]}), "s", Role::Reader),
            (json!({"sub": "s", "exp": NOW as f64 + 0.5, "roles": null}), "s", Role::Reader),
        ];
        for (claims, user, role) in cases {
            let caller = verifier.verify(&hs(SECRET.as_bytes(), &json!({"alg": "HS256"}), &claims), NOW).unwrap();
            assert_eq!((caller.user_id.as_str(), caller.role), (user, role), "{claims}");
        }
    }

    #[test]
    fn forged_and_stale_tokens_are_refused() {
        let (ed_key, _, jwks) = keys();
        let verifier = Verifier::new(Some(SECRET), Some(&jwks), Some("platform"), Some("ai")).unwrap();
        let claims = json!({"user_id": "u", "exp": NOW + 60, "iss": "platform", "aud": ["x", "ai"]});
        let with = |key: &str, value: Value| {
            let mut claims = claims.clone();
            claims[key] = value;
            claims
        };
        let hs256 = json!({"alg": "HS256"});
        assert!(verifier.verify(&hs(SECRET.as_bytes(), &hs256, &claims), NOW).is_ok());
        let good = hs(SECRET.as_bytes(), &hs256, &claims);
        let ed_public = ed_key.verifying_key().to_bytes();
        let mut flipped = good.clone();
        flipped.replace_range(0..1, "f");
        let forged = [
            hs(b"another-secret-another-secret-32", &hs256, &claims),
            hs(&ed_public, &json!({"alg": "HS256", "kid": "ed"}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "HS256", "kid": "../../dev/null"}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "HS512"}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "none"}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "hs256"}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "HS256", "crit": ["exp"]}), &claims),
            hs(SECRET.as_bytes(), &json!({"alg": "ES256", "kid": "ed"}), &claims),
            ed(&ed_key, &json!({"alg": "EdDSA"}), &claims),
            ed(&ed_key, &json!({"alg": "EdDSA", "kid": "ec"}), &claims),
            ed(&ed_key, &json!({"alg": "EdDSA", "kid": "gone"}), &claims),
            hs(SECRET.as_bytes(), &hs256, &with("iss", json!("other"))),
            hs(SECRET.as_bytes(), &hs256, &with("aud", json!("other"))),
            hs(SECRET.as_bytes(), &hs256, &with("token_type", json!("refresh"))),
            hs(SECRET.as_bytes(), &hs256, &with("nbf", json!(NOW + 61))),
            hs(SECRET.as_bytes(), &hs256, &with("exp", json!(NOW - 61))),
            hs(SECRET.as_bytes(), &hs256, &with("exp", json!(-1))),
            hs(SECRET.as_bytes(), &hs256, &with("exp", json!(i64::MAX))),
            hs(SECRET.as_bytes(), &hs256, &with("exp", json!(null))),
            hs(SECRET.as_bytes(), &hs256, &with("exp", json!("9999999999"))),
            hs(SECRET.as_bytes(), &hs256, &json!({"user_id": "u", "iss": "platform", "aud": "ai"})),
            hs(SECRET.as_bytes(), &hs256, &with("user_id", json!(""))),
            hs(SECRET.as_bytes(), &hs256, &with("user_id", json!("a\nb"))),
            hs(SECRET.as_bytes(), &hs256, &with("user_id", json!(7))),
            hs(SECRET.as_bytes(), &hs256, &json!([1])),
            good.rsplit_once('.').unwrap().0.to_owned() + ".",
            good[..good.len() - 2].to_owned(),
            flipped,
            "a.b.c".to_owned(),
            String::new(),
            "x".repeat(9000),
        ];
        for (at, token) in forged.iter().enumerate() {
            let error = verifier.verify(token, NOW).unwrap_err();
            assert_eq!(error.status, 401, "forgery {at}");
            assert!([2007, 2008].contains(&error.code), "forgery {at}");
        }
    }

    #[test]
    fn weak_or_wrong_keys_are_told_to_the_operator() {
        let (_, _, jwks) = keys();
        assert!(Verifier::new(Some("short"), None, None, None).is_err());
        assert!(Verifier::new(None, None, None, None).is_err());
        assert!(Verifier::new(None, Some(&jwks), None, None).is_ok());
        assert!(Verifier::new(None, Some(&jwks.replace("\"kid\":\"ed\"", "\"kid\":\"ec\"")), None, None).is_err());
        assert!(
            Verifier::new(None, Some("{\"keys\":[{\"kty\":\"RSA\",\"kid\":\"r\",\"n\":\"AQAB\",\"e\":\"AQAB\"}]}"), None, None)
                .is_err()
        );
    }
}
