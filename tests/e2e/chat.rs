//! The main job: a message goes in, the answer streams back, is remembered and is charged. What the wire must look like
//! is the contract's 2.2, 2.3 ("P, default wire") and 3.5.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::api::{text, usage_of};
use crate::support::client::User;
use crate::support::provider::End;
use crate::support::reply::{Reply, Step};
use crate::support::sse::{Ending, Event, raw_of, terminal, text_of};
use crate::support::worker::{PROVIDER_KEY, Worker};
use crate::support::{PATIENCE, provider, run};

/// The keys of an event's data.
fn keys(event: &Event) -> BTreeSet<String> {
    event.json().as_object().expect("an object").keys().cloned().collect()
}

fn set<const N: usize>(keys: [&str; N]) -> BTreeSet<String> {
    keys.map(str::to_owned).into()
}

#[test]
fn a_happy_stream_is_meta_then_deltas_then_done() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["床前", "明月光，\n", "\"疑是\"🖋"], (31, 9)));
        let mut stream = user.stream(json!({"message": script.message("写一首诗")})).await;
        assert!(stream.header("cache-control").is_some_and(|value| value.contains("no-cache")));
        assert!(stream.header("x-request-id").is_some());
        let events = stream.rest().await;
        assert_eq!(stream.ending, Some(Ending::Clean));

        let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
        assert_eq!(names, ["meta", "message", "message", "message", "done"]);
        assert_eq!(text_of(&events), "床前明月光，\n\"疑是\"🖋");
        let ids: Vec<_> = events.iter().map(|event| event.id.expect("an id on every event")).collect();
        assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "consecutive ids: {ids:?}");

        let meta = events[0].json();
        assert_eq!(keys(&events[0]), set(["sessionId", "messageId", "requestId", "model"]));
        let mut tokens = 0;
        for event in &events[1..4] {
            assert_eq!(keys(event), set(["sessionId", "messageId", "seq", "delta", "tokens"]), "exactly one text key");
            let data = event.json();
            assert_eq!(data["seq"].as_u64(), event.id);
            assert_eq!((&data["sessionId"], &data["messageId"]), (&meta["sessionId"], &meta["messageId"]));
            let so_far = data["tokens"].as_u64().expect("tokens");
            assert!(so_far >= tokens, "tokens are cumulative");
            tokens = so_far;
        }
        let done = events[4].json();
        for key in ["sessionId", "messageId", "requestId", "model"] {
            assert_eq!(done[key], meta[key], "{key}");
        }
        assert_eq!(done["model"], "test-model");
        assert_eq!(done["finishReason"], "stop");
        assert_eq!(usage_of(&done), [31, 9, 40]);
        assert_eq!(done["tokensUsed"], 40);
        for event in [&events[0], &events[4]] {
            assert!(keys(event).is_disjoint(&set(["content", "delta", "text"])), "no text key in {}", event.raw);
        }
        for event in &events {
            assert!(!event.data.contains('\n'), "one complete JSON object per line: {}", event.raw);
        }
        assert_eq!(user.charged().await, 40, "settled by the time of `done`");
    });
}

#[test]
fn the_provider_gets_a_streaming_request_with_our_key() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["好"], (5, 1)));
        let options = json!({"temperature": 0.3, "topP": 0.9, "maxTokens": 77});
        user.ask(json!({"message": script.message("你好"), "options": options})).await;
        let call = script.call().await;
        assert_eq!(call.headers["authorization"], format!("Bearer {PROVIDER_KEY}"));
        assert_eq!(call.body["stream"], true);
        assert_eq!(call.body["stream_options"]["include_usage"], true);
        assert_eq!(call.body["model"], "test-model");
        assert_eq!((&call.body["temperature"], &call.body["top_p"]), (&json!(0.3), &json!(0.9)));
        assert_eq!(call.body["max_tokens"], 77);
        assert_eq!(call.prompt().last(), Some(&("user".into(), script.message("你好"))));
    });
}

#[test]
fn cumulative_mode_sends_the_old_payloads() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["一", "二", "三"], (5, 3)));
        let request = user.request(reqwest::Method::POST, "/ai/chat/stream?stream_mode=cumulative");
        let events = request.json(&json!({"message": script.message("数")})).stream().await.rest().await;
        let messages: Vec<_> = events.iter().filter(|event| event.name == "message").collect();
        let contents: Vec<_> = messages.iter().map(|event| text(&event.json(), "content").to_owned()).collect();
        assert_eq!(contents, ["一", "一二", "一二三"]);
        for event in messages {
            assert_eq!(keys(event), set(["sessionId", "messageId", "delta", "content", "tokens"]));
        }
        let done = terminal(&events, "done");
        assert_eq!(keys(done), set(["sessionId", "messageId", "content", "tokensUsed", "model"]));
        assert_eq!(done.json()["content"], "一二三");
    });
}

#[test]
fn text_mode_sends_the_chunks_themselves() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["第一行\n第二", "行 ", " 🖋"], (5, 3)));
        let request = user.request(reqwest::Method::POST, "/ai/chat/stream?stream_mode=text");
        let events = request.json(&json!({"message": script.message("写")})).stream().await.rest().await;
        let messages = events.iter().filter(|event| event.name == "message");
        let chunks: Vec<_> = messages.map(|event| event.data.as_str()).collect();
        assert_eq!(chunks, ["第一行\n第二", "行 ", " 🖋"], "{}", raw_of(&events));
        terminal(&events, "done");
    });
}

#[test]
fn an_unknown_stream_mode_is_refused() {
    run(async {
        let user = Worker::anyone().await;
        let request = user.request(reqwest::Method::POST, "/ai/chat/stream?stream_mode=binary");
        request.json(&json!({"message": "x"})).send().await.error(400, 1001);
        assert_eq!(user.charged().await, 0);
    });
}

#[test]
fn the_json_answer_carries_the_keys_of_both_clients() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["春", "风"], (12, 2)));
        let data = user.ask(json!({"content": script.message("用别名"), "projectId": "p1"})).await;
        assert_eq!(data["reply"], "春风", "the web client reads a string");
        let message = &data["message"];
        assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &json!("春风")));
        assert!(message["id"].is_string() && message["timestamp"].is_string(), "{message}");
        assert_eq!(usage_of(&data), [12, 2, 14]);
        assert_eq!((&data["tokensUsed"], &data["model"]), (&json!(14), &json!("test-model")));
        assert!(data["contextUsed"].is_boolean(), "{data}");
        assert!(data["responseTime"].as_u64().is_some_and(|ns| ns > 100_000), "nanoseconds: {data}");
        let session = user.get(&format!("/ai/chat/sessions/{}", text(&data, "sessionId"))).await.ok();
        assert_eq!(session["projectId"], "p1");
        assert_eq!(user.charged().await, 14);
    });
}

#[test]
fn the_json_answer_comes_before_the_clients_timeout() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::stall(&["来得及", "的部分"]));
        let session = user.new_session(json!({})).await;
        let started = tokio::time::Instant::now();
        let data = user.ask(json!({"message": script.message("慢"), "sessionId": session})).await;
        let took = started.elapsed();
        // At 12 s by the contract; the web client gives up at 15.
        assert!((Duration::from_secs(11)..Duration::from_secs(15)).contains(&took), "{took:?}");
        assert_eq!(data["reply"], "来得及的部分");
        assert_eq!(data["finishReason"], "time");
        assert_eq!(script.call().await.ended(Duration::from_secs(5)).await, End::ClientGone);
        assert_eq!(user.finished_message(&session).await["content"], "来得及的部分");
        assert!(user.charged().await > 0, "what was delivered is charged");
    });
}

#[test]
fn a_turn_is_remembered_and_the_next_prompt_holds_it() {
    run(async {
        let user = Worker::anyone().await;
        let (first, second) =
            (provider().script(Reply::happy(&["甲"], (5, 1))), provider().script(Reply::happy(&["乙"], (9, 1))));
        let mut stream = user.stream(json!({"message": first.message("一")})).await;
        let session = text(&stream.take(1).await[0].json(), "sessionId").to_owned();
        stream.rest().await;
        let data = user.ask(json!({"message": second.message("二"), "sessionId": session})).await;
        assert_eq!(data["sessionId"], session);
        let turns: Vec<_> = second.call().await.prompt().into_iter().filter(|(role, _)| role != "system").collect();
        let expected = [("user", first.message("一")), ("assistant", "甲".into()), ("user", second.message("二"))];
        assert_eq!(turns, expected.map(|(role, content)| (role.to_owned(), content)));

        let messages = user.messages(&session).await;
        assert_eq!(messages.len(), 4);
        let mut parent = Value::Null;
        for (message, role) in messages.iter().zip(["user", "assistant"].repeat(2)) {
            assert_eq!((&message["role"], &message["status"]), (&json!(role), &json!("complete")), "{message}");
            assert_eq!(message["parentId"], parent, "each message hangs on the one before: {message}");
            assert!(message["createdAt"].is_string() && message["timestamp"].is_string(), "{message}");
            parent = message["id"].clone();
        }
        assert_eq!((&messages[3]["content"], &messages[3]["model"]), (&json!("乙"), &json!("test-model")));
        assert_eq!(messages[3]["finishReason"], "stop");
    });
}

#[test]
fn client_held_history_is_used_without_a_session() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["记得"], (20, 1)));
        let history = json!([
            {"id": "1", "role": "user", "content": "我叫墨", "timestamp": 1_790_000_000_000_u64},
            {"role": "assistant", "content": "你好，墨"},
        ]);
        user.ask(json!({"message": script.message("我叫什么"), "history": history})).await;
        let turns: Vec<_> = script.call().await.prompt().into_iter().filter(|(role, _)| role != "system").collect();
        let expected = [("user", "我叫墨".into()), ("assistant", "你好，墨".into()), ("user", script.message("我叫什么"))];
        assert_eq!(turns, expected.map(|(role, content): (_, String)| (role.to_owned(), content)));
    });
}

#[test]
fn the_model_can_change_between_turns() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["答"], (5, 1)));
        let session = user.new_session(json!({})).await;
        for (model, upstream) in [("other-model", "other-upstream"), ("test-model", "test-model")] {
            let body = json!({"message": script.message("问"), "sessionId": session, "options": {"model": model}});
            assert_eq!(user.ask(body).await["model"], model);
            assert_eq!(script.calls().last().expect("a call").body["model"], upstream);
        }
        let models: Vec<_> = user.messages(&session).await.iter().map(|message| message["model"].clone()).collect();
        assert_eq!((&models[1], &models[3]), (&json!("other-model"), &json!("test-model")));
    });
}

#[test]
fn two_hundred_turns_keep_a_bounded_prompt_and_the_newest_history() {
    run(async {
        const TURNS: usize = 200;
        let user = Worker::shared().await.user("admin");
        // The model's window is 1,024 tokens, which some 30 of these turns fill.
        let answer = "砚台里的墨还没有干，窗外的雨已经停了。";
        let script = provider().script(Reply::happy(&[answer], (50, 20)));
        let system = "你是一位小说编辑。";
        let settings = json!({"model": "small-model", "maxTokens": 128, "systemPrompt": system});
        let session = user.new_session(json!({"settings": settings})).await;
        for turn in 0..TURNS {
            let data = user.ask(json!({"message": script.message(&format!("第{turn}回")), "sessionId": session})).await;
            assert_eq!(data["reply"], answer, "turn {turn}");
        }
        let sizes: Vec<_> = script.calls().iter().map(|call| call.prompt().len()).collect();
        let widest = *sizes.iter().max().expect("prompts");
        assert!(widest < TURNS / 2, "the window bounds the prompt, in messages per turn: {sizes:?}");
        assert!(sizes[TURNS - 1] + 4 >= widest, "and is used in full, in messages per turn: {sizes:?}");
        let last = script.calls()[TURNS - 1].prompt();
        assert_eq!(last[0], ("system".into(), system.into()));
        assert_eq!(last[last.len() - 1].1, script.message(&format!("第{}回", TURNS - 1)));
        assert_eq!(last[last.len() - 3].1, script.message(&format!("第{}回", TURNS - 2)), "the newest history");
        let page = user.get(&format!("/ai/chat/sessions/{session}/messages?limit=2&offset=398")).await.ok();
        assert_eq!(page["total"], 2 * TURNS);
        assert_eq!(page["messages"][0]["content"], script.message(&format!("第{}回", TURNS - 1)));
    });
}

#[test]
fn a_message_too_long_for_the_context_is_refused_before_anything_happens() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["不该有"], (1, 1)));
        let body = json!({"message": script.message(&"长".repeat(20_000)), "options": {"model": "small-model"}});
        user.post("/ai/chat", &body).await.error(400, 3522);
        user.streaming(&body).send().await.error(400, 3522);
        assert!(script.calls().is_empty());
        nothing_left(&user).await;
    });
}

#[test]
fn an_unknown_model_is_404() {
    run(async {
        let user = Worker::anyone().await;
        let body = json!({"message": "你好", "options": {"model": "gpt-9000"}});
        user.post("/ai/chat", &body).await.error(404, 3530);
        user.streaming(&body).send().await.error(404, 3530);
        nothing_left(&user).await;
    });
}

#[test]
fn a_bad_body_is_refused_with_the_fields_name() {
    run(async {
        let user = Worker::anyone().await;
        let bad = [
            (json!({}), "message"),
            (json!({"message": ""}), "message"),
            (json!({"message": 7}), "message"),
            (json!({"message": "x", "sessionId": 5}), "sessionId"),
            (json!({"message": "x", "options": {"temperature": 2.5}}), "temperature"),
            (json!({"message": "x", "options": {"temperature": -0.1}}), "temperature"),
            (json!({"message": "x", "options": {"topP": 1.5}}), "topP"),
            (json!({"message": "x", "options": {"maxTokens": "many"}}), "maxTokens"),
            (json!({"message": "x", "options": {"maxTokens": -5}}), "maxTokens"),
            (json!({"message": "x", "history": [{"role": "robot", "content": "x"}]}), "history"),
        ];
        for (body, field) in bad {
            for path in ["/ai/chat", "/ai/chat/stream"] {
                let answer = user.post(path, &body).await.error(400, 1001);
                assert!(answer.text.contains(field), "{path} {body}: {field} is not named in {}", answer.text);
            }
        }
        for body in ["", "{", "null", "[]", "\"x\"", "{\"message\":\"x\"} trailing"] {
            let request = user.request(reqwest::Method::POST, "/ai/chat").body(body);
            request.send().await.error(400, 1001);
        }
        nothing_left(&user).await;
    });
}

#[test]
fn unknown_fields_are_ignored() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["好"], (3, 1)));
        let body =
            json!({"message": script.message("x"), "type": "continue", "prompt": "p", "useContext": true, "targetLength": 5});
        assert_eq!(user.ask(body).await["reply"], "好");
    });
}

#[test]
fn deltas_arrive_as_they_are_made() {
    run(async {
        let user = Worker::anyone().await;
        let script = provider().script(Reply::happy(&["先", "后"], (3, 2)).step_after_delta(1, Step::Gate));
        let mut stream = user.stream(json!({"message": script.message("x")})).await;
        let seen = stream.take(2).await;
        assert_eq!(text_of(&seen), "先", "the first delta is here while the provider still holds the second back");
        script.release(1);
        assert_eq!(text_of(&stream.rest().await), "后");
        assert_eq!(script.call().await.ended(PATIENCE).await, End::Finished);
    });
}

/// A refused request leaves no session and no charge.
pub async fn nothing_left(user: &User) {
    assert_eq!(user.get("/ai/chat/sessions").await.ok(), json!([]), "no session");
    assert_eq!(user.charged().await, 0, "no charge");
}
