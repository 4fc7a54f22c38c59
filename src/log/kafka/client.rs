//! The connection settings that producer, readers and queries share, and the questions that are asked of brokers.

use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use crate::log::{Bounds, LogError};
use crate::memory::LogPlan;

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
    /// What may wait in its client.
    pub memory: LogPlan,
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

/// What one partition of a topic holds.
pub(super) fn watermarks(
    config: &KafkaConfig,
    client: &QueryClient,
    topic: &str,
    partition: u32,
) -> Result<Bounds, LogError> {
    use RDKafkaErrorCode as Code;
    let until = Instant::now() + ASK;
    loop {
        let error = match client.fetch_watermarks(topic, partition as i32, ASK) {
            Ok((start, end)) => match (u64::try_from(start), u64::try_from(end)) {
                (Ok(start), Ok(end)) => return Ok(Bounds { start, end }),
                _ => {
                    let why = format!("Kafka does not say what partition {partition} of {topic} holds");
                    return Err(LogError::Unavailable(why));
                }
            },
            Err(error) => error,
        };

        // A partition that is new, or whose leader has just changed, is known a moment later.
        let soon = matches!(
            error.rdkafka_error_code(),
            Some(Code::NotLeaderForPartition | Code::LeaderNotAvailable | Code::UnknownTopicOrPartition)
        );
        if !soon || Instant::now() >= until {
            return Err(config.unavailable(&error));
        }
        client.poll(TICK);
    }
}
