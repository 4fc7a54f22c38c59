//! Threads: how far each has come.

use bincode::{Decode, Encode};

use super::activity::ThreadActivity;
use super::catalogue::THREADS;
use super::merged::Span;
use super::{Batch, Store, StoreError, keys};
use crate::protocol::event::Priority;

/// A thread as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ThreadRow {
    /// The newest seq; 0 before the first event.
    pub head: u64,
    /// The head's link of the hash chain.
    pub hash: [u8; 32],
    pub created_at: u64,
    pub last_at: u64,
    pub title: Option<String>,
    /// For each class of priority the newest seq: shows which classes have events after a cursor.
    pub newest: [u64; Priority::CLASSES],
    /// Messages that are being written in deltas, and the bytes of their texts.
    pub writing: u32,
    pub writing_bytes: u64,
    /// Messages that were ever begun in deltas: the number of the next one.
    pub messages: u64,
    /// The number of the oldest that is still being written, or of the next one: whoever looks for them need not pass over
    /// those that were closed before.
    pub oldest_open: u64,
    /// Runs that have not ended.
    pub open_runs: u32,
}

impl ThreadRow {
    /// The highest class among the events after `cursor`.
    pub fn class_after(&self, cursor: u64) -> Option<usize> {
        self.newest.iter().position(|newest| *newest > cursor)
    }
}

impl Store {
    pub fn thread(&self, tenant: &str, thread: &str) -> Result<Option<ThreadRow>, StoreError> {
        self.get(THREADS, &keys::joined(self.partition(tenant, thread), &[tenant, thread]))
    }

    /// The thread that a record's key (`tenant/thread`) is about.
    pub fn thread_by_key(&self, key: &str) -> Result<Option<ThreadRow>, StoreError> {
        let Some((tenant, thread)) = key.split_once('/') else { return Ok(None) };
        self.thread(tenant, thread)
    }

    /// The thread's newest seq, 0 if there is no such thread.
    pub fn head(&self, tenant: &str, thread: &str) -> Result<u64, StoreError> {
        Ok(self.thread(tenant, thread)?.map_or(0, |row| row.head))
    }
}

impl Store {
    /// Threads of the tenant with ids after `after`, in their order, with their rows; those that exist by their name are
    /// left out.
    pub fn threads_after(
        &self,
        tenant: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, ThreadRow)>, StoreError> {
        // Reserved ids begin with `@`, between the digits and the letters that others begin with. A tenant may have very many.
        let from = after.map_or(Vec::new(), |after| [after.as_bytes(), &[0]].concat());
        let ranges = [(from.clone(), Some(&b"@"[..])), (from.max(b"A".to_vec()), None)];

        let mut threads = Vec::new();
        for (from, to) in ranges {
            let prefix = |partition| keys::prefix(partition, &[tenant]);
            for row in self.merged(THREADS, prefix, Span { from: &from, to }) {
                if threads.len() == limit {
                    return Ok(threads);
                }
                let row = row?;
                let thread = String::from_utf8_lossy(&row.rest).into_owned();
                threads.push((thread, self.decoded(THREADS, &row.value)?));
            }
        }
        Ok(threads)
    }
}

impl Batch<'_> {
    pub fn put_thread(&mut self, tenant: &str, thread: &str, row: &ThreadRow) {
        self.put(THREADS, &keys::joined(self.store.partition(tenant, thread), &[tenant, thread]), row);
        let key = keys::in_tenant(tenant, thread);
        self.threads.push(ThreadActivity { key, last_at: row.last_at, open_runs: row.open_runs });
    }
}
