//! `weft verify` on a data folder: what is whole is proved, and nothing that was changed passes for whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use weft::log::embedded::read_only::ReadOnlyLog;
use weft::log::{Entry, Log};
use weft::store::{EventRange, EventRow, Store};

use super::{UNLIMITED, copy, flip, numbered, publish_numbers, run_json, write_ahead_file};
use crate::on_both_logs;
use crate::support::{LogKind, Server, TENANT, has, publish, weft};

fn verify(data: &Path) -> (Option<i32>, Value) {
    run_json("verify", data, &[])
}

fn whole(data: &Path) -> Value {
    let (code, found) = verify(data);
    assert_eq!((code, &found["whole"]), (Some(0), &json!(true)), "{found}");
    found
}

fn flawed(data: &Path) -> Value {
    let (code, found) = verify(data);
    assert_eq!((code, &found["whole"]), (Some(1), &json!(false)), "{found}");
    found
}

/// A stopped server with threads, members, a run, a key and letters, whose log has tables as well as a write-ahead log.
async fn stopped_server() -> Server {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..600).await;
    server.stop().await;
    // At a start the write-ahead log's rows go to a table.
    server.up();
    server.ready().await;
    let mut ada = server.connect("ada").await;
    publish_numbers(&mut ada, "u", 0..600).await;
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"title": "T", "members": ["ben", "scout"]}))).await;
    let mut keyed = publish("t", "x.note", json!({"text": "with a key"}));
    keyed["key"] = json!("k1");
    ada.ask(keyed).await;
    let mut agent = server.connect_as("scout", "publish agent").await;
    for (kind, data) in [
        ("agent_started", json!({"agent": "scout"})),
        ("agent_token", json!({"message": "m", "from_char": 0, "text": "some words"})),
        ("agent_message", json!({"message": "m"})),
        // Out of order: a dead letter.
        ("tool_completed", json!({"call": "c1", "result": "none"})),
        ("agent_completed", json!({})),
    ] {
        agent.ask(json!({"type": "publish", "thread": "t", "run": "r", "kind": kind, "data": data})).await;
    }
    drop((ada, agent));
    server.stop().await;
    server
}

/// The bytes of all files but what the libraries write for themselves: their own log, and a lock.
fn contents(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![data.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                open.push(path);
            } else if !name.starts_with("LOG") && !name.ends_with(".lock") {
                found.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[tokio::test]
async fn what_was_not_touched_is_whole_and_is_not_changed_by_looking() {
    let server = stopped_server().await;
    let before = contents(server.data());
    let found = whole(server.data());
    assert_eq!(found["threads"], 2);
    let events = found["events"].as_u64().unwrap();
    assert!(events >= 1_204, "{found}");
    assert_eq!((&found["projections"]["behind"], &found["search"]["events"]), (&json!(0), &json!(events)), "{found}");
    assert!(contents(server.data()) == before, "files were changed");

    // A copy is no less whole, and does not become another generation by being looked at.
    let folder = tempfile::tempdir().unwrap();
    copy(server.data(), folder.path());
    assert_eq!(whole(folder.path()), found);
    // Without what comes from it the log can still be read and judged.
    fs::remove_dir_all(folder.path().join("projections")).unwrap();
    fs::remove_dir_all(folder.path().join("search")).unwrap();
    has(&whole(folder.path()), json!({"events": events, "threads": 2, "projections": null, "search": null}));

    let output = weft().args(["verify", "--data"]).arg(server.data()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("whole: ") && said.contains("all that there are"), "{said}");
}

#[tokio::test]
async fn what_was_answered_before_a_kill_is_whole_and_the_projections_are_behind() {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..300).await;
    server.kill();
    let found = whole(server.data());
    assert_eq!(found["records"], 300);
    assert_eq!(found["projections"]["behind"], 300, "nothing was flushed: {found}");
}

on_both_logs!(a_running_server_has_to_be_stopped_and_then_its_data_are_whole, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for n in 0..30 {
        ada.say(&format!("t{}", n % 3), &format!("{n}")).await;
    }
    let run = |server: &Server| {
        let arguments = server.log().arguments();
        let output = weft().args(["verify", "--data"]).arg(server.data()).args(arguments).output().unwrap();
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(!server.data().join("verify").exists(), "what was made to compare with is deleted");
        (output.status.code(), said)
    };
    let (code, said) = run(&server);
    assert!(code == Some(1) && said.contains("is in use by another process"), "{said}");
    drop(ada);
    server.stop().await;
    let (code, said) = run(&server);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("30 events of 3 threads") && said.contains("search: 30 events"), "{said}");
});

#[test]
fn a_folder_without_a_log_is_refused_and_wrong_usage_is_2() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = weft().arg("verify").args(arguments).current_dir(folder.path()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["--data", "."]);
    assert!(code == Some(1) && said.contains("there is no log in"), "{said}");
    let (code, said) = run(&["--data", "nowhere"]);
    assert!(code == Some(1) && said.contains("there is no folder nowhere"), "{said}");
    let (code, said) = run(&["a.jsonl", "--scratch", "."]);
    assert!(code == Some(2) && said.contains("cannot be used with"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");
}

#[tokio::test]
async fn a_row_that_was_changed_by_hand_is_named_with_what_it_should_be() {
    let server = stopped_server().await;
    let projections = server.data().join("projections");
    let store = Store::open(&projections).unwrap();
    let mut batch = store.batch();
    let range = EventRange { from: 7, to: 7, ..EventRange::all() };
    let changed = store.visit_events(TENANT, "u", range, |seq, row| {
        let frame = row.frame.replace("some text", "same text");
        assert_ne!(frame, row.frame);
        batch.put_event(TENANT, "u", seq, &EventRow { frame: &frame, ..*row }, 0);
        Ok::<_, weft::store::StoreError>(std::ops::ControlFlow::Continue(()))
    });
    changed.unwrap();
    store.commit(batch).unwrap();
    store.flush().unwrap();
    drop(store);
    let found = flawed(server.data());
    assert_eq!(found["part"], "projections");
    has(&found["difference"], json!({"family": "events", "tenant": TENANT, "thread": "u", "seq": 7}));
    assert!(found["difference"]["expected"].as_str().unwrap().contains("some text"), "{found}");
    assert!(found["difference"]["found"].as_str().unwrap().contains("same text"), "{found}");
    assert!(found["error"].as_str().unwrap().contains(&format!("thread u of {TENANT}, seq 7")), "{found}");

    // A rebuild mends it.
    let output = weft().args(["rebuild", "--data"]).arg(server.data()).output().unwrap();
    assert!(output.status.success());
    whole(server.data());

    let store = Store::open(&projections).unwrap();
    let mut thread = store.thread(TENANT, "t").unwrap().unwrap();
    thread.head += 1;
    let mut batch = store.batch();
    batch.put_thread(TENANT, "t", &thread);
    store.commit(batch).unwrap();
    store.flush().unwrap();
    drop(store);
    let found = flawed(server.data());
    has(&found["difference"], json!({"family": "threads", "tenant": TENANT, "thread": "t", "seq": null}));
    assert!(found["difference"]["found"].as_str().unwrap().contains(&format!("head {}", thread.head)), "{found}");
}

/// What a commit of the index says of how far it has come.
fn payload(search: &Path) -> Value {
    let meta: Value = serde_json::from_slice(&fs::read(search.join("meta.json")).unwrap()).unwrap();
    meta["payload"].clone()
}

fn set_payload(search: &Path, payload: &Value) {
    let path = search.join("meta.json");
    let mut meta: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    meta["payload"] = payload.clone();
    fs::write(path, meta.to_string()).unwrap();
}

#[tokio::test]
async fn an_index_that_misses_an_event_or_has_one_too_many_is_found_and_the_event_named() {
    let mut server = Server::start(LogKind::embedded());
    let (search, older) = (server.data().join("search"), server.data().join("older"));
    let mut ada = server.connect("ada").await;
    for n in 0..10 {
        ada.say("t", &format!("number {n}")).await;
    }
    drop(ada);
    server.stop().await;
    copy(&search, &older);
    server.up();
    server.ready().await;
    server.connect("ada").await.say("t", "one more").await;
    server.stop().await;
    assert_eq!(whole(server.data())["search"]["events"], 11);

    let (before, after) = (payload(&older), payload(&search));
    set_payload(&search, &before);
    let found = flawed(server.data());
    assert!(found["part"] == "search" && found["error"].as_str().unwrap().contains("should not have"), "{found}");

    fs::remove_dir_all(&search).unwrap();
    fs::rename(&older, &search).unwrap();
    has(&whole(server.data()), json!({"search": {"events": 10, "behind": 1}}));
    set_payload(&search, &after);
    let found = flawed(server.data());
    assert_eq!(
        (&found["part"], &found["difference"]["thread"], &found["difference"]["seq"]),
        (&json!("search"), &json!("t"), &json!(11))
    );
    assert!(found["error"].as_str().unwrap().contains("missing from the index of search"), "{found}");
}

/// All that the log of a stopped server gives.
fn records(data: &Path) -> Vec<Entry> {
    let log = ReadOnlyLog::open(&data.join("log")).unwrap();
    let mut reader = log.reader(&vec![0; log.partitions() as usize]).unwrap();
    let mut all = Vec::new();
    loop {
        let entries = reader.next(1_000, Duration::ZERO).unwrap();
        if entries.is_empty() {
            return all;
        }
        all.extend(entries);
    }
}

/// Files of a folder that somebody reads, so that a change in them matters.
fn files(data: &Path) -> Vec<PathBuf> {
    let named = |dir: &Path, prefix: &str| -> Vec<PathBuf> {
        let all = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        all.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).collect()
    };
    let (log, projections, search) = (data.join("log"), data.join("projections"), data.join("search"));
    let segments = fs::read_dir(&search).unwrap().map(|entry| entry.unwrap().path());
    let segments = segments.filter(|path| path.extension().is_some_and(|it| it != "lock") && path.is_file());
    let mut files = [
        numbered(&log, "sst"),
        named(&log, "MANIFEST-"),
        numbered(&projections, "sst"),
        named(&projections, "MANIFEST-"),
        vec![write_ahead_file(data).0],
        segments.collect(),
    ]
    .concat();
    files.sort();
    files
}

/// Numbers from a seed (splitmix64).
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end as u64) as usize
    }
}

#[tokio::test]
async fn whatever_byte_is_flipped_verify_finds_it_unless_everything_reads_as_before() {
    let server = stopped_server().await;
    let data = server.data();
    let original = whole(data);
    let (folder, log) = (tempfile::tempdir().unwrap(), records(data));
    copy(data, folder.path());
    let projections = Store::open_read_only(&folder.path().join("projections")).unwrap().unwrap();

    let (files, mut seeded) = (files(data), Seeded(13));
    assert!(files.len() > 20, "{files:?}");
    let (mut found, mut harmless) = (0, Vec::new());
    for round in 0..2 {
        for path in &files {
            let bytes = match path.extension() {
                Some(extension) if extension == "log" => write_ahead_file(data).1,
                _ => path.metadata().unwrap().len() as usize,
            };
            let at = seeded.below(bytes);
            flip(path, at);
            let (code, said) = verify(data);
            let place = format!("round {round}: byte {at} of {} of {}: {said}", bytes, path.display());
            match code {
                Some(1) => {
                    assert_ne!(said["whole"], true, "{place}");
                    found += 1;
                }
                Some(0) => {
                    // A filter, a statistic, a hint for the library: the same records, rows and events are read as before.
                    let read = records(data);
                    let same = |(a, b): (&Entry, &Entry)| a.at == b.at && format!("{a:?}") == format!("{b:?}");
                    assert!(read.len() == log.len() && read.iter().zip(&log).all(same), "{place}");
                    let rows = Store::open_read_only(&data.join("projections")).unwrap().unwrap();
                    if let Err(differs) = projections.compare(&rows, |_| {}).unwrap() {
                        panic!("{place}: {differs}");
                    }
                    assert_eq!(said["search"], original["search"], "{place}");
                    harmless.push(place);
                }
                _ => panic!("it ended without a verdict: {code:?} {place}"),
            }
            flip(path, at);
        }
    }
    assert_eq!(whole(data), original, "with every byte as it was");
    assert!(found > 4 * harmless.len(), "{found} were found, and these were not: {harmless:#?}");
}
