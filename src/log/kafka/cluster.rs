//! The brokers as the log and its readers see them: where each partition begins and ends, and whether the log is closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::client::{KafkaConfig, QueryClient, watermarks};
use super::topics::Topics;
use crate::log::{Bounds, LogError, Position};

pub(super) struct Cluster {
    pub(super) config: KafkaConfig,
    pub(super) topics: Topics,
    closed: AtomicBool,
    /// None once the monitor has ended.
    client: Mutex<Option<Arc<QueryClient>>>,
}

impl Cluster {
    pub(super) fn new(config: KafkaConfig, topics: Topics, client: QueryClient) -> Cluster {
        Cluster { config, topics, closed: AtomicBool::new(false), client: Mutex::new(Some(Arc::new(client))) }
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
        let client = self.client()?;
        (0..self.topics.partitions())
            .map(|partition| {
                let (topic, within) = self.topics.topic_of(partition);
                watermarks(&self.config, &client, self.topics.name(topic), within)
            })
            .collect()
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
