//! What waits for one socket: filled by the hub and by whoever has an answer, emptied by the session.
//!
//! Events are bounded in bytes: when they do not fit, the subscription is told that it lagged and gets no more until it has
//! caught up from the store. Answers are bounded by the session itself, which stops reading commands while too many are
//! out.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::error::Error;
use crate::store::StoredEvent;
use crate::submit::Verdict;

/// Bytes of events that may wait for a socket.
pub const EVENT_BYTES: usize = 256 << 10;
/// Threads joined that may wait for a socket.
const MAX_JOINED: usize = 4_096;
/// What an event costs beside its frame.
const OVERHEAD: usize = 64;

/// A subscription's number within its session; never used twice.
pub type SubId = u32;

/// What the hub has for a session, in the thread's order.
#[derive(Debug)]
pub enum Item {
    Event {
        sub: SubId,
        seq: u64,
        frame: Utf8Bytes,
    },
    /// The subscription did not get the next event: the outbox was full.
    Lagged {
        sub: SubId,
    },
    /// The user is no longer a member.
    Removed {
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

/// What overtakes events.
pub enum Answer {
    Publish {
        id: i64,
        thread: Box<str>,
        verdict: Verdict,
    },
    /// The user's threads and their heads, for the `subscribe` to `"*"` that waits for them.
    Threads(Result<Vec<(String, u64)>, Error>),
    /// The server is going down.
    Drain,
    /// What a subscription asked of the store.
    Chunk {
        sub: SubId,
        events: Result<Vec<StoredEvent>, Error>,
    },
}

#[derive(Default)]
struct Inner {
    answers: VecDeque<Answer>,
    items: VecDeque<Item>,
    event_bytes: usize,
    /// Threads joined that wait to be noted.
    joined: usize,
    closed: bool,
    waker: Option<Waker>,
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
    pub fn push_event(&self, sub: SubId, seq: u64, frame: &Utf8Bytes) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return false;
        }
        let size = frame.len() + OVERHEAD;
        let fits = inner.event_bytes + size <= EVENT_BYTES || inner.event_bytes == 0;
        if fits {
            inner.event_bytes += size;
            inner.items.push_back(Item::Event { sub, seq, frame: frame.clone() });
        } else {
            inner.items.push_back(Item::Lagged { sub });
        }
        wake(inner);
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
        inner.items.push_back(if overrun { Item::Overrun } else { item });
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

    pub fn pop_item(&self) -> Option<Item> {
        let mut inner = self.lock();
        let item = inner.items.pop_front();
        match &item {
            Some(Item::Event { frame, .. }) => inner.event_bytes -= frame.len() + OVERHEAD,
            Some(Item::Joined { .. }) => inner.joined -= 1,
            _ => {}
        }
        if inner.items.is_empty() && inner.items.capacity() > 64 {
            // An idle session keeps no room for the burst that it once had.
            inner.items = VecDeque::new();
        }
        item
    }

    /// Ready when there is something to pop: an answer, or (unless they are held back) an item.
    pub fn poll_filled(&self, cx: &mut Context<'_>, items_too: bool) -> Poll<()> {
        let mut inner = self.lock();
        if !inner.answers.is_empty() || (items_too && !inner.items.is_empty()) {
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

/// Wakes the session once it waits; the lock is released first.
fn wake(mut inner: MutexGuard<'_, Inner>) {
    let waker = inner.waker.take();
    drop(inner);
    if let Some(waker) = waker {
        waker.wake();
    }
}
