//! Tickets for browsers, which cannot set headers on a WebSocket.

use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::reply::{Reply, json};
use super::request::Request;
use crate::auth::tickets::LIFETIME;
use crate::clock;
use crate::protocol::error::Error;
use crate::protocol::http::Ticket;

/// `POST /v1/tickets`
pub async fn issue(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let ticket = api.auth.issue_ticket(&it.who)?;
    let expires_at = clock::rfc3339(clock::now_ms() + LIFETIME.as_millis() as u64);
    Ok(json(StatusCode::CREATED, &Ticket { ticket, expires_at }))
}
