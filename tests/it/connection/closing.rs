//! How the server ends a session that it cannot serve, as it is on the wire.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Message, WebSocket};

use crate::support::{LogKind, PATIENCE, Server, token};

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
