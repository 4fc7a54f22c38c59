//! What goes to a client next: the one order in which answers of the store and live events leave, for WebSocket sessions and
//! Server-Sent Events alike.

use std::sync::Arc;

use metrics::Counter;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::Delivery;
use super::outbox::{Demand, Item, Outbox};
use super::subscriptions::{OutFrame, Subscriptions};
use crate::auth::Principal;
use crate::protocol::error::{Code, Error};
use crate::telemetry;

/// Something to send.
pub enum Out {
    /// A piece of a message that is being written has no seq.
    Event { seq: Option<u64>, frame: Utf8Bytes },
    /// Any other frame of the protocol.
    Notice(Utf8Bytes),
    /// A subscription has ended.
    Ended { thread: String, error: Error },
}

pub struct Feed {
    pub subs: Subscriptions,
    pub outbox: Arc<Outbox>,
    /// Live events wait, although no subscription is in its seam.
    pub shut: bool,
    /// More threads were joined than could be noted: only a resume can tell which.
    pub overrun: bool,
    /// Events that may be sent; without flow control as many as the socket takes.
    credit: Option<u64>,
    turn: u32,
    deliveries: Counter,
}

impl Feed {
    pub(super) fn new(sources: &Arc<Delivery>) -> Feed {
        let outbox = Arc::new(Outbox::default());
        Feed {
            subs: Subscriptions::new(sources.clone(), outbox.clone()),
            outbox,
            shut: false,
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

    fn gate_open(&self) -> bool {
        self.subs.gate_open() && !self.shut
    }

    fn may_send(&self) -> bool {
        self.credit != Some(0)
    }

    /// The user left the thread: its subscription ends, and is told with the reason.
    pub fn left(&mut self, who: &Principal, thread: &str) -> Vec<(String, Error)> {
        let Some(called) = self.subs.left(who, thread) else { return Vec::new() };
        let again = self.subs.rejoin(who, thread).err();
        [Some((called, no_member())), again].into_iter().flatten().collect()
    }

    /// What of the outbox can be sent now.
    pub fn wanted(&self) -> Demand {
        match (self.shut, self.gate_open() && self.may_send()) {
            (true, _) => Demand::None,
            (false, true) => Demand::All,
            (false, false) => Demand::Notices,
        }
    }

    /// The next thing to send.
    pub fn next(&mut self, who: &Principal) -> Option<Out> {
        self.subs.paused = !self.may_send();
        let out = self.next_of_both(who);
        // What was looked at may have made more to read.
        self.subs.read_on(who, self.credit);
        let out = out?;
        if matches!(out, Out::Event { .. }) {
            self.deliveries.increment(1);
            self.credit = self.credit.map(|credit| credit.saturating_sub(1));
        }
        Some(out)
    }

    fn next_of_both(&mut self, who: &Principal) -> Option<Out> {
        self.turn = self.turn.wrapping_add(1);
        if self.subs.has_replay(self.may_send())
            && self.replay_first()
            && let Some(out) = self.next_replayed()
        {
            return Some(out);
        }
        // What comes live may change what there is to replay.
        self.next_live(who).or_else(|| self.next_replayed())
    }

    /// The higher priority first, but for one turn in eight; in turn when they are equal.
    fn replay_first(&self) -> bool {
        match (self.subs.replay_class(), self.outbox.class().filter(|_| self.gate_open())) {
            (Some(replay), Some(live)) if replay != live => (replay < live) != self.turn.is_multiple_of(8),
            _ => self.turn.is_multiple_of(2),
        }
    }

    fn next_replayed(&mut self) -> Option<Out> {
        self.subs.next_replayed(self.may_send()).map(Out::from)
    }

    fn next_live(&mut self, who: &Principal) -> Option<Out> {
        while !self.shut {
            match self.outbox.pop_item(self.gate_open() && self.may_send())? {
                Item::Event { sub, event } => {
                    if let Some(ready) = self.subs.live_event(who, sub, &event) {
                        return Some(ready.into());
                    }
                }
                Item::Delta { sub, piece } => {
                    if let Some(ready) = self.subs.live_delta(who, sub, &piece) {
                        return Some(ready.into());
                    }
                }
                Item::Signal { sub, frame } => {
                    if let Some(frame) = self.subs.signal(sub, frame) {
                        return Some(Out::Notice(frame));
                    }
                }
                Item::Lagged { sub } => self.subs.lagged(who, sub),
                Item::Overrun => self.overrun = true,
                Item::Joined { thread, before } => {
                    // A failure here is one of the store; the thread is there again when the client resumes.
                    if let Err((thread, error)) = self.subs.joined(who, thread, before) {
                        return Some(Out::Ended { thread, error });
                    }
                }
            }
        }
        None
    }
}

impl From<OutFrame> for Out {
    fn from(ready: OutFrame) -> Out {
        match ready {
            OutFrame::Event { seq, frame } => Out::Event { seq, frame },
            OutFrame::Notice(frame) => Out::Notice(frame),
        }
    }
}

fn no_member() -> Error {
    Error::new(Code::NotFound, "you are no longer a member of this thread: its subscription has ended")
}
