//! What is wrong is said in the words of the protocol, never in those of a library.

use serde_json::{Value, json};

use crate::support::{LogKind, Server, Socket, claims, token};

/// What libraries say.
const FOREIGN: &[&str] = &[
    "expected",
    "unknown variant",
    "invalid type",
    "invalid value",
    "invalid length",
    "at line",
    "did not match",
    "untagged",
    "struct ",
    "i64",
    "u64",
    "Utf8Error",
    "InvalidToken",
    "EOF",
    "trailing",
];

/// A value of every shape.
fn values() -> Vec<Value> {
    vec![
        json!(true),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!(""),
        json!("a word"),
        json!("x".repeat(300)),
        json!([]),
        json!([1, "a"]),
        json!({}),
        json!({"high": null}),
        json!({"t": "x"}),
        json!([[]]),
    ]
}

#[track_caller]
fn plain(sent: &str, said: &Value) {
    let text = said["message"].as_str().or(said["detail"].as_str()).unwrap_or_default();
    for foreign in FOREIGN {
        assert!(!text.contains(foreign), "{foreign:?} in {text:?}, the answer to {sent:.300}");
    }
}

fn commands() -> Vec<Value> {
    vec![
        json!({"type": "connect", "id": 1, "token": "t"}),
        json!({"type": "refresh", "id": 1, "token": "t"}),
        json!({
            "type": "subscribe", "id": 1, "thread": "t", "after": 1, "last": 1, "epoch": "e", "name": "n",
            "confirm": true, "ack_within_ms": 1_000, "attempts": 1, "kinds": ["x.a"]
        }),
        json!({"type": "unsubscribe", "id": 1, "thread": "t"}),
        json!({
            "type": "publish", "id": 1, "thread": "t", "kind": "x.a", "data": {}, "key": "k", "priority": "high",
            "run": "r", "parent": 1
        }),
        json!({"type": "signal", "thread": "t", "kind": "typing", "data": 1}),
        json!({"type": "ack", "thread": "t", "seq": 1, "name": "n"}),
        json!({"type": "credit", "events": 1}),
        json!({"type": "ping", "id": 1}),
    ]
}

/// The object with one field of every wrong shape, with each left out, with one more, and with one twice.
fn spoilt(object: &Value) -> Vec<String> {
    let fields = object.as_object().unwrap();
    let mut spoilt = Vec::new();
    for name in fields.keys() {
        for value in values() {
            let mut object = object.clone();
            object[name] = value;
            spoilt.push(object.to_string());
        }
        let mut object = object.clone();
        object.as_object_mut().unwrap().remove(name);
        spoilt.push(object.to_string());
        let text = object.to_string();
        spoilt.push(format!(r#"{},"{name}":1,"{name}":2}}"#, &text[..text.len() - 1]));
        // A number that no type holds.
        spoilt.push(format!(r#"{},"{name}":1e400}}"#, &text[..text.len() - 1]));
    }
    let mut more = object.clone();
    more["more"] = json!(1);
    spoilt.push(more.to_string());
    spoilt.push(Value::Array(fields.values().cloned().collect()).to_string());
    spoilt
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_with_wrong_values_are_refused_in_the_protocol_s_words() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for command in commands() {
        // A valid connect or refresh with a bad token ends the session.
        let ends = matches!(command["type"].as_str(), Some("connect" | "refresh"));
        for text in spoilt(&command) {
            if ends && serde_json::from_str::<Value>(&text).is_ok_and(|it| it["token"].is_string()) {
                continue;
            }
            // One command a frame, in an array: a list in place of a command is refused as one command.
            ada.send_text(&format!("[{text},{{\"type\":\"ping\",\"id\":-7}}]")).await;
            loop {
                let answer = ada.recv().await;
                plain(&text, &answer);
                if answer["id"] == json!(-7) {
                    break;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_a_command_s_values_is_refused_as_no_object() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for list in [r#"[["ping",1]]"#, r#"[["publish",1,"t","x.a",{}]]"#] {
        ada.send_text(list).await;
        let answer = ada.recv().await;
        assert_eq!((&answer["code"], &answer["message"]), (&json!("bad_request"), &json!("not a JSON object")));
    }
    for (method, path, list) in
        [("POST", "/v1/threads/t/events", json!(["x.a", {}])), ("PUT", "/v1/threads/t", json!(["title", []]))]
    {
        let (status, problem) = server.http(method, path, "ada", Some(list)).await;
        assert_eq!((status, &problem["detail"]), (400, &json!("not a JSON object")), "{problem}");
    }
    for data in [json!(["hi", null]), json!({"content": [["text"]]})] {
        let body = json!({"kind": "user_message", "data": data});
        let (status, problem) = server.http("POST", "/v1/threads/t/events", "ada", Some(body)).await;
        assert_eq!((status, &problem["field"]), (400, &json!("data.content")), "{problem}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_with_wrong_values_are_refused_in_the_protocol_s_words() {
    let server = Server::start_unlimited(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    let client = reqwest::Client::new();
    let send = async |method: &str, path: &str, token: &str, body: Option<String>| {
        let mut request = client.request(method.parse().unwrap(), format!("{}{path}", server.url)).bearer_auth(token);
        if let Some(body) = &body {
            request = request.body(body.clone());
        }
        let said = request.send().await.unwrap().json::<Value>().await.unwrap();
        plain(&format!("{method} {path} {body:?}"), &said);
    };
    let ada = token("ada", "");
    let publish = json!({"kind": "x.a", "data": {}, "priority": "high", "run": "r", "parent": 1});
    let thread = json!({"title": "t", "members": ["ben"]});
    for (method, path, body) in [("POST", "/v1/threads/t/events", publish), ("PUT", "/v1/threads/t", thread)] {
        for text in spoilt(&body) {
            send(method, path, &ada, Some(text)).await;
        }
        for text in ["", "{", "null", "{\"a\":", "nonsense", "\"\\ud800\"", "{}{}", "[]"] {
            send(method, path, &ada, Some(text.to_owned())).await;
        }
    }
    for kind in ["agent_started", "tool_completed", "agent_token", "agent_message", "user_message"] {
        for data in values() {
            let body = json!({"kind": kind, "data": data, "run": "r"});
            send("POST", "/v1/threads/t/events", &token("bot", "agent publish"), Some(body.to_string())).await;
        }
    }
    for (path, names) in [
        ("/v1/threads", vec!["limit", "cursor", "all", "other"]),
        ("/v1/threads/t/events", vec!["after", "before", "limit", "order", "kinds"]),
        ("/v1/threads/t/context", vec!["max_chars", "max_messages"]),
        ("/v1/threads/t/runs", vec!["limit", "cursor"]),
        ("/v1/runs", vec!["state", "limit", "cursor"]),
        ("/v1/dead-letters/x", vec!["x"]),
        ("/v1/sessions", vec!["user", "limit", "cursor"]),
    ] {
        for name in names {
            for value in ["x", "-1", "1.5", "%ff", "", "99999999999999999999999"] {
                send("GET", &format!("{path}?{name}={value}"), &token("root", "admin"), None).await;
            }
        }
    }
    send("GET", "/v1/threads/%ff", &ada, None).await;
    send("GET", "/v1/dead-letters/x", &token("root", "admin"), None).await;
}

#[tokio::test]
async fn tokens_that_are_not_valid_are_refused_in_the_protocol_s_words() {
    let server = Server::start(LogKind::embedded());
    let mut tokens: Vec<String> =
        ["", "x", "a.b.c", "..", "e30.e30.e30", "eyJhbGciOiJIUzI1NiJ9.e30.x", "%%%.%%%.%%%"].map(String::from).into();
    let good = serde_json::to_value(claims("ada", "")).unwrap();
    for name in ["sub", "tenant", "exp", "nbf", "iat", "scope", "iss", "aud"] {
        for value in values() {
            let mut claims = good.clone();
            claims[name] = value;
            tokens.push(super::hmac(&claims));
        }
    }
    for token in tokens {
        let reply = reqwest::Client::new().get(format!("{}/v1/threads", server.url)).bearer_auth(&token).send();
        plain(&token, &reply.await.unwrap().json().await.unwrap());
    }
}

#[tokio::test]
async fn a_token_s_times_may_have_fractions() {
    let server = Server::start(LogKind::embedded());
    let now = weft::clock::now_s() as f64;
    let claims = json!({"sub": "ada", "tenant": "acme", "exp": now + 600.5, "nbf": now - 0.5, "iat": now - 0.25});
    let mut ada = Socket::open(&server.url, &super::hmac(&claims)).await;
    ada.answers().await;
    let expired = json!({"sub": "ada", "tenant": "acme", "exp": now - 60.5});
    assert_eq!(super::upgrade_status(&server.url, &super::hmac(&expired)).await, 401);
}
