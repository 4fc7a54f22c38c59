//! Dead letters: deliveries that were given up (records of their own topic), foreign records in the log, events that broke the
//! order of their run, and work that a group gave up.
//!
//! A dead letter's id is made of what it is about. Written twice, the first one stays; what fails again after it was requeued
//! is the same letter, with its history.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use uuid::Uuid;

use super::deliveries::Deliveries;
use super::rules;
use super::transaction::{EventRecord, Transaction};
use super::{Published, RecordError};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::dead_letters::{RUN_ORDER, SCHEMA, UNREADABLE, letter_of, normalised};
use crate::protocol::error::Error;
use crate::protocol::records::DeadLetterRecord;
use crate::protocol::{ids, json};
use crate::store::dead_letters::{CountRow, DeadLetterRow, LetterState, List, SourceRow, TryRow};
use crate::store::{StoreError, keys};

/// How much of a foreign record is kept.
const KEPT_BYTES: usize = 64 << 10;
/// How many of the newest attempts, and of the newest acts, are kept with a letter; the log has all.
const KEPT: usize = 20;

/// The dead letters of this batch, by tenant and id, and how many there are of each list that is counted.
pub(super) struct DeadLetters<'s> {
    rows: HashMap<(String, [u8; 16]), DeadLetterRow>,
    counts: HashMap<Vec<u8>, u64>,
    /// Held from the first look at them on, where other projectors write some to the same store: lists and counts are of a
    /// whole tenant, and what is done about a letter may be a record of another partition.
    only: Option<&'s Mutex<()>>,
    held: OnceCell<MutexGuard<'s, ()>>,
    pub(super) deliveries: Deliveries,
}

/// Where a foreign record is in the log.
pub(super) struct ForeignSource<'a> {
    pub(super) topic: &'a str,
    pub(super) partition: u32,
    pub(super) offset: u64,
}

/// An event that a group does not try any more.
pub(super) struct GivenUp<'a> {
    pub(super) letter: Uuid,
    pub(super) tenant: &'a str,
    pub(super) thread: &'a str,
    pub(super) group: &'a str,
    pub(super) seq: u64,
    /// The event's.
    pub(super) kind: String,
    pub(super) reason: &'static str,
    pub(super) attempts: u32,
    pub(super) at: u64,
    /// The newest attempts, the last one at the end.
    pub(super) tries: Vec<TryRow>,
}

/// An event of another program's that is not what it has to be.
pub(super) struct Broken {
    pub(super) tenant: String,
    pub(super) thread: String,
    pub(super) kind: Option<String>,
    pub(super) from: Option<String>,
    pub(super) error: String,
}

impl ForeignSource<'_> {
    /// The id of the dead letter about the record that is there.
    fn letter(&self, reason: &str) -> Uuid {
        let (partition, offset) = (self.partition.to_be_bytes(), self.offset.to_be_bytes());
        letter_of(&[reason.as_bytes(), self.topic.as_bytes(), &partition, &offset])
    }

    /// What is kept of it.
    fn row(&self, foreign: &Foreign) -> SourceRow {
        let value = foreign.value.as_deref().unwrap_or_default();
        SourceRow {
            topic: self.topic.to_owned(),
            partition: self.partition,
            offset: self.offset,
            size: value.len() as u64,
            bytes: value[..value.len().min(KEPT_BYTES)].to_vec(),
        }
    }
}

impl<'s> DeadLetters<'s> {
    pub(super) fn new(only: Option<&'s Mutex<()>>) -> DeadLetters<'s> {
        let (rows, counts, deliveries) = (HashMap::new(), HashMap::new(), Deliveries::default());
        DeadLetters { rows, counts, deliveries, only, held: OnceCell::new() }
    }

    /// Applies a dead letter of the topic `dead-letters`, and returns its time.
    pub(super) fn apply(&mut self, tx: &mut Transaction<'_>, record: &Record) -> Result<u64, RecordError> {
        let (letter, at) = read(record).map_err(|why| Foreign::new(why, record))?;
        let tries = read_tries(&letter).map_err(|why| Foreign::new(why, record))?;
        let row = DeadLetterRow {
            thread: Some(letter.thread),
            user: Some(letter.user),
            name: letter.name,
            seq: Some(letter.seq),
            order: letter.seq,
            round: letter.round,
            tries,
            grant: letter.grant,
            ..DeadLetterRow::open(&letter.reason, letter.kind.as_deref(), at, letter.attempts, letter.error)
        };
        self.fail(tx, &letter.tenant, *letter.letter.as_bytes(), row)?;

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
        let (tenant, thread) = tenant_of_foreign(foreign);
        // The reason may quote the record, which only its own tenant may see.
        let error = if tenant.is_empty() { "the record is not Weft's".into() } else { foreign.why.clone() };
        let at = foreign.at.unwrap_or(newest);
        let row = DeadLetterRow {
            thread,
            order: source.offset,
            tries: vec![TryRow { at, worker: None, reason: error.clone() }],
            source: Some(source.row(foreign)),
            ..DeadLetterRow::open(UNREADABLE, None, at, 1, error)
        };

        self.fail(tx, &tenant, *source.letter(UNREADABLE).as_bytes(), row)
    }

    /// Keeps an event of another program's that is not what it has to be.
    pub(super) fn put_broken(
        &mut self,
        tx: &mut Transaction<'_>,
        source: &ForeignSource<'_>,
        foreign: &Foreign,
        broken: Broken,
        newest: u64,
    ) -> Result<(), StoreError> {
        let Broken { tenant, thread, kind, from, error } = broken;
        let at = foreign.at.unwrap_or(newest);
        let row = DeadLetterRow {
            thread: Some(thread),
            user: from.clone(),
            order: source.offset,
            tries: vec![TryRow { at, worker: from, reason: error.clone() }],
            source: Some(source.row(foreign)),
            ..DeadLetterRow::open(SCHEMA, kind.as_deref(), at, 1, error)
        };
        self.fail(tx, &tenant, *source.letter(SCHEMA).as_bytes(), row)
    }

    /// Keeps an event that broke the order of its run, in a thread that has this head.
    pub(super) fn put_refused(
        &mut self,
        tx: &mut Transaction<'_>,
        input: &EventRecord<'_>,
        head: u64,
        refused: &Error,
    ) -> Result<(), StoreError> {
        let event = input.event;
        let letter = letter_of(&[RUN_ORDER.as_bytes(), event.event.as_bytes()]);
        let error = refused.message.to_string();
        let from = event.from.to_string();
        let row = DeadLetterRow {
            thread: Some(event.thread.to_string()),
            user: Some(from.clone()),
            place: Some(head),
            order: order_of(event.event),
            event: std::str::from_utf8(&input.record.value).ok().map(str::to_owned),
            grant: Some(input.record.grant.as_str().to_owned()),
            tries: vec![TryRow { at: input.at, worker: Some(from), reason: error.clone() }],
            ..DeadLetterRow::open(RUN_ORDER, Some(&event.kind), input.at, 1, error)
        };
        self.fail(tx, &event.tenant, *letter.as_bytes(), row)
    }

    /// Keeps an event that a group's workers could not handle.
    pub(super) fn put_given_up(&mut self, tx: &mut Transaction<'_>, it: GivenUp<'_>) -> Result<(), StoreError> {
        let id = it.letter.as_bytes();
        // If it was requeued, it is open again.
        let was = self.row(tx, it.tenant, id)?;
        let round = was.as_ref().map_or(0, |was| was.round);
        let last = it.tries.last();
        let error = last.map_or_else(String::new, |last| last.reason.clone());
        let row = DeadLetterRow {
            thread: Some(it.thread.to_owned()),
            user: last.and_then(|last| last.worker.clone()),
            name: Some(it.group.to_owned()),
            seq: Some(it.seq),
            order: it.seq,
            tries: it.tries,
            round,
            ..DeadLetterRow::open(it.reason, Some(&it.kind), it.at, it.attempts, error)
        };
        self.fail_as(tx, (it.tenant, *id), was, row)
    }

    /// Work that was requeued is done.
    pub(super) fn put_worked(&mut self, tx: &mut Transaction<'_>, tenant: &str, id: Uuid) -> Result<(), StoreError> {
        match self.row(tx, tenant, id.as_bytes())? {
            Some(was) if was.state == LetterState::Requeued => {
                let row = DeadLetterRow { state: LetterState::Done, ..was.clone() };
                self.replace(tx, (tenant, *id.as_bytes()), Some(was), row)
            }
            _ => Ok(()),
        }
    }

    /// Something has failed: a new letter; or one that was requeued, and is open again. Otherwise it is known already.
    fn fail(
        &mut self,
        tx: &mut Transaction<'_>,
        tenant: &str,
        id: [u8; 16],
        row: DeadLetterRow,
    ) -> Result<(), StoreError> {
        let was = self.row(tx, tenant, &id)?;
        self.fail_as(tx, (tenant, id), was, row)
    }

    fn fail_as(
        &mut self,
        tx: &mut Transaction<'_>,
        letter: (&str, [u8; 16]),
        was: Option<DeadLetterRow>,
        row: DeadLetterRow,
    ) -> Result<(), StoreError> {
        let row = match &was {
            None => row,
            Some(was) if was.state == LetterState::Requeued && was.round == row.round => again(was, row),
            // It was discarded by a record that was read before it.
            Some(was) if was.source.is_none() && row.source.is_some() => {
                DeadLetterRow { state: was.state, acts: was.acts.clone(), ..row }
            }
            Some(_) => return Ok(()),
        };
        self.replace(tx, letter, was, row)
    }

    pub(super) fn row(
        &self,
        tx: &Transaction<'_>,
        tenant: &str,
        id: &[u8; 16],
    ) -> Result<Option<DeadLetterRow>, StoreError> {
        if let Some(only) = self.only {
            // It guards no value that a panic could leave half changed.
            self.held.get_or_init(|| only.lock().unwrap_or_else(PoisonError::into_inner));
        }
        match self.rows.get(&(tenant.to_owned(), *id)) {
            Some(row) => Ok(Some(row.clone())),
            None => tx.store.dead_letter(tenant, id),
        }
    }

    /// Writes a letter, and keeps lists and counts true to it.
    pub(super) fn put(
        &mut self,
        tx: &mut Transaction<'_>,
        tenant: &str,
        id: [u8; 16],
        row: DeadLetterRow,
    ) -> Result<(), StoreError> {
        let was = self.row(tx, tenant, &id)?;
        self.replace(tx, (tenant, id), was, row)
    }

    /// The same, where it is known already how the letter was.
    fn replace(
        &mut self,
        tx: &mut Transaction<'_>,
        (tenant, id): (&str, [u8; 16]),
        was: Option<DeadLetterRow>,
        row: DeadLetterRow,
    ) -> Result<(), StoreError> {
        tx.rows.put_dead_letter(tenant, id, was.as_ref(), &row);
        self.deliveries.follow(tx, tenant, id, (was.as_ref(), &row))?;

        let was_open = was.filter(|was| was.state == LetterState::Open);
        if row.state == LetterState::Open {
            self.count(tx, tenant, &row, true)?;
            if was_open.is_none() {
                tx.commit.dead_letters.push(row.reason.clone());
            }
        }
        if let Some(was) = was_open {
            self.count(tx, tenant, &was, false)?;
        }
        self.rows.insert((tenant.to_owned(), id), row);
        Ok(())
    }

    /// One letter more that is open, or one less, in each list that is counted.
    fn count(
        &mut self,
        tx: &mut Transaction<'_>,
        tenant: &str,
        row: &DeadLetterRow,
        more: bool,
    ) -> Result<(), StoreError> {
        for list in row.counted() {
            let key = keys::dead_letter_count(tenant, &list.name());
            let known = match self.counts.get(&key) {
                Some(open) => *open,
                None => tx.store.dead_letter_count(tenant, &list)?.map_or(0, |row| row.open),
            };
            let open = if more { known + 1 } else { known.saturating_sub(1) };
            self.counts.insert(key, open);

            let (kind, error) = match list {
                List::Fingerprint(_) | List::GroupFingerprint(..) => (row.kind.clone(), normalised(&row.error)),
                _ => (None, String::new()),
            };
            let count = CountRow { open, reason: row.reason.clone(), kind, error };
            tx.rows.put_dead_letter_count(tenant, &list, &count);
        }
        Ok(())
    }
}

/// A letter that was requeued and has failed again: what failed now, with the history.
pub(super) fn again(was: &DeadLetterRow, failed: DeadLetterRow) -> DeadLetterRow {
    let mut tries: Vec<TryRow> = was.tries.iter().cloned().chain(failed.tries).collect();
    keep_newest(&mut tries);
    DeadLetterRow { attempts: was.attempts + failed.attempts, tries, acts: was.acts.clone(), ..failed }
}

/// What sorts events of one millisecond as one node made them: UUIDv7 counts in the bytes after its time.
fn order_of(event: Uuid) -> u64 {
    let mut order = [0; 8];
    order.copy_from_slice(&event.as_bytes()[6..14]);
    u64::from_be_bytes(order)
}

pub(super) fn keep_newest<T>(of: &mut Vec<T>) {
    of.drain(..of.len().saturating_sub(KEPT));
}

/// The dead letter in a record, and its time in milliseconds; or why the record is foreign.
fn read(record: &Record) -> Result<(DeadLetterRecord, u64), String> {
    let letter: DeadLetterRecord = read_value(record)?;
    check_names(&letter.tenant, Some(&letter.thread), &letter.user)?;
    let at = clock::parse_rfc3339(&letter.at).ok_or("at is not RFC 3339")?;
    let has_more = letter.kind.is_some() || letter.round > 0 || !letter.tries.is_empty();
    if record.rules < rules::LETTERS_ARE_ACTED_ON && has_more {
        return Err("kind, round and tries are of version 3 of the rules".into());
    }
    if record.rules < rules::DELIVERIES_ARE_REQUEUED && letter.grant.is_some() {
        return Err("grant is of version 4 of the rules".into());
    }
    Ok((letter, at))
}

fn read_tries(letter: &DeadLetterRecord) -> Result<Vec<TryRow>, String> {
    let read = |tried: &crate::protocol::records::TryRecord| {
        let at = clock::parse_rfc3339(&tried.at).ok_or("at of tries is not RFC 3339")?;
        Ok(TryRow { at, worker: tried.worker.clone(), reason: tried.reason.clone() })
    };
    let newest = letter.tries.len().saturating_sub(KEPT);
    letter.tries[newest..].iter().map(read).collect()
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
                tenant_of_foreign(&Foreign { key, value: Some(value.as_bytes().into()), ..Foreign::default() });
            (tenant, thread.unwrap_or_default())
        };
        let names = |tenant: &str, thread: &str| (tenant.to_owned(), thread.to_owned());
        assert_eq!(of(Some("acme/t"), r#"{"tenant":"other"}"#), names("acme", "t"));
        assert_eq!(of(Some("acme"), r#"{"tenant":"other"}"#), names("other", ""));
        assert_eq!(of(None, r#"{"tenant":"not a name"}"#), names("", ""));
        assert_eq!(of(None, "garbage"), names("", ""));
    }
}
