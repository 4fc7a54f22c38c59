//! Holds an index that is not open against the events that it should have: each once, under its thread and time, up to where
//! it says it has come, and no others. Its words are held by the checksums of its files.
//!
//! Events are looked at in the order of their places in the log, so many at a time, and for these the columns of the whole index
//! are walked: it takes the same memory however large the index is.

use std::path::Path;

use tantivy::TantivyError;

use super::collect::Columns;
use super::index::{self, Looked, thread_hash};
use super::words::Stems;
use crate::panics;
use crate::store::{Partition, Place, Store, StoreError};

/// Events that are looked at together.
const WINDOW: usize = 500_000;
/// Of them, how many are read at once.
const CHUNK: usize = 4_096;

/// Why an index was not proved to have what it should.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the index of search is damaged: {0}")]
    Damaged(String),
    #[error("the index of search is of {0}; a start makes it anew")]
    Other(String),
    #[error("thread {thread} of {tenant}, seq {seq}: the event is {what} the index of search")]
    Event { tenant: String, thread: String, seq: u64, what: &'static str },
    #[error(
        "the index of search has an event that it should not have, of the record at {offset} in partition {partition}, seq {seq}"
    )]
    Surplus { partition: u32, offset: u64, seq: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<TantivyError> for VerifyError {
    fn from(error: TantivyError) -> VerifyError {
        VerifyError::Damaged(error.to_string())
    }
}

/// What was proved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedIndex {
    pub events: u64,
    /// Events that came after those.
    pub behind: u64,
}

/// Holds the index in `path` against the events of a store with this epoch. `progress` gets how many were looked at. Nothing
/// where there is no index.
pub fn verify(
    path: &Path,
    store: &Store,
    epoch: &str,
    progress: impl FnMut(u64),
) -> Result<Option<VerifiedIndex>, VerifyError> {
    if !path.join("meta.json").exists() {
        return Ok(None);
    }
    // Damaged files may lead the library to a panic as well as to an error.
    let verified = panics::caught(|| verify_files(path, store, epoch, progress));
    verified.unwrap_or_else(|why| Err(VerifyError::Damaged(why))).map(Some)
}

fn verify_files(
    path: &Path,
    store: &Store,
    epoch: &str,
    mut progress: impl FnMut(u64),
) -> Result<VerifiedIndex, VerifyError> {
    let Looked { view, progress: reached } = index::look(path)?;
    let mut places = vec![None; store.event_partitions() as usize];
    if let Some(reached) = reached {
        let (of, language) = reached.origin();
        if of != epoch {
            return Err(VerifyError::Other(format!("the log {of}, and this is {epoch}")));
        }
        if Stems::of(language).is_none() || !reached.is_current() {
            return Err(VerifyError::Other(format!("another version, or of the language {language:.40}")));
        }
        places = reached.places(places.len());
    }

    let mut columns = Vec::new();
    for segment in &view.segments {
        if view.searcher.segment_reader(segment.number).has_deletes() {
            return Err(VerifyError::Damaged("it says that events were deleted from it".to_owned()));
        }
        columns.push((Columns::open(&view, segment)?, segment.events));
    }

    let mut events = Events { store, places, at: (0, None), verified: VerifiedIndex::default() };
    let mut after = None;
    loop {
        let mut window = events.window()?;
        let is_last = window.len() < WINDOW;
        let to = window.last().filter(|_| !is_last).map(|last| last.key);
        for (columns, count) in &columns {
            for event in 0..*count {
                let key = columns.key(event, 0, 0);
                let key = (key.partition, key.offset, key.seq);
                if after.is_some_and(|after| key <= after) || to.is_some_and(|to| key > to) {
                    continue;
                }
                let Ok(at) = window.binary_search_by_key(&key, |expected| expected.key) else {
                    let (partition, offset, seq) = key;
                    return Err(VerifyError::Surplus { partition, offset, seq });
                };
                let expected = &mut window[at];
                if std::mem::replace(&mut expected.is_found, true) {
                    return Err(events.wrong(key, "twice in"));
                }
                if (columns.thread.get_val(event), columns.at.get_val(event)) != (expected.thread, expected.at) {
                    return Err(events.wrong(key, "under another thread or time in"));
                }
            }
        }
        if let Some(missing) = window.iter().find(|expected| !expected.is_found) {
            return Err(events.wrong(missing.key, "missing from"));
        }
        progress(events.verified.events);
        if is_last {
            return Ok(events.verified);
        }
        after = to;
    }
}

/// Partition, offset and seq.
type EventKey = (u32, u64, u64);

/// What the index should have of an event.
struct Expected {
    key: EventKey,
    thread: u64,
    at: u64,
    is_found: bool,
}

/// A walk over the events that an index should have.
struct Events<'s> {
    store: &'s Store,
    /// The last event of each partition that the index has.
    places: Vec<Option<Place>>,
    /// The partition that is walked, and the last event there.
    at: (usize, Option<Place>),
    verified: VerifiedIndex,
}

impl Events<'_> {
    /// The next events, in the order of their keys; fewer than [`WINDOW`] at the end.
    fn window(&mut self) -> Result<Vec<Expected>, StoreError> {
        let mut window = Vec::new();
        while window.len() < WINDOW && self.at.0 < self.places.len() {
            let (number, after) = self.at;
            let partition = number as u32;
            let found = self.store.arrivals(Partition::new(partition), after, CHUNK.min(WINDOW - window.len()))?;
            self.at = match found.last() {
                Some(last) => (number, Some(last.place)),
                None => (number + 1, None),
            };
            for arrival in found {
                let Place { offset, seq } = arrival.place;
                if self.places[number].is_none_or(|last| arrival.place > last) {
                    self.verified.behind += 1;
                    continue;
                }
                self.verified.events += 1;
                let thread = thread_hash(&arrival.tenant, &arrival.thread);
                window.push(Expected { key: (partition, offset, seq), thread, at: arrival.at, is_found: false });
            }
        }
        Ok(window)
    }

    fn wrong(&self, (partition, offset, seq): EventKey, what: &'static str) -> VerifyError {
        match self.store.arrival(Partition::new(partition), Place { offset, seq }) {
            Ok(Some(arrival)) => VerifyError::Event { tenant: arrival.tenant, thread: arrival.thread, seq, what },
            // It was there when the walk came by.
            Ok(None) => VerifyError::Surplus { partition, offset, seq },
            Err(error) => error.into(),
        }
    }
}
