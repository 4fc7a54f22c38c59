//! What a client may ask over its WebSocket: parsed from a frame, bounded, with errors that name the field.
//!
//! The types here are the contract: `schemas/` is generated from them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::error::{Code, Error};
use super::event::Priority;
use super::work::Outcome;
use super::{ids, json, work};

/// The most commands one array frame may hold.
pub const MAX_COMMANDS: usize = 1_000;
/// The largest `data` of a publish, in bytes.
pub const MAX_DATA: usize = 64 * 1024;
/// Characters of what is searched for.
pub const MAX_SEARCH: usize = 2_000;
/// How much slower and faster than it happened a thread is replayed at most.
pub const SLOWEST: f64 = 0.01;
pub const FASTEST: f64 = 1_000_000.0;
/// The most kinds that a subscription may name.
const MAX_KINDS: usize = 100;
/// The largest frame and HTTP body, in bytes.
pub const MAX_FRAME: usize = 256 * 1024;

/// The `type` of a command struct: which one it is was decided before it is parsed.
type Tag = IgnoredAny;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["token"]}, {"required": ["session"]}]))]
pub struct Connect<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "connect"))]
    _type: Tag,
    pub id: i64,
    /// A JWT; this or `session`.
    #[serde(borrow, default)]
    pub token: Option<Cow<'a, str>>,
    /// A session of the auth service.
    #[serde(borrow, default)]
    pub session: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["token"]}, {"required": ["session"]}]))]
pub struct Refresh<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "refresh"))]
    _type: Tag,
    pub id: i64,
    /// A JWT of the same `sub` and `tenant`; this or `session`.
    #[serde(borrow, default)]
    pub token: Option<Cow<'a, str>>,
    /// A session of the same user.
    #[serde(borrow, default)]
    pub session: Option<Cow<'a, str>>,
}

/// Where a subscription begins: after this seq, or for `"*"` after one for each thread.
#[derive(Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(untagged)]
pub enum After {
    Seq(u64),
    Each(BTreeMap<String, u64>),
}

/// A replay at the pace at which the events happened.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Replay<'a> {
    /// How many times as fast: 0.01 to 1,000,000.
    #[schemars(range(min = 0.01, max = 1_000_000.0))]
    pub speed: f64,
    /// The replay's last event, with which the subscription ends. Without it, the replay ends at the head that `subscribed`
    /// names, and what came meanwhile follows, and then what is live.
    #[serde(borrow, default)]
    pub until: Option<Until<'a>>,
}

/// Where a replay ends: after this seq, or after this time (RFC 3339).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Until<'a> {
    Seq(u64),
    #[serde(borrow)]
    Time(Cow<'a, str>),
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Subscribe<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "subscribe"))]
    _type: Tag,
    pub id: i64,
    /// A thread, or `"*"`: all that the user is a member of, now and later.
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
    /// With `"*"`: all threads of the tenant, now and later, whoever their members are. Needs scope `analyst`.
    #[serde(default)]
    pub all: Option<bool>,
    #[serde(default)]
    pub after: Option<After>,
    /// Begin with the n newest events.
    #[serde(default)]
    pub last: Option<u64>,
    /// The log's epoch that `after` belongs to.
    #[serde(borrow, default)]
    pub epoch: Option<Cow<'a, str>>,
    /// A durable subscription of the user's: its place is kept in the log, and the same name goes on from there. 1–128
    /// characters.
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 128))]
    pub name: Option<Cow<'a, str>>,
    /// Events must be acknowledged; those that are not are sent again.
    #[serde(default)]
    pub confirm: Option<bool>,
    /// With `confirm`: how long the client has to acknowledge the oldest event, 1,000 to 3,600,000; 10,000 unless given.
    #[serde(default)]
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub ack_within_ms: Option<u64>,
    /// With `confirm`: how often an event is sent before it becomes a dead letter, 1 to 20; 5 unless given.
    #[serde(default)]
    #[schemars(range(min = 1, max = 20))]
    pub attempts: Option<u32>,
    /// Only events of these kinds, at most 100.
    #[serde(default)]
    #[schemars(length(min = 1, max = 100))]
    pub kinds: Option<Vec<String>>,
    /// Only events that have these words, as `q` of a search has them; at most 2,000 characters.
    #[serde(borrow, default)]
    #[schemars(length(max = 2_000))]
    pub search: Option<Cow<'a, str>>,
    /// Replay the thread at the pace at which it happened; its frames carry `replay`: true.
    #[serde(borrow, default)]
    pub replay: Option<Replay<'a>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ack<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "ack"))]
    _type: Tag,
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
    /// This event and all before it are acknowledged.
    pub seq: u64,
    /// The durable subscription; without it, whichever the session has for the thread.
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 128))]
    pub name: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Credit {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "credit"))]
    _type: Tag,
    /// So many more events may be sent; from the first one on, no more than that.
    #[schemars(range(min = 1))]
    pub events: u64,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signal<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "signal"))]
    _type: Tag,
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
    /// What is signalled, 1–128 characters.
    #[serde(borrow)]
    #[schemars(length(min = 1, max = 128))]
    pub kind: Cow<'a, str>,
    #[serde(borrow, default)]
    #[schemars(with = "Option<serde_json::Value>")]
    pub data: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Unsubscribe<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "unsubscribe"))]
    _type: Tag,
    pub id: i64,
    #[serde(borrow)]
    pub thread: Cow<'a, str>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Publish<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "publish"))]
    _type: Tag,
    pub id: i64,
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

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ping {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "ping"))]
    _type: Tag,
    pub id: i64,
}

/// From now on the session takes work of a group.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Consume<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "consume"))]
    _type: Tag,
    pub id: i64,
    /// A group that is not there is made with the defaults.
    #[serde(borrow)]
    pub group: Cow<'a, str>,
    /// Of the group's kinds only these; a group that is made wants these.
    #[serde(default)]
    pub kinds: Option<Vec<String>>,
    /// How much work the session may hold at once, at most 1,000; given again, it is this from then on, and 0 takes no more.
    #[schemars(range(max = 1_000))]
    pub credit: u32,
    /// How long its leases last, 1,000 to 3,600,000; as long as the group says unless given.
    #[serde(default)]
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub lease_ms: Option<u64>,
}

/// What became of work that the session has a lease on.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settle<'a> {
    #[serde(rename = "type")]
    #[schemars(with = "String", extend("const" = "settle"))]
    _type: Tag,
    /// With it, `settled` is the answer.
    #[serde(default)]
    pub id: Option<i64>,
    /// As `work` names it.
    #[serde(borrow)]
    pub delivery: Cow<'a, str>,
    pub outcome: Outcome,
    /// Of `retry` and `reject`: why, at most 1,000 characters.
    #[serde(borrow, default)]
    #[schemars(length(max = 1_000))]
    pub reason: Option<Cow<'a, str>>,
    /// Of `retry`: when to try again, at most 86,400,000; by the group's backoff unless given.
    #[serde(default)]
    #[schemars(range(max = 86_400_000))]
    pub delay_ms: Option<u64>,
}

/// One command, borrowed from its frame.
#[derive(Debug)]
pub enum Command<'a> {
    Connect(Connect<'a>),
    Refresh(Refresh<'a>),
    Subscribe(Subscribe<'a>),
    Unsubscribe(Unsubscribe<'a>),
    Publish(Publish<'a>),
    Ping(Ping),
    Ack(Ack<'a>),
    Credit(Credit),
    Signal(Signal<'a>),
    Consume(Consume<'a>),
    Settle(Settle<'a>),
}

impl Command<'_> {
    /// The command's `type`, for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Connect(_) => "connect",
            Command::Refresh(_) => "refresh",
            Command::Subscribe(_) => "subscribe",
            Command::Unsubscribe(_) => "unsubscribe",
            Command::Publish(_) => "publish",
            Command::Ping(_) => "ping",
            Command::Ack(_) => "ack",
            Command::Credit(_) => "credit",
            Command::Signal(_) => "signal",
            Command::Consume(_) => "consume",
            Command::Settle(_) => "settle",
        }
    }
}

/// A command that was refused, with its `id` where that could be read.
#[derive(Debug)]
pub struct BadCommand {
    pub id: Option<i64>,
    pub error: Error,
}

/// The commands of one frame: a single object, or an array of up to 1,000. `None`: the frame is not JSON of either shape.
pub fn split(frame: &str) -> Option<Result<Commands<'_>, Error>> {
    let text = frame.trim_ascii_start();
    if text.starts_with('{') {
        return serde_json::from_str::<&RawValue>(text).ok().map(|one| Ok(Commands::One(one)));
    }
    if !text.starts_with('[') {
        return None;
    }
    let all: Vec<&RawValue> = serde_json::from_str(text).ok()?;
    Some(match all.len() {
        0 => Err(Error::new(Code::BadRequest, "an array frame holds at least one command")),
        n if n > MAX_COMMANDS => {
            Err(Error::new(Code::TooLarge, format!("an array frame holds at most {MAX_COMMANDS} commands, not {n}")))
        }
        _ => Ok(Commands::Many(all)),
    })
}

/// The commands of one frame, not parsed yet: each fails on its own.
pub enum Commands<'a> {
    One(&'a RawValue),
    Many(Vec<&'a RawValue>),
}

impl<'a> Commands<'a> {
    pub fn as_slice(&self) -> &[&'a RawValue] {
        match self {
            Commands::One(one) => std::slice::from_ref(one),
            Commands::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
}

/// A command's `id`, if it can be read.
pub fn id_of(text: &str) -> Option<i64> {
    json::decode::<Head>(text).ok()?.id?.get().parse().ok()
}

/// Parses one command and checks its values.
pub fn parse(text: &str) -> Result<Command<'_>, BadCommand> {
    let head: Head = json::decode(text).map_err(|error| BadCommand { id: None, error })?;
    let id = head.id.and_then(|id| id.get().parse().ok());
    let command = match &*head.r#type {
        "publish" => json::decode(text).and_then(check_publish).map(Command::Publish),
        "subscribe" => json::decode(text).and_then(check_subscribe).map(Command::Subscribe),
        "unsubscribe" => json::decode(text).map(Command::Unsubscribe),
        "ping" => json::decode(text).map(Command::Ping),
        "ack" => json::decode(text).and_then(check_ack).map(Command::Ack),
        "credit" => json::decode(text).and_then(check_credit).map(Command::Credit),
        "signal" => json::decode(text).and_then(check_signal).map(Command::Signal),
        "consume" => json::decode(text).and_then(check_consume).map(Command::Consume),
        "settle" => json::decode(text).map(Command::Settle),
        "connect" => json::decode(text).and_then(check_connect).map(Command::Connect),
        "refresh" => json::decode(text).and_then(check_refresh).map(Command::Refresh),
        other => Err(Error::field("type", format!("there is no command {other:.40}"))),
    };
    command.map_err(|error| BadCommand { id, error })
}

fn check_connect(connect: Connect<'_>) -> Result<Connect<'_>, Error> {
    check_credential(connect.token.is_some(), connect.session.is_some())?;
    Ok(connect)
}

fn check_refresh(refresh: Refresh<'_>) -> Result<Refresh<'_>, Error> {
    check_credential(refresh.token.is_some(), refresh.session.is_some())?;
    Ok(refresh)
}

fn check_credential(token: bool, session: bool) -> Result<(), Error> {
    match (token, session) {
        (true, true) => Err(Error::field("session", "give token or session, not both")),
        (false, false) => Err(Error::field("token", "token is missing, or session in its place")),
        _ => Ok(()),
    }
}

fn check_ack(ack: Ack<'_>) -> Result<Ack<'_>, Error> {
    ids::check_address(&ack.thread)?;
    ack.name.as_deref().map_or(Ok(()), |name| ids::check_text("name", name))?;
    Ok(ack)
}

fn check_credit(credit: Credit) -> Result<Credit, Error> {
    if credit.events == 0 { Err(Error::field("events", "events must be at least 1")) } else { Ok(credit) }
}

fn check_signal(signal: Signal<'_>) -> Result<Signal<'_>, Error> {
    ids::check_address(&signal.thread)?;
    ids::check_text("kind", &signal.kind)?;
    signal.data.map_or(Ok(()), check_data_limits)?;
    Ok(signal)
}

fn check_consume(consume: Consume<'_>) -> Result<Consume<'_>, Error> {
    work::check_group(&consume.group)?;
    Ok(consume)
}

fn check_publish(publish: Publish<'_>) -> Result<Publish<'_>, Error> {
    ids::check_address(&publish.thread)?;
    check_content(publish.data, publish.key.as_deref(), publish.run.as_deref(), publish.parent)?;
    Ok(publish)
}

/// What holds for a publish over either interface.
pub fn check_content(data: &RawValue, key: Option<&str>, run: Option<&str>, parent: Option<u64>) -> Result<(), Error> {
    check_data_limits(data)?;
    key.map_or(Ok(()), |key| ids::check_text("key", key))?;
    run.map_or(Ok(()), |run| ids::check_text("run", run))?;
    if parent == Some(0) {
        return Err(Error::field("parent", "parent is a seq; the first one is 1"));
    }
    Ok(())
}

fn check_data_limits(data: &RawValue) -> Result<(), Error> {
    if data.get().len() > MAX_DATA {
        return Err(
            Error::new(Code::TooLarge, format!("data is {} bytes, more than {MAX_DATA}", data.get().len())).at("data")
        );
    }
    json::check_contents(data.get()).map_err(|why| Error::field("data", format!("data {why}")))
}

fn check_subscribe(subscribe: Subscribe<'_>) -> Result<Subscribe<'_>, Error> {
    let all = subscribe.thread == ids::ALL_THREADS;
    if !all {
        ids::check_address(&subscribe.thread)?;
        if subscribe.all.is_some() {
            return Err(Error::field("all", "all goes with the thread \"*\""));
        }
    }
    subscribe.name.as_deref().map_or(Ok(()), |name| ids::check_text("name", name))?;
    if let Some(kinds) = &subscribe.kinds {
        if !(1..=MAX_KINDS).contains(&kinds.len()) {
            return Err(Error::field("kinds", format!("kinds has 1 to {MAX_KINDS} entries")));
        }
        kinds.iter().try_for_each(|kind| ids::check_text("kinds", kind))?;
    }
    if subscribe.search.as_deref().is_some_and(|search| search.chars().count() > MAX_SEARCH) {
        return Err(Error::field("search", format!("search has at most {MAX_SEARCH} characters")));
    }
    check_confirm(&subscribe)?;
    check_replay(&subscribe)?;

    match (&subscribe.after, subscribe.last) {
        (Some(_), Some(_)) => Err(Error::field("last", "give after or last, not both")),
        (Some(After::Each(_)), _) if !all => {
            Err(Error::field("after", "after is a seq; only with \"*\" is it an object of thread → seq"))
        }
        (Some(After::Seq(_)), _) if all => Err(Error::field("after", "with \"*\" after is an object of thread → seq")),
        _ => Ok(subscribe),
    }
}

fn check_replay(subscribe: &Subscribe<'_>) -> Result<(), Error> {
    let Some(replay) = &subscribe.replay else { return Ok(()) };
    if subscribe.thread == ids::ALL_THREADS {
        return Err(Error::field("replay", "a replay is of one thread, not of \"*\""));
    }
    if subscribe.name.is_some() || subscribe.confirm == Some(true) {
        return Err(Error::field("replay", "a replay is neither durable nor confirmed: leave out name and confirm"));
    }
    if !(SLOWEST..=FASTEST).contains(&replay.speed) {
        return Err(Error::field("replay.speed", format!("replay.speed must be {SLOWEST} to {FASTEST}")));
    }
    Ok(())
}

fn check_confirm(subscribe: &Subscribe<'_>) -> Result<(), Error> {
    let given = [("ack_within_ms", subscribe.ack_within_ms.is_some()), ("attempts", subscribe.attempts.is_some())];
    if let Some((field, _)) = given.into_iter().find(|(_, given)| *given && subscribe.confirm != Some(true)) {
        return Err(Error::field(field, format!("{field} goes with confirm: true")));
    }
    let within = |field: &'static str, value: Option<u64>, range: std::ops::RangeInclusive<u64>| match value {
        Some(value) if !range.contains(&value) => {
            let why = format!("{field} must be {} to {}, not {value}", range.start(), range.end());
            Err(Error::field(field, why))
        }
        _ => Ok(()),
    };
    within("ack_within_ms", subscribe.ack_within_ms, 1_000..=3_600_000)?;
    within("attempts", subscribe.attempts.map(u64::from), 1..=20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(text: &str) -> (Option<i64>, Code, String) {
        let refused = parse(text).expect_err(text);
        (refused.id, refused.error.code, refused.error.field.map(|f| f.to_string()).unwrap_or_default())
    }

    #[test]
    fn errors_carry_the_id_and_name_the_field() {
        let cases = [
            (r#"{"type":"ping","id":1,"extra":1}"#, "extra"),
            (r#"{"type":"subscribe","id":1}"#, "thread"),
            (r#"{"type":"subscribe","id":1,"thread":"t","thread":"t"}"#, "thread"),
            (r#"{"type":"subscribe","id":1,"thread":"t","after":-1}"#, "after"),
            (r#"{"type":"subscribe","id":1,"thread":"t","after":"x"}"#, "after"),
            (r#"{"type":"subscribe","id":1,"thread":"t","last":1.5}"#, "last"),
            (r#"{"type":"subscribe","id":1,"thread":"t","after":1,"last":1}"#, "last"),
            (r#"{"type":"subscribe","id":1,"thread":"*","after":1}"#, "after"),
            (r#"{"type":"subscribe","id":1,"thread":"t","after":{"t":1}}"#, "after"),
            (r#"{"type":"subscribe","id":1,"thread":"@you"}"#, "thread"),
            (r#"{"type":"subscribe","id":1,"thread":"t","all":true}"#, "all"),
            (r#"{"type":"subscribe","id":1,"thread":"t","all":false}"#, "all"),
            (r#"{"type":"subscribe","id":1,"thread":"*","all":"yes"}"#, "all"),
            (r#"{"type":"subscribe","id":1,"thread":"t","kinds":[]}"#, "kinds"),
            (r#"{"type":"subscribe","id":1,"thread":"t","name":""}"#, "name"),
            (r#"{"type":"subscribe","id":1,"thread":"t","confirm":1}"#, "confirm"),
            (r#"{"type":"subscribe","id":1,"thread":"t","attempts":3}"#, "attempts"),
            (r#"{"type":"subscribe","id":1,"thread":"t","confirm":true,"attempts":21}"#, "attempts"),
            (r#"{"type":"subscribe","id":1,"thread":"t","confirm":true,"ack_within_ms":999}"#, "ack_within_ms"),
            (r#"{"type":"subscribe","id":1,"thread":"t","confirm":false,"ack_within_ms":1000}"#, "ack_within_ms"),
            (r#"{"type":"subscribe","id":1,"thread":"*","replay":{"speed":1}}"#, "replay"),
            (r#"{"type":"subscribe","id":1,"thread":"t","name":"n","replay":{"speed":1}}"#, "replay"),
            (r#"{"type":"subscribe","id":1,"thread":"t","replay":{}}"#, "speed"),
            (r#"{"type":"subscribe","id":1,"thread":"t","replay":{"speed":0}}"#, "replay.speed"),
            (r#"{"type":"subscribe","id":1,"thread":"t","replay":{"speed":1,"until":-1}}"#, "replay.until"),
            (r#"{"type":"nonsense","id":1}"#, "type"),
            (r#"{"type":"publish","id":1,"thread":"t","kind":5,"data":{}}"#, "kind"),
            (r#"{"type":"publish","id":1,"thread":"t","data":{"content":"x"},"kind":5}"#, "kind"),
            (r#"{"type":"publish","id":1,"thread":"t","kind":"x.y"}"#, "data"),
            (r#"{"type":"publish","id":1,"thread":"t","kind":"x.y","data":{},"parent":0}"#, "parent"),
            (r#"{"type":"publish","id":1,"thread":"t","kind":"x.y","data":{},"priority":"urgent"}"#, "priority"),
            (r#"{"type":"publish","id":1,"thread":"t","kind":"x.y","data":{},"key":""}"#, "key"),
        ];
        for (text, field) in cases {
            assert_eq!(bad(text), (Some(1), Code::BadRequest, field.to_owned()), "{text}");
        }
        assert_eq!(bad(r#"{"id":1}"#).2, "type");
        assert_eq!(bad(r#"{"type":"ping","id":"one"}"#), (None, Code::BadRequest, "id".to_owned()));
        assert_eq!(bad(r#"{"type":"ping"}"#).2, "id");
    }

    #[test]
    fn a_list_of_a_command_s_values_is_no_command() {
        for text in [r#"["ping",1]"#, r#"["publish",1,"t","x.y",{}]"#] {
            assert_eq!(bad(text), (None, Code::BadRequest, String::new()), "{text}");
            assert_eq!(id_of(text), None);
        }
        assert_eq!(
            bad(r#"{"type":"publish","id":1,"thread":"t","kind":"x.y","data":{},"priority":{"high":null}}"#).2,
            "priority"
        );
    }

    #[test]
    fn null_stands_for_an_absent_optional_field() {
        let text = r#"{"type":"publish","id":1,"thread":"t","kind":"x.y","data":null,"key":null,"run":null}"#;
        assert!(matches!(parse(text), Ok(Command::Publish(Publish { key: None, .. }))));
    }

    #[test]
    fn a_frame_is_one_command_or_an_array_of_them() {
        assert!(matches!(split(r#" {"type":"ping"}"#), Some(Ok(Commands::One(_)))));
        assert!(matches!(split("[{},{}]"), Some(Ok(Commands::Many(all))) if all.len() == 2));
        assert!(matches!(split("[]"), Some(Err(_))));
        assert!(split("{").is_none() && split("5").is_none() && split("{} {}").is_none() && split("").is_none());
        let many = format!("[{}]", vec!["{}"; MAX_COMMANDS + 1].join(","));
        assert!(matches!(split(&many), Some(Err(Error { code: Code::TooLarge, .. }))));
    }
}
