//! What a session works on: who it is, what is on its way in and out, and its deadlines.

use std::sync::Arc;

use metrics::Counter;
use tokio::time::Instant;

use super::Sockets;
use super::close::End;
use super::heartbeat::{Heartbeat, PING_AFTER};
use super::incoming::{Incoming, MAX_IN_FLIGHT};
use super::outgoing::Outgoing;
use super::signal_rate::SignalRate;
use super::turn::Wants;
use crate::auth::Principal;
use crate::delivery::outbox::EVENT_BYTES;
use crate::delivery::registry::Registration;
use crate::delivery::subscriptions::{MAX_SUBSCRIPTIONS, WINDOW};
use crate::projector::MAX_MESSAGE_DATA;
use crate::protocol::command;
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::{Limits, ServerFrame};
use crate::protocol::http::Transport;
use crate::{clock, telemetry};

/// The limits that `welcome` names.
const LIMITS: Limits = Limits {
    frame_bytes: command::MAX_FRAME,
    data_bytes: command::MAX_DATA,
    message_bytes: MAX_MESSAGE_DATA,
    commands: command::MAX_COMMANDS,
    subscriptions: MAX_SUBSCRIPTIONS,
    publishes_in_flight: MAX_IN_FLIGHT,
    outbox_bytes: EVENT_BYTES,
    unacknowledged: WINDOW,
};

/// The user, without whom most commands are refused.
pub fn connected(who: Option<&Principal>) -> Result<&Principal, Error> {
    who.ok_or_else(|| Error::new(Code::Unauthenticated, "connect first"))
}

pub struct SessionState {
    pub sockets: Arc<Sockets>,
    /// The connection's id, as `welcome` and the admin's list of sessions have it.
    connection: String,
    /// The user, once it is known.
    pub who: Option<Principal>,
    registration: Option<Registration>,
    pub incoming: Incoming,
    pub outgoing: Outgoing,
    pub heartbeat: Heartbeat,
    pub signal_rate: SignalRate,
    /// Publishes that were answered without an error.
    pub published: Counter,
}

impl SessionState {
    pub fn new(sockets: Arc<Sockets>, who: Option<Principal>, traceparent: Option<&str>) -> SessionState {
        let feed = sockets.delivery.feed();
        SessionState {
            connection: clock::random_id().simple().to_string(),
            who,
            registration: None,
            incoming: Incoming::new(sockets.submit.clone(), feed.outbox.clone(), traceparent),
            outgoing: Outgoing::new(feed, sockets.store.clone()),
            heartbeat: Heartbeat::new(Instant::now()),
            signal_rate: SignalRate::new(Instant::now()),
            published: telemetry::commands("publish", "ok"),
            sockets,
        }
    }

    /// The session is one of the server's from here on, and ends with it.
    pub fn register(&mut self) {
        let registry = &self.sockets.registry;
        let outbox = &self.outgoing.feed.outbox;
        self.registration = Some(registry.register(outbox, &self.connection, Transport::Websocket));
    }

    /// If the user is known: the session counts as the user's from now on. `id` is the `connect` that is answered by this.
    pub fn begin(&mut self, id: Option<i64>) -> Result<(), End> {
        let (Some(who), Some(registration)) = (&self.who, &self.registration) else { return Ok(()) };
        registration.identify(who).map_err(|error| End::no_room(&error))?;
        // Looked up once more: a revocation after this reaches the session by its registration.
        self.check_revoked()?;
        self.welcome(id);
        Ok(())
    }

    /// Ends the session if its token was issued before its user's tokens were revoked.
    pub fn check_revoked(&self) -> Result<(), End> {
        match &self.who {
            Some(who) => self.sockets.auth.check_revoked(who).map_err(|error| End::revoked(&error)),
            None => Ok(()),
        }
    }

    /// What the loop can use now.
    pub fn wants(&self) -> Wants {
        let room = self.outgoing.has_room();
        // Nobody's rate counts what comes while another service is asked who it is.
        let is_asked = self.who.is_none() && self.incoming.looking_up;
        Wants { frames: room && !is_asked && self.incoming.may_read(), answers: room }
    }

    /// When something is due next.
    pub fn due(&self) -> Instant {
        let others = [self.outgoing.feed.subs.due(), self.incoming.due()];
        others.into_iter().flatten().fold(self.heartbeat.due(), Instant::min)
    }

    /// Adds to the batch for the log what is due beside the publishes in it: deltas that were gathered, and receipts.
    pub fn add_what_is_due(&mut self) {
        self.incoming.flush_due_deltas();
        if let Some(who) = &self.who {
            let receipts = self.outgoing.feed.subs.changed_receipts(who);
            self.incoming.batch.extend(receipts);
        }
    }

    fn welcome(&mut self, id: Option<i64>) {
        let Some(who) = &self.who else { return };
        self.outgoing.answer(&ServerFrame::Welcome {
            id,
            connection: &self.connection,
            user: &who.user,
            tenant: &who.tenant,
            epoch: &self.sockets.epoch,
            heartbeat_ms: PING_AFTER.as_millis() as u64,
            expires_at: &clock::rfc3339(who.expires_at.saturating_mul(1000)),
            limits: LIMITS,
        });
        self.heartbeat.token(who.expires_at, Instant::now(), clock::now_s());
    }
}
