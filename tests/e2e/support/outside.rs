//! The SQLite files of a Worker's state, read and changed from outside, while workerd runs or between a kill and a restart.
//! So a test takes D1 away, breaks one ledger, or sees what no route shows; the Worker ships no switch for any of it.
//!
//! python3 does it (`tools/setup` asks for it anyway), because a SQLite library would be one more to build.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use super::worker::Worker;
use super::{PATIENCE, within};

/// `$1` a folder, `$2` the name of the object in it (empty: whichever is there), the rest statements. Prints the last one's rows.
const SCRIPT: &str = r#"
import glob, json, sqlite3, sys
folder, name, *statements = sys.argv[1:]
for path in glob.glob(folder + "/*.sqlite"):
    if path.endswith("/metadata.sqlite"):
        continue
    db = sqlite3.connect(path, timeout=30, isolation_level=None)
    db.row_factory = sqlite3.Row
    if name and [row[0] for row in db.execute("SELECT name FROM __miniflare_do_name")] != [name]:
        continue
    for statement in statements:
        rows = [dict(row) for row in db.execute(statement)]
    json.dump(rows, sys.stdout)
    sys.exit()
sys.exit(f"nothing in {folder} is {name!r}")
"#;

impl Worker {
    /// What D1 answers to a statement, as rows. The Worker does not notice.
    pub async fn d1(&self, statement: &str) -> Vec<Value> {
        execute(&self.state().join("d1/miniflare-D1DatabaseObject"), "", &[statement]).await
    }

    /// The same for several statements, of which the last one's rows are answered.
    pub async fn d1_all(&self, statements: &[&str]) -> Vec<Value> {
        execute(&self.state().join("d1/miniflare-D1DatabaseObject"), "", statements).await
    }

    /// What the database of a user's ledger answers to a statement.
    pub async fn ledger(&self, user: &str, statement: &str) -> Vec<Value> {
        execute(&self.state().join("do/inkstone-QuotaLedger"), user, &[statement]).await
    }

    /// What the database of a user's session answers to a statement.
    pub async fn session(&self, user: &str, session: &str, statement: &str) -> Vec<Value> {
        execute(&self.state().join("do/inkstone-ChatSession"), &format!("{user}/{session}"), &[statement]).await
    }
}

async fn execute(folder: &Path, name: &str, statements: &[&str]) -> Vec<Value> {
    let mut python = tokio::process::Command::new("python3");
    python.args(["-I", "-c", SCRIPT]).arg(folder).arg(name).args(statements).stdin(Stdio::null()).kill_on_drop(true);
    let output = within(PATIENCE, "SQLite from outside", python.output()).await.expect("python3 runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{statements:?}: {complaint}");
    serde_json::from_slice(&output.stdout).expect("rows")
}
