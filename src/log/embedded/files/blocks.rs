//! The format that RocksDB gives its write-ahead log and its MANIFEST, read by ourselves. Pure: bytes in, parts out.
//!
//! RocksDB recovers a write-ahead log up to the first fragment that does not fit, and drops what follows without a word:
//! a torn end and damage in the middle are the same to it. They are not the same to whoever was answered. This scan goes
//! on after such a place and says what follows.
//!
//! Format: blocks of 32 KiB. A record is one fragment (`Full`), or `First`, any number of `Middle` and `Last`, none of which
//! crosses a block. A fragment: CRC-32C over all that follows, masked (4 bytes) · length of the payload (2) · type (1) · in
//! files that are written again the low half of the file's number (4) · payload; all little-endian. What is left of a block
//! and too short for a header is zero. After the end there is nothing, zeros, or what the file held under an older number.

use std::borrow::Cow;
use std::fmt;

const BLOCK: usize = 32 << 10;
/// Without and with the file's number.
const SHORT_HEADER: usize = 7;
const LONG_HEADER: usize = 11;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    First,
    Middle,
    Last,
    /// Something between RocksDB and itself.
    Meta,
}

/// The meaning of a type, and whether the header has the file's number.
fn kind_of(type_byte: u8) -> Option<(Kind, bool)> {
    Some(match type_byte {
        1 => (Kind::Full, false),
        2 => (Kind::First, false),
        3 => (Kind::Middle, false),
        4 => (Kind::Last, false),
        5 => (Kind::Full, true),
        6 => (Kind::First, true),
        7 => (Kind::Middle, true),
        8 => (Kind::Last, true),
        9 | 10 | 130 => (Kind::Meta, false),
        11 | 131 => (Kind::Meta, true),
        _ => return None,
    })
}

/// What stands in a file, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilePart<'a> {
    /// A whole record.
    Record { at: usize, bytes: Cow<'a, [u8]> },
    /// Bytes that make no whole record. As the last part of a file it is a torn end; anything after it shows damage.
    Broken(Broken),
}

/// A stretch that makes no whole record.
#[derive(Clone, PartialEq, Eq)]
pub struct Broken {
    /// Where the record begins that cannot be read, if its begin is known; else where the bad bytes begin.
    pub at: usize,
    /// The first byte that is not as it was written.
    pub bad_at: usize,
    pub end: usize,
    pub why: &'static str,
    /// All that can be a payload, without headers: whole rows can be found in it.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken {}..{}, first at {}: {}", self.at, self.end, self.bad_at, self.why)
    }
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Scan<'a> {
    pub parts: Vec<FilePart<'a>>,
    /// The end of the last fragment that is as it was written.
    pub valid_to: usize,
}

impl Scan<'_> {
    /// The broken part that something follows.
    pub fn damage(&self) -> Option<&Broken> {
        let (_, before) = self.parts.split_last()?;
        before.iter().find_map(|part| match part {
            FilePart::Broken(broken) => Some(broken),
            FilePart::Record { .. } => None,
        })
    }

    /// The broken part that nothing follows.
    pub fn torn_end(&self) -> Option<&Broken> {
        match self.parts.last()? {
            FilePart::Broken(broken) => Some(broken),
            FilePart::Record { .. } => None,
        }
    }

    /// How many records follow a place.
    pub fn records_after(&self, at: usize) -> usize {
        self.parts.iter().filter(|part| matches!(part, FilePart::Record { at: found, .. } if *found > at)).count()
    }
}

struct Fragment {
    kind: Kind,
    payload: std::ops::Range<usize>,
}

/// Why there is no fragment at a place.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    /// Nothing was ever written here, or it was written under another number: the file ends before it.
    End,
    Bad {
        why: &'static str,
        payload: std::ops::Range<usize>,
    },
}

/// A record that was begun, or a stretch that is broken.
struct OpenRecord {
    at: usize,
    bytes: Vec<u8>,
    broken: Option<(usize, &'static str)>,
}

struct Scanner<'a> {
    file: &'a [u8],
    /// Of a file that is written again; a MANIFEST has none in its fragments.
    number: Option<u32>,
    parts: Vec<FilePart<'a>>,
    open: Option<OpenRecord>,
    valid_to: usize,
}

/// Reads a file of the write-ahead log.
pub fn scan(file: &[u8], number: u64) -> Scan<'_> {
    // Fragments hold the low half alone.
    run(file, Some(number as u32))
}

/// Reads a MANIFEST.
pub fn scan_manifest(file: &[u8]) -> Scan<'_> {
    run(file, None)
}

fn run(file: &[u8], number: Option<u32>) -> Scan<'_> {
    let mut scanner = Scanner { file, number, parts: Vec::new(), open: None, valid_to: 0 };
    let mut at = 0;
    while let Some(next) = scanner.step(at) {
        at = next;
    }
    scanner.close(scanner.valid_to.max(at), "the file ends within a record");
    Scan { parts: scanner.parts, valid_to: scanner.valid_to }
}

impl<'a> Scanner<'a> {
    /// Takes what stands at a place, and returns the next one.
    fn step(&mut self, at: usize) -> Option<usize> {
        if at >= self.file.len() {
            return None;
        }
        if self.after(at) != at {
            return Some(self.after(at));
        }
        let missing = match self.fragment(at) {
            Ok(fragment) => return Some(self.take(at, fragment)),
            Err(missing) => missing,
        };
        let next = self.find_fragment(at + 1);
        let (why, payload) = match missing {
            Missing::End if next.is_none() => return None,
            Missing::End => ("bytes were overwritten", at..at),
            Missing::Bad { why, payload } => (why, payload),
        };
        self.take_bad(at, why, payload, next);
        next
    }

    /// Where a fragment begins that follows this place: in the next block, when too little of this one is left for a header.
    fn after(&self, at: usize) -> usize {
        let block_end = (at / BLOCK + 1) * BLOCK;
        let left = block_end - at;
        let rest = self.file.get(at..block_end.min(self.file.len())).unwrap_or_default();
        let is_padding = left < LONG_HEADER && self.number.is_some() && rest.iter().all(|byte| *byte == 0);
        if left < SHORT_HEADER || is_padding { block_end } else { at }
    }

    fn fragment(&self, at: usize) -> Result<Fragment, Missing> {
        let end = ((at / BLOCK + 1) * BLOCK).min(self.file.len());
        let bad = |why, payload| Err(Missing::Bad { why, payload });
        let bytes = &self.file[at..end];
        let [c0, c1, c2, c3, l0, l1, type_byte, ..] = *bytes else {
            let nothing = bytes.iter().all(|byte| *byte == 0);
            return if nothing { Err(Missing::End) } else { bad("a header is cut off", at..at) };
        };
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        if type_byte == 0 && length == 0 && [c0, c1, c2, c3] == [0; 4] {
            return Err(Missing::End);
        }
        let Some((kind, numbered)) = kind_of(type_byte) else {
            return bad("a header has no known type", at..end);
        };
        let header = if numbered { LONG_HEADER } else { SHORT_HEADER };
        if numbered {
            let Some(found) = bytes.get(SHORT_HEADER..LONG_HEADER) else {
                return bad("a header is cut off", at..at);
            };
            if Some(u32::from_le_bytes([found[0], found[1], found[2], found[3]])) != self.number {
                return Err(Missing::End);
            }
        }
        if header + length > bytes.len() {
            return bad("a fragment is cut off", at + header..end);
        }
        let payload = at + header..at + header + length;
        if unmask(u32::from_le_bytes([c0, c1, c2, c3])) != crc32c::crc32c(&self.file[at + 6..payload.end]) {
            return bad("a checksum does not match", payload);
        }
        Ok(Fragment { kind, payload })
    }

    /// The next place from which on a fragment is as it was written. Of a file with numbers only numbered fragments count, so
    /// that nothing is taken for one by chance.
    fn find_fragment(&self, from: usize) -> Option<usize> {
        let may_begin = |at: &usize| {
            let numbered = kind_of(self.file[*at + 6]).map(|(_, numbered)| numbered);
            match self.number {
                Some(number) => {
                    numbered == Some(true) && self.file.get(*at + 7..*at + 11) == Some(&number.to_le_bytes()[..])
                }
                None => numbered == Some(false),
            }
        };
        let last = self.file.len().checked_sub(SHORT_HEADER)?;
        (from..=last).filter(may_begin).find(|at| self.fragment(*at).is_ok())
    }

    fn take(&mut self, at: usize, fragment: Fragment) -> usize {
        let end = fragment.payload.end;
        let payload = &self.file[fragment.payload];
        match fragment.kind {
            Kind::Meta => {}
            Kind::Full => {
                self.close(at, "a record has no end");
                self.parts.push(FilePart::Record { at, bytes: Cow::Borrowed(payload) });
            }
            Kind::First => {
                self.close(at, "a record has no end");
                self.open = Some(OpenRecord { at, bytes: payload.to_vec(), broken: None });
            }
            Kind::Middle | Kind::Last => {
                let orphan = || OpenRecord { at, bytes: Vec::new(), broken: Some((at, "a record has no begin")) };
                self.open.get_or_insert_with(orphan).bytes.extend_from_slice(payload);
                if fragment.kind == Kind::Last {
                    self.finish(end);
                }
            }
        }
        self.valid_to = end;
        end
    }

    /// Takes bytes that are no fragment, up to the next one.
    fn take_bad(&mut self, at: usize, why: &'static str, payload: std::ops::Range<usize>, next: Option<usize>) {
        let likely = match next {
            // The header is not right about where the fragment ends, so it is right about nothing.
            Some(next) if next != self.after(payload.end) => at..next,
            _ => payload,
        };
        let open = self.open.get_or_insert_with(|| OpenRecord { at, bytes: Vec::new(), broken: None });
        open.bytes.extend_from_slice(&self.file[likely]);
        open.broken.get_or_insert((at, why));
    }

    /// The record that was begun has got its last fragment.
    fn finish(&mut self, end: usize) {
        let Some(OpenRecord { at, bytes, broken }) = self.open.take() else { return };
        self.parts.push(match broken {
            None => FilePart::Record { at, bytes: Cow::Owned(bytes) },
            Some((bad_at, why)) => FilePart::Broken(Broken { at, bad_at, end, why, bytes }),
        });
    }

    /// The record that was begun gets no further fragment.
    fn close(&mut self, end: usize, why: &'static str) {
        if let Some(open) = &mut self.open {
            open.broken.get_or_insert((end, why));
            self.finish(end);
        }
    }
}

/// RocksDB stores the checksum of something that may hold checksums itself, so it stores it turned.
fn unmask(masked: u32) -> u32 {
    masked.wrapping_sub(0xa282_ead8).rotate_right(17)
}
