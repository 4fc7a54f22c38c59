//! What becomes of one record with an event: the way of an event through the projector.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::value::RawValue;

use super::messages::{Closes, Closing, Messages};
use super::notes::Notes;
use super::runs::{Rejected, Runs};
use super::thread;
use super::thread::Thread;
use super::{AccessChange, Commit, CommittedEvent, KEY_LIFETIME, ThreadUpdate, Update};
use super::{Published, Verdict};
use crate::log::{Grant, Record};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{EventFrame, LogEvent, Priority};
use crate::protocol::ids;
use crate::protocol::kinds::{AGENT_MESSAGE, AGENT_TOKEN};
use crate::store::runs::{Mark, RunKey};
use crate::store::{Batch, EventRow, KeyRow, Store, StoreError, keys};

/// What the batch in hand has decided, which the store does not show yet.
pub(super) struct BatchState {
    /// What it has beside events.
    pub(super) notes: Notes,
    /// Runs that it changed, and their messages.
    runs: Runs,
    messages: Messages,
    /// Keys that it took.
    pub(super) keys: HashMap<Vec<u8>, KeyRow>,
    /// The log time of the oldest of them, those taken again since included.
    pub(super) oldest_key: u64,
}

impl Default for BatchState {
    fn default() -> BatchState {
        BatchState {
            notes: Notes::default(),
            runs: Runs::default(),
            messages: Messages::default(),
            keys: HashMap::new(),
            oldest_key: u64::MAX,
        }
    }
}

/// A record that is judged.
pub(super) struct Case<'a> {
    pub(super) store: &'a Store,
    pub(super) partition: u32,
    pub(super) record: &'a Record,
    pub(super) event: &'a LogEvent<'a>,
    /// The event's time and the partition's, in milliseconds.
    pub(super) at: u64,
    pub(super) log_time: u64,
}

impl BatchState {
    pub(super) fn clear(&mut self) {
        self.notes.clear();
        self.runs.clear();
        self.messages.clear();
        self.keys.clear();
        self.oldest_key = u64::MAX;
    }

    /// Gives the event its seq, or refuses it.
    pub(super) fn judge(
        &mut self,
        case: &Case<'_>,
        thread: &mut Thread,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<Verdict, StoreError> {
        let Case { store, record, event, .. } = *case;
        // Threads that exist by their name have no members: who may write there was judged at the edge.
        let judged = record.grant != Grant::Member || ids::is_reserved(&event.thread);
        if thread.row.head > 0 && !judged && !thread.is_member(store, event, &event.from)? {
            return Ok(Err(Error::no_thread()));
        }
        let judged = if event.kind == AGENT_TOKEN {
            self.take_delta(case, thread, batch, out)
        } else {
            self.take_event(case, thread, batch, out)
        };
        match judged {
            Ok(verdict) => Ok(verdict),
            Err(Rejected::Store(error)) => Err(error),
            Err(Rejected::Refused(refused)) => {
                if refused.code == Code::RunOrder {
                    self.notes.refuse(store, record, (event, case.at), &refused, batch, out)?;
                }
                Ok(Err(refused))
            }
        }
    }

    fn take_event(
        &mut self,
        case: &Case<'_>,
        thread: &mut Thread,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<Verdict, Rejected> {
        let Case { store, record, event, at, .. } = *case;
        let key = event.key.as_deref().map(|key| keys::joined(&[&event.tenant, &event.thread, &event.from, key]));
        if let Some(key) = &key
            && let Some(taken) = self.taken(store, key, case.log_time)?
        {
            return Ok(thread::repeated(event, &taken));
        }
        let change = match thread.change(store, event)? {
            Ok(change) => change,
            Err(verdict) => return Ok(verdict),
        };
        let (closing, step) = if event.kind == AGENT_MESSAGE {
            let closing = match self.messages.judge_closing(store, event, record.grant == Grant::Member)? {
                Closes::None => None,
                Closes::It(closing) => Some(closing),
                Closes::Was(verdict) => return Ok(verdict),
            };
            let named = || Some(RunKey::new(&event.tenant, &event.thread, event.run.as_deref()?));
            let run = closing.as_ref().map(|closing| closing.key.run.clone()).or_else(named);
            (closing, run.map_or(Ok(None), |run| self.runs.judge_message(store, run))?)
        } else {
            (None, self.runs.judge(store, event, record.grant == Grant::Server)?)
        };
        if let Some(run) = step.as_ref().and_then(|step| step.ends()) {
            self.close_all(run, case, thread, batch, out)?;
        }
        let mut placing = Placing { event, data: event.data, value: &record.value, at, change, closes: None };
        let seq = match closing {
            None => place(placing, thread, batch, out),
            Some(closing) => {
                placing.closes = Some(closing.name());
                placing.data = closing.data.as_deref().unwrap_or(event.data);
                let seq = place(placing, thread, batch, out);
                self.close(&closing, event, Mark { seq, at }, thread, batch)?;
                seq
            }
        };
        if let Some(step) = step {
            self.runs.apply(step, event, Mark { seq, at }, batch);
        }
        if let Some(key) = key {
            let row =
                KeyRow { seq, event: *event.event.as_bytes(), at: case.log_time, content: event.content_digest() };
            batch.put_key(case.partition, &key, &row);
            self.oldest_key = self.oldest_key.min(row.at);
            self.keys.insert(key, row);
        }
        Ok(Ok(Published { seq, event: event.event, duplicate: false }))
    }

    /// What an idempotency key stands for, if it is still good.
    fn taken(&self, store: &Store, key: &[u8], log_time: u64) -> Result<Option<KeyRow>, StoreError> {
        let taken = match self.keys.get(key) {
            Some(row) => Some(row.clone()),
            None => store.key(key)?,
        };
        Ok(taken.filter(|row| log_time.saturating_sub(row.at) < KEY_LIFETIME))
    }

    /// A piece of a message: it gets no seq, and readers have it live.
    fn take_delta(
        &mut self,
        case: &Case<'_>,
        thread: &mut Thread,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<Verdict, Rejected> {
        let Case { store, event, at, .. } = *case;
        let run = RunKey::new(&event.tenant, &event.thread, event.run.as_deref().unwrap_or_default());
        let open = self.runs.judge_delta(store, &run)?;
        let piece = self.messages.judge(store, event, run.clone(), &thread.row, open)?;
        let duplicate = piece.is_none();
        if let Some((piece, before)) = piece {
            let begins = self.messages.apply(store, run.clone(), (&piece, before), at, batch)?;
            thread.row.writing += u32::from(begins);
            thread.row.writing_bytes += piece.text.len() as u64;
            thread.changed = true;
            self.runs.written(store, run, at, batch)?;
            out.events.push(ThreadUpdate { key: thread.key.clone(), update: Update::Delta(Arc::new(piece)) });
        }
        Ok(Ok(Published { seq: 0, event: event.event, duplicate }))
    }

    /// The end of a run closes what it has left open.
    fn close_all(
        &mut self,
        run: &RunKey,
        case: &Case<'_>,
        thread: &mut Thread,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<(), StoreError> {
        if thread.row.writing == 0 {
            return Ok(());
        }
        for closing in self.messages.left_open(case.store, run)? {
            let Some(data) = &closing.data else { continue };
            let event = closing.event(case.event, data);
            // Strings and raw JSON always serialise.
            let value = serde_json::to_vec(&event).unwrap_or_default();
            let closes = Some(closing.name());
            let placing = Placing { event: &event, data, value: &value, at: case.at, change: None, closes };
            let mark = Mark { seq: place(placing, thread, batch, out), at: case.at };
            self.close(&closing, &event, mark, thread, batch)?;
            if let Some(step) = self.runs.judge_message(case.store, run.clone())? {
                self.runs.apply(step, &event, mark, batch);
            }
        }
        Ok(())
    }

    fn close(
        &mut self,
        closing: &Closing,
        event: &LogEvent<'_>,
        mark: Mark,
        thread: &mut Thread,
        batch: &mut Batch<'_>,
    ) -> Result<(), StoreError> {
        thread.row.writing = thread.row.writing.saturating_sub(1);
        thread.row.writing_bytes = thread.row.writing_bytes.saturating_sub(closing.bytes());
        self.messages.close(closing, event, mark, batch)
    }
}

/// An event that is to have a place in its thread.
struct Placing<'a> {
    event: &'a LogEvent<'a>,
    /// As its readers get it.
    data: &'a RawValue,
    /// What the thread's hash covers.
    value: &'a [u8],
    at: u64,
    change: Option<AccessChange>,
    closes: Option<Arc<str>>,
}

/// Gives an event the thread's next seq, and says which.
fn place(placing: Placing<'_>, thread: &mut Thread, batch: &mut Batch<'_>, out: &mut Commit) -> u64 {
    let Placing { event, data, value, at, change, closes } = placing;
    // An agent must hear at once that it shall stop.
    let priority = if event.kind == "agent_cancel_requested" { Some(Priority::High) } else { event.priority };
    let seq = thread.append(value, priority, at);
    let frame = serde_json::to_string(&EventFrame { data, ..event.frame(seq) }).unwrap_or_default();
    let class = Priority::class(priority) as u8;
    let row = EventRow { kind: &event.kind, class, hash: thread.row.hash, frame: &frame };
    batch.put_event(&event.tenant, &event.thread, seq, &row);
    thread.apply(&change, event, seq, at, batch);
    let visible = CommittedEvent { seq, kind: (*event.kind).into(), priority, frame: frame.into(), closes };
    out.events.push(ThreadUpdate { key: thread.key.clone(), update: Update::Event(Arc::new(visible), change) });
    seq
}
