//! What a node sees to for every group, whether it has workers of it or not, on one thread:
//!
//! - that it is counted how much waits: the index is completed and walked once for each revision of a group's settings;
//! - that a group which is to make dead letters of what is beyond its limit does so. It is the count that says so, so the
//!   records are a node's opinion, and the log takes the first about each event. Nodes choose by the same order, wait for
//!   what they wrote before, and begin at different moments: so they seldom write the same, and what they drop too much is no
//!   more than what they have not seen of each other. At most [`ROUND`] records a tick, in which all groups have their share;
//! - that leases end which nobody ends: where no node has workers of a group, nothing changes there, and after a while all
//!   look whether the leases that it has are over.
//!
//! What is read and held for that is bounded for all groups together: a tick in which much was read ends early, and the next one
//! begins with another group.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::index;
use crate::ingest::submit::Submit;
use crate::log::{Append, Record};
use crate::projector::{Status, Verdict};
use crate::protocol::kinds::WORK_OVERFLOWED;
use crate::protocol::work::{Overflow, Settlement, WorkOverflowedRecord};
use crate::store::{Depth, GroupDepth, GroupRow, Store, StoreError, WaitingStart};
use crate::{clock, panics, telemetry};

const TICK: Duration = Duration::from_millis(200);
/// How many records this node writes in a tick to make room.
const ROUND: usize = 200;
/// A node begins to make room within so long, so that nodes seldom do at once.
const BEGINS_WITHIN_MS: f64 = 400.0;
/// How many events that could make room are kept of walks over what waits, of all groups.
const KEPT: usize = 20_000;
/// A walk is good for so many times what it took, and for a tick at least.
const GOOD_FOR: u32 = 20;
/// Leases of a group in which nothing has changed for so long are looked at.
const SILENT_MS: u64 = 2_000;
/// A lease that was ended is looked at again after so long, should that not have counted.
const AGAIN_MS: u64 = 1_000;
/// After a store that failed it is asked again after so long.
const AFTER_ERROR: Duration = Duration::from_secs(5);
/// Threads that are read at once.
const CHUNK: usize = 500;

/// Wakes the thread, and ends it.
#[derive(Default)]
pub struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: bool,
    closed: bool,
}

impl Bell {
    pub fn ring(&self) {
        self.set(|state| state.rung = true);
    }

    pub fn close(&self) {
        self.set(|state| state.closed = true);
    }

    fn set(&self, change: impl FnOnce(&mut BellState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.rung.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed
    }

    /// Waits for a tick, or until it is rung; `false` when it is closed.
    fn wait(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.rung.wait_timeout_while(state, TICK, |state| !state.rung && !state.closed);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.rung = false;
        !state.closed
    }
}

pub fn start(
    store: Arc<Store>,
    submit: Arc<Submit>,
    projector: Arc<Status>,
    bell: Arc<Bell>,
) -> Result<std::thread::JoinHandle<()>, std::io::Error> {
    let watch = Watch {
        store,
        submit,
        projector,
        bell,
        rests_until: None,
        turn: 0,
        shedding: HashMap::new(),
        leases_at: HashMap::new(),
    };
    std::thread::Builder::new().name("work-watch".into()).spawn(move || watch.run())
}

/// A group's id: what was made anew under its name is another group.
type GroupId = [u8; 16];

struct Watch {
    store: Arc<Store>,
    submit: Arc<Submit>,
    projector: Arc<Status>,
    bell: Arc<Bell>,
    /// After an error: when it goes on.
    rests_until: Option<Instant>,
    /// Which of the groups that are full makes room first.
    turn: usize,
    /// Groups that make room.
    shedding: HashMap<GroupId, Shedding>,
    /// When leases are looked at next; milliseconds.
    leases_at: HashMap<GroupId, u64>,
}

struct Shedding {
    begins_at: u64,
    /// What is to go next, at the end; and until when that is good.
    victims: Vec<Victim>,
    good_until: Instant,
    /// Records that have no verdict yet.
    under_way: Arc<AtomicUsize>,
}

/// An event that could make room. The greater goes first: of the lowest priority, and then the oldest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Victim {
    class: u8,
    at: Reverse<u64>,
    thread: String,
    seq: Reverse<u64>,
    after: u64,
    kind: String,
}

impl Watch {
    fn run(mut self) {
        let _vital = panics::abort_on_panic("the watch over work");
        while self.bell.wait() {
            // Until then what seems to wait may be done long since.
            if !self.projector.caught_up() || self.rests_until.is_some_and(|until| Instant::now() < until) {
                continue;
            }
            self.rests_until = None;
            self.tick();
        }
    }

    /// Looks at all groups once, and sees to those that need it.
    fn tick(&mut self) {
        let now = clock::now_ms();
        let (mut waiting, mut overflowing) = (0, 0);
        let groups = self.store.depths(|row, depth, changed_at| {
            let Some(depth) = depth else { return true };
            waiting += depth.waiting();
            overflowing += usize::from(depth.overflowing);
            too_many(row, depth) > 0 || is_silent(depth, changed_at, now)
        });
        telemetry::work_waiting().set(waiting as f64);
        telemetry::groups_overflowing().set(overflowing as f64);

        let mut batch = Vec::new();
        self.shed_all(&groups, now, &mut batch);
        self.end_all_leases(&groups, now, &mut batch);
        if !batch.is_empty() {
            self.submit.send(batch);
        }
        self.count(&groups);
    }

    /// What failed for one group holds up no other, and is not tried again at once.
    fn rest(&mut self, group: &GroupDepth, error: &StoreError) {
        tracing::warn!(%error, group = group.group, "what waits for a group cannot be looked at");
        self.rests_until = Some(Instant::now() + AFTER_ERROR);
    }

    /// Counts what is not counted yet: of much a part, and the rest after what is urgent has been seen to again.
    fn count(&mut self, groups: &[GroupDepth]) {
        let began = Instant::now();
        for it in groups.iter().filter(|it| it.depth.is_none()) {
            let GroupDepth { tenant, group, row, .. } = it;
            // The server waits for this thread when it stops.
            let goes_on = || !self.bell.is_closed();
            // One that was changed meanwhile is counted as what it is then.
            let counted = index::complete(&self.store, tenant, group, row, &goes_on)
                .and_then(|complete| Ok(complete && self.store.count_depth(tenant, group, row, &goes_on)?));
            if let Err(error) = counted {
                self.rest(it, &error);
            }
            // What was counted may need something at once.
            self.bell.ring();
            if began.elapsed() >= TICK {
                break;
            }
        }
    }

    // Room in groups that are full.

    fn shed_all(&mut self, groups: &[GroupDepth], now: u64, batch: &mut Vec<Append>) {
        let full = groups.iter().filter_map(|it| Some((it, it.depth.map(|depth| too_many(&it.row, depth))?)));
        let mut full: Vec<(&GroupDepth, u64)> = full.filter(|(_, too_many)| *too_many > 0).collect();
        self.shedding.retain(|id, _| full.iter().any(|(group, _)| group.row.id == *id));
        if full.is_empty() {
            return;
        }
        let share = |all: usize| (all / full.len()).max(1);
        let (room, kept) = (share(ROUND), share(KEPT));
        let first = self.turn % full.len();
        full.rotate_left(first);
        let began = Instant::now();
        for (group, too_many) in full {
            if batch.len() + room > ROUND || began.elapsed() >= TICK {
                break;
            }
            self.turn = self.turn.wrapping_add(1);
            let room = usize::try_from(too_many).unwrap_or(room).min(room);
            if let Err(error) = self.shed(group, (room, kept), now, batch) {
                self.rest(group, &error);
            }
        }
    }

    /// A round of a group's: so many that make room. Of one walk `kept` are kept.
    fn shed(
        &mut self,
        group: &GroupDepth,
        (room, kept): (usize, usize),
        now: u64,
        batch: &mut Vec<Append>,
    ) -> Result<(), StoreError> {
        let begins_at = now + (clock::random_share() * BEGINS_WITHIN_MS) as u64;
        let shedding = self.shedding.entry(group.row.id).or_insert_with(|| Shedding {
            begins_at,
            victims: Vec::new(),
            good_until: Instant::now(),
            under_way: Arc::default(),
        });
        // What was written is counted once it has its verdict.
        if now < shedding.begins_at || shedding.under_way.load(Ordering::Acquire) > 0 {
            return Ok(());
        }
        if shedding.victims.is_empty() || shedding.good_until <= Instant::now() {
            let began = Instant::now();
            shedding.victims = victims(&self.store, group, kept, &|| !self.bell.is_closed())?;
            shedding.good_until = Instant::now() + (began.elapsed() * GOOD_FOR).max(TICK);
        }
        let rest = shedding.victims.len().saturating_sub(room);
        for victim in shedding.victims.drain(rest..).rev() {
            let record = WorkOverflowedRecord {
                kind: WORK_OVERFLOWED.to_owned(),
                id: clock::event_id(),
                tenant: group.tenant.clone(),
                thread: victim.thread,
                group: group.group.clone(),
                group_id: Uuid::from_bytes(group.row.id),
                seq: victim.seq.0,
                event_kind: victim.kind,
                after: victim.after,
                limit: group.row.limit,
                at: clock::rfc3339(now),
            };
            let under_way = shedding.under_way.clone();
            under_way.fetch_add(1, Ordering::AcqRel);
            let count = move |verdict: Verdict| {
                if verdict.is_ok() {
                    telemetry::work_overflowed(Overflow::DeadLetter).increment(1);
                }
                under_way.fetch_sub(1, Ordering::AcqRel);
            };
            batch.push(self.submit.prepare_record(record.id, Record::from(&record), Box::new(count)));
        }
        Ok(())
    }

    // Leases that nobody ends.

    fn end_all_leases(&mut self, groups: &[GroupDepth], now: u64, batch: &mut Vec<Append>) {
        let silent = groups.iter().filter(|it| it.depth.is_some_and(|depth| is_silent(depth, it.changed_at, now)));
        let silent: Vec<&GroupDepth> = silent.collect();
        self.leases_at.retain(|id, _| silent.iter().any(|group| group.row.id == *id));
        for group in silent {
            if self.leases_at.get(&group.row.id).is_some_and(|at| *at > now) {
                continue;
            }
            match self.end_leases(group, now, batch) {
                Ok(next) => drop(self.leases_at.insert(group.row.id, next)),
                Err(error) => self.rest(group, &error),
            }
        }
    }

    /// Ends those that are over; says when the next one may be.
    fn end_leases(&self, group: &GroupDepth, now: u64, batch: &mut Vec<Append>) -> Result<u64, StoreError> {
        let (tenant, name) = (&*group.tenant, &*group.group);
        let in_flight = group.depth.map_or(0, |depth| depth.in_flight);
        let (mut next, mut left, mut from) = (u64::MAX, in_flight, Some(WaitingStart::BEGIN));
        while let Some(start) = from.take().filter(|_| left > 0 && !self.bell.is_closed()) {
            let (heads, more) = self.store.waiting_threads(tenant, name, start, CHUNK)?;
            for head in heads {
                let work = self.store.work_of(tenant, &head.thread, name, &group.row.id)?;
                left = left.saturating_sub(work.leases.len() as u64);
                for lease in work.leases {
                    next = next.min(lease.until.max(now + AGAIN_MS));
                    if lease.until <= now && batch.len() < 2 * ROUND {
                        let place = (tenant, &*head.thread, name);
                        let record = super::ended(place, Uuid::from_bytes(lease.id), Settlement::Expired);
                        let append = self.submit.prepare_record(record.id, Record::from(&record), Box::new(drop));
                        batch.push(append);
                    }
                }
            }
            from = more;
        }
        // Each node a little later, so that they seldom write the same.
        Ok(next.saturating_add((clock::random_share() * BEGINS_WITHIN_MS) as u64))
    }
}

/// How many are too many in a group that makes dead letters of them.
fn too_many(row: &GroupRow, depth: Depth) -> u64 {
    if row.overflow == Overflow::DeadLetter { depth.waiting().saturating_sub(row.limit) } else { 0 }
}

/// Whether there are leases that perhaps nobody ends.
fn is_silent(depth: Depth, changed_at: u64, now: u64) -> bool {
    depth.in_flight > 0 && changed_at + SILENT_MS <= now
}

/// What could make room in a group, the first to go at the end.
fn victims(
    store: &Store,
    group: &GroupDepth,
    most: usize,
    goes_on: &dyn Fn() -> bool,
) -> Result<Vec<Victim>, StoreError> {
    let mut kept: BinaryHeap<Reverse<Victim>> = BinaryHeap::new();
    store.visit_waiting(&group.tenant, &group.group, &group.row, goes_on, |waiting| {
        if !waiting.is_new {
            return;
        }
        let (class, at, seq) = (waiting.row.class, Reverse(waiting.row.at), Reverse(waiting.seq));
        let victim = Victim {
            class,
            at,
            thread: waiting.thread.to_owned(),
            seq,
            after: waiting.after,
            kind: waiting.row.kind.clone(),
        };
        if kept.len() < most {
            kept.push(Reverse(victim));
        } else if kept.peek().is_some_and(|least| least.0 < victim) {
            kept.pop();
            kept.push(Reverse(victim));
        }
    })?;
    let mut victims: Vec<Victim> = kept.into_iter().map(|victim| victim.0).collect();
    victims.sort_unstable();
    Ok(victims)
}
