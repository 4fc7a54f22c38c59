//! The state machine of runs (the contract's section 5), judged in log order.
//!
//! A run is open from its `agent_started` to exactly one ending. What breaks the order is refused with `run_order`, naming
//! what was expected; of several answers to one question the first wins, and the others get `conflict`.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;

use super::data;
use crate::clock;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::LogEvent;
use crate::store::runs::{CallRow, Ending, Mark, RunKey, RunRow, WaitRow};
use crate::store::{Batch, Store, StoreError};

/// What the batch in hand has changed, which the store does not show yet.
#[derive(Default)]
pub(super) struct Runs {
    rows: HashMap<RunKey, RunRow>,
    calls: HashMap<(RunKey, String), CallRow>,
}

/// Why an event is not taken: it is refused, or it cannot be judged now.
pub(super) enum Rejected {
    Refused(Error),
    Store(StoreError),
}

impl From<Error> for Rejected {
    fn from(error: Error) -> Rejected {
        Rejected::Refused(error)
    }
}

impl From<StoreError> for Rejected {
    fn from(error: StoreError) -> Rejected {
        Rejected::Store(error)
    }
}

/// What an event makes of its run, once it has its seq.
pub(super) struct Step {
    key: RunKey,
    row: RunRow,
    /// The call that begins or completes.
    call: Option<(String, CallRow)>,
    parent: Option<(RunKey, RunRow)>,
    does: Does,
}

impl Step {
    /// The run, if this ends it.
    pub(super) fn ends(&self) -> Option<&RunKey> {
        matches!(self.does, Does::End(_)).then_some(&self.key)
    }
}

enum Does {
    Start,
    GoOn,
    Begin,
    Complete,
    Wait { expires_at: Option<u64> },
    Resume,
    AskToCancel,
    End(Ending),
}

#[derive(Deserialize)]
struct Started<'a> {
    #[serde(borrow)]
    agent: Cow<'a, str>,
    #[serde(borrow, default)]
    parent_run: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Call<'a> {
    #[serde(borrow)]
    call: Cow<'a, str>,
    #[serde(borrow, default)]
    tool: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Waiting<'a> {
    #[serde(borrow, default)]
    expires_at: Option<Cow<'a, str>>,
}

/// What the server says when it ends a run that came to nothing.
#[derive(Deserialize)]
struct Stalled {
    /// The run's newest event by then.
    #[serde(default)]
    after: Option<u64>,
    /// Its pieces by then.
    #[serde(default)]
    pieces: u64,
}

impl Runs {
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.calls.clear();
    }

    fn row(&self, store: &Store, key: &RunKey) -> Result<Option<RunRow>, StoreError> {
        match self.rows.get(key) {
            Some(row) => Ok(Some(row.clone())),
            None => store.run(key),
        }
    }

    fn call(&self, store: &Store, key: &RunKey, call: &str) -> Result<Option<CallRow>, StoreError> {
        match self.calls.get(&(key.clone(), call.to_owned())) {
            Some(row) => Ok(Some(row.clone())),
            None => store.call(key, call),
        }
    }

    /// What the event makes of its run; `None` if it is no agent's event.
    pub(super) fn judge(&self, store: &Store, event: &LogEvent<'_>, by_server: bool) -> Result<Option<Step>, Rejected> {
        let Some(run) = event.run.as_deref().filter(|_| is_agents(&event.kind)) else { return Ok(None) };
        let key = RunKey::new(&event.tenant, &event.thread, run);
        let row = self.row(store, &key)?;
        if event.kind == "agent_started" {
            return self.judge_start(store, event, key, row).map(Some);
        }
        let row = row.ok_or_else(unknown)?;
        if row.ended.is_some() {
            return Err(over(&row, event).into());
        }
        let (does, call) = match &*event.kind {
            "tool_executing" | "tool_completed" => {
                let (does, call) = self.judge_call(store, event, &key)?;
                (does, Some(call))
            }
            _ => (judge_open(&row, event, by_server)?, None),
        };
        let parent = match (&does, &row.parent) {
            (Does::End(_), Some(parent)) => {
                let parent = RunKey { run: parent.clone(), ..key.clone() };
                self.row(store, &parent)?.map(|row| (parent, row))
            }
            _ => None,
        };
        Ok(Some(Step { key, row, call, parent, does }))
    }

    /// A message of the run's, if the run is open: one that is not stands for itself.
    pub(super) fn judge_message(&self, store: &Store, key: RunKey) -> Result<Option<Step>, StoreError> {
        let row = self.row(store, &key)?.filter(|row| row.ended.is_none());
        Ok(row.map(|row| Step { key, row, call: None, parent: None, does: Does::GoOn }))
    }

    /// Whether a piece of a message may come now, and how many came before.
    pub(super) fn judge_delta(&self, store: &Store, key: &RunKey) -> Result<Result<u64, Error>, StoreError> {
        Ok(match self.row(store, key)? {
            None => Err(unknown()),
            Some(row) if row.ended.is_some() => Err(ended()),
            Some(row) => Ok(row.pieces),
        })
    }

    /// A piece of a message has come.
    pub(super) fn written(
        &mut self,
        store: &Store,
        key: RunKey,
        at: u64,
        batch: &mut Batch<'_>,
    ) -> Result<(), StoreError> {
        let Some(mut row) = self.row(store, &key)? else { return Ok(()) };
        row.pieces += 1;
        row.written_at = at;
        batch.put_run_row(&key, &row);
        self.rows.insert(key, row);
        Ok(())
    }

    fn judge_start(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        key: RunKey,
        row: Option<RunRow>,
    ) -> Result<Step, Rejected> {
        let started = data::<Started>(event)?;
        if row.is_some() {
            return Err(expected("the run exists already: another run is expected").into());
        }
        let parent = match started.parent_run.as_deref() {
            None => None,
            Some(run) => {
                let parent = RunKey { run: run.to_owned(), ..key.clone() };
                let above = self.row(store, &parent)?.filter(|row| row.ended.is_none());
                let why = "the parent run is not open on this thread: one that is open is expected";
                Some((parent, above.ok_or_else(|| expected(why).at("data.parent_run"))?))
            }
        };
        let row = RunRow {
            agent: started.agent.into_owned(),
            parent: parent.as_ref().map(|(key, _)| key.run.clone()),
            started: Mark::default(),
            last: Mark::default(),
            ended: None,
            executing: 0,
            children: 0,
            waiting: None,
            resumed: None,
            cancel: None,
            pieces: 0,
            written_at: 0,
        };
        Ok(Step { key, row, call: None, parent, does: Does::Start })
    }

    fn judge_call(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        key: &RunKey,
    ) -> Result<(Does, (String, CallRow)), Rejected> {
        let named = data::<Call>(event)?;
        let known = self.call(store, key, &named.call)?;
        match (event.kind == "tool_executing", known) {
            (true, None) => {
                let tool = named.tool.map(Cow::into_owned).unwrap_or_default();
                Ok((Does::Begin, (named.call.into_owned(), CallRow { tool, begun: Mark::default(), done: None })))
            }
            (false, Some(call)) if call.done.is_none() => Ok((Does::Complete, (named.call.into_owned(), call))),
            (true, Some(_)) => {
                Err(expected("the call is not new in the run: another call is expected").at("data.call").into())
            }
            (false, _) => {
                Err(expected("the call is not executing: tool_executing is expected before").at("data.call").into())
            }
        }
    }

    /// Writes what the event made of its run.
    pub(super) fn apply(&mut self, step: Step, event: &LogEvent<'_>, mark: Mark, batch: &mut Batch<'_>) {
        let Step { key, mut row, call, parent, does } = step;
        row.last = mark;
        let mut call = call;
        match does {
            Does::Start => row.started = mark,
            Does::GoOn => {}
            Does::Begin => {
                row.executing += 1;
                call = call.map(|(name, row)| (name, CallRow { begun: mark, ..row }));
            }
            Does::Complete => {
                row.executing = row.executing.saturating_sub(1);
                call = call.map(|(name, row)| (name, CallRow { done: Some(mark), ..row }));
            }
            Does::Wait { expires_at } => row.waiting = Some(WaitRow { since: mark, expires_at }),
            Does::Resume => {
                row.waiting = None;
                row.resumed = Some((mark, event.from.to_string()));
            }
            Does::AskToCancel => row.cancel = row.cancel.or_else(|| Some((mark, event.from.to_string()))),
            Does::End(ending) => {
                row.waiting = None;
                row.ended = Some((mark, ending));
            }
        }
        if let Some((parent, mut above)) = parent {
            match row.ended {
                None => above.children += 1,
                Some(_) => above.children = above.children.saturating_sub(1),
            }
            batch.put_run(&parent, &above);
            self.rows.insert(parent, above);
        }
        if let Some((name, call)) = call {
            batch.put_call(&key, &name, &call);
            self.calls.insert((key.clone(), name), call);
        }
        batch.put_run_event(&key, mark.seq);
        batch.put_run(&key, &row);
        self.rows.insert(key, row);
    }
}

/// Whether the kind moves a run.
fn is_agents(kind: &str) -> bool {
    matches!(
        kind,
        "agent_started"
            | "agent_thinking"
            | "tool_executing"
            | "tool_completed"
            | "agent_waiting"
            | "agent_resumed"
            | "agent_cancel_requested"
            | "agent_completed"
            | "agent_failed"
            | "agent_cancelled"
    )
}

/// What an event makes of an open run, calls aside.
fn judge_open(row: &RunRow, event: &LogEvent<'_>, by_server: bool) -> Result<Does, Error> {
    let end = |ending| match row.children {
        0 => Ok(Does::End(ending)),
        n => Err(expected(format!("{n} runs work for this one: their ends are expected first"))),
    };
    match &*event.kind {
        "agent_waiting" if row.waiting.is_some() => Err(expected("the run waits already: agent_resumed is expected")),
        "agent_waiting" => {
            let until = data::<Waiting>(event)?.expires_at;
            let expires_at = until.as_deref().map(|text| {
                clock::parse_rfc3339(text).ok_or_else(|| Error::field("data.expires_at", "data.expires_at is RFC 3339"))
            });
            Ok(Does::Wait { expires_at: expires_at.transpose()? })
        }
        "agent_resumed" if row.waiting.is_some() => Ok(Does::Resume),
        "agent_resumed" => Err(not_waiting(row)),
        "agent_cancel_requested" => Ok(Does::AskToCancel),
        "agent_completed" if row.executing > 0 => {
            Err(expected(format!("{} calls are executing: tool_completed is expected first", row.executing)))
        }
        "agent_completed" => end(Ending::Completed),
        "agent_failed" if by_server => match data::<Stalled>(event)? {
            Stalled { after: Some(seq), pieces } if seq == row.last.seq && pieces == row.pieces => end(Ending::Failed),
            _ => Err(Error::new(Code::Conflict, "the run has gone on")),
        },
        "agent_failed" => end(Ending::Failed),
        "agent_cancelled" => end(Ending::Cancelled),
        _ => Ok(Does::GoOn),
    }
}

fn over(row: &RunRow, event: &LogEvent<'_>) -> Error {
    match (&*event.kind, &row.resumed) {
        ("agent_resumed", Some(_)) => not_waiting(row),
        _ => ended(),
    }
}

fn unknown() -> Error {
    expected("the run does not exist: agent_started is expected first")
}

fn ended() -> Error {
    expected("the run has ended: nothing more is expected of it")
}

/// Nobody waits for the answer: somebody else has given it, or nobody has asked.
fn not_waiting(row: &RunRow) -> Error {
    match &row.resumed {
        Some((mark, who)) => Error::new(Code::Conflict, format!("{who} has answered before, seq {}", mark.seq)),
        None => expected("the run does not wait: agent_waiting is expected before"),
    }
}

fn expected(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(Code::RunOrder, what).at("kind")
}
