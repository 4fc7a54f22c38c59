//! Events: the frame of each, under its thread and seq.

use std::ops::ControlFlow;

use bincode::{BorrowDecode, Encode};
use rocksdb::ReadOptions;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::arrivals::ArrivalRow;
use super::catalogue::EVENTS;
use super::keys::Place;
use super::{Batch, Store, StoreError, keys};
use crate::protocol::event::Priority;

#[derive(Debug, Encode, BorrowDecode)]
pub struct EventRow<'a> {
    /// Of the record that it came of, in its partition of the log: what an export goes by that is repeated.
    pub offset: u64,
    pub kind: &'a str,
    /// The class of its priority.
    pub class: u8,
    /// Its record shows a right beyond membership: only such an event may speak to a model in another role than a user's.
    pub privileged: bool,
    pub hash: [u8; 32],
    /// The frame as every reader gets it.
    pub frame: &'a str,
}

/// An event as the store has it.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    pub seq: u64,
    pub kind: Utf8Bytes,
    /// The class of its priority.
    pub class: usize,
    /// See [`EventRow`].
    pub privileged: bool,
    pub frame: Utf8Bytes,
}

impl StoredEvent {
    pub fn new(seq: u64, row: &EventRow<'_>) -> StoredEvent {
        StoredEvent { kind: row.kind.into(), frame: row.frame.into(), ..StoredEvent::without_text(seq, row) }
    }

    /// The same with an empty kind and frame.
    pub fn without_text(seq: u64, row: &EventRow<'_>) -> StoredEvent {
        StoredEvent {
            seq,
            kind: Utf8Bytes::default(),
            class: usize::from(row.class).min(Priority::CLASSES - 1),
            privileged: row.privileged,
            frame: Utf8Bytes::default(),
        }
    }
}

/// Which events to read.
#[derive(Debug, Clone, Copy)]
pub struct EventRange {
    pub from: u64,
    pub to: u64,
    pub limit: usize,
    pub bytes: usize,
    pub newest_first: bool,
}

impl EventRange {
    pub fn all() -> EventRange {
        EventRange { from: 1, to: u64::MAX, limit: usize::MAX, bytes: usize::MAX, newest_first: false }
    }
}

/// Reads of more events than this are worth reading ahead on the disk.
const READAHEAD_FROM: usize = 64;
const READAHEAD_BYTES: usize = 256 << 10;

impl Store {
    /// Events of a thread with seqs in `from..=to`, at most `limit` of them and (but for the first) `bytes` of frames;
    /// newest first if `newest_first`.
    pub fn events(&self, tenant: &str, thread: &str, seqs: EventRange) -> Result<Vec<StoredEvent>, StoreError> {
        let (mut found, mut room) = (Vec::new(), seqs.bytes);
        self.visit_events(tenant, thread, seqs, |seq, row| {
            if row.frame.len() > room && !found.is_empty() {
                return Ok::<_, StoreError>(ControlFlow::Break(()));
            }
            room = room.saturating_sub(row.frame.len());
            found.push(StoredEvent::new(seq, row));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// Looks at events with seqs in `from..=to`, one after the other, at most `limit` of them, until `visit` breaks off.
    /// Copies none of them.
    pub fn visit_events<E: From<StoreError>>(
        &self,
        tenant: &str,
        thread: &str,
        seqs: EventRange,
        mut visit: impl FnMut(u64, &EventRow<'_>) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        let EventRange { from, to, limit, newest_first, .. } = seqs;
        if from > to || limit == 0 {
            return Ok(());
        }

        let partition = self.partition(tenant, thread);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::event(partition, tenant, thread, from));
        options.set_iterate_upper_bound(match to.checked_add(1) {
            Some(end) => keys::event(partition, tenant, thread, end),
            None => keys::after(keys::prefix(partition, &[tenant, thread])),
        });
        options.set_readahead_size(if limit > READAHEAD_FROM { READAHEAD_BYTES } else { 0 });
        let mut rows = self.db.raw_iterator_cf_opt(&self.family(EVENTS), options);
        if newest_first {
            rows.seek_to_last()
        } else {
            rows.seek_to_first()
        }

        let mut left = limit;
        while left > 0
            && let Some((key, value)) = rows.item()
        {
            let row: EventRow = self.decoded(EVENTS, value)?;
            if visit(keys::seq_of(key).unwrap_or(0), &row)?.is_break() {
                return Ok(());
            }
            left -= 1;
            if newest_first { rows.prev() } else { rows.next() }
        }
        rows.status().map_err(|error| self.note(error.into()))?;
        Ok(())
    }

    /// The event with this seq.
    pub fn event(&self, tenant: &str, thread: &str, seq: u64) -> Result<Option<StoredEvent>, StoreError> {
        let key = keys::event(self.partition(tenant, thread), tenant, thread, seq);
        let found = self.db.get_pinned_cf(&self.family(EVENTS), key).map_err(|error| self.note(error.into()))?;
        found.map(|bytes| Ok(StoredEvent::new(seq, &self.decoded(EVENTS, &bytes)?))).transpose()
    }

    /// The newest event's frame.
    pub fn newest(&self, tenant: &str, thread: &str) -> Result<Option<StoredEvent>, StoreError> {
        Ok(self.events(tenant, thread, EventRange { limit: 1, newest_first: true, ..EventRange::all() })?.pop())
    }
}

impl Batch<'_> {
    /// `at` is the event's time.
    pub fn put_event(&mut self, tenant: &str, thread: &str, seq: u64, row: &EventRow<'_>, at: u64) {
        let partition = self.store.partition(tenant, thread);
        self.put(EVENTS, &keys::event(partition, tenant, thread, seq), row);
        self.put_arrival(partition, Place { offset: row.offset, seq }, &ArrivalRow { at, tenant, thread });
    }
}
