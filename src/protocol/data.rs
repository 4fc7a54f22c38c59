//! What `data` holds for each kind of event, as schemas.
//!
//! Nothing is parsed into these types: `data` is carried as it came, and [`super::kinds::check_data`] checks what a publisher
//! sends without building a value. Here is the same contract for machines. Further fields are kept as they are, so the
//! schemas allow them. `data` of `agent_token` is [`super::kinds::DeltaData`]; that of `x.<name>` is any JSON that
//! fits the schema of the tenant's, if there is one.

#![expect(dead_code, reason = "the shapes that schemas are generated from")]

use schemars::JsonSchema;
use serde_json::Value;

/// A text, or a list of parts as the chat APIs of models have them.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message, with whatever else its type brings.
#[derive(JsonSchema)]
pub struct Part {
    r#type: String,
}

/// `data` of `user_message` and `system_message`.
#[derive(JsonSchema)]
pub struct Message {
    content: Content,
}

/// `data` of `agent_message`: with `content`, with `message`, or with both.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum AgentMessage {
    /// A message that stands for itself, or the text of one that was written in deltas.
    Whole { content: Content },
    /// Closes a message that was written in deltas. Readers get its text as `content`.
    Close { message: String },
}

/// `data` of `agent_started`.
#[derive(JsonSchema)]
pub struct AgentStarted {
    agent: String,
    input: Option<Value>,
    /// The run on the same thread that this one works for.
    parent_run: Option<String>,
}

/// `data` of `agent_thinking`.
#[derive(JsonSchema)]
pub struct AgentThinking {
    content: Option<Value>,
}

/// `data` of `tool_executing`.
#[derive(JsonSchema)]
pub struct ToolExecuting {
    tool: String,
    /// The call's name, its own within the run.
    call: String,
    arguments: Option<Value>,
}

/// `data` of `tool_completed`.
#[derive(JsonSchema)]
pub struct ToolCompleted {
    call: String,
    result: Option<Value>,
    error: Option<Value>,
}

/// `data` of `agent_waiting`.
#[derive(JsonSchema)]
pub struct AgentWaiting {
    reason: String,
    prompt: Option<Value>,
    /// RFC 3339.
    expires_at: Option<Value>,
}

/// `data` of `agent_resumed`.
#[derive(JsonSchema)]
pub struct AgentResumed {
    answer: Option<Value>,
    /// The server resumed the run, since the time to answer was over.
    expired: Option<Value>,
}

/// `data` of `agent_cancel_requested` and `agent_cancelled`.
#[derive(JsonSchema)]
pub struct Cancel {
    reason: Option<Value>,
}

/// `data` of `agent_completed`.
#[derive(JsonSchema)]
pub struct AgentCompleted {
    output: Option<Value>,
    /// Token counts.
    usage: Option<Value>,
}

/// `data` of `agent_failed`.
#[derive(JsonSchema)]
pub struct AgentFailed {
    code: String,
    message: String,
}

/// `data` of `thread_created`.
#[derive(JsonSchema)]
pub struct ThreadCreated {
    title: Option<String>,
    /// The members beside the event's `from`.
    members: Vec<String>,
}

/// `data` of `thread_updated`.
#[derive(JsonSchema)]
pub struct ThreadUpdated {
    title: String,
}

/// `data` of `member_added` and `member_removed`.
#[derive(JsonSchema)]
pub struct Member {
    user: String,
}

/// `data` of `sessions_revoked`.
#[derive(JsonSchema)]
pub struct SessionsRevoked {}
