//! What the writer thread, the scrubber, the appenders and the readers have in common.

use std::collections::VecDeque;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rocksdb::DB;

use super::format::Holes;
use super::rows;
use crate::log::{Append, Entry, Identity, LogError, Position, Topic};
use crate::memory::LogPlan;
use crate::telemetry;

pub(super) struct Shared {
    pub(super) dir: PathBuf,
    /// None while the writer opens it again after a failure, and once the log is closed. Whoever reads holds the lock for one
    /// read, so that the writer gets it.
    pub(super) db: RwLock<Option<DB>>,
    pub(super) identity: ArcSwap<Identity>,
    /// How many partitions each topic has.
    pub(super) each: u32,
    pub(super) holes: Holes,
    pub(super) memory: LogPlan,
    pub(super) queue: Mutex<Queue>,
    /// Signalled for the writer thread: something waits and no reader is idle, or the queue is closed, or writing failed.
    pub(super) queued: Condvar,
    /// Signalled for idle readers: something waits, or the tail has grown.
    pub(super) readers: Condvar,
    /// Locked after the queue by whoever locks both.
    pub(super) tail: Mutex<Tail>,
    state: Mutex<State>,
    /// Signalled when the log is closed.
    closing: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// Why nothing can be written.
    failing: Option<String>,
    /// What was found to be damaged. Stays until the next start.
    damaged: Option<String>,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) waiting: Vec<(Append, Instant)>,
    pub(super) bytes: usize,
    pub(super) closed: bool,
    /// Readers that wait for the tail to grow, and write what waits themselves. Not while writing fails: it may take long.
    pub(super) idle_readers: usize,
    /// When a log that fails is to be tried again.
    pub(super) retry_at: Option<Instant>,
}

/// The newest durable records, oldest first, and where the log ends.
pub(super) struct Tail {
    pub(super) batches: VecDeque<Arc<Vec<Entry>>>,
    sizes: VecDeque<usize>,
    total_bytes: usize,
    /// What stays in memory, so that a reader at the tail does not read the disk.
    limit: usize,
    /// The number of the batch at the front; batches are counted since the start.
    pub(super) first: u64,
    /// The offset from which on all records are in `batches`.
    pub(super) start: u64,
    pub(super) end: u64,
}

/// The database, open for as long as this is held.
pub(super) struct Opened<'a>(RwLockReadGuard<'a, Option<DB>>);

impl Deref for Opened<'_> {
    type Target = DB;

    fn deref(&self) -> &DB {
        // `Shared::database` makes none without one.
        self.0.as_ref().expect("it is open while the lock is held")
    }
}

impl Shared {
    pub(super) fn new(
        dir: PathBuf,
        db: DB,
        identity: Identity,
        each: u32,
        holes: Holes,
        end: u64,
        memory: LogPlan,
    ) -> Shared {
        telemetry::log_damaged().set(0.0);
        // An alert looks for their increase, so they have to be there before.
        [telemetry::log_mended(), telemetry::log_reopened()].iter().for_each(|counter| counter.increment(0));
        Shared {
            dir,
            db: RwLock::new(Some(db)),
            identity: ArcSwap::from_pointee(identity),
            each,
            holes,
            memory,
            queue: Mutex::default(),
            queued: Condvar::new(),
            readers: Condvar::new(),
            tail: Mutex::new(Tail::new(end, memory.tail)),
            state: Mutex::default(),
            closing: Condvar::new(),
        }
    }

    /// Of all topics together.
    pub(super) fn partitions(&self) -> u32 {
        self.each * Topic::ALL.len() as u32
    }

    /// Wakes one thread to write what waits.
    pub(super) fn wake_writer(&self, queue: MutexGuard<'_, Queue>) {
        let by_reader = queue.idle_readers > 0 && queue.retry_at.is_none();
        drop(queue);
        if by_reader {
            self.readers.notify_one();
        } else {
            self.queued.notify_one();
        }
    }

    pub(super) fn database(&self) -> Result<Opened<'_>, LogError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        if db.is_some() {
            return Ok(Opened(db));
        }
        drop(db);
        Err(LogError::Unavailable(self.health().err().unwrap_or_else(|| "it is being opened again".into())))
    }

    /// Notes what a read met, if it is damage.
    pub(super) fn note(&self, error: LogError) -> LogError {
        match error {
            LogError::Damaged(what) => self.damaged(what),
            other => other,
        }
    }

    /// Notes damage, and gives it as an error. The first that is found counts: what follows is often its consequence.
    pub(super) fn damaged(&self, what: String) -> LogError {
        let mut state = lock(&self.state);
        if state.damaged.is_none() {
            tracing::error!(what, "the log is damaged: stop the server, then `weft doctor` says more");
            telemetry::log_damaged().set(1.0);
            state.damaged = Some(what.clone());
        }
        LogError::Damaged(what)
    }

    /// The position that a row's key says, which has to be at the offset that comes next: offsets have no gaps.
    pub(super) fn expect_offset(&self, key: &[u8], next: u64) -> Result<Position, LogError> {
        rows::expect_offset(key, next, self.partitions()).map_err(|what| self.damaged(what))
    }

    pub(super) fn set_failing(&self, why: Option<String>) {
        lock(&self.state).failing = why;
    }

    pub(super) fn health(&self) -> Result<(), String> {
        let state = lock(&self.state);
        match &*state {
            State { closed: true, .. } => Err("the log is closed".into()),
            State { failing: Some(why), .. } => Err(why.clone()),
            State { damaged: Some(what), .. } => {
                Err(format!("the log is damaged: {what}; stop the server and run `weft doctor`"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn set_closed(&self) {
        lock(&self.state).closed = true;
        self.closing.notify_all();
    }

    /// Waits for so long, or until the log is closed; says whether it is.
    pub(super) fn wait_closed(&self, within: Duration) -> bool {
        let state = lock(&self.state);
        let waited = self.closing.wait_timeout_while(state, within, |state| !state.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }
}

impl Tail {
    fn new(end: u64, limit: usize) -> Tail {
        Tail { batches: VecDeque::new(), sizes: VecDeque::new(), total_bytes: 0, limit, first: 0, start: end, end }
    }

    pub(super) fn push(&mut self, batch: Vec<Entry>, bytes: usize) {
        self.end += batch.len() as u64;
        self.batches.push_back(Arc::new(batch));
        self.sizes.push_back(bytes);
        self.total_bytes += bytes;
        while self.total_bytes > self.limit && self.batches.len() > 1 {
            let (Some(oldest), Some(size)) = (self.batches.pop_front(), self.sizes.pop_front()) else {
                break;
            };
            self.start += oldest.len() as u64;
            self.total_bytes -= size;
            self.first += 1;
        }
    }
}

/// A lock whose holder panicked still guards whole values here: each critical section writes them in one go.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
