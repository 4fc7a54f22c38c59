//! What is said of one run: as an entry of a list, and on its own page, with all that it did and what its time went to.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::clock;
use crate::edge::http::Api;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{Fields, StoredFrame};
use crate::protocol::http::{
    Cancellation, EventAt, EventBy, MessageItem, OpenQuestion, RunDetail, RunItem, RunState, StepItem, Timings,
    ToolItem,
};
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, AGENT_FAILED, AGENT_RESUMED, AGENT_STARTED, AGENT_THINKING, AGENT_WAITING, TOOL_COMPLETED,
    TOOL_EXECUTING,
};
use crate::store::messages::MessageRow;
use crate::store::runs::{Ending, EventRef, RunKey, RunRow};

/// Steps, and messages written in deltas, that a run's page holds; a run with more is cut short, and says so.
const MAX_STEPS: usize = 10_000;

pub fn no_run() -> Error {
    Error::new(Code::NotFound, "there is no such run").at("run")
}

/// An event as pages name it.
fn at(mark: EventRef) -> EventAt {
    EventAt { seq: mark.seq, at: clock::rfc3339(mark.at) }
}

fn by((mark, user): &(EventRef, String)) -> EventBy {
    EventBy { seq: mark.seq, at: clock::rfc3339(mark.at), user: user.clone() }
}

/// A run as a list has it.
pub fn item(api: &Api, key: &RunKey, row: &RunRow) -> Result<RunItem, Error> {
    let state = match &row.ended {
        None if row.waiting.is_some() => RunState::Waiting,
        None => RunState::Open,
        Some((_, Ending::Completed)) => RunState::Completed,
        Some((_, Ending::Failed)) => RunState::Failed,
        Some((_, Ending::Cancelled)) => RunState::Cancelled,
    };
    let ended = || row.ended.map(|(mark, _)| at(mark));

    let waiting = match &row.waiting {
        Some(wait) => Some(OpenQuestion {
            seq: wait.since.seq,
            at: clock::rfc3339(wait.since.at),
            expires_at: wait.expires_at.map(clock::rfc3339),
            data: RunEvent::read(api, key, wait.since.seq)?.map(|event| event.data),
        }),
        None => None,
    };

    Ok(RunItem {
        run: key.run.clone(),
        thread: key.thread.clone(),
        agent: row.agent.clone(),
        state,
        parent_run: row.parent.clone(),
        started: at(row.started),
        last: at(row.last),
        heard_at: clock::rfc3339(row.heard_at()),
        cancel: row.cancel.as_ref().map(|asked| Cancellation {
            requested: by(asked),
            acknowledged: None,
            ended: ended(),
        }),
        ended: ended(),
        executing: row.executing,
        children: row.children,
        waiting,
        resumed: row.resumed.as_ref().map(by),
    })
}

/// A run with all that it did.
pub fn detail(api: &Api, key: &RunKey) -> Result<RunDetail, Error> {
    let row = api.store.run(key)?.ok_or_else(no_run)?;
    let mut seqs = api.store.run_events(key)?;
    let mut written = written(api, key)?;
    let truncated = seqs.len().max(written.len()) > MAX_STEPS;
    seqs.truncate(MAX_STEPS);
    written.truncate(MAX_STEPS);
    let mut steps = Vec::with_capacity(seqs.len());
    for seq in seqs {
        steps.extend(RunEvent::read(api, key, seq)?);
    }

    // Read by itself: of a run that is cut short, the end is not among the steps.
    let end = match row.ended {
        Some((mark, _)) => RunEvent::read(api, key, mark.seq)?,
        None => None,
    };
    let ending = end.as_ref().map(RunEvent::fields).unwrap_or_default();
    let failed = end.as_ref().filter(|end| end.kind == AGENT_FAILED);

    let mut run = item(api, key, &row)?;
    if let Some(cancel) = &mut run.cancel {
        let asked = cancel.requested.seq;
        let answer = steps.iter().find(|step| step.seq > asked && !step.is_from_people());
        cancel.acknowledged = answer.map(|step| at(step.mark()));
    }
    Ok(RunDetail {
        run,
        timings: timings(&row, &steps, &written),
        tools: tools(&steps),
        messages: written.into_iter().map(message).collect(),
        output: ending.raw("output").map(RawValue::to_owned),
        usage: ending.raw("usage").map(RawValue::to_owned),
        error: failed.and_then(|end| serde_json::from_str(end.data.get()).ok()),
        steps: steps.iter().enumerate().map(|(i, step)| step.item(steps.get(i + 1))).collect(),
        truncated,
    })
}

/// A run's event.
struct RunEvent {
    seq: u64,
    /// Milliseconds.
    at: u64,
    kind: String,
    from: String,
    data: Box<RawValue>,
    call: Option<String>,
    tool: Option<String>,
}

impl RunEvent {
    fn read(api: &Api, key: &RunKey, seq: u64) -> Result<Option<RunEvent>, Error> {
        let Some(event) = api.store.event(&key.tenant, &key.thread, seq)? else { return Ok(None) };
        let Some(frame) = StoredFrame::parse(&event.frame) else { return Ok(None) };
        let fields = frame.fields();
        Ok(Some(RunEvent {
            seq,
            at: clock::parse_rfc3339(&frame.at).unwrap_or(0),
            call: fields.string("call"),
            tool: fields.string("tool"),
            data: frame.data.to_owned(),
            kind: frame.kind.into_owned(),
            from: frame.from.into_owned(),
        }))
    }

    fn fields(&self) -> Fields<'_> {
        Fields::parse(&self.data).unwrap_or_default()
    }

    fn mark(&self) -> EventRef {
        EventRef { seq: self.seq, at: self.at }
    }

    /// Written by a person, about the run; everything else is the agent's.
    fn is_from_people(&self) -> bool {
        matches!(&*self.kind, AGENT_RESUMED | AGENT_CANCEL_REQUESTED)
    }

    fn item(&self, next: Option<&RunEvent>) -> StepItem {
        StepItem {
            seq: self.seq,
            kind: self.kind.clone(),
            at: clock::rfc3339(self.at),
            from: self.from.clone(),
            ms: next.map(|next| next.at.saturating_sub(self.at)),
            call: self.call.clone(),
            tool: self.tool.clone(),
        }
    }
}

/// Messages that were written in deltas, by when they were begun.
fn written(api: &Api, key: &RunKey) -> Result<Vec<(String, MessageRow)>, Error> {
    let rows = api.store.messages_of(key)?;
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

fn timings(row: &RunRow, steps: &[RunEvent], written: &[(String, MessageRow)]) -> Timings {
    let end = row.ended.map_or(row.heard_at(), |(mark, _)| mark.at);
    let mut begun: Vec<u64> = written.iter().map(|(_, row)| row.begun_at).collect();
    begun.sort_unstable();

    let mut timings = Timings { total_ms: end.saturating_sub(row.started.at), ..Timings::default() };
    for (i, step) in steps.iter().enumerate() {
        let later = &steps[i + 1..];
        // A wish to cancel is no work of the agent's.
        let next = later.iter().find(|step| !step.is_from_people()).map_or(end, |next| next.at);
        let answered = later.iter().find(|step| step.kind == AGENT_RESUMED).map_or(end, |next| next.at);
        // Thinking ends where writing begins, and the first delta of a message is no event.
        let writes = begun.get(begun.partition_point(|at| *at < step.at));
        let works = writes.map_or(next, |at| next.min(*at));
        match &*step.kind {
            AGENT_STARTED => timings.queue_ms += works.saturating_sub(step.at),
            AGENT_THINKING | TOOL_COMPLETED | AGENT_RESUMED => timings.thinking_ms += works.saturating_sub(step.at),
            AGENT_WAITING => timings.waiting_ms += answered.saturating_sub(step.at),
            _ => {}
        }
    }
    timings.tool_ms = tools(steps).iter().filter_map(|tool| tool.ms).sum();
    timings.streaming_ms = written.iter().map(|(_, row)| writing_ms(row)).sum();
    timings
}

fn tools(steps: &[RunEvent]) -> Vec<ToolItem> {
    let mut tools: Vec<ToolItem> = Vec::new();
    // Calls that have not completed: where they stand in `tools`, and since when they execute.
    let mut open: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for step in steps {
        let Some(call) = step.call.as_deref() else { continue };
        match &*step.kind {
            TOOL_EXECUTING => {
                open.insert(call, (tools.len(), step.at));
                tools.push(ToolItem {
                    call: call.to_owned(),
                    tool: step.tool.clone().unwrap_or_default(),
                    began: at(step.mark()),
                    completed: None,
                    ms: None,
                    error: None,
                });
            }
            TOOL_COMPLETED => {
                if let Some((i, began)) = open.remove(call) {
                    tools[i].completed = Some(at(step.mark()));
                    tools[i].ms = Some(step.at.saturating_sub(began));
                    tools[i].error = step.fields().raw("error").map(RawValue::to_owned);
                }
            }
            _ => {}
        }
    }
    tools
}
