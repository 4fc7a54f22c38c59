//! Projections of an older version are made anew at the start, by themselves.

use rocksdb::{ColumnFamilyDescriptor, DB, IteratorMode, Options};
use serde_json::json;
use weft::codec;
use weft::store::catalogue::{self, KEY_TIMES, META, TICKET_TIMES};
use weft::store::{Store, StoreRow};

use crate::support::{LogKind, Server};

/// The version of rows whose keys did not begin with their partition.
const BEFORE: u8 = 11;
/// Of the row that names the log and that of positions.
const ORIGIN: u8 = 1;
/// Where a row's frame has its version.
const VERSION_AT: usize = 2;

fn rows(server: &Server) -> Vec<StoreRow> {
    Store::open(&server.data().join("projections")).unwrap().rows().map(Result::unwrap).collect()
}

/// Lays the projections of a stopped server out as version 11 did.
fn lay_out_as_before(server: &Server) {
    let path = server.data().join("projections");
    let families = catalogue::names().map(|name| ColumnFamilyDescriptor::new(name, Options::default()));
    let db = DB::open_cf_descriptors(&Options::default(), &path, families).unwrap();
    for name in catalogue::names().filter(|name| *name != META) {
        let family = db.cf_handle(name).unwrap();
        let found: Vec<_> = db.iterator_cf(&family, IteratorMode::Start).map(Result::unwrap).collect();
        found.iter().for_each(|(key, _)| db.delete_cf(&family, key).unwrap());
        for (key, mut value) in found {
            let key = match name {
                KEY_TIMES | TICKET_TIMES => [&[0; 2], &key[..]].concat(),
                _ => key[2..].to_vec(),
            };
            if codec::schema(&value).is_some() {
                value[VERSION_AT] = BEFORE;
            }
            db.put_cf(&family, key, value).unwrap();
        }
    }

    let family = db.cf_handle(META).unwrap();
    let passed: u64 = codec::decode(ORIGIN, &db.get_cf(&family, "passed").unwrap().unwrap()).unwrap();
    for (key, mut value) in db.iterator_cf(&family, IteratorMode::Start).map(Result::unwrap).collect::<Vec<_>>() {
        match &key[..] {
            b"log" => {
                let (epoch, starts, _): (String, Vec<u64>, u8) = codec::decode(ORIGIN, &value).unwrap();
                db.put_cf(&family, key, codec::encode(ORIGIN, &(epoch, starts, BEFORE))).unwrap();
            }
            key if key.starts_with(b"progress") => {
                value[VERSION_AT] = BEFORE;
                db.put_cf(&family, key, value).unwrap();
            }
            key => db.delete_cf(&family, key).unwrap(),
        }
    }
    let positions = vec![passed; 3 * 64];
    db.put_cf(&family, "positions", codec::encode(ORIGIN, &positions)).unwrap();
    db.flush().unwrap();
}

#[tokio::test]
async fn projections_laid_out_as_before_are_made_anew_at_the_start_row_by_row_and_clients_resume() {
    let mut server = Server::start_verbose(LogKind::embedded(), &[]);
    let mut ada = server.connect("ada").await;
    for thread in ["one", "two", "three"] {
        for n in 0..20 {
            ada.say(thread, &format!("{n}")).await;
        }
    }
    let answers = async |server: &Server| {
        let threads = server.http("GET", "/v1/threads", "ada", None).await;
        (threads, server.http("GET", "/v1/threads/two/events", "ada", None).await)
    };
    let before = answers(&server).await;
    assert_eq!(before.0.1["threads"].as_array().unwrap().len(), 3, "{before:?}");
    drop(ada);
    server.stop().await;
    let rows_before = rows(&server);

    lay_out_as_before(&server);
    server.up();
    server.ready().await;
    let said = server.errors();
    assert!(said.contains("of an older version: making them anew"), "{said}");
    assert!(said.contains("the log is read to where it ended at the start") && said.contains("60"), "{said}");
    assert_eq!(answers(&server).await, before, "seqs, times and the log's epoch are what they were");
    let mut ada = server.connect("ada").await;
    crate::support::has(&ada.subscribe("two", Some(18)).await, json!({"type": "subscribed"}));
    assert_eq!(crate::support::seqs(&ada.events(2).await), [19, 20]);
    drop(ada);
    server.stop().await;
    assert_eq!(rows(&server), rows_before);

    // From here on they are resumed, and nothing is read again.
    server.up();
    server.ready().await;
    assert_eq!(server.errors().matches("making them anew").count(), 1, "{}", server.errors());
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_makes_its_projections_anew_says_why_until_it_has() {
    let mut server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    server.stop().await;
    lay_out_as_before(&server);

    let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
    let path = server.data().join("projections");
    let (store, progress) = weft::projector::opening::resume(&path, Store::open(&path).unwrap(), &log).unwrap();
    let why = store.replaces().unwrap_or_default();
    assert!(why.contains("older version (rows of version 11, and these are of"), "{why}");
    assert!(progress.iter().all(|progress| progress.next == 0) && progress.len() == 3 * 64, "{progress:?}");
    weft::log::Log::close(&log);
}

#[tokio::test]
async fn a_log_that_exists_keeps_its_number_of_partitions_when_none_is_given() {
    let mut server = Server::stopped(LogKind::embedded());
    std::fs::create_dir_all(server.data()).unwrap();
    let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 16).unwrap();
    weft::log::Log::close(&log);
    drop(log);
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "hello").await, 1);
    server.stop().await;
    let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 16).unwrap();
    assert_eq!(weft::log::Log::ends(&log).unwrap(), [1; 3 * 16]);
}
