//! Whether the embedded log's files are as they were written, found without RocksDB and before it opens them.
//!
//! RocksDB drops what follows the first bad record of its write-ahead log, and deletes what it dropped. So before each
//! opening this module reads the MANIFEST and every live file of the write-ahead log, and tells a torn end from damage:
//!
//! - one writer syncs one batch after the other, so only the last one can be torn, and nobody was answered for it. Whatever
//!   is whole after a bad place shows that the batch at that place had been answered: damage;
//! - sequence numbers of batches have no gaps, over all files. A gap is damage too, even where every record is whole;
//! - files that the MANIFEST does not name as live may hold anything: they wait to be written again.
//!
//! A flip in the very last batch looks like a torn end from here. What is derived from the log, and ahead of it then, shows
//! it. [`blocks`], [`batch`] and [`manifest`] read RocksDB's formats; [`tables`] makes one table readable by itself.

pub(super) mod batch;
pub(super) mod blocks;
pub(super) mod manifest;
pub(super) mod tables;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use self::batch::{Op, WriteAheadBatch};
use self::blocks::{FilePart, Scan};
use self::manifest::Manifest;
use super::format::{RECORDS, parse_key};

/// What is in a log's folder.
#[derive(Debug)]
pub(super) enum LogFolder {
    /// No log: one may be created.
    Nothing,
    Log(Whole),
}

/// A log whose files are as they were written, up to a torn end.
#[derive(Debug, Default)]
pub(super) struct Whole {
    /// What the next record's offset must be at least, if the write-ahead log says.
    pub end: Option<u64>,
    /// Where something follows the last batch: a torn write, or what the file held before it was written again.
    pub rest: Option<String>,
}

/// Damage: which file, where, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FilesError {
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Io(String),
}

fn damaged<T>(what: impl Into<String>) -> Result<T, FilesError> {
    Err(FilesError::Damaged(what.into()))
}

/// Looks at every file that an opening would read or drop. Changes nothing.
pub(super) fn check(dir: &Path) -> Result<LogFolder, FilesError> {
    let logs = numbered(dir, "log")?;
    if !exists(&dir.join("CURRENT"))? {
        if is_empty(dir)? {
            return Ok(LogFolder::Nothing);
        }
        let (tables, logs) = (numbered(dir, "sst")?.len(), logs.len());
        return damaged(format!("CURRENT is missing beside {tables} tables and {logs} files of the write-ahead log"));
    }
    let manifest = Manifest::read(dir).map_err(FilesError::Damaged)?;
    check_tables(dir, &manifest)?;

    let first = manifest.first_live_log();
    let live: Vec<(u64, PathBuf)> = logs.into_iter().filter(|(number, _)| *number >= first).collect();
    if live.is_empty() && first > 0 {
        return damaged(format!("every file of the write-ahead log is missing, from {first:06}.log on"));
    }
    let mut reading = WriteAheadScan::new(&manifest);
    for (number, path) in live {
        let bytes = fs::read(&path).map_err(|error| FilesError::Io(format!("{}: {error}", path.display())))?;
        reading.file(&file_name(&path), &blocks::scan(&bytes, number))?;
    }
    Ok(LogFolder::Log(Whole { end: reading.end, rest: reading.rest }))
}

/// Whether there is no log, so that one may be created.
pub(super) fn is_empty(dir: &Path) -> Result<bool, FilesError> {
    Ok(!exists(&dir.join("CURRENT"))? && numbered(dir, "log")?.is_empty() && numbered(dir, "sst")?.is_empty())
}

/// Every table that the MANIFEST names is there, with its size; what is in it shows when it is read.
fn check_tables(dir: &Path, manifest: &Manifest) -> Result<(), FilesError> {
    for table in manifest.tables() {
        let name = format!("{:06}.sst", table.number);
        match fs::metadata(dir.join(&name)) {
            Ok(found) if found.len() == table.size => {}
            Ok(found) => return damaged(format!("{name} has {} bytes instead of {}", found.len(), table.size)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return damaged(format!("{name} is missing")),
            Err(error) => return Err(FilesError::Io(format!("{name}: {error}"))),
        }
    }
    Ok(())
}

/// The write-ahead log, read file by file.
struct WriteAheadScan {
    records: Option<u32>,
    /// The sequence number that the next batch must have; for the first one it is the newest that it may have.
    next_sequence: u64,
    is_first: bool,
    /// The offset that the next record gets, as far as the files say.
    end: Option<u64>,
    /// Where something follows the last batch.
    rest: Option<String>,
    /// The file that was read last, and where its batches end.
    last_end: Option<(String, usize)>,
}

impl WriteAheadScan {
    fn new(manifest: &Manifest) -> WriteAheadScan {
        WriteAheadScan {
            records: manifest.family(RECORDS).map(|(number, _)| number),
            next_sequence: manifest.last_sequence + 1,
            is_first: true,
            end: None,
            rest: None,
            last_end: None,
        }
    }

    fn file(&mut self, name: &str, scan: &Scan<'_>) -> Result<(), FilesError> {
        if let Some(broken) = scan.damage() {
            let (at, why, after) = (broken.bad_at, broken.why, scan.records_after(broken.at));
            return damaged(format!("{name} is damaged at byte {at} ({why}); {after} whole batches follow"));
        }
        for part in &scan.parts {
            let FilePart::Record { at, bytes } = part else { continue };
            let Some(batch) = WriteAheadBatch::read(bytes).filter(|batch| batch.is_whole) else {
                return damaged(format!("{name} holds a batch at byte {at} that Weft did not write"));
            };
            self.batch(name, *at, &batch)?;
        }
        self.last_end = Some((name.to_owned(), scan.valid_to));
        if let Some(broken) = scan.torn_end() {
            self.rest = Some(format!("after byte {} of {name} ({})", broken.at, broken.why));
        }
        Ok(())
    }

    fn batch(&mut self, name: &str, at: usize, batch: &WriteAheadBatch<'_>) -> Result<(), FilesError> {
        let fits = match self.is_first {
            true => batch.sequence <= self.next_sequence,
            false => batch.sequence == self.next_sequence,
        };
        if !fits {
            let missing = batch.sequence.saturating_sub(self.next_sequence);
            let between = match &self.last_end {
                Some((last, end)) => format!("between byte {end} of {last} and byte {at} of {name}"),
                None => format!("before byte {at} of {name}"),
            };
            return damaged(format!("{missing} operations are missing {between}"));
        }
        (self.is_first, self.next_sequence, self.rest) = (false, batch.next_sequence(), None);
        for op in &batch.ops {
            self.op(op).map_err(|what| FilesError::Damaged(format!("{name} at byte {at}: {what}")))?;
        }
        Ok(())
    }

    fn op(&mut self, op: &Op<'_>) -> Result<(), String> {
        let (family, key) = match op {
            Op::Put { family, key, .. } | Op::Delete { family, key } => (*family, *key),
        };
        if Some(family) != self.records {
            return Ok(());
        }
        let at = parse_key(key).ok_or_else(|| format!("a key of {} bytes among the records", key.len()))?;
        match op {
            Op::Put { .. } => self.end = self.end.max(Some(at.offset + 1)),
            // What a failed write left is deleted, from the log's end on.
            Op::Delete { .. } => self.end = self.end.map(|end| end.min(at.offset)),
        }
        Ok(())
    }
}

/// The first damage in the live files of the write-ahead log of an open database: file and byte. A batch that is being
/// written may look like it.
pub(super) fn damaged_log(dir: &Path) -> Option<(String, usize)> {
    let first = Manifest::read(dir).ok()?.first_live_log();
    let live = numbered(dir, "log").ok()?.into_iter().filter(|(number, _)| *number >= first);
    live.into_iter().find_map(|(number, path)| {
        // A file that is gone was not live any more.
        let bytes = fs::read(&path).ok()?;
        let at = blocks::scan(&bytes, number).damage()?.bad_at;
        Some((file_name(&path), at))
    })
}

/// The files of a folder whose name is a number, with this ending, by number.
pub(super) fn numbered(dir: &Path, ending: &str) -> Result<Vec<(u64, PathBuf)>, FilesError> {
    let failed = |error: io::Error| FilesError::Io(format!("{}: {error}", dir.display()));
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let Some(number) = stem.filter(|_| path.extension().is_some_and(|found| found == ending)) {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found)
}

fn exists(path: &Path) -> Result<bool, FilesError> {
    path.try_exists().map_err(|error| FilesError::Io(format!("{}: {error}", path.display())))
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
