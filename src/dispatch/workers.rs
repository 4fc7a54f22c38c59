//! The workers of a group on this node: who may take how much more.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Sink, Wants};
use crate::protocol::work::Work;

struct Worker {
    user: Arc<str>,
    wants: Wants,
    sink: Sink,
    /// Leases that it has, or that are on their way to it.
    held: u32,
    /// Of these, those on their way.
    on_the_way: u32,
    /// Who waits until nothing is on its way; it gets no more.
    finishing: Option<oneshot::Sender<()>>,
    finished: bool,
    /// It stands in the queue of those that are free.
    queued: bool,
}

impl Worker {
    fn is_free(&self) -> bool {
        !self.finished && self.held < self.wants.credit
    }
}

#[derive(Default)]
pub struct Workers {
    all: HashMap<u64, Worker>,
    /// Those with credit left, each after its turn at the end; and some that have none by now.
    free: VecDeque<u64>,
}

impl Workers {
    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn join(&mut self, id: u64, user: Arc<str>, wants: Wants, sink: Sink) {
        let (held, on_the_way, finishing, finished, queued) = (0, 0, None, false, false);
        self.all.insert(id, Worker { user, wants, sink, held, on_the_way, finishing, finished, queued });
        self.queue(id);
    }

    pub fn set(&mut self, id: u64, wants: Wants) {
        if let Some(worker) = self.all.get_mut(&id) {
            worker.wants = wants;
            self.queue(id);
        }
    }

    pub fn finish(&mut self, id: u64, done: oneshot::Sender<()>) {
        if let Some(worker) = self.all.get_mut(&id) {
            worker.finished = true;
            worker.finishing = Some(done);
            end_if_settled(worker);
        }
    }

    pub fn leave(&mut self, id: u64) {
        self.all.remove(&id);
    }

    /// Whether anybody can take more.
    pub fn any_free(&mut self) -> bool {
        while let Some(id) = self.free.front() {
            match self.all.get_mut(id) {
                Some(worker) if worker.is_free() => return true,
                Some(worker) => worker.queued = false,
                None => {}
            }
            self.free.pop_front();
        }
        false
    }

    /// The next one with credit left, up to `limit` of them; each goes to the end of the queue.
    pub fn turn(&mut self) -> Option<u64> {
        if !self.any_free() {
            return None;
        }
        let id = self.free.pop_front()?;
        self.free.push_back(id);
        Some(id)
    }

    pub fn waiting(&self) -> usize {
        self.free.len()
    }

    pub fn takes(&self, id: u64, kind: &str) -> bool {
        self.kinds_of(id).is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
    }

    /// The kinds that a worker takes, if not all.
    pub fn kinds_of(&self, id: u64) -> Option<&[String]> {
        self.all.get(&id)?.wants.kinds.as_deref()
    }

    pub fn takes_all(&self, id: u64) -> bool {
        self.kinds_of(id).is_none()
    }

    /// Something is on its way to a worker: the worker's user, and how long its leases last.
    pub fn send(&mut self, id: u64) -> Option<(Arc<str>, Option<u64>)> {
        let worker = self.all.get_mut(&id)?;
        worker.held += 1;
        worker.on_the_way += 1;
        Some((worker.user.clone(), worker.wants.lease_ms))
    }

    /// It has arrived; `false` if the worker is gone.
    pub fn give(&mut self, id: u64, work: Work) -> bool {
        let Some(worker) = self.all.get_mut(&id) else { return false };
        let taken = (worker.sink)(work);
        worker.on_the_way = worker.on_the_way.saturating_sub(1);
        end_if_settled(worker);
        taken
    }

    /// It was refused on its way.
    pub fn refuse(&mut self, id: u64) {
        if let Some(worker) = self.all.get_mut(&id) {
            worker.on_the_way = worker.on_the_way.saturating_sub(1);
            end_if_settled(worker);
            self.release(id);
        }
    }

    /// A lease of the worker's is over.
    pub fn release(&mut self, id: u64) {
        if let Some(worker) = self.all.get_mut(&id) {
            worker.held = worker.held.saturating_sub(1);
            self.queue(id);
        }
    }

    fn queue(&mut self, id: u64) {
        if let Some(worker) = self.all.get_mut(&id)
            && worker.is_free()
            && !std::mem::replace(&mut worker.queued, true)
        {
            self.free.push_back(id);
        }
    }
}

fn end_if_settled(worker: &mut Worker) {
    if worker.on_the_way == 0
        && let Some(done) = worker.finishing.take()
    {
        // Whoever waited may be gone.
        done.send(()).unwrap_or(());
    }
}
