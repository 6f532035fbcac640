//! Things done at the wrong moment: to a session whose answer is still being written.

use serde_json::json;

use crate::support::api::text;
use crate::support::client::User;
use crate::support::provider::{End, Script};
use crate::support::reply::{Reply, Step};
use crate::support::sse::{EventStream, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run};

/// A session with one finished turn and a second one that holds after its first delta.
async fn busy_session() -> (User, String, std::sync::Arc<Script>, EventStream) {
    let user = Worker::anyone().await;
    let running = Reply::happy(&["一", "二"], (9, 2)).step_after_delta(1, Step::Gate);
    let script = provider().script([Reply::happy(&["旧"], (9, 2)), running]);
    let session = user.new_session(json!({})).await;
    user.ask(json!({"message": script.message("x"), "sessionId": session})).await;
    let mut stream = user.stream(json!({"message": script.message("y"), "sessionId": session})).await;
    stream.take(2).await;
    (user, session, script, stream)
}

#[test]
fn a_running_answer_keeps_the_tree_as_it_is() {
    run(async {
        let (user, session, script, mut stream) = busy_session().await;
        let before = user.messages(&session).await;
        assert_eq!((before.len(), &before[3]["status"]), (4, &json!("streaming")));
        let at = |rest: &str| format!("/ai/chat/sessions/{session}{rest}");
        let (question, answer) = (text(&before[0], "id"), text(&before[1], "id"));
        user.post("/ai/chat", &json!({"message": "插话", "sessionId": session})).await.error(409, 1006);
        user.post(&at(&format!("/messages/{answer}/regenerate")), &json!({})).await.error(409, 1006);
        user.put(&at(&format!("/messages/{question}")), &json!({"message": "改"})).await.error(409, 1006);
        user.put(&at("/path"), &json!({"messageId": answer})).await.error(409, 1006);
        user.delete(&at("/messages")).await.error(409, 1006);
        user.put(&at(""), &json!({"title": "可以改名"})).await.ok();
        script.release(1);
        terminal(&stream.rest().await, "done");
        let after = user.messages(&session).await;
        assert_eq!(after[..3], before[..3]);
        assert_eq!((&after[3]["status"], &after[3]["content"]), (&json!("complete"), &json!("一二")));
        assert_eq!((script.calls().len(), user.charged().await), (2, 22));
    });
}

#[test]
fn deleting_a_session_ends_what_runs_in_it_and_settles() {
    run(async {
        let (user, session, script, mut stream) = busy_session().await;
        user.delete(&format!("/ai/chat/sessions/{session}")).await.ok();
        assert_eq!(script.nth_call(1).await.ended(PATIENCE).await, End::ClientGone);
        let rest = stream.rest().await;
        assert_eq!(text_of(&rest), "", "nothing more is said");
        assert!(user.charged().await >= 11, "nothing stays held");
        user.get(&format!("/ai/chat/sessions/{session}")).await.error(404, 1004);
        assert_eq!(user.get("/ai/chat/sessions").await.ok(), json!([]), "the end of the answer does not bring it back");
    });
}
