//! Work queues: groups, and for each thread how far a group is with it.

use bincode::{Decode, Encode};
use rocksdb::ReadOptions;

use super::catalogue::{GROUPS, PAUSED_THREADS, WAITING, WORK, WORKERS};
use super::dead_letters::TryRow;
use super::{Batch, Partition, Store, StoreError, keys};
use crate::protocol::work::{Boost, Overflow, WorkOrder};

/// A group and its settings.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GroupRow {
    /// The id of the record that made it.
    pub id: [u8; 16],
    /// When it was made; milliseconds.
    pub created_at: u64,
    pub kinds: Vec<String>,
    /// Events from this time on are its work; 0 for all. Milliseconds.
    pub from: u64,
    pub lease_ms: u64,
    pub attempts: u32,
    pub backoff_min_ms: u64,
    pub backoff_max_ms: u64,
    /// Beyond so many that wait it is overflowing.
    pub limit: u64,
    pub overflow: Overflow,
    pub order: WorkOrder,
    pub boost: Boost,
    pub paused: bool,
    /// The id of the record that last said which events are its work.
    pub revision: [u8; 16],
}

impl GroupRow {
    /// Whether an event of this kind and time is the group's work. The same for whoever asks, on every node.
    pub fn wants(&self, kind: &str, at: u64) -> bool {
        at >= self.from && self.kinds.iter().any(|wanted| wanted == kind)
    }

    /// A group as unit tests have it, whose work are all events of the kind `x.job`.
    #[cfg(test)]
    pub fn of_tests() -> GroupRow {
        GroupRow {
            id: [1; 16],
            created_at: 0,
            kinds: vec!["x.job".to_owned()],
            from: 0,
            lease_ms: 30_000,
            attempts: 5,
            backoff_min_ms: 0,
            backoff_max_ms: 0,
            limit: 100_000,
            overflow: Overflow::Accept,
            order: WorkOrder::Thread,
            boost: Boost::default(),
            paused: false,
            revision: [1; 16],
        }
    }
}

/// An event that waits for a group, or that did: what is up to the thread's cursor is done.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WaitingRow {
    pub kind: String,
    /// Who published it.
    pub user: String,
    /// Milliseconds.
    pub at: u64,
    /// The class of its priority.
    pub class: u8,
}

/// The first event that waits in a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingHead {
    pub thread: String,
    pub seq: u64,
    pub row: WaitingRow,
}

/// Where a walk over what waits goes on: after this thread of the partition, or at its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingStart {
    pub partition: u32,
    pub thread: Option<String>,
}

impl WaitingStart {
    pub const BEGIN: WaitingStart = WaitingStart { partition: 0, thread: None };
}

/// What a commit changes of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkChange {
    /// An event waits for a group.
    Waiting { tenant: String, group: String, thread: String },
    /// A lease was given or is over; a thread's cursor has moved. Of the group with this id so many more wait or are worked
    /// on, and so many more are worked on.
    Work {
        tenant: String,
        group: String,
        thread: String,
        group_id: [u8; 16],
        events: i64,
        in_flight: i64,
        /// What the thread's row came to by this, if that is simple.
        now: Option<SimpleWork>,
    },
    /// A group was made, changed or deleted.
    Group { tenant: String, group: String },
}

/// How far a group is with a thread of which there is nothing else to say: nothing failed, was requeued, is passed over or paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimpleWork {
    /// One event is worked on, by the lease with this id and until then; milliseconds.
    Leased { id: [u8; 16], until: u64 },
    /// None is. Everything up to this seq is done.
    Free { cursor: u64 },
}

/// Hears what commits change, once they are visible. It must not block.
pub(super) type WorkListener = Box<dyn Fn(Vec<WorkChange>) + Send + Sync>;

/// How far a group is with a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct WorkRow {
    /// The group's id: what another group of its name has done is not its own.
    pub group_id: [u8; 16],
    /// Everything up to this seq is done, a dead letter, or no work.
    pub cursor: u64,
    /// The same of what is after the cursor, in order; no two of these touch.
    pub passed: Vec<PassedRow>,
    /// Who works there, in the order of seqs; one at most where the group keeps a thread's order.
    pub leases: Vec<LeaseRow>,
    /// What was tried and is to be tried again, in the order of seqs.
    pub failed: Vec<FailedRow>,
    /// Dead letters that were requeued, in order; they come before what is not begun.
    pub requeued: Vec<u64>,
    /// Since when nobody gets work of the thread, if that is so; milliseconds.
    pub paused_at: Option<u64>,
}

impl WorkRow {
    /// Whether the group has done with an event, unless it was requeued.
    pub fn is_past(&self, seq: u64) -> bool {
        seq <= self.cursor || self.passed.iter().any(|it| it.after < seq && seq <= it.to)
    }

    /// Whether somebody works on an event, or has tried to and will again.
    pub fn is_begun(&self, seq: u64) -> bool {
        self.lease_on(seq).is_some() || self.failed_at(seq).is_some()
    }

    /// The same in short, if there is nothing to it that this does not say.
    pub fn simple(&self) -> Option<SimpleWork> {
        let WorkRow { group_id: _, cursor, passed, leases, failed, requeued, paused_at } = self;
        if !passed.is_empty() || !failed.is_empty() || !requeued.is_empty() || paused_at.is_some() {
            return None;
        }
        match &leases[..] {
            [] => Some(SimpleWork::Free { cursor: *cursor }),
            [lease] => Some(SimpleWork::Leased { id: lease.id, until: lease.until }),
            _ => None,
        }
    }

    pub fn lease_on(&self, seq: u64) -> Option<&LeaseRow> {
        self.leases.iter().find(|lease| lease.seq == seq)
    }

    pub fn failed_at(&self, seq: u64) -> Option<&FailedRow> {
        self.failed.iter().find(|failed| failed.seq == seq)
    }
}

/// Events after one seq up to another with which a group has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct PassedRow {
    pub after: u64,
    pub to: u64,
}

/// Who works on an event, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct LeaseRow {
    pub id: [u8; 16],
    pub seq: u64,
    /// Nothing between this seq and the event's is work.
    pub after: u64,
    /// The event's.
    pub kind: String,
    pub attempt: u32,
    /// How many attempts there may be.
    pub attempts: u32,
    pub holder: String,
    /// Milliseconds, as all times here.
    pub at: u64,
    pub until: u64,
}

/// An event whose attempts failed so far.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FailedRow {
    pub seq: u64,
    /// Nothing between this seq and the event's is work.
    pub after: u64,
    pub attempts: u32,
    /// When it is to be tried again.
    pub not_before: u64,
    /// The newest attempts.
    pub tries: Vec<TryRow>,
}

impl Store {
    pub fn group(&self, tenant: &str, group: &str) -> Result<Option<GroupRow>, StoreError> {
        self.get(GROUPS, &keys::joined(self.partition_of_groups(tenant), &[tenant, group]))
    }

    /// A tenant's groups by their names, in order; no more than a tenant may have.
    pub fn groups(&self, tenant: &str) -> impl Iterator<Item = Result<(String, GroupRow), StoreError>> {
        self.rows_under(GROUPS, keys::prefix(self.partition_of_groups(tenant), &[tenant]))
    }

    /// All groups of all tenants: tenant, name, row.
    pub fn all_groups(&self) -> impl Iterator<Item = Result<(String, String, GroupRow), StoreError>> {
        self.partitions().flat_map(|partition| self.under(GROUPS, partition.bytes().to_vec())).map(|row| {
            let (key, value) = row?;
            let key = String::from_utf8_lossy(&key).into_owned();
            let (tenant, group) = key.split_once('\0').unwrap_or((&key, ""));
            Ok((tenant.to_owned(), group.to_owned(), self.decoded(GROUPS, &value)?))
        })
    }

    /// How far a group is with a thread, if it has done anything there.
    pub fn work(&self, tenant: &str, thread: &str, group: &str) -> Result<Option<WorkRow>, StoreError> {
        self.get(WORK, &keys::joined(self.partition(tenant, thread), &[tenant, thread, group]))
    }

    /// How far the group with this id is with a thread: another one of its name does not count.
    pub fn work_of(&self, tenant: &str, thread: &str, group: &str, id: &[u8; 16]) -> Result<WorkRow, StoreError> {
        let work = self.work(tenant, thread, group)?.filter(|work| work.group_id == *id);
        Ok(work.unwrap_or_default())
    }

    /// The threads of which a group with this id gives out no work, and since when: up to `limit` of them.
    pub fn paused_threads(
        &self,
        tenant: &str,
        group: &str,
        group_id: &[u8; 16],
        limit: usize,
    ) -> Result<Vec<(String, u64)>, StoreError> {
        let prefix = |partition| paused_prefix(partition, tenant, group, group_id);
        let rows = self.partitions().flat_map(|partition| self.rows_under(PAUSED_THREADS, prefix(partition)));
        rows.take(limit).collect()
    }

    /// Whether a user has a lease on a thread's work that is not over at this time. Reads no more than what the user has there.
    pub fn has_lease(&self, tenant: &str, thread: &str, user: &str, now: u64) -> Result<bool, StoreError> {
        let prefix = keys::prefix(self.partition(tenant, thread), &[tenant, thread, user]);
        for row in self.rows_under::<u64>(WORKERS, prefix) {
            if row?.1 > now {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// From now on `listener` hears what commits change of work. There is one, for as long as the store is open; another is
    /// not taken.
    pub fn listen_to_work(&self, listener: impl Fn(Vec<WorkChange>) + Send + Sync + 'static) -> Result<(), StoreError> {
        drop(self.work_listener.set(Box::new(listener)));
        self.begin_depths()
    }

    /// An event that waits, or waited.
    pub fn waiting(&self, tenant: &str, group: &str, thread: &str, seq: u64) -> Result<Option<WaitingRow>, StoreError> {
        self.get(WAITING, &waiting_key(self.partition(tenant, thread), tenant, group, thread, seq))
    }

    /// The first events after this seq that wait in a thread and for which `accepts` holds, up to `limit` of them.
    pub fn waiting_after(
        &self,
        (tenant, group, thread): (&str, &str, &str),
        after: u64,
        limit: usize,
        accepts: impl Fn(u64, &WaitingRow) -> bool,
    ) -> Result<Vec<(u64, WaitingRow)>, StoreError> {
        let mut found = Vec::new();
        let partition = self.partition(tenant, thread);
        let from = waiting_key(partition, tenant, group, thread, after.saturating_add(1));
        let to = keys::after(keys::prefix(partition, &[tenant, group, thread]));
        for row in self.between(WAITING, &from, to) {
            let (key, value) = row?;
            let row: WaitingRow = self.decoded(WAITING, &value)?;
            found.extend(keys::seq_of(&key).filter(|seq| accepts(*seq, &row)).map(|seq| (seq, row)));
            if found.len() >= limit {
                break;
            }
        }
        Ok(found)
    }

    /// The threads in which something waits for a group, each with its first row, up to `limit` of them; and where the walk
    /// goes on, if it is not at its end.
    pub fn waiting_threads(
        &self,
        tenant: &str,
        group: &str,
        from: WaitingStart,
        limit: usize,
    ) -> Result<(Vec<WaitingHead>, Option<WaitingStart>), StoreError> {
        let (mut found, mut start) = (Vec::new(), from);
        loop {
            let partition = Partition::new(start.partition);
            let prefix = keys::prefix(partition, &[tenant, group]);
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(keys::after(prefix.clone()));
            let mut rows = self.db.raw_iterator_cf_opt(&self.family(WAITING), options);
            match &start.thread {
                Some(thread) => rows.seek(keys::after(keys::prefix(partition, &[tenant, group, thread]))),
                None => rows.seek(&prefix),
            }
            while let Some((key, value)) = rows.item() {
                let Some((thread, seq)) = split_waiting(&key[prefix.len()..]) else {
                    rows.next();
                    continue;
                };
                if found.len() == limit {
                    return Ok((found, Some(start)));
                }
                let head = WaitingHead { thread, seq, row: self.decoded(WAITING, value)? };
                rows.seek(keys::after(keys::prefix(partition, &[tenant, group, &head.thread])));
                start.thread = Some(head.thread.clone());
                found.push(head);
            }
            rows.status().map_err(|error| self.note(error.into()))?;
            if start.partition + 1 >= self.partitioning.each() {
                return Ok((found, None));
            }
            start = WaitingStart { partition: start.partition + 1, thread: None };
        }
    }

    /// Up to which revision of the group's settings nothing is missing in what waits for it.
    pub fn waiting_complete(&self, tenant: &str, group: &str) -> Result<Option<[u8; 16]>, StoreError> {
        self.get(WAITING, &keys::joined(self.partition_of_groups(tenant), &[tenant, group]))
    }
}

fn paused_prefix(partition: Partition, tenant: &str, group: &str, group_id: &[u8; 16]) -> Vec<u8> {
    [&keys::prefix(partition, &[tenant, group])[..], group_id].concat()
}

fn waiting_key(partition: Partition, tenant: &str, group: &str, thread: &str, seq: u64) -> Vec<u8> {
    let mut key = keys::prefix(partition, &[tenant, group, thread]);
    key.extend_from_slice(&seq.to_be_bytes());
    key
}

/// Thread and seq at the end of a key.
pub(super) fn split_waiting(rest: &[u8]) -> Option<(String, u64)> {
    let (name, seq) = rest.split_last_chunk::<8>()?;
    let name = name.strip_suffix(&[0])?;
    Some((String::from_utf8_lossy(name).into_owned(), u64::from_be_bytes(*seq)))
}

impl Batch<'_> {
    pub fn put_group(&mut self, tenant: &str, group: &str, row: &GroupRow) {
        self.put(GROUPS, &keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]), row);
        self.work.push(WorkChange::Group { tenant: tenant.to_owned(), group: group.to_owned() });
    }

    /// Deletes a group, and what waits for it.
    pub fn delete_group(&mut self, tenant: &str, group: &str) {
        self.delete(GROUPS, &keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]));
        self.delete(WAITING, &keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]));
        for partition in self.store.partitions() {
            let prefix = keys::prefix(partition, &[tenant, group]);
            self.delete_range(WAITING, &prefix, &keys::after(prefix.clone()));
        }
        self.work.push(WorkChange::Group { tenant: tenant.to_owned(), group: group.to_owned() });
    }

    /// Writes how far a group is with a thread, and what it was before; the group is done with `past` more events.
    pub fn put_work(&mut self, (tenant, thread, group): (&str, &str, &str), was: &WorkRow, row: &WorkRow, past: usize) {
        self.put(WORK, &keys::joined(self.store.partition(tenant, thread), &[tenant, thread, group]), row);
        let leases = |row: &WorkRow| row.leases.len() as i64;
        let before = if was.group_id == row.group_id { leases(was) } else { 0 };
        self.work.push(WorkChange::Work {
            tenant: tenant.into(),
            group: group.into(),
            thread: thread.into(),
            group_id: row.group_id,
            events: -(past as i64),
            in_flight: leases(row) - before,
            now: row.simple(),
        });
    }

    /// A group gives out no work of a thread since this time; or it does.
    pub fn put_paused(
        &mut self,
        (tenant, thread, group): (&str, &str, &str),
        group_id: &[u8; 16],
        paused_at: Option<u64>,
    ) {
        let prefix = paused_prefix(self.store.partition(tenant, thread), tenant, group, group_id);
        let key = [&prefix[..], thread.as_bytes()].concat();
        match paused_at {
            Some(at) => self.put(PAUSED_THREADS, &key, &at),
            None => self.delete(PAUSED_THREADS, &key),
        }
    }

    /// A user has a lease of the group's on the thread's work, until then; or none.
    pub fn put_worker(&mut self, (tenant, thread, group): (&str, &str, &str), user: &str, until: Option<u64>) {
        let key = keys::joined(self.store.partition(tenant, thread), &[tenant, thread, user, group]);
        match until {
            Some(until) => self.put(WORKERS, &key, &until),
            None => self.delete(WORKERS, &key),
        }
    }

    pub fn put_waiting(&mut self, tenant: &str, group: &str, thread: &str, seq: u64, row: &WaitingRow) {
        self.put_found_waiting(tenant, group, thread, seq, row);
        self.work.push(WorkChange::Waiting { tenant: tenant.into(), group: group.into(), thread: thread.into() });
    }

    /// An event from before the group was known.
    pub fn put_found_waiting(&mut self, tenant: &str, group: &str, thread: &str, seq: u64, row: &WaitingRow) {
        let partition = self.store.partition(tenant, thread);
        self.put(WAITING, &waiting_key(partition, tenant, group, thread, seq), row);
    }

    pub fn delete_waiting(&mut self, tenant: &str, group: &str, thread: &str, seq: u64) {
        let partition = self.store.partition(tenant, thread);
        self.delete(WAITING, &waiting_key(partition, tenant, group, thread, seq));
    }

    /// What waits for the group is complete for this revision of its settings.
    pub fn put_waiting_complete(&mut self, tenant: &str, group: &str, revision: [u8; 16]) {
        let key = keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]);
        self.put(WAITING, &key, &revision);
    }
}
