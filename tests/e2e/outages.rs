//! The books while something is away, killed, late or repeated: D1, the Worker, a hold's renewals, the cron.
//!
//! What fails is made to fail from outside, in the SQLite files of the Worker's state: no switch for it is shipped.

use std::time::Duration;

use chrono::{DateTime, Datelike as _, FixedOffset, Timelike as _};
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::api::{QUOTA_TYPES, text};
use crate::support::client::User;
use crate::support::reply::{Reply, Step};
use crate::support::service::Signed;
use crate::support::sse::terminal;
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run, token, unique, wait_until};

/// How long chats go on without D1.
const AWAY: Duration = Duration::from_secs(10);
/// A ledger that could not reach D1 tries again by an alarm, every 30 s; the machine gets the rest.
const CATCH_UP: Duration = Duration::from_secs(120);
const TABLES: [&str; 4] = ["chat_sessions", "quota_transactions", "quota_users", "notifications"];

async fn rename(worker: &Worker, from: &str, to: &str) {
    let statements = TABLES.map(|table| format!("ALTER TABLE {table}{from} RENAME TO {table}{to}"));
    worker.d1_all(&statements.each_ref().map(String::as_str)).await;
}

/// One author who chats until `until`, whole and streamed by turns; answers how many answers there were.
async fn chat(user: &User, until: Instant) -> usize {
    let script = provider().script(Reply::happy(&["照", "常"], (12, 2)));
    let (mut answers, mut session) = (0, Value::Null);
    while Instant::now() < until {
        let body = json!({"message": script.message("x"), "sessionId": session});
        if answers % 2 == 0 {
            session = user.ask(body).await["sessionId"].clone();
        } else {
            terminal(&user.stream(body).await.rest().await, "done");
        }
        answers += 1;
    }
    answers
}

#[test]
fn chats_go_on_while_d1_is_away_and_the_books_catch_up() {
    run(async {
        let worker = Worker::start(&[("QUOTA_UTC_OFFSET", "-12:00")]).await;
        check_periods(&worker, -12).await;
        let (admin, users) = (worker.user("admin"), [(); 3].map(|()| worker.user("vip")));
        rename(&worker, "", "_away").await;
        let until = Instant::now() + AWAY;
        let answers = join_all(users.iter().map(|user| chat(user, until))).await;
        admin.recharge(&users[0], 500, &unique()).await.ok();
        users[0].get("/ai/quota/transactions").await.error(500, 5001);
        admin.get(&format!("/admin/quota/{}/reconcile", users[0].id)).await.error(500, 5001);
        for (user, answers) in users.iter().zip(&answers) {
            assert!(*answers > 3, "{answers} answers in {AWAY:?}");
            assert_eq!(user.charged().await, 14 * i64::try_from(*answers).expect("a small number"));
        }

        rename(&worker, "_away", "").await;
        // Nobody asks the Worker for anything meanwhile: the ledgers' own alarms must do it.
        let caught_up = wait_until(CATCH_UP, "the projection to be complete", || async {
            let counts = "SELECT user_id, count(*) AS n, count(DISTINCT request_id) AS requests, sum(amount) AS amount \
                          FROM quota_transactions WHERE type = 'consume' AND quota_type = 'total' GROUP BY user_id";
            let rows = worker.d1(counts).await;
            let complete = users.iter().zip(&answers).all(|(user, answers)| {
                let expected = json!({"user_id": user.id, "n": answers, "requests": answers, "amount": 14 * answers});
                rows.contains(&expected)
            });
            complete.then_some(())
        });
        caught_up.await;
        for user in &users {
            let state = admin.get(&format!("/admin/quota/{}/reconcile", user.id)).await.ok();
            assert_eq!((&state["status"], &state["outboxPending"]), (&json!("equal"), &json!(0)), "{state}");
            wait_until(PATIENCE, "the session to be listed", || async {
                (user.get("/ai/chat/sessions").await.ok().as_array().map(Vec::len) == Some(1)).then_some(())
            })
            .await;
        }
        assert_eq!(users[0].transactions("type=recharge").await.len(), 1);
    });
}

#[test]
fn a_kill_takes_no_recharge_no_limit_and_no_nonce_and_charges_once() {
    run(async {
        let worker = Worker::start(&[]).await;
        let (admin, user) = (worker.user("admin"), worker.user("reader"));
        let order = unique();
        admin.recharge(&user, 1_000, &order).await.ok();
        admin.set_limit(&user, "monthly", 123_456).await;
        admin.put(&format!("/admin/quota/{}/role", user.id), &json!({"role": "vip"})).await.ok();
        let body = json!({"userId": user.id, "amount": 5, "orderId": unique()});
        let signed = Signed::now("/ai/quota/recharge", &body);
        let service = user.with_token(None);
        signed.request(&service).send().await.ok();
        let limits = |user: User| async move { user.quotas().await.iter().map(|quota| quota.total).collect::<Vec<_>>() };
        let before = limits(user.clone()).await;
        assert_eq!(before, [100_000, 123_456, 50_001_005]);

        // The stream has ended and its end is saved; the ledger cannot write the charge; then all is killed.
        let script = provider().script(Reply::happy(&["一", "二"], (30, 12)).step_after_delta(1, Step::Gate));
        let mut stream = user.stream(json!({"message": script.message("x")})).await;
        let session = text(&stream.take(2).await[0].json(), "sessionId").to_owned();
        worker.ledger(&user.id, "CREATE TRIGGER deaf BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'deaf'); END").await;
        script.release(1);
        wait_until(PATIENCE, "the end to be saved", || async {
            let rows = worker.session(&user.id, &session, "SELECT state FROM generation").await;
            matches!(rows[0]["state"].as_str(), Some("settling" | "unsettled")).then_some(())
        })
        .await;
        worker.kill_9();
        worker.ledger(&user.id, "DROP TRIGGER deaf").await;
        worker.restart().await;

        let message = user.finished_message(&session).await;
        assert_eq!((&message["status"], &message["content"]), (&json!("complete"), &json!("一二")));
        assert_eq!(user.charged().await, 42);
        let rows = user.transactions("type=consume").await;
        let told: Vec<_> = rows.iter().map(|row| (row["amount"].clone(), row["reason"].clone())).collect();
        assert_eq!(told, vec![(json!(42), json!("finish")); 3]);
        assert_eq!(script.calls().len(), 1);

        assert_eq!(limits(user.clone()).await, before);
        signed.request(&service).send().await.error(401, 1002);
        assert_eq!(admin.recharge(&user, 1_000, &order).await.ok()["repeated"], true);
        admin.recharge(&user, 999, &order).await.error(409, 1006);
        assert_eq!(limits(user.clone()).await, before);
        assert_eq!(user.transactions("type=recharge").await.len(), 2);
    });
}

#[test]
fn a_hold_that_nobody_renews_is_freed_by_the_alarm_and_its_settlement_written_off() {
    run(async {
        let worker = Worker::hasty().await;
        let user = worker.user("reader");
        let script = provider().script(Reply::happy(&["太", "晚"], (30, 12)).first(Step::Gate));
        let session = user.new_session(json!({})).await;
        let waiting = tokio::spawn(user.streaming(&json!({"message": script.message("x"), "sessionId": session})).open());
        script.call().await;
        assert!(user.quota("daily").await.reserved > 0);
        let holds = || async { worker.ledger(&user.id, "SELECT open, expires_at FROM hold").await };
        let first = holds().await[0]["expires_at"].as_i64().expect("an instant");
        wait_until(PATIENCE, "a renewal while the provider is waited for", || async {
            (holds().await[0]["expires_at"].as_i64() > Some(first)).then_some(())
        })
        .await;

        // From now on no renewal is heard. Nobody touches the ledger through the Worker either: only its alarm can act.
        let deaf = "CREATE TRIGGER deaf BEFORE UPDATE ON hold WHEN NEW.open = 1 BEGIN SELECT RAISE(ABORT, 'deaf'); END";
        worker.ledger(&user.id, deaf).await;
        wait_until(PATIENCE, "the alarm to free the hold", || async { (holds().await[0]["open"] == 0).then_some(()) }).await;
        worker.ledger(&user.id, "DROP TRIGGER deaf").await;
        assert_eq!(user.charged().await, 0, "nothing is held, nothing charged");

        script.release(1);
        let mut stream = waiting.await.expect("no panic").unwrap_or_else(|answer| panic!("{}", answer.text));
        terminal(&stream.rest().await, "done");
        assert_eq!(user.charged().await, 0, "the same tokens are not charged when they were free for others");
        let rows = user.transactions("").await;
        let told: Vec<_> = rows.iter().map(|row| (row["amount"].clone(), row["writtenOff"].clone())).collect();
        assert_eq!(told, vec![(json!(0), json!(42)); 3]);
    });
}

/// Checks the periods of a new user of a Worker whose midnight is `hours` ahead of UTC's.
async fn check_periods(worker: &Worker, hours: i32) {
    let zone = FixedOffset::east_opt(hours * 3600).expect("a zone");
    let now = || DateTime::from_timestamp(token::now_s(), 0).expect("now").with_timezone(&zone);
    let (admin, user) = (worker.user("admin"), worker.user("reader"));
    user.spend("test-model", (10, 5)).await;
    // Asked again should a day begin right now.
    let (local, state, quotas) = wait_until(PATIENCE, "answers of one day", || async {
        let before = now();
        let state = admin.get(&format!("/admin/quota/{}/reconcile", user.id)).await.ok();
        let quotas = user.get("/ai/quota/all").await.ok();
        (now().date_naive() == before.date_naive()).then_some((before, state, quotas))
    })
    .await;
    let periods = [local.format("%Y-%m-%d").to_string(), local.format("%Y-%m").to_string(), "total".to_owned()];
    for (at, kind) in QUOTA_TYPES.into_iter().enumerate() {
        assert_eq!((&state["types"][at]["period"], &quotas[at]["usedQuota"]), (&json!(periods[at]), &json!(15)), "{kind}");
    }
    let sign = if hours < 0 { '-' } else { '+' };
    for (quota, days) in [(&quotas[0], 1..=1), (&quotas[1], 1..=31)] {
        let reset = text(quota, "resetAt");
        assert!(reset.ends_with(&format!("{sign}{:02}:00", hours.abs())), "{reset}");
        let at = DateTime::parse_from_rfc3339(reset).expect("an instant");
        assert_eq!((at.hour(), at.minute(), at.second()), (0, 0, 0), "{reset}");
        assert!(days.contains(&(at.date_naive() - local.date_naive()).num_days()), "{reset} after {local}");
    }
    assert_eq!(DateTime::parse_from_rfc3339(text(&quotas[1], "resetAt")).expect("an instant").day(), 1);
    let rows = user.transactions("").await;
    assert!(rows.iter().all(|row| periods.contains(&text(row, "period").to_owned())), "{rows:?}");
}

#[test]
fn periods_follow_the_operator_s_midnight() {
    // Its counterpart, 26 hours behind, is checked where D1 is away.
    run(async { check_periods(Worker::hasty().await, 14).await });
}

/// Fires the cron as wrangler lets one: with the instant it is scheduled for.
async fn fire(worker: &Worker, at_ms: i64) {
    let url = format!("{}/cdn-cgi/handler/scheduled?cron=*/15+*+*+*+*&time={at_ms}", worker.origin);
    let answer = reqwest::get(&url).await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.text().await.expect("a body").as_str()), (200, "ok"));
}

#[test]
fn the_cron_closes_what_has_ended_once_however_often_it_fires() {
    run(async {
        let worker = Worker::shared().await;
        let (user, today) = (worker.user("reader"), worker.user("reader"));
        for user in [&user, &today] {
            user.spend("test-model", (10, 5)).await;
            user.spend("test-model", (20, 10)).await;
            assert_eq!(user.transactions("").await.len(), 6);
        }
        // One of them spent all this long ago.
        for (kind, period) in [("daily", "2001-02-28"), ("monthly", "2001-02")] {
            let moved = format!(
                "UPDATE quota_transactions SET period = '{period}' WHERE user_id = '{}' AND quota_type = '{kind}'",
                user.id
            );
            worker.d1(&moved).await;
        }
        let now_ms = token::now_s() * 1_000;
        let closed = |user: User| async move {
            let rows = user.transactions("type=reset").await;
            let told =
                rows.iter().map(|row| [&row["quotaType"], &row["period"], &row["amount"], &row["reason"]].map(Clone::clone));
            told.collect::<Vec<_>>()
        };
        // Before their time was over, nothing is.
        fire(worker, 981_000_000_000).await;
        assert_eq!(closed(user.clone()).await, [] as [[Value; 4]; 0]);

        join_all((0..3).map(|_| fire(worker, now_ms))).await;
        for at_ms in [now_ms, now_ms - 900_000, 1_100_000_000_000] {
            fire(worker, at_ms).await;
        }
        let mut rows = closed(user.clone()).await;
        rows.sort_by_key(|row| row[0].to_string());
        let line = |kind: &str, period: &str| [json!(kind), json!(period), json!(45), json!("period_closed")];
        assert_eq!(rows, [line("daily", "2001-02-28"), line("monthly", "2001-02")]);

        // An instant that is still to come ends nothing.
        for days in [1, 40, 4_000] {
            fire(worker, now_ms + days * 86_400_000).await;
        }
        assert_eq!(closed(today.clone()).await, [] as [[Value; 4]; 0]);
        assert_eq!((closed(user.clone()).await.len(), today.charged().await, user.charged().await), (2, 45, 45));
        today.spend("test-model", (10, 5)).await;
        assert_eq!(today.charged().await, 60, "the day goes on");
    });
}
