//! Runs: lists of them, and [`detail`], the page of one.

mod detail;

use std::cmp::Reverse;
use std::sync::Arc;

use warp::http::StatusCode;

use super::meter::Meter;
use super::page::Page;
use super::reply::{Reply, charged, json};
use super::request::Request;
use super::threads::active_threads;
use super::{Api, if_readable};
use crate::auth::{Principal, scopes};
use crate::edge::blocking;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::RunList;
use crate::protocol::ids;
use crate::store::StoreError;
use crate::store::activity::Cell;
use crate::store::runs::RunKey;

/// `GET /v1/threads/{thread}/runs`: newest first.
pub async fn of_thread(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["cursor", "limit"])?;
    let address = it.address()?;
    let page: Page<Reverse<u64>> = Page::read(&query, &it.who, &api.epoch, "runs of a thread", &[&address.name])?;
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let (tenant, thread) = (&*it.who.tenant, &*address.name);
        let read = |_| {
            let before = page.after.as_ref().map_or(u64::MAX, |after| after.0);
            let runs = api.store.runs_of(tenant, thread, before).map(|run| {
                let (seq, key) = run?;
                Ok((Reverse(seq), key))
            });
            let make = |_: &Reverse<u64>, key: RunKey, _: &mut Meter| match api.store.run(&key)? {
                Some(row) => detail::sized_item(&api, &key, &row).map(Some),
                None => Ok(None),
            };
            let (runs, next) = page.fill(runs, &mut meter, make)?;
            Ok(RunList { runs, next })
        };
        let list = api.rights.read(&it.who, thread, read)?;
        Ok(charged(json(StatusCode::OK, &list), meter))
    })
    .await
}

/// `GET /v1/runs?state`: those that are open, or wait for a person, in all threads that the user reads; oldest first.
pub async fn open(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["state", "cursor", "limit"])?;
    let state = query.one_of("state", &["open", "waiting"])?;
    let page: Page<Vec<u8>> = Page::read(&query, &it.who, &api.epoch, "runs", &[state])?;
    let mut meter = api.meter(&it.who, page.memory()).await?;
    blocking(move || {
        let make = |_: &Vec<u8>, key: RunKey, _: &mut Meter| {
            // One that has ended meanwhile is listed no more.
            let Some(row) = api.store.run(&key)?.filter(|row| row.ended.is_none()) else { return Ok(None) };
            if_readable(api.rights.read(&it.who, &key.thread, |_| detail::sized_item(&api, &key, &row)))
        };
        let waiting = state == "waiting";
        let (runs, next) = if scopes::reads_by_scope(it.who.scopes) {
            let runs = api.store.open_runs_by_time(&it.who.tenant, waiting, page.after.as_deref());
            page.fill(runs.map(|run| Ok(run?)), &mut meter, make)?
        } else {
            let threads = active_threads(&api, &it.who)?;
            let runs = page.select(runs_of_member(&api, &it.who, &threads, waiting))?;
            page.fill(runs.into_iter().map(Ok), &mut meter, make)?
        };
        Ok(charged(json(StatusCode::OK, &RunList { runs, next }), meter))
    })
    .await
}

/// The open runs, or of them those that wait, of the threads whose member the user is, of its inbox, and of those in which it
/// works; in no order. Of threads without an open run nothing is read.
fn runs_of_member<'a>(
    api: &'a Api,
    who: &'a Principal,
    threads: &'a [Arc<Cell>],
    waiting: bool,
) -> impl Iterator<Item = Result<(Vec<u8>, RunKey), StoreError>> + 'a {
    let inbox = ids::inbox(&who.user);
    let works = who.scopes.agent.then(|| api.store.threads_of_open_runs(&who.tenant, &who.user));
    let is_new = {
        let inbox = inbox.clone();
        move |thread: &Result<String, StoreError>| match thread {
            // An error is passed on.
            Ok(thread) => *thread != inbox && !api.store.is_member(&who.tenant, thread, &who.user).unwrap_or(false),
            Err(_) => true,
        }
    };
    let works = works.into_iter().flatten().filter(is_new);
    let busy = threads.iter().filter(|cell| cell.open_runs() > 0).map(|cell| Ok(cell.thread().to_owned()));
    let threads = busy.chain([Ok(inbox)]).chain(works);
    let keys = threads.flat_map(move |thread| -> Box<dyn Iterator<Item = Result<RunKey, StoreError>> + 'a> {
        match thread {
            Ok(thread) => Box::new(api.store.open_runs(&who.tenant, &thread)),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    });
    keys.filter_map(move |key| {
        let found = key.and_then(|key| Ok((api.store.run(&key)?, key)));
        match found {
            Ok((Some(row), key)) => {
                let is_listed = row.ended.is_none() && waiting <= row.waiting.is_some();
                is_listed.then(|| Ok((key.time(&row), key)))
            }
            Ok((None, _)) => None,
            Err(error) => Some(Err(error)),
        }
    })
}

/// `GET /v1/threads/{thread}/runs/{run}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let run = it.segment("run")?;
    let mut meter = api.meter(&it.who, detail::MEMORY).await?;
    blocking(move || {
        let key = RunKey::new(&it.who.tenant, &address.name, &run);
        let detail = api.rights.read(&it.who, &key.thread, |_| detail::detail(&api, &key, &mut meter))?;
        Ok(charged(json(StatusCode::OK, &detail), meter))
    })
    .await
}

/// `GET /v1/runs/{run}`: the run of that name in the threads that the user reads.
pub async fn find(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let run = it.segment("run")?;
    let mut meter = api.meter(&it.who, detail::MEMORY).await?;
    blocking(move || {
        let mut threads = Vec::new();
        for thread in api.store.threads_of_run(&it.who.tenant, &run) {
            let thread = thread?;
            threads.extend(if_readable(api.rights.may_read(&it.who, &thread))?.map(|()| thread));
            if threads.len() > 1 {
                let why = "several threads have a run of this name: ask for it in its thread";
                return Err(Error::new(Code::Conflict, why).at("run"));
            }
        }
        let thread = threads.pop().ok_or_else(detail::no_run)?;
        let key = RunKey::new(&it.who.tenant, &thread, &run);
        let found = api.rights.read(&it.who, &thread, |_| detail::detail(&api, &key, &mut meter));
        // Of a thread that the user has just been removed from, not even its name is said.
        let detail = if_readable(found)?.ok_or_else(detail::no_run)?;
        Ok(charged(json(StatusCode::OK, &detail), meter))
    })
    .await
}
