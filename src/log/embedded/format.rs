//! How the embedded log is on disk.
//!
//! Column family `records`: key = offset (u64) · partition (u32), both big-endian; value = a framed [`Row`]. The offset
//! counts over all partitions, without holes: keys only grow, so files never overlap and compaction moves them without
//! rewriting. The partition counts over all topics, events first, and determines the topic: no row names it, and a log
//! from before there were other topics reads as one of events. Column family `default` holds the log's
//! [identity](super::identity), and of a log that was salvaged the `holes`: offsets whose records were lost.

use std::sync::Arc;

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;
use rocksdb::{BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DB, Options, WriteOptions};

use crate::codec;
use crate::log::{Foreign, Grant, Position, RULES, Record, Topic};
use crate::memory::LogPlan;
use crate::partitioning::{KeyHash, Partitioning};

pub(super) const RECORDS: &str = "records";
const ROW_SCHEMA: u8 = 2;
/// Rows from before records carried the version of their rules, which was the first one.
const ROW_WITHOUT_RULES: u8 = 1;
const HOLES_SCHEMA: u8 = 1;

/// A row of the column family `default`.
pub(super) const HOLES: &str = "holes";

#[derive(Encode, BorrowDecode)]
struct Row<'a> {
    key: &'a str,
    kind: &'a str,
    /// 0 = member, 1 = scope, 2 = server.
    grant: u8,
    traceparent: Option<&'a str>,
    value: &'a [u8],
    rules: u16,
}

#[derive(BorrowDecode)]
struct RowWithoutRules<'a> {
    key: &'a str,
    kind: &'a str,
    grant: u8,
    traceparent: Option<&'a str>,
    value: &'a [u8],
}

impl<'a> From<RowWithoutRules<'a>> for Row<'a> {
    fn from(row: RowWithoutRules<'a>) -> Row<'a> {
        let RowWithoutRules { key, kind, grant, traceparent, value } = row;
        Row { key, kind, grant, traceparent, value, rules: 1 }
    }
}

/// What a row holds.
pub(super) enum Stored {
    Record(Result<Record, Foreign>),
    /// A record of a newer version than this server knows.
    Newer(u64),
}

pub(super) fn encode(record: &Record) -> Vec<u8> {
    let row = Row {
        key: &record.key,
        kind: &record.kind,
        grant: match record.grant {
            Grant::Member => 0,
            Grant::Scope => 1,
            Grant::Server => 2,
        },
        traceparent: record.traceparent.as_deref(),
        value: &record.value,
        rules: record.rules,
    };
    codec::encode(ROW_SCHEMA, &row)
}

pub(super) fn decode(topic: Topic, bytes: &[u8]) -> Stored {
    let row = match codec::schema(bytes) {
        Some(ROW_WITHOUT_RULES) => codec::decode::<RowWithoutRules>(ROW_WITHOUT_RULES, bytes).map(Row::from),
        Some(newer) if newer > ROW_SCHEMA => return Stored::Newer(newer.into()),
        _ => codec::decode::<Row>(ROW_SCHEMA, bytes),
    };
    match row {
        Ok(row) if row.rules > RULES => Stored::Newer(row.rules.into()),
        Ok(row) => Stored::Record(record(topic, row, bytes)),
        Err(error) => Stored::Record(Err(foreign(error.to_string(), bytes))),
    }
}

fn foreign(why: String, bytes: &[u8]) -> Foreign {
    Foreign { why, value: Some(Bytes::copy_from_slice(bytes)), ..Foreign::default() }
}

fn record(topic: Topic, row: Row<'_>, bytes: &[u8]) -> Result<Record, Foreign> {
    let grant = match row.grant {
        0 => Grant::Member,
        1 => Grant::Scope,
        2 => Grant::Server,
        other => return Err(foreign(format!("there is no grant {other}"), bytes)),
    };
    Ok(Record {
        topic,
        key: row.key.to_owned(),
        kind: row.kind.to_owned(),
        rules: row.rules,
        grant,
        traceparent: row.traceparent.map(str::to_owned),
        value: Bytes::copy_from_slice(row.value),
    })
}

/// Where a record belongs, when each topic has `each` partitions.
pub(super) fn partition_of(record: &Record, each: u32) -> u32 {
    record.topic.partition(partitioning(each).of(record.key.as_bytes()), each)
}

pub(super) fn partitioning(each: u32) -> Partitioning {
    Partitioning::new(KeyHash::Crc32, each)
}

pub(super) fn key_of(at: Position) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&at.offset.to_be_bytes());
    key[8..].copy_from_slice(&at.partition.to_be_bytes());
    key
}

pub(super) fn parse_key(key: &[u8]) -> Option<Position> {
    let (offset, partition) = key.split_at_checked(8)?;
    Some(Position {
        offset: u64::from_be_bytes(offset.try_into().ok()?),
        partition: u32::from_be_bytes(partition.try_into().ok()?),
    })
}

/// Offsets that the log does not have: ranges, each up to and without its second number, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Holes(pub Vec<(u64, u64)>);

impl Holes {
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(HOLES_SCHEMA, &self.0)
    }

    pub fn decode(bytes: &[u8]) -> Result<Holes, codec::CodecError> {
        codec::decode(HOLES_SCHEMA, bytes).map(Holes)
    }

    /// The first offset from this one on that the log can have.
    pub fn skip(&self, offset: u64) -> u64 {
        let before = self.0.partition_point(|(_, to)| *to <= offset);
        match self.0.get(before) {
            Some((from, to)) if *from <= offset => *to,
            _ => offset,
        }
    }
}

/// The options of the database, and those of its column family of records.
pub(super) fn options(direct_io: bool) -> Options {
    sized_options(direct_io, LogPlan::default())
}

/// The same, with so much memory.
pub(super) fn sized_options(direct_io: bool, memory: LogPlan) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    // A reused file keeps its size, so that a sync need not write the file system's own records.
    options.set_recycle_log_file_num(4);
    // Bounds what is replayed from the write-ahead log at start, and with it the start's time.
    options.set_write_buffer_size(memory.memtable);
    options.set_max_write_buffer_number(i32::try_from(memory.memtables).unwrap_or(i32::MAX));
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(memory.cache));
    options.set_block_based_table_factory(&blocks);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    // Files written beside the page cache leave no dirty pages for a sync to wait for.
    options.set_use_direct_io_for_flush_and_compaction(direct_io);
    options
}

pub(super) fn descriptors(options: &Options) -> [ColumnFamilyDescriptor; 2] {
    [ColumnFamilyDescriptor::new("default", Options::default()), ColumnFamilyDescriptor::new(RECORDS, options.clone())]
}

pub(super) fn records(db: &DB) -> Arc<BoundColumnFamily<'_>> {
    // Every database of ours is opened with `descriptors`, which fails without this family.
    db.cf_handle(RECORDS).expect("the log was opened with its records")
}

pub(super) fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}
