//! An export as text: its lines in each format, and the seals that prove that none of them was changed.
//!
//! Format, whichever it is:
//! - the first line is a note that says what was asked for, of which log, and up to which of its positions ([`Header`]);
//! - then come lines of data, thread by thread;
//! - after a thread's events, in the formats that have them as they are, comes a note with its head and hash;
//! - about every [`MARK_BYTES`], and where much was looked at to write little, there is a note from which an export that was
//!   cut off goes on;
//! - the last line is a note with the number of all lines of data.
//!
//! The last two kinds of notes are seals. Each has a digest of every byte since the seal before it, and of that seal's
//! digest; what follows the digest in its line is always the same. So a byte that was changed, left out or added is found,
//! and no more than what is between two seals has to be held, or hashed again, to go on.
//!
//! Nothing here depends on the time or on how the lines were read: the same events are the same bytes. Only whether a mask
//! takes too long does, and that ends an export.

pub mod chat;
pub mod csv;
pub mod mask;
pub mod otel;
pub mod verify;

use serde::{Deserialize, Serialize};

use crate::protocol::{event, json};

/// The version of the format.
pub const VERSION: u32 = 1;
/// There is a mark once so many bytes were written since the seal before.
pub const MARK_BYTES: usize = 1 << 20;
/// A digest as text.
const HEX: usize = 64;

/// What the lines of data are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Each event as readers get it.
    Jsonl,
    /// Each event as a row.
    Csv,
    /// Runs and their calls as OpenTelemetry's spans.
    Otel,
    /// Threads as chat messages, for datasets.
    Chat,
}

impl Format {
    pub const ALL: [(&'static str, Format); 4] =
        [("jsonl", Format::Jsonl), ("csv", Format::Csv), ("otel", Format::Otel), ("chat", Format::Chat)];

    pub fn content_type(self) -> &'static str {
        match self {
            Format::Csv => "text/csv; charset=utf-8; header=present",
            Format::Jsonl | Format::Otel | Format::Chat => "application/x-ndjson",
        }
    }

    /// Whether each line is an event as it is, so that a thread's hash says something of them.
    pub fn has_events(self) -> bool {
        matches!(self, Format::Jsonl | Format::Csv)
    }

    /// What stands before the text of a note: so that readers of the format find in it what they look for, and nothing more.
    fn opens(self, kind: &str) -> String {
        match self {
            Format::Jsonl => String::new(),
            Format::Otel => r#"{"resourceSpans":[],"weft":"#.to_owned(),
            Format::Chat => r#"{"messages":[],"weft":"#.to_owned(),
            Format::Csv => format!("{kind}{}\"", ",".repeat(csv::COLUMNS.len() - 1)),
        }
    }

    /// The text of a note, or a part of it, as it stands in its line.
    fn quoted(self, note: &str) -> String {
        if self == Format::Csv { note.replace('"', "\"\"") } else { note.to_owned() }
    }

    fn closes(self) -> &'static str {
        match self {
            Format::Jsonl => "\n",
            Format::Otel | Format::Chat => "}\n",
            Format::Csv => "\"\r\n",
        }
    }

    /// A note's line.
    pub fn note(self, note: &Note) -> String {
        [&self.opens(note.kind()), &self.quoted(&json::encode(note)), self.closes()].concat()
    }

    /// A seal's line: what stands before its digest, and after it.
    fn seal(self, note: &Note) -> (String, String) {
        let text = json::encode(note);
        let fields = text.strip_suffix('}').unwrap_or(&text);
        let before = [self.opens(note.kind()), self.quoted(fields), self.quoted(r#","blake3":""#)].concat();
        (before, self.after_digest())
    }

    fn after_digest(self) -> String {
        [&self.quoted(r#""}"#), self.closes()].concat()
    }
}

/// What was asked for, and of which log. Whoever asks for the same again, with `epoch` and `positions`, gets the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    pub format: Format,
    pub tenant: String,
    /// The log's.
    pub epoch: String,
    /// For each partition of events the first offset that is not in the export.
    pub positions: Vec<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kinds: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
}

impl Header {
    /// Whether it has all events of its threads, as they are: then their hashes can be made from it.
    pub fn is_whole(&self) -> bool {
        let narrowed = [&self.since, &self.until, &self.kinds, &self.from, &self.mask];
        self.format == Format::Jsonl && narrowed.iter().all(|it| it.is_none())
    }
}

/// A line about the export itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Note {
    /// The first line.
    Export(Header),
    /// A thread is over.
    Thread {
        thread: String,
        /// Events of it that are in the export, and the seqs of the first and last.
        events: u64,
        first: u64,
        last: u64,
        /// The thread's newest seq at the positions of the header, and its link of the chain.
        head: u64,
        hash: String,
    },
    /// What comes after this line is asked for with this cursor and digest.
    Mark {
        cursor: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blake3: Option<String>,
    },
    /// The last line.
    End {
        /// Lines of data.
        lines: u64,
        /// Threads that have any.
        threads: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blake3: Option<String>,
    },
    /// The last line of an export that the server could not finish.
    Error { code: String, detail: String },
}

impl Note {
    fn kind(&self) -> &'static str {
        match self {
            Note::Export(_) => "export",
            Note::Thread { .. } => "thread",
            Note::Mark { .. } => "mark",
            Note::End { .. } => "end",
            Note::Error { .. } => "error",
        }
    }
}

/// The digest of what was written since the seal before.
struct Seal {
    hasher: blake3::Hasher,
    bytes: usize,
}

impl Seal {
    fn after(digest: &[u8; 32]) -> Seal {
        let mut hasher = blake3::Hasher::new();
        hasher.update(digest);
        Seal { hasher, bytes: 0 }
    }

    fn update(&mut self, text: &[u8]) {
        self.hasher.update(text);
        self.bytes += text.len();
    }

    fn close(&mut self) -> blake3::Hash {
        let digest = self.hasher.finalize();
        *self = Seal::after(digest.as_bytes());
        digest
    }
}

/// Writes the lines of an export.
pub struct Writer {
    pub format: Format,
    seal: Seal,
    out: String,
    /// How much of `out` is in the digest.
    hashed: usize,
}

impl Writer {
    /// A new one, or one that goes on after the seal with this digest.
    pub fn new(format: Format, after: Option<[u8; 32]>) -> Writer {
        Writer { format, seal: Seal::after(&after.unwrap_or_default()), out: String::new(), hashed: 0 }
    }

    /// The text to append a line of data to, with its end.
    pub fn out(&mut self) -> &mut String {
        &mut self.out
    }

    pub fn note(&mut self, note: &Note) {
        if let (Format::Csv, Note::Export(_)) = (self.format, note) {
            csv::put_header(&mut self.out);
        }
        self.out.push_str(&self.format.note(note));
    }

    pub fn seal(&mut self, note: &Note) {
        let (before, after) = self.format.seal(note);
        self.out.push_str(&before);
        self.hash();
        self.out.push_str(&self.seal.close().to_hex());
        self.out.push_str(&after);
        self.hashed = self.out.len();
    }

    /// Bytes since the last seal.
    pub fn since_seal(&self) -> usize {
        self.seal.bytes + self.out.len() - self.hashed
    }

    /// Bytes that were written and not taken.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// What was written since this was called last.
    pub fn take(&mut self) -> String {
        self.hash();
        self.hashed = 0;
        std::mem::take(&mut self.out)
    }

    fn hash(&mut self) {
        self.seal.update(&self.out.as_bytes()[self.hashed..]);
        self.hashed = self.out.len();
    }
}

/// What is needed to make the values that a thread's hash covers of event frames.
pub struct Values {
    /// What every frame of the thread begins with, before its seq.
    frame: String,
    /// What the value begins with in its place.
    value: String,
}

impl Values {
    pub fn new(tenant: &str, thread: &str) -> Values {
        let (tenant, thread) = (json::encode(tenant), json::encode(thread));
        Values {
            frame: format!(r#"{{"type":"event","thread":{thread},"seq":"#),
            value: format!(r#"{{"tenant":{tenant},"thread":{thread},"#),
        }
    }

    /// The event's link of the thread's chain, if its record was as Weft writes them: the fields of the frame, in the same
    /// order, as the same text.
    pub fn link(&self, before: &[u8; 32], seq: u64, frame: &str) -> Option<[u8; 32]> {
        let rest = frame.strip_prefix(&self.frame)?;
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = rest.split_at(digits);
        let rest = rest.strip_prefix(',').filter(|_| number.parse() == Ok(seq))?;
        Some(event::chain_parts(before, seq, [self.value.as_bytes(), rest.as_bytes()]))
    }
}

/// An event as a line of jsonl. Line ends between its tokens, which are white space, become spaces. Where the event's link
/// cannot be made of the line, since its record was another program's or had not the text of the event, the line has it.
pub fn put_event(out: &mut String, frame: &str, made: Option<[u8; 32]>, link: &[u8; 32], whole: bool) {
    let is_one_line = !frame.bytes().any(|byte| matches!(byte, b'\r' | b'\n'));
    match is_one_line {
        true => out.push_str(frame),
        false => out.extend(frame.chars().map(|c| if matches!(c, '\r' | '\n') { ' ' } else { c })),
    }
    if whole && (made != Some(*link) || !is_one_line) && out.ends_with('}') {
        out.truncate(out.len() - 1);
        out.push_str(&format!(r#","hash":"{}"}}"#, blake3::Hash::from_bytes(*link).to_hex()));
    }
    out.push('\n');
}
