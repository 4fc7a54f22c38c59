//! One table file as a database of its own, so that it can be read whatever is wrong with the others.
//!
//! A reader over a whole database positions itself in every table at once, and one damaged block stops it everywhere. So
//! salvaging makes, beside the log, a folder with a link to one table and a MANIFEST that names no other.

use std::fs;
use std::io;
use std::path::Path;

use super::manifest::{LiveTable, Manifest};

const LOG_NUMBER: u64 = 2;
const NEXT_FILE: u64 = 3;
const LAST_SEQUENCE: u64 = 4;
const FAMILY: u64 = 200;

const BLOCK: usize = 32 << 10;
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// Makes the folder. `family` is the number of the family that the table belongs to.
pub fn isolate(source: &Path, manifest: &Manifest, family: u32, table: &LiveTable, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let name = format!("{:06}.sst", table.number);
    let (from, to) = (source.join(&name), target.join(&name));
    // RocksDB never writes to a table again, so a link is as good as a copy; another file system takes no link.
    if fs::hard_link(&from, &to).is_err() {
        fs::copy(&from, &to)?;
    }
    fs::write(target.join("MANIFEST-000001"), manifest_of(manifest, family, table))?;
    fs::write(target.join("CURRENT"), "MANIFEST-000001\n")
}

fn manifest_of(manifest: &Manifest, family: u32, table: &LiveTable) -> Vec<u8> {
    let mut edits = manifest.family_edits.clone();
    let mut state = Vec::new();
    for (tag, value) in [
        (LOG_NUMBER, 0),
        (NEXT_FILE, manifest.next_file.max(table.number + 1)),
        (LAST_SEQUENCE, manifest.last_sequence.max(table.largest_sequence)),
    ] {
        put_varint(&mut state, tag);
        put_varint(&mut state, value);
    }
    edits.push(state);
    let mut added = table.field.clone();
    put_varint(&mut added, FAMILY);
    put_varint(&mut added, u64::from(family));
    edits.push(added);

    let mut file = Vec::new();
    edits.iter().for_each(|edit| put_record(&mut file, edit));
    file
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Writes a record in the format of [`super::blocks`].
fn put_record(file: &mut Vec<u8>, mut record: &[u8]) {
    const HEADER: usize = 7;
    let mut is_first = true;
    loop {
        let mut left = BLOCK - file.len() % BLOCK;
        if left < HEADER {
            file.resize(file.len() + left, 0);
            left = BLOCK;
        }
        let (payload, rest) = record.split_at(record.len().min(left - HEADER));
        let kind = match (is_first, rest.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), payload);
        file.extend_from_slice(&mask(crc).to_le_bytes());
        file.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        file.push(kind);
        file.extend_from_slice(payload);
        if rest.is_empty() {
            return;
        }
        (record, is_first) = (rest, false);
    }
}

fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}
