//! Dead letters: what could not be handled, newest first.

use std::cmp::Reverse;
use std::ops::ControlFlow;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;
use uuid::Uuid;
use warp::http::StatusCode;

use super::Api;
use super::page::{COPIES, EVENT_BYTES, PAGE_BYTES, Page, SortKey};
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::auth::Principal;
use crate::clock;
use crate::edge::blocking;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::http::{DeadLetterItem, DeadLetterList, UnreadableSource};
use crate::store::dead_letters::{DeadLetterCursor, DeadLetterFilter, DeadLetterRow};

/// About the size of an entry without what it is about.
const ITEM_BYTES: usize = 512;

impl SortKey for DeadLetterCursor {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.at.to_be_bytes()[..], &self.id].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<DeadLetterCursor> {
        let (at, id) = bytes.split_first_chunk::<8>()?;
        Some(DeadLetterCursor { at: u64::from_be_bytes(*at), id: id.try_into().ok()? })
    }
}

/// `GET /v1/dead-letters`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["reason", "thread", "group", "cursor", "limit"])?;
    let (reason, thread) = (query.text("reason"), query.text("thread"));
    let filters = [reason.unwrap_or_default(), thread.unwrap_or_default()];
    let page: Page<Reverse<DeadLetterCursor>> = Page::read(&query, &it.who, &api.epoch, "dead-letters", &filters)?;
    if query.text("group").is_some() {
        // There are no consumer groups yet, so there is none whose work could fail.
        return Ok(json(StatusCode::OK, &DeadLetterList { items: Vec::new(), next: None }));
    }

    let filter = DeadLetterFilter { reason: reason.map(str::to_owned), thread: thread.map(str::to_owned) };
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let after = page.after.as_ref().map(|key| key.0);
        let (mut items, mut bytes) = (Vec::new(), 0);
        let last = api.store.dead_letters(&[&it.who.tenant, ""], &filter, after, |key, row, known| {
            let item = item(&api, &it.who, key.id, row, known)?;
            let size = size(&item);
            meter.add(size * COPIES)?;
            bytes += size;
            items.push(item);
            let is_full = items.len() == page.limit || bytes >= PAGE_BYTES;
            Ok::<_, Error>(if is_full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let next = last.map(|key| page.seal(&Reverse(key)));
        Ok(charged(json(StatusCode::OK, &DeadLetterList { items, next }), meter))
    })
    .await
}

/// About how many bytes an entry has.
fn size(item: &DeadLetterItem) -> usize {
    let event = item.event.as_ref().map_or(0, |event| event.get().len());
    let bytes = item.source.as_ref().and_then(|source| source.bytes.as_ref()).map_or(0, String::len);
    ITEM_BYTES + item.error.len() + event + bytes
}

/// `GET /v1/dead-letters/{id}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let none = || Error::new(Code::NotFound, "there is no such dead letter").at("id");
    let id: Uuid = it.segment("id")?.parse().map_err(|_| none())?;
    let mut meter = api.meter(&it.who, 3 * EVENT_BYTES).await?;
    blocking(move || {
        let find = |tenant: &str| api.store.dead_letter(tenant, id.as_bytes());
        let (row, known) = match find(&it.who.tenant)? {
            Some(row) => (row, true),
            None => (find("")?.ok_or_else(none)?, false),
        };
        let item = item(&api, &it.who, *id.as_bytes(), row, known)?;
        meter.add(size(&item) * COPIES)?;
        Ok(charged(json(StatusCode::OK, &item), meter))
    })
    .await
}

/// `known`: whether it is known to be the tenant's.
fn item(api: &Api, who: &Principal, id: [u8; 16], row: DeadLetterRow, known: bool) -> Result<DeadLetterItem, Error> {
    let stored = match (&row.thread, row.seq) {
        (Some(thread), Some(seq)) => api.store.event(&who.tenant, thread, seq)?,
        _ => None,
    };
    // An event that was refused has no seq, and stands in the row.
    let event = stored.map(|event| without_type(&event.frame)).or(row.event);

    Ok(DeadLetterItem {
        id: Uuid::from_bytes(id),
        reason: row.reason,
        at: clock::rfc3339(row.at),
        attempts: row.attempts,
        error: row.error,
        thread: row.thread,
        user: row.user,
        name: row.name,
        seq: row.seq,
        event: event.and_then(|text| RawValue::from_string(text).ok()),
        source: row.source.map(|source| UnreadableSource {
            topic: source.topic,
            partition: source.partition,
            offset: source.offset,
            size: source.size,
            bytes: known.then(|| STANDARD.encode(&source.bytes)),
        }),
    })
}
