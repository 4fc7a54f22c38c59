//! The log on Kafka: several nodes, one order, and durability by replication.
//!
//! Two threads belong to a log. `weft-kafka-producer` owns the producer: it answers for every record, in time even if
//! Kafka does not, and replaces a producer that failed for good. `weft-kafka-monitor` asks the brokers once a second how
//! they are, and commits how far we have read, for Kafka's own tools. Readers are consumers of their own; the positions
//! they read from are ours, never the group's. One producer writes to all three topics, and one consumer reads them.
//!
//! Files, each using only those before it: [`settings`] (what is passed on to librdkafka), [`client`] (connections),
//! [`admin`], [`topics`] (names and partitions), [`headers`] (a record as a message), [`watch`] (a reader that is left
//! behind), [`cluster`] (bounds), [`producer`], [`marker`] (the log's identity), [`keeping`] (what the topics' settings
//! mean), [`setup`] (topics are created and checked), [`reading`], [`monitor`]; [`examine`] for a log that no server has
//! open.

mod admin;
mod client;
mod cluster;
pub mod examine;
mod headers;
mod keeping;
mod marker;
mod monitor;
mod producer;
mod reading;
mod settings;
mod setup;
mod topics;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arc_swap::ArcSwap;
use rdkafka::producer::{BaseProducer, Producer};

pub use self::client::KafkaConfig;
use self::client::{Connection, QueryClient, TICK};
use self::cluster::Cluster;
pub use self::keeping::Finding;
use self::keeping::Findings;
pub use self::marker::Known;
use self::marker::Markers;
use self::producer::{ANSWER_WITHIN, PendingAppends, Producing, new_producer, send};
use self::reading::KafkaReader;
pub use self::settings::ClientSettings;
use self::setup::{check_partitions, ensure_topics, find_partitions};
use self::topics::Topics;
use super::{
    Append, AppendError, Bounds, Cause, Checkpoint, Identity, IfUnnamed, Log, LogError, Positions, Reader, Record,
    Topic,
};
use crate::panics;
use crate::partitioning::Partitioning;

pub struct KafkaLog {
    shared: Arc<Shared>,
    identity: ArcSwap<Identity>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The version of the rules that the log was made under.
    first_rules: u16,
}

struct Shared {
    cluster: Arc<Cluster>,
    /// None after the end.
    producer: RwLock<Option<Arc<BaseProducer<Producing>>>>,
    pending: Arc<PendingAppends>,
    /// How the brokers are, as the monitor found them.
    state: ArcSwap<State>,
    /// What was found when the topics were last looked at as a whole.
    findings: Mutex<Findings>,
    /// Where each partition began when the log was opened.
    begin: Positions,
    /// What the monitor commits next.
    progress: Mutex<Option<Positions>>,
}

/// How the brokers are.
#[derive(Default)]
struct State {
    /// Why the log cannot be relied on; none when it can.
    problems: Vec<String>,
    warnings: Vec<String>,
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
        let connection = Connection::new(config);
        let client: QueryClient = connection
            .consumer()
            .create_with_context(connection.callbacks())
            .map_err(|error| connection.unavailable(&error))?;
        let topics = Topics::new(&connection.config);
        let (shapes, findings) = ensure_topics(&connection, &topics, &client)?;
        let markers = Markers { connection: &connection, client: &client, topic: topics.name(Topic::Events) };
        let first = markers.first_marker()?;
        let (named, first_rules) = (first.as_ref().and_then(|it| it.partitions), first.map(|it| it.rules));
        check_partitions(&connection, &topics, &client, shapes, named)?;

        let pending = Arc::new(PendingAppends::default());
        let producer = new_producer(&connection, &pending).map_err(|error| connection.unavailable(&error))?;
        let cluster = Cluster::new(connection, topics, client);
        let begin = cluster.starts()?;
        let shared = Arc::new(Shared {
            cluster: Arc::new(cluster),
            producer: RwLock::new(Some(Arc::new(producer))),
            pending,
            state: ArcSwap::default(),
            findings: Mutex::new(findings),
            begin,
            progress: Mutex::new(None),
        });
        let identity = shared.identify(known, if_unnamed)?;
        let first_rules = match first_rules {
            Some(rules) => rules,
            None => shared.first_rules()?,
        };
        let identity = ArcSwap::from_pointee(identity);
        let log = KafkaLog { shared, identity, first_rules, threads: Mutex::new(Vec::new()) };
        log.spawn("weft-kafka-producer", Shared::run_producer)?;
        log.spawn("weft-kafka-monitor", Shared::run_monitor)?;
        Ok(log)
    }

    /// How many partitions each topic of the log has, if there is such a log.
    pub fn find_partitions(config: &KafkaConfig) -> Result<Option<u32>, LogError> {
        let connection = Connection::new(config.clone());
        let client: QueryClient = connection
            .consumer()
            .create_with_context(connection.callbacks())
            .map_err(|error| connection.unavailable(&error))?;
        let topics = Topics::new(&connection.config);
        let topic = topics.name(Topic::Events);
        let Some(found) = find_partitions(&connection, &client, topic)? else { return Ok(None) };
        // Somebody may have added some since.
        let named = Markers { connection: &connection, client: &client, topic }.partitions()?;
        Ok(Some(named.unwrap_or(found)))
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
        let current = self.shared.append_marker(&marker::generation(&next, cause, self.shared.cluster.topics.each))?;
        self.identity.store(Arc::new(current));
        Ok(())
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn first_rules(&self) -> u16 {
        self.first_rules
    }

    fn partitions(&self) -> u32 {
        self.shared.cluster.topics.partitions()
    }

    fn partitioning(&self) -> Partitioning {
        self.shared.cluster.topics.partitioning
    }

    fn topic_name(&self, topic: Topic) -> String {
        self.shared.cluster.topics.name(topic).to_owned()
    }

    fn has_other_writers(&self) -> bool {
        true
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
        let node = self.shared.cluster.connection.config.group.clone();
        let checkpoint = Checkpoint { epoch: self.epoch(), node, partition, offset, hash: *hash };
        // Without it others compare with the next one.
        let done = Box::new(|result| tracing::debug!(?result, "a checkpoint was written"));
        self.shared.append_to(Some(partition), vec![Append { record: checkpoint.record(), done }]);
    }

    fn ends(&self) -> Result<Positions, LogError> {
        self.shared.cluster.ends()
    }

    fn end(&self, partition: u32) -> Result<u64, LogError> {
        self.shared.cluster.end(partition)
    }

    fn committed(&self, positions: &[u64]) {
        *lock(&self.shared.progress) = Some(positions.to_vec());
    }

    fn health(&self) -> Result<(), String> {
        if self.shared.cluster.is_closed() {
            return Err("closed".to_owned());
        }
        let state = self.shared.state.load();
        if state.problems.is_empty() { Ok(()) } else { Err(state.problems.join("; ")) }
    }

    fn warnings(&self) -> Vec<String> {
        self.shared.state.load().warnings.clone()
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
    /// The version of the rules that a log was made under which had no marker before: another node may have made it.
    fn first_rules(&self) -> Result<u16, LogError> {
        let (cluster, client) = (&self.cluster, self.cluster.client()?);
        let markers =
            Markers { connection: &cluster.connection, client: &client, topic: cluster.topics.name(Topic::Events) };
        Ok(markers.first_marker()?.map_or(1, |it| it.rules))
    }

    /// Which log this is. One that never held anything is named.
    fn identify(&self, known: Option<&Known>, if_unnamed: IfUnnamed<'_>) -> Result<Identity, LogError> {
        let Cluster { connection, topics, .. } = &*self.cluster;
        let events = topics.name(Topic::Events);
        // Asked before the marker is looked for: what another node writes meanwhile has a marker in front of it.
        let bounds = self.cluster.bounds()?;
        let client = self.cluster.client()?;
        if let Some(identity) = (Markers { connection, client: &client, topic: events }).current(known)? {
            return Ok(identity);
        }
        let starts = || bounds.iter().map(|bounds| bounds.start).collect();
        let held = (0..).zip(&bounds).find(|(_, bounds)| bounds.end > 0);
        let marker = match (held, if_unnamed) {
            (None, _) => marker::created(&Identity::random(), topics.each),
            (Some(_), IfUnnamed::Name(epoch)) => {
                let before = epoch.map_or_else(Identity::random, Identity::of_epoch);
                marker::generation(&before.next(Cause::Discarded, starts(), 0), Cause::Discarded, topics.each)
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
        let Cluster { connection, topics, .. } = &*self.cluster;
        let events = topics.name(Topic::Events);
        let Some(producer) = read(&self.producer).clone() else {
            return Err(LogError::Unavailable("closed".to_owned()));
        };
        marker::write(&producer, &self.pending, events, record)?;
        let client = self.cluster.client()?;
        let current = (Markers { connection, client: &client, topic: events }).current(None)?;
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

        let (state, topics) = (self.state.load(), &self.cluster.topics);
        let send = |record: &Record, id| {
            if state.refuse[record.topic as usize] {
                return Err(AppendError::Unavailable(state.problems.join("; ")));
            }
            let within = partition.unwrap_or_else(|| topics.within(record.key.as_bytes()));
            send(usable, topics.name(record.topic), within, record, id)
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
        match new_producer(&self.cluster.connection, &self.pending) {
            Ok(fresh) => {
                tracing::error!("the Kafka producer failed for good and was replaced");
                let old = write(&self.producer).replace(Arc::new(fresh));
                // As it is dropped, it answers for what it still held.
                drop(old);
            }
            Err(error) => tracing::error!(%error, "cannot make a new Kafka producer; trying again"),
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
