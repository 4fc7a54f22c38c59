//! `/healthz`, `/readyz` and `/metrics` answer whatever the load.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{raw_http, read_until_closed, tcp};
use crate::support::{LogKind, Server, eventually, token};

const PROBES: [&str; 3] = ["/healthz", "/readyz", "/metrics"];
/// Connections beyond the limit that are open at a time.
const RESERVE: usize = 64;

async fn status(url: &str, path: &str) -> u16 {
    reqwest::get(format!("{url}{path}")).await.unwrap().status().as_u16()
}

/// Whether the server has closed the connection by now.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_connection_limit_probes_are_answered_and_everything_else_is_refused() {
    let server = Server::start_with(LogKind::embedded(), &["--max-connections", "50"]);
    let mut sessions = Vec::new();
    for n in 0..40 {
        sessions.push(server.connect(&format!("user-{n}")).await);
    }
    let silent: Vec<TcpStream> = (0..10).map(|_| tcp(&server)).collect();
    for path in PROBES {
        assert_eq!(status(&server.url, path).await, 200, "{path}");
    }
    // Whatever else, with and without a body that is not read.
    let large = json!({"kind": "x.large", "data": "x".repeat(60_000)});
    for (method, path, body) in
        [("GET", "/v1/threads", None), ("POST", "/v1/threads/t/events", Some(large)), ("GET", "/nowhere", None)]
    {
        let (status, problem) = server.http_with(method, path, &token("ada", ""), body, &[]).await;
        assert_eq!((status, &problem["code"]), (503, &json!("unavailable")), "{method} {path}: {problem}");
        assert_eq!((&problem["status"], &problem["retry_after_ms"]), (&json!(503), &json!(1_000)));
    }
    assert_eq!(server.http("POST", "/healthz", "ada", None).await.0, 405);
    assert!(server.metric(r#"weft_connections_refused_total{reason="connection_limit"}"#).await >= 3.0);
    drop(silent);

    // Probes hold no connection: with one that is free, request after request is answered.
    sessions.pop().unwrap().leave().await;
    eventually("one is free", async || server.http("GET", "/v1/threads", "ada", None).await.0 == 200).await;
    for session in &mut sessions {
        session.answers().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_holds_connections_beyond_the_limit_and_sends_nothing_keeps_no_probe_out() {
    let server = Server::start_with(LogKind::embedded(), &["--max-connections", "1"]);
    let mut session = server.connect("ada").await;
    let mut held: Vec<TcpStream> = Vec::new();
    for round in 0..5 {
        for n in 0..RESERVE {
            let mut stream = tcp(&server);
            // Some have begun a request.
            if n % 2 == 0 {
                stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ").unwrap();
            }
            held.push(stream);
        }
        for path in PROBES {
            assert_eq!(status(&server.url, path).await, 200, "{path}, round {round}");
        }
    }
    // Of those that were held, the server has kept the newest few, and these for a moment.
    let begin = Instant::now();
    let open = held.iter_mut().filter_map(|it| (!is_closed(it)).then_some(())).count();
    assert!(open < RESERVE, "{open} are open");
    for stream in held {
        assert_eq!(read_until_closed(stream), "");
    }
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    session.answers().await;
}

#[tokio::test]
async fn a_request_beyond_the_limit_is_bounded_as_any_other() {
    let server = Server::start_with(LogKind::embedded(), &["--max-connections", "1"]);
    let _session = server.connect("ada").await;
    let large = format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(20_000));
    let many: String = (0..70).map(|n| format!("x-{n}: 1\r\n")).collect();
    let reply = raw_http(&server, large.as_bytes());
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
    let reply = raw_http(&server, format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n").as_bytes());
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
    // One request a connection, also for who sends more at once.
    let twice = raw_http(&server, &b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2));
    assert_eq!(twice.matches("HTTP/1.1 200").count(), 1, "{twice}");
    assert!(twice.to_lowercase().contains("connection: close"), "{twice}");
}

#[tokio::test]
async fn a_probe_s_connection_ends_with_its_answer() {
    let server = Server::start(LogKind::embedded());
    // A disk that is busy may not have said at once how much room it has.
    eventually("it is ready", async || status(&server.url, "/readyz").await == 200).await;
    for path in PROBES {
        let reply = raw_http(&server, format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_may_have_an_address_of_their_own_which_answers_whatever_happens_at_the_other() {
    let server = Server::start_with(LogKind::embedded(), &["--admin-listen", "127.0.0.1:0", "--max-connections", "1"]);
    let admin = server.admin.clone().expect("it says where");
    let session = server.connect("ada").await;
    let silent: Vec<TcpStream> =
        (0..3 * RESERVE).map(|_| TcpStream::connect(admin.trim_start_matches("http://")).unwrap()).collect();
    for path in PROBES {
        assert_eq!(status(&admin, path).await, 200, "{path}");
    }
    assert_eq!((status(&server.url, "/healthz").await, status(&server.url, "/readyz").await), (200, 200));
    assert_eq!(
        server.http("GET", "/metrics", "ada", None).await.0,
        503,
        "it is no probe there, and the limit is reached"
    );
    let reply = reqwest::Client::new().get(format!("{admin}/v1/threads")).bearer_auth(token("ada", "")).send();
    let reply = reply.await.unwrap();
    assert_eq!(reply.status(), 404, "nothing else is there");
    assert_eq!(reply.json::<Value>().await.unwrap()["code"], "not_found");
    drop(silent);
    session.leave().await;
    eventually("there is room", async || server.http("GET", "/metrics", "ada", None).await.0 == 404).await;
}
