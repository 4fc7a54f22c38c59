//! The scrubber's thread: slowly reads all that the log has on disk, so that damage is found while there are other copies.
//!
//! Tables: every row in order, past the caches, each block against its checksum and each offset against the one before.
//! Write-ahead log: the live files. Their rows are in memory as well, so when one is damaged these are written to tables, and
//! nothing is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::Counter;
use rocksdb::ReadOptions;

use super::files;
use super::format::records;
use super::shared::{Shared, lock};
use crate::log::LogError;
use crate::{disk, telemetry};

/// A pass over the tables begins once a day, or as soon as the one before has ended.
const TABLES_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// The write-ahead log is short.
const WRITE_AHEAD_EVERY: Duration = Duration::from_secs(10 * 60);
const BYTES_PER_SECOND: u64 = 8 << 20;
/// What is read at once, with the database held open.
const SLICE: u64 = 1 << 20;

pub(super) struct Scrub {
    shared: Arc<Shared>,
    bytes: Counter,
}

impl Scrub {
    pub(super) fn new(shared: Arc<Shared>) -> Scrub {
        Scrub { shared, bytes: telemetry::log_scrubbed_bytes() }
    }

    /// Runs until the log is closed.
    pub(super) fn run(self) {
        loop {
            let begin = Instant::now();
            let mut closed = self.tables();
            while !closed && begin.elapsed() < TABLES_EVERY {
                closed = self.write_ahead() || self.shared.wait_closed(WRITE_AHEAD_EVERY);
            }
            if closed {
                return;
            }
        }
    }

    /// Reads every row that is there now. Ends early at damage, and when the log is closed, which it says.
    fn tables(&self) -> bool {
        self.drop_from_cache("sst");
        let end = lock(&self.shared.tail).end;
        let mut from = 0;
        while from < end {
            match self.slice(from, end) {
                Ok((next, bytes)) => {
                    from = next;
                    self.bytes.increment(bytes);
                    if self.shared.wait_closed(Duration::from_millis(bytes * 1000 / BYTES_PER_SECOND)) {
                        return true;
                    }
                }
                // The writer is opening the database again.
                Err(LogError::Unavailable(_)) => {
                    if self.shared.wait_closed(Duration::from_secs(1)) {
                        return true;
                    }
                }
                Err(_) => return false,
            }
        }
        false
    }

    /// Reads rows from an offset on; gives the offset to go on at, and how much that was.
    fn slice(&self, from: u64, end: u64) -> Result<(u64, u64), LogError> {
        let db = self.shared.database()?;
        let mut options = ReadOptions::default();
        options.set_verify_checksums(true);
        options.fill_cache(false);
        options.set_readahead_size(SLICE as usize);
        options.set_iterate_upper_bound(end.to_be_bytes().to_vec());
        let mut rows = db.raw_iterator_cf_opt(&records(&db), options);

        let (mut next, mut bytes) = (self.shared.holes.skip(from), 0);
        rows.seek(from.to_be_bytes());
        while let Some((key, value)) = rows.item().filter(|_| bytes < SLICE) {
            let at = self.shared.expect_offset(key, next)?;
            next = self.shared.holes.skip(at.offset + 1);
            bytes += (key.len() + value.len()) as u64;
            rows.next();
        }
        // What cannot be read at all is damaged as well, and no other read will find it sooner.
        rows.status().map_err(|error| self.shared.damaged(error.to_string()))?;
        if !rows.valid() && next < end {
            return Err(self.shared.damaged(format!("the records {next}..{end} are missing")));
        }
        Ok((next, bytes))
    }

    /// Reads the live files of the write-ahead log; says whether the log was closed meanwhile.
    fn write_ahead(&self) -> bool {
        self.drop_from_cache("log");
        let Some(first) = files::damaged_log(&self.shared.dir) else { return false };
        // The writer may have been in the middle of a batch.
        if self.shared.wait_closed(Duration::from_secs(1)) {
            return true;
        }
        if files::damaged_log(&self.shared.dir).as_ref() != Some(&first) {
            return false;
        }
        let (file, at) = first;
        match self
            .shared
            .database()
            .and_then(|db| db.flush_cf(&records(&db)).map_err(|error| LogError::Unavailable(error.to_string())))
        {
            Ok(()) => {
                telemetry::log_mended().increment(1);
                tracing::error!(
                    file,
                    at,
                    "the write-ahead log was damaged; its rows were in memory and are in tables now: nothing is missing. Look at the disk"
                );
            }
            Err(error) => {
                tracing::error!(file, at, %error, "the write-ahead log is damaged, and its rows cannot be written to tables")
            }
        }
        false
    }

    /// So that what is read next comes from the disk.
    fn drop_from_cache(&self, ending: &str) {
        for (_, path) in files::numbered(&self.shared.dir, ending).unwrap_or_default() {
            disk::drop_from_cache(&path);
        }
    }
}
