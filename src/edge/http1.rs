//! HTTP/1.1 on a connection: the bounds of a request's head, and what routes learn of it.

use std::time::Duration;

use hyper_util::rt::TokioTimer;
use hyper_util::service::TowerToHyperService;
use warp::filters::BoxedFilter;
use warp::hyper;
use warp::hyper::server::conn::http1::Builder;
use warp::reply::Response;

const MAX_HEADERS: usize = 64;
const HEADER_BYTES: usize = 16 << 10;

/// A connection's protocol; the headers of each request must be there within this time.
pub fn protocol(headers_within: Duration) -> Builder {
    let mut http = Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(headers_within)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEADER_BYTES);
    http
}

/// The routes as a connection's service. Each request gets `extend` and its version of HTTP, which routes do not see
/// otherwise.
pub fn service(
    routes: BoxedFilter<(Response,)>,
    extend: impl Fn(&mut hyper::http::Extensions),
) -> impl hyper::service::Service<
    hyper::Request<hyper::body::Incoming>,
    Response = Response,
    Error = std::convert::Infallible,
    Future: Send,
> {
    let service = TowerToHyperService::new(warp::service(routes));
    hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        let version = request.version();
        request.extensions_mut().insert(version);
        extend(request.extensions_mut());
        hyper::service::Service::call(&service, request)
    })
}
