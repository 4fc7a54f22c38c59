//! Messages written in deltas (the contract's section 5). Deltas have no seq: together they become one event, the
//! `agent_message` that closes the message.
//!
//! A delta continues the message where its text ends by now: characters that are there already are skipped, a gap is
//! `run_order`. The agent closes a message by an `agent_message` with its name in `data.message`, which may have a text of
//! its own. A delta with `restart` begins an open message anew: the text before it is dropped, and so are its characters from
//! the limits. Messages that are open when their run ends are closed before the run is, by events that the projector makes of
//! their texts; the ids of these events follow from the ending event.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::runs::{Rejected, check_open};
use super::thread::{OpenMessages, Thread};
use super::transaction::{EventRecord, Transaction};
use super::{Published, Verdict, rules};
use crate::protocol::command::MAX_DATA;
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{Fields, LogEvent};
use crate::protocol::json;
use crate::protocol::kinds::{AGENT_MESSAGE, DeltaData, text_of};
use crate::store::messages::{ClosedRow, MessageKey, MessageRow, TextPosition, WrittenText};
use crate::store::runs::{EventRef, RunKey, RunRow};
use crate::store::{Store, StoreError, ThreadRow};

/// The longest text of a message written in deltas, in bytes.
const MAX_TEXT: u64 = 1 << 20;
/// The largest `data` of an event that closes such a message: what was published to close it, and its text as JSON, in which
/// a byte may become six (`\u0001`). The text so far that a reader gets in one delta is no larger.
pub const MAX_MESSAGE_DATA: usize = MAX_DATA + 6 * MAX_TEXT as usize + r#""content":"","#.len();
/// Messages of a thread that are written at a time, and the bytes of their texts: the end of a run closes all of its own at
/// once, and a reader that joins gets all of them.
const MAX_OPEN: u32 = 1_000;
const MAX_OPEN_TEXT: u64 = 8 << 20;

/// The messages that this batch has changed.
#[derive(Default)]
pub(super) struct Messages {
    cached: HashMap<MessageKey, CachedMessage>,
}

struct CachedMessage {
    row: MessageRow,
    /// Deltas of this batch: where each begins, and its text.
    new_deltas: Vec<(TextPosition, String)>,
    /// This batch has begun it anew: what the store has of its text is dropped.
    restarted: bool,
}

/// A delta that is accepted, with the rows of its message and its run.
pub(super) struct AcceptedDelta {
    pub(super) delta: Delta,
    /// Whether it is the message's first.
    pub(super) begins: bool,
    /// The bytes of the text that it drops, if it begins its message anew.
    pub(super) drops: Option<u64>,
    pub(super) key: MessageKey,
    /// As it is with the delta.
    row: MessageRow,
    /// As it was before.
    run: RunRow,
}

/// A message that an event closes.
pub(super) struct ClosingMessage {
    pub(super) key: MessageKey,
    row: MessageRow,
    /// `data` of the event as its readers get it, where that differs from what was published.
    pub(super) data: Option<Box<RawValue>>,
}

/// What an `agent_message` does to a message written in deltas.
pub(super) enum MessageClosing {
    /// Nothing: it is a message of its own.
    None,
    Closes(Box<ClosingMessage>),
    AlreadyClosed(Verdict),
}

/// `data` of an `agent_message` that closes a message.
#[derive(Deserialize)]
struct ClosingData<'a> {
    #[serde(borrow, default)]
    message: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// `data` of the event that closes a message because its run ends.
#[derive(Serialize)]
struct ClosedByEnd<'a> {
    content: &'a str,
    message: &'a str,
}

impl Messages {
    fn row(&self, store: &Store, key: &MessageKey) -> Result<Option<MessageRow>, StoreError> {
        match self.cached.get(key) {
            Some(cached) => Ok(Some(cached.row.clone())),
            None => store.message(key),
        }
    }

    /// The part of a delta that is new; `None` if all of it is there already.
    pub(super) fn judge_delta(
        &self,
        store: &Store,
        input: &EventRecord<'_>,
        run_key: RunKey,
        run: Option<RunRow>,
        thread: &ThreadRow,
    ) -> Result<Option<AcceptedDelta>, Rejected> {
        let EventRecord { event, at, record, .. } = *input;
        let data = delta_data(event, record.rules)?;
        let key = MessageKey { run: run_key, message: data.message.clone().into_owned() };
        let known = self.row(store, &key)?;
        let is_open = known.as_ref().is_some_and(|row| row.closed.is_none());
        // A message that was not begun yet begins with it like with any other delta.
        let drops = known.as_ref().filter(|_| is_open && data.restart).map(|row| row.bytes);
        let chars = if drops.is_some() { 0 } else { known.as_ref().map_or(0, |row| row.chars) };
        let to_char = data.to_char();
        if known.is_some() && drops.is_none() && to_char <= chars {
            return Ok(None);
        }

        let run = check_open(run)?;
        if known.is_some() && !is_open {
            return Err(refused("the message is closed: another message is expected", "data.message"));
        }
        if data.from_char > chars {
            let why = format!("the message has {chars} characters: the delta from character {chars} on is expected");
            return Err(refused(why, "data.from_char"));
        }
        let text: String = data.text.chars().skip((chars - data.from_char) as usize).collect();
        check_room(known.as_ref(), thread, drops, text.len() as u64)?;

        let begins = known.is_none();
        let mut row = known.unwrap_or_else(|| MessageRow {
            from: event.from.to_string(),
            event: [0; 16],
            number: thread.messages,
            begun: run.pieces,
            restarts: 0,
            chars: 0,
            bytes: 0,
            begun_at: at,
            last_at: at,
            closed: None,
        });
        if let Some(drops) = drops {
            row.restarts = row.restarts.saturating_add(1);
            row.bytes -= drops;
        }
        row.chars = to_char;
        row.bytes += text.len() as u64;
        row.last_at = at;
        row.event = *event.event.as_bytes();

        let delta = Delta {
            name: Delta::name(&key.run.run, &key.message),
            thread: key.run.thread.as_str().into(),
            run: key.run.run.as_str().into(),
            message: key.message.as_str().into(),
            event: event.event,
            from: (*event.from).into(),
            at: (*event.at).into(),
            priority: event.priority,
            head: thread.head,
            restarts: row.restarts,
            from_char: chars,
            to_char,
            text,
        };
        Ok(Some(AcceptedDelta { delta, begins, drops, key, row, run }))
    }

    /// Writes an accepted delta; returns its run's row as it was before, and the delta for its readers.
    pub(super) fn apply_delta(
        &mut self,
        accepted: AcceptedDelta,
        tx: &mut Transaction<'_>,
    ) -> Result<(RunRow, Delta), StoreError> {
        let AcceptedDelta { delta, begins, drops, key, row, run } = accepted;
        let cached = self.cached.entry(key.clone()).or_insert_with(|| CachedMessage::new(row.clone()));
        if drops.is_some() {
            let before = delta.restarts.saturating_sub(1);
            tx.rows.delete_text(&key, &cached.written_text(before))?;
            cached.new_deltas.clear();
            cached.restarted = true;
        }

        let at = TextPosition { restarts: delta.restarts, chars: delta.from_char };
        tx.rows.put_delta(&key, &row, at, &delta.text);
        if begins {
            tx.rows.open_message(&key, &row);
        }
        cached.row = row;
        cached.new_deltas.push((at, delta.text.clone()));
        Ok((run, delta))
    }

    /// The whole text of an open message with this row.
    fn text(&self, store: &Store, key: &MessageKey, row: &MessageRow) -> Result<String, StoreError> {
        let cached = self.cached.get(key);
        let mut text = match cached {
            Some(cached) if cached.restarted => String::new(),
            _ => store.text_after(key, TextPosition::beginning(row.restarts))?.1,
        };
        let new_deltas = cached.into_iter().flat_map(|cached| &cached.new_deltas);
        text.extend(new_deltas.map(|(_, text)| text.as_str()));
        Ok(text)
    }

    /// What an `agent_message` does to the message that it names. A message is closed by who began it, or by any agent, but
    /// by no other member of the thread.
    pub(super) fn judge_closing(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        thread: &mut Thread,
        by_member: bool,
    ) -> Result<MessageClosing, Rejected> {
        // Without a `message` that is a string, the event is a message of its own.
        let Ok(ClosingData { message: Some(message), content }) = json::decode_data::<ClosingData>(event.data) else {
            return Ok(MessageClosing::None);
        };
        let Some((key, row)) = self.find(store, event, thread, &message)? else {
            return match content {
                Some(_) => Ok(MessageClosing::None),
                None => {
                    Err(refused("no such message is being written: agent_token is expected before", "data.message"))
                }
            };
        };
        if by_member && row.from != event.from {
            return Err(Error::new(Code::Forbidden, "another user writes this message").at("data.message").into());
        }
        if let Some(closed) = &row.closed {
            return Ok(MessageClosing::AlreadyClosed(closed_before(closed, event)));
        }

        let text = self.text(store, &key, &row)?;
        let data = match content {
            Some(content) if text_of(content).as_deref() == Some(&text) => None,
            Some(_) => Some(json::with_field(event.data, "revised", &true)),
            None => Some(json::with_field(event.data, "content", &text)),
        };
        Ok(MessageClosing::Closes(Box::new(ClosingMessage { key, row, data })))
    }

    /// The message of this name: in the event's run, or (if it names none) the one that its user is writing on the thread.
    fn find(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        thread: &mut Thread,
        message: &str,
    ) -> Result<Option<(MessageKey, MessageRow)>, StoreError> {
        if let Some(run) = event.run.as_deref() {
            let run = RunKey::new(&event.tenant, &event.thread, run);
            let key = MessageKey { run, message: message.to_owned() };
            return Ok(self.row(store, &key)?.map(|row| (key, row)));
        }

        let open = thread.open_messages(|| self.open_on_thread(store, event))?;
        let mut named: Vec<&MessageKey> = open.values().filter(|key| key.message == message).collect();
        named.sort_by(|a, b| a.run.run.cmp(&b.run.run));
        for key in named {
            let row = self.row(store, key)?.filter(|row| row.closed.is_none() && row.from == event.from);
            if let Some(row) = row {
                return Ok(Some((key.clone(), row)));
            }
        }
        Ok(None)
    }

    /// The open messages of the event's thread.
    pub(super) fn open_on_thread(&self, store: &Store, event: &LogEvent<'_>) -> Result<OpenMessages, StoreError> {
        let mut open = OpenMessages::new();
        for message in store.open_messages(&event.tenant, &event.thread, 0)? {
            let (number, key) = message?;
            open.insert(number, key);
        }
        let on_thread = |key: &MessageKey| key.run.tenant == *event.tenant && key.run.thread == *event.thread;
        for (key, CachedMessage { row, .. }) in self.cached.iter().filter(|(key, _)| on_thread(key)) {
            match row.closed {
                None => open.insert(row.number, key.clone()),
                Some(_) => open.remove(&row.number),
            };
        }
        Ok(open)
    }

    /// The open messages of the run that the event ends, in the order in which they were begun.
    pub(super) fn open_in_run(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        run: &RunKey,
        thread: &mut Thread,
    ) -> Result<Vec<(MessageKey, MessageRow)>, StoreError> {
        let all = thread.open_messages(|| self.open_on_thread(store, event))?;
        let mut open = Vec::new();
        for key in all.values().filter(|key| key.run == *run) {
            let row = self.row(store, key)?.filter(|row| row.closed.is_none());
            open.extend(row.map(|row| (key.clone(), row)));
        }
        Ok(open)
    }

    /// An open message whose run ends, and the `data` of the event that closes it.
    pub(super) fn close_by_end(
        &self,
        store: &Store,
        key: MessageKey,
        row: MessageRow,
    ) -> Result<(ClosingMessage, Box<RawValue>), StoreError> {
        let text = self.text(store, &key, &row)?;
        let data = json::encode_raw(&ClosedByEnd { content: &text, message: &key.message });
        Ok((ClosingMessage { key, row, data: None }, data))
    }

    /// Writes that the message is closed by this event. Its text is in the event from now on.
    pub(super) fn close(
        &mut self,
        closing: &ClosingMessage,
        event: &LogEvent<'_>,
        appended: EventRef,
        tx: &mut Transaction<'_>,
    ) -> Result<(), StoreError> {
        let closed = ClosedRow { mark: appended, event: *event.event.as_bytes(), content: event.content_digest() };
        let row = MessageRow { closed: Some(closed), ..closing.row.clone() };
        let cached = self.cached.remove(&closing.key).unwrap_or_else(|| CachedMessage::new(closing.row.clone()));
        tx.rows.close_message(&closing.key, &row, &cached.written_text(row.restarts))?;
        self.cached.insert(closing.key.clone(), CachedMessage::new(row));
        Ok(())
    }
}

impl CachedMessage {
    fn new(row: MessageRow) -> CachedMessage {
        CachedMessage { row, new_deltas: Vec::new(), restarted: false }
    }

    /// Where its text stands; in the store it was begun anew so often.
    fn written_text(&self, restarts: u32) -> WrittenText {
        WrittenText {
            in_store: (!self.restarted).then_some(restarts),
            in_batch: self.new_deltas.iter().map(|(at, _)| *at).collect(),
        }
    }
}

impl ClosingMessage {
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

    /// Its number in its thread.
    pub(super) fn number(&self) -> u64 {
        self.row.number
    }

    /// The bytes of its text.
    pub(super) fn bytes(&self) -> u64 {
        self.row.bytes
    }

    /// What readers know the message by.
    pub(super) fn name(&self) -> Arc<str> {
        Delta::name(&self.key.run.run, &self.key.message)
    }
}

/// `data` of a delta, by the rules of its record.
fn delta_data<'a>(event: &'a LogEvent<'_>, rules: u16) -> Result<DeltaData<'a>, Error> {
    let data: DeltaData = json::decode_data(event.data)?;
    if rules < rules::MESSAGES_RESTART && Fields::parse(event.data).is_some_and(|it| it.raw("restart").is_some()) {
        return Err(Error::field("data.restart", "unknown field data.restart"));
    }
    data.check_restart()?;
    Ok(data)
}

/// Whether there is room for `more` bytes in the message and in its thread, without the bytes that are dropped for them.
fn check_room(row: Option<&MessageRow>, thread: &ThreadRow, drops: Option<u64>, more: u64) -> Result<(), Error> {
    let drops = drops.unwrap_or(0);
    let why = if row.map_or(0, |row| row.bytes) - drops + more > MAX_TEXT {
        format!("a message has at most {MAX_TEXT} bytes")
    } else if row.is_none() && thread.writing >= MAX_OPEN {
        format!("at most {MAX_OPEN} messages of a thread are written at a time")
    } else if thread.writing_bytes.saturating_sub(drops) + more > MAX_OPEN_TEXT {
        format!("the messages of a thread that are being written have at most {MAX_OPEN_TEXT} bytes together")
    } else {
        return Ok(());
    };
    Err(Error::new(Code::TooLarge, why).at("data.text"))
}

/// The answer to an event that would close a message which is closed.
fn closed_before(closed: &ClosedRow, event: &LogEvent<'_>) -> Verdict {
    let seq = closed.mark.seq;
    if closed.content != event.content_digest() {
        let why = format!("the message was closed before, seq {seq}");
        return Err(Error::new(Code::Conflict, why).at("data.message"));
    }
    Ok(Published { seq, event: Uuid::from_bytes(closed.event), duplicate: true })
}

fn refused(what: impl Into<Cow<'static, str>>, field: &'static str) -> Rejected {
    Error::new(Code::RunOrder, what).at(field).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_and_no_data_become_more_than_the_largest_data_of_a_message() {
        // The longest text, of what JSON escapes most, in the longest data.
        let text = "\u{1}".repeat(MAX_TEXT as usize);
        let filler = "x".repeat(MAX_DATA - r#"{"message":"m","more":""}"#.len());
        let data = RawValue::from_string(format!(r#"{{"message":"m","more":"{filler}"}}"#)).expect("JSON");
        assert_eq!(data.get().len(), MAX_DATA);
        assert_eq!(json::with_field(&data, "content", &text).get().len(), MAX_MESSAGE_DATA);
        let by_end = json::encode_raw(&ClosedByEnd { content: &text, message: &"\u{1}".repeat(128) });
        assert!(by_end.get().len() <= MAX_MESSAGE_DATA);
    }
}
