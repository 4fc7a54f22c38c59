//! Opens the database, after every file that the opening reads or drops was found to be as it was written.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use rocksdb::DB;

use super::files::{self, FilesError, LogFolder, Whole};
use super::format::{HOLES, Holes, descriptors, options, parse_key, records, sized_options};
use crate::disk;
use crate::log::{LogError, Position};
use crate::memory::LogPlan;

/// Locked for as long as a process works on the log. RocksDB has a lock of its own, but only from when it opens the log on.
const LOCK: &str = "weft.lock";

/// What to do about damage.
const WAYS_OUT: &str = "nothing was changed; `weft doctor` says what else is damaged, `weft salvage` copies every record \
                        that can be read into a new folder and says what is missing, or put a backup in its place";

/// An open database, and where its newest record is.
pub(super) struct Database {
    pub db: DB,
    pub last: Option<Position>,
}

impl Database {
    /// The offset that the next record gets.
    pub fn end(&self) -> u64 {
        self.last.map_or(0, |last| last.offset + 1)
    }
}

/// Makes sure that nobody else works on the log in `dir` while what is returned is held.
pub(super) fn lock_folder(dir: &Path) -> Result<File, LogError> {
    let failed = |error: std::io::Error| LogError::Unavailable(format!("{}: {error}", dir.display()));
    std::fs::create_dir_all(dir).map_err(failed)?;
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(LOCK)).map_err(failed)?;
    try_lock(dir, file)
}

/// The same without making anything: `None` where no log was ever opened.
pub(super) fn lock_existing(dir: &Path) -> Result<Option<File>, LogError> {
    match File::open(dir.join(LOCK)) {
        Ok(file) => try_lock(dir, file).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LogError::Unavailable(format!("{}: {error}", dir.display()))),
    }
}

fn try_lock(dir: &Path, file: File) -> Result<File, LogError> {
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(in_use(dir)),
        Err(TryLockError::Error(error)) => Err(LogError::Unavailable(format!("{}: {error}", dir.display()))),
    }
}

/// Opens the log in `dir`; makes one only where there is nothing.
pub(super) fn open(dir: &Path, memory: LogPlan) -> Result<Database, LogError> {
    let whole = check(dir)?.unwrap_or_default();
    let options = sized_options(disk::takes_direct_io(dir), memory);
    checked(dir, &whole, DB::open_cf_descriptors(&options, dir, descriptors(&options)))
}

/// Opens the log in `dir` to read it, and changes nothing.
pub(super) fn open_read_only(dir: &Path) -> Result<Database, LogError> {
    let whole = check(dir)?.ok_or_else(|| LogError::Unavailable(format!("there is no log in {}", dir.display())))?;
    let options = options(false);
    checked(dir, &whole, DB::open_cf_descriptors_read_only(&options, dir, descriptors(&options), false))
}

/// Looks at the files of the log in `dir`, if there is one.
fn check(dir: &Path) -> Result<Option<Whole>, LogError> {
    let whole = match files::check(dir) {
        Ok(LogFolder::Nothing) => return Ok(None),
        Ok(LogFolder::Log(whole)) => whole,
        Err(FilesError::Damaged(what)) => return Err(damaged(dir, &what)),
        Err(FilesError::Io(what)) => return Err(LogError::Unavailable(what)),
    };
    if let Some(rest) = &whole.rest {
        tracing::info!(
            rest,
            "the write-ahead log ends before bytes that make no batch: a write that was never answered, or older"
        );
    }
    Ok(Some(whole))
}

/// A database that was opened, if it has what its files were found to hold.
fn checked(dir: &Path, whole: &Whole, opened: Result<DB, rocksdb::Error>) -> Result<Database, LogError> {
    let db = opened.map_err(|error| open_error(dir, &error))?;
    let last = last_position(&db)?;
    let database = Database { db, last };
    match (whole.end, database.end()) {
        (Some(expected), end) if end < expected => {
            Err(damaged(dir, &format!("records {end}..{expected} of the write-ahead log were not recovered")))
        }
        _ => Ok(database),
    }
}

fn damaged(dir: &Path, what: &str) -> LogError {
    LogError::Damaged(format!("in {}: {what}; {WAYS_OUT}", dir.display()))
}

fn in_use(dir: &Path) -> LogError {
    LogError::Unavailable(format!("{} is in use by another process", dir.display()))
}

fn open_error(dir: &Path, error: &rocksdb::Error) -> LogError {
    let text = error.to_string();
    match error.kind() {
        rocksdb::ErrorKind::IOError if is_lock_error(&text) => in_use(dir),
        rocksdb::ErrorKind::Corruption => damaged(dir, &text),
        _ => LogError::Unavailable(text),
    }
}

/// RocksDB has no kind of its own for it: this process holds the lock, or another one does. In the second case the text is
/// that of the system, after the file's name.
fn is_lock_error(text: &str) -> bool {
    text.contains("lock hold by current process") || (text.contains("While lock file: ") && text.contains("/LOCK"))
}

fn last_position(db: &DB) -> Result<Option<Position>, LogError> {
    let mut newest = db.raw_iterator_cf(&records(db));
    newest.seek_to_last();
    newest.status().map_err(|error| LogError::Damaged(error.to_string()))?;
    Ok(newest.key().and_then(parse_key))
}

/// The offsets that a salvaged log is without.
pub(super) fn holes(db: &DB) -> Result<Holes, LogError> {
    let Some(bytes) = db.get(HOLES).map_err(|error| LogError::Unavailable(error.to_string()))? else {
        return Ok(Holes::default());
    };
    Holes::decode(&bytes).map_err(|error| LogError::Damaged(format!("the list of lost offsets: {error}")))
}
