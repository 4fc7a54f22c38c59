//! Copies every record that can be read of a damaged log into a new one. The damaged log is only read.
//!
//! Tables are read one by one, each as a database of its own ([`super::files::tables`]), so that a damaged block costs the rows
//! in it and no others. Of the write-ahead log RocksDB would drop all that follows a bad place; here what follows is read, and
//! in the bad place itself each row is looked for: its frame has a checksum, its key says its partition, and its offset has to
//! fit those around it.
//!
//! Records stay at their offsets. What is missing is listed in the new log as holes. The new log is another generation, since
//! the events of threads that lost some are numbered anew.

use std::fs;
use std::path::{Path, PathBuf};

use rocksdb::{DB, IteratorMode, WriteBatch};

use super::files::batch::{Op, WriteAheadBatch, read_op};
use super::files::blocks::{self, Broken, FilePart};
use super::files::manifest::{LiveTable, Manifest};
use super::files::{self, FilesError, file_name, tables};
use super::format::{
    HOLES, Holes, RECORDS, Stored, decode, descriptors, key_of, options, parse_key, partition_of, records, synced,
};
use super::{identity, opening};
use crate::log::{Identity, LogError, Position, Topic};

/// Rows are written in batches of about so many bytes.
const BATCH: usize = 4 << 20;
/// After damage in a table so many offsets are tried one by one, and then at growing distances.
const NEAR: u64 = 4_096;
/// The number of the family of records in a log whose MANIFEST does not say it: it is the first after the default one.
const USUAL_FAMILY: u32 = 1;

/// What was saved, and what was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvaged {
    pub records: u64,
    /// The offset that the next record gets.
    pub end: u64,
    pub epoch: String,
    /// Offsets without a record, each range without its second number.
    pub missing: Vec<(u64, u64)>,
    /// Where damage was found.
    pub damage: Vec<String>,
}

/// Copies the log in `source` into a new one in `target`, which must not be there. `partitions` counts where the log does not say
/// it itself; `progress` gets how many rows were read.
pub fn salvage(source: &Path, target: &Path, partitions: u32, progress: impl FnMut(u64)) -> Result<Salvaged, LogError> {
    let _lock = opening::lock_existing(source)?;
    if target.exists() {
        return Err(LogError::Unavailable(format!("{} is there already", target.display())));
    }
    let part = target.with_extension("part");
    remove(&part)?;
    let made = (|| {
        let mut salvage = Salvage::new(source, &part, progress)?;
        let manifest = salvage.manifest();
        salvage.tables(&manifest)?;
        let partitions = salvage.partitions.unwrap_or(partitions);
        salvage.write_ahead(&manifest, partitions)?;
        salvage.finish(partitions)
    })();
    match made {
        Ok(salvaged) => {
            fs::rename(part.join("log"), target).map_err(|error| io_error(target, &error))?;
            remove(&part)?;
            Ok(salvaged)
        }
        Err(error) => {
            remove(&part)?;
            Err(error)
        }
    }
}

struct Salvage<'a, P> {
    source: &'a Path,
    /// Where tables are read one by one.
    work: PathBuf,
    new: DB,
    rows: WriteBatch,
    count: u64,
    /// The offset after the newest record so far.
    end: u64,
    damage: Vec<String>,
    /// What the damaged log says of itself.
    identity: Option<Identity>,
    partitions: Option<u32>,
    progress: P,
}

impl<'a, P: FnMut(u64)> Salvage<'a, P> {
    fn new(source: &'a Path, part: &Path, progress: P) -> Result<Salvage<'a, P>, LogError> {
        let log = part.join("log");
        fs::create_dir_all(&log).map_err(|error| io_error(&log, &error))?;
        let options = options(false);
        let new = DB::open_cf_descriptors(&options, &log, descriptors(&options)).map_err(unavailable)?;
        let (rows, damage) = (WriteBatch::default(), Vec::new());
        Ok(Salvage {
            source,
            work: part.join("table"),
            new,
            rows,
            count: 0,
            end: 0,
            damage,
            identity: None,
            partitions: None,
            progress,
        })
    }

    /// The MANIFEST, as far as it can be read.
    fn manifest(&mut self) -> Manifest {
        match Manifest::read(self.source) {
            Ok(manifest) => return manifest,
            Err(problem) => self.damage.push(problem),
        }
        let mut names: Vec<PathBuf> = fs::read_dir(self.source)
            .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
            .unwrap_or_default();
        names.retain(|path| file_name(path).starts_with("MANIFEST-"));
        names.sort();
        let newest = names.pop().and_then(|path| fs::read(path).ok());
        newest.map(|bytes| Manifest::decode(&bytes).0).unwrap_or_default()
    }

    /// Copies the rows of all tables.
    fn tables(&mut self, manifest: &Manifest) -> Result<(), LogError> {
        for (number, family) in &manifest.families {
            let mut tables: Vec<&LiveTable> = family.tables.values().collect();
            // Of rows at one offset the newest counts, which is copied last.
            tables.sort_by_key(|table| (table.largest_sequence, table.number));
            for table in tables {
                let name = format!("{:06}.sst", table.number);
                if let Err(error) = tables::isolate(self.source, manifest, *number, table, &self.work) {
                    self.damage.push(format!("{name}: {error}"));
                } else if family.name == RECORDS {
                    self.copy_table(&name, table)?;
                } else {
                    self.read_identity();
                }
                remove(&self.work)?;
            }
        }
        self.unnamed_tables(manifest)
    }

    fn open_isolated(&self) -> Result<DB, rocksdb::Error> {
        let mut options = options(false);
        // One that cannot be opened shows when it is read.
        options.set_paranoid_checks(false);
        DB::open_cf_descriptors_read_only(&options, &self.work, descriptors(&options), false)
    }

    /// Each row of the identity counts where it is newest; a table need not have all of them.
    fn read_identity(&mut self) {
        let Ok(db) = self.open_isolated() else { return };
        self.partitions = identity::partitions(&db).ok().flatten().or(self.partitions);
        self.identity = identity::read(&db).ok().flatten().or(self.identity.take());
    }

    /// Copies the rows of the one table in `work`, around what cannot be read of it.
    fn copy_table(&mut self, name: &str, table: &LiveTable) -> Result<(), LogError> {
        let (Some(first), Some(last)) = (parse_key(&table.smallest), parse_key(&table.largest)) else {
            self.damage.push(format!("{name}: its keys are not those of records"));
            return Ok(());
        };
        let db = match self.open_isolated() {
            Ok(db) => db,
            Err(error) => {
                self.damage.push(format!("{name}: {error}"));
                return Ok(());
            }
        };
        let mut from = first.offset;
        while let Err((at, error)) = self.copy_rows(&db, from)? {
            self.damage.push(format!("{name}: {error}"));
            match next_readable(&db, at, last.offset) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Copies rows from an offset on; gives where that ended, if it ended at something that cannot be read.
    fn copy_rows(&mut self, db: &DB, from: u64) -> Result<Result<(), (u64, rocksdb::Error)>, LogError> {
        let mut rows = db.raw_iterator_cf(&records(db));
        let mut at = from;
        rows.seek(from.to_be_bytes());
        while let Some((key, value)) = rows.item() {
            if let Some(found) = parse_key(key) {
                self.put(found, value)?;
                at = found.offset + 1;
            }
            rows.next();
        }
        Ok(rows.status().map_err(|error| (at, error)))
    }

    /// Tables that the MANIFEST does not name, where that is damaged. RocksDB takes those that are whole.
    fn unnamed_tables(&mut self, manifest: &Manifest) -> Result<(), LogError> {
        if self.damage.is_empty() {
            return Ok(());
        }
        let named: Vec<u64> = manifest.tables().map(|table| table.number).collect();
        for (number, path) in files::numbered(self.source, "sst").map_err(files_error)? {
            if named.contains(&number) {
                continue;
            }
            let name = file_name(&path);
            fs::create_dir_all(&self.work).map_err(|error| io_error(&self.work, &error))?;
            fs::copy(&path, self.work.join(&name)).map_err(|error| io_error(&path, &error))?;
            let options = options(false);
            if let Err(error) = DB::repair(&options, &self.work) {
                self.damage.push(format!("{name}: {error}"));
            } else if let Ok(db) = self.open_isolated()
                && let Err((_, error)) = self.copy_rows(&db, 0)?
            {
                self.damage.push(format!("{name}: {error}"));
            }
            remove(&self.work)?;
        }
        Ok(())
    }

    fn write_ahead(&mut self, manifest: &Manifest, each: u32) -> Result<(), LogError> {
        let family = manifest.family(RECORDS).map_or(USUAL_FAMILY, |(number, _)| number);
        for (number, path) in files::numbered(self.source, "log").map_err(files_error)? {
            if number < manifest.first_live_log() {
                continue;
            }
            let name = file_name(&path);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.damage.push(format!("{name}: {error}"));
                    continue;
                }
            };
            let scan = blocks::scan(&bytes, number);
            for (n, part) in scan.parts.iter().enumerate() {
                match part {
                    FilePart::Record { bytes, .. } => self.batch(family, bytes)?,
                    FilePart::Broken(broken) => {
                        self.damage.push(format!("{name} at byte {}: {}", broken.bad_at, broken.why));
                        let next = scan.parts.get(n + 1).and_then(|part| first_offset(family, part));
                        self.broken(family, each, broken, next)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn batch(&mut self, family: u32, bytes: &[u8]) -> Result<(), LogError> {
        let Some(batch) = WriteAheadBatch::read(bytes) else { return Ok(()) };
        for op in batch.ops {
            match op {
                Op::Put { family: found, key, value } if found == family => {
                    if let Some(at) = parse_key(key) {
                        self.put(at, value)?;
                    }
                }
                Op::Delete { family: found, key } if found == family => self.rows.delete_cf(&records(&self.new), key),
                _ => {}
            }
        }
        Ok(())
    }

    /// Copies the rows that can be found in a broken stretch. `next` is the offset of the first record after it.
    fn broken(&mut self, family: u32, each: u32, broken: &Broken, next: Option<u64>) -> Result<(), LogError> {
        let found = find_rows(family, each, &broken.bytes);
        let before = self.end;
        for (n, (at, value)) in found.iter().enumerate() {
            let previous = n.checked_sub(1).map_or(before, |n| found[n].0.offset + 1);
            let following = found.get(n + 1).map(|(at, _)| at.offset).or(next);
            // A key has no checksum of its own; a wrong one fits neither side.
            if at.offset == previous || Some(at.offset + 1) == following {
                self.put(*at, value)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, at: Position, value: &[u8]) -> Result<(), LogError> {
        self.rows.put_cf(&records(&self.new), key_of(at), value);
        self.end = self.end.max(at.offset + 1);
        self.count += 1;
        if self.rows.size_in_bytes() >= BATCH {
            (self.progress)(self.count);
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), LogError> {
        // Not synced: the whole is flushed at the end.
        self.new.write(std::mem::take(&mut self.rows)).map_err(unavailable)
    }

    /// Lists what is missing, and gives the new log its identity.
    fn finish(mut self, partitions: u32) -> Result<Salvaged, LogError> {
        self.write()?;
        let (mut missing, mut count, mut end) = (Vec::new(), 0, 0);
        for row in self.new.iterator_cf(&records(&self.new), IteratorMode::Start) {
            let (key, _) = row.map_err(unavailable)?;
            let Some(at) = parse_key(&key) else { continue };
            if at.offset > end {
                missing.push((end, at.offset));
            }
            (count, end) = (count + 1, at.offset + 1);
        }
        self.new.flush_cf(&records(&self.new)).map_err(unavailable)?;
        self.new.put_opt(HOLES, Holes(missing.clone()).encode(), &synced()).map_err(unavailable)?;
        let identity = identity::name_salvaged(&self.new, self.identity, partitions, end)?;
        Ok(Salvaged { records: count, end, epoch: identity.epoch(), missing, damage: self.damage })
    }
}

/// The first offset from `from` on that can be read, up to `last`.
fn next_readable(db: &DB, from: u64, last: u64) -> Option<u64> {
    let is_readable = |offset: u64| {
        let mut rows = db.raw_iterator_cf(&records(db));
        rows.seek(offset.to_be_bytes());
        rows.status().is_ok() && rows.valid()
    };
    let near = last.min(from.saturating_add(NEAR));
    if let Some(found) = (from + 1..=near).find(|offset| is_readable(*offset)) {
        return Some(found);
    }
    // Far away a table has lost more than a block, so distances grow; the place found is made exact by halves.
    let (mut bad, mut step) = (near, NEAR);
    while bad < last {
        let next = last.min(bad + step);
        if is_readable(next) {
            let (mut bad, mut good) = (bad, next);
            while good - bad > 1 {
                let middle = bad + (good - bad) / 2;
                if is_readable(middle) { good = middle } else { bad = middle }
            }
            return Some(good);
        }
        (bad, step) = (next, step * 2);
    }
    None
}

fn first_offset(family: u32, part: &FilePart<'_>) -> Option<u64> {
    let FilePart::Record { bytes, .. } = part else { return None };
    WriteAheadBatch::read(bytes)?.ops.iter().find_map(|op| match op {
        Op::Put { family: found, key, .. } if *found == family => Some(parse_key(key)?.offset),
        _ => None,
    })
}

/// Rows of records in bytes that begin and end anywhere.
fn find_rows(family: u32, each: u32, bytes: &[u8]) -> Vec<(Position, &[u8])> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let mut after = rest;
        if let Some(Op::Put { family: number, key, value }) = read_op(&mut after)
            && number == family
            && let Some(at) = parse_key(key)
            && is_record(at, each, value)
        {
            found.push((at, value));
            rest = after;
        } else {
            rest = &rest[1..];
        }
    }
    found
}

/// Whether a row is one of Weft's, at a position that it can have.
fn is_record(at: Position, each: u32, value: &[u8]) -> bool {
    if at.partition >= each * Topic::ALL.len() as u32 {
        return false;
    }
    match decode(Topic::locate(at.partition, each).0, value) {
        Stored::Record(record) => record.is_ok_and(|record| partition_of(&record, each) == at.partition),
        // A later version reads it.
        Stored::Newer(_) => true,
    }
}

fn unavailable(error: rocksdb::Error) -> LogError {
    LogError::Unavailable(error.to_string())
}

fn io_error(path: &Path, error: &std::io::Error) -> LogError {
    LogError::Unavailable(format!("{}: {error}", path.display()))
}

fn files_error(error: FilesError) -> LogError {
    LogError::Unavailable(error.to_string())
}

fn remove(path: &Path) -> Result<(), LogError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error(path, &error)),
        _ => Ok(()),
    }
}
