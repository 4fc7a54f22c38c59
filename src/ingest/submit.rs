//! The way into the log: what was accepted at the edge becomes a record, and whoever waits for it is answered once.
//!
//! Each publish is answered exactly once: with the projector's verdict, with the log's refusal, or after
//! [`ANSWER_WITHIN`] with `outcome: unknown`, whichever comes first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram};
use uuid::Uuid;

use crate::clock;
use crate::error::{Code, Error};
use crate::event::LogEvent;
use crate::ids;
use crate::log::{Append, AppendError, Grant, Log, Record, Topic};
use crate::telemetry;

/// How long a publisher waits for the log before it is told that the outcome is unknown.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// The projector's judgement of one record.
pub type Verdict = Result<Published, Error>;

/// A record that has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    pub seq: u64,
    pub event: Uuid,
    /// The event was there before: by its key, or because nothing had to change.
    pub duplicate: bool,
}

/// Called once with the verdict; it must not block.
pub type Reply = Box<dyn FnOnce(Verdict) + Send>;

/// An event on its way in: checked, with its id and time, not yet in the log.
pub struct Draft<'a> {
    pub event: LogEvent<'a>,
    pub grant: Grant,
    pub traceparent: Option<String>,
}

pub struct Submit {
    log: Arc<dyn Log>,
    pending: Arc<Pending>,
    bytes: Counter,
}

impl Submit {
    pub fn new(log: Arc<dyn Log>, pending: Arc<Pending>) -> Submit {
        Submit { log, pending, bytes: telemetry::append_bytes() }
    }

    /// Makes the record, and notes who waits for it. It reaches the log with [`Submit::send`].
    pub fn prepare(&self, draft: &Draft<'_>, reply: Reply) -> Append {
        let record = Record {
            topic: Topic::Events,
            key: ids::log_key(&draft.event.tenant, &draft.event.thread),
            kind: draft.event.kind.as_ref().to_owned(),
            grant: draft.grant,
            traceparent: draft.traceparent.clone(),
            // Strings, numbers and raw JSON always serialise.
            value: serde_json::to_vec(&draft.event).unwrap_or_default().into(),
        };
        self.append(draft.event.event, record, reply, true)
    }

    /// The same for a record that is made already; the projector knows it by `id`.
    pub fn prepare_record(&self, id: Uuid, record: Record, reply: Reply) -> Append {
        self.append(id, record, reply, false)
    }

    fn append(&self, id: Uuid, record: Record, reply: Reply, publish: bool) -> Append {
        self.pending.insert(id, reply, publish);
        self.bytes.increment((record.key.len() + record.value.len()) as u64);
        let pending = self.pending.clone();
        Append {
            record,
            done: Box::new(move |result| {
                if let Err(error) = result {
                    pending.resolve(id, Err(refusal(error)));
                }
            }),
        }
    }

    /// Hands records to the log, in order.
    pub fn send(&self, batch: Vec<Append>) {
        self.log.append(batch);
    }

    /// One event, and its verdict.
    pub async fn publish(&self, draft: &Draft<'_>) -> Verdict {
        let (sender, verdict) = tokio::sync::oneshot::channel();
        // The receiver is gone only when the caller is, and then nobody wants the verdict.
        let append = self.prepare(draft, Box::new(move |verdict| drop(sender.send(verdict))));
        self.send(vec![append]);
        verdict.await.unwrap_or_else(|_| Err(unknown("the server is stopping")))
    }
}

fn refusal(error: AppendError) -> Error {
    match error {
        AppendError::QueueFull => {
            telemetry::append_errors("queue_full").increment(1);
            Error::new(Code::QueueFull, "the log's queue is full").retry_after(1_000)
        }
        AppendError::Unavailable(why) => {
            telemetry::append_errors("unavailable").increment(1);
            Error::new(Code::Unavailable, format!("the log is unavailable: {why}")).retry_after(1_000)
        }
        AppendError::Unknown(why) => {
            telemetry::append_errors("unknown").increment(1);
            unknown(&why)
        }
    }
}

fn unknown(why: &str) -> Error {
    telemetry::unknown_outcomes().increment(1);
    Error::new(Code::Timeout, format!("the log did not answer: {why}; send it again with its key")).unknown_outcome()
}

const SHARDS: usize = 16;

/// Who waits for which event. Sharded, so that sessions seldom meet at a lock.
pub struct Pending {
    shards: [Mutex<HashMap<Uuid, Waiter>>; SHARDS],
    publish_seconds: Histogram,
    waiting: Gauge,
}

struct Waiter {
    since: Instant,
    reply: Reply,
    /// A client waits for it, and not only a session of ours.
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
    fn shard(&self, id: &Uuid) -> std::sync::MutexGuard<'_, HashMap<Uuid, Waiter>> {
        // The last byte of a UUIDv7 is random. A holder that panicked left a whole map.
        self.shards[usize::from(id.as_bytes()[15]) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, id: Uuid, reply: Reply, publish: bool) {
        self.shard(&id).insert(id, Waiter { since: Instant::now(), reply, publish });
    }

    /// Answers whoever waits for the event; on other nodes, and after a timeout, nobody does.
    pub fn resolve(&self, id: Uuid, verdict: Verdict) {
        let waiter = self.shard(&id).remove(&id);
        if let Some(Waiter { since, reply, publish }) = waiter {
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
                let late: Vec<Waiter> = {
                    let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                    // A little early, so that the answer is out within the time that was promised.
                    shard
                        .extract_if(|_, waiter| waiter.since.elapsed() + Duration::from_millis(300) > ANSWER_WITHIN)
                        .map(|(_, waiter)| waiter)
                        .collect()
                };
                for waiter in late {
                    (waiter.reply)(Err(unknown("no answer within 5 s")));
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

/// A draft of an event that somebody publishes now.
pub fn draft<'a>(
    tenant: &'a str,
    from: &'a str,
    thread: &'a str,
    kind: &'a str,
    data: &'a serde_json::value::RawValue,
) -> LogEvent<'a> {
    LogEvent {
        tenant: tenant.into(),
        thread: thread.into(),
        kind: kind.into(),
        event: clock::event_id(),
        from: from.into(),
        at: clock::rfc3339(clock::now_ms()).into(),
        data,
        key: None,
        run: None,
        parent: None,
        priority: None,
    }
}
