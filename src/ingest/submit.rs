//! The way into the log: what was admitted becomes a record, and [`Pending`] keeps who waits for its verdict.

use std::sync::Arc;

use metrics::Counter;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::pending::{OnVerdict, Pending, unknown};
use crate::log::{Append, AppendError, Grant, Log, RULES, Record, Topic};
use crate::projector::Verdict;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::LogEvent;
use crate::protocol::ids;
use crate::telemetry;

/// An event on its way in: checked, with its id and time, not yet in the log.
pub struct Draft<'a> {
    pub event: LogEvent<'a>,
    pub grant: Grant,
    /// W3C trace context of the request, if it has one.
    pub traceparent: Option<&'a str>,
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

    /// Makes the record, and registers `reply` for its verdict. It reaches the log with [`Submit::send`].
    fn prepare(&self, draft: &Draft<'_>, reply: OnVerdict) -> Append {
        let record = Record {
            topic: Topic::Events,
            key: ids::log_key(&draft.event.tenant, &draft.event.thread),
            kind: draft.event.kind.as_ref().to_owned(),
            rules: RULES,
            grant: draft.grant,
            traceparent: draft.traceparent.map(str::to_owned),
            value: draft.event.encode().into(),
        };
        self.append(draft.event.event, record, reply, true)
    }

    /// The same for a record that is already made; the projector's verdict names it by `id`.
    pub fn prepare_record(&self, id: Uuid, record: Record, reply: OnVerdict) -> Append {
        self.append(id, record, reply, false)
    }

    fn append(&self, id: Uuid, record: Record, reply: OnVerdict, publish: bool) -> Append {
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

    /// Appends records to the log, in order.
    pub fn send(&self, batch: Vec<Append>) {
        self.log.append(batch);
    }

    /// One event, and its verdict.
    pub async fn publish(&self, draft: &Draft<'_>) -> Verdict {
        self.verdict(|reply| self.prepare(draft, reply)).await
    }

    /// One record of the server's, and its verdict.
    pub async fn write(&self, id: Uuid, record: Record) -> Verdict {
        self.verdict(|reply| self.prepare_record(id, record, reply)).await
    }

    /// Events that are appended together, in their order, and the verdict on each.
    pub async fn publish_all<'a>(&self, drafts: impl Iterator<Item = &'a Draft<'a>>) -> Vec<Verdict> {
        let (appends, waiting): (Vec<_>, Vec<_>) =
            drafts.map(|draft| awaited(|reply| self.prepare(draft, reply))).unzip();
        self.send(appends);
        let mut verdicts = Vec::with_capacity(waiting.len());
        for verdict in waiting {
            verdicts.push(verdict_of(verdict).await);
        }
        verdicts
    }

    async fn verdict(&self, prepare: impl FnOnce(OnVerdict) -> Append) -> Verdict {
        let (append, verdict) = awaited(prepare);
        self.send(vec![append]);
        verdict_of(verdict).await
    }
}

/// A record to be appended, and where its verdict will come.
fn awaited(prepare: impl FnOnce(OnVerdict) -> Append) -> (Append, oneshot::Receiver<Verdict>) {
    let (sender, verdict) = oneshot::channel();
    // The receiver is gone only when the caller is, and then nobody wants the verdict.
    (prepare(Box::new(move |verdict| drop(sender.send(verdict)))), verdict)
}

async fn verdict_of(verdict: oneshot::Receiver<Verdict>) -> Verdict {
    verdict.await.unwrap_or_else(|_| Err(unknown("the server is stopping")))
}

/// Records of one session on their way to the log, in order: they are appended together.
pub struct AppendBatch {
    submit: Arc<Submit>,
    appends: Vec<Append>,
}

impl AppendBatch {
    pub fn new(submit: Arc<Submit>) -> AppendBatch {
        AppendBatch { submit, appends: Vec::new() }
    }

    /// An event; `reply` gets its verdict.
    pub fn add(&mut self, draft: &Draft<'_>, reply: OnVerdict) {
        self.appends.push(self.submit.prepare(draft, reply));
    }

    /// A record that the session itself writes; the projector's verdict names it by `id`.
    pub fn add_record(&mut self, id: Uuid, record: Record, reply: OnVerdict) {
        self.appends.push(self.submit.prepare_record(id, record, reply));
    }

    pub fn extend(&mut self, appends: Vec<Append>) {
        self.appends.extend(appends);
    }

    pub fn is_empty(&self) -> bool {
        self.appends.is_empty()
    }

    /// Appends all of it to the log.
    pub fn send(&mut self) {
        if !self.appends.is_empty() {
            self.submit.send(std::mem::take(&mut self.appends));
        }
    }
}

/// The publisher's answer. Why the log refused is for the operator, who finds it in `/readyz` as well.
fn refusal(error: AppendError) -> Error {
    match error {
        AppendError::QueueFull => {
            telemetry::append_errors("queue_full").increment(1);
            Error::new(Code::QueueFull, "the log's queue is full").retry_after(1_000)
        }
        AppendError::Unavailable(why) => {
            telemetry::append_errors("unavailable").increment(1);
            tracing::debug!(%why, "a record was not appended");
            Error::new(Code::Unavailable, "the log is unavailable").retry_after(1_000)
        }
        AppendError::Unknown(why) => {
            telemetry::append_errors("unknown").increment(1);
            tracing::debug!(%why, "it is not known whether a record was appended");
            unknown("it failed meanwhile")
        }
    }
}
