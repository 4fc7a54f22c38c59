//! What the topics are called on the brokers, and how their partitions are numbered and chosen.

use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};

use super::client::KafkaConfig;
use crate::log::{Position, Topic};
use crate::partitioning::{KeyHash, Partitioning};

pub(super) struct Topics {
    names: [String; Topic::ALL.len()],
    /// How many partitions each topic has.
    pub(super) each: u32,
    pub(super) partitioning: Partitioning,
}

impl Topics {
    pub(super) fn new(config: &KafkaConfig) -> Topics {
        let names = Topic::ALL.map(|topic| format!("{}{}", config.topic_prefix, topic.as_str()));
        let partitioning = Partitioning::new(KeyHash::Murmur2, config.partitions);
        Topics { names, each: config.partitions, partitioning }
    }

    pub(super) fn name(&self, topic: Topic) -> &str {
        &self.names[topic as usize]
    }

    pub(super) fn named(&self, name: &str) -> Option<Topic> {
        Topic::ALL.into_iter().find(|topic| self.name(*topic) == name)
    }

    /// Of all topics together.
    pub(super) fn partitions(&self) -> u32 {
        self.each * Topic::ALL.len() as u32
    }

    /// The topic of a partition counted over all topics, and its number within that topic.
    pub(super) fn topic_of(&self, partition: u32) -> (Topic, u32) {
        Topic::locate(partition, self.each)
    }

    /// The partition of a topic in which records with this key belong.
    pub(super) fn within(&self, key: &[u8]) -> u32 {
        self.partitioning.of(key)
    }

    /// The same, counted over all topics.
    pub(super) fn partition_for(&self, topic: Topic, key: &[u8]) -> u32 {
        topic.partition(self.within(key), self.each)
    }

    /// Where a consumer of all partitions begins to read, or a group's positions.
    pub(super) fn assignment(&self, positions: &[u64]) -> Result<TopicPartitionList, KafkaError> {
        let mut list = TopicPartitionList::with_capacity(positions.len());
        for (partition, &offset) in (0..).zip(positions) {
            let (topic, within) = self.topic_of(partition);
            // An offset that i64 does not hold exists on no Kafka; its largest is out of range as well.
            let offset = Offset::Offset(i64::try_from(offset).unwrap_or(i64::MAX));
            list.add_partition_offset(self.name(topic), within as i32, offset)?;
        }
        Ok(list)
    }
}

/// The position of a record that Kafka has at `within`, `offset` of a topic with `each` partitions. None for the negative
/// numbers with which librdkafka says that it does not know, and for a partition beyond `each`: its number would be
/// another topic's.
pub(super) fn position(topic: Topic, within: i32, offset: i64, each: u32) -> Option<Position> {
    let within = u32::try_from(within).ok().filter(|within| *within < each)?;
    Some(Position { partition: topic.partition(within, each), offset: offset.try_into().ok()? })
}
