//! A query as the index answers it, and by which weights events are ranked: the same for those that are in the index and those
//! that are not yet.
//!
//! An event's score is BM25 over the words that it has (k1 1.2, b 0.75), in which a text of 32 words counts as of middle length
//! and the statistics are those of the tenant: how many events it has, and how many of them have the word. A beginning of a
//! word adds a little. The sum is weighed by age: an event of now counts twice as much as a very old one.

use std::collections::HashMap;

use tantivy::fieldnorm::FieldNormReader;
use tantivy::query::{
    Bm25StatisticsProvider, Bm25Weight, BooleanQuery, ConstScoreQuery, Occur, PhraseQuery, Query as IndexQuery,
    TermQuery,
};
use tantivy::schema::{Field as Column, IndexRecordOption};
use tantivy::{Score, TantivyError, Term as IndexTerm};

use super::budget::Budget;
use super::document::{Document, Field};
use super::index::{ALL, Columns, KIND, RUN, TEXT_ONLY, THREAD, USER, View, part, tag, term};
use super::matching::{self, has};
use super::prefix::PrefixQuery;
use super::query::{Query, Term, What};

/// The length of a text of middle length, in words.
const MIDDLE: u64 = 32;
/// What the beginning of a word adds.
const BEGUN: Score = 0.1;
/// After so many milliseconds, half of what being new adds is left.
const HALF_LIFE_MS: f64 = 30.0 * 86_400_000.0;

/// What narrows a search.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    pub thread: Option<String>,
    pub from: Option<String>,
    pub kind: Option<String>,
    pub run: Option<String>,
    /// Events of this time and later.
    pub since: Option<u64>,
    /// Events before this time.
    pub until: Option<u64>,
}

impl Filters {
    /// Whether a document is among what is searched.
    pub fn admit(&self, document: &Document) -> bool {
        let is =
            |wanted: &Option<String>, found: Option<&str>| wanted.as_deref().is_none_or(|wanted| found == Some(wanted));
        is(&self.thread, Some(&document.thread))
            && is(&self.from, Some(&document.from))
            && is(&self.kind, Some(&document.kind))
            && is(&self.run, document.run.as_deref())
            && self.admit_time(document.at)
    }

    pub fn admit_time(&self, at: u64) -> bool {
        self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at < until)
    }
}

/// How much more an event counts for being new: 2 now, and nearly 1 when it is very old.
pub fn recency(at: u64, now: u64) -> Score {
    let age = now.saturating_sub(at) as f64;
    1.0 + (-age / HALF_LIFE_MS).exp2() as Score
}

/// How many events a tenant has, and how many of them have each of some terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statistics {
    pub events: u64,
    /// In the order of [`scored_terms`].
    pub with_term: Vec<u64>,
}

/// The same as tantivy asks for it.
struct Provider<'s> {
    events: u64,
    with_term: HashMap<&'s IndexTerm, u64>,
}

impl Bm25StatisticsProvider for Provider<'_> {
    fn total_num_tokens(&self, _: Column) -> tantivy::Result<u64> {
        Ok(MIDDLE * self.events)
    }

    fn total_num_docs(&self) -> tantivy::Result<u64> {
        Ok(self.events)
    }

    fn doc_freq(&self, term: &IndexTerm) -> tantivy::Result<u64> {
        Ok(self.with_term.get(term).copied().unwrap_or_default().min(self.events))
    }
}

/// A query of a tenant, with what it needs of the index.
pub struct Plan<'q> {
    tenant: &'q str,
    query: &'q Query,
    columns: Columns,
    /// Of each wanted term, in their order, the words that are weighed.
    scored: Vec<Vec<IndexTerm>>,
}

impl<'q> Plan<'q> {
    pub fn new(tenant: &'q str, query: &'q Query, columns: Columns) -> Plan<'q> {
        let mut plan = Plan { tenant, query, columns, scored: Vec::new() };
        plan.scored = query.wanted().map(|term| plan.words(term)).collect();
        plan
    }

    /// The words of a term as the index has them.
    fn words(&self, of: &Term) -> Vec<IndexTerm> {
        match &of.what {
            What::Word { stem, .. } => vec![self.word(of.field, true, stem)],
            What::Phrase(words) => words.iter().map(|word| self.word(of.field, false, word)).collect(),
            What::Prefix(_) => Vec::new(),
        }
    }

    fn word(&self, field: Option<Field>, is_stem: bool, word: &str) -> IndexTerm {
        let columns = &self.columns;
        match (field, is_stem) {
            (None | Some(Field::Text), true) => IndexTerm::from_field_text(columns.stem, &term(self.tenant, word)),
            (None | Some(Field::Text), false) => IndexTerm::from_field_text(columns.exact, &term(self.tenant, word)),
            (Some(field), _) => IndexTerm::from_field_text(columns.parts, &part(self.tenant, field, is_stem, word)),
        }
    }

    fn tag(&self, letter: char, value: &str) -> IndexTerm {
        IndexTerm::from_field_text(self.columns.tags, &tag(self.tenant, letter, value))
    }

    /// The statistics of the tenant, over what the index holds and what it does not hold yet.
    pub fn statistics<'d>(
        &self,
        view: &View,
        tail: impl Iterator<Item = &'d Document> + Clone,
        budget: &Budget,
    ) -> Result<Statistics, TantivyError> {
        let mut with_term = Vec::new();
        for (term, words) in self.query.wanted().zip(&self.scored) {
            for (at, word) in words.iter().enumerate() {
                let single = Term { what: one_word(&term.what, at), ..term.clone() };
                let in_time = tail.clone().take_while(|document| !budget.spend(document.tokens.len()));
                let in_tail = in_time.filter(|document| has(&single, &document.tokens)).count();
                with_term.push(view.searcher.doc_freq(word)? + in_tail as u64);
            }
        }
        let events = view.searcher.doc_freq(&self.tag(ALL, ""))? + tail.count() as u64;
        Ok(Statistics { events: events.max(1), with_term })
    }

    fn provider(&self, statistics: &Statistics) -> Provider<'_> {
        let words = self.scored.iter().flatten().zip(statistics.with_term.iter().copied());
        Provider { events: statistics.events, with_term: words.collect() }
    }

    /// The query as the index answers it; `threads` are all that may be looked at, if they are few.
    pub fn index_query(&self, filters: &Filters, threads: Option<&[String]>, budget: &Budget) -> Box<dyn IndexQuery> {
        let mut all: Vec<(Occur, Box<dyn IndexQuery>)> = Vec::new();
        for clause in &self.query.clauses {
            let query = |term| self.term_query(term, clause.negated, budget);
            let mut any: Vec<_> = clause.any.iter().map(query).collect();
            let one = match (any.len(), any.pop()) {
                (1, Some(one)) => one,
                (_, last) => {
                    any.extend(last);
                    Box::new(BooleanQuery::union(any))
                }
            };
            all.push((if clause.negated { Occur::MustNot } else { Occur::Must }, one));
        }
        let tags = [(THREAD, &filters.thread), (USER, &filters.from), (KIND, &filters.kind), (RUN, &filters.run)];
        for (letter, value) in tags {
            all.extend(value.as_ref().map(|value| (Occur::Must, self.tag_query(letter, value))));
        }
        if let Some(threads) = threads.filter(|_| filters.thread.is_none()) {
            let any = threads.iter().map(|thread| self.tag_query(THREAD, thread)).collect();
            all.push((Occur::Must, Box::new(ConstScoreQuery::new(Box::new(BooleanQuery::union(any)), 0.0))));
        }
        match (all.len(), all.pop()) {
            (1, Some((Occur::Must, one))) => one,
            (_, last) => {
                all.extend(last);
                Box::new(BooleanQuery::new(all))
            }
        }
    }

    fn tag_query(&self, letter: char, value: &str) -> Box<dyn IndexQuery> {
        let query = TermQuery::new(self.tag(letter, value), IndexRecordOption::Basic);
        Box::new(ConstScoreQuery::new(Box::new(query), 0.0))
    }

    fn term_query(&self, of: &Term, is_excluded: bool, budget: &Budget) -> Box<dyn IndexQuery> {
        let words = self.words(of);
        let begun = |prefix: &str| -> Box<dyn IndexQuery> {
            let (column, prefix) = match of.field {
                None | Some(Field::Text) => (self.columns.exact, term(self.tenant, prefix)),
                Some(field) => (self.columns.parts, part(self.tenant, field, false, prefix)),
            };
            let query = PrefixQuery { column, prefix, budget: budget.clone(), is_excluded };
            Box::new(ConstScoreQuery::new(Box::new(query), BEGUN))
        };
        let single =
            |word: IndexTerm| -> Box<dyn IndexQuery> { Box::new(TermQuery::new(word, IndexRecordOption::WithFreqs)) };
        let query = match &of.what {
            What::Prefix(prefix) => begun(prefix),
            What::Word { exact, typed: true, .. } => {
                let mut any: Vec<_> = words.into_iter().map(single).collect();
                any.push(begun(exact));
                Box::new(BooleanQuery::union(any))
            }
            What::Word { .. } | What::Phrase(_) => match <[IndexTerm; 1]>::try_from(words) {
                Ok([word]) => single(word),
                Err(words) => Box::new(PhraseQuery::new(words)),
            },
        };
        match of.field {
            Some(Field::Text) => {
                let is_text = self.tag_query(TEXT_ONLY, "");
                Box::new(BooleanQuery::intersection(vec![query, is_text]))
            }
            _ => query,
        }
    }

    /// By what events are ranked.
    pub fn ranking<'p>(&'p self, statistics: &Statistics) -> Result<Ranking<'p>, TantivyError> {
        let provider = self.provider(statistics);
        let weight = |words: &Vec<IndexTerm>| match words.is_empty() {
            true => Ok(None),
            false => Bm25Weight::for_terms(&provider, words).map(Some),
        };
        let weights: Result<Vec<_>, _> = self.scored.iter().map(weight).collect();
        Ok(Ranking { terms: self.query.wanted().zip(weights?).collect(), provider })
    }
}

/// One word of a phrase, or the word as it is but for its beginning.
fn one_word(what: &What, at: usize) -> What {
    match what {
        What::Phrase(words) => What::Phrase(words.get(at).cloned().into_iter().collect()),
        What::Word { exact, stem, .. } => What::Word { exact: exact.clone(), stem: stem.clone(), typed: false },
        What::Prefix(prefix) => What::Prefix(prefix.clone()),
    }
}

/// The weights of a query's terms.
pub struct Ranking<'p> {
    terms: Vec<(&'p Term, Option<Bm25Weight>)>,
    provider: Provider<'p>,
}

impl Ranking<'_> {
    /// What the index weighs its events by.
    pub fn statistics(&self) -> &dyn Bm25StatisticsProvider {
        &self.provider
    }

    /// The same for a document that is not in the index yet, before its age counts.
    pub fn score(&self, document: &Document) -> Score {
        let length = document.tokens.len() as u32;
        let score_of = |(term, weight): &(&Term, Option<Bm25Weight>)| {
            let (whole, begun) = matching::counts(term, &document.tokens);
            let length = match term.field {
                None | Some(Field::Text) => length,
                // There each word is in both of its forms.
                Some(_) => length * 2,
            };
            let whole = match weight {
                Some(weight) if whole > 0 => weight.score(FieldNormReader::fieldnorm_to_id(length), whole),
                _ => 0.0,
            };
            whole + if begun > 0 { BEGUN } else { 0.0 }
        };
        self.terms.iter().map(score_of).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_counts_up_to_twice_and_never_less_than_once() {
        let month = HALF_LIFE_MS as u64;
        assert_eq!((recency(10 * month, 10 * month), recency(11 * month, 10 * month)), (2.0, 2.0));
        assert_eq!(recency(9 * month, 10 * month), 1.5);
        assert!(recency(0, 1_000 * month) >= 1.0);
    }
}
