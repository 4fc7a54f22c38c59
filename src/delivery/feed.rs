//! What goes to a client next: the one order in which replayed and live events leave, for WebSocket sessions and
//! Server-Sent Events alike.
//!
//! Two queues lead here: what the subscriptions have read from the store (replay), and the outbox (live). Of the two, the
//! one in which the higher priority waits goes first. Two things hold back live events, but not replayed ones:
//! - while a subscription is in its handover, since what it still reads is older than what waits for it in the outbox;
//! - while the feed is paused, since a `subscribe` waits for its answer and what comes live belongs after that. While its
//!   subscriptions are begun a few at a time, what they replay belongs after it as well: then nothing goes out.
//!
//! Without credit no events go out, from either queue; notices do.

use std::sync::Arc;

use metrics::Counter;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::fair_queue::class_of_turn;
use super::outbox::{Demand, Item, Outbox};
use super::sources::Sources;
use super::subscriptions::{OutEvent, OutFrame, Subscriptions};
use crate::auth::Principal;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::Priority;
use crate::telemetry;

/// Something to send.
pub enum Out {
    Event(OutEvent),
    /// Any other frame of the protocol.
    Notice(Utf8Bytes),
    /// A subscription has ended.
    Ended {
        thread: String,
        error: Error,
    },
}

/// What is held back while a `subscribe` waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    None,
    /// What comes live: nothing is taken from the outbox.
    Live,
    Everything,
}

pub struct Feed {
    pub subs: Subscriptions,
    pub outbox: Arc<Outbox>,
    pub pause: Pause,
    /// More threads were joined than the outbox holds: only a resume can tell which.
    pub overrun: bool,
    /// Events that may be sent; without flow control as many as the socket accepts.
    credit: Option<u64>,
    turn: u32,
    deliveries: Counter,
}

impl Feed {
    pub(super) fn new(sources: Arc<Sources>) -> Feed {
        let outbox = Arc::new(Outbox::default());
        Feed {
            subs: Subscriptions::new(sources, outbox.clone()),
            outbox,
            pause: Pause::None,
            overrun: false,
            credit: None,
            turn: 0,
            deliveries: telemetry::deliveries(),
        }
    }

    /// Allows that many more events, and from now on no more than allowed.
    pub fn allow(&mut self, events: u64) {
        self.credit = Some(self.credit.unwrap_or(0).saturating_add(events));
    }

    fn has_credit(&self) -> bool {
        self.credit != Some(0)
    }

    /// Whether live events are not held back.
    fn is_live_open(&self) -> bool {
        self.pause == Pause::None && !self.subs.in_handover()
    }

    /// The user left the thread: gives the subscriptions that ended, with the reason.
    pub fn left(&mut self, who: &Principal, thread: &str) -> Vec<(String, Error)> {
        let mut ended = Vec::new();
        if let Some(called) = self.subs.left(who, thread) {
            let why = "you are no longer a member of this thread: its subscription has ended";
            ended.push((called, Error::new(Code::NotFound, why)));
            ended.extend(self.subs.rejoin(who, thread).err());
        }
        ended
    }

    /// What of the outbox can be sent now.
    pub fn wanted(&self) -> Demand {
        if self.pause != Pause::None {
            Demand::None
        } else if self.is_live_open() && self.has_credit() {
            Demand::All
        } else {
            Demand::Notices
        }
    }

    /// The next thing to send.
    pub fn next(&mut self, who: &Principal) -> Option<Out> {
        self.subs.out_of_credit = !self.has_credit();
        let out = self.next_of_both(who);

        // Also when there is nothing: what was looked at may have made more to read.
        self.subs.read_on(who, self.credit);

        let out = out?;
        if matches!(out, Out::Event(_)) {
            self.deliveries.increment(1);
            self.credit = self.credit.map(|credit| credit.saturating_sub(1));
        }
        Some(out)
    }

    fn next_of_both(&mut self, who: &Principal) -> Option<Out> {
        if self.pause == Pause::Everything {
            return None;
        }
        self.turn = self.turn.wrapping_add(1);
        if self.subs.has_replay(self.has_credit()) {
            let live = if self.is_live_open() { self.outbox.class() } else { None };
            if replay_goes_first(self.turn, self.subs.replay_class(), live)
                && let Some(out) = self.next_replayed()
            {
                return Some(out);
            }
        }
        // Replay is asked again: what comes live (that a subscription lags) may have put something there.
        self.next_live(who).or_else(|| self.next_replayed())
    }

    fn next_replayed(&mut self) -> Option<Out> {
        self.subs.next_replayed(self.has_credit()).map(Out::from)
    }

    fn next_live(&mut self, who: &Principal) -> Option<Out> {
        while self.pause == Pause::None {
            let item = self.outbox.pop_item(self.is_live_open() && self.has_credit())?;
            if let Some(out) = self.on_item(who, item) {
                return Some(out);
            }
        }
        None
    }

    /// What is to be sent of an item, if anything.
    fn on_item(&mut self, who: &Principal, item: Item) -> Option<Out> {
        match item {
            Item::Event { sub, event } => self.subs.live_event(who, sub, &event).map(Out::from),
            Item::Delta { sub, delta } => self.subs.live_delta(who, sub, &delta).map(Out::from),
            Item::Signal { sub, frame } => self.subs.signal(sub, frame).map(Out::Notice),
            Item::RunEnded { sub } => {
                let (thread, error) = self.subs.run_ended(who, sub)?;
                Some(Out::Ended { thread, error })
            }
            Item::Lagged { sub } => {
                self.subs.lagged(who, sub);
                None
            }
            Item::Overrun => {
                self.overrun = true;
                None
            }
            Item::Joined { thread, before } => {
                // A failure here is one of the store; the thread is there again when the client resumes.
                let (thread, error) = self.subs.joined(who, thread, before).err()?;
                Some(Out::Ended { thread, error })
            }
        }
    }
}

/// Whether what comes from the store goes before what comes live, by the highest class that waits in each: the classes
/// share the turns as in a [`super::fair_queue::FairQueue`]. If they are equal, or one side has no events, the two alternate.
fn replay_goes_first(turn: u32, replay: Option<usize>, live: Option<usize>) -> bool {
    match (replay, live) {
        (Some(replay), Some(live)) if replay != live => {
            let mut waiting = [false; Priority::CLASSES];
            waiting[replay] = true;
            waiting[live] = true;
            class_of_turn(turn, waiting) == Some(replay)
        }
        _ => turn.is_multiple_of(2),
    }
}

impl From<OutFrame> for Out {
    fn from(ready: OutFrame) -> Out {
        match ready {
            OutFrame::Event(event) => Out::Event(event),
            OutFrame::Notice(frame) => Out::Notice(frame),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns_of_replay(replay: Option<usize>, live: Option<usize>) -> Vec<u32> {
        (1..=8).filter(|turn| replay_goes_first(*turn, replay, live)).collect()
    }

    #[test]
    fn the_higher_priority_goes_first_but_for_one_turn_in_eight() {
        assert_eq!(turns_of_replay(Some(0), Some(1)), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(turns_of_replay(Some(2), Some(1)), [8]);
    }

    #[test]
    fn equal_priorities_and_notices_alternate() {
        for (replay, live) in [(Some(1), Some(1)), (None, Some(0)), (Some(2), None), (None, None)] {
            assert_eq!(turns_of_replay(replay, live), [2, 4, 6, 8], "{replay:?} {live:?}");
        }
    }
}
