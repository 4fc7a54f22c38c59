//! Rows of all partitions as one list, in the order of what follows their prefix: what a user, or a tenant, has in whichever
//! threads.
//!
//! In each partition they are a range. Each range is read some rows at a time, and the next row is the first (or last) of
//! those that stand in front. So a list costs a seek for each partition, and more of them only as it gets longer; what it
//! holds in memory is bounded by the partitions and not by the list. All of it is of one moment, whatever is committed
//! meanwhile.

use std::collections::{BTreeMap, VecDeque};

use rocksdb::{DB, ReadOptions, SnapshotWithThreadMode};

use super::keys::Partition;
use super::{RawRow, Store, StoreError, keys};

/// Rows read at once in a partition, the first time; twice as many each time after that, and at most so many.
const FIRST_READ: usize = 4;
const MOST_READ: usize = 256;

/// Which rows under the prefix, by what follows it: from there on, and before that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'a> {
    pub from: &'a [u8],
    pub to: Option<&'a [u8]>,
}

impl Span<'static> {
    pub const ALL: Span<'static> = Span { from: &[], to: None };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Ascending,
    Descending,
}

/// A row of such a list.
pub(super) struct MergedRow {
    pub partition: Partition,
    /// What follows the prefix in its key.
    pub rest: Vec<u8>,
    pub value: Box<[u8]>,
}

pub(super) struct Merged<'s> {
    store: &'s Store,
    snapshot: SnapshotWithThreadMode<'s, DB>,
    family: &'static str,
    order: Order,
    ranges: Vec<Range>,
    /// Of each range the next row, by what follows its prefix.
    fronts: BTreeMap<(Vec<u8>, usize), Box<[u8]>>,
    /// What is reported once, after which nothing more comes.
    failed: Option<StoreError>,
}

/// The rows of one partition.
struct Range {
    partition: Partition,
    /// The length of the prefix.
    prefix: usize,
    /// The keys that are still to be read: from here on, and before that.
    from: Vec<u8>,
    to: Vec<u8>,
    read: VecDeque<RawRow>,
    /// How many are read next time; 0 once there are no more.
    next_read: usize,
}

impl Store {
    /// What stands in a family under a prefix in each partition.
    pub(super) fn merged<'s>(
        &'s self,
        family: &'static str,
        prefix: impl Fn(Partition) -> Vec<u8>,
        span: Span<'_>,
        order: Order,
    ) -> Merged<'s> {
        let ranges = self.partitions().map(|partition| {
            let prefix = prefix(partition);
            let to = span.to.map_or_else(|| keys::after(prefix.clone()), |to| [&prefix, to].concat());
            let from = [&prefix, span.from].concat();
            let next_read = if from < to { FIRST_READ } else { 0 };
            Range { partition, prefix: prefix.len(), from, to, read: VecDeque::new(), next_read }
        });
        let ranges: Vec<Range> = ranges.collect();
        let snapshot = self.db.snapshot();
        let mut merged = Merged { store: self, snapshot, family, order, ranges, fronts: BTreeMap::new(), failed: None };
        merged.failed = (0..merged.ranges.len()).try_for_each(|at| merged.advance(at)).err();
        merged
    }
}

impl Merged<'_> {
    /// Puts the next row of a range in front.
    fn advance(&mut self, at: usize) -> Result<(), StoreError> {
        let range = &mut self.ranges[at];
        if range.read.is_empty() && range.next_read > 0 {
            range.read(self.store, &self.snapshot, self.family, self.order)?;
        }
        if let Some((key, value)) = range.read.pop_front() {
            self.fronts.insert((key[range.prefix..].to_vec(), at), value);
        }
        Ok(())
    }
}

impl Range {
    fn read(
        &mut self,
        store: &Store,
        snapshot: &SnapshotWithThreadMode<'_, DB>,
        family: &'static str,
        order: Order,
    ) -> Result<(), StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(&*self.from);
        options.set_iterate_upper_bound(&*self.to);
        let mut rows = snapshot.raw_iterator_cf_opt(&store.family(family), options);
        match order {
            Order::Ascending => rows.seek_to_first(),
            Order::Descending => rows.seek_to_last(),
        }
        while self.read.len() < self.next_read
            && let Some((key, value)) = rows.item()
        {
            self.read.push_back((key.into(), value.into()));
            match order {
                Order::Ascending => rows.next(),
                Order::Descending => rows.prev(),
            }
        }
        rows.status().map_err(|error| store.note(error.into()))?;

        match self.read.back() {
            Some((last, _)) if self.read.len() == self.next_read => {
                match order {
                    // The first key after it: nothing is between a key and the same one with a NUL.
                    Order::Ascending => self.from = [last, &[0][..]].concat(),
                    Order::Descending => self.to = last.to_vec(),
                }
                self.next_read = (self.next_read * 2).min(MOST_READ);
            }
            _ => self.next_read = 0,
        }
        Ok(())
    }
}

impl Iterator for Merged<'_> {
    type Item = Result<MergedRow, StoreError>;

    fn next(&mut self) -> Option<Result<MergedRow, StoreError>> {
        if let Some(error) = self.failed.take() {
            self.fronts.clear();
            return Some(Err(error));
        }
        let ((rest, at), value) = match self.order {
            Order::Ascending => self.fronts.pop_first(),
            Order::Descending => self.fronts.pop_last(),
        }?;
        self.failed = self.advance(at).err();
        Some(Ok(MergedRow { partition: self.ranges[at].partition, rest, value }))
    }
}
