//! The index on disk: one tantivy index of this node for all tenants.
//!
//! Each term begins with its tenant (`tenant NUL word`). So a tenant's postings, its dictionary and all statistics are ranges
//! of its own, and no query of one tenant reads what another has written, however many tenants there are.
//!
//! - `exact`: folded words with their positions; phrases and beginnings of words;
//! - `stem`: stems; words;
//! - `parts`: of events that have more than text, the same words by field (`tenant NUL field e|s word`);
//! - `tags`: what an event is filtered by (`tenant NUL t thread`, `u` user, `k` kind, `r` run); `d` for each, `x` if it is text alone;
//! - `at`, `offset`, `partition`, `seq`, `thread` (a hash): columns.
//!
//! Events are not in it: the store has them. A commit carries how far it has come ([`Progress`]), so that index and position
//! are one; whatever follows is read again from there. Deleted, it is made anew.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tantivy::directory::MmapDirectory;
use tantivy::directory::error::OpenReadError;
use tantivy::index::SegmentId;
use tantivy::indexer::{IndexWriterOptions, NoMergePolicy};
use tantivy::schema::{
    Document as IndexDocument, FAST, Field as Column, IndexRecordOption, NumericOptions, Schema, TextFieldIndexing,
    TextOptions,
};
use tantivy::tokenizer::{PreTokenizedString, Token as IndexToken};
use tantivy::{FutureResult, Index, IndexReader, IndexWriter, ReloadPolicy, Searcher, TantivyDocument, TantivyError};

use super::document::{Document, Field, Token};
use crate::panics;
use crate::store::Place;

/// About how many bytes of rows may be on their way to tantivy's thread, whose channel is bounded in rows alone; a larger row is
/// there by itself.
const ON_THE_WAY: usize = 2 << 20;
/// About what a word takes in a row beside its text.
const TOKEN: usize = 96;
/// If nothing was taken for so long, it is not taken any more.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);

/// What the rows of an index mean; one of another version is made anew.
const FORMAT: u32 = 1;

/// What tags a document has: one letter each.
pub const ALL: char = 'd';
pub const TEXT_ONLY: char = 'x';
pub const THREAD: char = 't';
pub const USER: char = 'u';
pub const KIND: char = 'k';
pub const RUN: char = 'r';

/// The columns and terms of the index.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    pub exact: Column,
    pub stem: Column,
    pub parts: Column,
    pub tags: Column,
    at: Column,
    partition: Column,
    offset: Column,
    seq: Column,
    thread: Column,
}

/// How far an index has come, and what it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    format: u32,
    /// Of the log.
    epoch: String,
    language: String,
    /// For each partition the last event that is in it: partition, offset, seq.
    places: Vec<(u32, u64, u64)>,
}

impl Progress {
    pub fn new(epoch: &str, language: &str, places: &[Option<Place>]) -> Progress {
        let places = (0..).zip(places);
        let places = places.filter_map(|(partition, place): (u32, _)| place.map(|it| (partition, it.offset, it.seq)));
        Progress { format: FORMAT, epoch: epoch.to_owned(), language: language.to_owned(), places: places.collect() }
    }

    /// The last event in each of so many partitions.
    pub fn places(&self, partitions: usize) -> Vec<Option<Place>> {
        let mut places = vec![None; partitions];
        for (partition, offset, seq) in &self.places {
            if let Some(place) = places.get_mut(*partition as usize) {
                *place = Some(Place { offset: *offset, seq: *seq });
            }
        }
        places
    }

    /// Whether this version reads it.
    pub fn is_current(&self) -> bool {
        self.format == FORMAT
    }

    /// What it is of: the log's epoch, and the language.
    pub fn origin(&self) -> (&str, &str) {
        (&self.epoch, &self.language)
    }

    /// Whether an index with this progress can be gone on with.
    fn fits(&self, other: &Progress) -> bool {
        (self.format, &self.epoch, &self.language) == (other.format, &other.epoch, &other.language)
    }
}

/// A term of a tenant.
pub fn term(tenant: &str, what: &str) -> String {
    format!("{tenant}\0{what}")
}

/// A tag of a tenant.
pub fn tag(tenant: &str, letter: char, value: &str) -> String {
    format!("{tenant}\0{letter}{value}")
}

/// A word of one field, in its exact form or as a stem.
pub fn part(tenant: &str, field: Field, is_stem: bool, word: &str) -> String {
    let letter = match field {
        Field::Text => 'm',
        Field::Tool => 't',
        Field::Arguments => 'a',
        Field::Result => 'r',
        Field::Title => 'h',
    };
    format!("{tenant}\0{letter}{}{word}", if is_stem { 's' } else { 'e' })
}

/// A thread, as the column has it.
pub fn thread_hash(tenant: &str, thread: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(tenant.as_bytes()).update(&[0]).update(thread.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// The index, with its one writer.
pub struct Files {
    pub columns: Columns,
    reader: IndexReader,
    writer: IndexWriter<Row>,
    way: Arc<Way>,
    /// How far it had come when it was opened; nothing if it was begun.
    pub found: Option<Progress>,
}

/// Opens the index in `path`, or begins it anew if it is not there, not one of this log and language, or damaged. Its writer
/// holds so much memory, and is the only one: another process that has it open is an error.
pub fn open(path: &Path, wanted: &Progress, memory: usize) -> Result<Files, OpenError> {
    match try_open(path, memory) {
        Ok(files) if files.found.as_ref().is_none_or(|found| found.fits(wanted)) => return Ok(files),
        Ok(_) => tracing::info!("the index of search is of another log, language or version: making it anew"),
        Err(TantivyError::LockFailure(..)) => return Err(OpenError::InUse(path.to_owned())),
        // Too many open files, say: the index may be as it should.
        Err(error) if !may_be_damage(&error) => return Err(error.into()),
        Err(error) => tracing::warn!(%error, "the index of search cannot be read: making it anew"),
    }
    std::fs::remove_dir_all(path)?;
    Ok(try_open(path, memory)?)
}

/// Whether an error may be due to what the files of the index hold, or lack, and not to what the system could not do just then.
pub fn may_be_damage(error: &TantivyError) -> bool {
    let io = match error {
        TantivyError::IoError(error) => error,
        TantivyError::OpenReadError(OpenReadError::IoError { io_error, .. }) => io_error,
        TantivyError::OpenDirectoryError(_)
        | TantivyError::OpenWriteError(_)
        | TantivyError::LockFailure(..)
        // A thread that writes new segments, and reads no others.
        | TantivyError::ErrorInThread(_) => return false,
        _ => return true,
    };
    matches!(io.kind(), ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    #[error(transparent)]
    Disk(#[from] std::io::Error),
    #[error(transparent)]
    Index(#[from] TantivyError),
}

fn schema() -> (Schema, Columns) {
    let text = |record, norms| {
        let indexing = TextFieldIndexing::default().set_tokenizer("raw").set_index_option(record).set_fieldnorms(norms);
        TextOptions::default().set_indexing_options(indexing)
    };
    let column = || NumericOptions::from(FAST);
    let mut schema = Schema::builder();
    let columns = Columns {
        exact: schema.add_text_field("exact", text(IndexRecordOption::WithFreqsAndPositions, true)),
        stem: schema.add_text_field("stem", text(IndexRecordOption::WithFreqs, true)),
        parts: schema.add_text_field("parts", text(IndexRecordOption::WithFreqsAndPositions, true)),
        tags: schema.add_text_field("tags", text(IndexRecordOption::Basic, false)),
        at: schema.add_u64_field("at", column()),
        partition: schema.add_u64_field("partition", column()),
        offset: schema.add_u64_field("offset", column()),
        seq: schema.add_u64_field("seq", column()),
        thread: schema.add_u64_field("thread", column()),
    };
    (schema.build(), columns)
}

fn try_open(path: &Path, memory: usize) -> Result<Files, TantivyError> {
    std::fs::create_dir_all(path)?;
    let directory = MmapDirectory::open(path)?;
    let (schema, columns) = schema();
    let index = Index::open_or_create(directory, schema)?;
    let found = read_progress(index.load_metas()?.payload.as_deref())?;
    let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    let options = IndexWriterOptions::builder()
        .num_worker_threads(1)
        .num_merge_threads(1)
        .memory_budget_per_thread(memory)
        .build();
    let writer = index.writer_with_options(options)?;
    // Which segments become one is decided by their time, which tantivy's policies do not see.
    writer.set_merge_policy(Box::new(NoMergePolicy));
    Ok(Files { columns, reader, writer, way: Arc::default(), found })
}

/// An index that is only looked at.
pub struct Looked {
    pub view: View,
    /// Nothing if nothing was ever committed.
    pub progress: Option<Progress>,
}

/// Opens the index in `path`, whose files are held against their checksums, and changes nothing in it. The error is the
/// library's, or says which file is not what was written.
pub fn look(path: &Path) -> Result<Looked, TantivyError> {
    let index = Index::open(MmapDirectory::open(path)?)?;
    let (schema, columns) = schema();
    if index.schema() != schema {
        return Err(TantivyError::SchemaError("its columns are not those of this version".to_owned()));
    }
    let (directory, metas) = (index.directory(), index.load_metas()?);
    let files = metas.list_segment_files();
    // Of a segment not all files need be there; one that is missed fails below.
    for file in files.iter().filter(|file| path.join(file).exists()) {
        if !directory.validate_checksum(file)? {
            return Err(TantivyError::InvalidArgument(format!("{} is not what was written", file.display())));
        }
    }
    let progress = read_progress(metas.payload.as_deref())?;
    let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    Ok(Looked { view: View::new(columns, reader.searcher())?, progress })
}

/// How far an index says it has come, in what its commit carries.
fn read_progress(payload: Option<&str>) -> Result<Option<Progress>, TantivyError> {
    let read = payload.map(serde_json::from_str).transpose();
    read.map_err(|error| TantivyError::InvalidArgument(format!("its progress: {error}")))
}

impl Files {
    /// Adds an event; it is found once it is committed.
    pub fn add(&self, partition: u32, place: Place, document: &Document) -> Result<(), TantivyError> {
        let columns = &self.columns;
        let tenant = &*document.tenant;
        let mut row = TantivyDocument::default();
        let tokens = &document.tokens;
        row.add_pre_tokenized_text(
            columns.exact,
            stream(tokens.iter().map(|token| (token, term(tenant, &token.exact)))),
        );
        row.add_pre_tokenized_text(
            columns.stem,
            stream(tokens.iter().map(|token| (token, term(tenant, token.stem())))),
        );

        let mut tags = vec![tag(tenant, ALL, "")];
        if document.is_text() {
            tags.push(tag(tenant, TEXT_ONLY, ""));
        } else {
            let parts = tokens.iter().flat_map(|token| {
                let exact = part(tenant, token.field, false, &token.exact);
                [(token, exact), (token, part(tenant, token.field, true, token.stem()))]
            });
            row.add_pre_tokenized_text(columns.parts, stream(parts));
        }
        tags.push(tag(tenant, THREAD, &document.thread));
        tags.push(tag(tenant, USER, &document.from));
        tags.push(tag(tenant, KIND, &document.kind));
        tags.extend(document.run.as_ref().map(|run| tag(tenant, RUN, run)));
        for tag in tags {
            row.add_text(columns.tags, tag);
        }

        row.add_u64(columns.at, document.at);
        row.add_u64(columns.partition, partition.into());
        row.add_u64(columns.offset, place.offset);
        row.add_u64(columns.seq, place.seq);
        row.add_u64(columns.thread, thread_hash(tenant, &document.thread));
        let texts = tokens.iter().map(|token| 2 * (TOKEN + tenant.len()) + token.exact.len() + token.stem().len());
        let bytes = texts.sum::<usize>() * if document.is_text() { 1 } else { 2 };
        let room = Way::enter(&self.way, bytes)?;
        self.writer.add_document(Row { document: row, _room: room }).map(drop)
    }

    /// Makes durable and visible what was added, with how far that is.
    pub fn commit(&mut self, progress: &Progress) -> Result<(), TantivyError> {
        let mut commit = self.writer.prepare_commit()?;
        let payload = serde_json::to_string(progress);
        commit.set_payload(&payload.map_err(|error| TantivyError::InvalidArgument(error.to_string()))?);
        commit.commit()?;
        Ok(())
    }

    /// What is committed, as it is now.
    pub fn view(&self) -> Result<Arc<View>, TantivyError> {
        self.reader.reload()?;
        View::new(self.columns, self.reader.searcher()).map(Arc::new)
    }

    /// Whether what is committed is not what was written, by the checksums of all files. Not while segments are merged.
    pub fn is_damaged(&self) -> Result<bool, TantivyError> {
        match panics::caught(|| self.writer.index().validate_checksum()) {
            Ok(Ok(damaged)) => Ok(!damaged.is_empty()),
            Ok(Err(error)) if !may_be_damage(&error) => Err(error),
            Ok(Err(_)) | Err(_) => Ok(true),
        }
    }

    /// Begins to make one segment of several.
    pub fn merge(&mut self, segments: &[SegmentId]) -> Merging {
        self.writer.merge(segments)
    }
}

/// An event on its way into the index.
struct Row {
    document: TantivyDocument,
    _room: Room,
}

impl IndexDocument for Row {
    type Value<'a> = <TantivyDocument as IndexDocument>::Value<'a>;
    type FieldsValuesIter<'a> = <TantivyDocument as IndexDocument>::FieldsValuesIter<'a>;

    fn iter_fields_and_values(&self) -> Self::FieldsValuesIter<'_> {
        self.document.iter_fields_and_values()
    }
}

/// How many bytes are on their way.
#[derive(Default)]
struct Way {
    held: Mutex<usize>,
    freed: Condvar,
}

impl Way {
    /// Waits until there is room.
    fn enter(way: &Arc<Way>, bytes: usize) -> Result<Room, TantivyError> {
        let held = way.held.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |held: &mut usize| *held > 0 && *held + bytes > ON_THE_WAY;
        let waited = way.freed.wait_timeout_while(held, TAKEN_WITHIN, is_full);
        let (mut held, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Err(TantivyError::ErrorInThread("it takes no events".to_owned()));
        }
        *held += bytes;
        Ok(Room { way: way.clone(), bytes })
    }
}

/// What a row holds of that, until it is dropped.
struct Room {
    way: Arc<Way>,
    bytes: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        *self.way.held.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.way.freed.notify_one();
    }
}

/// A merge under way: it goes on by itself.
pub type Merging = FutureResult<Option<tantivy::SegmentMeta>>;

fn stream<'t>(words: impl Iterator<Item = (&'t Token, String)>) -> PreTokenizedString {
    let token = |(token, text): (&Token, String)| IndexToken {
        position: token.position as usize,
        position_length: 1,
        offset_from: 0,
        offset_to: 0,
        text,
    };
    PreTokenizedString { text: String::new(), tokens: words.map(token).collect() }
}

/// What is committed at one moment.
pub struct View {
    pub columns: Columns,
    pub searcher: Searcher,
    /// Newest first.
    pub segments: Vec<SegmentTimes>,
}

/// A segment, and the times of its events.
pub struct SegmentTimes {
    pub number: u32,
    pub id: SegmentId,
    pub events: u32,
    pub from: u64,
    pub to: u64,
}

impl View {
    fn new(columns: Columns, searcher: Searcher) -> Result<View, TantivyError> {
        let mut segments = Vec::new();
        for (number, reader) in (0..).zip(searcher.segment_readers()) {
            let at = reader.fast_fields().u64("at")?;
            let (id, events) = (reader.segment_id(), reader.max_doc());
            segments.push(SegmentTimes { number, id, events, from: at.min_value(), to: at.max_value() });
        }
        segments.sort_by_key(|segment| (std::cmp::Reverse(segment.to), std::cmp::Reverse(segment.from)));
        Ok(View { columns, searcher, segments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_is_bounded_and_one_of_any_size_goes_by_itself() {
        let way = Arc::new(Way::default());
        let large = Way::enter(&way, 10 * ON_THE_WAY).expect("nothing is before it");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| {
                let room = Way::enter(&way, 1).expect("it waits until the large one is taken");
                assert_eq!(*way.held.lock().expect("nobody panicked"), 1);
                drop(room);
            });
            drop(large);
            next.join().expect("it enters");
        });
        let half = Way::enter(&way, ON_THE_WAY / 2).expect("there is room");
        let other = Way::enter(&way, ON_THE_WAY / 2).expect("there is room for both");
        drop((half, other));
        assert_eq!(*way.held.lock().expect("nobody panicked"), 0);
    }
}
