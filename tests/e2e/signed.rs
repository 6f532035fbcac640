//! Signed service requests (design.md): whoever has the key may recharge, for five minutes around its clock, once.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::{Answer, User};
use crate::support::service::{Signed, secret, signature};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, run, token, unique, wait_until};

const PATH: &str = "/ai/quota/recharge";

/// A recharge of 5 tokens, another one each time.
fn order(user: &User) -> Value {
    json!({"userId": user.id, "amount": 5, "orderId": unique()})
}

/// A user, and the same Worker's caller who has no token.
async fn user_and_service() -> (User, User) {
    let user = Worker::shared().await.user("reader");
    let service = user.with_token(None);
    (user, service)
}

async fn recharged(user: &User) -> i64 {
    user.quota("total").await.total - 5_000_000
}

#[test]
fn a_signature_is_enough_and_a_token_beside_it_changes_nothing() {
    run(async {
        let (user, service) = user_and_service().await;
        Signed::now(PATH, &order(&user)).request(&service).send().await.ok();
        assert_eq!(recharged(&user).await, 5);
        // An ordinary user's own token does not spoil a service's signature, and an administrator's does not mend one.
        Signed::now(PATH, &order(&user)).request(&user).send().await.ok();
        let admin = Worker::shared().await.user("admin");
        let forged = Signed::now(PATH, &order(&user)).with("X-Signature", &"0".repeat(64));
        forged.request(&admin).send().await.error(401, 1002);
        // The other key, and a query that is signed.
        let (at, nonce, body) = (token::now_s().to_string(), unique(), order(&user).to_string());
        let path = format!("{PATH}?trace=%E7%A0%9A&n=1");
        let good = signature(secret("backend"), &at, &nonce, "POST", &format!("/api/v1{path}"), body.as_bytes());
        let headers =
            [("X-Key-Id", "backend"), ("X-Timestamp", at.as_str()), ("X-Nonce", nonce.as_str()), ("X-Signature", good.as_str())];
        let request = service.request(Method::POST, &path).body(body);
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).send().await.ok();
        assert_eq!(recharged(&user).await, 15);
    });
}

/// Sends a recharge signed so many seconds from now, again if the clock moved on meanwhile.
async fn shifted(service: &User, user: &User, seconds: i64) -> Answer {
    let sent = wait_until(PATIENCE, "an answer within one second of the clock", || async {
        let now = token::now_s();
        let answer = Signed::post(PATH, &order(user), now + seconds).request(service).send().await;
        (token::now_s() == now).then_some(answer)
    });
    sent.await
}

#[test]
fn a_signature_holds_five_minutes_either_way() {
    run(async {
        let (user, service) = user_and_service().await;
        for seconds in [299, -299, 300, -300] {
            shifted(&service, &user, seconds).await.ok();
        }
        let before = recharged(&user).await;
        for seconds in [301, -301, 86_400, -86_400] {
            shifted(&service, &user, seconds).await.error(401, 1002);
        }
        assert_eq!(recharged(&user).await, before);
    });
}

#[test]
fn a_nonce_works_once() {
    run(async {
        let (user, service) = user_and_service().await;
        let first = Signed::now(PATH, &order(&user));
        // A forgery uses nothing up.
        first.clone().with("X-Signature", &"a".repeat(64)).request(&service).send().await.error(401, 1002);
        first.request(&service).send().await.ok();
        for _ in 0..3 {
            first.request(&service).send().await.error(401, 1002);
        }
        // The same nonce over another body, well signed.
        let (_, nonce) = first.headers.iter().find(|(name, _)| *name == "X-Nonce").expect("a nonce");
        let (at, body) = (token::now_s().to_string(), order(&user).to_string());
        let good = signature(secret("billing"), &at, nonce, "POST", &format!("/api/v1{PATH}"), body.as_bytes());
        let second = Signed { body, ..first.clone() }.with("X-Timestamp", &at).with("X-Signature", &good);
        second.request(&service).send().await.error(401, 1002);
        // At once: one of ten.
        let burst = Signed::now(PATH, &order(&user));
        let answers = futures::future::join_all((0..10).map(|_| burst.request(&service).send())).await;
        assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 1);
        assert_eq!(recharged(&user).await, 10);
    });
}

#[test]
fn whatever_is_missing_or_changed_breaks_it() {
    run(async {
        let (user, service) = user_and_service().await;
        let fresh = || Signed::now(PATH, &order(&user));
        fresh().without("X-Key-Id").request(&service).send().await.error(401, 2010);
        for name in ["X-Timestamp", "X-Nonce", "X-Signature"] {
            fresh().without(name).request(&service).send().await.error(401, 1002);
            fresh().with(name, "").request(&service).send().await.error(401, 1002);
        }
        let good = fresh();
        let of = |name: &str| good.headers.iter().find(|(known, _)| *known == name).expect("a header").1.clone();
        let (at, nonce, right) = (of("X-Timestamp"), of("X-Nonce"), of("X-Signature"));
        let later = (at.parse::<i64>().expect("a number") + 1).to_string();
        let short = nonce[1..].to_owned();
        let upper = right.to_uppercase();
        let changed = [
            ("X-Key-Id", "backend"),
            ("X-Key-Id", "nobody"),
            ("X-Key-Id", "billing "),
            ("X-Timestamp", later.as_str()),
            ("X-Timestamp", "now"),
            ("X-Timestamp", "1e9"),
            ("X-Timestamp", "99999999999999999999"),
            ("X-Nonce", short.as_str()),
            ("X-Nonce", "x"),
            ("X-Signature", &right[..62]),
            ("X-Signature", upper.as_str()),
            ("X-Signature", "zz"),
        ];
        for (name, value) in changed {
            // A header's outer blanks are no part of it, by HTTP.
            let expected = if value == "billing " { 200 } else { 401 };
            let answer = good.clone().with(name, value).request(&service).send().await;
            assert_eq!(answer.status, expected, "{name}: {value:?} {}", answer.text);
        }
        assert_eq!(recharged(&user).await, 5, "the one whose header was only padded");

        let tampered = fresh();
        let more = Signed { body: tampered.body.replace("\"amount\":5", "\"amount\":500"), ..tampered.clone() };
        assert_ne!(more.body, tampered.body);
        more.request(&service).send().await.error(401, 1002);
        Signed { body: format!("{} ", tampered.body), ..tampered.clone() }.request(&service).send().await.error(401, 1002);
        Signed { body: String::new(), ..tampered.clone() }.request(&service).send().await.error(401, 1002);
        for path in ["?", "?x=1", "/"] {
            let answer = Signed { path: format!("{PATH}{path}"), ..tampered.clone() }.request(&service).send().await;
            assert!(answer.status == 401 || answer.status == 404, "{path}: {}", answer.text);
        }
        assert_eq!(recharged(&user).await, 5);
        tampered.request(&service).send().await.ok();
    });
}

#[test]
fn a_signature_opens_no_other_door() {
    run(async {
        let (user, service) = user_and_service().await;
        let paths = [
            "/ai/chat".to_owned(),
            "/ai/quota/redeem".into(),
            "/admin/quota-codes".into(),
            format!("/admin/quota/{}/reset", user.id),
        ];
        for path in paths {
            Signed::now(&path, &json!({"amount": 5, "message": "x"})).request(&service).send().await.error(401, 2010);
        }
        Signed::now("/admin/quota-codes", &json!({"amount": 5})).request(&user).send().await.error(403, 1003);
        // A well signed order is still checked like any other.
        Signed::now(PATH, &json!({"userId": user.id, "amount": 0, "orderId": unique()}))
            .request(&service)
            .send()
            .await
            .error(400, 1001);
        Signed::now(PATH, &json!({"amount": 5, "orderId": unique()})).request(&service).send().await.error(400, 1001);
        assert_eq!(recharged(&user).await, 0);
    });
}
