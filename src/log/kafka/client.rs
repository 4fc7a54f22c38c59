//! The connection settings that producer, readers and queries share, what goes wrong with a connection, and the questions
//! that are asked of brokers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use super::settings::ClientSettings;
use crate::log::LogError;
use crate::memory::LogPlan;

/// How long a question to the brokers may take.
pub(super) const ASK: Duration = Duration::from_secs(5);
/// How long a partition that is new, or whose leader changes, may take to have one that answers.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);
/// How long one poll of a client blocks while it waits for something.
pub(super) const TICK: Duration = Duration::from_millis(50);
/// What librdkafka calls a connection on which TLS is agreed upon.
const TLS_HANDSHAKE: &str = "in state SSL_HANDSHAKE";
/// What librdkafka's log calls the end of a connection.
const LOST_CONNECTION: &str = "FAIL";
/// For how long librdkafka is heard out after a question that failed.
const HEAR: Duration = Duration::from_millis(200);

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
    /// What is passed on to librdkafka.
    pub settings: ClientSettings,
}

/// How to reach the brokers, and what last went wrong with it. All clients of a log share one.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) config: Arc<KafkaConfig>,
    trouble: Arc<Mutex<Option<Trouble>>>,
}

/// What librdkafka said on its own of why it has no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Trouble {
    kind: TroubleKind,
    /// Begins with the broker's address.
    text: String,
}

/// The more there is to be done about it, the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TroubleKind {
    Network,
    Tls,
    Authentication,
}

impl Connection {
    pub(super) fn new(config: KafkaConfig) -> Connection {
        Connection { config: Arc::new(config), trouble: Arc::default() }
    }

    /// The settings of a client of any kind, and what whoever runs Weft sets in their place.
    pub(super) fn client(&self) -> ClientConfig {
        self.with_own(ClientConfig::new())
    }

    pub(super) fn producer(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            // While a request is in flight the next batch gathers; lingering only adds its millisecond to every publish.
            .set("linger.ms", "0")
            .set("compression.type", "lz4")
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", (self.config.memory.producer() >> 10).to_string());
        let mut client = self.with_own(client);
        client.set("enable.idempotence", "true").set("acks", "all");
        client
    }

    /// A consumer that reads from positions of its own.
    pub(super) fn consumer(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("fetch.wait.max.ms", "50")
            .set("fetch.queue.backoff.ms", "5")
            .set("queued.max.messages.kbytes", (self.config.memory.consumer() >> 10).to_string());
        let mut client = self.with_own(client);
        client
            .set("group.id", &self.config.group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("isolation.level", "read_committed")
            .set("check.crcs", "true");
        client
    }

    /// Adds the connection, then what was given with `--kafka-config`, which takes the place of what is there.
    fn with_own(&self, mut client: ClientConfig) -> ClientConfig {
        client
            .set("bootstrap.servers", &self.config.brokers)
            .set("client.id", "weft")
            // Reconnect soon after the brokers are back, and give up on one that went silent.
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.timeout.ms", "10000")
            .set("socket.keepalive.enable", "true");
        // Whoever asks for details of the protocol is to see them.
        let details = self.config.settings.names("debug");
        client.set_log_level(if details { RDKafkaLogLevel::Debug } else { RDKafkaLogLevel::Info });
        self.config.settings.apply(&mut client);
        client
    }

    /// What somebody should see to.
    pub(super) fn warnings(&self) -> Vec<String> {
        let setting = self.client().create_native_config().and_then(|it| it.get("enable.ssl.certificate.verification"));
        let unverified = setting.is_ok_and(|value| value == "false");
        let text = "the brokers' certificates are not verified (enable.ssl.certificate.verification=false)";
        unverified.then(|| text.to_owned()).into_iter().collect()
    }

    /// What a client of this connection calls back.
    pub(super) fn callbacks(&self) -> Callbacks {
        Callbacks(self.clone())
    }

    /// Everything goes well again: what went wrong before explains nothing any more.
    pub(super) fn is_well(&self) {
        *self.trouble() = None;
    }

    /// A failure while the brokers were asked.
    pub(super) fn unavailable(&self, error: &KafkaError) -> LogError {
        LogError::Unavailable(self.explain(error))
    }

    /// What a failure comes from, as far as it is known, with the brokers' address. The error of a question says only that
    /// nothing came of it; why there is no connection, librdkafka says elsewhere.
    pub(super) fn explain(&self, error: &KafkaError) -> String {
        let brokers = &self.config.brokers;
        if let KafkaError::ClientCreation(why) = error {
            return format!("librdkafka does not take what it is given (--kafka-config): {why}");
        }
        if !is_unreachable(error) {
            return format!("Kafka at {brokers}: {error}");
        }
        match &*self.trouble() {
            Some(Trouble { kind: TroubleKind::Authentication, text }) => {
                format!("Kafka at {brokers} does not accept who this is (authentication): {text}")
            }
            Some(Trouble { kind: TroubleKind::Tls, text }) => {
                format!("there is no TLS connection to Kafka at {brokers}: {text}")
            }
            Some(Trouble { kind: TroubleKind::Network, text }) => {
                let how = if hung_up(text) && !self.config.settings.names("security.protocol") {
                    "; if it wants TLS or SASL authentication, give --kafka-config security.protocol=…"
                } else {
                    ""
                };
                format!("no Kafka broker answered at {brokers} (--brokers): {text}{how}")
            }
            None => format!("no Kafka broker answered at {brokers} (--brokers): {error}"),
        }
    }

    fn note_error(&self, error: &KafkaError, text: &str) {
        use RDKafkaErrorCode as Code;
        let kind = match error.rdkafka_error_code() {
            Some(Code::Authentication | Code::SaslAuthenticationFailed | Code::UnsupportedSASLMechanism) => {
                TroubleKind::Authentication
            }
            Some(Code::SSL) => TroubleKind::Tls,
            Some(Code::BrokerTransportFailure | Code::Resolve) => TroubleKind::Network,
            _ => return,
        };
        self.note(kind, text);
    }

    fn note(&self, kind: TroubleKind, text: &str) {
        // One that ends the connection while TLS is agreed upon speaks no TLS, or not with this client.
        let kind = if text.contains(TLS_HANDSHAKE) { kind.max(TroubleKind::Tls) } else { kind };
        let mut trouble = self.trouble();
        // An attempt that fails early, such as one that is cut off by the next, says less than one that got further.
        if trouble.as_ref().is_none_or(|before| before.kind <= kind) {
            *trouble = Some(Trouble { kind, text: text.to_owned() });
        }
    }

    // A panic elsewhere leaves it whole: every change is one step.
    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the connection was there and ended. A listener that wants TLS or SASL hangs up on a client that comes without;
/// depending on who is faster, librdkafka calls that a disconnection or a failure to send or receive.
fn hung_up(text: &str) -> bool {
    ["Disconnected", "Send failed", "Receive failed", "security.protocol"].iter().any(|words| text.contains(words))
}

/// Whether the error is that of a question which no broker answered.
fn is_unreachable(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(
        error.rdkafka_error_code(),
        Some(
            Code::BrokerTransportFailure
                | Code::AllBrokersDown
                | Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::Resolve
                | Code::Authentication
                | Code::SSL
        )
    )
}

/// A consumer that asks for metadata and commits positions, and never reads records.
pub(super) type QueryClient = BaseConsumer<Callbacks>;

/// librdkafka's own log and errors. Outages are reported once, by the monitor thread, not once an attempt.
pub(super) struct Callbacks(Connection);

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        // That a broker hung up is no error to librdkafka, though it may be how a listener answers who should use TLS or SASL.
        if facility == LOST_CONNECTION {
            let of_thread = text.strip_prefix("[thrd:").and_then(|text| text.split_once("]: "));
            self.0.note(TroubleKind::Network, of_thread.map_or(text, |(_, text)| text));
        }
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
                tracing::error!(facility, "{text}")
            }
            _ => tracing::debug!(facility, "{text}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
        self.0.note_error(&error, reason);
    }
}

impl ConsumerContext for Callbacks {}

/// Lets librdkafka say what it has noticed, after a question that failed; while a client is asked, it calls nobody back.
pub(super) fn hear(client: &QueryClient) {
    let until = Instant::now() + HEAR;
    while Instant::now() < until {
        drop(client.poll(TICK));
    }
}

/// Where offsets are asked for: the oldest record of a partition, or after its newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OffsetEdge {
    Start,
    End,
}

/// The offset at one edge of each of these partitions, in their order. Each broker is asked once, for all that it leads.
pub(super) fn offsets<'a>(
    connection: &Connection,
    client: &QueryClient,
    edge: OffsetEdge,
    partitions: impl IntoIterator<Item = (&'a str, u32)>,
) -> Result<Vec<u64>, LogError> {
    let wanted = edges(edge, partitions).map_err(|error| connection.unavailable(&error))?;
    let until = Instant::now() + SETTLES_WITHIN;
    loop {
        let error = match client.offsets_for_times(wanted.clone(), ASK).and_then(|found| found_offsets(&found)) {
            Ok(offsets) => return Ok(offsets),
            Err(error) => error,
        };
        if !known_soon(&error) || Instant::now() >= until {
            return Err(connection.unavailable(&error));
        }
        client.poll(TICK);
    }
}

/// The same, asked only once.
pub(super) fn offsets_now<'a>(
    client: &QueryClient,
    edge: OffsetEdge,
    partitions: impl IntoIterator<Item = (&'a str, u32)>,
    within: Duration,
) -> Result<Vec<u64>, KafkaError> {
    found_offsets(&client.offsets_for_times(edges(edge, partitions)?, within)?)
}

/// The question for these partitions' offsets at one edge.
fn edges<'a>(
    edge: OffsetEdge,
    partitions: impl IntoIterator<Item = (&'a str, u32)>,
) -> Result<TopicPartitionList, KafkaError> {
    // To Kafka the edges are two times, before and after all others.
    let edge = if edge == OffsetEdge::Start { Offset::Beginning } else { Offset::End };
    let mut wanted = TopicPartitionList::new();
    for (topic, partition) in partitions {
        wanted.add_partition_offset(topic, partition as i32, edge)?;
    }
    Ok(wanted)
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
