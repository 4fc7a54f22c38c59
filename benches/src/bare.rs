//! What the log and the store can do bare, on the same machine in the same minute: what the server's figures are held
//! against. The bytes are those of one event of a bench.

use std::path::PathBuf;
use std::time::Duration;

use crate::report::{Figure, LogKind};
use crate::{bare_embedded, bare_kafka};
use weft::cli::common::Failure;

#[derive(Debug, clap::Args)]
pub struct BareArgs {
    /// A folder for what is written, on the disk to be measured; it must be empty or not there yet.
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
        (LogKind::Embedded, Some(dir)) => bare_embedded::run(dir, each),
        (LogKind::Embedded, None) => Err("--dir is missing".into()),
        (LogKind::Kafka, _) => bare_kafka::run(&args.brokers, each).await,
    }
}

/// A record's value as a server appends it, with 256 bytes of data.
pub fn record_value() -> String {
    let content = "x".repeat(226);
    format!(
        r#"{{"tenant":"bench","thread":"ack-1x1024-0f3a9c21-0","kind":"user_message","event":"019e0c1a-7b3c-7000-8000-0123456789ab","from":"ack-1x1024-0f3a9c21-0","at":"2026-11-22T12:37:00.000Z","data":{{"n":1000000000,"content":"{content}"}}}}"#
    )
}
