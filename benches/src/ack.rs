//! How many publishes the server answers a second, and after how long.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;

use crate::publisher::{Frame, Publisher};
use crate::report::{Figure, micros, millis};
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const WARM_UP: Duration = Duration::from_secs(1);
/// For the answers that are still missing when the time is over.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, clap::Args)]
pub struct AckArgs {
    /// Clients, each with a connection, a user and a thread of its own.
    #[arg(long, default_value_t = 1)]
    pub clients: usize,
    /// Unanswered publishes of one client.
    #[arg(long, default_value_t = 1024)]
    pub window: usize,
    #[arg(long, default_value_t = 8)]
    pub seconds: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
    /// Give every publish an idempotency key.
    #[arg(long)]
    pub keys: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub struct OneArgs {
    #[arg(long, default_value_t = 1)]
    pub clients: usize,
    #[arg(long, default_value_t = 8)]
    pub seconds: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for AckArgs {
    fn default() -> AckArgs {
        AckArgs { clients: 1, window: 1024, seconds: 8, payload: 256, keys: false }
    }
}

impl Default for OneArgs {
    fn default() -> OneArgs {
        OneArgs { clients: 1, seconds: 8, payload: 256 }
    }
}

impl From<OneArgs> for AckArgs {
    fn from(args: OneArgs) -> AckArgs {
        AckArgs { clients: args.clients, window: 1, seconds: args.seconds, payload: args.payload, keys: false }
    }
}

pub async fn run(target: &Target, args: &AckArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("ack {}x{}{}", args.clients, args.window, if args.keys { " keys" } else { "" });
    progress(&name);
    raise_open_files(args.clients + 100)?;
    let publishers = target.many(args.clients, async |number| publisher(target, args, &name, number).await).await?;

    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(args.seconds);
    let mut clients = JoinSet::new();
    for publisher in publishers {
        clients.spawn_local(client(publisher, from, until));
    }
    let latency = tokio::time::timeout(until + GRACE - Instant::now(), gather(clients)).await??;

    let seconds = args.seconds as f64;
    Ok(vec![
        Figure::more(&name, latency.len() as f64 / seconds, "acks/s"),
        Figure::less(&format!("{name} P50"), millis(latency.value_at_quantile(0.5)), "ms"),
        Figure::less(&format!("{name} P99"), millis(latency.value_at_quantile(0.99)), "ms"),
    ])
}

async fn publisher(target: &Target, args: &AckArgs, name: &str, number: usize) -> Result<Publisher, Failure> {
    let what = name.replace(' ', "-");
    let frame = Frame::publish(&target.name(&what, number), args.payload, args.keys);
    Publisher::open(target, &target.name(&what, number), frame, args.window).await
}

/// Publishes until `until`; gives the latencies of what was answered between `from` and `until`.
async fn client(mut publisher: Publisher, from: Instant, until: Instant) -> Result<Histogram<u64>, Failure> {
    let mut latency = micros()?;
    let more = |_| Instant::now() < until;
    let each = |sent: Instant, answered: Instant| {
        if (from..until).contains(&answered) {
            latency.saturating_record((answered - sent).as_micros() as u64);
        }
    };
    publisher.run(more, each).await?;
    Ok(latency)
}

async fn gather(mut clients: JoinSet<Result<Histogram<u64>, Failure>>) -> Result<Histogram<u64>, Failure> {
    let mut all = micros()?;
    while let Some(done) = clients.join_next().await {
        all.add(done??)?;
    }
    Ok(all)
}
