//! A queue of what waits for one socket, and whose turn it is.
//!
//! As long as all that waits has one priority, it goes out as it came. Otherwise the turn is that of the subscription whose
//! waiting events include the highest one, and it gives its oldest, so that a thread keeps its order. Of eight turns one goes
//! to the lowest instead, and one to the priority between.

use std::collections::{HashSet, VecDeque};

use super::outbox::SubId;
use crate::protocol::event::Priority;

/// What came lately, looked at from the end.
const LATELY: usize = 256;

#[derive(Debug)]
struct Waiting<T> {
    /// What concerns no subscription goes before everything that came after it.
    sub: Option<SubId>,
    /// An event's class of priority; what is none goes with the events around it.
    class: Option<u8>,
    item: T,
}

#[derive(Debug)]
pub struct FairQueue<T> {
    waiting: VecDeque<Waiting<T>>,
    classes: [usize; Priority::CLASSES],
    /// FairQueue taken so far.
    taken: u32,
}

impl<T> Default for FairQueue<T> {
    fn default() -> FairQueue<T> {
        FairQueue { waiting: VecDeque::new(), classes: [0; Priority::CLASSES], taken: 0 }
    }
}

impl<T> FairQueue<T> {
    pub fn push(&mut self, sub: Option<SubId>, class: Option<usize>, item: T) {
        if let Some(class) = class {
            self.classes[class] += 1;
        }
        self.waiting.push_back(Waiting { sub, class: class.map(|class| class as u8), item });
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The highest class among the events that wait.
    pub fn class(&self) -> Option<usize> {
        self.classes.iter().position(|waiting| *waiting > 0)
    }

    /// Takes what has the turn.
    pub fn pop(&mut self) -> Option<T> {
        self.taken = self.taken.wrapping_add(1);
        self.remove(self.next(self.taken))
    }

    /// Takes the first that fits, past all others.
    pub fn pop_first(&mut self, fits: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.waiting.iter().position(|it| fits(&it.item))?;
        self.remove(at)
    }

    /// The newest that waits for the subscription and fits, of those that came lately.
    pub fn newest_of(&mut self, sub: SubId, fits: impl Fn(&T) -> bool) -> Option<&mut T> {
        let mut lately = self.waiting.iter_mut().rev().take(LATELY);
        lately.find(|it| it.sub == Some(sub) && fits(&it.item)).map(|it| &mut it.item)
    }

    /// Whether any fits.
    pub fn any(&self, fits: impl Fn(&T) -> bool) -> bool {
        self.waiting.iter().any(|it| fits(&it.item))
    }

    /// Where the first is that fits and has nothing before it of the same subscription that does not.
    pub fn first_in_order(&self, fits: impl Fn(&T) -> bool) -> Option<usize> {
        let mut passed = HashSet::new();
        self.waiting.iter().position(|it| match fits(&it.item) {
            true => !passed.contains(&it.sub),
            false => {
                passed.insert(it.sub);
                false
            }
        })
    }

    /// Takes that one.
    pub fn pop_in_order(&mut self, fits: impl Fn(&T) -> bool) -> Option<T> {
        self.remove(self.first_in_order(fits)?)
    }

    fn next(&self, turn: u32) -> usize {
        // What is no event has no class by which its turn would come.
        if self.waiting.front().is_none_or(|front| front.class.is_none()) {
            return 0;
        }
        let mut classes = (0..Priority::CLASSES).filter(|class| self.classes[*class] > 0);
        let (Some(highest), Some(lowest)) = (classes.next(), classes.next_back()) else { return 0 };
        let class = match turn % 8 {
            0 => lowest,
            4 => classes.next().unwrap_or(highest),
            _ => highest,
        };
        let whose = self.waiting.iter().find(|it| it.class == Some(class as u8)).and_then(|it| it.sub);
        self.waiting.iter().position(|it| it.sub.is_none() || it.sub == whose).unwrap_or(0)
    }

    fn remove(&mut self, at: usize) -> Option<T> {
        let taken = if at == 0 { self.waiting.pop_front() } else { self.waiting.remove(at) }?;
        if let Some(class) = taken.class {
            self.classes[usize::from(class)] -= 1;
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 64 {
            // An idle session keeps no room for the burst that it once had.
            self.waiting = VecDeque::new();
        }
        Some(taken.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH: Option<usize> = Some(0);
    const NORMAL: Option<usize> = Some(1);
    const LOW: Option<usize> = Some(2);

    fn queue(items: &[(SubId, Option<usize>, u64)]) -> FairQueue<(SubId, u64)> {
        let mut turns = FairQueue::default();
        items.iter().for_each(|(sub, class, seq)| turns.push(Some(*sub), *class, (*sub, *seq)));
        turns
    }

    fn drain(turns: &mut FairQueue<(SubId, u64)>) -> Vec<(SubId, u64)> {
        std::iter::from_fn(|| turns.pop()).collect()
    }

    #[test]
    fn with_one_priority_events_go_out_as_they_came() {
        let came = [(1, NORMAL, 1), (2, NORMAL, 1), (1, NORMAL, 2), (3, NORMAL, 1)];
        assert_eq!(drain(&mut queue(&came)), [(1, 1), (2, 1), (1, 2), (3, 1)]);
    }

    #[test]
    fn the_thread_with_the_highest_priority_goes_first_and_keeps_its_order() {
        let came = [(1, LOW, 1), (2, NORMAL, 1), (3, LOW, 1), (3, HIGH, 2)];
        assert_eq!(drain(&mut queue(&came)), [(3, 1), (3, 2), (2, 1), (1, 1)]);
    }

    #[test]
    fn low_gets_an_eighth_of_the_turns_and_normal_as_well() {
        let flood = (1..=80).map(|seq| (1, HIGH, seq));
        let came: Vec<_> =
            flood.chain((1..=10).map(|seq| (2, LOW, seq))).chain((1..=10).map(|seq| (3, NORMAL, seq))).collect();
        let sent = drain(&mut queue(&came));
        let turns_of = |sub| (0..72).filter(|at| sent[*at].0 == sub).map(|at| at + 1).collect::<Vec<_>>();
        assert_eq!(turns_of(2), [8, 16, 24, 32, 40, 48, 56, 64, 72]);
        assert_eq!(turns_of(3), [4, 12, 20, 28, 36, 44, 52, 60, 68]);
    }

    #[test]
    fn what_concerns_no_subscription_is_not_overtaken_by_later_events() {
        let mut turns = queue(&[(1, LOW, 1)]);
        turns.push(None, None, (0, 0));
        turns.push(Some(2), HIGH, (2, 1));
        assert_eq!(drain(&mut turns), [(0, 0), (2, 1), (1, 1)]);
    }
}
