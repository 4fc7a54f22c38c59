//! Connections for probes, beside those that the limit counts: on the main address beyond the limit, and on the operator's
//! own.
//!
//! Invariants:
//! - each gets one answer, within [`ANSWER_WITHIN`], its request's headers within [`HEADERS_WITHIN`];
//! - at most [`CONNECTIONS`] are open at a time. One more takes the place of the oldest, so that whoever opens connections
//!   and sends nothing holds them up for as long as it takes to open as many anew, and a probe, which sends its request at
//!   once, gets through.

use std::collections::VecDeque;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use metrics::Counter;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet};
use warp::filters::BoxedFilter;
use warp::hyper;
use warp::reply::Response;

use super::http1;
use super::ws::socket::Socket;

/// Connections that are open at a time.
pub const CONNECTIONS: usize = 64;
/// Time for the headers of the request.
const HEADERS_WITHIN: Duration = Duration::from_secs(2);
/// Time for everything until the answer is written.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

pub struct Reserve {
    routes: BoxedFilter<(Response,)>,
    tasks: JoinSet<()>,
    /// Oldest first.
    open: VecDeque<AbortHandle>,
    /// Counts connections that are closed without an answer.
    unanswered: Counter,
}

impl Reserve {
    pub fn new(routes: BoxedFilter<(Response,)>, unanswered: Counter) -> Reserve {
        Reserve { routes, tasks: JoinSet::new(), open: VecDeque::with_capacity(CONNECTIONS), unanswered }
    }

    /// Serves a connection, in the place of the oldest one if there is no room.
    pub fn admit(&mut self, stream: TcpStream) {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|task| !task.is_finished());
        if self.open.len() >= CONNECTIONS
            && let Some(oldest) = self.open.pop_front()
        {
            oldest.abort();
            self.unanswered.increment(1);
        }
        let (routes, unanswered) = (self.routes.clone(), self.unanswered.clone());
        self.open.push_back(self.tasks.spawn(async move {
            match tokio::time::timeout(ANSWER_WITHIN, answer(stream, routes)).await {
                Ok(Ok(socket)) => socket.linger().await,
                Ok(Err(_)) | Err(_) => unanswered.increment(1),
            }
        }));
    }

    /// Waits until the connections that are open have their answers.
    pub async fn finish(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Answers one request; gives the connection that is to be closed then.
async fn answer(stream: TcpStream, routes: BoxedFilter<(Response,)>) -> hyper::Result<Socket> {
    let mut http = http1::protocol(HEADERS_WITHIN);
    http.keep_alive(false);
    let service = http1::service(routes, |_| ());
    let parts = http.serve_connection(TokioIo::new(Socket::new(stream)), service).without_shutdown().await?;
    Ok(parts.io.into_inner())
}
