//! What a node made of a partition of events, as a record in that very partition: other nodes compare what they made of it.

use super::{Grant, RULES, Record, Topic};
use crate::clock;
use crate::protocol::json;
use crate::protocol::records::LogCheckpointRecord;

/// The key of all records about the log itself. No event has it: theirs are `tenant/thread`.
pub(super) const LOG_KEY: &str = "weft";

const KIND: &str = "log_checkpoint";

/// A hash over what was accepted in a partition of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log's epoch when it was written.
    pub epoch: String,
    /// Which node wrote it, for people.
    pub node: String,
    pub partition: u32,
    /// All records before this offset count.
    pub offset: u64,
    pub hash: [u8; 32],
}

impl Checkpoint {
    /// Whether a record is a checkpoint.
    pub(super) fn is(record: &Record) -> bool {
        record.key == LOG_KEY && record.topic == Topic::Events && record.kind == KIND
    }

    /// The checkpoint in a record, if it is one.
    pub fn of(record: &Record) -> Option<Checkpoint> {
        if !Checkpoint::is(record) {
            return None;
        }
        let value: LogCheckpointRecord = serde_json::from_slice(&record.value).ok()?;
        let mut hash = [0; 32];
        hash.copy_from_slice(blake3::Hash::from_hex(&value.hash).ok()?.as_bytes());
        let LogCheckpointRecord { epoch, node, partition, offset, .. } = value;
        Some(Checkpoint { epoch, node, partition, offset, hash })
    }

    pub(super) fn record(&self) -> Record {
        let value = LogCheckpointRecord {
            kind: KIND.to_owned(),
            epoch: self.epoch.clone(),
            node: self.node.clone(),
            partition: self.partition,
            offset: self.offset,
            hash: blake3::Hash::from_bytes(self.hash).to_hex().to_string(),
            at: clock::rfc3339(clock::now_ms()),
        };
        Record {
            topic: Topic::Events,
            key: LOG_KEY.to_owned(),
            kind: KIND.to_owned(),
            rules: RULES,
            grant: Grant::Scope,
            traceparent: None,
            value: json::encode_bytes(&value).into(),
        }
    }
}
