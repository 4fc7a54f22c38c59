//! Clocks that are wrong: what the server ends by itself goes by time that has passed.

use serde_json::{Value, json};
use weft::clock;
use weft::log::{Grant, Record};
use weft::protocol::event::LogEvent;

use super::projector::record;
use super::rules::{append_to, open};
use crate::support::{LogKind, Server, eventually};

const HOUR: u64 = 60 * 60 * 1_000;

/// A record of a run, stamped by some server's clock.
fn of_run(at: u64, run: &str, kind: &str, data: &Value) -> Record {
    let mut made = record(at, "t", "scout", kind, data, None);
    let mut event: LogEvent = serde_json::from_slice(&made.value).unwrap();
    event.run = Some(run.into());
    made.value = serde_json::to_vec(&event).unwrap().into();
    made.grant = Grant::Scope;
    made
}

async fn state(server: &Server, run: &str) -> Value {
    server.admin("GET", &format!("/v1/threads/t/runs/{run}")).await.1["state"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_a_clock_stamped_an_hour_ago_is_not_ended_as_soon_as_it_is_seen() {
    let kind = LogKind::kafka();
    let server = Server::start_with(kind.clone(), &["--run-stalled-after", "30m"]);
    let log = open(&kind, server.data());
    let now = clock::now_ms();
    let started = json!({"agent": "scout"});
    // They are looked at in the order of their names: when the last one is dealt with, so are all others.
    let soon = json!({"reason": "approval", "expires_at": clock::rfc3339(now + 1)});
    let records = vec![
        of_run(now - HOUR, "a-silent", "agent_started", &started),
        of_run(now, "z-asks", "agent_started", &started),
        of_run(now, "z-asks", "agent_waiting", &soon),
    ];
    append_to(&*log, records);
    eventually("the reaper has looked", async || state(&server, "z-asks").await == "open").await;
    assert_eq!(state(&server, "a-silent").await, "open", "nobody has seen it stand still for half an hour");
    log.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_a_clock_stamped_an_hour_ahead_is_ended_in_its_time_all_the_same() {
    let mut server = Server::start_with(LogKind::embedded(), &["--run-stalled-after", "1s"]);
    server.stop().await;
    let log = open(server.log(), server.data());
    let ahead = of_run(clock::now_ms() + HOUR, "ahead", "agent_started", &json!({"agent": "scout"}));
    append_to(&*log, vec![ahead]);
    log.close();
    drop(log);
    server.up();
    eventually("it is ended", async || state(&server, "ahead").await == "failed").await;
}
