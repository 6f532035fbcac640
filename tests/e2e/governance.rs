//! What administrators do to a user's quota: limits, roles, suspension, resets, and the operator's view of it all.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::api::{QUOTA_TYPES, text};
use crate::support::client::User;
use crate::support::reply::{Reply, Step};
use crate::support::sse::terminal;
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run, token, unique, wait_until};

const READER: [i64; 3] = [10_000, 200_000, 5_000_000];
const WRITER: [i64; 3] = [50_000, 1_000_000, 20_000_000];
const VIP: [i64; 3] = [100_000, 2_000_000, 50_000_000];

async fn limits(user: &User) -> Vec<i64> {
    user.quotas().await.iter().map(|quota| quota.total).collect()
}

/// The same user with a token of another role, issued so many seconds from now.
fn newer(user: &User, role: &str, seconds: i64) -> User {
    let mut claims = token::claims(&user.id, role);
    claims["iat"] = json!(token::now_s() + seconds);
    user.with_token(Some(token::hs256(&json!({"alg": "HS256"}), &claims, token::SECRET.as_bytes())))
}

#[test]
fn every_administrator_s_route_is_403_for_everyone_else_before_anything_is_read() {
    run(async {
        let worker = Worker::shared().await;
        let id = worker.user("reader").id;
        let routes = [
            (Method::GET, "/admin/quota".to_owned()),
            (Method::GET, format!("/admin/quota/{id}")),
            (Method::PUT, format!("/admin/quota/{id}")),
            (Method::PUT, format!("/admin/quota/{id}/role")),
            (Method::POST, format!("/admin/quota/{id}/suspend")),
            (Method::POST, format!("/admin/quota/{id}/activate")),
            (Method::POST, format!("/admin/quota/{id}/reset")),
            (Method::POST, format!("/admin/quota/{id}/initialize")),
            (Method::GET, format!("/admin/quota/{id}/reconcile")),
            (Method::GET, "/admin/quota-codes".to_owned()),
            (Method::POST, "/admin/quota-codes".to_owned()),
            (Method::DELETE, "/admin/quota-codes/AAAA-BBBB-CCCC-DDDD".to_owned()),
        ];
        let admin = worker.user("admin");
        for (method, path) in routes {
            for role in ["reader", "author", "vip"] {
                for body in ["", "no JSON", r#"{"totalQuota":1,"quotaType":"daily","role":"vip","amount":1}"#] {
                    worker.user(role).request(method.clone(), &path).body(body).send().await.error(403, 1003);
                }
            }
            admin.with_token(None).request(method, &path).send().await.error(401, 2010);
        }
        let read = admin.get(&format!("/admin/quota/{id}")).await.ok();
        let told: Vec<_> = read.as_array().expect("an array").iter().map(|quota| quota["totalQuota"].as_i64()).collect();
        assert_eq!(told, READER.map(Some), "nothing was changed");
        assert!(read.as_array().expect("an array").iter().all(|quota| quota["userId"] == id && quota["status"] == "active"));
        // What no token can name is nobody.
        for nobody in ["%00", "%20", "a%0Ab", &"x".repeat(129)] {
            admin.get(&format!("/admin/quota/{nobody}")).await.error(404, 1004);
            admin.post(&format!("/admin/quota/{nobody}/suspend"), &json!({})).await.error(404, 1004);
        }
    });
}

#[test]
fn a_limit_stands_until_it_is_initialized() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        // Before the user was ever seen.
        admin.set_limit(&user, "daily", 700).await;
        assert_eq!(limits(&user).await, [700, 200_000, 5_000_000]);
        assert_eq!(limits(&newer(&user, "vip", 1)).await, [700, 2_000_000, 50_000_000], "through a change of role");
        // Zero is a limit, not the lack of one.
        let data = admin.put(&format!("/admin/quota/{}", user.id), &json!({"totalQuota": 0, "quotaType": "monthly"})).await.ok();
        let monthly = &data.as_array().expect("the three quotas")[1];
        assert_eq!(
            (&monthly["totalQuota"], &monthly["status"], &monthly["unlimited"]),
            (&json!(0), &json!("exhausted"), &json!(false))
        );
        let script = provider().script(Reply::happy(&["好"], (3, 1)));
        user.post("/ai/chat", &json!({"message": script.message("x")})).await.error(429, 3010);
        assert!(script.calls().is_empty());

        for body in [
            json!({}),
            json!({"totalQuota": 5}),
            json!({"quotaType": "daily"}),
            json!({"totalQuota": -1, "quotaType": "daily"}),
            json!({"totalQuota": 1.5, "quotaType": "daily"}),
            json!({"totalQuota": "5", "quotaType": "daily"}),
            json!({"totalQuota": 9_007_199_254_740_992_u64, "quotaType": "daily"}),
            json!({"totalQuota": 5, "quotaType": "weekly"}),
        ] {
            admin.put(&format!("/admin/quota/{}", user.id), &body).await.error(400, 1001);
        }
        assert_eq!(limits(&user).await, [700, 0, 50_000_000]);
        admin.govern(&user, "initialize").await;
        assert_eq!(limits(&user).await, VIP);
        assert_eq!(user.ask(json!({"message": script.message("x")})).await["reply"], "好");

        // An administrator may be limited, too.
        let boss = worker.user("admin");
        admin.set_limit(&boss, "daily", 100).await;
        let all = boss.get("/ai/quota/all").await.ok();
        assert_eq!(
            (&all[0]["totalQuota"], &all[0]["unlimited"], &all[1]["unlimited"]),
            (&json!(100), &json!(false), &json!(true))
        );
    });
}

#[test]
fn a_limit_below_what_is_used_leaves_nothing_and_takes_nothing_back() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        user.spend("other-model", (100, 900)).await;
        let script = provider().script(Reply::happy(&["一", "二"], (30, 40)).step_after_delta(1, Step::Gate));
        let mut stream = user.stream(json!({"message": script.message("x"), "options": {"maxTokens": 100}})).await;
        stream.take(2).await;
        admin.set_limit(&user, "daily", 500).await;
        let shown = user.get("/ai/quota").await.ok();
        assert_eq!(
            (&shown["usedQuota"], &shown["remainingQuota"], &shown["status"]),
            (&json!(1000), &json!(0), &json!("exhausted"))
        );
        user.post("/ai/chat", &json!({"message": "x", "options": {"maxTokens": 1}})).await.error(429, 3010);
        script.release(1);
        terminal(&stream.rest().await, "done");
        let shown = user.get("/ai/quota").await.ok();
        assert_eq!(
            (&shown["usedQuota"], &shown["reservedQuota"]),
            (&json!(1070), &json!(0)),
            "what was held before is charged whole"
        );
    });
}

#[test]
fn a_role_that_was_set_stands_until_it_is_initialized() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        let path = format!("/admin/quota/{}/role", user.id);
        user.spend("other-model", (10, 20)).await;
        let data = admin.put(&path, &json!({"role": "vip"})).await.ok();
        assert_eq!(data[0]["metadata"]["userRole"], "vip");
        assert_eq!(limits(&user).await, VIP);
        for (role, seconds) in [("reader", 0), ("writer", 2), ("admin", 4)] {
            assert_eq!(limits(&newer(&user, role, seconds)).await, VIP, "a token of a {role}");
        }
        assert_eq!(user.quota("daily").await.used, 30);
        for body in [json!({}), json!({"role": "king"}), json!({"role": "VIP"}), json!({"role": 5}), json!({"role": ["vip"]})] {
            admin.put(&path, &body).await.error(400, 1001);
        }
        admin.govern(&user, "initialize").await;
        assert_eq!(limits(&newer(&user, "author", 6)).await, WRITER, "tokens count again");
        // As the platform writes it, and at once with the initialization.
        admin.put(&path, &json!({"role": "author"})).await.ok();
        let body = json!({"role": "reader"});
        admin.post(&format!("/admin/quota/{}/initialize", user.id), &body).await.ok();
        assert_eq!(limits(&newer(&user, "vip", 8)).await, READER);
        admin.post(&format!("/admin/quota/{}/initialize", user.id), &json!({"role": "king"})).await.error(400, 1001);
    });
}

#[test]
fn the_suspended_start_nothing_and_finish_what_runs() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        let script = provider().script(Reply::happy(&["一", "二"], (30, 40)).step_after_delta(1, Step::Gate));
        let body = json!({"message": script.message("x"), "options": {"maxTokens": 100}});
        let mut stream = user.stream(body.clone()).await;
        stream.take(2).await;
        let data = admin.govern(&user, "suspend").await;
        let states: Vec<_> = data.as_array().expect("three quotas").iter().map(|quota| quota["status"].clone()).collect();
        assert_eq!(states, ["suspended"; 3]);
        for _ in 0..2 {
            user.post("/ai/chat", &body).await.error(403, 3011);
            user.streaming(&body).send().await.error(403, 3011);
        }
        assert_eq!(user.get("/ai/quota").await.ok()["isActive"], false);
        assert_eq!(user.get("/ai/chat/sessions").await.ok().as_array().map(Vec::len), Some(1), "reading goes on");
        script.release(1);
        terminal(&stream.rest().await, "done");
        assert_eq!(user.charged().await, 70, "what was running is charged");
        assert_eq!(script.calls().len(), 1);
        admin.govern(&user, "suspend").await;
        let data = admin.govern(&user, "activate").await;
        assert_eq!(data[0]["status"], "active");
        script.release(1);
        user.ask(body).await;
        assert_eq!(user.charged().await, 140);
    });
}

#[test]
fn a_reset_gives_back_the_period_and_says_so_in_the_books() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        user.spend("other-model", (100, 200)).await;
        let path = format!("/admin/quota/{}/reset", user.id);
        admin.post(&path, &json!({"quotaType": "daily"})).await.ok();
        let used = |user: User| async move { user.quotas().await.iter().map(|quota| quota.used).collect::<Vec<_>>() };
        assert_eq!(used(user.clone()).await, [0, 300, 300]);
        let rows = user.transactions("type=reset").await;
        assert_eq!(rows.len(), 1);
        let told = ["quotaType", "amount", "beforeBalance", "afterBalance", "service"].map(|key| rows[0][key].clone());
        assert_eq!(told, [json!("daily"), json!(300), json!(9_700), json!(10_000), json!("system")]);
        admin.govern(&user, "reset").await;
        assert_eq!(used(user.clone()).await, [0, 0, 0]);
        assert_eq!(user.transactions("type=reset").await.len(), 3, "there was nothing more of the day to give back");
        user.spend("other-model", (100, 200)).await;
        assert_eq!(used(user.clone()).await, [300, 300, 300]);
        for body in [json!({"quotaType": "weekly"}), json!({"quotaType": 1})] {
            admin.post(&path, &body).await.error(400, 1001);
        }
        let state = admin.get(&format!("/admin/quota/{}/reconcile", user.id)).await.ok();
        assert_eq!(state["types"][0]["usedQuota"], 300);
        assert_eq!(equal(&admin, &user).await["types"][0]["projected"], 300);
    });
}

/// Waits until D1 has all of a user's books.
async fn equal(admin: &User, user: &User) -> Value {
    let path = format!("/admin/quota/{}/reconcile", user.id);
    wait_until(PATIENCE, "D1 to agree with the ledger", || async {
        let state = admin.get(&path).await.ok();
        (state["status"] == "equal").then_some(state)
    })
    .await
}

#[test]
fn reconciliation_says_equal_behind_or_where_they_differ() {
    run(async {
        let worker = Worker::shared().await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        let reconcile = || async { admin.get(&format!("/admin/quota/{}/reconcile", user.id)).await.ok() };
        assert_eq!(reconcile().await["status"], "equal", "nobody has nothing anywhere");
        user.spend("other-model", (100, 200)).await;
        let state = equal(&admin, &user).await;
        assert_eq!((&state["openHolds"], &state["outboxPending"]), (&json!([]), &json!(0)));
        for (row, kind) in state["types"].as_array().expect("an array").iter().zip(QUOTA_TYPES) {
            let told = ["quotaType", "status", "usedQuota", "reservedQuota", "projected", "projectedEntries", "waiting"];
            let told = told.map(|key| row[key].clone());
            assert_eq!(told, [json!(kind), json!("equal"), json!(300), json!(0), json!(300), json!(1), json!(0)]);
        }

        // D1 takes nothing of this user's any more: the rest waits, and is counted.
        let trigger = format!(
            "CREATE TRIGGER t{0} BEFORE INSERT ON quota_transactions WHEN NEW.user_id = '{1}' BEGIN SELECT RAISE(ABORT, 'away'); END",
            unique(),
            user.id
        );
        worker.d1(&trigger).await;
        let script = provider().script(Reply::happy(&["一", "二"], (30, 10)).step_after_delta(1, Step::Gate));
        user.spend("other-model", (20, 30)).await;
        let mut stream = user.stream(json!({"message": script.message("x")})).await;
        stream.take(2).await;
        let state = reconcile().await;
        assert_eq!((&state["status"], &state["outboxPending"]), (&json!("behind"), &json!(3)));
        let row = &state["types"][0];
        assert_eq!([&row["usedQuota"], &row["projected"], &row["waiting"]], [&json!(350), &json!(300), &json!(50)]);
        let hold = &state["openHolds"][0];
        assert_eq!((&hold["amount"], &hold["model"]), (&row["reservedQuota"], &json!("test-model")));
        script.release(1);
        stream.rest().await;
        // An author still reads what D1 has.
        assert_eq!(user.transactions("").await.len(), 3);

        let name = trigger.split(' ').nth(2).expect("a name");
        worker.d1(&format!("DROP TRIGGER {name}")).await;
        assert_eq!(user.transactions("").await.len(), 9, "a read brings D1 up to date");
        equal(&admin, &user).await;

        // Somebody changes the copy.
        worker
            .d1(&format!(
                "UPDATE quota_transactions SET amount = amount - 1 WHERE user_id = '{}' AND quota_type = 'monthly'",
                user.id
            ))
            .await;
        let state = reconcile().await;
        assert_eq!(state["status"], "differs");
        let states: Vec<_> = state["types"].as_array().expect("an array").iter().map(|row| text(row, "status")).collect();
        assert_eq!(states, ["equal", "differs", "equal"]);
        assert_eq!(state["types"][1]["projected"], 387);
        assert_eq!(user.quota("monthly").await.used, 390, "the ledger is the authority");
    });
}

#[test]
fn the_operator_sees_who_uses_what() {
    run(async {
        let worker = Worker::shared().await;
        let admin = worker.user("admin");
        let list = |query: String| {
            let admin = &admin;
            async move { admin.get(&format!("/admin/quota?{query}")).await }
        };
        let (small, big, idle) = (worker.user("vip"), worker.user("vip"), worker.user("vip"));
        idle.quotas().await;
        big.spend("other-model", (9_000, 4_000)).await;
        small.spend("other-model", (10, 20)).await;
        admin.govern(&small, "suspend").await;
        let line =
            |rows: &Value, user: &User| rows.as_array().expect("an array").iter().find(|row| row["userId"] == user.id).cloned();
        let lines = wait_until(PATIENCE, "the users' lines in D1", || async {
            let rows = list("role=vip&pageSize=1000".to_owned()).await.ok();
            let lines = [line(&rows, &small)?, line(&rows, &big)?, line(&rows, &idle)?];
            (lines[0]["suspended"] == true && lines[1]["usedTotal"] == 13_000).then_some(lines)
        });
        let [low, high, none] = lines.await;
        let told = ["role", "usedToday", "usedMonth", "usedTotal", "suspended"].map(|key| low[key].clone());
        assert_eq!(told, [json!("vip"), json!(30), json!(30), json!(30), json!(true)]);
        assert_eq!((&none["usedTotal"], &none["suspended"]), (&json!(0), &json!(false)));
        chrono::DateTime::parse_from_rfc3339(text(&high, "lastActiveAt")).expect("an instant");

        let place =
            |rows: &Value, user: &User| rows.as_array().expect("an array").iter().position(|row| row["userId"] == user.id);
        let used = list("sort=used&role=vip&page=1&pageSize=1000".to_owned()).await.ok();
        assert!(place(&used, &big) < place(&used, &small) && place(&used, &small) < place(&used, &idle), "{used}");
        let active = list("sort=activity&role=vip&pageSize=1000".to_owned()).await.ok();
        assert!(place(&active, &small) < place(&active, &big), "{active}");
        let suspended = list("status=suspended&pageSize=1000".to_owned()).await.ok();
        assert!(line(&suspended, &small).is_some() && line(&suspended, &big).is_none());
        let others = list("status=active&role=vip&pageSize=1000".to_owned()).await.ok();
        assert!(line(&others, &small).is_none() && line(&others, &big).is_some());
        assert!(others.as_array().expect("an array").iter().all(|row| row["role"] == "vip"));

        let page = list("sort=used&page=2&pageSize=1".to_owned()).await;
        let told = page.body["pagination"].clone();
        assert_eq!((&told["page"], &told["pageSize"], &told["hasPrev"]), (&json!(2), &json!(1), &json!(true)));
        assert_eq!(page.ok().as_array().map(Vec::len), Some(1));
        for query in ["sort=name", "status=gone", "role=king", "page=0", "pageSize=x", "limit=0"] {
            list(query.to_owned()).await.error(400, 1001);
        }
    });
}
