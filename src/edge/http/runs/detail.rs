//! What is said of one run: as an entry of a list, and on its own page, with all that it did and what its time went to.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::clock;
use crate::edge::http::Api;
use crate::edge::http::meter::Meter;
use crate::edge::http::page::{COPIES, EVENT_BYTES, PAGE_BYTES};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{Fields, StoredFrame};
use crate::protocol::http::{
    Cancellation, EventAt, EventBy, MessageItem, OpenQuestion, RunDetail, RunItem, RunState, StepItem, Timings,
    ToolItem,
};
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, AGENT_RESUMED, AGENT_STARTED, AGENT_THINKING, AGENT_WAITING, TOOL_COMPLETED, TOOL_EXECUTING,
};
use crate::store::messages::MessageRow;
use crate::store::runs::{Ending, EventRef, RunKey, RunRow, StepRow};

/// Steps, and messages written in deltas, that a run's page holds at most; a run with more is cut short, and says so. All
/// together have [`PAGE_BYTES`] at most.
const MAX_STEPS: usize = 10_000;
/// About the size of a step, or of a message, without its names.
const STEP_BYTES: usize = 160;
/// About the size of a run in a list without its names.
const ITEM_BYTES: usize = 512;
/// What the page of a run may hold in memory while it is made: its steps and messages, the run's end and its question.
pub const MEMORY: usize = PAGE_BYTES * COPIES + 4 * EVENT_BYTES;

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
            data: data_of(api, key, wait.since.seq)?,
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

/// The same, and about how many bytes it has.
pub fn sized_item(api: &Api, key: &RunKey, row: &RunRow) -> Result<(RunItem, usize), Error> {
    let item = item(api, key, row)?;
    let question = item.waiting.as_ref().and_then(|waiting| waiting.data.as_ref()).map_or(0, |data| data.get().len());
    let names = item.run.len() + item.thread.len() + item.agent.len() + item.parent_run.as_ref().map_or(0, String::len);
    Ok((item, ITEM_BYTES + names + question))
}

/// A run with all that it did, as much as a page holds.
pub fn detail(api: &Api, key: &RunKey, meter: &mut Meter) -> Result<RunDetail, Error> {
    let row = api.store.run(key)?.ok_or_else(no_run)?;
    let mut room = PageBudget { bytes: PAGE_BYTES, meter };
    let (steps, more_steps) = steps(api, key, &mut room)?;
    let (written, more_messages) = written(api, key, &mut room)?;

    // Read by itself: of a run that is cut short, the end is not among the steps.
    let end = match row.ended {
        Some((mark, _)) => data_of(api, key, mark.seq)?,
        None => None,
    };
    let ending = end.as_deref().and_then(Fields::parse).unwrap_or_default();
    let failed = end.as_ref().filter(|_| matches!(row.ended, Some((_, Ending::Failed))));

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
        error: failed.and_then(|end| serde_json::from_str(end.get()).ok()),
        steps: steps.iter().enumerate().map(|(i, step)| step.item(steps.get(i + 1))).collect(),
        truncated: more_steps || more_messages,
    })
}

/// What the page may still hold.
struct PageBudget<'a> {
    bytes: usize,
    meter: &'a mut Meter,
}

impl PageBudget<'_> {
    /// Counts what the page holds in addition; `false` if it does not fit.
    fn take(&mut self, bytes: usize) -> Result<bool, Error> {
        let Some(left) = self.bytes.checked_sub(bytes) else { return Ok(false) };
        self.bytes = left;
        self.meter.add(bytes * COPIES)?;
        Ok(true)
    }
}

/// `data` of one of the run's events.
fn data_of(api: &Api, key: &RunKey, seq: u64) -> Result<Option<Box<RawValue>>, Error> {
    let Some(event) = api.store.event(&key.tenant, &key.thread, seq)? else { return Ok(None) };
    Ok(StoredFrame::parse(&event.frame).map(|frame| frame.data.to_owned()))
}

/// A run's event.
struct RunStep {
    seq: u64,
    row: StepRow,
    /// What a call failed with.
    error: Option<Box<RawValue>>,
}

/// The run's steps from its beginning on, as many as there is room for; and whether there are more.
fn steps(api: &Api, key: &RunKey, room: &mut PageBudget<'_>) -> Result<(Vec<RunStep>, bool), Error> {
    let mut steps = Vec::new();
    for step in api.store.run_events(key) {
        let (seq, row) = step?;
        let error = match row.failed {
            true => data_of(api, key, seq)?.and_then(|data| Fields::parse(&data)?.raw("error").map(RawValue::to_owned)),
            false => None,
        };
        let step = RunStep { seq, row, error };
        if steps.len() == MAX_STEPS || !room.take(step.bytes())? {
            return Ok((steps, true));
        }
        steps.push(step);
    }
    Ok((steps, false))
}

impl RunStep {
    fn mark(&self) -> EventRef {
        EventRef { seq: self.seq, at: self.row.at }
    }

    /// About what the page has of it: a step, and of a call an entry among the tools.
    fn bytes(&self) -> usize {
        let StepRow { kind, from, call, tool, .. } = &self.row;
        let names = [call, tool].into_iter().flatten().map(|name| name.len() * 2).sum::<usize>();
        STEP_BYTES + kind.len() + from.len() + names + self.error.as_ref().map_or(0, |error| error.get().len())
    }

    /// Written by a person, about the run; everything else is the agent's.
    fn is_from_people(&self) -> bool {
        matches!(&*self.row.kind, AGENT_RESUMED | AGENT_CANCEL_REQUESTED)
    }

    fn item(&self, next: Option<&RunStep>) -> StepItem {
        StepItem {
            seq: self.seq,
            kind: self.row.kind.clone(),
            at: clock::rfc3339(self.row.at),
            from: self.row.from.clone(),
            ms: next.map(|next| next.row.at.saturating_sub(self.row.at)),
            call: self.row.call.clone(),
            tool: self.row.tool.clone(),
        }
    }
}

/// Messages that were written in deltas, by when they were begun, as many as there is room for; and whether there are more.
fn written(api: &Api, key: &RunKey, room: &mut PageBudget<'_>) -> Result<(Vec<(String, MessageRow)>, bool), Error> {
    let mut written = Vec::new();
    for message in api.store.messages_of(key) {
        let (message, row) = message?;
        if written.len() == MAX_STEPS || !room.take(STEP_BYTES + message.len() + row.from.len())? {
            return Ok((written, true));
        }
        written.push((message, row));
    }
    Ok((written, false))
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

fn timings(row: &RunRow, steps: &[RunStep], written: &[(String, MessageRow)]) -> Timings {
    let end = row.ended.map_or(row.heard_at(), |(mark, _)| mark.at);
    let mut begun: Vec<u64> = written.iter().map(|(_, row)| row.begun_at).collect();
    begun.sort_unstable();

    let mut timings = Timings { total_ms: end.saturating_sub(row.started.at), ..Timings::default() };
    // From the end, so that of each step it is known what comes next. A wish to cancel is no work of the agent's.
    let (mut next, mut answered) = (end, end);
    for step in steps.iter().rev() {
        let at = step.row.at;
        // Thinking ends where writing begins, and the first delta of a message is no event.
        let writes = begun.get(begun.partition_point(|begun| *begun < at));
        let works = writes.map_or(next, |begun| next.min(*begun));
        match &*step.row.kind {
            AGENT_STARTED => timings.queue_ms += works.saturating_sub(at),
            AGENT_THINKING | TOOL_COMPLETED | AGENT_RESUMED => timings.thinking_ms += works.saturating_sub(at),
            AGENT_WAITING => timings.waiting_ms += answered.saturating_sub(at),
            _ => {}
        }
        if step.row.kind == AGENT_RESUMED {
            answered = at;
        }
        if !step.is_from_people() {
            next = at;
        }
    }
    timings.tool_ms = tools(steps).iter().filter_map(|tool| tool.ms).sum();
    timings.streaming_ms = written.iter().map(|(_, row)| writing_ms(row)).sum();
    timings
}

fn tools(steps: &[RunStep]) -> Vec<ToolItem> {
    let mut tools: Vec<ToolItem> = Vec::new();
    // Calls that have not completed: where they stand in `tools`, and since when they execute.
    let mut open: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for step in steps {
        let Some(call) = step.row.call.as_deref() else { continue };
        match &*step.row.kind {
            TOOL_EXECUTING => {
                open.insert(call, (tools.len(), step.row.at));
                tools.push(ToolItem {
                    call: call.to_owned(),
                    tool: step.row.tool.clone().unwrap_or_default(),
                    began: at(step.mark()),
                    completed: None,
                    ms: None,
                    error: None,
                });
            }
            TOOL_COMPLETED => {
                if let Some((i, began)) = open.remove(call) {
                    tools[i].completed = Some(at(step.mark()));
                    tools[i].ms = Some(step.row.at.saturating_sub(began));
                    tools[i].error = step.error.clone();
                }
            }
            _ => {}
        }
    }
    tools
}
