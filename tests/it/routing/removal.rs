//! Membership changes, and everything that reads: on this node and on the others.

use serde_json::json;

use super::caught_up;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, eventually, has, publish, refused_with, seqs, token};

/// The error with which a subscription ends.
async fn notified(socket: &mut Socket, thread: &str) {
    loop {
        let frame = socket.recv().await;
        if frame["type"] == "error" {
            has(&frame, json!({"thread": thread, "code": "not_found"}));
            assert!(frame["message"].as_str().unwrap().contains("member"), "{frame}");
            return;
        }
        assert_eq!(frame["type"], "event", "{frame}");
        assert_ne!(frame["kind"], "member_removed", "who is removed does not get that event");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_removed_on_one_node_loses_its_subscriptions_on_every_node_and_has_them_again_when_added() {
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    assert_eq!(a.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await.0, 201);
    eventually("B knows the thread", async || b.http("GET", "/v1/threads/t", "ben", None).await.0 == 200).await;
    let mut ada = b.connect("ada").await;
    ada.subscribe("t", Some(0)).await;
    let mut readers = Vec::new();
    for (server, all) in [(&a, false), (&a, true), (&b, false), (&b, true)] {
        let mut ben = server.connect("ben").await;
        ben.subscribe("@me", None).await;
        caught_up(&mut ben, "@me").await;
        ben.subscribe(if all { "*" } else { "t" }, None).await;
        caught_up(&mut ben, "t").await;
        readers.push((ben, all));
    }
    let mut stream = EventStream::of(&b, "t", "ben", "?after=0").await;
    assert_eq!(a.connect("ada").await.say("t", "with ben").await, 2);
    for (ben, _) in &mut readers {
        assert_eq!(seqs(&ben.events(1).await), [2]);
    }

    assert_eq!(a.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    assert_eq!(a.connect("ada").await.say("t", "without ben").await, 4);
    for (ben, _) in &mut readers {
        notified(ben, "t").await;
    }
    let mut streamed = Vec::new();
    while let Some(block) = stream.next().await {
        streamed.push(block);
    }
    let last = streamed.pop().unwrap();
    assert_eq!(last.event.as_deref(), Some("error"), "{last:?}");
    refused_with(&last.json(), "not_found");
    let ids: Vec<&str> = streamed.iter().filter_map(|block| block.id.as_deref()).collect();
    assert_eq!(ids, ["1", "2"], "up to the last one with ben");
    // Once ada has it on B, B has it from the log.
    assert_eq!(seqs(&ada.events(4).await), [1, 2, 3, 4]);
    for server in [&a, &b] {
        for path in ["", "/events", "/stream", "/receipts", "/presence"] {
            assert_eq!(server.http("GET", &format!("/v1/threads/t{path}"), "ben", None).await.0, 404, "{path}");
        }
        let mut ben = server.connect("ben").await;
        refused_with(&ben.ask(json!({"type": "subscribe", "thread": "t", "after": 0})).await, "not_found");
        refused_with(&ben.ask(publish("t", "x.n", json!(1))).await, "not_found");
    }

    // Added again: who follows all threads gets it from there on, the others when they ask.
    assert_eq!(b.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    assert_eq!(b.connect("ada").await.say("t", "with ben again").await, 6);
    for (ben, all) in &mut readers {
        if *all {
            assert_eq!(seqs(&ben.events(2).await), [5, 6]);
        } else {
            eventually("this node knows", async || {
                let answer = ben.ask(json!({"type": "subscribe", "thread": "t", "after": 2})).await;
                answer["type"] == "subscribed"
            })
            .await;
            assert_eq!(seqs(&ben.events(4).await), [3, 4, 5, 6], "members read all of it");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inboxes_and_the_tenants_thread_reach_readers_on_every_node() {
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    let mut readers = Vec::new();
    for server in [&a, &b] {
        let mut ada = server.connect("ada").await;
        for thread in ["@me", "@tenant"] {
            ada.subscribe(thread, Some(0)).await;
            caught_up(&mut ada, thread).await;
        }
        readers.push(ada);
    }
    let mut bot = a.connect_as("bot", "agent broadcast").await;
    let mut other = b.connect_as("bot", "agent broadcast").await;
    for thread in ["@user:ada", "@tenant"] {
        for socket in [&mut bot, &mut other] {
            accepted(&socket.ask(publish(thread, "x.n", json!(thread))).await);
        }
    }
    let mut seen = Vec::new();
    for ada in &mut readers {
        let mut events = ada.events(4).await;
        events.sort_by_key(|event| (event["thread"].to_string(), event["seq"].as_u64()));
        assert_eq!(seqs(&events), [1, 2, 1, 2]);
        seen.push(events);
    }
    assert_eq!(seen[0], seen[1], "the same frames on both nodes");
}

#[tokio::test]
async fn who_asks_for_no_events_is_told_at_once_of_a_removal_and_gets_nothing_that_waited() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    ben.subscribe("t", None).await;
    caught_up(&mut ben, "t").await;
    ben.send(&json!({"type": "credit", "events": 1})).await;
    ben.answers().await;
    ada.say("t", "uses the credit").await;
    assert_eq!(seqs(&ben.events(1).await), [2]);
    ada.say("t", "waits").await;
    server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await;
    notified(&mut ben, "t").await;
    ben.send(&json!({"type": "credit", "events": 10})).await;
    ben.say("own", "a thread of ben's").await;
    ben.subscribe("own", Some(0)).await;
    let next = ben.recv_type("event").await;
    assert_eq!(next["thread"], "own", "{next}");
}

/// Publishes large events until the reader's socket takes no more: some of them wait in its outbox then.
async fn stall(server: &Server, writer: &mut Socket, thread: &str) -> u64 {
    let mut written = 0;
    loop {
        let answer = writer.ask(publish(thread, "x.load", json!("x".repeat(60_000)))).await;
        accepted(&answer);
        written += 1;
        let mut waits = true;
        for _ in 0..5 {
            waits &= server.metric("weft_outbox_bytes").await > 0.0;
        }
        if waits {
            return written;
        }
    }
}

#[tokio::test]
async fn a_thread_left_and_joined_again_while_the_socket_takes_nothing_is_still_among_all_my_threads() {
    let server = Server::start_unlimited(LogKind::embedded());
    for thread in ["load", "low", "left"] {
        server.http("PUT", &format!("/v1/threads/{thread}"), "ada", Some(json!({"members": ["ben"]}))).await;
    }
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    assert_eq!(ben.ask(json!({"type": "subscribe", "thread": "*"})).await["type"], "subscribed");
    let mut level = Vec::new();
    while level.len() < 3 {
        level.push(ben.recv_type("caught_up").await);
    }
    let written = stall(&server, &mut ada, "load").await;
    let with_priority = |thread: &str, priority: &str| {
        let mut command = publish(thread, "x.n", json!(priority));
        command["priority"] = json!(priority);
        command
    };
    // After the large ones wait: a low one, the end of one subscription, its beginning, and a high one.
    accepted(&ada.ask(with_priority("low", "low")).await);
    assert_eq!(server.http("DELETE", "/v1/threads/left/members/ben", "ada", None).await.0, 200);
    assert_eq!(server.http("PUT", "/v1/threads/left/members/ben", "ada", None).await.0, 201);
    accepted(&ada.ask(with_priority("load", "high")).await);
    assert_eq!(ada.say("left", "after all").await, 4);

    let (mut others, mut ended, mut again) = (0, false, Vec::new());
    while !(ended && again.len() == 2 && others == written + 2) {
        let frame = ben.recv().await;
        match (frame["type"].as_str().unwrap(), frame["thread"].as_str().unwrap()) {
            ("error", "left") => ended = true,
            ("event", "left") => {
                assert!(ended, "the end of the old subscription comes before the new one: {frame}");
                again.push(frame["seq"].as_u64().unwrap());
            }
            ("event", _) => others += 1,
            ("caught_up", "left") | ("lagged" | "caught_up", "load") => {}
            other => panic!("{other:?}: {frame}"),
        }
    }
    assert_eq!(again, [3, 4]);
}

#[tokio::test]
async fn a_stream_resumed_by_a_member_goes_on_and_one_by_a_stranger_is_refused() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut stream = EventStream::of(&server, "t", "ben", "?after=0").await;
    assert_eq!(stream.seqs(1).await, [1]);
    drop(stream);
    assert_eq!(
        server.http("POST", "/v1/threads/t/events", "ada", Some(json!({"kind": "x.note", "data": 1}))).await.0,
        201
    );
    let resume = [("Last-Event-ID", "1")];
    let resumed = EventStream::open(&server, "/v1/threads/t/stream?after=0", &token("ben", ""), &resume).await;
    assert_eq!(resumed.ok().unwrap().seqs(1).await, [2], "after what it has seen");
    let eve = token("eve", "");
    assert_eq!(server.http_with("GET", "/v1/threads/t/stream", &eve, None, &resume).await.0, 404);
}
