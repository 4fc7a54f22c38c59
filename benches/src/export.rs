//! How fast an analyst takes a tenant's events away, as jsonl and as csv, and what that costs the server in memory.
//!
//! Beside it, in the same run: the same bytes from a plain file, by a server that does nothing but send it, to the same client.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fill;
use crate::publisher::Frame;
use crate::report::Figure;
use crate::target::{Target, progress};
use weft::cli::common::Failure;
use weft::client::Http;

const PATIENCE: Duration = Duration::from_secs(180);
const MEMORY: &str = "process_resident_memory_bytes";
/// The formats, and what each line of an event begins with.
const FORMATS: [(&str, &[u8]); 2] = [("jsonl", br#"{"type":"event","#), ("csv", b"event,")];

#[derive(Debug, Clone, clap::Args)]
pub struct ExportArgs {
    /// Events of the tenant.
    #[arg(long, default_value_t = 200_000)]
    pub events: u64,
    /// Threads that they are in.
    #[arg(long, default_value_t = 1_000)]
    pub threads: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for ExportArgs {
    fn default() -> ExportArgs {
        ExportArgs { events: 200_000, threads: 1_000, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &ExportArgs) -> Result<Vec<Figure>, Failure> {
    progress(&format!("filling {} threads with {} events", args.threads, args.events));
    // A tenant of its own: what other benches have published is not exported.
    let target = target.of_tenant(&target.name("export", 0));
    let (owner, threads) = (target.name("owner", 0), fill::names(&target, "export", args.threads));
    let data: Value = serde_json::from_str(&Frame::data(args.payload))?;
    fill::fill(&target, &owner, &threads, args.events, |_| data.clone()).await?;

    let mut http = target.analyst().await?;
    let mut figures = Vec::new();
    let before = target.metric(MEMORY).await?;
    for (format, begins) in FORMATS {
        progress(&format!("export as {format}"));
        let path = format!("/v1/export?format={format}");
        let taken = take(&mut http, &path, begins).await?;
        if taken.lines != args.events {
            return Err(format!("the export has {} events of {}", taken.lines, args.events).into());
        }
        progress(&format!("the same as a file, {format}"));
        let bare = bare(&target, &mut http, &path, begins).await?;
        if (bare.lines, bare.bytes) != (taken.lines, taken.bytes) {
            return Err("a second export has other bytes".into());
        }
        figures.extend([
            Figure::more(&format!("export as {format}"), taken.lines as f64 / taken.seconds, "events/s"),
            Figure::more(&format!("export as {format}: bytes"), taken.bytes as f64 / taken.seconds / 1e6, "MB/s"),
            Figure::more(&format!("the same file, {format}: bytes"), bare.bytes as f64 / bare.seconds / 1e6, "MB/s"),
        ]);
    }
    let after = target.metric(MEMORY).await?;
    figures.push(Figure::less("memory more after an export", (after - before).max(0.0) / 1e6, "MB"));
    Ok(figures)
}

/// What a body was.
struct Taken {
    /// Lines that are events.
    lines: u64,
    bytes: u64,
    seconds: f64,
}

/// Takes a body, and counts; it is in no memory as a whole.
async fn take(http: &mut Http, path: &str, begins: &[u8]) -> Result<Taken, Failure> {
    let (mut lines, mut bytes, mut line) = (0, 0, Vec::new());
    let begun = Instant::now();
    let body = http.get_in_pieces(path, |piece| {
        bytes += piece.len() as u64;
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            let room = begins.len().saturating_sub(line.len()).min(part.len());
            line.extend_from_slice(&part[..room]);
            if part.ends_with(b"\n") {
                lines += u64::from(line == begins);
                line.clear();
            }
        }
        Ok::<_, Failure>(())
    });
    tokio::time::timeout(PATIENCE, body).await??;
    Ok(Taken { lines, bytes, seconds: begun.elapsed().as_secs_f64() })
}

/// Takes the same body from a file.
async fn bare(target: &Target, http: &mut Http, path: &str, begins: &[u8]) -> Result<Taken, Failure> {
    let copy = Copy(std::env::temp_dir().join(target.name("weft-bench-export", 0)));
    let mut file = File::create_new(&copy.0)?;
    let body = http.get_in_pieces(path, |piece| file.write_all(&piece).map_err(Failure::from));
    tokio::time::timeout(PATIENCE, body).await??;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    let file = copy.0.clone();
    let server = std::thread::spawn(move || send(&listener.accept()?.0, &file));
    let taken = take(&mut Http::connect(&url, "none").await?, "/", begins).await?;
    // What it sent has come: it has ended.
    server.join().map_err(|_| "the thread that sends a file has panicked")??;
    Ok(taken)
}

/// A file that is gone with this.
struct Copy(PathBuf);

impl Drop for Copy {
    fn drop(&mut self) {
        // What cannot be removed is left to whoever clears the folder of temporary files.
        drop(std::fs::remove_file(&self.0));
    }
}

/// Answers one request with a file.
fn send(mut client: &TcpStream, file: &Path) -> io::Result<()> {
    let (mut request, mut byte) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let mut file = File::open(file)?;
    let bytes = file.metadata()?.len();
    write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n")?;
    io::copy(&mut file, &mut client).map(drop)
}
