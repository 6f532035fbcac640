//! `kill -9` of workerd in the middle of streams, and a restart on the same state. The next touch, or the object's alarm
//! without any, must find what was running, mark it interrupted with the text so far, and settle its hold.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::api::text;
use crate::support::client::User;
use crate::support::reply::{Reply, Step};
use crate::support::sse::{Event, raw_of, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run, unique, wait_until};

/// What the log may lack after a kill is the last second by the contract; the machine gets another one.
const MAY_BE_LOST: Duration = Duration::from_secs(2);
const STREAM_FOR: Duration = Duration::from_secs(4);

/// An answer that hangs after four words.
const WORDS: [&str; 6] = ["夜", "雨", "敲", "窗", "不该", "有"];
const SENT: &str = "夜雨敲窗";

/// The newest message as the first touch after the restart shows it.
async fn first_touch(user: &User, session: &str) -> Value {
    user.messages(session).await.pop().expect("a message")
}

/// Checks that the error a returning client gets ends its stream, with an id above any it had.
fn told_so(resumed: &[Event], seen: &[Event]) {
    let error = terminal(resumed, "error");
    assert!(error.id > seen.iter().filter_map(|event| event.id).max(), "an id above any sent: {error:?}");
    assert!(error.json()["code"].as_u64().is_some_and(|code| code >= 3000), "{error:?}");
}

#[test]
fn a_killed_worker_finds_what_was_running() {
    run(async {
        let worker = Worker::start(&[]).await;
        let [touched, untouched, flowing, finished] = [(); 4].map(|()| worker.user("writer"));

        let before = provider().script(Reply::happy(&["早就写完"], (10, 4)));
        let done = finished.ask(json!({"message": before.message("x")})).await;
        let kept = finished.messages(text(&done, "sessionId")).await;

        let hanging = || provider().script(Reply::happy(&WORDS, (10, 6)).step_after_delta(4, Step::Gate));
        let (script, other) = (hanging(), hanging());
        let (key, body) = (unique(), json!({"message": script.message("x")}));
        let mut stream = touched.streaming(&body).header("Idempotency-Key", &key).stream().await;
        let seen = stream.take(5).await;
        let session = text(&seen[0].json(), "sessionId").to_owned();
        let mut other_stream = untouched.stream(json!({"message": other.message("x")})).await;
        let other_session = text(&other_stream.take(5).await[0].json(), "sessionId").to_owned();

        // A third answer flows all the time, 100 words a second. Reading it also gives the others' words the time in
        // which they must have been stored.
        let words: Vec<_> = (0..1000).map(|index| format!("{index}，")).collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let paced = (0..1000).fold(Reply::happy(&words, (10, 1000)), |reply, index| {
            reply.step_after_delta(2 * index, Step::Pause(Duration::from_millis(10)))
        });
        let flow = provider().script(paced);
        let mut flow_stream = flowing.stream(json!({"message": flow.message("x")})).await;
        let (started, mut flown, mut safe) = (Instant::now(), flow_stream.take(1).await, String::new());
        let flow_session = text(&flown[0].json(), "sessionId").to_owned();
        while started.elapsed() < STREAM_FOR {
            flown.extend(flow_stream.take(1).await);
            if started.elapsed() < STREAM_FOR - MAY_BE_LOST {
                safe = text_of(&flown);
            }
        }
        worker.kill_9();
        for mut cut in [stream, other_stream, flow_stream] {
            assert!(cut.rest().await.iter().all(|event| event.name == "message"), "no end was sent");
        }
        worker.restart().await;

        // Touched: whoever looks first finds it interrupted, with the text so far.
        let message = first_touch(&touched, &session).await;
        assert_eq!((&message["status"], &message["content"]), (&json!("interrupted"), &json!(SENT)));
        let missed = touched.resuming(&session, None, seen[4].id).stream().await.rest().await;
        told_so(&missed, &seen);
        let all = touched.resuming(&session, None, None).stream().await.rest().await;
        assert_eq!(raw_of(&all[..5]), raw_of(&seen), "what was sent stands in the log as it was");
        assert_eq!(all.len(), 6, "and then only the error: {all:?}");
        if let Ok(mut again) = touched.streaming(&body).header("Idempotency-Key", &key).open().await {
            told_so(&again.rest().await, &seen);
        }
        assert_eq!(script.calls().len(), 1, "the key does not start it again");
        assert!((1..200).contains(&touched.charged().await), "what was delivered is charged");

        // Flowing: a prefix that lacks at most the last second, nothing twice or out of order.
        let message = first_touch(&flowing, &flow_session).await;
        let content = text(&message, "content");
        assert_eq!(message["status"], "interrupted");
        assert!(words.concat().starts_with(content), "{content}");
        assert!(content.starts_with(&safe), "{} letters of {} that were old enough", content.len(), safe.len());
        let last_seen = flown.last().expect("events").id;
        told_so(&flowing.resuming(&flow_session, None, last_seen).stream().await.rest().await, &flown);
        assert!(flowing.charged().await > 0);

        // Untouched: reading the quota does not touch the session's object; its own alarm must settle the hold, long
        // before the hold would expire by itself (10 minutes).
        let settled = wait_until(Duration::from_secs(120), "the session's alarm to settle its hold", || async {
            (untouched.quota("daily").await.reserved == 0).then_some(())
        });
        settled.await;
        assert!((1..200).contains(&untouched.charged().await));
        let message = first_touch(&untouched, &other_session).await;
        assert_eq!((&message["status"], &message["content"]), (&json!("interrupted"), &json!(SENT)));

        // What was finished stays as it was, and what was interrupted goes on.
        assert_eq!(finished.messages(text(&done, "sessionId")).await, kept);
        assert_eq!(finished.charged().await, 14);
        let next = provider().script(Reply::happy(&["接着写"], (9, 3)));
        let answer = touched.ask(json!({"message": next.message("继续"), "sessionId": session})).await;
        assert_eq!(answer["reply"], "接着写");
        let prompt = next.call().await.prompt();
        assert!(prompt.iter().any(|(_, content)| content == SENT), "{prompt:?}");
    });
}

#[test]
fn a_worker_killed_before_the_first_event_holds_nothing_back() {
    run(async {
        let worker = Worker::start(&[]).await;
        let user = worker.user("writer");
        let session = user.new_session(json!({})).await;
        let script = provider().script([Reply::events(&[]).then(Step::Hang), Reply::happy(&["好"], (3, 1))]);
        let body = json!({"message": script.message("x"), "sessionId": session});
        let waiting = tokio::spawn(user.streaming(&body).try_response());
        script.call().await;
        assert!(user.quota("daily").await.reserved > 0, "the hold is taken before the provider is called");
        worker.kill_9();
        let _ = waiting.await.expect("the request ends");
        worker.restart().await;
        assert_eq!(user.charged().await, 0, "nothing was delivered, nothing is charged, by alarm alone");
        assert_eq!(user.ask(body).await["reply"], "好");
        assert_eq!(user.charged().await, 4);
    });
}
