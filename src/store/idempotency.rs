//! Idempotency keys, and for each partition a list of them by time, from which expired ones are purged.

use bincode::{Decode, Encode};
use rocksdb::{IteratorMode, ReadOptions};

use super::catalogue::{KEY_TIMES, KEYS};
use super::{Batch, Store, StoreError, keys};

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeyRow {
    pub seq: u64,
    pub event: [u8; 16],
    /// The partition's log time when the key was taken, in milliseconds.
    pub at: u64,
    /// Digest of the content published under the key.
    pub content: [u8; 32],
}

impl Store {
    pub fn key(&self, key: &[u8]) -> Result<Option<KeyRow>, StoreError> {
        self.get(KEYS, key)
    }

    /// The idempotency keys of a partition that were taken at `from..before` (milliseconds), as rows of `key_times`.
    fn keys_between(&self, partition: u32, from: u64, before: u64) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::key_time(partition, from, &[]));
        options.set_iterate_upper_bound(keys::key_time(partition, before, &[]));
        let rows = self.db.iterator_cf_opt(&self.family(KEY_TIMES), options, IteratorMode::Start);
        rows.map(|row| Ok(row?.0.into_vec())).collect()
    }
}

impl Batch<'_> {
    pub fn put_key(&mut self, partition: u32, key: &[u8], row: &KeyRow) {
        self.put(KEYS, key, row);
        self.put_empty(KEY_TIMES, &keys::key_time(partition, row.at, key));
    }

    /// Deletes the idempotency keys of a partition with `at` in `from..before`. Only what has been committed is seen;
    /// `taken_again` tells which keys this batch has taken anew.
    pub fn purge_keys(
        &mut self,
        partition: u32,
        from: u64,
        before: u64,
        taken_again: impl Fn(&[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for time in self.store.keys_between(partition, from, before)? {
            let Some((at, key)) = keys::split_key_time(&time) else { continue };
            // The key may have been taken again since; then only its old time goes.
            if !taken_again(key) && self.store.key(key)?.is_some_and(|row| row.at == at) {
                self.delete(KEYS, key);
            }
            self.delete(KEY_TIMES, &time);
        }
        Ok(())
    }
}
