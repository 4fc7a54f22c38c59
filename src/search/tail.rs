//! What has come and is not in the index yet, in memory, and what of the index goes with it.
//!
//! Events are taken from the store in the order of their times, as far as each partition's order allows. Whoever searches takes
//! what is new first, so that what was acknowledged is found at once, whenever the index was last committed; the thread that
//! writes the index takes the rest. What is taken stays here until a view of the index is set that holds it: both change under
//! one lock, so no search finds an event twice or misses it in between.
//!
//! Under that lock the store is not read, no event is analysed, and nothing large is freed: the thread of the index has the lowest
//! priority, and who searches would wait for it. What was read without the lock is put here if nobody was faster.
//!
//! Invariants:
//! - of each partition all events up to the first one that is read ahead are in the view, in `waiting`, or hidden;
//! - `waiting` is bounded in events and bytes. Once it is full nothing is taken, and searches say up to when they are complete;
//! - events are hidden only while the index catches up with what is long past: they go to the writer and no longer wait here;
//! - a partition that cannot be read holds up no other one.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::document::Document;
use super::index::View;
use super::words::Stems;
use crate::panics;
use crate::store::{Arrival, Partition, Place, Store, StoreError};

/// Events read ahead of each partition at once.
const READ: usize = 64;
/// Events that wait, and about their bytes.
pub const MAX_WAITING: usize = 20_000;

/// An event that is not in the index yet.
pub struct Waiting {
    /// In the order in which they were taken.
    pub number: u64,
    pub partition: u32,
    pub place: Place,
    pub document: Document,
    /// About what it takes in memory.
    pub bytes: usize,
}

/// What has come, and what it is taken from.
pub struct Tail {
    store: Arc<Store>,
    stems: Stems,
    state: Mutex<State>,
}

impl Tail {
    pub fn new(store: Arc<Store>, stems: Stems, room: usize) -> Tail {
        let state = State {
            store: store.clone(),
            room,
            partitions: Vec::new(),
            fronts: BTreeSet::new(),
            behind: BTreeSet::new(),
            failed: BTreeSet::new(),
            begun: 0,
            seen: None,
            number: 0,
            waiting: VecDeque::new(),
            by_tenant: HashMap::new(),
            bytes: 0,
            hidden: None,
            view: None,
        };
        Tail { store, stems, state: Mutex::new(state) }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that may panic is done under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up to so many events; says whether there are no more that can be read.
    pub fn take(&self, most: usize) -> bool {
        if self.lock().view.is_none() {
            return false;
        }
        self.look();
        let next = self.lock().next(most);
        let mut failed = Vec::new();
        for (partition, arrival) in next {
            if failed.contains(&partition) || !self.lock().wants(partition, arrival.place) {
                continue;
            }
            match read_document(&self.store, &self.stems, &arrival) {
                Ok(document) => {
                    let bytes = document.bytes();
                    let refused = self.lock().put(partition, arrival.place, document, bytes);
                    // Freed without the lock.
                    drop(refused);
                }
                Err(error) => {
                    self.fail(partition, &error);
                    failed.push(partition);
                }
            }
        }
        self.lock().is_level()
    }

    /// Reads ahead in the partitions that have something new.
    fn look(&self) {
        loop {
            let Some(Unread { begun, version, partitions }) = self.lock().unread() else { return };
            let mut is_all = true;
            for (partition, after) in partitions {
                let seen = self.store.arrivals_version_of(Partition::new(partition));
                match self.store.arrivals(Partition::new(partition), after, READ) {
                    Ok(found) => is_all &= self.lock().read_ahead(partition, after, seen, found),
                    Err(error) => self.fail(partition, &error),
                }
            }
            if is_all && self.lock().looked(begun, version) {
                return;
            }
        }
    }

    fn fail(&self, partition: u32, error: &StoreError) {
        if self.lock().fail(partition) {
            tracing::warn!(partition, %error, "events cannot be read: until they can, search does without those of their partition");
        }
    }
}

/// What waits, and what is known of the store.
pub struct State {
    store: Arc<Store>,
    /// About how many bytes may wait.
    room: usize,
    partitions: Vec<Ahead>,
    /// Of each partition with something read ahead, the time of the first.
    fronts: BTreeSet<(u64, u32)>,
    /// Of each partition that has more than was read ahead, all of which was taken, the time of the last.
    behind: BTreeSet<(u64, u32)>,
    /// The same of those that could not be read when that was last tried.
    failed: BTreeSet<(u64, u32)>,
    /// How often it began where an index stands.
    pub begun: u64,
    /// The version of the store's arrivals when partitions were last looked at.
    seen: Option<u64>,
    number: u64,
    waiting: VecDeque<Arc<Waiting>>,
    by_tenant: HashMap<String, VecDeque<Arc<Waiting>>>,
    bytes: usize,
    /// From when on events are hidden, if some are.
    hidden: Option<u64>,
    /// What is in the index; nothing until it is open.
    pub view: Option<Arc<View>>,
}

/// What was read ahead of a partition.
#[derive(Default)]
struct Ahead {
    /// The last event that was read.
    read: Option<Place>,
    events: VecDeque<Arrival>,
    /// The time of the last event that was taken.
    at: u64,
    /// The version of its arrivals before it was last read; and whether there was more.
    seen: u64,
    more: bool,
    /// It could not be read, and that was said.
    is_failed: bool,
}

/// Where there may be more.
struct Unread {
    /// How often the tail had begun, and the version of the store's arrivals, before these were looked for.
    begun: u64,
    version: u64,
    /// With the last event that was read of each.
    partitions: Vec<(u32, Option<Place>)>,
}

/// What no longer waits, to be dropped once the lock is released.
#[must_use = "it is dropped without the lock"]
#[derive(Default)]
pub struct Removed {
    _waiting: Vec<Arc<Waiting>>,
    _view: Option<Arc<View>>,
}

/// What a search needs.
pub struct Snapshot {
    pub view: Arc<View>,
    /// Of the tenant.
    pub waiting: Vec<Arc<Waiting>>,
    /// Everything before this time is in one of both; nothing if everything is.
    pub missing_from: Option<u64>,
}

impl State {
    /// Begins where an index stands.
    pub fn begin(&mut self, places: &[Option<Place>], view: Arc<View>) -> Removed {
        let partitions = places.iter().map(|place| Ahead { read: *place, ..Ahead::default() });
        self.partitions = partitions.collect();
        self.fronts.clear();
        self.behind.clear();
        self.failed.clear();
        let removed = self.set_view(view, self.number);
        self.seen = None;
        self.begun += 1;
        removed
    }

    /// The partitions in which there may be more; nothing if there are none.
    fn unread(&mut self) -> Option<Unread> {
        let version = self.store.arrivals_version();
        if self.seen == Some(version) && self.behind.is_empty() && self.failed.is_empty() {
            return None;
        }
        // What was read ahead and could not be taken is tried again.
        let is_read = |(_, partition): &(u64, u32)| !self.partitions[*partition as usize].events.is_empty();
        let (mut again, unread) = std::mem::take(&mut self.failed).into_iter().partition(is_read);
        self.fronts.append(&mut again);
        self.failed = unread;
        let partitions = (0..).zip(&self.partitions);
        let unread =
            partitions.filter(|(partition, ahead)| ahead.events.is_empty() && self.has_more(*partition, ahead));
        let partitions = unread.map(|(partition, ahead)| (partition, ahead.read)).collect();
        Some(Unread { begun: self.begun, version, partitions })
    }

    /// All that was unread at this version was read; says whether it was of the index that is open now.
    fn looked(&mut self, begun: u64, version: u64) -> bool {
        if begun == self.begun {
            self.seen = Some(version);
        }
        begun == self.begun
    }

    fn has_more(&self, partition: u32, ahead: &Ahead) -> bool {
        ahead.more || ahead.seen != self.store.arrivals_version_of(Partition::new(partition))
    }

    /// Adds what was read of a partition after a place, unless somebody was faster; says whether it was added.
    fn read_ahead(&mut self, partition: u32, after: Option<Place>, seen: u64, found: Vec<Arrival>) -> bool {
        let Some(ahead) = self.partitions.get_mut(partition as usize) else { return false };
        if !ahead.events.is_empty() || ahead.read != after {
            return false;
        }
        self.behind.remove(&(ahead.at, partition));
        self.failed.remove(&(ahead.at, partition));
        (ahead.seen, ahead.more, ahead.is_failed) = (seen, found.len() == READ, false);
        if let (Some(first), Some(last)) = (found.first(), found.last()) {
            self.fronts.insert((first.at, partition));
            ahead.read = Some(last.place);
            ahead.events.extend(found);
        }
        true
    }

    /// A partition cannot be read now; says whether that is new.
    fn fail(&mut self, partition: u32) -> bool {
        let Some(ahead) = self.partitions.get_mut(partition as usize) else { return false };
        let front = (ahead.events.front().map_or(ahead.at, |front| front.at), partition);
        self.fronts.remove(&front);
        self.behind.remove(&front);
        self.failed.insert(front);
        !std::mem::replace(&mut ahead.is_failed, true)
    }

    /// The next events in the order of their times, as far as it is known.
    fn next(&self, most: usize) -> Vec<(u32, Arrival)> {
        let mut fronts: BinaryHeap<_> =
            self.fronts.iter().map(|(at, partition)| Reverse((*at, *partition, 0))).collect();
        let mut next = Vec::new();
        while next.len() < most
            && let Some(Reverse((_, partition, n))) = fronts.pop()
        {
            let ahead = &self.partitions[partition as usize];
            next.extend(ahead.events.get(n).map(|arrival| (partition, arrival.clone())));
            match ahead.events.get(n + 1) {
                Some(after) => fronts.push(Reverse((after.at, partition, n + 1))),
                // What comes after it may be older than what others have.
                None if self.has_more(partition, ahead) => break,
                None => {}
            }
        }
        next
    }

    /// Whether this is the next event of the partition, and there is room for it.
    fn wants(&self, partition: u32, place: Place) -> bool {
        let ahead = self.partitions.get(partition as usize);
        !self.is_full() && ahead.and_then(|ahead| ahead.events.front()).is_some_and(|front| front.place == place)
    }

    /// Takes an event that was analysed; gives it back if somebody was faster.
    fn put(&mut self, partition: u32, place: Place, document: Document, bytes: usize) -> Option<Document> {
        if !self.wants(partition, place) {
            return Some(document);
        }
        let ahead = &mut self.partitions[partition as usize];
        let Some(Arrival { at, .. }) = ahead.events.pop_front() else { return Some(document) };
        self.fronts.remove(&(at, partition));
        self.failed.remove(&(at, partition));
        (ahead.at, ahead.is_failed) = (at, false);
        let next = ahead.events.front().map(|next| next.at);
        match next {
            Some(next) => drop(self.fronts.insert((next, partition))),
            None if self.has_more(partition, &self.partitions[partition as usize]) => {
                self.behind.insert((at, partition));
            }
            None => {}
        }
        self.number += 1;
        self.wait(Waiting { number: self.number, partition, place, document, bytes });
        None
    }

    fn wait(&mut self, waiting: Waiting) {
        self.bytes += waiting.bytes;
        let waiting = Arc::new(waiting);
        let tenant = &waiting.document.tenant;
        match self.by_tenant.get_mut(tenant) {
            Some(of_tenant) => of_tenant.push_back(waiting.clone()),
            None => drop(self.by_tenant.insert(tenant.clone(), VecDeque::from([waiting.clone()]))),
        }
        self.waiting.push_back(waiting);
    }

    /// Whether all that can be read and was there at the last look is taken.
    fn is_level(&self) -> bool {
        self.seen.is_some() && self.fronts.is_empty() && self.behind.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING || self.bytes >= self.room
    }

    /// How many events wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The time of the oldest event that was not taken, as far as is known.
    pub fn front(&self) -> Option<u64> {
        self.fronts.first().map(|(at, _)| *at)
    }

    /// The number of the last event that was taken.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// From when on something is not found yet, if that is so.
    pub fn missing_from(&self) -> Option<u64> {
        let firsts = [&self.fronts, &self.behind, &self.failed].map(BTreeSet::first);
        firsts.into_iter().flatten().map(|(at, _)| *at).chain(self.hidden).min()
    }

    /// So much of what waits after this number.
    pub fn after(&self, number: u64, most: usize) -> Vec<Arc<Waiting>> {
        let begin = self.waiting.partition_point(|waiting| waiting.number <= number);
        self.waiting.range(begin..).take(most).cloned().collect()
    }

    /// The index holds everything up to this number.
    pub fn set_view(&mut self, view: Arc<View>, number: u64) -> Removed {
        self.hidden = None;
        Removed { _waiting: self.remove_to(number), _view: self.view.replace(view) }
    }

    /// The same events in other segments.
    pub fn replace_view(&mut self, view: Arc<View>) -> Removed {
        Removed { _view: self.view.replace(view), ..Removed::default() }
    }

    /// Everything up to this number is on its way to the index, and is not found until it is there.
    pub fn hide(&mut self, number: u64) -> Removed {
        if let Some(first) = self.waiting.front().filter(|first| first.number <= number) {
            let at = first.document.at;
            self.hidden = Some(self.hidden.map_or(at, |hidden| hidden.min(at)));
        }
        Removed { _waiting: self.remove_to(number), _view: None }
    }

    fn remove_to(&mut self, number: u64) -> Vec<Arc<Waiting>> {
        let end = self.waiting.partition_point(|waiting| waiting.number <= number);
        let removed: Vec<_> = self.waiting.drain(..end).collect();
        for waiting in &removed {
            self.bytes = self.bytes.saturating_sub(waiting.bytes);
            if let Some(of_tenant) = self.by_tenant.get_mut(&waiting.document.tenant) {
                of_tenant.pop_front();
                if of_tenant.is_empty() {
                    self.by_tenant.remove(&waiting.document.tenant);
                }
            }
        }
        removed
    }

    /// What a search of this tenant looks at, and whether that is all that can be read; nothing while there is no index, or
    /// nobody knows yet what it lacks.
    pub fn snapshot(&self, tenant: &str) -> Option<(Snapshot, bool)> {
        let view = self.view.clone().filter(|_| self.seen.is_some())?;
        let waiting = self.by_tenant.get(tenant).into_iter().flatten().cloned().collect();
        Some((Snapshot { view, waiting, missing_from: self.missing_from() }, self.is_level()))
    }
}

/// An event as it is searched; without words if its row is not there, or damaged: the store has noted that, and is made anew by
/// the next start.
fn read_document(store: &Store, stems: &Stems, arrival: &Arrival) -> Result<Document, StoreError> {
    let Arrival { place, at, tenant, thread } = arrival;
    let empty = || Document::empty(tenant, thread, *at);
    let event = match store.event(tenant, thread, place.seq) {
        Ok(Some(event)) => event,
        Ok(None) => {
            tracing::error!(thread, seq = place.seq, "an event is not in the store, and not searched");
            return Ok(empty());
        }
        Err(error) if error.is_damage() => {
            tracing::error!(thread, seq = place.seq, %error, "an event cannot be read, and is not searched");
            return Ok(empty());
        }
        Err(error) => return Err(error),
    };
    let read = || Document::new(tenant, thread, *at, &event.frame, stems);
    // A panic at one event's text costs that event: it is reported, and the others are searched.
    Ok(panics::caught(read).unwrap_or_else(|_| empty()))
}
