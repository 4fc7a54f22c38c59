//! The command `weft`: one file a command.

pub mod append;
pub mod common;
pub mod dead_letters;
pub mod demo;
pub mod doctor;
pub mod export;
pub mod groups;
pub mod logging;
pub mod rebuild;
pub mod replay;
pub mod runs;
pub mod salvage;
pub mod schemas;
pub mod search;
pub mod serve;
pub mod tail;
pub mod threads;
pub mod token;
pub mod verify;
pub mod work;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};

use common::Failure;

/// Commands that are planned and not there yet.
const PLANNED: [&str; 4] = ["backup", "restore", "erase", "completions"];

/// An event-sourced messaging backend for AI platforms.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the server
    Serve(Box<serve::Args>),
    /// Play a conversation against a running server
    Demo(demo::Args),
    /// Print a token and nothing else
    Token(token::Args),
    /// List my threads
    Threads(threads::Args),
    /// Follow a thread, or "*" for all of mine or, with --all, of the tenant
    Tail(tail::Args),
    /// Find events by their words, newest first
    Search(Box<search::Args>),
    /// List, count, show, requeue or discard dead letters: what could not be handled; scope admin
    DeadLetters(Box<dead_letters::Args>),
    /// List, show, set, delete, pause or resume the groups of work queues
    Groups(Box<groups::Args>),
    /// Run a command for each event of a group, publish what it prints, settle by its exit code; scope agent
    Work(work::Args),
    /// List the runs of agents, or show one as a waterfall
    Runs(runs::Args),
    /// Write the tenant's threads, or one, to a file or to standard output; scope analyst
    Export(Box<export::Args>),
    /// Prove that log, projections and search index of a stopped server are whole, or that an export is, without a server
    Verify(Box<verify::Args>),
    /// Play a thread again, at its pace or faster, or step by step, here or into another server
    Replay(Box<replay::Args>),
    /// Rebuild the projections from the log, of a stopped server
    Rebuild(rebuild::Args),
    /// Check a data folder, while no server runs on it, and say how to mend what is wrong
    Doctor(doctor::Args),
    /// Copy every record that can be read of a damaged embedded log into a new data folder
    Salvage(salvage::Args),
    /// Write the contract as JSON Schemas
    Schemas(schemas::Args),
    /// For tests of the log: append records until the process is killed
    #[command(hide = true)]
    AppendUntilKilled(append::Args),
}

impl Cli {
    /// Reads a command line. The error prints itself; it is `--help` or `--version`, or a wrong command line.
    pub fn from_command_line(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
        let matches = with_planned().try_get_matches_from(words)?;
        match matches.subcommand_name() {
            Some(name) if PLANNED.contains(&name) => {
                let why = format!("`weft {name}` is planned, and not there yet");
                Err(Cli::command().error(ErrorKind::InvalidSubcommand, why))
            }
            _ => Cli::from_arg_matches(&matches)?.checked(),
        }
    }

    /// Refuses what does not go together, and clap cannot know of.
    fn checked(self) -> Result<Cli, clap::Error> {
        let checked = match &self.command {
            CliCommand::Tail(args) => args.check(),
            CliCommand::DeadLetters(args) => args.check(),
            CliCommand::Groups(args) => args.check(),
            CliCommand::Export(args) => args.check(),
            CliCommand::Replay(args) => args.check(),
            _ => Ok(()),
        };
        checked.map_err(|why| Cli::command().error(ErrorKind::ArgumentConflict, why))?;
        Ok(self)
    }

    pub async fn run(self) -> Result<(), Failure> {
        match self.command {
            CliCommand::Serve(args) => serve::run(*args).await,
            CliCommand::Demo(args) => demo::run(args).await,
            CliCommand::Token(args) => token::run(&args),
            CliCommand::Threads(args) => threads::run(args).await,
            CliCommand::Tail(args) => tail::run(args).await,
            CliCommand::Search(args) => search::run(*args).await,
            CliCommand::DeadLetters(args) => dead_letters::run(*args).await,
            CliCommand::Groups(args) => groups::run(*args).await,
            CliCommand::Work(args) => work::run(args).await,
            CliCommand::Runs(args) => runs::run(args).await,
            CliCommand::Export(args) => export::run(*args).await,
            CliCommand::Verify(args) => verify::run(*args).await,
            CliCommand::Replay(args) => replay::run(*args).await,
            CliCommand::Rebuild(args) => rebuild::run(args).await,
            CliCommand::Doctor(args) => doctor::run(args).await,
            CliCommand::Salvage(args) => salvage::run(args).await,
            CliCommand::Schemas(args) => schemas::run(&args),
            CliCommand::AppendUntilKilled(args) => append::run(args).await,
        }
    }
}

/// The command with those that are planned: they accept anything, so that whoever tries one reads that it is not there.
fn with_planned() -> clap::Command {
    let planned = PLANNED.map(|name| {
        let anything = Arg::new("anything").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        clap::Command::new(name).about("Planned, not there yet").hide(true).disable_help_flag(true).arg(anything)
    });
    Cli::command().subcommands(planned).after_help(format!("Planned, not there yet: {}", PLANNED.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::from_command_line(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_command_is_sound() {
        with_planned().debug_assert();
        assert!(parse("weft threads --token t").is_ok());
    }

    #[test]
    fn what_is_planned_says_so_whatever_follows() {
        for name in PLANNED {
            for more in ["", " --help", " a b --json -x", " -- c"] {
                let error = parse(&format!("weft {name}{more}")).expect_err(name);
                let text = error.to_string();
                assert!(text.contains(&format!("`weft {name}` is planned, and not there yet")), "{text}");
                assert_eq!(error.exit_code(), 2);
            }
        }
        let unknown = parse("weft dance").expect_err("no such command");
        assert!(unknown.to_string().contains("unrecognized subcommand 'dance'"), "{unknown}");
    }

    #[test]
    fn the_help_lists_what_is_planned_apart_from_what_is_there() {
        let help = parse("weft --help").expect_err("the help");
        assert_eq!(help.exit_code(), 0);
        let text = help.to_string();
        let (there, planned) = text.split_once("Planned, not there yet: ").expect("both");
        assert!(there.contains("dead-letters") && !there.contains("backup"), "{text}");
        assert!(planned.contains("backup"), "{text}");
    }
}
