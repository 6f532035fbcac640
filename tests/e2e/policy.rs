//! The written charging policy (README, "Charging"), as a table: how an answer ended × whether the provider reported its
//! usage → what is charged, whether that is an estimate, and the reason on the entry.
//!
//! Every case sends the same 37 ASCII characters: estimated at a quarter of them, 4 for the message and 3 for the prompt,
//! 17 tokens. Two words are delivered, one token each, so an estimate is 19; the provider, where it reports, says 20 + 8.

use futures::future::join_all;
use serde_json::{Value, json};

use crate::support::api::text;
use crate::support::client::User;
use crate::support::reply::{DONE, Reply, Step, delta, finish, usage_event, usage_json};
use crate::support::sse::{EventStream, terminal};
use crate::support::worker::Worker;
use crate::support::{PATIENCE, provider, run, wait_until};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The provider says that it is complete.
    Finish,
    /// The same, for a reason of its own.
    Filtered,
    /// Complete, and not a word of text.
    Empty,
    /// The author stops it.
    Stop,
    /// The client goes away; the provider finishes.
    ClientGone,
    /// An error object before any text.
    ErrorFirst,
    /// An error object after the text.
    ErrorLater,
    /// Silence.
    Stall,
    /// The stream ends without a word.
    Cut,
    /// The Worker is killed while it runs.
    Killed,
    /// The Worker is killed when it is over and saved, before it is charged.
    KilledSaved,
}

/// Charged, estimated, reason, cost in micro-credits.
type Charge = Option<(i64, bool, &'static str, i64)>;

const fn reported(reason: &'static str) -> Charge {
    Some((28, false, reason, 3_600))
}

const fn estimated(reason: &'static str) -> Charge {
    Some((19, true, reason, 2_100))
}

/// How it ended, what is charged where usage was reported, and where it was not.
const POLICY: [(End, Charge, Charge); 11] = [
    (End::Finish, reported("finish"), estimated("finish")),
    (End::Filtered, reported("finish"), estimated("finish")),
    (End::Empty, None, None),
    (End::Stop, reported("stop"), estimated("stop")),
    (End::ClientGone, reported("finish"), estimated("finish")),
    (End::ErrorFirst, None, None),
    (End::ErrorLater, reported("provider_error"), estimated("provider_error")),
    (End::Stall, reported("stall"), estimated("stall")),
    (End::Cut, reported("cut"), estimated("cut")),
    // A report that came before the kill is lost with it; one that was saved is not.
    (End::Killed, estimated("interrupted"), estimated("interrupted")),
    (End::KilledSaved, reported("finish"), estimated("finish")),
];

/// What the provider says. It waits for the gate before an end that somebody has to see coming.
fn reply(end: End, reports: bool) -> Reply {
    let words: &[&str] = if matches!(end, End::Empty | End::ErrorFirst) { &[] } else { &["一", "二"] };
    let usage: Vec<String> = if reports { vec![usage_event(&usage_json((20, 8)))] } else { Vec::new() };
    let mut spoken: Vec<String> = words.iter().map(|word| delta(json!({"content": word}))).collect();
    let over = |reason: &str, usage: &[String]| [&[finish(reason)], usage, &[DONE.to_owned()]].concat();
    let error = json!({"error": {"message": "The server had an error", "code": 500}}).to_string();
    match end {
        End::Finish | End::Empty => spoken.extend(over("stop", &usage)),
        End::Filtered => spoken.extend(over("content_filter", &usage)),
        End::ClientGone | End::KilledSaved => {
            let spoken = [spoken, over("stop", &usage)].concat();
            return Reply::events(&spoken).step_after_delta(1, Step::Gate);
        }
        End::ErrorFirst | End::ErrorLater => spoken.extend([usage, vec![error]].concat()),
        End::Cut => spoken.extend(usage),
        End::Stop | End::Stall | End::Killed => {
            spoken.extend(usage);
            return Reply::events(&spoken).then(Step::Hang);
        }
    }
    Reply::events(&spoken)
}

/// One case under way.
struct Case {
    end: End,
    reports: bool,
    expected: Charge,
    user: User,
    session: String,
    stream: Option<EventStream>,
}

/// Lets one answer begin, and go on as far as it can before anybody does anything.
async fn begin(worker: &Worker, end: End, reports: bool, expected: Charge) -> Case {
    let user = worker.user("reader");
    let script = provider().script(reply(end, reports));
    let message = script.message("x");
    assert_eq!((message.len(), message.is_ascii()), (37, true), "{message}");
    let opened = user.streaming(&json!({"message": message, "options": {"maxTokens": 50}})).open().await;
    let (mut session, mut stream) = (String::new(), None);
    match opened {
        Ok(mut opened) => {
            session = text(&opened.take(1).await[0].json(), "sessionId").to_owned();
            match end {
                End::Stop | End::Killed => drop(opened.take(2).await),
                End::ClientGone | End::KilledSaved => drop(opened.take(1).await),
                _ => {}
            }
            stream = Some(opened);
        }
        Err(answer) => assert!(end == End::ErrorFirst && answer.status == 503, "{end:?}: {}", answer.text),
    }
    match end {
        End::ClientGone => {
            stream = None;
            script.release(1);
        }
        End::Stop => drop(user.stop(&session).await),
        End::Killed => {
            wait_until(PATIENCE, "both words to be stored", || async {
                let log = worker.session(&user.id, &session, "SELECT events FROM event_log").await;
                json!(log).to_string().contains('二').then_some(())
            })
            .await;
        }
        End::KilledSaved => {
            // The ledger takes no entry: the charge is tried, and tried again.
            let deaf = "CREATE TRIGGER deaf BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'deaf'); END";
            worker.ledger(&user.id, deaf).await;
            script.release(1);
            wait_until(PATIENCE, "the end to be saved", || async {
                let rows = worker.session(&user.id, &session, "SELECT state FROM generation").await;
                matches!(rows[0]["state"].as_str(), Some("settling" | "unsettled")).then_some(())
            })
            .await;
        }
        _ => {}
    }
    Case { end, reports, expected, user, session, stream }
}

/// Waits for the end and compares what the books say with the policy.
async fn conclude(mut case: Case) -> Option<String> {
    if let Some(stream) = &mut case.stream {
        let events = stream.rest().await;
        match case.end {
            End::Finish | End::Filtered | End::Empty | End::Stop => drop(terminal(&events, "done")),
            End::ErrorLater | End::Stall | End::Cut | End::ErrorFirst => drop(terminal(&events, "error")),
            End::ClientGone | End::Killed | End::KilledSaved => {}
        }
    }
    if !case.session.is_empty() {
        case.user.finished_message(&case.session).await;
    }
    let charged = case.user.charged().await;
    let rows = case.user.transactions("type=consume").await;
    let told = rows.iter().map(|row| {
        let number = |key: &str| row[key].as_i64().expect("a number");
        assert_eq!(number("amount"), number("inputTokens") + number("outputTokens"), "{row}");
        (number("amount"), row["estimated"] == true, text(row, "reason").to_owned(), number("costMicro"))
    });
    let told: Vec<_> = told.collect();
    let expected: Vec<_> = case
        .expected
        .iter()
        .flat_map(|(tokens, flag, reason, cost)| vec![(*tokens, *flag, (*reason).to_owned(), *cost); 3])
        .collect();
    let right = told == expected && charged == case.expected.map_or(0, |(tokens, ..)| tokens);
    (!right).then(|| format!("{:?}, reported: {}: {charged} charged, {told:?}, not {expected:?}", case.end, case.reports))
}

#[test]
fn the_charging_policy() {
    run(async {
        let worker = Worker::start(&[("STREAM_IDLE_MS", "3000")]).await;
        let cases = POLICY.into_iter().flat_map(|(end, with, without)| [(end, true, with), (end, false, without)]);
        let (killed, others): (Vec<_>, Vec<_>) = cases.partition(|(end, ..)| matches!(end, End::Killed | End::KilledSaved));
        let worker = &worker;
        let one = |(end, reports, expected)| async move { conclude(begin(worker, end, reports, expected).await).await };
        let mut wrong: Vec<Option<String>> = join_all(others.into_iter().map(one)).await;

        // Those that are to be killed would stall meanwhile, so they begin when the others are done.
        let killed = join_all(killed.into_iter().map(|(end, reports, expected)| begin(worker, end, reports, expected))).await;
        worker.kill_9();
        for case in killed.iter().filter(|case| case.end == End::KilledSaved) {
            let charged = worker.ledger(&case.user.id, "SELECT doc FROM period").await;
            assert_eq!(charged, [] as [Value; 0], "killed before it was charged");
            worker.ledger(&case.user.id, "DROP TRIGGER deaf").await;
        }
        worker.restart().await;
        wrong.extend(join_all(killed.into_iter().map(conclude)).await);
        let wrong: Vec<String> = wrong.into_iter().flatten().collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}
