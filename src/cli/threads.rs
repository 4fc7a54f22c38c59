//! `weft threads`: the threads of the token's user, newest activity first; or, for an analyst, those of the tenant.

use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use super::common::{self, Failure, List, Output, Server, cell, point_in_time, when};
use crate::client::Http;
use crate::clock;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub server: Server,
    /// All threads of the tenant, by their ids; the token needs scope analyst.
    #[arg(long)]
    pub all: bool,
    /// Only those whose title has this in it, in capitals or not.
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
    /// Only those whose member this user is.
    #[arg(long, value_name = "USER")]
    pub member: Option<String>,
    /// Only those whose newest event is of this time or later: RFC 3339, or how long ago (2h).
    #[arg(long, value_name = "TIME", value_parser = point_in_time)]
    pub since: Option<u64>,
    /// Only those whose newest event is older.
    #[arg(long, value_name = "TIME", value_parser = point_in_time)]
    pub until: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl Args {
    fn lists(&self, row: &Value) -> bool {
        let has_title = |wanted: &String| {
            row["title"].as_str().is_some_and(|title| title.to_lowercase().contains(&wanted.to_lowercase()))
        };
        let has_member = |user: &String| {
            row["members"].as_array().is_some_and(|members| members.iter().any(|it| it == user.as_str()))
        };
        let last = row["last"]["at"].as_str().and_then(clock::parse_rfc3339);
        self.title.as_ref().is_none_or(has_title)
            && self.member.as_ref().is_none_or(has_member)
            && self.since.is_none_or(|since| last.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| last.is_some_and(|at| at < until))
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let path = format!("/v1/threads?limit=1000&all={}", args.all);
    let list = List::new(args.json, "threads");
    list.print(&mut http, &path, |row| args.lists(row), ["no threads yet", "no thread is such"], table).await
}

fn table(threads: &[Value]) -> Table {
    let rows = threads.iter().map(|row| {
        let members = row["members"].as_array().map_or_else(|| cell(&row["members"]), |m| m.len().to_string());
        let last = row["last"]["at"].as_str().map_or_else(|| cell(&row["last"]), when);
        let [thread, title, head, unread] = ["thread", "title", "head", "unread"].map(|name| cell(&row[name]));
        vec![thread, title, head, unread, members, last]
    });
    let header = ["thread", "title", "head", "unread", "members", "last"];
    let mut table = common::fitted(&header, rows.collect(), 1, Output::new().columns());
    for column in 2..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
