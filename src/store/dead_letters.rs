//! Dead letters: events and records that could not be handled, each with the reason, what was tried and who did what about it.
//!
//! A letter's row stays, so that its history can be read. The lists, and the counts, are of those that are open: nobody has
//! requeued or discarded them since they failed. Each is in a few lists, one for each way to narrow it down, all sorted by
//! time: so a page costs what it holds, however many letters there are.

use std::cmp::Ordering;
use std::iter::Peekable;
use std::ops::ControlFlow;

use bincode::{Decode, Encode};
use rocksdb::{IteratorMode, ReadOptions};

use super::catalogue::{DEAD_LETTER_COUNTS, DEAD_LETTER_TIMES, DEAD_LETTERS};
use super::{Batch, Store, StoreError, keys};
use crate::protocol::dead_letters::{Fingerprint, is_work};

/// A dead letter. What does not apply to its reason is empty.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeadLetterRow {
    pub reason: String,
    /// When it failed, the last time; milliseconds.
    pub at: u64,
    /// Sorts those of one thread that failed in the same millisecond.
    pub order: u64,
    pub thread: Option<String>,
    /// The event's kind.
    pub kind: Option<String>,
    pub attempts: u32,
    pub error: String,
    /// Of reason, kind and error: [`Fingerprint`].
    pub fingerprint: [u8; 8],
    pub user: Option<String>,
    /// The durable subscription, or the group.
    pub name: Option<String>,
    pub seq: Option<u64>,
    /// The thread's head when the event was refused.
    pub place: Option<u64>,
    /// The event as its record has it, if it was refused and so has no seq.
    pub event: Option<String>,
    /// By which right the refused event was written, or the subscription read ([`crate::log::Grant`]).
    pub grant: Option<String>,
    pub source: Option<SourceRow>,
    pub state: LetterState,
    /// How often it was requeued.
    pub round: u32,
    /// The newest attempts, oldest first.
    pub tries: Vec<TryRow>,
    /// What was done about it, oldest first.
    pub acts: Vec<ActRow>,
}

impl DeadLetterRow {
    /// A letter that is open, and has nothing but what all have.
    pub fn open(reason: &str, kind: Option<&str>, at: u64, attempts: u32, error: String) -> DeadLetterRow {
        DeadLetterRow {
            at,
            order: 0,
            attempts,
            fingerprint: Fingerprint::of(reason, kind, &error).0,
            reason: reason.to_owned(),
            kind: kind.map(str::to_owned),
            error,
            thread: None,
            user: None,
            name: None,
            seq: None,
            place: None,
            event: None,
            grant: None,
            source: None,
            state: LetterState::Open,
            round: 0,
            tries: Vec::new(),
            acts: Vec::new(),
        }
    }
}

impl DeadLetterRow {
    /// Whose work it was, if it was work.
    pub fn group(&self) -> Option<&String> {
        self.name.as_ref().filter(|_| is_work(&self.reason))
    }

    /// The lists that count it.
    pub fn counted(&self) -> Vec<List<'_>> {
        let fingerprint = Fingerprint(self.fingerprint);
        let mut lists = vec![List::Reason(&self.reason), List::Fingerprint(fingerprint)];
        if let Some(group) = self.group() {
            lists.extend([List::GroupReason(group, &self.reason), List::GroupFingerprint(group, fingerprint)]);
        }
        lists
    }
}

/// Whether somebody still has to see to a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub enum LetterState {
    #[default]
    Open,
    /// It is to be tried again, and nobody has yet.
    Requeued,
    /// It was tried again, with success.
    Done,
    Discarded,
}

/// An attempt at what became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TryRow {
    /// Milliseconds.
    pub at: u64,
    pub worker: Option<String>,
    pub reason: String,
}

/// What somebody did about a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActRow {
    /// The letter was discarded; else it was requeued.
    pub discarded: bool,
    pub by: String,
    /// Milliseconds.
    pub at: u64,
    pub note: Option<String>,
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

/// How many letters of a list are open, and what they have in common.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CountRow {
    pub open: u64,
    pub reason: String,
    pub kind: Option<String>,
    /// Without the numbers and ids that differ from one letter to the next.
    pub error: String,
}

/// Where a list of dead letters goes on: after this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeadLetterCursor {
    pub at: u64,
    pub order: u64,
    pub id: [u8; 16],
}

impl DeadLetterCursor {
    pub fn of(id: [u8; 16], row: &DeadLetterRow) -> DeadLetterCursor {
        DeadLetterCursor { at: row.at, order: row.order, id }
    }

    /// As it stands in a list's keys.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.at.to_be_bytes()[..], &self.order.to_be_bytes(), &self.id].concat()
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<DeadLetterCursor> {
        let (at, rest) = bytes.split_first_chunk()?;
        let (order, id) = rest.split_first_chunk()?;
        let (at, order) = (u64::from_be_bytes(*at), u64::from_be_bytes(*order));
        Some(DeadLetterCursor { at, order, id: id.try_into().ok()? })
    }
}

/// A list of open dead letters of a tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum List<'a> {
    All,
    Reason(&'a str),
    Fingerprint(Fingerprint),
    Kind(&'a str),
    Thread(&'a str),
    /// Work of a group.
    Group(&'a str),
    /// Counted, and no list.
    GroupReason(&'a str, &'a str),
    GroupFingerprint(&'a str, Fingerprint),
}

impl List<'_> {
    pub fn name(&self) -> String {
        match self {
            List::All => String::new(),
            List::Reason(reason) => format!("r{reason}"),
            List::Fingerprint(fingerprint) => format!("f{fingerprint}"),
            List::Kind(kind) => format!("k{kind}"),
            List::Thread(thread) => format!("t{thread}"),
            List::Group(group) => format!("g{group}"),
            List::GroupReason(group, reason) => format!("G{group}\0r{reason}"),
            List::GroupFingerprint(group, fingerprint) => format!("G{group}\0f{fingerprint}"),
        }
    }
}

/// Which dead letters a list shall have.
#[derive(Debug, Clone, Default)]
pub struct DeadLetterFilter {
    pub reason: Option<String>,
    pub fingerprint: Option<Fingerprint>,
    pub thread: Option<String>,
    pub kind: Option<String>,
    /// Work of this group.
    pub group: Option<String>,
    /// Milliseconds; those of then and later.
    pub since: Option<u64>,
    /// Milliseconds; those of before.
    pub until: Option<u64>,
}

impl DeadLetterFilter {
    pub fn accepts(&self, row: &DeadLetterRow) -> bool {
        self.reason.as_ref().is_none_or(|reason| *reason == row.reason)
            && self.fingerprint.is_none_or(|fingerprint| fingerprint.0 == row.fingerprint)
            && self.thread.as_ref().is_none_or(|thread| row.thread.as_ref() == Some(thread))
            && self.kind.as_ref().is_none_or(|kind| row.kind.as_ref() == Some(kind))
            && self.group.as_ref().is_none_or(|group| row.group() == Some(group))
            && self.since.is_none_or(|since| row.at >= since)
            && self.until.is_none_or(|until| row.at < until)
    }

    /// The shortest list that has them all, as a rule.
    fn list(&self) -> List<'_> {
        match self {
            DeadLetterFilter { thread: Some(thread), .. } => List::Thread(thread),
            DeadLetterFilter { group: Some(group), fingerprint: Some(fingerprint), .. } => {
                List::GroupFingerprint(group, *fingerprint)
            }
            DeadLetterFilter { fingerprint: Some(fingerprint), .. } => List::Fingerprint(*fingerprint),
            DeadLetterFilter { group: Some(group), .. } => List::Group(group),
            DeadLetterFilter { kind: Some(kind), .. } => List::Kind(kind),
            DeadLetterFilter { reason: Some(reason), .. } => List::Reason(reason),
            _ => List::All,
        }
    }
}

/// In which order letters come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    NewestFirst,
    OldestFirst,
}

impl Order {
    fn compare(self, a: &DeadLetterCursor, b: &DeadLetterCursor) -> Ordering {
        match self {
            Order::NewestFirst => b.cmp(a),
            Order::OldestFirst => a.cmp(b),
        }
    }
}

/// Rows that one page looks at; with a filter, the next page looks at the rest.
const SCAN: usize = 10_000;
/// Fingerprints that are looked at to find those with the most letters.
const COUNTED: usize = 10_000;

impl Store {
    /// A tenant's dead letter; those whose tenant is not known are under an empty one.
    pub fn dead_letter(&self, tenant: &str, id: &[u8; 16]) -> Result<Option<DeadLetterRow>, StoreError> {
        self.get(DEAD_LETTERS, &keys::dead_letter(tenant, id))
    }

    /// Visits open dead letters of these tenants from after a cursor on, each with whether its tenant is known, until
    /// `visit` breaks off. Gives where the next page begins, if there is more.
    pub fn dead_letters<E: From<StoreError>>(
        &self,
        tenants: [&str; 2],
        filter: &DeadLetterFilter,
        order: Order,
        after: Option<DeadLetterCursor>,
        mut visit: impl FnMut(DeadLetterCursor, DeadLetterRow, bool) -> Result<ControlFlow<()>, E>,
    ) -> Result<Option<DeadLetterCursor>, E> {
        let [mut first, mut second] = tenants.map(|tenant| self.open_letters(tenant, filter, order, after).peekable());
        let mut last = None;
        for _ in 0..SCAN {
            let Some((tenant, cursor)) = next_of(order, tenants, &mut first, &mut second)? else { return Ok(None) };
            last = Some(cursor);
            if let Some(row) = self.dead_letter(tenant, &cursor.id)?.filter(|row| filter.accepts(row))
                && visit(cursor, row, !tenant.is_empty())?.is_break()
            {
                break;
            }
        }
        Ok(last.filter(|_| first.peek().is_some() || second.peek().is_some()))
    }

    fn open_letters<'s>(
        &'s self,
        tenant: &str,
        filter: &DeadLetterFilter,
        order: Order,
        after: Option<DeadLetterCursor>,
    ) -> impl Iterator<Item = Result<DeadLetterCursor, StoreError>> + use<'s> {
        let prefix = keys::dead_letter_list(tenant, &filter.list().name());
        let begin = prefix.len();
        let mut lower = keys::dead_letter_time(&prefix, &filter.since.unwrap_or(0).to_be_bytes());
        let mut upper = filter
            .until
            .map_or_else(|| keys::after(prefix.clone()), |until| keys::dead_letter_time(&prefix, &until.to_be_bytes()));
        if let Some(after) = after {
            let key = keys::dead_letter_time(&prefix, &after.to_bytes());
            match order {
                Order::NewestFirst => upper = upper.min(key),
                // The first key that comes after it.
                Order::OldestFirst => lower = lower.max([&key[..], &[0]].concat()),
            }
        }

        let mut options = ReadOptions::default();
        // RocksDB takes no range whose end is before its beginning.
        options.set_iterate_upper_bound(upper.max(lower.clone()));
        options.set_iterate_lower_bound(lower);
        let from = match order {
            Order::NewestFirst => IteratorMode::End,
            Order::OldestFirst => IteratorMode::Start,
        };
        let rows = self.db.iterator_cf_opt(&self.family(DEAD_LETTER_TIMES), options, from);
        rows.filter_map(move |row| match row {
            // Every key of a list ends in a cursor.
            Ok((key, _)) => DeadLetterCursor::from_bytes(&key[begin..]).map(Ok),
            Err(error) => Some(Err(self.note(error.into()))),
        })
    }

    /// How many letters of a list of the tenant are open.
    pub fn dead_letter_count(&self, tenant: &str, list: &List<'_>) -> Result<Option<CountRow>, StoreError> {
        self.get(DEAD_LETTER_COUNTS, &keys::dead_letter_count(tenant, &list.name()))
    }

    /// How many open letters the tenant has of each reason, or those of one group.
    pub fn dead_letter_reasons(&self, tenant: &str, group: Option<&str>) -> Result<Vec<CountRow>, StoreError> {
        let rows = self.rows_under(DEAD_LETTER_COUNTS, counted_under(tenant, group, 'r'));
        rows.take(COUNTED).map(|row| row.map(|(_, row)| row)).collect()
    }

    /// The fingerprints that open letters of the tenant have, or those of one group, in the order of their hex digits, and
    /// whether these are all.
    pub fn dead_letter_fingerprints(
        &self,
        tenant: &str,
        group: Option<&str>,
    ) -> Result<(Vec<(Fingerprint, CountRow)>, bool), StoreError> {
        let mut found = Vec::new();
        for row in self.rows_under(DEAD_LETTER_COUNTS, counted_under(tenant, group, 'f')) {
            let (digits, row) = row?;
            if found.len() == COUNTED {
                return Ok((found, false));
            }
            found.extend(digits.parse().ok().map(|fingerprint| (fingerprint, row)));
        }
        Ok((found, true))
    }

    /// The time of the first open letter of a list in this order.
    pub fn dead_letter_time(
        &self,
        tenant: &str,
        filter: &DeadLetterFilter,
        order: Order,
    ) -> Result<Option<u64>, StoreError> {
        Ok(self.open_letters(tenant, filter, order, None).next().transpose()?.map(|cursor| cursor.at))
    }
}

/// What the keys of counts begin with: of a tenant's letters or of a group's, by what they are counted.
fn counted_under(tenant: &str, group: Option<&str>, by: char) -> Vec<u8> {
    let list = group.map_or_else(|| by.to_string(), |group| format!("G{group}\0{by}"));
    keys::dead_letter_count(tenant, &list)
}

/// The next of two lists, and whose it is.
fn next_of<'t>(
    order: Order,
    tenants: [&'t str; 2],
    first: &mut Peekable<impl Iterator<Item = Result<DeadLetterCursor, StoreError>>>,
    second: &mut Peekable<impl Iterator<Item = Result<DeadLetterCursor, StoreError>>>,
) -> Result<Option<(&'t str, DeadLetterCursor)>, StoreError> {
    let first_is_next = match (first.peek(), second.peek()) {
        (Some(Ok(a)), Some(Ok(b))) => order.compare(a, b).is_le(),
        (Some(Err(_)), _) => true,
        (_, Some(Err(_))) => false,
        (found, _) => found.is_some(),
    };
    let (tenant, cursor) = if first_is_next { (tenants[0], first.next()) } else { (tenants[1], second.next()) };
    Ok(cursor.transpose()?.map(|cursor| (tenant, cursor)))
}

impl Batch<'_> {
    /// Writes a dead letter; `was` is what it was before, as far as lists and counts have it.
    pub fn put_dead_letter(&mut self, tenant: &str, id: [u8; 16], was: Option<&DeadLetterRow>, row: &DeadLetterRow) {
        for key in was.into_iter().flat_map(|was| list_keys(tenant, &id, was)) {
            self.delete(DEAD_LETTER_TIMES, &key);
        }
        for key in list_keys(tenant, &id, row) {
            self.put_empty(DEAD_LETTER_TIMES, &key);
        }
        self.put(DEAD_LETTERS, &keys::dead_letter(tenant, &id), row);
    }

    /// Writes how many letters of a list are open; none, and there is no row.
    pub fn put_dead_letter_count(&mut self, tenant: &str, list: &List<'_>, row: &CountRow) {
        let key = keys::dead_letter_count(tenant, &list.name());
        if row.open == 0 {
            self.delete(DEAD_LETTER_COUNTS, &key);
        } else {
            self.put(DEAD_LETTER_COUNTS, &key, row);
        }
    }
}

/// The rows of the lists that have the letter.
fn list_keys(tenant: &str, id: &[u8; 16], row: &DeadLetterRow) -> Vec<Vec<u8>> {
    if row.state != LetterState::Open {
        return Vec::new();
    }
    let fingerprint = Fingerprint(row.fingerprint);
    let lists = [List::All, List::Reason(&row.reason), List::Fingerprint(fingerprint)].into_iter();
    let lists = lists.chain(row.kind.as_deref().map(List::Kind)).chain(row.thread.as_deref().map(List::Thread));
    let group = row.group().into_iter();
    let lists = lists.chain(group.flat_map(|it| [List::Group(it), List::GroupFingerprint(it, fingerprint)]));
    let cursor = DeadLetterCursor::of(*id, row).to_bytes();
    lists.map(|list| keys::dead_letter_time(&keys::dead_letter_list(tenant, &list.name()), &cursor)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(n: u64) -> DeadLetterRow {
        let reason = ["run_order", "unacknowledged", "unreadable", "rejected"][n as usize % 4];
        let kind = [None, Some("x.a"), Some("x.b")][n as usize % 7 % 3];
        // Several of one time, and not in the order in which they come.
        let at = 1_000 + n * 7 % 40;
        DeadLetterRow {
            order: n % 3,
            thread: Some(format!("t{}", n % 4)),
            // The name is a group's only where the letter is work.
            name: Some(format!("g{}", n % 3)),
            state: if n.is_multiple_of(5) { LetterState::Discarded } else { LetterState::Open },
            ..DeadLetterRow::open(reason, kind, at, 1, "e".into())
        }
    }

    fn pages(store: &Store, filter: &DeadLetterFilter, order: Order, limit: usize) -> Vec<DeadLetterCursor> {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let mut left = limit;
            after = store
                .dead_letters(["acme", ""], filter, order, after, |cursor, _, _| {
                    found.push(cursor);
                    left -= 1;
                    Ok::<_, StoreError>(if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
                })
                .expect("it is read");
            if after.is_none() {
                return found;
            }
        }
    }

    #[test]
    fn every_filter_has_all_open_letters_that_it_names_each_once_in_order_whatever_the_page() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let mut batch = store.batch();
        let letters: Vec<(u64, DeadLetterRow)> = (1..200).map(|n| (n, letter(n))).collect();
        let id = |n: u64| [[n as u8; 8], n.to_be_bytes()].concat().try_into().expect("16 bytes");
        for (n, row) in &letters {
            let tenant = if n % 6 == 1 { "" } else { "acme" };
            // Closed ones were open before.
            let open = DeadLetterRow { state: LetterState::Open, ..row.clone() };
            batch.put_dead_letter(tenant, id(*n), None, &open);
            batch.put_dead_letter(tenant, id(*n), Some(&open), row);
            batch.put_dead_letter("umbrella", id(*n), None, &open);
        }
        store.commit(batch).expect("it commits");

        let all = DeadLetterFilter::default;
        let fingerprint = Some(Fingerprint::of("unreadable", Some("x.b"), "e"));
        let of_work = Some(Fingerprint::of("rejected", Some("x.b"), "e"));
        let filters = [
            all(),
            DeadLetterFilter { reason: Some("run_order".into()), ..all() },
            DeadLetterFilter { fingerprint, ..all() },
            DeadLetterFilter { kind: Some("x.a".into()), since: Some(1_010), ..all() },
            DeadLetterFilter { thread: Some("t1".into()), reason: Some("unreadable".into()), ..all() },
            DeadLetterFilter { since: Some(1_005), until: Some(1_020), ..all() },
            DeadLetterFilter { group: Some("g1".into()), ..all() },
            DeadLetterFilter { group: Some("g1".into()), kind: Some("x.a".into()), since: Some(1_010), ..all() },
            DeadLetterFilter { group: Some("g2".into()), fingerprint: of_work, ..all() },
            DeadLetterFilter { group: Some("g".into()), ..all() },
            DeadLetterFilter { since: Some(1_020), until: Some(1_005), ..all() },
            DeadLetterFilter { thread: Some("nowhere".into()), ..all() },
        ];
        for filter in filters {
            let open = letters.iter().filter(|(_, row)| row.state == LetterState::Open && filter.accepts(row));
            let mut expected: Vec<_> = open.map(|(n, row)| DeadLetterCursor::of(id(*n), row)).collect();
            expected.sort();
            for limit in [1, 7, 1_000] {
                assert_eq!(pages(&store, &filter, Order::OldestFirst, limit), expected, "{filter:?}");
            }
            expected.reverse();
            for limit in [1, 7, 1_000] {
                assert_eq!(pages(&store, &filter, Order::NewestFirst, limit), expected, "{filter:?}");
            }
        }
    }
}
