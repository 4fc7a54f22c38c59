//! Looks at a log that is not open, without changing it: what `weft doctor` says of it.

use std::path::Path;

use rocksdb::{DB, IteratorMode, ReadOptions};

use super::files::{self, FilesError, LogFolder};
use super::format::{Holes, descriptors, options, parse_key, records};
use super::{identity, opening};
use crate::log::LogError;

/// What a log's folder holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Examined {
    pub records: u64,
    /// The offset that the next record gets.
    pub end: u64,
    pub epoch: Option<String>,
    /// Of one topic.
    pub partitions: Option<u32>,
    /// Offsets that the log says it is without, since it was salvaged.
    pub holes: Vec<(u64, u64)>,
    /// Where something follows the last batch: a write that was cut off, or older bytes.
    pub rest: Option<String>,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// Reads every file and every record; `progress` gets how many records were read. `None` where there is no log.
pub fn examine(dir: &Path, progress: impl FnMut(u64)) -> Result<Option<Examined>, LogError> {
    let _lock = opening::lock_existing(dir)?;
    let mut examined = Examined::default();
    match files::check(dir) {
        Ok(LogFolder::Nothing) => return Ok(None),
        Ok(LogFolder::Log(whole)) => examined.rest = whole.rest,
        Err(FilesError::Damaged(what)) => examined.problems.push(what),
        Err(FilesError::Io(what)) => return Err(LogError::Unavailable(what)),
    }
    if dir.join("CURRENT").exists() {
        let problem = examined.read(dir, progress).err();
        examined.problems.extend(problem);
    }
    Ok(Some(examined))
}

impl Examined {
    fn read(&mut self, dir: &Path, mut progress: impl FnMut(u64)) -> Result<(), String> {
        let options = options(false);
        let db = DB::open_cf_descriptors_read_only(&options, dir, descriptors(&options), false)
            .map_err(|error| error.to_string())?;
        let identity = identity::read(&db).map_err(|error| error.to_string())?;
        self.epoch = identity.map(|identity| identity.epoch());
        self.partitions = identity::partitions(&db).map_err(|error| error.to_string())?;
        let holes = opening::holes(&db).map_err(|error| error.to_string())?;
        self.holes.clone_from(&holes.0);

        let mut read = ReadOptions::default();
        read.fill_cache(false);
        read.set_readahead_size(1 << 20);
        for row in db.iterator_cf_opt(&records(&db), read, IteratorMode::Start) {
            let (key, _) = row.map_err(|error| error.to_string())?;
            self.count(&key, &holes)?;
            if self.records.is_multiple_of(10_000) {
                progress(self.records);
            }
        }
        Ok(())
    }

    fn count(&mut self, key: &[u8], holes: &Holes) -> Result<(), String> {
        let next = holes.skip(self.end);
        let at = parse_key(key).ok_or_else(|| format!("a key of {} bytes among the records, at {next}", key.len()))?;
        (self.records, self.end) = (self.records + 1, at.offset + 1);
        if at.offset == next { Ok(()) } else { Err(format!("the records {next}..{} are missing", at.offset)) }
    }
}
