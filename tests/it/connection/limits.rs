//! What one user or tenant may ask for in a time, and what becomes of those who ask for more.

use std::time::{Duration, Instant};

use futures_util::SinkExt;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused_with, token, token_of};

async fn raw(server: &Server, token: &str) -> Socket {
    Socket::raw(&server.url, &[("Authorization", &format!("Bearer {token}"))]).await.unwrap()
}

#[tokio::test]
async fn a_user_has_so_many_connections_streams_among_them_and_one_that_is_left_makes_room() {
    let server = Server::start_with(LogKind::embedded(), &["--max-user-connections", "3"]);
    let (mut first, second) = (server.connect("ada").await, server.connect("ada").await);
    first.say("t", "hello").await;
    let stream = EventStream::of(&server, "t", "ada", "").await;
    assert_eq!(raw(&server, &token("ada", "")).await.closed().await, 4503);
    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    by_frame.send(&json!({"type": "connect", "id": 1, "token": token("ada", "")})).await;
    assert_eq!(by_frame.closed().await, 4503);
    let open = async || EventStream::open(&server, "/v1/threads/t/stream", &token("ada", ""), &[]).await;
    let (_, problem) = open().await.err().unwrap();
    refused_with(&problem, "rate_limited");
    assert!(problem["retry_after_ms"].as_u64().is_some(), "{problem}");
    let reply = reqwest::Client::new()
        .get(format!("{}/v1/threads/t/stream", server.url))
        .bearer_auth(token("ada", ""))
        .send()
        .await
        .unwrap();
    assert!(reply.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);

    server.connect("ben").await.silent().await;
    Socket::open(&server.url, &token_of("umbrella", "ada")).await.silent().await;
    assert_eq!(server.http("GET", "/v1/threads", "ada", None).await.0, 200, "a request is no connection");
    second.leave().await;
    eventually("the socket's place is free", async || {
        raw(&server, &token("ada", "")).await.next().await.is_ok_and(|frame| frame["type"] == "welcome")
    })
    .await;
    drop(stream);
    // The socket above is gone as well by now, or soon.
    let mut streams = Vec::new();
    eventually("so are the stream's and the other one", async || {
        streams.extend(open().await);
        streams.len() == 2
    })
    .await;
    assert_eq!(open().await.err().unwrap().0, 429);
    first.silent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_room_for_the_connections_of_one_that_drains_and_says_when_it_has_none() {
    let server = Server::start(LogKind::embedded());
    // As many as a service has that spreads 250 over two nodes, of which one goes down.
    let mut sockets = Vec::new();
    for _ in 0..250 {
        sockets.push(server.connect("service").await);
    }
    let mut over = raw(&server, &token("service", "")).await;
    assert_eq!(over.closed().await, 4503);
    let reason: Value = serde_json::from_str(&over.reason).unwrap();
    assert_eq!((&reason["reason"], &reason["retry_after_ms"]), (&json!("too_many_connections"), &json!(30_000)));
    for socket in &mut sockets {
        socket.answers().await;
    }
}

#[tokio::test]
async fn agents_have_a_limit_of_connections_of_their_own() {
    let arguments = ["--max-user-connections", "1", "--max-agent-connections", "3"];
    let server = Server::start_with(LogKind::embedded(), &arguments);
    let mut agents = Vec::new();
    for _ in 0..3 {
        agents.push(server.connect_as("bot", "agent publish").await);
    }
    assert_eq!(raw(&server, &token("bot", "agent publish")).await.closed().await, 4503);
    let mut ada = server.connect("ada").await;
    assert_eq!(raw(&server, &token("ada", "")).await.closed().await, 4503);
    ada.silent().await;
}

fn pings(ids: std::ops::RangeInclusive<i64>) -> Value {
    ids.map(|id| json!({"type": "ping", "id": id})).collect()
}

/// Sends pings in one frame and gives the answers, by id.
async fn ping_all(socket: &mut Socket, count: i64) -> Vec<Value> {
    socket.send(&pings(1..=count)).await;
    let mut answers = Vec::new();
    while answers.len() < count as usize {
        answers.push(socket.recv().await);
    }
    answers.sort_by_key(|answer| answer["id"].as_i64().unwrap());
    answers
}

#[tokio::test]
async fn a_burst_of_five_seconds_passes_and_what_is_over_it_is_refused_with_the_time_to_wait() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "5"]);
    let mut ada = server.connect("ada").await;
    let answers = ping_all(&mut ada, 30).await;
    assert!(answers[..25].iter().all(|answer| answer["type"] == "pong"), "{answers:?}");
    for (rejection, id) in answers[25..].iter().zip(26..) {
        has(rejection, json!({"id": id, "code": "rate_limited"}));
        assert_eq!(rejection["temporary"], true);
        let wait = rejection["retry_after_ms"].as_u64().unwrap();
        assert!((1..=200).contains(&wait), "five a second: {rejection}");
    }
    let waited = answers[29]["retry_after_ms"].as_u64().unwrap();
    // All the user's sessions share the limit, and HTTP.
    let mut other = server.connect("ada").await;
    let reply = reqwest::Client::new()
        .get(format!("{}/v1/threads", server.url))
        .bearer_auth(token("ada", ""))
        .send()
        .await
        .unwrap();
    // Should the machine have slept meanwhile, both passed; refused, they say so.
    if reply.status() == 429 {
        assert_eq!(reply.headers()["retry-after"], "1", "whole seconds, rounded up");
        let problem: Value = reply.json().await.unwrap();
        refused_with(&problem, "rate_limited");
        assert!((1..=200).contains(&problem["retry_after_ms"].as_u64().unwrap()), "{problem}");
    }
    refused_with(&ping_all(&mut other, 26).await[25], "rate_limited");
    // That so long a wait is enough is what this is about; asking again and again would not show it.
    tokio::time::sleep(Duration::from_millis(waited.max(200))).await;
    ada.answers().await;
    assert_eq!(server.connect("ben").await.ask(json!({"type": "ping"})).await["type"], "pong", "another user");
    let namesake = &mut Socket::open(&server.url, &token_of("umbrella", "ada")).await;
    assert_eq!(ping_all(namesake, 25).await[24]["type"], "pong", "and the same name elsewhere");
    assert!(server.metric("weft_rate_limited_total").await >= 5.0);
    // What was refused had no effect, and the session goes on.
    refused_with(&ping_all(&mut ada, 26).await[25], "rate_limited");
    let rejection = ada.ask(publish("never", "x.a", json!(1))).await;
    refused_with(&rejection, "rate_limited");
    // Again the wait that was named.
    tokio::time::sleep(Duration::from_millis(rejection["retry_after_ms"].as_u64().unwrap())).await;
    refused_with(&ada.ask(json!({"type": "subscribe", "thread": "never"})).await, "not_found");
}

#[tokio::test]
async fn an_agent_s_commands_have_a_limit_of_their_own() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "1", "--rate-agent", "20"]);
    let mut agent = server.connect_as("scout", "publish subscribe agent").await;
    let answers = ping_all(&mut agent, 130).await;
    assert!(answers[..100].iter().all(|answer| answer["type"] == "pong"), "{answers:?}");
    let rejection = &answers[129];
    assert!(rejection["message"].as_str().unwrap().contains("the agent's limit is 20"), "{rejection}");
    // Whoever talks with it has the limit of users, which the agent has taken nothing from.
    let mut person = server.connect("scout").await;
    let answers = ping_all(&mut person, 6).await;
    assert_eq!((&answers[4]["type"], &answers[5]["code"]), (&json!("pong"), &json!("rate_limited")));
}

#[tokio::test]
async fn over_http_one_request_too_many_is_429_with_retry_after() {
    // So slow a rate that no machine is slower: the next one passes in a second.
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "1"]);
    let client = reqwest::Client::new();
    let get =
        async || client.get(format!("{}/v1/threads", server.url)).bearer_auth(token("ada", "")).send().await.unwrap();
    let mut passed = 0;
    let rejection = loop {
        let reply = get().await;
        if reply.status() != 200 {
            break reply;
        }
        passed += 1;
    };
    assert!(passed >= 5, "{passed}");
    assert_eq!(
        (rejection.status().as_u16(), &rejection.headers()["content-type"]),
        (429, &"application/problem+json".parse().unwrap())
    );
    assert_eq!(rejection.headers()["retry-after"], "1");
    let problem: Value = rejection.json().await.unwrap();
    let wait = problem["retry_after_ms"].as_u64().unwrap();
    assert_eq!((&problem["code"], (1..=1_000).contains(&wait)), (&json!("rate_limited"), true), "{problem}");
    // As named, and not a request before: that this wait is enough is what is tested.
    tokio::time::sleep(Duration::from_millis(wait)).await;
    assert_eq!(get().await.status(), 200, "after the wait that was named");
    assert_eq!(server.http("GET", "/v1/threads", "ben", None).await.0, 200);
}

#[tokio::test]
async fn who_is_over_the_limit_for_ten_seconds_is_closed_4005_and_who_pauses_is_not() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "5"]);
    let (mut greedy, mut patient) = (server.connect("ada").await, server.connect("ben").await);
    let goes_on = async {
        let mut since = None;
        // Some come through now and then, since time goes by; that is no pause.
        let mut every = tokio::time::interval(Duration::from_millis(25));
        loop {
            every.tick().await;
            drop(greedy.ws.send(Message::text(json!({"type": "ping", "id": 1}).to_string())).await);
            match greedy.next().await {
                Ok(frame) if frame["type"] == "error" => drop(since.get_or_insert_with(Instant::now)),
                Ok(_) => {}
                Err(code) => return (code, since.unwrap().elapsed()),
            }
        }
    };
    let comes_and_goes = async {
        loop {
            let answers = ping_all(&mut patient, 40).await;
            refused_with(&answers[39], "rate_limited");
            // A second without a refusal is a pause: the silence itself is what is tested.
            tokio::time::sleep(Duration::from_millis(1_100)).await;
        }
    };
    let (code, after) = tokio::select! {
        end = goes_on => end,
        () = comes_and_goes => unreachable!("it comes again for ever"),
    };
    assert_eq!((code, greedy.reason.as_str()), (4005, "over the rate limit for too long"));
    assert!((9..30).contains(&after.as_secs()), "{after:?}");
    // Its answers may still be on their way.
    patient.send(&json!({"type": "ping", "id": 99})).await;
    while patient.recv().await["id"] != 99 {}
}

#[tokio::test]
async fn a_tenant_appends_so_many_bytes_and_other_tenants_are_not_held_up() {
    // The bucket holds 272 KiB in any case, and fills by a thousand bytes a second.
    let server = Server::start_with(LogKind::embedded(), &["--rate-tenant", "1000"]);
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    let large = || publish("t", "x.large", json!("x".repeat(60_000)));
    ada.say("t", "hello").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    for seq in 3..=6 {
        let who = if seq % 2 == 0 { &mut ada } else { &mut ben };
        assert_eq!(who.ask(large()).await["seq"], seq);
    }
    for who in [&mut ada, &mut ben] {
        let rejection = who.ask(large()).await;
        has(&rejection, json!({"code": "rate_limited", "temporary": true}));
        // 60,000 are wanted, and less than 39,000 are left.
        assert!((1..=60_000).contains(&rejection["retry_after_ms"].as_u64().unwrap()), "{rejection}");
        who.answers().await;
    }
    let body = json!({"kind": "x.large", "data": "x".repeat(60_000)});
    let (_, problem) = server.http("POST", "/v1/threads/t/events", "ada", Some(body)).await;
    refused_with(&problem, "rate_limited");
    assert_eq!(ada.say("t", "a small one has room").await, 7);
    let mut other = Socket::open(&server.url, &token_of("umbrella", "ada")).await;
    assert_eq!(other.ask(large()).await["seq"], 1);
}

#[tokio::test]
async fn a_tenants_users_share_its_commands() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-tenant-commands", "5"]);
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    assert!(ping_all(&mut ada, 13).await.iter().all(|answer| answer["type"] == "pong"));
    let answers = ping_all(&mut ben, 30).await;
    assert!(answers[..12].iter().all(|answer| answer["type"] == "pong"), "{answers:?}");
    let rejection = &answers[29];
    refused_with(rejection, "rate_limited");
    assert!(rejection["message"].as_str().unwrap().contains("tenant"), "{rejection}");
    refused_with(&ping_all(&mut ada, 30).await[29], "rate_limited");
    let mut other = Socket::open(&server.url, &token_of("umbrella", "ada")).await;
    assert_eq!(ping_all(&mut other, 25).await[24]["type"], "pong");
}

/// Sends a message again and again, and gives how that ends.
async fn flood(server: &Server, message: Message) -> (u16, String) {
    let mut socket = server.connect("ada").await;
    for n in 0..20_000 {
        // Once the server has had enough it reads no more.
        if socket.ws.feed(message.clone()).await.is_err() || n % 500 == 0 && socket.ws.flush().await.is_err() {
            break;
        }
    }
    drop(socket.ws.flush().await);
    let code = socket.closed().await;
    (code, socket.reason)
}

#[tokio::test]
async fn floods_of_frames_that_carry_nothing_are_closed_4005_and_a_few_of_them_are_no_matter() {
    let server = Server::start(LogKind::embedded());
    let fragment = |text: &'static str| Message::Frame(Frame::message(text, OpCode::Data(Data::Continue), false));
    for (what, message) in [
        ("pings", Message::Ping("x".into())),
        ("pongs", Message::Pong("x".into())),
        ("empty frames", Message::text("")),
        ("empty fragments", Message::Frame(Frame::message("", OpCode::Data(Data::Text), true))),
    ] {
        let (code, reason) = flood(&server, message).await;
        assert_eq!((code, reason.as_str()), (4005, "a flood of frames that carry nothing"), "{what}");
    }
    let mut pieces = server.connect("ada").await;
    pieces.ws.send(Message::Frame(Frame::message("{", OpCode::Data(Data::Text), false))).await.unwrap();
    for _ in 0..20_000 {
        if pieces.ws.send(fragment(" ")).await.is_err() {
            break;
        }
    }
    assert_eq!(pieces.closed().await, 4005, "small fragments");

    let mut few = server.connect("ada").await;
    few.send_text("").await;
    few.silent().await;
    for _ in 0..100 {
        few.ws.feed(Message::Ping("are you there?".into())).await.unwrap();
        few.ws.feed(Message::text("")).await.unwrap();
    }
    let text = json!({"type": "ping", "id": 5}).to_string();
    few.ws.feed(Message::Frame(Frame::message("", OpCode::Data(Data::Text), false))).await.unwrap();
    for byte in text.bytes() {
        few.ws.feed(Message::Frame(Frame::message(vec![byte], OpCode::Data(Data::Continue), false))).await.unwrap();
    }
    few.ws.send(Message::Frame(Frame::message("", OpCode::Data(Data::Continue), true))).await.unwrap();
    assert_eq!(few.recv().await["id"], 5, "a frame in many pieces");
    few.silent().await;
}
