//! Everything that a client can ask for over HTTP, in one list: [`ROUTES`].
//!
//! A request with a token is checked in this order: who it is, whether the server has caught up with its log, whether the
//! user's rate allows it, whether the token's scopes do; then its handler reads query and path.

use std::pin::Pin;
use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::http::{HeaderValue, Method, Version, header};
use warp::hyper::upgrade::OnUpgrade;
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply as _};

use super::credentials;
use super::export::{self, Exports};
use super::health::Health;
use super::http::documents::LazyDocuments;
use super::http::probes::Probes;
use super::http::reply::{Reply, method_not_allowed, problem};
use super::http::request::{AnonymousRequest, Request, refuse_head};
use super::http::{
    Api, batch, context, dead_letters, documents, events, groups, kinds, letter_acts, members, probes, readers, runs,
    search, sessions, threads, tickets,
};
use super::listener;
use super::matcher::{Found, Matcher};
use super::origin::is_preflight;
use super::sse::{Streams, agui, stream};
use super::ws::Sockets;
use super::ws::upgrade::upgrade;
use crate::auth::{Authenticator, Principal, scopes};
use crate::ingest::admit::Admission;
use crate::ingest::tickets::Tickets;
use crate::projector::level::Level;
use crate::protocol::error::{Code, Error};
use crate::{panics, telemetry};

/// What a request must have before its handler is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// A token that is valid; the handler checks what it allows.
    Token,
    /// A token that allows reading.
    Read,
    /// The same, or a ticket in its place: for what a browser reads without headers of the page's.
    Stream,
    /// A token with scope `agent`, or `admin`.
    Agent,
    /// A token with scope `analyst`, or `admin`.
    Analyst,
    /// A token with scope `admin`.
    Admin,
}

type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

#[derive(Clone, Copy)]
enum Handler {
    Anyone(fn(&Edge, AnonymousRequest) -> ResponseFuture),
    User(Needs, fn(&Edge, Request) -> ResponseFuture),
}

/// One method of one path.
pub struct Route {
    pub method: Method,
    /// Parts in braces are parameters.
    pub path: &'static str,
    /// What metrics call it.
    pub name: &'static str,
    handler: Handler,
}

impl Route {
    /// Whether it is answered whatever the load, for whoever watches the server.
    fn is_probe(&self) -> bool {
        matches!(self.path, "/healthz" | "/readyz" | METRICS)
    }

    pub fn needs(&self) -> Needs {
        match self.handler {
            Handler::Anyone(_) => Needs::Nothing,
            Handler::User(needs, _) => needs,
        }
    }
}

const GET: Method = Method::GET;
const PUT: Method = Method::PUT;
const POST: Method = Method::POST;
const DELETE: Method = Method::DELETE;

const THREAD: &str = "/v1/threads/{thread}";
const EVENTS: &str = "/v1/threads/{thread}/events";
const MEMBER: &str = "/v1/threads/{thread}/members/{user}";
const GROUP: &str = "/v1/groups/{group}";
const KIND: &str = "/v1/kinds/{kind}";
const METRICS: &str = "/metrics";

/// The name of the route whose requests are not counted.
const UNCOUNTED: &str = "metrics";
/// What metrics call a request that has no route.
const NO_ROUTE: &str = "none";
/// What metrics call a browser's question before a request of another origin.
const PREFLIGHT: &str = "preflight";

#[rustfmt::skip]
pub static ROUTES: &[Route] = &[
    anyone(GET, "/v1/ws", "ws", |edge, it| reply(upgrade(edge.sockets.clone(), it))),
    user(POST, "/v1/tickets", "tickets", Needs::Token, |edge, it| answer(tickets::issue(edge.api.clone(), it))),

    user(GET, "/v1/threads", "threads", Needs::Read, |edge, it| answer(threads::list(edge.api.clone(), it))),
    user(GET, THREAD, "thread", Needs::Read, |edge, it| answer(threads::read(edge.api.clone(), it))),
    user(PUT, THREAD, "thread", Needs::Token, |edge, it| answer(threads::put(edge.api.clone(), it))),
    user(PUT, MEMBER, "member", Needs::Token, |edge, it| answer(members::add(edge.api.clone(), it))),
    user(DELETE, MEMBER, "member", Needs::Token, |edge, it| answer(members::remove(edge.api.clone(), it))),
    user(GET, EVENTS, "events", Needs::Read, |edge, it| answer(events::page(edge.api.clone(), it))),
    user(POST, EVENTS, "publish", Needs::Token, |edge, it| answer(events::publish(edge.api.clone(), it))),
    user(POST, "/v1/events", "publish_batch", Needs::Token, |edge, it| answer(batch::publish(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/presence", "presence", Needs::Read, |edge, it| answer(readers::presence(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/receipts", "receipts", Needs::Read, |edge, it| answer(readers::receipts(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/context", "context", Needs::Read, |edge, it| answer(context::read(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/stream", "stream", Needs::Stream, |edge, it| answer(stream(edge.streams.clone(), it))),
    user(GET, "/v1/threads/{thread}/agui", "agui", Needs::Stream, |edge, it| answer(agui::stream(edge.streams.clone(), it))),

    user(GET, "/v1/threads/{thread}/runs", "runs", Needs::Read, |edge, it| answer(runs::of_thread(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/runs/{run}", "run", Needs::Read, |edge, it| answer(runs::read(edge.api.clone(), it))),
    user(GET, "/v1/runs", "runs", Needs::Read, |edge, it| answer(runs::open(edge.api.clone(), it))),
    user(GET, "/v1/runs/{run}", "run", Needs::Read, |edge, it| answer(runs::find(edge.api.clone(), it))),

    user(GET, "/v1/search", "search", Needs::Read, |edge, it| answer(search::find(edge.api.clone(), it))),
    user(GET, "/v1/export", "export", Needs::Analyst, |edge, it| answer(export::export(edge.exports.clone(), it))),

    user(GET, "/v1/groups", "groups", Needs::Agent, |edge, it| answer(groups::list(edge.api.clone(), it))),
    user(GET, GROUP, "group", Needs::Agent, |edge, it| answer(groups::read(edge.api.clone(), it))),
    user(PUT, GROUP, "group", Needs::Admin, |edge, it| answer(groups::put(edge.api.clone(), it))),
    user(POST, "/v1/groups/{group}/pause", "group_pause", Needs::Admin, |edge, it| answer(groups::pause(edge.api.clone(), it))),
    user(POST, "/v1/groups/{group}/resume", "group_resume", Needs::Admin, |edge, it| answer(groups::resume(edge.api.clone(), it))),
    user(POST, "/v1/groups/{group}/lease", "lease", Needs::Agent, |edge, it| answer(groups::lease(edge.api.clone(), it))),
    user(POST, "/v1/groups/{group}/settle", "settle", Needs::Agent, |edge, it| answer(groups::settle(edge.api.clone(), it))),
    user(DELETE, GROUP, "group", Needs::Admin, |edge, it| answer(groups::delete(edge.api.clone(), it))),

    user(GET, "/v1/kinds", "kinds", Needs::Token, |edge, it| answer(kinds::list(edge.api.clone(), it))),
    user(GET, KIND, "kind", Needs::Token, |edge, it| answer(kinds::read(edge.api.clone(), it))),
    user(PUT, KIND, "kind", Needs::Admin, |edge, it| answer(kinds::put(edge.api.clone(), it))),
    user(DELETE, KIND, "kind", Needs::Admin, |edge, it| answer(kinds::delete(edge.api.clone(), it))),

    user(GET, "/v1/dead-letters", "dead_letters", Needs::Admin, |edge, it| answer(dead_letters::list(edge.api.clone(), it))),
    user(GET, "/v1/dead-letters/counts", "dead_letter_counts", Needs::Admin, |edge, it| answer(dead_letters::counts(edge.api.clone(), it))),
    user(GET, "/v1/dead-letters/{id}", "dead_letter", Needs::Admin, |edge, it| answer(dead_letters::read(edge.api.clone(), it))),
    user(DELETE, "/v1/dead-letters/{id}", "discard", Needs::Admin, |edge, it| answer(letter_acts::discard(edge.api.clone(), it))),
    user(POST, "/v1/dead-letters/{id}/requeue", "requeue", Needs::Admin, |edge, it| answer(letter_acts::requeue(edge.api.clone(), it))),
    user(POST, "/v1/dead-letters/requeue", "requeue_all", Needs::Admin, |edge, it| answer(letter_acts::requeue_all(edge.api.clone(), it))),
    user(POST, "/v1/dead-letters/discard", "discard_all", Needs::Admin, |edge, it| answer(letter_acts::discard_all(edge.api.clone(), it))),
    user(GET, "/v1/sessions", "sessions", Needs::Admin, |edge, it| answer(sessions::list(edge.api.clone(), it))),
    user(DELETE, "/v1/users/{user}/sessions", "revoke", Needs::Admin, |edge, it| answer(sessions::revoke(edge.api.clone(), it))),

    anyone(GET, "/v1/openapi.json", "openapi", |edge, it| answer(documents::openapi(edge.documents.clone(), it))),
    anyone(GET, "/v1/asyncapi.json", "asyncapi", |edge, it| answer(documents::asyncapi(edge.documents.clone(), it))),
    anyone(GET, "/v1/schemas/{name}", "schema", |edge, it| answer(documents::schema(edge.documents.clone(), it))),

    anyone(GET, "/healthz", "healthz", |_, _| ready(probes::alive())),
    anyone(GET, "/readyz", "readyz", |edge, it| answer(probes::ready(edge.probes.clone(), it))),
    anyone(GET, METRICS, UNCOUNTED, |edge, _| ready(probes::metrics(&edge.probes))),
];

const fn anyone(
    method: Method,
    path: &'static str,
    name: &'static str,
    handler: fn(&Edge, AnonymousRequest) -> ResponseFuture,
) -> Route {
    Route { method, path, name, handler: Handler::Anyone(handler) }
}

const fn user(
    method: Method,
    path: &'static str,
    name: &'static str,
    needs: Needs,
    handler: fn(&Edge, Request) -> ResponseFuture,
) -> Route {
    Route { method, path, name, handler: Handler::User(needs, handler) }
}

fn answer<R: warp::Reply>(handled: impl Future<Output = Result<R, Error>> + Send + 'static) -> ResponseFuture {
    Box::pin(async { handled.await.map(warp::Reply::into_response) })
}

/// Whatever it is, it is the reply.
fn reply(handled: impl Future<Output = Reply> + Send + 'static) -> ResponseFuture {
    Box::pin(async { Ok(handled.await.into_response()) })
}

fn ready(reply: impl warp::Reply + 'static) -> ResponseFuture {
    Box::pin(std::future::ready(Ok(reply.into_response())))
}

/// What the routes work with.
pub struct Edge {
    pub auth: Arc<Authenticator>,
    pub tickets: Arc<Tickets>,
    pub health: Arc<Health>,
    pub level: Arc<Level>,
    pub admission: Arc<Admission>,
    pub api: Arc<Api>,
    pub streams: Arc<Streams>,
    pub exports: Arc<Exports>,
    pub sockets: Arc<Sockets>,
    pub probes: Arc<Probes>,
    pub documents: Arc<LazyDocuments>,
}

impl Edge {
    async fn handle(&self, route: &Route, it: AnonymousRequest) -> Result<Response, Error> {
        match route.handler {
            Handler::Anyone(handler) => handler(self, it).await,
            Handler::User(needs, handler) => {
                let who = self.admit(&it, needs).await?;
                let it = it.of(who);
                if route.method != GET {
                    // Those that change something look for it by themselves, and only before they do.
                    return handler(self, it).await;
                }
                let again = it.again();
                match handler(self, it).await {
                    Err(error) if self.level.may_be_missing(&error) => {
                        self.level.reach().await?;
                        handler(self, again).await
                    }
                    answered => answered,
                }
            }
        }
    }

    /// The user of a request, counted against its rate, if its token allows what the route needs. A token in the header goes
    /// before a ticket, which is used up only if it is needed, and that before a cookie.
    async fn admit(&self, it: &AnonymousRequest, needs: Needs) -> Result<Principal, Error> {
        let has_header = it.headers.contains_key(header::AUTHORIZATION);
        let takes_ticket = needs == Needs::Stream && !has_header;
        let who = match it.ticket().filter(|_| takes_ticket) {
            Some(ticket) => {
                self.health.check_caught_up()?;
                self.tickets.redeem(&ticket).await?
            }
            None => {
                let cookie = || credentials::cookie_that_counts(&self.auth, &it.headers, &self.sockets.origins);
                let credential = match (!has_header).then(cookie).flatten() {
                    Some(cookie) => cookie,
                    None => credentials::authorization(&it.headers)?,
                };
                let who = self.auth.verify(&credential).await?;
                self.health.check_caught_up()?;
                self.admission.count(&who)?;
                who
            }
        };
        match needs {
            Needs::Nothing | Needs::Token => {}
            Needs::Read | Needs::Stream => scopes::read(who.scopes)?,
            Needs::Agent => scopes::work(who.scopes)?,
            Needs::Analyst => scopes::read_all(who.scopes)?,
            Needs::Admin => scopes::administer(who.scopes)?,
        }
        Ok(who)
    }
}

/// What a connection may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Everything.
    Main,
    /// Probes, since the connection limit is reached; everything else is refused for that.
    BeyondLimit,
    /// Probes alone, on the operator's own address.
    Admin,
}

/// The routes of a door.
struct RoutingTable {
    door: Door,
    matcher: Matcher<&'static Route>,
}

impl RoutingTable {
    /// `metrics_apart`: they are served by the operator's own address alone.
    fn new(door: Door, metrics_apart: bool) -> RoutingTable {
        let serves = |route: &&Route| match door {
            Door::Main => !metrics_apart || route.path != METRICS,
            Door::BeyondLimit => route.is_probe() && (!metrics_apart || route.path != METRICS),
            Door::Admin => route.is_probe(),
        };
        let routes = ROUTES.iter().filter(serves).map(|route| (route.method.clone(), route.path, route));
        RoutingTable { door, matcher: Matcher::new(routes).expect("a test makes the same matchers") }
    }
}

/// The routes of a door as a service.
pub fn service(edge: Arc<Edge>, door: Door, metrics_apart: bool) -> BoxedFilter<(Response,)> {
    let table = Arc::new(RoutingTable::new(door, metrics_apart));
    let query = warp::query::raw().or_else(async |_| Ok::<_, Rejection>((String::new(),)));
    warp::method()
        .and(warp::path::full())
        .and(warp::ext::get::<Version>())
        .and(warp::header::headers_cloned())
        .and(query)
        .and(warp::body::stream())
        .and(warp::ext::optional::<OnUpgrade>())
        .and(listener::permit())
        .then(move |method: Method, path: FullPath, version, headers, query, body, upgrade, permit| {
            let (edge, table) = (edge.clone(), table.clone());
            let request = AnonymousRequest::new(headers, query, body, upgrade, permit);
            async move { serve(&edge, &table, &method, path.as_str(), version, request).await }
        })
        .boxed()
}

async fn serve(
    edge: &Edge,
    table: &RoutingTable,
    method: &Method,
    path: &str,
    version: Version,
    request: AnonymousRequest,
) -> Response {
    // The answer depends on the origin, and only the headers say that.
    let asked = path.starts_with("/v1/").then(|| request.headers.clone());
    let (name, mut reply) = match refuse_head(version, &request.headers) {
        None => find_and_handle(edge, table, method, path, request).await,
        Some(refusal) => (NO_ROUTE, refusal.into_response()),
    };
    if let Some(asked) = asked {
        edge.sockets.origins.open(&asked, reply.headers_mut());
    }
    if name != UNCOUNTED {
        telemetry::http_requests(name, reply.status().as_u16()).increment(1);
    }
    reply
}

async fn find_and_handle(
    edge: &Edge,
    table: &RoutingTable,
    method: &Method,
    path: &str,
    request: AnonymousRequest,
) -> (&'static str, Response) {
    match table.matcher.find(method, path) {
        Found::One { value: route, params } => {
            let mut reply = reply_to(edge.handle(route, request.with_params(params))).await;
            if route.is_probe() {
                // Whoever watches is no connection of the server's beyond the answer.
                reply.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            (route.name, reply)
        }
        Found::WrongMethod { allowed, .. } if is_preflight(method, &request.headers) => {
            (PREFLIGHT, edge.sockets.origins.preflight(&request.headers, &allowed).into_response())
        }
        Found::WrongMethod { template, allowed } => {
            (NO_ROUTE, method_not_allowed(method, template, &allowed).into_response())
        }
        Found::Nothing if table.door == Door::BeyondLimit => {
            telemetry::refused("connection_limit").increment(1);
            let error = Error::new(Code::Unavailable, "the connection limit is reached").retry_after(1_000);
            (NO_ROUTE, problem(&error).into_response())
        }
        Found::Nothing => (NO_ROUTE, problem(&Error::new(Code::NotFound, "there is no such resource")).into_response()),
    }
}

/// The reply to a request; one that panics is answered with `internal`.
async fn reply_to(handled: impl Future<Output = Result<Response, Error>>) -> Response {
    let handled = panics::catch_task(handled).await.flatten();
    handled.unwrap_or_else(|error| problem(&error).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_that_panics_is_answered_with_500_as_a_problem() {
        let reply = reply_to(async { panic!("a bug") }).await;
        let content_type = reply.headers()["content-type"].as_bytes();
        assert_eq!((reply.status().as_u16(), content_type), (500, &b"application/problem+json"[..]));
    }

    #[test]
    fn every_route_is_found_by_its_method_and_path_and_no_two_are_the_same() {
        let RoutingTable { matcher, .. } = RoutingTable::new(Door::Main, false);
        for route in ROUTES {
            let path = route.path.replace(['{', '}'], "");
            let Found::One { value, params } = matcher.find(&route.method, &path) else { panic!("{path}") };
            assert!(std::ptr::eq(*value, route), "{} {}", route.method, route.path);
            assert_eq!(params.len(), route.path.matches('{').count());
        }
    }

    #[test]
    fn probes_are_at_every_door_and_metrics_that_are_apart_only_at_the_operator_s() {
        let has = |door, apart, path: &str| matches!(RoutingTable::new(door, apart).matcher.find(&GET, path), Found::One { value, .. } if value.path == path);
        for door in [Door::Main, Door::BeyondLimit, Door::Admin] {
            assert_eq!(["/healthz", "/readyz", METRICS].map(|path| has(door, false, path)), [true; 3], "{door:?}");
            assert!(has(door, true, "/readyz"), "{door:?}");
            assert_eq!(has(door, true, METRICS), door == Door::Admin, "{door:?}");
            assert_eq!(has(door, true, "/v1/threads"), door == Door::Main, "{door:?}");
        }
    }

    #[test]
    fn only_probes_the_contract_and_the_socket_which_authenticates_by_itself_need_nothing() {
        let open: Vec<_> = ROUTES.iter().filter(|it| it.needs() == Needs::Nothing).map(|it| it.path).collect();
        let contract = ["/v1/openapi.json", "/v1/asyncapi.json", "/v1/schemas/{name}"];
        assert_eq!(open, [&["/v1/ws"], &contract[..], &["/healthz", "/readyz", "/metrics"]].concat());
    }
}
