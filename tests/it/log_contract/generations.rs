//! What the contract says of a log's identity and its generations, on both logs, and what only one of them can show.

use weft::log::{Cause, Identity, IfUnnamed};

use super::*;

contract_holds! {
    the_epoch_stays_and_another_log_has_another
    a_generation_is_another_epoch_of_the_same_log_and_stays_after_opening_again
    a_log_with_records_that_lost_its_name_is_refused_and_untouched_until_a_person_has_it_named
}

impl Place {
    /// Takes away what says which log this is, and leaves everything else.
    fn lose_name(&self) {
        match self {
            Place::Embedded(data) => {
                let families = ["default", "records"];
                let db = rocksdb::DB::open_cf(&rocksdb::Options::default(), log_dir(data), families);
                db.expect("nobody else has it open").delete("epoch").expect("the row is deleted");
            }
            Place::Kafka { .. } => only_kafka::delete_records(&self.topic(Topic::Events), 0, 1),
        }
    }

    fn open_by_word(&self, partitions: u32, epoch: Option<&str>) -> Opened {
        let by_word = IfUnnamed::Name(epoch);
        match self {
            Place::Embedded(data) => {
                Opened::Embedded(EmbeddedLog::open_with(&log_dir(data), partitions, by_word).expect("it opens"))
            }
            Place::Kafka { brokers, prefix } => {
                let config = kafka_config(brokers, prefix, partitions);
                Opened::Kafka(KafkaLog::open_with(config, None, by_word).expect("it opens"))
            }
        }
    }
}

mod contract {
    use super::*;

    pub fn the_epoch_stays_and_another_log_has_another(place: Place) {
        let epoch = place.open(2).epoch();
        assert!(!epoch.is_empty());
        assert_eq!(place.open(2).epoch(), epoch);
        let another = match &place {
            Place::Embedded(_) => Place::embedded(),
            Place::Kafka { .. } => Place::kafka(),
        };
        assert_ne!(another.open(2).epoch(), epoch);
    }

    pub fn a_generation_is_another_epoch_of_the_same_log_and_stays_after_opening_again(place: Place) {
        let log = place.open(2);
        append_ok(&*log, vec![numbered("k", 1)]);
        let first = log.identity();
        assert_eq!((log.epoch(), first.generation), (first.id.clone(), 1));
        log.new_generation(Cause::Discarded).expect("it begins");
        let second = log.identity();
        assert_eq!((&second.id, second.generation), (&first.id, 2));
        assert!(log.epoch().starts_with(&format!("{}.2-", first.id)), "{}", log.epoch());
        append_ok(&*log, vec![numbered("k", 2)]);
        let epoch = log.epoch();
        log.close();
        drop(log);

        let log = place.open(2);
        assert_eq!(log.epoch(), epoch);
        let found: Vec<Record> = read_all(&*log).iter().map(|entry| ours(entry).clone()).collect();
        assert_eq!(found, [numbered("k", 1), numbered("k", 2)], "what begins a generation is no record");
        log.new_generation(Cause::Salvaged).expect("it begins");
        assert_eq!((&log.identity().id, log.identity().generation), (&first.id, 3));
        assert!(!log.identity().made(&first.epoch(), &[0]) && !log.identity().made(&epoch, &[0]));
    }

    pub fn a_log_with_records_that_lost_its_name_is_refused_and_untouched_until_a_person_has_it_named(place: Place) {
        let log = place.open(2);
        append_ok(&*log, (0..10).map(|n| numbered(&format!("k{n}"), n)).collect());
        let (epoch, ends_before, before) = (log.epoch(), ends(&*log), read_all(&*log).len());
        log.close();
        drop(log);
        place.lose_name();
        for _ in 0..2 {
            let error = place.try_open(2).err().expect("nobody knows which log it is");
            assert!(matches!(error, LogError::Unnamed(_)), "{error:?}");
            assert!(error.to_string().contains("weft rebuild --discard"), "{error}");
        }

        let log = place.open_by_word(2, Some(&epoch));
        let Identity { id, generation, .. } = (*log.identity()).clone();
        assert_eq!((id, generation), (epoch, 2));
        let grown = ends(&*log).iter().zip(&ends_before).map(|(now, before)| now - before).sum::<u64>();
        assert!(grown <= 1, "all that was written is what names it");
        assert_eq!(read_all(&*log).len(), before);
        let named = log.epoch();
        log.close();
        drop(log);
        assert_eq!(place.open(2).epoch(), named);
    }
}

mod only_embedded {
    use super::*;

    fn copy(from: &Path, to: &Path) {
        let mut cp = std::process::Command::new("cp");
        assert!(cp.arg("-a").arg(from.join(".")).arg(to).status().expect("cp runs").success());
    }

    fn opened(dir: &Path) -> (String, u32, Identity) {
        let log = EmbeddedLog::open(dir, 2).expect("it opens");
        let identity = (*log.identity()).clone();
        (identity.epoch(), identity.generation, identity)
    }

    #[test]
    fn a_copy_is_another_generation_that_knows_what_it_shares_and_the_original_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (original, copied) = (folder.path().join("log"), folder.path().join("copy"));
        let log = open_embedded(&original, 2).expect("a new log");
        append_ok(&*log, (0..5).map(|n| numbered("k", n)).collect());
        let epoch = log.epoch();
        drop(log);
        std::fs::create_dir(&copied).expect("a folder");
        copy(&original, &copied);

        let (of_copy, generation, identity) = opened(&copied);
        assert_eq!((generation, &identity.id), (2, &epoch));
        assert!(identity.made(&epoch, &[5, 0]) && !identity.made(&epoch, &[6, 0]));
        assert_eq!(opened(&copied).0, of_copy, "once");
        assert_eq!(opened(&original).0, epoch);
    }

    #[test]
    fn an_older_copy_that_is_put_over_the_log_file_by_file_is_another_generation() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (original, backup) = (folder.path().join("log"), folder.path().join("backup"));
        let epoch = opened(&original).0;
        std::fs::create_dir(&backup).expect("a folder");
        copy(&original, &backup);
        let log = open_embedded(&original, 2).expect("it opens");
        append_ok(&*log, (0..5).map(|n| numbered("k", n)).collect());
        drop(log);
        // As `rsync --delete` does: what is in both keeps its place.
        for file in std::fs::read_dir(&original).expect("it is there") {
            let path = file.expect("it can be listed").path();
            if !backup.join(path.file_name().expect("it has a name")).exists() {
                std::fs::remove_file(&path).expect("it is a file");
            }
        }
        copy(&backup, &original);
        assert!(original.join("weft-opened").exists());
        let (restored, generation, _) = opened(&original);
        assert_eq!(generation, 2, "{restored} and {epoch}");
    }

    #[test]
    fn a_folder_that_is_moved_and_one_whose_opening_ended_early_are_no_copies() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (here, there) = (folder.path().join("log"), folder.path().join("elsewhere"));
        let epoch = opened(&here).0;
        std::fs::rename(&here, &there).expect("it moves");
        assert_eq!(opened(&there).0, epoch);
        // As if the last step of the opening had not been done.
        std::fs::rename(there.join("weft-opened"), there.join("weft-opened.new")).expect("the file is there");
        assert_eq!(opened(&there).0, epoch);
    }

    #[test]
    fn a_log_that_holds_nothing_is_named_whatever_is_missing() {
        let place = Place::embedded();
        drop(place.open(2));
        place.lose_name();
        assert_eq!(place.open(2).identity().generation, 1);
    }
}

mod only_kafka_log {
    use std::sync::Barrier;

    use weft::log::kafka::Known;

    use super::*;

    #[test]
    fn a_reader_stops_where_another_node_begins_a_generation_and_says_so() {
        let place = Place::kafka();
        let (one, other) = (place.open(1), place.open(1));
        append_ok(&*one, vec![numbered("k", 1)]);
        let mut reader = other.reader(&starts(&*other)).expect("it opens");
        one.new_generation(Cause::Discarded).expect("it begins");
        append_ok(&*one, vec![numbered("k", 2)]);
        assert_eq!(ours(&read(&mut *reader, 1)[0]), &numbered("k", 1));
        let until = Instant::now() + PATIENCE;
        let error = loop {
            assert!(Instant::now() < until, "it neither reads on nor fails");
            match reader.next(10, Duration::from_millis(200)) {
                Ok(entries) => assert!(entries.is_empty(), "{entries:?}"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, LogError::OtherGeneration(_)), "{error:?}");
        assert!(error.to_string().contains(&one.epoch()), "{error}");
        assert!(matches!(reader.next(10, Duration::ZERO), Err(LogError::OtherGeneration(_))), "and it stays so");
        assert_eq!(reader.positions()[0], 2, "where the generation begins");
        // Whoever knows of it reads over it.
        let records = read_all(&*place.open(1));
        assert_eq!(
            records.iter().map(|entry| ours(entry).clone()).collect::<Vec<_>>(),
            [numbered("k", 1), numbered("k", 2)]
        );
    }

    #[test]
    fn of_two_nodes_that_begin_a_generation_at_once_the_first_in_the_log_counts_for_both() {
        let place = Place::kafka();
        let nodes = [place.open(1), place.open(1)];
        let together = Barrier::new(2);
        std::thread::scope(|scope| {
            for node in &nodes {
                scope.spawn(|| {
                    together.wait();
                    node.new_generation(Cause::Discarded).expect("it begins");
                });
            }
        });
        let current = place.open(1).identity();
        assert_eq!(current.generation, 2);
        assert!(nodes.iter().all(|node| node.identity() == current));
    }

    #[test]
    fn what_a_node_knows_of_the_log_is_not_read_again_and_what_came_later_is() {
        let place = Place::kafka();
        let log = place.open(1);
        append_ok(&*log, (0..100).map(|n| numbered("k", n)).collect());
        let known = Known { identity: (*log.identity()).clone(), offset: ends(&*log)[0] };
        let open = |known: &Known| {
            let Place::Kafka { brokers, prefix } = &place else { unreachable!("it is on Kafka") };
            KafkaLog::open_with(kafka_config(brokers, prefix, 1), Some(known), IfUnnamed::Refuse).expect("it opens")
        };
        assert_eq!(open(&known).epoch(), log.epoch());
        log.new_generation(Cause::Discarded).expect("it begins");
        assert_eq!(open(&known).epoch(), log.epoch());
        // Another log's positions say nothing of this one.
        let other = Known { identity: Identity::new("another".into()), ..known };
        assert_eq!(open(&other).epoch(), log.epoch());
    }

    #[test]
    fn topics_in_which_another_program_wrote_first_are_refused_and_get_no_marker() {
        for topic in Topic::ALL {
            let place = Place::kafka();
            for topic in Topic::ALL {
                only_kafka::create_topic(&place.topic(topic), &[]);
            }
            only_kafka::produce(kafka::brokers(), &place.topic(topic), Some(0), Some(b"acme/t"), Some(b"{}"), None);
            let error = place.try_open(1).err().expect("it holds a record");
            assert!(matches!(error, LogError::Unnamed(_)), "{topic:?}: {error:?}");
            assert!(error.to_string().contains(&place.topic(topic)), "{error}");
            let log = place.open_by_word(1, None);
            let ends_now = ends(&*log);
            assert_eq!(ends_now.iter().sum::<u64>(), 2, "the other program's, and the one that names the log");
        }
    }
}
