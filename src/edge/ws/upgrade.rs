//! The upgrade to WebSocket (RFC 6455, section 4), answered by us so that a session's buffers fit.

use std::sync::Arc;

use base64::Engine;
use hyper_util::rt::TokioIo;
use sha1::{Digest, Sha1};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use warp::http::{HeaderMap, HeaderValue, StatusCode, header};
use warp::hyper::upgrade::OnUpgrade;

use super::Sockets;
use super::session::Session;
use super::socket::Socket;
use crate::auth::Principal;
use crate::edge::http::reply::{Reply, problem, with_type};
use crate::edge::http::request::{AnonymousRequest, bearer_token, header_text};
use crate::protocol::command::MAX_FRAME;
use crate::protocol::error::{Code, Error};

/// What a session's buffers begin with; they grow with a frame and no further.
const READ_BUFFER: usize = 4 << 10;
pub const WRITE_BUFFER: usize = 8 << 10;

const PROTOCOL: &str = "weft.v1";
const BEARER: &str = "weft.bearer.";
const ACCEPT_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Answers `GET /v1/ws`.
pub fn upgrade(sockets: &Arc<Sockets>, it: AnonymousRequest) -> Reply {
    match accept(sockets, it) {
        Ok(reply) => reply,
        Err(error) => {
            let mut reply = problem(&error);
            if error.field.as_deref() == Some("Sec-WebSocket-Version") {
                *reply.status_mut() = StatusCode::UPGRADE_REQUIRED;
                reply.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            reply
        }
    }
}

fn accept(ctx: &Arc<Sockets>, mut it: AnonymousRequest) -> Result<Reply, Error> {
    let (upgrade, permit) = (it.upgrade.take(), it.permit.take());
    let headers = &it.headers;
    let has = |name, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|it| it.trim().eq_ignore_ascii_case(token))
    };
    let (true, true, Some(upgrade)) = (has(header::CONNECTION, "upgrade"), has(header::UPGRADE, "websocket"), upgrade)
    else {
        return Err(Error::field(
            "Upgrade",
            "this is a WebSocket: ask with Connection: Upgrade and Upgrade: websocket",
        ));
    };
    if header_text(headers, "Sec-WebSocket-Version")? != Some("13") {
        return Err(Error::field("Sec-WebSocket-Version", "the WebSocket version is 13"));
    }
    let key = header_text(headers, "Sec-WebSocket-Key")?.filter(|key| key.len() == 24);
    let key = key.ok_or_else(|| Error::field("Sec-WebSocket-Key", "the key is 16 bytes in base64"))?;
    check_origin(ctx, headers)?;
    let offered: Vec<&str> = header_text(headers, "Sec-WebSocket-Protocol")?
        .map_or(Vec::new(), |list| list.split(',').map(str::trim).collect());
    ctx.health.check_caught_up()?;
    let who = credentials(ctx, &it, &offered)?;
    let versions = || offered.iter().filter(|it| it.starts_with("weft.v"));
    let unsupported = versions().next().is_some() && !versions().any(|it| *it == PROTOCOL);
    let traceparent = header_text(headers, "traceparent")?.map(str::to_owned);

    let mut reply = with_type(StatusCode::SWITCHING_PROTOCOLS, "", String::new());
    let out = reply.headers_mut();
    out.clear();
    out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    out.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    let accept = base64::engine::general_purpose::STANDARD
        .encode(Sha1::new().chain_update(key).chain_update(ACCEPT_GUID).finalize());
    out.insert(
        header::SEC_WEBSOCKET_ACCEPT,
        HeaderValue::from_str(&accept).map_err(|_| Error::new(Code::Internal, "no accept key"))?,
    );
    if offered.contains(&PROTOCOL) {
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    let ctx = ctx.clone();
    tokio::spawn(async move {
        // The permit under the connection limit is the session's as long as it lasts.
        let _place = permit;
        if let Some(ws) = websocket(upgrade).await {
            // Boxed: the futures around it then hold a pointer, not copies.
            let session = Box::new(Session::new(ctx, ws, who, traceparent));
            if unsupported { session.refuse_version().await } else { session.run().await }
        }
    });
    Ok(reply)
}

/// The WebSocket on the connection's own TCP stream, once the 101 is out.
async fn websocket(upgrade: OnUpgrade) -> Option<WebSocketStream<Socket>> {
    let upgraded = upgrade.await.inspect_err(|error| tracing::debug!(%error, "an upgrade did not happen")).ok()?;
    let parts = upgraded
        .downcast::<TokioIo<Socket>>()
        .inspect_err(|_| tracing::error!("an upgrade on no socket of ours"))
        .ok()?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME));
    let mut socket = parts.io.into_inner();
    socket.watch_frames(&parts.read_buf);
    Some(WebSocketStream::from_partially_read(socket, parts.read_buf.to_vec(), Role::Server, Some(config)).await)
}

/// Who the request comes from: the `Authorization` header, then the subprotocol, then a ticket; else a `connect` frame must
/// follow.
fn credentials(ctx: &Sockets, it: &AnonymousRequest, offered: &[&str]) -> Result<Option<Principal>, Error> {
    let query = it.query(&["ticket"])?;
    if it.headers.contains_key(header::AUTHORIZATION) {
        return ctx.auth.verify(bearer_token(&it.headers)?).map(Some);
    }
    if let Some(token) = offered.iter().find_map(|it| it.strip_prefix(BEARER)) {
        return ctx.auth.verify(token).map(Some);
    }
    query.text("ticket").map(|ticket| ctx.auth.redeem_ticket(ticket)).transpose()
}

/// A browser's page must be of our own host, or of one that the configuration names.
fn check_origin(ctx: &Sockets, headers: &HeaderMap) -> Result<(), Error> {
    let Some(origin) = header_text(headers, "Origin")? else {
        return Ok(());
    };
    let own = header_text(headers, "Host")?
        .is_some_and(|host| origin.split_once("://").is_some_and(|(_, it)| it.eq_ignore_ascii_case(host)));
    if own || ctx.origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin)) {
        Ok(())
    } else {
        Err(Error::new(Code::Forbidden, format!("the origin {origin:.100} is not allowed")).at("Origin"))
    }
}
