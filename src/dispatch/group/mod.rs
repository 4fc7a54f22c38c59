//! A group on this node: the threads whose work could be next, each with its next event, and what is on its way.
//!
//! What is held of a thread is what the store said when it was last looked at ([`Group::look_at`]), which happens after each
//! commit that changes something there. Nothing is kept that could not be read again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use uuid::Uuid;

use super::head::{HEAD_BYTES, Head, State, USER_BYTES, Why, waiting};
use super::index::waiting_row;
use super::ready::{KIND_BYTES, PLACE_BYTES, Ready, rank};
use super::waits::Holds;
use super::workers::Workers;
use crate::store::{FailedRow, GroupRow, LeaseRow, Store, StoreError, WaitingRow, WaitingStart, WorkRow};

/// What a group may hold in any case.
const MIN_BYTES: usize = 20 * (HEAD_BYTES + USER_BYTES);
/// Threads that are looked for at once.
const CHUNK: usize = 500;

/// Between two walks for what is to be tried now and was left out.
const DUE_EVERY_MS: u64 = 1_000;

const BEGIN: WaitingStart = WaitingStart { partition: 0, thread: None };

/// What the store has of a thread's next event.
struct Found {
    seq: u64,
    row: WaitingRow,
    work: WorkRow,
}

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
    pub thread: Arc<str>,
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
    pub heads: HashMap<Arc<str>, Head>,
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
    /// How many are held of what is to be tried later.
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
        if revision(&row) != revision(&self.row) {
            self.index = Index::Unknown;
            self.scan = None;
            self.forget_heads();
            let kinds = row.iter().flat_map(|row| &row.kinds);
            self.kinds = kinds.map(|kind| kind.as_str().into()).collect();
        }
        self.row = row;
        Ok(())
    }

    /// Nothing is known of what waits. What is on its way stays on its way, and of what a worker has it is heard when it is over.
    fn forget_heads(&mut self) {
        let given = &self.given;
        self.heads.retain(|_, head| match head.state {
            State::Chosen(lease) | State::Leased { lease, .. } => given.contains_key(&lease),
            State::Ready | State::Later { .. } => false,
        });
        (self.later, self.due) = (0, None);
        self.bytes = self.heads.iter().map(|(thread, head)| head.bytes(thread)).sum();
        self.ready = Ready::default();
        let heads = &self.heads;
        self.timers.retain(|(_, thread)| heads.contains_key(thread));
    }

    /// Whether all its events are of this kind, but for those that were begun when it had others.
    pub fn has_only(&self, kind: &str) -> bool {
        matches!(&*self.kinds, [only] if **only == *kind)
    }

    /// The index is complete: what waits is looked for from the beginning on, and what is held is looked at again.
    pub fn find_all(&mut self) {
        self.scan = Some(BEGIN);
        (self.scans_all, self.left_out, self.missed, self.due) = (true, None, false, None);
        self.due_walk = None;
    }

    /// Everything that is held is looked at again: something was missed.
    pub fn look_at_all(&mut self, store: &Store, now: u64) -> Result<Vec<Arrival>, StoreError> {
        self.reload(store)?;
        let mut arrivals = Vec::new();
        for thread in self.heads.keys().cloned().collect::<Vec<_>>() {
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
                    BEGIN
                })
            }
        };
        let (found, next) = store.waiting_threads(&self.tenant, &self.name, start.clone(), CHUNK)?;
        let mut left_out = false;
        for head in found {
            let thread: Arc<str> = head.thread.into();
            if !self.heads.contains_key(&thread) {
                let missed = std::mem::take(&mut self.missed);
                arrivals.extend(self.look_at(store, &thread, Why::Found, now)?);
                left_out |= self.missed && !self.heads.contains_key(&thread);
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

    /// Looks at a thread, and holds what is next there.
    pub fn look_at(
        &mut self,
        store: &Store,
        thread: &Arc<str>,
        why: Why,
        now: u64,
    ) -> Result<Vec<Arrival>, StoreError> {
        let mut arrivals = Vec::new();
        let Some(found) = self.find(store, thread)? else {
            if let Some(old) = self.remove(thread) {
                self.over(&old, None);
            }
            return Ok(arrivals);
        };
        let Found { seq, row, work } = found;
        let attempt = work
            .lease
            .as_ref()
            .map_or_else(|| work.failed.as_ref().map_or(0, |failed| failed.attempts) + 1, |lease| lease.attempt);
        let lease = work.lease.as_ref().map(|lease| Uuid::from_bytes(lease.id));
        let old = self.heads.get(thread);
        let is_same = old.is_some_and(|old| (old.seq, old.attempt, old.after) == (seq, attempt, work.cursor));
        if is_same && lease.is_none() && old.is_some_and(|old| !matches!(old.state, State::Leased { .. })) {
            // Nothing has changed: it is ready, or chosen, or to be tried later.
            return Ok(arrivals);
        }

        let old = self.remove(thread);
        let was_seq = old.as_ref().map(|old| old.seq);
        if let Some(old) = &old {
            self.over(old, lease);
        }
        // Names that are held already are not held twice.
        let kind = self.kinds.iter().find(|kind| ***kind == *row.kind).cloned();
        let mut head = Head {
            seq,
            kind: kind.unwrap_or_else(|| row.kind.as_str().into()),
            user: self.ready.user(&row.user).unwrap_or_else(|| row.user.as_str().into()),
            rank: rank(row.at, row.class),
            after: work.cursor,
            attempt,
            state: State::Ready,
            waiting: waiting(why, row.at, now, attempt, was_seq == Some(seq)),
            timer: None,
        };
        match (work.lease, work.failed) {
            (Some(LeaseRow { id, until, .. }), _) => {
                let lease = Uuid::from_bytes(id);
                if let Some(old) =
                    old.filter(|old| is_same && matches!(old.state, State::Chosen(_) | State::Leased { .. }))
                {
                    head.waiting = old.waiting;
                }
                head.state = State::Leased { lease, until };
                arrivals.extend(self.arrival(lease, thread));
            }
            (None, Some(FailedRow { not_before, .. })) if not_before > now => {
                head.state = State::Later { since: now, until: not_before };
            }
            (None, _) => head.waiting.is_ready(&self.holds, now),
        }
        self.insert(thread, head);
        Ok(arrivals)
    }

    /// What the store has of a thread's next event, if there is one.
    fn find(&self, store: &Store, thread: &str) -> Result<Option<Found>, StoreError> {
        let Some(group) = &self.row else { return Ok(None) };
        let work = store.work(&self.tenant, thread, &self.name)?.filter(|work| work.group_id == group.id);
        let work = work.unwrap_or_default();
        let leased = work.lease.as_ref().map(|lease| lease.seq);
        let failed = work.failed.as_ref().map(|failed| failed.seq);
        let begun = leased.or(failed).or(work.requeued.first().copied());
        let next = match begun {
            Some(seq) => self.row_of(store, thread, seq)?.map(|row| (seq, row)),
            None => store
                .next_waiting(&self.tenant, &self.name, thread, work.cursor, |row| group.wants(&row.kind, row.at))?,
        };
        Ok(next.map(|(seq, row)| Found { seq, row, work }))
    }

    /// What is known of an event that was begun, whether it is still wanted or not.
    fn row_of(&self, store: &Store, thread: &str, seq: u64) -> Result<Option<WaitingRow>, StoreError> {
        if let Some(row) = store.waiting(&self.tenant, &self.name, thread, seq)? {
            return Ok(Some(row));
        }
        let event = store.event(&self.tenant, thread, seq)?;
        Ok(event.and_then(|event| waiting_row(&event.frame, event.class as u8)))
    }

    /// A lease that was asked for here is in the log: who gets it, if it has not arrived before.
    fn arrival(&mut self, lease: Uuid, thread: &Arc<str>) -> Option<Arrival> {
        if self.abandoned.remove(&lease) {
            return Some(Arrival { lease, worker: None, thread: thread.clone() });
        }
        let given = self.given.get_mut(&lease)?;
        if std::mem::replace(&mut given.arrived, true) {
            return None;
        }
        Some(Arrival { lease, worker: Some(given.worker), thread: thread.clone() })
    }

    /// What was held is not so any more: if its lease is over, its worker may take more.
    fn over(&mut self, old: &Head, now_leased: Option<Uuid>) {
        if let State::Leased { lease, .. } = old.state
            && now_leased != Some(lease)
            && let Some(given) = self.given.remove(&lease)
        {
            self.workers.release(given.worker);
        }
    }

    // What is held.

    fn insert(&mut self, thread: &Arc<str>, mut head: Head) {
        let bytes = head.bytes(thread);
        if !self.make_room(&head, bytes) {
            self.leave_out(&head);
            return;
        }
        self.bytes += bytes;
        self.later += usize::from(head.is_later());
        match head.state {
            State::Ready => self.ready.insert(head.piece(thread, &self.kinds)),
            State::Later { until, .. } | State::Leased { until, .. } => head.timer = Some(until),
            State::Chosen(_) => {}
        }
        if let Some(at) = head.timer {
            self.timers.insert((at, thread.clone()));
        }
        self.heads.insert(thread.clone(), head);
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
            let thread = match (&head.state, others) {
                (State::Leased { .. }, _) => None,
                (_, Some((_, thread))) => Some(thread),
                // Whatever is tried again and again does not keep out what can be done now.
                (State::Ready, None) if is_mostly_later => self.last_to_try(),
                _ => None,
            };
            let Some(out) = thread.and_then(|thread| self.remove(&thread)) else { return false };
            self.leave_out(&out);
        }
        true
    }

    /// There is no room for a thread: it is looked for when there is, or when it is to be tried.
    fn leave_out(&mut self, head: &Head) {
        match head.state {
            // It is heard if another node's lease is over before.
            State::Later { until, .. } | State::Leased { until, .. } => {
                self.due = Some(self.due.map_or(until, |due| due.min(until)));
            }
            State::Ready | State::Chosen(_) => self.missed = true,
        }
    }

    fn is_mostly_later(&self) -> bool {
        self.later > self.heads.len() / 2
    }

    fn left_out_due(&self) -> Option<u64> {
        self.due.map(|due| due.max(self.due_not_before))
    }

    /// What is held and tried last.
    fn last_to_try(&self) -> Option<Arc<str>> {
        let is_later = |thread: &str| self.heads.get(thread).is_some_and(Head::is_later);
        self.timers.iter().rev().map(|(_, thread)| thread).find(|thread| is_later(thread)).cloned()
    }

    fn remove(&mut self, thread: &Arc<str>) -> Option<Head> {
        let head = self.heads.remove(thread)?;
        self.bytes -= head.bytes(thread);
        self.later -= usize::from(head.is_later());
        if head.state == State::Ready {
            self.ready.remove(head.piece(thread, &self.kinds));
        }
        if let Some(at) = head.timer {
            self.timers.remove(&(at, thread.clone()));
        }
        Some(head)
    }

    /// A lease is asked for.
    pub fn choose(&mut self, thread: &Arc<str>, lease: Uuid, now: u64) {
        if let Some(head) = self.heads.get_mut(thread) {
            self.ready.take(head.piece(thread, &self.kinds));
            head.state = State::Chosen(lease);
            head.waiting.is_chosen(&self.holds, now);
        }
    }

    /// The store has nothing that speaks against a lease that was asked for.
    pub fn is_chosen(&self, thread: &Arc<str>, lease: Uuid) -> bool {
        self.heads.get(thread).is_some_and(|head| head.state == State::Chosen(lease))
    }

    /// The lease that was asked for did not come to be: the event is ready again, at once or later.
    pub fn give_back(&mut self, thread: &Arc<str>, lease: Uuid, until: Option<u64>, now: u64) {
        let Some(head) = self.heads.get(thread).filter(|head| head.state == State::Chosen(lease)) else { return };
        debug_assert!(head.timer.is_none());
        if let Some(mut head) = self.remove(thread) {
            head.waiting.is_refused(&self.holds, now);
            head.state = State::Ready;
            if let Some(until) = until {
                head.state = State::Later { since: now, until };
            }
            self.insert(thread, head);
        }
    }

    /// Threads whose time has come; those that are leased are given, and looked at again at `again` unless they change.
    pub fn due(&mut self, now: u64, again: impl Fn() -> u64) -> Vec<(Uuid, Arc<str>)> {
        let mut over = Vec::new();
        while let Some((at, thread)) = self.timers.first().cloned()
            && at <= now
        {
            self.timers.pop_first();
            let Some(head) = self.heads.get_mut(&thread) else { continue };
            head.timer = None;
            match head.state {
                State::Later { since, .. } => {
                    head.waiting.before.backoff_ms += now.saturating_sub(since);
                    head.waiting.is_ready(&self.holds, now);
                    head.state = State::Ready;
                    self.later -= 1;
                    self.ready.insert(head.piece(&thread, &self.kinds));
                }
                State::Leased { lease, until } if until <= now => {
                    over.push((lease, thread.clone()));
                    let at = again();
                    head.timer = Some(at);
                    self.timers.insert((at, thread));
                }
                State::Leased { .. } | State::Ready | State::Chosen(_) => {}
            }
        }
        over
    }

    /// When something is due next; milliseconds.
    pub fn next_due(&self, now: u64) -> Option<u64> {
        let left_out = self.left_out_due().filter(|due| *due > now);
        self.timers.first().map(|(at, _)| *at).into_iter().chain(left_out).min()
    }
}

/// A lease that is in the log.
pub struct Arrival {
    pub lease: Uuid,
    /// None if nobody waits for it any more.
    pub worker: Option<u64>,
    pub thread: Arc<str>,
}

#[cfg(test)]
mod tests;
