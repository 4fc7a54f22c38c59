//! Who gets which work: from what waits for a group to a lease in the log, and from there to a worker.
//!
//! One thread of this node looks after the groups that have workers here ([`thread`]). Of each it holds the threads whose work
//! could be next, and the workers with credit left ([`group`]); [`ready`] says whose turn it is, [`waits`] what an event
//! waited for, [`workers`] who takes how much. It decides nothing: a choice is a record, `work_leased`, that the projector
//! judges (`projector/work.rs`), and what other nodes do at the same time is refused there or here. So all that it holds may
//! be late or incomplete and is read from the store again; [`index`] sees to it that what waits is found there.
//!
//! Invariants:
//! - it hears of each commit after that is visible, and never holds up the projector: what it cannot take in is forgotten, and
//!   all is looked up again;
//! - a lease is given to its worker once it is in the store, and once; if the worker is gone by then, it ends as `lost`;
//! - nothing is given out before this node's index of what waits for the group is complete;
//! - what depends on no worker, each node sees to for all groups ([`watch`]);
//! - what is held in memory is bounded, for each group and in the feed; what does not fit stays in the store, and is found
//!   there when there is room.

mod found;
mod group;
mod head;
mod inbox;
pub mod index;
mod ready;
mod thread;
mod waits;
mod watch;
mod workers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use uuid::Uuid;

use self::inbox::{Inbox, Message};
use self::watch::Bell;
use crate::auth::Principal;
use crate::ingest::submit::Submit;
use crate::log::Record;
use crate::projector::Status;
use crate::projector::level::Level;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids::{self, SERVER_USER};
use crate::protocol::kinds::{
    GROUP_DELETED, GROUP_PAUSED, GROUP_RESUMED, GROUP_SET, WORK_PAUSED, WORK_RESUMED, WORK_SETTLED,
};
use crate::protocol::work::{
    Delivery, GroupRecord, GroupSettings, MAX_DELAY_MS, Outcome, Settlement, Work, WorkPausedRecord, WorkSettledRecord,
    check_group, check_lease_ms, check_reason, no_lease,
};
use crate::store::{Depth, GroupRow, Store, WorkChange};
use crate::{clock, telemetry};

/// How many paused threads a group's page shows.
const PAUSED_SHOWN: usize = 100;
/// How often it is counted for one answer what waits for a group whose settings change meanwhile.
const COUNTS: u32 = 10;
/// How much work a worker may hold at once.
pub const MAX_CREDIT: u32 = 1_000;

/// Takes work to its worker; `false` if that is gone. It must not block.
pub type Sink = Box<dyn Fn(Work) -> bool + Send>;

/// What a worker takes.
#[derive(Debug, Clone, Default)]
pub struct Wants {
    /// How much it may hold at once.
    pub credit: u32,
    /// Of the group's kinds only these.
    pub kinds: Option<Vec<String>>,
    /// How long its leases last, unless as long as the group says.
    pub lease_ms: Option<u64>,
}

impl Wants {
    pub fn check(&self) -> Result<(), Error> {
        if self.credit > MAX_CREDIT {
            return Err(Error::field("credit", format!("credit is at most {MAX_CREDIT}")));
        }
        self.lease_ms.map_or(Ok(()), check_lease_ms)?;
        match &self.kinds {
            Some(kinds) => GroupSettings { kinds: kinds.clone(), ..GroupSettings::default() }.check(),
            None => Ok(()),
        }
    }
}

/// How a worker settles.
#[derive(Debug, Clone, Copy)]
pub struct Settling<'a> {
    pub outcome: Outcome,
    pub reason: Option<&'a str>,
    /// Of `retry`: how long it is put off, instead of the group's backoff.
    pub delay_ms: Option<u64>,
}

/// A group, as its page shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStats {
    pub depth: Depth,
    /// When the event was published that waits longest; milliseconds.
    pub oldest_at: Option<u64>,
    /// Threads that are paused, of many the first ones.
    pub paused_threads: Vec<String>,
    /// Workers that are connected to this node.
    pub workers: usize,
}

/// Somebody who takes work of a group. When this is dropped the worker is gone, and what it holds is lost.
pub struct Consumer {
    inbox: Arc<Inbox>,
    key: Arc<str>,
    id: u64,
    /// What it holds is not lost with it.
    detached: bool,
}

impl Consumer {
    /// From now on it takes this.
    pub fn set(&self, wants: Wants) {
        self.inbox.push(Message::Set { key: self.key.clone(), id: self.id, wants });
    }

    /// Takes no more; returns once nothing is on its way to it.
    async fn finish(&self) {
        let (sender, finished) = oneshot::channel();
        self.inbox.push(Message::Finish { key: self.key.clone(), id: self.id, done: sender });
        // Fails only when the server stops.
        drop(finished.await);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.inbox.push(Message::Leave { key: self.key.clone(), id: self.id, loses: !self.detached });
    }
}

pub struct Dispatcher {
    store: Arc<Store>,
    submit: Arc<Submit>,
    level: Arc<Level>,
    inbox: Arc<Inbox>,
    bell: Arc<Bell>,
    next_id: AtomicU64,
    /// Who counts what waits: one at a time, since a count reads all of it.
    counting: Arc<Semaphore>,
}

impl Dispatcher {
    /// Starts its threads, which end after [`Dispatcher::stop`]. What waits is held in so much memory.
    pub fn start(
        store: Arc<Store>,
        submit: Arc<Submit>,
        level: Arc<Level>,
        projector: Arc<Status>,
        memory: usize,
    ) -> Result<(Arc<Dispatcher>, [std::thread::JoinHandle<()>; 2]), std::io::Error> {
        let inbox = Arc::new(Inbox::default());
        let bell = Arc::new(Bell::default());
        let (hears, rings) = (inbox.clone(), bell.clone());
        let listener = move |changes: Vec<WorkChange>| {
            if changes.iter().any(|change| matches!(change, WorkChange::Group { .. })) {
                rings.ring();
            }
            hears.changed(changes);
        };
        store.listen_to_work(listener).map_err(std::io::Error::other)?;
        let thread = thread::start(store.clone(), submit.clone(), inbox.clone(), memory)?;
        let watch = watch::start(store.clone(), submit.clone(), projector, bell.clone())?;
        let (next_id, counting) = (AtomicU64::new(1), Arc::new(Semaphore::new(1)));
        Ok((Arc::new(Dispatcher { store, submit, level, inbox, bell, next_id, counting }), [thread, watch]))
    }

    pub fn stop(&self) {
        self.bell.close();
        self.inbox.close();
    }

    // Groups.

    /// The group, if it is there; a node that lags looks again once it is level with the log.
    pub async fn group(&self, tenant: &str, group: &str) -> Result<GroupRow, Error> {
        let look = || self.store.group(tenant, group).map_err(Error::from)?.ok_or_else(no_group);
        self.level.look(look).await
    }

    /// Makes a group if it is not there yet: with the defaults, but for these kinds.
    pub async fn ensure(&self, who: &Principal, group: &str, kinds: Option<Vec<String>>) -> Result<(), Error> {
        check_group(group)?;
        match self.group(&who.tenant, group).await {
            Err(error) if error.code == Code::NotFound => {}
            found => return found.map(drop),
        }
        let mut settings = GroupSettings::default();
        if let Some(kinds) = kinds {
            settings.kinds = kinds;
        }
        self.set(who, group, settings, true).await
    }

    /// Makes a group or changes it; with `if_absent` one that is there stays as it is.
    pub async fn set(
        &self,
        who: &Principal,
        group: &str,
        settings: GroupSettings,
        if_absent: bool,
    ) -> Result<(), Error> {
        settings.check()?;
        self.write(who, group, GROUP_SET, Some(settings), if_absent).await
    }

    pub async fn pause(&self, who: &Principal, group: &str, paused: bool) -> Result<(), Error> {
        self.write(who, group, if paused { GROUP_PAUSED } else { GROUP_RESUMED }, None, false).await
    }

    /// Nobody gets work of a thread until it is resumed.
    pub async fn pause_thread(&self, who: &Principal, group: &str, thread: &str, paused: bool) -> Result<(), Error> {
        check_group(group)?;
        ids::check_thread(thread)?;
        let row = self.group(&who.tenant, group).await?;
        let record = WorkPausedRecord {
            kind: if paused { WORK_PAUSED } else { WORK_RESUMED }.to_owned(),
            id: clock::event_id(),
            tenant: who.tenant.to_string(),
            thread: thread.to_owned(),
            group: group.to_owned(),
            group_id: Uuid::from_bytes(row.id),
            by: who.user.to_string(),
            at: clock::rfc3339(clock::now_ms()),
        };
        self.submit.write(record.id, Record::from(&record)).await.map(drop)
    }

    pub async fn delete(&self, who: &Principal, group: &str) -> Result<(), Error> {
        self.write(who, group, GROUP_DELETED, None, false).await
    }

    async fn write(
        &self,
        who: &Principal,
        group: &str,
        kind: &str,
        settings: Option<GroupSettings>,
        if_absent: bool,
    ) -> Result<(), Error> {
        check_group(group)?;
        let record = GroupRecord {
            kind: kind.to_owned(),
            id: clock::event_id(),
            tenant: who.tenant.to_string(),
            group: group.to_owned(),
            settings,
            if_absent,
            by: who.user.to_string(),
            at: clock::rfc3339(clock::now_ms()),
        };
        self.submit.write(record.id, Record::from(&record)).await.map(drop)
    }

    /// How much waits for a group, and who works on it.
    pub async fn stats(&self, tenant: &str, group: &str) -> Result<GroupStats, Error> {
        let row = self.group(tenant, group).await?;
        let (store, whose) = (self.store.clone(), (tenant.to_owned(), group.to_owned()));
        let stopping = || Error::new(Code::Unavailable, "the server is stopping");
        let turn = self.counting.clone().acquire_owned().await.map_err(|_| stopping())?;
        let workers = self.inbox.workers_of(&key(tenant, group));
        let count = move || {
            // Given up with the count, also if nobody waits for that any more.
            let _turn = turn;
            let ((tenant, group), mut row) = ((&*whose.0, &*whose.1), row);
            let depth = match store.depth(tenant, group) {
                Some(depth) => depth,
                None => {
                    let mut changed = 0;
                    while !(index::complete(&store, tenant, group, &row, &|| true)?
                        && store.count_depth(tenant, group, &row, &|| true)?)
                    {
                        // It was changed meanwhile.
                        changed += 1;
                        if changed == COUNTS {
                            let why = "the group's settings are changed faster than what waits for it is counted";
                            return Err(Error::new(Code::Unavailable, why).retry_after(1_000));
                        }
                        row = store.group(tenant, group)?.ok_or_else(no_group)?;
                    }
                    store.depth(tenant, group).ok_or_else(no_group)?
                }
            };
            let paused = store.paused_threads(tenant, group, &row.id, PAUSED_SHOWN)?;
            let paused_threads = paused.into_iter().map(|(thread, _)| thread).collect();
            let oldest_at = found::oldest(&store, tenant, group, &row)?;
            Ok::<_, Error>(GroupStats { depth, oldest_at, paused_threads, workers })
        };
        tokio::task::spawn_blocking(count).await.map_err(|_| stopping())?
    }

    // Work.

    /// From now on work of the group, which is there, goes to `sink`.
    pub fn consume(&self, who: &Principal, group: &str, wants: Wants, sink: Sink) -> Consumer {
        let (key, id) = (key(&who.tenant, group), self.next_id.fetch_add(1, Ordering::Relaxed));
        self.inbox.push(Message::Join {
            key: key.clone(),
            id,
            tenant: who.tenant.as_ref().into(),
            group: group.into(),
            user: who.user.as_ref().into(),
            wants,
            sink,
        });
        Consumer { inbox: self.inbox.clone(), key, id, detached: false }
    }

    /// Up to `n` pieces of work at once; waits so long for the first. They belong to the user and to no connection: what is not
    /// settled in time goes to another.
    pub async fn lease(&self, who: &Principal, group: &str, wants: Wants, wait: Duration) -> Result<Vec<Work>, Error> {
        wants.check()?;
        self.group(&who.tenant, group).await?;
        // As much as it may have at once.
        let (sender, mut work) = mpsc::channel(wants.credit.max(1) as usize);
        let mut consumer = self.consume(who, group, wants, Box::new(move |work| sender.try_send(work).is_ok()));
        let first = tokio::time::timeout(wait, work.recv()).await;
        consumer.finish().await;
        let mut given: Vec<Work> = first.ok().flatten().into_iter().collect();
        while let Ok(more) = work.try_recv() {
            given.push(more);
        }
        consumer.detached = true;
        Ok(given)
    }

    /// The record by which a worker settles, and its id. The projector says whether the lease is still the worker's.
    pub fn settlement(&self, who: &Principal, delivery: &str, how: Settling<'_>) -> Result<(Uuid, Record), Error> {
        let Settling { outcome, reason, delay_ms } = how;
        check_reason(reason)?;
        if delay_ms.is_some_and(|delay| delay > MAX_DELAY_MS) {
            return Err(Error::field("delay_ms", format!("delay_ms is at most {MAX_DELAY_MS}")));
        }
        let of = Delivery::parse(delivery)?;
        let now = clock::now_ms();
        let until = match outcome {
            Outcome::Extend => Some(now + of.lease_ms),
            Outcome::Retry => Some(now + self.delay(who, &of, delay_ms)?),
            _ => None,
        };
        let settled = WorkSettledRecord {
            kind: WORK_SETTLED.to_owned(),
            id: clock::event_id(),
            tenant: who.tenant.to_string(),
            thread: of.thread,
            group: of.group,
            lease: of.lease,
            outcome: outcome.into(),
            reason: reason.map(str::to_owned),
            until: until.map(clock::rfc3339),
            by: who.user.to_string(),
            at: clock::rfc3339(now),
        };
        Ok((settled.id, Record::from(&settled)))
    }

    /// Settles, and says whether that counted.
    pub async fn settle(&self, who: &Principal, delivery: &str, how: Settling<'_>) -> Result<(), Error> {
        let (id, record) = self.settlement(who, delivery, how)?;
        self.submit.write(id, record).await?;
        telemetry::work_settled(Settlement::from(how.outcome).as_str()).increment(1);
        Ok(())
    }

    /// How long a retry is put off: as the worker says, or by the group's backoff.
    fn delay(&self, who: &Principal, of: &Delivery, delay_ms: Option<u64>) -> Result<u64, Error> {
        if let Some(delay) = delay_ms {
            return Ok(delay);
        }
        let Some(row) = self.store.group(&who.tenant, &of.group)? else { return Err(no_lease()) };
        let work = self.store.work(&who.tenant, &of.thread, &of.group)?;
        let leases = work.iter().flat_map(|work| &work.leases);
        let lease = leases.into_iter().find(|lease| lease.id == *of.lease.as_bytes());
        let attempt = lease.map_or(1, |lease| lease.attempt);
        let delay = row.backoff_min_ms.saturating_mul(1 << attempt.saturating_sub(1).min(20)).min(row.backoff_max_ms);
        Ok(delay - (delay as f64 / 2.0 * clock::random_share()) as u64)
    }
}

/// The record by which the server ends a lease.
fn ended((tenant, thread, group): (&str, &str, &str), lease: Uuid, outcome: Settlement) -> WorkSettledRecord {
    WorkSettledRecord {
        kind: WORK_SETTLED.to_owned(),
        id: clock::event_id(),
        tenant: tenant.to_owned(),
        thread: thread.to_owned(),
        group: group.to_owned(),
        lease,
        outcome,
        reason: None,
        until: None,
        by: SERVER_USER.to_owned(),
        at: clock::rfc3339(clock::now_ms()),
    }
}

fn no_group() -> Error {
    Error::new(Code::NotFound, "there is no such group").at("group")
}

/// A group, as tables have it.
fn key(tenant: &str, group: &str) -> Arc<str> {
    format!("{tenant}/{group}").into()
}
