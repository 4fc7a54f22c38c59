//! A replay at a pace: a thread's events as far apart as they happened, some times as fast. Pure; time comes in.
//!
//! Its clock stands at the time of the first event when that is found, and runs from there at the replay's speed, whether the
//! client keeps up or not; so events do not drift, however long each takes on its way. What is not due stays in the store.

use std::time::Duration;

use tokio::time::Instant;

/// What a replay at a pace was asked for.
#[derive(Debug, Clone, Copy)]
pub struct NewPace {
    pub speed: f64,
    /// The replay's last seq: what the client said, or the head when it asked.
    pub last: u64,
    /// Only what happened up to then, in ms since the Unix epoch.
    pub until_ms: Option<u64>,
    /// The subscription ends with the replay, and does not go on live.
    pub ends: bool,
}

/// What comes next in the replay.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Events may be due.
    Read,
    /// Nothing is due before.
    Wait(Instant),
    /// All of it was read, and the subscription goes on as any other one does.
    GoOn,
    /// All of it was read, and that was all that the client wanted.
    End,
}

pub(super) struct Pace {
    wanted: NewPace,
    /// When the first event was found, and when it had happened, in ms since the Unix epoch.
    begun: Option<(Instant, u64)>,
    /// When the next event happened, once it was found and was not due.
    next_ms: Option<u64>,
}

impl Pace {
    pub fn new(wanted: NewPace) -> Pace {
        Pace { wanted, begun: None, next_ms: None }
    }

    pub fn last(&self) -> u64 {
        self.wanted.last
    }

    /// With everything up to `cursor` read: what is next.
    pub fn step(&self, cursor: u64, now: Instant) -> Step {
        let is_over = match (self.wanted.until_ms, self.next_ms) {
            (Some(until), Some(next)) => next > until,
            _ => false,
        };
        if is_over || cursor >= self.wanted.last {
            return if self.wanted.ends { Step::End } else { Step::GoOn };
        }
        match self.next_ms.and_then(|next| self.due(next)).filter(|due| *due > now) {
            Some(due) => Step::Wait(due),
            None => Step::Read,
        }
    }

    /// A read brought all that was due; `next_ms` is when the event after that happened.
    pub fn read(&mut self, next_ms: Option<u64>, now: Instant) {
        self.begun = self.begun.or(next_ms.map(|first| (now, first)));
        self.next_ms = next_ms;
    }

    /// What the replay's clock shows: nothing is due before its first event was found.
    pub fn clock(&self, now: Instant) -> u64 {
        let Some((begun, first)) = self.begun else { return 0 };
        let passed = (now - begun).as_secs_f64() * 1_000.0 * self.wanted.speed;
        // Beyond all times is as good as the last one.
        let shows = first.saturating_add(passed as u64);
        self.wanted.until_ms.map_or(shows, |until| shows.min(until))
    }

    /// When the clock shows this time.
    fn due(&self, at_ms: u64) -> Option<Instant> {
        let (begun, first) = self.begun?;
        let wait = at_ms.saturating_sub(first) as f64 / 1_000.0 / self.wanted.speed;
        // A wait that no clock can show is one of a century.
        const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
        Some(begun + Duration::try_from_secs_f64(wait).unwrap_or(CENTURY).min(CENTURY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(speed: f64, until_ms: Option<u64>, ends: bool) -> Pace {
        Pace::new(NewPace { speed, last: 10, until_ms, ends })
    }

    #[test]
    fn events_are_due_as_far_apart_as_they_happened_by_the_speed() {
        let begin = Instant::now();
        let mut pace = pace(4.0, None, false);
        assert_eq!((pace.step(0, begin), pace.clock(begin)), (Step::Read, 0));
        pace.read(Some(1_000), begin);
        assert_eq!((pace.step(0, begin), pace.clock(begin)), (Step::Read, 1_000));
        pace.read(Some(5_000), begin);
        let due = begin + Duration::from_secs(1);
        assert_eq!(pace.step(1, begin), Step::Wait(due));
        assert_eq!((pace.step(1, due), pace.clock(due)), (Step::Read, 5_000));

        // A read that came late changes nothing in when the next one is due.
        pace.read(Some(9_000), due + Duration::from_millis(300));
        assert_eq!(pace.step(2, due), Step::Wait(begin + Duration::from_secs(2)));
    }

    #[test]
    fn after_its_last_event_a_replay_goes_on_live_or_ends() {
        let begin = Instant::now();
        assert_eq!(pace(1.0, None, false).step(10, begin), Step::GoOn);
        assert_eq!(pace(1.0, None, true).step(10, begin), Step::End);
    }

    #[test]
    fn a_replay_up_to_a_time_ends_before_the_first_event_after_it() {
        let begin = Instant::now();
        let mut pace = pace(1_000.0, Some(2_000), true);
        pace.read(Some(1_000), begin);
        // Its clock does not show a later time, so that no read brings later events.
        let later = begin + Duration::from_secs(5);
        assert_eq!((pace.step(0, later), pace.clock(later)), (Step::Read, 2_000));
        pace.read(Some(2_001), later);
        assert_eq!(pace.step(3, later), Step::End);
    }

    #[test]
    fn times_beyond_all_clocks_are_waits_and_not_panics() {
        let begin = Instant::now();
        let mut pace = pace(0.01, None, false);
        pace.read(Some(0), begin);
        pace.read(Some(u64::MAX), begin);
        assert!(matches!(pace.step(1, begin), Step::Wait(due) if due > begin));
    }

    #[test]
    fn events_whose_time_is_before_the_first_one_are_due_at_once() {
        let begin = Instant::now();
        let mut pace = pace(1.0, None, false);
        pace.read(Some(9_000), begin);
        pace.read(Some(8_000), begin);
        assert_eq!((pace.step(1, begin), pace.clock(begin)), (Step::Read, 9_000));
    }
}
