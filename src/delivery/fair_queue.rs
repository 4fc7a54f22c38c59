//! What waits for one socket, and which of it goes next.
//!
//! - Within a subscription the order is kept: what was pushed first goes first.
//! - While everything that waits has one priority, it goes in the order in which it was pushed.
//! - Otherwise [`class_of_turn`] says which priority has the turn. The subscription with the oldest event of that priority
//!   then gives the oldest thing it has waiting, whatever that is: so its order is kept, and the event with the turn comes
//!   nearer.
//! - A notice without a subscription is not overtaken by anything pushed after it.

use std::collections::{HashSet, VecDeque};

use crate::protocol::event::Priority;

/// A subscription's number within its session; never used twice.
pub type SubId = u32;

/// How many of the newest items [`FairQueue::newest_of`] looks through.
const NEWEST: usize = 256;

/// The class of priority that has this turn, of those for which something waits: of eight turns the lowest gets one, the
/// middle one gets one, and the highest gets the others. So no class waits for ever.
pub fn class_of_turn(turn: u32, waiting: [bool; Priority::CLASSES]) -> Option<usize> {
    let mut classes = (0..Priority::CLASSES).filter(|class| waiting[*class]);
    let highest = classes.next()?;
    let lowest = classes.next_back().unwrap_or(highest);
    let middle = classes.next().unwrap_or(highest);
    Some(match turn % 8 {
        0 => lowest,
        4 => middle,
        _ => highest,
    })
}

#[derive(Debug)]
struct Waiting<T> {
    /// `None` for a notice of the whole session.
    sub: Option<SubId>,
    /// An event's class of priority. Anything else has none, and goes along with the events around it.
    class: Option<u8>,
    item: T,
}

#[derive(Debug)]
pub struct FairQueue<T> {
    waiting: VecDeque<Waiting<T>>,
    /// How many events of each class wait.
    classes: [usize; Priority::CLASSES],
    turn: u32,
}

impl<T> Default for FairQueue<T> {
    fn default() -> FairQueue<T> {
        FairQueue { waiting: VecDeque::new(), classes: [0; Priority::CLASSES], turn: 0 }
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

    /// Removes the item that has the turn.
    pub fn pop(&mut self) -> Option<T> {
        self.turn = self.turn.wrapping_add(1);
        self.remove(self.next())
    }

    /// Removes the oldest item that fits, past all others.
    pub fn pop_first(&mut self, fits: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.waiting.iter().position(|it| fits(&it.item))?;
        self.remove(at)
    }

    /// The newest item of the subscription that fits, if it is among the newest of all.
    pub fn newest_of(&mut self, sub: SubId, fits: impl Fn(&T) -> bool) -> Option<&mut T> {
        let mut newest = self.waiting.iter_mut().rev().take(NEWEST);
        let found = newest.find(|it| it.sub == Some(sub) && fits(&it.item))?;
        Some(&mut found.item)
    }

    /// Whether [`FairQueue::pop_in_order`] would give one.
    pub fn any_in_order(&self, fits: impl Fn(&T) -> bool) -> bool {
        self.first_in_order(fits).is_some()
    }

    /// Removes the oldest item that fits and overtakes nothing of its own subscription.
    pub fn pop_in_order(&mut self, fits: impl Fn(&T) -> bool) -> Option<T> {
        self.remove(self.first_in_order(fits)?)
    }

    fn first_in_order(&self, fits: impl Fn(&T) -> bool) -> Option<usize> {
        let mut held_up = HashSet::new();
        for (at, it) in self.waiting.iter().enumerate() {
            if !fits(&it.item) {
                held_up.insert(it.sub);
            } else if !held_up.contains(&it.sub) {
                return Some(at);
            }
        }
        None
    }

    /// The index of the item that has the turn.
    fn next(&self) -> usize {
        // Something without a class would never have a turn of its own: at the front it goes at once.
        if self.waiting.front().is_none_or(|front| front.class.is_none()) {
            return 0;
        }
        let Some(class) = class_of_turn(self.turn, self.classes.map(|waiting| waiting > 0)) else { return 0 };

        let oldest = self.waiting.iter().find(|it| it.class == Some(class as u8));
        let sub = oldest.and_then(|it| it.sub);
        self.waiting.iter().position(|it| it.sub.is_none() || it.sub == sub).unwrap_or(0)
    }

    fn remove(&mut self, at: usize) -> Option<T> {
        let removed = if at == 0 { self.waiting.pop_front() } else { self.waiting.remove(at) }?;
        if let Some(class) = removed.class {
            self.classes[usize::from(class)] -= 1;
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 64 {
            // An idle session does not keep the memory of the burst that it once had.
            self.waiting = VecDeque::new();
        }
        Some(removed.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH: Option<usize> = Some(0);
    const NORMAL: Option<usize> = Some(1);
    const LOW: Option<usize> = Some(2);

    fn queue(items: &[(SubId, Option<usize>, u64)]) -> FairQueue<(SubId, u64)> {
        let mut queue = FairQueue::default();
        items.iter().for_each(|(sub, class, seq)| queue.push(Some(*sub), *class, (*sub, *seq)));
        queue
    }

    fn drain(queue: &mut FairQueue<(SubId, u64)>) -> Vec<(SubId, u64)> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn of_eight_turns_the_lowest_class_gets_one_and_the_middle_one_gets_one() {
        let turns = |waiting| (1..=8).map(|turn| class_of_turn(turn, waiting).expect("some wait")).collect::<Vec<_>>();
        assert_eq!(turns([true, true, true]), [0, 0, 0, 1, 0, 0, 0, 2]);
        assert_eq!(turns([true, false, true]), [0, 0, 0, 0, 0, 0, 0, 2], "of two there is no middle one");
        assert_eq!(turns([false, true, true]), [1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(turns([false, true, false]), [1; 8]);
        assert_eq!(class_of_turn(1, [false; Priority::CLASSES]), None);
    }

    #[test]
    fn with_one_priority_events_go_in_the_order_in_which_they_came() {
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
    fn a_notice_without_a_subscription_is_not_overtaken_by_later_events() {
        let mut queue = queue(&[(1, LOW, 1)]);
        queue.push(None, None, (0, 0));
        queue.push(Some(2), HIGH, (2, 1));
        assert_eq!(drain(&mut queue), [(0, 0), (2, 1), (1, 1)]);
    }

    #[test]
    fn what_goes_past_others_does_not_go_past_its_own_subscription() {
        let mut queue = queue(&[(1, NORMAL, 1), (1, None, 100), (2, None, 101), (2, NORMAL, 2)]);
        let notice = |item: &(SubId, u64)| item.1 >= 100;
        assert_eq!(queue.pop_in_order(notice), Some((2, 101)));
        assert!(!queue.any_in_order(notice), "the other one has an event before it");
        assert_eq!(queue.pop_first(notice), Some((1, 100)));
    }
}
