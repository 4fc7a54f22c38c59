//! A thread's runs as AG-UI tells them: Weft's event frames in, AG-UI's events out, as JSON.
//!
//! AG-UI knows one run at a time, and nothing outside of one. A *stretch* is what AG-UI calls a run: from `agent_started` or
//! `agent_resumed` to `agent_waiting` or the ending. Of the stretches that are open on the thread, the one that began first
//! is told; when it is over, the next one. Of those that are not told it is noted what is open in them, but for the texts of
//! messages, which are there to be had when they are needed ([`Next::Again`]). So what is told at any seq follows from the
//! thread alone, wherever a reader begins.
//!
//! Kept are the names of open runs, their calls, how far the messages that were told have come, and some messages that stand
//! before a run. All of it is bounded.

#[cfg(test)]
mod tests;
mod wire;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};

use super::agui::wire::{Event, Interrupt, Outcome, PROTOCOL, Timed};
use crate::clock;
use crate::protocol::error::Error;
use crate::protocol::event::without_type;
use crate::protocol::kinds::{AGENT_MESSAGE, DeltaData, text_of};

/// Open runs that are noted; those beyond are left out.
const RUNS: usize = 1_024;
/// Messages of the told run that are written at a time; others are told when they are closed.
const WRITING: usize = 256;
/// Calls that are opened again for who comes in the middle, and the bytes of their arguments.
const CALLS: usize = 256;
const CALL_BYTES: usize = 1 << 20;
/// Messages from before a run that are told at its beginning, the newest, and the bytes of their texts.
const BEFORE: usize = 32;
const BEFORE_BYTES: usize = 2 << 20;

/// The step that a run is in while its agent thinks.
const THINKING: &str = "thinking";

/// What comes after an event.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The next event.
    On,
    /// Another stretch is told from now on: the texts of messages that are being written are wanted once more.
    Again,
    /// The run that was asked for waits for a person, since this seq.
    Waits { seq: u64 },
    /// The run that was asked for has ended.
    Ended,
}

/// What AG-UI has been told of a thread, and what it is told next.
pub struct Mapper {
    thread: String,
    /// The run that was asked for.
    only: Option<String>,
    /// Up to this seq events are only noted.
    silent_to: Option<u64>,
    /// The client has what was before, and needs no calls opened again.
    resumes: bool,
    runs: BTreeMap<String, Run>,
    /// Whose stretch is told.
    told: Option<String>,
    before: VecDeque<Message>,
    before_bytes: usize,
    /// The last that was told is `RUN_ERROR`, behind which only a run may begin.
    failed: bool,
}

/// An open run.
#[derive(Default)]
struct Run {
    /// Where its stretch began; none while it waits.
    since: Option<u64>,
    parent: Option<String>,
    /// Its newest event is `agent_thinking`: that event's id.
    thinking: Option<String>,
    calls: Vec<Call>,
    writing: BTreeMap<String, Writing>,
}

struct Call {
    call: String,
    tool: String,
    /// What is still to be told of it.
    untold: Option<Arguments>,
}

/// The arguments of a call, if it has any.
type Arguments = Option<String>;

/// A message that is written in pieces.
struct Writing {
    from: String,
    /// Characters that were told.
    sent: u64,
    /// Begun and not ended.
    open: bool,
}

/// A whole message, or the rest of one.
struct Message {
    id: String,
    role: &'static str,
    from: String,
    text: String,
    metadata: Option<Box<RawValue>>,
    at: Option<u64>,
}

#[derive(Deserialize)]
struct Frame<'a> {
    seq: Option<u64>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    from: Cow<'a, str>,
    #[serde(borrow)]
    at: Cow<'a, str>,
    #[serde(borrow)]
    data: &'a RawValue,
    #[serde(borrow)]
    run: Option<Cow<'a, str>>,
}

/// The fields of an event's `data`. One of another type than AG-UI's is as good as absent.
struct Fields<'a>(HashMap<Cow<'a, str>, &'a RawValue>);

impl<'a> Fields<'a> {
    fn of(data: &'a RawValue) -> Fields<'a> {
        Fields(serde_json::from_str(data.get()).unwrap_or_default())
    }

    fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.0.get(name).copied().filter(|value| value.get() != "null")
    }

    fn text(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.raw(name)?.get()).ok()
    }

    /// A string as it is, anything else as its JSON.
    fn as_text(&self, name: &str) -> Option<String> {
        self.text(name).or_else(|| self.raw(name).map(|value| value.get().to_owned()))
    }
}

/// The AG-UI events that one event of Weft becomes.
struct Out<'a> {
    lines: &'a mut Vec<String>,
    at: Option<u64>,
}

impl Out<'_> {
    fn push(&mut self, event: &Event<'_>) {
        self.push_at(event, self.at);
    }

    /// Thinking is a step of the run, and what is thought is its reasoning.
    fn begin_thinking(&mut self, message_id: &str) {
        self.push(&Event::StepStarted { step_name: THINKING });
        self.push(&Event::ReasoningStart { message_id });
    }

    fn end_thinking(&mut self, message_id: &str) {
        self.push(&Event::ReasoningEnd { message_id });
        self.push(&Event::StepFinished { step_name: THINKING });
    }

    fn push_at(&mut self, event: &Event<'_>, timestamp: Option<u64>) {
        // Strings and raw JSON always serialise.
        self.lines.extend(serde_json::to_string(&Timed { event, timestamp }).ok());
    }
}

impl Mapper {
    /// Tells the events behind `silent_to`; those up to it, if they come, are only noted.
    pub fn new(thread: &str, only: Option<String>, silent_to: Option<u64>, resumes: bool) -> Mapper {
        Mapper {
            thread: thread.to_owned(),
            only,
            silent_to,
            resumes,
            runs: BTreeMap::new(),
            told: None,
            before: VecDeque::new(),
            before_bytes: 0,
            failed: false,
        }
    }

    /// The AG-UI events of an event frame, each as JSON.
    pub fn event(&mut self, frame: &str, lines: &mut Vec<String>) -> Next {
        // The server's own frames have these fields.
        let Ok(it) = serde_json::from_str::<Frame>(frame) else { return Next::On };
        let out = &mut Out { lines, at: clock::parse_rfc3339(&it.at) };
        let Some(seq) = it.seq else {
            self.piece(&it, out);
            return Next::On;
        };
        if let Some(to) = self.silent_to {
            self.note(seq, &it);
            if seq >= to {
                self.speak(out);
            }
            return Next::On;
        }
        match &*it.kind {
            "agent_started" | "agent_resumed" => return self.begins(seq, &it, out),
            "agent_waiting" | "agent_completed" | "agent_failed" | "agent_cancelled" => {
                return self.ends(seq, &it, out);
            }
            "user_message" => self.message(&it, "user", out),
            "system_message" => self.message(&it, "system", out),
            AGENT_MESSAGE => self.message(&it, "assistant", out),
            _ => self.inside(seq, &it, frame, out),
        }
        Next::On
    }

    /// The event that ends the stream because of an error, unless that would be one too many.
    pub fn error(&mut self, error: &Error) -> Option<String> {
        if std::mem::replace(&mut self.failed, true) {
            return None;
        }
        let mut lines = Vec::new();
        Out { lines: &mut lines, at: None }
            .push(&Event::RunError { message: &error.message, code: error.code.as_str() });
        lines.pop()
    }

    fn is_wanted(&self, run: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == run)
    }

    /// The open stretch that began first.
    fn oldest(&self) -> Option<(u64, String)> {
        let open = self.runs.iter().filter_map(|(name, run)| Some((run.since?, name)));
        open.min().map(|(since, name)| (since, name.clone()))
    }

    /// An event from before the reader's place.
    fn note(&mut self, seq: u64, it: &Frame<'_>) {
        let Some(name) = it.run.as_deref() else { return };
        if matches!(&*it.kind, "agent_started" | "agent_resumed") {
            self.open(seq, name, it);
        }
        let Some(run) = self.runs.get_mut(name) else { return };
        run.thinking = (it.kind == "agent_thinking").then(|| it.event.clone().into_owned());
        match &*it.kind {
            "tool_executing" => run.call(Call::of(it)),
            "tool_completed" => run.completed(it),
            AGENT_MESSAGE => {
                let named = Fields::of(it.data).text("message").unwrap_or_default();
                run.writing.remove(&named);
            }
            "agent_waiting" => run.since = None,
            "agent_completed" | "agent_failed" | "agent_cancelled" => drop(self.runs.remove(name)),
            _ => {}
        }
    }

    /// The reader's place is reached: what is open there is opened for it.
    fn speak(&mut self, out: &mut Out<'_>) {
        self.silent_to = None;
        let Some((_, name)) = self.oldest() else { return };
        if let Some(run) = self.runs.get_mut(&name).filter(|_| self.resumes) {
            run.calls.iter_mut().for_each(|call| call.untold = None);
        }
        self.take_up(&name, None, out);
    }

    /// Tells a run from now on, with what is open in it.
    fn take_up(&mut self, name: &str, metadata: Option<&RawValue>, out: &mut Out<'_>) {
        self.begin(name, metadata, out);
        let Some(run) = self.runs.get_mut(name) else { return };
        run.calls.iter_mut().for_each(|call| call.tell(name, out));
    }

    /// Notes that a stretch has begun.
    fn open(&mut self, seq: u64, name: &str, it: &Frame<'_>) -> bool {
        let known = self.runs.contains_key(name);
        if !self.is_wanted(name) || (!known && self.runs.len() >= RUNS) {
            return false;
        }
        let run = self.runs.entry(name.to_owned()).or_default();
        (run.since, run.thinking) = (Some(seq), None);
        if it.kind == "agent_started" {
            run.parent = Fields::of(it.data).text("parent_run");
        }
        true
    }

    fn begins(&mut self, seq: u64, it: &Frame<'_>, out: &mut Out<'_>) -> Next {
        let Some(name) = it.run.as_deref() else { return Next::On };
        if !self.open(seq, name, it) || self.told.is_some() {
            return Next::On;
        }
        self.take_up(name, Some(it.data), out);
        // One that goes on may have messages that nobody was told of while it waited.
        if it.kind == "agent_resumed" { Next::Again } else { Next::On }
    }

    /// Tells that a run begins, with the messages that stand before it.
    fn begin(&mut self, name: &str, metadata: Option<&RawValue>, out: &mut Out<'_>) {
        let run = self.runs.get(name);
        out.push(&Event::RunStarted {
            thread_id: &self.thread,
            run_id: name,
            protocol_version: PROTOCOL,
            parent_run_id: run.and_then(|run| run.parent.as_deref()),
            metadata: metadata.filter(|data| is_object(data)),
        });
        self.before.drain(..).for_each(|message| message.tell(out));
        self.before_bytes = 0;
        if let Some(thinking) = run.and_then(|run| run.thinking.as_deref()) {
            out.begin_thinking(thinking);
        }
        self.told = Some(name.to_owned());
        self.failed = false;
    }

    /// A run waits or ends.
    fn ends(&mut self, seq: u64, it: &Frame<'_>, out: &mut Out<'_>) -> Next {
        let Some(name) = it.run.as_deref().filter(|name| self.is_wanted(name)) else { return Next::On };
        // One that ends while it waits is told as a run that does nothing else.
        if self.told.is_none() {
            self.begin(name, None, out);
        }
        let told = self.told.as_deref() == Some(name);
        if told {
            self.close(name, out);
            self.finish(name, it, out);
            self.told = None;
        }
        let waits = it.kind == "agent_waiting";
        match self.runs.get_mut(name) {
            Some(run) if waits => run.since = None,
            _ => drop(self.runs.remove(name)),
        }
        match self.oldest() {
            _ if !told => Next::On,
            _ if self.only.is_some() && waits => Next::Waits { seq },
            _ if self.only.is_some() => Next::Ended,
            None => Next::On,
            Some((_, name)) => {
                self.take_up(&name, None, out);
                Next::Again
            }
        }
    }

    /// Ends what is open within the told run.
    fn close(&mut self, name: &str, out: &mut Out<'_>) {
        self.end_thinking(name, out);
        let Some(run) = self.runs.get_mut(name) else { return };
        for (message, writing) in &mut run.writing {
            if std::mem::take(&mut writing.open) {
                out.push(&Event::TextMessageEnd { message_id: &id(name, &[message]) });
            }
        }
    }

    fn end_thinking(&mut self, name: &str, out: &mut Out<'_>) {
        if let Some(thinking) = self.runs.get_mut(name).and_then(|run| run.thinking.take()) {
            out.end_thinking(&thinking);
        }
    }

    fn finish(&mut self, name: &str, it: &Frame<'_>, out: &mut Out<'_>) {
        let fields = Fields::of(it.data);
        let text = |field| fields.text(field);
        let (mut result, mut outcome, mut metadata) = (None, None, Some(it.data).filter(|data| is_object(data)));
        let (reason, prompt, expires_at) = (text("reason").unwrap_or_default(), text("prompt"), text("expires_at"));
        let usage = fields.raw("usage").and_then(|usage| to_raw_value(&json!({"usage": usage})).ok());
        match &*it.kind {
            "agent_failed" => {
                let (message, code) = (text("message").unwrap_or_default(), text("code").unwrap_or_default());
                self.failed = true;
                return out.push(&Event::RunError { message: &message, code: &code });
            }
            "agent_waiting" => {
                let interrupt = Interrupt {
                    id: &it.event,
                    reason: &reason,
                    message: prompt.as_deref(),
                    expires_at: expires_at.as_deref(),
                    metadata: metadata.take(),
                };
                outcome = Some(Outcome::Interrupt { interrupts: [interrupt] });
            }
            "agent_cancelled" => outcome = Some(Outcome::Cancelled),
            _ => (result, metadata) = (fields.raw("output"), usage.as_deref()),
        }
        out.push(&Event::RunFinished { thread_id: &self.thread, run_id: name, result, outcome, metadata });
    }

    /// A whole message, which may close one that was written in pieces.
    fn message(&mut self, it: &Frame<'_>, role: &'static str, out: &mut Out<'_>) {
        let run = it.run.as_deref();
        if run.is_some_and(|run| !self.is_wanted(run) || self.told.as_deref().is_some_and(|told| told != run)) {
            return self.note(it.seq.unwrap_or(0), it);
        }
        if let Some(name) = run.filter(|_| self.told.is_some()) {
            self.end_thinking(name, out);
        }
        let fields = Fields::of(it.data);
        let mut message = Message::of(it, role, &fields, out.at);
        let named = fields.text("message").filter(|_| role == "assistant");
        if let Some((run, named)) = named.and_then(|named| Some((self.writer(it, &named)?, named))) {
            let id = id(&run, &[&named]);
            let writing = self.runs.get_mut(&run).and_then(|run| run.writing.remove(&named));
            let (sent, open) = writing.map_or((0, false), |writing| (writing.sent, writing.open));
            if sent > 0 && fields.raw("revised").is_some_and(|revised| revised.get() == "true") {
                if open {
                    out.push(&Event::TextMessageEnd { message_id: &id });
                }
                message.metadata = to_raw_value(&json!({"replaces": id})).ok();
            } else {
                message.id = id;
                message.text = message.text.chars().skip(sent as usize).collect();
                if open {
                    return message.tell_rest(out);
                }
                if sent > 0 && message.text.is_empty() {
                    return;
                }
            }
        }
        match self.told {
            Some(_) => message.tell(out),
            None => self.hold(message),
        }
    }

    /// The run in which the message of this name is written. An agent that closes one may leave the run out.
    fn writer(&self, it: &Frame<'_>, named: &str) -> Option<String> {
        let is_its = |run: &Run| run.writing.get(named).is_some_and(|writing| writing.from == it.from);
        match it.run.as_deref() {
            Some(run) => Some(run.to_owned()),
            None => self.told.as_ref().filter(|told| self.runs.get(*told).is_some_and(is_its)).cloned(),
        }
    }

    fn hold(&mut self, message: Message) {
        self.before_bytes += message.text.len();
        self.before.push_back(message);
        while self.before.len() > BEFORE || self.before_bytes > BEFORE_BYTES {
            let Some(oldest) = self.before.pop_front() else { return };
            self.before_bytes -= oldest.text.len();
        }
    }

    fn piece(&mut self, it: &Frame<'_>, out: &mut Out<'_>) {
        let Some(name) = it.run.as_deref().filter(|run| self.told.as_deref() == Some(run)) else { return };
        let Ok(data) = serde_json::from_str::<DeltaData>(it.data.get()) else { return };
        let Some(run) = self.runs.get_mut(name) else { return };
        let writing = run.writing.get(&*data.message);
        let (sent, open) = writing.map_or((0, false), |writing| (writing.sent, writing.open));
        let full = writing.is_none() && run.writing.len() >= WRITING;
        // What has a hole is told when it is closed.
        if full || data.from_char > sent || (writing.is_some() && data.to_char() <= sent) {
            return;
        }
        let writing = Writing { from: it.from.clone().into_owned(), sent: data.to_char().max(sent), open: true };
        run.writing.insert(data.message.clone().into_owned(), writing);
        self.end_thinking(name, out);
        let message_id = &id(name, &[&data.message]);
        if !open {
            out.push(&Event::TextMessageStart { message_id, role: "assistant", name: &it.from, metadata: None });
        }
        let delta: String = data.text.chars().skip((sent - data.from_char) as usize).collect();
        if !delta.is_empty() {
            out.push(&Event::TextMessageContent { message_id, delta: &delta });
        }
    }

    /// Anything else, if a run is told and it is not another's.
    fn inside(&mut self, seq: u64, it: &Frame<'_>, frame: &str, out: &mut Out<'_>) {
        let Some(told) = self.told.clone() else { return self.note(seq, it) };
        match it.run.as_deref() {
            Some(run) if run == told => self.end_thinking(&told, out),
            Some(_) => return self.note(seq, it),
            None => {}
        }
        match &*it.kind {
            "agent_thinking" => self.think(&told, it, out),
            "tool_executing" => {
                if let Some(mut call) = Call::of(it) {
                    call.tell(&told, out);
                    if let Some(run) = self.runs.get_mut(&told) {
                        run.call(Some(call));
                    }
                }
            }
            "tool_completed" => {
                if let Some(run) = self.runs.get_mut(&told) {
                    run.completed(it);
                }
                completed(&told, it, out);
            }
            kind => {
                // A frame without its type is JSON as well.
                if let Ok(value) = RawValue::from_string(without_type(frame)) {
                    out.push(&Event::Custom { name: kind, value: &value });
                }
            }
        }
    }

    /// The agent thinks until the run's next event.
    fn think(&mut self, told: &str, it: &Frame<'_>, out: &mut Out<'_>) {
        let message_id = &*it.event;
        out.begin_thinking(message_id);
        if let Some(delta) = Fields::of(it.data).as_text("content").filter(|text| !text.is_empty()) {
            out.push(&Event::ReasoningMessageStart { message_id, role: "reasoning" });
            out.push(&Event::ReasoningMessageContent { message_id, delta: &delta });
            out.push(&Event::ReasoningMessageEnd { message_id });
        }
        match self.runs.get_mut(told) {
            Some(run) => run.thinking = Some(message_id.to_owned()),
            None => out.end_thinking(message_id),
        }
    }
}

fn completed(run: &str, it: &Frame<'_>, out: &mut Out<'_>) {
    let fields = Fields::of(it.data);
    let Some(call) = fields.text("call") else { return };
    let error = fields.as_text("error");
    let failed = error.as_ref().and_then(|_| to_raw_value(&json!({"error": fields.raw("error")})).ok());
    out.push(&Event::ToolCallResult {
        message_id: &it.event,
        tool_call_id: &id(run, &["calls", &call]),
        content: &fields.as_text("result").or(error).unwrap_or_default(),
        role: "tool",
        metadata: failed.as_deref(),
    });
}

impl Run {
    /// Notes a call, unless there are too many: those are not opened again.
    fn call(&mut self, call: Option<Call>) {
        let size = |call: &Call| call.untold.iter().flatten().map(String::len).sum::<usize>();
        let room = CALL_BYTES.saturating_sub(self.calls.iter().map(size).sum());
        self.calls.extend(call.filter(|call| self.calls.len() < CALLS && size(call) <= room));
    }

    fn completed(&mut self, it: &Frame<'_>) {
        let call = Fields::of(it.data).text("call");
        self.calls.retain(|known| Some(&known.call) != call.as_ref());
    }
}

impl Call {
    fn of(it: &Frame<'_>) -> Option<Call> {
        let fields = Fields::of(it.data);
        let tool = fields.text("tool").unwrap_or_default();
        Some(Call { call: fields.text("call")?, tool, untold: Some(fields.as_text("arguments")) })
    }

    /// Tells the call, once.
    fn tell(&mut self, run: &str, out: &mut Out<'_>) {
        let Some(arguments) = self.untold.take() else { return };
        let tool_call_id = &id(run, &["calls", &self.call]);
        out.push(&Event::ToolCallStart { tool_call_id, tool_call_name: &self.tool });
        if let Some(delta) = arguments.as_deref().filter(|delta| !delta.is_empty()) {
            out.push(&Event::ToolCallArgs { tool_call_id, delta });
        }
        out.push(&Event::ToolCallEnd { tool_call_id });
    }
}

impl Message {
    fn of(it: &Frame<'_>, role: &'static str, fields: &Fields<'_>, at: Option<u64>) -> Message {
        let content = fields.raw("content");
        // Parts that are no text are none of AG-UI's: they go along as they are.
        let parts = content.filter(|content| content.get().starts_with('['));
        Message {
            id: it.event.clone().into_owned(),
            role,
            from: it.from.clone().into_owned(),
            text: content.and_then(text_of).unwrap_or_default(),
            metadata: parts.and_then(|parts| to_raw_value(&json!({"content": parts})).ok()),
            at,
        }
    }

    fn tell(self, out: &mut Out<'_>) {
        let Message { id, role, from, metadata, at, .. } = &self;
        let begin = Event::TextMessageStart { message_id: id, role, name: from, metadata: metadata.as_deref() };
        out.push_at(&begin, *at);
        self.tell_rest(out);
    }

    fn tell_rest(&self, out: &mut Out<'_>) {
        if !self.text.is_empty() {
            out.push_at(&Event::TextMessageContent { message_id: &self.id, delta: &self.text }, self.at);
        }
        out.push_at(&Event::TextMessageEnd { message_id: &self.id }, self.at);
    }
}

fn is_object(data: &RawValue) -> bool {
    data.get().starts_with('{')
}

/// An id of something that has a name within its run; AG-UI's must tell it from those of all runs.
fn id(run: &str, names: &[&str]) -> String {
    const SEPARATORS: &AsciiSet = &CONTROLS.add(b'/').add(b'%');
    let mut id = utf8_percent_encode(run, SEPARATORS).to_string();
    for name in names {
        id.push('/');
        id.extend(utf8_percent_encode(name, SEPARATORS));
    }
    id
}
