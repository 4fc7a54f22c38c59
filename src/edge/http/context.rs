//! A thread as the chat messages that model APIs take: [`crate::views::chat`] over the thread's newest events.

use std::sync::Arc;

use warp::http::{HeaderValue, StatusCode};

use super::Api;
use super::meter::Meter;
use super::page::COPIES;
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::edge::blocking;
use crate::protocol::error::Error;
use crate::protocol::http::Conversation;
use crate::store::runs::RunKey;
use crate::store::{EventRange, StoreError};
use crate::views::chat::{CallResult, Chat, ContextBudget};

const MESSAGES: usize = 100;
const MAX_MESSAGES: usize = 1_000;
const MAX_CHARS: usize = 1_000_000;
/// Bytes of JSON in one answer. Characters are fewer than bytes, and names are not counted among them.
const MAX_BYTES: usize = 16 << 20;
/// Events that are looked at; older ones are left out.
const SCAN: usize = 10_000;
/// Events, and bytes of them, that are read at once.
const CHUNK: usize = 256;
const CHUNK_BYTES: usize = 1 << 20;
/// What an answer holds in memory while it is made, as a rule.
const MEMORY: usize = CHUNK_BYTES + (4 << 20);
/// The header of the answer that says whether the conversation goes further back: the body is what model APIs take.
const TRUNCATED: &str = "weft-truncated";

/// `GET /v1/threads/{thread}/context`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let address = it.address()?;
    let query = it.query(&["max_chars", "max_messages"])?;
    let room = ContextBudget {
        messages: query.up_to("max_messages", MAX_MESSAGES, MESSAGES)?,
        chars: query.up_to("max_chars", MAX_CHARS, MAX_CHARS)?,
        bytes: MAX_BYTES,
    };
    let mut meter = api.meter(&it.who, MEMORY).await?;
    blocking(move || {
        let (tenant, thread) = (&*it.who.tenant, &*address.name);
        let newest = |head| newest(&api, tenant, thread, head, room, &mut meter);
        let (conversation, truncated) = api.rights.read(&it.who, thread, newest)?;

        let mut reply = json(StatusCode::OK, &conversation);
        reply.headers_mut().insert(TRUNCATED, HeaderValue::from_static(if truncated { "true" } else { "false" }));
        Ok(charged(reply, meter))
    })
    .await
}

/// The end of the conversation, as much as there is room for; and whether there is more of it before.
fn newest(
    api: &Api,
    tenant: &str,
    thread: &str,
    head: u64,
    room: ContextBudget,
    meter: &mut Meter,
) -> Result<(Conversation, bool), Error> {
    meter.add(CHUNK_BYTES)?;
    let mut chat = Chat::new(room);
    let (mut to, mut looked, mut counted) = (head, 0, 0);
    while to > 0 && looked < SCAN {
        let limit = CHUNK.min(SCAN - looked);
        let range = EventRange { from: 1, to, limit, bytes: CHUNK_BYTES, newest_first: true };
        let events = api.store.events(tenant, thread, range)?;
        looked += events.len();
        to = events.last().map_or(0, |event| event.seq.saturating_sub(1));

        for event in events {
            let result = |run: &str, call: &str| result_of(api, &RunKey::new(tenant, thread, run), call, head);
            if !chat.prepend(event.seq, &event.kind, event.privileged, &event.frame, result)? {
                return Ok((chat.finish(), true));
            }
            meter.add((chat.bytes() - counted) * COPIES)?;
            counted = chat.bytes();
        }
    }
    Ok((chat.finish(), to > 0))
}

/// A call's `tool_completed`, if it is no newer than `head`.
fn result_of(api: &Api, run: &RunKey, call: &str, head: u64) -> Result<Option<CallResult>, StoreError> {
    let Some(done) = api.store.call(run, call)?.and_then(|row| row.done) else { return Ok(None) };
    if done.seq > head {
        return Ok(None);
    }
    let event = api.store.event(&run.tenant, &run.thread, done.seq)?;
    Ok(event.map(|event| CallResult { seq: done.seq, frame: event.frame.to_string() }))
}
