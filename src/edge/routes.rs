//! Everything that a client can ask for over HTTP, in one list: [`ROUTES`].
//!
//! A request with a token is checked in this order: who it is, whether the server has caught up with its log, whether the
//! user's rate allows it, whether the token's scopes do; then its handler reads query and path.

use std::pin::Pin;
use std::sync::Arc;

use warp::filters::BoxedFilter;
use warp::http::{HeaderMap, Method};
use warp::hyper::upgrade::OnUpgrade;
use warp::path::FullPath;
use warp::reply::Response;
use warp::{Filter, Rejection, Reply as _};

use super::health::Health;
use super::http::probes::Probes;
use super::http::reply::{method_not_allowed, problem};
use super::http::request::{AnonymousRequest, Request, bearer_token};
use super::http::{Api, context, dead_letters, events, members, probes, readers, runs, sessions, threads, tickets};
use super::listener;
use super::matcher::{Found, Matcher};
use super::sse::{Streams, agui, stream};
use super::ws::Sockets;
use super::ws::upgrade::upgrade;
use crate::auth::{Authenticator, Principal, scopes};
use crate::ingest::admit::Admission;
use crate::protocol::error::{Code, Error};
use crate::telemetry;

/// What a request must have before its handler is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// A token that is valid; the handler checks what it allows.
    Token,
    /// A token that allows reading.
    Read,
    /// A token with scope `admin`.
    Admin,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

#[derive(Clone, Copy)]
enum Handler {
    Anyone(fn(&Edge, AnonymousRequest) -> Answer),
    User(Needs, fn(&Edge, Request) -> Answer),
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

/// The name of the route whose requests are not counted.
const UNCOUNTED: &str = "metrics";
/// What metrics call a request that has no route.
const NO_ROUTE: &str = "none";

#[rustfmt::skip]
pub const ROUTES: &[Route] = &[
    anyone(GET, "/v1/ws", "ws", |edge, it| ready(upgrade(&edge.sockets, it))),
    user(POST, "/v1/tickets", "tickets", Needs::Token, |edge, it| answer(tickets::issue(edge.api.clone(), it))),

    user(GET, "/v1/threads", "threads", Needs::Read, |edge, it| answer(threads::list(edge.api.clone(), it))),
    user(GET, THREAD, "thread", Needs::Read, |edge, it| answer(threads::read(edge.api.clone(), it))),
    user(PUT, THREAD, "thread", Needs::Token, |edge, it| answer(threads::put(edge.api.clone(), it))),
    user(PUT, MEMBER, "member", Needs::Token, |edge, it| answer(members::add(edge.api.clone(), it))),
    user(DELETE, MEMBER, "member", Needs::Token, |edge, it| answer(members::remove(edge.api.clone(), it))),
    user(GET, EVENTS, "events", Needs::Read, |edge, it| answer(events::page(edge.api.clone(), it))),
    user(POST, EVENTS, "publish", Needs::Token, |edge, it| answer(events::publish(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/presence", "presence", Needs::Read, |edge, it| answer(readers::presence(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/receipts", "receipts", Needs::Read, |edge, it| answer(readers::receipts(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/context", "context", Needs::Read, |edge, it| answer(context::read(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/stream", "stream", Needs::Read, |edge, it| answer(stream(edge.streams.clone(), it))),
    user(GET, "/v1/threads/{thread}/agui", "agui", Needs::Read, |edge, it| answer(agui::stream(edge.streams.clone(), it))),

    user(GET, "/v1/threads/{thread}/runs", "runs", Needs::Read, |edge, it| answer(runs::of_thread(edge.api.clone(), it))),
    user(GET, "/v1/threads/{thread}/runs/{run}", "run", Needs::Read, |edge, it| answer(runs::read(edge.api.clone(), it))),
    user(GET, "/v1/runs", "runs", Needs::Read, |edge, it| answer(runs::open(edge.api.clone(), it))),
    user(GET, "/v1/runs/{run}", "run", Needs::Read, |edge, it| answer(runs::find(edge.api.clone(), it))),

    user(GET, "/v1/dead-letters", "dead_letters", Needs::Admin, |edge, it| answer(dead_letters::list(edge.api.clone(), it))),
    user(GET, "/v1/dead-letters/{id}", "dead_letter", Needs::Admin, |edge, it| answer(dead_letters::read(edge.api.clone(), it))),
    user(GET, "/v1/sessions", "sessions", Needs::Admin, |edge, it| answer(sessions::list(edge.api.clone(), it))),
    user(DELETE, "/v1/users/{user}/sessions", "revoke", Needs::Admin, |edge, it| answer(sessions::revoke(edge.api.clone(), it))),

    anyone(GET, "/healthz", "healthz", |_, _| ready(probes::alive())),
    anyone(GET, "/readyz", "readyz", |edge, _| ready(probes::ready(&edge.probes))),
    anyone(GET, "/metrics", UNCOUNTED, |edge, _| ready(probes::metrics(&edge.probes))),
];

const fn anyone(
    method: Method,
    path: &'static str,
    name: &'static str,
    handler: fn(&Edge, AnonymousRequest) -> Answer,
) -> Route {
    Route { method, path, name, handler: Handler::Anyone(handler) }
}

const fn user(
    method: Method,
    path: &'static str,
    name: &'static str,
    needs: Needs,
    handler: fn(&Edge, Request) -> Answer,
) -> Route {
    Route { method, path, name, handler: Handler::User(needs, handler) }
}

fn answer<R: warp::Reply>(handled: impl Future<Output = Result<R, Error>> + Send + 'static) -> Answer {
    Box::pin(async { handled.await.map(warp::Reply::into_response) })
}

fn ready(reply: impl warp::Reply + 'static) -> Answer {
    Box::pin(std::future::ready(Ok(reply.into_response())))
}

/// What the routes work with.
pub struct Edge {
    pub auth: Arc<Authenticator>,
    pub health: Arc<Health>,
    pub admission: Arc<Admission>,
    pub api: Arc<Api>,
    pub streams: Arc<Streams>,
    pub sockets: Arc<Sockets>,
    pub probes: Arc<Probes>,
}

impl Edge {
    async fn handle(&self, route: &Route, it: AnonymousRequest) -> Result<Response, Error> {
        match route.handler {
            Handler::Anyone(handler) => handler(self, it).await,
            Handler::User(needs, handler) => {
                let who = self.admit(&it.headers, needs)?;
                handler(self, it.of(who)).await
            }
        }
    }

    /// The user of a request, counted against its rate, if its token allows what the route needs.
    fn admit(&self, headers: &HeaderMap, needs: Needs) -> Result<Principal, Error> {
        let who = self.auth.verify(bearer_token(headers)?)?;
        self.health.check_caught_up()?;
        self.admission.count(&who)?;
        match needs {
            Needs::Nothing | Needs::Token => {}
            Needs::Read => scopes::read(who.scopes)?,
            Needs::Admin => scopes::administer(who.scopes)?,
        }
        Ok(who)
    }
}

/// The routes as a service.
pub fn service(edge: Arc<Edge>) -> BoxedFilter<(Response,)> {
    let matcher = Arc::new(matcher());
    let query = warp::query::raw().or_else(async |_| Ok::<_, Rejection>((String::new(),)));
    warp::method()
        .and(warp::path::full())
        .and(warp::header::headers_cloned())
        .and(query)
        .and(warp::body::stream())
        .and(warp::ext::optional::<OnUpgrade>())
        .and(listener::permit())
        .then(move |method: Method, path: FullPath, headers, query, body, upgrade, permit| {
            let (edge, matcher) = (edge.clone(), matcher.clone());
            let request = AnonymousRequest::new(headers, query, body, upgrade, permit);
            async move { serve(&edge, &matcher, &method, path.as_str(), request).await }
        })
        .boxed()
}

fn matcher() -> Matcher<&'static Route> {
    let routes = ROUTES.iter().map(|route| (route.method.clone(), route.path, route));
    Matcher::new(routes).expect("a test makes the same matcher")
}

async fn serve(
    edge: &Edge,
    matcher: &Matcher<&'static Route>,
    method: &Method,
    path: &str,
    request: AnonymousRequest,
) -> Response {
    let (name, reply) = match matcher.find(method, path) {
        Found::One { value: route, params } => {
            let handled = edge.handle(route, request.with_params(params)).await;
            (route.name, handled.unwrap_or_else(|error| problem(&error).into_response()))
        }
        Found::WrongMethod { template, allowed } => {
            (NO_ROUTE, method_not_allowed(method, template, &allowed).into_response())
        }
        Found::Nothing => (NO_ROUTE, problem(&Error::new(Code::NotFound, "there is no such resource")).into_response()),
    };
    if name != UNCOUNTED {
        telemetry::http_requests(name, reply.status().as_u16()).increment(1);
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_by_its_method_and_path_and_no_two_are_the_same() {
        let matcher = matcher();
        for route in ROUTES {
            let path = route.path.replace(['{', '}'], "");
            let Found::One { value, params } = matcher.find(&route.method, &path) else { panic!("{path}") };
            assert!(std::ptr::eq(*value, route), "{} {}", route.method, route.path);
            assert_eq!(params.len(), route.path.matches('{').count());
        }
    }

    #[test]
    fn only_probes_and_the_socket_which_authenticates_by_itself_need_nothing() {
        let open: Vec<_> = ROUTES.iter().filter(|it| it.needs() == Needs::Nothing).map(|it| it.path).collect();
        assert_eq!(open, ["/v1/ws", "/healthz", "/readyz", "/metrics"]);
    }
}
