//! The projections: what is derived from the log, in RocksDB. Disposable: deleted, they come back from the log.
//!
//! Invariants:
//! - one writer of each row, the thread of the projector that has its partition; everybody else reads. Dead letters are
//!   written under a lock of the projector's;
//! - rows and the position they were made from are written in one batch and flushed together (no write-ahead log, atomic
//!   flush): after a crash the store is older, never torn;
//! - each row is framed ([`crate::codec`]) and its family listed in [`catalogue`];
//! - each key begins with a partition of the log ([`keys`]), but for the few rows about the store itself ([`origin`]). What
//!   spreads over partitions is read from all of them at once ([`merged`]).
//!
//! All calls block. A lookup takes microseconds; what walks a range belongs on a blocking thread.

pub mod activity;
mod arrivals;
pub mod catalogue;
mod contacts;
pub mod damage;
pub mod dead_letters;
pub mod deliveries;
mod depths;
mod difference;
mod events;
mod idempotency;
mod key_filter;
pub mod keys;
mod kinds;
mod known_members;
mod members;
mod merged;
pub mod messages;
mod origin;
mod receipts;
mod revocations;
pub mod runs;
pub mod tenants;
#[cfg(test)]
mod tests;
mod threads;
mod tickets;
mod work;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bincode::{BorrowDecode, Encode};
use rocksdb::{BoundColumnFamily, DB, Direction, IteratorMode, ReadOptions, WriteBatch, WriteOptions};

use self::activity::{Activity, ThreadActivity};
pub use self::arrivals::Arrival;
use self::arrivals::Arrivals;
use self::catalogue::Buffers;
pub use self::catalogue::StoreMemory;
use self::contacts::{Contacts, MembershipChange};
use self::damage::Damage;
use self::depths::Depths;
pub use self::depths::{Depth, GroupDepth, Waiting};
pub use self::difference::{Compared, Difference};
pub use self::events::{EventRange, EventRow, StoredEvent};
pub use self::idempotency::KeyRow;
use self::key_filter::KeyFilter;
pub use self::keys::{Partition, Place};
pub use self::kinds::{KindRow, KindSchemaRow};
use self::known_members::KnownMembers;
pub use self::members::{JoinedThread, MemberRow};
pub use self::origin::{Origin, Progress};
pub use self::receipts::{MAX_PARTS, ReceiptRow};
pub use self::revocations::RevocationRow;
use self::runs::{RunKey, RunListener, RunOutline};
use self::tenants::Tenants;
pub use self::threads::ThreadRow;
pub use self::tickets::{OpenTicket, TicketsRow};
use self::work::WorkListener;
pub use self::work::{
    FailedRow, GroupRow, LeaseRow, PassedRow, SimpleWork, WaitingHead, WaitingRow, WaitingStart, WorkChange, WorkRow,
};
use crate::codec::{self, CodecError};
use crate::disk;
use crate::partitioning::{KeyHash, Partitioning};
use crate::protocol::custom::log_key as kinds_key;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;
use crate::protocol::tickets::{self as ticket, TicketOwner};
use crate::protocol::work::log_key as groups_key;

/// The version of the rows below; a store of another version is rebuilt.
const SCHEMA: u8 = 19;

/// Until a store is begun.
const UNKNOWN_PARTITIONING: Partitioning = Partitioning::new(KeyHash::Crc32, 1);

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store does not answer: {0}")]
    Database(#[from] rocksdb::Error),
    #[error("a row of {family} is damaged (run `weft rebuild`): {source}")]
    Damaged { family: &'static str, source: CodecError },
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    #[error(
        "the projections in {} were made by a newer version of Weft: start that one, or run `weft rebuild --discard`",
        .0.display()
    )]
    Newer(PathBuf),
    #[error("the projections in {} are of another version of Weft: the start of a server makes them anew", .0.display())]
    OtherVersion(PathBuf),
    #[error("the damaged projections cannot be set aside: {0}")]
    SetAside(#[from] std::io::Error),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        tracing::error!(%error, "the store failed");
        Error::new(Code::Unavailable, "the store does not answer")
    }
}

pub struct Store {
    db: DB,
    /// Of the log that it was made from, once it is: before that there are no rows.
    partitioning: Partitioning,
    contacts: Contacts,
    activity: Activity,
    arrivals: Arrivals,
    key_filter: KeyFilter,
    known_members: KnownMembers,
    run_listener: OnceLock<RunListener>,
    work_listener: OnceLock<WorkListener>,
    tenants: OnceLock<Arc<Tenants>>,
    depths: Depths,
    damage: Damage,
    /// What was wrong with those that this one replaces.
    set_aside: Option<String>,
    /// Of which version those were that this one replaces, in words.
    outdated: Option<String>,
    buffers: Buffers,
    memory: StoreMemory,
}

/// Rows that become visible together.
pub struct Batch<'a> {
    store: &'a Store,
    rows: WriteBatch,
    memberships: Vec<MembershipChange>,
    /// Hashes of the memberships that it ends.
    removed_members: Vec<u64>,
    threads: Vec<ThreadActivity>,
    /// Hashes of idempotency keys that it takes.
    keys: Vec<u64>,
    /// Runs that it changes, if somebody listens.
    runs: Vec<(RunKey, RunOutline)>,
    /// What it changes of work, if somebody listens.
    work: Vec<WorkChange>,
    /// The partitions in which events were appended.
    arrived: Vec<Partition>,
}

impl Store {
    /// Opens or creates the store in `path`.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        Store::open_with(path, StoreMemory::default())
    }

    /// The same, with so much memory.
    pub fn open_with(path: &Path, memory: StoreMemory) -> Result<Store, StoreError> {
        // RocksDB makes the folder itself; the probe needs it before. What goes wrong here, RocksDB will say.
        drop(std::fs::create_dir_all(path));
        let buffers = Buffers::new(memory);
        let options = catalogue::database(disk::takes_direct_io(path), &buffers);
        let db = DB::open_cf_descriptors(&options, path, catalogue::descriptors(&buffers)).map_err(|error| {
            // RocksDB has no kinds of its own for these.
            let text = error.to_string();
            if text.contains("lock hold by current process") || text.contains("While lock file") {
                StoreError::InUse(path.to_owned())
            } else if text.contains("Column families not opened") {
                StoreError::Newer(path.to_owned())
            } else {
                error.into()
            }
        })?;
        let mut store = Store::of(db, buffers, memory);
        store.read_partitioning()?;
        Ok(store)
    }

    fn of(db: DB, buffers: Buffers, memory: StoreMemory) -> Store {
        Store {
            db,
            partitioning: UNKNOWN_PARTITIONING,
            contacts: Contacts::default(),
            activity: Activity::default(),
            arrivals: Arrivals::default(),
            key_filter: KeyFilter::new(memory.key_filter),
            known_members: KnownMembers::new(),
            run_listener: OnceLock::new(),
            work_listener: OnceLock::new(),
            tenants: OnceLock::new(),
            depths: Depths::default(),
            damage: Damage::default(),
            set_aside: None,
            outdated: None,
            buffers,
            memory,
        }
    }

    /// Why it is made anew, if it is: what was wrong with the one before.
    pub fn replaces(&self) -> Option<&str> {
        self.set_aside.as_deref().or(self.outdated.as_deref())
    }

    /// Deletes a store whose rows are of an older version, and begins an empty one in its place.
    pub fn replace_outdated(self, rows: u8) -> Result<Store, StoreError> {
        let (path, memory) = (self.db.path().to_owned(), self.memory);
        drop(self);
        Store::destroy(&path)?;
        let why =
            format!("the projections were of an older version (rows of version {rows}, and these are of {SCHEMA})");
        Ok(Store { outdated: Some(why), ..Store::open_with(&path, memory)? })
    }

    /// The partition in which a thread's rows are.
    pub fn partition(&self, tenant: &str, thread: &str) -> Partition {
        Partition::new(self.partitioning.of_thread(tenant, thread))
    }

    /// The partition of rows that belong to a user and to no thread: that of its inbox.
    fn partition_of_user(&self, tenant: &str, user: &str) -> Partition {
        self.partition(tenant, &ids::inbox(user))
    }

    /// The partition of the records about a user's tickets.
    fn partition_of_tickets(&self, owner: &TicketOwner) -> Partition {
        Partition::new(self.partitioning.of(ticket::log_key(owner).as_bytes()))
    }

    /// The partition of the records about a tenant's groups.
    fn partition_of_groups(&self, tenant: &str) -> Partition {
        Partition::new(self.partitioning.of(groups_key(tenant).as_bytes()))
    }

    /// The partition of the records about a tenant's custom kinds.
    fn partition_of_kinds(&self, tenant: &str) -> Partition {
        Partition::new(self.partitioning.of(kinds_key(tenant).as_bytes()))
    }

    /// The partitions that keys begin with, in order.
    fn partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (0..self.partitioning.each()).map(Partition::new)
    }

    /// What the store may hold in memory.
    pub fn memory(&self) -> StoreMemory {
        self.memory
    }

    /// What it holds.
    pub fn memory_used(&self) -> StoreMemory {
        let (cache, memtables) = (self.buffers.cache.get_usage(), self.buffers.memtables.get_usage());
        StoreMemory { cache, memtables, key_filter: self.memory.key_filter }
    }

    /// Deletes the store in `path`.
    pub fn destroy(path: &Path) -> Result<(), StoreError> {
        Ok(DB::destroy(&catalogue::database(false, &Buffers::new(StoreMemory::default())), path)?)
    }

    fn family(&self, name: &'static str) -> Arc<BoundColumnFamily<'_>> {
        // Opened with every family of the catalogue in `open`, which fails without one.
        self.db.cf_handle(name).expect("the store was opened with its catalogue")
    }

    fn get<T: for<'a> BorrowDecode<'a, ()>>(&self, family: &'static str, key: &[u8]) -> Result<Option<T>, StoreError> {
        self.get_as(SCHEMA, family, key)
    }

    /// A row of another version than [`SCHEMA`].
    fn get_as<T: for<'a> BorrowDecode<'a, ()>>(
        &self,
        schema: u8,
        family: &'static str,
        key: &[u8],
    ) -> Result<Option<T>, StoreError> {
        let found = self.db.get_pinned_cf(&self.family(family), key).map_err(|error| self.note(error.into()))?;
        let Some(bytes) = found else {
            return Ok(None);
        };
        let row = codec::decode(schema, &bytes).map_err(|source| self.note(StoreError::Damaged { family, source }))?;
        Ok(Some(row))
    }

    fn decoded<'a, T: BorrowDecode<'a, ()>>(&self, family: &'static str, bytes: &'a [u8]) -> Result<T, StoreError> {
        codec::decode(SCHEMA, bytes).map_err(|source| self.note(StoreError::Damaged { family, source }))
    }

    /// What stands in a family under keys with this prefix, in order: the rest of the key, and the value.
    fn under(
        &self,
        family: &'static str,
        prefix: Vec<u8>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Box<[u8]>), StoreError>> + use<'_> {
        let mut options = ReadOptions::default();
        if !prefix.is_empty() {
            options.set_iterate_upper_bound(keys::after(prefix.clone()));
        }
        let from = IteratorMode::From(&prefix, Direction::Forward);
        let (rows, begin) = (self.db.iterator_cf_opt(&self.family(family), options, from), prefix.len());
        rows.map(move |row| match row {
            Ok((key, value)) => Ok((key[begin..].to_vec(), value)),
            Err(error) => Err(self.note(error.into())),
        })
    }

    /// What stands in a family from one key on and before another, in order.
    fn between<'s>(
        &'s self,
        family: &'static str,
        from: &[u8],
        to: Vec<u8>,
    ) -> impl Iterator<Item = Result<RawRow, StoreError>> + use<'s> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        let from = IteratorMode::From(from, Direction::Forward);
        self.db
            .iterator_cf_opt(&self.family(family), options, from)
            .map(|row| row.map_err(|error| self.note(error.into())))
    }

    /// What [`Store::under`] gives, read: the rest of the key as text, and the row.
    fn rows_under<T: for<'a> BorrowDecode<'a, ()>>(
        &self,
        family: &'static str,
        prefix: Vec<u8>,
    ) -> impl Iterator<Item = Result<(String, T), StoreError>> + use<'_, T> {
        self.under(family, prefix).map(move |row| {
            let (rest, value) = row?;
            Ok((String::from_utf8_lossy(&rest).into_owned(), self.decoded(family, &value)?))
        })
    }

    /// The names that follow a prefix in keys of a family.
    fn names_under(
        &self,
        family: &'static str,
        prefix: Vec<u8>,
    ) -> impl Iterator<Item = Result<String, StoreError>> + use<'_> {
        self.under(family, prefix).map(|row| Ok(String::from_utf8_lossy(&row?.0).into_owned()))
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch {
            store: self,
            rows: WriteBatch::default(),
            memberships: Vec::new(),
            removed_members: Vec::new(),
            threads: Vec::new(),
            keys: Vec::new(),
            runs: Vec::new(),
            work: Vec::new(),
            arrived: Vec::new(),
        }
    }

    /// Makes a batch visible. Durable with the next flush.
    pub fn commit(&self, batch: Batch<'_>) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        let counting = (!batch.work.is_empty()).then(|| self.depths.committing());
        let written = self.key_filter.commit(&batch.keys, || self.db.write_opt(batch.rows, &options));
        written.map_err(|error| self.note(error.into()))?;
        self.known_members.remove(&batch.removed_members);
        self.arrivals.note(&batch.arrived);
        if let Some(_counting) = counting {
            self.count_changes(&batch.work);
        }
        self.contacts.apply(&batch.memberships);
        self.activity.apply(&batch.memberships, &batch.threads);
        if let Some(tenants) = self.tenants.get() {
            tenants.note(&batch.threads);
        }
        // Asked only now: who begins to listen while a batch is prepared hears of it.
        if let Some(listener) = self.run_listener.get()
            && !batch.runs.is_empty()
        {
            listener(batch.runs);
        }
        if let Some(listener) = self.work_listener.get()
            && !batch.work.is_empty()
        {
            listener(batch.work);
        }
        Ok(())
    }

    /// Makes durable what has been committed, so that the next start reads no more of the log than it must.
    pub fn flush(&self) -> Result<(), StoreError> {
        let families: Vec<_> = catalogue::names().map(|name| self.family(name)).collect();
        let flushed = self.db.flush_cfs_opt(&families.iter().collect::<Vec<_>>(), &Default::default());
        flushed.map_err(|error| self.note(error.into()))
    }

    /// Every row of every family, in order, to compare two stores; without the one that names the log's generation, since
    /// rows of an earlier one may be good, and without positions, which [`Store::progress`] compares.
    pub fn rows(&self) -> impl Iterator<Item = Result<StoreRow, StoreError>> + '_ {
        let rows = catalogue::names().flat_map(move |family| {
            let rows = self.db.iterator_cf(&self.family(family), IteratorMode::Start);
            rows.map(move |row| Ok(row.map(|(key, value)| (family, key, value))?))
        });
        rows.filter(|row| !matches!(row, Ok((family, key, _)) if origin::may_differ(family, key)))
    }
}

/// A key and a value.
type RawRow = (Box<[u8]>, Box<[u8]>);

/// A family's name, a key and a value.
pub type StoreRow = (&'static str, Box<[u8]>, Box<[u8]>);

impl Batch<'_> {
    fn put<T: Encode>(&mut self, family: &'static str, key: &[u8], row: &T) {
        self.put_as(SCHEMA, family, key, row);
    }

    /// A row of another version than [`SCHEMA`].
    fn put_as<T: Encode>(&mut self, schema: u8, family: &'static str, key: &[u8], row: &T) {
        self.rows.put_cf(&self.store.family(family), key, codec::encode(schema, row));
    }

    /// A row that says all with its key.
    fn put_empty(&mut self, family: &'static str, key: &[u8]) {
        self.rows.put_cf(&self.store.family(family), key, []);
    }

    fn delete_range(&mut self, family: &'static str, from: &[u8], to: &[u8]) {
        self.rows.delete_range_cf(&self.store.family(family), from, to);
    }

    fn delete(&mut self, family: &'static str, key: &[u8]) {
        self.rows.delete_cf(&self.store.family(family), key);
    }

    /// The bytes of the rows so far.
    pub fn bytes(&self) -> usize {
        self.rows.size_in_bytes()
    }
}
