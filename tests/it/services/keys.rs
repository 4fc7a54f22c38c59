//! Tokens whose keys are fetched from their issuers, and issuers that fail.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::auth_service::{AuthService, Behaviour, DISCOVERY, KEYS, Key};
use crate::support::{LogKind, Server, Socket, claims, eventually, has, refused_with, token};

async fn server_with(urls: &[String], more: &[&str]) -> Server {
    let urls = urls.join(",");
    let mut arguments = vec!["--jwks-url", &urls, "--rate-user", "0"];
    arguments.extend(more);
    let server = Server::start_with(LogKind::embedded(), &arguments);
    server.ready().await;
    server
}

/// An issuer with these keys, and a server that has fetched them.
async fn issuer_and_server(keys: &[&Key]) -> (AuthService, Server) {
    let issuer = AuthService::start().await;
    issuer.publish(keys);
    let server = server_with(&[issuer.url(KEYS)], &[]).await;
    eventually("the keys are there", async || status(&server, &keys[0].token("ada")).await == 200).await;
    (issuer, server)
}

async fn ask(server: &Server, token: &str) -> (u16, Value) {
    server.http_with("GET", "/v1/threads", token, None, &[]).await
}

async fn status(server: &Server, token: &str) -> u16 {
    ask(server, token).await.0
}

async fn dependency(server: &Server) -> Value {
    let (status, ready) = server.http("GET", "/readyz", "x", None).await;
    assert_eq!(status, 200, "another service never makes it unready: {ready}");
    assert_eq!(ready["degraded"], json!(!ready["dependencies"][0]["ok"].as_bool().unwrap()), "{ready}");
    ready["dependencies"][0].clone()
}

#[tokio::test]
async fn a_token_is_verified_with_the_key_that_it_names_and_no_other() {
    let (first, second, rsa) = (Key::ed("first", 1), Key::ed("second", 2), Key::rsa("rsa"));
    let (_issuer, server) = issuer_and_server(&[&first, &rsa]).await;
    for good in [first.token("ada"), rsa.token("ada"), token("ada", "")] {
        assert_eq!(status(&server, &good).await, 200, "{good}");
        Socket::open(&server.url, &good).await;
    }
    for (forged, why) in [
        (second.sign("first", "ada", json!({})), "signature"),
        (rsa.sign("first", "ada", json!({})), "algorithm"),
        (first.sign("rsa", "ada", json!({})), "algorithm"),
        (first.token_with("ada", json!({"exp": 1})), "expired"),
        (first.token_with("weft", json!({})), "server's own user"),
    ] {
        let (status, problem) = ask(&server, &forged).await;
        assert_eq!(status, 401, "{problem}");
        refused_with(&problem, "unauthenticated");
        assert!(problem["detail"].as_str().unwrap().contains(why), "{why}: {problem}");
    }
    // A public key is no secret that tokens are signed with.
    let public = serde_json::to_string(
        &jsonwebtoken::jwk::Jwk::from_encoding_key(
            &EncodingKey::from_rsa_pem(include_bytes!("../support/rsa-of-the-tests.pem")).unwrap(),
            jsonwebtoken::Algorithm::RS256,
        )
        .unwrap(),
    )
    .unwrap();
    let header = Header { kid: Some("rsa".to_owned()), ..Header::default() };
    let forged =
        jsonwebtoken::encode(&header, &claims("ada", ""), &EncodingKey::from_secret(public.as_bytes())).unwrap();
    assert_eq!(status(&server, &forged).await, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_unknown_keys_cause_one_fetch_whoever_shows_them() {
    let key = Key::ed("known", 1);
    let (issuer, server) = issuer_and_server(&[&key]).await;
    let before = issuer.asked(KEYS);
    let http = reqwest::Client::new();
    for round in 0..20 {
        let asks = (0..50).map(|n| {
            let token = key.sign(&format!("random-{round}-{n}"), "ada", json!({}));
            http.get(format!("{}/v1/threads", server.url)).bearer_auth(token).send()
        });
        for reply in join_all(asks).await {
            assert_eq!(reply.unwrap().status(), 401);
        }
    }
    assert_eq!(issuer.asked(KEYS) - before, 1);
    assert_eq!(status(&server, &key.token("ada")).await, 200);
}

#[tokio::test]
async fn a_key_that_is_new_is_found_and_nobody_is_dropped_when_keys_change() {
    let (old, new) = (Key::ed("old", 1), Key::ed("new", 2));
    let (issuer, server) = issuer_and_server(&[&old]).await;
    let mut ada = Socket::open(&server.url, &old.token("ada")).await;
    issuer.publish(&[&new]);
    let mut ben = Socket::open(&server.url, &new.token("ben")).await;
    ben.answers().await;
    assert_eq!(status(&server, &old.token("ada")).await, 401, "that key is no longer one");
    assert_eq!(ada.say("t", "who is in stays").await, 1);
    let refreshed = ada.ask(json!({"type": "refresh", "token": new.token("ada")})).await;
    assert_eq!(refreshed["type"], "refreshed", "{refreshed}");
}

#[tokio::test]
async fn a_connect_frame_waits_for_its_key_and_what_comes_after_it_waits_for_the_connect() {
    let (old, new) = (Key::ed("old", 1), Key::ed("new", 2));
    let (issuer, server) = issuer_and_server(&[&old]).await;
    issuer.publish(&[&old, &new]);
    let mut socket = Socket::raw(&server.url, &[]).await.unwrap();
    let connect = json!({"type": "connect", "id": 1, "token": new.token("ada")});
    let said = json!({"type": "publish", "id": 2, "thread": "t", "kind": "user_message", "data": {"content": "hi"}});
    socket.send(&json!([connect, said])).await;
    has(&socket.recv().await, json!({"type": "welcome", "id": 1, "user": "ada"}));
    has(&socket.recv().await, json!({"type": "published", "id": 2, "seq": 1}));

    let mut stranger = Socket::raw(&server.url, &[]).await.unwrap();
    stranger.send(&json!({"type": "connect", "id": 1, "token": new.sign("unknown", "ada", json!({}))})).await;
    assert_eq!(stranger.closed().await, 4500);
}

/// What an issuer can do wrong, and within which time that is known.
fn failures() -> Vec<(&'static str, Behaviour)> {
    let answer = |status, body: &str| Behaviour::Answer(status, body.to_owned());
    vec![
        ("garbage", answer(200, "\u{0}\u{1}garbage")),
        ("a page of HTML", answer(200, "<html><body>Please log in</body></html>")),
        ("no keys", answer(200, r#"{"keys": []}"#)),
        ("no content", answer(204, "")),
        ("an error", answer(500, "{}")),
        ("not found", answer(404, "{}")),
        ("10 MB", Behaviour::Giant(10 << 20)),
        ("one byte a second", Behaviour::Trickle),
        ("silence", Behaviour::Hang),
        ("a connection that ends", Behaviour::HangUp),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_good_keys_stay_whatever_comes_in_their_place() {
    let mut servers = Vec::new();
    for (what, failure) in failures() {
        let (issuer, server) = issuer_and_server(&[&Key::ed("known", 1)]).await;
        servers.push((what, failure, issuer, server));
    }
    let failing = servers.into_iter().map(async |(what, failure, issuer, server)| {
        let key = Key::ed("known", 1);
        issuer.set(KEYS, failure);
        let begin = Instant::now();
        let (status, problem) = ask(&server, &key.sign("unknown", "ada", json!({}))).await;
        assert_eq!(status, 503, "{what}: {problem}");
        refused_with(&problem, "unavailable");
        assert!(problem["retry_after_ms"].as_u64().unwrap() > 0, "{what}: {problem}");
        assert!(begin.elapsed() < Duration::from_secs(4), "{what}: {:?}", begin.elapsed());
        assert_eq!(self::status(&server, &key.token("ada")).await, 200, "{what}");
        eventually(what, async || dependency(&server).await["ok"] == false).await;
        assert!(dependency(&server).await["last_error"].as_str().is_some_and(|why| !why.is_empty()), "{what}");
        assert_eq!(self::status(&server, &key.token("ada")).await, 200, "{what}");
    });
    join_all(failing).await;
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let key = Key::ed("known", 1);
    let (issuer, server) = issuer_and_server(&[&key]).await;
    let elsewhere = AuthService::start().await;
    elsewhere.publish(&[&Key::ed("evil", 9)]);
    issuer.set(KEYS, Behaviour::Redirect(elsewhere.url(KEYS)));
    assert_eq!(status(&server, &Key::ed("evil", 9).token("ada")).await, 503);
    assert_eq!(elsewhere.asked(KEYS), 0);
    assert!(dependency(&server).await["last_error"].as_str().unwrap().contains("redirect"));
}

#[tokio::test]
async fn before_the_first_keys_are_there_a_token_cannot_be_checked_and_then_it_can() {
    let mut issuer = AuthService::start().await;
    let key = Key::ed("known", 1);
    issuer.publish(&[&key]);
    issuer.gone().await;
    let server = server_with(&[issuer.url(KEYS)], &[]).await;
    eventually("the first fetch has failed", async || dependency(&server).await["ok"] == false).await;
    let (status, problem) = ask(&server, &key.token("ada")).await;
    assert_eq!(status, 503, "{problem}");
    let mut socket = Socket::raw(&server.url, &[]).await.unwrap();
    socket.send(&json!({"type": "connect", "id": 1, "token": key.token("ada")})).await;
    assert_eq!(socket.closed().await, 4006, "no verdict on the token");
    assert_eq!(self::status(&server, &token("ada", "")).await, 200, "other keys are good");

    issuer.back().await;
    eventually("the keys are there", async || self::status(&server, &key.token("ada")).await == 200).await;
    let now = dependency(&server).await;
    has(&now, json!({"name": "jwks", "ok": true, "breaker": "closed"}));
    assert!(now["last_error"].is_string() && now["since"].is_string(), "{now}");
}

#[tokio::test]
async fn each_issuer_has_keys_of_its_own_and_each_token_its_audience() {
    let (mine, other) = (AuthService::start().await, AuthService::start().await);
    // Both call their key the same.
    let (a, b) = (Key::ed("k", 1), Key::ed("k", 2));
    mine.publish(&[&a]);
    other.publish(&[&b]);
    let urls = [format!("https://a.example={}", mine.url(KEYS)), format!("b={}", other.url(KEYS))];
    let server = server_with(&urls, &["--jwt-audience", "weft"]).await;
    let of = |key: &Key, iss: Value, aud: &str| key.token_with("ada", json!({"iss": iss, "aud": aud}));
    for (key, iss) in [(&a, "https://a.example"), (&b, "b")] {
        let good = of(key, json!(iss), "weft");
        eventually("the keys are there", async || status(&server, &good).await == 200).await;
    }
    for bad in [
        of(&a, json!("b"), "weft"),
        of(&b, json!("https://a.example"), "weft"),
        of(&a, json!("c"), "weft"),
        of(&a, json!(null), "weft"),
        of(&a, json!(["https://a.example"]), "weft"),
        of(&a, json!("https://a.example"), "others"),
    ] {
        assert_eq!(status(&server, &bad).await, 401, "{bad}");
    }
}

#[tokio::test]
async fn an_issuer_describes_where_its_keys_are() {
    let issuer = AuthService::start().await;
    let key = Key::ed("k", 1);
    issuer.publish(&[&key]);
    let described = |issuer_name: &str, keys: &str| {
        Behaviour::Answer(200, json!({"issuer": issuer_name, "jwks_uri": keys, "more": 1}).to_string())
    };
    issuer.set(DISCOVERY, described(&issuer.url(""), &issuer.url(KEYS)));
    let server = server_with(&[issuer.url(DISCOVERY)], &[]).await;
    let good = key.token_with("ada", json!({"iss": issuer.url("")}));
    eventually("the keys are there", async || status(&server, &good).await == 200).await;
    assert_eq!(status(&server, &key.token_with("ada", json!({"iss": "https://other.example"}))).await, 401);
    let (_, ready) = server.http("GET", "/readyz", "x", None).await;
    let names: Vec<_> = ready["dependencies"].as_array().unwrap().iter().map(|it| it["name"].clone()).collect();
    assert_eq!(names, ["oidc", "jwks"]);
}

#[tokio::test]
async fn a_description_of_another_issuer_or_with_keys_at_a_private_address_is_not_used() {
    for (issuer_name, keys, why) in [
        (Some("https://other.example"), None, "it describes the issuer https://other.example"),
        (None, Some("http://169.254.169.254/latest/meta-data"), "jwks_uri"),
        (None, Some("http://localhost/keys"), "jwks_uri"),
        (None, Some("file:///etc/passwd"), "jwks_uri"),
    ] {
        let issuer = AuthService::start().await;
        issuer.publish(&[&Key::ed("k", 1)]);
        let (issuer_name, keys) =
            (issuer_name.map_or(issuer.url(""), Into::into), keys.map_or(issuer.url(KEYS), Into::into));
        issuer.set(DISCOVERY, Behaviour::Answer(200, json!({"issuer": issuer_name, "jwks_uri": keys}).to_string()));
        let server = server_with(&[issuer.url(DISCOVERY)], &[]).await;
        eventually("it was fetched", async || dependency(&server).await["ok"] == false).await;
        let error = dependency(&server).await["last_error"].as_str().unwrap().to_owned();
        assert!(error.contains(why), "{error}");
        assert_eq!(issuer.asked(KEYS), 0);
    }
}

#[tokio::test]
async fn a_set_is_fetched_anew_before_it_ages() {
    let issuer = AuthService::start().await;
    issuer.publish(&[&Key::ed("k", 1)]);
    // It says one second; the shortest age that is taken for one is half a minute.
    issuer.set_max_age(1);
    let server = server_with(&[issuer.url(KEYS)], &[]).await;
    eventually("it is fetched", async || issuer.asked(KEYS) == 1).await;
    let begin = Instant::now();
    eventually("it is fetched again, though nobody has asked", async || issuer.asked(KEYS) == 2).await;
    let took = begin.elapsed();
    assert!((20..35).contains(&took.as_secs()), "{took:?}");
    assert_eq!(dependency(&server).await["ok"], true);
}
