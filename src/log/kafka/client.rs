//! The connection settings that producer, readers and queries share, and the questions that are asked of brokers.

use std::time::{Duration, Instant};

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::log::LogError;

/// How long a question to the brokers may take.
pub(super) const ASK: Duration = Duration::from_secs(5);
/// How long one poll of a client blocks while it waits for something.
pub(super) const TICK: Duration = Duration::from_millis(50);

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

impl KafkaConfig {
    /// A failure while the brokers were asked; names them, since a wrong address is the most common cause.
    pub(super) fn unavailable(&self, error: &KafkaError) -> LogError {
        let brokers = &self.brokers;
        LogError::Unavailable(match error.rdkafka_error_code() {
            Some(
                RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::RequestTimedOut
                | RDKafkaErrorCode::Resolve,
            ) => format!("no Kafka broker answered at {brokers} (--brokers): {error}"),
            _ => format!("Kafka at {brokers}: {error}"),
        })
    }
}

/// A consumer that asks for metadata and commits positions, and never reads records.
pub(super) type QueryClient = BaseConsumer<Quiet>;

/// librdkafka's own log and errors. Outages are reported once, by the monitor thread, not once an attempt.
pub(super) struct Quiet;

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

pub(super) fn client_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("bootstrap.servers", &config.brokers)
        .set("client.id", "weft")
        // Reconnect soon after the brokers are back, and give up on one that went silent.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.timeout.ms", "10000")
        .set("socket.keepalive.enable", "true")
        .set_log_level(RDKafkaLogLevel::Warning);
    client
}

pub(super) fn consumer_config(config: &KafkaConfig) -> ClientConfig {
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

/// Where offsets are asked for: the oldest record of a partition, or after its newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edge {
    Start,
    End,
}

/// The offset at one edge of each of these partitions, in their order. Each broker is asked once, for all that it leads.
pub(super) fn offsets<'a>(
    config: &KafkaConfig,
    client: &QueryClient,
    edge: Edge,
    partitions: impl IntoIterator<Item = (&'a str, u32)>,
) -> Result<Vec<u64>, LogError> {
    let mut wanted = TopicPartitionList::new();
    // To Kafka the edges are two times, before and after all others.
    let edge = if edge == Edge::Start { Offset::Beginning } else { Offset::End };
    for (topic, partition) in partitions {
        let added = wanted.add_partition_offset(topic, partition as i32, edge);
        added.map_err(|error| config.unavailable(&error))?;
    }
    let until = Instant::now() + ASK;
    loop {
        let error = match client.offsets_for_times(wanted.clone(), ASK).and_then(|found| found_offsets(&found)) {
            Ok(offsets) => return Ok(offsets),
            Err(error) => error,
        };
        if !known_soon(&error) || Instant::now() >= until {
            return Err(config.unavailable(&error));
        }
        client.poll(TICK);
    }
}

fn found_offsets(found: &TopicPartitionList) -> Result<Vec<u64>, KafkaError> {
    let offset_of = |element: &TopicPartitionListElem<'_>| {
        element.error()?;
        let offset = element.offset().to_raw().and_then(|raw| u64::try_from(raw).ok());
        offset.ok_or(KafkaError::OffsetFetch(RDKafkaErrorCode::NoOffset))
    };
    found.elements().iter().map(offset_of).collect()
}

/// Whether a partition is new, or its leader has just changed: then it is known a moment later.
fn known_soon(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(
            Code::NotLeaderForPartition
                | Code::LeaderNotAvailable
                | Code::UnknownTopicOrPartition
                | Code::UnknownPartition
                | Code::FencedLeaderEpoch
                | Code::UnknownLeaderEpoch
        )
    )
}
