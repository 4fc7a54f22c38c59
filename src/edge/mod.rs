//! The edge: sockets in, frames and replies out. Nothing here decides; it parses, asks for rights and hands on.

pub mod health;
pub mod http;
pub mod listener;
pub mod routes;
pub mod sse;
pub mod ws;

use std::sync::Arc;

use crate::auth::{Authenticator, Rights};
use crate::delivery::Delivery;
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::ingest::admit::Admission;
use crate::ingest::submit::Submit;
use crate::store::Store;

/// What sessions and requests work with.
pub struct Context {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub submit: Arc<Submit>,
    pub auth: Arc<Authenticator>,
    pub rights: Rights,
    pub admission: Arc<Admission>,
    pub delivery: Arc<Delivery>,
    /// The log's identity.
    pub epoch: String,
    pub registry: Arc<Registry>,
    /// What WebSocket sessions work with.
    pub sockets: Arc<ws::Sockets>,
    pub health: Arc<health::Health>,
    pub metrics: metrics_exporter_prometheus::PrometheusHandle,
}
