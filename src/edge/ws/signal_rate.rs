//! How many signals a session may send. One goes to everybody who is live in its thread, and costs its sender nothing but a
//! command, so signals have a limit of their own beside that of commands.

use std::time::Duration;

use tokio::time::Instant;

use crate::protocol::error::{Code, Error};

/// Signals a second in the long run, and as many at once: more than typing, reading and moving a cursor take.
const A_SECOND: u32 = 20;
/// What one signal costs, as time in which the bucket fills again.
const EACH: Duration = Duration::from_nanos(1_000_000_000 / A_SECOND as u64);
/// The whole bucket, as time.
const FULL: Duration = Duration::from_secs(1);

/// The bucket of one session.
#[derive(Debug)]
pub struct SignalRate {
    /// When the bucket is full again: the further ahead, the less is left in it.
    full_at: Instant,
}

impl SignalRate {
    pub fn new(now: Instant) -> SignalRate {
        SignalRate { full_at: now }
    }

    /// Counts a signal; one over the limit is refused, and counts for nothing.
    pub fn take(&mut self, now: Instant) -> Result<(), Error> {
        let full_at = self.full_at.max(now) + EACH;
        let over = (full_at - now).saturating_sub(FULL);
        if over.is_zero() {
            self.full_at = full_at;
            return Ok(());
        }
        // Rounded up: a client that comes back after this time must be let through.
        let ms = u64::try_from(over.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        Err(Error::new(Code::RateLimited, format!("the session's limit is {A_SECOND} signals a second"))
            .retry_after(ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_second_s_worth_at_once_then_a_refusal_that_says_when_to_come_back() {
        let mut now = Instant::now();
        let mut rate = SignalRate::new(now);
        assert!((0..A_SECOND).all(|_| rate.take(now).is_ok()));
        for _ in 0..3 {
            let refused = rate.take(now).expect_err("one more is too many");
            assert_eq!((refused.code, refused.retry_after_ms), (Code::RateLimited, Some(50)), "refusals cost nothing");
        }
        now += 49 * MS;
        assert_eq!(rate.take(now).expect_err("not yet").retry_after_ms, Some(1));
        now += MS;
        assert!(rate.take(now).is_ok() && rate.take(now).is_err());
        now += Duration::from_secs(3_600);
        assert_eq!((0..100).filter(|_| rate.take(now).is_ok()).count(), 20, "a bucket does not hold more");
    }
}
