//! `weft tail`: prints a thread's events as they come, and reconnects whenever the connection is lost.

use std::collections::HashSet;

use serde_json::Value;

use super::common::{Failure, Output, Server, Stop, Style, point_in_time, printable, when};
use crate::client::{ClientEvent, ClientItem, Resuming, Start};
use crate::clock;
use crate::protocol::ids::ALL_THREADS;
use crate::protocol::kinds::{
    AGENT_COMPLETED, AGENT_STARTED, AGENT_TOKEN, MEMBER_ADDED, MEMBER_REMOVED, THREAD_CREATED, TOOL_COMPLETED,
    TOOL_EXECUTING,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The thread, or "*" for all that I am a member of.
    pub thread: String,
    /// With "*": all threads of the tenant; the token needs scope analyst.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub server: Server,
    /// Begin after this seq; 0 is the start.
    #[arg(long, conflicts_with = "last")]
    pub after: Option<u64>,
    /// Begin with the newest N.
    #[arg(long, value_name = "N")]
    pub last: Option<u64>,
    /// Print events of these kinds alone, with commas.
    #[arg(long, value_delimiter = ',', value_name = "KINDS")]
    pub kinds: Vec<String>,
    /// Print events of this time or later alone: RFC 3339, or how long ago (2h).
    #[arg(long, value_name = "TIME", value_parser = point_in_time)]
    pub since: Option<u64>,
    /// End by itself, once all that was there is printed.
    #[arg(long)]
    pub until_head: bool,
    /// One JSON object a line.
    #[arg(long)]
    pub json: bool,
}

impl Args {
    pub fn check(&self) -> Result<(), &'static str> {
        match self.all && self.thread != ALL_THREADS {
            true => Err("--all goes with the thread \"*\""),
            false => Ok(()),
        }
    }

    /// Where to begin. Who asks for what was there means all of it, if nothing else is said.
    fn start(&self) -> Start {
        match (self.after, self.last) {
            (Some(seq), _) => Start::After(seq),
            (None, Some(count)) => Start::Last(count),
            (None, None) if self.until_head || self.since.is_some() => Start::After(0),
            (None, None) => Start::Now,
        }
    }

    fn prints(&self, event: &ClientEvent) -> bool {
        let is_of_kind = self.kinds.is_empty() || self.kinds.contains(&event.kind);
        is_of_kind && self.since.is_none_or(|since| clock::parse_rfc3339(&event.at).is_some_and(|at| at >= since))
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let start = args.start();
    let out = Output::new();
    let (url, token) = (&args.server.url, &args.server.token);
    let mut events = match args.all {
        true => Resuming::connect_to_tenant(url, token, start).await?,
        false => Resuming::connect(url, token, &args.thread, start).await?,
    };
    // Threads of which not all that was there has come yet.
    let mut behind: HashSet<String> = events.threads().map(str::to_owned).collect();
    let mut connected = true;
    let mut stop = Stop::new()?;
    loop {
        if args.until_head && behind.is_empty() {
            return Ok(events.close().await?);
        }
        let item = tokio::select! {
            item = events.next() => item?,
            () = stop.asked() => return Ok(events.close().await?),
        };

        // Everything but events goes to standard error, so that standard output can be piped.
        match item {
            ClientItem::Event(event) if !args.prints(&event) => {}
            ClientItem::Event(event) => {
                let text = if args.json { serde_json::to_string(&event)? } else { line(&out, &args, &event) };
                if !out.line(text)? {
                    return Ok(events.close().await?);
                }
            }
            ClientItem::Lost(error) if connected => {
                connected = false;
                eprintln!("weft tail: {error}; connecting again");
            }
            ClientItem::Resumed => {
                connected = true;
                eprintln!("weft tail: connected again, nothing was missed");
            }
            ClientItem::CaughtUp { thread, .. } => drop(behind.remove(&thread)),
            ClientItem::Lost(_) => {}
        }
    }
}

fn line(out: &Output, args: &Args, event: &ClientEvent) -> String {
    let thread = if args.thread == ALL_THREADS { format!("{} ", event.thread) } else { String::new() };
    let seq = event.seq.map_or_else(|| "~".to_owned(), |seq| format!("#{seq}"));
    let time = when(&event.at);
    let from = out.paint(Style::Cyan, format_args!("{:<10}", printable(&event.from)));
    let kind = out.paint(Style::Dim, format_args!("{:<15}", printable(&event.kind)));
    format!("{thread}{seq:>6} {time} {from} {kind} {}", summary(&event.kind, &event.data))
}

/// An event's payload in a few words: its text where it has one, otherwise its JSON.
pub fn summary(kind: &str, data: &Value) -> String {
    let text = |field: &str| data[field].as_str().map(printable);
    let shown = match kind {
        TOOL_EXECUTING => text("tool").map(|tool| format!("{tool} {}", compact(&data["arguments"]))),
        TOOL_COMPLETED => Some(compact(data.get("result").unwrap_or(&data["error"]))),
        AGENT_STARTED => text("agent").map(|agent| format!("{agent}: {}", compact(&data["input"]))),
        // The text before is dropped.
        AGENT_TOKEN if data["restart"] == true => text("text").map(|text| format!("(begun anew) {text}")),
        AGENT_TOKEN => text("text"),
        THREAD_CREATED => Some(text("title").unwrap_or_default()),
        AGENT_COMPLETED => Some(compact(&data["output"])),
        MEMBER_ADDED | MEMBER_REMOVED => text("user").or_else(|| text("member")),
        _ => text("content").or_else(|| parts(&data["content"])),
    };
    shown.unwrap_or_else(|| compact(data))
}

/// The texts of a message's parts as one.
fn parts(content: &Value) -> Option<String> {
    let texts: Vec<&str> = content.as_array()?.iter().filter_map(|part| part["text"].as_str()).collect();
    (!texts.is_empty()).then(|| printable(&texts.concat()))
}

fn compact(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}
