//! Requests as they should not be.

use serde_json::{Value, json};

use super::raw_http;
use crate::support::{LogKind, Server, token};

/// The status of a reply, and its problem.
fn problem(reply: &str) -> (u16, Value) {
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no reply: {reply:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("{reply}")))
}

#[tokio::test]
async fn a_request_names_one_host() {
    let server = Server::start(LogKind::embedded());
    let bearer = format!("authorization: Bearer {}\r\nconnection: close\r\n", token("ada", ""));
    for hosts in ["", "host: a\r\nhost: a\r\n", "host: a\r\nHost: b\r\n", "host: a b\r\n", "host:\r\n"] {
        for (path, expected) in [("/v1/threads", 400), ("/healthz", 400)] {
            let reply = raw_http(&server, format!("GET {path} HTTP/1.1\r\n{hosts}{bearer}\r\n").as_bytes());
            let (status, problem) = problem(&reply);
            assert_eq!(
                (status, &problem["code"], &problem["field"]),
                (expected, &json!("bad_request"), &json!("Host"))
            );
            assert_eq!(problem["status"], 400, "{hosts:?}");
        }
    }
    for good in ["GET /v1/threads HTTP/1.1\r\nhost: weft.example:1\r\n", "GET /v1/threads HTTP/1.0\r\n"] {
        let reply = raw_http(&server, format!("{good}{bearer}\r\n").as_bytes());
        assert_eq!(problem(&reply).0, 200, "{good}");
    }
}

#[tokio::test]
async fn an_encoded_body_is_refused_by_name() {
    let server = Server::start(LogKind::embedded());
    let send = async |encoding: &str| {
        let body = json!({"kind": "x.a", "data": 1});
        let headers = [("Content-Encoding", encoding)];
        server.http_with("POST", "/v1/threads/t/events", &token("ada", ""), Some(body), &headers).await
    };
    for encoding in ["gzip", "br", "identity, gzip"] {
        let (status, problem) = send(encoding).await;
        assert_eq!((status, &problem["status"], &problem["code"]), (415, &json!(415), &json!("bad_request")));
        assert_eq!(problem["field"], "Content-Encoding");
    }
    assert_eq!(send("identity").await.0, 201);
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_405_in_the_body_too() {
    let server = Server::start(LogKind::embedded());
    let client = reqwest::Client::new();
    for (method, path, allowed) in [
        ("PATCH", "/v1/threads/t", "GET, PUT"),
        ("DELETE", "/v1/threads/t/events", "GET, POST"),
        ("POST", "/readyz", "GET"),
        ("HEAD", "/v1/tickets", "POST"),
    ] {
        let request = client.request(method.parse().unwrap(), format!("{}{path}", server.url));
        let reply = request.bearer_auth(token("ada", "")).send().await.unwrap();
        assert_eq!((reply.status().as_u16(), reply.headers()["allow"].to_str().unwrap()), (405, allowed), "{method}");
        if method != "HEAD" {
            let problem: Value = reply.json().await.unwrap();
            assert_eq!((&problem["status"], &problem["code"]), (&json!(405), &json!("bad_request")), "{problem}");
        }
    }
}
