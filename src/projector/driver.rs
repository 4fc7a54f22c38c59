//! What a thread of the projector does with records: it has them projected, and publishes what became visible.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Histogram};

use super::checkpoints::Pace;
use super::status::{Failing, Status};
use super::{Commit, ProjectError, Projector, Update};
use crate::log::{Entry, Log};
use crate::telemetry;

/// How long the projector waits before it tries again.
const PAUSE: Duration = Duration::from_millis(500);

/// Gets what became visible; returns `false` when nothing receives it any more. What one thread of the projector has given
/// it before comes before.
pub type PublishCommit = Box<dyn Fn(Commit) -> bool + Send + Sync>;

/// What all threads of the projector work with.
pub(super) struct Around {
    pub(super) log: Arc<dyn Log>,
    pub(super) status: Arc<Status>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) publish: PublishCommit,
}

/// Why a thread of the projector does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Nothing may be committed any more.
    Halted,
    /// It was stopped, or nobody wants what it publishes.
    Stopped,
}

impl Around {
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Nothing is committed any more.
    pub(super) fn halt(&self, thread: usize, reason: &'static str, why: &str) {
        tracing::error!(why, "the projector stops");
        telemetry::projector_halted(reason).set(1.0);
        self.status.set_failing(thread, Some(Failing::Broken(why.to_owned())));
    }

    /// Waits before the next attempt. Says why once, not with every attempt.
    pub(super) fn pause(&self, thread: usize, why: Failing) {
        if self.status.failing_of(thread).as_ref() != Some(&why) {
            tracing::error!(why = why.why(), "the projector waits");
            self.status.set_failing(thread, Some(why));
        }
        std::thread::sleep(PAUSE);
    }
}

pub(super) struct Driver {
    pub(super) projector: Projector,
    around: Arc<Around>,
    /// The number of its thread, in [`Status`].
    number: usize,
    pace: Pace,
    seconds: Histogram,
    records: Histogram,
    events: Counter,
}

impl Driver {
    pub(super) fn new(projector: Projector, around: Arc<Around>, number: usize) -> Driver {
        around.status.set_newest(number, projector.log_time());
        Driver {
            pace: Pace::new(around.log.partitions()),
            seconds: telemetry::project_seconds(),
            records: telemetry::project_batch_records(),
            events: telemetry::project_events(),
            projector,
            around,
            number,
        }
    }

    /// Projects entries, commit by commit, and publishes each. `positions` is where the log goes on after all of them.
    pub(super) fn work(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(), Ended> {
        self.records.record(entries.len() as f64);
        let mut done = 0;
        while done < entries.len() {
            let begin = Instant::now();
            let (applied, commit) = self.project(&entries[done..], positions)?;
            self.seconds.record(begin.elapsed());

            let with_seq = commit.events.iter().filter(|it| matches!(it.update, Update::Event(..)));
            self.events.increment(with_seq.count() as u64);
            for reason in &commit.dead_letters {
                telemetry::dead_letters(reason).increment(1);
            }

            done += applied;
            let (due, agreed) = self.projector.checkpoints();
            self.pace.write(self.around.log.as_ref(), due, agreed);
            if !(self.around.publish)(commit) {
                return Err(Ended::Stopped);
            }
            self.projector.say_positions(&self.around.status);
        }
        self.around.status.set_newest(self.number, self.projector.log_time());
        Ok(())
    }

    /// Projects entries; tries again while the store fails, until the projector is stopped.
    fn project(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Commit), Ended> {
        let mut has_failed = false;
        while !has_failed || !self.around.is_stopping() {
            match self.projector.project(entries, positions) {
                Ok(done) => {
                    if has_failed {
                        self.around.status.set_failing(self.number, None);
                    }
                    return Ok(done);
                }
                Err(error @ ProjectError::Store(_)) => {
                    has_failed = true;
                    self.around.pause(self.number, Failing::Broken(error.to_string()));
                }
                Err(ProjectError::Disagrees(disagreement)) => {
                    telemetry::checkpoints("differs").increment(1);
                    self.around.halt(self.number, "nodes_disagree", &disagreement.to_string());
                    return Err(Ended::Halted);
                }
            }
        }
        Err(Ended::Stopped)
    }
}
