//! What judging works on: the batch that becomes one commit, and the event that is judged.

use super::Commit;
use super::wanted::Wanted;
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::event::LogEvent;
use crate::protocol::{ids, json};
use crate::store::{Batch, Store};

/// What one commit will write and publish, and the store before it.
pub(super) struct Transaction<'s> {
    pub(super) store: &'s Store,
    pub(super) rows: Batch<'s>,
    pub(super) commit: Commit,
    pub(super) wanted: Wanted,
    /// Of the record that is applied, in its partition.
    pub(super) offset: u64,
}

impl<'s> Transaction<'s> {
    pub(super) fn new(store: &'s Store, wanted: Wanted) -> Transaction<'s> {
        Transaction { store, rows: store.batch(), commit: Commit::default(), wanted, offset: 0 }
    }
}

/// An event, with what decides about it.
pub(super) struct EventRecord<'a> {
    pub(super) partition: u32,
    pub(super) record: &'a Record,
    pub(super) event: &'a LogEvent<'a>,
    /// The event's time, in milliseconds.
    pub(super) at: u64,
    /// The time by which idempotency keys are judged, in milliseconds.
    pub(super) key_time: u64,
}

/// The event in a record, and its time in milliseconds; or why the record is foreign.
pub(super) fn read_event(record: &Record) -> Result<(LogEvent<'_>, u64), Foreign> {
    let foreign = |why: String| Foreign::new(why, record);
    let event: LogEvent = json::decode_bytes(&record.value)
        .map_err(|error| foreign(format!("the value is not an event: {}", error.message)))?;

    let names = ids::check_name("tenant", &event.tenant)
        .and(ids::check_name("from", &event.from))
        .and(ids::check_thread(&event.thread));
    names.map_err(|error| foreign(error.message.into_owned()))?;

    let key = record.key.split_once('/');
    if key != Some((&event.tenant, &event.thread)) {
        return Err(foreign("the key is not tenant/thread of the value".into()));
    }

    let at = clock::parse_rfc3339(&event.at).ok_or_else(|| foreign("at is not RFC 3339".into()))?;
    Ok((event, at))
}
