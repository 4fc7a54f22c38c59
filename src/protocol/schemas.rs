//! The contract as machines read it: JSON Schemas (2020-12), generated from the types that are on the wire.

use schemars::{JsonSchema, Schema, generate::SchemaSettings};

use crate::command::{
    Ack, Connect, Credit, Ping, Publish, PublishBody, Refresh, Signal, Subscribe, ThreadBody, Unsubscribe,
};
use crate::edge::context::Conversation;
use crate::edge::dead_letters::{DeadLetterItem, DeadLetterList};
use crate::edge::http::{PublishReply, Ticket};
use crate::edge::runs::{RunDetail, RunList};
use crate::edge::sessions::SessionList;
use crate::edge::threads::{Presence, Receipts, ThreadDetail, ThreadList};
use crate::event::{EventFrame, LogEvent, PieceData};
use crate::health::Ready;
use crate::projector::{DeadLetterNote, ReceiptNote};
use crate::wire::{Problem, ServerFrame};

/// Each schema's file name without its ending, and the schema.
pub fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("command.connect", of::<Connect>()),
        ("command.refresh", of::<Refresh>()),
        ("command.subscribe", of::<Subscribe>()),
        ("command.unsubscribe", of::<Unsubscribe>()),
        ("command.publish", of::<Publish>()),
        ("command.signal", of::<Signal>()),
        ("command.ack", of::<Ack>()),
        ("command.credit", of::<Credit>()),
        ("command.ping", of::<Ping>()),
        ("data.agent_token", of::<PieceData>()),
        ("frame.event", of::<EventFrame>()),
        ("frame.server", of::<ServerFrame>()),
        ("http.publish", of::<PublishBody>()),
        ("http.published", of::<PublishReply>()),
        ("http.thread", of::<ThreadBody>()),
        ("http.ticket", of::<Ticket>()),
        ("http.thread-detail", of::<ThreadDetail>()),
        ("http.thread-list", of::<ThreadList>()),
        ("http.presence", of::<Presence>()),
        ("http.receipts", of::<Receipts>()),
        ("http.session-list", of::<SessionList>()),
        ("http.dead-letter", of::<DeadLetterItem>()),
        ("http.dead-letter-list", of::<DeadLetterList>()),
        ("http.context", of::<Conversation>()),
        ("http.run", of::<RunDetail>()),
        ("http.run-list", of::<RunList>()),
        ("http.problem", of::<Problem>()),
        ("http.readyz", of::<Ready>()),
        ("log.event", of::<LogEvent>()),
        ("log.receipt", of::<ReceiptNote>()),
        ("log.dead-letter", of::<DeadLetterNote>()),
    ]
}

fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>()
}

/// A schema as its file holds it.
pub fn text(schema: &Schema) -> String {
    // A schema is a JSON value; those always serialise.
    serde_json::to_string_pretty(schema).unwrap_or_default() + "\n"
}
