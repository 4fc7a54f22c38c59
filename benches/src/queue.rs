//! Work of a group: how many events its workers are given and settle a second while much waits, and how long after its publish
//! an event is with a worker while little does.
//!
//! Each worker settles what it is given at once, with an `id`, and counts the answers: so what is counted is settled for good.
//! Of each thread the events must come in order and once.
//!
//! With `--work-ms` each worker does one thing at a time, which takes that long: what is measured then is how busy they are kept.
//! With `--waiting` it is measured how much more memory the server takes when that much waits than when 10,000 do, and then how
//! many events a second are settled of them.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::{JoinSet, spawn_blocking};

use crate::crowded::take_answers;
use crate::pace::{Plan, talk};
use crate::publisher::{Frame, Publisher, number_in};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::Socket;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const PATIENCE: Duration = Duration::from_secs(300);
/// Unanswered publishes of a thread while what waits is made.
const FILL_WINDOW: usize = 100;
/// What a worker may hold, and what it may where its work takes time: what it does, and what comes next.
const CREDIT: usize = 64;
const BUSY_CREDIT: usize = 4;
/// What waits where that is little.
const FEW: u64 = 10_000;
/// Threads that are published to at once where there are many.
const AT_ONCE: usize = 500;
/// After so long a server has given back what it does not need.
const REST: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, clap::Args)]
pub struct QueueArgs {
    /// Events that wait before the workers begin.
    #[arg(long, default_value_t = 100_000)]
    pub events: u64,
    /// Threads that they are in; of each, one is worked on at a time.
    #[arg(long, default_value_t = 1_000)]
    pub threads: usize,
    #[arg(long, default_value_t = 32)]
    pub workers: usize,
    /// Publishes a second while the wait for a worker is measured.
    #[arg(long, default_value_t = 1_000)]
    pub rate: usize,
    /// How long that is measured.
    #[arg(long, default_value_t = 8)]
    pub seconds: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
    /// How long a worker works on an event; one at a time.
    #[arg(long, default_value_t = 0)]
    pub work_ms: u64,
    /// Measures the server's memory while so many events wait, each thread's of a user of its own, and then how many of
    /// `--events` are settled a second.
    #[arg(long)]
    pub waiting: Option<u64>,
}

impl Default for QueueArgs {
    fn default() -> QueueArgs {
        let (rate, seconds, payload, work_ms, waiting) = (1_000, 8, 256, 0, None);
        QueueArgs { events: 100_000, threads: 1_000, workers: 32, rate, seconds, payload, work_ms, waiting }
    }
}

pub async fn run(target: &Target, args: &QueueArgs) -> Result<Vec<Figure>, Failure> {
    if args.threads == 0 || args.workers == 0 || args.rate == 0 || args.seconds == 0 {
        return Err("--threads, --workers, --rate and --seconds must be at least 1".into());
    }
    raise_open_files(args.workers + args.threads.min(AT_ONCE.max(1_000)) + 100)?;
    let group = target.name("group", args.workers);
    let work = Rc::new(Work::new(target, args)?);
    match args.waiting {
        Some(waiting) => much_waits(target, args, &work, &group, waiting).await,
        None => little_waits(target, args, &work, &group).await,
    }
}

/// Makes the group, whose work is what comes from now on.
async fn make(target: &Target, group: &str) -> Result<(), Failure> {
    consume(&mut worker(target, 0).await?, group, 0).await
}

async fn worker(target: &Target, number: usize) -> Result<Socket, Failure> {
    target.agent(&target.name("queue-worker", number)).await
}

/// They come when the work is there: a connection that nobody reads from ends.
async fn workers(target: &Target, args: &QueueArgs) -> Result<Vec<Socket>, Failure> {
    target.many(args.workers, async |number| worker(target, number).await).await
}

async fn little_waits(target: &Target, args: &QueueArgs, work: &Rc<Work>, group: &str) -> Result<Vec<Figure>, Failure> {
    let events = args.events;
    make(target, group).await?;
    progress(&format!("{events} events that wait for a group"));
    work.fill(target, args, 0..args.threads, events).await?;
    let (settled, workers) = work.settle(args, workers(target, args).await?, group, events).await?;
    let name = format!("work settled, {} workers", args.workers);
    if args.work_ms > 0 {
        let possible = args.workers as f64 * 1_000.0 / args.work_ms as f64;
        return Ok(vec![
            Figure::more(&format!("{name}, {} ms each", args.work_ms), settled, "events/s"),
            Figure::more("of what so many workers can do", settled / possible * 100.0, "%"),
        ]);
    }

    progress(&format!("{} events a second", args.rate));
    work.paced(target, args, workers).await?;
    let waited = work.waited.borrow();
    let at = |quantile| millis(waited.value_at_quantile(quantile));
    Ok(vec![
        Figure::more(&name, settled, "events/s"),
        Figure::less(&format!("publish to worker P50, {}/s", args.rate), at(0.5), "ms"),
        Figure::less(&format!("publish to worker P99, {}/s", args.rate), at(0.99), "ms"),
    ])
}

async fn much_waits(
    target: &Target,
    args: &QueueArgs,
    work: &Rc<Work>,
    group: &str,
    waiting: u64,
) -> Result<Vec<Figure>, Failure> {
    if waiting <= FEW || args.events > waiting {
        return Err(format!("--waiting must be more than {FEW}, and no less than --events").into());
    }
    // What a server takes that holds so much, and of which nothing waits.
    progress(&format!("{waiting} events that are no work"));
    work.fill(target, args, 0..args.threads, waiting).await?;
    make(target, group).await?;
    let mut memory = Vec::new();
    let few = (args.threads as u64 * FEW / waiting).max(1) as usize;
    for (threads, events) in [(0..few, FEW), (few..args.threads.max(few + 1), waiting - FEW)] {
        progress(&format!("{events} events that wait for a group"));
        work.fill(target, args, threads, events).await?;
        // Somebody waits for work, so that it is known what comes next.
        let mut worker = worker(target, 0).await?;
        consume(&mut worker, group, 1).await?;
        tokio::time::sleep(REST).await;
        memory.push(target.metric("process_resident_memory_bytes").await? / 1e6);
    }
    let (settled, _) = work.settle(args, workers(target, args).await?, group, args.events).await?;
    Ok(vec![
        Figure::less(&format!("memory, {FEW} waiting"), memory[0], "MB"),
        Figure::less(&format!("memory more, {waiting} waiting"), memory[1] - memory[0], "MB"),
        Figure::more(&format!("work settled, {waiting} waiting"), settled, "events/s"),
    ])
}

async fn consume(socket: &mut Socket, group: &str, credit: usize) -> Result<(), Failure> {
    socket.queue_text(&format!(r#"{{"type":"consume","id":1,"group":"{group}","credit":{credit}}}"#));
    socket.wait_for(|reply| matches!(reply, Reply::Consuming).then_some(())).await
}

/// What the workers have seen.
struct Work {
    threads: Vec<String>,
    /// Of each thread.
    owners: Vec<String>,
    /// The newest seq that was given of each thread.
    given: RefCell<HashMap<String, u64>>,
    settled: Cell<u64>,
    /// How long a worker works on an event.
    work_time: Duration,
    /// When each publish is due, once they are paced.
    plan: Cell<Option<Plan>>,
    waited: RefCell<Histogram<u64>>,
}

impl Work {
    fn new(target: &Target, args: &QueueArgs) -> Result<Work, Failure> {
        Ok(Work {
            threads: (0..args.threads).map(|number| target.name("queue", number)).collect(),
            owners: (0..args.threads).map(|number| target.name("queue-owner", number)).collect(),
            given: RefCell::default(),
            settled: Cell::new(0),
            work_time: Duration::from_millis(args.work_ms),
            plan: Cell::new(None),
            waited: RefCell::new(micros()?),
        })
    }

    /// Publishes what waits, evenly over the threads.
    async fn fill(
        &self,
        target: &Target,
        args: &QueueArgs,
        threads: std::ops::Range<usize>,
        events: u64,
    ) -> Result<(), Failure> {
        let (first, many) = (threads.start, threads.len() as u64);
        let fill = async |number: usize| {
            let frame = Frame::publish(&self.threads[number], args.payload, false);
            let count = (events + many - 1 - (number - first) as u64) / many;
            let mut publisher = Publisher::open(target, &self.owners[number], frame, FILL_WINDOW).await?;
            publisher.run(|sent| sent < count, |_, _| ()).await
        };
        let at_once = if many > 1_000 { AT_ONCE } else { threads.len() };
        for begin in threads.clone().step_by(at_once) {
            let many = at_once.min(threads.end - begin);
            let fill = target.many(many, async |number| fill(begin + number).await);
            tokio::time::timeout(PATIENCE, fill).await??;
        }
        Ok(())
    }

    /// Has so many events settled; gives how many a second, and the workers.
    async fn settle(
        self: &Rc<Work>,
        args: &QueueArgs,
        workers: Vec<Socket>,
        group: &str,
        events: u64,
    ) -> Result<(f64, Vec<Socket>), Failure> {
        progress(&format!("{} workers", args.workers));
        let begin = Instant::now();
        let workers = self.all_settled(workers, group, events).await?;
        Ok((events as f64 / begin.elapsed().as_secs_f64(), workers))
    }

    /// Returns once so many events more are settled.
    async fn all_settled(
        self: &Rc<Work>,
        workers: Vec<Socket>,
        group: &str,
        events: u64,
    ) -> Result<Vec<Socket>, Failure> {
        let until = self.settled.get() + events;
        let credit = if self.work_time.is_zero() { CREDIT } else { BUSY_CREDIT };
        let mut tasks = JoinSet::new();
        for mut worker in workers {
            let (work, group) = (self.clone(), group.to_owned());
            tasks.spawn_local(async move {
                // Its answer may come behind work.
                worker.queue_text(&format!(r#"{{"type":"consume","id":1,"group":"{group}","credit":{credit}}}"#));
                work.settle_until(&mut worker, until).await.map(|()| worker)
            });
        }
        let all = async {
            let mut workers = Vec::new();
            while let Some(done) = tasks.join_next().await {
                workers.push(done??);
            }
            Ok(workers)
        };
        tokio::time::timeout(PATIENCE, all).await?
    }

    async fn settle_until(&self, worker: &mut Socket, until: u64) -> Result<(), Failure> {
        let (mut given, mut busy_until) = (VecDeque::new(), tokio::time::Instant::now());
        while self.settled.get() < until {
            let mut settle = Vec::new();
            let exchange = worker.exchange(|reply| {
                match reply {
                    Reply::Consuming => {}
                    Reply::Settled => self.settled.set(self.settled.get() + 1),
                    Reply::Work { delivery, event } => {
                        self.check(event)?;
                        settle.push(format!(r#"{{"type":"settle","id":1,"delivery":"{delivery}","outcome":"done"}}"#));
                    }
                    other => return Err(format!("a worker got {other:?}").into()),
                }
                Ok(())
            });
            // Another may have settled the last of it.
            let patience = if given.is_empty() { Duration::from_millis(100) } else { Duration::ZERO };
            if let Ok(exchanged) = tokio::time::timeout(patience, exchange).await {
                exchanged?;
            }
            if self.work_time.is_zero() {
                settle.iter().for_each(|settle| worker.queue_text(settle));
                continue;
            }
            if given.is_empty() {
                busy_until = tokio::time::Instant::now();
            }
            given.extend(settle);
            if let Some(settle) = given.pop_front() {
                busy_until += self.work_time;
                tokio::time::sleep_until(busy_until).await;
                worker.queue_text(&settle);
            }
        }
        Ok(())
    }

    /// An event comes once, and after those before it in its thread.
    fn check(&self, event: &[u8]) -> Result<(), Failure> {
        let event_frame: EventHead = serde_json::from_slice(event)?;
        let mut given = self.given.borrow_mut();
        let last = given.entry(event_frame.thread.into_owned()).or_default();
        if event_frame.seq <= *last {
            return Err(format!("seq {} was given after seq {last}", event_frame.seq).into());
        }
        *last = event_frame.seq;
        if let Some(plan) = self.plan.get() {
            let number = number_in(event).ok_or("an event without its number")?;
            plan.record(&mut self.waited.borrow_mut(), number);
        }
        Ok(())
    }

    async fn paced(self: &Rc<Work>, target: &Target, args: &QueueArgs, workers: Vec<Socket>) -> Result<(), Failure> {
        let speakers = self.threads.len().min(100);
        let sockets = target.many(speakers, async |number| target.socket(&self.owners[number]).await).await?;
        let plan = Plan::new(args.rate, speakers, args.seconds);
        self.plan.set(Some(plan));

        let (mut writers, mut tasks) = (Vec::new(), JoinSet::new());
        for (number, socket) in sockets.into_iter().enumerate() {
            writers.push((socket.writer, Frame::publish(&self.threads[number], args.payload, false)));
            tasks.spawn_local(take_answers(socket.reader, plan.of(number as u64)));
        }
        // The thread gives the writers back: one that is dropped ends its connection, and answers are still to come.
        let talker = spawn_blocking(move || (talk(&mut writers, plan), writers));
        let until = self.settled.get() + plan.total;
        for mut worker in workers {
            let work = self.clone();
            tasks.spawn_local(async move { work.settle_until(&mut worker, until).await });
        }
        let all = async {
            while let Some(done) = tasks.join_next().await {
                done??;
            }
            Ok::<_, Failure>(())
        };
        tokio::time::timeout(plan.patience(), all).await??;
        let (late, _writers) = talker.await?;
        late.map(drop)
    }
}

#[derive(serde::Deserialize)]
struct EventHead<'a> {
    #[serde(borrow)]
    thread: std::borrow::Cow<'a, str>,
    seq: u64,
}
