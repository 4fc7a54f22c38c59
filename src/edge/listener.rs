//! The accept loop under the routes: deadlines, bounds and a connection limit, which `warp::serve` does not have.
//!
//! A connection over the limit has a request as any other, and is answered from the [`Reserve`]: probes as ever, everything
//! else with 503.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use super::http1;
use super::reserve::Reserve;
use super::ws::socket::Socket;
use crate::telemetry;

/// Time for the first byte and for all headers of a request.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// A connection that writes nothing for so long has a peer that reads nothing.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4_096;
/// What the kernel takes for a peer beyond what is under way to it. Without a bound it takes up to 4 MiB for one that reads
/// nothing, which no budget counts, and the last answer waits behind all of that.
const UNSENT: libc::c_int = 128 << 10;
/// The longest pause after a failed accept.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A connection's permit under the limit; a WebSocket session keeps it.
pub type ConnectionPermit = Arc<OwnedSemaphorePermit>;

pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    bound_unsent(&socket)?;
    socket.listen(BACKLOG)
}

/// Accepted connections inherit it. The window under way is not bounded by this, so that a fast peer far away stays fast.
#[expect(unsafe_code, reason = "neither the standard library nor socket2 has this option")]
fn bound_unsent(socket: &TcpSocket) -> io::Result<()> {
    let (unsent, size) = (UNSENT, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the descriptor is open as long as the socket is, and the option is read from one int of this size.
    let set = unsafe {
        let value = (&raw const unsent).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, value, size)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Accepts until `stop`, then lets requests under way finish. Up to `limit` connections have all `routes`, those beyond it
/// the ones of `beyond`.
pub async fn serve(
    listener: TcpListener,
    routes: BoxedFilter<(Response,)>,
    beyond: BoxedFilter<(Response,)>,
    limit: usize,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)));
    let mut reserve = Reserve::new(beyond, telemetry::refused("connection_limit"));
    let mut connections = JoinSet::new();
    let mut pause = Pause::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stop) => break,
        };
        let Some((stream, peer)) = pause.after(accepted).await else { continue };
        match permits.clone().try_acquire_owned() {
            Ok(permit) => {
                let permit = Arc::new(permit);
                connections.spawn(connection(stream, peer, routes.clone(), permit, stop.clone()));
            }
            Err(_) => reserve.admit(stream),
        }
    }
    while connections.join_next().await.is_some() {}
    reserve.finish().await;
}

/// Accepts until `stop`, on an address of which all connections are the operator's.
pub async fn serve_admin(listener: TcpListener, routes: BoxedFilter<(Response,)>, mut stop: watch::Receiver<bool>) {
    let mut reserve = Reserve::new(routes, telemetry::refused("admin_limit"));
    let mut pause = Pause::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => break,
        };
        if let Some((stream, _)) = pause.after(accepted).await {
            reserve.admit(stream);
        }
    }
    reserve.finish().await;
}

/// The pause after an accept that failed.
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Pause {
        Pause(Duration::from_millis(5))
    }
}

impl Pause {
    /// What was accepted; after a failure nothing, and not at once.
    async fn after(&mut self, accepted: io::Result<(TcpStream, SocketAddr)>) -> Option<(TcpStream, SocketAddr)> {
        match accepted {
            Ok(accepted) => {
                *self = Pause::default();
                Some(accepted)
            }
            // The client was gone before the connection was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
                None
            }
            // Out of descriptors or memory: other connections must end first, and trying again at once would only use the
            // processor.
            Err(error) => {
                telemetry::refused("accept_failed").increment(1);
                tracing::warn!(%error, pause = ?self.0, "cannot accept");
                tokio::time::sleep(self.0).await;
                self.0 = (self.0 * 2).min(MAX_PAUSE);
                None
            }
        }
    }
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
    let http = http1::protocol(HEADERS_WITHIN);
    let service = http1::service(routes, move |extensions| drop(extensions.insert(permit.clone())));

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

/// A connection's permit, for routes.
pub fn permit() -> impl Filter<Extract = (Option<ConnectionPermit>,), Error = std::convert::Infallible> + Clone {
    warp::ext::optional::<ConnectionPermit>()
}
