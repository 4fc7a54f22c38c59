//! `weft dead-letters`: events and records that could not be handled, newest first.

use comfy_table::Table;
use serde_json::Value;

use super::common::{self, Failure, Server, cell, print_rows};
use crate::client::Http;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub server: Server,
    /// Only those with this reason.
    #[arg(long)]
    pub reason: Option<String>,
    /// Only those of this thread.
    #[arg(long)]
    pub thread: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let mut query = form_urlencoded::Serializer::new(String::from("limit=1000"));
    for (name, value) in [("reason", &args.reason), ("thread", &args.thread)] {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    let letters = http.all_pages(&format!("/v1/dead-letters?{}", query.finish()), "items").await?;
    print_rows(args.json, "items", "no dead letters", &letters, table)
}

fn table(letters: &[Value]) -> Table {
    let mut table = common::table(&["at", "reason", "where", "user", "attempts", "error", "id"]);
    for row in letters {
        let position = match &row["topic"] {
            Value::Null => format!("{} {}", cell(&row["thread"]), cell(&row["seq"])),
            topic => format!("{} {}:{}", cell(topic), row["partition"], row["offset"]),
        };
        table.add_row([
            cell(&row["at"]),
            cell(&row["reason"]),
            position,
            cell(&row["user"]),
            cell(&row["attempts"]),
            cell(&row["error"]),
            cell(&row["id"]),
        ]);
    }
    table
}
