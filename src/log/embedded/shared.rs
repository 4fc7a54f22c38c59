//! What the writer thread, the appenders and the readers have in common.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use rocksdb::DB;

use crate::log::{Append, Entry, Identity, Topic};

/// The newest records stay in memory, so that a reader at the tail does not read the disk.
const TAIL_BYTES: usize = 16 << 20;

pub(super) struct Shared {
    pub(super) db: DB,
    pub(super) identity: ArcSwap<Identity>,
    /// How many partitions each topic has.
    pub(super) each: u32,
    pub(super) queue: Mutex<Queue>,
    /// Signalled when the queue is no longer empty, or closed.
    pub(super) queued: Condvar,
    pub(super) tail: Mutex<Tail>,
    /// Signalled when the tail has grown.
    pub(super) grown: Condvar,
    pub(super) health: Mutex<Result<(), String>>,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) waiting: Vec<(Append, Instant)>,
    pub(super) bytes: usize,
    pub(super) closed: bool,
}

/// The newest durable records, oldest first, and where the log ends.
pub(super) struct Tail {
    pub(super) batches: VecDeque<Arc<Vec<Entry>>>,
    sizes: VecDeque<usize>,
    total_bytes: usize,
    /// The number of the batch at the front; batches are counted since the start.
    pub(super) first: u64,
    /// The offset from which on all records are in `batches`.
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Shared {
    pub(super) fn new(db: DB, identity: Identity, each: u32, end: u64) -> Shared {
        Shared {
            db,
            identity: ArcSwap::from_pointee(identity),
            each,
            queue: Mutex::default(),
            queued: Condvar::new(),
            tail: Mutex::new(Tail::new(end)),
            grown: Condvar::new(),
            health: Mutex::new(Ok(())),
        }
    }

    /// Of all topics together.
    pub(super) fn partitions(&self) -> u32 {
        self.each * Topic::ALL.len() as u32
    }
}

impl Tail {
    fn new(end: u64) -> Tail {
        Tail { batches: VecDeque::new(), sizes: VecDeque::new(), total_bytes: 0, first: 0, start: end, end }
    }

    pub(super) fn push(&mut self, batch: Vec<Entry>, bytes: usize) {
        self.end += batch.len() as u64;
        self.batches.push_back(Arc::new(batch));
        self.sizes.push_back(bytes);
        self.total_bytes += bytes;
        while self.total_bytes > TAIL_BYTES && self.batches.len() > 1 {
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
