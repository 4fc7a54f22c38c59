//! The log: the append-only record of everything, and the only source of truth.
//!
//! Two implementations of one trait: [`embedded`] (RocksDB, needs no setup) and [`kafka`]. One contract suite
//! (`tests/it/log_contract/`) holds both to the duties written here.
//!
//! A log has three [`Topic`]s, each with the same number of partitions, n. Partitions are numbered over all of them: events
//! are in 0..n, receipts in n..2n, dead letters in 2n..3n. One reader reads them all.
//!
//! Invariants, on either log:
//! - records of a topic with one key land in one partition, in the order in which they were appended; between partitions,
//!   and so between topics, there is no order;
//! - a position, once given, names that record for ever; positions of a partition only grow, with holes allowed, and a
//!   reader that has read all of a partition gets to its end, past any hole;
//! - a reader sees only what is durable: nothing that it returned can be taken back by a crash;
//! - foreign records are skipped and reported, as [`Foreign`] at their position; reading continues;
//! - no reader gets past a record of newer rules than [`RULES`]: it stays there with [`LogError::NewerRules`].
//! - a log is given its [`Identity`] while it is empty. One that holds records and has none is refused: it is not known
//!   which records it is without, and a new name would have projections of the old one thrown away.

mod checkpoint;
pub mod embedded;
mod identity;
pub mod kafka;
mod record;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use checkpoint::Checkpoint;
pub use identity::{Cause, Continued, Identity, IfUnnamed};
pub use record::{Grant, RULES, Record, Topic};

use crate::partitioning::Partitioning;

/// About how many bytes one [`Reader::next`] brings at most.
pub const READ_BYTES: usize = 4 << 20;

/// Why a record is foreign that is in another partition than that of its key.
pub const MISPLACED: &str = "it is not in its key's partition (murmur2)";

/// Where a record stands. Stays inside the server: clients see seqs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Counted over all topics; [`Log::topic_of`] tells which one it is in.
    pub partition: u32,
    pub offset: u64,
}

/// For each partition of all topics the offset to read next; the index is the partition.
pub type Positions = Vec<u64>;

/// The offsets a partition holds: `start` is the oldest, `end` the one the next record will get (at least).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    pub start: u64,
    pub end: u64,
}

/// Called exactly once for each record given to [`Log::append`], on a thread of the log's or, when the record is refused at
/// once, on the caller's; it must not block.
pub type Done = Box<dyn FnOnce(Result<Position, AppendError>) + Send>;

/// A record, and what is called with its outcome.
pub struct Append {
    pub record: Record,
    pub done: Done,
}

/// What a reader gets: a record of Weft's, or what else was at that position.
#[derive(Debug, Clone)]
pub struct Entry {
    pub at: Position,
    pub record: Result<Record, Foreign>,
}

/// A record that is not Weft's: another writer's mistake, or damage. Its topic is that of its position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Foreign {
    pub why: String,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    /// When the log took it, in milliseconds, if the log knows.
    pub at: Option<u64>,
    /// It is among the events and lacks what Weft's own records have beside key and value: by later rules it may be one.
    pub plain: Option<Box<Plain>>,
}

/// What a record says of itself that another program's producer wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plain {
    /// The version of the rules that it names, if any.
    pub rules: Option<u16>,
    pub grant: Grant,
    pub traceparent: Option<String>,
    /// It is not in its key's partition.
    pub misplaced: bool,
}

impl Foreign {
    /// A record that has Weft's format and nonetheless is not Weft's.
    pub fn new(why: String, record: &Record) -> Foreign {
        let (key, value) = (Some(record.key.clone().into()), Some(record.value.clone()));
        Foreign { why, key, value, ..Foreign::default() }
    }
}

/// Why a record was not, or possibly not, appended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The log's queue is full. The record will never appear.
    #[error("the log's queue is full")]
    QueueFull,
    /// The log could not take it. The record will never appear.
    #[error("the log is unavailable: {0}")]
    Unavailable(String),
    /// The log did not say. The record may appear or not; sent again with its key it appears once.
    #[error("the log did not confirm in time: {0}")]
    Unknown(String),
}

/// Why a log could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Both count one topic, as the setting does; of positions that a reader cannot take, all topics.
    #[error(
        "the log has {found} partitions, but {configured} are configured (--partitions); the number is fixed when the log is created"
    )]
    PartitionMismatch { found: u32, configured: u32 },
    #[error("position {at} is outside of what the log holds ({}..{})", bounds.start, bounds.end)]
    OutOfRange { at: Position, bounds: Bounds },
    #[error("the log is unavailable: {0}")]
    Unavailable(String),
    #[error("the log is damaged: {0}")]
    Damaged(String),
    /// It holds records, or held some, and does not say which log it is.
    #[error(
        "the log has lost its name: {0}. Nothing was changed. Either put the whole log back, or, if what it holds now is all \
         there is: `weft rebuild --discard` names it, discards the projections and makes them anew from these records"
    )]
    Unnamed(String),
    #[error(
        "the log has begun another generation ({0}): records may be gone that this node has projected. Stop it, then \
         `weft rebuild --discard`, then start it again"
    )]
    OtherGeneration(String),
    #[error(
        "there is no log in {}, but what was made from one is in {}, and may be all that is left of it. Nothing was changed. \
         Put the log back, or a backup of it; to begin with an empty log, move that away first", log.display(), projections.display()
    )]
    Missing { log: PathBuf, projections: PathBuf },
    /// As it is set up, it would lose records, or has some that nobody would read.
    #[error("the log is not set up to keep what it is given: {0}")]
    Unfit(String),
    #[error(
        "the record at {at} is of version {version}, and this node knows none newer than {RULES}: upgrade it; nothing after \
         that record is read until then"
    )]
    NewerRules { at: Position, version: u64 },
}

/// An append-only log of [`Record`]s in three topics with a fixed number of partitions.
pub trait Log: Send + Sync + 'static {
    /// Which log this is, and its generation as of the opening or the last [`Log::new_generation`].
    fn identity(&self) -> Arc<Identity>;

    /// What the wire calls the log's generation: another log or another generation, another epoch.
    fn epoch(&self) -> String {
        self.identity().epoch()
    }

    /// Begins a generation; returns once that is durable. When others begin one at the same moment, the first counts.
    fn new_generation(&self, cause: Cause) -> Result<(), LogError>;

    /// Whether other nodes write to this log as well. Then a node without projections is a new one, and not a sign that
    /// the log was put back.
    fn is_shared(&self) -> bool;

    /// The version of the rules that the log was made under; 1 where that is not known. Other programs' records may name none.
    fn first_rules(&self) -> u16 {
        1
    }

    /// How many partitions there are, of all topics together; fixed when the log is created.
    fn partitions(&self) -> u32;

    /// How each topic's keys are spread over its partitions.
    fn partitioning(&self) -> Partitioning;

    /// The topic of one of the log's partitions, and its number within that topic.
    fn topic_of(&self, partition: u32) -> (Topic, u32) {
        Topic::locate(partition, self.partitions() / Topic::ALL.len() as u32)
    }

    /// What the topic is called in the log, for people and for the log's own tools.
    fn topic_name(&self, topic: Topic) -> String {
        topic.as_str().to_owned()
    }

    /// Appends records, in order, and returns at once. Each one is answered on its own through its `done`: `Ok` once it is
    /// durable, and within 5 seconds in any case. What does not fit the log's bounded queue is answered
    /// [`AppendError::QueueFull`]; after [`Log::close`] every record is answered [`AppendError::Unavailable`].
    fn append(&self, batch: Vec<Append>);

    /// A reader of all partitions of all topics that begins at `from`, one offset for each of them. Fails with
    /// [`LogError::OutOfRange`] when a position is older or newer than what the log holds: it is from another log, and
    /// guessing would lose events.
    fn reader(&self, from: &[u64]) -> Result<Box<dyn Reader>, LogError>;

    /// What each partition holds now. May ask over the network: not to be called for each event.
    fn bounds(&self) -> Result<Vec<Bounds>, LogError>;

    /// For each partition the offset that its next record will get (at least): what was durable before the call is below
    /// it. May ask over the network, once for all partitions, and waits for the answer: not for the runtime's workers.
    fn ends(&self) -> Result<Positions, LogError>;

    /// The same of one partition alone.
    fn end(&self, partition: u32) -> Result<u64, LogError>;

    /// Whether others than this handle append to the log. Then what was answered elsewhere may not have been read here yet.
    fn has_other_writers(&self) -> bool;

    /// How many records of those before `ends` come after `positions`.
    fn between(&self, positions: &[u64], ends: &[u64]) -> u64 {
        ends.iter().zip(positions).map(|(end, next)| end.saturating_sub(*next)).sum()
    }

    /// Writes what this node has made of a partition's events before `offset` into that partition, where other nodes read it
    /// as a record that is a [`Checkpoint`]. Best effort; nothing on a log that is not shared.
    fn append_checkpoint(&self, partition: u32, offset: u64, hash: &[u8; 32]);

    /// Tells the log how far its reader's effects are durable, for the log's own tools (Kafka's group lag). Best effort.
    fn committed(&self, positions: &[u64]);

    /// `Err` with the reason while the log cannot be relied on to take, give and keep records. It recovers by itself, but not
    /// from damage, or from settings under which it loses records: these stay, and ask for a person.
    fn health(&self) -> Result<(), String>;

    /// What somebody should see to, though nothing is wrong yet.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Takes no more, makes what was taken durable or answers it, and releases files and connections. Idempotent.
    fn close(&self);
}

/// A cursor over the log that only moves forward. Owned by one thread; blocks it.
pub trait Reader: Send {
    /// Up to `max` entries (and about [`READ_BYTES`]) from the cursor on, in order within each partition; waits at most
    /// `wait` for the first one, and returns none when it did not come. An error leaves the cursor where it was, so that
    /// the call can be repeated. After [`Log::close`] it may end with [`LogError::Unavailable`].
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError>;

    /// Where the next call continues: after all that was returned. A reader opened there returns the same as this one.
    fn positions(&self) -> &Positions;
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.partition, self.offset)
    }
}
