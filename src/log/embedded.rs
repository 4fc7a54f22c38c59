//! The embedded log: a RocksDB of records in the order in which they were appended, synced before anybody is answered.
//!
//! Invariants:
//! - one writer thread takes all that waits, writes it as one batch, syncs once (group commit) and then answers each;
//! - `end` is published only after the sync, and readers stop there: nothing they return can be lost;
//! - a batch whose write failed is deleted again before any other is written, so that what was answered as "will never
//!   appear" cannot come back, and the log reads the same from memory and from disk.
//!
//! Format: column family `records`, key = offset (u64) · partition (u32), both big-endian; value = a framed [`Row`]. The
//! offset counts over all partitions: keys only grow, so files never overlap and compaction moves them without rewriting.
//! The partition counts over all topics, events first, and tells the topic: no row names it, and a log from before there
//! were other topics reads as one of events. Column family `default` holds `epoch` and `partitions`, those of one topic.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;
use metrics::Histogram;
use rocksdb::{ColumnFamilyDescriptor, DB, Options, ReadOptions, WriteBatch, WriteOptions};

use super::{
    Append, AppendError, Bounds, Done, Entry, Foreign, Grant, Log, LogError, Position, Positions, READ_BYTES, Reader,
    Record, Topic,
};
use crate::{clock, codec, disk, telemetry};

const RECORDS: &str = "records";
const ROW_SCHEMA: u8 = 1;
/// What may wait for the writer: more is answered `queue_full`.
const QUEUE_BYTES: usize = 64 << 20;
/// The newest records stay in memory, so that a reader at the tail does not read the disk.
const TAIL_BYTES: usize = 16 << 20;

#[derive(Encode, BorrowDecode)]
struct Row<'a> {
    key: &'a str,
    kind: &'a str,
    /// 0 = member, 1 = scope, 2 = server.
    grant: u8,
    traceparent: Option<&'a str>,
    value: &'a [u8],
}

pub struct EmbeddedLog {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer thread, the appenders and the readers have in common.
struct Shared {
    db: DB,
    epoch: String,
    /// How many partitions each topic has.
    each: u32,
    queue: Mutex<Queue>,
    /// Signalled when the queue is no longer empty, or closed.
    queued: Condvar,
    tail: Mutex<Tail>,
    /// Signalled when the tail has grown.
    grown: Condvar,
    health: Mutex<Result<(), String>>,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<(Append, Instant)>,
    bytes: usize,
    closed: bool,
}

/// The newest durable records, oldest first, and where the log ends.
struct Tail {
    entries: VecDeque<Arc<Vec<Entry>>>,
    bytes: VecDeque<usize>,
    total_bytes: usize,
    /// The number of the batch at the front; batches are counted since the start.
    first: u64,
    /// The offset from which on all records are in `entries`.
    start: u64,
    end: u64,
}

impl Shared {
    /// Of all topics together.
    fn partitions(&self) -> u32 {
        self.each * Topic::ALL.len() as u32
    }
}

/// A lock whose holder panicked still guards whole values here: each critical section writes them in one go.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EmbeddedLog {
    /// Opens the log in `dir`, or creates it with `partitions` for each topic.
    pub fn open(dir: &Path, partitions: u32) -> Result<EmbeddedLog, LogError> {
        std::fs::create_dir_all(dir).map_err(|error| LogError::Unavailable(format!("{}: {error}", dir.display())))?;
        let tuning = tuning(disk::takes_direct_io(dir));
        let descriptors = [
            ColumnFamilyDescriptor::new("default", Options::default()),
            ColumnFamilyDescriptor::new(RECORDS, tuning.clone()),
        ];
        let db = DB::open_cf_descriptors(&tuning, dir, descriptors).map_err(|error| open_error(dir, &error))?;
        let epoch = identity(&db, partitions)?;
        let end = last_offset(&db)?.map_or(0, |last| last + 1);
        let tail = Tail { entries: VecDeque::new(), bytes: VecDeque::new(), total_bytes: 0, first: 0, start: end, end };
        let shared = Arc::new(Shared {
            db,
            epoch,
            each: partitions,
            queue: Mutex::default(),
            queued: Condvar::new(),
            tail: Mutex::new(tail),
            grown: Condvar::new(),
            health: Mutex::new(Ok(())),
        });
        let writer = Writer::new(shared.clone(), end);
        let handle = std::thread::Builder::new()
            .name("log-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| LogError::Unavailable(format!("cannot start the log writer: {error}")))?;
        Ok(EmbeddedLog { shared, writer: Mutex::new(Some(handle)) })
    }

    /// Puts bytes that are no record of ours into a partition, as damage or another program would: for tests.
    #[doc(hidden)]
    pub fn append_foreign(&self, partition: u32, bytes: &[u8]) -> Result<Position, AppendError> {
        let (sender, answer) = std::sync::mpsc::sync_channel(1);
        let record = Record {
            topic: self.place(partition).0,
            key: format!("{FOREIGN}{partition}"),
            kind: String::new(),
            grant: Grant::Member,
            traceparent: None,
            value: Bytes::copy_from_slice(bytes),
        };
        let done: Done = Box::new(move |result| drop(sender.send(result)));
        self.append(vec![Append { record, done }]);
        answer.recv().unwrap_or_else(|_| Err(AppendError::Unknown("the writer stopped".into())))
    }
}

/// Marks a record that [`EmbeddedLog::append_foreign`] wants written without a frame: no tenant begins with a NUL.
const FOREIGN: char = '\0';

fn open_error(dir: &Path, error: &rocksdb::Error) -> LogError {
    let text = error.to_string();
    if text.contains("lock") {
        return LogError::Unavailable(format!("{} is in use by another process", dir.display()));
    }
    match error.kind() {
        rocksdb::ErrorKind::Corruption => LogError::Damaged(text),
        _ => LogError::Unavailable(text),
    }
}

fn tuning(direct_io: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    // A reused file keeps its size, so that a sync need not write the file system's own records.
    options.set_recycle_log_file_num(4);
    // Bounds what is replayed from the write-ahead log at start, and with it the start's time.
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(4);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    // Files written beside the page cache leave no dirty pages for a sync to wait for.
    options.set_use_direct_io_for_flush_and_compaction(direct_io);
    options
}

/// Reads the log's epoch, or gives it one.
fn identity(db: &DB, partitions: u32) -> Result<String, LogError> {
    let get = |name: &str| db.get(name).map_err(|error| LogError::Unavailable(error.to_string()));
    if let Some(epoch) = get("epoch")? {
        let found = get("partitions")?
            .and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?)))
            .ok_or_else(|| LogError::Damaged("the number of partitions is missing".into()))?;
        if found != partitions {
            return Err(LogError::PartitionMismatch { found, configured: partitions });
        }
        return String::from_utf8(epoch).map_err(|_| LogError::Damaged("the epoch is not text".into()));
    }
    let epoch = clock::random_id().simple().to_string();
    let mut batch = WriteBatch::default();
    batch.put("epoch", &epoch);
    batch.put("partitions", partitions.to_be_bytes());
    db.write_opt(batch, &synced()).map_err(|error| LogError::Unavailable(error.to_string()))?;
    // Left in memory, these two rows would keep every file of the write-ahead log from being deleted.
    db.flush().map_err(|error| LogError::Unavailable(error.to_string()))?;
    Ok(epoch)
}

fn last_offset(db: &DB) -> Result<Option<u64>, LogError> {
    let mut newest = db.raw_iterator_cf(&records(db));
    newest.seek_to_last();
    newest.status().map_err(|error| LogError::Damaged(error.to_string()))?;
    Ok(newest.key().and_then(parse_key).map(|at| at.offset))
}

fn records(db: &DB) -> Arc<rocksdb::BoundColumnFamily<'_>> {
    // Opened with this family in `open`, which fails without it.
    db.cf_handle(RECORDS).expect("the log was opened with its records")
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn key_of(at: Position) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&at.offset.to_be_bytes());
    key[8..].copy_from_slice(&at.partition.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<Position> {
    let (offset, partition) = key.split_at_checked(8)?;
    Some(Position {
        offset: u64::from_be_bytes(offset.try_into().ok()?),
        partition: u32::from_be_bytes(partition.try_into().ok()?),
    })
}

fn encode(record: &Record) -> Vec<u8> {
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
    };
    codec::encode(ROW_SCHEMA, &row)
}

fn decode(topic: Topic, bytes: &[u8]) -> Result<Record, Foreign> {
    let row: Row = codec::decode(ROW_SCHEMA, bytes).map_err(|error| foreign(error.to_string(), bytes))?;
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
        grant,
        traceparent: row.traceparent.map(str::to_owned),
        value: Bytes::copy_from_slice(row.value),
    })
}

fn foreign(why: String, bytes: &[u8]) -> Foreign {
    Foreign { why, key: None, value: Some(Bytes::copy_from_slice(bytes)), at: None }
}

impl Log for EmbeddedLog {
    fn epoch(&self) -> &str {
        &self.shared.epoch
    }

    fn partitions(&self) -> u32 {
        self.shared.partitions()
    }

    fn append(&self, batch: Vec<Append>) {
        let now = Instant::now();
        let mut refused = Vec::new();
        let mut queue = lock(&self.shared.queue);
        let closed = queue.closed;
        let was_empty = queue.waiting.is_empty();
        for append in batch {
            let size = append.record.value.len();
            if closed || queue.bytes + size > QUEUE_BYTES {
                refused.push(append.done);
            } else {
                queue.bytes += size;
                queue.waiting.push((append, now));
            }
        }
        let wake = was_empty && !queue.waiting.is_empty();
        drop(queue);
        if wake {
            self.shared.queued.notify_one();
        }
        for done in refused {
            done(Err(if closed {
                AppendError::Unavailable("the log is closed".into())
            } else {
                AppendError::QueueFull
            }));
        }
    }

    fn reader(&self, from: &[u64]) -> Result<Box<dyn Reader>, LogError> {
        let end = lock(&self.shared.tail).end;
        if from.len() != self.partitions() as usize {
            return Err(LogError::PartitionMismatch { found: self.partitions(), configured: from.len() as u32 });
        }
        for (partition, offset) in from.iter().enumerate() {
            if *offset > end {
                let at = Position { partition: partition as u32, offset: *offset };
                return Err(LogError::OutOfRange { at, bounds: Bounds { start: 0, end } });
            }
        }
        Ok(Box::new(EmbeddedReader { shared: self.shared.clone(), positions: from.to_vec(), place: None }))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        let end = lock(&self.shared.tail).end;
        Ok(vec![Bounds { start: 0, end }; self.partitions() as usize])
    }

    /// Offsets count over all partitions, so the partition that is furthest behind says it all.
    fn lag(&self, positions: &[u64]) -> Result<u64, LogError> {
        Ok(lock(&self.shared.tail).end.saturating_sub(positions.iter().copied().min().unwrap_or(0)))
    }

    fn committed(&self, _: &[u64]) {}

    fn health(&self) -> Result<(), String> {
        lock(&self.shared.health).clone()
    }

    fn close(&self) {
        lock(&self.shared.queue).closed = true;
        self.shared.queued.notify_one();
        *lock(&self.shared.health) = Err("the log is closed".into());
        if let Some(writer) = lock(&self.writer).take() {
            // A writer that panicked has already been reported; there is nothing left to wait for.
            drop(writer.join());
        }
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        self.close();
    }
}

/// The writer thread's own state.
struct Writer {
    shared: Arc<Shared>,
    end: u64,
    /// Keys of a batch whose write failed: to be deleted before anything else is written.
    leftover: Vec<[u8; 12]>,
    append_seconds: Histogram,
    batch_records: Histogram,
}

impl Writer {
    fn new(shared: Arc<Shared>, end: u64) -> Writer {
        Writer {
            shared,
            end,
            leftover: Vec::new(),
            append_seconds: telemetry::append_seconds(),
            batch_records: telemetry::append_batch_records(),
        }
    }

    fn run(mut self) {
        while let Some(batch) = self.take() {
            self.write(batch);
        }
    }

    /// All that waits; blocks until there is something. `None` once closed and empty.
    fn take(&self) -> Option<Vec<(Append, Instant)>> {
        let mut queue = lock(&self.shared.queue);
        loop {
            if !queue.waiting.is_empty() {
                queue.bytes = 0;
                return Some(std::mem::take(&mut queue.waiting));
            }
            if queue.closed {
                return None;
            }
            queue = self.shared.queued.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write(&mut self, batch: Vec<(Append, Instant)>) {
        if let Err(error) = self.clean_up() {
            for (append, _) in batch {
                (append.done)(Err(AppendError::Unavailable(error.clone())));
            }
            return;
        }
        let mut rows = WriteBatch::default();
        let mut entries = Vec::with_capacity(batch.len());
        let mut answers = Vec::with_capacity(batch.len());
        let mut bytes = 0;
        for (Append { record, done }, since) in batch {
            let (entry, row) = self.place(record, self.end + entries.len() as u64);
            bytes += row.len();
            rows.put_cf(&records(&self.shared.db), key_of(entry.at), row);
            entries.push(entry);
            answers.push((done, since));
        }
        match self.shared.db.write_opt(rows, &synced()) {
            Ok(()) => self.publish(entries, bytes, answers),
            Err(error) => self.fail(entries, answers, error.to_string()),
        }
    }

    /// The record at its place, and the bytes that go to disk.
    fn place(&self, record: Record, offset: u64) -> (Entry, Vec<u8>) {
        if let Some(partition) = record.key.strip_prefix(FOREIGN) {
            let at = Position { partition: partition.parse().unwrap_or(0), offset };
            let row = record.value.to_vec();
            let entry = Entry { at, record: decode(record.topic, &row) };
            return (entry, row);
        }
        let each = self.shared.each;
        let partition = record.topic.partition(crc32fast::hash(record.key.as_bytes()) % each, each);
        let row = encode(&record);
        (Entry { at: Position { partition, offset }, record: Ok(record) }, row)
    }

    /// Durable: readers may have it, and each appender is answered.
    fn publish(&mut self, entries: Vec<Entry>, bytes: usize, answers: Vec<(Done, Instant)>) {
        let first = self.end;
        let positions: Vec<Position> = entries.iter().map(|entry| entry.at).collect();
        self.end += entries.len() as u64;
        self.batch_records.record(entries.len() as f64);
        let mut tail = lock(&self.shared.tail);
        tail.push(entries, bytes);
        debug_assert_eq!(tail.end, self.end, "batch at {first}");
        drop(tail);
        self.shared.grown.notify_all();
        // The first of a batch has waited longest.
        if let Some((_, since)) = answers.first() {
            self.append_seconds.record(since.elapsed());
        }
        for ((done, _), at) in answers.into_iter().zip(positions) {
            done(Ok(at));
        }
    }

    fn fail(&mut self, entries: Vec<Entry>, answers: Vec<(Done, Instant)>, error: String) {
        tracing::error!(error, records = entries.len(), "the log could not write a batch");
        self.leftover = entries.iter().map(|entry| key_of(entry.at)).collect();
        // Once the leftover is gone for sure, so is the doubt about the outcome.
        let outcome = match self.clean_up() {
            Ok(()) => AppendError::Unavailable(error),
            Err(_) => AppendError::Unknown(error),
        };
        for (done, _) in answers {
            done(Err(outcome.clone()));
        }
    }

    /// Deletes what a failed write may have left behind. The log takes nothing before that worked.
    fn clean_up(&mut self) -> Result<(), String> {
        if self.leftover.is_empty() {
            return Ok(());
        }
        let mut deletes = WriteBatch::default();
        for key in &self.leftover {
            deletes.delete_cf(&records(&self.shared.db), key);
        }
        let result = self.shared.db.write_opt(deletes, &synced()).map_err(|error| error.to_string());
        if result.is_ok() {
            self.leftover.clear();
        }
        *lock(&self.shared.health) = result.clone();
        result
    }
}

impl Tail {
    fn push(&mut self, entries: Vec<Entry>, bytes: usize) {
        self.end += entries.len() as u64;
        self.entries.push_back(Arc::new(entries));
        self.bytes.push_back(bytes);
        self.total_bytes += bytes;
        while self.total_bytes > TAIL_BYTES && self.entries.len() > 1 {
            let (Some(oldest), Some(size)) = (self.entries.pop_front(), self.bytes.pop_front()) else {
                break;
            };
            self.start += oldest.len() as u64;
            self.total_bytes -= size;
            self.first += 1;
        }
    }
}

/// Reads from memory while it is at the tail, and from disk while it is behind it.
struct EmbeddedReader {
    shared: Arc<Shared>,
    positions: Positions,
    /// The tail's batch to read next and how much of it was read, once the reader is at the tail.
    place: Option<(u64, usize)>,
}

impl Reader for EmbeddedReader {
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError> {
        let deadline = Instant::now() + wait;
        loop {
            let Some((from, end)) = self.range(deadline) else {
                return Ok(Vec::new());
            };
            let entries = match self.read_memory(from, max) {
                Some(entries) => entries,
                None => self.read_disk(from, end, max)?,
            };
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
    }

    fn positions(&self) -> &Positions {
        &self.positions
    }
}

impl EmbeddedReader {
    /// Where to read on and where the log ends, as soon as these differ; `None` at the deadline.
    fn range(&self, deadline: Instant) -> Option<(u64, u64)> {
        let from = self.positions.iter().copied().min().unwrap_or(0);
        let mut tail = lock(&self.shared.tail);
        while tail.end <= from {
            let left = deadline.checked_duration_since(Instant::now())?;
            tail = self.shared.grown.wait_timeout(tail, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some((from, tail.end))
    }

    /// What the tail holds from the reader's place on; `None` when the tail begins behind the reader.
    fn read_memory(&mut self, from: u64, max: usize) -> Option<Vec<Entry>> {
        let (first, skip, batches) = {
            let tail = lock(&self.shared.tail);
            if from < tail.start {
                self.place = None;
                return None;
            }
            let (batch, skip) = self.place.filter(|(batch, _)| *batch >= tail.first).unwrap_or((tail.first, 0));
            let mut room = max + skip;
            let fits = |batch: &&Arc<Vec<Entry>>| {
                let fits = room > 0;
                room = room.saturating_sub(batch.len());
                fits
            };
            let batches: Vec<_> =
                tail.entries.iter().skip((batch - tail.first) as usize).take_while(fits).cloned().collect();
            (batch, skip, batches)
        };
        let (mut found, mut place, mut end) = (Vec::with_capacity(max.min(64)), (first, skip), from);
        let mut bytes = 0;
        for entry in batches.iter().flat_map(|batch| batch.iter()).skip(skip).take(max) {
            if bytes > READ_BYTES {
                break;
            }
            bytes += entry.record.as_ref().map_or(0, |record| record.value.len());
            let full = place.1 + 1 == batches[(place.0 - first) as usize].len();
            place = if full { (place.0 + 1, 0) } else { (place.0, place.1 + 1) };
            end = entry.at.offset + 1;
            if entry.at.offset >= self.positions[entry.at.partition as usize] {
                found.push(entry.clone());
            }
        }
        self.place = Some(place);
        self.advance(end);
        Some(found)
    }

    fn read_disk(&mut self, from: u64, end: u64, max: usize) -> Result<Vec<Entry>, LogError> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(1 << 20);
        options.fill_cache(false);
        options.set_iterate_upper_bound(end.to_be_bytes().to_vec());
        let mut rows = self.shared.db.raw_iterator_cf_opt(&records(&self.shared.db), options);
        let mut found = Vec::with_capacity(max.min((end - from) as usize));
        let mut next = end;
        let mut bytes = 0;
        rows.seek(from.to_be_bytes());
        while let Some((key, value)) = rows.item() {
            let Some(at) = parse_key(key).filter(|at| at.partition < self.shared.partitions()) else {
                return Err(LogError::Damaged(format!("a key of {} bytes among the records", key.len())));
            };
            if found.len() == max || bytes > READ_BYTES {
                next = at.offset;
                break;
            }
            if at.offset >= self.positions[at.partition as usize] {
                bytes += value.len();
                let topic = Topic::place(at.partition, self.shared.each).0;
                found.push(Entry { at, record: decode(topic, value) });
            }
            rows.next();
        }
        rows.status().map_err(|error| LogError::Damaged(error.to_string()))?;
        drop(rows);
        self.advance(next);
        Ok(found)
    }

    /// Offsets count over all partitions, so behind `offset` is behind it in each of them.
    fn advance(&mut self, offset: u64) {
        for position in &mut self.positions {
            *position = offset.max(*position);
        }
    }
}
