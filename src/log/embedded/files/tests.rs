//! The scan, held against files that RocksDB wrote: whatever is cut off is a torn end, whatever is changed before the last
//! batch is damage, and no whole batch is ever overlooked.

use std::path::Path;
use std::sync::LazyLock;

use proptest::collection::vec;
use proptest::prelude::*;
use rocksdb::{DB, WriteBatch};

use super::blocks::{FilePart, Scan, scan};
use super::*;
use crate::log::Position;
use crate::log::embedded::format::{descriptors, key_of, options, records, synced};

/// A file of the write-ahead log, as RocksDB wrote it.
struct Written {
    number: u64,
    bytes: Vec<u8>,
}

/// Writes batches with so many rows of so many bytes each, and gives the folder's newest file of the write-ahead log.
fn write(dir: &Path, batches: &[(usize, usize)]) -> Written {
    let options = options(false);
    let db = DB::open_cf_descriptors(&options, dir, descriptors(&options)).expect("a database");
    let mut offset = 0;
    for (rows, size) in batches {
        let mut batch = WriteBatch::default();
        for _ in 0..*rows {
            let value: Vec<u8> = (0..*size).map(|n| (n as u64 * 31 + offset) as u8).collect();
            batch.put_cf(&records(&db), key_of(Position { partition: 0, offset }), value);
            offset += 1;
        }
        db.write_opt(batch, &synced()).expect("a write");
    }
    drop(db);
    let (number, path) = numbered(dir, "log").expect("the folder is there").pop().expect("a file");
    Written { number, bytes: fs::read(path).expect("the file can be read") }
}

/// Batches of all sizes: many in a block, one over several blocks, one that ends near a block's end.
const BATCHES: &[(usize, usize)] = &[
    (1, 10),
    (3, 100),
    (40, 700),
    (1, 90_000),
    (200, 20),
    (1, 0),
    (7, 4_000),
    (1, 32_000),
    (2, 5),
    (90, 900),
    (1, 60),
];

static FILE: LazyLock<Written> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write(dir.path(), BATCHES)
});

/// A longer file of another number: a file that is written again has its rest behind the end.
static OLDER: LazyLock<Written> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write(dir.path(), &[(1, 1)]);
    write(dir.path(), &[(50, 9_000), (900, 200)])
});

fn records_of<'a>(scan: &'a Scan<'_>) -> Vec<(usize, &'a [u8])> {
    scan.parts
        .iter()
        .filter_map(|part| match part {
            FilePart::Record { at, bytes } => Some((*at, &**bytes)),
            FilePart::Broken(_) => None,
        })
        .collect()
}

fn whole() -> Scan<'static> {
    scan(&FILE.bytes, FILE.number)
}

/// Where each batch begins, and where the last one ends.
fn bounds() -> Vec<usize> {
    let scan = whole();
    let mut bounds: Vec<usize> = records_of(&scan).iter().map(|(at, _)| *at).collect();
    bounds.push(scan.valid_to);
    bounds
}

fn over_older(bytes: &[u8]) -> Vec<u8> {
    let mut file = OLDER.bytes.clone();
    file[..bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn a_file_as_rocksdb_wrote_it_is_whole() {
    let scan = whole();
    assert_eq!((scan.damage(), scan.torn_end()), (None, None));
    let found = records_of(&scan);
    let rows: Vec<usize> =
        found.iter().map(|(_, bytes)| WriteAheadBatch::read(bytes).expect("a batch").ops.len()).collect();
    assert_eq!(rows, BATCHES.iter().map(|(rows, _)| *rows).collect::<Vec<_>>());
    assert!(found.iter().all(|(_, bytes)| WriteAheadBatch::read(bytes).is_some_and(|batch| batch.is_whole)));
    assert!(OLDER.bytes.len() > FILE.bytes.len() && OLDER.number != FILE.number, "one that was longer");
}

#[test]
fn what_an_older_file_left_behind_the_end_is_no_damage() {
    let file = over_older(&FILE.bytes[..whole().valid_to]);
    let scan = scan(&file, FILE.number);
    // Whether it is older, or a write that was cut off, nobody can tell.
    assert_eq!(scan.damage(), None);
    assert_eq!(records_of(&scan), records_of(&whole()));
}

/// The batches that are whole before a place, and no other.
fn assert_cut(file: &[u8], to: usize) {
    // What comes after it may happen to be what was there: a batch can end in a zero.
    let same = file.iter().zip(&FILE.bytes).take_while(|(now, before)| now == before).count();
    let to = to.max(same);
    let scan = scan(file, FILE.number);
    assert_eq!(scan.damage(), None);
    let whole = whole();
    let bounds = bounds();
    let before = bounds[1..].iter().filter(|end| **end <= to).count();
    assert_eq!(records_of(&scan), records_of(&whole)[..before]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_is_cut_off_is_a_torn_end(part in 0.0..1.0f64) {
        let to = (whole().valid_to as f64 * part) as usize;
        assert_cut(&FILE.bytes[..to], to);
        // The same with zeros after it, or with what the file held before.
        let mut zeros = FILE.bytes[..to].to_vec();
        zeros.resize(FILE.bytes.len(), 0);
        assert_cut(&zeros, to);
        assert_cut(&over_older(&FILE.bytes[..to]), to);
    }

    #[test]
    fn bytes_that_nobody_wrote_after_the_end_are_a_torn_end(garbage in vec(any::<u8>(), 0..3_000)) {
        let to = whole().valid_to;
        assert_cut(&[&FILE.bytes[..to], &garbage[..]].concat(), to);
    }

    #[test]
    fn a_flip_before_the_last_batch_is_damage_at_its_place_and_hides_no_other_batch(part in 0.0..1.0f64, bit in 0u8..8) {
        let (whole, bounds) = (whole(), bounds());
        let last = bounds[bounds.len() - 2];
        let at = (last as f64 * part) as usize;
        let mut file = FILE.bytes.clone();
        file[at] ^= 1 << bit;
        let scan = scan(&file, FILE.number);
        let batch = bounds.iter().filter(|begin| **begin <= at).count() - 1;
        let mut expected = records_of(&whole);
        if let Some(damage) = scan.damage() {
            expected.remove(batch);
            prop_assert!(damage.bad_at <= at && at < bounds[batch + 1].max(damage.end), "{damage:?}");
        } else {
            // Between two blocks are a few bytes that nobody reads.
            prop_assert!(at % (32 << 10) > (32 << 10) - 11, "a flip at {at} was overlooked");
        }
        prop_assert_eq!(records_of(&scan), expected);
    }

    #[test]
    fn a_stretch_of_zeros_that_batches_follow_is_damage(part in 0.0..1.0f64, length in 1usize..20_000) {
        let bounds = bounds();
        let last = bounds[bounds.len() - 2];
        let at = (last as f64 * part) as usize;
        let mut file = FILE.bytes.clone();
        let end = (at + length).min(last);
        file[at..end].fill(0);
        let changed = file != FILE.bytes;
        let scan = scan(&file, FILE.number);
        prop_assert_eq!(scan.damage().is_some(), changed);
    }

    #[test]
    fn any_bytes_are_scanned_to_their_end(bytes in vec(any::<u8>(), 0..70_000), number in any::<u64>()) {
        let scan = scan(&bytes, number);
        prop_assert!(scan.valid_to <= bytes.len());
        let (manifest, problem) = Manifest::decode(&bytes);
        prop_assert!(problem.is_some() || !manifest.families.is_empty());
        WriteAheadBatch::read(&bytes);
    }
}

fn checked(dir: &Path) -> Result<Whole, String> {
    match check(dir) {
        Ok(LogFolder::Log(whole)) => Ok(whole),
        Ok(LogFolder::Nothing) => Err("nothing".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_folder_tells_how_far_its_log_goes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    assert_eq!(checked(dir.path()).expect_err("no log"), "nothing");
    write(dir.path(), BATCHES);
    let rows: usize = BATCHES.iter().map(|(rows, _)| *rows).sum();
    let found = checked(dir.path()).expect("it is whole");
    assert_eq!((found.end, found.rest), (Some(rows as u64), None));
    // Opened again, its rows go to a table, and the file that held them is not live any more.
    let options = options(false);
    drop(DB::open_cf_descriptors(&options, dir.path(), descriptors(&options)).expect("it opens"));
    assert_eq!(checked(dir.path()).expect("it is whole").end, None);
    let manifest = Manifest::read(dir.path()).expect("it can be read");
    let (_, family) = manifest.family(RECORDS).expect("the records");
    let tables: Vec<&manifest::LiveTable> = family.tables.values().collect();
    assert_eq!(tables.len(), 1);
    assert_eq!(parse_key(&tables[0].largest).map(|at| at.offset), Some(rows as u64 - 1));
}

#[test]
fn a_file_that_is_missing_is_damage() {
    for (ending, what) in
        [("sst", "is missing"), ("log", "write-ahead log is missing"), ("CURRENT", "CURRENT is missing")]
    {
        let dir = tempfile::tempdir().expect("a temporary folder");
        write(dir.path(), BATCHES);
        let options = options(false);
        let db = DB::open_cf_descriptors(&options, dir.path(), descriptors(&options)).expect("it opens");
        drop(db);
        let gone = match ending {
            "CURRENT" => vec![dir.path().join(ending)],
            ending => numbered(dir.path(), ending).expect("the folder").into_iter().map(|(_, path)| path).collect(),
        };
        gone.iter().for_each(|path| fs::remove_file(path).expect("it is there"));
        let error = checked(dir.path()).expect_err("a file is missing");
        assert!(error.contains(what), "{ending}: {error}");
    }
}

#[test]
fn a_change_anywhere_in_the_manifest_is_noticed_or_cuts_its_end() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write(dir.path(), BATCHES);
    let name = fs::read_to_string(dir.path().join("CURRENT")).expect("it is there");
    let bytes = fs::read(dir.path().join(name.trim_end())).expect("it is there");
    let (whole, problem) = Manifest::decode(&bytes);
    assert_eq!(problem, None);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        let (found, problem) = Manifest::decode(&changed);
        assert!(problem.is_some() || found != whole || at + 64 > bytes.len(), "a flip at {at} of {}", bytes.len());
    }
}
