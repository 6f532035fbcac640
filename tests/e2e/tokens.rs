//! Who is calling: good tokens of all three algorithms pass; forged, stale and misused ones are 401 with the contract's
//! codes, on every route but the public one.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::User;
use crate::support::run;
use crate::support::token::{
    ED_KID, ES_KID, OLD_ED_KID, SECRET, access, base64url, claims, ed_key, eddsa, es_key, es256, hs256, hs384, hs512, jwks,
    now_s, old_ed_key, raw, signed, strange_ed_key, strange_es_key,
};
use crate::support::worker::Worker;

const EXPIRED: u64 = 2007;
const INVALID: u64 = 2008;
const MALFORMED: u64 = 2009;
const MISSING: u64 = 2010;

fn hs() -> Value {
    json!({"alg": "HS256", "typ": "JWT"})
}

fn ed(kid: Value) -> Value {
    json!({"alg": "EdDSA", "typ": "JWT", "kid": kid})
}

fn es(kid: &str) -> Value {
    json!({"alg": "ES256", "typ": "JWT", "kid": kid})
}

/// Ordinary claims with these changed; `null` removes.
fn claims_with(changes: Value) -> Value {
    let mut claims = claims("victim", "admin");
    let object = claims.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        object.remove(name);
        if !value.is_null() {
            object.insert(name.clone(), value.clone());
        }
    }
    claims
}

/// A correctly signed token with these claims changed.
fn own(changes: Value) -> String {
    hs256(&hs(), &claims_with(changes), SECRET.as_bytes())
}

/// Tokens that somebody without a key made.
fn forged() -> Vec<(&'static str, String)> {
    let victim = claims("victim", "admin");
    let good = access("victim", "reader");
    let (input, signature) = good.rsplit_once('.').expect("three parts");
    let (header, _) = input.split_once('.').expect("three parts");
    let none = |alg: &str| signed(&json!({"alg": alg}), &victim, |_| Vec::new());
    let key_x = jwks()["keys"][0]["x"].as_str().expect("x").to_owned();
    let point = es_key().verifying_key().to_encoded_point(false);
    let strange_jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(strange_ed_key().verifying_key().as_bytes())});
    let with_jwk = json!({"alg": "EdDSA", "kid": ED_KID, "jwk": strange_jwk});
    let with_url = json!({"alg": "EdDSA", "kid": ED_KID, "jku": "http://127.0.0.1:9/jwks.json", "x5u": "http://127.0.0.1:9/"});
    let hs_kid = json!({"alg": "HS256", "kid": ED_KID});
    let es_kid = json!({"alg": "HS256", "kid": ES_KID});
    let flipped = {
        let mut bytes = signature.as_bytes().to_vec();
        bytes[0] = if bytes[0] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).expect("ASCII")
    };
    vec![
        ("alg none", none("none")),
        ("alg None", none("None")),
        ("alg NONE", none("NONE")),
        ("alg empty", none("")),
        ("alg none over a good signature", format!("{}.{signature}", none("none").trim_end_matches('.'))),
        ("no alg", signed(&json!({"typ": "JWT"}), &victim, |_| Vec::new())),
        ("another secret", hs256(&hs(), &victim, b"another-secret-of-at-least-32-bytes!")),
        ("an empty secret", hs256(&hs(), &victim, b"")),
        ("HS384", hs384(&json!({"alg": "HS384"}), &victim, SECRET.as_bytes())),
        ("HS512", hs512(&json!({"alg": "HS512"}), &victim, SECRET.as_bytes())),
        ("HS512 called HS256", hs512(&hs(), &victim, SECRET.as_bytes())),
        ("HMAC with the Ed25519 public key", hs256(&hs_kid, &victim, ed_key().verifying_key().as_bytes())),
        ("HMAC with the public key's text", hs256(&hs_kid, &victim, key_x.as_bytes())),
        ("HMAC with the P-256 public key", hs256(&es_kid, &victim, point.as_bytes())),
        ("HMAC with the JWKS", hs256(&hs(), &victim, jwks().to_string().as_bytes())),
        ("HMAC with the kid", hs256(&hs_kid, &victim, ED_KID.as_bytes())),
        ("a strange Ed25519 key", eddsa(&ed(json!(ED_KID)), &victim, &strange_ed_key())),
        ("the other Ed25519 key's kid", eddsa(&ed(json!(OLD_ED_KID)), &victim, &ed_key())),
        ("a strange P-256 key", es256(&es(ES_KID), &victim, &strange_es_key())),
        ("an unknown kid", eddsa(&ed(json!("nobody")), &victim, &ed_key())),
        ("no kid among several keys", eddsa(&json!({"alg": "EdDSA"}), &victim, &strange_ed_key())),
        ("kid is a path", eddsa(&ed(json!("../../../dev/null")), &victim, &ed_key())),
        ("kid is SQL", eddsa(&ed(json!("x' UNION SELECT 'key")), &victim, &ed_key())),
        ("kid is a number", eddsa(&ed(json!(1)), &victim, &ed_key())),
        ("kid is an object", eddsa(&ed(json!({"$ne": null})), &victim, &ed_key())),
        ("the key in the header", eddsa(&with_jwk, &victim, &strange_ed_key())),
        ("the key behind a URL", eddsa(&with_url, &victim, &strange_ed_key())),
        ("EdDSA with the P-256 key's kid", eddsa(&ed(json!(ES_KID)), &victim, &ed_key())),
        ("ES256 with the Ed25519 key's kid", es256(&es(ED_KID), &victim, &es_key())),
        ("ES256 signature of zeros", signed(&es(ES_KID), &victim, |_| vec![0; 64])),
        ("EdDSA signature of zeros", signed(&ed(json!(ED_KID)), &victim, |_| vec![0; 64])),
        ("ES256 signed, EdDSA said", es256(&ed(json!(ES_KID)), &victim, &es_key())),
        ("other claims under a good signature", format!("{header}.{}.{signature}", base64url(victim.to_string().as_bytes()))),
        ("a flipped bit", format!("{input}.{flipped}")),
        ("half a signature", format!("{input}.{}", &signature[..signature.len() / 2])),
        ("no signature", format!("{input}.")),
        ("a header that is no JSON", raw(b"HS256", victim.to_string().as_bytes(), |_| vec![0; 32])),
        ("a header that is a list", raw(b"[\"HS256\"]", victim.to_string().as_bytes(), |_| vec![0; 32])),
    ]
}

/// Tokens that were signed by us and still do not let anyone in.
fn misused() -> Vec<(&'static str, String, u64)> {
    let now = now_s();
    vec![
        ("expired two minutes ago", own(json!({"exp": now - 120})), EXPIRED),
        ("expired long ago", own(json!({"exp": 1})), EXPIRED),
        ("expired before 1970", own(json!({"exp": -5})), EXPIRED),
        ("no exp", own(json!({"exp": null})), INVALID),
        ("exp as text", own(json!({"exp": (now + 3600).to_string()})), INVALID),
        ("not yet valid", own(json!({"nbf": now + 3600})), INVALID),
        ("a refresh token", own(json!({"token_type": "refresh"})), INVALID),
        ("nobody", own(json!({"user_id": null})), INVALID),
        ("an empty user", own(json!({"user_id": ""})), INVALID),
        ("a user that is an object", own(json!({"user_id": {"$ne": ""}})), INVALID),
        ("claims that are a list", hs256(&hs(), &json!(["victim"]), SECRET.as_bytes()), INVALID),
        ("an expired EdDSA token", eddsa(&ed(json!(ED_KID)), &claims_with(json!({"exp": now - 120})), &ed_key()), EXPIRED),
        ("an ES256 refresh token", es256(&es(ES_KID), &claims_with(json!({"token_type": "refresh"})), &es_key()), INVALID),
    ]
}

#[test]
fn forged_and_misused_tokens_are_401() {
    run(async {
        let user = Worker::anyone().await;
        let forged = forged();
        assert!(forged.len() >= 30);
        let cases = forged.into_iter().map(|(name, token)| (name, token, INVALID)).chain(misused());
        for (name, token, code) in cases {
            let caller = user.with_token(Some(token));
            for path in ["/ai/quota", "/ai/chat/sessions"] {
                let answer = caller.get(path).await;
                assert_eq!((answer.status, &answer.body["code"]), (401, &json!(code)), "{name} on {path}: {}", answer.text);
                let answer = answer.error(401, code);
                assert!(!answer.text.contains("victim"), "{name}: {}", answer.text);
            }
        }
    });
}

#[test]
fn headers_that_carry_no_token_are_told_apart() {
    run(async {
        let user = Worker::anyone().await.with_token(None);
        user.get("/ai/quota").await.error(401, MISSING);
        let good = access("someone", "reader");
        for header in
            ["Bearer", "Basic dTpw", "Token x", &good, "Bearer a b", "Bearer not.a", "Bearer a.b.c.d", "Bearer !!.??.~~"]
        {
            let answer = user.request(Method::GET, "/ai/quota").header("Authorization", header).send().await;
            let (status, code) = answer.any_error();
            assert_eq!(status, 401, "{header}");
            assert!([INVALID, MALFORMED].contains(&code), "{header}: {code}");
        }
        for header in ["Basic dTpw", "Bearer"] {
            user.request(Method::GET, "/ai/quota").header("Authorization", header).send().await.error(401, MALFORMED);
        }
    });
}

#[test]
fn every_route_but_health_asks_who_is_calling() {
    run(async {
        let user = Worker::anyone().await;
        let session = "/ai/chat/sessions/some-session";
        let routes = [
            (Method::POST, "/ai/chat".to_owned()),
            (Method::POST, "/ai/chat/stream".into()),
            (Method::GET, "/ai/chat/sessions".into()),
            (Method::POST, "/ai/chat/sessions".into()),
            (Method::GET, session.into()),
            (Method::PUT, session.into()),
            (Method::DELETE, session.into()),
            (Method::GET, format!("{session}/messages")),
            (Method::DELETE, format!("{session}/messages")),
            (Method::POST, format!("{session}/stop")),
            (Method::GET, format!("{session}/stream")),
            (Method::POST, format!("{session}/messages/m/regenerate")),
            (Method::PUT, format!("{session}/messages/m")),
            (Method::PUT, format!("{session}/path")),
            (Method::GET, "/ai/quota".into()),
            (Method::GET, "/ai/quota/all".into()),
            (Method::GET, "/ai/models".into()),
            (Method::GET, "/ai/providers".into()),
        ];
        let forged = hs256(&hs(), &claims("victim", "admin"), b"another-secret-of-at-least-32-bytes!");
        for (method, path) in routes {
            for (token, code) in [(None, MISSING), (Some(forged.clone()), INVALID), (Some(own(json!({"exp": 1}))), EXPIRED)] {
                let request = user.with_token(token).request(method.clone(), &path);
                let request = if method == Method::GET { request } else { request.json(&json!({})) };
                let answer = request.send().await;
                assert_eq!(answer.status, 401, "{method} {path}: {}", answer.text);
                answer.error(401, code);
            }
        }
        user.with_token(None).get("/ai/health").await.ok();
        user.with_token(Some("garbage".into())).get("/ai/health").await.ok();
    });
}

/// The user id and daily limit that a token stands for.
async fn identity(user: &User, token: String) -> (String, i64) {
    let quota = user.with_token(Some(token)).get("/ai/quota").await.ok();
    (quota["userId"].as_str().expect("userId").to_owned(), quota["totalQuota"].as_i64().expect("totalQuota"))
}

#[test]
fn all_three_algorithms_let_their_user_in() {
    run(async {
        let user = Worker::anyone().await;
        let claims = claims(&user.id, "vip");
        let tokens = [
            hs256(&hs(), &claims, SECRET.as_bytes()),
            eddsa(&ed(json!(ED_KID)), &claims, &ed_key()),
            eddsa(&ed(json!(OLD_ED_KID)), &claims, &old_ed_key()),
            es256(&es(ES_KID), &claims, &es_key()),
        ];
        for token in tokens {
            assert_eq!(identity(&user, token).await, (user.id.clone(), 100_000));
        }
    });
}

#[test]
fn claims_are_read_as_the_platforms_write_them() {
    run(async {
        let base = Worker::anyone().await;
        let limit = |role| match role {
            "reader" => 10_000,
            "writer" => 50_000,
            _ => 100_000,
        };
        let cases = [
            (json!({"roles": null}), "reader"),
            (json!({"roles": []}), "reader"),
            (json!({"roles": ["stranger"]}), "reader"),
            (json!({"roles": ["author"]}), "writer"),
            (json!({"roles": ["reader", "vip", "author"]}), "vip"),
            (json!({"roles": null, "role": "author"}), "writer"),
            (json!({"roles": null, "role": "vip"}), "vip"),
            (json!({"token_type": null, "iat": null, "roles": ["reader"]}), "reader"),
            // Small clock differences are forgiven.
            (json!({"nbf": now_s() + 2, "roles": ["reader"]}), "reader"),
        ];
        for (mut changes, role) in cases {
            let id = User::new(&base.origin, role).id;
            changes["user_id"] = json!(id);
            assert_eq!(identity(&base, own(changes.clone())).await, (id.clone(), limit(role)), "{changes}");
        }
        let subject = own(json!({"user_id": null, "sub": base.id, "roles": ["reader"]}));
        assert_eq!(identity(&base, subject).await.0, base.id);
    });
}

#[test]
fn issuer_and_audience_must_match_where_they_are_set() {
    run(async {
        let user = Worker::strict().await.user("reader");
        let (issuer, audience) = (json!("https://platform.example"), json!("inkstone"));
        let with = |iss: &Value, aud: &Value| own(json!({"iss": iss, "aud": aud, "user_id": user.id}));
        identity(&user, with(&issuer, &audience)).await;
        identity(&user, with(&issuer, &json!(["other", "inkstone"]))).await;
        let bad = [
            with(&Value::Null, &audience),
            with(&issuer, &Value::Null),
            with(&json!("https://platform.example.attacker.com"), &audience),
            with(&json!(["https://platform.example"]), &audience),
            with(&issuer, &json!("inkstone2")),
            with(&issuer, &json!(["other"])),
        ];
        for token in bad {
            user.with_token(Some(token)).get("/ai/quota").await.error(401, INVALID);
        }
    });
}
