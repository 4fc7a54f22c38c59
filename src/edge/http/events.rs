//! A thread's events: pages of them, and publishing one.

use std::ops::ControlFlow;
use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::meter::Meter;
use super::page::{EVENT_BYTES, PAGE_BYTES};
use super::reply::{Reply, charged, json, raw_json};
use super::request::Request;
use crate::edge::blocking;
use crate::edge::cursor::{beyond_head, check_epoch, name_epoch};
use crate::ingest::admit::{Admitted, PublishRequest};
use crate::protocol::command;
use crate::protocol::error::Error;
use crate::protocol::event;
use crate::protocol::event::without_type;
use crate::protocol::http::{PublishBody, PublishReply};
use crate::protocol::ids::ThreadAddress;
use crate::protocol::json;
use crate::protocol::kinds::DeltaData;
use crate::store::{EventRange, EventRow};

/// The most events one page looks at; with a filter on kinds the rest is the next page's.
const SCAN: usize = 10_000;
/// Bytes of the events that one page looks at.
const SCAN_BYTES: usize = 16 << 20;

/// What one page of events shall hold.
struct EventQuery {
    after: u64,
    /// Exclusive.
    before: u64,
    limit: usize,
    kinds: Option<Vec<String>>,
    newest_first: bool,
    /// Of the log that the client's cursors are from.
    epoch: Option<String>,
}

impl EventQuery {
    fn read(it: &Request) -> Result<EventQuery, Error> {
        let query = it.query(&["after", "before", "limit", "kinds", "order", "epoch"])?;
        Ok(EventQuery {
            newest_first: query.one_of("order", &["asc", "desc"])? == "desc",
            after: query.number("after")?.unwrap_or(0),
            before: query.number("before")?.unwrap_or(u64::MAX),
            limit: query.limit()?,
            kinds: query.text("kinds").map(|list| list.split(',').map(str::to_owned).collect()),
            epoch: query.text("epoch").map(str::to_owned),
        })
    }

    /// What the page may hold in memory while it is made.
    fn memory(&self) -> usize {
        (self.limit * EVENT_BYTES).min(PAGE_BYTES) * 2
    }

    fn has(&self, kind: &str) -> bool {
        self.kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
    }
}

/// `GET /v1/threads/{thread}/events`
pub async fn page(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let address = it.address()?;
    let wanted = EventQuery::read(&it)?;
    let mut meter = api.meter(&it.who, wanted.memory()).await?;
    blocking(move || {
        let thread = &*address.name;
        let body = api.rights.read(&it.who, thread, |head| {
            check_epoch(wanted.epoch.as_deref(), &api.epoch)?;
            let mut page = PageBody::new(&wanted, &address);
            page.read(&api, &it.who.tenant, head, &mut meter)?;
            Ok(page.finish(head))
        })?;
        let mut reply = charged(raw_json(StatusCode::OK, body), meter);
        name_epoch(reply.headers_mut(), &api.epoch);
        Ok(reply)
    })
    .await
}

/// A page that is being written, event by event: at no time are its events in memory beside it.
struct PageBody<'a> {
    wanted: &'a EventQuery,
    address: &'a ThreadAddress,
    text: String,
    /// Events in it, and events that were looked at, with their bytes.
    found: usize,
    looked: usize,
    looked_bytes: usize,
    /// What is left of the thread for the next page.
    from: u64,
    to: u64,
}

impl PageBody<'_> {
    fn new<'a>(wanted: &'a EventQuery, address: &'a ThreadAddress) -> PageBody<'a> {
        PageBody {
            wanted,
            address,
            text: r#"{"events":["#.to_owned(),
            found: 0,
            looked: 0,
            looked_bytes: 0,
            from: wanted.after.saturating_add(1),
            to: wanted.before.saturating_sub(1),
        }
    }

    fn read(&mut self, api: &Api, tenant: &str, head: u64, meter: &mut Meter) -> Result<(), Error> {
        let wanted = self.wanted;
        if wanted.after > head {
            return Err(beyond_head("after", wanted.after, head));
        }
        self.to = self.to.min(head);
        let limit = if wanted.kinds.is_some() { SCAN } else { wanted.limit };
        let range = EventRange { from: self.from, to: self.to, limit, newest_first: wanted.newest_first, bytes: 0 };
        api.store.visit_events(tenant, &self.address.name, range, |seq, event| self.add(seq, event, meter))
    }

    /// Writes an event, unless its kind is not wanted; breaks off at one that does not fit.
    fn add(&mut self, seq: u64, event: &EventRow<'_>, meter: &mut Meter) -> Result<ControlFlow<()>, Error> {
        let bytes = event.frame.len();
        let is_wanted = self.wanted.has(event.kind);
        let has_room = self.found == 0 || self.text.len() + bytes <= PAGE_BYTES;
        let may_look = self.looked == 0 || self.looked_bytes + bytes <= SCAN_BYTES;
        if (is_wanted && (!has_room || self.found == self.wanted.limit)) || !may_look {
            return Ok(ControlFlow::Break(()));
        }

        self.looked += 1;
        self.looked_bytes += bytes;
        if self.wanted.newest_first {
            self.to = seq - 1;
        } else {
            self.from = seq + 1;
        }
        if is_wanted {
            // The text grows by doubling, and the event is copied into it.
            meter.add(bytes * 2)?;
            if self.found > 0 {
                self.text.push(',');
            }
            self.text.push_str(&self.event(event.frame));
            self.found += 1;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The event as a page has it, with its thread as the client calls that.
    fn event(&self, frame: &str) -> String {
        match self.address.is_alias() {
            true => without_type(&event::with_thread(frame, &self.address.name, &self.address.called)),
            false => without_type(frame),
        }
    }

    fn finish(mut self, head: u64) -> String {
        self.text.push_str(&format!(r#"],"head":{head}"#));
        if self.from <= self.to {
            let next = if self.wanted.newest_first { self.to + 1 } else { self.from - 1 };
            self.text.push_str(&format!(r#","next":{next}"#));
        }
        self.text.push('}');
        self.text
    }
}

/// `POST /v1/threads/{thread}/events`
pub async fn publish(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let sent = api.body(&mut it).await?;
    let body: PublishBody = json::decode(&sent.text)?;
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
    let Admitted { draft, delta } = api.level.look(|| api.admission.admit(&it.who, request)).await?;
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
