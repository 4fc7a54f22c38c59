//! Servers of their own: killed while they give out work, stopped past a lease and continued; and, on Kafka, several at once.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use weft::client::{Client, ClientError, ClientFrame, ClientWork, ConsumeDraft, SettleDraft};
use weft::log::Log;
use weft::projector::rebuild::compare;
use weft::protocol::work::{Delivery, Outcome};
use weft::store::Store;

use super::GROUP;
use super::ledger::{Ledger, Told};
use super::nodes;
use crate::persistence::rules::open;
use crate::persistence::threads::Chance;
use crate::support::{LogKind, Server, TENANT, eventually, has, refused, token};

const AGENT: &str = "publish subscribe agent";
const THREADS: usize = 6;
const WORKERS: usize = 5;
const LEASE_MS: u64 = 1_000;

struct World {
    /// Of the servers that are up.
    urls: Mutex<Vec<Option<String>>>,
    told: Mutex<Told>,
    /// One for each settlement.
    settled: Semaphore,
}

async fn group(server: &Server, method: &str, body: Option<Value>) -> (u16, Value) {
    server.http_with(method, &format!("/v1/groups/{GROUP}"), &token("root", "admin"), body, &[]).await
}

/// Nothing waits for the group, as far as a server knows.
async fn is_done(server: &Server) -> bool {
    let (status, group) = group(server, "GET", None).await;
    status == 200 && group["depth"] == 0 && group["in_flight"] == 0
}

/// So many servers, of which one is killed now and then while the work is done.
async fn work_off(log: LogKind, nodes: usize, kills: usize, each: u64) {
    let mut servers: Vec<Server> = (0..nodes).map(|_| Server::start_unlimited(log.clone())).collect();
    let settings = json!({"lease_ms": LEASE_MS, "attempts": 20, "backoff": {"min_ms": 0, "max_ms": 20}});
    assert_eq!(group(&servers[0], "PUT", Some(settings)).await.0, 201);
    let mut ada = servers[0].connect("ada").await;
    for seq in 1..=each {
        for thread in 0..THREADS {
            assert_eq!(ada.say(&format!("t{thread}"), "do it").await, seq);
        }
    }
    drop(ada);

    let urls = Mutex::new(servers.iter().map(|server| Some(server.url.clone())).collect());
    let world = Arc::new(World { urls, told: Mutex::default(), settled: Semaphore::new(0) });
    let (finished, mut workers) = (watch::Sender::new(false), JoinSet::new());
    for number in 0..WORKERS {
        workers.spawn(work(world.clone(), number, finished.subscribe()));
    }
    let mut chance = Chance::new(kills as u64);
    for _ in 0..kills {
        world.settled.acquire_many(8).await.unwrap().forget();
        let at = chance.below(nodes);
        world.urls.lock().unwrap()[at] = None;
        servers[at].kill();
        servers[at].up();
        world.urls.lock().unwrap()[at] = Some(servers[at].url.clone());
    }
    for server in &servers {
        eventually("all is settled", async || is_done(server).await).await;
    }
    finished.send_replace(true);
    while let Some(worker) = workers.join_next().await {
        worker.unwrap();
    }
    for server in &mut servers {
        server.stop().await;
    }
    let told = std::mem::take(&mut *world.told.lock().unwrap());
    check(&servers, &told, each).await;
}

/// A worker who connects to one server after the other.
async fn work(world: Arc<World>, number: usize, mut finished: watch::Receiver<bool>) {
    let (user, mut chance) = (format!("w{number}"), Chance::new(number as u64 + 1));
    let token = token(&user, AGENT);
    let wants = ConsumeDraft { group: GROUP.into(), credit: 2, lease_ms: Some(LEASE_MS) };
    let mut stale: Vec<ClientWork> = Vec::new();
    while !*finished.borrow() {
        let url = chance.of(&world.urls.lock().unwrap());
        let Some(url) = url else {
            tokio::task::yield_now().await;
            continue;
        };
        let Ok(mut client) = Client::connect(&url, &token).await else { continue };
        if client.consume(&wants).await.is_err() {
            continue;
        }
        loop {
            let frame = tokio::select! {
                frame = client.recv() => frame,
                _ = finished.wait_for(|finished| *finished) => break,
            };
            let work = match frame {
                Ok(ClientFrame::Work(work)) => *work,
                Ok(_) => continue,
                Err(_) => break,
            };
            world.told.lock().unwrap().give(Delivery::parse(&work.delivery).unwrap().lease);
            if let Some(late) = stale.pop() {
                settle(&world, &mut client, &late, Outcome::Done).await;
            }
            match chance.below(20) {
                0 => stale.push(work),
                1 => break,
                2..5 => settle(&world, &mut client, &work, Outcome::Retry).await,
                5 => {
                    settle(&world, &mut client, &work, Outcome::Extend).await;
                    settle(&world, &mut client, &work, Outcome::Done).await;
                }
                _ => settle(&world, &mut client, &work, Outcome::Done).await,
            }
        }
    }
}

async fn settle(world: &World, client: &mut Client, work: &ClientWork, outcome: Outcome) {
    let name = weft::protocol::work::Settlement::from(outcome).as_str();
    let draft = SettleDraft { delivery: work.delivery.clone(), outcome: name, ..SettleDraft::default() };
    let accepted = match client.settle(&draft).await {
        Ok(()) => Some(true),
        Err(ClientError::Command(error)) if error.code == "conflict" => Some(false),
        // It is not known whether it came to be.
        Err(_) => None,
    };
    world.told.lock().unwrap().answer(Delivery::parse(&work.delivery).unwrap().lease, outcome, accepted);
    world.settled.add_permits(1);
}

/// What the log says of it, and that each server has made the same of it.
async fn check(servers: &[Server], told: &Told, each: u64) {
    let log: Arc<dyn Log> = Arc::from(open(servers[0].log(), servers[0].data()));
    let folder = tempfile::tempdir().unwrap();
    let (rebuilt, counts) = nodes::rebuilt(&log, folder.path()).await;
    let ledger = Ledger::of(&nodes::entries(&*log), |id| counts[&id]);
    told.check(&ledger);
    assert!(!ledger.is_anything_open());
    for thread in 0..THREADS {
        let place = (TENANT.to_owned(), format!("t{thread}"), GROUP.to_owned());
        assert_eq!(ledger.finished(&place), (1..=each).collect::<Vec<_>>(), "{place:?}");
    }
    for server in servers {
        let store = Store::open(&Path::join(server.data(), "projections")).unwrap();
        compare(&rebuilt, &store).unwrap();
    }
    log.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_again_and_again_has_each_event_settled_once_and_in_order() {
    work_off(LogKind::embedded(), 1, 5, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_on_kafka_compete_and_never_lease_a_thread_twice_at_once() {
    work_off(LogKind::kafka(), 2, 0, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_on_kafka_of_which_some_are_killed_settle_each_event_once_and_in_order() {
    work_off(LogKind::kafka(), 3, 3, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_held_that_was_stopped_past_its_leases_is_done_once_by_another() {
    let log = LogKind::kafka();
    let nodes = [Server::start(log.clone()), Server::start(log)];
    assert_eq!(group(&nodes[0], "PUT", Some(json!({"lease_ms": LEASE_MS}))).await.0, 201);
    let consume = async |node: &Server, user: &str| {
        let mut socket = node.connect_as(user, AGENT).await;
        has(&socket.ask(json!({"type": "consume", "group": GROUP, "credit": 1})).await, json!({"type": "consuming"}));
        socket
    };
    let mut wim = consume(&nodes[0], "wim").await;
    nodes[1].connect("ada").await.say("t", "do it").await;
    let work = wim.recv_type("work").await;
    has(&work, json!({"attempt": 1}));
    nodes[0].signal("STOP");
    // It reaches the node once that goes on.
    wim.send(&json!({"type": "settle", "id": 77, "delivery": work["delivery"], "outcome": "done"})).await;

    let mut eve = consume(&nodes[1], "eve").await;
    let again = eve.recv_type("work").await;
    has(&again, json!({"attempt": 2}));
    assert_eq!(again["event"]["seq"], work["event"]["seq"]);
    let done = json!({"type": "settle", "delivery": again["delivery"], "outcome": "done"});
    has(&eve.ask(done).await, json!({"type": "settled"}));
    nodes[0].signal("CONT");
    let answer = loop {
        let frame = wim.recv().await;
        if frame["id"] == 77 {
            break frame;
        }
    };
    refused(&answer, "conflict", "delivery");
    for node in &nodes {
        eventually("it is done", async || is_done(node).await).await;
    }
    wim.silent().await;
    eve.silent().await;
}
