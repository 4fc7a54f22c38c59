//! What waits for one socket: filled by the hub and with answers from elsewhere, emptied by the session.
//!
//! - Answers overtake items. They are bounded by the session itself, which stops reading commands while too many are out.
//! - Events and deltas are bounded in bytes ([`EVENT_BYTES`]). When the next one does not fit, the subscription gets
//!   [`Item::Lagged`] in its place and nothing more, until it has caught up from the store.
//! - Signals cannot be caught up: they are dropped long before, so that events have room.
//! - A delta that waits grows by the next one of its message, unless an event of the thread came in between. One that begins
//!   the message anew waits by itself, after those of the text before: two texts are never joined.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::fair_queue::{FairQueue, SubId};
use crate::auth::Principal;
use crate::memory::Charge;
use crate::projector::CommittedEvent;
use crate::projector::Verdict;
use crate::protocol::delta::Delta;
use crate::protocol::error::Error;
use crate::protocol::event::Priority;
use crate::protocol::work::{Outcome, Work};
use crate::store::deliveries::RequeuedDelivery;
use crate::store::messages::TextPosition;
use crate::store::{JoinedThread, StoredEvent};

/// Bytes of events that may wait for a socket.
pub const EVENT_BYTES: usize = 256 << 10;
/// With so many bytes waiting, signals are dropped.
const SIGNAL_BYTES: usize = EVENT_BYTES / 4;
/// [`Item::Joined`] that may wait for a socket.
const MAX_JOINED: usize = 4_096;
/// What an event costs beside its frame.
const OVERHEAD: usize = 64;
/// What a delta costs beside its text.
const DELTA_OVERHEAD: usize = 256;
/// A delta that waits grows no more once its text has so many bytes.
const DELTA_BYTES: usize = 64 << 10;

/// What the hub has for a session. Of one subscription the items go in the thread's order.
#[derive(Debug)]
pub enum Item {
    Event {
        sub: SubId,
        event: Arc<CommittedEvent>,
    },
    Delta {
        sub: SubId,
        delta: Arc<Delta>,
    },
    /// Live only: dropped when there is no room for it.
    Signal {
        sub: SubId,
        frame: Utf8Bytes,
    },
    /// A run of the user's on the thread has ended, with the event before this.
    RunEnded {
        sub: SubId,
    },
    /// The outbox was full: the subscription did not get the next event.
    Lagged {
        sub: SubId,
    },
    /// More threads were joined than may wait.
    Overrun,
    /// A thread is among those that the session follows, from the event after `before` on: the user became a member, or it
    /// was made.
    Joined {
        thread: String,
        before: u64,
    },
}

impl Item {
    /// Whether it goes out even while the client has no credit for events.
    fn is_notice(&self) -> bool {
        matches!(self, Item::Joined { .. } | Item::Overrun)
    }

    /// Bytes that it counts for.
    fn cost(&self) -> usize {
        match self {
            Item::Event { event, .. } => event.frame.len() + OVERHEAD,
            Item::Delta { delta, .. } => delta.text.len() + DELTA_OVERHEAD,
            Item::Signal { frame, .. } => frame.len() + OVERHEAD,
            Item::RunEnded { .. } | Item::Lagged { .. } | Item::Overrun | Item::Joined { .. } => 0,
        }
    }
}

/// What a read of the store brings.
pub enum Chunk {
    Events {
        events: Vec<StoredEvent>,
        charge: Arc<Charge>,
        /// For a replay at a pace: when the event after these happened, if it is not due yet.
        next_ms: Option<u64>,
    },
    /// Of messages that are being written, the text that the client does not have yet.
    OpenText {
        texts: Vec<OpenText>,
        /// The number of the message to go on with, if there are more.
        next: Option<u64>,
    },
    /// What a durable subscription is to be sent again because somebody requeued it, if there is anything.
    Requeued(Option<ReadDelivery>),
}

/// An event that is delivered again.
pub struct ReadDelivery {
    pub delivery: RequeuedDelivery,
    pub event: StoredEvent,
    pub charge: Arc<Charge>,
}

/// The text of a message that is being written, as far as the client does not have it.
pub struct OpenText {
    /// What tells the message from all others of its thread.
    pub name: Arc<str>,
    /// After its last character.
    pub end: TextPosition,
    /// None if there is nothing to send.
    pub frame: Option<Utf8Bytes>,
}

/// The subscription that a read of the store is for, and the class of priority for which it was chosen.
#[derive(Debug, Clone, Copy)]
pub struct ReadFor {
    pub sub: SubId,
    pub class: usize,
}

/// What a session waits for from elsewhere, and what it must do at once.
pub enum Answer {
    /// The verdict on a publish.
    Publish {
        id: i64,
        thread: Box<str>,
        /// For a delta: its message, and how many characters of that end with it.
        delta: Option<(Box<str>, u64)>,
        verdict: Verdict,
    },
    /// Somebody wants a run of the user's cancelled: the signal to send if the session subscribes to the thread. It does not
    /// wait for events that were there before.
    ToCancel { thread: Box<str>, signal: Utf8Bytes },
    /// The user was removed from the thread, and may be a member again by now.
    Left { thread: Box<str> },
    /// This node has whatever the log had when the command that waits for it asked, or that cannot be known now.
    Level(Result<(), Error>),
    /// The user's threads, for the `subscribe` to `"*"` that waits for them.
    Threads(Result<Vec<JoinedThread>, Error>),
    /// What the next command needs to know is looked up.
    LookedUp,
    /// Who the next command, which is a `connect` or `refresh`, is from.
    Verified(Box<Result<Principal, Error>>),
    /// Others had their turn on this worker: what is done in parts goes on.
    GoOn,
    /// Whether the log has the first receipts of a new durable subscription, for the `subscribe` that waits for that.
    FirstReceiptsStored {
        /// Which attempt of the session's it is; the answer to an earlier one comes too late.
        attempt: u32,
        stored: Result<(), Error>,
    },
    /// Whether the log has a subscription's receipt.
    ReceiptStored { thread: Box<str>, stored: bool },
    /// Whether the log has the dead letter of an event that was not acknowledged.
    DeadLettered { thread: Box<str>, seq: u64, dead_lettered: bool },
    /// Somebody has requeued a delivery to the user in this thread.
    Requeued { thread: Box<str> },
    /// Whether the log has what became of a delivery that was requeued.
    RequeuedRecorded { thread: Box<str>, recorded: bool },
    /// The server is going down: come back after so many milliseconds.
    Drain { retry_after_ms: u64 },
    /// The group that a `consume` wants is there, or why it is not.
    Consuming { id: i64, made: Result<(), Error> },
    /// Work for the session.
    Work(Box<Work>),
    /// Whether a settlement counts.
    Settled { id: Option<i64>, outcome: Outcome, verdict: Verdict },
    /// The user's sessions are ended.
    Revoked,
    /// What a subscription has read from the store.
    Chunk { sub: ReadFor, read: Result<Chunk, Error> },
}

/// Which items a session can use now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    All,
    /// No events: the client has no credit for them, or they are held back for a handover.
    Notices,
    None,
}

#[derive(Default)]
struct Inner {
    answers: VecDeque<Answer>,
    items: FairQueue<Item>,
    /// What the items cost.
    event_bytes: usize,
    /// How many notices are among the items.
    notices: usize,
    closed: bool,
    waker: Option<Waker>,
}

impl Inner {
    /// Adds an item that has a cost if there is room for that, and [`Item::Lagged`] if not. One always fits, however large.
    fn push_bounded(&mut self, sub: SubId, priority: Option<Priority>, item: Item) -> bool {
        let cost = item.cost();
        let fits = self.has_room(cost);
        if fits {
            self.event_bytes += cost;
            self.items.push(Some(sub), Some(Priority::class(priority)), item);
        } else {
            self.items.push(Some(sub), None, Item::Lagged { sub });
        }
        fits
    }

    fn has_room(&self, cost: usize) -> bool {
        self.event_bytes + cost <= EVENT_BYTES || self.event_bytes == 0
    }

    /// The delta that `next` continues, if that still waits, may grow, and no event of the thread came after it.
    fn waiting_delta(&mut self, sub: SubId, next: &Delta) -> Option<&mut Arc<Delta>> {
        // Deltas of other messages may stand between the two; anything else may not.
        let newest = self.items.newest_of(sub, |item| match item {
            Item::Delta { delta, .. } => delta.name == next.name,
            _ => true,
        })?;
        match newest {
            Item::Delta { delta, .. }
                if delta.is_before(next) && delta.priority == next.priority && delta.text.len() < DELTA_BYTES =>
            {
                Some(delta)
            }
            _ => None,
        }
    }
}

#[derive(Default)]
pub struct Outbox {
    inner: Mutex<Inner>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing below can panic half way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what the hub has for a subscription, all under one lock and with one wake; `None` if the session is gone.
    pub fn fill<R>(&self, add: impl FnOnce(&mut Filling<'_>) -> R) -> Option<R> {
        let mut inner = self.lock();
        if inner.closed {
            return None;
        }
        let mut filling = Filling { inner: &mut inner, is_filled: false };
        let added = add(&mut filling);
        if filling.is_filled {
            wake(inner);
        }
        Some(added)
    }

    /// Adds a notice of the whole session, in order with the events; `false` if no more are wanted, since the session is gone
    /// or too many wait.
    pub fn push_notice(&self, item: Item) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        inner.notices += 1;
        let overrun = inner.notices > MAX_JOINED;
        inner.items.push(None, None, if overrun { Item::Overrun } else { item });
        wake(inner);
        !overrun
    }

    /// Adds an answer. One for a session that is gone is dropped: its client resumes and asks again.
    pub fn push_answer(&self, answer: Answer) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.answers.push_back(answer);
            wake(inner);
        }
    }

    pub fn has_answers(&self) -> bool {
        !self.lock().answers.is_empty()
    }

    pub fn pop_answer(&self) -> Option<Answer> {
        self.lock().answers.pop_front()
    }

    /// The next item; without `events` the next notice.
    pub fn pop_item(&self, events: bool) -> Option<Item> {
        let mut inner = self.lock();
        let item = match events {
            true => inner.items.pop(),
            false if inner.notices == 0 => None,
            false => inner.items.pop_first(Item::is_notice),
        }?;
        inner.event_bytes -= item.cost();
        if item.is_notice() {
            inner.notices -= 1;
        }
        Some(item)
    }

    /// The highest class among the events that wait.
    pub fn class(&self) -> Option<usize> {
        self.lock().items.class()
    }

    /// Ready when there is something to pop: an answer, or an item that is in demand.
    pub fn poll_filled(&self, cx: &mut Context<'_>, items: Demand) -> Poll<()> {
        let mut inner = self.lock();
        let filled = match items {
            Demand::All => !inner.items.is_empty(),
            Demand::Notices => inner.notices > 0,
            Demand::None => false,
        };
        if filled || !inner.answers.is_empty() {
            return Poll::Ready(());
        }
        match &mut inner.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Bytes of events waiting.
    pub fn event_bytes(&self) -> usize {
        self.lock().event_bytes
    }

    /// Whether the session is gone.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// From now on nothing is accepted, and what waits is dropped.
    pub fn close(&self) {
        let mut inner = self.lock();
        *inner = Inner { closed: true, ..Inner::default() };
    }
}

/// An outbox to which the hub adds something.
pub struct Filling<'a> {
    inner: &'a mut Inner,
    is_filled: bool,
}

impl Filling<'_> {
    /// Adds an event for a subscription; `false` if the subscription is to be forgotten, since the outbox is full.
    pub fn event(&mut self, sub: SubId, event: &Arc<CommittedEvent>) -> bool {
        self.is_filled = true;
        self.inner.push_bounded(sub, event.priority, Item::Event { sub, event: event.clone() })
    }

    /// Adds a delta, or lets the one that it continues grow if that still waits; `false` as for an event.
    pub fn delta(&mut self, sub: SubId, delta: &Arc<Delta>) -> bool {
        self.is_filled = true;
        let inner = &mut *self.inner;
        if inner.has_room(delta.text.len() + DELTA_OVERHEAD)
            && let Some(waiting) = inner.waiting_delta(sub, delta)
        {
            Arc::make_mut(waiting).join(delta);
            inner.event_bytes += delta.text.len();
            return true;
        }
        inner.push_bounded(sub, delta.priority, Item::Delta { sub, delta: delta.clone() })
    }

    /// Says, in order with the events, that a run of the user's on the thread has ended. There is at most one for each event.
    pub fn run_ended(&mut self, sub: SubId) {
        self.is_filled = true;
        self.inner.items.push(Some(sub), None, Item::RunEnded { sub });
    }

    /// Says that the subscription does not get what comes next, and is forgotten.
    pub fn lagged(&mut self, sub: SubId) {
        self.is_filled = true;
        self.inner.items.push(Some(sub), None, Item::Lagged { sub });
    }

    /// Adds a signal, if there is room to spare; whether there was.
    pub fn signal(&mut self, sub: SubId, frame: &Utf8Bytes) -> bool {
        if self.inner.event_bytes + frame.len() > SIGNAL_BYTES {
            return false;
        }
        self.is_filled = true;
        let item = Item::Signal { sub, frame: frame.clone() };
        self.inner.event_bytes += item.cost();
        self.inner.items.push(Some(sub), None, item);
        true
    }
}

/// Wakes the session if it waits; the lock is released first.
fn wake(mut inner: MutexGuard<'_, Inner>) {
    let waker = inner.waker.take();
    drop(inner);
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(message: &str, restarts: u32, from_char: u64, text: &str) -> Arc<Delta> {
        Arc::new(Delta::of_test(message, restarts, from_char, text))
    }

    /// The deltas that wait: of each its message, how often that was begun anew, where it begins, and its text.
    fn deltas(outbox: &Outbox) -> Vec<(String, u32, u64, String)> {
        let next = || match outbox.pop_item(true)? {
            Item::Delta { delta, .. } => {
                Some((delta.message.to_string(), delta.restarts, delta.from_char, delta.text.clone()))
            }
            other => panic!("{other:?}"),
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_delta_that_waits_grows_by_those_of_its_text_and_by_no_other() {
        let outbox = Outbox::default();
        for next in [
            delta("m", 0, 0, ""),
            delta("n", 0, 0, "an"),
            // Its position is where the text before ends, which is another text all the same.
            delta("m", 1, 0, "ab"),
            delta("n", 0, 2, "other"),
            delta("m", 1, 2, "cd"),
            delta("m", 2, 0, "x"),
            delta("m", 2, 1, "y"),
        ] {
            assert_eq!(outbox.fill(|filling| filling.delta(1, &next)), Some(true));
        }
        let got = deltas(&outbox);
        let got: Vec<_> = got.iter().map(|(m, restarts, from, text)| (&**m, *restarts, *from, &**text)).collect();
        assert_eq!(got, [("m", 0, 0, ""), ("n", 0, 0, "another"), ("m", 1, 0, "abcd"), ("m", 2, 0, "xy")]);
        assert_eq!(outbox.event_bytes(), 0);
    }

    fn push(outbox: &Outbox, sub: SubId, seq: u64, priority: Option<Priority>) {
        let event = CommittedEvent { seq, kind: "x.y".into(), priority, frame: "{}".into(), closes: None, run: None };
        assert_eq!(outbox.fill(|it| it.event(sub, &Arc::new(event))), Some(true));
    }

    #[test]
    fn without_credit_for_events_threads_joined_are_still_announced() {
        let outbox = Outbox::default();
        push(&outbox, 1, 1, None);
        assert!(outbox.push_notice(Item::Joined { thread: "t".into(), before: 0 }));
        assert!(matches!(outbox.pop_item(false), Some(Item::Joined { .. })));
        assert!(outbox.pop_item(false).is_none());
        assert!(matches!(outbox.pop_item(true), Some(Item::Event { sub: 1, .. })));
    }

    #[test]
    fn signals_are_the_first_to_be_dropped() {
        let outbox = Outbox::default();
        let event = Arc::new(CommittedEvent {
            seq: 1,
            kind: "x.y".into(),
            priority: None,
            frame: "x".repeat(SIGNAL_BYTES).into(),
            closes: None,
            run: None,
        });
        assert_eq!(outbox.fill(|it| it.event(1, &event)), Some(true));
        assert_eq!(outbox.fill(|it| it.signal(1, &"{}".into())), Some(false));
        assert_eq!(outbox.fill(|it| it.event(1, &event)), Some(true), "there is room for events");
        assert!(matches!(outbox.pop_item(true), Some(Item::Event { .. })));
        assert!(matches!(outbox.pop_item(true), Some(Item::Event { .. })));
        assert!(outbox.pop_item(true).is_none());
    }
}
