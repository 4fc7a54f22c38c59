//! A thread's runs as an AG-UI event stream: [`crate::views::agui`] over the same Server-Sent Events as the thread itself.

use std::collections::VecDeque;
use std::sync::Arc;

use warp::Reply as _;
use warp::http::StatusCode;
use warp::reply::Response;
use warp::sse::Event;

use super::{After, Begin, Form};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::edge::Context;
use crate::edge::http::reply::query;
use crate::edge::http::threads::address;
use crate::edge::routes::{Request, blocking};
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;
use crate::store::runs::{RunKey, RunRow};
use crate::telemetry;
use crate::views::agui::{Mapper, Next};

/// `GET /v1/threads/{t}/agui`
pub async fn open(it: Request, thread: &str) -> Result<Response, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let query = query(&it.query, &["after", "run"])?;
    let (called, thread) = address(&who, thread)?;
    let head = it.ctx.rights.readable(&who, &thread)?;
    let Begin { after, resumes } = Begin::of(&it, &query, head)?;
    let run = query.text("run").map(|run| ids::check_text("run", run).map(|()| run.to_owned())).transpose()?;
    let only = run.clone().map(|run| RunKey::new(&who.tenant, &thread, &run));
    let (ctx, tenant) = (it.ctx.clone(), who.tenant.clone());
    let place = blocking(move || Place::find(&ctx, &tenant, &thread, only.as_ref(), after, head)).await?;
    let Some(Place { after, cursor }) = place else {
        // To a browser that comes back by itself this says that there is nothing to come back for.
        telemetry::http_requests("agui", 204).increment(1);
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let mapper = Mapper::new(&called, run.clone(), (cursor < after).then_some(after), resumes);
    let form = Agui { key: run.map(|run| key(&who, &called, &run)), ctx: it.ctx.clone(), mapper };
    super::start(&it, "agui", who, called, cursor, form)
}

fn key(who: &Principal, called: &str, run: &str) -> RunKey {
    RunKey::new(&who.tenant, &ids::resolve(&who.user, called), run)
}

/// Where a stream begins.
struct Place {
    /// Behind this seq events are told.
    after: u64,
    /// From behind this one on they are read, so that what is open is known.
    cursor: u64,
}

impl Place {
    /// None, if the run that is asked for has nothing behind `after`.
    fn find(
        ctx: &Context,
        tenant: &str,
        thread: &str,
        only: Option<&RunKey>,
        after: Option<u64>,
        head: u64,
    ) -> Result<Option<Place>, Error> {
        let Some(key) = only else {
            let after = after.unwrap_or(head);
            // At the head it is among those that are open now; further back it may be any.
            let rows: Vec<RunRow> = if after == head {
                let open = ctx.store.open_runs(tenant, Some(thread))?;
                open.iter().filter_map(|key| ctx.store.run(key).transpose()).collect::<Result<_, _>>()?
            } else {
                ctx.store.runs_of(tenant, thread)?.into_iter().map(|(_, row)| row).collect()
            };
            let open = rows.iter().filter_map(|row| open_since(row, after)).min();
            return Ok(Some(Place { after, cursor: open.map_or(after, |since| since - 1) }));
        };
        let row = ctx.store.run(key)?;
        let row = row.ok_or_else(|| Error::new(Code::NotFound, "there is no such run on this thread").at("run"))?;
        let after = after.unwrap_or(row.started.seq - 1);
        if row.ended.is_some_and(|(mark, _)| mark.seq <= after) {
            return Ok(None);
        }
        Ok(Some(Place { after, cursor: open_since(&row, after).map_or(after, |since| since - 1) }))
    }
}

/// Since when at least the run has been at work, if it may be at `seq`.
fn open_since(row: &RunRow, seq: u64) -> Option<u64> {
    let ended = row.ended.is_some_and(|(mark, _)| mark.seq <= seq);
    let waits = row.waiting.as_ref().is_some_and(|wait| wait.since.seq <= seq);
    let resumed = row.resumed.as_ref().map(|(mark, _)| mark.seq).filter(|resumed| *resumed <= seq);
    (row.started.seq <= seq && !ended && !waits).then(|| resumed.unwrap_or(row.started.seq))
}

/// The events as AG-UI has them.
struct Agui {
    ctx: Arc<Context>,
    mapper: Mapper,
    /// The run that was asked for.
    key: Option<RunKey>,
}

impl Agui {
    /// The run still waits for the answer to this question.
    fn waits(&self, seq: u64) -> bool {
        let row = self.key.as_ref().and_then(|key| self.ctx.store.run(key).ok().flatten());
        row.and_then(|row| row.waiting).is_some_and(|wait| wait.since.seq == seq)
    }
}

impl Form for Agui {
    fn event(&mut self, seq: Option<u64>, frame: &str, out: &mut VecDeque<Event>) -> After {
        let mut lines = Vec::new();
        let next = self.mapper.event(frame, &mut lines);
        let last = lines.len();
        for (i, json) in lines.iter().enumerate() {
            let event = Event::default().data(super::line(json));
            // Only behind the last one all that became of the event is there.
            out.push_back(match seq.filter(|_| i + 1 == last) {
                Some(seq) => event.id(seq.to_string()),
                None => event,
            });
        }
        match next {
            Next::Again => After::Again,
            Next::Ended => After::End,
            // What was answered long ago is no end, only a part of the run's history.
            Next::Waits { seq } if self.waits(seq) => After::End,
            Next::On | Next::Waits { .. } => After::On,
        }
    }

    fn error(&mut self, error: &Error) -> Event {
        match self.mapper.error(error) {
            Some(json) => Event::default().data(super::line(&json)),
            None => Event::default().comment(error.code.as_str()),
        }
    }
}
