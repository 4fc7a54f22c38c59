//! Threads that exist by their name: each user's inbox, and the tenant's.

use serde_json::{Value, json};

use super::caught_up;
use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, has, publish, refused, refused_with, seqs, token, token_of};

/// A `user_message` to a thread, and its answer.
async fn write(socket: &mut Socket, thread: &str, content: &str) -> Value {
    socket.ask(publish(thread, "user_message", json!({"content": content}))).await
}

fn contents(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["data"]["content"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn an_inbox_is_there_before_its_first_event_and_is_called_me_by_its_user() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let begun = ada.ask(json!({"type": "subscribe", "thread": "@me", "after": 0})).await;
    has(&begun, json!({"thread": "@me", "head": 0, "after": 0}));
    assert_eq!(caught_up(&mut ada, "@me").await, 0);
    let (status, inbox) = server.http("GET", "/v1/threads/@me", "ada", None).await;
    assert_eq!(status, 200, "{inbox}");
    has(&inbox, json!({"thread": "@me", "head": 0, "members": []}));
    let empty = server.http("GET", "/v1/threads/@me/events", "ada", None).await;
    assert_eq!(empty.0, 200, "{empty:?}");
    has(&empty.1, json!({"events": [], "head": 0}));

    let published = write(&mut ada, "@me", "a note to myself").await;
    has(&published, json!({"thread": "@me", "seq": 1}));
    let event = ada.recv().await;
    has(&event, json!({"type": "event", "thread": "@me", "seq": 1}));
    // The same thread under its other name.
    assert_eq!(write(&mut ada, "@user:ada", "and another").await["seq"], 2);
    let event = ada.recv().await;
    has(&event, json!({"thread": "@me", "seq": 2}));
    refused_with(&ada.ask(json!({"type": "subscribe", "thread": "@user:ada"})).await, "conflict");
    for (called, path) in [("@me", "@me"), ("@user:ada", "@user:ada"), ("@user:ada", "%40user%3Aada")] {
        let page = server.http("GET", &format!("/v1/threads/{path}/events"), "ada", None).await.1;
        assert_eq!((&page["events"][1]["thread"], &page["head"]), (&json!(called), &json!(2)), "{page}");
        assert_eq!(server.http("GET", &format!("/v1/threads/{path}"), "ada", None).await.1["thread"], called);
        let streamed = EventStream::of(&server, path, "ada", "?after=1").await.next().await.unwrap().json();
        has(&streamed, json!({"thread": called, "seq": 2}));
    }
}

#[tokio::test]
async fn an_inbox_is_read_by_its_user_and_by_those_who_read_the_whole_tenant() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    write(&mut ada, "@me", "mine").await;
    for scope in ["analyst", "admin"] {
        let mut reader = server.connect_as("ana", scope).await;
        reader.subscribe("@user:ada", Some(0)).await;
        let event = reader.recv_type("event").await;
        assert_eq!((&event["thread"], &event["data"]["content"]), (&json!("@user:ada"), &json!("mine")));
        let token = token("ana", scope);
        let page = server.http_with("GET", "/v1/threads/@user:ada/events", &token, None, &[]).await;
        assert_eq!(page.0, 200, "{page:?}");
        has(&page.1["events"][0], json!({"thread": "@user:ada"}));
    }
    // Agents write to it, and do not read it; who shares a thread with its user neither.
    server.http("PUT", "/v1/threads/both", "ada", Some(json!({"members": ["ben"]}))).await;
    for (user, scope) in [("bot", "publish subscribe agent broadcast"), ("ben", "")] {
        let mut reader = server.connect_as(user, scope).await;
        let answer = reader.ask(json!({"type": "subscribe", "thread": "@user:ada"})).await;
        refused(&answer, "not_found", "thread");
        let token = token(user, scope);
        assert_eq!(server.http_with("GET", "/v1/threads/@user:ada/events", &token, None, &[]).await.0, 404);
        // `@me` is the asker's own.
        assert_eq!(server.http_with("GET", "/v1/threads/@me/events", &token, None, &[]).await.1["head"], 0);
    }
}

#[tokio::test]
async fn agents_and_members_of_a_common_thread_write_to_an_inbox_and_strangers_do_not() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.subscribe("@me", None).await;
    caught_up(&mut ada, "@me").await;
    let mut ben = server.connect("ben").await;
    let body = |content: &str| Some(json!({"kind": "user_message", "data": {"content": content}}));
    let over_http =
        async |content: &str| server.http("POST", "/v1/threads/@user:ada/events", "ben", body(content)).await;

    refused(&write(&mut ben, "@user:ada", "let me in").await, "not_found", "thread");
    let (_, problem) = over_http("let me in").await;
    refused(&problem, "not_found", "thread");

    let mut bot = server.connect_as("bot", "agent").await;
    let answer = bot.ask(publish("@user:ada", "x.reminder", json!({"at": "noon"}))).await;
    has(&answer, json!({"type": "published", "thread": "@user:ada", "seq": 1}));

    server.http("PUT", "/v1/threads/common", "ada", Some(json!({"members": ["ben"]}))).await;
    assert_eq!(write(&mut ben, "@user:ada", "hello").await["seq"], 2);
    let (status, answer) = over_http("hello again").await;
    assert_eq!(status, 201, "{answer}");
    has(&answer, json!({"thread": "@user:ada", "seq": 3}));
    let events = ada.events(3).await;
    assert_eq!((seqs(&events), &events[0]["from"], &events[1]["from"]), (vec![1, 2, 3], &json!("bot"), &json!("ben")));
    assert!(events.iter().all(|event| event["thread"] == "@me"), "{events:?}");

    // The last thread they had in common is left, by either side.
    assert_eq!(server.http("DELETE", "/v1/threads/common/members/ben", "ben", None).await.0, 200);
    refused(&write(&mut ben, "@user:ada", "still there?").await, "not_found", "thread");
    assert_eq!(over_http("still there?").await.0, 404);
    server.http("PUT", "/v1/threads/later", "ben", Some(json!({"members": ["ada"]}))).await;
    assert_eq!(write(&mut ben, "@user:ada", "met again").await["seq"], 4);
    assert_eq!(server.http("DELETE", "/v1/threads/later/members/ada", "ada", None).await.0, 200);
    refused(&write(&mut ben, "@user:ada", "and gone").await, "not_found", "thread");
    assert_eq!(contents(&ada.events(1).await), ["met again"]);
    // Without scope publish nobody writes, not even to the own one.
    let mut quiet = server.connect_as("ada", "subscribe").await;
    refused_with(&write(&mut quiet, "@me", "no").await, "forbidden");
}

#[tokio::test]
async fn an_inbox_is_ordered_and_replayable_and_takes_a_key_once_like_any_thread() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/common", "ada", Some(json!({"members": ["ben"]}))).await;
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    for n in 1..=6 {
        let to = if n % 2 == 0 { "@me" } else { "@user:ada" };
        let from = if n % 2 == 0 { &mut ada } else { &mut ben };
        assert_eq!(write(from, to, &n.to_string()).await["seq"], n);
    }
    let keyed = |content: &str, thread: &str| {
        let mut command = publish(thread, "user_message", json!({"content": content}));
        command["key"] = json!("k");
        command
    };
    let first = ben.ask(keyed("7", "@user:ada")).await;
    let again = ben.ask(keyed("7", "@user:ada")).await;
    assert_eq!(
        (&first["seq"], &first["duplicate"], &again["seq"], &again["duplicate"]),
        (&json!(7), &json!(false), &json!(7), &json!(true))
    );
    refused(&ben.ask(keyed("other", "@user:ada")).await, "conflict", "key");
    // A key belongs to its user and thread: by either name of the inbox it is the same thread.
    assert_eq!(ada.ask(keyed("8", "@me")).await["seq"], 8);
    assert_eq!(ada.ask(keyed("8", "@user:ada")).await["duplicate"], true);

    for (more, wanted) in [(json!({"after": 0}), 1..=8), (json!({"after": 5}), 6..=8), (json!({"last": 2}), 7..=8)] {
        let mut reader = server.connect("ada").await;
        let mut command = json!({"type": "subscribe", "thread": "@me"});
        command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(reader.ask(command).await["head"], 8);
        let events = reader.events(wanted.clone().count()).await;
        assert_eq!(seqs(&events), wanted.collect::<Vec<u64>>());
        assert_eq!(caught_up(&mut reader, "@me").await, 8);
    }
    let beyond = ada.ask(json!({"type": "subscribe", "thread": "@me", "after": 9})).await;
    refused(&beyond, "cursor_invalid", "after");
    let page = server.http("GET", "/v1/threads/@me/events?after=6&limit=1", "ada", None).await.1;
    assert_eq!((contents(page["events"].as_array().unwrap()), &page["next"]), (vec!["7"], &json!(7)));
}

#[tokio::test]
async fn reserved_threads_are_not_among_all_my_threads() {
    let server = Server::start(LogKind::embedded());
    let mut root = server.connect_as("root", "admin").await;
    assert_eq!(write(&mut root, "@tenant", "before").await["seq"], 1);
    assert_eq!(write(&mut root, "@user:ada", "before").await["seq"], 1);
    let mut ada = server.connect("ada").await;
    ada.say("t", "mine").await;
    let mut star = server.connect("ada").await;
    let begun = star.ask(json!({"type": "subscribe", "thread": "*", "after": {}})).await;
    assert_eq!(begun["head"], json!({"t": 1}));
    assert_eq!((star.recv_type("event").await["thread"].clone(), caught_up(&mut star, "t").await), (json!("t"), 1));
    write(&mut root, "@tenant", "after").await;
    write(&mut root, "@user:ada", "after").await;
    ada.say("t", "the next one").await;
    assert_eq!(star.recv().await["data"]["content"], "the next one", "nothing of the reserved ones came in between");
    let listed = server.http("GET", "/v1/threads", "ada", None).await.1;
    let names: Vec<&Value> = listed["threads"].as_array().unwrap().iter().map(|thread| &thread["thread"]).collect();
    assert_eq!(names, ["t"]);
    // Beside `"*"` they are subscribed by name.
    star.subscribe("@me", Some(0)).await;
    assert_eq!(contents(&star.events(2).await), ["before", "after"]);
}

#[tokio::test]
async fn everyone_in_the_tenant_reads_its_thread_and_only_scope_broadcast_or_admin_writes_it() {
    let server = Server::start(LogKind::embedded());
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    for reader in [&mut ada, &mut ben] {
        assert_eq!(reader.subscribe("@tenant", None).await["head"], 0);
        caught_up(reader, "@tenant").await;
    }
    let mut theirs = Socket::open(&server.url, &token_of("umbrella", "ada")).await;
    theirs.subscribe("@tenant", None).await;
    caught_up(&mut theirs, "@tenant").await;

    for scope in ["", "publish subscribe agent analyst"] {
        let mut socket = server.connect_as("ben", scope).await;
        refused(&write(&mut socket, "@tenant", "hear me").await, "forbidden", "thread");
        let body = json!({"kind": "user_message", "data": {"content": "hear me"}});
        let token = token("ben", scope);
        let answer = server.http_with("POST", "/v1/threads/@tenant/events", &token, Some(body), &[]).await;
        assert_eq!(answer.0, 403, "{answer:?}");
        has(&answer.1, json!({"code": "forbidden", "field": "thread"}));
    }
    let mut herald = server.connect_as("herald", "broadcast").await;
    assert_eq!(write(&mut herald, "@tenant", "one").await["seq"], 1);
    assert_eq!(write(&mut server.connect_as("root", "admin").await, "@tenant", "two").await["seq"], 2);
    for reader in [&mut ada, &mut ben] {
        let events = reader.events(2).await;
        assert_eq!((seqs(&events), contents(&events)), (vec![1, 2], vec!["one", "two"]));
        assert!(events.iter().all(|event| event["thread"] == "@tenant"));
    }
    // The scope to write it is none to read by.
    refused_with(&herald.ask(json!({"type": "subscribe", "thread": "@tenant"})).await, "forbidden");
    let late = server.http("GET", "/v1/threads/@tenant/events", "cid", None).await.1;
    assert_eq!((contents(late["events"].as_array().unwrap()), &late["head"]), (vec!["one", "two"], &json!(2)));

    // The other tenant's thread of that name is another one.
    let page = server.http_with("GET", "/v1/threads/@tenant/events", &token_of("umbrella", "ada"), None, &[]).await.1;
    has(&page, json!({"events": [], "head": 0}));
    theirs.say("t", "a thread of theirs").await;
    theirs.subscribe("t", Some(0)).await;
    assert_eq!(theirs.recv().await["data"]["content"], "a thread of theirs", "nothing came before it");
}

#[tokio::test]
async fn reserved_threads_have_no_members_and_no_title_and_other_names_with_an_at_are_refused() {
    let server = Server::start(LogKind::embedded());
    let admin = token("root", "admin");
    for thread in ["@me", "@tenant", "@user:ada", "@user:root"] {
        for (method, path, body) in [
            ("PUT", format!("/v1/threads/{thread}"), Some(json!({"title": "mine"}))),
            ("PUT", format!("/v1/threads/{thread}"), None),
            ("PUT", format!("/v1/threads/{thread}/members/ben"), None),
            ("DELETE", format!("/v1/threads/{thread}/members/ada"), None),
        ] {
            let (status, problem) = server.http_with(method, &path, &admin, body, &[]).await;
            let got = (status, problem["code"].as_str(), problem["field"].as_str());
            assert_eq!(got, (400, Some("bad_request"), Some("thread")), "{method} {path}: {problem}");
        }
    }
    let mut root = server.connect_as("root", "admin publish subscribe").await;
    let long = format!("@user:{}", "x".repeat(129));
    for bad in ["@you", "@user:", "@", "@users:ada", "@ME", "@tenants", "@user:a b", &long] {
        for command in [
            json!({"type": "subscribe", "thread": bad}),
            publish(bad, "user_message", json!({"content": "hi"})),
            json!({"type": "signal", "id": 1, "thread": bad, "kind": "typing"}),
            json!({"type": "ack", "id": 1, "thread": bad, "seq": 1}),
        ] {
            // Commands without an answer have no id, so theirs is taken out again.
            let answer = match command["type"].as_str().unwrap() {
                "signal" | "ack" => {
                    let mut command = command.clone();
                    command.as_object_mut().unwrap().remove("id");
                    root.send(&command).await;
                    root.recv().await
                }
                _ => root.ask(command.clone()).await,
            };
            refused(&answer, "bad_request", "thread");
        }
        let bad = bad.replace(' ', "%20");
        for path in ["", "/events", "/stream", "/presence", "/receipts"] {
            let (status, problem) = server.http("GET", &format!("/v1/threads/{bad}{path}"), "ada", None).await;
            let got = (status, problem["code"].as_str(), problem["field"].as_str());
            assert_eq!(got, (400, Some("bad_request"), Some("thread")), "{bad}{path}: {problem}");
        }
    }
}

#[tokio::test]
async fn each_of_a_users_devices_has_all_that_the_user_has() {
    let server = Server::start(LogKind::embedded());
    server.http("PUT", "/v1/threads/t", "ben", Some(json!({"members": ["ada"]}))).await;
    let mut ben = server.connect("ben").await;
    // A device that was there from the start, one that was away for a while, and one that follows everything.
    let mut phone = server.connect("ada").await;
    phone.subscribe("t", Some(0)).await;
    phone.subscribe("@me", Some(0)).await;
    let mut all = server.connect("ada").await;
    all.ask(json!({"type": "subscribe", "thread": "*", "after": {}})).await;
    all.subscribe("@me", Some(0)).await;
    ben.say("t", "to all of them").await;
    write(&mut ben, "@user:ada", "for ada alone").await;
    phone.say("t", "from one device").await;
    write(&mut all, "@me", "from another").await;
    let mut laptop = server.connect("ada").await;
    laptop.subscribe("t", Some(0)).await;
    laptop.subscribe("@me", Some(0)).await;
    ben.say("t", "and once more").await;
    let mut seen = Vec::new();
    for device in [&mut phone, &mut all, &mut laptop] {
        let mut events = device.events(6).await;
        // Among threads there is no order.
        events.sort_by_key(|event| (event["thread"].to_string(), event["seq"].as_u64()));
        seen.push(events);
    }
    assert_eq!(seqs(&seen[0]), [1, 2, 1, 2, 3, 4], "two of the inbox, four of the thread");
    assert!(seen[1..].iter().all(|events| *events == seen[0]), "every device gets the same frames");
}

/// Threads of a user with another one: as many as make it long to say with whom the user shares one.
const MANY: usize = 200;

/// Makes threads of which `owner` is the only member.
async fn make_threads(server: &Server, owner: &str) {
    let mut socket = server.connect(owner).await;
    let say = |n: usize| {
        let mut command = publish(&format!("{n:03}-{owner}"), "user_message", json!({"content": "mine"}));
        command["id"] = json!(n);
        command
    };
    socket.send(&(0..MANY).map(say).collect()).await;
    for _ in 0..MANY {
        accepted(&socket.recv().await);
    }
}

on_both_logs!(who_shares_a_thread_is_known_at_once_however_many_threads_both_have, |log| async move {
    let server = Server::start(log);
    // Their names alternate, so that looking for one that both have takes a step for each.
    make_threads(&server, "ada").await;
    make_threads(&server, "ben").await;
    let mut ben = server.connect("ben").await;
    let body = || Some(json!({"kind": "user_message", "data": {"content": "over http"}}));
    let stranger = async |ben: &mut Socket| {
        refused(&write(ben, "@user:ada", "let me in").await, "not_found", "thread");
        assert_eq!(server.http("POST", "/v1/threads/@user:ada/events", "ben", body()).await.0, 404);
    };
    stranger(&mut ben).await;

    // Commands after the one that is looked up keep their order.
    let mut pipelined: Vec<Value> = (1..=3)
        .map(|n| {
            publish(if n == 2 { "000-ben" } else { "@user:ada" }, "user_message", json!({"content": n.to_string()}))
        })
        .collect();
    for (n, command) in pipelined.iter_mut().enumerate() {
        command["id"] = json!(n + 1);
    }
    let mut other = server.connect("ben").await;
    other.send(&json!(pipelined)).await;
    let answers = [other.recv().await, other.recv().await, other.recv().await];
    let of = |id: usize| answers.iter().find(|answer| answer["id"] == json!(id)).expect("each is answered");
    refused(of(1), "not_found", "thread");
    accepted(of(2));
    refused(of(3), "not_found", "thread");

    // What is known follows each change of a membership, the moment that is answered.
    for (thread, owner, joins) in [("150-ada", "ada", "ben"), ("007-ben", "ben", "ada")] {
        let members = format!("/v1/threads/{thread}/members/{joins}");
        assert_eq!(server.http("PUT", &members, owner, None).await.0 / 100, 2);
        accepted(&write(&mut ben, "@user:ada", "hello").await);
        assert_eq!(server.http("POST", "/v1/threads/@user:ada/events", "ben", body()).await.0, 201);
        assert_eq!(server.http("DELETE", &members, owner, None).await.0, 200);
        stranger(&mut ben).await;
    }
});
