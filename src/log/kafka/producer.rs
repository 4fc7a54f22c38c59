//! Writing: the producer, and the records that wait for its answer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, ProducerContext};

use super::client::{Callbacks, Connection};
use super::headers::headers_of;
use super::topics::position;
use crate::log::{AppendError, Done, Record, Topic};
use crate::telemetry;

/// When Kafka has not answered for a record by then, we do; [`crate::log::Log::append`] promises 5 seconds.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_millis(4500);

/// The records without an answer yet. Ids only grow, so they are a queue with an offset; a slot is empty once its record
/// is answered.
#[derive(Default)]
pub(super) struct PendingAppends {
    queue: Mutex<PendingQueue>,
    delivered: AtomicU64,
}

#[derive(Default)]
struct PendingQueue {
    /// The id of the first slot.
    first: u64,
    slots: VecDeque<Option<PendingAppend>>,
}

pub(super) struct PendingAppend {
    topic: Topic,
    since: Instant,
    pub(super) done: Done,
}

impl PendingAppends {
    /// Returns the first one's id; the others follow it.
    pub(super) fn add(&self, waiting: impl Iterator<Item = (Topic, Done)>) -> u64 {
        let since = Instant::now();
        let mut queue = self.queue();
        let id = queue.first + queue.slots.len() as u64;
        queue.slots.extend(waiting.map(|(topic, done)| Some(PendingAppend { topic, since, done })));
        id
    }

    /// Whoever takes it answers it. None if it was answered already.
    pub(super) fn take(&self, id: u64) -> Option<PendingAppend> {
        let mut queue = self.queue();
        let slot = usize::try_from(id.checked_sub(queue.first)?).ok()?;
        let waiting = queue.slots.get_mut(slot)?.take();
        while queue.slots.pop_front_if(|slot| slot.is_none()).is_some() {
            queue.first += 1;
        }
        waiting
    }

    /// Answers those that have waited for `age` or longer.
    pub(super) fn expire(&self, age: Duration) {
        let old = |slot: &mut Option<PendingAppend>| slot.as_ref().is_none_or(|waiting| waiting.since.elapsed() >= age);
        let mut late = Vec::new();
        let mut queue = self.queue();
        while let Some(slot) = queue.slots.pop_front_if(old) {
            queue.first += 1;
            late.extend(slot);
        }
        drop(queue);
        for waiting in late {
            (waiting.done)(Err(AppendError::Unknown("Kafka did not answer".to_owned())));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue().slots.is_empty()
    }

    /// How many records were acknowledged so far.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }

    // A panic elsewhere leaves the queue whole: every change to it is one step.
    fn queue(&self) -> MutexGuard<'_, PendingQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the producer calls back.
pub(super) struct Producing {
    pending: Arc<PendingAppends>,
    /// How many partitions each topic has.
    each: u32,
    append_seconds: Histogram,
    callbacks: Callbacks,
}

impl ProducerContext for Producing {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, id: usize) {
        if result.is_ok() {
            self.pending.delivered.fetch_add(1, Ordering::Relaxed);
        }
        let Some(waiting) = self.pending.take(id as u64) else { return };
        let answer = match result {
            // No position: a retry that Kafka recognised after it had forgotten where the first attempt went.
            Ok(message) => position(waiting.topic, message.partition(), message.offset(), self.each)
                .ok_or_else(|| AppendError::Unknown("written, but Kafka does not say where".to_owned())),
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
        self.callbacks.log(level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.callbacks.error(error, reason);
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

pub(super) fn new_producer(
    connection: &Connection,
    pending: &Arc<PendingAppends>,
) -> Result<BaseProducer<Producing>, KafkaError> {
    connection.producer().set("message.timeout.ms", ANSWER_WITHIN.as_millis().to_string()).create_with_context(
        Producing {
            pending: pending.clone(),
            each: connection.config.partitions,
            append_seconds: telemetry::append_seconds(),
            callbacks: connection.callbacks(),
        },
    )
}

/// `partition` is named, since librdkafka would choose among all that the topic has: somebody may have added some.
pub(super) fn send(
    producer: &BaseProducer<Producing>,
    topic: &str,
    partition: u32,
    record: &Record,
    id: u64,
) -> Result<(), AppendError> {
    let out = BaseRecord::with_opaque_to(topic, id as usize)
        .partition(partition as i32)
        .key(record.key.as_str())
        .payload(&record.value[..])
        .headers(headers_of(record));
    producer.send(out).map_err(|(error, _)| match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => AppendError::QueueFull,
        // Not taken at all, whatever the reason.
        _ => AppendError::Unavailable(error.to_string()),
    })
}
