//! `weft runs`: lists the runs of agents; with the name of a run, shows its steps and their times.

mod ended;
mod waterfall;

use comfy_table::Table;
use serde_json::Value;

use super::common::{self, Failure, List, Output, Server, cell, print_rows, when};
use crate::client::Http;
use crate::clock;

/// Columns of a question in the list.
const ASKS: usize = 60;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run to show; without it, a list.
    pub run: Option<String>,
    #[command(flatten)]
    pub server: Server,
    /// The thread of the run to show, or whose runs are listed, ended ones too.
    #[arg(long)]
    pub thread: Option<String>,
    /// List the runs of all threads that are open, or those that wait for a person; or, with scope analyst, those that have
    /// ended, the newest last.
    #[arg(long, value_enum, conflicts_with_all = ["run", "thread"])]
    pub state: Option<StateFilter>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum StateFilter {
    Open,
    Waiting,
    Ended,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    if let Some(run) = &args.run {
        return show(&mut http, &args, run).await;
    }
    if let Some(StateFilter::Ended) = args.state {
        let runs = ended::list(&mut http).await?;
        return print_rows(args.json, "runs", "no run has ended", &runs, ended::table);
    }
    let path = match (&args.thread, args.state) {
        (Some(thread), _) => format!("{}?limit=1000", runs_of(thread)),
        (None, Some(StateFilter::Waiting)) => "/v1/runs?state=waiting&limit=1000".to_owned(),
        (None, _) => "/v1/runs?limit=1000".to_owned(),
    };
    let none = if args.thread.is_some() { "no runs yet" } else { "no run is open" };
    List::new(args.json, "runs").print(&mut http, &path, |_| true, [none; 2], table).await
}

fn runs_of(thread: &str) -> String {
    format!("/v1/threads/{}/runs", common::segment(thread))
}

fn table(runs: &[Value]) -> Table {
    let rows = runs.iter().map(|row| {
        let asks = row["waiting"]["data"].get("prompt").unwrap_or(&row["waiting"]["data"]["reason"]);
        vec![
            cell(&row["run"]),
            cell(&row["thread"]),
            cell(&row["agent"]),
            cell(&row["state"]),
            row["started"]["at"].as_str().map_or_else(String::new, when),
            waterfall::duration(end_ms(row).saturating_sub(ms(&row["started"]["at"]))),
            cell(&row["executing"]),
            cell(&row["children"]),
            waterfall::cut(&cell(asks), ASKS, false),
        ]
    });
    let header = ["run", "thread", "agent", "state", "started", "for", "calls", "subruns", "asks"];
    let mut table = common::fitted(&header, rows.collect(), 8, Output::new().columns());
    for column in 5..8 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    table
}

/// A time from the server, in milliseconds since the Unix epoch.
fn ms(at: &Value) -> u64 {
    at.as_str().and_then(clock::parse_rfc3339).unwrap_or(0)
}

/// When a run ended, or its newest event if it has not.
fn end_ms(run: &Value) -> u64 {
    match run["ended"].get("at") {
        Some(at) => ms(at),
        None => ms(&run["heard_at"]),
    }
}

async fn show(http: &mut Http, args: &Args, name: &str) -> Result<(), Failure> {
    let name = common::segment(name);
    let run = match &args.thread {
        Some(thread) => http.get(&format!("{}/{name}", runs_of(thread))).await?,
        None => http.get(&format!("/v1/runs/{name}")).await?,
    };
    let out = Output::new();
    if args.json {
        return out.line(run).map(drop);
    }
    let below = begun_since(http, &run).await?;
    for line in waterfall::lines(&run, &below, out.columns(), out.is_terminal()) {
        let text = match line.style {
            Some(style) => out.paint(style, &line.text),
            None => line.text,
        };
        if !out.line(text)? {
            break;
        }
    }
    Ok(())
}

/// The runs of its thread that began after this one: its subruns are among them.
async fn begun_since(http: &mut Http, run: &Value) -> Result<Vec<Value>, Failure> {
    let path = format!("{}?limit=1000", runs_of(run["thread"].as_str().unwrap_or_default()));
    let began = run["started"]["seq"].as_u64();
    let mut found = Vec::new();
    let mut next = path.clone();
    loop {
        let mut page = http.get(&next).await?;
        let Value::Array(rows) = page["runs"].take() else { return Ok(found) };
        // Newest first.
        let before = found.len() + rows.len();
        found.extend(rows.into_iter().filter(|row| row["started"]["seq"].as_u64() > began));
        match page["next"].as_str() {
            Some(cursor) if found.len() == before => next = format!("{path}&cursor={cursor}"),
            _ => return Ok(found),
        }
    }
}
