//! The accept loop under the routes: deadlines, bounds and a connection limit, which `warp::serve` does not have.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::hyper;
use warp::reply::Response;

use super::ws::socket::Socket;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::Problem;
use crate::protocol::json;
use crate::telemetry;

/// Time for the first byte and for all headers of a request.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
const MAX_HEADERS: usize = 64;
const HEADER_BYTES: usize = 16 << 10;
/// A connection that writes nothing for so long has a peer that reads nothing.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// Refusals under way; beyond that a connection over the limit is closed without an answer.
const REFUSALS: usize = 64;
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4_096;
/// The longest pause after a failed accept.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A connection's permit under the limit; a WebSocket session keeps it.
pub type ConnectionPermit = Arc<OwnedSemaphorePermit>;

pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts until `stop`, then lets requests under way finish.
pub async fn serve(
    listener: TcpListener,
    routes: BoxedFilter<(Response,)>,
    limit: usize,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    let mut connections = JoinSet::new();
    let mut pause = Duration::from_millis(5);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stop) => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = Duration::from_millis(5);
                match permits.clone().try_acquire_owned() {
                    Ok(permit) => drop(connections.spawn(connection(
                        stream,
                        peer,
                        routes.clone(),
                        Arc::new(permit),
                        stop.clone(),
                    ))),
                    Err(_) => match refusals.clone().try_acquire_owned() {
                        Ok(permit) => drop(connections.spawn(refuse(stream, permit))),
                        Err(_) => telemetry::refused("connection_limit").increment(1),
                    },
                }
            }
            // The client was gone before the connection was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            // Out of descriptors or memory: other connections must end first, and trying again at once would only use the
            // processor.
            Err(error) => {
                telemetry::refused("accept_failed").increment(1);
                tracing::warn!(%error, ?pause, "cannot accept");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    routes: BoxedFilter<(Response,)>,
    permit: ConnectionPermit,
    mut stop: watch::Receiver<bool>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, %peer, "no nodelay");
    }
    let service = TowerToHyperService::new(warp::service(routes));
    let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(permit.clone());
        hyper::service::Service::call(&service, request)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEADER_BYTES);
    let socket = Socket::new(stream);
    let written = socket.counter();
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(socket), service).with_upgrades());
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stalled(&written) => {
            tracing::debug!(%peer, "a connection was stalled");
            return;
        }
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, %peer, "a connection ended");
    }
}

/// Waits until nothing was written for a while. An idle connection meets the deadline for its next request earlier, and a
/// request is answered earlier, so that only a peer that does not read gets here.
async fn stalled(written: &AtomicU64) {
    let mut every = tokio::time::interval(STALLED_AFTER);
    every.tick().await;
    let mut before = written.load(Ordering::Relaxed);
    loop {
        every.tick().await;
        match written.load(Ordering::Relaxed) {
            now if now == before => return,
            now => before = now,
        }
    }
}

/// Waits until the server stops.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and the server with it.
    drop(stop.wait_for(|stop| *stop).await);
}

/// Answers a connection over the limit, which has no request read, and closes it.
async fn refuse(mut stream: TcpStream, _permit: OwnedSemaphorePermit) {
    telemetry::refused("connection_limit").increment(1);
    let error = Error::new(Code::Unavailable, "the connection limit is reached").retry_after(1_000);
    let body = json::encode(&Problem::of(&error));
    let reply = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let written = tokio::time::timeout(HEADERS_WITHIN, stream.write_all(reply.as_bytes())).await;
    // A client that is gone needs no answer.
    if written.is_ok_and(|written| written.is_ok()) {
        Socket::new(stream).linger().await;
    }
}

/// A connection's permit, for routes.
pub fn permit() -> impl Filter<Extract = (Option<ConnectionPermit>,), Error = std::convert::Infallible> + Clone {
    warp::ext::optional::<ConnectionPermit>()
}
