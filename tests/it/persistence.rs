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
use weft::projector::{Commit, KEY_LIFETIME, Projector, Update, Verdict};
use weft::protocol::error::Code;
use weft::protocol::event::{LogEvent, chain};
use weft::store::catalogue::{KEY_TIMES, KEYS, MESSAGE_TEXTS};
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

/// The most that one commit publishes in any log here: its bound of 8 MiB, and the text that one run may leave open.
const MAX_COMMIT: usize = (8 << 20) + (9 << 20);

/// The bytes of the frames and the texts that a commit publishes.
fn published_bytes(commit: &Commit) -> usize {
    let bytes = |update: &Update| match update {
        Update::Event(event, _) => event.frame.len(),
        Update::Delta(delta) => delta.text.len(),
    };
    commit.events.iter().map(|event| bytes(&event.update)).sum()
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
            // The embedded log counts over all partitions: what is after an entry is after it in each of them.
            let after = vec![entries[until - 1].at.offset + 1; log.partitions() as usize];
            let (applied, committed) = projector.project(&entries[done..until], &after).unwrap();
            assert!(applied > 0, "every call applies something");
            assert!(published_bytes(&committed) <= MAX_COMMIT, "{} bytes in one commit", published_bytes(&committed));
            done += applied;
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
        // The second record of that time confirms it, and what has expired by then is purged.
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
    let later = || say(TAKEN + 2 * KEY_LIFETIME + HOUR, "t", "a day later", None);
    append(&log, vec![later(), later()]);
    let all = entries(&log);
    let stores: Vec<Arc<Store>> =
        [&[(1_000, false)][..], &[(1, false)], &[(1, true)], &[(2, false), (3, true)], &[(5, true)]]
            .iter()
            .enumerate()
            .map(|(n, splits)| {
                let (store, verdicts) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
                assert_eq!(verdicts[..in_force.1.len()], in_force.1);
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
fn expired_keys_are_purged_a_few_with_each_record_and_are_free_before() {
    const TAKEN: u64 = 1_800_000_000_000;
    const LATER: u64 = TAKEN + 2 * KEY_LIFETIME;
    const KEYS_TAKEN: usize = 300;
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let said = |at, n: usize, key: Option<String>| record(at, "t", "ada", "x.said", &json!(n), key.as_deref());
    let key = |n: usize| Some(format!("key {n}"));
    append(&log, (0..KEYS_TAKEN).map(|n| said(TAKEN, n, key(n))).collect());
    // The last of them is the last to be purged. It is free at once nonetheless, and stays taken from then on.
    let again = KEYS_TAKEN + 3;
    append(
        &log,
        vec![said(LATER, 0, None), said(LATER, 1, None), said(LATER, again, key(99)), said(LATER, again, key(99))],
    );
    append(&log, (0..8).map(|n| said(LATER + 1, n, None)).collect());
    let all = entries(&log);

    let path = folder.path().join("one-by-one");
    let (store, progress) = Store::open_for(&path, log.epoch(), log.partitions()).unwrap();
    let store = Arc::new(store);
    let mut projector = Projector::new(store.clone(), &log, progress);
    let (mut left, mut verdicts) = (Vec::new(), Vec::new());
    for entry in &all {
        let after = vec![entry.at.offset + 1; log.partitions() as usize];
        let (_, commit) = projector.project(std::slice::from_ref(entry), &after).unwrap();
        verdicts.extend(commit.verdicts.into_iter().map(|(_, verdict)| verdict));
        left.push(rows_of(&store, KEY_TIMES));
    }
    assert_eq!(left[KEYS_TAKEN - 1], KEYS_TAKEN);
    assert!(left.windows(2).all(|pair| pair[0] <= pair[1] + 64), "a few with each record: {left:?}");
    let duplicate: Vec<bool> =
        verdicts[KEYS_TAKEN + 2..][..2].iter().map(|it| it.as_ref().unwrap().duplicate).collect();
    assert!(left[KEYS_TAKEN + 2] > 100, "it is not purged yet: {left:?}");
    assert_eq!(duplicate, [false, true]);
    assert_eq!((rows_of(&store, KEYS), rows_of(&store, KEY_TIMES)), (1, 1), "in the end only that one is left");

    for (n, splits) in
        [&[(1_000, false)][..], &[(2, true)], &[(303, true), (1, true)], &[(301, false), (7, true)]].iter().enumerate()
    {
        let (other, others) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
        assert_eq!(others, verdicts, "{splits:?}");
        weft::projector::rebuild::compare(&store, &other).unwrap();
    }
}

#[test]
fn a_record_from_the_future_neither_frees_keys_nor_stops_the_partitions_clock() {
    const HOUR: u64 = 60 * 60 * 1_000;
    const NOW: u64 = 500_000 * HOUR;
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let said = |at, key| record(at, "t", "ada", "x.said", &json!(key), Some(key));
    let steps = [
        (said(NOW, "before"), false),
        (said(NOW + 48 * HOUR, "from the future"), false),
        (said(NOW + 1_000, "before"), true),
        (said(NOW + 2_000, "after"), false),
        (said(NOW + 24 * HOUR - 1, "before"), true),
        // "after" was taken at its partition's time, which was an hour ahead at most.
        (said(NOW + 26 * HOUR, "after"), false),
    ];
    let wanted: Vec<bool> = steps.iter().map(|(_, duplicate)| *duplicate).collect();
    append(&log, steps.into_iter().map(|(record, _)| record).collect());
    let all = entries(&log);
    for (n, splits) in [&[(1, true)][..], &[(1_000, false)]].iter().enumerate() {
        let (_, verdicts) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
        let duplicates: Vec<bool> = verdicts.into_iter().map(|verdict| verdict.unwrap().duplicate).collect();
        assert_eq!(duplicates, wanted, "{splits:?}");
    }
}

/// A record of a run, as an agent with the scope for it writes it.
fn run_record(at: u64, thread: &str, run: &str, kind: &str, data: &Value) -> Record {
    let mut made = record(at, thread, "scout", kind, data, None);
    let mut event: LogEvent = serde_json::from_slice(&made.value).unwrap();
    event.run = Some(run.into());
    made.value = serde_json::to_vec(&event).unwrap().into();
    made.grant = Grant::Scope;
    made
}

#[test]
fn a_commit_has_a_bound_in_bytes_also_when_many_runs_end_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let threads: Vec<String> = (0..5).map(|n| format!("t{n}")).collect();
    let text = "x".repeat(1 << 20);
    for thread in &threads {
        let of = |kind: &str, data: &Value| run_record(1_800_000_000_000, thread, "r", kind, data);
        append(&log, vec![of("agent_started", &json!({"agent": "scout"}))]);
        for message in 0..7 {
            let data = json!({"message": format!("m{message}"), "from_char": 0, "text": text});
            append(&log, vec![of("agent_token", &data)]);
        }
    }
    let end = |thread: &String| run_record(1_800_000_000_001, thread, "r", "agent_completed", &json!({}));
    append(&log, threads.iter().map(end).collect());

    let all = entries(&log);
    let (at_once, verdicts) = project(&log, &all, &folder.path().join("at-once"), &[(1_000, false)]);
    assert!(verdicts.iter().all(Result::is_ok));
    for thread in &threads {
        assert_eq!(at_once.head(TENANT, thread).unwrap(), 9, "seven messages between the start and the end");
    }
    let (one_by_one, _) = project(&log, &all, &folder.path().join("one-by-one"), &[(1, true)]);
    weft::projector::rebuild::compare(&at_once, &one_by_one).unwrap();
}

#[test]
fn a_message_of_many_deltas_leaves_no_text_behind_and_no_other_message_loses_any() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let of = |kind: &str, data: &Value| run_record(1_800_000_000_000, "t", "r", kind, data);
    let delta = |message: &str, n: u64| of("agent_token", &json!({"message": message, "from_char": n, "text": "x"}));
    let mut records = vec![of("agent_started", &json!({"agent": "scout"}))];
    records.extend((0..600).flat_map(|n| [delta("m", n), delta("m2", n), delta("n", n)]));
    records.push(of("agent_message", &json!({"message": "m"})));
    append(&log, records);
    let all = entries(&log);
    let (at_once, verdicts) = project(&log, &all, &folder.path().join("at-once"), &[(2_000, false)]);
    assert!(verdicts.iter().all(Result::is_ok));
    assert_eq!(rows_of(&at_once, MESSAGE_TEXTS), 1_200);
    let (split, _) = project(&log, &all, &folder.path().join("split"), &[(1_000, true), (700, false)]);
    weft::projector::rebuild::compare(&at_once, &split).unwrap();
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
        run_record(1_800_000_000_000 + n, thread, &run, kind, &data)
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
    /// As many events with a key of its own each.
    Burst { thread: usize, events: u8 },
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
        1 => (proptest::sample::select(vec![0, 0, 1]), 1..200u8).prop_map(|(thread, events)| What::Burst { thread, events }),
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

/// What must hold in any store made of these entries with these verdicts.
fn check(entries: &[Entry], verdicts: &[Verdict], store: &Store) {
    const HOUR: u64 = 60 * 60 * 1_000;
    // Of each partition its log time, and the time of its last record.
    let mut clocks = [(0, 0); PARTITIONS as usize];
    let mut chains: BTreeMap<&str, (u64, [u8; 32])> = BTreeMap::new();
    let mut taken: BTreeMap<(&str, String, String), (u64, u64)> = BTreeMap::new();
    let mut verdicts = verdicts.iter();
    for entry in entries {
        let Ok(record) = &entry.record else { continue };
        let Ok(event) = serde_json::from_slice::<LogEvent>(&record.value) else { continue };
        if record.key != weft::protocol::ids::log_key(&event.tenant, &event.thread) {
            continue;
        }
        let at = clock::parse_rfc3339(&event.at).unwrap();
        let (log_time, last_at) = &mut clocks[entry.at.partition as usize];
        *log_time = (*log_time).max(at.min(*last_at + HOUR));
        *last_at = at;
        let time = at.max(*log_time);
        let thread = THREADS.into_iter().find(|thread| *thread == event.thread).unwrap();
        let (head, hash) = chains.entry(thread).or_default();
        let Ok(published) = verdicts.next().unwrap() else { continue };
        let key = event.key.as_deref().map(|key| (thread, event.from.to_string(), key.to_owned()));
        if published.duplicate {
            assert!(published.seq <= *head);
            if let Some(key) = key {
                let (seq, since) = taken[&key];
                assert!(published.seq == seq && time - since < KEY_LIFETIME, "{key:?}");
            }
            continue;
        }
        *head += 1;
        assert_eq!(published.seq, *head, "dense in {thread}");
        *hash = chain(hash, *head, &record.value);
        if let Some(key) = key
            && let Some((_, since)) = taken.insert(key.clone(), (*head, time))
        {
            assert!(time - since >= KEY_LIFETIME, "{key:?} was still taken");
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
