//! `weft export`: writes what `GET /v1/export` sends, and goes on where that was cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, IsTerminal, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::{Failure, Server, segment};
use crate::client::{ClientError, Http};
use crate::views::export::verify::{self, Flaw};
use crate::views::export::{Format, Header, Note};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub server: Server,
    /// This thread; else all of the tenant.
    #[arg(long)]
    pub thread: Option<String>,
    /// Events of this time or later (RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Events before this time (RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Events of these kinds, with commas.
    #[arg(long)]
    pub kinds: Option<String>,
    /// Events that this user published.
    #[arg(long, value_name = "USER")]
    pub from: Option<String>,
    /// What a line is: jsonl, csv, otel (OpenTelemetry's traces) or chat (datasets).
    #[arg(long, default_value = "jsonl", value_parser = ["jsonl", "csv", "otel", "chat", "parquet"])]
    pub format: String,
    /// Hide what looks like it: email, phone, card, or a /regex/; several with commas, or once more.
    #[arg(long, value_name = "MASKS")]
    pub mask: Vec<String>,
    /// Write to this file, and not to standard output.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Go on with the file of --out, which was cut off; all else is as its first line says.
    #[arg(long, requires = "out")]
    pub resume: bool,
    /// Repeat the export of this file: with its parameters, as of its positions, byte for byte.
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    pub repeat: Option<PathBuf>,
}

impl Args {
    pub fn check(&self) -> Result<(), &'static str> {
        let narrows = [&self.thread, &self.since, &self.until, &self.kinds, &self.from].iter().any(|it| it.is_some())
            || !self.mask.is_empty()
            || self.format != "jsonl";
        match (self.resume || self.repeat.is_some()) && narrows {
            true => Err("with --resume and --repeat the file says what is asked for"),
            false => Ok(()),
        }
    }

    fn path(&self) -> String {
        let mut path = format!("/v1/export?format={}", self.format);
        let mask = self.mask.join(",");
        let mask = Some(&mask).filter(|mask| !mask.is_empty());
        let parameters = [
            ("thread", self.thread.as_ref()),
            ("since", self.since.as_ref()),
            ("until", self.until.as_ref()),
            ("kinds", self.kinds.as_ref()),
            ("from", self.from.as_ref()),
            ("mask", mask),
        ];
        for (name, value) in parameters {
            put(&mut path, name, value.map(String::as_str));
        }
        path
    }
}

fn put(path: &mut String, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        path.push_str(&format!("&{name}={}", segment(value)));
    }
}

/// The request that a file's first line is the answer to, or what follows the mark with this cursor.
fn path_of(header: &Header, cursor: Option<&String>) -> String {
    let format = Format::ALL.into_iter().find(|(_, format)| *format == header.format).map_or("jsonl", |(name, _)| name);
    let mut path = format!("/v1/export?format={format}");
    let positions: Vec<String> = header.positions.iter().map(u64::to_string).collect();
    let parameters = [
        ("epoch", Some(&header.epoch)),
        ("positions", Some(&positions.join(","))),
        ("thread", header.thread.as_ref()),
        ("since", header.since.as_ref()),
        ("until", header.until.as_ref()),
        ("kinds", header.kinds.as_ref()),
        ("from", header.from.as_ref()),
        ("mask", header.mask.as_ref()),
        ("cursor", cursor),
    ];
    for (name, value) in parameters {
        put(&mut path, name, value.map(String::as_str));
    }
    path
}

/// What is in a file, as far as `look` reads it.
fn look<T>(file: &Path, look: impl FnOnce(BufReader<File>) -> Result<T, Flaw>) -> Result<T, Failure> {
    let open = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(look(BufReader::new(open)).map_err(|flaw| format!("{}: {flaw}", file.display()))?)
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let (path, begin) = match (&args.out, &args.repeat) {
        (Some(out), None) if args.resume => {
            let found = look(out, verify::resume)?;
            if found.is_complete {
                eprintln!("weft export: {} is complete", out.display());
                return Ok(());
            }
            (path_of(&found.header, found.cursor.as_ref()), found.bytes)
        }
        (_, Some(file)) => (path_of(&look(file, verify::header)?, None), 0),
        _ => (args.path(), 0),
    };
    let mut sink = Sink::new(args.out.clone(), begin, args.resume)?;
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let sent = http.get_in_pieces(&path, |piece| sink.write(&piece)).await;
    let closed = sink.close();
    match sent {
        Ok(()) => closed,
        // Whoever reads has gone away, as `head` does.
        Err(Stop::Reader) => Ok(()),
        Err(Stop::Client(error @ ClientError::Refused { .. })) => Err(error.into()),
        Err(Stop::Client(ClientError::Lost(_))) if sink.file.is_some() => {
            Err("the export was cut off; go on with --resume".into())
        }
        Err(Stop::Client(error)) => Err(error.into()),
        Err(Stop::Failed(error)) => match &args.out {
            Some(out) if sink.file.is_some() => {
                Err(format!("{}: {error}: the export was cut off; go on with --resume", out.display()).into())
            }
            Some(out) => Err(format!("{}: {error}", out.display()).into()),
            None => Err(error.into()),
        },
    }
}

/// Why the body was not read to its end.
enum Stop {
    Reader,
    Failed(io::Error),
    Client(ClientError),
}

impl From<ClientError> for Stop {
    fn from(error: ClientError) -> Stop {
        Stop::Client(error)
    }
}

/// Where the export goes, and how far it is.
struct Sink {
    out: Option<PathBuf>,
    /// `out`, once something was written to it.
    file: Option<File>,
    resume: bool,
    /// The end of the body, to tell a whole export from one that was cut off.
    tail: Vec<u8>,
    bytes: u64,
    begun: Instant,
    shown: Instant,
}

/// More than the last line of an export has.
const TAIL: usize = 4 << 10;
const SHOW_EVERY: Duration = Duration::from_millis(500);

impl Sink {
    /// `begin`: how much of the file is kept, if the export goes on with it.
    fn new(out: Option<PathBuf>, begin: u64, resume: bool) -> Result<Sink, Failure> {
        let now = Instant::now();
        let sink = Sink { out, file: None, resume, tail: Vec::new(), bytes: begin, begun: now, shown: now };
        match &sink.out {
            Some(out) if !resume && out.metadata().is_ok_and(|it| it.len() > 0) => {
                Err(format!("{} is there already: --resume goes on with it", out.display()).into())
            }
            _ => Ok(sink),
        }
    }

    /// A file is opened, and what follows the last mark cut off, when the first piece comes in: a request that fails leaves
    /// what was there.
    fn open(&self, out: &Path) -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(out)?;
        if !self.resume && file.metadata()?.len() > 0 {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        file.set_len(self.bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(file)
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), Stop> {
        if let (Some(out), None) = (&self.out, &self.file) {
            self.file = Some(self.open(out).map_err(Stop::Failed)?);
        }
        let written = match &mut self.file {
            Some(file) => file.write_all(piece),
            None => io::stdout().lock().write_all(piece),
        };
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(Stop::Reader),
            written => written.map_err(Stop::Failed)?,
        }
        self.bytes += piece.len() as u64;
        self.tail.extend_from_slice(&piece[piece.len().saturating_sub(TAIL)..]);
        let surplus = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..surplus);
        if self.shown.elapsed() >= SHOW_EVERY && self.file.is_some() && io::stderr().is_terminal() {
            self.shown = Instant::now();
            let mib = self.bytes as f64 / f64::from(1 << 20);
            eprint!("\r{mib:.1} MiB, {:.1} MiB/s ", mib / self.begun.elapsed().as_secs_f64().max(0.001));
        }
        Ok(())
    }

    /// An error if the last line is not that of a whole export.
    fn close(&mut self) -> Result<(), Failure> {
        match &mut self.file {
            Some(file) => file.sync_all()?,
            None => io::stdout().lock().flush()?,
        }
        match verify::last_note(&String::from_utf8_lossy(&self.tail)) {
            Some(Note::End { .. }) => Ok(()),
            Some(Note::Error { code, detail }) => Err(format!("the server ended the export: {detail} ({code})").into()),
            _ => Err("the export is not complete".into()),
        }
    }
}
