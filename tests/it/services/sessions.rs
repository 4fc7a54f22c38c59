//! Sessions of an auth service: who gets in with one, and what happens when the service fails.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error as WsError;

use crate::support::auth_service::{AuthService, Behaviour, INTROSPECT};
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused, refused_with, token};

const APP: &str = "https://app.example";

async fn service_and_server() -> (AuthService, Server) {
    let service = AuthService::start().await;
    let server = Server::start_with(
        LogKind::embedded(),
        &["--introspect-url", &service.url(INTROSPECT), "--allow-origin", APP, "--rate-user", "0"],
    );
    server.ready().await;
    (service, server)
}

/// A request with these headers; gives the status, the body and how long it took.
async fn get(server: &Server, headers: &[(&str, &str)]) -> (u16, Value, Duration) {
    let mut request = reqwest::Client::new().get(format!("{}/v1/threads", server.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let begin = Instant::now();
    let reply = request.send().await.unwrap();
    let (status, retry_after) = (reply.status().as_u16(), reply.headers().contains_key("retry-after"));
    assert_eq!(retry_after, status == 503, "{status}");
    (status, reply.json().await.unwrap(), begin.elapsed())
}

async fn ask(server: &Server, session: &str) -> (u16, Value, Duration) {
    get(server, &[("Authorization", &format!("Session {session}"))]).await
}

async fn status(server: &Server, session: &str) -> u16 {
    ask(server, session).await.0
}

async fn connect(server: &Server, session: &str) -> Socket {
    let mut socket = Socket::raw(&server.url, &[("Authorization", &format!("Session {session}"))]).await.unwrap();
    assert_eq!(socket.recv().await["type"], "welcome");
    socket
}

async fn dependency(server: &Server) -> Value {
    let (status, ready) = server.http("GET", "/readyz", "x", None).await;
    assert_eq!(status, 200, "{ready}");
    ready["dependencies"][0].clone()
}

#[tokio::test]
async fn a_session_lets_its_user_in_by_header_and_by_frame_with_the_rights_that_it_says() {
    let (service, server) = service_and_server().await;
    service.log_in("s-ada", "ada");
    service.log_in_with("s-root", "root", json!({"scope": "admin"}));
    let mut ada = connect(&server, "s-ada").await;
    assert_eq!(ada.say("t", "hello").await, 1);
    let (_, sessions, _) = ask(&server, "s-ada").await;
    assert_eq!(sessions["threads"][0]["thread"], "t", "{sessions}");

    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    let welcome = by_frame.ask(json!({"type": "connect", "session": "s-ada"})).await;
    has(&welcome, json!({"type": "welcome", "user": "ada"}));
    service.log_in("s-ada-2", "ada");
    let refreshed = by_frame.ask(json!({"type": "refresh", "session": "s-ada-2"})).await;
    assert_eq!(refreshed["type"], "refreshed", "{refreshed}");
    by_frame.send(&json!({"type": "refresh", "id": 9, "session": "s-root"})).await;
    assert_eq!(by_frame.closed().await, 4500, "another user's");

    let admin = |session| [("Authorization", format!("Session {session}"))];
    for (session, expected) in [("s-root", 200), ("s-ada", 403)] {
        let request = reqwest::Client::new().get(format!("{}/v1/sessions", server.url));
        let [(name, value)] = admin(session);
        assert_eq!(request.header(name, value).send().await.unwrap().status(), expected, "{session}");
    }
    assert_eq!(server.http("GET", "/v1/threads", "ada", None).await.0, 200, "tokens are good beside sessions");
}

#[tokio::test]
async fn who_is_known_only_after_the_service_was_asked_may_send_large_frames() {
    let (service, server) = service_and_server().await;
    service.log_in("s", "ada");
    let mut ada = Socket::raw(&server.url, &[]).await.unwrap();
    has(&ada.ask(json!({"type": "connect", "session": "s"})).await, json!({"type": "welcome", "user": "ada"}));
    assert_eq!(service.asked(INTROSPECT), 1, "it was not known");
    assert_eq!(ada.say("t", &"x".repeat(20 << 10)).await, 1);
}

#[tokio::test]
async fn commands_that_wait_for_a_connect_are_counted_once_it_is_known_whose_they_are() {
    let service = AuthService::start().await;
    service.log_in("s", "ada");
    let arguments = ["--introspect-url", &service.url(INTROSPECT), "--rate-user", "5"];
    let server = Server::start_with(LogKind::embedded(), &arguments);
    server.ready().await;
    let mut ada = Socket::raw(&server.url, &[]).await.unwrap();
    let mut all = vec![json!({"type": "connect", "id": 0, "session": "s"})];
    let said = publish("t", "user_message", json!({"content": "hi"}));
    all.extend((1..=60).map(|id| {
        let mut said = said.clone();
        said["id"] = json!(id);
        said
    }));
    ada.send(&all.into()).await;
    has(&ada.recv().await, json!({"type": "welcome", "id": 0, "user": "ada"}));
    assert_eq!(service.asked(INTROSPECT), 1, "it was not known");
    let mut answers = Vec::new();
    for _ in 1..=60 {
        answers.push(ada.recv().await);
    }
    answers.sort_by_key(|answer| answer["id"].as_i64().unwrap());
    assert!(answers[..25].iter().all(|answer| answer["type"] == "published"), "five seconds of them: {answers:?}");
    assert!(answers[25..].iter().any(|answer| answer["code"] == "rate_limited"), "{answers:?}");
}

#[tokio::test]
async fn what_is_no_session_lets_nobody_in() {
    let (service, server) = service_and_server().await;
    service.log_in_with("expired", "ada", json!({"exp": 1}));
    service.log_in_with("nobody", "ada", json!({"sub": null}));
    service.log_in_with("homeless", "ada", json!({"tenant": null}));
    service.log_in_with("server", "weft", json!({}));
    for session in ["unknown", "expired", "nobody", "homeless", "server", "", "a b", &"x".repeat(5_000)] {
        let (status, problem, _) = ask(&server, session).await;
        assert_eq!(status, 401, "{session}: {problem}");
        refused_with(&problem, "unauthenticated");
    }
    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    for (command, field) in [(json!({}), "token"), (json!({"token": "x", "session": "y"}), "session")] {
        let mut connect = json!({"type": "connect"});
        connect.as_object_mut().unwrap().extend(command.as_object().unwrap().clone());
        refused(&by_frame.ask(connect).await, "bad_request", field);
    }
    by_frame.send(&json!({"type": "connect", "id": 1, "session": "unknown"})).await;
    assert_eq!(by_frame.closed().await, 4500);

    let without = Server::start(LogKind::embedded());
    assert_eq!(status(&without, "s").await, 401);
    // What cannot be a session is not asked for; the first refusal may still be known in the end.
    assert!((5..=6).contains(&service.asked(INTROSPECT)), "{}", service.asked(INTROSPECT));
}

#[tokio::test]
async fn a_cookie_counts_only_for_pages_that_may_use_it() {
    let (service, server) = service_and_server().await;
    service.log_in("s", "ada");
    let cookie = ("Cookie", "theme=dark; weft_session=s");
    let own = server.url.clone();
    for (origin, http, socket) in
        [(Some(APP), 200, 101), (Some(&*own), 200, 101), (Some("https://evil.example"), 401, 403)]
    {
        let headers: Vec<_> = [cookie].into_iter().chain(origin.map(|origin| ("Origin", origin))).collect();
        let (status, body, _) = get(&server, &headers).await;
        assert_eq!(status, http, "{origin:?}: {body}");
        let opened = match Socket::raw(&server.url, &headers).await {
            Ok(mut opened) => {
                has(&opened.recv().await, json!({"type": "welcome", "user": "ada"}));
                101
            }
            Err(WsError::Http(reply)) => reply.status().as_u16(),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(opened, socket, "{origin:?}");
    }
    assert_eq!(get(&server, &[cookie]).await.0, 401);
    assert_eq!(get(&server, &[cookie, ("Sec-Fetch-Site", "same-origin")]).await.0, 200);
    assert_eq!(get(&server, &[cookie, ("Sec-Fetch-Site", "cross-site")]).await.0, 401);

    let reply = reqwest::Client::new().get(format!("{}/v1/threads", server.url)).header("Origin", APP).send().await;
    assert_eq!(reply.unwrap().headers()["access-control-allow-credentials"], "true");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_is_asked_once_for_all_who_come_with_a_session() {
    let (service, server) = service_and_server().await;
    service.log_in("s", "ada");
    for asked in join_all((0..50).map(|_| status(&server, "s"))).await {
        assert_eq!(asked, 200);
    }
    connect(&server, "s").await;
    assert_eq!(service.asked(INTROSPECT), 1);
    for asked in join_all((0..20).map(|_| status(&server, "none"))).await {
        assert_eq!(asked, 401);
    }
    assert!(service.asked(INTROSPECT) <= 3, "a refusal is kept for a second: {}", service.asked(INTROSPECT));
    service.log_in("none", "ada");
    eventually("and no longer", async || status(&server, "none").await == 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_over_ends_its_connections_within_half_a_minute_and_no_others() {
    let (service, server) = service_and_server().await;
    service.log_in("s", "ada");
    service.log_in("other", "ada");
    let (mut socket, mut other) = (connect(&server, "s").await, connect(&server, "other").await);
    assert_eq!(other.say("t", "hello").await, 1);
    let mut by_token = server.connect("ada").await;
    let path = format!("{}/v1/threads/t/stream?after=0", server.url);
    let reply = reqwest::Client::new().get(path).header("Authorization", "Session s").send().await.unwrap();
    let mut stream = EventStream::over(reply);
    assert_eq!(stream.next().await.unwrap().json()["seq"], 1);

    service.log_out("s");
    let begin = Instant::now();
    assert_eq!(socket.closed().await, 4504);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(stream.next().await.unwrap().json()["code"], "unauthenticated");
    assert_eq!(stream.next().await, None);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    assert_eq!(status(&server, "s").await, 401);
    for stays in [&mut other, &mut by_token] {
        stays.answers().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_service_is_away_nobody_gets_in_who_is_in_stays_and_then_it_is_as_before() {
    let (mut service, server) = service_and_server().await;
    service.log_in("s", "ada");
    let mut ada = connect(&server, "s").await;
    service.gone().await;

    // Each a session of its own: none is known.
    for n in 0..8 {
        let (status, problem, took) = ask(&server, &format!("new-{n}")).await;
        assert_eq!(status, 503, "{problem}");
        refused_with(&problem, "unavailable");
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    let now = dependency(&server).await;
    has(&now, json!({"name": "introspection", "ok": false}));
    assert_ne!(now["breaker"], "closed", "{now}");
    assert_eq!(ada.say("t", "who is in stays").await, 1);
    assert_eq!(status(&server, "s").await, 200, "it was asked for less than 30 s ago");
    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    by_frame.send(&json!({"type": "connect", "id": 1, "session": "new"})).await;
    assert_eq!(by_frame.closed().await, 4006, "come back later");

    service.back().await;
    service.log_in("again", "ben");
    eventually("it is asked again", async || status(&server, "again").await == 200).await;
    has(&dependency(&server).await, json!({"ok": true, "breaker": "closed"}));
    ada.answers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_hangs_costs_a_new_session_two_seconds_until_the_breaker_opens_and_nothing_then() {
    let (service, server) = service_and_server().await;
    service.set(INTROSPECT, Behaviour::Hang);
    let begin = Instant::now();
    let asks = (0..20).map(async |n| ask(&server, &format!("new-{n}")).await);
    for (status, problem, took) in join_all(asks).await {
        assert_eq!(status, 503, "{problem}");
        assert!(took < Duration::from_millis(2_500), "{took:?}");
    }
    assert!(begin.elapsed() > Duration::from_secs(1));
    assert_eq!(dependency(&server).await["breaker"], "open");
    let mut fastest = Duration::MAX;
    for n in 0..5 {
        fastest = fastest.min(ask(&server, &format!("newer-{n}")).await.2);
    }
    assert!(fastest < Duration::from_millis(50), "at once, also in a build that is not optimised: {fastest:?}");
    assert!(server.metric("weft_outbound_calls_total").await >= 20.0);
}

#[tokio::test]
async fn what_cannot_be_used_as_an_answer_lets_nobody_in() {
    for failure in [
        Behaviour::Answer(200, "<html>".to_owned()),
        Behaviour::Answer(200, "{}".to_owned()),
        Behaviour::Answer(200, r#"{"active": "true", "sub": "ada", "tenant": "acme"}"#.to_owned()),
        Behaviour::Answer(401, r#"{"active": true, "sub": "ada", "tenant": "acme"}"#.to_owned()),
        Behaviour::Answer(500, "{}".to_owned()),
        Behaviour::Giant(1 << 20),
        Behaviour::HangUp,
        Behaviour::Redirect("/elsewhere".to_owned()),
    ] {
        let (service, server) = service_and_server().await;
        service.set(INTROSPECT, failure);
        let (status, problem, _) = ask(&server, "s").await;
        assert_eq!(status, 503, "{problem}");
        assert_eq!(service.asked("/elsewhere"), 0);
        assert!(dependency(&server).await["last_error"].is_string());
    }
}

#[tokio::test]
async fn calls_that_fail_are_made_again_but_no_more_than_a_tenth_of_them() {
    const CALLS: usize = 200;
    let (service, server) = service_and_server().await;
    let fails = Behaviour::Answer(503, "{}".to_owned());
    service.set(INTROSPECT, Behaviour::Every(4, Box::new(Behaviour::Introspect), Box::new(fails)));
    let mut refused = 0;
    for n in 0..CALLS {
        let session = format!("s-{n}");
        service.log_in(&session, "ada");
        refused += usize::from(status(&server, &session).await != 200);
    }
    let asked = service.asked(INTROSPECT);
    assert!(asked > CALLS && asked <= CALLS + CALLS / 10, "{asked}");
    assert!(refused < CALLS / 4, "the retries were of use: {refused}");
    assert_eq!(server.metric("weft_outbound_retries_total").await as usize, asked - CALLS);
}

#[tokio::test]
async fn weft_shows_its_own_name_and_secret() {
    let service = AuthService::start().await;
    let mut server = Server::stopped_with(
        LogKind::embedded(),
        &["--introspect-url", &service.url(INTROSPECT), "--introspect-client-id", "weft"],
    );
    server.set_variable("WEFT_INTROSPECT_CLIENT_SECRET", std::path::Path::new("s:e cret"));
    server.up();
    service.log_in("s", "ada");
    assert_eq!(status(&server, "s").await, 200);
    // weft:s%3Ae+cret, as RFC 6749 has it.
    assert_eq!(service.authorization(), "Basic d2VmdDpzJTNBZStjcmV0");
    for secret in ["s-not-logged", "e cret"] {
        assert!(!server.errors().contains(secret));
    }
}

#[tokio::test]
async fn a_session_gets_no_ticket_since_that_would_outlive_it() {
    let (service, server) = service_and_server().await;
    service.log_in("s", "ada");
    let request = reqwest::Client::new().post(format!("{}/v1/tickets", server.url));
    let reply = request.header("Authorization", "Session s").send().await.unwrap();
    assert_eq!(reply.status(), 403);
    assert_eq!(server.http_with("POST", "/v1/tickets", &token("ada", ""), None, &[]).await.0, 201);
}
