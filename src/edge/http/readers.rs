//! Who reads a thread: who is there now, and how far each member has acknowledged it.

use std::sync::Arc;

use warp::http::StatusCode;

use super::Api;
use super::page::COPIES;
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::clock;
use crate::edge::blocking;
use crate::protocol::error::Error;
use crate::protocol::http::{Presence, Present, ReceiptItem, ReceiptList};
use crate::protocol::ids;

/// About the size of an entry without its names.
const ITEM_BYTES: usize = 64;
/// What a list takes, as a rule.
const MEMORY: usize = 64 << 10;

/// `GET /v1/threads/{thread}/presence`
pub async fn presence(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let key = ids::log_key(&it.who.tenant, &address.name);
    let mut meter = api.meter(&it.who, MEMORY).await?;
    let present = api.rights.read(&it.who, &address.name, |_| Ok(api.hub.present(&key)))?;
    meter.add(present.iter().map(|(user, _)| (ITEM_BYTES + user.len()) * COPIES).sum())?;
    let users =
        present.into_iter().map(|(user, connections)| Present { user: user.to_string(), connections }).collect();
    Ok(charged(json(StatusCode::OK, &Presence { thread: address.called, users }), meter))
}

/// `GET /v1/threads/{thread}/receipts`
pub async fn receipts(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let address = it.address()?;
    let mut meter = api.meter(&it.who, MEMORY).await?;
    blocking(move || {
        let (tenant, thread) = (&*it.who.tenant, &*address.name);
        let read = |head| {
            let mut receipts = Vec::new();
            for receipt in api.store.receipts(tenant, thread) {
                let (user, name, row) = receipt?;
                // Receipts of users who have left the thread stay in the store, and are not shown.
                if ids::is_reserved(thread) || api.store.is_member(tenant, thread, &user)? {
                    meter.add((ITEM_BYTES + user.len() + name.len()) * COPIES)?;
                    let name = Some(name).filter(|name| !name.is_empty());
                    receipts.push(ReceiptItem { user, name, seq: row.acked, at: clock::rfc3339(row.at) });
                }
            }
            Ok(ReceiptList { thread: address.called.clone(), head, receipts })
        };
        let list = api.rights.read(&it.who, thread, read)?;
        Ok(charged(json(StatusCode::OK, &list), meter))
    })
    .await
}
