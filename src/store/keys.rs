//! How keys of rows are made: the partition first, then parts separated by NUL (no name holds one), numbers big-endian, so
//! that order on disk is order in meaning, and the rows of each partition are ranges of their own.
//!
//! A row's partition is that of its thread, in which the thread's records are. What belongs to a user and to no thread is in
//! the partition of the user's inbox, and tickets, groups and custom kinds in that of their records. Dead letters have none: what is done
//! about one may be a record of another partition than the letter.

use crate::partitioning::MAX_PARTITIONS;
use crate::protocol::tickets::TicketOwner;

/// The partition of a topic, by its number there, as keys begin with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Partition(u16);

impl Partition {
    /// How much of a key it takes.
    pub const BYTES: usize = size_of::<u16>();

    pub fn new(within: u32) -> Partition {
        const { assert!(MAX_PARTITIONS <= u16::MAX as u32) }
        Partition(within as u16)
    }

    /// Its number in its topic.
    pub fn number(self) -> u32 {
        self.0.into()
    }

    /// As keys have it.
    pub fn bytes(self) -> [u8; Partition::BYTES] {
        self.0.to_be_bytes()
    }

    /// The partition that a key begins with.
    pub fn of_key(key: &[u8]) -> Option<Partition> {
        Some(Partition(u16::from_be_bytes(*key.first_chunk()?)))
    }
}

/// Where an event stands in its partition's order: the offset of its record, and its seq.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub offset: u64,
    pub seq: u64,
}

/// The partition, and `parts` joined by NUL.
pub fn joined(partition: Partition, parts: &[&str]) -> Vec<u8> {
    let mut key = Vec::with_capacity(Partition::BYTES + parts.iter().map(|part| part.len() + 1).sum::<usize>() + 8);
    key.extend_from_slice(&partition.bytes());
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            key.push(0);
        }
        key.extend_from_slice(part.as_bytes());
    }
    key
}

/// A thread or a user of a tenant, as tables in memory have them.
pub fn in_tenant(tenant: &str, name: &str) -> Vec<u8> {
    [tenant.as_bytes(), &[0], name.as_bytes()].concat()
}

/// The prefix of all keys that begin with these parts.
pub fn prefix(partition: Partition, parts: &[&str]) -> Vec<u8> {
    let mut key = joined(partition, parts);
    key.push(0);
    key
}

/// An event's key.
pub fn event(partition: Partition, tenant: &str, thread: &str, seq: u64) -> Vec<u8> {
    let mut key = prefix(partition, &[tenant, thread]);
    key.extend_from_slice(&seq.to_be_bytes());
    key
}

/// The key of an event by its place.
pub fn arrival(partition: Partition, place: Place) -> Vec<u8> {
    [&partition.bytes()[..], &place.offset.to_be_bytes(), &place.seq.to_be_bytes()].concat()
}

/// The place in a key of `arrivals`.
pub fn place_of(key: &[u8]) -> Option<Place> {
    let (offset, seq) = key.get(Partition::BYTES..)?.split_first_chunk::<8>()?;
    Some(Place { offset: u64::from_be_bytes(*offset), seq: u64::from_be_bytes(seq.try_into().ok()?) })
}

/// The prefix of rows of `subscription_begins` with one part of it.
pub fn begins(partition: Partition, tenant: &str, user: &str, name: &str, part: u32) -> Vec<u8> {
    let mut key = prefix(partition, &[tenant, user, name]);
    key.extend_from_slice(&part.to_be_bytes());
    key
}

/// The key of one of a thread's messages that are being written, by its number.
pub fn open_message(partition: Partition, tenant: &str, thread: &str, number: u64) -> Vec<u8> {
    event(partition, tenant, thread, number)
}

/// The seq at the end of an event's key, or the number at the end of an open message's.
pub fn seq_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*key.last_chunk()?))
}

/// The key of the row with a user's tickets.
pub fn tickets(partition: Partition, owner: &TicketOwner) -> Vec<u8> {
    [&partition.bytes()[..], owner].concat()
}

/// The row of `key_times` or `ticket_times` by which something of the partition is purged; `what` it is by the rest of its
/// own key.
pub fn time(partition: Partition, at: u64, what: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(Partition::BYTES + 8 + what.len());
    out.extend_from_slice(&partition.bytes());
    out.extend_from_slice(&at.to_be_bytes());
    out.extend_from_slice(what);
    out
}

/// The time in a row of `key_times` or `ticket_times`, and what it is about.
pub fn split_time(row: &[u8]) -> Option<(u64, &[u8])> {
    let (_partition, rest) = row.split_at_checked(Partition::BYTES)?;
    let (at, key) = rest.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*at), key))
}

/// A dead letter's key.
pub fn dead_letter(tenant: &str, id: &[u8; 16]) -> Vec<u8> {
    [tenant.as_bytes(), &[0], id].concat()
}

/// The prefix of a list of dead letters.
pub fn dead_letter_list(tenant: &str, list: &str) -> Vec<u8> {
    [tenant.as_bytes(), &[0], list.as_bytes(), &[0]].concat()
}

/// A dead letter in a list: the list's prefix, and when and which; or with a time alone what comes before all of that time.
pub fn dead_letter_time(list: &[u8], cursor: &[u8]) -> Vec<u8> {
    [list, cursor].concat()
}

/// The row that counts a list of dead letters.
pub fn dead_letter_count(tenant: &str, list: &str) -> Vec<u8> {
    [tenant.as_bytes(), &[0], list.as_bytes()].concat()
}

/// The first key after all that begin with `prefix`; prefixes end in NUL or a number, never in all 0xff.
pub fn after(mut prefix: Vec<u8>) -> Vec<u8> {
    while let Some(last) = prefix.pop() {
        if last < u8::MAX {
            prefix.push(last + 1);
            break;
        }
    }
    prefix
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Partition = Partition(1);
    /// As a number it is more than [`ONE`], and its last byte is less.
    const TWO_BYTES: Partition = Partition(256);

    #[test]
    fn events_sort_by_seq_and_stay_in_their_thread() {
        let event = |thread, seq| event(ONE, "t", thread, seq);
        assert!(event("a", 255) < event("a", 256));
        assert!(event("a", u64::MAX) < event("a.b", 1));
        assert!(event("a", 1) < after(prefix(ONE, &["t", "a"])));
        assert!(after(prefix(ONE, &["t", "a"])) <= event("a-", 1));
        assert_eq!(seq_of(&event("a", 77)), Some(77));
    }

    #[test]
    fn keys_sort_by_time_within_their_partition() {
        assert!(time(ONE, 255, b"z") < time(ONE, 256, b"a"));
        assert!(time(ONE, u64::MAX, b"z") < time(TWO_BYTES, 0, b""));
        assert_eq!(split_time(&time(ONE, 77, b"a\0b")), Some((77, &b"a\0b"[..])));
        assert_eq!(split_time(b"short"), None);
    }

    #[test]
    fn each_partition_is_a_range_of_its_own_whatever_its_keys_hold() {
        let keys = [
            joined(ONE, &["z", "z", "z"]),
            event(ONE, "z", "z", u64::MAX),
            begins(ONE, "z", "z", "z", u32::MAX),
            time(ONE, u64::MAX, &[0xff; 300]),
            tickets(ONE, &[0xff; 16]),
        ];
        for key in keys {
            assert!(*key >= ONE.bytes()[..] && key < joined(TWO_BYTES, &[""]), "{key:?}");
            assert_eq!(Partition::of_key(&key), Some(ONE));
        }
        assert_eq!(Partition::of_key(&joined(TWO_BYTES, &["a"])), Some(TWO_BYTES));
        assert_eq!(Partition::of_key(b"a"), None);
        assert_eq!(after(prefix(Partition(u16::MAX), &[""])), [0xff, 0xff, 1], "the end of the last partition's");
    }
}
