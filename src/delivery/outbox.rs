//! What waits for one socket: filled by the hub and by whoever has an answer, emptied by the session.
//!
//! Events are bounded in bytes: when they do not fit, the subscription is told that it lagged and gets no more until it has
//! caught up from the store. Signals have no such way back: they are dropped long before. Answers are bounded by the
//! session itself, which stops reading commands while too many are out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::fair_queue::FairQueue;
use crate::projector::CommittedEvent;
use crate::projector::Verdict;
use crate::protocol::delta::Delta;
use crate::protocol::error::Error;
use crate::protocol::event::Priority;
use crate::store::{JoinedThread, StoredEvent};

/// Bytes of events that may wait for a socket.
pub const EVENT_BYTES: usize = 256 << 10;
/// With so many bytes waiting, signals are dropped.
const SIGNAL_BYTES: usize = EVENT_BYTES / 4;
/// Threads joined that may wait for a socket.
const MAX_JOINED: usize = 4_096;
/// What an event costs beside its frame.
const OVERHEAD: usize = 64;

/// What a piece costs beside its text.
const DELTA_OVERHEAD: usize = 256;
/// A piece that waits grows to so many bytes.
const DELTA_BYTES: usize = 64 << 10;

/// A subscription's number within its session; never used twice.
pub type SubId = u32;

/// What the hub has for a session, in the thread's order.
#[derive(Debug)]
pub enum Item {
    Event {
        sub: SubId,
        event: Arc<CommittedEvent>,
    },
    /// A piece of a message that is being written; it grows while it waits.
    Delta {
        sub: SubId,
        piece: Arc<Delta>,
    },
    /// Live only: lost when there is no room for it.
    Signal {
        sub: SubId,
        frame: Utf8Bytes,
    },
    /// The subscription did not get the next event: the outbox was full.
    Lagged {
        sub: SubId,
    },
    /// More threads were joined than may wait.
    Overrun,
    /// The user became a member of a thread with the event behind `before`.
    Joined {
        thread: String,
        before: u64,
    },
}

/// What a read of the store brings.
pub enum Chunk {
    Events(Vec<StoredEvent>),
    /// Of each message that is being written, what the reader does not have.
    Texts(Vec<Delta>),
}

/// What overtakes events.
pub enum Answer {
    Publish {
        id: i64,
        thread: Box<str>,
        /// For a piece: its message, and where in it the piece ends.
        piece: Option<(Box<str>, u64)>,
        verdict: Verdict,
    },
    /// The user is no longer a member of the thread, or was not for a moment.
    Left { thread: Box<str> },
    /// The user's threads, for the `subscribe` to `"*"` that waits for them.
    Threads(Result<Vec<JoinedThread>, Error>),
    /// Whether the places of a new durable subscription are stored, for the `subscribe` that waits for that.
    PlacesStored {
        /// Which one, of those that the session has tried.
        attempt: u32,
        stored: Result<(), Error>,
    },
    /// Whether a subscription's place, as far as it had come, is kept.
    ReceiptStored { thread: Box<str>, stored: bool },
    /// Whether an event that nobody acknowledged is a dead letter now.
    DeadLettered { thread: Box<str>, seq: u64, dead_lettered: bool },
    /// The server is going down: come back after so many milliseconds.
    Drain { retry_after_ms: u64 },
    /// The user's sessions are ended.
    Revoked,
    /// What a subscription asked of the store.
    Chunk {
        /// With the class it was read for.
        sub: (SubId, usize),
        read: Result<Chunk, Error>,
    },
}

#[derive(Default)]
struct Inner {
    answers: VecDeque<Answer>,
    items: FairQueue<Item>,
    event_bytes: usize,
    /// Threads joined that wait to be noted.
    joined: usize,
    closed: bool,
    waker: Option<Waker>,
}

impl Inner {
    /// The piece that this one goes on, if it waits and no event has come behind it.
    fn delta_before(&mut self, sub: SubId, next: &Delta) -> Option<&mut Arc<Delta>> {
        let newest = self.items.newest_of(sub, |item| match item {
            Item::Delta { piece, .. } => piece.name == next.name,
            _ => true,
        })?;
        match newest {
            Item::Delta { piece, .. }
                if piece.is_before(next) && piece.priority == next.priority && piece.text.len() < DELTA_BYTES =>
            {
                Some(piece)
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

    /// Adds an event for a subscription; `false` if the subscription is to be forgotten, since the outbox is full or its
    /// session is gone.
    pub fn push_event(&self, sub: SubId, event: &Arc<CommittedEvent>) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        let size = event.frame.len() + OVERHEAD;
        let fits = inner.event_bytes + size <= EVENT_BYTES || inner.event_bytes == 0;
        if fits {
            inner.event_bytes += size;
            let class = Priority::class(event.priority);
            inner.items.push(Some(sub), Some(class), Item::Event { sub, event: event.clone() });
        } else {
            inner.items.push(Some(sub), None, Item::Lagged { sub });
        }
        wake(inner);
        fits
    }

    /// Adds a piece of a message, to the one that it goes on if that waits still; `false` as for an event.
    pub fn push_delta(&self, sub: SubId, piece: &Arc<Delta>) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        let size = piece.text.len() + DELTA_OVERHEAD;
        let fits = inner.event_bytes + size <= EVENT_BYTES || inner.event_bytes == 0;
        if !fits {
            inner.items.push(Some(sub), None, Item::Lagged { sub });
        } else if let Some(waiting) = inner.delta_before(sub, piece) {
            Arc::make_mut(waiting).join(piece);
            inner.event_bytes += piece.text.len();
        } else {
            inner.event_bytes += size;
            let class = Priority::class(piece.priority);
            inner.items.push(Some(sub), Some(class), Item::Delta { sub, piece: piece.clone() });
        }
        wake(inner);
        fits
    }

    /// Adds a signal, if there is room to spare; whether there was.
    pub fn push_signal(&self, sub: SubId, frame: &Utf8Bytes) -> bool {
        let mut inner = self.lock();
        let fits = !inner.closed && inner.event_bytes + frame.len() <= SIGNAL_BYTES;
        if fits {
            inner.event_bytes += frame.len() + OVERHEAD;
            inner.items.push(Some(sub), None, Item::Signal { sub, frame: frame.clone() });
            wake(inner);
        }
        fits
    }

    /// Adds a notice, in order with the events; `false` if no more are wanted, since the session is gone or behind.
    pub fn push_notice(&self, item: Item) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        let joined = matches!(item, Item::Joined { .. });
        inner.joined += usize::from(joined);
        let overrun = joined && inner.joined > MAX_JOINED;
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

    /// The next item. Without `events` only what needs no leave of the client's: threads joined.
    pub fn pop_item(&self, events: bool) -> Option<Item> {
        let mut inner = self.lock();
        let item = match events {
            true => inner.items.pop(),
            false if inner.joined == 0 => None,
            false => inner.items.pop_first(is_notice),
        };
        match &item {
            Some(Item::Event { event, .. }) => inner.event_bytes -= event.frame.len() + OVERHEAD,
            Some(Item::Delta { piece, .. }) => inner.event_bytes -= piece.text.len() + DELTA_OVERHEAD,
            Some(Item::Signal { frame, .. }) => inner.event_bytes -= frame.len() + OVERHEAD,
            Some(Item::Joined { .. } | Item::Overrun) => inner.joined -= 1,
            _ => {}
        }
        item
    }

    /// The highest class among the events that wait.
    pub fn class(&self) -> Option<usize> {
        self.lock().items.class()
    }

    /// Ready when there is something to pop: an answer, or (unless they are held back) an item.
    pub fn poll_filled(&self, cx: &mut Context<'_>, items: Demand) -> Poll<()> {
        let mut inner = self.lock();
        let filled = match items {
            Demand::All => !inner.items.is_empty(),
            Demand::Notices => inner.joined > 0 && inner.items.any(is_notice),
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

    /// Nothing is taken any more, and what waits is dropped.
    pub fn close(&self) {
        let mut inner = self.lock();
        *inner = Inner { closed: true, ..Inner::default() };
    }
}

/// Which items a session can use now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    All,
    /// No events: the client has asked for none.
    Notices,
    None,
}

/// What goes out although the client has asked for no events.
fn is_notice(item: &Item) -> bool {
    matches!(item, Item::Joined { .. } | Item::Overrun)
}

/// Wakes the session once it waits; the lock is released first.
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

    fn push(outbox: &Outbox, sub: SubId, seq: u64, priority: Option<Priority>) {
        let event = CommittedEvent { seq, kind: "x.y".into(), priority, frame: "{}".into(), closes: None };
        assert!(outbox.push_event(sub, &Arc::new(event)));
    }

    #[test]
    fn a_client_that_wants_no_events_still_hears_of_threads_joined() {
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
        });
        assert!(outbox.push_event(1, &event));
        assert!(!outbox.push_signal(1, &"{}".into()));
        assert!(outbox.push_event(1, &event), "there is room for events");
        assert!(matches!(outbox.pop_item(true), Some(Item::Event { .. })));
        assert!(matches!(outbox.pop_item(true), Some(Item::Event { .. })));
        assert!(outbox.pop_item(true).is_none());
    }
}
