//! The command `weft`: parse, run, exit with 0 (done), 1 (failed) or 2 (wrong usage).

use std::process::ExitCode;
use std::time::Duration;

use weft::app::StartError;
use weft::cli::common::Failure;
use weft::cli::{Cli, logging};
use weft::config::ConfigError;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::from_command_line(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft: {error}");
            let usage = error.is::<ConfigError>() || matches!(error.downcast_ref(), Some(StartError::Config(_)));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    logging::init()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(cli.run());
    // A blocking call that is still waiting, such as a question to brokers that do not answer, must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}
