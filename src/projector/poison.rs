//! A record that the projector panics at: it becomes a dead letter, and neither its partition nor its thread stops.
//!
//! No data leads to a panic, so each is a bug; but a process that ended for it would read the same record at each start. So:
//! - what the batch has made so far is dropped, and the records before that one are committed by themselves;
//! - then the record is tried once more, alone and with nothing in memory: what decides is the store and the record, and on
//!   every node that has made the same of the log they are the same;
//! - if it panics again, what it changed is dropped, and a dead letter is all that comes of it. That goes into the partition's
//!   hash ([`super::checkpoints`]): a node on which the record is no poison differs, and one of the two stops.

use serde::Deserialize;
use uuid::Uuid;

use crate::log::{Entry, Foreign};
use crate::protocol::error::{Code, Error};

/// Of a panic's message this much is kept.
const KEPT_CHARS: usize = 500;

/// What the projector panicked with, and at which record of its batch.
pub(super) struct Panicked {
    pub(super) index: usize,
    pub(super) why: String,
}

/// The record as what is kept of one that cannot be read.
pub(super) fn unreadable(entry: &Entry, why: &str) -> Foreign {
    let why: String = why.chars().take(KEPT_CHARS).collect();
    let why = format!("the projector failed at this record: {why}");
    match &entry.record {
        Ok(record) => Foreign::new(why, record),
        Err(foreign) => Foreign { why, ..foreign.clone() },
    }
}

/// Who may wait for a verdict on the record, and what it is.
pub(super) fn verdict(entry: &Entry) -> Option<(Uuid, Error)> {
    #[derive(Deserialize)]
    struct Named {
        event: Option<Uuid>,
        id: Option<Uuid>,
    }
    let record = entry.record.as_ref().ok()?;
    let Named { event, id } = serde_json::from_slice(&record.value).ok()?;
    let error = Error::new(Code::Internal, "the server failed at this, has reported it, and keeps it as a dead letter");
    event.or(id).map(|id| (id, error))
}
