//! WebSocket sessions.
//!
//! [`upgrade`] answers the request and starts a [`session`]: one task, whose loop reads, writes and sleeps in the order
//! that [`turn`] decides. What it works on is its [`state`]: what is on its way in ([`incoming`]), what is on its way out
//! ([`outgoing`]) and the deadlines ([`heartbeat`]). [`commands`], [`subscribe`] and [`answers`] say what each command and
//! each answer from elsewhere does; [`plan`] where a subscription begins; [`signal_rate`] how many signals it may send.
//! [`close`] lists how a session ends.
//!
//! Below are the bytes: [`socket`] is the TCP stream under the WebSocket, [`flood`] counts frames that carry nothing, and
//! [`message_memory`] charges large messages before they are read.

mod answers;
mod close;
mod commands;
mod flood;
mod heartbeat;
mod incoming;
mod message_memory;
#[cfg(test)]
mod model;
mod outgoing;
mod plan;
mod session;
mod signal_rate;
pub mod socket;
mod state;
mod subscribe;
mod taken;
mod turn;
pub mod upgrade;
mod work;

use std::sync::Arc;

use crate::auth::{Authenticator, Rights};
use crate::delivery::Delivery;
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::dispatch::Dispatcher;
use crate::edge::health::Health;
use crate::edge::origin::Origins;
use crate::ingest::admit::Admission;
use crate::ingest::submit::Submit;
use crate::ingest::tickets::Tickets;
use crate::memory::Pool;
use crate::projector::level::Level;
use crate::search::Search;
use crate::store::Store;

/// What sessions work with.
pub struct Sockets {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub dispatcher: Arc<Dispatcher>,
    /// Nothing if it is off.
    pub search: Option<Arc<Search>>,
    pub submit: Arc<Submit>,
    pub auth: Arc<Authenticator>,
    pub tickets: Arc<Tickets>,
    pub rights: Rights,
    pub level: Arc<Level>,
    pub admission: Arc<Admission>,
    pub delivery: Arc<Delivery>,
    pub registry: Arc<Registry>,
    pub health: Arc<Health>,
    /// The log's identity.
    pub epoch: String,
    pub origins: Arc<Origins>,
    /// Large messages are charged to it while they are read.
    pub memory: Pool,
}
