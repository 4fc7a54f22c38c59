//! Versions of the rules: a node never goes past a record that only a later version can judge.

use std::path::Path;
use std::sync::mpsc;

use serde_json::{Value, json};
use weft::log::embedded::EmbeddedLog;
use weft::log::kafka::{ClientSettings, KafkaConfig, KafkaLog};
use weft::log::{Append, Log, RULES, Record};
use weft::memory::LogPlan;

use super::projector::record;
use crate::on_both_logs;
use crate::support::{KAFKA_PARTITIONS, LogKind, Server, eventually, publish, refused_with, weft};

/// The log of a server; the embedded one can be opened only while the server is down.
pub fn open(kind: &LogKind, data: &Path) -> Box<dyn Log> {
    match kind {
        LogKind::Embedded => Box::new(EmbeddedLog::open(&data.join("log"), 64).unwrap()),
        LogKind::Kafka { brokers, prefix } => {
            let (brokers, topic_prefix, group) = (brokers.clone(), prefix.clone(), format!("{prefix}writer"));
            let (settings, memory) = (ClientSettings::default(), LogPlan::default());
            let config = KafkaConfig { brokers, partitions: KAFKA_PARTITIONS, topic_prefix, group, settings, memory };
            Box::new(KafkaLog::open(config).unwrap())
        }
    }
}

/// A record as a later version writes it.
fn append_newer(log: &dyn Log) {
    let now = weft::clock::now_ms();
    let record =
        Record { rules: RULES + 1, ..record(now, "t", "ada", "user_message", &json!({"content": "new"}), None) };
    append_to(log, vec![record]);
    log.close();
}

/// Appends records in their order, and returns once they are durable.
pub fn append_to(log: &dyn Log, records: Vec<Record>) {
    for record in records {
        let (sender, appended) = mpsc::sync_channel(1);
        log.append(vec![Append { record, done: Box::new(move |answer| sender.send(answer).unwrap()) }]);
        appended.recv().unwrap().unwrap();
    }
}

/// What `/readyz` says, once the projector has failed.
async fn stopped(server: &Server) -> Value {
    eventually("the projector stops", async || {
        server.http("GET", "/readyz", "x", None).await.1["projector"]["ok"] == false
    })
    .await;
    server.http("GET", "/readyz", "x", None).await.1
}

on_both_logs!(a_node_stops_at_a_record_of_newer_rules_and_says_which_and_what_to_do, |log| async move {
    let mut server = Server::start(log.clone());
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "before").await, 1);
    match &log {
        LogKind::Embedded => {
            server.stop().await;
            append_newer(&*open(&log, server.data()));
            server.up();
        }
        LogKind::Kafka { .. } => {
            append_newer(&*open(&log, server.data()));
            assert_eq!(ada.closed().await, 1001, "its clients are asked to go elsewhere");
        }
    }
    let ready = stopped(&server).await;
    assert_eq!(ready["ready"], false, "{ready}");
    let why = ready["projector"]["error"].as_str().unwrap();
    assert!(why.contains(&format!("version {}", RULES + 1)) && why.contains("upgrade"), "{why}");
    let (status, problem) = server.http("GET", "/v1/threads/t", "ada", None).await;
    assert_eq!(status, 503, "{problem}");
    refused_with(&problem, "unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("upgraded"), "{problem}");
    assert_eq!(server.metric("weft_foreign_records_total").await, 0.0, "it is no dead letter");
    assert_eq!(server.metric("weft_projector_halted").await, 1.0, "somebody is told");
    server.stop().await;

    let output = weft().args(["rebuild", "--data"]).arg(server.data()).args(log.arguments()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("upgrade"), "{said}");
});

on_both_logs!(what_was_published_is_judged_by_the_rules_of_its_record_after_a_restart, |log| async move {
    let mut server = Server::start(log.clone());
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.ask(publish("t", "x.note", json!({}))).await["seq"], 1);
    drop(ada);
    server.stop().await;
    let log = open(&log, server.data());
    let starts: Vec<u64> = log.bounds().unwrap().iter().map(|it| it.start).collect();
    let mut reader = log.reader(&starts).unwrap();
    let entries = reader.next(10, std::time::Duration::from_secs(5)).unwrap();
    assert!(entries.iter().all(|entry| entry.record.as_ref().unwrap().rules == RULES), "{entries:?}");
});
