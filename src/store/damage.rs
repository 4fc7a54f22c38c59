//! Projections that are damaged: noticing it, setting them aside, and looking at those that are not open.
//!
//! What is derived can be made anew, so damage in it costs time and nothing else. But nothing is deleted for it: the folder is
//! renamed, since it may be the only copy of what a damaged log has lost. One such folder is kept.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rocksdb::{DB, ErrorKind};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use super::catalogue::Buffers;
use super::{Store, StoreError, StoreMemory, catalogue};
use crate::codec::CodecError;
use crate::{clock, telemetry};

/// In the folder of projections in which damage was found: what it was. The next start sets the folder aside.
const MARK: &str = "damaged";

/// What was found to be damaged, if anything was.
#[derive(Default)]
pub(super) struct Damage {
    found: Mutex<Option<String>>,
    /// The folder is only looked at: nothing is written there.
    is_read_only: bool,
}

impl Store {
    /// Opens the store in `path`. One that is damaged is set aside, and an empty one begun in its place.
    pub fn open_or_set_aside(path: &Path, memory: StoreMemory) -> Result<Store, StoreError> {
        let opened = Store::open_with(path, memory).and_then(|store| match store.origin() {
            Err(error) if error.is_damage() => Err(error),
            _ => Ok(store),
        });
        let why = match (opened, mark(path)) {
            (Ok(store), None) => return Ok(store),
            (Ok(_), Some(marked)) => marked,
            (Err(error), _) if error.is_damage() => error.to_string(),
            (Err(error), _) => return Err(error),
        };
        set_aside(path, &why)?;
        telemetry::projections_damaged().increment(1);
        Ok(Store { set_aside: Some(why), ..Store::open_with(path, memory)? })
    }

    /// Why the projections from before were set aside at the start, if they were.
    pub fn set_aside(&self) -> Option<&str> {
        self.set_aside.as_deref()
    }

    /// Notes damage that an error shows, so that `/readyz` says it and the next start makes the projections anew.
    pub(super) fn note(&self, error: StoreError) -> StoreError {
        if error.is_damage() {
            let mut damage = self.damage.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if damage.is_none() {
                tracing::error!(%error, "the projections are damaged");
                *damage = Some(error.to_string());
                let mark = || std::fs::write(self.db.path().join(MARK), error.to_string());
                if !self.damage.is_read_only
                    && let Err(error) = mark()
                {
                    tracing::error!(%error, "the mark that the projections are damaged was not written");
                }
            }
        }
        error
    }

    /// What was found to be damaged since the start.
    pub fn damage(&self) -> Option<String> {
        self.damage.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Opens the projections in `path` to look at them, and changes nothing; an error that [is damage](StoreError::is_damage)
    /// says what is wrong. `None` where there are none.
    pub fn open_read_only(path: &Path) -> Result<Option<Store>, StoreError> {
        if !path.join("CURRENT").exists() {
            return Ok(None);
        }
        let memory = StoreMemory::default();
        let buffers = Buffers::new(memory);
        let options = catalogue::database(false, &buffers);
        let families = DB::list_cf(&options, path)?;
        if catalogue::names().any(|name| !families.iter().any(|family| family == name)) {
            return Err(StoreError::OtherVersion(path.to_owned()));
        }
        let db = DB::open_cf_descriptors_read_only(&options, path, catalogue::descriptors(&buffers), false)?;
        let mut store = Store::of(db, buffers, memory);
        store.damage.is_read_only = true;
        store.read_partitioning()?;
        Ok(Some(store))
    }

    /// Reads every row of the projections in `path`, which are not open. `None` where there are none.
    pub fn examine(path: &Path) -> Result<Option<ExaminedStore>, StoreError> {
        let mut examined = ExaminedStore::default();
        examined.problems.extend(mark(path));
        let store = match Store::open_read_only(path) {
            Ok(Some(store)) => store,
            Ok(None) => return Ok(None),
            Err(error) if error.is_damage() => {
                examined.problems.push(error.to_string());
                return Ok(Some(examined));
            }
            Err(error) => return Err(error),
        };
        let read = store.origin().and_then(|origin| {
            if let Some(origin) = origin {
                examined.epoch = Some(origin.epoch);
                examined.positions = origin.positions;
            }
            store.rows().try_for_each(|row| row.map(|_| examined.rows += 1))
        });
        examined.problems.extend(read.err().map(|error| error.to_string()));
        Ok(Some(examined))
    }
}

/// What a folder of projections holds.
#[derive(Debug, Default)]
pub struct ExaminedStore {
    pub rows: u64,
    pub epoch: Option<String>,
    /// For each partition the offset to read next.
    pub positions: Vec<u64>,
    pub problems: Vec<String>,
}

impl StoreError {
    /// Whether rows cannot be read any more, now or ever.
    pub fn is_damage(&self) -> bool {
        match self {
            StoreError::Database(error) => is_damage(error),
            // Rows of another version are whole.
            StoreError::Damaged { source, .. } => !matches!(source, CodecError::UnknownVersion { .. }),
            StoreError::SetAside(_) | StoreError::InUse(_) | StoreError::Newer(_) | StoreError::OtherVersion(_) => {
                false
            }
        }
    }

    /// The same of a store that nobody writes to: what the library does not understand there was changed.
    pub fn is_damage_at_rest(&self) -> bool {
        self.is_damage() || matches!(self, StoreError::Database(error) if error.kind() != ErrorKind::IOError)
    }
}

/// A file that is missing counts as well: RocksDB gives it no kind of its own.
pub(super) fn is_damage(error: &rocksdb::Error) -> bool {
    error.kind() == ErrorKind::Corruption
        || (error.kind() == ErrorKind::IOError && error.to_string().contains("No such file or directory"))
}

/// Keeps servers from opening the projections in `path` while what is returned is held; nothing where there are none, or where
/// they may not be written to, and so by no server.
pub fn hold(path: &Path) -> Result<Option<File>, StoreError> {
    let Ok(file) = OpenOptions::new().write(true).open(path.join("LOCK")) else { return Ok(None) };
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::ACCESS | Errno::AGAIN) => Err(StoreError::InUse(path.to_owned())),
        // A file system without locks: RocksDB has none there either.
        Err(_) => Ok(None),
    }
}

/// What an earlier start found to be damaged.
pub fn mark(path: &Path) -> Option<String> {
    std::fs::read_to_string(path.join(MARK)).ok()
}

/// Renames the folder, so that new projections can be made in its place.
pub(super) fn set_aside(path: &Path, why: &str) -> std::io::Result<()> {
    for older in set_asides(path)? {
        std::fs::remove_dir_all(older)?;
    }
    let target = PathBuf::from(format!("{}.damaged-{}", path.display(), clock::now_ms()));
    std::fs::rename(path, &target)?;
    tracing::error!(why, kept = %target.display(), "the projections are damaged: they are set aside, and made anew from the log");
    Ok(())
}

/// The folders that were set aside before.
fn set_asides(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let prefix = format!("{}.damaged-", name.to_string_lossy());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}
