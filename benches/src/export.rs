//! How fast an analyst takes a thread away as jsonl, and what that costs the server in memory.

use std::time::{Duration, Instant};

use crate::publisher::{Frame, Publisher};
use crate::report::Figure;
use crate::target::{Target, progress};
use weft::cli::common::Failure;
use weft::client::Http;

const FILL_WINDOW: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(180);
const MEMORY: &str = "process_resident_memory_bytes";
/// What each line of an event begins with.
const EVENT: &[u8] = br#"{"type":"event","#;

#[derive(Debug, Clone, clap::Args)]
pub struct ExportArgs {
    /// Events in the thread.
    #[arg(long, default_value_t = 500_000)]
    pub events: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for ExportArgs {
    fn default() -> ExportArgs {
        ExportArgs { events: 500_000, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &ExportArgs) -> Result<Vec<Figure>, Failure> {
    progress(&format!("filling a thread with {} events", args.events));
    let (thread, owner) = (target.name("export", 0), target.name("export-owner", 0));
    let frame = Frame::publish(&thread, args.payload, false);
    let mut publisher = Publisher::open(target, &owner, frame, FILL_WINDOW).await?;
    tokio::time::timeout(PATIENCE, publisher.run(|sent| sent < args.events, |_, _| ())).await??;

    progress("export as jsonl");
    let mut http = target.analyst().await?;
    let before = target.metric(MEMORY).await?;
    let begin = Instant::now();
    let path = format!("/v1/export?thread={thread}");
    let lines = tokio::time::timeout(PATIENCE, count(&mut http, &path)).await??;
    let elapsed = begin.elapsed().as_secs_f64();
    let after = target.metric(MEMORY).await?;
    if lines != args.events {
        return Err(format!("the export has {lines} events of {}", args.events).into());
    }
    Ok(vec![
        Figure::more("export as jsonl", lines as f64 / elapsed, "events/s"),
        Figure::less("memory more after an export", (after - before).max(0.0) / 1e6, "MB"),
    ])
}

/// Counts the lines that are events; the body is in no memory as a whole.
async fn count(http: &mut Http, path: &str) -> Result<u64, Failure> {
    let (mut lines, mut line) = (0, Vec::new());
    http.get_in_pieces(path, |piece| {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            let room = EVENT.len().saturating_sub(line.len()).min(part.len());
            line.extend_from_slice(&part[..room]);
            if part.ends_with(b"\n") {
                lines += u64::from(line == EVENT);
                line.clear();
            }
        }
        Ok::<_, Failure>(())
    })
    .await?;
    Ok(lines)
}
