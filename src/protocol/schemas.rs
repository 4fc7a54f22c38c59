//! The contract as machines read it: JSON Schemas (2020-12), generated from the types that are on the wire.

use schemars::{JsonSchema, Schema, generate::SchemaSettings};

use super::agui::Timed;
use super::batch::{BatchBody, BatchReply};
use super::command::{Ack, Connect, Consume, Credit, Ping, Publish, Refresh, Settle, Signal, Subscribe, Unsubscribe};
use super::custom::{KindDeleted, KindDetail, KindItem, KindList, KindRecord, KindSchema};
use super::data;
use super::event::{EventFrame, EventItem, LogEvent};
use super::frame::ServerFrame;
use super::groups::{
    GroupDeleted, GroupDetail, GroupItem, GroupList, LeaseBody, PauseBody, SettleBody, Settled, SettledList,
    ThreadPaused, WebhookMessage, WorkList,
};
use super::http::{
    Alive, Conversation, EventPage, MembershipReply, Presence, Problem, PublishBody, PublishReply, Ready, ReceiptList,
    RevocationReply, RunDetail, RunList, SearchPage, SessionList, StreamStart, ThreadBody, ThreadDetail, ThreadList,
    Ticket,
};
use super::json;
use super::kinds::DeltaData;
use super::letters::{
    ActBody, DeadLetterCounts, DeadLetterItem, DeadLetterList, LetterOutcome, LetterOutcomes, NoteBody,
};
use super::records::{
    DeadLetterRecord, LetterActRecord, LogCheckpointRecord, LogCreatedRecord, LogGenerationRecord, ReceiptRecord,
    TicketIssuedRecord, TicketUsedRecord,
};
use super::work::{
    GroupRecord, GroupSettings, WorkLeasedRecord, WorkOverflowedRecord, WorkPausedRecord, WorkSettledRecord,
};

/// Each schema's file name without its ending, and the schema.
pub fn all() -> Vec<(&'static str, Schema)> {
    vec![
        ("agui.event", of::<Timed<'_>>()),
        ("command.connect", of::<Connect>()),
        ("command.refresh", of::<Refresh>()),
        ("command.subscribe", of::<Subscribe>()),
        ("command.unsubscribe", of::<Unsubscribe>()),
        ("command.publish", of::<Publish>()),
        ("command.signal", of::<Signal>()),
        ("command.ack", of::<Ack>()),
        ("command.credit", of::<Credit>()),
        ("command.consume", of::<Consume>()),
        ("command.settle", of::<Settle>()),
        ("command.ping", of::<Ping>()),
        ("data.user_message", of::<data::Message>()),
        ("data.system_message", of::<data::Message>()),
        ("data.agent_message", of::<data::AgentMessage>()),
        ("data.agent_started", of::<data::AgentStarted>()),
        ("data.agent_thinking", of::<data::AgentThinking>()),
        ("data.tool_executing", of::<data::ToolExecuting>()),
        ("data.tool_completed", of::<data::ToolCompleted>()),
        ("data.agent_token", of::<DeltaData>()),
        ("data.agent_waiting", of::<data::AgentWaiting>()),
        ("data.agent_resumed", of::<data::AgentResumed>()),
        ("data.agent_cancel_requested", of::<data::Cancel>()),
        ("data.agent_completed", of::<data::AgentCompleted>()),
        ("data.agent_failed", of::<data::AgentFailed>()),
        ("data.agent_cancelled", of::<data::Cancel>()),
        ("data.thread_created", of::<data::ThreadCreated>()),
        ("data.thread_updated", of::<data::ThreadUpdated>()),
        ("data.member_added", of::<data::Member>()),
        ("data.member_removed", of::<data::Member>()),
        ("data.sessions_revoked", of::<data::SessionsRevoked>()),
        ("frame.event", of::<EventFrame>()),
        ("frame.server", of::<ServerFrame>()),
        ("http.event", of::<EventItem>()),
        ("http.event-page", of::<EventPage>()),
        ("http.publish", of::<PublishBody>()),
        ("http.published", of::<PublishReply>()),
        ("http.publish-batch", of::<BatchBody<'_>>()),
        ("http.published-batch", of::<BatchReply<'_>>()),
        ("http.thread", of::<ThreadBody>()),
        ("http.ticket", of::<Ticket>()),
        ("http.thread-detail", of::<ThreadDetail>()),
        ("http.thread-list", of::<ThreadList>()),
        ("http.search", of::<SearchPage>()),
        ("http.stream-start", of::<StreamStart<'_>>()),
        ("http.presence", of::<Presence>()),
        ("http.receipts", of::<ReceiptList>()),
        ("http.session-list", of::<SessionList>()),
        ("http.dead-letter", of::<DeadLetterItem>()),
        ("http.dead-letter-list", of::<DeadLetterList>()),
        ("http.dead-letter-act", of::<NoteBody>()),
        ("http.dead-letter-acts", of::<ActBody>()),
        ("http.dead-letter-outcome", of::<LetterOutcome>()),
        ("http.dead-letter-outcomes", of::<LetterOutcomes>()),
        ("http.dead-letter-counts", of::<DeadLetterCounts>()),
        ("http.group-settings", of::<GroupSettings>()),
        ("http.group", of::<GroupItem>()),
        ("http.group-detail", of::<GroupDetail>()),
        ("http.group-list", of::<GroupList>()),
        ("http.group-deleted", of::<GroupDeleted<'_>>()),
        ("http.group-pause", of::<PauseBody>()),
        ("http.group-thread-paused", of::<ThreadPaused<'_>>()),
        ("http.lease", of::<LeaseBody>()),
        ("http.work-list", of::<WorkList>()),
        ("http.webhook", of::<WebhookMessage<'_>>()),
        ("http.settle", of::<SettleBody<'_>>()),
        ("http.settled", of::<Settled>()),
        ("http.settled-list", of::<SettledList>()),
        ("http.kind-schema", of::<KindSchema>()),
        ("http.kind", of::<KindItem>()),
        ("http.kind-detail", of::<KindDetail>()),
        ("http.kind-list", of::<KindList>()),
        ("http.kind-deleted", of::<KindDeleted<'_>>()),
        ("http.context", of::<Conversation>()),
        ("http.membership", of::<MembershipReply>()),
        ("http.revocation", of::<RevocationReply>()),
        ("http.run", of::<RunDetail>()),
        ("http.run-list", of::<RunList>()),
        ("http.problem", of::<Problem>()),
        ("http.healthz", of::<Alive>()),
        ("http.readyz", of::<Ready>()),
        ("log.event", of::<LogEvent>()),
        ("log.receipt", of::<ReceiptRecord>()),
        ("log.dead-letter", of::<DeadLetterRecord>()),
        ("log.letter-act", of::<LetterActRecord>()),
        ("log.created", of::<LogCreatedRecord>()),
        ("log.generation", of::<LogGenerationRecord>()),
        ("log.checkpoint", of::<LogCheckpointRecord>()),
        ("log.ticket-issued", of::<TicketIssuedRecord>()),
        ("log.ticket-used", of::<TicketUsedRecord>()),
        ("log.group", of::<GroupRecord>()),
        ("log.kind", of::<KindRecord<'_>>()),
        ("log.work-leased", of::<WorkLeasedRecord>()),
        ("log.work-settled", of::<WorkSettledRecord>()),
        ("log.work-overflowed", of::<WorkOverflowedRecord>()),
        ("log.work-paused", of::<WorkPausedRecord>()),
    ]
}

fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>()
}

/// A schema as its file holds it.
pub fn text(schema: &Schema) -> String {
    json::encode_pretty(schema) + "\n"
}
