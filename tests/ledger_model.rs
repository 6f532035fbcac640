//! The ledger's promises, held against it: random worlds in which calls are repeated, reordered, late or lost, clocks jump
//! and D1 lags ([`world`]), judged by books kept apart ([`oracle`]); and examples of what each rule means.
//!
//! One seed makes one world. `INKSTONE_SEEDS=100000` runs so many (`make simulate`, in release); `INKSTONE_SEED=7` runs
//! that one and prints each of its steps.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "ledger_model/oracle.rs"]
mod oracle;
#[path = "ledger_model/world.rs"]
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use inkstone::identity::{Caller, Role};
use inkstone::quota::books::{Change, Ledger};
use inkstone::quota::ledger::{Decision, Refusal};
use inkstone::quota::period::Zone;
use inkstone::quota::{EndReason, Limit, QuotaType, Usage};
use world::{World, ask};

/// Worlds of an ordinary run: a few seconds without optimisation.
const SEEDS: u64 = 800;
const STEPS: usize = 200;

const START_MS: i64 = 1_795_449_600_000 - 3_600_000; // one hour before a local midnight at +08:00

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

#[test]
fn the_books_hold_whatever_happens() {
    if let Some(seed) = number("INKSTONE_SEED") {
        return World::run(seed, STEPS, true).unwrap_or_else(|what| panic!("seed {seed}, {what}"));
    }
    let (seeds, next) = (number("INKSTONE_SEEDS").unwrap_or(SEEDS), AtomicU64::new(0));
    let fails = |seed: u64| World::run(seed, STEPS, false).err().map(|what| (seed, what));
    let work =
        || std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed)).take_while(|seed| *seed < seeds).find_map(fails);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let failed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().find_map(|thread| thread.join().unwrap())
    });
    if let Some((seed, what)) = failed {
        panic!("seed {seed}, {what}\nINKSTONE_SEED={seed} cargo test --test ledger_model shows how it came to that");
    }
}

fn caller() -> Caller {
    Caller { user_id: "u".to_owned(), role: Role::Reader, issued_at: 0 }
}

fn at(ledger: &Ledger, now_ms: i64) -> Decision {
    Decision::begin(ledger.clone(), Some(&caller()), Zone::parse("+08:00").unwrap(), now_ms)
}

fn tokens(input: u64, output: u64) -> Usage {
    Usage { input, output, ..Usage::default() }
}

#[test]
fn output_is_clamped_and_below_the_least_refused() {
    let mut decision = at(&Ledger::default(), START_MS);
    assert_eq!(decision.reserve(&ask(1, 1_000, 8_000)), Ok(8_000));
    assert_eq!(decision.reserve(&ask(2, 500, 4_000)), Ok(500));
    assert_eq!(decision.reserve(&ask(3, 0, 64)), Err(Refusal::Insufficient { quota_type: QuotaType::Daily, left: 0 }));
    decision.release("h2");
    assert_eq!(decision.reserve(&ask(4, 937, 4_000)), Err(Refusal::Insufficient { quota_type: QuotaType::Daily, left: 1_000 }));
    assert_eq!(decision.reserve(&ask(5, 936, 4_000)), Ok(64));
    decision.release("h5");
    assert_eq!(decision.reserve(&ask(6, 990, 10)), Ok(10), "less than 64 may be asked for");
}

#[test]
fn a_late_settle_moves_nothing_and_is_written_off() {
    let mut decision = at(&Ledger::default(), START_MS);
    decision.reserve(&ask(1, 10, 100)).unwrap();
    let (ledger, _) = decision.finish();
    let mut late = at(&ledger, START_MS + 600_000);
    let outcome = late.settle("h1", tokens(10, 20), EndReason::Finish, 1).unwrap();
    assert_eq!((outcome.charged, outcome.written_off), (0, 30));
    let (ledger, changes) = late.finish();
    assert_eq!(changes.iter().filter(|change| matches!(change, Change::Entry(_))).count(), 3);
    assert_eq!(ledger.used(QuotaType::Total, "total"), 0);
}

#[test]
fn a_hold_settles_in_the_day_it_was_taken_in() {
    let zone = Zone::parse("+08:00").unwrap();
    let mut decision = at(&Ledger::default(), START_MS + 3_599_000);
    decision.reserve(&ask(1, 10, 100)).unwrap();
    let (ledger, _) = decision.finish();
    let after_midnight = START_MS + 3_605_000;
    let mut decision = at(&ledger, after_midnight);
    assert_eq!(decision.ledger().free(QuotaType::Daily, &zone.period(QuotaType::Daily, after_midnight)), 10_000);
    decision.settle("h1", tokens(10, 20), EndReason::Finish, 1).unwrap();
    let (ledger, _) = decision.finish();
    assert_eq!(ledger.used(QuotaType::Daily, &zone.period(QuotaType::Daily, START_MS)), 30);
    assert_eq!(ledger.used(QuotaType::Daily, &zone.period(QuotaType::Daily, after_midnight)), 0);
}

#[test]
fn thresholds_are_told_once_a_period() {
    let mut ledger = Ledger::default();
    let mut told = Vec::new();
    for hold in 0..10 {
        let mut decision = at(&ledger, START_MS);
        decision.reserve(&ask(hold, 0, 1_000)).unwrap();
        let outcome = decision.settle(&format!("h{hold}"), tokens(0, 1_000), EndReason::Finish, 1).unwrap();
        told.extend(outcome.crossings.into_iter().map(|crossing| (hold, format!("{:?}", crossing.level))));
        ledger = decision.finish().0;
    }
    assert_eq!(told, [(7, "Warning".to_owned()), (8, "Critical".to_owned()), (9, "Exhausted".to_owned())]);
}

#[test]
fn a_reserve_overtaken_by_its_release_leaves_no_hold() {
    let mut decision = at(&Ledger::default(), START_MS);
    decision.release("h1");
    assert_eq!(decision.reserve(&ask(1, 10, 100)), Err(Refusal::Closed));
}

#[test]
fn the_newest_token_decides_the_role() {
    let zone = Zone::parse("+08:00").unwrap();
    let with = |role, issued_at| Caller { user_id: "u".to_owned(), role, issued_at };
    let (ledger, _) = Decision::begin(Ledger::default(), Some(&with(Role::Vip, 20)), zone, START_MS).finish();
    let (older, _) = Decision::begin(ledger.clone(), Some(&with(Role::Reader, 10)), zone, START_MS).finish();
    assert_eq!(older.limit(QuotaType::Daily), Limit::Tokens(100_000));
    let (newer, _) = Decision::begin(ledger, Some(&with(Role::Admin, 30)), zone, START_MS).finish();
    assert_eq!(newer.limit(QuotaType::Daily), Limit::Unlimited);
}
