//! Every route as those find it who have no right to it, driven from the list of routes itself.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use uuid::Uuid;
use weft::auth::jwt::{Claims, mint};
use weft::edge::routes::{Needs, ROUTES, Route};
use weft::protocol::work::Delivery;

use crate::support::{LogKind, SECRET, Server, Socket, claims, publish, token, token_of};

/// A thread, a run and words that nobody but its members may see.
const THREAD: &str = "secret-thread";
const RUN: &str = "secret-run";
const CONTENT: &str = "secret-content";
/// A group that no tenant has.
const GROUP: &str = "workers";

/// Somebody who is no member of the thread.
struct Caller {
    name: &'static str,
    token: String,
    is_admin: bool,
    /// It may take work.
    works: bool,
    /// Of another tenant, which has no thread of this name.
    is_foreign: bool,
}

fn callers() -> Vec<Caller> {
    let foreign =
        |user: &str, scope: &str| mint(SECRET, &Claims { tenant: "umbrella".into(), ..claims(user, scope) }).unwrap();
    let of = |name, token, is_admin, is_foreign| {
        let works = is_admin || name == "an agent";
        Caller { name, token, is_admin, works, is_foreign }
    };
    vec![
        of("a stranger", token("eve", ""), false, false),
        of("an agent", token("bot", "publish subscribe agent"), false, false),
        of("another tenant's member", token_of("umbrella", "mallory"), false, true),
        of("another tenant's user of the same name", token_of("umbrella", "ada"), false, true),
        of("another tenant's admin", foreign("root", "admin analyst"), true, true),
    ]
}

/// A thread with a run in it.
async fn secret(server: &Server) -> Socket {
    let mut ada = server.connect_as("ada", "publish subscribe agent").await;
    assert_eq!(ada.say(THREAD, CONTENT).await, 1);
    let mut started = publish(THREAD, "agent_started", json!({"agent": "secret-agent"}));
    started["run"] = json!(RUN);
    assert_eq!(ada.ask(started).await["type"], "published");
    // So that the other tenant's member is one of something.
    Socket::open(&server.url, &token_of("umbrella", "mallory")).await.say("own", "mine").await;
    ada
}

fn path_of(route: &Route) -> String {
    let path = route.path.replace("{thread}", THREAD).replace("{user}", "ada").replace("{run}", RUN);
    let path = path.replace("{id}", "6f1c2a52-5b0e-4e0a-9d7c-2a3c1f0e4b5d").replace("{group}", GROUP);
    let path = path.replace("{name}", "http.publish").replace("{kind}", "x.order");
    // Without words nobody finds anything.
    let path = if path == "/v1/search" { path + "?q=" + CONTENT } else { path };
    assert!(!path.contains('{'), "a parameter that this test does not know: {}", route.path);
    path
}

/// Routes that make a thread where there is none: in another tenant that is what they do.
pub(super) fn makes_threads(route: &Route) -> bool {
    matches!(
        (route.method.as_str(), route.path),
        ("PUT", "/v1/threads/{thread}") | ("POST", "/v1/threads/{thread}/events")
    )
}

/// The route that publishes many events, each in a thread of its own.
const BATCH: &str = "/v1/events";

/// Routes that make something of a tenant's where there is none: for an admin that is what they do.
fn makes_for_tenant(route: &Route) -> bool {
    matches!((route.method.as_str(), route.path), ("PUT", "/v1/groups/{group}" | "/v1/kinds/{kind}"))
}

/// Routes that do something about all dead letters that match.
pub(super) fn is_for_all_letters(route: &Route) -> bool {
    matches!(route.path, "/v1/dead-letters/requeue" | "/v1/dead-letters/discard")
}

fn body_of(route: &Route) -> Option<Value> {
    if is_for_all_letters(route) {
        return Some(json!({"filter": {}}));
    }
    if route.path == "/v1/groups/{group}/settle" {
        let (group, thread) = (GROUP.to_owned(), THREAD.to_owned());
        let delivery = Delivery { lease: Uuid::from_bytes([7; 16]), lease_ms: 30_000, group, thread };
        return Some(json!({"delivery": delivery.text(), "outcome": "done"}));
    }
    if route.path == BATCH {
        let event = json!({"thread": THREAD, "kind": "user_message", "data": {"content": "hi"}});
        return Some(json!({"events": [event]}));
    }
    match (route.method.as_str(), makes_threads(route)) {
        ("PUT", true) => Some(json!({"title": "mine"})),
        ("POST", true) => Some(json!({"kind": "user_message", "data": {"content": "hi"}})),
        _ => None,
    }
}

async fn knock(server: &Server, route: &Route, token: &str) -> (u16, Value) {
    server.http_with(route.method.as_str(), &path_of(route), token, body_of(route), &[]).await
}

#[tokio::test]
async fn who_has_no_right_is_refused_on_every_route_or_finds_nothing_there() {
    let server = Server::start(LogKind::embedded());
    let mut ada = secret(&server).await;
    for Caller { name, token, is_admin, works, is_foreign } in callers() {
        let makes = |route: &Route| makes_threads(route) || makes_for_tenant(route) || route.path == BATCH;
        for route in ROUTES.iter().filter(|route| !(is_foreign && makes(route))) {
            let what = format!("{name}: {} {}", route.method, route.path);
            let wanted = match (route.needs(), route.path) {
                // A WebSocket is asked thread by thread, and probes tell of the server alone.
                (Needs::Nothing, "/v1/ws" | "/healthz" | "/readyz" | "/metrics") => continue,
                // The contract is everybody's.
                (Needs::Nothing, "/v1/openapi.json" | "/v1/asyncapi.json" | "/v1/schemas/{name}") => continue,
                // Each event has its own answer.
                (Needs::Token, BATCH) => (200, None),
                (Needs::Admin, _) if !is_admin => (403, Some("forbidden")),
                (Needs::Analyst, _) if !is_admin => (403, Some("forbidden")),
                // A file; its own tests look for what is another tenant's.
                (Needs::Analyst, "/v1/export") => continue,
                (Needs::Agent, _) if !works => (403, Some("forbidden")),
                // Of the caller's own tenant.
                (Needs::Token, "/v1/tickets") => (201, None),
                (Needs::Token, "/v1/kinds") => (200, None),
                (Needs::Read, "/v1/threads" | "/v1/runs" | "/v1/search") => (200, None),
                (Needs::Admin, "/v1/sessions" | "/v1/users/{user}/sessions") => (200, None),
                (Needs::Agent, "/v1/groups") => (200, None),
                (Needs::Agent, "/v1/groups/{group}/settle") => (409, Some("conflict")),
                (Needs::Admin, "/v1/dead-letters" | "/v1/dead-letters/counts") => (200, None),
                (Needs::Admin, "/v1/dead-letters/requeue" | "/v1/dead-letters/discard") => (200, None),
                (_, path) if path.contains('{') => (404, Some("not_found")),
                _ => panic!("say what this route may answer: {what}"),
            };
            let (status, body) = knock(&server, route, &token).await;
            assert_eq!((status, body["code"].as_str()), wanted, "{what}: {body}");
            assert!(route.path != BATCH || body["items"][0]["code"] == "not_found", "{what}: {body}");
            // A refusal may repeat what was asked for, and nothing else.
            let body = body.to_string();
            for hidden in [CONTENT, "secret-agent", "acme"] {
                assert!(!body.contains(hidden), "{what}: {body}");
            }
            assert!(status != 200 || !body.contains("secret"), "{what}: {body}");
        }
    }
    // Nothing that was asked of one tenant reached the other's user.
    assert_eq!(ada.say(THREAD, "still here").await, 3);
}

#[tokio::test]
async fn in_another_tenant_the_same_name_is_a_thread_of_its_own() {
    let server = Server::start(LogKind::embedded());
    let mut ada = secret(&server).await;
    let token = token_of("umbrella", "mallory");
    let mut seqs = BTreeSet::new();
    for route in ROUTES.iter().filter(|route| makes_threads(route)) {
        let (status, body) = knock(&server, route, &token).await;
        assert_eq!(status, 201, "{body}");
        seqs.insert(body["head"].as_u64().or(body["seq"].as_u64()));
    }
    assert_eq!(seqs, BTreeSet::from([Some(1), Some(2)]), "a new thread's");
    assert_eq!(ada.say(THREAD, "untouched").await, 3);
}

#[tokio::test]
async fn without_a_token_every_route_that_needs_one_says_so_with_a_trailing_slash_too() {
    let server = Server::start(LogKind::embedded());
    let client = reqwest::Client::new();
    for route in ROUTES.iter().filter(|route| route.needs() != Needs::Nothing) {
        for end in ["", "/"] {
            let url = format!("{}{}{end}", server.url, path_of(route));
            let reply = client.request(route.method.as_str().parse().unwrap(), &url).send().await.unwrap();
            assert_eq!(
                (reply.status().as_u16(), reply.headers()["www-authenticate"].as_bytes()),
                (401, &b"Bearer"[..]),
                "{url}"
            );
            let body: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
            assert_eq!((&body["code"], &body["field"]), (&json!("unauthenticated"), &json!("Authorization")), "{url}");
        }
    }
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_named_with_those_it_has() {
    let server = Server::start(LogKind::embedded());
    let client = reqwest::Client::new();
    let mut paths: BTreeMap<&str, (&Route, BTreeSet<&str>)> = BTreeMap::new();
    for route in ROUTES {
        paths.entry(route.path).or_insert((route, BTreeSet::new())).1.insert(route.method.as_str());
    }
    for (path, (route, allowed)) in paths {
        let wrong = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEFT"];
        for method in wrong.into_iter().filter(|method| !allowed.contains(method)) {
            let url = format!("{}{}", server.url, path_of(route));
            let reply = client.request(method.parse().unwrap(), &url).send().await.unwrap();
            assert_eq!(reply.status().as_u16(), 405, "{method} {path}");
            assert_eq!(reply.headers()["content-type"], "application/problem+json", "{method} {path}");
            let got: BTreeSet<&str> = reply.headers()["allow"].to_str().unwrap().split(", ").collect();
            assert_eq!(got, allowed, "{method} {path}");
            if method == "HEAD" {
                continue;
            }
            let body: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
            assert_eq!((&body["status"], &body["code"]), (&json!(405), &json!("bad_request")), "{method} {path}");
            let detail = body["detail"].as_str().unwrap();
            assert!(detail.contains(method) && allowed.iter().all(|it| detail.contains(it)), "{detail}");
        }
    }
}
