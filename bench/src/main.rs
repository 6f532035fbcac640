//! Measures systems that stand between a client and a provider, and prints a Markdown report.
//!
//! On a shared machine absolute numbers wander, so the systems take turns within every round: a ratio is taken inside a
//! round, and the median over the rounds is what counts. Every answer is checked to be whole; one that is not ends it all.
//!
//! Called by bench/run, which starts what is measured:
//! `--gap MICROSECONDS` (between the provider's chunks), `--provider PORT`, `--system NAME=KIND=GROUP=HOST:PORT/PATH`
//! (once per system, GROUP being its processes or 0; the second is what the others are compared with), `--tokens FILE`
//! (one user a line), `--sessions SIZE=ID` (of the last user), `--rounds N`, `--report FILE`, `--fact LINE`.

#![allow(clippy::disallowed_methods, reason = "the root's clippy.toml forbids Instant::now for WASM's sake")]

mod client;
mod provider;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use client::{Answer, Client};
use provider::CHUNKS;

/// Virtual clients at once, and how long one system is measured with so many in one round.
const LEVELS: [(usize, Duration); 3] =
    [(1, Duration::from_millis(2_000)), (8, Duration::from_millis(2_500)), (32, Duration::from_millis(3_500))];
/// Turns taken in every session of the growth table.
const TURNS: usize = 24;
/// The goals (issue 2): requests/s as a multiple of the relay's, and how much later the first event may come, ms.
const GOAL_RATE: (usize, f64) = (8, 1.5);
const GOAL_FIRST: (usize, f64) = (1, 10.0);

const CHAT: &str = "/api/v1/ai/chat/stream";

/// What a system is sent and how its answers are checked.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// The provider's own protocol.
    Plain,
    /// Inkstone; every request makes a session.
    Fresh,
    /// Inkstone; a client stays in its session.
    Existing,
}

struct System {
    name: String,
    kind: Kind,
    /// Its process group: what it costs.
    group: String,
    host: String,
    path: String,
    /// The sessions of the virtual clients, where they stay in theirs.
    sessions: Mutex<Vec<Option<String>>>,
}

impl System {
    fn parse(text: &str) -> Option<Self> {
        let (name, rest) = text.split_once('=')?;
        let (kind, rest) = rest.split_once('=')?;
        let (group, url) = rest.split_once('=')?;
        let (host, path) = url.split_once('/')?;
        let kind = match kind {
            "plain" => Kind::Plain,
            "fresh" => Kind::Fresh,
            "existing" => Kind::Existing,
            _ => return None,
        };
        let path = format!("/{path}");
        let (name, group) = (name.to_owned(), group.to_owned());
        Some(Self { name, kind, group, host: host.to_owned(), path, sessions: Mutex::default() })
    }

    /// Processor time its processes have used so far, ms; `None` where there is no /proc.
    fn cpu(&self) -> Option<f64> {
        let stats = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // After the name in parentheses: state, parent, group, …, user and system time in hundredths of a second.
            let fields: Vec<String> = stat.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect();
            (fields[2] == self.group).then(|| Some(fields[11].parse::<f64>().ok()? + fields[12].parse::<f64>().ok()?))?
        });
        Some(stats.sum::<f64>() * 10.0)
    }
}

/// What one system did in one round with so many clients.
#[derive(Default)]
struct Cell {
    rate: f64,
    /// Processor time for one answer, ms; not a number where it is not known.
    cpu: f64,
    first: Vec<f64>,
    total: Vec<f64>,
}

struct Options {
    systems: Vec<System>,
    tokens: Vec<String>,
    sessions: Vec<(String, String)>,
    rounds: usize,
    report: String,
    facts: Vec<String>,
}

fn main() {
    let result = options().and_then(|options| {
        let text = measure(&options)?;
        std::fs::write(&options.report, &text).map_err(|e| e.to_string())?;
        print!("{text}");
        Ok(())
    });
    if let Err(why) = result {
        eprintln!("bench: {why}");
        std::process::exit(1);
    }
}

fn options() -> Result<Options, String> {
    let mut gap = Duration::ZERO;
    let mut options =
        Options { systems: vec![], tokens: vec![], sessions: vec![], rounds: 5, report: String::new(), facts: vec![] };
    let mut arguments = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        let wrong = || format!("{name} {value}?");
        match name.as_str() {
            "--gap" => gap = Duration::from_micros(value.parse().map_err(|_| wrong())?),
            "--provider" => {
                provider::start(value.parse().map_err(|_| wrong())?, gap).map_err(|e| format!("provider: {e}"))?;
            }
            "--system" => options.systems.push(System::parse(&value).ok_or_else(wrong)?),
            "--tokens" => {
                let text = std::fs::read_to_string(&value).map_err(|e| format!("{value}: {e}"))?;
                options.tokens = text.lines().map(str::to_owned).collect();
            }
            "--sessions" => {
                options.sessions.push(value.split_once('=').map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(wrong)?)
            }
            "--rounds" => options.rounds = value.parse().map_err(|_| wrong())?,
            "--report" => options.report = value,
            "--fact" => options.facts.push(value),
            _ => return Err(wrong()),
        }
    }
    Ok(options)
}

fn measure(options: &Options) -> Result<String, String> {
    for system in &options.systems {
        eprintln!("bench: warming up {}", system.name);
        run(system, options, 4, Duration::from_millis(1_500))?;
    }
    // cells[level][system][round]
    let mut cells: Vec<Vec<Vec<Cell>>> = LEVELS.iter().map(|_| options.systems.iter().map(|_| Vec::new()).collect()).collect();
    for round in 1..=options.rounds {
        for ((clients, time), row) in LEVELS.iter().zip(&mut cells) {
            let mut told = format!("bench: round {round} of {}, {clients:>2} clients, requests/s:", options.rounds);
            for (system, cell) in options.systems.iter().zip(row) {
                let time = if system.name == options.systems[0].name { *time / 4 } else { *time };
                let measured = run(system, options, *clients, time)?;
                told += &format!("  {} {:.1}", system.name, measured.rate);
                cell.push(measured);
            }
            eprintln!("{told}");
        }
    }
    let growth = growth(options)?;
    Ok(report(options, &cells, &growth))
}

/// Lets `clients` ask for `time`, then waits for the answers under way: they count, and so does the time they take.
fn run(system: &System, options: &Options, clients: usize, time: Duration) -> Result<Cell, String> {
    {
        let mut sessions = system.sessions.lock().unwrap();
        let known = sessions.len();
        sessions.resize(clients.max(known), None);
    }
    let (begun, cpu) = (Instant::now(), system.cpu());
    let answers = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|at| {
                scope.spawn(move || {
                    let (mut client, mut times) = (Client::new(&system.host), Vec::new());
                    let mut session = system.sessions.lock().unwrap()[at].clone();
                    while begun.elapsed() < time {
                        let (answer, id) = ask(&mut client, system, &options.tokens[at], session.as_deref())?;
                        times.push((ms(answer.first), ms(answer.total)));
                        session = id;
                    }
                    system.sessions.lock().unwrap()[at] = session;
                    Ok(times)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<Vec<_>, String>>()
    });
    let answers: Vec<_> = answers.map_err(|why| format!("{}: {why}", system.name))?.concat();
    let rate = answers.len() as f64 / begun.elapsed().as_secs_f64();
    let cpu = system.cpu().zip(cpu).map_or(f64::NAN, |(after, before)| (after - before) / answers.len() as f64);
    let (first, total) = answers.into_iter().unzip();
    Ok(Cell { rate, cpu, first, total })
}

/// One request, its answer checked to be whole; for a client that stays in its session, that session's id.
fn ask(client: &mut Client, system: &System, token: &str, session: Option<&str>) -> Result<(Answer, Option<String>), String> {
    let body = match (system.kind, session) {
        (Kind::Plain, _) => r#"{"model":"bench","stream":true,"messages":[{"role":"user","content":"写一个开头"}]}"#.to_owned(),
        (_, None) => r#"{"message":"写一个开头"}"#.to_owned(),
        (_, Some(id)) => format!(r#"{{"message":"再写一段","sessionId":"{id}"}}"#),
    };
    let answer = client.post(&system.path, token, &body)?;
    let (delta, end) = if system.kind == Kind::Plain {
        ("\"delta\":{\"content\":", "data: [DONE]\n\n")
    } else {
        ("\nevent: message\n", "\nevent: done\n")
    };
    let (deltas, ends) = (answer.body.matches(delta).count(), answer.body.matches(end).count());
    if (deltas, ends) != (CHUNKS, 1) || !answer.body.ends_with("\n\n") {
        return Err(format!("an answer of {deltas} deltas and {ends} ends:\n{}", answer.body));
    }
    let id = (system.kind == Kind::Existing).then(|| session_id(&answer.body)).flatten();
    Ok((answer, id))
}

fn session_id(body: &str) -> Option<String> {
    Some(body.split_once("\"sessionId\":\"")?.1.split_once('"')?.0.to_owned())
}

/// Turns in sessions of several sizes, one after the other in each, in turns over the sizes.
fn growth(options: &Options) -> Result<Vec<Cell>, String> {
    let mut cells: Vec<Cell> = options.sessions.iter().map(|_| Cell::default()).collect();
    let Some(inkstone) = options.systems.iter().find(|system| system.kind == Kind::Existing) else { return Ok(cells) };
    let system = System {
        sessions: Mutex::default(),
        name: "growth".to_owned(),
        group: String::new(),
        path: CHAT.to_owned(),
        host: inkstone.host.clone(),
        kind: Kind::Existing,
    };
    let (mut client, token) = (Client::new(&system.host), options.tokens.last().ok_or("no tokens")?);
    eprintln!("bench: next turns in long sessions");
    for turn in 0..=TURNS {
        for ((size, id), cell) in options.sessions.iter().zip(&mut cells) {
            let (answer, _) = ask(&mut client, &system, token, Some(id)).map_err(|why| format!("session of {size}: {why}"))?;
            // The first turn wakes the object up, whatever its size.
            if turn > 0 {
                cell.first.push(ms(answer.first));
                cell.total.push(ms(answer.total));
            }
        }
    }
    Ok(cells)
}

fn report(options: &Options, cells: &[Vec<Vec<Cell>>], growth: &[Cell]) -> String {
    let mut text =
        format!("Answers of {CHUNKS} chunks; medians over {} rounds in which the systems take turns.\n\n", options.rounds);
    for fact in &options.facts {
        text += &format!("- {fact}\n");
    }
    text += "\n| clients | system | requests/s | × relay | first event p50, ms | p99, ms | − relay's p50, ms | whole answer p50, ms | CPU an answer, ms | answers |\n";
    text += "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|\n";
    let mut goals = String::new();
    for ((clients, _), row) in LEVELS.iter().zip(cells) {
        let relay = &row[1];
        for (system, rounds) in options.systems.iter().zip(row) {
            let rate = median(rounds.iter().map(|cell| cell.rate));
            let ratio = median(rounds.iter().zip(relay).map(|(cell, relay)| cell.rate / relay.rate));
            let later = median(rounds.iter().zip(relay).map(|(cell, relay)| middle(&cell.first) - middle(&relay.first)));
            let cpu = median(rounds.iter().map(|cell| cell.cpu));
            let first: Vec<f64> = rounds.iter().flat_map(|cell| cell.first.clone()).collect();
            let total: Vec<f64> = rounds.iter().flat_map(|cell| cell.total.clone()).collect();
            text += &format!(
                "| {clients} | {} | {rate:.1} | {ratio:.2} | {:.1} | {:.1} | {later:+.1} | {:.1} | {cpu:.1} | {} |\n",
                system.name,
                middle(&first),
                percentile(&first, 0.99),
                middle(&total),
                first.len()
            );
            if system.kind != Kind::Plain && *clients == GOAL_RATE.0 {
                let (verdict, goal) = (verdict(ratio >= GOAL_RATE.1), GOAL_RATE.1);
                goals += &format!(
                    "- {}, {clients} clients: {ratio:.2} × the relay's requests/s (goal: ≥ {goal}): {verdict}\n",
                    system.name
                );
            }
            if system.kind != Kind::Plain && *clients == GOAL_FIRST.0 {
                let (verdict, goal) = (verdict(later <= GOAL_FIRST.1), GOAL_FIRST.1);
                goals += &format!(
                    "- {}, {clients} client: first event {later:+.1} ms beside the relay's (goal: ≤ +{goal}): {verdict}\n",
                    system.name
                );
            }
        }
    }
    text += &format!("\n{goals}");
    if !growth.is_empty() {
        text += &format!("\nOne more turn in a session of so many messages, {TURNS} turns each:\n\n");
        text += "| messages | first event p50, ms | max, ms | whole answer p50, ms |\n|--:|--:|--:|--:|\n";
        for ((size, _), cell) in options.sessions.iter().zip(growth) {
            let max = percentile(&cell.first, 1.0);
            text += &format!("| {size} | {:.1} | {max:.1} | {:.1} |\n", middle(&cell.first), middle(&cell.total));
        }
    }
    text
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

fn middle(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    middle(&values.collect::<Vec<_>>())
}

/// The value below which `part` of the values lie (nearest rank).
fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}
