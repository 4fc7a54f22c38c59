//! Reading: from positions of our own, record by record. Foreign records are returned as such and reading continues.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};

use super::client::Callbacks;
use super::cluster::Cluster;
use super::headers;
use super::marker::{self, Markers};
use super::topics::{Topics, position};
use super::watch::Watch;
use crate::log::{
    Checkpoint, Entry, Foreign, Identity, LogError, MISPLACED, Position, Positions, READ_BYTES, Reader, Record, Topic,
};

pub(super) struct KafkaReader {
    cluster: Arc<Cluster>,
    consumer: BaseConsumer<Callbacks>,
    /// The log that the positions belong to, and its generation.
    identity: Arc<Identity>,
    at: Positions,
    handles: TopicHandles,
    /// Why the consumer stopped where it was. It never continues by itself then, lest it continues elsewhere.
    lost: Option<KafkaError>,
    watch: Watch,
    /// The epoch of a later generation. What follows it is not read.
    ended_by: Option<String>,
    /// A record that it does not get past, and the version of its rules.
    newer: Option<(Position, u64)>,
}

impl Reader for KafkaReader {
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError> {
        if self.cluster.is_closed() {
            return Err(LogError::Unavailable("closed".to_owned()));
        }
        self.check_newer()?;
        self.check_generation()?;
        if self.lost.is_some() || self.is_left_behind() {
            self.resume()?;
        }

        let until = Instant::now() + wait;
        let mut entries = Vec::with_capacity(max.min(1024));
        let mut bytes = 0;
        while entries.len() < max && bytes < READ_BYTES {
            let patience =
                if entries.is_empty() { until.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            match self.consumer.poll(patience) {
                None => {
                    self.watch.ran_dry();
                    break;
                }
                Some(Ok(message)) => {
                    let topics = &self.cluster.topics;
                    let Some(topic) = self.handles.topic(topics, &message) else {
                        continue;
                    };
                    let Some(at) = position(topic, message.partition(), message.offset(), topics.each) else {
                        continue;
                    };
                    if let Some(version) = headers::newer_rules(&message) {
                        self.newer = Some((at, version));
                        break;
                    }
                    // Markers are in the first partition of the events, which is the first of all.
                    let marker =
                        if at.partition == 0 { marker::read(&message).map(|marker| marker.identity) } else { None };
                    if let Some(marker) = &marker
                        && marker.generation > self.identity.generation
                    {
                        self.ended_by = Some(marker.epoch());
                        break;
                    }
                    if let Some(next) = self.at.get_mut(at.partition as usize) {
                        *next = at.offset + 1;
                    }
                    if marker.is_none() {
                        bytes += message.payload_len();
                        entries.push(Entry { at, record: decode(topics, topic, at.partition, &message) });
                    }
                }
                Some(Err(error)) if stops_reading(&error) => {
                    self.lost = Some(error);
                    break;
                }
                // An outage: the consumer connects again and continues where it was.
                Some(Err(error)) => tracing::debug!(%error, "reading from Kafka"),
            }
        }

        if entries.is_empty() {
            self.check_newer()?;
            self.check_generation()?;
            if let Some(error) = &self.lost {
                return Err(self.explain(error));
            }
            self.step_over_holes();
        }
        Ok(entries)
    }

    fn positions(&self) -> &Positions {
        &self.at
    }
}

impl KafkaReader {
    pub(super) fn open(cluster: Arc<Cluster>, identity: Arc<Identity>, from: &[u64]) -> Result<KafkaReader, LogError> {
        let consumer = new_consumer(&cluster, from)?;
        let (at, handles) = (from.to_vec(), TopicHandles::default());
        let (lost, watch) = (None, Watch::default());
        Ok(KafkaReader { cluster, consumer, identity, at, handles, lost, watch, newer: None, ended_by: None })
    }

    fn check_newer(&self) -> Result<(), LogError> {
        match self.newer {
            Some((at, version)) => Err(LogError::NewerRules { at, version }),
            None => Ok(()),
        }
    }

    fn check_generation(&self) -> Result<(), LogError> {
        match &self.ended_by {
            Some(epoch) => Err(LogError::OtherGeneration(format!("{epoch} follows {}", self.identity.epoch()))),
            None => Ok(()),
        }
    }

    /// Other programs' transactions leave records that only Kafka sees. One at the very end would keep a reader that has
    /// read all from ever being at the end. What compaction deletes is always followed by a record, since it leaves the
    /// newest segment alone.
    fn step_over_holes(&mut self) {
        let Ok(list) = self.consumer.position() else { return };
        let topics = &self.cluster.topics;
        for element in list.elements() {
            if let Some(offset) = element.offset().to_raw()
                && let Some(topic) = topics.named(element.topic())
                && let Some(next) = position(topic, element.partition(), offset, topics.each)
                && let Some(at) = self.at.get_mut(next.partition as usize)
            {
                *at = next.offset.max(*at);
            }
        }
    }

    /// Whether the consumer does not fetch any more what is there.
    fn is_left_behind(&mut self) -> bool {
        let cluster = self.cluster.clone();
        let look = cluster.last_look();
        if !self.watch.is_new(&look) {
            return false;
        }
        self.step_over_holes();
        let Some(at) = self.watch.left_behind(&look, &self.at) else { return false };
        let (topic, partition) = cluster.topics.topic_of(at.partition);
        let (topic, offset) = (cluster.topics.name(topic), at.offset);
        tracing::warn!(
            topic,
            partition,
            offset,
            "Kafka's client does not read on, though there is more: beginning anew"
        );
        true
    }

    /// A new consumer at the old positions, if these still exist.
    fn resume(&mut self) -> Result<(), LogError> {
        let cluster = &self.cluster;
        let events = cluster.topics.name(Topic::Events);
        let client = cluster.client()?;
        let found = Markers { connection: &cluster.connection, client: &client, topic: events }.first()?;
        // A marker that was deleted says nothing; another one does.
        if found.is_some_and(|found| found.id != self.identity.id) {
            return Err(LogError::Damaged(format!("{events} is no longer the topic it was: start again")));
        }
        cluster.check(&self.at)?;
        self.consumer = new_consumer(cluster, &self.at)?;
        self.handles = TopicHandles::default();
        self.lost = None;
        Ok(())
    }

    fn explain(&self, error: &KafkaError) -> LogError {
        use RDKafkaErrorCode as Code;
        match (self.cluster.check(&self.at), error.rdkafka_error_code()) {
            (Err(outside), _) => outside,
            (Ok(()), Some(Code::BadMessage | Code::InvalidMessage)) => LogError::Damaged(error.to_string()),
            (Ok(()), _) => LogError::Unavailable(error.to_string()),
        }
    }
}

/// The record, if it is Weft's and in its key's partition: a thread in two partitions would have no order. What nodes write
/// about a partition stands in that one.
fn decode(topics: &Topics, topic: Topic, partition: u32, message: &BorrowedMessage<'_>) -> Result<Record, Foreign> {
    let is_misplaced = |key: &[u8]| topics.partition_for(topic, key) != partition;
    let record = headers::decode(topic, message).map_err(|mut foreign| {
        if let Some(plain) = &mut foreign.plain {
            plain.misplaced = foreign.key.as_deref().is_some_and(is_misplaced);
        }
        foreign
    })?;
    if !is_misplaced(record.key.as_bytes()) || Checkpoint::is(&record) {
        return Ok(record);
    }
    let why = MISPLACED.to_owned();
    Err(Foreign { at: headers::time_of(message), ..Foreign::new(why, &record) })
}

/// Where librdkafka keeps each topic of one consumer, as soon as a message came from it: comparing these is faster than
/// comparing names. An assigned topic stays where it is.
#[derive(Default)]
struct TopicHandles([usize; Topic::ALL.len()]);

impl TopicHandles {
    fn topic(&mut self, topics: &Topics, message: &BorrowedMessage<'_>) -> Option<Topic> {
        let handle = message.topic_ptr().addr();
        if let Some(topic) = Topic::ALL.into_iter().find(|topic| self.0[*topic as usize] == handle) {
            return Some(topic);
        }
        let topic = topics.named(message.topic())?;
        self.0[topic as usize] = handle;
        Some(topic)
    }
}

/// Whether the consumer stops after this error, or skipped something that it could not read.
fn stops_reading(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(error, KafkaError::MessageConsumptionFatal(_))
        || matches!(
            error.rdkafka_error_code(),
            Some(
                Code::AutoOffsetReset
                    | Code::OffsetOutOfRange
                    | Code::BadMessage
                    | Code::InvalidMessage
                    | Code::UnknownTopic
                    | Code::UnknownTopicOrPartition
                    | Code::UnknownPartition
                    | Code::TopicAuthorizationFailed
            )
        )
}

fn new_consumer(cluster: &Cluster, from: &[u64]) -> Result<BaseConsumer<Callbacks>, LogError> {
    let open = || {
        let consumer: BaseConsumer<Callbacks> =
            cluster.connection.consumer().create_with_context(cluster.connection.callbacks())?;
        consumer.assign(&cluster.topics.assignment(from)?)?;
        Ok(consumer)
    };
    open().map_err(|error| cluster.connection.unavailable(&error))
}
