//! The event: its kinds, the record it is in the log, and the frame it is on the wire.
//!
//! The payload (`data`) is raw JSON from end to end: checked for its shape once at the edge, then carried as it came.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::Error;
use crate::ids;

/// What a publisher may put in front of other events (delivery only; the order of a thread is its seq).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    High,
    Normal,
    Low,
}

impl Priority {
    /// The classes among which a socket's turns are divided, highest first; an event without a priority is normal.
    pub const CLASSES: usize = 3;

    pub fn class(priority: Option<Priority>) -> usize {
        match priority {
            Some(Priority::High) => 0,
            None | Some(Priority::Normal) => 1,
            Some(Priority::Low) => 2,
        }
    }
}

/// The record's value in the log: the event without its seq, with its tenant.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogEvent<'a> {
    #[serde(borrow)]
    pub tenant: Cow<'a, str>,
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    /// UUIDv7.
    pub event: uuid::Uuid,
    /// The user who published it.
    #[serde(borrow)]
    pub from: Cow<'a, str>,
    /// RFC 3339 with milliseconds, UTC.
    #[serde(borrow)]
    pub at: Cow<'a, str>,
    #[serde(borrow)]
    #[schemars(with = "serde_json::Value")]
    pub data: &'a RawValue,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
}

/// The `event` frame: what readers get, live, replayed and (without `type`) over HTTP.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EventFrame<'a> {
    #[schemars(extend("const" = "event"))]
    pub r#type: &'static str,
    pub thread: &'a str,
    /// The event's place in its thread: 1, 2, 3 … Pieces of a message that is being written (`agent_token`) have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    pub kind: &'a str,
    /// UUIDv7.
    pub event: uuid::Uuid,
    /// The user who published it.
    pub from: &'a str,
    /// RFC 3339 with milliseconds, UTC.
    pub at: &'a str,
    #[schemars(with = "serde_json::Value")]
    pub data: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// Which delivery of the event this is, if not the first: 2, 3 …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
}

/// Every event frame begins with these bytes; over HTTP an event goes without its `type`.
const TYPE_PREFIX: &str = r#"{"type":"event","#;

impl<'a> LogEvent<'a> {
    /// The event as its readers get it.
    pub fn frame(&'a self, seq: u64) -> EventFrame<'a> {
        EventFrame {
            r#type: "event",
            thread: &self.thread,
            seq: Some(seq),
            kind: &self.kind,
            event: self.event,
            from: &self.from,
            at: &self.at,
            data: self.data,
            key: self.key.as_deref(),
            run: self.run.as_deref(),
            parent: self.parent,
            priority: self.priority,
            attempt: None,
        }
    }

    /// What makes two publishes with one key the same: kind, data (white space aside), run, parent and priority.
    pub fn content_digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.kind.as_bytes()).update(&[0]);
        hash_compact(&mut hasher, self.data.get());
        hasher.update(&[0]).update(self.run.as_deref().unwrap_or("").as_bytes());
        hasher.update(&[0]).update(&self.parent.unwrap_or(0).to_be_bytes());
        hasher.update(&[self.priority.map_or(0, |p| p as u8 + 1)]);
        *hasher.finalize().as_bytes()
    }
}

/// Hashes JSON without the white space between its tokens.
fn hash_compact(hasher: &mut blake3::Hasher, json: &str) {
    let bytes = json.as_bytes();
    let (mut in_string, mut escaped, mut start) = (false, false, 0);
    for (i, b) in bytes.iter().enumerate() {
        if in_string {
            match b {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else if *b == b'"' {
            in_string = true;
        } else if b.is_ascii_whitespace() {
            hasher.update(&bytes[start..i]);
            start = i + 1;
        }
    }
    hasher.update(&bytes[start..]);
}

/// An event frame as HTTP pages carry it: the same object without `type`.
pub fn without_type(frame: &str) -> String {
    match frame.strip_prefix(TYPE_PREFIX) {
        Some(rest) => format!("{{{rest}"),
        None => frame.to_owned(),
    }
}

/// The frame as a redelivery: with its `attempt` (2, 3 …).
pub fn with_attempt(frame: &str, attempt: u32) -> String {
    match frame.strip_suffix('}') {
        Some(rest) => format!(r#"{rest},"attempt":{attempt}}}"#),
        None => frame.to_owned(),
    }
}

/// The frame with the thread called as its reader calls it. In every frame that has one, the thread stands right behind the
/// type.
pub fn with_thread(frame: &str, thread: &str, called: &str) -> String {
    // Strings always serialise.
    let field = |name: &str| format!(r#","thread":{}"#, serde_json::to_string(name).unwrap_or_default());
    let behind_type = frame.find(',').unwrap_or(0);
    let (begin, rest) = frame.split_at(behind_type);
    match rest.strip_prefix(&field(thread)) {
        Some(rest) => format!("{begin}{}{rest}", field(called)),
        None => frame.to_owned(),
    }
}

/// The next link of a thread's hash chain: BLAKE3 of the link before, the seq (big-endian) and the record's value.
pub fn chain(previous: &[u8; 32], seq: u64, value: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous).update(&seq.to_be_bytes()).update(value);
    *hasher.finalize().as_bytes()
}

/// Kinds that only the server writes.
pub const THREAD_CREATED: &str = "thread_created";
pub const THREAD_UPDATED: &str = "thread_updated";
pub const MEMBER_ADDED: &str = "member_added";
pub const MEMBER_REMOVED: &str = "member_removed";
/// In a user's inbox: its sessions were ended, and its tokens issued until then are refused.
pub const SESSIONS_REVOKED: &str = "sessions_revoked";

pub const AGENT_MESSAGE: &str = "agent_message";
/// A piece of a message that an agent is writing.
pub const AGENT_TOKEN: &str = "agent_token";

/// `data` of `agent_token`. Characters are Unicode scalar values.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PieceData<'a> {
    /// The message that is being written, 1–128 characters; each run has its own.
    #[serde(borrow)]
    pub message: Cow<'a, str>,
    /// The characters of the message before this piece.
    pub from_char: u64,
    #[serde(borrow)]
    pub text: Cow<'a, str>,
}

impl<'a> PieceData<'a> {
    /// The same with its values checked.
    pub fn parse(data: &'a RawValue) -> Result<PieceData<'a>, Error> {
        let in_data = |error: Error| {
            let field = error.field.as_deref().map_or("data".to_owned(), |field| format!("data.{field}"));
            error.at(field)
        };
        let piece: PieceData = crate::command::from_json(data.get()).map_err(in_data)?;
        ids::check_text("data.message", &piece.message)?;
        if piece.from_char > u64::from(u32::MAX) {
            return Err(Error::field("data.from_char", "data.from_char is out of range"));
        }
        Ok(piece)
    }

    /// Behind the last character.
    pub fn to_char(&self) -> u64 {
        self.from_char.saturating_add(self.text.chars().count() as u64)
    }
}

/// The text of a message's `content`: a string, or the texts of its parts.
pub fn text_of(content: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Content<'a> {
        #[serde(borrow)]
        Text(Cow<'a, str>),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    struct Part {
        #[serde(default)]
        text: String,
    }
    Some(match serde_json::from_str(content.get()).ok()? {
        Content::Text(text) => text.into_owned(),
        Content::Parts(parts) => parts.into_iter().map(|part| part.text).collect(),
    })
}

/// What may be published, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KindClass {
    /// `user_message`, `system_message`: `data.content` is checked.
    Message,
    /// `agent_message`: the same, and an agent may write it wherever it works. One that closes a message written in pieces
    /// may leave the content to them.
    AgentMessage,
    /// `agent_token`: an agent event that gets no seq.
    Token,
    /// An agent event: needs `run` and scope `agent`, except the two that any member may write.
    Agent { member_may: bool, required: &'static [&'static str] },
    /// `x.<name>`: kept as it is.
    Custom,
}

/// The class of a kind that a client wants to publish.
pub fn classify(kind: &str) -> Result<KindClass, Error> {
    let agent = |required| Ok(KindClass::Agent { member_may: false, required });
    let member = |required| Ok(KindClass::Agent { member_may: true, required });
    match kind {
        "user_message" | "system_message" => Ok(KindClass::Message),
        AGENT_MESSAGE => Ok(KindClass::AgentMessage),
        AGENT_TOKEN => Ok(KindClass::Token),
        "agent_started" => agent(&["agent"]),
        "agent_thinking" => agent(&[]),
        "tool_executing" => agent(&["tool", "call"]),
        "tool_completed" => agent(&["call"]),
        "agent_waiting" => agent(&["reason"]),
        "agent_completed" => agent(&[]),
        "agent_failed" => agent(&["code", "message"]),
        "agent_cancelled" => agent(&[]),
        "agent_resumed" => member(&[]),
        "agent_cancel_requested" => member(&[]),
        THREAD_CREATED | THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED | SESSIONS_REVOKED => {
            Err(Error::field("kind", format!("{kind} is written by the server alone")))
        }
        _ if kind.strip_prefix("x.").is_some_and(|name| !name.is_empty() && kind.len() <= 128) => Ok(KindClass::Custom),
        _ => Err(Error::field("kind", "kind is none of the contract's kinds and not x.<name> of at most 128 bytes")),
    }
}

/// Checks that `data` has the shape its kind asks for.
pub fn check_data(class: KindClass, data: &RawValue) -> Result<(), Error> {
    match class {
        KindClass::Custom => Ok(()),
        KindClass::Message => check_message(data, false),
        KindClass::AgentMessage => check_message(data, true),
        KindClass::Token => PieceData::parse(data).map(drop),
        KindClass::Agent { required, .. } => check_agent(required, data),
    }
}

/// Agent events belong to a run; a piece is not in the thread's order, and replies to nothing there.
pub fn check_place(class: KindClass, run: Option<&str>, parent: Option<u64>) -> Result<(), Error> {
    if matches!(class, KindClass::Agent { .. } | KindClass::Token) && run.is_none() {
        return Err(Error::field("run", "an agent event needs a run"));
    }
    if class == KindClass::Token && parent.is_some() {
        return Err(Error::field("parent", "a piece replies to nothing: the agent_message that closes it does"));
    }
    Ok(())
}

fn check_message(data: &RawValue, may_close: bool) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow)]
        content: Option<&'a RawValue>,
        #[serde(borrow)]
        message: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Part<'a> {
        #[serde(borrow)]
        #[expect(dead_code, reason = "only its presence and type are wanted")]
        r#type: Cow<'a, str>,
    }
    let bad = || {
        Error::field(
            "data.content",
            "data must be an object whose content is a string or a list of parts, each with a type",
        )
    };
    let message: Message = serde_json::from_str(data.get()).map_err(|_| bad())?;
    match message.content.map(RawValue::get) {
        None if may_close && message.message.is_some_and(|name| name.get().starts_with('"')) => Ok(()),
        Some(text) if text.starts_with('"') => Ok(()),
        Some(text) if serde_json::from_str::<Vec<Part>>(text).is_ok() => Ok(()),
        _ => Err(bad()),
    }
}

fn check_agent(required: &[&'static str], data: &RawValue) -> Result<(), Error> {
    let fields: std::collections::HashMap<Cow<str>, &RawValue> =
        serde_json::from_str(data.get()).map_err(|_| Error::field("data", "data must be an object"))?;
    for name in required {
        if !fields.get(*name).is_some_and(|value| value.get().starts_with('"')) {
            return Err(Error::field(format!("data.{name}"), format!("data.{name} must be a string")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(data: &str) -> [u8; 32] {
        let raw: &RawValue = serde_json::from_str(data).expect("test data is JSON");
        LogEvent {
            tenant: "t".into(),
            thread: "x".into(),
            kind: "x.y".into(),
            event: uuid::Uuid::nil(),
            from: "u".into(),
            at: "1970-01-01T00:00:00.000Z".into(),
            data: raw,
            key: None,
            run: None,
            parent: None,
            priority: None,
        }
        .content_digest()
    }

    #[test]
    fn white_space_between_tokens_does_not_change_the_content() {
        assert_eq!(digest(r#"{"a": [1, "b c"]}"#), digest(r#"{"a":[1,"b c"]}"#));
    }

    #[test]
    fn frames_are_changed_in_their_thread_and_attempt_alone() {
        let frame = r#"{"type":"event","thread":"@user:a\"b","seq":1,"data":{}}"#;
        assert_eq!(with_thread(frame, "@user:a\"b", "@me"), r#"{"type":"event","thread":"@me","seq":1,"data":{}}"#);
        assert_eq!(with_thread(frame, "other", "@me"), frame);
        assert!(with_attempt(frame, 2).ends_with(r#""data":{},"attempt":2}"#));
    }

    #[test]
    fn white_space_inside_strings_does() {
        assert_ne!(digest(r#"{"a":"b c"}"#), digest(r#"{"a":"bc"}"#));
        assert_ne!(digest(r#"{"a":"\" c"}"#), digest(r#"{"a":"\"c"}"#));
    }

    #[test]
    fn messages_need_content_and_agent_events_their_fields() {
        let check = |kind: &str, data: &str| {
            let raw: &RawValue = serde_json::from_str(data).expect("test data is JSON");
            check_data(classify(kind).expect("a known kind"), raw)
        };
        assert!(check("user_message", r#"{"content":"hi","more":1}"#).is_ok());
        assert!(check("user_message", r#"{"content":[{"type":"text","text":"hi"}]}"#).is_ok());
        for bad in ["{}", r#"{"content":1}"#, r#"{"content":[{}]}"#, "[]", "\"hi\"", "null"] {
            assert_eq!(check("user_message", bad).expect_err(bad).field.as_deref(), Some("data.content"));
        }
        assert!(check("tool_executing", r#"{"tool":"t","call":"c"}"#).is_ok());
        assert_eq!(
            check("tool_executing", r#"{"tool":"t"}"#).expect_err("call is missing").field.as_deref(),
            Some("data.call")
        );
    }
}
