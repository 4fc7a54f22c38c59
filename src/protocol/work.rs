//! Work queues in the log: groups, and who works on what for them.
//!
//! A group's records are in the partition of its tenant's groups, whose key is [`log_key`]. Records about work are in the
//! partition of the thread that has it, with the thread's key, and get no seq: what becomes of one depends on the thread alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{Code, Error};
use super::ids;
use super::kinds::USER_MESSAGE;

/// How many kinds a group may choose.
const MAX_KINDS: usize = 100;
/// How many groups a tenant may have.
pub const MAX_GROUPS: usize = 100;
/// How many characters a settlement's reason may have.
const MAX_REASON: usize = 1_000;
const LEASE_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
pub const MAX_ATTEMPTS: u32 = 20;
/// How long a retry may be put off: a day.
const MAX_DELAY_MS: u64 = 86_400_000;

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
    pub max_ms: u64,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { min_ms: 1_000, max_ms: 60_000 }
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

/// What a group is to be like. What is left out is the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupSettings {
    /// The kinds of events that are its work.
    pub kinds: Vec<String>,
    /// Counts when the group is made, and not afterwards.
    pub from: StartFrom,
    /// How long a worker has, unless it asks for another time.
    pub lease_ms: u64,
    /// How often an event is tried before it becomes a dead letter.
    pub attempts: u32,
    pub backoff: Backoff,
}

impl Default for GroupSettings {
    fn default() -> GroupSettings {
        GroupSettings {
            kinds: vec![USER_MESSAGE.to_owned()],
            from: StartFrom::Now,
            lease_ms: 30_000,
            attempts: 5,
            backoff: Backoff::default(),
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
        let Backoff { min_ms, max_ms } = self.backoff;
        if min_ms > max_ms || max_ms > MAX_DELAY_MS {
            let why = format!("backoff must have min_ms no more than max_ms, and max_ms no more than {MAX_DELAY_MS}");
            return Err(Error::field("backoff", why));
        }
        Ok(())
    }
}

fn check_lease_ms(lease_ms: u64) -> Result<(), Error> {
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
    /// Up to where the group is done with the thread: nothing between this and `seq` is work.
    pub after: u64,
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
        for (settings, at) in [
            (r#"{"kinds":[]}"#, "kinds"),
            (r#"{"kinds":["x.job",""]}"#, "kinds"),
            (r#"{"lease_ms":999}"#, "lease_ms"),
            (r#"{"attempts":0}"#, "attempts"),
            (r#"{"backoff":{"min_ms":2,"max_ms":1}}"#, "backoff"),
        ] {
            assert_eq!(field(settings), at, "{settings}");
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
