//! The brokers as the log and its readers see them: where each partition begins and ends, and whether the log is closed.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use super::client::{Connection, OffsetEdge, QueryClient, offsets, offsets_now};
use super::topics::Topics;
use super::watch::Look;
use crate::log::{Bounds, LogError, Position, Positions};

pub(super) struct Cluster {
    pub(super) connection: Connection,
    pub(super) topics: Topics,
    closed: AtomicBool,
    /// None once the monitor has ended.
    client: Mutex<Option<Arc<QueryClient>>>,
    /// The monitor's last look at the ends.
    look: ArcSwap<Look>,
}

impl Cluster {
    pub(super) fn new(connection: Connection, topics: Topics, client: QueryClient) -> Cluster {
        let (closed, client) = (AtomicBool::new(false), Mutex::new(Some(Arc::new(client))));
        Cluster { connection, topics, closed, client, look: ArcSwap::default() }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn client(&self) -> Result<Arc<QueryClient>, LogError> {
        self.slot().clone().ok_or_else(|| LogError::Unavailable("closed".to_owned()))
    }

    /// Afterwards only those who already have the client can use it.
    pub(super) fn release_client(&self) {
        *self.slot() = None;
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<QueryClient>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn bounds(&self) -> Result<Vec<Bounds>, LogError> {
        let (starts, ends) = (self.starts()?, self.ends()?);
        Ok(starts.into_iter().zip(ends).map(|(start, end)| Bounds { start, end }).collect())
    }

    /// Where each partition begins.
    pub(super) fn starts(&self) -> Result<Positions, LogError> {
        self.offsets(OffsetEdge::Start, self.all())
    }

    pub(super) fn ends(&self) -> Result<Positions, LogError> {
        self.offsets(OffsetEdge::End, self.all())
    }

    pub(super) fn end(&self, partition: u32) -> Result<u64, LogError> {
        let ends = self.offsets(OffsetEdge::End, partition..partition + 1)?;
        ends.first().copied().ok_or_else(|| LogError::Unavailable("Kafka gave no answer".to_owned()))
    }

    /// Of partitions counted over all topics.
    fn offsets(&self, edge: OffsetEdge, partitions: Range<u32>) -> Result<Vec<u64>, LogError> {
        offsets(&self.connection, &*self.client()?, edge, self.names(partitions))
    }

    fn names(&self, partitions: Range<u32>) -> impl Iterator<Item = (&str, u32)> {
        partitions.map(|partition| {
            let (topic, within) = self.topics.topic_of(partition);
            (self.topics.name(topic), within)
        })
    }

    /// Asks the brokers where the log ends, for the readers to see whether they are left behind.
    pub(super) fn look(&self, client: &QueryClient, within: Duration) {
        match offsets_now(client, OffsetEdge::End, self.names(self.all()), within) {
            Ok(ends) => self.look.store(Arc::new(Look { number: self.look.load().number + 1, ends })),
            Err(error) => tracing::debug!(%error, "where the log ends is not known"),
        }
    }

    pub(super) fn last_look(&self) -> Guard<Arc<Look>> {
        self.look.load()
    }

    fn all(&self) -> Range<u32> {
        0..self.topics.partitions()
    }

    /// Fails unless every position is one that the log holds, or its end.
    pub(super) fn check(&self, positions: &[u64]) -> Result<(), LogError> {
        for ((partition, bounds), &offset) in (0..).zip(self.bounds()?).zip(positions) {
            if !(bounds.start..=bounds.end).contains(&offset) {
                return Err(LogError::OutOfRange { at: Position { partition, offset }, bounds });
            }
        }
        Ok(())
    }
}
