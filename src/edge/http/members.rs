//! A thread's members.

use std::sync::Arc;

use serde_json::json as value;
use warp::http::StatusCode;

use super::Api;
use super::reply::{Reply, json};
use super::request::Request;
use crate::auth::scopes;
use crate::projector::Published;
use crate::protocol::error::Error;
use crate::protocol::http::MembershipReply;
use crate::protocol::ids;
use crate::protocol::kinds::{MEMBER_ADDED, MEMBER_REMOVED};

/// `PUT /v1/threads/{thread}/members/{user}`
pub async fn add(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    change(&api, &it, MEMBER_ADDED).await
}

/// `DELETE /v1/threads/{thread}/members/{user}`
pub async fn remove(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    change(&api, &it, MEMBER_REMOVED).await
}

async fn change(api: &Api, it: &Request, kind: &str) -> Result<Reply, Error> {
    it.no_query()?;
    let (thread, user) = (it.thread_id()?, it.segment("user")?);
    ids::check_name("user", &user)?;
    let may_manage = || scopes::manage(it.who.scopes, api.rights.standing(&it.who, &thread)?);
    let grant = api.level.look(may_manage).await?;
    let data = value!({"user": user});
    let Published { seq, duplicate, .. } = api.append(&it.who, &thread, kind, &data, grant, it.traceparent()?).await?;

    let member = kind == MEMBER_ADDED;
    let status = if member && !duplicate { StatusCode::CREATED } else { StatusCode::OK };
    Ok(json(status, &MembershipReply { thread: &thread, user: &user, member, seq, changed: !duplicate }))
}
