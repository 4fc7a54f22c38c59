//! The state of the server, for monitoring: `/healthz`, `/readyz` and `/metrics`. They need no token.

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;
use warp::http::StatusCode;

use super::reply::{Reply, json, with_type};
use super::request::AnonymousRequest;
use crate::auth::Authenticator;
use crate::delivery::registry::Registry;
use crate::edge::health::{Health, OtherParts, Purpose};
use crate::memory::{Budget, CONNECTION};
use crate::outbound::{InstanceStatus, Service, ServiceStatus};
use crate::protocol::error::Error;
use crate::protocol::http::{DependencyHealth, InstanceHealth, WorkHealth};
use crate::store::Store;
use crate::{clock, telemetry};

/// What the probes look at.
pub struct Probes {
    pub auth: Arc<Authenticator>,
    /// That of the webhook, if there is one.
    pub webhook: Option<Arc<Service>>,
    pub store: Arc<Store>,
    pub registry: Arc<Registry>,
    pub health: Arc<Health>,
    pub memory: Arc<Budget>,
    pub metrics: PrometheusHandle,
}

impl Probes {
    /// The services that this node calls: what an issuer says of itself may add one.
    fn services(&self) -> Vec<Arc<Service>> {
        self.auth.services().into_iter().chain(self.webhook.clone()).collect()
    }
}

/// `GET /healthz`
pub fn alive() -> Reply {
    json(StatusCode::OK, &serde_json::json!({"alive": true}))
}

/// `GET /readyz`
pub async fn ready(probes: Arc<Probes>, request: AnonymousRequest) -> Result<Reply, Error> {
    let query = request.query(&["for"])?;
    let purpose = match query.text("for") {
        None => Purpose::Both,
        Some("read") => Purpose::Read,
        Some("write") => Purpose::Write,
        Some(other) => return Err(Error::field("for", format!("for must be read or write, not {other:.60}"))),
    };
    let store = match probes.store.damage() {
        Some(damage) => Err(format!("{damage}; the server starts anew, to make the projections anew")),
        None => probes.store.head("readyz", "readyz").map(drop).map_err(|error| error.to_string()),
    };
    let rebuilding = probes.store.replaces().map(str::to_owned);
    let dependencies = probes.services().iter().map(|service| dependency(service.status())).collect();
    let (_, overflowing) = probes.store.all_depths();
    let work = WorkHealth { overflowing };
    let ready = probes.health.ready(purpose, OtherParts { store, rebuilding, dependencies, work }).await;
    Ok(json(if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &ready))
}

fn dependency(status: ServiceStatus) -> DependencyHealth {
    let (last_error, at) = status.last_error.unzip();
    DependencyHealth {
        name: status.name,
        host: status.label,
        ok: status.ok,
        breaker: status.breaker,
        since: clock::rfc3339(status.since),
        last_error,
        last_error_at: at.map(clock::rfc3339),
        instances: status.instances.into_iter().map(instance).collect(),
    }
}

fn instance(status: InstanceStatus) -> InstanceHealth {
    InstanceHealth { address: status.address.to_string(), breaker: status.breaker, last_error: status.last_error }
}

/// `GET /metrics`
pub fn metrics(probes: &Probes) -> Reply {
    telemetry::outbox_bytes().set(probes.registry.outbox_bytes() as f64);
    measure_memory(probes);
    probes.services().iter().for_each(|service| service.measure());
    with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", telemetry::render(&probes.metrics))
}

/// What each part of the budget may hold, and what those that can say so hold now.
fn measure_memory(probes: &Probes) {
    for (part, bytes) in probes.memory.plan.parts() {
        telemetry::memory_budget(part).set(bytes as f64);
    }
    let store = probes.store.memory_used();
    let connections = probes.registry.count() * CONNECTION;
    for (part, bytes) in [("cache", store.cache), ("memtables", store.memtables), ("connections", connections)] {
        telemetry::memory_used(part).set(bytes as f64);
    }
    let memory = &probes.memory;
    for (part, pool) in [("requests", &memory.requests), ("frames", &memory.frames), ("readers", &memory.readers)] {
        let usage = pool.usage();
        telemetry::memory_used(part).set(usage.used as f64);
        telemetry::memory_waiting(part).set(usage.waiting as f64);
        telemetry::memory_refused(part).absolute(usage.refused);
    }
}
