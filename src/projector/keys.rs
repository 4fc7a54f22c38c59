//! Idempotency keys: one key of a user and thread stands for one event, for [`KEY_LIFETIME`] of its partition's log time.
//!
//! What decides is the time kept with the key, not whether its row is still there. Expired rows are purged later, a few
//! with each record, and that changes no verdict. Which ones are purged with a record depends on the records alone: the
//! oldest, by the time they were taken and then by key, of those that the store and this batch have.

use std::collections::HashMap;

use super::transaction::Transaction;
use crate::store::{KeyRow, Partition, Progress, Store, StoreError, keys};

/// How long an idempotency key is kept, in milliseconds of log time.
pub const KEY_LIFETIME: u64 = 24 * 60 * 60 * 1_000;
/// Keys are purged by whole seconds of log time: most records then have nothing to look for.
const PURGE_STEP: u64 = 1_000;
/// How many keys are purged with one record. A record takes one key at most, so the purge keeps up.
const PURGE_LIMIT: usize = 64;

/// The keys that this batch has taken.
#[derive(Default)]
pub(super) struct Keys {
    rows: HashMap<Vec<u8>, KeyRow>,
    /// Their rows of `key_times`, as they came.
    times: Vec<Vec<u8>>,
    /// When the oldest of them was taken.
    oldest: Option<u64>,
}

/// The last row of `key_times` that was purged in a partition, while more are due. [`Progress::purged_to`] says the same to
/// the millisecond and is enough to go on from; this spares the store from passing over what it has just deleted.
pub(super) type LastPurged = Vec<u8>;

impl Keys {
    /// What a key stands for at `time`, if it has not expired.
    pub(super) fn find(&self, store: &Store, key: &[u8], time: u64) -> Result<Option<KeyRow>, StoreError> {
        let row = self.row(store, key)?;
        Ok(row.filter(|row| time.saturating_sub(row.at) < KEY_LIFETIME))
    }

    fn row(&self, store: &Store, key: &[u8]) -> Result<Option<KeyRow>, StoreError> {
        match self.rows.get(key) {
            Some(row) => Ok(Some(row.clone())),
            None => store.key(key),
        }
    }

    pub(super) fn put(&mut self, tx: &mut Transaction<'_>, partition: u32, key: Vec<u8>, row: KeyRow) {
        let time = keys::time(Partition::new(partition), row.at, &key[Partition::BYTES..]);
        tx.rows.put_key(&key, &row, &time);
        self.times.push(time);
        self.oldest = Some(self.oldest.map_or(row.at, |oldest| oldest.min(row.at)));
        self.rows.insert(key, row);
    }

    /// Deletes the oldest keys of the partition that have expired, [`PURGE_LIMIT`] at most.
    pub(super) fn purge(
        &self,
        tx: &mut Transaction<'_>,
        partition: u32,
        progress: &mut Progress,
        last_purged: &mut Option<LastPurged>,
    ) -> Result<(), StoreError> {
        let purge_to = progress.log_time.saturating_sub(KEY_LIFETIME) / PURGE_STEP * PURGE_STEP;
        if purge_to <= progress.purged_to {
            return Ok(());
        }

        let from = match last_purged.take() {
            // The first row after the one purged last.
            Some(last) => [&last[..], &[0]].concat(),
            None => keys::time(Partition::new(partition), progress.purged_to, &[]),
        };
        let to = keys::time(Partition::new(partition), purge_to, &[]);
        let mut expired = tx.store.key_times(&from, &to, PURGE_LIMIT)?;
        expired.extend(self.times_between(&from, &to));
        expired.sort_unstable();
        expired.truncate(PURGE_LIMIT);

        let mut last_at = purge_to;
        for time in &expired {
            let Some((at, rest)) = keys::split_time(time) else { continue };
            last_at = at;
            let key = [&Partition::new(partition).bytes()[..], rest].concat();
            // If the key was taken again since, only its old time goes.
            let is_current = self.row(tx.store, &key)?.is_some_and(|row| row.at == at);
            tx.rows.delete_key_time(time, is_current.then_some(&key));
        }

        if expired.len() < PURGE_LIMIT {
            progress.purged_to = purge_to;
        } else {
            progress.purged_to = last_at;
            *last_purged = expired.pop();
        }
        Ok(())
    }

    /// The rows of `key_times` of this batch's keys in `from..to`, in no order. Nearly always there are none: a batch takes
    /// keys at its own log time, and what is purged is a day older.
    fn times_between(&self, from: &[u8], to: &[u8]) -> Vec<Vec<u8>> {
        let until = keys::split_time(to).map_or(0, |(at, _)| at);
        if self.oldest.is_none_or(|oldest| oldest >= until) {
            return Vec::new();
        }
        self.times.iter().filter(|time| (from..to).contains(&time.as_slice())).cloned().collect()
    }
}
