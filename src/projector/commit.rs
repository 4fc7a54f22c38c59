//! What became of records, and what became visible with one commit: what publishers, the hub and sessions are told of it.

use std::sync::Arc;

use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use crate::protocol::delta::Delta;
use crate::protocol::error::Error;
use crate::protocol::event::Priority;

/// The projector's judgement of one record.
pub type Verdict = Result<Published, Error>;

/// A record that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    pub seq: u64,
    pub event: Uuid,
    /// The event was there before: by its key, or because nothing had to change.
    pub duplicate: bool,
}

/// What became visible with one commit, in log order.
#[derive(Default)]
pub struct Commit {
    pub events: Vec<ThreadUpdate>,
    pub verdicts: Vec<(Uuid, Verdict)>,
    /// The reasons of new dead letters.
    pub dead_letters: Vec<String>,
    pub requeued: Vec<RequeuedNotice>,
}

/// A durable subscription of a user's is to be sent an event of a thread again.
#[derive(Debug)]
pub struct RequeuedNotice {
    /// `tenant/user`.
    pub user: String,
    pub thread: String,
}

/// What became visible in a thread.
pub struct ThreadUpdate {
    /// `tenant/thread`.
    pub key: Arc<str>,
    pub update: Update,
}

pub enum Update {
    /// An event that has its seq.
    Event(Arc<CommittedEvent>, Option<AccessChange>),
    /// A delta of a message that is being written.
    Delta(Arc<Delta>),
    /// A user's lease on work there is over, and with it a right to read the thread.
    LeaseOver { user: Arc<str> },
}

/// What readers need of an event: one for all of them.
#[derive(Debug)]
pub struct CommittedEvent {
    pub seq: u64,
    pub kind: Box<str>,
    pub priority: Option<Priority>,
    pub frame: Utf8Bytes,
    /// The message that it closes, if that was written in deltas.
    pub closes: Option<Arc<str>>,
    /// What it means to the agent whose run it is about.
    pub run: Option<RunNotice>,
}

/// What an event means to the user who started the run that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunNotice {
    /// The run has ended, and with it a right to read the thread.
    Ended { user: Box<str> },
    /// Somebody wants the run cancelled.
    ToCancel { user: Box<str>, run: Box<str> },
}

/// Who may read the thread from this event on, or be connected at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessChange {
    Joined(Vec<String>),
    Left(String),
    /// The user's sessions end.
    Revoked(String),
}
