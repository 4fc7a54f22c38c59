//! An event that is held since it could be next in its thread, and what is known of it.

use std::collections::VecDeque;
use std::sync::Arc;

use uuid::Uuid;

use super::found::thread_of;
use super::ready::{Piece, Rank};
use super::waits::Waiting;
use crate::protocol::work::Wait;
use crate::store::WaitingRow;

/// What a thread costs that is held, beside the names of its own and of its user: measured, where the table of them has just
/// grown.
pub const HEAD_BYTES: usize = 600;
/// What is held by its seq costs more: its thread may be in a table of those for it alone.
const SEQ_BYTES: usize = 200;
/// What an event costs that comes after it, beside its names.
const UPCOMING_BYTES: usize = 150;
/// What a user costs who has anything that is ready.
pub const USER_BYTES: usize = 400;

/// Why a thread is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// An event has come there.
    Came,
    /// Something was leased or settled there.
    Moved,
    /// It was found in the store, where it waited.
    Found,
}

/// A thread's next event, or one of those that could be next.
pub struct Head {
    pub seq: u64,
    pub kind: Arc<str>,
    pub user: Arc<str>,
    pub rank: Rank,
    /// Nothing between this seq and the event's is work.
    pub after: u64,
    /// Which attempt the next one is, or the one that is made.
    pub attempt: u32,
    pub state: State,
    pub waiting: Waiting,
    /// When it is looked at again; milliseconds.
    pub timer: Option<u64>,
    /// Some of what comes after it in the thread, if that was read; nothing is missing between.
    pub upcoming: VecDeque<(u64, WaitingRow)>,
}

impl Head {
    /// What it is counted for.
    pub fn bytes(&self, key: &str) -> usize {
        let thread = thread_of(key).len();
        let with_seq = if thread < key.len() { SEQ_BYTES + thread } else { 0 };
        let upcoming: usize =
            self.upcoming.iter().map(|(_, row)| UPCOMING_BYTES + row.kind.len() + row.user.len()).sum();
        HEAD_BYTES + key.len() + with_seq + self.user.len() + upcoming
    }

    /// It can be done, but not now.
    pub fn is_later(&self) -> bool {
        matches!(self.state, State::Later { .. } | State::Paused { .. })
    }

    /// As it waits for its turn, in a group of these kinds. It has a kind of its own unless the group has this one alone: what
    /// was begun before the group changed may be of another.
    pub fn piece<'a>(&'a self, key: &'a Arc<str>, kinds: &[Arc<str>]) -> Piece<'a> {
        let has_kind = !matches!(kinds, [only] if *only == self.kind);
        Piece { user: &self.user, rank: self.rank, thread: key, kind: has_kind.then_some(&self.kind) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    /// It is not to be tried before then; since when it has not been. Milliseconds.
    Later {
        since: u64,
        until: u64,
    },
    /// The thread is paused; since when it has waited for that. Milliseconds.
    Paused {
        since: u64,
    },
    /// A lease was asked for.
    Chosen(Uuid),
    Leased {
        lease: Uuid,
        until: u64,
    },
}

/// What is known of how an event has waited so far.
pub fn waiting(why: Why, at: u64, now: u64, attempt: u32, was_here: bool) -> Waiting {
    if attempt > 1 && was_here {
        // Since the attempt before it ended.
        return Waiting::new(now, Wait::default());
    }
    let so_far = now.saturating_sub(at);
    let before = match why {
        Why::Came => Wait { log_ms: so_far, ..Wait::default() },
        Why::Moved => Wait { busy_ms: so_far, ..Wait::default() },
        // Nobody looked for it here.
        Why::Found => Wait { no_worker_ms: so_far, ..Wait::default() },
    };
    Waiting::new(at, before)
}
