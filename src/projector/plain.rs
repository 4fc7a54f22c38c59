//! Events that another program's producer wrote into the log, without Weft's headers: held to what the edge holds a client to.
//!
//! Which rules such a record is judged by, if it does not say: by the newest that a record named before it in its partition,
//! or that the log was made under. So each node and each rebuild judges it alike, and one that was foreign stays foreign.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::dead_letters::{Broken, ForeignSource};
use super::judge::BatchState;
use super::{Projector, RecordError, log_time, rules};
use crate::clock;
use crate::log::{Foreign, MISPLACED, Plain, Position, Record, Topic};
use crate::protocol::command::check_content;
use crate::protocol::error::Error;
use crate::protocol::event::{Fields, LogEvent};
use crate::protocol::ids::SERVER_USER;
use crate::protocol::{ids, json, kinds};

/// Why a record does not become an event.
enum Unfit {
    /// It is none.
    Foreign(String),
    Broken(Broken),
}

impl Projector {
    /// What is no record of Weft's: an event of another program's, if the rules know such; or foreign.
    pub(super) fn apply_plain(
        &mut self,
        at: Position,
        foreign: &Foreign,
        state: &mut BatchState<'_>,
    ) -> Result<(), RecordError> {
        let Some(plain) = &foreign.plain else { return Err(foreign.clone().into()) };
        let rules = plain.rules.unwrap_or_else(|| self.rules_in(at.partition));
        if rules < rules::PLAIN_EVENTS {
            return Err(foreign.clone().into());
        }
        let broken = match read(foreign, plain, rules) {
            Ok(record) => return self.apply_event(at.partition, &record, state),
            Err(Unfit::Foreign(why)) => return Err(Foreign { why, ..foreign.clone() }.into()),
            Err(Unfit::Broken(broken)) => broken,
        };
        tracing::warn!(position = %at, broken.error, "an event of another program's is not what it has to be");
        let newest = log_time::newest(&self.partitions[at.partition as usize].progress);
        if let Some((topic, partition)) = self.names.get(at.partition) {
            let source = ForeignSource { topic, partition, offset: at.offset };
            state.dead_letters.put_broken(&mut state.tx, &source, foreign, broken, newest)?;
        }
        Ok(())
    }
}

/// The record of an event, as a server would have written it.
fn read(foreign: &Foreign, plain: &Plain, rules: u16) -> Result<Record, Unfit> {
    let none = |why: &str| Unfit::Foreign(why.to_owned());
    if plain.misplaced {
        return Err(none(MISPLACED));
    }
    let key = foreign.key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
    let key = key.ok_or_else(|| none("it has no key, or one that is not UTF-8"))?;
    let (tenant, thread) = key.split_once('/').ok_or_else(|| none("the key is not tenant/thread"))?;
    let names = ids::check_name("tenant", tenant).and(ids::check_thread(thread));
    names.map_err(|error| Unfit::Foreign(format!("the key is not tenant/thread: {}", error.message)))?;

    let value = foreign.value.clone().ok_or_else(|| none("it has no value"))?;
    let fields = serde_json::from_slice::<&RawValue>(&value).ok().and_then(Fields::parse);
    let fields = fields.ok_or_else(|| none("the value is not an event: not a JSON object"))?;
    let named = (fields.string("tenant"), fields.string("thread"));
    if (named.0.as_deref(), named.1.as_deref()) != (Some(tenant), Some(thread)) {
        return Err(none("the key is not tenant/thread of the value"));
    }

    // From here on it is an event.
    match check(&value) {
        Ok(kind) => Ok(Record {
            topic: Topic::Events,
            key: key.to_owned(),
            kind,
            rules,
            grant: plain.grant,
            traceparent: plain.traceparent.clone(),
            value: value.clone(),
        }),
        Err(error) => Err(Unfit::Broken(Broken {
            tenant: tenant.to_owned(),
            thread: thread.to_owned(),
            kind: fields.string("kind").filter(|kind| ids::check_text("kind", kind).is_ok()),
            from: fields.string("from").filter(|from| ids::check_name("from", from).is_ok()),
            error: in_words(&error),
        })),
    }
}

/// What the edge checks of a publish, and what it fills in itself. Gives the event's kind.
fn check(value: &[u8]) -> Result<String, Error> {
    let event: LogEvent<'_> = json::decode_bytes(value)?;
    ids::check_name("from", &event.from)?;
    if event.from == SERVER_USER {
        return Err(Error::field("from", format!("from must not be {SERVER_USER}: that is the server's own user")));
    }
    if event.event.get_version_num() != 7 {
        return Err(Error::field("event", "event must be a UUIDv7"));
    }
    if clock::parse_rfc3339(&event.at).is_none() {
        return Err(Error::field("at", "at must be RFC 3339"));
    }
    let class = kinds::classify(&event.kind)?;
    check_content(event.data, event.key.as_deref(), event.run.as_deref(), event.parent)?;
    kinds::check_data(class, event.data)?;
    kinds::check_place(class, event.run.as_deref(), event.parent)?;
    kinds::check_answer(&event.kind, event.parent)?;
    Ok(event.kind.into_owned())
}

/// The error with the field that it is about.
fn in_words(error: &Error) -> String {
    let message: &Cow<'static, str> = &error.message;
    match &error.field {
        Some(field) if !message.contains(&**field) => format!("{field}: {message}"),
        _ => message.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::log::Grant;

    fn event() -> Value {
        json!({
            "tenant": "acme", "thread": "t", "kind": "user_message", "event": clock::event_id(), "from": "erp",
            "at": "2026-11-27T01:02:03.456Z", "data": {"content": "hello"},
        })
    }

    /// What becomes of a record with this key and value: its kind, or why not, and whether it is an event at all.
    fn judged(key: &str, value: &str) -> Result<String, (bool, String)> {
        let plain = Plain { rules: None, grant: Grant::Scope, traceparent: None, misplaced: false };
        let (key, value) = (Some(key.to_owned().into()), Some(value.to_owned().into()));
        let foreign = Foreign { key, value, ..Foreign::default() };
        match read(&foreign, &plain, rules::PLAIN_EVENTS) {
            Ok(record) => Ok(record.kind),
            Err(Unfit::Foreign(why)) => Err((false, why)),
            Err(Unfit::Broken(broken)) => Err((true, broken.error)),
        }
    }

    #[test]
    fn an_event_of_another_programs_is_held_to_what_a_client_is_held_to_and_its_error_names_the_field() {
        assert_eq!(judged("acme/t", &event().to_string()), Ok("user_message".to_owned()));
        let changed: [(&str, Value, &str); 16] = [
            ("kind", json!("thread_created"), "kind"),
            ("kind", json!("order"), "kind"),
            ("kind", json!("letter_requeued"), "kind"),
            ("kind", json!(7), "kind"),
            ("event", json!("7"), "event"),
            ("event", json!(clock::random_id()), "event"),
            ("from", json!("a b"), "from"),
            ("from", json!("weft"), "from"),
            ("at", json!("yesterday"), "at"),
            ("data", json!({}), "data.content"),
            ("data", json!({"content": "x".repeat(70_000)}), "data"),
            ("key", json!(""), "key"),
            ("run", json!("x".repeat(129)), "run"),
            ("parent", json!(0), "parent"),
            ("priority", json!("urgent"), "priority"),
            ("colour", json!("red"), "colour"),
        ];
        for (field, value, named) in changed {
            let mut event = event();
            event[field] = value.clone();
            let (is_event, error) = judged("acme/t", &event.to_string()).expect_err(field);
            assert!(is_event && error.contains(named), "{field}: {error}");
        }
        for field in ["kind", "event", "from", "at", "data"] {
            let mut event = event();
            event.as_object_mut().expect("an object").remove(field);
            let (is_event, error) = judged("acme/t", &event.to_string()).expect_err(field);
            assert!(is_event && error.contains(field), "{field}: {error}");
        }
        let mut answer = event();
        (answer["kind"], answer["run"], answer["data"]) = (json!("agent_resumed"), json!("r"), json!({}));
        assert!(judged("acme/t", &answer.to_string()).is_err_and(|(is_event, why)| is_event && why.contains("parent")));
    }

    #[test]
    fn what_is_no_event_at_all_is_foreign() {
        let event = event().to_string();
        for (key, value) in [
            ("acme/t", "garbage"),
            ("acme/t", "[]"),
            ("acme/t", "{}"),
            ("acme/t", r#"{"tenant":"acme","thread":7}"#),
            ("acme/u", &event),
            ("globex/t", &event),
            ("acme", &event),
            ("weft", &event),
            ("acme/@me", &event),
        ] {
            assert!(matches!(judged(key, value), Err((false, _))), "{key}: {value}");
        }
    }
}
