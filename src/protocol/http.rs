//! The bodies of HTTP requests and answers.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::error::{Code, Error};
use super::event::{EventItem, Priority};

/// A thread as a list has it.
#[derive(Serialize, JsonSchema)]
pub struct ThreadItem {
    pub thread: String,
    pub head: u64,
    /// Events that the user has not acknowledged.
    pub unread: u64,
    pub members: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The newest event.
    #[schemars(with = "Option<EventItem>")]
    pub last: Option<Box<RawValue>>,
}

/// A page of threads.
#[derive(Serialize, JsonSchema)]
pub struct ThreadList {
    pub threads: Vec<ThreadItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What a search has found.
#[derive(Serialize, JsonSchema)]
pub struct SearchPage {
    pub hits: Vec<SearchHit>,
    /// The cursor of the next page, if there is more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// How long it took.
    pub took_ms: u64,
    /// Everything that happened before this time was looked at; RFC 3339.
    pub complete_to: String,
    /// The search was broken off, since it had done as much work as one may: there may be more hits, newer ones as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial: Option<bool>,
    /// Nothing had what was searched for, and this was searched for in its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrected: Option<String>,
}

/// An event that was found.
#[derive(Serialize, JsonSchema)]
pub struct SearchHit {
    pub thread: String,
    pub seq: u64,
    /// With `order=relevance`: the higher, the better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Where it has what was searched for.
    pub highlights: Vec<Highlight>,
    #[schemars(with = "EventItem")]
    pub event: Box<RawValue>,
    /// With `around`: the events before and after it in its thread, in order, without itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<EventItem>>")]
    pub around: Option<Vec<Box<RawValue>>>,
}

/// A text of an event that was found, or the part of it around what was searched for.
#[derive(Serialize, JsonSchema)]
pub struct Highlight {
    /// `text`, `tool`, `arguments`, `result` or `title`.
    pub field: &'static str,
    pub text: String,
    /// Where in `text` it stands: from one character to before another, counted in Unicode scalar values.
    #[schemars(with = "Vec<[usize; 2]>")]
    pub ranges: Vec<(usize, usize)>,
    /// The same text as HTML, with `<mark>` around it.
    pub marked: String,
}

/// A thread on its own.
#[derive(Serialize, JsonSchema)]
pub struct ThreadDetail {
    pub thread: String,
    pub epoch: String,
    pub head: u64,
    pub members: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Absent before the first event of an inbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    /// The head's link of the hash chain, BLAKE3, in hex.
    pub hash: String,
}

/// What a stream of events begins with, if its request names an epoch: as the frame `subscribed`.
#[derive(Serialize, JsonSchema)]
pub struct StreamStart<'a> {
    pub thread: &'a str,
    /// The log's epoch, which seqs of this stream are of.
    pub epoch: &'a str,
    pub head: u64,
    /// Events after this seq are sent.
    pub after: u64,
    /// False if the epoch that was named is another one: the stream begins at the head, and does not continue what was before.
    pub recovered: bool,
}

/// Who is in a thread now, on this node.
#[derive(Serialize, JsonSchema)]
pub struct Presence {
    pub thread: String,
    pub users: Vec<Present>,
}

/// A member with at least one subscription to the thread.
#[derive(Serialize, JsonSchema)]
pub struct Present {
    pub user: String,
    /// How many.
    pub connections: u32,
}

/// How far members have come in a thread.
#[derive(Serialize, JsonSchema)]
pub struct ReceiptList {
    pub thread: String,
    pub head: u64,
    pub receipts: Vec<ReceiptItem>,
}

#[derive(Serialize, JsonSchema)]
pub struct ReceiptItem {
    pub user: String,
    /// The durable subscription; absent for acknowledgements without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The newest seq acknowledged, 0 for none.
    pub seq: u64,
    /// When that was last changed, RFC 3339.
    pub at: String,
}

/// The answer to `POST /v1/tickets`.
#[derive(serde::Serialize, JsonSchema)]
pub struct Ticket {
    /// For `GET /v1/ws?ticket=` and event streams: good once, on every node.
    pub ticket: String,
    /// RFC 3339, 30 s from now.
    pub expires_at: String,
}

/// The answer to `POST /v1/threads/{t}/events`.
#[derive(serde::Serialize, JsonSchema)]
pub struct PublishReply<'a> {
    pub thread: &'a str,
    /// Absent for a delta, which has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    pub event: Uuid,
    pub duplicate: bool,
    /// For a delta: its message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'a str>,
    /// For a delta: the characters of the message up to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_char: Option<u64>,
}

/// A page of sessions of this node, oldest first.
#[derive(Serialize, JsonSchema)]
pub struct SessionList {
    pub sessions: Vec<SessionItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// How a client is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Websocket,
    Sse,
}

/// A session as the list has it.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct SessionItem {
    pub connection: String,
    pub user: String,
    pub transport: Transport,
    /// RFC 3339.
    pub connected_at: String,
    /// Bytes of events that wait for its socket.
    pub outbox_bytes: usize,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    Open,
    /// Open, and a person must answer.
    Waiting,
    Completed,
    Failed,
    Cancelled,
}

/// An event's seq and time.
#[derive(Serialize, JsonSchema)]
pub struct EventAt {
    pub seq: u64,
    /// RFC 3339.
    pub at: String,
}

/// An event that somebody caused.
#[derive(Serialize, JsonSchema)]
pub struct EventBy {
    pub seq: u64,
    /// RFC 3339.
    pub at: String,
    pub user: String,
}

/// A run as a list has it.
#[derive(Serialize, JsonSchema)]
pub struct RunItem {
    pub run: String,
    pub thread: String,
    pub agent: String,
    pub state: RunState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_run: Option<String>,
    pub started: EventAt,
    /// The newest event.
    pub last: EventAt,
    /// When it was last heard of, RFC 3339: later than `last` while it writes a message in deltas.
    pub heard_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<EventAt>,
    /// Calls that have not completed.
    pub executing: u32,
    /// Runs that work for this one and have not ended.
    pub children: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<OpenQuestion>,
    /// Who answered last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed: Option<EventBy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel: Option<Cancellation>,
}

/// The question that a person must answer.
#[derive(Serialize, JsonSchema)]
pub struct OpenQuestion {
    pub seq: u64,
    /// RFC 3339.
    pub at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// What the agent says of it: `reason`, `prompt` and whatever else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub data: Option<Box<RawValue>>,
}

/// A run that somebody wants cancelled.
#[derive(Serialize, JsonSchema)]
pub struct Cancellation {
    pub requested: EventBy,
    /// The agent's first event after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<EventAt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<EventAt>,
}

/// A page of runs.
#[derive(Serialize, JsonSchema)]
pub struct RunList {
    pub runs: Vec<RunItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A run with all that it did.
#[derive(Serialize, JsonSchema)]
pub struct RunDetail {
    #[serde(flatten)]
    pub run: RunItem,
    pub timings: Timings,
    pub steps: Vec<StepItem>,
    pub tools: Vec<ToolItem>,
    /// Those that were written in deltas, in the order in which they were begun.
    pub messages: Vec<MessageItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub output: Option<Box<RawValue>>,
    /// Token counts, as `agent_completed` gives them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub usage: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<RunFailure>,
    /// The run has more steps or messages than are listed here.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schemars(default)]
    pub truncated: bool,
}

/// Why a run failed.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct RunFailure {
    pub code: String,
    pub message: String,
}

/// What the run's time went to, in milliseconds. Calls and messages that overlap count each for itself.
#[derive(Default, Serialize, JsonSchema)]
pub struct Timings {
    /// From the start to the first sign of work.
    pub queue_ms: u64,
    pub thinking_ms: u64,
    pub tool_ms: u64,
    /// Writing messages in deltas.
    pub streaming_ms: u64,
    /// Waiting for a person.
    pub waiting_ms: u64,
    /// From the start to the end, or to when the run was last heard of.
    pub total_ms: u64,
}

#[derive(Serialize, JsonSchema)]
pub struct StepItem {
    pub seq: u64,
    pub kind: String,
    /// RFC 3339.
    pub at: String,
    pub from: String,
    /// Until the run's next event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
}

/// A call of a tool.
#[derive(Serialize, JsonSchema)]
pub struct ToolItem {
    pub call: String,
    pub tool: String,
    pub began: EventAt,
    /// Absent while it is executing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed: Option<EventAt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub error: Option<Box<RawValue>>,
}

/// A message that was written in deltas.
#[derive(Serialize, JsonSchema)]
pub struct MessageItem {
    pub message: String,
    pub from: String,
    /// Its length, in Unicode scalar values: of what was written, whatever the event that closed it says.
    pub chars: u64,
    /// When its first delta came, RFC 3339.
    pub began: String,
    /// The event that it became; absent while it is being written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed: Option<EventAt>,
    /// From the first delta until it was closed, or to the newest one.
    pub ms: u64,
}

/// A conversation as chat messages, oldest first.
#[derive(Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Conversation(pub Vec<ChatMessage>);

/// What was said, by whom. `seq` is the event's.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum ChatMessage {
    System {
        /// A string or a list of parts.
        #[schemars(with = "serde_json::Value")]
        content: Box<RawValue>,
        seq: u64,
    },
    User {
        /// A string or a list of parts.
        #[schemars(with = "serde_json::Value")]
        content: Box<RawValue>,
        /// The user who said it.
        name: String,
        seq: u64,
    },
    Assistant {
        /// A string or a list of parts; `null` where a tool is called.
        #[schemars(with = "serde_json::Value")]
        content: Option<Box<RawValue>>,
        /// One call; its result is the next message.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        #[schemars(default)]
        tool_calls: Vec<ToolCall>,
        seq: u64,
    },
    Tool {
        tool_call_id: String,
        /// The result, or the error: a string as it is, anything else as JSON.
        content: String,
        seq: u64,
    },
}

#[derive(Serialize, JsonSchema)]
pub struct ToolCall {
    /// Only this call's in the answer.
    pub id: String,
    #[schemars(extend("const" = "function"))]
    pub r#type: &'static str,
    pub function: Function,
}

#[derive(Serialize, JsonSchema)]
pub struct Function {
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

/// The body of `/healthz`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Alive {
    /// Always `true`: a server that is not alive does not answer.
    pub alive: bool,
}

/// The body of `/readyz`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Ready {
    /// For what was asked: `?for=read`, `?for=write`, or, without it, both.
    pub ready: bool,
    pub ready_for: ReadyFor,
    pub draining: bool,
    pub log: LogHealth,
    pub projector: ProjectorHealth,
    pub store: PartHealth,
    pub disk: DiskHealth,
    /// Other services that this one asks. None of them makes it unready.
    pub dependencies: Vec<DependencyHealth>,
    pub work: WorkHealth,
    /// Whether another service does not work, or a group is overflowing.
    pub degraded: bool,
}

/// The disk of the data folder.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskHealth {
    /// `false`: nearly full, or it hangs.
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// `null` if the disk does not say it.
    pub free_bytes: Option<u64>,
}

/// Another service, as it was when it was called last.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DependencyHealth {
    /// `jwks`, `oidc` or `introspection`.
    pub name: &'static str,
    pub host: String,
    pub ok: bool,
    /// Of the circuit breakers of its instances the best: `closed`, `half_open` or `open`.
    pub breaker: &'static str,
    /// Since when `ok` is what it is.
    pub since: String,
    /// Why a call failed last, if one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error_at: Option<String>,
    /// As far as it is known where they are.
    pub instances: Vec<InstanceHealth>,
}

/// One of the addresses of another service.
#[derive(Debug, Serialize, JsonSchema)]
pub struct InstanceHealth {
    pub address: String,
    /// `open`: it is left out for a while.
    pub breaker: &'static str,
    /// Why it failed last, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Work queues. That they are full makes no node unready.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct WorkHealth {
    /// How many groups are overflowing: their workers do not keep up.
    pub overflowing: usize,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ReadyFor {
    /// What is projected can be read, and it is no less than the log had at the start.
    pub read: bool,
    /// The log takes records and keeps them, and the projector gives them their seqs.
    pub write: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct PartHealth {
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct LogHealth {
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What somebody should see to, though nothing is wrong yet.
    pub warnings: Vec<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ProjectorHealth {
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether it has seen all that was in the log at the start.
    pub caught_up: bool,
    /// Until then: why it makes the projections anew, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebuilding: Option<String>,
    /// `null` while the log does not say where it ends.
    pub lag_records: Option<u64>,
    /// `null` with `lag_records`, and before anything was projected.
    pub lag_seconds: Option<f64>,
}

/// The body of an HTTP refusal: `application/problem+json` (RFC 9457).
#[derive(Debug, Serialize, JsonSchema)]
pub struct Problem<'a> {
    pub title: &'static str,
    pub status: u16,
    pub code: Code,
    pub detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
}

/// The body of `POST /v1/threads/{t}/events`; the key comes in `Idempotency-Key`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishBody<'a> {
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    #[serde(borrow)]
    #[schemars(with = "serde_json::Value")]
    pub data: &'a RawValue,
    #[serde(default)]
    pub priority: Option<Priority>,
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 128))]
    pub run: Option<Cow<'a, str>>,
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub parent: Option<u64>,
}

/// The body of `PUT /v1/threads/{t}`.
#[derive(Debug, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields)]
pub struct ThreadBody {
    #[serde(default)]
    #[schemars(length(max = 512))]
    pub title: Option<String>,
    /// Users to add; the caller is a member of a thread it creates in any case.
    #[serde(default)]
    #[schemars(length(max = 1_000))]
    pub members: Option<Vec<String>>,
}

impl<'a> Problem<'a> {
    pub fn of(error: &'a Error) -> Problem<'a> {
        Problem {
            title: error.code.as_str(),
            status: error.code.status(),
            code: error.code,
            detail: &error.message,
            field: error.field.as_deref(),
            retry_after_ms: error.retry_after_ms,
            outcome: error.outcome_unknown.then_some("unknown"),
        }
    }
}

/// The answer to `PUT` and `DELETE /v1/threads/{t}/members/{user}`.
#[derive(Serialize, JsonSchema)]
pub struct MembershipReply<'a> {
    pub thread: &'a str,
    pub user: &'a str,
    /// Whether the user is a member now.
    pub member: bool,
    /// The event that made it so, or the thread's head if nothing had to change.
    pub seq: u64,
    pub changed: bool,
}

/// The answer to `DELETE /v1/users/{user}/sessions`.
#[derive(Serialize, JsonSchema)]
pub struct RevocationReply<'a> {
    pub user: &'a str,
    /// RFC 3339: tokens that were issued until then are refused.
    pub revoked_at: &'a str,
}

/// A page of a thread's events. Its text is put together from stored events, without parsing them.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "the shape that the schema is generated from")]
pub struct EventPage {
    events: Vec<EventItem>,
    /// The thread's newest seq.
    head: u64,
    /// Where the next page goes on, for `after`, or with `order=desc` for `before`. Absent at the end.
    next: Option<u64>,
}
