//! Pages of other origins.

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::{LogKind, Server, token};

const APP: &str = "https://app.example";

async fn request(server: &Server, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = reqwest::Client::new().request(method, format!("{}{path}", server.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.send().await.unwrap()
}

fn header<'a>(reply: &'a Response, name: &str) -> &'a str {
    reply.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

/// What a header lists, over all its lines.
fn list(reply: &Response, name: &str) -> Vec<String> {
    let lines = reply.headers().get_all(name).iter().map(|it| it.to_str().unwrap());
    lines.flat_map(|line| line.split(',')).map(|it| it.trim().to_lowercase()).collect()
}

#[tokio::test]
async fn a_browser_s_question_before_a_request_is_answered_for_the_origins_that_are_named() {
    let server = Server::start_with(LogKind::embedded(), &["--allow-origin", "https://b.example,https://app.example"]);
    let ask = async |path: &str, origin: &str| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,content-type,idempotency-key"),
        ];
        request(&server, Method::OPTIONS, path, &headers).await
    };
    for (path, methods) in
        [("/v1/threads/t/events", "GET, POST"), ("/v1/threads/t/stream", "GET"), ("/v1/tickets", "POST")]
    {
        let reply = ask(path, APP).await;
        assert_eq!(reply.status(), 204, "{path}");
        assert_eq!(header(&reply, "access-control-allow-origin"), APP);
        assert_eq!(header(&reply, "access-control-allow-methods"), methods);
        let allowed = list(&reply, "access-control-allow-headers");
        for name in ["authorization", "content-type", "last-event-id", "traceparent", "idempotency-key"] {
            assert!(allowed.iter().any(|it| it == name), "{name} in {allowed:?}");
        }
        assert!(list(&reply, "vary").contains(&"origin".to_owned()));
        assert!(header(&reply, "access-control-max-age").parse::<u32>().unwrap() > 0);
        assert_eq!(header(&reply, "access-control-allow-credentials"), "");
    }

    let reply = ask("/v1/tickets", "https://evil.example").await;
    assert_eq!((reply.status().as_u16(), header(&reply, "access-control-allow-origin")), (403, ""));
    let problem: Value = reply.json().await.unwrap();
    assert_eq!((&problem["code"], &problem["field"]), (&json!("forbidden"), &json!("Origin")));
    assert_eq!(ask("/v1/nowhere", APP).await.status(), 404);
    // No browser's question: a method that the path does not have.
    let reply = request(&server, Method::OPTIONS, "/v1/tickets", &[("Origin", APP)]).await;
    assert_eq!((reply.status().as_u16(), header(&reply, "allow")), (405, "POST"));
}

#[tokio::test]
async fn an_answer_is_for_the_page_that_asked_whatever_it_says() {
    let server = Server::start_with(LogKind::embedded(), &["--allow-origin", APP]);
    let bearer = format!("Bearer {}", token("ada", ""));
    server.connect("ada").await.say("t", "hello").await;
    for (path, status) in [
        ("/v1/threads", 200),
        ("/v1/threads/none", 404),
        ("/v1/threads?limit=x", 400),
        ("/v1/nowhere", 404),
        ("/v1/threads/t/stream", 200),
    ] {
        let reply = request(&server, Method::GET, path, &[("Origin", APP), ("Authorization", &bearer)]).await;
        assert_eq!((reply.status().as_u16(), header(&reply, "access-control-allow-origin")), (status, APP), "{path}");
        assert!(list(&reply, "vary").contains(&"origin".to_owned()), "{path}");
        let exposed = list(&reply, "access-control-expose-headers");
        assert!(["retry-after", "weft-truncated", "allow"].iter().all(|it| exposed.iter().any(|e| e == it)));
    }
    let reply = request(&server, Method::GET, "/v1/threads", &[("Origin", APP)]).await;
    assert_eq!((reply.status().as_u16(), header(&reply, "access-control-allow-origin")), (401, APP));

    // Another page gets its answer, which its browser does not show it; a cache knows that it is another.
    for origin in ["https://evil.example", "null", "https://app.example.evil.example"] {
        let reply =
            request(&server, Method::GET, "/v1/threads", &[("Origin", origin), ("Authorization", &bearer)]).await;
        assert_eq!((reply.status().as_u16(), header(&reply, "access-control-allow-origin")), (200, ""), "{origin}");
        assert!(list(&reply, "vary").contains(&"origin".to_owned()));
    }
    let reply = request(&server, Method::GET, "/healthz", &[("Origin", APP)]).await;
    assert_eq!(header(&reply, "access-control-allow-origin"), "", "not beyond /v1/");
}

#[tokio::test]
async fn with_all_origins_allowed_an_answer_still_names_the_one_that_asked() {
    let server = Server::start_with(LogKind::embedded(), &["--allow-origin", "*"]);
    let reply = request(&server, Method::GET, "/v1/threads", &[("Origin", "https://any.example")]).await;
    assert_eq!(header(&reply, "access-control-allow-origin"), "https://any.example");
    assert!(list(&reply, "vary").contains(&"origin".to_owned()));
    let closed = Server::start(LogKind::embedded());
    let reply = request(&closed, Method::GET, "/v1/threads", &[("Origin", "https://any.example")]).await;
    assert_eq!((header(&reply, "access-control-allow-origin"), header(&reply, "vary")), ("", ""));
}

#[tokio::test]
async fn a_page_reads_a_stream_with_a_ticket_in_place_of_a_header() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    let ticket = async || {
        let (status, given) = server.http("POST", "/v1/tickets", "ada", None).await;
        assert_eq!(status, 201, "{given}");
        given["ticket"].as_str().unwrap().to_owned()
    };
    for path in ["/v1/threads/t/stream?after=0", "/v1/threads/t/agui?after=0"] {
        let ticket = ticket().await;
        let url = format!("{path}&ticket={ticket}");
        // A token goes before a ticket, which is good for later then.
        let bearer = format!("Bearer {}", token("ada", ""));
        assert_eq!(request(&server, Method::GET, &url, &[("Authorization", &bearer)]).await.status(), 200);
        let reply = request(&server, Method::GET, &url, &[]).await;
        assert_eq!((reply.status().as_u16(), header(&reply, "content-type")), (200, "text/event-stream"), "{path}");
        let reply = request(&server, Method::GET, &url, &[]).await;
        assert_eq!(reply.status(), 401, "{path}: used");
        assert_eq!(reply.json::<Value>().await.unwrap()["field"], "ticket");
    }
    let one = ticket().await;
    let reply = request(&server, Method::GET, &format!("/v1/threads?ticket={one}"), &[]).await;
    assert_eq!(reply.status(), 401, "for streams alone");
    let reply = request(&server, Method::GET, &format!("/v1/threads/none/stream?ticket={one}"), &[]).await;
    assert_eq!(reply.status(), 404, "with the rights of its user");
    let reply = request(&server, Method::GET, "/v1/threads/t/stream", &[]).await;
    assert_eq!(reply.status(), 401);
}
