//! Members of threads, in both directions, and what subscriptions of a user begin with.

use bincode::{Decode, Encode};
use rocksdb::ReadOptions;

use super::catalogue::{MEMBERS, MEMBERSHIPS};
use super::receipts::ReceiptRow;
use super::{Batch, Store, StoreError, keys};

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemberRow {
    /// The seq of the event that made the user a member.
    pub since: u64,
}

/// A thread as a subscription to it begins.
#[derive(Debug, Clone)]
pub struct JoinedThread {
    pub thread: String,
    pub head: u64,
    /// The seq of the event that made the user a member.
    pub since: u64,
    /// The receipt of the durable subscription that is asked for.
    pub receipt: Option<ReceiptRow>,
}

impl Store {
    pub fn is_member(&self, tenant: &str, thread: &str, user: &str) -> Result<bool, StoreError> {
        Ok(self.db.get_pinned_cf(&self.family(MEMBERS), keys::joined(&[tenant, thread, user]))?.is_some())
    }

    /// The user's membership, with its beginning.
    pub fn member(&self, tenant: &str, thread: &str, user: &str) -> Result<Option<MemberRow>, StoreError> {
        self.get(MEMBERS, &keys::joined(&[tenant, thread, user]))
    }

    /// The thread's members, in the order of their names.
    pub fn members(&self, tenant: &str, thread: &str) -> Result<Vec<String>, StoreError> {
        self.names_under(MEMBERS, keys::prefix(&[tenant, thread]))
    }

    /// The threads a user is a member of, in the order of their ids.
    pub fn threads_of(&self, tenant: &str, user: &str) -> Result<Vec<String>, StoreError> {
        self.names_under(MEMBERSHIPS, keys::prefix(&[tenant, user]))
    }

    /// The user's threads, as subscriptions to them begin; with the receipts of the durable subscription `name`.
    pub fn joined_threads(
        &self,
        tenant: &str,
        user: &str,
        name: Option<&str>,
    ) -> Result<Vec<JoinedThread>, StoreError> {
        let mut joined = Vec::new();
        for thread in self.threads_of(tenant, user)? {
            let receipt = match name {
                Some(name) => self.receipt(tenant, &thread, user, name)?,
                None => None,
            };
            let since = self.member(tenant, &thread, user)?.map_or(1, |member| member.since);
            joined.push(JoinedThread { head: self.head(tenant, &thread)?, since, receipt, thread });
        }
        Ok(joined)
    }

    /// Whether two users are members of one thread. Each of the two lists is walked no further than the other has threads.
    pub fn share_a_thread(&self, tenant: &str, one: &str, other: &str) -> Result<bool, StoreError> {
        let prefixes = [keys::prefix(&[tenant, one]), keys::prefix(&[tenant, other])];
        let mut lists = prefixes.each_ref().map(|prefix| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(keys::after(prefix.clone()));
            self.db.raw_iterator_cf_opt(&self.family(MEMBERSHIPS), options)
        });
        let mut thread = Vec::new();
        // In turn, each list is moved to the other's thread or to the first one after it.
        for turn in (0..2).cycle() {
            lists[turn].seek([&prefixes[turn][..], &thread].concat());
            let Some(key) = lists[turn].key() else { break };
            let found = &key[prefixes[turn].len()..];
            if found == thread {
                return Ok(true);
            }
            thread = found.to_vec();
        }
        lists.iter().try_for_each(|list| list.status())?;
        Ok(false)
    }
}

impl Batch<'_> {
    pub fn put_member(&mut self, tenant: &str, thread: &str, user: &str, row: &MemberRow) {
        self.put(MEMBERS, &keys::joined(&[tenant, thread, user]), row);
        self.put_empty(MEMBERSHIPS, &keys::joined(&[tenant, user, thread]));
    }

    pub fn delete_member(&mut self, tenant: &str, thread: &str, user: &str) {
        self.delete(MEMBERS, &keys::joined(&[tenant, thread, user]));
        self.delete(MEMBERSHIPS, &keys::joined(&[tenant, user, thread]));
    }
}
