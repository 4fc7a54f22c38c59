//! Threads over HTTP: list, read, create, members, pages of events.

use futures_util::Stream;
use serde_json::json as value;
use serde_json::value::RawValue;
use warp::Buf;
use warp::http::{Method, StatusCode};

use super::page;
use super::page::Scope;
use super::reply::{body, json, query, raw_json, segment};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::auth::scopes::Standing;
use crate::clock;
use crate::edge::Context;
use crate::edge::http::reply::Reply;
use crate::edge::routes::{Request, blocking, raw, traceparent};
use crate::ingest::admit::new_event;
use crate::ingest::submit::Draft;
use crate::log::Grant;
use crate::projector::Published;
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::without_type;
use crate::protocol::http::ThreadBody;
use crate::protocol::http::{Presence, Present, ReceiptItem, ReceiptList, ThreadDetail, ThreadItem, ThreadList};
use crate::protocol::ids;
use crate::protocol::json;
use crate::protocol::kinds::{MEMBER_ADDED, MEMBER_REMOVED, THREAD_CREATED, THREAD_UPDATED};
use crate::store::{EventRange, Store, StoredEvent, ThreadRow};

/// The most events one page looks at; with a filter on kinds the rest is the next page's.
const SCAN: usize = 10_000;
/// Bytes of events in one page; the first event comes in any case.
const PAGE_BYTES: usize = 4 << 20;
const MAX_TITLE: usize = 512;
/// Members that one `PUT` may name.
const MAX_MEMBERS: usize = 1_000;

/// `GET /v1/threads`
pub async fn list(it: Request) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let query = query(&it.query, &["cursor", "limit"])?;
    let limit = query.limit()?;
    let scope = Scope::of(&["threads", &who.key]);
    let behind = query.text("cursor").map(|text| Cursor::open(&scope, text)).transpose()?;
    blocking(move || {
        let ctx = &it.ctx;
        let mut rows = Vec::new();
        for thread in ctx.store.threads_of(&who.tenant, &who.user)? {
            if let Some(row) = ctx.store.thread(&who.tenant, &thread)? {
                rows.push((Cursor { last_at: row.last_at, thread }, row));
            }
        }
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        let mut page: Vec<_> = rows
            .into_iter()
            .filter(|(at, _)| behind.as_ref().is_none_or(|behind| at > behind))
            .take(limit + 1)
            .collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let next = page.last().filter(|_| more).map(|(at, _)| at.seal(&scope));
        let threads = page
            .into_iter()
            .map(|(at, row)| item(&ctx.store, &who, at.thread, row))
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(json(StatusCode::OK, &ThreadList { threads, next }))
    })
    .await
}

fn item(store: &Store, who: &Principal, thread: String, row: ThreadRow) -> Result<ThreadItem, Error> {
    let last =
        store.newest(&who.tenant, &thread)?.and_then(|event| RawValue::from_string(without_type(&event.frame)).ok());
    let members = store.members(&who.tenant, &thread)?;
    let unread = row.head.saturating_sub(store.acked(&who.tenant, &thread, &who.user)?);
    Ok(ThreadItem { head: row.head, unread, members, title: row.title, last, thread })
}

/// A place in the list of threads: newest activity first, then by id.
#[derive(PartialEq, Eq)]
struct Cursor {
    last_at: u64,
    thread: String,
}

impl Ord for Cursor {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.last_at.cmp(&self.last_at).then_with(|| self.thread.cmp(&other.thread))
    }
}

impl PartialOrd for Cursor {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Cursor {
    fn seal(&self, scope: &Scope) -> String {
        scope.seal(&[&self.last_at.to_be_bytes()[..], self.thread.as_bytes()].concat())
    }

    fn open(scope: &Scope, text: &str) -> Result<Cursor, Error> {
        let place = scope.open(text)?;
        let (last_at, thread) = place.split_first_chunk::<8>().ok_or_else(page::refused)?;
        let thread = String::from_utf8(thread.to_vec()).map_err(|_| page::refused())?;
        Ok(Cursor { last_at: u64::from_be_bytes(*last_at), thread })
    }
}

/// `GET /v1/threads/{t}`
pub async fn read(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    query(&it.query, &[])?;
    let (called, thread) = address(&who, thread)?;
    blocking(move || {
        let detail = ThreadDetail { thread: called, ..detail(&it.ctx, &who, thread.clone())? };
        // The right is looked up after the read, so that what came after a removal is not handed out.
        it.ctx.rights.may_read(&who, &thread).map(|()| json(StatusCode::OK, &detail))
    })
    .await
}

fn detail(ctx: &Context, who: &Principal, thread: String) -> Result<ThreadDetail, Error> {
    let row = ctx.store.thread(&who.tenant, &thread)?;
    let row = match ids::is_reserved(&thread) {
        true => row.unwrap_or_default(),
        false => row.ok_or_else(Error::no_thread)?,
    };
    Ok(ThreadDetail {
        epoch: ctx.epoch.clone(),
        head: row.head,
        members: ctx.store.members(&who.tenant, &thread)?,
        title: row.title,
        created_at: (row.head > 0).then(|| clock::rfc3339(row.created_at)),
        hash: blake3::Hash::from_bytes(row.hash).to_hex().to_string(),
        thread,
    })
}

/// A thread as a path names it: as the client calls it, and its name.
pub fn address(who: &Principal, raw: &str) -> Result<(String, String), Error> {
    let called = segment("thread", raw)?;
    ids::check_address(&called)?;
    let thread = ids::resolve(&who.user, &called).into_owned();
    Ok((called, thread))
}

/// A thread that has members and a title; those that exist by their name have neither.
fn thread_id(raw: &str) -> Result<String, Error> {
    let thread = segment("thread", raw)?;
    ids::check_thread_id(&thread)?;
    Ok(thread)
}

/// `PUT /v1/threads/{t}`: creates the thread, or retitles it and adds members.
pub async fn put<B: Buf, E>(
    it: Request,
    thread: &str,
    stream: impl Stream<Item = Result<B, E>>,
) -> Result<Reply, Error> {
    let who = it.who()?;
    query(&it.query, &[])?;
    let thread = thread_id(thread)?;
    let text = body(stream).await?;
    let wanted: ThreadBody = if text.trim().is_empty() { ThreadBody::default() } else { json::decode(&text)? };
    check_wanted(&wanted)?;
    scopes::may_publish(who.scopes)?;
    let created =
        it.ctx.rights.standing(&who, &thread)? == Standing::NoThread && create(&it, &who, &thread, &wanted).await?;
    if !created {
        change(&it, &who, &thread, &wanted).await?;
    }
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    blocking(move || Ok(json(status, &detail(&it.ctx, &who, thread)?))).await
}

fn check_wanted(wanted: &ThreadBody) -> Result<(), Error> {
    if wanted.title.as_ref().is_some_and(|title| title.chars().count() > MAX_TITLE) {
        return Err(Error::field("title", format!("title has at most {MAX_TITLE} characters")));
    }
    let members = wanted.members.as_deref().unwrap_or_default();
    if members.len() > MAX_MEMBERS {
        return Err(Error::new(Code::TooLarge, format!("at most {MAX_MEMBERS} members at once")).at("members"));
    }
    members.iter().try_for_each(|member| ids::check_name("members", member))
}

/// `false` if somebody else was first.
async fn create(it: &Request, who: &Principal, thread: &str, wanted: &ThreadBody) -> Result<bool, Error> {
    let mut data = serde_json::Map::new();
    if let Some(title) = &wanted.title {
        data.insert("title".into(), title.clone().into());
    }
    data.insert("members".into(), wanted.members.clone().unwrap_or_default().into());
    match append(it, who, thread, THREAD_CREATED, &data.into(), Grant::Member).await {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.code, Code::Conflict | Code::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn change(it: &Request, who: &Principal, thread: &str, wanted: &ThreadBody) -> Result<(), Error> {
    let grant = scopes::manage(who.scopes, it.ctx.rights.standing(who, thread)?)?;
    if let Some(title) = &wanted.title {
        append(it, who, thread, THREAD_UPDATED, &value!({"title": title}), grant).await?;
    }
    for member in wanted.members.iter().flatten() {
        append(it, who, thread, MEMBER_ADDED, &value!({"user": member}), grant).await?;
    }
    Ok(())
}

/// Writes an event of the server's own kinds.
async fn append(
    it: &Request,
    who: &Principal,
    thread: &str,
    kind: &str,
    data: &serde_json::Value,
    grant: Grant,
) -> Result<Published, Error> {
    let data = raw(data);
    it.ctx.admission.count_bytes(who, data.get().len())?;
    let event = new_event(&who.tenant, &who.user, thread, kind, &data);
    it.ctx.submit.publish(&Draft { event, grant, traceparent: traceparent(&it.headers)?.as_deref() }).await
}

/// `PUT` and `DELETE /v1/threads/{t}/members/{user}`
pub async fn member(it: Request, thread: &str, user: &str, method: &Method) -> Result<Reply, Error> {
    let kind = match *method {
        Method::PUT => MEMBER_ADDED,
        Method::DELETE => MEMBER_REMOVED,
        _ => {
            let mut reply = super::reply::problem(&Error::new(Code::BadRequest, "a member is PUT or DELETEd"));
            *reply.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            return Ok(reply);
        }
    };
    let who = it.who()?;
    query(&it.query, &[])?;
    let (thread, user) = (thread_id(thread)?, segment("user", user)?);
    ids::check_name("user", &user)?;
    let grant = scopes::manage(who.scopes, it.ctx.rights.standing(&who, &thread)?)?;
    let done = append(&it, &who, &thread, kind, &value!({"user": user}), grant).await?;
    let status = if kind == MEMBER_ADDED && !done.duplicate { StatusCode::CREATED } else { StatusCode::OK };
    Ok(json(
        status,
        &value!({"thread": thread, "user": user, "member": kind == MEMBER_ADDED, "seq": done.seq, "changed": !done.duplicate}),
    ))
}

/// What one page of events shall hold.
struct Page {
    after: u64,
    /// Exclusive.
    before: u64,
    limit: usize,
    kinds: Option<Vec<String>>,
    newest_first: bool,
}

/// `GET /v1/threads/{t}/events`
pub async fn page(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let (called, thread) = address(&who, thread)?;
    let query = query(&it.query, &["after", "before", "limit", "kinds", "order"])?;
    let newest_first = match query.text("order") {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(_) => return Err(Error::field("order", "order is asc or desc")),
    };
    let page = Page {
        after: query.number("after")?.unwrap_or(0),
        before: query.number("before")?.unwrap_or(u64::MAX),
        limit: query.limit()?,
        kinds: query.text("kinds").map(|list| list.split(',').map(str::to_owned).collect()),
        newest_first,
    };
    blocking(move || {
        // Before, so that a stranger learns nothing; after, so that what came after a removal is not handed out.
        it.ctx.rights.may_read(&who, &thread)?;
        let reply = read_page(&it.ctx, &who, &called, &thread, &page)?;
        it.ctx.rights.may_read(&who, &thread).map(|()| reply)
    })
    .await
}

fn read_page(ctx: &Context, who: &Principal, called: &str, thread: &str, page: &Page) -> Result<Reply, Error> {
    let head = ctx.rights.head(who, thread)?;
    if page.after > head {
        return Err(Error::new(Code::CursorInvalid, format!("after is behind the thread's head, {head}")).at("after"));
    }
    let (mut from, mut to) = (page.after.saturating_add(1), page.before.saturating_sub(1).min(head));
    let (mut found, mut bytes, mut looked) = (Vec::new(), 0, 0);
    while from <= to && found.len() < page.limit && looked < SCAN && bytes < PAGE_BYTES {
        let limit = if page.kinds.is_some() { 1_000 } else { page.limit - found.len() };
        let range = EventRange { from, to, limit, bytes: PAGE_BYTES - bytes, newest_first: page.newest_first };
        let events = ctx.store.events(&who.tenant, thread, range)?;
        if events.is_empty() {
            break;
        }
        for event in events {
            if found.len() == page.limit {
                break;
            }
            looked += 1;
            if page.newest_first {
                to = event.seq - 1
            } else {
                from = event.seq + 1
            }
            if page.kinds.as_ref().is_none_or(|kinds| kinds.contains(&event.kind)) {
                bytes += event.frame.len();
                found.push(event);
            }
        }
    }
    let next = (from <= to).then_some(if page.newest_first { to + 1 } else { from - 1 });
    if called != thread {
        found.iter_mut().for_each(|event| event.frame = event::with_thread(&event.frame, thread, called).into());
    }
    Ok(raw_json(StatusCode::OK, page_body(&found, head, next)))
}

/// The page, with its events as they are stored.
fn page_body(events: &[StoredEvent], head: u64, next: Option<u64>) -> String {
    let events: Vec<String> = events.iter().map(|event| without_type(&event.frame)).collect();
    let next = next.map_or(String::new(), |next| format!(r#","next":{next}"#));
    format!(r#"{{"events":[{}],"head":{head}{next}}}"#, events.join(","))
}

/// `GET /v1/threads/{t}/presence`
pub async fn presence(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    query(&it.query, &[])?;
    let (called, thread) = address(&who, thread)?;
    it.ctx.rights.readable(&who, &thread)?;
    let present = it.ctx.hub.present(&ids::log_key(&who.tenant, &thread));
    let users =
        present.into_iter().map(|(user, connections)| Present { user: user.to_string(), connections }).collect();
    Ok(json(StatusCode::OK, &Presence { thread: called, users }))
}

/// `GET /v1/threads/{t}/receipts`
pub async fn receipts(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    query(&it.query, &[])?;
    let (called, thread) = address(&who, thread)?;
    blocking(move || {
        let head = it.ctx.rights.readable(&who, &thread)?;
        let all = it.ctx.store.receipts(&who.tenant, &thread)?;
        let mut receipts = Vec::with_capacity(all.len());
        for (user, name, row) in all {
            // Who has left is no longer anybody's business here.
            if ids::is_reserved(&thread) || it.ctx.store.is_member(&who.tenant, &thread, &user)? {
                let name = Some(name).filter(|name| !name.is_empty());
                receipts.push(ReceiptItem { user, name, seq: row.acked, at: clock::rfc3339(row.at) });
            }
        }
        it.ctx.rights.may_read(&who, &thread)?;
        Ok(json(StatusCode::OK, &ReceiptList { thread: called, head, receipts }))
    })
    .await
}
