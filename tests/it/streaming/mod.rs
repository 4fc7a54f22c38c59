//! Events on their way to readers: live, replayed, and the handover from one to the other.

mod agui;
mod context;
mod endings;
mod hostile;
mod interruption;
mod paced;
mod restarts;
mod runs;
mod sse;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, has, publish, refused, seqs, token};

/// Plays generated cases against one server, each on a thread of its own.
fn on_threads<S: Strategy>(log: LogKind, cases: u32, strategy: S, play: impl AsyncFn(&Server, &str, &S::Value)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = Server::start_unlimited(log);
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let thread = std::cell::Cell::new(0);
    runner
        .run(&strategy, |case| {
            thread.set(thread.get() + 1);
            runtime.block_on(play(&server, &format!("t{}", thread.get()), &case));
            Ok(())
        })
        .unwrap();
}

on_both_logs!(a_conversation_of_two_users_and_an_agent_reaches_all_of_them_in_one_order, |log| async move {
    let server = Server::start(log);
    let members = json!({"title": "Lunch", "members": ["ben", "scout"]});
    assert_eq!(server.http("PUT", "/v1/threads/t1", "ada", Some(members)).await.0, 201);
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    let mut scout = server.connect_as("scout", "publish subscribe agent").await;
    for reader in [&mut ada, &mut ben, &mut scout] {
        let subscribed = reader.subscribe("t1", Some(0)).await;
        has(&subscribed, json!({"head": 1, "after": 0, "recovered": true}));
        assert_eq!(reader.recv_type("event").await["kind"], "thread_created");
        assert_eq!(reader.recv_type("caught_up").await["seq"], 1);
    }
    ada.send(&json!({"type": "publish", "id": 900, "thread": "t1", "kind": "user_message", "data": {"content": "Where shall we eat?"}})).await;
    let run = |kind: &str, data: Value| json!({"type": "publish", "id": 1, "thread": "t1", "kind": kind, "run": "r1", "data": data});
    let steps = [
        run("agent_started", json!({"agent": "scout"})),
        run("agent_thinking", json!({"content": "places nearby"})),
        run("tool_executing", json!({"tool": "map", "call": "c1", "arguments": {"near": "here"}})),
        run("tool_completed", json!({"call": "c1", "result": ["Noodles", "Soup"]})),
        run("tool_executing", json!({"tool": "hours", "call": "c2"})),
        run("tool_completed", json!({"call": "c2", "result": "open"})),
        run("agent_message", json!({"content": "Noodles, they are open."})),
        run("agent_completed", json!({"output": "Noodles"})),
    ];
    assert_eq!(scout.recv_type("event").await["data"]["content"], "Where shall we eat?");
    scout.send(&Value::Array(steps.to_vec())).await;
    let kinds: Vec<&str> = steps.iter().map(|step| step["kind"].as_str().unwrap()).collect();
    let mut all = Vec::new();
    for reader in [&mut ada, &mut ben] {
        let events = reader.events(1 + steps.len()).await;
        assert_eq!(seqs(&events), (2..=10).collect::<Vec<_>>());
        assert_eq!(events[1..].iter().map(|event| event["kind"].as_str().unwrap()).collect::<Vec<_>>(), kinds);
        assert!(events[1..].iter().all(|event| event["from"] == "scout" && event["run"] == "r1"));
        all.push(events);
    }
    assert_eq!(all[0], all[1], "both readers get the same frames");
    let page = server.http("GET", "/v1/threads/t1/events?after=1", "ben", None).await.1;
    let stored = page["events"].as_array().unwrap();
    assert_eq!(stored.len(), all[0].len(), "{page}");
    for (stored, live) in stored.iter().zip(&all[0]) {
        let mut live = live.clone();
        live.as_object_mut().unwrap().remove("type");
        assert_eq!(stored, &live, "history has what was live");
    }
});

on_both_logs!(
    readers_that_resume_anywhere_while_others_publish_at_full_speed_see_each_event_once_in_order,
    |log| async move {
        const READERS: usize = 4;
        const RESUMES: usize = 60;
        let server = Arc::new(Server::start_unlimited(log));
        let mut first = server.connect("ada").await;
        first.say("busy", "0").await;
        let published = Arc::new(AtomicU64::new(1));
        let done = Arc::new(AtomicBool::new(false));
        let writer = tokio::spawn(write_until(first, published.clone(), done.clone()));
        let readers: Vec<_> = (0..READERS)
            .map(|n| tokio::spawn(resume_again_and_again(server.clone(), n, RESUMES, published.clone())))
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        done.store(true, Ordering::Release);
        let total = writer.await.unwrap();
        let mut last = server.connect("ada").await;
        last.subscribe("busy", Some(0)).await;
        assert_eq!(seqs(&last.events(total as usize).await), (1..=total).collect::<Vec<_>>());
        assert_eq!(last.recv_type("caught_up").await["seq"], total);
    }
);

/// Publishes with a window until it is stopped; gives the number of events.
async fn write_until(mut socket: Socket, published: Arc<AtomicU64>, done: Arc<AtomicBool>) -> u64 {
    let batch: Vec<Value> = (0..64)
        .map(|id| {
            let mut command = publish("busy", "x.load", json!({"n": id}));
            // Beyond the ids that `ask` gives.
            command["id"] = json!(1_000_000 + id);
            command
        })
        .collect();
    let batch = Value::Array(batch);
    socket.send(&batch).await;
    loop {
        if !done.load(Ordering::Acquire) {
            socket.send(&batch).await;
        }
        for _ in 0..64 {
            let seq = socket.recv_type("published").await["seq"].as_u64().unwrap();
            published.store(seq, Ordering::Release);
        }
        if done.load(Ordering::Acquire) {
            break;
        }
    }
    // A ping is answered when all publishes before it are.
    socket.answers().await;
    socket.subscribe("busy", None).await["head"].as_u64().unwrap()
}

/// Reads a random stretch from a random seq, drops the connection, and does it again; each stretch must be without gap,
/// repetition or disorder, across the handover from replayed to live.
async fn resume_again_and_again(server: Arc<Server>, reader: usize, times: usize, published: Arc<AtomicU64>) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(reader as u64 + 1);
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below.max(1)
    };
    for _ in 0..times {
        let head = published.load(Ordering::Acquire);
        // Mostly near the head, where the handover is; sometimes far before it.
        let after = if next(4) == 0 { head.saturating_sub(next(5_000)) } else { head.saturating_sub(next(50)) };
        let mut socket = Socket::open(&server.url, &token("ada", "")).await;
        let subscribed = socket.subscribe("busy", Some(after)).await;
        let missing = subscribed["head"].as_u64().unwrap() - after;
        let (mut expected, mut live) = (after + 1, None);
        // Past the handover, and some live events more.
        while live.is_none_or(|left| left > 0) {
            let frame = socket.recv().await;
            match frame["type"].as_str().unwrap() {
                "event" => {
                    assert_eq!(frame["seq"], expected, "after {after}, {missing} before the head");
                    expected += 1;
                    live = live.map(|left: u64| left - 1);
                }
                "caught_up" => {
                    assert_eq!(frame["seq"], expected - 1);
                    live = Some(next(30));
                }
                "lagged" => assert_eq!(frame["from"], expected),
                other => panic!("{other}: {frame}"),
            }
        }
    }
}

#[tokio::test]
async fn a_subscription_can_begin_at_the_head_after_a_seq_or_with_the_newest_events() {
    let server = Server::start(crate::support::LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 1..=5 {
        assert_eq!(ada.say("t", &n.to_string()).await, n);
    }
    let begun = async |more: Value| {
        let mut socket = server.connect("ada").await;
        let mut command = json!({"type": "subscribe", "thread": "t"});
        command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = socket.ask(command).await;
        assert_eq!(answer["head"], 5);
        let mut seen = Vec::new();
        loop {
            let frame = socket.recv().await;
            if frame["type"] == "caught_up" {
                assert_eq!(frame["seq"], 5);
                return (answer["after"].clone(), answer["recovered"].clone(), seen);
            }
            seen.push(frame["seq"].as_u64().unwrap());
        }
    };
    assert_eq!(begun(json!({})).await, (json!(5), json!(true), vec![]));
    assert_eq!(begun(json!({"after": 0})).await, (json!(0), json!(true), vec![1, 2, 3, 4, 5]));
    assert_eq!(begun(json!({"after": 3})).await, (json!(3), json!(true), vec![4, 5]));
    assert_eq!(begun(json!({"last": 2})).await, (json!(3), json!(true), vec![4, 5]));
    assert_eq!(begun(json!({"last": 100})).await, (json!(0), json!(true), vec![1, 2, 3, 4, 5]));
    assert_eq!(begun(json!({"after": 3, "epoch": "another log's"})).await, (json!(5), json!(false), vec![]));
    let rejection = ada.ask(json!({"type": "subscribe", "thread": "t", "after": 6})).await;
    refused(&rejection, "cursor_invalid", "after");
}

#[tokio::test]
async fn a_reader_that_lags_is_notified_and_gets_all_from_the_store() {
    const EVENTS: u64 = 4_000;
    let server = Server::start(crate::support::LogKind::embedded());
    let mut slow = server.connect("ada").await;
    let mut writer = server.connect("ada").await;
    writer.say("t", "first").await;
    slow.subscribe("t", Some(0)).await;
    let text = "x".repeat(2_000);
    let mut waiting = 0;
    for n in 1..EVENTS {
        let mut command = publish("t", "x.load", json!({"n": n, "text": text}));
        command["id"] = json!(n);
        writer.send(&command).await;
        waiting += 1;
        if waiting == 256 {
            for _ in 0..waiting {
                writer.recv_type("published").await;
            }
            waiting = 0;
        }
    }
    for _ in 0..waiting {
        writer.recv_type("published").await;
    }
    // Only now does the reader read: 8 MB had to wait, of which its outbox and socket hold but a part.
    let (mut expected, mut lagged) = (1, 0);
    while expected <= EVENTS {
        let frame = slow.recv().await;
        match frame["type"].as_str().unwrap() {
            "event" => {
                assert_eq!(frame["seq"], expected);
                expected += 1;
            }
            "lagged" => {
                assert_eq!(frame["from"], expected);
                assert!(frame["to"].as_u64().unwrap() >= expected);
                lagged += 1;
            }
            "caught_up" => {}
            other => panic!("{other}: {frame}"),
        }
    }
    assert!(lagged > 0, "the outbox is bounded, so the reader must have lagged");
    assert!(server.metric("weft_lagged_total").await >= 1.0);
}

#[tokio::test]
async fn a_thread_subscribed_again_in_the_middle_of_its_replay_begins_anew_and_in_order() {
    let server = Server::start(crate::support::LogKind::embedded());
    let mut writer = server.connect("ada").await;
    for _ in 0..4 {
        let batch: Vec<Value> = (0..500)
            .map(|n| json!({"type": "publish", "id": 1_000_000 + n, "thread": "t", "kind": "x.n", "data": n}))
            .collect();
        writer.send(&Value::Array(batch)).await;
        for _ in 0..500 {
            writer.recv_type("published").await;
        }
    }
    let mut reader = server.connect("ada").await;
    let subscribe = |id: u64| json!({"type": "subscribe", "id": id, "thread": "t", "after": 0});
    reader.send(&json!([subscribe(1), {"type": "unsubscribe", "id": 2, "thread": "t"}, subscribe(3)])).await;
    // Answers overtake events: once the third is there, every event is the second subscription's.
    while reader.recv().await["id"] != 3 {}
    assert_eq!(seqs(&reader.events(2_000).await), (1..=2_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_publish_after_a_star_subscription_in_one_frame_is_delivered() {
    let server = Server::start(crate::support::LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "before").await;
    for n in 0..50u64 {
        let mut socket = server.connect("ada").await;
        let publish = json!({"type": "publish", "id": 2, "thread": "t", "kind": "x.n", "data": n});
        socket.send(&json!([{"type": "subscribe", "id": 1, "thread": "*"}, publish])).await;
        let event = socket.recv_type("event").await;
        assert_eq!(event["seq"], n + 2, "{event}");
    }
}
