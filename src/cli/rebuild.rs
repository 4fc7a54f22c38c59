//! `weft rebuild`: rebuilds the projections from the log.

use std::time::Instant;

use super::common::{Failure, Progress};
use crate::app::{open_log, open_log_by_word};
use crate::config::{Config, LogChoice, StorageArgs};
use crate::projector::rebuild;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    storage: StorageArgs,
    /// Change nothing: rebuild beside the projections and compare row by row
    #[arg(long)]
    check: bool,
    /// Discard projections that do not fit the log, and begin another generation of it: no client resumes from before
    #[arg(long, conflicts_with = "check")]
    discard: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(args.storage.config.as_deref(), &args.storage)?;
    // Opening an embedded log that does not exist would create an empty one.
    if config.log == LogChoice::Embedded && !config.log_dir().join("CURRENT").exists() {
        return Err(format!("there is no log in {}: nothing to rebuild from", config.log_dir().display()).into());
    }

    let begin = Instant::now();
    let shown = Progress::on_terminal();
    let progress = move |records: u64| shown.show(format_args!("{records} records"));

    let (check, discard) = (args.check, args.discard);
    let work = move || {
        let projections = config.projections_dir();
        let log = if discard {
            let origin = rebuild::origin(&projections)?;
            open_log_by_word(&config, origin.as_ref().map(|origin| origin.epoch.as_str()))?
        } else {
            open_log(&config)?
        };
        let rebuilt = if check {
            rebuild::check(log.as_ref(), &projections, progress)?
        } else if discard {
            rebuild::discard(log.as_ref(), &projections, progress)?
        } else {
            rebuild::rebuild(log.as_ref(), &projections, progress)?
        };
        tracing::info!(epoch = log.epoch(), "the projections are of this epoch");
        log.close();
        Ok::<_, Failure>(rebuilt)
    };

    let rebuilt = tokio::task::spawn_blocking(work).await??;
    shown.end();

    let done = if check { "the projections equal the log's" } else { "rebuilt" };
    println!("{done}: {} records in {:.1} s", rebuilt.records, begin.elapsed().as_secs_f64());
    Ok(())
}
