//! What the log holds beside events: receipts and dead letters, as their topics have them; and in the topic of events, what
//! becomes of tickets, and what a log on Kafka says of itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A receipt as the log has it, in the topic `receipts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiptRecord {
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    /// A thread, or `*` for the durable subscription to all threads itself; `*1`, `*2` … for more of what it began with.
    pub thread: String,
    pub user: String,
    /// The durable subscription, empty for acknowledgements without one.
    pub name: String,
    /// The seq after which the subscription goes on.
    pub place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub acked: u64,
    /// The newest seq sent and not acknowledged.
    pub sent: u64,
    /// How often the first event after `place` was sent.
    pub attempts: u32,
    /// RFC 3339.
    pub at: String,
    /// Of a durable subscription to all threads: the seq after which it began in each thread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begins: Option<BTreeMap<String, u64>>,
}

impl ReceiptRecord {
    /// The number of this part of what a durable subscription to all threads began with; `None` for one of a single thread.
    pub fn part_of_all(&self) -> Option<u32> {
        match self.thread.strip_prefix('*')? {
            "" => Some(0),
            part => part.parse().ok().filter(|part| *part > 0),
        }
    }
}

/// A delivery that was given up, as the log has it, in the topic `dead-letters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterRecord {
    /// UUIDv7 of this record.
    pub id: Uuid,
    /// The dead letter's own id, made of what it is about.
    pub letter: Uuid,
    pub reason: String,
    pub tenant: String,
    pub thread: String,
    pub user: String,
    /// The durable subscription, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub seq: u64,
    pub attempts: u32,
    pub error: String,
    /// RFC 3339.
    pub at: String,
    /// The event's kind. From version 3 of the rules on, as is what follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// How often it was requeued before it failed like this.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub round: u32,
    /// The attempts that whoever gave it up knows of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tries: Vec<TryRecord>,
    /// By what right the subscription read the thread: `member` or `scope`. From version 4 of the rules on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
}

/// One attempt at what became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TryRecord {
    /// RFC 3339.
    pub at: String,
    /// Who tried: a user, a subscription, a worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    pub reason: String,
}

/// Somebody does something about a dead letter. It gets no seq. It is in the letter's own partition: with the key
/// `tenant/thread`, or `tenant/letter` if the letter has no thread, in the topic `dead-letters` for letters that are
/// `unacknowledged` or `unreadable`, and in the topic `events` for all others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LetterActRecord {
    /// `letter_requeued`, `letter_discarded`; `letter_settled`: what was requeued was delivered and acknowledged; or, from
    /// version 4 of the rules on, `letter_tried`: it was delivered and not acknowledged in time.
    pub kind: String,
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub letter: Uuid,
    /// The letter's.
    pub reason: String,
    pub tenant: String,
    /// The letter's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    /// How often the letter had been requeued: of two acts in one round the first counts.
    pub round: u32,
    /// The user who does it.
    pub by: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Of `letter_tried`: the attempt's number since the letter was requeued. Of two records about one the first counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// RFC 3339.
    pub at: String,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// The first record of a log on Kafka, which names it: in partition 0 of the topic `events`, with the key `weft`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LogCreatedRecord {
    /// `log_created`.
    pub kind: String,
    /// The log's id, which is the epoch of its first generation.
    pub epoch: String,
    /// How many partitions each topic has; absent in older logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions: Option<u32>,
    /// RFC 3339.
    pub at: String,
}

/// A log on Kafka begins another generation: in partition 0 of the topic `events`, with the key `weft`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LogGenerationRecord {
    /// `log_generation`.
    pub kind: String,
    /// The generation's epoch: the log's id, and what tells the generation from others.
    pub epoch: String,
    /// From 2 on; a record whose number is not higher than those before it means nothing.
    pub generation: u32,
    pub why: String,
    /// The oldest offset of each partition, of all topics: what was before these is known to be gone.
    pub starts: Vec<u64>,
    /// How many partitions each topic has; absent in older logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions: Option<u32>,
    /// RFC 3339.
    pub at: String,
}

/// What a node made of a partition's records, for others to compare: in that partition of the topic `events`, with the key
/// `weft`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LogCheckpointRecord {
    /// `log_checkpoint`.
    pub kind: String,
    /// The log's epoch.
    pub epoch: String,
    /// Which node wrote it, for people.
    pub node: String,
    pub partition: u32,
    /// The records before this offset count.
    pub offset: u64,
    /// Over what was accepted of them, in lowercase hex.
    pub hash: String,
    /// RFC 3339.
    pub at: String,
}

/// A ticket was given to a user. Its key is that of the user's tickets ([`super::tickets`]); it gets no seq.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TicketIssuedRecord {
    /// `ticket_issued`.
    pub kind: String,
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    pub user: String,
    /// The ticket's hash, in lowercase hex.
    pub hash: String,
    /// Those of the token that it was asked for with, separated by spaces.
    pub scopes: String,
    /// When that token was issued, if it says so; milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat_ms: Option<u64>,
    /// When that token expires; seconds since the Unix epoch.
    pub exp: u64,
    /// RFC 3339.
    pub at: String,
    /// When the ticket expires. RFC 3339.
    pub expires_at: String,
}

/// Somebody tries to get in with a ticket, with the key of its `ticket_issued`. The first one in the log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TicketUsedRecord {
    /// `ticket_used`.
    pub kind: String,
    /// UUIDv7 of this record: tells this try from others.
    pub id: Uuid,
    /// The ticket's hash, in lowercase hex.
    pub hash: String,
    /// RFC 3339. The ticket must not have expired by then.
    pub at: String,
}
