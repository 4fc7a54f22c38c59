//! The projector's thread: reads the log, has it projected, and publishes what became visible.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::checkpoints::Pace;
use super::{Commit, ProjectError, Projector, Update};
use crate::log::{Entry, Log, LogError, Positions, Reader};
use crate::{panics, telemetry};

/// Records judged and committed at once: enough to spread the cost of a commit, few enough to stay quick.
const BATCH: usize = 1_024;
/// How long the loop goes on after `stop` was set.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How often the log is asked where it ends, until it answers, and how often a long start says how far it is.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long the loop waits for the log before it checks `stop`.
const WAIT: Duration = Duration::from_millis(100);

/// Why the projector makes no progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failing {
    /// The log does not answer. What is projected is right, and stays so.
    NoLog(String),
    /// The store fails, the log is not the one it was, or the thread has ended.
    Broken(String),
}

impl Failing {
    pub fn why(&self) -> &str {
        let (Failing::NoLog(why) | Failing::Broken(why)) = self;
        why
    }
}

/// How the projector is doing, for `/readyz` and metrics.
#[derive(Default)]
pub struct Status {
    positions: watch::Sender<Positions>,
    /// `at` of the newest record, in milliseconds.
    newest: AtomicU64,
    failing: Mutex<Option<Failing>>,
    /// The log's time when all had been projected that it had at the start, in milliseconds.
    log_time_at_start: AtomicU64,
    caught_up: AtomicBool,
    /// Why it has stopped for good: the log has records of newer rules than it knows.
    outdated: watch::Sender<Option<String>>,
}

impl Status {
    /// How far it has read; empty before it began.
    pub fn positions(&self) -> Positions {
        self.positions.borrow().clone()
    }

    /// Returns once everything before these positions has been projected.
    pub async fn until_past(&self, ends: &[u64]) {
        let is_past = |positions: &Positions| {
            positions.len() == ends.len() && positions.iter().zip(ends).all(|(next, end)| next >= end)
        };
        // Fails only when the sender is gone, and that is `self`.
        drop(self.positions.subscribe().wait_for(is_past).await);
    }

    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Relaxed)
    }

    /// Why it makes no progress, if so.
    pub fn failing(&self) -> Option<Failing> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the log's time was when all had been projected that was in it at the start; nothing before.
    pub fn log_time_at_start(&self) -> Option<u64> {
        self.caught_up().then(|| self.log_time_at_start.load(Ordering::Relaxed))
    }

    /// Whether all that was in the log at the start has been projected.
    pub fn caught_up(&self) -> bool {
        self.caught_up.load(Ordering::Acquire)
    }

    /// Why this node must be upgraded before it can go on, if so.
    pub fn outdated(&self) -> Option<String> {
        self.outdated.borrow().clone()
    }

    /// Returns once this node must be upgraded before it can go on.
    pub async fn until_outdated(&self) {
        // The sender is ours, and so outlives the wait.
        drop(self.outdated.subscribe().wait_for(Option::is_some).await);
    }

    fn set_failing(&self, why: Option<Failing>) {
        *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

/// Gets what became visible; returns `false` when nothing receives it any more.
pub type PublishCommit = Box<dyn FnMut(Commit) -> bool + Send>;

/// The projector's thread: reads, projects and publishes, until `stop` is set and the log is read to its end.
pub struct Pump {
    pub log: Arc<dyn Log>,
    pub reader: Box<dyn Reader>,
    pub projector: Projector,
    pub status: Arc<Status>,
    pub stop: Arc<AtomicBool>,
    pub publish: PublishCommit,
}

impl Pump {
    pub fn run(mut self) {
        let _vital = panics::abort_on_panic("the projector");
        let _on_exit = ReportStopped(self.status.clone());
        let mut ends = self.ends();
        self.status.newest.store(self.projector.log_time(), Ordering::Relaxed);
        let (mut stopped, mut asked) = (None, Instant::now());
        let begin = self.reader.positions().clone();
        let mut pace = Pace::new(self.log.partitions());
        let (seconds, records, events) =
            (telemetry::project_seconds(), telemetry::project_batch_records(), telemetry::project_events());

        loop {
            self.update_status(&begin, &mut ends, &mut asked);

            let stopping = self.stop.load(Ordering::Acquire);
            // By now every publish that was waiting has its answer. Other nodes may go on writing, so the end of the log is
            // not waited for.
            if stopping && stopped.get_or_insert_with(Instant::now).elapsed() > STOP_WITHIN {
                return;
            }

            let entries = match self.reader.next(BATCH, WAIT) {
                Ok(entries) => entries,
                Err(_) if stopping => return,
                Err(error @ LogError::NewerRules { .. }) => return self.stop_at(&error),
                Err(error) => {
                    let why = format!("the log cannot be read: {error}");
                    let away = matches!(error, LogError::Unavailable(_));
                    self.pause(if away { Failing::NoLog(why) } else { Failing::Broken(why) });
                    continue;
                }
            };

            self.status.set_failing(None);
            if entries.is_empty() {
                if stopping {
                    return;
                }
                continue;
            }

            records.record(entries.len() as f64);
            let mut done = 0;
            while done < entries.len() {
                let begin = Instant::now();
                let Some((applied, commit)) = self.project(&entries[done..]) else { return };
                seconds.record(begin.elapsed());

                let with_seq = commit.events.iter().filter(|it| matches!(it.update, Update::Event(..)));
                events.increment(with_seq.count() as u64);
                for reason in &commit.dead_letters {
                    telemetry::dead_letters(reason).increment(1);
                }

                done += applied;
                let (due, agreed) = self.projector.checkpoints();
                pace.write(self.log.as_ref(), due, agreed);
                if !(self.publish)(commit) {
                    return;
                }
            }

            self.status.newest.store(self.projector.log_time(), Ordering::Relaxed);
            self.log.committed(self.reader.positions());
        }
    }

    /// Projects entries; tries again while the store fails, until `stop` is set.
    fn project(&mut self, entries: &[Entry]) -> Option<(usize, Commit)> {
        while !self.stop.load(Ordering::Acquire) || self.status.failing().is_none() {
            match self.projector.project(entries, self.reader.positions()) {
                Ok(done) => return Some(done),
                Err(error @ ProjectError::Store(_)) => self.pause(Failing::Broken(error.to_string())),
                Err(ProjectError::Disagrees(disagreement)) => {
                    telemetry::checkpoints("differs").increment(1);
                    self.halt("nodes_disagree", &disagreement.to_string());
                    return None;
                }
            }
        }
        None
    }

    /// There is a record that only a later version can judge. Nothing is projected any more, since what follows may depend on
    /// it; what was projected before stays right.
    fn stop_at(&self, error: &LogError) {
        self.status.outdated.send_replace(Some(error.to_string()));
        self.halt("newer_rules", &error.to_string());
    }

    /// Commits nothing more, until `stop` is set.
    fn halt(&self, reason: &'static str, why: &str) {
        tracing::error!(why, "the projector stops");
        telemetry::projector_halted(reason).set(1.0);
        self.status.set_failing(Some(Failing::Broken(why.to_owned())));
        while !self.stop.load(Ordering::Acquire) {
            std::thread::sleep(WAIT);
        }
    }

    /// Waits before the next attempt. Says why once, not with every attempt.
    fn pause(&self, why: Failing) {
        if self.status.failing().as_ref() != Some(&why) {
            tracing::error!(why = why.why(), "the projector waits");
            self.status.set_failing(Some(why));
        }
        std::thread::sleep(WAIT * 5);
    }

    /// Publishes the position, and whether the end that the log had at the start has been reached.
    fn update_status(&mut self, begin: &Positions, ends: &mut Option<Positions>, asked: &mut Instant) {
        let positions = self.reader.positions();
        self.status.positions.send_if_modified(|known| {
            let moved = known != positions;
            if moved {
                known.clone_from(positions);
            }
            moved
        });
        if self.status.caught_up() {
            return;
        }
        if asked.elapsed() > ASK_EVERY {
            *asked = Instant::now();
            if ends.is_none() {
                *ends = self.ends();
            }
            if let Ok(ends) = self.log.ends() {
                let (done, of) = (self.log.between(begin, positions), self.log.between(begin, &ends));
                tracing::info!(done, of, "reading the log");
            }
        }
        if ends.as_ref().is_some_and(|ends| positions.iter().zip(ends).all(|(next, end)| next >= end)) {
            self.status.log_time_at_start.store(self.projector.confirmed_time(), Ordering::Relaxed);
            self.projector.go_live();
            let records = self.log.between(begin, positions);
            if records > 0 {
                tracing::info!(records, "the log is read to where it ended at the start");
            }
            self.status.caught_up.store(true, Ordering::Release);
        }
    }

    fn ends(&self) -> Option<Positions> {
        self.log.ends().ok()
    }
}

/// Sets the status when the loop ends.
struct ReportStopped(Arc<Status>);

impl Drop for ReportStopped {
    fn drop(&mut self) {
        self.0.set_failing(Some(Failing::Broken("the projector has stopped".into())));
    }
}
