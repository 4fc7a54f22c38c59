//! What becomes of one event record: its verdict, its rows, and the updates that its readers get.

use std::sync::{Arc, Mutex};

use super::dead_letters::DeadLetters;
use super::groups::Groups;
use super::keys::Keys;
use super::kinds::Kinds;
use super::messages::{ClosingMessage, MessageClosing, Messages};
use super::receipts::Receipts;
use super::runs::{HowWritten, Rejected, Runs};
use super::thread::{AcceptedEvent, Thread, ThreadChange, ThreadEffect, repeated};
use super::tickets::Tickets;
use super::transaction::{EventRecord, Transaction};
use super::wanted::Wanted;
use super::work::{KeptWorks, WorkAct, Works};
use super::{Published, ThreadUpdate, Update, Verdict};
use crate::log::Grant;
use crate::protocol::error::Code;
use crate::protocol::event::LogEvent;
use crate::protocol::kinds::{AGENT_MESSAGE, AGENT_TOKEN};
use crate::store::runs::{EventRef, RunKey};
use crate::store::{KeyRow, Partition, Store, StoreError, keys};

/// What the batch has decided so far, which the store does not show before the commit.
pub(super) struct BatchState<'s> {
    pub(super) tx: Transaction<'s>,
    pub(super) receipts: Receipts,
    pub(super) dead_letters: DeadLetters<'s>,
    pub(super) keys: Keys,
    pub(super) tickets: Tickets,
    pub(super) groups: Groups,
    pub(super) kinds: Kinds,
    pub(super) works: Works,
    runs: Runs,
    messages: Messages,
}

impl<'s> BatchState<'s> {
    /// `letters` is locked from when the batch comes to a dead letter until it is dropped, where others may write some.
    pub(super) fn new(store: &'s Store, letters: Option<&'s Mutex<()>>) -> BatchState<'s> {
        BatchState::with(store, letters, Wanted::default(), KeptWorks::default())
    }

    /// The same; what is `wanted` is put into the index of what waits, and what is kept of work need not be read.
    pub(super) fn with(
        store: &'s Store,
        letters: Option<&'s Mutex<()>>,
        wanted: Wanted,
        kept: KeptWorks,
    ) -> BatchState<'s> {
        BatchState {
            tx: Transaction::new(store, wanted),
            receipts: Receipts::default(),
            dead_letters: DeadLetters::new(letters),
            keys: Keys::default(),
            tickets: Tickets::default(),
            groups: Groups::default(),
            kinds: Kinds::default(),
            works: Works::with(kept),
            runs: Runs::default(),
            messages: Messages::default(),
        }
    }

    /// Gives the event its seq, or refuses it.
    pub(super) fn judge(&mut self, input: &EventRecord<'_>, thread: &mut Thread) -> Result<Verdict, StoreError> {
        let judged = match &*input.event.kind {
            AGENT_TOKEN => self.judge_delta(input, thread),
            _ => self.judge_event(input, thread),
        };
        match judged {
            Ok(published) => Ok(Ok(published)),
            Err(Rejected::Store(error)) => Err(error),
            Err(Rejected::Refused(refused)) => {
                if refused.code == Code::RunOrder {
                    self.dead_letters.put_refused(&mut self.tx, input, thread.row.head, &refused)?;
                }
                Ok(Err(refused))
            }
        }
    }

    /// Leases work in a thread with this head, or settles a lease.
    pub(super) fn judge_work(&mut self, act: WorkAct, head: u64, log_time: u64) -> Result<Verdict, StoreError> {
        self.works.judge(&mut self.tx, &mut self.dead_letters, act, head, log_time)
    }

    fn judge_event(&mut self, input: &EventRecord<'_>, thread: &mut Thread) -> Result<Published, Rejected> {
        let EventRecord { record, event, at, .. } = *input;
        let store = self.tx.store;
        thread.check_writer(store, input)?;

        let partition = Partition::new(input.partition);
        let key = event.key.as_deref();
        let key = key.map(|key| keys::joined(partition, &[&event.tenant, &event.thread, &event.from, key]));
        if let Some(key) = &key
            && let Some(taken) = self.keys.find(store, key, input.key_time)?
        {
            return Ok(repeated(event, &taken)?);
        }

        let effect = match thread.change(store, event)? {
            ThreadChange::Append(effect) => effect,
            ThreadChange::Unchanged => {
                return Ok(Published { seq: thread.row.head, event: event.event, duplicate: true });
            }
            ThreadChange::Refused(error) => return Err(error.into()),
        };

        let mut closing = None;
        let run = if event.kind == AGENT_MESSAGE {
            match self.messages.judge_closing(store, event, thread, record.grant == Grant::Member)? {
                MessageClosing::None => {}
                MessageClosing::Closes(message) => closing = Some(message),
                MessageClosing::AlreadyClosed(verdict) => return Ok(verdict?),
            }
            let run = match &closing {
                Some(closing) => Some(closing.key.run.clone()),
                None => event.run.as_deref().map(|run| RunKey::new(&event.tenant, &event.thread, run)),
            };
            match run {
                Some(run) => self.runs.judge_message(store, run)?,
                None => None,
            }
        } else if event.run.is_some() {
            self.runs.judge(
                store,
                event,
                HowWritten { by_server: record.grant == Grant::Server, rules: record.rules },
            )?
        } else {
            None
        };

        // From here on nothing is refused any more.
        if let Some(run) = run.as_ref().and_then(|run| run.ending()) {
            self.close_messages(run, input, thread)?;
        }
        let new_event = AcceptedEvent {
            event,
            data: closing.as_ref().and_then(|closing| closing.data.as_deref()).unwrap_or(event.data),
            value: &record.value,
            privileged: record.grant != Grant::Member,
            at,
            effect,
            closes: closing.as_ref().map(|closing| closing.name()),
            run: run.as_ref().and_then(|run| run.notice()),
        };
        let appended = thread.append(new_event, &mut self.tx);
        if let Some(closing) = closing {
            self.close_message(&closing, event, appended, thread)?;
        }
        if let Some(run) = run {
            // The thread has changed with the event that was appended.
            thread.row.open_runs = thread.row.open_runs.saturating_add_signed(run.opens());
            self.runs.apply(run, event, appended, &mut self.tx)?;
        }
        if let Some(key) = key {
            let row = KeyRow {
                seq: appended.seq,
                event: *event.event.as_bytes(),
                at: input.key_time,
                content: event.content_digest(),
            };
            self.keys.put(&mut self.tx, input.partition, key, row);
        }
        Ok(Published { seq: appended.seq, event: event.event, duplicate: false })
    }

    /// A delta gets no seq; readers get it live.
    fn judge_delta(&mut self, input: &EventRecord<'_>, thread: &mut Thread) -> Result<Published, Rejected> {
        let EventRecord { event, at, .. } = *input;
        let store = self.tx.store;
        thread.check_writer(store, input)?;

        let key = RunKey::new(&event.tenant, &event.thread, event.run.as_deref().unwrap_or_default());
        let run = self.runs.row(store, &key)?;
        let Some(accepted) = self.messages.judge_delta(store, input, key.clone(), run, &thread.row)? else {
            return Ok(Published { seq: 0, event: event.event, duplicate: true });
        };

        let (bytes, dropped) = (accepted.delta.text.len() as u64, accepted.drops.unwrap_or(0));
        thread.message_grows(&accepted.key, accepted.begins, bytes, dropped);
        let (run, delta) = self.messages.apply_delta(accepted, &mut self.tx)?;
        self.runs.apply_delta(key, run, at, &mut self.tx);
        let update = ThreadUpdate { key: thread.key.clone(), update: Update::Delta(Arc::new(delta)) };
        self.tx.commit.events.push(update);
        Ok(Published { seq: 0, event: event.event, duplicate: false })
    }

    /// The end of a run closes its open messages, in the order in which they were begun.
    fn close_messages(&mut self, run: &RunKey, input: &EventRecord<'_>, thread: &mut Thread) -> Result<(), StoreError> {
        if thread.row.writing == 0 {
            return Ok(());
        }
        let store = self.tx.store;
        for (key, row) in self.messages.open_in_run(store, input.event, run, thread)? {
            let (closing, data) = self.messages.close_by_end(store, key, row)?;
            let event = closing.event(input.event, &data);
            let value = event.encode();
            let closes = Some(closing.name());
            // Its text was written by an agent, delta by delta.
            let new_event = AcceptedEvent {
                event: &event,
                data: &data,
                value: &value,
                at: input.at,
                privileged: true,
                effect: ThreadEffect::default(),
                closes,
                run: None,
            };
            let appended = thread.append(new_event, &mut self.tx);

            self.close_message(&closing, &event, appended, thread)?;
            if let Some(run) = self.runs.judge_message(store, run.clone())? {
                self.runs.apply(run, &event, appended, &mut self.tx)?;
            }
        }
        Ok(())
    }

    /// The message is closed by the event that was appended.
    fn close_message(
        &mut self,
        closing: &ClosingMessage,
        event: &LogEvent<'_>,
        appended: EventRef,
        thread: &mut Thread,
    ) -> Result<(), StoreError> {
        let store = self.tx.store;
        thread.message_closes(closing.number(), closing.bytes(), || self.messages.open_on_thread(store, event))?;
        self.messages.close(closing, event, appended, &mut self.tx)
    }
}
