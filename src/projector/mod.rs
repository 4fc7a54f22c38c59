//! The projector: reads the log in order and is the only one who gives a seq.
//!
//! Invariants:
//! - what depends on other events (membership, a duplicate key, the next seq) is decided here, once, from the record and
//!   what came before it in its partition: never from the clock, so that every node and every rebuild decides alike;
//! - nothing here looks from one partition into another, since they have no common order;
//! - rows and the position they come from are committed together, and only then does anybody hear of them;
//! - nothing stops it: what is not ours becomes a dead letter, a store that fails is tried again with the same records.

mod judge;
mod messages;
mod notes;
mod pump;
pub mod rebuild;
mod runs;
mod thread;

use std::collections::HashMap;
use std::sync::Arc;

use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use self::judge::{BatchState, Case};
pub use self::pump::{Pump, Status};
use self::thread::{Thread, data};
use crate::log::{Entry, Foreign, Log, Positions, Record, Topic};
use crate::protocol::delta::Delta;
use crate::protocol::error::Error;
use crate::protocol::event::{LogEvent, Priority};
use crate::protocol::ids;
pub use crate::protocol::records::{DeadLetterRecord, RUN_ORDER, ReceiptRecord, UNACKNOWLEDGED, UNREADABLE};
use crate::store::{Batch, Progress, Store, StoreError};
use crate::{clock, telemetry};

/// How long an idempotency key is kept, in milliseconds of log time.
pub const KEY_LIFETIME: u64 = 24 * 60 * 60 * 1_000;
/// Expired keys are purged for whole seconds of log time: often, so that it is never much at once.
const PURGE_STEP: u64 = 1_000;
/// Threads whose state is kept at hand; beyond that it is read from the store again.
const THREADS_AT_HAND: usize = 50_000;

/// The projector's judgement of one record.
pub type Verdict = Result<Published, Error>;

/// A record that has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    pub seq: u64,
    pub event: Uuid,
    /// The event was there before: by its key, or because nothing had to change.
    pub duplicate: bool,
}

/// What became visible with one commit, in log order.
#[derive(Default)]
pub struct Commit {
    pub events: Vec<ThreadUpdate>,
    pub verdicts: Vec<(Uuid, Verdict)>,
    /// The reasons of dead letters that came in.
    pub dead_letters: Vec<String>,
}

/// What became visible in a thread.
pub struct ThreadUpdate {
    /// `tenant/thread`.
    pub key: Arc<str>,
    pub update: Update,
}

pub enum Update {
    /// An event that has its seq.
    Event(Arc<CommittedEvent>, Option<AccessChange>),
    /// A piece of a message that is being written.
    Delta(Arc<Delta>),
}

/// What readers need of an event: one for all of them.
#[derive(Debug)]
pub struct CommittedEvent {
    pub seq: u64,
    pub kind: Box<str>,
    pub priority: Option<Priority>,
    pub frame: Utf8Bytes,
    /// The message that it closes, if that was written in pieces.
    pub closes: Option<Arc<str>>,
}

/// Who may read the thread from this event on, or be connected at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessChange {
    Joined(Vec<String>),
    Left(String),
    /// The user's sessions end.
    Revoked(String),
}

/// How the log names the places it gives out.
pub struct Places {
    pub topics: Vec<(Topic, u32)>,
    pub names: [String; 3],
}

impl Places {
    pub fn of(log: &dyn Log) -> Places {
        Places {
            topics: (0..log.partitions()).map(|partition| log.topic_of(partition)).collect(),
            names: Topic::ALL.map(|topic| log.topic_name(topic)),
        }
    }
}

/// Judges records and turns them into rows.
pub struct Projector {
    store: Arc<Store>,
    epoch: String,
    places: Places,
    progress: Vec<Progress>,
    threads: HashMap<String, Thread>,
    /// What the batch in hand has decided.
    hand: BatchState,
}

impl Projector {
    pub fn new(store: Arc<Store>, log: &dyn Log, progress: Vec<Progress>) -> Projector {
        Projector {
            store,
            epoch: log.epoch().to_owned(),
            places: Places::of(log),
            progress,
            threads: HashMap::new(),
            hand: BatchState::default(),
        }
    }

    /// For each partition the offset to read next.
    pub fn positions(&self) -> Positions {
        self.progress.iter().map(|progress| progress.next).collect()
    }

    /// The newest time in the log so far, in milliseconds.
    pub fn log_time(&self) -> u64 {
        self.progress.iter().map(|progress| progress.log_time).max().unwrap_or(0)
    }

    /// Judges and commits the first entries, as many as go together, and returns how many that were; `positions` is where
    /// the log goes on behind all of them. After an error nothing has happened, and the call can be repeated.
    pub fn project(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Commit), StoreError> {
        let progress = self.progress.clone();
        let result = self.project_some(entries, positions);
        if result.is_err() {
            self.progress = progress;
            self.threads.clear();
            self.hand.clear();
        }
        result
    }

    /// Commits as many entries as go into one batch: all, unless expired keys must be purged in between, since the purge
    /// sees only what is committed.
    fn project_some(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Commit), StoreError> {
        let store = self.store.clone();
        let mut batch = store.batch();
        let mut out = Commit::default();
        let mut taken = 0;
        for entry in entries {
            if !self.take(entry, &mut batch, &mut out, taken == 0)? {
                break;
            }
            taken += 1;
        }
        if taken == entries.len() {
            for (progress, next) in self.progress.iter_mut().zip(positions) {
                progress.next = progress.next.max(*next);
            }
        }
        for thread in self.threads.values_mut().filter(|thread| thread.changed) {
            thread.changed = false;
            if let Some((tenant, id)) = thread.key.split_once('/') {
                batch.put_thread(tenant, id, &thread.row);
            }
        }
        batch.put_progress(&self.epoch, &self.progress);
        store.commit(batch)?;
        self.hand.clear();
        if self.threads.len() > THREADS_AT_HAND {
            self.threads.clear();
        }
        Ok((taken, out))
    }

    /// Takes one entry into the batch; `false` if the batch must be committed before.
    fn take(
        &mut self,
        entry: &Entry,
        batch: &mut Batch<'_>,
        out: &mut Commit,
        first: bool,
    ) -> Result<bool, StoreError> {
        let partition = entry.at.partition;
        let taken = match &entry.record {
            Ok(record) if record.topic == Topic::Events => match read_event(record) {
                Ok((event, at)) => {
                    if !self.pass_time(partition, at, batch, first)? {
                        return Ok(false);
                    }
                    let verdict = self.judge(partition, record, &event, at, batch, out)?;
                    if let Err(refused) = &verdict {
                        telemetry::project_refused(refused.code.as_str()).increment(1);
                    }
                    out.verdicts.push((event.event, verdict));
                    Ok(())
                }
                Err(foreign) => Err(foreign),
            },
            Ok(record) => self.hand.notes.take(&self.store, record, batch, out)?.map(|at| {
                let progress = &mut self.progress[partition as usize];
                progress.log_time = progress.log_time.max(at);
            }),
            Err(foreign) => Err(foreign.clone()),
        };
        if let Err(foreign) = taken {
            tracing::warn!(position = %entry.at, foreign.why, "a record in the log is not ours");
            telemetry::foreign_records().increment(1);
            let log_time = self.progress[partition as usize].log_time;
            self.hand.notes.dead_letter(&self.store, &self.places, entry.at, &foreign, log_time, batch, out)?;
        }
        self.progress[partition as usize].next = entry.at.offset + 1;
        Ok(true)
    }

    /// Moves the partition's log time on and purges the keys that expired; `false` if the batch must be committed before.
    fn pass_time(&mut self, partition: u32, at: u64, batch: &mut Batch<'_>, first: bool) -> Result<bool, StoreError> {
        let progress = &mut self.progress[partition as usize];
        let log_time = progress.log_time.max(at);
        let purge_to = log_time.saturating_sub(KEY_LIFETIME) / PURGE_STEP * PURGE_STEP;
        if purge_to > progress.purged_to {
            // The purge sees what is committed. Keys of this batch are that old only when the log's time jumps.
            if !first && self.hand.oldest_key < purge_to {
                return Ok(false);
            }
            batch.purge_keys(partition, progress.purged_to, purge_to, |key| self.hand.keys.contains_key(key))?;
            progress.purged_to = purge_to;
        }
        progress.log_time = log_time;
        Ok(true)
    }

    /// Gives the event its seq, or refuses it.
    fn judge(
        &mut self,
        partition: u32,
        record: &Record,
        event: &LogEvent<'_>,
        at: u64,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<Verdict, StoreError> {
        let log_time = self.progress[partition as usize].log_time;
        let thread = match self.threads.get_mut(&record.key) {
            Some(thread) => thread,
            None => {
                let row = self.store.thread(&event.tenant, &event.thread)?;
                self.threads.entry(record.key.clone()).or_insert_with(|| Thread::new(&record.key, row, at))
            }
        };
        let case = Case { store: &self.store, partition, record, event, at, log_time };
        self.hand.judge(&case, thread, batch, out)
    }
}

/// The event in a record, and its time in milliseconds; or why it is not ours.
fn read_event(record: &Record) -> Result<(LogEvent<'_>, u64), Foreign> {
    let foreign = |why: String| Foreign::new(why, record);
    let event: LogEvent = serde_json::from_slice(&record.value)
        .map_err(|error| foreign(format!("the value is not an event: {error}")))?;
    let names = ids::check_name("tenant", &event.tenant)
        .and(ids::check_name("from", &event.from))
        .and(ids::check_thread(&event.thread));
    names.map_err(|error| foreign(error.to_string()))?;
    let key = record.key.split_once('/');
    if key != Some((&event.tenant, &event.thread)) {
        return Err(foreign("the key is not tenant/thread of the value".into()));
    }
    let at = clock::parse_rfc3339(&event.at).ok_or_else(|| foreign("at is not RFC 3339".into()))?;
    Ok((event, at))
}
