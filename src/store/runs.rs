//! Runs: the state of each agent's work on a thread, its calls of tools, and its events.

use bincode::{Decode, Encode};
use rocksdb::{IteratorMode, ReadOptions};

use super::catalogue::{
    OPEN_RUN_TIMES, OPEN_RUNS, RUN_ANSWERS, RUN_CALLS, RUN_EVENTS, RUN_STARTS, RUN_THREADS, RUNS, USER_RUNS,
};
use super::keys::Partition;
use super::merged::Span;
use super::{Batch, Store, StoreError, keys};
use crate::partitioning::Partitioning;

/// An event by its seq, with its time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct EventRef {
    pub seq: u64,
    /// Milliseconds.
    pub at: u64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Ending {
    Completed,
    Failed,
    Cancelled,
}

/// A run as its events have made it. Long values (input, output, answers) stay in the events alone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RunRow {
    pub agent: String,
    /// Who started it.
    pub user: String,
    /// The run that this one works for, on the same thread.
    pub parent: Option<String>,
    pub started: EventRef,
    /// The newest event.
    pub last: EventRef,
    pub ended: Option<(EventRef, Ending)>,
    /// Calls of tools that have not completed.
    pub executing: u32,
    /// Runs that work for this one and have not ended.
    pub children: u32,
    pub waiting: Option<WaitRow>,
    /// Who answered last, and with which event.
    pub resumed: Option<(EventRef, String)>,
    /// Who asked first that it be cancelled, and with which event.
    pub cancel: Option<(EventRef, String)>,
    /// Deltas of its messages.
    pub pieces: u64,
    /// When the newest of them came, in milliseconds.
    pub written_at: u64,
}

impl RunRow {
    /// A run of which nothing is known but who works in it and who started it.
    pub fn new(agent: String, user: String) -> RunRow {
        RunRow {
            agent,
            user,
            parent: None,
            started: EventRef::default(),
            last: EventRef::default(),
            ended: None,
            executing: 0,
            children: 0,
            waiting: None,
            resumed: None,
            cancel: None,
            pieces: 0,
            written_at: 0,
        }
    }

    /// When the run was last heard of, in milliseconds.
    pub fn heard_at(&self) -> u64 {
        self.last.at.max(self.written_at)
    }

    pub fn outline(&self) -> RunOutline {
        RunOutline {
            last: self.last.seq,
            pieces: self.pieces,
            heard_at: self.heard_at(),
            children: self.children,
            waiting: self.waiting,
            ended: self.ended.is_some(),
        }
    }
}

/// What says how long a run may stay as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunOutline {
    /// The seq of the newest event.
    pub last: u64,
    pub pieces: u64,
    /// Milliseconds.
    pub heard_at: u64,
    pub children: u32,
    pub waiting: Option<WaitRow>,
    pub ended: bool,
}

/// Hears of each run that a commit has changed, after the commit and before its readers do.
pub(super) type RunListener = Box<dyn Fn(Vec<(RunKey, RunOutline)>) + Send + Sync>;

/// A person must answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WaitRow {
    pub since: EventRef,
    /// Milliseconds.
    pub expires_at: Option<u64>,
}

/// A run's event, as far as the run's page shows it. What is long stays in the event.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StepRow {
    /// Milliseconds.
    pub at: u64,
    pub kind: String,
    pub from: String,
    /// The call that begins or completes.
    pub call: Option<String>,
    /// The tool of a call that begins.
    pub tool: Option<String>,
    /// The call has completed with an error.
    pub failed: bool,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CallRow {
    pub tool: String,
    pub begun: EventRef,
    pub done: Option<EventRef>,
}

/// Who answered a question, and with which event.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AnswerRow {
    pub event: EventRef,
    pub by: String,
}

/// A run's key: its thread and its name there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunKey {
    pub tenant: String,
    pub thread: String,
    pub run: String,
}

impl RunKey {
    pub fn new(tenant: &str, thread: &str, run: &str) -> RunKey {
        RunKey { tenant: tenant.to_owned(), thread: thread.to_owned(), run: run.to_owned() }
    }

    pub(super) fn partition(&self, partitioning: Partitioning) -> Partition {
        Partition::new(partitioning.of_thread(&self.tenant, &self.thread))
    }

    fn bytes(&self, partitioning: Partitioning) -> Vec<u8> {
        keys::joined(self.partition(partitioning), &[&self.tenant, &self.thread, &self.run])
    }

    /// Where an open run stands in a list of such: since when it is as it is, then which it is.
    pub fn time(&self, row: &RunRow) -> Vec<u8> {
        let since = row.waiting.as_ref().map_or(row.started.at, |wait| wait.since.at);
        [&since.to_be_bytes()[..], self.thread.as_bytes(), &[0], self.run.as_bytes()].concat()
    }

    /// Its key in the list of all open runs, or of those that wait.
    fn listed(&self, partitioning: Partitioning, row: &RunRow, waiting: bool) -> Vec<u8> {
        [time_prefix(self.partition(partitioning), &self.tenant, waiting), self.time(row)].concat()
    }

    /// The prefix of the rows that a run has many of.
    pub(super) fn under(&self, partitioning: Partitioning) -> Vec<u8> {
        named(self.partition(partitioning), &[&self.tenant, &self.thread], &self.run)
    }
}

/// The prefix of all keys with these parts and this run. Its name may hold a NUL, so its length stands before it.
fn named(partition: Partition, parts: &[&str], run: &str) -> Vec<u8> {
    [&keys::prefix(partition, parts)[..], &(run.len() as u16).to_be_bytes(), run.as_bytes()].concat()
}

/// How many runs a user has started on a thread that have not ended; without a row there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
struct OpenRunsRow {
    count: u32,
}

fn user_key(partitioning: Partitioning, key: &RunKey, user: &str) -> Vec<u8> {
    keys::joined(key.partition(partitioning), &[&key.tenant, user, &key.thread])
}

fn answer_key(partitioning: Partitioning, key: &RunKey, question: u64) -> Vec<u8> {
    [&key.under(partitioning)[..], &question.to_be_bytes()].concat()
}

impl Store {
    pub fn run(&self, key: &RunKey) -> Result<Option<RunRow>, StoreError> {
        self.get(RUNS, &key.bytes(self.partitioning))
    }

    pub fn call(&self, key: &RunKey, call: &str) -> Result<Option<CallRow>, StoreError> {
        self.get(RUN_CALLS, &[&key.under(self.partitioning)[..], call.as_bytes()].concat())
    }

    /// The answer to the question with this seq, if there was one.
    pub fn answer(&self, key: &RunKey, question: u64) -> Result<Option<AnswerRow>, StoreError> {
        self.get(RUN_ANSWERS, &answer_key(self.partitioning, key, question))
    }

    /// A thread's runs that began with an event before `before`, newest first: that event's seq, and the run.
    pub fn runs_of(
        &self,
        tenant: &str,
        thread: &str,
        before: u64,
    ) -> impl Iterator<Item = Result<(u64, RunKey), StoreError>> {
        let partition = self.partition(tenant, thread);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::prefix(partition, &[tenant, thread]));
        options.set_iterate_upper_bound(keys::event(partition, tenant, thread, before));
        let rows = self.db.iterator_cf_opt(&self.family(RUN_STARTS), options, IteratorMode::End);
        rows.map(move |row| {
            let (key, run) = row?;
            let seq = keys::seq_of(&key).unwrap_or(0);
            Ok((seq, RunKey::new(tenant, thread, &String::from_utf8_lossy(&run))))
        })
    }

    /// The threads that have a run of this name.
    pub fn threads_of_run(&self, tenant: &str, run: &str) -> impl Iterator<Item = Result<String, StoreError>> {
        let prefix = |partition| named(partition, &[tenant], run);
        let rows = self.merged(RUN_THREADS, prefix, Span::ALL);
        rows.map(|row| Ok(String::from_utf8_lossy(&row?.rest).into_owned()))
    }

    /// Whether the user has started a run on the thread that has not ended.
    pub fn has_open_run(&self, tenant: &str, thread: &str, user: &str) -> Result<bool, StoreError> {
        // A row for all of them: whatever has ended, this is one lookup.
        let key = keys::joined(self.partition(tenant, thread), &[tenant, user, thread]);
        let row = self.db.get_pinned_cf(&self.family(USER_RUNS), key);
        row.map(|row| row.is_some()).map_err(|error| self.note(error.into()))
    }

    /// How many such runs there are, on the run's thread.
    pub fn open_runs_by(&self, key: &RunKey, user: &str) -> Result<u32, StoreError> {
        Ok(self.get(USER_RUNS, &user_key(self.partitioning, key, user))?.map_or(0, |row: OpenRunsRow| row.count))
    }

    /// The threads on which the user has started runs that have not ended, each once.
    pub fn threads_of_open_runs(
        &self,
        tenant: &str,
        user: &str,
    ) -> impl Iterator<Item = Result<String, StoreError>> + use<'_> {
        let prefix = |partition| keys::prefix(partition, &[tenant, user]);
        let rows = self.merged(USER_RUNS, prefix, Span::ALL);
        rows.map(|row| Ok(String::from_utf8_lossy(&row?.rest).into_owned()))
    }

    /// A thread's runs that have not ended.
    pub fn open_runs(&self, tenant: &str, thread: &str) -> impl Iterator<Item = Result<RunKey, StoreError>> + use<'_> {
        let (tenant, thread) = (tenant.to_owned(), thread.to_owned());
        let runs = self.names_under(OPEN_RUNS, keys::prefix(self.partition(&tenant, &thread), &[&tenant, &thread]));
        runs.map(move |run| Ok(RunKey::new(&tenant, &thread, &run?)))
    }

    /// Runs that have not ended, of all tenants.
    pub fn all_open_runs(&self) -> impl Iterator<Item = Result<RunKey, StoreError>> {
        self.under(OPEN_RUNS, Vec::new()).filter_map(|row| {
            let key = match row {
                Ok((key, _)) => key,
                Err(error) => return Some(Err(error)),
            };
            let mut parts = std::str::from_utf8(key.get(Partition::BYTES..)?).ok()?.splitn(3, '\0');
            Some(Ok(RunKey::new(parts.next()?, parts.next()?, parts.next()?)))
        })
    }

    /// From now on `listener` hears of the runs that commits change. There is one, for as long as the store is open; another
    /// is not taken.
    pub fn listen_to_runs(&self, listener: impl Fn(Vec<(RunKey, RunOutline)>) + Send + Sync + 'static) {
        drop(self.run_listener.set(Box::new(listener)));
    }

    /// A tenant's runs that have not ended, or of them those that wait, by [`RunKey::time`] and from after that on.
    pub fn open_runs_by_time(
        &self,
        tenant: &str,
        waiting: bool,
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, RunKey), StoreError>> {
        let tenant = tenant.to_owned();
        let prefix = |partition| time_prefix(partition, &tenant, waiting);
        // The first key after it: nothing is between a key and the same one with a NUL.
        let from = after.map_or(Vec::new(), |after| [after, &[0]].concat());
        let rows = self.merged(OPEN_RUN_TIMES, prefix, Span { from: &from, to: None });
        rows.filter_map(move |row| {
            let time = match row {
                Ok(row) => row.rest,
                Err(error) => return Some(Err(error)),
            };
            let (thread, run) = std::str::from_utf8(time.get(8..)?).ok()?.split_once('\0')?;
            let run = RunKey::new(&tenant, thread, run);
            Some(Ok((time, run)))
        })
    }

    /// A run's events in their order.
    pub fn run_events(&self, key: &RunKey) -> impl Iterator<Item = Result<(u64, StepRow), StoreError>> {
        self.under(RUN_EVENTS, key.under(self.partitioning)).filter_map(move |row| {
            let (rest, value) = match row {
                Ok(row) => row,
                Err(error) => return Some(Err(error)),
            };
            // Another run's name may go on where this one ends; only what is as long as a seq is this one's.
            let seq = u64::from_be_bytes(rest.try_into().ok()?);
            Some(self.decoded(RUN_EVENTS, &value).map(|row| (seq, row)))
        })
    }
}

/// What the keys of a tenant's list of open runs begin with.
fn time_prefix(partition: Partition, tenant: &str, waiting: bool) -> Vec<u8> {
    [&keys::prefix(partition, &[tenant])[..], &[u8::from(waiting)]].concat()
}

impl Batch<'_> {
    /// A run that began, with its first event.
    pub fn put_new_run(&mut self, key: &RunKey, row: &RunRow) {
        let partition = key.partition(self.store.partitioning);
        self.put_run_row(key, row);
        let name = [&named(partition, &[&key.tenant], &key.run)[..], key.thread.as_bytes()].concat();
        self.put_empty(RUN_THREADS, &name);
        let start = keys::event(partition, &key.tenant, &key.thread, row.started.seq);
        self.rows.put_cf(&self.store.family(RUN_STARTS), start, &key.run);
        self.put_empty(OPEN_RUNS, &key.bytes(self.store.partitioning));
        self.list_open_run(key, row);
    }

    /// A run that an event has changed; `before` is the row as it was.
    pub fn put_run(&mut self, key: &RunKey, before: &RunRow, row: &RunRow) {
        self.put_run_row(key, row);
        if before.ended.is_none() && row.ended.is_some() {
            self.delete(OPEN_RUNS, &key.bytes(self.store.partitioning));
        }
        let moved = (before.ended, &before.waiting) != (row.ended, &row.waiting);
        if moved {
            for waiting in [false, true] {
                if waiting <= before.waiting.is_some() {
                    self.delete(OPEN_RUN_TIMES, &key.listed(self.store.partitioning, before, waiting));
                }
            }
            self.list_open_run(key, row);
        }
    }

    /// Puts a run into the lists that it belongs to.
    fn list_open_run(&mut self, key: &RunKey, row: &RunRow) {
        for waiting in [false, true] {
            if row.ended.is_none() && waiting <= row.waiting.is_some() {
                self.put_empty(OPEN_RUN_TIMES, &key.listed(self.store.partitioning, row, waiting));
            }
        }
    }

    /// So many runs of the user's on the run's thread have not ended.
    pub fn put_open_runs_by(&mut self, key: &RunKey, user: &str, count: u32) {
        match count {
            0 => self.delete(USER_RUNS, &user_key(self.store.partitioning, key, user)),
            _ => self.put(USER_RUNS, &user_key(self.store.partitioning, key, user), &OpenRunsRow { count }),
        }
    }

    /// A run that changed without an event.
    pub fn put_run_row(&mut self, key: &RunKey, row: &RunRow) {
        self.put(RUNS, &key.bytes(self.store.partitioning), row);
        self.runs.push((key.clone(), row.outline()));
    }

    pub fn put_run_event(&mut self, key: &RunKey, seq: u64, row: &StepRow) {
        self.put(RUN_EVENTS, &[&key.under(self.store.partitioning)[..], &seq.to_be_bytes()].concat(), row);
    }

    pub fn put_answer(&mut self, key: &RunKey, question: u64, row: &AnswerRow) {
        self.put(RUN_ANSWERS, &answer_key(self.store.partitioning, key, question), row);
    }

    pub fn put_call(&mut self, key: &RunKey, call: &str, row: &CallRow) {
        self.put(RUN_CALLS, &[&key.under(self.store.partitioning)[..], call.as_bytes()].concat(), row);
    }
}
