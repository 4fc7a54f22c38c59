//! `weft dead-letters`: events and records that could not be handled: listed, counted, shown, requeued, discarded.

use std::time::Duration;

use comfy_table::Table;
use serde_json::{Map, Value, json};

use super::common::{self, Failure, Output, Server, Style, cell, print_rows, printable};
use crate::client::{ClientError, Http};

/// Letters that one request acts on.
const PAGE: usize = 100;
/// How long a refused request waits if it is not told.
const RETRY_MS: u64 = 1_000;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[arg(value_enum, default_value = "list")]
    pub action: Action,
    /// The dead letter, to show, requeue or discard it.
    pub id: Option<String>,
    #[command(flatten)]
    pub server: Server,
    /// Only those with this reason.
    #[arg(long)]
    pub reason: Option<String>,
    /// Only those with this fingerprint, which all that are alike have.
    #[arg(long)]
    pub fingerprint: Option<String>,
    /// Only those of this thread.
    #[arg(long)]
    pub thread: Option<String>,
    /// Only those of events of this kind.
    #[arg(long)]
    pub kind: Option<String>,
    /// Only work of this group.
    #[arg(long)]
    pub group: Option<String>,
    /// Only those that failed then or later (RFC 3339).
    #[arg(long)]
    pub since: Option<String>,
    /// Only those that failed before (RFC 3339).
    #[arg(long)]
    pub until: Option<String>,
    /// Requeue or discard all there are.
    #[arg(long)]
    pub all: bool,
    /// Why they are requeued or discarded, for those who read them later.
    #[arg(long)]
    pub note: Option<String>,
    /// Only say what requeueing or discarding would do.
    #[arg(long)]
    pub rehearse: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// List those that are open, newest first.
    List,
    /// Count those that are open, by reason and fingerprint.
    Counts,
    /// Show one with its attempts and the events around it.
    Show,
    /// Try one again, or all that match.
    Requeue,
    /// Discard one, or all that match.
    Discard,
}

impl Args {
    /// Refuses what does not go together.
    pub fn check(&self) -> Result<(), &'static str> {
        let acts = matches!(self.action, Action::Requeue | Action::Discard);
        let filters = self.filters().next().is_some();
        match self.action {
            Action::Show if self.id.is_none() => Err("say which dead letter to show: weft dead-letters show ID"),
            Action::List | Action::Counts if self.id.is_some() => Err("an ID goes with show, requeue and discard"),
            Action::Counts if self.filters().any(|(name, _)| name != "group") => {
                Err("of the filters --group goes with counts")
            }
            Action::Show if filters => Err("filters go with list, requeue and discard"),
            _ if acts && self.id.is_some() && (filters || self.all) => Err("either an ID, or filters, or --all"),
            _ if acts && filters && self.all => Err("either filters, or --all"),
            _ if acts && self.id.is_none() && !filters && !self.all => {
                Err("say which dead letters: an ID, filters such as --fingerprint, or --all")
            }
            _ if !acts && (self.all || self.rehearse || self.note.is_some()) => {
                Err("--all, --rehearse and --note go with requeue and discard")
            }
            _ => Ok(()),
        }
    }

    fn filters(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = [
            ("reason", &self.reason),
            ("fingerprint", &self.fingerprint),
            ("thread", &self.thread),
            ("kind", &self.kind),
            ("group", &self.group),
            ("since", &self.since),
            ("until", &self.until),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    match (args.action, &args.id) {
        (Action::List, _) => list(&args, &mut http).await,
        (Action::Counts, _) => counts(&args, &mut http).await,
        (Action::Requeue | Action::Discard, None) => act_on_all(&args, &mut http).await,
        (Action::Requeue | Action::Discard, Some(id)) => act_on_one(&args, &mut http, id).await,
        (Action::Show, id) => show(&args, &mut http, id.as_deref().unwrap_or_default()).await,
    }
}

async fn list(args: &Args, http: &mut Http) -> Result<(), Failure> {
    let mut query = form_urlencoded::Serializer::new(String::from("limit=1000"));
    query.extend_pairs(args.filters());
    let letters = http.all_pages(&format!("/v1/dead-letters?{}", query.finish()), "items").await?;
    print_rows(args.json, "items", "no dead letters", &letters, table)
}

fn table(letters: &[Value]) -> Table {
    let mut table = common::table(&["at", "reason", "where", "kind", "user", "attempts", "error", "fingerprint", "id"]);
    for row in letters {
        let position = position(row);
        table.add_row([
            cell(&row["at"]),
            cell(&row["reason"]),
            position,
            cell(&row["kind"]),
            cell(&row["user"]),
            cell(&row["attempts"]),
            cell(&row["error"]),
            cell(&row["fingerprint"]),
            cell(&row["id"]),
        ]);
    }
    table
}

fn position(row: &Value) -> String {
    match &row["topic"] {
        Value::Null => format!("{} {}", cell(&row["thread"]), cell(&row["seq"])),
        topic => format!("{} {}:{}", cell(topic), row["partition"], row["offset"]),
    }
}

async fn counts(args: &Args, http: &mut Http) -> Result<(), Failure> {
    let mut query = form_urlencoded::Serializer::new(String::from("limit=1000"));
    query.extend_pairs(args.filters());
    let counts = http.get(&format!("/v1/dead-letters/counts?{}", query.finish())).await?;
    let out = Output::new();
    if args.json {
        return out.line(counts).map(drop);
    }
    let mut reasons = common::table(&["reason", "count"]);
    for row in counts["reasons"].as_array().into_iter().flatten() {
        reasons.add_row([cell(&row["reason"]), cell(&row["count"])]);
    }
    let mut alike = common::table(&["count", "fingerprint", "reason", "kind", "error", "newest"]);
    for row in counts["fingerprints"].as_array().into_iter().flatten() {
        alike.add_row(["count", "fingerprint", "reason", "kind", "error", "newest"].map(|name| cell(&row[name])));
    }
    if counts["total"] == 0 {
        return out.line("no dead letters").map(drop);
    }
    out.line(reasons)?;
    out.line("")?;
    out.line(alike)?;
    if counts["truncated"] == true {
        out.line("and more fingerprints, with fewer letters each")?;
    }
    Ok(())
}

async fn show(args: &Args, http: &mut Http, id: &str) -> Result<(), Failure> {
    let letter = http.get(&format!("/v1/dead-letters/{}", common::segment(id))).await?;
    let out = Output::new();
    if args.json {
        return out.line(letter).map(drop);
    }
    out.line(out.paint(Style::Bold, format!("{} {}", cell(&letter["reason"]), position(&letter))))?;
    for name in ["id", "state", "at", "attempts", "error", "fingerprint", "kind", "user", "name", "size"] {
        if !letter[name].is_null() {
            out.line(format!("{name:<12} {}", cell(&letter[name])))?;
        }
    }
    for tried in letter["tries"].as_array().into_iter().flatten() {
        out.line(format!(
            "{:<12} {} {} {}",
            "tried",
            cell(&tried["at"]),
            cell(&tried["worker"]),
            cell(&tried["reason"])
        ))?;
    }
    for act in letter["acts"].as_array().into_iter().flatten() {
        let (what, by) = (cell(&act["act"]), cell(&act["by"]));
        out.line(format!("{what:<12} {} {by} {}", cell(&act["at"]), cell(&act["note"])))?;
    }
    let events = |name: &str| letter["neighbours"][name].as_array().cloned().unwrap_or_default();
    for event in events("before") {
        out.line(out.paint(Style::Dim, line_of(&event)))?;
    }
    if letter["event"].is_object() {
        out.line(out.paint(Style::Yellow, line_of(&letter["event"])))?;
    }
    for event in events("after") {
        out.line(out.paint(Style::Dim, line_of(&event)))?;
    }
    Ok(())
}

/// An event in one line.
fn line_of(event: &Value) -> String {
    let data: String = printable(&event["data"].to_string()).chars().take(120).collect();
    let (seq, kind, from) = (cell(&event["seq"]), cell(&event["kind"]), cell(&event["from"]));
    format!("{seq:>6} {kind} {from} {data}")
}

async fn act_on_one(args: &Args, http: &mut Http, id: &str) -> Result<(), Failure> {
    let path = format!("/v1/dead-letters/{}", common::segment(id));
    let outcome = match args.action {
        Action::Requeue => {
            let body = json!({"note": args.note, "rehearse": args.rehearse});
            http.post(&format!("{path}/requeue"), &body).await?
        }
        // What is open can be discarded, and nothing else is asked.
        _ if args.rehearse => {
            let letter = http.get(&path).await?;
            let effect = if letter["state"] == "open" { "discard" } else { "none" };
            json!({"id": letter["id"], "reason": letter["reason"], "thread": letter["thread"], "effect": effect})
        }
        _ => {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.extend_pairs(args.note.iter().map(|note| ("note", note)));
            let query = query.finish();
            http.delete(&if query.is_empty() { path } else { format!("{path}?{query}") }).await?
        }
    };
    print_outcomes(args, &[outcome])
}

/// A page at a time, as fast as the server allows.
async fn act_on_all(args: &Args, http: &mut Http) -> Result<(), Failure> {
    let filter: Map<String, Value> = args.filters().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let body = json!({"filter": filter, "note": args.note, "rehearse": args.rehearse});
    let action = if args.action == Action::Requeue { "requeue" } else { "discard" };
    let first = format!("/v1/dead-letters/{action}?limit={PAGE}");

    let (mut path, mut outcomes) = (first.clone(), Vec::new());
    loop {
        let page = match http.post(&path, &body).await {
            Ok(page) => page,
            Err(ClientError::Refused { status: 429, body }) => {
                let refused: Value = serde_json::from_str(&body).unwrap_or_default();
                wait(&refused).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        outcomes.extend(page["items"].as_array().cloned().unwrap_or_default());
        let Some(next) = page["next"].as_str() else { break };
        path = format!("{first}&cursor={next}");
        if !page["retry_after_ms"].is_null() {
            wait(&page).await;
        }
    }
    print_outcomes(args, &outcomes)
}

async fn wait(answer: &Value) {
    let ms = answer["retry_after_ms"].as_u64().unwrap_or(RETRY_MS);
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

/// Prints what became of letters; an error if nothing became of some, unless it was only rehearsed.
fn print_outcomes(args: &Args, outcomes: &[Value]) -> Result<(), Failure> {
    print_rows(args.json, "items", "no dead letters match", outcomes, |rows| {
        let mut table = common::table(&["reason", "thread", "effect", "seq", "why not", "id"]);
        for row in rows {
            table.add_row(["reason", "thread", "effect", "seq", "message", "id"].map(|name| cell(&row[name])));
        }
        table
    })?;
    let refused = outcomes.iter().filter(|outcome| outcome["effect"] == "none").count();
    if refused > 0 && !args.rehearse {
        return Err(format!("nothing became of {refused} of {} dead letters", outcomes.len()).into());
    }
    Ok(())
}
