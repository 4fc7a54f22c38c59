//! What the log and the store can do bare, measured on the same machine in the same minute as the server, whose figures are
//! compared with these. The bytes are those of one event of a bench.

mod embedded;
mod kafka;
mod record;

use std::path::PathBuf;
use std::time::Duration;

use crate::report::{Figure, LogKind};
use weft::cli::common::Failure;

#[derive(Debug, clap::Args)]
pub struct BareArgs {
    /// A folder for what is written, on the disk to be measured; it must be empty or absent.
    #[arg(long, required_if_eq("log", "embedded"))]
    pub dir: Option<PathBuf>,
    /// Kafka's brokers.
    #[arg(long, env = "WEFT_BROKERS", default_value = "127.0.0.1:9092")]
    pub brokers: String,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
}

pub async fn run(args: &BareArgs, log: LogKind) -> Result<Vec<Figure>, Failure> {
    let each = Duration::from_secs(args.seconds);
    match (log, &args.dir) {
        (LogKind::Embedded, Some(dir)) => embedded::run(dir, each),
        (LogKind::Embedded, None) => Err("--dir is missing".into()),
        (LogKind::Kafka, _) => kafka::run(&args.brokers, each).await,
    }
}
