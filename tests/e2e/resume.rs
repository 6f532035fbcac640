//! A dropped client loses nothing: the generation runs on without it, and whoever comes back gets exactly the events he
//! missed, byte for byte, from one provider call and one charge.

use std::sync::Arc;

use serde_json::json;

use crate::support::api::text;
use crate::support::client::User;
use crate::support::provider::{End, Script};
use crate::support::reply::{Reply, Step};
use crate::support::sse::{EventStream, raw_of, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run};

const EVENTS: usize = 40;

/// 38 deltas: with `meta` and `done` the stream has 40 events.
fn deltas() -> Vec<String> {
    (0..EVENTS - 2).map(|index| format!("{index}回，")).collect()
}

fn forty(usage: (u64, u64)) -> Reply {
    let deltas = deltas();
    Reply::happy(&deltas.iter().map(String::as_str).collect::<Vec<_>>(), usage)
}

/// A stream that holds after `held` deltas, with its session's id; the first event has been read.
async fn held_after(held: usize) -> (User, Arc<Script>, EventStream, String) {
    let user = Worker::anyone().await;
    let script = provider().script(forty((30, 38)).step_after_delta(held, Step::Gate));
    let mut stream = user.stream(json!({"message": script.message("四十")})).await;
    let session = text(&stream.take(1).await[0].json(), "sessionId").to_owned();
    (user, script, stream, session)
}

#[test]
fn every_event_can_be_the_last_one_seen() {
    run(async {
        let (user, script, mut stream, session) = held_after(1).await;
        script.release(1);
        stream.rest().await;
        let all = user.resuming(&session, None, None).stream().await.rest().await;
        assert_eq!(all.len(), EVENTS, "without Last-Event-ID from the first event");
        let message = text(&all[0].json(), "messageId").to_owned();
        for seen in 1..EVENTS {
            let last = all[seen - 1].id;
            let rest = user.resuming(&session, Some(&message), last).stream().await.rest().await;
            assert_eq!(raw_of(&rest), raw_of(&all[seen..]), "after event {last:?}");
        }
        // Who has seen the end gets nothing more; an EventSource stops for good on 204.
        let last = all[EVENTS - 1].id;
        match user.resuming(&session, Some(&message), last).open().await {
            Ok(mut stream) => assert!(stream.rest().await.is_empty()),
            Err(answer) => assert_eq!((answer.status, answer.text.as_str()), (204, "")),
        }
        assert_eq!(script.calls().len(), 1);
        assert_eq!(user.charged().await, 68);
    });
}

#[test]
fn the_first_run_and_its_repetition_are_the_same_bytes() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(forty((30, 38)));
        let first = user.stream(json!({"message": script.message("x")})).await.rest().await;
        assert_eq!(first.len(), EVENTS);
        let session = text(&first[0].json(), "sessionId").to_owned();
        let again = user.resuming(&session, None, None).stream().await.rest().await;
        assert_eq!(raw_of(&again), raw_of(&first));
    });
}

#[test]
fn a_dropped_client_loses_neither_text_nor_charge() {
    run(async {
        for read in [0, 1, 5, 20, 37] {
            let (user, script, mut stream, session) = held_after(read.max(1)).await;
            assert_eq!(stream.take(read).await.len(), read);
            drop(stream);
            script.release(1);
            let message = user.finished_message(&session).await;
            assert_eq!((&message["status"], text(&message, "content")), (&json!("complete"), deltas().concat().as_str()));
            assert_eq!(script.call().await.ended(PATIENCE).await, End::Finished, "the provider was read to its end");
            assert_eq!(user.charged().await, 68, "after {read} of {EVENTS}");
        }
    });
}

#[test]
fn coming_back_while_it_runs_gives_what_was_missed_and_then_what_is_new() {
    run(async {
        let (user, script, mut stream, session) = held_after(10).await;
        let mut first = stream.take(3).await;
        let last_seen = first[1].id;
        let mut resumed = user.resuming(&session, None, last_seen).stream().await;
        let missed = resumed.take(8).await;
        assert_eq!(missed[0], first[2], "strictly after Last-Event-ID");
        script.release(1);
        let mut second = missed;
        second.extend(resumed.rest().await);
        first.extend(stream.rest().await);
        assert_eq!(raw_of(&second), raw_of(&first[2..]));
        terminal(&second, "done");
        assert_eq!(script.calls().len(), 1);
        assert_eq!(user.charged().await, 68);
    });
}

#[test]
fn the_newest_generation_is_meant_unless_a_message_is_named() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script([Reply::happy(&["旧"], (5, 1)), Reply::happy(&["新"], (5, 1))]);
        let first = user.stream(json!({"message": script.message("一")})).await.rest().await;
        let session = text(&first[0].json(), "sessionId").to_owned();
        user.stream(json!({"message": script.message("二"), "sessionId": session})).await.rest().await;
        let newest = user.resuming(&session, None, None).stream().await.rest().await;
        assert_eq!(text_of(&newest), "新");
        let message = text(&first[0].json(), "messageId").to_owned();
        let named = user.resuming(&session, Some(&message), None).stream().await.rest().await;
        assert_eq!(raw_of(&named), raw_of(&first));
    });
}

#[test]
fn a_json_answer_can_be_read_again_as_a_stream() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["一样", "的引擎"], (5, 2)));
        let data = user.ask(json!({"message": script.message("x")})).await;
        let events = user.resuming(text(&data, "sessionId"), None, None).stream().await.rest().await;
        assert_eq!(text_of(&events), "一样的引擎");
        assert_eq!(terminal(&events, "done").json()["messageId"], data["message"]["id"]);
    });
}

#[test]
fn what_does_not_exist_cannot_be_resumed() {
    run(async {
        let user = Worker::anyone().await;
        user.resuming("nobody", None, None).send().await.error(404, 1004);
        let script = provider().script(Reply::happy(&["x"], (5, 1)));
        let data = user.ask(json!({"message": script.message("x")})).await;
        user.resuming(text(&data, "sessionId"), Some("nobody"), None).send().await.error(404, 1004);
        let request = user.resuming(text(&data, "sessionId"), None, None).header("Last-Event-ID", "soon");
        request.send().await.error(400, 1001);
    });
}
