//! Markers: the records in partition 0 of the events that say which log this is. They have the key `weft`.
//!
//! The first one, `log_created`, gives the id. Each `log_generation` begins another generation, if its number is higher
//! than those before it, and gives the id as well: when records were deleted, the first marker may be among them. A node
//! reads the partition to its end to know the generation; where its projections have read the beginning already, it goes
//! on from there.

use std::sync::mpsc;
use std::time::Instant;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::producer::BaseProducer;
use rdkafka::{Offset, TopicPartitionList};
use serde::Serialize;

use super::client::{ASK, KafkaConfig, QueryClient, Quiet, TICK, consumer_config, watermarks};
use super::headers;
use super::producer::{ANSWER_WITHIN, Pending, Producing, send};
use crate::clock;
use crate::log::checkpoint::LOG_KEY;
use crate::log::{Cause, Done, Grant, Identity, LogError, Record, Topic};
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

/// What a marker says: the identity from there on.
pub(super) fn read(message: &BorrowedMessage<'_>) -> Option<Identity> {
    if !is_marker(message) {
        return None;
    }
    let (kind, value) = (headers::kind_of(message)?, message.payload()?);
    if kind == CREATED.as_bytes() {
        let created: LogCreatedRecord = serde_json::from_slice(value).ok()?;
        return Some(Identity::new(created.epoch));
    }
    if kind == GENERATION.as_bytes() {
        let begun: LogGenerationRecord = serde_json::from_slice(value).ok()?;
        let identity = Identity::of_epoch(&begun.epoch);
        return (identity.generation == begun.generation).then_some(Identity { starts: begun.starts, ..identity });
    }
    None
}

/// Whether a record of the events is about the log itself.
fn is_marker(message: &BorrowedMessage<'_>) -> bool {
    message.key() == Some(LOG_KEY.as_bytes())
}

/// Partition 0 of the topic of events, to be looked through for markers.
pub(super) struct Markers<'a> {
    pub(super) config: &'a KafkaConfig,
    pub(super) client: &'a QueryClient,
    pub(super) topic: &'a str,
}

impl Markers<'_> {
    /// The first identity that the partition gives, if it gives one.
    pub(super) fn first(&self) -> Result<Option<Identity>, LogError> {
        let mut first = None;
        let start = watermarks(self.config, self.client, self.topic, 0)?.start;
        self.scan(start, |identity| {
            first = Some(identity);
            false
        })?;
        Ok(first)
    }

    /// The identity as of the partition's end, if the partition gives one.
    pub(super) fn current(&self, known: Option<&Known>) -> Result<Option<Identity>, LogError> {
        let bounds = watermarks(self.config, self.client, self.topic, 0)?;
        let known = known.filter(|known| (bounds.start..=bounds.end).contains(&known.offset));
        let mut current: Option<Identity> = None;
        self.scan(bounds.start, |identity| {
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
                self.scan(known.offset, |identity| {
                    advance(&mut current, identity);
                    true
                })?;
            }
        }
        Ok(current)
    }

    /// Reads markers from an offset on, to the partition's end or until `each` returns `false`.
    fn scan(&self, from: u64, mut each: impl FnMut(Identity) -> bool) -> Result<(), LogError> {
        let Markers { config, topic, .. } = *self;
        let consumer: BaseConsumer<Quiet> = consumer_config(config)
            .set("enable.partition.eof", "true")
            .create_with_context(Quiet)
            .map_err(|error| config.unavailable(&error))?;
        let mut list = TopicPartitionList::new();
        // Between offsets that Kafka gave, so it is an i64.
        list.add_partition_offset(topic, 0, Offset::Offset(from as i64))
            .and_then(|()| consumer.assign(&list))
            .map_err(|error| config.unavailable(&error))?;

        let mut until = Instant::now() + ASK;
        while Instant::now() < until {
            match consumer.poll(TICK) {
                Some(Ok(message)) => {
                    if read(&message).is_some_and(|identity| !each(identity)) {
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
        let brokers = &config.brokers;
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
pub(super) fn created(identity: &Identity) -> Record {
    let at = clock::rfc3339(clock::now_ms());
    record(CREATED, &LogCreatedRecord { kind: CREATED.to_owned(), epoch: identity.id.clone(), at })
}

/// The marker of a log's generation.
pub(super) fn generation(identity: &Identity, cause: Cause) -> Record {
    let begun = LogGenerationRecord {
        kind: GENERATION.to_owned(),
        epoch: identity.epoch(),
        generation: identity.generation,
        why: cause.as_str().to_owned(),
        starts: identity.starts.clone(),
        at: clock::rfc3339(clock::now_ms()),
    };
    record(GENERATION, &begun)
}

fn record(kind: &str, value: &impl Serialize) -> Record {
    Record {
        topic: Topic::Events,
        key: LOG_KEY.to_owned(),
        kind: kind.to_owned(),
        grant: Grant::Scope,
        traceparent: None,
        value: json::encode_bytes(value).into(),
    }
}

/// Writes a marker into partition 0 of the topic; returns once it is durable.
pub(super) fn write(
    producer: &BaseProducer<Producing>,
    pending: &Pending,
    topic: &str,
    record: &Record,
) -> Result<(), LogError> {
    let (answer, answered) = mpsc::sync_channel(1);
    let done: Done = Box::new(move |result| drop(answer.send(result)));
    let id = pending.add(std::iter::once((Topic::Events, done)));
    send(producer, topic, Some(0), record, id).map_err(|e| LogError::Unavailable(e.to_string()))?;
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
