//! The hub: who reads which thread live on this node, and the fan-out to them of what was committed.
//!
//! A subscription attaches first and then reads the store up to the head of that moment. Whatever was committed before it
//! attached is in the store; whatever is committed afterwards goes to its outbox; what is in both, the subscription drops by
//! its seq. So nothing is lost in between, and the hub needs to know nothing of cursors.
//!
//! - Commits are delivered by one task, in their order; so each outbox gets a thread's events in order.
//! - A subscription whose outbox is full is forgotten: it catches up from the store and attaches anew.
//! - Rights change with the event that changes them: who is removed does not get that event, nor any after it.
//! - One lock guards the table. It is held for one update at a time, and never across an `await`.
//!
//! Presence is kept beside that: which members have a subscription to a thread, live or still catching up. Presence and
//! signals are known on this node alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::Counter;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::fair_queue::SubId;
use super::outbox::{Item, Outbox};
use super::registry::Registry;
use crate::ingest::pending::Pending;
use crate::projector::{AccessChange, Commit, PublishCommit, RunNotice, ThreadUpdate, Update};
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids::{self, SERVER_USER, log_key};
use crate::protocol::json;
use crate::protocol::kinds::AGENT_CANCEL_REQUESTED;
use crate::{panics, telemetry};

/// Commits that may wait for the fan-out; then the projector waits.
const QUEUE: usize = 4;
/// With more members present in a thread than this, coming and going is not signalled: each would cost a signal to every
/// other.
const PRESENCE_LIMIT: usize = 100;
/// The kind of the signals of presence.
const PRESENCE: &str = "presence";

/// A subscription that reads a thread live.
#[derive(Clone)]
struct Subscriber {
    outbox: Arc<Outbox>,
    sub: SubId,
    user: Arc<str>,
    /// Reads by its scope, member or not.
    by_scope: bool,
    wants_deltas: bool,
}

impl Subscriber {
    fn is(&self, outbox: &Arc<Outbox>, sub: SubId) -> bool {
        self.sub == sub && Arc::ptr_eq(&self.outbox, outbox)
    }
}

#[derive(Default)]
struct Table {
    /// By `tenant/thread`.
    threads: HashMap<Arc<str>, Vec<Subscriber>>,
    /// Sessions that follow all threads of their user, by `tenant/user`, or all of their tenant, by `tenant`.
    followers: HashMap<Arc<str>, Vec<Arc<Outbox>>>,
    /// By `tenant/thread`: the members with a subscription, and how many each has.
    present: HashMap<Arc<str>, BTreeMap<Arc<str>, u32>>,
}

pub struct Hub {
    table: Mutex<Table>,
    registry: Arc<Registry>,
    lagged: Counter,
    signals: Counter,
}

impl Hub {
    /// The hub, the way into it for the projector, and the task that delivers what comes that way until that is dropped.
    pub fn start(
        pending: Arc<Pending>,
        registry: Arc<Registry>,
    ) -> (Arc<Hub>, PublishCommit, tokio::task::JoinHandle<()>) {
        let hub = Arc::new(Hub {
            table: Mutex::default(),
            registry,
            lagged: telemetry::lagged(),
            signals: telemetry::signals(),
        });
        let (sender, mut commits) = mpsc::channel(QUEUE);
        // Waits while the hub is lagging.
        let publish: PublishCommit = Box::new(move |commit| sender.blocking_send(commit).is_ok());
        let deliverer = hub.clone();
        let task = tokio::spawn(panics::vital("the hub", async move {
            while let Some(commit) = commits.recv().await {
                deliverer.deliver(commit, &pending);
            }
        }));
        (hub, publish, task)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Who reads what.

    /// From now on the thread's events go to the outbox.
    pub fn attach(
        &self,
        key: &Arc<str>,
        outbox: &Arc<Outbox>,
        sub: SubId,
        user: &Arc<str>,
        by_scope: bool,
        wants_deltas: bool,
    ) {
        let subscriber = Subscriber { outbox: outbox.clone(), sub, user: user.clone(), by_scope, wants_deltas };
        self.lock().threads.entry(key.clone()).or_default().push(subscriber);
    }

    pub fn detach(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId) {
        let mut table = self.lock();
        if let Some(subscribers) = table.threads.get_mut(key) {
            subscribers.retain(|it| !it.is(outbox, sub));
            if subscribers.is_empty() {
                table.threads.remove(key);
            }
        }
    }

    /// Changes by which right a subscription reads.
    pub fn regrant(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId, by_scope: bool) {
        let mut table = self.lock();
        let subscribers = table.threads.get_mut(key).into_iter().flatten();
        for subscriber in subscribers.filter(|it| it.is(outbox, sub)) {
            subscriber.by_scope = by_scope;
        }
    }

    /// From now on the session is notified of threads that a user joins, if `whose` is `tenant/user`, or of those that are
    /// made in a tenant, if it is `tenant`.
    pub fn follow(&self, whose: &Arc<str>, outbox: &Arc<Outbox>) {
        self.lock().followers.entry(whose.clone()).or_default().push(outbox.clone());
    }

    pub fn unfollow(&self, whose: &str, outbox: &Arc<Outbox>) {
        let mut table = self.lock();
        if let Some(sessions) = table.followers.get_mut(whose) {
            sessions.retain(|it| !Arc::ptr_eq(it, outbox));
            if sessions.is_empty() {
                table.followers.remove(whose);
            }
        }
    }

    // Presence and signals.

    /// A member has one more subscription to the thread; the first one is signalled to the others.
    pub fn arrive(&self, key: &Arc<str>, user: &Arc<str>) {
        let mut table = self.lock();
        let present = table.present.entry(key.clone()).or_default();
        let count = present.entry(user.clone()).or_default();
        *count += 1;
        if *count == 1 && present.len() <= PRESENCE_LIMIT {
            self.signal_presence(table, key, user, true);
        }
    }

    /// A member has one subscription less; the end of the last one is signalled to the others.
    pub fn leave(&self, key: &str, user: &str) {
        let mut table = self.lock();
        let Some(present) = table.present.get_mut(key) else { return };
        let Some(count) = present.get_mut(user) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }

        let signalled = present.len() <= PRESENCE_LIMIT;
        present.remove(user);
        if present.is_empty() {
            table.present.remove(key);
        } else if signalled {
            self.signal_presence(table, key, user, false);
        }
    }

    /// The members that have a subscription to the thread on this node, and how many each.
    pub fn present(&self, key: &str) -> Vec<(Arc<str>, u32)> {
        self.lock().present.get(key).into_iter().flatten().map(|(user, count)| (user.clone(), *count)).collect()
    }

    fn signal_presence(&self, table: MutexGuard<'_, Table>, key: &str, user: &str, online: bool) {
        let Some((_, thread)) = key.split_once('/') else { return };
        let data = json::encode_raw(&json!({"online": online}));
        let frame = ServerFrame::Signal { thread, kind: PRESENCE, from: user, data: Some(&data) }.encode().into();

        let others = table.live(key, |it| *it.user != *user);
        drop(table);
        self.push_signal(&others, &frame);
    }

    /// Sends a signal to everyone who is live in the thread, but for the session it comes from.
    pub fn signal(&self, key: &str, from: &Arc<Outbox>, frame: &Utf8Bytes) {
        let others = self.lock().live(key, |it| !Arc::ptr_eq(&it.outbox, from));
        self.push_signal(&others, frame);
    }

    /// Without the lock, so that a signal to many readers does not hold up the fan-out of events.
    fn push_signal(&self, readers: &[Subscriber], frame: &Utf8Bytes) {
        let sent = readers.iter().filter(|it| it.outbox.push_signal(it.sub, frame)).count();
        self.signals.increment(sent as u64);
    }

    // The fan-out.

    fn deliver(&self, commit: Commit, pending: &Pending) {
        for update in &commit.events {
            // Locked for one at a time, so that sessions that come and go need not wait for a whole commit.
            self.deliver_update(&mut self.lock(), update);
        }

        // After the events: an accepted publish is answered no earlier than its event is on its way to the readers.
        for (id, verdict) in commit.verdicts {
            pending.resolve(id, verdict);
        }
    }

    fn deliver_update(&self, table: &mut Table, ThreadUpdate { key, update }: &ThreadUpdate) {
        match update {
            Update::Event(event, change) => {
                if event.seq == 1 {
                    table.announce_made(key);
                }
                // Before the event itself: who was removed does not get it, who joined does.
                if let Some(change) = change {
                    self.change_access(table, key, event.seq, change);
                }
                self.fan_out(table, key, |it| it.outbox.push_event(it.sub, event));
                if let Some(notice) = &event.run {
                    self.notify_agent(table, key, event.seq, notice);
                }
            }
            Update::Delta(delta) => {
                self.fan_out(table, key, |it| !it.wants_deltas || it.outbox.push_delta(it.sub, delta));
            }
        }
    }

    /// Lets the user who started a run know what has become of it.
    fn notify_agent(&self, table: &Table, key: &str, seq: u64, notice: &RunNotice) {
        let Some((tenant, thread)) = key.split_once('/') else { return };
        match notice {
            RunNotice::Ended { user } => {
                let subscribers = table.threads.get(key).into_iter().flatten();
                for it in subscribers.filter(|it| !it.by_scope && *it.user == **user) {
                    it.outbox.push_run_ended(it.sub);
                }
            }
            RunNotice::ToCancel { user, run } => {
                let data = json::encode_raw(&json!({"run": run, "seq": seq}));
                let signal =
                    ServerFrame::Signal { thread, kind: AGENT_CANCEL_REQUESTED, from: SERVER_USER, data: Some(&data) };
                self.registry.notify_to_cancel(&log_key(tenant, user), thread, &signal.encode().into());
            }
        }
    }

    fn change_access(&self, table: &mut Table, key: &Arc<str>, seq: u64, change: &AccessChange) {
        let Some((tenant, thread)) = key.split_once('/') else { return };
        match change {
            AccessChange::Joined(users) => {
                for user in users {
                    table.announce(&log_key(tenant, user), thread, seq - 1);
                }
            }
            AccessChange::Left(user) => {
                if let Some(subscribers) = table.threads.get_mut(key) {
                    subscribers.retain(|it| it.by_scope || *it.user != **user);
                }
                self.registry.notify_left(&log_key(tenant, user), thread);
            }
            AccessChange::Revoked(user) => self.registry.revoke(&log_key(tenant, user)),
        }
    }

    /// Pushes something to all who are live in the thread, and forgets those whose outbox refuses it.
    fn fan_out(&self, table: &mut Table, key: &Arc<str>, push: impl Fn(&Subscriber) -> bool) {
        let Some(subscribers) = table.threads.get_mut(key) else { return };
        let before = subscribers.len();
        subscribers.retain(push);

        let forgotten = before - subscribers.len();
        if forgotten > 0 {
            self.lagged.increment(forgotten as u64);
            if subscribers.is_empty() {
                table.threads.remove(key);
            }
        }
    }
}

impl Table {
    /// A thread was made: those who follow all threads of its tenant get it from its first event on. Those that exist by their
    /// name are nobody's to follow that way.
    fn announce_made(&mut self, key: &str) {
        if let Some((tenant, thread)) = key.split_once('/')
            && !ids::is_reserved(thread)
        {
            self.announce(tenant, thread, 0);
        }
    }

    /// Notifies followers of a thread that is theirs from the event after `before` on, and forgets those whose outbox has no
    /// room for that.
    fn announce(&mut self, whose: &str, thread: &str, before: u64) {
        if let Some(sessions) = self.followers.get_mut(whose) {
            sessions.retain(|outbox| outbox.push_notice(Item::Joined { thread: thread.to_owned(), before }));
        }
    }

    /// Who is live in the thread and fits.
    fn live(&self, key: &str, fits: impl Fn(&Subscriber) -> bool) -> Vec<Subscriber> {
        self.threads.get(key).into_iter().flatten().filter(|it| fits(it)).cloned().collect()
    }
}
