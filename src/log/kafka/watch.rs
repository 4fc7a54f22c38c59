//! Whether a reader is left behind. After its broker hung, or another one became the leader, librdkafka may not fetch a
//! partition any more, and says nothing about it. So the monitor looks every few seconds where the log ends, and a reader
//! that stood still before an end that was there at the look before begins anew.

use crate::log::{Position, Positions};

/// After how many looks, at most, a reader begins anew once more if it did not help.
const LONGEST_REST: u32 = 63;

/// Where each partition ended when the monitor looked.
#[derive(Default)]
pub(super) struct Look {
    /// Counts the looks. 0: none yet.
    pub(super) number: u64,
    pub(super) ends: Positions,
}

/// A reader's view of the looks.
#[derive(Default)]
pub(super) struct Watch {
    /// The last one, and where the reader was then.
    number: u64,
    ends: Positions,
    at: Positions,
    /// Since then the consumer once had nothing to give. One that was not asked, or gave all the time, stands still for
    /// other reasons.
    ran_dry: bool,
    /// How many looks are let pass now, and how many the next time.
    rest: u32,
    next_rest: u32,
}

impl Watch {
    pub(super) fn ran_dry(&mut self) {
        self.ran_dry = true;
    }

    pub(super) fn is_new(&self, look: &Look) -> bool {
        look.number != self.number
    }

    /// The first partition that stood still since the last look, though there was more of it, if the reader should begin
    /// anew. Where that did not help, it is let be for longer each time.
    pub(super) fn left_behind(&mut self, look: &Look, at: &[u64]) -> Option<Position> {
        let mut partitions = (0..).zip(at).zip(self.at.iter().zip(&self.ends));
        let stands = |((_, now), (before, end)): &((u32, &u64), (&u64, &u64))| now == before && now < end;
        let found = if self.ran_dry { partitions.find(stands) } else { None };
        let found = found.map(|((partition, &offset), _)| Position { partition, offset });

        self.number = look.number;
        self.ends.clone_from(&look.ends);
        self.at = at.to_vec();
        self.ran_dry = false;
        if found.is_none() {
            (self.rest, self.next_rest) = (0, 0);
        } else if self.rest > 0 {
            self.rest -= 1;
            return None;
        } else {
            self.next_rest = (2 * self.next_rest + 1).min(LONGEST_REST);
            self.rest = self.next_rest;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a log whose three partitions end at `ends`, after the consumer ran dry.
    fn look(watch: &mut Watch, ends: [u64; 3], at: [u64; 3]) -> Option<u32> {
        watch.ran_dry();
        let look = Look { number: watch.number + 1, ends: ends.to_vec() };
        assert!(watch.is_new(&look));
        let found = watch.left_behind(&look, &at);
        assert!(!watch.is_new(&look));
        found.map(|at| at.partition)
    }

    #[test]
    fn a_partition_that_stands_still_before_an_end_seen_earlier_is_found_beside_others_that_go_on() {
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, [5, 5, 5], [5, 3, 0]), None, "it is seen for the first time");
        assert_eq!(look(&mut watch, [9, 9, 9], [6, 3, 7]), Some(1));
        let mut watch = Watch::default();
        look(&mut watch, [5, 5, 5], [5, 5, 5]);
        assert_eq!(look(&mut watch, [9, 9, 9], [5, 5, 5]), None, "what came since may be on its way");
    }

    #[test]
    fn a_reader_that_is_not_asked_or_always_has_more_is_not_left_behind() {
        let mut watch = Watch::default();
        look(&mut watch, [5; 3], [1; 3]);
        let next = Look { number: 9, ends: vec![5; 3] };
        assert_eq!(watch.left_behind(&next, &[1; 3]), None);
    }

    #[test]
    fn where_beginning_anew_does_not_help_it_is_tried_less_and_less_often() {
        let mut watch = Watch::default();
        look(&mut watch, [5; 3], [1; 3]);
        let tried = |watch: &mut Watch, looks| (0..looks).filter(|_| look(watch, [5; 3], [1; 3]).is_some()).count();
        assert_eq!((tried(&mut watch, 1), tried(&mut watch, 1), tried(&mut watch, 1)), (1, 0, 1));
        assert!((2..9).contains(&tried(&mut watch, 130)));
        assert_eq!(look(&mut watch, [5; 3], [5; 3]), None);
        assert_eq!(look(&mut watch, [8; 3], [5; 3]), None);
        assert_eq!(look(&mut watch, [8; 3], [5; 3]), Some(0), "a later one is found at once");
    }
}
