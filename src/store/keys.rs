//! How keys of rows are made: parts separated by NUL (no name holds one), numbers big-endian, so that order on disk is order
//! in meaning.

/// `parts` joined by NUL.
pub fn joined(parts: &[&str]) -> Vec<u8> {
    let mut key = Vec::with_capacity(parts.iter().map(|part| part.len() + 1).sum::<usize>() + 8);
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            key.push(0);
        }
        key.extend_from_slice(part.as_bytes());
    }
    key
}

/// The prefix of all keys that begin with these parts.
pub fn prefix(parts: &[&str]) -> Vec<u8> {
    let mut key = joined(parts);
    key.push(0);
    key
}

/// An event's key.
pub fn event(tenant: &str, thread: &str, seq: u64) -> Vec<u8> {
    let mut key = prefix(&[tenant, thread]);
    key.extend_from_slice(&seq.to_be_bytes());
    key
}

/// The prefix of rows of `subscription_begins` with one part of it.
pub fn begins(tenant: &str, user: &str, name: &str, part: u32) -> Vec<u8> {
    let mut key = prefix(&[tenant, user, name]);
    key.extend_from_slice(&part.to_be_bytes());
    key
}

/// The seq at the end of an event's key.
pub fn seq_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*key.last_chunk()?))
}

/// The row of `key_times` for an idempotency key's row, and of `ticket_times` for the row of a user's tickets.
pub fn key_time(partition: u32, at: u64, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(12 + key.len());
    out.extend_from_slice(&partition.to_be_bytes());
    out.extend_from_slice(&at.to_be_bytes());
    out.extend_from_slice(key);
    out
}

/// The time and the key of the other row in a row of `key_times` or `ticket_times`.
pub fn split_key_time(row: &[u8]) -> Option<(u64, &[u8])> {
    let (_partition, rest) = row.split_first_chunk::<4>()?;
    let (at, key) = rest.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*at), key))
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

    #[test]
    fn events_sort_by_seq_and_stay_in_their_thread() {
        assert!(event("t", "a", 255) < event("t", "a", 256));
        assert!(event("t", "a", u64::MAX) < event("t", "a.b", 1));
        assert!(event("t", "a", 1) < after(prefix(&["t", "a"])));
        assert!(after(prefix(&["t", "a"])) <= event("t", "a-", 1));
        assert_eq!(seq_of(&event("t", "a", 77)), Some(77));
    }

    #[test]
    fn keys_sort_by_time_within_their_partition() {
        assert!(key_time(1, 255, b"z") < key_time(1, 256, b"a"));
        assert!(key_time(1, u64::MAX, b"z") < key_time(2, 0, b""));
        assert_eq!(split_key_time(&key_time(1, 77, b"a\0b")), Some((77, &b"a\0b"[..])));
        assert_eq!(split_key_time(b"short"), None);
    }
}
