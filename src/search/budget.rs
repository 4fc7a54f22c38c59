//! How much work a search may do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Steps between two looks at the clock: each is an event, a word, or a block of a word's events.
pub const STRIDE: u32 = 512;

/// How much work a search may still do, in time of its thread: all of the search works off one.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Work>);

#[derive(Debug)]
struct Work {
    until: Duration,
    steps: AtomicU32,
    spent: AtomicBool,
}

impl Budget {
    pub fn new(work: Duration) -> Budget {
        Budget(Arc::new(Work { until: thread_time() + work, steps: AtomicU32::new(0), spent: AtomicBool::new(false) }))
    }

    pub fn is_spent(&self) -> bool {
        let is_spent = self.was_spent() || thread_time() >= self.0.until;
        self.0.spent.store(is_spent, Ordering::Relaxed);
        is_spent
    }

    /// Counts work, and looks at the clock now and then; says whether the budget is spent.
    pub fn spend(&self, steps: usize) -> bool {
        // One thread counts: nothing is lost between these two.
        let steps = self.0.steps.load(Ordering::Relaxed).saturating_add(u32::try_from(steps).unwrap_or(STRIDE));
        self.0.steps.store(if steps < STRIDE { steps } else { 0 }, Ordering::Relaxed);
        if steps < STRIDE { self.was_spent() } else { self.is_spent() }
    }

    /// Whether something was left undone for it.
    pub fn was_spent(&self) -> bool {
        self.0.spent.load(Ordering::Relaxed)
    }
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_spent_by_work() {
        let budget = Budget::new(Duration::ZERO);
        assert!(!budget.was_spent() && budget.is_spent() && budget.was_spent());
        assert!(!Budget::new(Duration::from_secs(600)).is_spent());
        let budget = Budget::new(Duration::ZERO);
        assert!(!budget.spend(STRIDE as usize - 1), "the clock is not looked at for each step");
        assert!(budget.spend(1) && budget.clone().spend(0) && budget.was_spent());
    }
}
