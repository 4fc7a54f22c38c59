//! The monitor: a thread that asks the brokers how they are, and commits how far we have read, for Kafka's own tools.
//!
//! Every second it asks whether each partition has a leader and enough replicas in sync, and whether somebody has added
//! partitions; less often, where the log ends, which shows readers that they are left behind, how the topics are set up, and
//! where they begin, which shows what was deleted.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::MetadataTopic;

use super::client::QueryClient;
use super::keeping::Finding;
use super::setup::{Shape, added_with_records};
use super::{Shared, State, keeping, lock};
use crate::log::{LogError, Topic};

/// How long the monitor waits for an answer, and how long it leaves the brokers alone after one.
const PROBE: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// How often readers learn where the log ends.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often the topics' settings are looked at.
const CHECK_EVERY: Duration = Duration::from_secs(20);

/// How one topic is.
#[derive(Debug, Default, PartialEq, Eq)]
struct TopicState {
    problems: Vec<String>,
    /// Whether appends are refused at once.
    refuse: bool,
}

/// A partition as the brokers see it.
pub(super) struct Seen {
    id: i32,
    leader: i32,
    replicas: u32,
    in_sync: u32,
}

impl Shared {
    /// Until closed: watches the brokers' health and commits how far we have read.
    pub(super) fn run_monitor(&self) {
        let Ok(client) = self.cluster.client() else { return };
        let (mut asked, mut looked, mut checked) = (None::<Instant>, Instant::now(), Instant::now());
        while !self.cluster.is_closed() {
            // An error here is often the first sign of an outage, so the brokers are asked at once.
            let alarmed = matches!(client.poll(Duration::from_millis(100)), Some(Err(_)));
            if alarmed || asked.is_none_or(|asked| asked.elapsed() >= PROBE_EVERY) {
                self.probe(&client, &mut checked);
                self.commit(&client);
                if looked.elapsed() >= LOOK_EVERY && self.state.load().problems.is_empty() {
                    self.cluster.look(&client, PROBE);
                    looked = Instant::now();
                }
                asked = Some(Instant::now());
            }
        }
        self.commit(&client);
        self.cluster.release_client();

        // A consumer is gone only after its last commit is answered, which without a broker takes minutes. The commit
        // gets its chance; nobody waits longer for it.
        let (sender, gone) = mpsc::sync_channel(1);
        let end = move || {
            drop(client);
            sender.send(())
        };
        if thread::Builder::new().name("weft-kafka-end".to_owned()).spawn(end).is_ok() {
            // Sent or not, this is all the time it gets.
            gone.recv_timeout(PROBE).unwrap_or_default();
        }
    }

    fn probe(&self, client: &QueryClient, checked: &mut Instant) {
        let before = self.pending.delivered();
        let (mut state, mut shapes) = (State::default(), [Shape::default(); Topic::ALL.len()]);
        for topic in Topic::ALL {
            let name = self.cluster.topics.name(topic);
            let metadata = match client.fetch_metadata(Some(name), PROBE) {
                Ok(metadata) => metadata,
                // Records were acknowledged meanwhile: the brokers are busy, not away.
                Err(_) if self.pending.delivered() > before => return,
                Err(error) => return self.set_state(self.away(&error)),
            };
            let Some(found) = metadata.topics().first() else { continue };
            let shape = Shape::of(found);
            shapes[topic as usize] = shape;
            let is = self.topic_state(topic, found, client);
            state.problems.extend(is.problems);
            state.refuse[topic as usize] = is.refuse;
            if shape.partitions > self.cluster.topics.each && !is.refuse {
                state.warnings.push(added(name, shape.partitions, self.cluster.topics.each));
            }
        }
        self.cluster.connection.is_well();

        if checked.elapsed() >= CHECK_EVERY {
            self.check(shapes);
            *checked = Instant::now();
        }
        let findings = lock(&self.findings);
        state.problems.extend(findings.problems.iter().map(Finding::to_string));
        state.problems.extend_from_slice(&findings.deleted);
        state.warnings.extend(findings.warnings.iter().map(Finding::to_string));
        drop(findings);
        self.set_state(state);
    }

    /// No broker answers.
    fn away(&self, error: &KafkaError) -> State {
        let findings = lock(&self.findings);
        let mut problems = vec![self.cluster.connection.explain(error)];
        problems.extend(findings.problems.iter().map(Finding::to_string));
        problems.extend_from_slice(&findings.deleted);
        let warnings = findings.warnings.iter().map(Finding::to_string).collect();
        State { problems, warnings, refuse: [true; Topic::ALL.len()] }
    }

    fn topic_state(&self, topic: Topic, found: &MetadataTopic, client: &QueryClient) -> TopicState {
        let name = self.cluster.topics.name(topic);
        if let Some(code) = found.error() {
            let why = format!("topic {name}: it cannot be used ({})", RDKafkaErrorCode::from(code));
            return TopicState { problems: vec![why], refuse: true };
        }
        let (found_number, configured) = (found.partitions().len() as u32, self.cluster.topics.each);
        if found_number < configured {
            let why = LogError::PartitionMismatch { found: found_number, configured };
            return TopicState { problems: vec![format!("topic {name}: {why}")], refuse: true };
        }
        match added_with_records(&self.cluster.connection, name, configured, found_number, client) {
            Ok(None) => {}
            // Somebody writes by another number of partitions: what we write next might be in order with nothing of theirs.
            Ok(Some(why)) => return TopicState { problems: vec![why], refuse: true },
            Err(error) => return TopicState { problems: vec![error.to_string()], refuse: false },
        }
        let needed = lock(&self.findings).in_sync[topic as usize];
        // Without a leader for one partition the others still take records.
        TopicState { problems: faults(name, seen(found), configured, needed), refuse: false }
    }

    /// Looks at what changes seldom: the topics' settings, and where they begin.
    fn check(&self, shapes: [Shape; Topic::ALL.len()]) {
        let (connection, topics) = (&self.cluster.connection, &self.cluster.topics);
        // What is not known now is what was known before.
        let settings = match keeping::ask(connection, topics) {
            Ok(settings) => settings,
            Err(error) => return tracing::debug!(%error, "the topics' settings are not known"),
        };
        let mut findings = keeping::check(connection, topics, settings, shapes.map(|it| it.replicas));
        match self.cluster.starts() {
            Ok(starts) => findings.deleted = self.deleted(&starts),
            Err(error) => tracing::debug!(%error, "where the topics begin is not known"),
        }
        *lock(&self.findings) = findings;
    }

    /// Records that the log no longer has, though it had them when it was opened. Receipts are compacted.
    fn deleted(&self, starts: &[u64]) -> Vec<String> {
        let moved = self.begin.iter().zip(starts).zip(0..).filter(|((before, now), _)| now > before);
        let text = moved.filter_map(|((before, now), partition)| {
            let (topic, within) = self.cluster.topics.topic_of(partition);
            let name = self.cluster.topics.name(topic);
            (topic != Topic::Receipts).then(|| {
                format!(
                    "records of {name} were deleted while this server runs: partition {within} begins at {now}, and began at {before}"
                )
            })
        });
        text.collect()
    }

    fn set_state(&self, now: State) {
        let before = self.state.load();
        match (before.problems.is_empty(), now.problems.is_empty()) {
            (true, false) => tracing::warn!(why = now.problems.join("; "), "the log is not available"),
            (false, true) => tracing::info!("the log is available again"),
            _ => {}
        }
        for warning in now.warnings.iter().filter(|warning| !before.warnings.contains(warning)) {
            tracing::warn!("{warning}");
        }
        self.state.store(Arc::new(now));
    }

    fn commit(&self, client: &QueryClient) {
        let Some(positions) = lock(&self.progress).take() else {
            return;
        };
        let list = self.cluster.topics.assignment(&positions);
        if let Err(error) = list.and_then(|list| client.commit(&list, CommitMode::Async)) {
            tracing::debug!(%error, "the group's positions were not committed");
        }
    }
}

fn added(name: &str, found: u32, configured: u32) -> String {
    format!(
        "{name} has {found} partitions, of which the first {configured} are used (--partitions): the others were added and are empty"
    )
}

/// The partitions of a topic.
pub(super) fn seen(found: &MetadataTopic) -> impl Iterator<Item = Seen> {
    found.partitions().iter().map(|it| Seen {
        id: it.id(),
        leader: it.leader(),
        replicas: it.replicas().len() as u32,
        in_sync: it.isr().len() as u32,
    })
}

/// Pure: what keeps the partitions that are used from taking records. `needed` is `min.insync.replicas`, or 0.
pub(super) fn faults(name: &str, partitions: impl Iterator<Item = Seen>, configured: u32, needed: u32) -> Vec<String> {
    let mut faults = Vec::new();
    let (mut leaderless, mut short) = (None, None);
    for it in partitions.filter(|it| u32::try_from(it.id).is_ok_and(|id| id < configured)) {
        if it.leader < 0 {
            leaderless = leaderless.or(Some(it.id));
        } else if it.in_sync < needed.min(it.replicas) {
            short = short.or(Some((it.id, it.in_sync)));
        }
    }
    faults.extend(leaderless.map(|id| format!("topic {name}: partition {id} has no leader")));
    faults.extend(short.map(|(id, in_sync)| {
        format!("topic {name}: partition {id} takes no records: of its replicas {in_sync} are in sync, and min.insync.replicas is {needed}")
    }));
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three(leader: i32, in_sync: u32) -> impl Iterator<Item = Seen> {
        // The second of three partitions differs.
        (0..3).map(move |id| match id {
            1 => Seen { id, leader, replicas: 3, in_sync },
            _ => Seen { id, leader: 1, replicas: 3, in_sync: 3 },
        })
    }

    #[test]
    fn a_partition_without_a_leader_or_with_too_few_replicas_in_sync_is_named() {
        assert_eq!(faults("t", three(1, 3), 3, 2), [""; 0]);
        assert_eq!(faults("t", three(1, 2), 3, 2), [""; 0]);
        assert_eq!(faults("t", three(-1, 0), 3, 2), ["topic t: partition 1 has no leader"]);
        let short = faults("t", three(1, 1), 3, 2);
        assert!(short[0].contains("partition 1") && short[0].contains("1 are in sync"), "{short:?}");
        // What the brokers do not say is not held against them.
        assert_eq!(faults("t", three(1, 1), 3, 0), [""; 0]);
    }

    #[test]
    fn partitions_that_are_not_used_may_be_in_any_state() {
        assert_eq!(faults("t", three(-1, 0), 1, 2), [""; 0]);
    }

    #[test]
    fn min_insync_replicas_asks_for_no_more_than_there_are() {
        let alone = [Seen { id: 0, leader: 1, replicas: 1, in_sync: 1 }];
        assert_eq!(faults("t", alone.into_iter(), 1, 2), [""; 0]);
    }
}
