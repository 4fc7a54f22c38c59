//! The kinds of events: what each is called, who may publish it, and what its `data` must be.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::Error;
use super::event::Fields;
use super::{ids, json};

pub const USER_MESSAGE: &str = "user_message";
pub const SYSTEM_MESSAGE: &str = "system_message";
pub const AGENT_MESSAGE: &str = "agent_message";

pub const AGENT_STARTED: &str = "agent_started";
pub const AGENT_THINKING: &str = "agent_thinking";
pub const TOOL_EXECUTING: &str = "tool_executing";
pub const TOOL_COMPLETED: &str = "tool_completed";
/// A delta: a part of a message that an agent is still writing.
pub const AGENT_TOKEN: &str = "agent_token";
pub const AGENT_WAITING: &str = "agent_waiting";
pub const AGENT_RESUMED: &str = "agent_resumed";
pub const AGENT_CANCEL_REQUESTED: &str = "agent_cancel_requested";
pub const AGENT_COMPLETED: &str = "agent_completed";
pub const AGENT_FAILED: &str = "agent_failed";
pub const AGENT_CANCELLED: &str = "agent_cancelled";

/// Kinds that only the server writes.
pub const THREAD_CREATED: &str = "thread_created";
pub const THREAD_UPDATED: &str = "thread_updated";
pub const MEMBER_ADDED: &str = "member_added";
pub const MEMBER_REMOVED: &str = "member_removed";
/// In a user's inbox: its sessions were ended, and its tokens issued until then are refused.
pub const SESSIONS_REVOKED: &str = "sessions_revoked";

/// Records that are about a ticket and no events: nobody reads them in a thread.
pub const TICKET_ISSUED: &str = "ticket_issued";
pub const TICKET_USED: &str = "ticket_used";

/// Records of what somebody does about a dead letter, and no events either.
pub const LETTER_REQUEUED: &str = "letter_requeued";
pub const LETTER_DISCARDED: &str = "letter_discarded";
pub const LETTER_SETTLED: &str = "letter_settled";
/// A delivery that was requeued was sent and not acknowledged in time, and will be sent again.
pub const LETTER_TRIED: &str = "letter_tried";

/// Records about groups and their work, which are no events either.
pub const GROUP_SET: &str = "group_set";
pub const GROUP_PAUSED: &str = "group_paused";
pub const GROUP_RESUMED: &str = "group_resumed";
pub const GROUP_DELETED: &str = "group_deleted";
pub const WORK_LEASED: &str = "work_leased";
pub const WORK_SETTLED: &str = "work_settled";
pub const WORK_OVERFLOWED: &str = "work_overflowed";
pub const WORK_PAUSED: &str = "work_paused";
pub const WORK_RESUMED: &str = "work_resumed";

/// Records about custom kinds, which are no events either.
pub const KIND_SET: &str = "kind_set";
pub const KIND_DELETED: &str = "kind_deleted";

/// `data` of `agent_token`. Characters are Unicode scalar values.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeltaData<'a> {
    /// The message that is being written, 1–128 characters; each run has its own.
    #[serde(borrow)]
    pub message: Cow<'a, str>,
    /// The characters of the message before this delta.
    pub from_char: u64,
    #[serde(borrow)]
    pub text: Cow<'a, str>,
    /// The message begins anew with this delta, whose `from_char` is 0: its text so far is dropped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

impl<'a> DeltaData<'a> {
    /// The same with its values checked.
    pub fn parse(data: &'a RawValue) -> Result<DeltaData<'a>, Error> {
        let delta: DeltaData = json::decode(data.get()).map_err(json::in_data)?;
        ids::check_text("data.message", &delta.message)?;
        if delta.from_char > u64::from(u32::MAX) {
            return Err(Error::field("data.from_char", "data.from_char is out of range"));
        }
        delta.check_restart()?;
        Ok(delta)
    }

    /// What begins a message anew begins at its first character.
    pub fn check_restart(&self) -> Result<(), Error> {
        if self.restart && self.from_char > 0 {
            let why =
                format!("data.from_char ({}) must be 0 with data.restart: the message begins anew", self.from_char);
            return Err(Error::field("data.from_char", why));
        }
        Ok(())
    }

    /// The characters of the message up to the end of this delta.
    pub fn to_char(&self) -> u64 {
        self.from_char.saturating_add(self.text.chars().count() as u64)
    }
}

/// The text of a message's `content`: a string, or the texts of its parts.
pub fn text_of(content: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum TextOrParts<'a> {
        #[serde(borrow)]
        Text(Cow<'a, str>),
        Parts(Vec<PartText>),
    }
    #[derive(Deserialize)]
    struct PartText {
        #[serde(default)]
        text: String,
    }
    Some(match serde_json::from_str(content.get()).ok()? {
        TextOrParts::Text(text) => text.into_owned(),
        TextOrParts::Parts(parts) => parts.into_iter().map(|part| part.text).collect(),
    })
}

/// What may be published, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KindClass {
    /// `user_message`: `data.content` is checked.
    UserMessage,
    /// `system_message`: the same, and models obey it, so that it needs scope `agent` or `admin`.
    SystemMessage,
    /// `agent_message`: needs scope `agent`, with which it may be written in every thread. One that closes a message
    /// written in deltas may leave its content to them.
    AgentMessage,
    /// `agent_token`: an agent event that gets no seq.
    Token,
    /// An agent event: needs `run` and scope `agent`, except the two that any member may write.
    Agent { member_may: bool, required: &'static [&'static str] },
    /// `x.<name>`: kept as it is, and held to its schema if the tenant has set one.
    Custom,
}

/// The class of a kind that a client wants to publish.
pub fn classify(kind: &str) -> Result<KindClass, Error> {
    let agent = |required| Ok(KindClass::Agent { member_may: false, required });
    let member = |required| Ok(KindClass::Agent { member_may: true, required });
    match kind {
        USER_MESSAGE => Ok(KindClass::UserMessage),
        SYSTEM_MESSAGE => Ok(KindClass::SystemMessage),
        AGENT_MESSAGE => Ok(KindClass::AgentMessage),
        AGENT_TOKEN => Ok(KindClass::Token),
        AGENT_STARTED => agent(&["agent"]),
        AGENT_THINKING => agent(&[]),
        TOOL_EXECUTING => agent(&["tool", "call"]),
        TOOL_COMPLETED => agent(&["call"]),
        AGENT_WAITING => agent(&["reason"]),
        AGENT_COMPLETED => agent(&[]),
        AGENT_FAILED => agent(&["code", "message"]),
        AGENT_CANCELLED => agent(&[]),
        AGENT_RESUMED => member(&[]),
        AGENT_CANCEL_REQUESTED => member(&[]),
        THREAD_CREATED | THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED | SESSIONS_REVOKED | TICKET_ISSUED
        | TICKET_USED | GROUP_SET | GROUP_PAUSED | GROUP_RESUMED | GROUP_DELETED | WORK_LEASED | WORK_SETTLED
        | WORK_OVERFLOWED | WORK_PAUSED | WORK_RESUMED | KIND_SET | KIND_DELETED => {
            Err(Error::field("kind", format!("{kind} is written by the server alone")))
        }
        _ if kind.strip_prefix("x.").is_some_and(|name| !name.is_empty() && kind.len() <= 128) => Ok(KindClass::Custom),
        _ => {
            let why =
                format!("there is no kind {kind:.60}; kinds of your own are x.<name>, of at most 128 bytes in all");
            Err(Error::field("kind", why))
        }
    }
}

/// Checks that `data` has the shape its kind asks for.
pub fn check_data(class: KindClass, data: &RawValue) -> Result<(), Error> {
    match class {
        KindClass::Custom => Ok(()),
        KindClass::UserMessage | KindClass::SystemMessage => check_message(data, false),
        KindClass::AgentMessage => check_message(data, true),
        KindClass::Token => DeltaData::parse(data).map(drop),
        KindClass::Agent { required, .. } => check_agent(required, data),
    }
}

/// Agent events belong to a run; a delta is not in the thread's order, and replies to nothing there.
pub fn check_place(class: KindClass, run: Option<&str>, parent: Option<u64>) -> Result<(), Error> {
    if matches!(class, KindClass::Agent { .. } | KindClass::Token) && run.is_none() {
        return Err(Error::field("run", "an agent event needs a run"));
    }
    if class == KindClass::Token && parent.is_some() {
        return Err(Error::field("parent", "a delta replies to nothing: the agent_message that closes it does"));
    }
    Ok(())
}

/// An answer names its question: the seq of the `agent_waiting`. What a person sees may be another question than the one
/// that is open by the time that the answer arrives.
pub fn check_answer(kind: &str, parent: Option<u64>) -> Result<(), Error> {
    if kind == AGENT_RESUMED && parent.is_none() {
        let why = "an answer names its question: `parent` is the seq of the agent_waiting that it answers";
        return Err(Error::field("parent", why));
    }
    Ok(())
}

fn check_message(data: &RawValue, may_close: bool) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct MessageFields<'a> {
        #[serde(borrow)]
        content: Option<&'a RawValue>,
        #[serde(borrow)]
        message: Option<&'a RawValue>,
    }
    let bad = || {
        Error::field(
            "data.content",
            "data must be an object whose content is a string or a list of parts, each with a type",
        )
    };
    // Of an object alone: serde reads a list as a struct as well.
    if !is_object(data) {
        return Err(bad());
    }
    let fields: MessageFields = serde_json::from_str(data.get()).map_err(|_| bad())?;

    let closes = may_close && fields.message.is_some_and(is_string);
    match fields.content {
        None if closes => Ok(()),
        Some(content) if is_string(content) || is_list_of_parts(content) => Ok(()),
        _ => Err(bad()),
    }
}

/// Whether it is a list of objects, each with a `type` that is a string.
fn is_list_of_parts(content: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct PartType<'a> {
        #[serde(borrow)]
        #[expect(dead_code, reason = "only its presence and type are wanted")]
        r#type: Cow<'a, str>,
    }
    let Ok(parts) = serde_json::from_str::<Vec<&RawValue>>(content.get()) else { return false };
    parts.into_iter().all(|part| is_object(part) && serde_json::from_str::<PartType>(part.get()).is_ok())
}

fn check_agent(required: &[&'static str], data: &RawValue) -> Result<(), Error> {
    let fields = Fields::parse(data).ok_or_else(|| Error::field("data", "data must be an object"))?;
    for name in required {
        if !fields.raw(name).is_some_and(is_string) {
            return Err(Error::field(format!("data.{name}"), format!("data.{name} must be a string")));
        }
    }
    Ok(())
}

fn is_string(value: &RawValue) -> bool {
    value.get().starts_with('"')
}

fn is_object(value: &RawValue) -> bool {
    value.get().starts_with('{')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_publishes_what_the_server_alone_writes() {
        for kind in [
            TICKET_ISSUED,
            GROUP_SET,
            GROUP_PAUSED,
            GROUP_RESUMED,
            GROUP_DELETED,
            WORK_LEASED,
            WORK_SETTLED,
            WORK_PAUSED,
            KIND_SET,
            KIND_DELETED,
        ] {
            let refused = classify(kind).expect_err(kind);
            assert!(refused.message.contains("written by the server alone"), "{refused}");
        }
    }

    #[test]
    fn messages_need_content_and_agent_events_their_fields() {
        let check = |kind: &str, data: &str| {
            let raw: &RawValue = serde_json::from_str(data).expect("test data is JSON");
            check_data(classify(kind).expect("a known kind"), raw)
        };
        assert!(check("user_message", r#"{"content":"hi","more":1}"#).is_ok());
        assert!(check("user_message", r#"{"content":[{"type":"text","text":"hi"}]}"#).is_ok());
        let positional = [r#"["hi","m"]"#, r#"{"content":[["text"]]}"#];
        for bad in ["{}", r#"{"content":1}"#, r#"{"content":[{}]}"#, "[]", "\"hi\"", "null"].iter().chain(&positional) {
            assert_eq!(check("user_message", bad).expect_err(bad).field.as_deref(), Some("data.content"));
        }
        assert!(check("tool_executing", r#"{"tool":"t","call":"c"}"#).is_ok());
        assert_eq!(
            check("tool_executing", r#"{"tool":"t"}"#).expect_err("call is missing").field.as_deref(),
            Some("data.call")
        );
    }
}
