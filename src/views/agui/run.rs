//! What is known of the runs that are open on a thread.

use std::collections::{BTreeMap, VecDeque};

use serde_json::value::RawValue;

use crate::clock;
use crate::protocol::event::{Fields, StoredFrame};
use crate::protocol::json::{encode_raw, raw_object, with_field};
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
        let room = CALL_BYTES.saturating_sub(self.calls.iter().map(|call| call.bytes).sum());
        if self.calls.len() < CALLS && call.bytes <= room {
            self.calls.push(call);
        }
    }

    /// The bytes of the arguments that are still to be emitted.
    pub fn unsent_bytes(&self) -> usize {
        self.calls.iter().filter(|call| !call.sent).map(|call| call.bytes).sum()
    }

    /// Records a `tool_completed`.
    pub fn complete_call(&mut self, frame: &StoredFrame<'_>) {
        if let Some(completed) = frame.fields().string("call") {
            let completed = digest(&completed);
            self.calls.retain(|known| known.name != completed);
        }
    }
}

/// A call that has not completed.
pub struct OpenCall {
    pub seq: u64,
    /// Its name, as short as it need be to be known again.
    name: [u8; 16],
    /// The bytes of its arguments.
    bytes: usize,
    pub sent: bool,
}

impl OpenCall {
    /// The call of a `tool_executing`.
    pub fn of(seq: u64, frame: &StoredFrame<'_>) -> Option<OpenCall> {
        let fields = frame.fields();
        let bytes = fields.raw("arguments").map_or(0, |arguments| arguments.get().len());
        Some(OpenCall { seq, name: digest(&fields.string("call")?), bytes, sent: false })
    }
}

fn digest(name: &str) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    digest
}

/// A message that is written in deltas.
pub struct PartialMessage {
    pub from: String,
    /// How often the message was begun anew before the text that was emitted.
    pub restarts: u32,
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

/// What differs between an event and the message that it is emitted as.
pub enum Change {
    None,
    /// It ends a message that was written in deltas, of which so many characters were emitted. Was it begun anew, it replaces
    /// the message with the text before.
    Rest {
        id: String,
        skip: u64,
        replaces: Option<String>,
    },
    /// It replaces that message.
    Replaces(String),
}

impl TextMessage {
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::None => {}
            Change::Rest { id, skip, replaces } => {
                self.id.clone_from(id);
                if let Some(replaces) = replaces {
                    self.metadata = Some(match &self.metadata {
                        Some(metadata) => with_field(metadata, "replaces", replaces),
                        None => replacing(replaces),
                    });
                }
                self.text = self.text.chars().skip(*skip as usize).collect();
            }
            Change::Replaces(id) => self.metadata = Some(replacing(id)),
        }
    }
}

/// `metadata` of a message that replaces another.
pub fn replacing(id: &str) -> Box<RawValue> {
    encode_raw(&BTreeMap::from([("replaces", id)]))
}

/// A message that is emitted with the next run: the event that it is.
pub struct KeptMessage {
    pub seq: u64,
    pub role: &'static str,
    pub change: Change,
}

impl KeptMessage {
    /// The message, from its event.
    pub fn message(&self, frame: &str) -> Option<TextMessage> {
        let frame = StoredFrame::parse(frame)?;
        let at = clock::parse_rfc3339(&frame.at);
        let mut message = TextMessage::of(&frame, self.role, &frame.fields(), at);
        message.apply(&self.change);
        Some(message)
    }
}

/// Messages that came while no run was emitted. They are emitted with the next one.
#[derive(Default)]
pub struct KeptMessages {
    /// Each with the bytes of its text.
    messages: VecDeque<(KeptMessage, usize)>,
    bytes: usize,
}

impl KeptMessages {
    /// Keeps a message, and drops the oldest ones beyond the limits.
    pub fn push(&mut self, kept: KeptMessage, message: &TextMessage) {
        let bytes = message.text.len() + message.metadata.as_ref().map_or(0, |metadata| metadata.get().len());
        self.bytes += bytes;
        self.messages.push_back((kept, bytes));
        while self.messages.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some((_, bytes)) = self.messages.pop_front() else { return };
            self.bytes -= bytes;
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn take(&mut self) -> impl Iterator<Item = KeptMessage> + use<> {
        std::mem::take(self).messages.into_iter().map(|(kept, _)| kept)
    }
}
