//! Tickets: which of those who try to get in with one does.
//!
//! The first `ticket_used` in the log of a ticket that was issued before it, and has not expired, has the ticket. What
//! decides is the order of the records and the times that they carry, so it is one and the same on every node, whichever
//! gave the ticket and whichever got it. All records about tickets of one user are in one partition, so that those that
//! are open can be counted as well.
//!
//! A ticket that was used or has expired is gone from the rows with the next record about its user's tickets. The rows of
//! users whose tickets nobody used are purged later, a few with each record, which changes no verdict.

use std::collections::{BTreeMap, HashMap};

use super::transaction::Transaction;
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{TICKET_ISSUED, TICKET_USED};
use crate::protocol::records::{TicketIssuedRecord, TicketUsedRecord};
use crate::protocol::tickets::{TicketOwner, owner};
use crate::protocol::{ids, json};
use crate::store::{OpenTicket, Partition, Store, StoreError, TicketsRow, keys};

/// How many tickets a user may have that are neither used nor expired. Only users take them from themselves.
pub const MAX_OPEN_TICKETS: usize = 100;
/// Rows are purged by whole seconds of log time: most records then have nothing to look for.
const PURGE_STEP: u64 = 1_000;
/// How many rows are purged with one record. A record adds one at most, so the purge keeps up.
const PURGE_LIMIT: usize = 64;

/// A record about a ticket.
pub(super) struct TicketRecord {
    pub(super) id: uuid::Uuid,
    pub(super) owner: TicketOwner,
    pub(super) hash: [u8; 32],
    /// Its time, in milliseconds.
    pub(super) at: u64,
    act: Act,
}

enum Act {
    Issued { tenant: String, user: String, ticket: OpenTicket },
    Used,
}

/// What this batch has changed.
#[derive(Default)]
pub(super) struct Tickets {
    rows: HashMap<TicketOwner, Option<TicketsRow>>,
    /// Rows of `ticket_times`: whether they were put or deleted.
    times: BTreeMap<Vec<u8>, bool>,
}

/// Up to which log time the rows of a partition have been purged, and from which key of `ticket_times` the rest is. No row is put
/// before that, so this changes nothing; it spares the store from passing over what it has deleted.
#[derive(Default)]
pub(super) struct PurgedTickets {
    to: u64,
    rest: Vec<u8>,
}

impl Tickets {
    /// Applies a record at this log time of its partition.
    pub(super) fn judge(
        &mut self,
        tx: &mut Transaction<'_>,
        partition: u32,
        record: TicketRecord,
        log_time: u64,
    ) -> Result<Result<(), Error>, StoreError> {
        let TicketRecord { owner, hash, at, act, .. } = record;
        let row = self.row(tx.store, &owner)?;
        match act {
            Act::Issued { tenant, user, ticket } => {
                let old = row.as_ref().map(|row| row.purge_at);
                let mut row = row.unwrap_or(TicketsRow { tenant, user, open: Vec::new(), purge_at: 0 });
                // By log time, so that a row is not purged before those whose clocks are slow have had their 30 s.
                let purge_at = at.max(log_time) + ticket.expires_at.saturating_sub(at);
                if let Err(refused) = add(&mut row.open, ticket, at) {
                    return Ok(Err(refused));
                }
                row.purge_at = row.purge_at.max(purge_at);
                self.put(tx, partition, &owner, row, old);
                Ok(Ok(()))
            }
            Act::Used => {
                let Some(mut row) = row else { return Ok(Err(Error::no_ticket())) };
                let Some(ticket) = take(&mut row.open, &hash) else { return Ok(Err(Error::no_ticket())) };
                let purge_at = row.purge_at;
                if row.open.is_empty() {
                    self.delete(tx, &owner, keys::time(Partition::new(partition), purge_at, &owner));
                } else {
                    self.put(tx, partition, &owner, row, Some(purge_at));
                }
                Ok(if at < ticket.expires_at { Ok(()) } else { Err(Error::no_ticket()) })
            }
        }
    }

    /// Deletes the rows of the partition in which all tickets have expired, the oldest first, [`PURGE_LIMIT`] at most.
    pub(super) fn purge(
        &mut self,
        tx: &mut Transaction<'_>,
        partition: u32,
        log_time: u64,
        purged: &mut Option<PurgedTickets>,
    ) -> Result<(), StoreError> {
        let to = log_time / PURGE_STEP * PURGE_STEP;
        let purged =
            purged.get_or_insert_with(|| PurgedTickets { to: 0, rest: keys::time(Partition::new(partition), 0, &[]) });
        if to <= purged.to {
            return Ok(());
        }

        let end = keys::time(Partition::new(partition), to, &[]);
        let mut due = Vec::new();
        for time in tx.store.ticket_times(&purged.rest, &end) {
            let time = time?;
            if !self.times.contains_key(&time) {
                due.push(time);
                if due.len() == PURGE_LIMIT {
                    break;
                }
            }
        }
        let put = self.times.range(purged.rest.clone()..end.clone()).filter(|(_, put)| **put);
        due.extend(put.map(|(time, _)| time.clone()).take(PURGE_LIMIT));
        due.sort_unstable();
        due.truncate(PURGE_LIMIT);

        let (full, last) = (due.len() == PURGE_LIMIT, due.last().cloned());
        for time in due {
            let owner = keys::split_time(&time).and_then(|(_, owner)| TicketOwner::try_from(owner).ok());
            if let Some(owner) = owner {
                self.delete(tx, &owner, time);
            }
        }
        *purged = match last.filter(|_| full) {
            // There may be more: the next record goes on after the last one.
            Some(last) => PurgedTickets { to: purged.to, rest: [&last[..], &[0]].concat() },
            None => PurgedTickets { to, rest: end },
        };
        Ok(())
    }

    fn row(&self, store: &Store, owner: &TicketOwner) -> Result<Option<TicketsRow>, StoreError> {
        match self.rows.get(owner) {
            Some(row) => Ok(row.clone()),
            None => store.tickets(owner),
        }
    }

    /// `old` is when the row that is replaced was to be purged.
    fn put(
        &mut self,
        tx: &mut Transaction<'_>,
        partition: u32,
        owner: &TicketOwner,
        row: TicketsRow,
        old: Option<u64>,
    ) {
        tx.rows.put_tickets(owner, &row);
        if old != Some(row.purge_at) {
            if let Some(old) = old {
                self.delete_time(tx, keys::time(Partition::new(partition), old, owner));
            }
            let time = keys::time(Partition::new(partition), row.purge_at, owner);
            tx.rows.put_ticket_time(&time);
            self.times.insert(time, true);
        }
        self.rows.insert(*owner, Some(row));
    }

    fn delete(&mut self, tx: &mut Transaction<'_>, owner: &TicketOwner, time: Vec<u8>) {
        tx.rows.delete_tickets(owner);
        self.rows.insert(*owner, None);
        self.delete_time(tx, time);
    }

    fn delete_time(&mut self, tx: &mut Transaction<'_>, time: Vec<u8>) {
        tx.rows.delete_ticket_time(&time);
        self.times.insert(time, false);
    }
}

/// Adds a ticket to those that are open at the time `at`, if the user may have one more.
fn add(open: &mut Vec<OpenTicket>, ticket: OpenTicket, at: u64) -> Result<(), Error> {
    open.retain(|ticket| ticket.expires_at > at);
    if open.len() >= MAX_OPEN_TICKETS {
        let next = open.iter().map(|ticket| ticket.expires_at - at).min().unwrap_or_default();
        let why = format!("the user has {MAX_OPEN_TICKETS} tickets that are neither used nor expired");
        return Err(Error::new(Code::QueueFull, why).retry_after(next.max(1)));
    }
    // Written twice, a record means nothing the second time.
    if open.iter().all(|other| other.hash != ticket.hash) {
        open.push(ticket);
    }
    Ok(())
}

/// Takes the ticket with this hash, if it is there.
fn take(open: &mut Vec<OpenTicket>, hash: &[u8; 32]) -> Option<OpenTicket> {
    let at = open.iter().position(|ticket| ticket.hash == *hash)?;
    Some(open.remove(at))
}

/// What a record about tickets of this owner says; or why it is foreign.
pub(super) fn read(key: TicketOwner, record: &Record) -> Result<TicketRecord, Foreign> {
    let read = match record.kind.as_str() {
        TICKET_ISSUED => read_issued(&key, record),
        TICKET_USED => read_used(&key, record),
        _ => Err("its key is that of tickets, and its kind is not".to_owned()),
    };
    read.map_err(|why| Foreign::new(why, record))
}

fn read_issued(key: &TicketOwner, record: &Record) -> Result<TicketRecord, String> {
    let issued: TicketIssuedRecord = json::decode_bytes(&record.value).map_err(|error| not_a_ticket(&error))?;
    let TicketIssuedRecord { kind, id, tenant, user, hash, scopes, iat_ms, exp, at, expires_at } = issued;
    check_kind(&kind, TICKET_ISSUED)?;
    let names = ids::check_name("tenant", &tenant).and(ids::check_name("user", &user));
    names.map_err(|error| error.to_string())?;
    if owner(&tenant, &user) != *key {
        return Err("its key is not that of its user's tickets".to_owned());
    }
    let (hash, at, expires_at) = (read_hash(&hash)?, read_time("at", &at)?, read_time("expires_at", &expires_at)?);
    let ticket = OpenTicket { hash, scopes, iat_ms, exp, expires_at };
    Ok(TicketRecord { id, owner: *key, hash, at, act: Act::Issued { tenant, user, ticket } })
}

fn read_used(key: &TicketOwner, record: &Record) -> Result<TicketRecord, String> {
    let used: TicketUsedRecord = json::decode_bytes(&record.value).map_err(|error| not_a_ticket(&error))?;
    let TicketUsedRecord { kind, id, hash, at } = used;
    check_kind(&kind, TICKET_USED)?;
    Ok(TicketRecord { id, owner: *key, hash: read_hash(&hash)?, at: read_time("at", &at)?, act: Act::Used })
}

fn not_a_ticket(error: &Error) -> String {
    format!("the value is not about a ticket: {}", error.message)
}

fn check_kind(kind: &str, wanted: &str) -> Result<(), String> {
    if kind == wanted { Ok(()) } else { Err(format!("the value's kind is not {wanted}, as its header says")) }
}

fn read_hash(hash: &str) -> Result<[u8; 32], String> {
    Ok(*blake3::Hash::from_hex(hash).map_err(|_| "hash is not 64 hex digits")?.as_bytes())
}

fn read_time(field: &str, time: &str) -> Result<u64, String> {
    clock::parse_rfc3339(time).ok_or_else(|| format!("{field} is not RFC 3339"))
}

#[cfg(test)]
mod tests {
    use super::super::wanted::Wanted;
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const LIFETIME: u64 = 30_000;

    /// A store, and what is judged one record after the other, each in a commit of its own.
    struct World {
        store: Store,
        purged: Option<PurgedTickets>,
        _folder: tempfile::TempDir,
    }

    impl World {
        fn new() -> World {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let store = Store::open(folder.path()).expect("it is empty");
            World { store, purged: None, _folder: folder }
        }

        fn commit<T>(
            &mut self,
            act: impl FnOnce(&mut Tickets, &mut Transaction<'_>, &mut Option<PurgedTickets>) -> T,
        ) -> T {
            let mut tx = Transaction::new(&self.store, Wanted::default());
            let done = act(&mut Tickets::default(), &mut tx, &mut self.purged);
            self.store.commit(tx.rows).expect("the store takes it");
            done
        }

        fn judge(&mut self, record: TicketRecord, log_time: u64) -> Result<(), Error> {
            self.commit(|tickets, tx, _| tickets.judge(tx, 0, record, log_time).expect("the store answers"))
        }

        fn purge(&mut self, log_time: u64) {
            self.commit(|tickets, tx, purged| tickets.purge(tx, 0, log_time, purged).expect("the store answers"));
        }

        fn rows(&self) -> usize {
            self.store.rows().filter(|row| row.as_ref().is_ok_and(|(family, ..)| family.starts_with("ticket"))).count()
        }
    }

    fn issued(user: &str, ticket: u8, at: u64) -> TicketRecord {
        let (hash, expires_at) = ([ticket; 32], at + LIFETIME);
        let ticket = OpenTicket { hash, scopes: String::new(), iat_ms: None, exp: 0, expires_at };
        let act = Act::Issued { tenant: "acme".into(), user: user.into(), ticket };
        TicketRecord { id: clock::event_id(), owner: owner("acme", user), hash, at, act }
    }

    fn used(user: &str, ticket: u8, at: u64) -> TicketRecord {
        TicketRecord { id: clock::event_id(), owner: owner("acme", user), hash: [ticket; 32], at, act: Act::Used }
    }

    #[test]
    fn the_first_who_uses_a_ticket_gets_in_and_nobody_after_that() {
        let mut world = World::new();
        assert!(world.judge(used("ada", 1, NOW), NOW).is_err(), "not issued yet");
        world.judge(issued("ada", 1, NOW), NOW).expect("there is room");
        assert!(world.judge(used("ben", 1, NOW), NOW).is_err(), "another user's");
        assert_eq!(world.judge(used("ada", 1, NOW), NOW), Ok(()));
        let refused = world.judge(used("ada", 1, NOW), NOW).expect_err("used");
        assert_eq!((refused.code, refused.field.as_deref()), (Code::Unauthenticated, Some("ticket")));
        assert_eq!(world.rows(), 0, "and nothing is left of it");
    }

    #[test]
    fn in_one_batch_it_is_the_same() {
        let mut world = World::new();
        let records = [issued("ada", 1, NOW), used("ada", 1, NOW), used("ada", 1, NOW), issued("ada", 2, NOW)];
        let verdicts = world.commit(|tickets, tx, _| {
            records.map(|record| tickets.judge(tx, 0, record, NOW).expect("the store answers").is_ok())
        });
        assert_eq!(verdicts, [true, true, false, true]);
        assert_eq!(world.judge(used("ada", 2, NOW), NOW), Ok(()));
        assert_eq!(world.rows(), 0);
    }

    #[test]
    fn a_ticket_expires_by_the_times_of_the_records() {
        let mut world = World::new();
        for (ticket, after, good) in [(1, LIFETIME - 1, true), (2, LIFETIME, false)] {
            // The log's time is another hour, by a record of a clock that was ahead.
            world.judge(issued("ada", ticket, NOW), NOW + 3_600_000).expect("there is room");
            let verdict = world.judge(used("ada", ticket, NOW + after), NOW + 3_600_000);
            assert_eq!(verdict.is_ok(), good, "{after}");
            assert!(world.judge(used("ada", ticket, NOW), NOW).is_err(), "whatever it was, it is used up");
        }
        assert_eq!(world.rows(), 0);
    }

    #[test]
    fn a_user_s_open_tickets_are_bounded_and_used_and_expired_ones_make_room() {
        let mut world = World::new();
        for n in 0..MAX_OPEN_TICKETS {
            world.judge(issued("ada", n as u8, NOW + n as u64), NOW).expect("there is room");
        }
        let refused = world.judge(issued("ada", 200, NOW + 99), NOW).expect_err("full");
        assert_eq!((refused.code, refused.retry_after_ms), (Code::QueueFull, Some(LIFETIME - 99)));
        assert_eq!(world.judge(issued("ben", 200, NOW), NOW), Ok(()), "others are none the worse");
        assert_eq!(world.judge(used("ada", 7, NOW), NOW), Ok(()));
        assert_eq!(world.judge(issued("ada", 200, NOW + 99), NOW), Ok(()));
        assert!(world.judge(issued("ada", 201, NOW + 99), NOW).is_err());
        assert_eq!(world.judge(issued("ada", 201, NOW + LIFETIME), NOW), Ok(()), "the first one has expired");
    }

    #[test]
    fn what_nobody_used_is_purged_by_log_time_a_few_rows_with_each_record() {
        let mut world = World::new();
        let users = PURGE_LIMIT + 10;
        for n in 0..users {
            world.judge(issued(&format!("user{n}"), 1, NOW), NOW).expect("there is room");
        }
        world.judge(issued("ada", 1, NOW), NOW).expect("there is room");
        world.judge(issued("ada", 2, NOW + LIFETIME), NOW).expect("there is room");
        let all = 2 * (users + 1);
        assert_eq!(world.rows(), all, "a row for each user, and its time");
        world.purge(NOW + LIFETIME);
        assert_eq!(world.rows(), all, "the last moment is not past");
        world.purge(NOW + LIFETIME + 1_000);
        assert_eq!(world.rows(), all - 2 * PURGE_LIMIT);
        world.purge(NOW + LIFETIME + 1_000);
        assert_eq!(world.rows(), 2, "the row whose newest ticket has not expired");
        assert_eq!(world.judge(used("ada", 2, NOW + LIFETIME), NOW), Ok(()));
        assert_eq!(world.rows(), 0);
    }

    #[test]
    fn what_is_not_about_a_ticket_of_the_key_s_owner_is_foreign() {
        let record = TicketIssuedRecord {
            kind: TICKET_ISSUED.into(),
            id: clock::event_id(),
            tenant: "acme".into(),
            user: "ada".into(),
            hash: "ab".repeat(32),
            scopes: "publish".into(),
            iat_ms: Some(NOW),
            exp: NOW / 1_000,
            at: clock::rfc3339(NOW),
            expires_at: clock::rfc3339(NOW + LIFETIME),
        };
        let ada = owner("acme", "ada");
        let good = Record::from(&record);
        assert!(read(ada, &good).is_ok());
        let why = |record: &TicketIssuedRecord, key| read(key, &Record::from(record)).err().map(|foreign| foreign.why);
        for (bad, said) in [
            (TicketIssuedRecord { kind: "ticket".into(), ..record.clone() }, "kind"),
            (TicketIssuedRecord { user: "a b".into(), ..record.clone() }, "user"),
            (TicketIssuedRecord { hash: "ab".into(), ..record.clone() }, "hash"),
            (TicketIssuedRecord { at: "now".into(), ..record.clone() }, "at"),
            (TicketIssuedRecord { expires_at: "soon".into(), ..record.clone() }, "expires_at"),
        ] {
            let why = why(&bad, ada).unwrap_or_default();
            assert!(why.contains(said), "{said}: {why}");
        }
        assert!(why(&record, owner("acme", "ben")).is_some_and(|why| why.contains("key")));
        let other_kind = Record { kind: "user_message".into(), ..good };
        assert!(read(ada, &other_kind).is_err());
    }
}
