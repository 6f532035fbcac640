//! What several tests do alike with the API: ask, stream, read a session, read the quota. Each helper checks what must
//! hold on every such call, so that no test has to repeat it.

use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Answer, Request, User};
use super::reply::Reply;
use super::sse::EventStream;
use super::{PATIENCE, provider, wait_until};

/// One quota type as `GET /ai/quota` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// The limit.
    pub total: i64,
    /// What is settled.
    pub used: i64,
    /// What is held.
    pub reserved: i64,
    /// What is left for new holds.
    pub remaining: i64,
}

/// The quota types, all of which every generation is charged to.
pub const QUOTA_TYPES: [&str; 3] = ["daily", "monthly", "total"];

impl Quota {
    /// Reads a `UserQuota` of a limited user, checking that it adds up and is not below zero.
    #[track_caller]
    pub fn read(value: &Value) -> Self {
        let number = |key: &str| value[key].as_i64().unwrap_or_else(|| panic!("{key} in {value}"));
        let quota = Self {
            total: number("totalQuota"),
            used: number("usedQuota"),
            reserved: number("reservedQuota"),
            remaining: number("remainingQuota"),
        };
        assert_eq!(quota.remaining, quota.total - quota.used - quota.reserved, "{value}");
        assert!(quota.used >= 0 && quota.reserved >= 0 && quota.remaining >= 0, "never below zero: {value}");
        quota
    }
}

impl User {
    /// POST /ai/chat, which must succeed.
    pub async fn ask(&self, body: Value) -> Value {
        self.post("/ai/chat", &body).await.ok()
    }

    /// A request to POST /ai/chat/stream.
    pub fn streaming(&self, body: &Value) -> Request {
        self.request(Method::POST, "/ai/chat/stream").json(body)
    }

    /// POST /ai/chat/stream, which must open a stream.
    pub async fn stream(&self, body: Value) -> EventStream {
        self.streaming(&body).stream().await
    }

    /// A request for the events of a session's generation after `last_event_id`.
    pub fn resuming(&self, session: &str, message: Option<&str>, last_event_id: Option<u64>) -> Request {
        let query = message.map(|id| format!("?messageId={id}")).unwrap_or_default();
        let request = self.request(Method::GET, &format!("/ai/chat/sessions/{session}/stream{query}"));
        match last_event_id {
            Some(id) => request.header("Last-Event-ID", &id.to_string()),
            None => request,
        }
    }

    /// Stops what runs in a session.
    pub async fn stop(&self, session: &str) -> Value {
        self.post(&format!("/ai/chat/sessions/{session}/stop"), &json!({})).await.ok()
    }

    /// A new, empty session.
    pub async fn new_session(&self, body: Value) -> String {
        let session = self.post("/ai/chat/sessions", &body).await.data(201);
        session["id"].as_str().expect("a session id").to_owned()
    }

    /// The messages of the active path, oldest first.
    pub async fn messages(&self, session: &str) -> Vec<Value> {
        let page = self.get(&format!("/ai/chat/sessions/{session}/messages?limit=100")).await.ok();
        page["messages"].as_array().expect("messages").clone()
    }

    /// Waits until a session's newest message is no longer being written, and returns it.
    #[track_caller]
    pub fn finished_message(&self, session: &str) -> impl Future<Output = Value> {
        wait_until(PATIENCE, "the answer to be saved", move || async move {
            let newest = self.messages(session).await.pop()?;
            (newest["role"] == "assistant" && newest["status"] != "streaming").then_some(newest)
        })
    }

    /// Has an answer of `model` for which the provider reports this usage (prompt, completion).
    pub async fn spend(&self, model: &str, usage: (u64, u64)) -> Value {
        let script = provider().script(Reply::happy(&["花"], usage));
        self.ask(json!({"message": script.message("花"), "options": {"model": model, "maxTokens": usage.1.max(1)}})).await
    }

    /// Recharges a user's `total` limit, as an administrator.
    pub async fn recharge(&self, user: &User, amount: u64, order: &str) -> Answer {
        let body = json!({"userId": user.id, "amount": amount, "orderId": order});
        self.post("/ai/quota/recharge", &body).await
    }

    /// Sets a user's limit, as an administrator.
    pub async fn set_limit(&self, user: &User, kind: &str, tokens: u64) {
        let body = json!({"totalQuota": tokens, "quotaType": kind});
        self.put(&format!("/admin/quota/{}", user.id), &body).await.ok();
    }

    /// Does something to a user that needs no words: `suspend`, `activate`, `reset`, `initialize`.
    pub async fn govern(&self, user: &User, act: &str) -> Value {
        self.post(&format!("/admin/quota/{}/{act}", user.id), &json!({})).await.ok()
    }

    /// Transactions by this query, newest first.
    pub async fn transactions(&self, query: &str) -> Vec<Value> {
        let rows = self.get(&format!("/ai/quota/transactions?{query}")).await.ok();
        rows.as_array().expect("an array").clone()
    }

    /// One quota type.
    pub async fn quota(&self, kind: &str) -> Quota {
        let value = self.get(&format!("/ai/quota?type={kind}")).await.ok();
        assert_eq!(value["quotaType"], kind);
        Quota::read(&value)
    }

    /// All three types.
    pub async fn quotas(&self) -> Vec<Quota> {
        let all = self.get("/ai/quota/all").await.ok();
        let all = all.as_array().expect("an array");
        let kinds: Vec<_> = all.iter().map(|quota| quota["quotaType"].as_str().expect("quotaType")).collect();
        assert_eq!(kinds, QUOTA_TYPES, "the three types");
        all.iter().map(Quota::read).collect()
    }

    /// Waits until nothing is held, and returns what was charged, which must be the same for all types.
    pub async fn charged(&self) -> i64 {
        let quotas = wait_until(PATIENCE, "every hold to be resolved", || async {
            let quotas = self.quotas().await;
            quotas.iter().all(|quota| quota.reserved == 0).then_some(quotas)
        });
        let quotas = quotas.await;
        assert!(quotas.iter().all(|quota| quota.used == quotas[0].used), "one charge for all types: {quotas:?}");
        quotas[0].used
    }
}

/// Prompt, completion and total of the `usage` in an answer.
#[track_caller]
pub fn usage_of(value: &Value) -> [i64; 3] {
    let count = |key: &str| value["usage"][key].as_i64().unwrap_or_else(|| panic!("usage.{key} in {value}"));
    ["prompt_tokens", "completion_tokens", "total_tokens"].map(count)
}

/// A string field that must be there.
#[track_caller]
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} in {value}"))
}
