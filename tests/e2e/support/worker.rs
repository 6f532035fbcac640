//! Starts the real Worker: `wrangler dev` from the checkout over what `make build` left, with state and port of its own.
//! Most tests share one; those that need a special configuration, or kill it, start their own.
//!
//! The configuration is complete, so that neither `.dev.vars` nor the defaults of `wrangler.toml` decide a test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;

use super::client::User;
use super::keeper::Keeper;
use super::{PATIENCE, provider, service, token, wait_until, webhook, within};

/// How long `wrangler dev` may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Set when a Worker failed to start, so that not every test waits for that again.
static GAVE_UP: AtomicBool = AtomicBool::new(false);

/// The catalogue of the Workers under test.
pub fn models() -> Value {
    json!([
        {"id": "test-model", "contextWindow": 8192, "maxOutput": 1024, "inputPrice": 0.1, "outputPrice": 0.2},
        {"id": "other-model", "upstream": "other-upstream", "contextWindow": 16384, "maxOutput": 4096,
         "inputPrice": 30, "outputPrice": 60},
        {"id": "small-model", "contextWindow": 1024, "maxOutput": 256, "inputPrice": 1.5, "outputPrice": 2},
    ])
}

/// The provider key that nobody may ever see.
pub const PROVIDER_KEY: &str = "sk-e2e-provider-key-that-nobody-may-see";

/// An origin on the allowlist of the Workers under test.
pub const ORIGIN: &str = "https://write.example";

/// A running Worker with state of its own.
pub struct Worker {
    /// `http://127.0.0.1:PORT`.
    pub origin: String,
    port: u16,
    folder: PathBuf,
    variables: Vec<(String, String)>,
    keeper: Mutex<Option<Keeper>>,
}

impl Worker {
    /// The Worker that most tests share: the usual configuration, with time limits no test runs into by accident.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Worker> = OnceCell::const_new();
        SHARED.get_or_init(|| Self::start(&[])).await
    }

    /// A Worker that gives a silent provider up after three seconds and sends a heartbeat each second.
    pub async fn impatient() -> &'static Self {
        static IMPATIENT: OnceCell<Worker> = OnceCell::const_new();
        IMPATIENT.get_or_init(|| Self::start(&[("STREAM_IDLE_MS", "3000"), ("HEARTBEAT_MS", "1000")])).await
    }

    /// A Worker whose holds lapse after five seconds unless they are renewed, and whose day begins earliest on earth.
    pub async fn hasty() -> &'static Self {
        static HASTY: OnceCell<Worker> = OnceCell::const_new();
        HASTY.get_or_init(|| Self::start(&[("HOLD_TTL_S", "5"), ("QUOTA_UTC_OFFSET", "+14:00")])).await
    }

    /// A Worker whose provider refuses connections and whose tokens must name issuer and audience.
    pub async fn strict() -> &'static Self {
        static STRICT: OnceCell<Worker> = OnceCell::const_new();
        let variables = [
            // Port 9 is discard, where nobody listens.
            ("LLM_BASE_URL", "http://127.0.0.1:9/v1"),
            ("JWT_ISSUER", "https://platform.example"),
            ("JWT_AUDIENCE", "inkstone"),
        ];
        STRICT.get_or_init(|| async move { Self::start(&variables).await }).await
    }

    /// Starts one with these variables changed or added.
    pub async fn start(changes: &[(&str, &str)]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for needed in ["build/index.js", "node_modules/wrangler"] {
            assert!(root.join(needed).exists(), "{needed} is missing: run `make build` first");
        }
        assert!(!GAVE_UP.load(Ordering::SeqCst), "a Worker did not start: see the test that says why");
        let folder = tempfile::Builder::new().prefix("inkstone-e2e-").tempdir().expect("a temporary folder").keep();
        std::fs::write(folder.join("empty.env"), "").expect("a writable folder");
        copy(&template_state().await, &folder.join("state"));
        let port = free_port();
        let worker = Self {
            origin: format!("http://127.0.0.1:{port}"),
            port,
            folder,
            variables: variables(changes),
            keeper: Mutex::new(None),
        };
        worker.run().await;
        worker
    }

    /// A new user of the shared Worker.
    pub async fn anyone() -> User {
        Self::shared().await.user("writer")
    }

    /// A new user of this Worker.
    pub fn user(&self, role: &str) -> User {
        User::new(&self.origin, role)
    }

    /// Where `--persist-to` keeps what it keeps: folders `d1` and `do`.
    pub fn state(&self) -> PathBuf {
        self.folder.join("state/v3")
    }

    /// Everything wrangler and the Worker have printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Kills workerd by SIGKILL and then what is left of wrangler: no chance for anyone to tidy up.
    pub fn kill_9(&self) {
        let keeper = self.keeper.lock().expect("no holder panics").take().expect("a running Worker");
        keeper.kill_9("workerd");
        keeper.end(true);
    }

    /// Starts wrangler again after [`Worker::kill_9`], on the same state and port.
    pub async fn restart(&self) {
        self.run().await;
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("log")
    }

    async fn run(&self) {
        let path = |name: &str| self.folder.join(name).into_os_string().into_string().expect("a UTF-8 path");
        let port = self.port.to_string();
        let (state, empty) = (path("state"), path("empty.env"));
        let mut arguments = vec!["dev", "--ip", "127.0.0.1", "--port", &port, "--inspector-port", "0"];
        arguments.extend(["--show-interactive-dev-session=false", "--persist-to", &state, "--env-file", &empty]);
        let variables: Vec<_> = self.variables.iter().map(|(name, value)| format!("{name}:{value}")).collect();
        arguments.extend(variables.iter().flat_map(|variable| ["--var", variable]));
        let mut wrangler = wrangler(&self.folder);
        wrangler.args(arguments);
        let keeper = Keeper::start(&wrangler, &self.log_path(), &self.folder);
        *self.keeper.lock().expect("no holder panics") = Some(keeper);

        let http = reqwest::Client::new();
        let health = format!("{}/api/v1/ai/health", self.origin);
        let serving = wait_until(START_LIMIT, "the Worker's health route", || async {
            let answer = http.get(&health).timeout(Duration::from_secs(5)).send().await.ok()?;
            (answer.status() == 200).then_some(())
        });
        if tokio::time::timeout(START_LIMIT - Duration::from_secs(1), serving).await.is_err() {
            GAVE_UP.store(true, Ordering::SeqCst);
            panic!("the Worker did not start:\n{}", self.log_tail());
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of this test's own Worker ends so:\n{}", self.log_tail());
        }
        if let Ok(Some(keeper)) = self.keeper.get_mut().map(Option::take) {
            keeper.end(false);
        }
    }
}

/// The variables of every Worker under test, with `changes` applied.
fn variables(changes: &[(&str, &str)]) -> Vec<(String, String)> {
    let rates = json!({
        "generate": {"burst": 100_000, "perSecond": 10_000, "concurrent": 1000},
        "read": {"burst": 100_000, "perSecond": 10_000},
    });
    let usual = [
        ("JWT_SECRET", token::SECRET.to_owned()),
        ("JWT_JWKS", token::jwks().to_string()),
        ("LLM_BASE_URL", provider().base_url.clone()),
        ("LLM_API_KEY", PROVIDER_KEY.to_owned()),
        ("LLM_MODELS", models().to_string()),
        ("DEFAULT_MODEL", "test-model".to_owned()),
        ("ALLOWED_ORIGINS", format!("{ORIGIN},http://localhost:5173")),
        ("STREAM_IDLE_MS", "60000".to_owned()),
        ("HEARTBEAT_MS", "15000".to_owned()),
        ("HOLD_TTL_S", "600".to_owned()),
        ("RATE_LIMITS", rates.to_string()),
        ("SERVICE_KEYS", service::keys().to_string()),
        ("NOTIFY_WEBHOOK_URL", webhook().url.clone()),
    ];
    let mut variables: Vec<_> = usual.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    for (name, value) in changes {
        variables.retain(|(known, _)| known != name);
        variables.push(((*name).to_owned(), (*value).to_owned()));
    }
    variables
}

/// State with the migrations applied. Kept among cargo's files from run to run, by what it is made of.
async fn template_state() -> PathBuf {
    static TEMPLATE: OnceCell<PathBuf> = OnceCell::const_new();
    let template = TEMPLATE.get_or_init(|| async {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("e2e-state-{}", ingredients()));
        if !kept.exists() {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder");
            migrate(folder.path()).await;
            // A second test process may have been faster, and its folder is as good.
            let _ = std::fs::rename(folder.path(), &kept);
        }
        kept
    });
    template.await.clone()
}

/// A fingerprint of everything that decides what a migrated state looks like.
fn ingredients() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let migrations = std::fs::read_dir(root.join("migrations")).expect("migrations/");
    let mut files: Vec<_> = migrations.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files.extend(["wrangler.toml", "package.json"].map(|name| root.join(name)));
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.as_os_str().as_encoded_bytes());
        hash.update(std::fs::read(&file).expect("a readable file"));
    }
    hex::encode(&hash.finalize()[..8])
}

async fn migrate(folder: &Path) {
    let mut migrating = tokio::process::Command::from(wrangler(folder));
    migrating.args(["d1", "migrations", "apply", "DB", "--local", "--persist-to"]).arg(folder);
    let output = migrating.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = within(PATIENCE, "the migrations", output).await.expect("wrangler runs");
    let printed = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "migrations failed: {}", String::from_utf8_lossy(&printed));
}

/// The project's own wrangler, with the variables its script sets; `registry` keeps Workers of the same name apart.
fn wrangler(registry: &Path) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrangler = Command::new(root.join("tools/wrangler"));
    wrangler.env("NO_COLOR", "1").env("WRANGLER_REGISTRY_PATH", registry.join("registry")).current_dir(root);
    wrangler
}

/// A port that nothing listens on, below the range from which outgoing connections take theirs: a restart needs it again.
fn free_port() -> u16 {
    let mut bytes = [0; 2];
    loop {
        getrandom::fill(&mut bytes).expect("the system's random bytes");
        let port = 20_000 + u16::from_le_bytes(bytes) % 12_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-R").args([from, to]).status().expect("cp");
    assert!(status.success(), "cp -R {} {}", from.display(), to.display());
}
