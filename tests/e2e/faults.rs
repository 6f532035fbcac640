//! What the provider breaks, the client must see as broken. Before the first event a failure is an HTTP status (contract
//! section 5 row 42) and leaves nothing behind; after it, the stream ends in `error`, never in `done`, and what was
//! delivered is saved, marked failed and charged.

use std::time::Duration;

use serde_json::json;

use crate::chat::nothing_left;
use crate::support::api::text;
use crate::support::client::{Answer, User};
use crate::support::reply::{Reply, Step, delta};
use crate::support::sse::{terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run, token};

/// What the provider's own error texts contain, and no client may read.
const SECRET_IN_ERROR: &str = "sk-e2e";

/// Sends a message that meets this reply, once to each chat route; each answer must be an error before any event.
async fn refused(worker: &Worker, name: &str, reply: &Reply) -> Vec<Answer> {
    let user = worker.user("writer");
    let mut answers = Vec::new();
    for path in ["/ai/chat", "/ai/chat/stream"] {
        let script = provider().script(reply.clone());
        answers.push(user.post(path, &json!({"message": script.message(name)})).await);
        assert_eq!(script.calls().len(), 1, "{name}: neither tried again nor redirected");
        nothing_left(&user).await;
    }
    for answer in &answers {
        assert!(!answer.text.contains(SECRET_IN_ERROR), "{name}: the provider's text leaks: {}", answer.text);
    }
    answers
}

#[test]
fn error_statuses_become_their_http_status() {
    run(async {
        let worker = Worker::shared().await;
        let expected = [(401, 502, 5004), (403, 502, 5004), (500, 503, 3501), (502, 503, 3501), (503, 503, 3501)];
        for (upstream, status, code) in expected {
            for answer in refused(worker, &format!("{upstream}"), &Reply::status(upstream)).await {
                answer.error(status, code);
            }
        }
        for answer in refused(worker, "429", &Reply::status(429).header("Retry-After", "17")).await {
            assert_eq!(answer.header("retry-after"), Some("17"));
            answer.error(429, 3503);
        }
        for answer in refused(worker, "400", &Reply::status(400)).await {
            answer.any_error();
        }
    });
}

#[test]
fn a_provider_that_refuses_connections_is_unavailable() {
    run(async {
        let worker = Worker::strict().await;
        let user = worker.user("writer");
        let mut claims = token::claims(&user.id, "writer");
        claims["iss"] = json!("https://platform.example");
        claims["aud"] = json!("inkstone");
        let token = token::hs256(&json!({"alg": "HS256"}), &claims, token::SECRET.as_bytes());
        let user = user.with_token(Some(token));
        for path in ["/ai/chat", "/ai/chat/stream"] {
            user.post(path, &json!({"message": "有人吗"})).await.error(503, 3501);
            nothing_left(&user).await;
        }
    });
}

#[test]
fn a_provider_that_never_answers_times_out() {
    run(async {
        let worker = Worker::impatient().await;
        let never = Duration::from_secs(3600);
        let pings = Step::Repeat { bytes: b": ping\n\n".to_vec(), every: Duration::from_millis(200) };
        let silent = [
            ("no status line", Reply::happy(&["晚"], (1, 1)).slow_headers(never)),
            ("headers alone", Reply::events(&[]).then(Step::Hang)),
            ("comments alone", Reply::events(&[]).then(pings)),
        ];
        for (name, reply) in silent {
            for answer in refused(worker, name, &reply).await {
                answer.error(504, 3502);
            }
        }
    });
}

#[test]
fn a_stream_that_breaks_before_its_first_event_is_an_http_error() {
    run(async {
        let worker = Worker::shared().await;
        let broken = [
            ("an error object first", Reply::error_in_200(&[])),
            ("an empty body", Reply::events(&[])),
            ("a reset", Reply::events(&[]).then(Step::Reset)),
            ("cut", Reply::events(&[]).then(Step::Truncate)),
            ("a page of HTML", Reply::events(&[]).then(Step::Bytes(b"<html>Bad gateway</html>\n".to_vec()))),
            ("no content", Reply::status(204)),
            // Following it would hand the key and the prompt to whoever the answer names.
            ("a redirect", Reply::status(307).header("Location", &format!("{}/chat/completions", provider().base_url))),
        ];
        for (name, reply) in broken {
            for answer in refused(worker, name, &reply).await {
                let got = answer.any_error();
                assert!([(503, 3501), (502, 5004)].contains(&got), "{name}: {got:?}");
            }
        }
    });
}

/// Streams a message that meets this reply after some deltas; checks the stream's end and what is left of the answer.
async fn broken(worker: &Worker, name: &str, reply: Reply) -> User {
    let user = worker.user("writer");
    let script = provider().script(reply);
    let mut stream = user.stream(json!({"message": script.message(name)})).await;
    // A reset destroys what the other side has not read yet, so the fault waits until both deltas are through.
    let mut events = stream.take(3).await;
    script.release(1);
    events.extend(stream.rest().await);
    let last = events.last().map(|event| event.name.as_str());
    assert_eq!(last, Some("error"), "{name}: the stream's end, which was {:?}", stream.ending);
    assert_eq!(text_of(&events), "写到一半", "{name}: what came before the fault is delivered");
    let meta = events[0].json();
    let error = terminal(&events, "error").json();
    assert!(error["error"].as_str().is_some_and(|text| !text.is_empty()), "{name}: {error}");
    assert!(error["code"].as_u64().is_some_and(|code| code >= 3000), "{name}: {error}");
    assert!(error["retryable"].is_boolean(), "{name}: {error}");
    assert!(["content", "delta", "text"].iter().all(|key| error.get(key).is_none()), "{name}: {error}");
    assert!(!error.to_string().contains(SECRET_IN_ERROR), "{name}: {error}");

    let saved = user.messages(text(&meta, "sessionId")).await;
    let ids: Vec<_> = saved.iter().map(|message| &message["role"]).collect();
    assert_eq!(ids, ["user", "assistant"], "{name}");
    let answer = &saved[1];
    assert_eq!((&answer["status"], &answer["content"]), (&json!("failed"), &json!("写到一半")), "{name}");
    assert_eq!(answer["id"], meta["messageId"], "{name}");
    let charged = user.charged().await;
    assert!((1..200).contains(&charged), "{name}: what was delivered is charged, not what was asked for: {charged}");

    let again = user.resuming(text(&meta, "sessionId"), None, None).stream().await.rest().await;
    assert_eq!(again, events, "{name}: who comes back later is told the same");
    assert_eq!(script.calls().len(), 1, "{name}: nothing was tried again behind the client's back");
    user
}

const HALF: [&str; 2] = ["写到", "一半"];

#[test]
fn a_stream_that_breaks_later_ends_in_error() {
    run(async {
        let worker = Worker::shared().await;
        let long_line = delta(json!({"content": "长".repeat(400_000)}));
        let cut = |step| Reply::happy(&HALF, (10, 4)).step_after_delta(2, step);
        let faults = [
            ("neither [DONE] nor a finish reason", Reply::no_finish(&HALF)),
            ("the same without chunks", Reply::no_finish(&HALF).until_close()),
            ("an error object inside a 200", Reply::error_in_200(&HALF)),
            ("a reset", cut(Step::Reset).step_after_delta(2, Step::Gate)),
            ("no terminating chunk", cut(Step::Truncate)),
            ("no JSON", Reply::no_finish(&HALF).then(Step::Bytes(b"data: {\"choices\":[{\n\n".to_vec()))),
            ("cut inside an event", Reply::no_finish(&HALF).then(Step::Bytes(b"data: {\"choices\":".to_vec()))),
            ("a line over 1 MiB", Reply::no_finish(&HALF).then(Step::Bytes(format!("data: {long_line}\n\n").into()))),
            ("a line that never ends", Reply::no_finish(&HALF).then(endless())),
        ];
        for (name, reply) in faults {
            broken(worker, name, reply).await;
        }
    });
}

/// A line that grows by 64 KiB every millisecond.
fn endless() -> Step {
    Step::Repeat { bytes: vec![b'x'; 64 * 1024], every: Duration::from_millis(1) }
}

#[test]
fn a_stall_ends_in_error_at_the_limit_even_behind_comments() {
    run(async {
        let worker = Worker::impatient().await;
        for (name, reply) in [("silence", Reply::stall(&HALF)), ("comments", Reply::stall_behind_pings(&HALF))] {
            let started = tokio::time::Instant::now();
            broken(worker, name, reply).await;
            let took = started.elapsed();
            // The limit is 3 s after the last data event.
            assert!((Duration::from_secs(2)..Duration::from_secs(12)).contains(&took), "{name}: {took:?}");
        }
    });
}

#[test]
fn a_quiet_provider_is_bridged_by_our_own_heartbeat() {
    run(async {
        let user = Worker::impatient().await.user("writer");
        let script = provider().script(Reply::stall(&HALF));
        let mut stream = user.stream(json!({"message": script.message("心跳")})).await;
        stream.rest().await;
        // One a second, three seconds long.
        assert!(stream.comments.len() >= 2, "{:?}", stream.comments);
    });
}

#[test]
fn a_slow_but_living_provider_is_not_cut() {
    run(async {
        let user = Worker::impatient().await.user("writer");
        let words = ["一", "二", "三", "四"];
        // Each pause is below the limit of 3 s, all of them together above it.
        let reply = (1..=3).fold(Reply::happy(&words, (8, 4)), |reply, index| {
            reply.step_after_delta(2 * index - 1, Step::Pause(Duration::from_millis(1500)))
        });
        let script = provider().script(reply);
        let events = user.stream(json!({"message": script.message("慢慢来")})).await.rest().await;
        assert_eq!(text_of(&events), words.concat());
        terminal(&events, "done");
    });
}

#[test]
fn a_json_answer_that_breaks_midway_is_an_error_and_its_text_is_kept() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        for reply in [Reply::no_finish(&HALF), Reply::error_in_200(&HALF)] {
            let script = provider().script(reply);
            let answer = user.post("/ai/chat", &json!({"message": script.message("x"), "sessionId": session})).await;
            let (status, _) = answer.any_error();
            assert!(status >= 500, "{status}");
            let saved = user.finished_message(&session).await;
            assert_eq!((&saved["status"], &saved["content"]), (&json!("failed"), &json!("写到一半")));
        }
        assert!(user.charged().await > 0);
    });
}

#[test]
fn the_session_goes_on_after_a_failed_answer() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let script = provider().script([Reply::no_finish(&HALF), Reply::happy(&["好了"], (9, 2))]);
        let body = json!({"message": script.message("x"), "sessionId": session});
        user.stream(body.clone()).await.rest().await;
        assert_eq!(user.ask(body).await["reply"], "好了");
        assert_eq!(user.messages(&session).await.len(), 4);
    });
}
