//! Why work waits: how much of its time was spent on what. Pure: time comes in.

use crate::protocol::work::Wait;

/// How long something has held so far, over all its times.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stopwatch {
    total: u64,
    since: Option<u64>,
}

impl Stopwatch {
    pub fn set(&mut self, on: bool, now: u64) {
        match (self.since, on) {
            (None, true) => self.since = Some(now),
            (Some(since), false) => {
                self.total += now.saturating_sub(since);
                self.since = None;
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    pub fn read(&self, now: u64) -> u64 {
        self.total + self.since.map_or(0, |since| now.saturating_sub(since))
    }
}

/// What holds up all work of a group alike.
#[derive(Debug, Clone, Copy, Default)]
pub struct Holds {
    pub no_worker: Stopwatch,
    pub paused: Stopwatch,
}

/// How the wait of one event has gone so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Waiting {
    /// Since when it waits.
    pub since: u64,
    /// What is known of the time before it could be taken.
    pub before: Wait,
    /// Since when it could be taken, and what the group's clocks said then.
    ready: Option<(u64, u64, u64)>,
    /// When a lease was asked for.
    chosen: Option<u64>,
}

impl Waiting {
    pub fn new(since: u64, before: Wait) -> Waiting {
        Waiting { since, before, ready: None, chosen: None }
    }

    /// From now on it could be taken.
    pub fn is_ready(&mut self, holds: &Holds, now: u64) {
        self.ready.get_or_insert((now, holds.no_worker.read(now), holds.paused.read(now)));
    }

    /// It is chosen: what follows is the log's time.
    pub fn is_chosen(&mut self, holds: &Holds, now: u64) {
        self.account(holds, now);
        self.chosen = Some(now);
    }

    /// It cannot be taken any more, for now.
    pub fn is_held(&mut self, holds: &Holds, now: u64) {
        self.account(holds, now);
    }

    /// It was not given after all.
    pub fn is_refused(&mut self, holds: &Holds, now: u64) {
        if let Some(chosen) = self.chosen.take() {
            self.before.log_ms += now.saturating_sub(chosen);
        }
        self.is_ready(holds, now);
    }

    /// It is given: how long it waited, and for what.
    pub fn is_given(&self, now: u64) -> (u64, Wait) {
        let mut wait = self.before;
        wait.log_ms += self.chosen.map_or(0, |chosen| now.saturating_sub(chosen));
        (now.saturating_sub(self.since).max(wait.total()), wait)
    }

    fn account(&mut self, holds: &Holds, now: u64) {
        let Some((ready, no_worker, paused)) = self.ready.take() else { return };
        let all = now.saturating_sub(ready);
        let paused = holds.paused.read(now).saturating_sub(paused).min(all);
        let no_worker = holds.no_worker.read(now).saturating_sub(no_worker).min(all - paused);
        self.before.paused_ms += paused;
        self.before.no_worker_ms += no_worker;
        self.before.fairness_ms += all - paused - no_worker;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_moment_of_a_wait_is_accounted_for_once() {
        let mut holds = Holds::default();
        // It arrived at 1,000, its thread was busy until 1,200, and it was tried again after a backoff of 50.
        let mut waiting = Waiting::new(1_000, Wait { busy_ms: 200, backoff_ms: 50, ..Wait::default() });
        holds.no_worker.set(true, 1_100);
        waiting.is_ready(&holds, 1_250);
        holds.no_worker.set(false, 1_300);
        holds.paused.set(true, 1_320);
        holds.paused.set(true, 1_330);
        holds.paused.set(false, 1_400);
        waiting.is_chosen(&holds, 1_430);
        waiting.is_refused(&holds, 1_435);
        waiting.is_chosen(&holds, 1_440);
        let (waited, wait) = waiting.is_given(1_444);
        let expected =
            Wait { busy_ms: 200, backoff_ms: 50, no_worker_ms: 50, paused_ms: 80, fairness_ms: 55, log_ms: 9 };
        assert_eq!((waited, wait), (444, expected));
        assert_eq!(wait.total(), waited);
    }
}
