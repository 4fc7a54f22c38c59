//! Who reads a thread: who is there now, and how far each member has acknowledged it.

use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::reply::{Reply, json};
use super::request::Request;
use crate::clock;
use crate::edge::blocking;
use crate::protocol::error::Error;
use crate::protocol::http::{Presence, Present, ReceiptItem, ReceiptList};
use crate::protocol::ids;

/// `GET /v1/threads/{thread}/presence`
pub async fn presence(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let key = ids::log_key(&it.who.tenant, &address.name);
    let present = api.rights.read(&it.who, &address.name, |_| Ok(api.hub.present(&key)))?;
    let users =
        present.into_iter().map(|(user, connections)| Present { user: user.to_string(), connections }).collect();
    Ok(json(StatusCode::OK, &Presence { thread: address.called, users }))
}

/// `GET /v1/threads/{thread}/receipts`
pub async fn receipts(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    blocking(move || {
        let (tenant, thread) = (&*it.who.tenant, &*address.name);
        let read = |head| {
            let mut receipts = Vec::new();
            for (user, name, row) in api.store.receipts(tenant, thread)? {
                // Receipts of users who have left the thread stay in the store, and are not shown.
                if ids::is_reserved(thread) || api.store.is_member(tenant, thread, &user)? {
                    let name = Some(name).filter(|name| !name.is_empty());
                    receipts.push(ReceiptItem { user, name, seq: row.acked, at: clock::rfc3339(row.at) });
                }
            }
            Ok(ReceiptList { thread: address.called.clone(), head, receipts })
        };
        let list = api.rights.read(&it.who, thread, read)?;
        Ok(json(StatusCode::OK, &list))
    })
    .await
}
