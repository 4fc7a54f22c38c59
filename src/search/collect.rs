//! The first hits of a query, in their order, as far as the budget of work goes.
//!
//! Hits are ordered by time, or by score and then by time; at one time by their places in the log, so that the order is the
//! same each time. Newest first, segments are read from the newest on, and those that hold nothing newer than what was found
//! are not. By score, events that cannot be among the first are passed over (block-max).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use tantivy::query::{EnableScoring, Query as IndexQuery, Weight};
use tantivy::{DocSet, Score, TERMINATED, TantivyError};

use super::budget::{Budget, STRIDE};
use super::index::{SegmentTimes, View, thread_hash};
use super::plan::{Filters, Ranking, recency};

/// Scores are compared to so many parts of one, and what is equal then goes by time.
const PARTS: Score = 1_000.0;

/// A hit, as it is ordered: the highest comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// 0 if the order is by time alone.
    pub score: u32,
    /// Milliseconds.
    pub at: u64,
    pub partition: u32,
    pub offset: u64,
    pub seq: u64,
}

impl Key {
    /// The score as clients see it.
    pub fn shown_score(&self) -> f64 {
        f64::from(self.score) / f64::from(PARTS)
    }
}

/// A score with the event's age, as keys have it.
pub fn score_at(score: Score, at: u64, now: u64) -> u32 {
    (score * recency(at, now) * PARTS).round() as u32
}

/// In which threads a search may look.
pub enum Reach {
    All,
    /// By their hashes; their names if they are few.
    Threads {
        hashes: HashSet<u64>,
        names: Option<Vec<String>>,
    },
}

/// From so many threads on, they are not named to the index.
const NAMED: usize = 32;

impl Reach {
    pub fn threads(tenant: &str, threads: Vec<String>) -> Reach {
        let hashes = threads.iter().map(|thread| thread_hash(tenant, thread)).collect();
        Reach::Threads { hashes, names: (threads.len() <= NAMED).then_some(threads) }
    }

    pub fn names(&self) -> Option<&[String]> {
        match self {
            Reach::All => None,
            Reach::Threads { names, .. } => names.as_deref(),
        }
    }

    pub fn has(&self, thread: u64) -> bool {
        match self {
            Reach::All => true,
            Reach::Threads { hashes, .. } => hashes.contains(&thread),
        }
    }
}

/// The highest keys below another one, so many of them.
pub struct First {
    limit: usize,
    after: Option<Key>,
    kept: BinaryHeap<Reverse<Key>>,
}

impl First {
    pub fn new(limit: usize, after: Option<Key>) -> First {
        First { limit, after, kept: BinaryHeap::with_capacity(limit + 1) }
    }

    pub fn push(&mut self, key: Key) {
        if self.after.is_some_and(|after| key >= after) {
            return;
        }
        self.kept.push(Reverse(key));
        if self.kept.len() > self.limit {
            self.kept.pop();
        }
    }

    pub fn extend(&mut self, key: Option<Key>) {
        key.into_iter().for_each(|key| self.push(key));
    }

    /// The lowest one that is kept, once no more fit.
    fn bar(&self) -> Option<Key> {
        self.kept.peek().filter(|_| self.kept.len() >= self.limit).map(|Reverse(key)| *key)
    }

    pub fn into_sorted(self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.kept.into_iter().map(|Reverse(key)| key).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        keys
    }
}

/// What is searched, and how it is ranked: by a ranking and at a time, or newest first.
pub struct Search<'a> {
    pub view: &'a View,
    pub query: &'a dyn IndexQuery,
    pub filters: &'a Filters,
    pub reach: &'a Reach,
    pub ranking: Option<(&'a Ranking<'a>, u64)>,
}

impl Search<'_> {
    /// Adds what the index has to the first hits.
    pub fn collect(&self, first: &mut First, budget: &Budget) -> Result<(), TantivyError> {
        let searcher = &self.view.searcher;
        let scoring = match self.ranking {
            Some((ranking, _)) => EnableScoring::enabled_from_statistics_provider(ranking.statistics(), searcher),
            None => EnableScoring::disabled_from_searcher(searcher),
        };
        let weight = self.query.weight(scoring)?;
        let Filters { since, until, .. } = self.filters;
        for segment in &self.view.segments {
            let is_outside =
                since.is_some_and(|since| segment.to < since) || until.is_some_and(|until| segment.from >= until);
            if segment.events == 0 || is_outside {
                continue;
            }
            if budget.is_spent() {
                return Ok(());
            }
            match self.ranking {
                Some((_, now)) => self.by_score(segment, &*weight, now, first, budget)?,
                None if first.bar().is_some_and(|bar| segment.to < bar.at) => {}
                None => self.by_time(segment, &*weight, first, budget)?,
            }
        }
        Ok(())
    }

    fn by_time(
        &self,
        segment: &SegmentTimes,
        weight: &dyn Weight,
        first: &mut First,
        budget: &Budget,
    ) -> Result<(), TantivyError> {
        let columns = Columns::open(self.view, segment)?;
        let mut events = weight.scorer(self.view.searcher.segment_reader(segment.number), 1.0)?;
        // If the budget was spent on the query, the first of what it found are hits.
        let (mut event, mut seen) = (events.doc(), 0u32);
        while event != TERMINATED {
            seen += 1;
            if seen.is_multiple_of(STRIDE) && budget.is_spent() {
                return Ok(());
            }
            let at = columns.at.get_val(event);
            // Whatever its place, it comes after all that are kept.
            let is_late = first.bar().is_some_and(|bar| at < bar.at);
            if !is_late && self.filters.admit_time(at) && self.reach.has(columns.thread.get_val(event)) {
                first.push(columns.key(event, at, 0));
            }
            event = events.advance();
        }
        Ok(())
    }

    fn by_score(
        &self,
        segment: &SegmentTimes,
        weight: &dyn Weight,
        now: u64,
        first: &mut First,
        budget: &Budget,
    ) -> Result<(), TantivyError> {
        let columns = Columns::open(self.view, segment)?;
        let best_age = recency(segment.to, now);
        // What would come to less than the lowest that is kept, with something to spare for how sums are rounded.
        let bar = |first: &First| match first.bar() {
            Some(bar) => (bar.score as Score - 1.0) / PARTS / best_age * (1.0 - 1e-4),
            None => Score::MIN,
        };
        let mut seen = 0u32;
        let start = bar(first);
        let mut push = |event: u32, score: Score| {
            seen += 1;
            if seen.is_multiple_of(STRIDE) && budget.is_spent() {
                return Score::INFINITY;
            }
            let at = columns.at.get_val(event);
            if self.filters.admit_time(at) && self.reach.has(columns.thread.get_val(event)) {
                first.push(columns.key(event, at, score_at(score, at, now)));
            }
            bar(first)
        };
        weight.for_each_pruning(start, self.view.searcher.segment_reader(segment.number), &mut push)
    }
}

type Values = std::sync::Arc<dyn tantivy::columnar::ColumnValues<u64>>;

/// The columns of a segment.
pub struct Columns {
    pub at: Values,
    partition: Values,
    offset: Values,
    seq: Values,
    pub thread: Values,
}

impl Columns {
    pub fn open(view: &View, segment: &SegmentTimes) -> Result<Columns, TantivyError> {
        let fields = view.searcher.segment_reader(segment.number).fast_fields();
        let column = |name| fields.column_first_or_default::<u64>(name);
        Ok(Columns {
            at: column("at")?,
            partition: column("partition")?,
            offset: column("offset")?,
            seq: column("seq")?,
            thread: column("thread")?,
        })
    }

    pub fn key(&self, event: u32, at: u64, score: u32) -> Key {
        Key {
            score,
            at,
            partition: self.partition.get_val(event) as u32,
            offset: self.offset.get_val(event),
            seq: self.seq.get_val(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(score: u32, at: u64) -> Key {
        Key { score, at, partition: 0, offset: 0, seq: 1 }
    }

    #[test]
    fn the_highest_keys_are_kept_from_below_the_cursor_on() {
        let mut first = First::new(2, Some(key(0, 50)));
        for at in [10, 60, 50, 40, 20, 30] {
            first.push(key(0, at));
        }
        assert_eq!(first.bar(), Some(key(0, 30)));
        assert_eq!(first.into_sorted(), [key(0, 40), key(0, 30)]);
        assert!(key(2, 1) > key(1, 9) && key(1, 9) > key(1, 8));
    }
}
