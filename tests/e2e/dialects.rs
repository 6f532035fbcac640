//! Providers speak many dialects of the same stream. Each of these is legal or common, and must come out as a complete
//! answer with the right text and the right charge.

use serde_json::{Value, json};

use crate::support::api::{text, usage_of};
use crate::support::client::User;
use crate::support::reply::{DONE, Reply, Step, chunk, delta, finish, usage_event, usage_json};
use crate::support::sse::{Event, terminal, text_of};
use crate::support::worker::Worker;
use crate::support::{provider, run};

const WORDS: [&str; 4] = ["青", "山", "🏔️依旧\n", "在。"];
const USAGE: (u64, u64) = (21, 8);

/// Streams one answer to a new user and checks that it is complete, saved and says the same everywhere.
async fn complete(name: &str, reply: Reply) -> (User, Vec<Event>) {
    let user = Worker::anyone().await;
    let script = provider().script(reply);
    let body = json!({"message": script.message(name), "options": {"model": "other-model"}});
    let events = user.stream(body).await.rest().await;
    let done = terminal(&events, "done").json();
    let message = user.messages(text(&done, "sessionId")).await.pop().expect("a message");
    assert_eq!((&message["status"], text(&message, "content")), (&json!("complete"), text_of(&events).as_str()), "{name}");
    (user, events)
}

/// As [`complete`], for answers that carry [`WORDS`] and [`USAGE`].
async fn as_usual(name: &str, reply: Reply) {
    let (user, events) = complete(name, reply).await;
    assert_eq!(text_of(&events), WORDS.concat(), "{name}");
    let count = events.iter().filter(|event| event.name == "message").count();
    assert_eq!(count, WORDS.len(), "{name}: one event per delta with text, however the bytes came");
    assert_eq!(usage_of(&terminal(&events, "done").json()), [21, 8, 29], "{name}");
    assert_eq!(user.charged().await, 29, "{name}");
}

fn usual() -> Reply {
    Reply::happy(&WORDS, USAGE)
}

#[test]
fn line_ends_and_spacing() {
    run(async {
        as_usual("CRLF", usual().map(|text| text.replace('\n', "\r\n"))).await;
        as_usual("CR", usual().map(|text| text.replace('\n', "\r"))).await;
        as_usual("CRLF, a byte a write", usual().map(|text| text.replace('\n', "\r\n")).single_bytes()).await;
        as_usual("no space", usual().map(|text| text.replace("data: ", "data:"))).await;
        as_usual("comments and other fields", usual().map(|text| format!(": keep-alive\n\nevent: x\nid: 7\nretry: 10\n{text}")))
            .await;
        as_usual("data over several lines", usual().map(|text| text.replace(",\"created\"", ",\ndata: \"created\""))).await;
    });
}

#[test]
fn transport() {
    run(async {
        as_usual("BOM", usual().first_bytes("\u{feff}")).await;
        as_usual("BOM, a byte a write", usual().first_bytes("\u{feff}").single_bytes()).await;
        as_usual("gzip", usual().gzip()).await;
        as_usual("one write", usual().one_write()).await;
        as_usual("ends by closing", usual().until_close()).await;
        as_usual("stays open after [DONE]", usual().then(Step::Hang)).await;
    });
}

#[test]
fn shapes_of_chunks() {
    run(async {
        let words = || WORDS.iter().map(|word| delta(json!({"role": "assistant", "content": word})));
        let with = |extra: Vec<String>| -> Vec<String> { words().chain(extra).collect() };
        let usage = usage_event(&usage_json(USAGE));
        let end = || vec![finish("stop"), usage.clone(), DONE.into()];

        as_usual("role in every delta, none of its own", Reply::events(&with(end()))).await;
        let nulls = vec![chunk(Value::Null), delta(json!({"content": null})), chunk(json!([{"index": 0, "delta": null}]))];
        as_usual("choices, delta and content null", Reply::events(&[nulls, with(end())].concat())).await;
        let without = usual().map(|text| text.replacen('{', "{\"usage\":null,", usize::from(!text.contains("prompt_tokens"))));
        as_usual("usage null until the last", without).await;
        let together = finish("stop").replacen('{', &format!("{{\"usage\":{},", usage_json(USAGE)), 1);
        as_usual("usage beside the finish reason", Reply::events(&with(vec![together, DONE.into()]))).await;
        let unknown = vec![json!({"id": "x", "object": "ping"}).to_string()];
        as_usual("an unknown object first", Reply::events(&[unknown, with(end())].concat())).await;
        as_usual("no [DONE]", Reply::no_done(&WORDS, USAGE)).await;
    });
}

#[test]
fn reasoning_is_counted_but_not_shown() {
    run(async {
        let thoughts = ["让我", "想想"].map(|thought| delta(json!({"reasoning_content": thought})));
        let mixed = delta(json!({"reasoning_content": "嗯", "content": WORDS[0]}));
        let words = WORDS[1..].iter().map(|word| delta(json!({"content": word})));
        let end = [finish("stop"), usage_event(&usage_json(USAGE)), DONE.into()];
        let events: Vec<_> = thoughts.into_iter().chain([mixed]).chain(words).chain(end).collect();
        as_usual("reasoning", Reply::events(&events)).await;

        // Without usage the estimate has to count what was thought, too.
        let long = delta(json!({"reasoning_content": "思".repeat(400)}));
        let (user, _) = complete("short", Reply::no_usage(&["答"])).await;
        let shown_only = user.charged().await;
        let events = [long, delta(json!({"content": "答"})), finish("stop"), DONE.into()];
        let (user, _) = complete("short", Reply::events(&events)).await;
        assert!(user.charged().await > shown_only + 100, "{} against {shown_only}", user.charged().await);
    });
}

#[test]
fn a_finish_without_text_is_an_empty_answer() {
    run(async {
        let (user, events) = complete("silence", Reply::happy(&[], (12, 0))).await;
        assert_eq!(text_of(&events), "");
        assert_eq!(terminal(&events, "done").json()["finishReason"], "stop");
        assert_eq!(user.charged().await, 0, "nothing delivered, nothing charged");
    });
}

#[test]
fn other_finish_reasons_are_passed_on() {
    run(async {
        for reason in ["length", "content_filter"] {
            let events = [delta(json!({"content": "半"})), finish(reason), usage_event(&usage_json((5, 1))), DONE.into()];
            let (_, events) = complete(reason, Reply::events(&events)).await;
            assert_eq!(terminal(&events, "done").json()["finishReason"], reason);
        }
    });
}

#[test]
fn ten_kilobytes_in_single_bytes_come_out_whole() {
    run(async {
        let line = "夜色像墨一样化开🖋️，她数着🕯️、👩‍🚀与 é 的重音；𠮷野家的灯还亮着。";
        let full = line.repeat(10 * 1024 / line.len() + 1);
        let letters: Vec<_> = full.chars().collect();
        // Deltas cut between any two letters, also inside an emoji's sequence.
        let deltas: Vec<String> = letters.chunks(97).map(|part| part.iter().collect()).collect();
        let deltas: Vec<_> = deltas.iter().map(String::as_str).collect();
        let (user, events) = complete("10 KB", Reply::happy(&deltas, (9, 900)).single_bytes()).await;
        let got = text_of(&events);
        assert!(!got.contains('\u{fffd}'), "a letter was cut");
        assert_eq!(got, full);
        assert_eq!(user.charged().await, 909);
    });
}

#[test]
fn missing_usage_is_estimated() {
    run(async {
        let answer = "春江潮水连海平。".repeat(25);
        let (user, events) = complete("estimate", Reply::no_usage(&[&answer])).await;
        let done = terminal(&events, "done").json();
        let charged = user.charged().await;
        assert_eq!(usage_of(&done)[2], charged);
        assert_eq!(done["estimated"], true, "and flagged as an estimate");
        // 200 Chinese characters are 100 to 400 tokens for any tokenizer in use; the question adds a few dozen.
        assert!((100..600).contains(&charged), "{charged}");
    });
}
