//! The edge: sockets in, frames and replies out. Nothing here decides; it parses, checks rights and asks the parts.

mod commands;
pub mod http;
pub mod listener;
pub mod reply;
pub mod session;
pub mod socket;
pub mod subscriptions;
pub mod threads;
pub mod upgrade;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use metrics::{Counter, Gauge};
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::access::{self, Standing};
use crate::error::Error;
use crate::event::{self, LogEvent, Priority};
use crate::hub::Hub;
use crate::identity::Principal;
use crate::identity::jwt::Verifier;
use crate::identity::tickets::Tickets;
use crate::log::Grant;
use crate::outbox::{Answer, Outbox};
use crate::store::Store;
use crate::submit::{Submit, draft};
use crate::telemetry;

/// What sessions and requests work with.
pub struct Context {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub submit: Submit,
    pub verifier: Verifier,
    pub tickets: Tickets,
    /// The log's identity.
    pub epoch: String,
    pub sessions: Sessions,
    /// Origins that browsers may come from, beside the server's own.
    pub origins: Vec<String>,
    pub health: crate::health::Health,
    pub metrics: metrics_exporter_prometheus::PrometheusHandle,
}

/// A publish as either interface has it, its values checked.
pub struct Asked<'a> {
    pub thread: &'a str,
    pub kind: &'a str,
    pub data: &'a RawValue,
    pub key: Option<&'a str>,
    pub run: Option<&'a str>,
    pub parent: Option<u64>,
    pub priority: Option<Priority>,
}

impl Context {
    /// The event that a publish becomes, and by which right; or why it is plainly wrong.
    pub fn admit<'a>(&self, who: &'a Principal, asked: Asked<'a>) -> Result<(LogEvent<'a>, Grant), Error> {
        let class = event::classify(asked.kind)?;
        event::check_data(class, asked.data)?;
        let grant = access::publish(who.scopes, class, || self.standing(who, asked.thread))?;
        event::check_run(class, asked.run)?;
        let mut event = draft(&who.tenant, &who.user, asked.thread, asked.kind, asked.data);
        event.key = asked.key.map(Into::into);
        event.run = asked.run.map(Into::into);
        event.parent = asked.parent;
        event.priority = asked.priority;
        Ok((event, grant))
    }

    /// The user's place in a thread, now.
    pub fn standing(&self, who: &Principal, thread: &str) -> Result<Standing, Error> {
        let member = || self.store.is_member(&who.tenant, thread, &who.user);
        Ok(match member()? {
            true => Standing::Member,
            false if self.store.thread(&who.tenant, thread)?.is_none() => Standing::NoThread,
            // Asked again: the thread may have been made, with its first member, between the two lookups.
            false if member()? => Standing::Member,
            false => Standing::Stranger,
        })
    }

    /// The user's threads with their newest seqs. Walks a range: for blocking threads.
    pub fn threads_with_heads(&self, who: &Principal) -> Result<Vec<(String, u64)>, Error> {
        let threads = self.store.threads_of(&who.tenant, &who.user)?;
        threads.into_iter().map(|thread| Ok((thread.clone(), self.store.head(&who.tenant, &thread)?))).collect()
    }
}

/// The sessions that are open.
pub struct Sessions {
    open: Mutex<Open>,
    count: watch::Sender<usize>,
    gauge: Gauge,
    total: Counter,
}

#[derive(Default)]
struct Open {
    next: u64,
    outboxes: HashMap<u64, Weak<Outbox>>,
    draining: bool,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            open: Mutex::default(),
            count: watch::channel(0).0,
            gauge: telemetry::connections(),
            total: telemetry::connections_total(),
        }
    }
}

/// A session's place among the open ones, given up when dropped.
pub struct Entered {
    sessions: Arc<Context>,
    id: u64,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every session to finish what it has accepted and to close; those that come later are told at once.
    pub fn drain(&self) {
        let outboxes: Vec<_> = {
            let mut open = self.lock();
            open.draining = true;
            open.outboxes.values().filter_map(Weak::upgrade).collect()
        };
        for outbox in outboxes {
            outbox.push_answer(Answer::Drain);
        }
    }

    /// Waits until no session is open.
    pub async fn emptied(&self) {
        // Fails only when the sender is gone, and that is `self`.
        drop(self.count.subscribe().wait_for(|count| *count == 0).await);
    }

    /// Bytes of events waiting for sockets, over all sessions.
    pub fn outbox_bytes(&self) -> usize {
        let outboxes: Vec<_> = self.lock().outboxes.values().filter_map(Weak::upgrade).collect();
        outboxes.iter().map(|outbox| outbox.event_bytes()).sum()
    }
}

impl Context {
    /// Counts a session in until the returned guard is dropped.
    pub fn enter(self: &Arc<Context>, outbox: &Arc<Outbox>) -> Entered {
        let sessions = &self.sessions;
        let mut open = sessions.lock();
        let id = open.next;
        open.next += 1;
        open.outboxes.insert(id, Arc::downgrade(outbox));
        let draining = open.draining;
        drop(open);
        if draining {
            outbox.push_answer(Answer::Drain);
        }
        sessions.count.send_modify(|count| *count += 1);
        sessions.gauge.increment(1.0);
        sessions.total.increment(1);
        Entered { sessions: self.clone(), id }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let sessions = &self.sessions.sessions;
        sessions.lock().outboxes.remove(&self.id);
        sessions.gauge.decrement(1.0);
        sessions.count.send_modify(|count| *count -= 1);
    }
}
