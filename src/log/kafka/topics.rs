//! What the topics are called on the brokers, and how their partitions are numbered and chosen.

use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};

use super::client::KafkaConfig;
use crate::log::{Position, Topic};

pub(super) struct Topics {
    names: [String; Topic::ALL.len()],
    /// How many partitions each topic has.
    pub(super) each: u32,
}

impl Topics {
    pub(super) fn new(config: &KafkaConfig) -> Topics {
        let names = Topic::ALL.map(|topic| format!("{}{}", config.topic_prefix, topic.as_str()));
        Topics { names, each: config.partitions }
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
        murmur2_partition(key, self.each)
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

/// The partition that Kafka's own clients choose for a key: MurmurHash2 (Austin Appleby's, 32 bits) with Kafka's seed, its
/// sign bit cleared, modulo the number of partitions.
fn murmur2_partition(key: &[u8], partitions: u32) -> u32 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hash_as_in_kafka_s_own_tests() {
        // From org.apache.kafka.common.utils.UtilsTest, as unsigned values with the sign bit cleared.
        for (key, hash) in [("21", -973932308i32), ("foobar", -790332482), ("a-little-bit-long-string", -985981536)] {
            assert_eq!(murmur2_partition(key.as_bytes(), u32::MAX), hash as u32 & 0x7fff_ffff, "{key}");
        }
    }
}
