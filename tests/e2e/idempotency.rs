//! The same `Idempotency-Key` is the same generation: a retry attaches to the running or finished one. Without a key, a
//! session runs one turn at a time.

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::{Request, User};
use crate::support::reply::{Reply, Step};
use crate::support::sse::{raw_of, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run, unique};

/// A streamed message under a key.
fn keyed(user: &User, key: &str, body: &Value) -> Request {
    user.streaming(body).header("Idempotency-Key", key)
}

#[test]
fn a_retry_attaches_to_the_running_generation_and_to_the_finished_one() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script(Reply::happy(&["一", "二", "三"], (10, 3)).step_after_delta(2, Step::Gate));
        let body = json!({"message": script.message("x")});
        let mut first = keyed(&user, &key, &body).stream().await;
        let mut events = first.take(3).await;
        let mut retry = keyed(&user, &key, &body).stream().await;
        let mut repeated = retry.take(3).await;
        assert_eq!(raw_of(&repeated), raw_of(&events), "while it runs");
        script.release(1);
        events.extend(first.rest().await);
        repeated.extend(retry.rest().await);
        terminal(&events, "done");
        assert_eq!(raw_of(&repeated), raw_of(&events));
        let later = keyed(&user, &key, &body).stream().await.rest().await;
        assert_eq!(raw_of(&later), raw_of(&events), "when it is over");

        assert_eq!(script.calls().len(), 1, "one provider call");
        assert_eq!(user.charged().await, 13, "one charge");
        let sessions = user.get("/ai/chat/sessions").await.ok();
        assert_eq!(sessions.as_array().map(Vec::len), Some(1), "a first message finds the session its first try made");
        assert_eq!(user.messages(text(&sessions[0], "id")).await.len(), 2);
    });
}

#[test]
fn a_repeated_json_call_gives_the_same_answer() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script(Reply::happy(&["同一个"], (10, 3)));
        let body = json!({"message": script.message("x")});
        let mut answers = Vec::new();
        for _ in 0..3 {
            let request = user.request(Method::POST, "/ai/chat").json(&body).header("Idempotency-Key", &key);
            answers.push(request.send().await.ok());
        }
        for answer in &answers[1..] {
            for key in ["sessionId", "reply", "tokensUsed", "model", "usage"] {
                assert_eq!(answer[key], answers[0][key], "{key}");
            }
            assert_eq!(answer["message"]["id"], answers[0]["message"]["id"]);
        }
        assert_eq!((script.calls().len(), user.charged().await), (1, 13));
    });
}

#[test]
fn the_same_key_with_another_body_is_a_conflict() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script(Reply::happy(&["好"], (10, 3)).step_after_delta(1, Step::Gate));
        let mut stream = keyed(&user, &key, &json!({"message": script.message("一")})).stream().await;
        let other = json!({"message": script.message("二")});
        keyed(&user, &key, &other).send().await.error(409, 1006);
        script.release(1);
        stream.rest().await;
        keyed(&user, &key, &other).send().await.error(409, 1006);
        let reordered = json!({"message": script.message("一"), "options": {"temperature": 1.0}});
        keyed(&user, &key, &reordered).send().await.error(409, 1006);
        assert_eq!((script.calls().len(), user.charged().await), (1, 13));
    });
}

#[test]
fn keys_belong_to_their_user() {
    run(async {
        let key = unique();
        let mut sessions = Vec::new();
        for _ in 0..2 {
            let user = Worker::anyone().await;
            let script = provider().script(Reply::happy(&["各自的"], (10, 3)));
            let events = keyed(&user, &key, &json!({"message": script.message("x")})).stream().await.rest().await;
            assert_eq!(text_of(&events), "各自的");
            sessions.push(text(&events[0].json(), "sessionId").to_owned());
            assert_eq!((script.calls().len(), user.charged().await), (1, 13));
        }
        assert_ne!(sessions[0], sessions[1]);
    });
}

#[test]
fn parallel_first_messages_with_one_key_make_one_session() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script(Reply::happy(&["一次"], (10, 3)).first(Step::Gate));
        let body = json!({"message": script.message("x")});
        let tries: Vec<_> = (0..5).map(|_| tokio::spawn(keyed(&user, &key, &body).stream())).collect();
        script.call().await;
        script.release(1);
        let mut streams = Vec::new();
        for one in join_all(tries).await {
            streams.push(raw_of(&one.expect("a stream").rest().await));
        }
        assert!(streams.iter().all(|stream| stream == &streams[0]), "{streams:?}");
        assert_eq!(script.calls().len(), 1);
        assert_eq!(user.charged().await, 13);
        assert_eq!(user.get("/ai/chat/sessions").await.ok().as_array().map(Vec::len), Some(1));
    });
}

#[test]
fn of_parallel_sends_without_a_key_one_wins() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let script = provider().script(Reply::happy(&["胜者"], (10, 3)).first(Step::Gate));
        let body = json!({"message": script.message("x"), "sessionId": session});
        let sends: Vec<_> = (0..6).map(|_| tokio::spawn(user.streaming(&body).open())).collect();
        let (mut winner, mut refused) = (None, 0);
        let mut sends: futures::stream::FuturesUnordered<_> = sends.into_iter().collect();
        while let Some(sent) = futures::StreamExt::next(&mut sends).await {
            match sent.expect("no panic") {
                Ok(mut stream) => {
                    let events = stream.rest().await;
                    assert!(winner.replace(events).is_none(), "a second winner");
                }
                Err(answer) => {
                    answer.error(409, 1006);
                    refused += 1;
                    if refused == 5 {
                        script.release(1);
                    }
                }
            }
        }
        assert_eq!(text_of(&winner.expect("a winner")), "胜者");
        assert_eq!(user.messages(&session).await.len(), 2, "the refused left nothing");
        assert_eq!((script.calls().len(), user.charged().await), (1, 13));
    });
}

#[test]
fn a_client_that_gave_up_waiting_finds_its_answer_under_the_key() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script(Reply::happy(&["还在"], (10, 3)).first(Step::Gate));
        let body = json!({"message": script.message("x")});
        let waiting = tokio::spawn(keyed(&user, &key, &body).open());
        script.call().await;
        waiting.abort();
        assert!(waiting.await.is_err(), "the client is gone before any answer");
        script.release(1);
        let events = keyed(&user, &key, &body).stream().await.rest().await;
        assert_eq!(text_of(&events), "还在");
        assert_eq!((script.calls().len(), user.charged().await), (1, 13));
    });
}

#[test]
fn a_try_that_left_nothing_behind_can_be_repeated_under_its_key() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script([Reply::status(500), Reply::happy(&["第二次"], (10, 3))]);
        let body = json!({"message": script.message("x")});
        keyed(&user, &key, &body).send().await.error(503, 3501);
        let events = keyed(&user, &key, &body).stream().await.rest().await;
        assert_eq!(text_of(&events), "第二次");
        assert_eq!(user.charged().await, 13);
    });
}

#[test]
fn regenerating_under_a_key_makes_one_answer() {
    run(async {
        let user = Worker::anyone().await;
        let key = unique();
        let script = provider().script([Reply::happy(&["旧"], (10, 3)), Reply::happy(&["新"], (10, 3))]);
        let data = user.ask(json!({"message": script.message("x")})).await;
        let session = text(&data, "sessionId");
        let path = format!("/ai/chat/sessions/{session}/messages/{}/regenerate", text(&data["message"], "id"));
        let mut answers = Vec::new();
        for _ in 0..2 {
            let request = user.request(Method::POST, &path).json(&json!({})).header("Idempotency-Key", &key);
            answers.push(request.send().await.ok()["message"]["id"].clone());
        }
        assert_eq!(answers[0], answers[1]);
        assert_eq!((script.calls().len(), user.charged().await), (2, 26));
    });
}

#[test]
fn an_overlong_key_is_refused() {
    run(async {
        let user = Worker::anyone().await;
        keyed(&user, &"k".repeat(1000), &json!({"message": "x"})).send().await.error(400, 1001);
        assert_eq!(user.charged().await, 0);
    });
}
