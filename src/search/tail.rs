//! What has come and is not in the index yet, in memory, and what of the index goes with it.
//!
//! Events are taken from the store in the order of their times, as far as each partition's order allows. Whoever searches takes
//! what is new first, so that what was acknowledged is found at once, whenever the index was last committed; the thread that
//! writes the index takes the rest. What is taken stays here until a view of the index is set that holds it: both change under
//! one lock, so no search finds an event twice or misses it in between.
//!
//! Invariants:
//! - of each partition all events up to `taken` are in the view, in `waiting`, or hidden;
//! - `waiting` is bounded in events and bytes. Once it is full nothing is taken, and searches say up to when they are complete;
//! - events are hidden only while the index catches up with what is long past: they go to the writer and no longer wait here.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

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
}

pub struct Tail {
    store: Arc<Store>,
    stems: Stems,
    /// About how many bytes may wait.
    room: usize,
    partitions: Vec<Ahead>,
    /// Of each partition with something read ahead, the time of the first.
    fronts: BTreeSet<(u64, u32)>,
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
    /// The last event that was taken, and the last one that was read.
    taken: Option<Place>,
    read: Option<Place>,
    events: VecDeque<Arrival>,
    /// The version of its arrivals before it was last read; and whether there was more.
    seen: u64,
    more: bool,
}

/// What a search needs.
pub struct Snapshot {
    pub view: Arc<View>,
    /// Of the tenant.
    pub waiting: Vec<Arc<Waiting>>,
    /// Everything before this time is in one of both; nothing if everything is.
    pub missing_from: Option<u64>,
}

impl Tail {
    pub fn new(store: Arc<Store>, stems: Stems, room: usize) -> Tail {
        Tail {
            store,
            stems,
            room,
            partitions: Vec::new(),
            fronts: BTreeSet::new(),
            seen: None,
            number: 0,
            waiting: VecDeque::new(),
            by_tenant: HashMap::new(),
            bytes: 0,
            hidden: None,
            view: None,
        }
    }

    /// Begins where an index stands.
    pub fn begin(&mut self, places: &[Option<Place>], view: Arc<View>) {
        let partitions = places.iter().map(|place| Ahead { taken: *place, read: *place, ..Ahead::default() });
        self.partitions = partitions.collect();
        self.fronts.clear();
        self.waiting.clear();
        self.by_tenant.clear();
        (self.seen, self.bytes, self.hidden, self.view) = (None, 0, None, Some(view));
    }

    /// Takes up to so many events; says whether there are no more.
    pub fn take(&mut self, most: usize) -> Result<bool, StoreError> {
        if self.view.is_none() {
            return Ok(false);
        }
        self.look()?;
        for _ in 0..most {
            if self.is_full() {
                break;
            }
            let Some((at, partition)) = self.fronts.pop_first() else { break };
            if let Err(error) = self.take_from(partition) {
                self.fronts.insert((at, partition));
                return Err(error);
            }
        }
        Ok(self.fronts.is_empty())
    }

    /// Reads ahead in the partitions that have something new.
    fn look(&mut self) -> Result<(), StoreError> {
        let version = self.store.arrivals_version();
        if self.seen == Some(version) {
            return Ok(());
        }
        for partition in 0..self.partitions.len() as u32 {
            let ahead = &self.partitions[partition as usize];
            if ahead.events.is_empty() && ahead.seen != self.store.arrivals_version_of(Partition::new(partition)) {
                self.read(partition)?;
            }
        }
        self.seen = Some(version);
        Ok(())
    }

    fn read(&mut self, partition: u32) -> Result<(), StoreError> {
        let ahead = &mut self.partitions[partition as usize];
        let seen = self.store.arrivals_version_of(Partition::new(partition));
        let found = self.store.arrivals(Partition::new(partition), ahead.read, READ)?;
        (ahead.seen, ahead.more) = (seen, found.len() == READ);
        if let (Some(first), Some(last)) = (found.first(), found.last()) {
            self.fronts.insert((first.at, partition));
            ahead.read = Some(last.place);
            ahead.events.extend(found);
        }
        Ok(())
    }

    fn take_from(&mut self, partition: u32) -> Result<(), StoreError> {
        let ahead = &mut self.partitions[partition as usize];
        let Some(arrival) = ahead.events.front() else { return Ok(()) };
        let Arrival { place, at, ref tenant, ref thread } = *arrival;
        let document = read_document(&self.store, &self.stems, arrival)?;
        let document = document.unwrap_or_else(|| Document::empty(tenant, thread, place.seq, at));
        ahead.taken = Some(place);
        ahead.events.pop_front();
        self.wait(partition, place, document);

        let ahead = &self.partitions[partition as usize];
        match ahead.events.front() {
            Some(next) => drop(self.fronts.insert((next.at, partition))),
            None if ahead.more || ahead.seen != self.store.arrivals_version_of(Partition::new(partition)) => {
                self.read(partition)?;
            }
            None => {}
        }
        Ok(())
    }

    fn wait(&mut self, partition: u32, place: Place, document: Document) {
        self.number += 1;
        self.bytes += document.bytes();
        let waiting = Arc::new(Waiting { number: self.number, partition, place, document });
        let tenant = &waiting.document.tenant;
        match self.by_tenant.get_mut(tenant) {
            Some(of_tenant) => of_tenant.push_back(waiting.clone()),
            None => drop(self.by_tenant.insert(tenant.clone(), VecDeque::from([waiting.clone()]))),
        }
        self.waiting.push_back(waiting);
    }

    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING || self.bytes >= self.room
    }

    /// How many events wait, and about their bytes.
    pub fn size(&self) -> (usize, usize) {
        (self.waiting.len(), self.bytes)
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
        self.front().into_iter().chain(self.hidden).min()
    }

    /// What waits after this number.
    pub fn after(&self, number: u64) -> Vec<Arc<Waiting>> {
        let begin = self.waiting.partition_point(|waiting| waiting.number <= number);
        self.waiting.range(begin..).cloned().collect()
    }

    /// The index holds everything up to this number.
    pub fn set_view(&mut self, view: Arc<View>, number: u64) {
        self.drop_to(number);
        self.hidden = None;
        self.view = Some(view);
    }

    /// The same events in other segments.
    pub fn replace_view(&mut self, view: Arc<View>) {
        self.view = Some(view);
    }

    /// Everything up to this number is on its way to the index, and is not found until it is there.
    pub fn hide(&mut self, number: u64) {
        if let Some(first) = self.waiting.front().filter(|first| first.number <= number) {
            let at = first.document.at;
            self.hidden = Some(self.hidden.map_or(at, |hidden| hidden.min(at)));
            self.drop_to(number);
        }
    }

    fn drop_to(&mut self, number: u64) {
        while let Some(first) = self.waiting.front()
            && first.number <= number
        {
            self.bytes = self.bytes.saturating_sub(first.document.bytes());
            if let Some(of_tenant) = self.by_tenant.get_mut(&first.document.tenant) {
                of_tenant.pop_front();
                if of_tenant.is_empty() {
                    self.by_tenant.remove(&first.document.tenant);
                }
            }
            self.waiting.pop_front();
        }
    }

    /// What a search of this tenant looks at; nothing while there is no index.
    pub fn snapshot(&self, tenant: &str) -> Option<Snapshot> {
        let view = self.view.clone()?;
        let waiting = self.by_tenant.get(tenant).into_iter().flatten().cloned().collect();
        Some(Snapshot { view, waiting, missing_from: self.missing_from() })
    }
}

/// An event as it is searched; nothing if its row is not there.
fn read_document(store: &Store, stems: &Stems, arrival: &Arrival) -> Result<Option<Document>, StoreError> {
    let Arrival { place, at, tenant, thread } = arrival;
    let Some(event) = store.event(tenant, thread, place.seq)? else {
        tracing::error!(thread, seq = place.seq, "an event is not in the store, and not searched");
        return Ok(None);
    };
    let read = || Document::new(tenant, thread, place.seq, *at, &event.frame, stems);
    // A panic at one event's text costs that event: it is reported, and the others are searched.
    Ok(panics::caught(read).ok())
}
