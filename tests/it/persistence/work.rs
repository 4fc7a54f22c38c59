//! Work in the log: whoever leases and settles, and however the log is split, the projector comes to what a model of a few
//! lines comes to.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;
use weft::clock;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Grant, Record};
use weft::projector::{Projector, Update};
use weft::protocol::custom::KindRecord;
use weft::protocol::work::{GroupRecord, GroupSettings, Settlement, WorkLeasedRecord, WorkSettledRecord};
use weft::store::dead_letters::DeadLetterFilter;
use weft::store::{Store, StoreError};

use super::projector::{Split, append, entries, open_store, project, record};
use crate::support::TENANT;

pub(super) const THREADS: [&str; 2] = ["t", "u"];
pub(super) const GROUP: &str = "g";
pub(super) const ATTEMPTS: u32 = 3;
pub(super) const LEASE: u64 = 30_000;
pub(super) const BEGIN: u64 = 1_800_000_000_000;

#[derive(Debug, Clone)]
enum Act {
    Say,
    /// A node leases what it takes for the next event: from the state as it is, or as it was one record before.
    Lease {
        holder: &'static str,
        stale: bool,
    },
    /// Of the lease that lasts, or of the one before it.
    Settle {
        outcome: Settlement,
        by: &'static str,
        former: bool,
    },
}

#[derive(Debug, Clone)]
struct Step {
    jump: i64,
    thread: usize,
    act: Act,
}

fn step() -> impl Strategy<Value = Step> {
    let user = || proptest::sample::select(vec!["wim", "wim", "wim", "eve"]);
    let outcome = proptest::sample::select(vec![
        Settlement::Done,
        Settlement::Done,
        Settlement::Retry,
        Settlement::Retry,
        Settlement::Reject,
        Settlement::Extend,
        Settlement::Lost,
        Settlement::Expired,
        Settlement::Expired,
    ]);
    let act = prop_oneof![
        2 => Just(Act::Say),
        4 => (user(), proptest::bool::weighted(0.2)).prop_map(|(holder, stale)| Act::Lease { holder, stale }),
        4 => (outcome, user(), proptest::bool::weighted(0.1))
            .prop_map(|(outcome, by, former)| Act::Settle { outcome, by, former }),
    ];
    let jump = proptest::sample::select(vec![0, 1, 5, 500, 29_999, 30_000, 30_001, -10, -40_000, 4_000_000]);
    (jump, 0..THREADS.len(), act).prop_map(|(jump, thread, act)| Step { jump, thread, act })
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    id: Uuid,
    seq: u64,
    attempt: u32,
    holder: &'static str,
    until: u64,
}

/// How far the group is with a thread.
#[derive(Debug, Clone, Default)]
struct Thread {
    head: u64,
    done: u64,
    failures: u32,
    lease: Option<Lease>,
    former: Option<Lease>,
    dead: Vec<(u64, &'static str)>,
}

#[derive(Default)]
struct Model {
    threads: [Thread; 2],
    /// As they were before the last record about each.
    before: [Thread; 2],
    log_time: u64,
    last_at: u64,
}

impl Model {
    /// The record that a node writes, and whether it counts.
    fn step(&mut self, now: u64, thread: usize, act: &Act) -> (Record, bool) {
        const HOUR: u64 = 3_600_000;
        self.log_time = self.log_time.max(now.min(self.last_at + HOUR));
        self.last_at = now;
        let was = self.threads[thread].clone();
        let written = self.act(now, thread, act);
        self.before[thread] = was;
        written
    }

    fn act(&mut self, now: u64, at: usize, act: &Act) -> (Record, bool) {
        let (log_time, before) = (self.log_time, self.before[at].clone());
        let thread = &mut self.threads[at];
        match act {
            Act::Say => {
                thread.head += 1;
                (record(now, THREADS[at], "ada", "user_message", &json!({"content": "do it"}), None), true)
            }
            Act::Lease { holder, stale } => {
                let seen = if *stale { before } else { thread.clone() };
                let (after, seq, attempt) = (seen.done, seen.done + 1, seen.failures + 1);
                let (id, until) = (clock::event_id(), now + LEASE);
                let counts = thread.lease.is_none()
                    && (after, attempt) == (thread.done, thread.failures + 1)
                    && seq <= thread.head
                    && until > log_time;
                if counts {
                    thread.lease = Some(Lease { id, seq, attempt, holder, until });
                }
                (leased(id, at, seq, after, attempt, holder, now), counts)
            }
            Act::Settle { outcome, by, former } => {
                let meant = if *former { thread.former } else { thread.lease };
                let id = meant.map_or(Uuid::nil(), |lease| lease.id);
                let counts = thread.lease.is_some_and(|lease| {
                    let is_over = lease.until <= log_time;
                    let may = match outcome {
                        Settlement::Expired => is_over,
                        Settlement::Lost => true,
                        _ => !is_over && lease.holder == *by,
                    };
                    lease.id == id && may
                });
                if counts {
                    thread.settle(*outcome, now);
                }
                (settled(id, at, *outcome, by, now), counts)
            }
        }
    }
}

impl Thread {
    fn settle(&mut self, outcome: Settlement, now: u64) {
        let lease = self.lease.as_mut().unwrap();
        if outcome == Settlement::Extend {
            lease.until = now + 2 * LEASE;
            return;
        }
        let Lease { seq, attempt, .. } = *lease;
        self.former = self.lease.take();
        self.failures = attempt;
        match outcome {
            Settlement::Done => {}
            Settlement::Reject => self.dead.push((seq, "rejected")),
            _ if attempt < ATTEMPTS => return,
            _ => self.dead.push((seq, "attempts")),
        }
        (self.done, self.failures) = (seq, 0);
    }
}

fn leased(id: Uuid, at: usize, seq: u64, after: u64, attempt: u32, holder: &str, now: u64) -> Record {
    Record::from(&lease_record(id, at, seq, after, attempt, holder, now))
}

pub(super) fn lease_record(
    id: Uuid,
    at: usize,
    seq: u64,
    after: u64,
    attempt: u32,
    holder: &str,
    now: u64,
) -> WorkLeasedRecord {
    WorkLeasedRecord {
        kind: "work_leased".into(),
        id,
        tenant: TENANT.into(),
        thread: THREADS[at].into(),
        group: GROUP.into(),
        group_id: Uuid::from_bytes([1; 16]),
        seq,
        event_kind: "user_message".into(),
        after,
        parallel: false,
        attempt,
        attempts: ATTEMPTS,
        holder: holder.into(),
        at: clock::rfc3339(now),
        until: clock::rfc3339(now + LEASE),
    }
}

pub(super) fn settled(lease: Uuid, at: usize, outcome: Settlement, by: &str, now: u64) -> Record {
    Record::from(&WorkSettledRecord {
        kind: "work_settled".into(),
        id: clock::event_id(),
        tenant: TENANT.into(),
        thread: THREADS[at].into(),
        group: GROUP.into(),
        lease,
        outcome,
        reason: Some("it did not work".into()),
        until: Some(clock::rfc3339(now + 2 * LEASE)),
        by: by.into(),
        at: clock::rfc3339(now),
    })
}

/// The reasons of a thread's letters, by seq.
pub(super) fn letters(store: &Store, thread: &str) -> BTreeMap<u64, String> {
    let filter = DeadLetterFilter { thread: Some(thread.into()), ..DeadLetterFilter::default() };
    let mut dead = BTreeMap::new();
    let visit = |_, row: weft::store::dead_letters::DeadLetterRow, _| {
        assert_eq!((row.name.as_deref(), row.error.is_empty()), (Some(GROUP), false));
        dead.insert(row.seq.unwrap(), row.reason);
        Ok::<_, StoreError>(std::ops::ControlFlow::Continue(()))
    };
    store.dead_letters([TENANT, ""], &filter, weft::store::dead_letters::Order::OldestFirst, None, visit).unwrap();
    dead
}

/// Projects a log of these records at once and split up: of each it is as expected whether it counts, what they come to is what
/// `check` says, and it is the same both times.
pub(super) fn comes_to(
    records: Vec<Record>,
    counts: &[bool],
    restarts: &[Split],
    check: impl FnOnce(&Store),
) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 1).unwrap();
    append(&log, records);

    let entries = entries(&log);
    let (at_once, verdicts) = project(&log, &entries, &folder.path().join("at-once"), &[(usize::MAX / 2, false)]);
    prop_assert_eq!(verdicts.iter().map(Result::is_ok).collect::<Vec<_>>(), counts);
    check(&at_once);
    let (split, again) = project(&log, &entries, &folder.path().join("split"), restarts);
    prop_assert_eq!(&verdicts, &again);
    let differs = weft::projector::rebuild::compare(&at_once, &split).err();
    differs.map_or(Ok(()), |differs| Err(TestCaseError::fail(differs.to_string())))
}

fn check(store: &Store, model: &Model) {
    for (thread, expected) in THREADS.into_iter().zip(&model.threads) {
        let row = store.work(TENANT, thread, GROUP).unwrap().unwrap_or_default();
        assert_eq!(row.cursor, expected.done, "{thread}");
        let lease = row.leases.first().map(|lease| (Uuid::from_bytes(lease.id), lease.seq, lease.attempt, lease.until));
        assert_eq!(lease, expected.lease.map(|it| (it.id, it.seq, it.attempt, it.until)), "{thread}");
        assert_eq!(row.failed.first().map_or(0, |failed| failed.attempts), expected.failures, "{thread}");

        let dead = letters(store, thread);
        let expected: BTreeMap<_, _> = expected.dead.iter().map(|(seq, why)| (*seq, (*why).to_owned())).collect();
        assert_eq!(dead, expected, "{thread}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn leases_and_settlements_come_to_what_a_model_says_however_the_log_is_split(
        steps in proptest::collection::vec(step(), 1..120),
        restarts in proptest::collection::vec((1..20usize, proptest::bool::weighted(0.3)), 1..6),
    ) {
        let (mut model, mut now) = (Model::default(), BEGIN);
        let (records, counts): (Vec<Record>, Vec<bool>) = steps
            .iter()
            .map(|Step { jump, thread, act }| {
                now = now.saturating_add_signed(*jump);
                model.step(now, *thread, act)
            })
            .unzip();
        comes_to(records, &counts, &restarts, |store| check(store, &model))?;
    }
}

#[test]
fn a_lease_of_a_group_that_was_made_again_ends_what_a_holder_of_the_one_before_may_read() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 1).unwrap();
    let lease = |group: u8, holder| {
        let of = lease_record(clock::event_id(), 0, 1, 0, 1, holder, BEGIN);
        Record::from(&WorkLeasedRecord { group_id: Uuid::from_bytes([group; 16]), ..of })
    };
    append(
        &log,
        vec![
            record(BEGIN, THREADS[0], "ada", "user_message", &json!({"text": "hello"}), None),
            lease(1, "wim"),
            lease(2, "eve"),
            lease(3, "eve"),
        ],
    );
    let (store, progress) = open_store(&log, &folder.path().join("store"));
    let (applied, committed) = Projector::new(store.clone(), &log, progress).project(&entries(&log), &[4]).unwrap();
    assert_eq!(applied, 4);
    let over = committed.events.iter().filter_map(|it| match &it.update {
        Update::LeaseOver { user } => Some(&**user),
        _ => None,
    });
    assert_eq!(over.collect::<Vec<_>>(), ["wim"], "eve has another lease on the thread");
}

#[test]
fn records_about_work_and_kinds_are_foreign_by_earlier_rules_and_where_they_say_what_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 1).unwrap();
    let lease = || leased(clock::event_id(), 0, 1, 0, 1, "wim", BEGIN);
    let group = || {
        Record::from(&GroupRecord {
            kind: "group_set".into(),
            id: clock::event_id(),
            tenant: TENANT.into(),
            group: GROUP.into(),
            settings: Some(GroupSettings::default()),
            if_absent: false,
            by: "ada".into(),
            at: clock::rfc3339(BEGIN),
        })
    };
    let kind = || {
        Record::from(&KindRecord {
            kind: "kind_deleted".into(),
            id: clock::event_id(),
            tenant: TENANT.into(),
            name: "x.job".into(),
            schema: None,
            by: "ada".into(),
            at: clock::rfc3339(BEGIN).into(),
        })
    };
    let as_event = record(BEGIN, "t", "ada", "work_leased", &json!({}), None);
    let foreign = vec![
        Record { rules: 3, ..lease() },
        Record { rules: 3, ..group() },
        Record { key: "acme/another".into(), ..lease() },
        Record { kind: "work_settled".into(), ..lease() },
        Record { key: "groups:other".into(), ..group() },
        Record { kind: "group_deleted".into(), ..group() },
        Record { rules: 6, ..kind() },
        Record { key: "kinds:other".into(), ..kind() },
        Record { kind: "kind_set".into(), ..kind() },
        leased(clock::event_id(), 0, 1, 0, 0, "wim", BEGIN),
        Record { grant: Grant::Server, ..as_event },
    ];
    let wanted = foreign.len();
    append(&log, foreign);
    let (store, verdicts) = project(&log, &entries(&log), &folder.path().join("store"), &[(1, false)]);
    assert_eq!(verdicts.len(), 0);
    let letters = store.rows().filter(|row| row.as_ref().unwrap().0 == "dead_letters").count();
    assert_eq!(letters, wanted);
    assert_eq!(store.group(TENANT, GROUP).unwrap(), None);
}
