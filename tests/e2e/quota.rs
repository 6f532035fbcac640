//! Never overspent, charged exactly once: what the ledger promises, seen from outside. Amounts are tokens; every
//! generation is charged to the daily, the monthly and the total quota at once.

use chrono::{DateTime, Datelike, Timelike};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};

use crate::support::api::{QUOTA_TYPES, text};
use crate::support::client::User;
use crate::support::provider::End;
use crate::support::reply::{Reply, Step, delta};
use crate::support::sse::{Event, terminal};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run, token, wait_until};

/// Streams a message that meets this reply with at most `max_tokens` of output from a model that allows 4,096.
async fn spend(user: &User, max_tokens: u64, reply: Reply) -> Vec<Event> {
    let script = provider().script(reply);
    let options = json!({"model": "other-model", "maxTokens": max_tokens});
    let events = user.stream(json!({"message": script.message("花"), "options": options})).await.rest().await;
    terminal(&events, "done");
    events
}

#[test]
fn limits_come_from_the_role_whichever_route_is_first() {
    run(async {
        let worker = Worker::shared().await;
        let script = provider().script(Reply::happy(&["好"], (3, 1)));
        let body = json!({"message": script.message("x")});
        let roles = [
            ("reader", [10_000, 200_000, 5_000_000]),
            ("author", [50_000, 1_000_000, 20_000_000]),
            ("writer", [50_000, 1_000_000, 20_000_000]),
            ("vip", [100_000, 2_000_000, 50_000_000]),
        ];
        for (role, totals) in roles {
            for first in
                ["/ai/quota", "/ai/quota?type=total", "/ai/quota/all", "/ai/chat", "/ai/chat/stream", "/ai/chat/sessions"]
            {
                let user = worker.user(role);
                let answer = match first {
                    "/ai/chat" | "/ai/chat/stream" => user.post(first, &body).await,
                    _ => user.get(first).await,
                };
                assert_eq!(answer.status, 200, "{first}: {}", answer.text);
                let got: Vec<_> = user.quotas().await.iter().map(|quota| quota.total).collect();
                assert_eq!(got, totals, "{role} by {first}");
            }
        }
    });
}

#[test]
fn a_quota_carries_the_keys_of_both_sides() {
    run(async {
        let user = Worker::shared().await.user("reader");
        let default = user.get("/ai/quota").await.ok();
        assert_eq!((&default["quotaType"], &default["userId"]), (&json!("daily"), &json!(user.id)));
        let all = user.get("/ai/quota/all").await.ok();
        let now = DateTime::from_timestamp(token::now_s(), 0).expect("now");
        for (quota, kind) in all.as_array().expect("an array").iter().zip(QUOTA_TYPES) {
            assert_eq!((&quota["quotaType"], &quota["status"]), (&json!(kind), &json!("active")));
            assert_eq!((&quota["isActive"], &quota["id"]), (&json!(true), &quota["quotaId"]));
            for key in ["createdAt", "updatedAt"] {
                DateTime::parse_from_rfc3339(text(quota, key)).expect(key);
            }
            if kind != "total" {
                assert_eq!(quota["resetAt"], quota["resetDate"]);
                // Periods end at local midnight, +08:00 in the configuration.
                let reset = DateTime::parse_from_rfc3339(text(quota, "resetAt")).expect("resetAt");
                let zone = chrono::FixedOffset::east_opt(8 * 3600).expect("a zone");
                let local = reset.with_timezone(&zone);
                assert_eq!((local.hour(), local.minute(), local.second()), (0, 0, 0), "{quota}");
                let days = if kind == "daily" { 1 } else { 31 };
                assert!(reset > now && reset <= now + chrono::TimeDelta::days(days), "{quota}");
                assert!(kind == "daily" || local.day() == 1, "{quota}");
            }
        }
        let map = user.get("/ai/quota/all?view=map").await.ok();
        for kind in QUOTA_TYPES {
            assert_eq!(map[kind]["quotaType"], kind);
        }
        user.get("/ai/quota?type=weekly").await.error(400, 1001);
    });
}

#[test]
fn an_administrator_is_unlimited_and_still_counted() {
    run(async {
        let user = Worker::shared().await.user("admin");
        let script = provider().script(Reply::happy(&["好"], (30, 12)));
        user.ask(json!({"message": script.message("x")})).await;
        for quota in user.get("/ai/quota/all").await.ok().as_array().expect("an array") {
            assert_eq!((&quota["unlimited"], &quota["totalQuota"]), (&json!(true), &json!(0)), "{quota}");
            assert_eq!((&quota["remainingQuota"], &quota["reservedQuota"]), (&json!(0), &json!(0)), "{quota}");
            assert_eq!((&quota["usedQuota"], &quota["status"]), (&json!(42), &json!("active")), "{quota}");
        }
    });
}

#[test]
fn a_role_upgrade_raises_the_limits_and_keeps_what_was_used() {
    run(async {
        let user = Worker::shared().await.user("reader");
        spend(&user, 100, Reply::happy(&["好"], (10, 20))).await;
        let vip = user.with_token(Some(token::access(&user.id, "vip")));
        let quota = vip.quota("daily").await;
        assert_eq!((quota.total, quota.used), (100_000, 30));
    });
}

#[test]
fn what_is_held_is_shown_while_it_runs_and_only_use_is_charged() {
    run(async {
        let user = Worker::shared().await.user("reader");
        let script = provider().script(Reply::happy(&["一", "二"], (25, 17)).step_after_delta(1, Step::Gate));
        let mut stream = user.stream(json!({"message": script.message("x"), "options": {"maxTokens": 500}})).await;
        stream.take(2).await;
        for quota in user.quotas().await {
            assert!((500..1000).contains(&quota.reserved), "the prompt's estimate and 500: {quota:?}");
            assert_eq!(quota.used, 0);
        }
        script.release(1);
        stream.rest().await;
        assert_eq!(user.charged().await, 42);
    });
}

#[test]
fn fifty_at_once_against_a_balance_for_ten() {
    run(async {
        const REQUESTS: usize = 50;
        let user = Worker::shared().await.user("reader");
        // A reader's day is 10,000 tokens; each of these holds about 950.
        let script = provider().script(Reply::happy(&["好"], (10, 100)).first(Step::Gate));
        let body = json!({"message": script.message("抢"), "options": {"maxTokens": 900}});
        let mut sends: FuturesUnordered<_> = (0..REQUESTS).map(|_| tokio::spawn(user.streaming(&body).open())).collect();
        let (mut refused, mut streams) = (0, Vec::new());
        loop {
            let quota = user.quota("daily").await;
            assert!(quota.used + quota.reserved <= 10_000, "{quota:?}");
            while let Ok(Some(sent)) = tokio::time::timeout(std::time::Duration::from_millis(50), sends.next()).await {
                match sent.expect("no panic") {
                    Ok(_) => panic!("nothing streams before the gate opens"),
                    Err(answer) => answer.error(429, 3010),
                };
                refused += 1;
            }
            if refused + script.calls().len() == REQUESTS {
                break;
            }
        }
        let admitted = script.calls().len();
        assert!((9..=12).contains(&admitted), "{admitted} fit");
        let held = user.quota("daily").await;
        assert!(held.remaining < 1000, "the rest was refused because it did not fit: {held:?}");

        script.release(admitted);
        while let Some(sent) = sends.next().await {
            streams.push(sent.expect("no panic").unwrap_or_else(|answer| panic!("admitted, then {}", answer.text)));
        }
        for mut stream in streams {
            terminal(&stream.rest().await, "done");
        }
        assert_eq!(user.charged().await, 110 * i64::try_from(admitted).expect("a small number"), "the sum of all charges");
        assert_eq!(user.get("/ai/chat/sessions?limit=100").await.ok().as_array().map(Vec::len), Some(admitted));
    });
}

#[test]
fn a_short_balance_clamps_the_output_and_then_refuses() {
    run(async {
        let user = Worker::shared().await.user("reader");
        for _ in 0..2 {
            spend(&user, 4096, Reply::happy(&["花"], (10, 4000))).await;
        }
        let left = user.quota("daily").await.remaining;
        assert_eq!(left, 10_000 - 2 * 4010);

        // More is asked for than is left: the provider may not produce more than the hold covers.
        let greedy = provider().script(Reply::happy(&["花"], (10, 4000)).step_after_delta(1, Step::Gate));
        let options = json!({"model": "other-model", "maxTokens": 4096});
        let body = json!({"message": greedy.message("花"), "options": options});
        let mut stream = user.stream(body.clone()).await;
        let allowed = greedy.call().await.body["max_tokens"].as_i64().expect("max_tokens");
        let held = user.quota("daily").await;
        assert!((64..left).contains(&allowed), "{allowed} of {left}");
        assert!(held.reserved <= left && allowed < held.reserved, "the prompt is held, too: {allowed} in {held:?}");
        greedy.release(1);
        stream.rest().await;
        let used = user.charged().await;
        assert!(used > 8020 && used <= 10_000, "a claim over the hold is charged up to it: {used}");
        let left = user.quota("daily").await.remaining;
        assert!(left < 64, "{left}");

        // Fewer than 64 output tokens would fit now.
        user.post("/ai/chat", &body).await.error(429, 3010);
        user.streaming(&body).send().await.error(429, 3010);
        assert_eq!(greedy.calls().len(), 1, "refused before the provider is called");
        assert_eq!(user.charged().await, used);
        // Reading is never gated.
        user.get("/ai/chat/sessions").await.ok();
    });
}

#[test]
fn a_small_request_is_not_refused_for_being_small() {
    run(async {
        let user = Worker::shared().await.user("reader");
        let script = provider().script(Reply::happy(&["短"], (10, 3)));
        user.ask(json!({"message": script.message("x"), "options": {"maxTokens": 5}})).await;
        assert_eq!(script.call().await.body["max_tokens"], 5);
        assert_eq!(user.charged().await, 13);
    });
}

#[test]
fn thresholds_are_announced_once_each_on_the_stream() {
    run(async {
        let user = Worker::shared().await.user("reader");
        let announced = |events: &[Event]| -> Vec<(String, String)> {
            let quota = events.iter().filter(|event| event.name == "quota");
            let data: Vec<Value> = quota.map(Event::json).collect();
            for one in &data {
                assert!(one["totalQuota"].is_i64() && one["remainingQuota"].is_i64(), "{one}");
                assert!(["content", "delta", "text"].iter().all(|key| one.get(key).is_none()), "{one}");
            }
            data.iter().map(|one| (text(one, "quotaType").to_owned(), text(one, "level").to_owned())).collect()
        };
        let level = |level: &str| vec![("daily".to_owned(), level.to_owned())];
        assert_eq!(announced(&spend(&user, 4096, Reply::happy(&["花"], (10, 4000))).await), []);
        assert_eq!(announced(&spend(&user, 4096, Reply::happy(&["花"], (10, 4000))).await), level("warning"));
        assert_eq!(announced(&spend(&user, 600, Reply::happy(&["花"], (10, 490))).await), [], "once");
        assert_eq!(announced(&spend(&user, 600, Reply::happy(&["花"], (10, 590))).await), level("critical"));
    });
}

#[test]
fn hostile_usage_moves_a_charge_between_nothing_and_the_hold() {
    run(async {
        let usages = [
            r#"{"prompt_tokens":-1,"completion_tokens":-1,"total_tokens":-2}"#,
            r#"{"prompt_tokens":10,"completion_tokens":-9223372036854775808,"total_tokens":10}"#,
            r#"{"prompt_tokens":9223372036854775808,"completion_tokens":1,"total_tokens":9223372036854775809}"#,
            r#"{"prompt_tokens":18446744073709551615,"completion_tokens":18446744073709551615,"total_tokens":0}"#,
            r#"{"prompt_tokens":10,"completion_tokens":1e309,"total_tokens":1e309}"#,
            r#"{"prompt_tokens":10.5,"completion_tokens":1.5,"total_tokens":12}"#,
            r#"{"prompt_tokens":"12","completion_tokens":"3","total_tokens":"15"}"#,
            r#"{"prompt_tokens":[1],"completion_tokens":{},"total_tokens":null}"#,
            // Believable, but more than the provider was allowed to produce.
            r#"{"prompt_tokens":10,"completion_tokens":7000,"total_tokens":7010}"#,
            r#"{"completion_tokens":5}"#,
            "{}",
            "null",
            "\"many\"",
        ];
        for usage in usages {
            let user = Worker::shared().await.user("reader");
            let script = provider().script(Reply::happy_with(&["给", "了", "三个词"], usage).step_after_delta(1, Step::Gate));
            let mut stream = user.stream(json!({"message": script.message("x"), "options": {"maxTokens": 200}})).await;
            stream.take(2).await;
            let held = user.quota("daily").await.reserved;
            script.release(1);
            let events = stream.rest().await;
            let done = events.last().expect("an end");
            assert_eq!(done.name, "done", "{usage}: text and finish came whole");
            let charged = user.charged().await;
            assert!((1..=held).contains(&charged), "{usage}: {charged} of {held}");
        }
    });
}

#[test]
fn a_provider_that_never_ends_is_cut_and_cannot_cost_more_than_the_hold() {
    run(async {
        let user = Worker::anyone().await;
        let flood = format!("data: {}\n\n", delta(json!({"content": "墨".repeat(10_000)}))).into_bytes();
        let every = std::time::Duration::from_millis(5);
        let reply = Reply::happy(&["一"], (1, 1)).step_after_delta(1, Step::Repeat { bytes: flood, every });
        let script = provider().script(reply.step_after_delta(1, Step::Gate));
        let mut stream = user.stream(json!({"message": script.message("x"), "options": {"maxTokens": 300}})).await;
        stream.take(2).await;
        let held = user.quota("daily").await.reserved;
        script.release(1);
        let events = stream.rest().await;
        assert!(["done", "error"].contains(&events.last().expect("an end").name.as_str()));
        assert_eq!(script.call().await.ended(PATIENCE).await, End::ClientGone);
        let charged = user.charged().await;
        assert!((1..=held).contains(&charged), "{charged} of {held}");
    });
}

#[test]
fn the_books_in_d1_add_up_to_what_the_ledger_says() {
    run(async {
        let worker = Worker::shared().await;
        let user = worker.user("writer");
        // 1,000 in at 30 and 500 out at 60 per 1,000 tokens are 60 credits.
        spend(&user, 600, Reply::happy(&["贵"], (1000, 500))).await;
        spend(&user, 600, Reply::no_usage(&["估计"])).await;
        let broken = provider().script(Reply::no_finish(&["断"]));
        user.stream(json!({"message": broken.message("x")})).await.rest().await;
        let refused = provider().script(Reply::status(500));
        user.post("/ai/chat", &json!({"message": refused.message("x")})).await.error(503, 3501);
        let charged = user.charged().await;

        let query = format!(
            "SELECT quota_type, COUNT(*) AS n, COUNT(DISTINCT request_id) AS requests, SUM(amount) AS amount, \
             MAX(cost_micro) AS dearest, SUM(estimated) AS estimated FROM quota_transactions \
             WHERE user_id = '{}' GROUP BY quota_type ORDER BY quota_type",
            user.id
        );
        let rows = wait_until(PATIENCE, "the outbox to reach D1", || async {
            let rows = worker.d1(&query).await;
            rows.iter().all(|row| row["n"] == 3).then_some(rows).filter(|rows| rows.len() == 3)
        });
        for (row, kind) in rows.await.iter().zip(QUOTA_TYPES) {
            let expected = json!({
                "quota_type": kind, "n": 3, "requests": 3, "amount": charged, "dearest": 60_000_000, "estimated": 2,
            });
            assert_eq!(row, &expected);
        }
    });
}
