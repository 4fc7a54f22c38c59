//! Runs over HTTP: what agents do, and what they did.

mod detail;

use warp::http::StatusCode;

use super::page::{Scope, number};
use super::reply::{json, query, segment};
use super::threads::address;
use crate::auth::Principal;
use crate::auth::scopes;
use crate::clock;
use crate::edge::Context;
use crate::edge::routes::{Request, blocking};
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;
use crate::store::runs::{Ending, EventRef, RunKey, RunRow};

use crate::edge::http::reply::Reply;
use crate::protocol::http::{Cancellation, EventAt, EventBy, OpenQuestion, RunItem, RunList, RunState};
use detail::{detail, step};

/// An event as pages name it.
fn at(mark: EventRef) -> EventAt {
    EventAt { seq: mark.seq, at: clock::rfc3339(mark.at) }
}

/// `GET /v1/threads/{t}/runs`: newest first.
pub async fn of_thread(it: Request, thread: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let query = query(&it.query, &["cursor", "limit"])?;
    let (_, thread) = address(&who, thread)?;
    let scope = Scope::of(&["runs", &who.key, &thread]);
    let behind = query.text("cursor").map(|text| scope.open(text).and_then(|place| number(&place))).transpose()?;
    let limit = query.limit()?;
    blocking(move || {
        it.ctx.rights.readable(&who, &thread)?;
        let mut runs = it.ctx.store.runs_of(&who.tenant, &thread)?;
        runs.sort_by_key(|(_, row)| std::cmp::Reverse(row.started.seq));
        runs.retain(|(_, row)| behind.is_none_or(|behind| row.started.seq < behind));
        let more = runs.len() > limit;
        runs.truncate(limit);
        let next = runs.last().filter(|_| more).map(|(_, row)| scope.seal(&row.started.seq.to_be_bytes()));
        let reply = page(&it.ctx, runs, next)?;
        it.ctx.rights.may_read(&who, &thread).map(|()| reply)
    })
    .await
}

/// `GET /v1/runs?state`: those that are open, or wait for somebody, in all threads that the user reads; oldest first.
pub async fn open(it: Request) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let query = query(&it.query, &["state", "cursor", "limit"])?;
    let waiting = match query.text("state") {
        None | Some("open") => false,
        Some("waiting") => true,
        Some(_) => return Err(Error::field("state", "state is open or waiting")),
    };
    let scope = Scope::of(&["runs", &who.key, if waiting { "waiting" } else { "open" }]);
    let behind = query.text("cursor").map(|text| scope.open(text)).transpose()?;
    let limit = query.limit()?;
    blocking(move || {
        let mut runs = Vec::new();
        for key in open_runs(&it.ctx, &who)? {
            let row = it.ctx.store.run(&key)?.filter(|row| row.ended.is_none() && (!waiting || row.waiting.is_some()));
            runs.extend(row.map(|row| (place(&key, &row), key, row)));
        }
        runs.sort_by(|a, b| a.0.cmp(&b.0));
        runs.retain(|(place, ..)| behind.as_ref().is_none_or(|behind| place > behind));
        let more = runs.len() > limit;
        runs.truncate(limit);
        let next = runs.last().filter(|_| more).map(|(place, ..)| scope.seal(place));
        page(&it.ctx, runs.into_iter().map(|(_, key, row)| (key, row)).collect(), next)
    })
    .await
}

/// What a list of open runs is sorted by: since when, then which.
fn place(key: &RunKey, row: &RunRow) -> Vec<u8> {
    let since = row.waiting.as_ref().map_or(row.started.at, |wait| wait.since.at);
    [&since.to_be_bytes()[..], key.thread.as_bytes(), &[0], key.run.as_bytes()].concat()
}

fn open_runs(ctx: &Context, who: &Principal) -> Result<Vec<RunKey>, Error> {
    if scopes::reads_by_scope(who.scopes) {
        return Ok(ctx.store.open_runs(&who.tenant, None)?);
    }
    let threads = ctx.store.threads_of(&who.tenant, &who.user)?.into_iter().chain([ids::inbox(&who.user)]);
    let mut runs = Vec::new();
    for thread in threads {
        runs.extend(ctx.store.open_runs(&who.tenant, Some(&thread))?);
    }
    Ok(runs)
}

fn page(ctx: &Context, runs: Vec<(RunKey, RunRow)>, next: Option<String>) -> Result<Reply, Error> {
    let runs = runs.into_iter().map(|(key, row)| item(ctx, &key, &row)).collect::<Result<_, _>>()?;
    Ok(json(StatusCode::OK, &RunList { runs, next }))
}

/// `GET /v1/threads/{t}/runs/{run}`
pub async fn read(it: Request, thread: &str, run: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    query(&it.query, &[])?;
    let (_, thread) = address(&who, thread)?;
    let run = segment("run", run)?;
    blocking(move || {
        it.ctx.rights.readable(&who, &thread)?;
        let reply = detail(&it.ctx, &RunKey::new(&who.tenant, &thread, &run))?;
        // Looked up again: what came after a removal is not handed out.
        it.ctx.rights.may_read(&who, &thread).map(|()| reply)
    })
    .await
}

/// `GET /v1/runs/{run}`: the run of that name in the threads that the user reads.
pub async fn find(it: Request, run: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    query(&it.query, &[])?;
    let run = segment("run", run)?;
    blocking(move || {
        let mut threads = it.ctx.store.threads_of_run(&who.tenant, &run)?;
        threads.retain(|thread| it.ctx.rights.may_read(&who, thread).is_ok());
        match threads.as_slice() {
            [] => Err(no_run()),
            [thread] => {
                let reply = detail(&it.ctx, &RunKey::new(&who.tenant, thread, &run))?;
                it.ctx.rights.may_read(&who, thread).map(|()| reply)
            }
            several => {
                let why = format!("{} threads have a run of this name: ask for it in its thread", several.len());
                Err(Error::new(Code::Conflict, why).at("run"))
            }
        }
    })
    .await
}

fn no_run() -> Error {
    Error::new(Code::NotFound, "there is no such run").at("run")
}

fn item(ctx: &Context, key: &RunKey, row: &RunRow) -> Result<RunItem, Error> {
    let by =
        |(mark, user): &(EventRef, String)| EventBy { seq: mark.seq, at: clock::rfc3339(mark.at), user: user.clone() };
    let state = match &row.ended {
        None if row.waiting.is_some() => RunState::Waiting,
        None => RunState::Open,
        Some((_, Ending::Completed)) => RunState::Completed,
        Some((_, Ending::Failed)) => RunState::Failed,
        Some((_, Ending::Cancelled)) => RunState::Cancelled,
    };
    let ended = || row.ended.map(|(mark, _)| at(mark));
    let waiting = match &row.waiting {
        Some(wait) => Some(OpenQuestion {
            seq: wait.since.seq,
            at: clock::rfc3339(wait.since.at),
            expires_at: wait.expires_at.map(clock::rfc3339),
            data: step(ctx, key, wait.since.seq)?.map(|step| step.data),
        }),
        None => None,
    };
    Ok(RunItem {
        run: key.run.clone(),
        thread: key.thread.clone(),
        agent: row.agent.clone(),
        state,
        parent_run: row.parent.clone(),
        started: at(row.started),
        last: at(row.last),
        heard_at: clock::rfc3339(row.heard_at()),
        cancel: row.cancel.as_ref().map(|asked| Cancellation {
            requested: by(asked),
            acknowledged: None,
            ended: ended(),
        }),
        ended: ended(),
        executing: row.executing,
        children: row.children,
        waiting,
        resumed: row.resumed.as_ref().map(by),
    })
}
