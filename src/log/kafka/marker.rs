//! Markers: the records in partition 0 of the events that say which log this is. They have the key `weft`.
//!
//! The first one, `log_created`, gives the id. Each `log_generation` begins another generation, if its number is higher
//! than those before it, and gives the id as well: when records were deleted, the first marker may be among them. A node
//! reads the partition to its end to know the generation; where its projections have read the beginning already, it goes
//! on from there. Both say how many partitions each topic has: more may be added by anybody.

use std::sync::mpsc;
use std::time::Instant;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::producer::BaseProducer;
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;

use super::client::{ASK, Callbacks, Connection, OffsetEdge, QueryClient, TICK, offsets};
use super::headers;
use super::producer::{ANSWER_WITHIN, PendingAppends, Producing, send};
use crate::clock;
use crate::log::checkpoint::LOG_KEY;
use crate::log::{Bounds, Cause, Done, Grant, Identity, LogError, RULES, Record, Topic};
use crate::protocol::json;
use crate::protocol::records::{LogCreatedRecord, LogGenerationRecord};

const CREATED: &str = "log_created";
const GENERATION: &str = "log_generation";

/// A generation that is known already, from what a node has projected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub identity: Identity,
    /// As of this offset of partition 0.
    pub offset: u64,
}

/// What a marker says.
pub(super) struct Marker {
    /// From there on.
    pub(super) identity: Identity,
    /// Of each topic; None in a log from before markers said it.
    pub(super) partitions: Option<u32>,
    /// The version of the rules that it was written under.
    pub(super) rules: u16,
}

/// None if it is no marker.
pub(super) fn read(message: &BorrowedMessage<'_>) -> Option<Marker> {
    if !is_marker(message) {
        return None;
    }
    let (kind, value) = (headers::kind_of(message)?, message.payload()?);
    let rules = headers::rules_of(message).unwrap_or(1);
    if kind == CREATED.as_bytes() {
        let created: LogCreatedRecord = serde_json::from_slice(value).ok()?;
        return Some(Marker { identity: Identity::new(created.epoch), partitions: created.partitions, rules });
    }
    if kind == GENERATION.as_bytes() {
        let begun: LogGenerationRecord = serde_json::from_slice(value).ok()?;
        let identity = Identity::of_epoch(&begun.epoch);
        let marker =
            Marker { rules, partitions: begun.partitions, identity: Identity { starts: begun.starts, ..identity } };
        return (marker.identity.generation == begun.generation).then_some(marker);
    }
    None
}

/// Whether a record of the events is about the log itself.
fn is_marker(message: &BorrowedMessage<'_>) -> bool {
    message.key() == Some(LOG_KEY.as_bytes())
}

/// Partition 0 of the topic of events, to be looked through for markers.
pub(super) struct Markers<'a> {
    pub(super) connection: &'a Connection,
    pub(super) client: &'a QueryClient,
    pub(super) topic: &'a str,
}

impl Markers<'_> {
    /// The first identity that the partition gives, if it gives one.
    pub(super) fn first(&self) -> Result<Option<Identity>, LogError> {
        Ok(self.first_marker()?.map(|marker| marker.identity))
    }

    /// How many partitions each topic has, if the first marker says it.
    pub(super) fn partitions(&self) -> Result<Option<u32>, LogError> {
        Ok(self.first_marker()?.and_then(|marker| marker.partitions))
    }

    pub(super) fn first_marker(&self) -> Result<Option<Marker>, LogError> {
        let mut first = None;
        self.scan(self.edge(OffsetEdge::Start)?, |marker| {
            first = Some(marker);
            false
        })?;
        Ok(first)
    }

    fn edge(&self, edge: OffsetEdge) -> Result<u64, LogError> {
        let found = offsets(self.connection, self.client, edge, [(self.topic, 0)])?;
        found.first().copied().ok_or_else(|| LogError::Unavailable("Kafka gave no answer".to_owned()))
    }

    /// The identity as of the partition's end, if the partition gives one.
    pub(super) fn current(&self, known: Option<&Known>) -> Result<Option<Identity>, LogError> {
        let bounds = Bounds { start: self.edge(OffsetEdge::Start)?, end: self.edge(OffsetEdge::End)? };
        let known = known.filter(|known| (bounds.start..=bounds.end).contains(&known.offset));
        let mut current: Option<Identity> = None;
        self.scan(bounds.start, |Marker { identity, .. }| {
            // What this log's projections have read need not be read again, beyond what says that they are this log's.
            let skip = known.is_some_and(|known| known.identity.id == identity.id);
            advance(&mut current, identity);
            !skip
        })?;
        if let (Some(found), Some(known)) = (&current, known)
            && found.id == known.identity.id
        {
            current = Some(known.identity.clone());
            if known.offset < bounds.end {
                self.scan(known.offset, |Marker { identity, .. }| {
                    advance(&mut current, identity);
                    true
                })?;
            }
        }
        Ok(current)
    }

    /// Reads markers from an offset on, to the partition's end or until `each` returns `false`.
    fn scan(&self, from: u64, mut each: impl FnMut(Marker) -> bool) -> Result<(), LogError> {
        let Markers { connection, topic, .. } = *self;
        let consumer: BaseConsumer<Callbacks> = connection
            .consumer()
            .set("enable.partition.eof", "true")
            .create_with_context(connection.callbacks())
            .map_err(|error| connection.unavailable(&error))?;
        let mut list = TopicPartitionList::new();
        // Between offsets that Kafka gave, so it is an i64.
        list.add_partition_offset(topic, 0, Offset::Offset(from as i64))
            .and_then(|()| consumer.assign(&list))
            .map_err(|error| connection.unavailable(&error))?;

        let mut until = Instant::now() + ASK;
        while Instant::now() < until {
            match consumer.poll(TICK) {
                Some(Ok(message)) => {
                    if read(&message).is_some_and(|marker| !each(marker)) {
                        return Ok(());
                    }
                    // As long as something comes, it is no outage.
                    until = Instant::now() + ASK;
                }
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
                Some(Err(error)) => tracing::debug!(%error, "looking for the log's identity"),
                None => {}
            }
        }
        let brokers = &connection.config.brokers;
        Err(LogError::Unavailable(format!("partition 0 of {topic} cannot be read from the brokers at {brokers}")))
    }
}

/// Of two nodes that create a log at once, or begin a generation, the first one in log order counts.
fn advance(current: &mut Option<Identity>, found: Identity) {
    match current {
        Some(known) if found.generation <= known.generation => {}
        _ => *current = Some(found),
    }
}

/// The marker of a new log.
pub(super) fn created(identity: &Identity, partitions: u32) -> Record {
    let created = LogCreatedRecord {
        kind: CREATED.to_owned(),
        epoch: identity.id.clone(),
        partitions: Some(partitions),
        at: clock::rfc3339(clock::now_ms()),
    };
    record(CREATED, &created)
}

/// The marker of a log's generation.
pub(super) fn generation(identity: &Identity, cause: Cause, partitions: u32) -> Record {
    let begun = LogGenerationRecord {
        kind: GENERATION.to_owned(),
        epoch: identity.epoch(),
        generation: identity.generation,
        why: cause.as_str().to_owned(),
        starts: identity.starts.clone(),
        partitions: Some(partitions),
        at: clock::rfc3339(clock::now_ms()),
    };
    record(GENERATION, &begun)
}

fn record(kind: &str, value: &impl Serialize) -> Record {
    Record {
        topic: Topic::Events,
        key: LOG_KEY.to_owned(),
        kind: kind.to_owned(),
        rules: RULES,
        grant: Grant::Scope,
        traceparent: None,
        value: json::encode_bytes(value).into(),
    }
}

/// Writes a marker into partition 0 of the topic; returns once it is durable.
pub(super) fn write(
    producer: &BaseProducer<Producing>,
    pending: &PendingAppends,
    topic: &str,
    record: &Record,
) -> Result<(), LogError> {
    let (answer, answered) = mpsc::sync_channel(1);
    let done: Done = Box::new(move |result| drop(answer.send(result)));
    let id = pending.add(std::iter::once((Topic::Events, done)));
    send(producer, topic, 0, record, id).map_err(|e| LogError::Unavailable(e.to_string()))?;
    loop {
        producer.poll(TICK);
        pending.expire(ANSWER_WITHIN);
        match answered.try_recv() {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(e)) => return Err(LogError::Unavailable(e.to_string())),
            Err(_) => {}
        }
    }
}
