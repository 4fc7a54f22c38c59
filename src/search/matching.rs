//! Whether an event has what a query wants, and where: by its words alone. Pure.
//!
//! The index answers the same for what it holds. This is for what it does not hold yet, for what comes while somebody waits
//! for it, and for the places that are marked in an answer.

use std::ops::Range;

use super::document::{Document, Piece, Token, tokens};
use super::query::{Query, Term, What};
use super::words::{Stems, words};

/// Whether the document has what the query wants.
pub fn matches(query: &Query, document: &Document) -> bool {
    are_wanted(query, &document.tokens)
}

/// Whether an event with these words has what the query wants.
pub fn are_wanted(query: &Query, tokens: &[Token]) -> bool {
    query.clauses.iter().all(|clause| clause.any.iter().any(|term| has(term, tokens)) != clause.negated)
}

/// Whether a term is among these words.
pub fn has(term: &Term, tokens: &[Token]) -> bool {
    places(term, tokens).next().is_some()
}

/// How often each of the two forms of a term is among these words: the whole one, and the beginning.
pub fn counts(term: &Term, tokens: &[Token]) -> (u32, u32) {
    let whole = match &term.what {
        What::Word { stem, .. } => tokens.iter().filter(|token| is_in(term, token) && token.stem() == stem).count(),
        What::Phrase(_) => places(term, tokens).count(),
        What::Prefix(_) => 0,
    };
    let begun = match &term.what {
        What::Prefix(prefix) => begin(term, prefix, tokens),
        What::Word { exact, typed: true, .. } => begin(term, exact, tokens),
        What::Word { .. } | What::Phrase(_) => 0,
    };
    (whole as u32, begun as u32)
}

fn begin(term: &Term, prefix: &str, tokens: &[Token]) -> usize {
    tokens.iter().filter(|token| is_in(term, token) && token.exact.starts_with(prefix)).count()
}

fn is_in(term: &Term, token: &Token) -> bool {
    term.field.is_none_or(|field| field == token.field)
}

/// Where a term is among words: which of them it covers.
fn places<'a>(term: &'a Term, tokens: &'a [Token]) -> impl Iterator<Item = Range<usize>> + 'a {
    (0..tokens.len()).filter_map(move |at| {
        let token = &tokens[at];
        if !is_in(term, token) {
            return None;
        }
        let found = match &term.what {
            What::Word { exact, stem, typed } => token.stem() == stem || (*typed && token.exact.starts_with(&**exact)),
            What::Prefix(prefix) => token.exact.starts_with(&**prefix),
            What::Phrase(phrase) => {
                let run = tokens.get(at..at + phrase.len())?;
                let in_order = |(n, (token, word)): (usize, (&Token, &String))| {
                    *token.exact == **word && token.position == tokens[at].position + n as u32
                };
                if !run.iter().zip(phrase).enumerate().all(in_order) {
                    return None;
                }
                return Some(at..at + phrase.len());
            }
        };
        found.then_some(at..at + 1)
    })
}

/// Where in a text what the query wants stands, in bytes; in order, without overlap.
pub fn ranges(query: &Query, piece: &Piece, stems: &Stems) -> Vec<Range<usize>> {
    let tokens = tokens([piece], stems);
    let spans: Vec<Range<usize>> = words(&piece.text).map(|word| word.start..word.end).collect();
    let mut found: Vec<Range<usize>> = Vec::new();
    for term in query.wanted() {
        for place in places(term, &tokens) {
            if let (Some(first), Some(last)) = (spans.get(place.start), spans.get(place.end - 1)) {
                found.push(first.start..last.end);
            }
        }
    }
    found.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in found {
        match merged.last_mut() {
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::super::document::Field;
    use super::*;

    fn stems() -> Stems {
        Stems::of("english").expect("it is there")
    }

    fn marked(q: &str, text: &str) -> Vec<String> {
        let query = Query::parse("q", q, &stems()).expect("it is one");
        let piece = Piece { field: Field::Text, text: text.into() };
        ranges(&query, &piece, &stems()).into_iter().map(|range| text[range].to_owned()).collect()
    }

    fn found(q: &str, pieces: &[(Field, &str)]) -> bool {
        let query = Query::parse("q", q, &stems()).expect("it is one");
        let pieces: Vec<Piece> =
            pieces.iter().map(|(field, text)| Piece { field: *field, text: (*text).into() }).collect();
        let tokens = tokens(&pieces, &stems());
        let document = Document {
            tenant: String::new(),
            thread: String::new(),
            at: 0,
            kind: String::new(),
            from: String::new(),
            run: None,
            tokens,
        };
        matches(&query, &document)
    }

    #[test]
    fn what_a_query_wants_is_found_and_nothing_else() {
        let text = |text: &'static str| [(Field::Text, text)];
        for (q, sample, is_found) in [
            ("run ", "She was Running.", true),
            ("runn ", "She was running.", false),
            ("runn", "She was running.", true),
            ("\"run\"", "She was running.", false),
            ("\"was running\"", "She was running.", true),
            ("\"running was\"", "She was running.", false),
            ("she -was ", "She was running.", false),
            ("nothing OR running ", "She was running.", true),
            ("she nothing ", "She was running.", false),
            ("was*", "She was running.", true),
            ("foo-bar ", "a foo bar b", true),
            ("tool:was ", "She was running.", false),
            ("text:was ", "She was running.", true),
        ] {
            assert_eq!(found(q, &text(sample)), is_found, "{q} in {sample}");
        }
        let call = [(Field::Tool, "web_search"), (Field::Arguments, "rust tantivy")];
        assert!(
            found("tool:search rust ", &call) && found("arguments:rust ", &call) && found("\"rust tantivy\"", &call)
        );
        assert!(!found("tool:rust ", &call) && !found("\"search rust\"", &call) && !found("text:rust ", &call));
    }

    #[test]
    fn what_was_found_is_marked_where_it_stands() {
        assert_eq!(marked("run", "Running, he runs. Rune"), ["Running", "runs", "Rune"]);
        assert_eq!(marked("\"he runs\" running ", "Running, he runs."), ["Running", "he runs"]);
        assert_eq!(marked("he \"he runs\" ", "he runs he"), ["he runs", "he"]);
        assert_eq!(marked("creme -x ", "Crème x"), ["Crème"]);
    }
}
