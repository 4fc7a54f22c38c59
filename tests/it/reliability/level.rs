//! Two nodes on one log: what one has answered, the other one does not deny.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::kafka::{Broker, fresh_prefix};
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, eventually, publish, refused_with, token};

/// How often each of the cases is tried. Before nodes became level with the log, 114 of 500 resumes were refused.
const ROUNDS: u64 = 500;

fn two_nodes() -> [Server; 2] {
    let log = LogKind::kafka();
    [(); 2].map(|()| Server::start_unlimited(log.clone()))
}

/// Those that a node answered wrongly.
fn none_wrong(wrong: &[Value]) {
    assert!(wrong.is_empty(), "{} of {ROUNDS}: {}", wrong.len(), wrong[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seq_that_one_node_has_given_is_resumed_after_on_the_other() {
    let nodes = two_nodes();
    let mut writer = nodes[0].connect("ada").await;
    let mut reader = nodes[1].connect("ada").await;
    let mut wrong = Vec::new();
    for _ in 0..ROUNDS {
        let seq = writer.say("t", "hello").await;
        let answer = reader.ask(json!({"type": "subscribe", "thread": "t", "after": seq})).await;
        if answer["type"] == "subscribed" {
            assert_eq!(answer["recovered"], true);
            assert_eq!(reader.ask(json!({"type": "unsubscribe", "thread": "t"})).await["type"], "unsubscribed");
        } else {
            wrong.push(answer);
        }
    }
    none_wrong(&wrong);
    let beyond = reader.ask(json!({"type": "subscribe", "thread": "t", "after": ROUNDS + 1})).await;
    refused_with(&beyond, "cursor_invalid");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_one_node_has_made_is_there_on_the_other() {
    let nodes = two_nodes();
    let mut writer = nodes[0].connect("ada").await;
    let mut reader = nodes[1].connect("ada").await;
    let mut wrong = Vec::new();
    for n in 0..ROUNDS {
        let thread = format!("t{n}");
        writer.say(&thread, "hello").await;
        // By turns, whatever can say that it is not there.
        let answer = match n % 3 {
            0 => nodes[1].http("GET", &format!("/v1/threads/{thread}/events"), "ada", None).await.1,
            1 => reader.ask(json!({"type": "subscribe", "thread": thread})).await,
            _ => {
                let after: Value = [(thread, json!(1))].into_iter().collect::<serde_json::Map<_, _>>().into();
                let mut all = nodes[1].connect("ada").await;
                let answer = all.ask(json!({"type": "subscribe", "thread": "*", "after": after})).await;
                all.send(&json!({"type": "ping", "id": 1})).await;
                let next = all.recv_type("pong").await;
                assert_eq!(next["id"], 1);
                answer
            }
        };
        if answer.get("code").is_some() {
            wrong.push(answer);
        }
    }
    none_wrong(&wrong);
    assert_eq!(nodes[1].http("GET", "/v1/threads/nowhere/events", "ada", None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_one_node_has_added_reads_and_writes_on_the_other() {
    let nodes = two_nodes();
    nodes[0].connect("ada").await.say("t", "hello").await;
    nodes[0].http("PUT", "/v1/threads/t/members/first", "ada", None).await;
    eventually("the other node has the thread", async || {
        nodes[1].http("GET", "/v1/threads/t", "first", None).await.0 == 200
    })
    .await;
    let mut wrong = Vec::new();
    for n in 0..ROUNDS {
        let user = format!("user{n}");
        let mut socket = nodes[1].connect(&user).await;
        let added = nodes[0].http("PUT", &format!("/v1/threads/t/members/{user}"), "ada", None).await;
        assert_eq!(added.0, 201);
        let answer = match n % 4 {
            0 => socket.ask(publish("t", "user_message", json!({"content": "here I am"}))).await,
            1 => socket.ask(json!({"type": "subscribe", "thread": "t"})).await,
            2 => nodes[1].http("GET", "/v1/threads/t/context", &user, None).await.1,
            _ => nodes[1].http("PUT", &format!("/v1/threads/t/members/{user}-too"), &user, None).await.1,
        };
        if answer.get("code").is_some() {
            wrong.push(answer);
        }
        socket.leave().await;
    }
    none_wrong(&wrong);
    assert_eq!(nodes[1].http("GET", "/v1/threads/t", "stranger", None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_one_node_has_sent_is_resumed_on_the_other() {
    let nodes = two_nodes();
    let mut writer = nodes[0].connect("ada").await;
    let mut wrong = Vec::new();
    for _ in 0..ROUNDS {
        let seq = writer.say("t", "hello").await.to_string();
        let resumed =
            EventStream::open(&nodes[1], "/v1/threads/t/stream", &token("ada", ""), &[("Last-Event-ID", &seq)]).await;
        if let Err((status, problem)) = resumed {
            wrong.push(json!({"status": status, "problem": problem}));
        }
    }
    none_wrong(&wrong);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_keep_their_order_while_one_of_them_waits_for_the_log() {
    let nodes = two_nodes();
    let mut writer = nodes[0].connect("ada").await;
    let mut reader = nodes[1].connect("ada").await;
    for n in 0..50 {
        let thread = format!("t{n}");
        writer.say(&thread, "first").await;
        let mut second = publish(&thread, "user_message", json!({"content": "second"}));
        second["id"] = json!(2);
        let commands = json!([
            {"type": "subscribe", "id": 1, "thread": thread, "after": 1},
            second,
            {"type": "unsubscribe", "id": 3, "thread": thread},
        ]);
        reader.send(&commands).await;
        let mut answers = Vec::new();
        let mut events = 0;
        while answers.len() < 3 {
            let frame = reader.recv().await;
            match frame["type"].as_str().unwrap() {
                "event" => events += 1,
                "caught_up" => {}
                _ => answers.push((frame["id"].as_i64().unwrap(), frame["type"].clone())),
            }
        }
        let wanted = [(1, json!("subscribed")), (2, json!("published")), (3, json!("unsubscribed"))];
        assert_eq!(answers, wanted);
        assert!(events <= 1, "the second event at most");
    }
}

/// What a client gets that asks for something which is not there.
async fn asks_in_vain(server: &Server, socket: &mut Socket) -> [Value; 2] {
    let get = server.http("GET", "/v1/threads/nowhere", "ada", None);
    let subscribe = socket.ask(json!({"type": "subscribe", "thread": "t", "after": 99}));
    let (problem, answer) = tokio::join!(get, subscribe);
    [problem.1, answer]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_brokers_are_silent_what_is_not_there_is_unavailable_and_afterwards_not_there() {
    let broker = Broker::own();
    let server = Server::start(LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() });
    server.ready().await;
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "before").await, 1);
    let [missing, beyond] = asks_in_vain(&server, &mut ada).await;
    refused_with(&missing, "not_found");
    refused_with(&beyond, "cursor_invalid");

    broker.pause();
    let within = tokio::time::timeout(Duration::from_secs(10), asks_in_vain(&server, &mut ada));
    for answer in within.await.expect("they are answered without the broker") {
        refused_with(&answer, "unavailable");
        assert!(answer["retry_after_ms"].is_u64(), "{answer}");
        assert_ne!(answer["temporary"], false, "{answer}");
    }
    assert_eq!(server.http("GET", "/v1/threads/t", "ada", None).await.0, 200, "what is there is read as ever");

    broker.resume();
    eventually("it is known again what is not there", async || {
        server.http("GET", "/v1/threads/nowhere", "ada", None).await.0 == 404
    })
    .await;
    accepted(&ada.ask(publish("t", "user_message", json!({"content": "after"}))).await);
}
