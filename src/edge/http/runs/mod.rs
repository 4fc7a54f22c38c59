//! Runs: lists of them, and [`detail`], the page of one.

mod detail;

use std::cmp::Reverse;
use std::sync::Arc;

use warp::http::StatusCode;

use super::page::Page;
use super::reply::{Reply, json};
use super::request::Request;
use super::{Api, if_readable};
use crate::auth::{Principal, scopes};
use crate::edge::blocking;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::RunList;
use crate::protocol::ids;
use crate::store::runs::{RunKey, RunRow};

/// `GET /v1/threads/{thread}/runs`: newest first.
pub async fn of_thread(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["cursor", "limit"])?;
    let address = it.address()?;
    let page: Page<Reverse<u64>> = Page::read(&query, &it.who, "runs of a thread", &[&address.name])?;
    blocking(move || {
        let thread = &*address.name;
        let read = |_| {
            let rows = api.store.runs_of(&it.who.tenant, thread)?;
            let rows = rows.into_iter().map(|(key, row)| (Reverse(row.started.seq), (key, row))).collect();
            let (rows, next) = page.cut(rows);
            let runs = rows.iter().map(|(_, (key, row))| detail::item(&api, key, row));
            Ok(RunList { runs: runs.collect::<Result<_, _>>()?, next })
        };
        Ok(json(StatusCode::OK, &api.rights.read(&it.who, thread, read)?))
    })
    .await
}

/// `GET /v1/runs?state`: those that are open, or wait for a person, in all threads that the user reads; oldest first.
pub async fn open(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["state", "cursor", "limit"])?;
    let state = query.one_of("state", &["open", "waiting"])?;
    let page: Page<Vec<u8>> = Page::read(&query, &it.who, "runs", &[state])?;
    blocking(move || {
        let mut rows = Vec::new();
        for key in open_runs(&api, &it.who)? {
            let row = api.store.run(&key)?.filter(|row| row.ended.is_none());
            if let Some(row) = row.filter(|row| state == "open" || row.waiting.is_some()) {
                rows.push((sort_key(&key, &row), (key, row)));
            }
        }

        let (rows, next) = page.cut(rows);
        let mut runs = Vec::with_capacity(rows.len());
        for (_, (key, row)) in rows {
            let read = api.rights.read(&it.who, &key.thread, |_| detail::item(&api, &key, &row));
            runs.extend(if_readable(read)?);
        }
        Ok(json(StatusCode::OK, &RunList { runs, next }))
    })
    .await
}

/// What a list of open runs is sorted by: since when, then which.
fn sort_key(key: &RunKey, row: &RunRow) -> Vec<u8> {
    let since = row.waiting.as_ref().map_or(row.started.at, |wait| wait.since.at);
    [&since.to_be_bytes()[..], key.thread.as_bytes(), &[0], key.run.as_bytes()].concat()
}

/// The open runs of the threads that the user reads.
fn open_runs(api: &Api, who: &Principal) -> Result<Vec<RunKey>, Error> {
    if scopes::reads_by_scope(who.scopes) {
        return Ok(api.store.open_runs(&who.tenant, None)?);
    }
    let mut threads = api.store.threads_of(&who.tenant, &who.user)?;
    threads.push(ids::inbox(&who.user));
    let mut runs = Vec::new();
    for thread in threads {
        runs.extend(api.store.open_runs(&who.tenant, Some(&thread))?);
    }
    Ok(runs)
}

/// `GET /v1/threads/{thread}/runs/{run}`
pub async fn read(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let run = it.segment("run")?;
    blocking(move || {
        let key = RunKey::new(&it.who.tenant, &address.name, &run);
        let detail = api.rights.read(&it.who, &key.thread, |_| detail::detail(&api, &key))?;
        Ok(json(StatusCode::OK, &detail))
    })
    .await
}

/// `GET /v1/runs/{run}`: the run of that name in the threads that the user reads.
pub async fn find(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let run = it.segment("run")?;
    blocking(move || {
        let mut threads = Vec::new();
        for thread in api.store.threads_of_run(&it.who.tenant, &run)? {
            threads.extend(if_readable(api.rights.may_read(&it.who, &thread))?.map(|()| thread));
        }

        match threads.as_slice() {
            [] => Err(detail::no_run()),
            [thread] => {
                let key = RunKey::new(&it.who.tenant, thread, &run);
                let found = api.rights.read(&it.who, thread, |_| detail::detail(&api, &key));
                // Of a thread that the user has just been removed from, not even its name is said.
                let detail = if_readable(found)?.ok_or_else(detail::no_run)?;
                Ok(json(StatusCode::OK, &detail))
            }
            several => {
                let why = format!("{} threads have a run of this name: ask for it in its thread", several.len());
                Err(Error::new(Code::Conflict, why).at("run"))
            }
        }
    })
    .await
}
