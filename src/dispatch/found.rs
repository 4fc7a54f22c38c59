//! What the store has of a thread's work: the event that is next, or of a group without order those that could be.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use super::index::waiting_row;
use crate::protocol::work::{MAX_PARALLEL, WorkOrder};
use crate::store::{GroupRow, Store, StoreError, WaitingRow, WaitingStart, WorkRow};

/// How many threads are looked at to find the event that waits longest.
const LOOKED_AT: usize = 10_000;
/// Threads that are read at once.
const CHUNK: usize = 1_000;

/// What the store has of an event that could be next.
pub struct Found {
    pub seq: u64,
    pub row: WaitingRow,
    pub after: u64,
    pub attempt: u32,
    /// Who has it, and until when.
    pub lease: Option<(Uuid, u64)>,
    /// When it is to be tried again.
    pub not_before: Option<u64>,
}

impl Found {
    /// The next event of a thread of which nothing is begun.
    pub fn first(seq: u64, row: WaitingRow, cursor: u64) -> Found {
        Found { seq, row, after: cursor, attempt: 1, lease: None, not_before: None }
    }

    /// What a thread's row says of the event.
    fn new(seq: u64, row: WaitingRow, after: u64, work: &WorkRow) -> Found {
        let (lease, failed) = (work.lease_on(seq), work.failed_at(seq));
        Found {
            seq,
            row,
            after,
            attempt: lease.map_or_else(|| failed.map_or(0, |failed| failed.attempts) + 1, |lease| lease.attempt),
            lease: lease.map(|lease| (Uuid::from_bytes(lease.id), lease.until)),
            not_before: failed.map(|failed| failed.not_before),
        }
    }
}

/// What an event is held by: its thread, and of a group without order its seq as well.
pub fn key_of(thread: &Arc<str>, seq: u64, is_alone: bool) -> Arc<str> {
    if is_alone { thread.clone() } else { format!("{thread}\0{seq}").into() }
}

/// The thread of what is held by this key.
pub fn thread_of(key: &str) -> &str {
    key.split_once('\0').map_or(key, |(thread, _)| thread)
}

/// What could be next in a thread of a group, in order; and how far the group is there.
pub fn find(
    store: &Store,
    (tenant, name, thread): (&str, &str, &str),
    group: &GroupRow,
) -> Result<(Vec<Found>, WorkRow), StoreError> {
    let work = store.work_of(tenant, thread, name, &group.id)?;
    let is_parallel = group.order == WorkOrder::None;
    let mut begun: BTreeSet<u64> = work.leases.iter().map(|lease| lease.seq).collect();
    if is_parallel {
        begun.extend(work.failed.iter().map(|failed| failed.seq).chain(work.requeued.iter().copied()));
    } else if begun.is_empty() {
        let failed = work.failed.first().map(|failed| failed.seq);
        begun.extend(failed.or(work.requeued.first().copied()));
    }
    let mut found = Vec::new();
    for seq in &begun {
        let row = row_of(store, (tenant, name, thread), *seq)?;
        found.extend(row.map(|row| Found::new(*seq, row, work.cursor, &work)));
    }
    let limit = if is_parallel { MAX_PARALLEL.saturating_sub(found.len()) } else { usize::from(begun.is_empty()) };
    if limit == 0 {
        return Ok((found, work));
    }

    let wants = |seq, row: &WaitingRow| group.wants(&row.kind, row.at) && !work.is_past(seq);
    // Those that are begun may be among them.
    let (mut before, mut more) = (work.cursor, 0);
    for (seq, row) in store.waiting_after((tenant, name, thread), work.cursor, limit + begun.len(), wants)? {
        let after = std::mem::replace(&mut before, seq);
        if !begun.contains(&seq) && more < limit {
            more += 1;
            // Where there is an order, nothing is work up to it since the group is where it is.
            found.push(Found::new(seq, row, if is_parallel { after } else { work.cursor }, &work));
        }
    }
    found.sort_by_key(|it| it.seq);
    Ok((found, work))
}

/// What is known of an event that was begun, whether it is still wanted or not.
fn row_of(
    store: &Store,
    (tenant, name, thread): (&str, &str, &str),
    seq: u64,
) -> Result<Option<WaitingRow>, StoreError> {
    if let Some(row) = store.waiting(tenant, name, thread, seq)? {
        return Ok(Some(row));
    }
    let event = store.event(tenant, thread, seq)?;
    Ok(event.and_then(|event| waiting_row(&event.frame, event.class as u8)))
}

/// The events that come next in a thread of which nothing is begun, and where there is an order: up to `limit` of them.
pub fn upcoming(
    store: &Store,
    whose: (&str, &str, &str),
    group: &GroupRow,
    cursor: u64,
    limit: usize,
) -> Result<Vec<(u64, WaitingRow)>, StoreError> {
    store.waiting_after(whose, cursor, limit, |_, row| group.wants(&row.kind, row.at))
}

/// When the event was published that waits longest, of the first ones of so many threads; milliseconds.
pub fn oldest(store: &Store, tenant: &str, group: &str, row: &GroupRow) -> Result<Option<u64>, StoreError> {
    let (mut oldest, mut from, mut left) = (None::<u64>, Some(WaitingStart::BEGIN), LOOKED_AT);
    while let Some(start) = from.take().filter(|_| left > 0) {
        let (heads, next) = store.waiting_threads(tenant, group, start, CHUNK)?;
        (from, left) = (next, left.saturating_sub(heads.len()));
        for head in heads {
            let work = store.work_of(tenant, &head.thread, group, &row.id)?;
            let waits = !work.is_past(head.seq) && row.wants(&head.row.kind, head.row.at);
            let at = match waits {
                true => Some(head.row.at),
                // It is of former settings, or was requeued.
                false => find(store, (tenant, group, &head.thread), row)?.0.first().map(|it| it.row.at),
            };
            oldest = at.into_iter().chain(oldest).min();
        }
    }
    Ok(oldest)
}
