//! Receipts: how far users and their durable subscriptions have come in threads.

use bincode::{Decode, Encode};
use rocksdb::{Direction, IteratorMode, ReadOptions};

use std::collections::BTreeMap;

use super::catalogue::{RECEIPTS, SUBSCRIPTION_BEGINS, SUBSCRIPTION_NAMES};
use super::{Batch, Store, StoreError, keys};

/// How far a user has come in a thread, under the name of a durable subscription.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptRow {
    /// The subscription goes on after this seq: it was acknowledged, given up as a dead letter, or where it began.
    pub place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub acked: u64,
    /// The newest seq that was sent and not acknowledged.
    pub sent: u64,
    /// How often the first event after `place` was sent.
    pub attempts: u32,
    /// Milliseconds.
    pub at: u64,
}

/// Threads in one row of what a durable subscription to all threads began with.
const BEGINS_PER_ROW: usize = 512;
/// Records in which a durable subscription to all threads says where it began.
pub const MAX_PARTS: u32 = 4;

/// Threads, in order, and the seq after which a durable subscription to all threads began in each.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct BeginsRow {
    threads: Vec<(String, u64)>,
}

impl Store {
    /// Where the durable subscription goes on in the thread: at its receipt, or where the one to all threads began.
    pub fn receipt_or_begin(
        &self,
        tenant: &str,
        thread: &str,
        user: &str,
        name: &str,
    ) -> Result<Option<ReceiptRow>, StoreError> {
        if let Some(row) = self.receipt(tenant, thread, user, name)? {
            return Ok(Some(row));
        }
        let partition = self.partition_of_user(tenant, user);
        for part in 0..MAX_PARTS {
            if let Some(place) = self.begin_in_part(&keys::begins(partition, tenant, user, name, part), thread)? {
                return Ok(Some(ReceiptRow { place, ..ReceiptRow::default() }));
            }
        }
        Ok(None)
    }

    /// Looks in the one row of a part that may have the thread: the last that begins with it or before it.
    fn begin_in_part(&self, part: &[u8], thread: &str) -> Result<Option<u64>, StoreError> {
        let key = [part, thread.as_bytes()].concat();
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(part);
        let from = IteratorMode::From(&key, Direction::Reverse);
        let mut rows = self.db.iterator_cf_opt(&self.family(SUBSCRIPTION_BEGINS), options, from);
        let Some(row) = rows.next().transpose().map_err(|error| self.note(error.into()))? else { return Ok(None) };

        let row: BeginsRow = self.decoded(SUBSCRIPTION_BEGINS, &row.1)?;
        let at = row.threads.binary_search_by(|(found, _)| found.as_str().cmp(thread));
        Ok(at.ok().map(|at| row.threads[at].1))
    }

    /// Where the durable subscription to all threads began, thread by thread.
    pub fn begins(&self, tenant: &str, user: &str, name: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        let mut found = BTreeMap::new();
        let partition = self.partition_of_user(tenant, user);
        for row in self.under(SUBSCRIPTION_BEGINS, keys::prefix(partition, &[tenant, user, name])) {
            let row: BeginsRow = self.decoded(SUBSCRIPTION_BEGINS, &row?.1)?;
            found.extend(row.threads);
        }
        Ok(found)
    }

    /// Whether the user has a durable subscription of this name, and whether there is room for one more than `most`.
    pub fn has_room_for_name(&self, tenant: &str, user: &str, name: &str, most: usize) -> Result<bool, StoreError> {
        let partition = self.partition_of_user(tenant, user);
        let known = keys::joined(partition, &[tenant, user, name]);
        if self.db.get_pinned_cf(&self.family(SUBSCRIPTION_NAMES), known)?.is_some() {
            return Ok(true);
        }
        let mut names = 0;
        for row in self.under(SUBSCRIPTION_NAMES, keys::prefix(partition, &[tenant, user])).take(most) {
            row?;
            names += 1;
        }
        Ok(names < most)
    }

    /// Receipts are where their thread is, though their records are in partitions of their own topic: the thread's are read
    /// together, and no two of these partitions write one row.
    pub fn receipt_key(&self, tenant: &str, thread: &str, user: &str, name: &str) -> Vec<u8> {
        keys::joined(self.partition(tenant, thread), &[tenant, thread, user, name])
    }

    pub fn receipt(
        &self,
        tenant: &str,
        thread: &str,
        user: &str,
        name: &str,
    ) -> Result<Option<ReceiptRow>, StoreError> {
        self.get(RECEIPTS, &self.receipt_key(tenant, thread, user, name))
    }

    /// The newest seq that the user has acknowledged in the thread, under any name.
    pub fn acked(&self, tenant: &str, thread: &str, user: &str) -> Result<u64, StoreError> {
        let mut newest = 0;
        let prefix = keys::prefix(self.partition(tenant, thread), &[tenant, thread, user]);
        for row in self.rows_under::<ReceiptRow>(RECEIPTS, prefix) {
            newest = newest.max(row?.1.acked);
        }
        Ok(newest)
    }

    /// All receipts of a thread: user, name and row.
    pub fn receipts(
        &self,
        tenant: &str,
        thread: &str,
    ) -> impl Iterator<Item = Result<(String, String, ReceiptRow), StoreError>> {
        self.rows_under(RECEIPTS, keys::prefix(self.partition(tenant, thread), &[tenant, thread])).map(|row| {
            let (rest, row) = row?;
            let (user, name) = rest.split_once('\0').unwrap_or((&rest, ""));
            Ok((user.to_owned(), name.to_owned(), row))
        })
    }
}

impl Batch<'_> {
    /// Receipts of several partitions may put one name: they put the same, and nobody deletes it.
    pub fn put_subscription_name(&mut self, tenant: &str, user: &str, name: &str) {
        let partition = self.store.partition_of_user(tenant, user);
        self.put_empty(SUBSCRIPTION_NAMES, &keys::joined(partition, &[tenant, user, name]));
    }

    /// Replaces what was there of this part.
    pub fn put_begins(&mut self, tenant: &str, user: &str, name: &str, part: u32, begins: &BTreeMap<String, u64>) {
        let partition = self.store.partition_of_user(tenant, user);
        let prefix = keys::begins(partition, tenant, user, name, part);
        self.delete_range(SUBSCRIPTION_BEGINS, &prefix, &keys::begins(partition, tenant, user, name, part + 1));
        let threads: Vec<(String, u64)> = begins.iter().map(|(thread, seq)| (thread.clone(), *seq)).collect();
        for threads in threads.chunks(BEGINS_PER_ROW) {
            let key = [&prefix[..], threads[0].0.as_bytes()].concat();
            self.put(SUBSCRIPTION_BEGINS, &key, &BeginsRow { threads: threads.to_vec() });
        }
    }

    pub fn put_receipt(&mut self, tenant: &str, thread: &str, user: &str, name: &str, row: &ReceiptRow) {
        self.put(RECEIPTS, &self.store.receipt_key(tenant, thread, user, name), row);
    }
}
