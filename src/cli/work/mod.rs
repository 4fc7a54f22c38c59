//! `weft work`: a worker in a line of shell. Runs a command for each event of a group, publishes what it prints as the answer,
//! and settles by its exit code.
//!
//! What it holds belongs to its connection. When that is lost the commands are asked to end, for their events are somebody
//! else's by then; nothing of them is published or settled.

mod job;

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, sleep_until};

use self::job::{Ended, Job, Outcome};
use super::common::{Failure, Output, Server, Stop, Style, cell, printable};
use crate::client::{ClientWork, ConsumeDraft, ErrorFrame, NotDone, PublishDraft, SettleDraft, Worker, WorkerItem};
use crate::protocol::kinds::AGENT_MESSAGE;

/// A lease is extended when this part of it is over, so that a second try is in time as well.
const EXTEND_AFTER: u32 = 3;

/// The most characters of an idempotency key.
const MAX_KEY: usize = 128;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The group whose work to take; one that does not exist is made with the defaults.
    pub group: String,
    /// What to run, by `sh -c`, for each event: the event is on its standard input as JSON, what it prints is published as the
    /// answer. Exit code 0: done; 65: a dead letter at once; any other: again later, the last line of standard error says why.
    #[arg(long, value_name = "CMD")]
    pub exec: String,
    /// How many commands may run at once.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub credit: u32,
    /// How long an event is leased before the lease is extended, in milliseconds, unless as long as the group says.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1_000..=3_600_000))]
    pub lease_ms: Option<u64>,
    #[command(flatten)]
    pub server: Server,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let wants = ConsumeDraft { group: args.group.clone(), credit: args.credit, lease_ms: args.lease_ms };
    let worker = Worker::connect(&args.server.url, &args.server.token, wants).await?;
    let (sender, ended) = channel(args.credit as usize);
    let (out, running) = (Output::new(), HashMap::new());
    let mut shift = Shift { out, exec: args.exec, worker, running, sender, stopping: false, gives_up: false };
    let worked = shift.work(ended).await;

    for (_, running) in shift.running.drain() {
        running.job.terminate();
    }
    worked?;
    Ok(shift.worker.close().await?)
}

/// A command and what it works on.
struct Running {
    work: Box<ClientWork>,
    job: Job,
    began: Instant,
    extend_at: Instant,
}

struct Shift {
    out: Output,
    exec: String,
    worker: Worker,
    /// By what their work is called.
    running: HashMap<String, Running>,
    /// Where commands say that they have ended.
    sender: Sender<Ended>,
    /// It takes no more.
    stopping: bool,
    /// It does not even finish.
    gives_up: bool,
}

impl Shift {
    async fn work(&mut self, mut ended: Receiver<Ended>) -> Result<(), Failure> {
        let mut stop = Stop::new()?;
        eprintln!("weft work: takes work of {}", printable(self.worker.group()));
        while !self.is_over() {
            let extend_at = self.running.values().map(|running| running.extend_at).min();
            tokio::select! {
                item = self.worker.next() => self.take(item?).await?,
                Some(ended) = ended.recv() => self.end(ended).await?,
                () = at(extend_at) => self.extend().await?,
                () = stop.asked() => self.stop().await,
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.gives_up || (self.stopping && self.running.is_empty())
    }

    async fn take(&mut self, item: WorkerItem) -> Result<(), Failure> {
        match item {
            WorkerItem::Work(work) if self.stopping => self.give_back(&work).await,
            WorkerItem::Work(work) => self.begin(work).await,
            WorkerItem::Lost(error) => {
                eprintln!("weft work: {error}");
                let lost: Vec<String> = self.running.keys().cloned().collect();
                for delivery in lost {
                    self.lose(&delivery)?;
                }
                Ok(())
            }
            WorkerItem::Resumed => {
                eprintln!("weft work: connected again");
                Ok(())
            }
        }
    }

    /// Starts the command for an event.
    async fn begin(&mut self, work: Box<ClientWork>) -> Result<(), Failure> {
        let began = Instant::now();
        let extend_at = began + lease(&work) / EXTEND_AFTER;
        match job::start(&self.exec, &work, self.sender.clone()) {
            Ok(job) => {
                self.running.insert(work.delivery.clone(), Running { work, job, began, extend_at });
                Ok(())
            }
            Err(error) => {
                self.settle(&work, began, Outcome::Retry(format!("the command did not start: {error}"))).await
            }
        }
    }

    /// What came when it had stopped already.
    async fn give_back(&mut self, work: &ClientWork) -> Result<(), Failure> {
        self.settle(work, Instant::now(), Outcome::Retry("the worker stopped before it began".to_owned())).await
    }

    async fn end(&mut self, ended: Ended) -> Result<(), Failure> {
        // Who was stopped for a while may come too late: what is somebody else's by now gets no answer from here.
        self.extend().await?;
        // What was lost meanwhile is nobody's business here.
        let Some(running) = self.running.remove(&ended.delivery) else { return Ok(()) };
        self.settle(&running.work, running.began, job::outcome(ended.result)).await
    }

    /// Publishes the answer, if there is one, and settles.
    async fn settle(&mut self, work: &ClientWork, began: Instant, outcome: Outcome) -> Result<(), Failure> {
        let (answered, outcome) = match outcome {
            Outcome::Done(answer) if !answer.is_empty() => match self.answer(work, answer).await {
                Ok(answered) => (Some(answered), Outcome::Done(String::new())),
                Err(NotDone::Lost) => return self.line(work, "lost", Style::Red, ""),
                Err(NotDone::Refused(refusal)) => (None, Outcome::Retry(format!("the answer was refused: {refusal}"))),
            },
            outcome => (None, outcome),
        };

        let mut settlement = SettleDraft { delivery: work.delivery.clone(), outcome: "done", ..SettleDraft::default() };
        let (what, style, more) = match outcome {
            Outcome::Done(_) => {
                let ms = began.elapsed().as_millis();
                let answered = answered.map_or_else(String::new, |answered| format!(", {answered}"));
                ("done", Style::Green, format!("in {ms} ms{answered}"))
            }
            Outcome::Retry(reason) => {
                (settlement.outcome, settlement.reason) = ("retry", Some(reason.clone()));
                ("failed", Style::Yellow, reason)
            }
            Outcome::Reject(reason) => {
                (settlement.outcome, settlement.reason) = ("reject", Some(reason.clone()));
                ("rejected", Style::Red, reason)
            }
        };
        match self.worker.settle(&settlement).await {
            Ok(()) => self.line(work, what, style, &more),
            Err(NotDone::Lost) => self.line(work, "lost", Style::Red, ""),
            Err(NotDone::Refused(refusal)) => self.line(work, "lost", Style::Red, &refusal.to_string()),
        }
    }

    /// Publishes an answer once for an event, however often that is tried; says what became of it.
    async fn answer(&mut self, work: &ClientWork, answer: String) -> Result<String, NotDone> {
        let draft = PublishDraft {
            thread: thread(work).to_owned(),
            kind: AGENT_MESSAGE.to_owned(),
            data: json!({ "content": answer }),
            key: Some(key(work)),
            parent: work.event["seq"].as_u64(),
            run: None,
        };
        match self.worker.publish(&draft).await {
            Ok(published) => Ok(published.seq.map_or_else(String::new, |seq| format!("answered by #{seq}"))),
            // An attempt before this one has given another answer, and that one counts.
            Err(NotDone::Refused(refusal)) if is_taken(&refusal) => Ok("answered before".to_owned()),
            Err(other) => Err(other),
        }
    }

    /// Extends the leases whose time has come; what is not this worker's any more ends here.
    async fn extend(&mut self) -> Result<(), Failure> {
        let now = Instant::now();
        let is_due = |running: &&Running| running.extend_at <= now;
        let due: Vec<String> = self.running.values().filter(is_due).map(|it| it.work.delivery.clone()).collect();
        for delivery in due {
            let settlement = SettleDraft { delivery, outcome: "extend", ..SettleDraft::default() };
            match self.worker.settle(&settlement).await {
                Err(NotDone::Lost) => break,
                Err(NotDone::Refused(refusal)) if !refusal.temporary => self.lose(&settlement.delivery)?,
                Ok(()) | Err(NotDone::Refused(_)) => {
                    if let Some(running) = self.running.get_mut(&settlement.delivery) {
                        running.extend_at = now + lease(&running.work) / EXTEND_AFTER;
                    }
                }
            }
        }
        Ok(())
    }

    /// The event is somebody else's.
    fn lose(&mut self, delivery: &str) -> Result<(), Failure> {
        let Some(running) = self.running.remove(delivery) else { return Ok(()) };
        running.job.terminate();
        self.line(&running.work, "lost", Style::Red, "")
    }

    /// The first time, it finishes what it has begun; the second time it ends at once.
    async fn stop(&mut self) {
        if self.stopping {
            self.gives_up = true;
            return;
        }
        self.stopping = true;
        if !self.running.is_empty() {
            eprintln!("weft work: finishes {}; once more ends at once", self.running.len());
        }
        // Without a connection there is nothing left to finish.
        self.gives_up = self.worker.take(0).await.is_err();
    }

    fn line(&self, work: &ClientWork, what: &str, style: Style, more: &str) -> Result<(), Failure> {
        let (thread, seq) = (cell(&work.event["thread"]), cell(&work.event["seq"]));
        let attempt = if work.attempt > 1 { format!(" attempt {}", work.attempt) } else { String::new() };
        let what = self.out.paint(style, what);
        let line = format!("{thread} #{seq}{attempt} {what} {}", printable(more));
        // Without a reader it works on.
        self.out.line(line.trim_end())?;
        Ok(())
    }
}

fn lease(work: &ClientWork) -> Duration {
    Duration::from_millis(work.lease_ms)
}

fn thread(work: &ClientWork) -> &str {
    work.event["thread"].as_str().unwrap_or_default()
}

/// The idempotency key of an answer: the same for every attempt at an event.
fn key(work: &ClientWork) -> String {
    let key = format!("work:{}/{}/{}", work.group, thread(work), work.event["seq"]);
    // Names are at most 128 characters each, and so is a key.
    if key.len() <= MAX_KEY { key } else { format!("work:{}", blake3::hash(key.as_bytes()).to_hex()) }
}

/// The key was used before, with another answer.
fn is_taken(refusal: &ErrorFrame) -> bool {
    refusal.code == "conflict" && refusal.field.as_deref() == Some("key")
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_the_same_key_at_every_attempt_and_one_that_fits() {
        let work = |group: &str, seq: u64, attempt: u32| ClientWork {
            delivery: format!("d{attempt}"),
            group: group.to_owned(),
            attempt,
            lease_ms: 1_000,
            event: json!({"thread": "t", "seq": seq}),
        };
        assert_eq!(key(&work("g", 7, 1)), "work:g/t/7");
        let long = "g".repeat(128);
        assert_eq!(key(&work(&long, 7, 1)), key(&work(&long, 7, 2)));
        assert_ne!(key(&work(&long, 7, 1)), key(&work(&long, 8, 1)));
        assert!(key(&work(&long, 7, 1)).len() <= MAX_KEY);
    }
}
