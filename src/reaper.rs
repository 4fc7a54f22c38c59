//! The reaper: ends runs that have stalled, and answers questions whose time is up.
//!
//! Every node looks for such runs, and each may publish the same event. Its idempotency key makes them one, and the
//! projector refuses it if the run has gone on meanwhile.
//!
//! What it does stays in the log, so it does not trust the wall clock, which may jump or be wrong: it goes by the time that
//! it has seen pass ([`Watches`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
struct Overdue {
    key: RunKey,
    kind: &'static str,
    /// The seq of what it ends or answers. If the run has gone on since, the event is refused.
    parent: u64,
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
        let mut watches = Watches::default();
        loop {
            every.tick().await;
            let Some(log_time) = self.projector.log_time_at_start() else { continue };
            let (store, stalled_after) = (self.store.clone(), self.stalled_after);
            let look = move || {
                let now = Now { elapsed: Instant::now(), wall: clock::now_ms(), log_time };
                let due = find_overdue(&store, &mut watches, stalled_after, now);
                (due, watches)
            };
            let Ok((due, seen)) = tokio::task::spawn_blocking(look).await else {
                // It panicked, which is reported; or the runtime is shutting down, and this task with it.
                watches = Watches { begun: true, ..Watches::default() };
                continue;
            };
            watches = seen;
            match due {
                Ok(due) => self.publish(due).await,
                Err(error) => tracing::warn!(%error, "open runs cannot be read"),
            }
        }
    }

    async fn publish(&self, due: Vec<Overdue>) {
        for Overdue { key, kind, parent, data, idempotency } in due {
            let data = encode_raw(&data);
            let event = LogEvent {
                run: Some((&*key.run).into()),
                key: Some(idempotency.into()),
                parent: Some(parent),
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

/// When the reaper looks.
#[derive(Debug, Clone, Copy)]
struct Now {
    /// A clock that nothing sets.
    elapsed: Instant,
    /// Milliseconds.
    wall: u64,
    /// What the log's time was when this node had read it, in milliseconds.
    log_time: u64,
}

/// What keeps a run where it is, and what it would be ended for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    /// The run's newest event, and the number of its deltas.
    Silent { last: u64, pieces: u64 },
    /// The question that it waits for.
    Asks { question: u64 },
}

#[derive(Debug)]
struct Watch {
    stands: Stands,
    since: Instant,
    /// How long it had been so by then, as far as the log shows.
    before: Duration,
}

/// How long this node has seen each open run stand where it is. What was there when the node had read its log has stood for
/// as long as log time has gone on beyond it: that is what the clocks of those say who wrote records after it. From then on it
/// is the node's own clock of elapsed time. So a jump of the wall clock counts for nothing, and what happened while no node
/// ran does not count either.
#[derive(Debug, Default)]
struct Watches {
    runs: HashMap<RunKey, Watch>,
    /// The runs that were there at the start have been seen.
    begun: bool,
}

impl Watches {
    /// Takes over the runs that are open now, and forgets all others.
    fn look(&mut self, open: &[(RunKey, RunRow)], now: Now) {
        let mut runs = HashMap::with_capacity(open.len());
        for (key, row) in open {
            let (stands, at) = match &row.waiting {
                Some(wait) => (Stands::Asks { question: wait.since.seq }, wait.since.at),
                None => (Stands::Silent { last: row.last.seq, pieces: row.pieces }, row.heard_at()),
            };
            let known = self.runs.remove(key).filter(|watch| watch.stands == stands);
            let before = if self.begun { 0 } else { now.log_time.saturating_sub(at) };
            let new = || Watch { stands, since: now.elapsed, before: Duration::from_millis(before) };
            runs.insert(key.clone(), known.unwrap_or_else(new));
        }
        *self = Watches { runs, begun: true };
    }

    /// For how long the run has stood where it is.
    fn stood(&self, key: &RunKey, now: Now) -> Duration {
        self.runs.get(key).map_or(Duration::ZERO, |it| it.before + now.elapsed.saturating_duration_since(it.since))
    }
}

/// The events that are due, and by the way the gauges of open runs.
fn find_overdue(
    store: &Store,
    watches: &mut Watches,
    stalled_after: Duration,
    now: Now,
) -> Result<Vec<Overdue>, Error> {
    let mut open = Vec::new();
    for key in store.all_open_runs() {
        let key = key?;
        open.extend(store.run(&key)?.filter(|row| row.ended.is_none()).map(|row| (key, row)));
    }
    let waiting = open.iter().filter(|(_, row)| row.waiting.is_some()).count();
    telemetry::runs("open").set(open.len() as f64);
    telemetry::runs("waiting").set(waiting as f64);

    watches.look(&open, now);
    Ok(open
        .iter()
        .filter_map(|(key, row)| overdue(key, row, watches.stood(key, now), now.wall, stalled_after))
        .collect())
}

/// A run that waits for a person, or for runs that work for it, does not stall. A question has as long as there was between
/// its own time and the end that it names; that its end has come by the wall clock as well is not enough.
fn overdue(key: &RunKey, row: &RunRow, stood: Duration, wall: u64, stalled_after: Duration) -> Option<Overdue> {
    let run = &key.run;
    match &row.waiting {
        Some(wait) => {
            let until = wait.expires_at?;
            let time_to_answer = Duration::from_millis(until.saturating_sub(wait.since.at));
            (wall >= until && stood >= time_to_answer).then(|| Overdue {
                kind: AGENT_RESUMED,
                parent: wait.since.seq,
                data: json!({"answer": null, "expired": true}),
                idempotency: format!("expired-{}-{run:.90}", wait.since.seq),
                key: key.clone(),
            })
        }
        None if row.children == 0 && stood >= stalled_after => Some(Overdue {
            kind: AGENT_FAILED,
            parent: row.last.seq,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::runs::{EventRef, WaitRow};

    const MINUTE: u64 = 60_000;
    const T0: u64 = 500_000_000 * MINUTE;
    const STALLED_AFTER: Duration = Duration::from_secs(600);

    fn run(last: u64, at: u64, waiting: Option<(u64, u64)>) -> (RunKey, RunRow) {
        let row = RunRow {
            agent: "scout".into(),
            user: "scout".into(),
            parent: None,
            started: EventRef { seq: 1, at: T0 },
            last: EventRef { seq: last, at },
            ended: None,
            executing: 0,
            children: 0,
            waiting: waiting.map(|(seq, until)| WaitRow { since: EventRef { seq, at }, expires_at: Some(until) }),
            resumed: None,
            cancel: None,
            pieces: 0,
            written_at: 0,
        };
        (RunKey::new("acme", "t", "r"), row)
    }

    /// Looks at a run again and again, each time after so many minutes of elapsed time, with such a wall clock; gives whether
    /// it was due each time.
    fn due(log_time: u64, looks: &[(u64, u64, (RunKey, RunRow))]) -> Vec<bool> {
        let (mut watches, begin) = (Watches::default(), Instant::now());
        let mut due = Vec::new();
        for (minutes, wall, (key, row)) in looks {
            let now = Now { elapsed: begin + Duration::from_millis(minutes * MINUTE), wall: *wall, log_time };
            watches.look(&[(key.clone(), row.clone())], now);
            due.push(overdue(key, row, watches.stood(key, now), now.wall, STALLED_AFTER).is_some());
        }
        due
    }

    #[test]
    fn a_wall_clock_that_jumps_ends_no_run_and_answers_no_question() {
        let an_hour_on = T0 + 61 * MINUTE;
        let silent = || run(1, T0, None);
        assert_eq!(due(0, &[(0, T0, silent()), (1, an_hour_on, silent())]), [false, false]);
        let asks = || run(2, T0, Some((2, T0 + 30 * MINUTE)));
        assert_eq!(due(0, &[(0, T0, asks()), (1, an_hour_on, asks())]), [false, false]);
        // Nor does a clock that was wrong from the start.
        assert_eq!(due(T0 + MINUTE, &[(0, an_hour_on, silent()), (1, an_hour_on + MINUTE, silent())]), [false, false]);
        assert_eq!(due(T0 + MINUTE, &[(0, an_hour_on, asks()), (1, an_hour_on + MINUTE, asks())]), [false, false]);
    }

    #[test]
    fn a_run_stalls_once_it_was_seen_unchanged_for_so_long_and_an_event_begins_the_time_anew() {
        let looks = [(0, T0, run(1, T0, None)), (9, T0, run(1, T0, None)), (10, T0, run(1, T0, None))];
        assert_eq!(due(0, &looks), [false, false, true], "also with a wall clock that stands still");
        let looks = [(0, T0, run(1, T0, None)), (9, T0, run(2, T0, None)), (18, T0, run(2, T0, None))];
        assert_eq!(due(0, &looks), [false, false, false]);
        // Its last event was stamped by a clock that is an hour ahead.
        let ahead = || run(1, T0 + 60 * MINUTE, None);
        assert_eq!(due(0, &[(0, T0, ahead()), (10, T0 + 10 * MINUTE, ahead())]), [false, true]);
    }

    #[test]
    fn after_a_start_the_time_counts_that_the_log_shows() {
        let silent = || run(1, T0, None);
        assert_eq!(due(T0 + 10 * MINUTE, &[(0, T0, silent())]), [true]);
        assert_eq!(due(T0 + 7 * MINUTE, &[(0, T0, silent()), (3, T0, silent())]), [false, true]);
        let asks = || run(2, T0, Some((2, T0 + 30 * MINUTE)));
        let looks = [(0, T0 + 25 * MINUTE, asks()), (5, T0 + 30 * MINUTE, asks())];
        assert_eq!(due(T0 + 25 * MINUTE, &looks), [false, true]);
        // For a run that came later the log's time at the start means nothing.
        let later = [(0, T0, run(1, T0, None)), (1, T0, run(2, T0 - 60 * MINUTE, None))];
        assert_eq!(due(T0, &later), [false, false]);
    }

    #[test]
    fn other_events_of_a_run_that_waits_do_not_give_its_question_more_time() {
        let asks = |last| {
            let (key, row) = run(2, T0, Some((2, T0 + 30 * MINUTE)));
            (key, RunRow { last: EventRef { seq: last, at: T0 }, ..row })
        };
        let looks = [(0, T0, asks(2)), (20, T0 + 20 * MINUTE, asks(3)), (30, T0 + 30 * MINUTE, asks(4))];
        assert_eq!(due(0, &looks), [false, false, true]);
    }
}
