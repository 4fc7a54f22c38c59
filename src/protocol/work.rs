//! Work queues in the log: groups, and who works on what for them.
//!
//! A group's records are in the partition of its tenant's groups, whose key is [`log_key`]. Records about work are in the
//! partition of the thread that has it, with the thread's key, and get no seq: what becomes of one depends on the thread alone.

use std::borrow::Cow;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bincode::{Decode, Encode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{Code, Error};
use super::ids;
use super::kinds::USER_MESSAGE;

/// How many kinds a group may choose.
const MAX_KINDS: usize = 100;
/// The group that the webhook works for.
pub const WEBHOOK_GROUP: &str = "webhook";
/// How many groups a tenant may have.
pub const MAX_GROUPS: usize = 100;
/// How many characters a settlement's reason may have.
const MAX_REASON: usize = 1_000;
const LEASE_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
pub const MAX_ATTEMPTS: u32 = 20;
/// How many events of one thread a group without order may have leased at a time.
pub const MAX_PARALLEL: usize = 64;
/// How many events a group's limit may say that may wait.
const LIMIT: std::ops::RangeInclusive<u64> = 1..=100_000_000;
/// How long a retry may be put off: a day.
pub const MAX_DELAY_MS: u64 = 86_400_000;

/// What the keys of records about groups begin with. They have no `/`, so no event has such a key.
const KEY: &str = "groups:";

/// The key of all records about a tenant's groups.
pub fn log_key(tenant: &str) -> String {
    format!("{KEY}{tenant}")
}

/// Whose groups a record with this key is about, if it is about groups.
pub fn tenant_of_key(key: &str) -> Option<&str> {
    key.strip_prefix(KEY).filter(|tenant| ids::check_name("tenant", tenant).is_ok())
}

/// How long a retry waits when nobody says: `min_ms` after the first attempt, twice as long after each further one, at most
/// `max_ms`; then up to half of it less, at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Backoff {
    pub min_ms: u64,
    #[schemars(range(max = 86_400_000))]
    pub max_ms: u64,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { min_ms: 1_000, max_ms: 60_000 }
    }
}

/// By how much earlier an event counts as arrived that has priority `high` or `low`; less than 0 is later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Encode, Decode)]
#[serde(deny_unknown_fields)]
pub struct Boost {
    #[schemars(range(min = 0, max = 86_400_000))]
    pub high_ms: i64,
    #[schemars(range(min = -86_400_000, max = 0))]
    pub low_ms: i64,
}

impl Default for Boost {
    fn default() -> Boost {
        Boost { high_ms: 60_000, low_ms: -60_000 }
    }
}

/// Where a new group begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartFrom {
    /// With what is published from now on.
    #[default]
    Now,
    /// With everything that is there.
    Start,
}

/// What happens to a group beyond its limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Encode, Decode)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// It says so, and nothing else.
    #[default]
    Accept,
    /// New events of its kinds are refused with `queue_full`.
    Reject,
    /// The oldest of the lowest priority becomes a dead letter.
    DeadLetter,
}

/// In which order a thread's events are worked on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Encode, Decode)]
#[serde(rename_all = "snake_case")]
pub enum WorkOrder {
    /// One at a time, in the thread's order.
    #[default]
    Thread,
    /// Several at a time, each on its own.
    None,
}

/// What a group is to be like. What is left out is the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupSettings {
    /// The kinds of events that are its work.
    #[schemars(length(min = 1, max = 100))]
    pub kinds: Vec<String>,
    /// Counts when the group is made, and not afterwards.
    pub from: StartFrom,
    /// How long a worker has, unless it asks for another time.
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub lease_ms: u64,
    /// How often an event is tried before it becomes a dead letter.
    #[schemars(range(min = 1, max = 20))]
    pub attempts: u32,
    pub backoff: Backoff,
    /// Beyond so many that wait the group is overflowing.
    #[schemars(range(min = 1, max = 100_000_000))]
    #[serde(skip_serializing_if = "is_default_limit")]
    pub limit: u64,
    /// What happens then.
    #[serde(skip_serializing_if = "is_default")]
    pub overflow: Overflow,
    /// Whether a thread's events are worked on one at a time and in order.
    #[serde(skip_serializing_if = "is_default")]
    pub order: WorkOrder,
    /// What priorities are worth.
    #[serde(skip_serializing_if = "is_default")]
    pub boost: Boost,
}

const DEFAULT_LIMIT: u64 = 100_000;

// What is as it was before these settings were known stands in no record: who knows them not reads what it always read.

fn is_default_limit(limit: &u64) -> bool {
    *limit == DEFAULT_LIMIT
}

fn is_default<T: Default + PartialEq>(it: &T) -> bool {
    *it == T::default()
}

impl Default for GroupSettings {
    fn default() -> GroupSettings {
        GroupSettings {
            kinds: vec![USER_MESSAGE.to_owned()],
            from: StartFrom::Now,
            lease_ms: 30_000,
            attempts: 5,
            backoff: Backoff::default(),
            limit: DEFAULT_LIMIT,
            overflow: Overflow::default(),
            order: WorkOrder::default(),
            boost: Boost::default(),
        }
    }
}

impl GroupSettings {
    /// Refuses what no group can be like. Which kinds there are is not asked: later versions know more of them, and this decides
    /// whether a record is foreign.
    pub fn check(&self) -> Result<(), Error> {
        if !(1..=MAX_KINDS).contains(&self.kinds.len()) {
            return Err(Error::field("kinds", format!("kinds must name 1 to {MAX_KINDS} kinds")));
        }
        for kind in &self.kinds {
            ids::check_text("kinds", kind)?;
        }
        check_lease_ms(self.lease_ms)?;
        if !(1..=MAX_ATTEMPTS).contains(&self.attempts) {
            return Err(Error::field("attempts", format!("attempts must be from 1 to {MAX_ATTEMPTS}")));
        }
        if !LIMIT.contains(&self.limit) {
            let why = format!("limit must be from {} to {}, not {}", LIMIT.start(), LIMIT.end(), self.limit);
            return Err(Error::field("limit", why));
        }
        let Backoff { min_ms, max_ms } = self.backoff;
        if min_ms > max_ms || max_ms > MAX_DELAY_MS {
            let why = format!("backoff must have min_ms no more than max_ms, and max_ms no more than {MAX_DELAY_MS}");
            return Err(Error::field("backoff", why));
        }
        let Boost { high_ms, low_ms } = self.boost;
        let most = MAX_DELAY_MS as i64;
        if !(0..=most).contains(&high_ms) || !(-most..=0).contains(&low_ms) {
            let why = format!("boost must have high_ms from 0 to {most}, and low_ms from -{most} to 0");
            return Err(Error::field("boost", why));
        }
        Ok(())
    }
}

pub fn check_lease_ms(lease_ms: u64) -> Result<(), Error> {
    if LEASE_MS.contains(&lease_ms) {
        return Ok(());
    }
    let why = format!("lease_ms must be from {} to {}, not {lease_ms}", LEASE_MS.start(), LEASE_MS.end());
    Err(Error::field("lease_ms", why))
}

/// A group's name is made as a user's is.
pub fn check_group(group: &str) -> Result<(), Error> {
    ids::check_name("group", group)
}

/// Somebody makes, changes, pauses, resumes or deletes a group. Its key is [`log_key`]; it gets no seq.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupRecord {
    /// `group_set`, `group_paused`, `group_resumed` or `group_deleted`.
    pub kind: String,
    /// UUIDv7 of this record; of the one that makes the group, the group's own id.
    pub id: Uuid,
    pub tenant: String,
    pub group: String,
    /// Of `group_set`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<GroupSettings>,
    /// Of `group_set`: a group that is there stays as it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub if_absent: bool,
    /// The user who did it.
    pub by: String,
    /// RFC 3339.
    pub at: String,
}

/// A node gives an event to a worker. The first such record in the log counts; it is refused if the thread's state is not
/// the one that it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkLeasedRecord {
    /// `work_leased`.
    pub kind: String,
    /// UUIDv7 of this record, and the lease's own id.
    pub id: Uuid,
    pub tenant: String,
    pub thread: String,
    pub group: String,
    /// The group's id: one that was deleted and made again is another one.
    pub group_id: Uuid,
    /// The event.
    pub seq: u64,
    /// The event's kind, for whoever reads the log, and for the dead letter that it may become.
    pub event_kind: String,
    /// Up to where the group is done with the thread: nothing between this and `seq` is work. If it is `parallel`, the event
    /// of the group's that comes before it in the thread.
    pub after: u64,
    /// The group keeps no order: other events of the thread may be leased at the same time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parallel: bool,
    /// Which attempt this is: 1, 2, 3 …
    pub attempt: u32,
    /// How many there may be.
    pub attempts: u32,
    /// The worker's user.
    pub holder: String,
    /// RFC 3339.
    pub at: String,
    /// When the lease is over unless it is settled or extended. RFC 3339.
    pub until: String,
}

/// What becomes of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Settlement {
    /// The work is done.
    Done,
    /// The attempt failed: again, or a dead letter if it was the last one.
    Retry,
    /// A dead letter, at once.
    Reject,
    /// The worker needs longer.
    Extend,
    /// By the server: the worker's connection is gone.
    Lost,
    /// By the server: the lease was over without a settlement.
    Expired,
}

/// What a worker says of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    Retry,
    Reject,
    Extend,
}

/// A name and nothing else. Derived, it would be read from `{"done": null}` as well.
impl<'de> Deserialize<'de> for Outcome {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Outcome, D::Error> {
        match &*<Cow<'de, str>>::deserialize(deserializer)? {
            "done" => Ok(Outcome::Done),
            "retry" => Ok(Outcome::Retry),
            "reject" => Ok(Outcome::Reject),
            "extend" => Ok(Outcome::Extend),
            other => Err(serde::de::Error::unknown_variant(other, &["done", "retry", "reject", "extend"])),
        }
    }
}

impl From<Outcome> for Settlement {
    fn from(outcome: Outcome) -> Settlement {
        match outcome {
            Outcome::Done => Settlement::Done,
            Outcome::Retry => Settlement::Retry,
            Outcome::Reject => Settlement::Reject,
            Outcome::Extend => Settlement::Extend,
        }
    }
}

/// An event that a worker has a lease on.
#[derive(Debug, Clone)]
pub struct Work {
    pub lease: Uuid,
    /// How the worker names it when it settles: a [`Delivery`].
    pub delivery: String,
    pub group: Arc<str>,
    pub thread: Arc<str>,
    pub seq: u64,
    pub attempt: u32,
    pub lease_ms: u64,
    pub waited_ms: u64,
    pub wait: Wait,
}

impl Settlement {
    pub fn as_str(self) -> &'static str {
        match self {
            Settlement::Done => "done",
            Settlement::Retry => "retry",
            Settlement::Reject => "reject",
            Settlement::Extend => "extend",
            Settlement::Lost => "lost",
            Settlement::Expired => "expired",
        }
    }
}

/// A worker, or the server for it, says what became of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkSettledRecord {
    /// `work_settled`.
    pub kind: String,
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    pub thread: String,
    pub group: String,
    /// The `id` of the lease's record: nobody else's lease is settled by this.
    pub lease: Uuid,
    pub outcome: Settlement,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of `extend`, when the lease is over; of what failed, when it is to be tried again. RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// The worker's user.
    pub by: String,
    /// RFC 3339.
    pub at: String,
}

/// A node says that an event makes room in a group that is full: it becomes a dead letter. What is begun by then is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkOverflowedRecord {
    /// `work_overflowed`.
    pub kind: String,
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    pub thread: String,
    pub group: String,
    pub group_id: Uuid,
    pub seq: u64,
    /// The event's kind.
    pub event_kind: String,
    /// Nothing between this seq and the event's is work that is not done.
    pub after: u64,
    /// How many events may wait for the group.
    pub limit: u64,
    /// RFC 3339.
    pub at: String,
}

/// Nobody gets work of a thread from now on, or somebody does again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkPausedRecord {
    /// `work_paused` or `work_resumed`.
    pub kind: String,
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    pub thread: String,
    pub group: String,
    pub group_id: Uuid,
    /// The user who did it.
    pub by: String,
    /// RFC 3339.
    pub at: String,
}

/// How the wait of an event was spent until a worker got it, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wait {
    /// An event before it in its thread was not done.
    pub busy_ms: u64,
    /// No worker had credit left.
    pub no_worker_ms: u64,
    /// Others' turns came before.
    pub fairness_ms: u64,
    /// It had failed, and was not to be tried again yet.
    pub backoff_ms: u64,
    /// The group or the thread was paused.
    pub paused_ms: u64,
    /// The event, and then its lease, were on their way through the log.
    pub log_ms: u64,
}

impl Wait {
    pub fn total(&self) -> u64 {
        let Wait { busy_ms, no_worker_ms, fairness_ms, backoff_ms, paused_ms, log_ms } = *self;
        busy_ms + no_worker_ms + fairness_ms + backoff_ms + paused_ms + log_ms
    }
}

/// Which lease a worker settles: the text says by itself which one it is, so that every node and every connection can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The id of the lease's record.
    pub lease: Uuid,
    /// How long it lasts each time it is extended.
    pub lease_ms: u64,
    pub group: String,
    pub thread: String,
}

/// The most characters that such a text has: of the longest names, and more.
const MAX_DELIVERY: usize = 1_024;

impl Delivery {
    pub fn text(&self) -> String {
        let lease_ms = u32::try_from(self.lease_ms).unwrap_or(u32::MAX).to_be_bytes();
        let names = [self.group.as_bytes(), &[0], self.thread.as_bytes()].concat();
        BASE64_URL_SAFE_NO_PAD.encode([&self.lease.as_bytes()[..], &lease_ms, &names].concat())
    }

    pub fn parse(text: &str) -> Result<Delivery, Error> {
        Delivery::read(text).ok_or_else(|| Error::field("delivery", "delivery is not one that a `work` named"))
    }

    fn read(text: &str) -> Option<Delivery> {
        if text.len() > MAX_DELIVERY {
            return None;
        }
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (lease, rest) = bytes.split_first_chunk::<16>()?;
        let (lease_ms, names) = rest.split_first_chunk::<4>()?;
        let (group, thread) = std::str::from_utf8(names).ok()?.split_once('\0')?;
        let lease_ms = u32::from_be_bytes(*lease_ms).into();
        check_lease_ms(lease_ms).and(check_group(group)).and(ids::check_thread(thread)).ok()?;
        Some(Delivery { lease: Uuid::from_bytes(*lease), lease_ms, group: group.into(), thread: thread.into() })
    }
}

/// The one answer for a lease that is somebody else's, settled, over, or none.
pub fn no_lease() -> Error {
    Error::new(Code::Conflict, "the lease is not yours any more: it was settled, or its time is over").at("delivery")
}

/// A reason as a worker gives it.
pub fn check_reason(reason: Option<&str>) -> Result<(), Error> {
    if reason.is_some_and(|reason| reason.chars().count() > MAX_REASON) {
        return Err(Error::field("reason", format!("reason has at most {MAX_REASON} characters")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked_by_name() {
        let field = |settings: &str| {
            let settings: GroupSettings = serde_json::from_str(settings).expect("they have the form");
            settings.check().err().and_then(|error| error.field).unwrap_or_default().into_owned()
        };
        assert_eq!(field("{}"), "");
        assert_eq!(field(r#"{"kinds":["x.job","user_message"],"from":"start"}"#), "");
        assert_eq!(field(r#"{"limit":1,"overflow":"dead_letter","order":"none"}"#), "");
        for (settings, at) in [
            (r#"{"kinds":[]}"#, "kinds"),
            (r#"{"kinds":["x.job",""]}"#, "kinds"),
            (r#"{"lease_ms":999}"#, "lease_ms"),
            (r#"{"attempts":0}"#, "attempts"),
            (r#"{"limit":0}"#, "limit"),
            (r#"{"backoff":{"min_ms":2,"max_ms":1}}"#, "backoff"),
        ] {
            assert_eq!(field(settings), at, "{settings}");
        }
    }

    #[test]
    fn a_delivery_is_read_as_it_was_written_and_nothing_else_is() {
        for thread in ["t", "@user:ada"] {
            let (group, thread) = ("workers".to_owned(), thread.to_owned());
            let delivery = Delivery { lease: Uuid::from_bytes([7; 16]), lease_ms: 30_000, group, thread };
            let text = delivery.text();
            assert_eq!(Delivery::parse(&text), Ok(delivery));
            assert!(Delivery::parse(&text[1..]).is_err());
        }
        for none in ["", "x", "AAAA", "not base64!", &"A".repeat(5_000)] {
            assert_eq!(Delivery::parse(none).map_err(|error| error.field), Err(Some("delivery".into())), "{none:.20}");
        }
    }

    #[test]
    fn the_groups_of_a_tenant_have_a_key_that_no_thread_has() {
        assert_eq!(tenant_of_key(&log_key("acme")), Some("acme"));
        for none in ["weft", "groups:", "groups:acme/t", "acme/groups:acme"] {
            assert_eq!(tenant_of_key(none), None, "{none}");
        }
    }
}
