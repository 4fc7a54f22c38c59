//! Durable subscriptions: a name keeps its place, in the log.

use serde_json::{Value, json};

use super::receipts;
use crate::on_both_logs;
use crate::support::{
    LogKind, Server, Socket, accepted, eventually, has, publish, refused, refused_with, seqs, token_of,
};

/// What a client with this name gets: where it begins, and the seqs up to `caught_up`.
async fn resume(server: &Server, user: &str, more: Value) -> (Socket, u64, Vec<u64>) {
    let mut socket = server.connect(user).await;
    let subscribed = socket.subscribe_with("t", more).await;
    let after = subscribed["after"].as_u64().unwrap();
    let mut seen = Vec::new();
    loop {
        let frame = socket.recv().await;
        match frame["type"].as_str().unwrap() {
            "event" => seen.push(frame["seq"].as_u64().unwrap()),
            "caught_up" => return (socket, after, seen),
            other => panic!("{other}: {frame}"),
        }
    }
}

/// The seq that a user has acknowledged under a name, as members see it.
async fn acked(server: &Server, user: &str, name: &str) -> Option<u64> {
    receipts(server, "t", user).await.iter().find(|it| it["user"] == user && it["name"] == name)?["seq"].as_u64()
}

async fn until_acked(server: &Server, name: &str, seq: u64) {
    eventually("the acknowledgement is durable", async || acked(server, "ada", name).await == Some(seq)).await;
}

on_both_logs!(a_named_subscription_goes_on_after_what_it_acknowledged_also_after_a_kill, |log| async move {
    let mut server = Server::start(log);
    let mut writer = server.connect("ada").await;
    writer.say("t", "1").await;
    let named = || json!({"name": "x"});
    let (reader, after, seen) = resume(&server, "ada", named()).await;
    assert_eq!((after, seen), (1, vec![]), "a new one begins at the head");
    reader.leave().await;
    for n in 2..=6 {
        writer.say("t", &n.to_string()).await;
    }
    let (mut reader, after, seen) = resume(&server, "ada", named()).await;
    assert_eq!((after, seen), (1, vec![2, 3, 4, 5, 6]), "what came meanwhile");
    reader.ack("t", 4).await;
    until_acked(&server, "x", 4).await;
    reader.leave().await;
    let (reader, after, seen) = resume(&server, "ada", named()).await;
    assert_eq!((after, seen), (4, vec![5, 6]));
    drop(reader);

    server.kill();
    server.up();
    server.ready().await;
    let (mut reader, after, seen) = resume(&server, "ada", named()).await;
    assert_eq!((after, seen), (4, vec![5, 6]));
    // Acknowledgements are cumulative, and a lower one takes nothing back.
    for seq in [2, 5, 3, 1] {
        reader.ack("t", seq).await;
    }
    until_acked(&server, "x", 5).await;
    reader.silent().await;
    reader.leave().await;
    let (reader, after, seen) = resume(&server, "ada", named()).await;
    assert_eq!((after, seen), (5, vec![6]));
    drop(reader);
    let (reader, after, seen) = resume(&server, "ada", json!({"name": "x", "after": 2})).await;
    assert_eq!((after, seen), (2, vec![3, 4, 5, 6]), "what the client says goes before");
    drop(reader);
    let (_, after, seen) = resume(&server, "ada", json!({"name": "x", "last": 1})).await;
    assert_eq!((after, seen), (5, vec![6]));
    let (_, after, _) = resume(&server, "ada", json!({"name": "y", "after": 3})).await;
    assert_eq!(after, 3, "another name is another subscription");

    server.stop().await;
    server.up();
    server.ready().await;
    assert_eq!(resume(&server, "ada", named()).await.1, 5, "looking back moved nothing");
    assert_eq!(
        resume(&server, "ada", json!({"name": "y"})).await.1,
        3,
        "it began there, though nothing was acknowledged"
    );
    assert_eq!(acked(&server, "ada", "y").await, Some(0));
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_named_subscription_goes_on_at_another_node() {
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    let mut writer = a.connect("ada").await;
    for n in 1..=4 {
        writer.say("t", &n.to_string()).await;
    }
    let (mut reader, ..) = resume(&a, "ada", json!({"name": "x", "after": 0})).await;
    reader.ack("t", 2).await;
    // B may not even know of the thread yet.
    eventually("B has it from the log", async || {
        b.http("GET", "/v1/threads/t", "ada", None).await.0 == 200 && acked(&b, "ada", "x").await == Some(2)
    })
    .await;
    reader.leave().await;
    let (mut reader, after, seen) = resume(&b, "ada", json!({"name": "x"})).await;
    assert_eq!((after, seen), (2, vec![3, 4]));
    reader.ack("t", 4).await;
    until_acked(&a, "x", 4).await;
    assert_eq!(resume(&a, "ada", json!({"name": "x"})).await.1, 4, "and back");
}

#[tokio::test]
async fn two_devices_with_one_name_both_get_all_and_share_its_place() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    writer.say("t", "1").await;
    let (mut phone, ..) = resume(&server, "ada", json!({"name": "x"})).await;
    let (mut laptop, ..) = resume(&server, "ada", json!({"name": "x"})).await;
    for n in 2..=4 {
        writer.say("t", &n.to_string()).await;
    }
    for device in [&mut phone, &mut laptop] {
        assert_eq!(seqs(&device.events(3).await), [2, 3, 4]);
    }
    phone.ack("t", 3).await;
    until_acked(&server, "x", 3).await;
    // Older than what is known, though this device has not said it before.
    laptop.ack("t", 2).await;
    laptop.silent().await;
    laptop.leave().await;
    phone.leave().await;
    assert_eq!(resume(&server, "ada", json!({"name": "x"})).await.1, 3);
    assert_eq!(acked(&server, "ada", "x").await, Some(3));
    // A name is its user's own.
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    assert_eq!(resume(&server, "ben", json!({"name": "x"})).await.1, 5);
    let theirs = &mut Socket::open(&server.url, &token_of("umbrella", "ada")).await;
    theirs.say("t", "another tenant's").await;
    assert_eq!(theirs.subscribe_with("t", json!({"name": "x"})).await["after"], 1);
}

on_both_logs!(
    a_named_subscription_to_all_threads_brings_those_joined_meanwhile_from_the_joining_on,
    |log| async move {
        let mut server = Server::start(log);
        let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
        for (thread, events) in [("a", 3), ("b", 1)] {
            for n in 0..events {
                ada.say(thread, &n.to_string()).await;
            }
        }
        let all = async |server: &Server| {
            let mut socket = server.connect("ada").await;
            let subscribed = socket.subscribe_with("*", json!({"name": "s"})).await;
            (socket, subscribed["after"].clone(), subscribed["head"].clone())
        };
        let (star, after, _) = all(&server).await;
        assert_eq!(after, json!({"a": 3, "b": 1}));
        star.leave().await;
        assert_eq!(ada.say("a", "while away").await, 4);
        // Before the joining there is a conversation that ada did not ask for.
        for n in 1..=2 {
            assert_eq!(ben.say("c", "among others").await, n);
        }
        assert_eq!(server.http("PUT", "/v1/threads/c/members/ada", "ben", None).await.0, 201);
        assert_eq!(ben.say("c", "hello ada").await, 4);

        let (mut star, after, head) = all(&server).await;
        assert_eq!((after, head), (json!({"a": 3, "b": 1, "c": 2}), json!({"a": 4, "b": 1, "c": 4})));
        let mut seen: Vec<(String, u64)> = Vec::new();
        for event in star.events(3).await {
            seen.push((event["thread"].as_str().unwrap().to_owned(), event["seq"].as_u64().unwrap()));
        }
        seen.sort();
        assert_eq!(seen, [("a".into(), 4), ("c".into(), 3), ("c".into(), 4)]);
        star.ack("a", 4).await;
        star.send(&json!({"type": "ack", "thread": "c", "seq": 3, "name": "s"})).await;
        let places = async |server: &Server| {
            let mut places = Vec::new();
            for thread in ["a", "c"] {
                places.extend(receipts(server, thread, "ada").await.iter().map(|it| it["seq"].as_u64().unwrap()));
            }
            places
        };
        eventually("both are durable", async || places(&server).await == [4, 3]).await;
        // One that is joined while it is there gets a place as well.
        assert_eq!(ada.say("d", "made now").await, 1);
        let mine = star.recv_type("event").await;
        has(&mine, json!({"thread": "d", "seq": 1}));
        eventually("its place is kept", async || receipts(&server, "d", "ada").await.len() == 1).await;
        star.leave().await;
        server.kill();
        server.up();
        server.ready().await;
        assert_eq!(all(&server).await.1, json!({"a": 4, "b": 1, "c": 3, "d": 0}));
    }
);

#[tokio::test]
async fn a_bad_name_or_acknowledgement_is_refused_by_its_field() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "1").await;
    for name in [json!(""), json!("n".repeat(129)), json!(5), json!(["x"])] {
        let rejection = ada.ask(json!({"type": "subscribe", "thread": "t", "name": name})).await;
        refused(&rejection, "bad_request", "name");
    }
    for confirm in [json!("yes"), json!(1)] {
        let rejection = ada.ask(json!({"type": "subscribe", "thread": "t", "confirm": confirm})).await;
        refused(&rejection, "bad_request", "confirm");
    }
    let refused = async |socket: &mut Socket, ack: Value| {
        let mut command = json!({"type": "ack"});
        command.as_object_mut().unwrap().extend(ack.as_object().unwrap().clone());
        socket.send(&command).await;
        let frame = socket.recv_type("error").await;
        assert_eq!(frame["id"], Value::Null, "{frame}");
        (frame["code"].as_str().unwrap().to_owned(), frame["field"].as_str().unwrap().to_owned())
    };
    let is = |code: &str, field: &str| (code.to_owned(), field.to_owned());
    assert_eq!(refused(&mut ada, json!({"thread": "t", "seq": 1})).await, is("not_found", "thread"), "not subscribed");
    assert_eq!(refused(&mut ada, json!({"thread": "nowhere", "seq": 1})).await, is("not_found", "thread"));
    ada.subscribe("t", Some(0)).await;
    assert_eq!(
        refused(&mut ada, json!({"thread": "t", "seq": 1, "name": "x"})).await,
        is("not_found", "name"),
        "no name"
    );
    let mut named = server.connect("ada").await;
    named.subscribe_with("t", json!({"name": "x"})).await;
    assert_eq!(refused(&mut named, json!({"thread": "t", "seq": 1, "name": "y"})).await, is("not_found", "name"));
    assert_eq!(
        refused(&mut named, json!({"thread": "t", "seq": 2})).await,
        is("cursor_invalid", "seq"),
        "past the head"
    );
    assert_eq!(
        refused(&mut named, json!({"thread": "t", "seq": u64::MAX, "name": "x"})).await,
        is("cursor_invalid", "seq")
    );
    for (ack, field) in [
        (json!({"thread": "t"}), "seq"),
        (json!({"thread": "t", "seq": -1}), "seq"),
        (json!({"thread": "t", "seq": "1"}), "seq"),
        (json!({"seq": 1}), "thread"),
        (json!({"thread": "a b", "seq": 1}), "thread"),
        (json!({"thread": "*", "seq": 1}), "thread"),
        (json!({"thread": "t", "seq": 1, "name": ""}), "name"),
        (json!({"thread": "t", "seq": 1, "until": 2}), "until"),
    ] {
        assert_eq!(refused(&mut named, ack.clone()).await, is("bad_request", field), "{ack}");
    }
    named.ack("t", 0).await;
    named.ack("t", 1).await;
    named.silent().await;
    until_acked(&server, "x", 1).await;
    let mut nobody = Socket::raw(&server.url, &[]).await.unwrap();
    nobody.ack("t", 1).await;
    refused_with(&nobody.recv().await, "unauthenticated");
}

on_both_logs!(what_is_unread_goes_down_with_acknowledgements_and_up_with_events, |log| async move {
    let server = Server::start(log);
    let unread = async |user: &str| {
        let threads = server.http("GET", "/v1/threads", user, None).await.1;
        threads["threads"][0]["unread"].as_u64().unwrap_or_else(|| panic!("{threads}"))
    };
    let created = server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    assert_eq!(created.0, 201);
    let mut ada = server.connect("ada").await;
    for seq in 2..=5 {
        assert_eq!(ada.say("t", "hello").await, seq);
    }
    assert_eq!(unread("ben").await, 5);
    let mut ben = server.connect("ben").await;
    ben.subscribe("t", Some(0)).await;
    assert_eq!(unread("ben").await, 5, "sent is not read");
    ben.ack("t", 3).await;
    eventually("two are left", async || unread("ben").await == 2).await;
    assert_eq!(unread("ada").await, 5, "each member's own");
    ada.say("t", "one more").await;
    assert_eq!(unread("ben").await, 3);
    let mut phone = server.connect("ben").await;
    phone.subscribe_with("t", json!({"name": "phone"})).await;
    phone.ack("t", 5).await;
    eventually("read on one device is read", async || unread("ben").await == 1).await;
    ben.ack("t", 6).await;
    eventually("none is left", async || unread("ben").await == 0).await;
});

on_both_logs!(members_see_how_far_the_others_are_and_nothing_of_who_has_left, |log| async move {
    let server = Server::start(log);
    let members = json!({"members": ["ben", "cid"]});
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(members)).await.0, 201);
    let mut ada = server.connect("ada").await;
    for n in 2..=4 {
        assert_eq!(ada.say("t", "hello").await, n);
    }
    assert_eq!(receipts(&server, "t", "ada").await, Vec::<Value>::new());
    let (mut ben, mut cid) = (server.connect("ben").await, server.connect("cid").await);
    ben.subscribe("t", Some(0)).await;
    ben.ack("t", 3).await;
    cid.subscribe_with("t", json!({"name": "phone", "after": 0})).await;
    cid.ack("t", 4).await;
    let short = |all: &[Value]| -> Vec<(Value, Value, Value)> {
        all.iter().map(|it| (it["user"].clone(), it["name"].clone(), it["seq"].clone())).collect()
    };
    let both = [(json!("ben"), Value::Null, json!(3)), (json!("cid"), json!("phone"), json!(4))];
    eventually("both have confirmed", async || short(&receipts(&server, "t", "ada").await) == both).await;
    for receipt in receipts(&server, "t", "ben").await {
        assert!(weft::clock::parse_rfc3339(receipt["at"].as_str().unwrap()).is_some(), "{receipt}");
    }
    let (status, page) = server.http("GET", "/v1/threads/t/receipts", "ada", None).await;
    assert_eq!(status, 200, "{page}");
    has(&page, json!({"thread": "t", "head": 4}));

    assert_eq!(server.http("DELETE", "/v1/threads/t/members/cid", "ada", None).await.0, 200);
    assert_eq!(short(&receipts(&server, "t", "ada").await), both[..1]);
    for stranger in ["cid", "eve"] {
        let (_, problem) = server.http("GET", "/v1/threads/t/receipts", stranger, None).await;
        refused_with(&problem, "not_found");
    }
    let theirs = server.http_with("GET", "/v1/threads/t/receipts", &token_of("umbrella", "ada"), None, &[]).await;
    assert_eq!(theirs.0, 404);
    assert_eq!(server.http("GET", "/v1/threads/nowhere/receipts", "ada", None).await.0, 404);
    let (status, problem) = server.http("GET", "/v1/threads/t/receipts?user=ben", "ada", None).await;
    assert_eq!(status, 400, "{problem}");
    has(&problem, json!({"field": "user"}));
    // What was read stays read, when cid is back.
    assert_eq!(server.http("PUT", "/v1/threads/t/members/cid", "ben", None).await.0, 201);
    assert_eq!(short(&receipts(&server, "t", "ada").await), both);
    // In an inbox nobody but its user has any.
    assert_eq!(ada.ask(publish("@me", "x.note", json!(1))).await["seq"], 1);
    ada.subscribe("@me", Some(0)).await;
    ada.ack("@me", 1).await;
    eventually("ada's own", async || receipts(&server, "@me", "ada").await.len() == 1).await;
    assert_eq!(receipts(&server, "@me", "ben").await, Vec::<Value>::new());
});

/// Threads that a subscription to all is begun in.
const THREADS: usize = 700;

on_both_logs!(a_name_for_all_threads_is_few_records_and_keeps_its_place_in_each_of_them, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    let say = |n: usize| {
        let mut command = publish(&format!("t-{n:03}"), "user_message", json!({"content": "1"}));
        command["id"] = json!(n);
        command
    };
    ada.send(&(0..THREADS).map(say).collect()).await;
    for _ in 0..THREADS {
        accepted(&ada.recv().await);
    }

    let before = server.metric("weft_append_bytes_total").await;
    let mut star = server.connect("ada").await;
    let subscribed = star.subscribe_with("*", json!({"name": "s"})).await;
    assert_eq!(subscribed["after"].as_object().unwrap().len(), THREADS);
    let appended = server.metric("weft_append_bytes_total").await - before;
    // A thread with its seq takes about 10 bytes; a record of its own takes more than 100.
    assert!(appended < 20.0 * THREADS as f64, "{appended} bytes");
    star.leave().await;

    ada.say("t-003", "2").await;
    ada.say("t-699", "2").await;
    server.kill();
    server.up();
    server.ready().await;
    let mut star = server.connect("ada").await;
    let subscribed = star.subscribe_with("*", json!({"name": "s"})).await;
    let (after, head) = (subscribed["after"].as_object().unwrap(), subscribed["head"].as_object().unwrap());
    assert!(after.values().all(|seq| *seq == 1) && after.len() == THREADS, "where it had begun, in each");
    assert_eq!((&head["t-003"], &head["t-004"], &head["t-699"]), (&json!(2), &json!(1), &json!(2)));
    let mut threads: Vec<_> = star.events(2).await.iter().map(|event| event["thread"].clone()).collect();
    threads.sort_by_key(|thread| thread.to_string());
    assert_eq!(threads, ["t-003", "t-699"]);
    star.ack("t-003", 2).await;
    eventually("the acknowledgement is durable", async || {
        receipts(&server, "t-003", "ada").await.iter().any(|it| it["seq"] == 2)
    })
    .await;
    star.leave().await;

    // One of them by the same name resumes there as well.
    let mut one = server.connect("ada").await;
    assert_eq!(one.subscribe_with("t-699", json!({"name": "s"})).await["after"], 1);
    assert_eq!(one.subscribe_with("t-003", json!({"name": "s"})).await["after"], 2);
});

#[tokio::test]
async fn a_user_has_so_many_names_and_may_use_each_again() {
    const NAMES: usize = 256;
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "1").await;
    ada.say("u", "1").await;
    for n in 0..NAMES {
        ada.subscribe_with("t", json!({"name": format!("n{n}")})).await;
        ada.ask(json!({"type": "unsubscribe", "thread": "t"})).await;
    }
    for thread in ["t", "u", "*"] {
        let answer = ada.ask(json!({"type": "subscribe", "thread": thread, "name": "one more"})).await;
        refused(&answer, "too_large", "name");
    }
    ada.subscribe_with("u", json!({"name": "n7"})).await;
    ada.subscribe_with("*", json!({"name": "n8"})).await;

    // Another user has names of its own.
    let mut ben = server.connect("ben").await;
    ben.say("v", "1").await;
    ben.subscribe_with("v", json!({"name": "one more"})).await;
}

#[tokio::test]
async fn a_subscription_to_very_many_threads_counts_as_many_commands() {
    // Five commands at once, then one a second. The agent's limit is another.
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "1"]);
    let mut agent = server.connect_as("ada", "agent publish subscribe").await;
    let join = |n: usize| {
        let mut command = publish(&format!("t-{n:03}"), "user_message", json!({"content": "1"}));
        command["id"] = json!(n);
        command
    };
    agent.send(&(0..THREADS).map(join).collect()).await;
    for _ in 0..THREADS {
        accepted(&agent.recv().await);
    }

    let mut ada = server.connect("ada").await;
    ada.subscribe_with("*", json!({})).await;
    ada.send(&(0..5).map(|id| json!({"type": "ping", "id": id})).collect()).await;
    refused_with(&ada.recv_type("error").await, "rate_limited");
}
