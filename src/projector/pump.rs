//! The projector's thread: reads the log and has it projected. Where there is one, it projects as well; where there are several,
//! they are [`projectors`](super::projectors).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::driver::{Around, Driver, Ended, PublishCommit};
use super::projectors::Projectors;
use super::status::{Failing, READER, Status};
use super::{BATCH, Projector};
use crate::log::{Entry, Log, LogError, Positions, Reader};
use crate::panics;

/// How long the loop goes on after `stop` was set.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How often the log is asked where it ends, until it answers, and how often a long start says how far it is.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long the loop waits for the log before it checks `stop`.
const WAIT: Duration = Duration::from_millis(100);

/// What the projector's threads work with: they read, project and publish, until `stop` is set and the log is read to its end.
pub struct Pump {
    pub log: Arc<dyn Log>,
    pub reader: Box<dyn Reader>,
    pub projector: Projector,
    /// How many threads project; no more than a topic has partitions are of use.
    pub threads: usize,
    pub status: Arc<Status>,
    pub stop: Arc<AtomicBool>,
    pub publish: PublishCommit,
}

/// Who projects what was read.
enum Projecting {
    /// The thread that has read it.
    Here(Box<Driver>),
    Several(Projectors),
}

/// The loop of the thread that reads.
struct Reading {
    reader: Box<dyn Reader>,
    around: Arc<Around>,
    projecting: Projecting,
    /// Where the loop began.
    begin: Positions,
    /// Where the log ended then, once it has said so.
    ends: Option<Positions>,
    /// When it was asked last.
    asked: Instant,
}

impl Pump {
    /// Starts the threads; the one whose handle is returned ends last.
    pub fn start(self) -> std::io::Result<JoinHandle<()>> {
        let Pump { log, reader, projector, threads, status, stop, publish } = self;
        let within: Vec<u32> = (0..log.partitions()).map(|partition| log.topic_of(partition).1).collect();
        let of = threads.min(log.partitioning().each() as usize);
        let around = Arc::new(Around { log, status, stop, publish });
        let projecting = match of {
            0 | 1 => Projecting::Here(Box::new(Driver::new(projector, around.clone(), READER))),
            _ => Projecting::Several(Projectors::start(&projector, &around, of, &within)?),
        };
        let begin = reader.positions().clone();
        let reading = Reading { reader, around, projecting, begin, ends: None, asked: Instant::now() };
        std::thread::Builder::new().name("projector".into()).spawn(move || reading.run())
    }
}

impl Reading {
    fn run(mut self) {
        let _vital = panics::abort_on_panic("the projector");
        let _on_exit = ReportStopped(self.around.status.clone());
        self.ends = self.around.log.ends().ok();
        if let Err(Ended::Halted) = self.read() {
            while !self.around.is_stopping() {
                std::thread::sleep(WAIT);
            }
        }
        if let Projecting::Several(several) = self.projecting
            && let Err(error) = several.finish(self.reader.positions())
        {
            tracing::warn!(%error, "how far the log is projected is not written; the next start looks for it in the log");
        }
    }

    /// Reads and projects, until there is a reason not to.
    fn read(&mut self) -> Result<(), Ended> {
        let around = self.around.clone();
        let mut stopped = None;
        loop {
            self.update_status()?;

            let stopping = around.is_stopping();
            // By now every publish that was waiting has its answer. Other nodes may go on writing, so the end of the log is
            // not waited for.
            if stopping && stopped.get_or_insert_with(Instant::now).elapsed() > STOP_WITHIN {
                return Ok(());
            }

            let entries = match self.reader.next(BATCH, WAIT) {
                Ok(entries) => entries,
                Err(_) if stopping => return Ok(()),
                Err(error @ LogError::NewerRules { .. }) => return Err(self.stop_at(&error)),
                Err(error) => {
                    let why = format!("the log cannot be read: {error}");
                    let away = matches!(error, LogError::Unavailable(_));
                    around.pause(READER, if away { Failing::NoLog(why) } else { Failing::Broken(why) });
                    continue;
                }
            };

            around.status.set_failing(READER, None);
            if entries.is_empty() {
                if stopping {
                    return Ok(());
                }
                continue;
            }
            self.project(entries)?;
        }
    }

    fn project(&mut self, entries: Vec<Entry>) -> Result<(), Ended> {
        let positions = self.reader.positions();
        match &mut self.projecting {
            Projecting::Here(driver) => {
                driver.work(&entries, positions)?;
                self.around.log.committed(positions);
            }
            Projecting::Several(several) => several.give(entries, positions)?,
        }
        Ok(())
    }

    /// There is a record that only a later version can judge. Nothing is read any more, since what follows may depend on it;
    /// what was read before stays right.
    fn stop_at(&self, error: &LogError) -> Ended {
        self.around.status.set_outdated(error.to_string());
        self.around.halt(READER, "newer_rules", &error.to_string());
        Ended::Halted
    }

    /// Publishes the positions, and whether the end that the log had at the start has been reached.
    fn update_status(&mut self) -> Result<(), Ended> {
        let Around { log, status, .. } = &*self.around;
        let positions = self.reader.positions();
        match &self.projecting {
            Projecting::Here(_) => status.set_positions(positions),
            Projecting::Several(several) => {
                several.pass(positions)?;
                log.committed(&status.positions());
            }
        }
        if status.caught_up() {
            return Ok(());
        }
        if self.asked.elapsed() > ASK_EVERY {
            self.asked = Instant::now();
            let ends = log.ends().ok();
            if let Some(ends) = &ends {
                let (done, of) = (log.between(&self.begin, positions), log.between(&self.begin, ends));
                tracing::info!(done, of, "reading the log");
            }
            self.ends = self.ends.take().or(ends);
        }
        if self.ends.as_ref().is_some_and(|ends| positions.iter().zip(ends).all(|(next, end)| next >= end)) {
            let log_time = self.projecting.go_live()?;
            let records = log.between(&self.begin, positions);
            if records > 0 {
                tracing::info!(records, "the log is read to where it ended at the start");
            }
            status.set_caught_up(log_time);
        }
        Ok(())
    }
}

impl Projecting {
    /// All is projected that was read, and from here on compared with what other nodes make of the log; gives the log's time.
    fn go_live(&mut self) -> Result<u64, Ended> {
        let go = |projector: &mut Projector| {
            projector.go_live();
            projector.confirmed_time()
        };
        Ok(match self {
            Projecting::Here(driver) => go(&mut driver.projector),
            Projecting::Several(several) => {
                several.settle()?;
                several.each(go).into_iter().max().unwrap_or(0)
            }
        })
    }
}

/// Sets the status when the loop ends.
struct ReportStopped(Arc<Status>);

impl Drop for ReportStopped {
    fn drop(&mut self) {
        self.0.set_failing(READER, Some(Failing::Broken("the projector has stopped".into())));
    }
}
