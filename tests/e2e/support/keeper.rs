//! Starts a program that may not outlive the tests, however they end. Statics are never dropped and a killed process drops
//! nothing, so a small shell starts the program and waits on a pipe from us: when the pipe closes, it ends the program's
//! process group and removes its files.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// `$1` log, `$2` the folder to remove at the end, the rest the command. Says the group's id first, then waits.
const SCRIPT: &str = r#"
set -m
log=$1; folder=$2; shift 2
"$@" </dev/null >>"$log" 2>&1 &
echo $!
read -r word
kill -9 -- -$! 2>/dev/null
[ "$word" = keep ] || rm -rf -- "$folder"
"#;

/// The shell around one program.
pub struct Keeper {
    shell: Child,
    group: u32,
}

impl Keeper {
    /// Starts the program in a process group of its own; what it prints is added to `log`, and `folder` goes with it.
    pub fn start(program: &Command, log: &Path, folder: &Path) -> Self {
        let mut shell = Command::new("bash");
        shell.args(["-c", SCRIPT, "keeper"]).args([log, folder]).arg(program.get_program()).args(program.get_args());
        shell.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(folder) = program.get_current_dir() {
            shell.current_dir(folder);
        }
        // A group of its own also for the shell: Ctrl-C at the terminal must not end it before it has tidied up.
        let mut shell = shell.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("bash");
        let mut line = String::new();
        let stdout = shell.stdout.take().expect("a piped stdout");
        BufReader::new(stdout).read_line(&mut line).expect("the keeper's first line");
        Self { shell, group: line.trim().parse().expect("a process id") }
    }

    /// Kills the processes of this name in the group, which must exist.
    pub fn kill_9(&self, name: &str) {
        let victims = processes(self.group, name);
        assert!(!victims.is_empty(), "no {name} in the group");
        let status = Command::new("kill").arg("-9").args(victims.iter().map(u32::to_string)).status().expect("kill");
        assert!(status.success(), "kill -9 {victims:?}");
    }

    /// Ends the group; with `keep` its files stay, for a restart.
    pub fn end(mut self, keep: bool) {
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
