//! Dead letters: what could not be handled, kept with its reason.

use std::collections::BTreeMap;

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

/// Where a record stood that cannot be read, and what it was.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SourceRow {
    pub topic: String,
    pub partition: u32,
    pub offset: u64,
    /// Its length; `bytes` may be cut short.
    pub size: u64,
    pub bytes: Vec<u8>,
}

/// A dead letter's place in the list: newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListPlace {
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
    fn takes(&self, row: &DeadLetterRow) -> bool {
        self.reason.as_ref().is_none_or(|reason| *reason == row.reason)
            && self.thread.as_ref().is_none_or(|thread| row.thread.as_ref() == Some(thread))
    }
}

/// Rows that one page looks at; with a filter, the rest is the next page's.
const SCAN: usize = 10_000;

/// A page of dead letters, each with whether its tenant is known, and where the next page begins.
pub type DeadLetterPage = (Vec<(ListPlace, DeadLetterRow, bool)>, Option<ListPlace>);

impl Store {
    /// A tenant's dead letter; an empty tenant has those whose tenant nobody can tell.
    pub fn dead_letter(&self, tenant: &str, id: &[u8; 16]) -> Result<Option<DeadLetterRow>, StoreError> {
        self.get(DEAD_LETTERS, &key(tenant, id))
    }

    /// Dead letters of these tenants, newest first, from behind a place on.
    pub fn dead_letters(
        &self,
        tenants: &[&str],
        filter: &DeadLetterFilter,
        behind: Option<ListPlace>,
        limit: usize,
    ) -> Result<DeadLetterPage, StoreError> {
        let mut places: BTreeMap<ListPlace, &str> = BTreeMap::new();
        for tenant in tenants {
            let found = self.dead_letter_places(tenant, behind)?;
            places.extend(found.into_iter().map(|place| (place, *tenant)));
        }
        let looked_at_all = places.len() < SCAN;
        let (mut page, mut last) = (Vec::new(), None);
        for (place, tenant) in places.into_iter().rev().take(SCAN) {
            if page.len() == limit {
                return Ok((page, last));
            }
            last = Some(place);
            if let Some(row) = self.dead_letter(tenant, &place.id)?.filter(|row| filter.takes(row)) {
                page.push((place, row, !tenant.is_empty()));
            }
        }
        Ok((page, last.filter(|_| !looked_at_all)))
    }

    /// The newest places behind one, as many as a page looks at.
    fn dead_letter_places(&self, tenant: &str, behind: Option<ListPlace>) -> Result<Vec<ListPlace>, StoreError> {
        let prefix = keys::prefix(&[tenant]);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(prefix.clone());
        options.set_iterate_upper_bound(match behind {
            Some(place) => time_key(tenant, place),
            None => keys::behind(prefix.clone()),
        });
        let rows = self.db.iterator_cf_opt(&self.family(DEAD_LETTER_TIMES), options, IteratorMode::End);
        rows.take(SCAN).map(|row| Ok(place_of(&row?.0[prefix.len()..]))).collect()
    }
}

impl Batch<'_> {
    /// Puts a dead letter into the list; the first one with an id stays.
    pub fn put_dead_letter(&mut self, tenant: &str, id: [u8; 16], row: &DeadLetterRow) {
        self.put(DEAD_LETTERS, &key(tenant, &id), row);
        self.rows.put_cf(&self.store.family(DEAD_LETTER_TIMES), time_key(tenant, ListPlace { at: row.at, id }), []);
    }
}

fn key(tenant: &str, id: &[u8; 16]) -> Vec<u8> {
    [&keys::prefix(&[tenant])[..], id].concat()
}

fn time_key(tenant: &str, place: ListPlace) -> Vec<u8> {
    [&keys::prefix(&[tenant])[..], &place.at.to_be_bytes(), &place.id].concat()
}

fn place_of(rest: &[u8]) -> ListPlace {
    let (mut at, mut id) = ([0; 8], [0; 16]);
    if rest.len() == 24 {
        at.copy_from_slice(&rest[..8]);
        id.copy_from_slice(&rest[8..]);
    }
    ListPlace { at: u64::from_be_bytes(at), id }
}
