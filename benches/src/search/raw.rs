//! tantivy bare, with one field and no rights: the least that a search of these texts takes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tantivy::collector::TopDocs;
use tantivy::query::{BooleanQuery, Occur, PhrasePrefixQuery, PhraseQuery, Query, TermQuery};
use tantivy::schema::{FAST, Field, IndexRecordOption, Schema, TEXT};
use tantivy::{Index, Order, Searcher, TantivyDocument, Term};

use super::{HITS, Kind, Question};
use weft::cli::common::Failure;

/// What the server's index has for what is not committed yet, with `--memory` as it is unless given.
const MEMORY: usize = 64 << 20;

pub struct Raw {
    searcher: Searcher,
    text: Field,
    /// Texts that were indexed a second, with one thread, up to the commit of the last.
    pub indexed: f64,
    /// Gone with this.
    _folder: Folder,
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to whoever clears the folder of temporary files.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

impl Raw {
    pub fn index(folder: &Path, texts: impl ExactSizeIterator<Item = String>) -> Result<Raw, Failure> {
        std::fs::create_dir(folder)?;
        let folder = Folder(folder.to_owned());
        let mut schema = Schema::builder();
        let (text, number) = (schema.add_text_field("text", TEXT), schema.add_u64_field("number", FAST));
        let index = Index::create_in_dir(&folder.0, schema.build())?;
        let mut writer = index.writer_with_num_threads::<TantivyDocument>(1, MEMORY)?;
        let (begun, count) = (Instant::now(), texts.len());
        for (at, words) in (0u64..).zip(texts) {
            let mut document = TantivyDocument::default();
            document.add_text(text, words);
            document.add_u64(number, at);
            writer.add_document(document)?;
        }
        writer.commit()?;
        let indexed = count as f64 / begun.elapsed().as_secs_f64();
        writer.wait_merging_threads()?;
        Ok(Raw { searcher: index.reader()?.searcher(), text, indexed, _folder: folder })
    }

    /// How many hits a question has, up to [`HITS`].
    pub fn ask(&self, question: &Question) -> Result<usize, Failure> {
        let term = |word: &String| Term::from_field_text(self.text, word);
        let query: Box<dyn Query> = match question.kind {
            Kind::Word | Kind::Words => {
                let words = question.words.iter().map(|word| {
                    let query = TermQuery::new(term(word), IndexRecordOption::WithFreqs);
                    (Occur::Must, Box::new(query) as Box<dyn Query>)
                });
                Box::new(BooleanQuery::new(words.collect()))
            }
            Kind::Phrase => Box::new(PhraseQuery::new(question.words.iter().map(term).collect())),
            Kind::Prefix => {
                let mut query = PhrasePrefixQuery::new(question.words.iter().map(term).collect());
                query.set_max_expansions(u32::MAX);
                Box::new(query)
            }
        };
        Ok(match question.kind {
            Kind::Prefix => {
                let newest = TopDocs::with_limit(HITS).order_by_u64_field("number", Order::Desc);
                self.searcher.search(&query, &newest)?.len()
            }
            _ => self.searcher.search(&query, &TopDocs::with_limit(HITS).order_by_score())?.len(),
        })
    }
}
