//! The reaper: ends runs that have stalled, and answers questions whose time is up.
//!
//! Every node looks for such runs, and each may publish the same event. Its idempotency key makes them one, and the
//! projector refuses it if the run has gone on meanwhile.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::ingest::admit::new_event;
use crate::ingest::submit::{Draft, Submit};
use crate::log::Grant;
use crate::projector::Status;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::LogEvent;
use crate::protocol::ids::SERVER_USER;
use crate::protocol::json::encode_raw;
use crate::protocol::kinds::{AGENT_FAILED, AGENT_RESUMED};
use crate::store::Store;
use crate::store::runs::{RunKey, RunRow};
use crate::{clock, telemetry};

/// How often runs are looked at; more often where they count as stalled sooner.
const EVERY: Duration = Duration::from_secs(5);

/// An event that is due.
struct Due {
    key: RunKey,
    kind: &'static str,
    data: serde_json::Value,
    idempotency: String,
}

pub struct Reaper {
    pub store: Arc<Store>,
    pub submit: Arc<Submit>,
    pub projector: Arc<Status>,
    /// A run with no event for so long is ended.
    pub stalled_after: Duration,
}

impl Reaper {
    /// Runs for as long as the server does.
    pub async fn run(self) {
        let mut every = tokio::time::interval(EVERY.min(self.stalled_after / 2).max(Duration::from_millis(100)));
        loop {
            every.tick().await;
            if !self.projector.caught_up() {
                continue;
            }
            let (store, stalled_after) = (self.store.clone(), self.stalled_after);
            match tokio::task::spawn_blocking(move || find_overdue(&store, stalled_after)).await {
                Ok(Ok(due)) => self.publish(due).await,
                Ok(Err(error)) => tracing::warn!(%error, "open runs cannot be read"),
                // It panicked, which is reported; or the runtime is shutting down, and this task with it.
                Err(_) => {}
            }
        }
    }

    async fn publish(&self, due: Vec<Due>) {
        for Due { key, kind, data, idempotency } in due {
            let data = encode_raw(&data);
            let event = LogEvent {
                run: Some((&*key.run).into()),
                key: Some(idempotency.into()),
                ..new_event(&key.tenant, SERVER_USER, &key.thread, kind, &data)
            };

            match self.submit.publish(&Draft { event, grant: Grant::Server, traceparent: None }).await {
                Ok(_) => tracing::info!(run = key.run, thread = key.thread, kind, "an overdue run was dealt with"),
                // Another node was faster, or the run has gone on.
                Err(error) if matches!(error.code, Code::Conflict | Code::RunOrder) => {}
                Err(error) => tracing::warn!(%error, run = key.run, "an overdue run could not be dealt with"),
            }
        }
    }
}

/// The events that are due, and by the way the gauges of open runs.
fn find_overdue(store: &Store, stalled_after: Duration) -> Result<Vec<Due>, Error> {
    let now = clock::now_ms();
    let stalled_before = now.saturating_sub(stalled_after.as_millis() as u64);
    let (mut due, mut open, mut waiting) = (Vec::new(), 0_u32, 0_u32);
    for key in store.all_open_runs() {
        let key = key?;
        let Some(row) = store.run(&key)?.filter(|row| row.ended.is_none()) else { continue };
        open += 1;
        waiting += u32::from(row.waiting.is_some());
        due.extend(overdue(key, &row, now, stalled_before));
    }
    telemetry::runs("open").set(f64::from(open));
    telemetry::runs("waiting").set(f64::from(waiting));
    Ok(due)
}

/// A run that waits for a person, or for runs that work for it, does not stall.
fn overdue(key: RunKey, row: &RunRow, now: u64, stalled_before: u64) -> Option<Due> {
    let run = &key.run;
    match &row.waiting {
        Some(wait) => wait.expires_at.filter(|until| *until <= now).map(|_| Due {
            kind: AGENT_RESUMED,
            data: json!({"answer": null, "expired": true}),
            idempotency: format!("expired-{}-{run:.90}", wait.since.seq),
            key: key.clone(),
        }),
        None if row.children == 0 && row.heard_at() <= stalled_before => Some(Due {
            kind: AGENT_FAILED,
            data: json!({
                "code": "stalled",
                "message": "the run had no event for too long",
                "after": row.last.seq,
                "pieces": row.pieces,
            }),
            idempotency: format!("stalled-{}-{}-{run:.80}", row.last.seq, row.pieces),
            key: key.clone(),
        }),
        None => None,
    }
}
