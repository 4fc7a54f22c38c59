//! The log on Kafka: several nodes, one order, and durability by replication.
//!
//! Two threads belong to a log. `weft-kafka-out` owns the producer: it brings every record's answer, in time even if Kafka
//! brings none, and replaces a producer that failed for good. `weft-kafka-care` asks the brokers once a second how they
//! are, and commits how far we have read, for Kafka's own tools. Readers are consumers of their own that are told where
//! to read: the place is ours, never the group's. One producer writes to all three topics, and one consumer reads them.

mod reading;
mod setup;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use metrics::Histogram;
use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, Message, OwnedHeaders};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};

use super::kafka::reading::{KafkaReader, assignment, watermarks};
use super::kafka::setup::{Topics, ensure_topics, first_epoch, write_marker};
use super::{
    Append, AppendError, Bounds, Done, Log, LogError, Position, Positions, RECORD_VERSION, Reader, Record, Topic,
};
use crate::telemetry;

/// When Kafka has not answered for a record by then, we do; [`Log::append`] promises 5 seconds.
const ANSWER_WITHIN: Duration = Duration::from_millis(4500);
/// How often the producer's thread looks for records without an answer.
const TICK: Duration = Duration::from_millis(50);
/// How long a question to the brokers may take.
const ASK: Duration = Duration::from_secs(5);
/// How long the care thread waits for a sign of life, and how long it leaves the brokers alone after one.
const PROBE: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub struct KafkaConfig {
    /// `host:port`, several with commas between them.
    pub brokers: String,
    /// Of each topic.
    pub partitions: u32,
    /// What the topics' names begin with: `weft.` makes `weft.events`, `weft.receipts` and `weft.dead-letters`.
    pub topic_prefix: String,
    /// The consumer group under which Kafka's tools show how far this node has read.
    pub group: String,
}

pub struct KafkaLog {
    shared: Arc<Shared>,
    epoch: String,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    config: KafkaConfig,
    topics: Topics,
    closed: AtomicBool,
    /// None after the end.
    producer: RwLock<Option<Arc<BaseProducer<Producing>>>>,
    pending: Arc<Pending>,
    /// For questions and commits; never reads. None after the end.
    side: Mutex<Option<Arc<BaseConsumer<Quiet>>>>,
    trouble: ArcSwapOption<Trouble>,
    progress: Mutex<Option<Positions>>,
}

/// What is wrong with the brokers, as the care thread found it.
struct Trouble {
    why: String,
    /// For each topic, whether appends are refused at once. Without a leader for one partition the others still take
    /// records, and so do the other topics.
    refuse: [bool; Topic::ALL.len()],
}

impl KafkaLog {
    /// Connects, creates what is missing, and finds out which log this is. Blocks while it does.
    pub fn open(config: KafkaConfig) -> Result<KafkaLog, LogError> {
        let side: BaseConsumer<Quiet> = consumer_config(&config).create_with_context(Quiet).map_err(unavailable)?;
        let topics = Topics::new(&config);
        ensure_topics(&config, &topics, &side)?;

        let pending = Arc::new(Pending::default());
        let producer = new_producer(&config, &pending).map_err(unavailable)?;
        let events = topics.name(Topic::Events);
        let epoch = match first_epoch(&config, events, &side)? {
            Some(epoch) => epoch,
            None => {
                write_marker(&producer, &pending, events)?;
                // Another node may have written one just before ours: whichever stands first counts, for both.
                first_epoch(&config, events, &side)?
                    .ok_or_else(|| LogError::Damaged(format!("{events} does not give back the record that names it")))?
            }
        };

        let shared = Arc::new(Shared {
            config,
            topics,
            closed: AtomicBool::new(false),
            producer: RwLock::new(Some(Arc::new(producer))),
            pending,
            side: Mutex::new(Some(Arc::new(side))),
            trouble: ArcSwapOption::empty(),
            progress: Mutex::new(None),
        });
        let log = KafkaLog { shared, epoch, threads: Mutex::new(Vec::new()) };
        log.spawn("weft-kafka-out", Shared::run_out)?;
        log.spawn("weft-kafka-care", Shared::run_care)?;
        Ok(log)
    }

    fn spawn(&self, name: &str, run: fn(&Shared)) -> Result<(), LogError> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&shared))
            .map_err(|e| LogError::Unavailable(format!("no thread for it: {e}")))?;
        lock(&self.threads).push(thread);
        Ok(())
    }
}

impl Log for KafkaLog {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    fn partitions(&self) -> u32 {
        self.shared.topics.partitions()
    }

    fn topic_name(&self, topic: Topic) -> String {
        self.shared.topics.name(topic).to_owned()
    }

    fn append(&self, batch: Vec<Append>) {
        self.shared.append(batch);
    }

    fn reader(&self, from: &[u64]) -> Result<Box<dyn Reader>, LogError> {
        let partitions = self.partitions();
        if from.len() != partitions as usize {
            return Err(LogError::PartitionMismatch { found: partitions, configured: from.len() as u32 });
        }
        self.shared.check(from)?;
        Ok(Box::new(KafkaReader::open(self.shared.clone(), &self.epoch, from)?))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        self.shared.bounds()
    }

    fn committed(&self, positions: &[u64]) {
        *lock(&self.shared.progress) = Some(positions.to_vec());
    }

    fn health(&self) -> Result<(), String> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err("closed".to_owned());
        }
        match &*self.shared.trouble.load() {
            Some(trouble) => Err(trouble.why.clone()),
            None => Ok(()),
        }
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        // An append that did not see it yet holds this lock; afterwards nothing new comes in.
        drop(write(&self.shared.producer));
        for thread in lock(&self.threads).drain(..) {
            // The last handle may be dropped by somebody who was just answered, on that very thread.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the Kafka log panicked");
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
    fn append(&self, batch: Vec<Append>) {
        let producer = read(&self.producer);
        let usable = match &*producer {
            Some(usable) if !self.closed.load(Ordering::Acquire) => usable,
            _ => {
                drop(producer);
                let error = AppendError::Unavailable("closed".to_owned());
                return batch.into_iter().for_each(|append| (append.done)(Err(error.clone())));
            }
        };

        let trouble = self.trouble.load();
        let send = |record: &Record, id| match &*trouble {
            Some(trouble) if trouble.refuse[record.topic as usize] => {
                Err(AppendError::Unavailable(trouble.why.clone()))
            }
            _ => send(usable, self.topics.name(record.topic), None, record, id),
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
        // Not under the lock: the one who waits may well append again.
        drop(producer);
        refused.into_iter().for_each(|(done, error)| done(Err(error)));
    }

    /// Until closed and all is answered: brings answers, and a new producer when the old one failed for good.
    fn run_out(&self) {
        loop {
            let closed = self.closed.load(Ordering::Acquire);
            if closed && self.pending.is_empty() {
                break;
            }
            // Polled without the lock: the one who gets an answer may well append again.
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
        // Going down, it answers for what came in at the last moment; what it forgets, we answer.
        drop(last);
        self.pending.expire(Duration::ZERO);
    }

    fn replace_producer(&self) {
        match new_producer(&self.config, &self.pending) {
            Ok(fresh) => {
                tracing::error!("the Kafka producer failed for good and was replaced");
                let old = write(&self.producer).replace(Arc::new(fresh));
                // Going down, it answers for what it still held.
                drop(old);
            }
            Err(error) => tracing::error!(%error, "no new Kafka producer, trying on"),
        }
    }

    /// Until closed: looks after the brokers' health and commits how far we have read.
    fn run_care(&self) {
        let Ok(side) = self.side() else { return };
        let mut asked = Instant::now();
        while !self.closed.load(Ordering::Acquire) {
            // An error here is often the first sign of an outage, so the brokers are asked at once.
            let alarmed = matches!(side.poll(Duration::from_millis(100)), Some(Err(_)));
            if alarmed || asked.elapsed() >= PROBE_EVERY {
                self.set_trouble(self.probe(&side));
                self.commit(&side);
                asked = Instant::now();
            }
        }
        self.commit(&side);
        *lock(&self.side) = None;
        // A consumer goes down only after its last commit is answered, which without a broker takes minutes. The commit
        // gets its chance; nobody waits longer for it.
        let (sender, gone) = mpsc::sync_channel(1);
        let down = move || {
            drop(side);
            sender.send(())
        };
        if thread::Builder::new().name("weft-kafka-end".to_owned()).spawn(down).is_ok() {
            // Sent or not, this is all the time it gets.
            gone.recv_timeout(PROBE).unwrap_or_default();
        }
    }

    fn probe(&self, side: &BaseConsumer<Quiet>) -> Option<Trouble> {
        let before = self.pending.delivered.load(Ordering::Relaxed);
        let mut refuse = [false; Topic::ALL.len()];
        let mut found = Vec::new();
        for topic in Topic::ALL {
            let name = self.topics.name(topic);
            match side.fetch_metadata(Some(name), PROBE) {
                Ok(metadata) => {
                    if let Some((why, refused)) = metadata.topics().first().and_then(|found| self.look_at(found)) {
                        found.push(format!("topic {name}: {why}"));
                        refuse[topic as usize] = refused;
                    }
                }
                // Records were acknowledged meanwhile: the brokers are busy, not away.
                Err(_) if self.pending.delivered.load(Ordering::Relaxed) > before => return None,
                Err(e) => {
                    let why = format!("no Kafka broker answers ({e})");
                    return Some(Trouble { why, refuse: [true; Topic::ALL.len()] });
                }
            }
        }
        (!found.is_empty()).then(|| Trouble { why: found.join("; "), refuse })
    }

    /// What is wrong with a topic, and whether it must take no records while it is.
    fn look_at(&self, topic: &MetadataTopic) -> Option<(String, bool)> {
        if let Some(e) = topic.error() {
            return Some((format!("it cannot be used ({})", RDKafkaErrorCode::from(e)), true));
        }
        let (found, configured) = (topic.partitions().len() as u32, self.config.partitions);
        if found != configured {
            // Somebody added partitions: keys would land elsewhere than their history, where nobody reads them.
            return Some((LogError::PartitionMismatch { found, configured }.to_string(), true));
        }
        let orphan = topic.partitions().iter().find(|p| p.leader() < 0)?;
        Some((format!("partition {} has no leader", orphan.id()), false))
    }

    fn set_trouble(&self, now: Option<Trouble>) {
        let before = self.trouble.load();
        match (&*before, &now) {
            (None, Some(trouble)) => tracing::warn!(why = trouble.why, "the log is in trouble"),
            (Some(_), None) => tracing::info!("the log is well again"),
            _ => {}
        }
        self.trouble.store(now.map(Arc::new));
    }

    fn commit(&self, side: &BaseConsumer<Quiet>) {
        let Some(positions) = lock(&self.progress).take() else {
            return;
        };
        let result = assignment(&self.topics, &positions).and_then(|list| side.commit(&list, CommitMode::Async));
        if let Err(error) = result {
            tracing::debug!(%error, "the group's positions were not committed");
        }
    }

    fn side(&self) -> Result<Arc<BaseConsumer<Quiet>>, LogError> {
        lock(&self.side).clone().ok_or_else(|| LogError::Unavailable("closed".to_owned()))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        let side = self.side()?;
        (0..self.topics.partitions())
            .map(|partition| {
                let (topic, within) = self.topics.place(partition);
                watermarks(&side, self.topics.name(topic), within)
            })
            .collect()
    }

    /// Whether every position is one that the log holds, or its end.
    fn check(&self, positions: &[u64]) -> Result<(), LogError> {
        for ((partition, bounds), &offset) in (0..).zip(self.bounds()?).zip(positions) {
            if !(bounds.start..=bounds.end).contains(&offset) {
                return Err(LogError::OutOfRange { at: Position { partition, offset }, bounds });
            }
        }
        Ok(())
    }
}

/// The records without an answer yet. Ids only grow, so they are a queue with an offset; a slot is empty once its record
/// is answered.
#[derive(Default)]
struct Pending {
    queue: Mutex<PendingQueue>,
    delivered: AtomicU64,
}

#[derive(Default)]
struct PendingQueue {
    /// The id of the first slot.
    first: u64,
    slots: VecDeque<Option<Waiting>>,
}

struct Waiting {
    topic: Topic,
    since: Instant,
    done: Done,
}

impl Pending {
    /// Returns the first one's id; the others follow it.
    fn add(&self, waiting: impl Iterator<Item = (Topic, Done)>) -> u64 {
        let since = Instant::now();
        let mut queue = lock(&self.queue);
        let id = queue.first + queue.slots.len() as u64;
        queue.slots.extend(waiting.map(|(topic, done)| Some(Waiting { topic, since, done })));
        id
    }

    /// Whoever takes it answers it. None if it was answered already.
    fn take(&self, id: u64) -> Option<Waiting> {
        let mut queue = lock(&self.queue);
        let slot = usize::try_from(id.checked_sub(queue.first)?).ok()?;
        let waiting = queue.slots.get_mut(slot)?.take();
        while queue.slots.pop_front_if(|slot| slot.is_none()).is_some() {
            queue.first += 1;
        }
        waiting
    }

    fn expire(&self, age: Duration) {
        let old = |slot: &mut Option<Waiting>| slot.as_ref().is_none_or(|waiting| waiting.since.elapsed() >= age);
        let mut late = Vec::new();
        let mut queue = lock(&self.queue);
        while let Some(slot) = queue.slots.pop_front_if(old) {
            queue.first += 1;
            late.extend(slot);
        }
        drop(queue);
        for waiting in late {
            (waiting.done)(Err(AppendError::Unknown("Kafka did not answer".to_owned())));
        }
    }

    fn is_empty(&self) -> bool {
        lock(&self.queue).slots.is_empty()
    }
}

/// What the producer calls back.
struct Producing {
    pending: Arc<Pending>,
    /// How many partitions each topic has.
    each: u32,
    append_seconds: Histogram,
}

impl ProducerContext for Producing {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, id: usize) {
        if result.is_ok() {
            self.pending.delivered.fetch_add(1, Ordering::Relaxed);
        }
        let Some(waiting) = self.pending.take(id as u64) else { return };
        let answer = match result {
            // No place: a retry that Kafka recognised after it had forgotten where the first try went, or a partition
            // that was added behind our back.
            Ok(message) => position(waiting.topic, message.partition(), message.offset(), self.each)
                .ok_or_else(|| AppendError::Unknown("written, but not to a place that is ours".to_owned())),
            Err((error, _)) => Err(undelivered(error)),
        };
        if answer.is_ok() {
            self.append_seconds.record(waiting.since.elapsed());
        }
        (waiting.done)(answer);
    }
}

impl ClientContext for Producing {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        Quiet.log(level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

/// Why a record was not acknowledged: only what Kafka refuses by its nature is certain never to appear.
fn undelivered(error: &KafkaError) -> AppendError {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(Code::QueueFull) => AppendError::QueueFull,
        Some(
            Code::MessageSizeTooLarge
            | Code::TopicAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::PolicyViolation,
        ) => AppendError::Unavailable(error.to_string()),
        _ => AppendError::Unknown(error.to_string()),
    }
}

fn new_producer(config: &KafkaConfig, pending: &Arc<Pending>) -> Result<BaseProducer<Producing>, KafkaError> {
    client_config(config)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // Batches form by themselves behind requests in flight; lingering only adds its millisecond to every publish.
        .set("linger.ms", "0")
        .set("compression.type", "lz4")
        // The partition that Kafka's own clients choose, so that other writers and readers agree with us.
        .set("partitioner", "murmur2_random")
        .set("message.timeout.ms", ANSWER_WITHIN.as_millis().to_string())
        .set("queue.buffering.max.messages", "100000")
        .set("queue.buffering.max.kbytes", "131072")
        .create_with_context(Producing {
            pending: pending.clone(),
            each: config.partitions,
            append_seconds: telemetry::append_seconds(),
        })
}

fn send(
    producer: &BaseProducer<Producing>,
    topic: &str,
    partition: Option<i32>,
    record: &Record,
    id: u64,
) -> Result<(), AppendError> {
    let header = |key, value| Header { key, value: Some(value) };
    let version = RECORD_VERSION.to_string();
    let mut headers = OwnedHeaders::new_with_capacity(4)
        .insert(header("weft-kind", record.kind.as_str()))
        .insert(header("weft-version", version.as_str()))
        .insert(header("weft-grant", record.grant.as_str()));
    if let Some(traceparent) = &record.traceparent {
        headers = headers.insert(header("traceparent", traceparent.as_str()));
    }
    let mut out = BaseRecord::with_opaque_to(topic, id as usize)
        .key(record.key.as_str())
        .payload(&record.value[..])
        .headers(headers);
    out.partition = partition;
    producer.send(out).map_err(|(error, _)| match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => AppendError::QueueFull,
        // Not taken at all, whatever the reason.
        _ => AppendError::Unavailable(error.to_string()),
    })
}

/// Where a record of a topic stands. None for the negative numbers with which librdkafka says that it does not know, and
/// for a partition beyond the `each` of the topic: its number would be another topic's.
fn position(topic: Topic, within: i32, offset: i64, each: u32) -> Option<Position> {
    let within = u32::try_from(within).ok().filter(|within| *within < each)?;
    Some(Position { partition: topic.partition(within, each), offset: offset.try_into().ok()? })
}

/// librdkafka's own log and errors. Outages are told once, by the care thread, not once a try.
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
                tracing::error!(facility, "{text}")
            }
            _ => tracing::debug!(facility, "{text}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
    }
}

impl ConsumerContext for Quiet {}

fn client_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &config.brokers)
        .set("client.id", "weft")
        // Back soon after the brokers are, and away from one that went silent.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.timeout.ms", "10000")
        .set("socket.keepalive.enable", "true")
        .set_log_level(RDKafkaLogLevel::Warning);
    client
}

fn consumer_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = client_config(config);
    client
        .set("group.id", &config.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true");
    client
}

fn unavailable(error: KafkaError) -> LogError {
    LogError::Unavailable(error.to_string())
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
