//! Two stores that should hold the same, row by row: where they first differ, in words.
//!
//! Both are walked once, in the order of their keys, so it takes no memory however large they are.

use std::fmt;

use super::catalogue::{
    ARRIVALS, DEAD_LETTER_COUNTS, DEAD_LETTER_TIMES, DEAD_LETTERS, EVENTS, KEYS, MEMBERS, MESSAGE_TEXTS, MESSAGES,
    META, OPEN_MESSAGES, OPEN_RUNS, RECEIPTS, REQUEUED_DELIVERIES, RUN_ANSWERS, RUN_CALLS, RUN_EVENTS, RUN_MESSAGES,
    RUN_STARTS, RUNS, THREADS, WORK, WORKERS,
};
use super::{EventRow, Partition, SCHEMA, Store, StoreError, StoreRow, ThreadRow, keys};
use crate::codec;

/// Families whose keys name a tenant and a thread after the partition.
const OF_THREADS: [&str; 18] = [
    THREADS,
    MEMBERS,
    EVENTS,
    KEYS,
    RECEIPTS,
    WORK,
    WORKERS,
    RUNS,
    RUN_CALLS,
    RUN_ANSWERS,
    RUN_EVENTS,
    RUN_STARTS,
    OPEN_RUNS,
    MESSAGES,
    RUN_MESSAGES,
    OPEN_MESSAGES,
    MESSAGE_TEXTS,
    REQUEUED_DELIVERIES,
];

/// No more of a row is told.
const MOST: usize = 400;

/// What was compared.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Compared {
    pub rows: u64,
    pub threads: u64,
    pub events: u64,
}

/// A row that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub family: &'static str,
    pub tenant: Option<String>,
    pub thread: Option<String>,
    /// Of an event.
    pub seq: Option<u64>,
    /// The key, for people.
    pub key: String,
    /// The row as it should be; none if it should not be there.
    pub expected: Option<String>,
    pub found: Option<String>,
}

impl Store {
    /// Walks this store, which is as it should be, and another one; ends at the first row in which that differs. `progress` gets
    /// how many rows were walked.
    pub fn compare(
        &self,
        other: &Store,
        mut progress: impl FnMut(u64),
    ) -> Result<Result<Compared, Difference>, StoreError> {
        let mut compared = Compared::default();
        let (mut expected, mut found) = (self.rows(), other.rows());
        loop {
            match (expected.next().transpose()?, found.next().transpose()?) {
                (None, None) => return Ok(Ok(compared)),
                (Some(row), Some(other)) if row == other => compared.count(row.0),
                (expected, found) => return Ok(Err(Difference::of(expected, found))),
            }
            if compared.rows.is_multiple_of(10_000) {
                progress(compared.rows);
            }
        }
    }

    /// Counts what this store holds, as [`Store::compare`] does.
    pub fn count(&self) -> Result<Compared, StoreError> {
        let mut compared = Compared::default();
        self.rows().try_for_each(|row| row.map(|row| compared.count(row.0)))?;
        Ok(compared)
    }
}

impl Compared {
    fn count(&mut self, family: &str) {
        self.rows += 1;
        self.threads += u64::from(family == THREADS);
        self.events += u64::from(family == EVENTS);
    }
}

impl Difference {
    /// Of the rows that both walks have come to, at least one of which there is: what comes first in the walk and is not in the
    /// other one, or what both have under one key.
    fn of(expected: Option<StoreRow>, found: Option<StoreRow>) -> Difference {
        let place = |row: &StoreRow| (super::catalogue::names().position(|name| name == row.0), row.1.clone());
        let (expected, found) = match (expected, found) {
            (Some(a), Some(b)) if place(&a) < place(&b) => (Some(a), None),
            (Some(a), Some(b)) if place(&a) > place(&b) => (None, Some(b)),
            both => both,
        };
        let (family, key) = expected
            .as_ref()
            .or(found.as_ref())
            .map_or((META, Default::default()), |(family, key, _)| (*family, key.clone()));
        let value = |row: Option<StoreRow>| row.map(|(_, _, value)| described(family, &value));
        let (tenant, thread, seq) = owner(family, &key);
        let key = match family {
            ARRIVALS => keys::place_of(&key).map(|place| format!("offset {}, seq {}", place.offset, place.seq)),
            _ => None,
        }
        .unwrap_or_else(|| key.escape_ascii().to_string());
        Difference { family, tenant, thread, seq, key, expected: value(expected), found: value(found) }
    }
}

/// The tenant, the thread and the seq that a key names.
fn owner(family: &str, key: &[u8]) -> (Option<String>, Option<String>, Option<u64>) {
    let text = |part: Option<&[u8]>| part.map(|part| String::from_utf8_lossy(part).into_owned());
    let rest = match family {
        META | ARRIVALS => return (None, None, None),
        DEAD_LETTERS | DEAD_LETTER_TIMES | DEAD_LETTER_COUNTS => key,
        _ => key.get(Partition::BYTES..).unwrap_or_default(),
    };
    let mut parts = rest.splitn(3, |byte| *byte == 0);
    let tenant = text(parts.next());
    let thread = text(parts.next()).filter(|_| OF_THREADS.contains(&family));
    (tenant, thread, keys::seq_of(key).filter(|_| family == EVENTS))
}

fn described(family: &str, value: &[u8]) -> String {
    let read = match family {
        EVENTS => codec::decode::<EventRow>(SCHEMA, value).map(|row| {
            let hash = blake3::Hash::from_bytes(row.hash);
            format!("hash {hash}, record at {}, kind {}, {}", row.offset, row.kind, row.frame)
        }),
        THREADS => codec::decode::<ThreadRow>(SCHEMA, value).map(|row| {
            let hash = blake3::Hash::from_bytes(row.hash);
            format!("head {}, hash {hash}, title {:?}, {} open runs", row.head, row.title, row.open_runs)
        }),
        _ => Ok(format!("{} bytes, {}", value.len(), value.escape_ascii())),
    };
    let mut text = read.unwrap_or_else(|error| format!("{error}: {}", value.escape_ascii()));
    if let Some((at, _)) = text.char_indices().nth(MOST) {
        text.truncate(at);
        text.push('…');
    }
    text
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { family, tenant, thread, seq, key, expected, found } = self;
        match (tenant, thread, seq) {
            (Some(tenant), Some(thread), Some(seq)) => write!(f, "thread {thread} of {tenant}, seq {seq}: ")?,
            (Some(tenant), Some(thread), None) => write!(f, "thread {thread} of {tenant}: ")?,
            _ => {}
        }
        let what = match (expected, found) {
            (Some(_), None) => "is missing",
            (None, _) => "should not be there",
            (Some(_), Some(_)) => "is not what the log makes",
        };
        write!(f, "the row of {family} {what} (key {key})")?;
        if let Some(expected) = expected {
            write!(f, "; expected {expected}")?;
        }
        match found {
            Some(found) => write!(f, "; found {found}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MemberRow, Store};
    use super::*;
    use crate::partitioning::{KeyHash, Partitioning};

    fn store(events: &[(&str, u64, &str)], members: &[&str]) -> (Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut store = Store::open(folder.path()).expect("it opens");
        store.begin("e", Partitioning::new(KeyHash::Murmur2, 4), &[], &[0; 12]).expect("it begins");
        let mut batch = store.batch();
        for (thread, seq, frame) in events {
            let row = EventRow { offset: *seq, kind: "x.y", class: 1, privileged: false, hash: [7; 32], frame };
            batch.put_event("acme", thread, *seq, &row, 10);
        }
        for user in members {
            batch.put_member("acme", "t", user, &MemberRow { since: 1 });
        }
        store.commit(batch).expect("it commits");
        (store, folder)
    }

    fn difference(one: &Store, other: &Store) -> Difference {
        one.compare(other, |_| {}).expect("both are read").expect_err("they differ")
    }

    #[test]
    fn the_same_rows_are_the_same_and_each_difference_says_whose_row_it_is_and_what_is_wrong() {
        let events = [("t", 1, "one"), ("t", 2, "two"), ("u", 1, "three")];
        let (whole, _a) = store(&events, &["ada"]);
        let (same, _b) = store(&events, &["ada"]);
        let compared = whole.compare(&same, |_| {}).expect("both are read").expect("they are the same");
        assert_eq!((compared.events, compared.threads), (3, 0));
        assert!(compared.rows > 6, "with arrivals and members: {compared:?}");

        let (other, _c) = store(&[("t", 1, "one"), ("t", 2, "TWO"), ("u", 1, "three")], &["ada"]);
        let found = difference(&whole, &other);
        assert_eq!((found.family, found.tenant.as_deref()), (EVENTS, Some("acme")));
        assert_eq!((found.thread.as_deref(), found.seq), (Some("t"), Some(2)));
        let (expected, was) =
            (found.expected.as_deref().expect("it is there"), found.found.as_deref().expect("so is this"));
        assert!(expected.ends_with("two") && was.ends_with("TWO"), "{found}");

        let (short, _d) = store(&[("t", 1, "one"), ("u", 1, "three")], &["ada"]);
        let missing = difference(&whole, &short);
        assert_eq!((missing.thread.as_deref(), missing.seq, &missing.found), (Some("t"), Some(2), &None), "{missing}");
        let surplus = difference(&short, &whole);
        assert_eq!(
            (surplus.thread.as_deref(), surplus.seq, &surplus.expected),
            (Some("t"), Some(2), &None),
            "{surplus}"
        );

        let (without, _e) = store(&events, &[]);
        let member = difference(&whole, &without);
        assert_eq!((member.family, member.thread.as_deref(), &member.found), (MEMBERS, Some("t"), &None), "{member}");
        assert!(member.to_string().contains("thread t of acme: the row of members is missing"), "{member}");
    }
}
