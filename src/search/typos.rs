//! What somebody may have meant who found nothing: words of the tenant that are a typing error away from those of the query.

use std::collections::HashMap;

use tantivy::query::FuzzyTermQuery;
use tantivy::{TantivyError, Term as IndexTerm};

use super::budget::Budget;
use super::document::Document;
use super::index::{View, term};
use super::query::{Query, Term, What};

/// Other words that are tried for each word of a query.
const TRIES: usize = 4;
/// Words of the index that are looked at.
const LOOKED_AT: usize = 1_000;
/// Words shorter than this are not corrected; longer ones than the second may have two errors.
const SHORTEST: usize = 4;
const TWO_ERRORS_FROM: usize = 8;

/// The query's text with other words, the likeliest first.
pub fn corrections<'d>(
    tenant: &str,
    q: &str,
    query: &Query,
    view: &View,
    tail: impl Iterator<Item = &'d Document> + Clone,
    budget: &Budget,
) -> Result<Vec<String>, TantivyError> {
    let mut unknown: Vec<(&Term, Vec<String>)> = Vec::new();
    for term in query.wanted() {
        let What::Word { exact, .. } = &term.what else { continue };
        if exact.chars().count() < SHORTEST || budget.is_spent() {
            continue;
        }
        let others = others(tenant, exact, view, tail.clone(), budget)?;
        if !others.is_empty() {
            unknown.push((term, others));
        }
    }
    unknown.sort_by_key(|(term, _)| std::cmp::Reverse(term.span.start));
    let most = unknown.iter().map(|(_, others)| others.len()).max().unwrap_or(0);
    let correction = |n: usize| {
        let mut text = q.to_owned();
        for (term, others) in &unknown {
            if let Some(other) = others.get(n).or(others.last()) {
                text.replace_range(term.span.clone(), other);
            }
        }
        text
    };
    Ok((0..most).map(correction).collect())
}

/// Words that are alike, the likeliest first; none if the word itself is there, or there was no time to look whether it is.
fn others<'d>(
    tenant: &str,
    word: &str,
    view: &View,
    tail: impl Iterator<Item = &'d Document>,
    budget: &Budget,
) -> Result<Vec<String>, TantivyError> {
    let errors = if word.chars().count() < TWO_ERRORS_FROM { 1 } else { 2 };
    // How many events have each.
    let mut found: HashMap<String, u64> = HashMap::new();
    for token in tail.flat_map(|document| &document.tokens) {
        if budget.spend(1) {
            return Ok(Vec::new());
        }
        if strsim::osa_distance(word, &token.exact) <= errors {
            *found.entry(token.exact.to_string()).or_default() += 1;
        }
    }

    let prefix = term(tenant, "");
    let wanted = IndexTerm::from_field_text(view.columns.exact, &term(tenant, word));
    let alike = FuzzyTermQuery::new(wanted, errors as u8, true);
    for segment in &view.segments {
        if found.len() >= LOOKED_AT {
            break;
        }
        if budget.is_spent() {
            return Ok(Vec::new());
        }
        let index = view.searcher.segment_reader(segment.number).inverted_index(view.columns.exact)?;
        // An error in the tenant's name would make it another tenant: only its own words are looked at.
        let mut words = index.terms().search(alike.automaton()?).ge(prefix.as_bytes()).into_stream()?;
        while words.advance() {
            if budget.spend(1) {
                return Ok(Vec::new());
            }
            let Some(word) = words.key().strip_prefix(prefix.as_bytes()) else { break };
            if let Ok(word) = std::str::from_utf8(word) {
                *found.entry(word.to_owned()).or_default() += u64::from(words.value().doc_freq);
            }
        }
    }
    if found.contains_key(word) {
        return Ok(Vec::new());
    }
    let mut found: Vec<(usize, std::cmp::Reverse<u64>, String)> = found
        .into_iter()
        .map(|(other, events)| (strsim::osa_distance(word, &other), std::cmp::Reverse(events), other))
        .filter(|(errors_in, ..)| *errors_in <= errors)
        .collect();
    found.sort();
    Ok(found.into_iter().take(TRIES).map(|(_, _, other)| other).collect())
}
