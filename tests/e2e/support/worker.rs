//! Starts the real Worker: `wrangler dev` from the checkout over what `make build` left, with state and port of its own.
//! Most tests share one; those that need a special configuration, or kill it, start their own.
//!
//! Nothing may outlive the tests, however they end. Statics are never dropped and a killed process drops nothing, so each
//! wrangler is started by a small shell that waits on a pipe from us: when the pipe closes it ends wrangler's process
//! group and removes its files.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::json;
use tokio::sync::OnceCell;

use super::client::User;
use super::{PATIENCE, provider, token, wait_until};

/// How long `wrangler dev` may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(60);

/// `$1` log, `$2` the folder to remove at the end, the rest the command. Says the group's id first, then waits.
const KEEPER: &str = r#"
set -m
log=$1; folder=$2; shift 2
"$@" </dev/null >>"$log" 2>&1 &
echo $!
read -r word
kill -9 -- -$! 2>/dev/null
[ "$word" = keep ] || rm -rf -- "$folder"
"#;

/// The catalogue of the Workers under test.
pub fn models() -> serde_json::Value {
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

/// The shell that ends wrangler's process group when its standard input closes.
struct Keeper {
    shell: Child,
    group: u32,
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
        for needed in ["build/index.js", "node_modules/.bin/wrangler"] {
            assert!(root.join(needed).exists(), "{needed} is missing: run `make build` first");
        }
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

    /// A new user of this Worker.
    pub fn user(&self, role: &str) -> User {
        User::new(&self.origin, role)
    }

    /// Everything wrangler and the Worker have printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Kills workerd by SIGKILL and then what is left of wrangler: no chance for anyone to tidy up.
    pub fn kill_9(&self) {
        let keeper = self.keeper.lock().expect("no holder panics").take().expect("a running Worker");
        let victims = processes(keeper.group, "workerd");
        assert!(!victims.is_empty(), "no workerd in wrangler's group");
        signal_9(&victims);
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
        let keeper = Keeper::start(&self.log_path(), &self.folder, &arguments);
        *self.keeper.lock().expect("no holder panics") = Some(keeper);

        let http = reqwest::Client::new();
        let health = format!("{}/api/v1/ai/health", self.origin);
        let serving = wait_until(START_LIMIT, "the Worker's health route", || async {
            let answer = http.get(&health).timeout(Duration::from_secs(5)).send().await.ok()?;
            (answer.status() == 200).then_some(())
        });
        if tokio::time::timeout(START_LIMIT - Duration::from_secs(1), serving).await.is_err() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            panic!("the Worker did not start:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Ok(Some(keeper)) = self.keeper.get_mut().map(Option::take) {
            keeper.end(false);
        }
    }
}

impl Keeper {
    fn start(log: &Path, folder: &Path, wrangler: &[&str]) -> Self {
        let mut shell = Command::new("bash")
            .args(["-c", KEEPER, "keeper"])
            .args([log, folder])
            .arg("wrangler")
            .args(wrangler)
            .envs(wrangler_environment(folder))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash");
        let mut line = String::new();
        let stdout = shell.stdout.take().expect("a piped stdout");
        BufReader::new(stdout).read_line(&mut line).expect("the keeper's first line");
        Self { shell, group: line.trim().parse().expect("a process id") }
    }

    /// Ends the group; with `keep` its files stay, for a restart.
    fn end(mut self, keep: bool) {
        let mut stdin = self.shell.stdin.take().expect("a piped stdin");
        if keep {
            let _ = stdin.write_all(b"keep\n");
        }
        drop(stdin);
        let _ = self.shell.wait();
        // A killed process holds its port until the kernel has taken it down.
        while !processes(self.group, "").is_empty() {
            std::thread::yield_now();
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
    ];
    let mut variables: Vec<_> = usual.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    for (name, value) in changes {
        variables.retain(|(known, _)| known != name);
        variables.push(((*name).to_owned(), (*value).to_owned()));
    }
    variables
}

/// State with the migrations applied, made once and copied for every Worker.
async fn template_state() -> PathBuf {
    static TEMPLATE: OnceCell<tempfile::TempDir> = OnceCell::const_new();
    let template = TEMPLATE.get_or_init(|| async {
        let folder = tempfile::Builder::new().prefix("inkstone-e2e-template-").tempdir().expect("a temporary folder");
        let migrating = tokio::process::Command::new("wrangler")
            .args(["d1", "migrations", "apply", "DB", "--local", "--persist-to"])
            .arg(folder.path())
            .envs(wrangler_environment(folder.path()))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = super::within(PATIENCE, "the migrations", migrating).await.expect("wrangler runs");
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "migrations failed: {} {printed}", String::from_utf8_lossy(&output.stdout));
        folder
    });
    template.await.path().to_owned()
}

/// wrangler asks `PATH` for node and must find ours, and must neither phone home nor write beside other runs' files.
fn wrangler_environment(folder: &Path) -> [(&'static str, std::ffi::OsString); 11] {
    let root = || Path::new(env!("CARGO_MANIFEST_DIR")).join("node_modules/.bin");
    let bin = std::env::var_os("INKSTONE_NODE_BIN").map_or_else(root, PathBuf::from);
    let old = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(bin).chain(std::env::split_paths(&old))).expect("a PATH");
    [
        ("PATH", path),
        ("CI", "1".into()),
        ("NO_COLOR", "1".into()),
        ("WRANGLER_SEND_METRICS", "false".into()),
        ("WRANGLER_HIDE_BANNER", "true".into()),
        ("WRANGLER_WRITE_LOGS", "false".into()),
        ("CLOUDFLARE_CF_FETCH_ENABLED", "false".into()),
        ("CLOUDFLARE_LOAD_DEV_VARS_FROM_DOT_ENV", "false".into()),
        ("X_LOCAL_EXPLORER", "false".into()),
        ("X_LOCAL_OBSERVABILITY", "false".into()),
        ("WRANGLER_REGISTRY_PATH", folder.join("registry").into()),
    ]
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

/// The living processes of a group whose name ends so.
fn processes(group: u32, name: &str) -> Vec<u32> {
    let output = Command::new("ps").args(["-A", "-o", "pid=,pgid=,stat=,comm="]).output().expect("ps");
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let matching = listed.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (pid, pgid, state, command) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let found = pgid.parse() == Ok(group) && !state.starts_with('Z') && command.ends_with(name);
        found.then(|| pid.parse().ok())?
    });
    matching.collect()
}

fn signal_9(processes: &[u32]) {
    let ids = processes.iter().map(u32::to_string);
    let status = Command::new("kill").arg("-9").args(ids).status().expect("kill");
    assert!(status.success(), "kill -9 {processes:?}");
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-R").args([from, to]).status().expect("cp");
    assert!(status.success(), "cp -R {} {}", from.display(), to.display());
}
