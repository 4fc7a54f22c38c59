//! Flow control: a client gets as many events as it has asked for, and everything else all the same.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use weft::delivery::outbox::EVENT_BYTES;

use super::{pour, write};
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused, refused_with, seqs, token};

async fn credit(socket: &mut Socket, events: u64) {
    socket.send(&json!({"type": "credit", "events": events})).await;
}

#[tokio::test]
async fn credit_is_counted_over_replay_and_live_events_and_nothing_comes_without_it() {
    let server = Server::start(LogKind::embedded());
    write(server.connect("ada").await, "t", 100).await;
    let mut writer = server.connect("ada").await;
    let mut reader = server.connect("ada").await;
    credit(&mut reader, 3).await;
    reader.subscribe("t", Some(90)).await;
    assert_eq!(seqs(&reader.events(3).await), [91, 92, 93]);
    for _ in 0..20 {
        reader.silent().await;
    }
    credit(&mut reader, 2).await;
    assert_eq!(seqs(&reader.events(2).await), [94, 95]);
    reader.silent().await;
    credit(&mut reader, 1).await;
    credit(&mut reader, 4).await;
    assert_eq!(seqs(&reader.events(5).await), [96, 97, 98, 99, 100]);
    assert_eq!(reader.recv().await, json!({"type": "caught_up", "thread": "t", "seq": 100}), "without credit");
    for seq in 101..=105 {
        assert_eq!(writer.say("t", "live").await, seq);
    }
    reader.silent().await;
    credit(&mut reader, 2).await;
    assert_eq!(seqs(&reader.events(2).await), [101, 102]);
    reader.silent().await;
    credit(&mut reader, 1_000).await;
    assert_eq!(seqs(&reader.events(3).await), [103, 104, 105]);
    assert_eq!(writer.say("t", "there is credit left").await, 106);
    assert_eq!(seqs(&reader.events(1).await), [106]);
    for events in [json!(0), json!(-1), json!(1.5), json!("3"), Value::Null] {
        reader.send(&json!({"type": "credit", "events": events})).await;
        let rejection = reader.recv().await;
        refused(&rejection, "bad_request", "events");
    }
    credit(&mut reader, u64::MAX).await;
    reader.silent().await;
}

#[tokio::test]
async fn what_is_no_event_comes_without_credit_also_that_a_member_was_removed() {
    let server = Server::start(LogKind::embedded());
    for thread in ["t", "u"] {
        let members = json!({"members": ["ben"]});
        assert_eq!(server.http("PUT", &format!("/v1/threads/{thread}"), "ada", Some(members)).await.0, 201);
    }
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    credit(&mut ben, 1).await;
    ben.subscribe("t", None).await;
    ben.recv_type("caught_up").await;
    ada.say("t", "this one").await;
    assert_eq!(seqs(&ben.events(1).await), [2]);
    ada.say("t", "waits").await;
    refused_with(&ben.ask(json!({"type": "subscribe", "thread": "nowhere"})).await, "not_found");
    ben.subscribe("u", None).await;
    assert_eq!(ben.recv_type("caught_up").await["thread"], "u");
    assert_eq!(ben.say("u", "publishing needs none").await, 2);
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    let got = ben.recv().await;
    has(&got, json!({"type": "error", "thread": "t", "code": "not_found"}));
    ben.silent().await;
    // Before the removal it was for ben, and would have been sent had there been credit: now it is not.
    credit(&mut ben, 10).await;
    let mine = ben.recv().await;
    has(&mine, json!({"thread": "u", "seq": 2}));
    ben.silent().await;
}

#[tokio::test]
async fn a_long_replay_under_credit_is_complete_and_in_order() {
    const EVENTS: u64 = 3_000;
    let server = Server::start(LogKind::embedded());
    write(server.connect("ada").await, "t", EVENTS as usize).await;
    let mut writer = server.connect("ada").await;
    let mut reader = server.connect("ada").await;
    credit(&mut reader, 1).await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
    let (mut seen, mut step, mut total) = (1, 1, EVENTS);
    while seen < total {
        if total < EVENTS + 200 {
            total = writer.say("t", "meanwhile").await;
        }
        step = step * 7 % 613;
        credit(&mut reader, step).await;
        let upto = (seen + step).min(total);
        assert_eq!(seqs(&reader.events((upto - seen) as usize).await), (seen + 1..=upto).collect::<Vec<_>>());
        seen = upto;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_credit_is_bounded_and_comes_later_once_and_in_order() {
    const EVENTS: u64 = 20_000;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    writer.say("t", "1").await;
    let mut reader = server.connect("ada").await;
    credit(&mut reader, 1).await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
    reader.recv_type("caught_up").await;
    let mut most: f64 = 0.0;
    for _ in 0..EVENTS / 2_000 {
        pour(&mut writer, "t", 2_000).await;
        most = most.max(server.metric("weft_outbox_bytes").await);
    }
    assert!(most > 0.0 && most <= EVENT_BYTES as f64, "{most}");
    let waiting = server.admin("GET", "/v1/sessions").await.1;
    let waiting: u64 =
        waiting["sessions"].as_array().unwrap().iter().map(|it| it["outbox_bytes"].as_u64().unwrap()).sum();
    assert!(waiting > 0 && waiting <= EVENT_BYTES as u64, "{waiting}");
    // The session hears everything else meanwhile.
    assert_eq!(reader.ask(publish("u", "x.a", json!(1))).await["seq"], 1);
    let (mut expected, mut given) = (2, 0);
    while expected <= EVENTS + 1 {
        if given == 0 {
            given = 5_000;
            credit(&mut reader, given).await;
        }
        let frame = reader.recv().await;
        match frame["type"].as_str().unwrap() {
            "event" => {
                assert_eq!(frame["seq"], expected);
                expected += 1;
                given -= 1;
            }
            "lagged" => assert_eq!(frame["from"], expected, "{frame}"),
            "caught_up" => assert_eq!(frame["seq"], expected - 1, "{frame}"),
            other => panic!("{other}: {frame}"),
        }
    }
    eventually("nothing waits any more", async || server.metric("weft_outbox_bytes").await == 0.0).await;
    assert!(server.metric("weft_lagged_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_overtake_the_events_that_wait_for_a_slow_socket() {
    const EVENTS: u64 = 400;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    // 24 MB: more than all the buffers between the two hold.
    let large = publish("t", "x.large", json!("x".repeat(60_000)));
    for seq in 1..=EVENTS {
        assert_eq!(writer.ask(large.clone()).await["seq"], seq);
    }
    let mut reader = server.connect("ada").await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
    // Nothing is read until the socket takes no more.
    let mut before = 0.0;
    let mut same = 0;
    eventually("the socket is full", async || {
        let now = server.metric("weft_deliveries_total").await;
        same = if now == before { same + 1 } else { 0 };
        before = now;
        same == 20
    })
    .await;
    reader.send(&json!({"type": "ping", "id": 5})).await;
    let mut seen = 1;
    loop {
        let frame = reader.recv().await;
        if frame["id"] == 5 {
            break;
        }
        seen += 1;
        assert_eq!(frame["seq"], seen);
    }
    assert!(seen < EVENTS, "the pong came after all of them");
    assert_eq!(seqs(&reader.events((EVENTS - seen) as usize).await), (seen + 1..=EVENTS).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_a_kilobyte_a_second_is_slow_and_stays() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    for _ in 0..32 {
        writer.say("t", &"x".repeat(60_000)).await;
    }
    // Buffers as small as on a thin line, so that what the reader takes shows.
    let mut reader = Socket::open_with_small_buffer(&server.url, &token("eva", "analyst")).await;
    reader.send(&json!({"type": "subscribe", "id": 1, "thread": "t", "after": 0})).await;
    // Longer than a heartbeat and its answer take, and than a socket may take nothing.
    let mut every = tokio::time::interval(Duration::from_secs(1));
    for _ in 0..45 {
        every.tick().await;
        let read = reader.ws.get_mut().read(&mut [0; 1_024]).await.unwrap();
        assert!(read > 0, "the server has closed");
    }
    let (_, open) = server.http_with("GET", "/v1/sessions?user=eva", &token("root", "admin"), None, &[]).await;
    assert_eq!(open["sessions"].as_array().unwrap().len(), 1, "{open}");
}
