//! A thread's runs in the form of AG-UI: Weft's event frames in, AG-UI's events out, as JSON. Pure.
//!
//! AG-UI knows one run at a time, and nothing outside of one. What it calls a run is here an *active period* of a run: from
//! `agent_started` or `agent_resumed` to `agent_waiting` or the run's end. Of the runs that are active on the thread, the one
//! whose period began first is emitted; when the period is over, the next one. For runs that are not emitted, open state is
//! recorded: calls and thinking, but not the texts of messages that are being written. Those are asked for when they are
//! needed ([`Next::Rejoin`]). A message that is begun anew goes on as another message, which replaces the one before: AG-UI
//! cannot take back text. So what is emitted at any seq follows from the thread alone, wherever a reader begins.
//!
//! Kept are the names of open runs, how far the messages that were emitted have come, and which events are to be emitted once
//! a run is: calls that execute, and messages from between two runs. All of it is bounded, and nothing of it is text: that is
//! looked up in the thread when it is emitted ([`Lookup`]).

mod emitter;
mod run;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::clock;
use crate::protocol::agui::{AguiEvent, Interrupt, Outcome, PROTOCOL};
use crate::protocol::error::Error;
use crate::protocol::event::{StoredFrame, without_type};
use crate::protocol::json::{raw_object, with_field};
use crate::protocol::kinds::{
    AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, AGENT_MESSAGE, AGENT_RESUMED, AGENT_STARTED, AGENT_THINKING,
    AGENT_WAITING, DeltaData, SYSTEM_MESSAGE, TOOL_COMPLETED, TOOL_EXECUTING, USER_MESSAGE,
};
use emitter::{Emitter, object, text_id, text_id_before};
use run::{Change, KeptMessage, KeptMessages, OpenCall, OpenRun, PartialMessage, TextMessage, replacing};

/// Open runs that are recorded; those beyond are left out.
const RUNS: usize = 1_024;
/// Messages of the emitted run that are written at a time; others are emitted when they are closed.
const WRITING: usize = 256;
/// The same, with those of runs that were emitted before and wait.
const ALL_WRITING: usize = 1_024;
/// Calls of all runs that are recorded; those beyond are not emitted with their run.
const CALLS: usize = 4_096;

/// What comes after an event.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The next event.
    Continue,
    /// Another run is emitted from now on: the texts of messages that are being written are needed once more.
    Rejoin,
    /// The run that was asked for waits for a person, since this seq.
    Waiting { seq: u64 },
    /// The run that was asked for has ended.
    Ended,
}

/// An event of the thread.
pub struct ThreadEvent {
    pub frame: String,
    /// Its record shows a right beyond membership: without one its writer speaks as a user.
    pub privileged: bool,
}

/// What is looked up in the thread.
pub trait Lookup {
    /// An event by its seq.
    fn event(&self, seq: u64) -> Option<ThreadEvent>;
    /// How often a message was begun anew that is closed by now.
    fn restarts(&self, run: &str, message: &str) -> u32;
}

/// Of a thread that is not known.
impl Lookup for () {
    fn event(&self, _seq: u64) -> Option<ThreadEvent> {
        None
    }

    fn restarts(&self, _run: &str, _message: &str) -> u32 {
        0
    }
}

/// What AG-UI's client has of a thread.
pub struct Mapper {
    /// As the client calls it.
    thread: String,
    /// The run that was asked for.
    only: Option<String>,
    /// Up to this seq events are recorded and nothing is emitted.
    silent_to: Option<u64>,
    /// The client has what was before, and needs no calls opened again.
    resumes: bool,
    runs: BTreeMap<String, OpenRun>,
    /// The run that is emitted.
    current: Option<String>,
    /// What is emitted with the next run.
    kept: KeptMessages,
    /// The last event was `RUN_ERROR`, after which only a run may begin.
    failed: bool,
}

impl Mapper {
    /// Emits what comes after `silent_to`; events up to it, if they come, are only recorded.
    pub fn new(thread: &str, only: Option<String>, silent_to: Option<u64>, resumes: bool) -> Mapper {
        Mapper {
            thread: thread.to_owned(),
            only,
            silent_to,
            resumes,
            runs: BTreeMap::new(),
            current: None,
            kept: KeptMessages::default(),
            failed: false,
        }
    }

    /// The AG-UI events of an event frame, each as JSON. `restarts` is how often a delta's message was begun anew before it.
    pub fn event(&mut self, frame: &str, restarts: u32, thread: &dyn Lookup, lines: &mut Vec<String>) -> Next {
        let Some(it) = StoredFrame::parse(frame) else { return Next::Continue };
        let privileged = |seq| thread.event(seq).is_some_and(|event| event.privileged);
        let out = &mut Emitter { lines, at: clock::parse_rfc3339(&it.at), thread };
        let Some(seq) = it.seq else {
            self.on_delta(&it, restarts, out);
            return Next::Continue;
        };
        if let Some(to) = self.silent_to {
            self.record(seq, &it);
            if seq >= to {
                self.begin_emitting(out);
            }
            return Next::Continue;
        }

        match &*it.kind {
            AGENT_STARTED | AGENT_RESUMED => return self.on_active(seq, &it, out),
            AGENT_WAITING | AGENT_COMPLETED | AGENT_FAILED | AGENT_CANCELLED => return self.on_inactive(seq, &it, out),
            USER_MESSAGE => self.on_message(seq, &it, "user", out),
            SYSTEM_MESSAGE => self.on_message(seq, &it, if privileged(seq) { "system" } else { "user" }, out),
            AGENT_MESSAGE => self.on_message(seq, &it, if privileged(seq) { "assistant" } else { "user" }, out),
            _ => self.on_other(seq, &it, frame, out),
        }
        Next::Continue
    }

    /// About how many bytes of text an event may have emitted beside its own: those that wait for a run.
    pub fn waiting_bytes(&self) -> usize {
        self.kept.bytes() + self.runs.values().map(OpenRun::unsent_bytes).max().unwrap_or(0)
    }

    /// The event that ends the stream because of an error; none if there was one already.
    pub fn error(&mut self, error: &Error) -> Option<String> {
        if std::mem::replace(&mut self.failed, true) {
            return None;
        }
        let mut lines = Vec::new();
        let mut out = Emitter { lines: &mut lines, at: None, thread: &() };
        out.emit(&AguiEvent::RunError { message: &error.message, code: error.code.as_str() });
        lines.pop()
    }

    fn is_wanted(&self, run: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == run)
    }

    /// The run whose active period began first.
    fn oldest_active(&self) -> Option<String> {
        let active = self.runs.iter().filter_map(|(name, run)| Some((run.active_since?, name)));
        active.min().map(|(_, name)| name.clone())
    }

    /// Records what an event changes in its run, and emits nothing.
    fn record(&mut self, seq: u64, it: &StoredFrame<'_>) {
        let Some(name) = it.run.as_deref() else { return };
        if matches!(&*it.kind, AGENT_STARTED | AGENT_RESUMED) {
            self.activate(seq, name, it);
        }
        let has_room = self.has_room_for_calls();
        let Some(run) = self.runs.get_mut(name) else { return };
        run.thinking = (it.kind == AGENT_THINKING).then(|| it.event.to_string());
        match &*it.kind {
            TOOL_EXECUTING if has_room => {
                if let Some(call) = OpenCall::of(seq, it) {
                    run.add_call(call);
                }
            }
            TOOL_COMPLETED => run.complete_call(it),
            AGENT_MESSAGE => {
                if let Some(closed) = it.fields().string("message") {
                    run.writing.remove(&closed);
                }
            }
            AGENT_WAITING => run.active_since = None,
            AGENT_COMPLETED | AGENT_FAILED | AGENT_CANCELLED => drop(self.runs.remove(name)),
            _ => {}
        }
    }

    /// Records that an active period begins; `false` if the run is none that is followed.
    fn activate(&mut self, seq: u64, name: &str, it: &StoredFrame<'_>) -> bool {
        let known = self.runs.contains_key(name);
        if !self.is_wanted(name) || (!known && self.runs.len() >= RUNS) {
            return false;
        }
        let run = self.runs.entry(name.to_owned()).or_default();
        run.active_since = Some(seq);
        run.thinking = None;
        if it.kind == AGENT_STARTED {
            run.parent = it.fields().string("parent_run");
        }
        true
    }

    /// All events that the client has, or does not want, are recorded: from here on events are emitted.
    fn begin_emitting(&mut self, out: &mut Emitter<'_>) {
        self.silent_to = None;
        let Some(name) = self.oldest_active() else { return };
        if self.resumes
            && let Some(run) = self.runs.get_mut(&name)
        {
            run.calls.iter_mut().for_each(|call| call.sent = true);
        }
        self.enter_run(&name, None, out);
    }

    /// Emits a run from now on, with what is open in it.
    fn enter_run(&mut self, name: &str, metadata: Option<&RawValue>, out: &mut Emitter<'_>) {
        self.emit_run_started(name, metadata, out);
        let Some(run) = self.runs.get_mut(name) else { return };
        run.calls.iter_mut().for_each(|call| out.open_call(name, call));
    }

    fn has_room_for_calls(&self) -> bool {
        self.runs.values().map(|run| run.calls.len()).sum::<usize>() < CALLS
    }

    /// Emits that a run begins, with the messages that were kept for it.
    fn emit_run_started(&mut self, name: &str, metadata: Option<&RawValue>, out: &mut Emitter<'_>) {
        let run = self.runs.get(name);
        out.emit(&AguiEvent::RunStarted {
            thread_id: &self.thread,
            run_id: name,
            protocol_version: PROTOCOL,
            parent_run_id: run.and_then(|run| run.parent.as_deref()),
            metadata: metadata.and_then(object),
        });
        for kept in self.kept.take() {
            if let Some(message) = out.thread.event(kept.seq).and_then(|event| kept.message(&event.frame)) {
                out.message(&message);
            }
        }
        if let Some(thinking) = run.and_then(|run| run.thinking.as_deref()) {
            out.begin_thinking(thinking);
        }
        self.current = Some(name.to_owned());
        self.failed = false;
    }

    /// `agent_started` or `agent_resumed`.
    fn on_active(&mut self, seq: u64, it: &StoredFrame<'_>, out: &mut Emitter<'_>) -> Next {
        let Some(name) = it.run.as_deref() else { return Next::Continue };
        if !self.activate(seq, name, it) || self.current.is_some() {
            return Next::Continue;
        }
        self.enter_run(name, Some(it.data), out);
        // While it waited, messages of it may have been written that were not emitted.
        if it.kind == AGENT_RESUMED { Next::Rejoin } else { Next::Continue }
    }

    /// A run waits or ends.
    fn on_inactive(&mut self, seq: u64, it: &StoredFrame<'_>, out: &mut Emitter<'_>) -> Next {
        let Some(name) = it.run.as_deref().filter(|name| self.is_wanted(name)) else { return Next::Continue };

        // A run that ends while it waits is emitted as one that does nothing else.
        if self.current.is_none() {
            self.emit_run_started(name, None, out);
        }
        let was_current = self.current.as_deref() == Some(name);
        if was_current {
            self.close_open_parts(name, out);
            self.emit_run_end(name, it, out);
            self.current = None;
        }

        let waits = it.kind == AGENT_WAITING;
        match self.runs.get_mut(name) {
            Some(run) if waits => run.active_since = None,
            _ => drop(self.runs.remove(name)),
        }

        if !was_current {
            return Next::Continue;
        }
        if self.only.is_some() {
            return if waits { Next::Waiting { seq } } else { Next::Ended };
        }
        match self.oldest_active() {
            None => Next::Continue,
            Some(name) => {
                self.enter_run(&name, None, out);
                Next::Rejoin
            }
        }
    }

    /// Ends thinking and messages that are open in the current run.
    fn close_open_parts(&mut self, name: &str, out: &mut Emitter<'_>) {
        self.end_thinking(name, out);
        let Some(run) = self.runs.get_mut(name) else { return };
        for (message, writing) in &mut run.writing {
            if std::mem::take(&mut writing.open) {
                out.emit(&AguiEvent::TextMessageEnd { message_id: &text_id(name, message, writing.restarts) });
            }
        }
    }

    fn end_thinking(&mut self, name: &str, out: &mut Emitter<'_>) {
        if let Some(thinking) = self.runs.get_mut(name).and_then(|run| run.thinking.take()) {
            out.end_thinking(&thinking);
        }
    }

    fn emit_run_end(&mut self, name: &str, it: &StoredFrame<'_>, out: &mut Emitter<'_>) {
        let fields = it.fields();
        let string = |field| fields.string(field).unwrap_or_default();
        if it.kind == AGENT_FAILED {
            self.failed = true;
            return out.emit(&AguiEvent::RunError { message: &string("message"), code: &string("code") });
        }

        let thread_id = &*self.thread;
        let finished =
            |result, outcome, metadata| AguiEvent::RunFinished { thread_id, run_id: name, result, outcome, metadata };
        match &*it.kind {
            AGENT_WAITING => {
                let (prompt, expires_at) = (fields.string("prompt"), fields.string("expires_at"));
                // Whoever answers names the question by its seq, which AG-UI has no other field for.
                let metadata = with_field(it.data, "seq", &it.seq);
                let interrupt = Interrupt {
                    id: &it.event,
                    reason: &string("reason"),
                    message: prompt.as_deref(),
                    expires_at: expires_at.as_deref(),
                    metadata: Some(&metadata),
                };
                out.emit(&finished(None, Some(Outcome::Interrupt { interrupts: [interrupt] }), None));
            }
            AGENT_CANCELLED => out.emit(&finished(None, Some(Outcome::Cancelled), object(it.data))),
            _ => {
                let usage = fields.raw("usage").map(|usage| raw_object("usage", usage));
                out.emit(&finished(fields.raw("output"), None, usage.as_deref()));
            }
        }
    }

    /// A whole message, which may close one that was written in deltas.
    fn on_message(&mut self, seq: u64, it: &StoredFrame<'_>, role: &'static str, out: &mut Emitter<'_>) {
        if let Some(run) = it.run.as_deref() {
            let is_anothers = self.current.as_deref().is_some_and(|current| current != run);
            if !self.is_wanted(run) || is_anothers {
                return self.record(seq, it);
            }
            if self.current.is_some() {
                self.end_thinking(run, out);
            }
        }

        let fields = it.fields();
        let message = TextMessage::of(it, role, &fields, out.at);
        let kept = KeptMessage { seq, role, change: Change::None };
        let closed = fields.string("message").filter(|_| role == "assistant");
        if let Some(closed) = closed
            && let Some(run) = self.run_of_message(it, &closed)
        {
            let revised = fields.raw("revised").is_some_and(|revised| revised.get() == "true");
            return self.close_message(&run, &closed, revised, message, kept, out);
        }
        self.emit_or_keep(message, kept, out);
    }

    /// The run in which a message is written. An agent that closes one may leave the run out.
    fn run_of_message(&self, it: &StoredFrame<'_>, message: &str) -> Option<String> {
        if let Some(run) = it.run.as_deref() {
            return Some(run.to_owned());
        }
        let current = self.current.as_ref()?;
        let writing = self.runs.get(current)?.writing.get(message)?;
        (writing.from == it.from).then(|| current.clone())
    }

    /// A message that was written in deltas is whole: what was not emitted of it is.
    fn close_message(
        &mut self,
        run: &str,
        name: &str,
        revised: bool,
        mut message: TextMessage,
        mut kept: KeptMessage,
        out: &mut Emitter<'_>,
    ) {
        let restarts = out.thread.restarts(run, name);
        let writing = self.runs.get_mut(run).and_then(|run| run.writing.remove(name));
        let (emitted, sent, open) =
            writing.map_or((restarts, 0, false), |writing| (writing.restarts, writing.sent, writing.open));
        let id = text_id(run, name, emitted);

        // A final text that differs from the deltas is a message of its own, which replaces the other. So it is where the
        // message was begun anew and nothing of that was emitted.
        let replaces = (revised && sent > 0) || emitted < restarts;
        if replaces && open {
            out.emit(&AguiEvent::TextMessageEnd { message_id: &id });
        }
        kept.change = match replaces {
            true => Change::Replaces(id),
            false => Change::Rest { id, skip: sent, replaces: text_id_before(run, name, restarts) },
        };
        message.apply(&kept.change);
        if replaces {
            return self.emit_or_keep(message, kept, out);
        }
        if open {
            return out.rest_of_message(&message);
        }
        if sent > 0 && message.text.is_empty() {
            return;
        }
        self.emit_or_keep(message, kept, out);
    }

    fn emit_or_keep(&mut self, message: TextMessage, kept: KeptMessage, out: &mut Emitter<'_>) {
        match self.current {
            Some(_) => out.message(&message),
            None => self.kept.push(kept, &message),
        }
    }

    /// `agent_token`.
    fn on_delta(&mut self, it: &StoredFrame<'_>, restarts: u32, out: &mut Emitter<'_>) {
        let Some(name) = it.run.as_deref().filter(|run| self.current.as_deref() == Some(run)) else { return };
        let Ok(delta) = serde_json::from_str::<DeltaData>(it.data.get()) else { return };
        let all: usize = self.runs.values().map(|run| run.writing.len()).sum();
        let Some(run) = self.runs.get_mut(name) else { return };

        let writing = run.writing.get(&*delta.message);
        let same_text = writing.filter(|writing| writing.restarts == restarts);
        let (sent, open) = same_text.map_or((0, false), |writing| (writing.sent, writing.open));
        let is_old = writing.is_some_and(|writing| writing.restarts > restarts);
        let is_full = writing.is_none() && (run.writing.len() >= WRITING || all >= ALL_WRITING);
        let is_known = same_text.is_some() && delta.to_char() <= sent;
        // A message of which a delta is missing is emitted when it is closed.
        let is_missing_text = delta.from_char > sent;
        if is_old || is_full || is_known || is_missing_text {
            return;
        }

        let sent_now = delta.to_char().max(sent);
        let writing = PartialMessage { from: it.from.to_string(), restarts, sent: sent_now, open: true };
        let before = run.writing.insert(delta.message.to_string(), writing).filter(|it| it.restarts < restarts);
        self.end_thinking(name, out);
        let text_before = before.as_ref().map(|before| text_id(name, &delta.message, before.restarts));
        if let Some(message_id) = text_before.as_deref().filter(|_| before.is_some_and(|it| it.open)) {
            out.emit(&AguiEvent::TextMessageEnd { message_id });
        }
        let message_id = &text_id(name, &delta.message, restarts);
        if !open {
            let replaced = text_before.or_else(|| text_id_before(name, &delta.message, restarts));
            let metadata = replaced.as_deref().map(replacing);
            let metadata = metadata.as_deref();
            out.emit(&AguiEvent::TextMessageStart { message_id, role: "assistant", name: &it.from, metadata });
        }
        let new: String = delta.text.chars().skip((sent - delta.from_char) as usize).collect();
        if !new.is_empty() {
            out.emit(&AguiEvent::TextMessageContent { message_id, delta: &new });
        }
    }

    /// Any other event: emitted if a run is, and the event is not another run's.
    fn on_other(&mut self, seq: u64, it: &StoredFrame<'_>, frame: &str, out: &mut Emitter<'_>) {
        let Some(current) = self.current.clone() else { return self.record(seq, it) };
        match it.run.as_deref() {
            Some(run) if run == current => self.end_thinking(&current, out),
            Some(_) => return self.record(seq, it),
            None => {}
        }

        match &*it.kind {
            AGENT_THINKING => self.on_thinking(&current, it, out),
            TOOL_EXECUTING => out.call(&current, it),
            TOOL_COMPLETED => {
                if let Some(run) = self.runs.get_mut(&current) {
                    run.complete_call(it);
                }
                out.call_result(&current, it);
            }
            kind => {
                // A frame without its type is JSON as well.
                if let Ok(value) = RawValue::from_string(without_type(frame)) {
                    out.emit(&AguiEvent::Custom { name: kind, value: &value });
                }
            }
        }
    }

    /// The agent thinks until the run's next event.
    fn on_thinking(&mut self, current: &str, it: &StoredFrame<'_>, out: &mut Emitter<'_>) {
        out.begin_thinking(&it.event);
        if let Some(text) = it.fields().text("content").filter(|text| !text.is_empty()) {
            out.thought(&it.event, &text);
        }
        match self.runs.get_mut(current) {
            Some(run) => run.thinking = Some(it.event.to_string()),
            None => out.end_thinking(&it.event),
        }
    }
}
