//! The marker: the record that names the log. The first of its kind in partition 0 of the events holds the epoch.

use std::sync::mpsc;
use std::time::Instant;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::producer::BaseProducer;
use rdkafka::{Offset, TopicPartitionList};

use super::client::{ASK, Edge, KafkaConfig, QueryClient, Quiet, TICK, consumer_config, offsets};
use super::headers;
use super::producer::{ANSWER_WITHIN, Pending, Producing, send};
use crate::clock;
use crate::log::{Done, Grant, LogError, Record, Topic};

const KIND: &str = "log_created";
const KEY: &str = "weft";

/// The epoch in the first marker of partition 0 of the topic (that of the events), if there is one.
pub(super) fn first_epoch(config: &KafkaConfig, topic: &str, client: &QueryClient) -> Result<Option<String>, LogError> {
    let start = offsets(config, client, Edge::Start, [(topic, 0)])?;
    let mut from = TopicPartitionList::new();
    let consumer: BaseConsumer<Quiet> = consumer_config(config)
        .set("enable.partition.eof", "true")
        .create_with_context(Quiet)
        .map_err(|error| config.unavailable(&error))?;
    // From an i64, so it is one.
    let start = start.first().map_or(Offset::Beginning, |start| Offset::Offset(*start as i64));
    from.add_partition_offset(topic, 0, start)
        .and_then(|()| consumer.assign(&from))
        .map_err(|error| config.unavailable(&error))?;

    let mut until = Instant::now() + ASK;
    while Instant::now() < until {
        match consumer.poll(TICK) {
            Some(Ok(message)) => match epoch_of(&message) {
                Some(epoch) => return Ok(Some(epoch)),
                // As long as something comes, it is no outage.
                None => until = Instant::now() + ASK,
            },
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Err(error)) => tracing::debug!(%error, "looking for the log's epoch"),
            None => {}
        }
    }
    Err(LogError::Unavailable(format!("partition 0 of {topic} cannot be read from the brokers at {}", config.brokers)))
}

/// Gives the log a new epoch; returns once the record is durable.
pub(super) fn write(producer: &BaseProducer<Producing>, pending: &Pending, topic: &str) -> Result<(), LogError> {
    let (epoch, at) = (clock::random_id(), clock::rfc3339(clock::now_ms()));
    let record = Record {
        topic: Topic::Events,
        key: KEY.to_owned(),
        kind: KIND.to_owned(),
        grant: Grant::Scope,
        traceparent: None,
        value: serde_json::json!({ "kind": KIND, "epoch": epoch.to_string(), "at": at }).to_string().into(),
    };
    let (answer, answered) = mpsc::sync_channel(1);
    let done: Done = Box::new(move |result| drop(answer.send(result)));
    let id = pending.add(std::iter::once((Topic::Events, done)));
    send(producer, topic, Some(0), &record, id).map_err(|e| LogError::Unavailable(e.to_string()))?;
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

/// The epoch, if this is a marker that can be read.
pub(super) fn epoch_of(message: &BorrowedMessage<'_>) -> Option<String> {
    if message.key() != Some(KEY.as_bytes()) || headers::kind_of(message) != Some(KIND.as_bytes()) {
        return None;
    }
    let value: serde_json::Value = serde_json::from_slice(message.payload()?).ok()?;
    Some(value.get("epoch")?.as_str()?.to_owned())
}
