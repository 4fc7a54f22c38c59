//! What waits for what on one socket.

use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::kafka::Broker;
use crate::support::{LogKind, Server, Socket, eventually, publish, refused};

fn with_id(mut command: Value, id: i64) -> Value {
    command["id"] = json!(id);
    command
}

/// The next frames that are answers, by what they are and their id.
async fn answers(socket: &mut Socket, count: usize) -> Vec<(String, Value)> {
    let mut answers = Vec::new();
    while answers.len() < count {
        let frame = socket.recv().await;
        if frame["type"] != "event" {
            answers.push((frame["type"].as_str().unwrap().to_owned(), frame["id"].clone()));
        }
    }
    answers
}

on_both_logs!(acknowledgements_signals_and_pings_do_not_wait_for_the_publish_before_them, |log| async move {
    let server = Server::start(log);
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    ada.say("t", "hello").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    for reader in [&mut ada, &mut ben] {
        reader.subscribe("t", None).await;
        assert_eq!(reader.recv().await["type"], "caught_up");
    }

    // What is in one frame is read before any of it goes to the log.
    let commands = json!([
        with_id(publish("t", "x.first", json!(1)), 1),
        {"type": "signal", "thread": "t", "kind": "typing"},
        {"type": "ack", "thread": "t", "seq": 99},
        {"type": "ping", "id": 2},
    ]);
    ada.send(&commands).await;
    let mut answers = Vec::new();
    while answers.len() < 3 {
        let frame = ada.recv().await;
        if frame["type"] != "event" {
            answers.push(frame);
        }
    }
    let position = |answer: &str| answers.iter().position(|frame| frame["type"] == answer).expect("each is answered");
    assert!(position("pong") < position("published"), "{answers:?}");
    // Where others write to the log as well, it is asked before a seq is said to be beyond the head.
    refused(&answers[position("error")], "cursor_invalid", "seq");
    assert_eq!((&ben.recv().await["kind"], &ben.recv().await["kind"]), (&json!("typing"), &json!("x.first")));
});

on_both_logs!(what_waits_holds_up_what_comes_after_it_but_pings, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    // The acknowledgement is of the thread that the subscribe before it begins, which waits for the publish before that.
    let commands = json!([
        with_id(publish("t", "x.first", json!(1)), 1),
        {"type": "subscribe", "id": 2, "thread": "t", "after": 0, "name": "inbox"},
        {"type": "ack", "thread": "t", "seq": 1, "name": "inbox"},
        with_id(publish("t", "x.second", json!(2)), 3),
        {"type": "unsubscribe", "id": 4, "thread": "t"},
        {"type": "ping", "id": 5},
    ]);
    ada.send(&commands).await;
    // Whether the subscription is caught up before it ends is no matter here.
    let mut answered = Vec::new();
    while answered.last().is_none_or(|(what, _)| what != "unsubscribed") {
        let next = answers(&mut ada, 1).await.remove(0);
        if next.0 != "caught_up" {
            answered.push(next);
        }
    }
    let answered: Vec<_> = answered.iter().map(|(what, id)| (what.as_str(), id.as_i64())).collect();
    let in_order = [("published", 1), ("subscribed", 2), ("published", 3), ("unsubscribed", 4)];
    let in_order = std::iter::once(("pong", 5)).chain(in_order).map(|(what, id)| (what, Some(id)));
    assert_eq!(answered, in_order.collect::<Vec<_>>());
    // No error came for the acknowledgement, and it counts.
    eventually("it is in the log", async || {
        let (_, receipts) = server.http("GET", "/v1/threads/t/receipts", "ada", None).await;
        receipts["receipts"][0]["seq"] == 1
    })
    .await;
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_log_answers_nothing_the_socket_is_read_on_for_what_need_not_wait() {
    let broker = Broker::own();
    let log = LogKind::Kafka { brokers: broker.brokers(), prefix: "order.".into() };
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        assert_eq!(ada.say("t", "before").await, n);
    }
    ada.send(&json!({"type": "credit", "events": 1})).await;
    ada.subscribe("t", Some(0)).await;
    assert_eq!(ada.recv_type("event").await["seq"], 1);

    broker.pause();
    ada.send(&with_id(publish("t", "x.held", json!(1)), 100)).await;
    ada.send(&json!({"type": "unsubscribe", "id": 101, "thread": "t"})).await;
    // Each of them is a frame of its own, and the answer to one is there before the next is sent.
    ada.answers().await;
    ada.send(&json!({"type": "credit", "events": 1})).await;
    assert_eq!(ada.recv().await["seq"], 2, "an event for the new credit");
    ada.answers().await;
    broker.resume();

    let answers = answers(&mut ada, 2).await;
    assert_eq!(answers[1], ("unsubscribed".to_owned(), json!(101)), "{answers:?}");
    assert_eq!(answers[0].1, json!(100));
}
