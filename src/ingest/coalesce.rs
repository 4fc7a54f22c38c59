//! Joins the deltas of a message that come in quick succession, so that the log holds one record of several deltas rather
//! than one for every few characters.
//!
//! The first delta of a message is due at once, together with those that were read with it. What follows waits until
//! [`GATHER`] has passed since the message's last record, or [`ENOUGH`] text has come, or the session publishes something
//! else of the same run: what one session publishes keeps its order. A delta that begins its message anew continues none, so
//! that it begins a record; those after it may join it. Whoever published a delta stays attached to it as a
//! [`Waiter`], so that each one can be answered with the record's verdict.
//!
//! Pure but for metrics: time comes in, and what is to become a record goes out as [`PendingDelta`].

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::{Duration, Instant};

use super::pending::OnVerdict;
use super::submit::{AppendBatch, Draft};
use crate::log::Grant;
use crate::protocol::delta::Delta;
use crate::protocol::event::LogEvent;
use crate::protocol::json;
use crate::protocol::kinds::{AGENT_TOKEN, DeltaData};
use crate::telemetry;

/// How long deltas are gathered after a record.
const GATHER: Duration = Duration::from_millis(40);
/// With so many bytes of text a record is made at once.
const ENOUGH: usize = 1 << 10;

/// One publish that is answered with the record's verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// The command's id.
    pub id: i64,
    /// The thread as the client calls it.
    pub called: Box<str>,
    /// Where in the message its delta ends.
    pub to_char: u64,
}

/// A delta that is to become a record, joined from one publish or several.
#[derive(Debug)]
pub struct PendingDelta {
    tenant: Arc<str>,
    delta: Delta,
    /// It begins its message anew.
    restart: bool,
    grant: Grant,
    waiters: Vec<Waiter>,
}

impl PendingDelta {
    /// The delta of one publish: `event` as it was admitted, and its parsed `data`.
    pub fn new(
        tenant: Arc<str>,
        event: &LogEvent<'_>,
        data: DeltaData<'_>,
        grant: Grant,
        id: i64,
        called: &str,
    ) -> Self {
        let run = event.run.as_deref().unwrap_or_default();
        let to_char = data.to_char();
        let delta = Delta {
            name: Delta::name(run, &data.message),
            thread: (*event.thread).into(),
            run: run.into(),
            message: (*data.message).into(),
            event: event.event,
            from: (*event.from).into(),
            at: (*event.at).into(),
            priority: event.priority,
            head: 0,
            // Known once the record is judged.
            restarts: 0,
            from_char: data.from_char,
            to_char,
            text: data.text.into_owned(),
        };

        let waiters = vec![Waiter { id, called: called.into(), to_char }];
        PendingDelta { tenant, delta, restart: data.restart, grant, waiters }
    }

    /// The message that the delta is a part of.
    pub fn message(&self) -> &str {
        &self.delta.message
    }

    /// Whoever waits for the verdict; afterwards nobody does.
    pub fn take_waiters(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.waiters)
    }

    /// Adds the record to a batch; `reply` gets its verdict.
    pub fn append(self, batch: &mut AppendBatch, traceparent: Option<&str>, reply: OnVerdict) {
        telemetry::deltas_appended().increment(1);
        let PendingDelta { tenant, delta, restart, grant, .. } = self;
        let data = json::encode_raw(&DeltaData {
            message: (&*delta.message).into(),
            from_char: delta.from_char,
            text: (&*delta.text).into(),
            restart,
        });
        let event = LogEvent {
            tenant: (&*tenant).into(),
            thread: (&*delta.thread).into(),
            kind: AGENT_TOKEN.into(),
            event: delta.event,
            from: (&*delta.from).into(),
            at: (&*delta.at).into(),
            data: &data,
            key: None,
            run: Some((&*delta.run).into()),
            parent: None,
            priority: delta.priority,
        };
        batch.add(&Draft { event, grant, traceparent }, reply);
    }

    /// Joins `next` if it continues exactly where this one ends; gives back any other.
    fn join(&mut self, next: PendingDelta) -> Option<PendingDelta> {
        let continues = !next.restart && self.delta.is_before(&next.delta);
        if !continues || self.delta.priority != next.delta.priority || self.grant != next.grant {
            return Some(next);
        }
        self.delta.join(&next.delta);
        self.waiters.extend(next.waiters);
        None
    }
}

/// The messages that one session is writing.
#[derive(Default)]
pub struct Coalescer {
    /// By thread and by the message's name in it.
    messages: HashMap<(Box<str>, Arc<str>), GatheredMessage>,
    /// Nothing is due earlier.
    due: Option<Instant>,
}

struct GatheredMessage {
    /// When the waiting delta is to become a record.
    due: Instant,
    waiting: Option<PendingDelta>,
}

impl Coalescer {
    /// Adds a delta, and returns what is to become a record now.
    pub fn add(&mut self, new: PendingDelta, now: Instant) -> Vec<PendingDelta> {
        telemetry::deltas_received().increment(1);
        let key = (new.delta.thread.clone(), new.delta.name.clone());
        let message = self.messages.entry(key).or_insert(GatheredMessage { due: now, waiting: None });
        self.due = Some(self.due.map_or(message.due, |due| due.min(message.due)));

        let mut ready = Vec::new();
        match &mut message.waiting {
            None => message.waiting = Some(new),
            Some(waiting) => {
                if let Some(other) = waiting.join(new) {
                    ready.extend(message.waiting.replace(other));
                }
            }
        }

        if let Some(large) = message.waiting.take_if(|waiting| waiting.delta.text.len() >= ENOUGH) {
            ready.push(large);
            message.due = now + GATHER;
        }
        ready
    }

    /// What waits of the selected messages, to become records now.
    pub fn flush(&mut self, selects: impl Fn(&Delta) -> bool) -> Vec<PendingDelta> {
        let selected = |message: &mut GatheredMessage| message.waiting.take_if(|waiting| selects(&waiting.delta));
        in_order(self.messages.values_mut().filter_map(selected).collect())
    }

    /// What has been gathered for long enough. A message of which nothing came meanwhile is forgotten: its next delta is a
    /// first one again.
    pub fn on_due(&mut self, now: Instant) -> Vec<PendingDelta> {
        let mut ready = Vec::new();
        self.messages.retain(|_, message| {
            if message.due > now {
                return true;
            }
            let Some(waiting) = message.waiting.take() else { return false };
            ready.push(waiting);
            message.due = now + GATHER;
            true
        });
        self.due = self.messages.values().map(|message| message.due).min();
        in_order(ready)
    }

    /// When [`Coalescer::on_due`] is to be called next.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

/// In the order in which they came: ids of events sort by time.
fn in_order(mut ready: Vec<PendingDelta>) -> Vec<PendingDelta> {
    ready.sort_by_key(|pending| pending.delta.event);
    ready
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::ingest::admit::new_event;

    const MS: Duration = Duration::from_millis(1);

    /// A delta of a message; the id tells where it begins.
    fn delta(message: &str, from_char: u64, text: &str) -> PendingDelta {
        pending(DeltaData { message: message.into(), from_char, text: text.into(), restart: false })
    }

    /// A delta that begins its message anew.
    fn restart(message: &str, text: &str) -> PendingDelta {
        pending(DeltaData { message: message.into(), from_char: 0, text: text.into(), restart: true })
    }

    fn pending(data: DeltaData<'_>) -> PendingDelta {
        let raw = json::encode_raw(&data);
        let event = LogEvent { run: Some("r".into()), ..new_event("acme", "scout", "t", AGENT_TOKEN, &raw) };
        let id = data.from_char as i64;
        PendingDelta::new("acme".into(), &event, data, Grant::Scope, id, "@called")
    }

    fn texts(ready: &[PendingDelta]) -> Vec<&str> {
        ready.iter().map(|pending| &*pending.delta.text).collect()
    }

    #[test]
    fn the_first_delta_is_due_at_once_and_what_follows_is_gathered() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        assert!(coalescer.add(delta("m", 0, "Hel"), begin).is_empty());
        assert!(coalescer.add(delta("m", 3, "lo "), begin).is_empty());
        assert_eq!(coalescer.due(), Some(begin));
        let mut ready = coalescer.on_due(begin);
        assert_eq!(texts(&ready), ["Hello "]);
        let waiters = ready[0].take_waiters();
        assert_eq!(
            waiters.iter().map(|it| (it.id, it.to_char, &*it.called)).collect::<Vec<_>>(),
            [(0, 3, "@called"), (3, 6, "@called")]
        );
        assert!(ready[0].take_waiters().is_empty());

        assert!(coalescer.add(delta("m", 6, "wor"), begin + 10 * MS).is_empty());
        assert!(coalescer.on_due(begin + 39 * MS).is_empty());
        assert!(coalescer.add(delta("m", 9, "ld"), begin + 39 * MS).is_empty());
        assert_eq!(coalescer.due(), Some(begin + GATHER));
        assert_eq!(texts(&coalescer.on_due(begin + GATHER)), ["world"]);
    }

    #[test]
    fn a_message_of_which_nothing_comes_is_forgotten_and_begins_anew() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        coalescer.add(delta("m", 0, "a"), begin);
        assert_eq!(coalescer.on_due(begin).len(), 1);
        assert!(coalescer.on_due(begin + GATHER).is_empty());
        assert_eq!((coalescer.due(), coalescer.messages.len()), (None, 0));
        coalescer.add(delta("m", 1, "b"), begin + 2 * GATHER);
        assert_eq!(coalescer.due(), Some(begin + 2 * GATHER), "a first one again");
    }

    #[test]
    fn enough_text_does_not_wait() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        let long = "x".repeat(ENOUGH - 1);
        assert!(coalescer.add(delta("m", 0, &long), begin).is_empty());
        assert_eq!(texts(&coalescer.add(delta("m", ENOUGH as u64 - 1, "y"), begin)), [format!("{long}y")]);
        assert!(coalescer.add(delta("m", ENOUGH as u64, "z"), begin + MS).is_empty());
        coalescer.on_due(begin);
        assert_eq!(coalescer.due(), Some(begin + GATHER), "gathered from the record on");
    }

    #[test]
    fn what_does_not_continue_the_waiting_delta_pushes_it_out() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        coalescer.add(delta("m", 0, "abc"), begin);
        assert_eq!(texts(&coalescer.add(delta("m", 5, "gap"), begin)), ["abc"]);
        let urgent = PendingDelta {
            delta: Delta { priority: Some(crate::protocol::event::Priority::High), ..delta("m", 8, "!").delta },
            ..delta("m", 8, "!")
        };
        assert_eq!(texts(&coalescer.add(urgent, begin)), ["gap"], "of another priority");
        let member = PendingDelta { grant: Grant::Member, ..delta("m", 9, "?") };
        assert_eq!(texts(&coalescer.add(member, begin)), ["!"], "by another right");
    }

    #[test]
    fn a_delta_that_begins_its_message_anew_begins_a_record_and_others_join_it() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        // Also after a text that ends at its first character.
        coalescer.add(delta("m", 0, ""), begin);
        assert_eq!(texts(&coalescer.add(restart("m", "Ne"), begin)), [""]);
        assert!(coalescer.add(delta("m", 2, "w"), begin).is_empty());
        let sent_before = coalescer.add(restart("m", ""), begin);
        assert_eq!((texts(&sent_before), sent_before[0].restart), (vec!["New"], true), "what came before goes first");
        coalescer.add(delta("m", 0, "Newer"), begin);
        let ready = coalescer.on_due(begin);
        assert_eq!((texts(&ready), ready[0].restart, ready[0].waiters.len()), (vec!["Newer"], true, 2));
    }

    #[test]
    fn a_flush_takes_what_is_selected_in_the_order_it_came() {
        let (mut coalescer, begin) = (Coalescer::default(), Instant::now());
        for message in ["one", "two", "three", "other"] {
            coalescer.add(delta(message, 0, message), begin);
        }
        let other = coalescer.flush(|delta| &*delta.message == "other");
        assert_eq!(texts(&other), ["other"]);
        assert_eq!(texts(&coalescer.flush(|_| true)), ["one", "two", "three"]);
        assert!(coalescer.flush(|_| true).is_empty());
        assert!(clock::event_id() > other[0].delta.event);
    }
}
