//! Stopping is a call of its own: it closes the provider's connection within 2 s, and keeps and charges what was
//! delivered. (The bound is the contract's; the tests allow for a noisy machine.)

use std::time::Duration;

use serde_json::json;

use crate::support::api::text;
use crate::support::provider::End;
use crate::support::reply::{Reply, Step};
use crate::support::sse::{raw_of, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run};

const STOP_LIMIT: Duration = Duration::from_secs(5);

#[test]
fn a_stop_closes_the_provider_and_keeps_what_was_delivered() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script([
            Reply::happy(&["留", "下", "的", "不该有"], (9, 900)).step_after_delta(3, Step::Gate),
            Reply::happy(&["继续"], (9, 2)),
        ]);
        let mut stream = user.stream(json!({"message": script.message("x")})).await;
        let mut events = stream.take(4).await;
        let meta = events[0].json();
        let session = text(&meta, "sessionId");

        let stopped = user.stop(session).await;
        assert_eq!(stopped["stopped"], true, "{stopped}");
        for key in ["sessionId", "messageId", "requestId"] {
            assert_eq!(stopped[key], meta[key], "{key}");
        }
        assert_eq!(script.call().await.ended(STOP_LIMIT).await, End::ClientGone);
        events.extend(stream.rest().await);
        assert_eq!(terminal(&events, "done").json()["finishReason"], "stopped");
        assert_eq!(text_of(&events), "留下的");

        let message = user.messages(session).await.pop().expect("the answer");
        assert_eq!((&message["status"], &message["content"]), (&json!("stopped"), &json!("留下的")));
        let charged = user.charged().await;
        assert!((1..200).contains(&charged), "an estimate of what was delivered: {charged}");

        assert_eq!(user.stop(session).await["stopped"], false, "nothing runs any more");
        let again = user.resuming(session, None, None).stream().await.rest().await;
        assert_eq!(raw_of(&again), raw_of(&events));
        let next = user.ask(json!({"message": script.message("继续"), "sessionId": session})).await;
        assert_eq!(next["reply"], "继续");
        let prompt = script.nth_call(1).await.prompt();
        assert!(prompt.iter().any(|(_, content)| content == "留下的"), "a stopped answer is history: {prompt:?}");
    });
}

#[test]
fn a_stop_needs_no_connected_client() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::stall(&["半"]));
        let mut stream = user.stream(json!({"message": script.message("x")})).await;
        let session = text(&stream.take(2).await[0].json(), "sessionId").to_owned();
        drop(stream);
        assert_eq!(user.stop(&session).await["stopped"], true);
        assert_eq!(script.call().await.ended(STOP_LIMIT).await, End::ClientGone);
        assert_eq!(user.finished_message(&session).await["status"], "stopped");
        assert!(user.charged().await > 0);
    });
}

#[test]
fn a_stop_before_the_first_event_leaves_the_session_free_and_the_quota_whole() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let script = provider().script([Reply::events(&[]).then(Step::Hang), Reply::happy(&["好"], (3, 1))]);
        let body = json!({"message": script.message("x"), "sessionId": session});
        let waiting = tokio::spawn(user.streaming(&body).open());
        let call = script.call().await;
        assert_eq!(user.stop(&session).await["stopped"], true);
        assert_eq!(call.ended(STOP_LIMIT).await, End::ClientGone);
        if let Ok(mut stream) = waiting.await.expect("the request ends") {
            assert_eq!(text_of(&stream.rest().await), "");
        }
        assert_eq!(user.charged().await, 0, "nothing was delivered");
        assert_eq!(user.ask(body).await["reply"], "好");
    });
}

#[test]
fn stopping_an_idle_or_unknown_session() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let stopped = user.stop(&session).await;
        assert_eq!((&stopped["stopped"], &stopped["sessionId"]), (&json!(false), &json!(session)));
        user.post("/ai/chat/sessions/nobody/stop", &json!({})).await.error(404, 1004);
        // The call needs no body at all.
        let request = user.request(reqwest::Method::POST, &format!("/ai/chat/sessions/{session}/stop"));
        request.send().await.ok();
    });
}
