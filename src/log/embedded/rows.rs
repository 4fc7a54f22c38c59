//! Reads records from the database, for readers of a log that is open and of one that is only looked at.

use rocksdb::{DB, ReadOptions};

use super::format::{Holes, Stored, decode, parse_key, records};
use crate::log::{Entry, LogError, Position, READ_BYTES, Topic};

/// What one read brings.
pub(super) struct ReadRows {
    pub entries: Vec<Entry>,
    /// A record of newer rules that it came to, and its version: it stays before that.
    pub newer: Option<(Position, u64)>,
    /// The offset to read on at.
    pub next: u64,
}

/// What of a log is read.
pub(super) struct Range<'a> {
    /// How many partitions each topic has.
    pub each: u32,
    pub holes: &'a Holes,
    pub from: u64,
    pub end: u64,
    /// Of each partition only records from here on.
    pub positions: &'a [u64],
}

/// Up to `max` records, and about [`READ_BYTES`]. Offsets have no gaps but the holes.
pub(super) fn read(db: &DB, range: &Range<'_>, max: usize) -> Result<ReadRows, LogError> {
    let Range { each, holes, from, end, positions } = *range;
    let mut options = ReadOptions::default();
    options.set_readahead_size(1 << 20);
    options.fill_cache(false);
    options.set_iterate_upper_bound(end.to_be_bytes().to_vec());
    let mut rows = db.raw_iterator_cf_opt(&records(db), options);

    let mut found =
        ReadRows { entries: Vec::with_capacity(max.min((end - from) as usize)), newer: None, next: holes.skip(from) };
    let mut bytes = 0;
    rows.seek(from.to_be_bytes());
    while let Some((key, value)) = rows.item().filter(|_| found.entries.len() < max && bytes <= READ_BYTES) {
        let at = expect_offset(key, found.next, positions.len() as u32).map_err(LogError::Damaged)?;
        found.next = holes.skip(at.offset + 1);
        if at.offset >= positions[at.partition as usize] {
            match decode(Topic::locate(at.partition, each).0, value) {
                Stored::Record(record) => found.entries.push(Entry { at, record }),
                Stored::Newer(version) => {
                    (found.newer, found.next) = (Some((at, version)), at.offset);
                    break;
                }
            }
            bytes += value.len();
        }
        rows.next();
    }
    rows.status().map_err(|error| read_error(&error))?;
    if !rows.valid() && found.next < end {
        return Err(LogError::Damaged(format!("the records {}..{end} are missing", found.next)));
    }
    found.next = found.next.min(end);
    Ok(found)
}

/// The position that a row's key says, which has to be at the offset that comes next.
pub(super) fn expect_offset(key: &[u8], next: u64, partitions: u32) -> Result<Position, String> {
    match parse_key(key).filter(|at| at.partition < partitions) {
        Some(at) if at.offset == next => Ok(at),
        Some(at) if at.offset > next => Err(format!("the records {next}..{} are missing", at.offset)),
        _ => Err(format!("a key of {} bytes among the records, at {next}", key.len())),
    }
}

/// What RocksDB's error means to whoever reads.
pub(super) fn read_error(error: &rocksdb::Error) -> LogError {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => LogError::Damaged(error.to_string()),
        _ => LogError::Unavailable(error.to_string()),
    }
}

/// How many records of those before `ends` come after `positions`: offsets count over all partitions, so what the slowest
/// partition lacks is what all lack.
pub(super) fn between(positions: &[u64], ends: &[u64]) -> u64 {
    let (slowest, end) = (positions.iter().copied().min(), ends.iter().copied().max());
    end.unwrap_or(0).saturating_sub(slowest.unwrap_or(0))
}
