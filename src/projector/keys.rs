//! Idempotency keys: one key of a user and thread stands for one event, for [`KEY_LIFETIME`] of its partition's log time.
//!
//! What decides is the time kept with the key, not whether its row is still there: expired rows are purged later, and that
//! changes no verdict.

use std::collections::HashMap;

use super::Applied;
use super::judge::BatchState;
use super::transaction::Transaction;
use crate::store::{KeyRow, Progress, Store, StoreError};

/// How long an idempotency key is kept, in milliseconds of log time.
pub const KEY_LIFETIME: u64 = 24 * 60 * 60 * 1_000;
/// Expired keys are purged for whole seconds of log time: often, so that it is never much at once.
const PURGE_STEP: u64 = 1_000;

/// The keys that this batch has taken.
#[derive(Default)]
pub(super) struct Keys {
    rows: HashMap<Vec<u8>, KeyRow>,
    /// The time of the oldest of them, those taken again since included.
    oldest: Option<u64>,
}

impl Keys {
    /// What a key stands for at `time`, if it has not expired.
    pub(super) fn find(&self, store: &Store, key: &[u8], time: u64) -> Result<Option<KeyRow>, StoreError> {
        let row = match self.rows.get(key) {
            Some(row) => Some(row.clone()),
            None => store.key(key)?,
        };
        Ok(row.filter(|row| time.saturating_sub(row.at) < KEY_LIFETIME))
    }

    pub(super) fn put(&mut self, tx: &mut Transaction<'_>, partition: u32, key: Vec<u8>, row: KeyRow) {
        tx.rows.put_key(partition, &key, &row);
        self.oldest = Some(self.oldest.map_or(row.at, |oldest| oldest.min(row.at)));
        self.rows.insert(key, row);
    }
}

/// Deletes the keys that have expired at `log_time`. The purge sees only what is committed, so a batch with keys that are
/// that old (the log's time has jumped) must be committed before.
pub(super) fn purge(
    partition: u32,
    progress: &mut Progress,
    log_time: u64,
    state: &mut BatchState<'_>,
    first: bool,
) -> Result<Applied, StoreError> {
    let purge_to = log_time.saturating_sub(KEY_LIFETIME) / PURGE_STEP * PURGE_STEP;
    if purge_to <= progress.purged_to {
        return Ok(Applied::Yes);
    }
    let keys = &state.keys;
    if !first && keys.oldest.is_some_and(|oldest| oldest < purge_to) {
        return Ok(Applied::CommitFirst);
    }
    state.tx.rows.purge_keys(partition, progress.purged_to, purge_to, |key| keys.rows.contains_key(key))?;
    progress.purged_to = purge_to;
    Ok(Applied::Yes)
}
