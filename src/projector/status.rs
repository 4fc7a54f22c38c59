//! How the projector is doing, for whoever waits for it, for `/readyz` and for metrics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::log::Positions;

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

/// How the projector is doing.
#[derive(Default)]
pub struct Status {
    positions: watch::Sender<Positions>,
    /// Of each thread of the projector, by its number.
    threads: Mutex<Vec<OfThread>>,
    /// The log's time when all had been projected that it had at the start, in milliseconds.
    log_time_at_start: AtomicU64,
    caught_up: AtomicBool,
    /// Why it has stopped for good: the log has records of newer rules than it knows.
    outdated: watch::Sender<Option<String>>,
}

/// The number of the thread that reads the log. Where it is the only one it projects as well.
pub(super) const READER: usize = 0;

#[derive(Default)]
struct OfThread {
    /// `at` of the newest record, in milliseconds.
    newest: u64,
    failing: Option<Failing>,
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
        self.threads().iter().map(|it| it.newest).max().unwrap_or(0)
    }

    /// Why it makes no progress, if so.
    pub fn failing(&self) -> Option<Failing> {
        self.threads().iter().find_map(|it| it.failing.clone())
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

    /// Where all partitions are.
    pub(super) fn front(&self) -> watch::Sender<Positions> {
        self.positions.clone()
    }

    /// All partitions are at these positions.
    pub(super) fn set_positions(&self, positions: &Positions) {
        self.positions.send_if_modified(|known| {
            let moved = known != positions;
            if moved {
                known.clone_from(positions);
            }
            moved
        });
    }

    /// These partitions are at their positions of these, or beyond.
    pub(super) fn advance(&self, partitions: &[u32], positions: &[u64]) {
        self.positions.send_if_modified(|known| {
            let mut moved = false;
            for partition in partitions.iter().map(|partition| *partition as usize) {
                if let (Some(known), Some(next)) = (known.get_mut(partition), positions.get(partition))
                    && next > known
                {
                    *known = *next;
                    moved = true;
                }
            }
            moved
        });
    }

    pub(super) fn set_newest(&self, thread: usize, at: u64) {
        self.of_thread(thread, |it| it.newest = at);
    }

    pub(super) fn set_failing(&self, thread: usize, why: Option<Failing>) {
        self.of_thread(thread, |it| it.failing = why);
    }

    pub(super) fn failing_of(&self, thread: usize) -> Option<Failing> {
        self.threads().get(thread).and_then(|it| it.failing.clone())
    }

    pub(super) fn set_caught_up(&self, log_time: u64) {
        self.log_time_at_start.store(log_time, Ordering::Relaxed);
        self.caught_up.store(true, Ordering::Release);
    }

    pub(super) fn set_outdated(&self, why: String) {
        self.outdated.send_replace(Some(why));
    }

    fn of_thread(&self, thread: usize, change: impl FnOnce(&mut OfThread)) {
        let mut threads = self.threads();
        if threads.len() <= thread {
            threads.resize_with(thread + 1, OfThread::default);
        }
        change(&mut threads[thread]);
    }

    fn threads(&self) -> MutexGuard<'_, Vec<OfThread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
