//! What each route takes and answers.

use super::Body::{self, None, Optional, Required};
use super::Content::{Document, Events, File, Json, Nothing, OneOf, Text};
use super::{Answer, Content, Operation};

const GET: &str = "GET";
const PUT: &str = "PUT";
const POST: &str = "POST";
const DELETE: &str = "DELETE";

const LIST: &[&str] = &["cursor", "limit"];
const TRACED: &[&str] = &["traceparent"];
const FILTERS: &[&str] = &["reason", "fingerprint", "thread", "kind", "since", "until", "group", "cursor", "limit"];

const EXPORT: &[&str] =
    &["format", "thread", "since", "until", "kinds", "from", "mask", "epoch", "positions", "cursor"];

const SEARCH: &[&str] = &["q", "thread", "from", "kind", "run", "since", "until", "order", "around", "limit", "cursor"];

#[rustfmt::skip]
pub static OPERATIONS: &[Operation] = &[
    of(GET, "/v1/ws", "connect", "Opens a WebSocket: what goes over it is in /v1/asyncapi.json.", &["ticket", "traceparent"], None, &[is(101, Nothing)]),
    of(POST, "/v1/tickets", "createTicket", "A ticket, good once within 30 s for a WebSocket or an event stream.", &[], None, &[is(201, Json("http.ticket"))]),

    of(GET, "/v1/threads", "listThreads", "The caller's threads, newest activity first; with `all` every thread of the tenant.", &["all", "cursor", "limit"], None, &[is(200, Json("http.thread-list"))]),
    of(GET, "/v1/threads/{thread}", "getThread", "One thread.", &[], None, &[is(200, Json("http.thread-detail"))]),
    of(PUT, "/v1/threads/{thread}", "putThread", "Creates a thread, or changes its title and adds members.", TRACED, Optional("http.thread"), &[is(200, Json("http.thread-detail")), is(201, Json("http.thread-detail"))]),
    of(PUT, "/v1/threads/{thread}/members/{user}", "addMember", "Adds a member.", TRACED, None, &[is(200, Json("http.membership")), is(201, Json("http.membership"))]),
    of(DELETE, "/v1/threads/{thread}/members/{user}", "removeMember", "Removes a member.", TRACED, None, &[is(200, Json("http.membership"))]),
    of(GET, "/v1/threads/{thread}/events", "listEvents", "A page of a thread's events.", &["after", "before", "limit", "kinds", "order", "epoch"], None, &[is(200, Json("http.event-page"))]),
    of(POST, "/v1/threads/{thread}/events", "publish", "Publishes an event: 201, or 200 if its key was used before.", &["Idempotency-Key", "traceparent"], Required("http.publish"), &[is(200, Json("http.published")), is(201, Json("http.published"))]),
    of(POST, "/v1/events", "publishBatch", "Publishes up to 1,000 events, each with its own outcome.", TRACED, Required("http.publish-batch"), &[is(200, Json("http.published-batch"))]),
    of(GET, "/v1/threads/{thread}/presence", "getPresence", "Who has the thread open, on this node.", &[], None, &[is(200, Json("http.presence"))]),
    of(GET, "/v1/threads/{thread}/receipts", "getReceipts", "How far members have acknowledged.", &[], None, &[is(200, Json("http.receipts"))]),
    of(GET, "/v1/threads/{thread}/context", "getContext", "The end of the conversation as chat messages.", &["max_chars", "max_messages"], None, &[is(200, Json("http.context"))]),
    of(GET, "/v1/threads/{thread}/stream", "streamEvents", "Events as Server-Sent Events, replayed and then live.", &["after", "epoch", "Last-Event-ID"], None, &[is(200, Events(&["http.event", "http.stream-start"]))]),
    of(GET, "/v1/threads/{thread}/agui", "streamRuns", "The runs of a thread as AG-UI's events.", &["after", "run", "epoch", "Last-Event-ID"], None, &[is(200, Events(&["agui.event"])), is(204, Nothing)]),

    of(GET, "/v1/search", "search", "Events by their words, in what the caller may read.", SEARCH, None, &[is(200, Json("http.search"))]),
    of(GET, "/v1/export", "exportEvents", "The tenant's events as a file.", EXPORT, None, &[is(200, File(&["application/x-ndjson", "text/csv"]))]),

    of(GET, "/v1/threads/{thread}/runs", "listThreadRuns", "A thread's runs, newest first.", LIST, None, &[is(200, Json("http.run-list"))]),
    of(GET, "/v1/threads/{thread}/runs/{run}", "getThreadRun", "One run with its steps, calls, messages and timings.", &[], None, &[is(200, Json("http.run"))]),
    of(GET, "/v1/runs", "listRuns", "Runs that are open or wait, in all threads that the caller reads.", &["state", "cursor", "limit"], None, &[is(200, Json("http.run-list"))]),
    of(GET, "/v1/runs/{run}", "getRun", "One run by its name.", &[], None, &[is(200, Json("http.run"))]),

    of(GET, "/v1/groups", "listGroups", "The tenant's groups.", LIST, None, &[is(200, Json("http.group-list"))]),
    of(GET, "/v1/groups/{group}", "getGroup", "One group, with what waits for it.", &[], None, &[is(200, Json("http.group-detail"))]),
    of(PUT, "/v1/groups/{group}", "putGroup", "Makes (201) or changes (200) a group.", &[], Optional("http.group-settings"), &[is(200, Json("http.group")), is(201, Json("http.group"))]),
    of(POST, "/v1/groups/{group}/pause", "pauseGroup", "Nobody gets its work, or that of one thread, until it is resumed.", &[], Optional("http.group-pause"), &[is(200, OneOf(&["http.group", "http.group-thread-paused"]))]),
    of(POST, "/v1/groups/{group}/resume", "resumeGroup", "Goes on after a pause.", &[], Optional("http.group-pause"), &[is(200, OneOf(&["http.group", "http.group-thread-paused"]))]),
    of(POST, "/v1/groups/{group}/lease", "leaseWork", "Takes work of a group.", &[], Optional("http.lease"), &[is(200, Json("http.work-list"))]),
    of(POST, "/v1/groups/{group}/settle", "settleWork", "Says what became of work.", &[], Required("http.settle"), &[is(200, OneOf(&["http.settled", "http.settled-list"]))]),
    of(DELETE, "/v1/groups/{group}", "deleteGroup", "Deletes a group.", &[], None, &[is(200, Json("http.group-deleted"))]),

    of(GET, "/v1/kinds", "listKinds", "The tenant's custom kinds that have a schema.", LIST, None, &[is(200, Json("http.kind-list"))]),
    of(GET, "/v1/kinds/{kind}", "getKind", "The schema of a custom kind.", &[], None, &[is(200, Json("http.kind-detail"))]),
    of(PUT, "/v1/kinds/{kind}", "putKind", "Sets (201) or replaces (200) the schema that data of a custom kind is held to.", &[], Required("http.kind-schema"), &[is(200, Json("http.kind")), is(201, Json("http.kind"))]),
    of(DELETE, "/v1/kinds/{kind}", "deleteKind", "Deletes the schema of a custom kind, which takes any data from then on.", &[], None, &[is(200, Json("http.kind-deleted"))]),

    of(GET, "/v1/dead-letters", "listDeadLetters", "Open dead letters, newest first.", FILTERS, None, &[is(200, Json("http.dead-letter-list"))]),
    of(GET, "/v1/dead-letters/counts", "countDeadLetters", "How many are open, by reason and fingerprint.", &["group", "limit"], None, &[is(200, Json("http.dead-letter-counts"))]),
    of(GET, "/v1/dead-letters/{id}", "getDeadLetter", "One dead letter, with the events around it.", &[], None, &[is(200, Json("http.dead-letter"))]),
    of(DELETE, "/v1/dead-letters/{id}", "discardDeadLetter", "Discards one.", &["note"], None, &[is(200, Json("http.dead-letter-outcome"))]),
    of(POST, "/v1/dead-letters/{id}/requeue", "requeueDeadLetter", "Tries one again.", &[], Optional("http.dead-letter-act"), &[is(200, Json("http.dead-letter-outcome"))]),
    of(POST, "/v1/dead-letters/requeue", "requeueDeadLetters", "Tries all again that match.", LIST, Required("http.dead-letter-acts"), &[is(200, Json("http.dead-letter-outcomes"))]),
    of(POST, "/v1/dead-letters/discard", "discardDeadLetters", "Discards all that match.", LIST, Required("http.dead-letter-acts"), &[is(200, Json("http.dead-letter-outcomes"))]),
    of(GET, "/v1/sessions", "listSessions", "Who is connected to this node.", &["user", "cursor", "limit"], None, &[is(200, Json("http.session-list"))]),
    of(DELETE, "/v1/users/{user}/sessions", "revokeUser", "Disconnects a user and refuses the tokens that it has.", TRACED, None, &[is(200, Json("http.revocation"))]),

    of(GET, "/v1/openapi.json", "getOpenApi", "This document.", &[], None, &[is(200, Document("application/json"))]),
    of(GET, "/v1/asyncapi.json", "getAsyncApi", "What goes over the WebSocket and into the log, as AsyncAPI.", &[], None, &[is(200, Document("application/json"))]),
    of(GET, "/v1/schemas/{name}", "getSchema", "One JSON Schema of those that both documents are made of.", &[], None, &[is(200, Document("application/schema+json"))]),

    of(GET, "/healthz", "getHealth", "Whether the server is alive.", &[], None, &[is(200, Json("http.healthz"))]),
    of(GET, "/readyz", "getReadiness", "Whether the server is ready, with the state of each part.", &["for"], None, &[is(200, Json("http.readyz")), is(503, Json("http.readyz"))]),
    of(GET, "/metrics", "getMetrics", "Metrics for Prometheus.", &[], None, &[is(200, Text)]),
];

const fn of(
    method: &'static str,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    parameters: &'static [&'static str],
    body: Body,
    answers: &'static [Answer],
) -> Operation {
    Operation { method, path, id, summary, parameters, body, answers }
}

const fn is(status: u16, content: Content) -> Answer {
    Answer { status, content }
}
