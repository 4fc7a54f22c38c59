//! Messages written in pieces (the contract's section 5): pieces have no seq, they are the making of one event, the
//! `agent_message` that closes them.
//!
//! A piece goes on where the message ends by now: what is there already is passed over, a hole is `run_order`. The agent
//! closes a message by an `agent_message` with its name in `data.message`, which may have a text of its own; what the end of
//! a run leaves open is closed before it, by an event that the projector makes of the text and whose id follows from it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use super::data;
use super::runs::Rejected;
use super::{Published, Verdict};
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::LogEvent;
use crate::protocol::kinds::{AGENT_MESSAGE, DeltaData, text_of};
use crate::store::messages::{ClosedRow, MessageKey, MessageRow};
use crate::store::runs::{Mark, RunKey};
use crate::store::{Batch, Store, StoreError, ThreadRow};

/// The longest text of a message written in pieces, in bytes.
const MAX_TEXT: u64 = 1 << 20;
/// Messages of a thread that are written at a time, and the bytes of their texts: the end of a run closes all of its own at
/// once, and who joins is told all of them.
const MAX_OPEN: u32 = 1_000;
const MAX_OPEN_TEXT: u64 = 8 << 20;

/// What the batch in hand has written, which the store does not show yet.
#[derive(Default)]
pub(super) struct Messages {
    at_hand: HashMap<MessageKey, AtHand>,
}

struct AtHand {
    row: MessageRow,
    /// Pieces of this batch, by where they begin.
    fresh: Vec<(u64, String)>,
}

/// A message that is to be closed, with the `data` of the event that does.
pub(super) struct Closing {
    pub(super) key: MessageKey,
    row: MessageRow,
    /// If it is not what was published.
    pub(super) data: Option<Box<RawValue>>,
}

/// What an `agent_message` means for a message written in pieces.
pub(super) enum Closes {
    /// Nothing: it stands for itself.
    None,
    It(Box<Closing>),
    /// It was closed before.
    Was(Verdict),
}

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow, default)]
    message: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

impl Messages {
    pub(super) fn clear(&mut self) {
        self.at_hand.clear();
    }

    fn row(&self, store: &Store, key: &MessageKey) -> Result<Option<MessageRow>, StoreError> {
        match self.at_hand.get(key) {
            Some(it) => Ok(Some(it.row.clone())),
            None => store.message(key),
        }
    }

    /// What of a piece is new: nothing, if all of it is there already. `open` says whether its run is, and with how many
    /// pieces so far.
    pub(super) fn judge(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        run: RunKey,
        thread: &ThreadRow,
        open: Result<u64, Error>,
    ) -> Result<Option<(Delta, u64)>, Rejected> {
        let data: DeltaData = data(event)?;
        let key = MessageKey { run, message: data.message.clone().into_owned() };
        let row = self.row(store, &key)?;
        let chars = row.as_ref().map_or(0, |row| row.chars);
        let to_char = data.to_char();
        if row.is_some() && to_char <= chars {
            return Ok(None);
        }
        let before = open?;
        if row.as_ref().is_some_and(|row| row.closed.is_some()) {
            return Err(refused("the message is closed: another message is expected", "data.message"));
        }
        if data.from_char > chars {
            let why = format!("the message has {chars} characters: the piece from character {chars} on is expected");
            return Err(refused(why, "data.from_char"));
        }
        let text: String = data.text.chars().skip((chars - data.from_char) as usize).collect();
        check_room(row.as_ref(), thread, text.len() as u64)?;
        let piece = Delta {
            name: Delta::name(&key.run.run, &key.message),
            thread: key.run.thread.into(),
            run: key.run.run.into(),
            message: key.message.into(),
            event: event.event,
            from: (*event.from).into(),
            at: (*event.at).into(),
            priority: event.priority,
            behind: thread.head,
            from_char: chars,
            to_char,
            text,
        };
        Ok(Some((piece, before)))
    }

    /// Writes the piece; whether it is a message's first.
    pub(super) fn apply(
        &mut self,
        store: &Store,
        run: RunKey,
        (piece, before): (&Delta, u64),
        at: u64,
        batch: &mut Batch<'_>,
    ) -> Result<bool, StoreError> {
        let key = MessageKey { run, message: piece.message.to_string() };
        let known = self.row(store, &key)?;
        let begins = known.is_none();
        let mut row = known.unwrap_or_else(|| MessageRow {
            from: piece.from.to_string(),
            event: [0; 16],
            begun: before,
            chars: 0,
            bytes: 0,
            begun_at: at,
            last_at: at,
            closed: None,
        });
        (row.chars, row.last_at, row.event) = (piece.to_char, at, *piece.event.as_bytes());
        row.bytes += piece.text.len() as u64;
        batch.put_delta(&key, &row, piece.from_char, &piece.text);
        let at_hand = self.at_hand.entry(key).or_insert_with(|| AtHand { row: row.clone(), fresh: Vec::new() });
        at_hand.row = row;
        at_hand.fresh.push((piece.from_char, piece.text.clone()));
        Ok(begins)
    }

    /// The whole text of an open message.
    fn text(&self, store: &Store, key: &MessageKey) -> Result<String, StoreError> {
        let mut text = store.text_behind(key, 0)?;
        let fresh = self.at_hand.get(key).into_iter().flat_map(|it| &it.fresh);
        text.extend(fresh.map(|(_, text)| text.as_str()));
        Ok(text)
    }

    /// What an `agent_message` that names a message does to it. A message is closed by who began it, or by any agent, but
    /// by no other member of the thread.
    pub(super) fn judge_closing(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        by_member: bool,
    ) -> Result<Closes, Rejected> {
        // What is no object with such fields was refused at the edge, or is nobody's closing.
        let Ok(Named { message: Some(message), content }) = data::<Named>(event) else { return Ok(Closes::None) };
        let found = match self.find(store, event, &message)? {
            Some(key) => self.row(store, &key)?.map(|row| (key, row)),
            None => None,
        };
        let Some((key, row)) = found else {
            return match content {
                Some(_) => Ok(Closes::None),
                None => {
                    Err(refused("no such message is being written: agent_token is expected before", "data.message"))
                }
            };
        };
        if by_member && row.from != event.from {
            return Err(Error::new(Code::Forbidden, "the message is another's to close").at("data.message").into());
        }
        if let Some(closed) = &row.closed {
            let seq = closed.mark.seq;
            return Ok(Closes::Was(if closed.content == event.content_digest() {
                Ok(Published { seq, event: Uuid::from_bytes(closed.event), duplicate: true })
            } else {
                Err(Error::new(Code::Conflict, format!("the message was closed before, seq {seq}")).at("data.message"))
            }));
        }
        let text = self.text(store, &key)?;
        let data = match content {
            Some(content) if text_of(content).as_deref() == Some(&text) => None,
            Some(_) => Some(with_field(event.data, "revised", &true)),
            None => Some(with_field(event.data, "content", &text)),
        };
        Ok(Closes::It(Box::new(Closing { key, row, data })))
    }

    /// The message of this name: in the event's run, or (if it says none) the one that its user writes on the thread.
    fn find(&self, store: &Store, event: &LogEvent<'_>, message: &str) -> Result<Option<MessageKey>, StoreError> {
        if let Some(run) = event.run.as_deref() {
            let run = RunKey::new(&event.tenant, &event.thread, run);
            let key = MessageKey { run, message: message.to_owned() };
            return Ok(self.row(store, &key)?.map(|_| key));
        }
        let mut keys = store.open_messages(&event.tenant, &event.thread)?;
        keys.extend(
            self.at_hand
                .keys()
                .filter(|key| *key.run.tenant == *event.tenant && *key.run.thread == *event.thread)
                .cloned(),
        );
        keys.retain(|key| key.message == message);
        keys.sort_by(|a, b| a.run.run.cmp(&b.run.run));
        for key in keys {
            if self.row(store, &key)?.is_some_and(|row| row.closed.is_none() && row.from == event.from) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Messages that the end of their run closes, in the order in which they were begun.
    pub(super) fn left_open(&self, store: &Store, run: &RunKey) -> Result<Vec<Closing>, StoreError> {
        let mut rows: BTreeMap<String, MessageRow> = BTreeMap::new();
        rows.extend(store.messages_of(run)?.into_iter().map(|(key, row)| (key.message, row)));
        rows.extend(
            self.at_hand
                .iter()
                .filter(|(key, _)| key.run == *run)
                .map(|(key, it)| (key.message.clone(), it.row.clone())),
        );
        let mut open = Vec::new();
        for (message, row) in rows.into_iter().filter(|(_, row)| row.closed.is_none()) {
            let key = MessageKey { run: run.clone(), message };
            let content = self.text(store, &key)?;
            // Strings always serialise.
            let data = to_raw_value(&serde_json::json!({"content": content, "message": key.message})).ok();
            open.push(Closing { key, row, data });
        }
        open.sort_by_key(|closing| closing.row.begun);
        Ok(open)
    }

    /// The message is closed by this event.
    pub(super) fn close(
        &mut self,
        closing: &Closing,
        event: &LogEvent<'_>,
        mark: Mark,
        batch: &mut Batch<'_>,
    ) -> Result<(), StoreError> {
        let closed = ClosedRow { mark, event: *event.event.as_bytes(), content: event.content_digest() };
        let row = MessageRow { closed: Some(closed), ..closing.row.clone() };
        let fresh = self.at_hand.remove(&closing.key).map(|it| it.fresh).unwrap_or_default();
        batch.close_message(&closing.key, &row, fresh.iter().map(|(from_char, _)| *from_char))?;
        self.at_hand.insert(closing.key.clone(), AtHand { row, fresh: Vec::new() });
        Ok(())
    }
}

impl Closing {
    /// The event that closes the message because its run ends with `ending`.
    pub(super) fn event<'a>(&'a self, ending: &'a LogEvent<'_>, data: &'a RawValue) -> LogEvent<'a> {
        let mut id = [0; 16];
        let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 message closed by the end of its run");
        hasher.update(ending.event.as_bytes()).update(self.key.message.as_bytes());
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        // A UUIDv7 as every event's, of the ending's time.
        id[..6].copy_from_slice(&ending.event.as_bytes()[..6]);
        LogEvent {
            tenant: (*ending.tenant).into(),
            thread: (*ending.thread).into(),
            kind: AGENT_MESSAGE.into(),
            event: uuid::Builder::from_bytes(id)
                .with_version(uuid::Version::SortRand)
                .with_variant(uuid::Variant::RFC4122)
                .into_uuid(),
            from: (&*self.row.from).into(),
            at: (*ending.at).into(),
            data,
            key: None,
            run: Some((&*self.key.run.run).into()),
            parent: None,
            priority: None,
        }
    }

    /// Of its text.
    pub(super) fn bytes(&self) -> u64 {
        self.row.bytes
    }

    /// What readers know the message by.
    pub(super) fn name(&self) -> Arc<str> {
        Delta::name(&self.key.run.run, &self.key.message)
    }
}

fn check_room(row: Option<&MessageRow>, thread: &ThreadRow, more: u64) -> Result<(), Error> {
    let why = if row.map_or(0, |row| row.bytes) + more > MAX_TEXT {
        format!("a message has at most {MAX_TEXT} bytes")
    } else if row.is_none() && thread.writing >= MAX_OPEN {
        format!("at most {MAX_OPEN} messages of a thread are written at a time")
    } else if thread.writing_bytes + more > MAX_OPEN_TEXT {
        format!("the messages of a thread that are being written have at most {MAX_OPEN_TEXT} bytes together")
    } else {
        return Ok(());
    };
    Err(Error::new(Code::TooLarge, why).at("data.text"))
}

fn refused(what: impl Into<Cow<'static, str>>, field: &'static str) -> Rejected {
    Error::new(Code::RunOrder, what).at(field).into()
}

/// An object with one field set.
fn with_field(object: &RawValue, name: &str, value: &impl serde::Serialize) -> Box<RawValue> {
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(object.get()).unwrap_or_default();
    fields.extend(to_raw_value(value).ok().map(|value| (name.to_owned(), value)));
    // A map of raw JSON always serialises.
    to_raw_value(&fields).unwrap_or_else(|_| object.to_owned())
}
