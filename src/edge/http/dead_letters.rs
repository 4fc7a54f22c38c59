//! Dead letters over HTTP: what could not be handled, newest first. Scope `admin`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;
use uuid::Uuid;
use warp::http::StatusCode;

use super::page;
use super::page::Scope;
use super::reply::{json, query, segment};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::clock;
use crate::edge::Context;
use crate::edge::http::reply::Reply;
use crate::edge::routes::{Request, blocking};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::http::{DeadLetterItem, DeadLetterList, UnreadableSource};
use crate::store::EventRange;
use crate::store::dead_letters::{DeadLetterCursor, DeadLetterFilter, DeadLetterRow};

/// `GET /v1/dead-letters`
pub async fn list(it: Request) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::administer(who.scopes)?;
    let query = query(&it.query, &["reason", "thread", "group", "cursor", "limit"])?;
    let text = |name| query.text(name).map(str::to_owned);
    let filter = DeadLetterFilter { reason: text("reason"), thread: text("thread") };
    let part = |value: &Option<String>| value.clone().unwrap_or_default();
    let scope = Scope::of(&["dead-letters", &who.key, &part(&filter.reason), &part(&filter.thread)]);
    let behind = query.text("cursor").map(|text| scope.open(text).and_then(|place| place_of(&place))).transpose()?;
    let limit = query.limit()?;
    if query.text("group").is_some() {
        // No work is handed out to groups yet, so that none of theirs can fail.
        return Ok(json(StatusCode::OK, &DeadLetterList { items: Vec::new(), next: None }));
    }
    blocking(move || {
        let (rows, next) = it.ctx.store.dead_letters(&[&who.tenant, ""], &filter, behind, limit)?;
        let items = rows.into_iter().map(|(place, row, known)| item(&it.ctx, &who, place.id, row, known));
        let items = items.collect::<Result<_, _>>()?;
        let next = next.map(|place| scope.seal(&[&place.at.to_be_bytes()[..], &place.id].concat()));
        Ok(json(StatusCode::OK, &DeadLetterList { items, next }))
    })
    .await
}

fn place_of(bytes: &[u8]) -> Result<DeadLetterCursor, Error> {
    let (at, id) = bytes.split_first_chunk::<8>().ok_or_else(page::refused)?;
    Ok(DeadLetterCursor { at: u64::from_be_bytes(*at), id: id.try_into().map_err(|_| page::refused())? })
}

/// `GET /v1/dead-letters/{id}`
pub async fn read(it: Request, id: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::administer(who.scopes)?;
    query(&it.query, &[])?;
    let none = || Error::new(Code::NotFound, "there is no such dead letter").at("id");
    let id: Uuid = segment("id", id)?.parse().map_err(|_| none())?;
    blocking(move || {
        let find = |tenant: &str| it.ctx.store.dead_letter(tenant, id.as_bytes());
        let (row, known) = match find(&who.tenant)? {
            Some(row) => (row, true),
            None => (find("")?.ok_or_else(none)?, false),
        };
        Ok(json(StatusCode::OK, &item(&it.ctx, &who, *id.as_bytes(), row, known)?))
    })
    .await
}

/// `known`: whether it is known to be the tenant's.
fn item(
    ctx: &Context,
    who: &Principal,
    id: [u8; 16],
    row: DeadLetterRow,
    known: bool,
) -> Result<DeadLetterItem, Error> {
    let event = match (&row.thread, row.seq) {
        (Some(thread), Some(seq)) => {
            let range = EventRange { from: seq, to: seq, limit: 1, ..EventRange::all() };
            ctx.store.events(&who.tenant, thread, range)?.pop()
        }
        _ => None,
    };
    let event = match (event, row.event) {
        (Some(event), _) => RawValue::from_string(without_type(&event.frame)).ok(),
        (None, refused) => refused.and_then(|text| RawValue::from_string(text).ok()),
    };
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
        event,
        source: row.source.map(|source| UnreadableSource {
            topic: source.topic,
            partition: source.partition,
            offset: source.offset,
            size: source.size,
            bytes: known.then(|| STANDARD.encode(&source.bytes)),
        }),
    })
}
