//! Looks at the brokers and makes nothing there: what `weft doctor` says of them.

use rdkafka::consumer::Consumer;
use rdkafka::error::RDKafkaErrorCode;

use super::client::{ASK, Connection, KafkaConfig, QueryClient, hear};
use super::keeping::{self, Finding};
use super::marker::Markers;
use super::monitor::{faults, seen};
use super::setup::{Shape, check_partitions};
use super::topics::Topics;
use crate::log::{LogError, Topic};

/// What the brokers have of a log.
#[derive(Debug, Default)]
pub struct ExaminedTopics {
    /// Each topic that is there, with what its partitions are like.
    pub found: Vec<String>,
    /// The names of the others.
    pub missing: Vec<String>,
    /// What keeps servers from starting or writing, or loses records.
    pub problems: Vec<Finding>,
    pub warnings: Vec<Finding>,
}

/// Asks the brokers. `partitions` is how many each topic is said to have, if that is said.
pub fn examine(config: KafkaConfig, partitions: Option<u32>) -> Result<ExaminedTopics, LogError> {
    let connection = Connection::new(config);
    let client: QueryClient = connection
        .consumer()
        .create_with_context(connection.callbacks())
        .map_err(|error| connection.unavailable(&error))?;
    let (mut examined, mut topics) = (ExaminedTopics::default(), Topics::new(&connection.config));
    let (mut shapes, mut seen_of) = ([Shape::default(); Topic::ALL.len()], Vec::new());
    for topic in Topic::ALL {
        let name = topics.name(topic).to_owned();
        let metadata = client.fetch_metadata(Some(&name), ASK).map_err(|error| {
            hear(&client);
            connection.unavailable(&error)
        })?;
        let found = metadata.topics().first();
        match found.map(|found| found.error().map(RDKafkaErrorCode::from)) {
            None | Some(Some(RDKafkaErrorCode::UnknownTopicOrPartition)) => examined.missing.push(name),
            Some(Some(code)) => return Err(LogError::Unavailable(format!("topic {name}: it cannot be used ({code})"))),
            Some(None) => {
                let Some(found) = found else { continue };
                let shape = Shape::of(found);
                shapes[topic as usize] = shape;
                examined.found.push(format!("{name}: {} partitions, {} replicas", shape.partitions, shape.replicas));
                seen_of.push((topic, name, seen(found).collect::<Vec<_>>()));
            }
        }
    }
    if examined.found.is_empty() {
        return Ok(examined);
    }
    if let Some(missing) = examined.missing.first() {
        examined.problems.push(Finding {
            what: format!("topic {missing} is missing, and others of the log are there"),
            mend: "if it was deleted, put it back with what was in it; a start makes an empty one".to_owned(),
        });
        return Ok(examined);
    }

    let markers = Markers { connection: &connection, client: &client, topic: topics.name(Topic::Events) };
    let named = markers.partitions()?;
    let each = partitions.or(named).unwrap_or(shapes[Topic::Events as usize].partitions);
    topics.each = each;
    if let Err(error) = check_partitions(&connection, &topics, &client, shapes, named) {
        let mend = match &error {
            LogError::PartitionMismatch { .. } => "start without --partitions: the log says how many it has",
            LogError::Unfit(_) => "as it says; \"Partitions that were added\" in docs/OPERATIONS.md has more",
            _ => return Err(error),
        };
        examined.problems.push(Finding { what: error.to_string(), mend: mend.to_owned() });
    }
    let settings = keeping::ask(&connection, &topics).unwrap_or_default();
    let findings = keeping::check(&connection, &topics, settings, shapes.map(|it| it.replicas));
    for (topic, name, partitions) in seen_of {
        let needed = findings.in_sync[topic as usize];
        let faults = faults(&name, partitions.into_iter(), each, needed);
        examined.problems.extend(faults.into_iter().map(|what| Finding {
            what,
            mend: "start the brokers that are away, and look at their logs and disks".to_owned(),
        }));
    }
    examined.problems.extend(findings.problems);
    examined.warnings = findings.warnings;
    Ok(examined)
}
