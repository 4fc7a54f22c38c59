//! The server's frames, as they are on the wire. Kept apart from what makes them, so that `schemas/` is generated from here.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use super::error::{Code, Error};
use super::event::EventItem;
use super::json;
use super::work::Wait;

/// A seq, or for `"*"` one for each thread.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Seqs {
    One(u64),
    Each(BTreeMap<String, u64>),
}

/// What a session may do at most; sent with `welcome`.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub struct Limits {
    /// Bytes of one frame.
    pub frame_bytes: usize,
    /// Bytes of one publish's `data`.
    pub data_bytes: usize,
    /// Bytes of the `data` of an event that a client gets: of an `agent_message` that was written in deltas, or of a delta
    /// that brings the text so far. All others are within `data_bytes`.
    pub message_bytes: usize,
    /// Commands in one array frame.
    pub commands: usize,
    /// Threads that may be subscribed at once, those of `"*"` included.
    pub subscriptions: usize,
    /// Publishes that may wait for their answer; beyond that the server stops reading the socket.
    pub publishes_in_flight: usize,
    /// Bytes of events that may wait for a slow socket; beyond that they come from the store.
    pub outbox_bytes: usize,
    /// With `confirm`, events that may be sent and not acknowledged.
    pub unacknowledged: usize,
}

/// The answers and notices of the server, all but `event`, which is [`super::event::EventFrame`].
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame<'a> {
    Welcome {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<i64>,
        connection: &'a str,
        user: &'a str,
        tenant: &'a str,
        epoch: &'a str,
        heartbeat_ms: u64,
        /// RFC 3339.
        expires_at: &'a str,
        limits: Limits,
    },
    Refreshed {
        id: i64,
        expires_at: &'a str,
    },
    Expiring {
        expires_at: &'a str,
    },
    Subscribed {
        id: i64,
        thread: &'a str,
        epoch: &'a str,
        head: Seqs,
        after: Seqs,
        recovered: bool,
    },
    Unsubscribed {
        id: i64,
    },
    CaughtUp {
        thread: &'a str,
        seq: u64,
    },
    Lagged {
        thread: &'a str,
        from: u64,
        to: u64,
    },
    /// Events up to here were left out by `kinds`.
    Position {
        thread: &'a str,
        seq: u64,
    },
    Signal {
        thread: &'a str,
        kind: &'a str,
        from: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(with = "Option<serde_json::Value>")]
        data: Option<&'a RawValue>,
    },
    Published {
        id: i64,
        thread: &'a str,
        /// Absent for a delta, which has none.
        #[serde(skip_serializing_if = "Option::is_none")]
        seq: Option<u64>,
        event: uuid::Uuid,
        duplicate: bool,
        /// For a delta: its message.
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<&'a str>,
        /// For a delta: the characters of the message up to its end.
        #[serde(skip_serializing_if = "Option::is_none")]
        to_char: Option<u64>,
    },
    /// The session takes work of the group.
    Consuming {
        id: i64,
        group: &'a str,
    },
    /// An event for the session to work on, while its lease lasts.
    Work {
        /// How to name it in `settle`.
        delivery: &'a str,
        group: &'a str,
        /// 1, 2, 3 …
        attempt: u32,
        /// How long the lease lasts, from now on.
        lease_ms: u64,
        /// How long it waited.
        waited_ms: u64,
        wait: Wait,
        /// As pages of HTTP have it.
        #[schemars(with = "EventItem")]
        event: &'a RawValue,
    },
    Settled {
        id: i64,
    },
    Pong {
        id: i64,
        /// RFC 3339.
        at: &'a str,
    },
    Error {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<i64>,
        code: Code,
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        field: Option<&'a str>,
        /// The thread whose subscription ended with this error.
        #[serde(skip_serializing_if = "Option::is_none")]
        thread: Option<&'a str>,
        temporary: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        outcome: Option<&'static str>,
    },
}

impl ServerFrame<'_> {
    pub fn encode(&self) -> String {
        json::encode(self)
    }
}

/// The `error` frame for a refusal.
pub fn error_frame(id: Option<i64>, thread: Option<&str>, error: &Error) -> String {
    ServerFrame::Error {
        id,
        code: error.code,
        message: &error.message,
        field: error.field.as_deref(),
        thread,
        temporary: error.code.temporary(),
        retry_after_ms: error.retry_after_ms,
        outcome: error.outcome_unknown.then_some("unknown"),
    }
    .encode()
}
