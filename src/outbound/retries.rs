//! When a call is made again: after a pause, and only while few are. Pure but for the jitter.

use std::time::Duration;

use crate::clock;

/// Calls that earn one retry.
const CALLS_A_RETRY: u32 = 10;
/// Retries that can be saved up.
const MOST: u32 = 10;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(800);

/// At most a tenth more calls than without retries: a service that fails for want of capacity is not asked twice as much for
/// that.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// In tenths of a retry.
    saved: u32,
}

impl RetryBudget {
    /// A call is made for the first time.
    pub fn earn(&mut self) {
        self.saved = (self.saved + 1).min(MOST * CALLS_A_RETRY);
    }

    /// Whether a call may be made once more.
    pub fn spend(&mut self) -> bool {
        let enough = self.saved >= CALLS_A_RETRY;
        if enough {
            self.saved -= CALLS_A_RETRY;
        }
        enough
    }
}

/// How long to wait after so many failed attempts: twice as long each time, and shorter by chance, so that those who failed
/// together do not come back together.
pub fn pause(failed: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << failed.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    longest.mul_f64(0.5 + clock::random_share() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_tenth_of_the_calls_are_made_again() {
        let mut budget = RetryBudget::default();
        let mut retries = 0;
        for calls in 1..=1_000u32 {
            budget.earn();
            retries += u32::from(budget.spend());
            assert!(retries * 10 <= calls, "{retries} of {calls}");
        }
        assert_eq!(retries, 100);
    }

    #[test]
    fn what_was_saved_in_good_times_is_bounded() {
        let mut budget = RetryBudget::default();
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 10);
    }

    #[test]
    fn pauses_grow_and_are_never_the_longest_for_all() {
        for (failed, longest) in [(1, 50), (2, 100), (3, 200), (5, 800), (30, 800)] {
            let longest = Duration::from_millis(longest);
            let pauses: Vec<Duration> = (0..100).map(|_| pause(failed)).collect();
            assert!(pauses.iter().all(|it| *it <= longest && *it >= longest / 2), "{failed}");
            assert!(pauses.iter().any(|it| *it != pauses[0]), "by chance");
        }
    }
}
