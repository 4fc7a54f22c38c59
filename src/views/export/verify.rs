//! Reads an export and proves it complete and unaltered, without a server; or finds where one that was cut off can go on.

use std::io::{self, BufRead};

use serde::Deserialize;

use super::{Format, HEX, Header, Note, Seal, VERSION, Values, csv};

/// No line of an export is longer: an event with its text escaped, and room to spare.
const MAX_LINE: usize = 64 << 20;

/// What a whole export has.
#[derive(Debug)]
pub struct Verified {
    pub header: Header,
    pub lines: u64,
    pub threads: u64,
    /// Threads whose hash was made anew from all of their events.
    pub proved: u64,
    /// Threads with an event whose link stands in its line, since its record's value cannot be made of it. Their hash proves
    /// what comes after the last such event; what is before it, the digest alone.
    pub partly: u64,
    /// The last digest.
    pub digest: String,
}

/// Why a file is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum Flaw {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("line {line}: {why}")]
    At { line: u64, why: String },
    #[error("it ends after line {line} without its last line: it is not complete")]
    CutOff { line: u64 },
    #[error("it is not complete: the server ended it with {code}: {detail}")]
    Unfinished { code: String, detail: String },
}

/// Where an export can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    pub header: Header,
    /// Bytes up to the end of the last mark; 0 if there is none: then it begins anew.
    pub bytes: u64,
    /// What to ask for with, if there is a mark.
    pub cursor: Option<String>,
    /// The last line is there: nothing is missing.
    pub is_complete: bool,
}

/// Proves an export.
pub fn verify(file: impl BufRead) -> Result<Verified, Flaw> {
    let mut check = Check::begin(file)?;
    while !check.step()? {}
    let Check { mut lines, header, data, threads, proved, partly, digest, .. } = check;
    if !lines.next()?.is_empty() {
        return Err(lines.flaw("it follows the last line of an export"));
    }
    Ok(Verified { header, lines: data, threads, proved, partly, digest })
}

/// What an export is of. Nothing after that is read.
pub fn header(file: impl BufRead) -> Result<Header, Flaw> {
    Ok(Check::begin(file)?.header)
}

/// Finds the last mark before which everything is as it should be. What is wrong after that counts as cut off.
pub fn resume(file: impl BufRead) -> Result<Resume, Flaw> {
    let mut check = Check::begin(file)?;
    let mut found = Resume { header: check.header.clone(), bytes: 0, cursor: None, is_complete: false };
    loop {
        match check.step() {
            Ok(true) => return Ok(Resume { is_complete: true, ..found }),
            Ok(false) => {
                if let Some(cursor) = check.mark.take() {
                    found = Resume { bytes: check.lines.bytes, cursor: Some(cursor), ..found };
                }
            }
            Err(Flaw::Io(error)) => return Err(error.into()),
            Err(_) => return Ok(found),
        }
    }
}

/// The note that a text ends with, whichever format it is of.
pub fn last_note(text: &str) -> Option<Note> {
    let last = text.split_inclusive('\n').next_back()?;
    Format::ALL.into_iter().find_map(|(_, format)| note(format, last.as_bytes()))
}

/// The lines of a file, or its rows: of CSV a line end within quotes is none.
struct Lines<R> {
    file: R,
    format: Format,
    line: Vec<u8>,
    number: u64,
    bytes: u64,
}

impl<R: BufRead> Lines<R> {
    /// The next one, with its end; empty at the end of the file.
    fn next(&mut self) -> Result<&[u8], Flaw> {
        self.line.clear();
        let mut is_open = false;
        loop {
            let before = self.line.len();
            let room = (MAX_LINE - before) as u64 + 1;
            let read = io::Read::take(&mut self.file, room).read_until(b'\n', &mut self.line)?;
            self.number += 1;
            self.bytes += read as u64;
            if self.line.len() > MAX_LINE {
                return Err(self.flaw("it is longer than any line of an export"));
            }
            is_open ^= self.line[before..].iter().filter(|byte| **byte == b'"').count() % 2 == 1;
            if read == 0 || self.format != Format::Csv || !is_open {
                return Ok(&self.line);
            }
        }
    }

    fn flaw(&self, why: impl Into<String>) -> Flaw {
        Flaw::At { line: self.number, why: why.into() }
    }
}

struct Check<R> {
    lines: Lines<R>,
    header: Header,
    seal: Seal,
    thread: Option<OpenThread>,
    data: u64,
    threads: u64,
    proved: u64,
    partly: u64,
    digest: String,
    /// The cursor of the mark that was just passed.
    mark: Option<String>,
}

/// A thread of which events came, and not its note yet.
struct OpenThread {
    name: String,
    values: Values,
    events: u64,
    first: u64,
    last: u64,
    link: [u8; 32],
    /// A link stands in a line of it.
    is_given: bool,
}

/// What is looked at of an event's line.
#[derive(Deserialize)]
struct EventLine {
    thread: String,
    seq: u64,
    hash: Option<String>,
}

impl<R: BufRead> Check<R> {
    fn begin(mut file: R) -> Result<Check<R>, Flaw> {
        let start = file.fill_buf()?;
        let begins =
            |text: &str| start.starts_with(&text.as_bytes()[..text.len().min(start.len())]) && !start.is_empty();
        let format = if begins(r#"{"type":"#) {
            Format::Jsonl
        } else if begins(r#"{"resourceSpans":"#) {
            Format::Otel
        } else if begins(r#"{"messages":"#) {
            Format::Chat
        } else {
            Format::Csv
        };
        let mut lines = Lines { file, format, line: Vec::new(), number: 0, bytes: 0 };
        let mut seal = Seal::after(&[0; 32]);
        if format == Format::Csv {
            let mut names = String::new();
            csv::put_header(&mut names);
            if lines.next()? != names.as_bytes() {
                return Err(lines.flaw("it is not the first line of an export"));
            }
            seal.update(names.as_bytes());
        }
        let line = lines.next()?.to_vec();
        let header = match note(format, &line) {
            Some(Note::Export(header)) if header.format == format => header,
            _ => return Err(lines.flaw("it is not the first line of an export")),
        };
        if header.version != VERSION {
            let why = format!("version {} of exports is not known here; a newer weft knows it", header.version);
            return Err(lines.flaw(why));
        }
        seal.update(&line);
        let (data, threads, proved, partly, digest, mark) = (0, 0, 0, 0, String::new(), None);
        Ok(Check { lines, header, seal, thread: None, data, threads, proved, partly, digest, mark })
    }

    /// Checks the next line; whether it was the last.
    fn step(&mut self) -> Result<bool, Flaw> {
        let format = self.header.format;
        let number = self.lines.number;
        let line = self.lines.next()?.to_vec();
        if line.is_empty() {
            return Err(Flaw::CutOff { line: number });
        }
        if is_data(format, &line) {
            self.seal.update(&line);
            self.data(&line)?;
            return Ok(false);
        }
        let flaw = |check: &Check<R>, why: &str| check.lines.flaw(why);
        match note(format, &line) {
            Some(Note::Thread { thread, events, first, last, head, hash }) => {
                self.seal.update(&line);
                self.close_thread(&thread, [events, first, last, head], &hash)?;
                Ok(false)
            }
            Some(Note::Mark { cursor, blake3: Some(digest) }) => {
                self.check_seal(&line, &digest)?;
                self.mark = Some(format!("{cursor}.{digest}"));
                Ok(false)
            }
            Some(Note::End { lines, threads, blake3: Some(digest) }) => {
                self.check_seal(&line, &digest)?;
                if self.thread.is_some() {
                    return Err(flaw(self, "the thread before it has no line of its own"));
                }
                if lines != self.data || (format.has_events() && threads != self.threads) {
                    return Err(flaw(self, "it counts other lines or threads than there are"));
                }
                self.threads = threads;
                self.digest = digest;
                Ok(true)
            }
            Some(Note::Error { code, detail }) => Err(Flaw::Unfinished { code, detail }),
            _ => Err(flaw(self, "it is no line of an export")),
        }
    }

    /// Holds a seal against the bytes before its digest, and against what follows a digest.
    fn check_seal(&mut self, line: &[u8], digest: &str) -> Result<(), Flaw> {
        let after = self.header.format.after_digest();
        let wrong = "something of what is before it was changed, left out or added";
        let before = line.strip_suffix(after.as_bytes()).and_then(|rest| rest.strip_suffix(digest.as_bytes()));
        let Some(before) = before.filter(|_| digest.len() == HEX) else {
            return Err(self.lines.flaw("it does not end as its kind of line does"));
        };
        self.seal.update(before);
        match self.seal.close().to_hex().as_str() == digest {
            true => Ok(()),
            false => Err(self.lines.flaw(wrong)),
        }
    }

    fn data(&mut self, line: &[u8]) -> Result<(), Flaw> {
        self.data += 1;
        let text = std::str::from_utf8(line).map_err(|_| self.lines.flaw("it is not UTF-8"))?;
        match self.header.format {
            Format::Jsonl => {
                let event: EventLine =
                    serde_json::from_str(text).map_err(|_| self.lines.flaw("it is no event as JSON"))?;
                self.event(event, text)
            }
            Format::Csv => {
                let fields = csv::fields(text).filter(|fields| fields.len() == csv::COLUMNS.len());
                let row = fields.and_then(|mut fields| {
                    Some(EventLine { seq: fields.get(2)?.parse().ok()?, thread: fields.swap_remove(1), hash: None })
                });
                let event = row.ok_or_else(|| self.lines.flaw("it is no event as a row"))?;
                self.event(event, text)
            }
            Format::Otel | Format::Chat => match serde_json::from_str::<serde_json::Value>(text) {
                Ok(_) => Ok(()),
                Err(_) => Err(self.lines.flaw("it is not JSON")),
            },
        }
    }

    fn event(&mut self, event: EventLine, line: &str) -> Result<(), Flaw> {
        let EventLine { thread, seq, hash } = event;
        let whole = self.header.is_whole();
        let values = || Values::new(&self.header.tenant, &thread);
        let open = match &mut self.thread {
            Some(open) if open.name == thread => open,
            Some(_) => return Err(self.lines.flaw("the thread before it has no line of its own")),
            none => {
                let values = values();
                none.insert(OpenThread {
                    name: thread,
                    values,
                    events: 0,
                    first: seq,
                    last: 0,
                    link: [0; 32],
                    is_given: false,
                })
            }
        };
        let is_next = if whole { seq == open.last + 1 } else { seq > open.last };
        if !is_next {
            let why = format!("seq {seq} does not come after {}", open.last);
            return Err(Flaw::At { line: self.lines.number, why });
        }
        open.events += 1;
        open.last = seq;
        if whole {
            open.is_given |= hash.is_some();
            let made = match hash {
                Some(hash) => blake3::Hash::from_hex(&hash).ok().map(|hash| *hash.as_bytes()),
                None => open.values.link(&open.link, seq, line.trim_end_matches('\n')),
            };
            open.link = made.ok_or_else(|| Flaw::At {
                line: self.lines.number,
                why: "it is not an event as the server writes them".to_owned(),
            })?;
        }
        Ok(())
    }

    fn close_thread(&mut self, thread: &str, [events, first, last, head]: [u64; 4], hash: &str) -> Result<(), Flaw> {
        let open = self.thread.take().filter(|open| open.name == thread);
        let Some(open) = open else { return Err(self.lines.flaw("no events of this thread stand before it")) };
        if [events, first, last] != [open.events, open.first, open.last] || head < last {
            return Err(self.lines.flaw("it counts other events of its thread than there are"));
        }
        self.threads += 1;
        if self.header.is_whole() {
            if head != last || blake3::Hash::from_bytes(open.link).to_hex().as_str() != hash {
                return Err(self.lines.flaw("the events of this thread do not come to its hash"));
            }
            match open.is_given {
                true => self.partly += 1,
                false => self.proved += 1,
            }
        }
        Ok(())
    }
}

/// Whether the line is data, and no note.
fn is_data(format: Format, line: &[u8]) -> bool {
    match format {
        Format::Jsonl => line.starts_with(br#"{"type":"event","#),
        Format::Csv => line.starts_with(b"event,"),
        Format::Otel | Format::Chat => !line.starts_with(format.opens("").as_bytes()),
    }
}

/// The note in a line.
fn note(format: Format, line: &[u8]) -> Option<Note> {
    let text = std::str::from_utf8(line).ok()?;
    let json = match format {
        Format::Csv => csv::fields(text)?.pop()?,
        _ => text.strip_suffix(format.closes())?.strip_prefix(&format.opens(""))?.to_owned(),
    };
    serde_json::from_str(&json).ok()
}
