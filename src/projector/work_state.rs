//! How far a group is with a thread, and what a record about it changes there. Pure: a row and a record in, a row out.
//!
//! A group is done with everything up to a cursor, and with what has [passed](PassedRow) after it. Where it keeps the order of
//! a thread, one event at a time may be leased: what has failed first, then what was requeued, then what is after the cursor.
//! Where it does not, several are, each on its own, and the cursor follows the lowest that is not done.
//!
//! What a lease says of the events between it and the one before (`after`: none of them is work) becomes true of the row when
//! the lease is settled: so the row has one range for all that was done in one piece, and its size is bounded by what is
//! begun and by [`MAX_SPREAD`].

use crate::protocol::dead_letters::{ATTEMPTS, OVERFLOW, REJECTED};
use crate::protocol::error::{Code, Error};
use crate::protocol::work::{MAX_PARALLEL, Settlement, no_lease};
use crate::store::dead_letters::TryRow;
use crate::store::{FailedRow, LeaseRow, PassedRow, WorkRow};

/// How many ranges and begun events one row may have: what is new must fit in even if nothing of it ever touches.
const MAX_SPREAD: usize = 2 * MAX_PARALLEL;

/// A lease as its record wants it.
pub(super) struct NewLease {
    pub(super) group_id: [u8; 16],
    /// The group keeps no order: others of the thread may be leased at the same time.
    pub(super) parallel: bool,
    pub(super) lease: LeaseRow,
}

pub(super) struct NewSettlement {
    pub(super) lease: [u8; 16],
    pub(super) outcome: Settlement,
    pub(super) by: String,
    pub(super) reason: Option<String>,
    /// Milliseconds.
    pub(super) until: Option<u64>,
    pub(super) at: u64,
}

/// An event that is to make room in a group that is full.
pub(super) struct NewOverflow {
    pub(super) group_id: [u8; 16],
    pub(super) seq: u64,
    pub(super) after: u64,
    pub(super) kind: String,
    pub(super) limit: u64,
    pub(super) at: u64,
}

/// Nobody gets work of the thread from then on, or somebody does again.
pub(super) struct NewPause {
    pub(super) group_id: [u8; 16],
    pub(super) paused: bool,
    pub(super) at: u64,
}

/// An event that is not tried again.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) reason: &'static str,
    pub(super) seq: u64,
    pub(super) kind: String,
    pub(super) attempts: u32,
    pub(super) tries: Vec<TryRow>,
}

/// What a record came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) seq: u64,
    /// The group is done with the event.
    pub(super) past: bool,
    /// It had been requeued.
    pub(super) was_requeued: bool,
    pub(super) failed: Option<Failed>,
    /// Nothing had to change.
    pub(super) unchanged: bool,
}

fn conflict<T>(why: &'static str) -> Result<T, Error> {
    Err(Error::new(Code::Conflict, why))
}

/// Ids of groups sort by the time when they were made: the one that was made later counts, and begins anew.
fn take_group(row: &mut WorkRow, group_id: [u8; 16]) -> Result<(), Error> {
    if group_id < row.group_id {
        return conflict("the group was deleted and made again");
    }
    if group_id > row.group_id {
        *row = WorkRow { group_id, ..WorkRow::default() };
    }
    Ok(())
}

/// Leases an event, if the thread's state is the one that the record is for.
pub(super) fn lease(row: &mut WorkRow, new: NewLease, head: u64, log_time: u64) -> Result<Outcome, Error> {
    let NewLease { group_id, parallel, mut lease } = new;
    take_group(row, group_id)?;
    if row.paused_at.is_some() {
        return conflict("the thread is paused");
    }
    let seq = lease.seq;
    let tried = if parallel { parallel_turn(row, &lease, head)? } else { next_turn(row, &lease, head)? };
    if lease.attempt != tried + 1 {
        return conflict("this attempt was made already");
    }
    if lease.until <= log_time {
        return conflict("the lease would be over before it begins");
    }
    if let Some(failed) = row.failed_at(seq) {
        lease.after = failed.after;
    }
    let at = row.leases.partition_point(|it| it.seq < seq);
    row.leases.insert(at, lease);
    Ok(Outcome { seq, ..Outcome::default() })
}

/// How often the one event was tried that is the thread's next, if the lease is on it.
fn next_turn(row: &WorkRow, lease: &LeaseRow, head: u64) -> Result<u32, Error> {
    if !row.leases.is_empty() {
        return conflict("the thread's work is leased");
    }
    if lease.after != row.cursor || lease.seq > head {
        return conflict("the group is at another event of the thread");
    }
    let (is_next, tried) = match (row.failed.first(), row.requeued.first()) {
        (Some(failed), _) => (lease.seq == failed.seq, failed.attempts),
        (None, Some(requeued)) => (lease.seq == *requeued, 0),
        (None, None) => (!row.is_past(lease.seq), 0),
    };
    if is_next { Ok(tried) } else { conflict("another event of the thread comes before this one") }
}

/// How often an event was tried that may be leased beside others.
fn parallel_turn(row: &WorkRow, lease: &LeaseRow, head: u64) -> Result<u32, Error> {
    let seq = lease.seq;
    if row.lease_on(seq).is_some() {
        return conflict("the event is leased");
    }
    if row.leases.len() >= MAX_PARALLEL {
        return conflict("as much of the thread is leased as may be at a time");
    }
    if let Some(failed) = row.failed_at(seq) {
        return Ok(failed.attempts);
    }
    if row.requeued.contains(&seq) {
        return Ok(0);
    }
    if row.is_past(seq) || seq > head || lease.after >= seq {
        return conflict("the event is done, or there is none");
    }
    if !has_room(row) {
        return conflict("too much of the thread is begun and not done");
    }
    Ok(0)
}

/// Whether one event more may be begun, or passed on its own.
fn has_room(row: &WorkRow) -> bool {
    row.leases.len() + row.failed.len() + row.passed.len() < MAX_SPREAD
}

/// Settles a lease.
pub(super) fn settle(row: &mut WorkRow, new: NewSettlement, log_time: u64) -> Result<Outcome, Error> {
    let NewSettlement { lease: id, outcome, by, reason, until, at } = new;
    let Some(index) = row.leases.iter().position(|lease| lease.id == id) else { return Err(no_lease()) };
    let lease = &mut row.leases[index];
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

    let failure = match outcome {
        Settlement::Extend => {
            lease.until = until.unwrap_or(lease.until);
            return Ok(Outcome { seq: lease.seq, ..Outcome::default() });
        }
        Settlement::Done => None,
        Settlement::Reject => Some(reason.unwrap_or_else(|| "rejected".to_owned())),
        Settlement::Retry => Some(reason.unwrap_or_else(|| "failed".to_owned())),
        Settlement::Lost => Some("the worker's connection was lost".to_owned()),
        Settlement::Expired => Some("the lease was over and not settled".to_owned()),
    };
    let LeaseRow { seq, after, kind, attempt, attempts, holder, at: began, .. } = row.leases.remove(index);
    let before = row.failed.iter().position(|failed| failed.seq == seq).map(|index| row.failed.remove(index));
    let Some(reason) = failure else {
        let was_requeued = pass(row, after, seq);
        return Ok(Outcome { seq, past: true, was_requeued, ..Outcome::default() });
    };
    let mut tries = before.map_or(Vec::new(), |failed| failed.tries);
    tries.push(TryRow { at: began, worker: Some(holder), reason });
    if outcome != Settlement::Reject && attempt < attempts {
        let place = row.failed.partition_point(|it| it.seq < seq);
        let failed = FailedRow { seq, after, attempts: attempt, not_before: until.unwrap_or(at), tries };
        row.failed.insert(place, failed);
        return Ok(Outcome { seq, ..Outcome::default() });
    }
    let was_requeued = pass(row, after, seq);
    let reason = if outcome == Settlement::Reject { REJECTED } else { ATTEMPTS };
    let failed = Some(Failed { reason, seq, kind, attempts: attempt, tries });
    Ok(Outcome { seq, past: true, was_requeued, failed, unchanged: false })
}

/// An event that nobody has begun makes room for others.
pub(super) fn overflow(row: &mut WorkRow, new: NewOverflow, head: u64) -> Result<Outcome, Error> {
    let NewOverflow { group_id, seq, after, kind, limit, at } = new;
    take_group(row, group_id)?;
    if row.is_past(seq) || seq > head || after >= seq {
        return conflict("the event is done, or there is none");
    }
    if row.is_begun(seq) {
        return conflict("the event is begun");
    }
    if !has_room(row) {
        return conflict("too much of the thread is begun and not done");
    }
    pass(row, after, seq);
    let reason = format!("more waited than the group's limit of {limit}");
    let tries = vec![TryRow { at, worker: None, reason }];
    let failed = Some(Failed { reason: OVERFLOW, seq, kind, attempts: 0, tries });
    Ok(Outcome { seq, past: true, failed, ..Outcome::default() })
}

/// Holds the thread, or lets it go on.
pub(super) fn pause(row: &mut WorkRow, new: NewPause, head: u64) -> Result<Outcome, Error> {
    let NewPause { group_id, paused, at } = new;
    if head == 0 {
        return Err(Error::no_thread());
    }
    take_group(row, group_id)?;
    let unchanged = row.paused_at.is_some() == paused;
    if !unchanged {
        row.paused_at = paused.then_some(at);
    }
    Ok(Outcome { unchanged, ..Outcome::default() })
}

/// The group is done with an event, and nothing between `after` and it is work. Says whether it had been requeued.
fn pass(row: &mut WorkRow, after: u64, seq: u64) -> bool {
    if let Some(index) = row.requeued.iter().position(|requeued| *requeued == seq) {
        row.requeued.remove(index);
        return true;
    }
    if row.is_past(seq) {
        return false;
    }
    // What is begun is work, whatever was said of it.
    let begun = row.leases.iter().map(|lease| lease.seq).chain(row.failed.iter().map(|failed| failed.seq));
    let after = begun.filter(|it| *it < seq).fold(after.max(row.cursor), u64::max);
    let mut new = PassedRow { after, to: seq };
    row.passed.retain(|it| {
        let apart = it.to < new.after || new.to < it.after;
        if !apart {
            new = PassedRow { after: it.after.min(new.after), to: it.to.max(new.to) };
        }
        apart
    });
    if new.after <= row.cursor {
        row.cursor = new.to;
    } else {
        let place = row.passed.partition_point(|it| it.after < new.after);
        row.passed.insert(place, new);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const LEASE: u64 = 30_000;
    const HEAD: u64 = 10;

    fn new_lease(id: u8, seq: u64, after: u64, attempt: u32) -> NewLease {
        let (holder, at, until) = ("wim".to_owned(), NOW, NOW + LEASE);
        let lease =
            LeaseRow { id: [id; 16], seq, after, kind: "x.job".into(), attempt, attempts: 2, holder, at, until };
        NewLease { group_id: [1; 16], parallel: false, lease }
    }

    fn beside(id: u8, seq: u64, after: u64, attempt: u32) -> NewLease {
        NewLease { parallel: true, ..new_lease(id, seq, after, attempt) }
    }

    fn settled(id: u8, outcome: Settlement) -> NewSettlement {
        NewSettlement { lease: [id; 16], outcome, by: "wim".into(), reason: None, until: None, at: NOW }
    }

    fn full(seq: u64, after: u64) -> NewOverflow {
        NewOverflow { group_id: [1; 16], seq, after, kind: "x.job".into(), limit: 7, at: NOW }
    }

    /// The seq that is leased, or the code of the refusal.
    fn leases(row: &mut WorkRow, new: NewLease) -> Result<u64, Code> {
        lease(row, new, HEAD, NOW).map(|outcome| outcome.seq).map_err(|refused| refused.code)
    }

    /// The seq whose lease is settled, and the reason of the dead letter that it becomes.
    fn settles(row: &mut WorkRow, new: NewSettlement, log_time: u64) -> Result<(u64, Option<&'static str>), Error> {
        settle(row, new, log_time).map(|outcome| (outcome.seq, outcome.failed.map(|failed| failed.reason)))
    }

    fn done(row: &mut WorkRow, id: u8) -> u64 {
        let outcome = settle(row, settled(id, Settlement::Done), NOW).expect("it is the holder's");
        assert!(outcome.past && outcome.failed.is_none(), "{outcome:?}");
        outcome.seq
    }

    fn passed(row: &WorkRow) -> (u64, Vec<(u64, u64)>) {
        (row.cursor, row.passed.iter().map(|it| (it.after, it.to)).collect())
    }

    /// A thread in which seq 3 is leased by the lease 1.
    fn leased() -> WorkRow {
        let mut row = WorkRow::default();
        assert_eq!(leases(&mut row, new_lease(1, 3, 0, 1)), Ok(3));
        row
    }

    #[test]
    fn the_first_lease_counts_and_the_next_one_is_of_what_comes_after() {
        let mut row = leased();
        for other in [new_lease(2, 3, 0, 1), new_lease(2, 4, 0, 1), new_lease(2, 4, 3, 1)] {
            assert_eq!(leases(&mut row, other), Err(Code::Conflict));
        }
        assert_eq!(done(&mut row, 1), 3);
        for stale in [new_lease(2, 3, 0, 1), new_lease(2, 3, 3, 1), new_lease(2, 4, 0, 1), new_lease(2, HEAD + 1, 3, 1)]
        {
            assert_eq!(leases(&mut row, stale), Err(Code::Conflict));
        }
        assert_eq!(leases(&mut row, new_lease(2, 4, 3, 1)), Ok(4));
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
        assert_eq!(settles(&mut row, settled(1, Settlement::Done), NOW + LEASE - 1), Ok((3, None)));
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW), Err(no_lease()), "once");
    }

    #[test]
    fn a_lease_that_is_extended_lasts_longer() {
        let mut row = leased();
        let extend = NewSettlement { until: Some(NOW + 2 * LEASE), ..settled(1, Settlement::Extend) };
        assert_eq!(settle(&mut row, extend, NOW), Ok(Outcome { seq: 3, ..Outcome::default() }));
        assert_eq!(settle(&mut row, settled(1, Settlement::Expired), NOW + LEASE), Err(no_lease()));
        assert_eq!(settles(&mut row, settled(1, Settlement::Done), NOW + LEASE), Ok((3, None)));
    }

    #[test]
    fn what_failed_is_tried_again_before_anything_else_and_then_given_up() {
        for outcome in [Settlement::Retry, Settlement::Lost, Settlement::Expired] {
            let mut row = leased();
            let over = NOW + LEASE;
            let retry = NewSettlement { until: Some(over + 5), ..settled(1, outcome) };
            let log_time = if outcome == Settlement::Expired { over } else { NOW };
            assert_eq!(settles(&mut row, retry, log_time), Ok((3, None)));
            assert_eq!(row.failed_at(3).map(|failed| (failed.attempts, failed.not_before)), Some((1, over + 5)));

            for other in [new_lease(2, 4, 0, 1), new_lease(2, 3, 0, 1), new_lease(2, 3, 0, 3)] {
                assert_eq!(leases(&mut row, other), Err(Code::Conflict));
            }
            assert_eq!(leases(&mut row, new_lease(2, 3, 0, 2)), Ok(3));
            let failed = settle(&mut row, settled(2, outcome), log_time).expect("it is the holder's").failed;
            let failed = failed.expect("it was the last attempt");
            assert_eq!((failed.reason, failed.seq, failed.attempts, failed.tries.len()), (ATTEMPTS, 3, 2, 2));
            assert_eq!((row.cursor, row.failed.len(), row.leases.len()), (3, 0, 0), "the thread goes on");
        }
    }

    #[test]
    fn what_was_requeued_comes_before_what_was_not_begun_and_after_what_has_failed() {
        let mut row =
            WorkRow { cursor: 5, requeued: vec![2, 4], ..WorkRow { group_id: [1; 16], ..WorkRow::default() } };
        for other in [new_lease(1, 6, 5, 1), new_lease(1, 4, 5, 1), new_lease(1, 3, 5, 1), new_lease(1, 2, 5, 2)] {
            assert_eq!(leases(&mut row, other), Err(Code::Conflict));
        }
        assert_eq!(leases(&mut row, new_lease(1, 2, 5, 1)), Ok(2));
        let retry = NewSettlement { until: Some(NOW), ..settled(1, Settlement::Retry) };
        assert_eq!(settles(&mut row, retry, NOW), Ok((2, None)));
        row.requeued.insert(0, 1);
        assert_eq!(leases(&mut row, new_lease(2, 1, 5, 1)), Err(Code::Conflict), "2 failed");
        assert_eq!(leases(&mut row, new_lease(2, 2, 5, 2)), Ok(2));
        assert_eq!(done(&mut row, 2), 2);
        assert_eq!((row.cursor, &row.requeued[..]), (5, &[1, 4][..]), "the cursor stays");
        for (id, seq) in [(3, 1), (4, 4), (5, 6)] {
            assert_eq!(leases(&mut row, new_lease(id, seq, 5, 1)), Ok(seq));
            assert_eq!(done(&mut row, id), seq);
        }
        assert_eq!((row.cursor, row.requeued.len()), (6, 0));
    }

    #[test]
    fn what_a_worker_rejects_is_given_up_at_once_with_its_reason() {
        let mut row = leased();
        let reject = NewSettlement { reason: Some("no such order".into()), ..settled(1, Settlement::Reject) };
        let failed = settle(&mut row, reject, NOW).expect("it is the holder's").failed;
        let tries = vec![TryRow { at: NOW, worker: Some("wim".into()), reason: "no such order".into() }];
        assert_eq!(failed, Some(Failed { reason: REJECTED, seq: 3, kind: "x.job".into(), attempts: 1, tries }));
        assert_eq!(row.cursor, 3);
    }

    #[test]
    fn a_group_that_was_made_again_begins_anew_and_the_one_before_it_is_refused() {
        let mut row = leased();
        let newer = || NewLease { group_id: [2; 16], ..new_lease(2, 2, 0, 1) };
        assert_eq!(leases(&mut row, newer()), Ok(2));
        assert_eq!(settle(&mut row, settled(1, Settlement::Done), NOW), Err(no_lease()));
        assert_eq!(done(&mut row, 2), 2);
        assert_eq!(leases(&mut row, new_lease(3, 3, 2, 1)), Err(Code::Conflict), "the group before");
    }

    #[test]
    fn what_is_leased_side_by_side_is_each_done_once_and_the_cursor_follows_the_lowest() {
        let mut row = WorkRow::default();
        for (id, seq, after) in [(2, 4, 2), (1, 2, 0), (3, 5, 4), (4, 9, 5)] {
            assert_eq!(leases(&mut row, beside(id, seq, after, 1)), Ok(seq));
        }
        for other in [beside(9, 4, 2, 1), beside(9, 4, 2, 2), beside(9, HEAD + 1, 9, 1), beside(9, 3, 3, 1)] {
            assert_eq!(leases(&mut row, other), Err(Code::Conflict));
        }
        assert_eq!(
            leases(&mut row, new_lease(9, 10, 0, 1)),
            Err(Code::Conflict),
            "in order, nothing is beside another"
        );
        assert_eq!(done(&mut row, 3), 5);
        assert_eq!(passed(&row), (0, vec![(4, 5)]));
        assert_eq!(leases(&mut row, beside(9, 5, 4, 1)), Err(Code::Conflict), "it is done");
        assert_eq!(done(&mut row, 4), 9);
        assert_eq!(passed(&row), (0, vec![(4, 9)]), "nothing between them was work");
        assert_eq!(done(&mut row, 1), 2);
        assert_eq!(passed(&row), (2, vec![(4, 9)]));
        assert_eq!(done(&mut row, 2), 4);
        assert_eq!((passed(&row), row.leases.len()), ((9, vec![]), 0));
    }

    #[test]
    fn side_by_side_each_event_has_attempts_of_its_own() {
        let mut row = WorkRow::default();
        for (id, seq) in [(1, 1), (2, 2), (3, 3)] {
            assert_eq!(leases(&mut row, beside(id, seq, seq - 1, 1)), Ok(seq));
        }
        assert_eq!(settles(&mut row, settled(2, Settlement::Retry), NOW), Ok((2, None)));
        assert_eq!(settles(&mut row, settled(3, Settlement::Reject), NOW), Ok((3, Some(REJECTED))));
        assert_eq!(done(&mut row, 1), 1);
        assert_eq!(passed(&row), (1, vec![(2, 3)]), "2 is not done");
        assert_eq!(leases(&mut row, beside(4, 2, 1, 1)), Err(Code::Conflict), "that attempt was made");
        assert_eq!(leases(&mut row, beside(4, 4, 3, 1)), Ok(4), "2 holds up nothing");
        row.requeued.push(3);
        assert_eq!(leases(&mut row, beside(5, 3, 1, 1)), Ok(3));
        assert_eq!(leases(&mut row, beside(6, 2, 1, 2)), Ok(2));
        assert_eq!(settles(&mut row, settled(6, Settlement::Lost), NOW), Ok((2, Some(ATTEMPTS))));
        assert_eq!(passed(&row), (3, vec![]));
        let outcome = settle(&mut row, settled(5, Settlement::Done), NOW).expect("it is the holder's");
        assert!(outcome.was_requeued && row.requeued.is_empty());
        assert_eq!(done(&mut row, 4), 4);
        assert_eq!(passed(&row), (4, vec![]));
    }

    #[test]
    fn a_thread_has_so_many_leases_side_by_side_and_its_row_stays_small_whatever_is_done_first() {
        let (mut row, head) = (WorkRow::default(), 10_000);
        let id = |seq: u64| [&seq.to_be_bytes()[..], &[0; 8]].concat().try_into().expect("16 bytes");
        let on = |row: &mut WorkRow, seq: u64| {
            let lease_row = LeaseRow { id: id(seq), ..new_lease(0, seq, seq - 1, 1).lease };
            lease(row, NewLease { lease: lease_row, ..beside(0, seq, 0, 1) }, head, NOW)
        };
        // Each second event stays undone: ranges between them that never touch.
        let mut begun = 0;
        for seq in (2..head).step_by(2) {
            if on(&mut row, seq).is_err() {
                break;
            }
            begun += 1;
            let one = NewSettlement { lease: id(seq), ..settled(0, Settlement::Done) };
            assert!(settle(&mut row, one, NOW).is_ok());
        }
        assert_eq!((begun, row.passed.len()), (MAX_SPREAD, MAX_SPREAD));
        // From the front on there is always room.
        let mut row = WorkRow::default();
        let leased = (1..head).take_while(|seq| on(&mut row, *seq).is_ok()).count();
        assert_eq!(leased, MAX_PARALLEL);
        for seq in (1..=MAX_PARALLEL as u64).rev() {
            let one = NewSettlement { lease: id(seq), ..settled(0, Settlement::Done) };
            assert!(settle(&mut row, one, NOW).is_ok() && row.passed.len() <= 1);
        }
        assert_eq!(passed(&row), (MAX_PARALLEL as u64, vec![]));
    }

    #[test]
    fn what_makes_room_is_a_letter_once_and_nothing_that_is_begun() {
        let mut row = leased();
        let refused = |row: &mut WorkRow, new| overflow(row, new, HEAD).expect_err("it is begun, or done").code;
        for begun in [full(3, 0), full(HEAD + 1, 3), full(4, 4)] {
            assert_eq!(refused(&mut row, begun), Code::Conflict);
        }
        let outcome = overflow(&mut row, full(6, 4), HEAD).expect("nobody has begun it");
        let failed = outcome.failed.expect("it is a letter");
        assert_eq!((failed.reason, failed.seq, failed.attempts), (OVERFLOW, 6, 0));
        assert_eq!(failed.tries[0].reason, "more waited than the group's limit of 7");
        assert_eq!(refused(&mut row, full(6, 4)), Code::Conflict, "once");
        assert!(overflow(&mut row, full(4, 3), HEAD).is_ok());
        assert_eq!(passed(&row), (0, vec![(3, 6)]));

        // The thread goes on behind it; and before that, if it is requeued.
        assert_eq!(done(&mut row, 1), 3);
        assert_eq!(passed(&row), (6, vec![]));
        row.requeued.push(4);
        assert_eq!(refused(&mut row, full(4, 3)), Code::Conflict);
        assert_eq!(leases(&mut row, new_lease(2, 4, 6, 1)), Ok(4));
        assert_eq!(done(&mut row, 2), 4);
        assert_eq!(leases(&mut row, new_lease(3, 7, 6, 1)), Ok(7));
    }

    #[test]
    fn a_thread_that_is_paused_is_not_leased_and_what_was_leased_before_is_settled() {
        let hold = |row: &mut WorkRow, paused, head| pause(row, NewPause { group_id: [1; 16], paused, at: NOW }, head);
        let mut row = leased();
        assert_eq!(hold(&mut row, true, 0).expect_err("no thread").code, Code::NotFound);
        assert!(hold(&mut row, true, HEAD).is_ok_and(|outcome| !outcome.unchanged));
        assert!(hold(&mut row, true, HEAD).is_ok_and(|outcome| outcome.unchanged));
        assert_eq!(done(&mut row, 1), 3);
        assert_eq!(leases(&mut row, new_lease(2, 4, 3, 1)), Err(Code::Conflict));
        assert_eq!(leases(&mut row, beside(2, 4, 3, 1)), Err(Code::Conflict));
        assert!(hold(&mut row, false, HEAD).is_ok_and(|outcome| !outcome.unchanged));
        assert_eq!(leases(&mut row, new_lease(2, 4, 3, 1)), Ok(4));
    }
}
