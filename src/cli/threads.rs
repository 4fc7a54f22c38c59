//! `weft threads`: the threads of the token's user, newest activity first.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::common::{Failure, Out, Server, printable};
use crate::client::Http;

#[derive(Debug, clap::Args)]
pub struct ThreadsArgs {
    #[command(flatten)]
    pub server: Server,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

pub async fn run(args: ThreadsArgs) -> Result<(), Failure> {
    let threads = all(&mut Http::connect(&args.server.url, &args.server.token).await?).await?;
    let out = Out::new();
    if args.json {
        out.line(json!({ "threads": threads }))?;
    } else if threads.is_empty() {
        out.line("no threads yet")?;
    } else {
        out.line(table(&threads))?;
    }
    Ok(())
}

async fn all(http: &mut Http) -> Result<Vec<Value>, Failure> {
    let mut threads = Vec::new();
    let mut path = "/v1/threads?limit=1000".to_owned();
    loop {
        let mut page = http.get(&path).await?;
        match page["threads"].take() {
            Value::Array(rows) => threads.extend(rows),
            other => return Err(format!("the server sent no list of threads: {other}").into()),
        }
        match page["next"].as_str() {
            Some(cursor) => path = format!("/v1/threads?limit=1000&cursor={cursor}"),
            None => return Ok(threads),
        }
    }
}

fn table(threads: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["thread", "title", "head", "unread", "members", "last"]);
    for row in threads {
        let members = row["members"].as_array().map_or_else(|| text(&row["members"]), |m| m.len().to_string());
        let last = row["last"].get("at").unwrap_or(&row["last"]);
        table.add_row([
            text(&row["thread"]),
            text(&row["title"]),
            text(&row["head"]),
            text(&row["unread"]),
            members,
            text(last),
        ]);
    }
    for column in 2..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}
