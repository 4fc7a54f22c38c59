//! Reads of the store for subscriptions: on a blocking thread, and charged to the node's memory before.
//!
//! A read charges [`CHUNK_BYTES`], and more if the first thing that it finds is larger. Without room it waits, in the order of
//! all readers. What was read keeps its charge until the last of it goes to the socket; a session waits for its own next read
//! only, never with a read that others wait for.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_tungstenite::tungstenite::{Bytes, Utf8Bytes};
use uuid::Uuid;

use super::filter::Kinds;
use super::subscription::DeliveredText;
use crate::auth::Principal;
use crate::delivery::outbox::{Answer, Chunk, OpenText, Outbox, ReadDelivery, ReadFor};
use crate::delivery::sources::Sources;
use crate::memory::{self, Charge, Refused};
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::store::messages::{MessageKey, MessageRow, TextPosition};
use crate::store::{EventRange, EventRow, Store, StoreError, StoredEvent};
use crate::{clock, panics};

/// Bytes of one read from the store, as a rule.
pub const CHUNK_BYTES: usize = 128 << 10;
/// Bytes of one read for a client that takes them faster than they are read.
pub const MAX_CHUNK_BYTES: usize = 512 << 10;
/// What an event takes in memory beside its frame.
const EVENT_OVERHEAD: usize = 128;
/// What the frame of a delta has beside the text.
const FRAME_OVERHEAD: usize = 1 << 10;
/// A frame that is larger does not go to the socket at once.
const LARGE: usize = 72 << 10;
/// How long a read waits for memory. Its subscription then ends with an error.
const WAIT: Duration = Duration::from_secs(30);
/// When to try again.
const RETRY_MS: u64 = 5_000;

/// What is read from the store.
pub(super) enum Wanted {
    Events(EventRange),
    /// For a replay at a pace: of these, what had happened up to then.
    Due {
        range: EventRange,
        up_to_ms: u64,
    },
    /// The text of messages that are being written, from the one with this number on, beyond what the client has.
    OpenText {
        from: u64,
        delivered: DeliveredText,
    },
    /// What the durable subscription of this name is to be sent again, if it is of these kinds.
    Requeued {
        name: Box<str>,
        kinds: Option<Kinds>,
    },
}

/// A read for a subscription.
pub(super) struct Read {
    pub sources: Arc<Sources>,
    pub outbox: Arc<Outbox>,
    pub who: Principal,
    pub thread: String,
    pub reader: ReadFor,
    pub wanted: Wanted,
}

/// What came of a read.
enum Outcome {
    Chunk(Chunk),
    /// The first thing needs so much memory.
    Needs(usize),
}

impl Read {
    /// Reads as soon as there is memory, and answers to the outbox.
    pub fn start(self) {
        match self.sources.memory.try_charge(&self.who.key, CHUNK_BYTES) {
            Ok(charge) => drop(tokio::task::spawn_blocking(move || self.read(charge))),
            Err(_) => drop(tokio::spawn(self.wait(CHUNK_BYTES))),
        }
    }

    async fn wait(self, bytes: usize) {
        match self.sources.memory.charge(&self.who.key, bytes, WAIT).await {
            Ok(charge) => drop(tokio::task::spawn_blocking(move || self.read(charge))),
            Err(refused) => self.answer(Err(refusal(refused))),
        }
    }

    /// The right to read is looked up once more after the read, so that nothing committed after the user's removal goes out.
    fn read(self, charge: Charge) {
        if self.outbox.is_closed() {
            return;
        }
        let (store, who, thread) = (&self.sources.store, &self.who, &*self.thread);
        let wanted = |head| match &self.wanted {
            Wanted::Events(range) => events(store, who, thread, *range, head, charge, |_| None),
            Wanted::Due { range, up_to_ms } => {
                let later = |frame: &str| at_ms(frame).filter(|at| at > up_to_ms);
                events(store, who, thread, *range, head, charge, later)
            }
            Wanted::OpenText { from, delivered } => open_text(store, who, thread, *from, delivered, charge),
            Wanted::Requeued { name, kinds } => requeued(store, who, thread, (name, kinds.as_deref()), charge),
        };
        match panics::catch(|| self.sources.rights.read(who, thread, wanted)).flatten() {
            Ok(Outcome::Chunk(chunk)) => self.answer(Ok(chunk)),
            Ok(Outcome::Needs(bytes)) => drop(Handle::current().spawn(self.wait(bytes))),
            Err(error) => self.answer(Err(error)),
        }
    }

    fn answer(self, read: Result<Chunk, Error>) {
        self.outbox.push_answer(Answer::Chunk { sub: self.reader, read });
    }
}

fn refusal(refused: Refused) -> Error {
    match refused {
        Refused::Full => {
            let why = "the server has had no memory left to read this thread: subscribe again";
            Error::new(Code::Unavailable, why).retry_after(RETRY_MS)
        }
        Refused::TooLarge => Error::new(Code::Internal, "an event is larger than the server's memory allows"),
    }
}

/// When the event of this frame happened, in ms since the Unix epoch.
fn at_ms(frame: &str) -> Option<u64> {
    event::at_of(frame).and_then(clock::parse_rfc3339)
}

/// `head` was looked up before: what is committed since may be missing, what is up to there may not. The first event of which
/// `not_due` gives a time is not brought, and none after it.
fn events(
    store: &Store,
    who: &Principal,
    thread: &str,
    range: EventRange,
    head: u64,
    mut charge: Charge,
    not_due: impl Fn(&str) -> Option<u64>,
) -> Result<Outcome, Error> {
    // More than the usual chunk only where there is room for it now.
    charge.grow_to(range.bytes).ok();
    let (mut events, mut used, mut needs, mut next_ms) = (EventTexts::default(), 0, None, None);
    store.visit_events(&who.tenant, thread, range, |seq, row| {
        next_ms = not_due(row.frame);
        if next_ms.is_some() {
            return Ok::<_, StoreError>(ControlFlow::Break(()));
        }
        let bytes = row.frame.len() + EVENT_OVERHEAD;
        let fits = used + bytes <= range.bytes.min(charge.bytes());
        if !fits && !events.is_empty() {
            return Ok(ControlFlow::Break(()));
        }
        if !fits && charge.grow_to(bytes).is_err() {
            needs = Some(bytes);
            return Ok(ControlFlow::Break(()));
        }
        used += bytes;
        events.push(seq, row);
        Ok(ControlFlow::Continue(()))
    })?;

    if let Some(bytes) = needs {
        return Ok(Outcome::Needs(bytes));
    }
    if events.is_empty() && next_ms.is_none() && head >= range.from {
        return Err(Error::new(Code::Internal, "the store lacks events that it should have"));
    }
    charge.shrink_to(used);
    let charge = Arc::new(charge);
    let mut events = events.split();
    for event in events.iter_mut().filter(|event| event.frame.len() > LARGE) {
        event.frame = charged(std::mem::take(&mut event.frame), &charge);
    }
    Ok(Outcome::Chunk(Chunk::Events { events, charge, next_ms }))
}

/// Events of a chunk, with their texts in one piece of memory.
#[derive(Default)]
struct EventTexts {
    /// Kind and frame of one after the other.
    text: String,
    /// The events without their texts, and how long these are.
    events: Vec<(StoredEvent, usize, usize)>,
}

impl EventTexts {
    fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    fn push(&mut self, seq: u64, row: &EventRow<'_>) {
        self.text.push_str(row.kind);
        self.text.push_str(row.frame);
        let event = StoredEvent::without_text(seq, row);
        self.events.push((event, row.kind.len(), row.frame.len()));
    }

    fn split(mut self) -> Vec<StoredEvent> {
        // What is held is what was charged for.
        self.text.shrink_to_fit();
        let mut text = Bytes::from(self.text);
        // What a string was made of is one, between the same bounds.
        let mut take = |bytes: usize| Utf8Bytes::try_from(text.split_to(bytes)).unwrap_or_default();
        let with_text = |(event, kind, frame)| StoredEvent { kind: take(kind), frame: take(frame), ..event };
        self.events.into_iter().map(with_text).collect()
    }
}

/// The first event that the durable subscription is to be sent again, of those that it wants.
fn requeued(
    store: &Store,
    who: &Principal,
    thread: &str,
    (name, kinds): (&str, Option<&[String]>),
    mut charge: Charge,
) -> Result<Outcome, Error> {
    for delivery in store.requeued_deliveries(&who.tenant, thread, &who.user, name)? {
        let (mut found, mut needs) = (None, None);
        let range = EventRange { from: delivery.seq, to: delivery.seq, limit: 1, ..EventRange::all() };
        store.visit_events(&who.tenant, thread, range, |seq, row| {
            let bytes = row.frame.len() + EVENT_OVERHEAD;
            if kinds.is_some_and(|kinds| !kinds.iter().any(|kind| *kind == *row.kind)) {
                return Ok::<_, StoreError>(ControlFlow::Continue(()));
            }
            if charge.grow_to(bytes).is_ok() {
                found = Some(StoredEvent::new(seq, row));
            } else {
                needs = Some(bytes);
            }
            Ok(ControlFlow::Break(()))
        })?;
        if let Some(bytes) = needs {
            return Ok(Outcome::Needs(bytes));
        }
        let Some(mut event) = found else { continue };
        charge.shrink_to(event.frame.len() + EVENT_OVERHEAD);
        let charge = Arc::new(charge);
        if event.frame.len() > LARGE {
            event.frame = charged(std::mem::take(&mut event.frame), &charge);
        }
        return Ok(Outcome::Chunk(Chunk::Requeued(Some(ReadDelivery { delivery, event, charge }))));
    }
    Ok(Outcome::Chunk(Chunk::Requeued(None)))
}

/// The text of messages that are being written in the thread, beyond what the client has: of one message at least, and of as
/// many as a read may bring.
fn open_text(
    store: &Store,
    who: &Principal,
    thread: &str,
    from: u64,
    delivered: &DeliveredText,
    mut charge: Charge,
) -> Result<Outcome, Error> {
    let (mut texts, mut used, mut next, mut more) = (Vec::new(), 0, from, false);
    for message in store.open_messages(&who.tenant, thread, from)? {
        let (number, key) = message?;
        let name = Delta::name(&key.run.run, &key.message);
        let known = delivered.get(&name).copied();
        let Some(row) = open(store, &key)? else { continue };

        // The text, and the frame that is made of it.
        let bytes = 2 * row.bytes as usize + FRAME_OVERHEAD;
        let fits = used + bytes <= charge.bytes();
        if !fits && used > 0 {
            more = true;
            break;
        }
        if !fits && charge.grow_to(bytes).is_err() {
            return Ok(Outcome::Needs(bytes));
        }
        let has = known.filter(|known| known.restarts >= row.restarts);
        let (begin, text) = store.text_after(&key, has.unwrap_or(TextPosition::beginning(row.restarts)))?;
        // Looked up after the text: if the message was closed meanwhile, the text may be incomplete, but the event that closed
        // it comes live and has all of it.
        let Some(row) = open(store, &key)? else { continue };

        let end = TextPosition { chars: begin.chars + text.chars().count() as u64, ..begin };
        // Also where the new text has no character yet, the client is to drop the one before.
        let restart = known.is_some_and(|known| known.restarts < begin.restarts);
        let adds_nothing = text.is_empty() && known.is_some() && !restart;
        let frame = (!adds_nothing).then(|| delta(thread, &key, &row, &name, begin, end, text).frame(restart));
        let bytes = frame.as_ref().map_or(0, |frame| frame.len()) + EVENT_OVERHEAD;
        // Of text that JSON has to escape, the frame is longer than was charged for.
        if charge.grow_to(used + bytes).is_err() {
            if used == 0 {
                return Ok(Outcome::Needs(2 * bytes));
            }
            more = true;
            break;
        }
        used += bytes;
        texts.push((name, end, frame));
        next = number + 1;
    }
    charge.shrink_to(used);
    let charge = Arc::new(charge);
    let texts = texts.into_iter().map(|(name, end, frame)| {
        let frame = frame.map(|frame| charged(frame, &charge));
        OpenText { name, end, frame }
    });
    Ok(Outcome::Chunk(Chunk::OpenText { texts: texts.collect(), next: more.then_some(next) }))
}

/// A frame whose bytes hold its charge.
fn charged(frame: Utf8Bytes, charge: &Arc<Charge>) -> Utf8Bytes {
    let bytes = memory::charged(frame.clone().into(), charge.clone());
    // The bytes are those of a text.
    Utf8Bytes::try_from(bytes).unwrap_or(frame)
}

/// A message's row, while it is being written.
fn open(store: &Store, key: &MessageKey) -> Result<Option<MessageRow>, StoreError> {
    Ok(store.message(key)?.filter(|row| row.closed.is_none()))
}

fn delta(
    thread: &str,
    key: &MessageKey,
    row: &MessageRow,
    name: &Arc<str>,
    begin: TextPosition,
    end: TextPosition,
    text: String,
) -> Delta {
    Delta {
        name: name.clone(),
        thread: thread.into(),
        run: key.run.run.as_str().into(),
        message: key.message.as_str().into(),
        event: Uuid::from_bytes(row.event),
        from: row.from.as_str().into(),
        at: clock::rfc3339(row.last_at).into(),
        priority: None,
        head: 0,
        restarts: begin.restarts,
        from_char: begin.chars,
        to_char: end.chars,
        text,
    }
}
