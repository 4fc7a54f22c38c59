//! Who gets what: membership, tenants, reserved threads, kinds, signals, priorities, and all of a user's threads.

mod analyst;
mod doors;
mod isolation;
mod kinds;
mod priority;
mod removal;
mod reserved;
mod signals;

use std::collections::BTreeSet;

use serde_json::json;

use crate::support::{LogKind, Server, Socket, accepted, has, publish, refused_with, seqs, token};

/// Takes frames up to a thread's `caught_up`, which must be the next but for those of other threads, and gives its seq.
async fn caught_up(socket: &mut Socket, thread: &str) -> u64 {
    let frame = socket.recv_type("caught_up").await;
    assert_eq!(frame["thread"], thread, "{frame}");
    frame["seq"].as_u64().unwrap()
}

#[tokio::test]
async fn a_removed_member_gets_nothing_more_and_is_told() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    ben.subscribe("t", None).await;
    ben.recv_type("caught_up").await;
    ada.subscribe("t", None).await;
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    assert_eq!(ada.say("t", "without ben").await, 3);
    assert_eq!(seqs(&ada.events(2).await), [2, 3]);
    let got = ben.recv().await;
    has(&got, json!({"type": "error", "thread": "t", "code": "not_found"}));
    ben.send(&json!({"type": "ping", "id": 99})).await;
    assert_eq!(ben.recv().await["type"], "pong", "nothing of the thread came in between");
    refused_with(&ben.ask(publish("t", "user_message", json!({"content": "let me in"}))).await, "not_found");
    refused_with(&ben.ask(json!({"type": "subscribe", "thread": "t"})).await, "not_found");
}

#[tokio::test]
async fn a_star_subscription_follows_all_threads_also_those_joined_later() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("a", "1").await;
    ada.say("b", "1").await;
    ada.say("b", "2").await;
    let mut star = server.connect("ada").await;
    let answer = star.ask(json!({"type": "subscribe", "thread": "*"})).await;
    assert_eq!(answer["head"], json!({"a": 1, "b": 2}));
    assert_eq!(answer["after"], json!({"a": 1, "b": 2}));
    ada.say("c", "a thread of my own, made later").await;
    server.http("PUT", "/v1/threads/d", "ben", Some(json!({"members": ["ada"]}))).await;
    server.connect("ben").await.say("d", "from ben").await;
    ada.say("a", "2").await;
    let mut seen: Vec<(String, u64)> = Vec::new();
    for event in star.events(4).await {
        seen.push((event["thread"].as_str().unwrap().to_owned(), event["seq"].as_u64().unwrap()));
    }
    seen.sort();
    assert_eq!(seen, [("a".into(), 2), ("c".into(), 1), ("d".into(), 1), ("d".into(), 2)]);
    // A resume: after what is named, and from the start where the client has nothing.
    let mut resumed = server.connect("ada").await;
    let answer =
        resumed.ask(json!({"type": "subscribe", "thread": "*", "after": {"a": 1, "b": 2, "c": 1, "gone": 7}})).await;
    assert_eq!(answer["after"], json!({"a": 1, "b": 2, "c": 1, "d": 0}), "{answer}");
    let mut seen: Vec<(String, u64)> = Vec::new();
    let mut gone = 0;
    while seen.len() < 3 {
        let frame = resumed.recv().await;
        match frame["type"].as_str().unwrap() {
            "event" => seen.push((frame["thread"].as_str().unwrap().to_owned(), frame["seq"].as_u64().unwrap())),
            "error" => {
                has(&frame, json!({"thread": "gone", "field": "after.gone"}));
                gone += 1;
            }
            _ => {}
        }
    }
    seen.sort();
    assert_eq!((seen, gone), (vec![("a".into(), 2), ("d".into(), 1), ("d".into(), 2)], 1));
    let rejection = resumed.ask(json!({"type": "subscribe", "thread": "a"})).await;
    refused_with(&rejection, "conflict");
    assert_eq!(resumed.ask(json!({"type": "unsubscribe", "thread": "*"})).await["type"], "unsubscribed");
    refused_with(&resumed.ask(json!({"type": "unsubscribe", "thread": "a"})).await, "not_found");
}

#[tokio::test]
async fn unsubscribing_from_all_leaves_what_was_subscribed_by_name() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("a", "1").await;
    ada.say("b", "1").await;
    let mut socket = server.connect("ada").await;
    socket.subscribe("a", None).await;
    assert_eq!(socket.ask(json!({"type": "subscribe", "thread": "*"})).await["type"], "subscribed");
    assert_eq!(socket.ask(json!({"type": "unsubscribe", "thread": "*"})).await["type"], "unsubscribed");
    ada.say("b", "not for this session").await;
    ada.say("a", "for this one").await;
    assert_eq!(socket.recv_type("event").await["data"]["content"], "for this one");
}

#[tokio::test]
async fn what_a_star_subscription_to_many_threads_replays_comes_after_its_answer() {
    const THREADS: usize = 1_500;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for begin in (0..THREADS).step_by(500) {
        let first = |n| json!({"type": "publish", "id": n, "thread": format!("t{n}"), "kind": "x.a", "data": 1});
        ada.send(&(begin..begin + 500).map(first).collect()).await;
        for _ in 0..500 {
            accepted(&ada.recv().await);
        }
    }
    ada.send(&json!({"type": "subscribe", "id": 1, "thread": "*", "after": {}})).await;
    let answer = ada.recv().await;
    assert_eq!((&answer["type"], &answer["id"]), (&json!("subscribed"), &json!(1)), "{answer}");
    let mut threads: BTreeSet<String> = BTreeSet::new();
    for event in ada.events(THREADS).await {
        assert_eq!(event["seq"], 1);
        threads.insert(event["thread"].as_str().unwrap().to_owned());
    }
    assert_eq!(threads.len(), THREADS);
}

#[tokio::test]
async fn an_analyst_reads_every_thread_of_the_tenant_and_writes_none() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    let mut analyst = server.connect_as("ana", "analyst").await;
    analyst.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&analyst.events(1).await), [1]);
    refused_with(&analyst.ask(publish("t", "user_message", json!({"content": "hi"}))).await, "forbidden");
    assert_eq!(server.http_with("PUT", "/v1/threads/t/members/ana", &token("ana", "analyst"), None, &[]).await.0, 403);
}

#[tokio::test]
async fn two_who_make_the_same_thread_at_once_get_one_owner() {
    let server = Server::start(LogKind::embedded());
    for n in 0..20 {
        let thread = format!("race-{n}");
        let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
        let command = publish(&thread, "user_message", json!({"content": "first!"}));
        let (a, b) = tokio::join!(ada.ask(command.clone()), ben.ask(command));
        let mut types = [a["type"].as_str().unwrap(), b["type"].as_str().unwrap()];
        types.sort();
        assert_eq!(types, ["error", "published"], "{a} {b}");
    }
}
