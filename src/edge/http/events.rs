//! A thread's events: pages of them, and publishing one.

use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::reply::{Reply, json, raw_json};
use super::request::{Request, beyond_head};
use crate::edge::blocking;
use crate::ingest::admit::{Admitted, PublishRequest};
use crate::protocol::command;
use crate::protocol::error::Error;
use crate::protocol::event;
use crate::protocol::event::without_type;
use crate::protocol::http::{PublishBody, PublishReply};
use crate::protocol::json;
use crate::protocol::kinds::DeltaData;
use crate::store::{EventRange, StoredEvent};

/// The most events one page looks at; with a filter on kinds the rest is the next page's.
const SCAN: usize = 10_000;
/// Events read at once where a filter leaves some of them out.
const SCAN_CHUNK: usize = 1_000;
/// Bytes of events in one page; the first event comes in any case.
const PAGE_BYTES: usize = 4 << 20;

/// What one page of events shall hold.
struct EventQuery {
    after: u64,
    /// Exclusive.
    before: u64,
    limit: usize,
    kinds: Option<Vec<String>>,
    newest_first: bool,
}

impl EventQuery {
    fn read(it: &Request) -> Result<EventQuery, Error> {
        let query = it.query(&["after", "before", "limit", "kinds", "order"])?;
        Ok(EventQuery {
            newest_first: query.one_of("order", &["asc", "desc"])? == "desc",
            after: query.number("after")?.unwrap_or(0),
            before: query.number("before")?.unwrap_or(u64::MAX),
            limit: query.limit()?,
            kinds: query.text("kinds").map(|list| list.split(',').map(str::to_owned).collect()),
        })
    }

    fn has(&self, kind: &str) -> bool {
        self.kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
    }
}

/// `GET /v1/threads/{thread}/events`
pub async fn page(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let address = it.address()?;
    let wanted = EventQuery::read(&it)?;
    blocking(move || {
        let (tenant, thread) = (&*it.who.tenant, &*address.name);
        let read = |head| Ok((head, read_page(&api, tenant, thread, head, &wanted)?));
        let (head, (mut events, next)) = api.rights.read(&it.who, thread, read)?;

        if address.is_alias() {
            for event in &mut events {
                event.frame = event::with_thread(&event.frame, thread, &address.called).into();
            }
        }
        Ok(raw_json(StatusCode::OK, page_body(&events, head, next)))
    })
    .await
}

/// The events of a page, and where the next one begins.
fn read_page(
    api: &Api,
    tenant: &str,
    thread: &str,
    head: u64,
    wanted: &EventQuery,
) -> Result<(Vec<StoredEvent>, Option<u64>), Error> {
    if wanted.after > head {
        return Err(beyond_head("after", wanted.after, head));
    }
    let (mut from, mut to) = (wanted.after.saturating_add(1), wanted.before.saturating_sub(1).min(head));
    let (mut found, mut bytes, mut looked) = (Vec::new(), 0, 0);
    while from <= to && found.len() < wanted.limit && looked < SCAN && bytes < PAGE_BYTES {
        let limit = if wanted.kinds.is_some() { SCAN_CHUNK } else { wanted.limit - found.len() };
        let range = EventRange { from, to, limit, bytes: PAGE_BYTES - bytes, newest_first: wanted.newest_first };
        let events = api.store.events(tenant, thread, range)?;
        if events.is_empty() {
            break;
        }

        for event in events {
            if found.len() == wanted.limit {
                break;
            }
            looked += 1;
            if wanted.newest_first {
                to = event.seq - 1;
            } else {
                from = event.seq + 1;
            }
            if wanted.has(&event.kind) {
                bytes += event.frame.len();
                found.push(event);
            }
        }
    }
    let next = (from <= to).then_some(if wanted.newest_first { to + 1 } else { from - 1 });
    Ok((found, next))
}

/// The page, with its events as they are stored.
fn page_body(events: &[StoredEvent], head: u64, next: Option<u64>) -> String {
    let events: Vec<String> = events.iter().map(|event| without_type(&event.frame)).collect();
    let next = next.map_or(String::new(), |next| format!(r#","next":{next}"#));
    format!(r#"{{"events":[{}],"head":{head}{next}}}"#, events.join(","))
}

/// `POST /v1/threads/{thread}/events`
pub async fn publish(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let text = it.body().await?;
    let body: PublishBody = json::decode(&text)?;
    let key = it.header("Idempotency-Key")?;
    command::check_content(body.data, key, body.run.as_deref(), body.parent)?;

    let request = PublishRequest {
        thread: &address.name,
        kind: &body.kind,
        data: body.data,
        key,
        run: body.run.as_deref(),
        parent: body.parent,
        priority: body.priority,
        traceparent: it.traceparent()?,
    };
    if api.rights.must_look_up(&it.who, &address.name)? {
        api.rights.look_up(&it.who, &address.name).await;
    }
    let Admitted { draft, delta } = api.admission.admit(&it.who, request)?;
    let published = api.submit.publish(&draft).await?;

    let status = if published.duplicate { StatusCode::OK } else { StatusCode::CREATED };
    let reply = PublishReply {
        thread: &address.called,
        seq: delta.is_none().then_some(published.seq),
        event: published.event,
        duplicate: published.duplicate,
        message: delta.as_ref().map(|delta| &*delta.message),
        to_char: delta.as_ref().map(DeltaData::to_char),
    };
    Ok(json(status, &reply))
}
