//! The contract as machines read it: JSON Schemas (2020-12), generated from the types that are on the wire.

use schemars::{JsonSchema, Schema, generate::SchemaSettings};

use super::command::{Ack, Connect, Credit, Ping, Publish, Refresh, Signal, Subscribe, Unsubscribe};
use super::event::{EventFrame, LogEvent};
use super::frame::ServerFrame;
use super::http::{
    Conversation, DeadLetterItem, DeadLetterList, MembershipReply, Presence, Problem, PublishBody, PublishReply, Ready,
    ReceiptList, RevocationReply, RunDetail, RunList, SessionList, ThreadBody, ThreadDetail, ThreadList, Ticket,
};
use super::kinds::DeltaData;
use super::records::{DeadLetterRecord, ReceiptRecord};

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
        ("data.agent_token", of::<DeltaData>()),
        ("frame.event", of::<EventFrame>()),
        ("frame.server", of::<ServerFrame>()),
        ("http.publish", of::<PublishBody>()),
        ("http.published", of::<PublishReply>()),
        ("http.thread", of::<ThreadBody>()),
        ("http.ticket", of::<Ticket>()),
        ("http.thread-detail", of::<ThreadDetail>()),
        ("http.thread-list", of::<ThreadList>()),
        ("http.presence", of::<Presence>()),
        ("http.receipts", of::<ReceiptList>()),
        ("http.session-list", of::<SessionList>()),
        ("http.dead-letter", of::<DeadLetterItem>()),
        ("http.dead-letter-list", of::<DeadLetterList>()),
        ("http.context", of::<Conversation>()),
        ("http.membership", of::<MembershipReply>()),
        ("http.revocation", of::<RevocationReply>()),
        ("http.run", of::<RunDetail>()),
        ("http.run-list", of::<RunList>()),
        ("http.problem", of::<Problem>()),
        ("http.readyz", of::<Ready>()),
        ("log.event", of::<LogEvent>()),
        ("log.receipt", of::<ReceiptRecord>()),
        ("log.dead-letter", of::<DeadLetterRecord>()),
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
