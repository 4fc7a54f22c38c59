//! `weft tail`: prints a thread's events as they come, and reconnects whenever the connection is lost.

use serde_json::Value;

use super::common::{Failure, Output, Server, Style, printable};
use crate::client::{ClientEvent, ClientItem, Resuming, Start};
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
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let start = match (args.after, args.last) {
        (Some(seq), _) => Start::After(seq),
        (None, Some(count)) => Start::Last(count),
        (None, None) => Start::Now,
    };

    let out = Output::new();
    let (url, token) = (&args.server.url, &args.server.token);
    let mut events = match args.all {
        true => Resuming::connect_to_tenant(url, token, start).await?,
        false => Resuming::connect(url, token, &args.thread, start).await?,
    };
    let mut connected = true;
    loop {
        let item = tokio::select! {
            item = events.next() => item?,
            stop = tokio::signal::ctrl_c() => {
                stop?;
                return Ok(events.close().await?);
            }
        };

        // Everything but events goes to standard error, so that standard output can be piped.
        match item {
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
            ClientItem::Lost(_) | ClientItem::CaughtUp { .. } => {}
        }
    }
}

fn line(out: &Output, args: &Args, event: &ClientEvent) -> String {
    let thread = if args.thread == ALL_THREADS { format!("{} ", event.thread) } else { String::new() };
    let seq = event.seq.map_or_else(|| "~".to_owned(), |seq| format!("#{seq}"));
    // Hours, minutes and seconds of an RFC 3339 time; any other text is shown whole.
    let time = event.at.get(11..19).unwrap_or(&event.at);
    let from = out.paint(Style::Cyan, format_args!("{:<10}", printable(&event.from)));
    let kind = out.paint(Style::Dim, format_args!("{:<15}", printable(&event.kind)));
    format!("{thread}{seq:>6} {time} {from} {kind} {}", summary(event))
}

/// The event's payload in a few words: its text where it has one, otherwise its JSON.
pub fn summary(event: &ClientEvent) -> String {
    let data = &event.data;
    let text = |field: &str| data[field].as_str().map(printable);
    let shown = match event.kind.as_str() {
        TOOL_EXECUTING => text("tool").map(|tool| format!("{tool} {}", compact(&data["arguments"]))),
        TOOL_COMPLETED => Some(compact(data.get("result").unwrap_or(&data["error"]))),
        AGENT_STARTED => text("agent").map(|agent| format!("{agent}: {}", compact(&data["input"]))),
        // The text before is dropped.
        AGENT_TOKEN if data["restart"] == true => text("text").map(|text| format!("(begun anew) {text}")),
        AGENT_TOKEN => text("text"),
        THREAD_CREATED => Some(text("title").unwrap_or_default()),
        AGENT_COMPLETED => Some(compact(&data["output"])),
        MEMBER_ADDED | MEMBER_REMOVED => text("user").or_else(|| text("member")),
        _ => text("content"),
    };
    shown.unwrap_or_else(|| compact(data))
}

fn compact(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}
