//! A log that is only read, and not changed by that: not even opened as a server opens it, by which a copy begins another
//! generation. Its files are held to be as they were written all the same ([`opening`]).

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rocksdb::DB;

use super::format::{self, Holes};
use super::identity;
use super::opening::{self, Database};
use super::rows::{self, Range};
use crate::log::{Append, AppendError, Bounds, Cause, Entry, Identity, Log, LogError, Positions, Reader, Topic};
use crate::partitioning::Partitioning;

/// The embedded log in a folder on which no server runs.
pub struct ReadOnlyLog {
    shared: Arc<Shared>,
    identity: Arc<Identity>,
}

struct Shared {
    db: DB,
    each: u32,
    holes: Holes,
    end: u64,
    /// Keeps a server from starting.
    _lock: Option<File>,
}

impl ReadOnlyLog {
    pub fn open(dir: &Path) -> Result<ReadOnlyLog, LogError> {
        let lock = opening::lock_existing(dir)?;
        let database = opening::open_read_only(dir)?;
        let end = database.end();
        let Database { db, .. } = database;
        let unnamed = || LogError::Unnamed(format!("no row in {} says which log it is", dir.display()));
        let identity = identity::read(&db)?.ok_or_else(unnamed)?;
        let each = identity::partitions(&db)?.ok_or_else(unnamed)?;
        let holes = opening::holes(&db)?;
        let shared = Arc::new(Shared { db, each, holes, end, _lock: lock });
        Ok(ReadOnlyLog { shared, identity: Arc::new(identity) })
    }
}

impl Shared {
    fn partitions(&self) -> usize {
        self.each as usize * Topic::ALL.len()
    }
}

impl Log for ReadOnlyLog {
    fn identity(&self) -> Arc<Identity> {
        self.identity.clone()
    }

    fn new_generation(&self, _: Cause) -> Result<(), LogError> {
        Err(LogError::Unavailable("it is only read".to_owned()))
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn partitions(&self) -> u32 {
        self.shared.partitions() as u32
    }

    fn partitioning(&self) -> Partitioning {
        format::partitioning(self.shared.each)
    }

    fn append(&self, batch: Vec<Append>) {
        for append in batch {
            (append.done)(Err(AppendError::Unavailable("it is only read".to_owned())));
        }
    }

    fn reader(&self, from: &[u64]) -> Result<Box<dyn Reader>, LogError> {
        Ok(Box::new(ReadOnlyReader { shared: self.shared.clone(), positions: from.to_vec() }))
    }

    fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        Ok(vec![Bounds { start: 0, end: self.shared.end }; self.shared.partitions()])
    }

    fn ends(&self) -> Result<Positions, LogError> {
        Ok(vec![self.shared.end; self.shared.partitions()])
    }

    fn end(&self, _: u32) -> Result<u64, LogError> {
        Ok(self.shared.end)
    }

    fn has_other_writers(&self) -> bool {
        false
    }

    fn between(&self, positions: &[u64], ends: &[u64]) -> u64 {
        rows::between(positions, ends)
    }

    fn append_checkpoint(&self, _: u32, _: u64, _: &[u8; 32]) {}

    fn committed(&self, _: &[u64]) {}

    fn health(&self) -> Result<(), String> {
        Ok(())
    }

    fn close(&self) {}
}

struct ReadOnlyReader {
    shared: Arc<Shared>,
    positions: Positions,
}

impl Reader for ReadOnlyReader {
    fn next(&mut self, max: usize, _: Duration) -> Result<Vec<Entry>, LogError> {
        let Shared { db, each, holes, end, .. } = &*self.shared;
        loop {
            let from = self.positions.iter().copied().min().unwrap_or(*end);
            if from >= *end {
                return Ok(Vec::new());
            }
            let range = Range { each: *each, holes, from, end: *end, positions: &self.positions };
            let read = rows::read(db, &range, max)?;
            for position in &mut self.positions {
                *position = read.next.max(*position);
            }
            match read.newer {
                Some((at, version)) if read.entries.is_empty() => return Err(LogError::NewerRules { at, version }),
                // All of them may be of partitions that are read from later on.
                None if read.entries.is_empty() => {}
                _ => return Ok(read.entries),
            }
        }
    }

    fn positions(&self) -> &Positions {
        &self.positions
    }
}
