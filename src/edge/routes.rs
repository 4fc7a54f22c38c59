//! The HTTP interface: every route, in one list.

use std::convert::Infallible;
use std::sync::Arc;

use futures_util::Stream;
use serde_json::value::RawValue;
use warp::filters::BoxedFilter;
use warp::http::{HeaderMap, Method, StatusCode, header};
use warp::hyper::upgrade::OnUpgrade;
use warp::{Buf, Filter, Rejection, Reply as _};

use super::http::reply;
use super::http::reply::Reply;
use super::http::reply::{body, header_text, json, problem};
use super::http::{context, dead_letters, runs, sessions, threads};
use super::listener;
use super::listener::ConnectionPermit;
use super::sse::agui;
use super::ws::upgrade::upgrade;
use super::{Context, sse};
use crate::auth::tickets::LIFETIME;
use crate::auth::{Authenticator, Principal};
use crate::ingest::admit::{Admitted, PublishRequest};
use crate::protocol::command;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::PublishBody;
use crate::protocol::http::{PublishReply, Ticket};
use crate::protocol::json;
use crate::protocol::kinds::DeltaData;
use crate::{clock, telemetry};

/// What a handler gets of a request.
pub struct Request {
    pub ctx: Arc<Context>,
    pub headers: HeaderMap,
    pub query: String,
}

impl Request {
    /// The user who asks, counted against the rate limit.
    pub fn who(&self) -> Result<Principal, Error> {
        let who = authenticate(&self.ctx.auth, &self.headers)?;
        self.ctx.health.check_caught_up()?;
        self.ctx.admission.count(&who).map(|()| who)
    }
}

/// The user of `Authorization: Bearer …`.
pub fn authenticate(auth: &Authenticator, headers: &HeaderMap) -> Result<Principal, Error> {
    let refuse = |why| Error::new(Code::Unauthenticated, why).at("Authorization");
    let value = header_text(headers, "Authorization")?.ok_or_else(|| refuse("there is no Authorization header"))?;
    let (scheme, token) =
        value.split_once(' ').ok_or_else(|| refuse("the Authorization header is not Bearer <token>"))?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(refuse("the Authorization header is not Bearer <token>"));
    }
    auth.verify(token.trim())
}

/// Everything a client can ask for over HTTP.
pub fn routes(ctx: Arc<Context>) -> BoxedFilter<(warp::reply::Response,)> {
    let with = {
        let ctx = ctx.clone();
        let raw = warp::query::raw().or_else(async |_| Ok::<_, Rejection>((String::new(),)));
        warp::any()
            .map(move || ctx.clone())
            .and(warp::header::headers_cloned())
            .and(raw)
            .map(|ctx, headers, query| Request { ctx, headers, query })
            .boxed()
    };
    let ws = warp::path!("v1" / "ws")
        .and(warp::get())
        .and(with.clone())
        .and(warp::ext::optional::<OnUpgrade>())
        .and(listener::permit())
        .map(|it: Request, on: Option<OnUpgrade>, permit: Option<ConnectionPermit>| {
            counted("ws", upgrade(&it.ctx.sockets, &it.headers, &it.query, on, permit))
        })
        .boxed();
    let ticket = warp::path!("v1" / "tickets")
        .and(warp::post())
        .and(with.clone())
        .map(|it: Request| answer("tickets", ticket(&it)))
        .boxed();
    let list = warp::path!("v1" / "threads")
        .and(warp::get())
        .and(with.clone())
        .then(async |it: Request| answer("threads", threads::list(it).await))
        .boxed();
    let thread = warp::path!("v1" / "threads" / String).and(with.clone());
    let read = thread
        .clone()
        .and(warp::get())
        .then(async |id: String, it: Request| answer("thread", threads::read(it, &id).await))
        .boxed();
    let put = thread
        .and(warp::put())
        .and(warp::body::stream())
        .then(async |id: String, it: Request, body| answer("thread", threads::put(it, &id, body).await))
        .boxed();
    let member = warp::path!("v1" / "threads" / String / "members" / String)
        .and(warp::method())
        .and(with.clone())
        .then(async |id: String, user: String, method: Method, it: Request| {
            answer("member", threads::member(it, &id, &user, &method).await)
        })
        .boxed();
    let events = warp::path!("v1" / "threads" / String / "events").and(with.clone());
    let page = events
        .clone()
        .and(warp::get())
        .then(async |id: String, it: Request| answer("events", threads::page(it, &id).await))
        .boxed();
    let publish = events
        .and(warp::post())
        .and(warp::body::stream())
        .then(async |id: String, it: Request, body| answer("publish", publish(it, &id, body).await))
        .boxed();
    let presence = warp::path!("v1" / "threads" / String / "presence")
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| answer("presence", threads::presence(it, &id).await))
        .boxed();
    let receipts = warp::path!("v1" / "threads" / String / "receipts")
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| answer("receipts", threads::receipts(it, &id).await))
        .boxed();
    let chat = warp::path!("v1" / "threads" / String / "context")
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| answer("context", context::read(it, &id).await))
        .boxed();
    let letters = warp::path!("v1" / "dead-letters")
        .and(warp::get())
        .and(with.clone())
        .then(async |it: Request| answer("dead_letters", dead_letters::list(it).await))
        .boxed();
    let letter = warp::path!("v1" / "dead-letters" / String)
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| answer("dead_letter", dead_letters::read(it, &id).await))
        .boxed();
    let connected = warp::path!("v1" / "sessions")
        .and(warp::get())
        .and(with.clone())
        .map(|it: Request| answer("sessions", sessions::list(&it)))
        .boxed();
    let revoke = warp::path!("v1" / "users" / String / "sessions")
        .and(warp::delete())
        .and(with.clone())
        .then(async |user: String, it: Request| answer("revoke", sessions::revoke(it, &user).await))
        .boxed();
    let stream = warp::path!("v1" / "threads" / String / "stream")
        .and(warp::get())
        .and(with.clone())
        .map(|id: String, it: Request| match sse::open(&it, &id) {
            Ok(stream) => stream,
            Err(error) => answer("stream", Err(error)).into_response(),
        })
        .boxed();
    let agui = warp::path!("v1" / "threads" / String / "agui")
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| match agui::open(it, &id).await {
            Ok(stream) => stream,
            Err(error) => answer("agui", Err(error)).into_response(),
        })
        .boxed();
    let runs = warp::path!("v1" / "runs")
        .and(warp::get())
        .and(with.clone())
        .then(async |it: Request| answer("runs", runs::open(it).await))
        .boxed();
    let run = warp::path!("v1" / "runs" / String)
        .and(warp::get())
        .and(with.clone())
        .then(async |run: String, it: Request| answer("run", runs::find(it, &run).await))
        .boxed();
    let thread_runs = warp::path!("v1" / "threads" / String / "runs")
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, it: Request| answer("runs", runs::of_thread(it, &id).await))
        .boxed();
    let thread_run = warp::path!("v1" / "threads" / String / "runs" / String)
        .and(warp::get())
        .and(with.clone())
        .then(async |id: String, run: String, it: Request| answer("run", runs::read(it, &id, &run).await))
        .boxed();
    let runs = runs.or(run).unify().or(thread_runs).unify().or(thread_run).unify().boxed();
    let healthz = warp::path!("healthz")
        .and(warp::get())
        .map(|| counted("healthz", json(StatusCode::OK, &serde_json::json!({"alive": true}))))
        .boxed();
    let readyz = warp::path!("readyz")
        .and(warp::get())
        .and(with.clone())
        .map(|it: Request| counted("readyz", ready(&it.ctx)))
        .boxed();
    let metrics = warp::path!("metrics").and(warp::get()).and(with).map(|it: Request| metrics_text(&it.ctx)).boxed();
    let all = ws
        .or(ticket)
        .unify()
        .or(publish)
        .unify()
        .or(page)
        .unify()
        .or(list)
        .unify()
        .or(read)
        .unify()
        .or(put)
        .unify()
        .or(member)
        .unify()
        .boxed();
    let beside = presence
        .or(receipts)
        .unify()
        .or(chat)
        .unify()
        .or(letters)
        .unify()
        .or(letter)
        .unify()
        .or(connected)
        .unify()
        .or(revoke)
        .unify()
        .boxed();
    let all =
        all.or(beside).unify().or(runs).unify().or(healthz).unify().or(readyz).unify().or(metrics).unify().boxed();
    let all = all.map(warp::Reply::into_response).boxed().or(stream).unify().or(agui).unify().boxed();
    all.recover(no_route).map(warp::Reply::into_response).boxed()
}

fn counted(route: &'static str, reply: Reply) -> Reply {
    telemetry::http_requests(route, reply.status().as_u16()).increment(1);
    reply
}

fn answer(route: &'static str, result: Result<Reply, Error>) -> Reply {
    counted(route, result.unwrap_or_else(|error| problem(&error)))
}

/// Rejections mean only that no route took the request.
async fn no_route(rejection: Rejection) -> Result<Reply, Infallible> {
    let mut reply = problem(&Error::new(Code::NotFound, "there is no such resource"));
    if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
        reply = problem(&Error::new(Code::BadRequest, "the resource has no such method"));
        *reply.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    }
    Ok(counted("none", reply))
}

fn ready(ctx: &Context) -> Reply {
    let store = ctx.store.head("readyz", "readyz").map(drop).map_err(|error| error.to_string());
    let ready = ctx.health.ready(store);
    json(if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &ready)
}

fn metrics_text(ctx: &Context) -> Reply {
    telemetry::outbox_bytes().set(ctx.registry.outbox_bytes() as f64);
    let mut reply = Reply::new(telemetry::render(&ctx.metrics));
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    reply
}

/// `POST /v1/tickets`
fn ticket(it: &Request) -> Result<Reply, Error> {
    let who = it.who()?;
    reply::query(&it.query, &[])?;
    let ticket = it.ctx.auth.issue_ticket(&who)?;
    let expires_at = clock::rfc3339(clock::now_ms() + LIFETIME.as_millis() as u64);
    Ok(json(StatusCode::CREATED, &Ticket { ticket, expires_at }))
}

/// `POST /v1/threads/{t}/events`
async fn publish<B: Buf, E>(
    it: Request,
    thread: &str,
    stream: impl Stream<Item = Result<B, E>>,
) -> Result<Reply, Error> {
    let who = it.who()?;
    reply::query(&it.query, &[])?;
    let (called, thread) = threads::address(&who, thread)?;
    let text = body(stream).await?;
    let publish: PublishBody = json::decode(&text)?;
    let key = header_text(&it.headers, "Idempotency-Key")?;
    command::check_content(publish.data, key, publish.run.as_deref(), publish.parent)?;
    let traceparent = traceparent(&it.headers)?;
    let Admitted { draft, delta } = it.ctx.admission.admit(
        &who,
        PublishRequest {
            thread: &thread,
            kind: &publish.kind,
            data: publish.data,
            key,
            run: publish.run.as_deref(),
            parent: publish.parent,
            priority: publish.priority,
            traceparent: traceparent.as_deref(),
        },
    )?;
    let published = it.ctx.submit.publish(&draft).await?;
    let status = if published.duplicate { StatusCode::OK } else { StatusCode::CREATED };
    let reply = PublishReply {
        thread: &called,
        seq: delta.is_none().then_some(published.seq),
        event: published.event,
        duplicate: published.duplicate,
        message: delta.as_ref().map(|delta| &*delta.message),
        to_char: delta.as_ref().map(DeltaData::to_char),
    };
    Ok(json(status, &reply))
}

pub fn traceparent(headers: &HeaderMap) -> Result<Option<String>, Error> {
    Ok(header_text(headers, "traceparent")?.map(str::to_owned))
}

/// Runs what walks a range of the store where it may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    // Fails only if the work panicked or the runtime is going down.
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Error::new(Code::Internal, "the request was not finished")))
}

/// `data` made by the server.
pub fn raw(value: &serde_json::Value) -> Box<RawValue> {
    // A JSON value's text is JSON.
    RawValue::from_string(value.to_string()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}
