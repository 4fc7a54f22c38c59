//! The tables of the embedded log, whose damage shows when they are read: by the scrubber, by a rebuild.

use serde_json::json;

use super::{UNLIMITED, doctor, expected, flip, name, numbered, numbers, publish_numbers, salvage};
use crate::support::{LogKind, Server, eventually};

const EVENTS: u64 = 3_000;

#[tokio::test]
async fn a_damaged_table_is_found_by_the_scrubber_told_in_readyz_and_salvage_brings_what_is_around_it() {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..EVENTS).await;
    server.stop().await;
    // At a start the write-ahead log's rows go to a table.
    server.up();
    server.stop().await;
    let tables = numbered(&server.data().join("log"), "sst");
    let table = tables.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap().clone();
    flip(&table, table.metadata().unwrap().len() as usize / 3);

    server.up();
    eventually("the scrubber finds it", async || server.metric("weft_log_damaged").await == 1.0).await;
    let (status, ready) = server.http("GET", "/readyz", "x", None).await;
    assert_eq!((status, &ready["log"]["ok"]), (503, &json!(false)), "{ready}");
    assert!(ready["log"]["error"].as_str().unwrap().contains(name(&table)), "{ready}");
    // What was projected is whole.
    assert_eq!(numbers(&server, "t").await, expected(EVENTS));
    server.stop().await;

    let wrong = doctor(server.data());
    assert!(wrong.len() == 1 && wrong[0].contains(name(&table)), "{wrong:?}");
    let (saved, said) = salvage(&server);
    let lost = said["missing_records"].as_u64().unwrap();
    // A block of 4 KiB before compression, which this text shrinks a lot.
    assert!((1..=200).contains(&lost), "{said}");
    assert_eq!(numbers(&saved, "t").await.len() as u64, EVENTS - lost);
    assert_eq!(saved.metric("weft_log_damaged").await, 0.0);
}

#[tokio::test]
async fn a_whole_log_is_scrubbed_from_the_start_on() {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..EVENTS).await;
    server.stop().await;
    server.up();
    eventually("it is read", async || server.metric("weft_log_scrubbed_bytes_total").await > 200_000.0).await;
    assert_eq!(server.metric("weft_log_damaged").await, 0.0);
    assert_eq!(server.http("GET", "/readyz", "x", None).await.0, 200);
}
