//! What comes live: events, deltas and signals from the hub, by way of the outbox.

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::subscription::{Admission, Stage};
use super::{OutFrame, Subscriptions};
use crate::auth::Principal;
use crate::delivery::fair_queue::SubId;
use crate::projector::CommittedEvent;
use crate::protocol::delta::Delta;
use crate::store::messages::TextPosition;

/// How a live delta continues what the client has of its message.
#[derive(Debug, PartialEq, Eq)]
enum Continuation {
    /// It brings the text from this character on.
    From(u64),
    /// The message was begun anew with it: what the client has, if anything, is of a text before.
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
        // If the message was closed by now, nothing is known any more of what the client has of it.
        None if delta.restarts > 0 => Continuation::Restart,
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

        match sub.admit(event.seq, &event.kind, &event.frame) {
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
        if sub.stage != Stage::Live || !sub.wants_deltas() {
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
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::delivery::outbox::{Item, Outbox};

    fn delta(from_char: u64, text: &str) -> Delta {
        delta_of(0, from_char, text)
    }

    fn delta_of(restarts: u32, from_char: u64, text: &str) -> Delta {
        Delta::of_test("m", restarts, from_char, text)
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
        assert_eq!(continuation(None, &delta_of(2, 0, "new")), Continuation::Restart, "it may have text all the same");
        assert_eq!(continuation(None, &delta_of(2, 3, "er")), Continuation::Closed);
    }

    /// The characters of a message's text that begins anew for the n-th time: at every place another one than before.
    fn chars_of(restarts: u32) -> impl Iterator<Item = char> {
        ('a'..='z').cycle().skip(restarts as usize * 5 % 26)
    }

    /// What the store has of the message after some commits.
    #[derive(Clone, Default)]
    struct Stored {
        restarts: u32,
        text: String,
    }

    impl Stored {
        fn end(&self) -> TextPosition {
            TextPosition { restarts: self.restarts, chars: self.text.len() as u64 }
        }
    }

    /// What a client makes of what it is sent.
    struct Client {
        text: String,
        delivered: Option<TextPosition>,
        /// The message was closed when the store was read for it.
        closed: bool,
    }

    impl Client {
        /// The client drops its text with a restart, and is sent nothing else that its text does not end with.
        fn get(&mut self, from_char: u64, text: &str, restart: bool, end: TextPosition) {
            if restart {
                self.text.clear();
            }
            assert_eq!(from_char, self.text.len() as u64, "no hole and nothing twice");
            self.text.push_str(text);
            self.delivered = Some(end);
            let whole: String = chars_of(end.restarts).take(self.text.len()).collect();
            assert_eq!(self.text, whole, "a text of its own");
        }

        fn read_store(&mut self, stored: &Stored) {
            if self.closed {
                self.delivered = None;
                return;
            }
            let known = self.delivered.filter(|known| known.restarts == stored.restarts);
            let from_char = known.map_or(0, |known| known.chars);
            let restart = known.is_none() && self.delivered.is_some();
            self.get(from_char, &stored.text[from_char as usize..], restart, stored.end());
        }

        fn live(&mut self, delta: &Delta) {
            let end = TextPosition { restarts: delta.restarts, chars: delta.to_char };
            match continuation(self.delivered, delta) {
                Continuation::From(from_char) => self.get(from_char, &delta.rest(from_char).text, false, end),
                Continuation::Restart => self.get(0, &delta.text, true, end),
                Continuation::Delivered => {}
                Continuation::Closed if self.closed => {}
                other => panic!("{other:?}: {delta:?} after {:?}", self.delivered),
            }
        }
    }

    /// Sends what waits, as much of it.
    fn pop(outbox: &Outbox, client: &mut Client, items: usize) {
        for _ in 0..items {
            let Some(Item::Delta { delta, .. }) = outbox.pop_item(true) else { return };
            client.live(&delta);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        /// A client lags with what it had after `had` commits, attaches after `attached`, is sent what the store has after
        /// `read`, and the rest live, from an outbox that it empties now and then. If the message is closed before that read,
        /// it gets of the text what comes from the outbox, and all of it with the event that closed it.
        #[test]
        fn wherever_a_reader_lags_and_goes_on_it_ends_with_the_newest_text_and_never_has_two(
            acts in prop::collection::vec((prop::bool::weighted(0.3), 0..4_usize, 0..3_usize), 1..25),
            places in (0..26_usize, 0..26_usize, 0..26_usize),
            closed: bool,
        ) {
            let (mut deltas, mut states) = (Vec::new(), vec![Stored::default()]);
            for (n, (restart, length, _)) in acts.iter().enumerate() {
                let mut now = states[n].clone();
                if *restart && n > 0 {
                    now = Stored { restarts: now.restarts + 1, text: String::new() };
                }
                let from = now.text.len();
                now.text.extend(chars_of(now.restarts).skip(from).take(*length));
                deltas.push(delta_of(now.restarts, from as u64, &now.text[from..]));
                states.push(now);
            }
            let mut places = [places.0, places.1, places.2].map(|place| 1 + place % acts.len());
            places.sort_unstable();
            let [had, attached, read] = places;

            let mut client = Client { text: String::new(), delivered: None, closed: false };
            client.read_store(&states[had]);
            client.closed = closed;
            let outbox = Outbox::default();
            let push = |delta: &Delta| {
                let delta = Arc::new(delta.clone());
                assert_eq!(outbox.fill(|filling| filling.delta(1, &delta)), Some(true));
            };
            deltas[attached..read].iter().for_each(push);
            client.read_store(&states[read]);
            for (delta, (_, _, pops)) in deltas[read..].iter().zip(&acts[read..]) {
                push(delta);
                pop(&outbox, &mut client, *pops);
            }
            pop(&outbox, &mut client, usize::MAX);
            let last = &states[acts.len()];
            if !closed {
                prop_assert_eq!((&client.text, client.delivered), (&last.text, Some(last.end())));
            }
        }
    }
}
