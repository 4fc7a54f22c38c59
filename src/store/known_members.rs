//! Who is known to be a member of a thread, without asking the database: each publish asks, and where one user writes many
//! events that is most of what admitting them costs.
//!
//! A table of [`SLOTS`] hashes of 64 bits (512 KiB in all), each in the slot that its low bits name; whoever comes later to a
//! slot takes it. Only members are kept: that somebody is none, the database says.
//!
//! Invariants:
//! - whoever is here was a member at the newest commit: a commit that removes a member takes it out before anybody hears of
//!   that commit, and what a lookup found before it is not written after it;
//! - two memberships with one hash are one here. The hash is keyed at random, so nobody can look for such a pair, and one
//!   lookup meets it with a chance of 1 in 2⁶⁴.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A power of two.
const SLOTS: usize = 1 << 16;
/// What no membership has for its hash.
const EMPTY: u64 = 0;

pub(super) struct KnownMembers {
    slots: Box<[AtomicU64]>,
    /// How many commits have removed members. Only whoever has locked it writes slots.
    removals: Mutex<u64>,
    hasher: RandomState,
}

impl KnownMembers {
    pub fn new() -> KnownMembers {
        KnownMembers {
            slots: (0..SLOTS).map(|_| AtomicU64::new(EMPTY)).collect(),
            removals: Mutex::new(0),
            hasher: RandomState::new(),
        }
    }

    /// What a membership is known by here.
    pub fn hash(&self, tenant: &str, thread: &str, user: &str) -> u64 {
        self.hasher.hash_one((tenant, thread, user)).max(EMPTY + 1)
    }

    /// Whether somebody is a member; `look_up` asks the database, if that is not known.
    pub fn is_member<E>(&self, hash: u64, look_up: impl FnOnce() -> Result<bool, E>) -> Result<bool, E> {
        if self.slot(hash).load(Ordering::Acquire) == hash {
            return Ok(true);
        }
        let before = *self.removals();
        let is_member = look_up()?;
        if is_member {
            let removals = self.removals();
            if *removals == before {
                self.slot(hash).store(hash, Ordering::Release);
            }
        }
        Ok(is_member)
    }

    /// Takes out those that a commit, which is written, has removed.
    pub fn remove(&self, removed: &[u64]) {
        if removed.is_empty() {
            return;
        }
        let mut removals = self.removals();
        *removals += 1;
        for hash in removed {
            // Whoever else has the slot is looked up once more.
            self.slot(*hash).store(EMPTY, Ordering::Release);
        }
    }

    fn slot(&self, hash: u64) -> &AtomicU64 {
        &self.slots[hash as usize % SLOTS]
    }

    fn removals(&self) -> MutexGuard<'_, u64> {
        self.removals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn is_member(known: &KnownMembers, hash: u64, found: bool) -> (bool, bool) {
        let mut asked = false;
        let look_up = || {
            asked = true;
            Ok::<_, Infallible>(found)
        };
        let Ok(is_member) = known.is_member(hash, look_up);
        (is_member, asked)
    }

    #[test]
    fn a_member_is_looked_up_once_until_it_is_removed() {
        let known = KnownMembers::new();
        let hash = known.hash("acme", "lounge", "ada");
        assert_eq!(is_member(&known, hash, true), (true, true));
        assert_eq!(is_member(&known, hash, false), (true, false));

        known.remove(&[hash]);
        assert_eq!(is_member(&known, hash, false), (false, true));
        assert_eq!(is_member(&known, hash, true), (true, true));
    }

    #[test]
    fn a_stranger_is_looked_up_each_time() {
        let known = KnownMembers::new();
        let hash = known.hash("acme", "lounge", "ada");
        assert_eq!(is_member(&known, hash, false), (false, true));
        assert_eq!(is_member(&known, hash, true), (true, true));
    }

    #[test]
    fn what_was_found_before_a_removal_is_not_kept_after_it() {
        let known = KnownMembers::new();
        let hash = known.hash("acme", "lounge", "ada");
        let look_up = || {
            known.remove(&[hash]);
            Ok::<_, Infallible>(true)
        };
        assert_eq!(known.is_member(hash, look_up), Ok(true));
        assert_eq!(is_member(&known, hash, false), (false, true));
    }

    #[test]
    fn two_memberships_of_one_slot_take_turns() {
        let known = KnownMembers::new();
        let one = 7;
        let other = one + SLOTS as u64;
        for hash in [one, other, one] {
            assert_eq!(is_member(&known, hash, true), (true, true));
            assert_eq!(is_member(&known, hash, false), (true, false));
        }
    }
}
