//! What the dispatcher's thread has to see to: what commits changed, and what workers want.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Sink, Wants};
use crate::projector::Verdict;
use crate::store::WorkChange;

/// Changes that may wait. Beyond that they are forgotten, and all is looked up again.
const MAX_CHANGES: usize = 100_000;

/// What is asked of a group.
pub enum Message {
    /// A worker comes.
    Join { key: Arc<str>, id: u64, tenant: Arc<str>, group: Arc<str>, user: Arc<str>, wants: Wants, sink: Sink },
    /// It takes something else from now on.
    Set { key: Arc<str>, id: u64, wants: Wants },
    /// It takes no more.
    Finish { key: Arc<str>, id: u64, done: oneshot::Sender<()> },
    /// It is gone, and with it what it holds, if it `loses` that.
    Leave { key: Arc<str>, id: u64, loses: bool },
    /// What became of a lease's record.
    Verdict { key: Arc<str>, lease: Uuid, verdict: Verdict },
    /// The index of what waits is complete for this revision of the group, or could not be completed.
    Indexed { key: Arc<str>, revision: [u8; 16], complete: bool },
}

#[derive(Default)]
pub struct Inbox {
    waiting: Mutex<Waiting>,
    came: Condvar,
    /// How many workers each group has on this node.
    workers: Mutex<HashMap<Arc<str>, usize>>,
}

#[derive(Default)]
struct Waiting {
    messages: Vec<Message>,
    changes: Vec<WorkChange>,
    overflowed: bool,
    closed: bool,
}

/// What had come.
#[derive(Default)]
pub struct Taken {
    pub messages: Vec<Message>,
    pub changes: Vec<WorkChange>,
    /// More changed than this says.
    pub overflowed: bool,
    pub closed: bool,
}

impl Inbox {
    pub fn push(&self, message: Message) {
        let mut waiting = self.waiting();
        if waiting.closed {
            return;
        }
        waiting.messages.push(message);
        drop(waiting);
        self.came.notify_one();
    }

    /// What a commit has changed; called by the projector, which does not wait.
    pub fn changed(&self, changes: Vec<WorkChange>) {
        let mut waiting = self.waiting();
        if waiting.closed {
            return;
        }
        if waiting.changes.len() + changes.len() > MAX_CHANGES {
            waiting.changes = Vec::new();
            waiting.overflowed = true;
        } else {
            waiting.changes.extend(changes);
        }
        drop(waiting);
        self.came.notify_one();
    }

    pub fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        drop(waiting);
        self.came.notify_one();
    }

    /// What there is; waits for it up to so long.
    pub fn take(&self, wait: Duration) -> Taken {
        let is_empty = |waiting: &mut Waiting| {
            waiting.messages.is_empty() && waiting.changes.is_empty() && !waiting.overflowed && !waiting.closed
        };
        let came = self.came.wait_timeout_while(self.waiting(), wait, is_empty);
        let mut waiting = came.unwrap_or_else(PoisonError::into_inner).0;
        Taken {
            messages: std::mem::take(&mut waiting.messages),
            changes: std::mem::take(&mut waiting.changes),
            overflowed: std::mem::take(&mut waiting.overflowed),
            closed: waiting.closed,
        }
    }

    pub fn set_workers(&self, key: &Arc<str>, workers: usize) {
        let mut all = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        match workers {
            0 => drop(all.remove(key)),
            _ => drop(all.insert(key.clone(), workers)),
        }
    }

    pub fn workers_of(&self, key: &str) -> usize {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied().unwrap_or(0)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // No section above can panic half way through a change.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
