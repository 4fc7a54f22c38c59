//! What slow readers cost: the latency of the others who read the same thread, and the server's memory.
//!
//! Measurements in which all read at full speed alternate with measurements in which some hardly read. Each of the latter is
//! compared with the two around it, since what else the machine does changes from minute to minute.

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
const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// Reads a second of a slow reader.
const READS_PER_SECOND: usize = 4;
/// What the server may hold for a session that lags: its outbox, its reads of the store, and what its WebSocket has encoded.
const HELD_BYTES: usize = EVENT_BYTES + READS * CHUNK_BYTES + WRITE_BUFFER;
/// Of slow reading. A slow reader would answer a ping too late, since it comes after all events that wait. So each sends a
/// pong before it begins to read slowly, and gets no ping for 25 s.
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
struct SlowThread {
    /// The newest seq.
    head: u64,
    answers: Reader,
    writer: Vec<(OwnedWriteHalf, Frame)>,
    others: Vec<Socket>,
    slow: Vec<Socket>,
}

/// One measurement.
struct Phase {
    delivered: Histogram<u64>,
    /// Samples of the server's memory and of what waits in its outboxes.
    samples: Vec<[f64; 2]>,
    /// How often the slow readers lagged, and how long they took to catch up.
    lagged: u64,
    caught_up_after: Duration,
}

pub async fn run(target: &Target, args: &SlowArgs) -> Result<Vec<Figure>, Failure> {
    progress(&format!("{} readers, {} of them slow", args.readers, args.slow));
    if args.slow == 0
        || args.slow >= args.readers
        || args.bytes < READS_PER_SECOND
        || args.rate == 0
        || args.rounds == 0
    {
        return Err(format!(
            "--slow must be at least 1 and less than --readers, and --bytes at least {READS_PER_SECOND}"
        )
        .into());
    }
    if args.seconds == 0 || args.seconds > LONGEST_SECONDS {
        return Err(format!("--seconds must be 1 to {LONGEST_SECONDS}").into());
    }
    raise_open_files(args.readers + 100)?;
    let mut thread = SlowThread::open(target, args).await?;
    let mut all_read = vec![thread.phase(target, args, false).await?];
    let mut some_slow = Vec::new();
    for _ in 0..args.rounds {
        some_slow.push(thread.phase(target, args, true).await?);
        all_read.push(thread.phase(target, args, false).await?);
    }
    Ok(figures(args, &all_read, &some_slow))
}

fn figures(args: &SlowArgs, all_read: &[Phase], some_slow: &[Phase]) -> Vec<Figure> {
    let (slow, others) = (args.slow, args.readers - args.slow);
    // Each measurement with slow readers beside the mean of its two neighbours without.
    let beside = |what: &dyn Fn(&Phase) -> f64| -> Vec<(f64, f64)> {
        let without = all_read.windows(2).map(|two| (what(&two[0]) + what(&two[1])) / 2.0);
        some_slow.iter().map(what).zip(without).collect()
    };
    let mut figures = Vec::new();
    for (name, quantile) in [("P50", 0.5), ("P99", 0.99)] {
        let at = |phase: &Phase| millis(phase.delivered.value_at_quantile(quantile));
        let ratio = median(beside(&at).into_iter().map(|(with, without)| with / without));
        figures.extend([
            Figure::less(&format!("delivered {name} to {others} readers"), over(all_read, &at), "ms"),
            Figure::less(&format!("delivered {name} to {others} beside {slow} slow"), over(some_slow, &at), "ms"),
            Figure::less(&format!("{name} beside {slow} slow / without"), ratio, "times").at_most(1.5),
        ]);
    }
    figures.extend(memory_figures(args, all_read, some_slow));
    figures
}

/// The median over some measurements.
fn over(phases: &[Phase], what: &dyn Fn(&Phase) -> f64) -> f64 {
    median(phases.iter().map(what))
}

fn memory_figures(args: &SlowArgs, all_read: &[Phase], some_slow: &[Phase]) -> Vec<Figure> {
    let slow = args.slow;
    let memory = |phase: &Phase| median(phase.samples.iter().map(|[memory, _]| *memory));
    let more = over(some_slow, &|phase| growth(&phase.samples));
    let most = |phases: &[Phase]| phases.iter().map(|phase| outbox_peak(&phase.samples)).fold(0.0, f64::max);
    let bound = slow as f64 * EVENT_BYTES as f64 + most(all_read);
    let lagged: u64 = some_slow.iter().map(|phase| phase.lagged).sum();
    vec![
        Figure::less(&format!("memory, {} readers", args.readers), over(all_read, &memory) / 1e6, "MB"),
        Figure::less(&format!("memory for {slow} slow"), more.max(0.0) / 1e6, "MB")
            .at_most(slow as f64 * HELD_BYTES as f64 / 1e6),
        Figure::less(&format!("weft_outbox_bytes, {slow} slow"), most(some_slow) / 1e6, "MB").at_most(bound / 1e6),
        Figure::less(&format!("{slow} slow: lagged"), lagged as f64, "times"),
        Figure::less(
            &format!("{slow} slow: level again after"),
            over(some_slow, &|phase| phase.caught_up_after.as_secs_f64()),
            "s",
        ),
    ]
}

impl SlowThread {
    async fn open(target: &Target, args: &SlowArgs) -> Result<SlowThread, Failure> {
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
        let writer = vec![(publisher.writer, Frame::publish(&thread, args.payload, false))];
        Ok(SlowThread { head: heads[0], answers: publisher.reader, writer, others, slow })
    }

    /// Publishes as planned, and ends when all readers have all events.
    async fn phase(&mut self, target: &Target, args: &SlowArgs, with_slow: bool) -> Result<Phase, Failure> {
        let plan = Plan::new(args.rate, 1, args.seconds);
        let full_speed = Rc::new(Cell::new(!with_slow));
        let (mut others, mut slow) = (JoinSet::new(), JoinSet::new());
        for socket in self.others.drain(..) {
            others.spawn_local(listen(socket, self.head, plan));
        }
        let head = self.head + plan.total;
        for socket in self.slow.drain(..) {
            slow.spawn_local(read_slowly(socket, self.head, head, args.bytes / READS_PER_SECOND, full_speed.clone()));
        }
        let mut writer = std::mem::take(&mut self.writer);
        let talker = spawn_blocking(move || (talk(&mut writer, plan), writer));

        let mut phase = Phase { delivered: micros()?, samples: Vec::new(), lagged: 0, caught_up_after: Duration::ZERO };
        let heard = async {
            answered(&mut self.answers, self.head, plan).await?;
            while let Some(done) = others.join_next().await {
                let (socket, delivered) = done??;
                phase.delivered.add(delivered)?;
                self.others.push(socket);
            }
            Ok::<_, Failure>(())
        };
        let sampled = sample(target, &mut phase.samples);
        let measured = async {
            tokio::select! {
                result = heard => result,
                error = sampled => Err(error),
            }
        };
        tokio::time::timeout(plan.patience(), measured).await??;
        let (late, writer) = talker.await?;
        late?;
        self.writer = writer;

        full_speed.set(true);
        self.let_catch_up(slow, with_slow, &mut phase).await?;
        self.head = head;
        Ok(phase)
    }

    /// Waits until the slow readers have read all that they have missed.
    async fn let_catch_up(
        &mut self,
        mut slow: JoinSet<Result<(Socket, u64), Failure>>,
        must_lag: bool,
        phase: &mut Phase,
    ) -> Result<(), Failure> {
        let begin = Instant::now();
        while let Some(done) = tokio::time::timeout(PATIENCE, slow.join_next()).await? {
            let (socket, lagged) = done??;
            if must_lag && lagged == 0 {
                return Err("a slow reader did not lag: publish for longer, more, or larger events".into());
            }
            phase.lagged += lagged;
            self.slow.push(socket);
        }
        phase.caught_up_after = begin.elapsed();
        Ok(())
    }
}

/// Ends only with an error.
async fn sample(target: &Target, samples: &mut Vec<[f64; 2]>) -> Failure {
    loop {
        match target.metrics([MEMORY, OUTBOX]).await {
            Ok(now) => samples.push(now),
            Err(error) => return error,
        }
        tokio::time::sleep(SAMPLE_EVERY).await;
    }
}

/// How much the server's memory grew while its outboxes filled. Over a whole measurement the store would count as well: its
/// own work uses 35 MB now and then, and frees them again.
fn growth(samples: &[[f64; 2]]) -> f64 {
    let peak = outbox_peak(samples);
    let full = samples.iter().position(|[_, outbox]| *outbox >= 0.9 * peak).unwrap_or_default();
    let empty = samples[..full].iter().rposition(|[_, outbox]| *outbox <= 0.1 * peak).unwrap_or_default();
    match (samples.get(empty), samples.get(full)) {
        (Some([before, _]), Some([after, _])) => after - before,
        _ => 0.0,
    }
}

fn outbox_peak(samples: &[[f64; 2]]) -> f64 {
    samples.iter().map(|[_, outbox]| *outbox).fold(0.0, f64::max)
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

/// Reads all events after `after` as they come.
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

/// Reads `bytes` bytes at a time until it may read at full speed, and then all that it has missed, up to `head`. Gives how
/// often it lagged.
async fn read_slowly(
    mut socket: Socket,
    after: u64,
    head: u64,
    bytes: usize,
    full_speed: Rc<Cell<bool>>,
) -> Result<(Socket, u64), Failure> {
    let mut ticks = interval(Duration::from_secs(1) / READS_PER_SECOND as u32);
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
                other => in_between(&other).map(|lags| lagged += u64::from(lags)),
            })
            .await?;
    }
    Ok((socket, lagged))
}

/// Whether the frame is a `lagged`. Only that and `caught_up` may come between events.
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
    fn memory_counts_while_the_outboxes_fill_and_not_when_the_store_uses_some() {
        let samples = [[50.0, 0.0], [90.0, 0.0], [91.0, 1.0], [92.0, 12.0], [93.0, 19.0], [130.0, 20.0], [94.0, 19.0]];
        assert_eq!((growth(&samples), outbox_peak(&samples)), (2.0, 20.0));
        assert_eq!((growth(&[]), growth(&samples[..2])), (0.0, 0.0));
    }
}
