//! Deliveries that were given up and requeued: delivered again, live or at the next connection, with attempts of their own.

use serde_json::{Value, json};

use super::dead_letters::{get, list, rebuilt, root_of};
use super::letter_acts::{discard, id_of, post};
use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, eventually, has, refused};

/// What a subscription asks for: its name, and how often it is sent something, each time for a second.
fn named(attempts: u32) -> Value {
    json!({"name": "mail", "confirm": true, "ack_within_ms": 1_000, "attempts": attempts})
}

fn named_from(after: u64, attempts: u32) -> Value {
    let mut wanted = named(attempts);
    wanted["after"] = json!(after);
    wanted
}

async fn reader(server: &Server, wanted: Value) -> Socket {
    let mut ada = server.connect("ada").await;
    ada.subscribe_with("t", wanted).await;
    ada
}

/// The next event, as seq and attempt.
async fn next(socket: &mut Socket) -> (u64, Option<u64>) {
    let event = socket.events(1).await.remove(0);
    (event["seq"].as_u64().unwrap(), event["attempt"].as_u64())
}

async fn letter(server: &Server, id: &str) -> Value {
    let mut letter = get(server, &root_of("acme"), &format!("/{id}")).await.1;
    letter.as_object_mut().unwrap().remove("neighbours");
    letter
}

async fn becomes(server: &Server, id: &str, state: &str) -> Value {
    eventually(&format!("the letter is {state}"), async || letter(server, id).await["state"] == state).await;
    letter(server, id).await
}

async fn requeue(server: &Server, id: &str) -> (u16, Value) {
    post(server, &root_of("acme"), &format!("/{id}/requeue"), json!({"note": "mended"})).await
}

/// Ada's thread with so many events, of which her subscription has given up the first, in one attempt, and gone on.
async fn given_up(log: LogKind, events: u64) -> (Server, Socket, String) {
    let server = Server::start(log);
    let mut writer = server.connect("ada").await;
    for n in 1..=events {
        assert_eq!(writer.say("t", &n.to_string()).await, n);
    }
    let mut ada = reader(&server, named_from(0, 1)).await;
    for n in 1..=events {
        assert_eq!(next(&mut ada).await, (n, None));
    }
    eventually("it is given up", async || list(&server, &root_of("acme"), "").await.len() == 1).await;
    for n in 2..=events {
        assert_eq!(next(&mut ada).await, (n, Some(2)));
    }
    ada.ack("t", events).await;
    let id = id_of(&list(&server, &root_of("acme"), "").await[0]).to_owned();
    (server, ada, id)
}

on_both_logs!(what_is_requeued_is_delivered_live_and_its_letter_is_done_once_it_is_acknowledged, |log| async move {
    let (mut server, mut ada, id) = given_up(log, 3).await;
    let root = root_of("acme");
    let open = letter(&server, &id).await;
    let path = format!("/{id}/requeue");
    let (status, rehearsed) = post(&server, &root, &path, json!({"rehearse": true})).await;
    assert_eq!(status, 200, "{rehearsed}");
    has(&rehearsed, json!({"effect": "deliver", "seq": 1, "thread": "t", "reason": "unacknowledged"}));
    assert_eq!(letter(&server, &id).await, open, "a rehearsal does nothing");
    ada.silent().await;

    let (status, requeued) = requeue(&server, &id).await;
    assert_eq!((status, &requeued), (200, &rehearsed), "it does what the rehearsal said");
    let event = ada.events(1).await.remove(0);
    has(&event, json!({"seq": 1, "attempt": 2, "data": {"content": "1"}}));
    has(&letter(&server, &id).await, json!({"state": "requeued", "attempts": 1}));
    refused(&requeue(&server, &id).await.1, "conflict", "id");
    // One that may have been on its way before says nothing about it.
    ada.ack("t", 3).await;
    ada.silent().await;
    assert_eq!(letter(&server, &id).await["state"], "requeued");
    ada.ack("t", 1).await;
    let done = becomes(&server, &id, "done").await;
    has(&done, json!({"attempts": 1, "seq": 1}));
    assert_eq!(done["acts"].as_array().unwrap().len(), 1, "{done}");
    has(&done["acts"][0], json!({"act": "requeued", "by": "root", "note": "mended"}));
    refused(&requeue(&server, &id).await.1, "conflict", "id");
    refused(&discard(&server, &root, &id).await.1, "conflict", "id");

    assert_eq!(server.connect("ada").await.say("t", "and on").await, 4);
    assert_eq!(next(&mut ada).await, (4, None));
    ada.ack("t", 4).await;
    ada.leave().await;
    rebuilt(&mut server).await;
    assert_eq!(letter(&server, &id).await, done, "the same after a rebuild");
    let mut ada = reader(&server, named(1)).await;
    assert_eq!(ada.recv_type("caught_up").await["seq"], 4);
    ada.silent().await;
});

on_both_logs!(
    what_is_requeued_while_nobody_is_there_waits_and_when_it_is_given_up_again_the_letter_has_both_rounds,
    |log| async move {
        let (mut server, ada, id) = given_up(log, 2).await;
        let root = root_of("acme");
        ada.leave().await;
        assert_eq!(requeue(&server, &id).await.0, 200);
        assert_eq!(list(&server, &root, "").await, Vec::<Value>::new(), "nobody has to see to it now");
        server.stop().await;
        server.up();
        server.ready().await;

        // Attempts begin anew, outlive the session, and are numbered on from those before.
        let mut ada = reader(&server, named(3)).await;
        assert_eq!(next(&mut ada).await, (1, Some(2)));
        assert_eq!(next(&mut ada).await, (1, Some(3)), "not acknowledged within a second");
        ada.leave().await;
        eventually("both attempts are in the log", async || letter(&server, &id).await["attempts"] == 3).await;
        let mut ada = reader(&server, named(3)).await;
        assert_eq!(next(&mut ada).await, (1, Some(4)));
        let again = becomes(&server, &id, "open").await;
        has(&again, json!({"id": id, "attempts": 4, "name": "mail", "error": "sent 3 times and not acknowledged"}));
        assert_eq!(again["tries"].as_array().unwrap().len(), 4, "{again}");
        assert_eq!(again["acts"].as_array().unwrap().len(), 1, "{again}");
        assert_eq!(get(&server, &root, "/counts").await.1["total"], 1);
        ada.silent().await;

        // The next round: what comes after it and is acknowledged shows that it has come.
        assert_eq!(requeue(&server, &id).await.0, 200);
        assert_eq!(next(&mut ada).await, (1, Some(5)));
        assert_eq!(server.connect("ada").await.say("t", "and on").await, 3);
        assert_eq!(next(&mut ada).await, (3, None));
        ada.ack("t", 3).await;
        let done = becomes(&server, &id, "done").await;
        assert_eq!(done["acts"].as_array().unwrap().len(), 2, "{done}");
        rebuilt(&mut server).await;
        assert_eq!(letter(&server, &id).await, done, "the same after a rebuild");
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_requeued_can_be_taken_back_and_is_sent_only_to_who_wants_its_kind() {
    let (mut server, ada, id) = given_up(LogKind::embedded(), 1).await;
    let root = root_of("acme");
    ada.leave().await;
    assert_eq!(requeue(&server, &id).await.0, 200);
    let mut other_kinds = named(1);
    other_kinds["kinds"] = json!(["x.other"]);
    let mut ada = reader(&server, other_kinds).await;
    ada.recv_type("caught_up").await;
    ada.silent().await;
    ada.leave().await;
    let mut unconfirmed = reader(&server, json!({"name": "mail"})).await;
    unconfirmed.recv_type("caught_up").await;
    unconfirmed.silent().await;

    let (status, outcome) = discard(&server, &root, &id).await;
    assert_eq!((status, &outcome["effect"]), (200, &json!("discard")), "{outcome}");
    refused(&requeue(&server, &id).await.1, "conflict", "id");
    let discarded = letter(&server, &id).await;
    has(&discarded, json!({"state": "discarded", "attempts": 1}));
    let mut ada = reader(&server, named(1)).await;
    ada.recv_type("caught_up").await;
    ada.silent().await;
    rebuilt(&mut server).await;
    assert_eq!(letter(&server, &id).await, discarded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_could_be_sent_is_not_requeued_and_the_answer_says_why() {
    let (server, mut ada, id) = given_up(LogKind::embedded(), 1).await;
    let root = root_of("acme");
    ada.leave().await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ada", "ada", None).await.0, 200);
    for body in [json!({}), json!({"filter": {}, "rehearse": true})] {
        let path = if body["filter"].is_null() { format!("/{id}/requeue") } else { "/requeue".to_owned() };
        let said = post(&server, &root, &path, body).await.1.to_string();
        assert!(said.contains("conflict") && said.contains("ada is no longer a member"), "{said}");
    }
    // A member again: what is requeued is delivered, beside what came meanwhile.
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ada", "ben", None).await.0, 201);
    assert_eq!(requeue(&server, &id).await.0, 200);
    ada = reader(&server, named(1)).await;
    let mut got = Vec::new();
    for _ in 1..=4 {
        got.push(next(&mut ada).await);
    }
    got.sort_unstable();
    assert_eq!(got, [(1, Some(2)), (2, None), (3, None), (4, None)]);
    ada.ack("t", 1).await;
    ada.ack("t", 4).await;
    becomes(&server, &id, "done").await;

    let mut nameless = server.connect("ben").await;
    nameless.subscribe_with("t", json!({"after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 1})).await;
    eventually("the first is given up", async || !list(&server, &root, "").await.is_empty()).await;
    nameless.leave().await;
    let found = list(&server, &root, "").await;
    let (_, problem) = requeue(&server, id_of(&found[0])).await;
    refused(&problem, "conflict", "id");
    assert!(problem["detail"].as_str().unwrap().contains("had no name"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_one_requeues_both_deliver_and_one_acknowledgement_is_enough() {
    let log = LogKind::kafka();
    let (first, mut here, id) = given_up(log.clone(), 1).await;
    let second = Server::start(log);
    second.ready().await;
    eventually("both know of it", async || list(&second, &root_of("acme"), "").await.len() == 1).await;
    let mut there = reader(&second, named(3)).await;
    there.recv_type("caught_up").await;
    let (one, other) = tokio::join!(requeue(&first, &id), requeue(&second, &id));
    let mut statuses = [one.0, other.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409], "{one:?} {other:?}");
    assert_eq!(next(&mut here).await, (1, Some(2)));
    assert_eq!(next(&mut there).await, (1, Some(2)));
    there.ack("t", 1).await;
    let done = becomes(&first, &id, "done").await;
    assert_eq!(becomes(&second, &id, "done").await, done);
    here.silent().await;
    // Both times are up by then, and nothing comes of it.
    let mut clock = first.connect("ada").await;
    clock.subscribe_with("t", json!({"after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 2})).await;
    assert_eq!(next(&mut clock).await, (1, None));
    assert_eq!(next(&mut clock).await, (1, Some(2)));
    here.silent().await;
    there.silent().await;
    assert_eq!(letter(&first, &id).await["attempts"], done["attempts"], "no attempt was counted after it was done");
}
