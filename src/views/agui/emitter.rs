//! Writes AG-UI's events as JSON lines.

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::value::RawValue;

use super::Lookup;
use super::run::{OpenCall, TextMessage};
use crate::protocol::agui::{AguiEvent, Timed};
use crate::protocol::event::StoredFrame;
use crate::protocol::json::{encode, raw_object};

/// The step that a run is in while its agent thinks.
const THINKING: &str = "thinking";

/// The AG-UI events that one event of Weft becomes.
pub struct Emitter<'a> {
    pub lines: &'a mut Vec<String>,
    /// The time of Weft's event, in milliseconds.
    pub at: Option<u64>,
    pub thread: &'a dyn Lookup,
}

impl Emitter<'_> {
    pub fn emit(&mut self, event: &AguiEvent<'_>) {
        self.emit_at(event, self.at);
    }

    fn emit_at(&mut self, event: &AguiEvent<'_>, timestamp: Option<u64>) {
        self.lines.push(encode(&Timed { event, timestamp }));
    }

    /// Thinking is a step of the run, and what is thought is its reasoning.
    pub fn begin_thinking(&mut self, message_id: &str) {
        self.emit(&AguiEvent::StepStarted { step_name: THINKING });
        self.emit(&AguiEvent::ReasoningStart { message_id });
    }

    pub fn thought(&mut self, message_id: &str, text: &str) {
        self.emit(&AguiEvent::ReasoningMessageStart { message_id, role: "reasoning" });
        self.emit(&AguiEvent::ReasoningMessageContent { message_id, delta: text });
        self.emit(&AguiEvent::ReasoningMessageEnd { message_id });
    }

    pub fn end_thinking(&mut self, message_id: &str) {
        self.emit(&AguiEvent::ReasoningEnd { message_id });
        self.emit(&AguiEvent::StepFinished { step_name: THINKING });
    }

    /// A call that executes, once.
    pub fn open_call(&mut self, run: &str, call: &mut OpenCall) {
        if std::mem::replace(&mut call.sent, true) {
            return;
        }
        let event = self.thread.event(call.seq);
        if let Some(frame) = event.as_ref().and_then(|event| StoredFrame::parse(&event.frame)) {
            self.call(run, &frame);
        }
    }

    /// A call with its arguments, from its `tool_executing`.
    pub fn call(&mut self, run: &str, frame: &StoredFrame<'_>) {
        let fields = frame.fields();
        let Some(call) = fields.string("call") else { return };
        let tool_call_id = &id(run, &["calls", &call]);
        let tool_call_name = &fields.string("tool").unwrap_or_default();
        self.emit(&AguiEvent::ToolCallStart { tool_call_id, tool_call_name });
        if let Some(delta) = fields.text("arguments").as_deref().filter(|delta| !delta.is_empty()) {
            self.emit(&AguiEvent::ToolCallArgs { tool_call_id, delta });
        }
        self.emit(&AguiEvent::ToolCallEnd { tool_call_id });
    }

    /// The result of a call, from its `tool_completed`.
    pub fn call_result(&mut self, run: &str, frame: &StoredFrame<'_>) {
        let fields = frame.fields();
        let Some(call) = fields.string("call") else { return };
        let error = fields.raw("error");
        let metadata = error.map(|error| raw_object("error", error));
        self.emit(&AguiEvent::ToolCallResult {
            message_id: &frame.event,
            tool_call_id: &id(run, &["calls", &call]),
            content: &fields.text("result").or_else(|| fields.text("error")).unwrap_or_default(),
            role: "tool",
            metadata: metadata.as_deref(),
        });
    }

    /// A message from its beginning to its end.
    pub fn message(&mut self, message: &TextMessage) {
        let start = AguiEvent::TextMessageStart {
            message_id: &message.id,
            role: message.role,
            name: &message.from,
            metadata: message.metadata.as_deref(),
        };
        self.emit_at(&start, message.at);
        self.rest_of_message(message);
    }

    /// What is left of a message that was begun.
    pub fn rest_of_message(&mut self, TextMessage { id, text, at, .. }: &TextMessage) {
        if !text.is_empty() {
            self.emit_at(&AguiEvent::TextMessageContent { message_id: id, delta: text }, *at);
        }
        self.emit_at(&AguiEvent::TextMessageEnd { message_id: id }, *at);
    }
}

/// `data` that AG-UI's `metadata` can be: an object.
pub fn object(data: &RawValue) -> Option<&RawValue> {
    Some(data).filter(|data| data.get().starts_with('{'))
}

/// An id of something that has a name within its run: AG-UI's ids are those of all runs.
fn id(run: &str, names: &[&str]) -> String {
    const SEPARATORS: &AsciiSet = &CONTROLS.add(b'/').add(b'%');
    let mut id = utf8_percent_encode(run, SEPARATORS).to_string();
    for name in names {
        id.push('/');
        id.extend(utf8_percent_encode(name, SEPARATORS));
    }
    id
}

/// The id of a message that is written in deltas. Each time that it is begun anew it has another one.
pub fn text_id(run: &str, message: &str, restarts: u32) -> String {
    match restarts {
        0 => id(run, &[message]),
        _ => id(run, &[message, &restarts.to_string()]),
    }
}

/// The id that such a message had before it was last begun anew.
pub fn text_id_before(run: &str, message: &str, restarts: u32) -> Option<String> {
    Some(text_id(run, message, restarts.checked_sub(1)?))
}
