//! Where a subscription is with what it is sent again because somebody requeued it: one event at a time. Pure; time comes in.

use tokio::time::Instant;

use super::confirm::{ConfirmPolicy, Presence};
use crate::store::deliveries::RequeuedDelivery;

/// What a subscription is sent again.
#[derive(Default)]
pub(super) struct Requeued {
    /// The store may have something: it is to be asked.
    pub wanted: bool,
    pub step: Step,
    /// The newest that this session has sent, until it is done with.
    pub sent: Option<Sent>,
    /// The client has acknowledged it.
    pub acked: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    #[default]
    Idle,
    Reading,
    /// Read, and on its way to the socket.
    Ready,
    /// Sent, and not acknowledged yet.
    Sent,
    /// What became of it is on its way to the log; then it is done with, or will be sent again.
    Recording {
        done: bool,
    },
    /// Nothing until then.
    Waiting(Instant),
}

pub(super) struct Sent {
    pub delivery: RequeuedDelivery,
    /// All that was sent before it is up to this seq: an acknowledgement of more was written after it had come.
    pub before: u64,
    /// When it was sent, and after how many bytes.
    pub presence: Presence,
}

impl Requeued {
    pub fn deadline(&self, policy: ConfirmPolicy) -> Option<Instant> {
        let sent = self.sent.as_ref().filter(|_| self.step == Step::Sent)?;
        Some(sent.presence.heard + policy.ack_within)
    }

    /// The store is to be asked once nothing else is under way.
    pub fn look(&mut self) -> bool {
        self.wanted = true;
        self.step == Step::Idle
    }

    pub fn is_next(&self) -> bool {
        self.wanted && self.step == Step::Idle
    }
}
