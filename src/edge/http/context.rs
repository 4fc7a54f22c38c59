//! A thread as the chat messages that model APIs take.
//!
//! The thread is read from its head backwards until no more fits: the answer is the end of the conversation, without holes.
//! A call of a tool and its result are one turn of it, which stands where the call does, since the result must follow its
//! call directly, whatever other runs did meanwhile.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use warp::http::{HeaderValue, StatusCode};

use super::reply::{json, query};
use super::threads::address;
use crate::auth::Principal;
use crate::auth::scopes;
use crate::edge::Context;
use crate::edge::http::reply::Reply;
use crate::edge::routes::{Request, blocking};
use crate::protocol::error::Error;
use crate::protocol::http::{ChatMessage, Conversation, Function, ToolCall};
use crate::protocol::kinds::AGENT_MESSAGE;
use crate::store::runs::RunKey;
use crate::store::{EventRange, Store, StoreError, StoredEvent};

const MESSAGES: usize = 100;
const MAX_MESSAGES: usize = 1_000;
const MAX_CHARS: usize = 1_000_000;
/// Bytes of JSON in one answer. Characters are fewer than bytes, and names are not counted among them.
const MAX_BYTES: usize = 16 << 20;
/// Events that are looked at; what is behind them is left out.
const SCAN: usize = 10_000;
/// The header of the answer that says whether the conversation goes further back: the body is what model APIs take.
const TRUNCATED: &str = "weft-truncated";
/// Events, and bytes of them, that are read at once.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 1 << 20;

/// What still fits.
struct Room {
    messages: usize,
    chars: usize,
    bytes: usize,
}

/// What is in the answer as a whole or not at all.
enum Turn {
    Said(ChatMessage),
    Called { seq: u64, call: String, function: Function, done: u64, result: String },
}

/// What a stored frame says of an event.
#[derive(Deserialize)]
struct Stored<'a> {
    #[serde(borrow)]
    from: Cow<'a, str>,
    #[serde(borrow, default)]
    run: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// The fields of an event's `data`: which of them mean something, and what they must be, depends on its kind.
#[derive(Default, Deserialize)]
struct Data<'a>(#[serde(borrow)] HashMap<Cow<'a, str>, &'a RawValue>);

impl<'a> Data<'a> {
    /// `null` is the same as absence.
    fn field(&self, name: &str) -> Option<&'a RawValue> {
        self.0.get(name).copied().filter(|value| value.get() != "null")
    }

    fn string(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.field(name)?.get()).ok()
    }
}

/// `GET /v1/threads/{t}/context`
pub async fn read(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let (_, thread) = address(&who, thread)?;
    let query = query(&it.query, &["max_chars", "max_messages"])?;
    let room = Room {
        messages: query.up_to("max_messages", MAX_MESSAGES, MESSAGES)?,
        chars: query.up_to("max_chars", MAX_CHARS, MAX_CHARS)?,
        bytes: MAX_BYTES,
    };
    blocking(move || {
        // Before, so that a stranger learns nothing; after, so that what came after a removal is not handed out.
        it.ctx.rights.may_read(&who, &thread)?;
        let (conversation, truncated) = newest(&it.ctx, &who, &thread, room)?;
        it.ctx.rights.may_read(&who, &thread)?;
        let mut reply = json(StatusCode::OK, &conversation);
        reply.headers_mut().insert(TRUNCATED, HeaderValue::from_static(if truncated { "true" } else { "false" }));
        Ok(reply)
    })
    .await
}

/// The end of the conversation, as much as there is room for; and whether there is more of it before.
fn newest(ctx: &Context, who: &Principal, thread: &str, mut room: Room) -> Result<(Conversation, bool), Error> {
    let head = ctx.rights.head(who, thread)?;
    let reader = Turns { store: &ctx.store, tenant: &who.tenant, thread, head };
    let (mut turns, mut to, mut looked) = (Vec::new(), head, 0);
    while to > 0 && looked < SCAN {
        let limit = PAGE.min(SCAN - looked);
        let range = EventRange { from: 1, to, limit, bytes: PAGE_BYTES, newest_first: true };
        let events = ctx.store.events(&who.tenant, thread, range)?;
        looked += events.len();
        to = events.last().map_or(0, |event| event.seq.saturating_sub(1));
        for event in events {
            let Some(turn) = reader.turn(&event)? else { continue };
            if !room.take(&turn) {
                return Ok((told(turns), true));
            }
            turns.push(turn);
        }
    }
    Ok((told(turns), to > 0))
}

/// Turns, newest first, as messages. Calls have names of their own only within their run: of several calls with one name the
/// oldest keeps it, so that what is told of one does not change with what comes after it.
fn told(turns: Vec<Turn>) -> Conversation {
    let mut messages = Vec::with_capacity(turns.len() * 2);
    let mut taken = HashSet::from([String::new()]);
    for turn in turns.into_iter().rev() {
        match turn {
            Turn::Said(message) => messages.push(message),
            Turn::Called { seq, call, function, done, result } => {
                let mut id = call;
                while !taken.insert(id.clone()) {
                    id = format!("{id}_{seq}");
                }
                let call = ToolCall { id: id.clone(), r#type: "function", function };
                messages.push(ChatMessage::Assistant { content: None, tool_calls: vec![call], seq });
                messages.push(ChatMessage::Tool { tool_call_id: id, content: result, seq: done });
            }
        }
    }
    Conversation(messages)
}

/// What makes a thread's events turns of a conversation.
struct Turns<'a> {
    store: &'a Store,
    tenant: &'a str,
    thread: &'a str,
    /// What came later is not there yet.
    head: u64,
}

impl Turns<'_> {
    /// What an event is in the conversation, if anything. A result is told with its call.
    fn turn(&self, event: &StoredEvent) -> Result<Option<Turn>, Error> {
        let kinds = [AGENT_MESSAGE, "user_message", "system_message", "agent_waiting", "agent_resumed"];
        if event.kind == "tool_executing" {
            return Ok(self.called(event)?);
        }
        if !kinds.contains(&&*event.kind) {
            return Ok(None);
        }
        let Some((stored, data)) = parsed(&event.frame) else { return Ok(None) };
        let (seq, name) = (event.seq, stored.from.into_owned());
        let content = match &*event.kind {
            "agent_waiting" => data.field("prompt").map(as_string),
            "agent_resumed" => data.field("answer").map(as_string),
            _ => data.field("content").map(RawValue::to_owned),
        };
        let said = content.map(|content| match &*event.kind {
            "user_message" | "agent_resumed" => ChatMessage::User { content, name, seq },
            "system_message" => ChatMessage::System { content, seq },
            _ => ChatMessage::Assistant { content: Some(content), tool_calls: Vec::new(), seq },
        });
        Ok(said.map(Turn::Said))
    }

    /// A call with its result; nothing while it is executing.
    fn called(&self, event: &StoredEvent) -> Result<Option<Turn>, StoreError> {
        let Some((stored, data)) = parsed(&event.frame) else { return Ok(None) };
        let (Some(run), Some(call)) = (stored.run, data.string("call")) else { return Ok(None) };
        let key = RunKey::new(self.tenant, self.thread, &run);
        let done = self.store.call(&key, &call)?.and_then(|row| row.done).map(|mark| mark.seq);
        let Some(done) = done.filter(|done| *done <= self.head) else { return Ok(None) };
        let range = EventRange { from: done, to: done, limit: 1, ..EventRange::all() };
        let Some(end) = self.store.events(self.tenant, self.thread, range)?.pop() else { return Ok(None) };
        let Some((_, said)) = parsed(&end.frame) else { return Ok(None) };
        let result = said.field("error").or(said.field("result")).map(text).unwrap_or_default();
        let function = Function {
            name: data.string("tool").unwrap_or_default(),
            arguments: arguments_text(data.field("arguments")),
        };
        Ok(Some(Turn::Called { seq: event.seq, call, function, done, result }))
    }
}

/// What is no object was refused at the edge; in another writer's record it says nothing.
fn parsed(frame: &str) -> Option<(Stored<'_>, Data<'_>)> {
    let stored: Stored = serde_json::from_str(frame).ok()?;
    let data = serde_json::from_str(stored.data.get()).ok()?;
    Some((stored, data))
}

/// A string as it is, anything else as JSON.
fn text(value: &RawValue) -> String {
    serde_json::from_str::<String>(value.get()).unwrap_or_else(|_| value.get().to_owned())
}

/// The same as JSON once more.
fn as_string(value: &RawValue) -> Box<RawValue> {
    // Strings always serialise.
    to_raw_value(&text(value)).unwrap_or_else(|_| value.to_owned())
}

/// Arguments as JSON text. Agents that have them from a model as text publish them as they got them: that is not JSON in a
/// string, it is the text already.
fn arguments_text(value: Option<&RawValue>) -> String {
    let Some(value) = value else { return "{}".to_owned() };
    let text = text(value);
    let is_object = text.trim_start().starts_with('{') && serde_json::from_str::<&RawValue>(&text).is_ok();
    if is_object { text } else { value.get().to_owned() }
}

/// The characters of a content: those of a string, or those of the JSON.
fn chars(content: &RawValue) -> usize {
    match serde_json::from_str::<Cow<str>>(content.get()) {
        Ok(text) => text.chars().count(),
        Err(_) => content.get().chars().count(),
    }
}

impl Room {
    /// Whether the turn fits; then there is less room.
    fn take(&mut self, turn: &Turn) -> bool {
        let (messages, chars, bytes) = match turn {
            Turn::Said(message) => {
                let (content, name) = message.said();
                (1, content.map_or(0, chars), content.map_or(0, |it| it.get().len()) + name)
            }
            Turn::Called { call, function: Function { name, arguments }, result, .. } => (
                2,
                arguments.chars().count() + result.chars().count(),
                call.len() * 2 + name.len() + arguments.len() + result.len(),
            ),
        };
        let left = |has: usize, wants: usize| has.checked_sub(wants);
        match (left(self.messages, messages), left(self.chars, chars), left(self.bytes, bytes)) {
            (Some(messages), Some(chars), Some(bytes)) => {
                *self = Room { messages, chars, bytes };
                true
            }
            _ => false,
        }
    }
}

impl ChatMessage {
    /// Its content, and the length of its name.
    fn said(&self) -> (Option<&RawValue>, usize) {
        match self {
            ChatMessage::System { content, .. } => (Some(content), 0),
            ChatMessage::User { content, name, .. } => (Some(content), name.len()),
            ChatMessage::Assistant { content, .. } => (content.as_deref(), 0),
            ChatMessage::Tool { .. } => (None, 0),
        }
    }
}
