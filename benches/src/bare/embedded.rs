//! RocksDB alone: synced batches as the log writes them, unsynced ones as the projections do, and reading them back; and
//! the embedded log without a server.

use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rocksdb::{DB, DBCompressionType, IteratorMode, Options, WriteBatch, WriteOptions};

use super::record::record_value;
use crate::report::{Figure, micros, millis};
use crate::target::progress;
use weft::cli::common::Failure;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Append, Grant, Log, RULES, Record, Topic};

const PARTITIONS: u32 = 16;
const LOG_WINDOW: usize = 1024;
/// About what one batch of the projector holds under full load.
const PROJECTED: u64 = 100;

pub(super) fn run(dir: &Path, each: Duration) -> Result<Vec<Figure>, Failure> {
    if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(format!("{} is not empty", dir.display()).into());
    }
    progress("bare RocksDB and the bare log");
    let mut figures = Vec::new();
    for batch in [1, 100, 1024] {
        figures.extend(synced(&dir.join(format!("synced-{batch}")), batch, each)?);
    }
    figures.extend(projected(&dir.join("projected"), each)?);
    figures.push(appended(&dir.join("log"), each)?);
    Ok(figures)
}

fn open(dir: &Path) -> Result<DB, Failure> {
    std::fs::create_dir_all(dir)?;
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::Lz4);
    Ok(DB::open(&options, dir)?)
}

/// Records a second, in batches of `batch` records, each batch synced.
fn synced(dir: &Path, batch: u64, each: Duration) -> Result<Vec<Figure>, Failure> {
    let db = open(dir)?;
    let value = record_value();
    let mut options = WriteOptions::default();
    options.set_sync(true);
    let mut latency = micros()?;
    let begin = Instant::now();
    let mut written = 0u64;
    while begin.elapsed() < each {
        let start = Instant::now();
        let mut rows = WriteBatch::default();
        for offset in written..written + batch {
            rows.put(offset.to_be_bytes(), &value);
        }
        db.write_opt(rows, &options)?;
        latency.saturating_record(start.elapsed().as_micros() as u64);
        written += batch;
    }
    let rate = written as f64 / begin.elapsed().as_secs_f64();
    let mut figures = vec![Figure::more(&format!("bare synced appends of {batch}"), rate, "records/s")];
    if batch == 1 {
        for (name, quantile) in [("P50", 0.5), ("P99", 0.99)] {
            let value = millis(latency.value_at_quantile(quantile));
            figures.push(Figure::less(&format!("bare synced append {name}"), value, "ms"));
        }
    }
    Ok(figures)
}

/// Three rows an event (the event, its id, its thread's head) without a write-ahead log; then reading the events.
fn projected(dir: &Path, each: Duration) -> Result<Vec<Figure>, Failure> {
    let db = open(dir)?;
    let value = record_value();
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    let begin = Instant::now();
    let mut events = 0u64;
    while begin.elapsed() < each {
        let mut rows = WriteBatch::default();
        for seq in events..events + PROJECTED {
            rows.put([b"e/bench\0thread-1\0", &seq.to_be_bytes()[..]].concat(), &value);
            rows.put([b"i/bench\0", &seq.to_be_bytes()[..]].concat(), b"thread-1");
            rows.put(b"t/bench\0thread-1", seq.to_be_bytes());
        }
        db.write_opt(rows, &options)?;
        events += PROJECTED;
    }
    let writes = events as f64 / begin.elapsed().as_secs_f64();

    let begin = Instant::now();
    let mut read = 0u64;
    for row in db.iterator(IteratorMode::Start) {
        let (key, _) = row?;
        if !key.starts_with(b"e/") {
            break;
        }
        read += 1;
    }
    if read != events {
        return Err(format!("{events} events were written, and {read} read").into());
    }
    let reads = read as f64 / begin.elapsed().as_secs_f64();
    Ok(vec![
        Figure::more("bare projection writes", writes, "events/s"),
        Figure::more("bare store reads", reads, "events/s"),
    ])
}

/// Records a second through the embedded log, with a window of unanswered ones.
fn appended(dir: &Path, each: Duration) -> Result<Figure, Failure> {
    let log = EmbeddedLog::open(dir, PARTITIONS)?;
    let value = Bytes::from(record_value());
    let (sender, answers) = sync_channel(LOG_WINDOW);
    log.append((0..LOG_WINDOW).map(|_| append(&value, &sender)).collect());
    let begin = Instant::now();
    let (mut done, mut open) = (0u64, LOG_WINDOW);
    while open > 0 {
        // Never waits in vain: we hold a sender, and the log answers every record.
        let mut answered = 1;
        answers.recv()??;
        while let Ok(answer) = answers.try_recv() {
            answer?;
            answered += 1;
        }
        done += answered as u64;
        open -= answered;
        if begin.elapsed() < each {
            log.append((0..answered).map(|_| append(&value, &sender)).collect());
            open += answered;
        }
    }
    let rate = done as f64 / begin.elapsed().as_secs_f64();
    log.close();
    Ok(Figure::more("embedded log appends, 1024 outstanding", rate, "records/s"))
}

type Answer = Result<weft::log::Position, weft::log::AppendError>;

fn append(value: &Bytes, sender: &SyncSender<Answer>) -> Append {
    let record = Record {
        topic: Topic::Events,
        key: "bench/thread-1".to_owned(),
        kind: "user_message".to_owned(),
        rules: RULES,
        grant: Grant::Member,
        traceparent: None,
        value: value.clone(),
    };
    let sender = sender.clone();
    // The channel holds a whole window, so this never blocks the log; it is closed only once the bench has failed.
    let done = Box::new(move |answer| drop(sender.send(answer)));
    Append { record, done }
}
