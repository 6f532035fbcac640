//! Messages form a tree: regenerating an answer and editing a question make siblings, nothing is lost, and the active
//! path is what the list and the prompt show.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::User;
use crate::support::provider::Script;
use crate::support::reply::Reply;
use crate::support::sse::{terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run};

/// A session with one turn whose answers come from a script of these words, one per call.
async fn one_turn(answers: &[&str]) -> (User, String, Arc<Script>) {
    let user = Worker::anyone().await;
    let session = user.new_session(json!({})).await;
    let replies: Vec<_> = answers.iter().map(|answer| Reply::happy(&[answer], (10, 5))).collect();
    let script = provider().script(replies);
    user.ask(json!({"message": script.message("问"), "sessionId": session})).await;
    (user, session, script)
}

fn id(message: &Value) -> &str {
    text(message, "id")
}

fn contents(messages: &[Value]) -> Vec<&str> {
    messages.iter().map(|message| text(message, "content")).collect()
}

/// The siblings a message names, as a sorted list.
fn siblings(message: &Value) -> Vec<String> {
    let ids = message["siblingIds"].as_array().expect("siblingIds").iter();
    let mut ids: Vec<_> = ids.map(|id| id.as_str().expect("an id").to_owned()).collect();
    ids.sort();
    ids
}

fn sorted(ids: [&str; 2]) -> Vec<String> {
    let mut ids = ids.map(str::to_owned).to_vec();
    ids.sort();
    ids
}

#[test]
fn regenerating_makes_a_sibling_and_keeps_the_old_answer() {
    run(async {
        let (user, session, script) = one_turn(&["旧答", "新答"]).await;
        let before = user.messages(&session).await;
        assert!(before[1].get("siblingIds").is_none_or(|ids| ids == &json!([]) || ids == &json!([id(&before[1])])));
        let path = format!("/ai/chat/sessions/{session}/messages/{}/regenerate", id(&before[1]));
        let data = user.post(&path, &json!({"options": {"temperature": 0.9}})).await.ok();
        assert_eq!(data["reply"], "新答");
        assert_eq!(script.nth_call(1).await.prompt(), script.nth_call(0).await.prompt(), "the same question, not the old answer");
        assert_eq!(script.nth_call(1).await.body["temperature"], 0.9);

        let after = user.messages(&session).await;
        assert_eq!(contents(&after), [script.message("问").as_str(), "新答"]);
        assert_eq!(siblings(&after[1]), sorted([id(&before[1]), id(&after[1])]));
        assert_eq!(user.charged().await, 30, "each answer is charged");
    });
}

#[test]
fn regenerating_streams_when_asked_to() {
    run(async {
        for header in [true, false] {
            let (user, session, _script) = one_turn(&["旧", "新"]).await;
            let answer = user.messages(&session).await[1].clone();
            let path = format!("/ai/chat/sessions/{session}/messages/{}/regenerate", id(&answer));
            let request = user.request(reqwest::Method::POST, &path);
            let request = match header {
                true => request.header("Accept", "text/event-stream").json(&json!({})),
                false => request.json(&json!({"stream": true})),
            };
            let events = request.stream().await.rest().await;
            assert_eq!(text_of(&events), "新");
            let done = terminal(&events, "done").json();
            assert_eq!(done["sessionId"], session.as_str());
            assert_eq!(id(&user.messages(&session).await[1]), text(&done, "messageId"));
        }
    });
}

#[test]
fn editing_a_question_answers_it_anew_beside_the_old_branch() {
    run(async {
        let (user, session, script) = one_turn(&["第一答", "第二答", "第三答"]).await;
        let old = user.messages(&session).await;
        user.ask(json!({"message": script.message("追问"), "sessionId": session})).await;
        let edited = script.message("改过的问题");
        let path = format!("/ai/chat/sessions/{session}/messages/{}", id(&old[0]));
        assert_eq!(user.put(&path, &json!({"message": edited})).await.ok()["reply"], "第三答");
        let turns: Vec<_> = script.nth_call(2).await.prompt().into_iter().filter(|(role, _)| role != "system").collect();
        assert_eq!(turns, [("user".to_owned(), edited.clone())], "nothing of the old branch is in the prompt");

        let new = user.messages(&session).await;
        assert_eq!(contents(&new), [edited.as_str(), "第三答"]);
        assert_eq!(siblings(&new[0]), sorted([id(&old[0]), id(&new[0])]));
        assert_eq!(new[0]["parentId"], old[0]["parentId"]);
    });
}

#[test]
fn switching_the_path_brings_a_branch_back_and_the_next_turn_follows_it() {
    run(async {
        let (user, session, script) = one_turn(&["旧答", "新答", "后来"]).await;
        let old = user.messages(&session).await;
        let regenerate = format!("/ai/chat/sessions/{session}/messages/{}/regenerate", id(&old[1]));
        user.post(&regenerate, &json!({})).await.ok();
        let path = format!("/ai/chat/sessions/{session}/path");
        let switched = user.put(&path, &json!({"messageId": id(&old[1])})).await.ok();
        assert_eq!((text(&switched, "sessionId"), text(&switched, "leafId")), (session.as_str(), id(&old[1])));
        assert_eq!(switched["messagesTotal"], 2);
        assert_eq!(contents(&user.messages(&session).await), [script.message("问").as_str(), "旧答"]);

        user.ask(json!({"message": script.message("再问"), "sessionId": session})).await;
        let prompt = script.nth_call(2).await.prompt();
        assert!(prompt.iter().any(|(_, content)| content == "旧答"), "{prompt:?}");
        assert!(prompt.iter().all(|(_, content)| content != "新答"), "{prompt:?}");

        for bad in [json!({}), json!({"messageId": 5})] {
            user.put(&path, &bad).await.error(400, 1001);
        }
        user.put(&path, &json!({"messageId": "nobody"})).await.error(404, 1004);
        assert_eq!(user.messages(&session).await.len(), 4, "a refused switch changes nothing");
    });
}

#[test]
fn a_failed_regeneration_leaves_the_path_as_it_was() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let script = provider().script([Reply::happy(&["好答"], (10, 5)), Reply::status(500)]);
        user.ask(json!({"message": script.message("问"), "sessionId": session})).await;
        let before = user.messages(&session).await;
        let message = format!("/ai/chat/sessions/{session}/messages");
        user.post(&format!("{message}/{}/regenerate", id(&before[1])), &json!({})).await.error(503, 3501);
        user.put(&format!("{message}/{}", id(&before[0])), &json!({"message": script.message("改")})).await.error(503, 3501);
        assert_eq!(user.messages(&session).await, before);
        assert_eq!(user.charged().await, 15);
    });
}

#[test]
fn messages_that_do_not_exist_are_404() {
    run(async {
        let (user, session, _script) = one_turn(&["答"]).await;
        let path = format!("/ai/chat/sessions/{session}/messages/nobody");
        user.post(&format!("{path}/regenerate"), &json!({})).await.error(404, 1004);
        user.put(&path, &json!({"message": "x"})).await.error(404, 1004);
        assert_eq!(user.charged().await, 15);
    });
}
