//! A record: what is appended to the log, and what the log routes it by.

use bytes::Bytes;

use crate::protocol::custom::{self, KindRecord};
use crate::protocol::dead_letters::{UNACKNOWLEDGED, UNREADABLE};
use crate::protocol::records::{
    DeadLetterRecord, LetterActRecord, ReceiptRecord, TicketIssuedRecord, TicketUsedRecord,
};
use crate::protocol::tickets::{self, TicketOwner};
use crate::protocol::work::{
    self, GroupRecord, WorkLeasedRecord, WorkOverflowedRecord, WorkPausedRecord, WorkSettledRecord,
};
use crate::protocol::{ids, json};

/// The newest version of the rules, and the one that this server writes its records by.
///
/// Each record carries the version of the rules by which it is judged (on Kafka as the header `weft-version`), so that a
/// log comes to the same whenever it is read, and by whichever later version of Weft. A rule that can change a verdict or
/// a row never changes: it is succeeded by another one in a new version ([`crate::projector`]). A record of a newer version
/// than this stops who reads it ([`super::LogError::NewerRules`]); one that was skipped would be missing in all that follows.
pub const RULES: u16 = 7;

/// What a record belongs to. Every topic has the same number of partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// All events of all threads, and what becomes of tickets, groups and their work, and of custom kinds.
    Events,
    /// Acks and settlements; on Kafka compacted, so that only the newest record of a key is sure to stay.
    Receipts,
    DeadLetters,
}

impl Topic {
    /// In the order in which their partitions are numbered.
    pub const ALL: [Topic; 3] = [Topic::Events, Topic::Receipts, Topic::DeadLetters];

    pub fn as_str(self) -> &'static str {
        match self {
            Topic::Events => "events",
            Topic::Receipts => "receipts",
            Topic::DeadLetters => "dead-letters",
        }
    }

    /// The number over all topics of its partition `within`, when each topic has `each`.
    pub(super) fn partition(self, within: u32, each: u32) -> u32 {
        self as u32 * each + within
    }

    /// The way back: the topic, and the partition within it.
    pub(super) fn locate(partition: u32, each: u32) -> (Topic, u32) {
        match partition / each {
            0 => (Topic::Events, partition),
            1 => (Topic::Receipts, partition - each),
            _ => (Topic::DeadLetters, partition - 2 * each),
        }
    }
}

/// One record as it is appended: its JSON and what is needed to route and judge it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub topic: Topic,
    /// `tenant/thread`; of a receipt, followed by its user and name, since compaction leaves each key its newest record; of
    /// a ticket, that of all tickets of its user; of a group or a custom kind, that of all of its tenant.
    /// Chooses the partition, so that a thread has one order.
    pub key: String,
    /// The record's kind (header `weft-kind`), for people who look at the log with other tools.
    pub kind: String,
    /// The version of the rules by which it is judged (header `weft-version`), from 1 to [`RULES`].
    pub rules: u16,
    /// By what right it was written (header `weft-grant`).
    pub grant: Grant,
    /// W3C trace context, stored as it came (header `traceparent`).
    pub traceparent: Option<String>,
    /// One JSON object; of an event, the event without its seq, with its tenant.
    pub value: Bytes,
}

/// By what right a record was written. The edge knows the token, the projector only the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// The writer must be a member of the thread when the record's turn comes.
    Member,
    /// The writer's token allows it in every thread of its tenant.
    Scope,
    /// The server writes it, by itself.
    Server,
}

impl Grant {
    pub fn as_str(self) -> &'static str {
        match self {
            Grant::Member => "member",
            Grant::Scope => "scope",
            Grant::Server => "server",
        }
    }

    pub fn parse(text: &[u8]) -> Option<Grant> {
        match text {
            b"member" => Some(Grant::Member),
            b"scope" => Some(Grant::Scope),
            b"server" => Some(Grant::Server),
            _ => None,
        }
    }
}

impl From<&ReceiptRecord> for Record {
    /// One key for each subscription, so that compaction leaves each its newest.
    fn from(receipt: &ReceiptRecord) -> Record {
        Record {
            topic: Topic::Receipts,
            key: [&*receipt.tenant, &receipt.thread, &receipt.user, &receipt.name].join("/"),
            kind: "receipt".into(),
            rules: RULES,
            grant: Grant::Scope,
            traceparent: None,
            value: json::encode_bytes(receipt).into(),
        }
    }
}

impl From<&DeadLetterRecord> for Record {
    fn from(letter: &DeadLetterRecord) -> Record {
        Record {
            topic: Topic::DeadLetters,
            key: ids::log_key(&letter.tenant, &letter.thread),
            kind: letter.reason.clone(),
            rules: RULES,
            grant: Grant::Scope,
            traceparent: None,
            value: json::encode_bytes(letter).into(),
        }
    }
}

impl From<&LetterActRecord> for Record {
    /// Where the letter is judged: one that the projector made of an event is in the event's partition, and what is done about
    /// it as well, so that both have one order.
    fn from(act: &LetterActRecord) -> Record {
        let topic = match &*act.reason {
            UNACKNOWLEDGED | UNREADABLE => Topic::DeadLetters,
            _ => Topic::Events,
        };
        let key = match &act.thread {
            Some(thread) => ids::log_key(&act.tenant, thread),
            None => ids::log_key(&act.tenant, &act.letter.to_string()),
        };
        Record {
            topic,
            key,
            kind: act.kind.clone(),
            rules: RULES,
            grant: Grant::Scope,
            traceparent: None,
            value: json::encode_bytes(act).into(),
        }
    }
}

impl From<&TicketIssuedRecord> for Record {
    fn from(issued: &TicketIssuedRecord) -> Record {
        let owner = tickets::owner(&issued.tenant, &issued.user);
        of_ticket(&owner, issued.kind.clone(), json::encode_bytes(issued).into())
    }
}

impl Record {
    /// A try to get in with a ticket of this owner.
    pub fn ticket_used(owner: &TicketOwner, used: &TicketUsedRecord) -> Record {
        of_ticket(owner, used.kind.clone(), json::encode_bytes(used).into())
    }
}

impl From<&GroupRecord> for Record {
    fn from(group: &GroupRecord) -> Record {
        by_server(work::log_key(&group.tenant), group.kind.clone(), json::encode_bytes(group).into())
    }
}

impl From<&KindRecord<'_>> for Record {
    fn from(kind: &KindRecord<'_>) -> Record {
        by_server(custom::log_key(&kind.tenant), kind.kind.to_string(), json::encode_bytes(kind).into())
    }
}

impl From<&WorkLeasedRecord> for Record {
    fn from(leased: &WorkLeasedRecord) -> Record {
        let key = ids::log_key(&leased.tenant, &leased.thread);
        by_server(key, leased.kind.clone(), json::encode_bytes(leased).into())
    }
}

impl From<&WorkSettledRecord> for Record {
    fn from(settled: &WorkSettledRecord) -> Record {
        let key = ids::log_key(&settled.tenant, &settled.thread);
        by_server(key, settled.kind.clone(), json::encode_bytes(settled).into())
    }
}

impl From<&WorkOverflowedRecord> for Record {
    fn from(overflowed: &WorkOverflowedRecord) -> Record {
        let key = ids::log_key(&overflowed.tenant, &overflowed.thread);
        by_server(key, overflowed.kind.clone(), json::encode_bytes(overflowed).into())
    }
}

impl From<&WorkPausedRecord> for Record {
    fn from(paused: &WorkPausedRecord) -> Record {
        let key = ids::log_key(&paused.tenant, &paused.thread);
        by_server(key, paused.kind.clone(), json::encode_bytes(paused).into())
    }
}

fn of_ticket(owner: &TicketOwner, kind: String, value: Bytes) -> Record {
    by_server(tickets::log_key(owner), kind, value)
}

/// A record in the topic of events that is no event.
fn by_server(key: String, kind: String, value: Bytes) -> Record {
    Record { topic: Topic::Events, key, kind, rules: RULES, grant: Grant::Server, traceparent: None, value }
}
