//! The write-ahead log of the embedded log: where damage is told from a torn end.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};

use serde_json::json;

use super::{
    UNLIMITED, copy_of, doctor, expected, flip, name, numbered, numbers, publish_numbers, salvage, write_ahead_file,
};
use crate::support::{LogKind, Server};

const EVENTS: u64 = 3_000;

async fn killed_server() -> Server {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..EVENTS).await;
    server.kill();
    server
}

#[tokio::test]
async fn a_flipped_byte_refuses_the_start_names_its_place_and_salvage_brings_every_other_event() {
    let server = killed_server().await;
    for percent in [5, 20, 50, 80] {
        let mut copy = copy_of(&server);
        let (file, end) = write_ahead_file(copy.data());
        let at = end * percent / 100;
        flip(&file, at);

        let said = copy.refuses_to_start();
        assert!(said.contains("the log is damaged") && said.contains(name(&file)), "{said}");
        assert!(said.contains("weft salvage") && said.contains("weft doctor"), "{said}");
        // The place is that of the fragment with the byte in it.
        let place: usize = said.split("at byte ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap();
        assert!(place <= at && at < place + (32 << 10), "{percent} %: {at}, said {said}");
        let wrong = doctor(copy.data());
        assert!(wrong.len() == 1 && wrong[0].contains(name(&file)), "{wrong:?}");

        let (mut saved, said) = salvage(&copy);
        let lost = said["missing_records"].as_u64().unwrap();
        assert!(lost <= 1, "one byte is in one record: {said}");
        assert_eq!(said["records"], json!(EVENTS - lost), "{said}");
        let found = numbers(&saved, "t").await;
        assert!(found.is_sorted() && found.iter().all(|n| *n < EVENTS) && found.len() as u64 == EVENTS - lost);
        // It is a log like any other: it takes events, and survives a kill.
        publish_numbers(&mut saved.connect("ada").await, "t", EVENTS..EVENTS + 10).await;
        saved.kill();
        saved.up();
        assert_eq!(numbers(&saved, "t").await.len() as u64, EVENTS - lost + 10);
        saved.stop().await;
        assert_eq!(doctor(saved.data()), Vec::<String>::new());

        // Nothing was changed by all that: with the byte as it was, every event is there.
        flip(&file, at);
        copy.up();
        assert_eq!(numbers(&copy, "t").await, expected(EVENTS), "{percent} %");
    }
}

#[tokio::test]
async fn zeros_in_place_of_a_sector_are_damage_and_salvage_brings_what_is_around_them() {
    let mut server = killed_server().await;
    let (file, end) = write_ahead_file(server.data());
    let mut bytes = fs::read(&file).unwrap();
    let at = end / 3 / 4096 * 4096;
    bytes[at..at + 4096].fill(0);
    fs::write(&file, bytes).unwrap();
    let said = server.refuses_to_start();
    assert!(said.contains("the log is damaged") && said.contains(name(&file)), "{said}");
    let (saved, said) = salvage(&server);
    let lost = said["missing_records"].as_u64().unwrap();
    // The smallest record takes more than 150 bytes.
    assert!((1..4096 / 150).contains(&lost), "{said}");
    assert_eq!(numbers(&saved, "t").await.len() as u64, EVENTS - lost);
}

#[tokio::test]
async fn whatever_stands_after_the_end_is_a_torn_end_and_every_answered_event_is_there() {
    let server = killed_server().await;
    let (file, end) = write_ahead_file(server.data());
    let bytes = fs::read(&file).unwrap();
    let begun = bytes[..700].to_vec();
    let garbage: Vec<u8> = (0..5_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (what, tail) in [("a batch that was begun", begun), ("garbage", garbage), ("zeros", vec![0; 100_000])] {
        let mut copy = copy_of(&server);
        let mut open = OpenOptions::new().write(true).open(copy.data().join("log").join(name(&file))).unwrap();
        open.seek(SeekFrom::Start(end as u64)).unwrap();
        open.write_all(&tail).unwrap();
        drop(open);
        copy.up();
        assert_eq!(numbers(&copy, "t").await, expected(EVENTS), "{what}");
    }
}

#[tokio::test]
async fn a_log_that_is_lost_beside_its_projections_is_not_made_anew() {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..100).await;
    server.stop().await;
    let (log, kept) = (server.data().join("log"), server.data().join("kept"));
    fs::rename(&log, &kept).unwrap();
    for present in [false, true] {
        if present {
            fs::create_dir_all(&log).unwrap();
        }
        let said = server.refuses_to_start();
        assert!(said.contains("there is no log in") && said.contains("projections"), "{said}");
        assert!(!log.join("CURRENT").exists(), "nothing was made");
    }
    fs::remove_dir_all(&log).unwrap();
    fs::rename(&kept, &log).unwrap();
    server.up();
    assert_eq!(numbers(&server, "t").await, expected(100));
}

#[tokio::test]
async fn a_file_of_the_log_that_is_lost_or_empty_is_named_and_nothing_is_made_in_its_place() {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..100).await;
    server.kill();
    server.up();
    publish_numbers(&mut server.connect("ada").await, "t", 100..200).await;
    server.kill();
    let log = server.data().join("log");
    let manifest = fs::read_to_string(log.join("CURRENT")).unwrap().trim_end().to_owned();
    let table = name(&numbered(&log, "sst").pop().unwrap()).to_owned();
    let write_ahead = name(&numbered(&log, "log").pop().unwrap()).to_owned();
    for file in ["CURRENT", &manifest, &table, &write_ahead] {
        let mut copy = copy_of(&server);
        fs::remove_file(copy.data().join("log").join(file)).unwrap();
        let said = copy.refuses_to_start();
        assert!(said.contains("the log is damaged"), "{file}: {said}");
        assert!(said.contains(file) || file == write_ahead, "{file}: {said}");
        let mut copy = copy_of(&server);
        fs::write(copy.data().join("log").join(file), "").unwrap();
        // An empty write-ahead file is one that nothing was written to; its rows are missing from what it should follow.
        if file != write_ahead {
            let said = copy.refuses_to_start();
            assert!(said.contains("the log is damaged") && said.contains(file), "{file}: {said}");
        }
    }
}
