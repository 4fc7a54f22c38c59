//! The reaper: ends runs that have stalled, and answers questions whose time is up.
//!
//! Every node looks for such runs, and each may publish the same event. Its idempotency key makes them one, and the
//! projector refuses it if the run has gone on meanwhile.
//!
//! What it does stays in the log, so it does not trust the wall clock, which may jump or be wrong: it goes by the time that
//! it has seen pass ([`Watches`]).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use crate::store::runs::{RunKey, RunOutline};
use crate::{clock, telemetry};

/// How often it is looked which runs are due; more often where they count as stalled sooner.
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
        let watches = Arc::new(Mutex::new(Watches::new(self.stalled_after)));
        let mut begun = false;
        loop {
            every.tick().await;
            let Some(log_time) = self.projector.log_time_at_start() else { continue };
            let (store, watches) = (self.store.clone(), watches.clone());
            let look = move || {
                if !begun {
                    begin(&store, &watches, log_time)?;
                }
                find_overdue(&store, &watches, Now { elapsed: Instant::now(), wall: clock::now_ms() })
            };
            // Without an answer it panicked, which is reported; or the runtime is shutting down, and this task with it.
            let Ok(due) = tokio::task::spawn_blocking(look).await else { continue };
            match due {
                Ok(due) => {
                    begun = true;
                    self.publish(due).await;
                }
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
}

/// What keeps a run where it is, and what it would be ended for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    /// The run's newest event, and the number of its deltas.
    Silent { last: u64, pieces: u64 },
    /// The question that it waits for.
    Asks { question: u64 },
}

impl Stands {
    fn of(run: &RunOutline) -> Stands {
        match &run.waiting {
            Some(wait) => Stands::Asks { question: wait.since.seq },
            None => Stands::Silent { last: run.last, pieces: run.pieces },
        }
    }
}

#[derive(Debug)]
struct Watch {
    run: RunOutline,
    since: Instant,
    /// How long it had been so by then, as far as the log shows.
    before: Duration,
    /// Where it stands in [`Watches::times`].
    listed: Option<Instant>,
}

impl Watch {
    /// When something is to happen, if the run stays as it is. A run that waits for a person, or for runs that work for it,
    /// does not stall. A question has as long as there was between its own time and the end that it names.
    fn due(&self, stalled_after: Duration) -> Option<Instant> {
        let may_stand = match &self.run.waiting {
            Some(wait) => Duration::from_millis(wait.expires_at?.saturating_sub(wait.since.at)),
            None if self.run.children == 0 => stalled_after,
            None => return None,
        };
        // An end that no clock of this machine reaches never comes.
        self.since.checked_add(may_stand.saturating_sub(self.before))
    }

    /// Whether the end that a question names has come by the wall clock as well. By itself that is not enough.
    fn has_expired(&self, wall: u64) -> bool {
        self.run.waiting.and_then(|wait| wait.expires_at).is_none_or(|until| wall >= until)
    }
}

/// How long this node has seen each open run stand where it is. What was there when the node had read its log has stood for
/// as long as log time has gone on beyond it: that is what the clocks of those say who wrote records after it. From then on it
/// is the node's own clock of elapsed time. So a jump of the wall clock counts for nothing, and what happened while no node
/// ran does not count either.
///
/// Each commit says which runs it has changed, so nothing is read to know it; and the runs are listed by when they are due,
/// so that a look costs as much as there is to do. An event of a run makes it due later: that costs the commit one look-up,
/// and the list is put right when the run would have been due before.
#[derive(Debug)]
struct Watches {
    stalled_after: Duration,
    runs: HashMap<Arc<RunKey>, Watch>,
    /// When runs are to be looked at: not after they are due.
    times: BTreeSet<(Instant, Arc<RunKey>)>,
    /// Those that wait for a person.
    waiting: usize,
}

impl Watches {
    fn new(stalled_after: Duration) -> Watches {
        Watches { stalled_after, runs: HashMap::new(), times: BTreeSet::new(), waiting: 0 }
    }

    /// A run that was open when the node had read its log up to this time, unless it is known already.
    fn found(&mut self, key: RunKey, run: RunOutline, log_time: u64, now: Instant) {
        if run.ended || self.runs.contains_key(&key) {
            return;
        }
        let stands_since = run.waiting.map_or(run.heard_at, |wait| wait.since.at);
        self.add(key, run, now, Duration::from_millis(log_time.saturating_sub(stands_since)));
    }

    /// A run that a commit has changed.
    fn changed(&mut self, key: RunKey, run: RunOutline, now: Instant) {
        let Some(watch) = self.runs.get_mut(&key) else {
            if !run.ended {
                self.add(key, run, now, Duration::ZERO);
            }
            return;
        };
        self.waiting -= usize::from(watch.run.waiting.is_some());
        if run.ended {
            if let Some((key, Watch { listed: Some(at), .. })) = self.runs.remove_entry(&key) {
                self.times.remove(&(at, key));
            }
            return;
        }
        self.waiting += usize::from(run.waiting.is_some());
        if Stands::of(&watch.run) != Stands::of(&run) {
            (watch.since, watch.before) = (now, Duration::ZERO);
        }
        watch.run = run;
        self.list(&key);
    }

    fn add(&mut self, key: RunKey, run: RunOutline, since: Instant, before: Duration) {
        self.waiting += usize::from(run.waiting.is_some());
        let key = Arc::new(key);
        self.runs.insert(key.clone(), Watch { run, since, before, listed: None });
        self.list(&key);
    }

    /// Lists the run for when it is due, unless it is looked at before that.
    fn list(&mut self, key: &RunKey) {
        let Some((key, watch)) = self.runs.get_key_value(key) else { return };
        let (Some(due), listed) = (watch.due(self.stalled_after), watch.listed) else { return };
        if listed.is_some_and(|at| at <= due) {
            return;
        }
        let key = key.clone();
        if let Some(at) = listed {
            self.times.remove(&(at, key.clone()));
        }
        self.list_at(key, due);
    }

    fn list_at(&mut self, key: Arc<RunKey>, at: Instant) {
        if let Some(watch) = self.runs.get_mut(&key) {
            watch.listed = Some(at);
            self.times.insert((at, key));
        }
    }

    /// The runs that are due, with what is known of them. They stay listed, in case what is done about them fails.
    fn due(&mut self, now: Now) -> Vec<(Arc<RunKey>, RunOutline)> {
        let mut looked_at = Vec::new();
        while let Some((at, _)) = self.times.first()
            && *at <= now.elapsed
        {
            looked_at.extend(self.times.pop_first().map(|(_, key)| key));
        }

        let mut overdue = Vec::new();
        for key in looked_at {
            let Some(watch) = self.runs.get_mut(&key) else { continue };
            watch.listed = None;
            match watch.due(self.stalled_after) {
                Some(due) if due <= now.elapsed => {
                    if watch.has_expired(now.wall) {
                        overdue.push((key.clone(), watch.run));
                    }
                    self.list_at(key, now.elapsed);
                }
                Some(due) => self.list_at(key, due),
                // Listed again when it changes.
                None => {}
            }
        }
        overdue
    }
}

fn lock(watches: &Mutex<Watches>) -> MutexGuard<'_, Watches> {
    watches.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hears of changes from now on, and reads once which runs are open.
fn begin(store: &Store, watches: &Arc<Mutex<Watches>>, log_time: u64) -> Result<(), Error> {
    let heard = watches.clone();
    store.listen_to_runs(move |changes| {
        let (mut watches, now) = (lock(&heard), Instant::now());
        for (key, run) in changes {
            watches.changed(key, run, now);
        }
    });
    for key in store.all_open_runs() {
        let key = key?;
        // Under the lock: what a commit changes after the row was read is heard of after that.
        let mut watches = lock(watches);
        if let Some(row) = store.run(&key)? {
            watches.found(key, row.outline(), log_time, Instant::now());
        }
    }
    Ok(())
}

/// The events that are due, and by the way the gauges of open runs.
fn find_overdue(store: &Store, watches: &Mutex<Watches>, now: Now) -> Result<Vec<Overdue>, Error> {
    let due = {
        let mut watches = lock(watches);
        telemetry::runs("open").set(watches.runs.len() as f64);
        telemetry::runs("waiting").set(watches.waiting as f64);
        watches.due(now)
    };

    let mut overdue = Vec::with_capacity(due.len());
    for (key, known) in due {
        // A commit that is being heard of has changed it: then it is not due any more.
        if store.run(&key)?.is_some_and(|row| row.outline() == known) {
            overdue.push(event_for(&key, &known));
        }
    }
    Ok(overdue)
}

/// What ends a run that has stalled, or answers a question whose time is up.
fn event_for(key: &RunKey, known: &RunOutline) -> Overdue {
    let run = &key.run;
    match &known.waiting {
        Some(wait) => Overdue {
            kind: AGENT_RESUMED,
            parent: wait.since.seq,
            data: json!({"answer": null, "expired": true}),
            idempotency: format!("expired-{}-{run:.90}", wait.since.seq),
            key: key.clone(),
        },
        None => Overdue {
            kind: AGENT_FAILED,
            parent: known.last,
            data: json!({
                "code": "stalled",
                "message": "the run had no event for too long",
                "after": known.last,
                "pieces": known.pieces,
            }),
            idempotency: format!("stalled-{}-{}-{run:.80}", known.last, known.pieces),
            key: key.clone(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::runs::{Ending, EventRef, RunRow, WaitRow};

    const MINUTE: u64 = 60_000;
    const T0: u64 = 500_000_000 * MINUTE;
    const STALLED_AFTER: Duration = Duration::from_secs(600);

    fn run(last: u64, at: u64, waiting: Option<(u64, u64)>) -> (RunKey, RunRow) {
        let row = RunRow {
            started: EventRef { seq: 1, at: T0 },
            last: EventRef { seq: last, at },
            waiting: waiting.map(|(seq, until)| WaitRow { since: EventRef { seq, at }, expires_at: Some(until) }),
            ..RunRow::new("scout".into(), "scout".into())
        };
        (RunKey::new("acme", "t", "r"), row)
    }

    /// Looks at a run again and again, each time after so many minutes of elapsed time, with such a wall clock; gives whether
    /// it was due each time.
    fn due(log_time: u64, looks: &[(u64, u64, (RunKey, RunRow))]) -> Vec<bool> {
        let (mut watches, begin) = (Watches::new(STALLED_AFTER), Instant::now());
        let mut due = Vec::new();
        for (minutes, wall, (key, row)) in looks {
            let now = Now { elapsed: begin + Duration::from_millis(minutes * MINUTE), wall: *wall };
            match due.is_empty() {
                true => watches.found(key.clone(), row.outline(), log_time, now.elapsed),
                false => watches.changed(key.clone(), row.outline(), now.elapsed),
            }
            due.push(!watches.due(now).is_empty());
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
    #[test]
    fn a_look_goes_through_the_runs_that_are_due_and_through_no_others() {
        let (mut watches, begin) = (Watches::new(STALLED_AFTER), Instant::now());
        let at = |minutes: u64| begin + Duration::from_millis(minutes * MINUTE);
        let row = run(1, T0, None).1;
        let key = |n: u64| RunKey::new("acme", "t", &format!("r{n}"));
        for n in 0..1_000 {
            watches.changed(key(n), row.outline(), at(n / 100));
        }
        let look = |watches: &mut Watches, minutes| watches.due(Now { elapsed: at(minutes), wall: T0 }).len();
        assert_eq!(look(&mut watches, 9), 0);
        // All but one of the first hundred have gone on, some have ended, and one waits for others.
        for n in 1..98 {
            watches.changed(key(n), RunRow { last: EventRef { seq: 2, at: T0 }, ..row.clone() }.outline(), at(9));
        }
        let ended = RunRow { ended: Some((EventRef { seq: 2, at: T0 }, Ending::Completed)), ..row.clone() };
        watches.changed(key(98), ended.outline(), at(9));
        watches.changed(key(99), RunRow { children: 1, ..row.clone() }.outline(), at(9));

        let listed = watches.times.iter().filter(|(due, _)| *due <= at(10)).count();
        assert_eq!(listed, 99, "those that were due then, and none of the other 900");
        assert_eq!(look(&mut watches, 10), 1);
        assert_eq!(look(&mut watches, 10), 1, "until something is done about it");
        watches.changed(key(0), ended.outline(), at(10));
        assert_eq!(look(&mut watches, 10), 0);
        // A run whose helper has ended is silent since its own last event.
        watches.changed(key(99), row.outline(), at(10));
        assert_eq!(look(&mut watches, 10), 1);
        assert_eq!((watches.runs.len(), watches.waiting), (998, 0));
    }

    #[test]
    fn what_a_commit_changes_while_open_runs_are_read_counts() {
        let (mut watches, begin) = (Watches::new(STALLED_AFTER), Instant::now());
        let (key, row) = run(1, T0, None);
        watches.changed(key.clone(), row.outline(), begin);
        watches.found(key.clone(), row.outline(), T0 + 60 * MINUTE, begin);
        assert!(watches.due(Now { elapsed: begin, wall: T0 }).is_empty(), "it was heard of just now");
        let asks = run(2, T0, Some((2, T0 + 30 * MINUTE))).1;
        watches.changed(key, asks.outline(), begin);
        assert_eq!((watches.runs.len(), watches.waiting), (1, 1));
    }
}
