//! Projections made anew from the log, beside the old ones, and then swapped in.
//!
//! [`rebuild`] makes those anew that fit the log. [`discard`] makes them anew whatever they are, as a person's word: the log
//! begins another generation, unless it already has since they were made.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::opening::{self, OpenError};
use super::{ProjectError, Projector};
use crate::log::{Cause, Identity, Log, LogError, Positions};
use crate::store::{Difference, Origin, Store, StoreError, StoreMemory};

/// Records read from the log at once: more than live, since no client waits.
const BATCH: usize = 8_192;
const WAIT: Duration = Duration::from_secs(5);

/// Why projections were not rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Project(#[from] ProjectError),
    #[error("cannot move the projections: {0}")]
    Move(#[from] std::io::Error),
    #[error("the projections have not read the whole log: start the server, stop it, and check again")]
    NotCaughtUp,
    #[error("the projections differ from the log: {0}")]
    Differs(Box<Difference>),
}

/// What a rebuild has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebuilt {
    pub records: u64,
}

/// Rebuilds the projections of a stopped server, if they fit the log, and swaps them in. Damaged ones are set aside, as a
/// start of the server does it. `progress` gets how many records are done.
pub fn rebuild(log: &dyn Log, projections: &Path, progress: impl FnMut(u64)) -> Result<Rebuilt, RebuildError> {
    let current = Store::open_or_set_aside(projections, StoreMemory::default())?;
    // Damaged ones were this log's, as far as anybody knows.
    if opening::examine(projections, &current, log)?.is_none() && current.set_aside().is_none() {
        opening::begin_if_restored(log)?;
    }
    replace(log, projections, Some(current), progress)
}

/// Rebuilds the projections of a stopped server, whatever stands there. Clients that come back from before the log's new
/// generation learn that they cannot resume.
pub fn discard(log: &dyn Log, projections: &Path, progress: impl FnMut(u64)) -> Result<Rebuilt, RebuildError> {
    let current = match Store::open(projections) {
        Ok(current) => Some(current),
        Err(error @ StoreError::InUse(_)) => return Err(error.into()),
        // They are discarded, so it is enough to know that no server has them.
        Err(_) => None,
    };
    let origin = current.as_ref().and_then(|current| current.origin().ok().flatten());
    if !has_begun_since(log, origin)? {
        log.new_generation(Cause::Discarded)?;
    }
    replace(log, projections, current, progress)
}

/// What the projections of a stopped server were made from, if that can be read.
pub fn origin(projections: &Path) -> Result<Option<Origin>, RebuildError> {
    match Store::open(projections) {
        Ok(store) => Ok(store.origin().ok().flatten()),
        Err(error @ StoreError::InUse(_)) => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Whether the log's generation is one that began after these projections were made, and holds what it held then. Several
/// nodes discard theirs one after the other, and the log begins one generation for all of them.
fn has_begun_since(log: &dyn Log, origin: Option<Origin>) -> Result<bool, RebuildError> {
    let Some(origin) = origin else { return Ok(false) };
    let (identity, made_from) = (log.identity(), Identity::of_epoch(&origin.epoch));
    let is_later = made_from.id == identity.id && made_from.generation < identity.generation;
    let unsettled = is_later && !identity.made(&origin.epoch, &origin.positions);
    Ok(unsettled && opening::check_starts(log, &log.bounds()?).is_ok())
}

/// Swaps new projections in. The current ones are held open until then, so that no server starts on them meanwhile.
fn replace(
    log: &dyn Log,
    projections: &Path,
    current: Option<Store>,
    progress: impl FnMut(u64),
) -> Result<Rebuilt, RebuildError> {
    let (new, old) = (projections.with_extension("new"), projections.with_extension("old"));
    remove(&new)?;
    remove(&old)?;

    let (store, records) = project_all(log, &new, progress)?;
    store.flush()?;
    drop(store);
    drop(current);

    std::fs::rename(projections, &old)?;
    std::fs::rename(&new, projections)?;
    remove(&old)?;
    Ok(Rebuilt { records })
}

/// Rebuilds beside the projections of a stopped server and compares row by row; changes nothing.
pub fn check(log: &dyn Log, projections: &Path, progress: impl FnMut(u64)) -> Result<Rebuilt, RebuildError> {
    let new = projections.with_extension("check");
    remove(&new)?;

    let current = Store::open(projections)?;
    opening::examine(projections, &current, log)?;
    let (store, records) = project_all(log, &new, progress)?;
    // After a kill the projections are older than the log. That is no difference: the next start goes on from there.
    let result = if current.progress()? == store.progress()? {
        compare(&store, &current)
    } else {
        Err(RebuildError::NotCaughtUp)
    };
    drop(store);
    remove(&new)?;
    result.map(|()| Rebuilt { records })
}

/// Projects the whole log, up to its end of now, into a new store.
fn project_all(log: &dyn Log, path: &Path, mut progress: impl FnMut(u64)) -> Result<(Arc<Store>, u64), RebuildError> {
    let mut projecting = Projecting::begin(log, path)?;
    projecting.to(&log.ends()?, &mut progress)?;
    Ok((projecting.store, projecting.records))
}

/// A log on its way into a store that is made of it alone.
pub(super) struct Projecting<'l> {
    log: &'l dyn Log,
    pub(super) store: Arc<Store>,
    projector: Projector,
    pub(super) records: u64,
}

impl<'l> Projecting<'l> {
    /// An empty store in `path`.
    pub(super) fn begin(log: &'l dyn Log, path: &Path) -> Result<Projecting<'l>, RebuildError> {
        let mut store = Store::open(path)?;
        let begin = opening::begin(&mut store, log)?;
        let store = Arc::new(store);
        Ok(Projecting { log, projector: Projector::new(store.clone(), log, begin), store, records: 0 })
    }

    /// Goes on up to these positions, and no further. `progress` gets how many records are done.
    pub(super) fn to(&mut self, ends: &[u64], progress: &mut impl FnMut(u64)) -> Result<(), RebuildError> {
        let mut reader = self.log.reader(&self.projector.positions())?;
        while reader.positions().iter().zip(ends).any(|(next, end)| next < end) {
            let before = reader.positions().clone();
            let mut entries = reader.next(BATCH, WAIT)?;
            // Without entries the position may still move: past what Kafka writes for itself.
            if entries.is_empty() && *reader.positions() == before {
                return Err(LogError::Unavailable("it does not return the records that it holds".into()).into());
            }
            entries.retain(|entry| entry.at.offset < ends[entry.at.partition as usize]);
            let positions: Positions = reader.positions().iter().zip(ends).map(|(next, end)| *next.min(end)).collect();

            let mut done = 0;
            loop {
                let (applied, _) = self.projector.project(&entries[done..], &positions)?;
                done += applied;
                if done >= entries.len() {
                    break;
                }
            }

            self.records += entries.len() as u64;
            progress(self.records);
        }
        Ok(())
    }
}

/// Fails at the first row in which a store is not as another one.
pub fn compare(expected: &Store, found: &Store) -> Result<(), RebuildError> {
    match expected.compare(found, |_| {})? {
        Ok(_) => Ok(()),
        Err(difference) => Err(RebuildError::Differs(Box::new(difference))),
    }
}

pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
