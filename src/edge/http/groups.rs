//! Work queues: groups, and a lease for workers that have no connection of their own.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use serde_json::value::RawValue;
use warp::http::StatusCode;

use super::Api;
use super::meter::Meter;
use super::page::{COPIES, EVENT_BYTES, PAGE_BYTES, Page};
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::auth::Principal;
use crate::clock;
use crate::dispatch::{Settling, Wants};
use crate::edge::blocking;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::groups::{
    GroupDeleted, GroupDetail, GroupItem, GroupList, LeaseBody, PauseBody, SettleBody, Settled, SettledList,
    SettlementBody, Settlements, ThreadPaused, WorkItem, WorkList,
};
use crate::protocol::json::decode;
use crate::protocol::work::{Backoff, Delivery, GroupSettings, Outcome, StartFrom, Work, check_group};
use crate::store::GroupRow;

/// About the size of a group in a list, and of what an answer says about an event.
const ITEM_BYTES: usize = 1 << 10;
/// How long a lease waits at least: until the dispatcher has looked. What it has chosen by then is waited for in any case.
const WAIT_AT_LEAST: Duration = Duration::from_millis(100);
/// Settlements of one request that are on their way at once.
const SETTLED_AT_ONCE: usize = 16;

fn name_of(it: &Request) -> Result<String, Error> {
    let group = it.segment("group")?;
    check_group(&group)?;
    Ok(group)
}

fn item(group: &str, row: GroupRow) -> GroupItem {
    GroupItem {
        group: group.to_owned(),
        kinds: row.kinds,
        from: if row.from == 0 { StartFrom::Start } else { StartFrom::Now },
        lease_ms: row.lease_ms,
        attempts: row.attempts,
        backoff: Backoff { min_ms: row.backoff_min_ms, max_ms: row.backoff_max_ms },
        limit: row.limit,
        overflow: row.overflow,
        order: row.order,
        boost: row.boost,
        paused: row.paused,
        created_at: clock::rfc3339(row.created_at),
    }
}

/// `GET /v1/groups`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let page: Page<Vec<u8>> = Page::read(&it.query(&["cursor", "limit"])?, &it.who, &api.epoch, "groups", &[])?;
    let mut meter = api.meter(&it.who, (page.limit + 1) * ITEM_BYTES * COPIES).await?;
    blocking(move || {
        let found = api.store.groups(&it.who.tenant).map(|row| row.map(|(name, row)| (name.into_bytes(), row)));
        let selected = page.select(found)?;
        let make = |name: &Vec<u8>, row: GroupRow, _: &mut Meter| {
            let size = ITEM_BYTES + row.kinds.iter().map(String::len).sum::<usize>();
            Ok(Some((item(&String::from_utf8_lossy(name), row), size)))
        };
        let (groups, next) = page.fill(selected.into_iter().map(Ok), &mut meter, make)?;
        Ok(charged(json(StatusCode::OK, &GroupList { groups, next }), meter))
    })
    .await
}

/// `GET /v1/groups/{group}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    let row = api.dispatcher.group(&it.who.tenant, &group).await?;
    let stats = api.dispatcher.stats(&it.who.tenant, &group).await?;
    let detail = GroupDetail {
        group: item(&group, row),
        depth: stats.depth.events,
        overflowing: stats.depth.overflowing,
        oldest_ms: stats.oldest_at.map(|at| clock::now_ms().saturating_sub(at)),
        in_flight: stats.depth.in_flight,
        paused_threads: stats.paused_threads,
        workers: stats.workers,
    };
    Ok(json(StatusCode::OK, &detail))
}

/// `PUT /v1/groups/{group}`: makes it, or gives it other settings.
pub async fn put(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    let body = api.body(&mut it).await?;
    let settings = if body.text.trim().is_empty() { GroupSettings::default() } else { decode(&body.text)? };
    let is_new = api.store.group(&it.who.tenant, &group)?.is_none();
    api.dispatcher.set(&it.who, &group, settings, false).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    as_it_is(&api, &it.who, &group, status).await
}

/// `POST /v1/groups/{group}/pause`
pub async fn pause(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    set_paused(&api, it, true).await
}

/// `POST /v1/groups/{group}/resume`
pub async fn resume(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    set_paused(&api, it, false).await
}

async fn set_paused(api: &Api, mut it: Request, paused: bool) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    let body = api.body(&mut it).await?;
    let of: PauseBody = if body.text.trim().is_empty() { PauseBody::default() } else { decode(&body.text)? };
    drop(body);
    if let Some(thread) = of.thread {
        api.dispatcher.pause_thread(&it.who, &group, &thread, paused).await?;
        return Ok(json(StatusCode::OK, &ThreadPaused { group: &group, thread: &thread, paused }));
    }
    api.dispatcher.pause(&it.who, &group, paused).await?;
    as_it_is(api, &it.who, &group, StatusCode::OK).await
}

async fn as_it_is(api: &Api, who: &Principal, group: &str, status: StatusCode) -> Result<Reply, Error> {
    let row = api.dispatcher.group(&who.tenant, group).await?;
    Ok(json(status, &item(group, row)))
}

/// `DELETE /v1/groups/{group}`
pub async fn delete(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    api.dispatcher.delete(&it.who, &group).await?;
    Ok(json(StatusCode::OK, &GroupDeleted { group: &group, deleted: true }))
}

/// `POST /v1/groups/{group}/lease`: what a client that leaves had got by then is given back.
pub async fn lease(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    let body = api.body(&mut it).await?;
    let wanted: LeaseBody = if body.text.trim().is_empty() { LeaseBody::default() } else { decode(&body.text)? };
    drop(body);
    let (n, wait_ms) = wanted.checked()?;
    let wait = Duration::from_millis(wait_ms).max(WAIT_AT_LEAST);
    let wants = Wants { credit: n, kinds: wanted.kinds, lease_ms: wanted.lease_ms };

    let leased = api.dispatcher.lease(&it.who, &group, wants, wait).await?;
    if leased.is_empty() {
        return Ok(json(StatusCode::OK, &WorkList { work: Vec::new() }));
    }
    // Charged only now: who waits holds nothing.
    let bytes = (leased.len() * EVENT_BYTES).min(PAGE_BYTES) * COPIES;
    let meter = match api.meter(&it.who, bytes).await {
        Ok(meter) => meter,
        Err(refused) => {
            give_back(&api, &it.who, &leased).await;
            return Err(refused);
        }
    };
    let (reading, who) = (api.clone(), it.who.clone());
    let (work, left, meter) = blocking(move || Ok(read_events(&reading, &who, leased, meter))).await?;
    give_back(&api, &it.who, &left).await;
    Ok(charged(json(StatusCode::OK, &WorkList { work }), meter))
}

/// Work with its events, and what there was no memory for.
fn read_events(api: &Api, who: &Principal, leased: Vec<Work>, mut meter: Meter) -> (Vec<WorkItem>, Vec<Work>, Meter) {
    let (mut work, mut left) = (Vec::new(), Vec::new());
    for it in leased {
        match read_event(api, who, &it, &mut meter) {
            Ok(event) => work.push(with_event(it, event)),
            Err(error) => {
                tracing::warn!(thread = &*it.thread, seq = it.seq, %error, "an event to work on is not given out");
                left.push(it);
            }
        }
    }
    (work, left, meter)
}

fn read_event(api: &Api, who: &Principal, work: &Work, meter: &mut Meter) -> Result<Box<RawValue>, Error> {
    let event = api.store.event(&who.tenant, &work.thread, work.seq)?;
    let event = without_type(&event.ok_or_else(Error::no_thread)?.frame);
    meter.add((ITEM_BYTES + event.len()) * COPIES)?;
    // A frame that this server made.
    RawValue::from_string(event).map_err(|_| Error::new(Code::Internal, "the event is no JSON"))
}

fn with_event(work: Work, event: Box<RawValue>) -> WorkItem {
    let Work { delivery, group, attempt, lease_ms, waited_ms, wait, .. } = work;
    WorkItem { delivery, group: group.to_string(), attempt, lease_ms, waited_ms, wait, event }
}

/// Gives back what cannot be given out; if that fails, its lease runs out.
async fn give_back(api: &Api, who: &Principal, left: &[Work]) {
    let reason = Some("the server could not give it out");
    for work in left {
        let how = Settling { outcome: Outcome::Retry, reason, delay_ms: None };
        if let Err(error) = api.dispatcher.settle(who, &work.delivery, how).await {
            tracing::debug!(%error, "on giving back work");
        }
    }
}

/// `POST /v1/groups/{group}/settle`
pub async fn settle(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let group = name_of(&it)?;
    let body = api.body(&mut it).await?;
    let wanted: SettleBody = decode(&body.text)?;
    match wanted.checked()? {
        Settlements::One(one) => {
            settle_one(&api, &it.who, &group, &one).await?;
            Ok(json(StatusCode::OK, &settled(&one, Ok(()))))
        }
        Settlements::Several(several) => {
            api.admission.count_more(&it.who, several.len() - 1)?;
            let mut all = Vec::with_capacity(several.len());
            for one in several {
                all.push(settle_one_of_several(&api, &it.who, &group, one));
            }
            let items = stream::iter(all).buffered(SETTLED_AT_ONCE).collect().await;
            Ok(json(StatusCode::OK, &SettledList { items }))
        }
    }
}

async fn settle_one(api: &Api, who: &Principal, group: &str, one: &SettlementBody<'_>) -> Result<(), Error> {
    if Delivery::parse(&one.delivery)?.group != group {
        return Err(Error::field("delivery", "delivery is of another group"));
    }
    let how = Settling { outcome: one.outcome, reason: one.reason.as_deref(), delay_ms: one.delay_ms };
    api.dispatcher.settle(who, &one.delivery, how).await
}

async fn settle_one_of_several(api: &Api, who: &Principal, group: &str, one: SettlementBody<'_>) -> Settled {
    let done = settle_one(api, who, group, &one).await;
    settled(&one, done)
}

fn settled(one: &SettlementBody<'_>, done: Result<(), Error>) -> Settled {
    let (code, message): (Option<Code>, _) = match done {
        Ok(()) => (None, None),
        Err(refused) => (Some(refused.code), Some(refused.message.into_owned())),
    };
    Settled { delivery: one.delivery.clone().into_owned(), outcome: one.outcome, code, message }
}
