//! What a client wants of a thread, by kinds and words, and how it learns of the events that are left out: by `position`, from time to time. Pure;
//! time comes in.

use std::sync::Arc;

use tokio::time::{Duration, Instant};

use crate::protocol::kinds::AGENT_TOKEN;
use crate::search::Watch;

/// `position` is sent at most so often.
const POSITION_EVERY: Duration = Duration::from_secs(1);

/// The kinds a client wants, if not all.
pub type Kinds = Arc<[String]>;

/// What a client wants of a thread.
#[derive(Clone, Default)]
pub struct Choice {
    /// All kinds unless said.
    pub kinds: Option<Kinds>,
    /// All words unless said.
    pub search: Option<Watch>,
}

impl Choice {
    /// Whether nothing is left out.
    fn is_all(&self) -> bool {
        self.kinds.is_none() && self.search.is_none()
    }

    /// Whether events of this kind may be among what is wanted.
    fn has_kind(&self, kind: &str) -> bool {
        self.kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
    }
}

pub(super) struct Filter {
    choice: Choice,
    /// When `position` was last sent.
    last_position: Instant,
    /// The newest seq that a frame to the client has named: it knows that it has everything up to there.
    known: u64,
    /// The newest seq that was left out.
    left_out: u64,
}

impl Filter {
    /// None if all is wanted.
    pub fn new(choice: Choice, now: Instant) -> Option<Filter> {
        (!choice.is_all()).then_some(Filter { choice, last_position: now, known: 0, left_out: 0 })
    }

    pub fn wants(&self, kind: &str, frame: &str) -> bool {
        self.choice.has_kind(kind) && self.choice.search.as_ref().is_none_or(|search| search.wants(frame))
    }

    /// Whether pieces of messages are wanted: they have no words to be found by before their message is closed.
    pub fn wants_deltas(&self) -> bool {
        self.choice.has_kind(AGENT_TOKEN) && self.choice.search.is_none()
    }

    pub fn kinds(&self) -> Option<Kinds> {
        self.choice.kinds.clone()
    }

    /// Whether each event's words are looked at, which takes its time.
    pub fn reads_words(&self) -> bool {
        self.choice.search.is_some()
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

    fn of_kinds(kinds: &[&str], now: Instant) -> Filter {
        let kinds: Vec<String> = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        Filter::new(Choice { kinds: Some(kinds.into()), search: None }, now).expect("something is left out")
    }

    #[test]
    fn position_is_due_a_second_after_the_last_one_and_only_if_events_were_left_out() {
        let begin = Instant::now();
        let mut filter = of_kinds(&["x.y"], begin);
        assert!(filter.wants("x.y", "{}") && !filter.wants("x.z", "{}") && !filter.wants_deltas());
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
        let mut filter = of_kinds(&[], now);
        filter.leave_out(4);
        filter.named(5);
        assert_eq!((filter.position_due(), filter.send_position(5, now)), (None, false));
    }
}
