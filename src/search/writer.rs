//! The thread that writes the index: takes what has come, adds it, commits now and then, and merges segments.
//!
//! It has the lowest priority that lets it go on, and is waited for by nobody. When the index cannot be written it is opened
//! again, from what was committed last; one that cannot be read is made anew.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tantivy::TantivyError;

use super::index::{self, Files, Merging, OpenError, Progress};
use super::merges;
use super::tail::{State, Tail};
use crate::clock;
use crate::panics;
use crate::store::{Place, Store, StoreError};
use crate::telemetry;

/// Between two looks at what has come, when nothing is to be done.
const PAUSE: Duration = Duration::from_millis(50);
/// After something failed.
const AGAIN: Duration = Duration::from_secs(2);
/// What has come is committed after this time, or once it is so much. Each commit syncs a dozen files on the disk that the log may
/// be on, and nobody who searches waits for one.
const COMMIT_AFTER: Duration = Duration::from_secs(3);
const COMMIT_EVENTS: u64 = 4_096;
/// The same while it catches up with what is long past.
const COMMIT_OLD_EVENTS: u64 = 50_000;
const COMMIT_OLD_AFTER: Duration = COMMIT_AFTER.saturating_mul(10);
/// What is older than this when it is taken is long past.
const OLD_MS: u64 = 10_000;
/// Events taken at once.
const CHUNK: usize = 16;
/// Events that wait of which the list is copied under the lock at once.
const COPIED: usize = 256;
/// Looking for damage reads all of the index, and is done at most so often.
const EXAMINE_EVERY: Duration = Duration::from_secs(60);
/// How much the thread lets others go first, from 0 to 19.
const NICE: i32 = 15;

/// What searches and the thread share.
pub struct Shared {
    pub store: Arc<Store>,
    pub tail: Tail,
    /// The index may be damaged: a search or the thread failed at it.
    pub suspected: AtomicBool,
    stopping: Mutex<bool>,
    woken: Condvar,
}

impl Shared {
    pub fn new(store: Arc<Store>, tail: Tail) -> Shared {
        Shared { store, tail, suspected: AtomicBool::new(false), stopping: Mutex::new(false), woken: Condvar::new() }
    }

    pub fn tail(&self) -> MutexGuard<'_, State> {
        self.tail.lock()
    }

    /// The index may be damaged. The thread looks whether it is, since what a search failed at may be anything, and made anew it
    /// is without what is long past for long.
    pub fn suspect(&self, why: &str) {
        if !self.suspected.swap(true, Ordering::AcqRel) {
            tracing::error!(why, "the index of search may be damaged, and is looked at");
        }
    }

    pub fn stop(&self) {
        *self.stopping.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.woken.notify_all();
    }

    /// Waits, unless the server stops; says whether it does.
    fn pause(&self, time: Duration) -> bool {
        let stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.woken.wait_timeout_while(stopping, time, |stopping| !*stopping);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What the thread works on.
pub struct Writer {
    pub shared: Arc<Shared>,
    pub path: PathBuf,
    pub language: String,
    /// What the index may hold in memory until it writes a segment.
    pub memory: usize,
}

/// What the thread knows of the index from one time that it opens it to the next.
#[derive(Default)]
struct Known {
    /// It is made anew.
    is_damaged: bool,
    /// It panicked at it the last time.
    panicked: bool,
    /// When it was last looked at for damage.
    examined: Option<Instant>,
}

/// Why a round failed.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Index(#[from] TantivyError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the index is damaged, and made anew")]
    Damaged,
    #[error("a panic: {0}")]
    Panicked(String),
}

impl Writer {
    /// Until the server stops.
    pub fn run(self) {
        // Refused where the system has no such priorities: then it competes like the others.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "the thread of search has the priority of the others");
        }
        // What was damaged in projections that were set aside may be in the index as events without words.
        let mut known = Known { is_damaged: self.shared.store.set_aside().is_some(), ..Known::default() };
        loop {
            let ended = panics::caught(|| self.index_until_stopped(&mut known));
            match ended.unwrap_or_else(|why| Err(WriteError::Panicked(why))) {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%error, "search is not indexed now, and tried again");
                    telemetry::search_failures().increment(1);
                    // What panics at once again is in the index: the next one is made anew.
                    let again = matches!(error, WriteError::Panicked(_));
                    known.is_damaged |= matches!(error, WriteError::Damaged) || (again && known.panicked);
                    known.panicked = again;
                    if let WriteError::Index(error) = &error
                        && index::may_be_damage(error)
                    {
                        self.shared.suspect(&error.to_string());
                    }
                }
            }
            if self.shared.pause(AGAIN) {
                return;
            }
        }
    }

    fn index_until_stopped(&self, known: &mut Known) -> Result<(), WriteError> {
        if known.is_damaged && self.path.exists() {
            std::fs::remove_dir_all(&self.path).map_err(OpenError::from)?;
        }
        known.is_damaged = false;
        let mut indexing = self.open()?;
        loop {
            indexing.examine(&mut known.examined)?;
            let is_level = indexing.round(false)?;
            let pause = if is_level { PAUSE } else { Duration::ZERO };
            if self.shared.pause(pause) {
                indexing.round(true)?;
                return Ok(());
            }
        }
    }

    /// The index; one that cannot be read, so much that reading it panics, is made anew.
    fn open_files(&self, wanted: &Progress) -> Result<Files, WriteError> {
        let open = || index::open(&self.path, wanted, self.memory);
        match panics::caught(open) {
            Ok(opened) => Ok(opened?),
            Err(why) => {
                tracing::warn!(why, "the index of search cannot be read: making it anew");
                std::fs::remove_dir_all(&self.path).map_err(OpenError::from)?;
                Ok(open()?)
            }
        }
    }

    fn open(&self) -> Result<Indexing<'_>, WriteError> {
        let store = &self.shared.store;
        let epoch = store.origin()?.map(|origin| origin.epoch).unwrap_or_default();
        let wanted = Progress::new(&epoch, &self.language, &[]);
        let files = self.open_files(&wanted)?;
        let partitions = store.event_partitions() as usize;
        let places = files.found.as_ref().map_or_else(|| vec![None; partitions], |found| found.places(partitions));
        let added = {
            let view = match files.view() {
                // It is never searched, nor looked at for damage, if it cannot be opened.
                Err(error) if index::may_be_damage(&error) => return Err(WriteError::Damaged),
                view => view?,
            };
            let mut tail = self.shared.tail();
            let removed = tail.begin(&places, view);
            let number = tail.number();
            drop(tail);
            drop(removed);
            number
        };
        let language = self.language.clone();
        let mut indexing = Indexing {
            shared: &self.shared,
            files,
            epoch,
            language,
            places,
            added,
            committed: added,
            since: None,
            merging: None,
        };
        indexing.shows();
        Ok(indexing)
    }
}

/// An index that is being written.
struct Indexing<'w> {
    shared: &'w Shared,
    files: Files,
    epoch: String,
    language: String,
    /// The last event of each partition that was added.
    places: Vec<Option<Place>>,
    /// The numbers of the last event that was added, and of the last that was committed.
    added: u64,
    committed: u64,
    /// When the first one was added that is not committed.
    since: Option<Instant>,
    merging: Option<Pin<Box<Merging>>>,
}

impl Indexing<'_> {
    /// Takes what has come, adds it, and commits if it is time; says whether there is no more. `all`: nothing is left undone.
    fn round(&mut self, all: bool) -> Result<bool, WriteError> {
        let (mut is_level, mut taken) = (false, 0);
        while !is_level && !self.shared.tail().is_full() && (taken < COMMIT_EVENTS as usize || all) {
            is_level = self.shared.tail.take(CHUNK);
            taken += CHUNK;
        }
        self.add()?;
        if self.added > self.committed {
            self.since.get_or_insert_with(Instant::now);
        }

        let (front, is_full) = {
            let tail = self.shared.tail();
            (tail.front(), tail.is_full())
        };
        let is_old = front.is_some_and(|front| front + OLD_MS < clock::now_ms());
        let (most, after) = if is_old { (COMMIT_OLD_EVENTS, COMMIT_OLD_AFTER) } else { (COMMIT_EVENTS, COMMIT_AFTER) };
        let is_due = self.since.is_some_and(|since| all || (is_full && !is_old) || since.elapsed() >= after);
        if is_due || self.added - self.committed >= most {
            self.commit()?;
        } else if is_old {
            let removed = self.shared.tail().hide(self.added);
            drop(removed);
        }
        if !all {
            self.merge()?;
        }
        self.shows();
        Ok(is_level)
    }

    /// Adds what was taken.
    fn add(&mut self) -> Result<(), WriteError> {
        loop {
            let new = self.shared.tail().after(self.added, COPIED);
            for waiting in &new {
                self.files.add(waiting.partition, waiting.place, &waiting.document)?;
                self.places[waiting.partition as usize] = Some(waiting.place);
                self.added = waiting.number;
            }
            telemetry::search_indexed().increment(new.len() as u64);
            if new.len() < COPIED {
                return Ok(());
            }
        }
    }

    /// If the index is suspected to be damaged, looks whether it is.
    fn examine(&self, examined: &mut Option<Instant>) -> Result<(), WriteError> {
        let is_due = examined.is_none_or(|examined| examined.elapsed() >= EXAMINE_EVERY);
        // A merge changes which files there are. The next one begins when this is done.
        if !is_due || self.merging.is_some() || !self.shared.suspected.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        *examined = Some(Instant::now());
        if self.files.is_damaged()? {
            return Err(WriteError::Damaged);
        }
        tracing::info!("the index of search is not damaged");
        Ok(())
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        let begun = Instant::now();
        self.files.commit(&Progress::new(&self.epoch, &self.language, &self.places))?;
        let view = self.files.view()?;
        let removed = self.shared.tail().set_view(view, self.added);
        drop(removed);
        (self.committed, self.since) = (self.added, None);
        telemetry::search_commit_seconds().record(begun.elapsed().as_secs_f64());
        Ok(())
    }

    /// Begins the next merge once the last one is done.
    fn merge(&mut self) -> Result<(), WriteError> {
        if let Some(merging) = &mut self.merging {
            let Some(merged) = merging.as_mut().now_or_never() else { return Ok(()) };
            self.merging = None;
            merged?;
            let view = self.files.view()?;
            let removed = self.shared.tail().replace_view(view);
            drop(removed);
        }
        if self.shared.suspected.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(view) = self.shared.tail().view.clone() else { return Ok(()) };
        // Oldest first.
        let segments: Vec<_> = view.segments.iter().rev().map(|segment| (segment.id, segment.events)).collect();
        let sizes: Vec<u32> = segments.iter().map(|(_, events)| *events).collect();
        if let Some(run) = merges::next(&sizes) {
            let ids: Vec<_> = segments[run].iter().map(|(id, _)| *id).collect();
            self.merging = Some(Box::pin(self.files.merge(&ids)));
        }
        Ok(())
    }

    /// Says how far it is.
    fn shows(&mut self) {
        let tail = self.shared.tail();
        let lag = tail.missing_from().map_or(0, |from| clock::now_ms().saturating_sub(from));
        telemetry::search_lag_seconds().set(lag as f64 / 1_000.0);
        telemetry::search_waiting().set(tail.len() as f64);
        telemetry::search_segments().set(tail.view.as_ref().map_or(0, |view| view.segments.len()) as f64);
    }
}
