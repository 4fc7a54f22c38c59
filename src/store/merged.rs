//! Rows of all partitions as one list, in the order of what follows their prefix: what a user, or a tenant, has in whichever
//! threads.
//!
//! In each partition they are a range. Each range is read some rows at a time, and the next row is the first of those
//! that stand in front. So a list costs a seek for each partition, and more of them only as it gets longer; what it
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

/// A row of such a list.
pub(super) struct MergedRow {
    /// What follows the prefix in its key.
    pub rest: Vec<u8>,
    pub value: Box<[u8]>,
}

pub(super) struct Merged<'s> {
    store: &'s Store,
    snapshot: SnapshotWithThreadMode<'s, DB>,
    family: &'static str,
    ranges: Vec<Range>,
    /// Of each range the next row, by what follows its prefix.
    fronts: BTreeMap<(Vec<u8>, usize), Box<[u8]>>,
    /// What is reported once, after which nothing more comes.
    failed: Option<StoreError>,
}

/// The rows of one partition.
struct Range {
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
    ) -> Merged<'s> {
        let ranges = self.partitions().map(|partition| {
            let prefix = prefix(partition);
            let to = span.to.map_or_else(|| keys::after(prefix.clone()), |to| [&prefix, to].concat());
            let from = [&prefix, span.from].concat();
            let next_read = if from < to { FIRST_READ } else { 0 };
            Range { prefix: prefix.len(), from, to, read: VecDeque::new(), next_read }
        });
        let ranges: Vec<Range> = ranges.collect();
        let snapshot = self.db.snapshot();
        let mut merged = Merged { store: self, snapshot, family, ranges, fronts: BTreeMap::new(), failed: None };
        merged.failed = (0..merged.ranges.len()).try_for_each(|at| merged.advance(at)).err();
        merged
    }
}

impl Merged<'_> {
    /// Puts the next row of a range in front.
    fn advance(&mut self, at: usize) -> Result<(), StoreError> {
        let range = &mut self.ranges[at];
        if range.read.is_empty() && range.next_read > 0 {
            range.read(self.store, &self.snapshot, self.family)?;
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
    ) -> Result<(), StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(&*self.from);
        options.set_iterate_upper_bound(&*self.to);
        let mut rows = snapshot.raw_iterator_cf_opt(&store.family(family), options);
        rows.seek_to_first();
        while self.read.len() < self.next_read
            && let Some((key, value)) = rows.item()
        {
            self.read.push_back((key.into(), value.into()));
            rows.next();
        }
        rows.status().map_err(|error| store.note(error.into()))?;

        match self.read.back() {
            Some((last, _)) if self.read.len() == self.next_read => {
                // The first key after it: nothing is between a key and the same one with a NUL.
                self.from = [last, &[0][..]].concat();
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
        let ((rest, at), value) = self.fronts.pop_first()?;
        self.failed = self.advance(at).err();
        Some(Ok(MergedRow { rest, value }))
    }
}

#[cfg(test)]
mod tests {

    use super::super::runs::{EventRef, RunKey, RunRow};
    use super::super::{MemberRow, ThreadRow};
    use super::*;
    use crate::partitioning::{KeyHash, Partitioning};

    const PARTITIONS: u32 = 64;
    /// Enough that partitions are read several times.
    const ROWS: usize = 2_000;

    /// A store with as many partitions; the folder holds what it keeps.
    fn begun(partitions: u32) -> (Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut store = Store::open(folder.path()).expect("it opens");
        let partitioning = Partitioning::new(KeyHash::Murmur2, partitions);
        store.begin("e", partitioning, &[], &vec![0; 3 * partitions as usize]).expect("it begins");
        (store, folder)
    }

    fn run(n: usize) -> (RunKey, RunRow) {
        // Ten of them begin at the same time.
        let started = EventRef { seq: 1, at: (n as u64 * 7_919) % ROWS as u64 / 10 };
        let row = RunRow { started, ..RunRow::new("scout".into(), "ada".into()) };
        (RunKey::new("acme", &format!("t{n}"), "r"), row)
    }

    fn all<T, E: std::fmt::Debug>(rows: impl Iterator<Item = Result<T, E>>) -> Vec<T> {
        rows.map(|row| row.expect("it is read")).collect()
    }

    #[test]
    fn open_runs_of_all_partitions_come_by_time_then_name_and_a_page_goes_on_where_the_last_ended() {
        let (store, _folder) = begun(PARTITIONS);
        let mut batch = store.batch();
        let mut expected = Vec::new();
        for n in 0..ROWS {
            let (key, row) = run(n);
            batch.put_new_run(&key, &row);
            expected.push((row.started.at, key.thread.clone()));
            let other = RunKey { tenant: if n % 2 == 0 { "acm".into() } else { "acme2".into() }, ..key };
            batch.put_new_run(&other, &row);
        }
        store.commit(batch).expect("it commits");
        expected.sort();

        let listed = all(store.open_runs_by_time("acme", false, None));
        let named = |(_, key): &(Vec<u8>, RunKey)| {
            (run(key.thread[1..].parse().expect("a number")).1.started.at, key.thread.clone())
        };
        assert_eq!(listed.iter().map(named).collect::<Vec<_>>(), expected);

        for limit in [1, 3, 100] {
            let (mut paged, mut after) = (Vec::new(), None::<Vec<u8>>);
            // With pages of one, some hundred show it.
            while paged.len() < ROWS.min(limit * 300) {
                let page = all(store.open_runs_by_time("acme", false, after.as_deref()).take(limit));
                after = page.last().map(|(time, _)| time.clone());
                assert!(!page.is_empty(), "there are more");
                paged.extend(page);
            }
            assert!(listed.starts_with(&paged), "pages of {limit}");
        }
        let last = listed.last().map(|(time, _)| &time[..]);
        assert_eq!(all(store.open_runs_by_time("acme", false, last)), []);
        assert_eq!(all(store.open_runs_by_time("nobody", false, None)), []);
        assert_eq!(all(store.open_runs_by_time("acme", true, None)), []);
    }

    #[test]
    fn a_list_is_of_one_moment() {
        let (store, _folder) = begun(PARTITIONS);
        let join = |from: usize, to: usize| {
            let mut batch = store.batch();
            for n in from..to {
                batch.put_member("acme", &format!("t{n:05}"), "ada", &MemberRow { since: 1 });
            }
            store.commit(batch).expect("it commits");
        };
        join(0, ROWS);
        let mut listed = store.threads_of("acme", "ada");
        let first = listed.next().expect("there is one").expect("it is read");
        join(ROWS, 2 * ROWS);
        let rest = all(listed);
        let expected: Vec<String> = (0..ROWS).map(|n| format!("t{n:05}")).collect();
        assert_eq!([&[first][..], &rest].concat(), expected);
        assert_eq!(all(store.threads_of("acme", "ada")).len(), 2 * ROWS);
        assert_eq!(all(store.threads_of("acme", "ad")), [""; 0]);
    }

    #[test]
    fn threads_come_by_their_names_whatever_their_partition_and_those_that_exist_by_name_are_left_out() {
        for partitions in [1, PARTITIONS] {
            let (store, _folder) = begun(partitions);
            let names: Vec<String> =
                ["0", "9z", "@tenant", "@user:ada", "A", "Z", "a", "a.b", "z"].map(str::to_owned).into();
            let mut batch = store.batch();
            for (head, name) in (1..).zip(&names) {
                batch.put_thread("acme", name, &ThreadRow { head, ..ThreadRow::default() });
                batch.put_thread("acme-2", name, &ThreadRow::default());
            }
            store.commit(batch).expect("it commits");
            let from = |after: Option<&str>, limit| {
                let found = store.threads_after("acme", after, limit).expect("it is read");
                found.into_iter().map(|(name, row)| format!("{name} {}", row.head)).collect::<Vec<_>>()
            };
            assert_eq!(from(None, 100), ["0 1", "9z 2", "A 5", "Z 6", "a 7", "a.b 8", "z 9"]);
            assert_eq!(from(None, 3), ["0 1", "9z 2", "A 5"]);
            assert_eq!(from(Some("9z"), 2), ["A 5", "Z 6"]);
            assert_eq!(from(Some("a"), 2), ["a.b 8", "z 9"]);
            assert_eq!(from(Some("z"), 2), [""; 0]);
        }
    }

    #[test]
    fn whether_two_users_share_a_thread_is_found_in_whichever_partition_it_is() {
        let (store, _folder) = begun(PARTITIONS);
        let mut batch = store.batch();
        for n in 0..200 {
            batch.put_member("acme", &format!("a{n}"), "ada", &MemberRow { since: 1 });
            batch.put_member("acme", &format!("b{n}"), "bob", &MemberRow { since: 1 });
        }
        for user in ["ada", "eve"] {
            batch.put_member("acme", "together", user, &MemberRow { since: 1 });
        }
        store.commit(batch).expect("it commits");
        let look = |one: &str, other: &str| store.look_up_shared_thread("acme", one, other).expect("it is read");
        assert_eq!((look("ada", "eve"), look("eve", "ada")), (true, true));
        assert_eq!((look("ada", "bob"), look("bob", "eve"), look("eve", "nobody")), (false, false, false));
    }
}
