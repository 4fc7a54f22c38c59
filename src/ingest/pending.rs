//! Who waits for the verdict on which record.
//!
//! Each publish is answered exactly once: with the projector's verdict, with the log's refusal, or after
//! [`ANSWER_WITHIN`] with `outcome: unknown`, whichever comes first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Gauge, Histogram};
use uuid::Uuid;

use crate::projector::Verdict;
use crate::protocol::error::{Code, Error};
use crate::telemetry;

/// How long a publisher waits for the log before it is answered that the outcome is unknown.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Called once with the verdict; it must not block.
pub type OnVerdict = Box<dyn FnOnce(Verdict) + Send>;

const SHARDS: usize = 16;

/// Who waits for which event. Sharded, so that sessions seldom meet at a lock.
pub struct Pending {
    shards: [Mutex<HashMap<Uuid, PendingRecord>>; SHARDS],
    publish_seconds: Histogram,
    waiting: Gauge,
}

struct PendingRecord {
    since: Instant,
    reply: OnVerdict,
    /// It is a client's publish, and not a receipt or a dead letter that a session writes.
    publish: bool,
}

impl Default for Pending {
    fn default() -> Pending {
        Pending {
            shards: std::array::from_fn(|_| Mutex::default()),
            publish_seconds: telemetry::publish_seconds(),
            waiting: telemetry::pending_publishes(),
        }
    }
}

impl Pending {
    fn shard(&self, id: &Uuid) -> std::sync::MutexGuard<'_, HashMap<Uuid, PendingRecord>> {
        // The last byte of a UUIDv7 is random. A thread that panicked with the lock left the map consistent.
        self.shards[usize::from(id.as_bytes()[15]) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, id: Uuid, reply: OnVerdict, publish: bool) {
        self.shard(&id).insert(id, PendingRecord { since: Instant::now(), reply, publish });
    }

    /// Passes on the verdict on a record. On other nodes, and after a timeout, there is nobody to pass it to.
    pub fn resolve(&self, id: Uuid, verdict: Verdict) {
        let found = self.shard(&id).remove(&id);
        if let Some(PendingRecord { since, reply, publish }) = found {
            if publish {
                self.publish_seconds.record(since.elapsed());
            }
            reply(verdict);
        }
    }

    /// Answers what has waited too long; runs for as long as the server does.
    pub async fn expire(self: Arc<Pending>) {
        let mut every = tokio::time::interval(Duration::from_millis(250));
        loop {
            every.tick().await;
            self.waiting.set(self.len() as f64);
            for shard in &self.shards {
                let late: Vec<PendingRecord> = {
                    let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                    // A little early, so that the answer is out within the time that was promised.
                    shard
                        .extract_if(|_, record| record.since.elapsed() + Duration::from_millis(300) > ANSWER_WITHIN)
                        .map(|(_, record)| record)
                        .collect()
                };
                for record in late {
                    (record.reply)(Err(unknown("no answer within 5 s")));
                }
            }
        }
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The answer when it is not known whether the record was appended.
pub(super) fn unknown(why: &'static str) -> Error {
    telemetry::unknown_outcomes().increment(1);
    Error::new(Code::Timeout, format!("the log did not answer: {why}; send it again with its key")).unknown_outcome()
}
