//! The same work each time, in lock step, for whoever counts what a message costs the server: a fixed number of publishes in
//! one write, and the next only once all are answered and all readers have them. So what waits for what, and how much is
//! dealt with at once, does not depend on how fast the machine is.

use std::time::{Duration, Instant};

use crate::publisher::{Frame, Publisher};
use crate::reply::Reply;
use crate::report::Figure;
use crate::socket::Socket;
use crate::target::{Target, progress};
use weft::cli::common::Failure;

/// For all of it: a server in which instructions are counted takes fifty times as long.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, clap::Args)]
pub struct RoundsArgs {
    #[arg(long, default_value_t = 100)]
    pub rounds: u64,
    /// Publishes of a round. A session reads up to 128 frames at once and appends them as one batch.
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Readers of the thread.
    #[arg(long, default_value_t = 4)]
    pub readers: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

pub async fn run(target: &Target, args: &RoundsArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("{} rounds of {} to {} readers", args.rounds, args.batch, args.readers);
    progress(&name);
    // Names of the same length in each run, since their bytes are copied as well.
    let (thread, owner) = (target.name("rounds", 0), target.name("rounds-owner", 0));
    let users: Vec<_> = (0..args.readers).map(|number| target.name("rounds-reader", number)).collect();
    target.thread(&thread, &owner, &users).await?;
    let mut readers = Vec::new();
    for user in &users {
        readers.push(target.socket(user).await?.subscribed(&thread).await?);
    }
    let frame = Frame::publish(&thread, args.payload, false);
    let mut publisher = Publisher::open(target, &owner, frame, args.batch).await?;

    let begin = Instant::now();
    let all = async {
        for round in 1..=args.rounds {
            let until = round * args.batch as u64;
            publisher.run(|sent| sent < until, |_, _| ()).await?;
            let head = publisher.last_seq()?;
            for (socket, last) in &mut readers {
                read_up_to(socket, last, head).await?;
            }
        }
        Ok::<_, Failure>(())
    };
    tokio::time::timeout(PATIENCE, all).await??;
    let messages = args.rounds as f64 * args.batch as f64;
    Ok(vec![Figure::more(&name, messages / begin.elapsed().as_secs_f64(), "acks/s")])
}

async fn read_up_to(socket: &mut Socket, last: &mut u64, head: u64) -> Result<(), Failure> {
    let mut seen = *last;
    while seen < head {
        socket
            .exchange(|reply| match reply {
                Reply::Event { seq, .. } if seq == seen + 1 => {
                    seen = seq;
                    Ok(())
                }
                other => Err(format!("after seq {seen} came {other:?}").into()),
            })
            .await?;
    }
    *last = seen;
    Ok(())
}
