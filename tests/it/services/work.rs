//! Work queues: who gets which work, in which order, and what becomes of it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use weft::clock;
use weft::log::Record;
use weft::protocol::work::GroupRecord;

use super::groups::as_admin;
use crate::on_both_logs;
use crate::persistence::rules::{append_to, open};
use crate::reliability::dead_letters::{list, rebuilt, root_of};
use crate::reliability::letter_acts::{id_of, post};
use crate::support::{LogKind, Server, Socket, TENANT, accepted, eventually, has, publish, refused, refused_with};

const AGENT: &str = "publish subscribe agent";

async fn consume(socket: &mut Socket, group: &str, more: Value) -> Value {
    let mut command = json!({"type": "consume", "group": group, "credit": 1});
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    socket.ask(command).await
}

/// A worker who takes so much at once.
async fn worker(server: &Server, user: &str, group: &str, more: Value) -> Socket {
    let mut socket = server.connect_as(user, AGENT).await;
    let answer = consume(&mut socket, group, more).await;
    has(&answer, json!({"type": "consuming", "group": group}));
    socket
}

async fn settle(socket: &mut Socket, work: &Value, more: Value) -> Value {
    let mut command = json!({"type": "settle", "delivery": work["delivery"], "outcome": "done"});
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    socket.ask(command).await
}

async fn done(socket: &mut Socket, work: &Value) {
    has(&settle(socket, work, json!({})).await, json!({"type": "settled"}));
}

fn place(work: &Value) -> (String, u64, u64) {
    let (seq, attempt) = (work["event"]["seq"].as_u64().unwrap(), work["attempt"].as_u64().unwrap());
    (work["event"]["thread"].as_str().unwrap().to_owned(), seq, attempt)
}

fn at(thread: &str, seq: u64, attempt: u64) -> (String, u64, u64) {
    (thread.to_owned(), seq, attempt)
}

on_both_logs!(a_threads_work_is_done_one_at_a_time_in_order_and_what_is_no_work_is_passed_over, |log| async move {
    let server = Server::start(log);
    let mut wim = worker(&server, "wim", "g", json!({"credit": 10})).await;
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        assert_eq!(ada.say("t", &format!("do {n}")).await, 2 * n - 1);
        accepted(&ada.ask(publish("t", "x.note", json!({}))).await);
    }
    for seq in [1, 3, 5] {
        let work = wim.recv_type("work").await;
        assert_eq!(place(&work), at("t", seq, 1));
        has(&work, json!({"group": "g", "lease_ms": 30_000}));
        has(&work["event"], json!({"kind": "user_message", "from": "ada", "type": null}));
        // Though it has credit for ten.
        wim.silent().await;
        done(&mut wim, &work).await;
    }
    wim.silent().await;
});

on_both_logs!(what_failed_comes_again_before_anything_else_of_its_thread_and_holds_up_no_other, |log| async move {
    let server = Server::start(log);
    let mut wim = worker(&server, "wim", "g", json!({"credit": 2})).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "one").await;
    let first = wim.recv_type("work").await;
    ada.say("t", "two").await;
    ada.say("u", "other").await;
    let other = wim.recv_type("work").await;
    assert_eq!(place(&other), at("u", 1, 1));
    let retry = json!({"outcome": "retry", "reason": "not now", "delay_ms": 300});
    has(&settle(&mut wim, &first, retry).await, json!({"type": "settled"}));
    let again = wim.recv_type("work").await;
    assert_eq!(place(&again), at("t", 1, 2));
    assert!(again["wait"]["backoff_ms"].as_u64().unwrap() >= 250, "{again}");
    refused(&settle(&mut wim, &first, json!({})).await, "conflict", "delivery");
    done(&mut wim, &again).await;
    let second = wim.recv_type("work").await;
    assert_eq!(place(&second), at("t", 2, 1));
    assert!(second["wait"]["busy_ms"].as_u64().unwrap() >= 250, "{second}");
});

on_both_logs!(work_that_was_given_up_is_work_again_once_requeued_until_it_is_done_or_fails_again, |log| async move {
    let mut server = Server::start(log);
    let (root, mut ada) = (root_of(TENANT), server.connect("ada").await);
    let mut wim = worker(&server, "wim", "g", json!({})).await;
    ada.say("t", "one").await;
    let reject = json!({"outcome": "reject", "reason": "no such order"});
    let work = wim.recv_type("work").await;
    has(&settle(&mut wim, &work, reject.clone()).await, json!({"type": "settled"}));
    ada.say("t", "two").await;
    let second = wim.recv_type("work").await;
    ada.say("t", "three").await;

    let letter = list(&server, &root, "?reason=rejected").await.remove(0);
    has(&letter, json!({"name": "g", "seq": 1, "error": "no such order", "attempts": 1}));
    let path = format!("/{}/requeue", id_of(&letter));
    let (status, rehearsed) = post(&server, &root, &path, json!({"rehearse": true})).await;
    assert_eq!(status, 200, "{rehearsed}");
    has(&rehearsed, json!({"effect": "work", "seq": 1, "thread": "t"}));
    assert_eq!(post(&server, &root, &path, json!({"note": "it is there now"})).await, (200, rehearsed));
    refused_with(&post(&server, &root, &path, json!({})).await.1, "conflict");
    assert!(list(&server, &root, "").await.is_empty(), "nobody has to see to it");

    // Before what was not begun.
    done(&mut wim, &second).await;
    let again = wim.recv_type("work").await;
    assert_eq!(place(&again), at("t", 1, 1));
    has(&settle(&mut wim, &again, reject).await, json!({"type": "settled"}));
    let letter = list(&server, &root, "").await.remove(0);
    has(&letter, json!({"id": letter["id"], "state": "open", "seq": 1, "attempts": 2}));
    assert_eq!(letter["tries"].as_array().unwrap().len(), 2, "{letter}");
    let third = wim.recv_type("work").await;
    assert_eq!(place(&third), at("t", 3, 1));
    done(&mut wim, &third).await;

    // A rebuild finds it where it was.
    assert_eq!(post(&server, &root, &path, json!({})).await.0, 200);
    drop(wim);
    rebuilt(&mut server).await;
    let mut eve = worker(&server, "eve", "g", json!({})).await;
    let last = eve.recv_type("work").await;
    assert_eq!(last["event"]["seq"], 1);
    done(&mut eve, &last).await;
    eve.silent().await;
    let (_, page) = server.http_with("GET", &format!("/v1/dead-letters/{}", id_of(&letter)), &root, None, &[]).await;
    has(&page, json!({"state": "done"}));
    assert_eq!(page["acts"].as_array().unwrap().len(), 2, "{page}");
});

on_both_logs!(a_worker_that_is_gone_gives_its_work_to_another_with_the_attempt_counted, |log| async move {
    let server = Server::start(log);
    let mut wim = worker(&server, "wim", "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    let work = wim.recv_type("work").await;
    assert_eq!(place(&work), at("t", 1, 1));
    drop(wim);
    let mut eve = worker(&server, "eve", "g", json!({})).await;
    let again = eve.recv_type("work").await;
    assert_eq!(place(&again), at("t", 1, 2));
    // It is nobody else's.
    let mut wim = server.connect_as("wim", AGENT).await;
    refused(&settle(&mut wim, &work, json!({})).await, "conflict", "delivery");
    refused(&settle(&mut wim, &again, json!({})).await, "conflict", "delivery");
    done(&mut eve, &again).await;
});

on_both_logs!(a_lease_that_is_not_settled_in_time_is_anothers_and_one_that_is_extended_lasts, |log| async move {
    let server = Server::start(log);
    let mut wim = worker(&server, "wim", "g", json!({"lease_ms": 1_000, "credit": 2})).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    let work = wim.recv_type("work").await;
    has(&work, json!({"lease_ms": 1_000}));
    let mut eve = worker(&server, "eve", "g", json!({})).await;
    consume(&mut wim, "g", json!({"credit": 0})).await;

    let given = clock::now_ms();
    let again = eve.recv_type("work").await;
    assert_eq!(place(&again), at("t", 1, 2));
    assert!(clock::now_ms() - given > 500);
    refused(&settle(&mut wim, &work, json!({})).await, "conflict", "delivery");
    refused(&settle(&mut wim, &work, json!({"outcome": "extend"})).await, "conflict", "delivery");

    done(&mut eve, &again).await;
    consume(&mut eve, "g", json!({"credit": 0})).await;
    consume(&mut wim, "g", json!({"lease_ms": 1_000, "credit": 1})).await;
    ada.say("t", "take your time").await;
    let work = wim.recv_type("work").await;
    let given = clock::now_ms();
    eventually("it has lasted longer than a lease", async || {
        let extended = settle(&mut wim, &work, json!({"outcome": "extend"})).await;
        has(&extended, json!({"type": "settled"}));
        clock::now_ms() - given > 1_500
    })
    .await;
    done(&mut wim, &work).await;
});

on_both_logs!(what_fails_too_often_or_is_rejected_is_a_dead_letter_and_the_thread_goes_on, |log| async move {
    let server = Server::start(log);
    let mut wim = worker(&server, "wim", "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    for content in ["fails", "is wrong", "is fine"] {
        ada.say("t", content).await;
    }
    for attempt in 1..=5 {
        let work = wim.recv_type("work").await;
        assert_eq!(place(&work), at("t", 1, attempt));
        let retry = json!({"outcome": "retry", "reason": format!("failure {attempt}"), "delay_ms": 1});
        has(&settle(&mut wim, &work, retry).await, json!({"type": "settled"}));
    }
    let work = wim.recv_type("work").await;
    assert_eq!(place(&work), at("t", 2, 1));
    let rejected = settle(&mut wim, &work, json!({"outcome": "reject", "reason": "no such order"})).await;
    has(&rejected, json!({"type": "settled"}));
    let work = wim.recv_type("work").await;
    assert_eq!(place(&work), at("t", 3, 1));

    let (_, page) = server.admin("GET", "/v1/dead-letters?thread=t").await;
    let letters = page["items"].as_array().unwrap();
    assert_eq!(letters.len(), 2, "{page}");
    has(&letters[0], json!({"reason": "rejected", "seq": 2, "attempts": 1, "error": "no such order", "name": "g"}));
    has(&letters[1], json!({"reason": "attempts", "seq": 1, "attempts": 5, "error": "failure 5", "user": "wim"}));
    has(&letters[1], json!({"kind": "user_message"}));
});

on_both_logs!(two_nodes_never_give_the_same_work_twice_and_keep_each_threads_order, |log| async move {
    const THREADS: usize = 6;
    const EACH: u64 = 8;
    let mut nodes = vec![Server::start_unlimited(log.clone())];
    if !matches!(log, LogKind::Embedded) {
        nodes.push(Server::start_unlimited(log));
    }
    let mut workers = Vec::new();
    for (n, node) in nodes.iter().chain(&nodes).enumerate() {
        workers.push(worker(node, &format!("w{n}"), "g", json!({"credit": 3})).await);
    }
    let mut ada = nodes[0].connect("ada").await;
    for seq in 1..=EACH {
        for thread in 0..THREADS {
            assert_eq!(ada.say(&format!("t{thread}"), "do it").await, seq);
        }
    }

    // Everyone settles what it gets, until all is done; what each got, in order.
    let all = THREADS as u64 * EACH;
    let (sender, mut got) = tokio::sync::mpsc::channel(all as usize);
    for mut socket in workers {
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                let work = socket.recv_type("work").await;
                // Told before it is settled, so that what comes after it in its thread is told later.
                if sender.try_send(place(&work)).is_err() {
                    return;
                }
                done(&mut socket, &work).await;
            }
        });
    }
    let mut next: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..all {
        let (thread, seq, attempt) = got.recv().await.unwrap();
        let expected = next.entry(thread.clone()).or_insert(1);
        assert_eq!((seq, attempt), (*expected, 1), "{thread}");
        *expected += 1;
    }
    assert_eq!(next.values().copied().collect::<BTreeSet<_>>(), BTreeSet::from([EACH + 1]));
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_users_many_do_not_hold_up_anothers_first_and_priority_is_a_head_start() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut wim = worker(&server, "wim", "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    ada.say("busy", "the worker is busy with this").await;
    let busy = wim.recv_type("work").await;
    for n in 0..20 {
        ada.say(&format!("a{n}"), "one of many").await;
    }
    let mut urgent = publish("urgent", "user_message", json!({"content": "at once"}));
    urgent["priority"] = json!("high");
    accepted(&ada.ask(urgent).await);
    let mut ben = server.connect("ben").await;
    ben.say("b", "mine is the last").await;
    done(&mut wim, &busy).await;

    let mut order = Vec::new();
    for _ in 0..3 {
        let work = wim.recv_type("work").await;
        order.push(place(&work).0);
        done(&mut wim, &work).await;
    }
    // Ada had the last turn, so it is Ben's; of hers the urgent one is first.
    assert_eq!(order[..2].iter().map(String::as_str).collect::<BTreeSet<_>>(), BTreeSet::from(["b", "urgent"]));
    assert_eq!(order[2], "a0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_groups_boost_says_what_priorities_are_worth_also_of_what_waits_already() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut wim = worker(&server, "wim", "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    ada.say("busy", "the worker is busy with this").await;
    let busy = wim.recv_type("work").await;
    // Of those of one millisecond the first by name comes first.
    for (thread, priority) in [("a", "low"), ("b", "normal"), ("c", "high")] {
        let mut job = publish(thread, "user_message", json!({"content": "one of three"}));
        job["priority"] = json!(priority);
        accepted(&ada.ask(job).await);
    }
    let boost = json!({"boost": {"high_ms": 0, "low_ms": 0}});
    assert_eq!(as_admin(&server, "PUT", "/v1/groups/g", Some(boost)).await.0, 200);
    done(&mut wim, &busy).await;

    let mut order = Vec::new();
    for _ in 0..3 {
        let work = wim.recv_type("work").await;
        order.push(place(&work).0);
        done(&mut wim, &work).await;
    }
    assert_eq!(order, ["a", "b", "c"], "as they came");
}

/// A record about the group `g`; its settings are of `group_set`.
fn group(kind: &str, settings: Value) -> Record {
    let settings = (kind == "group_set").then(|| serde_json::from_value(settings).unwrap());
    Record::from(&GroupRecord {
        kind: kind.to_owned(),
        id: clock::event_id(),
        tenant: TENANT.to_owned(),
        group: "g".to_owned(),
        settings,
        if_absent: false,
        by: "root".to_owned(),
        at: clock::rfc3339(clock::now_ms()),
    })
}

on_both_logs!(a_group_that_begins_at_the_start_or_wants_other_kinds_finds_what_was_there_before, |log| async move {
    let mut server = Server::start(log.clone());
    let mut ada = server.connect("ada").await;
    for thread in ["t", "u"] {
        ada.say(thread, "from before the group").await;
        accepted(&ada.ask(publish(thread, "x.job", json!({}))).await);
    }
    drop(ada);
    for (settings, expected) in [
        (json!({"kinds": ["x.job"], "from": "start"}), [("t", 2), ("u", 2)]),
        // Where it is, it goes on: what it did not want before is behind it, and what comes is not.
        (json!({"kinds": ["user_message"]}), [("t", 3), ("u", 3)]),
    ] {
        server.stop().await;
        let opened = open(&log, server.data());
        append_to(&*opened, vec![group("group_set", settings)]);
        opened.close();
        server.up();
        server.ready().await;
        let mut wim = worker(&server, "wim", "g", json!({"credit": 2})).await;
        if expected[0].1 == 3 {
            let mut ada = server.connect("ada").await;
            for thread in ["t", "u"] {
                assert_eq!(ada.say(thread, "more").await, 3);
            }
        }
        let mut got = BTreeSet::new();
        for _ in expected {
            let work = wim.recv_type("work").await;
            got.insert(place(&work));
            done(&mut wim, &work).await;
        }
        assert_eq!(got, expected.iter().map(|(thread, seq)| at(thread, *seq, 1)).collect());
        wim.silent().await;
    }
});

on_both_logs!(a_group_that_is_paused_gives_nothing_out_until_it_goes_on, |log| async move {
    let mut server = Server::start(log.clone());
    server.stop().await;
    let opened = open(&log, server.data());
    append_to(&*opened, vec![group("group_set", json!({})), group("group_paused", json!({}))]);
    opened.close();
    server.up();

    let mut wim = worker(&server, "wim", "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    // Whatever the other group's worker gets was chosen after this.
    let mut eve = worker(&server, "eve", "other", json!({})).await;
    ada.say("u", "do this").await;
    assert_eq!(place(&eve.recv_type("work").await), at("u", 1, 1));
    wim.silent().await;
    drop((wim, eve));

    server.stop().await;
    let opened = open(&log, server.data());
    append_to(&*opened, vec![group("group_resumed", json!({}))]);
    opened.close();
    server.up();
    let mut wim = worker(&server, "wim", "g", json!({"credit": 2})).await;
    let got = [wim.recv_type("work").await, wim.recv_type("work").await];
    assert_eq!(got.iter().map(|work| place(work).0).collect::<BTreeSet<_>>().len(), 2);
});

on_both_logs!(who_holds_a_lease_reads_and_writes_the_thread_for_as_long_as_it_lasts, |log| async move {
    let server = Server::start(log);
    let mut wim = server.connect_as("wim", AGENT).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "do it").await;
    let read = async |socket: &mut Socket| socket.ask(json!({"type": "subscribe", "thread": "t", "after": 0})).await;
    refused_with(&read(&mut wim).await, "not_found");

    has(&consume(&mut wim, "g", json!({})).await, json!({"type": "consuming"}));
    ada.say("t", "now").await;
    let work = wim.recv_type("work").await;
    assert_eq!(place(&work).1, 2, "what was there before the group is not its work");
    has(&read(&mut wim).await, json!({"type": "subscribed", "head": 2}));
    assert_eq!(wim.events(2).await.len(), 2);
    accepted(&wim.ask(publish("t", "x.result", json!({"ok": true}))).await);

    done(&mut wim, &work).await;
    let ended = wim.recv_type("error").await;
    has(&ended, json!({"code": "not_found", "thread": "t"}));
    refused_with(&read(&mut wim).await, "not_found");
    refused_with(&wim.ask(publish("t", "x.result", json!({}))).await, "not_found");
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_found_again_after_a_restart_and_after_a_rebuild() {
    let mut server = Server::start(LogKind::embedded());
    let mut wim = worker(&server, "wim", "g", json!({"credit": 2})).await;
    let mut ada = server.connect("ada").await;
    for thread in ["t", "u", "v"] {
        ada.say(thread, "one").await;
        ada.say(thread, "two").await;
    }
    let first = wim.recv_type("work").await;
    done(&mut wim, &first).await;
    drop(wim);
    for rebuild in [false, true] {
        server.stop().await;
        if rebuild {
            std::fs::remove_dir_all(server.data().join("projections")).unwrap();
        }
        server.up();
        server.ready().await;
    }
    let mut wim = worker(&server, "wim", "g", json!({"credit": 10})).await;
    let mut found = BTreeMap::new();
    for _ in 0..5 {
        let work = wim.recv_type("work").await;
        let (thread, seq, _) = place(&work);
        found.entry(thread).or_insert_with(Vec::new).push(seq);
        done(&mut wim, &work).await;
    }
    let all: Vec<_> = found.into_values().collect();
    assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 5);
    assert!(all.iter().all(|seqs| *seqs == [1, 2] || *seqs == [2]), "{all:?}");
    wim.silent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_command_about_work_is_said_by_its_field() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    refused_with(&consume(&mut ada, "g", json!({})).await, "forbidden");
    let mut wim = server.connect_as("wim", AGENT).await;
    refused(&consume(&mut wim, "no group", json!({})).await, "bad_request", "group");
    for (field, wrong) in
        [("credit", json!(1_001)), ("lease_ms", json!(999)), ("kinds", json!([])), ("credit", json!(-1))]
    {
        refused(&consume(&mut wim, "g", json!({field: wrong})).await, "bad_request", field);
    }
    has(&consume(&mut wim, "g", json!({"credit": 600})).await, json!({"type": "consuming"}));
    refused(&consume(&mut wim, "h", json!({"credit": 401})).await, "too_large", "credit");
    has(&consume(&mut wim, "g", json!({"credit": 1_000})).await, json!({"type": "consuming"}));

    let work = json!({"delivery": "nothing"});
    refused(&settle(&mut wim, &work, json!({})).await, "bad_request", "delivery");
    for (field, wrong) in [("outcome", json!("lost")), ("delay_ms", json!(86_400_001))] {
        let wrong = json!({field: wrong, "delivery": "AAAA"});
        refused(&settle(&mut wim, &work, wrong).await, "bad_request", field);
    }
}
