//! Runs: the state of each agent's work on a thread, its calls of tools, and its events.

use bincode::{Decode, Encode};

use super::catalogue::{OPEN_RUNS, RUN_CALLS, RUN_EVENTS, RUN_THREADS, RUNS};
use super::{Batch, Store, StoreError, keys};

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
    /// When the run was last heard of, in milliseconds.
    pub fn heard_at(&self) -> u64 {
        self.last.at.max(self.written_at)
    }
}

/// A person must answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WaitRow {
    pub since: EventRef,
    /// Milliseconds.
    pub expires_at: Option<u64>,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CallRow {
    pub tool: String,
    pub begun: EventRef,
    pub done: Option<EventRef>,
}

/// A run's key: its thread and its name there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RunKey {
    pub tenant: String,
    pub thread: String,
    pub run: String,
}

impl RunKey {
    pub fn new(tenant: &str, thread: &str, run: &str) -> RunKey {
        RunKey { tenant: tenant.to_owned(), thread: thread.to_owned(), run: run.to_owned() }
    }

    fn bytes(&self) -> Vec<u8> {
        keys::joined(&[&self.tenant, &self.thread, &self.run])
    }

    /// The prefix of the rows that a run has many of.
    pub(super) fn under(&self) -> Vec<u8> {
        named(&[&self.tenant, &self.thread], &self.run)
    }
}

/// The prefix of all keys with these parts and this run. Its name may hold a NUL, so its length stands before it.
fn named(parts: &[&str], run: &str) -> Vec<u8> {
    [&keys::prefix(parts)[..], &(run.len() as u16).to_be_bytes(), run.as_bytes()].concat()
}

impl Store {
    pub fn run(&self, key: &RunKey) -> Result<Option<RunRow>, StoreError> {
        self.get(RUNS, &key.bytes())
    }

    pub fn call(&self, key: &RunKey, call: &str) -> Result<Option<CallRow>, StoreError> {
        self.get(RUN_CALLS, &[&key.under()[..], call.as_bytes()].concat())
    }

    /// A thread's runs, in the order of their names.
    pub fn runs_of(&self, tenant: &str, thread: &str) -> Result<Vec<(RunKey, RunRow)>, StoreError> {
        let rows = self.rows_under(RUNS, keys::prefix(&[tenant, thread]));
        rows.map(|row| row.map(|(run, row)| (RunKey::new(tenant, thread, &run), row))).collect()
    }

    /// The threads that have a run of this name.
    pub fn threads_of_run(&self, tenant: &str, run: &str) -> Result<Vec<String>, StoreError> {
        self.names_under(RUN_THREADS, named(&[tenant], run))
    }

    /// Runs that have not ended, of one thread or (without) of the whole tenant.
    pub fn open_runs(&self, tenant: &str, thread: Option<&str>) -> Result<Vec<RunKey>, StoreError> {
        self.open_under(match thread {
            Some(thread) => keys::prefix(&[tenant, thread]),
            None => keys::prefix(&[tenant]),
        })
    }

    /// Runs that have not ended, of all tenants.
    pub fn all_open_runs(&self) -> Result<Vec<RunKey>, StoreError> {
        self.open_under(Vec::new())
    }

    fn open_under(&self, prefix: Vec<u8>) -> Result<Vec<RunKey>, StoreError> {
        let mut found = Vec::new();
        for row in self.under(OPEN_RUNS, prefix.clone()) {
            let key = [&prefix[..], &row?.0].concat();
            let text = String::from_utf8_lossy(&key);
            let mut parts = text.splitn(3, '\0');
            if let (Some(tenant), Some(thread), Some(run)) = (parts.next(), parts.next(), parts.next()) {
                found.push(RunKey::new(tenant, thread, run));
            }
        }
        Ok(found)
    }

    /// The seqs of a run's events.
    pub fn run_events(&self, key: &RunKey) -> Result<Vec<u64>, StoreError> {
        // Another run's name may go on where this one ends; only what is as long as a seq is this one's.
        let seq = |rest: Vec<u8>| rest.try_into().ok().map(u64::from_be_bytes);
        self.under(RUN_EVENTS, key.under()).filter_map(|row| row.map(|(rest, _)| seq(rest)).transpose()).collect()
    }
}

impl Batch<'_> {
    pub fn put_run(&mut self, key: &RunKey, row: &RunRow) {
        self.put_run_row(key, row);
        if row.started == row.last {
            let name = [&named(&[&key.tenant], &key.run)[..], key.thread.as_bytes()].concat();
            self.put_empty(RUN_THREADS, &name);
        }
        match row.ended {
            Some(_) => self.delete(OPEN_RUNS, &key.bytes()),
            None if row.started == row.last => self.put_empty(OPEN_RUNS, &key.bytes()),
            None => {}
        }
    }

    /// A run that changed without an event.
    pub fn put_run_row(&mut self, key: &RunKey, row: &RunRow) {
        self.put(RUNS, &key.bytes(), row);
    }

    pub fn put_run_event(&mut self, key: &RunKey, seq: u64) {
        self.put_empty(RUN_EVENTS, &[&key.under()[..], &seq.to_be_bytes()].concat());
    }

    pub fn put_call(&mut self, key: &RunKey, call: &str, row: &CallRow) {
        self.put(RUN_CALLS, &[&key.under()[..], call.as_bytes()].concat(), row);
    }
}
