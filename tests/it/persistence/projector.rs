//! What the projector makes of a log, however its entries are put together.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use weft::clock;
use weft::ingest::admit::new_event;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Append, Entry, Grant, Log, Position, RULES, Record, Topic};
use weft::projector::{Commit, KEY_LIFETIME, Projector, Update, Verdict};
use weft::protocol::error::Code;
use weft::protocol::event::LogEvent;
use weft::store::catalogue::{KEY_TIMES, KEYS, MESSAGE_TEXTS};
use weft::store::{Progress, Store};

use crate::support::TENANT;

/// A record as the server writes it, at a moment of our choosing.
pub fn record(at: u64, thread: &str, from: &str, kind: &str, data: &Value, key: Option<&str>) -> Record {
    let data = serde_json::value::to_raw_value(data).unwrap();
    let mut event = new_event(TENANT, from, thread, kind, &data);
    event.at = clock::rfc3339(at).into();
    event.key = key.map(Into::into);
    Record {
        topic: Topic::Events,
        key: weft::protocol::ids::log_key(TENANT, thread),
        kind: kind.to_owned(),
        rules: RULES,
        grant: Grant::Member,
        traceparent: None,
        value: serde_json::to_vec(&event).unwrap().into(),
    }
}

/// Appends records and waits until they are durable.
pub fn append(log: &EmbeddedLog, records: Vec<Record>) -> Vec<Position> {
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
pub fn entries(log: &EmbeddedLog) -> Vec<Entry> {
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
        Update::LeaseOver { .. } => 0,
    };
    commit.events.iter().map(|event| bytes(&event.update)).sum()
}

/// A store of the log, as far as it has come.
pub fn open_store(log: &dyn Log, folder: &Path) -> (Arc<Store>, Vec<Progress>) {
    let mut store = Store::open(folder).unwrap();
    let progress = match store.progress().unwrap() {
        Some(progress) => progress,
        None => store.begin(&log.epoch(), log.partitioning(), &[], &vec![0; log.partitions() as usize]).unwrap(),
    };
    (Arc::new(store), progress)
}

/// How many entries the projector gets at once, and whether it is taken down after them and begins anew from the store.
pub type Split = (usize, bool);

/// Projects entries into a new store, split again and again in the same way; gives the verdicts in their order.
pub fn project(log: &EmbeddedLog, entries: &[Entry], folder: &Path, splits: &[Split]) -> (Arc<Store>, Vec<Verdict>) {
    let open = || {
        let (store, progress) = open_store(log, folder);
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
        // A node whose clock is slow does not turn the log's time back.
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
    let (store, progress) = open_store(&log, &path);
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
fn what_a_message_begun_anew_drops_is_gone_and_leaves_room() {
    const MB: usize = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(&folder.path().join("log"), 4).unwrap();
    let of = |kind: &str, data: &Value| run_record(1_800_000_000_000, "t", "r", kind, data);
    let delta = |message: &str, from: usize, text: &str| {
        of("agent_token", &json!({"message": message, "from_char": from, "text": text}))
    };
    let restart = |message: &str, text: &str| {
        of("agent_token", &json!({"message": message, "from_char": 0, "text": text, "restart": true}))
    };
    let (whole, half) = ("x".repeat(MB), "x".repeat(MB / 2));
    let mut records = vec![of("agent_started", &json!({"agent": "scout"}))];
    // Eight messages of a thread have all the room that there is.
    records.extend((0..8).map(|n| delta(&format!("m{n}"), 0, &whole)));
    let at = records.len();
    let expected = [
        (delta("m0", MB, "!"), Some("data.text")),
        (delta("m8", 0, "!"), Some("data.text")),
        // A text that is begun anew may be as long as one that is not, and no longer.
        (restart("m0", &format!("{whole}!")), Some("data.text")),
        (restart("m0", &whole), None),
        (restart("m0", &half), None),
        (delta("m8", 0, &half), None),
        (delta("m8", MB / 2, "!"), Some("data.text")),
        (restart("m0", ""), None),
        (delta("m0", 0, "new"), None),
        (delta("m0", 4, "of the text before"), Some("data.from_char")),
        (of("agent_message", &json!({"message": "m0"})), None),
        (restart("m0", "ne"), None),
        (restart("m0", "newer"), Some("data.message")),
        // By its log, a restart has no other place than the first character.
        (
            of("agent_token", &json!({"message": "m1", "from_char": 1, "text": "x", "restart": true})),
            Some("data.from_char"),
        ),
        // To the first version of the rules the field is unknown.
        (Record { rules: 1, ..restart("m1", "x") }, Some("data.restart")),
    ];
    let fields: Vec<_> = expected.iter().map(|(_, field)| field.map(str::to_owned)).collect();
    records.extend(expected.into_iter().map(|(record, _)| record));
    append(&log, records);

    let all = entries(&log);
    let (store, verdicts) = project(&log, &all, &folder.path().join("one-by-one"), &[(1, false)]);
    let got: Vec<_> = verdicts[at..].iter().map(|it| it.as_ref().err().and_then(|it| it.field.clone())).collect();
    assert_eq!(got.iter().map(|it| it.as_deref().map(str::to_owned)).collect::<Vec<_>>(), fields);
    assert!(verdicts[at + 11].as_ref().unwrap().duplicate, "what a closed message has already is a duplicate");
    let closed = store.event(TENANT, "t", 2).unwrap().unwrap();
    assert!(closed.frame.contains(r#""content":"new""#), "{}", closed.frame);
    let thread = store.thread(TENANT, "t").unwrap().unwrap();
    assert_eq!((thread.writing, thread.writing_bytes), (8, (7 * MB + MB / 2) as u64));
    assert_eq!(rows_of(&store, MESSAGE_TEXTS), 8, "one for each message that is not closed");
    for (n, splits) in [&[(2_000, false)][..], &[(9, true), (4, false), (3, true)]].iter().enumerate() {
        let (other, _) = project(&log, &all, &folder.path().join(format!("store-{n}")), splits);
        weft::projector::rebuild::compare(&store, &other).unwrap();
    }
}

#[test]
fn messages_in_deltas_come_out_the_same_whatever_is_projected_together() {
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
            3 => ("agent_token", json!({"message": message, "from_char": 0, "text": "ünew", "restart": true})),
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
