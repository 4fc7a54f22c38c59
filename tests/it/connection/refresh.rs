//! A new token for a session that goes on.

use serde_json::json;
use weft::auth::jwt::{Claims, mint};

use crate::support::{LogKind, SECRET, Server, Socket, claims, has, seqs, token};

async fn refresh(socket: &mut Socket, token: &str) {
    let answer = socket.ask(json!({"type": "refresh", "token": token})).await;
    assert_eq!(answer["type"], "refreshed", "{answer}");
}

#[tokio::test]
async fn a_refresh_keeps_subscriptions_and_their_cursors() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    for n in 1..=3 {
        assert_eq!(writer.say("t", "before").await, n);
        writer.say("named", "before").await;
    }
    let soon = mint(SECRET, &Claims { exp: weft::clock::now_s() + 90, ..claims("ada", "") }).unwrap();
    let mut reader = Socket::open(&server.url, &soon).await;
    assert_eq!(reader.subscribe("t", Some(1)).await["after"], 1);
    assert_eq!(seqs(&reader.events(2).await), [2, 3]);
    reader.recv_type("caught_up").await;

    // A cursor moves on across refreshes, without a hole and without anything twice.
    for n in 4..=6 {
        refresh(&mut reader, &token("ada", "")).await;
        assert_eq!(writer.say("t", "after").await, n);
        let event = reader.recv().await;
        has(&event, json!({"type": "event", "seq": n}));
    }
    assert_eq!(reader.ask(json!({"type": "subscribe", "thread": "t"})).await["code"], "conflict");
    reader.silent().await;
}

#[tokio::test]
async fn a_refresh_keeps_a_durable_subscription_its_acknowledgements_and_those_to_all_threads() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    writer.say("t", "one").await;
    writer.say("t", "two").await;

    let mut reader = server.connect("ada").await;
    reader.subscribe_with("t", json!({"name": "inbox", "after": 0})).await;
    assert_eq!(seqs(&reader.events(2).await), [1, 2]);
    reader.recv_type("caught_up").await;
    refresh(&mut reader, &token("ada", "")).await;
    reader.ack("t", 2).await;
    reader.silent().await;
    reader.leave().await;

    let mut again = server.connect("ada").await;
    let goes_on = async || {
        let (_, receipts) = server.http("GET", "/v1/threads/t/receipts", "ada", None).await;
        receipts["receipts"].as_array().is_some_and(|all| all.iter().any(|it| it["name"] == "inbox" && it["seq"] == 2))
    };
    crate::support::eventually("the receipt is stored", goes_on).await;
    assert_eq!(again.subscribe_with("t", json!({"name": "inbox"})).await["after"], 2);
    writer.say("t", "three").await;
    assert_eq!(seqs(&again.events(1).await), [3]);

    let mut all = server.connect("ada").await;
    assert_eq!(all.subscribe("*", None).await["after"]["t"], 3);
    refresh(&mut all, &token("ada", "")).await;
    writer.say("t", "four").await;
    assert_eq!(seqs(&all.events(1).await), [4]);
    // A thread that is joined only after the refresh is followed as well.
    writer.say("new", "joined later").await;
    let first = all.events(1).await.remove(0);
    has(&first, json!({"thread": "new", "seq": 1}));
}
