//! A thread's runs as an AG-UI event stream: [`crate::views::agui`] over the same Server-Sent Events as the thread itself.

use std::collections::VecDeque;
use std::sync::Arc;

use warp::Reply as _;
use warp::http::StatusCode;
use warp::reply::Response;
use warp::sse::Event;

use super::{AfterEvent, COPIES, EventFormat, RequestedStart, Streams};
use crate::delivery::subscriptions::OutEvent;
use crate::edge::blocking;
use crate::edge::cursor::{check_epoch, name_epoch};
use crate::edge::http::request::Request;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;
use crate::store::messages::MessageKey;
use crate::store::runs::{RunKey, RunRow};
use crate::store::{Store, StoreError};
use crate::views::agui::{Lookup, Mapper, Next, ThreadEvent};

/// `GET /v1/threads/{thread}/agui`
pub async fn stream(streams: Arc<Streams>, it: Request) -> Result<Response, Error> {
    let query = it.query(&["after", "run", "epoch", "ticket"])?;
    let address = it.address()?;
    let run = query.text("run").map(str::to_owned);
    let (head, requested) = streams.rights.read(&it.who, &address.name, |head| {
        // AG-UI has nothing to say before a run begins, so a client that must reload is refused.
        check_epoch(query.text("epoch"), &streams.epoch)?;
        Ok((head, RequestedStart::read(&it, &query, head, &streams.epoch)?))
    })?;
    drop(query);
    if let Some(run) = &run {
        ids::check_text("run", run)?;
    }
    let key = run.as_deref().map(|run| RunKey::new(&it.who.tenant, &address.name, run));

    let start = {
        let (streams, who, thread, key) = (streams.clone(), it.who.clone(), address.name.clone(), key.clone());
        let find = move || {
            streams.rights.read(&who, &thread, |_| match &key {
                Some(key) => StartPoint::of_run(&streams.store, key, requested.after),
                None => StartPoint::of_thread(&streams.store, &who.tenant, &thread, requested.after, head).map(Some),
            })
        };
        blocking(find).await?
    };
    let Some(StartPoint { after, cursor }) = start else {
        // A browser, which comes back by itself, does not come back after this.
        let mut reply = StatusCode::NO_CONTENT.into_response();
        name_epoch(reply.headers_mut(), &streams.epoch);
        return Ok(reply);
    };

    let silent_to = (cursor < after).then_some(after);
    let mapper = Mapper::new(&address.called, run, silent_to, requested.resumes);
    let (tenant, thread) = (it.who.tenant.clone(), address.name.clone());
    let format = AguiFormat { key, tenant, thread, store: streams.store.clone(), mapper };
    streams.start(it.who, address, cursor, None, format)
}

/// Where a stream begins.
struct StartPoint {
    /// Events after this seq are sent.
    after: u64,
    /// Events after this seq are read, so that it is known what is open at `after`.
    cursor: u64,
}

impl StartPoint {
    /// A stream of all runs.
    fn of_thread(
        store: &Store,
        tenant: &str,
        thread: &str,
        after: Option<u64>,
        head: u64,
    ) -> Result<StartPoint, Error> {
        let after = after.unwrap_or(head);
        let mut first = None;
        let mut look_at = |key: &RunKey| {
            let since = store.run(key)?.and_then(|row| active_since(&row, after));
            first = first.into_iter().chain(since).min();
            Ok::<_, StoreError>(())
        };
        if after == head {
            // What is active at the head is among the runs that are open now; further back it may be any run.
            for key in store.open_runs(tenant, thread) {
                look_at(&key?)?;
            }
        } else {
            for run in store.runs_of(tenant, thread, after.saturating_add(1)) {
                look_at(&run?.1)?;
            }
        }
        Ok(StartPoint::new(after, first))
    }

    /// A stream of one run; `None` if it has nothing after `after`.
    fn of_run(store: &Store, key: &RunKey, after: Option<u64>) -> Result<Option<StartPoint>, Error> {
        let none = || Error::new(Code::NotFound, "there is no such run on this thread").at("run");
        let row = store.run(key)?.ok_or_else(none)?;
        let after = after.unwrap_or(row.started.seq - 1);
        if row.ended.is_some_and(|(mark, _)| mark.seq <= after) {
            return Ok(None);
        }
        Ok(Some(StartPoint::new(after, active_since(&row, after))))
    }

    fn new(after: u64, active_since: Option<u64>) -> StartPoint {
        StartPoint { after, cursor: active_since.map_or(after, |since| since - 1) }
    }
}

/// Since when at least the run has been active, if it may be at `seq`.
fn active_since(row: &RunRow, seq: u64) -> Option<u64> {
    let started = row.started.seq <= seq;
    let ended = row.ended.is_some_and(|(mark, _)| mark.seq <= seq);
    let waits = row.waiting.as_ref().is_some_and(|wait| wait.since.seq <= seq);
    if !started || ended || waits {
        return None;
    }
    let resumed = row.resumed.as_ref().map(|(mark, _)| mark.seq);
    Some(resumed.filter(|resumed| *resumed <= seq).unwrap_or(row.started.seq))
}

/// The events as AG-UI has them.
struct AguiFormat {
    store: Arc<Store>,
    tenant: Arc<str>,
    thread: String,
    mapper: Mapper,
    /// The run that was asked for.
    key: Option<RunKey>,
}

impl AguiFormat {
    /// Whether the run still waits for the answer to this question.
    fn waits(&self, question: u64) -> bool {
        let Some(key) = &self.key else { return false };
        // A store that fails says so to the next read of the stream.
        let Ok(Some(row)) = self.store.run(key) else { return false };
        row.waiting.is_some_and(|wait| wait.since.seq == question)
    }
}

/// What the store has of a thread. A store that fails says so to the next read of the stream; until then nobody speaks as a
/// model.
struct StoreLookup<'a> {
    store: &'a Store,
    tenant: &'a str,
    thread: &'a str,
}

impl Lookup for StoreLookup<'_> {
    fn event(&self, seq: u64) -> Option<ThreadEvent> {
        let event = self.store.event(self.tenant, self.thread, seq).ok().flatten()?;
        Some(ThreadEvent { frame: event.frame.to_string(), privileged: event.privileged })
    }

    fn restarts(&self, run: &str, message: &str) -> u32 {
        let key = MessageKey { run: RunKey::new(self.tenant, self.thread, run), message: message.to_owned() };
        self.store.message(&key).ok().flatten().map_or(0, |row| row.restarts)
    }
}

impl EventFormat for AguiFormat {
    fn event(&mut self, event: &OutEvent, out: &mut VecDeque<Event>) -> AfterEvent {
        let OutEvent { seq, restarts, ref frame } = *event;
        let mut lines = Vec::new();
        let lookup = StoreLookup { store: &self.store, tenant: &self.tenant, thread: &self.thread };
        let next = self.mapper.event(frame, restarts, &lookup, &mut lines);
        let count = lines.len();
        for (i, json) in lines.iter().enumerate() {
            let event = Event::default().data(super::line(json));
            // Only the last one has the id: who has seen it has all that became of the event.
            out.push_back(match seq.filter(|_| i + 1 == count) {
                Some(seq) => event.id(seq.to_string()),
                None => event,
            });
        }
        match next {
            Next::Rejoin => AfterEvent::Rejoin,
            Next::Ended => AfterEvent::End,
            // A question that was answered long ago is only a part of the run's history.
            Next::Waiting { seq } if self.waits(seq) => AfterEvent::End,
            Next::Continue | Next::Waiting { .. } => AfterEvent::Continue,
        }
    }

    fn memory(&self, frame: &str) -> usize {
        (frame.len() + self.mapper.waiting_bytes()) * COPIES
    }

    fn error(&mut self, error: &Error) -> Event {
        match self.mapper.error(error) {
            Some(json) => Event::default().data(super::line(&json)),
            None => Event::default().comment(error.code.as_str()),
        }
    }
}
