//! Nodes in this process, as many as a test wants, on one embedded log: each with a store, a projector and a dispatcher of its
//! own, as [`weft::app`] puts them together. So that they compete without a broker between them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use uuid::Uuid;
use weft::dispatch::Dispatcher;
use weft::ingest::pending::Pending;
use weft::ingest::submit::Submit;
use weft::log::{Entry, Log};
use weft::projector::level::Level;
use weft::projector::{Projector, Pump, Status};
use weft::protocol::error::{Code, Error};
use weft::store::Store;

use crate::persistence::projector::open_store;
use crate::support::{PATIENCE, eventually};

/// Of so many verdicts one is lost.
const LOST_EVERY: usize = 17;

/// What counted, by the ids of records.
pub type Verdicts = Arc<Mutex<HashMap<Uuid, bool>>>;

/// What the dispatcher may hold: less than waits where much does.
const MEMORY: usize = 1 << 20;

pub struct Node {
    pub store: Arc<Store>,
    pub submit: Arc<Submit>,
    pub dispatcher: Arc<Dispatcher>,
    status: Arc<Status>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Whether it has ended; whoever waits for an answer of it then waits in vain.
    ended: watch::Sender<bool>,
}

impl Node {
    pub fn start(log: &Arc<dyn Log>, folder: &Path) -> Node {
        Node::start_with(log, folder, &Verdicts::default(), false)
    }

    /// One that now and then does not hear in time what became of a record.
    pub fn losing(log: &Arc<dyn Log>, folder: &Path) -> Node {
        Node::start_with(log, folder, &Verdicts::default(), true)
    }

    fn start_with(log: &Arc<dyn Log>, folder: &Path, verdicts: &Verdicts, losing: bool) -> Node {
        let (store, progress) = open_store(log.as_ref(), folder);
        let begin: Vec<u64> = progress.iter().map(|it| it.next).collect();
        let (pending, status, stop) = (Arc::new(Pending::default()), Arc::new(Status::default()), Arc::default());
        let (waiting, verdicts, count) = (pending.clone(), verdicts.clone(), AtomicUsize::new(0));
        let pump = Pump {
            projector: Projector::new(store.clone(), log.as_ref(), progress),
            reader: log.reader(&begin).unwrap(),
            log: log.clone(),
            threads: 1,
            status: status.clone(),
            stop: Arc::clone(&stop),
            publish: Box::new(move |commit| {
                for (id, verdict) in commit.verdicts {
                    verdicts.lock().unwrap().insert(id, verdict.is_ok());
                    let unknown = || Err(Error::new(Code::Timeout, "no answer in time").unknown_outcome());
                    let is_lost = losing && count.fetch_add(1, Ordering::Relaxed) % LOST_EVERY == 0;
                    waiting.resolve(id, if is_lost { unknown() } else { verdict });
                }
                true
            }),
        };
        let projecting = pump.start().unwrap();
        let submit = Arc::new(Submit::new(log.clone(), pending));
        let level = Arc::new(Level::new(log.clone(), status.clone()));
        let (dispatcher, dispatching) =
            Dispatcher::start(store.clone(), submit.clone(), level, status.clone(), MEMORY).unwrap();
        let threads = std::iter::once(projecting).chain(dispatching).collect();
        let ended = watch::Sender::new(false);
        Node { store, submit, dispatcher, status, stop, threads, ended }
    }

    /// What `answer` gives, or nothing if the node ends before.
    pub async fn unless_ended<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        let mut ended = self.ended.subscribe();
        tokio::select! {
            answer = answer => Some(answer),
            _ = ended.wait_for(|ended| *ended) => None,
        }
    }

    /// It has projected all that the log has now.
    pub async fn level(&self, log: &Arc<dyn Log>) {
        let ends = log.ends().unwrap();
        tokio::time::timeout(PATIENCE, self.status.until_past(&ends)).await.expect("it gets to the end");
    }
}

/// Ends a node without a word to anybody: no lease of its workers' is given up. The store is closed once nobody holds it.
pub async fn end(node: Arc<Node>) {
    let store = Arc::downgrade(&node.store);
    node.dispatcher.stop();
    node.ended.send_replace(true);
    node.stop.store(true, Ordering::Release);
    eventually("its workers have seen that it has ended", async || Arc::strong_count(&node) == 1).await;
    let Some(Node { threads, store: held, submit, dispatcher, .. }) = Arc::into_inner(node) else {
        unreachable!("one is left")
    };
    drop((held, submit, dispatcher));
    tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| thread.join().unwrap())).await.unwrap();
    eventually("the store is closed", async || store.strong_count() == 0).await;
}

/// Projects a log anew; gives the store, and what counted.
pub async fn rebuilt(log: &Arc<dyn Log>, folder: &Path) -> (Arc<Store>, HashMap<Uuid, bool>) {
    let verdicts = Verdicts::default();
    let node = Arc::new(Node::start_with(log, folder, &verdicts, false));
    node.level(log).await;
    end(node).await;
    let verdicts = std::mem::take(&mut *verdicts.lock().unwrap());
    (open_store(log.as_ref(), folder).0, verdicts)
}

/// Everything that a log holds, of each partition in its order.
pub fn entries(log: &dyn Log) -> Vec<Entry> {
    let starts: Vec<u64> = log.bounds().unwrap().iter().map(|it| it.start).collect();
    let ends = log.ends().unwrap();
    let (mut reader, mut entries) = (log.reader(&starts).unwrap(), Vec::new());
    while reader.positions().iter().zip(&ends).any(|(next, end)| next < end) {
        entries.extend(reader.next(1_000, Duration::from_millis(100)).unwrap());
    }
    entries
}

pub fn folder(of: &Path, node: usize) -> PathBuf {
    of.join(format!("node-{node}"))
}
