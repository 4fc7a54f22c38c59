//! `data` that a reader could fail over: it is refused where it comes in, and what an older log holds of it fails nobody.

use serde_json::value::RawValue;
use serde_json::{Value, json};
use weft::ingest::admit::new_event;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Grant, Record, Topic};
use weft::protocol::ids::log_key;

use super::runs::AGENT;
use crate::on_both_logs;
use crate::persistence::projector::append;
use crate::support::{LogKind, PATIENCE, Server, TENANT, refused, token};

/// JSON by its grammar that no common reader can hold.
fn hostile() -> [(&'static str, String); 4] {
    [
        ("a number beyond all floats", "1e400".to_owned()),
        ("a number of 5,000 digits", "9".repeat(5_000)),
        ("200 levels", format!("{}1{}", "[".repeat(200), "]".repeat(200))),
        ("half of a surrogate pair", r#""\ud800""#.to_owned()),
    ]
}

on_both_logs!(data_that_a_reader_could_fail_over_is_refused_by_its_field_over_every_way_in, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "hello").await, 1);
    for (what, value) in hostile() {
        for (kind, data) in [
            ("x.custom", value.clone()),
            ("user_message", format!(r#"{{"content":[{{"type":"x","v":{value}}}]}}"#)),
            ("user_message", format!(r#"{{"content":"hi","more":{value}}}"#)),
        ] {
            let event = format!(r#""kind":"{kind}","data":{data}"#);
            ada.send_text(&format!(r#"{{"type":"publish","id":1,"thread":"t",{event}}}"#)).await;
            let answer = ada.recv().await;
            assert_eq!(answer["id"], 1, "{what}: {answer}");
            refused(&answer, "bad_request", "data");

            let reply = reqwest::Client::new()
                .post(format!("{}/v1/threads/t/events", server.url))
                .bearer_auth(token("ada", ""))
                .body(format!("{{{event}}}"))
                .send()
                .await
                .unwrap();
            assert_eq!(reply.status(), 400, "{what}");
            refused(&reply.json::<Value>().await.unwrap(), "bad_request", "data");
        }
    }
    // What is large and deep, but within what all readers take, passes.
    let deep = format!("{}1e308{}", "[".repeat(64), "]".repeat(64));
    ada.send_text(&format!(r#"{{"type":"publish","id":2,"thread":"t","kind":"x.deep","data":{deep}}}"#)).await;
    assert_eq!(ada.recv().await["seq"], 2, "and nothing that was refused is there");
});

/// Records as an earlier version accepted them: a run whose every part is hostile, and a message to it.
fn older_records(value: &str) -> Vec<Record> {
    let step = |kind: &str, data: String| {
        let data = RawValue::from_string(data).unwrap();
        let mut event = new_event(TENANT, "ada", "t", kind, &data);
        event.run = (!kind.ends_with("user_message")).then(|| "r".into());
        Record {
            topic: Topic::Events,
            key: log_key(TENANT, "t"),
            kind: kind.to_owned(),
            rules: 1,
            grant: Grant::Scope,
            traceparent: None,
            value: serde_json::to_vec(&event).unwrap().into(),
        }
    };
    let parts = format!(r#"{{"content":[{{"type":"text","text":"said"}},{{"type":"x","v":{value}}}]}}"#);
    vec![
        step("agent_started", format!(r#"{{"agent":"a","input":{value}}}"#)),
        step("user_message", parts.clone()),
        step("tool_executing", format!(r#"{{"tool":"map","call":"c","arguments":{value}}}"#)),
        step("tool_completed", format!(r#"{{"call":"c","result":{value}}}"#)),
        step("agent_message", parts),
        step("x.custom", value.to_owned()),
        step("agent_waiting", format!(r#"{{"reason":"approval","prompt":{value}}}"#)),
        step("agent_resumed", format!(r#"{{"answer":{value}}}"#)),
        step("agent_completed", format!(r#"{{"output":{value}}}"#)),
    ]
}

/// The text that a stream sends up to and with this one.
async fn streamed_to(server: &Server, path: &str, last: &str) -> String {
    let url = format!("{}{path}", server.url);
    let mut reply = reqwest::Client::new().get(url).bearer_auth(token("ada", "")).send().await.unwrap();
    assert_eq!(reply.status(), 200);
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains(last) {
        let chunk = tokio::time::timeout(PATIENCE, reply.chunk()).await.expect("more").unwrap();
        text.extend_from_slice(&chunk.unwrap_or_else(|| panic!("the end: {}", String::from_utf8_lossy(&text))));
    }
    String::from_utf8(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_older_log_holds_of_it_fails_no_page_and_no_stream() {
    for (what, value) in hostile() {
        let mut server = Server::start(LogKind::embedded());
        assert_eq!(server.connect("ada").await.say("t", "hello").await, 1);
        server.stop().await;
        {
            let log = EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
            append(&log, older_records(&value));
            weft::log::Log::close(&log);
        }
        server.up();
        server.ready().await;

        // What it is depends on the kind; that it comes at all is what was not so.
        for _ in 0..2 {
            let agui = streamed_to(
                &server,
                "/v1/threads/t/agui?after=0",
                r#""type":"RUN_FINISHED","threadId":"t","runId":"r","result""#,
            );
            let agui = agui.await;
            assert!(agui.contains("TOOL_CALL_RESULT") && agui.contains(r#""text":"said""#), "{what}: {agui}");
        }
        let stream = streamed_to(&server, "/v1/threads/t/stream?after=0", "\nid:10\n").await;
        assert_eq!(stream.matches("id:").count(), 10, "{what}: {stream}");
        for path in ["events", "context", "runs", "runs/r"] {
            let url = format!("{}/v1/threads/t/{path}", server.url);
            let reply = reqwest::Client::new().get(url).bearer_auth(token("ada", "")).send().await.unwrap();
            assert_eq!(reply.status(), 200, "{what}: {path}");
            assert!(reply.text().await.unwrap().len() > 50, "{what}: {path}");
        }
        let mut agent = server.connect_as("ada", AGENT).await;
        agent.send(&json!({"type": "subscribe", "id": 1, "thread": "t"})).await;
        assert_eq!(agent.recv().await["head"], 10);
        assert_eq!(server.metric("weft_panics_total").await, 0.0, "{what}");
    }
}
