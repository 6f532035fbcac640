//! Random command sequences against the ledger's invariants: what `src/quota/ledger.rs` promises must hold whatever is
//! retried, reordered, repeated or late, and wherever the clock stands.

#![allow(clippy::unwrap_used, clippy::unreachable, reason = "a test fails by panicking")]

use std::collections::HashMap;

use inkstone::identity::{Caller, Role};
use inkstone::quota::books::{Change, HoldState, Ledger};
use inkstone::quota::ledger::{Decision, Refusal};
use inkstone::quota::period::Zone;
use inkstone::quota::price::Price;
use inkstone::quota::{EndReason, Limit, QuotaType, Reserve, Service, Usage};
use proptest::prelude::*;

const START_MS: i64 = 1_795_449_600_000 - 3_600_000; // one hour before a local midnight at +08:00

#[derive(Debug, Clone)]
enum Step {
    Reserve { hold: u8, prompt: u64, output: u64 },
    Settle { hold: u8, input: u64, output: u64 },
    Release { hold: u8 },
    Renew { hold: u8 },
    Wait { ms: i64 },
}

fn step() -> impl Strategy<Value = Step> {
    let tokens = prop_oneof![0..2_000_u64, Just(u64::MAX), Just(1 << 53)];
    prop_oneof![
        3 => (0..12_u8, 0..3_000_u64, 0..6_000_u64).prop_map(|(hold, prompt, output)| Step::Reserve { hold, prompt, output }),
        3 => (0..12_u8, tokens.clone(), tokens).prop_map(|(hold, input, output)| Step::Settle { hold, input, output }),
        1 => (0..12_u8).prop_map(|hold| Step::Release { hold }),
        1 => (0..12_u8).prop_map(|hold| Step::Renew { hold }),
        1 => prop_oneof![0..700_000_i64, Just(86_400_000)].prop_map(|ms| Step::Wait { ms }),
    ]
}

fn caller() -> Caller {
    Caller { user_id: "u".to_owned(), role: Role::Reader, issued_at: 0 }
}

fn ask(hold: u8, prompt_tokens: u64, output_tokens: u64) -> Reserve {
    Reserve {
        hold_id: format!("h{hold}"),
        request_id: format!("r{hold}"),
        message_id: format!("m{hold}"),
        watcher: None,
        service: Service::Chat,
        model: "gpt-4".to_owned(),
        price: Price { input_micro: 30_000_000, output_micro: 60_000_000 },
        prompt_tokens,
        output_tokens,
        ttl_ms: 600_000,
    }
}

/// The books kept beside the ledger: entries folded, and each hold's terminal state.
#[derive(Default)]
struct Books {
    spent: HashMap<(QuotaType, String), u64>,
    entries: HashMap<String, u64>,
    terminal: HashMap<String, HoldState>,
}

fn check(ledger: &Ledger, changes: &[Change], books: &mut Books) -> Result<(), TestCaseError> {
    for change in changes {
        match change {
            Change::Entry(entry) => {
                prop_assert!(books.entries.insert(entry.id.clone(), entry.amount).is_none(), "entry {} twice", entry.id);
                *books.spent.entry((entry.quota_type, entry.period.clone())).or_default() += entry.amount;
                prop_assert_eq!(entry.before - entry.after, entry.amount);
            }
            Change::Hold(hold) if hold.state != HoldState::Open => {
                let first = books.terminal.entry(hold.id.clone()).or_insert(hold.state);
                prop_assert_eq!(*first, hold.state, "hold {} has two ends", hold.id);
            }
            _ => {}
        }
    }
    for window in &ledger.windows {
        let Limit::Tokens(limit) = ledger.limit(window.quota_type) else { unreachable!() };
        let held = ledger.held(window.quota_type, &window.period);
        prop_assert!(
            window.used + held <= limit,
            "{:?} {}: {} + {held} > {limit}",
            window.quota_type,
            window.period,
            window.used
        );
        let folded = books.spent.get(&(window.quota_type, window.period.clone())).copied().unwrap_or(0);
        prop_assert_eq!(window.used, folded, "balance is the fold of entries");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_books_hold_whatever_happens(steps in proptest::collection::vec(step(), 1..200)) {
        let zone = Zone::parse("+08:00").unwrap();
        let (mut ledger, mut now, mut books) = (Ledger::default(), START_MS, Books::default());
        for step in steps {
            let mut decision = Decision::begin(ledger.clone(), Some(&caller()), zone, now);
            match step {
                Step::Reserve { hold, prompt, output } => {
                    if let Ok(granted) = decision.reserve(&ask(hold, prompt, output)) {
                        let known = books.entries.is_empty() || granted > 0;
                        prop_assert!(known);
                    }
                }
                Step::Settle { hold, input, output } => {
                    let usage = Usage { input, output, ..Usage::default() };
                    if let Ok(outcome) = decision.settle(&format!("h{hold}"), usage, EndReason::Finish, 1) {
                        // The same settle again answers the same and moves nothing.
                        let before = decision.ledger().clone();
                        let again = decision.settle(&format!("h{hold}"), usage, EndReason::Finish, 1).unwrap();
                        prop_assert_eq!(again.charged, outcome.charged);
                        prop_assert_eq!(decision.ledger(), &before);
                    }
                }
                Step::Release { hold } => decision.release(&format!("h{hold}")),
                Step::Renew { hold } => { decision.renew(&format!("h{hold}"), 600_000); }
                Step::Wait { ms } => now += ms,
            }
            let (after, changes) = decision.finish();
            check(&after, &changes, &mut books)?;
            // The changes alone lead from the rows before to the rows after.
            let mut replayed = ledger.clone();
            changes.iter().for_each(|change| replayed.apply(change));
            prop_assert_eq!(&replayed, &after);
            ledger = after;
        }
    }
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
