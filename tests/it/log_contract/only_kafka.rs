//! What only a real broker can show: outages, other programs in the topic, and Kafka's own tools.

use std::sync::Barrier;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::bindings::{self, rd_kafka_resp_err_t, rd_kafka_vtype_t};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};

use weft::log::Foreign;

use super::*;
use crate::support::kafka::Broker;

/// What another program writes into the topic.
pub fn produce(
    brokers: &str,
    topic: &str,
    partition: Option<u32>,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    headers: Option<OwnedHeaders>,
) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a producer");
    let mut out: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic);
    (out.partition, out.key, out.payload, out.headers) = (partition.map(|p| p as i32), key, value, headers);
    producer.send(out).map_err(|(e, _)| e).expect("the producer takes it");
    producer.flush(PATIENCE).expect("the broker takes it");
}

/// Kafka takes any bytes as a header's name; rdkafka's own types give and take only text.
#[expect(unsafe_code, reason = "the safe producer cannot write a header whose name is not UTF-8")]
fn produce_with_a_header_that_is_no_text(brokers: &str, topic: &str) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a producer");
    let topic = std::ffi::CString::new(topic).expect("no NUL in it");
    // SAFETY: the arguments come in the groups that the call is documented to take, each after its type, up to END;
    // all pointers are to NUL-terminated texts that outlive the call, which copies them.
    let error = unsafe {
        bindings::rd_kafka_producev(
            producer.client().native_ptr(),
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_TOPIC,
            topic.as_ptr(),
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_PARTITION,
            0_i32,
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_MSGFLAGS,
            bindings::RD_KAFKA_MSG_F_COPY,
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_VALUE,
            c"{}".as_ptr(),
            2_usize,
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_HEADER,
            c"\xff\xfe".as_ptr(),
            c"x".as_ptr(),
            1_isize,
            rd_kafka_vtype_t::RD_KAFKA_VTYPE_END,
        )
    };
    assert_eq!(error, rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR);
    producer.flush(PATIENCE).expect("the broker takes it");
}

/// Waits until the log says that it is well, or not.
fn wait_for_health(log: &dyn Log, well: bool) {
    eventually(if well { "the log is well" } else { "the log knows" }, || log.health().is_ok() == well);
}

fn in_time(log: &dyn Log, records: Vec<Record>) -> Vec<Answer> {
    let begin = Instant::now();
    let answers = append(log, records);
    assert!(begin.elapsed() < Duration::from_secs(5), "answered after {:?}", begin.elapsed());
    answers
}

/// Breaks the broker, watches the log through it, mends the broker, and sees that nothing is lost.
fn survives(break_it: fn(&Broker), mend_it: fn(&Broker)) {
    let broker = Broker::own();
    let place = Place::on(&broker.brokers());
    let log = place.open(4);
    let mut reader = log.reader(&starts(&*log)).expect("the log can be read from its start");
    let key = |n: usize| format!("k{}", n % 5);
    append_ok(&*log, (0..100).map(|n| numbered(&key(n), n)).collect());
    read(&mut *reader, 100);

    break_it(&broker);
    for answer in in_time(&*log, (100..200).map(|n| numbered(&key(n), n)).collect()) {
        let error = answer.expect_err("nobody can have acknowledged it");
        assert!(matches!(error, AppendError::Unknown(_) | AppendError::Unavailable(_)), "{error:?}");
    }
    wait_for_health(&*log, false);
    let begin = Instant::now();
    for answer in append(&*log, vec![numbered("refused", 1)]) {
        assert!(matches!(answer, Err(AppendError::Unavailable(_))), "{answer:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(1), "what is known to fail is refused at once");
    let meanwhile = reader.next(10, Duration::from_millis(100));
    assert!(matches!(&meanwhile, Ok(none) if none.is_empty()) || matches!(meanwhile, Err(LogError::Unavailable(_))));
    assert!(matches!(log.bounds(), Err(LogError::Unavailable(_))));

    mend_it(&broker);
    wait_for_health(&*log, true);
    append_ok(&*log, (200..300).map(|n| numbered(&key(n), n)).collect());
    // The reader from before goes on by itself. Of what was answered `Unknown` it may see some, each once.
    let until = Instant::now() + PATIENCE;
    let mut found: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut failed = None;
    while found.values().flatten().filter(|n| **n >= 200).count() < 100 {
        assert!(Instant::now() < until, "{found:?}, and last: {failed:?}");
        let entries = reader.next(100, Duration::from_millis(200));
        for entry in entries.unwrap_or_else(|error| {
            failed = Some(error);
            Vec::new()
        }) {
            let value: serde_json::Value = serde_json::from_slice(&ours(&entry).value).expect("JSON");
            let n = value["n"].as_u64().expect("a number") as usize;
            found.entry(ours(&entry).key.clone()).or_default().push(n);
        }
    }
    assert!(!found.contains_key("refused"), "what was refused never appears");
    for (key, numbers) in &found {
        assert!(numbers.is_sorted_by(|a, b| a < b), "{key}: {numbers:?}");
    }
    let all = read_all(&*log);
    let kept = all.iter().filter(|e| (0..5).any(|n| ours(e).key == key(n))).count();
    assert_eq!(kept, 100 + found.values().map(Vec::len).sum::<usize>());
}

#[test]
fn a_paused_broker_is_answered_for_within_5_seconds_and_taken_up_again() {
    survives(Broker::pause, Broker::resume);
}

#[test]
fn a_killed_broker_is_answered_for_within_5_seconds_and_taken_up_again() {
    survives(Broker::kill, Broker::start);
}

#[test]
fn a_stopped_broker_is_answered_for_within_5_seconds_and_taken_up_again() {
    survives(Broker::stop, Broker::start);
}

#[test]
fn a_full_queue_is_said_at_once_and_closing_ends_in_time_without_a_broker() {
    let broker = Broker::own();
    let log = Place::on(&broker.brokers()).open(2);
    let reader = log.reader(&starts(&*log)).expect("the log can be read from its start");
    log.committed(&ends(&*log));
    broker.pause();
    let answers = append_later(&*log, (0..150_000).map(|n| numbered("k", n)).collect());
    let full = answers.try_iter().filter(|(_, answer)| *answer == Err(AppendError::QueueFull)).count();
    assert!(full >= 40_000, "{full}");
    let begin = Instant::now();
    log.close();
    drop(reader);
    assert!(begin.elapsed() < Duration::from_secs(10), "closed after {:?}", begin.elapsed());
    assert_eq!(full + answers.try_iter().count(), 150_000);
}

#[test]
fn without_a_broker_opening_fails_and_names_the_address() {
    let error = Place::on("127.0.0.1:1").try_open(2).err().expect("nothing listens there");
    assert!(matches!(error, LogError::Unavailable(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("no Kafka broker answered") && text.contains("127.0.0.1:1"), "{text}");
}

#[test]
fn keys_land_where_murmur2_says() {
    let log = Place::kafka().open(12);
    // From Kafka's own tests of murmur2.
    let known = [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        ("abc", 479470107),
    ];
    for (key, hash) in known {
        let partition = (hash & 0x7fff_ffff) % 12;
        assert_eq!(append_ok(&*log, vec![record(key, "{}")])[0].partition, partition as u32, "{key}");
    }
}

#[test]
fn kafkas_own_producer_agrees_on_partitions_and_its_records_are_foreign() {
    let place = Place::kafka();
    let log = place.open(12);
    let keys: Vec<String> = (0..40).map(|n| format!("acme/thread-{n}")).collect();
    let ours_at = append_ok(&*log, keys.iter().map(|key| record(key, "{}")).collect());
    let lines: String = keys.iter().map(|key| format!("{key};by hand\n")).collect();
    let topic = place.topic(Topic::Events);
    let options = ["--bootstrap-server", kafka::brokers(), "--topic", &topic];
    let options = [&options[..], &["--property", "parse.key=true", "--property", "key.separator=;"]].concat();
    kafka::tool("org.apache.kafka.tools.ConsoleProducer", &options, &lines);
    let mut found = HashMap::new();
    for entry in read_all(&*log) {
        if let Err(foreign) = entry.record {
            assert_eq!(foreign.value.as_deref(), Some(&b"by hand"[..]));
            found.insert(foreign.key.expect("it was given a key"), entry.at.partition);
        }
    }
    for (key, at) in keys.iter().zip(ours_at) {
        assert_eq!(found.get(key.as_bytes()), Some(&at.partition), "{key}");
    }
}

#[test]
fn whatever_another_program_writes_is_foreign_and_reading_continues() {
    let place = Place::kafka();
    let log = place.open(1);
    let (brokers, topic) = (kafka::brokers(), place.topic(Topic::Events));
    let headers = |version: &str, grant: &str| {
        OwnedHeaders::new()
            .insert(Header { key: "weft-kind", value: Some("message") })
            .insert(Header { key: "weft-version", value: Some(version) })
            .insert(Header { key: "weft-grant", value: Some(grant) })
    };
    let (key, value) = (Some(&b"acme/t"[..]), Some(&b"{}"[..]));
    let cases = [
        (key, value, None),
        (key, value, Some(OwnedHeaders::new().insert(Header { key: "weft-version", value: None::<&str> }))),
        (key, value, Some(headers("0", "member"))),
        (key, value, Some(headers("one", "member"))),
        (key, value, Some(headers("+2", "member"))),
        (key, value, Some(headers("1", "root"))),
        (None, value, Some(headers("1", "member"))),
        (Some(&b"\xff"[..]), value, Some(headers("1", "member"))),
        (key, None, Some(headers("1", "member"))),
    ];
    let count = cases.len();
    for (key, value, headers) in cases {
        produce(brokers, &topic, Some(0), key, value, headers);
    }
    produce_with_a_header_that_is_no_text(brokers, &topic);
    append_ok(&*log, vec![numbered("k", 1)]);
    let found = read_all(&*log);
    assert!(found[..=count].iter().all(|e| e.record.is_err()));
    assert_eq!(ours(&found[count + 1]), &numbered("k", 1));
}

/// What Kafka's own consumer prints of a topic's first records: headers, key and value.
fn console(topic: &str, count: &str) -> String {
    let options = ["--bootstrap-server", kafka::brokers(), "--topic", topic, "--from-beginning"];
    let print = ["--property", "print.key=true", "--property", "print.headers=true", "--max-messages", count];
    kafka::tool("org.apache.kafka.tools.consumer.ConsoleConsumer", &[&options[..], &print].concat(), "")
}

#[test]
fn the_topic_reads_well_with_kafkas_own_console_consumer() {
    let place = Place::kafka();
    let log = place.open(1);
    append_ok(&*log, vec![record("acme/t1", r#"{"kind":"message","text":"Grüße"}"#)]);
    let out = console(&place.topic(Topic::Events), "2");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].contains("weft-kind:log_created") && lines[0].contains(&log.epoch()), "{out}");
    let headers = format!("weft-kind:message,weft-version:{RULES},weft-grant:member");
    assert_eq!(lines[1], format!("{headers}\tacme/t1\t{{\"kind\":\"message\",\"text\":\"Grüße\"}}"));
}

#[test]
fn kafkas_own_tools_show_how_far_we_have_read() {
    let place = Place::kafka();
    let log = place.open(1);
    append_ok(&*log, (0..10).map(|n| numbered("k", n)).collect());
    append_ok(&*log, (0..5).map(|n| numbered("k", n).in_topic(Topic::Receipts)).collect());
    log.committed(&[4, 2, 0]);
    log.committed(&[7, 3, 0]);
    log.close();
    let Place::Kafka { prefix, .. } = &place else { return };
    let group = format!("{prefix}node");
    let options = ["--bootstrap-server", kafka::brokers(), "--describe", "--group", &group];
    let out = kafka::tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", &options, "");
    // The eleventh event is the marker in front.
    for (topic, expected) in [(Topic::Events, ["0", "7", "11", "4"]), (Topic::Receipts, ["0", "3", "5", "2"])] {
        let line = out.lines().find(|line| line.contains(&place.topic(topic))).expect("our group is listed");
        let columns: Vec<&str> = line.split_whitespace().skip(2).take(4).collect();
        assert_eq!(columns, expected, "partition, committed, end, lag");
    }
}

#[test]
fn two_nodes_that_start_at_once_agree_on_the_epoch_and_read_one_order() {
    let place = Place::kafka();
    let together = Barrier::new(3);
    let nodes: Vec<Opened> = std::thread::scope(|scope| {
        let open = || {
            together.wait();
            place.open(4)
        };
        let nodes: Vec<_> = (0..3).map(|_| scope.spawn(open)).collect();
        nodes.into_iter().map(|node| node.join().expect("it opens")).collect()
    });
    assert!(nodes.iter().all(|node| node.epoch() == nodes[0].epoch()));
    for n in 0..60 {
        append_ok(&*nodes[n % 3], vec![numbered(&format!("k{}", n % 7), n)]);
    }
    let first = in_order(&*nodes[0], 60);
    assert!(nodes.iter().all(|node| in_order(&**node, 60) == first));
    assert_eq!(read_all(&*nodes[0]).len(), 60, "markers are no entries");
}

#[test]
fn holes_left_by_another_programs_transactions_are_stepped_over_in_every_topic() {
    let place = Place::kafka();
    let log = place.open(1);
    for topic in Topic::ALL {
        leave_holes(&*log, topic, &place.topic(topic));
    }
    let found = read_all(&*log);
    assert_eq!(found.len(), 6, "of each topic the committed one, and ours");
    for topic in Topic::ALL {
        let found: Vec<bool> =
            found.iter().filter(|e| log.topic_of(e.at.partition).0 == topic).map(|e| e.record.is_ok()).collect();
        assert_eq!(found, [false, true], "{topic:?}");
    }
}

/// Two aborted transactions, the first in front of everything, the second at the end; in between a committed one with a
/// record that is not ours, and a record of ours.
fn leave_holes(log: &dyn Log, topic: Topic, name: &str) {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", kafka::brokers())
        .set("transactional.id", name)
        .create()
        .expect("a producer");
    producer.init_transactions(PATIENCE).expect("the broker has transactions");
    let transaction = |commit: bool| {
        producer.begin_transaction().expect("a transaction begins");
        let foreign = BaseRecord::<[u8], str>::to(name).key(b"not ours").payload("x");
        producer.send(foreign).map_err(|(e, _)| e).expect("it is taken");
        producer.flush(PATIENCE).expect("it is written");
        if commit { producer.commit_transaction(PATIENCE) } else { producer.abort_transaction(PATIENCE) }
            .expect("it ends");
    };
    transaction(false);
    transaction(true);
    let at = append_ok(log, vec![numbered("k", 1).in_topic(topic)])[0];
    transaction(false);
    // The aborted record and the mark of its end, which the broker writes after it answered.
    eventually("the transaction ends", || ends(log)[at.partition as usize] >= at.offset + 3);
}

#[test]
fn a_reader_whose_place_was_deleted_says_so_and_never_jumps() {
    let place = Place::kafka();
    let log = place.open(1);
    // More than a reader fetches ahead, and nothing that could be compressed.
    let mut noise = blake3::Hasher::new().finalize_xof();
    let mut big = vec![0; 900_000];
    let mut records = Vec::new();
    for _ in 0..80 {
        noise.fill(&mut big);
        records.push(record("k", big.clone()));
    }
    append_ok(&*log, records);
    let mut reader = log.reader(&[0, 0, 0]).expect("the start is there");
    let first = read(&mut *reader, 1)[0].at.offset;
    delete_all_records(&place.topic(Topic::Events));

    let until = Instant::now() + PATIENCE;
    let mut next = first + 1;
    let error = loop {
        assert!(Instant::now() < until, "it neither reads on nor fails");
        match reader.next(10, Duration::from_millis(200)) {
            Ok(entries) => entries.iter().for_each(|entry| {
                assert_eq!(entry.at.offset, next, "it jumped");
                next += 1;
            }),
            Err(error) => break error,
        }
    };
    let LogError::OutOfRange { at, bounds } = error else { panic!("{error:?}") };
    assert_eq!((at.offset, bounds.start), (next, 81));
    assert!(matches!(reader.next(10, Duration::ZERO), Err(LogError::OutOfRange { .. })), "and it stays so");
    assert!(matches!(log.reader(&[next, 0, 0]), Err(LogError::OutOfRange { .. })));
}

#[test]
fn partitions_added_by_somebody_else_move_no_key_while_they_are_empty() {
    let place = Place::kafka();
    let log = place.open(2);
    for topic in Topic::ALL {
        add_partitions(&place.topic(topic));
    }
    let until = Instant::now() + PATIENCE;
    while log.warnings().iter().filter(|warning| warning.contains("5 partitions")).count() < 3 {
        assert!(Instant::now() < until, "{:?}", log.warnings());
        std::thread::park_timeout(Duration::from_millis(10));
    }
    assert_eq!(log.health(), Ok(()));
    let written = |log: &dyn Log| {
        let records = (0..40).flat_map(|n| Topic::ALL.map(|topic| numbered(&format!("k{n}"), n).in_topic(topic)));
        append_ok(log, records.collect()).iter().map(|at| log.topic_of(at.partition)).collect::<Vec<_>>()
    };
    let before = written(&*log);
    drop(log);
    let again = place.open(2);
    assert_eq!(written(&*again), before, "each key where it was");
    assert_eq!(read_all(&*again).iter().map(ours).count(), 240);
    let error = place.try_open(5).err().expect("the log has 2");
    assert!(matches!(error, LogError::PartitionMismatch { found: 2, configured: 5 }), "{error:?}");
}

#[test]
fn records_in_partitions_that_were_added_stop_that_topic_and_are_named() {
    let place = Place::kafka();
    let log = place.open(2);
    let receipts = place.topic(Topic::Receipts);
    add_partitions(&receipts);
    produce(kafka::brokers(), &receipts, Some(3), Some(b"k"), Some(b"{}"), None);
    wait_for_health(&*log, false);
    let why = log.health().expect_err("it is not well");
    assert!(why.contains(&receipts) && why.contains("3 (1)"), "{why}");
    let answers = append(&*log, Topic::ALL.map(|topic| numbered("k", 1).in_topic(topic)).into());
    assert!(matches!(&answers[..], [Ok(_), Err(AppendError::Unavailable(_)), Ok(_)]), "{answers:?}");
    let error = place.try_open(2).err().expect("nobody would read them").to_string();
    assert!(error.contains("5 partitions") && error.contains("2 are configured") && error.contains("3 (1)"), "{error}");
}

fn delete_all_records(topic: &str) {
    delete_up_to(topic, 0, Offset::End);
}

/// Deletes the records of a partition before an offset, as `kafka-delete-records` does.
pub fn delete_records(topic: &str, partition: i32, before: i64) {
    delete_up_to(topic, partition, Offset::Offset(before));
}

fn delete_up_to(topic: &str, partition: i32, offset: Offset) {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, partition, offset).expect("an offset");
    off_runtime(|| block_on(admin().delete_records(&list, &AdminOptions::new())).expect("the broker deletes"));
}

/// On a thread without a runtime, whatever this one has.
fn off_runtime<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().expect("it does not panic"))
}

/// Deletes a topic, and all that it holds.
pub fn delete_topic(topic: &str) {
    let deleted = off_runtime(|| block_on(admin().delete_topics(&[topic], &AdminOptions::new())));
    deleted.expect("the broker answers").remove(0).expect("the broker deletes it");
}

/// Makes them 5.
fn add_partitions(topic: &str) {
    let (admin, five) = (admin(), NewPartitions::new(topic, 5));
    let added = block_on(admin.create_partitions([&five], &AdminOptions::new()));
    added.expect("the broker answers").remove(0).expect("the broker adds them");
}

fn admin() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", kafka::brokers()).create().expect("an admin client")
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

/// Makes a topic as another program would, before the log finds it; it keeps everything, unless told otherwise.
pub fn create_topic(name: &str, settings: &[(&str, &str)]) {
    let usual = [("retention.ms", "-1"), ("retention.bytes", "-1")];
    let usual = usual.iter().filter(|(setting, _)| settings.iter().all(|(other, _)| other != setting));
    let new = NewTopic::new(name, 1, TopicReplication::Fixed(1));
    let new = usual.chain(settings).fold(new, |new, (setting, value)| new.set(setting, value));
    let created = block_on(admin().create_topics([&new], &AdminOptions::new()));
    created.expect("the broker answers").remove(0).expect("the broker makes it");
}

#[test]
fn compacted_events_or_dead_letters_are_refused_since_they_forget() {
    for topic in [Topic::Events, Topic::DeadLetters] {
        let place = Place::kafka();
        create_topic(&place.topic(topic), &[("cleanup.policy", "compact")]);
        let error = place.try_open(1).err().expect("it forgets").to_string();
        assert!(error.contains("cleanup.policy") && error.contains(&place.topic(topic)), "{error}");
    }
}

#[test]
fn events_or_dead_letters_that_are_deleted_one_day_are_refused_and_the_error_says_how_to_mend_it() {
    for (topic, setting) in [(Topic::Events, "retention.ms"), (Topic::DeadLetters, "retention.bytes")] {
        let place = Place::kafka();
        let usual = [("retention.ms", "-1"), ("retention.bytes", "-1")];
        let settings: Vec<_> =
            usual.into_iter().filter(|it| it.0 != setting).chain([(setting, "1000000000")]).collect();
        create_topic(&place.topic(topic), &settings);
        let error = place.try_open(1).err().expect("it forgets").to_string();
        let mended = format!("--entity-name {} --add-config {setting}=-1", place.topic(topic));
        assert!(error.contains(&format!("{setting}=1000000000")) && error.contains(&mended), "{error}");
    }
}

#[test]
fn topics_are_made_so_that_they_keep_everything_and_one_replica_is_warned_of() {
    let place = Place::kafka();
    let log = place.open(1);
    let names = Topic::ALL.map(|topic| place.topic(topic));
    let wanted = names.each_ref().map(|name| ResourceSpecifier::Topic(name));
    let found = block_on(admin().describe_configs(&wanted, &AdminOptions::new())).expect("the broker answers");
    for (topic, found) in Topic::ALL.into_iter().zip(found) {
        let found = found.expect("the topic is there");
        let policy = if topic == Topic::Receipts { "compact" } else { "delete" };
        for (setting, value) in [
            ("retention.ms", "-1"),
            ("retention.bytes", "-1"),
            ("cleanup.policy", policy),
            ("unclean.leader.election.enable", "false"),
        ] {
            let entry = found.get(setting).expect("it has a value");
            assert_eq!((entry.value.as_deref(), entry.is_default), (Some(value), false), "{topic:?} {setting}");
        }
    }
    let until = Instant::now() + PATIENCE;
    while !log.warnings().iter().any(|warning| warning.contains("1 replica")) {
        assert!(Instant::now() < until, "{:?}", log.warnings());
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

#[test]
fn receipts_that_are_not_compacted_stop_nobody() {
    let place = Place::kafka();
    create_topic(&place.topic(Topic::Receipts), &[("cleanup.policy", "delete")]);
    let log = place.open(1);
    append_ok(&*log, vec![numbered("k", 1).in_topic(Topic::Receipts)]);
}

#[test]
fn compaction_keeps_no_reader_of_receipts_from_the_end_and_no_newest_from_a_reader() {
    let place = Place::kafka();
    let topic = place.topic(Topic::Receipts);
    // The newest segment is never compacted, so each append begins another one.
    create_topic(&topic, &[("cleanup.policy", "compact"), ("segment.ms", "1"), ("min.cleanable.dirty.ratio", "0.01")]);
    let log = place.open(1);
    let receipt = |key: &str, n| numbered(key, n).in_topic(Topic::Receipts);
    for round in 0..10 {
        let often = (0..5).map(|n| receipt(&format!("k{n}"), round));
        append_ok(&*log, often.chain([receipt(&format!("once {round}"), round)]).collect());
    }
    // The last round of the five keys, and each key that came once.
    let mut found: Vec<Entry> = Vec::new();
    eventually("the topic is compacted", || {
        found = read_all(&*log).into_iter().filter(|e| e.at.partition == 1).collect();
        found.len() < 25
    });
    let newest: HashMap<&str, &Record> = found.iter().map(|e| (ours(e).key.as_str(), ours(e))).collect();
    assert_eq!(newest.len(), 15);
    assert!((0..5).all(|n| *newest[format!("k{n}").as_str()] == receipt(&format!("k{n}"), 9)));
    for round in 0..10 {
        assert_eq!(*newest[format!("once {round}").as_str()], receipt(&format!("once {round}"), round));
    }
    // A place whose record is gone is still one to read from.
    assert!(found[0].at.offset > 0, "the first one is compacted away");
    let mut reader = log.reader(&[ends(&*log)[0], 0, 0]).expect("within the bounds");
    assert_eq!(read(&mut *reader, 1)[0].at, found[0].at);
}

#[test]
fn other_clients_find_receipts_in_their_topic_with_key_and_headers() {
    let place = Place::kafka();
    let log = place.open(1);
    let events = ends(&*log)[0];
    append_ok(
        &*log,
        vec![Record {
            topic: Topic::Receipts,
            key: "acme/t1".to_owned(),
            kind: "ack".to_owned(),
            rules: 1,
            grant: Grant::Scope,
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            value: r#"{"seq":7}"#.into(),
        }],
    );
    assert_eq!(ends(&*log), [events, 1, 0], "the other topics stay as they are");
    let headers = "weft-kind:ack,weft-version:1,weft-grant:scope,\
                   traceparent:00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let out = console(&log.topic_name(Topic::Receipts), "1");
    assert_eq!(out.lines().next(), Some(format!("{headers}\tacme/t1\t{{\"seq\":7}}").as_str()));
}

#[test]
fn a_record_in_another_partition_than_its_keys_is_foreign_in_every_topic() {
    let place = Place::kafka();
    let log = place.open(12);
    for topic in Topic::ALL {
        let headers = [("weft-kind", "message"), ("weft-version", "1"), ("weft-grant", "member")]
            .into_iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let right = append_ok(&*log, vec![numbered("acme/t", 1).in_topic(topic)])[0];
        let wrong = (log.topic_of(right.partition).1 + 1) % 12;
        let (brokers, name) = (kafka::brokers(), place.topic(topic));
        produce(brokers, &name, Some(wrong), Some(b"acme/t"), Some(b"{}"), Some(headers));
    }
    let found = read_all(&*log);
    let foreign: Vec<&Foreign> = found.iter().filter_map(|e| e.record.as_ref().err()).collect();
    assert_eq!((found.len(), foreign.len()), (6, 3));
    assert!(foreign.iter().all(|foreign| foreign.why.contains("murmur2")), "{foreign:?}");
}

#[test]
fn a_producer_that_failed_for_good_is_replaced_by_itself() {
    let cluster = MockCluster::new(1).expect("a mock cluster");
    for topic in ["events", "receipts", "dead-letters"] {
        cluster.create_topic(&format!("mock.{topic}"), 1, 1).expect("a topic");
    }
    let log = open_kafka(&cluster.bootstrap_servers(), "mock.", 1).expect("the log opens");
    append_ok(&*log, vec![numbered("k", 1)]);
    // What the producer numbered and what the broker counted differ: with idempotence the end of the producer.
    let error = rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
    cluster.request_errors(rdkafka::types::RDKafkaApiKey::Produce, &[error]);
    let answer = append(&*log, vec![numbered("k", 2)]).remove(0);
    assert!(matches!(answer, Err(AppendError::Unknown(_) | AppendError::Unavailable(_))), "{answer:?}");
    eventually("there is a new producer", || append(&*log, vec![numbered("k", 3)])[0].is_ok());
}
