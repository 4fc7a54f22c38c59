//! Projections made anew from the log, beside the old ones, and then swapped in.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Projector;
use crate::app::{StartError, open_log};
use crate::config::Config;
use crate::log::{Log, LogError};
use crate::store::{Store, StoreError};

/// Records taken from the log at once: more than live, since nobody waits.
const BATCH: usize = 8_192;
const WAIT: Duration = Duration::from_secs(5);

/// Why projections were not rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot move the projections: {0}")]
    Move(#[from] std::io::Error),
    #[error("the projections have not read the whole log: start the server, stop it, and check again")]
    Behind,
    #[error("the projections differ from the log in {0}")]
    Differs(String),
}

/// What a rebuild went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebuilt {
    pub records: u64,
}

/// Rebuilds the projections of a stopped server and swaps them in. `progress` hears how many records are done.
pub fn rebuild(config: &Config, progress: impl FnMut(u64)) -> Result<Rebuilt, RebuildError> {
    let log = open_log(config)?;
    let (fresh, old) = (config.data.join("projections.new"), config.data.join("projections.old"));
    let current = config.projections_dir();
    remove(&fresh)?;
    remove(&old)?;
    // Held open until the swap, so that no server starts on it meanwhile.
    let guard = Store::open(&current)?;
    let store = project_all(log.as_ref(), &fresh, progress)?;
    let records = store.1;
    store.0.flush()?;
    drop(store);
    drop(guard);
    std::fs::rename(&current, &old)?;
    std::fs::rename(&fresh, &current)?;
    remove(&old)?;
    log.close();
    Ok(Rebuilt { records })
}

/// Rebuilds beside the projections of a stopped server and compares row by row; changes nothing.
pub fn check(config: &Config, progress: impl FnMut(u64)) -> Result<Rebuilt, RebuildError> {
    let log = open_log(config)?;
    let fresh = config.data.join("projections.check");
    remove(&fresh)?;
    let current = Store::open(&config.projections_dir())?;
    let (store, records) = project_all(log.as_ref(), &fresh, progress)?;
    // After a kill the projections are older than the log, which is no difference but a place to go on from.
    let result = match current.progress()? == store.progress()? {
        true => compare(&current, &store),
        false => Err(RebuildError::Behind),
    };
    drop(store);
    remove(&fresh)?;
    log.close();
    result.map(|()| Rebuilt { records })
}

/// Projects the whole log, up to its end of now, into a new store.
fn project_all(log: &dyn Log, path: &Path, mut progress: impl FnMut(u64)) -> Result<(Arc<Store>, u64), RebuildError> {
    let (store, begin) = Store::open_for(path, log.epoch(), log.partitions())?;
    let store = Arc::new(store);
    let bounds = log.bounds()?;
    let starts: Vec<u64> = bounds.iter().map(|bounds| bounds.start).collect();
    let mut projector = Projector::new(store.clone(), log, begin);
    let mut reader = log.reader(&starts)?;
    let mut records = 0;
    while reader.positions().iter().zip(&bounds).any(|(next, bounds)| *next < bounds.end) {
        let before = reader.positions().clone();
        let entries = reader.next(BATCH, WAIT)?;
        // It may have passed what only the log itself needs.
        if entries.is_empty() && *reader.positions() == before {
            return Err(LogError::Unavailable("the log does not give what it holds".into()).into());
        }
        let mut done = 0;
        loop {
            done += projector.project(&entries[done..], reader.positions())?.0;
            if done >= entries.len() {
                break;
            }
        }
        records += entries.len() as u64;
        progress(records);
    }
    Ok((store, records))
}

/// Fails at the first row in which two stores differ.
pub fn compare(a: &Store, b: &Store) -> Result<(), RebuildError> {
    let (mut ours, mut theirs) = (a.rows(), b.rows());
    loop {
        match (ours.next().transpose()?, theirs.next().transpose()?) {
            (None, None) => return Ok(()),
            (x, y) if x == y => {}
            (x, y) => {
                let (family, key, _) = x.or(y).unwrap_or_default();
                return Err(RebuildError::Differs(format!("family {family}, key {:?}", String::from_utf8_lossy(&key))));
            }
        }
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
