//! Whose turn it is, on a node of which much is asked: what waits is more than it may hold, or than it could follow.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use weft::auth::Principal;
use weft::auth::scopes::Scopes;
use weft::clock;
use weft::dispatch::{Consumer, Settling, Wants};
use weft::log::embedded::EmbeddedLog;
use weft::log::{Log, Record};
use weft::protocol::event::Priority;
use weft::protocol::work::{GroupSettings, Outcome, StartFrom, Work};

use super::nodes::{self, Node};
use super::{GROUP, event, event_with};
use crate::persistence::projector::append;
use crate::support::{PATIENCE, TENANT};

/// A node alone with its log.
struct Alone {
    embedded: Arc<EmbeddedLog>,
    log: Arc<dyn Log>,
    node: Arc<Node>,
    root: Principal,
    _folder: tempfile::TempDir,
}

impl Alone {
    fn start() -> Alone {
        let folder = tempfile::tempdir().unwrap();
        let embedded = Arc::new(EmbeddedLog::open(&folder.path().join("log"), 4).unwrap());
        let log: Arc<dyn Log> = embedded.clone();
        let node = Arc::new(Node::start(&log, &nodes::folder(folder.path(), 0)));
        let root = Principal::new(TENANT, "root", Scopes::parse(Some("agent admin")), u64::MAX);
        Alone { embedded, log, node, root, _folder: folder }
    }

    async fn set(&self, group: &str, kinds: &[&str]) {
        let kinds = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        let settings = GroupSettings { kinds, from: StartFrom::Start, ..GroupSettings::default() };
        self.node.dispatcher.set(&self.root, group, settings, false).await.unwrap();
    }

    /// Appends records, some thousands at a time, and returns once they are projected.
    async fn append(&self, records: impl Iterator<Item = Record>) {
        let mut records = records.peekable();
        while records.peek().is_some() {
            append(&self.embedded, records.by_ref().take(5_000).collect());
        }
        self.node.level(&self.log).await;
    }

    fn consume(&self, credit: u32, kinds: Option<&[&str]>) -> (Consumer, mpsc::Receiver<Work>) {
        let kinds = kinds.map(|kinds| kinds.iter().map(|kind| (*kind).to_owned()).collect());
        self.consume_as(Wants { credit, kinds, lease_ms: None })
    }

    fn consume_as(&self, wants: Wants) -> (Consumer, mpsc::Receiver<Work>) {
        let (sender, work) = mpsc::channel(100);
        let sink = Box::new(move |work| sender.try_send(work).is_ok());
        (self.node.dispatcher.consume(&self.root, GROUP, wants, sink), work)
    }

    async fn done(&self, work: &Work) {
        let how = Settling { outcome: Outcome::Done, reason: None, delay_ms: None };
        self.node.dispatcher.settle(&self.root, &work.delivery, how).await.unwrap();
    }

    async fn end(self) {
        nodes::end(self.node).await;
    }
}

async fn next(work: &mut mpsc::Receiver<Work>) -> Work {
    tokio::time::timeout(PATIENCE, work.recv()).await.expect("there is work").unwrap()
}

fn said(thread: &str, from: &str) -> Record {
    event(clock::now_ms(), TENANT, thread, from, "user_message").1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_100_000_of_one_user_wait_anothers_first_is_out_within_a_round() {
    const THREADS: usize = 20_000;
    let it = Alone::start();
    it.set(GROUP, &["user_message"]).await;
    it.append((0..100_000).map(|n| said(&format!("ada-{}", n % THREADS), "ada"))).await;
    let (_consumer, mut work) = it.consume(1, None);
    let mut had = Vec::new();
    for round in 0..30 {
        if round % 10 == 5 {
            it.append(["ben", "cid"].into_iter().map(|user| said(&format!("{user}-{round}"), user))).await;
        }
        let given = next(&mut work).await;
        had.push(given.thread.split('-').next().unwrap().to_owned());
        it.done(&given).await;
    }
    // One may have been chosen before they came.
    for came in [5, 15, 25] {
        let next: HashSet<&str> = had[came..came + 4].iter().map(String::as_str).collect();
        assert!(next.contains("ben") && next.contains("cid"), "{had:?}");
    }
    it.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_could_not_follow_it_looks_up_and_loses_nothing() {
    const GROUPS: usize = 21;
    const THREADS: usize = 1_000;
    const EACH: usize = 5;
    let it = Alone::start();
    it.set(GROUP, &["user_message"]).await;
    // Each event is a change for every one of them: more together than may wait.
    for n in 1..GROUPS {
        it.set(&format!("other-{n}"), &["user_message"]).await;
    }
    // The dispatcher gives this worker something, and is held up there until the gate is gone.
    let (gate, opened) = std::sync::mpsc::sync_channel::<()>(0);
    let ((sender, mut work), (entered, mut enters), opened) =
        (mpsc::channel(200), mpsc::channel(200), Mutex::new(opened));
    let sink = move |work| {
        entered.try_send(()).unwrap_or(());
        opened.lock().unwrap().recv().unwrap_or(());
        sender.try_send(work).is_ok()
    };
    let wants = Wants { credit: 100, ..Wants::default() };
    let _consumer = it.node.dispatcher.consume(&it.root, GROUP, wants, Box::new(sink));
    it.append([said("first", "ada")].into_iter()).await;
    tokio::time::timeout(PATIENCE, enters.recv()).await.expect("it is given").unwrap();
    it.append((0..THREADS * EACH).map(|n| said(&format!("t{}", n % THREADS), "ada"))).await;
    drop(gate);

    let mut had: BTreeMap<Arc<str>, u64> = BTreeMap::new();
    for _ in 0..1 + THREADS * EACH {
        let given = next(&mut work).await;
        let seq = had.entry(given.thread.clone()).or_default();
        assert_eq!(given.seq, *seq + 1, "in order and once: {}", given.thread);
        *seq = given.seq;
        it.done(&given).await;
    }
    assert_eq!(had.len(), 1 + THREADS);
    it.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn priority_is_a_head_start_and_what_waits_grows_older_whatever_its_priority() {
    let it = Alone::start();
    it.set(GROUP, &["user_message"]).await;
    let now = clock::now_ms();
    let waits = [
        ("late-low", 0, Priority::Low),
        ("late-high", 0, Priority::High),
        ("normal", 30_000, Priority::Normal),
        ("old-low", 200_000, Priority::Low),
        ("old-normal", 61_000, Priority::Normal),
    ];
    let records = waits
        .map(|(thread, age, priority)| event_with(now - age, TENANT, thread, "ada", "user_message", Some(priority)).1);
    it.append(records.into_iter()).await;
    let (_consumer, mut work) = it.consume(1, None);
    let mut order = Vec::new();
    for _ in waits {
        let given = next(&mut work).await;
        order.push(given.thread.to_string());
        it.done(&given).await;
    }
    assert_eq!(order, ["old-low", "old-normal", "late-high", "normal", "late-low"]);
    it.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_one_kind_gets_it_however_much_of_another_waits_before_it() {
    let it = Alone::start();
    it.set(GROUP, &["x.a", "x.b"]).await;
    let job = |n: usize, kind: &str| event(clock::now_ms(), TENANT, &format!("t{n}"), "ada", kind).1;
    it.append((0..300).map(|n| job(n, "x.a")).chain([job(300, "x.b"), job(301, "x.b")])).await;
    let (_consumer, mut work) = it.consume(1, Some(&["x.b"]));
    for thread in ["t300", "t301"] {
        let given = next(&mut work).await;
        assert_eq!(&*given.thread, thread);
        it.done(&given).await;
    }
    let (_other, mut others) = it.consume(1, Some(&["x.a", "x.none"]));
    assert_eq!(&*next(&mut others).await.thread, "t0");
    assert!(work.try_recv().is_err());
    it.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_begun_goes_to_who_takes_its_kind_however_much_waits_of_the_only_kind_that_the_group_has_now() {
    let it = Alone::start();
    it.set(GROUP, &["x.a"]).await;
    let job = |n: usize, age, kind| event(clock::now_ms() - age, TENANT, &format!("t{n}"), "ada", kind).1;
    it.append([job(0, 0, "x.a")].into_iter()).await;
    let (_consumer, mut work) = it.consume(1, Some(&["x.a"]));
    let given = next(&mut work).await;
    it.set(GROUP, &["x.b"]).await;
    it.append((1..100).map(|n| job(n, 60_000, "x.b"))).await;
    let retry = Settling { outcome: Outcome::Retry, reason: None, delay_ms: Some(0) };
    it.node.dispatcher.settle(&it.root, &given.delivery, retry).await.unwrap();

    let again = next(&mut work).await;
    assert_eq!((&*again.thread, again.attempt), ("t0", 2));
    it.done(&again).await;
    let (_other, mut others) = it.consume(1, Some(&["x.none", "x.b"]));
    assert_eq!(&*next(&mut others).await.thread, "t1");
    assert!(work.try_recv().is_err());
    it.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_clock_is_behind_the_logs_asks_for_a_lease_now_and_then() {
    let it = Alone::start();
    it.set(GROUP, &["user_message"]).await;
    // Two that agree, so that the log's time is theirs; longer ahead than a lease lasts.
    let ahead = clock::now_ms() + 2_500;
    it.append((0..2).map(|_| event(ahead, TENANT, "t", "ada", "user_message").1)).await;
    let (_consumer, mut work) = it.consume_as(Wants { credit: 1, kinds: None, lease_ms: Some(1_000) });
    let given = next(&mut work).await;
    assert_eq!((&*given.thread, given.seq, given.attempt), ("t", 1, 1));
    it.done(&given).await;
    let entries = nodes::entries(&*it.log);
    let leases = entries.iter().filter(|entry| entry.record.as_ref().is_ok_and(|record| record.kind == "work_leased"));
    let asked = leases.count();
    assert!((2..8).contains(&asked), "{asked} leases were asked for");
    it.end().await;
}
