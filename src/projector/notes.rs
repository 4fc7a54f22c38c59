//! What the log holds beside events: receipts (how far somebody has come) and dead letters.
//!
//! Both are judged from the record alone. A receipt only moves forward, so that an old one that arrives late, or is all
//! that compaction left, takes nothing back that was confirmed. Dead letters have an id made of what they are about: written
//! twice, the first one stays.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use uuid::Uuid;

use super::Published;
use super::{Commit, Places};
use crate::clock;
use crate::log::{Foreign, Position, Record, Topic};
use crate::protocol::error::Error;
use crate::protocol::event::LogEvent;
use crate::protocol::ids;
use crate::protocol::records::{DeadLetterRecord, RUN_ORDER, ReceiptRecord, UNREADABLE};
use crate::store::dead_letters::{DeadLetterRow, SourceRow};
use crate::store::{Batch, ReceiptRow, Store, StoreError, keys};

/// What is kept of a record that is not ours.
const KEPT_BYTES: usize = 64 << 10;

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
        out: &mut Commit,
    ) -> Result<Result<u64, Foreign>, StoreError> {
        let foreign = |why: String| Foreign::new(why, record);
        let (id, at) = match record.topic {
            Topic::Receipts => match read::<ReceiptRecord>(record).and_then(|note| {
                check(&note.tenant, (note.thread != "*").then_some(&note.thread), &note.user)?;
                Ok((clock::parse_rfc3339(&note.at).ok_or("at is not RFC 3339")?, note))
            }) {
                Ok((at, note)) => (self.receipt(store, note, at, batch)?, at),
                Err(why) => return Ok(Err(foreign(why))),
            },
            _ => match read::<DeadLetterRecord>(record).and_then(|note| {
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
        note: ReceiptRecord,
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
    pub(super) fn dead_letter(
        &mut self,
        store: &Store,
        places: &Places,
        at: Position,
        foreign: &Foreign,
        log_time: u64,
        batch: &mut Batch<'_>,
        out: &mut Commit,
    ) -> Result<(), StoreError> {
        let Some((topic, partition)) = places.topics.get(at.partition as usize) else { return Ok(()) };
        let topic = &places.names[*topic as usize];
        let value = foreign.value.as_deref().unwrap_or_default();
        let (tenant, thread) = owner(foreign);
        let letter = DeadLetterRecord::letter_of(&[
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
        out: &mut Commit,
    ) -> Result<(), StoreError> {
        let letter = DeadLetterRecord::letter_of(&[RUN_ORDER.as_bytes(), event.event.as_bytes()]);
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
        out: &mut Commit,
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
