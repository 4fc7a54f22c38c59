//! How the server ends a session that it cannot serve, as it is on the wire.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Message, WebSocket};
use weft::auth::jwt::{Claims, mint};

use crate::support::{
    LogKind, PATIENCE, SECRET, Server, Socket, accepted, claims, eventually, publish, refused_with, seqs, token,
};

/// Asks for a WebSocket with these subprotocols, as a browser does: the libraries of the tests refuse an answer without a
/// subprotocol by themselves. Gives the head of the answer, and the first frame after it.
fn open(server: &Server, subprotocols: &str) -> (String, Message) {
    let host = server.url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "GET /v1/ws HTTP/1.1\r\nhost: {host}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         sec-websocket-protocol: {subprotocols}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let mut socket = WebSocket::from_raw_socket(stream, Role::Client, None);
    (String::from_utf8(head).unwrap(), socket.read().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_another_version_of_the_protocol_is_closed_4502() {
    let server = Server::start(LogKind::embedded());
    let bearer = format!("weft.bearer.{}", token("ada", ""));
    for offered in ["weft.v2".to_owned(), format!("weft.v0, weft.v2, {bearer}")] {
        let (head, first) = open(&server, &offered);
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert!(!head.to_ascii_lowercase().contains("sec-websocket-protocol"), "none of them is accepted: {head}");
        let Message::Close(Some(close)) = first else { panic!("{first:?}") };
        assert_eq!((u16::from(close.code), close.reason.as_str()), (4502, "the subprotocol is weft.v1"));
    }
    assert_eq!(server.metric("weft_connections").await, 0.0, "such a session never counts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_offers_the_version_among_others_or_none_at_all_is_let_in() {
    let server = Server::start(LogKind::embedded());
    let bearer = format!("weft.bearer.{}", token("ada", ""));
    for (offered, accepted) in [(format!("weft.v2, weft.v1, {bearer}"), true), (bearer.clone(), false)] {
        let (head, first) = open(&server, &offered);
        assert_eq!(head.to_ascii_lowercase().contains("sec-websocket-protocol: weft.v1"), accepted, "{head}");
        let welcome: Value = serde_json::from_str(first.to_text().unwrap()).unwrap();
        assert_eq!(welcome["type"], "welcome", "{welcome}");
    }
}

/// Publishes so much to `t` that a socket which does not read takes no more.
async fn fill(writer: &mut Socket) -> u64 {
    const EVENTS: u64 = 100;
    for seq in 1..=EVENTS {
        assert_eq!(writer.ask(publish("t", "x.large", json!("x".repeat(60_000)))).await["seq"], seq);
    }
    EVENTS
}

/// The seqs of `t` that come until the connection ends, dense from the first on.
async fn seqs_to_the_end(reader: &mut Socket) -> u64 {
    let mut last = 0;
    while let Ok(frame) = reader.next().await {
        if frame["type"] == "event" {
            assert_eq!(frame["seq"], last + 1, "{}", frame["seq"]);
            last += 1;
        }
    }
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_takes_no_byte_for_30_s_is_closed_4001_and_its_client_resumes_without_a_gap() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    let events = fill(&mut writer).await;
    let mut stuck = Socket::open_with_small_buffer(&server.url, &token("ada", "")).await;
    stuck.send(&json!({"type": "subscribe", "id": 1, "thread": "t", "after": 0})).await;
    let closed = async || server.metric(r#"weft_closes_total{code="4001"}"#).await == 1.0;
    eventually("it is given up", closed).await;

    // What was on its way arrives; the close frame does not, as the socket took nothing more.
    stuck.enlarge_buffer();
    let seen = seqs_to_the_end(&mut stuck).await;
    assert!(seen < events, "{seen}");
    let mut back = server.connect("ada").await;
    assert_eq!(back.subscribe("t", Some(seen)).await["recovered"], true);
    let rest = (events - seen) as usize;
    assert_eq!(seqs(&back.events(rest).await), (seen + 1..=events).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_for_which_more_than_4096_joined_threads_wait_is_closed_4001_and_finds_them_all_when_it_resumes() {
    const THREADS: usize = 4_097;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    writer.say("t", "so that the thread is there").await;
    let mut stuck = Socket::open_with_small_buffer(&server.url, &token("ada", "")).await;
    assert_eq!(stuck.subscribe("*", None).await["head"], json!({"t": 1}));
    for _ in 0..20 {
        accepted(&writer.ask(publish("t", "x.large", json!("x".repeat(60_000)))).await);
    }
    // Who publishes to a new thread is a member of it.
    let threads: Vec<Value> = (0..THREADS)
        .map(|n| json!({"type": "publish", "id": n, "thread": format!("new-{n}"), "kind": "x.a", "data": 1}))
        .collect();
    for frame in threads.chunks(500) {
        writer.send(&Value::Array(frame.to_vec())).await;
        for _ in frame {
            accepted(&writer.recv().await);
        }
    }
    stuck.enlarge_buffer();
    assert_eq!(stuck.closed().await, 4001);
    assert_eq!(stuck.reason, "more threads were joined than can wait: resume");

    let mut back = server.connect("ada").await;
    let subscribed = back.ask(json!({"type": "subscribe", "thread": "*"})).await;
    assert_eq!(subscribed["head"].as_object().unwrap().len(), 1 + THREADS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_cannot_be_checked_since_the_store_fails_is_no_bad_token_4006_and_503() {
    let mut server = Server::start(LogKind::embedded());
    // Whether ada's tokens are good stands in a file from now on.
    assert_eq!(server.admin("DELETE", "/v1/users/ada/sessions").await.0, 200);
    server.stop().await;
    server.up();
    server.ready().await;
    let mut socket = Socket::raw(&server.url, &[]).await.unwrap();
    let files = std::fs::read_dir(server.data().join("projections")).unwrap().map(|file| file.unwrap().path());
    let tables: Vec<_> = files.filter(|file| file.extension().is_some_and(|it| it == "sst")).collect();
    assert!(!tables.is_empty());
    for table in tables {
        std::fs::File::options().write(true).open(table).unwrap().set_len(0).unwrap();
    }

    let issued = Claims { iat: Some(weft::clock::now_s() + 2), ..claims("ada", "") };
    let good = mint(SECRET, &issued).unwrap();
    socket.send(&json!({"type": "connect", "id": 1, "token": good})).await;
    assert_eq!(socket.closed().await, 4006);
    let (status, problem) = server.http_with("GET", "/v1/threads", &good, None, &[]).await;
    refused_with(&problem, "unavailable");
    assert_eq!(status, 503);
}
