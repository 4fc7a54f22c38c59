//! Which partition of a topic a key belongs in. Pure.
//!
//! The log chooses the partition of a record by it, and the store that of a row, so that all rows of a thread are together
//! where its records are. It is fixed when a log is created: another number, or another hash, would give every thread a
//! second partition, and so a second order.

/// The most partitions that a topic may have.
pub const MAX_PARTITIONS: u32 = 10_000;

/// How many a new log has for each topic, unless somebody says otherwise.
pub const NEW_LOG_PARTITIONS: u32 = 64;

/// The longest key of a thread that is hashed without being made first: two names of 128 characters, and what an inbox's
/// name begins with.
const THREAD_KEY: usize = 272;

/// How keys are hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyHash {
    Crc32,
    /// What Kafka's own clients use.
    Murmur2,
}

/// How keys are spread over the partitions of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partitioning {
    hash: KeyHash,
    /// How many partitions each topic has.
    each: u32,
}

impl Partitioning {
    pub const fn new(hash: KeyHash, each: u32) -> Partitioning {
        Partitioning { hash, each: if each == 0 { 1 } else { each } }
    }

    pub fn hash(self) -> KeyHash {
        self.hash
    }

    /// How many partitions each topic has.
    pub fn each(self) -> u32 {
        self.each
    }

    /// The partition of a topic in which records with this key belong.
    pub fn of(self, key: &[u8]) -> u32 {
        match self.hash {
            KeyHash::Crc32 => crc32fast::hash(key) % self.each,
            KeyHash::Murmur2 => murmur2(key) % self.each,
        }
    }

    /// The same of `tenant/thread`. That key is not made for it: this is asked with each row.
    pub fn of_thread(self, tenant: &str, thread: &str) -> u32 {
        let (tenant, thread) = (tenant.as_bytes(), thread.as_bytes());
        let mut key = [0; THREAD_KEY];
        let length = tenant.len() + 1 + thread.len();
        let Some(key) = key.get_mut(..length) else {
            return self.of(&[tenant, b"/", thread].concat());
        };
        key[..tenant.len()].copy_from_slice(tenant);
        key[tenant.len()] = b'/';
        key[tenant.len() + 1..].copy_from_slice(thread);
        self.of(key)
    }
}

/// MurmurHash2 (Austin Appleby's, 32 bits) with Kafka's seed, its sign bit cleared: modulo the number of partitions it is
/// the partition that Kafka's own clients choose for a key.
fn murmur2(key: &[u8]) -> u32 {
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
    (hash ^ (hash >> 15)) & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hash_as_in_kafka_s_own_tests() {
        // From org.apache.kafka.common.utils.UtilsTest, as unsigned values with the sign bit cleared.
        for (key, hash) in [("21", -973932308i32), ("foobar", -790332482), ("a-little-bit-long-string", -985981536)] {
            assert_eq!(murmur2(key.as_bytes()), hash as u32 & 0x7fff_ffff, "{key}");
        }
    }

    #[test]
    fn a_thread_is_where_its_key_is() {
        let long = "x".repeat(300);
        for (tenant, thread) in [("acme", "t"), ("a", "@user:ada"), ("", ""), (&*long, "t"), ("t", &*long)] {
            for hash in [KeyHash::Crc32, KeyHash::Murmur2] {
                let partitioning = Partitioning::new(hash, 1_009);
                let key = format!("{tenant}/{thread}");
                assert_eq!(partitioning.of_thread(tenant, thread), partitioning.of(key.as_bytes()), "{key}");
            }
        }
    }
}
