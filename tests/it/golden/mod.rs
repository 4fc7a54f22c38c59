//! Golden logs: one for each released version of the rules, as a server of that version wrote it, and what it must come to
//! whenever it is read: verdicts, heads, hashes, rows.
//!
//! `version-N….log` has a record on each line, as JSON: its partition, its key, its headers and its value, byte for byte.
//! `version-N….expected.json` has what came of it:
//! - `verdicts`: what became of each record, by its id;
//! - `threads`: the head and the hash of each. Neither these nor the verdicts ever change;
//! - `rows`: of column families, how many rows they have, and a digest of them. A family whose rows get another format, or hold
//!   other words, goes out of the files that have it, since what it means has not changed; verdicts and hashes stay.
//!
//! A new version of the rules gets files of its own: extend [`write`] by what is new, and run
//! `cargo test --release --test it -- --ignored golden::write::the_golden_log_of_this_version_is_written`. It refuses to write over
//! files that are there: the logs of earlier versions stay as they are for ever.

mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use weft::log::embedded::EmbeddedLog;
use weft::log::kafka::{ClientSettings, KafkaConfig, KafkaLog};
use weft::log::{Append, Entry, Grant, Log, Record, Topic};
use weft::memory::LogPlan;
use weft::projector::{Projector, Verdict};
use weft::store::catalogue::{
    ARRIVALS, DEAD_LETTER_COUNTS, DEAD_LETTER_TIMES, DEAD_LETTERS, EVENTS, KEY_TIMES, META, TICKET_TIMES,
};
use weft::store::{Partition, Store};

use crate::support::LogKind;

/// Partitions of each topic: with one, both logs give every record the same place.
const PARTITIONS: u32 = 1;

/// A record as a golden log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    /// Counted over all topics.
    partition: u32,
    key: String,
    kind: String,
    version: u16,
    grant: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    value: String,
}

impl Line {
    fn of(entry: &Entry) -> Line {
        let record = entry.record.as_ref().unwrap();
        Line {
            partition: entry.at.partition,
            key: record.key.clone(),
            kind: record.kind.clone(),
            version: record.rules,
            grant: record.grant.as_str().to_owned(),
            traceparent: record.traceparent.clone(),
            value: std::str::from_utf8(&record.value).unwrap().to_owned(),
        }
    }

    fn record(self) -> Record {
        Record {
            topic: Topic::ALL[(self.partition / PARTITIONS) as usize],
            key: self.key,
            kind: self.kind,
            rules: self.version,
            grant: Grant::parse(self.grant.as_bytes()).unwrap(),
            traceparent: self.traceparent,
            value: self.value.into(),
        }
    }
}

/// What a log comes to.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Outcome {
    verdicts: BTreeMap<String, String>,
    threads: BTreeMap<String, ThreadOutcome>,
    rows: BTreeMap<String, FamilyOutcome>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ThreadOutcome {
    head: u64,
    hash: String,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct FamilyOutcome {
    rows: u64,
    digest: String,
}

/// The versions that have their files. The newest one gets them before it is released.
const RELEASED: [&str; 8] = [
    "version-1",
    "version-2",
    "version-3-letters",
    "version-4-work",
    "version-4-deliveries",
    "version-5-work",
    "version-6-boost",
    NEWEST,
];

/// The files that the present version gets: in it custom kinds have schemas, and the webhook's dead letters a reason of their own.
const NEWEST: &str = "version-7";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/golden")
}

fn files(version: &str) -> (PathBuf, PathBuf) {
    let name = |ending: &str| folder().join(format!("{version}.{ending}"));
    (name("log"), name("expected.json"))
}

fn read_log(version: &str) -> Vec<Record> {
    let text = std::fs::read_to_string(files(version).0).unwrap();
    text.lines().map(|line| serde_json::from_str::<Line>(line).unwrap().record()).collect()
}

/// Appends records one by one, so that all are in the order of the file.
fn append(log: &dyn Log, records: Vec<Record>) {
    for record in records {
        let (sender, answer) = mpsc::sync_channel(1);
        log.append(vec![Append { record, done: Box::new(move |result| sender.send(result).unwrap()) }]);
        answer.recv().unwrap().unwrap();
    }
}

/// Everything that a log holds.
fn read_all(log: &dyn Log) -> Vec<(Vec<Entry>, Vec<u64>)> {
    let bounds = log.bounds().unwrap();
    let starts: Vec<u64> = bounds.iter().map(|it| it.start).collect();
    let mut reader = log.reader(&starts).unwrap();
    let mut batches = Vec::new();
    while reader.positions().iter().zip(&bounds).any(|(next, bounds)| *next < bounds.end) {
        let entries = reader.next(1_000, Duration::from_secs(5)).unwrap();
        batches.push((entries, reader.positions().clone()));
    }
    batches
}

/// Projects everything that a log holds into a new store.
fn outcome(log: &dyn Log, store: &Path) -> Outcome {
    let mut store = Store::open(store).unwrap();
    let starts: Vec<u64> = log.bounds().unwrap().iter().map(|it| it.start).collect();
    let progress = store.begin(&log.epoch(), log.partitioning(), &starts, &starts).unwrap();
    let store = Arc::new(store);
    let mut projector = Projector::new(store.clone(), log, progress);
    let mut verdicts = BTreeMap::new();
    for (entries, positions) in read_all(log) {
        let mut done = 0;
        while done < entries.len() {
            let (applied, commit) = projector.project(&entries[done..], &positions).unwrap();
            done += applied;
            verdicts.extend(commit.verdicts.into_iter().map(|(id, verdict)| (id.to_string(), in_words(&verdict))));
        }
    }
    Outcome { verdicts, threads: threads(&store), rows: rows(&store) }
}

fn in_words(verdict: &Verdict) -> String {
    match verdict {
        Ok(it) if it.duplicate => format!("duplicate of {}", it.seq),
        Ok(it) => format!("seq {}", it.seq),
        Err(error) => match &error.field {
            Some(field) => format!("{} {field}", error.code.as_str()),
            None => error.code.as_str().to_owned(),
        },
    }
}

fn threads(store: &Store) -> BTreeMap<String, ThreadOutcome> {
    let rows = store.rows().map(Result::unwrap).filter(|(family, _, _)| *family == "threads");
    rows.map(|(_, key, _)| {
        let key = String::from_utf8(key[Partition::BYTES..].to_vec()).unwrap();
        let (tenant, thread) = key.split_once('\0').unwrap();
        let row = store.thread(tenant, thread).unwrap().unwrap();
        let hash = row.hash.iter().map(|byte| format!("{byte:02x}")).collect();
        (format!("{tenant}/{thread}"), ThreadOutcome { head: row.head, hash })
    })
    .collect()
}

/// Of each family but those of positions and places, which belong to one log alone. Keys are taken as they were when the digests were
/// made: most families' did not begin with their partition, and the times of keys and tickets did with a longer number.
fn rows(store: &Store) -> BTreeMap<String, FamilyOutcome> {
    /// What stands before a row's payload says which version of the store wrote it.
    const FRAME: usize = 7;
    let mut families: BTreeMap<String, (u64, blake3::Hasher)> = BTreeMap::new();
    for (family, key, value) in store.rows().map(Result::unwrap) {
        if [META, ARRIVALS].contains(&family) {
            continue;
        }
        let (rows, hasher) = families.entry(family.to_owned()).or_default();
        *rows += 1;
        let payload = value.get(FRAME..).unwrap_or_default();
        let payload = if family == EVENTS { without_offset(payload) } else { payload };
        let key = match family {
            KEY_TIMES | TICKET_TIMES => [&[0; 2], &key[..]].concat(),
            DEAD_LETTERS | DEAD_LETTER_TIMES | DEAD_LETTER_COUNTS => key.to_vec(),
            _ => key[Partition::BYTES..].to_vec(),
        };
        for part in [&key[..], payload] {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part);
        }
    }
    let outcome = |(rows, hasher): (u64, blake3::Hasher)| FamilyOutcome { rows, digest: hasher.finalize().to_string() };
    families.into_iter().map(|(family, rows)| (family, outcome(rows))).collect()
}

/// A row of an event as it was before it had the offset of its record, which depends on the log and not on the event: a number
/// of one, three, five or nine bytes before all else.
fn without_offset(row: &[u8]) -> &[u8] {
    let bytes = match row.first() {
        Some(251) => 3,
        Some(252) => 5,
        Some(253) => 9,
        _ => 1,
    };
    row.get(bytes..).unwrap_or_default()
}

/// A log without records; the folder holds what it keeps.
fn new_log(kind: &LogKind, folder: &Path) -> Box<dyn Log> {
    match kind {
        LogKind::Embedded => Box::new(EmbeddedLog::open(&folder.join("log"), PARTITIONS).unwrap()),
        LogKind::Kafka { brokers, prefix } => Box::new(
            KafkaLog::open(KafkaConfig {
                brokers: brokers.clone(),
                partitions: PARTITIONS,
                topic_prefix: prefix.clone(),
                group: format!("{prefix}golden"),
                settings: ClientSettings::default(),
                memory: LogPlan::default(),
            })
            .unwrap(),
        ),
    }
}

fn comes_to_what_is_written(version: &str, kind: &LogKind) {
    let folder = tempfile::tempdir().unwrap();
    let log = new_log(kind, folder.path());
    let records = read_log(version);
    assert!(records.len() > 50, "the log {version} has {} records", records.len());
    append(&*log, records);

    let expected: Outcome = serde_json::from_str(&std::fs::read_to_string(files(version).1).unwrap()).unwrap();
    let found = outcome(&*log, &folder.path().join("store"));
    assert_eq!(found.verdicts, expected.verdicts, "{version}");
    assert_eq!(found.threads, expected.threads, "{version}");
    let differing: BTreeMap<_, _> =
        expected.rows.iter().map(|(family, rows)| (family, (rows, found.rows.get(family)))).collect();
    let differing: Vec<_> = differing.into_iter().filter(|(_, (rows, found))| Some(*rows) != *found).collect();
    assert!(differing.is_empty(), "{version}: {differing:#?}");
    log.close();
}

#[test]
fn every_released_version_s_log_comes_to_the_same_on_the_embedded_log() {
    for version in RELEASED {
        comes_to_what_is_written(version, &LogKind::embedded());
    }
}

#[test]
fn every_released_version_s_log_comes_to_the_same_on_kafka() {
    for version in RELEASED {
        comes_to_what_is_written(version, &LogKind::kafka());
    }
}
