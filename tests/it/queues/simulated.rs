//! 200 seeds of nodes that lag, restart and have clocks of their own, of workers that settle late, twice or what is not theirs,
//! and of groups that are made anew. What each node knows is the log up to somewhere; what it writes is for the state that it
//! knows. A model says which of that counts, and the projector must say the same; and of what counts the ledger says whether
//! it may be.

use std::path::Path;

use uuid::Uuid;
use weft::clock;
use weft::log::Record;
use weft::log::embedded::EmbeddedLog;
use weft::protocol::work::{GroupRecord, GroupSettings, Settlement, WorkLeasedRecord, WorkSettledRecord};
use weft::store::Store;

use super::ledger::{Act, Ledger};
use super::{GROUP, event};
use crate::persistence::projector::{append, entries, project};
use crate::persistence::threads::Chance;

const SEEDS: u64 = 200;
const STEPS: usize = 90;
const NODES: usize = 3;
const THREADS: usize = 2;
const ATTEMPTS: u32 = 3;
const LEASE: u64 = 30_000;
const HOUR: u64 = 3_600_000;
const BEGIN: u64 = 1_800_000_000_000;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    id: Uuid,
    seq: u64,
    attempt: u32,
    holder: String,
    until: u64,
}

/// How far a group is with a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    group_id: Uuid,
    done: u64,
    failures: u32,
    lease: Option<Lease>,
}

/// What the log comes to, up to some record.
#[derive(Debug, Clone, Default)]
struct View {
    group: Uuid,
    heads: [u64; THREADS],
    states: [State; THREADS],
}

impl View {
    fn lease(&mut self, at: usize, it: &WorkLeasedRecord, log_time: u64) -> bool {
        let until = clock::parse_rfc3339(&it.until).unwrap();
        let begins_anew = it.group_id > self.states[at].group_id;
        let state =
            if begins_anew { State { group_id: it.group_id, ..State::default() } } else { self.states[at].clone() };
        let counts = it.group_id == state.group_id
            && state.lease.is_none()
            && (it.after, it.attempt) == (state.done, state.failures + 1)
            && (state.done < it.seq && it.seq <= self.heads[at])
            && until > log_time;
        if counts {
            let lease = Lease { id: it.id, seq: it.seq, attempt: it.attempt, holder: it.holder.clone(), until };
            self.states[at] = State { lease: Some(lease), ..state };
        }
        counts
    }

    fn settle(&mut self, at: usize, it: &WorkSettledRecord, log_time: u64) -> bool {
        let state = &mut self.states[at];
        let Some(lease) = state.lease.as_mut().filter(|lease| lease.id == it.lease) else { return false };
        let is_over = lease.until <= log_time;
        let may = match it.outcome {
            Settlement::Expired => is_over,
            Settlement::Lost => true,
            _ => !is_over && lease.holder == it.by,
        };
        if !may {
            return false;
        }
        let is_done = match it.outcome {
            Settlement::Extend => {
                lease.until = clock::parse_rfc3339(it.until.as_ref().unwrap()).unwrap();
                return true;
            }
            Settlement::Done | Settlement::Reject => true,
            _ => lease.attempt == ATTEMPTS,
        };
        (state.done, state.failures) = if is_done { (lease.seq, 0) } else { (state.done, lease.attempt) };
        state.lease = None;
        true
    }
}

/// A lease that somebody once saw in the log, and may settle.
#[derive(Clone)]
struct Given {
    lease: Uuid,
    at: usize,
    holder: String,
}

struct Node {
    /// How many of the tenant's records it has projected.
    seen: usize,
    /// By how much its clock is wrong.
    skew: i64,
}

/// The clock of the log's one partition, and of the world.
struct Clock {
    now: u64,
    log_time: u64,
    last_at: u64,
}

/// One seed: a tenant with a group and its threads.
struct World<'a> {
    chance: Chance,
    tenant: String,
    clock: &'a mut Clock,
    /// After each record of the tenant's, and before the first.
    views: Vec<View>,
    nodes: Vec<Node>,
    given: Vec<Given>,
    written: Vec<(Record, bool)>,
}

impl World<'_> {
    fn play(&mut self) {
        self.set_group();
        for _ in 0..STEPS {
            self.clock.now += [0, 1, 5, 500, LEASE - 1, LEASE, LEASE + 1, HOUR + 7][self.chance.below(8)];
            self.step();
        }
        // Then all goes well, and what is left gets done.
        self.clock.now += 2 * HOUR;
        for at in 0..THREADS {
            self.say(at);
        }
        self.nodes[0] = Node { seen: 0, skew: 0 };
        for at in 0..THREADS {
            self.work_off(at);
        }
    }

    fn step(&mut self) {
        let (node, at) = (self.chance.below(NODES), self.chance.below(THREADS));
        match self.chance.below(24) {
            0..4 => self.say(at),
            4..9 => {
                let all = self.views.len() - 1;
                let seen = self.nodes[node].seen;
                self.nodes[node].seen =
                    if self.chance.one_in(3) { seen + self.chance.below(all - seen + 1) } else { all };
            }
            // It was killed, and what it had committed last is not on its disk.
            9 => self.nodes[node].seen -= self.chance.below(self.nodes[node].seen.min(20) + 1),
            10..16 => self.give(node, at),
            16..20 => {
                let outcome = self.chance.of(&[
                    Settlement::Done,
                    Settlement::Done,
                    Settlement::Retry,
                    Settlement::Reject,
                    Settlement::Extend,
                    Settlement::Lost,
                ]);
                self.settle_one(node, outcome);
            }
            20..23 => self.expire(node, at),
            _ if self.chance.one_in(3) => self.set_group(),
            _ => {}
        }
    }

    fn view(&self, node: usize) -> &View {
        &self.views[self.nodes[node].seen]
    }

    fn time(&self, node: usize) -> u64 {
        self.clock.now.saturating_add_signed(self.nodes[node].skew)
    }

    /// A record is in the log: the clock goes on, and what it changes is known to whoever gets there.
    fn write(&mut self, at: u64, record: Record, change: impl FnOnce(&mut View, u64) -> bool) {
        let clock = &mut *self.clock;
        clock.log_time = clock.log_time.max(at.min(clock.last_at + HOUR));
        clock.last_at = at;
        let mut view = self.views.last().unwrap().clone();
        let counts = change(&mut view, clock.log_time);
        self.views.push(view);
        self.written.push((record, counts));
    }

    /// The group is deleted, if it is there, and made.
    fn set_group(&mut self) {
        let now = self.clock.now;
        for kind in ["group_deleted", "group_set"] {
            let settings = (kind == "group_set").then(GroupSettings::default);
            let is_there = !self.views.last().unwrap().group.is_nil();
            let id = clock::event_id();
            let (tenant, group, by) = (self.tenant.clone(), GROUP.to_owned(), "root".to_owned());
            let (kind, at) = (kind.to_owned(), clock::rfc3339(now));
            let record = Record::from(&GroupRecord {
                kind,
                id,
                tenant,
                group,
                settings: settings.clone(),
                if_absent: false,
                by,
                at,
            });
            self.write(now, record, |view, _| {
                view.group = if settings.is_some() { id } else { Uuid::nil() };
                settings.is_some() || is_there
            });
        }
    }

    fn say(&mut self, at: usize) {
        let (_, record) = event(self.clock.now, &self.tenant, &thread(at), "ada", "user_message");
        self.write(self.clock.now, record, |view, _| {
            view.heads[at] += 1;
            true
        });
    }

    /// A node gives out what it takes for next; now and then though it sees a lease that lasts.
    fn give(&mut self, node: usize, at: usize) {
        let View { group, heads, states } = self.view(node).clone();
        let state = if states[at].group_id == group { states[at].clone() } else { State::default() };
        if group.is_nil() || state.done >= heads[at] || state.lease.is_some() && !self.chance.one_in(5) {
            return;
        }
        let (now, id, holder) = (self.time(node), clock::event_id(), format!("w{}", self.chance.below(3)));
        let it = WorkLeasedRecord {
            kind: "work_leased".into(),
            id,
            tenant: self.tenant.clone(),
            thread: thread(at),
            group: GROUP.into(),
            group_id: group,
            seq: state.done + 1,
            event_kind: "user_message".into(),
            after: state.done,
            parallel: false,
            attempt: state.failures + 1,
            attempts: ATTEMPTS,
            holder: holder.clone(),
            at: clock::rfc3339(now),
            until: clock::rfc3339(now + LEASE),
        };
        self.write(now, Record::from(&it), |view, log_time| view.lease(at, &it, log_time));
        self.given.push(Given { lease: id, at, holder });
    }

    /// Somebody settles one of the newest leases; now and then it is not theirs.
    fn settle_one(&mut self, node: usize, outcome: Settlement) {
        if self.given.is_empty() {
            return;
        }
        let back = 1 + self.chance.below(self.given.len().min(4));
        let Given { lease, at, holder } = self.given[self.given.len() - back].clone();
        let by = match outcome {
            Settlement::Lost => "weft".to_owned(),
            _ if self.chance.one_in(8) => "eve".to_owned(),
            _ => holder,
        };
        self.settle(self.time(node), at, lease, outcome, by);
    }

    /// A node ends a lease that is over, or that it takes for over.
    fn expire(&mut self, node: usize, at: usize) {
        let now = self.time(node);
        let Some(lease) = self.view(node).states[at].lease.clone() else { return };
        if lease.until <= now || self.chance.one_in(4) {
            self.settle(now, at, lease.id, Settlement::Expired, "weft".to_owned());
        }
    }

    fn settle(&mut self, now: u64, at: usize, lease: Uuid, outcome: Settlement, by: String) {
        let it = WorkSettledRecord {
            kind: "work_settled".into(),
            id: clock::event_id(),
            tenant: self.tenant.clone(),
            thread: thread(at),
            group: GROUP.into(),
            lease,
            outcome,
            reason: None,
            until: Some(clock::rfc3339(now + LEASE)),
            by,
            at: clock::rfc3339(now),
        };
        self.write(now, Record::from(&it), |view, log_time| view.settle(at, &it, log_time));
    }

    /// One node that has read everything does what there is.
    fn work_off(&mut self, at: usize) {
        loop {
            self.nodes[0].seen = self.views.len() - 1;
            let View { group, heads, states } = self.view(0).clone();
            let state = &states[at];
            match &state.lease {
                Some(lease) if state.group_id == group => {
                    let (id, holder) = (lease.id, lease.holder.clone());
                    match lease.until <= self.clock.log_time {
                        true => self.settle(self.clock.now, at, id, Settlement::Expired, "weft".into()),
                        false => self.settle(self.clock.now, at, id, Settlement::Done, holder),
                    }
                }
                _ if state.group_id == group && state.done == heads[at] => return,
                _ => self.give(0, at),
            }
            // So that log time goes on past what was stamped by a clock that is ahead.
            self.clock.now += 1_000;
        }
    }
}

fn thread(at: usize) -> String {
    format!("t{at}")
}

fn tenant(seed: u64) -> String {
    format!("seed-{seed}")
}

fn check(store: &Store, seed: u64, view: &View, ledger: &Ledger) {
    for (at, expected) in view.states.iter().enumerate() {
        let (tenant, thread) = (tenant(seed), thread(at));
        let row = store.work(&tenant, &thread, GROUP).unwrap().unwrap_or_default();
        assert!(
            row.leases.len() < 2 && row.failed.len() < 2 && row.passed.is_empty(),
            "seed {seed}, {thread}: {row:?}"
        );
        let lease = row.leases.into_iter().next().map(|it| {
            let (id, until) = (Uuid::from_bytes(it.id), it.until);
            Lease { id, seq: it.seq, attempt: it.attempt, holder: it.holder, until }
        });
        let (group_id, failures) =
            (Uuid::from_bytes(row.group_id), row.failed.first().map_or(0, |failed| failed.attempts));
        assert_eq!(State { group_id, done: row.cursor, failures, lease }, *expected, "seed {seed}, {thread}");
        let finished = ledger.finished(&(tenant, thread, GROUP.to_owned()));
        assert_eq!(finished, (1..=view.heads[at]).collect::<Vec<_>>(), "seed {seed}: each once and in order");
    }
}

#[test]
fn whatever_nodes_and_workers_do_each_event_is_settled_once_and_in_order_over_200_seeds() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 1).unwrap();
    let mut clock = Clock { now: BEGIN, log_time: 0, last_at: 0 };
    let (mut counts, mut views, mut refused) = (Vec::new(), Vec::new(), 0);
    for seed in 0..SEEDS {
        let mut chance = Chance::new(seed);
        let skew = |chance: &mut Chance| chance.of(&[0, 0, 3, -40, 2_000, -(LEASE as i64), LEASE as i64 + 5]);
        let nodes = (0..NODES).map(|_| Node { seen: 0, skew: skew(&mut chance) }).collect();
        let (views_of, given, written) = (vec![View::default()], Vec::new(), Vec::new());
        let mut world =
            World { chance, tenant: tenant(seed), clock: &mut clock, views: views_of, nodes, given, written };
        world.play();
        let World { written, views: mut views_of, .. } = world;
        views.push(views_of.pop().unwrap());
        refused += written.iter().filter(|(_, counts)| !counts).count();
        counts.extend(written.iter().map(|(_, counts)| *counts));
        append(&log, written.into_iter().map(|(record, _)| record).collect());
    }
    assert!(refused > 1_000, "{refused} were refused");

    let entries = entries(&log);
    let at_once =
        |name: &str, splits: &[(usize, bool)]| project(&log, &entries, &Path::join(folder.path(), name), splits);
    let (store, verdicts) = at_once("at-once", &[(usize::MAX / 2, false)]);
    let mut ledger = Ledger::default();
    for ((entry, verdict), counts) in entries.iter().zip(&verdicts).zip(&counts) {
        let record = entry.record.as_ref().unwrap();
        assert_eq!(verdict.is_ok(), *counts, "{verdict:?}: {record:?}");
        if let Some((_, act)) = Act::of(record).filter(|_| *counts) {
            ledger.count(act);
        }
    }
    for (seed, view) in (0..).zip(&views) {
        check(&store, seed, view, &ledger);
    }
    let (split, again) = at_once("split", &[(700, true), (33, false), (1_000, false)]);
    assert_eq!(verdicts, again);
    weft::projector::rebuild::compare(&store, &split).unwrap();
}
