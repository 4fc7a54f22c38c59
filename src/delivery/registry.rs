//! Who is connected to this node: every session and stream, by user, for limits, revocation, drain and the admin's list.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use metrics::{Counter, Gauge};
use tokio::sync::watch;

use super::outbox::{Answer, Outbox};
use crate::auth::Principal;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::{SessionItem, Transport};
use crate::{clock, telemetry};

/// Clients that are told to come back within one second, when the server drains: what one node takes in without haste.
const RETURNS_PER_SECOND: u64 = 500;
/// The shortest and the longest time over which a drain spreads its clients, in milliseconds.
const SPREAD: (u64, u64) = (1_000, 60_000);
/// Nobody is told to come back sooner: the next server must have started.
const FIRST_RETURN: u64 = 200;

struct Session {
    outbox: Weak<Outbox>,
    connection: String,
    transport: Transport,
    /// Milliseconds.
    since: u64,
    /// Once it is known: the user, and `tenant/user`.
    who: Option<(Arc<str>, Arc<str>)>,
}

#[derive(Default)]
struct Open {
    next: u64,
    sessions: BTreeMap<u64, Session>,
    /// By `tenant/user`.
    by_user: HashMap<Arc<str>, Vec<u64>>,
    draining: bool,
}

pub struct Registry {
    open: Mutex<Open>,
    /// Registry of one user.
    limit: usize,
    count: watch::Sender<usize>,
    connections: Gauge,
    streams: Gauge,
    total: Counter,
}

/// A session's place among the open ones, given up when dropped.
pub struct Registration {
    sessions: Arc<Registry>,
    id: u64,
}

impl Registry {
    /// `limit` is the number of sessions that one user may have.
    pub fn new(limit: usize) -> Registry {
        Registry {
            open: Mutex::default(),
            limit,
            count: watch::channel(0).0,
            connections: telemetry::connections(),
            streams: telemetry::streams(),
            total: telemetry::connections_total(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a session in until the returned guard is dropped.
    pub fn register(
        self: &Arc<Registry>,
        outbox: &Arc<Outbox>,
        connection: &str,
        transport: Transport,
    ) -> Registration {
        let mut open = self.lock();
        let id = open.next;
        open.next += 1;
        let session = Session {
            outbox: Arc::downgrade(outbox),
            connection: connection.to_owned(),
            transport,
            since: clock::now_ms(),
            who: None,
        };
        open.sessions.insert(id, session);
        let draining = open.draining;
        drop(open);
        if draining {
            outbox.push_answer(Answer::Drain { retry_after_ms: SPREAD.0 });
        }
        self.count.send_modify(|count| *count += 1);
        match transport {
            Transport::Websocket => {
                self.connections.increment(1.0);
                self.total.increment(1);
            }
            Transport::Sse => self.streams.increment(1.0),
        }
        Registration { sessions: self.clone(), id }
    }

    /// Ends the user's sessions. `user` is `tenant/user`.
    pub fn revoke(&self, user: &str) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::Revoked);
        }
    }

    /// The user is no longer a member of a thread: its sessions look whether they may read it. `user` is `tenant/user`.
    pub fn tell_left(&self, user: &str, thread: &str) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::Left { thread: thread.into() });
        }
    }

    fn outboxes_of(&self, user: &str) -> Vec<Arc<Outbox>> {
        let open = self.lock();
        let ids = open.by_user.get(user).into_iter().flatten();
        ids.filter_map(|id| open.sessions.get(id)?.outbox.upgrade()).collect()
    }

    /// Tells every session to finish what it has accepted and to close, and when to come back: each at a time of its own,
    /// so that they do not all arrive together. Those that come later are told at once.
    pub fn drain(&self) {
        let outboxes: Vec<_> = {
            let mut open = self.lock();
            open.draining = true;
            open.sessions.values().filter_map(|session| session.outbox.upgrade()).collect()
        };
        let count = outboxes.len() as u64;
        let spread = (count * 1_000 / RETURNS_PER_SECOND).clamp(SPREAD.0, SPREAD.1);
        for (i, outbox) in (0..).zip(outboxes) {
            outbox.push_answer(Answer::Drain { retry_after_ms: FIRST_RETURN + spread * i / count });
        }
    }

    /// Waits until no session is open.
    pub async fn emptied(&self) {
        // Fails only when the sender is gone, and that is `self`.
        drop(self.count.subscribe().wait_for(|count| *count == 0).await);
    }

    /// Bytes of events waiting for sockets, over all sessions.
    pub fn outbox_bytes(&self) -> usize {
        let outboxes: Vec<_> = self.lock().sessions.values().filter_map(|session| session.outbox.upgrade()).collect();
        outboxes.iter().map(|outbox| outbox.event_bytes()).sum()
    }

    /// The tenant's sessions behind the number `behind`, oldest first, each with its number; those of one user if one is
    /// given.
    pub fn list(&self, tenant: &str, user: Option<&str>, behind: Option<u64>, limit: usize) -> Vec<(u64, SessionItem)> {
        let open = self.lock();
        let from = behind.map_or(0, |behind| behind + 1);
        let mine = |session: &Session| {
            let (name, key) = session.who.as_ref()?;
            let fits = key.strip_prefix(tenant).is_some_and(|rest| rest.starts_with('/'));
            (fits && user.is_none_or(|user| *user == **name)).then(|| name.to_string())
        };
        let found = open.sessions.range(from..).filter_map(|(id, session)| Some((*id, mine(session)?, session)));
        let item = |(id, user, session): (u64, String, &Session)| {
            let item = SessionItem {
                connection: session.connection.clone(),
                user,
                transport: session.transport,
                connected_at: clock::rfc3339(session.since),
                outbox_bytes: session.outbox.upgrade().map_or(0, |outbox| outbox.event_bytes()),
            };
            (id, item)
        };
        found.take(limit).map(item).collect()
    }
}

impl Registration {
    /// Notes whose session it is; fails when the user has too many.
    pub fn identify(&self, who: &Principal) -> Result<(), Error> {
        let mut open = self.sessions.lock();
        let ids = open.by_user.entry(who.key.clone()).or_default();
        if ids.len() >= self.sessions.limit {
            let why = format!("the user has {} connections already", self.sessions.limit);
            return Err(Error::new(Code::RateLimited, why).retry_after(1_000));
        }
        ids.push(self.id);
        if let Some(session) = open.sessions.get_mut(&self.id) {
            session.who = Some((who.user.clone(), who.key.clone()));
        }
        Ok(())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let sessions = &self.sessions;
        let mut open = sessions.lock();
        let Some(session) = open.sessions.remove(&self.id) else { return };
        if let Some((_, key)) = session.who
            && let Some(ids) = open.by_user.get_mut(&key)
        {
            ids.retain(|id| *id != self.id);
            if ids.is_empty() {
                open.by_user.remove(&key);
            }
        }
        drop(open);
        match session.transport {
            Transport::Websocket => sessions.connections.decrement(1.0),
            Transport::Sse => sessions.streams.decrement(1.0),
        }
        sessions.count.send_modify(|count| *count -= 1);
    }
}
