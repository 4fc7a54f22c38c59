//! The webhook: what a backend is told, when it is told again, and what becomes of what it does not take.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::{Value, json};

use super::Serving;
use super::examples::python;
use super::groups::{as_admin, group};
use crate::on_both_logs;
use crate::reliability::dead_letters::{list, root_of};
use crate::reliability::letter_acts::post;
use crate::support::auth_service::{AuthService, Behaviour, Told};
use crate::support::{LogKind, Server, Socket, TENANT, eventually, has, publish, token, token_of};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PATH: &str = "/weft";

async fn backend(behaviour: Behaviour) -> AuthService {
    let backend = AuthService::start().await;
    backend.set(PATH, behaviour);
    backend
}

fn answers(status: u16) -> Behaviour {
    Behaviour::Answer(status, "{}".to_owned())
}

async fn server(log: LogKind, backend: &AuthService, more: &[&str]) -> Server {
    let url = backend.url(PATH);
    let arguments = [&["--webhook-url", &url, "--webhook-secret", SECRET, "--rate-user", "0"], more].concat();
    let server = Server::start_with(log, &arguments);
    server.ready().await;
    server
}

fn parsed(told: &Told) -> Value {
    serde_json::from_str(&told.body).unwrap()
}

/// What was told, as tenant/thread and seq; of an event that was told again only the first time.
fn first_told(backend: &AuthService) -> BTreeMap<String, Vec<u64>> {
    let mut order: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for told in backend.told().iter().map(parsed) {
        let thread = format!("{}/{}", told["tenant"].as_str().unwrap(), told["event"]["thread"].as_str().unwrap());
        let (seqs, seq) = (order.entry(thread).or_default(), told["event"]["seq"].as_u64().unwrap());
        if !seqs.contains(&seq) {
            seqs.push(seq);
        }
    }
    order
}

async fn all_told(backend: &AuthService, events: usize) {
    let told = || first_told(backend).values().map(Vec::len).sum::<usize>();
    eventually("the backend was told of all", async || told() == events).await;
}

on_both_logs!(a_backend_is_told_of_each_message_of_every_tenant_in_thread_order_and_signed, |log| async move {
    let backend = backend(answers(200)).await;
    let server = server(log, &backend, &[]).await;
    let mut eve = Socket::open(&server.url, &token_of("umbrella", "eve")).await;
    let mut ada = server.connect("ada").await;
    for n in 1..=20 {
        assert_eq!(ada.say("t", &format!("{n}")).await, 2 * n - 1);
        ada.ask(publish("t", "x.other", json!(n))).await;
        eve.say("t", "\"quoted\"").await;
    }
    all_told(&backend, 40).await;
    let odd: Vec<u64> = (1..=20).map(|n| 2 * n - 1).collect();
    let expected = [(format!("{TENANT}/t"), odd), ("umbrella/t".to_owned(), (1..=20).collect())];
    assert_eq!(first_told(&backend), BTreeMap::from(expected));

    let all = backend.told();
    let first = all.iter().find(|told| parsed(told)["tenant"] == TENANT).unwrap();
    let told = parsed(first);
    has(&told, json!({"attempt": 1}));
    has(
        &told["event"],
        json!({"thread": "t", "seq": 1, "kind": "user_message", "from": "ada", "data": {"content": "1"}}),
    );
    assert_eq!(told["event"].get("type"), None, "as pages have it");
    assert_eq!(first.header("webhook-id"), told["event"]["event"].as_str().unwrap());
    assert_eq!(first.header("content-type"), "application/json");
    let sent_at: u64 = first.header("webhook-timestamp").parse().unwrap();
    assert!(weft::clock::now_s().abs_diff(sent_at) < 300, "{sent_at}");
    assert!(first.header("webhook-signature").starts_with("v1,"), "{}", first.head);
    let ids: BTreeSet<String> = all.iter().map(|told| told.header("webhook-id")).collect();
    assert_eq!(ids.len(), 40);

    eventually("all is settled", async || {
        let shown = group(&server, "webhook").await;
        shown["depth"] == 0 && shown["in_flight"] == 0
    })
    .await;
    assert_eq!(all.len(), 40, "nothing failed, so nothing was told twice");
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kinds_are_chosen_and_what_was_there_before_is_told_from_the_beginning() {
    let backend = backend(answers(204)).await;
    let mut server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        ada.ask(publish("t", "x.order", json!(n))).await;
        ada.say("t", "hello").await;
    }
    server.stop().await;
    let url = backend.url(PATH);
    let arguments = ["--webhook-url", &url, "--webhook-secret", SECRET, "--webhook-kinds", "x.order,member_added"];
    server.up_with(&arguments);
    all_told(&backend, 3).await;
    assert_eq!(first_told(&backend)[&format!("{TENANT}/t")], [1, 3, 5]);

    // Other kinds next time, and an operator's settings stay.
    let settings = json!({"kinds": ["x.order"], "attempts": 3, "backoff": {"min_ms": 1, "max_ms": 2}});
    assert_eq!(as_admin(&server, "PUT", "/v1/groups/webhook", Some(settings)).await.0, 200);
    server.stop().await;
    server.up_with(&["--webhook-url", &url, "--webhook-secret", SECRET]);
    eventually("the group has the kinds", async || group(&server, "webhook").await["kinds"] == json!(["user_message"]))
        .await;
    assert_eq!(group(&server, "webhook").await["attempts"], 3);
    server.connect("ada").await.say("t", "hello").await;
    eventually("it is told", async || first_told(&backend)[&format!("{TENANT}/t")].contains(&7)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_backend_does_not_take_is_tried_again_and_becomes_a_letter_that_can_be_requeued() {
    let backend = backend(answers(422)).await;
    let server = server(LogKind::embedded(), &backend, &[]).await;
    let settings =
        json!({"kinds": ["user_message"], "from": "start", "attempts": 3, "backoff": {"min_ms": 1, "max_ms": 2}});
    assert_eq!(as_admin(&server, "PUT", "/v1/groups/webhook", Some(settings)).await.0, 201);
    let mut ada = server.connect("ada").await;
    ada.say("t", "one").await;
    ada.say("t", "two").await;
    let root = root_of(TENANT);
    eventually("both are given up", async || list(&server, &root, "?reason=webhook").await.len() == 2).await;
    let attempts: Vec<(u64, u64)> = backend
        .told()
        .iter()
        .map(parsed)
        .map(|told| (told["event"]["seq"].as_u64().unwrap(), told["attempt"].as_u64().unwrap()))
        .collect();
    assert_eq!(attempts, [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)], "a thread waits for its first");
    let letters = list(&server, &root, "?reason=webhook").await;
    let letter = letters.iter().find(|letter| letter["seq"] == 1).unwrap();
    assert_eq!(letter["error"], "it answered with status 422", "{letter}");

    backend.set(PATH, answers(410));
    ada.say("t", "three").await;
    eventually("it is given up at once", async || list(&server, &root, "?reason=webhook").await.len() == 3).await;
    assert_eq!(backend.told().len(), 7, "410 says that it never wants it");

    backend.set(PATH, answers(200));
    let (status, requeued) = post(&server, &root, "/requeue", json!({"filter": {"reason": "webhook"}})).await;
    assert_eq!(status, 200, "{requeued}");
    eventually("all are told at last", async || {
        let last = backend.told().iter().skip(7).map(|told| parsed(told)["event"]["seq"].clone()).collect::<Vec<_>>();
        last == [json!(1), json!(2), json!(3)]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_backend_loses_nothing_and_the_server_stays_ready() {
    let mut backend = backend(answers(200)).await;
    let server = server(LogKind::embedded(), &backend, &[]).await;
    backend.gone().await;
    let mut ada = server.connect("ada").await;
    for n in 1..=10 {
        for thread in ["a", "b", "c", "d", "e", "f"] {
            assert_eq!(ada.say(thread, "hello").await, n);
        }
    }
    eventually("the breaker is open", async || {
        let (status, ready) = server.http("GET", "/readyz", "x", None).await;
        assert_eq!(status, 200, "{ready}");
        let webhook = &ready["dependencies"][0];
        assert_eq!(webhook["name"], "webhook");
        webhook["breaker"] == "open" && webhook["ok"] == false
    })
    .await;
    backend.back().await;
    all_told(&backend, 60).await;
    for (thread, seqs) in first_told(&backend) {
        assert_eq!(seqs, (1..=10).collect::<Vec<u64>>(), "{thread}");
    }
    assert_eq!(list(&server, &root_of(TENANT), "").await, [Value::Null; 0], "no event ran out of attempts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_tells_all_the_same_and_one_that_stops_finishes_its_calls() {
    let backend = backend(answers(200)).await;
    let mut server = server(LogKind::embedded(), &backend, &[]).await;
    let mut ada = server.connect("ada").await;
    for round in 1..=3 {
        for n in 1..=50 {
            ada.say(&format!("t{}", n % 7), "hello").await;
        }
        if round < 3 {
            server.kill();
            server.up();
            ada = server.connect("ada").await;
        }
    }
    all_told(&backend, 150).await;
    for (thread, seqs) in first_told(&backend) {
        assert!(seqs.is_sorted(), "{thread}: {seqs:?}");
    }

    let before = backend.told().len();
    for n in 0..50 {
        ada.say(&format!("last{n}"), "hello").await;
    }
    server.stop().await;
    let told = backend.told()[before..].iter().map(|told| told.header("webhook-id")).collect::<Vec<_>>();
    server.up();
    all_told(&backend, 200).await;
    let again =
        backend.told()[before + told.len()..].iter().filter(|it| told.contains(&it.header("webhook-id"))).count();
    assert_eq!(again, 0, "what was told before the end was settled before it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_tell_of_each_event_once() {
    let backend = backend(answers(200)).await;
    let log = LogKind::kafka();
    let (first, second) =
        (server(log.clone(), &backend, &["--node", "one"]).await, server(log, &backend, &["--node", "two"]).await);
    let (mut ada, mut ben) = (first.connect("ada").await, second.connect("ben").await);
    for n in 0..40 {
        ada.say(&format!("a{}", n % 9), "hello").await;
        ben.say(&format!("b{}", n % 9), "hello").await;
    }
    all_told(&backend, 80).await;
    eventually("all is settled", async || group(&first, "webhook").await["depth"] == 0).await;
    assert_eq!(backend.told().len(), 80);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_checks_who_calls_and_does_its_part_once() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/webhook-backend/backend.py");
    let mut server = Server::stopped(LogKind::embedded());
    let start = |url: &str, port: &str| {
        let mut command = Command::new(python("webhook-backend"));
        command.arg(&path).args(["--url", url, "--port", port]);
        command.env("WEFT_WEBHOOK_SECRET", SECRET).env("WEFT_TOKEN", token("clerk", "publish agent"));
        Serving::start(&mut command)
    };
    // Its port is known before the server's.
    let example = start("http://127.0.0.1:9", "0");
    let port = example.line("listens on")[2].clone();
    drop(example);
    let url = format!("http://127.0.0.1:{port}/weft");
    server.up_with(&["--webhook-url", &url, "--webhook-secret", SECRET]);
    server.ready().await;
    let example = start(&server.url, &port);
    example.line("listens on");

    let members = json!({"members": ["clerk"]});
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(members)).await.0, 201);
    let mut ada = server.connect("ada").await;
    ada.subscribe("t", None).await;
    let asked = ada.say("t", "three little words").await;
    let counted = loop {
        let event = ada.recv_type("event").await;
        if event["kind"] == "x.words" {
            break event;
        }
    };
    has(&counted, json!({"from": "clerk", "parent": asked, "data": {"words": 3}}));

    let client = reqwest::Client::new();
    let forged =
        client.post(&url).header("webhook-id", "a").header("webhook-timestamp", weft::clock::now_s().to_string());
    let forged = forged.header("webhook-signature", "v1,AAAA").body("{}").send().await.unwrap();
    assert_eq!(forged.status(), 401);
    drop(example);
}
