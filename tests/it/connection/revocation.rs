//! A user's sessions are ended, and what let them in lets nobody in any more.

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error as WsError;
use weft::auth::jwt::{Claims, mint};

use super::upgrade_status;
use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, SECRET, Server, Socket, claims, has, refused_with, token};

/// A token that was issued so many seconds from now. Whole seconds say nothing of what happens within one, so tests stay
/// clear of it.
fn issued(user: &str, seconds: i64) -> String {
    let iat = weft::clock::now_s().checked_add_signed(seconds).unwrap();
    mint(SECRET, &Claims { iat: Some(iat), ..claims(user, "") }).unwrap()
}

async fn ticket(server: &Server, token: &str) -> String {
    let (status, given) = server.http_with("POST", "/v1/tickets", token, None, &[]).await;
    assert_eq!(status, 201, "{given}");
    given["ticket"].as_str().unwrap().to_owned()
}

async fn ticket_status(server: &Server, ticket: &str) -> u16 {
    match Socket::raw_at(&server.url, &format!("/v1/ws?ticket={ticket}"), &[]).await {
        Ok(_) => 101,
        Err(WsError::Http(reply)) => reply.status().as_u16(),
        Err(error) => panic!("{error}"),
    }
}

/// Revokes all that the user has, and returns once that is in force on this node.
async fn revoke(server: &Server, user: &str) {
    let (status, done) = server.admin("DELETE", &format!("/v1/users/{user}/sessions")).await;
    assert_eq!(status, 200, "{done}");
    has(&done, json!({"user": user}));
    assert!(weft::clock::parse_rfc3339(done["revoked_at"].as_str().unwrap()).is_some(), "{done}");
}

/// Nobody gets in with the token, on any way.
async fn assert_refused(server: &Server, token: &str) {
    assert_eq!(upgrade_status(&server.url, token).await, 401);
    let (_, problem) = server.http_with("GET", "/v1/threads", token, None, &[]).await;
    refused_with(&problem, "unauthenticated");
    assert_eq!(server.http_with("POST", "/v1/tickets", token, None, &[]).await.0, 401);
    let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
    by_frame.send(&json!({"type": "connect", "id": 1, "token": token})).await;
    assert_eq!(by_frame.closed().await, 4500);
}

on_both_logs!(
    a_revocation_ends_the_users_sessions_and_refuses_what_was_issued_before_also_after_a_kill,
    |log| async move {
        let mut server = Server::start(log);
        let before = issued("ada", -60);
        let mut adas =
            vec![Socket::open(&server.url, &before).await, Socket::open(&server.url, &token("ada", "")).await];
        let mut by_frame = Socket::raw(&server.url, &[]).await.unwrap();
        assert_eq!(by_frame.ask(json!({"type": "connect", "token": before})).await["type"], "welcome");
        adas.push(by_frame);
        let bens_token = issued("ben", -60);
        let mut ben = Socket::open(&server.url, &bens_token).await;
        let namesakes_token = mint(
            SECRET,
            &Claims { tenant: "umbrella".into(), iat: Some(weft::clock::now_s() - 60), ..claims("ada", "") },
        );
        let namesakes_token = namesakes_token.unwrap();
        let mut namesake = Socket::open(&server.url, &namesakes_token).await;
        let unused = ticket(&server, &before).await;

        revoke(&server, "ada").await;
        for ada in &mut adas {
            assert_eq!(ada.closed().await, 4504);
        }
        assert_refused(&server, &before).await;
        assert_refused(&server, &token("ada", "")).await;
        assert_eq!(ticket_status(&server, &unused).await, 401, "a ticket is no older than its token");

        // Issued later than any moment that the revocation may have been of.
        let later = issued("ada", 2);
        let mut again = Socket::open(&server.url, &later).await;
        assert_eq!(again.say("t", "back again").await, 1);
        assert_eq!(ticket_status(&server, &ticket(&server, &later).await).await, 101);
        again.send(&json!({"type": "refresh", "id": 9, "token": before})).await;
        assert_eq!(again.closed().await, 4500, "what is revoked does not refresh either");
        for other in [&mut ben, &mut namesake] {
            other.answers().await;
        }

        server.kill();
        server.up();
        server.ready().await;
        assert_refused(&server, &before).await;
        assert_refused(&server, &token("ada", "")).await;
        for good in [&later, &bens_token, &namesakes_token] {
            assert_eq!(upgrade_status(&server.url, good).await, 101);
        }
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_on_one_node_is_in_force_on_the_other() {
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    let before = issued("ada", -60);
    let mut on_a = Socket::open(&a.url, &before).await;
    let mut on_b = Socket::open(&b.url, &before).await;
    let mut ben = Socket::open(&b.url, &token("ben", "")).await;
    assert_eq!(b.http_with("PUT", "/v1/threads/t", &before, None, &[]).await.0, 201);
    let mut stream = EventStream::open(&b, "/v1/threads/t/stream", &before, &[]).await.ok().unwrap();
    let unused = [ticket(&a, &before).await, ticket(&b, &before).await];
    revoke(&a, "ada").await;
    assert_eq!(on_a.closed().await, 4504);
    assert_eq!(on_b.closed().await, 4504);
    assert_eq!(stream.next().await.unwrap().json()["code"], "unauthenticated");
    assert_eq!(stream.next().await, None);
    for server in [&a, &b] {
        assert_refused(server, &before).await;
        assert_eq!(upgrade_status(&server.url, &issued("ada", 2)).await, 101);
    }
    for unused in &unused {
        assert_eq!(ticket_status(&b, unused).await, 401, "whichever node gave it");
    }
    ben.answers().await;
}

#[tokio::test]
async fn a_revocation_ends_a_stream_with_its_reason() {
    let server = Server::start(LogKind::embedded());
    let mut bens = server.connect("ben").await;
    bens.say("t", "hello").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ada", "ben", None).await.0, 201);
    let mut ada = EventStream::of(&server, "t", "ada", "?after=0").await;
    let mut ben = EventStream::of(&server, "t", "ben", "?after=0").await;
    assert_eq!((ada.seqs(2).await, ben.seqs(2).await), (vec![1, 2], vec![1, 2]));
    revoke(&server, "ada").await;
    let last = ada.next().await.unwrap();
    assert_eq!((last.event.as_deref(), &last.json()["code"]), (Some("error"), &json!("unauthenticated")));
    assert_eq!((last.id.clone(), ada.next().await), (None, None), "and then it is over: {last:?}");
    bens.say("t", "others go on").await;
    assert_eq!(ben.seqs(1).await, [3]);
}

#[tokio::test]
async fn only_an_admin_disconnects_users_and_only_those_of_the_own_tenant() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for scope in ["", "publish subscribe agent broadcast analyst"] {
        let (_, problem) = server.http_with("DELETE", "/v1/users/ada/sessions", &token("eve", scope), None, &[]).await;
        refused_with(&problem, "forbidden");
    }
    let umbrella = Claims { tenant: "umbrella".into(), ..claims("root", "admin") };
    let umbrella = mint(SECRET, &umbrella).unwrap();
    assert_eq!(server.http_with("DELETE", "/v1/users/ada/sessions", &umbrella, None, &[]).await.0, 200);
    for (path, field) in [("/v1/users/a%20b/sessions", "user"), ("/v1/users/ada/sessions?now=1", "now")] {
        let (status, problem) = server.admin("DELETE", path).await;
        assert_eq!(status, 400, "{problem}");
        has(&problem, json!({"field": field}));
    }
    ada.silent().await;
    assert_eq!(upgrade_status(&server.url, &token("ada", "")).await, 101, "hers is another tenant");
    // Nobody is connected, and it holds all the same.
    revoke(&server, "nobody").await;
    assert_refused(&server, &issued("nobody", -60)).await;
    assert_eq!(
        upgrade_status(&server.url, &token("ben", "")).await,
        101,
        "without a revocation no token need say when"
    );
    let inbox: Value = server.http_with("GET", "/v1/threads/@me/events", &issued("nobody", 2), None, &[]).await.1;
    assert_eq!(inbox["events"][0]["kind"], "sessions_revoked", "{inbox}");
}
