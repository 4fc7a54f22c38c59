//! Search: a projection of its own, beside the way of `published`.
//!
//! A thread follows the events that the projector has accepted, in the order of the log, and puts their words into an index
//! ([`index`], tantivy). A commit of the index has the place in the log that it has come to, so after a crash it goes on
//! there, exactly. What is not committed yet is in memory ([`tail`]); who searches first takes what is new, and then looks in
//! both. So what was acknowledged is found at once, and the answer says up to when it is complete.
//!
//! Invariants:
//! - nobody waits for the index: neither the projector nor, as long as the tail has room, who searches;
//! - a tenant's searches read its own words and statistics alone ([`index`]);
//! - in which threads may be looked is part of the search, before anything is counted or ranked. It is asked by whoever calls,
//!   who looks at the rights of each hit once more before it is given out;
//! - a search does so much work and no more ([`budget`]), on few threads at a time.
//!
//! [`words`] says what a word is, [`document`] what of an event is searched, [`query`] what can be asked, [`matching`] whether an
//! event has it, [`plan`] how the index is asked and what events are ranked by, [`typos`] what may have been meant, [`merges`]
//! which segments become one, [`writer`] is the thread; [`verify`] holds an index against the events that it should have.

mod budget;
mod collect;
pub mod document;
mod index;
mod matching;
mod merges;
mod plan;
mod prefix;
mod query;
mod tail;
#[cfg(test)]
mod tests;
mod typos;
pub mod verify;
mod words;
mod writer;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tantivy::TantivyError;

use self::budget::Budget;
use self::collect::First;
pub use self::collect::Key;
use self::document::Piece;
pub use self::plan::{Filters, Statistics};
use self::plan::{Plan, Ranking};
pub use self::query::Query;
use self::tail::{Snapshot, Tail, Waiting};
pub use self::words::Stems;
use self::writer::{Shared, Writer};
use crate::clock;
use crate::memory::{Charge, Pool, SearchPlan};
use crate::panics;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::StoredFrame;
use crate::store::{Partition, Place, Store, StoreError};
use crate::telemetry;

/// How much work one search does.
const WORK: Duration = Duration::from_millis(50);
/// How long it takes what is new before it looks.
const TAKE_WITHIN: Duration = Duration::from_millis(500);
/// Events taken at once.
const CHUNK: usize = 64;
/// How long a search waits for its turn, and for the index to be opened.
const TURN_WITHIN: Duration = Duration::from_secs(2);
const RETRY_MS: u64 = 1_000;
/// Bytes of an event's texts that a query that waits looks at.
const MAX_WATCHED: usize = 64 << 10;

/// The order of hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Newest,
    Relevance,
}

/// What somebody searches for.
#[derive(Debug, Clone)]
pub struct Ask {
    pub tenant: String,
    pub q: String,
    pub filters: Filters,
    pub order: Order,
    pub limit: usize,
    /// Goes on after the last hit of the page before.
    pub after: Option<After>,
}

/// Where a page ended, with all that its order depends on: so the next one goes on there, whatever has come meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct After {
    pub key: Key,
    pub ranked: Option<Ranked>,
    /// What was searched for in place of `q`.
    pub corrected: Option<String>,
}

/// By which statistics, and at what time, hits were ranked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranked {
    pub statistics: Statistics,
    pub now: u64,
}

/// Threads that may be looked in.
#[derive(Debug, Clone)]
pub enum Threads {
    All,
    These(Vec<String>),
}

/// An event that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    pub key: Key,
    pub thread: String,
    pub seq: u64,
}

/// What was found: one hit more than was asked for, if there are more.
#[derive(Debug)]
pub struct Found {
    pub hits: Vec<Hit>,
    /// What was searched for.
    pub query: Query,
    pub ranked: Option<Ranked>,
    /// The text of the query, if it is another one than was asked for.
    pub corrected: Option<String>,
    /// Events before this time were all looked at.
    pub complete_to: u64,
    /// The work was broken off: there may be more.
    pub partial: bool,
}

/// A query that waits for what comes.
#[derive(Clone)]
pub struct Watch {
    query: Arc<Query>,
    stems: Stems,
}

impl Watch {
    /// Whether an event has what is wanted. Of its texts so many bytes are looked at: it is asked on a worker of the runtime.
    pub fn wants(&self, frame: &str) -> bool {
        let Some(frame) = StoredFrame::parse(frame) else { return false };
        let mut left = MAX_WATCHED;
        let mut pieces = document::pieces(&frame.kind, frame.data);
        for piece in &mut pieces {
            let end = (0..=left.min(piece.text.len())).rev().find(|at| piece.text.is_char_boundary(*at));
            piece.text.truncate(end.unwrap_or(0));
            left -= piece.text.len();
        }
        matching::are_wanted(&self.query, &document::tokens(&pieces, &self.stems))
    }
}

pub struct Search {
    shared: Arc<Shared>,
    stems: Stems,
    /// How many may search at one time, and how many of them for one user.
    turns: Pool,
    /// Held by whoever takes what is new in order to search.
    taking: Mutex<()>,
}

/// The right to search now.
pub struct Turn(#[expect(dead_code, reason = "held until it is dropped")] Charge);

impl Search {
    /// Starts its thread, which ends after [`Search::stop`]. The index is in `path`.
    pub fn start(
        store: Arc<Store>,
        path: PathBuf,
        language: &str,
        memory: SearchPlan,
    ) -> Result<(Arc<Search>, std::thread::JoinHandle<()>), std::io::Error> {
        let stems = Stems::of(language).unwrap_or(Stems::PLAIN);
        let shared = Arc::new(Shared::new(store.clone(), Tail::new(store, stems, memory.tail)));
        let writer = Writer { shared: shared.clone(), path, language: language.to_owned(), memory: memory.writer };
        let thread = std::thread::Builder::new().name("search".into()).spawn(move || writer.run())?;
        let turns = std::thread::available_parallelism().map_or(2, usize::from).max(2);
        let turns = Pool::shared(turns, turns / 2);
        Ok((Arc::new(Search { shared, stems, turns, taking: Mutex::default() }), thread))
    }

    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Reads what somebody wants.
    pub fn parse(&self, q: &str) -> Result<Query, Error> {
        Query::parse("q", q, &self.stems)
    }

    /// What somebody wants to be told of as it comes; `field` is what refusals call it.
    pub fn watch(&self, field: &'static str, q: &str) -> Result<Watch, Error> {
        // Nobody is still typing it.
        let query = Query::parse(field, &format!("{q} "), &self.stems)?;
        Ok(Watch { query: Arc::new(query), stems: self.stems })
    }

    /// Waits for a turn of this user (`tenant/user`): so many search at a time, and whoever searches much waits for its own.
    pub async fn turn(&self, user: &Arc<str>) -> Result<Turn, Error> {
        let turn = self.turns.charge(user, 1, TURN_WITHIN).await;
        let busy = |_| Error::new(Code::Unavailable, "too many search at this moment").retry_after(RETRY_MS);
        turn.map(Turn).map_err(busy)
    }

    /// The first hits in these threads. Blocks: for threads that may.
    pub fn find(&self, ask: &Ask, threads: Threads) -> Result<Found, Error> {
        let begun = Instant::now();
        // Damaged files may lead tantivy to a panic as well as to an error.
        let found = panics::catch(|| self.find_within(ask, threads, WORK)).unwrap_or_else(|error| {
            self.shared.suspect("a search panicked");
            Err(error)
        });
        telemetry::search_seconds().record(begun.elapsed().as_secs_f64());
        if found.as_ref().is_ok_and(|found| found.partial) {
            telemetry::search_partial().increment(1);
        }
        found
    }

    fn find_within(&self, ask: &Ask, threads: Threads, work: Duration) -> Result<Found, Error> {
        let reach = match threads {
            Threads::All => collect::Reach::All,
            Threads::These(threads) => collect::Reach::threads(&ask.tenant, threads),
        };
        let corrected = ask.after.as_ref().and_then(|after| after.corrected.as_ref());
        let query = self.parse(corrected.unwrap_or(&ask.q))?;
        let now = clock::now_ms();
        let snapshot = self.snapshot(&ask.tenant)?;
        // What was taken for all who search is not this one's work.
        let budget = &Budget::new(work);
        let complete_to = snapshot.missing_from.unwrap_or(now);

        let looking = Looking { ask, reach: &reach, snapshot: &snapshot, now };
        let failed = |error| self.failed(error);
        let (mut keys, mut ranked) = looking.keys(&query, budget).map_err(failed)?;
        let mut found =
            Found { hits: Vec::new(), query, ranked: None, corrected: corrected.cloned(), complete_to, partial: false };
        if keys.is_empty() && ask.after.is_none() {
            let tail = snapshot.waiting.iter().map(|waiting| &waiting.document);
            let others = typos::corrections(&ask.tenant, &ask.q, &found.query, &snapshot.view, tail, budget);
            for text in others.map_err(failed)? {
                // Of our own making, and may still come to too many words.
                let Ok(query) = self.parse(&text) else { continue };
                (keys, ranked) = looking.keys(&query, budget).map_err(failed)?;
                if !keys.is_empty() {
                    (found.query, found.corrected) = (query, Some(text));
                    break;
                }
            }
        }
        found.ranked = ranked;
        found.partial = budget.was_spent();
        for key in keys {
            found.hits.extend(self.resolve(&ask.tenant, key)?);
        }
        Ok(found)
    }

    /// What there is to look at, with everything that has come up to now, if that is not too much.
    fn snapshot(&self, tenant: &str) -> Result<Snapshot, Error> {
        let begun = Instant::now();
        loop {
            let is_level = {
                // In turns, so that no two of those who search analyse the same event. The thread of the index does not wait here.
                let _turn = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
                self.shared.tail.take(CHUNK)
            };
            let waited = begun.elapsed();
            let (found, is_full) = {
                let tail = self.shared.tail();
                (tail.snapshot(tenant), tail.is_full())
            };
            match found {
                Some((snapshot, _)) if is_full || waited >= TAKE_WITHIN => return Ok(snapshot),
                // Both: the index may have been opened again in between.
                Some((snapshot, true)) if is_level => return Ok(snapshot),
                Some(_) => {}
                None if waited >= TURN_WITHIN => {
                    return Err(Error::new(Code::Unavailable, "the index of search is not open").retry_after(RETRY_MS));
                }
                // Right after the start.
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The event of a key; nothing if its row cannot be read, is not visible here yet, or another tenant's, which cannot be.
    fn resolve(&self, tenant: &str, key: Key) -> Result<Option<Hit>, StoreError> {
        let place = Place { offset: key.offset, seq: key.seq };
        let arrival = match self.shared.store.arrival(Partition::new(key.partition), place) {
            Err(error) if error.is_damage() => {
                tracing::error!(?key, %error, "an event that was found cannot be read, and is left out");
                None
            }
            arrival => arrival?,
        };
        let arrival = arrival.filter(|arrival| arrival.tenant == tenant);
        Ok(arrival.map(|arrival| Hit { key, thread: arrival.thread, seq: key.seq }))
    }

    fn failed(&self, error: TantivyError) -> Error {
        if index::may_be_damage(&error) {
            self.shared.suspect(&error.to_string());
        } else {
            tracing::warn!(%error, "the index of search cannot be read now");
        }
        Error::new(Code::Unavailable, "the index of search cannot be read now").retry_after(RETRY_MS)
    }

    /// Where in a text what a query wants stands, in bytes.
    pub fn ranges(&self, query: &Query, piece: &Piece) -> Vec<Range<usize>> {
        matching::ranges(query, piece, &self.stems)
    }
}

/// One search of one moment.
struct Looking<'a> {
    ask: &'a Ask,
    reach: &'a collect::Reach,
    snapshot: &'a Snapshot,
    now: u64,
}

impl Looking<'_> {
    /// The first keys, one more than is asked for, and what they were ranked by.
    fn keys(&self, query: &Query, budget: &Budget) -> Result<(Vec<Key>, Option<Ranked>), TantivyError> {
        let Snapshot { view, waiting, .. } = self.snapshot;
        let plan = Plan::new(&self.ask.tenant, query, view.columns);
        let after = self.ask.after.as_ref();
        let ranked = match (self.ask.order, after.and_then(|after| after.ranked.clone())) {
            (Order::Newest, _) => None,
            (Order::Relevance, Some(ranked)) => Some(ranked),
            (Order::Relevance, None) => {
                let tail = waiting.iter().map(|waiting| &waiting.document);
                Some(Ranked { statistics: plan.statistics(view, tail, budget)?, now: self.now })
            }
        };
        let ranking = match &ranked {
            Some(ranked) => Some((plan.ranking(&ranked.statistics)?, ranked.now)),
            None => None,
        };
        let ranking = ranking.as_ref().map(|(ranking, now)| (ranking, *now));

        let mut first = First::new(self.ask.limit + 1, after.map(|after| after.key));
        // Newest last. Each word is compared with each of the query's.
        for waiting in waiting.iter().rev() {
            if budget.spend(waiting.document.tokens.len()) {
                break;
            }
            first.extend(self.key_of(waiting, query, ranking));
        }
        let index_query = plan.index_query(&self.ask.filters, self.reach.names(), budget);
        let search =
            collect::Search { view, query: &*index_query, filters: &self.ask.filters, reach: self.reach, ranking };
        search.collect(&mut first, budget)?;
        Ok((first.into_sorted(), ranked))
    }

    /// The key of what is not in the index yet, if it is a hit.
    fn key_of(&self, waiting: &Waiting, query: &Query, ranking: Option<(&Ranking<'_>, u64)>) -> Option<Key> {
        let Waiting { partition, place, document, .. } = waiting;
        let thread = index::thread_hash(&document.tenant, &document.thread);
        if !self.ask.filters.admit(document) || !self.reach.has(thread) || !matching::matches(query, document) {
            return None;
        }
        let score = ranking.map_or(0, |(ranking, now)| collect::score_at(ranking.score(document), document.at, now));
        Some(Key { score, at: document.at, partition: *partition, offset: place.offset, seq: place.seq })
    }
}
