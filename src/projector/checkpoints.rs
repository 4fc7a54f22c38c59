//! Nodes that read one log make the same of it, or notice.
//!
//! Of each partition of events the projector keeps a hash over all that it accepted there, in log order:
//! `h = BLAKE3(h ‖ the thread's newest hash)`, one step for each record that added to a thread. A thread's hash covers the
//! seqs and the values before it, so this covers them for all threads of the partition. It is kept with the partition's
//! position, and so does not depend on where a batch ends or a node was started again.
//!
//! Every [`EVERY`] offsets there is a boundary. A node writes its hash at one, now and then, into that partition. One that
//! reads it and has another hash there stops before it commits anything more. Of a boundary the first hash in the log
//! counts: where two nodes write, each judges by the same one, and one of them goes on.
//!
//! Only boundaries that a node crosses live are compared. What it reads to catch up, or in a rebuild, it makes of the log
//! alone: so a wrong checkpoint that stays in the log stops nobody who comes later.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::log::{Checkpoint, Log};
use crate::telemetry;

/// Offsets between two boundaries of a partition.
const EVERY: u64 = 256;
/// Boundaries of each partition whose hashes are kept: a checkpoint is this late at most.
const RECENT: usize = 128;
/// A node writes no more often than this into a partition, and not while another one does.
const WRITE_EVERY: Duration = Duration::from_secs(60);

/// This node and another one made different things of the same records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node and the node {node} made different things of the events in partition {partition} before offset {offset}; \
     one of them is wrong. Stop this one and run `weft rebuild --check` on both, then `weft rebuild` where they differ from \
     the log; this one needs `weft rebuild` in any case"
)]
pub struct Disagreement {
    pub partition: u32,
    pub offset: u64,
    pub node: String,
}

#[derive(Clone)]
struct Boundary {
    offset: u64,
    hash: [u8; 32],
    /// The first checkpoint there has been read.
    compared: bool,
}

/// One partition's boundaries.
#[derive(Clone, Default)]
struct Recent {
    /// The newest boundary before the partition's position.
    newest: u64,
    boundaries: VecDeque<Boundary>,
}

/// What a boundary's hash is written as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crossed {
    pub partition: u32,
    pub offset: u64,
    pub hash: [u8; 32],
}

/// The newest boundaries of all partitions of events.
#[derive(Clone)]
pub(super) struct Checkpoints {
    epoch: String,
    partitions: Vec<Recent>,
    /// Before that, boundaries are not kept.
    live: bool,
    /// What the batch has changed: boundaries that were crossed, and the partition and offset of those compared.
    crossed: Vec<u32>,
    compared: Vec<(u32, u64)>,
}

/// The hash after one more record was accepted, which left its thread with this hash.
pub(super) fn link(hash: &[u8; 32], thread: &[u8; 32]) -> [u8; 32] {
    *blake3::Hasher::new().update(hash).update(thread).finalize().as_bytes()
}

impl Checkpoints {
    /// `positions` are those of the partitions of events.
    pub(super) fn new(epoch: String, positions: impl Iterator<Item = u64>) -> Checkpoints {
        let recent = |next: u64| Recent { newest: next / EVERY * EVERY, ..Recent::default() };
        let partitions = positions.map(recent).collect();
        Checkpoints { epoch, partitions, live: false, crossed: Vec::new(), compared: Vec::new() }
    }

    /// From here on boundaries are kept and compared.
    pub(super) fn go_live(&mut self) {
        self.live = true;
    }

    /// The record at `offset` comes next; what was accepted before it has this hash.
    pub(super) fn cross(&mut self, partition: u32, offset: u64, hash: &[u8; 32]) {
        let Some(recent) = self.partitions.get_mut(partition as usize) else { return };
        let boundary = offset / EVERY * EVERY;
        if boundary <= recent.newest {
            return;
        }
        recent.newest = boundary;
        if self.live {
            recent.boundaries.push_back(Boundary { offset: boundary, hash: *hash, compared: false });
            self.crossed.push(partition);
        }
    }

    /// Compares what a node has made of the log with what this one has, if it still knows.
    pub(super) fn compare(&mut self, partition: u32, theirs: &Checkpoint) -> Result<(), Disagreement> {
        if theirs.epoch != self.epoch || theirs.partition != partition {
            return Ok(());
        }
        let Some(recent) = self.partitions.get_mut(partition as usize) else { return Ok(()) };
        let known = recent.boundaries.iter_mut().find(|it| it.offset == theirs.offset && !it.compared);
        let Some(ours) = known else { return Ok(()) };
        if ours.hash != theirs.hash {
            return Err(Disagreement { partition, offset: theirs.offset, node: theirs.node.clone() });
        }
        ours.compared = true;
        self.compared.push((partition, theirs.offset));
        Ok(())
    }

    /// The batch is committed: gives the newest boundary of each partition that it crossed and nobody has written, and the
    /// partitions in which this node and another one, or itself, agreed.
    pub(super) fn commit(&mut self) -> (Vec<Crossed>, Vec<u32>) {
        let mut crossed = std::mem::take(&mut self.crossed);
        crossed.sort_unstable();
        crossed.dedup();
        let mut due = Vec::with_capacity(crossed.len());
        for partition in crossed {
            let boundaries = &mut self.partitions[partition as usize].boundaries;
            let surplus = boundaries.len().saturating_sub(RECENT);
            boundaries.drain(..surplus);
            if let Some(newest) = boundaries.back().filter(|newest| !newest.compared) {
                due.push(Crossed { partition, offset: newest.offset, hash: newest.hash });
            }
        }
        (due, self.compared.drain(..).map(|(partition, _)| partition).collect())
    }

    /// The batch is not committed, and comes again.
    pub(super) fn roll_back(&mut self) {
        for (partition, offset) in self.compared.drain(..) {
            let boundaries = &mut self.partitions[partition as usize].boundaries;
            boundaries.iter_mut().filter(|it| it.offset == offset).for_each(|it| it.compared = false);
        }
        for partition in self.crossed.drain(..) {
            let recent = &mut self.partitions[partition as usize];
            if let Some(boundary) = recent.boundaries.pop_back() {
                // Crossed again when the records come again; `newest` only has to be before it.
                recent.newest = boundary.offset - EVERY;
            }
        }
    }
}

/// Decides when this node writes a checkpoint.
pub(super) struct Pace {
    last: Vec<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(partitions: u32) -> Pace {
        Pace { last: vec![None; partitions as usize] }
    }

    /// Writes what is due, where nobody has written for a while.
    pub(super) fn write(&mut self, log: &dyn Log, due: Vec<Crossed>, agreed: Vec<u32>) {
        for partition in agreed {
            telemetry::checkpoints("agreed").increment(1);
            self.last[partition as usize] = Some(Instant::now());
        }
        for Crossed { partition, offset, hash } in due {
            let last = &mut self.last[partition as usize];
            if last.is_none_or(|last| last.elapsed() >= WRITE_EVERY) {
                *last = Some(Instant::now());
                telemetry::checkpoints("written").increment(1);
                log.append_checkpoint(partition, offset, &hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Checkpoints {
        let mut checkpoints = Checkpoints::new("e".into(), [0, 300].into_iter());
        checkpoints.go_live();
        checkpoints
    }

    fn theirs(partition: u32, offset: u64, hash: u8) -> Checkpoint {
        Checkpoint { epoch: "e".into(), node: "n".into(), partition, offset, hash: [hash; 32] }
    }

    #[test]
    fn the_first_record_at_or_after_a_boundary_crosses_it_once() {
        let mut checkpoints = live();
        for (offset, hash) in [(0, 0), (255, 1), (256, 2), (257, 3), (511, 4), (1_200, 5)] {
            checkpoints.cross(0, offset, &[hash; 32]);
        }
        checkpoints.cross(1, 511, &[9; 32]);
        let found: Vec<_> = checkpoints.partitions[0].boundaries.iter().map(|it| (it.offset, it.hash[0])).collect();
        assert_eq!(found, [(256, 2), (1_024, 5)]);
        assert!(checkpoints.partitions[1].boundaries.is_empty(), "that one was crossed before");
        assert_eq!(checkpoints.commit().0, [Crossed { partition: 0, offset: 1_024, hash: [5; 32] }]);
        assert_eq!(checkpoints.commit().0, []);
    }

    #[test]
    fn the_first_checkpoint_of_a_boundary_counts_and_no_other() {
        let mut checkpoints = live();
        checkpoints.cross(0, 256, &[2; 32]);
        assert_eq!(checkpoints.compare(0, &theirs(0, 256, 2)), Ok(()));
        assert_eq!(checkpoints.compare(0, &theirs(0, 256, 3)), Ok(()), "whoever wrote it stops");
        assert_eq!(checkpoints.commit(), (vec![], vec![0]), "it need not be written again");
        checkpoints.cross(0, 512, &[2; 32]);
        let differs = checkpoints.compare(0, &theirs(0, 512, 3)).expect_err("another hash");
        assert_eq!((differs.partition, differs.offset, &*differs.node), (0, 512, "n"));
        let of_another_generation = Checkpoint { epoch: "f".into(), ..theirs(0, 512, 3) };
        assert_eq!(checkpoints.compare(0, &of_another_generation), Ok(()));
        assert_eq!(checkpoints.compare(1, &theirs(0, 512, 3)), Ok(()), "it is not about this partition");
    }

    #[test]
    fn a_batch_that_fails_and_comes_again_is_compared_again() {
        let mut checkpoints = live();
        checkpoints.cross(0, 256, &[2; 32]);
        checkpoints.commit();
        for _ in 0..2 {
            checkpoints.cross(0, 600, &[3; 32]);
            assert_eq!(checkpoints.compare(0, &theirs(0, 256, 2)), Ok(()));
            assert_eq!(checkpoints.compare(0, &theirs(0, 512, 3)), Ok(()));
            checkpoints.roll_back();
        }
        assert!(checkpoints.compare(0, &theirs(0, 256, 7)).is_err());
        checkpoints.cross(0, 600, &[3; 32]);
        assert_eq!(checkpoints.commit().0, [Crossed { partition: 0, offset: 512, hash: [3; 32] }]);
    }

    #[test]
    fn what_was_crossed_while_catching_up_is_not_compared_and_memory_is_bounded() {
        let mut checkpoints = Checkpoints::new("e".into(), [0].into_iter());
        checkpoints.cross(0, 256, &[2; 32]);
        checkpoints.go_live();
        assert_eq!(checkpoints.compare(0, &theirs(0, 256, 3)), Ok(()));
        for n in 0..1_000 {
            checkpoints.cross(0, n * EVERY, &[1; 32]);
            checkpoints.commit();
        }
        assert_eq!(checkpoints.partitions[0].boundaries.len(), RECENT);
    }
}
