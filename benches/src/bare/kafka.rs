//! Kafka alone, with the settings of the Kafka log's producer and consumer.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::record::record_value;
use crate::report::{Figure, micros, millis};
use crate::target::progress;
use weft::cli::common::Failure;
use weft::clock;

const PARTITIONS: i32 = 16;
const WINDOW: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) async fn run(brokers: &str, each: Duration) -> Result<Vec<Figure>, Failure> {
    progress("bare Kafka");
    let topic = format!("weft-bench-{}", clock::random_id().simple());
    let admin: AdminClient<DefaultClientContext> = config(brokers).create()?;
    let created = NewTopic::new(&topic, PARTITIONS, TopicReplication::Fixed(1));
    for result in admin.create_topics([&created], &AdminOptions::new()).await? {
        result.map_err(|(topic, code)| format!("cannot create {topic}: {code}"))?;
    }
    let figures = measure(brokers, &topic, each);
    admin.delete_topics(&[&topic], &AdminOptions::new()).await?;
    figures
}

fn config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

fn measure(brokers: &str, topic: &str, each: Duration) -> Result<Vec<Figure>, Failure> {
    let (one, latency) = produce(brokers, topic, 1, each)?;
    let (many, _) = produce(brokers, topic, WINDOW, each)?;
    let total = one + many;
    let seconds = each.as_secs_f64();
    let consumed = consume(brokers, topic, total)?;
    Ok(vec![
        Figure::more("bare Kafka produce, one at a time", one as f64 / seconds, "records/s"),
        Figure::less("bare Kafka produce P50", millis(latency.value_at_quantile(0.5)), "ms"),
        Figure::less("bare Kafka produce P99", millis(latency.value_at_quantile(0.99)), "ms"),
        Figure::more("bare Kafka produce, 4096 outstanding", many as f64 / seconds, "records/s"),
        Figure::more("bare Kafka consume", consumed, "records/s"),
    ])
}

/// What the producer's callbacks have counted; they run inside `poll`, on the bench's thread.
struct Deliveries {
    seen: Mutex<Seen>,
}

struct Seen {
    answered: usize,
    latency: Histogram<u64>,
    failed: Option<KafkaError>,
}

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Box<Instant>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Box<Instant>) {
        let Ok(mut seen) = self.seen.lock() else { return };
        seen.answered += 1;
        seen.latency.saturating_record(sent.elapsed().as_micros() as u64);
        if let Err((error, _)) = result {
            seen.failed = Some(error.clone());
        }
    }
}

/// How many records were answered with `window` of them unanswered at any time, and their latencies.
fn produce(brokers: &str, topic: &str, window: usize, each: Duration) -> Result<(u64, Histogram<u64>), Failure> {
    let seen = Seen { answered: 0, latency: micros()?, failed: None };
    let producer: BaseProducer<Deliveries> = config(brokers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", "0")
        .set("compression.type", "lz4")
        .set("partitioner", "murmur2_random")
        .create_with_context(Deliveries { seen: Mutex::new(seen) })?;
    let value = record_value();
    // Finding the broker and getting a producer id does not count.
    let first = BaseRecord::with_opaque_to(topic, Box::new(Instant::now())).key("bench/thread-1").payload(&value);
    producer.send(first).map_err(|(error, _)| error)?;
    producer.flush(PATIENCE)?;
    let (mut sent, mut answered) = (1, state(&producer)?);
    let begin = Instant::now();
    while begin.elapsed() < each {
        while sent < answered + window {
            let record =
                BaseRecord::with_opaque_to(topic, Box::new(Instant::now())).key("bench/thread-1").payload(&value);
            producer.send(record).map_err(|(error, _)| error)?;
            sent += 1;
        }
        producer.poll(Duration::from_millis(1));
        answered = state(&producer)?;
    }
    producer.flush(PATIENCE)?;
    let seen = producer.context().seen.lock().map_err(|_| "a delivery callback panicked")?;
    if seen.answered != sent {
        return Err(format!("{sent} records were sent, and {} answered", seen.answered).into());
    }
    Ok((answered as u64, seen.latency.clone()))
}

/// How many are answered so far. An error if one of them failed.
fn state(producer: &BaseProducer<Deliveries>) -> Result<usize, Failure> {
    let seen = producer.context().seen.lock().map_err(|_| "a delivery callback panicked")?;
    match &seen.failed {
        Some(error) => Err(error.clone().into()),
        None => Ok(seen.answered),
    }
}

/// Reads `total` records from the start of the topic; gives how many a second.
fn consume(brokers: &str, topic: &str, total: u64) -> Result<f64, Failure> {
    let consumer: BaseConsumer = config(brokers)
        .set("group.id", topic)
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("fetch.wait.max.ms", "50")
        .set("fetch.queue.backoff.ms", "10")
        .create()?;
    let mut from = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        from.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&from)?;
    let begin = Instant::now();
    let mut first = None;
    let mut read = 0;
    while read < total {
        match consumer.poll(PATIENCE) {
            Some(message) => drop(message?),
            None => return Err(format!("{read} of {total} records came, then none for {PATIENCE:?}").into()),
        }
        first.get_or_insert_with(Instant::now);
        read += 1;
    }
    // Finding the broker does not count.
    Ok(total as f64 / first.unwrap_or(begin).elapsed().as_secs_f64())
}
