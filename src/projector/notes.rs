//! What the log holds beside events: receipts (how far somebody has come) and dead letters.
//!
//! Both are judged from the record alone. A receipt only moves forward, so that an old one that arrives late, or is all
//! that compaction left, takes nothing back that was confirmed. Dead letters have an id made of what they are about: written
//! twice, the first one stays.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Committed, Places};
use crate::error::Error;
use crate::event::LogEvent;
use crate::log::{Foreign, Grant, Position, Record, Topic};
use crate::store::dead_letters::{DeadLetterRow, SourceRow};
use crate::store::{Batch, ReceiptRow, Store, StoreError, keys};
use crate::submit::Published;
use crate::{clock, ids};

/// The reason of a record that is not ours.
pub const UNREADABLE: &str = "unreadable";
/// The reason of an event that a subscription with `confirm` was sent again and again.
pub const UNACKNOWLEDGED: &str = "unacknowledged";
/// The reason of an event that broke the order of its run.
pub const RUN_ORDER: &str = "run_order";
/// What is kept of a record that is not ours.
const KEPT_BYTES: usize = 64 << 10;

/// A receipt as the log has it, in the topic `receipts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiptNote {
    /// UUIDv7 of this record.
    pub id: Uuid,
    pub tenant: String,
    /// A thread, or `*` for the durable subscription to all threads itself.
    pub thread: String,
    pub user: String,
    /// The durable subscription, empty for acknowledgements without one.
    pub name: String,
    /// The seq behind which the subscription goes on.
    pub place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub acked: u64,
    /// The newest seq sent and not acknowledged.
    pub sent: u64,
    /// How often the event behind `place` was sent.
    pub attempts: u32,
    /// RFC 3339.
    pub at: String,
}

impl ReceiptNote {
    /// The record: one key for each subscription, so that compaction leaves each its newest.
    pub fn record(&self) -> Record {
        Record {
            topic: Topic::Receipts,
            key: [&*self.tenant, &self.thread, &self.user, &self.name].join("/"),
            kind: "receipt".into(),
            grant: Grant::Scope,
            traceparent: None,
            // Strings and numbers always serialise.
            value: Bytes::from(serde_json::to_vec(self).unwrap_or_default()),
        }
    }
}

/// A delivery that was given up, as the log has it, in the topic `dead-letters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterNote {
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
}

impl DeadLetterNote {
    /// The id of a dead letter about these facts.
    pub fn letter_of(facts: &[&[u8]]) -> Uuid {
        let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 dead letter");
        for fact in facts {
            hasher.update(&(fact.len() as u64).to_be_bytes()).update(fact);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        uuid::Builder::from_custom_bytes(id).into_uuid()
    }

    pub fn record(&self) -> Record {
        Record {
            topic: Topic::DeadLetters,
            key: ids::log_key(&self.tenant, &self.thread),
            kind: self.reason.clone(),
            grant: Grant::Scope,
            traceparent: None,
            // Strings and numbers always serialise.
            value: Bytes::from(serde_json::to_vec(self).unwrap_or_default()),
        }
    }
}

/// What the batch in hand has, which the store does not show yet.
#[derive(Default)]
pub(super) struct Notes {
    receipts: HashMap<Vec<u8>, ReceiptRow>,
    letters: HashSet<(String, [u8; 16])>,
}

impl Notes {
    pub(super) fn clear(&mut self) {
        self.receipts.clear();
        self.letters.clear();
    }

    /// Takes a receipt or a dead letter, and gives its time; the inner error says why it is not ours.
    pub(super) fn take(
        &mut self,
        store: &Store,
        record: &Record,
        batch: &mut Batch<'_>,
        out: &mut Committed,
    ) -> Result<Result<u64, Foreign>, StoreError> {
        let foreign = |why: String| Foreign::new(why, record);
        let (id, at) = match record.topic {
            Topic::Receipts => match read::<ReceiptNote>(record).and_then(|note| {
                check(&note.tenant, (note.thread != "*").then_some(&note.thread), &note.user)?;
                Ok((clock::parse_rfc3339(&note.at).ok_or("at is not RFC 3339")?, note))
            }) {
                Ok((at, note)) => (self.receipt(store, note, at, batch)?, at),
                Err(why) => return Ok(Err(foreign(why))),
            },
            _ => match read::<DeadLetterNote>(record).and_then(|note| {
                check(&note.tenant, Some(&note.thread), &note.user)?;
                Ok((clock::parse_rfc3339(&note.at).ok_or("at is not RFC 3339")?, note))
            }) {
                Ok((at, note)) => {
                    let row = DeadLetterRow {
                        reason: note.reason,
                        at,
                        thread: Some(note.thread),
                        attempts: note.attempts,
                        error: note.error,
                        user: Some(note.user),
                        name: note.name,
                        seq: Some(note.seq),
                        event: None,
                        source: None,
                    };
                    self.put(store, &note.tenant, *note.letter.as_bytes(), row, batch, out)?;
                    (note.id, at)
                }
                Err(why) => return Ok(Err(foreign(why))),
            },
        };
        // Whoever wrote it wants to know that it is there, no more.
        out.verdicts.push((id, Ok(Published { seq: 0, event: id, duplicate: false })));
        Ok(Ok(at))
    }

    fn receipt(
        &mut self,
        store: &Store,
        note: ReceiptNote,
        at: u64,
        batch: &mut Batch<'_>,
    ) -> Result<Uuid, StoreError> {
        let key = keys::joined(&[&note.tenant, &note.thread, &note.user, &note.name]);
        let old = match self.receipts.get(&key) {
            Some(row) => Some(row.clone()),
            None => store.receipt(&note.tenant, &note.thread, &note.user, &note.name)?,
        };
        let old = old.unwrap_or_default();
        let (sent, attempts) =
            if note.place < old.place { (old.sent, old.attempts) } else { (note.sent, note.attempts) };
        let row = ReceiptRow { place: note.place.max(old.place), acked: note.acked.max(old.acked), sent, attempts, at };
        batch.put_receipt(&note.tenant, &note.thread, &note.user, &note.name, &row);
        self.receipts.insert(key, row);
        Ok(note.id)
    }

    /// Makes a dead letter of a record that is not ours, for the tenant that its key or its value names.
    #[expect(clippy::too_many_arguments, reason = "each is a thing of its own")]
    pub(super) fn bury(
        &mut self,
        store: &Store,
        places: &Places,
        at: Position,
        foreign: &Foreign,
        log_time: u64,
        batch: &mut Batch<'_>,
        out: &mut Committed,
    ) -> Result<(), StoreError> {
        let Some((topic, partition)) = places.topics.get(at.partition as usize) else { return Ok(()) };
        let topic = &places.names[*topic as usize];
        let value = foreign.value.as_deref().unwrap_or_default();
        let (tenant, thread) = owner(foreign);
        let letter = DeadLetterNote::letter_of(&[
            UNREADABLE.as_bytes(),
            topic.as_bytes(),
            &partition.to_be_bytes(),
            &at.offset.to_be_bytes(),
        ]);
        let row = DeadLetterRow {
            reason: UNREADABLE.into(),
            at: foreign.at.unwrap_or(log_time),
            thread,
            attempts: 1,
            // The reason may quote the record.
            error: if tenant.is_empty() { "the record is not ours".into() } else { foreign.why.clone() },
            user: None,
            name: None,
            seq: None,
            event: None,
            source: Some(SourceRow {
                topic: topic.clone(),
                partition: *partition,
                offset: at.offset,
                size: value.len() as u64,
                bytes: value[..value.len().min(KEPT_BYTES)].to_vec(),
            }),
        };
        self.put(store, &tenant, *letter.as_bytes(), row, batch, out)
    }

    /// Keeps an event that broke the order of its run.
    pub(super) fn refuse(
        &mut self,
        store: &Store,
        record: &Record,
        (event, at): (&LogEvent<'_>, u64),
        refusal: &Error,
        batch: &mut Batch<'_>,
        out: &mut Committed,
    ) -> Result<(), StoreError> {
        let letter = DeadLetterNote::letter_of(&[RUN_ORDER.as_bytes(), event.event.as_bytes()]);
        let row = DeadLetterRow {
            reason: RUN_ORDER.into(),
            at,
            thread: Some(event.thread.to_string()),
            attempts: 1,
            error: refusal.message.to_string(),
            user: Some(event.from.to_string()),
            name: None,
            seq: None,
            event: std::str::from_utf8(&record.value).ok().map(str::to_owned),
            source: None,
        };
        self.put(store, &event.tenant, *letter.as_bytes(), row, batch, out)
    }

    fn put(
        &mut self,
        store: &Store,
        tenant: &str,
        id: [u8; 16],
        row: DeadLetterRow,
        batch: &mut Batch<'_>,
        out: &mut Committed,
    ) -> Result<(), StoreError> {
        if self.letters.insert((tenant.to_owned(), id)) && store.dead_letter(tenant, &id)?.is_none() {
            batch.put_dead_letter(tenant, id, &row);
            out.dead_letters.push(row.reason);
        }
        Ok(())
    }
}

fn read<'a, T: Deserialize<'a>>(record: &'a Record) -> Result<T, String> {
    serde_json::from_slice(&record.value).map_err(|error| format!("the value is not of this topic: {error}"))
}

fn check(tenant: &str, thread: Option<&String>, user: &str) -> Result<(), String> {
    ids::check_name("tenant", tenant)
        .and(ids::check_name("user", user))
        .and(thread.map_or(Ok(()), |thread| ids::check_thread(thread)))
        .map_err(|error| error.to_string())
}

/// Whose a record that is not ours may be: nobody else's admin shall see it. Empty if nobody can tell.
fn owner(foreign: &Foreign) -> (String, Option<String>) {
    let key = foreign.key.as_deref().and_then(|key| std::str::from_utf8(key).ok()).and_then(|key| key.split_once('/'));
    if let Some((tenant, thread)) = key
        && ids::check_name("tenant", tenant).and(ids::check_thread(thread)).is_ok()
    {
        return (tenant.to_owned(), Some(thread.to_owned()));
    }
    #[derive(Deserialize)]
    struct Named {
        tenant: String,
    }
    let named = foreign.value.as_deref().and_then(|value| serde_json::from_slice::<Named>(value).ok());
    let tenant = named.map(|named| named.tenant).filter(|tenant| ids::check_name("tenant", tenant).is_ok());
    (tenant.unwrap_or_default(), None)
}
