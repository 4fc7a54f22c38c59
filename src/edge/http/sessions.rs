//! Who is connected, and how an admin ends a user's sessions.

use std::sync::Arc;

use serde_json::json as value;
use warp::http::StatusCode;

use super::Api;
use super::meter::Meter;
use super::page::{COPIES, Page};
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::ingest::admit::new_event;
use crate::ingest::submit::Draft;
use crate::log::Grant;
use crate::protocol::error::Error;
use crate::protocol::http::{RevocationReply, SessionList};
use crate::protocol::ids;
use crate::protocol::json::encode_raw;
use crate::protocol::kinds::SESSIONS_REVOKED;

/// About the size of an entry.
const ITEM_BYTES: usize = 256;

/// `GET /v1/sessions`
pub async fn list(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let query = it.query(&["user", "cursor", "limit"])?;
    let user = query.text("user");
    if let Some(user) = user {
        ids::check_name("user", user)?;
    }
    let page: Page<u64> = Page::read(&query, &it.who, "", "sessions", &[user.unwrap_or("")])?;

    // One more than the page holds, so that it is known whether there is a next one.
    let mut meter = api.meter(&it.who, (page.limit + 1) * ITEM_BYTES * COPIES).await?;
    let found = api.registry.list(&it.who.tenant, user, page.after, page.limit + 1);
    let item = |_: &u64, session, _: &mut Meter| Ok(Some((session, ITEM_BYTES)));
    let (sessions, next) = page.fill(found.into_iter().map(Ok), &mut meter, item)?;
    Ok(charged(json(StatusCode::OK, &SessionList { sessions, next }), meter))
}

/// `DELETE /v1/users/{user}/sessions`: an event in the user's inbox, so that every node learns of it, now and whenever it
/// reads the log again.
pub async fn revoke(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let user = it.segment("user")?;
    ids::check_name("user", &user)?;
    let (thread, data) = (ids::inbox(&user), encode_raw(&value!({})));
    let event = new_event(&it.who.tenant, &it.who.user, &thread, SESSIONS_REVOKED, &data);
    let revoked_at = event.at.to_string();
    api.submit.publish(&Draft { event, grant: Grant::Scope, traceparent: it.traceparent()? }).await?;
    Ok(json(StatusCode::OK, &RevocationReply { user: &user, revoked_at: &revoked_at }))
}
