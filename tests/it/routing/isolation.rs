//! Nothing of another tenant, or of a thread one is not in, through any door: not even that it is there.

use std::collections::BTreeSet;

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use weft::auth::jwt::{Claims, mint};
use weft::edge::routes::ROUTES;

use super::caught_up;
use super::doors::makes_threads;
use crate::support::{LogKind, SECRET, Server, Socket, accepted, claims, has, publish, refused_with, token, token_of};

/// A token of another tenant.
fn foreign(user: &str, scope: &str) -> String {
    mint(SECRET, &Claims { tenant: "umbrella".into(), ..claims(user, scope) }).unwrap()
}

/// What a door says, byte by byte.
type Said = (String, String);

/// Commands that name a thread, as the protocol's schemas list them; but for `publish`, which makes a thread where there is
/// none.
fn commands_for_a_thread() -> BTreeSet<String> {
    let commands = weft::protocol::schemas::all().into_iter().filter_map(|(name, schema)| {
        let command = name.strip_prefix("command.")?.to_owned();
        schema.get("properties")?.get("thread")?;
        Some(command)
    });
    commands.filter(|command| command != "publish").collect()
}

/// Every way over a WebSocket to ask for a thread.
async fn doors_of_a_socket(server: &Server, token: &str, thread: &str) -> Vec<Said> {
    let mut socket = Socket::open(&server.url, token).await;
    let commands = [
        json!({"type": "subscribe", "id": 1, "thread": thread}),
        json!({"type": "subscribe", "id": 2, "thread": thread, "after": 0}),
        json!({"type": "subscribe", "id": 3, "thread": thread, "after": 1_000_000}),
        json!({"type": "subscribe", "id": 4, "thread": thread, "last": 5}),
        json!({"type": "subscribe", "id": 5, "thread": thread, "kinds": ["user_message"], "after": 0}),
        json!({"type": "subscribe", "id": 6, "thread": thread, "name": "n", "confirm": true}),
        json!({"type": "unsubscribe", "id": 7, "thread": thread}),
        json!({"type": "ack", "thread": thread, "seq": 1}),
        json!({"type": "signal", "thread": thread, "kind": "typing"}),
    ];
    let tried: BTreeSet<String> = commands.iter().map(|it| it["type"].as_str().unwrap().to_owned()).collect();
    assert_eq!(tried, commands_for_a_thread(), "every command that there is");
    let mut said = Vec::new();
    for command in commands {
        socket.send(&command).await;
        let Some(Ok(Message::Text(text))) = socket.ws.next().await else { panic!("no answer to {command}") };
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!("not_found")), "{command}: {answer}");
        said.push((command.to_string().replace(thread, "THREAD"), text.to_string()));
    }
    said
}

/// Method and path, within a thread, of every route that is about one thread and does not make it; some in several ways.
fn doors_of_routes() -> Vec<(String, String)> {
    let mut doors = Vec::new();
    for route in ROUTES.iter().filter(|route| !makes_threads(route)) {
        let Some(path) = route.path.strip_prefix("/v1/threads/{thread}") else { continue };
        let queries: &[&str] = match path {
            "/events" => &["", "?after=0&limit=1", "?after=1000000", "?order=desc&kinds=user_message"],
            "/stream" | "/agui" => &["", "?after=0", "?after=1000000"],
            "/context" => &["", "?max_messages=1"],
            _ => &[""],
        };
        for user in ["ada", "eve", "nobody"] {
            let path = path.replace("{user}", user).replace("{run}", "r");
            assert!(!path.contains('{'), "say what is to stand for the parameters of {}", route.path);
            doors.extend(queries.iter().map(|query| (route.method.to_string(), format!("{path}{query}"))));
        }
    }
    doors.dedup();
    assert!(doors.len() > 15, "{doors:?}");
    doors
}

/// Every way over HTTP to read a thread or to change who is in it.
async fn doors_over_http(server: &Server, token: &str, thread: &str, wanted: u16) -> Vec<Said> {
    let mut said = Vec::new();
    for (method, path) in doors_of_routes() {
        let url = format!("{}/v1/threads/{thread}{path}", server.url);
        let reply = reqwest::Client::new()
            .request(method.as_str().parse().unwrap(), url)
            .bearer_auth(token)
            .send()
            .await
            .unwrap();
        let (status, kind) = (reply.status().as_u16(), reply.headers()["content-type"].to_str().unwrap().to_owned());
        assert!(status == wanted || path.starts_with("/members"), "{method} {path}: {status}");
        said.push((format!("{method} {path}: {status} {kind}"), reply.text().await.unwrap()));
    }
    said
}

/// Every way that writes without making the thread.
async fn doors_to_an_inbox(server: &Server, token: &str, thread: &str) -> Vec<Said> {
    let mut socket = Socket::open(&server.url, token).await;
    let answer = socket.ask(publish(thread, "user_message", json!({"content": "hi"}))).await;
    let body = json!({"kind": "user_message", "data": {"content": "hi"}});
    let posted = server.http_with("POST", &format!("/v1/threads/{thread}/events"), token, Some(body), &[]).await;
    assert_eq!((&answer["code"], posted.0), (&json!("not_found"), 404), "{answer} {posted:?}");
    vec![("publish".into(), answer.to_string()), ("POST".into(), format!("{posted:?}"))]
}

#[tokio::test]
async fn a_thread_one_is_not_in_and_one_that_is_not_there_give_the_same_bytes_on_every_door() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("secret", "for members").await;
    ada.subscribe("secret", Some(0)).await;
    ada.send(&json!({"type": "ack", "thread": "secret", "seq": 1})).await;
    ada.answers().await;
    for token in [token("eve", ""), token("eve", "publish subscribe broadcast"), token_of("umbrella", "ada")] {
        let there = doors_of_a_socket(&server, &token, "secret").await;
        assert_eq!(there, doors_of_a_socket(&server, &token, "nowhere").await);
        let there = doors_over_http(&server, &token, "secret", 404).await;
        assert_eq!(there, doors_over_http(&server, &token, "nowhere", 404).await);
    }
    // Scope `agent` reads threads in which it works, and no others.
    let bot = token("bot", "publish subscribe agent");
    let there = doors_over_http(&server, &bot, "secret", 404).await;
    assert_eq!(there, doors_over_http(&server, &bot, "nowhere", 404).await);
    // Another tenant's reader of everything has nothing here.
    let theirs = foreign("root", "admin analyst");
    let there = doors_over_http(&server, &theirs, "secret", 404).await;
    assert_eq!(there, doors_over_http(&server, &theirs, "nowhere", 404).await);
    // Publishing and putting would make a thread that is not there; one that is there stays shut.
    let mut eve = server.connect("eve").await;
    let answer = eve.ask(publish("secret", "user_message", json!({"content": "hi"}))).await;
    refused_with(&answer, "not_found");
    let body = json!({"kind": "user_message", "data": {"content": "hi"}});
    assert_eq!(server.http("POST", "/v1/threads/secret/events", "eve", Some(body)).await.0, 404);
    assert_eq!(server.http("PUT", "/v1/threads/secret", "eve", Some(json!({"title": "mine"}))).await.0, 404);
    assert_eq!(server.http("GET", "/v1/threads", "eve", None).await.1["threads"], json!([]));
}

#[tokio::test]
async fn another_users_inbox_gives_the_same_bytes_whether_there_is_such_a_user_or_not() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.ask(publish("@me", "user_message", json!({"content": "mine"}))).await;
    ada.subscribe("@me", Some(0)).await;
    let (there, nowhere) = ("@user:ada", "@user:nobody");
    for token in [token("eve", ""), token("eve", "publish subscribe broadcast"), foreign("eve", "")] {
        let said = doors_of_a_socket(&server, &token, there).await;
        assert_eq!(said, doors_of_a_socket(&server, &token, nowhere).await);
        let said = doors_over_http(&server, &token, there, 404).await;
        assert_eq!(said, doors_over_http(&server, &token, nowhere, 404).await);
        let said = doors_to_an_inbox(&server, &token, there).await;
        assert_eq!(said, doors_to_an_inbox(&server, &token, nowhere).await);
    }
    // An agent writes to both, and reads neither.
    let bot = token("bot", "publish subscribe agent");
    let said = doors_over_http(&server, &bot, there, 404).await;
    assert_eq!(said, doors_over_http(&server, &bot, nowhere, 404).await);
    // Who reads all of another tenant finds the inbox of a user there, which is empty.
    let root = foreign("root", "analyst");
    let page = server.http_with("GET", "/v1/threads/@user:ada/events", &root, None, &[]).await;
    assert_eq!(page, (200, json!({"events": [], "head": 0})));
}

#[tokio::test]
async fn a_token_of_another_tenant_sees_nothing() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "ours").await;
    let other = token_of("umbrella", "ada");
    doors_of_a_socket(&server, &other, "t").await;
    assert_eq!(server.http_with("GET", "/v1/threads", &other, None, &[]).await.1["threads"], json!([]));
    // The same name in another tenant is another thread, and neither hears of the other.
    ada.subscribe("t", None).await;
    let mut theirs = Socket::open(&server.url, &other).await;
    assert_eq!(theirs.say("t", "theirs").await, 1);
    theirs.subscribe("t", Some(0)).await;
    assert_eq!(theirs.events(1).await[0]["data"]["content"], "theirs");
    assert_eq!(ada.say("t", "ours again").await, 2);
    assert_eq!(ada.events(1).await[0]["data"]["content"], "ours again");
    let root = foreign("root", "admin analyst");
    let page = server.http_with("GET", "/v1/threads/t/events", &root, None, &[]).await.1;
    assert_eq!(page["events"][0]["data"]["content"], "theirs");
}

/// All that can happen in a thread, done by its member; the last of it is answered when this returns.
async fn stir(server: &Server, token: &str, user: &str, thread: &str) {
    let mut member = Socket::open(&server.url, token).await;
    member.say(thread, "an event").await;
    let mut other = Socket::open(&server.url, token).await;
    other.ask(json!({"type": "subscribe", "thread": thread, "after": 0, "name": "n", "confirm": true})).await;
    other.events(1).await;
    other.send(&json!({"type": "ack", "thread": thread, "seq": 1, "name": "n"})).await;
    member.send(&json!({"type": "signal", "thread": thread, "kind": "typing"})).await;
    let inbox = format!("@user:{user}");
    accepted(&member.ask(publish(&inbox, "x.note", json!({}))).await);
    member.send(&json!({"type": "signal", "thread": "@me", "kind": "typing"})).await;
    for (method, body) in [("PUT", Some(json!({"title": "A title", "members": ["someone"]}))), ("GET", None)] {
        assert_eq!(server.http_with(method, &format!("/v1/threads/{thread}"), token, body, &[]).await.0, 200);
    }
    let path = format!("/v1/threads/{thread}/members/someone");
    assert_eq!(server.http_with("DELETE", &path, token, None, &[]).await.0, 200);
    other.answers().await;
    member.answers().await;
}

#[tokio::test]
async fn a_session_with_everything_subscribed_hears_nothing_of_another_tenant_or_of_threads_it_is_not_in() {
    let server = Server::start(LogKind::embedded());
    // The same user and thread names in the other tenant; and in the own one somebody who shares no thread with the others.
    let mut listeners = Vec::new();
    for token in [token_of("umbrella", "ada"), token("eve", "")] {
        let mut socket = Socket::open(&server.url, &token).await;
        let own = if token == token_of("umbrella", "ada") { "t" } else { "own" };
        socket.say(own, "first").await;
        assert_eq!(socket.ask(json!({"type": "subscribe", "thread": "*"})).await["type"], "subscribed");
        caught_up(&mut socket, own).await;
        for thread in ["@me", "@tenant"] {
            socket.subscribe(thread, None).await;
            caught_up(&mut socket, thread).await;
        }
        listeners.push((socket, own));
    }
    stir(&server, &token("ada", ""), "ada", "t").await;
    let mut herald = server.connect_as("herald", "broadcast").await;
    accepted(&herald.ask(publish("@tenant", "x.news", json!({}))).await);
    for (n, (socket, own)) in listeners.iter_mut().enumerate() {
        let marker = socket.say(own, "a marker").await;
        if n == 1 {
            // Of the own tenant only what is for everyone.
            assert_eq!(socket.recv_any().await["kind"], "x.news");
        }
        let next = socket.recv_any().await;
        has(&next, json!({"type": "event", "thread": own, "seq": marker}));
        assert_eq!(next["data"]["content"], "a marker");
    }
    // Receipts and presence of a thread of the same name are the own tenant's.
    let theirs = token_of("umbrella", "ada");
    for what in ["receipts", "presence"] {
        let (status, body) = server.http_with("GET", &format!("/v1/threads/t/{what}"), &theirs, None, &[]).await;
        assert_eq!(status, 200);
        let wanted = if what == "receipts" { json!([]) } else { json!([{"user": "ada", "connections": 1}]) };
        assert_eq!(body[if what == "receipts" { "receipts" } else { "users" }], wanted, "{body}");
    }
}

#[tokio::test]
async fn a_list_of_cursors_tells_nothing_about_threads_one_is_not_in() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("secret", "for members").await;
    let mut answers = Vec::new();
    for thread in ["secret", "nobody"] {
        let mut eve = server.connect("eve").await;
        let begun = eve.ask(json!({"type": "subscribe", "thread": "*", "after": {thread: 7}})).await;
        has(&begun, json!({"head": {}, "after": {}}));
        let error = eve.recv().await;
        assert_eq!(error["field"], format!("after.{thread}"));
        answers.push(error.to_string().replace(thread, "THREAD"));
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn receipts_of_who_has_left_are_shown_no_more() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    for user in ["ada", "ben"] {
        let mut socket = server.connect(user).await;
        socket.subscribe("t", Some(0)).await;
        socket.events(1).await;
        socket.send(&json!({"type": "ack", "thread": "t", "seq": 1})).await;
        socket.answers().await;
    }
    let users = async || {
        let receipts = server.http("GET", "/v1/threads/t/receipts", "ada", None).await.1;
        let of = |receipt: &Value| receipt["user"].as_str().unwrap().to_owned();
        receipts["receipts"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    crate::support::eventually("both are kept", async || users().await == ["ada", "ben"]).await;
    server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await;
    assert_eq!(users().await, ["ada"]);
}
