//! The hub: who reads which thread live, and the fan-out of what became visible.
//!
//! A session attaches a subscription and then reads the store up to the head: whatever was committed before the attach is
//! in the store, whatever comes after it goes to the outbox, and what is in both the session drops by its seq. That is the
//! whole hand-over. One short lock guards the table; it is never held across a wait.
//!
//! Presence is kept beside it: who has a subscription to a thread, live or behind. It and signals are of this node alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::Counter;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::outbox::{Item, Outbox, SubId};
use super::registry::Registry;
use crate::ingest::pending::Pending;
use crate::projector::{AccessChange, Commit, ThreadUpdate, Update};
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids::log_key;
use crate::telemetry;

/// Batches that may wait for the fan-out; then the projector waits.
const QUEUE: usize = 4;
/// With more members present in a thread, coming and going is told no more: each one's would cost all the others.
pub const PRESENCE_TOLD: usize = 100;
/// The kind of the signals with which presence is told.
const PRESENCE: &str = "presence";

/// A subscription to one thread.
#[derive(Clone)]
struct Subscriber {
    outbox: Arc<Outbox>,
    sub: SubId,
    user: Arc<str>,
    /// Reads by its scope, member or not.
    by_scope: bool,
    /// Wants pieces of messages.
    pieces: bool,
}

#[derive(Default)]
struct Table {
    /// By `tenant/thread`.
    threads: HashMap<Arc<str>, Vec<Subscriber>>,
    /// Registry that follow all threads of their user, by `tenant/user`.
    followers: HashMap<Arc<str>, Vec<Arc<Outbox>>>,
    /// Members with a subscription, and how many, by `tenant/thread`.
    present: HashMap<Arc<str>, BTreeMap<Arc<str>, u32>>,
}

pub struct Hub {
    table: Mutex<Table>,
    sessions: Arc<Registry>,
    lagged: Counter,
    signals: Counter,
}

/// Where the projector hands over what became visible.
pub type CommitSender = mpsc::Sender<Commit>;

impl Hub {
    /// The hub, and the task that delivers what comes in through the returned sender until that is dropped.
    pub fn start(
        pending: Arc<Pending>,
        sessions: Arc<Registry>,
    ) -> (Arc<Hub>, CommitSender, tokio::task::JoinHandle<()>) {
        let hub = Arc::new(Hub {
            table: Mutex::default(),
            sessions,
            lagged: telemetry::lagged(),
            signals: telemetry::signals(),
        });
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
    pub fn attach(
        &self,
        key: &Arc<str>,
        outbox: &Arc<Outbox>,
        sub: SubId,
        user: &Arc<str>,
        by_scope: bool,
        pieces: bool,
    ) {
        let subscriber = Subscriber { outbox: outbox.clone(), sub, user: user.clone(), by_scope, pieces };
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

    /// A member has one more subscription to the thread; the first one is told to the others.
    pub fn arrive(&self, key: &Arc<str>, user: &Arc<str>) {
        let mut table = self.lock();
        let present = table.present.entry(key.clone()).or_default();
        let count = present.entry(user.clone()).or_default();
        *count += 1;
        if *count == 1 && present.len() <= PRESENCE_TOLD {
            self.tell_presence(table, key, user, true);
        }
    }

    /// A member has one subscription less.
    pub fn leave(&self, key: &str, user: &str) {
        let mut table = self.lock();
        let Some(present) = table.present.get_mut(key) else { return };
        let Some(count) = present.get_mut(user) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        let told = present.len() <= PRESENCE_TOLD;
        present.remove(user);
        if present.is_empty() {
            table.present.remove(key);
        } else if told {
            self.tell_presence(table, key, user, false);
        }
    }

    /// The members that have a subscription to the thread on this node, and how many.
    pub fn present(&self, key: &str) -> Vec<(Arc<str>, u32)> {
        self.lock().present.get(key).into_iter().flatten().map(|(user, count)| (user.clone(), *count)).collect()
    }

    fn tell_presence(&self, table: MutexGuard<'_, Table>, key: &str, user: &str, online: bool) {
        let Some((_, thread)) = key.split_once('/') else { return };
        // A literal object is JSON.
        let data = if online { r#"{"online":true}"# } else { r#"{"online":false}"# };
        let data = serde_json::from_str(data).ok();
        let frame = ServerFrame::Signal { thread, kind: PRESENCE, from: user, data }.encode().into();
        let live = table.live(key, |it| *it.user != *user);
        drop(table);
        self.push_signal(&live, &frame);
    }

    /// Hands a signal to everyone who is live in the thread, but for the session it comes from.
    pub fn signal(&self, key: &str, from: &Arc<Outbox>, frame: &Utf8Bytes) {
        let live = self.lock().live(key, |it| !Arc::ptr_eq(&it.outbox, from));
        self.push_signal(&live, frame);
    }

    /// Not under the lock: who signals to many takes the time for it from nobody else.
    fn push_signal(&self, live: &[Subscriber], frame: &Utf8Bytes) {
        self.signals.increment(live.iter().filter(|it| it.outbox.push_signal(it.sub, frame)).count() as u64);
    }

    fn deliver(&self, committed: Commit, pending: &Pending) {
        for ThreadUpdate { key, update } in &committed.events {
            // Locked for one at a time, so that sessions that come and go need not wait for a whole batch.
            let mut table = self.lock();
            match update {
                Update::Event(event, change) => {
                    if let Some(change) = change {
                        self.apply(&mut table, key, event.seq, change);
                    }
                    self.fan_out(&mut table, key, |it| it.outbox.push_event(it.sub, event));
                }
                Update::Delta(piece) => {
                    self.fan_out(&mut table, key, |it| !it.pieces || it.outbox.push_delta(it.sub, piece));
                }
            }
        }
        for (id, verdict) in committed.verdicts {
            pending.resolve(id, verdict);
        }
    }

    /// Rights change with the event itself: who left does not get it, who joined does.
    fn apply(&self, table: &mut Table, key: &Arc<str>, seq: u64, change: &AccessChange) {
        let Some((tenant, thread)) = key.split_once('/') else { return };
        match change {
            AccessChange::Joined(users) => {
                for user in users {
                    if let Some(sessions) = table.followers.get_mut(&*log_key(tenant, user)) {
                        sessions.retain(|outbox| {
                            outbox.push_notice(Item::Joined { thread: thread.to_owned(), before: seq - 1 })
                        });
                    }
                }
            }
            AccessChange::Left(user) => {
                if let Some(subscribers) = table.threads.get_mut(key) {
                    subscribers.retain(|it| it.by_scope || *it.user != **user);
                }
                self.sessions.tell_left(&log_key(tenant, user), thread);
            }
            AccessChange::Revoked(user) => self.sessions.revoke(&log_key(tenant, user)),
        }
    }

    /// Hands something to all who are live in the thread, and forgets those who do not take it.
    fn fan_out(&self, table: &mut Table, key: &Arc<str>, push: impl Fn(&Subscriber) -> bool) {
        let Some(subscribers) = table.threads.get_mut(key) else {
            return;
        };
        let before = subscribers.len();
        subscribers.retain(push);
        if subscribers.len() < before {
            self.lagged.increment((before - subscribers.len()) as u64);
            if subscribers.is_empty() {
                table.threads.remove(key);
            }
        }
    }
}

impl Table {
    /// Who is live in the thread and fits.
    fn live(&self, key: &str, fits: impl Fn(&Subscriber) -> bool) -> Vec<Subscriber> {
        self.threads.get(key).into_iter().flatten().filter(|it| fits(it)).cloned().collect()
    }
}
