//! Replays at a pace: `subscribe` with `replay`.

use std::time::{Duration, Instant, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, accepted, has, publish, refused, refused_with, seqs};

/// The head of the thread "t", to which ada has published five events at least, and until the last one happened so long after
/// the first.
async fn events_over(ada: &mut Socket, time: Duration) -> u64 {
    ada.say("t", "first").await;
    ada.subscribe("t", Some(0)).await;
    let first = at(&ada.recv_type("event").await);
    loop {
        ada.send(&json!({"type": "publish", "id": 0, "thread": "t", "kind": "x.tick", "data": {}})).await;
        let event = ada.recv_type("event").await;
        let head = event["seq"].as_u64().expect("an event has a seq");
        if head >= 5 && at(&event) >= first + time {
            has(&ada.ask(json!({"type": "unsubscribe", "thread": "t"})).await, json!({"type": "unsubscribed"}));
            return head;
        }
    }
}

/// When an event happened, since the Unix epoch.
fn at(event: &Value) -> Duration {
    let at = event["at"].as_str().expect("an event has a time");
    humantime::parse_rfc3339(at).expect("RFC 3339").duration_since(UNIX_EPOCH).expect("after 1970")
}

on_both_logs!(a_replay_takes_as_long_as_it_took_by_its_speed_and_goes_on_live, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    let head = events_over(&mut ada, Duration::from_millis(400)).await;

    let begun = Instant::now();
    let mut reader = server.connect("ada").await;
    let subscribed = reader.subscribe_with("t", json!({"replay": {"speed": 2}})).await;
    has(&subscribed, json!({"head": head, "after": 0}));
    let events = reader.events(head as usize).await;
    // Never sooner, however slow all is.
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    assert_eq!(seqs(&events), (1..=head).collect::<Vec<_>>());
    assert!(events.iter().all(|event| event["replay"] == true), "{events:?}");

    has(&reader.recv_type("caught_up").await, json!({"thread": "t", "seq": head}));
    ada.say("t", "live").await;
    let live = reader.recv_type("event").await;
    assert_eq!((&live["seq"], live.get("replay")), (&json!(head + 1), None));
});

#[tokio::test]
async fn what_comes_while_a_replay_goes_on_follows_it_and_is_none_of_it() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let head = events_over(&mut ada, Duration::from_millis(100)).await;

    // Without credit, so that it is not over before there is more.
    let mut reader = server.connect("ada").await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    reader.subscribe_with("t", json!({"replay": {"speed": 1000000}})).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
    let later = ada.say("t", "meanwhile").await;
    reader.send(&json!({"type": "credit", "events": 10000})).await;

    let events = reader.events(later as usize - 1).await;
    assert_eq!(seqs(&events), (2..=later).collect::<Vec<_>>());
    for event in &events {
        let is_replay = event["seq"].as_u64().expect("a seq") <= head;
        assert_eq!(event.get("replay"), is_replay.then_some(&json!(true)), "{event}");
    }
    has(&reader.recv_type("caught_up").await, json!({"seq": later}));
}

#[tokio::test]
async fn a_replay_up_to_a_seq_or_a_time_ends_its_subscription_there() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let head = events_over(&mut ada, Duration::from_millis(50)).await;
    let page = server.http("GET", "/v1/threads/t/events?after=0&limit=1000", "ada", None).await.1;
    let events = page["events"].as_array().expect("a page").clone();
    assert_eq!(events.len() as u64, head);

    let cases = [
        (json!(2), 2),
        (json!(events[2]["at"]), {
            let until = at(&events[2]);
            events.iter().filter(|event| at(event) <= until).count() as u64
        }),
    ];
    let mut reader = server.connect("ada").await;
    for (until, last) in cases {
        reader.subscribe_with("t", json!({"replay": {"speed": 1000000, "until": until}})).await;
        assert_eq!(seqs(&reader.events(last as usize).await), (1..=last).collect::<Vec<_>>());
        has(&reader.recv().await, json!({"type": "caught_up", "thread": "t", "seq": last}));
        // It is over: nothing comes live, and there is nothing to end.
        ada.say("t", "more").await;
        reader.silent().await;
        refused(&reader.ask(json!({"type": "unsubscribe", "thread": "t"})).await, "not_found", "thread");
    }

    // Nothing to replay is a replay as well.
    reader.subscribe_with("t", json!({"after": 3, "replay": {"speed": 1, "until": 3}})).await;
    has(&reader.recv().await, json!({"type": "caught_up", "seq": 3}));
    // Before all of it, too.
    reader.subscribe_with("t", json!({"replay": {"speed": 1, "until": "2001-01-01T00:00:00Z"}})).await;
    has(&reader.recv().await, json!({"type": "caught_up", "seq": 0}));
    reader.silent().await;
}

#[tokio::test]
async fn a_replay_leaves_out_kinds_and_begins_where_it_is_asked_to() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for kind in ["x.a", "x.b", "x.a", "x.b", "x.a"] {
        accepted(&ada.ask(publish("t", kind, json!({}))).await);
    }
    let head = ada.subscribe("t", None).await["head"].as_u64().expect("a head");
    for (begin, wanted) in [(json!({"after": head - 3}), [head - 2, head]), (json!({"last": 3}), [head - 2, head])] {
        let mut reader = server.connect("ada").await;
        let mut more = json!({"kinds": ["x.a"], "replay": {"speed": 1000, "until": head}});
        more.as_object_mut().expect("an object").extend(begin.as_object().expect("an object").clone());
        reader.subscribe_with("t", more).await;
        assert_eq!(seqs(&reader.events(2).await), wanted);
        has(&reader.recv_type("caught_up").await, json!({"seq": head}));
    }
}

#[tokio::test]
async fn a_replay_that_waits_holds_up_nothing_else_of_its_session_and_can_be_ended() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    events_over(&mut ada, Duration::from_millis(100)).await;

    let mut reader = server.connect("ada").await;
    ada.say("u", "begin").await;
    reader.subscribe("u", None).await;
    reader.recv_type("caught_up").await;
    let begun = Instant::now();
    reader.subscribe_with("t", json!({"replay": {"speed": 0.01}})).await;
    let first = reader.recv_type("event").await;
    has(&first, json!({"thread": "t", "seq": 1, "replay": true}));
    ada.say("u", "live").await;
    loop {
        let event = reader.recv_type("event").await;
        if event["thread"] == "u" {
            break;
        }
        // The whole of it takes ten seconds.
        let by_now = at(&first) + begun.elapsed() / 100 + Duration::from_millis(1);
        assert!(at(&event) <= by_now, "{event}");
    }
    has(&reader.ask(json!({"type": "unsubscribe", "thread": "t"})).await, json!({"type": "unsubscribed"}));
    // Once more, at another speed.
    reader.subscribe_with("t", json!({"replay": {"speed": 1000000, "until": 1}})).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
}

#[tokio::test]
async fn who_is_removed_while_a_replay_waits_gets_no_more_of_it() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "first").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    let head = events_over(&mut ada, Duration::from_millis(100)).await;

    let mut ben = server.connect("ben").await;
    ben.subscribe_with("t", json!({"replay": {"speed": 0.1}})).await;
    ben.events(1).await;
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    // It was removed a good second before the end of the replay.
    loop {
        match ben.recv().await {
            frame if frame["type"] == "event" => assert!(frame["seq"].as_u64().expect("a seq") < head, "{frame}"),
            frame if frame["type"] == "error" => {
                has(&frame, json!({"code": "not_found", "thread": "t"}));
                break;
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_replay_that_cannot_be_is_refused_by_its_field() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let head = ada.say("t", "first").await;
    let refusal = async |ada: &mut Socket, more: Value| {
        let mut command = json!({"type": "subscribe", "thread": "t"});
        command.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ada.ask(command).await
    };
    for (more, code, field) in [
        (json!({"replay": 4}), "bad_request", "replay"),
        (json!({"replay": {"speed": "fast"}}), "bad_request", "replay.speed"),
        (json!({"replay": {"speed": 1e9}}), "bad_request", "replay.speed"),
        (json!({"replay": {"speed": 1, "step": true}}), "bad_request", "step"),
        (json!({"replay": {"speed": 1, "until": "tomorrow"}}), "bad_request", "replay.until"),
        (json!({"replay": {"speed": 1, "until": head + 1}}), "cursor_invalid", "replay.until"),
        (json!({"after": head, "replay": {"speed": 1, "until": head - 1}}), "bad_request", "replay.until"),
        (json!({"after": head + 1, "replay": {"speed": 1}}), "cursor_invalid", "after"),
        (json!({"name": "n", "replay": {"speed": 1}}), "bad_request", "replay"),
        (json!({"confirm": true, "replay": {"speed": 1}}), "bad_request", "replay"),
        (json!({"thread": "*", "replay": {"speed": 1}}), "bad_request", "replay"),
    ] {
        let answer = refusal(&mut ada, more).await;
        refused(&answer, code, field);
    }
    let mut eve = server.connect("eve").await;
    refused_with(&refusal(&mut eve, json!({"replay": {"speed": 1}})).await, "not_found");
}

#[tokio::test]
async fn a_session_has_at_most_100_replays_at_a_time() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let mut reader = server.connect("ada").await;
    // Without credit none of them ends.
    reader.send(&json!({"type": "credit", "events": 1})).await;
    ada.say("t", "it uses the credit up").await;
    reader.subscribe("t", Some(0)).await;
    reader.events(1).await;
    let replay = |n: u32| json!({"type": "subscribe", "thread": format!("t{n}"), "replay": {"speed": 1}});
    for n in 0..=100 {
        ada.say(&format!("t{n}"), "hello").await;
        let answer = reader.ask(replay(n)).await;
        if n < 100 {
            has(&answer, json!({"type": "subscribed"}));
        } else {
            refused(&answer, "too_large", "replay");
        }
    }
    has(&reader.ask(json!({"type": "unsubscribe", "thread": "t0"})).await, json!({"type": "unsubscribed"}));
    has(&reader.ask(replay(100)).await, json!({"type": "subscribed"}));
}
