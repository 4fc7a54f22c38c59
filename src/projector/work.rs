//! Work: who works on which event for a group, judged from the thread's own state.
//!
//! A group is done with a thread up to a cursor. One event after it may be leased at a time, and the first `work_leased` in
//! the log that names the state as it is (the cursor, the attempt) has the lease; whoever named another state meanwhile is
//! refused, and looks again. So no two nodes give out the same work, none gives out what comes after work that failed, and
//! no node has to own anything.
//!
//! A lease is over when it is settled, or when log time has reached its end. From then on its holder's settlements are
//! refused, whether anybody else has the work yet or not: the lease's id is its fencing token. What was not settled in time
//! is settled by the server (`expired`, `lost`), as a failed attempt. After the last attempt the event is a dead letter, and
//! the thread goes on.
//!
//! What the record does not say, the thread's state does; a group's settings are in another partition, and decide nothing
//! here. [`lease`] and [`settle`] are pure.

use std::collections::HashMap;

use uuid::Uuid;

use super::dead_letters::{DeadLetters, GivenUp};
use super::deliveries::MAX_REQUEUED;
use super::transaction::Transaction;
use super::{Published, ThreadUpdate, Update};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::dead_letters::{ATTEMPTS, REJECTED, letter_of};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{WORK_LEASED, WORK_SETTLED};
use crate::protocol::work::{
    MAX_ATTEMPTS, Settlement, WorkLeasedRecord, WorkSettledRecord, check_group, check_reason, no_lease,
};
use crate::protocol::{ids, json};
use crate::store::dead_letters::TryRow;
use crate::store::{FailedRow, LeaseRow, Store, StoreError, WaitingRow, WorkRow};

/// Where work is: tenant, thread, group.
type Place = (String, String, String);

/// What this batch has changed.
#[derive(Default)]
pub(super) struct Works {
    rows: HashMap<Place, WorkRow>,
}

/// A record about work, checked.
pub(super) struct WorkAct {
    pub(super) id: Uuid,
    /// Its time, in milliseconds.
    pub(super) at: u64,
    place: Place,
    act: Act,
}

enum Act {
    Lease(NewLease),
    Settle(NewSettlement),
}

/// A lease as its record wants it, with the state that it is for.
struct NewLease {
    group_id: [u8; 16],
    after: u64,
    lease: LeaseRow,
}

struct NewSettlement {
    lease: [u8; 16],
    outcome: Settlement,
    by: String,
    reason: Option<String>,
    /// Milliseconds.
    until: Option<u64>,
    at: u64,
}

/// An event that is not tried again.
#[derive(Debug, PartialEq, Eq)]
struct Failed {
    reason: &'static str,
    seq: u64,
    kind: String,
    attempts: u32,
    tries: Vec<TryRow>,
}

/// Whether a record of this kind is about work.
pub(super) fn is_work(kind: &str) -> bool {
    matches!(kind, WORK_LEASED | WORK_SETTLED)
}

impl Works {
    /// Applies a record at this log time of its partition; `head` is the thread's.
    pub(super) fn judge(
        &mut self,
        tx: &mut Transaction<'_>,
        dead_letters: &mut DeadLetters,
        record: WorkAct,
        head: u64,
        log_time: u64,
    ) -> Result<Result<Published, Error>, StoreError> {
        let WorkAct { id, at, place, act } = record;
        let mut row = self.row(tx.store, &place)?;
        let before = (row.cursor, row.requeued.len());
        let had = row.lease.as_ref().map(|lease| (lease.holder.clone(), lease.until));
        let judged = match act {
            Act::Lease(new) => lease(&mut row, new, head, log_time).map(|seq| (seq, None)),
            Act::Settle(new) => settle(&mut row, new, log_time),
        };
        let (seq, failed) = match judged {
            Ok(judged) => judged,
            Err(refused) => return Ok(Err(refused)),
        };

        let (tenant, thread, group) = &place;
        tx.rows.put_work(tenant, thread, group, &row);
        let is_requeued = row.requeued.len() < before.1;
        // A lease of a group that was deleted says nothing of what waits for the one that was made again under its name.
        let is_past = row.cursor > before.0 || is_requeued;
        if is_past && !tx.wanted.is_newer(tenant, group, &row.group_id) {
            tx.rows.delete_waiting(tenant, group, thread, seq);
        }
        put_worker(tx, &place, had.as_ref(), &row);
        // A lease of a group that was made again takes the place of one that its holder had of the group before.
        if let Some((holder, _)) = had.filter(|(user, _)| row.lease.as_ref().is_none_or(|lease| lease.holder != *user))
        {
            let key = ids::log_key(tenant, thread).into();
            tx.commit.events.push(ThreadUpdate { key, update: Update::LeaseOver { user: holder.into() } });
        }
        match failed {
            Some(Failed { reason, seq, kind, attempts, tries }) => {
                let letter = work_letter(&place, &row.group_id, seq);
                let given_up = GivenUp { letter, tenant, thread, group, seq, kind, reason, attempts, at, tries };
                dead_letters.put_given_up(tx, given_up)?;
            }
            None if is_requeued => dead_letters.put_worked(tx, tenant, work_letter(&place, &row.group_id, seq))?,
            None => {}
        }
        self.rows.insert(place, row);
        Ok(Ok(Published { seq, event: id, duplicate: false }))
    }

    /// An event that became this letter is work of its group again: with attempts of its own, and before everything that was
    /// not begun.
    pub(super) fn requeue(
        &mut self,
        tx: &mut Transaction<'_>,
        letter: Uuid,
        place: Place,
        (seq, waits): (u64, &WaitingRow),
    ) -> Result<Result<(), Error>, StoreError> {
        let conflict = |why: String| Ok(Err(Error::new(Code::Conflict, why).at("id")));
        let mut row = self.row(tx.store, &place)?;
        if work_letter(&place, &row.group_id, seq) != letter {
            return conflict("the group was deleted and made again: it is no work of the new one".to_owned());
        }
        if row.requeued.len() >= MAX_REQUEUED {
            return conflict(format!("the group has {MAX_REQUEUED} requeued events of this thread: as many as may be"));
        }
        let at = row.requeued.partition_point(|it| *it < seq);
        row.requeued.insert(at, seq);
        let (tenant, thread, group) = &place;
        tx.rows.put_waiting(tenant, group, thread, seq, waits);
        tx.rows.put_work(tenant, thread, group, &row);
        self.rows.insert(place, row);
        Ok(Ok(()))
    }

    fn row(&self, store: &Store, place: &Place) -> Result<WorkRow, StoreError> {
        match self.rows.get(place) {
            Some(row) => Ok(row.clone()),
            None => Ok(store.work(&place.0, &place.1, &place.2)?.unwrap_or_default()),
        }
    }
}

/// Keeps what a holder may do by its lease true to the row; `had` is who had it until when.
fn put_worker(tx: &mut Transaction<'_>, (tenant, thread, group): &Place, had: Option<&(String, u64)>, row: &WorkRow) {
    let place = (&**tenant, &**thread, &**group);
    let has = row.lease.as_ref().map(|lease| (&lease.holder, lease.until));
    if let Some((holder, _)) = had
        && has.is_none_or(|(user, _)| user != holder)
    {
        tx.rows.put_worker(place, holder, None);
    }
    if let Some((holder, until)) = has
        && had.is_none_or(|(user, time)| (user, *time) != (holder, until))
    {
        tx.rows.put_worker(place, holder, Some(until));
    }
}

/// Leases an event, if the thread's state is the one that the record is for. Gives its seq.
fn lease(row: &mut WorkRow, new: NewLease, head: u64, log_time: u64) -> Result<u64, Error> {
    let NewLease { group_id, after, lease } = new;
    let conflict = |why: &'static str| Err(Error::new(Code::Conflict, why));
    // Ids of groups sort by the time when they were made: the one that was made later counts.
    if group_id < row.group_id {
        return conflict("the group was deleted and made again");
    }
    if group_id > row.group_id {
        *row = WorkRow { group_id, ..WorkRow::default() };
    }

    if row.lease.is_some() {
        return conflict("the thread's work is leased");
    }
    if after != row.cursor || lease.seq > head {
        return conflict("the group is at another event of the thread");
    }
    let (is_next, tried) = match (&row.failed, row.requeued.first()) {
        (Some(failed), _) => (lease.seq == failed.seq, failed.attempts),
        (None, Some(requeued)) => (lease.seq == *requeued, 0),
        (None, None) => (lease.seq > row.cursor, 0),
    };
    if !is_next {
        return conflict("another event of the thread comes before this one");
    }
    if lease.attempt != tried + 1 {
        return conflict("this attempt was made already");
    }
    if lease.until <= log_time {
        return conflict("the lease would be over before it begins");
    }
    let seq = lease.seq;
    row.lease = Some(lease);
    Ok(seq)
}

/// Settles a lease. Gives the seq of its event, and what is to become a dead letter.
fn settle(row: &mut WorkRow, new: NewSettlement, log_time: u64) -> Result<(u64, Option<Failed>), Error> {
    let NewSettlement { lease: id, outcome, by, reason, until, at } = new;
    let Some(lease) = row.lease.as_mut().filter(|lease| lease.id == id) else { return Err(no_lease()) };
    let is_over = lease.until <= log_time;
    let may = match outcome {
        Settlement::Expired => is_over,
        Settlement::Lost => true,
        Settlement::Done | Settlement::Retry | Settlement::Reject | Settlement::Extend => {
            !is_over && lease.holder == by
        }
    };
    if !may {
        return Err(no_lease());
    }

    let LeaseRow { seq, attempt, attempts, .. } = *lease;
    let failure = match outcome {
        Settlement::Extend => {
            lease.until = until.unwrap_or(lease.until);
            return Ok((seq, None));
        }
        Settlement::Done => None,
        Settlement::Reject => Some(reason.unwrap_or_else(|| "rejected".to_owned())),
        Settlement::Retry => Some(reason.unwrap_or_else(|| "failed".to_owned())),
        Settlement::Lost => Some("the worker's connection was lost".to_owned()),
        Settlement::Expired => Some("the lease was over and not settled".to_owned()),
    };
    let began = lease.at;
    let (worker, kind) = (std::mem::take(&mut lease.holder), std::mem::take(&mut lease.kind));
    row.lease = None;

    let before = row.failed.take();
    let Some(reason) = failure else {
        pass(row, seq);
        return Ok((seq, None));
    };
    let mut tries = before.map_or(Vec::new(), |failed| failed.tries);
    tries.push(TryRow { at: began, worker: Some(worker), reason });
    if outcome != Settlement::Reject && attempt < attempts {
        row.failed = Some(FailedRow { seq, attempts: attempt, not_before: until.unwrap_or(at), tries });
        return Ok((seq, None));
    }
    pass(row, seq);
    let reason = if outcome == Settlement::Reject { REJECTED } else { ATTEMPTS };
    Ok((seq, Some(Failed { reason, seq, kind, attempts: attempt, tries })))
}

/// The group is done with an event.
fn pass(row: &mut WorkRow, seq: u64) {
    if seq > row.cursor {
        row.cursor = seq;
    } else {
        row.requeued.retain(|requeued| *requeued != seq);
    }
}

/// The id of the letter that an event becomes which the group gives up.
fn work_letter((tenant, thread, _): &Place, group_id: &[u8; 16], seq: u64) -> Uuid {
    letter_of(&[b"work", tenant.as_bytes(), thread.as_bytes(), group_id, &seq.to_be_bytes()])
}

/// What a record about work says; or why it is foreign.
pub(super) fn read(record: &Record) -> Result<WorkAct, Foreign> {
    let read = if record.kind == WORK_LEASED { read_lease(record) } else { read_settlement(record) };
    read.map_err(|why| Foreign::new(why, record))
}

fn read_lease(record: &Record) -> Result<WorkAct, String> {
    let it: WorkLeasedRecord = json::decode_bytes(&record.value).map_err(|error| not_work(&error))?;
    let place = check_place(record, &it.kind, (it.tenant, it.thread, it.group), &it.holder)?;
    if it.attempt == 0 || it.attempts == 0 || it.attempts > MAX_ATTEMPTS {
        return Err("attempt or attempts is out of range".to_owned());
    }
    let (at, until) = (read_time("at", &it.at)?, read_time("until", &it.until)?);
    let lease = LeaseRow {
        id: it.id.into_bytes(),
        seq: it.seq,
        kind: it.event_kind,
        attempt: it.attempt,
        attempts: it.attempts,
        holder: it.holder,
        at,
        until,
    };
    let act = Act::Lease(NewLease { group_id: it.group_id.into_bytes(), after: it.after, lease });
    Ok(WorkAct { id: it.id, at, place, act })
}

fn read_settlement(record: &Record) -> Result<WorkAct, String> {
    let it: WorkSettledRecord = json::decode_bytes(&record.value).map_err(|error| not_work(&error))?;
    let place = check_place(record, &it.kind, (it.tenant, it.thread, it.group), &it.by)?;
    check_reason(it.reason.as_deref()).map_err(|error| error.to_string())?;
    let at = read_time("at", &it.at)?;
    let until = it.until.map(|until| read_time("until", &until)).transpose()?;
    if it.outcome == Settlement::Extend && until.is_none() {
        return Err("extend has no until".to_owned());
    }
    let lease = it.lease.into_bytes();
    let settlement = NewSettlement { lease, outcome: it.outcome, by: it.by, reason: it.reason, until, at };
    Ok(WorkAct { id: it.id, at, place, act: Act::Settle(settlement) })
}

fn check_place(record: &Record, kind: &str, place: Place, user: &str) -> Result<Place, String> {
    if kind != record.kind {
        return Err("the value's kind is not the one that its header says".to_owned());
    }
    let (tenant, thread, group) = &place;
    let names = ids::check_name("tenant", tenant)
        .and(ids::check_thread(thread))
        .and(check_group(group))
        .and(ids::check_name("user", user));
    names.map_err(|error| error.to_string())?;
    if record.key.split_once('/') != Some((tenant, thread)) {
        return Err("the key is not tenant/thread of the value".to_owned());
    }
    Ok(place)
}

fn not_work(error: &Error) -> String {
    format!("the value is not about work: {}", error.message)
}

fn read_time(field: &str, time: &str) -> Result<u64, String> {
    clock::parse_rfc3339(time).ok_or_else(|| format!("{field} is not RFC 3339"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const LEASE: u64 = 30_000;
    const HEAD: u64 = 10;

    fn new_lease(id: u8, seq: u64, after: u64, attempt: u32) -> NewLease {
        let (holder, at, until) = ("wim".to_owned(), NOW, NOW + LEASE);
        let lease = LeaseRow { id: [id; 16], seq, kind: "x.job".into(), attempt, attempts: 2, holder, at, until };
        NewLease { group_id: [1; 16], after, lease }
    }

    fn settled(id: u8, outcome: Settlement) -> NewSettlement {
        NewSettlement { lease: [id; 16], outcome, by: "wim".into(), reason: None, until: None, at: NOW }
    }

    /// A thread in which seq 3 is leased by the lease 1.
    fn leased() -> WorkRow {
        let mut row = WorkRow::default();
        assert_eq!(lease(&mut row, new_lease(1, 3, 0, 1), HEAD, NOW), Ok(3));
        row
    }

    #[test]
    fn the_first_lease_counts_and_the_next_one_is_of_what_comes_after() {
        let mut row = leased();
        for other in [new_lease(2, 3, 0, 1), new_lease(2, 4, 0, 1), new_lease(2, 4, 3, 1)] {
            assert_eq!(lease(&mut row, other, HEAD, NOW).expect_err("it is leased").code, Code::Conflict);
        }
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW), Ok((3, None)));
        for stale in [new_lease(2, 3, 0, 1), new_lease(2, 3, 3, 1), new_lease(2, 4, 0, 1), new_lease(2, HEAD + 1, 3, 1)]
        {
            assert_eq!(lease(&mut row, stale, HEAD, NOW).expect_err("another state").code, Code::Conflict);
        }
        assert_eq!(lease(&mut row, new_lease(2, 4, 3, 1), HEAD, NOW), Ok(4));
    }

    #[test]
    fn only_the_holder_settles_and_only_while_the_lease_lasts() {
        let by_other = || NewSettlement { by: "eve".into(), ..settled(1, Settlement::Done) };
        let mut row = leased();
        for (new, log_time) in [
            (settled(2, Settlement::Done), NOW),
            (by_other(), NOW),
            (settled(1, Settlement::Done), NOW + LEASE),
            (settled(1, Settlement::Extend), NOW + LEASE),
            (settled(1, Settlement::Expired), NOW + LEASE - 1),
        ] {
            assert_eq!(settle(&mut row, new, log_time), Err(no_lease()));
        }
        assert_eq!(row, leased(), "and nothing has changed");
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW + LEASE - 1), Ok((3, None)));
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW), Err(no_lease()), "once");
    }

    #[test]
    fn a_lease_that_is_extended_lasts_longer() {
        let mut row = leased();
        let extend = NewSettlement { until: Some(NOW + 2 * LEASE), ..settled(1, Settlement::Extend) };
        assert_eq!(settle(&mut row, extend, NOW), Ok((3, None)));
        assert_eq!(settle(&mut row, settled(1, Settlement::Expired), NOW + LEASE), Err(no_lease()));
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW + LEASE), Ok((3, None)));
    }

    #[test]
    fn what_failed_is_tried_again_before_anything_else_and_then_given_up() {
        for outcome in [Settlement::Retry, Settlement::Lost, Settlement::Expired] {
            let mut row = leased();
            let over = NOW + LEASE;
            let retry = NewSettlement { until: Some(over + 5), ..settled(1, outcome) };
            let log_time = if outcome == Settlement::Expired { over } else { NOW };
            assert_eq!(settle(&mut row, retry, log_time), Ok((3, None)));
            assert_eq!(row.failed.as_ref().map(|failed| (failed.attempts, failed.not_before)), Some((1, over + 5)));

            for other in [new_lease(2, 4, 0, 1), new_lease(2, 3, 0, 1), new_lease(2, 3, 0, 3)] {
                assert_eq!(lease(&mut row, other, HEAD, NOW).expect_err("seq 3, attempt 2").code, Code::Conflict);
            }
            assert_eq!(lease(&mut row, new_lease(2, 3, 0, 2), HEAD, NOW), Ok(3));
            let (seq, failed) = settle(&mut row, settled(2, outcome), log_time).expect("it is the holder's");
            let failed = failed.expect("it was the last attempt");
            assert_eq!((seq, failed.reason, failed.seq, failed.attempts, failed.tries.len()), (3, ATTEMPTS, 3, 2, 2));
            assert_eq!((row.cursor, row.failed.is_none(), row.lease.is_none()), (3, true, true), "the thread goes on");
        }
    }

    #[test]
    fn what_was_requeued_comes_before_what_was_not_begun_and_after_what_has_failed() {
        let mut row =
            WorkRow { cursor: 5, requeued: vec![2, 4], ..WorkRow { group_id: [1; 16], ..WorkRow::default() } };
        for other in [new_lease(1, 6, 5, 1), new_lease(1, 4, 5, 1), new_lease(1, 3, 5, 1), new_lease(1, 2, 5, 2)] {
            assert_eq!(lease(&mut row, other, HEAD, NOW).expect_err("seq 2, attempt 1").code, Code::Conflict);
        }
        assert_eq!(lease(&mut row, new_lease(1, 2, 5, 1), HEAD, NOW), Ok(2));
        let retry = NewSettlement { until: Some(NOW), ..settled(1, Settlement::Retry) };
        assert_eq!(settle(&mut row, retry, NOW), Ok((2, None)));
        row.requeued.insert(0, 1);
        assert_eq!(lease(&mut row, new_lease(2, 1, 5, 1), HEAD, NOW).expect_err("2 failed").code, Code::Conflict);
        assert_eq!(lease(&mut row, new_lease(2, 2, 5, 2), HEAD, NOW), Ok(2));
        assert!(settle(&mut row, settled(2, Settlement::Done), NOW).is_ok_and(|(_, failed)| failed.is_none()));
        assert_eq!((row.cursor, &row.requeued[..]), (5, &[1, 4][..]), "the cursor stays");
        for (id, seq) in [(3, 1), (4, 4), (5, 6)] {
            assert_eq!(lease(&mut row, new_lease(id, seq, 5, 1), HEAD, NOW), Ok(seq));
            assert!(settle(&mut row, settled(id, Settlement::Done), NOW).is_ok());
        }
        assert_eq!((row.cursor, row.requeued.len()), (6, 0));
    }

    #[test]
    fn what_a_worker_rejects_is_given_up_at_once_with_its_reason() {
        let mut row = leased();
        let reject = NewSettlement { reason: Some("no such order".into()), ..settled(1, Settlement::Reject) };
        let (_, failed) = settle(&mut row, reject, NOW).expect("it is the holder's");
        let tries = vec![TryRow { at: NOW, worker: Some("wim".into()), reason: "no such order".into() }];
        assert_eq!(failed, Some(Failed { reason: REJECTED, seq: 3, kind: "x.job".into(), attempts: 1, tries }));
        assert_eq!(row.cursor, 3);
    }

    #[test]
    fn a_group_that_was_made_again_begins_anew_and_the_one_before_it_is_refused() {
        let mut row = leased();
        let newer = || NewLease { group_id: [2; 16], ..new_lease(2, 2, 0, 1) };
        assert_eq!(lease(&mut row, newer(), HEAD, NOW), Ok(2));
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW), Err(no_lease()));
        assert_eq!(settle(&mut row, settled(2, Settlement::Done), NOW), Ok((2, None)));
        let older = lease(&mut row, new_lease(3, 3, 2, 1), HEAD, NOW);
        assert_eq!(older.expect_err("the group before").code, Code::Conflict);
    }
}
