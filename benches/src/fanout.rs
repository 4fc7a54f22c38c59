//! How many deliveries a second the readers of one thread get, and how long after its publish each comes.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;

use crate::publisher::{Frame, Publisher};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::Socket;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug, Clone, clap::Args)]
pub struct FanoutArgs {
    #[arg(long, default_value_t = 1000)]
    pub readers: usize,
    /// Events to publish.
    #[arg(long, default_value_t = 3000)]
    pub events: u64,
    /// Unanswered publishes.
    #[arg(long, default_value_t = 64)]
    pub window: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for FanoutArgs {
    fn default() -> FanoutArgs {
        FanoutArgs { readers: 1000, events: 3000, window: 64, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &FanoutArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("fanout to {} readers", args.readers);
    progress(&name);
    raise_open_files(args.readers + 100)?;
    let (thread, owner) = (target.name("fanout", args.readers), target.name("fanout-owner", args.readers));
    let users: Vec<_> = (0..args.readers).map(|number| target.name("fanout-reader", number)).collect();
    target.thread(&thread, &owner, &users).await?;
    let sockets = target
        .many(args.readers, async |number| target.socket(&users[number]).await?.subscribed(&thread).await)
        .await?;
    let frame = Frame::publish(&thread, args.payload, false);
    let mut publisher = Publisher::open(target, &owner, frame, args.window).await?;

    let begin = Instant::now();
    let times = Rc::new(RefCell::new(Times { sent: Vec::new(), delivered: micros()? }));
    let mut readers = JoinSet::new();
    for (socket, after) in sockets {
        readers.spawn_local(read(socket, after, args.events, times.clone()));
    }
    let all = async {
        let more = |sent| {
            times.borrow_mut().sent.push(Instant::now());
            sent < args.events
        };
        publisher.run(more, |_, _| ()).await?;
        let mut lagged = 0;
        while let Some(done) = readers.join_next().await {
            lagged += done??;
        }
        Ok::<_, Failure>(lagged)
    };
    let lagged = tokio::time::timeout(PATIENCE, all).await??;
    let delivered = &times.borrow().delivered;
    let at = |quantile| millis(delivered.value_at_quantile(quantile));
    let deliveries = args.events as f64 * args.readers as f64;
    Ok(vec![
        Figure::more(&name, deliveries / begin.elapsed().as_secs_f64(), "deliveries/s"),
        Figure::less(&format!("{name} P50"), at(0.5), "ms"),
        Figure::less(&format!("{name} P99"), at(0.99), "ms"),
        Figure::less(&format!("{name}: P99 to P50"), at(0.99) / at(0.5), "times"),
        Figure::less(&format!("{name}: lagged"), lagged as f64, "times"),
    ])
}

struct Times {
    /// When each event was published, in order.
    sent: Vec<Instant>,
    /// From then to each delivery, in microseconds.
    delivered: Histogram<u64>,
}

impl Times {
    fn record(&mut self, number: u64) -> Result<(), Failure> {
        let sent = self.sent.get(number as usize).ok_or("an event came that was not published")?;
        self.delivered.record(sent.elapsed().as_micros() as u64)?;
        Ok(())
    }
}

/// Reads `events` events after `after`, without a gap; gives how often the session lagged.
async fn read(mut socket: Socket, after: u64, events: u64, times: Rc<RefCell<Times>>) -> Result<u64, Failure> {
    let (mut last, mut lagged) = (after, 0);
    while last < after + events {
        socket
            .exchange(|reply| {
                match reply {
                    Reply::Event { seq, .. } if seq == last + 1 => {
                        last = seq;
                        times.borrow_mut().record(seq - after - 1)?;
                    }
                    Reply::Lagged => lagged += 1,
                    // Once more after each `lagged`.
                    Reply::CaughtUp { .. } => {}
                    other => return Err(format!("after seq {last} came {other:?}").into()),
                }
                Ok(())
            })
            .await?;
    }
    Ok(lagged)
}
