//! How each part is doing: `/readyz`, and the lag as metrics.
//!
//! A figure that is old misleads more than none: the lag, and the room on the disk, are what was measured within the last
//! second or two, or unknown.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use crate::disk::Room;
use crate::log::Log;
use crate::projector::{Failing, Status};
use crate::protocol::error::{Code, Error};
use crate::protocol::http::{
    DependencyHealth, DiskHealth, LogHealth, PartHealth, ProjectorHealth, Ready, ReadyFor, WorkHealth,
};
use crate::{clock, telemetry};

/// How often the lag is measured.
const EVERY: Duration = Duration::from_secs(1);
/// How old a figure may be to be shown.
const FRESH: Duration = Duration::from_millis(2_500);
/// How long `/readyz` waits for a figure when there is no fresh one.
const WAIT: Duration = Duration::from_millis(500);

/// A projector that is longer behind makes the node unready for writes.
const BEHIND: Duration = Duration::from_secs(5);
/// Ends of the log that are remembered: one a second.
const ENDS: usize = 60;

/// What a node is to be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Read,
    Write,
    Both,
}

/// The state of the parts that others look at.
#[derive(Debug)]
pub struct OtherParts {
    /// The outcome of a lookup in the store.
    pub store: Result<(), String>,
    /// Why the projections are made anew, if they are.
    pub rebuilding: Option<String>,
    pub dependencies: Vec<DependencyHealth>,
    pub work: WorkHealth,
}

pub struct Health {
    log: Arc<dyn Log>,
    projector: Arc<Status>,
    draining: AtomicBool,
    lag: Mutex<Option<Lag>>,
    backlog: Mutex<Backlog>,
    /// The folder of all data, and what its disk said when it was asked last.
    data: PathBuf,
    room: Mutex<Option<Said>>,
    /// Held while the disk is asked, which may hang.
    looking: Arc<AsyncMutex<()>>,
    /// Held while the log is asked, which may take seconds: nobody asks it a second time meanwhile.
    asking: Arc<AsyncMutex<()>>,
}

/// Records that the log had and the projections had not.
#[derive(Debug, Clone, Copy)]
struct Lag {
    records: u64,
    at: Instant,
}

/// How much room a disk has; `None`: it does not say it.
#[derive(Debug, Clone, Copy)]
struct Said {
    room: Option<Room>,
    at: Instant,
}

impl Health {
    pub fn new(log: Arc<dyn Log>, projector: Arc<Status>, data: PathBuf) -> Health {
        let (draining, asking, looking) = (AtomicBool::new(false), Arc::default(), Arc::default());
        let (lag, backlog, room) = (Mutex::default(), Mutex::default(), Mutex::default());
        Health { log, projector, draining, lag, backlog, data, room, looking, asking }
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

    /// Each part's state.
    pub async fn ready(self: &Arc<Health>, purpose: Purpose, others: OtherParts) -> Ready {
        let OtherParts { store, rebuilding, dependencies, work } = others;
        let log = self.log.health();
        let measure = async {
            // What is known to be away is not asked.
            if log.is_ok() && self.lag().is_none() {
                self.measure(WAIT).await;
            }
        };
        let look = async {
            if self.room().is_none() {
                self.look_at_disk(WAIT).await;
            }
        };
        tokio::join!(measure, look);
        let lag = self.lag();
        let failing = self.projector.failing();
        let (draining, caught_up) = (self.draining.load(Ordering::Acquire), self.projector.caught_up());

        let served = !draining && caught_up && store.is_ok() && !matches!(failing, Some(Failing::Broken(_)));
        let behind = self.behind();
        let disk = self.disk();
        let writes = failing.is_none() && log.is_ok() && behind.is_none() && disk.ok;
        let ready_for = ReadyFor { read: served, write: served && writes };
        let ready = match purpose {
            Purpose::Read => ready_for.read,
            Purpose::Write => ready_for.write,
            Purpose::Both => ready_for.read && ready_for.write,
        };

        let projector = ProjectorHealth {
            ok: failing.is_none() && behind.is_none(),
            error: failing.map(|failing| failing.why().to_owned()).or(behind),
            caught_up,
            rebuilding: rebuilding.filter(|_| !caught_up),
            lag_records: lag,
            lag_seconds: lag.and_then(|lag| self.lag_seconds(lag)),
        };
        let log = LogHealth { ok: log.is_ok(), error: log.err(), warnings: self.log.warnings() };
        let store = PartHealth { ok: store.is_ok(), error: store.err() };
        let degraded = work.overflowing > 0 || dependencies.iter().any(|service| !service.ok);
        Ready { ready, ready_for, draining, log, projector, store, disk, dependencies, work, degraded }
    }

    /// Why the projector is too far behind, if it is. While the log does not answer, what it lacks is not its fault.
    fn behind(&self) -> Option<String> {
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        let positions = self.projector.positions();
        backlog.drop_reached(|ends| self.log.between(&positions, ends) == 0);
        let behind = backlog.age(Instant::now());
        let too_far = behind > BEHIND && self.log.health().is_ok();
        too_far.then(|| format!("it has not read for {} s what the log had by then", behind.as_secs()))
    }

    /// Whether there is room enough to go on writing.
    fn disk(&self) -> DiskHealth {
        let said = self.room();
        let room = said.and_then(|said| said.room);
        let error = match (said, room) {
            (None, _) => Some(format!("it has not said within {} s how much room it has", FRESH.as_secs_f64())),
            (_, Some(room)) if room.is_short() => {
                Some(format!("nearly full: {} MiB are free, {} are needed", room.free >> 20, room.enough >> 20))
            }
            _ => None,
        };
        DiskHealth { ok: error.is_none(), error, free_bytes: room.map(|room| room.free) }
    }

    /// What the disk said, unless that was too long ago.
    fn room(&self) -> Option<Said> {
        let said = *self.room.lock().unwrap_or_else(PoisonError::into_inner);
        said.filter(|said| said.at.elapsed() <= FRESH)
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
            let ends = ends.ok().filter(|_| !positions.is_empty());
            let lag =
                ends.as_ref().map(|ends| Lag { records: health.log.between(&positions, ends), at: Instant::now() });
            if let (Some(ends), Some(Lag { records: 1.., at })) = (ends, lag) {
                health.backlog.lock().unwrap_or_else(PoisonError::into_inner).add(at, ends);
            }
            *health.lag.lock().unwrap_or_else(PoisonError::into_inner) = lag;
            drop(asking);
        });
        // Late or never: then the lag is unknown.
        drop(tokio::time::timeout(wait, asked).await);
    }

    /// Looks how much room the disk has, on a thread that may wait for it: on one at a time, however long that takes.
    async fn look_at_disk(self: &Arc<Health>, wait: Duration) {
        let Ok(looking) = self.looking.clone().try_lock_owned() else { return };
        let health = self.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let said = Said { room: Room::under(&health.data).ok(), at: Instant::now() };
            *health.room.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
            drop(looking);
        });
        // Late or never: then the room is unknown.
        drop(tokio::time::timeout(wait, looked).await);
    }

    /// Measures the lag and looks at the disk every second, and shows what is known as metrics; and how the log is.
    pub async fn watch(self: Arc<Health>) {
        let (records, seconds) = (telemetry::lag_records(), telemetry::lag_seconds());
        let (problem, warnings) = (telemetry::log_problem(), telemetry::log_warnings());
        let free = telemetry::disk_free_bytes();
        let mut every = tokio::time::interval(EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            tokio::join!(self.look_at_disk(EVERY), self.measure(EVERY));
            // What was reached is let go, also while nobody asks for it.
            drop(self.behind());
            let lag = self.lag();
            records.set(lag.map_or(f64::NAN, |lag| lag as f64));
            seconds.set(lag.and_then(|lag| self.lag_seconds(lag)).unwrap_or(f64::NAN));
            let room = self.room().and_then(|said| said.room);
            free.set(room.map_or(f64::NAN, |room| room.free as f64));
            problem.set(f64::from(u8::from(self.log.health().is_err())));
            warnings.set(self.log.warnings().len() as f64);
        }
    }
}

/// Ends that the log had, each with when: the oldest one that the projector has not reached says for how long it is behind.
#[derive(Debug, Default)]
struct Backlog(VecDeque<(Instant, Vec<u64>)>);

impl Backlog {
    /// The log ends there, and the projector is not there yet. Of too many the oldest ones are kept.
    fn add(&mut self, at: Instant, ends: Vec<u64>) {
        if self.0.len() < ENDS {
            self.0.push_back((at, ends));
        }
    }

    fn drop_reached(&mut self, is_reached: impl Fn(&[u64]) -> bool) {
        while self.0.front().is_some_and(|(_, ends)| is_reached(ends)) {
            self.0.pop_front();
        }
    }

    fn age(&self, now: Instant) -> Duration {
        self.0.front().map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::embedded::EmbeddedLog;

    fn others() -> OtherParts {
        OtherParts { store: Ok(()), rebuilding: None, dependencies: Vec::new(), work: WorkHealth::default() }
    }

    #[tokio::test]
    async fn before_the_projector_has_begun_the_lag_is_unknown_and_not_none() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = Arc::new(EmbeddedLog::open(folder.path(), 1).expect("a new log"));
        let health = Arc::new(Health::new(log, Arc::default(), folder.path().to_owned()));
        let ready = health.ready(Purpose::Both, others()).await;
        assert_eq!((ready.ready, ready.projector.lag_records, ready.projector.lag_seconds), (false, None, None));
    }

    #[test]
    fn the_projector_is_behind_for_as_long_as_it_has_not_reached_an_end_of_the_log() {
        const S: Duration = Duration::from_secs(1);
        let (begin, mut backlog) = (Instant::now(), Backlog::default());
        let reached = |position: u64| move |ends: &[u64]| ends[0] <= position;
        // The log grows by 10 a second, and the projector is always 7 seconds late.
        for second in 0..30u32 {
            let now = begin + second * S;
            backlog.drop_reached(reached(u64::from(second.saturating_sub(7)) * 10));
            backlog.add(now, vec![u64::from(second) * 10 + 1]);
            assert_eq!(backlog.age(now), second.min(7) * S, "{second}");
        }
        backlog.drop_reached(reached(1_000));
        assert_eq!(backlog.age(begin + 60 * S), Duration::ZERO);

        for second in 0..1_000 {
            backlog.add(begin + second * S, vec![5_000]);
        }
        assert_eq!((backlog.0.len(), backlog.age(begin + 1_000 * S)), (ENDS, 1_000 * S));
    }

    #[tokio::test]
    async fn a_disk_that_is_nearly_full_is_seen_in_a_second_and_takes_no_writes_until_there_is_room() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = Arc::new(EmbeddedLog::open(&folder.path().join("log"), 1).expect("a new log"));
        let health = Arc::new(Health::new(log, Arc::default(), folder.path().to_owned()));
        let disk = async |free: Option<u64>| {
            health.look_at_disk(10 * EVERY).await;
            let room = health.room().and_then(|said| said.room);
            let room = room.map(|room| Room { free: free.unwrap_or(room.free), ..room });
            *health.room.lock().expect("no panic") = Some(Said { room, at: Instant::now() });
            health.ready(Purpose::Both, others()).await.disk
        };
        assert!(disk(None).await.free_bytes.is_some_and(|free| free > 0));
        let full = disk(Some(1 << 20)).await;
        assert_eq!((full.ok, full.free_bytes), (false, Some(1 << 20)));
        assert!(full.error.is_some_and(|why| why.starts_with("nearly full: 1 MiB are free")));
        assert!(disk(Some(u64::MAX)).await.ok);
    }

    #[tokio::test]
    async fn a_disk_that_hangs_is_not_good_and_is_asked_no_second_time_until_it_answers() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = Arc::new(EmbeddedLog::open(&folder.path().join("log"), 1).expect("a new log"));
        let health = Arc::new(Health::new(log, Arc::default(), folder.path().to_owned()));
        let disk = async || health.ready(Purpose::Both, others()).await.disk;
        let hangs = health.looking.clone().try_lock_owned().expect("nobody looks");
        let unknown = disk().await;
        assert_eq!((unknown.ok, unknown.free_bytes, health.room().is_some()), (false, None, false));
        assert!(unknown.error.is_some_and(|why| why.starts_with("it has not said within 2.5 s")));

        drop(hangs);
        health.look_at_disk(10 * EVERY).await;
        assert!(disk().await.free_bytes.is_some_and(|free| free > 0));
        let hangs = health.looking.clone().try_lock_owned().expect("it has answered");
        let room = health.room().and_then(|said| said.room);
        let at = Instant::now().checked_sub(2 * FRESH).expect("the machine has run for so long");
        *health.room.lock().expect("no panic") = Some(Said { room, at });
        let old = disk().await;
        assert_eq!((old.ok, old.free_bytes), (false, None), "what it said is too old");
        drop(hangs);
    }
}
