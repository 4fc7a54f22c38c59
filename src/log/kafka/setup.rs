//! The topics at the start: created where they are missing, and refused where they would lose records or order.

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::Consumer;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::metadata::MetadataTopic;

use super::admin::{admin_client, admin_options, block_on};
use super::client::{ASK, Callbacks, Connection, OffsetEdge, QueryClient, TICK, hear, offsets};
use super::keeping::{self, Finding, Findings, IN_SYNC, REPLICAS, Settings};
use super::topics::Topics;
use crate::log::{LogError, Topic};

/// How long a new topic may take until every broker knows of it; busy ones take their time.
const APPEARS_WITHIN: Duration = Duration::from_secs(30);

/// A new topic that has not appeared after this is created again.
const CREATE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A topic as the brokers have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) partitions: u32,
    /// The fewest of any partition.
    pub(super) replicas: u32,
}

impl Shape {
    pub(super) fn of(topic: &MetadataTopic) -> Shape {
        let partitions = topic.partitions();
        let replicas = partitions.iter().map(|it| it.replicas().len()).min().unwrap_or_default();
        Shape { partitions: partitions.len() as u32, replicas: replicas as u32 }
    }
}

/// Creates the topics that do not exist; gives the shape of all, and what is to be said of their settings. Fails if they
/// would lose records.
pub(super) fn ensure_topics(
    connection: &Connection,
    topics: &Topics,
    client: &QueryClient,
) -> Result<([Shape; Topic::ALL.len()], Findings), LogError> {
    let found = create_missing(connection, topics, client)?;

    let settings = keeping::ask(connection, topics).unwrap_or_else(|error| {
        tracing::debug!(%error, "the brokers do not say how the topics are set up");
        Settings::new()
    });
    let findings = keeping::check(connection, topics, settings, found.map(|it| it.replicas));
    if findings.problems.is_empty() {
        Ok((found, findings))
    } else {
        let problems: Vec<String> = findings.problems.iter().map(Finding::to_string).collect();
        Err(LogError::Unfit(problems.join("; ")))
    }
}

/// The shape of each topic, once all exist. One that somebody has just deleted may still be there, by its name or for the
/// brokers that are asked, and is gone a moment later: so what is missing is looked up, and created, until nothing is.
fn create_missing(
    connection: &Connection,
    topics: &Topics,
    client: &QueryClient,
) -> Result<[Shape; Topic::ALL.len()], LogError> {
    let until = Instant::now() + APPEARS_WITHIN;
    let mut create_at = Instant::now();
    loop {
        let mut shapes = [None; Topic::ALL.len()];
        for topic in Topic::ALL {
            shapes[topic as usize] = shape_of(connection, client, topics.name(topic))?;
        }
        let missing: Vec<Topic> = Topic::ALL.into_iter().filter(|topic| shapes[*topic as usize].is_none()).collect();
        let Some(first) = missing.first() else {
            return Ok(shapes.map(Option::unwrap_or_default));
        };

        let now = Instant::now();
        if now >= until {
            return Err(LogError::Unavailable(format!("topic {} did not appear", topics.name(*first))));
        }
        if now >= create_at {
            create(connection, topics, &missing, client)?;
            create_at = Instant::now() + CREATE_AGAIN_AFTER;
        }
        drop(client.poll(TICK));
    }
}

/// Makes sure that each topic has the partitions that the log was created with, `named` in its marker if it says so. More
/// are allowed while nobody has written into them: then nothing is lost by leaving them alone.
pub(super) fn check_partitions(
    connection: &Connection,
    topics: &Topics,
    client: &QueryClient,
    shapes: [Shape; Topic::ALL.len()],
    named: Option<u32>,
) -> Result<(), LogError> {
    let configured = topics.each;
    if let Some(found) = named.filter(|named| *named != configured) {
        return Err(LogError::PartitionMismatch { found, configured });
    }
    for topic in Topic::ALL {
        let found = shapes[topic as usize].partitions;
        if found < configured || found > configured && named.is_none() {
            return Err(LogError::PartitionMismatch { found, configured });
        }
        if let Some(why) = added_with_records(connection, topics.name(topic), configured, found, client)? {
            return Err(LogError::Unfit(why));
        }
    }
    Ok(())
}

/// What is in the partitions that somebody added to a topic, if anything is: nobody would ever read it.
pub(super) fn added_with_records(
    connection: &Connection,
    name: &str,
    configured: u32,
    found: u32,
    client: &QueryClient,
) -> Result<Option<String>, LogError> {
    if found <= configured {
        return Ok(None);
    }
    let added = || (configured..found).map(|partition| (name, partition));
    let starts = offsets(connection, client, OffsetEdge::Start, added())?;
    let ends = offsets(connection, client, OffsetEdge::End, added())?;
    let counts = (configured..found).zip(starts.iter().zip(&ends).map(|(start, end)| end.saturating_sub(*start)));
    let used: Vec<String> =
        counts.filter(|(_, count)| *count > 0).map(|(partition, count)| format!("{partition} ({count})")).collect();
    if used.is_empty() {
        return Ok(None);
    }
    Ok(Some(format!(
        "{name} has {found} partitions, but {configured} are configured (--partitions), and the number is fixed when the log \
         is created. Records are in partitions that were added: {}. Nobody reads them there; find who writes them, and \
         delete them with kafka-delete-records.sh",
        used.join(", ")
    )))
}

fn create(connection: &Connection, topics: &Topics, missing: &[Topic], client: &QueryClient) -> Result<(), LogError> {
    let (admin, options) = (admin_client(connection).map_err(|error| connection.unavailable(&error))?, admin_options());
    let replicas = replicas_to_make(connection, client, &admin, &options)?;
    // -1: as many replicas as the brokers are set up to make.
    let replication = replicas.map_or(-1, |replicas| replicas as i32);
    let in_sync = IN_SYNC.to_string();
    let new = missing.iter().map(|topic| {
        let new = NewTopic::new(topics.name(*topic), topics.each as i32, TopicReplication::Fixed(replication))
            .set("retention.ms", "-1")
            .set("retention.bytes", "-1")
            .set("unclean.leader.election.enable", "false");
        let new = if replicas.is_some() { new.set("min.insync.replicas", &in_sync) } else { new };
        if *topic == Topic::Receipts {
            new.set("cleanup.policy", "compact")
        } else {
            new.set("cleanup.policy", "delete")
        }
    });
    let new: Vec<NewTopic<'_>> = new.collect();
    let created = block_on(admin.create_topics(&new, &options)).map_err(|error| connection.unavailable(&error))?;
    for result in created {
        match result {
            // Another node that starts as well was faster.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, why)) => {
                return Err(LogError::Unavailable(format!(
                    "topic {name} could not be created ({why}). It may be made by hand, with {} partitions and the settings \
                     that the documentation names",
                    topics.each
                )));
            }
        }
    }
    Ok(())
}

/// How many replicas a new topic gets: three where there are brokers for it, or more if that is what the brokers give. None
/// leaves it to them.
fn replicas_to_make(
    connection: &Connection,
    client: &QueryClient,
    admin: &AdminClient<Callbacks>,
    options: &AdminOptions,
) -> Result<Option<u32>, LogError> {
    let metadata = client.fetch_metadata(None, ASK).map_err(|error| connection.unavailable(&error))?;
    let Some(broker) = metadata.brokers().first().filter(|_| metadata.brokers().len() >= REPLICAS as usize) else {
        return Ok(None);
    };
    let answer = block_on(admin.describe_configs(&[ResourceSpecifier::Broker(broker.id())], options));
    let settings = answer.ok().and_then(|mut found| found.pop()?.ok());
    let usual =
        settings.and_then(|settings| settings.get("default.replication.factor")?.value.as_deref()?.parse().ok());
    Ok(Some(usual.unwrap_or(0).max(REPLICAS)))
}

/// A new topic takes a moment until every broker knows of it.
fn wait_for_topic(connection: &Connection, client: &QueryClient, name: &str) -> Result<Shape, LogError> {
    let until = Instant::now() + APPEARS_WITHIN;
    loop {
        match shape_of(connection, client, name)? {
            Some(found) => return Ok(found),
            None if Instant::now() < until => drop(client.poll(TICK)),
            None => return Err(LogError::Unavailable(format!("topic {name} did not appear"))),
        }
    }
}

/// How many partitions a topic has, if there is one. It may be that another node is making it at this moment.
pub(super) fn find_partitions(
    connection: &Connection,
    client: &QueryClient,
    topic: &str,
) -> Result<Option<u32>, LogError> {
    let metadata = client.fetch_metadata(Some(topic), ASK).map_err(|error| {
        hear(client);
        connection.unavailable(&error)
    })?;
    match metadata.topics().first().map(|found| found.error().map(RDKafkaErrorCode::from)) {
        None | Some(Some(RDKafkaErrorCode::UnknownTopicOrPartition)) => Ok(None),
        Some(_) => Ok(Some(wait_for_topic(connection, client, topic)?.partitions)),
    }
}

/// None when the topic does not exist, or not everywhere yet.
fn shape_of(connection: &Connection, client: &QueryClient, topic: &str) -> Result<Option<Shape>, LogError> {
    let metadata = client.fetch_metadata(Some(topic), ASK).map_err(|error| {
        hear(client);
        connection.unavailable(&error)
    })?;
    let Some(found) = metadata.topics().first() else {
        return Ok(None);
    };
    match found.error().map(RDKafkaErrorCode::from) {
        None if found.partitions().iter().any(|p| p.leader() < 0) => Ok(None),
        None => Ok(Some(Shape::of(found))),
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::LeaderNotAvailable) => Ok(None),
        Some(e) => Err(LogError::Unavailable(format!("topic {topic}: {e}"))),
    }
}
