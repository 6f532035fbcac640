//! A small world around the ledger, all of it driven by one seed: a disk that loads what the object loads, callers and a
//! network that repeat, delay and reorder calls, kills before a commit, a clock that jumps, an operator who moves midnight,
//! and a D1 that takes parcels late, twice, in any order or not at all.
//!
//! Invariant: nothing here knows what the ledger should answer; that is the business of [`super::oracle`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use inkstone::identity::{Caller, Role};
use inkstone::quota::books::{Change, Entry, Ledger, Notice, Parcel};
use inkstone::quota::ledger::{Decision, Refusal};
use inkstone::quota::period::Zone;
use inkstone::quota::price::Price;
use inkstone::quota::{Call, Command, EndReason, Governance, QuotaType, Reserve, SAFE_INTEGER_MAX, Service, Settlement, Usage};

use super::oracle::{Oracle, Verdict};

/// How long a hold lasts unrenewed, ms.
const TTL_MS: i64 = 600_000;
/// A call is repeated, and a hold spoken of, for at most this long, ms: as long as an idempotency key is kept.
const REPEATED_MS: i64 = 24 * 3_600_000;
/// Closed holds are forgotten so long after their expiry, ms (`store::prune`).
const CLOSED_HOLD_MS: i64 = 48 * 3_600_000;
/// Calls that may still be repeated.
const SENT_MAX: usize = 24;
/// Where clocks start, unix ms: an hour before the end of a November day at +08:00, of the month, of the year, of a leap February.
const STARTS: [i64; 4] = [1_795_446_000_000, 1_796_050_800_000, 1_798_729_200_000, 1_835_449_200_000];
const OFFSETS: [&str; 4] = ["+08:00", "-03:30", "Z", "+14:00"];

/// Where all chance comes from (SplitMix64).
pub struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// A number of tokens: mostly as in life, sometimes at an edge of what can be counted.
    fn tokens(&mut self, usual: u64) -> u64 {
        if self.one_in(12) {
            self.pick(&[0, 1, 63, 64, 65, SAFE_INTEGER_MAX, SAFE_INTEGER_MAX + 1, u64::MAX])
        } else {
            self.below(usual)
        }
    }
}

/// What the ledger answered to a call.
#[derive(Debug)]
pub enum Outcome {
    /// A hold stands.
    Granted(u64),
    /// A settlement was made, now or earlier.
    Settled(Settlement),
    /// An order was credited: its entry, and whether an earlier call did it.
    Credited(Box<Entry>, bool),
    /// Whether the hold still stands.
    Renewed(bool),
    /// Nothing to say.
    Done,
    /// It was refused.
    Refused(Refusal),
}

/// The rows of one ledger object, as `store.rs` keeps them.
#[derive(Default)]
pub struct Disk {
    /// Every row but the outbox.
    pub rows: Ledger,
    /// Parcels for D1 by their sequence number.
    pub outbox: VecDeque<(u64, Parcel)>,
    posted: u64,
}

impl Disk {
    /// The rows a call is decided on: what `store::load` loads.
    fn load(&self, command: Option<&Command>, zone: Zone, now_ms: i64) -> Ledger {
        let (hold_id, order_id) = match command {
            Some(Command::Reserve(ask)) => (ask.hold_id.as_str(), ""),
            Some(Command::Settle { hold_id, .. } | Command::Release { hold_id } | Command::Renew { hold_id, .. }) => {
                (hold_id.as_str(), "")
            }
            Some(Command::Recharge { order_id, .. }) => ("", order_id.as_str()),
            _ => ("", ""),
        };
        let holds: Vec<_> = self.rows.holds.iter().filter(|hold| hold.is_open() || hold.id == hold_id).cloned().collect();
        let mut periods: BTreeSet<String> = QuotaType::ALL.into_iter().map(|each| zone.period(each, now_ms)).collect();
        periods.extend(holds.iter().flat_map(|hold| [hold.day.clone(), hold.month.clone()]));
        Ledger {
            account: self.rows.account.clone(),
            windows: self.rows.windows.iter().filter(|window| periods.contains(&window.period)).cloned().collect(),
            orders: self.rows.orders.iter().filter(|order| order.id == order_id).cloned().collect(),
            holds,
        }
    }

    fn save(&mut self, changes: &[Change]) {
        for change in changes {
            self.rows.apply(change);
            let parcel = match change {
                Change::Entry(entry) => Parcel::Entry(Box::new(entry.clone())),
                Change::Notice(notice) => Parcel::Notice(notice.clone()),
                Change::Account(_) => Parcel::User,
                _ => continue,
            };
            self.posted += 1;
            self.outbox.push_back((self.posted, parcel));
        }
    }
}

/// The projection: rows by id, never changed.
#[derive(Default)]
pub struct D1 {
    /// Transactions.
    pub entries: BTreeMap<String, Entry>,
    /// Notifications.
    pub notices: BTreeMap<String, Notice>,
}

impl D1 {
    fn insert(&mut self, parcel: Parcel) {
        match parcel {
            Parcel::Entry(entry) => drop(self.entries.entry(entry.id.clone()).or_insert(*entry)),
            Parcel::Notice(notice) => drop(self.notices.entry(notice.id.clone()).or_insert(notice)),
            // The operator's line is no part of the books.
            Parcel::User => {}
        }
    }

    fn has(&self, parcel: &Parcel) -> bool {
        match parcel {
            Parcel::Entry(entry) => self.entries.contains_key(&entry.id),
            Parcel::Notice(notice) => self.notices.contains_key(&notice.id),
            Parcel::User => true,
        }
    }
}

/// One run.
pub struct World {
    chance: Chance,
    zone: Zone,
    now_ms: i64,
    disk: Disk,
    d1: D1,
    oracle: Oracle,
    /// Calls that were sent and may arrive (again), with when they were.
    sent: Vec<(i64, Call)>,
    /// Batches on their way to D1.
    flights: Vec<Vec<(u64, Parcel)>>,
    /// When each hold was first asked for, unix ms.
    holds: Vec<i64>,
    trace: bool,
}

impl World {
    /// Runs `steps` steps of the world of `seed`; with `trace`, each is printed.
    pub fn run(seed: u64, steps: usize, trace: bool) -> Verdict {
        let mut chance = Chance(seed.wrapping_mul(0xd134_2543_de82_ef95));
        let (zone, now_ms) = (Zone::parse(chance.pick(&OFFSETS)).unwrap(), chance.pick(&STARTS));
        let (disk, d1, oracle) = (Disk::default(), D1::default(), Oracle::default());
        let mut world =
            Self { chance, zone, now_ms, disk, d1, oracle, sent: Vec::new(), flights: Vec::new(), holds: Vec::new(), trace };
        for step in 0..steps {
            world.step().map_err(|what| format!("step {step}: {what}"))?;
        }
        world.end().map_err(|what| format!("at the end: {what}"))
    }

    fn say(&self, what: &dyn std::fmt::Debug) {
        if self.trace {
            eprintln!("{} {what:?}", self.zone.rfc3339(self.now_ms));
        }
    }

    fn step(&mut self) -> Verdict {
        match self.chance.below(100) {
            0..15 => {
                self.wait();
                Ok(())
            }
            15..20 => self.alarm(),
            20..35 => self.deliver(),
            35..50 if !self.sent.is_empty() => {
                let again = self.chance.index(self.sent.len());
                let (_, call) = self.sent[again].clone();
                self.arrive(&call)
            }
            _ => {
                let call = self.call();
                // A reset is asked for by one administrator's request, which nothing repeats; all others may be.
                if !matches!(call.command, Command::Govern(Governance::Reset { .. })) {
                    self.sent.push((self.now_ms, call.clone()));
                }
                if self.sent.len() > SENT_MAX {
                    self.sent.remove(0);
                }
                // One in eight is overtaken by others, or never arrives.
                if self.chance.one_in(8) { Ok(()) } else { self.arrive(&call) }
            }
        }
    }

    /// The clock goes on: by seconds, to a second around a hold's expiry or a midnight, by days, by months.
    fn wait(&mut self) {
        let midnight = |quota_type| self.zone.resets_at(quota_type, self.now_ms).unwrap_or(self.now_ms);
        let (day, month) = (midnight(QuotaType::Daily), midnight(QuotaType::Monthly));
        let around = i64::try_from(self.chance.below(2_001)).unwrap() - 1_000;
        let to = match self.chance.below(16) {
            0..9 => self.now_ms + i64::try_from(self.chance.below(200_000)).unwrap(),
            9..11 => self.now_ms + TTL_MS + around,
            11..13 => day + around,
            13 => month + around,
            14 => self.now_ms + i64::try_from(self.chance.below(4 * 86_400_000)).unwrap(),
            _ => self.now_ms + i64::try_from(self.chance.below(70 * 86_400_000)).unwrap(),
        };
        self.now_ms = to.max(self.now_ms);
        if self.chance.one_in(40) {
            self.zone = Zone::parse(self.chance.pick(&OFFSETS)).unwrap();
        }
        self.sent.retain(|(at, _)| self.now_ms - at < REPEATED_MS);
        self.say(&"waits");
    }

    /// What somebody asks next.
    fn call(&mut self) -> Call {
        let chance = &mut self.chance;
        let quota_type = chance.pick(&QuotaType::ALL);
        // Mostly a hold of late; now and then one that never was.
        let late = &self.holds[self.holds.len().saturating_sub(8)..];
        let hold = if late.is_empty() || chance.one_in(50) { 0 } else { self.holds.len() - chance.index(late.len()) };
        let known = hold > 0 && self.now_ms - self.holds[hold - 1] < REPEATED_MS;
        let hold_id = if known { format!("h{hold}") } else { format!("x{}", chance.below(4)) };
        let govern = Command::Govern;
        let command = match chance.below(100) {
            0..32 => {
                self.holds.push(self.now_ms);
                let (prompt, output) = (chance.tokens(3_000), chance.tokens(6_000));
                Command::Reserve(ask(self.holds.len(), prompt, output))
            }
            32..60 => {
                let usage = Usage { input: chance.tokens(3_000), output: chance.tokens(6_000), ..Usage::default() };
                let reason = chance.pick(&[EndReason::Finish, EndReason::Stop, EndReason::Cut, EndReason::Interrupted]);
                Command::Settle { hold_id, usage, reason, duration_ms: 1 }
            }
            60..65 => Command::Release { hold_id },
            65..70 => Command::Renew { hold_id, ttl_ms: TTL_MS },
            70..79 => {
                let order = chance.below(24);
                let amount = [1, 10, 500, 20_000, 1 << 40, 1 << 52, SAFE_INTEGER_MAX, 0][usize::try_from(order % 8).unwrap()];
                let amount = if chance.one_in(8) { amount + 1 } else { amount };
                let quota_type = if chance.one_in(8) { quota_type } else { QuotaType::ALL[usize::try_from(order % 3).unwrap()] };
                let kind = if order.is_multiple_of(2) { "code:" } else { "o" };
                Command::Recharge { order_id: format!("{kind}{order}"), amount, quota_type, reason: "充值".to_owned() }
            }
            79..82 => govern(Governance::SetLimit { quota_type, tokens: chance.tokens(60_000) }),
            82..84 => govern(Governance::SetRole { role: role(chance) }),
            84 => govern(Governance::Suspend),
            85..88 => govern(Governance::Activate),
            88..91 => {
                let reset_id = format!("{:x}", chance.next());
                govern(Governance::Reset { quota_type: Some(quota_type).filter(|_| chance.one_in(2)), reset_id })
            }
            91..93 => govern(Governance::Initialize { role: chance.one_in(2).then(|| role(chance)) }),
            93..97 => Command::TryCode,
            _ => Command::Read,
        };
        // A settlement carries the token its generation began with, and sets no role back: `object.rs` passes it over.
        let in_person = matches!(command, Command::Reserve(_) | Command::Read);
        let token = |chance: &mut Chance| {
            let issued_at = i64::try_from(chance.below(6)).unwrap();
            // Readers mostly: their limits are soon reached.
            let role = if chance.one_in(6) { role(chance) } else { Role::Reader };
            Caller { user_id: "u".to_owned(), role, issued_at }
        };
        Call { caller: in_person.then(|| token(chance)), command }
    }

    /// A call reaches the object.
    fn arrive(&mut self, call: &Call) -> Verdict {
        self.say(call);
        let loaded = self.disk.load(Some(&call.command), self.zone, self.now_ms);
        let mut decision = Decision::begin(loaded.clone(), call.caller.as_ref(), self.zone, self.now_ms);
        let outcome = apply(&mut decision, &call.command);
        self.say(&outcome);
        let (after, changes) = decision.finish();
        if self.chance.one_in(24) {
            // Killed before the commit: nothing happened, and whoever asked may ask again.
            self.say(&"killed");
            return Ok(());
        }
        replay(loaded, &changes, &after)?;
        self.disk.save(&changes);
        self.oracle.observe(call, &outcome, &changes, &self.disk.rows, self.zone, self.now_ms)
    }

    /// The ledger's alarm: what is due expires, what is old is forgotten.
    fn alarm(&mut self) -> Verdict {
        let loaded = self.disk.load(None, self.zone, self.now_ms);
        if loaded.account.is_some() {
            let (after, changes) = Decision::begin(loaded.clone(), None, self.zone, self.now_ms).finish();
            replay(loaded, &changes, &after)?;
            self.disk.save(&changes);
            self.oracle.watch(&changes, &self.disk.rows, self.now_ms)?;
        }
        let now_ms = self.now_ms;
        self.disk.rows.holds.retain(|hold| hold.is_open() || hold.expires_at >= now_ms - CLOSED_HOLD_MS);
        Ok(())
    }

    /// Something happens to the parcels: a batch takes off, lands, or is lost; an answer of D1 may be lost, too.
    fn deliver(&mut self) -> Verdict {
        match self.chance.below(4) {
            0 if self.flights.len() < 3 => {
                let count = 1 + self.chance.index(9);
                self.flights.push(self.disk.outbox.iter().take(count).cloned().collect());
            }
            1 if !self.flights.is_empty() => drop(self.flights.swap_remove(0)),
            _ if !self.flights.is_empty() => {
                let which = self.chance.index(self.flights.len());
                let flight = self.flights.swap_remove(which);
                let answered = !self.chance.one_in(4);
                self.land(flight, answered)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// D1 takes a batch, all of it, in whatever order; `answered`: the ledger hears of it, and forgets what it sent.
    fn land(&mut self, mut flight: Vec<(u64, Parcel)>, answered: bool) -> Verdict {
        let Some((last, _)) = flight.last().cloned() else { return Ok(()) };
        while !flight.is_empty() {
            let next = self.chance.index(flight.len());
            self.d1.insert(flight.swap_remove(next).1);
        }
        while let Some((seq, parcel)) = self.disk.outbox.front().filter(|(seq, _)| answered && *seq <= last) {
            if !self.d1.has(parcel) {
                return Err(format!("parcel {seq} is forgotten and D1 never had it: {parcel:?}"));
            }
            self.disk.outbox.pop_front();
        }
        self.oracle.projected(&self.d1)
    }

    /// Everything comes to rest: nothing stays held, and D1 has the whole books.
    fn end(&mut self) -> Verdict {
        for flight in std::mem::take(&mut self.flights) {
            self.land(flight, false)?;
        }
        self.now_ms += TTL_MS;
        self.alarm()?;
        let rest: Vec<_> = self.disk.outbox.iter().cloned().collect();
        self.land(rest, true)?;
        self.oracle.settled(&self.disk, &self.d1)
    }
}

/// The changes alone lead from the rows before to the rows after.
fn replay(mut before: Ledger, changes: &[Change], after: &Ledger) -> Verdict {
    changes.iter().for_each(|change| before.apply(change));
    if before == *after { Ok(()) } else { Err(format!("the changes {changes:?} do not lead to {after:?}")) }
}

/// What the object does with a call (`object.rs`).
fn apply(decision: &mut Decision, command: &Command) -> Outcome {
    let result = match command {
        Command::Reserve(ask) => decision.reserve(ask).map(Outcome::Granted),
        Command::Settle { hold_id, usage, reason, duration_ms } => {
            decision.settle(hold_id, *usage, *reason, *duration_ms).map(Outcome::Settled)
        }
        Command::Recharge { order_id, amount, quota_type, reason } => {
            decision.recharge(order_id, *amount, *quota_type, reason).map(|(entry, repeated)| {
                if order_id.starts_with("code:") {
                    decision.forgive_try();
                }
                Outcome::Credited(Box::new(entry), repeated)
            })
        }
        Command::TryCode => decision.try_code().map(|()| Outcome::Done),
        Command::Renew { hold_id, ttl_ms } => Ok(Outcome::Renewed(decision.renew(hold_id, *ttl_ms))),
        Command::Release { hold_id } => {
            decision.release(hold_id);
            Ok(Outcome::Done)
        }
        Command::Govern(act) => {
            decision.govern(act);
            Ok(Outcome::Done)
        }
        _ => Ok(Outcome::Done),
    };
    result.unwrap_or_else(Outcome::Refused)
}

fn role(chance: &mut Chance) -> Role {
    chance.pick(&[Role::Reader, Role::Writer, Role::Vip, Role::Admin])
}

/// A reserve of hold number `hold`.
pub fn ask(hold: usize, prompt_tokens: u64, output_tokens: u64) -> Reserve {
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
        ttl_ms: TTL_MS,
    }
}
