//! What is on the wire is what `schemas/` says: every frame and every body, listed from the schemas and the routes
//! themselves, so that a new one cannot be forgotten. (`support` checks what all other tests happen to get.)

use std::collections::BTreeSet;
use std::path::Path;

use jsonschema::Validator;
use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};
use weft::edge::contract;
use weft::edge::routes::{Needs, ROUTES, Route};

use crate::support::sse::EventStream;
use crate::support::{LogKind, SECRET, Server, Socket, accepted, claims, eventually, publish, refused_with, token};

/// A schema as it is published.
fn schema(name: &str) -> Validator {
    jsonschema::validator_for(&published(name)).unwrap()
}

fn published(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{name}.json"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_schemas_in_the_repository_are_those_of_the_types() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let mut names: Vec<String> = Vec::new();
    for (file, text) in contract::files() {
        let stored = std::fs::read_to_string(folder.join(&file)).unwrap_or_default();
        assert!(stored == text, "{file}: run `weft schemas --out schemas`");
        names.push(file);
    }
    let mut stored: Vec<String> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    stored.retain(|name| name.ends_with(".json"));
    names.sort();
    stored.sort();
    assert_eq!(stored, names, "no schema without its type");
}

/// The published schemas of the server's frames: of events, and of all others.
struct Frames {
    event: Validator,
    other: Validator,
}

impl Frames {
    fn published() -> Frames {
        Frames { event: schema("frame.event"), other: schema("frame.server") }
    }

    fn types() -> BTreeSet<String> {
        let type_of = |frame: &Value| frame["properties"]["type"]["const"].as_str().unwrap().to_owned();
        let mut types: BTreeSet<String> =
            published("frame.server")["oneOf"].as_array().unwrap().iter().map(type_of).collect();
        types.insert(type_of(&published("frame.event")));
        types
    }

    /// Fails unless the frame is what its schema says; gives its type.
    fn check(&self, frame: &Value) -> String {
        let frame_type = frame["type"].as_str().unwrap();
        let schema = if frame_type == "event" { &self.event } else { &self.other };
        assert!(schema.is_valid(frame), "{frame}");
        frame_type.to_owned()
    }
}

/// Reads frames until one of this type comes; each of them is what the published schema says.
async fn read_to(socket: &mut Socket, wanted: &str, frames: &Frames, seen: &mut BTreeSet<String>) {
    loop {
        let frame_type = frames.check(&socket.recv_any().await);
        let is_last = frame_type == wanted;
        seen.insert(frame_type);
        if is_last {
            return;
        }
    }
}

#[tokio::test]
async fn a_server_sends_every_frame_that_has_a_schema_as_that_says() {
    let frames = Frames::published();
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    assert_eq!(writer.say("t", "1").await, 1);

    // Its token is near its end.
    let soon = mint(SECRET, &Claims { exp: weft::clock::now_s() + 50, ..claims("ada", "") }).unwrap();
    let mut reader = Socket::raw(&server.url, &[("Authorization", &format!("Bearer {soon}"))]).await.unwrap();
    let mut seen = BTreeSet::new();
    for wanted in ["welcome", "expiring"] {
        read_to(&mut reader, wanted, &frames, &mut seen).await;
    }
    for (command, answer) in [
        (json!({"type": "refresh", "id": 1, "token": token("ada", "")}), "refreshed"),
        (json!({"type": "ping", "id": 2}), "pong"),
        (json!({"type": "dance", "id": 3}), "error"),
        (json!({"type": "publish", "id": 4, "thread": "u", "kind": "x.a", "data": {}}), "published"),
        (json!({"type": "subscribe", "id": 5, "thread": "u", "kinds": ["x.wanted"]}), "subscribed"),
        (json!({"type": "publish", "id": 6, "thread": "u", "kind": "x.left-out", "data": {}}), "position"),
        (json!({"type": "unsubscribe", "id": 7, "thread": "u"}), "unsubscribed"),
        (json!({"type": "credit", "events": 2}), ""),
        (json!({"type": "subscribe", "id": 8, "thread": "t", "after": 0}), "event"),
    ] {
        reader.send(&command).await;
        if !answer.is_empty() {
            read_to(&mut reader, answer, &frames, &mut seen).await;
        }
    }
    read_to(&mut reader, "caught_up", &frames, &mut seen).await;
    writer.send(&json!({"type": "signal", "thread": "t", "kind": "typing", "data": {"at": 1}})).await;
    read_to(&mut reader, "signal", &frames, &mut seen).await;

    // More events than an outbox holds, while it may have only the first of them.
    for _ in 0..8 {
        accepted(&writer.ask(publish("t", "x.large", json!("x".repeat(60_000)))).await);
    }
    reader.send(&json!({"type": "credit", "events": 100})).await;
    read_to(&mut reader, "lagged", &frames, &mut seen).await;

    let mut worker = server.connect_as("wim", "agent").await;
    worker.send(&json!({"type": "consume", "id": 1, "group": "g", "credit": 1})).await;
    read_to(&mut worker, "consuming", &frames, &mut seen).await;
    assert_eq!(writer.say("work", "do it").await, 1);
    let work = worker.recv_type("work").await;
    seen.insert(frames.check(&work));
    worker.send(&json!({"type": "settle", "id": 2, "delivery": work["delivery"], "outcome": "done"})).await;
    read_to(&mut worker, "settled", &frames, &mut seen).await;
    assert_eq!(seen, Frames::types());
}

#[tokio::test]
async fn an_event_on_a_page_is_what_its_schema_says_and_so_is_the_frame_that_it_was() {
    let (event, frame) = (schema("http.event"), schema("frame.event"));
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let mut full = publish("t", "user_message", json!({"content": "hi"}));
    for (field, value) in [("key", json!("k")), ("priority", json!("high")), ("run", json!("r"))] {
        full[field] = value;
    }
    accepted(&ada.ask(full).await);
    let mut reply = publish("t", "x.reply", json!([null]));
    reply["parent"] = json!(1);
    accepted(&ada.ask(reply).await);
    ada.subscribe("t", Some(0)).await;
    let (_, page) = server.http("GET", "/v1/threads/t/events", "ada", None).await;
    for (paged, live) in page["events"].as_array().unwrap().iter().zip(ada.events(2).await) {
        assert!(event.is_valid(paged) && !frame.is_valid(paged), "a page's has no `type`: {paged}");
        assert!(frame.is_valid(&live), "a frame has one: {live}");
    }
}

/// The path of a route in the thread that [`everything_in_it`] has made.
fn path_of(route: &Route, letter: &str) -> String {
    let path = route.path.replace("{thread}", "t").replace("{user}", "ben").replace("{run}", "r");
    let path =
        path.replace("{id}", letter).replace("{group}", "g").replace("{kind}", "x.k").replace("{name}", "http.publish");
    let path = path.replace("/search", "/search?q=all&around=1");
    assert!(!path.contains('{'), "say what is to stand for the parameters of {}", route.path);
    path
}

/// A thread that every route has something to say of; gives the id of a dead letter.
async fn everything_in_it(server: &Server) -> String {
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({"title": "All"}))).await.0, 201);
    assert_eq!(server.http("PUT", "/v1/threads/t/members/scout", "ada", None).await.0, 201);
    let mut agent = server.connect_as("scout", "publish subscribe agent").await;
    agent.subscribe_with("t", json!({"name": "n", "after": 0})).await;
    agent.ack("t", 1).await;
    let mut act = async |kind: &str, data: Value| {
        let mut command = publish("t", kind, data);
        command["run"] = json!("r");
        agent.ask(command).await
    };
    refused_with(&act("agent_thinking", json!({})).await, "run_order");
    for (kind, data) in [
        ("agent_started", json!({"agent": "scout", "input": [1]})),
        ("tool_executing", json!({"tool": "map", "call": "c", "arguments": {}})),
        ("tool_completed", json!({"call": "c", "error": "none"})),
        ("agent_token", json!({"message": "m", "from_char": 0, "text": "So"})),
        ("agent_token", json!({"message": "m", "from_char": 0, "text": "No", "restart": true})),
        ("agent_waiting", json!({"reason": "approval", "prompt": "Pay?"})),
    ] {
        accepted(&act(kind, data).await);
    }
    let made = server.http_with("PUT", "/v1/groups/g", &token("root", "admin"), Some(json!({})), &[]).await;
    assert_eq!(made.0, 201, "{}", made.1);
    let made = server.http_with("PUT", "/v1/kinds/x.k", &token("root", "admin"), Some(json!({})), &[]).await;
    assert_eq!(made.0, 201, "{}", made.1);
    let receipts = async || server.http("GET", "/v1/threads/t/receipts", "ada", None).await.1;
    eventually("the receipt is there", async || receipts().await["receipts"][0]["seq"] == 1).await;
    let (_, letters) = server.admin("GET", "/v1/dead-letters").await;
    letters["items"][0]["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_route_answers_what_its_schema_says() {
    let server = Server::start_unlimited(LogKind::embedded());
    let letter = everything_in_it(&server).await;
    let mut streams = Vec::new();
    for route in ROUTES {
        let (method, path) = (route.method.as_str(), path_of(route, &letter));
        let token = match route.needs() {
            Needs::Admin => token("root", "admin"),
            Needs::Agent => token("scout", "agent"),
            Needs::Analyst => token("ana", "analyst"),
            _ => token("ada", ""),
        };
        match route.path {
            // Frames, not a body; the test above has them.
            "/v1/ws" => continue,
            // Prometheus' own format, and documents that a test of theirs reads.
            "/metrics" | "/v1/openapi.json" | "/v1/asyncapi.json" | "/v1/schemas/{name}" => continue,
            // A file, whose lines its own tests read.
            "/v1/export" => continue,
            "/v1/threads/{thread}/stream" | "/v1/threads/{thread}/agui" => {
                let path = format!("{path}?after=0");
                let mut stream = EventStream::open(&server, &path, &token, &[]).await.ok().unwrap();
                assert!(!stream.next().await.unwrap().data.is_empty(), "checked when it is read");
                streams.push(stream);
                continue;
            }
            _ => {}
        }
        let body = match (method, route.path) {
            ("PUT", "/v1/threads/{thread}") => Some(json!({"title": "Everything", "members": ["cid"]})),
            ("POST", "/v1/threads/{thread}/events") => Some(json!({"kind": "x.a", "data": 1, "parent": 1})),
            ("POST", "/v1/events") => Some(json!({"events": [
                {"thread": "t", "kind": "x.a", "data": 1, "key": "k", "priority": "low"}, {"thread": "t", "kind": "x", "data": 1},
            ]})),
            ("PUT", "/v1/groups/{group}") => Some(json!({"kinds": ["x.a"], "from": "start", "attempts": 2})),
            ("PUT", "/v1/kinds/{kind}") => Some(json!({"type": "object", "title": "Another"})),
            ("POST", "/v1/groups/{group}/lease") => Some(json!({"n": 1, "wait_ms": 30_000})),
            ("POST", "/v1/groups/{group}/settle") => {
                Some(json!({"settlements": [{"delivery": "none", "outcome": "done"}]}))
            }
            ("POST", "/v1/dead-letters/{id}/requeue") => Some(json!({"rehearse": true, "note": "to see"})),
            ("POST", "/v1/dead-letters/requeue" | "/v1/dead-letters/discard") => {
                Some(json!({"filter": {"reason": "run_order"}, "rehearse": true}))
            }
            _ => None,
        };
        // Checked against the schema of the route's body; there is none for a problem here.
        let (status, body) = server.http_with(method, &path, &token, body, &[]).await;
        assert!((200..300).contains(&status), "{method} {path}: {status} {body}");
    }
}
