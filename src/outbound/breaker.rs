//! A circuit breaker: who keeps failing is left alone for a while, so that nobody waits for it and it can recover.
//!
//! Pure: times come in.
//!
//! - *Closed*: calls are made. If half of the last 20 have failed, and 5 at least, it opens.
//! - *Open*: no call is made, for 1 s at first and twice as long after each trial that fails, up to 30 s.
//! - *Half-open*: after that one call is made as a trial. If it works the breaker closes, if not it opens again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Calls that are looked at.
const WINDOW: usize = 20;
/// Failures among them that it takes to open.
const FAILURES: usize = 5;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed,
    HalfOpen,
    Open,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::HalfOpen => "half_open",
            State::Open => "open",
        }
    }
}

/// A call that may be made. What becomes of it counts only while the breaker has not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit(u64);

#[derive(Debug)]
pub struct Breaker {
    /// Whether each of the last calls failed.
    failed: VecDeque<bool>,
    /// While it is not closed: when a trial may be made.
    until: Option<Instant>,
    pause: Duration,
    trial: bool,
    /// How often it has opened or closed, and how many trials were made.
    changes: u64,
}

impl Default for Breaker {
    fn default() -> Breaker {
        Breaker { failed: VecDeque::new(), until: None, pause: FIRST_PAUSE, trial: false, changes: 0 }
    }
}

impl Breaker {
    pub fn state(&self, now: Instant) -> State {
        match self.until {
            None => State::Closed,
            Some(until) if now < until => State::Open,
            Some(_) => State::HalfOpen,
        }
    }

    /// When to ask again, if no call may be made now.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        match self.until? {
            until if now < until => Some(until - now),
            _ => self.trial.then_some(FIRST_PAUSE),
        }
    }

    /// Whether a call may be made now; if not, when to ask again.
    pub fn admit(&mut self, now: Instant) -> Result<Permit, Duration> {
        if let Some(pause) = self.pause(now) {
            return Err(pause);
        }
        if self.until.is_some() {
            self.trial = true;
            self.changes += 1;
        }
        Ok(Permit(self.changes))
    }

    pub fn succeeded(&mut self, permit: Permit) {
        if permit.0 != self.changes {
            return;
        }
        if self.until.is_some() {
            let changes = self.changes + 1;
            *self = Breaker { changes, ..Breaker::default() };
        }
        self.record(false);
    }

    pub fn failed(&mut self, permit: Permit, now: Instant) {
        if permit.0 != self.changes {
            return;
        }
        if self.until.is_some() {
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.open(now);
            return;
        }
        self.record(true);
        let failures = self.failed.iter().filter(|failed| **failed).count();
        if failures >= FAILURES && failures * 2 >= self.failed.len() {
            self.open(now);
        }
    }

    /// Nothing became of the call. If it was the trial, another may be made.
    pub fn abandoned(&mut self, permit: Permit) {
        if permit.0 == self.changes {
            self.trial = false;
        }
    }

    fn open(&mut self, now: Instant) {
        self.failed.clear();
        self.until = Some(now + self.pause);
        self.trial = false;
        self.changes += 1;
    }

    fn record(&mut self, failed: bool) {
        if self.failed.len() == WINDOW {
            self.failed.pop_front();
        }
        self.failed.push_back(failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn call(breaker: &mut Breaker, now: Instant, works: bool) {
        let permit = breaker.admit(now).expect("a call may be made");
        if works { breaker.succeeded(permit) } else { breaker.failed(permit, now) }
    }

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        (0..5).for_each(|_| call(&mut breaker, now, false));
        breaker
    }

    #[test]
    fn it_opens_after_five_failures_lets_one_trial_through_and_closes_when_that_works() {
        let begin = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..4 {
            call(&mut breaker, begin, false);
            assert_eq!(breaker.state(begin), State::Closed);
        }
        call(&mut breaker, begin, false);
        assert_eq!((breaker.state(begin), breaker.admit(begin)), (State::Open, Err(S)));

        let later = begin + S;
        assert_eq!((breaker.state(later), breaker.pause(later)), (State::HalfOpen, None));
        let trial = breaker.admit(later).expect("the trial");
        assert!(breaker.admit(later).is_err(), "one trial at a time");
        assert_eq!(breaker.pause(later), Some(S));
        breaker.succeeded(trial);
        assert_eq!(breaker.state(later), State::Closed);
        call(&mut breaker, later, false);
        assert_eq!(breaker.state(later), State::Closed, "failures of before are forgotten");
    }

    #[test]
    fn each_trial_that_fails_doubles_the_pause_up_to_half_a_minute() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(breaker.admit(now), Err(seconds * S));
            now += seconds * S;
            call(&mut breaker, now, false);
        }
        now += 30 * S;
        call(&mut breaker, now, true);
        (0..5).for_each(|_| call(&mut breaker, now, false));
        assert_eq!(breaker.admit(now), Err(S), "it begins anew once it was closed");
    }

    #[test]
    fn a_service_that_fails_now_and_then_stays_in_use() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for n in 0..300 {
            call(&mut breaker, now, n % 3 > 0);
        }
        assert_eq!(breaker.state(now), State::Closed);
        for n in 0..20 {
            if breaker.state(now) == State::Closed {
                call(&mut breaker, now, n % 2 == 0);
            }
        }
        assert_eq!(breaker.state(now), State::Open, "every other call fails");
    }

    #[test]
    fn what_was_called_before_a_change_says_nothing_of_what_is_after_it() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let early = breaker.admit(now).expect("closed");
        (0..5).for_each(|_| call(&mut breaker, now, false));
        breaker.succeeded(early);
        assert_eq!(breaker.state(now), State::Open);

        let trial = breaker.admit(now + S).expect("the trial");
        breaker.abandoned(trial);
        let second = breaker.admit(now + S).expect("another trial");
        breaker.failed(trial, now + S);
        breaker.succeeded(second);
        assert_eq!(breaker.state(now + S), State::Closed);
    }
}
