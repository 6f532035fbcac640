//! A fault-injecting OpenAI-compatible provider: a TCP server that writes HTTP/1.1 by hand, because the faults worth
//! testing (a byte per write, a missing last chunk, a reset) are below what an HTTP library lets one say.
//!
//! Many tests share one provider and several Workers at once, so a test's script is chosen by a marker that its newest
//! user message carries, never by order of arrival. What the provider saw of each call is kept for the test to ask.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::reply::{Framing, Reply, Step};
use super::{unique, within};

const MARK_OPEN: &str = "[[script:";
const MARK_CLOSE: &str = "]]";

/// The server. Dropping it does not stop it: it lives as long as the test process.
pub struct Provider {
    /// What goes into `LLM_BASE_URL`.
    pub base_url: String,
    scripts: Arc<Scripts>,
}

type Scripts = Mutex<HashMap<String, Arc<Script>>>;

/// What one test told the provider to do, and what came of it.
pub struct Script {
    marker: String,
    /// The n-th call gets the n-th reply; the last one repeats.
    replies: Vec<Reply>,
    gate: Semaphore,
    calls: watch::Sender<Vec<Arc<Call>>>,
}

/// One request as it arrived, and how its answer went.
pub struct Call {
    /// Header names in lower case.
    pub headers: HashMap<String, String>,
    /// The parsed JSON body.
    pub body: Value,
    written: AtomicUsize,
    end: watch::Sender<Option<End>>,
}

/// How the answer to a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every step was written.
    Finished,
    /// The client closed the connection first.
    ClientGone,
}

impl Provider {
    /// Listens on a free port of the loopback interface.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free loopback port");
        let base_url = format!("http://{}/v1", listener.local_addr().expect("a bound socket"));
        let scripts = Arc::new(Scripts::default());
        let known = Arc::clone(&scripts);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, Arc::clone(&known)));
            }
        });
        Self { base_url, scripts }
    }

    /// Registers what every call that carries the script's marker shall get.
    pub fn script(&self, replies: impl Into<Vec<Reply>>) -> Arc<Script> {
        let script = Arc::new(Script {
            marker: unique(),
            replies: replies.into(),
            gate: Semaphore::new(0),
            calls: watch::Sender::new(Vec::new()),
        });
        assert!(!script.replies.is_empty(), "a script needs a reply");
        lock(&self.scripts).insert(script.marker.clone(), Arc::clone(&script));
        script
    }
}

impl Script {
    /// A user message that selects this script.
    pub fn message(&self, text: &str) -> String {
        format!("{text} {MARK_OPEN}{}{MARK_CLOSE}", self.marker)
    }

    /// Lets `count` more [`Step::Gate`]s pass.
    pub fn release(&self, count: usize) {
        self.gate.add_permits(count);
    }

    /// The calls received so far.
    pub fn calls(&self) -> Vec<Arc<Call>> {
        self.calls.borrow().clone()
    }

    /// The newest call, waiting for the first when there is none.
    pub async fn call(&self) -> Arc<Call> {
        self.nth_call(0).await
    }

    /// The call with this index, waiting for it to arrive.
    pub async fn nth_call(&self, index: usize) -> Arc<Call> {
        let mut calls = self.calls.subscribe();
        let calls = within(super::PATIENCE, "a call to the provider", calls.wait_for(|calls| calls.len() > index)).await;
        Arc::clone(&calls.expect("the script lives")[index])
    }
}

impl Call {
    /// How many body steps were written to the socket.
    pub fn written(&self) -> usize {
        self.written.load(Ordering::SeqCst)
    }

    /// The `messages` of the prompt as (role, content).
    pub fn prompt(&self) -> Vec<(String, String)> {
        let text = |message: &Value, key: &str| message[key].as_str().expect("a text").to_owned();
        let messages = self.body["messages"].as_array().expect("messages in the provider's request");
        messages.iter().map(|message| (text(message, "role"), text(message, "content"))).collect()
    }

    /// Waits for the answer's end, at most `limit`.
    pub async fn ended(&self, limit: Duration) -> End {
        let mut end = self.end.subscribe();
        let end = within(limit, "the provider's connection to end", end.wait_for(Option::is_some)).await;
        (*end.expect("the call lives")).expect("just waited for")
    }
}

async fn serve(socket: TcpStream, scripts: Arc<Scripts>) {
    // Each write must leave as it is: a fault of timing is lost in a gathered segment.
    let _ = socket.set_nodelay(true);
    let (mut from_client, mut to_client) = socket.into_split();
    let Some(request) = Inquiry::read(&mut from_client).await else { return };
    if request.line != "POST /v1/chat/completions HTTP/1.1" {
        let _ = to_client.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        return;
    }
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let script = marker_of(&body).and_then(|marker| lock(&scripts).get(&marker).cloned());
    let script = script.unwrap_or_else(|| Arc::new(Script::default_answer()));
    let call = Arc::new(Call { headers: request.headers, body, written: AtomicUsize::new(0), end: watch::Sender::new(None) });
    let mut index = 0;
    script.calls.send_modify(|calls| {
        index = calls.len();
        calls.push(Arc::clone(&call));
    });
    let reply = &script.replies[index.min(script.replies.len() - 1)];
    let end = tokio::select! {
        result = write_reply(reply, &script, &call, &mut to_client) => match result {
            Ok(()) => End::Finished,
            Err(_) => End::ClientGone,
        },
        () = gone(&mut from_client) => End::ClientGone,
    };
    call.end.send_replace(Some(end));
}

impl Script {
    fn default_answer() -> Self {
        Self {
            marker: String::new(),
            replies: vec![Reply::happy(&["Hello", " from", " the", " test", " provider."], (9, 5))],
            gate: Semaphore::new(0),
            calls: watch::Sender::new(Vec::new()),
        }
    }
}

/// The marker in the newest user message of a chat request.
fn marker_of(body: &Value) -> Option<String> {
    let newest = body["messages"].as_array()?.iter().rev().find(|message| message["role"] == "user")?;
    let (_, rest) = newest["content"].as_str()?.rsplit_once(MARK_OPEN)?;
    Some(rest.split_once(MARK_CLOSE)?.0.to_owned())
}

async fn write_reply(reply: &Reply, script: &Script, call: &Call, out: &mut OwnedWriteHalf) -> std::io::Result<()> {
    tokio::time::sleep(reply.before_headers).await;
    out.write_all(reply.head().as_bytes()).await?;
    for step in &reply.steps {
        match step {
            Step::Bytes(bytes) => out.write_all(&reply.frame(bytes)).await?,
            Step::Repeat { bytes, every } => loop {
                out.write_all(&reply.frame(bytes)).await?;
                tokio::time::sleep(*every).await;
            },
            Step::Pause(time) => tokio::time::sleep(*time).await,
            Step::Gate => script.gate.acquire().await.expect("the gate is never closed").forget(),
            Step::Hang => std::future::pending().await,
            Step::Truncate => return out.shutdown().await,
            Step::Reset => {
                out.as_ref().set_zero_linger()?;
                return Ok(());
            }
        }
        call.written.fetch_add(1, Ordering::SeqCst);
    }
    if reply.framing == Framing::Chunked {
        out.write_all(b"0\r\n\r\n").await?;
    }
    out.shutdown().await
}

/// Resolves when the client has closed its side or the connection broke.
async fn gone(from_client: &mut OwnedReadHalf) {
    let mut rest = [0; 1024];
    while let Ok(1..) = from_client.read(&mut rest).await {}
}

/// A request's head and body, read by hand for the same reason that answers are written so.
pub(super) struct Inquiry {
    /// Its first line.
    pub(super) line: String,
    /// Header names in lower case.
    pub(super) headers: HashMap<String, String>,
    /// The body's bytes.
    pub(super) body: Vec<u8>,
}

impl Inquiry {
    pub(super) async fn read(from_client: &mut OwnedReadHalf) -> Option<Self> {
        let mut input = Vec::new();
        let head_end = loop {
            if let Some(at) = find(&input, b"\r\n\r\n") {
                break at;
            }
            more(from_client, &mut input).await?;
        };
        let head = String::from_utf8(input.drain(..head_end + 4).collect()).ok()?;
        let mut lines = head.lines();
        let line = lines.next()?.to_owned();
        let headers: HashMap<_, _> = lines
            .filter_map(|header| header.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let chunked = headers.get("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let body = if chunked {
            read_chunked(from_client, input).await?
        } else {
            let length: usize = headers.get("content-length").map_or(Some(0), |value| value.parse().ok())?;
            while input.len() < length {
                more(from_client, &mut input).await?;
            }
            input
        };
        Some(Self { line, headers, body })
    }
}

async fn read_chunked(from_client: &mut OwnedReadHalf, mut input: Vec<u8>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let Some(line_end) = find(&input, b"\r\n") else {
            more(from_client, &mut input).await?;
            continue;
        };
        let size = usize::from_str_radix(std::str::from_utf8(&input[..line_end]).ok()?.trim(), 16).ok()?;
        while input.len() < line_end + 2 + size + 2 {
            more(from_client, &mut input).await?;
        }
        body.extend_from_slice(&input[line_end + 2..line_end + 2 + size]);
        input.drain(..line_end + 2 + size + 2);
        if size == 0 {
            return Some(body);
        }
    }
}

async fn more(from_client: &mut OwnedReadHalf, input: &mut Vec<u8>) -> Option<()> {
    matches!(from_client.read_buf(input).await, Ok(1..)).then_some(())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

mod tests {
    use super::*;
    use crate::support::{provider, run};
    use serde_json::json;

    async fn ask(message: &str) -> reqwest::Result<reqwest::Response> {
        let body = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": message}]});
        let url = format!("{}/chat/completions", provider().base_url);
        reqwest::Client::new().post(url).json(&body).send().await
    }

    #[test]
    fn unknown_markers_get_a_short_happy_answer() {
        run(async {
            let text = ask("hello [[script:nobody]]").await.unwrap().text().await.unwrap();
            assert!(text.contains(r#""delta":{"content":"Hello"}"#), "{text}");
            assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        });
    }

    #[test]
    fn a_script_answers_by_marker_in_order_and_records_its_calls() {
        run(async {
            let script = provider().script([Reply::status(429).header("Retry-After", "7"), Reply::happy(&["x"], (1, 1))]);
            let refused = ask(&script.message("one")).await.unwrap();
            assert_eq!(refused.status(), 429);
            assert_eq!(refused.headers()["retry-after"], "7");
            for _ in 0..2 {
                assert_eq!(ask(&script.message("again")).await.unwrap().status(), 200);
            }
            assert_eq!(script.calls().len(), 3);
            assert_eq!(script.nth_call(1).await.prompt()[0].1, script.message("again"));
            assert_eq!(script.call().await.ended(super::super::PATIENCE).await, End::Finished);
        });
    }

    #[test]
    fn a_gate_holds_the_answer_and_a_leaving_client_is_seen() {
        run(async {
            let script = provider().script([Reply::happy(&["a", "b"], (1, 1)).step_after_delta(1, Step::Gate)]);
            let mut response = ask(&script.message("x")).await.unwrap();
            let mut seen = String::new();
            while !seen.contains("\"a\"") {
                seen.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
            }
            assert!(!seen.contains("\"b\""), "{seen}");
            let call = script.call().await;
            assert_eq!(call.written(), 2, "the role chunk and the first delta");
            drop(response);
            assert_eq!(call.ended(super::super::PATIENCE).await, End::ClientGone);
        });
    }

    #[test]
    fn broken_ends_look_broken() {
        run(async {
            for step in [Step::Reset, Step::Truncate] {
                let script = provider().script([Reply::happy(&["a"], (1, 1)).step_after_delta(1, step)]);
                let body = ask(&script.message("x")).await.unwrap().text().await;
                assert!(body.is_err(), "a cut body is an error for an HTTP client: {body:?}");
            }
        });
    }

    #[test]
    fn gzip_and_single_bytes_arrive_as_sent() {
        run(async {
            let plain = provider().script([Reply::happy(&["墨", "🖋"], (1, 1)).single_bytes()]);
            let text = ask(&plain.message("x")).await.unwrap().text().await.unwrap();
            assert!(text.contains("墨") && text.contains("🖋"), "{text}");
            let packed = provider().script([Reply::happy(&["墨"], (1, 1)).gzip()]);
            let response = ask(&packed.message("x")).await.unwrap();
            assert_eq!(response.headers()["content-encoding"], "gzip");
            let bytes = response.bytes().await.unwrap();
            let mut unpacked = String::new();
            std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut unpacked).unwrap();
            assert!(unpacked.contains("墨"), "{unpacked}");
        });
    }
}
