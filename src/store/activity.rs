//! The threads of users who were asked about lately, with what lists of them are sorted by: when each was last active, and
//! how many of its runs are open.
//!
//! On disk an index in that order would have a row for each member of a thread, and every event would move all of them. Here
//! an event costs one look-up a commit for its thread, however many members that has: the lists of its members share a cell.
//!
//! Invariants:
//! - a list is what the user's rows of `memberships` were at the newest commit, as in [`super::contacts`]: each commit
//!   changes it before anybody hears of that commit, and what is committed while a list is being read is applied afterwards;
//! - a cell has what its thread's row had at the newest commit, or says that this is not known yet. It is in the table before
//!   its row is read, so that no commit is missed between;
//! - in sum at most [`USERS`] lists with [`ENTRIES`] threads are kept, some 100 bytes each. The list that was not asked for
//!   the longest goes first;
//! - a list that is longer than that is read anew by whoever asks, seconds of work: one of such lists at a time.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::contacts::MembershipChange;
use super::{Store, StoreError, ThreadRow, keys};

/// Users whose threads are kept.
const USERS: usize = 1_024;
/// Threads of all lists together.
const ENTRIES: usize = 1 << 17;
/// Cells that are taken or released before a commit has its turn at the table: some hundred microseconds.
const AT_ONCE: usize = 1_024;
/// No event has this time.
const UNKNOWN: u64 = 0;

/// What lists show of a thread.
#[derive(Debug)]
pub struct Cell {
    /// `tenant 0 thread`.
    key: Box<[u8]>,
    /// Where the thread's name begins.
    name: usize,
    last_at: AtomicU64,
    open_runs: AtomicU32,
}

impl Cell {
    fn new(tenant: &str, thread: &str) -> Cell {
        let key = keys::in_tenant(tenant, thread).into();
        Cell { key, name: tenant.len() + 1, last_at: AtomicU64::new(UNKNOWN), open_runs: AtomicU32::new(0) }
    }

    pub fn thread(&self) -> &str {
        // It was made of text.
        std::str::from_utf8(&self.key[self.name..]).unwrap_or_default()
    }

    /// When the newest event was, in milliseconds.
    pub fn last_at(&self) -> u64 {
        self.last_at.load(Ordering::Relaxed)
    }

    pub fn open_runs(&self) -> u32 {
        self.open_runs.load(Ordering::Relaxed)
    }

    /// Only under the lock of the table.
    fn set(&self, last_at: u64, open_runs: u32) {
        self.last_at.store(last_at, Ordering::Relaxed);
        self.open_runs.store(open_runs, Ordering::Relaxed);
    }
}

/// What a commit has made of a thread.
#[derive(Debug)]
pub(super) struct ThreadActivity {
    /// `tenant 0 thread`.
    pub key: Vec<u8>,
    pub last_at: u64,
    pub open_runs: u32,
}

/// By its key alone.
#[derive(Debug)]
struct ByKey(Arc<Cell>);

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        &self.0.key
    }
}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key.hash(state);
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &ByKey) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for ByKey {}

/// A user's threads, in the order of their names.
pub type UserThreads = Arc<Vec<Arc<Cell>>>;

#[derive(Default)]
pub(super) struct Activity {
    state: Mutex<State>,
    /// Somebody reads a list that is too long to be kept.
    reads_long: AtomicBool,
}

/// Whoever has it reads a list that is too long to be kept.
struct LongRead<'a>(&'a AtomicBool);

impl Drop for LongRead<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[derive(Default)]
struct State {
    kept: HashMap<Vec<u8>, Kept>,
    /// The cells of all lists, each with the number of lists that have it.
    cells: HashMap<ByKey, usize>,
    entries: usize,
    /// Lists that are kept no longer, whose cells whoever reads next releases: a commit is not to wait for that.
    gone: Vec<UserThreads>,
    /// Users whose lists were too long to be kept, [`USERS`] at most.
    long: HashSet<Vec<u8>>,
    /// Users whose threads are being read.
    reading: HashMap<Vec<u8>, Reading>,
    clock: u64,
}

#[derive(Default)]
struct Reading {
    /// By how many.
    readers: usize,
    /// What was committed since the first of them began: threads, and whether the user is a member from then on.
    changes: Vec<(String, bool)>,
}

struct Kept {
    threads: UserThreads,
    /// When it was last asked for, by the clock of [`State`].
    used: u64,
}

impl Store {
    /// The user's threads with when they were last active. Reads as many rows as there are threads when that is not known
    /// any more, and none otherwise. For threads that may block. Nothing if the list is too long to be kept, and another such
    /// list is being read.
    pub fn active_threads(&self, tenant: &str, user: &str) -> Result<Option<UserThreads>, StoreError> {
        let key = keys::in_tenant(tenant, user);
        let Ok(_long_read) = self.activity.may_read(&key) else { return Ok(None) };
        let threads = self.activity.threads(&key, tenant, || self.threads_of(tenant, user).collect())?;
        for cell in threads.iter().filter(|cell| cell.last_at() == UNKNOWN) {
            if let Some(row) = self.thread(tenant, cell.thread())? {
                self.activity.fill(cell, &row);
            }
        }
        Ok(Some(threads))
    }
}

/// A list that is too long to be kept is being read.
struct Busy;

impl Activity {
    fn may_read(&self, user: &[u8]) -> Result<Option<LongRead<'_>>, Busy> {
        if !self.state().long.contains(user) {
            return Ok(None);
        }
        match self.reads_long.swap(true, Ordering::Acquire) {
            true => Err(Busy),
            false => Ok(Some(LongRead(&self.reads_long))),
        }
    }

    fn threads(
        &self,
        user: &[u8],
        tenant: &str,
        read: impl FnOnce() -> Result<Vec<String>, StoreError>,
    ) -> Result<UserThreads, StoreError> {
        {
            let mut state = self.state();
            state.clock += 1;
            let now = state.clock;
            if let Some(kept) = state.kept.get_mut(user) {
                kept.used = now;
                return Ok(kept.threads.clone());
            }
            state.reading.entry(user.to_owned()).or_default().readers += 1;
        }
        let cells = read().map(|mut threads| {
            threads.sort_unstable();
            self.cells(tenant, &threads)
        });

        let (threads, gone) = {
            let mut state = self.state();
            let changes = state.finish_reading(user);
            let mut threads = cells?;
            for (thread, is_member) in changes {
                state.change(&mut threads, tenant, &thread, is_member);
            }
            let threads = Arc::new(threads);
            state.keep(user, threads.clone());
            (threads, std::mem::take(&mut state.gone))
        };
        for cells in gone.iter().flat_map(|list| list.chunks(AT_ONCE)) {
            let mut state = self.state();
            cells.iter().for_each(|cell| state.release(cell));
        }
        Ok(threads)
    }

    /// The cells of threads, for one more list: some at a time, since commits wait for the table.
    fn cells(&self, tenant: &str, threads: &[String]) -> Vec<Arc<Cell>> {
        let mut cells = Vec::with_capacity(threads.len());
        for threads in threads.chunks(AT_ONCE) {
            let mut state = self.state();
            cells.extend(threads.iter().map(|thread| state.cell(tenant, thread)));
        }
        cells
    }

    /// What was read of a thread, unless a commit has said more meanwhile.
    fn fill(&self, cell: &Cell, row: &ThreadRow) {
        let _state = self.state();
        if cell.last_at() == UNKNOWN {
            cell.set(row.last_at, row.open_runs);
        }
    }

    /// What a commit has changed: memberships, and rows of threads by their keys.
    pub fn apply(&self, memberships: &[MembershipChange], threads: &[ThreadActivity]) {
        let mut state = self.state();
        if state.kept.is_empty() && state.cells.is_empty() && state.reading.is_empty() {
            return;
        }
        for MembershipChange { user, thread, is_member } in memberships {
            if let Some(reading) = state.reading.get_mut(user) {
                reading.changes.push((thread.clone(), *is_member));
            }
            state.change_kept(user, thread, *is_member);
        }
        for ThreadActivity { key, last_at, open_runs } in threads {
            if let Some((ByKey(cell), _)) = state.cells.get_key_value(&**key) {
                cell.set(*last_at, *open_runs);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The changes since the first of those who read the user's threads began.
    fn finish_reading(&mut self, user: &[u8]) -> Vec<(String, bool)> {
        let Some(reading) = self.reading.get_mut(user) else { return Vec::new() };
        reading.readers -= 1;
        if reading.readers > 0 {
            return reading.changes.clone();
        }
        self.reading.remove(user).map(|reading| reading.changes).unwrap_or_default()
    }

    /// The thread's cell, for one more list.
    fn cell(&mut self, tenant: &str, thread: &str) -> Arc<Cell> {
        let cell = Cell::new(tenant, thread);
        let (cell, lists) = match self.cells.get_key_value(&*cell.key) {
            Some((ByKey(known), lists)) => (known.clone(), *lists),
            None => (Arc::new(cell), 0),
        };
        self.cells.insert(ByKey(cell.clone()), lists + 1);
        cell
    }

    fn change(&mut self, threads: &mut Vec<Arc<Cell>>, tenant: &str, thread: &str, is_member: bool) {
        match (threads.binary_search_by(|cell| cell.thread().cmp(thread)), is_member) {
            (Err(at), true) => threads.insert(at, self.cell(tenant, thread)),
            (Ok(at), false) => {
                let cell = threads.remove(at);
                self.release(&cell);
            }
            (Ok(_), true) | (Err(_), false) => {}
        }
    }

    fn change_kept(&mut self, user: &[u8], thread: &str, is_member: bool) {
        let Some(mut kept) = self.kept.remove(user) else { return };
        let tenant =
            user.split(|byte| *byte == 0).next().and_then(|it| std::str::from_utf8(it).ok()).unwrap_or_default();
        let before = kept.threads.len();
        self.change(Arc::make_mut(&mut kept.threads), tenant, thread, is_member);
        self.entries = self.entries - before + kept.threads.len();
        self.kept.insert(user.to_owned(), kept);
        self.shrink(0);
    }

    fn keep(&mut self, user: &[u8], threads: UserThreads) {
        self.forget(user);
        if threads.len() > ENTRIES {
            self.gone.push(threads);
            if self.long.len() < USERS {
                self.long.insert(user.to_owned());
            }
            return;
        }
        self.long.remove(user);
        self.shrink(threads.len());
        self.entries += threads.len();
        self.kept.insert(user.to_owned(), Kept { threads, used: self.clock });
    }

    /// Makes room for so many more threads, and for one more list if there are any.
    fn shrink(&mut self, more: usize) {
        while self.kept.len() + usize::from(more > 0) > USERS || self.entries + more > ENTRIES {
            let Some(oldest) = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(user, _)| user.clone()) else {
                break;
            };
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, user: &[u8]) {
        if let Some(kept) = self.kept.remove(user) {
            self.entries -= kept.threads.len();
            self.gone.push(kept.threads);
        }
    }

    /// A list has the cell no more. Whoever still reads that list keeps the cell, but hears of no more commits by it.
    fn release(&mut self, cell: &Cell) {
        match self.cells.get_mut(&*cell.key) {
            Some(lists) if *lists > 1 => *lists -= 1,
            _ => drop(self.cells.remove(&*cell.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(activity: &Activity, user: &str, threads: &[&str]) -> UserThreads {
        let listed = || Ok(threads.iter().map(|it| (*it).to_owned()).collect());
        activity.threads(&keys::in_tenant("acme", user), "acme", listed).expect("it cannot fail")
    }

    fn changed(user: &str, thread: &str, is_member: bool) -> [MembershipChange; 1] {
        [MembershipChange { user: keys::in_tenant("acme", user), thread: thread.to_owned(), is_member }]
    }

    fn active(thread: &str, last_at: u64) -> [ThreadActivity; 1] {
        [ThreadActivity { key: keys::in_tenant("acme", thread), last_at, open_runs: 0 }]
    }

    fn names(threads: &UserThreads) -> Vec<&str> {
        threads.iter().map(|cell| cell.thread()).collect()
    }

    #[test]
    fn what_is_committed_while_a_list_is_read_counts() {
        let activity = Activity::default();
        let listed = || {
            activity.apply(&changed("ada", "late", true), &active("late", 7));
            activity.apply(&changed("ada", "left", false), &[]);
            Ok(vec!["left".to_owned(), "old".to_owned()])
        };
        let threads = activity.threads(b"acme\0ada", "acme", listed).expect("it cannot fail");
        assert_eq!(names(&threads), ["late", "old"]);
        assert!(activity.state().reading.is_empty());
        // A commit says more of a thread than what was read before it.
        activity.apply(&[], &active("old", 9));
        activity.fill(&threads[1], &ThreadRow { last_at: 3, ..ThreadRow::default() });
        assert_eq!(threads[1].last_at(), 9);
    }

    #[test]
    fn a_list_without_threads_hears_of_the_first() {
        let activity = Activity::default();
        assert!(read(&activity, "ada", &[]).is_empty());
        activity.apply(&changed("ada", "first", true), &active("first", 5));
        let threads = read(&activity, "ada", &["read again"]);
        assert_eq!((names(&threads), threads[0].last_at()), (vec!["first"], 5));
    }

    #[test]
    fn a_list_that_gave_way_leaves_nothing_stale_behind() {
        let activity = Activity::default();
        let given_up = read(&activity, "ada", &["t"]);
        activity.apply(&[], &active("t", 5));
        // It gives way to another, and its cells are not released yet.
        activity.state().forget(b"acme\0ada");
        activity.apply(&[], &active("t", 6));
        let again = read(&activity, "ada", &["t"]);
        assert_eq!((given_up[0].last_at(), again[0].last_at()), (6, 6));
        assert_eq!(activity.state().cells.len(), 1);
    }

    #[test]
    fn a_commit_costs_one_lookup_for_a_thread_however_many_lists_have_it() {
        let activity = Activity::default();
        let lists: Vec<_> = (0..100).map(|user| read(&activity, &format!("user{user}"), &["a", "b"])).collect();
        assert_eq!(activity.state().cells.len(), 2);
        activity.apply(&[], &active("b", 5));
        assert!(lists.iter().all(|threads| threads[1].last_at() == 5 && threads[0].last_at() == UNKNOWN));
    }

    #[test]
    fn what_is_kept_is_bounded_and_cells_go_with_their_last_list() {
        let activity = Activity::default();
        for user in 0..USERS {
            read(&activity, &format!("user{user}"), &["a"]);
        }
        read(&activity, "user0", &[]);
        let own = read(&activity, "one more", &["a", "its own"]);
        assert_eq!(names(&read(&activity, "user0", &["read again"])), ["a"], "it was asked for");
        assert_eq!(names(&read(&activity, "user1", &["read again"])), ["read again"], "it was forgotten");
        let sizes = || {
            let state = activity.state();
            (state.kept.len(), state.entries, state.cells.len())
        };
        // "a", what was read again, and its own.
        assert_eq!(sizes(), (USERS, USERS + 1, 3));

        activity.apply(&changed("one more", "its own", false), &[]);
        assert_eq!(names(&own), ["a", "its own"], "as they were");
        let many: Vec<String> = (0..ENTRIES).map(|n| format!("t{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        read(&activity, "everywhere", &many);
        assert_eq!(sizes(), (1, ENTRIES, ENTRIES));
        let beyond = [&many[..], &["one more"]].concat();
        assert_eq!(read(&activity, "beyond", &beyond).len(), ENTRIES + 1);
        assert_eq!(sizes(), (1, ENTRIES, ENTRIES), "what is beyond is not kept");

        let may_read = |user: &str| activity.may_read(&keys::in_tenant("acme", user));
        let long_read = may_read("beyond").map_err(|_| "busy").expect("nobody reads one");
        assert!(long_read.is_some() && may_read("beyond").is_err(), "one at a time");
        assert!(may_read("everywhere").is_ok_and(|it| it.is_none()), "and of others any number");
        drop(long_read);
        read(&activity, "beyond", &[]);
        assert!(may_read("beyond").is_ok_and(|it| it.is_none()), "it is long no more");
    }
}
