//! Which thread's work is taken next: users in rounds, and within a round by arrival less the head start of its priority.
//!
//! A user's round ends with each piece of work that is taken; who has had fewer goes first. A user who comes anew begins
//! with the present round, so nobody saves up turns, and nobody waits for more than one piece of each other user's. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// How much earlier or later work counts as arrived, in milliseconds, by the class of its priority: high, normal, low.
const HEAD_START: [i64; 3] = [60_000, 0, -60_000];

/// Sorts what waits for its turn: smaller is sooner.
pub type Rank = i64;

/// The rank of what arrived at this time, in milliseconds.
pub fn rank(at: u64, class: u8) -> Rank {
    let start = HEAD_START.get(usize::from(class)).copied().unwrap_or(0);
    i64::try_from(at).unwrap_or(i64::MAX).saturating_sub(start)
}

/// What is ready, of all users.
#[derive(Debug, Default)]
pub struct Ready {
    users: HashMap<Arc<str>, UserQueue>,
    /// By round, and within it by the rank of what each has first.
    turns: BTreeSet<(u64, Rank, Arc<str>)>,
    /// How many users have so many pieces, to find who has the most.
    sizes: BTreeMap<usize, BTreeSet<Arc<str>>>,
    round: u64,
    len: usize,
}

#[derive(Debug)]
struct UserQueue {
    round: u64,
    threads: BTreeSet<(Rank, Arc<str>)>,
}

impl UserQueue {
    fn first(&self) -> Option<Rank> {
        self.threads.first().map(|(rank, _)| *rank)
    }
}

impl Ready {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn insert(&mut self, user: &Arc<str>, rank: Rank, thread: &Arc<str>) {
        let round = self.round;
        self.change(user, |queue| queue.threads.insert((rank, thread.clone())), round);
    }

    pub fn remove(&mut self, user: &Arc<str>, rank: Rank, thread: &Arc<str>) {
        let round = self.round;
        self.change(user, |queue| queue.threads.remove(&(rank, thread.clone())), round);
    }

    /// Those that come next, at most `limit` users, each with its first thread.
    pub fn next(&self, limit: usize) -> impl Iterator<Item = (Arc<str>, Rank, Arc<str>)> {
        self.turns.iter().take(limit).filter_map(|(_, _, user)| {
            let (rank, thread) = self.users.get(user)?.threads.first()?;
            Some((user.clone(), *rank, thread.clone()))
        })
    }

    /// What a user has, first things first.
    pub fn of_user(&self, user: &str) -> impl Iterator<Item = &(Rank, Arc<str>)> {
        self.users.get(user).into_iter().flat_map(|queue| &queue.threads)
    }

    /// A user's thread is taken: the user's turn in this round is over.
    pub fn take(&mut self, user: &Arc<str>, rank: Rank, thread: &Arc<str>) {
        if let Some(queue) = self.users.get(user) {
            self.round = self.round.max(queue.round);
        }
        let round = self.round;
        self.change(
            user,
            |queue| {
                queue.round = queue.round.max(round) + 1;
                queue.threads.remove(&(rank, thread.clone()))
            },
            round,
        );
    }

    /// The user who has the most, how much that is, and the last of it.
    pub fn most(&self) -> Option<(Arc<str>, usize, Rank, Arc<str>)> {
        let (size, users) = self.sizes.last_key_value()?;
        let user = users.first()?;
        let (rank, thread) = self.users.get(user)?.threads.last()?;
        Some((user.clone(), *size, *rank, thread.clone()))
    }

    pub fn count_of(&self, user: &str) -> usize {
        self.users.get(user).map_or(0, |queue| queue.threads.len())
    }

    /// Changes a user's queue, and keeps the lists true to it.
    fn change(&mut self, user: &Arc<str>, change: impl FnOnce(&mut UserQueue) -> bool, round: u64) {
        let queue = self.users.entry(user.clone()).or_insert_with(|| UserQueue { round, threads: BTreeSet::new() });
        let (before, was_round, was_first) = (queue.threads.len(), queue.round, queue.first());
        change(queue);
        let (now, round, first) = (queue.threads.len(), queue.round, queue.first());
        if now == 0 {
            self.users.remove(user);
        }

        if let Some(first) = was_first {
            self.turns.remove(&(was_round, first, user.clone()));
        }
        if let Some(first) = first {
            self.turns.insert((round, first, user.clone()));
        }
        self.len = self.len + now - before;
        if before != now {
            if let Some(users) = self.sizes.get_mut(&before) {
                users.remove(user);
                if users.is_empty() {
                    self.sizes.remove(&before);
                }
            }
            if now > 0 {
                self.sizes.entry(now).or_default().insert(user.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(work: &[(&str, u64, u8, &str)]) -> Ready {
        let mut ready = Ready::default();
        for (user, at, class, thread) in work {
            ready.insert(&Arc::from(*user), rank(*at, *class), &Arc::from(*thread));
        }
        ready
    }

    fn take(ready: &mut Ready) -> Option<String> {
        let (user, rank, thread) = ready.next(1).next()?;
        ready.take(&user, rank, &thread);
        Some(thread.to_string())
    }

    fn take_all(ready: &mut Ready) -> String {
        std::iter::from_fn(|| take(ready)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_users_work_is_taken_by_arrival_less_the_head_start_of_its_priority() {
        let minute = 60_000;
        let mut work = ready(&[
            ("ada", 10 * minute, 1, "normal"),
            ("ada", 11 * minute - 1, 0, "high"),
            ("ada", 9 * minute - 2, 2, "low"),
            ("ada", 11 * minute + 1, 0, "high-later"),
        ]);
        assert_eq!(take_all(&mut work), "low high normal high-later");
        assert_eq!((work.len(), work.most()), (0, None));
    }

    #[test]
    fn whoever_has_much_gets_no_more_than_its_round_while_others_wait() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ada", 3, 1, "a3"), ("ada", 4, 1, "a4")]);
        assert_eq!(take(&mut work).as_deref(), Some("a1"));
        for (user, thread) in [("ben", "b1"), ("ben", "b2"), ("cid", "c1")] {
            work.insert(&Arc::from(user), rank(100, 1), &Arc::from(thread));
        }
        assert_eq!(take_all(&mut work), "b1 c1 a2 b2 a3 a4");
    }

    #[test]
    fn nobody_saves_up_turns_by_staying_away() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ada", 3, 1, "a3"), ("ben", 1, 1, "b1")]);
        assert_eq!((take(&mut work), take(&mut work)), (Some("a1".into()), Some("b1".into())));
        assert_eq!((take(&mut work), take(&mut work)), (Some("a2".into()), Some("a3".into())));
        for n in 4..8 {
            work.insert(&Arc::from("ada"), rank(n, 1), &Arc::from(format!("a{n}")));
            work.insert(&Arc::from("ben"), rank(n, 1), &Arc::from(format!("b{n}")));
        }
        let taken = take_all(&mut work);
        let turns: String = taken.split(' ').map(|thread| &thread[..1]).collect();
        assert!(turns.starts_with("ab") && turns.ends_with("ab") && !turns.contains("bb"), "{taken}");
    }

    #[test]
    fn who_has_the_most_is_known_whatever_comes_and_goes() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ben", 3, 1, "b1")]);
        let most = |work: &Ready| work.most().map(|(user, many, _, last)| (user.to_string(), many, last.to_string()));
        assert_eq!(most(&work), Some(("ada".into(), 2, "a2".into())));
        work.remove(&Arc::from("ada"), rank(1, 1), &Arc::from("a1"));
        work.remove(&Arc::from("ada"), rank(1, 1), &Arc::from("a1"));
        work.insert(&Arc::from("ben"), rank(4, 1), &Arc::from("b2"));
        assert_eq!(most(&work), Some(("ben".into(), 2, "b2".into())));
        assert_eq!((work.count_of("ada"), work.count_of("eve"), work.len()), (1, 0, 3));
    }
}
