//! Reading: from a place that is ours, record by record, past whatever is not.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset, TopicPartitionList, bindings};

use super::setup::{Topics, first_epoch, marker_epoch};
use super::{ASK, KafkaConfig, Quiet, Shared, TICK, consumer_config, position, unavailable};
use crate::log::{
    Bounds, Entry, Foreign, Grant, LogError, Positions, READ_BYTES, RECORD_VERSION, Reader, Record, Topic,
};

pub(super) const KIND: &CStr = c"weft-kind";
const VERSION: &CStr = c"weft-version";
const GRANT: &CStr = c"weft-grant";
const TRACEPARENT: &CStr = c"traceparent";

pub(super) struct KafkaReader {
    shared: Arc<Shared>,
    consumer: BaseConsumer<Quiet>,
    /// The log that the positions belong to.
    epoch: String,
    at: Positions,
    handles: Handles,
    /// Why the consumer stopped where it was. It never goes on by itself then, lest it goes on elsewhere.
    lost: Option<KafkaError>,
}

impl Reader for KafkaReader {
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err(LogError::Unavailable("closed".to_owned()));
        }
        if self.lost.is_some() {
            self.resume()?;
        }
        let until = Instant::now() + wait;
        let mut entries = Vec::with_capacity(max.min(1024));
        let mut bytes = 0;
        while entries.len() < max && bytes < READ_BYTES {
            let patience =
                if entries.is_empty() { until.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            match self.consumer.poll(patience) {
                None => break,
                Some(Ok(message)) => {
                    let topics = &self.shared.topics;
                    let Some(topic) = self.handles.topic(topics, &message) else {
                        continue;
                    };
                    let Some(at) = position(topic, message.partition(), message.offset(), topics.each) else {
                        continue;
                    };
                    if let Some(next) = self.at.get_mut(at.partition as usize) {
                        *next = at.offset + 1;
                    }
                    // Markers stand in the first partition of the events, which is the first of all.
                    if at.partition > 0 || marker_epoch(&message).is_none() {
                        bytes += message.payload_len();
                        entries.push(Entry { at, record: self.read(topic, at.partition, &message) });
                    }
                }
                Some(Err(error)) if stops_reading(&error) => {
                    self.lost = Some(error);
                    break;
                }
                // An outage: the consumer connects again and goes on where it was.
                Some(Err(error)) => tracing::debug!(%error, "reading from Kafka"),
            }
        }
        if entries.is_empty() {
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
    pub(super) fn open(shared: Arc<Shared>, epoch: &str, from: &[u64]) -> Result<KafkaReader, LogError> {
        let consumer = new_reader(&shared.config, &shared.topics, from).map_err(unavailable)?;
        let (epoch, at, handles) = (epoch.to_owned(), from.to_vec(), Handles::default());
        Ok(KafkaReader { shared, consumer, epoch, at, handles, lost: None })
    }

    /// The record, if it is ours and where it belongs: a thread that were in two partitions would have no order.
    fn read(&self, topic: Topic, partition: u32, message: &BorrowedMessage<'_>) -> Result<Record, Foreign> {
        let record = decode(topic, message)?;
        let each = self.shared.topics.each;
        if topic.partition(partition_of(record.key.as_bytes(), each), each) == partition {
            return Ok(record);
        }
        let why = "it is not in its key's partition (murmur2)".to_owned();
        Err(Foreign { at: time_of(message), ..Foreign::new(why, &record) })
    }

    /// Another program's transactions leave records that only Kafka sees. One at the very end would keep a reader that has
    /// read all from ever being at the end. What compaction takes away is always followed by a record: it leaves the
    /// newest segment alone.
    fn step_over_holes(&mut self) {
        let Ok(list) = self.consumer.position() else { return };
        let topics = &self.shared.topics;
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

    /// A new consumer at the old place, if that place still exists.
    fn resume(&mut self) -> Result<(), LogError> {
        let events = self.shared.topics.name(Topic::Events);
        let found = first_epoch(&self.shared.config, events, &self.consumer)?;
        // A marker that retention took away says nothing; another one does.
        if found.is_some_and(|found| found != self.epoch) {
            return Err(LogError::Damaged(format!("{events} is no longer the topic it was: start again")));
        }
        self.shared.check(&self.at)?;
        self.consumer = new_reader(&self.shared.config, &self.shared.topics, &self.at).map_err(unavailable)?;
        self.handles = Handles::default();
        self.lost = None;
        Ok(())
    }

    fn explain(&self, error: &KafkaError) -> LogError {
        use RDKafkaErrorCode as Code;
        match (self.shared.check(&self.at), error.rdkafka_error_code()) {
            (Err(outside), _) => outside,
            (Ok(()), Some(Code::BadMessage | Code::InvalidMessage)) => LogError::Damaged(error.to_string()),
            (Ok(()), _) => LogError::Unavailable(error.to_string()),
        }
    }
}

/// Where librdkafka keeps each topic of one consumer, as soon as a message came from it: comparing these is faster than
/// comparing names. An assigned topic stays where it is.
#[derive(Default)]
struct Handles([usize; Topic::ALL.len()]);

impl Handles {
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

/// Whether the consumer does not go on after this error, or went on past something that it could not read.
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

/// The partition that Kafka's own clients choose for a key: MurmurHash2 (Austin Appleby's, 32 bits) with Kafka's seed, its
/// sign bit cleared, modulo the number of partitions.
fn partition_of(key: &[u8], partitions: u32) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mut hash = SEED ^ key.len() as u32;
    let (words, rest) = key.as_chunks::<4>();
    for word in words {
        let k = u32::from_le_bytes(*word).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ (k ^ (k >> 24)).wrapping_mul(M);
    }
    if !rest.is_empty() {
        let tail = rest.iter().rev().fold(0, |tail, byte| (tail << 8) | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    ((hash ^ (hash >> 15)) & 0x7fff_ffff) % partitions
}

fn decode(topic: Topic, message: &BorrowedMessage<'_>) -> Result<Record, Foreign> {
    let foreign = |why: &str| Foreign {
        why: why.to_owned(),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice),
        at: time_of(message),
    };
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);

    let version = header(message, VERSION).ok_or_else(|| foreign("it has no header weft-version"))?;
    if std::str::from_utf8(version).ok().and_then(|v| v.parse().ok()) != Some(RECORD_VERSION) {
        return Err(foreign("its weft-version is not one that this server knows"));
    }
    let kind = header(message, KIND).and_then(text).ok_or_else(|| foreign("it has no header weft-kind"))?;
    let grant =
        header(message, GRANT).and_then(Grant::parse).ok_or_else(|| foreign("it has no valid header weft-grant"))?;
    let key = message.key().and_then(text).ok_or_else(|| foreign("it has no key, or one that is not UTF-8"))?;
    let value = message.payload().ok_or_else(|| foreign("it has no value"))?;
    let traceparent = header(message, TRACEPARENT).and_then(text);
    Ok(Record { topic, key, kind, grant, traceparent, value: Bytes::copy_from_slice(value) })
}

/// When Kafka took the record, or its writer says that it was made.
fn time_of(message: &BorrowedMessage<'_>) -> Option<u64> {
    message.timestamp().to_millis()?.try_into().ok()
}

/// The last header of that name. Not through rdkafka's own iterator, which panics over a name that is not UTF-8; and a
/// stranger may write any.
#[expect(unsafe_code, reason = "the safe reader panics on a header whose name is not UTF-8")]
pub(super) fn header<'m>(message: &'m BorrowedMessage<'_>, name: &CStr) -> Option<&'m [u8]> {
    let ok = bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
    let (mut headers, mut value, mut len) = (std::ptr::null_mut(), std::ptr::null(), 0);
    // SAFETY: the message lives as long as the borrow, and owns its headers and their values; both calls write the
    // pointers they are given only when they return `ok`, and a null value is sorted out before it is read.
    unsafe {
        if bindings::rd_kafka_message_headers(message.ptr(), &mut headers) != ok
            || bindings::rd_kafka_header_get_last(headers, name.as_ptr(), &mut value, &mut len) != ok
            || value.is_null()
        {
            return None;
        }
        Some(std::slice::from_raw_parts(value.cast(), len))
    }
}

fn new_reader(config: &KafkaConfig, topics: &Topics, from: &[u64]) -> Result<BaseConsumer<Quiet>, KafkaError> {
    let consumer: BaseConsumer<Quiet> = consumer_config(config)
        .set("fetch.wait.max.ms", "50")
        .set("fetch.queue.backoff.ms", "5")
        .set("queued.max.messages.kbytes", "32768")
        .create_with_context(Quiet)?;
    consumer.assign(&assignment(topics, from)?)?;
    Ok(consumer)
}

pub(super) fn assignment(topics: &Topics, positions: &[u64]) -> Result<TopicPartitionList, KafkaError> {
    let mut list = TopicPartitionList::with_capacity(positions.len());
    for (partition, &offset) in (0..).zip(positions) {
        let (topic, within) = topics.place(partition);
        // An offset that i64 does not hold exists on no Kafka; its largest is out of range as well.
        let offset = Offset::Offset(i64::try_from(offset).unwrap_or(i64::MAX));
        list.add_partition_offset(topics.name(topic), within as i32, offset)?;
    }
    Ok(list)
}

pub(super) fn watermarks(side: &BaseConsumer<Quiet>, topic: &str, partition: u32) -> Result<Bounds, LogError> {
    use RDKafkaErrorCode as Code;
    let until = Instant::now() + ASK;
    loop {
        let error = match side.fetch_watermarks(topic, partition as i32, ASK) {
            Ok((start, end)) => match (u64::try_from(start), u64::try_from(end)) {
                (Ok(start), Ok(end)) => return Ok(Bounds { start, end }),
                _ => {
                    return Err(LogError::Unavailable(format!("Kafka does not say what partition {partition} holds")));
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
            return Err(unavailable(error));
        }
        side.poll(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hash_as_in_kafka_s_own_tests() {
        // From org.apache.kafka.common.utils.UtilsTest, as unsigned values with the sign bit cleared.
        for (key, hash) in [("21", -973932308i32), ("foobar", -790332482), ("a-little-bit-long-string", -985981536)] {
            assert_eq!(partition_of(key.as_bytes(), u32::MAX), hash as u32 & 0x7fff_ffff, "{key}");
        }
    }
}
