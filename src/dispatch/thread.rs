//! The dispatcher's thread: hears what has changed, gives leases that have come to be to their workers, and asks for others.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::found::thread_of;
use super::group::{Arrival, Given, Group, Index};
use super::head::{Head, Why};
use super::inbox::{Inbox, Message, Taken};
use super::index;
use crate::ingest::submit::Submit;
use crate::log::{Append, Record};
use crate::projector::Verdict;
use crate::protocol::error::Code;
use crate::protocol::kinds::WORK_LEASED;
use crate::protocol::work::{Delivery, Settlement, Work, WorkLeasedRecord};
use crate::store::{Store, StoreError, WorkChange};
use crate::{clock, panics, telemetry};

/// How long the thread sleeps when nothing is due.
const SLEEP: Duration = Duration::from_secs(5);
/// A group that nobody here needs is forgotten after so long.
const IDLE_MS: u64 = 60_000;
/// After a refused lease others' choices are kept away from for so long.
const CONTENDED_MS: u64 = 2_000;
/// Among so many that come next.
const CONTENDED_CHOICES: usize = 4;
/// After a log that did not take a lease, or a store that failed, it is tried again after so long.
const AGAIN_MS: u64 = 1_000;
/// What is over is ended within so long, by whichever node is first.
const OVER_MS: f64 = 200.0;
/// How many users' work is looked through for a worker that does not take every kind, and how much of each.
const LOOKED_THROUGH: (usize, usize) = (64, 16);
/// For so many workers work is looked for that does not come, and after so long for the others.
const MAX_TRIES: usize = 64;
const PASSED_OVER_MS: u64 = 50;
/// How many indexes are completed at once.
const MAX_INDEXING: usize = 4;
/// Leases of which it is not known whether they came to be.
const MAX_ABANDONED: usize = 10_000;

pub fn start(
    store: Arc<Store>,
    submit: Arc<Submit>,
    inbox: Arc<Inbox>,
    memory: usize,
) -> Result<std::thread::JoinHandle<()>, std::io::Error> {
    let dispatcher = Thread {
        store,
        submit,
        inbox,
        groups: HashMap::new(),
        wakes: BTreeSet::new(),
        touched: HashSet::new(),
        batch: Vec::new(),
        indexing: 0,
        memory,
        held: 0,
        hasher: RandomState::new(),
    };
    std::thread::Builder::new().name("dispatcher".into()).spawn(move || dispatcher.run())
}

struct Thread {
    store: Arc<Store>,
    submit: Arc<Submit>,
    inbox: Arc<Inbox>,
    groups: HashMap<Arc<str>, Group>,
    /// When groups are to be seen to; milliseconds.
    wakes: BTreeSet<(u64, Arc<str>)>,
    /// Those that are to be seen to now.
    touched: HashSet<Arc<str>>,
    /// Records for the log.
    batch: Vec<Append>,
    indexing: usize,
    /// How much may be held of all groups; bytes. Of one, half of that.
    memory: usize,
    /// How much is.
    held: usize,
    /// This node's own order of threads.
    hasher: RandomState,
}

impl Thread {
    fn run(mut self) {
        let _vital = panics::abort_on_panic("the dispatcher");
        loop {
            let now = clock::now_ms();
            let wait =
                self.wakes.first().map_or(SLEEP, |(at, _)| Duration::from_millis(at.saturating_sub(now)).min(SLEEP));
            let Taken { messages, changes, overflowed, closed } = self.inbox.take(wait);
            let now = clock::now_ms();
            while let Some((at, _)) = self.wakes.first()
                && *at <= now
            {
                self.touched.extend(self.wakes.pop_first().map(|(_, key)| key));
            }
            // Of a thread that is worked on in parallel each look reads much.
            let mut changes = changes;
            changes.dedup();
            for change in changes {
                self.on_change(&change, now);
            }
            for message in messages {
                self.on_message(message, now);
            }
            if overflowed {
                tracing::warn!("more work has changed than could be followed, and is looked up again");
                for key in self.groups.keys().cloned().collect::<Vec<_>>() {
                    self.with(&key, |group, store| group.look_at_all(store, now), now);
                }
            }
            for key in std::mem::take(&mut self.touched) {
                self.see_to(&key, now);
            }
            if !self.batch.is_empty() {
                self.submit.send(std::mem::take(&mut self.batch));
            }
            if closed {
                return;
            }
        }
    }

    /// Does something with a group that is held here, and gives what arrived by it to its workers.
    fn with(
        &mut self,
        key: &Arc<str>,
        what: impl FnOnce(&mut Group, &Store) -> Result<Vec<Arrival>, StoreError>,
        now: u64,
    ) {
        let Some(group) = self.groups.get_mut(key) else { return };
        self.touched.insert(key.clone());
        match what(group, &self.store) {
            Ok(arrivals) => arrivals.into_iter().for_each(|arrival| self.on_arrival(key, &arrival, now)),
            Err(error) => {
                // It is all looked up again, once the store answers.
                tracing::warn!(%error, group = &**key, "the store failed, and a group's work is looked up again");
                self.wakes.insert((now + AGAIN_MS, key.clone()));
                group.index = Index::Unknown;
            }
        }
    }

    fn on_change(&mut self, change: &WorkChange, now: u64) {
        let (tenant, group) = match change {
            WorkChange::Waiting { tenant, group, .. }
            | WorkChange::Work { tenant, group, .. }
            | WorkChange::Group { tenant, group } => (tenant, group),
        };
        if self.groups.is_empty() {
            return;
        }
        let key = super::key(tenant, group);
        match change {
            WorkChange::Waiting { thread, .. } => {
                let look = |group: &mut Group, store: &Store| match group.is_full(thread) {
                    // What is held of the thread comes before it.
                    true => Ok(Vec::new()),
                    false => group.look_at(store, &thread.as_str().into(), Why::Came, now),
                };
                self.with(&key, look, now);
            }
            WorkChange::Work { thread, group_id, now: work, .. } => {
                let thread = thread.as_str().into();
                self.with(&key, |group, store| group.moved(store, &thread, (group_id, *work), now), now);
            }
            WorkChange::Group { .. } => {
                self.with(&key, |group, store| group.reload(store).map(|()| Vec::new()), now);
            }
        }
    }

    fn on_message(&mut self, message: Message, now: u64) {
        match message {
            Message::Join { key, id, tenant, group: name, user, wants, sink } => {
                let group = self.groups.entry(key.clone()).or_insert_with(|| Group::new(tenant, name));
                group.workers.join(id, user, wants, sink);
                self.inbox.set_workers(&key, group.workers.len());
                self.touched.insert(key);
            }
            Message::Set { key, id, wants } => {
                if let Some(group) = self.groups.get_mut(&key) {
                    group.workers.set(id, wants);
                    self.touched.insert(key);
                }
            }
            Message::Finish { key, id, done } => {
                if let Some(group) = self.groups.get_mut(&key) {
                    group.workers.finish(id, done);
                }
            }
            Message::Leave { key, id, loses } => self.on_leave(&key, id, loses),
            Message::Verdict { key, lease, verdict } => self.on_verdict(&key, lease, verdict, now),
            Message::Indexed { key, revision, complete } => {
                self.indexing -= 1;
                if let Some(group) = self.groups.get_mut(&key) {
                    let is_this = group.row.as_ref().is_some_and(|row| row.revision == revision);
                    group.index = if complete && is_this { Index::Complete } else { Index::Unknown };
                    if group.index == Index::Complete {
                        self.with(&key, |group, store| group.look_at_all(store, now), now);
                    } else {
                        self.wakes.insert((if complete { now } else { now + AGAIN_MS }, key));
                    }
                }
            }
        }
    }

    fn on_leave(&mut self, key: &Arc<str>, id: u64, loses: bool) {
        let Some(group) = self.groups.get_mut(key) else { return };
        group.workers.leave(id);
        self.inbox.set_workers(key, group.workers.len());
        self.touched.insert(key.clone());
        // What is on its way to it is lost when it arrives.
        let held = group.given.iter().filter(|(_, given)| given.worker == id && given.arrived);
        let held: Vec<(Uuid, Arc<str>)> = held.map(|(lease, given)| (*lease, given.key.clone())).collect();
        for (lease, held_by) in held {
            if let Some(group) = self.groups.get_mut(key) {
                group.given.remove(&lease);
            }
            if loses {
                self.end(key, lease, thread_of(&held_by), Settlement::Lost);
            }
        }
    }

    /// A lease that was asked for here is in the log: it goes to its worker.
    fn on_arrival(&mut self, key: &Arc<str>, arrival: &Arrival, now: u64) {
        let Some(group) = self.groups.get_mut(key) else { return };
        let (Some(head), Some(row)) = (group.heads.get(&arrival.key), &group.row) else { return };
        let (waited_ms, wait) = head.waiting.is_given(now);
        let lease_ms = group.given.get(&arrival.lease).map_or(row.lease_ms, |given| given.lease_ms);
        let (thread, name) = (thread_of(&arrival.key), group.name.to_string());
        let delivery = Delivery { lease: arrival.lease, lease_ms, group: name, thread: thread.to_owned() };
        let work = Work {
            lease: arrival.lease,
            delivery: delivery.text(),
            group: group.name.clone(),
            thread: thread.into(),
            seq: head.seq,
            attempt: head.attempt,
            lease_ms,
            waited_ms,
            wait,
        };
        if arrival.worker.is_some_and(|worker| group.workers.give(worker, work)) {
            telemetry::work_given(&wait);
            return;
        }
        group.given.remove(&arrival.lease);
        self.end(key, arrival.lease, thread, Settlement::Lost);
    }

    fn on_verdict(&mut self, key: &Arc<str>, lease: Uuid, verdict: Verdict, now: u64) {
        let Some(given) = self.groups.get(key).and_then(|group| group.given.get(&lease)) else { return };
        if given.arrived {
            return;
        }
        let held_by = given.key.clone();
        let thread: Arc<str> = thread_of(&held_by).into();
        let mut until = None;
        match verdict {
            // It is in the store by now, unless it is over already.
            Ok(_) => {
                self.with(key, |group, store| group.look_at(store, &thread, Why::Moved, now), now);
                if self.groups.get(key).and_then(|group| group.given.get(&lease)).is_none_or(|given| given.arrived) {
                    return;
                }
            }
            Err(error) if error.code == Code::Conflict => {
                telemetry::work_conflicts().increment(1);
                self.with(key, |group, store| group.look_at(store, &thread, Why::Moved, now), now);
                if let Some(group) = self.groups.get_mut(key) {
                    group.contended_until = now + CONTENDED_MS;
                    // Nobody else was first: this node's clock is behind the log's, and asking at once would change nothing.
                    until = group.is_chosen(&held_by, lease).then_some(now + AGAIN_MS);
                }
            }
            Err(error) => {
                until = Some(now + AGAIN_MS);
                if let Some(group) = self.groups.get_mut(key)
                    && error.outcome_unknown
                    && group.abandoned.len() < MAX_ABANDONED
                {
                    group.abandoned.insert(lease);
                }
            }
        }

        let Some(group) = self.groups.get_mut(key) else { return };
        if let Some(given) = group.given.remove(&lease) {
            group.workers.refuse(given.worker);
        }
        group.give_back(&held_by, lease, until, now);
        self.with(key, |group, store| group.look_at(store, &thread, Why::Moved, now), now);
    }

    /// Does for a group what is to be done now.
    fn see_to(&mut self, key: &Arc<str>, now: u64) {
        if let Some(group) = self.groups.get_mut(key) {
            group.may_hold(self.memory.saturating_sub(self.held), self.memory / 2);
        }
        self.begin_index(key, now);
        self.with(key, |group, store| group.look_further(store, now), now);

        let Some(group) = self.groups.get_mut(key) else { return };
        let share = clock::random_share();
        let over = group.due(now, || now + AGAIN_MS + (share * OVER_MS) as u64);
        for (lease, held_by) in over {
            self.end(key, lease, thread_of(&held_by), Settlement::Expired);
        }
        self.choose(key, now);
        self.rest(key, now);
    }

    /// When the group is seen to next, or that it is forgotten.
    fn rest(&mut self, key: &Arc<str>, now: u64) {
        self.touched.remove(key);
        let Some(group) = self.groups.get_mut(key) else { return };
        let any_free = group.workers.any_free();
        let paused = group.row.as_ref().is_some_and(|row| row.paused);
        group.holds.paused.set(paused, now);
        group.holds.no_worker.set(!any_free && !paused, now);

        if group.workers.len() > 0 || !group.given.is_empty() {
            group.idle_since = None;
        } else if *group.idle_since.get_or_insert(now) + IDLE_MS <= now {
            self.held -= group.counted;
            self.groups.remove(key);
            return;
        }
        let idle = group.idle_since.map(|since| since + IDLE_MS);
        let looks = group.is_looking(now).then_some(now);
        let due = group.next_due(now);
        let passed_over = (group.ready.len() > 0 && any_free && !paused).then_some(now + PASSED_OVER_MS);
        if let Some(at) = [idle, looks, due, passed_over].into_iter().flatten().min()
            && group.wake.is_none_or(|wake| wake <= now || at < wake)
        {
            group.wake = Some(at);
            self.wakes.insert((at, key.clone()));
        }
        let bytes = group.bytes();
        self.held = self.held + bytes - std::mem::replace(&mut group.counted, bytes);
    }

    /// Sees to it that the index of what waits is complete.
    fn begin_index(&mut self, key: &Arc<str>, now: u64) {
        let Some(group) = self.groups.get_mut(key) else { return };
        if group.index != Index::Unknown {
            return;
        }
        if let Err(error) = group.reload(&self.store) {
            tracing::warn!(%error, group = &**key, "the group cannot be read");
            self.wakes.insert((now + AGAIN_MS, key.clone()));
            return;
        }
        let Some(row) = group.row.clone() else { return };
        if self.indexing >= MAX_INDEXING {
            self.wakes.insert((now + AGAIN_MS, key.clone()));
            return;
        }
        group.index = Index::InWork;
        self.indexing += 1;
        let (store, inbox, key) = (self.store.clone(), self.inbox.clone(), key.clone());
        let (tenant, name) = (group.tenant.clone(), group.name.clone());
        let complete = move || {
            let done = panics::caught(|| index::complete(&store, &tenant, &name, &row, &|| true));
            let complete = match done {
                Ok(Ok(complete)) => complete,
                Ok(Err(error)) => {
                    tracing::warn!(%error, group = &*name, "what waits for a group cannot be looked for");
                    false
                }
                Err(_) => false,
            };
            inbox.push(Message::Indexed { key, revision: row.revision, complete });
        };
        if std::thread::Builder::new().name("work-index".into()).spawn(complete).is_err() {
            self.indexing -= 1;
            group.index = Index::Unknown;
        }
    }

    /// Asks for leases for as long as there is work for a worker.
    fn choose(&mut self, key: &Arc<str>, now: u64) {
        let Some(group) = self.groups.get_mut(key) else { return };
        let Some(row) = group.row.clone().filter(|row| !row.paused && group.index == Index::Complete) else { return };
        let mut tries = group.workers.waiting().min(MAX_TRIES);
        while group.ready.len() > 0
            && tries > 0
            && let Some(worker) = group.workers.turn()
        {
            let Some(held_by) = next_for(group, worker, &self.hasher, now) else {
                tries -= 1;
                continue;
            };
            let Some(head) = group.heads.get(&held_by) else { return };
            let Some((user, lease_ms)) = group.workers.send(worker) else { return };
            let lease_ms = lease_ms.unwrap_or(row.lease_ms);
            let record = WorkLeasedRecord {
                kind: WORK_LEASED.to_owned(),
                id: clock::event_id(),
                tenant: group.tenant.to_string(),
                thread: thread_of(&held_by).to_owned(),
                group: group.name.to_string(),
                group_id: Uuid::from_bytes(row.id),
                seq: head.seq,
                event_kind: head.kind.to_string(),
                after: head.after,
                parallel: group.is_parallel(),
                attempt: head.attempt,
                attempts: row.attempts.max(head.attempt),
                holder: user.to_string(),
                at: clock::rfc3339(now),
                until: clock::rfc3339(now + lease_ms),
            };
            let lease = record.id;
            group.choose(&held_by, lease, now);
            group.given.insert(lease, Given { worker, key: held_by, lease_ms, arrived: false });
            let (inbox, key) = (self.inbox.clone(), key.clone());
            let reply = move |verdict| inbox.push(Message::Verdict { key, lease, verdict });
            self.batch.push(self.submit.prepare_record(lease, Record::from(&record), Box::new(reply)));
        }
    }

    /// The server settles a lease for its worker.
    fn end(&mut self, key: &Arc<str>, lease: Uuid, thread: &str, outcome: Settlement) {
        let Some(group) = self.groups.get(key) else { return };
        let record = super::ended((&group.tenant, thread, &group.name), lease, outcome);
        // Another node may have been first. What is not taken is tried again when the lease is over.
        let count = move |verdict: Verdict| {
            if verdict.is_ok() {
                telemetry::work_settled(outcome.as_str()).increment(1);
            }
        };
        self.batch.push(self.submit.prepare_record(record.id, Record::from(&record), Box::new(count)));
    }
}

/// The thread whose turn it is, of those that a worker takes.
fn next_for(group: &Group, worker: u64, hasher: &RandomState, now: u64) -> Option<Arc<str>> {
    // Who does not take the only kind of a group takes no more than what was begun when the group had others.
    if let Some(kinds) = group.workers.kinds_of(worker).filter(|kinds| !kinds.iter().any(|kind| group.has_only(kind))) {
        return group.ready.next_of(kinds.iter().map(String::as_str));
    }
    if group.workers.takes_all(worker) {
        if now >= group.contended_until {
            return group.ready.next(1).next().map(|(_, _, thread)| thread);
        }
        let choices = group.ready.next(CONTENDED_CHOICES).flat_map(|(user, ..)| {
            group.ready.of_user(&user).take(CONTENDED_CHOICES).map(|(_, thread)| thread.clone()).collect::<Vec<_>>()
        });
        return choices.max_by_key(|thread| hasher.hash_one(thread));
    }
    let (users, each) = LOOKED_THROUGH;
    let takes = |head: &Head| group.workers.takes(worker, &head.kind);
    group.ready.next(users).find_map(|(user, ..)| {
        let of_user = group.ready.of_user(&user).take(each);
        of_user.map(|(_, thread)| thread).find(|thread| group.heads.get(*thread).is_some_and(takes)).cloned()
    })
}
