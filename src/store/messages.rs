//! Messages that agents write in deltas: how far each has come, and the text of those that are still being written.

use bincode::{BorrowDecode, Decode, Encode};
use rocksdb::{Direction, IteratorMode, ReadOptions};

use super::catalogue::{MESSAGE_TEXTS, MESSAGES, OPEN_MESSAGES};
use super::runs::{EventRef, RunKey};
use super::{Batch, RawRow, Store, StoreError, keys};
use crate::partitioning::Partitioning;

/// A message's key: its run, and its name there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MessageKey {
    pub run: RunKey,
    pub message: String,
}

/// A message that is written in deltas. Characters are Unicode scalar values.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MessageRow {
    /// Who began it.
    pub from: String,
    /// The newest delta.
    pub event: [u8; 16],
    /// The deltas that its run had before.
    pub begun: u64,
    /// How often it was begun anew. `chars` and `bytes` are those of the text since.
    pub restarts: u32,
    /// The length of its text by now.
    pub chars: u64,
    pub bytes: u64,
    /// Milliseconds.
    pub begun_at: u64,
    pub last_at: u64,
    pub closed: Option<ClosedRow>,
}

/// A place in the text of a message. Each time that the message is begun anew, characters count from 0 again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TextPosition {
    pub restarts: u32,
    /// The characters before it.
    pub chars: u64,
}

impl TextPosition {
    /// The beginning of the text that a message has since it was begun anew so often.
    pub fn beginning(restarts: u32) -> TextPosition {
        TextPosition { restarts, chars: 0 }
    }

    /// As the key of a row has it. A character's number is far below 2^32: a message has at most 1 MiB of text.
    fn row(self) -> u64 {
        u64::from(self.restarts) << 32 | self.chars
    }

    fn of_row(row: u64) -> TextPosition {
        TextPosition { restarts: (row >> 32) as u32, chars: row & u64::from(u32::MAX) }
    }
}

/// What closed a message.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ClosedRow {
    pub mark: EventRef,
    pub event: [u8; 16],
    /// Digest of what was published to close it.
    pub content: [u8; 32],
}

/// From this many deltas on, a message's text is deleted as one range. A range costs readers of the family more than a few
/// single rows do, and many single rows would make the batch long.
const MANY_DELTAS: usize = 256;

/// Where the text of a message stands.
pub struct WrittenText {
    /// How often the message had been begun anew when the store got what it has of the text; `None` if nothing of that counts.
    pub in_store: Option<u32>,
    /// Where the deltas begin that the batch has put.
    pub in_batch: Vec<TextPosition>,
}

#[derive(Debug, Encode, BorrowDecode)]
struct TextRow<'a> {
    text: &'a str,
}

impl MessageKey {
    fn bytes(&self, partitioning: Partitioning) -> Vec<u8> {
        [&self.run.under(partitioning)[..], self.message.as_bytes()].concat()
    }

    /// The prefix of the message's texts. Its name may hold a NUL, so its length stands before it.
    fn texts(&self, partitioning: Partitioning) -> Vec<u8> {
        [&self.run.under(partitioning)[..], &(self.message.len() as u16).to_be_bytes(), self.message.as_bytes()]
            .concat()
    }

    fn text(&self, partitioning: Partitioning, at: TextPosition) -> Vec<u8> {
        [&self.texts(partitioning)[..], &at.row().to_be_bytes()].concat()
    }
}

impl Store {
    pub fn message(&self, key: &MessageKey) -> Result<Option<MessageRow>, StoreError> {
        self.get(MESSAGES, &key.bytes(self.partitioning))
    }

    /// A run's messages, in the order of their names.
    pub fn messages_of(&self, run: &RunKey) -> impl Iterator<Item = Result<(String, MessageRow), StoreError>> {
        self.rows_under(MESSAGES, run.under(self.partitioning))
    }

    /// Of a run, the names of those that are still being written.
    pub fn open_messages_of(&self, run: &RunKey) -> impl Iterator<Item = Result<String, StoreError>> {
        self.names_under(OPEN_MESSAGES, run.under(self.partitioning))
    }

    /// Messages of the thread that are still being written, from after one on.
    pub fn open_messages(
        &self,
        tenant: &str,
        thread: &str,
        after: Option<&MessageKey>,
    ) -> impl Iterator<Item = Result<MessageKey, StoreError>> {
        let (tenant, thread) = (tenant.to_owned(), thread.to_owned());
        let prefix = keys::prefix(self.partition(&tenant, &thread), &[&tenant, &thread]);
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(keys::after(prefix.clone()));
        // Nothing is between a key and the same one with a NUL.
        let from = after.map_or(prefix.clone(), |after| [&after.bytes(self.partitioning)[..], &[0]].concat());
        let mode = IteratorMode::From(&from, Direction::Forward);
        let rows = self.db.iterator_cf_opt(&self.family(OPEN_MESSAGES), options, mode);
        rows.filter_map(move |row| {
            let key = match row {
                Ok((key, _)) => key,
                Err(error) => return Some(Err(self.note(error.into()))),
            };
            let (length, rest) = key.get(prefix.len()..)?.split_first_chunk::<2>()?;
            let (run, message) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            Some(Ok(MessageKey { run: RunKey::new(&tenant, &thread, &text(run)), message: text(message) }))
        })
    }

    /// The text of an open message after this place, and where that text begins: there, or at its first character if the
    /// message was begun anew since. Both are of one moment, whatever is committed meanwhile. A place in the message's newest
    /// text, as its row has it, spares the store from passing over what was deleted of those before.
    pub fn text_after(&self, key: &MessageKey, after: TextPosition) -> Result<(TextPosition, String), StoreError> {
        let (mut begin, mut text) = (after, String::new());
        for row in self.texts_from(key, after.restarts) {
            let (at, value) = row?;
            let at = TextPosition::of_row(keys::seq_of(&at).unwrap_or(0));
            let row: TextRow = self.decoded(MESSAGE_TEXTS, &value)?;
            if at.restarts != begin.restarts {
                begin = TextPosition::beginning(at.restarts);
            }
            let known = begin.chars.saturating_sub(at.chars);
            text.extend(row.text.chars().skip(known as usize));
        }
        Ok((begin, text))
    }

    /// The rows of a message's text since it was begun anew for this time, with their whole keys.
    fn texts_from(&self, key: &MessageKey, restarts: u32) -> impl Iterator<Item = Result<RawRow, StoreError>> {
        let from = key.text(self.partitioning, TextPosition::beginning(restarts));
        self.between(MESSAGE_TEXTS, &from, keys::after(key.texts(self.partitioning)))
    }
}

impl Batch<'_> {
    /// A message has grown by the text from there on.
    pub fn put_delta(&mut self, key: &MessageKey, row: &MessageRow, at: TextPosition, text: &str) {
        self.put(MESSAGES, &key.bytes(self.store.partitioning), row);
        self.put(MESSAGE_TEXTS, &key.text(self.store.partitioning, at), &TextRow { text });
        if at.chars == 0 {
            self.put_empty(OPEN_MESSAGES, &key.bytes(self.store.partitioning));
        }
    }

    /// A message is closed: its event has the text now.
    pub fn close_message(&mut self, key: &MessageKey, row: &MessageRow, text: &WrittenText) -> Result<(), StoreError> {
        self.put(MESSAGES, &key.bytes(self.store.partitioning), row);
        self.delete(OPEN_MESSAGES, &key.bytes(self.store.partitioning));
        self.delete_text(key, text)
    }

    /// The text of a message is dropped.
    pub fn delete_text(&mut self, key: &MessageKey, text: &WrittenText) -> Result<(), StoreError> {
        let mut texts: Vec<Vec<u8>> =
            text.in_batch.iter().take(MANY_DELTAS).map(|at| key.text(self.store.partitioning, *at)).collect();
        if let Some(restarts) = text.in_store {
            for row in self.store.texts_from(key, restarts).take(MANY_DELTAS) {
                texts.push(row?.0.into_vec());
            }
        }
        if texts.len() < MANY_DELTAS {
            texts.iter().for_each(|text| self.delete(MESSAGE_TEXTS, text));
        } else {
            self.delete_range(
                MESSAGE_TEXTS,
                &key.texts(self.store.partitioning),
                &keys::after(key.texts(self.store.partitioning)),
            );
        }
        Ok(())
    }
}
