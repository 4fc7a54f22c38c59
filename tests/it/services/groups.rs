//! Work queues over HTTP, and on the command line: groups, leases for who has no connection, and `weft work`.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use weft::clock;

use super::{Serving, run};
use crate::on_both_logs;
use crate::reliability::dead_letters::{list, root_of};
use crate::reliability::letter_acts::post;
use crate::support::{LogKind, Server, TENANT, accepted, eventually, has, publish, refused, refused_with, token, weft};

const AGENT: &str = "publish subscribe agent";

pub(super) async fn as_admin(server: &Server, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    server.http_with(method, path, &token("root", "admin"), body, &[]).await
}

async fn as_worker(server: &Server, path: &str, body: Value) -> (u16, Value) {
    server.http_with("POST", path, &token("wim", AGENT), Some(body), &[]).await
}

pub(super) async fn make(server: &Server, group: &str, settings: Value) {
    let (status, made) = as_admin(server, "PUT", &format!("/v1/groups/{group}"), Some(settings)).await;
    assert_eq!(status, 201, "{made}");
}

pub(super) async fn group(server: &Server, group: &str) -> Value {
    as_admin(server, "GET", &format!("/v1/groups/{group}"), None).await.1
}

async fn has_workers(server: &Server, name: &str, workers: usize) {
    eventually("the group has so many workers", async || group(server, name).await["workers"] == workers).await;
}

/// What one request leases.
pub(super) async fn lease(server: &Server, group: &str, body: Value) -> Vec<Value> {
    let (status, leased) = as_worker(server, &format!("/v1/groups/{group}/lease"), body).await;
    assert_eq!(status, 200, "{leased}");
    leased["work"].as_array().unwrap().clone()
}

/// The one piece of work that a request waits for.
pub(super) async fn lease_one(server: &Server, group: &str) -> Value {
    let leased = lease(server, group, json!({"wait_ms": 30_000})).await;
    assert_eq!(leased.len(), 1, "{leased:?}");
    leased[0].clone()
}

pub(super) async fn settle(server: &Server, work: &Value, outcome: &str) -> (u16, Value) {
    let path = format!("/v1/groups/{}/settle", work["group"].as_str().unwrap());
    as_worker(server, &path, json!({"delivery": work["delivery"], "outcome": outcome})).await
}

on_both_logs!(a_group_is_made_changed_listed_paused_and_deleted, |log| async move {
    let server = Server::start(log);
    let (status, made) = as_admin(&server, "PUT", "/v1/groups/g", None).await;
    assert_eq!(status, 201, "{made}");
    has(&made, json!({"group": "g", "kinds": ["user_message"], "from": "now", "lease_ms": 30_000, "attempts": 5}));
    has(&made, json!({"backoff": {"min_ms": 1_000, "max_ms": 60_000}, "paused": false}));
    has(&made, json!({"boost": {"high_ms": 60_000, "low_ms": -60_000}}));

    let settings = json!({
        "kinds": ["x.job"], "attempts": 2, "backoff": {"min_ms": 1, "max_ms": 2}, "lease_ms": 1_000,
        "boost": {"high_ms": 5, "low_ms": 0},
    });
    let (status, changed) = as_admin(&server, "PUT", "/v1/groups/g", Some(settings.clone())).await;
    assert_eq!(status, 200, "{changed}");
    has(&changed, settings.clone());
    has(&changed, json!({"created_at": made["created_at"]}));
    let shown = group(&server, "g").await;
    has(&shown, settings);
    has(&shown, json!({"depth": 0, "oldest_ms": null, "in_flight": 0, "workers": 0}));

    for (act, paused) in [("pause", true), ("pause", true), ("resume", false)] {
        let (status, answer) = as_admin(&server, "POST", &format!("/v1/groups/g/{act}"), None).await;
        assert_eq!((status, &answer["paused"]), (200, &json!(paused)), "{answer}");
        assert_eq!(group(&server, "g").await["paused"], paused);
    }

    make(&server, "a", json!({"from": "start"})).await;
    let (_, page) = as_admin(&server, "GET", "/v1/groups?limit=1", None).await;
    has(&page["groups"][0], json!({"group": "a", "from": "start"}));
    let next = format!("/v1/groups?limit=1&cursor={}", page["next"].as_str().unwrap());
    let (_, page) = as_admin(&server, "GET", &next, None).await;
    has(&page["groups"][0], json!({"group": "g"}));
    assert!(page["next"].is_null() && page["groups"].as_array().unwrap().len() == 1, "{page}");

    let (status, deleted) = as_admin(&server, "DELETE", "/v1/groups/g", None).await;
    assert_eq!((status, &deleted["deleted"]), (200, &json!(true)));
    refused(&group(&server, "g").await, "not_found", "group");
    for (method, path) in [("DELETE", "/v1/groups/g"), ("POST", "/v1/groups/g/pause")] {
        refused(&as_admin(&server, method, path, None).await.1, "not_found", "group");
    }
    refused(&as_worker(&server, "/v1/groups/g/lease", json!({})).await.1, "not_found", "group");
});

#[tokio::test]
async fn what_is_wrong_with_a_request_about_a_group_is_said_by_its_field() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    for (body, field) in [
        (json!({"kinds": []}), "kinds"),
        (json!({"kinds": [1]}), "kinds[0]"),
        (json!({"from": "end"}), "from"),
        (json!({"lease_ms": 999}), "lease_ms"),
        (json!({"attempts": 21}), "attempts"),
        (json!({"backoff": {"min_ms": 2, "max_ms": 1}}), "backoff"),
        (json!({"boost": {"high_ms": -1, "low_ms": 0}}), "boost"),
        (json!({"boost": {"high_ms": 0, "low_ms": 1}}), "boost"),
        (json!({"boost": {"high_ms": 86_400_001, "low_ms": 0}}), "boost"),
        (json!({"boost": {"high_ms": 1}}), "low_ms"),
        (json!({"order": "some"}), "order"),
        (json!({"limit": 0}), "limit"),
        (json!({"overflow": "drop"}), "overflow"),
    ] {
        refused(&as_admin(&server, "PUT", "/v1/groups/h", Some(body)).await.1, "bad_request", field);
    }
    refused(&as_admin(&server, "PUT", "/v1/groups/no%20group", None).await.1, "bad_request", "group");
    refused(&as_admin(&server, "PUT", "/v1/groups/h?x=1", None).await.1, "bad_request", "x");
    refused(&group(&server, "h").await, "not_found", "group");

    for (body, field) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 101}), "n"),
        (json!({"wait_ms": 30_001}), "wait_ms"),
        (json!({"wait_ms": -1}), "wait_ms"),
        (json!({"lease_ms": 3_600_001}), "lease_ms"),
        (json!({"kinds": []}), "kinds"),
        (json!({"credit": 1}), "credit"),
    ] {
        refused(&as_worker(&server, "/v1/groups/g/lease", body).await.1, "bad_request", field);
    }
    for (body, field) in [
        (json!({}), "delivery"),
        (json!({"delivery": "none", "outcome": "done"}), "delivery"),
        (json!({"delivery": "none"}), "outcome"),
        (json!({"delivery": "none", "outcome": "expired"}), "outcome"),
        (json!({"settlements": []}), "settlements"),
        (json!({"settlements": [{"delivery": "none", "outcome": "done"}], "reason": "r"}), "reason"),
    ] {
        refused(&as_worker(&server, "/v1/groups/g/settle", body).await.1, "bad_request", field);
    }

    let as_user = async |path: &str| server.http("POST", path, "ada", Some(json!({}))).await.1;
    refused_with(&as_user("/v1/groups/g/lease").await, "forbidden");
    refused_with(&as_user("/v1/groups/g/settle").await, "forbidden");
    refused_with(&as_worker(&server, "/v1/groups/g/pause", json!({})).await.1, "forbidden");
}

on_both_logs!(a_lease_that_waits_gets_the_work_when_it_is_published_and_is_settled_once, |log| async move {
    let server = Server::start(log);
    make(&server, "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    let published = async {
        has_workers(&server, "g", 1).await;
        ada.say("t", "do it").await
    };
    let (work, seq) = tokio::join!(lease_one(&server, "g"), published);
    has(&work, json!({"group": "g", "attempt": 1, "lease_ms": 30_000}));
    has(&work["event"], json!({"thread": "t", "seq": seq, "kind": "user_message", "from": "ada", "type": null}));
    has(&group(&server, "g").await, json!({"depth": 1, "in_flight": 1, "workers": 0}));
    assert!(group(&server, "g").await["oldest_ms"].is_u64());

    let (status, extended) = settle(&server, &work, "extend").await;
    assert_eq!(status, 200, "{extended}");
    let (status, settled) = settle(&server, &work, "done").await;
    assert_eq!((status, settled), (200, json!({"delivery": work["delivery"], "outcome": "done"})));
    for outcome in ["done", "retry", "extend"] {
        let (status, again) = settle(&server, &work, outcome).await;
        assert_eq!(status, 409, "{again}");
        refused(&again, "conflict", "delivery");
    }
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0, "oldest_ms": null}));
    make(&server, "other", json!({})).await;
    let elsewhere = json!({"delivery": work["delivery"], "outcome": "done"});
    refused(&as_worker(&server, "/v1/groups/other/settle", elsewhere).await.1, "bad_request", "delivery");
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
});

#[tokio::test]
async fn several_are_leased_and_settled_at_once_each_with_its_own_outcome() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({"kinds": ["x.job", "x.other"], "backoff": {"min_ms": 1, "max_ms": 1}})).await;
    let mut ada = server.connect("ada").await;
    for thread in ["a", "b", "c"] {
        accepted(&ada.ask(publish(thread, "x.job", json!(thread))).await);
    }
    accepted(&ada.ask(publish("d", "x.other", json!({}))).await);

    let mut work = Vec::new();
    while work.len() < 3 {
        let wanted = json!({"n": 10, "wait_ms": 30_000, "kinds": ["x.job"], "lease_ms": 60_000});
        work.extend(lease(&server, "g", wanted).await);
    }
    work.sort_by_key(|it| it["event"]["thread"].to_string());
    assert_eq!(work.iter().map(|it| &it["event"]["data"]).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(work.iter().all(|it| it["lease_ms"] == 60_000), "{work:?}");

    let [a, b, c] = [0, 1, 2].map(|n| work[n]["delivery"].clone());
    let settlements = json!([
        {"delivery": a, "outcome": "done"},
        {"delivery": b, "outcome": "retry", "reason": "not now"},
        {"delivery": c, "outcome": "reject", "reason": "no such job"},
        {"delivery": "none", "outcome": "done"},
    ]);
    let (status, settled) = as_worker(&server, "/v1/groups/g/settle", json!({"settlements": settlements})).await;
    assert_eq!(status, 200, "{settled}");
    let items = settled["items"].as_array().unwrap();
    assert_eq!(items.len(), 4);
    for (item, outcome) in items.iter().zip(["done", "retry", "reject", "done"]) {
        has(item, json!({"outcome": outcome}));
    }
    assert!(items[..3].iter().all(|item| item["code"].is_null()), "{settled}");
    has(&items[3], json!({"code": "bad_request", "delivery": "none"}));

    let again = lease(&server, "g", json!({"wait_ms": 30_000, "kinds": ["x.job"]})).await;
    has(&again[0], json!({"attempt": 2}));
    has(&again[0]["event"], json!({"thread": "b"}));
    let (_, letters) = server.admin("GET", "/v1/dead-letters").await;
    has(&letters["items"][0], json!({"reason": "rejected", "thread": "c", "error": "no such job", "name": "g"}));
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_is_no_worker_and_gets_nothing() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    let address = server.url.trim_start_matches("http://");
    let mut client = TcpStream::connect(address).await.unwrap();
    let (token, body) = (token("eve", AGENT), r#"{"wait_ms":30000}"#);
    let head = format!("POST /v1/groups/g/lease HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n");
    client.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    has_workers(&server, "g", 1).await;
    drop(client);
    has_workers(&server, "g", 0).await;

    server.connect("ada").await.say("t", "do it").await;
    has(&lease_one(&server, "g").await, json!({"attempt": 1}));
}

#[tokio::test]
async fn a_group_that_is_paused_gives_nothing_to_who_waits_until_it_is_resumed() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    assert_eq!(as_admin(&server, "POST", "/v1/groups/g/pause", None).await.0, 200);
    server.connect("ada").await.say("t", "do it").await;
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
    has(&group(&server, "g").await, json!({"depth": 1, "in_flight": 0, "paused": true}));

    let resumed = async {
        has_workers(&server, "g", 1).await;
        as_admin(&server, "POST", "/v1/groups/g/resume", None).await
    };
    let (work, resumed) = tokio::join!(lease_one(&server, "g"), resumed);
    assert_eq!(resumed.1["paused"], false);
    has(&work["event"], json!({"thread": "t", "seq": 1}));
}

#[tokio::test]
async fn letters_of_work_are_listed_counted_and_requeued_by_their_group() {
    let server = Server::start(LogKind::embedded());
    let root = root_of(TENANT);
    make(&server, "g", json!({})).await;
    make(&server, "h", json!({"kinds": ["x.job"]})).await;
    let mut ada = server.connect("ada").await;
    for thread in ["t", "u"] {
        ada.say(thread, "do it").await;
    }
    accepted(&ada.ask(publish("v", "x.job", json!({}))).await);
    for group in ["g", "g", "h"] {
        let work = lease_one(&server, group).await;
        assert_eq!(settle(&server, &work, "reject").await.0, 200);
    }

    assert_eq!(list(&server, &root, "").await.len(), 3);
    let of_h = list(&server, &root, "?group=h").await;
    assert_eq!(of_h.len(), 1, "{of_h:?}");
    has(&of_h[0], json!({"name": "h", "reason": "rejected", "thread": "v"}));
    assert_eq!(list(&server, &root, "?group=g").await.len(), 2);
    assert_eq!(list(&server, &root, "?group=none").await, Vec::<Value>::new());
    let counts = async |query: &str| as_admin(&server, "GET", &format!("/v1/dead-letters/counts{query}"), None).await.1;
    assert_eq!(counts("").await["total"], 3);
    let of_g = counts("?group=g").await;
    has(&of_g, json!({"total": 2, "reasons": [{"reason": "rejected", "count": 2}]}));
    has(&of_g["fingerprints"][0], json!({"kind": "user_message", "count": 2}));
    assert!(of_g["fingerprints"][0]["oldest"].is_string() && of_g["fingerprints"][1].is_null(), "{of_g}");
    has(&counts("?group=none").await, json!({"total": 0, "fingerprints": []}));

    let (_, said) = post(&server, &root, "/requeue", json!({"filter": {"group": "g"}})).await;
    has(&said, json!({"done": 2, "refused": 0}));
    has(&counts("?group=g").await, json!({"total": 0}));
    assert_eq!(list(&server, &root, "").await, of_h);
    let flags = ["--url", &server.url, "--token", &root];
    let (_, printed, _) = run(&[&["dead-letters", "counts", "--group", "h", "--json"], &flags[..]].concat());
    has(&serde_json::from_str::<Value>(&printed).unwrap(), json!({"total": 1}));
    let (_, printed, _) = run(&[&["dead-letters", "--group", "g"], &flags[..]].concat());
    assert_eq!(printed.trim(), "no dead letters");
}

/// `weft work` as a user.
fn worker(server: &Server, user: &str, arguments: &[&str]) -> Command {
    let mut command = weft();
    command.args(["work", "g", "--url", &server.url, "--token", &token(user, AGENT)]).args(arguments);
    command
}

async fn events(server: &Server, thread: &str) -> Vec<Value> {
    let (_, page) = server.http("GET", &format!("/v1/threads/{thread}/events"), "ada", None).await;
    page["events"].as_array().unwrap().clone()
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_shell_works_on_an_event_and_its_output_is_the_answer() {
    let server = Server::start(LogKind::embedded());
    let script = r#"sed -n 's/.*"content":"\([^"]*\)".*/You said \1/p'; echo "in $WEFT_GROUP of $WEFT_THREAD""#;
    let working = Serving::start(&mut worker(&server, "wim", &["--exec", script]));
    has_workers(&server, "g", 1).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "hello").await;
    ada.subscribe("t", Some(0)).await;
    let answer = ada.events(2).await[1].clone();
    has(&answer, json!({"kind": "agent_message", "from": "wim", "seq": 2, "parent": 1, "key": "work:g/t/1"}));
    assert_eq!(answer["data"], json!({"content": "You said hello\nin g of t"}));
    let line = working.line("t #1").join(" ");
    assert!(line.starts_with("t #1 done in ") && line.ends_with("answered by #2"), "{line}");
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0}));
    let (code, said) = working.stop();
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_fails_is_tried_again_and_then_a_dead_letter_says_its_last_words() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({"attempts": 2, "backoff": {"min_ms": 1, "max_ms": 1}})).await;
    let script = r#"grep -q bad && { echo no such order >&2; exit 65; }
        echo never seen; echo "failure $WEFT_ATTEMPT" >&2; exit 75"#;
    let working = Serving::start(&mut worker(&server, "wim", &["--exec", script]));
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    ada.say("t", "bad").await;
    assert_eq!(working.line("t #1").join(" "), "t #1 failed failure 1");
    assert_eq!(working.line("t #1").join(" "), "t #1 attempt 2 failed failure 2");
    assert_eq!(working.line("t #2").join(" "), "t #2 rejected no such order");

    let (_, letters) = server.admin("GET", "/v1/dead-letters").await;
    let letters = letters["items"].as_array().unwrap();
    assert_eq!(letters.len(), 2, "{letters:?}");
    has(&letters[0], json!({"reason": "rejected", "seq": 2, "attempts": 1, "error": "no such order"}));
    has(&letters[1], json!({"reason": "attempts", "seq": 1, "attempts": 2, "error": "failure 2", "user": "wim"}));
    assert_eq!(letters[1]["tries"][0]["reason"], "failure 1");
    assert_eq!(events(&server, "t").await.len(), 2, "what fails does not answer");
    assert_eq!(working.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_worker_held_goes_to_another() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    let script = "test $WEFT_ATTEMPT != 1 || kill -9 $PPID; echo attempt $WEFT_ATTEMPT";
    let mut killed = worker(&server, "wim", &["--exec", script]).spawn().unwrap();
    server.connect("ada").await.say("t", "do it").await;
    assert_eq!(killed.wait().unwrap().code(), None, "it was killed");
    let working = Serving::start(&mut worker(&server, "eve", &["--exec", script]));
    assert!(working.line("t #1").join(" ").starts_with("t #1 attempt 2 done"));
    let events = events(&server, "t").await;
    assert_eq!(events.len(), 2, "{events:?}");
    has(&events[1], json!({"from": "eve", "data": {"content": "attempt 2"}}));
    assert_eq!(working.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_had_that_was_stopped_past_its_lease_is_done_once_by_another() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({"lease_ms": 1_000})).await;
    let (_folder, pipe) = pipe();
    let script = format!("cat {pipe}");
    let mut stopped = worker(&server, "wim", &["--exec", &script]);
    let mut stopped = stopped.stdout(Stdio::piped()).spawn().unwrap();
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    // Somebody reads: the command has begun.
    let mut answer = OpenOptions::new().write(true).open(&pipe).unwrap();
    signal(stopped.id(), "STOP");
    let other = Serving::start(&mut worker(&server, "eve", &["--exec", "echo attempt $WEFT_ATTEMPT"]));
    // It may have been given to the one that is stopped once more.
    let line = other.line("t #1");
    assert!(line[2] == "attempt" && line[4] == "done", "{line:?}");

    // The command, which was not stopped, is through; its worker hears of that once it goes on.
    answer.write_all(b"too late").unwrap();
    drop(answer);
    signal(stopped.id(), "CONT");
    let mut lines = BufReader::new(stopped.stdout.take().unwrap()).lines().map(Result::unwrap);
    let lost = lines.next().unwrap();
    assert!(lost.starts_with("t #1 lost"), "{lost}");
    signal(stopped.id(), "INT");
    assert_eq!(stopped.wait().unwrap().code(), Some(0));
    let events = events(&server, "t").await;
    assert_eq!(events.len(), 2, "{events:?}");
    has(&events[1], json!({"from": "eve", "data": {"content": format!("attempt {}", line[3])}}));
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0}));
    assert_eq!(other.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_attempt_does_not_answer_a_second_time() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    server.connect("ada").await.say("t", "do it").await;
    // As a worker would have that got no further.
    let mut wim = server.connect_as("wim", AGENT).await;
    let mut answer = publish("t", "agent_message", json!({"content": "the first answer"}));
    answer["key"] = json!("work:g/t/1");
    accepted(&wim.ask(answer).await);
    let working = Serving::start(&mut worker(&server, "wim", &["--exec", "echo another"]));
    assert!(working.line("t #1").join(" ").ends_with(", answered before"));
    has(&group(&server, "g").await, json!({"depth": 0}));
    assert_eq!(events(&server, "t").await.len(), 2);
    assert_eq!(working.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_takes_longer_than_a_lease_keeps_it() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    let (_folder, pipe) = pipe();
    let script = format!("cat {pipe}");
    let working = Serving::start(&mut worker(&server, "wim", &["--lease-ms", "1000", "--exec", &script]));
    server.connect("ada").await.say("t", "do it").await;
    let mut command = OpenOptions::new().write(true).open(&pipe).unwrap();
    let began = clock::now_ms();
    eventually("a lease and a half have passed", async || clock::now_ms() - began > 1_500).await;
    command.write_all(b"at last").unwrap();
    drop(command);
    let line = working.line("t #1").join(" ");
    assert!(line.starts_with("t #1 done in ") && line.ends_with("answered by #2"), "{line}");
    assert_eq!(working.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_stopped_finishes_what_it_has_begun_and_takes_no_more() {
    let server = Server::start(LogKind::embedded());
    make(&server, "g", json!({})).await;
    let (_folder, pipe) = pipe();
    let script = format!("cat {pipe}");
    let mut command = worker(&server, "wim", &["--exec", &script]);
    let mut working = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    ada.say("u", "and this").await;
    // Somebody reads: the command has begun.
    let mut answer = OpenOptions::new().write(true).open(&pipe).unwrap();
    signal(working.id(), "INT");
    let mut said = BufReader::new(working.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.any(|line| line.starts_with("weft work: finishes 1")));
    answer.write_all(b"finished").unwrap();
    drop(answer);

    assert_eq!(working.wait().unwrap().code(), Some(0));
    let mut lines = String::new();
    working.stdout.take().unwrap().read_to_string(&mut lines).unwrap();
    assert!(lines.lines().count() == 1 && lines.starts_with("t #1 done in "), "{lines}");
    has(&events(&server, "t").await[1], json!({"data": {"content": "finished"}}));
    has(&lease_one(&server, "g").await, json!({"attempt": 1}));
}

/// A named pipe, and the folder that it is in.
fn pipe() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe").to_str().unwrap().to_owned();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    (folder, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_sets_lists_shows_pauses_and_deletes_groups() {
    let server = Server::start(LogKind::embedded());
    let root = token("root", "admin");
    let groups = |words: &str| {
        let words: Vec<&str> = words.split_whitespace().collect();
        run(&[&["groups"], &words[..], &["--url", &server.url, "--token", &root]].concat())
    };
    assert_eq!(groups("").1.trim(), "no groups");
    let (code, set, said) = groups("set jobs --kinds x.job,x.other --attempts 2 --backoff-min-ms 5");
    assert_eq!(code, 0, "{said}");
    for wanted in ["kinds      x.job x.other", "attempts   2", "backoff    5 to 60000 ms", "from       now"] {
        assert!(set.contains(wanted), "{wanted} in {set}");
    }
    groups("set jobs --lease-ms 5000");
    let (_, shown, _) = groups("show jobs --json");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    has(&shown, json!({"kinds": ["x.job", "x.other"], "attempts": 2, "lease_ms": 5_000, "depth": 0}));

    accepted(&server.connect("ada").await.ask(publish("t", "x.job", json!({}))).await);
    assert!(groups("pause jobs").1.starts_with("jobs (paused)"));
    let (_, listed, _) = groups("");
    let rows: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((rows.len(), rows[1][0], rows[1][1], rows[1].last()), (2, "jobs", "1", Some(&"paused")), "{listed}");
    assert!(listed.lines().all(|line| line.len() <= 80), "{listed}");
    groups("resume jobs");
    assert_eq!(groups("pause jobs --thread t").1.trim(), "thread t of jobs is paused");
    assert!(groups("show jobs").1.contains("paused     t\n"));
    assert_eq!(groups("resume jobs --thread t").1.trim(), "thread t of jobs is resumed");
    let (_, set, _) = groups("set jobs --limit 1 --overflow reject --order none");
    for wanted in ["jobs (overflowing)", "limit      1 waiting, then reject", "order      none", "attempts   2"] {
        assert!(groups("show jobs").1.contains(wanted), "{wanted} in {set}");
    }
    let (_, listed, _) = groups("list --json");
    has(&serde_json::from_str::<Value>(&listed).unwrap()["groups"][0], json!({"paused": false, "depth": 1}));
    assert_eq!(groups("delete jobs").1.trim(), "jobs is deleted");

    let (code, _, said) = groups("show jobs");
    assert!(code == 1 && said.starts_with("weft: not_found: "), "{said}");
    for wrong in [
        "show",
        "list jobs",
        "show jobs --attempts 2",
        "set jobs --from end",
        "show jobs --thread t",
        "set jobs --order some",
    ] {
        assert_eq!(groups(wrong).0, 2, "{wrong}");
    }
}
