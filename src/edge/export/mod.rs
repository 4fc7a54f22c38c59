//! `GET /v1/export`: what an analyst takes away of its tenant's threads.
//!
//! An export is read as fast as its client takes it: in bounded turns on blocking threads ([`walk`]), each charged to the
//! node's memory from before it reads until its text has left. Rights are looked up again before every turn. Few turns
//! run at once; more exports may be open, since a client that reads slowly costs little, but few of one tenant. What is in the text, and what proves it: [`crate::views::export`].

mod query;
mod walk;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::sync::Semaphore;
use warp::Reply as _;
use warp::http::{HeaderValue, header};
use warp::reply::Response;

use self::query::ExportQuery;
use self::walk::Walk;
use super::blocking;
use super::cursor::name_epoch;
use super::http::request::Request;
use crate::auth::{Authenticator, Principal, Rights, scopes};
use crate::memory::{self, Pool};
use crate::projector::level::Level;
use crate::protocol::error::{Code, Error};
use crate::store::Store;
use crate::views::export::{Format, Note};
use crate::{clock, panics};

/// Exports that are open on a node, and of them those of one tenant.
const OPEN: usize = 16;
const OF_TENANT: usize = 2;
/// Those that read at the same time.
const AT_ONCE: usize = 4;
/// When to come back if there are so many.
const RETRY_MS: u64 = 5_000;
/// What a turn holds: its text, which grows by doubling, and what that is made of. A larger event is charged for itself.
const TURN_MEMORY: usize = 2 << 20;
/// How long a turn waits for memory: less than a connection may be silent, so that the client is told.
const MEMORY_WITHIN: Duration = Duration::from_secs(20);

/// What exports work with.
pub struct Exports {
    pub auth: Arc<Authenticator>,
    pub rights: Rights,
    pub level: Arc<Level>,
    pub store: Arc<Store>,
    /// The log's.
    pub epoch: String,
    /// What exports hold is charged to it.
    pub memory: Pool,
    pub limits: Limits,
}

pub struct Limits {
    /// How many of each tenant are open.
    open: Mutex<HashMap<Arc<str>, usize>>,
    turns: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { open: Mutex::default(), turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

/// One of the exports that may be open at once.
struct Permit {
    exports: Arc<Exports>,
    tenant: Arc<str>,
}

impl Exports {
    fn permit(self: &Arc<Exports>, tenant: &Arc<str>) -> Result<Permit, Error> {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_tenant = open.get(tenant).copied().unwrap_or_default();
        if of_tenant >= OF_TENANT || open.values().sum::<usize>() >= OPEN {
            let why = format!("{OPEN} exports are open at once on a node, {OF_TENANT} of one tenant: come back later");
            return Err(Error::new(Code::Unavailable, why).retry_after(RETRY_MS));
        }
        open.insert(tenant.clone(), of_tenant + 1);
        Ok(Permit { exports: self.clone(), tenant: tenant.clone() })
    }

    /// Reads off the threads that serve sockets, once it is its turn. Whoever waits for memory does so before this.
    async fn in_turn<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.limits.turns.clone().acquire_owned().await;
        let turn = turn.map_err(|_| Error::new(Code::Internal, "no export has its turn any more"))?;
        blocking(move || {
            // Also of those whose client is gone meanwhile.
            let _turn = turn;
            read()
        })
        .await
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.exports.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&self.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(open.remove(&self.tenant)),
        }
    }
}

/// `GET /v1/export`
pub async fn export(exports: Arc<Exports>, it: Request) -> Result<Response, Error> {
    let wanted = ExportQuery::read(&it)?;
    let permit = exports.permit(&it.who.tenant)?;
    // Whatever was in the log when this was asked for is in the export.
    exports.level.reach().await?;
    let (reading, who) = (exports.clone(), it.who.clone());
    let walk = exports
        .in_turn(move || {
            if let Some(thread) = &wanted.thread {
                reading.rights.readable(&who, thread)?;
            }
            Walk::begin(&reading.store, &reading.epoch, &who, wanted)
        })
        .await?;

    let format = walk.format();
    let running = Running { permit, who: it.who, walk };
    let body = stream::unfold(Some(running), |running| async { running?.next().await });
    let mut reply = warp::reply::stream(body).into_response();
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    name_epoch(headers, &exports.epoch);
    Ok(reply)
}

/// An export that is being sent.
struct Running {
    permit: Permit,
    who: Principal,
    walk: Walk,
}

type Next = Option<(Result<Bytes, std::io::Error>, Option<Running>)>;

impl Running {
    /// The next piece of the body, or none after the last one. What fails ends it with a line that says so.
    async fn next(mut self) -> Next {
        let format = self.walk.format();
        loop {
            if self.walk.is_finished() {
                return None;
            }
            match self.turn().await {
                Ok((running, text)) if text.is_empty() => self = running,
                Ok((running, text)) => return Some((Ok(text), Some(running))),
                Err(error) => return Some((Ok(error_line(format, &error)), None)),
            }
        }
    }

    async fn turn(self) -> Result<(Running, Bytes), Error> {
        let Running { permit, who, mut walk } = self;
        let exports = permit.exports.clone();
        check_right(&exports, &who)?;
        let charged = exports.memory.charge(&who.key, TURN_MEMORY, MEMORY_WITHIN).await;
        let no_memory = |_| Error::new(Code::Unavailable, "the server has had no memory left for this export");
        let mut charge = charged.map_err(no_memory)?;
        let reading = exports.clone();
        reading
            .in_turn(move || {
                // A panic costs this export alone, and ends it with an error like any other.
                let text = panics::catch(|| walk.turn(&mut charge))??;
                charge.shrink_to(text.len());
                let text = Bytes::from(text.into_boxed_str().into_string());
                Ok((Running { permit, who, walk }, memory::charged(text, charge)))
            })
            .await
    }
}

/// The token may end, and its user may be revoked, while an export runs.
fn check_right(exports: &Exports, who: &Principal) -> Result<(), Error> {
    if who.ends_at() <= clock::now_s() {
        return Err(Error::new(Code::Unauthenticated, "the token has expired"));
    }
    exports.auth.check_revoked(who)?;
    scopes::read_all(who.scopes)
}

fn error_line(format: Format, error: &Error) -> Bytes {
    let note = Note::Error { code: error.code.as_str().to_owned(), detail: error.message.to_string() };
    format.note(&note).into()
}
