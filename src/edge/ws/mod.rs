//! WebSocket sessions.

pub mod commands;
pub mod flood;
pub mod session;
pub mod socket;
pub mod subscribe;
pub mod upgrade;

use std::sync::Arc;

use super::health::Health;
use crate::auth::{Authenticator, Rights};
use crate::delivery::Delivery;
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::ingest::admit::Admission;
use crate::ingest::submit::Submit;
use crate::store::Store;

/// What sessions work with.
pub struct Sockets {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub submit: Arc<Submit>,
    pub auth: Arc<Authenticator>,
    pub rights: Rights,
    pub admission: Arc<Admission>,
    pub delivery: Arc<Delivery>,
    pub registry: Arc<Registry>,
    pub health: Arc<Health>,
    /// The log's identity.
    pub epoch: String,
    /// Origins that browsers may come from, beside the server's own.
    pub origins: Vec<String>,
}
