//! Random logs: projections are the same however the log is split into batches, and keep what they promise.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use weft::clock;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Entry, Grant, Record};
use weft::projector::{KEY_LIFETIME, Verdict};
use weft::protocol::event::{LogEvent, chain};
use weft::protocol::records::{TicketIssuedRecord, TicketUsedRecord};
use weft::protocol::tickets::{LIFETIME, Ticket, owner, owner_of_key};
use weft::store::{EventRange, Store};

use super::projector::{Split, append, entries, project, record};
use crate::support::TENANT;

/// One record of a random log.
#[derive(Debug, Clone)]
struct Step {
    /// By how much the writer's clock moves, in milliseconds; it may go back.
    jump: i64,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    /// An event of a user's in a thread, written by right of its scope or of membership.
    Event { thread: usize, from: usize, scope: bool, act: Act },
    /// As many events with a key of its own each.
    Burst { thread: usize, events: u8 },
    /// A user gets a ticket, or somebody uses it; a few of each user's have names.
    Ticket { user: usize, ticket: u8, used: bool },
    /// As many users get a ticket.
    Tickets { users: u8 },
    /// Not a record at all, in this partition.
    Garbage { partition: u32 },
    /// A record that is no event, or another thread's.
    Stray { thread: usize, text: &'static str },
}

#[derive(Debug, Clone)]
enum Act {
    Create { members: Vec<usize> },
    Retitle { title: u8 },
    Add { user: usize },
    Remove { user: usize },
    Malformed { kind: &'static str },
    Publish { content: u8, key: Option<u8>, parent: Option<u64> },
}

const THREADS: [&str; 4] = ["t", "a-b", "a.b", "long-winded:thread"];
const USERS: [&str; 3] = ["ada", "ben", "cid"];
const PARTITIONS: u32 = 3;
const TICKET_LIFETIME: u64 = LIFETIME.as_millis() as u64;

fn act() -> impl Strategy<Value = Act> {
    let user = 0..USERS.len();
    prop_oneof![
        10 => (0..2u8, proptest::option::weighted(0.7, 0..2u8), proptest::option::weighted(0.1, 1..6u64))
            .prop_map(|(content, key, parent)| Act::Publish { content, key, parent }),
        2 => user.clone().prop_map(|user| Act::Add { user }),
        2 => user.clone().prop_map(|user| Act::Remove { user }),
        1 => proptest::collection::vec(user, 0..3).prop_map(|members| Act::Create { members }),
        1 => (0..2u8).prop_map(|title| Act::Retitle { title }),
        1 => proptest::sample::select(vec!["thread_created", "thread_updated", "member_added", "member_removed"])
            .prop_map(|kind| Act::Malformed { kind }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    const MINUTE: i64 = 60_000;
    const DAY: i64 = KEY_LIFETIME as i64;
    let jumps = [
        vec![0, 0, 0, 1, 7, 400, 600, 29_999, 30_000, MINUTE, 59 * MINUTE, 60 * MINUTE],
        vec![-400, -90 * MINUTE, -2 * DAY, DAY - 500, DAY - 1, DAY, DAY, DAY + 500, DAY + MINUTE],
    ]
    .concat();
    // The first of each are the busiest.
    let thread = proptest::sample::select(vec![0, 0, 0, 1, 2, 3]);
    let from = proptest::sample::select(vec![0, 0, 0, 1, 2]);
    let what = prop_oneof![
        12 => (thread.clone(), from, proptest::bool::weighted(0.2), act())
            .prop_map(|(thread, from, scope, act)| What::Event { thread, from, scope, act }),
        1 => (proptest::sample::select(vec![0, 0, 1]), 1..200u8).prop_map(|(thread, events)| What::Burst { thread, events }),
        6 => (0..USERS.len(), 0..3u8, proptest::bool::ANY)
            .prop_map(|(user, ticket, used)| What::Ticket { user, ticket, used }),
        1 => (1..=255u8).prop_map(|users| What::Tickets { users }),
        1 => (0..PARTITIONS).prop_map(|partition| What::Garbage { partition }),
        1 => (thread, proptest::sample::select(vec!["", "null", "{}", r#"{"tenant":"acme"}"#, "\0", "another thread's"]))
            .prop_map(|(thread, text)| What::Stray { thread, text }),
    ];
    (proptest::sample::select(jumps), what).prop_map(|(jump, what)| Step { jump, what })
}

fn event_of(at: u64, thread: usize, from: usize, scope: bool, act: &Act) -> Record {
    let user = |user: &usize| USERS[*user];
    let (kind, data, key, parent) = match act {
        Act::Create { members } => {
            let members: Vec<&str> = members.iter().map(user).collect();
            ("thread_created", json!({"title": "made", "members": members}), None, None)
        }
        Act::Retitle { title } => ("thread_updated", json!({"title": format!("title {title}")}), None, None),
        Act::Add { user: added } => ("member_added", json!({"user": user(added)}), None, None),
        Act::Remove { user: removed } => ("member_removed", json!({"user": user(removed)}), None, None),
        Act::Malformed { kind } => (*kind, json!({"user": 1, "title": [], "members": ["a b"]}), None, None),
        Act::Publish { content, key, parent } => ("x.said", json!({"n": content}), *key, *parent),
    };
    let key = key.map(|key| format!("key {key}"));
    let mut record = record(at, THREADS[thread], USERS[from], kind, &data, key.as_deref());
    if let Some(parent) = parent {
        let mut event: LogEvent = serde_json::from_slice(&record.value).unwrap();
        event.parent = Some(parent);
        record.value = serde_json::to_vec(&event).unwrap().into();
    }
    if scope {
        record.grant = Grant::Scope;
    }
    record
}

/// A ticket of the user's with a name of our own, and the record that it is given or used.
fn ticket_record(at: u64, user: &str, ticket: u8, used: bool) -> Record {
    let owner = owner(TENANT, user);
    let ticket = Ticket::new(&owner, [[ticket; 16], [0; 16]]);
    let hash = blake3::Hash::from_bytes(ticket.hash()).to_hex().to_string();
    let (id, at_text) = (clock::event_id(), clock::rfc3339(at));
    if used {
        let kind = "ticket_used".to_owned();
        return Record::ticket_used(&owner, &TicketUsedRecord { kind, id, hash, at: at_text });
    }
    Record::from(&TicketIssuedRecord {
        kind: "ticket_issued".into(),
        id,
        tenant: TENANT.into(),
        user: user.into(),
        hash,
        scopes: "publish".into(),
        iat_ms: Some(at),
        exp: at / 1_000,
        at: at_text,
        expires_at: clock::rfc3339(at + TICKET_LIFETIME),
    })
}

/// Writes a random log, and returns how many records that were.
fn write(log: &EmbeddedLog, steps: &[Step]) -> usize {
    let mut records = 0;
    let mut now: u64 = 1_800_000_000_000;
    let mut batch = Vec::new();
    for Step { jump, what } in steps {
        now = now.saturating_add_signed(*jump);
        records += 1;
        match what {
            What::Burst { thread, events } => {
                let said =
                    |n| record(now, THREADS[*thread], USERS[0], "x.said", &json!(n), Some(&format!("burst {n}")));
                batch.extend((0..*events).map(said));
                records += usize::from(*events) - 1;
            }
            What::Ticket { user, ticket, used } => batch.push(ticket_record(now, USERS[*user], *ticket, *used)),
            What::Tickets { users } => {
                batch.extend((0..*users).map(|n| ticket_record(now, &format!("user{n}"), 0, false)));
                records += usize::from(*users) - 1;
            }
            What::Event { thread, from, scope, act } => batch.push(event_of(now, *thread, *from, *scope, act)),
            What::Garbage { partition } => {
                append(log, std::mem::take(&mut batch));
                log.append_foreign(*partition, b"\xffgarbage").unwrap();
            }
            What::Stray { thread, text } => {
                let mut stray = record(now, THREADS[*thread], USERS[0], "x.stray", &json!(1), None);
                if *text == "another thread's" {
                    stray.key = weft::protocol::ids::log_key(TENANT, "not-the-one-it-says");
                } else {
                    stray.value = text.as_bytes().into();
                }
                batch.push(stray);
            }
        }
    }
    append(log, batch);
    records
}

/// Log time after a record with the time `at`.
fn advance((log_time, last_at): &mut (u64, u64), at: u64) -> u64 {
    const HOUR: u64 = 60 * 60 * 1_000;
    *log_time = (*log_time).max(at.min(*last_at + HOUR));
    *last_at = at;
    *log_time
}

fn ticket_time(record: &Record) -> u64 {
    let value: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
    clock::parse_rfc3339(value["at"].as_str().unwrap()).unwrap()
}

/// What is known of a ticket that was given: when it expires, and from which log time on its row may be gone.
type GivenTickets = BTreeMap<String, (u64, u64)>;

/// Checks the verdict on a record about a ticket.
fn check_ticket(given: &mut GivenTickets, record: &Record, log_time: u64, verdict: &Verdict) {
    let value: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
    let at = ticket_time(record);
    let hash = format!("{} {}", record.key, value["hash"]);
    if value["kind"] == "ticket_issued" {
        assert!(verdict.is_ok(), "no user has so many: {verdict:?}");
        // Those of the user that have expired go.
        given.retain(|other, (expires, _)| !other.starts_with(&record.key) || *expires > at);
        let (expires, purged) = (at + TICKET_LIFETIME, at.max(log_time) + TICKET_LIFETIME);
        let known = given.entry(hash).or_insert((expires, purged));
        if log_time >= known.1 {
            // The first one may be gone, and this one is given in its place.
            known.0 = known.0.max(expires);
        }
        return;
    }
    match (given.remove(&hash), verdict) {
        (found, Ok(_)) => {
            let (expires, _) = found.expect("nobody uses a ticket that was not given, or was used before");
            assert!(at < expires, "{at} is beyond {expires}");
        }
        (Some((expires, purged)), Err(_)) => assert!(at >= expires || log_time >= purged, "it was good"),
        (None, Err(_)) => {}
    }
}

/// What must hold in any store made of these entries with these verdicts.
fn check(entries: &[Entry], verdicts: &[Verdict], store: &Store) {
    // Of each partition its log time, and the time of its last record.
    let mut clocks = [(0, 0); PARTITIONS as usize];
    let mut chains: BTreeMap<&str, (u64, [u8; 32])> = BTreeMap::new();
    let mut taken: BTreeMap<(&str, String, String), (u64, u64)> = BTreeMap::new();
    let mut given = GivenTickets::new();
    let mut verdicts = verdicts.iter();
    for entry in entries {
        let Ok(record) = &entry.record else { continue };
        if owner_of_key(&record.key).is_some() {
            let log_time = advance(&mut clocks[entry.at.partition as usize], ticket_time(record));
            check_ticket(&mut given, record, log_time, verdicts.next().unwrap());
            continue;
        }
        let Ok(event) = serde_json::from_slice::<LogEvent>(&record.value) else { continue };
        if record.key != weft::protocol::ids::log_key(&event.tenant, &event.thread) {
            continue;
        }
        let at = clock::parse_rfc3339(&event.at).unwrap();
        let time = at.max(advance(&mut clocks[entry.at.partition as usize], at));
        let thread = THREADS.into_iter().find(|thread| *thread == event.thread).unwrap();
        let (head, hash) = chains.entry(thread).or_default();
        let Ok(published) = verdicts.next().unwrap() else { continue };
        let key = event.key.as_deref().map(|key| (thread, event.from.to_string(), key.to_owned()));
        if published.duplicate {
            assert!(published.seq <= *head);
            if let Some(key) = key {
                let (seq, since) = taken[&key];
                assert!(published.seq == seq && time.saturating_sub(since) < KEY_LIFETIME, "{key:?}");
            }
            continue;
        }
        *head += 1;
        assert_eq!(published.seq, *head, "dense in {thread}");
        *hash = chain(hash, *head, &record.value);
        if let Some(key) = key
            && let Some((_, since)) = taken.insert(key.clone(), (*head, time))
        {
            assert!(time.saturating_sub(since) >= KEY_LIFETIME, "{key:?} was still taken");
        }
    }
    assert!(verdicts.next().is_none(), "a verdict for each event");
    for (thread, (head, hash)) in chains {
        let seqs: Vec<u64> =
            store.events(TENANT, thread, EventRange::all()).unwrap().iter().map(|event| event.seq).collect();
        assert_eq!(seqs, (1..=head).collect::<Vec<_>>(), "{thread}");
        let row = store.thread(TENANT, thread).unwrap();
        assert_eq!(row.map(|row| (row.head, row.hash)), (head > 0).then_some((head, hash)), "{thread}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn however_a_log_is_split_into_batches_and_restarts_its_projections_are_equal_row_by_row(
        steps in proptest::collection::vec(step(), 1..150),
        splits in proptest::collection::vec(1..40usize, 1..6),
        restarts in proptest::collection::vec((1..40usize, proptest::bool::weighted(0.3)), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(&folder.path().join("log"), PARTITIONS).unwrap();
        let records = write(&log, &steps);
        let entries = entries(&log);
        prop_assert_eq!(entries.len(), records);
        let at_once = project(&log, &entries, &folder.path().join("at-once"), &[(usize::MAX / 2, false)]);
        check(&entries, &at_once.1, &at_once.0);
        let splits: Vec<Split> = splits.into_iter().map(|size| (size, false)).collect();
        for (name, splits) in [("split", splits), ("restarted", restarts)] {
            let other = project(&log, &entries, &folder.path().join(name), &splits);
            prop_assert_eq!(&at_once.1, &other.1, "{} verdicts", name);
            if let Err(differs) = weft::projector::rebuild::compare(&at_once.0, &other.0) {
                return Err(TestCaseError::fail(format!("{name}: {differs}")));
            }
        }
    }
}
