//! Holds projections against the log that they say they are of: makes them anew from the log, up to where they have come, in a
//! store of its own, and compares row by row. Nothing is changed.
//!
//! That is the only way that finds everything: which event has which seq, and so each thread's chain of hashes, is what the
//! projector makes of the records, and a shorter way would have to judge them a second time in other words.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::opening::{self, OpenError};
use super::rebuild::{Projecting, RebuildError, remove};
use crate::log::{Log, LogError, Topic};
use crate::store::{Compared, Difference, Origin, Progress, Store, StoreError, damage};

/// Why projections were not proved to be what the log makes.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the projections are not what the log makes: {0}")]
    Differs(Box<Difference>),
    #[error(
        "the projections are not what the log makes: {what} of partition {partition} of {topic}; expected {expected}, found \
         {found}"
    )]
    Progress { topic: String, partition: u32, what: &'static str, expected: String, found: String },
    #[error("the projections are damaged: {0}")]
    Damaged(String),
    #[error(
        "the projections have not read all of a topic that is compacted, so what they were made from may be gone: start the \
         server, stop it, and verify again"
    )]
    NotCaughtUp,
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(StoreError),
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    #[error(transparent)]
    Open(OpenError),
    #[error("{}: {error}", path.display())]
    Scratch { path: PathBuf, error: std::io::Error },
}

impl From<StoreError> for VerifyError {
    fn from(error: StoreError) -> VerifyError {
        match error.is_damage_at_rest() {
            true => VerifyError::Damaged(error.to_string()),
            false => VerifyError::Store(error),
        }
    }
}

impl From<OpenError> for VerifyError {
    fn from(error: OpenError) -> VerifyError {
        match error {
            OpenError::Store(error) => error.into(),
            other => VerifyError::Open(other),
        }
    }
}

/// What was proved.
pub struct Verified {
    /// All that the log has.
    pub records: u64,
    /// What the log makes, all of it.
    pub made: MadeStore,
    /// Of the projections, as far as they have come; of what the log makes where there are none.
    pub compared: Compared,
    /// How many records the projections have not read; nothing where there are none.
    pub behind: Option<u64>,
}

/// A store that is deleted once it is no longer used. In this order: it is closed before.
pub struct MadeStore {
    pub store: Arc<Store>,
    _folder: Scratch,
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "what was made to compare with is left");
        }
    }
}

/// Where a verification is.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// So many of so many records were projected.
    Records { done: u64, of: u64 },
    /// So many rows were compared.
    Rows(u64),
}

/// Holds the projections of a stopped server against its log. What the log makes is put into `scratch`, which is deleted before
/// and after.
pub fn verify(
    log: &dyn Log,
    projections: &Path,
    scratch: &Path,
    mut progress: impl FnMut(Step),
) -> Result<Verified, VerifyError> {
    let _held = damage::hold(projections)?;
    let current = match Store::open_read_only(projections)? {
        Some(store) => origin(log, projections, &store)?.map(|origin| (store, origin)),
        None => None,
    };
    let ends = log.ends()?;
    opening::check_starts(log, &log.bounds()?).map_err(OpenError::Shortened)?;

    remove(scratch).map_err(|error| VerifyError::Scratch { path: scratch.to_owned(), error })?;
    let folder = Scratch(scratch.to_owned());
    let mut projecting = Projecting::begin(log, scratch)?;
    let of = log.between(&positions(&projecting.store)?, &ends);
    let (mut compared, mut behind) = (None, None);
    if let Some((store, Origin { positions, .. })) = &current {
        if log.is_shared() && lacks_compacted(log, positions, &ends) {
            return Err(VerifyError::NotCaughtUp);
        }
        projecting.to(positions, &mut |done| progress(Step::Records { done, of }))?;
        compare_progress(log, &projecting.store, store)?;
        let rows = projecting.store.compare(store, |rows| progress(Step::Rows(rows)))?;
        compared = Some(rows.map_err(|difference| VerifyError::Differs(Box::new(difference)))?);
        behind = Some(log.between(positions, &ends));
    }
    projecting.to(&ends, &mut |done| progress(Step::Records { done, of }))?;

    let Projecting { store, records, .. } = projecting;
    let compared = match compared {
        Some(compared) => compared,
        None => store.count()?,
    };
    Ok(Verified { records, made: MadeStore { store, _folder: folder }, compared, behind })
}

/// What the projections are of, if they fit the log; nothing if they are empty.
fn origin(log: &dyn Log, path: &Path, store: &Store) -> Result<Option<Origin>, VerifyError> {
    if let Some(why) = damage::mark(path) {
        return Err(VerifyError::Damaged(why));
    }
    let Some(origin) = opening::examine(path, store, log)? else {
        return match store.count()?.rows {
            0 => Ok(None),
            rows => Err(VerifyError::Damaged(format!("they have {rows} rows, and none says of which log they are"))),
        };
    };
    match origin.is_readable() {
        true => Ok(Some(origin)),
        false => Err(VerifyError::Store(StoreError::OtherVersion(path.to_owned()))),
    }
}

fn positions(store: &Store) -> Result<Vec<u64>, StoreError> {
    Ok(store.progress()?.unwrap_or_default().iter().map(|progress| progress.next).collect())
}

/// Of receipts that came later, a compacted topic may have kept only those.
fn lacks_compacted(log: &dyn Log, positions: &[u64], ends: &[u64]) -> bool {
    let lacks = |partition: &u32| positions[*partition as usize] < ends[*partition as usize];
    (0..log.partitions()).filter(|partition| log.topic_of(*partition).0 == Topic::Receipts).any(|it| lacks(&it))
}

fn compare_progress(log: &dyn Log, made: &Store, found: &Store) -> Result<(), VerifyError> {
    let (made, found) = (made.progress()?.unwrap_or_default(), found.progress()?.unwrap_or_default());
    for (partition, (made, found)) in (0..).zip(made.iter().zip(&found)) {
        let (expected, was) = (told(made), told(found));
        if let Some(((what, expected), (_, found))) = expected.into_iter().zip(was).find(|(made, found)| made != found)
        {
            let (topic, partition) = log.topic_of(partition);
            let topic = log.topic_name(topic);
            return Err(VerifyError::Progress { topic, partition, what, expected, found });
        }
    }
    Ok(())
}

/// How far a partition has come, field by field.
fn told(progress: &Progress) -> [(&'static str, String); 6] {
    let Progress { next, log_time, last_at, purged_to, hash, rules } = *progress;
    [
        ("the position", next.to_string()),
        ("the log's time", log_time.to_string()),
        ("the time of the last record", last_at.to_string()),
        ("the time up to which keys are purged", purged_to.to_string()),
        ("the hash over all events", blake3::Hash::from_bytes(hash).to_string()),
        ("the version of the rules", rules.to_string()),
    ]
}
