//! What a store was made from, and how far: the rows of the family `default`.
//!
//! - `log`: the log's epoch, where the log's partitions began, and the version of all other rows;
//! - `positions`: for each partition the offset to read next;
//! - `progress` and a partition: the rest of that partition's [`Progress`].
//!
//! The first two have a version of their own and read the same in every release, so that a store whose other rows are of
//! another version can still be held against the log, and is not mistaken for one of another log.

use bincode::{Decode, Encode};

use super::catalogue::META;
use super::{Batch, SCHEMA, Store, StoreError};
use crate::codec::{self, CodecError};

const LOG: &[u8] = b"log";
const POSITIONS: &[u8] = b"positions";
const PROGRESS: &[u8] = b"progress";
/// Where all of it stood up to version 6.
const IDENTITY: &[u8] = b"identity";

/// The version of the rows `log` and `positions`.
const ORIGIN_SCHEMA: u8 = 1;

/// How far a partition of the log has been projected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// The offset to read next.
    pub next: u64,
    /// The partition's own clock, made of its records' times, in milliseconds.
    pub log_time: u64,
    /// The time of the last record, in milliseconds. It may be ahead of log time.
    pub last_at: u64,
    /// Idempotency keys taken before this time have been purged.
    pub purged_to: u64,
    /// Over all that was accepted so far, where other nodes read the log as well; else zeros.
    pub hash: [u8; 32],
}

/// Which log a store was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The log's epoch, with its generation.
    pub epoch: String,
    /// Where its partitions began when that generation did.
    pub starts: Vec<u64>,
    /// For each partition the offset to read next.
    pub positions: Vec<u64>,
    /// The version of the store's other rows.
    pub rows: u8,
}

impl Origin {
    /// Whether this version of Weft reads the store's rows.
    pub fn is_readable(&self) -> bool {
        self.rows == SCHEMA
    }

    /// Whether a newer version of Weft made the store.
    pub fn is_newer(&self) -> bool {
        self.rows > SCHEMA
    }
}

#[derive(Encode, Decode)]
struct LogRow {
    epoch: String,
    starts: Vec<u64>,
    rows: u8,
}

#[derive(Default, PartialEq, Encode, Decode)]
struct ProgressRow {
    log_time: u64,
    last_at: u64,
    purged_to: u64,
    hash: [u8; 32],
}

impl From<&Progress> for ProgressRow {
    fn from(progress: &Progress) -> ProgressRow {
        let Progress { next: _, log_time, last_at, purged_to, hash } = *progress;
        ProgressRow { log_time, last_at, purged_to, hash }
    }
}

impl Store {
    /// What the store was made from; nothing if it was not begun.
    pub fn origin(&self) -> Result<Option<Origin>, StoreError> {
        let Some(log) = self.get_as::<LogRow>(ORIGIN_SCHEMA, META, LOG)? else {
            return self.origin_before_7();
        };
        let LogRow { epoch, starts, rows } = log;
        let positions = self.get_as(ORIGIN_SCHEMA, META, POSITIONS)?.unwrap_or_default();
        Ok(Some(Origin { epoch, starts, positions, rows }))
    }

    fn origin_before_7(&self) -> Result<Option<Origin>, StoreError> {
        let Some(bytes) = self.db.get_pinned_cf(&self.family(META), IDENTITY)? else {
            return Ok(None);
        };
        let rows = codec::schema(&bytes).unwrap_or_default();
        // A position and three times for each partition, before that two.
        let (epoch, positions) = decode_identity::<4>(rows, &bytes)
            .or_else(|_| decode_identity::<3>(rows, &bytes))
            .map_err(|source| StoreError::Damaged { family: META, source })?;
        Ok(Some(Origin { epoch, starts: Vec::new(), positions, rows }))
    }

    /// How far each partition has been projected, if the store was begun.
    pub fn progress(&self) -> Result<Option<Vec<Progress>>, StoreError> {
        let Some(positions) = self.get_as::<Vec<u64>>(ORIGIN_SCHEMA, META, POSITIONS)? else {
            return Ok(None);
        };
        let progress = (0..).zip(positions).map(|(partition, next)| {
            let row: ProgressRow = self.get(META, &progress_key(partition))?.unwrap_or_default();
            let ProgressRow { log_time, last_at, purged_to, hash } = row;
            Ok(Progress { next, log_time, last_at, purged_to, hash })
        });
        progress.collect::<Result<_, StoreError>>().map(Some)
    }

    /// Makes it the store of a log, read from these positions on; durable when this returns.
    pub fn begin(&self, epoch: &str, starts: &[u64], positions: &[u64]) -> Result<Vec<Progress>, StoreError> {
        let progress: Vec<Progress> =
            positions.iter().map(|next| Progress { next: *next, ..Progress::default() }).collect();
        let mut batch = self.batch();
        batch.put_log(epoch, starts);
        batch.put_progress(&progress, &progress);
        self.commit(batch)?;
        self.flush()?;
        Ok(progress)
    }

    /// Its rows are good in this generation of the log as well; durable when this returns.
    pub fn continue_as(&self, epoch: &str, starts: &[u64]) -> Result<(), StoreError> {
        let mut batch = self.batch();
        batch.put_log(epoch, starts);
        self.commit(batch)?;
        self.flush()
    }
}

impl Batch<'_> {
    fn put_log(&mut self, epoch: &str, starts: &[u64]) {
        let row = LogRow { epoch: epoch.to_owned(), starts: starts.to_vec(), rows: SCHEMA };
        self.put_as(ORIGIN_SCHEMA, META, LOG, &row);
    }

    /// How far the store has come, and what has changed since it had come to `before`.
    pub fn put_progress(&mut self, before: &[Progress], progress: &[Progress]) {
        let positions: Vec<u64> = progress.iter().map(|progress| progress.next).collect();
        self.put_as(ORIGIN_SCHEMA, META, POSITIONS, &positions);
        for (partition, (before, progress)) in (0..).zip(before.iter().zip(progress)) {
            let row = ProgressRow::from(progress);
            if row != before.into() {
                self.put(META, &progress_key(partition), &row);
            }
        }
    }
}

fn decode_identity<const N: usize>(rows: u8, bytes: &[u8]) -> Result<(String, Vec<u64>), CodecError> {
    let (epoch, progress): (String, Vec<[u64; N]>) = codec::decode(rows, bytes)?;
    Ok((epoch, progress.iter().map(|partition| partition[0]).collect()))
}

/// Whether this is the row that names the log and its generation.
pub(super) fn names_log(family: &str, key: &[u8]) -> bool {
    family == META && key == LOG
}

fn progress_key(partition: u32) -> Vec<u8> {
    [PROGRESS, &partition.to_be_bytes()].concat()
}
