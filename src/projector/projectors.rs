//! Several threads that project, each the partitions of its share.
//!
//! The projector's own thread reads the log and deals what it has read out by partition, so that all records of a partition
//! go the same way, in their order. With little to do it does the work itself: to wake another takes as long as to project
//! some records. What is more, or belongs to a thread that is busy, is queued for that thread, which takes a batch of what
//! waits for it at once. So batches grow with the load.
//!
//! What is dealt out and not committed yet is bounded in sum, over all threads: beyond that the log is not read. So one busy
//! partition holds up the others only once it is that far behind.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::BATCH;
use super::driver::{Around, Driver, Ended};
use super::share::{Share, owner};
use super::{Projector, status};
use crate::log::{Entry, Positions, READ_BYTES};
use crate::panics;
use crate::store::StoreError;

/// So many records are projected by the thread that has read them, where nobody else works on their partitions: some hundred
/// microseconds.
const FEW: usize = 32;

/// The threads, and what each has to do.
pub(super) struct Projectors {
    workers: Vec<Worker>,
    /// By partition, whose it is.
    owners: Vec<usize>,
    table: Arc<Table>,
    around: Arc<Around>,
    threads: Vec<JoinHandle<()>>,
}

/// One of the threads, as the reader sees it.
struct Worker {
    /// The thread has it while it works, and the reader while the thread has nothing to do.
    driver: Arc<Mutex<Driver>>,
    partitions: Arc<[u32]>,
    /// What the reader is about to give it.
    part: Vec<Entry>,
}

/// What is dealt out.
struct Table {
    state: Mutex<State>,
    /// By thread: there is something to do, or nothing will come any more.
    filled: Vec<Condvar>,
    /// Something was done.
    done: Condvar,
    /// Records that may be dealt out.
    most: usize,
}

struct State {
    queues: Vec<Queue>,
    /// What is in the queues, and what is being worked on.
    records: usize,
    bytes: usize,
    /// Nothing will come any more; what is there is done.
    closed: bool,
    /// Why nothing more is done.
    ended: Option<Ended>,
}

#[derive(Default)]
struct Queue {
    parts: Vec<Part>,
    /// Where the log goes on after all that was put here.
    until: Option<Arc<Positions>>,
    is_busy: bool,
}

/// Records of one thread's partitions.
struct Part {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Queue {
    fn is_idle(&self) -> bool {
        !self.is_busy && self.parts.is_empty()
    }
}

/// What a thread has taken.
struct Taken {
    parts: Vec<Part>,
    /// Where the log goes on, if that was all.
    until: Option<Arc<Positions>>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Under this lock each change is made in one go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'t>(condition: &Condvar, state: MutexGuard<'t, State>) -> MutexGuard<'t, State> {
        condition.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits for a thread, up to a batch of it, as soon as there is something; nothing once there is no more to come.
    fn take(&self, worker: usize) -> Option<Taken> {
        let mut state = self.lock();
        loop {
            if state.ended.is_some() {
                return None;
            }
            let queue = &mut state.queues[worker];
            if !queue.parts.is_empty() {
                let mut records = 0;
                let fit = queue.parts.iter().take_while(|part| {
                    let fits = records == 0 || records + part.entries.len() <= BATCH;
                    records += part.entries.len();
                    fits
                });
                let fit = fit.count();
                let parts: Vec<Part> = queue.parts.drain(..fit).collect();
                queue.is_busy = true;
                let until = queue.until.clone().filter(|_| queue.parts.is_empty());
                return Some(Taken { parts, until });
            }
            if state.closed {
                return None;
            }
            state = Table::wait(&self.filled[worker], state);
        }
    }

    /// A thread has done what it took. `say` gets where its partitions are, if nothing more waits for it.
    fn done(&self, worker: usize, records: usize, bytes: usize, say: impl FnOnce(&Positions)) {
        let mut state = self.lock();
        state.records -= records;
        state.bytes -= bytes;
        let queue = &mut state.queues[worker];
        queue.is_busy = false;
        if queue.parts.is_empty()
            && let Some(until) = queue.until.take()
        {
            say(&until);
        }
        self.done.notify_one();
    }

    /// Nothing more is done. The first reason counts.
    fn end(&self, why: Ended) {
        self.lock().ended.get_or_insert(why);
        self.notify_all();
    }

    fn notify_all(&self) {
        self.filled.iter().for_each(Condvar::notify_one);
        self.done.notify_one();
    }
}

impl Projectors {
    /// Threads for the shares of a projector, `of` in all. `within` gives each partition's number within its topic.
    pub(super) fn start(
        projector: &Projector,
        around: &Arc<Around>,
        of: usize,
        within: &[u32],
    ) -> std::io::Result<Projectors> {
        let table = Arc::new(Table {
            state: Mutex::new(State {
                queues: (0..of).map(|_| Queue::default()).collect(),
                records: 0,
                bytes: 0,
                closed: false,
                ended: None,
            }),
            filled: (0..of).map(|_| Condvar::new()).collect(),
            done: Condvar::new(),
            most: BATCH * of,
        });
        let owners = within.iter().map(|within| owner(*within, of)).collect();
        let mut workers =
            Projectors { workers: Vec::new(), owners, table, around: around.clone(), threads: Vec::with_capacity(of) };
        tracing::info!(threads = of, "several threads project");
        around.status.set_positions(&projector.positions());
        for (number, share) in Share::all(of, within, &around.status.front()).into_iter().enumerate() {
            let partitions: Arc<[u32]> = share.partitions.clone().into();
            let driver = Driver::new(projector.with_share(share), around.clone(), status::READER + 1 + number);
            let worker = Worker { driver: Arc::new(Mutex::new(driver)), partitions, part: Vec::new() };
            workers.threads.push(workers.spawn(number, &worker)?);
            workers.workers.push(worker);
        }
        Ok(workers)
    }

    fn spawn(&self, number: usize, worker: &Worker) -> std::io::Result<JoinHandle<()>> {
        let (table, around) = (self.table.clone(), self.around.clone());
        let (driver, partitions) = (worker.driver.clone(), worker.partitions.clone());
        let run = move || {
            let _vital = panics::abort_on_panic("the projector");
            while let Some(Taken { parts, until }) = table.take(number) {
                let bytes = parts.iter().map(|part| part.bytes).sum();
                let mut parts = parts.into_iter().map(|part| part.entries);
                let mut entries = parts.next().unwrap_or_default();
                parts.for_each(|more| entries.extend(more));
                let worked = {
                    let mut driver = lock(&driver);
                    // If more waits for it, nothing is known of the partitions beyond these records.
                    let known = driver.projector.positions();
                    driver.work(&entries, until.as_deref().unwrap_or(&known))
                };
                match worked {
                    Ok(()) => {
                        table.done(number, entries.len(), bytes, |until| around.status.advance(&partitions, until))
                    }
                    Err(ended) => table.end(ended),
                }
            }
        };
        std::thread::Builder::new().name(format!("projector-{}", number + 1)).spawn(run)
    }

    /// Deals out what was read; `positions` is where the log goes on after it. Waits while too much is dealt out.
    pub(super) fn give(&mut self, entries: Vec<Entry>, positions: &Positions) -> Result<(), Ended> {
        let is_few = entries.len() <= FEW;
        for entry in entries {
            let owner = self.owners[entry.at.partition as usize];
            self.workers[owner].part.push(entry);
        }

        let until = Arc::new(positions.clone());
        let mut here = Vec::new();
        {
            let mut state = self.table.lock();
            while state.ended.is_none() && (state.records >= self.table.most || state.bytes >= READ_BYTES) {
                state = Table::wait(&self.table.done, state);
            }
            if let Some(ended) = state.ended {
                return Err(ended);
            }
            for (number, worker) in self.workers.iter_mut().enumerate() {
                let is_idle = state.queues[number].is_idle();
                if is_idle && worker.part.is_empty() {
                    continue;
                }
                if is_idle && is_few {
                    here.push(number);
                    continue;
                }
                state.put(number, std::mem::take(&mut worker.part), &until, &self.table.filled[number]);
            }
        }
        // Only this thread gives them something to do, so nobody works on these meanwhile.
        for number in here {
            let worker = &mut self.workers[number];
            let worked = lock(&worker.driver).work(&worker.part, positions);
            worker.part.clear();
            worked.inspect_err(|ended| self.table.end(*ended))?;
        }
        Ok(())
    }

    /// Nothing was read up to these positions but what was dealt out.
    pub(super) fn pass(&self, positions: &Positions) -> Result<(), Ended> {
        let state = self.table.lock();
        let status = &self.around.status;
        if let Some(ended) = state.ended {
            return Err(ended);
        }
        if state.queues.iter().all(Queue::is_idle) {
            status.set_positions(positions);
        } else {
            let idle = self.workers.iter().zip(&state.queues).filter(|(_, queue)| queue.is_idle());
            idle.for_each(|(worker, _)| status.advance(&worker.partitions, positions));
        }
        Ok(())
    }

    /// Returns once all that was dealt out is done.
    pub(super) fn settle(&self) -> Result<(), Ended> {
        let mut state = self.table.lock();
        while state.ended.is_none() && !state.queues.iter().all(Queue::is_idle) {
            state = Table::wait(&self.table.done, state);
        }
        state.ended.map_or(Ok(()), Err)
    }

    /// What `what` makes of each projector, one after the other.
    pub(super) fn each<T>(&self, mut what: impl FnMut(&mut Projector) -> T) -> Vec<T> {
        self.workers.iter().map(|worker| what(&mut lock(&worker.driver).projector)).collect()
    }

    /// Ends the threads, once all that was dealt out is done, and writes that everything up to these positions is. Without
    /// that the next start would look through the log's tail for what it has.
    pub(super) fn finish(mut self, positions: &Positions) -> Result<(), StoreError> {
        self.close();
        let is_done = self.table.lock().ended.is_none();
        let first = self.workers.first().filter(|_| is_done);
        first.map_or(Ok(()), |worker| lock(&worker.driver).projector.settle_at(positions))
    }

    fn close(&mut self) {
        self.table.lock().closed = true;
        self.table.notify_all();
        for thread in self.threads.drain(..) {
            // It ends without an error: a panic of it ends the process.
            drop(thread.join());
        }
    }
}

impl Drop for Projectors {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// Something for a thread; without entries only how far its partitions are read.
    fn put(&mut self, worker: usize, entries: Vec<Entry>, until: &Arc<Positions>, filled: &Condvar) {
        let queue = &mut self.queues[worker];
        queue.until = Some(until.clone());
        if entries.is_empty() {
            return;
        }
        let bytes = entries.iter().map(bytes_of).sum();
        self.records += entries.len();
        self.bytes += bytes;
        queue.parts.push(Part { entries, bytes });
        filled.notify_one();
    }
}

fn bytes_of(entry: &Entry) -> usize {
    match &entry.record {
        Ok(record) => record.value.len(),
        Err(foreign) => foreign.value.as_ref().map_or(0, |value| value.len()),
    }
}

fn lock(driver: &Mutex<Driver>) -> MutexGuard<'_, Driver> {
    // A panic of whoever holds it ends the process.
    driver.lock().unwrap_or_else(PoisonError::into_inner)
}
