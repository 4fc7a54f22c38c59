//! One contract, both logs: every test in `contract` runs on the embedded log and on a real Kafka broker. What only one
//! of them can show stands in `only_embedded` and `only_kafka`; what the contract says of topics, in `topics`, and of the
//! log's identity, in `generations`.

pub mod only_kafka;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use weft::log::embedded::EmbeddedLog;
use weft::log::kafka::{ClientSettings, KafkaConfig, KafkaLog};
use weft::log::{Append, AppendError, Entry, Grant, Log, LogError, Position, Positions, RULES, Reader, Record, Topic};
use weft::memory::LogPlan;

use crate::support::{PATIENCE, kafka, weft};

/// Asks again and again, at growing intervals, until something holds: [`crate::support::eventually`] without a runtime.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let (until, mut interval) = (Instant::now() + PATIENCE, Duration::from_millis(1));
    while !holds() {
        assert!(Instant::now() < until, "in vain: {what}");
        std::thread::sleep(interval);
        interval = (interval * 2).min(Duration::from_millis(50));
    }
}

/// Where a log lives, so that it can be opened again, also by another process.
enum Place {
    Embedded(TempDir),
    Kafka { brokers: String, prefix: String },
}

impl Place {
    fn embedded() -> Place {
        Place::Embedded(tempfile::tempdir().expect("a temporary folder"))
    }

    fn kafka() -> Place {
        Place::on(kafka::brokers())
    }

    fn on(brokers: &str) -> Place {
        Place::Kafka { brokers: brokers.to_owned(), prefix: kafka::fresh_prefix() }
    }

    fn topic(&self, topic: Topic) -> String {
        match self {
            Place::Kafka { prefix, .. } => format!("{prefix}{}", topic.as_str()),
            Place::Embedded(_) => panic!("the embedded log has no topic"),
        }
    }

    fn try_open(&self, partitions: u32) -> Result<Opened, LogError> {
        match self {
            Place::Embedded(data) => open_embedded(&log_dir(data), partitions),
            Place::Kafka { brokers, prefix } => open_kafka(brokers, prefix, partitions),
        }
    }

    fn open(&self, partitions: u32) -> Opened {
        self.try_open(partitions).expect("the log opens")
    }

    /// How another process finds it.
    fn arguments(&self) -> Vec<String> {
        match self {
            Place::Embedded(data) => {
                ["--log", "embedded", "--data", &data.path().display().to_string()].map(String::from).to_vec()
            }
            Place::Kafka { brokers, prefix } => {
                let data = std::env::temp_dir().display().to_string();
                ["--log", "kafka", "--data", &data, "--brokers", brokers, "--topic-prefix", prefix]
                    .map(String::from)
                    .to_vec()
            }
        }
    }
}

/// Where the embedded log is in a data folder.
fn log_dir(data: &TempDir) -> PathBuf {
    data.path().join("log")
}

fn open_embedded(dir: &Path, partitions: u32) -> Result<Opened, LogError> {
    EmbeddedLog::open(dir, partitions).map(Opened::Embedded)
}

fn open_kafka(brokers: &str, prefix: &str, partitions: u32) -> Result<Opened, LogError> {
    KafkaLog::open(kafka_config(brokers, prefix, partitions)).map(Opened::Kafka)
}

fn kafka_config(brokers: &str, prefix: &str, partitions: u32) -> KafkaConfig {
    KafkaConfig {
        brokers: brokers.to_owned(),
        partitions,
        topic_prefix: prefix.to_owned(),
        group: format!("{prefix}node"),
        settings: ClientSettings::default(),
        memory: LogPlan::default(),
    }
}

enum Opened {
    Embedded(EmbeddedLog),
    Kafka(KafkaLog),
}

impl Deref for Opened {
    type Target = dyn Log;

    fn deref(&self) -> &(dyn Log + 'static) {
        match self {
            Opened::Embedded(log) => log,
            Opened::Kafka(log) => log,
        }
    }
}

impl Opened {
    /// Puts something into the log, at a partition counted over all topics, that is no record of ours.
    fn append_foreign(&self, place: &Place, partition: u32, bytes: &[u8]) {
        match (self, place) {
            (Opened::Embedded(log), _) => drop(log.append_foreign(partition, bytes).expect("it is written")),
            (Opened::Kafka(log), Place::Kafka { brokers, .. }) => {
                let (topic, within) = log.topic_of(partition);
                // A compacted topic takes nothing without a key.
                let key = Some(&b"not ours"[..]);
                only_kafka::produce(brokers, &place.topic(topic), Some(within), key, Some(bytes), None)
            }
            _ => panic!("a log somewhere else"),
        }
    }
}

fn record(key: &str, value: impl Into<bytes::Bytes>) -> Record {
    Record {
        topic: Topic::Events,
        key: key.to_owned(),
        kind: "message".to_owned(),
        rules: RULES,
        grant: Grant::Member,
        traceparent: None,
        value: value.into(),
    }
}

/// Records of tests are events, unless a test says otherwise.
trait InTopic {
    fn in_topic(self, topic: Topic) -> Record;
}

impl InTopic for Record {
    fn in_topic(self, topic: Topic) -> Record {
        Record { topic, ..self }
    }
}

fn numbered(key: &str, n: usize) -> Record {
    record(key, format!(r#"{{"n":{n}}}"#))
}

type Answer = Result<Position, AppendError>;

/// Appends one batch and waits until every record is answered; the answers stand in the records' order.
fn append(log: &dyn Log, records: Vec<Record>) -> Vec<Answer> {
    let count = records.len();
    let answers = append_later(log, records);
    let mut answers: Vec<(usize, Answer)> =
        (0..count).map(|_| answers.recv_timeout(PATIENCE).expect("every record is answered")).collect();
    answers.sort_by_key(|(n, _)| *n);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

fn append_later(log: &dyn Log, records: Vec<Record>) -> mpsc::Receiver<(usize, Answer)> {
    let (sender, answers) = mpsc::sync_channel(records.len());
    let batch = records.into_iter().enumerate().map(|(n, record)| {
        let sender = sender.clone();
        // The receiver may be gone: a test that failed.
        Append { record, done: Box::new(move |answer| drop(sender.send((n, answer)))) }
    });
    log.append(batch.collect());
    answers
}

fn append_ok(log: &dyn Log, records: Vec<Record>) -> Vec<Position> {
    append(log, records).into_iter().map(|answer| answer.expect("the record is taken")).collect()
}

fn starts(log: &dyn Log) -> Positions {
    log.bounds().expect("the log tells its bounds").iter().map(|b| b.start).collect()
}

fn ends(log: &dyn Log) -> Positions {
    log.bounds().expect("the log tells its bounds").iter().map(|b| b.end).collect()
}

fn read(reader: &mut dyn Reader, count: usize) -> Vec<Entry> {
    let until = Instant::now() + PATIENCE;
    let mut entries = Vec::new();
    while entries.len() < count {
        assert!(Instant::now() < until, "{} of {count} entries came", entries.len());
        entries.extend(reader.next(count - entries.len(), Duration::from_millis(200)).expect("the log can be read"));
    }
    entries
}

/// Everything the log holds now.
fn read_all(log: &dyn Log) -> Vec<Entry> {
    let mut reader = log.reader(&starts(log)).expect("the log can be read from its start");
    let ends = ends(log);
    let until = Instant::now() + PATIENCE;
    let mut entries = Vec::new();
    while reader.positions().iter().zip(&ends).any(|(at, end)| at < end) {
        assert!(Instant::now() < until, "reading stopped at {:?} of {ends:?}", reader.positions());
        entries.extend(reader.next(10_000, Duration::from_millis(200)).expect("the log can be read"));
    }
    entries
}

/// The next `count` records of each partition, as a reader of its own sees them.
fn in_order(log: &dyn Log, count: usize) -> BTreeMap<u32, Vec<Record>> {
    let mut reader = log.reader(&starts(log)).expect("the log can be read from its start");
    let mut by_partition: BTreeMap<u32, Vec<Record>> = BTreeMap::new();
    for entry in read(&mut *reader, count) {
        by_partition.entry(entry.at.partition).or_default().push(ours(&entry).clone());
    }
    by_partition
}

fn ours(entry: &Entry) -> &Record {
    entry.record.as_ref().expect("a record of ours")
}

/// Runs one test a log and a duty, which is a function of the module `contract` beside it.
macro_rules! contract_holds {
    ($($name:ident)*) => {
        mod embedded_log {
            $(#[test] fn $name() { super::contract::$name(super::Place::embedded()); })*
        }
        mod kafka_log {
            $(#[test] fn $name() { super::contract::$name(super::Place::kafka()); })*
        }
    };
}

mod generations;
mod topics;

contract_holds! {
    a_record_comes_back_as_it_was_appended
    records_with_one_key_stay_in_order_in_one_partition
    positions_only_grow_and_are_those_that_were_answered
    each_record_of_a_batch_is_answered_on_its_own
    every_record_of_many_writers_is_there_once
    reading_begins_at_any_position
    a_reader_never_gives_more_than_asked_for
    a_waiting_reader_is_woken_by_an_append
    a_reader_at_the_end_waits_no_longer_than_told
    a_reader_opened_at_anothers_positions_reads_on_as_that_one_does
    two_readers_see_one_order
    bounds_begin_at_the_oldest_and_end_after_the_newest
    whatever_was_acknowledged_is_below_the_end_as_of_a_later_question
    a_position_outside_of_the_bounds_is_refused
    another_number_of_partitions_is_refused_and_both_numbers_named
    a_record_that_is_not_ours_comes_as_foreign_and_reading_goes_on
    no_reader_gets_past_a_record_of_newer_rules
    what_was_appended_is_there_after_closing_and_opening
    after_close_every_append_is_answered_unavailable
    an_open_log_is_healthy
    whoever_is_answered_may_append_again_at_once
    a_killed_process_loses_no_acknowledged_record
}

mod contract {
    use super::*;

    pub fn a_record_comes_back_as_it_was_appended(place: Place) {
        let log = place.open(4);
        let records = vec![
            Record {
                topic: Topic::Events,
                key: "acme/t1".to_owned(),
                kind: "message".to_owned(),
                rules: 1,
                grant: Grant::Scope,
                traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
                value: r#"{"text":"Grüße, 世界 \u0000 🧵"}"#.into(),
            },
            record("acme/t2", format!(r#"{{"text":"{}"}}"#, "x".repeat(300_000))),
            record("", "{}"),
        ];
        let positions = append_ok(&*log, records.clone());
        let found: HashMap<Position, Record> = read_all(&*log).iter().map(|e| (e.at, ours(e).clone())).collect();
        for (position, record) in positions.iter().zip(&records) {
            assert_eq!(found.get(position), Some(record));
        }
    }

    pub fn records_with_one_key_stay_in_order_in_one_partition(place: Place) {
        let log = place.open(8);
        for batch in 0..5 {
            let records = (0..1000).map(|n| numbered(&format!("acme/t{}", n % 20), batch * 1000 + n));
            append_ok(&*log, records.collect());
        }
        let mut by_key: BTreeMap<String, Vec<(u32, String)>> = BTreeMap::new();
        for entry in read_all(&*log) {
            let record = ours(&entry);
            let value = String::from_utf8_lossy(&record.value).into_owned();
            by_key.entry(record.key.clone()).or_default().push((entry.at.partition, value));
        }
        assert_eq!(by_key.len(), 20);
        for (key, found) in by_key {
            let first: usize = key.trim_start_matches("acme/t").parse().expect("the key ends with a number");
            let partition = found[0].0;
            let expected: Vec<_> = (0..250).map(|n| (partition, format!(r#"{{"n":{}}}"#, first + n * 20))).collect();
            assert_eq!(found, expected, "{key}");
        }
    }

    pub fn positions_only_grow_and_are_those_that_were_answered(place: Place) {
        let log = place.open(4);
        let mut answered = Vec::new();
        for batch in 0..10 {
            answered
                .extend(append_ok(&*log, (0..50).map(|n| numbered(&format!("k{}", n % 13), batch * 50 + n)).collect()));
        }
        let mut last: HashMap<u32, u64> = HashMap::new();
        for at in &answered {
            assert!(at.partition < 4);
            let before = last.insert(at.partition, at.offset);
            assert!(before.is_none_or(|before| before < at.offset), "{at} after {before:?}");
        }
        let mut read: Vec<Position> = read_all(&*log).iter().map(|e| e.at).collect();
        read.sort();
        answered.sort();
        assert_eq!(read, answered);
    }

    pub fn each_record_of_a_batch_is_answered_on_its_own(place: Place) {
        let log = place.open(4);
        let answers = append_later(&*log, (0..500).map(|n| numbered(&format!("k{n}"), n)).collect());
        let mut answered: Vec<usize> = (0..500)
            .map(|_| {
                let (n, answer) = answers.recv_timeout(PATIENCE).expect("every record is answered");
                answer.expect("the record is taken");
                n
            })
            .collect();
        answered.sort_unstable();
        assert_eq!(answered, (0..500).collect::<Vec<_>>());
        // The senders are gone, so nobody can be answered twice.
        assert!(answers.recv_timeout(PATIENCE).is_err());
    }

    pub fn every_record_of_many_writers_is_there_once(place: Place) {
        let log = place.open(8);
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let log = &log;
                scope.spawn(move || {
                    for batch in 0..20 {
                        append_ok(&**log, (0..50).map(|n| numbered(&format!("w{writer}"), batch * 50 + n)).collect());
                    }
                });
            }
        });
        let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in read_all(&*log) {
            let value = String::from_utf8_lossy(&ours(&entry).value).into_owned();
            by_key.entry(ours(&entry).key.clone()).or_default().push(value);
        }
        let expected: Vec<String> = (0..1000).map(|n| format!(r#"{{"n":{n}}}"#)).collect();
        assert_eq!(by_key.len(), 8);
        assert!(by_key.values().all(|found| *found == expected));
    }

    pub fn reading_begins_at_any_position(place: Place) {
        let log = place.open(1);
        let positions = append_ok(&*log, (0..100).map(|n| numbered("k", n)).collect());
        for first in [0, 1, 50, 99] {
            let mut from = ends(&*log);
            from[0] = positions[first].offset;
            let mut reader = log.reader(&from).expect("a position that was given");
            let found = read(&mut *reader, 100 - first);
            let expected: Vec<Record> = (first..100).map(|n| numbered("k", n)).collect();
            assert_eq!(found.iter().map(|e| ours(e).clone()).collect::<Vec<_>>(), expected);
            assert_eq!(found.iter().map(|e| e.at).collect::<Vec<_>>(), positions[first..]);
        }
    }

    pub fn a_reader_never_gives_more_than_asked_for(place: Place) {
        let log = place.open(2);
        append_ok(&*log, (0..100).map(|n| numbered(&format!("k{n}"), n)).collect());
        let mut reader = log.reader(&starts(&*log)).expect("the log can be read from its start");
        let mut count = 0;
        while count < 100 {
            let found = reader.next(7, PATIENCE).expect("the log can be read").len();
            assert!((1..=7).contains(&found), "{found}");
            count += found;
        }
    }

    pub fn a_waiting_reader_is_woken_by_an_append(place: Place) {
        let log = place.open(4);
        let mut reader = log.reader(&ends(&*log)).expect("the end is a place to read from");
        let (ready, is_ready) = mpsc::sync_channel(1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(move || {
                ready.send(()).expect("the test waits for it");
                let found = reader.next(10, PATIENCE).expect("the log can be read");
                (Instant::now(), found)
            });
            is_ready.recv().expect("the reader begins");
            append_ok(&*log, vec![numbered("k", 1)]);
            let answered = Instant::now();
            let (woken, found) = waiting.join().expect("the reader does not panic");
            assert_eq!(found.len(), 1);
            assert!(woken.saturating_duration_since(answered) < Duration::from_secs(5), "it slept on");
        });
    }

    pub fn a_reader_at_the_end_waits_no_longer_than_told(place: Place) {
        let log = place.open(2);
        let mut reader = log.reader(&ends(&*log)).expect("the end is a place to read from");
        for wait in [Duration::ZERO, Duration::from_millis(300)] {
            let begin = Instant::now();
            assert!(reader.next(10, wait).expect("the log can be read").is_empty());
            assert!(begin.elapsed() >= wait && begin.elapsed() < wait + Duration::from_secs(5));
        }
    }

    pub fn a_reader_opened_at_anothers_positions_reads_on_as_that_one_does(place: Place) {
        let log = place.open(4);
        append_ok(&*log, (0..200).map(|n| numbered(&format!("k{n}"), n)).collect());
        let mut one = log.reader(&starts(&*log)).expect("the log can be read from its start");
        read(&mut *one, 77);
        let mut other = log.reader(one.positions()).expect("positions of a reader");
        let sorted = |mut entries: Vec<Entry>| {
            entries.sort_by_key(|e| e.at);
            entries.iter().map(|e| (e.at, ours(e).clone())).collect::<Vec<_>>()
        };
        assert_eq!(sorted(read(&mut *one, 123)), sorted(read(&mut *other, 123)));
        assert_eq!(one.positions(), other.positions());
    }

    pub fn two_readers_see_one_order(place: Place) {
        let log = place.open(4);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let log = &log;
                scope.spawn(move || {
                    (0..50).for_each(|n| drop(append_ok(&**log, vec![numbered(&format!("w{writer}.{}", n % 7), n)])));
                });
            }
            let (one, two) = (scope.spawn(|| in_order(&*log, 200)), scope.spawn(|| in_order(&*log, 200)));
            assert_eq!(one.join().expect("the reader does not panic"), two.join().expect("the reader does not panic"));
        });
    }

    pub fn bounds_begin_at_the_oldest_and_end_after_the_newest(place: Place) {
        let log = place.open(4);
        let positions = append_ok(&*log, (0..100).map(|n| numbered(&format!("k{n}"), n)).collect());
        let bounds = log.bounds().expect("the log tells its bounds");
        assert_eq!(bounds.len(), 12, "of all topics");
        for at in positions {
            let bounds = bounds[at.partition as usize];
            assert!((bounds.start..bounds.end).contains(&at.offset), "{at} in {bounds:?}");
        }
    }

    pub fn whatever_was_acknowledged_is_below_the_end_as_of_a_later_question(place: Place) {
        let log = place.open(4);
        for n in 0..20 {
            for at in append_ok(&*log, Topic::ALL.map(|topic| numbered(&format!("k{n}"), n).in_topic(topic)).into()) {
                let end = log.end(at.partition).expect("the log tells its end");
                assert!(end > at.offset, "{at} is not below {end}");
            }
        }
        let each: Positions = (0..12).map(|partition| log.end(partition).expect("the log tells its end")).collect();
        assert_eq!(log.ends().expect("the log tells its ends"), each);
        assert_eq!(ends(&*log), each);
    }

    pub fn a_position_outside_of_the_bounds_is_refused(place: Place) {
        let log = place.open(2);
        append_ok(&*log, (0..10).map(|n| numbered(&format!("k{n}"), n)).collect());
        let bounds = log.bounds().expect("the log tells its bounds");
        log.reader(&ends(&*log)).expect("the end is a place to read from");
        for partition in 0..bounds.len() {
            for beyond in [bounds[partition].end + 1, u64::MAX] {
                let mut from = starts(&*log);
                from[partition] = beyond;
                match log.reader(&from).err() {
                    Some(LogError::OutOfRange { at, bounds: named }) => {
                        assert_eq!(at, Position { partition: partition as u32, offset: beyond });
                        assert_eq!(named, bounds[partition]);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    pub fn another_number_of_partitions_is_refused_and_both_numbers_named(place: Place) {
        place.open(3).close();
        let error = place.try_open(5).err().expect("5 partitions are not 3");
        assert!(matches!(error, LogError::PartitionMismatch { found: 3, configured: 5 }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains('3') && text.contains('5'), "{text}");
    }

    pub fn a_record_that_is_not_ours_comes_as_foreign_and_reading_goes_on(place: Place) {
        let log = place.open(1);
        append_ok(&*log, vec![numbered("k", 1)]);
        log.append_foreign(&place, 0, b"\xff\x00 not ours");
        append_ok(&*log, vec![numbered("k", 2)]);
        let found = read_all(&*log);
        assert_eq!(found.len(), 3);
        assert_eq!(ours(&found[0]), &numbered("k", 1));
        let foreign = found[1].record.as_ref().expect_err("not ours");
        assert!(!foreign.why.is_empty());
        assert_eq!(foreign.value.as_deref(), Some(&b"\xff\x00 not ours"[..]));
        assert_eq!(ours(&found[2]), &numbered("k", 2));
        assert!(found.is_sorted_by_key(|e| e.at));
    }

    pub fn no_reader_gets_past_a_record_of_newer_rules(place: Place) {
        let log = place.open(1);
        let newer = Record { rules: RULES + 1, ..numbered("k", 2) };
        let at = append_ok(&*log, vec![numbered("k", 1), newer, numbered("k", 3)])[1];
        let is_held = |reader: &mut dyn Reader| {
            assert_eq!(ours(&read(reader, 1)[0]), &numbered("k", 1));
            for _ in 0..2 {
                match reader.next(10, Duration::from_millis(200)) {
                    Err(LogError::NewerRules { at: found, version }) => {
                        assert_eq!((found, version), (at, u64::from(RULES) + 1));
                    }
                    other => panic!("{other:?}"),
                }
                assert_eq!(reader.positions()[0], at.offset, "it stays before that record");
            }
        };
        is_held(&mut *log.reader(&starts(&*log)).expect("the log can be read"));
        log.close();
        drop(log);
        let log = place.open(1);
        is_held(&mut *log.reader(&starts(&*log)).expect("the log can be read"));
    }

    pub fn what_was_appended_is_there_after_closing_and_opening(place: Place) {
        let mut positions = Vec::new();
        for round in 0..3 {
            let log = place.open(2);
            positions.extend(append_ok(&*log, (0..10).map(|n| numbered("k", round * 10 + n)).collect()));
            log.close();
        }
        let log = place.open(2);
        let found = read_all(&*log);
        assert_eq!(found.iter().map(|e| e.at).collect::<Vec<_>>(), positions);
        assert!(found.iter().map(|e| ours(e).clone()).eq((0..30).map(|n| numbered("k", n))));
    }

    pub fn after_close_every_append_is_answered_unavailable(place: Place) {
        let log = place.open(2);
        let answers = append_later(&*log, (0..100).map(|n| numbered("k", n)).collect());
        log.close();
        // What was taken before is answered by now, one way or the other.
        assert_eq!(answers.try_iter().count(), 100);
        log.close();
        for answer in append(&*log, (0..3).map(|n| numbered("k", n)).collect()) {
            assert!(matches!(answer, Err(AppendError::Unavailable(_))), "{answer:?}");
        }
        assert!(log.health().is_err());
    }

    pub fn an_open_log_is_healthy(place: Place) {
        let log = place.open(2);
        assert_eq!(log.health(), Ok(()));
        assert_eq!(log.partitions(), 6, "of all topics");
        // Nothing to check: it must only not disturb.
        log.committed(&ends(&*log));
        append_ok(&*log, vec![numbered("k", 1)]);
    }

    pub fn whoever_is_answered_may_append_again_at_once(place: Place) {
        let log = Arc::new(place.open(2));
        let (sender, answer) = mpsc::sync_channel(1);
        let again = Arc::downgrade(&log);
        let done = Box::new(move |_: Answer| {
            // Gone only when the test has failed already.
            let Some(log) = again.upgrade() else { return };
            let done = Box::new(move |answer: Answer| drop(sender.send(answer)));
            log.append(vec![Append { record: numbered("k", 2), done }]);
        });
        log.append(vec![Append { record: numbered("k", 1), done }]);
        answer.recv_timeout(PATIENCE).expect("the second is answered").expect("the second is taken");
    }

    pub fn a_killed_process_loses_no_acknowledged_record(place: Place) {
        let (mut acknowledged, mut next) = (Vec::new(), 0);
        for _ in 0..3 {
            let mut child = weft()
                .args(["append-until-killed", "--partitions", "4", "--first", &next.to_string()])
                .args(place.arguments())
                .stdout(Stdio::piped())
                .spawn()
                .expect("the binary runs");
            let mut out = BufReader::new(child.stdout.take().expect("stdout is piped"));
            let (mut line, mut found) = (String::new(), 0);
            while found < 2000 || line.ends_with('\n') {
                line.clear();
                assert!(out.read_line(&mut line).is_ok_and(|n| n > 0) || found >= 2000, "the child ended too soon");
                // A line that was cut off by the kill says nothing.
                if let Some((_, n)) =
                    line.trim_end_matches('\n').split_once("acknowledged=").filter(|_| line.ends_with('\n'))
                {
                    acknowledged.push(n.parse::<usize>().expect("a number"));
                    found += 1;
                }
                if found == 2000 {
                    child.kill().expect("the child still runs");
                }
            }
            child.wait().expect("the child ends");
            next = acknowledged.iter().max().expect("some were acknowledged") + 100_000;
        }

        let log = place.open(4);
        let mut times: HashMap<usize, usize> = HashMap::new();
        let mut last: HashMap<(Topic, String), usize> = HashMap::new();
        for entry in read_all(&*log) {
            let record = ours(&entry);
            let value: serde_json::Value = serde_json::from_slice(&record.value).expect("JSON");
            let n = value["n"].as_u64().expect("a number") as usize;
            *times.entry(n).or_default() += 1;
            let before = last.insert((record.topic, record.key.clone()), n);
            assert!(before.is_none_or(|before| before < n), "{n} after {before:?}");
        }
        assert!(acknowledged.len() >= 6000);
        for n in acknowledged {
            assert_eq!(times.get(&n), Some(&1), "record {n}");
        }
        append_ok(&*log, vec![numbered("k", next)]);
    }
}

mod only_embedded {
    use super::*;

    #[test]
    fn a_second_one_in_the_same_directory_gets_a_clear_error() {
        let place = Place::embedded();
        let log = place.open(2);
        let error = place.try_open(2).err().expect("the directory is taken");
        assert!(error.to_string().contains("in use"), "{error}");
        log.close();
        drop(log);
        place.open(2);
    }
}
