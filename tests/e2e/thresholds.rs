//! 20 %, 10 % and 0 % left: told once each, to every running stream of the user, to the user's list of notifications, and
//! to the platform's webhook.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::User;
use crate::support::provider::Script;
use crate::support::reply::{Reply, Step};
use crate::support::service::{secret, signature};
use crate::support::sse::{Event, EventStream, terminal};
use crate::support::webhook::{Delivery, PATH};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run, token, wait_until, webhook};

/// A reader whose day has 1,000 tokens.
async fn poor_user(worker: &Worker) -> (User, User) {
    let (admin, user) = (worker.user("admin"), worker.user("reader"));
    admin.set_limit(&user, "daily", 1_000).await;
    (admin, user)
}

/// The events of thresholds, as (level, remaining).
fn told(events: &[Event]) -> Vec<(String, i64)> {
    let quota = events.iter().filter(|event| event.name == "quota").map(Event::json);
    quota
        .map(|one| {
            assert_eq!((&one["quotaType"], one["totalQuota"].is_i64()), (&json!("daily"), true), "{one}");
            assert!(["content", "delta", "text"].iter().all(|key| one.get(key).is_none()), "{one}");
            (text(&one, "level").to_owned(), one["remainingQuota"].as_i64().expect("a number"))
        })
        .collect()
}

/// An answer that uses so much, and the thresholds its stream told of.
async fn spend(user: &User, usage: (u64, u64)) -> Vec<(String, i64)> {
    let script = provider().script(Reply::happy(&["花"], usage));
    let options = json!({"model": "other-model", "maxTokens": usage.1});
    let events = user.stream(json!({"message": script.message("花"), "options": options})).await.rest().await;
    terminal(&events, "done");
    told(&events)
}

fn level(name: &str, remaining: i64) -> Vec<(String, i64)> {
    vec![(name.to_owned(), remaining)]
}

/// A stream of the user that holds after its first event of text, and lets go by its own gate.
async fn held(user: &User) -> (Arc<Script>, EventStream, Vec<Event>) {
    let script = provider().script(Reply::happy(&["等", "着"], (5, 2)).step_after_delta(1, Step::Gate));
    let mut stream = user.stream(json!({"message": script.message("x"), "options": {"maxTokens": 2}})).await;
    let events = stream.take(2).await;
    (script, stream, events)
}

#[test]
fn each_threshold_is_told_once_to_every_running_stream_of_the_user() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = poor_user(worker).await;
        let (watched, mut watching, mut seen) = held(&user).await;
        let (last, mut ending, mut end) = held(&user).await;
        let (strange, mut unconcerned, mut heard) = held(&worker.user("reader")).await;

        assert_eq!(spend(&user, (100, 650)).await, []);
        assert_eq!(spend(&user, (25, 25)).await, level("warning", 200));
        assert_eq!(spend(&user, (25, 25)).await, [], "once");
        assert_eq!(spend(&user, (25, 25)).await, level("critical", 100));
        end.extend(ending.take(2).await);
        seen.extend(watching.take(2).await);
        // With what one of the two still has to settle, nothing will be left.
        admin.set_limit(&user, "daily", 907).await;
        last.release(1);
        end.extend(ending.rest().await);
        let all = [level("warning", 200), level("critical", 100), level("exhausted", 0)].concat();
        assert_eq!(told(&end), all, "the stream that used up the last");
        seen.extend(watching.take(1).await);
        assert_eq!(told(&seen), all, "the one that only watched");
        assert_eq!(user.get("/ai/quota").await.ok()["status"], "exhausted");
        user.post("/ai/chat", &json!({"message": "x", "options": {"maxTokens": 1}})).await.error(429, 3010);

        watched.release(1);
        seen.extend(watching.rest().await);
        terminal(&seen, "done");
        assert_eq!(told(&seen), all, "nothing is told again");
        strange.release(1);
        heard.extend(unconcerned.rest().await);
        assert_eq!(told(&heard), [], "nobody else hears of it");
        let again = user.resuming(text(&seen[0].json(), "sessionId"), None, None).stream().await.rest().await;
        assert_eq!(told(&again), all, "who comes back later reads it in the log");
    });
}

#[test]
fn thresholds_are_kept_as_notifications_until_they_are_read() {
    run(async {
        let worker = Worker::shared().await;
        let (_, user) = poor_user(worker).await;
        let stranger = worker.user("reader");
        assert_eq!(user.get("/ai/notifications").await.ok(), json!([]));
        for usage in [(100, 700), (50, 50), (50, 50)] {
            spend(&user, usage).await;
        }
        let list = user.get("/ai/notifications").await.ok();
        let list = list.as_array().expect("an array");
        let levels: Vec<_> = list.iter().map(|one| text(&one["payload"], "level")).collect();
        assert_eq!(levels, ["exhausted", "critical", "warning"], "newest first");
        for (one, left) in list.iter().zip([0, 100, 200]) {
            let payload = &one["payload"];
            assert_eq!(
                (&payload["quotaType"], &payload["totalQuota"], &payload["remainingQuota"]),
                (&json!("daily"), &json!(1_000), &json!(left))
            );
            assert_eq!((&one["type"], &one["read"], &one["readAt"]), (&json!("quota"), &json!(false), &json!(null)));
            assert!(text(one, "message").contains("配额"), "{one}");
            chrono::DateTime::parse_from_rfc3339(text(one, "createdAt")).expect("an instant");
        }
        assert_eq!(user.get("/ai/notifications?limit=1&offset=1").await.ok()[0], list[1]);

        let id = text(&list[1], "id");
        stranger.post(&format!("/ai/notifications/{id}/read"), &json!({})).await.error(404, 1004);
        assert_eq!(stranger.get("/ai/notifications").await.ok(), json!([]));
        for _ in 0..2 {
            user.post(&format!("/ai/notifications/{id}/read"), &json!({})).await.ok();
        }
        let unread = |user: User| async move { user.get("/ai/notifications?unread=true").await.ok().as_array().map(Vec::len) };
        assert_eq!(unread(user.clone()).await, Some(2));
        let read = user.get("/ai/notifications").await.ok();
        assert_eq!((&read[1]["read"], &read[0]["read"]), (&json!(true), &json!(false)));
        chrono::DateTime::parse_from_rfc3339(text(&read[1], "readAt")).expect("an instant");
        stranger.post("/ai/notifications/read", &json!({})).await.ok();
        assert_eq!(unread(user.clone()).await, Some(2), "another's");
        user.post("/ai/notifications/read", &json!({})).await.ok();
        assert_eq!(unread(user.clone()).await, Some(0));
        assert_eq!(user.get("/ai/notifications").await.ok()[1], read[1], "what was read stays as it was");
        user.post("/ai/notifications/nobody/read", &json!({})).await.error(404, 1004);
        for query in ["limit=0", "limit=201", "offset=x"] {
            user.get(&format!("/ai/notifications?{query}")).await.error(400, 1001);
        }
    });
}

/// Waits for so many deliveries for this user.
async fn delivered(user: &User, count: usize) -> Vec<Arc<Delivery>> {
    wait_until(PATIENCE, "the webhook", || async {
        let all = webhook().deliveries(&user.id);
        (all.len() >= count).then_some(all)
    })
    .await
}

/// Checks a delivery's signature; answers its nonce.
fn checked(delivery: &Delivery) -> String {
    let header = |name: &str| delivery.headers.get(name).unwrap_or_else(|| panic!("{name} in {:?}", delivery.headers)).clone();
    let (at, nonce) = (header("x-timestamp"), header("x-nonce"));
    let expected = signature(secret(&header("x-key-id")), &at, &nonce, "POST", PATH, &delivery.body);
    assert_eq!(header("x-signature"), expected);
    assert_eq!(delivery.line, format!("POST {PATH} HTTP/1.1"));
    assert!(header("content-type").starts_with("application/json"));
    assert!((at.parse::<i64>().expect("seconds") - token::now_s()).abs() < 300, "{at}");
    nonce
}

/// Waits until the notification says how its webhook went.
async fn state(user: &User, wanted: &str) {
    wait_until(PATIENCE, "the webhook's state", || async {
        let list = user.get("/ai/notifications").await.ok();
        (list[0]["webhook"] == wanted).then_some(())
    })
    .await;
}

#[test]
fn the_platform_is_told_by_a_signed_webhook() {
    run(async {
        let worker = Worker::shared().await;
        let (_, user) = poor_user(worker).await;
        spend(&user, (100, 700)).await;
        spend(&user, (50, 50)).await;
        let all = delivered(&user, 2).await;
        let nonces: Vec<String> = all.iter().map(|delivery| checked(delivery)).collect();
        assert_ne!(nonces[0], nonces[1]);
        let mut levels: Vec<_> = all.iter().map(|delivery| text(&delivery.json, "level")).collect();
        levels.sort_unstable();
        assert_eq!(levels, ["critical", "warning"]);
        let warning = &all.iter().find(|delivery| delivery.json["level"] == "warning").expect("the first").json;
        let expected = json!({
            "event": "quota.warning", "userId": user.id, "quotaType": "daily", "totalQuota": 1_000, "remainingQuota": 200,
        });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&warning[key], value, "{key}");
        }
        state(&user, "delivered").await;
        let list = user.get("/ai/notifications").await.ok();
        assert_eq!((&list[1]["id"], &list[1]["webhook"]), (&warning["id"], &json!("delivered")));
        assert_eq!(webhook().deliveries(&user.id).len(), 2, "each once");
    });
}

#[test]
fn a_webhook_that_fails_is_tried_again_and_given_up_visibly() {
    run(async {
        let worker = Worker::shared().await;
        let ((_, patient), (_, hopeless)) = (poor_user(worker).await, poor_user(worker).await);
        webhook().refuse(&patient.id, 1);
        webhook().refuse(&hopeless.id, usize::MAX);
        for user in [&patient, &hopeless] {
            assert_eq!(spend(user, (100, 700)).await, level("warning", 200), "a platform that fails delays nobody");
            assert_eq!(delivered(user, 1).await[0].status, 500);
        }
        // So many tries lie behind it that the next is the last: nobody waits for hours here.
        worker.ledger(&hopeless.id, "UPDATE webhook SET attempts = 7").await;
        let all = delivered(&patient, 2).await;
        assert_eq!((all[1].status, &all[0].json["id"]), (204, &all[1].json["id"]), "the same notification");
        assert_ne!(checked(&all[0]), checked(&all[1]), "signed anew");
        state(&patient, "delivered").await;
        state(&hopeless, "failed").await;
        assert_eq!((webhook().deliveries(&patient.id).len(), webhook().deliveries(&hopeless.id).len()), (2, 2));
        let left = worker.ledger(&hopeless.id, "SELECT id FROM webhook").await;
        assert_eq!(left, [] as [Value; 0], "it is not tried again");
    });
}
