//! `weft doctor`: checks a data folder while no server runs on it, changes nothing, and says how to mend what is wrong.

use std::path::Path;

use serde_json::{Value, json};

use super::common::{Failure, Output, Style};
use crate::app::kafka_config;
use crate::config::{Config, LogChoice, StorageArgs};
use crate::disk;
use crate::log::LogError;
use crate::log::embedded::examine::{self, Examined};
use crate::log::kafka::examine as topics;
use crate::store::damage::ExaminedStore;
use crate::store::{Store, StoreError};

/// With less room a flush or a rebuild can fail.
const ROOM: u64 = 256 << 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    storage: StorageArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
struct Check {
    name: &'static str,
    outcome: Outcome,
}

enum Outcome {
    Good(String),
    /// Nothing is wrong yet; what may become so, and how to mend it.
    Warning(String, String),
    /// What is wrong, and how to mend it.
    Wrong(String, String),
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, outcome: Outcome::Good(found.into()) }
    }

    fn warning(name: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Check {
        Check { name, outcome: Outcome::Warning(what.into(), mend.into()) }
    }

    fn bad(name: &'static str, wrong: impl Into<String>, mend: impl Into<String>) -> Check {
        Check { name, outcome: Outcome::Wrong(wrong.into(), mend.into()) }
    }

    fn is_wrong(&self) -> bool {
        matches!(self.outcome, Outcome::Wrong(..))
    }

    fn json(&self) -> Value {
        match &self.outcome {
            Outcome::Good(found) => json!({"name": self.name, "ok": true, "found": found}),
            Outcome::Warning(what, mend) => json!({"name": self.name, "ok": true, "warning": what, "mend": mend}),
            Outcome::Wrong(wrong, mend) => json!({"name": self.name, "ok": false, "wrong": wrong, "mend": mend}),
        }
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(args.storage.config.as_deref(), &args.storage)?;
    let checks = tokio::task::spawn_blocking(move || look(&config)).await?;
    let wrong = checks.iter().filter(|check| check.is_wrong()).count();
    let out = Output::new();
    if args.json {
        let checks: Vec<Value> = checks.iter().map(Check::json).collect();
        out.line(json!({"ok": wrong == 0, "checks": checks}))?;
    } else {
        for check in &checks {
            match &check.outcome {
                Outcome::Good(found) => {
                    out.line(format!("{}   {}: {found}", out.paint(Style::Green, "good"), check.name))?
                }
                Outcome::Warning(what, mend) => {
                    out.line(format!("{}   {}: {what}", out.paint(Style::Yellow, "warn"), check.name))?;
                    out.line(format!("       {mend}"))?
                }
                Outcome::Wrong(wrong, mend) => {
                    out.line(format!("{}  {}: {wrong}", out.paint(Style::Red, "wrong"), check.name))?;
                    out.line(format!("       {mend}"))?
                }
            };
        }
    }
    match wrong {
        0 => Ok(()),
        1 => Err("one thing is wrong".into()),
        wrong => Err(format!("{wrong} things are wrong").into()),
    }
}

fn look(config: &Config) -> Vec<Check> {
    if !config.data.is_dir() {
        let wrong = format!("there is no folder {}", config.data.display());
        return vec![Check::bad("data", wrong, "name the right one with --data; a server makes it at its first start")];
    }
    let mut checks = vec![writable(&config.data), room(&config.data)];
    let log = match config.log {
        LogChoice::Embedded => log(&config.log_dir(), &mut checks),
        LogChoice::Kafka => {
            brokers(config, &mut checks);
            None
        }
    };
    let store = projections(&config.projections_dir(), &mut checks);
    if let (Some(log), Some(store)) = (log.filter(|log| log.problems.is_empty()), store) {
        checks.push(fit(&log, &store));
    }
    checks
}

fn writable(data: &Path) -> Check {
    let probe = data.join(".doctor");
    let written = std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
    match written {
        Ok(()) => Check::good("permissions", format!("{} can be written", data.display())),
        Err(error) => Check::bad(
            "permissions",
            format!("{} cannot be written: {error}", data.display()),
            "give the server's user the folder, and look whether the disk is mounted read-only",
        ),
    }
}

fn room(data: &Path) -> Check {
    match disk::room(data) {
        Ok(bytes) if bytes >= ROOM => Check::good("room", format!("{} MiB are free", bytes >> 20)),
        Ok(bytes) => Check::bad(
            "room",
            format!("only {} MiB are free", bytes >> 20),
            "make room: a full disk refuses publishes until there is some",
        ),
        Err(error) => Check::bad("room", error.to_string(), "look at the disk"),
    }
}

fn log(dir: &Path, checks: &mut Vec<Check>) -> Option<Examined> {
    let examined = match examine::examine(dir, |_| {}) {
        Ok(Some(examined)) => examined,
        Ok(None) => {
            let wrong = format!("there is no log in {}", dir.display());
            checks.push(Check::bad("log", wrong, "put the log back, or a backup of it; a first start makes a new one"));
            return None;
        }
        Err(error @ LogError::Unavailable(_)) => {
            checks.push(Check::bad("log", error.to_string(), "stop the server, then run this again"));
            return None;
        }
        Err(error) => {
            checks.push(Check::bad("log", error.to_string(), "look at the disk"));
            return None;
        }
    };
    for problem in &examined.problems {
        checks.push(Check::bad(
            "log",
            problem,
            "keep a copy of log/ and look at the disk; then `weft salvage --out NEW` copies every record that can be read, \
             or put a backup in its place",
        ));
    }
    if examined.problems.is_empty() {
        checks.push(Check::good(
            "log",
            format!("{} records, all of them read, up to offset {}", examined.records, examined.end),
        ));
    }
    if !examined.holes.is_empty() {
        let lost: u64 = examined.holes.iter().map(|(from, to)| to - from).sum();
        checks.push(Check::good("log", format!("it was salvaged once, without {lost} records that were lost")));
    }
    Some(examined)
}

/// The topics, as the brokers have them.
fn brokers(config: &Config, checks: &mut Vec<Check>) {
    let examined = match topics::examine(kafka_config(config), config.partitions) {
        Ok(examined) => examined,
        Err(error) => {
            let mend = "look whether the brokers run, whether --brokers names them, and whether --kafka-config has what they \
                        ask for";
            return checks.push(Check::bad("brokers", error.to_string(), mend));
        }
    };
    checks.push(Check::good("brokers", format!("{} answers", config.brokers)));
    if examined.found.is_empty() {
        let found = format!("there are none that begin with {}; a start makes them", config.topic_prefix);
        checks.push(Check::good("topics", found));
    }
    checks.extend(examined.found.into_iter().map(|found| Check::good("topics", found)));
    checks.extend(examined.problems.into_iter().map(|it| Check::bad("topics", it.what, it.mend)));
    checks.extend(examined.warnings.into_iter().map(|it| Check::warning("topics", it.what, it.mend)));
}

fn projections(dir: &Path, checks: &mut Vec<Check>) -> Option<ExaminedStore> {
    match Store::examine(dir) {
        Ok(Some(examined)) if examined.problems.is_empty() => {
            checks.push(Check::good("projections", format!("{} rows, all of them read", examined.rows)));
            Some(examined)
        }
        Ok(Some(examined)) => {
            let mend = "start the server: it sets them aside and makes them anew from the log";
            checks.extend(examined.problems.iter().map(|problem| Check::bad("projections", problem, mend)));
            None
        }
        Ok(None) => {
            checks.push(Check::good("projections", "there are none; a start makes them from the log"));
            None
        }
        Err(error @ StoreError::OtherVersion(_)) => {
            checks.push(Check::good("projections", error.to_string()));
            None
        }
        Err(error) => {
            checks.push(Check::bad("projections", error.to_string(), "stop the server, then run this again"));
            None
        }
    }
}

fn fit(log: &Examined, store: &ExaminedStore) -> Check {
    if store.epoch.is_some() && log.epoch != store.epoch {
        let wrong = "the projections were made from another log";
        return Check::bad("positions", wrong, "put the log that they belong to back");
    }
    let ahead = store.positions.iter().copied().max().unwrap_or(0);
    if ahead > log.end {
        let wrong = format!("the projections have read up to offset {ahead}, and the log ends at {}", log.end);
        return Check::bad(
            "positions",
            wrong,
            "the log has lost its end: put the newer log back, and copy data/ before anything else",
        );
    }
    let behind = log.end.saturating_sub(store.positions.iter().copied().min().unwrap_or(0));
    Check::good("positions", format!("the next start reads {behind} records"))
}
