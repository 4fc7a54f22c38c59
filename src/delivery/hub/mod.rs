//! The hub: who reads which thread live on this node, and the fan-out to them of what was committed.
//!
//! A subscription attaches first and then reads the store up to the head of that moment. Whatever was committed before it
//! attached is in the store; whatever is committed afterwards goes to its outbox; what is in both, the subscription drops by
//! its seq. So nothing is lost in between, and the hub needs to know nothing of cursors.
//!
//! A commit goes two steps:
//! 1. It is taken in, those of one thread of the projector in their order: rights change, each event is put to those of its thread that wait, and the
//!    publishers get their verdicts. This takes as long as the commit is large, however many read.
//! 2. What waits is handed out ([`lane`]): threads take turns, some readers each, and between turns the sessions
//!    and everybody else get the processor. So a thread with many readers holds up nobody but itself.
//!
//! With little to do, the thread of the projector itself does both, since to wake another would take longer than the work. With
//! more, a task takes commits in and another hands out, while the projector goes on with the next commit.
//!
//! - Each outbox gets a thread's events in order.
//! - A subscription whose outbox is full is forgotten: it catches up from the store and attaches anew. So are all readers of a
//!   thread for which too much waits to be handed out.
//! - Rights change with the event that changes them, before its publisher is answered: who is removed does not get that event,
//!   nor any after it.
//! - The table is in shards by thread, each with a lock. A lock is held for one change or for some readers, and never across
//!   an `await`.
//!
//! Presence is kept beside that: which members have a subscription to a thread, live or still catching up. Presence and
//! signals are known on this node alone. A signal takes its turn with the events of its thread.

mod lane;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use metrics::Counter;
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use self::lane::{Effort, Except, Handed, Lane, Piece, Reader};
use super::fair_queue::SubId;
use super::outbox::{Item, Outbox};
use super::registry::Registry;
use crate::ingest::pending::Pending;
use crate::projector::{AccessChange, Commit, PublishCommit, RequeuedNotice, RunNotice, ThreadUpdate, Update};
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids::{self, SERVER_USER, log_key};
use crate::protocol::json;
use crate::protocol::kinds::AGENT_CANCEL_REQUESTED;
use crate::{panics, telemetry};

/// Commits that may wait to be taken in; then the projector waits.
const QUEUE: usize = 2;
/// A commit of no more events and verdicts than this is taken in by the thread that made it, if no other waits: some
/// microseconds, about what it takes to wake the task.
const SMALL_COMMIT: usize = 16;
/// Bytes that may wait to be handed out, of all threads together; then no commit is taken in. A commit may exceed it.
const WAITING_BYTES: usize = 8 << 20;
/// Bytes that may wait in one thread, however many wait elsewhere: what an outbox holds.
const LEAST_THREAD_BYTES: usize = 256 << 10;
/// What is handed out before everybody else has the processor: to so many readers, and so many pieces in sum. A few dozen
/// microseconds of work; and the sessions that it wakes are as few, so that no other task waits behind a crowd of them.
const EFFORT: (usize, usize) = (64, 1_024);
/// So many that two sessions seldom meet at one.
const SHARDS: usize = 64;
/// With more members present in a thread than this, coming and going is not signalled: each would cost a signal to every
/// other.
const PRESENCE_LIMIT: usize = 100;
/// The kind of the signals of presence.
const PRESENCE: &str = "presence";

/// Some of the threads, by `tenant/thread`.
#[derive(Default)]
struct Shard {
    /// Boxed, since a table has room for about twice as many as it holds.
    lanes: HashMap<Arc<str>, Box<Lane>>,
    /// The members with a subscription, and how many each has.
    present: HashMap<Arc<str>, BTreeMap<Arc<str>, u32>>,
}

pub struct Hub {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    /// Sessions that follow all threads of their user, by `tenant/user`, or all of their tenant, by `tenant`.
    followers: Mutex<HashMap<Arc<str>, Vec<Arc<Outbox>>>>,
    registry: Arc<Registry>,
    /// The threads in which something waits to be handed out, each once, in the order of their turns.
    turns: Mutex<VecDeque<Arc<str>>>,
    /// There is a turn to take, or there will be none any more.
    work: Notify,
    /// Bytes that wait to be handed out.
    waiting: AtomicUsize,
    /// Less waits than may.
    room: Notify,
    /// No commit will come any more.
    ended: AtomicBool,
    lagged: Counter,
    signals: Counter,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Under each of these locks a change is made in one go.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// The hub, the way into it for the projector, and the task that delivers what comes that way until that is dropped.
    pub fn start(
        pending: Arc<Pending>,
        registry: Arc<Registry>,
    ) -> (Arc<Hub>, PublishCommit, tokio::task::JoinHandle<()>) {
        let hub = Arc::new(Hub::new(registry));
        let (sender, mut commits) = mpsc::channel(QUEUE);
        // Commits that the task has yet to take in.
        let untaken = Arc::new(AtomicUsize::new(0));

        let (direct, left_to_task, verdicts_to) = (hub.clone(), untaken.clone(), pending.clone());
        let publish: PublishCommit = Box::new(move |commit| {
            // What this thread has left to the task before is among those, so the task has taken that in.
            let is_next = left_to_task.load(Ordering::Acquire) == 0;
            if is_next && commit.is_small() && direct.has_room() {
                direct.take_in(commit, &verdicts_to);
                direct.hand_out(Effort::new(EFFORT.0, EFFORT.1));
                direct.wake_fan_out();
                return !sender.is_closed();
            }
            left_to_task.fetch_add(1, Ordering::Relaxed);
            // Waits while the hub is lagging.
            sender.blocking_send(commit).is_ok()
        });

        let taker = hub.clone();
        tokio::spawn(panics::vital("the hub", async move {
            while let Some(commit) = commits.recv().await {
                taker.until_room().await;
                taker.take_in(commit, &pending);
                untaken.fetch_sub(1, Ordering::Release);
                taker.wake_fan_out();
            }
            taker.ended.store(true, Ordering::Release);
            taker.work.notify_one();
        }));

        let deliverer = hub.clone();
        let task = tokio::spawn(panics::vital("the fan-out", async move { deliverer.fan_out().await }));
        (hub, publish, task)
    }

    fn new(registry: Arc<Registry>) -> Hub {
        Hub {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            followers: Mutex::default(),
            registry,
            turns: Mutex::default(),
            work: Notify::new(),
            waiting: AtomicUsize::new(0),
            room: Notify::new(),
            ended: AtomicBool::new(false),
            lagged: telemetry::lagged(),
            signals: telemetry::signals(),
        }
    }

    fn shard(&self, key: &str) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
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
        let reader = Reader { outbox: outbox.clone(), sub, user: user.clone(), by_scope, wants_deltas };
        self.shard(key).lanes.entry(key.clone()).or_default().attach(reader);
    }

    pub fn detach(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId) {
        let mut shard = self.shard(key);
        if let Some(lane) = shard.lanes.get_mut(key) {
            lane.detach(outbox, sub);
            shard.forget_idle(key);
        }
    }

    /// Changes by which right a subscription reads.
    pub fn regrant(&self, key: &str, outbox: &Arc<Outbox>, sub: SubId, by_scope: bool) {
        let mut shard = self.shard(key);
        if let Some(reader) = shard.lanes.get_mut(key).and_then(|lane| lane.reader_mut(outbox, sub)) {
            reader.by_scope = by_scope;
        }
    }

    /// From now on the session is notified of threads that a user joins, if `whose` is `tenant/user`, or of those that are
    /// made in a tenant, if it is `tenant`.
    pub fn follow(&self, whose: &Arc<str>, outbox: &Arc<Outbox>) {
        lock(&self.followers).entry(whose.clone()).or_default().push(outbox.clone());
    }

    pub fn unfollow(&self, whose: &str, outbox: &Arc<Outbox>) {
        let mut followers = lock(&self.followers);
        if let Some(sessions) = followers.get_mut(whose) {
            sessions.retain(|it| !Arc::ptr_eq(it, outbox));
            if sessions.is_empty() {
                followers.remove(whose);
            }
        }
    }

    // Presence and signals.

    /// A member has one more subscription to the thread; the first one is signalled to the others.
    pub fn arrive(&self, key: &Arc<str>, user: &Arc<str>) {
        let mut shard = self.shard(key);
        let present = shard.present.entry(key.clone()).or_default();
        let count = present.entry(user.clone()).or_default();
        *count += 1;
        if *count == 1 && present.len() <= PRESENCE_LIMIT {
            self.signal_presence(shard, key, user, true);
        }
    }

    /// A member has one subscription less; the end of the last one is signalled to the others.
    pub fn leave(&self, key: &str, user: &Arc<str>) {
        let mut shard = self.shard(key);
        let Some(present) = shard.present.get_mut(key) else { return };
        let Some(count) = present.get_mut(user) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }

        let signalled = present.len() <= PRESENCE_LIMIT;
        present.remove(user);
        if present.is_empty() {
            shard.present.remove(key);
        } else if signalled {
            self.signal_presence(shard, key, user, false);
        }
    }

    /// The members that have a subscription to the thread on this node, and how many each.
    pub fn present(&self, key: &str) -> Vec<(Arc<str>, u32)> {
        self.shard(key).present.get(key).into_iter().flatten().map(|(user, count)| (user.clone(), *count)).collect()
    }

    fn signal_presence(&self, shard: MutexGuard<'_, Shard>, key: &str, user: &Arc<str>, online: bool) {
        let Some((_, thread)) = key.split_once('/') else { return };
        let data = json::encode_raw(&json!({"online": online}));
        let frame = ServerFrame::Signal { thread, kind: PRESENCE, from: user, data: Some(&data) }.encode().into();
        self.put(shard, key, Piece::Signal { frame, except: Except::User(user.clone()) });
        self.wake_fan_out();
    }

    /// Sends a signal to everyone who is live in the thread, but for the session it comes from.
    pub fn signal(&self, key: &str, from: &Arc<Outbox>, frame: Utf8Bytes) {
        self.put(self.shard(key), key, Piece::Signal { frame, except: Except::Session(from.clone()) });
        self.wake_fan_out();
    }

    // A commit is taken in.

    fn take_in(&self, commit: Commit, pending: &Pending) {
        for update in commit.events {
            self.take_in_update(update);
        }
        for RequeuedNotice { user, thread } in &commit.requeued {
            self.registry.notify_requeued(user, thread);
        }

        // After the changes of rights, so that whoever removed somebody knows by the answer that it is done. Not after the
        // readers have their events: one tenant's publishers do not wait for the readers of another.
        for (id, verdict) in commit.verdicts {
            pending.resolve(id, verdict);
        }
    }

    fn take_in_update(&self, ThreadUpdate { key, update }: ThreadUpdate) {
        let (event, change) = match update {
            Update::Delta(delta) => return self.put(self.shard(&key), &key, Piece::Delta(delta)),
            Update::LeaseOver { user } => return self.put(self.shard(&key), &key, Piece::LeaseOver { user }),
            Update::Event(event, change) => (event, change),
        };
        if event.seq == 1 {
            self.announce_made(&key);
        }
        let mut shard = self.shard(&key);
        // Before the event itself: who was removed does not get it, who joined does.
        if let Some(AccessChange::Left(user)) = &change
            && let Some(lane) = shard.lanes.get_mut(&key)
        {
            lane.forget_member(user);
            shard.forget_idle(&key);
        }
        self.put(shard, &key, Piece::Event(event.clone()));

        if let Some(change) = &change {
            self.notify_of_access(&key, event.seq, change);
        }
        if let Some(RunNotice::ToCancel { user, run }) = &event.run {
            self.notify_to_cancel(&key, event.seq, user, run);
        }
    }

    /// Puts something to what waits for the readers of a thread, if it has any. If more waits there than is free for all
    /// others, it is dropped for them to read from the store: no thread can take all the room.
    fn put(&self, mut shard: MutexGuard<'_, Shard>, key: &str, piece: Piece) {
        let Some(lane) = shard.lanes.get_mut(key).filter(|lane| !lane.is_empty()) else { return };
        let cost = lane.push(piece);
        let waiting = self.waiting.fetch_add(cost, Ordering::Relaxed) + cost;
        let free = WAITING_BYTES.saturating_sub(waiting);
        let freed = lane.cut(free.max(LEAST_THREAD_BYTES));

        let is_new = !std::mem::replace(&mut lane.in_turn, true);
        if is_new && let Some((key, _)) = shard.lanes.get_key_value(key) {
            lock(&self.turns).push_back(key.clone());
        }
        drop(shard);
        self.free(freed);
    }

    fn free(&self, bytes: usize) {
        let before = self.waiting.fetch_sub(bytes, Ordering::Relaxed);
        if before >= WAITING_BYTES {
            self.room.notify_one();
        }
    }

    async fn until_room(&self) {
        while !self.has_room() {
            self.room.notified().await;
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) < WAITING_BYTES
    }

    /// A thread was made: those who follow all threads of its tenant get it from its first event on. Those that exist by their
    /// name are nobody's to follow that way.
    fn announce_made(&self, key: &str) {
        if let Some((tenant, thread)) = key.split_once('/')
            && !ids::is_reserved(thread)
        {
            self.announce(tenant, thread, 0);
        }
    }

    /// Notifies followers of a thread that is theirs from the event after `before` on, and forgets those whose outbox has no
    /// room for that.
    fn announce(&self, whose: &str, thread: &str, before: u64) {
        if let Some(sessions) = lock(&self.followers).get_mut(whose) {
            sessions.retain(|outbox| outbox.push_notice(Item::Joined { thread: thread.to_owned(), before }));
        }
    }

    fn notify_of_access(&self, key: &str, seq: u64, change: &AccessChange) {
        let Some((tenant, thread)) = key.split_once('/') else { return };
        match change {
            AccessChange::Joined(users) => {
                for user in users {
                    self.announce(&log_key(tenant, user), thread, seq - 1);
                }
            }
            AccessChange::Left(user) => self.registry.notify_left(&log_key(tenant, user), thread),
            AccessChange::Revoked(user) => self.registry.revoke(&log_key(tenant, user)),
        }
    }

    /// Lets the user who started a run know that somebody wants it cancelled.
    fn notify_to_cancel(&self, key: &str, seq: u64, user: &str, run: &str) {
        let Some((tenant, thread)) = key.split_once('/') else { return };
        let data = json::encode_raw(&json!({"run": run, "seq": seq}));
        let signal = ServerFrame::Signal { thread, kind: AGENT_CANCEL_REQUESTED, from: SERVER_USER, data: Some(&data) };
        self.registry.notify_to_cancel(&log_key(tenant, user), thread, &signal.encode().into());
    }

    // What waits is handed out.

    /// Hands out what waits until no commit will come any more.
    async fn fan_out(&self) {
        loop {
            if self.hand_out(Effort::new(EFFORT.0, EFFORT.1)) {
                // Behind the sessions that have something to send now, and everybody else who waits for the processor.
                tokio::task::yield_now().await;
            } else if self.ended.load(Ordering::Acquire) {
                return;
            } else {
                self.work.notified().await;
            }
        }
    }

    /// Some turns, as many as one effort is enough for; whether there are more.
    fn hand_out(&self, mut effort: Effort) -> bool {
        while !effort.is_spent() {
            let Some(key) = lock(&self.turns).pop_front() else { return false };
            self.take_turn(key, &mut effort);
        }
        !lock(&self.turns).is_empty()
    }

    /// Lets the task go on if there are turns to take. Where it takes turns already, it does not wait.
    fn wake_fan_out(&self) {
        if !lock(&self.turns).is_empty() {
            self.work.notify_one();
        }
    }

    fn take_turn(&self, key: Arc<str>, effort: &mut Effort) {
        let mut handed = Handed::default();
        let mut shard = self.shard(&key);
        let Some(lane) = shard.lanes.get_mut(&key) else { return };
        let freed = lane.hand_out(effort, &mut handed);
        if lane.in_turn {
            lock(&self.turns).push_back(key);
        } else {
            shard.forget_idle(&key);
        }
        drop(shard);

        self.free(freed);
        self.lagged.increment(handed.lagged);
        self.signals.increment(handed.signals);
    }
}

impl Commit {
    fn is_small(&self) -> bool {
        self.events.len().max(self.verdicts.len()) <= SMALL_COMMIT
    }
}

impl Shard {
    /// A thread that nobody reads has no lane, unless the fan-out is to come to it.
    fn forget_idle(&mut self, key: &str) {
        if self.lanes.get(key).is_some_and(|lane| lane.is_empty() && !lane.in_turn) {
            self.lanes.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
