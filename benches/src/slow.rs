//! What slow readers cost: the latency of the others who read the same thread, and the server's memory.
//!
//! Times in which all read at full speed and times in which some read next to nothing follow each other, and each of the
//! latter is held against the two around it: what the machine does otherwise is in those as well.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval};

use crate::pace::{Plan, talk};
use crate::publisher::{Frame, number_in, number_of};
use crate::reply::Reply;
use crate::report::{Figure, median, micros, millis};
use crate::socket::{Reader, Socket};
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;
use weft::delivery::outbox::EVENT_BYTES;
use weft::delivery::subscriptions::{CHUNK_BYTES, READS};
use weft::edge::ws::upgrade::WRITE_BUFFER;

const MEMORY: &str = "process_resident_memory_bytes";
const OUTBOX: &str = "weft_outbox_bytes";
/// How often the server is asked for the two.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Reads a second of a slow reader.
const SIPS: usize = 4;
/// What the server may hold for a session that is behind: its outbox, its reads of the store, and what its WebSocket has
/// encoded.
const HELD_BYTES: usize = EVENT_BYTES + READS * CHUNK_BYTES + WRITE_BUFFER;
/// Of slow reading. A ping would come behind all that waits for a slow reader, so each says something before it begins, and
/// is not asked for 25 s.
const LONGEST_SECONDS: u64 = 20;

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, clap::Args)]
pub struct SlowArgs {
    /// Readers of one thread, the slow ones among them.
    #[arg(long, default_value_t = 100)]
    pub readers: usize,
    #[arg(long, default_value_t = 10)]
    pub slow: usize,
    /// Bytes a second that a slow reader reads.
    #[arg(long, default_value_t = 1024)]
    pub bytes: usize,
    /// Publishes a second.
    #[arg(long, default_value_t = 500)]
    pub rate: usize,
    /// Of one measurement.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Measurements with slow readers.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for SlowArgs {
    fn default() -> SlowArgs {
        SlowArgs { readers: 100, slow: 10, bytes: 1024, rate: 500, seconds: 5, rounds: 3, payload: 256 }
    }
}

/// The thread, its publisher and its readers; they stay connected throughout.
struct Room {
    /// The newest seq.
    head: u64,
    answers: Reader,
    mouth: Vec<(OwnedWriteHalf, Frame)>,
    others: Vec<Socket>,
    slow: Vec<Socket>,
}

/// One measurement.
struct Phase {
    delivered: Histogram<u64>,
    /// The server's memory and what waits in its outboxes, at each look.
    looks: Vec<[f64; 2]>,
    /// How often the slow readers fell behind, and how long they took to be level again.
    lagged: u64,
    level_after: Duration,
}

pub async fn run(target: &Target, args: &SlowArgs) -> Result<Vec<Figure>, Failure> {
    progress(&format!("{} readers, {} of them slow", args.readers, args.slow));
    if args.slow == 0 || args.slow >= args.readers || args.bytes < SIPS || args.rate == 0 || args.rounds == 0 {
        return Err(format!("there must be slow readers (of at least {SIPS} bytes a second) and others").into());
    }
    if args.seconds == 0 || args.seconds > LONGEST_SECONDS {
        return Err(format!("a measurement has 1 to {LONGEST_SECONDS} seconds").into());
    }
    raise_open_files(args.readers + 100)?;
    let mut room = Room::open(target, args).await?;
    let mut all_read = vec![room.phase(target, args, false).await?];
    let mut some_slow = Vec::new();
    for _ in 0..args.rounds {
        some_slow.push(room.phase(target, args, true).await?);
        all_read.push(room.phase(target, args, false).await?);
    }
    Ok(figures(args, &all_read, &some_slow))
}

fn figures(args: &SlowArgs, all_read: &[Phase], some_slow: &[Phase]) -> Vec<Figure> {
    let (slow, others) = (args.slow, args.readers - args.slow);
    let of = |phases: &[Phase], what: &dyn Fn(&Phase) -> f64| median(phases.iter().map(what));
    // Each measurement with slow readers beside what it would have been without: the mean of its neighbours.
    let beside = |what: &dyn Fn(&Phase) -> f64| -> Vec<(f64, f64)> {
        let without = all_read.windows(2).map(|two| (what(&two[0]) + what(&two[1])) / 2.0);
        some_slow.iter().map(what).zip(without).collect()
    };
    let mut figures = Vec::new();
    for (name, quantile) in [("P50", 0.5), ("P99", 0.99)] {
        let at = |phase: &Phase| millis(phase.delivered.value_at_quantile(quantile));
        let ratio = median(beside(&at).into_iter().map(|(with, without)| with / without));
        figures.extend([
            Figure::less(&format!("delivered {name} to {others} readers"), of(all_read, &at), "ms"),
            Figure::less(&format!("delivered {name} to {others} beside {slow} slow"), of(some_slow, &at), "ms"),
            Figure::less(&format!("{name} beside {slow} slow / without"), ratio, "times").at_most(1.5),
        ]);
    }
    let memory = |phase: &Phase| median(phase.looks.iter().map(|[memory, _]| *memory));
    let more = of(some_slow, &|phase| growth(&phase.looks));
    let most = |phases: &[Phase]| phases.iter().map(|phase| outbox_peak(&phase.looks)).fold(0.0, f64::max);
    let bound = slow as f64 * EVENT_BYTES as f64 + most(all_read);
    let lagged: u64 = some_slow.iter().map(|phase| phase.lagged).sum();
    figures.extend([
        Figure::less(&format!("memory, {} readers", args.readers), of(all_read, &memory) / 1e6, "MB"),
        Figure::less(&format!("memory for {slow} slow"), more.max(0.0) / 1e6, "MB")
            .at_most(slow as f64 * HELD_BYTES as f64 / 1e6),
        Figure::less(&format!("weft_outbox_bytes, {slow} slow"), most(some_slow) / 1e6, "MB").at_most(bound / 1e6),
        Figure::less(&format!("{slow} slow: fell behind"), lagged as f64, "times"),
        Figure::less(
            &format!("{slow} slow: level again after"),
            of(some_slow, &|phase| phase.level_after.as_secs_f64()),
            "s",
        ),
    ]);
    figures
}

impl Room {
    async fn open(target: &Target, args: &SlowArgs) -> Result<Room, Failure> {
        let (thread, owner) = (target.name("slow", 0), target.name("slow-owner", 0));
        let users: Vec<_> = (0..args.readers).map(|number| target.name("slow-reader", number)).collect();
        target.thread(&thread, &owner, &users).await?;
        let enter = async |number: usize| {
            let socket = match number < args.slow {
                true => target.narrow_socket(&users[number]).await?,
                false => target.socket(&users[number]).await?,
            };
            socket.subscribed(&thread).await
        };
        let (mut slow, heads): (Vec<_>, Vec<_>) = target.many(args.readers, enter).await?.into_iter().unzip();
        let others = slow.split_off(args.slow);
        let publisher = target.socket(&owner).await?;
        let mouth = vec![(publisher.writer, Frame::publish(&thread, args.payload, false))];
        Ok(Room { head: heads[0], answers: publisher.reader, mouth, others, slow })
    }

    /// Publishes as planned, and ends when everyone has everything.
    async fn phase(&mut self, target: &Target, args: &SlowArgs, sipping: bool) -> Result<Phase, Failure> {
        let plan = Plan::new(args.rate, 1, args.seconds);
        let full_speed = Rc::new(Cell::new(!sipping));
        let (mut others, mut slow) = (JoinSet::new(), JoinSet::new());
        for socket in self.others.drain(..) {
            others.spawn_local(listen(socket, self.head, plan));
        }
        let head = self.head + plan.total;
        for socket in self.slow.drain(..) {
            slow.spawn_local(sip(socket, self.head, head, args.bytes / SIPS, full_speed.clone()));
        }
        let mut mouth = std::mem::take(&mut self.mouth);
        let talker = spawn_blocking(move || (talk(&mut mouth, plan), mouth));

        let mut phase = Phase { delivered: micros()?, looks: Vec::new(), lagged: 0, level_after: Duration::ZERO };
        let heard = async {
            answered(&mut self.answers, self.head, plan).await?;
            while let Some(done) = others.join_next().await {
                let (socket, delivered) = done??;
                phase.delivered.add(delivered)?;
                self.others.push(socket);
            }
            Ok::<_, Failure>(())
        };
        let looked = look(target, &mut phase.looks);
        let measured = async {
            tokio::select! {
                result = heard => result,
                error = looked => Err(error),
            }
        };
        tokio::time::timeout(plan.patience(), measured).await??;
        let (late, mouth) = talker.await?;
        late?;
        self.mouth = mouth;

        full_speed.set(true);
        let begin = Instant::now();
        while let Some(done) = tokio::time::timeout(PATIENCE, slow.join_next()).await? {
            let (socket, lagged) = done??;
            if sipping && lagged == 0 {
                return Err("a slow reader did not fall behind: publish for longer, more, or larger events".into());
            }
            phase.lagged += lagged;
            self.slow.push(socket);
        }
        phase.level_after = begin.elapsed();
        self.head = head;
        Ok(phase)
    }
}

/// Ends only with an error.
async fn look(target: &Target, looks: &mut Vec<[f64; 2]>) -> Failure {
    loop {
        match target.metrics([MEMORY, OUTBOX]).await {
            Ok(now) => looks.push(now),
            Err(error) => return error,
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// How much the server's memory grew while its outboxes filled. Over a whole measurement it would tell of the store, whose
/// own work takes 35 MB now and then and gives them back.
fn growth(looks: &[[f64; 2]]) -> f64 {
    let peak = outbox_peak(looks);
    let full = looks.iter().position(|[_, outbox]| *outbox >= 0.9 * peak).unwrap_or_default();
    let empty = looks[..full].iter().rposition(|[_, outbox]| *outbox <= 0.1 * peak).unwrap_or_default();
    match (looks.get(empty), looks.get(full)) {
        (Some([before, _]), Some([after, _])) => after - before,
        _ => 0.0,
    }
}

fn outbox_peak(looks: &[[f64; 2]]) -> f64 {
    looks.iter().map(|[_, outbox]| *outbox).fold(0.0, f64::max)
}

/// Reads the answers to all publishes: each once, in order.
async fn answered(reader: &mut Reader, after: u64, plan: Plan) -> Result<(), Failure> {
    let mut next = 0;
    while next < plan.total {
        reader
            .read(|reply| match reply {
                Reply::Published { id, seq } if number_of(id)? == next && seq == after + 1 + next => {
                    next += 1;
                    Ok(())
                }
                other => Err(format!("publish {next} was answered with {other:?}").into()),
            })
            .await?;
    }
    Ok(())
}

/// Reads all events behind `after` as they come.
async fn listen(mut socket: Socket, after: u64, plan: Plan) -> Result<(Socket, Histogram<u64>), Failure> {
    let mut delivered = micros()?;
    socket.queue_pong();
    let mut next = 0;
    while next < plan.total {
        socket
            .exchange(|reply| match reply {
                Reply::Event { seq, raw } if seq == after + 1 + next && number_in(raw) == Some(next) => {
                    plan.record(&mut delivered, next);
                    next += 1;
                    Ok(())
                }
                other => in_between(&other).map(drop),
            })
            .await?;
    }
    Ok((socket, delivered))
}

/// Reads so many bytes at a time until it may read at full speed, and then all that it has missed, up to `head`. Tells how
/// often it fell behind.
async fn sip(
    mut socket: Socket,
    after: u64,
    head: u64,
    bytes: usize,
    full_speed: Rc<Cell<bool>>,
) -> Result<(Socket, u64), Failure> {
    let mut ticks = interval(Duration::from_secs(1) / SIPS as u32);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    socket.queue_pong();
    let (mut last, mut lagged) = (after, 0);
    while last < head {
        if !full_speed.get() {
            ticks.tick().await;
        }
        socket.reader.read_at_most((!full_speed.get()).then_some(bytes));
        socket
            .exchange(|reply| match reply {
                Reply::Event { seq, .. } if seq == last + 1 => {
                    last = seq;
                    Ok(())
                }
                other => in_between(&other).map(|behind| lagged += u64::from(behind)),
            })
            .await?;
    }
    Ok((socket, lagged))
}

/// Whether the frame tells that its reader fell behind; only that, and having caught up again, may come between events.
fn in_between(reply: &Reply) -> Result<bool, Failure> {
    match reply {
        Reply::Lagged => Ok(true),
        Reply::CaughtUp { .. } => Ok(false),
        other => Err(format!("in place of the next event came {other:?}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_while_the_outboxes_fill_and_not_when_the_store_takes_some() {
        let looks = [[50.0, 0.0], [90.0, 0.0], [91.0, 1.0], [92.0, 12.0], [93.0, 19.0], [130.0, 20.0], [94.0, 19.0]];
        assert_eq!((growth(&looks), outbox_peak(&looks)), (2.0, 20.0));
        assert_eq!((growth(&[]), growth(&looks[..2])), (0.0, 0.0));
    }
}
