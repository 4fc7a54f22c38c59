//! The topics: created where they are missing, and checked for settings with which they would lose records.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::Consumer;
use rdkafka::error::RDKafkaErrorCode;

use super::client::{ASK, KafkaConfig, QueryClient, Quiet, TICK, client_config};
use super::topics::Topics;
use crate::log::{LogError, Topic};

/// How long a new topic may take until every broker knows of it; busy ones take their time.
const APPEARS_WITHIN: Duration = Duration::from_secs(30);

/// The topics that do not exist.
pub(super) fn missing_topics(
    config: &KafkaConfig,
    topics: &Topics,
    client: &QueryClient,
) -> Result<Vec<Topic>, LogError> {
    let mut missing = Vec::new();
    for topic in Topic::ALL {
        if partitions_of(config, client, topics.name(topic))?.is_none() {
            missing.push(topic);
        }
    }
    Ok(missing)
}

/// Creates the topics that do not exist, and makes sure that all of them keep what they are given.
pub(super) fn ensure_topics(
    config: &KafkaConfig,
    topics: &Topics,
    missing: &[Topic],
    client: &QueryClient,
) -> Result<(), LogError> {
    let admin: AdminClient<Quiet> =
        client_config(config).create_with_context(Quiet).map_err(|error| config.unavailable(&error))?;
    let options = AdminOptions::new().request_timeout(Some(ASK)).operation_timeout(Some(ASK));
    if !missing.is_empty() {
        create(config, topics, missing, &admin, &options)?;
    }
    for name in Topic::ALL.map(|topic| topics.name(topic)) {
        let found = wait_for_topic(config, client, name)?;
        if found != config.partitions {
            return Err(LogError::PartitionMismatch { found, configured: config.partitions });
        }
    }
    Topic::ALL.into_iter().try_for_each(|topic| check_retention(&admin, &options, topic, topics.name(topic)))
}

fn create(
    config: &KafkaConfig,
    topics: &Topics,
    missing: &[Topic],
    admin: &AdminClient<Quiet>,
    options: &AdminOptions,
) -> Result<(), LogError> {
    // -1: as many replicas as the brokers are set up to make.
    let new = missing.iter().map(|topic| {
        let new = NewTopic::new(topics.name(*topic), config.partitions as i32, TopicReplication::Fixed(-1))
            .set("retention.ms", "-1")
            .set("retention.bytes", "-1");
        if *topic == Topic::Receipts { new.set("cleanup.policy", "compact") } else { new }
    });
    let new: Vec<NewTopic<'_>> = new.collect();
    let created = block_on(admin.create_topics(&new, options)).map_err(|error| config.unavailable(&error))?;
    for result in created {
        match result {
            // Another node that starts as well was faster.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, e)) => return Err(LogError::Unavailable(format!("topic {name} could not be created: {e}"))),
        }
    }
    Ok(())
}

/// How many partitions a topic has; a new one takes a moment until every broker knows of it.
fn wait_for_topic(config: &KafkaConfig, client: &QueryClient, name: &str) -> Result<u32, LogError> {
    let until = Instant::now() + APPEARS_WITHIN;
    loop {
        match partitions_of(config, client, name)? {
            Some(found) => return Ok(found),
            None if Instant::now() < until => drop(client.poll(TICK)),
            None => return Err(LogError::Unavailable(format!("topic {name} did not appear"))),
        }
    }
}

/// None when the topic does not exist, or not everywhere yet.
fn partitions_of(config: &KafkaConfig, client: &QueryClient, topic: &str) -> Result<Option<u32>, LogError> {
    let metadata = client.fetch_metadata(Some(topic), ASK).map_err(|error| config.unavailable(&error))?;
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

/// A topic that somebody else made may delete what must stay. Of receipts only the newest of a key must.
fn check_retention(
    admin: &AdminClient<Quiet>,
    options: &AdminOptions,
    topic: Topic,
    name: &str,
) -> Result<(), LogError> {
    let answer = block_on(admin.describe_configs([&ResourceSpecifier::Topic(name)], options));
    let Some(Ok(settings)) = answer.ok().and_then(|mut found| found.pop()) else {
        tracing::warn!(topic = name, "Kafka does not say which records the topic deletes; it must delete none");
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
            "{name} has cleanup.policy=compact, which deletes records; set it to delete"
        )));
    }

    for setting_name in ["retention.ms", "retention.bytes"] {
        // A topic that is only compacted has no retention.
        if policy != "compact" && setting(setting_name) != "-1" {
            tracing::warn!(
                topic = name,
                setting = setting_name,
                value = setting(setting_name),
                "the topic deletes old records; set it to -1"
            );
        }
    }
    Ok(())
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
