//! Threads: the list of them, one on its own, and how one is made, retitled and given members.

use std::cmp::Reverse;
use std::sync::Arc;

use serde_json::json as value;
use serde_json::value::RawValue;
use warp::http::StatusCode;

use super::meter::Meter;
use super::page::{Page, SortKey};
use super::reply::{Reply, charged, json};
use super::request::Request;
use super::{Api, if_readable};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::auth::scopes::Standing;
use crate::clock;
use crate::edge::blocking;
use crate::log::Grant;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::http::{ThreadBody, ThreadDetail, ThreadItem, ThreadList};
use crate::protocol::ids;
use crate::protocol::ids::ThreadAddress;
use crate::protocol::json;
use crate::protocol::kinds::{MEMBER_ADDED, THREAD_CREATED, THREAD_UPDATED};
use crate::store::ThreadRow;
use crate::store::activity::{Cell, UserThreads};

/// About the size of an entry of the list without its members and its newest event.
const ITEM_BYTES: usize = 1 << 10;
/// What a member's name takes in memory beside its letters.
const MEMBER_BYTES: usize = 32;
/// What a thread on its own takes, as a rule.
const DETAIL_BYTES: usize = 64 << 10;
const MAX_TITLE: usize = 512;
/// Members that one `PUT` may name.
const MAX_MEMBERS: usize = 1_000;

/// Newest activity first, then by id.
type ByActivity = (Reverse<u64>, String);

impl SortKey for ByActivity {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.0.0.to_be_bytes()[..], self.1.as_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<ByActivity> {
        let (last_at, thread) = bytes.split_first_chunk::<8>()?;
        Some((Reverse(u64::from_be_bytes(*last_at)), String::from_utf8(thread.to_vec()).ok()?))
    }
}

/// `GET /v1/threads`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["all", "cursor", "limit"])?;
    if query.one_of("all", &["false", "true"])? == "true" {
        scopes::read_all(it.who.scopes).map_err(|error| error.at("all"))?;
        let page = Page::read(&query, &it.who, &api.epoch, "threads", &["all"])?;
        drop(query);
        return list_all(api, it, page).await;
    }
    let page: Page<ByActivity> = Page::read(&query, &it.who, &api.epoch, "threads", &[])?;
    drop(query);
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let who = &it.who;
        let threads = active_threads(&api, who)?;
        let rows = page_by_activity(&threads, page.after.as_ref(), page.limit + 1);

        let make = |(_, thread): &ByActivity, (), meter: &mut Meter| {
            let Some(row) = api.store.thread(&who.tenant, thread)? else { return Ok(None) };
            if_readable(api.rights.read(who, thread, |_| item(&api, who, thread, row, meter)))
        };
        let (threads, next) = page.fill(rows.into_iter().map(|key| Ok((key, ()))), &mut meter, make)?;
        Ok(charged(json(StatusCode::OK, &ThreadList { threads, next }), meter))
    })
    .await
}

/// The user's threads. One who is in so many that they are not kept in memory waits for others of that kind.
pub fn active_threads(api: &Api, who: &Principal) -> Result<UserThreads, Error> {
    let busy = || Error::new(Code::Unavailable, "another list of very many threads is being read").retry_after(1_000);
    api.store.active_threads(&who.tenant, &who.user)?.ok_or_else(busy)
}

/// The first threads after `after`, newest activity first. Looks at all of the user's, in memory alone.
fn page_by_activity(threads: &[Arc<Cell>], after: Option<&ByActivity>, count: usize) -> Vec<ByActivity> {
    // The time of each is read once: commits move it meanwhile.
    let keys = threads.iter().map(|cell| (Reverse(cell.last_at()), cell.thread()));
    let after = after.map(|(at, thread)| (*at, &**thread));
    let mut keys: Vec<(Reverse<u64>, &str)> = keys.filter(|key| after.is_none_or(|after| *key > after)).collect();
    if keys.len() > count {
        keys.select_nth_unstable(count);
        keys.truncate(count);
    }
    keys.sort_unstable();
    keys.into_iter().map(|(at, thread)| (at, thread.to_owned())).collect()
}

/// All threads of the tenant, by their ids: in the order in which they stand, so that a page costs what it holds.
async fn list_all(api: Arc<Api>, it: Request, page: Page<Vec<u8>>) -> Result<Reply, Error> {
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let who = &it.who;
        let after = page.after.as_deref().map(String::from_utf8_lossy);
        let rows = api.store.threads_after(&who.tenant, after.as_deref(), page.limit + 1)?;
        let rows = rows.into_iter().map(|(thread, row)| Ok((thread.clone().into_bytes(), (thread, row))));
        let make = |_: &Vec<u8>, (thread, row): (String, ThreadRow), meter: &mut Meter| {
            item(&api, who, &thread, row, meter).map(Some)
        };
        let (threads, next) = page.fill(rows, &mut meter, make)?;
        Ok(charged(json(StatusCode::OK, &ThreadList { threads, next }), meter))
    })
    .await
}

/// An entry of the list, and about how many bytes it has.
fn item(
    api: &Api,
    who: &Principal,
    thread: &str,
    row: ThreadRow,
    meter: &mut Meter,
) -> Result<(ThreadItem, usize), Error> {
    let last = api.store.newest(&who.tenant, thread)?;
    let acked = api.store.acked(&who.tenant, thread, &who.user)?;
    let (members, members_bytes) = members(api, who, thread, meter)?;
    let last_bytes = last.as_ref().map_or(0, |event| event.frame.len());
    let item = ThreadItem {
        thread: thread.to_owned(),
        head: row.head,
        unread: row.head.saturating_sub(acked),
        members,
        title: row.title,
        last: last.and_then(|event| RawValue::from_string(without_type(&event.frame)).ok()),
    };
    Ok((item, ITEM_BYTES + members_bytes + last_bytes))
}

/// A thread's members, and about how many bytes they take in an answer.
fn members(api: &Api, who: &Principal, thread: &str, meter: &mut Meter) -> Result<(Vec<String>, usize), Error> {
    let (mut members, mut bytes) = (Vec::new(), 0);
    for member in api.store.members(&who.tenant, thread) {
        let member = member?;
        // The name in the list, and its allocation.
        meter.add(member.len() + MEMBER_BYTES)?;
        bytes += member.len() + 3;
        members.push(member);
    }
    Ok((members, bytes))
}

/// `GET /v1/threads/{thread}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    show(api, it.who, address, StatusCode::OK).await
}

async fn show(api: Arc<Api>, who: Principal, address: ThreadAddress, status: StatusCode) -> Result<Reply, Error> {
    let mut meter = api.meter(&who, DETAIL_BYTES).await?;
    blocking(move || {
        let detail = api.rights.read(&who, &address.name, |_| detail(&api, &who, &address, &mut meter))?;
        Ok(charged(json(status, &detail), meter))
    })
    .await
}

fn detail(api: &Api, who: &Principal, address: &ThreadAddress, meter: &mut Meter) -> Result<ThreadDetail, Error> {
    let thread = &address.name;
    let row = match api.store.thread(&who.tenant, thread)? {
        Some(row) => row,
        // Reserved threads are there before their first event.
        None if ids::is_reserved(thread) => ThreadRow::default(),
        None => return Err(Error::no_thread()),
    };
    let (members, bytes) = members(api, who, thread, meter)?;
    // As JSON, which grows by doubling.
    meter.add(bytes * 2)?;
    Ok(ThreadDetail {
        thread: address.called.clone(),
        epoch: api.epoch.clone(),
        head: row.head,
        members,
        title: row.title,
        created_at: (row.head > 0).then(|| clock::rfc3339(row.created_at)),
        hash: blake3::Hash::from_bytes(row.hash).to_hex().to_string(),
    })
}

/// `PUT /v1/threads/{thread}`: makes the thread, or retitles it and adds members.
pub async fn put(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let thread = it.thread_id()?;
    let body = api.body(&mut it).await?;
    let wanted: ThreadBody =
        if body.text.trim().is_empty() { ThreadBody::default() } else { json::decode(&body.text)? };
    check_wanted(&wanted)?;
    scopes::may_publish(it.who.scopes)?;

    let is_new = api.rights.standing(&it.who, &thread)? == Standing::NoThread;
    let created = is_new && create(&api, &it, &thread, &wanted).await?;
    if !created {
        change(&api, &it, &thread, &wanted).await?;
    }

    drop(body);
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    show(api, it.who, ThreadAddress::named(thread), status).await
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

/// `false` if another request made the thread first.
async fn create(api: &Api, it: &Request, thread: &str, wanted: &ThreadBody) -> Result<bool, Error> {
    let mut data = serde_json::Map::new();
    if let Some(title) = &wanted.title {
        data.insert("title".into(), title.clone().into());
    }
    data.insert("members".into(), wanted.members.clone().unwrap_or_default().into());

    match api.append(&it.who, thread, THREAD_CREATED, &data, Grant::Member, it.traceparent()?).await {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.code, Code::Conflict | Code::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn change(api: &Api, it: &Request, thread: &str, wanted: &ThreadBody) -> Result<(), Error> {
    let may_manage = || scopes::manage(it.who.scopes, api.rights.standing(&it.who, thread)?);
    let grant = api.level.look(may_manage).await?;
    let traceparent = it.traceparent()?;
    if let Some(title) = &wanted.title {
        let data = value!({"title": title});
        api.append(&it.who, thread, THREAD_UPDATED, &data, grant, traceparent).await?;
    }
    for member in wanted.members.iter().flatten() {
        let data = value!({"user": member});
        api.append(&it.who, thread, MEMBER_ADDED, &data, grant, traceparent).await?;
    }
    Ok(())
}
