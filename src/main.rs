//! The command `weft`: parse, run, exit with 0 (done), 1 (failed) or 2 (wrong usage).

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use weft::app::StartError;
use weft::cli::Cli;
use weft::config::ConfigError;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("WEFT_LOG_LEVEL").unwrap_or_else(|_| EnvFilter::new("warn,weft=info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("weft: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let result = runtime.block_on(cli.run());
    // What still blocks then is a question to somebody who does not answer.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft: {error}");
            let usage = error.is::<ConfigError>() || matches!(error.downcast_ref(), Some(StartError::Config(_)));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
