//! The page of one run: all that it did, and what its time went to.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use warp::http::StatusCode;

use super::{at, item, no_run};
use crate::clock;
use crate::edge::Context;
use crate::edge::http::reply::Reply;
use crate::edge::http::reply::json;
use crate::protocol::error::Error;
use crate::protocol::http::{MessageItem, RunDetail, StepItem, Timings, ToolItem};
use crate::store::EventRange;
use crate::store::messages::MessageRow;
use crate::store::runs::{EventRef, RunKey, RunRow};

/// Steps, and messages written in pieces, that a run's page tells; a run with more is cut short, and says so.
const MAX_STEPS: usize = 10_000;

/// What a stored frame says of a run's event.
#[derive(Deserialize)]
struct Stored {
    kind: String,
    from: String,
    at: String,
    data: Box<RawValue>,
}

#[derive(Default, Deserialize)]
struct Data {
    call: Option<String>,
    tool: Option<String>,
    output: Option<Box<RawValue>>,
    usage: Option<Box<RawValue>>,
    error: Option<Box<RawValue>>,
}

pub(super) struct Step {
    seq: u64,
    at: u64,
    kind: String,
    from: String,
    pub(super) data: Box<RawValue>,
    known: Data,
}

pub(super) fn detail(ctx: &Context, key: &RunKey) -> Result<Reply, Error> {
    let row = ctx.store.run(key)?.ok_or_else(no_run)?;
    let mut seqs = ctx.store.run_events(key)?;
    let mut written = written(ctx, key)?;
    let truncated = seqs.len().max(written.len()) > MAX_STEPS;
    seqs.truncate(MAX_STEPS);
    written.truncate(MAX_STEPS);
    let mut steps = Vec::with_capacity(seqs.len());
    for seq in seqs {
        steps.extend(step(ctx, key, seq)?);
    }
    // Of a run that is cut short as well.
    let end = row.ended.map(|(mark, _)| step(ctx, key, mark.seq)).transpose()?.flatten();
    let error = end.as_ref().filter(|step| step.kind == "agent_failed");
    let error = error.and_then(|step| serde_json::from_str(step.data.get()).ok());
    let mut run = item(ctx, key, &row)?;
    if let Some(cancel) = &mut run.cancel {
        let asked = cancel.requested.seq;
        let answer = steps.iter().find(|step| step.seq > asked && !is_peoples(&step.kind));
        cancel.acknowledged = answer.map(|step| at(EventRef { seq: step.seq, at: step.at }));
    }
    let detail = RunDetail {
        run,
        timings: timings(&row, &steps, &written),
        tools: tools(&steps),
        messages: written.into_iter().map(message).collect(),
        output: end.as_ref().and_then(|step| step.known.output.clone()),
        usage: end.and_then(|step| step.known.usage),
        error,
        steps: steps.iter().enumerate().map(|(i, step)| told(step, steps.get(i + 1))).collect(),
        truncated,
    };
    Ok(json(StatusCode::OK, &detail))
}

fn is_peoples(kind: &str) -> bool {
    matches!(kind, "agent_resumed" | "agent_cancel_requested")
}

pub(super) fn step(ctx: &Context, key: &RunKey, seq: u64) -> Result<Option<Step>, Error> {
    let range = EventRange { from: seq, to: seq, limit: 1, ..EventRange::all() };
    let Some(event) = ctx.store.events(&key.tenant, &key.thread, range)?.pop() else { return Ok(None) };
    let Ok(Stored { kind, from, at, data }) = serde_json::from_str(&event.frame) else { return Ok(None) };
    // Fields of another type than ours are the agent's own affair.
    let known = serde_json::from_str(data.get()).unwrap_or_default();
    Ok(Some(Step { seq, at: clock::parse_rfc3339(&at).unwrap_or(0), kind, from, data, known }))
}

fn told(step: &Step, next: Option<&Step>) -> StepItem {
    StepItem {
        seq: step.seq,
        kind: step.kind.clone(),
        at: clock::rfc3339(step.at),
        from: step.from.clone(),
        ms: next.map(|next| next.at.saturating_sub(step.at)),
        call: step.known.call.clone(),
        tool: step.known.tool.clone(),
    }
}

/// Messages that were written piece by piece, as they were begun.
fn written(ctx: &Context, key: &RunKey) -> Result<Vec<(String, MessageRow)>, Error> {
    let rows = ctx.store.messages_of(key)?;
    let mut rows: Vec<_> = rows.into_iter().map(|(key, row)| (key.message, row)).collect();
    rows.sort_by_key(|(_, row)| row.begun);
    Ok(rows)
}

fn message((message, row): (String, MessageRow)) -> MessageItem {
    MessageItem {
        message,
        chars: row.chars,
        began: clock::rfc3339(row.begun_at),
        closed: row.closed.as_ref().map(|closed| at(closed.mark)),
        ms: writing_ms(&row),
        from: row.from,
    }
}

fn writing_ms(row: &MessageRow) -> u64 {
    let end = row.closed.as_ref().map_or(row.last_at, |closed| closed.mark.at);
    end.saturating_sub(row.begun_at)
}

fn timings(row: &RunRow, steps: &[Step], written: &[(String, MessageRow)]) -> Timings {
    let end = row.ended.map_or(row.heard_at(), |(mark, _)| mark.at);
    let mut begun: Vec<u64> = written.iter().map(|(_, row)| row.begun_at).collect();
    begun.sort_unstable();
    let mut timings = Timings { total_ms: end.saturating_sub(row.started.at), ..Timings::default() };
    for (i, step) in steps.iter().enumerate() {
        let behind = &steps[i + 1..];
        // That somebody wants it cancelled is no work of the agent's.
        let next = behind.iter().find(|step| !is_peoples(&step.kind)).map_or(end, |next| next.at);
        let answered = behind.iter().find(|step| step.kind == "agent_resumed").map_or(end, |next| next.at);
        // Who begins to write has thought, and the first piece of a message is no event.
        let writes = begun.get(begun.partition_point(|at| *at < step.at));
        let works = writes.map_or(next, |at| next.min(*at));
        match &*step.kind {
            "agent_started" => timings.queue_ms += works.saturating_sub(step.at),
            "agent_thinking" | "tool_completed" | "agent_resumed" => {
                timings.thinking_ms += works.saturating_sub(step.at)
            }
            "agent_waiting" => timings.waiting_ms += answered.saturating_sub(step.at),
            _ => {}
        }
    }
    timings.tool_ms = tools(steps).iter().filter_map(|tool| tool.ms).sum();
    timings.streaming_ms = written.iter().map(|(_, row)| writing_ms(row)).sum();
    timings
}

fn tools(steps: &[Step]) -> Vec<ToolItem> {
    let mut tools: Vec<ToolItem> = Vec::new();
    let mut open: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for step in steps {
        let Some(call) = step.known.call.as_deref() else { continue };
        let mark = || at(EventRef { seq: step.seq, at: step.at });
        match &*step.kind {
            "tool_executing" => {
                open.insert(call, (tools.len(), step.at));
                let tool = step.known.tool.clone().unwrap_or_default();
                tools.push(ToolItem {
                    call: call.to_owned(),
                    tool,
                    began: mark(),
                    completed: None,
                    ms: None,
                    error: None,
                });
            }
            "tool_completed" => {
                if let Some((at, began)) = open.remove(call) {
                    tools[at].completed = Some(mark());
                    tools[at].ms = Some(step.at.saturating_sub(began));
                    tools[at].error = step.known.error.clone();
                }
            }
            _ => {}
        }
    }
    tools
}
