//! Sessions as objects of their own: made, titled, configured, listed, paged, archived, deleted (contract 2.2 and rows
//! 2–5 of its section 5).

use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::User;
use crate::support::reply::Reply;
use crate::support::worker::Worker;
use crate::support::{provider, run};

/// The ids in the answer to a list call.
async fn listed(user: &User, query: &str) -> Vec<String> {
    let sessions = user.get(&format!("/ai/chat/sessions{query}")).await.ok();
    let sessions = sessions.as_array().expect("a bare array").clone();
    sessions.iter().map(|session| text(session, "id").to_owned()).collect()
}

/// One short turn in a session; returns the message sent.
async fn turn(user: &User, session: &str, words: &str) -> String {
    let script = provider().script(Reply::happy(&["好的"], (7, 2)));
    let message = script.message(words);
    user.ask(json!({"message": message, "sessionId": session})).await;
    message
}

#[test]
fn a_new_session_is_201_with_the_whole_object() {
    run(async {
        let user = Worker::anyone().await;
        let body = json!({"title": "长篇", "projectId": "p-1", "settings": {"temperature": 0.5}});
        let session = user.post("/ai/chat/sessions", &body).await.data(201);
        assert_eq!((&session["title"], &session["projectId"]), (&json!("长篇"), &json!("p-1")));
        assert_eq!((&session["userId"], &session["status"]), (&json!(user.id), &json!("active")));
        assert_eq!(session["settings"]["temperature"], 0.5);
        assert_eq!(session["metadata"]["messageCount"], 0);
        for key in ["createdAt", "updatedAt"] {
            chrono::DateTime::parse_from_rfc3339(text(&session, key)).expect(key);
        }
        let read = user.get(&format!("/ai/chat/sessions/{}", text(&session, "id"))).await.ok();
        for key in ["id", "userId", "title", "projectId", "status", "settings", "createdAt"] {
            assert_eq!(read[key], session[key], "{key}");
        }
    });
}

#[test]
fn the_title_comes_from_the_first_message_until_one_is_set() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let path = format!("/ai/chat/sessions/{session}");
        turn(&user, &session, "少年下山时，师父给了他一把断剑").await;
        let title = text(&user.get(&path).await.ok(), "title").to_owned();
        assert!(title.starts_with("少年下山时"), "{title:?}");
        turn(&user, &session, "第二句话").await;
        assert_eq!(user.get(&path).await.ok()["title"], title, "a later message changes nothing");
        assert_eq!(user.put(&path, &json!({"title": "断剑"})).await.ok()["title"], "断剑");
        turn(&user, &session, "第三句话").await;
        assert_eq!(user.get(&path).await.ok()["title"], "断剑");

        let titled = user.new_session(json!({"title": "先定的名"})).await;
        turn(&user, &titled, "正文").await;
        assert_eq!(user.get(&format!("/ai/chat/sessions/{titled}")).await.ok()["title"], "先定的名");
    });
}

#[test]
fn settings_reach_the_provider_and_options_override_them() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({"settings": {"temperature": 0.5, "maxTokens": 99}})).await;
        let path = format!("/ai/chat/sessions/{session}");
        // Flat or nested, and what is absent stays.
        user.put(&path, &json!({"settings": {"systemPrompt": "你是编辑。", "frequencyPenalty": 0.25}})).await.ok();
        let settings = user.put(&path, &json!({"presencePenalty": 0.75, "topP": 0.8})).await.ok()["settings"].clone();
        assert_eq!((&settings["temperature"], &settings["frequencyPenalty"]), (&json!(0.5), &json!(0.25)), "{settings}");

        let script = provider().script(Reply::happy(&["好"], (7, 1)));
        user.ask(json!({"message": script.message("一"), "sessionId": session})).await;
        user.ask(
            json!({"message": script.message("二"), "sessionId": session, "options": {"temperature": 1.5, "maxTokens": 64}}),
        )
        .await;
        let (plain, overridden) = (script.nth_call(0).await, script.nth_call(1).await);
        assert_eq!(plain.prompt()[0], ("system".into(), "你是编辑。".into()));
        let sent = ["temperature", "max_tokens", "frequency_penalty", "presence_penalty", "top_p"].map(|key| &plain.body[key]);
        assert_eq!(sent, [&json!(0.5), &json!(99), &json!(0.25), &json!(0.75), &json!(0.8)]);
        assert_eq!((&overridden.body["temperature"], &overridden.body["max_tokens"]), (&json!(1.5), &json!(64)));
    });
}

#[test]
fn bad_settings_change_nothing() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({"title": "原名"})).await;
        let path = format!("/ai/chat/sessions/{session}");
        let bad = [
            json!({"temperature": 2.1}),
            json!({"title": "新名", "settings": {"temperature": "hot"}}),
            json!({"title": "新名", "status": "lost"}),
            json!({"title": 5}),
            json!({"tags": "玄幻"}),
        ];
        for body in bad {
            user.put(&path, &body).await.error(400, 1001);
        }
        let read = user.get(&path).await.ok();
        assert_eq!((&read["title"], &read["status"]), (&json!("原名"), &json!("active")));
    });
}

#[test]
fn an_archived_session_refuses_messages_until_it_is_active_again() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        let path = format!("/ai/chat/sessions/{session}");
        assert_eq!(user.put(&path, &json!({"status": "archived"})).await.ok()["status"], "archived");
        let script = provider().script(Reply::happy(&["不该有"], (1, 1)));
        let body = json!({"message": script.message("x"), "sessionId": session});
        user.post("/ai/chat", &body).await.error(409, 1006);
        user.streaming(&body).send().await.error(409, 1006);
        assert!(script.calls().is_empty());
        assert_eq!(user.charged().await, 0);
        user.put(&path, &json!({"status": "active"})).await.ok();
        turn(&user, &session, "又能写了").await;
    });
}

#[test]
fn a_deleted_session_is_gone_for_every_route() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        turn(&user, &session, "会消失").await;
        let path = format!("/ai/chat/sessions/{session}");
        user.delete(&path).await.ok();
        user.get(&path).await.error(404, 1004);
        user.put(&path, &json!({"title": "x"})).await.error(404, 1004);
        user.delete(&path).await.error(404, 1004);
        user.get(&format!("{path}/messages")).await.error(404, 1004);
        user.resuming(&session, None, None).send().await.error(404, 1004);
        user.post("/ai/chat", &json!({"message": "x", "sessionId": session})).await.error(404, 1004);
        user.streaming(&json!({"message": "x", "sessionId": session})).send().await.error(404, 1004);
        assert!(listed(&user, "").await.is_empty());
        assert_eq!(user.charged().await, 9, "the turn before the deletion stays charged");
    });
}

#[test]
fn the_list_is_newest_first_and_filtered() {
    run(async {
        let user = Worker::anyone().await;
        let mut ids = Vec::new();
        let wuxia = json!(["武侠", "长篇"]);
        for (title, project, tags) in
            [("龙门客栈", "p1", &wuxia), ("100% 完成", "p1", &json!(["科幻"])), ("1000 章_终", "p2", &wuxia)]
        {
            let id = user.new_session(json!({"title": title, "projectId": project})).await;
            user.put(&format!("/ai/chat/sessions/{id}"), &json!({"tags": tags})).await.ok();
            ids.push(id);
        }
        let [a, b, c] = <[String; 3]>::try_from(ids).expect("three sessions");
        assert_eq!(listed(&user, "").await, [&c, &b, &a].map(String::clone));
        turn(&user, &a, "又写了一章").await;
        user.put(&format!("/ai/chat/sessions/{b}"), &json!({"status": "archived"})).await.ok();
        let expected: [(&str, &[&String]); 14] = [
            ("?limit=1", &[&b]),
            ("?limit=1&offset=1", &[&a]),
            ("?limit=2&offset=1", &[&a, &c]),
            ("?offset=3", &[]),
            ("?projectId=p1", &[&b, &a]),
            ("?projectId=p3", &[]),
            ("?tag=%E6%AD%A6%E4%BE%A0", &[&a, &c]),
            ("?tag=%E6%AD%A6", &[]),
            ("?status=archived", &[&b]),
            ("?status=active", &[&a, &c]),
            // A title is searched literally: `%` and `_` are letters.
            ("?q=%25", &[&b]),
            ("?q=_", &[&c]),
            ("?q=%E5%AE%A2%E6%A0%88", &[&a]),
            ("?q=100&projectId=p2", &[&c]),
        ];
        for (query, ids) in expected {
            assert_eq!(listed(&user, query).await, ids.iter().map(|id| (*id).clone()).collect::<Vec<_>>(), "{query}");
        }
        let first = user.get("/ai/chat/sessions?status=active").await.ok()[0].clone();
        assert!(first.get("messages").is_none(), "{first}");
        assert_eq!((&first["messageCount"], &first["metadata"]["messageCount"]), (&json!(2), &json!(2)), "{first}");
        assert!(first["lastMessageAt"].is_string(), "{first}");
        assert_eq!(first["metadata"]["tags"], wuxia);
        assert_eq!(first["metadata"]["tokenCount"], 9, "{first}");
    });
}

#[test]
fn bad_numbers_in_a_list_call_are_refused() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({})).await;
        for query in ["limit=abc", "limit=0", "limit=-1", "limit=1.5", "limit=99999999999999999999", "offset=-1", "offset=x"] {
            user.get(&format!("/ai/chat/sessions?{query}")).await.error(400, 1001);
            user.get(&format!("/ai/chat/sessions/{session}/messages?{query}")).await.error(400, 1001);
            user.get(&format!("/ai/chat/sessions/{session}?{query}")).await.error(400, 1001);
        }
        user.get("/ai/chat/sessions?status=lost").await.error(400, 1001);
    });
}

#[test]
fn the_detail_is_flat_with_the_old_forms_beside() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({"title": "明细"})).await;
        let first = turn(&user, &session, "甲").await;
        let second = turn(&user, &session, "乙").await;
        let path = format!("/ai/chat/sessions/{session}");
        let flat = user.get(&path).await.ok();
        assert_eq!((&flat["id"], &flat["title"]), (&json!(session), &json!("明细")));
        let contents = |messages: &Value| -> Vec<String> {
            messages.as_array().expect("messages").iter().map(|message| text(message, "content").to_owned()).collect()
        };
        let all = [first.as_str(), "好的", &second, "好的"];
        assert_eq!(contents(&flat["messages"]), all);
        assert_eq!((&flat["messagesTotal"], &flat["limit"], &flat["offset"]), (&json!(4), &json!(50), &json!(0)));
        assert_eq!(flat["session"]["id"], session.as_str());
        assert!(flat["session"].get("messages").is_none(), "a copy without messages: {flat}");
        assert_eq!((&flat["metadata"]["messageCount"], &flat["metadata"]["tokenCount"]), (&json!(4), &json!(18)));

        let page = user.get(&format!("{path}?limit=2&offset=1")).await.ok();
        assert_eq!(contents(&page["messages"]), all[1..3]);
        let nested = user.get(&format!("{path}?view=history")).await.ok();
        assert_eq!(nested["session"]["id"], session.as_str());
        assert_eq!(contents(&nested["messages"]["messages"]), all);
        assert_eq!(nested["messages"]["total"], 4);
        let list = user.get(&format!("{path}/messages?limit=1&offset=3")).await.ok();
        assert_eq!(contents(&list["messages"]), all[3..]);
        assert_eq!((&list["total"], &list["limit"], &list["offset"]), (&json!(4), &json!(1), &json!(3)));
    });
}

#[test]
fn clearing_the_history_empties_list_and_prompt() {
    run(async {
        let user = Worker::anyone().await;
        let session = user.new_session(json!({"title": "留下"})).await;
        turn(&user, &session, "旧话").await;
        user.delete(&format!("/ai/chat/sessions/{session}/messages")).await.ok();
        assert!(user.messages(&session).await.is_empty());
        let read = user.get(&format!("/ai/chat/sessions/{session}")).await.ok();
        assert_eq!((&read["title"], &read["metadata"]["messageCount"]), (&json!("留下"), &json!(0)));
        let script = provider().script(Reply::happy(&["新"], (3, 1)));
        user.ask(json!({"message": script.message("新话"), "sessionId": session})).await;
        let prompt = script.call().await.prompt();
        assert!(prompt.iter().all(|(_, content)| !content.contains("旧话")), "{prompt:?}");
        assert_eq!(user.messages(&session).await.len(), 2);
        assert_eq!(user.charged().await, 13, "what was used stays used");
    });
}
