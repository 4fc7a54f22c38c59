//! The projections: what is derived from the log, in RocksDB. Disposable: deleted, they come back from the log.
//!
//! Invariants:
//! - one writer, the projector; everybody else reads;
//! - rows and the position they were made from are written in one batch and flushed together (no write-ahead log, atomic
//!   flush): after a crash the store is older, never torn;
//! - each row is framed ([`crate::codec`]) and its family listed in [`catalogue`].
//!
//! All calls block. A lookup takes microseconds; what walks a range belongs on a blocking thread.

pub mod catalogue;
pub mod dead_letters;
pub mod keys;
pub mod messages;
pub mod runs;

use std::path::Path;
use std::sync::Arc;

use bincode::{BorrowDecode, Decode, Encode};
use rocksdb::{BoundColumnFamily, DB, Direction, IteratorMode, ReadOptions, WriteBatch, WriteOptions};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::codec;
use crate::codec::CodecError;
use crate::disk;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::Priority;
use catalogue::{EVENTS, KEY_TIMES, KEYS, MEMBERS, MEMBERSHIPS, META, RECEIPTS, REVOCATIONS, THREADS};

/// The version of the rows below; a store of another version is rebuilt.
const SCHEMA: u8 = 3;

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
    /// For each class of priority the newest seq: tells what waits behind a cursor.
    pub newest: [u64; Priority::CLASSES],
    /// Messages that are being written in pieces, and the bytes of their texts.
    pub writing: u32,
    pub writing_bytes: u64,
}

impl ThreadRow {
    /// The highest class among the events behind `cursor`.
    pub fn class_behind(&self, cursor: u64) -> Option<usize> {
        self.newest.iter().position(|newest| *newest > cursor)
    }
}

/// How far a user has come in a thread, under the name of a durable subscription.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptRow {
    /// The seq behind which the subscription goes on: acknowledged, begun at, or given up as dead letters.
    pub place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub acked: u64,
    /// The newest seq that was sent and not acknowledged.
    pub sent: u64,
    /// How often the event behind `place` was sent.
    pub attempts: u32,
    /// Milliseconds.
    pub at: u64,
}

/// Since when a user's tokens are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RevocationRow {
    /// Tokens issued up to then are refused; milliseconds.
    pub until: u64,
}

/// A thread as a subscription to it begins.
#[derive(Debug, Clone)]
pub struct JoinedThread {
    pub thread: String,
    pub head: u64,
    /// The seq of the event that made the user a member.
    pub since: u64,
    /// The place of the durable subscription that is asked for.
    pub receipt: Option<ReceiptRow>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MemberRow {
    /// The seq of the event that made the user a member.
    pub since: u64,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct EventRow<'a> {
    pub kind: &'a str,
    /// The class of its priority.
    pub class: u8,
    pub hash: [u8; 32],
    /// The frame as every reader gets it.
    pub frame: &'a str,
}

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeyRow {
    pub seq: u64,
    pub event: [u8; 16],
    /// The partition's log time when the key was taken, in milliseconds.
    pub at: u64,
    /// Digest of the content published under the key.
    pub content: [u8; 32],
}

/// How far a partition of the log has been projected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Progress {
    /// The offset to read next.
    pub next: u64,
    /// The highest `at` seen, in milliseconds: the log's own clock.
    pub log_time: u64,
    /// Idempotency keys older than this have been purged.
    pub purged_to: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Identity {
    epoch: String,
    progress: Vec<Progress>,
}

/// An event as the store has it.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    pub seq: u64,
    pub kind: String,
    /// The class of its priority.
    pub class: usize,
    pub frame: Utf8Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store does not answer: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("a row of {family} is damaged (run `weft rebuild`): {source}")]
    Damaged { family: &'static str, source: CodecError },
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        tracing::error!(%error, "the store failed");
        Error::new(Code::Unavailable, "the store does not answer")
    }
}

pub struct Store {
    db: DB,
}

/// Rows that become visible together.
pub struct Batch<'a> {
    store: &'a Store,
    rows: WriteBatch,
}

impl Store {
    /// Opens or creates the store in `path`.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        // RocksDB makes the folder itself; the probe needs it before. What goes wrong here, RocksDB will say.
        drop(std::fs::create_dir_all(path));
        let options = catalogue::database(disk::takes_direct_io(path));
        let db = DB::open_cf_descriptors(&options, path, catalogue::descriptors())?;
        Ok(Store { db })
    }

    /// Opens the store if it was made from the log with this epoch by this version; otherwise begins an empty one there.
    /// Returns how far it has come as well.
    pub fn open_for(path: &Path, epoch: &str, partitions: u32) -> Result<(Store, Vec<Progress>), StoreError> {
        let store = Store::open(path)?;
        match store.identity() {
            Ok(Some(found)) if found.epoch == epoch && found.progress.len() == partitions as usize => {
                return Ok((store, found.progress));
            }
            Ok(None) => {}
            Ok(Some(found)) => {
                tracing::warn!(found.epoch, epoch, "the projections belong to another log: rebuilding them")
            }
            Err(error) => tracing::warn!(%error, "the projections cannot be read by this version: rebuilding them"),
        }
        drop(store);
        Store::destroy(path)?;
        let store = Store::open(path)?;
        let progress = vec![Progress::default(); partitions as usize];
        let mut batch = store.batch();
        batch.put_progress(epoch, &progress);
        store.commit(batch)?;
        Ok((store, progress))
    }

    /// Deletes the store in `path`.
    pub fn destroy(path: &Path) -> Result<(), StoreError> {
        Ok(DB::destroy(&catalogue::database(false), path)?)
    }

    fn family(&self, name: &'static str) -> Arc<BoundColumnFamily<'_>> {
        // Opened with every family of the catalogue in `open`, which fails without one.
        self.db.cf_handle(name).expect("the store was opened with its catalogue")
    }

    fn get<T: for<'a> BorrowDecode<'a, ()>>(&self, family: &'static str, key: &[u8]) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.db.get_pinned_cf(&self.family(family), key)? else {
            return Ok(None);
        };
        decoded(family, &bytes).map(Some)
    }

    fn identity(&self) -> Result<Option<Identity>, StoreError> {
        self.get(META, b"identity")
    }

    /// How far each partition has been projected, if anything has.
    pub fn progress(&self) -> Result<Option<Vec<Progress>>, StoreError> {
        Ok(self.identity()?.map(|identity| identity.progress))
    }

    pub fn thread(&self, tenant: &str, thread: &str) -> Result<Option<ThreadRow>, StoreError> {
        self.get(THREADS, &keys::joined(&[tenant, thread]))
    }

    /// The thread's newest seq, 0 if there is no such thread.
    pub fn head(&self, tenant: &str, thread: &str) -> Result<u64, StoreError> {
        Ok(self.thread(tenant, thread)?.map_or(0, |row| row.head))
    }

    pub fn is_member(&self, tenant: &str, thread: &str, user: &str) -> Result<bool, StoreError> {
        Ok(self.db.get_pinned_cf(&self.family(MEMBERS), keys::joined(&[tenant, thread, user]))?.is_some())
    }

    /// The user's membership, with its beginning.
    pub fn member(&self, tenant: &str, thread: &str, user: &str) -> Result<Option<MemberRow>, StoreError> {
        self.get(MEMBERS, &keys::joined(&[tenant, thread, user]))
    }

    /// Whether two users are members of one thread. Each of the two lists is walked no further than the other has threads.
    pub fn share_a_thread(&self, tenant: &str, one: &str, other: &str) -> Result<bool, StoreError> {
        let prefixes = [keys::prefix(&[tenant, one]), keys::prefix(&[tenant, other])];
        let mut lists = prefixes.each_ref().map(|prefix| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(keys::behind(prefix.clone()));
            self.db.raw_iterator_cf_opt(&self.family(MEMBERSHIPS), options)
        });
        let mut thread = Vec::new();
        // In turn each list is moved to the other's thread, or the first one behind it.
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

    pub fn receipt(
        &self,
        tenant: &str,
        thread: &str,
        user: &str,
        name: &str,
    ) -> Result<Option<ReceiptRow>, StoreError> {
        self.get(RECEIPTS, &keys::joined(&[tenant, thread, user, name]))
    }

    /// The newest seq that the user has acknowledged in the thread, under any name.
    pub fn acked(&self, tenant: &str, thread: &str, user: &str) -> Result<u64, StoreError> {
        let mut rows = self.rows_under(RECEIPTS, keys::prefix(&[tenant, thread, user]));
        rows.try_fold(0, |most, row: Result<(_, ReceiptRow), _>| Ok(most.max(row?.1.acked)))
    }

    /// All receipts of a thread: user, name and row.
    pub fn receipts(&self, tenant: &str, thread: &str) -> Result<Vec<(String, String, ReceiptRow)>, StoreError> {
        let rows = self.rows_under(RECEIPTS, keys::prefix(&[tenant, thread]));
        rows.map(|row| {
            let (rest, row) = row?;
            let (user, name) = rest.split_once('\0').unwrap_or((&rest, ""));
            Ok((user.to_owned(), name.to_owned(), row))
        })
        .collect()
    }

    pub fn revocation(&self, tenant: &str, user: &str) -> Result<Option<RevocationRow>, StoreError> {
        self.get(REVOCATIONS, &keys::joined(&[tenant, user]))
    }

    pub fn key(&self, key: &[u8]) -> Result<Option<KeyRow>, StoreError> {
        self.get(KEYS, key)
    }

    /// The thread's members, in the order of their names.
    pub fn members(&self, tenant: &str, thread: &str) -> Result<Vec<String>, StoreError> {
        self.names_under(MEMBERS, keys::prefix(&[tenant, thread]))
    }

    /// The threads a user is a member of, in the order of their ids.
    pub fn threads_of(&self, tenant: &str, user: &str) -> Result<Vec<String>, StoreError> {
        self.names_under(MEMBERSHIPS, keys::prefix(&[tenant, user]))
    }

    /// The user's threads, as subscriptions to them begin; with the places of the durable subscription `name`.
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

    /// What stands in a family under keys with this prefix, in order: the rest of the key, and the value.
    fn under(
        &self,
        family: &'static str,
        prefix: Vec<u8>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Box<[u8]>), StoreError>> {
        let mut options = ReadOptions::default();
        if !prefix.is_empty() {
            options.set_iterate_upper_bound(keys::behind(prefix.clone()));
        }
        let from = IteratorMode::From(&prefix, Direction::Forward);
        let (rows, begin) = (self.db.iterator_cf_opt(&self.family(family), options, from), prefix.len());
        rows.map(move |row| Ok(row.map(|(key, value)| (key[begin..].to_vec(), value))?))
    }

    /// The same, read: the rest of the key as text, and the row.
    fn rows_under<T: for<'a> BorrowDecode<'a, ()>>(
        &self,
        family: &'static str,
        prefix: Vec<u8>,
    ) -> impl Iterator<Item = Result<(String, T), StoreError>> {
        self.under(family, prefix).map(move |row| {
            let (rest, value) = row?;
            Ok((String::from_utf8_lossy(&rest).into_owned(), decoded(family, &value)?))
        })
    }

    /// The names that keys of a family have behind a prefix.
    fn names_under(&self, family: &'static str, prefix: Vec<u8>) -> Result<Vec<String>, StoreError> {
        self.under(family, prefix).map(|row| Ok(String::from_utf8_lossy(&row?.0).into_owned())).collect()
    }

    /// Events of a thread with seqs in `from..=to`, at most `limit` of them and (but for the first) `bytes` of frames;
    /// newest first if `newest_first`.
    pub fn events(&self, tenant: &str, thread: &str, seqs: EventRange) -> Result<Vec<StoredEvent>, StoreError> {
        let EventRange { from, to, limit, bytes, newest_first } = seqs;
        let mut found = Vec::new();
        if from > to || limit == 0 {
            return Ok(found);
        }
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::event(tenant, thread, from));
        options.set_iterate_upper_bound(match to.checked_add(1) {
            Some(behind) => keys::event(tenant, thread, behind),
            None => keys::behind(keys::prefix(&[tenant, thread])),
        });
        options.set_readahead_size(if limit > 64 { 256 << 10 } else { 0 });
        let mut rows = self.db.raw_iterator_cf_opt(&self.family(EVENTS), options);
        if newest_first {
            rows.seek_to_last()
        } else {
            rows.seek_to_first()
        }
        let mut room = bytes;
        while let Some((key, value)) = rows.item() {
            let row: EventRow = decoded(EVENTS, value)?;
            if found.len() == limit || (row.frame.len() > room && !found.is_empty()) {
                break;
            }
            room = room.saturating_sub(row.frame.len());
            found.push(StoredEvent {
                seq: keys::seq_of(key).unwrap_or(0),
                kind: row.kind.to_owned(),
                class: usize::from(row.class).min(Priority::CLASSES - 1),
                frame: row.frame.into(),
            });
            if newest_first { rows.prev() } else { rows.next() }
        }
        rows.status()?;
        Ok(found)
    }

    /// The newest event's frame.
    pub fn newest(&self, tenant: &str, thread: &str) -> Result<Option<StoredEvent>, StoreError> {
        Ok(self.events(tenant, thread, EventRange { limit: 1, newest_first: true, ..EventRange::all() })?.pop())
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch { store: self, rows: WriteBatch::default() }
    }

    /// Makes a batch visible. Durable with the next flush.
    pub fn commit(&self, batch: Batch<'_>) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        Ok(self.db.write_opt(batch.rows, &options)?)
    }

    /// Makes durable what has been committed, so that the next start reads no more of the log than it must.
    pub fn flush(&self) -> Result<(), StoreError> {
        let families: Vec<_> = catalogue::names().map(|name| self.family(name)).collect();
        Ok(self.db.flush_cfs_opt(&families.iter().collect::<Vec<_>>(), &Default::default())?)
    }

    /// Every row of every family, in order: to compare two stores.
    pub fn rows(&self) -> impl Iterator<Item = Result<StoreRow, StoreError>> + '_ {
        catalogue::names().flat_map(move |family| {
            let rows = self.db.iterator_cf(&self.family(family), IteratorMode::Start);
            rows.map(move |row| Ok(row.map(|(key, value)| (family, key, value))?))
        })
    }

    /// The idempotency keys of a partition that came into the log before `before` (milliseconds), from `from` on.
    fn keys_between(&self, partition: u32, from: u64, before: u64) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::key_time(partition, from, &[]));
        options.set_iterate_upper_bound(keys::key_time(partition, before, &[]));
        let rows = self.db.iterator_cf_opt(&self.family(KEY_TIMES), options, IteratorMode::Start);
        rows.map(|row| Ok(row?.0.into_vec())).collect()
    }
}

fn decoded<'a, T: BorrowDecode<'a, ()>>(family: &'static str, bytes: &'a [u8]) -> Result<T, StoreError> {
    codec::decode(SCHEMA, bytes).map_err(|source| StoreError::Damaged { family, source })
}

/// A family's name, a key and a value.
pub type StoreRow = (&'static str, Box<[u8]>, Box<[u8]>);

/// Which events to read.
#[derive(Debug, Clone, Copy)]
pub struct EventRange {
    pub from: u64,
    pub to: u64,
    pub limit: usize,
    pub bytes: usize,
    pub newest_first: bool,
}

impl EventRange {
    pub fn all() -> EventRange {
        EventRange { from: 1, to: u64::MAX, limit: usize::MAX, bytes: usize::MAX, newest_first: false }
    }
}

impl Batch<'_> {
    fn put<T: Encode>(&mut self, family: &'static str, key: &[u8], row: &T) {
        self.rows.put_cf(&self.store.family(family), key, codec::encode(SCHEMA, row));
    }

    pub fn put_progress(&mut self, epoch: &str, progress: &[Progress]) {
        self.put(META, b"identity", &Identity { epoch: epoch.to_owned(), progress: progress.to_vec() });
    }

    pub fn put_thread(&mut self, tenant: &str, thread: &str, row: &ThreadRow) {
        self.put(THREADS, &keys::joined(&[tenant, thread]), row);
    }

    pub fn put_event(&mut self, tenant: &str, thread: &str, seq: u64, row: &EventRow<'_>) {
        self.put(EVENTS, &keys::event(tenant, thread, seq), row);
    }

    pub fn put_member(&mut self, tenant: &str, thread: &str, user: &str, row: &MemberRow) {
        self.put(MEMBERS, &keys::joined(&[tenant, thread, user]), row);
        self.rows.put_cf(&self.store.family(MEMBERSHIPS), keys::joined(&[tenant, user, thread]), []);
    }

    pub fn put_receipt(&mut self, tenant: &str, thread: &str, user: &str, name: &str, row: &ReceiptRow) {
        self.put(RECEIPTS, &keys::joined(&[tenant, thread, user, name]), row);
    }

    pub fn put_revocation(&mut self, tenant: &str, user: &str, row: &RevocationRow) {
        self.put(REVOCATIONS, &keys::joined(&[tenant, user]), row);
    }

    pub fn delete_member(&mut self, tenant: &str, thread: &str, user: &str) {
        self.rows.delete_cf(&self.store.family(MEMBERS), keys::joined(&[tenant, thread, user]));
        self.rows.delete_cf(&self.store.family(MEMBERSHIPS), keys::joined(&[tenant, user, thread]));
    }

    pub fn put_key(&mut self, partition: u32, key: &[u8], row: &KeyRow) {
        self.put(KEYS, key, row);
        self.rows.put_cf(&self.store.family(KEY_TIMES), keys::key_time(partition, row.at, key), []);
    }

    /// Deletes the idempotency keys of a partition with `at` in `from..before`. Only what has been committed is seen;
    /// `taken_again` tells which keys this batch has taken anew.
    pub fn purge_keys(
        &mut self,
        partition: u32,
        from: u64,
        before: u64,
        taken_again: impl Fn(&[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for time in self.store.keys_between(partition, from, before)? {
            let key = &time[12..];
            let at = u64::from_be_bytes(time[4..12].try_into().unwrap_or_default());
            // The key may have been taken again since; then only its old time goes.
            if !taken_again(key) && self.store.key(key)?.is_some_and(|row| row.at == at) {
                self.rows.delete_cf(&self.store.family(KEYS), key);
            }
            self.rows.delete_cf(&self.store.family(KEY_TIMES), &time);
        }
        Ok(())
    }
}
