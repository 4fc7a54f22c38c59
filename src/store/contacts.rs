//! Whether two users are members of one thread, for users with very many threads: an inbox may be written to by whoever
//! shares a thread with its user, and that is looked up with each such publish.
//!
//! For users who were asked about lately, the hash of each of their threads is kept, sorted; two such lists are compared in
//! microseconds, whatever their length. A list is read from the store once, by a thread that may block.
//!
//! Invariants:
//! - a list is what the user's rows of `memberships` were at the newest commit: each commit changes it before anybody hears
//!   of that commit, and what is committed while a list is being read is applied to it afterwards;
//! - in sum at most [`USERS`] lists with [`HASHES`] hashes are kept (8 bytes each). The list that was not asked for the
//!   longest goes first.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Users whose threads are kept.
const USERS: usize = 1_024;
/// Hashes of all users together.
const HASHES: usize = 1 << 20;

/// A user's threads, by their hashes, in order.
type Threads = Arc<Vec<u64>>;

/// A user became a member of a thread, or is one no longer.
#[derive(Debug)]
pub(super) struct MembershipChange {
    /// `tenant 0 user`.
    pub user: Vec<u8>,
    pub thread: String,
    pub is_member: bool,
}

#[derive(Default)]
pub(super) struct Contacts {
    state: Mutex<State>,
    /// Keyed at random, so that nobody chooses two threads of one hash.
    hasher: RandomState,
}

#[derive(Default)]
struct State {
    kept: HashMap<Vec<u8>, Kept>,
    hashes: usize,
    /// Users whose threads are being read.
    reading: HashMap<Vec<u8>, Reading>,
    clock: u64,
}

#[derive(Default)]
struct Reading {
    /// By how many.
    readers: usize,
    /// What was committed since the first of them began: threads, and whether the user is a member from then on.
    changes: Vec<(u64, bool)>,
}

struct Kept {
    threads: Threads,
    /// When it was last asked for, by the clock of [`State`].
    used: u64,
}

impl Contacts {
    /// Whether two users are members of one thread, if the threads of both are known.
    pub fn share(&self, one: &[u8], other: &[u8]) -> Option<bool> {
        let mut state = self.state();
        let (one, other) = (state.get(one)?, state.get(other)?);
        drop(state);
        Some(overlap(&one, &other))
    }

    /// A user's threads; `read` reads them from the store, if they are not known.
    pub fn threads<E>(&self, user: &[u8], read: impl FnOnce() -> Result<Vec<String>, E>) -> Result<Threads, E> {
        {
            let mut state = self.state();
            if let Some(threads) = state.get(user) {
                return Ok(threads);
            }
            state.reading.entry(user.to_owned()).or_default().readers += 1;
        }
        let read = read();

        let mut state = self.state();
        let changes = state.finish_reading(user);
        let mut threads: Vec<u64> = read?.iter().map(|thread| self.hash(thread)).collect();
        threads.sort_unstable();
        for (thread, is_member) in changes {
            change(&mut threads, thread, is_member);
        }
        let threads = Arc::new(threads);
        state.keep(user, threads.clone());
        Ok(threads)
    }

    /// What a commit has changed.
    pub fn apply(&self, changes: &[MembershipChange]) {
        if changes.is_empty() {
            return;
        }
        let mut state = self.state();
        for MembershipChange { user, thread, is_member } in changes {
            let thread = self.hash(thread);
            if let Some(reading) = state.reading.get_mut(user) {
                reading.changes.push((thread, *is_member));
            }
            state.change(user, thread, *is_member);
        }
    }

    fn hash(&self, thread: &str) -> u64 {
        self.hasher.hash_one(thread)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn get(&mut self, user: &[u8]) -> Option<Threads> {
        self.clock += 1;
        let kept = self.kept.get_mut(user)?;
        kept.used = self.clock;
        Some(kept.threads.clone())
    }

    /// The changes since the first of those who read the user's threads began.
    fn finish_reading(&mut self, user: &[u8]) -> Vec<(u64, bool)> {
        let Some(reading) = self.reading.get_mut(user) else { return Vec::new() };
        reading.readers -= 1;
        if reading.readers > 0 {
            return reading.changes.clone();
        }
        self.reading.remove(user).map(|reading| reading.changes).unwrap_or_default()
    }

    fn keep(&mut self, user: &[u8], threads: Threads) {
        if threads.len() > HASHES {
            return;
        }
        self.forget(user);
        while self.kept.len() >= USERS || self.hashes + threads.len() > HASHES {
            let Some(oldest) = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(user, _)| user.clone()) else {
                break;
            };
            self.forget(&oldest);
        }
        self.hashes += threads.len();
        self.kept.insert(user.to_owned(), Kept { threads, used: self.clock });
    }

    fn forget(&mut self, user: &[u8]) {
        if let Some(kept) = self.kept.remove(user) {
            self.hashes -= kept.threads.len();
        }
    }

    fn change(&mut self, user: &[u8], thread: u64, is_member: bool) {
        let Some(kept) = self.kept.get_mut(user) else { return };
        let before = kept.threads.len();
        change(Arc::make_mut(&mut kept.threads), thread, is_member);
        self.hashes = self.hashes - before + kept.threads.len();
    }
}

fn change(threads: &mut Vec<u64>, thread: u64, is_member: bool) {
    match (threads.binary_search(&thread), is_member) {
        (Err(at), true) => threads.insert(at, thread),
        (Ok(at), false) => drop(threads.remove(at)),
        (Ok(_), true) | (Err(_), false) => {}
    }
}

/// Whether two lists in order have an element in common.
fn overlap(one: &[u64], other: &[u64]) -> bool {
    let (mut i, mut j) = (0, 0);
    while let (Some(a), Some(b)) = (one.get(i), other.get(j)) {
        match a.cmp(b) {
            Ordering::Less => i += 1,
            Ordering::Greater => j += 1,
            Ordering::Equal => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn read(contacts: &Contacts, user: &str, threads: &[&str]) -> Threads {
        let listed = || Ok::<_, Infallible>(threads.iter().map(|it| (*it).to_owned()).collect());
        contacts.threads(user.as_bytes(), listed).expect("it cannot fail")
    }

    fn changed(user: &str, thread: &str, is_member: bool) -> [MembershipChange; 1] {
        [MembershipChange { user: user.into(), thread: thread.into(), is_member }]
    }

    #[test]
    fn what_is_known_follows_each_commit() {
        let contacts = Contacts::default();
        read(&contacts, "ada", &["a", "b"]);
        assert_eq!(contacts.share(b"ada", b"bob"), None, "the threads of one are not known");
        read(&contacts, "bob", &["c", "d"]);
        assert_eq!(contacts.share(b"ada", b"bob"), Some(false));

        contacts.apply(&changed("bob", "b", true));
        assert_eq!(contacts.share(b"ada", b"bob"), Some(true));
        contacts.apply(&changed("ada", "b", false));
        assert_eq!(contacts.share(b"ada", b"bob"), Some(false));
        contacts.apply(&changed("ada", "b", false));
        assert_eq!(contacts.state().hashes, 4, "one of ada's, three of bob's");
    }

    #[test]
    fn a_commit_while_threads_are_read_counts() {
        let contacts = Contacts::default();
        read(&contacts, "bob", &["late"]);
        let listed = || {
            contacts.apply(&changed("ada", "late", true));
            contacts.apply(&changed("ada", "left", false));
            Ok::<_, Infallible>(vec!["left".to_owned()])
        };
        assert_eq!(contacts.threads(b"ada", listed).expect("it cannot fail").len(), 1);
        assert_eq!(contacts.share(b"ada", b"bob"), Some(true));
        assert!(contacts.state().reading.is_empty());
    }

    #[test]
    fn a_read_that_fails_leaves_nothing_behind() {
        let contacts = Contacts::default();
        assert_eq!(contacts.threads(b"ada", || Err("the store does not answer")), Err("the store does not answer"));
        let state = contacts.state();
        assert!(state.reading.is_empty() && state.kept.is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_list_not_asked_for_the_longest_goes() {
        let contacts = Contacts::default();
        for user in 0..USERS {
            read(&contacts, &format!("user{user}"), &["a"]);
        }
        assert!(contacts.share(b"user0", b"user1").is_some());
        read(&contacts, "one more", &["a"]);
        assert_eq!(contacts.share(b"user0", b"user2"), None, "user2 was forgotten");
        assert_eq!(contacts.share(b"user0", b"user1"), Some(true));
        let state = contacts.state();
        assert_eq!((state.kept.len(), state.hashes), (USERS, USERS));
    }
}
