//! What comes live: events, deltas and signals from the hub, by way of the outbox.

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::subscription::{Admission, Stage};
use super::{OutFrame, Subscriptions};
use crate::auth::Principal;
use crate::delivery::fair_queue::SubId;
use crate::projector::CommittedEvent;
use crate::protocol::delta::Delta;
use crate::protocol::kinds::AGENT_TOKEN;
use crate::store::messages::TextPosition;

/// How a live delta continues what the client has of its message.
#[derive(Debug, PartialEq, Eq)]
enum Continuation {
    /// It brings the text from this character on.
    From(u64),
    /// The message was begun anew with it: what the client has is of a text before.
    Restart,
    /// The client has all of it, or a newer text: that was in the store as well.
    Delivered,
    /// Its message was closed while the subscription attached, and the event that closed it is on its way.
    Closed,
    /// Text before it is missing.
    Gap,
}

/// `delivered` is how far the client has the message's text, if it has any of it. Characters are compared only with those of
/// the same text: a message that is begun anew counts them from 0 again.
fn continuation(delivered: Option<TextPosition>, delta: &Delta) -> Continuation {
    match delivered {
        None if delta.from_char > 0 => Continuation::Closed,
        None => Continuation::From(0),
        Some(it) if delta.restarts < it.restarts => Continuation::Delivered,
        Some(it) if delta.restarts > it.restarts && delta.from_char == 0 => Continuation::Restart,
        Some(it) if delta.restarts > it.restarts || delta.from_char > it.chars => Continuation::Gap,
        Some(it) if delta.to_char <= it.chars => Continuation::Delivered,
        Some(it) => Continuation::From(it.chars),
    }
}

impl Subscriptions {
    /// A live event: what to send of it, if anything.
    pub fn live_event(&mut self, who: &Principal, id: SubId, event: &CommittedEvent) -> Option<OutFrame> {
        let sub = self.by_id.get_mut(&id)?;
        let is_duplicate = event.seq <= sub.cursor;
        if sub.stage != Stage::Live || is_duplicate {
            return None;
        }
        if event.seq != sub.cursor + 1 {
            // Cannot happen while the hub delivers in order; if it ever does, the store has what is missing.
            tracing::error!(expected = sub.cursor + 1, event.seq, "a hole in the live feed");
            self.lagged(who, id);
            return None;
        }

        if let (Some(delivered), Some(message)) = (&mut sub.delivered, &event.closes) {
            delivered.remove(message);
        }
        if sub.is_plain() {
            sub.cursor = event.seq;
            return Some(OutFrame::event(event.seq, event.frame.clone()));
        }

        match sub.admit(event.seq, &event.kind) {
            Admission::Send => {
                let frame = self.prepare(id, event.seq, &event.frame)?;
                Some(OutFrame::event(event.seq, frame))
            }
            Admission::LeaveOut => self.leave_out_live(id, event.seq).map(OutFrame::Notice),
            Admission::Acknowledged => None,
            Admission::NoRoom => {
                self.hold(id, None);
                None
            }
            Admission::Exhausted => {
                self.dead_letter(who, id, event.seq);
                None
            }
        }
    }

    /// An event was left out: the `position` frame, if none was sent a moment ago.
    fn leave_out_live(&mut self, id: SubId, seq: u64) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        let (now, due) = (Instant::now(), sub.filter.as_mut()?.leave_out(seq));
        if due <= now {
            return sub.position(seq, now);
        }
        self.schedule(Some(due));
        None
    }

    /// A live delta: what to send of it, if anything.
    pub fn live_delta(&mut self, who: &Principal, id: SubId, delta: &Delta) -> Option<OutFrame> {
        let sub = self.by_id.get_mut(&id)?;
        if sub.stage != Stage::Live || !sub.wants(AGENT_TOKEN) {
            return None;
        }
        // From before it attached: its text was in the store, or in the event that closed the message.
        if delta.head < sub.cursor {
            return None;
        }

        let delivered = sub.delivered.as_ref().and_then(|delivered| delivered.get(&delta.name)).copied();
        let (from_char, restart) = match continuation(delivered, delta) {
            Continuation::From(from_char) => (from_char, false),
            Continuation::Restart => (0, true),
            Continuation::Delivered | Continuation::Closed => return None,
            Continuation::Gap => {
                // Cannot happen while the hub delivers in order; if it ever does, the store has what is missing.
                tracing::error!(?delivered, delta.restarts, delta.from_char, "a hole in a message");
                self.lagged(who, id);
                return None;
            }
        };
        let frame = match delta.from_char == from_char {
            true => delta.frame(restart),
            false => delta.rest(from_char).frame(false),
        };
        let end = TextPosition { restarts: delta.restarts, chars: delta.to_char };
        sub.delivered.get_or_insert_default().insert(delta.name.clone(), end);
        Some(OutFrame::delta(delta.restarts, sub.rename(frame)))
    }

    /// A signal: the frame to send, if its subscription has not ended.
    pub fn signal(&self, id: SubId, frame: Utf8Bytes) -> Option<Utf8Bytes> {
        Some(self.by_id.get(&id)?.rename(frame))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn delta(from_char: u64, text: &str) -> Delta {
        delta_of(0, from_char, text)
    }

    fn delta_of(restarts: u32, from_char: u64, text: &str) -> Delta {
        Delta {
            name: Delta::name("r", "m"),
            thread: "t".into(),
            run: "r".into(),
            message: "m".into(),
            event: Uuid::nil(),
            from: "bot".into(),
            at: "".into(),
            priority: None,
            head: 0,
            restarts,
            from_char,
            to_char: from_char + text.len() as u64,
            text: text.into(),
        }
    }

    #[test]
    fn a_delta_continues_what_the_client_has_and_repeats_none_of_it() {
        assert_eq!(continuation(None, &delta(0, "abc")), Continuation::From(0));
        let after = |chars| Some(TextPosition { restarts: 0, chars });
        assert_eq!(continuation(after(3), &delta(3, "de")), Continuation::From(3));
        assert_eq!(continuation(after(4), &delta(3, "de")), Continuation::From(4), "the store had the first character");
        assert_eq!(continuation(after(5), &delta(3, "de")), Continuation::Delivered);
        assert_eq!(continuation(after(2), &delta(3, "de")), Continuation::Gap);
        assert_eq!(continuation(None, &delta(3, "de")), Continuation::Closed);
    }

    #[test]
    fn characters_of_another_text_of_the_message_count_for_nothing() {
        let after = |restarts, chars| Some(TextPosition { restarts, chars });
        let restarts = [(after(0, 0), 1), (after(0, 9), 1), (after(1, 3), 5)];
        for (delivered, now) in restarts {
            assert_eq!(continuation(delivered, &delta_of(now, 0, "new")), Continuation::Restart, "{delivered:?}");
        }
        assert_eq!(continuation(after(0, 9), &delta_of(1, 0, "")), Continuation::Restart, "the text before is dropped");
        assert_eq!(continuation(after(0, 9), &delta_of(1, 3, "er")), Continuation::Gap, "its beginning is missing");
        assert_eq!(continuation(after(1, 3), &delta_of(1, 3, "er")), Continuation::From(3));
        // It waited while the store was read.
        assert_eq!(continuation(after(1, 3), &delta_of(0, 3, "old")), Continuation::Delivered);
        assert_eq!(continuation(after(1, 3), &delta_of(0, 9, "old")), Continuation::Delivered);
        assert_eq!(continuation(after(2, 0), &delta_of(1, 0, "old")), Continuation::Delivered);
        assert_eq!(continuation(None, &delta_of(2, 0, "new")), Continuation::From(0));
    }
}
