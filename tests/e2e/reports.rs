//! What an author reads about their spending: transactions, statistics, usage, why one answer cost what it did, and what
//! the next one would. Costs are micro-credits: 1,000,000 are one credit.

use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::User;
use crate::support::reply::{Reply, Step};
use crate::support::worker::Worker;
use crate::support::{provider, run, token, unique};

/// A user with three answers of three models and a recharge, oldest first: ten transactions.
async fn spender() -> (User, Vec<Value>) {
    let worker = Worker::shared().await;
    let user = worker.user("writer");
    let mut answers = Vec::new();
    for (model, usage) in [("other-model", (1000, 500)), ("small-model", (100, 50)), ("test-model", (10, 5))] {
        answers.push(user.spend(model, usage).await);
    }
    worker.user("admin").recharge(&user, 40, &unique()).await.ok();
    (user, answers)
}

/// A local date, so many days from now.
fn date(days: i64) -> String {
    let zone = chrono::FixedOffset::east_opt(8 * 3600).expect("a zone");
    let at = chrono::DateTime::from_timestamp(token::now_s() + days * 86_400, 0).expect("an instant");
    at.with_timezone(&zone).format("%Y-%m-%d").to_string()
}

#[test]
fn transactions_are_paged_both_ways_and_filtered() {
    run(async {
        let (user, answers) = spender().await;
        let all = user.transactions("").await;
        assert_eq!(all.len(), 10);
        let times: Vec<_> =
            all.iter().map(|row| chrono::DateTime::parse_from_rfc3339(text(row, "timestamp")).expect("ts")).collect();
        assert!(times.is_sorted_by(|newer, older| newer >= older), "{times:?}");
        let dear = all.iter().find(|row| row["model"] == "other-model" && row["quotaType"] == "daily").expect("the first answer");
        let expected = json!({
            "userId": user.id, "type": "consume", "amount": 1500, "service": "chat", "inputTokens": 1000, "outputTokens": 500,
            "reasoningTokens": 0, "cachedTokens": 0, "costMicro": 60_000_000, "priceVersion": "30000000/60000000",
            "beforeBalance": 50_000, "afterBalance": 48_500, "balanceBefore": 50_000, "balanceAfter": 48_500,
            "reason": "finish", "writtenOff": 0, "estimated": false, "flagged": false, "period": date(0),
            "messageId": answers[0]["message"]["id"], "createdAt": dear["timestamp"],
        });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&dear[key], value, "{key}");
        }
        for key in ["id", "requestId", "holdId", "description"] {
            assert!(!text(dear, key).is_empty(), "{key}");
        }

        assert_eq!(user.transactions("limit=2&offset=1").await, all[1..3]);
        assert_eq!(user.transactions("offset=9").await, all[9..]);
        assert!(user.transactions("offset=10").await.is_empty());
        let bare = user.get("/ai/quota/transactions?limit=2").await;
        assert_eq!(bare.body.get("pagination"), None, "only who pages gets a paginated envelope");
        for size in ["pageSize", "page_size"] {
            let page = user.get(&format!("/ai/quota/transactions?page=2&{size}=4")).await;
            let expected = json!({
                "total": 10, "page": 2, "page_size": 4, "pageSize": 4, "total_pages": 3, "totalPages": 3,
                "has_next": true, "hasNext": true, "has_previous": true, "hasPrev": true,
            });
            assert_eq!(page.body["pagination"], expected);
            assert_eq!(page.ok(), json!(all[4..8]));
        }

        let count = |query: &'static str| async { user.transactions(query).await.len() };
        let filters = [
            ("type=consume", 9),
            ("type=recharge", 1),
            ("type=reset", 0),
            ("type=restore", 0),
            ("type=daily", 3),
            ("quotaType=total", 4),
            ("quotaType=monthly&type=consume", 3),
            ("service=chat", 9),
            ("service=system", 1),
            ("model=small-model", 3),
            ("model=nobody", 0),
            ("from=2001-01-01", 10),
            ("to=2001-01-01", 0),
            ("startDate=2001-01-01&endDate=2099-01-01", 10),
            ("from=2099-01-01T00:00:00Z", 0),
        ];
        for (query, expected) in filters {
            assert_eq!(count(query).await, expected, "{query}");
        }
        let today = format!("from={0}&to={0}", date(0));
        assert_eq!(user.transactions(&today).await, all, "a local day has all its hours");
        // An instant parts what came before it from what came then.
        let middle = times[1].timestamp_millis();
        let later = user.transactions(&format!("from={middle}")).await.len();
        let earlier = user.transactions(&format!("to={middle}")).await.len();
        assert_eq!((later + earlier, later < 10), (10, true));

        let bad = [
            "type=allocate",
            "quotaType=weekly",
            "limit=0",
            "limit=x",
            "limit=1001",
            "offset=-1",
            "page=0",
            "pageSize=0",
            "from=yesterday",
            "to=2026-13-01",
        ];
        for query in bad {
            user.get(&format!("/ai/quota/transactions?{query}")).await.error(400, 1001);
        }
        assert!(Worker::anyone().await.transactions("").await.is_empty());
    });
}

#[test]
fn paging_is_stable_while_new_entries_arrive() {
    run(async {
        let (user, _) = spender().await;
        let all = user.transactions("").await;
        let mut seen = user.transactions("limit=3").await;
        while let Some(last) = seen.last() {
            let after = text(last, "id").replace('/', "%2F");
            user.spend("test-model", (1, 1)).await;
            let next = user.transactions(&format!("limit=3&after={after}")).await;
            if next.is_empty() {
                break;
            }
            seen.extend(next);
        }
        assert_eq!(seen, all, "nothing twice, nothing left out, nothing new in between");
        let stranger = Worker::anyone().await;
        let after = text(&all[0], "id").replace('/', "%2F");
        assert!(stranger.transactions(&format!("after={after}")).await.is_empty());
    });
}

#[test]
fn statistics_add_up() {
    run(async {
        let (user, _) = spender().await;
        let spent = 1500 + 150 + 15;
        let total = 50_000 + 1_000_000 + 20_000_040;
        let data = user.get("/ai/quota/statistics").await.ok();
        let expected = json!({
            "userId": user.id, "totalQuota": total, "usedQuota": 3 * spent, "reservedQuota": 0,
            "remainingQuota": total - 3 * spent, "totalTransactions": 10, "dailyAverage": spent / 30,
            "quotaByType": {"daily": spent, "monthly": spent, "total": spent},
            "quotaByService": {"chat": spent}, "costByService": {"chat": 60_252_000}, "costMicro": 60_252_000,
            "quotaByModel": {"other-model": 1500, "small-model": 150, "test-model": 15},
        });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&data[key], value, "{key}");
        }
        let share = data["usagePercentage"].as_f64().expect("a number");
        assert!((share - 100.0 * 3.0 * f64::from(spent) / f64::from(total)).abs() < 0.01, "{share}");
        let days = data["daily"].as_array().expect("an array");
        assert_eq!((days.len(), &days[0]["date"], &days[0]["requests"]), (1, &json!(date(0)), &json!(3)));
        let dearest: Vec<_> =
            data["mostExpensive"].as_array().expect("an array").iter().map(|row| row["costMicro"].clone()).collect();
        assert_eq!(dearest, [60_000_000, 250_000, 2_000]);

        let new = Worker::anyone().await.get("/ai/quota/statistics").await.ok();
        assert_eq!((&new["usedQuota"], &new["totalTransactions"], &new["costMicro"]), (&json!(0), &json!(0), &json!(0)));
        let admin = Worker::shared().await.user("admin").get("/ai/quota/statistics").await.ok();
        assert_eq!((&admin["totalQuota"], admin["usagePercentage"].as_f64()), (&json!(0), Some(0.0)));
    });
}

#[test]
fn usage_is_grouped_by_day_model_or_service() {
    run(async {
        let (user, _) = spender().await;
        let data = user.get("/ai/usage").await.ok();
        let sums = |row: &Value| {
            let numbers =
                [&row["requests"], &row["tokens"]["input"], &row["tokens"]["output"], &row["tokens"]["total"], &row["costMicro"]];
            assert!(row["avgResponseTime"].as_f64().is_some_and(|ms| ms >= 0.0), "{row}");
            numbers.map(|number| number.as_i64().expect("a number"))
        };
        assert_eq!(sums(&data["summary"]), [3, 1110, 555, 1665, 60_252_000]);
        assert_eq!(data["summary"]["cost"], 60.252);
        assert_eq!(sums(&data["byService"]["chat"]), sums(&data["summary"]));
        let daily = data["daily"].as_array().expect("an array");
        let models: Vec<_> = daily.iter().map(|row| text(row, "model")).collect();
        assert_eq!(models, ["other-model", "small-model", "test-model"]);
        assert_eq!(sums(&daily[1]), [1, 100, 50, 150, 250_000]);
        assert!(daily.iter().all(|row| row["date"] == date(0) && row["provider"].is_string()), "{daily:?}");
        assert_eq!(user.get("/ai/usage?groupBy=day").await.ok(), data);

        let models = user.get("/ai/usage?groupBy=model").await.ok();
        let groups = models["groups"].as_array().expect("an array");
        assert_eq!(
            (groups.len(), &groups[0]["model"], sums(&groups[0])),
            (3, &json!("other-model"), [1, 1000, 500, 1500, 60_000_000])
        );
        let services = user.get("/ai/usage?groupBy=service").await.ok();
        let groups = services["groups"].as_array().expect("an array");
        assert_eq!((groups.len(), &groups[0]["service"], sums(&groups[0])), (1, &json!("chat"), sums(&data["summary"])));

        let one = user.get("/ai/usage?model=small-model").await.ok();
        assert_eq!(sums(&one["summary"]), [1, 100, 50, 150, 250_000]);
        for span in [format!("from={0}&to={0}", date(0)), format!("startDate={}&endDate={}", date(-29), date(1))] {
            assert_eq!(user.get(&format!("/ai/usage?{span}")).await.ok()["summary"], data["summary"], "{span}");
        }
        let none = user.get(&format!("/ai/usage?from={}&to={}", date(-3), date(-1))).await.ok();
        assert_eq!((&none["summary"]["requests"], &none["daily"]), (&json!(0), &json!([])));
        for query in ["groupBy=hour", "from=x", "to=x", "from=2026-02-02&to=2026-02-01", "startDate=2099-01-01"] {
            user.get(&format!("/ai/usage?{query}")).await.error(400, 1001);
        }
    });
}

#[test]
fn an_answer_s_cost_is_explained_to_its_author_alone() {
    run(async {
        let (user, answers) = spender().await;
        let id = text(&answers[0]["message"], "id");
        let data = user.get(&format!("/ai/quota/explain?messageId={id}")).await.ok();
        let expected = json!({
            "messageId": id, "model": "other-model", "service": "chat", "reason": "finish", "inputTokens": 1000,
            "outputTokens": 500, "charged": 1500, "writtenOff": 0, "estimated": false, "costMicro": 60_000_000, "cost": 60.0,
            "price": {"inputMicroPer1k": 30_000_000, "outputMicroPer1k": 60_000_000, "version": "30000000/60000000"},
        });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&data[key], value, "{key}");
        }
        let rows = data["transactions"].as_array().expect("an array");
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row["messageId"] == id && row["requestId"] == data["requestId"]), "{rows:?}");
        assert!(text(&data, "explanation").contains("1000"), "{data}");
        let stranger = Worker::anyone().await;
        stranger.get(&format!("/ai/quota/explain?messageId={id}")).await.error(404, 1004);
        user.get("/ai/quota/explain?messageId=nobody").await.error(404, 1004);
        user.get("/ai/quota/explain").await.error(400, 1001);
        user.get("/ai/quota/explain?messageId=").await.error(400, 1001);
    });
}

/// The quote for a body, then what the same body really holds while it runs.
async fn quoted_and_held(user: &User, mut body: Value) -> (Value, i64) {
    let script = provider().script(Reply::happy(&["一", "二"], (25, 2)).step_after_delta(1, Step::Gate));
    body["message"] = json!(script.message("报价与实际相同。How much will it be?"));
    let (before, sessions) = (user.quotas().await, user.get("/ai/chat/sessions").await.ok());
    let quote = user.post("/ai/quota/quote", &body).await.ok();
    assert_eq!((user.quotas().await, user.get("/ai/chat/sessions").await.ok()), (before, sessions), "nothing is stored or held");
    assert!(script.calls().is_empty(), "nobody is called");
    let mut stream = user.stream(body).await;
    let asked = script.call().await.body["max_tokens"].clone();
    assert_eq!(asked, quote["grantedOutputTokens"]);
    let held = user.quota("daily").await.reserved;
    script.release(1);
    stream.rest().await;
    (quote, held)
}

#[test]
fn a_quote_is_what_is_held_afterwards() {
    run(async {
        let worker = Worker::shared().await;
        let user = worker.user("reader");
        let (quote, held) = quoted_and_held(&user, json!({"options": {"model": "other-model", "maxTokens": 700}})).await;
        assert_eq!((&quote["holdTokens"], &quote["maxOutputTokens"], &quote["fits"]), (&json!(held), &json!(700), &json!(true)));
        assert_eq!(
            (&quote["clamped"], &quote["suspended"], &quote["model"]),
            (&json!(false), &json!(false), &json!("other-model"))
        );
        let prompt = quote["promptTokens"].as_i64().expect("a number");
        assert_eq!(prompt + 700, held);
        assert_eq!(quote["maxCostMicro"], prompt * 30_000 + 700 * 60_000);
        assert_eq!(quote["remaining"], json!({"daily": 10_000, "monthly": 200_000, "total": 5_000_000}));

        // A session's history counts.
        let sessions = user.get("/ai/chat/sessions").await.ok();
        let body = json!({"sessionId": sessions[0]["id"], "options": {"maxTokens": 100}});
        let (longer, held) = quoted_and_held(&user, body).await;
        assert_eq!(longer["holdTokens"], held);
        assert!(longer["promptTokens"].as_i64() > Some(prompt), "{longer}");

        // What is short is clamped, and what is too short does not fit.
        let admin = worker.user("admin");
        let used = user.quota("daily").await.used;
        admin.set_limit(&user, "daily", u64::try_from(used).expect("a count") + 300).await;
        let (clamped, held) = quoted_and_held(&user, json!({"options": {"maxTokens": 700}})).await;
        assert_eq!((&clamped["clamped"], &clamped["fits"], &clamped["holdTokens"]), (&json!(true), &json!(true), &json!(300)));
        assert_eq!(held, 300);
        let refused = json!({"message": "太长了".repeat(30), "options": {"maxTokens": 700}});
        admin.set_limit(&user, "daily", 0).await;
        let quote = user.post("/ai/quota/quote", &refused).await.ok();
        assert_eq!(
            (&quote["fits"], &quote["grantedOutputTokens"], &quote["maxOutputTokens"]),
            (&json!(false), &json!(0), &json!(700))
        );
        user.post("/ai/chat", &refused).await.error(429, 3010);
        admin.govern(&user, "initialize").await;
        admin.govern(&user, "suspend").await;
        let quote = user.post("/ai/quota/quote", &refused).await.ok();
        assert_eq!((&quote["fits"], &quote["suspended"]), (&json!(false), &json!(true)));

        for (body, status, code) in [
            (json!({}), 400, 1001),
            (json!({"message": " "}), 400, 1001),
            (json!({"message": "x", "options": {"model": "nobody"}}), 404, 3530),
            (json!({"message": "x", "sessionId": "nobody"}), 404, 1004),
            (json!({"message": "字".repeat(9_000)}), 400, 3522),
        ] {
            user.post("/ai/quota/quote", &body).await.error(status, code);
        }
    });
}
