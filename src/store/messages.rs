//! Messages that agents write in deltas: how far each has come, and the text of those that are still being written.

use bincode::{BorrowDecode, Decode, Encode};

use super::catalogue::{MESSAGE_TEXTS, MESSAGES, OPEN_MESSAGES, RUN_MESSAGES};
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
    /// Its number in its thread.
    pub number: u64,
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

/// Which message has a number.
#[derive(Debug, Encode, Decode)]
struct OpenMessageRow {
    run: String,
    message: String,
}

#[derive(Debug, Encode, BorrowDecode)]
struct TextRow<'a> {
    text: &'a str,
}

impl MessageKey {
    fn bytes(&self, partitioning: Partitioning) -> Vec<u8> {
        [&self.run.under(partitioning)[..], self.message.as_bytes()].concat()
    }

    fn listed(&self, partitioning: Partitioning, begun: u64) -> Vec<u8> {
        [&self.run.under(partitioning)[..], &begun.to_be_bytes(), self.message.as_bytes()].concat()
    }

    fn open(&self, partitioning: Partitioning, row: &MessageRow) -> Vec<u8> {
        keys::open_message(self.run.partition(partitioning), &self.run.tenant, &self.run.thread, row.number)
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

    /// A run's messages in the order in which they were begun.
    pub fn messages_of(&self, run: &RunKey) -> impl Iterator<Item = Result<(String, MessageRow), StoreError>> {
        let (run, mut listed) = (run.clone(), self.under(RUN_MESSAGES, run.under(self.partitioning)));
        std::iter::from_fn(move || {
            loop {
                let rest = match listed.next()? {
                    Ok((rest, _)) => rest,
                    Err(error) => return Some(Err(error)),
                };
                let Some(name) = rest.get(size_of::<u64>()..) else { continue };
                let key = MessageKey { run: run.clone(), message: String::from_utf8_lossy(name).into_owned() };
                match self.message(&key) {
                    Ok(Some(row)) => return Some(Ok((key.message, row))),
                    Ok(None) => {}
                    Err(error) => return Some(Err(error)),
                }
            }
        })
    }

    /// Messages of the thread that are still being written, with their numbers, from this number on.
    pub fn open_messages(
        &self,
        tenant: &str,
        thread: &str,
        from: u64,
    ) -> Result<impl Iterator<Item = Result<(u64, MessageKey), StoreError>>, StoreError> {
        // Below the oldest there is nothing but what the store remembers of deleted rows; a reader need not pass over that.
        let row = self.thread(tenant, thread)?.filter(|row| row.writing > 0);
        let (tenant, thread) = (tenant.to_owned(), thread.to_owned());
        let rows = row.map(|row| {
            let partition = self.partition(&tenant, &thread);
            let begin = keys::open_message(partition, &tenant, &thread, from.max(row.oldest_open));
            self.between(OPEN_MESSAGES, &begin, keys::after(keys::prefix(partition, &[&tenant, &thread])))
        });
        Ok(rows.into_iter().flatten().map(move |row| {
            let (key, value) = row?;
            let OpenMessageRow { run, message } = self.decoded(OPEN_MESSAGES, &value)?;
            let key_of = MessageKey { run: RunKey::new(&tenant, &thread, &run), message };
            Ok((keys::seq_of(&key).unwrap_or(0), key_of))
        }))
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
    }

    /// The message's first delta was put.
    pub fn open_message(&mut self, key: &MessageKey, row: &MessageRow) {
        self.put_empty(RUN_MESSAGES, &key.listed(self.store.partitioning, row.begun));
        let open = OpenMessageRow { run: key.run.run.clone(), message: key.message.clone() };
        self.put(OPEN_MESSAGES, &key.open(self.store.partitioning, row), &open);
    }

    /// A message is closed: its event has the text now.
    pub fn close_message(&mut self, key: &MessageKey, row: &MessageRow, text: &WrittenText) -> Result<(), StoreError> {
        self.put(MESSAGES, &key.bytes(self.store.partitioning), row);
        self.delete(OPEN_MESSAGES, &key.open(self.store.partitioning, row));
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
