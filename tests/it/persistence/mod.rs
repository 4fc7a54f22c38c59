//! What is kept: keys, chains, projections that come back from the log. Here on a server; [`generations`] takes the log
//! away from under it, [`projector`] drives the projector itself, and [`random_log`] holds it against logs that nobody
//! thought of; [`work`] does so for who works on what, and [`beside`] where that is several at a time; [`exports`] takes all
//! of it away and proves it.

mod beside;
mod clocks;
mod exports;
mod generations;
mod layout;
pub mod projector;
mod random_log;
pub mod rules;
mod search;
pub mod threads;
mod work;

use serde_json::{Value, json};
use weft::log::Log;
use weft::protocol::event::chain;

use crate::on_both_logs;
use crate::support::{LogKind, Server, has, publish, weft};

on_both_logs!(a_publish_sent_again_with_its_key_becomes_one_event_also_after_a_kill, |log| async move {
    let mut server = Server::start(log);
    let keyed = |content: &str| {
        let mut command = publish("t", "user_message", json!({"content": content}));
        command["key"] = json!("k1");
        command
    };
    let first = server.connect("ada").await.ask(keyed("hello")).await;
    has(&first, json!({"seq": 1, "duplicate": false}));
    let again = server.connect("ada").await.ask(keyed("hello")).await;
    has(&again, json!({"seq": 1, "duplicate": true, "event": first["event"]}));
    server.kill();
    server.up();
    server.ready().await;
    let after_kill = server.connect("ada").await.ask(keyed("hello")).await;
    has(&after_kill, json!({"seq": 1, "duplicate": true}));
    let conflict = server.connect("ada").await.ask(keyed("another content")).await;
    has(&conflict, json!({"code": "conflict", "field": "key"}));
    // White space is not content, and HTTP is the same thread as WebSocket.
    let body = r#"{"kind":"user_message","data":{ "content" : "hello" }}"#;
    let reply = server
        .http_with(
            "POST",
            "/v1/threads/t/events",
            &crate::support::token("ada", ""),
            serde_json::from_str(body).ok(),
            &[("Idempotency-Key", "k1")],
        )
        .await;
    assert_eq!(reply.0, 200, "{reply:?}");
    has(&reply.1, json!({"seq": 1, "duplicate": true}));
    assert_eq!(server.http("GET", "/v1/threads/t", "ada", None).await.1["head"], 1);
});

#[tokio::test]
async fn a_key_belongs_to_its_user_and_thread() {
    let server = Server::start(LogKind::embedded());
    let keyed = |thread: &str| {
        let mut command = publish(thread, "user_message", json!({"content": thread}));
        command["key"] = json!("same");
        command
    };
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.ask(keyed("t1")).await["duplicate"], false);
    assert_eq!(ada.ask(keyed("t2")).await["duplicate"], false);
    assert_eq!(server.http("PUT", "/v1/threads/t1/members/ben", "ada", None).await.0, 201);
    let mut ben = server.connect("ben").await;
    assert_eq!(ben.ask(keyed("t1")).await["duplicate"], false);
}

on_both_logs!(rebuilt_projections_equal_the_live_ones_row_by_row, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for thread in ["a", "b", "c"] {
        for n in 0..50 {
            let mut command = publish(thread, "x.note", json!({"n": n}));
            command["key"] = json!(format!("k{}", n % 40));
            ada.ask(command).await;
        }
    }
    server.http("PUT", "/v1/threads/a", "ada", Some(json!({"title": "A", "members": ["ben", "cid"]}))).await;
    server.http("DELETE", "/v1/threads/a/members/ben", "ada", None).await;
    let mut agent = server.connect_as("scout", "publish agent").await;
    for run in ["ended", "open"] {
        let mut step = async |kind: &str, data: Value| {
            let command = json!({"type": "publish", "thread": "a", "run": run, "kind": kind, "data": data});
            assert_eq!(agent.ask(command).await["type"], "published");
        };
        step("agent_started", json!({"agent": "scout"})).await;
        for n in 0..10 {
            step("agent_token", json!({"message": "m", "from_char": 2 * n, "text": "ab"})).await;
            step("agent_token", json!({"message": "n", "from_char": n, "text": "c"})).await;
        }
        step("agent_token", json!({"message": "n", "from_char": 0, "text": "an", "restart": true})).await;
        step("agent_token", json!({"message": "n", "from_char": 2, "text": "ew"})).await;
        step("agent_message", json!({"message": "m"})).await;
        if run == "ended" {
            step("agent_completed", json!({})).await;
        }
    }
    let before = server.http("GET", "/v1/threads/a", "ada", None).await.1;
    server.stop().await;
    let run = |more: &[&str]| {
        let output = weft()
            .args(["rebuild", "--data"])
            .arg(server.data())
            .args(server.log().arguments())
            .args(more)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (code, said) = run(&["--check"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&[]);
    assert_eq!(code, Some(0), "{said}");
    server.up();
    server.ready().await;
    assert_eq!(server.http("GET", "/v1/threads/a", "ada", None).await.1, before);
    server.stop().await;
    // Deleted while stopped, they come back by themselves. On the embedded log that looks as if an older copy had been put
    // back, so the epoch is another one.
    std::fs::remove_dir_all(server.data().join("projections")).unwrap();
    server.up();
    server.ready().await;
    let mut after = server.http("GET", "/v1/threads/a", "ada", None).await.1;
    let kept = after["epoch"] == before["epoch"];
    assert_eq!(kept, !matches!(server.log(), LogKind::Embedded), "{after}");
    after["epoch"] = before["epoch"].clone();
    assert_eq!(after, before);
});

#[test]
fn a_rebuild_without_a_log_is_refused_and_makes_none() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("nowhere");
    for more in [&[][..], &["--check"]] {
        let output = weft().args(["rebuild", "--data"]).arg(&data).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("there is no log in") && said.contains("nowhere"), "{said}");
        assert!(!data.exists(), "nothing was created");
    }
}

#[tokio::test]
async fn a_thread_s_hash_covers_every_event_in_order() {
    let mut server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..5 {
        ada.say("t", &n.to_string()).await;
    }
    let thread = server.http("GET", "/v1/threads/t", "ada", None).await.1;
    drop(ada);
    server.stop().await;
    let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
    let mut reader = log.reader(&vec![0; log.partitions() as usize]).unwrap();
    let mut hash = [0; 32];
    for (n, entry) in reader.next(100, std::time::Duration::ZERO).unwrap().iter().enumerate() {
        hash = chain(&hash, n as u64 + 1, &entry.record.as_ref().unwrap().value);
    }
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(thread["hash"], hex);
}

#[tokio::test]
async fn another_number_of_partitions_is_refused_with_both_numbers() {
    let mut server = Server::start(LogKind::embedded());
    server.stop().await;
    let output = weft()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--jwt-secret",
            crate::support::SECRET,
            "--partitions",
            "5",
            "--data",
        ])
        .arg(server.data())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("64 partitions") && said.contains("5 are configured"), "{said}");
}

#[tokio::test]
async fn a_record_that_is_not_ours_is_counted_and_the_rest_is_served() {
    let mut server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "before").await;
    server.stop().await;
    {
        let log = weft::log::embedded::EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
        log.append_foreign(3, b"what is this?").unwrap();
        weft::log::Log::close(&log);
    }
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "after").await, 2);
    assert_eq!(server.metric("weft_foreign_records_total").await, 1.0);
    let page = server.http("GET", "/v1/threads/t/events", "ada", None).await.1;
    let contents: Vec<&Value> =
        page["events"].as_array().unwrap().iter().map(|event| &event["data"]["content"]).collect();
    assert_eq!(contents, ["before", "after"]);
}
