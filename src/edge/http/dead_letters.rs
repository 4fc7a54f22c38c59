//! Dead letters: what could not be handled, newest first; one of them with what is around it; and how many there are.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;
use uuid::Uuid;
use warp::http::StatusCode;

use super::Api;
use super::meter::Meter;
use super::page::{COPIES, EVENT_BYTES, PAGE_BYTES, Page, SortKey};
use super::reply::{Reply, charged, json};
use super::request::{Query, Request};
use crate::auth::Principal;
use crate::clock;
use crate::edge::blocking;
use crate::protocol::dead_letters::Fingerprint;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::letters::{
    ActName, DeadLetterCounts, DeadLetterItem, DeadLetterList, FingerprintCount, LetterAct, LetterStateName, LetterTry,
    Neighbours, ReasonCount, UnreadableSource,
};
use crate::store::dead_letters::{
    ActRow, CountRow, DeadLetterCursor, DeadLetterFilter, DeadLetterRow, LetterState, Order, TryRow,
};
use crate::store::{EventRange, StoreError, StoredEvent};

/// About the size of an entry without what it is about.
const ITEM_BYTES: usize = 1 << 10;
/// Events on each side of a letter.
const NEIGHBOURS: usize = 5;
/// What they may have in bytes, on each side; the nearest is there in any case.
const NEIGHBOURS_BYTES: usize = 256 << 10;
/// What the counts may hold in memory: the fingerprints of two tenants.
const COUNTS_BYTES: usize = 8 << 20;

impl SortKey for DeadLetterCursor {
    fn to_bytes(&self) -> Vec<u8> {
        DeadLetterCursor::to_bytes(self)
    }

    fn from_bytes(bytes: &[u8]) -> Option<DeadLetterCursor> {
        DeadLetterCursor::from_bytes(bytes)
    }
}

/// The parameters that narrow a list down, as its cursors are bound to them.
const FILTERS: [&str; 7] = ["reason", "thread", "fingerprint", "kind", "group", "since", "until"];

fn read_filter(query: &Query<'_>) -> Result<DeadLetterFilter, Error> {
    let text = |name| query.text(name).map(str::to_owned);
    Ok(DeadLetterFilter {
        reason: text("reason"),
        thread: text("thread"),
        kind: text("kind"),
        group: text("group"),
        fingerprint: query.text("fingerprint").map(read_fingerprint).transpose()?,
        since: query.time("since")?,
        until: query.time("until")?,
    })
}

pub(super) fn read_fingerprint(text: &str) -> Result<Fingerprint, Error> {
    let refused = |()| Error::field("fingerprint", format!("fingerprint must be 16 hex digits, not {text:.60}"));
    text.parse().map_err(refused)
}

/// `GET /v1/dead-letters`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["reason", "thread", "fingerprint", "kind", "group", "since", "until", "cursor", "limit"])?;
    let filter = read_filter(&query)?;
    let filters = FILTERS.map(|name| query.text(name).unwrap_or_default());
    let page: Page<Reverse<DeadLetterCursor>> = Page::read(&query, &it.who, &api.epoch, "dead-letters", &filters)?;
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let after = page.after.as_ref().map(|key| key.0);
        let (mut items, mut bytes) = (Vec::new(), 0);
        let tenants = [&*it.who.tenant, ""];
        let last = api.store.dead_letters(tenants, &filter, Order::NewestFirst, after, |key, row, known| {
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
    let tries: usize = item.tries.iter().map(|tried| 128 + tried.reason.len()).sum();
    let acts: usize = item.acts.iter().map(|act| 256 + act.note.as_ref().map_or(0, String::len)).sum();
    ITEM_BYTES + item.error.len() + event + bytes + tries + acts
}

/// The id that a path names.
pub(super) fn id_of(it: &Request) -> Result<Uuid, Error> {
    it.segment("id")?.parse().map_err(|_| no_letter())
}

pub(super) fn no_letter() -> Error {
    Error::new(Code::NotFound, "there is no such dead letter").at("id")
}

/// A letter that the user's tenant may see, and whether it is known to be the tenant's.
pub(super) fn find(api: &Api, who: &Principal, id: Uuid) -> Result<(DeadLetterRow, bool), Error> {
    let find = |tenant: &str| api.store.dead_letter(tenant, id.as_bytes());
    match find(&who.tenant)? {
        Some(row) => Ok((row, true)),
        None => Ok((find("")?.ok_or_else(no_letter)?, false)),
    }
}

/// `GET /v1/dead-letters/{id}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let id = id_of(&it)?;
    let mut meter = api.meter(&it.who, 3 * EVENT_BYTES).await?;
    blocking(move || {
        let (row, known) = find(&api, &it.who, id)?;
        let neighbours = neighbours(&api, &it.who, &row, &mut meter)?;
        let item = DeadLetterItem { neighbours, ..item(&api, &it.who, *id.as_bytes(), row, known)? };
        meter.add(size(&item) * COPIES)?;
        Ok(charged(json(StatusCode::OK, &item), meter))
    })
    .await
}

/// The events around a letter, if it has a place in a thread.
fn neighbours(api: &Api, who: &Principal, row: &DeadLetterRow, meter: &mut Meter) -> Result<Option<Neighbours>, Error> {
    let Some(thread) = &row.thread else { return Ok(None) };
    let (before, after) = match (row.seq, row.place) {
        (Some(seq), _) => (seq.saturating_sub(1), seq.saturating_add(1)),
        (None, Some(place)) => (place, place.saturating_add(1)),
        (None, None) => return Ok(None),
    };
    let mut read = |from, to, newest_first| {
        let range = EventRange { from, to, limit: NEIGHBOURS, bytes: NEIGHBOURS_BYTES, newest_first };
        let events = api.store.events(&who.tenant, thread, range)?;
        meter.add(events.iter().map(|event| event.frame.len()).sum::<usize>() * COPIES)?;
        let raw = |event: StoredEvent| RawValue::from_string(without_type(&event.frame)).ok();
        Ok::<Vec<_>, Error>(events.into_iter().filter_map(raw).collect())
    };
    let mut nearest_first = read(1, before, true)?;
    nearest_first.reverse();
    Ok(Some(Neighbours { before: nearest_first, after: read(after, u64::MAX, false)? }))
}

/// `known`: whether it is known to be the tenant's.
fn item(api: &Api, who: &Principal, id: [u8; 16], row: DeadLetterRow, known: bool) -> Result<DeadLetterItem, Error> {
    let stored = match (&row.thread, row.seq) {
        (Some(thread), Some(seq)) => api.store.event(&who.tenant, thread, seq)?,
        _ => None,
    };
    // An event that was refused has no seq, and stands in the row.
    let event = stored.map(|event| without_type(&event.frame)).or(row.event);
    let tried = |tried: TryRow| LetterTry { at: clock::rfc3339(tried.at), worker: tried.worker, reason: tried.reason };
    let act = |act: ActRow| LetterAct {
        act: if act.discarded { ActName::Discarded } else { ActName::Requeued },
        by: act.by,
        at: clock::rfc3339(act.at),
        note: act.note,
    };

    Ok(DeadLetterItem {
        id: Uuid::from_bytes(id),
        reason: row.reason,
        at: clock::rfc3339(row.at),
        attempts: row.attempts,
        error: row.error,
        fingerprint: Fingerprint(row.fingerprint).to_string(),
        state: match row.state {
            LetterState::Open => LetterStateName::Open,
            LetterState::Requeued => LetterStateName::Requeued,
            LetterState::Done => LetterStateName::Done,
            LetterState::Discarded => LetterStateName::Discarded,
        },
        thread: row.thread,
        kind: row.kind,
        user: row.user,
        name: row.name,
        seq: row.seq,
        event: event.and_then(|text| RawValue::from_string(text).ok()),
        tries: row.tries.into_iter().map(tried).collect(),
        acts: row.acts.into_iter().map(act).collect(),
        source: row.source.map(|source| UnreadableSource {
            topic: source.topic,
            partition: source.partition,
            offset: source.offset,
            size: source.size,
            bytes: known.then(|| STANDARD.encode(&source.bytes)),
        }),
        neighbours: None,
    })
}

/// `GET /v1/dead-letters/counts`
pub async fn counts(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["group", "limit"])?;
    let (limit, group) = (query.limit()?, query.text("group").map(str::to_owned));
    let meter = api.meter(&it.who, COUNTS_BYTES).await?;
    blocking(move || {
        let tenants = [&*it.who.tenant, ""];
        let mut counted: BTreeMap<String, u64> = BTreeMap::new();
        for tenant in tenants {
            for row in api.store.dead_letter_reasons(tenant, group.as_deref())? {
                *counted.entry(row.reason).or_default() += row.open;
            }
        }
        let mut reasons: Vec<_> = counted.into_iter().map(|(reason, count)| ReasonCount { reason, count }).collect();
        reasons.sort_by_key(|it| Reverse(it.count));
        let total = reasons.iter().map(|it| it.count).sum();
        let (fingerprints, truncated) = fingerprints(&api, tenants, group, limit)?;
        let counts = DeadLetterCounts { total, reasons, fingerprints, truncated };
        Ok(charged(json(StatusCode::OK, &counts), meter))
    })
    .await
}

/// The most frequent fingerprints, and whether there are more.
fn fingerprints(
    api: &Api,
    tenants: [&str; 2],
    group: Option<String>,
    limit: usize,
) -> Result<(Vec<FingerprintCount>, bool), Error> {
    let mut found: BTreeMap<Fingerprint, CountRow> = BTreeMap::new();
    let mut truncated = false;
    for tenant in tenants {
        let (rows, all) = api.store.dead_letter_fingerprints(tenant, group.as_deref())?;
        truncated |= !all;
        for (fingerprint, row) in rows {
            found.entry(fingerprint).and_modify(|known| known.open += row.open).or_insert(row);
        }
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_by_key(|(_, row)| Reverse(row.open));
    truncated |= found.len() > limit;
    found.truncate(limit);

    let count = |(fingerprint, row): (Fingerprint, CountRow)| {
        let name = fingerprint.to_string();
        let (fingerprint, group) = (Some(fingerprint), group.clone());
        let filter = DeadLetterFilter { fingerprint, group, ..DeadLetterFilter::default() };
        let times = |order| {
            let times = tenants.map(|tenant| api.store.dead_letter_time(tenant, &filter, order));
            Ok::<_, StoreError>(times.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten())
        };
        Ok(FingerprintCount {
            fingerprint: name,
            reason: row.reason,
            kind: row.kind,
            error: row.error,
            count: row.open,
            oldest: times(Order::OldestFirst)?.min().map(clock::rfc3339),
            newest: times(Order::NewestFirst)?.max().map(clock::rfc3339),
        })
    };
    Ok((found.into_iter().map(count).collect::<Result<_, Error>>()?, truncated))
}
