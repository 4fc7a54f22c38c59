//! Work queues: groups, and for each thread how far a group is with it.

use bincode::{Decode, Encode};

use super::catalogue::{GROUPS, WORK};
use super::dead_letters::TryRow;
use super::{Batch, Store, StoreError, keys};

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
    pub paused: bool,
}

/// How far a group is with a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct WorkRow {
    /// The group's id: what another group of its name has done is not its own.
    pub group_id: [u8; 16],
    /// Everything up to this seq is done, a dead letter, or no work.
    pub cursor: u64,
    pub lease: Option<LeaseRow>,
    /// What was tried and is to be tried again; nothing else in the thread is, before that.
    pub failed: Option<FailedRow>,
}

/// Who works on an event, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct LeaseRow {
    pub id: [u8; 16],
    pub seq: u64,
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

    /// How far a group is with a thread, if it has done anything there.
    pub fn work(&self, tenant: &str, thread: &str, group: &str) -> Result<Option<WorkRow>, StoreError> {
        self.get(WORK, &keys::joined(self.partition(tenant, thread), &[tenant, thread, group]))
    }
}

impl Batch<'_> {
    pub fn put_group(&mut self, tenant: &str, group: &str, row: &GroupRow) {
        self.put(GROUPS, &keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]), row);
    }

    pub fn delete_group(&mut self, tenant: &str, group: &str) {
        self.delete(GROUPS, &keys::joined(self.store.partition_of_groups(tenant), &[tenant, group]));
    }

    pub fn put_work(&mut self, tenant: &str, thread: &str, group: &str, row: &WorkRow) {
        self.put(WORK, &keys::joined(self.store.partition(tenant, thread), &[tenant, thread, group]), row);
    }
}
