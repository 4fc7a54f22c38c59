//! Which thread's work is taken next: users in rounds, and within a round by arrival less the head start of its priority.
//!
//! A user's round ends with each piece of work that is taken; who has had fewer goes first. A user who comes anew begins
//! with the present round, so nobody saves up turns, and nobody waits for more than one piece of each other user's. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::protocol::work::Boost;

/// What a user's queue of one kind costs: a node of a tree, the first places of a list, and the user's turn. And what the place
/// of a piece in it costs, where the tree's nodes are half full.
pub const KIND_BYTES: usize = 480;
pub const PLACE_BYTES: usize = 48;

/// Sorts what waits for its turn: smaller is sooner.
pub type Rank = i64;

/// The rank of what arrived at this time, in milliseconds, with a priority of this class.
pub fn rank(at: u64, class: u8, boost: Boost) -> Rank {
    let start = [boost.high_ms, 0, boost.low_ms].get(usize::from(class)).copied().unwrap_or(0);
    i64::try_from(at).unwrap_or(i64::MAX).saturating_sub(start)
}

/// Users by round, and within it by the rank of what each has first.
type Turns = BTreeSet<(u64, Rank, Arc<str>)>;

/// A user's threads, first things first.
type Threads = BTreeSet<(Rank, Arc<str>)>;

/// What is ready, of all users.
#[derive(Debug, Default)]
pub struct Ready {
    users: HashMap<Arc<str>, UserQueue>,
    turns: Turns,
    /// The same of what has a kind of its own, for workers who do not take all.
    kinds: HashMap<Arc<str>, Turns>,
    /// How many users have so many pieces, to find who has the most.
    sizes: BTreeMap<usize, BTreeSet<Arc<str>>>,
    round: u64,
    len: usize,
    /// How many pieces have a kind of their own, and how many queues users have of them.
    with_kind: usize,
    kind_queues: usize,
}

/// A thread whose next event is ready.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    pub user: &'a Arc<str>,
    pub rank: Rank,
    pub thread: &'a Arc<str>,
    /// The event's kind, where not all have the same.
    pub kind: Option<&'a Arc<str>>,
}

#[derive(Debug)]
struct UserQueue {
    round: u64,
    threads: Threads,
    /// Those that have a kind, by it; a group has few.
    kinds: Vec<(Arc<str>, Threads)>,
}

impl UserQueue {
    fn insert(&mut self, piece: Piece<'_>) {
        let place = || (piece.rank, piece.thread.clone());
        self.threads.insert(place());
        let Some(kind) = piece.kind else { return };
        match self.kinds.iter_mut().find(|(it, _)| it == kind) {
            Some((_, threads)) => drop(threads.insert(place())),
            None => self.kinds.push((kind.clone(), Threads::from([place()]))),
        }
    }

    fn remove(&mut self, piece: Piece<'_>) {
        let place = (piece.rank, piece.thread.clone());
        self.threads.remove(&place);
        self.kinds.retain_mut(|(kind, threads)| {
            if Some(&*kind) == piece.kind {
                threads.remove(&place);
            }
            !threads.is_empty()
        });
    }
}

impl Ready {
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many users have something.
    pub fn users(&self) -> usize {
        self.users.len()
    }

    /// What it costs, in bytes, that pieces have kinds.
    pub fn kind_bytes(&self) -> usize {
        self.kind_queues * KIND_BYTES + self.with_kind * PLACE_BYTES
    }

    pub fn insert(&mut self, piece: Piece<'_>) {
        self.change(piece, false, |queue, _| queue.insert(piece));
    }

    pub fn remove(&mut self, piece: Piece<'_>) {
        self.change(piece, false, |queue, _| queue.remove(piece));
    }

    /// A user's name, as it is held here already.
    pub fn user(&self, user: &str) -> Option<Arc<str>> {
        self.users.get_key_value(user).map(|(user, _)| user.clone())
    }

    /// The thread that comes next of those whose event has one of these kinds.
    pub fn next_of<'k>(&self, kinds: impl Iterator<Item = &'k str>) -> Option<Arc<str>> {
        let turns = kinds.filter_map(|kind| Some((self.kinds.get(kind)?.first()?, kind)));
        let ((_, _, user), kind) = turns.min()?;
        let (_, threads) = self.users.get(user)?.kinds.iter().find(|(it, _)| **it == *kind)?;
        threads.first().map(|(_, thread)| thread.clone())
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
    pub fn take(&mut self, piece: Piece<'_>) {
        if let Some(queue) = self.users.get(piece.user) {
            self.round = self.round.max(queue.round);
        }
        self.change(piece, true, |queue, round| {
            queue.round = queue.round.max(round) + 1;
            queue.remove(piece);
        });
    }

    /// How much the user has who has the most, and the last of it.
    pub fn most(&self) -> Option<(usize, Arc<str>)> {
        let (size, users) = self.sizes.last_key_value()?;
        let (_, thread) = self.users.get(users.first()?)?.threads.last()?;
        Some((*size, thread.clone()))
    }

    pub fn count_of(&self, user: &str) -> usize {
        self.users.get(user).map_or(0, |queue| queue.threads.len())
    }

    /// Changes a piece of a user's queue, and keeps the lists true to it. Where the user's turn is over, its place changes in
    /// those of all kinds.
    fn change(&mut self, piece: Piece<'_>, is_turn_over: bool, change: impl FnOnce(&mut UserQueue, u64)) {
        let (user, round) = (piece.user, self.round);
        let may_move = |kind: &Arc<str>| is_turn_over || piece.kind == Some(kind);
        let new = || UserQueue { round, threads: Threads::new(), kinds: Vec::new() };
        let queue = self.users.entry(user.clone()).or_insert_with(new);
        let (before, queues_before) = (queue.threads.len(), queue.kinds.len());
        if let Some((rank, _)) = queue.threads.first() {
            self.turns.remove(&(queue.round, *rank, user.clone()));
        }
        for (kind, threads) in queue.kinds.iter().filter(|(kind, _)| may_move(kind)) {
            if let (Some((rank, _)), Some(turns)) = (threads.first(), self.kinds.get_mut(kind)) {
                turns.remove(&(queue.round, *rank, user.clone()));
                if turns.is_empty() {
                    self.kinds.remove(kind);
                }
            }
        }

        change(queue, round);
        let (now, queues) = (queue.threads.len(), queue.kinds.len());
        if let Some((rank, _)) = queue.threads.first() {
            self.turns.insert((queue.round, *rank, user.clone()));
        }
        for (kind, threads) in queue.kinds.iter().filter(|(kind, _)| may_move(kind)) {
            if let Some((rank, _)) = threads.first() {
                self.kinds.entry(kind.clone()).or_default().insert((queue.round, *rank, user.clone()));
            }
        }
        if now == 0 {
            self.users.remove(user);
        }
        self.len = self.len + now - before;
        self.kind_queues = self.kind_queues + queues - queues_before;
        if piece.kind.is_some() {
            self.with_kind = self.with_kind + now - before;
        }
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

    fn rank_of(at: u64, class: u8) -> Rank {
        rank(at, class, Boost::default())
    }

    fn insert(ready: &mut Ready, user: &str, rank: Rank, thread: &str, kind: Option<&str>) {
        let (user, thread, kind) = (&user.into(), &thread.into(), kind.map(Arc::from));
        ready.insert(Piece { user, rank, thread, kind: kind.as_ref() });
    }

    fn ready(work: &[(&str, u64, u8, &str)]) -> Ready {
        let mut ready = Ready::default();
        for (user, at, class, thread) in work {
            insert(&mut ready, user, rank_of(*at, *class), thread, None);
        }
        ready
    }

    fn take(ready: &mut Ready) -> Option<String> {
        let (user, rank, thread) = ready.next(1).next()?;
        ready.take(Piece { user: &user, rank, thread: &thread, kind: None });
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
        let boost = Boost { high_ms: 5, low_ms: 0 };
        assert_eq!([0, 1, 2, 9].map(|class| rank(100, class, boost)), [95, 100, 100, 100]);
    }

    #[test]
    fn whoever_has_much_gets_no_more_than_its_round_while_others_wait() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ada", 3, 1, "a3"), ("ada", 4, 1, "a4")]);
        assert_eq!(take(&mut work).as_deref(), Some("a1"));
        for (user, thread) in [("ben", "b1"), ("ben", "b2"), ("cid", "c1")] {
            insert(&mut work, user, rank_of(100, 1), thread, None);
        }
        assert_eq!(take_all(&mut work), "b1 c1 a2 b2 a3 a4");
    }

    #[test]
    fn nobody_saves_up_turns_by_staying_away() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ada", 3, 1, "a3"), ("ben", 1, 1, "b1")]);
        assert_eq!((take(&mut work), take(&mut work)), (Some("a1".into()), Some("b1".into())));
        assert_eq!((take(&mut work), take(&mut work)), (Some("a2".into()), Some("a3".into())));
        for n in 4..8 {
            insert(&mut work, "ada", rank_of(n, 1), &format!("a{n}"), None);
            insert(&mut work, "ben", rank_of(n, 1), &format!("b{n}"), None);
        }
        let taken = take_all(&mut work);
        let turns: String = taken.split(' ').map(|thread| &thread[..1]).collect();
        assert!(turns.starts_with("ab") && turns.ends_with("ab") && !turns.contains("bb"), "{taken}");
    }

    #[test]
    fn who_has_the_most_is_known_whatever_comes_and_goes() {
        let mut work = ready(&[("ada", 1, 1, "a1"), ("ada", 2, 1, "a2"), ("ben", 3, 1, "b1")]);
        let most = |work: &Ready| work.most().map(|(many, last)| (many, last.to_string()));
        assert_eq!(most(&work), Some((2, "a2".into())));
        for _ in 0..2 {
            work.remove(Piece { user: &"ada".into(), rank: rank_of(1, 1), thread: &"a1".into(), kind: None });
        }
        insert(&mut work, "ben", rank_of(4, 1), "b2", None);
        assert_eq!(most(&work), Some((2, "b2".into())));
        assert_eq!((work.count_of("ada"), work.count_of("eve"), work.len()), (1, 0, 3));
    }
    #[test]
    fn who_does_not_take_all_kinds_gets_the_first_of_its_own_however_much_of_others_comes_before() {
        let (mut work, kinds) = (Ready::default(), ["x.a", "x.b"].map(Arc::<str>::from));
        let mut pieces = HashMap::new();
        let mut insert = |user: &str, at: u64, thread: &str, kind: usize| {
            let (user, thread): (Arc<str>, Arc<str>) = (user.into(), thread.into());
            work.insert(Piece { user: &user, rank: rank_of(at, 1), thread: &thread, kind: Some(&kinds[kind]) });
            pieces.insert(thread, (user, rank_of(at, 1), &kinds[kind]));
        };
        for n in 0..2_000 {
            insert("ada", n, &format!("a{n:04}"), 0);
        }
        for n in 0..2 {
            insert("ada", 3_000 + n, &format!("late{n}"), 1);
            insert("ben", 4_000 + n, &format!("ben{n}"), 1);
        }
        let mut take_of = |wanted: &[&str]| {
            let thread = work.next_of(wanted.iter().copied())?;
            let (user, rank, kind) = pieces.get(&thread)?;
            work.take(Piece { user, rank: *rank, thread: &thread, kind: Some(kind) });
            Some(thread.to_string())
        };
        // Users in rounds, whatever kind they had their turn with.
        assert_eq!(take_of(&["x.b"]).as_deref(), Some("late0"));
        assert_eq!(take_of(&["x.a", "x.b"]).as_deref(), Some("ben0"));
        assert_eq!(take_of(&["x.a", "x.b"]).as_deref(), Some("a0000"));
        assert_eq!(take_of(&["x.b", "x.none"]).as_deref(), Some("ben1"));
        assert_eq!(take_of(&["x.b"]).as_deref(), Some("late1"));
        assert_eq!((take_of(&["x.b"]), take_of(&[])), (None, None));
        assert_eq!((work.len(), work.kind_bytes()), (1_999, KIND_BYTES + 1_999 * PLACE_BYTES));
    }
}
