//! Work queues over HTTP: what groups are, what a worker leases and how it settles.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::{Code, Error};
use super::event::EventItem;
use super::work::{Backoff, Boost, Outcome, Overflow, StartFrom, Wait, WorkOrder};

/// How much work one request may lease.
pub const MAX_LEASED: u32 = 100;
/// How long a request may wait for work.
pub const MAX_WAIT_MS: u64 = 30_000;
/// How many settlements one request may have.
const MAX_SETTLEMENTS: usize = 100;

/// A group as a list has it.
#[derive(Serialize, JsonSchema)]
pub struct GroupItem {
    pub group: String,
    /// The kinds of events that are its work.
    pub kinds: Vec<String>,
    /// Where it began when it was made.
    pub from: StartFrom,
    pub lease_ms: u64,
    pub attempts: u32,
    pub backoff: Backoff,
    /// Beyond so many that wait it is overflowing.
    pub limit: u64,
    pub overflow: Overflow,
    pub order: WorkOrder,
    pub boost: Boost,
    /// Nobody gets work until it is resumed.
    pub paused: bool,
    /// RFC 3339.
    pub created_at: String,
}

/// A group on its own.
#[derive(Serialize, JsonSchema)]
pub struct GroupDetail {
    #[serde(flatten)]
    pub group: GroupItem,
    /// Events that wait or are worked on.
    pub depth: u64,
    /// More of them wait than `limit`; or as many, and what comes next is rejected or pushes one out.
    pub overflowing: bool,
    /// How long ago the oldest of them was published; of more than 10,000 threads, in those that were looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_ms: Option<u64>,
    /// How many of them somebody works on.
    pub in_flight: u64,
    /// Threads that are paused, of many the first 100.
    pub paused_threads: Vec<String>,
    /// Workers that are connected to this node, and requests that wait for work here.
    pub workers: usize,
}

/// A page of groups, by their names.
#[derive(Serialize, JsonSchema)]
pub struct GroupList {
    pub groups: Vec<GroupItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The body of `POST /v1/groups/{g}/pause` and `/resume`; an empty one is none of it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PauseBody {
    /// Only this thread.
    #[serde(default)]
    pub thread: Option<String>,
}

/// The answer when one thread was paused or resumed.
#[derive(Serialize, JsonSchema)]
pub struct ThreadPaused<'a> {
    pub group: &'a str,
    pub thread: &'a str,
    pub paused: bool,
}

/// The answer to `DELETE /v1/groups/{g}`.
#[derive(Serialize, JsonSchema)]
pub struct GroupDeleted<'a> {
    pub group: &'a str,
    /// Always `true`.
    pub deleted: bool,
}

/// The body of `POST /v1/groups/{g}/lease`; an empty one is none of it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseBody {
    /// How much at most: 1 unless given, up to 100.
    #[serde(default)]
    #[schemars(range(min = 1, max = 100))]
    pub n: Option<u32>,
    /// How long to wait for the first: 0 unless given, up to 30,000. With 0 it is what there is.
    #[serde(default)]
    #[schemars(range(max = 30_000))]
    pub wait_ms: Option<u64>,
    /// Of the group's kinds only these.
    #[serde(default)]
    pub kinds: Option<Vec<String>>,
    /// How long the leases last, unless as long as the group says: 1,000 to 3,600,000.
    #[serde(default)]
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub lease_ms: Option<u64>,
}

impl LeaseBody {
    /// How much, and how long to wait for it.
    pub fn checked(&self) -> Result<(u32, u64), Error> {
        let (n, wait_ms) = (self.n.unwrap_or(1), self.wait_ms.unwrap_or(0));
        if !(1..=MAX_LEASED).contains(&n) {
            return Err(Error::field("n", format!("n must be from 1 to {MAX_LEASED}, not {n}")));
        }
        if wait_ms > MAX_WAIT_MS {
            return Err(Error::field("wait_ms", format!("wait_ms is at most {MAX_WAIT_MS}, not {wait_ms}")));
        }
        Ok((n, wait_ms))
    }
}

/// An event to work on, while its lease lasts.
#[derive(Serialize, JsonSchema)]
pub struct WorkItem {
    /// How to name it when it is settled.
    pub delivery: String,
    pub group: String,
    /// 1, 2, 3 …
    pub attempt: u32,
    /// How long the lease lasts, from now on.
    pub lease_ms: u64,
    /// How long it waited.
    pub waited_ms: u64,
    pub wait: Wait,
    /// As pages have it.
    #[schemars(with = "EventItem")]
    pub event: Box<RawValue>,
}

/// What the webhook tells the application's backend: the body of its `POST`.
#[derive(Serialize, JsonSchema)]
pub struct WebhookMessage<'a> {
    pub tenant: &'a str,
    /// 1, 2, 3 …
    pub attempt: u32,
    /// As pages have it. The same event may be told more than once: its `event` is then the same.
    #[schemars(with = "EventItem")]
    pub event: &'a RawValue,
}

/// The answer to `POST /v1/groups/{g}/lease`; empty if nothing came in time.
#[derive(Serialize, JsonSchema)]
pub struct WorkList {
    pub work: Vec<WorkItem>,
}

/// One settlement of several.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettlementBody<'a> {
    /// As the lease names it.
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

/// The body of `POST /v1/groups/{g}/settle`: one settlement, or `settlements` and nothing else.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettleBody<'a> {
    /// As the lease names it.
    #[serde(borrow, default)]
    pub delivery: Option<Cow<'a, str>>,
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// Of `retry` and `reject`: why, at most 1,000 characters.
    #[serde(borrow, default)]
    #[schemars(length(max = 1_000))]
    pub reason: Option<Cow<'a, str>>,
    /// Of `retry`: when to try again, at most 86,400,000; by the group's backoff unless given.
    #[serde(default)]
    #[schemars(range(max = 86_400_000))]
    pub delay_ms: Option<u64>,
    /// Up to 100, each with an outcome of its own.
    #[serde(borrow, default)]
    #[schemars(length(min = 1, max = 100))]
    pub settlements: Option<Vec<SettlementBody<'a>>>,
}

/// What a request settles.
pub enum Settlements<'a> {
    One(SettlementBody<'a>),
    Several(Vec<SettlementBody<'a>>),
}

impl<'a> SettleBody<'a> {
    pub fn checked(self) -> Result<Settlements<'a>, Error> {
        let SettleBody { delivery, outcome, reason, delay_ms, settlements } = self;
        let Some(several) = settlements else {
            let missing = |name: &'static str| Error::field(name, format!("{name} is missing"));
            let delivery = delivery.ok_or_else(|| missing("delivery"))?;
            let outcome = outcome.ok_or_else(|| missing("outcome"))?;
            return Ok(Settlements::One(SettlementBody { delivery, outcome, reason, delay_ms }));
        };

        let beside = [
            ("delivery", delivery.is_some()),
            ("outcome", outcome.is_some()),
            ("reason", reason.is_some()),
            ("delay_ms", delay_ms.is_some()),
        ];
        if let Some((name, _)) = beside.into_iter().find(|(_, given)| *given) {
            return Err(Error::field(name, format!("{name} does not go with settlements, each of which has its own")));
        }
        if !(1..=MAX_SETTLEMENTS).contains(&several.len()) {
            let why = format!("settlements has 1 to {MAX_SETTLEMENTS} entries");
            return Err(Error::field("settlements", why));
        }
        Ok(Settlements::Several(several))
    }
}

/// What became of a settlement.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Settled {
    pub delivery: String,
    pub outcome: Outcome,
    /// Of one of several that was refused: why, and the lease is as it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of several, in the order of the request.
#[derive(Serialize, JsonSchema)]
pub struct SettledList {
    pub items: Vec<Settled>,
}

#[cfg(test)]
mod tests {
    use super::super::json;
    use super::*;

    #[test]
    fn a_body_about_work_is_refused_by_the_field_that_is_wrong() {
        let lease = |body: &str| json::decode::<LeaseBody>(body).and_then(|it| it.checked());
        assert_eq!(lease("{}"), Ok((1, 0)));
        assert_eq!(lease(r#"{"n":100,"wait_ms":30000,"kinds":["x.a"]}"#), Ok((100, 30_000)));
        for (body, field) in
            [(r#"{"n":0}"#, "n"), (r#"{"n":101}"#, "n"), (r#"{"wait_ms":30001}"#, "wait_ms"), (r#"{"m":1}"#, "m")]
        {
            assert_eq!(lease(body).expect_err(body).field.as_deref(), Some(field), "{body}");
        }

        let settle = |body: &str| {
            json::decode::<SettleBody>(body).and_then(SettleBody::checked).map(|it| match it {
                Settlements::One(_) => 1,
                Settlements::Several(several) => several.len(),
            })
        };
        assert_eq!(settle(r#"{"delivery":"d","outcome":"retry","reason":"r","delay_ms":1}"#), Ok(1));
        let two = r#"{"settlements":[{"delivery":"d","outcome":"done"},{"delivery":"e","outcome":"extend"}]}"#;
        assert_eq!(settle(two), Ok(2));
        for (body, field) in [
            ("{}", "delivery"),
            (r#"{"delivery":"d"}"#, "outcome"),
            (r#"{"delivery":"d","outcome":"lost"}"#, "outcome"),
            (r#"{"settlements":[]}"#, "settlements"),
            (r#"{"settlements":[{"delivery":"d","outcome":"done"}],"delay_ms":1}"#, "delay_ms"),
        ] {
            assert_eq!(settle(body).expect_err(body).field.as_deref(), Some(field), "{body}");
        }
    }
}
