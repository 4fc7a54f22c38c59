//! The life of a connection: who gets in, what a bad frame or command costs, and how it ends.

mod burst;
mod closing;
mod descriptors;
mod drain;
mod limits;
mod order;
mod origin;
mod probes;
mod refresh;
mod requests;
mod revocation;
mod sessions;
pub mod tickets;
mod words;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::SinkExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{Frame, FrameHeader};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use weft::auth::jwt::{Claims, mint};

use crate::on_both_logs;
use crate::support::{
    LogKind, PATIENCE, SECRET, Server, Socket, claims, eventually, has, publish, refused, refused_with, token,
};

fn signed(claims: &Value, algorithm: Algorithm, key: &EncodingKey) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, key).unwrap()
}

fn hmac(claims: &Value) -> String {
    signed(claims, Algorithm::HS256, &EncodingKey::from_secret(SECRET.as_bytes()))
}

fn with_header(claims: &Value, header: &Header) -> String {
    jsonwebtoken::encode(header, claims, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap()
}

/// The status of an upgrade with a token, 101 if it came to be.
async fn upgrade_status(url: &str, token: &str) -> u16 {
    match Socket::raw(url, &[("Authorization", &format!("Bearer {token}"))]).await {
        Ok(_) => 101,
        Err(WsError::Http(reply)) => reply.status().as_u16(),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn tokens_that_are_not_valid_get_401_at_the_upgrade_4500_in_a_frame_and_401_over_http() {
    let server = Server::start(LogKind::embedded());
    let now = weft::clock::now_s();
    let good = json!({"sub": "ada", "tenant": "acme", "exp": now + 600});
    let with = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        hmac(&claims)
    };
    let without = |name: &str| {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(name);
        hmac(&claims)
    };
    let parts: Vec<String> = hmac(&good).split('.').map(str::to_owned).collect();
    // {"alg":"none","typ":"JWT"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", parts[1]);
    let bad = [
        ("no token at all", String::new()),
        ("not a token", "nonsense".into()),
        ("alg none", unsigned.clone()),
        ("alg none with a signature", format!("{unsigned}{}", parts[2])),
        ("another secret", signed(&good, Algorithm::HS256, &EncodingKey::from_secret(b"another secret"))),
        ("expired", with("exp", json!(now - 60))),
        ("not yet valid", with("nbf", json!(now + 600))),
        ("no sub", without("sub")),
        ("no tenant", without("tenant")),
        ("no exp", without("exp")),
        ("a sub with a slash", with("sub", json!("a/b"))),
        ("a sub with a space", with("sub", json!("a b"))),
        ("an empty tenant", with("tenant", json!(""))),
        ("a sub that is too long", with("sub", json!("x".repeat(129)))),
        ("the server's own sub", with("sub", json!("weft"))),
        ("an extension that must be understood", {
            with_header(&good, &Header { crit: Some(vec!["exp".to_owned()]), ..Header::default() })
        }),
        ("another kind of token", with_header(&good, &Header { typ: Some("dpop+jwt".into()), ..Header::default() })),
    ];
    for (what, token) in &bad {
        assert_eq!(upgrade_status(&server.url, token).await, 401, "{what}");
        let mut socket = Socket::raw(&server.url, &[]).await.unwrap();
        socket.send(&json!({"type": "connect", "id": 1, "token": token})).await;
        assert_eq!(socket.closed().await, 4500, "{what}");
        let (_, body) = server.http_with("GET", "/v1/threads", token, None, &[]).await;
        refused_with(&body, "unauthenticated");
    }
    for (what, token) in [
        ("good", hmac(&good)),
        ("HS512", signed(&good, Algorithm::HS512, &EncodingKey::from_secret(SECRET.as_bytes()))),
        ("expired within the leeway", with("exp", json!(now - 10))),
        ("valid within the leeway", with("nbf", json!(now + 10))),
        ("an end with a fraction", with("exp", json!(now as f64 + 600.5))),
        ("an access token", with_header(&good, &Header { typ: Some("at+jwt".into()), ..Header::default() })),
    ] {
        assert_eq!(upgrade_status(&server.url, &token).await, 101, "{what}");
    }
}

fn openssl(folder: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").current_dir(folder).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A key pair of a kind, as `<name>.pem` and `<name>.pub`.
fn key_pair(folder: &Path, name: &str, arguments: &[&str]) -> (PathBuf, Vec<u8>) {
    let (private, public) = (format!("{name}.pem"), format!("{name}.pub"));
    openssl(folder, &[&["genpkey", "-out", &private], arguments].concat());
    openssl(folder, &["pkey", "-in", &private, "-pubout", "-out", &public]);
    (folder.join(public), std::fs::read(folder.join(private)).unwrap())
}

#[tokio::test]
async fn public_keys_verify_their_own_algorithms_and_never_serve_as_a_shared_secret() {
    let folder = tempfile::tempdir().unwrap();
    let good = json!({"sub": "ada", "tenant": "acme", "exp": weft::clock::now_s() + 600});
    let rsa = key_pair(folder.path(), "rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]);
    let ec = key_pair(folder.path(), "ec", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    let ed = key_pair(folder.path(), "ed", &["-algorithm", "ED25519"]);
    let sign = [
        signed(&good, Algorithm::RS256, &EncodingKey::from_rsa_pem(&rsa.1).unwrap()),
        signed(&good, Algorithm::ES256, &EncodingKey::from_ec_pem(&ec.1).unwrap()),
        signed(&good, Algorithm::EdDSA, &EncodingKey::from_ed_pem(&ed.1).unwrap()),
    ];
    for (n, public) in [rsa.0, ec.0, ed.0].iter().enumerate() {
        let server = Server::start_with(LogKind::embedded(), &["--jwt-key", public.to_str().unwrap()]);
        for (m, token) in sign.iter().enumerate() {
            assert_eq!(upgrade_status(&server.url, token).await, if n == m { 101 } else { 401 }, "key {n}, token {m}");
        }
        let as_secret = signed(&good, Algorithm::HS256, &EncodingKey::from_secret(&std::fs::read(public).unwrap()));
        assert_eq!(upgrade_status(&server.url, &as_secret).await, 401, "the public key {n} as a secret");
    }
}

#[tokio::test]
async fn issuer_and_audience_are_required_when_configured() {
    let server = Server::start_with(LogKind::embedded(), &["--jwt-issuer", "us", "--jwt-audience", "weft"]);
    let mint = |iss: Option<&str>, aud: Option<&str>| {
        mint(SECRET, &Claims { iss: iss.map(Into::into), aud: aud.map(Into::into), ..claims("ada", "") }).unwrap()
    };
    assert_eq!(upgrade_status(&server.url, &mint(Some("us"), Some("weft"))).await, 101);
    for (iss, aud) in
        [(None, Some("weft")), (Some("us"), None), (Some("them"), Some("weft")), (Some("us"), Some("others"))]
    {
        assert_eq!(upgrade_status(&server.url, &mint(iss, aud)).await, 401, "{iss:?} {aud:?}");
    }
}

#[tokio::test]
async fn a_token_comes_by_header_by_subprotocol_or_by_a_connect_frame_and_never_by_the_query() {
    let server = Server::start(LogKind::embedded());
    let mut by_protocol =
        Socket::raw(&server.url, &[("Sec-WebSocket-Protocol", &format!("weft.v1, weft.bearer.{}", token("ada", "")))])
            .await
            .unwrap();
    let welcome = by_protocol.recv().await;
    has(&welcome, json!({"type": "welcome", "user": "ada", "tenant": "acme"}));
    assert!(
        welcome["id"].is_null() && welcome["heartbeat_ms"] == 25_000 && welcome["limits"]["data_bytes"] == 65_536,
        "{welcome}"
    );
    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    let early = by_frame.ask(json!({"type": "subscribe", "thread": "t"})).await;
    refused_with(&early, "unauthenticated");
    let early = by_frame.ask(publish("t", "user_message", json!({"content": "hi"}))).await;
    refused_with(&early, "unauthenticated");
    let welcome = by_frame.ask(json!({"type": "connect", "token": token("ben", "")})).await;
    has(&welcome, json!({"type": "welcome", "user": "ben"}));
    refused_with(&by_frame.ask(json!({"type": "connect", "token": token("ben", "")})).await, "conflict");
    let reply = reqwest::get(format!("{}/v1/threads?token={}", server.url, token("ada", ""))).await.unwrap();
    assert_eq!(reply.status(), 401);
    let mut other_version = Socket::raw(
        &server.url,
        &[("Sec-WebSocket-Protocol", "weft.v1"), ("Authorization", &format!("Bearer {}", token("ada", "")))],
    )
    .await
    .unwrap();
    assert_eq!(other_version.recv().await["type"], "welcome");
}

#[tokio::test]
async fn a_ticket_lets_its_user_in_once() {
    let server = Server::start(LogKind::embedded());
    let status = async |query: &str| match Socket::raw_at(&server.url, &format!("/v1/ws?{query}"), &[]).await {
        Ok(_) => 101,
        Err(WsError::Http(reply)) => reply.status().as_u16(),
        Err(error) => panic!("{error}"),
    };
    let (code, problem) = server.http("POST", "/v1/tickets", "ada", Some(json!({"for": "ben"}))).await;
    assert_eq!(code, 400, "what is asked for would be passed over: {problem}");
    let (code, given) = server.http("POST", "/v1/tickets", "ada", None).await;
    assert_eq!(code, 201, "{given}");
    let ticket = given["ticket"].as_str().unwrap();
    let until = weft::clock::parse_rfc3339(given["expires_at"].as_str().unwrap()).unwrap();
    assert!(until > weft::clock::now_ms());
    let mut socket = Socket::raw_at(&server.url, &format!("/v1/ws?ticket={ticket}"), &[]).await.unwrap();
    let welcome = socket.recv().await;
    has(&welcome, json!({"type": "welcome", "user": "ada", "tenant": "acme"}));
    assert_eq!(socket.say("t", "with the rights of the token it was made for").await, 1);
    assert_eq!(status(&format!("ticket={ticket}")).await, 401, "used twice");
    assert_eq!(status("ticket=guessed").await, 401);
    assert_eq!(status(&format!("token={}", token("ada", ""))).await, 400, "a token is never taken from a query");
    let reply = reqwest::Client::new().post(format!("{}/v1/tickets", server.url)).send().await.unwrap();
    assert_eq!(reply.status(), 401, "a ticket is for somebody");
}

#[tokio::test]
async fn a_page_of_another_origin_is_refused() {
    let server = Server::start_with(LogKind::embedded(), &["--allow-origin", "https://app.example,https://b.example"]);
    let bearer = format!("Bearer {}", token("ada", ""));
    let status =
        async |origin: &str| match Socket::raw(&server.url, &[("Authorization", &bearer), ("Origin", origin)]).await {
            Ok(_) => 101,
            Err(WsError::Http(reply)) => reply.status().as_u16(),
            Err(error) => panic!("{error}"),
        };
    assert_eq!(status("https://app.example").await, 101);
    assert_eq!(status("https://b.example").await, 101);
    assert_eq!(status(&server.url).await, 101, "our own origin");
    assert_eq!(status("https://evil.example").await, 403);
    assert_eq!(status("null").await, 403);
}

#[tokio::test]
async fn a_bad_command_gets_its_code_and_field_and_the_session_lives_on() {
    let server = Server::start(LogKind::embedded());
    let mut socket = server.connect("ada").await;
    let message = |more: Value| {
        let mut command = publish("t", "user_message", json!({"content": "x"}));
        command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        command
    };
    let cases = [
        (json!({"type": "dance"}), "bad_request", "type"),
        (json!({"type": "ping", "loud": true}), "bad_request", "loud"),
        (json!({"type": "subscribe"}), "bad_request", "thread"),
        (json!({"type": "subscribe", "thread": "a b"}), "bad_request", "thread"),
        (json!({"type": "subscribe", "thread": "t", "after": -1}), "bad_request", "after"),
        (json!({"type": "subscribe", "thread": "t", "after": 0, "last": 1}), "bad_request", "last"),
        (json!({"type": "subscribe", "thread": "nowhere"}), "not_found", "thread"),
        (json!({"type": "unsubscribe", "thread": "nowhere"}), "not_found", "thread"),
        (message(json!({"thread": "@tenant"})), "forbidden", "thread"),
        (message(json!({"thread": "@everyone"})), "bad_request", "thread"),
        (message(json!({"thread": 5})), "bad_request", "thread"),
        (message(json!({"kind": "nonsense"})), "bad_request", "kind"),
        (message(json!({"kind": "x."})), "bad_request", "kind"),
        (message(json!({"kind": "member_added", "data": {"user": "eve"}})), "bad_request", "kind"),
        (message(json!({"data": "text"})), "bad_request", "data.content"),
        (message(json!({"data": {}})), "bad_request", "data.content"),
        (message(json!({"data": {"content": [{"text": "no type"}]}})), "bad_request", "data.content"),
        (message(json!({"data": {"content": "x".repeat(70_000)}})), "too_large", "data"),
        (message(json!({"key": "k".repeat(129)})), "bad_request", "key"),
        (json!({"type": "subscribe", "thread": "*", "after": 3}), "bad_request", "after"),
        (message(json!({"priority": "urgent"})), "bad_request", "priority"),
        (message(json!({"parent": 0})), "bad_request", "parent"),
        (message(json!({"parent": 99})), "bad_request", "parent"),
        (message(json!({"run": ""})), "bad_request", "run"),
        (message(json!({"colour": "red"})), "bad_request", "colour"),
        (message(json!({"kind": "agent_started", "run": "r", "data": {"agent": "a"}})), "forbidden", "kind"),
    ];
    socket.say("t", "so that the thread is there").await;
    for (command, code, field) in cases {
        let answer = socket.ask(command.clone()).await;
        refused(&answer, code, field);
        assert!(answer["message"].is_string() && answer["temporary"] == false, "{answer}");
    }
    let mut agent = server.connect_as("bot", "agent publish").await;
    for (command, field) in [
        (json!({"type": "publish", "thread": "t", "kind": "agent_started", "data": {"agent": "a"}}), "run"),
        (json!({"type": "publish", "thread": "t", "kind": "agent_started", "run": "r", "data": {}}), "data.agent"),
        (
            json!({"type": "publish", "thread": "t", "kind": "tool_executing", "run": "r", "data": {"tool": "t"}}),
            "data.call",
        ),
    ] {
        let answer = agent.ask(command).await;
        refused(&answer, "bad_request", field);
    }
    // Duplicate fields cannot be made with a JSON library.
    socket.send_text(r#"{"type":"ping","id":77,"id":78}"#).await;
    let answer = socket.recv().await;
    refused(&answer, "bad_request", "id");
    // Half of a surrogate pair is in no Unicode string.
    socket.send_text(r#"{"type":"publish","id":79,"thread":"t","kind":"x.a","data":"\ud800"}"#).await;
    let answer = socket.recv().await;
    has(&answer, json!({"id": 79, "code": "bad_request", "field": "data"}));
    socket.send_text("[]").await;
    refused_with(&socket.recv().await, "bad_request");
    socket.send(&Value::Array(vec![json!({"type": "ping", "id": 1}); 1_001])).await;
    refused_with(&socket.recv().await, "too_large");
    assert_eq!(socket.say("t", "still here").await, 2);
}

#[tokio::test]
async fn an_array_s_commands_are_answered_each_on_its_own_and_take_effect_in_order() {
    let server = Server::start(LogKind::embedded());
    let mut socket = server.connect("ada").await;
    let commands = json!([
        {"type": "publish", "id": 1, "thread": "new", "kind": "x.a", "data": 1},
        {"type": "publish", "id": 2, "thread": "new", "kind": "nonsense", "data": 1},
        {"type": "subscribe", "id": 3, "thread": "new", "after": 0},
        "not a command",
        {"type": "publish", "id": 4, "thread": "new", "kind": "x.b", "data": [1, 2]},
        {"type": "ping", "id": 5}
    ]);
    socket.send(&commands).await;
    let mut answers = std::collections::BTreeMap::new();
    let mut events = Vec::new();
    while answers.len() < 5 || events.len() < 2 {
        let frame = socket.recv().await;
        match (&frame["id"], frame["type"].as_str().unwrap()) {
            (Value::Number(id), _) => drop(answers.insert(id.as_i64().unwrap(), frame.clone())),
            (_, "event") => events.push(frame["seq"].as_u64().unwrap()),
            (_, "error") => assert_eq!(frame["code"], "bad_request"),
            _ => {}
        }
    }
    assert_eq!(answers[&1]["seq"], 1);
    assert_eq!(answers[&2]["field"], "kind");
    assert_eq!(answers[&3]["type"], "subscribed", "the thread was made by the command before");
    assert_eq!(answers[&4]["seq"], 2);
    assert_eq!(answers[&5]["type"], "pong");
    assert_eq!(events, [1, 2]);
}

#[tokio::test]
async fn a_malformed_frame_closes_with_the_code_that_says_what_it_was() {
    let server = Server::start(LogKind::embedded());
    for text in ["hello", "{", "5", "null", r#"{"type":"ping","id":1} trailing"#] {
        let mut socket = server.connect("ada").await;
        socket.send_text(text).await;
        assert_eq!(socket.closed().await, 4501, "{text:?}");
    }
    let mut binary = server.connect("ada").await;
    binary.ws.send(Message::binary(b"{}".to_vec())).await.unwrap();
    assert_eq!(binary.closed().await, 1003);
    let mut no_utf8 = server.connect("ada").await;
    no_utf8.ws.send(Message::Frame(Frame::message(vec![0xff, 0xfe], OpCode::Data(Data::Text), true))).await.unwrap();
    assert_eq!(no_utf8.closed().await, 1007);
    let mut too_large = server.connect("ada").await;
    // The server may close before it has read all of it.
    drop(too_large.ws.send(Message::text("x".repeat(300_000))).await);
    assert_eq!(too_large.closed().await, 1009);
    let mut reserved = server.connect("ada").await;
    let header = FrameHeader { rsv1: true, opcode: OpCode::Data(Data::Text), ..FrameHeader::default() };
    reserved.ws.send(Message::Frame(Frame::from_payload(header, "{}".into()))).await.unwrap();
    assert_eq!(reserved.closed().await, 1002);
    drop((binary, no_utf8, too_large, reserved));
    eventually("no session is left", async || server.metric("weft_connections").await == 0.0).await;
}

#[tokio::test]
async fn a_frame_cut_into_fragments_is_one_frame() {
    let server = Server::start(LogKind::embedded());
    let mut socket = server.connect("ada").await;
    let text = json!({"type": "ping", "id": 5}).to_string();
    let (head, tail) = text.split_at(7);
    socket.ws.send(Message::Frame(Frame::message(head.to_owned(), OpCode::Data(Data::Text), false))).await.unwrap();
    socket.ws.send(Message::Frame(Frame::message(tail.to_owned(), OpCode::Data(Data::Continue), true))).await.unwrap();
    assert_eq!(socket.recv().await["id"], 5);
}

#[tokio::test]
async fn a_session_without_credentials_is_closed_4004() {
    let server = Server::start(LogKind::embedded());
    let mut socket = Socket::raw(&server.url, &[]).await.unwrap();
    assert_eq!(socket.closed().await, 4004);
}

#[tokio::test]
async fn a_token_s_end_is_announced_refresh_moves_it_and_without_one_the_session_is_closed_4003() {
    let server = Server::start(LogKind::embedded());
    let ends = |user: &str, exp: u64| mint(SECRET, &Claims { exp, ..claims(user, "") }).unwrap();
    let now = weft::clock::now_s();
    let mut dying = Socket::open(&server.url, &ends("ada", now - 27)).await;
    let mut refreshed = Socket::open(&server.url, &ends("ada", now - 27)).await;
    let mut stranger = Socket::open(&server.url, &ends("ada", now + 600)).await;
    let answer = refreshed.ask(json!({"type": "refresh", "token": token("ada", "")})).await;
    assert_eq!(answer["type"], "refreshed", "{answer}");
    assert!(answer["expires_at"].is_string());
    stranger.send(&json!({"type": "refresh", "id": 1, "token": token("ben", "")})).await;
    assert_eq!(stranger.closed().await, 4500, "another user's token");
    assert_eq!(dying.recv().await["type"], "expiring");
    assert_eq!(dying.closed().await, 4003);
    refreshed.answers().await;
}

#[tokio::test]
async fn the_end_of_a_token_is_announced_sixty_seconds_ahead() {
    let server = Server::start(LogKind::embedded());
    let exp = weft::clock::now_s() + 63;
    let mut socket = Socket::open(&server.url, &mint(SECRET, &Claims { exp, ..claims("ada", "") }).unwrap()).await;
    let got = socket.recv().await;
    let ahead = exp - weft::clock::now_s();
    assert_eq!(got, json!({"type": "expiring", "expires_at": weft::clock::rfc3339(exp * 1_000)}));
    assert!((50..=60).contains(&ahead), "{ahead} s ahead");
    // Refreshed, it is announced again when the new one's end is near.
    let exp = weft::clock::now_s() + 61;
    let soon = mint(SECRET, &Claims { exp, ..claims("ada", "") }).unwrap();
    assert_eq!(socket.ask(json!({"type": "refresh", "token": soon})).await["type"], "refreshed");
    assert_eq!(socket.recv().await["expires_at"], weft::clock::rfc3339(exp * 1_000));
}

#[tokio::test]
async fn a_token_without_an_end_in_sight_is_no_trouble() {
    let server = Server::start(LogKind::embedded());
    // Milliseconds where seconds belong: a common mistake, and still a valid token.
    let far = mint(SECRET, &Claims { exp: weft::clock::now_ms(), ..claims("ada", "") }).unwrap();
    let mut socket = Socket::open(&server.url, &far).await;
    assert_eq!(socket.ask(json!({"type": "refresh", "token": far})).await["type"], "refreshed");
}

#[tokio::test]
async fn a_refresh_with_fewer_rights_ends_what_they_allowed() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "not for everybody").await;
    let mut analyst = server.connect_as("ana", "analyst").await;
    analyst.subscribe("t", None).await;
    analyst.recv_type("caught_up").await;
    let answer = analyst.ask(json!({"type": "refresh", "token": token("ana", "")})).await;
    assert_eq!(answer["type"], "refreshed");
    let ended = analyst.recv_type("error").await;
    has(&ended, json!({"thread": "t", "code": "not_found"}));
    server.connect("ada").await.say("t", "still not").await;
    refused_with(&analyst.ask(json!({"type": "unsubscribe", "thread": "t"})).await, "not_found");
    analyst.answers().await;
}

fn tcp(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.trim_start_matches("http://")).unwrap()
}

/// All that comes until the server closes. Fails if it does not.
fn read_until_closed(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reply = Vec::new();
    match stream.read_to_end(&mut reply) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server keeps the connection: {error}"),
    }
    String::from_utf8_lossy(&reply).into_owned()
}

/// One response, over a connection that is kept.
fn read_response(stream: &mut TcpStream) -> String {
    let mut reply = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&reply).to_ascii_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.expect("it says how long it is").parse().unwrap() {
                return String::from_utf8_lossy(&reply).into_owned();
            }
        }
        let mut bytes = [0; 4_096];
        match stream.read(&mut bytes).unwrap() {
            0 => panic!("the server closes within a response: {text}"),
            read => reply.extend_from_slice(&bytes[..read]),
        }
    }
}

/// Sends bytes as they are and gives all that comes back until the server closes.
fn raw_http(server: &Server, bytes: &[u8]) -> String {
    let mut stream = tcp(server);
    stream.write_all(bytes).unwrap();
    read_until_closed(stream)
}

/// Sends a header that never ends, a byte at a time, until the server closes.
fn drip(mut stream: TcpStream) {
    let begin = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    loop {
        assert!(begin.elapsed() < PATIENCE, "the server keeps the connection");
        // Until the server closes, reading is no more than the pause between two bytes.
        match stream.read(&mut [0; 1_024]) {
            Ok(0) => return,
            Ok(_) => continue,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
        if stream.write_all(b"y").is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_oversized_headers_do_not_hold_a_connection() {
    const CONNECTIONS: usize = 3;
    let server = Server::start_verbose(LogKind::embedded(), &["--max-connections", &CONNECTIONS.to_string()]);
    let many: String = (0..70).map(|n| format!("x-{n}: 1\r\n")).collect();
    let reply = raw_http(&server, format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n").as_bytes());
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
    let reply =
        raw_http(&server, format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(20_000)).as_bytes());
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
    // Three that are answered hold all connections, and no earlier one is left. Who sends nothing more, half a request, or a
    // byte now and then keeps its own until the server has had enough.
    let healthz = b"GET /healthz HTTP/1.1\r\nconnection: close\r\nhost: x\r\n\r\n";
    let threads = b"GET /v1/threads HTTP/1.1\r\nconnection: close\r\nhost: x\r\n\r\n";
    let (idle, mut half, mut dripping) = (admitted(&server).await, admitted(&server).await, admitted(&server).await);
    half.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n").unwrap();
    dripping.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ").unwrap();
    let dripping = std::thread::spawn(move || drip(dripping));
    assert!(raw_http(&server, threads).starts_with("HTTP/1.1 503"), "all {CONNECTIONS} connections are held");
    assert!(raw_http(&server, healthz).starts_with("HTTP/1.1 200"), "and probes are answered");
    read_until_closed(idle);
    read_until_closed(half);
    dripping.join().unwrap();
    // Each for its headers, which is long before a connection ends over which nothing moves.
    let lines_with = |words: &str| server.errors().lines().filter(|line| line.contains(words)).count();
    eventually("the server says why", async || lines_with("read header from client timeout") >= CONNECTIONS).await;
    eventually("they are free again", async || raw_http(&server, threads).starts_with("HTTP/1.1 401")).await;
    assert_eq!(read_until_closed(tcp(&server)), "", "who never sends anything is not kept either");
    assert_eq!(lines_with("a connection was stalled"), 0, "{}", server.errors());
}

/// A connection that has its place within the limit: a request over it was answered, and it was kept.
async fn admitted(server: &Server) -> TcpStream {
    let mut connection = None;
    eventually("there is a place", async || {
        let mut stream = tcp(server);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /v1/threads HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let is_admitted = read_response(&mut stream).starts_with("HTTP/1.1 401");
        connection = is_admitted.then_some(stream);
        is_admitted
    })
    .await;
    connection.unwrap()
}

#[tokio::test]
async fn beyond_the_connection_limit_a_client_is_told_and_a_place_that_is_left_is_free_again() {
    let server = Server::start_with(LogKind::embedded(), &["--max-connections", "2"]);
    let first = server.connect("ada").await;
    let mut second = server.connect("ada").await;
    let rejection = Socket::raw(&server.url, &[("Authorization", &format!("Bearer {}", token("ada", "")))]).await;
    assert!(matches!(rejection, Err(WsError::Http(reply)) if reply.status() == 503));
    drop(first);
    eventually("the place is free", async || {
        Socket::raw(&server.url, &[("Authorization", &format!("Bearer {}", token("ada", "")))]).await.is_ok()
    })
    .await;
    second.answers().await;
}

on_both_logs!(sigterm_under_load_loses_no_answer_and_closes_1001, |log| async move {
    let mut server = Server::start_unlimited(log);
    let mut writers = Vec::new();
    for n in 0..4 {
        let mut socket = server.connect("ada").await;
        socket.say(&format!("t{n}"), "begin").await;
        writers.push(tokio::spawn(async move {
            let (mut answered, mut sent) = (1, 1u64);
            loop {
                let mut command = publish(&format!("t{n}"), "x.load", json!({"n": sent}));
                command["id"] = json!(1_000 + sent);
                let lost = socket.ws.send(Message::text(command.to_string())).await.is_err();
                sent += 1;
                // Up to 64 are out at once; once the connection is lost, what it still holds is read.
                while lost || sent - answered >= 64 {
                    match socket.next().await {
                        Ok(frame) if frame["type"] == "published" => answered = frame["seq"].as_u64().unwrap(),
                        Ok(frame) => panic!("{frame}"),
                        Err(code) => return (answered, code),
                    }
                }
            }
        }));
    }
    eventually("the load is on", async || server.metric("weft_project_events_total").await > 2_000.0).await;
    server.signal("TERM");
    let begin = Instant::now();
    let mut answered = Vec::new();
    for writer in writers {
        let (seq, code) = writer.await.unwrap();
        assert_eq!(code, 1001);
        answered.push(seq);
    }
    assert!(server.ended().await.success());
    assert!(begin.elapsed() < Duration::from_secs(15), "a drain has its limit");
    server.up();
    server.ready().await;
    for (n, answered) in answered.iter().enumerate() {
        let head = server.http("GET", &format!("/v1/threads/t{n}"), "ada", None).await.1["head"].as_u64().unwrap();
        assert_eq!(head, *answered, "what was accepted was answered, and what was answered is there");
    }
});
