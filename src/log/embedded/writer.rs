//! The writer thread: takes all that waits, writes it as one batch, syncs once, and answers each appender.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use metrics::Histogram;
use rocksdb::WriteBatch;

use super::format::{decode, encode, key_of, records, synced};
use super::shared::{Shared, lock};
use crate::log::{Append, AppendError, Done, Entry, Position, Record};
use crate::{panics, telemetry};

/// Marks a record that `append_foreign` wants written without a frame: no tenant begins with a NUL.
pub(super) const FOREIGN: char = '\0';

pub(super) struct Writer {
    shared: Arc<Shared>,
    end: u64,
    /// Keys of a batch whose write failed: to be deleted before anything else is written.
    leftover: Vec<[u8; 12]>,
    append_seconds: Histogram,
    batch_records: Histogram,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, end: u64) -> Writer {
        Writer {
            shared,
            end,
            leftover: Vec::new(),
            append_seconds: telemetry::append_seconds(),
            batch_records: telemetry::append_batch_records(),
        }
    }

    pub(super) fn run(mut self) {
        let _vital = panics::abort_on_panic("the log's writer");
        while let Some(batch) = self.next_batch() {
            self.write(batch);
        }
    }

    /// All that waits; blocks until there is something. `None` once closed and empty.
    fn next_batch(&self) -> Option<Vec<(Append, Instant)>> {
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
            let (entry, row) = self.entry_and_row(record, self.end + entries.len() as u64);
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

    /// The record at its position, and the bytes that go to disk.
    fn entry_and_row(&self, record: Record, offset: u64) -> (Entry, Vec<u8>) {
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
        // Once the leftover is certainly gone, the outcome is certain too.
        let outcome = match self.clean_up() {
            Ok(()) => AppendError::Unavailable(error),
            Err(_) => AppendError::Unknown(error),
        };
        for (done, _) in answers {
            done(Err(outcome.clone()));
        }
    }

    /// Deletes what a failed write may have left. The log takes nothing before that succeeded.
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
