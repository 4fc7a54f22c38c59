//! The hub: who reads which thread live, and the fan-out of what became visible.
//!
//! A session attaches a subscription and then reads the store up to the head: whatever was committed before the attach is
//! in the store, whatever comes after it goes to the outbox, and what is in both the session drops by its seq. That is the
//! whole hand-over. One short lock guards the table; it is never held across a wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::Counter;
use tokio::sync::mpsc;

use crate::ids::log_key;
use crate::outbox::{Item, Outbox, SubId};
use crate::projector::{Change, Committed, CommittedEvent};
use crate::submit::Pending;
use crate::telemetry;

/// Batches that may wait for the fan-out; then the projector waits.
const QUEUE: usize = 4;

/// A subscription to one thread.
#[derive(Clone)]
struct Subscriber {
    outbox: Arc<Outbox>,
    sub: SubId,
    user: Arc<str>,
    /// Reads by its scope, member or not.
    by_scope: bool,
}

#[derive(Default)]
struct Table {
    /// By `tenant/thread`.
    threads: HashMap<Arc<str>, Vec<Subscriber>>,
    /// Sessions that follow all threads of their user, by `tenant/user`.
    followers: HashMap<Arc<str>, Vec<Arc<Outbox>>>,
}

pub struct Hub {
    table: Mutex<Table>,
    lagged: Counter,
}

/// Where the projector hands over what became visible.
pub type Committer = mpsc::Sender<Committed>;

impl Hub {
    /// The hub, and the task that delivers what comes in through the returned sender until that is dropped.
    pub fn start(pending: Arc<Pending>) -> (Arc<Hub>, Committer, tokio::task::JoinHandle<()>) {
        let hub = Arc::new(Hub { table: Mutex::default(), lagged: telemetry::lagged() });
        let (sender, mut commits) = mpsc::channel(QUEUE);
        let deliverer = hub.clone();
        let task = tokio::spawn(async move {
            while let Some(committed) = commits.recv().await {
                deliverer.deliver(committed, &pending);
            }
        });
        (hub, sender, task)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the thread's events go to the outbox.
    pub fn attach(&self, key: &Arc<str>, outbox: &Arc<Outbox>, sub: SubId, user: &Arc<str>, by_scope: bool) {
        let subscriber = Subscriber { outbox: outbox.clone(), sub, user: user.clone(), by_scope };
        self.lock().threads.entry(key.clone()).or_default().push(subscriber);
    }

    pub fn detach(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId) {
        let mut table = self.lock();
        if let Some(subscribers) = table.threads.get_mut(key) {
            subscribers.retain(|it| it.sub != sub || !Arc::ptr_eq(&it.outbox, outbox));
            if subscribers.is_empty() {
                table.threads.remove(key);
            }
        }
    }

    /// Changes by which right a subscription reads.
    pub fn regrant(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId, by_scope: bool) {
        if let Some(subscribers) = self.lock().threads.get_mut(key) {
            let mine = |it: &&mut Subscriber| it.sub == sub && Arc::ptr_eq(&it.outbox, outbox);
            if let Some(subscriber) = subscribers.iter_mut().find(mine) {
                subscriber.by_scope = by_scope;
            }
        }
    }

    /// From now on the session hears of threads that its user joins. `user` is `tenant/user`.
    pub fn follow(&self, user: &Arc<str>, outbox: &Arc<Outbox>) {
        self.lock().followers.entry(user.clone()).or_default().push(outbox.clone());
    }

    pub fn unfollow(&self, user: &str, outbox: &Arc<Outbox>) {
        let mut table = self.lock();
        if let Some(sessions) = table.followers.get_mut(user) {
            sessions.retain(|it| !Arc::ptr_eq(it, outbox));
            if sessions.is_empty() {
                table.followers.remove(user);
            }
        }
    }

    fn deliver(&self, committed: Committed, pending: &Pending) {
        for event in &committed.events {
            // Locked for one event at a time, so that sessions that come and go need not wait for a whole batch.
            let mut table = self.lock();
            if let Some(change) = &event.change {
                table.apply(event, change);
            }
            self.fan_out(&mut table, event);
        }
        for (id, verdict) in committed.verdicts {
            pending.resolve(id, verdict);
        }
    }

    fn fan_out(&self, table: &mut Table, event: &CommittedEvent) {
        let Some(subscribers) = table.threads.get_mut(&event.key) else {
            return;
        };
        let before = subscribers.len();
        subscribers.retain(|it| it.outbox.push_event(it.sub, event.seq, &event.frame));
        if subscribers.len() < before {
            self.lagged.increment((before - subscribers.len()) as u64);
            if subscribers.is_empty() {
                table.threads.remove(&event.key);
            }
        }
    }
}

impl Table {
    /// Rights change with the event itself: who left does not get it, who joined does.
    fn apply(&mut self, event: &CommittedEvent, change: &Change) {
        let Some((tenant, thread)) = event.key.split_once('/') else {
            return;
        };
        match change {
            Change::Joined(users) => {
                for user in users {
                    if let Some(sessions) = self.followers.get_mut(&*log_key(tenant, user)) {
                        sessions.retain(|outbox| {
                            outbox.push_notice(Item::Joined { thread: thread.to_owned(), before: event.seq - 1 })
                        });
                    }
                }
            }
            Change::Left(user) => {
                if let Some(subscribers) = self.threads.get_mut(&event.key) {
                    subscribers.retain(|it| {
                        it.by_scope || *it.user != **user || {
                            it.outbox.push_notice(Item::Removed { sub: it.sub });
                            false
                        }
                    });
                }
            }
        }
    }
}
