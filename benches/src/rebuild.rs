//! How fast new projections come out of the log.

use std::path::PathBuf;
use std::time::Instant;

use super::report::{Figure, LogKind};
use super::target::progress;
use crate::cli::common::Failure;

/// Rebuilds the projections of a data folder from its log; tells how many records it read.
pub type Rebuild = fn(&RebuildArgs, LogKind) -> Result<u64, Failure>;

#[derive(Debug, Clone, clap::Args)]
pub struct RebuildArgs {
    /// The data folder of a server that is stopped.
    #[arg(long, env = "WEFT_DATA", default_value = "./data")]
    pub data: PathBuf,
    /// Kafka's brokers, with --log kafka.
    #[arg(long, env = "WEFT_BROKERS", default_value = "127.0.0.1:9092")]
    pub brokers: String,
}

pub fn run(args: &RebuildArgs, log: LogKind, rebuild: Rebuild) -> Result<Vec<Figure>, Failure> {
    progress("rebuild");
    let begin = Instant::now();
    let records = rebuild(args, log)?;
    if records == 0 {
        return Err("the log is empty: there is nothing to measure".into());
    }
    Ok(vec![Figure::more("rebuild", records as f64 / begin.elapsed().as_secs_f64(), "events/s")])
}
