//! Work side by side in the log, what makes room and what is paused: whoever leases, in whichever order it is settled, and
//! however the log is split, the projector comes to what a model of a few lines comes to.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;
use weft::clock;
use weft::log::Record;
use weft::protocol::work::{Settlement, WorkLeasedRecord, WorkOverflowedRecord, WorkPausedRecord};
use weft::store::Store;

use super::projector::record;
use super::work::{ATTEMPTS, BEGIN, GROUP, LEASE, THREADS, comes_to, lease_record, letters, settled};
use crate::support::TENANT;

const GROUP_ID: Uuid = Uuid::from_bytes([1; 16]);

#[derive(Debug, Clone)]
enum Act {
    Say,
    /// One of the events, or one that there is not; of the next attempt, or of another one.
    Lease {
        which: u64,
        wrong_attempt: bool,
    },
    /// Of a lease that lasts, or that did.
    Settle {
        which: usize,
        outcome: Settlement,
        former: bool,
    },
    Overflow(u64),
    Pause(bool),
}

fn step() -> impl Strategy<Value = (i64, Act)> {
    let outcome = proptest::sample::select(vec![
        Settlement::Done,
        Settlement::Done,
        Settlement::Done,
        Settlement::Retry,
        Settlement::Reject,
        Settlement::Extend,
        Settlement::Lost,
        Settlement::Expired,
    ]);
    let act = prop_oneof![
        3 => Just(Act::Say),
        6 => (any::<u64>(), proptest::bool::weighted(0.1))
            .prop_map(|(which, wrong_attempt)| Act::Lease { which, wrong_attempt }),
        5 => (any::<usize>(), outcome, proptest::bool::weighted(0.1))
            .prop_map(|(which, outcome, former)| Act::Settle { which, outcome, former }),
        2 => any::<u64>().prop_map(Act::Overflow),
        1 => proptest::bool::weighted(0.3).prop_map(Act::Pause),
    ];
    (proptest::sample::select(vec![0, 1, 5, 5, 500, 29_999, -10, 40_000]), act)
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    id: Uuid,
    attempt: u32,
    until: u64,
}

/// A thread of a group, event by event.
#[derive(Default)]
struct Model {
    head: u64,
    past: BTreeSet<u64>,
    leases: BTreeMap<u64, Lease>,
    former: Vec<Lease>,
    failures: BTreeMap<u64, u32>,
    dead: BTreeMap<u64, String>,
    paused: bool,
    log_time: u64,
    last_at: u64,
}

impl Model {
    fn is_open(&self, seq: u64) -> bool {
        (1..=self.head).contains(&seq) && !self.past.contains(&seq)
    }

    /// The event before this one that is not done; or up to where all are.
    fn after(&self, seq: u64) -> u64 {
        let open = (1..seq.min(self.head + 1)).rev().find(|it| self.is_open(*it));
        open.unwrap_or_else(|| (1..=self.head).take_while(|it| self.past.contains(it)).count() as u64)
    }

    /// The record that a node writes, and whether it counts.
    fn step(&mut self, now: u64, act: &Act) -> (Record, bool) {
        self.log_time = self.log_time.max(now.min(self.last_at + 3_600_000));
        self.last_at = now;
        match act {
            Act::Say => {
                self.head += 1;
                (record(now, THREADS[0], "ada", "user_message", &json!({"content": "do it"}), None), true)
            }
            Act::Lease { which, wrong_attempt } => {
                let seq = which % (self.head + 2);
                let attempt = self.failures.get(&seq).copied().unwrap_or(0) + 1;
                let written = attempt + u32::from(*wrong_attempt);
                let (id, until) = (clock::event_id(), now + LEASE);
                let counts = !self.paused
                    && self.is_open(seq)
                    && !self.leases.contains_key(&seq)
                    && written == attempt
                    && until > self.log_time;
                if counts {
                    self.leases.insert(seq, Lease { id, attempt, until });
                }
                let lease = lease_record(id, 0, seq, self.after(seq), written, "wim", now);
                (Record::from(&WorkLeasedRecord { parallel: true, ..lease }), counts)
            }
            Act::Settle { which, outcome, former } => self.settle(now, *which, *outcome, *former),
            Act::Overflow(which) => {
                let seq = which % (self.head + 2);
                let counts = self.is_open(seq) && !self.leases.contains_key(&seq) && !self.failures.contains_key(&seq);
                let record = WorkOverflowedRecord {
                    kind: "work_overflowed".into(),
                    id: clock::event_id(),
                    tenant: TENANT.into(),
                    thread: THREADS[0].into(),
                    group: GROUP.into(),
                    group_id: GROUP_ID,
                    seq,
                    event_kind: "user_message".into(),
                    after: self.after(seq),
                    limit: 9,
                    at: clock::rfc3339(now),
                };
                if counts {
                    self.past.insert(seq);
                    self.dead.insert(seq, "overflow".into());
                }
                (Record::from(&record), counts)
            }
            Act::Pause(paused) => {
                let counts = self.head > 0;
                self.paused = if counts { *paused } else { self.paused };
                let record = WorkPausedRecord {
                    kind: if *paused { "work_paused" } else { "work_resumed" }.into(),
                    id: clock::event_id(),
                    tenant: TENANT.into(),
                    thread: THREADS[0].into(),
                    group: GROUP.into(),
                    group_id: GROUP_ID,
                    by: "root".into(),
                    at: clock::rfc3339(now),
                };
                (Record::from(&record), counts)
            }
        }
    }

    fn settle(&mut self, now: u64, which: usize, outcome: Settlement, former: bool) -> (Record, bool) {
        let pick = |n: usize| (n > 0).then(|| which % n);
        let meant = match former {
            true => pick(self.former.len()).map(|n| (0, self.former[n])),
            false => pick(self.leases.len()).and_then(|n| self.leases.iter().nth(n)).map(|(seq, it)| (*seq, *it)),
        };
        let written = settled(meant.map_or(Uuid::nil(), |(_, lease)| lease.id), 0, outcome, "wim", now);
        let Some((seq, lease)) = meant.filter(|_| !former) else { return (written, false) };
        let is_over = lease.until <= self.log_time;
        let counts = match outcome {
            Settlement::Expired => is_over,
            Settlement::Lost => true,
            _ => !is_over,
        };
        if !counts {
            return (written, false);
        }
        if outcome == Settlement::Extend {
            self.leases.insert(seq, Lease { until: now + 2 * LEASE, ..lease });
            return (written, true);
        }
        self.leases.remove(&seq);
        self.former.push(lease);
        let gives_up = match outcome {
            Settlement::Done => None,
            Settlement::Reject => Some("rejected"),
            _ if lease.attempt < ATTEMPTS => {
                self.failures.insert(seq, lease.attempt);
                return (written, true);
            }
            _ => Some("attempts"),
        };
        self.dead.extend(gives_up.map(|reason| (seq, reason.to_owned())));
        self.failures.remove(&seq);
        self.past.insert(seq);
        (written, true)
    }
}

fn check(store: &Store, model: &Model) {
    let row = store.work(TENANT, THREADS[0], GROUP).unwrap().unwrap_or_default();
    for seq in 1..=model.head {
        assert_eq!(row.is_past(seq), model.past.contains(&seq), "{seq} of {row:?}");
    }
    let leases: Vec<_> = row.leases.iter().map(|it| (it.seq, Uuid::from_bytes(it.id), it.attempt, it.until)).collect();
    let expected: Vec<_> = model.leases.iter().map(|(seq, it)| (*seq, it.id, it.attempt, it.until)).collect();
    assert_eq!(leases, expected);
    let failed: BTreeMap<u64, u32> = row.failed.iter().map(|it| (it.seq, it.attempts)).collect();
    assert_eq!(failed, model.failures);
    assert_eq!(row.paused_at.is_some(), model.paused);
    let paused = store.paused_threads(TENANT, GROUP, GROUP_ID.as_bytes(), 10).unwrap();
    assert_eq!(paused.len(), usize::from(model.paused));
    assert_eq!(letters(store, THREADS[0]), model.dead);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn work_side_by_side_comes_to_what_a_model_says_however_the_log_is_split(
        steps in proptest::collection::vec(step(), 1..150),
        restarts in proptest::collection::vec((1..20usize, proptest::bool::weighted(0.3)), 1..6),
    ) {
        let (mut model, mut now) = (Model::default(), BEGIN);
        let (records, counts): (Vec<Record>, Vec<bool>) = steps
            .iter()
            .map(|(jump, act)| {
                now = now.saturating_add_signed(*jump);
                model.step(now, act)
            })
            .unzip();
        comes_to(records, &counts, &restarts, |store| check(store, &model))?;
    }
}
