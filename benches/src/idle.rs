//! How much memory a silent connection costs the server: authenticated, and subscribed to a thread.

use crate::publisher::{Frame, Publisher};
use crate::report::Figure;
use crate::socket::Socket;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const MEMORY: &str = "process_resident_memory_bytes";

#[derive(Debug, Clone, clap::Args)]
pub struct IdleArgs {
    /// Connections, each of a user of its own with a thread of its own.
    #[arg(long, default_value_t = 5000)]
    pub connections: usize,
}

impl Default for IdleArgs {
    fn default() -> IdleArgs {
        IdleArgs { connections: 5000 }
    }
}

pub async fn run(target: &Target, args: &IdleArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("memory per connection, {} idle", args.connections);
    progress(&name);
    raise_open_files(args.connections + 100)?;
    // The threads are made by connections that end again, so that only those that stay open are counted.
    target.many(args.connections, async |number| make_thread(target, number).await).await?;
    let before = target.metric(MEMORY).await?;
    let sockets = target.many(args.connections, async |number| subscribed(target, number).await).await?;
    let after = target.metric(MEMORY).await?;
    let bytes = (after - before) / sockets.len() as f64;
    Ok(vec![Figure::less(&name, bytes / 1000.0, "KB")])
}

async fn make_thread(target: &Target, number: usize) -> Result<(), Failure> {
    let user = target.name("idle", number);
    let frame = Frame::publish(&user, 256, false);
    Publisher::open(target, &user, frame, 1).await?.run(|sent| sent < 1, |_, _| ()).await
}

async fn subscribed(target: &Target, number: usize) -> Result<Socket, Failure> {
    let user = target.name("idle", number);
    Ok(target.socket(&user).await?.subscribed(&user).await?.0)
}
