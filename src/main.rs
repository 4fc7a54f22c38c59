//! The command `weft`: parse, run, exit with 0 (done), 1 (failed) or 2 (wrong usage).

use std::process::ExitCode;
use std::time::Duration;

use weft::app::StartError;
use weft::cli::common::Failure;
use weft::cli::{Cli, logging};
use weft::config::ConfigError;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long the allocator keeps what is free, to use it again.
const FREE_KEPT_MS: isize = 2_000;

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

/// Has the allocator give back what is free: without threads of its own for that, what was used once, in a peak, would stay
/// until the same arena is used again.
fn give_memory_back() -> Result<(), tikv_jemalloc_ctl::Error> {
    use tikv_jemalloc_ctl::{Access, AsName, background_thread};

    // Arenas are made as threads need them; the first one is there already.
    for arenas in ["arenas.dirty_decay_ms\0", "arena.0.dirty_decay_ms\0"] {
        arenas.name().write(FREE_KEPT_MS)?;
    }
    background_thread::write(true)
}

fn run(cli: Cli) -> Result<(), Failure> {
    logging::init()?;
    if let Err(error) = give_memory_back() {
        tracing::warn!(%error, "the allocator keeps what is free");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(cli.run());
    // A blocking call that is still waiting, such as a question to brokers that do not answer, must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}
