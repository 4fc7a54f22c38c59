//! Analysts, who follow every thread of their tenant: those there are and those that are made, and nobody else's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};

use crate::on_both_logs;
use crate::support::{
    LogKind, SECRET, Server, Socket, accepted, claims, eventually, has, publish, refused, refused_with, token, token_of,
};

fn all() -> Value {
    json!({"type": "subscribe", "thread": "*", "all": true})
}

fn all_after(after: Value) -> Value {
    json!({"type": "subscribe", "thread": "*", "all": true, "after": after})
}

/// Each thread's seqs among the next `n` events, in the order in which they come.
async fn by_thread(socket: &mut Socket, n: usize) -> BTreeMap<String, Vec<u64>> {
    let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for event in socket.events(n).await {
        let thread = event["thread"].as_str().unwrap().to_owned();
        found.entry(thread).or_default().push(event["seq"].as_u64().unwrap());
    }
    found
}

/// The same up to `caught_up` of each of these threads, which may come before their events or after them.
async fn by_thread_until_level<const N: usize>(
    socket: &mut Socket,
    n: usize,
    level: [&str; N],
) -> BTreeMap<String, Vec<u64>> {
    let (mut found, mut left) = (BTreeMap::<String, Vec<u64>>::new(), level.to_vec());
    while found.values().map(Vec::len).sum::<usize>() < n || !left.is_empty() {
        let frame = socket.recv().await;
        let thread = frame["thread"].as_str().unwrap();
        match frame["type"].as_str().unwrap() {
            "event" => found.entry(thread.to_owned()).or_default().push(frame["seq"].as_u64().unwrap()),
            "caught_up" => drop(left.remove(left.iter().position(|it| *it == thread).unwrap())),
            _ => panic!("{frame}"),
        }
    }
    found
}

fn threads<const N: usize>(of: [(&str, Vec<u64>); N]) -> BTreeMap<String, Vec<u64>> {
    of.into_iter().map(|(thread, seqs)| (thread.to_owned(), seqs)).collect()
}

fn analyst_of(tenant: &str) -> String {
    mint(SECRET, &Claims { tenant: tenant.into(), ..claims("ana", "analyst") }).unwrap()
}

on_both_logs!(an_analyst_follows_all_threads_of_its_tenant_on_every_node_and_none_of_another, |log| async move {
    let mut nodes = vec![Server::start(log.clone())];
    if matches!(log, LogKind::Kafka { .. }) {
        nodes.push(Server::start(log));
    }
    let (a, b) = (&nodes[0], &nodes[nodes.len() - 1]);
    let (mut ada, mut ben) = (a.connect("ada").await, a.connect("ben").await);
    let mut mallory = Socket::open(&a.url, &token_of("umbrella", "mallory")).await;
    ada.say("of-ada", "1").await;
    ben.say("of-ben", "1").await;
    ben.say("of-ben", "2").await;
    mallory.say("of-umbrella", "1").await;
    let theirs = mint(SECRET, &Claims { tenant: "umbrella".into(), ..claims("ana", "analyst") }).unwrap();
    for (token, n) in [(token("ana", "analyst"), 2), (theirs, 1)] {
        let path = "/v1/threads?all=true";
        let listed = async || b.http_with("GET", path, &token, None, &[]).await.1["threads"].clone();
        eventually("the other node has them", async || {
            let heads = listed().await.as_array().unwrap().iter().map(|it| it["head"].as_u64().unwrap()).sum::<u64>();
            heads == if n == 2 { 3 } else { 1 }
        })
        .await;
    }

    let mut ana = b.connect_as("ana", "analyst").await;
    let mut other = Socket::open(&b.url, &analyst_of("umbrella")).await;
    let answer = ana.ask(all()).await;
    has(&answer, json!({"type": "subscribed", "thread": "*", "recovered": true}));
    assert_eq!(answer["after"], json!({"of-ada": 1, "of-ben": 2}), "as the list of threads has them");
    assert_eq!(other.ask(all()).await["after"], json!({"of-umbrella": 1}));
    // Members follow their own.
    let mut bens = b.connect("ben").await;
    assert_eq!(bens.ask(json!({"type": "subscribe", "thread": "*", "all": false})).await["type"], "subscribed");

    // Inboxes and the tenant's thread are there by their names, and not among the threads of anybody.
    let mut bot = a.connect_as("bot", "agent broadcast").await;
    for thread in ["@user:ada", "@user:ana", "@tenant"] {
        accepted(&bot.ask(publish(thread, "x.n", json!(1))).await);
    }
    ada.say("of-ada", "2").await;
    ada.say("made-by-a-message", "1").await;
    assert_eq!(a.http("PUT", "/v1/threads/made", "ben", Some(json!({"members": ["ada"]}))).await.0, 201);
    ada.say("made", "2").await;
    mallory.say("made", "1").await;
    let expected = threads([("of-ada", vec![2]), ("made-by-a-message", vec![1]), ("made", vec![1, 2])]);
    assert_eq!(by_thread(&mut ana, 4).await, expected);
    assert_eq!(by_thread(&mut other, 1).await, threads([("made", vec![1])]));
    assert_eq!(by_thread(&mut bens, 2).await, threads([("made", vec![1, 2])]));

    // Once more for what must not have come: the last ones that were written are the next that come.
    mallory.say("of-umbrella", "2").await;
    ben.say("of-ben", "3").await;
    assert_eq!(by_thread(&mut ana, 1).await, threads([("of-ben", vec![3])]));
    assert_eq!(by_thread(&mut other, 1).await, threads([("of-umbrella", vec![2])]));
    assert_eq!(by_thread(&mut bens, 1).await, threads([("of-ben", vec![3])]));
    // Nobody is present for reading everything.
    let (_, present) = b.http("GET", "/v1/threads/of-ada/presence", "ada", None).await;
    assert_eq!(present["users"], json!([]));
});

#[tokio::test]
async fn a_subscribe_to_all_threads_is_for_analysts_and_says_what_is_wrong_with_it() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "1").await;
    for scope in ["", "publish subscribe agent broadcast"] {
        let mut socket = server.connect_as("ada", scope).await;
        refused(&socket.ask(all()).await, "forbidden", "all");
        // Nothing is left of it.
        assert_eq!(socket.ask(json!({"type": "subscribe", "thread": "*"})).await["type"], "subscribed");
    }
    let mut ana = server.connect_as("ana", "analyst").await;
    for all in [true, false] {
        let answer = ana.ask(json!({"type": "subscribe", "thread": "t", "all": all})).await;
        refused(&answer, "bad_request", "all");
    }
    refused(&ana.ask(all_after(json!({"t": 2}))).await, "cursor_invalid", "after.t");
    assert_eq!(ana.ask(all_after(json!({"t": 0, "gone": 3}))).await["after"], json!({"t": 0}));
    has(&ana.recv_type("error").await, json!({"thread": "gone", "code": "not_found", "field": "after.gone"}));
    refused(&ana.ask(all()).await, "conflict", "thread");
    refused(&ana.ask(json!({"type": "subscribe", "thread": "*"})).await, "conflict", "thread");
    assert_eq!(ana.events(1).await[0]["seq"], 1);
    assert_eq!(ana.recv_type("caught_up").await["thread"], "t");

    assert_eq!(ana.ask(json!({"type": "unsubscribe", "thread": "*"})).await["type"], "unsubscribed");
    ada.say("after", "not followed any more").await;
    let mut admin = server.connect_as("root", "admin").await;
    let wanted = json!({"type": "subscribe", "thread": "*", "all": true, "last": 1, "kinds": ["x.n"]});
    assert_eq!(admin.ask(wanted).await["after"], json!({"after": 0, "t": 0}));
    assert_eq!(ada.ask(publish("kinds", "x.n", json!(1))).await["seq"], 1);
    has(&admin.recv_type("event").await, json!({"thread": "kinds", "seq": 1, "kind": "x.n"}));
    ana.silent().await;
}

#[tokio::test]
async fn all_threads_end_with_the_scope_and_what_was_subscribed_by_name_is_judged_for_itself() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    server.http("PUT", "/v1/threads/shared", "ada", Some(json!({"members": ["ana"]}))).await;
    server.http("PUT", "/v1/threads/named", "ada", Some(json!({"members": ["ana"]}))).await;
    ada.say("strange", "1").await;
    ada.say("strange-and-named", "1").await;

    let mut ana = server.connect_as("ana", "subscribe analyst").await;
    for thread in ["named", "strange-and-named"] {
        ana.subscribe(thread, None).await;
        ana.recv_type("caught_up").await;
    }
    assert_eq!(ana.ask(all()).await["type"], "subscribed");
    for _ in ["shared", "strange"] {
        ana.recv_type("caught_up").await;
    }
    // With the scope it goes on.
    let refresh = |scope: &str| json!({"type": "refresh", "token": token("ana", scope)});
    assert_eq!(ana.ask(refresh("admin")).await["type"], "refreshed");
    ana.silent().await;
    ada.say("strange", "2").await;
    has(&ana.recv_type("event").await, json!({"thread": "strange", "seq": 2}));

    assert_eq!(ana.ask(refresh("subscribe")).await["type"], "refreshed");
    let mut ended = BTreeMap::new();
    for _ in 0..2 {
        let error = ana.recv_type("error").await;
        ended.insert(error["thread"].to_string(), error["code"].as_str().unwrap().to_owned());
    }
    let expected = [("\"*\"", "forbidden"), ("\"strange-and-named\"", "not_found")];
    assert_eq!(ended, expected.map(|(thread, code)| (thread.to_owned(), code.to_owned())).into());
    for thread in ["strange", "strange-and-named", "shared", "made-later"] {
        ada.say(thread, "not for her").await;
    }
    ada.say("named", "for her").await;
    has(&ana.recv().await, json!({"type": "event", "thread": "named", "seq": 2}));
    refused(&ana.ask(all()).await, "forbidden", "all");
    let answer = ana.ask(json!({"type": "subscribe", "thread": "*"})).await;
    assert_eq!(answer["after"], json!({"named": 2, "shared": 2}), "as for any member");

    // A revocation ends all of it.
    let mut ana = server.connect_as("ana", "analyst").await;
    assert_eq!(ana.ask(all()).await["type"], "subscribed");
    assert_eq!(server.admin("DELETE", "/v1/users/ana/sessions").await.0, 200);
    assert_eq!(ana.closed().await, 4504);
}

/// Makes threads `t<from>` to `t<to>` with one event each, as one frame.
async fn make(writer: &mut Socket, from: usize, to: usize) {
    let commands = (from..to).map(|n| {
        let mut command = publish(&format!("t{n}"), "x.n", json!(1));
        command["id"] = json!(n);
        command
    });
    writer.send(&Value::Array(commands.collect())).await;
    for _ in from..to {
        accepted(&writer.recv().await);
    }
}

on_both_logs!(no_thread_that_is_made_while_an_analyst_subscribes_is_missed, |log| async move {
    // So many that listing them takes a while, in which others are made.
    const BEFORE: usize = 2_000;
    const READERS: usize = 8;
    let server = Server::start_unlimited(log);
    let mut writer = server.connect("ada").await;
    for from in (0..BEFORE).step_by(1_000) {
        make(&mut writer, from, from + 1_000).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let writing = tokio::spawn(async move {
        let mut made = BEFORE;
        while !stopped.load(Ordering::Relaxed) && made < 9_000 {
            make(&mut writer, made, made + 5).await;
            made += 5;
        }
        made
    });
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let mut ana = server.connect_as("ana", "analyst").await;
        let answer = ana.ask(all()).await;
        assert_eq!(answer["type"], "subscribed", "{answer}");
        readers.push((ana, answer["head"].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>()));
    }
    stop.store(true, Ordering::Relaxed);
    let made = writing.await.unwrap();
    for (mut ana, listed) in readers {
        let mut missing: BTreeSet<String> =
            (0..made).map(|n| format!("t{n}")).filter(|thread| !listed.contains(thread)).collect();
        while !missing.is_empty() {
            let event = ana.recv_type("event").await;
            assert_eq!(event["seq"], 1);
            assert!(
                missing.remove(event["thread"].as_str().unwrap()),
                "twice, or of a thread that was listed: {event}"
            );
        }
    }
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_analyst_that_reads_slowly_gets_all_of_every_thread_in_order() {
    const EVENTS: u64 = 60;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("old", "1").await;
    let mut ana = Socket::open_with_small_buffer(&server.url, &token("ana", "analyst")).await;
    assert_eq!(ana.ask(all_after(json!({}))).await["type"], "subscribed");
    for n in 1..=EVENTS {
        for thread in ["old", "new", "newer"] {
            accepted(&ada.ask(publish(thread, "x.load", json!("x".repeat(30_000)))).await);
        }
        ada.say(&format!("one-{n}"), "1").await;
    }
    assert!(server.metric("weft_lagged_total").await >= 1.0, "5 MB are more than all buffers hold");
    ana.enlarge_buffer();
    let found = by_thread(&mut ana, (EVENTS * 4 + 1) as usize).await;
    for (thread, last) in [("old", EVENTS + 1), ("new", EVENTS), ("newer", EVENTS)] {
        assert_eq!(found[thread], (1..=last).collect::<Vec<_>>(), "{thread}");
    }
    assert!((1..=EVENTS).all(|n| found[&format!("one-{n}")] == [1]));
    ada.say("newest", "1").await;
    assert_eq!(by_thread(&mut ana, 1).await, threads([("newest", vec![1])]));
}

on_both_logs!(under_a_name_an_analyst_goes_on_in_all_threads_and_misses_none_that_was_made, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        ada.say("old", &n.to_string()).await;
    }
    let wanted = json!({"type": "subscribe", "thread": "*", "all": true, "name": "audit", "confirm": true});
    let mut ana = server.connect_as("ana", "analyst").await;
    assert_eq!(ana.ask(wanted.clone()).await["after"], json!({"old": 3}));
    ada.say("old", "4").await;
    ada.say("acked", "1").await;
    ada.say("acked", "2").await;
    let expected = threads([("old", vec![4]), ("acked", vec![1, 2])]);
    assert_eq!(by_thread_until_level(&mut ana, 3, ["old", "acked"]).await, expected);
    ana.ack("acked", 1).await;
    ana.silent().await;
    ana.leave().await;

    // Made while nobody was there; its analyst becomes a member in the middle of it.
    ada.say("meanwhile", "1").await;
    assert_eq!(server.http("PUT", "/v1/threads/meanwhile/members/ana", "ada", None).await.0, 201);
    drop(ada);
    server.stop().await;
    server.up();
    server.ready().await;
    let mut ana = server.connect_as("ana", "analyst").await;
    let answer = ana.ask(wanted).await;
    assert_eq!(answer["after"], json!({"acked": 1, "meanwhile": 0, "old": 3}), "{answer}");
    let expected = threads([("acked", vec![2]), ("meanwhile", vec![1, 2]), ("old", vec![4])]);
    assert_eq!(by_thread(&mut ana, 4).await, expected);
});

#[tokio::test]
async fn more_threads_than_a_session_may_have_are_refused_with_what_to_do_instead() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for from in (0..10_000).step_by(1_000) {
        make(&mut ada, from, from + 1_000).await;
    }
    let mut ana = server.connect_as("ana", "analyst").await;
    let answer = ana.ask(all()).await;
    assert_eq!(answer["after"].as_object().unwrap().len(), 10_000);
    // One more than there is room for is named.
    make(&mut ada, 10_000, 10_001).await;
    loop {
        let frame = ana.recv().await;
        match frame["type"].as_str().unwrap() {
            "caught_up" => {}
            "error" => {
                has(&frame, json!({"thread": "t10000", "code": "too_large"}));
                break;
            }
            _ => panic!("{frame}"),
        }
    }
    let mut late = server.connect_as("ana", "analyst").await;
    let answer = late.ask(all()).await;
    refused(&answer, "too_large", "all");
    assert!(answer["message"].as_str().unwrap().contains("/v1/threads?all=true"), "{answer}");
    late.silent().await;
    refused_with(&late.ask(json!({"type": "unsubscribe", "thread": "*"})).await, "not_found");
}
