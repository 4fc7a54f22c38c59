//! How fast projections are rebuilt from the log.

use std::path::PathBuf;
use std::time::Instant;

use crate::report::{Figure, LogKind};
use crate::target::progress;
use weft::app::open_log;
use weft::cli::common::Failure;
use weft::config::{Config, LogChoice, StorageArgs};
use weft::projector::rebuild;

#[derive(Debug, Clone, clap::Args)]
pub struct RebuildArgs {
    /// The data folder of a server that is stopped.
    #[arg(long, env = "WEFT_DATA", default_value = "./data")]
    pub data: PathBuf,
    /// Kafka's brokers, with --log kafka.
    #[arg(long, env = "WEFT_BROKERS", default_value = "127.0.0.1:9092")]
    pub brokers: String,
}

pub fn run(args: &RebuildArgs, log: LogKind) -> Result<Vec<Figure>, Failure> {
    progress("rebuild");
    let begin = Instant::now();
    let log = match log {
        LogKind::Embedded => LogChoice::Embedded,
        LogKind::Kafka => LogChoice::Kafka,
    };
    let storage = StorageArgs {
        data: Some(args.data.clone()),
        log: Some(log),
        brokers: Some(args.brokers.clone()),
        ..StorageArgs::default()
    };
    let config = Config::load(None, &storage)?;
    let log = open_log(&config)?;
    let records = rebuild::rebuild(log.as_ref(), &config.projections_dir(), |_| {})?.records;
    log.close();
    if records == 0 {
        return Err("the log is empty: there is nothing to measure".into());
    }
    Ok(vec![Figure::more("rebuild", records as f64 / begin.elapsed().as_secs_f64(), "events/s")])
}
