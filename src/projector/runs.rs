//! The state machine of runs (the contract's section 5), judged in log order.
//!
//! A run is open from its `agent_started` to exactly one ending. What breaks the order is refused with `run_order`, naming
//! what was expected. It asks one question at a time; an answer names its question, of several answers to one the first
//! wins, and the others get `conflict`.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;

use super::transaction::Transaction;
use super::{RunNotice, rules};
use crate::clock;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{Fields, LogEvent};
use crate::protocol::json;
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, AGENT_RESUMED, AGENT_STARTED,
    AGENT_THINKING, AGENT_WAITING, TOOL_COMPLETED, TOOL_EXECUTING,
};
use crate::store::runs::{AnswerRow, CallRow, Ending, EventRef, RunKey, RunRow, StepRow, WaitRow};
use crate::store::{Store, StoreError};

/// The runs and calls that this batch has changed.
#[derive(Default)]
pub(super) struct Runs {
    rows: HashMap<RunKey, RunRow>,
    calls: HashMap<(RunKey, String), CallRow>,
    /// By the question's seq.
    answers: HashMap<(RunKey, u64), AnswerRow>,
    /// How many runs that have not ended a user has started on a thread, by tenant, thread and user.
    open_by_user: HashMap<(String, String, String), u32>,
}

/// How the record of an event was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct HowWritten {
    pub(super) by_server: bool,
    /// The version of the rules by which it is judged.
    pub(super) rules: u16,
}

/// Why an event is not accepted: it is refused, or the store cannot be read.
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

/// How an event changes its run. The rows are as they were before the event.
pub(super) struct Transition {
    key: RunKey,
    row: RunRow,
    /// The call that begins or completes.
    call: Option<(String, CallRow)>,
    parent: Option<(RunKey, RunRow)>,
    effect: Effect,
}

impl Transition {
    /// Whose run this ends, or asks to be cancelled.
    pub(super) fn notice(&self) -> Option<RunNotice> {
        let user = || self.row.user.as_str().into();
        match self.effect {
            Effect::End(_) => Some(RunNotice::Ended { user: user() }),
            Effect::RequestCancel => Some(RunNotice::ToCancel { user: user(), run: self.key.run.as_str().into() }),
            _ => None,
        }
    }

    /// How many more runs of the thread are open with it.
    pub(super) fn opens(&self) -> i32 {
        match self.effect {
            Effect::Start => 1,
            Effect::End(_) => -1,
            _ => 0,
        }
    }

    /// The run, if this ends it.
    pub(super) fn ending(&self) -> Option<&RunKey> {
        matches!(self.effect, Effect::End(_)).then_some(&self.key)
    }
}

enum Effect {
    Start,
    /// The event changes nothing but the newest one.
    None,
    BeginCall,
    CompleteCall,
    Wait {
        expires_at: Option<u64>,
    },
    Resume,
    RequestCancel,
    End(Ending),
}

#[derive(Deserialize)]
struct StartedData<'a> {
    #[serde(borrow)]
    agent: Cow<'a, str>,
    #[serde(borrow, default)]
    parent_run: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct CallData<'a> {
    #[serde(borrow)]
    call: Cow<'a, str>,
    #[serde(borrow, default)]
    tool: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct WaitingData<'a> {
    #[serde(borrow, default)]
    expires_at: Option<Cow<'a, str>>,
}

/// `data` of `agent_failed` when the server ends a run that has stalled.
#[derive(Deserialize)]
struct StalledData {
    /// The run's newest event when the server looked.
    #[serde(default)]
    after: Option<u64>,
    /// Its deltas then.
    #[serde(default)]
    pieces: u64,
}

impl Runs {
    pub(super) fn row(&self, store: &Store, key: &RunKey) -> Result<Option<RunRow>, StoreError> {
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

    /// How the event changes its run; `None` if its kind belongs to no run.
    pub(super) fn judge(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        written: HowWritten,
    ) -> Result<Option<Transition>, Rejected> {
        let Some(run) = event.run.as_deref().filter(|_| changes_run(&event.kind)) else { return Ok(None) };
        let key = RunKey::new(&event.tenant, &event.thread, run);
        let row = self.row(store, &key)?;

        if event.kind == AGENT_STARTED {
            return self.judge_start(store, event, key, row).map(Some);
        }
        let row = row.ok_or_else(unknown)?;
        let names_question = event.kind == AGENT_RESUMED && written.rules >= rules::ANSWERS_NAME_QUESTIONS;
        if row.ended.is_some() && !names_question {
            return Err(refused_by_end(&row, event).into());
        }
        if matches!(&*event.kind, TOOL_EXECUTING | TOOL_COMPLETED) {
            return self.judge_call(store, event, key, row).map(Some);
        }
        let effect = match &*event.kind {
            AGENT_RESUMED if names_question => self.judge_answer(store, event, &key, &row)?,
            _ => judge_open(&row, event, written)?,
        };
        let parent = match (&effect, &row.parent) {
            (Effect::End(_), Some(parent)) => {
                let parent = RunKey { run: parent.clone(), ..key.clone() };
                self.row(store, &parent)?.map(|row| (parent, row))
            }
            _ => None,
        };
        Ok(Some(Transition { key, row, call: None, parent, effect }))
    }

    /// How an `agent_message` changes its run: not at all, unless the run is open.
    pub(super) fn judge_message(&self, store: &Store, key: RunKey) -> Result<Option<Transition>, StoreError> {
        let row = self.row(store, &key)?.filter(|row| row.ended.is_none());
        Ok(row.map(|row| Transition { key, row, call: None, parent: None, effect: Effect::None }))
    }

    /// A delta of one of the run's messages was accepted. `row` is as it was before.
    pub(super) fn apply_delta(&mut self, key: RunKey, row: RunRow, at: u64, tx: &mut Transaction<'_>) {
        let row = RunRow { pieces: row.pieces + 1, written_at: at, ..row };
        tx.rows.put_run_row(&key, &row);
        self.rows.insert(key, row);
    }

    fn judge_start(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        key: RunKey,
        row: Option<RunRow>,
    ) -> Result<Transition, Rejected> {
        let started = json::decode_data::<StartedData>(event.data)?;
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
            parent: parent.as_ref().map(|(key, _)| key.run.clone()),
            ..RunRow::new(started.agent.into_owned(), event.from.to_string())
        };
        Ok(Transition { key, row, call: None, parent, effect: Effect::Start })
    }

    fn judge_call(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        key: RunKey,
        row: RunRow,
    ) -> Result<Transition, Rejected> {
        let CallData { call, tool } = json::decode_data::<CallData>(event.data)?;
        let known = self.call(store, &key, &call)?;
        let (effect, known) = match (event.kind == TOOL_EXECUTING, known) {
            (true, None) => {
                let tool = tool.map(Cow::into_owned).unwrap_or_default();
                (Effect::BeginCall, CallRow { tool, begun: EventRef::default(), done: None })
            }
            (false, Some(known)) if known.done.is_none() => (Effect::CompleteCall, known),
            (true, Some(_)) => {
                let why = "the call is not new in the run: another call is expected";
                return Err(expected(why).at("data.call").into());
            }
            (false, _) => {
                let why = "the call is not executing: tool_executing is expected before";
                return Err(expected(why).at("data.call").into());
            }
        };
        Ok(Transition { key, row, call: Some((call.into_owned(), known)), parent: None, effect })
    }

    /// An answer counts for the question that it names, if that is open.
    fn judge_answer(
        &self,
        store: &Store,
        event: &LogEvent<'_>,
        key: &RunKey,
        row: &RunRow,
    ) -> Result<Effect, Rejected> {
        let Some(question) = event.parent else {
            let why = "an answer names its question: `parent` is the seq of the agent_waiting that it answers";
            return Err(Error::field("parent", why).into());
        };
        let open = row.waiting.as_ref().map(|wait| wait.since.seq);
        if open == Some(question) {
            return Ok(Effect::Resume);
        }

        let answer = match self.answers.get(&(key.clone(), question)) {
            Some(answer) => Some(answer.clone()),
            None => store.answer(key, question)?,
        };
        let refused = match (answer, open) {
            (Some(AnswerRow { event, by }), _) => {
                let why = format!("{by} has answered question {question} before, seq {}", event.seq);
                Error::new(Code::Conflict, why).at("parent")
            }
            (None, Some(open)) => {
                let why = format!("`parent` ({question}) is not the question that is open, seq {open}");
                Error::new(Code::Conflict, why).at("parent")
            }
            (None, None) if row.ended.is_some() => ended(),
            (None, None) => not_waiting(row),
        };
        Err(refused.into())
    }

    /// Writes the run as the event has changed it.
    pub(super) fn apply(
        &mut self,
        transition: Transition,
        event: &LogEvent<'_>,
        appended: EventRef,
        tx: &mut Transaction<'_>,
    ) -> Result<(), StoreError> {
        let Transition { key, row: before, mut call, parent, effect } = transition;
        let mut row = RunRow { last: appended, ..before.clone() };
        match &effect {
            Effect::Start => row.started = appended,
            Effect::None => {}
            Effect::BeginCall => {
                row.executing += 1;
                call = call.map(|(name, row)| (name, CallRow { begun: appended, ..row }));
            }
            Effect::CompleteCall => {
                row.executing = row.executing.saturating_sub(1);
                call = call.map(|(name, row)| (name, CallRow { done: Some(appended), ..row }));
            }
            Effect::Wait { expires_at } => {
                row.waiting = Some(WaitRow { since: appended, expires_at: *expires_at });
            }
            Effect::Resume => {
                if let Some(question) = row.waiting.take() {
                    let (question, by) = (question.since.seq, event.from.to_string());
                    let answer = AnswerRow { event: appended, by };
                    tx.rows.put_answer(&key, question, &answer);
                    self.answers.insert((key.clone(), question), answer);
                }
                row.resumed = Some((appended, event.from.to_string()));
            }
            Effect::RequestCancel => row.cancel = row.cancel.or_else(|| Some((appended, event.from.to_string()))),
            Effect::End(ending) => {
                row.waiting = None;
                row.ended = Some((appended, *ending));
            }
        }

        if let Some((parent, mut above)) = parent {
            match row.ended {
                None => above.children += 1,
                Some(_) => above.children = above.children.saturating_sub(1),
            }
            tx.rows.put_run_row(&parent, &above);
            self.rows.insert(parent, above);
        }

        tx.rows.put_run_event(&key, appended.seq, &step(event, appended, &effect, call.as_ref()));
        if let Some((name, call)) = call {
            tx.rows.put_call(&key, &name, &call);
            self.calls.insert((key.clone(), name), call);
        }
        match effect {
            Effect::Start => tx.rows.put_new_run(&key, &row),
            _ => tx.rows.put_run(&key, &before, &row),
        }
        if matches!(effect, Effect::Start | Effect::End(_)) {
            self.count_open(&key, &row, tx)?;
        }
        self.rows.insert(key, row);
        Ok(())
    }

    /// Counts a run that has begun or ended among those of who started it.
    fn count_open(&mut self, key: &RunKey, row: &RunRow, tx: &mut Transaction<'_>) -> Result<(), StoreError> {
        let user = (key.tenant.clone(), key.thread.clone(), row.user.clone());
        let before = match self.open_by_user.get(&user) {
            Some(count) => *count,
            None => tx.store.open_runs_by(key, &row.user)?,
        };
        let count = if row.ended.is_none() { before + 1 } else { before.saturating_sub(1) };
        tx.rows.put_open_runs_by(key, &row.user, count);
        self.open_by_user.insert(user, count);
        Ok(())
    }
}

/// What the run's page shows of an event.
fn step(event: &LogEvent<'_>, appended: EventRef, effect: &Effect, call: Option<&(String, CallRow)>) -> StepRow {
    let has_error = || Fields::parse(event.data).is_some_and(|fields| fields.raw("error").is_some());
    StepRow {
        at: appended.at,
        kind: event.kind.to_string(),
        from: event.from.to_string(),
        call: call.map(|(name, _)| name.clone()),
        tool: call.filter(|_| matches!(effect, Effect::BeginCall)).map(|(_, call)| call.tool.clone()),
        failed: matches!(effect, Effect::CompleteCall) && has_error(),
    }
}

/// Whether events of the kind change their run.
fn changes_run(kind: &str) -> bool {
    matches!(
        kind,
        AGENT_STARTED
            | AGENT_THINKING
            | TOOL_EXECUTING
            | TOOL_COMPLETED
            | AGENT_WAITING
            | AGENT_RESUMED
            | AGENT_CANCEL_REQUESTED
            | AGENT_COMPLETED
            | AGENT_FAILED
            | AGENT_CANCELLED
    )
}

/// How an event changes an open run, calls aside.
fn judge_open(row: &RunRow, event: &LogEvent<'_>, written: HowWritten) -> Result<Effect, Error> {
    let end = |ending| match row.children {
        0 => Ok(Effect::End(ending)),
        n => Err(expected(format!("{n} runs work for this one: their ends are expected first"))),
    };
    match &*event.kind {
        AGENT_WAITING if row.waiting.is_some() => Err(expected("the run waits already: agent_resumed is expected")),
        AGENT_WAITING => {
            let until = json::decode_data::<WaitingData>(event.data)?.expires_at;
            let expires_at = until.as_deref().map(|text| {
                clock::parse_rfc3339(text).ok_or_else(|| Error::field("data.expires_at", "data.expires_at is RFC 3339"))
            });
            Ok(Effect::Wait { expires_at: expires_at.transpose()? })
        }
        AGENT_RESUMED if row.waiting.is_some() => Ok(Effect::Resume),
        AGENT_RESUMED => Err(not_waiting(row)),
        AGENT_CANCEL_REQUESTED => Ok(Effect::RequestCancel),
        AGENT_COMPLETED if row.executing > 0 => {
            Err(expected(format!("{} calls are executing: tool_completed is expected first", row.executing)))
        }
        AGENT_COMPLETED => end(Ending::Completed),
        AGENT_FAILED if written.by_server => {
            let StalledData { after, pieces } = json::decode_data::<StalledData>(event.data)?;
            let follows = if written.rules >= rules::ANSWERS_NAME_QUESTIONS { event.parent } else { after };
            if follows == Some(row.last.seq) && pieces == row.pieces {
                end(Ending::Failed)
            } else {
                Err(Error::new(Code::Conflict, "the run has gone on"))
            }
        }
        AGENT_FAILED => end(Ending::Failed),
        AGENT_CANCELLED => end(Ending::Cancelled),
        _ => Ok(Effect::None),
    }
}

/// The run, if it can be written in.
pub(super) fn check_open(row: Option<RunRow>) -> Result<RunRow, Error> {
    match row {
        None => Err(unknown()),
        Some(row) if row.ended.is_some() => Err(ended()),
        Some(row) => Ok(row),
    }
}

/// Why nothing can be appended to a run that has ended.
fn refused_by_end(row: &RunRow, event: &LogEvent<'_>) -> Error {
    match (&*event.kind, &row.resumed) {
        (AGENT_RESUMED, Some(_)) => not_waiting(row),
        _ => ended(),
    }
}

fn unknown() -> Error {
    expected("the run does not exist: agent_started is expected first")
}

fn ended() -> Error {
    expected("the run has ended: nothing more is expected of it")
}

/// The run does not wait for this answer: there was one already, or nothing was asked.
fn not_waiting(row: &RunRow) -> Error {
    match &row.resumed {
        Some((mark, who)) => Error::new(Code::Conflict, format!("{who} has answered before, seq {}", mark.seq)),
        None => expected("the run does not wait: agent_waiting is expected before"),
    }
}

fn expected(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(Code::RunOrder, what).at("kind")
}
