//! Who is connected, as the admin sees it.

use serde_json::Value;
use weft::auth::jwt::{Claims, mint};

use crate::support::sse::EventStream;
use crate::support::{LogKind, SECRET, Server, Socket, claims, eventually, refused, refused_with, token, token_of};

/// The sessions of a page, and its cursor.
async fn page(server: &Server, query: &str) -> (Vec<Value>, Option<String>) {
    let (status, page) = server.admin("GET", &format!("/v1/sessions{query}")).await;
    assert_eq!(status, 200, "{page}");
    (page["sessions"].as_array().unwrap().clone(), page["next"].as_str().map(str::to_owned))
}

fn users(sessions: &[Value]) -> Vec<&str> {
    sessions.iter().map(|session| session["user"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn an_admin_sees_the_own_tenants_sessions_oldest_first_and_others_see_none() {
    let server = Server::start(LogKind::embedded());
    let nameless = Socket::raw(&server.url, &[]).await.unwrap();
    let mut first =
        Socket::raw(&server.url, &[("Authorization", &format!("Bearer {}", token("ada", "")))]).await.unwrap();
    let welcome = first.recv().await;
    let mut ben = server.connect("ben").await;
    ben.say("t", "hello").await;
    let stream = EventStream::of(&server, "t", "ben", "").await;
    let second = server.connect("ada").await;
    let umbrella = Socket::open(&server.url, &token_of("umbrella", "ada")).await;

    let (sessions, next) = page(&server, "").await;
    assert_eq!((users(&sessions), next), (vec!["ada", "ben", "ben", "ada"], None), "{sessions:?}");
    assert_eq!(sessions[0]["connection"], welcome["connection"]);
    assert_eq!(
        sessions.iter().map(|it| &it["transport"]).collect::<Vec<_>>(),
        ["websocket", "websocket", "sse", "websocket"]
    );
    for session in &sessions {
        assert!(weft::clock::parse_rfc3339(session["connected_at"].as_str().unwrap()).is_some(), "{session}");
        assert_eq!(session["outbox_bytes"], 0, "{session}");
    }
    let (adas, _) = page(&server, "?user=ada").await;
    assert_eq!(adas, [sessions[0].clone(), sessions[3].clone()]);
    assert_eq!(page(&server, "?user=nobody").await, (vec![], None));
    let root = mint(SECRET, &Claims { tenant: "umbrella".into(), ..claims("root", "admin") }).unwrap();
    let theirs = server.http_with("GET", "/v1/sessions", &root, None, &[]).await.1;
    assert_eq!(users(theirs["sessions"].as_array().unwrap()), ["ada"], "{theirs}");
    for scope in ["", "publish subscribe agent broadcast analyst"] {
        let (_, problem) = server.http_with("GET", "/v1/sessions", &token("eve", scope), None, &[]).await;
        refused_with(&problem, "forbidden");
    }

    first.leave().await;
    drop(stream);
    eventually("who left is no longer there", async || users(&page(&server, "").await.0) == ["ben", "ada"]).await;
    drop((nameless, second, umbrella));
    eventually("nor who just went", async || users(&page(&server, "").await.0) == ["ben"]).await;
}

#[tokio::test]
async fn the_list_of_sessions_goes_page_by_page_with_cursors_that_are_its_own() {
    let server = Server::start(LogKind::embedded());
    let mut open = Vec::new();
    for n in 0..7 {
        open.push(server.connect(["ada", "ben"][n % 2]).await);
    }
    let all = page(&server, "").await.0;
    assert_eq!(all.len(), 7);
    let (mut found, mut query) = (Vec::new(), "?limit=3".to_owned());
    let mut cursors = Vec::new();
    loop {
        let (sessions, next) = page(&server, &query).await;
        found.push(sessions);
        let Some(next) = next else { break };
        query = format!("?limit=3&cursor={next}");
        cursors.push(next);
    }
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    assert_eq!(found.concat(), all, "each one once, in order");
    let (adas, next) = page(&server, "?user=ada&limit=2").await;
    let next = next.unwrap();
    let rest = page(&server, &format!("?user=ada&limit=2&cursor={next}")).await.0;
    assert_eq!(users(&[adas, rest].concat()), ["ada"; 4]);

    let another = token("vice", "admin");
    let cursor = &cursors[0];
    for (token, query, field, code) in [
        (&another, format!("?cursor={cursor}"), "cursor", "cursor_invalid"),
        (&token("root", "admin"), format!("?user=ada&cursor={cursor}"), "cursor", "cursor_invalid"),
        (&another, "?cursor=nonsense".into(), "cursor", "cursor_invalid"),
        (&another, "?cursor=".into(), "cursor", "cursor_invalid"),
        (&another, "?limit=0".into(), "limit", "bad_request"),
        (&another, "?limit=1001".into(), "limit", "bad_request"),
        (&another, "?user=a%2Fb".into(), "user", "bad_request"),
        (&another, "?colour=red".into(), "colour", "bad_request"),
        (&another, "?user=a&user=b".into(), "user", "bad_request"),
    ] {
        let (_, problem) = server.http_with("GET", &format!("/v1/sessions{query}"), token, None, &[]).await;
        refused(&problem, code, field);
    }
}
