//! The threads that the projector keeps in memory: those it has worked on most recently, and what has changed of them since
//! the last commit.

use std::sync::Arc;

use lru::LruCache;

use super::thread::Thread;
use crate::store::{Batch, StoreError};

/// What is kept: each thread and each membership counts as one, about 400 and 100 bytes. Beyond that, what was used least
/// recently is read from the store again.
const KEPT: usize = 100_000;

pub(super) struct CachedThreads {
    /// By the record's key, `tenant/thread`.
    threads: LruCache<String, Thread>,
    /// What counts against that.
    size: usize,
    /// What of [`KEPT`] it may have.
    kept: usize,
    /// Keys of those that the next commit writes, each once.
    changed: Vec<Arc<str>>,
}

impl CachedThreads {
    /// One of so many, which share what may be kept.
    pub(super) fn new(of: usize) -> CachedThreads {
        // Between two commits nothing may go, since the store does not have what changed. So the bound is kept here.
        CachedThreads { threads: LruCache::unbounded(), size: 0, kept: KEPT / of.max(1), changed: Vec::new() }
    }

    /// What `work` makes of the thread. One that is not there is made by `read`.
    pub(super) fn with<T>(
        &mut self,
        key: &str,
        read: impl FnOnce() -> Result<Thread, StoreError>,
        work: impl FnOnce(&mut Thread) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let size = &mut self.size;
        let read_and_count = || read().inspect(|thread| *size += thread.size());
        let thread = self.threads.try_get_or_insert_mut_ref(key, read_and_count)?;

        let (size_before, changed_before) = (thread.size(), thread.changed);
        let worked = work(thread);
        self.size = self.size - size_before + thread.size();
        if thread.changed && !changed_before {
            self.changed.push(thread.key.clone());
        }
        worked
    }

    /// Writes the threads that have changed.
    pub(super) fn write(&mut self, rows: &mut Batch<'_>) {
        for key in self.changed.drain(..) {
            let Some(thread) = self.threads.peek_mut(&*key) else { continue };
            thread.changed = false;
            if let Some((tenant, id)) = key.split_once('/') {
                rows.put_thread(tenant, id, &thread.row);
            }
        }
    }

    /// Forgets what is too much, once everything is in the store.
    pub(super) fn shrink(&mut self) {
        while self.size > self.kept {
            let Some((_, thread)) = self.threads.pop_lru() else { return };
            self.size -= thread.size();
        }
    }

    /// Forgets everything: what it shows was not committed.
    pub(super) fn clear(&mut self) {
        self.threads.clear();
        self.changed.clear();
        self.size = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, ThreadRow};

    fn key(n: usize) -> String {
        format!("acme/t{n}")
    }

    /// Works on a thread; says whether it had to be read.
    fn touch(threads: &mut CachedThreads, n: usize, head: Option<u64>) -> bool {
        let mut was_read = false;
        let read = || {
            was_read = true;
            Ok(Thread::new(&key(n), None, 1))
        };
        let work = |thread: &mut Thread| {
            if let Some(head) = head {
                thread.row.head = head;
                thread.changed = true;
            }
            Ok(())
        };
        threads.with(&key(n), read, work).expect("nothing fails");
        was_read
    }

    #[test]
    fn what_was_used_least_recently_goes_and_only_after_the_commit() {
        let mut threads = CachedThreads::new(1);
        for n in 0..KEPT + 10 {
            assert!(touch(&mut threads, n, None));
        }
        assert!(!touch(&mut threads, 3, None), "a batch may work on more");
        threads.shrink();
        assert_eq!(threads.size, KEPT);
        assert!(!touch(&mut threads, 3, None), "it was used");
        assert!(!touch(&mut threads, 11, None));
        assert!(touch(&mut threads, 4, None));
    }

    #[test]
    fn each_commit_writes_what_has_changed_since_the_last() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let mut threads = CachedThreads::new(1);
        let commit = |threads: &mut CachedThreads| {
            let mut rows = store.batch();
            let empty = rows.bytes();
            threads.write(&mut rows);
            let is_empty = rows.bytes() == empty;
            store.commit(rows).expect("it commits");
            is_empty
        };
        touch(&mut threads, 1, Some(1));
        touch(&mut threads, 2, None);
        touch(&mut threads, 1, Some(2));
        assert!(!commit(&mut threads));
        assert!(commit(&mut threads), "nothing since then");
        touch(&mut threads, 1, Some(3));
        threads.clear();
        assert!(commit(&mut threads), "what was not committed is forgotten");
        let head =
            |n: usize| store.thread("acme", &format!("t{n}")).expect("it is read").map(|row: ThreadRow| row.head);
        assert_eq!((head(1), head(2)), (Some(2), None));
    }
}
