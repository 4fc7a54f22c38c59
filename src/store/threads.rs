//! Threads: how far each has come.

use bincode::{Decode, Encode};

use super::catalogue::THREADS;
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
}

impl ThreadRow {
    /// The highest class among the events after `cursor`.
    pub fn class_after(&self, cursor: u64) -> Option<usize> {
        self.newest.iter().position(|newest| *newest > cursor)
    }
}

impl Store {
    pub fn thread(&self, tenant: &str, thread: &str) -> Result<Option<ThreadRow>, StoreError> {
        self.get(THREADS, &keys::joined(&[tenant, thread]))
    }

    /// The thread's newest seq, 0 if there is no such thread.
    pub fn head(&self, tenant: &str, thread: &str) -> Result<u64, StoreError> {
        Ok(self.thread(tenant, thread)?.map_or(0, |row| row.head))
    }
}

impl Batch<'_> {
    pub fn put_thread(&mut self, tenant: &str, thread: &str, row: &ThreadRow) {
        self.put(THREADS, &keys::joined(&[tenant, thread]), row);
    }
}
