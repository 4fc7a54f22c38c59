//! Work of a group: how many events its workers are given and settle a second while much waits, and how long after its publish
//! an event is with a worker while little does.
//!
//! Each worker settles what it is given at once, with an `id`, and counts the answers: so what is counted is settled for good.
//! Of each thread the events must come in order and once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
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
/// What a worker may hold.
const CREDIT: usize = 64;

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
}

impl Default for QueueArgs {
    fn default() -> QueueArgs {
        QueueArgs { events: 100_000, threads: 1_000, workers: 32, rate: 1_000, seconds: 8, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &QueueArgs) -> Result<Vec<Figure>, Failure> {
    if args.threads == 0 || args.workers == 0 || args.rate == 0 || args.seconds == 0 {
        return Err("--threads, --workers, --rate and --seconds must be at least 1".into());
    }
    raise_open_files(args.workers + args.threads + 100)?;
    let group = target.name("group", args.workers);
    let mut workers =
        target.many(args.workers, async |number| target.agent(&target.name("queue-worker", number)).await).await?;
    // Makes the group, whose work is what comes from now on.
    consume(&mut workers[0], &group, 0).await?;

    let (events, work) = (args.events, Rc::new(Work::new(target, args)?));
    progress(&format!("{events} events that wait for a group"));
    work.fill(target, args).await?;
    progress(&format!("{} workers", args.workers));
    let begin = Instant::now();
    let workers = work.all_settled(workers, &group, events).await?;
    let settled = events as f64 / begin.elapsed().as_secs_f64();

    progress(&format!("{} events a second", args.rate));
    work.paced(target, args, workers).await?;
    let waited = work.waited.borrow();
    let name = format!("work settled, {} workers", args.workers);
    let at = |quantile| millis(waited.value_at_quantile(quantile));
    Ok(vec![
        Figure::more(&name, settled, "events/s"),
        Figure::less(&format!("publish to worker P50, {}/s", args.rate), at(0.5), "ms"),
        Figure::less(&format!("publish to worker P99, {}/s", args.rate), at(0.99), "ms"),
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
            plan: Cell::new(None),
            waited: RefCell::new(micros()?),
        })
    }

    /// Publishes what waits, evenly over the threads.
    async fn fill(&self, target: &Target, args: &QueueArgs) -> Result<(), Failure> {
        let threads = self.threads.len() as u64;
        let fill = async |number: usize| {
            let frame = Frame::publish(&self.threads[number], args.payload, false);
            let count = (args.events + threads - 1 - number as u64) / threads;
            let mut publisher = Publisher::open(target, &self.owners[number], frame, FILL_WINDOW).await?;
            publisher.run(|sent| sent < count, |_, _| ()).await
        };
        tokio::time::timeout(PATIENCE, target.many(self.threads.len(), fill)).await?.map(drop)
    }

    /// Returns once so many events more are settled.
    async fn all_settled(
        self: &Rc<Work>,
        workers: Vec<Socket>,
        group: &str,
        events: u64,
    ) -> Result<Vec<Socket>, Failure> {
        let until = self.settled.get() + events;
        let mut tasks = JoinSet::new();
        for mut worker in workers {
            let (work, group) = (self.clone(), group.to_owned());
            tasks.spawn_local(async move {
                // Its answer may come behind work.
                worker.queue_text(&format!(r#"{{"type":"consume","id":1,"group":"{group}","credit":{CREDIT}}}"#));
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
            if let Ok(exchanged) = tokio::time::timeout(Duration::from_millis(100), exchange).await {
                exchanged?;
            }
            for settle in settle {
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
