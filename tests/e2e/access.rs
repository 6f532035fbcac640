//! Nobody reads another's: every route that takes an id, with an id that belongs to someone else, is 404 and leaks not a
//! byte; rights cannot be claimed in a body.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::reply::{Reply, Step};
use crate::support::worker::Worker;
use crate::support::{provider, run};

/// Every route with an id in its path or body, for this session and message.
fn routes_with_ids(session: &str, message: &str) -> Vec<(Method, String, Value)> {
    let at = |rest: &str| format!("/ai/chat/sessions/{session}{rest}");
    let chat = json!({"message": "读一读", "sessionId": session});
    vec![
        (Method::GET, at(""), Value::Null),
        (Method::GET, at("?view=history"), Value::Null),
        (Method::PUT, at(""), json!({"title": "偷来的"})),
        (Method::GET, at("/messages"), Value::Null),
        (Method::DELETE, at("/messages"), Value::Null),
        (Method::POST, at("/stop"), json!({})),
        (Method::GET, at("/stream"), Value::Null),
        (Method::GET, at(&format!("/stream?messageId={message}")), Value::Null),
        (Method::POST, at(&format!("/messages/{message}/regenerate")), json!({})),
        (Method::POST, at(&format!("/messages/{message}/regenerate")), json!({"stream": true})),
        (Method::PUT, at(&format!("/messages/{message}")), json!({"message": "改"})),
        (Method::PUT, at("/path"), json!({"messageId": message})),
        (Method::POST, "/ai/chat".into(), chat.clone()),
        (Method::POST, "/ai/chat/stream".into(), chat),
        (Method::DELETE, at(""), Value::Null),
    ]
}

#[test]
fn a_foreign_id_is_404_on_every_route_and_leaks_nothing() {
    run(async {
        let worker = Worker::shared().await;
        let (owner, stranger, admin) = (worker.user("writer"), worker.user("vip"), worker.user("admin"));
        let secret = "只有作者知道的结局";
        let script = provider().script(Reply::happy(&[secret], (9, 9)));
        let data = owner.ask(json!({"message": script.message(secret), "projectId": "p-secret"})).await;
        let session = text(&data, "sessionId");
        let before = (owner.messages(session).await, owner.get(&format!("/ai/chat/sessions/{session}")).await.ok());
        for message in [text(&before.0[0], "id"), text(&before.0[1], "id")] {
            for (method, path, body) in routes_with_ids(session, message) {
                for other in [&stranger, &admin] {
                    let request = other.request(method.clone(), &path);
                    let request = if body.is_null() { request } else { request.json(&body) };
                    let answer = request.send().await.error(404, 1004);
                    for known in [secret, "p-secret", owner.id.as_str()] {
                        assert!(!answer.text.contains(known), "{method} {path}: {}", answer.text);
                    }
                }
            }
        }
        assert_eq!(stranger.get("/ai/chat/sessions").await.ok(), json!([]));
        assert_eq!(stranger.get("/ai/chat/sessions?projectId=p-secret").await.ok(), json!([]));
        let after = (owner.messages(session).await, owner.get(&format!("/ai/chat/sessions/{session}")).await.ok());
        assert_eq!(after, before, "and nothing was changed");
        assert_eq!(stranger.charged().await, 0);
        assert_eq!(owner.charged().await, 18);
    });
}

#[test]
fn a_foreign_message_id_does_not_work_in_ones_own_session() {
    run(async {
        let (owner, stranger) = (Worker::anyone().await, Worker::anyone().await);
        let secret = provider().script(Reply::happy(&["机密"], (9, 2)));
        let theirs = owner.ask(json!({"message": secret.message("机密问题")})).await;
        let own = provider().script(Reply::happy(&["自己的"], (9, 2)));
        let mine = stranger.ask(json!({"message": own.message("x")})).await;
        let foreign = text(&theirs["message"], "id");
        for (method, path, body) in routes_with_ids(text(&mine, "sessionId"), foreign) {
            if path.contains(foreign) || body.to_string().contains(foreign) {
                let request = stranger.request(method.clone(), &path);
                let request = if body.is_null() { request } else { request.json(&body) };
                let answer = request.send().await.error(404, 1004);
                assert!(!answer.text.contains("机密"), "{method} {path}: {}", answer.text);
            }
        }
        assert_eq!(secret.calls().len(), 1);
    });
}

#[test]
fn a_running_stream_cannot_be_read_or_stopped_by_others() {
    run(async {
        let (owner, stranger) = (Worker::anyone().await, Worker::anyone().await);
        let script = provider().script(Reply::happy(&["一", "二"], (9, 2)).step_after_delta(1, Step::Gate));
        let mut stream = owner.stream(json!({"message": script.message("x")})).await;
        let session = text(&stream.take(2).await[0].json(), "sessionId").to_owned();
        stranger.resuming(&session, None, Some(0)).send().await.error(404, 1004);
        stranger.post(&format!("/ai/chat/sessions/{session}/stop"), &json!({})).await.error(404, 1004);
        script.release(1);
        let events = stream.rest().await;
        assert_eq!(events.last().expect("an end").name, "done");
    });
}

#[test]
fn strange_ids_are_404_and_never_an_accident() {
    run(async {
        let user = Worker::anyone().await;
        let long = "x".repeat(3000);
        for id in ["nobody", "%27%20OR%201%3D1--", "%2e%2e%2fadmin", "%00", "%F0%9F%96%8B", "null", "0", "%25", &long] {
            for (method, path, body) in routes_with_ids(id, id) {
                if path.starts_with("/ai/chat/sessions/") {
                    let request = user.request(method, &path);
                    let request = if body.is_null() { request } else { request.json(&body) };
                    let (status, _) = request.send().await.any_error();
                    assert!(matches!(status, 400 | 404), "{path}: {status}");
                }
            }
        }
        for id in ["' OR 1=1 --", "../x", "\u{0}", "%"] {
            user.post("/ai/chat", &json!({"message": "x", "sessionId": id})).await.error(404, 1004);
        }
        assert_eq!(user.charged().await, 0);
    });
}

#[test]
fn rights_cannot_be_claimed_in_a_body() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        for field in [json!({"role": "admin"}), json!({"userId": "someone-else"})] {
            let with = |mut body: Value| {
                let fields = field.as_object().expect("an object").clone();
                body.as_object_mut().expect("an object").extend(fields);
                body
            };
            user.post("/ai/chat", &with(json!({"message": "x"}))).await.error(400, 1001);
            user.post("/ai/chat/stream", &with(json!({"message": "x"}))).await.error(400, 1001);
            user.post("/ai/chat/sessions", &with(json!({"title": "x"}))).await.error(400, 1001);
            user.put(&format!("/ai/chat/sessions/{session}"), &with(json!({"title": "x"}))).await.error(400, 1001);
        }
        assert_eq!(user.charged().await, 0);
        assert_eq!(user.get("/ai/chat/sessions").await.ok().as_array().map(Vec::len), Some(1), "only the one made first");
    });
}

#[test]
fn nothing_secret_is_printed() {
    run(async {
        let worker = Worker::shared().await;
        let user = worker.user("writer");
        let script = provider().script(Reply::status(401));
        let canary = "金丝雀-只在提问里";
        user.post("/ai/chat", &json!({"message": script.message(canary)})).await.error(502, 5004);
        let happy = provider().script(Reply::no_finish(&["回答里的金丝雀"]));
        user.stream(json!({"message": happy.message(canary)})).await.rest().await;
        let log = worker.log();
        assert!(log.contains("/api/v1/ai/chat"), "the log is the Worker's");
        let token = user.token.clone().expect("a token");
        let secrets = [canary, "回答里的金丝雀", &token, crate::support::worker::PROVIDER_KEY, crate::support::token::SECRET];
        for secret in secrets {
            assert!(!log.contains(secret), "{secret} stands in the log");
        }
    });
}
