//! The writer: takes all that waits, writes it as one batch, syncs once, and answers each appender. It works on a thread of
//! its own, or on that of a reader that has nothing else to do, one at a time.
//!
//! After a failed write or sync RocksDB takes nothing more until it is opened again. So the writer first tries to delete what
//! the failed batch may have left; where that fails as well, it closes the database and opens it again, with the same checks
//! as at the start, at once and then every second. What was synced before is in the files; what was not is dropped or
//! deleted. Meanwhile appends are refused, and `health` says why. A full disk is different: RocksDB goes on by itself once
//! there is room, and stays readable until then.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use rocksdb::WriteBatch;

use super::format::{Stored, decode, encode, key_of, partition_of, records, synced};
use super::opening;
use super::shared::{Shared, lock};
use crate::log::{Append, AppendError, Done, Entry, Position, Record};
use crate::{disk, panics, telemetry};

/// How often a log that fails is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// With less room on the disk there is no use in opening the database again.
const ROOM: u64 = 64 << 20;

/// Marks a record that `append_foreign` wants written without a frame: no tenant begins with a NUL.
pub(super) const FOREIGN: char = '\0';

/// What writes, on whichever thread: one at a time.
pub(super) struct Writer {
    shared: Arc<Shared>,
    state: Mutex<State>,
    append_seconds: Histogram,
    batch_records: Histogram,
}

struct State {
    end: u64,
    /// Keys of a batch whose write failed: to be deleted before anything else is written.
    leftover: Vec<[u8; 12]>,
    /// When the log failed last, and why. Nothing is written until it works again.
    failed: Option<(Instant, String)>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, end: u64) -> Writer {
        Writer {
            shared,
            state: Mutex::new(State { end, leftover: Vec::new(), failed: None }),
            append_seconds: telemetry::append_seconds(),
            batch_records: telemetry::append_batch_records(),
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The writer thread.
    pub(super) fn run(&self) {
        let _vital = panics::abort_on_panic("the log's writer");
        while self.until_needed() {
            self.write_waiting(&mut lock(&self.state));
        }
        // A reader may still write what it has taken.
        drop(lock(&self.state));
    }

    /// Writes what waits, unless another thread does so; whether it did.
    pub(super) fn try_write(&self) -> bool {
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let _vital = panics::abort_on_panic("the log's writer");
        self.write_waiting(&mut state);
        true
    }

    /// Blocks until something waits, or until a log that fails is to be tried again. `false` once closed and empty.
    fn until_needed(&self) -> bool {
        let mut queue = lock(&self.shared.queue);
        while queue.waiting.is_empty() {
            if queue.closed {
                return false;
            }
            let Some(retry_at) = queue.retry_at else {
                queue = self.shared.queued.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(left) = retry_at.checked_duration_since(Instant::now()) else { break };
            queue = self.shared.queued.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Takes all that waits, and writes it; first tries again whether a log that failed works.
    fn write_waiting(&self, state: &mut State) {
        let batch = {
            let mut queue = lock(&self.shared.queue);
            queue.bytes = 0;
            std::mem::take(&mut queue.waiting)
        };
        if state.failed.as_ref().is_some_and(|(since, _)| since.elapsed() >= RETRY) {
            self.recover(state);
        }
        match &state.failed {
            None if batch.is_empty() => {}
            None => self.write(state, batch),
            Some((_, why)) => refuse(batch, why),
        }
    }

    fn write(&self, state: &mut State, batch: Vec<(Append, Instant)>) {
        let Ok(db) = self.shared.database() else {
            return refuse(batch, "it is not open");
        };

        let mut rows = WriteBatch::default();
        let mut entries = Vec::with_capacity(batch.len());
        let mut answers = Vec::with_capacity(batch.len());
        let mut bytes = 0;
        for (Append { record, done }, since) in batch {
            let (entry, row) = self.entry_and_row(record, state.end + entries.len() as u64);
            bytes += row.len();
            rows.put_cf(&records(&db), key_of(entry.at), row);
            entries.push(entry);
            answers.push((done, since));
        }

        let written = db.write_opt(rows, &synced());
        drop(db);
        match written {
            Ok(()) => self.publish(state, entries, bytes, answers),
            Err(error) => self.fail(state, entries, answers, &error),
        }
    }

    /// The record at its position, and the bytes that go to disk.
    fn entry_and_row(&self, record: Record, offset: u64) -> (Entry, Vec<u8>) {
        if let Some(partition) = record.key.strip_prefix(FOREIGN) {
            let at = Position { partition: partition.parse().unwrap_or(0), offset };
            let row = record.value.to_vec();
            let record = match decode(record.topic, &row) {
                Stored::Record(decoded) => decoded,
                Stored::Newer(_) => Ok(record),
            };
            return (Entry { at, record }, row);
        }
        let partition = partition_of(&record, self.shared.each);
        let row = encode(&record);
        (Entry { at: Position { partition, offset }, record: Ok(record) }, row)
    }

    /// Durable: readers may have it, and each appender is answered.
    fn publish(&self, state: &mut State, entries: Vec<Entry>, bytes: usize, answers: Vec<(Done, Instant)>) {
        let first = state.end;
        let positions: Vec<Position> = entries.iter().map(|entry| entry.at).collect();
        state.end += entries.len() as u64;
        self.batch_records.record(entries.len() as f64);

        let mut tail = lock(&self.shared.tail);
        tail.push(entries, bytes);
        debug_assert_eq!(tail.end, state.end, "batch at {first}");
        drop(tail);
        let readers_wait = lock(&self.shared.queue).idle_readers > 0;
        if readers_wait {
            self.shared.readers.notify_all();
        }

        // The first of a batch has waited longest.
        if let Some((_, since)) = answers.first() {
            self.append_seconds.record(since.elapsed());
        }
        for ((done, _), at) in answers.into_iter().zip(positions) {
            done(Ok(at));
        }
    }

    fn fail(&self, state: &mut State, entries: Vec<Entry>, answers: Vec<(Done, Instant)>, error: &rocksdb::Error) {
        // A table that cannot be compacted stops writes as well.
        if error.kind() == rocksdb::ErrorKind::Corruption {
            self.shared.damaged(error.to_string());
        }
        let error = error.to_string();
        tracing::error!(error, records = entries.len(), "the log could not write a batch");
        state.leftover = entries.iter().map(|entry| key_of(entry.at)).collect();
        self.recover(state);
        // Once the leftover is certainly gone, the outcome is certain too.
        let outcome = match state.failed {
            None => AppendError::Unavailable(error),
            Some(_) => AppendError::Unknown(error),
        };
        for (done, _) in answers {
            done(Err(outcome.clone()));
        }
    }

    /// Makes a log that failed work again, if its disk does.
    fn recover(&self, state: &mut State) {
        let mut result = self.clean_up(state);
        if let Err(error) = &result
            && !self.waits_for_room(error)
        {
            result = self.reopen(state).and_then(|()| self.clean_up(state));
        }
        if let Err(why) = result {
            let why = format!("the log cannot write ({why}); it is tried again every second");
            self.shared.set_failing(Some(why.clone()));
            let now = Instant::now();
            state.failed = Some((now, why));
            lock(&self.shared.queue).retry_at = Some(now + RETRY);
            self.shared.queued.notify_one();
        } else if state.failed.take().is_some() {
            lock(&self.shared.queue).retry_at = None;
            tracing::info!("the log takes records again");
            self.shared.set_failing(None);
        }
    }

    /// RocksDB goes on by itself when there is room again. Where there is and it does not, it has to be opened again.
    fn waits_for_room(&self, error: &str) -> bool {
        error.contains("No space left on device") && disk::room(&self.shared.dir).is_ok_and(|room| room < ROOM)
    }

    /// Deletes what a failed write may have left.
    fn clean_up(&self, state: &mut State) -> Result<(), String> {
        let db = self.shared.database().map_err(|_| "it is not open".to_owned())?;
        let mut deletes = WriteBatch::default();
        for key in &state.leftover {
            deletes.delete_cf(&records(&db), key);
        }
        db.write_opt(deletes, &synced()).map_err(|error| error.to_string())?;
        drop(db);
        state.leftover.clear();
        Ok(())
    }

    /// Closes the database and opens it again. What it holds is what was synced, and perhaps the leftover.
    fn reopen(&self, state: &State) -> Result<(), String> {
        let mut slot = self.shared.db.write().unwrap_or_else(PoisonError::into_inner);
        drop(slot.take());
        let database = opening::open(&self.shared.dir, self.shared.memory).map_err(|error| error.to_string())?;
        let end = database.end();
        if end < state.end {
            let what = format!("opened again, it ends at {end}: the records up to {} are missing", state.end);
            return Err(self.shared.damaged(what).to_string());
        }
        *slot = Some(database.db);
        telemetry::log_reopened().increment(1);
        tracing::warn!("the log was opened again after its disk had failed");
        Ok(())
    }
}

/// Answers what is not written at all.
fn refuse(batch: Vec<(Append, Instant)>, why: &str) {
    for (append, _) in batch {
        (append.done)(Err(AppendError::Unavailable(why.to_owned())));
    }
}
