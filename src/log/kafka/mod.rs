//! The log on Kafka: several nodes, one order, and durability by replication.
//!
//! Two threads belong to a log. `weft-kafka-producer` owns the producer: it answers for every record, in time even if
//! Kafka does not, and replaces a producer that failed for good. `weft-kafka-monitor` asks the brokers once a second how
//! they are, and commits how far we have read, for Kafka's own tools. Readers are consumers of their own; the positions
//! they read from are ours, never the group's. One producer writes to all three topics, and one consumer reads them.
//!
//! Files, each using only those before it: [`client`] (connections), [`topics`] (names and partitions), [`headers`] (a
//! record as a message), [`cluster`] (bounds), [`producer`], [`marker`] (the log's identity), [`setup`] (topics are
//! created and checked), [`reading`].

mod client;
mod cluster;
mod headers;
mod marker;
mod producer;
mod reading;
mod setup;
mod topics;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, Producer};

pub use self::client::KafkaConfig;
use self::client::{QueryClient, Quiet, TICK, consumer_config};
use self::cluster::Cluster;
pub use self::marker::Known;
use self::marker::Markers;
use self::producer::{ANSWER_WITHIN, Pending, Producing, new_producer, send};
use self::reading::KafkaReader;
use self::setup::{ensure_topics, missing_topics};
use self::topics::Topics;
use super::{
    Append, AppendError, Bounds, Cause, Checkpoint, Identity, IfUnnamed, Log, LogError, Positions, Reader, Record,
    Topic,
};
use crate::panics;

/// How long the monitor waits for an answer, and how long it leaves the brokers alone after one.
const PROBE: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(1);

pub struct KafkaLog {
    shared: Arc<Shared>,
    identity: ArcSwap<Identity>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    cluster: Arc<Cluster>,
    /// None after the end.
    producer: RwLock<Option<Arc<BaseProducer<Producing>>>>,
    pending: Arc<Pending>,
    outage: ArcSwapOption<Outage>,
    /// What the monitor commits next.
    progress: Mutex<Option<Positions>>,
}

/// What is wrong with the brokers, as the monitor found it.
struct Outage {
    why: String,
    /// For each topic, whether appends are refused at once. Without a leader for one partition the others still take
    /// records, and so do the other topics.
    refuse: [bool; Topic::ALL.len()],
}

impl KafkaLog {
    /// Connects, creates what is missing, and finds out which log this is. Blocks while it does.
    pub fn open(config: KafkaConfig) -> Result<KafkaLog, LogError> {
        KafkaLog::open_with(config, None, IfUnnamed::Refuse)
    }

    /// The same. What is `known` of the log need not be read again; `if_unnamed` says what to do with a log that does not
    /// say which one it is.
    pub fn open_with(
        config: KafkaConfig,
        known: Option<&Known>,
        if_unnamed: IfUnnamed<'_>,
    ) -> Result<KafkaLog, LogError> {
        let client: QueryClient =
            consumer_config(&config).create_with_context(Quiet).map_err(|error| config.unavailable(&error))?;
        let topics = Topics::new(&config);
        let missing = missing_topics(&config, &topics, &client)?;
        ensure_topics(&config, &topics, &missing, &client)?;

        let pending = Arc::new(Pending::default());
        let producer = new_producer(&config, &pending).map_err(|error| config.unavailable(&error))?;
        let shared = Arc::new(Shared {
            cluster: Arc::new(Cluster::new(config, topics, client)),
            producer: RwLock::new(Some(Arc::new(producer))),
            pending,
            outage: ArcSwapOption::empty(),
            progress: Mutex::new(None),
        });
        let identity = shared.identify(known, if_unnamed)?;
        let log = KafkaLog { shared, identity: ArcSwap::from_pointee(identity), threads: Mutex::new(Vec::new()) };
        log.spawn("weft-kafka-producer", Shared::run_producer)?;
        log.spawn("weft-kafka-monitor", Shared::run_monitor)?;
        Ok(log)
    }

    fn spawn(&self, name: &str, run: fn(&Shared)) -> Result<(), LogError> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _vital = panics::abort_on_panic("a thread of the log");
                run(&shared);
            })
            .map_err(|error| LogError::Unavailable(format!("cannot start the thread {name}: {error}")))?;
        lock(&self.threads).push(thread);
        Ok(())
    }
}

impl Log for KafkaLog {
    fn identity(&self) -> Arc<Identity> {
        self.identity.load_full()
    }

    fn new_generation(&self, cause: Cause) -> Result<(), LogError> {
        let starts = self.bounds()?.iter().map(|bounds| bounds.start).collect();
        let next = self.identity.load().next(cause, starts, 0);
        let current = self.shared.append_marker(&marker::generation(&next, cause))?;
        self.identity.store(Arc::new(current));
        Ok(())
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn partitions(&self) -> u32 {
        self.shared.cluster.topics.partitions()
    }

    fn topic_name(&self, topic: Topic) -> String {
        self.shared.cluster.topics.name(topic).to_owned()
    }

    fn append(&self, batch: Vec<Append>) {
        self.shared.append_to(None, batch);
    }

    fn reader(&self, from: &[u64]) -> Result<Box<dyn Reader>, LogError> {
        let partitions = self.partitions();
        if from.len() != partitions as usize {
            return Err(LogError::PartitionMismatch { found: partitions, configured: from.len() as u32 });
        }
        self.shared.cluster.check(from)?;
        Ok(Box::new(KafkaReader::open(self.shared.cluster.clone(), self.identity(), from)?))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        self.shared.cluster.bounds()
    }

    fn append_checkpoint(&self, partition: u32, offset: u64, hash: &[u8; 32]) {
        let node = self.shared.cluster.config.group.clone();
        let checkpoint = Checkpoint { epoch: self.epoch(), node, partition, offset, hash: *hash };
        // Without it others compare with the next one.
        let done = Box::new(|result| tracing::debug!(?result, "a checkpoint was written"));
        self.shared.append_to(Some(partition), vec![Append { record: checkpoint.record(), done }]);
    }

    fn committed(&self, positions: &[u64]) {
        *lock(&self.shared.progress) = Some(positions.to_vec());
    }

    fn health(&self) -> Result<(), String> {
        if self.shared.cluster.is_closed() {
            return Err("closed".to_owned());
        }
        match &*self.shared.outage.load() {
            Some(outage) => Err(outage.why.clone()),
            None => Ok(()),
        }
    }

    fn close(&self) {
        self.shared.cluster.close();
        // An append that did not see it yet holds this lock; afterwards nothing new comes in.
        drop(write(&self.shared.producer));
        for thread in lock(&self.threads).drain(..) {
            // The last handle may be dropped by somebody who was just answered, on that very thread.
            if thread.thread().id() != thread::current().id() {
                // It ends without an error: a panic of it ends the process.
                drop(thread.join());
            }
        }
    }
}

impl Drop for KafkaLog {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Which log this is. One that never held anything is named.
    fn identify(&self, known: Option<&Known>, if_unnamed: IfUnnamed<'_>) -> Result<Identity, LogError> {
        let Cluster { config, topics, .. } = &*self.cluster;
        let events = topics.name(Topic::Events);
        // Asked before the marker is looked for: what another node writes meanwhile has a marker in front of it.
        let bounds = self.cluster.bounds()?;
        let client = self.cluster.client()?;
        if let Some(identity) = (Markers { config, client: &client, topic: events }).current(known)? {
            return Ok(identity);
        }
        let starts = || bounds.iter().map(|bounds| bounds.start).collect();
        let held = (0..).zip(&bounds).find(|(_, bounds)| bounds.end > 0);
        let marker = match (held, if_unnamed) {
            (None, _) => marker::created(&Identity::random()),
            (Some(_), IfUnnamed::Name(epoch)) => {
                let before = epoch.map_or_else(Identity::random, Identity::of_epoch);
                marker::generation(&before.next(Cause::Discarded, starts(), 0), Cause::Discarded)
            }
            (Some((partition, Bounds { start, end })), IfUnnamed::Refuse) => {
                let (topic, within) = topics.topic_of(partition);
                let name = topics.name(topic);
                return Err(LogError::Unnamed(format!(
                    "partition {within} of {name} holds the offsets {start}..{end}, and {events} has no record in partition 0 \
                     that says which log it is. It was deleted, or another program wrote before Weft's first start"
                )));
            }
        };
        self.append_marker(&marker)
    }

    /// Returns the identity of the log then. Another node may have written a marker just before: whichever comes first
    /// counts, for both.
    fn append_marker(&self, record: &Record) -> Result<Identity, LogError> {
        let Cluster { config, topics, .. } = &*self.cluster;
        let events = topics.name(Topic::Events);
        let Some(producer) = read(&self.producer).clone() else {
            return Err(LogError::Unavailable("closed".to_owned()));
        };
        marker::write(&producer, &self.pending, events, record)?;
        let client = self.cluster.client()?;
        let current = (Markers { config, client: &client, topic: events }).current(None)?;
        current.ok_or_else(|| LogError::Damaged(format!("{events} does not give back the record that names it")))
    }

    /// `partition` is one of each record's topic; without it, that of its key.
    fn append_to(&self, partition: Option<u32>, batch: Vec<Append>) {
        let producer = read(&self.producer);
        let usable = match &*producer {
            Some(usable) if !self.cluster.is_closed() => usable,
            _ => {
                drop(producer);
                let error = AppendError::Unavailable("closed".to_owned());
                return batch.into_iter().for_each(|append| (append.done)(Err(error.clone())));
            }
        };

        let outage = self.outage.load();
        let send = |record: &Record, id| match &*outage {
            Some(outage) if outage.refuse[record.topic as usize] => Err(AppendError::Unavailable(outage.why.clone())),
            _ => send(usable, self.cluster.topics.name(record.topic), partition, record, id),
        };

        let (records, waiting): (Vec<_>, Vec<_>) = batch.into_iter().map(|a| (a.record, a.done)).unzip();
        let first = self.pending.add(records.iter().map(|record| record.topic).zip(waiting));
        let mut refused = Vec::new();
        for (id, record) in (first..).zip(&records) {
            if let Err(error) = send(record, id)
                && let Some(waiting) = self.pending.take(id)
            {
                refused.push((waiting.done, error));
            }
        }

        // Not under the lock: who is answered may well append again.
        drop(producer);
        refused.into_iter().for_each(|(done, error)| done(Err(error)));
    }

    /// Until closed and all is answered: polls for answers, and replaces a producer that failed for good.
    fn run_producer(&self) {
        loop {
            let closed = self.cluster.is_closed();
            if closed && self.pending.is_empty() {
                break;
            }
            // Polled without the lock: who is answered may well append again.
            let Some(producer) = read(&self.producer).clone() else {
                break;
            };
            producer.poll(TICK);
            self.pending.expire(ANSWER_WITHIN);
            if producer.client().fatal_error().is_some() && !closed {
                self.replace_producer();
            }
        }
        let last = write(&self.producer).take();
        // As it is dropped, it answers for what came in at the last moment; what it forgets, we answer.
        drop(last);
        self.pending.expire(Duration::ZERO);
    }

    fn replace_producer(&self) {
        match new_producer(&self.cluster.config, &self.pending) {
            Ok(fresh) => {
                tracing::error!("the Kafka producer failed for good and was replaced");
                let old = write(&self.producer).replace(Arc::new(fresh));
                // As it is dropped, it answers for what it still held.
                drop(old);
            }
            Err(error) => tracing::error!(%error, "cannot make a new Kafka producer; trying again"),
        }
    }

    /// Until closed: watches the brokers' health and commits how far we have read.
    fn run_monitor(&self) {
        let Ok(client) = self.cluster.client() else { return };
        let mut asked = Instant::now();
        while !self.cluster.is_closed() {
            // An error here is often the first sign of an outage, so the brokers are asked at once.
            let alarmed = matches!(client.poll(Duration::from_millis(100)), Some(Err(_)));
            if alarmed || asked.elapsed() >= PROBE_EVERY {
                self.set_outage(self.probe(&client));
                self.commit(&client);
                asked = Instant::now();
            }
        }
        self.commit(&client);
        self.cluster.release_client();

        // A consumer is gone only after its last commit is answered, which without a broker takes minutes. The commit
        // gets its chance; nobody waits longer for it.
        let (sender, gone) = mpsc::sync_channel(1);
        let end = move || {
            drop(client);
            sender.send(())
        };
        if thread::Builder::new().name("weft-kafka-end".to_owned()).spawn(end).is_ok() {
            // Sent or not, this is all the time it gets.
            gone.recv_timeout(PROBE).unwrap_or_default();
        }
    }

    fn probe(&self, client: &BaseConsumer<Quiet>) -> Option<Outage> {
        let before = self.pending.delivered();
        let mut refuse = [false; Topic::ALL.len()];
        let mut faults = Vec::new();
        for topic in Topic::ALL {
            let name = self.cluster.topics.name(topic);
            match client.fetch_metadata(Some(name), PROBE) {
                Ok(metadata) => {
                    let fault = metadata.topics().first().and_then(|found| self.topic_fault(found));
                    if let Some((why, refused)) = fault {
                        faults.push(format!("topic {name}: {why}"));
                        refuse[topic as usize] = refused;
                    }
                }
                // Records were acknowledged meanwhile: the brokers are busy, not away.
                Err(_) if self.pending.delivered() > before => return None,
                Err(error) => {
                    let brokers = &self.cluster.config.brokers;
                    let why = format!("no Kafka broker answers at {brokers} ({error})");
                    return Some(Outage { why, refuse: [true; Topic::ALL.len()] });
                }
            }
        }
        (!faults.is_empty()).then(|| Outage { why: faults.join("; "), refuse })
    }

    /// What is wrong with a topic, and whether it must take no records while it is.
    fn topic_fault(&self, topic: &MetadataTopic) -> Option<(String, bool)> {
        if let Some(e) = topic.error() {
            return Some((format!("it cannot be used ({})", RDKafkaErrorCode::from(e)), true));
        }
        let (found, configured) = (topic.partitions().len() as u32, self.cluster.config.partitions);
        if found != configured {
            // Somebody added partitions: keys would get into others than their history, where nobody reads them.
            return Some((LogError::PartitionMismatch { found, configured }.to_string(), true));
        }
        let orphan = topic.partitions().iter().find(|p| p.leader() < 0)?;
        Some((format!("partition {} has no leader", orphan.id()), false))
    }

    fn set_outage(&self, now: Option<Outage>) {
        let before = self.outage.load();
        match (&*before, &now) {
            (None, Some(outage)) => tracing::warn!(why = outage.why, "the log is not available"),
            (Some(_), None) => tracing::info!("the log is available again"),
            _ => {}
        }
        self.outage.store(now.map(Arc::new));
    }

    fn commit(&self, client: &BaseConsumer<Quiet>) {
        let Some(positions) = lock(&self.progress).take() else {
            return;
        };
        let list = self.cluster.topics.assignment(&positions);
        if let Err(error) = list.and_then(|list| client.commit(&list, CommitMode::Async)) {
            tracing::debug!(%error, "the group's positions were not committed");
        }
    }
}

// A panic elsewhere leaves these data whole: every change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
