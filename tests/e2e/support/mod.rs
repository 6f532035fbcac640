//! What every end-to-end test stands on: the real Worker under `wrangler dev`, a provider that fails on command, tokens,
//! and a client. Workers, provider and HTTP connections outlive a single test, so all tests run on one runtime.

pub mod api;
pub mod client;
pub mod keeper;
pub mod outside;
pub mod provider;
pub mod reply;
pub mod service;
pub mod sse;
pub mod token;
pub mod webhook;
pub mod worker;

use std::future::Future;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use provider::Provider;
use webhook::Webhook;

/// How long anything may take that has no bound of its own: the machine is small, shared and noisy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A test that takes longer than this hangs.
const TEST_LIMIT: Duration = Duration::from_secs(240);

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().expect("a runtime")
});

/// Runs one test on the shared runtime, with a limit on its time.
pub fn run(test: impl Future<Output = ()>) {
    RUNTIME.block_on(within(TEST_LIMIT, "the test", test));
}

/// The provider that all Workers of this process are pointed at.
pub fn provider() -> &'static Provider {
    static PROVIDER: OnceLock<Provider> = OnceLock::new();
    PROVIDER.get_or_init(|| start(Provider::start()))
}

/// Where all Workers of this process send their notifications.
pub fn webhook() -> &'static Webhook {
    static WEBHOOK: OnceLock<Webhook> = OnceLock::new();
    WEBHOOK.get_or_init(|| start(Webhook::start()))
}

/// Starts a server on the shared runtime. `block_on` may not be nested and tests call this from inside it, hence the thread.
fn start<S: Send>(server: impl Future<Output = S> + Send) -> S {
    std::thread::scope(|scope| scope.spawn(|| RUNTIME.block_on(server)).join().expect("the server starts"))
}

/// Awaits `what`, failing the test with its name after `limit`.
#[track_caller]
pub fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(limit, future).await {
            Ok(value) => value,
            Err(_) => panic!("{caller}: waited {limit:?} for {what}"),
        }
    }
}

/// Asks again and again until `condition` gives a value.
#[track_caller]
pub fn wait_until<T, F: Future<Output = Option<T>>>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) -> impl Future<Output = T> {
    within(limit, what, async move {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

/// A name that nothing else in any run has.
pub fn unique() -> String {
    let mut bytes = [0; 12];
    getrandom::fill(&mut bytes).expect("the system's random bytes");
    hex::encode(bytes)
}
