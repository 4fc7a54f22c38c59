//! RocksDB's MANIFEST, read by ourselves: which files make the database, and from which one on the write-ahead log is live.
//!
//! Format: a file of [`super::blocks`] whose records are edits; an edit is a row of fields, each a tag (varint) and what the tag
//! asks for. `CURRENT` names the MANIFEST. Only what Weft needs is kept; the rest is passed over.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::batch::{prefixed, varint};
use super::blocks::{self, FilePart};

const COMPARATOR: u64 = 1;
const LOG_NUMBER: u64 = 2;
const NEXT_FILE: u64 = 3;
const LAST_SEQUENCE: u64 = 4;
const COMPACT_CURSOR: u64 = 5;
const DELETED_FILE: u64 = 6;
const PREVIOUS_LOG: u64 = 9;
const MIN_LOG_TO_KEEP: u64 = 10;
const NEW_FILE: u64 = 103;
const FAMILY: u64 = 200;
const FAMILY_ADD: u64 = 201;
const FAMILY_DROP: u64 = 202;
const MAX_FAMILY: u64 = 203;
const IN_GROUP: u64 = 300;
/// Tags from here on are followed by the length of what they hold, so that whoever does not know one can pass over it.
const SAFE_TO_IGNORE: u64 = 1 << 13;
/// Ends the further fields of a new file.
const NEW_FILE_END: u64 = 1;

/// A table file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveTable {
    pub number: u64,
    pub size: u64,
    /// First and last key, as its users know them.
    pub smallest: Vec<u8>,
    pub largest: Vec<u8>,
    pub largest_sequence: u64,
    /// The field of the edit that added it.
    pub field: Vec<u8>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Family {
    pub name: String,
    /// Its rows in older files of the write-ahead log are in tables as well.
    pub log_number: u64,
    pub tables: BTreeMap<u64, LiveTable>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub families: BTreeMap<u32, Family>,
    pub last_sequence: u64,
    pub next_file: u64,
    min_log_to_keep: u64,
    /// The fields of every edit that make families, for a MANIFEST of the same families.
    pub family_edits: Vec<Vec<u8>>,
}

impl Manifest {
    /// Reads the MANIFEST that `CURRENT` names. The error says what is wrong with which file.
    pub fn read(dir: &Path) -> Result<Manifest, String> {
        let name = fs::read_to_string(dir.join("CURRENT")).map_err(|error| format!("CURRENT: {error}"))?;
        let name = name.strip_suffix('\n').filter(|name| name.starts_with("MANIFEST-") && !name.contains('/'));
        let name = name.ok_or("CURRENT does not name a MANIFEST")?;
        let bytes = fs::read(dir.join(name)).map_err(|error| format!("{name}: {error}"))?;
        let (manifest, problem) = Manifest::decode(&bytes);
        match problem {
            None => Ok(manifest),
            Some(problem) => Err(format!("{name} {problem}")),
        }
    }

    /// Reads a MANIFEST, as far as it can be read, and says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> (Manifest, Option<String>) {
        let scan = blocks::scan_manifest(bytes);
        let mut manifest = Manifest::default();
        // Edits of one group count together or not at all.
        let mut group: Vec<Edit> = Vec::new();
        for part in &scan.parts {
            let (at, bytes) = match part {
                FilePart::Record { at, bytes } => (*at, bytes),
                FilePart::Broken(_) if scan.damage().is_none() => break,
                FilePart::Broken(broken) => {
                    return (manifest, Some(format!("is damaged at byte {}: {}", broken.bad_at, broken.why)));
                }
            };
            let Some(edit) = Edit::decode(bytes) else {
                return (manifest, Some(format!("holds an edit at byte {at} that this version of Weft cannot read")));
            };
            let open = edit.remaining_in_group > 0;
            group.push(edit);
            if !open {
                group.drain(..).for_each(|edit| manifest.apply(edit));
            }
        }
        if manifest.families.is_empty() {
            return (manifest, Some("holds nothing that can be read".to_owned()));
        }
        (manifest, None)
    }

    fn apply(&mut self, edit: Edit) {
        self.last_sequence = edit.last_sequence.unwrap_or(self.last_sequence);
        self.next_file = edit.next_file.unwrap_or(self.next_file);
        self.min_log_to_keep = edit.min_log_to_keep.unwrap_or(0).max(self.min_log_to_keep);
        if edit.drops_family {
            self.families.remove(&edit.family);
            return;
        }
        if edit.comparator.is_some() || edit.adds_family.is_some() {
            self.family_edits.push(edit.family_fields);
        }
        // The default family is there without being added.
        let family = self.families.entry(edit.family).or_default();
        if let Some(name) = edit.adds_family {
            family.name = name;
        }
        family.log_number = edit.log_number.unwrap_or(0).max(family.log_number);
        for number in edit.deleted {
            family.tables.remove(&number);
        }
        family.tables.extend(edit.added.into_iter().map(|table| (table.number, table)));
    }

    /// The write-ahead log's files from this number on hold rows that are in no table.
    pub fn first_live_log(&self) -> u64 {
        self.families.values().map(|family| family.log_number).min().unwrap_or(0).max(self.min_log_to_keep)
    }

    pub fn family(&self, name: &str) -> Option<(u32, &Family)> {
        self.families.iter().find(|(_, family)| family.name == name).map(|(number, family)| (*number, family))
    }

    pub fn tables(&self) -> impl Iterator<Item = &LiveTable> {
        self.families.values().flat_map(|family| family.tables.values())
    }
}

#[derive(Debug, Default)]
struct Edit {
    family: u32,
    comparator: Option<Vec<u8>>,
    adds_family: Option<String>,
    drops_family: bool,
    family_fields: Vec<u8>,
    log_number: Option<u64>,
    min_log_to_keep: Option<u64>,
    next_file: Option<u64>,
    last_sequence: Option<u64>,
    deleted: Vec<u64>,
    added: Vec<LiveTable>,
    remaining_in_group: u64,
}

impl Edit {
    fn decode(bytes: &[u8]) -> Option<Edit> {
        let mut edit = Edit::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            let before = rest;
            let tag = varint(&mut rest)?;
            edit.read_field(tag, &mut rest)?;
            let field = &before[..before.len() - rest.len()];
            match tag {
                COMPARATOR | FAMILY | FAMILY_ADD => edit.family_fields.extend_from_slice(field),
                NEW_FILE => edit.added.last_mut()?.field = field.to_vec(),
                _ => {}
            }
        }
        Some(edit)
    }

    fn read_field(&mut self, tag: u64, rest: &mut &[u8]) -> Option<()> {
        match tag {
            COMPARATOR => self.comparator = Some(prefixed(rest)?.to_vec()),
            LOG_NUMBER => self.log_number = Some(varint(rest)?),
            NEXT_FILE => self.next_file = Some(varint(rest)?),
            LAST_SEQUENCE => self.last_sequence = Some(varint(rest)?),
            MIN_LOG_TO_KEEP => self.min_log_to_keep = Some(varint(rest)?),
            PREVIOUS_LOG | MAX_FAMILY => drop(varint(rest)?),
            COMPACT_CURSOR => {
                varint(rest)?;
                prefixed(rest)?;
            }
            DELETED_FILE => {
                varint(rest)?;
                self.deleted.push(varint(rest)?);
            }
            NEW_FILE => self.added.push(read_table(rest)?),
            FAMILY => self.family = u32::try_from(varint(rest)?).ok()?,
            FAMILY_ADD => self.adds_family = Some(String::from_utf8(prefixed(rest)?.to_vec()).ok()?),
            FAMILY_DROP => self.drops_family = true,
            IN_GROUP => self.remaining_in_group = varint(rest)?,
            tag if tag & SAFE_TO_IGNORE != 0 => drop(prefixed(rest)?),
            _ => return None,
        }
        Some(())
    }
}

/// A new file: level, number, size, first and last key, first and last sequence number, further fields.
fn read_table(rest: &mut &[u8]) -> Option<LiveTable> {
    varint(rest)?;
    let (number, size) = (varint(rest)?, varint(rest)?);
    let (smallest, largest) = (user_key(prefixed(rest)?)?, user_key(prefixed(rest)?)?);
    varint(rest)?;
    let largest_sequence = varint(rest)?;
    while varint(rest)? != NEW_FILE_END {
        prefixed(rest)?;
    }
    Some(LiveTable { number, size, smallest, largest, largest_sequence, field: Vec::new() })
}

/// RocksDB's keys end with a sequence number and a type.
fn user_key(key: &[u8]) -> Option<Vec<u8>> {
    Some(key.get(..key.len().checked_sub(8)?)?.to_vec())
}
