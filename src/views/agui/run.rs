//! What is known of the runs that are open on a thread.

use std::collections::{BTreeMap, VecDeque};

use serde_json::value::RawValue;

use crate::protocol::event::{Fields, StoredFrame};
use crate::protocol::json::raw_object;
use crate::protocol::kinds::text_of;

/// Calls of a run that can be emitted later, and the bytes of their arguments; those beyond are not.
const CALLS: usize = 256;
const CALL_BYTES: usize = 1 << 20;
/// Messages that are kept for the next run, the newest, and the bytes of their texts.
const KEPT: usize = 32;
const KEPT_BYTES: usize = 2 << 20;

/// An open run.
#[derive(Default)]
pub struct OpenRun {
    /// Where its active period began; none while it waits.
    pub active_since: Option<u64>,
    pub parent: Option<String>,
    /// Its newest event is `agent_thinking`: that event's id.
    pub thinking: Option<String>,
    /// Calls that have not completed.
    pub calls: Vec<OpenCall>,
    /// Messages that are being written, by name.
    pub writing: BTreeMap<String, PartialMessage>,
}

impl OpenRun {
    /// Records a call, unless there are too many.
    pub fn add_call(&mut self, call: OpenCall) {
        let room = CALL_BYTES.saturating_sub(self.calls.iter().map(OpenCall::bytes).sum());
        if self.calls.len() < CALLS && call.bytes() <= room {
            self.calls.push(call);
        }
    }

    /// Records a `tool_completed`.
    pub fn complete_call(&mut self, frame: &StoredFrame<'_>) {
        if let Some(completed) = frame.fields().string("call") {
            self.calls.retain(|known| known.call != completed);
        }
    }
}

/// The arguments of a call, if it has any.
type Arguments = Option<String>;

/// A call that has not completed.
pub struct OpenCall {
    pub call: String,
    pub tool: String,
    /// What is still to be emitted of it.
    pub unsent: Option<Arguments>,
}

impl OpenCall {
    /// The call of a `tool_executing`.
    pub fn of(frame: &StoredFrame<'_>) -> Option<OpenCall> {
        let fields = frame.fields();
        Some(OpenCall {
            call: fields.string("call")?,
            tool: fields.string("tool").unwrap_or_default(),
            unsent: Some(fields.text("arguments")),
        })
    }

    fn bytes(&self) -> usize {
        self.unsent.iter().flatten().map(String::len).sum()
    }
}

/// A message that is written in deltas.
pub struct PartialMessage {
    pub from: String,
    /// Characters that were emitted.
    pub sent: u64,
    /// Begun and not ended.
    pub open: bool,
}

/// A whole message, or the rest of one.
pub struct TextMessage {
    pub id: String,
    pub role: &'static str,
    pub from: String,
    pub text: String,
    pub metadata: Option<Box<RawValue>>,
    /// Milliseconds.
    pub at: Option<u64>,
}

impl TextMessage {
    pub fn of(frame: &StoredFrame<'_>, role: &'static str, fields: &Fields<'_>, at: Option<u64>) -> TextMessage {
        let content = fields.raw("content");
        // AG-UI's messages are text; other parts go along as they are.
        let parts = content.filter(|content| content.get().starts_with('['));
        TextMessage {
            id: frame.event.to_string(),
            role,
            from: frame.from.to_string(),
            text: content.and_then(text_of).unwrap_or_default(),
            metadata: parts.map(|parts| raw_object("content", parts)),
            at,
        }
    }
}

/// Messages that came while no run was emitted. They are emitted with the next one.
#[derive(Default)]
pub struct KeptMessages {
    messages: VecDeque<TextMessage>,
    bytes: usize,
}

impl KeptMessages {
    /// Keeps a message, and drops the oldest ones beyond the limits.
    pub fn push(&mut self, message: TextMessage) {
        self.bytes += message.text.len();
        self.messages.push_back(message);
        while self.messages.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some(oldest) = self.messages.pop_front() else { return };
            self.bytes -= oldest.text.len();
        }
    }

    pub fn take(&mut self) -> VecDeque<TextMessage> {
        std::mem::take(self).messages
    }
}
