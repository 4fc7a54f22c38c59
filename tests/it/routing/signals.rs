//! What is live only: signals, and who is there.

use serde_json::{Value, json};

use super::caught_up;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused, refused_with, seqs, token};

/// A socket that is live in a thread.
async fn live(server: &Server, user: &str, thread: &str) -> Socket {
    let mut socket = server.connect(user).await;
    socket.subscribe(thread, None).await;
    caught_up(&mut socket, thread).await;
    socket
}

async fn send(socket: &mut Socket, thread: &str, kind: &str, data: Value) {
    socket.send(&json!({"type": "signal", "thread": thread, "kind": kind, "data": data})).await;
}

#[tokio::test]
async fn a_signal_reaches_the_others_who_are_live_and_the_senders_other_devices_as_it_was_sent() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut phone = live(&server, "ada", "t").await;
    let mut laptop = live(&server, "ada", "t").await;
    let mut ben = live(&server, "ben", "t").await;
    let data = json!({"n": 1, "text": "Grüße \"世界\"", "thread": "other", "deep": [null, {"a": 1.5}]});
    send(&mut phone, "t", "typing", data.clone()).await;
    let signal = json!({"type": "signal", "thread": "t", "kind": "typing", "from": "ada", "data": data});
    assert_eq!(ben.recv().await, signal);
    assert_eq!(laptop.recv().await, signal);
    // Not to the socket that sent it: the next there is the other device's.
    laptop.send(&json!({"type": "signal", "thread": "t", "kind": "read"})).await;
    let bare = json!({"type": "signal", "thread": "t", "kind": "read", "from": "ada"});
    assert_eq!(phone.recv().await, bare);
    assert_eq!(ben.recv().await, bare);
    // Nothing of it is in the log.
    assert_eq!(phone.say("t", "an event").await, 2);
    let page = server.http("GET", "/v1/threads/t/events", "ben", None).await.1;
    assert_eq!((page["events"].as_array().unwrap().len(), &page["head"]), (2, &json!(2)));
    let mut late = server.connect("ben").await;
    late.subscribe("t", Some(0)).await;
    for wanted in ["event", "event", "caught_up"] {
        assert_eq!(late.recv().await["type"], wanted);
    }
}

#[tokio::test]
async fn signals_go_through_reserved_threads_under_the_name_each_reader_uses() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = live(&server, "ada", "@me").await;
    let mut ben = server.connect("ben").await;
    send(&mut ben, "@user:ada", "knock", json!(1)).await;
    assert_eq!(ada.recv().await, json!({"type": "signal", "thread": "@me", "kind": "knock", "from": "ben", "data": 1}));
    let mut all = live(&server, "cid", "@tenant").await;
    send(&mut server.connect_as("herald", "broadcast").await, "@tenant", "drill", json!(2)).await;
    assert_eq!(
        all.recv().await,
        json!({"type": "signal", "thread": "@tenant", "kind": "drill", "from": "herald", "data": 2})
    );
    send(&mut ben, "@tenant", "drill", json!(3)).await;
    let rejection = ben.recv().await;
    refused(&rejection, "forbidden", "thread");
    // Who has met nobody learns nothing by knocking.
    let mut eve = server.connect("eve").await;
    let mut answers = Vec::new();
    for inbox in ["@user:ada", "@user:nobody"] {
        send(&mut eve, inbox, "knock", json!(4)).await;
        answers.push(eve.recv().await);
    }
    assert_eq!((&answers[0], &answers[0]["code"]), (&answers[1], &json!("not_found")));
}

#[tokio::test]
async fn who_may_not_write_may_not_signal_and_what_is_wrong_with_a_signal_is_named() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = live(&server, "ada", "t").await;
    let typing = |thread: &str| json!({"type": "signal", "thread": thread, "kind": "typing"});
    let refusal = async |socket: &mut Socket, command: Value| {
        socket.send(&command).await;
        let answer = socket.recv().await;
        assert_eq!(answer["type"], "error", "{answer}");
        let text = |name: &str| answer[name].as_str().unwrap_or("").to_owned();
        (text("code"), text("field"))
    };
    let refused = |code: &str, field: &str| (code.to_owned(), field.to_owned());

    let mut eve = server.connect("eve").await;
    assert_eq!(refusal(&mut eve, typing("t")).await, refused("not_found", "thread"));
    assert_eq!(refusal(&mut eve, typing("nowhere")).await, refused("not_found", "thread"));
    let mut quiet = server.connect_as("ben", "subscribe").await;
    assert_eq!(refusal(&mut quiet, typing("t")).await.0, "forbidden");
    let mut reader = server.connect_as("ana", "analyst").await;
    assert_eq!(refusal(&mut reader, typing("t")).await.0, "forbidden");

    let mut ben = server.connect("ben").await;
    let with = |name: &str, value: Value| {
        let mut command = typing("t");
        command[name] = value;
        command
    };
    assert_eq!(refusal(&mut ben, with("key", json!("k"))).await, refused("bad_request", "key"));
    assert_eq!(refusal(&mut ben, with("id", json!(1))).await, refused("bad_request", "id"));
    assert_eq!(refusal(&mut ben, with("kind", json!(""))).await, refused("bad_request", "kind"));
    assert_eq!(refusal(&mut ben, with("kind", json!("x".repeat(129)))).await, refused("bad_request", "kind"));
    assert_eq!(refusal(&mut ben, with("thread", json!("a/b"))).await, refused("bad_request", "thread"));
    assert_eq!(refusal(&mut ben, with("data", json!("x".repeat(65_535)))).await, refused("too_large", "data"));
    assert_eq!(refusal(&mut ben, json!({"type": "signal", "thread": "t"})).await, refused("bad_request", "kind"));
    // None of them came through, and the session lives on.
    send(&mut ben, "t", "typing", json!("at last")).await;
    assert_eq!(ada.recv().await["data"], "at last");
}

#[tokio::test]
async fn a_reader_with_a_full_outbox_loses_signals_and_no_events() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    writer.say("t", "first").await;
    let mut reader = live(&server, "ada", "t").await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    reader.answers().await;
    writer.say("t", "uses the credit").await;
    assert_eq!(seqs(&reader.events(1).await), [2]);
    // More waits than signals may be queued after, and less than events may.
    for _ in 0..4 {
        writer.ask(publish("t", "x.load", json!("x".repeat(30_000)))).await;
    }
    send(&mut writer, "t", "typing", json!("lost")).await;
    // Commands take effect in their order: with the answer the signal has been handed out, or not.
    writer.answers().await;
    reader.send(&json!({"type": "credit", "events": 100})).await;
    assert_eq!(seqs(&reader.events(4).await), [3, 4, 5, 6]);
    send(&mut writer, "t", "typing", json!("kept")).await;
    assert_eq!(reader.recv().await["data"], "kept", "the outbox has room again, and nothing lagged");
}

#[tokio::test]
async fn a_session_sends_so_many_signals_a_second_and_the_next_one_is_told_when_to_come() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ben = live(&server, "ben", "t").await;
    let mut ada = server.connect("ada").await;
    let typing = json!({"type": "signal", "thread": "t", "kind": "typing"});
    // In one frame, so that no time passes between them.
    ada.send(&json!(vec![typing.clone(); 40])).await;
    let refusal = ada.recv().await;
    refused_with(&refusal, "rate_limited");
    assert!(refusal["message"].as_str().is_some_and(|message| message.contains("20 signals")), "{refusal}");
    let wait = refusal["retry_after_ms"].as_u64().expect("it says when the next one passes");
    assert!((1..=50).contains(&wait), "{refusal}");
    for _ in 0..20 {
        assert_eq!(ben.recv().await["kind"], "typing");
    }

    // Another session has a bucket of its own, and publishes are not counted with signals.
    let mut other = server.connect("ada").await;
    other.send(&json!({"type": "signal", "thread": "t", "kind": "from another"})).await;
    while ben.recv().await["kind"] != "from another" {}
    assert_eq!(other.say("t", "an event").await, 2);
    tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
    ada.send(&json!({"type": "signal", "thread": "t", "kind": "later"})).await;
    while ben.recv().await["kind"] != "later" {}
}

/// Who is in a thread, as the server tells a user.
async fn present(server: &Server, user: &str, thread: &str) -> Value {
    let (status, body) = server.http("GET", &format!("/v1/threads/{thread}/presence"), user, None).await;
    assert_eq!(status, 200, "{body}");
    has(&body, json!({"thread": thread}));
    body["users"].clone()
}

fn presence(user: &str, online: bool) -> Value {
    json!({"type": "signal", "thread": "t", "kind": "presence", "from": user, "data": {"online": online}})
}

#[tokio::test]
async fn presence_shows_members_who_are_subscribed_and_their_coming_and_going_once() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben", "cid"]}))).await;
    assert_eq!(present(&server, "ada", "t").await, json!([]));
    let mut ada = live(&server, "ada", "t").await;
    let mut phone = live(&server, "ben", "t").await;
    assert_eq!(ada.recv_any().await, presence("ben", true));
    let laptop = live(&server, "ben", "t").await;
    let mut star = server.connect("cid").await;
    star.ask(json!({"type": "subscribe", "thread": "*"})).await;
    assert_eq!(ada.recv_any().await, presence("cid", true), "ben's second device is not notified");
    let all = json!([{"user": "ada", "connections": 1}, {"user": "ben", "connections": 2}, {"user": "cid", "connections": 1}]);
    assert_eq!(present(&server, "cid", "t").await, all);

    // Of ben's subscriptions the first ends, then the last with its connection.
    assert_eq!(phone.ask(json!({"type": "unsubscribe", "thread": "t"})).await["type"], "unsubscribed");
    assert_eq!(present(&server, "ada", "t").await[1], json!({"user": "ben", "connections": 1}));
    drop(laptop);
    assert_eq!(ada.recv_any().await, presence("ben", false));
    // Unsubscribed: gone. Removed: gone as well, which a signal says beside the event.
    assert_eq!(star.ask(json!({"type": "unsubscribe", "thread": "*"})).await["type"], "unsubscribed");
    assert_eq!(ada.recv_any().await, presence("cid", false));
    phone.subscribe("t", None).await;
    assert_eq!(ada.recv_any().await, presence("ben", true));
    server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await;
    let both = [ada.recv_any().await, ada.recv_any().await];
    assert!(both.contains(&presence("ben", false)), "{both:?}");
    assert!(both.iter().any(|frame| frame["kind"] == "member_removed"), "{both:?}");
    assert_eq!(present(&server, "ada", "t").await, json!([{"user": "ada", "connections": 1}]));
    assert_eq!(server.http("GET", "/v1/threads/t/presence", "ben", None).await.0, 404);
}

#[tokio::test]
async fn who_reads_by_scope_sees_presence_and_is_not_part_of_it() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = live(&server, "ada", "t").await;
    let mut analyst = server.connect_as("ana", "analyst").await;
    analyst.subscribe("t", None).await;
    caught_up(&mut analyst, "t").await;
    assert_eq!(present(&server, "ada", "t").await, json!([{"user": "ada", "connections": 1}]));
    let seen = server.http_with("GET", "/v1/threads/t/presence", &token("ana", "analyst"), None, &[]).await;
    assert_eq!(seen.0, 200, "{seen:?}");
    has(&seen.1["users"][0], json!({"user": "ada"}));
    let ben = live(&server, "ben", "t").await;
    assert_eq!(ada.recv_any().await, presence("ben", true), "the analyst's coming was not signalled");
    assert_eq!(analyst.recv_any().await, presence("ben", true));
    drop(analyst);
    drop(ben);
    assert_eq!(ada.recv_any().await, presence("ben", false), "nor its going");
    eventually("both are gone", async || present(&server, "ada", "t").await.as_array().unwrap().len() == 1).await;
}

#[tokio::test]
async fn a_stream_of_server_sent_events_counts_as_being_there() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut ada = live(&server, "ada", "t").await;
    let stream = EventStream::of(&server, "t", "ben", "").await;
    assert_eq!(ada.recv_any().await, presence("ben", true));
    drop(stream);
    assert_eq!(ada.recv_any().await, presence("ben", false));
}
