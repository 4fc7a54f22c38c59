//! The embedded log's identity, in rows of the column family `default`: `epoch` (the log's id, as text), `partitions` (of
//! one topic, u32), `generation` (a framed [`GenerationRow`], from the second generation on) and `opened`.
//!
//! A copy of the log's folder goes its own way from where it was made, and so must be another generation. To notice it,
//! each opening makes the file `weft-opened` anew and keeps its birth time in the row `opened`. In a copy that file has
//! another birth time, and so it has where the files of an older copy are put over those of the log. What copies a whole
//! file system block by block is not noticed, and neither is anything where the file system has no birth times.
//!
//! Rows of this family are flushed when they are written: left in memory, they would keep every file of the write-ahead
//! log from being deleted.

use std::fs::File;
use std::path::Path;
use std::time::UNIX_EPOCH;

use bincode::{Decode, Encode};
use rocksdb::{DB, WriteBatch};

use super::format::synced;
use crate::codec;
use crate::log::{Cause, Continued, Identity, IfUnnamed, LogError};
use crate::{clock, log::Position};

const EPOCH: &str = "epoch";
const PARTITIONS: &str = "partitions";
const GENERATION: &str = "generation";
const OPENED: &str = "opened";

const OPENED_FILE: &str = "weft-opened";
const SCHEMA: u8 = 1;

#[derive(Encode, Decode)]
struct GenerationRow {
    generation: u32,
    tag: String,
    /// Epoch and end.
    continued: Vec<(String, u64)>,
    /// For people.
    cause: String,
    at: u64,
}

/// The identity of the log in `dir`, whose newest record is at `last`. A new log gets one, a copy another generation.
pub(super) fn open(
    db: &DB,
    dir: &Path,
    partitions: u32,
    last: Option<Position>,
    if_unnamed: IfUnnamed<'_>,
) -> Result<Identity, LogError> {
    let end = last.map_or(0, |last| last.offset + 1);
    let mut batch = WriteBatch::default();
    let identity = match (read(db)?, if_unnamed) {
        (Some(identity), _) => {
            check_partitions(db, partitions)?;
            identity
        }
        (None, IfUnnamed::Refuse) if end > 0 => {
            return Err(LogError::Unnamed(format!(
                "{} holds records, and no row says which log they are",
                dir.display()
            )));
        }
        (None, _) => {
            let identity = match if_unnamed {
                IfUnnamed::Name(Some(epoch)) if end > 0 => Identity::of_epoch(epoch),
                _ => Identity::random(),
            };
            batch.put(EPOCH, &identity.id);
            batch.put(PARTITIONS, partitions.to_be_bytes());
            if end > 0 { put_next(&mut batch, &identity, Cause::Discarded, end) } else { identity }
        }
    };

    let (copied, born) = enter(db, dir)?;
    let identity = if copied { put_next(&mut batch, &identity, Cause::Copied, end) } else { identity };
    match born {
        Some(born) => batch.put(OPENED, born.to_be_bytes()),
        None => batch.delete(OPENED),
    }
    write(db, batch)?;
    // Until this is done, a later opening finds the new file beside the old one.
    std::fs::rename(dir.join(OPENED_FILE).with_extension("new"), dir.join(OPENED_FILE)).map_err(|e| failed(dir, &e))?;
    Ok(identity)
}

/// Begins the generation after `identity`; the log ends at `end`.
pub(super) fn begin_generation(db: &DB, identity: &Identity, cause: Cause, end: u64) -> Result<Identity, LogError> {
    let mut batch = WriteBatch::default();
    let next = put_next(&mut batch, identity, cause, end);
    write(db, batch)?;
    Ok(next)
}

fn put_next(batch: &mut WriteBatch, identity: &Identity, cause: Cause, end: u64) -> Identity {
    let next = identity.next(cause, Vec::new(), end);
    let row = GenerationRow {
        generation: next.generation,
        tag: next.tag.clone(),
        continued: next.continued.iter().map(|it| (it.epoch.clone(), it.end)).collect(),
        cause: cause.as_str().to_owned(),
        at: clock::now_ms(),
    };
    batch.put(GENERATION, codec::encode(SCHEMA, &row));
    tracing::warn!(
        cause = cause.as_str(),
        epoch = next.epoch(),
        "the log begins another generation: clients from before are told that they cannot resume"
    );
    next
}

/// What the log says of itself, if it does.
pub(super) fn read(db: &DB) -> Result<Option<Identity>, LogError> {
    let Some(id) = get(db, EPOCH)? else {
        return Ok(None);
    };
    let id = String::from_utf8(id).map_err(|_| LogError::Damaged("the epoch is not text".into()))?;
    let Some(bytes) = get(db, GENERATION)? else {
        return Ok(Some(Identity::new(id)));
    };
    let row: GenerationRow = codec::decode(SCHEMA, &bytes)
        .map_err(|error| LogError::Damaged(format!("the row of its generation cannot be read: {error}")))?;
    let continued = row.continued.into_iter().map(|(epoch, end)| Continued { epoch, end }).collect();
    Ok(Some(Identity { generation: row.generation, tag: row.tag, continued, ..Identity::new(id) }))
}

/// Of one topic.
pub(super) fn partitions(db: &DB) -> Result<Option<u32>, LogError> {
    Ok(get(db, PARTITIONS)?.and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?))))
}

/// Gives a log that was salvaged its identity: the generation after the one that was damaged, if that can still be read.
pub(super) fn name_salvaged(
    db: &DB,
    before: Option<Identity>,
    partitions: u32,
    end: u64,
) -> Result<Identity, LogError> {
    let mut batch = WriteBatch::default();
    let identity = before.unwrap_or_else(Identity::random);
    batch.put(EPOCH, &identity.id);
    batch.put(PARTITIONS, partitions.to_be_bytes());
    let next = put_next(&mut batch, &identity, Cause::Salvaged, end);
    write(db, batch)?;
    Ok(next)
}

fn check_partitions(db: &DB, configured: u32) -> Result<(), LogError> {
    let found = partitions(db)?.ok_or_else(|| LogError::Damaged("the number of partitions is missing".into()))?;
    if found == configured { Ok(()) } else { Err(LogError::PartitionMismatch { found, configured }) }
}

/// Whether the folder is a copy of the one that was opened last, and the birth time of the file that this opening made.
fn enter(db: &DB, dir: &Path) -> Result<(bool, Option<u64>), LogError> {
    let known = get(db, OPENED)?.and_then(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?)));
    let file = dir.join(OPENED_FILE);
    let new = file.with_extension("new");
    // The newer one is there when an opening ended before its last step.
    let copied = known.is_some() && known != birth(&file) && known != birth(&new);

    drop(std::fs::remove_file(&new));
    let made = File::create(&new).and_then(|file| file.sync_all()).and_then(|()| File::open(dir)?.sync_all());
    made.map_err(|error| failed(dir, &error))?;
    Ok((copied, birth(&new)))
}

/// When a file was made, in nanoseconds, if it is there and its file system knows.
fn birth(path: &Path) -> Option<u64> {
    let since = path.metadata().ok()?.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_nanos()).ok()
}

fn get(db: &DB, name: &str) -> Result<Option<Vec<u8>>, LogError> {
    db.get(name).map_err(|error| LogError::Unavailable(error.to_string()))
}

/// Writes rows and flushes them.
fn write(db: &DB, batch: WriteBatch) -> Result<(), LogError> {
    db.write_opt(batch, &synced()).and_then(|()| db.flush()).map_err(|error| LogError::Unavailable(error.to_string()))
}

fn failed(dir: &Path, error: &std::io::Error) -> LogError {
    LogError::Unavailable(format!("{}: {error}", dir.display()))
}
