//! `weft threads`: the threads of the token's user, newest activity first.

use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use super::common::{self, Failure, Server, cell, print_rows};
use crate::client::Http;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub server: Server,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let threads = http.all_pages("/v1/threads?limit=1000", "threads").await?;
    print_rows(args.json, "threads", "no threads yet", &threads, table)
}

fn table(threads: &[Value]) -> Table {
    let mut table = common::table(&["thread", "title", "head", "unread", "members", "last"]);
    for row in threads {
        let members = row["members"].as_array().map_or_else(|| cell(&row["members"]), |m| m.len().to_string());
        let last = row["last"].get("at").unwrap_or(&row["last"]);
        table.add_row([
            cell(&row["thread"]),
            cell(&row["title"]),
            cell(&row["head"]),
            cell(&row["unread"]),
            members,
            cell(last),
        ]);
    }
    for column in 2..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
