//! Deliveries that must be acknowledged. Some of these tests wait for real deadlines: ten seconds are ten seconds here.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{receipts, write};
use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused, seqs, token};

/// The next `n` events, as seq and attempt.
async fn attempts(socket: &mut Socket, n: usize) -> Vec<(u64, Option<u64>)> {
    let events = socket.events(n).await;
    events.iter().map(|event| (event["seq"].as_u64().unwrap(), event["attempt"].as_u64())).collect()
}

/// A server with a thread of so many events of ada's.
async fn begin(log: LogKind, events: u64) -> (Server, Socket) {
    let server = Server::start(log);
    let mut writer = server.connect("ada").await;
    for n in 1..=events {
        assert_eq!(writer.say("t", &n.to_string()).await, n);
    }
    (server, writer)
}

/// Closes, and returns once the log has what the session knew.
async fn leave_and_wait(server: &Server, socket: Socket, user: &str, name: &str) {
    let kept = async || {
        let all = receipts(server, "t", user).await;
        all.into_iter().find(|it| it["user"] == user && it["name"] == name).map(|it| it["at"].clone())
    };
    let before = kept().await;
    socket.leave().await;
    eventually("what was sent is in the log", async || kept().await != before).await;
}

async fn letters(server: &Server) -> Vec<Value> {
    let (status, page) = server.admin("GET", "/v1/dead-letters").await;
    assert_eq!(status, 200, "{page}");
    page["items"].as_array().unwrap().clone()
}

#[tokio::test]
async fn at_most_256_events_are_out_and_each_acknowledgement_makes_room_for_as_many() {
    let (server, mut ada) = begin(LogKind::embedded(), 0).await;
    write(server.connect("ada").await, "t", 300).await;
    let mut reader = Socket::raw(&server.url, &[]).await.unwrap();
    let welcome = reader.ask(json!({"type": "connect", "token": crate::support::token("ada", "")})).await;
    assert_eq!(welcome["limits"]["unacknowledged"], 256, "{welcome}");
    reader.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
    assert_eq!(seqs(&reader.events(256).await), (1..=256).collect::<Vec<_>>());
    assert_eq!(ada.say("t", "live").await, 301);
    for _ in 0..20 {
        reader.silent().await;
    }
    assert_eq!(server.metric("weft_deliveries_total").await, 256.0);
    reader.ack("t", 1).await;
    assert_eq!(attempts(&mut reader, 1).await, [(257, None)]);
    reader.silent().await;
    reader.ack("t", 257).await;
    assert_eq!(attempts(&mut reader, 44).await, (258..=301).map(|seq| (seq, None)).collect::<Vec<_>>());
    assert_eq!(reader.recv_type("caught_up").await["seq"], 301);
    // Live events are held as well once there is no room.
    write(server.connect("ada").await, "t", 300).await;
    assert_eq!(seqs(&reader.events(212).await), (302..=513).collect::<Vec<_>>(), "44 were out already");
    reader.silent().await;
    reader.ack("t", 513).await;
    assert_eq!(seqs(&reader.events(88).await), (514..=601).collect::<Vec<_>>());
    reader.ack("t", 601).await;
    assert_eq!(ada.say("t", "and on").await, 602);
    assert_eq!(attempts(&mut reader, 1).await, [(602, None)]);
}

#[tokio::test]
async fn a_window_that_ends_at_the_head_goes_on_live() {
    let server = Server::start(LogKind::embedded());
    write(server.connect("ada").await, "t", 500).await;
    let mut ada = server.connect("ada").await;
    for seq in 501..=512 {
        assert_eq!(ada.say("t", "and some more").await, seq);
    }
    let mut reader = server.connect("ada").await;
    reader.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
    assert_eq!(seqs(&reader.events(256).await), (1..=256).collect::<Vec<_>>());
    reader.silent().await;
    reader.ack("t", 256).await;
    assert_eq!(seqs(&reader.events(256).await), (257..=512).collect::<Vec<_>>());
    reader.ack("t", 512).await;
    assert_eq!(reader.recv_type("caught_up").await["seq"], 512);
    assert_eq!(ada.say("t", "live").await, 513);
    assert_eq!(attempts(&mut reader, 1).await, [(513, None)]);
}

#[tokio::test]
async fn an_acknowledgement_after_the_deadline_but_before_the_next_round_still_counts() {
    let (server, _) = begin(LogKind::embedded(), 3).await;
    let mut late = server.connect("ada").await;
    late.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
    assert_eq!(attempts(&mut late, 3).await, [(1, None), (2, None), (3, None)]);
    late.recv_type("caught_up").await;
    for attempt in 2..=4 {
        assert_eq!(attempts(&mut late, 3).await, [(1, Some(attempt)), (2, Some(attempt)), (3, Some(attempt))]);
    }
    let mut clock = server.connect("ada").await;
    clock.subscribe_with("t", json!({"after": 2, "confirm": true})).await;
    assert_eq!(attempts(&mut clock, 1).await, [(3, None)]);
    clock.recv_type("caught_up").await;
    // Ten seconds for the acknowledgement, then a pause of two to four: this is its beginning.
    eventually("the fourth was not acknowledged in time", async || {
        server.metric("weft_redeliveries_total").await >= 4.0
    })
    .await;
    late.ack("t", 2).await;
    late.silent().await;
    assert_eq!(attempts(&mut late, 1).await, [(3, Some(2))], "for the third that was the first time");
    late.ack("t", 3).await;
    for attempt in 2..=3 {
        assert_eq!(attempts(&mut clock, 1).await, [(3, Some(attempt))]);
    }
    late.silent().await;
}

on_both_logs!(
    what_is_not_acknowledged_within_ten_seconds_comes_again_from_the_oldest_on_and_in_order,
    |log| async move {
        let (server, mut ada) = begin(log, 4).await;
        // First, so that whatever time the other one gets, this one had it before.
        let mut good = server.connect("ada").await;
        good.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
        assert_eq!(seqs(&good.events(4).await), [1, 2, 3, 4]);
        good.ack("t", 4).await;
        good.recv_type("caught_up").await;
        good.silent().await;
        let mut named = server.connect("ada").await;
        named.subscribe_with("t", json!({"name": "away", "after": 0, "confirm": true})).await;
        assert_eq!(attempts(&mut named, 4).await, (1..=4).map(|seq| (seq, None)).collect::<Vec<_>>());
        leave_and_wait(&server, named, "ada", "away").await;
        let away = receipts(&server, "t", "ada").await;

        let mut bad = server.connect("ada").await;
        bad.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
        assert_eq!(attempts(&mut bad, 4).await, (1..=4).map(|seq| (seq, None)).collect::<Vec<_>>());
        bad.recv_type("caught_up").await;
        bad.ack("t", 2).await;
        let begin = Instant::now();
        bad.silent().await;
        assert_eq!(attempts(&mut bad, 2).await, [(3, Some(2)), (4, Some(2))], "not what was acknowledged");
        assert!(begin.elapsed() >= Duration::from_millis(9_500) && begin.elapsed() < Duration::from_secs(40));
        assert_eq!(ada.say("t", "new").await, 5);
        assert_eq!(attempts(&mut bad, 1).await, [(5, None)], "and on in order, the first time");
        assert!(server.metric("weft_redeliveries_total").await >= 1.0);

        assert_eq!(
            attempts(&mut good, 1).await,
            [(5, None)],
            "nothing comes again to the one that has acknowledged all"
        );
        good.ack("t", 5).await;
        good.silent().await;
        bad.ack("t", 5).await;
        bad.silent().await;
        // Nobody was there to send anything to.
        assert_eq!(
            receipts(&server, "t", "ada").await.iter().find(|it| it["name"] == "away"),
            away.iter().find(|it| it["name"] == "away")
        );
        let mut named = server.connect("ada").await;
        named.subscribe_with("t", json!({"name": "away", "confirm": true})).await;
        let second = (1..=4).map(|seq| (seq, Some(2))).chain([(5, None)]).collect::<Vec<_>>();
        assert_eq!(attempts(&mut named, 5).await, second, "the second attempt, however long nobody was there");
        assert_eq!(letters(&server).await, Vec::<Value>::new());
    }
);

#[tokio::test]
async fn what_another_device_acknowledges_under_the_same_name_does_not_come_again() {
    let (server, _ada) = begin(LogKind::embedded(), 3).await;
    let named = json!({"name": "x", "after": 0, "confirm": true});
    let (mut phone, mut laptop) = (server.connect("ada").await, server.connect("ada").await);
    for device in [&mut phone, &mut laptop] {
        device.subscribe_with("t", named.clone()).await;
        assert_eq!(attempts(device, 3).await, [(1, None), (2, None), (3, None)]);
        device.recv_type("caught_up").await;
    }
    laptop.ack("t", 3).await;
    eventually("it is durable", async || receipts(&server, "t", "ada").await[0]["seq"] == 3).await;
    // Sent later, so that the phone's time is up before this one's.
    let mut other = server.connect("ada").await;
    other.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
    assert_eq!(attempts(&mut other, 3).await, [(1, None), (2, None), (3, None)]);
    other.recv_type("caught_up").await;
    assert_eq!(attempts(&mut other, 1).await, [(1, Some(2))]);
    phone.silent().await;
    laptop.silent().await;
    assert_eq!(server.metric("weft_redeliveries_total").await, 1.0);
}

on_both_logs!(
    after_five_attempts_over_as_many_connections_the_oldest_is_a_dead_letter_and_the_rest_goes_on,
    |log| async move {
        let (mut server, mut ada) = begin(log, 3).await;
        assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
        let named = json!({"name": "mail", "confirm": true});
        let mut ben = server.connect("ben").await;
        // A new name begins where it asks to; from then on its receipt says where it goes on.
        let mut first = named.clone();
        first["after"] = json!(1);
        ben.subscribe_with("t", first).await;
        assert_eq!(attempts(&mut ben, 3).await, [(2, None), (3, None), (4, None)]);
        leave_and_wait(&server, ben, "ben", "mail").await;
        for attempt in 2..=5 {
            let mut ben = server.connect("ben").await;
            assert_eq!(ben.subscribe_with("t", named.clone()).await["after"], 1);
            assert_eq!(attempts(&mut ben, 3).await, [(2, Some(attempt)), (3, Some(attempt)), (4, Some(attempt))]);
            if attempt == 3 {
                // Attempts outlive the server too, once they are in the log.
                leave_and_wait(&server, ben, "ben", "mail").await;
                server.kill();
                server.up();
                server.ready().await;
                ada = server.connect("ada").await;
            } else {
                leave_and_wait(&server, ben, "ben", "mail").await;
            }
        }
        assert_eq!(letters(&server).await, Vec::<Value>::new(), "the fifth attempt is not over yet");
        let mut ben = server.connect("ben").await;
        ben.subscribe_with("t", named.clone()).await;
        assert_eq!(
            attempts(&mut ben, 2).await,
            [(3, Some(2)), (4, Some(2))],
            "it goes on after the one that is given up"
        );
        ben.recv_type("caught_up").await;
        assert_eq!(ada.say("t", "new").await, 5);
        assert_eq!(attempts(&mut ben, 1).await, [(5, None)]);

        let found = letters(&server).await;
        assert_eq!(found.len(), 1, "{found:?}");
        let letter = &found[0];
        let event =
            server.http("GET", "/v1/threads/t/events?after=1&limit=1", "ben", None).await.1["events"][0].clone();
        has(
            letter,
            json!({"reason": "unacknowledged", "user": "ben", "name": "mail", "thread": "t", "seq": 2, "attempts": 5}),
        );
        assert_eq!(letter["event"], event);
        assert!(letter["error"].as_str().unwrap().contains("5 times"), "{letter}");
        assert!(weft::clock::parse_rfc3339(letter["at"].as_str().unwrap()).is_some(), "{letter}");
        assert_eq!(server.metric(r#"weft_dead_letters_total{reason="unacknowledged"}"#).await, 1.0);
        // The subscription goes on after it, though it is not acknowledged.
        eventually("where it goes on is stored", async || {
            let mut other = server.connect("ben").await;
            other.subscribe_with("t", json!({"name": "mail"})).await["after"] == 2
        })
        .await;
        let unread = server.http("GET", "/v1/threads", "ben", None).await.1["threads"][0]["unread"].clone();
        assert_eq!(unread, 5, "given up is not read");

        server.kill();
        server.up();
        server.ready().await;
        assert_eq!(letters(&server).await, found);
        let mut ben = server.connect("ben").await;
        assert_eq!(ben.subscribe_with("t", named.clone()).await["after"], 2, "what is given up stays given up");
        assert_eq!(seqs(&ben.events(3).await), [3, 4, 5]);
        ben.ack("t", 5).await;
        eventually("all is acknowledged", async || receipts(&server, "t", "ada").await.iter().any(|it| it["seq"] == 5))
            .await;
        ben.leave().await;
        let mut ben = server.connect("ben").await;
        assert_eq!(ben.subscribe_with("t", named).await["after"], 5);
        assert_eq!(server.connect("ada").await.say("t", "after all").await, 6);
        assert_eq!(attempts(&mut ben, 1).await, [(6, None)], "the count began anew");
    }
);

on_both_logs!(a_client_says_how_long_it_needs_and_how_often_an_event_is_sent, |log| async move {
    let (server, mut ada) = begin(log, 1).await;
    let mut reader = server.connect("ada").await;
    reader.subscribe_with("t", json!({"after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 2})).await;
    assert_eq!(attempts(&mut reader, 1).await, [(1, None)]);
    let first = Instant::now();
    assert_eq!(attempts(&mut reader, 1).await, [(1, Some(2))]);
    assert!(first.elapsed() >= Duration::from_secs(1), "{:?}", first.elapsed());
    eventually("the second attempt was the last", async || letters(&server).await.len() == 1).await;
    let letter = letters(&server).await.remove(0);
    has(&letter, json!({"reason": "unacknowledged", "seq": 1, "attempts": 2}));
    assert_eq!(ada.say("t", "new").await, 2);
    assert_eq!(attempts(&mut reader, 1).await, [(2, None)]);

    for (field, value) in [("ack_within_ms", json!(999)), ("attempts", json!(0)), ("attempts", json!(21))] {
        let mut subscribe = json!({"type": "subscribe", "thread": "u", "confirm": true});
        subscribe[field] = value;
        refused(&reader.ask(subscribe).await, "bad_request", field);
    }
    let no_confirm = json!({"type": "subscribe", "thread": "u", "attempts": 3});
    refused(&reader.ask(no_confirm).await, "bad_request", "attempts");
});

on_both_logs!(
    an_attempt_that_the_server_cuts_short_does_not_count_and_one_that_the_client_ends_does,
    |log| async move {
        let (mut server, _) = begin(log, 1).await;
        // One attempt is all it asks for.
        let work = json!({"name": "work", "after": 0, "confirm": true, "attempts": 1});
        let again = json!({"name": "work", "confirm": true, "attempts": 1});
        let mut worker = server.connect("ada").await;
        worker.subscribe_with("t", work).await;
        assert_eq!(attempts(&mut worker, 1).await, [(1, None)]);
        for _ in 0..2 {
            server.stop().await;
            assert_eq!(worker.closed().await, 1001);
            server.up();
            server.ready().await;
            worker = server.connect("ada").await;
            worker.subscribe_with("t", again.clone()).await;
            assert_eq!(attempts(&mut worker, 1).await, [(1, Some(2))], "it is sent again after each restart");
            assert_eq!(letters(&server).await, Vec::<Value>::new());
        }
        leave_and_wait(&server, worker, "ada", "work").await;
        let mut worker = server.connect("ada").await;
        worker.subscribe_with("t", again).await;
        assert_eq!(worker.recv().await["type"], "caught_up", "it has had its attempt");
        let letter = letters(&server).await.remove(0);
        has(&letter, json!({"seq": 1, "attempts": 1}));
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_of_which_a_client_takes_nothing_do_not_count_however_many_they_are() {
    let (server, mut ada) = begin(LogKind::embedded(), 1).await;
    assert_eq!(ada.ask(publish("load", "x.load", json!("x".repeat(12_000)))).await["seq"], 1);
    // To the server it is as if its network were gone: its buffer is full, and nothing sent from here on reaches it.
    let mut gone = Socket::open_with_small_buffer(&server.url, &token("ada", "")).await;
    gone.send(&json!({"type": "subscribe", "id": 1, "thread": "load", "after": 0})).await;
    eventually("its buffer is full", async || server.metric("weft_deliveries_total").await == 1.0).await;
    let mut work = json!({"name": "work", "after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 2});
    work["type"] = json!("subscribe");
    work["id"] = json!(2);
    work["thread"] = json!("t");
    gone.send(&work).await;
    eventually("it is sent four times", async || server.metric("weft_deliveries_total").await == 5.0).await;
    assert_eq!(letters(&server).await, Vec::<Value>::new());
    drop(gone);
    eventually("the server knows", async || server.metric("weft_connections").await == 1.0).await;

    let mut back = server.connect("ada").await;
    let again = json!({"name": "work", "confirm": true, "ack_within_ms": 1_000, "attempts": 2});
    back.subscribe_with("t", again).await;
    for attempt in [2, 2] {
        assert_eq!(attempts(&mut back, 1).await, [(1, Some(attempt))], "the first that is taken, and the second");
    }
    eventually("these were all", async || letters(&server).await.len() == 1).await;
    let letter = letters(&server).await.remove(0);
    has(&letter, json!({"seq": 1, "attempts": 2}));
}

#[tokio::test]
async fn after_five_rounds_of_ten_seconds_the_oldest_is_a_dead_letter_and_the_next_has_rounds_of_its_own() {
    let (server, _) = begin(LogKind::embedded(), 2).await;
    let mut reader = server.connect("ada").await;
    reader.subscribe_with("t", json!({"after": 0, "confirm": true})).await;
    assert_eq!(attempts(&mut reader, 2).await, [(1, None), (2, None)]);
    reader.recv_type("caught_up").await;
    let mut last = Instant::now();
    for attempt in 2..=5 {
        assert_eq!(attempts(&mut reader, 2).await, [(1, Some(attempt)), (2, Some(attempt))]);
        let since = std::mem::replace(&mut last, Instant::now());
        // Ten seconds and a pause that doubles: half a second at first, four at last.
        let pause = 250 * 2u64.pow(attempt as u32 - 2);
        assert!(since.elapsed() >= Duration::from_millis(9_500 + pause), "{attempt}: {:?}", since.elapsed());
    }
    assert_eq!(letters(&server).await, Vec::<Value>::new());
    assert_eq!(
        attempts(&mut reader, 1).await,
        [(2, Some(2))],
        "after the one that is given up, and its first attempt counts"
    );
    assert!(last.elapsed() >= Duration::from_millis(9_500), "{:?}", last.elapsed());
    assert_eq!(server.connect("ada").await.say("t", "new").await, 3);
    assert_eq!(attempts(&mut reader, 1).await, [(3, None)]);
    reader.ack("t", 3).await;
    reader.silent().await;
    let found = letters(&server).await;
    assert_eq!(found.len(), 1, "{found:?}");
    let letter = &found[0];
    has(letter, json!({"reason": "unacknowledged", "user": "ada", "name": null, "seq": 1, "attempts": 5}));
    assert_eq!(letter["event"]["data"]["content"], "1");
}
