//! Logs that are not what they were: put back from a copy, copied, replaced, cut off. No client resumes over it, and no
//! projections are lost by it.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use weft::store::Store;

use crate::log_contract::only_kafka::{delete_records, delete_topic};
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, TENANT, accepted, eventually, has, publish, refused, seqs, token, weft};

/// Copies a folder to where nothing is yet.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

/// A copy of a stopped server's log.
fn back_up(server: &Server) {
    copy(&server.data().join("log"), &server.data().join("backup"));
}

/// Puts the copy in the log's place, as docs/OPERATIONS.md has it: without projections.
async fn put_back(server: &mut Server) {
    server.stop().await;
    let (log, projections) = (server.data().join("log"), server.data().join("projections"));
    std::fs::remove_dir_all(&log).unwrap();
    std::fs::remove_dir_all(&projections).unwrap();
    copy(&server.data().join("backup"), &log);
    server.up();
    server.ready().await;
}

async fn say(server: &Server, events: usize) -> u64 {
    let mut ada = server.connect("ada").await;
    let mut head = 0;
    for n in 0..events {
        head = ada.say("t", &format!("{n}")).await;
    }
    head
}

async fn thread(server: &Server) -> Value {
    server.http("GET", "/v1/threads/t", "ada", None).await.1
}

/// What a client that comes back gets.
async fn resume(server: &Server, after: u64, epoch: &Value) -> (Socket, Value) {
    let mut ada = server.connect("ada").await;
    let subscribed = ada.subscribe_with("t", json!({"after": after, "epoch": epoch})).await;
    (ada, subscribed)
}

/// A stream that a client opens which comes back.
async fn stream(server: &Server, path: &str, query: &str, last: Option<u64>) -> Result<EventStream, (u16, Value)> {
    let last = last.map(|seq| seq.to_string());
    let headers: Vec<_> = last.iter().map(|last| ("Last-Event-ID", last.as_str())).collect();
    EventStream::open(server, &format!("/v1/threads/t/{path}{query}"), &token("ada", ""), &headers).await
}

fn epoch_of(reply: &reqwest::Response) -> &str {
    reply.headers()["weft-epoch"].to_str().unwrap()
}

/// Clients without a WebSocket that come back from another epoch do not go on over other events: neither those that stand
/// within the thread of now nor those that stand beyond it.
async fn nobody_goes_on_unnoticed(server: &Server, before: &Value, head: u64) {
    let current = thread(server).await;
    assert_eq!(current["head"], head);
    let (before, now) = (before.as_str().unwrap(), current["epoch"].as_str().unwrap());
    assert_ne!(before, now);
    let mut ada = server.connect("ada").await;

    for cursor in ["", "&after=0", "&after=1", "&after=999", "&before=2", "&before=2&order=desc"] {
        let path = |epoch: &str| format!("/v1/threads/t/events?epoch={epoch}{cursor}");
        let (status, problem) = server.http("GET", &path(before), "ada", None).await;
        assert_eq!(status, 400, "{cursor}");
        refused(&problem, "cursor_invalid", "epoch");
        if !cursor.contains("999") {
            assert_eq!(server.http("GET", &path(now), "ada", None).await.0, 200, "{cursor}");
        }
    }
    for (query, last) in [("", None), ("&after=1", None), ("&after=999", None), ("", Some(1)), ("&after=1", Some(999))]
    {
        let runs = stream(server, "agui", &format!("?epoch={before}{query}"), last).await;
        let (status, problem) = runs.err().unwrap_or_else(|| panic!("it goes on: {query} {last:?}"));
        assert_eq!(status, 400);
        refused(&problem, "cursor_invalid", "epoch");
    }
    for (query, last) in [("", None), ("&after=1", None), ("&after=999", None), ("", Some(1)), ("&after=1", Some(999))]
    {
        let mut back = stream(server, "stream", &format!("?epoch={before}{query}"), last).await.ok().unwrap();
        assert_eq!(epoch_of(&back.reply), now);
        let begin = back.next().await.unwrap();
        assert_eq!((begin.event.as_deref(), &begin.id), (Some("subscribed"), &None), "{begin:?}");
        let head = thread(server).await["head"].clone();
        assert_eq!(
            begin.json(),
            json!({"thread": "t", "epoch": now, "head": head, "after": head, "recovered": false}),
            "{query} {last:?}"
        );
        let next = ada.say("t", "live").await;
        assert_eq!(back.seqs(1).await, [next], "nothing is replayed");
    }

    // Of this epoch, or without a word about it.
    let head = thread(server).await["head"].as_u64().unwrap();
    let mut back = stream(server, "stream", &format!("?epoch={now}&after=0"), Some(head - 1)).await.ok().unwrap();
    has(&back.next().await.unwrap().json(), json!({"epoch": now, "after": head - 1, "recovered": true}));
    assert_eq!(back.seqs(1).await, [head]);
    let mut back = stream(server, "stream", "", Some(head - 1)).await.ok().unwrap();
    assert_eq!((epoch_of(&back.reply).to_owned(), back.seqs(1).await), (now.to_owned(), vec![head]));
    let beyond = stream(server, "stream", &format!("?epoch={now}"), Some(head + 1)).await.err().unwrap().1;
    refused(&beyond, "cursor_invalid", "Last-Event-ID");
    let runs = stream(server, "agui", &format!("?epoch={now}&after=1"), None).await.ok().unwrap();
    assert_eq!(epoch_of(&runs.reply), now);
    let url = format!("{}/v1/threads/t/events", server.url);
    let page = reqwest::Client::new().get(url).bearer_auth(token("ada", "")).send().await.unwrap();
    assert_eq!(epoch_of(&page), now);
}

/// `weft rebuild` with more arguments: how it ended, and what it said.
fn rebuild(server: &Server, more: &[&str]) -> (Option<i32>, String) {
    let mut command = weft();
    command.args(["rebuild", "--data"]).arg(server.data()).args(server.log().arguments()).args(more);
    let output = command.output().unwrap();
    let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    (output.status.code(), said)
}

/// Every row of the projections of a server that is stopped.
fn rows(server: &Server) -> Vec<weft::store::StoreRow> {
    Store::open(&server.data().join("projections")).unwrap().rows().map(Result::unwrap).collect()
}

#[tokio::test]
async fn after_an_older_copy_of_the_log_is_put_back_no_client_resumes_from_before() {
    let mut server = Server::start(LogKind::embedded());
    assert_eq!(say(&server, 9).await, 9);
    server.stop().await;
    back_up(&server);
    server.up();
    assert_eq!(say(&server, 6).await, 15);
    let mut epochs = vec![thread(&server).await["epoch"].clone()];

    // Twice, since the second time is no continuation of the first.
    for round in 1..=2 {
        put_back(&mut server).await;
        assert_eq!(say(&server, 6).await, 15, "as many as before, and others");
        for epoch in &epochs {
            let (_, subscribed) = resume(&server, 15, epoch).await;
            assert_eq!(subscribed["recovered"], false, "round {round}: {subscribed}");
        }
        let epoch = thread(&server).await["epoch"].clone();
        assert!(!epochs.contains(&epoch), "{epoch} was there before: {epochs:?}");
        let (mut ada, subscribed) = resume(&server, 13, &epoch).await;
        assert_eq!(subscribed["recovered"], true, "{subscribed}");
        assert_eq!(seqs(&ada.events(2).await), [14, 15]);
        epochs.push(epoch);
    }
}

#[tokio::test]
async fn after_an_older_copy_of_the_log_is_put_back_no_page_and_no_stream_goes_on_from_before() {
    let mut server = Server::start(LogKind::embedded());
    say(&server, 7).await;
    let mut scout = server.connect_as("ada", "publish agent").await;
    scout.say("other", "so that there are two").await;
    for run in ["r", "s"] {
        let mut started = publish("t", "agent_started", json!({"agent": "scout"}));
        started["run"] = json!(run);
        accepted(&scout.ask(started).await);
    }
    drop(scout);
    server.stop().await;
    back_up(&server);
    server.up();
    assert_eq!(say(&server, 6).await, 15);
    let before = thread(&server).await["epoch"].clone();
    let next = async |path: &str| server.admin("GET", path).await.1["next"].as_str().unwrap().to_owned();
    let lists = ["/v1/threads?all=true&limit=1", "/v1/threads/t/runs?limit=1", "/v1/runs?limit=1"];
    let mut cursors = Vec::new();
    for list in lists {
        cursors.push(format!("{list}&cursor={}", next(list).await));
        assert_eq!(server.admin("GET", &cursors[cursors.len() - 1]).await.0, 200);
    }
    put_back(&mut server).await;
    assert_eq!(say(&server, 6).await, 15, "as many as before, and others");
    for list in cursors {
        let (status, problem) = server.admin("GET", &list).await;
        assert_eq!(status, 400, "{list}");
        refused(&problem, "cursor_invalid", "cursor");
    }
    nobody_goes_on_unnoticed(&server, &before, 15).await;
}

#[tokio::test]
async fn a_server_that_is_killed_or_stopped_keeps_its_epoch() {
    let mut server = Server::start(LogKind::embedded());
    say(&server, 3).await;
    let before = thread(&server).await;
    server.kill();
    server.up();
    server.ready().await;
    assert_eq!(thread(&server).await, before);
    server.stop().await;
    let (code, said) = rebuild(&server, &[]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    assert_eq!(thread(&server).await, before);
}

#[tokio::test]
async fn a_log_that_is_behind_its_projections_is_refused_and_they_are_kept_for_the_right_one() {
    let mut server = Server::start(LogKind::embedded());
    let (log, backup, right) = (server.data().join("log"), server.data().join("backup"), server.data().join("right"));
    say(&server, 9).await;
    server.stop().await;
    back_up(&server);
    server.up();
    say(&server, 6).await;
    let before = thread(&server).await;
    server.stop().await;
    let kept = rows(&server);
    std::fs::rename(&log, &right).unwrap();
    copy(&backup, &log);
    for _ in 0..2 {
        let said = server.refuses_to_start();
        assert!(said.contains("up to offset 15") && said.contains("ends at 9"), "{said}");
        assert!(said.contains("put the log back") && said.contains("weft rebuild --discard"), "{said}");
        let (code, said) = rebuild(&server, &[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("ends at 9"), "{said}");
    }
    assert_eq!(rows(&server), kept);

    std::fs::rename(&log, server.data().join("wrong")).unwrap();
    std::fs::rename(&right, &log).unwrap();
    server.up();
    server.ready().await;
    assert_eq!(thread(&server).await, before);
    let (_, subscribed) = resume(&server, 15, &before["epoch"]).await;
    assert_eq!(subscribed["recovered"], true, "{subscribed}");
}

#[tokio::test]
async fn on_a_person_s_word_projections_are_discarded_and_the_log_begins_a_generation() {
    let mut server = Server::start(LogKind::embedded());
    let (log, backup) = (server.data().join("log"), server.data().join("backup"));
    say(&server, 9).await;
    server.stop().await;
    back_up(&server);
    server.up();
    say(&server, 6).await;
    let before = thread(&server).await;
    server.stop().await;
    std::fs::remove_dir_all(&log).unwrap();
    copy(&backup, &log);
    server.refuses_to_start();
    let (code, said) = rebuild(&server, &["--discard"]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    let after = thread(&server).await;
    assert_eq!(after["head"], 9);
    assert_ne!(after["epoch"], before["epoch"]);
    let (_, subscribed) = resume(&server, 9, &before["epoch"]).await;
    assert_eq!(subscribed["recovered"], false, "{subscribed}");
    // From there on it is a log like any other.
    server.stop().await;
    let (code, said) = rebuild(&server, &["--check"]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    assert_eq!(thread(&server).await["epoch"], after["epoch"]);
}

#[tokio::test]
async fn a_data_folder_that_is_copied_is_a_generation_of_its_own_and_keeps_its_projections() {
    let mut server = Server::start(LogKind::embedded());
    say(&server, 9).await;
    let before = thread(&server).await;
    server.stop().await;
    let mut copied = Server::start(LogKind::embedded());
    copied.stop().await;
    std::fs::remove_dir_all(copied.data()).unwrap();
    copy(server.data(), copied.data());

    for both in [&mut server, &mut copied] {
        both.up();
        both.ready().await;
        assert_eq!(both.metric("weft_project_events_total").await, 0.0, "nothing is made anew");
        assert_eq!(say(both, 6).await, 15);
    }
    assert_eq!(thread(&server).await["epoch"], before["epoch"]);
    assert_ne!(thread(&copied).await["epoch"], before["epoch"]);
    let (_, subscribed) = resume(&copied, 15, &before["epoch"]).await;
    assert_eq!(subscribed["recovered"], false, "{subscribed}");
    let epoch = thread(&copied).await["epoch"].clone();
    copied.kill();
    copied.up();
    copied.ready().await;
    assert_eq!(thread(&copied).await["epoch"], epoch, "one copy, one generation");
}

#[tokio::test]
async fn another_log_under_the_projections_is_refused_and_they_are_kept() {
    let mut server = Server::start(LogKind::embedded());
    let other = Server::start(LogKind::embedded());
    say(&server, 3).await;
    say(&other, 30).await;
    let (before, others) = (thread(&server).await, thread(&other).await);
    server.stop().await;
    let kept = rows(&server);
    let mut other = other;
    other.stop().await;

    let (log, aside) = (server.data().join("log"), server.data().join("aside"));
    std::fs::rename(&log, &aside).unwrap();
    std::fs::rename(other.data().join("log"), &log).unwrap();
    let said = server.refuses_to_start();
    for epoch in [&before["epoch"], &others["epoch"]] {
        assert!(said.contains(epoch.as_str().unwrap()), "it names both: {said}");
    }
    assert_eq!(rebuild(&server, &[]).0, Some(1));
    assert_eq!(rows(&server), kept);

    std::fs::remove_dir_all(&log).unwrap();
    std::fs::rename(&aside, &log).unwrap();
    server.up();
    server.ready().await;
    assert_eq!(thread(&server).await, before);
}

#[tokio::test]
async fn a_kafka_log_whose_first_record_was_deleted_keeps_its_running_nodes_and_refuses_others() {
    let kind = LogKind::kafka();
    let (mut one, mut other) = (Server::start(kind.clone()), Server::start(kind.clone()));
    say(&one, 4).await;
    let before = thread(&one).await;
    one.stop().await;
    let kept = rows(&one);
    delete_records(&kind.topic("events"), 0, 1);

    let said = one.refuses_to_start();
    assert!(said.contains("has no record in partition 0") && said.contains("weft rebuild --discard"), "{said}");
    assert_eq!(rebuild(&one, &[]).0, Some(1));
    assert_eq!(rows(&one), kept);
    assert_eq!(say(&other, 1).await, 5, "the other node goes on");
    assert_eq!(thread(&other).await["epoch"], before["epoch"]);

    // A person decides that what is left is all there is. The node that runs learns of it, and waits for that person.
    let (code, said) = rebuild(&one, &["--discard"]);
    assert_eq!(code, Some(0), "{said}");
    one.up();
    one.ready().await;
    let epoch = thread(&one).await["epoch"].clone();
    assert_ne!(epoch, before["epoch"]);
    let (_, subscribed) = resume(&one, 4, &before["epoch"]).await;
    assert_eq!(subscribed["recovered"], false, "{subscribed}");
    eventually("the other node is not ready", async || {
        let (status, ready) = other.http("GET", "/readyz", "x", None).await;
        status == 503 && ready["projector"]["error"].as_str().is_some_and(|why| why.contains("another generation"))
    })
    .await;
    other.stop().await;
    let said = other.refuses_to_start();
    assert!(said.contains("has begun") && said.contains("weft rebuild --discard"), "{said}");
    let (code, said) = rebuild(&other, &["--discard"]);
    assert_eq!(code, Some(0), "{said}");
    other.up();
    other.ready().await;
    assert_eq!(thread(&other).await, thread(&one).await, "one generation for both");
    one.ready().await;
}

#[tokio::test]
async fn records_deleted_from_any_partition_of_a_kafka_log_are_noticed_at_the_start() {
    let kind = LogKind::kafka();
    let mut server = Server::start(kind.clone());
    let mut ada = server.connect("ada").await;
    for n in 0..100 {
        ada.say(&format!("t{n}"), "hello").await;
    }
    drop(ada);
    server.stop().await;
    delete_records(&kind.topic("events"), 3, 1);
    let said = server.refuses_to_start();
    assert!(said.contains("partition 3 of") && said.contains("begins at offset 1"), "{said}");
    // A node without projections would make others than those that there are.
    let mut fresh = Server::stopped(kind.clone());
    let said = fresh.refuses_to_start();
    assert!(said.contains("partition 3 of"), "{said}");
    let (code, said) = rebuild(&server, &["--discard"]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    fresh.up();
    fresh.ready().await;
    let epochs = [thread_of(&server, "t1").await, thread_of(&fresh, "t1").await];
    assert_eq!(epochs[0], epochs[1]);
}

async fn thread_of(server: &Server, thread: &str) -> Value {
    server.http("GET", &format!("/v1/threads/{thread}"), "ada", None).await.1["epoch"].clone()
}

#[tokio::test]
async fn topics_that_were_deleted_and_made_again_are_another_log() {
    let kind = LogKind::kafka();
    let mut server = Server::start(kind.clone());
    say(&server, 4).await;
    let before = thread(&server).await;
    server.stop().await;
    let kept = rows(&server);
    for topic in ["events", "receipts", "dead-letters"] {
        delete_topic(&kind.topic(topic));
    }
    let said = server.refuses_to_start();
    assert!(said.contains(before["epoch"].as_str().unwrap()), "{said}");
    assert!(said.contains("made from the log"), "{said}");
    assert_eq!(rows(&server), kept);
    let (code, said) = rebuild(&server, &["--discard"]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    assert_eq!(say(&server, 1).await, 1);
    let (_, subscribed) = resume(&server, 1, &before["epoch"]).await;
    assert_eq!(subscribed["recovered"], false, "{subscribed}");
    assert_eq!(say(&server, 3).await, 4, "as many as before");
    nobody_goes_on_unnoticed(&server, &before["epoch"], 4).await;
}

/// Publishes in one array, and waits for no answer.
async fn publish_many(server: &Server, events: usize) -> Socket {
    let mut ada = server.connect("ada").await;
    let commands = (0..events).map(|n| {
        let mut command = publish("t", "x.note", json!({"n": n}));
        command["id"] = json!(n);
        command
    });
    ada.send(&Value::Array(commands.collect())).await;
    ada
}

async fn checkpoints(server: &Server, outcome: &str) -> f64 {
    server.metric(&format!("weft_checkpoints_total{{outcome=\"{outcome}\"}}")).await
}

#[tokio::test]
async fn nodes_that_make_the_same_of_a_log_find_that_they_do() {
    let kind = LogKind::kafka();
    let mut nodes = [Server::start(kind.clone()), Server::start(kind)];
    let _ada = publish_many(&nodes[0], 600).await;
    for node in &nodes {
        eventually("it has compared", async || checkpoints(node, "agreed").await > 0.0).await;
        node.ready().await;
        assert_eq!(checkpoints(node, "differs").await, 0.0);
    }
    eventually("all is projected", async || thread(&nodes[1]).await["head"] == 600).await;
    assert_eq!(thread(&nodes[0]).await, thread(&nodes[1]).await);
    let (_, letters) = nodes[0].admin("GET", "/v1/dead-letters").await;
    assert_eq!(letters["items"], json!([]), "a checkpoint is no foreign record");
    for node in &mut nodes {
        node.stop().await;
    }
    for node in &nodes {
        let (code, said) = rebuild(node, &["--check"]);
        assert_eq!(code, Some(0), "{said}");
    }
}

#[tokio::test]
async fn of_two_nodes_that_make_different_things_of_a_log_one_stops_and_says_so() {
    let kind = LogKind::kafka();
    let mut nodes = [Server::start(kind.clone()), Server::start(kind)];
    say(&nodes[0], 1).await;
    eventually("both have it", async || nodes[1].http("GET", "/v1/threads/t", "ada", None).await.0 == 200).await;
    nodes[1].stop().await;
    {
        let store = Store::open(&nodes[1].data().join("projections")).unwrap();
        let mut row = store.thread(TENANT, "t").unwrap().unwrap();
        row.hash[0] ^= 1;
        let mut batch = store.batch();
        batch.put_thread(TENANT, "t", &row);
        store.commit(batch).unwrap();
        store.flush().unwrap();
    }
    nodes[1].up();
    nodes[1].ready().await;
    let _ada = publish_many(&nodes[0], 600).await;

    let stopped = async |node: &Server| {
        let (status, ready) = node.http("GET", "/readyz", "x", None).await;
        let why = ready["projector"]["error"].as_str().unwrap_or_default();
        status == 503 && why.contains("made different things") && why.contains("before offset")
    };
    eventually("one has stopped", async || stopped(&nodes[0]).await || stopped(&nodes[1]).await).await;
    let which = usize::from(stopped(&nodes[1]).await);
    let (mut halted, other) = {
        let [first, second] = nodes;
        if which == 0 { (first, second) } else { (second, first) }
    };
    assert_eq!(checkpoints(&halted, "differs").await, 1.0);
    let projected = halted.metric("weft_project_events_total").await;
    eventually("the other one has all", async || thread(&other).await["head"] == 601).await;
    assert_eq!(say(&other, 1).await, 602, "the other one goes on");
    other.ready().await;
    assert_eq!(halted.metric("weft_project_events_total").await, projected, "it commits nothing more");

    // What it makes of the log alone stands, whatever the other one had written.
    halted.stop().await;
    let (code, said) = rebuild(&halted, &[]);
    assert_eq!(code, Some(0), "{said}");
    halted.up();
    halted.ready().await;
    assert_eq!(thread(&halted).await["head"], 602);
}
