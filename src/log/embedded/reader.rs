//! Readers: from memory while they are at the tail, and from disk while they are catching up. One that has read everything
//! writes what waits to be appended itself, and has it at once: to wake the writer thread and be woken by it takes longer.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::rows::{self, Range};
use super::shared::{Shared, lock};
use super::writer::Writer;
use crate::log::{Entry, LogError, Position, Positions, READ_BYTES, RULES, Reader};

pub(super) struct EmbeddedReader {
    shared: Arc<Shared>,
    writer: Arc<Writer>,
    positions: Positions,
    /// The tail's batch to read next and how much of it was read, once the reader is at the tail.
    cursor: Option<(u64, usize)>,
}

/// A record of newer rules that the reader came to, and its version: it stays before that.
type Newer = Option<(Position, u64)>;

impl Reader for EmbeddedReader {
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError> {
        let deadline = Instant::now() + wait;
        loop {
            let Some((from, end)) = self.range(deadline) else {
                return Ok(Vec::new());
            };
            let (entries, newer) = match self.read_memory(from, max) {
                Some(read) => read,
                None => self.read_disk(from, end, max)?,
            };
            if !entries.is_empty() {
                return Ok(entries);
            }
            if let Some((at, version)) = newer {
                return Err(LogError::NewerRules { at, version });
            }
        }
    }

    fn positions(&self) -> &Positions {
        &self.positions
    }
}

impl EmbeddedReader {
    pub(super) fn new(writer: Arc<Writer>, positions: Positions) -> EmbeddedReader {
        EmbeddedReader { shared: writer.shared().clone(), writer, positions, cursor: None }
    }

    /// Where to read on and where the log ends, as soon as these differ; `None` at the deadline.
    fn range(&self, deadline: Instant) -> Option<(u64, u64)> {
        let from = self.positions.iter().copied().min().unwrap_or(0);
        let grown = || Some(lock(&self.shared.tail).end).filter(|end| *end > from);
        if let Some(end) = grown() {
            return Some((from, end));
        }

        let mut queue = lock(&self.shared.queue);
        loop {
            if let Some(end) = grown() {
                // It may have been this reader that was to write what waits, and that has something else to do now.
                if !queue.waiting.is_empty() {
                    self.shared.wake_writer(queue);
                }
                return Some((from, end));
            }
            if !queue.waiting.is_empty() && queue.retry_at.is_none() {
                drop(queue);
                let wrote = self.writer.try_write();
                queue = lock(&self.shared.queue);
                if wrote {
                    continue;
                }
            }

            let left = deadline.checked_duration_since(Instant::now())?;
            queue.idle_readers += 1;
            let waited = self.shared.readers.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            queue.idle_readers -= 1;
        }
    }

    /// What the tail holds from `from` on; `None` when the tail begins after it.
    fn read_memory(&mut self, from: u64, max: usize) -> Option<(Vec<Entry>, Newer)> {
        let (first, skip, batches) = {
            let tail = lock(&self.shared.tail);
            if from < tail.start {
                self.cursor = None;
                return None;
            }
            let (batch, skip) = self.cursor.filter(|(batch, _)| *batch >= tail.first).unwrap_or((tail.first, 0));
            let mut room = max + skip;
            let fits = |batch: &&Arc<Vec<Entry>>| {
                let fits = room > 0;
                room = room.saturating_sub(batch.len());
                fits
            };
            let batches: Vec<_> =
                tail.batches.iter().skip((batch - tail.first) as usize).take_while(fits).cloned().collect();
            (batch, skip, batches)
        };

        let (mut found, mut cursor, mut end) = (Vec::with_capacity(max.min(64)), (first, skip), from);
        let (mut bytes, mut newer) = (0, None);
        for entry in batches.iter().flat_map(|batch| batch.iter()).skip(skip).take(max) {
            if bytes > READ_BYTES {
                break;
            }
            if let Ok(record) = &entry.record
                && record.rules > RULES
            {
                newer = Some((entry.at, record.rules.into()));
                break;
            }
            bytes += entry.record.as_ref().map_or(0, |record| record.value.len());
            let full = cursor.1 + 1 == batches[(cursor.0 - first) as usize].len();
            cursor = if full { (cursor.0 + 1, 0) } else { (cursor.0, cursor.1 + 1) };
            end = entry.at.offset + 1;
            if entry.at.offset >= self.positions[entry.at.partition as usize] {
                found.push(entry.clone());
            }
        }
        self.cursor = Some(cursor);
        self.advance(end);
        Some((found, newer))
    }

    fn read_disk(&mut self, from: u64, end: u64, max: usize) -> Result<(Vec<Entry>, Newer), LogError> {
        let shared = self.shared.clone();
        let db = shared.database()?;
        let range = Range { each: shared.each, holes: &shared.holes, from, end, positions: &self.positions };
        let read = rows::read(&db, &range, max).map_err(|error| shared.note(error))?;
        self.advance(read.next);
        Ok((read.entries, read.newer))
    }

    /// Offsets count over all partitions, so after `offset` is after it in each of them.
    fn advance(&mut self, offset: u64) {
        for position in &mut self.positions {
            *position = offset.max(*position);
        }
    }
}
