//! The platform's side of `NOTIFY_WEBHOOK_URL`: takes what the Workers send, keeps it by user, and fails on command.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};

use super::provider::{Inquiry, lock};

/// The path and query that the Workers are told to call: both are signed.
pub const PATH: &str = "/hooks/quota?from=inkstone";

/// The receiver. It lives as long as the test process.
pub struct Webhook {
    /// What goes into `NOTIFY_WEBHOOK_URL`.
    pub url: String,
    inbox: Arc<Inbox>,
}

type Inbox = Mutex<HashMap<String, Post>>;

/// What came for one user.
#[derive(Default)]
struct Post {
    refusals: usize,
    deliveries: Vec<Arc<Delivery>>,
}

/// One request as it arrived.
pub struct Delivery {
    /// Method and path, as in the request line.
    pub line: String,
    /// Header names in lower case.
    pub headers: HashMap<String, String>,
    /// The body's bytes.
    pub body: Vec<u8>,
    /// The body as JSON.
    pub json: Value,
    /// What it was answered with.
    pub status: u16,
}

impl Webhook {
    /// Listens on a free port of the loopback interface.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free loopback port");
        let url = format!("http://{}{PATH}", listener.local_addr().expect("a bound socket"));
        let inbox = Arc::new(Inbox::default());
        let kept = Arc::clone(&inbox);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(take(socket, Arc::clone(&kept)));
            }
        });
        Self { url, inbox }
    }

    /// Answers the next `count` deliveries for this user with 500.
    pub fn refuse(&self, user: &str, count: usize) {
        lock(&self.inbox).entry(user.to_owned()).or_default().refusals = count;
    }

    /// What came for this user so far.
    pub fn deliveries(&self, user: &str) -> Vec<Arc<Delivery>> {
        lock(&self.inbox).get(user).map(|post| post.deliveries.clone()).unwrap_or_default()
    }
}

async fn take(socket: TcpStream, inbox: Arc<Inbox>) {
    let (mut from_client, mut to_client) = socket.into_split();
    let Some(Inquiry { line, headers, body }) = Inquiry::read(&mut from_client).await else { return };
    let json: Value = serde_json::from_slice(&body).unwrap_or_default();
    let status = {
        let mut inbox = lock(&inbox);
        let post = inbox.entry(json["userId"].as_str().unwrap_or_default().to_owned()).or_default();
        let status = if post.refusals > 0 { 500 } else { 204 };
        post.refusals = post.refusals.saturating_sub(1);
        post.deliveries.push(Arc::new(Delivery { line, headers, body, json, status }));
        status
    };
    let answer = format!("HTTP/1.1 {status} Taken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let _ = to_client.write_all(answer.as_bytes()).await;
}
