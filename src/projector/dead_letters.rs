//! Dead letters: deliveries that were given up (records of their own topic), foreign records in the log, and events that
//! broke the order of their run.
//!
//! A dead letter's id is made of what it is about. Written twice, the first one stays.

use std::collections::HashSet;

use serde::Deserialize;

use super::transaction::{EventRecord, Transaction};
use super::{Published, RecordError};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::error::Error;
use crate::protocol::records::{DeadLetterRecord, RUN_ORDER, UNREADABLE};
use crate::protocol::{ids, json};
use crate::store::dead_letters::{DeadLetterRow, SourceRow};
use crate::store::{Partition, StoreError};

/// How much of a foreign record is kept.
const KEPT_BYTES: usize = 64 << 10;

/// The dead letters of this batch, by tenant and id.
#[derive(Default)]
pub(super) struct DeadLetters {
    ids: HashSet<(String, [u8; 16])>,
}

/// Where a foreign record is in the log.
pub(super) struct ForeignSource<'a> {
    pub(super) topic: &'a str,
    pub(super) partition: u32,
    pub(super) offset: u64,
}

impl DeadLetters {
    /// Applies a record of the topic `dead-letters`, and returns its time.
    pub(super) fn apply(
        &mut self,
        tx: &mut Transaction<'_>,
        partition: Partition,
        record: &Record,
    ) -> Result<u64, RecordError> {
        let (letter, at) = read(record).map_err(|why| Foreign::new(why, record))?;
        let row = DeadLetterRow {
            reason: letter.reason,
            at,
            thread: Some(letter.thread),
            attempts: letter.attempts,
            error: letter.error,
            user: Some(letter.user),
            name: letter.name,
            seq: Some(letter.seq),
            event: None,
            source: None,
        };
        self.put(tx, partition, &letter.tenant, *letter.letter.as_bytes(), row)?;

        // Who wrote it waits only for its commit.
        let published = Published { seq: 0, event: letter.id, duplicate: false };
        tx.commit.verdicts.push((letter.id, Ok(published)));
        Ok(at)
    }

    /// Keeps a foreign record, for the tenant that its key or its value names.
    pub(super) fn put_foreign(
        &mut self,
        tx: &mut Transaction<'_>,
        source: &ForeignSource<'_>,
        foreign: &Foreign,
        newest: u64,
    ) -> Result<(), StoreError> {
        let ForeignSource { topic, partition, offset } = *source;
        let letter = DeadLetterRecord::letter_of(&[
            UNREADABLE.as_bytes(),
            topic.as_bytes(),
            &partition.to_be_bytes(),
            &offset.to_be_bytes(),
        ]);

        let (tenant, thread) = tenant_of_foreign(foreign);
        let value = foreign.value.as_deref().unwrap_or_default();
        let row = DeadLetterRow {
            reason: UNREADABLE.into(),
            at: foreign.at.unwrap_or(newest),
            thread,
            attempts: 1,
            // The reason may quote the record, which only its own tenant may see.
            error: if tenant.is_empty() { "the record is not Weft's".into() } else { foreign.why.clone() },
            user: None,
            name: None,
            seq: None,
            event: None,
            source: Some(SourceRow {
                topic: topic.to_owned(),
                partition,
                offset,
                size: value.len() as u64,
                bytes: value[..value.len().min(KEPT_BYTES)].to_vec(),
            }),
        };

        self.put(tx, Partition::new(partition), &tenant, *letter.as_bytes(), row)
    }

    /// Keeps an event that broke the order of its run.
    pub(super) fn put_refused(
        &mut self,
        tx: &mut Transaction<'_>,
        input: &EventRecord<'_>,
        refused: &Error,
    ) -> Result<(), StoreError> {
        let event = input.event;
        let letter = DeadLetterRecord::letter_of(&[RUN_ORDER.as_bytes(), event.event.as_bytes()]);
        let row = DeadLetterRow {
            reason: RUN_ORDER.into(),
            at: input.at,
            thread: Some(event.thread.to_string()),
            attempts: 1,
            error: refused.message.to_string(),
            user: Some(event.from.to_string()),
            name: None,
            seq: None,
            event: std::str::from_utf8(&input.record.value).ok().map(str::to_owned),
            source: None,
        };
        self.put(tx, Partition::new(input.partition), &event.tenant, *letter.as_bytes(), row)
    }

    fn put(
        &mut self,
        tx: &mut Transaction<'_>,
        partition: Partition,
        tenant: &str,
        id: [u8; 16],
        row: DeadLetterRow,
    ) -> Result<(), StoreError> {
        let new_in_batch = self.ids.insert((tenant.to_owned(), id));
        if new_in_batch && tx.store.dead_letter_in(partition, tenant, &id)?.is_none() {
            tx.rows.put_dead_letter(partition, tenant, id, &row);
            tx.commit.dead_letters.push(row.reason);
        }
        Ok(())
    }
}

/// The dead letter in a record, and its time in milliseconds; or why the record is foreign.
fn read(record: &Record) -> Result<(DeadLetterRecord, u64), String> {
    let letter: DeadLetterRecord = read_value(record)?;
    check_names(&letter.tenant, Some(&letter.thread), &letter.user)?;
    let at = clock::parse_rfc3339(&letter.at).ok_or("at is not RFC 3339")?;
    Ok((letter, at))
}

/// The value of a record that is no event.
pub(super) fn read_value<'a, T: Deserialize<'a>>(record: &'a Record) -> Result<T, String> {
    json::decode_bytes(&record.value).map_err(|error| format!("the value is not of this topic: {}", error.message))
}

/// Checks the names in a record that is no event.
pub(super) fn check_names(tenant: &str, thread: Option<&str>, user: &str) -> Result<(), String> {
    ids::check_name("tenant", tenant)
        .and(ids::check_name("user", user))
        .and(thread.map_or(Ok(()), ids::check_thread))
        .map_err(|error| error.to_string())
}

/// The tenant and the thread of a foreign record, as far as its key or its value names them. No admin of another tenant
/// may see the record, so the tenant is empty where none is named.
fn tenant_of_foreign(foreign: &Foreign) -> (String, Option<String>) {
    #[derive(Deserialize)]
    struct NamesTenant {
        tenant: String,
    }

    let key = foreign.key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
    if let Some((tenant, thread)) = key.and_then(|key| key.split_once('/'))
        && ids::check_name("tenant", tenant).and(ids::check_thread(thread)).is_ok()
    {
        return (tenant.to_owned(), Some(thread.to_owned()));
    }

    let value = foreign.value.as_deref().unwrap_or_default();
    match serde_json::from_slice::<NamesTenant>(value) {
        Ok(NamesTenant { tenant }) if ids::check_name("tenant", &tenant).is_ok() => (tenant, None),
        _ => (String::new(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_record_belongs_to_the_tenant_that_its_key_or_its_value_names() {
        let of = |key: Option<&'static str>, value: &'static str| {
            let key = key.map(|key| key.as_bytes().into());
            let (tenant, thread) =
                tenant_of_foreign(&Foreign { why: String::new(), key, value: Some(value.as_bytes().into()), at: None });
            (tenant, thread.unwrap_or_default())
        };
        let names = |tenant: &str, thread: &str| (tenant.to_owned(), thread.to_owned());
        assert_eq!(of(Some("acme/t"), r#"{"tenant":"other"}"#), names("acme", "t"));
        assert_eq!(of(Some("acme"), r#"{"tenant":"other"}"#), names("other", ""));
        assert_eq!(of(None, r#"{"tenant":"not a name"}"#), names("", ""));
        assert_eq!(of(None, "garbage"), names("", ""));
    }
}
