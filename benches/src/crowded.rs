//! What a crowded thread costs everybody else: how long one publish of another tenant takes, first alone, then beside a thread
//! with many readers and a steady publisher; and how late that thread's readers have its events.
//!
//! The bystander has a thread of this process, and a runtime, of its own: what is measured is how long it waits for the server
//! and not for the clients of the crowd. All of them share the machine's cores with the server all the same.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use hdrhistogram::Histogram;
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, JoinSet, LocalSet, spawn_blocking};

use crate::pace::{Plan, talk};
use crate::publisher::{Frame, Publisher};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::{Reader, Socket};
use crate::target::{Target, open_files, progress};
use weft::cli::common::Failure;

/// Files that this process needs beside the readers' sockets.
const OTHER_FILES: usize = 100;
/// A client that is silent for longer would have to answer pings, which the crowd's publisher does not.
const LONGEST_SECONDS: u64 = 20;

#[derive(Debug, Clone, clap::Args)]
pub struct CrowdedArgs {
    /// Readers of the crowded thread; as many as there may be open files if those are fewer.
    #[arg(long, default_value_t = 10_000)]
    pub readers: usize,
    /// Publishes a second in the crowded thread.
    #[arg(long, default_value_t = 50)]
    pub rate: usize,
    /// Of each of the two measurements.
    #[arg(long, default_value_t = 8)]
    pub seconds: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for CrowdedArgs {
    fn default() -> CrowdedArgs {
        CrowdedArgs { readers: 10_000, rate: 50, seconds: 8, payload: 256 }
    }
}

pub async fn run(target: &Target, args: &CrowdedArgs) -> Result<Vec<Figure>, Failure> {
    if args.rate == 0 || args.seconds == 0 || args.seconds > LONGEST_SECONDS {
        return Err(format!("--rate must be at least 1, and --seconds 1 to {LONGEST_SECONDS}").into());
    }
    let readers = args.readers.min(open_files(args.readers + OTHER_FILES)?.saturating_sub(OTHER_FILES)).max(1);
    progress(&format!("one user beside {readers} readers of another tenant's thread, {}/s", args.rate));

    let alone = bystander(target, args, Plan::new(1, 1, args.seconds)).await??;
    let crowd = Crowd::gather(target, args, readers).await?;
    let plan = Plan::new(args.rate, 1, args.seconds);
    let beside = bystander(target, args, plan);
    let measured = crowd.measure(plan).await?;
    let beside = beside.await??;

    let name = format!("beside {readers} readers {}/s", args.rate);
    let mut figures = Vec::new();
    for (quantile, at) in [("P50", 0.5), ("P99", 0.99)] {
        let figure = |name: &str, of: &Histogram<u64>| Figure::less(name, millis(of.value_at_quantile(at)), "ms");
        figures.extend([
            figure(&format!("published {quantile}, one at a time, alone"), &alone),
            figure(&format!("published {quantile}, one at a time, {name}"), &beside),
            figure(&format!("delivered {quantile} to {readers} readers {}/s", args.rate), &measured.delivered),
        ]);
    }
    figures.push(Figure::less(&format!("{readers} readers {}/s: lagged", args.rate), measured.lagged as f64, "times"));
    Ok(figures)
}

/// Publishes one at a time while the plan lasts, as a user of another tenant; gives how long each took.
fn bystander(target: &Target, args: &CrowdedArgs, plan: Plan) -> JoinHandle<Result<Histogram<u64>, Failure>> {
    let (target, payload) = (target.of_tenant("beside"), args.payload);
    spawn_blocking(move || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, async move {
            let (thread, user) = (target.name("beside", 0), target.name("bystander", 0));
            target.thread(&thread, &user, &[]).await?;
            let mut publisher = Publisher::open(&target, &user, Frame::publish(&thread, payload, false), 1).await?;
            tokio::time::sleep(plan.begin().saturating_duration_since(Instant::now())).await;
            let mut took = micros()?;
            let each = |sent: Instant, answered: Instant| took.saturating_record((answered - sent).as_micros() as u64);
            publisher.run(|_| Instant::now() < plan.due(plan.total), each).await?;
            Ok(took)
        })
    })
}

struct Crowd {
    publisher: Socket,
    frame: Frame,
    readers: Vec<(Socket, u64)>,
}

struct Measured {
    delivered: Histogram<u64>,
    lagged: u64,
}

impl Crowd {
    async fn gather(target: &Target, args: &CrowdedArgs, readers: usize) -> Result<Crowd, Failure> {
        let (thread, owner) = (target.name("crowded", 0), target.name("crowded-owner", 0));
        let users: Vec<_> = (0..readers).map(|number| target.name("crowded-reader", number)).collect();
        target.thread(&thread, &owner, &users).await?;
        let subscribed = async |number: usize| target.socket(&users[number]).await?.subscribed(&thread).await;
        let readers = target.many(readers, subscribed).await?;
        let publisher = target.socket(&owner).await?;
        Ok(Crowd { publisher, frame: Frame::publish(&thread, args.payload, false), readers })
    }

    async fn measure(self, plan: Plan) -> Result<Measured, Failure> {
        let delivered = Rc::new(RefCell::new(micros()?));
        let lagged = Rc::new(Cell::new(0));
        let mut tasks = JoinSet::new();
        for (socket, after) in self.readers {
            tasks.spawn_local(read(socket, after, plan, delivered.clone(), lagged.clone()));
        }
        tasks.spawn_local(take_answers(self.publisher.reader, plan.total));
        let mut writers = [(self.publisher.writer, self.frame)];
        // The thread gives the writer back: one that is dropped ends its connection, and answers are still to come.
        let talker = spawn_blocking(move || (talk(&mut writers, plan), writers));
        let all = async {
            while let Some(done) = tasks.join_next().await {
                done??;
            }
            Ok::<_, Failure>(())
        };
        tokio::time::timeout(plan.patience(), all).await??;
        let (late, _writers) = talker.await?;
        late?;
        let delivered = delivered.borrow().clone();
        Ok(Measured { delivered, lagged: lagged.get() })
    }
}

/// Reads every event after `after`, each once and in order.
async fn read(
    mut socket: Socket,
    after: u64,
    plan: Plan,
    delivered: Rc<RefCell<Histogram<u64>>>,
    lagged: Rc<Cell<u64>>,
) -> Result<(), Failure> {
    let mut last = after;
    while last < after + plan.total {
        let each = |reply: Reply| {
            match reply {
                Reply::Event { seq, .. } if seq == last + 1 => {
                    // Nobody else publishes there.
                    plan.record(&mut delivered.borrow_mut(), last - after);
                    last = seq;
                }
                Reply::Lagged => lagged.set(lagged.get() + 1),
                // Once more after each `lagged`.
                Reply::CaughtUp { .. } => {}
                other => return Err(format!("after seq {last} came {other:?}").into()),
            }
            Ok(())
        };
        socket.exchange(each).await?;
    }
    Ok(())
}

/// Takes the answers to so many publishes.
pub async fn take_answers(mut reader: Reader, total: u64) -> Result<(), Failure> {
    let mut answered = 0;
    while answered < total {
        reader
            .read(|reply| {
                answered += 1;
                reply.published().map(drop)
            })
            .await?;
    }
    Ok(())
}
