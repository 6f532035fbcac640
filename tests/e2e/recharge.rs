//! Recharges: by an administrator or a signed service, never by the user; once per order; and for good.

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::{Answer, User};
use crate::support::worker::Worker;
use crate::support::{run, unique};

const READER: [i64; 3] = [10_000, 200_000, 5_000_000];

async fn limits(user: &User) -> Vec<i64> {
    user.quotas().await.iter().map(|quota| quota.total).collect()
}

async fn post(user: &User, body: impl Into<String>) -> Answer {
    user.request(Method::POST, "/ai/quota/recharge").body(body.into()).send().await
}

#[test]
fn a_recharge_raises_a_limit_and_nothing_takes_it_back() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        user.spend("other-model", (10, 20)).await;
        let order = unique();
        let answer = admin.recharge(&user, 1_000, &order).await;
        assert_eq!(answer.body["message"], "充值成功");
        let data = answer.ok();
        let quota = &data["quota"];
        assert_eq!(
            (&quota["quotaType"], &quota["totalQuota"], &quota["usedQuota"]),
            (&json!("total"), &json!(5_001_000), &json!(30))
        );
        let line = &data["transaction"];
        assert_eq!((&line["type"], &line["amount"], &line["service"]), (&json!("recharge"), &json!(1_000), &json!("system")));
        assert_eq!((&line["beforeBalance"], &line["afterBalance"]), (&json!(4_999_970), &json!(5_000_970)));
        assert_eq!((&line["balanceBefore"], &line["balanceAfter"]), (&line["beforeBalance"], &line["afterBalance"]));
        assert_eq!((&line["requestId"], &line["userId"], &data["repeated"]), (&json!(order), &json!(user.id), &json!(false)));

        let body = json!({"userId": user.id, "amount": 7, "orderId": unique(), "quotaType": "daily", "reason": "补偿"});
        let data = post(&admin, body.to_string()).await.ok();
        assert_eq!((&data["transaction"]["reason"], &data["quota"]["totalQuota"]), (&json!("补偿"), &json!(10_007)));
        let rows = user.transactions("type=recharge").await;
        assert_eq!(rows[0], data["transaction"], "the answer is the line of the books");
        assert_eq!(rows.len(), 2);

        let recharged = [10_007, 200_000, 5_001_000];
        assert_eq!(limits(&user).await, recharged);
        for act in ["reset", "suspend", "activate", "initialize"] {
            admin.govern(&user, act).await;
            assert_eq!(limits(&user).await, recharged, "{act}");
        }
        user.spend("other-model", (10, 20)).await;
        assert_eq!(limits(&user).await, recharged, "a charge");
        admin.set_limit(&user, "monthly", 300_000).await;
        assert_eq!(limits(&user).await, [10_007, 300_000, 5_001_000], "another type's limit");
        admin.set_limit(&user, "total", 100).await;
        assert_eq!(limits(&user).await, [10_007, 300_000, 1_100], "what was recharged is on top of any limit");
        let path = format!("/admin/quota/{}/initialize", user.id);
        admin.post(&path, &json!({"role": "vip"})).await.ok();
        assert_eq!(limits(&user).await, [100_007, 2_000_000, 50_001_000], "another role");
        assert_eq!(admin.recharge(&user, 1_000, &order).await.ok()["repeated"], true);
        assert_eq!(limits(&user).await, [100_007, 2_000_000, 50_001_000], "the same order much later");
    });
}

#[test]
fn an_ordinary_user_credits_nobody_whatever_is_sent() {
    run(async {
        let worker = Worker::shared().await;
        let rich = worker.user("reader");
        for role in ["reader", "author", "vip"] {
            let user = worker.user(role);
            let before = limits(&user).await;
            for target in [&user, &rich] {
                user.recharge(target, 1_000, &unique()).await.error(403, 1003);
            }
            for body in ["", "{}", "[]", "no JSON", r#"{"amount":-1}"#, r#"{"role":"admin"}"#, "\u{0}"] {
                post(&user, body).await.error(403, 1003);
            }
            assert_eq!(limits(&user).await, before);
        }
        assert_eq!(limits(&rich).await, READER);
        let nobody = rich.with_token(None);
        post(&nobody, "{}").await.error(401, 2010);
    });
}

#[test]
fn ten_calls_at_once_with_one_order_credit_once() {
    run(async {
        let worker = Worker::shared().await;
        let user = worker.user("reader");
        let admins: Vec<User> = (0..10).map(|_| worker.user("admin")).collect();
        let order = unique();
        let answers = join_all(admins.iter().map(|admin| admin.recharge(&user, 500, &order))).await;
        let data: Vec<Value> = answers.into_iter().map(Answer::ok).collect();
        let first: Vec<_> = data.iter().filter(|one| one["repeated"] == false).collect();
        assert_eq!(first.len(), 1, "one of them made it");
        assert!(data.iter().all(|one| one["transaction"] == first[0]["transaction"]), "and all tell the same: {data:?}");
        assert_eq!(limits(&user).await, [10_000, 200_000, 5_000_500]);
        assert_eq!(user.transactions("type=recharge").await.len(), 1);
    });
}

#[test]
fn an_order_stands_for_one_user_amount_and_type() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user, other) = (worker.user("admin"), worker.user("reader"), worker.user("reader"));
        let order = unique();
        let body = |user: &User, amount: u64, kind: &str| {
            json!({"userId": user.id, "amount": amount, "orderId": order, "quotaType": kind, "reason": unique()}).to_string()
        };
        post(&admin, body(&user, 10, "daily")).await.ok();
        for differing in [body(&user, 11, "daily"), body(&user, 10, "total"), body(&other, 10, "daily")] {
            post(&admin, differing).await.error(409, 1006);
        }
        assert_eq!(post(&admin, body(&user, 10, "daily")).await.ok()["repeated"], true, "another reason is the same order");
        assert_eq!(limits(&user).await, [10_010, 200_000, 5_000_000]);
        assert_eq!(limits(&other).await, READER);
    });
}

#[test]
fn what_is_no_recharge_is_400_and_moves_nothing() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        let order = unique();
        let with = |field: &str, text: &str| {
            let id = format!("\"{}\"", user.id);
            let fields = [("userId", id.as_str()), ("amount", "5"), ("orderId", &format!("\"{order}\"")), (field, text)];
            // The last of two equal keys counts; an empty text leaves the field out.
            let fields = fields.iter().filter(|(name, value)| (*name != field || *value == text) && !value.is_empty());
            let fields: Vec<String> = fields.map(|(name, value)| format!("\"{name}\":{value}")).collect();
            format!("{{{}}}", fields.join(","))
        };
        let amounts = [
            "0",
            "-1",
            "1.5",
            "5.0",
            "1e2",
            "9007199254740992",
            "18446744073709551615",
            "18446744073709551616",
            "1e309",
            "\"5\"",
            "null",
            "true",
            "[5]",
            "{}",
            "",
        ];
        for amount in amounts {
            let answer = post(&admin, with("amount", amount)).await;
            assert!(
                answer.body["details"].as_str().is_some_and(|text| text.contains("amount") || amount == "1e309"),
                "{}",
                answer.text
            );
            answer.error(400, 1001);
        }
        let long = format!("\"{}\"", "x".repeat(129));
        for id in ["\"\"", "\"  \"", "\"a\\u0000b\"", &long, "5", "null", ""] {
            post(&admin, with("orderId", id)).await.error(400, 1001);
        }
        for id in ["\"\"", "\"a\\nb\"", &long, "5", ""] {
            post(&admin, with("userId", id)).await.error(400, 1001);
        }
        for kind in ["\"weekly\"", "\"DAILY\"", "1"] {
            post(&admin, with("quotaType", kind)).await.error(400, 1001);
        }
        for body in ["", "[]", "{", "\"x\""] {
            post(&admin, body).await.error(400, 1001);
        }
        // More than can be counted together with what is there.
        post(&admin, with("amount", "9007199254740991")).await.error(400, 1001);
        assert_eq!(limits(&user).await, READER);
        assert!(user.transactions("").await.is_empty());

        let rest = 9_007_199_254_740_991 - 5_000_000_u64;
        admin.recharge(&user, rest, &unique()).await.ok();
        assert_eq!(limits(&user).await[2], 9_007_199_254_740_991, "to the last token");
        admin.recharge(&user, 1, &unique()).await.error(400, 1001);
    });
}
