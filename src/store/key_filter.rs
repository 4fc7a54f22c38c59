//! Which idempotency keys are certainly not taken, without asking the database: nearly every key is new, and to find nothing
//! costs the database more than the rest of a publish's judgement.
//!
//! A Bloom filter of a fixed size, of [`BITS_A_KEY`] bits for each key that it is good for, each key within one cache line (Putze,
//! Sanders, Singler: Cache-, Hash- and Space-Efficient Bloom Filters, 2007). Keys are only ever added, so that from time to
//! time a new filter takes its place.
//!
//! Invariants:
//! - a filter says "not taken" only once it is complete: all keys that were there when it was begun have been read into it,
//!   [`CHUNK`] with each lookup, and each commit since has added its own before anybody could see them;
//! - a filter is begun and a commit written one after the other, so that a key is either found by the reading or added;
//! - where the keys of one lifetime are more than half of what a filter is good for, it is given up, every lookup asks the
//!   database, and the next attempt comes with as many new keys: reading costs no more than two rows for each key taken.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, TryLockError};

use super::{Partition, Store, StoreError, keys};

/// What a filter takes for each key: with these, one new key in 30 is looked up in vain.
const BITS_A_KEY: usize = 8;
/// How many bits of its line a key sets.
const PROBES: u32 = 6;
/// A cache line.
const LINE_WORDS: usize = 8;
const LINE_BITS: usize = LINE_WORDS * 64;
/// How many keys are read into a filter with one lookup.
const CHUNK: usize = 256;

pub(super) struct KeyFilter {
    /// There is none until the first key is taken.
    filter: RwLock<Option<Filter>>,
    bytes: usize,
    /// Keyed at random, so that nobody chooses keys that fill a line.
    hasher: RandomState,
}

struct Filter {
    words: Vec<AtomicU64>,
    /// Keys that were added.
    keys: AtomicUsize,
    /// Where reading goes on; nothing once it has ended.
    reading: Mutex<Option<Vec<u8>>>,
    complete: AtomicBool,
}

impl KeyFilter {
    /// A filter of at most so many bytes.
    pub(super) fn new(bytes: usize) -> KeyFilter {
        KeyFilter { filter: RwLock::new(None), bytes, hasher: RandomState::new() }
    }

    /// Whether a key may be taken. Reads some more of the store's keys while it does not know them all.
    fn may_hold(&self, store: &Store, key: &[u8]) -> Result<bool, StoreError> {
        let filter = self.filter.read().unwrap_or_else(PoisonError::into_inner);
        let Some(filter) = &*filter else { return Ok(true) };
        if !filter.complete.load(Ordering::Acquire) {
            filter.read_more(store)?;
            return Ok(true);
        }
        Ok(filter.holds(self.hash(key)))
    }

    /// What a key is known by here.
    pub(super) fn hash(&self, key: &[u8]) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Writes a batch that takes the keys with these hashes.
    pub(super) fn commit<T>(&self, taken: &[u64], write: impl FnOnce() -> T) -> T {
        if taken.is_empty() {
            return write();
        }
        self.begin_anew_if_full();
        let filter = self.filter.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(filter) = &*filter {
            taken.iter().for_each(|hash| filter.add(*hash));
        }
        write()
    }

    fn begin_anew_if_full(&self) {
        let has_room = |filter: &Filter| filter.keys.load(Ordering::Relaxed) < filter.capacity();
        let is_full = |filter: &Option<Filter>| !filter.as_ref().is_some_and(has_room);
        if is_full(&self.filter.read().unwrap_or_else(PoisonError::into_inner)) {
            let mut filter = self.filter.write().unwrap_or_else(PoisonError::into_inner);
            if is_full(&filter) {
                *filter = Some(Filter::begin(self.bytes));
            }
        }
    }
}

impl Filter {
    fn begin(bytes: usize) -> Filter {
        let words = (bytes / size_of::<u64>()).next_multiple_of(LINE_WORDS).max(LINE_WORDS);
        Filter {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            keys: AtomicUsize::new(0),
            reading: Mutex::new(Some(Vec::new())),
            complete: AtomicBool::new(false),
        }
    }

    /// How many keys it is good for.
    fn capacity(&self) -> usize {
        self.words.len() * 64 / BITS_A_KEY
    }

    fn add(&self, hash: u64) {
        self.keys.fetch_add(1, Ordering::Relaxed);
        for (word, bit) in self.bits(hash) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn holds(&self, hash: u64) -> bool {
        self.bits(hash).all(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// The bits of a key. The upper half of the hash chooses the line, all of it the bits in there.
    fn bits(&self, hash: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let lines = self.words.len() / LINE_WORDS;
        let line = ((u128::from(hash) * lines as u128) >> 64) as usize * LINE_WORDS;
        let mixed = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (0..PROBES).map(move |probe| {
            let bit = (mixed >> (probe * LINE_BITS.ilog2())) as usize % LINE_BITS;
            (&self.words[line + bit / 64], 1 << (bit % 64))
        })
    }

    /// Reads the next keys of the store, unless somebody else does.
    fn read_more(&self, store: &Store) -> Result<(), StoreError> {
        let mut reading = match self.reading.try_lock() {
            Ok(reading) => reading,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let Some(from) = reading.as_ref() else { return Ok(()) };

        let mut times = store.key_times(from, &[0xFF; 3], CHUNK)?;
        for time in &times {
            if let (Some(partition), Some((_, rest))) = (Partition::of_key(time), keys::split_time(time)) {
                self.add(store.key_filter.hash(&[&partition.bytes()[..], rest].concat()));
            }
        }
        let is_last = times.len() < CHUNK;
        let is_too_much = self.keys.load(Ordering::Relaxed) > self.capacity() / 2;
        *reading = times.pop().filter(|_| !is_last && !is_too_much).map(|last| [&last[..], &[0]].concat());
        if is_last && !is_too_much {
            self.complete.store(true, Ordering::Release);
        }
        Ok(())
    }
}

impl Store {
    /// Whether an idempotency key may be taken; where not, there is no row of it.
    pub(super) fn may_be_taken(&self, key: &[u8]) -> Result<bool, StoreError> {
        self.key_filter.may_hold(self, key)
    }
}

#[cfg(test)]
mod tests {
    use crate::store::{KeyRow, Partition, Store, StoreMemory, keys};

    fn store(folder: &tempfile::TempDir, key_filter: usize) -> Store {
        Store::open_with(folder.path(), StoreMemory { key_filter, ..StoreMemory::default() }).expect("it opens")
    }

    fn key(n: u64) -> Vec<u8> {
        keys::joined(Partition::new((n % 3) as u32), &["acme", "t", "ada", &format!("k{n}")])
    }

    fn take(store: &Store, numbers: std::ops::Range<u64>) {
        let mut rows = store.batch();
        for n in numbers {
            let row = KeyRow { seq: n, event: [0; 16], at: n, content: [0; 32] };
            let key = key(n);
            let time = keys::time(Partition::new((n % 3) as u32), n, &key[Partition::BYTES..]);
            rows.put_key(&key, &row, &time);
        }
        store.commit(rows).expect("it commits");
    }

    /// How many of these the filter holds for taken.
    fn asked(store: &Store, numbers: std::ops::Range<u64>) -> usize {
        numbers.filter(|n| store.may_be_taken(&key(*n)).expect("it answers")).count()
    }

    #[test]
    fn a_key_that_is_taken_is_found_at_every_moment_of_every_filter() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Good for 4,096 keys, so that with these it begins anew, gives up and tries again.
        for opened in 0..3 {
            let store = store(&folder, 4 << 10);
            for step in 0..100 {
                let end = (opened * 100 + step + 1) * 67;
                take(&store, end - 67..end);
                for n in (0..end).step_by(89).chain(end - 67..end) {
                    let row = store.key(&key(n)).expect("it answers");
                    assert_eq!(row.map(|row| row.seq), Some(n), "of {end}");
                }
                assert_eq!(store.key(&key(end)).expect("it answers"), None);
            }
        }
    }

    #[test]
    fn once_all_keys_are_read_most_new_ones_are_known_to_be_new() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        take(&store(&folder, 64 << 10), 0..20_000);
        let store = store(&folder, 64 << 10);
        assert_eq!(asked(&store, 20_000..20_010), 10, "so far it knows nothing");
        take(&store, 20_000..20_001);
        asked(&store, 0..100);
        assert_eq!(asked(&store, 0..20_000), 20_000);
        let in_vain = asked(&store, 20_001..120_001);
        assert!(in_vain < 1_000, "{in_vain} of 100,000");
    }

    #[test]
    fn with_more_keys_than_it_is_good_for_it_stops_reading_and_every_key_is_looked_up() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        take(&store(&folder, 4 << 10), 0..10_000);
        let store = store(&folder, 4 << 10);
        take(&store, 10_000..10_001);
        assert_eq!(asked(&store, 10_001..11_001), 1_000);
        let filter = store.key_filter.filter.read().expect("nobody panicked");
        let read = filter.as_ref().expect("a key was taken").keys.load(std::sync::atomic::Ordering::Relaxed);
        assert!(read <= 2_048 + 256 + 1, "{read}");
    }
}
