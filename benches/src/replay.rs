//! How fast a thread's history reaches a reader that begins at its start.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;

use crate::publisher::{Frame, Publisher};
use crate::reply::Reply;
use crate::report::Figure;
use crate::socket::Socket;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const FILL_WINDOW: usize = 1024;
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug, Clone, clap::Args)]
pub struct ReplayArgs {
    /// Events in the thread.
    #[arg(long, default_value_t = 500_000)]
    pub events: u64,
    /// Readers that replay it at the same time, each a user of its own.
    #[arg(long, default_value_t = 1)]
    pub readers: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for ReplayArgs {
    fn default() -> ReplayArgs {
        ReplayArgs { events: 500_000, readers: 1, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &ReplayArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("replay to {} reader{}", args.readers, if args.readers == 1 { "" } else { "s" });
    progress(&format!("filling a thread with {} events", args.events));
    raise_open_files(args.readers + 100)?;
    let (thread, owner) = (target.name("replay", args.readers), target.name("replay-owner", args.readers));
    let users: Vec<_> = (0..args.readers).map(|number| target.name("replay-reader", number)).collect();
    target.thread(&thread, &owner, &users).await?;
    let frame = Frame::publish(&thread, args.payload, false);
    let mut publisher = Publisher::open(target, &owner, frame, FILL_WINDOW).await?;
    tokio::time::timeout(PATIENCE, publisher.run(|sent| sent < args.events, |_, _| ())).await??;
    let head = publisher.last_seq()?;

    progress(&name);
    let mut sockets = target.many(args.readers, async |number| target.socket(&users[number]).await).await?;
    let begin = Instant::now();
    let readers = try_join_all(sockets.iter_mut().map(|socket| replay(socket, &thread, head)));
    tokio::time::timeout(PATIENCE, readers).await??;
    let events = head as f64 * args.readers as f64;
    Ok(vec![Figure::more(&name, events / begin.elapsed().as_secs_f64(), "events/s")])
}

async fn replay(socket: &mut Socket, thread: &str, head: u64) -> Result<(), Failure> {
    socket.queue_text(&format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}","after":0}}"#));
    let (mut last, mut done) = (0, false);
    while !done {
        socket
            .exchange(|reply| {
                match reply {
                    Reply::Subscribed { .. } => {}
                    Reply::Event { seq, .. } if seq == last + 1 => last = seq,
                    Reply::CaughtUp { seq } if seq == last && last >= head => done = true,
                    other => return Err(format!("after seq {last} of {head} came {other:?}").into()),
                }
                Ok(())
            })
            .await?;
    }
    Ok(())
}
