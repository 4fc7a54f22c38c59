//! How each part is doing: `/readyz`, and the lag as metrics.
//!
//! A figure that is old misleads more than none: the lag is what was measured within the last second or two, or unknown.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use crate::log::Log;
use crate::projector::{Failing, Status};
use crate::protocol::error::{Code, Error};
use crate::protocol::http::{LogHealth, PartHealth, ProjectorHealth, Ready, ReadyFor};
use crate::{clock, telemetry};

/// How often the lag is measured.
const EVERY: Duration = Duration::from_secs(1);
/// How old a figure may be to be shown.
const FRESH: Duration = Duration::from_millis(2_500);
/// How long `/readyz` waits for a figure when there is no fresh one.
const WAIT: Duration = Duration::from_millis(500);

/// What a node is to be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Read,
    Write,
    Both,
}

pub struct Health {
    log: Arc<dyn Log>,
    projector: Arc<Status>,
    draining: AtomicBool,
    lag: Mutex<Option<Lag>>,
    /// Held while the log is asked, which may take seconds: nobody asks it a second time meanwhile.
    asking: Arc<AsyncMutex<()>>,
}

/// Records that the log had and the projections had not.
#[derive(Debug, Clone, Copy)]
struct Lag {
    records: u64,
    at: Instant,
}

impl Health {
    pub fn new(log: Arc<dyn Log>, projector: Arc<Status>) -> Health {
        let (draining, lag, asking) = (AtomicBool::new(false), Mutex::default(), Arc::default());
        Health { log, projector, draining, lag, asking }
    }

    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Refuses while the projections lack what the log had at the start: their answers would be wrong, not merely old. And
    /// once the log has what only a later version can project, since by then every answer is old.
    pub fn check_caught_up(&self) -> Result<(), Error> {
        if let Some(why) = self.projector.outdated() {
            return Err(Error::new(Code::Unavailable, format!("this node must be upgraded: {why}")).retry_after(1_000));
        }
        if self.projector.caught_up() {
            return Ok(());
        }
        Err(Error::new(Code::Unavailable, "the server is starting: it still reads its log").retry_after(1_000))
    }

    /// Waits until the projections have what the log had at the start, or it is known why they never will.
    pub async fn caught_up(&self) -> Result<(), String> {
        let mut every = tokio::time::interval(Duration::from_millis(5));
        while !self.projector.caught_up() {
            if let Some(why) = self.projector.outdated() {
                return Err(why);
            }
            every.tick().await;
        }
        Ok(())
    }

    /// Each part's state; `store` is the outcome of a lookup in it.
    pub async fn ready(self: &Arc<Health>, purpose: Purpose, store: Result<(), String>) -> Ready {
        let log = self.log.health();
        // What is known to be away is not asked.
        if log.is_ok() && self.lag().is_none() {
            self.measure(WAIT).await;
        }
        let lag = self.lag();
        let failing = self.projector.failing();
        let (draining, caught_up) = (self.draining.load(Ordering::Acquire), self.projector.caught_up());

        let served = !draining && caught_up && store.is_ok() && !matches!(failing, Some(Failing::Broken(_)));
        let ready_for = ReadyFor { read: served, write: served && failing.is_none() && log.is_ok() };
        let ready = match purpose {
            Purpose::Read => ready_for.read,
            Purpose::Write => ready_for.write,
            Purpose::Both => ready_for.read && ready_for.write,
        };

        let projector = ProjectorHealth {
            ok: failing.is_none(),
            error: failing.map(|failing| failing.why().to_owned()),
            caught_up,
            rebuilding: None,
            lag_records: lag,
            lag_seconds: lag.and_then(|lag| self.lag_seconds(lag)),
        };
        let log = LogHealth { ok: log.is_ok(), error: log.err(), warnings: self.log.warnings() };
        let store = PartHealth { ok: store.is_ok(), error: store.err() };
        let (dependencies, degraded) = (Vec::new(), false);
        Ready { ready, ready_for, draining, log, projector, store, dependencies, degraded }
    }

    /// How many records are not visible yet, unless that is unknown.
    fn lag(&self) -> Option<u64> {
        let lag = *self.lag.lock().unwrap_or_else(PoisonError::into_inner);
        lag.filter(|lag| lag.at.elapsed() <= FRESH).map(|lag| lag.records)
    }

    fn lag_seconds(&self, records: u64) -> Option<f64> {
        match self.projector.newest() {
            _ if records == 0 => Some(0.0),
            // Nothing was ever projected: there is no time to count from.
            0 => None,
            newest => Some(clock::now_ms().saturating_sub(newest) as f64 / 1000.0),
        }
    }

    /// Asks the log where it ends, on a thread that may wait, and returns when it has said so, or after `wait`.
    async fn measure(self: &Arc<Health>, wait: Duration) {
        let Ok(asking) = self.asking.clone().try_lock_owned() else { return };
        let health = self.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let ends = health.log.ends();
            // After the ends: what was projected while the log was asked does not count as missing.
            let positions = health.projector.positions();
            let lag = ends
                .ok()
                .filter(|_| !positions.is_empty())
                .map(|ends| Lag { records: health.log.between(&positions, &ends), at: Instant::now() });
            *health.lag.lock().unwrap_or_else(PoisonError::into_inner) = lag;
            drop(asking);
        });
        // Late or never: then the lag is unknown.
        drop(tokio::time::timeout(wait, asked).await);
    }

    /// Measures the lag every second, and shows it, or that it is not known, as metrics; and how the log is.
    pub async fn watch(self: Arc<Health>) {
        let (records, seconds) = (telemetry::lag_records(), telemetry::lag_seconds());
        let (problem, warnings) = (telemetry::log_problem(), telemetry::log_warnings());
        let mut every = tokio::time::interval(EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            self.measure(EVERY).await;
            let lag = self.lag();
            records.set(lag.map_or(f64::NAN, |lag| lag as f64));
            seconds.set(lag.and_then(|lag| self.lag_seconds(lag)).unwrap_or(f64::NAN));
            problem.set(f64::from(u8::from(self.log.health().is_err())));
            warnings.set(self.log.warnings().len() as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::embedded::EmbeddedLog;

    #[tokio::test]
    async fn before_the_projector_has_begun_the_lag_is_unknown_and_not_none() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = Arc::new(EmbeddedLog::open(folder.path(), 1).expect("a new log"));
        let health = Arc::new(Health::new(log, Arc::default()));
        let ready = health.ready(Purpose::Both, Ok(())).await;
        assert_eq!((ready.ready, ready.projector.lag_records, ready.projector.lag_seconds), (false, None, None));
    }
}
