//! What the contract says of topics, on both logs.

use super::*;

contract_holds! {
    partitions_are_numbered_over_all_topics
    records_of_one_key_keep_their_order_in_each_topic
    every_record_comes_back_in_the_topic_it_was_appended_to
    a_place_in_one_topic_leaves_out_nothing_of_another
    a_reader_opened_again_in_the_middle_returns_the_rest_of_all_topics
    what_is_not_ours_comes_as_foreign_with_its_place_in_each_topic
    topics_are_there_after_closing_and_opening
}

/// Three topics' records in one batch, `each` of every topic, over some keys.
fn mixed(each: usize) -> Vec<Record> {
    (0..each * 3).map(|n| numbered(&format!("acme/t{}", n / 3 % 10), n).in_topic(Topic::ALL[n % 3])).collect()
}

fn of(log: &dyn Log, entry: &Entry) -> Topic {
    log.topic_of(entry.at.partition).0
}

/// Places and records in the order of places, so that what two readers found can be compared.
fn sorted(mut entries: Vec<Entry>) -> Vec<(Position, Record)> {
    entries.sort_by_key(|entry| entry.at);
    entries.iter().map(|entry| (entry.at, ours(entry).clone())).collect()
}

mod contract {
    use super::*;

    pub fn partitions_are_numbered_over_all_topics(place: Place) {
        let log = place.open(4);
        assert_eq!(log.partitions(), 12);
        let expected: Vec<(Topic, u32)> =
            Topic::ALL.into_iter().flat_map(|topic| (0..4).map(move |within| (topic, within))).collect();
        assert_eq!((0..12).map(|partition| log.topic_of(partition)).collect::<Vec<_>>(), expected);
        for topic in Topic::ALL {
            assert!(log.topic_name(topic).ends_with(topic.as_str()));
        }
        for n in 0..20 {
            let key = format!("acme/t{n}");
            let at = append_ok(&*log, Topic::ALL.map(|topic| numbered(&key, n).in_topic(topic)).into());
            let within = log.topic_of(at[0].partition).1;
            let found: Vec<(Topic, u32)> = at.iter().map(|at| log.topic_of(at.partition)).collect();
            assert_eq!(found, Topic::ALL.map(|topic| (topic, within)), "{key} is in the same one of each topic");
        }
    }

    pub fn records_of_one_key_keep_their_order_in_each_topic(place: Place) {
        let log = place.open(4);
        let count = 10 * mixed(100).len();
        for _ in 0..10 {
            append_ok(&*log, mixed(100));
        }
        let mut by_key: HashMap<(Topic, String), (u32, Vec<Record>)> = HashMap::new();
        let found = read_all(&*log);
        assert_eq!(found.len(), count);
        for entry in &found {
            let record = ours(entry).clone();
            let known = by_key.entry((record.topic, record.key.clone()));
            let (partition, records) = known.or_insert((entry.at.partition, Vec::new()));
            assert_eq!(*partition, entry.at.partition, "one key, one partition");
            records.push(record);
        }
        assert_eq!(by_key.len(), 30);
        for ((topic, key), (_, found)) in by_key {
            let once: Vec<Record> = mixed(100).into_iter().filter(|r| r.topic == topic && r.key == key).collect();
            assert!(found.iter().eq(once.iter().cycle().take(10 * once.len())), "{topic:?} {key}");
        }
    }

    pub fn every_record_comes_back_in_the_topic_it_was_appended_to(place: Place) {
        let log = place.open(4);
        let records = mixed(50);
        let positions = append_ok(&*log, records.clone());
        let found: HashMap<Position, Record> = read_all(&*log).iter().map(|e| (e.at, ours(e).clone())).collect();
        assert_eq!(found.len(), records.len());
        for (at, record) in positions.iter().zip(&records) {
            assert_eq!(found.get(at), Some(record));
            assert_eq!(log.topic_of(at.partition).0, record.topic);
        }
    }

    pub fn a_place_in_one_topic_leaves_out_nothing_of_another(place: Place) {
        let log = place.open(4);
        append_ok(&*log, mixed(50));
        for topic in Topic::ALL {
            let expected = sorted(read_all(&*log).into_iter().filter(|entry| of(&*log, entry) == topic).collect());
            let (start, mut from) = (starts(&*log), ends(&*log));
            for partition in (0..log.partitions()).filter(|partition| log.topic_of(*partition).0 == topic) {
                from[partition as usize] = start[partition as usize];
            }
            let mut reader = log.reader(&from).expect("within the bounds");
            assert_eq!(sorted(read(&mut *reader, expected.len())), expected, "{topic:?} alone");
            // What comes later comes from all of them.
            append_ok(&*log, mixed(1));
            let later = sorted(read(&mut *reader, 3));
            assert_eq!(later.iter().map(|(_, record)| record.topic).collect::<Vec<_>>(), Topic::ALL);
            assert!(reader.next(1, Duration::ZERO).expect("the log can be read").is_empty());
        }
    }

    pub fn a_reader_opened_again_in_the_middle_returns_the_rest_of_all_topics(place: Place) {
        let log = place.open(4);
        append_ok(&*log, mixed(100));
        let all = sorted(read_all(&*log));
        for middle in [1, 77, 150, 299] {
            let mut first = log.reader(&starts(&*log)).expect("the log can be read from its start");
            let mut found = read(&mut *first, middle);
            let from = first.positions().clone();
            drop(first);
            let mut second = log.reader(&from).expect("positions of a reader");
            found.extend(read(&mut *second, 300 - middle));
            assert_eq!(sorted(found), all, "each one once");
            let ends = ends(&*log);
            let until = Instant::now() + PATIENCE;
            while *second.positions() != ends {
                assert!(Instant::now() < until, "it stays at {:?} of {ends:?}", second.positions());
                assert!(second.next(1, Duration::from_millis(50)).expect("the log can be read").is_empty());
            }
        }
    }

    pub fn what_is_not_ours_comes_as_foreign_with_its_place_in_each_topic(place: Place) {
        let log = place.open(2);
        for partition in 0..log.partitions() {
            log.append_foreign(&place, partition, format!("not ours, {partition}").as_bytes());
        }
        append_ok(&*log, mixed(10));
        let found = read_all(&*log);
        assert_eq!(found.iter().filter(|entry| entry.record.is_ok()).count(), 30);
        let mut foreign: Vec<(u32, Vec<u8>)> = found
            .iter()
            .filter_map(|e| Some((e.at.partition, e.record.as_ref().err()?.value.as_ref()?.to_vec())))
            .collect();
        foreign.sort();
        let expected: Vec<_> = (0..6).map(|n| (n, format!("not ours, {n}").into_bytes())).collect();
        assert_eq!(foreign, expected);
    }

    pub fn topics_are_there_after_closing_and_opening(place: Place) {
        let log = place.open(2);
        append_ok(&*log, mixed(20));
        let before = sorted(read_all(&*log));
        log.close();
        drop(log);
        let log = place.open(2);
        assert_eq!(sorted(read_all(&*log)), before);
        append_ok(&*log, mixed(20));
        assert_eq!(read_all(&*log).len(), 120);
    }
}
