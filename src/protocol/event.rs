//! The event: what it is in the log, and the frame it is on the wire.
//!
//! The payload (`data`) is raw JSON from end to end: checked for its shape once at the edge, then carried as it came.

use std::borrow::Cow;
use std::collections::HashMap;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::json;

/// What a publisher may put in front of other events (delivery only; the order of a thread is its seq).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    High,
    Normal,
    Low,
}

/// A name and nothing else. Derived, it would be read from `{"high": null}` as well.
impl<'de> Deserialize<'de> for Priority {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Priority, D::Error> {
        match &*<Cow<'de, str>>::deserialize(deserializer)? {
            "high" => Ok(Priority::High),
            "normal" => Ok(Priority::Normal),
            "low" => Ok(Priority::Low),
            other => Err(serde::de::Error::unknown_variant(other, &["high", "normal", "low"])),
        }
    }
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

/// What stands around `data` in nearly every event.
const ENVELOPE: usize = 320;

impl LogEvent<'_> {
    /// The record's value.
    pub fn encode(&self) -> Vec<u8> {
        json::encode_into(self.data.get().len() + ENVELOPE, self)
    }
}

/// The `event` frame: what readers get, live and replayed. Over HTTP it is an [`EventItem`].
#[derive(Debug, Serialize, JsonSchema)]
pub struct EventFrame<'a> {
    #[schemars(extend("const" = "event"))]
    pub r#type: &'static str,
    pub thread: &'a str,
    /// The event's number in its thread: 1, 2, 3 … Deltas of a message that is being written (`agent_token`) have none.
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
    /// It is of a replay at a pace, and not live.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<bool>,
}

impl EventFrame<'_> {
    pub fn encode(&self) -> String {
        let text = json::encode_into(self.data.get().len() + ENVELOPE, self);
        String::from_utf8(text).expect("serde_json writes UTF-8")
    }
}

/// An event in a page or stream of HTTP: an [`EventFrame`] without its `type`. Only the schema is needed, since its text is
/// made of the frame's by [`without_type`].
pub struct EventItem;

impl JsonSchema for EventItem {
    fn schema_name() -> Cow<'static, str> {
        "EventItem".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = EventFrame::json_schema(generator);
        schema.insert("description".into(), "An event as pages and streams of HTTP have it.".into());
        if let Some(properties) = schema.get_mut("properties").and_then(|it| it.as_object_mut()) {
            properties.remove("type");
        }
        if let Some(required) = schema.get_mut("required").and_then(|it| it.as_array_mut()) {
            required.retain(|name| name != "type");
        }
        schema
    }
}

/// A stored event frame, read again: what views look at, borrowed from its text.
#[derive(Debug, Deserialize)]
pub struct StoredFrame<'a> {
    pub seq: Option<u64>,
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    #[serde(borrow)]
    pub event: Cow<'a, str>,
    #[serde(borrow)]
    pub from: Cow<'a, str>,
    #[serde(borrow)]
    pub at: Cow<'a, str>,
    #[serde(borrow)]
    pub data: &'a RawValue,
    #[serde(borrow)]
    pub run: Option<Cow<'a, str>>,
}

impl<'a> StoredFrame<'a> {
    /// `None` for a text that is no event frame; the server's own frames always are.
    pub fn parse(frame: &'a str) -> Option<StoredFrame<'a>> {
        serde_json::from_str(frame).ok()
    }

    /// The fields of `data`; none if it is no object.
    pub fn fields(&self) -> Fields<'a> {
        Fields::parse(self.data).unwrap_or_default()
    }
}

/// The fields of an event's `data`. Which of them mean something, and what they must be, depends on the event's kind; one of
/// another type than its reader expects counts as absent.
#[derive(Debug, Default)]
pub struct Fields<'a>(HashMap<Cow<'a, str>, &'a RawValue>);

impl<'a> Fields<'a> {
    /// `None` if the value is no object.
    pub fn parse(data: &'a RawValue) -> Option<Fields<'a>> {
        serde_json::from_str(data.get()).ok().map(Fields)
    }

    /// A field's JSON; `null` is the same as absence.
    pub fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.0.get(name).copied().filter(|value| value.get() != "null")
    }

    /// A field that is a string.
    pub fn string(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.raw(name)?.get()).ok()
    }

    /// A field as text; see [`text_of_value`].
    pub fn text(&self, name: &str) -> Option<String> {
        self.raw(name).map(text_of_value)
    }
}

/// A string as it is, anything else as its JSON.
pub fn text_of_value(value: &RawValue) -> String {
    serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned())
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
            replay: None,
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

/// The frame as one of a replay at a pace.
pub fn as_replay(frame: &str) -> String {
    match frame.strip_suffix('}') {
        Some(rest) => format!(r#"{rest},"replay":true}}"#),
        None => frame.to_owned(),
    }
}

/// When the event of a frame happened, as it says.
pub fn at_of(frame: &str) -> Option<&str> {
    // Before it there are texts, in which a quote never stands without a backslash.
    let (_, rest) = frame.split_once(r#","at":""#)?;
    Some(rest.split_once('"')?.0)
}

/// The frame with the thread called as its reader calls it. In every frame that has one, the thread comes right after the
/// type.
pub fn with_thread(frame: &str, thread: &str, called: &str) -> String {
    let field = |name: &str| format!(r#","thread":{}"#, json::encode(name));
    let type_end = frame.find(',').unwrap_or(0);
    let (begin, rest) = frame.split_at(type_end);
    match rest.strip_prefix(&field(thread)) {
        Some(rest) => format!("{begin}{}{rest}", field(called)),
        None => frame.to_owned(),
    }
}

/// The next link of a thread's hash chain: BLAKE3 of the link before, the seq (big-endian) and the record's value.
pub fn chain(previous: &[u8; 32], seq: u64, value: &[u8]) -> [u8; 32] {
    chain_parts(previous, seq, [value])
}

/// As [`chain`], of a value in several parts.
pub fn chain_parts<const N: usize>(previous: &[u8; 32], seq: u64, value: [&[u8]; N]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous).update(&seq.to_be_bytes());
    for part in value {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
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
    fn a_stored_frame_is_read_with_the_fields_of_its_data() {
        let frame = r#"{"type":"event","thread":"t","seq":1,"kind":"x.y","event":"e","from":"a\"b","at":"now",
            "data":{"text":"a\nb","list":[1, 2],"none":null},"run":"r"}"#;
        let frame = StoredFrame::parse(frame).expect("a frame");
        assert_eq!((frame.seq, &*frame.from, frame.run.as_deref()), (Some(1), "a\"b", Some("r")));
        let fields = frame.fields();
        assert_eq!((fields.string("text").as_deref(), fields.string("list")), (Some("a\nb"), None));
        assert_eq!((fields.text("text").as_deref(), fields.text("list").as_deref()), (Some("a\nb"), Some("[1, 2]")));
        assert!(fields.raw("none").is_none() && fields.raw("other").is_none());
        assert!(StoredFrame::parse("{}").is_none());
        assert!(Fields::parse(RawValue::NULL).is_none(), "null is no object");
    }

    #[test]
    fn frames_are_changed_in_their_thread_and_attempt_alone() {
        let frame = r#"{"type":"event","thread":"@user:a\"b","seq":1,"data":{}}"#;
        assert_eq!(with_thread(frame, "@user:a\"b", "@me"), r#"{"type":"event","thread":"@me","seq":1,"data":{}}"#);
        assert_eq!(with_thread(frame, "other", "@me"), frame);
        assert!(as_replay(frame).ends_with(r#""data":{},"replay":true}"#));
        assert!(with_attempt(frame, 2).ends_with(r#""data":{},"attempt":2}"#));
    }

    #[test]
    fn white_space_inside_strings_does() {
        assert_ne!(digest(r#"{"a":"b c"}"#), digest(r#"{"a":"bc"}"#));
        assert_ne!(digest(r#"{"a":"\" c"}"#), digest(r#"{"a":"\"c"}"#));
    }
}
