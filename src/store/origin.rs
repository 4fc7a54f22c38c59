//! What a store was made from, and how far: the rows of the family `default`.
//!
//! - `log`: the log's epoch, where the log's partitions began, and the version of all other rows;
//! - `partitioning`: how the log spreads keys over its partitions, and how many it has of all topics;
//! - `position` and a partition: the offset to read next in it;
//! - `passed`: an offset to which all partitions have been read, whatever their own rows say. Where offsets count over all
//!   partitions, each commit brings all of them further, and this is the one row that says so;
//! - `progress` and a partition: the rest of that partition's [`Progress`].
//!
//! All but the last have a version of their own and read the same in every release, so that a store whose other rows are of
//! another version can still be held against the log, and is not mistaken for one of another log. A commit writes the rows
//! of those partitions that it has moved. Which of the two rows has a position depends on where commits end: two stores are
//! the same if [`Store::progress`] is.

use bincode::{Decode, Encode};

use super::catalogue::{META, WAITING};
use super::{Batch, SCHEMA, Store, StoreError};
use crate::codec::{self, CodecError};
use crate::partitioning::{KeyHash, Partitioning};

const LOG: &[u8] = b"log";
const PARTITIONING: &[u8] = b"partitioning";
const PASSED: &[u8] = b"passed";
const POSITION: &[u8] = b"position";
const PROGRESS: &[u8] = b"progress";
/// Where the positions stood up to version 11, in one row.
const POSITIONS: &[u8] = b"positions";
/// Where all of it stood up to version 6.
const IDENTITY: &[u8] = b"identity";

/// From this version on, each partition's position is in its own row.
const POSITIONS_BY_PARTITION: u8 = 12;

/// The version of all rows here but `progress`.
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
    /// The newest version of the rules that a record named so far.
    pub rules: u16,
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

#[derive(Encode, Decode)]
struct PartitioningRow {
    /// 0 for [`KeyHash::Crc32`], 1 for [`KeyHash::Murmur2`].
    hash: u8,
    /// Partitions of one topic.
    each: u32,
    /// Partitions of all topics.
    all: u32,
}

#[derive(Default, PartialEq, Encode, Decode)]
struct ProgressRow {
    log_time: u64,
    last_at: u64,
    purged_to: u64,
    hash: [u8; 32],
    rules: u16,
}

impl From<&Progress> for ProgressRow {
    fn from(progress: &Progress) -> ProgressRow {
        let Progress { next: _, log_time, last_at, purged_to, hash, rules } = *progress;
        ProgressRow { log_time, last_at, purged_to, hash, rules }
    }
}

impl Store {
    /// What the store was made from; nothing if it was not begun.
    pub fn origin(&self) -> Result<Option<Origin>, StoreError> {
        let Some(log) = self.get_as::<LogRow>(ORIGIN_SCHEMA, META, LOG)? else {
            return self.origin_before_7();
        };
        let LogRow { epoch, starts, rows } = log;
        let positions = match rows < POSITIONS_BY_PARTITION {
            true => self.get_as(ORIGIN_SCHEMA, META, POSITIONS)?.unwrap_or_default(),
            false => self.positions()?,
        };
        Ok(Some(Origin { epoch, starts, positions, rows }))
    }

    /// For each partition the offset to read next.
    fn positions(&self) -> Result<Vec<u64>, StoreError> {
        let row = self.get_as::<PartitioningRow>(ORIGIN_SCHEMA, META, PARTITIONING)?;
        let passed = self.get_as::<u64>(ORIGIN_SCHEMA, META, PASSED)?.unwrap_or_default();
        let positions = (0..row.map_or(0, |row| row.all)).map(|partition| {
            let own = self.get_as::<u64>(ORIGIN_SCHEMA, META, &numbered(POSITION, partition))?;
            Ok(own.unwrap_or_default().max(passed))
        });
        positions.collect()
    }

    /// For each partition of events the offset to read next: what came of the records before that is in the rows.
    pub fn event_positions(&self) -> Result<Vec<u64>, StoreError> {
        let mut positions = self.positions()?;
        positions.truncate(self.partitioning.each() as usize);
        Ok(positions)
    }

    /// Learns how its keys are spread, if it was begun by this version of Weft.
    pub(super) fn read_partitioning(&mut self) -> Result<(), StoreError> {
        // What another version has there is of no use to this one.
        let row = self.db.get_pinned_cf(&self.family(META), PARTITIONING)?;
        let row = row.and_then(|row| codec::decode::<PartitioningRow>(ORIGIN_SCHEMA, &row).ok());
        if let Some(PartitioningRow { hash, each, .. }) = row {
            let hash = if hash == 0 { KeyHash::Crc32 } else { KeyHash::Murmur2 };
            self.partitioning = Partitioning::new(hash, each);
        }
        Ok(())
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
        if self.get_as::<PartitioningRow>(ORIGIN_SCHEMA, META, PARTITIONING)?.is_none() {
            return Ok(None);
        }
        let progress = (0..).zip(self.positions()?).map(|(partition, next)| {
            let row: ProgressRow = self.get(META, &numbered(PROGRESS, partition))?.unwrap_or_default();
            let ProgressRow { log_time, last_at, purged_to, hash, rules } = row;
            Ok(Progress { next, log_time, last_at, purged_to, hash, rules })
        });
        progress.collect::<Result<_, StoreError>>().map(Some)
    }

    /// Makes an empty store the one of a log, read from these positions on; durable when this returns.
    pub fn begin(
        &mut self,
        epoch: &str,
        partitioning: Partitioning,
        starts: &[u64],
        positions: &[u64],
    ) -> Result<Vec<Progress>, StoreError> {
        self.partitioning = partitioning;
        let hash = match partitioning.hash() {
            KeyHash::Crc32 => 0,
            KeyHash::Murmur2 => 1,
        };
        let row = PartitioningRow { hash, each: partitioning.each(), all: positions.len() as u32 };
        let mut batch = self.batch();
        batch.put_log(epoch, starts);
        batch.put_as(ORIGIN_SCHEMA, META, PARTITIONING, &row);
        batch.put_positions(&vec![0; positions.len()], positions);
        self.commit(batch)?;
        self.flush()?;
        Ok(positions.iter().map(|next| Progress { next: *next, ..Progress::default() }).collect())
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

    /// Where the store has come to in each partition, if it had come to `before`.
    pub fn put_positions(&mut self, before: &[u64], positions: &[u64]) {
        let least = |positions: &[u64]| positions.iter().copied().min().unwrap_or_default();
        let passed = least(positions);
        if passed > least(before) {
            self.put_passed(passed);
        }
        for (partition, (before, next)) in (0..).zip(before.iter().zip(positions)) {
            if next > before && *next > passed {
                self.put_position(partition, *next);
            }
        }
    }

    /// Where the store has come to in one partition.
    pub fn put_position(&mut self, partition: u32, next: u64) {
        self.put_as(ORIGIN_SCHEMA, META, &numbered(POSITION, partition), &next);
    }

    /// Where it has come to in all of them, at least. It may be less than what another batch has written: so whoever writes it
    /// writes the positions of partitions that it has read records of as well.
    pub fn put_passed(&mut self, passed: u64) {
        self.put_as(ORIGIN_SCHEMA, META, PASSED, &passed);
    }

    /// How far a partition has come beside its position, if that has changed.
    pub fn put_progress(&mut self, partition: u32, before: &Progress, progress: &Progress) {
        let row = ProgressRow::from(progress);
        if row != before.into() {
            self.put(META, &numbered(PROGRESS, partition), &row);
        }
    }
}

fn decode_identity<const N: usize>(rows: u8, bytes: &[u8]) -> Result<(String, Vec<u64>), CodecError> {
    let (epoch, progress): (String, Vec<[u64; N]>) = codec::decode(rows, bytes)?;
    Ok((epoch, progress.iter().map(|partition| partition[0]).collect()))
}

/// Whether two stores of one log may differ in this row: it names the log's generation, or has a position, or depends on when
/// the node came to know of a group.
pub(super) fn may_differ(family: &str, key: &[u8]) -> bool {
    family == WAITING || family == META && (key == LOG || key == PASSED || key.starts_with(POSITION))
}

/// The key of a partition's row. They are numbered over all topics.
fn numbered(name: &[u8], partition: u32) -> Vec<u8> {
    [name, &partition.to_be_bytes()].concat()
}
