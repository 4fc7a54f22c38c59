//! The upgrade to WebSocket (RFC 6455, section 4), answered here and not by a library, so that a session's buffers are as
//! small as they can be.

use std::sync::Arc;

use base64::Engine;
use hyper_util::rt::TokioIo;
use sha1::{Digest, Sha1};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use warp::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use warp::hyper::upgrade::OnUpgrade;

use super::Sockets;
use super::message_memory::MessageMemory;
use super::session::Session;
use super::socket::Socket;
use crate::auth::{Credential, Principal};
use crate::edge::credentials::{authorization, cookie_that_counts};
use crate::edge::http::reply::{Reply, problem, problem_with, with_type};
use crate::edge::http::request::{AnonymousRequest, header_text};
use crate::protocol::command::MAX_FRAME;
use crate::protocol::error::{Code, Error};

/// The initial sizes of a session's buffers; they grow with a frame and no further.
const READ_BUFFER: usize = 2 << 10;
pub const WRITE_BUFFER: usize = 8 << 10;

/// The subprotocol; others that begin with [`VERSIONS`] are versions that are not supported.
const PROTOCOL: &str = "weft.v1";
const VERSIONS: &str = "weft.v";
/// Before a token among the subprotocols, where a browser can put one.
const BEARER: &str = "weft.bearer.";
const ACCEPT_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Answers `GET /v1/ws`. The session keeps the connection's permit for as long as it lasts.
pub async fn upgrade(sockets: Arc<Sockets>, request: AnonymousRequest) -> Reply {
    match accept(&sockets, request).await {
        Ok(reply) => reply,
        Err(error) => {
            if error.field.as_deref() != Some("Sec-WebSocket-Version") {
                return problem(&error);
            }
            let mut reply = problem_with(StatusCode::UPGRADE_REQUIRED, &error);
            reply.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            reply
        }
    }
}

async fn accept(sockets: &Arc<Sockets>, mut request: AnonymousRequest) -> Result<Reply, Error> {
    let (upgrade, permit) = (request.upgrade.take(), request.permit.take());
    let headers = &request.headers;
    let (upgrade, key) = handshake(headers, upgrade)?;
    sockets.origins.check(headers)?;
    let protocols = Subprotocols::offered(headers)?;

    sockets.health.check_caught_up()?;
    let who = credentials(sockets, &request, &protocols).await?;
    let traceparent = header_text(headers, "traceparent")?.map(str::to_owned);

    let reply = switching_protocols(key, &protocols)?;
    let (sockets, unsupported) = (sockets.clone(), protocols.unsupported());
    tokio::spawn(async move {
        let _permit = permit;
        let memory = MessageMemory::new(sockets.memory.clone());
        let Some(ws) = websocket(upgrade, memory).await else { return };
        // Boxed: the futures around it then hold a pointer, not copies.
        let session = Box::new(Session::new(sockets, ws, who, traceparent.as_deref()));
        if unsupported { session.refuse_version().await } else { session.run().await }
    });
    Ok(reply)
}

/// Checks that the request asks for a WebSocket; gives the connection that is to become one, and the client's key.
fn handshake(headers: &HeaderMap, upgrade: Option<OnUpgrade>) -> Result<(OnUpgrade, &str), Error> {
    let asks = has_token(headers, header::CONNECTION, "upgrade") && has_token(headers, header::UPGRADE, "websocket");
    let Some(upgrade) = upgrade.filter(|_| asks) else {
        let why = "this is a WebSocket: ask with Connection: Upgrade and Upgrade: websocket";
        return Err(Error::field("Upgrade", why));
    };
    if header_text(headers, "Sec-WebSocket-Version")? != Some("13") {
        return Err(Error::field("Sec-WebSocket-Version", "the WebSocket version is 13"));
    }
    match header_text(headers, "Sec-WebSocket-Key")? {
        Some(key) if key.len() == 24 => Ok((upgrade, key)),
        _ => Err(Error::field("Sec-WebSocket-Key", "the key is 16 bytes in base64")),
    }
}

/// Whether a header that is a list has this token.
fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|it| it.trim().eq_ignore_ascii_case(token))
}

/// The subprotocols that the client offers.
struct Subprotocols<'a>(Vec<&'a str>);

impl<'a> Subprotocols<'a> {
    fn offered(headers: &'a HeaderMap) -> Result<Subprotocols<'a>, Error> {
        let list = header_text(headers, "Sec-WebSocket-Protocol")?;
        Ok(Subprotocols(list.map_or(Vec::new(), |list| list.split(',').map(str::trim).collect())))
    }

    fn supported(&self) -> bool {
        self.0.contains(&PROTOCOL)
    }

    /// Versions of the protocol are offered, and none is supported. Without any offered version it is the current one.
    fn unsupported(&self) -> bool {
        !self.supported() && self.0.iter().any(|it| it.starts_with(VERSIONS))
    }

    fn token(&self) -> Option<&'a str> {
        self.0.iter().find_map(|it| it.strip_prefix(BEARER))
    }
}

/// The user that the request's credentials stand for, in this order: the `Authorization` header, a token among the
/// subprotocols, a ticket, a cookie. With none of them, a `connect` frame must follow.
async fn credentials(
    sockets: &Sockets,
    request: &AnonymousRequest,
    protocols: &Subprotocols<'_>,
) -> Result<Option<Principal>, Error> {
    let query = request.query(&["ticket"])?;
    if request.headers.contains_key(header::AUTHORIZATION) {
        return sockets.auth.verify(&authorization(&request.headers)?).await.map(Some);
    }
    if let Some(token) = protocols.token() {
        return sockets.auth.verify(&Credential::token(token)).await.map(Some);
    }
    if let Some(ticket) = query.text("ticket") {
        return sockets.tickets.redeem(ticket).await.map(Some);
    }
    match cookie_that_counts(&sockets.auth, &request.headers, &sockets.origins) {
        Some(session) => sockets.auth.verify(&session).await.map(Some),
        None => Ok(None),
    }
}

/// The answer that makes the connection a WebSocket.
fn switching_protocols(key: &str, protocols: &Subprotocols<'_>) -> Result<Reply, Error> {
    let digest = Sha1::new().chain_update(key).chain_update(ACCEPT_GUID).finalize();
    let accept = base64::engine::general_purpose::STANDARD.encode(digest);
    let accept = HeaderValue::from_str(&accept).map_err(|_| Error::new(Code::Internal, "no accept key"))?;

    let mut reply = with_type(StatusCode::SWITCHING_PROTOCOLS, "", String::new());
    let out = reply.headers_mut();
    out.clear();
    out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    out.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    out.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if protocols.supported() {
        out.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    Ok(reply)
}

/// The WebSocket on the connection's own TCP stream, once the 101 is written.
async fn websocket(upgrade: OnUpgrade, memory: MessageMemory) -> Option<WebSocketStream<Socket>> {
    let upgraded = upgrade.await.inspect_err(|error| tracing::debug!(%error, "an upgrade did not happen")).ok()?;
    let parts = upgraded
        .downcast::<TokioIo<Socket>>()
        .inspect_err(|_| tracing::error!("the upgraded connection is not one of the listener's"))
        .ok()?;
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME));
    let mut socket = parts.io.into_inner();
    socket.guard_frames(&parts.read_buf, memory);
    Some(WebSocketStream::from_partially_read(socket, parts.read_buf.to_vec(), Role::Server, Some(config)).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn a_version_is_unsupported_only_if_versions_are_offered_and_none_is_ours() {
        for (offered, supported, unsupported) in [
            ("weft.v1", true, false),
            ("weft.v2, weft.v1", true, false),
            ("weft.v2", false, true),
            ("weft.v1.1", false, true),
            ("weft.bearer.x", false, false),
            ("chat, weft.bearer.x", false, false),
            ("weft.bearer.x, weft.v9", false, true),
        ] {
            let headers = headers("sec-websocket-protocol", offered);
            let protocols = Subprotocols::offered(&headers).expect("ASCII");
            assert_eq!((protocols.supported(), protocols.unsupported()), (supported, unsupported), "{offered}");
            assert_eq!(protocols.token(), offered.contains("bearer").then_some("x"), "{offered}");
        }
        let none = HeaderMap::new();
        let protocols = Subprotocols::offered(&none).expect("none");
        assert!(!protocols.supported() && !protocols.unsupported() && protocols.token().is_none());
    }

    #[test]
    fn the_accept_key_is_that_of_the_rfc() {
        let none = HeaderMap::new();
        let protocols = Subprotocols::offered(&none).expect("none");
        let reply = switching_protocols("dGhlIHNhbXBsZSBub25jZQ==", &protocols).expect("a reply");
        assert_eq!(reply.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(!reply.headers().contains_key("sec-websocket-protocol"));
    }

    #[test]
    fn a_list_header_is_searched_token_by_token() {
        let headers = headers("connection", "keep-alive, Upgrade");
        assert!(has_token(&headers, header::CONNECTION, "upgrade"));
        assert!(!has_token(&headers, header::CONNECTION, "keep"));
    }
}
