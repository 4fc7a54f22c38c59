//! What the subscriptions have read from the store, in the order in which it goes to the socket.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::subscription::Stage;
use super::{OutFrame, Subscriptions};
use crate::delivery::fair_queue::SubId;
use crate::memory::Charge;
use crate::protocol::event;
use crate::protocol::frame::ServerFrame;
use crate::store::deliveries::RequeuedDelivery;

/// What a subscription has ready for the socket. Of one subscription the order is kept, so each step is reached once what
/// was read before it has been sent.
pub(super) enum Replayed {
    Event {
        id: SubId,
        seq: u64,
        frame: Utf8Bytes,
        /// It is of a replay at a pace.
        paced: bool,
        #[expect(dead_code, reason = "held until the event goes to the socket")]
        charge: Arc<Charge>,
    },
    /// Text of a message that is being written, as far as the client does not have it. The frame holds its own charge.
    OpenText {
        id: SubId,
        /// How often the message was begun anew before this text.
        restarts: u32,
        frame: Utf8Bytes,
    },
    /// An event that was given up, and that somebody requeued.
    Requeued {
        id: SubId,
        delivery: RequeuedDelivery,
        frame: Utf8Bytes,
        #[expect(dead_code, reason = "held until the event goes to the socket")]
        charge: Arc<Charge>,
    },
    Notice {
        id: SubId,
        frame: Utf8Bytes,
    },
    /// Time to say how far events were left out.
    Position {
        id: SubId,
        seq: u64,
    },
    /// All events up to the head are sent; the text of open messages follows.
    CaughtUp(SubId),
    /// Everything read from the store is sent: the subscription goes live.
    Live(SubId),
    /// A replay at a pace was all that the client wanted.
    Over(SubId),
}

impl Replayed {
    /// Whether it goes out even while the client has no credit for events.
    fn is_notice(&self) -> bool {
        !matches!(self, Replayed::Event { .. } | Replayed::Requeued { .. } | Replayed::OpenText { .. })
    }

    /// Bytes that it counts for among what is replayed.
    fn bytes(&self) -> usize {
        match self {
            Replayed::Event { frame, .. } | Replayed::Requeued { frame, .. } | Replayed::OpenText { frame, .. } => {
                frame.len()
            }
            Replayed::Notice { .. }
            | Replayed::Position { .. }
            | Replayed::CaughtUp(_)
            | Replayed::Live(_)
            | Replayed::Over(_) => 0,
        }
    }
}

impl Subscriptions {
    pub(super) fn push_replayed(&mut self, id: SubId, class: Option<usize>, replayed: Replayed) {
        self.replay_bytes += replayed.bytes();
        self.replay.push(Some(id), class, replayed);
    }

    /// The class of what comes next from the store.
    pub fn replay_class(&self) -> Option<usize> {
        self.replay.class()
    }

    /// Whether anything from the store is ready; without `events`, any notice.
    pub fn has_replay(&self, events: bool) -> bool {
        if events { !self.replay.is_empty() } else { self.replay.any_in_order(Replayed::is_notice) }
    }

    /// The next frame from the store; without `events`, the next notice.
    pub fn next_replayed(&mut self, events: bool) -> Option<OutFrame> {
        loop {
            let next = if events { self.replay.pop() } else { self.replay.pop_in_order(Replayed::is_notice) };
            let next = next?;
            self.replay_bytes -= next.bytes();
            if let Some(frame) = self.replayed_frame(next) {
                return Some(frame);
            }
        }
    }

    /// What to send of it. Nothing if its subscription has ended, or goes on under another number.
    fn replayed_frame(&mut self, replayed: Replayed) -> Option<OutFrame> {
        match replayed {
            Replayed::Event { id, seq, frame, paced, .. } => {
                let frame = self.prepare(id, seq, &frame)?;
                let frame = if paced { event::as_replay(&frame).into() } else { frame };
                Some(OutFrame::event(seq, frame))
            }
            Replayed::Requeued { id, delivery, frame, .. } => {
                let seq = delivery.seq;
                let frame = self.prepare_requeued(id, delivery, frame)?;
                Some(OutFrame::event(seq, frame))
            }
            Replayed::OpenText { id, restarts, frame } => {
                let frame = self.by_id.get(&id)?.rename(frame);
                Some(OutFrame::delta(restarts, frame))
            }
            Replayed::Notice { id, frame } => self.by_id.contains_key(&id).then_some(OutFrame::Notice(frame)),
            Replayed::Position { id, seq } => {
                let frame = self.by_id.get_mut(&id)?.position(seq, Instant::now())?;
                Some(OutFrame::Notice(frame))
            }
            Replayed::CaughtUp(id) => self.by_id.get_mut(&id)?.caught_up().map(OutFrame::Notice),
            Replayed::Live(id) => self.go_live(id).map(OutFrame::Notice),
            Replayed::Over(id) => {
                let seq = self.by_id.get(&id)?.cursor;
                let thread = self.end(id)?;
                Some(OutFrame::Notice(ServerFrame::CaughtUp { thread: &thread, seq }.encode().into()))
            }
        }
    }

    /// The handover is complete: live events need no longer wait for this subscription. Gives `caught_up`, if it is to be
    /// sent.
    fn go_live(&mut self, id: SubId) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        // One that was detached meanwhile is catching up once more.
        if !matches!(sub.stage, Stage::Handover { .. }) {
            return None;
        }
        sub.stage = Stage::Live;
        self.handovers -= 1;
        sub.caught_up()
    }
}
