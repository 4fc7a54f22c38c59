//! Tickets for browsers, which cannot set headers on a WebSocket.

use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::reply::{Reply, json};
use super::request::Request;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::Ticket;

/// `POST /v1/tickets`
pub async fn issue(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let body = api.body(&mut it).await?;
    if !matches!(body.text.trim(), "" | "{}") {
        return Err(Error::new(Code::BadRequest, "this request has no body"));
    }
    drop(body);
    let (ticket, expires_at) = api.tickets.issue(&it.who).await?;
    Ok(json(StatusCode::CREATED, &Ticket { ticket, expires_at }))
}
