//! Who is connected, and the end of it: over HTTP. Scope `admin`.

use serde_json::json as value;
use warp::http::StatusCode;

use super::page::{Scope, number};
use super::reply::{json, query, segment};
use crate::auth::scopes;
use crate::edge::http::reply::Reply;
use crate::edge::routes::{Request, raw, traceparent};
use crate::ingest::admit::new_event;
use crate::ingest::submit::Draft;
use crate::log::Grant;
use crate::protocol::error::Error;
use crate::protocol::http::SessionList;
use crate::protocol::ids;
use crate::protocol::kinds::SESSIONS_REVOKED;

/// `GET /v1/sessions`
pub fn list(it: &Request) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::administer(who.scopes)?;
    let query = query(&it.query, &["user", "cursor", "limit"])?;
    let user = query.text("user");
    user.map_or(Ok(()), |user| ids::check_name("user", user))?;
    let scope = Scope::of(&["sessions", &who.key, user.unwrap_or("")]);
    let behind = query.text("cursor").map(|text| scope.open(text).and_then(|place| number(&place))).transpose()?;
    let limit = query.limit()?;
    let mut found = it.ctx.registry.list(&who.tenant, user, behind, limit + 1);
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|(number, _)| scope.seal(&number.to_be_bytes()));
    let sessions = found.into_iter().map(|(_, session)| session).collect();
    Ok(json(StatusCode::OK, &SessionList { sessions, next }))
}

/// `DELETE /v1/users/{user}/sessions`: an event in the user's inbox, so that every node hears of it, and every later start.
pub async fn revoke(it: Request, user: &str) -> Result<Reply, Error> {
    let who = it.who()?;
    scopes::administer(who.scopes)?;
    query(&it.query, &[])?;
    let user = segment("user", user)?;
    ids::check_name("user", &user)?;
    let (thread, data) = (ids::inbox(&user), raw(&value!({})));
    let event = new_event(&who.tenant, &who.user, &thread, SESSIONS_REVOKED, &data);
    let revoked_at = event.at.to_string();
    it.ctx
        .submit
        .publish(&Draft { event, grant: Grant::Scope, traceparent: traceparent(&it.headers)?.as_deref() })
        .await?;
    Ok(json(StatusCode::OK, &value!({"user": user, "revoked_at": revoked_at})))
}
