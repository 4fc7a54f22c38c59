//! A group on this node: the threads whose work could be next, each with its next event, and what is on its way. Of a group
//! without order each event is held by itself, some of each thread.
//!
//! What is held of a thread is what the store said when it was last looked at ([`Group::look_at`]), which happens after each
//! commit that changes something there. Nothing is kept that could not be read again.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use uuid::Uuid;

use super::found::{self, Found, key_of, thread_of};
use super::head::{HEAD_BYTES, Head, State, USER_BYTES, Why, waiting};
use super::ready::{KIND_BYTES, PLACE_BYTES, Ready, rank};
use super::waits::{Holds, Waiting};
use super::workers::Workers;
use crate::protocol::work::{MAX_PARALLEL, WorkOrder};
use crate::store::{GroupRow, SimpleWork, Store, StoreError, WaitingRow, WaitingStart};

/// What a group may hold in any case.
const MIN_BYTES: usize = 20 * (HEAD_BYTES + USER_BYTES);
/// Threads that are looked for at once.
const CHUNK: usize = 500;
/// How many events of a thread are read at once where one is done and the next is asked for.
const UPCOMING: usize = 8;
/// When a paused thread is looked at again, unless it is resumed.
const NEVER: u64 = u64::MAX;
/// Between two walks for what is to be tried now and was left out.
const DUE_EVERY_MS: u64 = 1_000;

/// Whether the index of what waits is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    Unknown,
    /// It is being completed.
    InWork,
    Complete,
}

/// A lease that a worker of this node has, or will have.
pub struct Given {
    pub worker: u64,
    /// What the event is held by.
    pub key: Arc<str>,
    pub lease_ms: u64,
    /// The worker has it.
    pub arrived: bool,
}

pub struct Group {
    pub tenant: Arc<str>,
    pub name: Arc<str>,
    /// None if it was deleted.
    pub row: Option<GroupRow>,
    pub index: Index,
    /// By thread, or by thread and seq ([`thread_of`]).
    pub heads: HashMap<Arc<str>, Head>,
    /// Of those that are held by thread and seq, the seqs.
    seqs: HashMap<Arc<str>, BTreeSet<u64>>,
    pub ready: Ready,
    /// The kinds of its events.
    kinds: Vec<Arc<str>>,
    timers: BTreeSet<(u64, Arc<str>)>,
    pub workers: Workers,
    pub given: HashMap<Uuid, Given>,
    /// Leases of which it is not known whether they came to be: nobody here waits for them any more.
    pub abandoned: HashSet<Uuid>,
    /// Where the walk over what waits goes on, if one is under way.
    scan: Option<WaitingStart>,
    /// The walk goes on past what there is no room for, so that each user's first is found.
    scans_all: bool,
    /// Where the first was for which there was no room.
    left_out: Option<WaitingStart>,
    /// There was no room for one that may be anywhere.
    missed: bool,
    /// How many are held of what is to be tried later, or is paused.
    later: usize,
    /// When the first of those is to be tried for which there was no room; and when they are looked for at the earliest.
    due: Option<u64>,
    due_not_before: u64,
    /// Since when they are looked for, if they are.
    due_walk: Option<u64>,
    /// What is held, in bytes and without what each user costs, and how much that may be.
    bytes: usize,
    max_bytes: usize,
    pub holds: Holds,
    /// Until when others' choices are kept away from; milliseconds.
    pub contended_until: u64,
    /// Since when nobody needs it here; milliseconds.
    pub idle_since: Option<u64>,
    /// When it is seen to next; milliseconds.
    pub wake: Option<u64>,
    /// How much it held when that was last counted; bytes.
    pub counted: usize,
}

impl Group {
    pub fn new(tenant: Arc<str>, name: Arc<str>) -> Group {
        Group {
            tenant,
            name,
            row: None,
            index: Index::Unknown,
            heads: HashMap::new(),
            seqs: HashMap::new(),
            ready: Ready::default(),
            kinds: Vec::new(),
            timers: BTreeSet::new(),
            workers: Workers::default(),
            given: HashMap::new(),
            abandoned: HashSet::new(),
            scan: None,
            scans_all: false,
            left_out: None,
            missed: false,
            later: 0,
            due: None,
            due_not_before: 0,
            due_walk: None,
            bytes: 0,
            max_bytes: MIN_BYTES,
            holds: Holds::default(),
            contended_until: 0,
            idle_since: None,
            wake: None,
            counted: 0,
        }
    }

    /// So many bytes more may be held than are, and never more than `most`; a few threads always.
    pub fn may_hold(&mut self, more: usize, most: usize) {
        self.max_bytes = (self.bytes() + more).min(most).max(MIN_BYTES);
    }

    /// What is held, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes + self.ready.users() * USER_BYTES + self.ready.kind_bytes()
    }

    /// Reads the group's row. If it wants other events than before, what waits is looked for anew.
    pub fn reload(&mut self, store: &Store) -> Result<(), StoreError> {
        let row = store.group(&self.tenant, &self.name)?;
        let revision = |row: &Option<GroupRow>| row.as_ref().map(|row| (row.id, row.revision));
        let order = |row: &Option<GroupRow>| row.as_ref().map(|row| (row.order, row.boost));
        if revision(&row) != revision(&self.row) {
            self.index = Index::Unknown;
            self.scan = None;
            self.forget_heads();
            let kinds = row.iter().flat_map(|row| &row.kinds);
            self.kinds = kinds.map(|kind| kind.as_str().into()).collect();
        } else if order(&row) != order(&self.row) {
            self.forget_heads();
            self.find_all();
        }
        self.row = row;
        Ok(())
    }

    /// Nothing is known of what waits. What is on its way stays on its way, and of what a worker has it is heard when it is over.
    fn forget_heads(&mut self) {
        let is_given = |head: &Head| match head.state {
            State::Chosen(lease) | State::Leased { lease, .. } => self.given.contains_key(&lease),
            State::Ready | State::Later { .. } | State::Paused { .. } => false,
        };
        let others = self.heads.iter().filter(|(_, head)| !is_given(head)).map(|(key, _)| key.clone());
        for key in others.collect::<Vec<_>>() {
            self.remove(&key);
        }
        for key in self.heads.keys().cloned().collect::<Vec<_>>() {
            self.hold_upcoming(&key, VecDeque::new());
        }
        self.due = None;
    }

    /// Whether all its events are of this kind, but for those that were begun when it had others.
    pub fn has_only(&self, kind: &str) -> bool {
        matches!(&*self.kinds, [only] if **only == *kind)
    }

    /// Whether the group keeps no order.
    pub fn is_parallel(&self) -> bool {
        self.row.as_ref().is_some_and(|row| row.order == WorkOrder::None)
    }

    /// Whether nothing that comes to the thread is to be looked at before something there is done.
    pub fn is_full(&self, thread: &str) -> bool {
        let more = self.seqs.get(thread).map_or(0, BTreeSet::len);
        if self.is_parallel() { more >= MAX_PARALLEL } else { self.heads.contains_key(thread) }
    }

    /// What is held of a thread.
    fn keys_of(&self, thread: &Arc<str>) -> Vec<Arc<str>> {
        let alone = self.heads.contains_key(thread).then(|| thread.clone());
        let seqs = self.seqs.get(thread).into_iter().flatten();
        alone.into_iter().chain(seqs.map(|seq| key_of(thread, *seq, false))).collect()
    }

    /// The index is complete: what waits is looked for from the beginning on, and what is held is looked at again.
    pub fn find_all(&mut self) {
        self.scan = Some(WaitingStart::BEGIN);
        (self.scans_all, self.left_out, self.missed, self.due) = (true, None, false, None);
        self.due_walk = None;
    }

    /// Everything that is held is looked at again: something was missed.
    pub fn look_at_all(&mut self, store: &Store, now: u64) -> Result<Vec<Arrival>, StoreError> {
        self.reload(store)?;
        let mut arrivals = Vec::new();
        for thread in self.heads.keys().map(|key| thread_of(key).into()).collect::<HashSet<Arc<str>>>() {
            arrivals.extend(self.look_at(store, &thread, Why::Moved, now)?);
        }
        self.find_all();
        Ok(arrivals)
    }

    /// Whether there is more to find in the store, and room for it. What is tried later gives way to what can be done now.
    pub fn is_looking(&self, now: u64) -> bool {
        let has_room = self.bytes() < self.max_bytes.div_ceil(2) || self.ready.len() == 0 && self.is_mostly_later();
        let looks = self.scan.is_some()
            || self.left_out_due().is_some_and(|due| due <= now)
            || (self.left_out.is_some() || self.missed) && has_room;
        looks && self.index == Index::Complete && self.row.is_some()
    }

    /// Walks on a little over what waits; begins anew where there is room again for what was left out.
    pub fn look_further(&mut self, store: &Store, now: u64) -> Result<Vec<Arrival>, StoreError> {
        let mut arrivals = Vec::new();
        if !self.is_looking(now) {
            return Ok(arrivals);
        }
        if self.scan.is_none() && self.left_out_due().is_some_and(|due| due <= now) {
            // They may be anywhere. A walk goes over everything: not one for each of them.
            self.find_all();
            self.due_walk = Some(now);
        }
        let start = match self.scan.take() {
            Some(start) => start,
            None => {
                self.scans_all = false;
                self.left_out.take().unwrap_or_else(|| {
                    self.missed = false;
                    WaitingStart::BEGIN
                })
            }
        };
        let (found, next) = store.waiting_threads(&self.tenant, &self.name, start.clone(), CHUNK)?;
        let mut left_out = false;
        for head in found {
            let thread: Arc<str> = head.thread.into();
            // Of a group without order some events of a thread may be held and others not.
            if self.is_parallel() || self.keys_of(&thread).is_empty() {
                let missed = std::mem::take(&mut self.missed);
                arrivals.extend(self.look_at(store, &thread, Why::Found, now)?);
                left_out |= self.missed && self.keys_of(&thread).is_empty();
                self.missed |= missed;
            }
        }
        if left_out {
            self.left_out.get_or_insert(start);
        }
        if self.scans_all || !left_out {
            self.scan = next;
        }
        if self.scan.is_none()
            && let Some(began) = self.due_walk.take()
        {
            // A walk that takes long takes half of the time, and no more.
            self.due_not_before = now + DUE_EVERY_MS.max(now.saturating_sub(began));
        }
        Ok(arrivals)
    }

    /// Something was leased or settled in a thread, and by the commit the thread's row came to `work`: the store is asked only for
    /// what that does not say.
    pub fn moved(
        &mut self,
        store: &Store,
        thread: &Arc<str>,
        (group_id, work): (&[u8; 16], Option<SimpleWork>),
        now: u64,
    ) -> Result<Vec<Arrival>, StoreError> {
        let is_this = |row: &&GroupRow| row.id == *group_id && row.order == WorkOrder::Thread;
        let held = self.heads.get(thread);
        match (self.row.as_ref().filter(is_this), work) {
            (Some(_), Some(SimpleWork::Leased { id, until })) if self.is_chosen(thread, Uuid::from_bytes(id)) => {
                Ok(self.is_leased(thread, Uuid::from_bytes(id), until).into_iter().collect())
            }
            // What is held may already be what a later commit brought.
            (Some(_), Some(SimpleWork::Free { cursor })) if held.is_some_and(|head| head.seq <= cursor) => {
                self.is_free(store, thread, cursor, now)
            }
            _ => self.look_at(store, thread, Why::Moved, now),
        }
    }

    /// The lease that was asked for came to be.
    fn is_leased(&mut self, thread: &Arc<str>, lease: Uuid, until: u64) -> Option<Arrival> {
        let head = self.heads.get_mut(thread)?;
        (head.state, head.timer) = (State::Leased { lease, until }, Some(until));
        self.timers.insert((until, thread.clone()));
        self.arrival(lease, thread)
    }

    /// What was held of a thread is done, and nothing is begun there: what comes next is held.
    fn is_free(&mut self, store: &Store, thread: &Arc<str>, cursor: u64, now: u64) -> Result<Vec<Arrival>, StoreError> {
        let (Some(row), Some(old)) = (&self.row, self.heads.get_mut(thread)) else { return Ok(Vec::new()) };
        let mut upcoming = old.upcoming.clone();
        upcoming.retain(|(seq, _)| *seq > cursor);
        if upcoming.is_empty() {
            upcoming = found::upcoming(store, (&self.tenant, &self.name, thread), row, cursor, UPCOMING)?.into();
        }
        let Some((seq, waits)) = upcoming.pop_front() else {
            if let Some(old) = self.remove(thread) {
                self.over(&old, &[]);
            }
            return Ok(Vec::new());
        };
        let arrival = self.hold(thread, Found::first(seq, waits, cursor), (&[], None), Why::Moved, now);
        self.hold_upcoming(thread, upcoming);
        Ok(arrival.into_iter().collect())
    }

    /// Holds what comes after a thread's next event, if there is room.
    fn hold_upcoming(&mut self, thread: &Arc<str>, upcoming: VecDeque<(u64, WaitingRow)>) {
        let (held, most) = (self.bytes(), self.max_bytes);
        let Some(head) = self.heads.get_mut(thread) else { return };
        let before = head.bytes(thread);
        head.upcoming = upcoming;
        if held - before + head.bytes(thread) > most {
            head.upcoming = VecDeque::new();
        }
        self.bytes = self.bytes - before + head.bytes(thread);
    }

    /// Looks at a thread, and holds what is next there.
    pub fn look_at(
        &mut self,
        store: &Store,
        thread: &Arc<str>,
        why: Why,
        now: u64,
    ) -> Result<Vec<Arrival>, StoreError> {
        let (found, work) = match &self.row {
            Some(row) => found::find(store, (&self.tenant, &self.name, thread), row)?,
            None => Default::default(),
        };
        let leases: Vec<Uuid> = work.leases.iter().map(|lease| Uuid::from_bytes(lease.id)).collect();
        // What was leased side by side goes on so, whatever the group's settings are by now.
        let is_alone = !self.is_parallel() && work.leases.len() < 2;
        let keys: Vec<Arc<str>> = found.iter().map(|it| key_of(thread, it.seq, is_alone)).collect();
        for gone in self.keys_of(thread).into_iter().filter(|key| !keys.contains(key)) {
            if let Some(old) = self.remove(&gone) {
                self.over(&old, &leases);
            }
        }
        let mut arrivals = Vec::new();
        for (found, key) in found.into_iter().zip(keys) {
            arrivals.extend(self.hold(&key, found, (&leases, work.paused_at), why, now));
        }
        Ok(arrivals)
    }

    /// Holds an event as the store has it now.
    fn hold(
        &mut self,
        key: &Arc<str>,
        found: Found,
        (leases, paused_at): (&[Uuid], Option<u64>),
        why: Why,
        now: u64,
    ) -> Option<Arrival> {
        let Found { seq, row, after, attempt, lease, not_before } = found;
        let is_parallel = self.is_parallel();
        let is_it = |old: &Head| (old.seq, old.attempt) == (seq, attempt) && (is_parallel || old.after == after);
        let is_same = self.heads.get(key).is_some_and(is_it);
        if let Some(old) = self.heads.get_mut(key).filter(|_| is_same && lease.is_none()) {
            // Of what is chosen the log says whether it may be.
            let unchanged = match old.state {
                State::Ready | State::Later { .. } => paused_at.is_none(),
                State::Paused { .. } => paused_at.is_some(),
                State::Chosen(_) => true,
                State::Leased { .. } => false,
            };
            if unchanged {
                old.after = after;
                return None;
            }
        }

        let old = self.remove(key);
        let was_here = old.as_ref().is_some_and(|old| old.seq == seq);
        if let Some(old) = &old {
            self.over(old, leases);
        }
        let old = old.filter(|old| is_same && !(lease.is_none() && matches!(old.state, State::Leased { .. })));
        let paused_since = paused_at.map_or(now, |at| at.clamp(row.at.min(now), now));
        let waiting = match old {
            Some(old) => self.so_far(old, now),
            None => waiting(why, row.at, paused_since, attempt, was_here),
        };
        // Names that are held already are not held twice.
        let kind = self.kinds.iter().find(|kind| ***kind == *row.kind).cloned();
        let mut head = Head {
            seq,
            kind: kind.unwrap_or_else(|| row.kind.as_str().into()),
            user: self.ready.user(&row.user).unwrap_or_else(|| row.user.as_str().into()),
            rank: rank(row.at, row.class, self.row.as_ref().map(|row| row.boost).unwrap_or_default()),
            after,
            attempt,
            state: State::Ready,
            waiting,
            timer: None,
            upcoming: VecDeque::new(),
        };
        let mut arrival = None;
        match (lease, not_before) {
            (Some((lease, until)), _) => {
                head.state = State::Leased { lease, until };
                arrival = self.arrival(lease, key);
            }
            (None, _) if paused_at.is_some() => head.state = State::Paused { since: paused_since },
            (None, Some(until)) if until > now => head.state = State::Later { since: now, until },
            (None, _) => head.waiting.is_ready(&self.holds, now),
        }
        self.insert(key, head);
        arrival
    }

    /// How an event has waited so far that was held before and still waits, or has just been leased.
    fn so_far(&self, old: Head, now: u64) -> Waiting {
        let mut waiting = old.waiting;
        match old.state {
            State::Ready => waiting.is_held(&self.holds, now),
            State::Later { since, .. } => waiting.before.backoff_ms += now.saturating_sub(since),
            State::Paused { since } => waiting.before.paused_ms += now.saturating_sub(since),
            State::Chosen(_) | State::Leased { .. } => {}
        }
        waiting
    }

    /// A lease that was asked for here is in the log: who gets it, if it has not arrived before.
    fn arrival(&mut self, lease: Uuid, key: &Arc<str>) -> Option<Arrival> {
        if self.abandoned.remove(&lease) {
            return Some(Arrival { lease, worker: None, key: key.clone() });
        }
        let given = self.given.get_mut(&lease)?;
        if std::mem::replace(&mut given.arrived, true) {
            return None;
        }
        Some(Arrival { lease, worker: Some(given.worker), key: key.clone() })
    }

    /// What was held is not so any more: if its lease is not among the thread's, its worker may take more.
    fn over(&mut self, old: &Head, leases: &[Uuid]) {
        if let State::Leased { lease, .. } = old.state
            && !leases.contains(&lease)
            && let Some(given) = self.given.remove(&lease)
        {
            self.workers.release(given.worker);
        }
    }

    // What is held.

    fn insert(&mut self, key: &Arc<str>, mut head: Head) {
        let bytes = head.bytes(key);
        if !self.make_room(&head, bytes) {
            self.leave_out(&head);
            return;
        }
        self.bytes += bytes;
        self.later += usize::from(head.is_later());
        match head.state {
            State::Ready => self.ready.insert(head.piece(key, &self.kinds)),
            State::Later { until, .. } | State::Leased { until, .. } => head.timer = Some(until),
            State::Paused { .. } => head.timer = Some(NEVER),
            State::Chosen(_) => {}
        }
        if let Some(at) = head.timer {
            self.timers.insert((at, key.clone()));
        }
        let thread = thread_of(key);
        if thread.len() < key.len() {
            self.seqs.entry(thread.into()).or_default().insert(head.seq);
        }
        self.heads.insert(key.clone(), head);
    }

    /// Somebody who has more than the head's user gives way to it; a lease of a worker's here always has room.
    fn make_room(&mut self, head: &Head, bytes: usize) -> bool {
        if let State::Leased { lease, .. } = head.state
            && self.given.contains_key(&lease)
        {
            return true;
        }
        let is_ready = matches!(head.state, State::Ready);
        let new_user = if is_ready && self.ready.count_of(&head.user) == 0 { USER_BYTES } else { 0 };
        let new_kind = if is_ready && !self.has_only(&head.kind) { KIND_BYTES + PLACE_BYTES } else { 0 };
        let bytes = bytes + new_user + new_kind;
        let is_mostly_later = self.is_mostly_later();
        while self.bytes() + bytes > self.max_bytes {
            let others = self.ready.most().filter(|(most, _)| *most > self.ready.count_of(&head.user) + 1);
            let key = match (&head.state, others) {
                (State::Leased { .. } | State::Paused { .. }, _) => None,
                (_, Some((_, key))) => Some(key),
                // Whatever is tried again and again, or is paused, does not keep out what can be done now.
                (State::Ready, None) if is_mostly_later => self.last_to_try(),
                _ => None,
            };
            let Some(out) = key.and_then(|key| self.remove(&key)) else { return false };
            self.leave_out(&out);
        }
        true
    }

    /// There is no room for something: it is looked for when there is, or when it is to be tried.
    fn leave_out(&mut self, head: &Head) {
        match head.state {
            // It is heard if another node's lease is over before.
            State::Later { until, .. } | State::Leased { until, .. } => {
                self.due = Some(self.due.map_or(until, |due| due.min(until)));
            }
            // It is heard when it is resumed.
            State::Paused { .. } => {}
            State::Ready | State::Chosen(_) => self.missed = true,
        }
    }

    fn is_mostly_later(&self) -> bool {
        self.later > self.heads.len() / 2
    }

    fn left_out_due(&self) -> Option<u64> {
        self.due.map(|due| due.max(self.due_not_before))
    }

    /// What is held and tried last; what is paused before that.
    fn last_to_try(&self) -> Option<Arc<str>> {
        let is_later = |key: &str| self.heads.get(key).is_some_and(Head::is_later);
        self.timers.iter().rev().map(|(_, key)| key).find(|key| is_later(key)).cloned()
    }

    fn remove(&mut self, key: &Arc<str>) -> Option<Head> {
        let head = self.heads.remove(key)?;
        self.bytes -= head.bytes(key);
        self.later -= usize::from(head.is_later());
        if head.state == State::Ready {
            self.ready.remove(head.piece(key, &self.kinds));
        }
        if let Some(at) = head.timer {
            self.timers.remove(&(at, key.clone()));
        }
        let thread = thread_of(key);
        if thread.len() < key.len()
            && let Some(seqs) = self.seqs.get_mut(thread)
        {
            seqs.remove(&head.seq);
            if seqs.is_empty() {
                self.seqs.remove(thread);
            }
        }
        Some(head)
    }

    /// A lease is asked for.
    pub fn choose(&mut self, key: &Arc<str>, lease: Uuid, now: u64) {
        if let Some(head) = self.heads.get_mut(key) {
            self.ready.take(head.piece(key, &self.kinds));
            head.state = State::Chosen(lease);
            head.waiting.is_chosen(&self.holds, now);
        }
    }

    /// The store has nothing that speaks against a lease that was asked for.
    pub fn is_chosen(&self, key: &Arc<str>, lease: Uuid) -> bool {
        self.heads.get(key).is_some_and(|head| head.state == State::Chosen(lease))
    }

    /// The lease that was asked for did not come to be: the event is ready again, at once or later.
    pub fn give_back(&mut self, key: &Arc<str>, lease: Uuid, until: Option<u64>, now: u64) {
        let Some(head) = self.heads.get(key).filter(|head| head.state == State::Chosen(lease)) else { return };
        debug_assert!(head.timer.is_none());
        if let Some(mut head) = self.remove(key) {
            head.waiting.is_refused(&self.holds, now);
            head.state = State::Ready;
            if let Some(until) = until {
                head.state = State::Later { since: now, until };
            }
            self.insert(key, head);
        }
    }

    /// What has its time come; leases that are over are given, and looked at again at `again` unless they change.
    pub fn due(&mut self, now: u64, again: impl Fn() -> u64) -> Vec<(Uuid, Arc<str>)> {
        let mut over = Vec::new();
        while let Some((at, key)) = self.timers.first().cloned()
            && at <= now
        {
            self.timers.pop_first();
            let Some(head) = self.heads.get_mut(&key) else { continue };
            head.timer = None;
            match head.state {
                State::Later { since, .. } => {
                    head.waiting.before.backoff_ms += now.saturating_sub(since);
                    head.waiting.is_ready(&self.holds, now);
                    head.state = State::Ready;
                    self.later -= 1;
                    self.ready.insert(head.piece(&key, &self.kinds));
                }
                State::Leased { lease, until } if until <= now => {
                    over.push((lease, key.clone()));
                    let at = again();
                    head.timer = Some(at);
                    self.timers.insert((at, key));
                }
                State::Leased { .. } | State::Ready | State::Paused { .. } | State::Chosen(_) => {}
            }
        }
        over
    }

    /// When something is due next; milliseconds.
    pub fn next_due(&self, now: u64) -> Option<u64> {
        let left_out = self.left_out_due().filter(|due| *due > now);
        let held = self.timers.first().map(|(at, _)| *at).filter(|at| *at < NEVER);
        held.into_iter().chain(left_out).min()
    }
}

/// A lease that is in the log.
pub struct Arrival {
    pub lease: Uuid,
    /// None if nobody waits for it any more.
    pub worker: Option<u64>,
    /// What the event is held by.
    pub key: Arc<str>,
}

#[cfg(test)]
mod tests;
