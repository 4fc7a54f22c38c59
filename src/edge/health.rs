//! How each part is doing: `/readyz`, and the lag as metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use metrics::Gauge;

use crate::log::Log;
use crate::projector::Status;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::{PartHealth, ProjectorHealth, Ready};
use crate::{clock, telemetry};

/// How often the lag is measured.
const EVERY: Duration = Duration::from_secs(1);

pub struct Health {
    log: Arc<dyn Log>,
    projector: Arc<Status>,
    draining: AtomicBool,
    lag_records: AtomicU64,
}

fn part(result: Result<(), String>) -> PartHealth {
    PartHealth { ok: result.is_ok(), error: result.err() }
}

impl Health {
    pub fn new(log: Arc<dyn Log>, projector: Arc<Status>) -> Health {
        Health { log, projector, draining: AtomicBool::new(false), lag_records: AtomicU64::new(0) }
    }

    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Refuses while the projections lack what the log had at the start: their answers would be wrong, not merely old.
    pub fn check_caught_up(&self) -> Result<(), Error> {
        if self.projector.caught_up() {
            return Ok(());
        }
        Err(Error::new(Code::Unavailable, "the server is starting: it still reads its log").retry_after(1_000))
    }

    /// Waits until the projections have what the log had at the start.
    pub async fn caught_up(&self) {
        let mut every = tokio::time::interval(Duration::from_millis(5));
        while !self.projector.caught_up() {
            every.tick().await;
        }
    }

    /// Each part's state; `store` is the outcome of a lookup in it.
    pub fn ready(&self, store: Result<(), String>) -> Ready {
        let draining = self.draining.load(Ordering::Acquire);
        let log = part(self.log.health());
        let error = self.projector.failing();
        let caught_up = self.projector.caught_up();
        let projector = ProjectorHealth {
            ok: error.is_none(),
            error,
            caught_up,
            rebuilding: None,
            lag_records: self.lag_records.load(Ordering::Relaxed),
            lag_seconds: self.lag_seconds(),
        };
        let store = part(store);
        Ready { ready: !draining && log.ok && projector.ok && caught_up && store.ok, draining, log, projector, store }
    }

    fn lag_seconds(&self) -> f64 {
        match self.projector.newest() {
            // Nothing was ever projected: there is no time to count from.
            0 => 0.0,
            _ if self.lag_records.load(Ordering::Relaxed) == 0 => 0.0,
            newest => clock::now_ms().saturating_sub(newest) as f64 / 1000.0,
        }
    }

    /// Measures the lag every second. A log that does not answer keeps the figure that it had.
    pub async fn watch(self: Arc<Health>) {
        let gauges: (Gauge, Gauge) = (telemetry::lag_records(), telemetry::lag_seconds());
        let mut every = tokio::time::interval(EVERY);
        loop {
            every.tick().await;
            let asked = self.clone();
            let lag = tokio::task::spawn_blocking(move || asked.log.lag(&asked.projector.positions())).await;
            if let Ok(Ok(lag)) = lag {
                self.lag_records.store(lag, Ordering::Relaxed);
                gauges.0.set(lag as f64);
                gauges.1.set(self.lag_seconds());
            }
        }
    }
}
