//! All events with a word that begins so: a query that tantivy does not have for one tenant's words.

use tantivy::index::SegmentReader;
use tantivy::postings::BlockSegmentPostings;
use tantivy::query::{BitSetDocSet, ConstScorer, EnableScoring, Explanation, Query, Scorer, Weight};
use tantivy::schema::{Field as Column, IndexRecordOption};
use tantivy::{BitSet, DocId, DocSet, Score, TantivyError};

use super::budget::Budget;

/// Events of a word that are read at once.
const BLOCK: usize = 128;

/// Terms of a column that begin so; each event scores the same.
#[derive(Debug, Clone)]
pub struct PrefixQuery {
    pub column: Column,
    /// With its tenant.
    pub prefix: String,
    pub budget: Budget,
    /// Its events are no hits. Once the budget is spent all events are taken for such, so that none is a hit that should not be.
    pub is_excluded: bool,
}

impl Query for PrefixQuery {
    fn weight(&self, _scoring: EnableScoring<'_>) -> tantivy::Result<Box<dyn Weight>> {
        Ok(Box::new(PrefixWeight(self.clone())))
    }
}

struct PrefixWeight(PrefixQuery);

impl Weight for PrefixWeight {
    fn scorer(&self, reader: &SegmentReader, boost: Score) -> tantivy::Result<Box<dyn Scorer>> {
        let index = reader.inverted_index(self.0.column)?;
        let prefix = self.0.prefix.as_bytes();
        let mut found = BitSet::with_max_value(reader.max_doc());
        let mut terms = index.terms().range().ge(prefix).into_stream()?;
        while terms.advance() {
            if !terms.key().starts_with(prefix) {
                break;
            }
            let mut postings = index.read_block_postings_from_terminfo(terms.value(), IndexRecordOption::Basic)?;
            insert(&mut found, &mut postings);
            if self.0.budget.spend(1 + terms.value().doc_freq as usize / BLOCK) {
                if self.0.is_excluded {
                    found = BitSet::with_max_value_and_full(reader.max_doc());
                }
                break;
            }
        }
        Ok(Box::new(ConstScorer::new(BitSetDocSet::from(found), boost)))
    }

    fn explain(&self, reader: &SegmentReader, doc: DocId) -> tantivy::Result<Explanation> {
        let mut scorer = self.scorer(reader, 1.0)?;
        match scorer.doc() <= doc && scorer.seek(doc) == doc {
            true => Ok(Explanation::new("a word begins so", 1.0)),
            false => Err(TantivyError::InvalidArgument("it does not match".to_owned())),
        }
    }
}

fn insert(found: &mut BitSet, postings: &mut BlockSegmentPostings) {
    while !postings.docs().is_empty() {
        for doc in postings.docs() {
            found.insert(*doc);
        }
        postings.advance();
    }
}
