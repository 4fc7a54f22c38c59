//! A part of a thread as a line of a dataset: the messages that model APIs take, the tools that were called, and how the
//! newest run ended.

use std::collections::BTreeSet;
use std::convert::Infallible;

use serde::Serialize;

use crate::protocol::event::StoredFrame;
use crate::protocol::http::Conversation;
use crate::protocol::json;
use crate::protocol::kinds::{AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, TOOL_EXECUTING};
use crate::views::chat::{CallResult, Chat, ContextBudget};

/// An event of the part.
pub struct PartEvent {
    pub seq: u64,
    pub kind: String,
    pub privileged: bool,
    pub frame: String,
    /// Of a call that completed.
    pub result: Option<CallResult>,
}

#[derive(Serialize)]
struct Line<'a> {
    thread: &'a str,
    /// The seqs of the first and last event that was looked at.
    first: u64,
    last: u64,
    messages: Conversation,
    tools: Vec<Tool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<Outcome>,
}

#[derive(Serialize)]
struct Tool {
    r#type: &'static str,
    function: Name,
}

#[derive(Serialize)]
struct Name {
    name: String,
}

/// How a run ended.
#[derive(Serialize)]
struct Outcome {
    run: String,
    state: &'static str,
    seq: u64,
    /// Of a run that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
}

/// Writes the line of events in their order; none if there is no message among them.
pub fn put_part(out: &mut String, thread: &str, events: Vec<PartEvent>) -> bool {
    let (Some(first), Some(last)) = (events.first().map(|it| it.seq), events.last().map(|it| it.seq)) else {
        return false;
    };
    let tools: BTreeSet<String> = events.iter().filter(|it| it.result.is_some()).filter_map(tool_of).collect();
    let outcome = events.iter().rev().find_map(outcome_of);

    let room = ContextBudget { messages: usize::MAX, chars: usize::MAX, bytes: usize::MAX };
    let mut chat = Chat::new(room);
    for PartEvent { seq, kind, privileged, frame, result } in events.into_iter().rev() {
        // There is room for everything: the caller has bounded the part.
        match chat.prepend::<Infallible>(seq, &kind, privileged, &frame, |_, _| Ok(result)) {
            Ok(_) => {}
            Err(never) => match never {},
        }
    }
    let messages = chat.finish();
    if messages.0.is_empty() {
        return false;
    }
    let function = |name| Tool { r#type: "function", function: Name { name } };
    let tools = tools.into_iter().map(function).collect();
    out.push_str(&json::encode(&Line { thread, first, last, messages, tools, outcome }));
    out.push('\n');
    true
}

fn tool_of(event: &PartEvent) -> Option<String> {
    if event.kind != TOOL_EXECUTING {
        return None;
    }
    StoredFrame::parse(&event.frame)?.fields().string("tool")
}

fn outcome_of(event: &PartEvent) -> Option<Outcome> {
    let state = match event.kind.as_str() {
        AGENT_COMPLETED => "completed",
        AGENT_FAILED => "failed",
        AGENT_CANCELLED => "cancelled",
        _ => return None,
    };
    let frame = StoredFrame::parse(&event.frame)?;
    let code = frame.fields().string("code").filter(|_| event.kind == AGENT_FAILED);
    Some(Outcome { run: frame.run?.into_owned(), state, seq: event.seq, code })
}
