//! What is kept: keys, chains, projections that come back from the log.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use weft::clock;
use weft::ingest::admit::new_event;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Append, Entry, Grant, Log, Position, Record, Topic};
use weft::projector::Verdict;
use weft::projector::{KEY_LIFETIME, Projector};
use weft::protocol::error::Code;
use weft::protocol::event::{LogEvent, chain};
use weft::store::catalogue::{KEY_TIMES, KEYS};
use weft::store::{EventRange, Store};

use crate::on_both_logs;
use crate::support::{LogKind, Server, TENANT, publish, weft};

on_both_logs!(a_publish_sent_again_with_its_key_becomes_one_event_also_after_a_kill, |log| async move {
    let mut server = Server::start(log);
    let keyed = |content: &str| {
        let mut command = publish("t", "user_message", json!({"content": content}));
        command["key"] = json!("k1");
        command
    };
    let first = server.connect("ada").await.ask(keyed("hello")).await;
    assert_eq!((&first["seq"], &first["duplicate"]), (&json!(1), &json!(false)), "{first}");
    let again = server.connect("ada").await.ask(keyed("hello")).await;
    assert_eq!((&again["seq"], &again["duplicate"], &again["event"]), (&json!(1), &json!(true), &first["event"]));
    server.kill();
    server.up();
    server.ready().await;
    let after_kill = server.connect("ada").await.ask(keyed("hello")).await;
    assert_eq!((&after_kill["seq"], &after_kill["duplicate"]), (&json!(1), &json!(true)));
    let conflict = server.connect("ada").await.ask(keyed("another content")).await;
    assert_eq!((&conflict["code"], &conflict["field"]), (&json!("conflict"), &json!("key")));
    // White space is not content, and HTTP is the same thread as WebSocket.
    let body = r#"{"kind":"user_message","data":{ "content" : "hello" }}"#;
    let reply = server
        .http_with(
            "POST",
            "/v1/threads/t/events",
            &crate::support::token("ada", ""),
            serde_json::from_str(body).ok(),
            &[("Idempotency-Key", "k1")],
        )
        .await;
    assert_eq!((reply.0, &reply.1["seq"], &reply.1["duplicate"]), (200, &json!(1), &json!(true)));
    assert_eq!(server.http("GET", "/v1/threads/t", "ada", None).await.1["head"], 1);
});

#[tokio::test]
async fn a_key_belongs_to_its_user_and_thread() {
    let server = Server::start(LogKind::embedded());
    let keyed = |thread: &str| {
        let mut command = publish(thread, "user_message", json!({"content": thread}));
        command["key"] = json!("same");
        command
    };
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.ask(keyed("t1")).await["duplicate"], false);
    assert_eq!(ada.ask(keyed("t2")).await["duplicate"], false);
    assert_eq!(server.http("PUT", "/v1/threads/t1/members/ben", "ada", None).await.0, 201);
    let mut ben = server.connect("ben").await;
    assert_eq!(ben.ask(keyed("t1")).await["duplicate"], false);
}

on_both_logs!(rebuilt_projections_equal_the_live_ones_row_by_row, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for thread in ["a", "b", "c"] {
        for n in 0..50 {
            let mut command = publish(thread, "x.note", json!({"n": n}));
            command["key"] = json!(format!("k{}", n % 40));
            ada.ask(command).await;
        }
    }
    server.http("PUT", "/v1/threads/a", "ada", Some(json!({"title": "A", "members": ["ben", "cid"]}))).await;
    server.http("DELETE", "/v1/threads/a/members/ben", "ada", None).await;
    let mut agent = server.connect_as("scout", "publish agent").await;
    for run in ["ended", "open"] {
        let mut step = async |kind: &str, data: Value| {
            let command = json!({"type": "publish", "thread": "a", "run": run, "kind": kind, "data": data});
            assert_eq!(agent.ask(command).await["type"], "published");
        };
        step("agent_started", json!({"agent": "scout"})).await;
        for n in 0..10 {
            step("agent_token", json!({"message": "m", "from_char": 2 * n, "text": "ab"})).await;
            step("agent_token", json!({"message": "n", "from_char": n, "text": "c"})).await;
        }
        step("agent_message", json!({"message": "m"})).await;
        if run == "ended" {
            step("agent_completed", json!({})).await;
        }
    }
    let before = server.http("GET", "/v1/threads/a", "ada", None).await.1;
    server.stop().await;
    let run = |more: &[&str]| {
        let output = weft()
            .args(["rebuild", "--data"])
            .arg(server.data())
            .args(server.log().arguments())
            .args(more)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (code, said) = run(&["--check"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&[]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    assert_eq!(server.http("GET", "/v1/threads/a", "ada", None).await.1, before);
    server.stop().await;
    // Deleted while stopped, they come back by themselves.
    std::fs::remove_dir_all(server.data().join("projections")).unwrap();
    server.up();
    server.ready().await;
    assert_eq!(server.http("GET", "/v1/threads/a", "ada", None).await.1, before);
});

#[test]
fn a_rebuild_without_a_log_is_refused_and_makes_none() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("nowhere");
    for more in [&[][..], &["--check"]] {
        let output = weft().args(["rebuild", "--data"]).arg(&data).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("there is no log in") && said.contains("nowhere"), "{said}");
        assert!(!data.exists(), "nothing was created");
    }
}

#[tokio::test]
async fn a_thread_s_hash_covers_every_event_in_order() {
    let mut server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..5 {
        ada.say("t", &n.to_string()).await;
    }
    let thread = server.http("GET", "/v1/threads/t", "ada", None).await.1;
    drop(ada);
    server.stop().await;
    let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 16).unwrap();
    let mut reader = log.reader(&vec![0; log.partitions() as usize]).unwrap();
    let mut hash = [0; 32];
    for (n, entry) in reader.next(100, std::time::Duration::ZERO).unwrap().iter().enumerate() {
        hash = chain(&hash, n as u64 + 1, &entry.record.as_ref().unwrap().value);
    }
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(thread["hash"], hex);
}

#[tokio::test]
async fn another_number_of_partitions_is_refused_with_both_numbers() {
    let mut server = Server::start(LogKind::embedded());
    server.stop().await;
    let output = weft()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--jwt-secret",
            crate::support::SECRET,
            "--partitions",
            "5",
            "--data",
        ])
        .arg(server.data())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("16 partitions") && said.contains("5 are configured"), "{said}");
}

#[tokio::test]
async fn a_record_that_is_not_ours_is_counted_and_the_rest_is_served() {
    let mut server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "before").await;
    server.stop().await;
    {
        let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 16).unwrap();
        log.append_foreign(3, b"what is this?").unwrap();
        weft::log::Log::close(&log);
    }
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "after").await, 2);
    assert_eq!(server.metric("weft_foreign_records_total").await, 1.0);
    let page = server.http("GET", "/v1/threads/t/events", "ada", None).await.1;
    let contents: Vec<&Value> =
        page["events"].as_array().unwrap().iter().map(|event| &event["data"]["content"]).collect();
    assert_eq!(contents, ["before", "after"]);
}

/// A record as the server writes it, at a moment of our choosing.
fn record(at: u64, thread: &str, from: &str, kind: &str, data: &Value, key: Option<&str>) -> Record {
    let data = serde_json::value::to_raw_value(data).unwrap();
    let mut event = new_event(TENANT, from, thread, kind, &data);
    event.at = clock::rfc3339(at).into();
    event.key = key.map(Into::into);
    Record {
        topic: Topic::Events,
        key: weft::protocol::ids::log_key(TENANT, thread),
        kind: kind.to_owned(),
        grant: Grant::Member,
        traceparent: None,
        value: serde_json::to_vec(&event).unwrap().into(),
    }
}

/// Appends records and waits until they are durable.
fn append(log: &EmbeddedLog, records: Vec<Record>) -> Vec<Position> {
    let (sender, answers) = mpsc::sync_channel(records.len());
    let batch = records.into_iter().map(|record| {
        let sender = sender.clone();
        Append { record, done: Box::new(move |answer| drop(sender.send(answer))) }
    });
    log.append(batch.collect());
    drop(sender);
    answers.iter().map(|answer| answer.unwrap()).collect()
}

/// Everything the log holds, in its order.
fn entries(log: &EmbeddedLog) -> Vec<Entry> {
    let mut reader = log.reader(&vec![0; log.partitions() as usize]).unwrap();
    let end = log.bounds().unwrap()[0].end;
    let mut entries = Vec::new();
    while (entries.len() as u64) < end {
        entries.extend(reader.next(1_000, Duration::ZERO).unwrap());
    }
    entries
}

/// How many entries the projector gets at once, and whether it is taken down after them and begins anew from the store.
type Split = (usize, bool);

/// Projects entries into a new store, split again and again in the same way; gives the verdicts in their order.
fn project(log: &EmbeddedLog, entries: &[Entry], folder: &Path, splits: &[Split]) -> (Arc<Store>, Vec<Verdict>) {
    let open = || {
        let (store, progress) = Store::open_for(folder, log.epoch(), log.partitions()).unwrap();
        let store = Arc::new(store);
        (store.clone(), Projector::new(store, log, progress))
    };
    let (mut store, mut projector) = open();
    let (mut done, mut verdicts) = (0, Vec::new());
    for (size, restart) in splits.iter().cycle() {
        let until = entries.len().min(done + size.max(&1));
        while done < until {
            // The embedded log counts over all partitions: behind an entry is behind it in each of them.
            let behind = vec![entries[until - 1].at.offset + 1; log.partitions() as usize];
            let (taken, committed) = projector.project(&entries[done..until], &behind).unwrap();
            assert!(taken > 0, "it gets on");
            done += taken;
            verdicts.extend(committed.verdicts.into_iter().map(|(_, verdict)| verdict));
        }
        if done == entries.len() {
            return (store, verdicts);
        }
        if *restart {
            store.flush().unwrap();
            drop((store, projector));
            (store, projector) = open();
            let next = projector.positions();
            let read = |entry: &Entry| entry.at.offset < next[entry.at.partition as usize];
            assert!(entries[..done].iter().all(read) && !entries[done..].iter().any(read), "it goes on where it was");
        }
    }
    unreachable!("splits are repeated until all is done")
}

fn rows_of(store: &Store, family: &str) -> usize {
    store.rows().filter(|row| row.as_ref().unwrap().0 == family).count()
}

#[test]
fn a_key_is_taken_for_24_hours_of_its_partitions_log_time_and_free_after_that() {
    const HOUR: u64 = 60 * 60 * 1_000;
    const TAKEN: u64 = 480_000 * HOUR;
    assert_eq!(KEY_LIFETIME, 24 * HOUR);
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let say = |at: u64, thread: &str, content: &str, key: Option<&str>| {
        record(at, thread, "ada", "user_message", &json!({"content": content}), key)
    };
    let here = append(&log, vec![say(TAKEN, "t", "one", Some("k"))])[0].partition;
    // The clock of another partition, weeks ahead, says nothing about this one.
    let mut others = 0;
    while append(&log, vec![say(TAKEN, &format!("other-{others}"), "hello", None)])[0].partition == here {
        others += 1;
    }
    let steps = [
        (say(TAKEN + 1_000 * HOUR, &format!("other-{others}"), "weeks ahead", Some("k")), Ok((2, false))),
        (say(TAKEN + KEY_LIFETIME - 1, "t", "one", Some("k")), Ok((1, true))),
        // A node whose clock is behind does not turn the log's time back.
        (say(TAKEN - 5 * HOUR, "t", "one", Some("k")), Ok((1, true))),
        (say(TAKEN, "t", "two", Some("k")), Err(Code::Conflict)),
        (say(TAKEN + KEY_LIFETIME, "t", "two", Some("k")), Ok((2, false))),
        (say(TAKEN + KEY_LIFETIME, "t", "two", Some("k")), Ok((2, true))),
        (say(TAKEN, "t", "one", Some("k")), Err(Code::Conflict)),
        (say(TAKEN, "t", "three", Some("j")), Ok((3, false))),
        // Taken at the log's time, not at its own: it has another day.
        (say(TAKEN + KEY_LIFETIME + HOUR, "t", "three", Some("j")), Ok((3, true))),
    ];
    let wanted: Vec<Result<(u64, bool), Code>> = steps.iter().map(|(_, verdict)| *verdict).collect();
    append(&log, steps.into_iter().map(|(record, _)| record).collect());

    let all = entries(&log);
    let in_force = project(&log, &all, &folder.path().join("in-force"), &[(1_000, false)]);
    let verdicts: Vec<Result<(u64, bool), Code>> = in_force.1[others + 2..]
        .iter()
        .map(|verdict| verdict.as_ref().map(|it| (it.seq, it.duplicate)).map_err(|error| error.code))
        .collect();
    assert_eq!(verdicts, wanted);
    assert_eq!((rows_of(&in_force.0, KEYS), rows_of(&in_force.0, KEY_TIMES)), (3, 3), "the first time of k is purged");

    // Whatever comes later in the partition lets the old keys go, the other partition keeps its own.
    append(&log, vec![say(TAKEN + 2 * KEY_LIFETIME + HOUR, "t", "a day later", None)]);
    let all = entries(&log);
    let stores: Vec<Arc<Store>> =
        [&[(1_000, false)][..], &[(1, false)], &[(1, true)], &[(2, false), (3, true)], &[(5, true)]]
            .iter()
            .enumerate()
            .map(|(n, splits)| {
                let (store, verdicts) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
                assert_eq!(verdicts[..verdicts.len() - 1], in_force.1);
                store
            })
            .collect();
    assert_eq!((rows_of(&stores[0], KEYS), rows_of(&stores[0], KEY_TIMES)), (1, 1));
    for store in &stores[1..] {
        weft::projector::rebuild::compare(&stores[0], store).unwrap();
    }
}

#[test]
fn a_key_gets_free_at_the_same_record_whatever_is_projected_together_with_it() {
    const DAY: u64 = KEY_LIFETIME;
    // Not a whole second, nor a whole anything.
    const TAKEN: u64 = 1_800_000_000_300;
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let times = [0, 1_000, DAY - 301, DAY - 1, DAY, DAY + 699, DAY + 700, DAY + 5_000, 2 * DAY + 5_000, 4 * DAY];
    let said = |at, content: &str, key| record(at, "t", "ada", "x.said", &json!(content), key);
    let pair = |after| [said(TAKEN + after, "the same", Some("k")), said(TAKEN + after, "in between", None)];
    append(&log, times.into_iter().flat_map(pair).collect());
    let all = entries(&log);
    let (one_by_one, verdicts) = project(&log, &all, &folder.path().join("one-by-one"), &[(1, false)]);
    let taken = |verdict: &&Verdict| matches!(verdict, Ok(it) if !it.duplicate);
    assert_eq!(verdicts.iter().step_by(2).filter(taken).count(), 4, "at first, and after one day, two and four");
    for (n, splits) in
        [&[(1_000, false)][..], &[(2, false)], &[(3, true)], &[(7, false), (4, false)]].iter().enumerate()
    {
        let (store, others) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
        assert_eq!(others, verdicts, "{splits:?}");
        weft::projector::rebuild::compare(&one_by_one, &store).unwrap();
    }
}

#[test]
fn messages_in_pieces_come_out_the_same_whatever_is_projected_together() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    // Two threads with two runs each at a time, some of which end; each writes two messages, with holes and repetitions.
    let written = |n: u64| {
        let random = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 11;
        let (thread, run, message) =
            (["t", "u"][n as usize % 2], format!("r{}-{}", n / 150, random % 2), format!("m{}", random % 3 / 2));
        let (kind, data) = match random / 8 % 16 {
            0 => ("agent_started", json!({"agent": "scout"})),
            1 => ("agent_message", json!({"message": message})),
            2 if random.is_multiple_of(5) => ("agent_failed", json!({"code": "broken", "message": "it broke"})),
            _ => ("agent_token", json!({"message": message, "from_char": random / 128 % 12, "text": "abcdéf"})),
        };
        let mut made = record(1_800_000_000_000 + n, thread, "scout", kind, &data, None);
        let mut event: LogEvent = serde_json::from_slice(&made.value).unwrap();
        event.run = Some((&*run).into());
        made.value = serde_json::to_vec(&event).unwrap().into();
        made.grant = Grant::Scope;
        made
    };
    append(&log, (0..1_500).map(written).collect());
    let all = entries(&log);
    let (one_by_one, verdicts) = project(&log, &all, &folder.path().join("one-by-one"), &[(1, false)]);
    let taken = verdicts.iter().filter(|verdict| verdict.is_ok()).count();
    assert!((100..1_300).contains(&taken), "{taken} are taken and some refused");
    for (n, splits) in
        [&[(2_000, false)][..], &[(2, false)], &[(3, true)], &[(40, true), (1, false)]].iter().enumerate()
    {
        let (store, others) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
        assert_eq!(others, verdicts, "{splits:?}");
        weft::projector::rebuild::compare(&one_by_one, &store).unwrap();
    }
}

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
        vec![0, 0, 0, 1, 7, 400, 600, MINUTE, 59 * MINUTE, 60 * MINUTE],
        vec![-400, -90 * MINUTE, -2 * DAY, DAY - 500, DAY - 1, DAY, DAY, DAY + 500, DAY + MINUTE],
    ]
    .concat();
    // The first of each are the busiest.
    let thread = proptest::sample::select(vec![0, 0, 0, 1, 2, 3]);
    let from = proptest::sample::select(vec![0, 0, 0, 1, 2]);
    let what = prop_oneof![
        12 => (thread.clone(), from, proptest::bool::weighted(0.2), act())
            .prop_map(|(thread, from, scope, act)| What::Event { thread, from, scope, act }),
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

/// Writes a random log.
fn write(log: &EmbeddedLog, steps: &[Step]) {
    let mut now: u64 = 1_800_000_000_000;
    let mut batch = Vec::new();
    for Step { jump, what } in steps {
        now = now.saturating_add_signed(*jump);
        match what {
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
}

/// What must hold in any store made of these entries with these verdicts.
fn check(entries: &[Entry], verdicts: &[Verdict], store: &Store) {
    let mut log_time = [0; PARTITIONS as usize];
    let mut chains: BTreeMap<&str, (u64, [u8; 32])> = BTreeMap::new();
    let mut taken: BTreeMap<(&str, String, String), (u64, u64)> = BTreeMap::new();
    let mut verdicts = verdicts.iter();
    for entry in entries {
        let Ok(record) = &entry.record else { continue };
        let Ok(event) = serde_json::from_slice::<LogEvent>(&record.value) else { continue };
        if record.key != weft::protocol::ids::log_key(&event.tenant, &event.thread) {
            continue;
        }
        let time = &mut log_time[entry.at.partition as usize];
        *time = (*time).max(clock::parse_rfc3339(&event.at).unwrap());
        let thread = THREADS.into_iter().find(|thread| *thread == event.thread).unwrap();
        let (head, hash) = chains.entry(thread).or_default();
        let Ok(published) = verdicts.next().unwrap() else { continue };
        let key = event.key.as_deref().map(|key| (thread, event.from.to_string(), key.to_owned()));
        if published.duplicate {
            assert!(published.seq <= *head);
            if let Some(key) = key {
                let (seq, since) = taken[&key];
                assert!(published.seq == seq && *time - since < KEY_LIFETIME, "{key:?}");
            }
            continue;
        }
        *head += 1;
        assert_eq!(published.seq, *head, "dense in {thread}");
        *hash = chain(hash, *head, &record.value);
        if let Some(key) = key
            && let Some((_, since)) = taken.insert(key.clone(), (*head, *time))
        {
            assert!(*time - since >= KEY_LIFETIME, "{key:?} was still taken");
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
        write(&log, &steps);
        let entries = entries(&log);
        prop_assert_eq!(entries.len(), steps.len());
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
