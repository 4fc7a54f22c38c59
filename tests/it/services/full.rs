//! Groups that are full, threads that are paused, and work side by side.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::groups::{as_admin, group, lease, lease_one, make, settle};
use crate::on_both_logs;
use crate::reliability::dead_letters::{list, rebuilt, root_of};
use crate::reliability::letter_acts::{id_of, post};
use crate::support::{LogKind, Server, Socket, TENANT, accepted, eventually, has, publish, refused, seqs};

async fn job(socket: &mut Socket, thread: &str, priority: &str) -> Value {
    let mut command = publish(thread, "x.job", json!({}));
    command["priority"] = priority.into();
    socket.ask(command).await
}

/// A group of jobs of which it is counted how much waits.
async fn make_counted(server: &Server, name: &str, settings: Value) {
    let mut all = json!({"kinds": ["x.job"]});
    all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    make(server, name, all).await;
    has(&group(server, name).await, json!({"depth": 0, "overflowing": false}));
}

/// So many jobs, in five threads.
async fn publish_jobs(server: &Server, jobs: usize) {
    let mut ada = server.connect("ada").await;
    for n in 0..jobs {
        let mut command = publish(&format!("t{}", n % 5), "x.job", json!({}));
        command["id"] = n.into();
        ada.send(&command).await;
        if n % 50 == 49 {
            for _ in 0..50 {
                ada.recv_type("published").await;
            }
        }
    }
}

async fn readiness(server: &Server) -> (u16, Value) {
    server.http("GET", "/readyz", "ada", None).await
}

fn seq_of(work: &Value) -> u64 {
    work["event"]["seq"].as_u64().unwrap()
}

on_both_logs!(a_full_group_that_rejects_refuses_such_events_until_there_is_room_again, |log| async move {
    let server = Server::start(log);
    make_counted(&server, "g", json!({"limit": 2, "overflow": "reject"})).await;
    let mut ada = server.connect("ada").await;
    for thread in ["t", "u"] {
        accepted(&job(&mut ada, thread, "normal").await);
    }
    let full = job(&mut ada, "v", "high").await;
    refused(&full, "queue_full", "kind");
    has(&full, json!({"temporary": true, "retry_after_ms": 1_000}));
    let body = json!({"kind": "x.job", "data": {}});
    assert_eq!(server.http("POST", "/v1/threads/t/events", "ada", Some(body)).await.0, 503);
    accepted(&ada.ask(publish("v", "x.other", json!({}))).await);
    has(&group(&server, "g").await, json!({"depth": 2, "overflowing": true, "limit": 2, "overflow": "reject"}));
    let (status, ready) = readiness(&server).await;
    assert_eq!(status, 200, "{ready}");
    has(&ready, json!({"ready": true, "degraded": true, "work": {"overflowing": 1}}));
    eventually("metrics say so", async || server.metric("weft_groups_overflowing").await == 1.0).await;
    assert_eq!(server.metric("weft_work_overflowed_total{overflow=\"reject\"}").await, 2.0);

    // What somebody works on waits no more.
    let work = lease_one(&server, "g").await;
    has(&group(&server, "g").await, json!({"depth": 2, "in_flight": 1, "overflowing": false}));
    accepted(&job(&mut ada, "v", "normal").await);
    refused(&job(&mut ada, "w", "normal").await, "queue_full", "kind");
    assert_eq!(settle(&server, &work, "done").await.0, 200);
    refused(&job(&mut ada, "w", "normal").await, "queue_full", "kind");
    let (status, set) = as_admin(&server, "PUT", "/v1/groups/g", Some(json!({"kinds": ["x.job"], "limit": 2}))).await;
    assert_eq!(status, 200, "{set}");
    for thread in ["w", "x"] {
        accepted(&job(&mut ada, thread, "normal").await);
    }
    has(&group(&server, "g").await, json!({"depth": 4, "overflowing": true, "overflow": "accept"}));
});

on_both_logs!(the_oldest_of_the_lowest_priority_makes_room_and_is_work_again_once_requeued, |log| async move {
    let mut server = Server::start(log);
    let root = root_of(TENANT);
    make_counted(&server, "g", json!({"limit": 2, "overflow": "dead_letter"})).await;
    let mut ada = server.connect("ada").await;
    accepted(&job(&mut ada, "t", "low").await);
    // What is worked on makes no room.
    let first = lease_one(&server, "g").await;
    assert_eq!(seq_of(&first), 1);
    for priority in ["normal", "low", "high", "low"] {
        accepted(&job(&mut ada, "t", priority).await);
    }
    let given_up = async || list(&server, &root, "?group=g&reason=overflow").await;
    eventually("two make room", async || given_up().await.len() == 2).await;
    let letters = given_up().await;
    let mut found: Vec<u64> = letters.iter().map(|letter| letter["seq"].as_u64().unwrap()).collect();
    found.sort_unstable();
    assert_eq!(found, [3, 5], "{letters:?}");
    has(&letters[0], json!({"name": "g", "attempts": 0, "error": "more waited than the group's limit of 2"}));
    has(&group(&server, "g").await, json!({"depth": 3, "in_flight": 1}));

    for seq in [1, 2, 4] {
        let work = if seq == 1 { first.clone() } else { lease_one(&server, "g").await };
        assert_eq!(seq_of(&work), seq);
        assert_eq!(settle(&server, &work, "done").await.0, 200);
    }
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
    let letter = letters.iter().find(|letter| letter["seq"] == 3).unwrap();
    let path = format!("/{}/requeue", id_of(letter));
    has(&post(&server, &root, &path, json!({"rehearse": true})).await.1, json!({"effect": "work", "seq": 3}));
    has(&post(&server, &root, &path, json!({})).await.1, json!({"effect": "work", "seq": 3}));
    rebuilt(&mut server).await;
    let again = lease_one(&server, "g").await;
    assert_eq!((seq_of(&again), &again["attempt"]), (3, &json!(1)));
    assert_eq!(settle(&server, &again, "done").await.0, 200);
    let (_, page) = server.http_with("GET", &format!("/v1/dead-letters/{}", id_of(letter)), &root, None, &[]).await;
    has(&page, json!({"state": "done"}));
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0}));
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_begins_with_more_than_its_limit_makes_letters_of_the_rest_bit_by_bit() {
    const EVENTS: usize = 700;
    let server = Server::start_unlimited(LogKind::embedded());
    publish_jobs(&server, EVENTS).await;
    let began = Instant::now();
    make(&server, "g", json!({"kinds": ["x.job"], "from": "start", "limit": 100, "overflow": "dead_letter"})).await;
    let waiting = async || group(&server, "g").await["depth"].as_u64().unwrap();
    eventually("no more wait than may", async || waiting().await == 100).await;
    // In rounds of 200.
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
    let (_, counts) = as_admin(&server, "GET", "/v1/dead-letters/counts?group=g", None).await;
    has(&counts, json!({"total": EVENTS - 100}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_far_beyond_its_limit_holds_up_no_other_that_makes_room() {
    const EVENTS: usize = 2_000;
    let server = Server::start_unlimited(LogKind::embedded());
    let groups = ["a", "b", "c"];
    for name in groups {
        make_counted(&server, name, json!({"limit": 100, "overflow": "dead_letter"})).await;
    }
    publish_jobs(&server, EVENTS).await;
    let mut times = Vec::new();
    for name in groups {
        eventually("no more wait than may", async || group(&server, name).await["depth"] == 100).await;
        let (_, counts) = as_admin(&server, "GET", &format!("/v1/dead-letters/counts?group={name}"), None).await;
        has(&counts, json!({"total": EVENTS - 100}));
        let of_overflow = &counts["fingerprints"][0];
        times.push(
            ["oldest", "newest"].map(|it| of_overflow[it].as_str().unwrap_or_else(|| panic!("{counts}")).to_owned()),
        );
    }
    let first = times.iter().map(|[first, _]| first).max();
    let last = times.iter().map(|[_, last]| last).min();
    assert!(first < last, "one after the other: {times:?}");
}

on_both_logs!(a_thread_that_is_paused_holds_up_no_other_and_its_wait_counts_as_paused, |log| async move {
    let mut server = Server::start(log);
    make_counted(&server, "g", json!({})).await;
    let mut ada = server.connect("ada").await;
    for thread in ["t", "t", "u"] {
        accepted(&job(&mut ada, thread, "normal").await);
    }
    let first = lease_one(&server, "g").await;
    assert_eq!((&first["event"]["thread"], seq_of(&first)), (&json!("t"), 1));
    let set = async |server: &Server, what: &str, body: Value| {
        as_admin(server, "POST", &format!("/v1/groups/g/{what}"), Some(body)).await
    };
    let paused = set(&server, "pause", json!({"thread": "t"})).await;
    assert_eq!(paused, (200, json!({"group": "g", "thread": "t", "paused": true})));
    assert_eq!(set(&server, "pause", json!({"thread": "t"})).await.0, 200, "once more changes nothing");
    refused(&set(&server, "pause", json!({"thread": "nowhere"})).await.1, "not_found", "thread");
    refused(&set(&server, "pause", json!({"thread": ""})).await.1, "bad_request", "thread");
    refused(&set(&server, "pause", json!({"threads": "t"})).await.1, "bad_request", "threads");
    has(&group(&server, "g").await, json!({"paused": false, "paused_threads": ["t"]}));

    // What was begun is settled; then nothing comes from there.
    assert_eq!(settle(&server, &first, "done").await.0, 200);
    let other = lease_one(&server, "g").await;
    assert_eq!(other["event"]["thread"], "u");
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
    rebuilt(&mut server).await;
    has(&group(&server, "g").await, json!({"paused_threads": ["t"], "depth": 2}));
    let began = Instant::now();
    assert_eq!(lease(&server, "g", json!({"wait_ms": 300})).await, Vec::<Value>::new());
    let paused_for = began.elapsed().as_millis() as u64;
    assert_eq!(set(&server, "resume", json!({"thread": "t"})).await.1["paused"], false);
    let second = lease_one(&server, "g").await;
    assert_eq!((&second["event"]["thread"], seq_of(&second)), (&json!("t"), 2));
    let paused_ms = second["wait"]["paused_ms"].as_u64().unwrap();
    assert!(paused_ms >= paused_for / 2, "{second}");
    has(&group(&server, "g").await, json!({"paused_threads": []}));
});

on_both_logs!(without_order_a_threads_events_are_worked_on_side_by_side_and_one_holds_up_no_other, |log| async move {
    let mut server = Server::start(log);
    make_counted(&server, "g", json!({"order": "none", "attempts": 2, "backoff": {"min_ms": 0, "max_ms": 0}})).await;
    let mut ada = server.connect("ada").await;
    for _ in 1..=5 {
        accepted(&job(&mut ada, "t", "normal").await);
    }
    let works = lease(&server, "g", json!({"n": 4, "wait_ms": 30_000})).await;
    let mut leased: Vec<u64> = works.iter().map(seq_of).collect();
    leased.sort_unstable();
    // Those that the log had by then.
    assert!(!leased.is_empty() && leased.iter().copied().eq(1..=leased.len() as u64), "{leased:?}");
    let mut works = works;
    while works.len() < 5 {
        works.push(lease_one(&server, "g").await);
    }
    works.sort_by_key(seq_of);
    assert_eq!(works.iter().map(seq_of).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    has(&group(&server, "g").await, json!({"depth": 5, "in_flight": 5, "order": "none"}));
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());

    // The last first; the second fails, and is tried again beside the first.
    assert_eq!(settle(&server, &works[4], "done").await.0, 200);
    assert_eq!(settle(&server, &works[4], "done").await.0, 409);
    assert_eq!(settle(&server, &works[1], "retry").await.0, 200);
    let again = lease_one(&server, "g").await;
    assert_eq!((seq_of(&again), &again["attempt"]), (2, &json!(2)));
    assert_eq!(settle(&server, &again, "retry").await.0, 200);
    let root = root_of(TENANT);
    let letters = list(&server, &root, "?group=g").await;
    has(&letters[0], json!({"reason": "attempts", "seq": 2, "attempts": 2}));
    assert_eq!(settle(&server, &works[2], "done").await.0, 200);
    has(&group(&server, "g").await, json!({"depth": 2, "in_flight": 2}));

    // A rebuild has the same; what is requeued is work beside the rest.
    rebuilt(&mut server).await;
    has(&group(&server, "g").await, json!({"depth": 2, "in_flight": 2}));
    let path = format!("/{}/requeue", id_of(&letters[0]));
    has(&post(&server, &root, &path, json!({})).await.1, json!({"effect": "work", "seq": 2}));
    let requeued = lease_one(&server, "g").await;
    assert_eq!((seq_of(&requeued), &requeued["attempt"]), (2, &json!(1)));
    for work in [&works[0], &requeued, &works[3]] {
        assert_eq!(settle(&server, work, "done").await.0, 200);
    }
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0}));
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_worked_on_side_by_side_is_done_once_across_kills_and_a_rebuild() {
    const EVENTS: u64 = 200;
    let mut server = Server::start_unlimited(LogKind::embedded());
    make_counted(&server, "g", json!({"order": "none", "lease_ms": 1_000, "attempts": 20})).await;
    let mut ada = server.connect("ada").await;
    for _ in 0..EVENTS {
        accepted(&job(&mut ada, "t", "normal").await);
    }
    let mut done = BTreeSet::new();
    for round in 0..4 {
        // Some are settled and some are not when the server ends.
        let works = lease(&server, "g", json!({"n": 40, "wait_ms": 30_000})).await;
        for work in works.iter().rev().step_by(2) {
            if settle(&server, work, "done").await.0 == 200 {
                assert!(done.insert(seq_of(work)), "{work} is done twice");
            }
        }
        server.kill();
        if round == 2 {
            std::fs::remove_dir_all(server.data().join("projections")).unwrap();
        }
        server.up();
        server.ready().await;
    }
    while (done.len() as u64) < EVENTS {
        let works = lease(&server, "g", json!({"n": 100, "wait_ms": 30_000})).await;
        assert!(!works.is_empty(), "{} are left", EVENTS - done.len() as u64);
        for work in &works {
            if settle(&server, work, "done").await.0 == 200 {
                assert!(done.insert(seq_of(work)), "{work} is done twice");
            }
        }
    }
    assert!(done.iter().copied().eq(1..=EVENTS));
    has(&group(&server, "g").await, json!({"depth": 0, "in_flight": 0}));
    rebuilt(&mut server).await;
    assert_eq!(lease(&server, "g", json!({})).await, Vec::<Value>::new());
    let mut reader = server.connect("ada").await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&reader.events(EVENTS as usize).await).len() as u64, EVENTS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_ends_though_nobody_works_for_its_group_any_more() {
    let mut server = Server::start(LogKind::embedded());
    make_counted(&server, "g", json!({"lease_ms": 1_000, "backoff": {"min_ms": 0, "max_ms": 0}})).await;
    accepted(&job(&mut server.connect("ada").await, "t", "normal").await);
    lease_one(&server, "g").await;
    // A node that has never had a worker of the group.
    server.stop().await;
    server.up();
    server.ready().await;
    has(&group(&server, "g").await, json!({"depth": 1, "workers": 0}));
    eventually("the lease is over", async || group(&server, "g").await["in_flight"] == 0).await;
    has(&group(&server, "g").await, json!({"depth": 1}));
    assert_eq!(lease_one(&server, "g").await["attempt"], 2);
}
