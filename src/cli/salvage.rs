//! `weft salvage`: copies every record that can be read of a damaged embedded log into a new data folder.

use std::path::PathBuf;

use serde_json::json;

use super::common::{Failure, Output, Progress};
use crate::config::{Config, LogChoice, StorageArgs};
use crate::log::embedded::salvage::{Salvaged, salvage};
use crate::partitioning::NEW_LOG_PARTITIONS;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    storage: StorageArgs,
    /// The new data folder, which must hold no log yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(args.storage.config.as_deref(), &args.storage)?;
    if config.log != LogChoice::Embedded {
        return Err("only the embedded log can be salvaged; Kafka's records are its brokers'".into());
    }
    let shown = Progress::on_terminal();
    let progress = move |records: u64| shown.show(format_args!("{records} records"));
    let (source, target) = (config.log_dir(), args.out.join("log"));
    if !source.is_dir() {
        return Err(format!("there is no log in {}", source.display()).into());
    }
    let salvaged = tokio::task::spawn_blocking(move || {
        salvage(&source, &target, config.partitions.unwrap_or(NEW_LOG_PARTITIONS), progress)
    })
    .await??;
    shown.end();
    let out = Output::new();
    if args.json {
        let missing: Vec<_> = salvaged.missing.iter().map(|(from, to)| json!({"from": from, "to": to})).collect();
        out.line(json!({
            "records": salvaged.records,
            "end": salvaged.end,
            "epoch": salvaged.epoch,
            "missing_records": lost(&salvaged),
            "missing": missing,
            "damage": salvaged.damage,
        }))?;
        return Ok(());
    }
    say(&out, &salvaged, &args.out.display().to_string())
}

fn lost(salvaged: &Salvaged) -> u64 {
    salvaged.missing.iter().map(|(from, to)| to - from).sum()
}

fn say(out: &Output, salvaged: &Salvaged, target: &str) -> Result<(), Failure> {
    for damage in &salvaged.damage {
        out.line(format!("damage   {damage}"))?;
    }
    for (from, to) in &salvaged.missing {
        out.line(format!("missing  {} records, offsets {from} to {}", to - from, to - 1))?;
    }
    out.line(format!("copied   {} records, up to offset {}", salvaged.records, salvaged.end.saturating_sub(1)))?;
    if salvaged.missing.is_empty() {
        out.line("nothing is missing up to there; whether more followed, the damaged log cannot tell")?;
    }
    out.line(format!("start with --data {target}: another generation of the log, so clients load their threads anew"))?;
    Ok(())
}
