//! Dead letters: events and records that could not be handled, each with the reason.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use bincode::{Decode, Encode};
use rocksdb::{IteratorMode, ReadOptions};

use super::catalogue::{DEAD_LETTER_TIMES, DEAD_LETTERS};
use super::{Batch, Store, StoreError, keys};

/// A dead letter. What does not apply to its reason is empty.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeadLetterRow {
    pub reason: String,
    /// Milliseconds.
    pub at: u64,
    pub thread: Option<String>,
    pub attempts: u32,
    pub error: String,
    pub user: Option<String>,
    pub name: Option<String>,
    pub seq: Option<u64>,
    /// The event as its record has it, if it was refused and so has no seq.
    pub event: Option<String>,
    pub source: Option<SourceRow>,
}

/// A record that cannot be read, and its position.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SourceRow {
    pub topic: String,
    pub partition: u32,
    pub offset: u64,
    /// Its length; `bytes` may be cut short.
    pub size: u64,
    pub bytes: Vec<u8>,
}

/// Where a list of dead letters goes on: after this one. The newest comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeadLetterCursor {
    pub at: u64,
    pub id: [u8; 16],
}

/// Which dead letters a list shall have.
#[derive(Debug, Clone, Default)]
pub struct DeadLetterFilter {
    pub reason: Option<String>,
    pub thread: Option<String>,
}

impl DeadLetterFilter {
    fn accepts(&self, row: &DeadLetterRow) -> bool {
        self.reason.as_ref().is_none_or(|reason| *reason == row.reason)
            && self.thread.as_ref().is_none_or(|thread| row.thread.as_ref() == Some(thread))
    }
}

/// Rows that one page looks at; with a filter, the next page looks at the rest.
const SCAN: usize = 10_000;

impl Store {
    /// A tenant's dead letter; those whose tenant is not known are under an empty one.
    pub fn dead_letter(&self, tenant: &str, id: &[u8; 16]) -> Result<Option<DeadLetterRow>, StoreError> {
        self.get(DEAD_LETTERS, &key(tenant, id))
    }

    /// Visits dead letters of these tenants, newest first, from after a cursor on, each with whether its tenant is known,
    /// until `visit` breaks off. Gives where the next page begins, if there is more.
    pub fn dead_letters<E: From<StoreError>>(
        &self,
        tenants: &[&str],
        filter: &DeadLetterFilter,
        after: Option<DeadLetterCursor>,
        mut visit: impl FnMut(DeadLetterCursor, DeadLetterRow, bool) -> Result<ControlFlow<()>, E>,
    ) -> Result<Option<DeadLetterCursor>, E> {
        let mut cursors: BTreeMap<DeadLetterCursor, &str> = BTreeMap::new();
        for tenant in tenants {
            let found = self.newest_cursors(tenant, after)?;
            cursors.extend(found.into_iter().map(|cursor| (cursor, *tenant)));
        }

        let looked_at_all = cursors.len() < SCAN;
        let mut last = None;
        let mut cursors = cursors.into_iter().rev().take(SCAN).peekable();
        while let Some((cursor, tenant)) = cursors.next() {
            last = Some(cursor);
            if let Some(row) = self.dead_letter(tenant, &cursor.id)?.filter(|row| filter.accepts(row))
                && visit(cursor, row, !tenant.is_empty())?.is_break()
            {
                return Ok(last.filter(|_| cursors.peek().is_some() || !looked_at_all));
            }
        }
        Ok(last.filter(|_| !looked_at_all))
    }

    /// The newest dead letters of a tenant after a cursor, as many as a page looks at.
    fn newest_cursors(
        &self,
        tenant: &str,
        after: Option<DeadLetterCursor>,
    ) -> Result<Vec<DeadLetterCursor>, StoreError> {
        let prefix = keys::prefix(&[tenant]);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(prefix.clone());
        options.set_iterate_upper_bound(match after {
            Some(cursor) => time_key(tenant, cursor),
            None => keys::after(prefix.clone()),
        });
        let rows = self.db.iterator_cf_opt(&self.family(DEAD_LETTER_TIMES), options, IteratorMode::End);
        let cursors = rows.take(SCAN).map(|row| row.map(|(key, _)| cursor_of(&key[prefix.len()..])));
        cursors.collect::<Result<_, _>>().map_err(|error| self.note(error.into()))
    }
}

impl Batch<'_> {
    /// Puts a dead letter into the list; the first one with an id stays.
    pub fn put_dead_letter(&mut self, tenant: &str, id: [u8; 16], row: &DeadLetterRow) {
        self.put(DEAD_LETTERS, &key(tenant, &id), row);
        self.put_empty(DEAD_LETTER_TIMES, &time_key(tenant, DeadLetterCursor { at: row.at, id }));
    }
}

fn key(tenant: &str, id: &[u8; 16]) -> Vec<u8> {
    [&keys::prefix(&[tenant])[..], id].concat()
}

fn time_key(tenant: &str, cursor: DeadLetterCursor) -> Vec<u8> {
    [&keys::prefix(&[tenant])[..], &cursor.at.to_be_bytes(), &cursor.id].concat()
}

fn cursor_of(rest: &[u8]) -> DeadLetterCursor {
    let (mut at, mut id) = ([0; 8], [0; 16]);
    if rest.len() == 24 {
        at.copy_from_slice(&rest[..8]);
        id.copy_from_slice(&rest[8..]);
    }
    DeadLetterCursor { at: u64::from_be_bytes(at), id }
}
