//! Members of threads, in both directions, and what subscriptions of a user begin with.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use rocksdb::ReadOptions;

use super::catalogue::{MEMBERS, MEMBERSHIPS};
use super::contacts::MembershipChange;
use super::merged::Span;
use super::receipts::ReceiptRow;
use super::{Batch, Store, StoreError, keys};

/// Steps in which two users' lists of threads are walked at once, on a worker of the runtime.
const WALK: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemberRow {
    /// The seq of the event that made the user a member.
    pub since: u64,
}

/// A thread as a subscription to it begins: one of the user's, or of the whole tenant.
#[derive(Debug, Clone)]
pub struct JoinedThread {
    pub thread: String,
    pub head: u64,
    /// The seq of the event from which on it is one of those that are followed: the one that made the user a member.
    pub since: u64,
    /// The receipt of the durable subscription that is asked for.
    pub receipt: Option<ReceiptRow>,
}

impl Store {
    pub fn is_member(&self, tenant: &str, thread: &str, user: &str) -> Result<bool, StoreError> {
        let look_up = || {
            let found = self.db.get_pinned_cf(&self.family(MEMBERS), self.member_key(tenant, thread, user));
            found.map(|row| row.is_some()).map_err(|error| self.note(error.into()))
        };
        self.known_members.is_member(self.known_members.hash(tenant, thread, user), look_up)
    }

    fn member_key(&self, tenant: &str, thread: &str, user: &str) -> Vec<u8> {
        keys::joined(self.partition(tenant, thread), &[tenant, thread, user])
    }

    /// The user's membership, with its beginning.
    pub fn member(&self, tenant: &str, thread: &str, user: &str) -> Result<Option<MemberRow>, StoreError> {
        self.get(MEMBERS, &self.member_key(tenant, thread, user))
    }

    /// The thread's members, in the order of their names.
    pub fn members(&self, tenant: &str, thread: &str) -> impl Iterator<Item = Result<String, StoreError>> {
        self.names_under(MEMBERS, keys::prefix(self.partition(tenant, thread), &[tenant, thread]))
    }

    /// The threads a user is a member of, in the order of their ids.
    pub fn threads_of(&self, tenant: &str, user: &str) -> impl Iterator<Item = Result<String, StoreError>> {
        let prefix = |partition| keys::prefix(partition, &[tenant, user]);
        let rows = self.merged(MEMBERSHIPS, prefix, Span::ALL);
        rows.map(|row| Ok(String::from_utf8_lossy(&row?.rest).into_owned()))
    }

    /// The user's threads, as subscriptions to them begin; with the receipts of the durable subscription `name`.
    pub fn joined_threads(
        &self,
        tenant: &str,
        user: &str,
        name: Option<&str>,
    ) -> Result<Vec<JoinedThread>, StoreError> {
        let begins = self.begins_of(tenant, user, name)?;
        let mut joined = Vec::new();
        for thread in self.threads_of(tenant, user) {
            let thread = thread?;
            let receipt = self.receipt_of_all((tenant, user), &thread, name, &begins)?;
            let since = self.member(tenant, &thread, user)?.map_or(1, |member| member.since);
            joined.push(JoinedThread { head: self.head(tenant, &thread)?, since, receipt, thread });
        }
        Ok(joined)
    }

    /// The same for all threads of the tenant, but for those that exist by their name; at most `limit`.
    pub fn tenant_threads(
        &self,
        tenant: &str,
        user: &str,
        name: Option<&str>,
        limit: usize,
    ) -> Result<Vec<JoinedThread>, StoreError> {
        let begins = self.begins_of(tenant, user, name)?;
        let found = self.threads_after(tenant, None, limit)?.into_iter().map(|(thread, row)| {
            let receipt = self.receipt_of_all((tenant, user), &thread, name, &begins)?;
            // All of a thread is the tenant's, whenever its members have come.
            Ok(JoinedThread { head: row.head, since: 1, receipt, thread })
        });
        found.collect()
    }

    /// What a durable subscription to all threads began with, if it has a name.
    fn begins_of(&self, tenant: &str, user: &str, name: Option<&str>) -> Result<BTreeMap<String, u64>, StoreError> {
        name.map_or(Ok(BTreeMap::new()), |name| self.begins(tenant, user, name))
    }

    /// The receipt of a durable subscription to all threads in one of them, or where it began there.
    fn receipt_of_all(
        &self,
        (tenant, user): (&str, &str),
        thread: &str,
        name: Option<&str>,
        begins: &BTreeMap<String, u64>,
    ) -> Result<Option<ReceiptRow>, StoreError> {
        let Some(name) = name else { return Ok(None) };
        let begin = |seq: &u64| ReceiptRow { place: *seq, ..ReceiptRow::default() };
        Ok(self.receipt(tenant, thread, user, name)?.or_else(|| begins.get(thread).map(begin)))
    }

    /// Whether two users are members of one thread, if that can be said at once: the threads of both are known, or one of
    /// them has few.
    pub fn share_a_thread(&self, tenant: &str, one: &str, other: &str) -> Result<Option<bool>, StoreError> {
        let users = [one, other].map(|user| keys::in_tenant(tenant, user));
        match self.contacts.share(&users[0], &users[1]) {
            Some(share) => Ok(Some(share)),
            None => self.walk(tenant, one, other, WALK),
        }
    }

    /// The same for any two users, and from then on at once. Reads the threads of both: for threads that may block.
    pub fn look_up_shared_thread(&self, tenant: &str, one: &str, other: &str) -> Result<bool, StoreError> {
        for user in [one, other] {
            self.contacts.threads(&keys::in_tenant(tenant, user), || self.threads_of(tenant, user).collect())?;
        }
        // Asked of the store only if both lists together are too long to be kept.
        match self.share_a_thread(tenant, one, other)? {
            Some(share) => Ok(share),
            None => Ok(self.walk(tenant, one, other, usize::MAX)?.unwrap_or(false)),
        }
    }

    /// Walks the lists of both users' threads, each no further than the other has threads, and at most `steps` in all.
    fn walk(&self, tenant: &str, one: &str, other: &str, steps: usize) -> Result<Option<bool>, StoreError> {
        let mut left = steps;
        for partition in self.partitions() {
            let prefixes = [one, other].map(|user| keys::prefix(partition, &[tenant, user]));
            match self.walk_partition(&prefixes, &mut left)? {
                Some(false) => {}
                found => return Ok(found),
            }
        }
        Ok(Some(false))
    }

    /// Walks the lists of both users' threads of one partition, by the prefixes of their rows.
    fn walk_partition(&self, prefixes: &[Vec<u8>; 2], left: &mut usize) -> Result<Option<bool>, StoreError> {
        let list_of = |prefix: &Vec<u8>| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(keys::after(prefix.clone()));
            self.db.raw_iterator_cf_opt(&self.family(MEMBERSHIPS), options)
        };
        // Where the first user has no thread, as in most partitions, the other's list is not begun.
        let mut lists = [None, None];
        let mut thread = Vec::new();
        // In turn, each list is moved to the other's thread or to the first one after it.
        for turn in (0..2).cycle() {
            if *left == 0 {
                break;
            }
            *left -= 1;
            let list = lists[turn].get_or_insert_with(|| list_of(&prefixes[turn]));
            list.seek([&prefixes[turn][..], &thread].concat());
            let Some(key) = list.key() else {
                list.status().map_err(|error| self.note(error.into()))?;
                return Ok(Some(false));
            };
            let found = &key[prefixes[turn].len()..];
            if found == thread {
                return Ok(Some(true));
            }
            thread = found.to_vec();
        }
        Ok(None)
    }
}

impl Batch<'_> {
    pub fn put_member(&mut self, tenant: &str, thread: &str, user: &str, row: &MemberRow) {
        let partition = self.store.partition(tenant, thread);
        self.put(MEMBERS, &keys::joined(partition, &[tenant, thread, user]), row);
        self.put_empty(MEMBERSHIPS, &keys::joined(partition, &[tenant, user, thread]));
        self.membership(tenant, thread, user, true);
    }

    pub fn delete_member(&mut self, tenant: &str, thread: &str, user: &str) {
        let partition = self.store.partition(tenant, thread);
        self.delete(MEMBERS, &keys::joined(partition, &[tenant, thread, user]));
        self.delete(MEMBERSHIPS, &keys::joined(partition, &[tenant, user, thread]));
        self.membership(tenant, thread, user, false);
        self.removed_members.push(self.store.known_members.hash(tenant, thread, user));
    }

    fn membership(&mut self, tenant: &str, thread: &str, user: &str, is_member: bool) {
        let user = keys::in_tenant(tenant, user);
        self.memberships.push(MembershipChange { user, thread: thread.to_owned(), is_member });
    }
}
