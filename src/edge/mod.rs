//! The edge: sockets in, frames and replies out. It parses requests, checks rights and calls the layers below.
//!
//! - [`listener`] accepts connections, within their limit; [`reserve`] serves probes beyond it, both
//!   speak [`http1`];
//! - [`routes`] lists everything that a client can ask for; [`matcher`] finds the route of a request;
//! - [`contract`] says for each route what it takes and answers, for the OpenAPI document;
//! - [`http`] answers requests, [`sse`] sends a thread as Server-Sent Events, [`ws`] runs WebSocket sessions, [`export`] sends
//!   a tenant's threads as a file;
//! - [`cursor`] knows which cursors are of this log, and where reading begins after one;
//! - [`credentials`] finds what a request shows to be let in;
//! - [`origin`] knows which pages of other origins are let in;
//! - [`health`] knows how each part of the server is doing.

pub mod contract;
pub mod credentials;
pub mod cursor;
pub mod export;
pub mod health;
pub mod http;
pub mod http1;
pub mod listener;
pub mod matcher;
pub mod origin;
pub mod reserve;
pub mod routes;
pub mod sse;
pub mod ws;

use crate::protocol::error::{Code, Error};

/// Runs work that reads a range of the store, and so may block, off the threads that serve sockets.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let finished = tokio::task::spawn_blocking(work).await;

    // Fails only if the work panicked, which is reported, or the runtime is shutting down.
    finished.unwrap_or_else(|_| Err(Error::new(Code::Internal, "the request was not finished")))
}
