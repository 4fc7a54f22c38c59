//! Dead letters: events and records that could not be handled, each with the reason.

use std::ops::ControlFlow;

use super::catalogue::{DEAD_LETTER_TIMES, DEAD_LETTERS};
use super::keys::Partition;
use super::merged::{Order, Span};
use super::{Batch, Store, StoreError, keys};
use bincode::{Decode, Encode};

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
    /// A tenant's dead letter; those whose tenant is not known are under an empty one. Looks in all partitions.
    pub fn dead_letter(&self, tenant: &str, id: &[u8; 16]) -> Result<Option<DeadLetterRow>, StoreError> {
        for partition in self.partitions() {
            if let Some(row) = self.dead_letter_in(partition, tenant, id)? {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    /// The same of one partition: that of the record which it is, or is about.
    pub fn dead_letter_in(
        &self,
        partition: Partition,
        tenant: &str,
        id: &[u8; 16],
    ) -> Result<Option<DeadLetterRow>, StoreError> {
        self.get(DEAD_LETTERS, &key(partition, tenant, id))
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
        let lists = tenants.iter().map(|tenant| {
            let list = self.newest_cursors(tenant, after).map(move |row| row.map(|it| (it, *tenant)));
            list.peekable()
        });
        let mut lists: Vec<_> = lists.collect();

        let mut last = None;
        for _ in 0..SCAN {
            // What cannot be read comes first, so that it is reported.
            let rank = |front: Option<&Result<_, _>>| match front {
                Some(Ok(((_, cursor), _))) => (1, Some(*cursor)),
                Some(Err(_)) => (2, None),
                None => (0, None),
            };
            let newest = (0..lists.len()).max_by_key(|at| rank(lists[*at].peek()));
            let Some(((partition, cursor), tenant)) = newest.and_then(|at| lists[at].next()).transpose()? else {
                return Ok(None);
            };
            last = Some(cursor);
            if let Some(row) = self.dead_letter_in(partition, tenant, &cursor.id)?.filter(|row| filter.accepts(row))
                && visit(cursor, row, !tenant.is_empty())?.is_break()
            {
                break;
            }
        }
        Ok(last.filter(|_| lists.iter_mut().any(|list| list.peek().is_some())))
    }

    /// A tenant's dead letters after a cursor, newest first.
    fn newest_cursors(
        &self,
        tenant: &str,
        after: Option<DeadLetterCursor>,
    ) -> impl Iterator<Item = Result<(Partition, DeadLetterCursor), StoreError>> + use<'_> {
        let to = after.map(time_bytes);
        let span = Span { from: &[], to: to.as_ref().map(|to| &to[..]) };
        let rows =
            self.merged(DEAD_LETTER_TIMES, |partition| keys::prefix(partition, &[tenant]), span, Order::Descending);
        rows.map(|row| row.map(|row| (row.partition, cursor_of(&row.rest))))
    }
}

impl Batch<'_> {
    /// Puts a dead letter into the list; the first one with an id stays.
    pub fn put_dead_letter(&mut self, partition: Partition, tenant: &str, id: [u8; 16], row: &DeadLetterRow) {
        self.put(DEAD_LETTERS, &key(partition, tenant, &id), row);
        let time = [keys::prefix(partition, &[tenant]), time_bytes(DeadLetterCursor { at: row.at, id })].concat();
        self.put_empty(DEAD_LETTER_TIMES, &time);
    }
}

fn key(partition: Partition, tenant: &str, id: &[u8; 16]) -> Vec<u8> {
    [&keys::prefix(partition, &[tenant])[..], id].concat()
}

fn time_bytes(cursor: DeadLetterCursor) -> Vec<u8> {
    [&cursor.at.to_be_bytes()[..], &cursor.id].concat()
}

fn cursor_of(rest: &[u8]) -> DeadLetterCursor {
    let (mut at, mut id) = ([0; 8], [0; 16]);
    if rest.len() == 24 {
        at.copy_from_slice(&rest[..8]);
        id.copy_from_slice(&rest[8..]);
    }
    DeadLetterCursor { at: u64::from_be_bytes(at), id }
}
