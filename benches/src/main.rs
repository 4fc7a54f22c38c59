//! `weft-bench`: what the server does for real clients over real sockets, from a process of its own.
//!
//! All the load comes from one thread, since it shares its cores with the server. Every bench checks what it counts: each
//! publish is answered once, each reader sees each seq once and in order. An error frame, a close or a missing event fails
//! the bench.

mod ack;
mod agents;
mod bare;
mod crowd;
mod crowded;
mod export;
mod fanout;
mod fill;
mod grow;
mod idle;
mod latency;
mod pace;
mod peers;
mod publisher;
mod queue;
mod rebuild;
mod reconnect;
mod replay;
mod reply;
mod report;
mod rounds;
mod search;
mod slow;
mod socket;
mod target;
mod tokens;

use std::future::Future;
use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::Builder;
use tokio::task::LocalSet;

use report::{LogKind, Report};
use target::{Target, TargetArgs};
use weft::cli::common::{Failure, Output};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measures a Weft server, and what the log and the store can do bare.
#[derive(Debug, clap::Parser)]
#[command(name = "weft-bench", version, max_term_width = 120)]
struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
    /// The server's log, which decides the limits that the figures are compared with.
    #[arg(long, global = true, env = "WEFT_LOG", value_enum, default_value = "embedded")]
    log: LogKind,
    /// Print one JSON object.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// Publishes answered a second, with a window of unanswered ones.
    Ack(#[command(flatten)] With<ack::AckArgs>),
    /// As ack, each client waiting for the answer before it sends the next.
    OneAtATime(#[command(flatten)] With<ack::OneArgs>),
    /// From the moment a publish was due until its answer, and until its delivery at the other user.
    Latency(#[command(flatten)] With<latency::LatencyArgs>),
    /// The mean latency of many users compared with that of one, who publishes at the rate of each of them, or of all.
    Crowd(#[command(flatten)] With<crowd::CrowdArgs>),
    /// What a thread with very many readers costs a user of another tenant, who publishes one at a time.
    Crowded(#[command(flatten)] With<crowded::CrowdedArgs>),
    /// Deliveries a second to many readers of one thread.
    Fanout(#[command(flatten)] With<fanout::FanoutArgs>),
    /// Events and bytes a second of an export, beside the same bytes from a file, and what it costs the server in memory.
    Export(#[command(flatten)] With<export::ExportArgs>),
    /// The server's memory for a connection that is subscribed and silent.
    Idle(#[command(flatten)] With<idle::IdleArgs>),
    /// Events a second into the index of search, and how long searches take, beside tantivy bare with the same texts.
    Search(#[command(flatten)] With<search::SearchArgs>),
    /// Events a second from the store, from a thread's start until caught up.
    Replay(#[command(flatten)] With<replay::ReplayArgs>),
    /// From the moment at which all clients come back at once until each has what it missed.
    Reconnect(#[command(flatten)] With<reconnect::ReconnectArgs>),
    /// What readers of 1 KB/s cost the other readers of their thread, and the server.
    Slow(#[command(flatten)] With<slow::SlowArgs>),
    /// Work of a group: how much its workers settle a second, and how long an event waits for one.
    Queue(#[command(flatten)] With<queue::QueueArgs>),
    /// Many agents that write messages in deltas: how late readers have them, and how many records they become.
    Agents(#[command(flatten)] With<agents::AgentsArgs>),
    /// The same work each time, in lock step, for whoever counts what a message costs the server.
    Rounds(#[command(flatten)] With<rounds::RoundsArgs>),
    /// Events a second from the log into new projections; the server must not run.
    Rebuild(rebuild::RebuildArgs),
    /// What the log and the store can do bare, without a server.
    Bare(bare::BareArgs),
    /// What it takes to verify a token, without a server.
    Tokens(tokens::TokensArgs),
    /// What a publish, a subscribe, a page and a start cost servers that hold more and more; starts them itself.
    Grow(grow::GrowArgs),
    /// Everything that asks a server.
    All(TargetArgs),
    /// Another server, or Weft, under the load that all of them get.
    Peers(peers::PeersArgs),
    /// One table of several --json outputs, with each figure's ratio to what is possible bare.
    Report(report::ReportArgs),
}

/// A bench's own arguments and those of the server it asks.
#[derive(Debug, clap::Args)]
struct With<T: clap::Args> {
    #[command(flatten)]
    args: T,
    #[command(flatten)]
    target: TargetArgs,
}

fn main() -> ExitCode {
    let runtime = match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("weft-bench: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(BenchArgs::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: BenchArgs) -> Result<(), Failure> {
    let BenchArgs { bench, log, json } = args;
    if let Bench::Report(files) = bench {
        return report::combine(&files);
    }
    if let Bench::Grow(args) = bench {
        let rows = on_one_thread(move || async move { grow::run(&args).await }).await?;
        let report = || Report { log: LogKind::Embedded, figures: grow::figures(&rows), failures: Vec::new() };
        return Output::new().line(if json { report().json()? } else { grow::table(&rows) }).map(drop);
    }
    let report = on_one_thread(move || measure(bench, log)).await?;
    Output::new().line(if json { report.json()? } else { report.table(&[]) })?;
    match report.failures.as_slice() {
        [] => Ok(()),
        failures => Err(failures.join("; ").into()),
    }
}

async fn on_one_thread<T, F>(bench: impl FnOnce() -> F + Send + 'static) -> Result<T, Failure>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>>,
{
    let thread = tokio::task::spawn_blocking(move || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, bench())
    });
    thread.await?
}

async fn measure(bench: Bench, log: LogKind) -> Result<Report, Failure> {
    let figures = match bench {
        Bench::All(target) => return all(&Target::new(&target)?, log).await,
        Bench::Ack(with) => ack::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::OneAtATime(with) => ack::run(&Target::new(&with.target)?, &with.args.into()).await?,
        Bench::Latency(with) => latency::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Crowd(with) => crowd::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Crowded(with) => crowded::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Fanout(with) => fanout::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Export(with) => export::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Search(with) => search::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Idle(with) => idle::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Replay(with) => replay::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Reconnect(with) => reconnect::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Slow(with) => slow::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Queue(with) => queue::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Agents(with) => agents::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Rounds(with) => rounds::run(&Target::new(&with.target)?, &with.args).await?,
        Bench::Rebuild(args) => rebuild::run(&args, log)?,
        Bench::Bare(args) => bare::run(&args, log).await?,
        Bench::Tokens(args) => tokens::run(&args)?,
        Bench::Peers(args) => peers::run(&args).await?,
        Bench::Grow(_) | Bench::Report(_) => return Err("this one asks no server that is given".into()),
    };
    Ok(Report { log, figures, failures: Vec::new() })
}

/// A bench that fails does not keep the others from being measured. `idle` comes first, since a server does not give back
/// at once the memory that other benches make it use.
async fn all(target: &Target, log: LogKind) -> Result<Report, Failure> {
    let mut report = Report { log, figures: Vec::new(), failures: Vec::new() };
    report.add("idle", idle::run(target, &idle::IdleArgs::default()).await);
    let windows: &[(usize, usize)] = match log {
        LogKind::Embedded => &[(1, 1024), (32, 64), (1, 64)],
        LogKind::Kafka => &[(1, 4096), (32, 128)],
    };
    for &(clients, window) in windows {
        let args = ack::AckArgs { clients, window, ..ack::AckArgs::default() };
        report.add("ack", ack::run(target, &args).await);
    }
    report.add("one-at-a-time", ack::run(target, &ack::OneArgs::default().into()).await);
    for users in [30, 1000] {
        let args = latency::LatencyArgs { users, ..latency::LatencyArgs::default() };
        report.add("latency", latency::run(target, &args).await);
    }
    report.add("crowd", crowd::run(target, &crowd::CrowdArgs::default()).await);
    report.add("crowded", crowded::run(target, &crowded::CrowdedArgs::default()).await);
    report.add("fanout", fanout::run(target, &fanout::FanoutArgs::default()).await);
    report.add("slow", slow::run(target, &slow::SlowArgs::default()).await);
    report.add("reconnect", reconnect::run(target, &reconnect::ReconnectArgs::default()).await);
    report.add("agents", agents::run(target, &agents::AgentsArgs::default()).await);
    report.add("queue", queue::run(target, &queue::QueueArgs::default()).await);
    report.add("export", export::run(target, &export::ExportArgs::default()).await);
    report.add("replay", replay::run(target, &replay::ReplayArgs::default()).await);
    Ok(report)
}
