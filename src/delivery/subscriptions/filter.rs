//! The kinds that a client wants, and how it learns of the events that are left out: by `position`, from time to time. Pure;
//! time comes in.

use std::sync::Arc;

use tokio::time::{Duration, Instant};

/// `position` is sent at most so often.
const POSITION_EVERY: Duration = Duration::from_secs(1);

/// The kinds a client wants, if not all.
pub type Kinds = Arc<[String]>;

pub(super) struct Filter {
    kinds: Kinds,
    /// When `position` was last sent.
    last_position: Instant,
    /// The newest seq that a frame to the client has named: it knows that it has everything up to there.
    known: u64,
    /// The newest seq that was left out.
    left_out: u64,
}

impl Filter {
    pub fn new(kinds: Kinds, now: Instant) -> Filter {
        Filter { kinds, last_position: now, known: 0, left_out: 0 }
    }

    pub fn wants(&self, kind: &str) -> bool {
        self.kinds.iter().any(|wanted| wanted == kind)
    }

    pub fn kinds(&self) -> Kinds {
        self.kinds.clone()
    }

    /// A frame names this seq.
    pub fn named(&mut self, seq: u64) {
        self.known = self.known.max(seq);
    }

    /// Leaves an event out; gives the time from which on `position` may be sent.
    pub fn leave_out(&mut self, seq: u64) -> Instant {
        self.left_out = self.left_out.max(seq);
        self.last_position + POSITION_EVERY
    }

    /// When `position` is due, if events were left out since the last frame.
    pub fn position_due(&self) -> Option<Instant> {
        (self.left_out > self.known).then(|| self.last_position + POSITION_EVERY)
    }

    /// Whether a `position` with this seq says anything new; it counts as sent then.
    pub fn send_position(&mut self, seq: u64, now: Instant) -> bool {
        let is_new = self.left_out > self.known && seq > self.known;
        if is_new {
            self.named(seq);
            self.last_position = now;
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_is_due_a_second_after_the_last_one_and_only_if_events_were_left_out() {
        let begin = Instant::now();
        let mut filter = Filter::new(Arc::from(["x.y".to_owned()]), begin);
        assert!(filter.wants("x.y") && !filter.wants("x.z"));
        assert_eq!(filter.position_due(), None);

        assert_eq!(filter.leave_out(1), begin + POSITION_EVERY);
        assert_eq!(filter.position_due(), Some(begin + POSITION_EVERY));
        let later = begin + POSITION_EVERY;
        assert!(filter.send_position(1, later));
        assert_eq!((filter.position_due(), filter.send_position(1, later)), (None, false));
        assert_eq!(filter.leave_out(2), later + POSITION_EVERY);
    }

    #[test]
    fn an_event_says_what_position_would_have_said() {
        let now = Instant::now();
        let mut filter = Filter::new(Arc::from([]), now);
        filter.leave_out(4);
        filter.named(5);
        assert_eq!((filter.position_due(), filter.send_position(5, now)), (None, false));
    }
}
