//! `weft append-until-killed`, hidden: the process that the log's crash tests start and kill.

use std::io::Write;
use std::sync::mpsc;

use super::common::Failure;
use crate::app::open_log;
use crate::config::{Config, StorageArgs};
use crate::log::{Append, AppendError, Grant, RULES, Record, Topic};
use crate::protocol::json;

/// How many records are on their way at a time.
const WINDOW: usize = 200;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    storage: StorageArgs,
    /// The number of the first record
    #[arg(long, default_value_t = 0)]
    first: usize,
}

/// Appends numbered records to all topics of the log, and prints `acknowledged=N` for each one that is durable.
pub async fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(args.storage.config.as_deref(), &args.storage)?;
    tokio::task::spawn_blocking(move || append(&config, args.first)).await?
}

fn append(config: &Config, first: usize) -> Result<(), Failure> {
    let log = open_log(config)?;
    let (room, wait_for_room) = mpsc::sync_channel(WINDOW);
    (0..WINDOW).try_for_each(|_| room.send(Ok(())))?;
    for n in first.. {
        wait_for_room.recv()??;
        let room = room.clone();
        let done = Box::new(move |outcome: Result<_, AppendError>| {
            // In one write, so that a kill cuts no line in two with another one after it.
            let line = format!("\nacknowledged={n}\n");
            let reported = outcome
                .map_err(|error| error.to_string())
                .and_then(|_| std::io::stdout().lock().write_all(line.as_bytes()).map_err(|error| error.to_string()));
            // Nobody waits for room when the loop has ended.
            room.send(reported).unwrap_or_default();
        });

        let record = Record {
            topic: Topic::ALL[n % Topic::ALL.len()],
            key: format!("k{}", n % 7),
            kind: "message".to_owned(),
            rules: RULES,
            grant: Grant::Member,
            traceparent: None,
            value: json::encode_bytes(&serde_json::json!({ "n": n })).into(),
        };
        log.append(vec![Append { record, done }]);
    }
    Ok(())
}
