//! Subscriptions to some kinds: what comes, and how the client hears of what was left out.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::caught_up;
use crate::support::{LogKind, Server, Socket, has, publish, seqs};

async fn note(socket: &mut Socket, thread: &str, kind: &str) -> u64 {
    let answer = socket.ask(publish(thread, kind, json!({}))).await;
    answer["seq"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test]
async fn only_the_kinds_asked_for_come_replayed_and_live_and_caught_up_covers_the_others() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    for kind in ["x.a", "x.b", "x.a", "x.c", "x.b", "x.a"] {
        note(&mut writer, "t", kind).await;
    }
    let subscribe = async |more: Value| {
        let mut reader = server.connect("ada").await;
        let mut command = json!({"type": "subscribe", "thread": "t"});
        command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let begun = reader.ask(command).await;
        has(&begun, json!({"type": "subscribed", "head": 6}));
        reader
    };
    for (more, wanted) in [
        (json!({"after": 0, "kinds": ["x.b"]}), vec![2, 5]),
        (json!({"after": 0, "kinds": ["x.b", "x.c", "x.never"]}), vec![2, 4, 5]),
        (json!({"after": 2, "kinds": ["x.b"]}), vec![5]),
        // The newest events there are, and of these the kinds asked for.
        (json!({"last": 3, "kinds": ["x.c"]}), vec![4]),
        (json!({"after": 0, "kinds": ["x.never"]}), vec![]),
        (json!({"kinds": ["x.a"]}), vec![]),
    ] {
        let mut reader = subscribe(more).await;
        let events = reader.events(wanted.len()).await;
        assert_eq!(seqs(&events), wanted);
        assert_eq!(reader.recv().await, json!({"type": "caught_up", "thread": "t", "seq": 6}));
    }
    let mut reader = subscribe(json!({"kinds": ["x.b", "member_added"]})).await;
    caught_up(&mut reader, "t").await;
    note(&mut writer, "t", "x.a").await;
    assert_eq!(note(&mut writer, "t", "x.b").await, 8);
    server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await;
    assert_eq!(seqs(&reader.events(2).await), [8, 9]);
}

#[tokio::test]
async fn with_star_the_kinds_hold_for_each_thread_also_those_joined_later() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    for thread in ["a", "b"] {
        note(&mut writer, thread, "x.left_out").await;
        note(&mut writer, thread, "x.wanted").await;
    }
    let mut star = server.connect("ada").await;
    let command = json!({"type": "subscribe", "thread": "*", "after": {"a": 2}, "kinds": ["x.wanted"]});
    assert_eq!(star.ask(command).await["after"], json!({"a": 2, "b": 0}));
    server.http("PUT", "/v1/threads/c", "ben", Some(json!({"members": ["ada"]}))).await;
    for thread in ["a", "b", "c"] {
        note(&mut writer, thread, "x.left_out").await;
        note(&mut writer, thread, "x.wanted").await;
    }
    let mut seen: Vec<_> = star
        .events(4)
        .await
        .iter()
        .map(|event| (event["thread"].as_str().unwrap().to_owned(), event["seq"].as_u64().unwrap()))
        .collect();
    seen.sort();
    assert_eq!(seen, [("a".into(), 4), ("b".into(), 2), ("b".into(), 4), ("c".into(), 3)]);
}

#[tokio::test]
async fn position_tells_at_most_once_a_second_how_far_others_were_left_out_and_always_tells_the_last() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    note(&mut writer, "t", "x.left_out").await;
    let mut reader = server.connect("ada").await;
    reader.ask(json!({"type": "subscribe", "thread": "t", "kinds": ["x.wanted"]})).await;
    caught_up(&mut reader, "t").await;
    let mut got: Vec<(Instant, u64)> = Vec::new();
    let mut head = 1;
    // Written for as long as it takes, so that there is always something to tell.
    while got.len() < 3 {
        head = note(&mut writer, "t", "x.left_out").await;
        let frame = tokio::time::timeout(Duration::from_millis(1), reader.next()).await;
        if let Ok(frame) = frame {
            let frame = frame.unwrap();
            has(&frame, json!({"type": "position", "thread": "t"}));
            got.push((Instant::now(), frame["seq"].as_u64().unwrap()));
        }
    }
    assert!(got.windows(2).all(|two| two[0].1 < two[1].1), "{got:?}");
    // Two of them may take different times on the way: the slack is for that.
    let span = got[2].0 - got[0].0;
    assert!(span > Duration::from_millis(1_600), "three within {span:?}");
    let mut last = got[2].1;
    while last < head {
        let frame = reader.recv().await;
        assert_eq!(frame["type"], "position", "{frame}");
        assert!(frame["seq"].as_u64().unwrap() > last);
        last = frame["seq"].as_u64().unwrap();
    }
    assert_eq!(last, head, "the last position is the head");

    // Who resumes from there has a cursor without gap: with kinds, and without.
    assert_eq!(note(&mut writer, "t", "x.wanted").await, head + 1);
    assert_eq!(note(&mut writer, "t", "x.left_out").await, head + 2);
    assert_eq!(seqs(&reader.events(1).await), [head + 1], "a wanted one comes at once");
    for (kinds, wanted) in [(json!(["x.wanted"]), vec![head + 1]), (Value::Null, vec![head + 1, head + 2])] {
        let mut resumed = server.connect("ada").await;
        let mut command = json!({"type": "subscribe", "thread": "t", "after": last});
        if !kinds.is_null() {
            command["kinds"] = kinds;
        }
        assert_eq!(resumed.ask(command).await["after"], last);
        assert_eq!(seqs(&resumed.events(wanted.len()).await), wanted);
    }
}

#[tokio::test]
async fn position_reaches_a_client_that_has_no_credit_left() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    note(&mut writer, "t", "x.left_out").await;
    let mut reader = server.connect("ada").await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    reader.ask(json!({"type": "subscribe", "thread": "t", "kinds": ["x.wanted"]})).await;
    caught_up(&mut reader, "t").await;
    note(&mut writer, "t", "x.wanted").await;
    assert_eq!(seqs(&reader.events(1).await), [2]);
    // What waits for credit is not reported as left out: this one is wanted.
    assert_eq!(note(&mut writer, "t", "x.wanted").await, 3);
    note(&mut writer, "t", "x.left_out").await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    assert_eq!(seqs(&reader.events(1).await), [3]);
    reader.send(&json!({"type": "credit", "events": 1})).await;
    let frame = reader.recv_type("position").await;
    assert_eq!(frame["seq"], 4);
}

#[tokio::test]
async fn kinds_that_cannot_be_are_refused_by_name() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "hello").await;
    let many: Vec<String> = (0..101).map(|n| format!("x.{n}")).collect();
    for thread in ["t", "*"] {
        for kinds in
            [json!([]), json!(many), json!([""]), json!(["x".repeat(129)]), json!("x.a"), json!([1]), json!({})]
        {
            let answer = ada.ask(json!({"type": "subscribe", "thread": thread, "kinds": kinds})).await;
            assert_eq!(
                (&answer["type"], &answer["code"]),
                (&json!("error"), &json!("bad_request")),
                "{kinds}: {answer}"
            );
            assert!(answer["field"].as_str().is_some_and(|field| field.starts_with("kinds")), "{kinds}: {answer}");
        }
    }
    let most = ada.ask(json!({"type": "subscribe", "thread": "t", "kinds": many[..100]})).await;
    assert_eq!(most["type"], "subscribed", "{most}");
}
