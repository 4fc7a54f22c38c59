//! Pieces of messages on their way into the log: those that come in quick succession become one record, so that the log
//! holds batches, not crumbs.
//!
//! The first piece goes at once, with those that were read together with it. What follows waits until [`GATHER`] is over
//! since the last record, or [`ENOUGH`] has come, or something else of the same run: the order of what one session publishes
//! stays. Each piece is answered with its record.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::value::to_raw_value;
use tokio::time::{Duration, Instant};

use super::submit::Draft;
use crate::auth::Principal;
use crate::delivery::outbox::{Answer, Outbox};
use crate::ingest::pending::OnVerdict;
use crate::log::Grant;
use crate::protocol::delta::Delta;
use crate::protocol::error::Error;
use crate::protocol::event::LogEvent;
use crate::protocol::kinds::{AGENT_TOKEN, DeltaData};
use crate::telemetry;

/// How long pieces gather.
const GATHER: Duration = Duration::from_millis(40);
/// Bytes of text that wait no longer.
const ENOUGH: usize = 1 << 10;

/// The messages that a session is writing.
#[derive(Default)]
pub struct Pieces {
    messages: HashMap<(Box<str>, Arc<str>), Message>,
    /// Nothing is due earlier.
    due: Option<Instant>,
}

struct Message {
    /// When what waits is to be sent.
    due: Instant,
    waiting: Option<Unsent>,
}

/// A piece that was asked for, once or several times in a row.
pub struct Unsent {
    piece: Delta,
    grant: Grant,
    asked: Vec<Asked>,
}

struct Asked {
    id: i64,
    /// The thread as the client calls it.
    called: Box<str>,
    to_char: u64,
}

impl Unsent {
    /// The piece of an event that was admitted.
    pub fn new(event: &LogEvent<'_>, grant: Grant, id: i64, called: &str) -> Result<Unsent, Error> {
        let data = DeltaData::parse(event.data)?;
        let run = event.run.as_deref().unwrap_or_default();
        let to_char = data.to_char();
        let piece = Delta {
            name: Delta::name(run, &data.message),
            thread: (*event.thread).into(),
            run: run.into(),
            message: (*data.message).into(),
            event: event.event,
            from: (*event.from).into(),
            at: (*event.at).into(),
            priority: event.priority,
            behind: 0,
            from_char: data.from_char,
            to_char,
            text: data.text.into_owned(),
        };
        Ok(Unsent { piece, grant, asked: vec![Asked { id, called: called.into(), to_char }] })
    }

    /// Takes in one that goes on where this one ends; gives back any other.
    fn join(&mut self, next: Unsent) -> Option<Unsent> {
        let fits = self.piece.is_before(&next.piece) && self.piece.priority == next.piece.priority;
        if !fits || self.grant != next.grant {
            return Some(next);
        }
        self.piece.join(&next.piece);
        self.asked.extend(next.asked);
        None
    }

    /// Its record, by way of `prepare`.
    pub fn prepare<T>(
        self,
        who: &Principal,
        traceparent: Option<String>,
        outbox: &Arc<Outbox>,
        prepare: impl FnOnce(&Draft<'_>, OnVerdict) -> T,
    ) -> T {
        let Unsent { piece, grant, asked } = self;
        let data =
            DeltaData { message: (&*piece.message).into(), from_char: piece.from_char, text: (&*piece.text).into() };
        // Strings and numbers always serialise.
        let data = to_raw_value(&data).unwrap_or_default();
        let event = LogEvent {
            tenant: (&*who.tenant).into(),
            thread: (&*piece.thread).into(),
            kind: AGENT_TOKEN.into(),
            event: piece.event,
            from: (&*piece.from).into(),
            at: (&*piece.at).into(),
            data: &data,
            key: None,
            run: Some((&*piece.run).into()),
            parent: None,
            priority: piece.priority,
        };
        let (outbox, message) = (outbox.clone(), piece.message.clone());
        let reply = Box::new(move |verdict: crate::projector::Verdict| {
            for Asked { id, called, to_char } in asked {
                let piece = Some((message.clone(), to_char));
                outbox.push_answer(Answer::Publish { id, thread: called, piece, verdict: verdict.clone() });
            }
        });
        telemetry::deltas_appended().increment(1);
        prepare(&Draft { event, grant, traceparent }, reply)
    }
}

impl Pieces {
    /// Takes a piece, and gives what is to be sent now.
    pub fn take(&mut self, new: Unsent, now: Instant) -> Vec<Unsent> {
        telemetry::deltas_received().increment(1);
        let key = (new.piece.thread.clone(), new.piece.name.clone());
        let message = self.messages.entry(key).or_insert(Message { due: now, waiting: None });
        self.due = [self.due, Some(message.due)].into_iter().flatten().min();
        let mut ready = Vec::new();
        match &mut message.waiting {
            None => message.waiting = Some(new),
            Some(waiting) => {
                if let Some(other) = waiting.join(new) {
                    ready.extend(message.waiting.replace(other));
                }
            }
        }
        let enough = |waiting: &mut Unsent| waiting.piece.text.len() >= ENOUGH;
        if let Some(waiting) = message.waiting.take_if(enough) {
            ready.push(waiting);
            message.due = now + GATHER;
        }
        ready
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// What waits of the messages that are meant.
    pub fn flush(&mut self, which: impl Fn(&Delta) -> bool) -> Vec<Unsent> {
        let meant = |message: &mut Message| message.waiting.take_if(|waiting| which(&waiting.piece));
        in_order(self.messages.values_mut().filter_map(meant).collect())
    }

    /// What has gathered for long enough.
    pub fn on_due(&mut self, now: Instant) -> Vec<Unsent> {
        let mut ready = Vec::new();
        self.messages.retain(|_, message| {
            if message.due <= now {
                // Without one that waits, what comes next is a first piece again.
                let Some(waiting) = message.waiting.take() else { return false };
                ready.push(waiting);
                message.due = now + GATHER;
            }
            true
        });
        self.due = self.messages.values().map(|message| message.due).min();
        in_order(ready)
    }

    /// When [`Pieces::on_due`] wants to be called next.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

/// As they came: ids of events sort by time.
fn in_order(mut ready: Vec<Unsent>) -> Vec<Unsent> {
    ready.sort_by_key(|unsent| unsent.piece.event);
    ready
}
