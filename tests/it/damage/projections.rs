//! Damaged projections: set aside, and made anew from the log by the server itself.

use std::fs;
use std::path::PathBuf;

use super::{UNLIMITED, doctor, expected, numbered, numbers, publish_numbers};
use crate::support::{LogKind, Server, eventually, weft};

const EVENTS: u64 = 2_000;

/// A stopped server, and its projections' largest table.
async fn stopped_server() -> (Server, PathBuf) {
    let mut server = Server::start_with(LogKind::embedded(), UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..EVENTS).await;
    server.stop().await;
    let tables = numbered(&server.data().join("projections"), "sst");
    let largest = tables.into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    (server, largest)
}

fn set_aside(server: &Server) -> usize {
    let entries = fs::read_dir(server.data()).unwrap();
    entries
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("projections.damaged-"))
        .count()
}

#[tokio::test]
async fn projections_that_cannot_be_opened_are_set_aside_and_made_anew() {
    let (mut server, table) = stopped_server().await;
    // The end of a table says where everything else in it is.
    let mut bytes = fs::read(&table).unwrap();
    let end = bytes.len();
    bytes[end - 200..].fill(0);
    fs::write(&table, bytes).unwrap();
    assert!(doctor(server.data()).iter().any(|wrong| wrong.contains("projections")), "the doctor sees it");
    server.up();
    assert_eq!(numbers(&server, "t").await, expected(EVENTS));
    assert_eq!((server.metric("weft_projections_damaged_total").await, set_aside(&server)), (1.0, 1));
    server.stop().await;
    assert_eq!(doctor(server.data()), Vec::<String>::new());
}

#[tokio::test]
async fn a_rebuild_sets_damaged_projections_aside_and_makes_them_anew() {
    let (mut server, table) = stopped_server().await;
    let bytes = fs::read(&table).unwrap();
    fs::write(&table, &bytes[..bytes.len() - 200]).unwrap();
    let output = weft().args(["rebuild", "--data"]).arg(server.data()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(set_aside(&server), 1);
    assert_eq!(doctor(server.data()), Vec::<String>::new());
    server.up();
    assert_eq!(numbers(&server, "t").await, expected(EVENTS));
    assert_eq!(server.metric("weft_projections_damaged_total").await, 0.0, "there is nothing left to mend");
}

#[tokio::test]
async fn damage_that_a_read_meets_makes_the_server_start_anew_on_new_projections() {
    let (mut server, table) = stopped_server().await;
    // Rows of events: the blocks before the table's own description.
    let mut bytes = fs::read(&table).unwrap();
    let rows = bytes.len() / 2;
    bytes[..rows].iter_mut().step_by(512).for_each(|byte| *byte ^= 0x10);
    fs::write(&table, bytes).unwrap();
    server.up();
    eventually("a read meets it, and the server makes its projections anew", async || {
        // The connection ends while the server stops.
        let url = format!("{}/v1/threads/t/events?limit=1000", server.url);
        let page = reqwest::Client::new().get(url).bearer_auth(crate::support::token("ada", "")).send().await;
        drop(page);
        let metrics = reqwest::get(format!("{}/metrics", server.url)).await;
        let Ok(metrics) = metrics else { return false };
        metrics.text().await.is_ok_and(|text| text.contains("weft_projections_damaged_total 1"))
    })
    .await;
    eventually("it is ready", async || {
        reqwest::get(format!("{}/readyz", server.url)).await.is_ok_and(|reply| reply.status() == 200)
    })
    .await;
    assert_eq!(numbers(&server, "t").await, expected(EVENTS));
    assert_eq!(set_aside(&server), 1);
}
