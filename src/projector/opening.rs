//! Which projections go on with a log, and which are refused.
//!
//! Invariant: projections that do not fit the log are never thrown away by themselves. They may be the only copy of what
//! the log has lost, and the log that is there may be the wrong one. Whoever starts the server reads what differs, and
//! says what is to be done; `weft rebuild --discard` is how ([`super::rebuild`]).
//!
//! Projections fit when they were made from this log's generation, or from one that it shares those records with, and the
//! log still holds what comes after them. Those whose rows are of an older version and that fit are made anew.

use std::path::{Path, PathBuf};

use crate::log::{Bounds, Cause, Identity, Log, LogError};
use crate::store::{Origin, Progress, Store, StoreError};

/// Why projections were not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the projections in {} do not fit the log: {misfit}. Nothing was changed. Either put the log back that they were \
         made from; or start with another --data; or, if this log is the right one, run `weft rebuild --discard`: it \
         discards the projections, makes them anew from this log, and begins another generation of it, so that no client \
         resumes at a place that is not what it was",
        path.display()
    )]
    Misfit { path: PathBuf, misfit: Misfit },
    #[error(
        "{0}. Nothing was changed. Either put the whole log back; or, if what it holds now is all there is, run \
         `weft rebuild --discard`: it makes the projections from what is left, and begins another generation of the log"
    )]
    Shortened(Gone),
}

/// How projections and a log differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    #[error("they were made from the log {projections}, and this is the log {log}")]
    OtherLog { projections: String, log: String },
    #[error("they were made from the log's generation {projections}, and the log has begun {log} since")]
    EarlierGeneration { projections: String, log: String },
    #[error("they were made from the log's generation {projections}, which this copy of it does not know: it is {log}")]
    LaterGeneration { projections: String, log: String },
    #[error("they have {projections} partitions, and the log has {log}")]
    Partitions { projections: usize, log: usize },
    #[error(
        "they have read partition {partition} of {topic} up to offset {next}, and it ends at {end}: the log was rolled \
         back, truncated, or an older copy of it was put back"
    )]
    AheadOfLog { topic: String, partition: u32, next: u64, end: u64 },
    #[error("they have read partition {partition} of {topic} up to offset {next}, and it begins at {start} now")]
    BeforeLog { topic: String, partition: u32, next: u64, start: u64 },
    #[error("they were made by a newer version of Weft (rows of version {rows}); that one reads them")]
    Newer { rows: u8 },
}

/// Records that a log held when its generation began, and has lost since.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "records were deleted from the log: partition {partition} of {topic} begins at offset {start}, and began at {began}"
)]
pub struct Gone {
    topic: String,
    partition: u32,
    start: u64,
    began: u64,
}

/// Opens projections where they stand, or begins them. `store` is the one in `path`.
pub fn resume(path: &Path, store: Store, log: &dyn Log) -> Result<(Store, Vec<Progress>), OpenError> {
    let Some(origin) = examine(path, &store, log)? else {
        let mut store = store;
        // Projections that were damaged were this log's, as far as anybody knows: it was not put back.
        if store.set_aside().is_none() {
            begin_if_restored(log)?;
        }
        let progress = begin(&mut store, log)?;
        return Ok((store, progress));
    };
    if origin.is_readable() {
        if origin.epoch != log.epoch() {
            store.continue_as(&log.epoch(), &log.identity().starts)?;
        }
        let progress = store.progress()?.unwrap_or_default();
        return Ok((store, progress));
    }
    tracing::warn!(rows = origin.rows, "the projections are of an older version: making them anew");
    let mut store = store.replace_outdated(origin.rows)?;
    let progress = begin(&mut store, log)?;
    Ok((store, progress))
}

/// What the projections in `path` were made from, if there are any, once it is certain that they fit the log.
pub(super) fn examine(path: &Path, store: &Store, log: &dyn Log) -> Result<Option<Origin>, OpenError> {
    let bounds = log.bounds()?;
    let origin = store.origin()?;
    if let Some(origin) = &origin {
        compare(origin, log, &bounds).map_err(|misfit| OpenError::Misfit { path: path.to_owned(), misfit })?;
    }
    check_starts(log, &bounds).map_err(OpenError::Shortened)?;
    Ok(origin)
}

fn compare(origin: &Origin, log: &dyn Log, bounds: &[Bounds]) -> Result<(), Misfit> {
    if origin.is_newer() {
        return Err(Misfit::Newer { rows: origin.rows });
    }
    let (identity, made_from) = (log.identity(), Identity::of_epoch(&origin.epoch));
    let (projections, epoch) = (origin.epoch.clone(), identity.epoch());
    if made_from.id != identity.id {
        return Err(Misfit::OtherLog { projections, log: epoch });
    }
    if origin.positions.len() != bounds.len() {
        return Err(Misfit::Partitions { projections: origin.positions.len(), log: bounds.len() });
    }

    let at = |partition| {
        let (topic, within) = log.topic_of(partition);
        (log.topic_name(topic), within)
    };
    let positions = || (0..).zip(origin.positions.iter().zip(bounds));
    if let Some((partition, (&next, bounds))) = positions().find(|(_, (next, bounds))| **next > bounds.end) {
        let (topic, partition) = at(partition);
        return Err(Misfit::AheadOfLog { topic, partition, next, end: bounds.end });
    }
    if !identity.made(&origin.epoch, &origin.positions) {
        return Err(match made_from.generation <= identity.generation {
            true => Misfit::EarlierGeneration { projections, log: epoch },
            false => Misfit::LaterGeneration { projections, log: epoch },
        });
    }
    if let Some((partition, (&next, bounds))) = positions().find(|(_, (next, bounds))| **next < bounds.start) {
        let (topic, partition) = at(partition);
        return Err(Misfit::BeforeLog { topic, partition, next, start: bounds.start });
    }
    Ok(())
}

/// Whether the log holds what it held when its generation began.
pub(super) fn check_starts(log: &dyn Log, bounds: &[Bounds]) -> Result<(), Gone> {
    let identity = log.identity();
    for (partition, bounds) in bounds.iter().enumerate() {
        let began = identity.start(partition);
        if bounds.start > began {
            let (topic, partition) = log.topic_of(partition as u32);
            return Err(Gone { topic: log.topic_name(topic), partition, start: bounds.start, began });
        }
    }
    Ok(())
}

/// A log of one node that has records and no projections was most likely put back from a copy: that is how OPERATIONS.md
/// says to do it. What clients have seen after the copy was made is not in it.
pub(super) fn begin_if_restored(log: &dyn Log) -> Result<(), LogError> {
    if log.is_shared() || log.bounds()?.iter().all(|bounds| bounds.end == 0) {
        return Ok(());
    }
    log.new_generation(Cause::Restored)
}

/// Makes an empty store the projections of a log, from its oldest record on.
pub(super) fn begin(store: &mut Store, log: &dyn Log) -> Result<Vec<Progress>, OpenError> {
    let starts: Vec<u64> = log.bounds()?.iter().map(|bounds| bounds.start).collect();
    Ok(store.begin(&log.epoch(), log.partitioning(), &log.identity().starts, &starts)?)
}
