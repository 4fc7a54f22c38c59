//! Events in the order in which they came: of each partition of the log, which event was made of the record at which offset.
//! What follows the log beside the projector (search) reads it from where it stopped.
//!
//! It holds nothing that was refused, and each event is in it with its row. A record may be more than one event: the end of a
//! run closes the messages that are open. So a place is an offset and a seq.

use std::sync::atomic::{AtomicU64, Ordering};

use bincode::{BorrowDecode, Encode};
use rocksdb::ReadOptions;

use super::catalogue::ARRIVALS;
use super::keys::Place;
use super::{Batch, Partition, Store, StoreError, keys};
use crate::codec::CodecError;
use crate::partitioning::MAX_PARTITIONS;

/// An event, by its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    pub place: Place,
    /// Its time, in milliseconds.
    pub at: u64,
    pub tenant: String,
    pub thread: String,
}

#[derive(Encode, BorrowDecode)]
pub(super) struct ArrivalRow<'a> {
    pub at: u64,
    pub tenant: &'a str,
    pub thread: &'a str,
}

/// How often events have come in each partition since the start: whoever follows them sees where there may be more without
/// asking the database.
pub(super) struct Arrivals {
    all: AtomicU64,
    each: Box<[AtomicU64]>,
}

impl Default for Arrivals {
    fn default() -> Arrivals {
        let each = (0..MAX_PARTITIONS).map(|_| AtomicU64::new(1)).collect();
        Arrivals { all: AtomicU64::new(1), each }
    }
}

impl Arrivals {
    /// Events of a batch are visible now.
    pub fn note(&self, partitions: &[Partition]) {
        for partition in partitions {
            self.each[partition.number() as usize].fetch_add(1, Ordering::Release);
        }
        if !partitions.is_empty() {
            self.all.fetch_add(1, Ordering::Release);
        }
    }
}

impl Store {
    /// How many partitions of events there are.
    pub fn event_partitions(&self) -> u32 {
        self.partitioning.each()
    }

    /// A number that grows with each commit of events.
    pub fn arrivals_version(&self) -> u64 {
        self.arrivals.all.load(Ordering::Acquire)
    }

    /// The same of one partition.
    pub fn arrivals_version_of(&self, partition: Partition) -> u64 {
        self.arrivals.each[partition.number() as usize].load(Ordering::Acquire)
    }

    /// The first events of a partition after a place, or from its beginning on.
    pub fn arrivals(
        &self,
        partition: Partition,
        after: Option<Place>,
        limit: usize,
    ) -> Result<Vec<Arrival>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(match after {
            // Nothing is between a key and the same one with a NUL.
            Some(after) => [&keys::arrival(partition, after)[..], &[0]].concat(),
            None => partition.bytes().to_vec(),
        });
        options.set_iterate_upper_bound(keys::after(partition.bytes().to_vec()));
        let mut rows = self.db.raw_iterator_cf_opt(&self.family(ARRIVALS), options);
        rows.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some((key, value)) = rows.item()
        {
            let ArrivalRow { at, tenant, thread } = self.decoded(ARRIVALS, value)?;
            let place = keys::place_of(key).ok_or_else(|| {
                let source = CodecError::Payload("its key names no place in the log".to_owned());
                self.note(StoreError::Damaged { family: ARRIVALS, source })
            })?;
            found.push(Arrival { place, at, tenant: tenant.to_owned(), thread: thread.to_owned() });
            rows.next();
        }
        rows.status().map_err(|error| self.note(error.into()))?;
        Ok(found)
    }

    /// The event at a place.
    pub fn arrival(&self, partition: Partition, place: Place) -> Result<Option<Arrival>, StoreError> {
        let found = self.db.get_pinned_cf(&self.family(ARRIVALS), keys::arrival(partition, place));
        let Some(row) = found.map_err(|error| self.note(error.into()))? else { return Ok(None) };
        let ArrivalRow { at, tenant, thread } = self.decoded(ARRIVALS, &row)?;
        Ok(Some(Arrival { place, at, tenant: tenant.to_owned(), thread: thread.to_owned() }))
    }
}

impl Batch<'_> {
    pub(super) fn put_arrival(&mut self, partition: Partition, place: Place, row: &ArrivalRow<'_>) {
        self.put(ARRIVALS, &keys::arrival(partition, place), row);
        if self.arrived.last() != Some(&partition) {
            self.arrived.push(partition);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::EventRow;
    use super::*;
    use crate::partitioning::{KeyHash, Partitioning};

    #[test]
    fn events_are_found_in_the_order_in_which_they_came_and_a_partition_says_when_there_are_more() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut store = Store::open(folder.path()).expect("it opens");
        store.begin("e", Partitioning::new(KeyHash::Murmur2, 4), &[], &[0; 12]).expect("it begins");
        let (partition, other) = (store.partition("acme", "t"), store.partition("acme", "elsewhere"));
        assert_ne!(partition, other, "the test needs two");
        let before = (store.arrivals_version(), store.arrivals_version_of(partition), store.arrivals_version_of(other));

        let mut batch = store.batch();
        // One record may be two events, and what came first may have the higher seq of another thread.
        for (offset, seq) in [(300, 1), (7, 9), (300, 2), (256, 4)] {
            let row = EventRow { offset, kind: "x.y", class: 1, privileged: false, hash: [0; 32], frame: "{}" };
            batch.put_event("acme", "t", seq, &row, 10 * offset);
        }
        store.commit(batch).expect("it commits");

        let places = |after, limit| -> Vec<(u64, u64)> {
            let found = store.arrivals(partition, after, limit).expect("it is read");
            found.iter().map(|it| (it.place.offset, it.place.seq)).collect()
        };
        assert_eq!(places(None, 10), [(7, 9), (256, 4), (300, 1), (300, 2)]);
        assert_eq!(places(Some(Place { offset: 256, seq: 4 }), 1), [(300, 1)]);
        assert_eq!(places(Some(Place { offset: 300, seq: 1 }), 10), [(300, 2)]);
        assert_eq!(places(Some(Place { offset: 300, seq: 2 }), 10), []);
        let found = store.arrival(partition, Place { offset: 7, seq: 9 }).expect("it is read").expect("it is there");
        assert_eq!((&*found.tenant, &*found.thread, found.at), ("acme", "t", 70));
        assert_eq!(store.arrival(partition, Place { offset: 7, seq: 8 }).expect("it is read"), None);
        assert_eq!(store.arrivals(other, None, 10).expect("it is read"), []);

        let after = (store.arrivals_version(), store.arrivals_version_of(partition), store.arrivals_version_of(other));
        assert!(after.0 > before.0 && after.1 > before.1 && after.2 == before.2);
    }
}
