//! What judging works on: the batch that becomes one commit, and the event that is judged.

use super::Commit;
use crate::log::Record;
use crate::protocol::event::LogEvent;
use crate::store::{Batch, Store};

/// What one commit will write and publish, and the store before it.
pub(super) struct Transaction<'s> {
    pub(super) store: &'s Store,
    pub(super) rows: Batch<'s>,
    pub(super) commit: Commit,
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
