//! The embedded log: a RocksDB of records in the order in which they were appended, synced before anybody is answered.
//!
//! Invariants:
//! - one thread at a time takes all that waits, writes it as one batch, syncs once (group commit) and then answers each: a
//!   reader that has nothing else to do, and so goes on with it, or else the writer thread;
//! - `end` is published only after the sync, and readers stop there: nothing they return can be lost;
//! - a batch whose write failed is deleted again before any other is written, so that what was answered as "will never
//!   appear" cannot come back, and the log reads the same from memory and from disk;
//! - offsets have no gaps but the holes that the log itself lists, so that a record that is missing is noticed;
//! - RocksDB opens only files that were found to be as they were written, up to a torn end for which nobody was answered.
//!
//! Files, each using only those before it: [`format`] (rows, keys, options), [`identity`], [`files`] (RocksDB's own formats, and
//! what is wrong in a folder), [`opening`], [`rows`] (reading), [`shared`] (queue, tail, health), [`writer`], [`reader`], [`scrub`]; for a log that is
//! not open [`read_only`], [`examine`] and [`salvage`].

pub mod examine;
mod files;
mod format;
mod identity;
mod opening;
pub mod read_only;
mod reader;
mod rows;
pub mod salvage;
mod scrub;
mod shared;
mod writer;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;

use self::opening::Database;
use self::reader::EmbeddedReader;
use self::scrub::Scrub;
use self::shared::{Shared, lock};
use self::writer::{FOREIGN, Writer};
use super::{
    Append, AppendError, Bounds, Cause, Done, Grant, Identity, IfUnnamed, Log, LogError, Position, Positions, RULES,
    Reader, Record,
};
use crate::memory::LogPlan;
use crate::partitioning::{NEW_LOG_PARTITIONS, Partitioning};

pub struct EmbeddedLog {
    shared: Arc<Shared>,
    writer: Arc<Writer>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held while files are open.
    lock: Mutex<Option<File>>,
}

impl EmbeddedLog {
    /// Opens the log in `dir`, or creates it with `partitions` for each topic where there is none.
    pub fn open(dir: &Path, partitions: u32) -> Result<EmbeddedLog, LogError> {
        EmbeddedLog::open_with(dir, partitions, IfUnnamed::Refuse)
    }

    /// The same; `if_unnamed` says what to do with a log that does not say which one it is.
    pub fn open_with(dir: &Path, partitions: u32, if_unnamed: IfUnnamed<'_>) -> Result<EmbeddedLog, LogError> {
        EmbeddedLog::open_sized(dir, Some(partitions), if_unnamed, LogPlan::default())
    }

    /// The same, with so much memory. Without a number of partitions it has those that it was created with, and a new one
    /// [`NEW_LOG_PARTITIONS`].
    pub fn open_sized(
        dir: &Path,
        partitions: Option<u32>,
        if_unnamed: IfUnnamed<'_>,
        memory: LogPlan,
    ) -> Result<EmbeddedLog, LogError> {
        let lock = opening::lock_folder(dir)?;
        let Database { db, last } = opening::open(dir, memory)?;
        let end = last.map_or(0, |last| last.offset + 1);
        let partitions = match partitions {
            Some(partitions) => partitions,
            None => identity::partitions(&db)?.unwrap_or(NEW_LOG_PARTITIONS),
        };
        let identity = identity::open(&db, dir, partitions, last, if_unnamed)?;
        let holes = opening::holes(&db)?;

        let shared = Arc::new(Shared::new(dir.to_owned(), db, identity, partitions, holes, end, memory));
        let (writer, scrub) = (Arc::new(Writer::new(shared.clone(), end)), Scrub::new(shared.clone()));
        let run = {
            let writer = writer.clone();
            move || writer.run()
        };
        let threads = vec![start("log-writer", run)?, start("log-scrub", move || scrub.run())?];
        Ok(EmbeddedLog { shared, writer, threads: Mutex::new(threads), lock: Mutex::new(Some(lock)) })
    }

    /// Whether there is no log in `dir`, so that opening it would create one.
    pub fn is_missing(dir: &Path) -> bool {
        files::is_empty(dir).unwrap_or(false)
    }

    /// Puts bytes that are no record of Weft's into a partition, as damage or another program would: for tests.
    #[doc(hidden)]
    pub fn append_foreign(&self, partition: u32, bytes: &[u8]) -> Result<Position, AppendError> {
        let (sender, answer) = std::sync::mpsc::sync_channel(1);
        let record = Record {
            topic: self.topic_of(partition).0,
            key: format!("{FOREIGN}{partition}"),
            kind: String::new(),
            rules: RULES,
            grant: Grant::Member,
            traceparent: None,
            value: Bytes::copy_from_slice(bytes),
        };
        let done: Done = Box::new(move |result| drop(sender.send(result)));
        self.append(vec![Append { record, done }]);
        answer.recv().unwrap_or_else(|_| Err(AppendError::Unknown("the writer stopped".into())))
    }
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, LogError> {
    let started = std::thread::Builder::new().name(name.into()).spawn(run);
    started.map_err(|error| LogError::Unavailable(format!("cannot start the thread {name}: {error}")))
}

impl Log for EmbeddedLog {
    fn identity(&self) -> Arc<Identity> {
        self.shared.identity.load_full()
    }

    fn new_generation(&self, cause: Cause) -> Result<(), LogError> {
        let end = lock(&self.shared.tail).end;
        let next = identity::begin_generation(&*self.shared.database()?, &self.shared.identity.load(), cause, end)?;
        self.shared.identity.store(Arc::new(next));
        Ok(())
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn partitions(&self) -> u32 {
        self.shared.partitions()
    }

    fn partitioning(&self) -> Partitioning {
        format::partitioning(self.shared.each)
    }

    /// Its database is locked for this process.
    fn has_other_writers(&self) -> bool {
        false
    }

    fn append(&self, batch: Vec<Append>) {
        let now = Instant::now();
        let mut refused = Vec::new();
        let mut queue = lock(&self.shared.queue);
        let closed = queue.closed;
        let was_empty = queue.waiting.is_empty();
        for append in batch {
            let size = append.record.value.len();
            if closed || queue.bytes + size > self.shared.memory.queue {
                refused.push(append.done);
            } else {
                queue.bytes += size;
                queue.waiting.push((append, now));
            }
        }
        if was_empty && !queue.waiting.is_empty() {
            self.shared.wake_writer(queue);
        } else {
            drop(queue);
        }

        let why = if closed { AppendError::Unavailable("the log is closed".into()) } else { AppendError::QueueFull };
        for done in refused {
            done(Err(why.clone()));
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
        Ok(Box::new(EmbeddedReader::new(self.writer.clone(), from.to_vec())))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        let end = lock(&self.shared.tail).end;
        Ok(vec![Bounds { start: 0, end }; self.partitions() as usize])
    }

    fn ends(&self) -> Result<Positions, LogError> {
        Ok(vec![lock(&self.shared.tail).end; self.partitions() as usize])
    }

    fn end(&self, _: u32) -> Result<u64, LogError> {
        Ok(lock(&self.shared.tail).end)
    }

    fn between(&self, positions: &[u64], ends: &[u64]) -> u64 {
        rows::between(positions, ends)
    }

    fn append_checkpoint(&self, _: u32, _: u64, _: &[u8; 32]) {}

    fn committed(&self, _: &[u64]) {}

    fn health(&self) -> Result<(), String> {
        self.shared.health()
    }

    fn close(&self) {
        lock(&self.shared.queue).closed = true;
        self.shared.queued.notify_one();
        self.shared.set_closed();
        for thread in lock(&self.threads).drain(..) {
            // The writer ends without an error: a panic of it ends the process. One of the scrubber has been reported.
            drop(thread.join());
        }
        drop(self.shared.db.write().unwrap_or_else(PoisonError::into_inner).take());
        drop(lock(&self.lock).take());
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_block_is_not_taken_for_a_lock() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        EmbeddedLog::open(dir.path(), 1).expect("a new log").close();
        std::fs::write(dir.path().join("CURRENT"), "a block that is no manifest\n").expect("the file is written");
        let error = EmbeddedLog::open(dir.path(), 1).err().expect("it is damaged").to_string();
        assert!(!error.contains("in use"), "{error}");
    }
}
