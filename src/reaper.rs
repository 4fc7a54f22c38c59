//! What nobody does any more, the server does: it ends runs that came to nothing, and answers questions whose time is up.
//!
//! Every node looks, and each may write the same event; its key makes one of them, and the projector judges whether the
//! run has gone on meanwhile.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::edge::Context;
use crate::edge::http::raw;
use crate::error::{Code, Error};
use crate::log::Grant;
use crate::store::runs::{RunKey, RunRow};
use crate::submit::{Draft, draft};
use crate::{clock, telemetry};

/// Who the server's own events are from.
const SERVER: &str = "weft";
/// How often runs are looked at; more often when they stall sooner.
const EVERY: Duration = Duration::from_secs(5);

/// An event that is due.
struct Due {
    key: RunKey,
    kind: &'static str,
    data: serde_json::Value,
    idempotency: String,
}

/// Runs for as long as the server does. A run with no event for `stalled_after` is ended.
pub async fn watch(ctx: Arc<Context>, stalled_after: Duration) {
    let mut every = tokio::time::interval(EVERY.min(stalled_after / 2).max(Duration::from_millis(100)));
    loop {
        every.tick().await;
        if ctx.health.check_caught_up().is_err() {
            continue;
        }
        let asked = ctx.clone();
        let due = tokio::task::spawn_blocking(move || find(&asked, stalled_after)).await;
        match due {
            Ok(Ok(due)) => write(&ctx, due).await,
            Ok(Err(error)) => tracing::warn!(%error, "runs cannot be looked at"),
            Err(_) => return,
        }
    }
}

fn find(ctx: &Context, stalled_after: Duration) -> Result<Vec<Due>, Error> {
    let now = clock::now_ms();
    let stalled_before = now.saturating_sub(stalled_after.as_millis() as u64);
    let (mut due, mut open, mut waiting) = (Vec::new(), 0.0, 0.0);
    for key in ctx.store.all_open_runs()? {
        let Some(row) = ctx.store.run(&key)?.filter(|row| row.ended.is_none()) else { continue };
        open += 1.0;
        waiting += f64::from(u8::from(row.waiting.is_some()));
        due.extend(overdue(key, &row, now, stalled_before));
    }
    telemetry::runs("open").set(open);
    telemetry::runs("waiting").set(waiting);
    Ok(due)
}

/// A run that waits for a person, or for runs that work for it, does not stall.
fn overdue(key: RunKey, row: &RunRow, now: u64, stalled_before: u64) -> Option<Due> {
    let run = &key.run;
    match &row.waiting {
        Some(wait) => wait.expires_at.filter(|until| *until <= now).map(|_| Due {
            kind: "agent_resumed",
            data: json!({"answer": null, "expired": true}),
            idempotency: format!("expired-{}-{run:.90}", wait.since.seq),
            key: key.clone(),
        }),
        None if row.children == 0 && row.heard_at() <= stalled_before => Some(Due {
            kind: "agent_failed",
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

async fn write(ctx: &Context, due: Vec<Due>) {
    for Due { key, kind, data, idempotency } in due {
        let data = raw(&data);
        let mut event = draft(&key.tenant, SERVER, &key.thread, kind, &data);
        event.run = Some((&*key.run).into());
        event.key = Some(idempotency.into());
        match ctx.submit.publish(&Draft { event, grant: Grant::Server, traceparent: None }).await {
            Ok(_) => tracing::info!(run = key.run, thread = key.thread, kind, "a run was overdue"),
            // Somebody was faster, or the run has gone on.
            Err(error) if matches!(error.code, Code::Conflict | Code::RunOrder) => {}
            Err(error) => tracing::warn!(%error, run = key.run, "an overdue run could not be dealt with"),
        }
    }
}
