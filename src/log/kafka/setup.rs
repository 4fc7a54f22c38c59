//! The topics, and the record in them that says which log they are.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::producer::BaseProducer;
use rdkafka::{Offset, TopicPartitionList};

use super::reading::{KIND, header, watermarks};
use super::{
    ANSWER_WITHIN, ASK, KafkaConfig, Pending, Producing, Quiet, TICK, client_config, consumer_config, send, unavailable,
};
use crate::clock;
use crate::log::{Done, Grant, LogError, Record, Topic};

/// How long a new topic may take until every broker knows of it; busy ones take their time.
const APPEARS_WITHIN: Duration = Duration::from_secs(30);

/// The record that names the log: the first of this kind in partition 0 of the events holds the epoch.
const MARKER_KIND: &str = "log_created";
const MARKER_KEY: &str = "weft";

/// What the topics are called on the brokers, and how their partitions are numbered.
pub(super) struct Topics {
    names: [String; Topic::ALL.len()],
    pub(super) each: u32,
}

impl Topics {
    pub(super) fn new(config: &KafkaConfig) -> Topics {
        let names = Topic::ALL.map(|topic| format!("{}{}", config.topic_prefix, topic.as_str()));
        Topics { names, each: config.partitions }
    }

    pub(super) fn name(&self, topic: Topic) -> &str {
        &self.names[topic as usize]
    }

    pub(super) fn named(&self, name: &str) -> Option<Topic> {
        Topic::ALL.into_iter().find(|topic| self.name(*topic) == name)
    }

    /// Of all topics together.
    pub(super) fn partitions(&self) -> u32 {
        self.each * Topic::ALL.len() as u32
    }

    pub(super) fn place(&self, partition: u32) -> (Topic, u32) {
        Topic::place(partition, self.each)
    }
}

/// Creates the topics that do not exist, and makes sure that those which do are fit for us.
pub(super) fn ensure_topics(config: &KafkaConfig, topics: &Topics, side: &BaseConsumer<Quiet>) -> Result<(), LogError> {
    let mut missing = Vec::new();
    for topic in Topic::ALL {
        if partitions_of(side, topics.name(topic))?.is_none() {
            missing.push(topic);
        }
    }
    let admin: AdminClient<Quiet> = client_config(config).create_with_context(Quiet).map_err(unavailable)?;
    let options = AdminOptions::new().request_timeout(Some(ASK)).operation_timeout(Some(ASK));
    if !missing.is_empty() {
        // -1: as many replicas as the brokers are set up to make.
        let new = missing.iter().map(|topic| {
            let new = NewTopic::new(topics.name(*topic), config.partitions as i32, TopicReplication::Fixed(-1))
                .set("retention.ms", "-1")
                .set("retention.bytes", "-1");
            if *topic == Topic::Receipts { new.set("cleanup.policy", "compact") } else { new }
        });
        let new: Vec<NewTopic<'_>> = new.collect();
        for result in block_on(admin.create_topics(&new, &options)).map_err(unavailable)? {
            match result {
                // Another node that starts as well was faster.
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, e)) => return Err(LogError::Unavailable(format!("topic {name} could not be created: {e}"))),
            }
        }
    }
    for name in Topic::ALL.map(|topic| topics.name(topic)) {
        let until = Instant::now() + APPEARS_WITHIN;
        // A new topic takes a moment until every broker knows of it.
        let found = loop {
            match partitions_of(side, name)? {
                Some(found) => break found,
                None if Instant::now() < until => drop(side.poll(TICK)),
                None => return Err(LogError::Unavailable(format!("topic {name} did not appear"))),
            }
        };
        if found != config.partitions {
            return Err(LogError::PartitionMismatch { found, configured: config.partitions });
        }
    }
    Topic::ALL.into_iter().try_for_each(|topic| check_retention(&admin, &options, topic, topics.name(topic)))
}

/// None when the topic does not exist, or not everywhere yet.
fn partitions_of(side: &BaseConsumer<Quiet>, topic: &str) -> Result<Option<u32>, LogError> {
    let metadata = side.fetch_metadata(Some(topic), ASK).map_err(unavailable)?;
    let Some(found) = metadata.topics().first() else {
        return Ok(None);
    };
    match found.error().map(RDKafkaErrorCode::from) {
        None if found.partitions().iter().any(|p| p.leader() < 0) => Ok(None),
        None => Ok(Some(found.partitions().len() as u32)),
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::LeaderNotAvailable) => Ok(None),
        Some(e) => Err(LogError::Unavailable(format!("topic {topic}: {e}"))),
    }
}

/// A topic that somebody else made may throw away what must stay. Of receipts only the newest of a key must.
fn check_retention(
    admin: &AdminClient<Quiet>,
    options: &AdminOptions,
    topic: Topic,
    name: &str,
) -> Result<(), LogError> {
    let answer = block_on(admin.describe_configs([&ResourceSpecifier::Topic(name)], options));
    let Some(Ok(settings)) = answer.ok().and_then(|mut found| found.pop()) else {
        tracing::warn!(topic = name, "Kafka does not tell what the topic throws away: nothing must get lost");
        return Ok(());
    };
    let setting = |name| settings.get(name).and_then(|entry| entry.value.as_deref()).unwrap_or_default();
    let policy = setting("cleanup.policy");
    if topic == Topic::Receipts {
        if policy != "compact" {
            tracing::warn!(topic = name, policy, "the topic should be compacted; set its cleanup.policy to compact");
        }
    } else if policy.contains("compact") {
        return Err(LogError::Damaged(format!(
            "{name} has cleanup.policy=compact, which throws records away; set it to delete"
        )));
    }
    for setting_name in ["retention.ms", "retention.bytes"] {
        // Compaction alone knows no retention.
        if policy != "compact" && setting(setting_name) != "-1" {
            tracing::warn!(
                topic = name,
                setting = setting_name,
                value = setting(setting_name),
                "the topic throws old records away; set it to -1"
            );
        }
    }
    Ok(())
}

/// The epoch in the first marker of partition 0 of the topic (that of the events), if there is one.
pub(super) fn first_epoch(
    config: &KafkaConfig,
    topic: &str,
    side: &BaseConsumer<Quiet>,
) -> Result<Option<String>, LogError> {
    let start = watermarks(side, topic, 0)?.start;
    let consumer: BaseConsumer<Quiet> =
        consumer_config(config).set("enable.partition.eof", "true").create_with_context(Quiet).map_err(unavailable)?;
    let mut from = TopicPartitionList::new();
    // From an i64, so it is one.
    from.add_partition_offset(topic, 0, Offset::Offset(start as i64))
        .and_then(|()| consumer.assign(&from))
        .map_err(unavailable)?;
    let mut until = Instant::now() + ASK;
    while Instant::now() < until {
        match consumer.poll(TICK) {
            Some(Ok(message)) => match marker_epoch(&message) {
                Some(epoch) => return Ok(Some(epoch)),
                // As long as something comes, it is no outage.
                None => until = Instant::now() + ASK,
            },
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Err(error)) => tracing::debug!(%error, "looking for the log's epoch"),
            None => {}
        }
    }
    Err(LogError::Unavailable(format!("partition 0 of {topic} cannot be read")))
}

pub(super) fn write_marker(producer: &BaseProducer<Producing>, pending: &Pending, topic: &str) -> Result<(), LogError> {
    let (epoch, at) = (clock::random_id(), clock::rfc3339(clock::now_ms()));
    let record = Record {
        topic: Topic::Events,
        key: MARKER_KEY.to_owned(),
        kind: MARKER_KIND.to_owned(),
        grant: Grant::Scope,
        traceparent: None,
        value: serde_json::json!({ "kind": MARKER_KIND, "epoch": epoch.to_string(), "at": at }).to_string().into(),
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
pub(super) fn marker_epoch(message: &BorrowedMessage<'_>) -> Option<String> {
    if message.key() != Some(MARKER_KEY.as_bytes()) || header(message, KIND) != Some(MARKER_KIND.as_bytes()) {
        return None;
    }
    let value: serde_json::Value = serde_json::from_slice(message.payload()?).ok()?;
    Some(value.get("epoch")?.as_str()?.to_owned())
}

/// rdkafka's admin calls are futures that its own thread completes; opening a log needs no runtime for them.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}
