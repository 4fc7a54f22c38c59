//! Many publishes in one HTTP request, each with an outcome of its own.

use std::borrow::Cow;
use std::fmt;

use schemars::JsonSchema;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::command::{MAX_COMMANDS, check_content};
use super::error::{Code, Error};
use super::event::Priority;
use super::http::PublishReply;
use super::{ids, json};

/// The largest body. A quarter of what the projector takes from the log at a time, so that the records of others still get
/// into the same commit.
pub const MAX_BATCH_BYTES: usize = 1 << 20;

/// The body of `POST /v1/events`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchBody<'a> {
    /// 1 to 1,000, appended in this order.
    #[serde(borrow)]
    #[schemars(with = "Vec<BatchPublish>", extend("minItems" = 1, "maxItems" = MAX_COMMANDS))]
    events: RawEvents<'a>,
}

impl<'a> BatchBody<'a> {
    /// The events, not parsed yet: each fails on its own.
    pub fn checked(self) -> Result<Vec<&'a RawValue>, Error> {
        match self.events {
            RawEvents { count, .. } if !(1..=MAX_COMMANDS).contains(&count) => {
                Err(Error::field("events", format!("events has 1 to {MAX_COMMANDS} entries, not {count}")))
            }
            RawEvents { first, .. } => Ok(first),
        }
    }
}

/// A list that is kept up to its limit and counted beyond, so that a body of nothing but commas costs no more than its bytes.
struct RawEvents<'a> {
    first: Vec<&'a RawValue>,
    count: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for RawEvents<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawEvents<'a>, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = RawEvents<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawEvents<'de>, A::Error> {
                let mut events = RawEvents { first: Vec::new(), count: 0 };
                while events.count < MAX_COMMANDS {
                    let Some(event) = list.next_element()? else { return Ok(events) };
                    events.first.push(event);
                    events.count += 1;
                }
                while list.next_element::<IgnoredAny>()?.is_some() {
                    events.count += 1;
                }
                Ok(events)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// One publish of a batch.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchPublish<'a> {
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    #[serde(borrow)]
    #[schemars(with = "serde_json::Value")]
    pub data: &'a RawValue,
    /// Idempotency key, at most 128 characters.
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 128))]
    pub key: Option<Cow<'a, str>>,
    #[serde(default)]
    pub priority: Option<Priority>,
    /// The run an agent event belongs to, 1–128 characters.
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 128))]
    pub run: Option<Cow<'a, str>>,
    /// The seq this replies to.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub parent: Option<u64>,
}

impl<'a> BatchPublish<'a> {
    /// Reads one strictly and checks its values, as the command `publish` is.
    pub fn read(text: &'a str) -> Result<BatchPublish<'a>, Error> {
        let publish: BatchPublish = json::decode(text)?;
        ids::check_address(&publish.thread)?;
        check_content(publish.data, publish.key.as_deref(), publish.run.as_deref(), publish.parent)?;
        Ok(publish)
    }
}

/// The answer to `POST /v1/events`.
#[derive(Serialize, JsonSchema)]
pub struct BatchReply<'a> {
    /// In the order of the request.
    pub items: Vec<BatchItem<'a>>,
}

/// What became of one publish: it has its place in the thread, or it was refused.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub enum BatchItem<'a> {
    Published(PublishReply<'a>),
    Refused(BatchRefusal<'a>),
}

/// Why one of several publishes is no event. The others are not affected.
#[derive(Serialize, JsonSchema)]
pub struct BatchRefusal<'a> {
    pub code: Code,
    pub message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<&'a str>,
    /// The same publish may work later, unchanged.
    pub temporary: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// `unknown`: the log did not answer in time. Send it again with its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
}

impl<'a> BatchRefusal<'a> {
    pub fn of(error: &'a Error) -> BatchRefusal<'a> {
        BatchRefusal {
            code: error.code,
            message: &error.message,
            field: error.field.as_deref(),
            temporary: error.code.temporary(),
            retry_after_ms: error.retry_after_ms,
            outcome: error.outcome_unknown.then_some("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<usize, (Code, Option<String>)> {
        let events = json::decode::<BatchBody>(body).and_then(BatchBody::checked);
        events.map(|all| all.len()).map_err(|error| (error.code, error.field.map(Cow::into_owned)))
    }

    #[test]
    fn a_batch_has_one_to_a_thousand_events_and_what_they_are_is_not_looked_at_yet() {
        assert_eq!(read(r#"{"events":[{"thread":1},5]}"#), Ok(2));
        let of = |n: usize| format!(r#"{{"events":[{}]}}"#, vec!["{}"; n].join(","));
        let events = || Some("events".to_owned());
        assert_eq!(read(&of(1_000)), Ok(1_000));
        assert_eq!(read(&of(1_001)), Err((Code::BadRequest, events())));
        for bad in [r#"{"events":[]}"#, r#"{"events":{}}"#, r#"{"events":null}"#, "{}"] {
            assert_eq!(read(bad), Err((Code::BadRequest, events())), "{bad}");
        }
        assert_eq!(read(r#"{"events":[{}],"more":1}"#), Err((Code::BadRequest, Some("more".into()))));
    }

    #[test]
    fn each_event_is_read_as_strictly_as_a_single_publish() {
        let field = |text: &str| BatchPublish::read(text).expect_err(text).field.map(Cow::into_owned);
        for (text, at_fault) in [
            (r#"{"kind":"x.a","data":1}"#, "thread"),
            (r#"{"thread":".t","kind":"x.a","data":1}"#, "thread"),
            (r#"{"thread":"t","kind":"x.a"}"#, "data"),
            (r#"{"thread":"t","kind":"x.a","data":"\ud800"}"#, "data"),
            (r#"{"thread":"t","kind":"x.a","data":1,"key":""}"#, "key"),
            (r#"{"thread":"t","kind":"x.a","data":1,"parent":0}"#, "parent"),
            (r#"{"thread":"t","kind":"x.a","data":1,"id":1}"#, "id"),
            (r#"{"thread":"t","kind":"x.a","data":1,"kind":"x.b"}"#, "kind"),
        ] {
            assert_eq!(field(text).as_deref(), Some(at_fault), "{text}");
        }
        assert!(BatchPublish::read(r#"["t","x.a",1]"#).is_err());
    }
}
