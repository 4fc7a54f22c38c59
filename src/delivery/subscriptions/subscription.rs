//! One subscription of a session: what it is, and what it does with the event that is next for it.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::confirm::Confirm;
use super::filter::{Choice, Filter};
use super::pace::{NewPace, Pace};
use super::receipt::Receipt;
use crate::protocol::event;
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids::ThreadAddress;
use crate::store::messages::TextPosition;

/// Where a subscription is on its way from the store to the live feed; [`super`] describes the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Not attached to the hub: reads from the store, or waits for its turn to.
    CatchingUp,
    /// Not attached, and reads nothing until that time; without one, until an acknowledgement makes room or a dead letter is
    /// stored.
    Held { until: Option<Instant> },
    /// Attached; still reads from the store, up to this seq: the head when it attached.
    Handover { to: u64 },
    /// Attached, with nothing left to read.
    Live,
}

impl Stage {
    pub fn is_attached(self) -> bool {
        matches!(self, Stage::Handover { .. } | Stage::Live)
    }
}

/// A subscription as it is asked for.
pub struct NewSubscription {
    /// As the client calls the thread.
    pub address: ThreadAddress,
    /// It begins after this seq.
    pub cursor: u64,
    /// Asked for by its own name, not brought by `"*"`.
    pub named: bool,
    pub choice: Choice,
    pub receipt: Option<Receipt>,
    /// A replay at a pace, before it goes live.
    pub pace: Option<NewPace>,
}

/// Of messages that are being written, how far the client has the text.
pub(super) type DeliveredText = HashMap<Arc<str>, TextPosition>;

/// How far the text of messages that are being written was read.
#[derive(Default)]
pub(super) struct OpenTextProgress {
    /// The number of the message to go on with.
    pub next: u64,
    /// What the client has of those that were.
    pub read: DeliveredText,
}

pub(super) struct Subscription {
    pub thread: String,
    /// As the client calls it, if it is not the thread's name.
    pub called: Option<Box<str>>,
    /// `tenant/thread`.
    pub key: Arc<str>,
    /// The newest seq that is done with: on its way to the client, or passed over.
    pub cursor: u64,
    pub stage: Stage,
    pub named: bool,
    /// `caught_up` is to be sent once it has caught up.
    pub needs_caught_up: bool,
    /// The text of messages that are being written is to be read before it goes live: how far that has come.
    pub open_text: Option<Box<OpenTextProgress>>,
    /// Counted by the hub among those present.
    pub present: bool,
    pub delivered: Option<Box<DeliveredText>>,
    pub filter: Option<Box<Filter>>,
    pub receipt: Option<Box<Receipt>>,
    /// While it replays at a pace.
    pub pace: Option<Box<Pace>>,
}

/// What a subscription does with the event that is next for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It goes to the client.
    Send,
    /// It is passed over: the client does not want it.
    LeaveOut,
    /// It is passed over: the client has acknowledged it already.
    Acknowledged,
    /// It is not passed: as many events as may be are out and not acknowledged.
    NoRoom,
    /// It is not passed: it had its last attempt.
    Exhausted,
}

impl Subscription {
    pub fn called(&self) -> &str {
        self.called.as_deref().unwrap_or(&self.thread)
    }

    pub fn wants(&self, kind: &str, frame: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.wants(kind, frame))
    }

    pub fn wants_deltas(&self) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.wants_deltas())
    }

    pub fn confirm(&mut self) -> Option<&mut Confirm> {
        self.receipt.as_mut()?.confirm.as_mut()
    }

    /// Whether frames go out as they are, and nothing is recorded about them.
    pub fn is_plain(&self) -> bool {
        self.filter.is_none() && self.receipt.is_none() && self.called.is_none()
    }

    /// Decides about the next event, and moves the cursor past it unless it must wait.
    pub fn admit(&mut self, seq: u64, kind: &str, frame: &str) -> Admission {
        if !self.wants(kind, frame) {
            self.cursor = seq;
            return Admission::LeaveOut;
        }
        if let Some(confirm) = self.confirm() {
            if confirm.is_acked(seq) {
                self.cursor = seq;
                return Admission::Acknowledged;
            }
            if confirm.oldest().is_none() && confirm.is_exhausted(seq) {
                return Admission::Exhausted;
            }
            if confirm.room() == 0 {
                return Admission::NoRoom;
            }
            confirm.add(seq);
        }
        self.cursor = seq;
        Admission::Send
    }

    /// The frame with the thread called as the client calls it.
    pub fn rename(&self, frame: Utf8Bytes) -> Utf8Bytes {
        match &self.called {
            Some(called) => event::with_thread(&frame, &self.thread, called).into(),
            None => frame,
        }
    }

    /// The `position` frame, if it says anything new.
    pub fn position(&mut self, seq: u64, now: Instant) -> Option<Utf8Bytes> {
        let is_new = self.filter.as_mut()?.send_position(seq, now);
        is_new.then(|| ServerFrame::Position { thread: self.called(), seq }.encode().into())
    }

    /// The `caught_up` frame, if it is attached and has one to send.
    pub fn caught_up(&mut self) -> Option<Utf8Bytes> {
        if !self.stage.is_attached() || !self.needs_caught_up {
            return None;
        }
        self.needs_caught_up = false;
        if let Some(filter) = &mut self.filter {
            filter.named(self.cursor);
        }
        Some(ServerFrame::CaughtUp { thread: self.called(), seq: self.cursor }.encode().into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::confirm::{ConfirmPolicy, WINDOW};
    use super::*;

    fn subscription(kinds: Option<&[&str]>, confirm: bool) -> Subscription {
        let kinds = kinds.map(|kinds| kinds.iter().map(|kind| (*kind).to_owned()).collect::<Vec<_>>().into());
        Subscription {
            thread: "t".into(),
            called: None,
            key: "acme/t".into(),
            cursor: 0,
            stage: Stage::CatchingUp,
            named: true,
            needs_caught_up: true,
            open_text: None,
            present: false,
            delivered: None,
            filter: Filter::new(Choice { kinds, search: None }, Instant::now()).map(Box::new),
            receipt: Receipt::wanted(None, None, 0, confirm.then(ConfirmPolicy::default)).map(Box::new),
            pace: None,
        }
    }

    #[test]
    fn events_of_other_kinds_move_the_cursor_all_the_same() {
        let mut sub = subscription(Some(&["x.y"]), false);
        assert_eq!((sub.admit(1, "x.z", "{}"), sub.cursor), (Admission::LeaveOut, 1));
        assert_eq!((sub.admit(2, "x.y", "{}"), sub.cursor), (Admission::Send, 2));
    }

    #[test]
    fn with_confirm_an_event_waits_while_the_window_is_full() {
        let mut sub = subscription(None, true);
        for seq in 1..=WINDOW as u64 {
            assert_eq!(sub.admit(seq, "x.y", "{}"), Admission::Send);
        }
        let next = WINDOW as u64 + 1;
        assert_eq!((sub.admit(next, "x.y", "{}"), sub.cursor), (Admission::NoRoom, next - 1));
    }

    #[test]
    fn caught_up_is_sent_once_and_only_when_attached() {
        let mut sub = subscription(None, false);
        assert!(sub.caught_up().is_none());
        sub.stage = Stage::Live;
        assert_eq!(sub.caught_up().as_deref(), Some(r#"{"type":"caught_up","thread":"t","seq":0}"#));
        assert!(sub.caught_up().is_none());
    }
}
