//! `weft verify`: proves what is in a data folder, while no server runs on it, or in an export.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::common::{Failure, Output, Progress};
use crate::app::open_log_to_read;
use crate::config::{Config, StorageArgs};
use crate::log::LogError;
use crate::projector::opening::OpenError;
use crate::projector::rebuild::RebuildError;
use crate::projector::verify::{self as projections, MadeStore, Step};
use crate::search::verify::{self as index, VerifiedIndex};
use crate::store::{Compared, Store};
use crate::views::export::verify::{self as export};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `weft export` wrote; without it the data folder is verified
    pub file: Option<PathBuf>,
    #[command(flatten)]
    storage: StorageArgs,
    /// Where there is room for a second set of projections while it works [default: the data folder]
    #[arg(long, value_name = "DIR", conflicts_with = "file")]
    scratch: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    if let Some(file) = &args.file {
        return verify_export(file, args.json);
    }
    let config = Config::load(args.storage.config.as_deref(), &args.storage)?;
    let scratch = match args.scratch {
        // What one that was killed has left there is deleted by the next.
        None => config.data.join("verify"),
        Some(scratch) => scratch.join(format!("weft-verify-{}", std::process::id())),
    };
    let shown = Progress::on_terminal();
    let verified = tokio::task::spawn_blocking(move || verify_data(&config, &scratch, shown)).await?;
    shown.end();

    let out = Output::new();
    match verified {
        Ok(whole) => {
            if args.json {
                out.line(whole.json())?;
            } else {
                whole.say(&out)?;
            }
            Ok(())
        }
        Err(flaw) => {
            if args.json {
                out.line(flaw.json())?;
            }
            Err(flaw.to_string().into())
        }
    }
}

/// What of a data folder was not proved to be whole, and why.
#[derive(Debug, thiserror::Error)]
enum Flaw {
    #[error(transparent)]
    Data(Failure),
    #[error(transparent)]
    Log(LogError),
    #[error(transparent)]
    Projections(projections::VerifyError),
    #[error(transparent)]
    Index(index::VerifyError),
}

impl Flaw {
    fn json(&self) -> Value {
        use index::VerifyError::Event;
        use projections::VerifyError::Differs;

        let (part, difference) = match self {
            Flaw::Data(_) => ("data", Value::Null),
            Flaw::Projections(Differs(it)) => {
                let it = json!({
                    "family": it.family, "tenant": it.tenant, "thread": it.thread, "seq": it.seq, "key": it.key,
                    "expected": it.expected, "found": it.found,
                });
                ("projections", it)
            }
            Flaw::Index(Event { tenant, thread, seq, .. }) => {
                ("search", json!({"tenant": tenant, "thread": thread, "seq": seq}))
            }
            Flaw::Index(_) => ("search", Value::Null),
            Flaw::Log(_) => ("log", Value::Null),
            Flaw::Projections(_) if self.log_error().is_some() => ("log", Value::Null),
            Flaw::Projections(_) => ("projections", Value::Null),
        };
        let whole = if self.is_proved() { json!(false) } else { Value::Null };
        json!({"whole": whole, "part": part, "error": self.to_string(), "difference": difference})
    }

    /// What the log said, if it is that.
    fn log_error(&self) -> Option<&LogError> {
        use projections::VerifyError::{Log, Rebuild};

        match self {
            Flaw::Log(error) | Flaw::Projections(Log(error) | Rebuild(RebuildError::Log(error))) => Some(error),
            _ => None,
        }
    }

    /// Whether something is wrong, and not only in the way of looking.
    fn is_proved(&self) -> bool {
        use projections::VerifyError::{Damaged, Differs, Open, Progress};

        match self {
            Flaw::Data(_) => false,
            Flaw::Projections(Damaged(_) | Differs(_) | Progress { .. }) => true,
            Flaw::Projections(Open(error)) => matches!(error, OpenError::Misfit { .. } | OpenError::Shortened(_)),
            Flaw::Index(error) => !matches!(error, index::VerifyError::Store(_)),
            _ => matches!(self.log_error(), Some(LogError::Damaged(_))),
        }
    }
}

/// What was proved of a data folder.
struct Whole {
    epoch: String,
    records: u64,
    compared: Compared,
    /// Records that the projections lack, if there are any projections.
    behind: Option<u64>,
    index: Option<VerifiedIndex>,
}

fn verify_data(config: &Config, scratch: &Path, shown: Progress) -> Result<Whole, Flaw> {
    let data = |why: String| Flaw::Data(why.into());
    if !config.data.is_dir() {
        return Err(data(format!("there is no folder {}", config.data.display())));
    }
    let path = config.projections_dir();
    // Only to say on Kafka which log it must be: what is wrong with the projections shows below.
    let origin = Store::open_read_only(&path).ok().flatten().and_then(|store| store.origin().ok().flatten());
    let log = open_log_to_read(config, origin).map_err(Flaw::Log)?;

    let progress = |step| match step {
        Step::Records { done, of } => shown.show(format_args!("{done} of {of} records judged again")),
        Step::Rows(rows) => shown.show(format_args!("{rows} rows compared")),
    };
    let verified = projections::verify(log.as_ref(), &path, scratch, progress).map_err(Flaw::Projections)?;
    let projections::Verified { records, made, compared, behind } = verified;
    let MadeStore { store, .. } = &made;
    let progress = |events| shown.show(format_args!("{events} events found in the index of search"));
    let index = index::verify(&config.search_dir(), store, &log.epoch(), progress).map_err(Flaw::Index)?;
    let epoch = log.epoch();
    log.close();
    Ok(Whole { epoch, records, compared, behind, index })
}

impl Whole {
    fn json(&self) -> Value {
        let Whole { epoch, records, compared, behind, index } = self;
        json!({
            "whole": true, "epoch": epoch, "records": records, "threads": compared.threads, "events": compared.events,
            "projections": behind.map(|behind| json!({"rows": compared.rows, "behind": behind})),
            "search": index.map(|index| json!({"events": index.events, "behind": index.behind})),
        })
    }

    fn say(&self, out: &Output) -> Result<(), Failure> {
        let Whole { epoch, records, compared, behind, index } = self;
        out.line(format_args!("whole: {records} records of the log {epoch}"))?;
        let made = format!("{} events of {} threads", compared.events, compared.threads);
        out.line(match behind {
            Some(0) => format!("projections: {made}, {} rows, each is what the log makes", compared.rows),
            Some(behind) => format!(
                "projections: {made}, {} rows, each is what the log makes; a start reads {behind} records more",
                compared.rows
            ),
            None => format!("there are no projections; the log makes {made}"),
        })?;
        out.line(match index {
            Some(VerifiedIndex { events, behind: 0 }) => format!("search: {events} events, all that there are"),
            Some(VerifiedIndex { events, behind }) => {
                format!("search: {events} events, none is missing up to where it has come; a start adds {behind} more")
            }
            None => "there is no index of search; a start makes it".to_owned(),
        })?;
        Ok(())
    }
}

fn verify_export(path: &Path, json: bool) -> Result<(), Failure> {
    let name = path.display();
    let file = File::open(path).map_err(|error| format!("{name}: {error}"))?;
    let verified = export::verify(BufReader::with_capacity(1 << 20, file)).map_err(|flaw| format!("{name}: {flaw}"))?;
    let export::Verified { header, lines, threads, proved, partly, digest } = verified;
    let out = Output::new();
    if json {
        let found = json!({
            "lines": lines, "threads": threads, "proved": proved, "partly": partly, "blake3": digest, "export": header,
        });
        return out.line(found).map(drop);
    }
    out.line(format_args!("complete and unaltered: {lines} lines of {threads} threads of {}", header.tenant))?;
    out.line(format_args!("of the log {}; its digest is {digest}", header.epoch))?;
    let chains = match (proved, partly) {
        _ if !header.is_whole() => "it is a choice of events: no hash of a thread was made from it".to_owned(),
        (proved, 0) => format!("of all {proved} threads each event was held against the thread's hash"),
        (proved, partly) => format!(
            "of {proved} threads each event was held against the thread's hash, of {partly} those after the last one whose record \
             is not in the export; the others by the digest"
        ),
    };
    out.line(chains).map(drop)
}
