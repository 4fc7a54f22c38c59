//! How much waits for each group, counted in memory as commits change it.
//!
//! Each commit adds what it changes, and one walk over what waits says what there was before, as it is at one moment. So that
//! no commit falls between the two, the moment is taken while none is under way (`gate`). Walks may go on side by side: the
//! first that comes to its end counts. What waits depends on the group's settings: each revision of them is counted anew.
//!
//! A count is what this node knows, a hint and no verdict: other nodes are ahead of it or behind. It is exact, but for an event
//! that a group passes over which it once wanted: that stays counted until the next revision or start.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{IteratorMode, ReadOptions, Snapshot};

use super::catalogue::{WAITING, WORK};
use super::work::split_waiting;
use super::{GroupRow, Store, StoreError, WaitingRow, WorkChange, WorkRow, keys};
use crate::clock;
use crate::protocol::work::Overflow;

/// After so many rows a walk asks whether it is to go on.
const BETWEEN_ASKED: u64 = 1_000;

/// How much waits for a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Events that wait or are worked on.
    pub events: u64,
    /// How many of them are worked on.
    pub in_flight: u64,
    /// More wait than the group's limit says; or as many, and there is no room for the next.
    pub overflowing: bool,
}

impl Depth {
    fn new(events: i64, in_flight: i64, row: &GroupRow) -> Depth {
        let count = |n: i64| u64::try_from(n).unwrap_or(0);
        let (events, in_flight) = (count(events), count(in_flight));
        let waiting = events.saturating_sub(in_flight);
        let overflowing = waiting > row.limit || waiting == row.limit && row.overflow != Overflow::Accept;
        Depth { events, in_flight, overflowing }
    }

    /// How many wait and nobody works on them.
    pub fn waiting(&self) -> u64 {
        self.events.saturating_sub(self.in_flight)
    }
}

/// A group, and how much waits for it.
#[derive(Debug, Clone)]
pub struct GroupDepth {
    pub tenant: String,
    pub group: String,
    pub row: GroupRow,
    /// Nothing if that is not counted yet.
    pub depth: Option<Depth>,
    /// When something last changed there; milliseconds.
    pub changed_at: u64,
}

/// An event that waits for a group, or is worked on.
pub struct Waiting<'a> {
    pub thread: &'a str,
    pub seq: u64,
    /// Nothing between this seq and the event's is work that is not done.
    pub after: u64,
    pub row: &'a WaitingRow,
    /// How far the group is with the thread.
    pub work: &'a WorkRow,
    /// Nobody has begun it, now or before.
    pub is_new: bool,
}

struct Entry {
    row: GroupRow,
    /// Before that, the sums are of what has changed.
    counted: bool,
    events: i64,
    in_flight: i64,
    changed_at: u64,
}

impl Entry {
    fn new(row: GroupRow) -> Entry {
        Entry { row, counted: false, events: 0, in_flight: 0, changed_at: clock::now_ms() }
    }

    fn depth(&self) -> Option<Depth> {
        self.counted.then(|| Depth::new(self.events, self.in_flight, &self.row))
    }

    fn rejects(&self) -> bool {
        self.row.overflow == Overflow::Reject && self.depth().is_some_and(|depth| depth.overflowing)
    }
}

/// By tenant and group.
type Groups = HashMap<String, HashMap<String, Entry>>;

#[derive(Default)]
pub(super) struct Depths {
    /// Held by each commit that changes what waits, until it is counted; alone, by who begins to count.
    gate: RwLock<()>,
    groups: Mutex<Groups>,
    /// By tenant, the groups that take no more, and their kinds.
    rejecting: RwLock<HashMap<String, HashMap<String, Vec<String>>>>,
    /// How many tenants have some: most of the time none, and then nothing else is asked.
    any_rejecting: AtomicUsize,
}

impl Depths {
    /// While this is held, no count begins.
    pub(super) fn committing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        // No section below can panic half way through a change.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reject(&self, tenant: &str, group: &str, kinds: Option<&[String]>) {
        let mut rejecting = self.rejecting.write().unwrap_or_else(PoisonError::into_inner);
        match kinds {
            Some(kinds) => drop(rejecting.entry(tenant.into()).or_default().insert(group.into(), kinds.to_vec())),
            None => {
                if let Some(groups) = rejecting.get_mut(tenant) {
                    groups.remove(group);
                    if groups.is_empty() {
                        rejecting.remove(tenant);
                    }
                }
            }
        }
        self.any_rejecting.store(rejecting.len(), Ordering::Release);
    }

    /// Changes an entry, and what is refused because of it.
    fn change(&self, groups: &mut Groups, tenant: &str, group: &str, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = groups.get_mut(tenant).and_then(|groups| groups.get_mut(group)) else { return };
        let before = entry.rejects();
        change(entry);
        // Its kinds may be others.
        if entry.rejects() || before {
            self.reject(tenant, group, entry.rejects().then_some(&entry.row.kinds[..]));
        }
    }

    fn set(&self, groups: &mut Groups, tenant: &str, group: &str, row: Option<GroupRow>) {
        let Some(row) = row else {
            self.change(groups, tenant, group, |entry| entry.counted = false);
            if let Some(of_tenant) = groups.get_mut(tenant) {
                of_tenant.remove(group);
                if of_tenant.is_empty() {
                    groups.remove(tenant);
                }
            }
            return;
        };
        groups.entry(tenant.into()).or_default().entry(group.into()).or_insert_with(|| Entry::new(row.clone()));
        self.change(groups, tenant, group, |entry| {
            if (entry.row.id, entry.row.revision) == (row.id, row.revision) {
                entry.row = row;
            } else {
                *entry = Entry::new(row);
            }
        });
    }
}

impl Store {
    /// From now on it is known which groups there are.
    pub(super) fn begin_depths(&self) -> Result<(), StoreError> {
        let _alone = self.depths.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut groups = self.depths.groups();
        for row in self.all_groups() {
            let (tenant, group, row) = row?;
            self.depths.set(&mut groups, &tenant, &group, Some(row));
        }
        Ok(())
    }

    /// Counts what a commit has changed.
    pub(super) fn count_changes(&self, changes: &[WorkChange]) {
        let now = clock::now_ms();
        let mut groups = self.depths.groups();
        for change in changes {
            match change {
                WorkChange::Group { tenant, group } => {
                    // A store that cannot be read is known to be damaged, and made anew.
                    if let Ok(row) = self.group(tenant, group) {
                        self.depths.set(&mut groups, tenant, group, row);
                    }
                }
                WorkChange::Waiting { tenant, group, .. } => self.depths.change(&mut groups, tenant, group, |entry| {
                    (entry.events, entry.changed_at) = (entry.events + 1, now);
                }),
                WorkChange::Work { tenant, group, group_id, events, in_flight, .. } => {
                    self.depths.change(&mut groups, tenant, group, |entry| {
                        if entry.row.id == *group_id {
                            entry.events += events;
                            entry.in_flight += in_flight;
                            entry.changed_at = now;
                        }
                    });
                }
            }
        }
    }

    /// How much waits for a group, if that is counted.
    pub fn depth(&self, tenant: &str, group: &str) -> Option<Depth> {
        self.depths.groups().get(tenant)?.get(group)?.depth()
    }

    /// The groups for which `wanted` holds, of settings, depth (if that is counted) and when something last changed
    /// (milliseconds). Commits wait while it looks.
    pub fn depths(&self, mut wanted: impl FnMut(&GroupRow, Option<Depth>, u64) -> bool) -> Vec<GroupDepth> {
        let groups = self.depths.groups();
        let all = groups.iter().flat_map(|(tenant, of_tenant)| of_tenant.iter().map(move |it| (tenant, it)));
        let found = all.filter_map(|(tenant, (group, entry))| {
            let (depth, changed_at) = (entry.depth(), entry.changed_at);
            wanted(&entry.row, depth, changed_at).then(|| GroupDepth {
                tenant: tenant.clone(),
                group: group.clone(),
                row: entry.row.clone(),
                depth,
                changed_at,
            })
        });
        found.collect()
    }

    /// How many events wait for all groups together, and how many groups are overflowing.
    pub fn all_depths(&self) -> (u64, usize) {
        let groups = self.depths.groups();
        let all = groups.values().flat_map(HashMap::values).filter_map(Entry::depth);
        all.fold((0, 0), |(waiting, full), depth| (waiting + depth.waiting(), full + usize::from(depth.overflowing)))
    }

    /// The group, if there is one, that has no room for an event of this kind.
    pub fn group_without_room(&self, tenant: &str, kind: &str) -> Option<String> {
        if self.depths.any_rejecting.load(Ordering::Acquire) == 0 {
            return None;
        }
        let rejecting = self.depths.rejecting.read().unwrap_or_else(PoisonError::into_inner);
        let mut groups = rejecting.get(tenant)?.iter();
        groups.find(|(_, kinds)| kinds.iter().any(|it| it == kind)).map(|(group, _)| group.clone())
    }

    /// Visits everything that waits for a group or is worked on, thread by thread and in order; `false` if it was to go on no
    /// more. It takes as long as there is much: off the runtime's workers.
    pub fn visit_waiting(
        &self,
        tenant: &str,
        group: &str,
        row: &GroupRow,
        goes_on: &dyn Fn() -> bool,
        visit: impl FnMut(&Waiting<'_>),
    ) -> Result<bool, StoreError> {
        self.visit_waiting_in(&self.db.snapshot(), (tenant, group), row, goes_on, visit)
    }

    fn visit_waiting_in(
        &self,
        snapshot: &Snapshot<'_>,
        (tenant, group): (&str, &str),
        row: &GroupRow,
        goes_on: &dyn Fn() -> bool,
        mut visit: impl FnMut(&Waiting<'_>),
    ) -> Result<bool, StoreError> {
        let mut rows = 0;
        for partition in self.partitions() {
            let prefix = keys::prefix(partition, &[tenant, group]);
            let mut options = ReadOptions::default();
            options.set_iterate_lower_bound(prefix.clone());
            options.set_iterate_upper_bound(keys::after(prefix.clone()));
            let (mut thread, mut work, mut after) = (String::new(), WorkRow::default(), 0);
            for item in snapshot.iterator_cf_opt(&self.family(WAITING), options, IteratorMode::Start) {
                let (key, value) = item.map_err(|error| self.note(error.into()))?;
                rows += 1;
                if rows % BETWEEN_ASKED == 0 && !goes_on() {
                    return Ok(false);
                }
                let Some((in_thread, seq)) = split_waiting(&key[prefix.len()..]) else { continue };
                let waits: WaitingRow = self.decoded(WAITING, &value)?;
                if in_thread != thread {
                    let key = keys::joined(partition, &[tenant, &in_thread, group]);
                    let value = snapshot.get_cf(&self.family(WORK), key).map_err(|error| self.note(error.into()))?;
                    let found = value.map(|value| self.decoded::<WorkRow>(WORK, &value)).transpose()?;
                    work = found.filter(|work| work.group_id == row.id).unwrap_or_default();
                    (thread, after) = (in_thread, work.cursor);
                }
                let is_begun = work.is_begun(seq);
                let is_new = !is_begun && !work.is_past(seq) && row.wants(&waits.kind, waits.at);
                if is_new || is_begun || work.requeued.contains(&seq) {
                    visit(&Waiting { thread: &thread, seq, after, row: &waits, work: &work, is_new });
                    after = after.max(seq);
                }
            }
        }
        Ok(true)
    }

    /// Counts what waits for a group whose index is complete; `false` if its settings changed meanwhile, or it was to go on no
    /// more. It takes as long as there is much: off the runtime's workers.
    pub fn count_depth(
        &self,
        tenant: &str,
        group: &str,
        row: &GroupRow,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<bool, StoreError> {
        let is_this = |entry: &Entry| (entry.row.id, entry.row.revision) == (row.id, row.revision);
        let (snapshot, before) = {
            let _alone = self.depths.gate.write().unwrap_or_else(PoisonError::into_inner);
            let groups = self.depths.groups();
            let entry = groups.get(tenant).and_then(|groups| groups.get(group));
            match entry.filter(|entry| is_this(entry)) {
                None => return Ok(false),
                Some(entry) if entry.counted => return Ok(true),
                Some(entry) => (self.db.snapshot(), (entry.events, entry.in_flight)),
            }
        };

        let (mut events, mut in_flight, mut last) = (0, 0, None);
        let is_whole = self.visit_waiting_in(&snapshot, (tenant, group), row, goes_on, |waiting| {
            events += 1;
            if last.as_deref() != Some(waiting.thread) {
                in_flight += waiting.work.leases.len() as i64;
                last = Some(waiting.thread.to_owned());
            }
        })?;
        drop(snapshot);
        let mut counted = false;
        self.depths.change(&mut self.depths.groups(), tenant, group, |entry| {
            if is_whole && is_this(entry) && !entry.counted {
                entry.events += events - before.0;
                entry.in_flight += in_flight - before.1;
                (entry.counted, entry.changed_at) = (true, clock::now_ms());
            }
            counted = is_this(entry) && entry.counted;
        });
        Ok(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseRow;

    const ID: [u8; 16] = [1; 16];

    fn group(limit: u64, overflow: Overflow) -> GroupRow {
        GroupRow { limit, overflow, ..GroupRow::of_tests() }
    }

    fn put_group(store: &Store, row: Option<&GroupRow>) {
        let mut rows = store.batch();
        match row {
            Some(row) => rows.put_group("acme", "g", row),
            None => rows.delete_group("acme", "g"),
        }
        store.commit(rows).expect("the store takes it");
    }

    fn arrive(store: &Store, seq: u64) {
        let mut rows = store.batch();
        let waits = WaitingRow { kind: "x.job".into(), user: "ada".into(), at: 1, class: 1 };
        rows.put_waiting("acme", "g", "t", seq, &waits);
        store.commit(rows).expect("the store takes it");
    }

    /// The thread's work goes from one row to the next.
    fn work(store: &Store, cursor: u64, leased: Option<u64>, past: usize) {
        let lease = |seq| LeaseRow {
            id: [2; 16],
            seq,
            after: seq - 1,
            kind: "x.job".into(),
            attempt: 1,
            attempts: 1,
            holder: "wim".into(),
            at: 1,
            until: 2,
        };
        let row =
            WorkRow { group_id: ID, cursor, leases: leased.map(lease).into_iter().collect(), ..WorkRow::default() };
        let was = store.work("acme", "t", "g").expect("it is read").unwrap_or_default();
        let mut rows = store.batch();
        rows.put_work(("acme", "t", "g"), &was, &row, past);
        if past > 0 {
            rows.delete_waiting("acme", "g", "t", cursor);
        }
        store.commit(rows).expect("the store takes it");
    }

    fn counts(store: &Store) -> Option<(u64, u64)> {
        store.depth("acme", "g").map(|depth| (depth.events, depth.in_flight))
    }

    #[test]
    fn what_was_prepared_before_anybody_listened_and_committed_after_is_counted() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let row = group(100, Overflow::Accept);
        let mut rows = store.batch();
        rows.put_group("acme", "g", &row);
        let waits = WaitingRow { kind: "x.job".into(), user: "ada".into(), at: 1, class: 1 };
        rows.put_waiting("acme", "g", "t", 1, &waits);
        store.listen_to_work(|_| {}).expect("it is read");
        store.commit(rows).expect("the store takes it");
        assert!(store.count_depth("acme", "g", &row, &|| true).expect("it is read"));
        assert_eq!(counts(&store), Some((1, 0)));
    }

    #[test]
    fn what_is_counted_as_it_changes_is_what_a_walk_finds() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        store.listen_to_work(|_| {}).expect("it is read");
        let row = group(100, Overflow::Accept);
        put_group(&store, Some(&row));
        (1..=5).for_each(|seq| arrive(&store, seq));
        assert_eq!(counts(&store), None, "nobody has counted");
        assert!(store.count_depth("acme", "g", &row, &|| true).expect("it is read"));
        assert_eq!(counts(&store), Some((5, 0)));

        work(&store, 0, Some(1), 0);
        arrive(&store, 6);
        assert_eq!(counts(&store), Some((6, 1)));
        work(&store, 1, None, 1);
        work(&store, 1, Some(2), 0);
        assert_eq!(counts(&store), Some((5, 1)));

        // The same from the beginning, for other settings and for another start.
        let changed = GroupRow { revision: [3; 16], ..row.clone() };
        put_group(&store, Some(&changed));
        assert_eq!(counts(&store), None);
        assert!(
            !store.count_depth("acme", "g", &row, &|| true).expect("it is read"),
            "of these settings nobody wants to know"
        );
        assert!(store.count_depth("acme", "g", &changed, &|| true).expect("it is read"));
        assert_eq!(counts(&store), Some((5, 1)));
        put_group(&store, None);
        assert!(counts(&store).is_none() && store.depths(|_, _, _| true).is_empty());
    }

    #[test]
    fn commits_while_a_walk_is_under_way_are_counted_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        store.listen_to_work(|_| {}).expect("it is read");
        put_group(&store, Some(&group(100, Overflow::Accept)));
        std::thread::scope(|scope| {
            scope.spawn(|| (1..=2_000).for_each(|seq| arrive(&store, seq)));
            for n in 2..20 {
                let row = GroupRow { revision: [n; 16], ..group(100, Overflow::Accept) };
                put_group(&store, Some(&row));
                assert!(store.count_depth("acme", "g", &row, &|| true).expect("it is read"));
            }
        });
        assert_eq!(counts(&store), Some((2_000, 0)));
    }

    #[test]
    fn a_walk_that_is_to_go_on_no_more_ends_and_another_one_counts() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        store.listen_to_work(|_| {}).expect("it is read");
        let row = group(10_000, Overflow::Accept);
        put_group(&store, Some(&row));
        (1..=BETWEEN_ASKED).for_each(|seq| arrive(&store, seq));
        assert!(!store.count_depth("acme", "g", &row, &|| false).expect("it is read"));
        assert_eq!((counts(&store), store.depths(|_, depth, _| depth.is_none()).len()), (None, 1));
        assert!(store.count_depth("acme", "g", &row, &|| true).expect("it is read"));
        assert_eq!(counts(&store), Some((BETWEEN_ASKED, 0)));
    }

    #[test]
    fn of_two_walks_at_a_time_the_first_at_its_end_counts_and_the_other_changes_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        store.listen_to_work(|_| {}).expect("it is read");
        let row = group(10_000, Overflow::Accept);
        put_group(&store, Some(&row));
        (1..=BETWEEN_ASKED).for_each(|seq| arrive(&store, seq));
        let another = || {
            arrive(&store, BETWEEN_ASKED + 1);
            assert!(store.count_depth("acme", "g", &row, &|| true).expect("it is read"));
            arrive(&store, BETWEEN_ASKED + 2);
            true
        };
        assert!(store.count_depth("acme", "g", &row, &another).expect("it is read"), "it is counted");
        assert_eq!(counts(&store), Some((BETWEEN_ASKED + 2, 0)));
    }

    #[test]
    fn a_group_that_rejects_has_no_room_from_its_limit_on_until_there_is_some_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        store.listen_to_work(|_| {}).expect("it is read");
        let full = |kind: &str| store.group_without_room("acme", kind).is_some();
        let row = group(2, Overflow::Reject);
        put_group(&store, Some(&row));
        arrive(&store, 1);
        store.count_depth("acme", "g", &row, &|| true).expect("it is read");
        assert!(!full("x.job"));
        arrive(&store, 2);
        assert!(full("x.job") && !full("x.other"));
        assert!(store.group_without_room("globex", "x.job").is_none());
        // What is worked on waits no more.
        work(&store, 0, Some(1), 0);
        assert!(!full("x.job"));
        arrive(&store, 3);
        assert!(full("x.job"));
        put_group(&store, Some(&group(3, Overflow::Reject)));
        assert!(!full("x.job"), "another limit");
        put_group(&store, Some(&row));
        assert!(full("x.job"));
        put_group(&store, Some(&group(2, Overflow::Accept)));
        assert!(!full("x.job"));
        put_group(&store, Some(&row));
        put_group(&store, None);
        assert!(!full("x.job"));
    }
}
