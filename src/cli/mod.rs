//! The command `weft`: one file a command.

pub mod append;
pub mod common;
pub mod dead_letters;
pub mod demo;
pub mod rebuild;
pub mod runs;
pub mod schemas;
pub mod serve;
pub mod tail;
pub mod threads;
pub mod token;

use clap::{Parser, Subcommand};

use common::Failure;

/// An event-sourced messaging backend for AI platforms.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(Box<serve::Args>),
    /// Play a conversation against a running server
    Demo(demo::DemoArgs),
    /// Print a token and nothing else
    Token(token::TokenArgs),
    /// List my threads
    Threads(threads::ThreadsArgs),
    /// Follow a thread, or "*" for all of mine
    Tail(tail::TailArgs),
    /// List what could not be handled; scope admin
    DeadLetters(dead_letters::Args),
    /// List the runs of agents, or show what one did and when
    Runs(runs::Args),
    /// Make the projections anew from the log, of a stopped server
    Rebuild(rebuild::Args),
    /// Write the contract as JSON Schemas
    Schemas(schemas::Args),
    /// For tests of the log: append records until the process is killed
    #[command(hide = true)]
    AppendUntilKilled(append::Args),
}

impl Cli {
    pub async fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Serve(args) => serve::run(*args).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Token(args) => token::run(args).await,
            Command::Threads(args) => threads::run(args).await,
            Command::Tail(args) => tail::run(args).await,
            Command::DeadLetters(args) => dead_letters::run(args).await,
            Command::Runs(args) => runs::run(args).await,
            Command::Rebuild(args) => rebuild::run(args).await,
            Command::Schemas(args) => schemas::run(&args),
            Command::AppendUntilKilled(args) => append::run(args).await,
        }
    }
}
