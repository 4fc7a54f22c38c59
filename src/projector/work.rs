//! Work: who works on which event for a group, judged from the thread's own state.
//!
//! A group is done with a thread up to a cursor. One event after it may be leased at a time, or several where the group keeps
//! no order, and the first `work_leased` in the log that fits the state as it is (the cursor, the attempt) has the lease;
//! whoever saw another state meanwhile is refused, and looks again. So no two nodes give out the same work, none gives out
//! what comes after work that failed, and no node has to own anything.
//!
//! A lease is over when it is settled, or when log time has reached its end. From then on its holder's settlements are
//! refused, whether anybody else has the work yet or not: the lease's id is its fencing token. What was not settled in time
//! is settled by the server (`expired`, `lost`), as a failed attempt. After the last attempt the event is a dead letter, and
//! the thread goes on.
//!
//! An event that is to make room in a full group (`work_overflowed`) is judged like a lease: the first counts, and what is
//! begun stays. That the group is full nobody can judge here, since its other threads are in other partitions: the node that
//! wrote the record has counted.
//!
//! What the record does not say, the thread's state does; a group's settings are in another partition, and decide nothing
//! here. [`work_state`] has the state and what changes it.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::dead_letters::{DeadLetters, GivenUp};
use super::deliveries::MAX_REQUEUED;
use super::transaction::Transaction;
use super::work_state::{self, Failed, NewLease, NewOverflow, NewPause, NewSettlement, Outcome};
use super::{Published, ThreadUpdate, Update, rules};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::dead_letters::{OVERFLOW, WEBHOOK, letter_of};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{WORK_LEASED, WORK_OVERFLOWED, WORK_PAUSED, WORK_RESUMED, WORK_SETTLED};
use crate::protocol::work::{
    MAX_ATTEMPTS, Settlement, WEBHOOK_GROUP, WorkLeasedRecord, WorkOverflowedRecord, WorkPausedRecord,
    WorkSettledRecord, check_group, check_reason,
};
use crate::protocol::{ids, json};
use crate::store::{LeaseRow, Store, StoreError, WaitingRow, WorkRow};

/// Where work is: tenant, thread, group.
type Place = (String, String, String);

/// Beyond so many rows all are forgotten that were kept; each is some hundred bytes.
const MAX_KEPT: usize = 4_096;

/// Rows as the store has them, of threads that were leased or settled last: what a lease has written, its settlement need not
/// read. Only simple ones, which are small.
#[derive(Default)]
pub(super) struct KeptWorks(HashMap<Place, WorkRow>);

/// What this batch has changed.
pub(super) struct Works {
    rows: HashMap<Place, WorkRow>,
    kept: KeptWorks,
}

/// A record about work, checked.
pub(super) struct WorkAct {
    pub(super) id: Uuid,
    /// Its time, in milliseconds.
    pub(super) at: u64,
    place: Place,
    act: Act,
    /// The version of the rules that it is judged by.
    rules: u16,
}

enum Act {
    Lease(NewLease),
    Settle(NewSettlement),
    Overflow(NewOverflow),
    Pause(NewPause),
}

/// Whether a record is about work, by the rules that it is judged by.
pub(super) fn is_work(record: &Record) -> bool {
    match &*record.kind {
        WORK_LEASED | WORK_SETTLED => record.rules >= rules::WORK_IN_THE_LOG,
        WORK_OVERFLOWED | WORK_PAUSED | WORK_RESUMED => record.rules >= rules::WORK_OVERFLOWS,
        _ => false,
    }
}

impl Works {
    pub(super) fn with(kept: KeptWorks) -> Works {
        Works { rows: HashMap::new(), kept }
    }

    /// What is kept once all this is in the store.
    pub(super) fn keep(self) -> KeptWorks {
        let Works { rows, kept: KeptWorks(mut kept) } = self;
        if kept.len() + rows.len() > MAX_KEPT {
            kept.clear();
        }
        for (place, row) in rows {
            match row.simple() {
                Some(_) => drop(kept.insert(place, row)),
                None => drop(kept.remove(&place)),
            }
        }
        KeptWorks(kept)
    }

    /// Applies a record at this log time of its partition; `head` is the thread's.
    pub(super) fn judge(
        &mut self,
        tx: &mut Transaction<'_>,
        dead_letters: &mut DeadLetters,
        record: WorkAct,
        head: u64,
        log_time: u64,
    ) -> Result<Result<Published, Error>, StoreError> {
        let WorkAct { id, at, place, act, rules } = record;
        let before = self.row(tx.store, &place)?;
        let mut row = before.clone();
        let judged = match act {
            Act::Lease(new) => work_state::lease(&mut row, new, head, log_time),
            Act::Settle(new) => work_state::settle(&mut row, new, log_time),
            Act::Overflow(new) => work_state::overflow(&mut row, new, head),
            Act::Pause(new) => work_state::pause(&mut row, new, head),
        };
        let Outcome { seq, past, was_requeued, failed, unchanged } = match judged {
            Ok(outcome) => outcome,
            Err(refused) => return Ok(Err(refused)),
        };

        let published = Published { seq, event: id, duplicate: unchanged };
        if unchanged {
            return Ok(Ok(published));
        }
        let (tenant, thread, group) = &place;
        tx.rows.put_work((tenant, thread, group), &before, &row, usize::from(past));
        put_paused(tx, &place, &before, &row);
        // A lease of a group that was deleted says nothing of what waits for the one that was made again under its name.
        if past && !tx.wanted.is_newer(tenant, group, &row.group_id) {
            tx.rows.delete_waiting(tenant, group, thread, seq);
        }
        put_workers(tx, &place, &before, &row);
        match failed {
            Some(Failed { reason, seq, kind, attempts, tries }) => {
                let is_webhook = group == WEBHOOK_GROUP && rules >= rules::WEBHOOKS && reason != OVERFLOW;
                let reason = if is_webhook { WEBHOOK } else { reason };
                let letter = work_letter(&place, &row.group_id, seq);
                let given_up = GivenUp { letter, tenant, thread, group, seq, kind, reason, attempts, at, tries };
                dead_letters.put_given_up(tx, given_up)?;
            }
            None if was_requeued => dead_letters.put_worked(tx, tenant, work_letter(&place, &row.group_id, seq))?,
            None => {}
        }
        self.rows.insert(place, row);
        Ok(Ok(published))
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
        let before = self.row(tx.store, &place)?;
        let mut row = before.clone();
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
        tx.rows.put_work((tenant, thread, group), &before, &row, 0);
        self.rows.insert(place, row);
        Ok(Ok(()))
    }

    fn row(&self, store: &Store, place: &Place) -> Result<WorkRow, StoreError> {
        match self.rows.get(place).or_else(|| self.kept.0.get(place)) {
            Some(row) => Ok(row.clone()),
            None => Ok(store.work(&place.0, &place.1, &place.2)?.unwrap_or_default()),
        }
    }
}

/// Keeps what holders may do by their leases true to the row: of each, until when the last of its leases lasts. Who has none any
/// more may have lost a right to read.
fn put_workers(tx: &mut Transaction<'_>, (tenant, thread, group): &Place, before: &WorkRow, row: &WorkRow) {
    let place = (&**tenant, &**thread, &**group);
    let (had, has) = (last_leases(before), last_leases(row));
    // Also where a lease of a group that was made again takes the place of those of the group before.
    for holder in had.keys().copied().filter(|holder| !has.contains_key(holder)) {
        tx.rows.put_worker(place, holder, None);
        let key = ids::log_key(tenant, thread).into();
        tx.commit.events.push(ThreadUpdate { key, update: Update::LeaseOver { user: holder.into() } });
    }
    for (holder, until) in has {
        if had.get(holder) != Some(&until) {
            tx.rows.put_worker(place, holder, Some(until));
        }
    }
}

/// Until when each holder's last lease lasts.
fn last_leases(row: &WorkRow) -> BTreeMap<&str, u64> {
    let mut last = BTreeMap::new();
    for lease in &row.leases {
        let until = last.entry(&*lease.holder).or_insert(lease.until);
        *until = lease.until.max(*until);
    }
    last
}

/// Keeps the list of a group's paused threads true to the row.
fn put_paused(tx: &mut Transaction<'_>, place: &Place, before: &WorkRow, row: &WorkRow) {
    if (before.paused_at, before.group_id) == (row.paused_at, row.group_id) {
        return;
    }
    let whose = (&*place.0, &*place.1, &*place.2);
    if before.paused_at.is_some() {
        tx.rows.put_paused(whose, &before.group_id, None);
    }
    if row.paused_at.is_some() {
        tx.rows.put_paused(whose, &row.group_id, row.paused_at);
    }
}

/// The id of the letter that an event becomes which the group gives up.
fn work_letter((tenant, thread, _): &Place, group_id: &[u8; 16], seq: u64) -> Uuid {
    letter_of(&[b"work", tenant.as_bytes(), thread.as_bytes(), group_id, &seq.to_be_bytes()])
}

/// What a record about work says; or why it is foreign.
pub(super) fn read(record: &Record) -> Result<WorkAct, Foreign> {
    let read = match &*record.kind {
        WORK_LEASED => read_lease(record),
        WORK_SETTLED => read_settlement(record),
        WORK_OVERFLOWED => read_overflow(record),
        _ => read_pause(record),
    };
    read.map_err(|why| Foreign::new(why, record))
}

fn read_lease(record: &Record) -> Result<WorkAct, String> {
    let it: WorkLeasedRecord = json::decode_bytes(&record.value).map_err(|error| not_work(&error))?;
    let place = check_place(record, &it.kind, (it.tenant, it.thread, it.group), &it.holder)?;
    if it.attempt == 0 || it.attempts == 0 || it.attempts > MAX_ATTEMPTS {
        return Err("attempt or attempts is out of range".to_owned());
    }
    if it.parallel && record.rules < rules::WORK_IN_PARALLEL {
        return Err("parallel is of version 5 of the rules".to_owned());
    }
    let (at, until) = (read_time("at", &it.at)?, read_time("until", &it.until)?);
    let lease = LeaseRow {
        id: it.id.into_bytes(),
        seq: it.seq,
        after: it.after,
        kind: it.event_kind,
        attempt: it.attempt,
        attempts: it.attempts,
        holder: it.holder,
        at,
        until,
    };
    let act = Act::Lease(NewLease { group_id: it.group_id.into_bytes(), parallel: it.parallel, lease });
    Ok(WorkAct { id: it.id, at, place, act, rules: record.rules })
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
    Ok(WorkAct { id: it.id, at, place, act: Act::Settle(settlement), rules: record.rules })
}

fn read_overflow(record: &Record) -> Result<WorkAct, String> {
    let it: WorkOverflowedRecord = json::decode_bytes(&record.value).map_err(|error| not_work(&error))?;
    let place = check_place(record, &it.kind, (it.tenant, it.thread, it.group), ids::SERVER_USER)?;
    let at = read_time("at", &it.at)?;
    let (group_id, kind) = (it.group_id.into_bytes(), it.event_kind);
    let overflow = NewOverflow { group_id, seq: it.seq, after: it.after, kind, limit: it.limit, at };
    Ok(WorkAct { id: it.id, at, place, act: Act::Overflow(overflow), rules: record.rules })
}

fn read_pause(record: &Record) -> Result<WorkAct, String> {
    let it: WorkPausedRecord = json::decode_bytes(&record.value).map_err(|error| not_work(&error))?;
    let place = check_place(record, &it.kind, (it.tenant, it.thread, it.group), &it.by)?;
    let at = read_time("at", &it.at)?;
    let pause = NewPause { group_id: it.group_id.into_bytes(), paused: it.kind == WORK_PAUSED, at };
    Ok(WorkAct { id: it.id, at, place, act: Act::Pause(pause), rules: record.rules })
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
