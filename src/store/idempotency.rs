//! Idempotency keys, and for each partition a list of them by time, from which expired ones are purged.

use bincode::{Decode, Encode};
use rocksdb::{IteratorMode, ReadOptions};

use super::catalogue::{KEY_TIMES, KEYS};
use super::{Batch, Store, StoreError};

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeyRow {
    pub seq: u64,
    pub event: [u8; 16],
    /// When the key was taken, in milliseconds: the event's own time, or the partition's log time where that is later.
    pub at: u64,
    /// Digest of the content published under the key.
    pub content: [u8; 32],
}

impl Store {
    pub fn key(&self, key: &[u8]) -> Result<Option<KeyRow>, StoreError> {
        match self.may_be_taken(key)? {
            true => self.get(KEYS, key),
            false => Ok(None),
        }
    }

    /// Rows of `key_times` in `from..to`, the first `limit`.
    pub fn key_times(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(to);
        let rows = self.db.iterator_cf_opt(&self.family(KEY_TIMES), options, IteratorMode::Start);
        let keys = rows.take(limit).map(|row| row.map(|(key, _)| key.into_vec()));
        keys.collect::<Result<_, _>>().map_err(|error| self.note(error.into()))
    }
}

impl Batch<'_> {
    /// Takes a key; `time` is its row of `key_times`.
    pub fn put_key(&mut self, key: &[u8], row: &KeyRow, time: &[u8]) {
        self.keys.push(self.store.key_filter.hash(key));
        self.put(KEYS, key, row);
        self.put_empty(KEY_TIMES, time);
    }

    /// Deletes a row of `key_times`, and the row of its key if that is given.
    pub fn delete_key_time(&mut self, time: &[u8], key: Option<&[u8]>) {
        if let Some(key) = key {
            self.delete(KEYS, key);
        }
        self.delete(KEY_TIMES, time);
    }
}
