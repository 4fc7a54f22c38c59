//! Who is connected to this node: every WebSocket session and every stream, by user.
//!
//! It serves the limit of sessions of one user, the end of a user's sessions (revocation), the drain of the node and the
//! admin's list. An entry lasts as long as its [`Registration`]. It does not keep the session alive: it reaches it through
//! its outbox, which it holds weakly.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use metrics::{Counter, Gauge};
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::outbox::{Answer, Outbox};
use crate::auth::Principal;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::{SessionItem, Transport};
use crate::{clock, telemetry};

/// How many clients of a draining server come back within one second: what another node accepts with ease.
const RETURNS_PER_SECOND: u64 = 500;
/// The shortest and the longest time over which a drain spreads its clients, in milliseconds.
const SPREAD: (u64, u64) = (1_000, 60_000);
/// The soonest return, in milliseconds: the next server must have started.
const FIRST_RETURN: u64 = 200;

/// When a client that finds no room may try again, in milliseconds. Another of its user's connections has to end first.
const NO_ROOM_RETRY: u64 = 30_000;

/// Sessions that one user may have on this node.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    pub user: usize,
    /// With scope `agent`.
    pub agent: usize,
}

/// Whose session it is.
struct Owner {
    user: Arc<str>,
    /// `tenant/user`.
    key: Arc<str>,
}

impl Owner {
    fn is_in(&self, tenant: &str) -> bool {
        self.key.strip_prefix(tenant).is_some_and(|rest| rest.starts_with('/'))
    }
}

struct Session {
    outbox: Weak<Outbox>,
    connection: String,
    transport: Transport,
    /// Milliseconds since the Unix epoch.
    since: u64,
    /// `None` until the client has authenticated.
    owner: Option<Owner>,
}

#[derive(Default)]
struct Sessions {
    next_id: u64,
    by_id: BTreeMap<u64, Session>,
    /// By `tenant/user`.
    by_user: HashMap<Arc<str>, Vec<u64>>,
    draining: bool,
}

pub struct Registry {
    sessions: Mutex<Sessions>,
    limits: ConnectionLimits,
    count: watch::Sender<usize>,
    connections: Gauge,
    streams: Gauge,
    total: Counter,
}

/// A session's entry, removed when this is dropped.
pub struct Registration {
    registry: Arc<Registry>,
    id: u64,
}

impl Registry {
    pub fn new(limits: ConnectionLimits) -> Registry {
        Registry {
            sessions: Mutex::default(),
            limits,
            count: watch::channel(0).0,
            connections: telemetry::connections(),
            streams: telemetry::streams(),
            total: telemetry::connections_total(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a session in until the returned guard is dropped.
    pub fn register(
        self: &Arc<Registry>,
        outbox: &Arc<Outbox>,
        connection: &str,
        transport: Transport,
    ) -> Registration {
        let session = Session {
            outbox: Arc::downgrade(outbox),
            connection: connection.to_owned(),
            transport,
            since: clock::now_ms(),
            owner: None,
        };
        let (id, draining) = {
            let mut sessions = self.lock();
            let id = sessions.next_id;
            sessions.next_id += 1;
            sessions.by_id.insert(id, session);
            (id, sessions.draining)
        };
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
        Registration { registry: self.clone(), id }
    }

    /// How many sessions and streams there are.
    pub fn count(&self) -> usize {
        *self.count.borrow()
    }

    /// Ends the user's sessions. `user` is `tenant/user`.
    pub fn revoke(&self, user: &str) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::Revoked);
        }
    }

    /// The user is no longer a member of a thread: each of its sessions looks whether it may still read that. `user` is
    /// `tenant/user`.
    pub fn notify_left(&self, user: &str, thread: &str) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::Left { thread: thread.into() });
        }
    }

    /// A delivery to the user was requeued: each of its sessions looks whether it is the one to make it. `user` is
    /// `tenant/user`.
    pub fn notify_requeued(&self, user: &str, thread: &str) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::Requeued { thread: thread.into() });
        }
    }

    /// Somebody wants a run cancelled that the user has started on the thread. `user` is `tenant/user`.
    pub fn notify_to_cancel(&self, user: &str, thread: &str, signal: &Utf8Bytes) {
        for outbox in self.outboxes_of(user) {
            outbox.push_answer(Answer::ToCancel { thread: thread.into(), signal: signal.clone() });
        }
    }

    fn outboxes_of(&self, user: &str) -> Vec<Arc<Outbox>> {
        let sessions = self.lock();
        let ids = sessions.by_user.get(user).into_iter().flatten();
        ids.filter_map(|id| sessions.by_id.get(id)?.outbox.upgrade()).collect()
    }

    /// Tells every session to finish what it has accepted and to close, and when its client is to come back: each at a time
    /// of its own, so that they do not all arrive together. A session that opens from now on gets the same answer.
    pub fn drain(&self) {
        let outboxes: Vec<_> = {
            let mut sessions = self.lock();
            sessions.draining = true;
            sessions.by_id.values().filter_map(|session| session.outbox.upgrade()).collect()
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
        // Not counted under the registry's lock: each outbox has its own.
        let outboxes: Vec<_> = self.lock().by_id.values().filter_map(|session| session.outbox.upgrade()).collect();
        outboxes.iter().map(|outbox| outbox.event_bytes()).sum()
    }

    /// The tenant's sessions with numbers greater than `after`, oldest first, each with its number; those of one user if one
    /// is given.
    pub fn list(&self, tenant: &str, user: Option<&str>, after: Option<u64>, limit: usize) -> Vec<(u64, SessionItem)> {
        let sessions = self.lock();
        let from = after.map_or(0, |after| after + 1);
        let mut found = Vec::new();
        for (id, session) in sessions.by_id.range(from..) {
            if found.len() == limit {
                break;
            }
            let Some(owner) = &session.owner else { continue };
            if owner.is_in(tenant) && user.is_none_or(|user| *user == *owner.user) {
                found.push((*id, session.item(owner)));
            }
        }
        found
    }
}

impl Session {
    fn item(&self, owner: &Owner) -> SessionItem {
        SessionItem {
            connection: self.connection.clone(),
            user: owner.user.to_string(),
            transport: self.transport,
            connected_at: clock::rfc3339(self.since),
            outbox_bytes: self.outbox.upgrade().map_or(0, |outbox| outbox.event_bytes()),
        }
    }
}

impl Registration {
    /// Says whose session it is; fails when the user has too many.
    pub fn identify(&self, who: &Principal) -> Result<(), Error> {
        let limits = self.registry.limits;
        let limit = if who.scopes.agent { limits.agent } else { limits.user };
        let mut sessions = self.registry.lock();
        let ids = sessions.by_user.entry(who.key.clone()).or_default();
        if ids.len() >= limit {
            let why = format!("the user has {} connections to this node; at most {limit} may be", ids.len());
            return Err(Error::new(Code::RateLimited, why).retry_after(NO_ROOM_RETRY));
        }
        ids.push(self.id);
        if let Some(session) = sessions.by_id.get_mut(&self.id) {
            session.owner = Some(Owner { user: who.user.clone(), key: who.key.clone() });
        }
        Ok(())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let registry = &self.registry;
        let removed = registry.lock().remove(self.id);
        match removed {
            Some(Transport::Websocket) => registry.connections.decrement(1.0),
            Some(Transport::Sse) => registry.streams.decrement(1.0),
            None => return,
        }
        registry.count.send_modify(|count| *count -= 1);
    }
}

impl Sessions {
    /// Removes a session; gives what it came over.
    fn remove(&mut self, id: u64) -> Option<Transport> {
        let session = self.by_id.remove(&id)?;
        if let Some(owner) = session.owner
            && let Some(ids) = self.by_user.get_mut(&owner.key)
        {
            ids.retain(|it| *it != id);
            if ids.is_empty() {
                self.by_user.remove(&owner.key);
            }
        }
        Some(session.transport)
    }
}
