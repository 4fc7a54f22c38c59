//! Exports: the same twice, proved without a server, gone on with where they were cut off, and what is hidden in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};
use weft::views::export::verify::{Verified, verify};
use weft::views::export::{Format, csv};

use crate::on_both_logs;
use crate::support::{
    LogKind, SECRET, Server, Socket, accepted, claims, eventually, has, publish, refused, refused_with, token, weft,
};

const AGENT: &str = "publish subscribe agent";

fn analyst() -> String {
    token("ana", "analyst")
}

/// The answer to a request for an export.
async fn ask(server: &Server, query: &str, token: &str) -> (u16, String) {
    let reply = reqwest::Client::new().get(format!("{}/v1/export?{query}", server.url)).bearer_auth(token);
    let reply = reply.send().await.unwrap();
    (reply.status().as_u16(), reply.text().await.unwrap())
}

async fn export(server: &Server, query: &str) -> String {
    let (status, text) = ask(server, query, &analyst()).await;
    assert_eq!(status, 200, "{text}");
    text
}

async fn refusal(server: &Server, query: &str) -> Value {
    let (status, text) = ask(server, query, &analyst()).await;
    assert!(status >= 400, "{status} {text}");
    serde_json::from_str(&text).unwrap()
}

fn proved(text: &str) -> Verified {
    verify(text.as_bytes()).unwrap_or_else(|flaw| panic!("{flaw}:\n{text}"))
}

/// The lines of jsonl, without those about the export.
fn events(text: &str) -> Vec<Value> {
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["type"] == "event").collect()
}

/// The rows of CSV by a strict reader: each has every column, and is an event.
fn rows(text: &str) -> Vec<BTreeMap<&'static str, String>> {
    let (mut rows, mut row) = (Vec::new(), String::new());
    for line in text.split_inclusive('\n') {
        row.push_str(line);
        if row.matches('"').count() % 2 == 0 {
            let fields = csv::fields(&std::mem::take(&mut row)).unwrap_or_else(|| panic!("{line}"));
            assert_eq!(fields.len(), csv::COLUMNS.len(), "{line}");
            rows.push(csv::COLUMNS.into_iter().zip(fields).collect::<BTreeMap<_, _>>());
        }
    }
    assert_eq!(row, "", "all rows end");
    assert_eq!(rows[0]["data"], "data");
    rows.retain(|row| row["type"] == "event");
    rows
}

async fn step(agent: &mut Socket, thread: &str, run: &str, kind: &str, data: Value) {
    let command = json!({"type": "publish", "thread": thread, "run": run, "kind": kind, "data": data});
    accepted(&agent.ask(command).await);
}

/// A thread with people, one with a run that called tools, wrote in deltas and ended, and one of another program.
async fn conversations(server: &Server) {
    let mut ada = server.connect("ada").await;
    ada.say("t1", "hello, \"world\"\nand ada@example.org").await;
    server.http("PUT", "/v1/threads/t1", "ada", Some(json!({"title": "One", "members": ["ben"]}))).await;
    server.connect("ben").await.say("t1", "ümlaut 👋").await;
    let mut spaced = publish("t1", "x.note", json!(1));
    spaced["key"] = json!("k1");
    accepted(&ada.ask(spaced).await);
    ada.say("t2", "what is the weather?").await;
    let mut agent = server.connect_as("scout", AGENT).await;
    let run = async |agent: &mut Socket, kind: &str, data: Value| step(agent, "t2", "r1", kind, data).await;
    run(&mut agent, "agent_started", json!({"agent": "scout", "input": "weather"})).await;
    run(&mut agent, "tool_executing", json!({"tool": "forecast", "call": "c1", "arguments": {"city": "Bern"}})).await;
    run(&mut agent, "tool_executing", json!({"tool": "forecast", "call": "c2"})).await;
    run(&mut agent, "tool_completed", json!({"call": "c2", "error": "no city"})).await;
    run(&mut agent, "tool_completed", json!({"call": "c1", "result": {"sky": "blue"}})).await;
    run(&mut agent, "agent_token", json!({"message": "m", "from_char": 0, "text": "Sun"})).await;
    run(&mut agent, "agent_token", json!({"message": "m", "from_char": 3, "text": "ny"})).await;
    // Closed without a text of its own, and one that is closed by the end of the run.
    run(&mut agent, "agent_message", json!({"message": "m"})).await;
    run(&mut agent, "agent_token", json!({"message": "n", "from_char": 0, "text": "left open"})).await;
    step(&mut agent, "t2", "r2", "agent_started", json!({"agent": "helper", "parent_run": "r1"})).await;
    step(&mut agent, "t2", "r2", "agent_failed", json!({"code": "tired", "message": "of it"})).await;
    let usage = json!({"usage": {"input_tokens": 12, "output_tokens": 3}, "output": "done"});
    run(&mut agent, "agent_completed", usage).await;
    step(&mut agent, "t2", "open", "agent_started", json!({"agent": "scout"})).await;
    // White space of the publisher's own is kept, but for the ends of lines.
    ada.send_text(
        "{\"type\":\"publish\",\"id\":9000,\"thread\":\"t2\",\"kind\":\"x.note\",\"data\":{\"a\" :\n[1,\r\n 2]}}",
    )
    .await;
    has(&ada.recv_type("published").await, json!({"id": 9000}));
    // Another tenant's are nobody else's.
    let theirs = mint(SECRET, &Claims { tenant: "umbrella".into(), ..claims("eve", "") }).unwrap();
    Socket::open(&server.url, &theirs).await.say("t1", "canary").await;
}

const FORMATS: [&str; 4] = ["jsonl", "csv", "otel", "chat"];

/// The query that repeats an export.
fn again(text: &str) -> String {
    let header = proved(text).header;
    let positions: Vec<String> = header.positions.iter().map(u64::to_string).collect();
    format!("epoch={}&positions={}", header.epoch, positions.join(","))
}

on_both_logs!(the_same_export_is_the_same_bytes_whatever_was_written_since_and_after_a_rebuild, |log| async move {
    let mut server = Server::start(log);
    conversations(&server).await;
    let mut first = BTreeMap::new();
    for format in FORMATS {
        let text = export(&server, &format!("format={format}")).await;
        assert_eq!(export(&server, &format!("format={format}")).await, text, "at once");
        assert!(!text.contains("canary"), "{format}");
        first.insert(format, text);
    }
    let whole = proved(&first["jsonl"]);
    let counts = (whole.threads, whole.proved, whole.partly);
    assert_eq!(counts, (2, 1, 1), "every thread came to its hash, one of them with links of its own");
    for thread in ["t1", "t2"] {
        let (_, shown) = server.http_with("GET", &format!("/v1/threads/{thread}"), &analyst(), None, &[]).await;
        assert!(first["jsonl"].contains(&format!(r#""hash":"{}"}}"#, shown["hash"].as_str().unwrap())), "{shown}");
    }

    // What is written from now on is not in it: more of the same threads, a call that completes, another thread.
    let mut ada = server.connect("ada").await;
    ada.say("t1", "later").await;
    ada.say("t0", "before all others by its name").await;
    let mut agent = server.connect_as("scout", AGENT).await;
    step(&mut agent, "t2", "open", "agent_completed", json!({})).await;
    for (format, text) in &first {
        let query = format!("format={format}&{}", again(text));
        assert_eq!(export(&server, &query).await, *text, "{format}, later");
        assert_ne!(export(&server, &format!("format={format}")).await, *text, "{format}, now");
    }

    server.stop().await;
    let rebuilt =
        weft().args(["rebuild", "--data"]).arg(server.data()).args(server.log().arguments()).output().unwrap();
    assert!(rebuilt.status.success(), "{rebuilt:?}");
    server.up();
    server.ready().await;
    for (format, text) in &first {
        assert_eq!(export(&server, &format!("format={format}&{}", again(text))).await, *text, "{format}, rebuilt");
    }
});

#[tokio::test]
async fn an_export_has_each_event_as_readers_get_it_once_and_in_order() {
    let server = Server::start(LogKind::embedded());
    conversations(&server).await;
    let mut expected = Vec::new();
    for thread in ["t1", "t2"] {
        let path = format!("/v1/threads/{thread}/events");
        expected.extend(
            server.http_with("GET", &path, &analyst(), None, &[]).await.1["events"].as_array().unwrap().clone(),
        );
    }
    let text = export(&server, "").await;
    let mut found = events(&text);
    for event in &mut found {
        let event = event.as_object_mut().unwrap();
        event.remove("type");
        // Only where the record had not the event's text.
        event.remove("hash");
    }
    assert_eq!(found, expected);

    let rows = rows(&export(&server, "format=csv").await);
    assert_eq!(rows.len(), expected.len());
    for (row, event) in rows.iter().zip(&expected) {
        assert_eq!(serde_json::from_str::<Value>(&row["data"]).unwrap(), event["data"]);
        for name in ["thread", "kind", "event", "from", "at", "key", "run"] {
            assert_eq!(row[name], event[name].as_str().unwrap_or_default(), "{name} of {event}");
        }
        for name in ["seq", "parent"] {
            assert_eq!(row[name], event[name].as_u64().map(|n| n.to_string()).unwrap_or_default());
        }
        assert_eq!(row["text"], event["data"]["content"].as_str().unwrap_or_default());
        assert_eq!(row["hash"].len(), 64);
    }

    let seqs_of = |text: &str| -> Vec<String> {
        events(text).iter().map(|event| format!("{} {}", event["thread"].as_str().unwrap(), event["seq"])).collect()
    };
    assert_eq!(seqs_of(&export(&server, "thread=t2&kinds=agent_started").await), ["t2 2", "t2 8", "t2 12"]);
    assert_eq!(seqs_of(&export(&server, "from=ben").await), ["t1 4"]);
    let middle = expected[3]["at"].as_str().unwrap();
    let (before, after) =
        (export(&server, &format!("until={middle}")).await, export(&server, &format!("since={middle}")).await);
    let (before, after) = (seqs_of(&before), seqs_of(&after));
    assert!(before.iter().all(|it| !after.contains(it)) && after.contains(&"t1 4".to_owned()), "{before:?} {after:?}");
    assert_eq!(before.len() + after.len(), expected.len());
    assert_eq!(proved(&export(&server, "kinds=x.none").await).lines, 0);
    assert_eq!(proved(&export(&server, "thread=@tenant").await).lines, 0, "it is there before its first event");
}

#[tokio::test]
async fn every_byte_of_an_export_that_is_changed_left_out_or_added_is_found() {
    let server = Server::start_with(LogKind::embedded(), &["--partitions", "1"]);
    conversations(&server).await;
    for format in FORMATS {
        let text = export(&server, &format!("format={format}")).await.into_bytes();
        verify(&text[..]).unwrap();
        let found = |changed: &[u8], how: &str, at: usize| {
            assert!(verify(changed).is_err(), "{format}: {how} at {at} of {}", text.len());
        };
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= [0x01, 0x02, 0x20, 0x80][at % 4];
            found(&changed, "a bit is another one", at);
            if at % 11 > 0 {
                continue;
            }
            found(&text[..at], "the end is missing from", at);
            found(&[&text[..at], &text[at + 1..]].concat(), "a byte is left out", at);
            found(&[&text[..at], b" ", &text[at..]].concat(), "a byte is added", at);
        }
        found(&[&text[..], b" "].concat(), "a byte is added", text.len());
    }
}

#[tokio::test]
async fn whoever_changes_an_event_and_makes_all_seals_anew_is_found_by_the_thread_s_hash() {
    let server = Server::start(LogKind::embedded());
    conversations(&server).await;
    let text = export(&server, "").await;
    let forged = text.replace("hello, ", "jello, ");
    assert_ne!(forged, text);
    let (body, _) = forged.rsplit_once(r#","blake3":""#).unwrap();
    let body = format!(r#"{body},"blake3":""#);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[0; 32]).update(body.as_bytes());
    let sealed = format!("{body}{}\"}}\n", hasher.finalize().to_hex());
    let flaw = verify(sealed.as_bytes()).unwrap_err().to_string();
    assert!(flaw.contains("do not come to its hash"), "{flaw}");
}

fn run(server: &Server, args: &[&str]) -> Output {
    let mut command = weft();
    command.args(args);
    if args[0] == "export" {
        command.args(["--url", &server.url, "--token", &analyst()]);
    }
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// A tenant with about so many MiB, whose events are large.
async fn fill(server: &Server, mib: usize) {
    fill_by(&mut server.connect("ada").await, mib).await;
}

async fn fill_by(user: &mut Socket, mib: usize) {
    let text = "0123456789abcdef".repeat(3_900);
    for n in 0..mib * 17 {
        user.say(&format!("t{}", n % 5), &format!("{n} {text}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_was_cut_off_anywhere_goes_on_to_the_same_bytes() {
    let server = Server::start_unlimited(LogKind::embedded());
    conversations(&server).await;
    fill(&server, 4).await;
    let folder = tempfile::tempdir().unwrap();
    for format in ["jsonl", "csv", "chat"] {
        let file = folder.path().join(format);
        let path = file.to_str().unwrap();
        let written = run(&server, &["export", "--format", format, "--out", path]);
        assert!(written.status.success(), "{}", said(&written));
        let whole = std::fs::read(&file).unwrap();
        assert!(whole.len() > 3 << 20, "{}", whole.len());
        let checked = run(&server, &["verify", path]);
        assert!(checked.status.success() && said(&checked).contains("complete and unaltered"), "{}", said(&checked));
        // What is there is not written over.
        assert_eq!(run(&server, &["export", "--format", format, "--out", path]).status.code(), Some(1));

        for cut in [10, 5_000, 1 << 20, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&file, &whole[..cut]).unwrap();
            assert_eq!(run(&server, &["verify", path]).status.code(), Some(1), "{cut}");
            let resumed = run(&server, &["export", "--resume", "--out", path]);
            if cut == 10 {
                // Not even the first line is there.
                assert_eq!(resumed.status.code(), Some(1));
                continue;
            }
            assert!(resumed.status.success(), "{cut}: {}", said(&resumed));
            assert!(std::fs::read(&file).unwrap() == whole, "{format} cut at {cut}");
        }
        let again = run(&server, &["export", "--resume", "--out", path]);
        assert!(again.status.success() && said(&again).contains("is complete"), "{}", said(&again));

        server.connect("ada").await.say("t1", "after all of it").await;
        let repeated = run(&server, &["export", "--repeat", path]);
        assert!(repeated.status.success() && repeated.stdout == whole, "{format}: {}", said(&repeated).len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_takes_little_of_much_has_marks_and_goes_on_after_them() {
    let server = Server::start_unlimited(LogKind::embedded());
    fill(&server, 34).await;
    let never = "since=9999-01-01T00:00:00Z";
    for query in ["kinds=x.none", &format!("format=csv&{never}"), "format=otel", &format!("format=chat&{never}")] {
        let text = export(&server, query).await;
        assert_eq!(proved(&text).lines, 0, "{query}");
        let marks: Vec<&str> = text.split_inclusive('\n').filter(|line| line.contains("cursor")).collect();
        assert_eq!(marks.len(), 1, "{query}: {text}");
        let field = |name: &str| {
            let plain = marks[0].replace("\"\"", "\"");
            plain.split_once(&format!(r#""{name}":""#)).unwrap().1.split('"').next().unwrap().to_owned()
        };
        let (_, rest) = text.split_once(marks[0]).unwrap();
        let query = format!("{query}&{}&cursor={}.{}", again(&text), field("cursor"), field("blake3"));
        assert_eq!(export(&server, &query).await, rest);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_as_it_was_until_the_first_bytes_come_that_follow_it() {
    let mut server = Server::start(LogKind::embedded());
    conversations(&server).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cut");
    let path = file.to_str().unwrap();
    // It has no mark: all of it would be asked for again.
    let whole = export(&server, "").await.into_bytes();
    let cut = &whole[..whole.len() - 10];
    std::fs::write(&file, cut).unwrap();
    let resume = ["export", "--resume", "--out", path, "--url", &server.url, "--token"];
    let refused = weft().args(resume).arg(token("ada", "")).output().unwrap();
    assert!(refused.status.code() == Some(1) && said(&refused).contains("forbidden"), "{}", said(&refused));
    assert!(std::fs::read(&file).unwrap() == cut);
    let new = folder.path().join("new");
    let refused =
        weft().args(["export", "--out", new.to_str().unwrap(), "--url", &server.url, "--token", "x"]).output();
    assert_eq!((refused.unwrap().status.code(), new.exists()), (Some(1), false));

    server.stop().await;
    let away = run(&server, &["export", "--resume", "--out", path]);
    assert_eq!(away.status.code(), Some(1), "{}", said(&away));
    assert!(std::fs::read(&file).unwrap() == cut);

    server.up();
    server.ready().await;
    let resumed = run(&server, &["export", "--resume", "--out", path]);
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(std::fs::read(&file).unwrap() == whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_exports_run_at_once_and_a_reader_that_takes_nothing_holds_little_memory() {
    let server = Server::start_unlimited(LogKind::embedded());
    fill(&server, 24).await;
    let open = async || {
        let request = reqwest::Client::new().get(format!("{}/v1/export", server.url)).bearer_auth(analyst());
        request.send().await.unwrap()
    };
    let (first, second) = (open().await, open().await);
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 200));
    let refused = refusal(&server, "").await;
    refused_with(&refused, "unavailable");
    assert!(refused["retry_after_ms"].as_u64().is_some(), "{refused}");
    let held = server.metric(r#"weft_memory_used_bytes{part="readers"}"#).await;
    assert!(held <= 16e6, "{held} bytes for two exports of 24 MB");
    // Others are let in again when one is over, be it read or given up.
    drop(first);
    eventually("there is room", async || ask(&server, "thread=t1", &analyst()).await.0 == 200).await;
    assert_eq!(proved(&second.text().await.unwrap()).threads, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_other_tenants_that_take_nothing_leave_room_for_an_export() {
    let server = Server::start_unlimited(LogKind::embedded());
    conversations(&server).await;
    let mut silent = Vec::new();
    for tenant in ["slow", "slower"] {
        let token = |sub, scope| mint(SECRET, &Claims { tenant: tenant.into(), ..claims(sub, scope) }).unwrap();
        fill_by(&mut Socket::open(&server.url, &token("eve", "")).await, 16).await;
        for _ in 0..2 {
            let request = reqwest::Client::new().get(format!("{}/v1/export", server.url));
            let reply = request.bearer_auth(token("ana", "analyst")).send().await.unwrap();
            assert_eq!(reply.status().as_u16(), 200);
            silent.push(reply);
        }
    }
    assert_eq!(proved(&export(&server, "").await).threads, 2);
    // They were open all the while.
    for reply in silent {
        assert_eq!(proved(&reply.text().await.unwrap()).threads, 5);
    }
}

#[tokio::test]
async fn what_is_masked_is_in_no_line_and_the_shape_stays() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect_as("ada@example.org", AGENT).await;
    let parts =
        json!([{"type": "text", "text": "mail ada@exa"}, {"type": "text", "text": "mple.org or +41 44 668 18 00"}]);
    accepted(&ada.ask(publish("t", "user_message", json!({"content": parts}))).await);
    let data = json!({"n": 4_111_111_111_111_111_u64, "list": ["4111 1111 1111 1111", "id-7"], "ok": true});
    accepted(&ada.ask(publish("t", "x.n", data)).await);
    step(&mut ada, "t", "r", "agent_started", json!({"agent": "a"})).await;
    step(
        &mut ada,
        "t",
        "r",
        "tool_executing",
        json!({"tool": "t", "call": "c", "arguments": {"to": "bob@example.org"}}),
    )
    .await;
    step(&mut ada, "t", "r", "tool_completed", json!({"call": "c", "result": "sent to bob@example.org"})).await;
    step(&mut ada, "t", "r", "agent_completed", json!({"output": "id-7"})).await;

    let mask = "mask=email,phone,card,%2Fid-%5Cd%2F";
    let shape = |text: &str| -> Vec<String> {
        fn types(value: &Value) -> String {
            match value {
                Value::Object(fields) => fields.iter().map(|(name, it)| format!("{name}:{},", types(it))).collect(),
                Value::Array(items) => format!("[{}]", items.iter().map(types).collect::<Vec<_>>().join(",")),
                Value::String(_) => "s".into(),
                Value::Number(_) => "n".into(),
                other => other.to_string(),
            }
        }
        events(text).iter().map(types).collect()
    };
    let (plain, masked) = (export(&server, "").await, export(&server, mask).await);
    assert_eq!(shape(&plain), shape(&masked));
    for format in FORMATS {
        let text = export(&server, &format!("format={format}&{mask}")).await;
        proved(&text);
        for secret in ["example.org", "exa\"", "44 668", "4111 1111", "41111111", "id-7"] {
            // The first line repeats the regex, and no more.
            assert!(!text.contains(secret), "{format}: {secret} in {text}");
        }
        assert!(text.contains("[email]"), "{text}");
    }
    has(&events(&masked)[1]["data"], json!({"n": 0, "list": ["[card]", "[masked]"], "ok": true}));
    let verified = proved(&masked);
    assert_eq!((verified.proved, verified.header.mask.as_deref()), (0, Some(r"email,phone,card,/id-\d/")));
}

#[tokio::test]
async fn traces_have_a_span_for_each_run_and_call_and_datasets_a_line_for_each_thread() {
    let server = Server::start(LogKind::embedded());
    conversations(&server).await;
    let traces = export(&server, "format=otel").await;
    let mut spans = BTreeMap::new();
    for line in traces.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        for resource in line["resourceSpans"].as_array().unwrap() {
            let span = &resource["scopeSpans"][0]["spans"][0];
            let name = format!("{} {}", span["name"].as_str().unwrap(), spans.len());
            spans.insert(name, span.clone());
        }
    }
    let names: Vec<&str> = spans.keys().map(String::as_str).collect();
    let expected =
        ["execute_tool forecast 0", "execute_tool forecast 1", "invoke_agent helper 2", "invoke_agent scout 3"];
    assert_eq!(names, expected, "a run that is open has no end");
    let attribute = |span: &Value, key: &str| {
        let found = span["attributes"].as_array().unwrap().iter().find(|it| it["key"] == key).cloned();
        found.map(|it| it["value"].as_object().unwrap().values().next().unwrap().clone()).unwrap_or_default()
    };
    let run = &spans["invoke_agent scout 3"];
    for span in spans.values() {
        assert_eq!((span["traceId"].as_str().unwrap().len(), span["spanId"].as_str().unwrap().len()), (32, 16));
        assert_eq!(span["traceId"], run["traceId"], "one trace");
        assert_eq!(attribute(span, "gen_ai.conversation.id"), "t2");
        let nanos = |name: &str| span[name].as_str().unwrap().parse::<u64>().unwrap();
        assert!(nanos("startTimeUnixNano") <= nanos("endTimeUnixNano"));
        assert_eq!(span["parentSpanId"].is_null(), span == run);
    }
    assert!(names[..3].iter().all(|name| spans[*name]["parentSpanId"] == run["spanId"]));
    assert_eq!(attribute(run, "gen_ai.operation.name"), "invoke_agent");
    assert_eq!(attribute(run, "gen_ai.usage.input_tokens"), "12");
    let failed = &spans["execute_tool forecast 0"];
    assert_eq!((attribute(failed, "gen_ai.tool.call.id"), &failed["status"]["code"]), (json!("c2"), &json!(2)));
    let called = &spans["execute_tool forecast 1"];
    assert_eq!(attribute(called, "gen_ai.tool.call.arguments"), r#"{"city":"Bern"}"#);
    assert_eq!(spans["invoke_agent helper 2"]["status"]["message"], "of it");

    let chat = export(&server, "format=chat").await;
    let lines: Vec<Value> = chat.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lines: Vec<&Value> = lines.iter().filter(|line| line["weft"].is_null()).collect();
    assert_eq!(lines.iter().map(|line| line["thread"].as_str().unwrap()).collect::<Vec<_>>(), ["t1", "t2"]);
    for line in &lines {
        let path = format!("/v1/threads/{}/context", line["thread"].as_str().unwrap());
        let (_, context) = server.http_with("GET", &path, &analyst(), None, &[]).await;
        assert_eq!(line["messages"], context);
    }
    assert_eq!(lines[1]["tools"], json!([{"type": "function", "function": {"name": "forecast"}}]));
    has(&lines[1]["outcome"], json!({"run": "r1", "state": "completed"}));
}

#[tokio::test]
async fn what_is_wrong_with_a_request_for_an_export_is_named() {
    let server = Server::start(LogKind::embedded());
    conversations(&server).await;
    for scope in ["", AGENT] {
        let (status, text) = ask(&server, "", &token("ada", scope)).await;
        assert_eq!(status, 403, "{text}");
    }
    assert_eq!(ask(&server, "", &token("root", "admin")).await.0, 200);
    for (query, field) in [
        ("format=xml", "format"),
        ("format=parquet", "format"),
        ("since=yesterday", "since"),
        ("until=1", "until"),
        ("mask=mail", "mask"),
        ("mask=%2F(%2F", "mask"),
        ("thread=a%20b", "thread"),
        ("format=otel&kinds=x.a", "kinds"),
        ("format=chat&from=ada", "from"),
        ("positions=a", "positions"),
        ("cursor=x", "cursor"),
        (&format!("cursor=x.{}", "0".repeat(64)), "positions"),
        ("q=x", "q"),
    ] {
        refused(&refusal(&server, query).await, "bad_request", field);
    }
    assert!(refusal(&server, "format=parquet").await["detail"].as_str().unwrap().contains("not built into"));
    refused_with(&refusal(&server, "thread=none").await, "not_found");
    refused(&refusal(&server, "epoch=other").await, "cursor_invalid", "epoch");
    refused(&refusal(&server, "positions=1").await, "cursor_invalid", "positions");
    let text = export(&server, "").await;
    let positions = vec!["99999999"; proved(&text).header.positions.len()].join(",");
    refused(&refusal(&server, &format!("positions={positions}")).await, "cursor_invalid", "positions");
    let cursor = format!("{}&cursor=AAAAAAAAAAAAAAAA.{}", again(&text), "0".repeat(64));
    refused(&refusal(&server, &cursor).await, "cursor_invalid", "cursor");
    // The formats are those that the text names.
    let names: BTreeSet<&str> = Format::ALL.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, BTreeSet::from(FORMATS));
    assert_eq!(run(&server, &["verify", Path::new("/none").to_str().unwrap()]).status.code(), Some(1));
}
