//! Three nodes compete for the work of many tenants at once, each a seed of its own: workers come, leave, settle well or badly
//! or not at all; groups are paused, and deleted and made again; nodes end without a word and come back, some with nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use weft::auth::Principal;
use weft::auth::scopes::Scopes;
use weft::clock;
use weft::dispatch::{Consumer, Settling, Wants};
use weft::log::Log;
use weft::log::embedded::EmbeddedLog;
use weft::projector::rebuild::compare;
use weft::protocol::error::{Code, Error};
use weft::protocol::work::{Backoff, GroupSettings, Outcome, StartFrom, Work};

use super::ledger::{Ledger, Told};
use super::nodes::{self, Node};
use super::{GROUP, event};
use crate::persistence::threads::Chance;
use crate::support::eventually;

const NODES: usize = 3;
const TENANTS: u64 = 40;
const THREADS: usize = 3;
const EACH: usize = 4;
const WORKERS: usize = 3;
/// Settlements between one node's end and the next.
const ENDS_EVERY: u32 = 50;
/// Fewer than the settlements that there certainly are allow.
const ENDS: usize = 4;
/// As short as leases may be.
const LEASE_MS: u64 = 1_000;

struct World {
    log: Arc<dyn Log>,
    folder: PathBuf,
    nodes: Vec<Mutex<Option<Arc<Node>>>>,
    told: Mutex<Told>,
    /// One for each settlement.
    settled: Semaphore,
}

impl World {
    fn node(&self, chance: &mut Chance) -> Option<Arc<Node>> {
        self.nodes[chance.below(NODES)].lock().unwrap().clone()
    }

    /// Has something done by one node after the other, until one has done it.
    async fn on_some_node(&self, chance: &mut Chance, what: impl AsyncFn(&Node) -> Result<(), Error>) {
        loop {
            if let Some(node) = self.node(chance)
                && let Some(done) = node.unless_ended(what(&node)).await
                && done.as_ref().err().is_none_or(|error| !error.outcome_unknown)
            {
                return done.unwrap();
            }
            tokio::task::yield_now().await;
        }
    }
}

fn principal(tenant: &str, user: &str) -> Principal {
    Principal::new(tenant, user, Scopes::parse(Some("agent admin")), u64::MAX)
}

fn settings(chance: &mut Chance) -> GroupSettings {
    GroupSettings {
        from: StartFrom::Start,
        lease_ms: LEASE_MS,
        attempts: chance.of(&[2, 3, 20]),
        backoff: Backoff { min_ms: 0, max_ms: chance.of(&[0, 20]) },
        ..GroupSettings::default()
    }
}

/// One tenant from its first event to its last settlement.
async fn play(world: Arc<World>, seed: u64) {
    let (tenant, mut chance, done) = (format!("seed-{seed}"), Chance::new(seed), watch::Sender::new(false));
    let root = principal(&tenant, "root");
    let set = async |chance: &mut Chance| {
        let settings = settings(chance);
        world.on_some_node(chance, async |node| node.dispatcher.set(&root, GROUP, settings.clone(), false).await).await;
    };
    set(&mut chance).await;
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let (world, who, done) = (world.clone(), principal(&tenant, &format!("w{number}")), done.subscribe());
        workers.spawn_local(work(world, who, Chance::new(seed * 100 + number as u64 + 1), done));
    }

    for n in 0..THREADS * EACH {
        let (id, record) = event(clock::now_ms(), &tenant, &format!("t{}", n % THREADS), "ada", "user_message");
        // Whether this node lives to see the verdict or not, the record is in the log once.
        let node = loop {
            match world.node(&mut chance) {
                Some(node) => break node,
                None => tokio::task::yield_now().await,
            }
        };
        drop(node.unless_ended(node.submit.write(id, record)).await);
        match chance.below(16) {
            0 => {
                let pause = |paused| {
                    let root = &root;
                    async move |node: &Node| node.dispatcher.pause(root, GROUP, paused).await
                };
                world.on_some_node(&mut chance, pause(true)).await;
                world.on_some_node(&mut chance, pause(false)).await;
            }
            1 => {
                // On a node that has not read so far, it is not there yet, or not any more.
                world
                    .on_some_node(&mut chance, async |node| match node.dispatcher.delete(&root, GROUP).await {
                        Err(error) if error.code == Code::NotFound => Ok(()),
                        other => other,
                    })
                    .await;
                set(&mut chance).await;
            }
            _ => {}
        }
    }

    eventually("all is settled", async || {
        let Some(node) = world.node(&mut chance) else { return false };
        let Ok(Some(group)) = node.store.group(&tenant, GROUP) else { return false };
        (0..THREADS).all(|thread| {
            let row = node.store.work(&tenant, &format!("t{thread}"), GROUP).unwrap().unwrap_or_default();
            row.group_id == group.id && row.cursor == EACH as u64 && row.leases.is_empty()
        })
    })
    .await;
    done.send_replace(true);
    while let Some(worker) = workers.join_next().await {
        worker.unwrap();
    }
}

/// A worker who connects to one node after the other.
async fn work(world: Arc<World>, who: Principal, mut chance: Chance, mut done: watch::Receiver<bool>) {
    // Held back until others have it.
    let mut stale: Vec<Work> = Vec::new();
    while !*done.borrow() {
        let Some(node) = world.node(&mut chance) else {
            tokio::task::yield_now().await;
            continue;
        };
        let (consumer, mut given) = consume(&node, &who, &mut chance);
        loop {
            let work = tokio::select! {
                work = node.unless_ended(given.recv()) => work.flatten(),
                _ = done.wait_for(|done| *done) => None,
            };
            let Some(work) = work else { break };
            world.told.lock().unwrap().give(work.lease);
            if let Some(late) = stale.pop() {
                settle(&world, &node, &who, &late, Outcome::Done).await;
            }
            match chance.below(24) {
                0..14 => settle(&world, &node, &who, &work, Outcome::Done).await,
                14..17 => settle(&world, &node, &who, &work, Outcome::Retry).await,
                17 => settle(&world, &node, &who, &work, Outcome::Reject).await,
                18 => {
                    settle(&world, &node, &who, &work, Outcome::Extend).await;
                    settle(&world, &node, &who, &work, Outcome::Done).await;
                }
                19 => {
                    settle(&world, &node, &who, &work, Outcome::Done).await;
                    settle(&world, &node, &who, &work, Outcome::Retry).await;
                }
                20 => stale.push(work),
                // The connection is lost, and the worker does not know.
                21 => {
                    drop((consumer, given));
                    settle(&world, &node, &who, &work, Outcome::Done).await;
                    break;
                }
                _ => break,
            }
        }
    }
}

fn consume(node: &Node, who: &Principal, chance: &mut Chance) -> (Consumer, mpsc::Receiver<Work>) {
    let (sender, given) = mpsc::channel(100);
    let wants = Wants { credit: 1 + chance.below(3) as u32, kinds: None, lease_ms: Some(LEASE_MS) };
    (node.dispatcher.consume(who, GROUP, wants, Box::new(move |work| sender.try_send(work).is_ok())), given)
}

async fn settle(world: &World, node: &Node, who: &Principal, work: &Work, outcome: Outcome) {
    let how = Settling { outcome, reason: None, delay_ms: None };
    let answer = match node.unless_ended(node.dispatcher.settle(who, &work.delivery, how)).await {
        None => None,
        Some(Ok(())) => Some(true),
        Some(Err(error)) if error.outcome_unknown => None,
        Some(Err(error)) => {
            assert_eq!(error.code, Code::Conflict, "{error:?}");
            Some(false)
        }
    };
    world.told.lock().unwrap().answer(work.lease, outcome, answer);
    world.settled.add_permits(1);
}

/// Ends one node after the other, a few times; every second one comes back with nothing, and reads the log from its beginning.
async fn end_nodes(world: Arc<World>) {
    let mut chance = Chance::new(7);
    for number in 0..ENDS {
        world.settled.acquire_many(ENDS_EVERY).await.unwrap().forget();
        let at = chance.below(NODES);
        let node = world.nodes[at].lock().unwrap().take().unwrap();
        nodes::end(node).await;
        let folder = nodes::folder(&world.folder, at);
        if number % 2 == 1 {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        *world.nodes[at].lock().unwrap() = Some(Arc::new(Node::losing(&world.log, &folder)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_that_come_and_go_settle_each_event_once_and_in_order() {
    tokio::task::LocalSet::new().run_until(compete()).await;
}

async fn compete() {
    let folder = tempfile::tempdir().unwrap();
    let log: Arc<dyn Log> = Arc::new(EmbeddedLog::open(&folder.path().join("log"), 4).unwrap());
    let start = |at| Mutex::new(Some(Arc::new(Node::losing(&log, &nodes::folder(folder.path(), at)))));
    let world = Arc::new(World {
        log: log.clone(),
        folder: folder.path().to_owned(),
        nodes: (0..NODES).map(start).collect(),
        told: Mutex::default(),
        settled: Semaphore::new(0),
    });
    let mut tenants = JoinSet::new();
    for seed in 0..TENANTS {
        tenants.spawn_local(play(world.clone(), seed));
    }
    let ending = tokio::task::spawn_local(end_nodes(world.clone()));
    while let Some(played) = tenants.join_next().await {
        played.unwrap();
    }
    ending.await.unwrap();

    let (rebuilt, counts) = nodes::rebuilt(&log, &folder.path().join("rebuilt")).await;
    let ledger = Ledger::of(&nodes::entries(&*log), |id| counts[&id]);
    world.told.lock().unwrap().check(&ledger);
    assert!(!ledger.is_anything_open());
    for seed in 0..TENANTS {
        for thread in 0..THREADS {
            let place = (format!("seed-{seed}"), format!("t{thread}"), GROUP.to_owned());
            assert_eq!(ledger.finished(&place), (1..=EACH as u64).collect::<Vec<_>>(), "{place:?}");
        }
    }
    for at in 0..NODES {
        let Some(node) = world.nodes[at].lock().unwrap().take() else { continue };
        node.level(&log).await;
        compare(&rebuilt, &node.store).unwrap();
        nodes::end(node).await;
    }
}
