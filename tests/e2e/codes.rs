//! Redemption codes: made in batches by administrators, good for so many users, for each of them once.

use futures::future::join_all;
use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::{Answer, User};
use crate::support::worker::Worker;
use crate::support::{run, unique};

/// A batch of codes; the administrator who made it has made no other.
async fn batch(worker: &Worker, body: Value) -> (User, Vec<String>) {
    let admin = worker.user("admin");
    let made = admin.post("/admin/quota-codes", &body).await.data(201);
    let codes = made.as_array().expect("an array").iter().map(|code| text(code, "code").to_owned()).collect();
    (admin, codes)
}

/// What the list says of a code.
async fn listed(admin: &User, code: &str) -> Value {
    let list = admin.get("/admin/quota-codes?limit=1000").await.ok();
    let list = list.as_array().expect("an array");
    list.iter().find(|row| row["code"] == code).cloned().unwrap_or_else(|| panic!("{code} in {list:?}"))
}

async fn redeem(user: &User, code: &str) -> Answer {
    user.post("/ai/quota/redeem", &json!({"code": code})).await
}

#[test]
fn a_batch_is_made_listed_and_voided() {
    run(async {
        let worker = Worker::shared().await;
        let body = json!({"amount": 300, "quotaType": "monthly", "count": 3, "uses": 2, "expiresAt": "2099-12-31"});
        let admin = worker.user("admin");
        let made = admin.post("/admin/quota-codes", &body).await.data(201);
        let codes = made.as_array().expect("an array");
        assert_eq!(codes.len(), 3);
        for code in codes {
            let letters = text(code, "code");
            let parts: Vec<&str> = letters.split('-').collect();
            let fit = |part: &&str| part.len() == 4 && part.chars().all(|c| "ABCDEFGHJKLMNPQRSTUVWXYZ23456789".contains(c));
            assert!(parts.len() == 4 && parts.iter().all(fit), "{letters}");
            let told = ["amount", "quotaType", "uses", "used", "status", "createdBy"].map(|key| code[key].clone());
            assert_eq!(told, [json!(300), json!("monthly"), json!(2), json!(0), json!("active"), json!(admin.id)]);
            assert_eq!(text(code, "expiresAt"), "2100-01-01T00:00:00.000+08:00", "the whole of its last day");
            assert_eq!(&listed(&admin, letters).await, code);
        }
        let (first, second) = (text(&codes[0], "code"), text(&codes[1], "code"));
        assert_ne!(first, second);
        // Newest first, by pages.
        let page = admin.get("/admin/quota-codes?limit=1&offset=0").await.ok();
        assert_eq!(page.as_array().map(Vec::len), Some(1));
        let user = worker.user("reader");
        redeem(&user, second).await.ok();
        for _ in 0..2 {
            admin.delete(&format!("/admin/quota-codes/{first}")).await.ok();
            admin.delete(&format!("/admin/quota-codes/{}", second.to_lowercase())).await.ok();
        }
        assert_eq!(listed(&admin, first).await["status"], "void");
        redeem(&user, first).await.error(404, 1004);
        redeem(&worker.user("reader"), second).await.error(404, 1004);
        assert_eq!(user.quota("monthly").await.total, 200_300, "what a code credited before it was voided stays");
        admin.delete(&format!("/admin/quota-codes/{}", unique())).await.error(404, 1004);
    });
}

#[test]
fn what_is_no_batch_is_400() {
    run(async {
        let admin = Worker::shared().await.user("admin");
        let bad = [
            json!({}),
            json!({"amount": 0}),
            json!({"amount": -5}),
            json!({"amount": 1.5}),
            json!({"amount": "5"}),
            json!({"amount": 9_007_199_254_740_992_u64}),
            json!({"amount": 5, "count": 0}),
            json!({"amount": 5, "count": 1_001}),
            json!({"amount": 5, "uses": 0}),
            json!({"amount": 5, "uses": -1}),
            json!({"amount": 5, "quotaType": "weekly"}),
            json!({"amount": 5, "expiresAt": "2001-01-01"}),
            json!({"amount": 5, "expiresAt": "someday"}),
        ];
        for body in bad {
            let answer = admin.post("/admin/quota-codes", &body).await;
            assert_eq!(answer.status, 400, "{body}: {}", answer.text);
            answer.error(400, 1001);
        }
        for query in ["limit=0", "limit=x", "offset=-1"] {
            admin.get(&format!("/admin/quota-codes?{query}")).await.error(400, 1001);
        }
        let list = admin.get("/admin/quota-codes?limit=1000").await.ok();
        assert!(list.as_array().expect("an array").iter().all(|code| code["createdBy"] != admin.id));
    });
}

#[test]
fn a_code_credits_each_of_its_users_once() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, codes) = batch(worker, json!({"amount": 300, "uses": 2})).await;
        let [first, second, third] = [(); 3].map(|()| worker.user("reader"));
        let data = redeem(&first, &codes[0]).await.ok();
        assert_eq!((&data["quota"]["quotaType"], &data["quota"]["totalQuota"]), (&json!("total"), &json!(5_000_300)));
        assert_eq!((&data["transaction"]["type"], &data["transaction"]["amount"]), (&json!("recharge"), &json!(300)));
        assert_eq!(first.transactions("").await, [data["transaction"].clone()]);
        // As people type it.
        redeem(&second, &format!("  {} ", codes[0].to_lowercase())).await.ok();
        for user in [&first, &second] {
            for _ in 0..8 {
                redeem(user, &codes[0]).await.error(409, 1006);
            }
            assert_eq!(user.quota("total").await.total, 5_000_300);
        }
        redeem(&third, &codes[0]).await.error(404, 1004);
        assert_eq!(third.quota("total").await.total, 5_000_000);
        let told = listed(&admin, &codes[0]).await;
        assert_eq!((&told["used"], &told["status"]), (&json!(2), &json!("used")));
    });
}

#[test]
fn an_expired_code_is_worthless() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, codes) = batch(worker, json!({"amount": 300, "expiresAt": "2099-01-01T00:00:00Z"})).await;
        worker.d1(&format!("UPDATE quota_codes SET expires_at = 1000 WHERE code = '{}'", codes[0])).await;
        assert_eq!(listed(&admin, &codes[0]).await["status"], "expired");
        redeem(&worker.user("reader"), &codes[0]).await.error(404, 1004);
    });
}

#[test]
fn twenty_calls_of_one_user_at_once_credit_once() {
    run(async {
        let worker = Worker::shared().await;
        let (_, codes) = batch(worker, json!({"amount": 300, "uses": 50, "count": 2})).await;
        let user = worker.user("reader");
        let answers = join_all((0..20).map(|_| redeem(&user, &codes[0]))).await;
        let count = |status| answers.iter().filter(|answer| answer.status == status).count();
        // Beside the five that may be tried at once, it is told that others are still being looked at.
        assert_eq!((count(200), count(409) + count(429)), (1, 19));
        assert_eq!(user.quota("total").await.total, 5_000_300);
        assert_eq!(user.transactions("type=recharge").await.len(), 1);
        redeem(&user, &codes[1]).await.ok();
    });
}

#[test]
fn twenty_users_at_once_share_one_use() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, codes) = batch(worker, json!({"amount": 300})).await;
        let users: Vec<User> = (0..20).map(|_| worker.user("reader")).collect();
        let answers = join_all(users.iter().map(|user| redeem(user, &codes[0]))).await;
        let (mut lucky, mut credited) = (0, 0);
        for (user, answer) in users.iter().zip(answers) {
            if answer.status == 200 {
                lucky += 1;
            } else {
                answer.error(404, 1004);
            }
            credited += user.quota("total").await.total - 5_000_000;
        }
        assert_eq!((lucky, credited), (1, 300));
        assert_eq!(listed(&admin, &codes[0]).await["used"], 1);
    });
}

#[test]
fn who_guesses_has_to_wait() {
    run(async {
        let worker = Worker::shared().await;
        let (_, codes) = batch(worker, json!({"amount": 300, "uses": 5})).await;
        let (user, other) = (worker.user("reader"), worker.user("reader"));
        for guess in 0..5 {
            redeem(&user, &format!("AAAA-BBBB-CCCC-{guess}")).await.error(404, 1004);
        }
        for code in ["AAAA-BBBB-CCCC-9", &codes[0]] {
            let answer = redeem(&user, code).await;
            let wait: u64 = answer.header("retry-after").and_then(|text| text.parse().ok()).expect("seconds to wait");
            assert!((1..=600).contains(&wait), "{wait}");
            answer.error(429, 4000);
        }
        assert_eq!(user.quota("total").await.total, 5_000_000);
        redeem(&other, &codes[0]).await.ok();

        // What cannot be a code is no guess.
        let typist = worker.user("reader");
        for body in [json!({}), json!({"code": ""}), json!({"code": "  "}), json!({"code": 5}), json!({"code": "x".repeat(65)})] {
            for _ in 0..2 {
                typist.post("/ai/quota/redeem", &body).await.error(400, 1001);
            }
        }
        redeem(&typist, &codes[0]).await.ok();
    });
}
