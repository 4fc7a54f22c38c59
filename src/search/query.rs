//! What a client searches for, read from `q`. Pure.
//!
//! All words must be there. `"a phrase"` is found as it is written, `pre*` by its beginning, and so is the last word while it is
//! being typed: as long as nothing follows it. `-not` must not be there, of `this OR that` one must. `field:word` looks in one
//! field. What is none of these is taken as words, so that nothing that people type is an error, unless nothing is left.

use std::ops::Range;

use super::document::Field;
use super::words::{Stems, words};
use crate::protocol::error::Error;

/// Words of one query.
pub const MAX_WORDS: usize = 64;
/// A last word is taken as the beginning of one from so many characters on.
const TYPED_FROM: usize = 2;

/// What an event must have: for each clause one of its terms, or, if it is negated, none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub clauses: Vec<Clause>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    pub negated: bool,
    pub any: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// Where it must be; anywhere unless said.
    pub field: Option<Field>,
    pub what: What,
    /// Where it stands in `q`, without its field.
    pub span: Range<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A word in any of its forms. While it is being typed, its beginning is enough.
    Word { exact: String, stem: String, typed: bool },
    /// The beginning of a word.
    Prefix(String),
    /// These words, as they are, one after the other.
    Phrase(Vec<String>),
}

impl Query {
    /// `field` is what refusals call it.
    pub fn parse(field: &'static str, q: &str, stems: &Stems) -> Result<Query, Error> {
        let mut parser = Parser { field, q, stems, at: 0, clauses: Vec::new(), words: 0, or: false };
        while parser.next()? {}
        let clauses = parser.clauses;
        if clauses.iter().all(|clause| clause.negated) {
            let why = if clauses.is_empty() { "has no word to search for" } else { "needs a word without a minus" };
            return Err(Error::field(field, format!("{field} {why}")));
        }
        Ok(Query { clauses })
    }

    /// Its terms but for those that must not be there.
    pub fn wanted(&self) -> impl Iterator<Item = &Term> {
        self.clauses.iter().filter(|clause| !clause.negated).flat_map(|clause| &clause.any)
    }
}

struct Parser<'q> {
    field: &'static str,
    q: &'q str,
    stems: &'q Stems,
    at: usize,
    clauses: Vec<Clause>,
    /// How many there were so far.
    words: usize,
    /// The last thing was `OR`.
    or: bool,
}

impl<'q> Parser<'q> {
    /// Reads one term; `false` at the end.
    fn next(&mut self) -> Result<bool, Error> {
        let rest = &self.q[self.at..];
        let Some(skipped) = rest.find(|c: char| !c.is_whitespace()) else { return Ok(false) };
        self.at += skipped;
        let negated = self.rest().starts_with('-') && self.rest()[1..].starts_with(|c: char| !c.is_whitespace());
        self.at += usize::from(negated);
        let field = self.field();

        if let Some(quoted) = self.rest().strip_prefix('"') {
            let (inside, length) = match quoted.find('"') {
                Some(end) => (&quoted[..end], end + 2),
                None => (quoted, quoted.len() + 1),
            };
            let span = self.at..self.at + length;
            let phrase = self.words_of(inside)?;
            self.at = span.end;
            if !phrase.is_empty() {
                self.push(negated, Term { field, what: What::Phrase(phrase), span })?;
            }
            return Ok(true);
        }

        let rest = self.rest();
        let length = rest.find(|c: char| c.is_whitespace() || c == '"').unwrap_or(rest.len());
        let chunk = &rest[..length];
        let span = self.at..self.at + length;
        self.at = span.end;
        if chunk == "OR" && field.is_none() && !negated {
            self.or = !self.clauses.is_empty();
            return Ok(true);
        }
        let at_end = span.end == self.q.len();
        if let Some(what) = self.term(chunk, at_end && !negated)? {
            self.push(negated, Term { field, what, span })?;
        }
        Ok(true)
    }

    fn refuse(&self, why: &str) -> Error {
        Error::field(self.field, format!("in {} {why}", self.field))
    }

    fn rest(&self) -> &'q str {
        &self.q[self.at..]
    }

    /// The field before a word, if there is one.
    fn field(&mut self) -> Option<Field> {
        let (name, word) = self.rest().split_once(':')?;
        let field = Field::named(name)?;
        if word.is_empty() || word.starts_with(char::is_whitespace) {
            return None;
        }
        self.at += name.len() + 1;
        Some(field)
    }

    /// What was written between two spaces; nothing if that is no word.
    fn term(&mut self, chunk: &str, at_end: bool) -> Result<Option<What>, Error> {
        let begins = chunk.strip_suffix('*');
        let mut found = self.words_of(begins.unwrap_or(chunk))?;
        let is_word_to_the_end = words(chunk).last().is_some_and(|word| word.end == chunk.len());
        Ok(match (found.len(), begins.is_some()) {
            (0, _) => None,
            (1, true) => found.pop().map(What::Prefix),
            (_, true) => return Err(self.refuse("a star stands at the end of one word: pre*")),
            (1, false) => found.pop().map(|exact| {
                let typed = at_end && is_word_to_the_end && exact.chars().count() >= TYPED_FROM;
                What::Word { stem: self.stems.stem(&exact), exact, typed }
            }),
            (_, false) => Some(What::Phrase(found)),
        })
    }

    fn words_of(&mut self, text: &str) -> Result<Vec<String>, Error> {
        let left = MAX_WORDS - self.words;
        let found: Vec<String> = words(text).map(|word| word.folded).take(left + 1).collect();
        if found.len() > left {
            return Err(Error::field(self.field, format!("{} has at most {MAX_WORDS} words", self.field)));
        }
        self.words += found.len();
        Ok(found)
    }

    fn push(&mut self, negated: bool, term: Term) -> Result<(), Error> {
        if !std::mem::take(&mut self.or) {
            self.clauses.push(Clause { negated, any: vec![term] });
            return Ok(());
        }
        match self.clauses.last_mut() {
            Some(clause) if !clause.negated && !negated => {
                clause.any.push(term);
                Ok(())
            }
            _ => Err(self.refuse("OR stands between words without a minus")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In words: `+` between clauses, `|` within one.
    fn read(q: &str) -> String {
        let stems = Stems::of("english").expect("it is there");
        let term = |term: &Term| {
            let field = term.field.map_or(String::new(), |field| format!("{}:", field.name()));
            field
                + &match &term.what {
                    What::Word { exact, stem, typed } => format!("{exact}~{stem}{}", if *typed { "…" } else { "" }),
                    What::Prefix(prefix) => format!("{prefix}*"),
                    What::Phrase(words) => format!("[{}]", words.join(" ")),
                }
        };
        match Query::parse("q", q, &stems) {
            Ok(query) => {
                let clause = |it: &Clause| {
                    let any: Vec<String> = it.any.iter().map(term).collect();
                    format!("{}{}", if it.negated { "-" } else { "" }, any.join("|"))
                };
                query.clauses.iter().map(clause).collect::<Vec<_>>().join("+")
            }
            Err(error) => {
                assert_eq!(error.field.as_deref(), Some("q"), "{error:?}");
                format!("! {}", error.message)
            }
        }
    }

    #[test]
    fn a_query_is_read_as_it_is_written() {
        for (q, read_as) in [
            ("running fast ", "running~run+fast~fast"),
            ("running fas", "running~run+fas~fas…"),
            ("a", "a~a"),
            ("run! ", "run~run"),
            ("run!", "run~run"),
            ("\"Running Fast\"", "[running fast]"),
            ("\"never closed", "[never closed]"),
            ("\"one\"two ", "[one]+two~two"),
            ("pre* x ", "pre*+x~x"),
            ("keep -drop -\"not this\" ", "keep~keep+-drop~drop+-[not this]"),
            ("keep -drop", "keep~keep+-drop~drop"),
            ("a OR b c ", "a~a|b~b+c~c"),
            ("OR a OR OR b OR ", "a~a|b~b"),
            ("or ", "or~or"),
            (
                "tool:web_search title:plans result:\"two words\" ",
                "tool:[web search]+title:plans~plan+result:[two words]",
            ),
            ("-tool:grep x ", "-tool:grep~grep+x~x"),
            ("arguments:ber*", "arguments:ber*"),
            ("time:12 text: x ", "[time 12]+text~text+x~x"),
            ("a - b ", "a~a+b~b"),
            ("foo-bar", "[foo bar]"),
            ("Crème ", "creme~creme"),
            ("😀 ((( x ", "😀~😀+x~x"),
        ] {
            assert_eq!(read(q), read_as, "{q}");
        }
    }

    #[test]
    fn what_cannot_be_searched_for_is_refused_and_names_q() {
        for q in ["", "   ", "((((", "-", "*", "\"\"", "OR", "\u{200f}"] {
            assert_eq!(read(q), "! q has no word to search for", "{q}");
        }
        assert_eq!(read("-a -b"), "! q needs a word without a minus");
        assert_eq!(read("-a OR b"), "! in q OR stands between words without a minus");
        assert_eq!(read("a OR -b"), "! in q OR stands between words without a minus");
        assert_eq!(read("foo-bar*"), "! in q a star stands at the end of one word: pre*");
        assert_eq!(read(&"w ".repeat(10_000)), "! q has at most 64 words");
        assert_eq!(read(&format!("\"{}\"", "w ".repeat(65))), "! q has at most 64 words");
        assert!(!read(&"w ".repeat(64)).starts_with('!'));
    }

    #[test]
    fn a_term_knows_where_it_stands() {
        let q = "x -title:Plans \"a b\" foo*";
        let query = Query::parse("q", q, &Stems::PLAIN).expect("it is one");
        let spans: Vec<&str> = query.clauses.iter().map(|clause| &q[clause.any[0].span.clone()]).collect();
        assert_eq!(spans, ["x", "Plans", "\"a b\"", "foo*"]);
    }
}
