//! One of several projectors on one store. Each has some of the partitions to itself, the numbers within a topic that its
//! own number is the remainder of, so that all rows with such a number at the beginning of their keys are its own.
//!
//! What is not of one partition:
//! - Dead letters, their lists and their counts. A batch that comes to one takes a lock, and holds it until it has committed
//!   ([`Share::letters`]): so each is read as the last commit left it.
//! - Where all partitions are. Each projector writes the positions of its own partitions, and one for all of them
//!   ([`Batch::put_passed`]), which is only ever too low.
//! - What puts the same whoever puts it: names of durable subscriptions.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::log::Positions;
use crate::store::Batch;

/// What a projector has of the log, where there are several.
pub(super) struct Share {
    /// Its partitions, of all topics.
    pub(super) partitions: Vec<u32>,
    /// By partition, whether it is one of them.
    is_own: Vec<bool>,
    /// Held by the batch that reads and writes dead letters.
    pub(super) letters: Arc<Mutex<()>>,
    /// How many projectors there are.
    pub(super) of: usize,
    /// Where all partitions are, as far as their projectors have said.
    front: watch::Sender<Positions>,
    /// What was written for all of them.
    passed: u64,
}

/// The number of the projector that has a partition, by its number within its topic.
pub(super) fn owner(within: u32, of: usize) -> usize {
    within as usize % of
}

impl Share {
    /// The shares of so many projectors. `within` gives each partition's number within its topic; `front` has the positions
    /// that the store has.
    pub(super) fn all(of: usize, within: &[u32], front: &watch::Sender<Positions>) -> Vec<Share> {
        let letters = Arc::<Mutex<()>>::default();
        let passed = least(&front.borrow());
        let share = |number| {
            let is_own: Vec<bool> = within.iter().map(|within| owner(*within, of) == number).collect();
            let partitions = (0..).zip(&is_own).filter(|(_, own)| **own).map(|(partition, _)| partition).collect();
            Share { partitions, is_own, letters: letters.clone(), of, front: front.clone(), passed }
        };
        (0..of).map(share).collect()
    }

    /// Writes where its partitions are from `before` on. Of those that `was_read` says to have had no records, only what the
    /// position for all will not say in time: on the embedded log each commit brings all partitions further.
    pub(super) fn put_positions(
        &mut self,
        rows: &mut Batch<'_>,
        (before, next): (&[u64], &[u64]),
        was_read: impl Fn(usize) -> bool,
    ) {
        let all_to = least(next);
        for partition in self.partitions.iter().map(|partition| *partition as usize) {
            let (before, next) = (before[partition], next[partition]);
            if next > before && (was_read(partition) || next > all_to) {
                rows.put_position(partition as u32, next);
            }
        }

        // Others may be committing right now and say less, or more. Either is true, and what is read of a partition is the
        // higher one of this and its own.
        let known = self.front.borrow();
        let here = |(partition, own): (usize, &bool)| if *own { next[partition] } else { known[partition] };
        let passed = self.is_own.iter().enumerate().map(here).min().unwrap_or_default();
        if passed > self.passed {
            rows.put_passed(passed);
            self.passed = passed;
        }
    }
}

fn least(positions: &[u64]) -> u64 {
    positions.iter().copied().min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partitioning::{KeyHash, Partitioning};
    use crate::store::Store;

    /// Two projectors of a log whose offsets count over all partitions.
    struct World {
        _folder: tempfile::TempDir,
        store: Store,
        front: watch::Sender<Positions>,
        shares: Vec<Share>,
        /// Where each is, as it knows itself.
        committed: [Positions; 2],
    }

    const WITHIN: [u32; 6] = [0, 1, 0, 1, 0, 1];

    impl World {
        fn new() -> World {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut store = Store::open(folder.path()).expect("it opens");
            store.begin("e", Partitioning::new(KeyHash::Crc32, 2), &[], &[0; 6]).expect("it begins");
            let front = watch::Sender::new(vec![0; 6]);
            let shares = Share::all(2, &WITHIN, &front);
            World { _folder: folder, store, front, shares, committed: [vec![0; 6], vec![0; 6]] }
        }

        /// A projector commits what it has read of one of its partitions, where the log goes on at `until`. Both commit what
        /// they made at the same moment, the first one last, if it is of both.
        fn commit(&mut self, of: &[(usize, usize, u64)]) {
            let World { store, front, shares, committed, .. } = self;
            let mut made = Vec::new();
            for (number, partition, until) in of {
                let (mut rows, after) = (store.batch(), vec![*until; 6]);
                let positions = (&committed[*number][..], &after[..]);
                shares[*number].put_positions(&mut rows, positions, |it| it == *partition);
                made.push((rows, *number, after));
            }
            for (rows, number, after) in made.into_iter().rev() {
                store.commit(rows).expect("it commits");
                let own = &shares[number].partitions;
                front.send_modify(|known| own.iter().for_each(|it| known[*it as usize] = after[*it as usize]));
                committed[number] = after;
            }
        }

        fn positions(&self) -> Positions {
            let progress = self.store.progress().expect("it is read").expect("it was begun");
            progress.iter().map(|it| it.next).collect()
        }
    }

    #[test]
    fn each_partition_has_one_owner_in_all_topics() {
        let shares = Share::all(2, &WITHIN, &watch::Sender::new(vec![0; 6]));
        let partitions: Vec<_> = shares.iter().map(|share| share.partitions.clone()).collect();
        assert_eq!(partitions, [vec![0, 2, 4], vec![1, 3, 5]]);
    }

    #[test]
    fn what_is_said_of_all_partitions_is_what_the_slowest_has_come_to() {
        let mut world = World::new();
        world.commit(&[(0, 0, 100)]);
        assert_eq!(world.positions(), [100, 0, 0, 0, 0, 0], "only of what it has read is more known");
        world.commit(&[(1, 1, 90)]);
        assert_eq!(world.positions(), [100, 90, 90, 90, 90, 90]);
        world.commit(&[(0, 2, 200)]);
        assert_eq!(world.positions(), [100, 90, 200, 90, 90, 90]);
        world.commit(&[(1, 3, 210)]);
        assert_eq!(world.positions(), [200, 200, 200, 210, 200, 200]);
    }

    #[test]
    fn where_two_commit_at_once_no_partition_goes_back_behind_what_was_read_of_it() {
        let mut world = World::new();
        world.commit(&[(0, 0, 100)]);
        world.commit(&[(1, 1, 100)]);
        world.commit(&[(0, 2, 180), (1, 3, 150)]);
        assert_eq!(world.positions(), [100, 100, 180, 150, 100, 100]);
        // The second says 180 of all, since that is where the first is, and then the first says 150 of all.
        world.commit(&[(0, 4, 310), (1, 1, 400)]);
        assert_eq!(world.positions(), [150, 400, 180, 150, 310, 150]);
    }
}
