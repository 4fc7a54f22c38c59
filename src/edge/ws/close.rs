//! How a session ends, and the close codes (docs/PROTOCOL.md, "Close codes").
//!
//! After 4000–4499 a client reconnects and resumes; after 4500–4999 it does not, until something is mended.

use std::borrow::Cow;

use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError, ProtocolError};

use crate::protocol::error::{Code, Error};

/// The server is going down; the reason says when to come back.
pub const DRAINING: u16 = 1001;
/// The frame violates RFC 6455.
pub const NOT_WEBSOCKET: u16 = 1002;
/// A binary frame: commands are JSON text.
pub const NOT_TEXT: u16 = 1003;
/// The client closed without a code, or the connection was lost. Never sent; counted in metrics.
pub const NO_CODE: u16 = 1005;
/// A text frame that is not UTF-8.
pub const NOT_UTF8: u16 = 1007;
/// A frame larger than the limit, or a large one before the user is known.
pub const TOO_LARGE: u16 = 1009;
/// The server has a bug.
pub const INTERNAL: u16 = 1011;
/// The socket took nothing for too long, or more threads were joined than can wait for it.
pub const SLOW_CONSUMER: u16 = 4001;
/// No frame came after a ping, or a large one did not end in time.
pub const NO_HEARTBEAT: u16 = 4002;
/// The token has expired and was not refreshed.
pub const TOKEN_EXPIRED: u16 = 4003;
/// A session without credentials sent no `connect` in time.
pub const NO_CONNECT: u16 = 4004;
/// Over the rate limit for too long, or a flood of frames that carry nothing.
pub const RATE_LIMITED: u16 = 4005;
/// The token cannot be checked now, since the store failed; or there is no memory for a message.
pub const UNAVAILABLE: u16 = 4006;
/// The token is not valid, or another user's.
pub const UNAUTHENTICATED: u16 = 4500;
/// The frame is neither a JSON object nor an array.
pub const MALFORMED: u16 = 4501;
/// No offered version of the protocol is supported.
pub const UNSUPPORTED_VERSION: u16 = 4502;
/// The user has too many connections.
pub const TOO_MANY_CONNECTIONS: u16 = 4503;
/// The user's sessions were revoked.
pub const REVOKED: u16 = 4504;

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The server closes, with this code and reason.
    Close(u16, Cow<'static, str>),
    /// The client closed, or the connection is lost.
    Gone,
}

impl End {
    pub fn close(code: u16, reason: &'static str) -> End {
        End::Close(code, reason.into())
    }

    /// The server is going down: come back after so many milliseconds.
    pub fn draining(retry_after_ms: u64) -> End {
        End::Close(DRAINING, format!(r#"{{"reason":"draining","retry_after_ms":{retry_after_ms}}}"#).into())
    }

    /// The user has too many connections: one of them has to end first, and it may be another client's.
    pub fn no_room(error: &Error) -> End {
        let retry_after_ms = error.retry_after_ms.unwrap_or_default();
        let reason = format!(r#"{{"reason":"too_many_connections","retry_after_ms":{retry_after_ms}}}"#);
        End::Close(TOO_MANY_CONNECTIONS, reason.into())
    }

    /// Serving the session panicked.
    pub fn failed() -> End {
        End::close(INTERNAL, "the server failed at this session, and has reported it: resume")
    }

    /// The token of a `connect` or `refresh` was refused.
    pub fn refused_token(error: &Error) -> End {
        match error.code {
            Code::Unavailable => End::close(UNAVAILABLE, "the token cannot be checked now"),
            _ => End::close(UNAUTHENTICATED, "the token is not valid"),
        }
    }

    /// The session's own token no longer passes the check for revocations.
    pub fn revoked(error: &Error) -> End {
        match error.code {
            Code::Unavailable => End::close(UNAVAILABLE, "the token cannot be checked now"),
            _ => End::close(REVOKED, "the user's sessions were revoked"),
        }
    }

    /// What the WebSocket library found wrong (RFC 6455, section 7.4.1).
    pub fn of_websocket(error: &WsError) -> End {
        match error {
            WsError::Capacity(CapacityError::MessageTooLong { .. }) => End::close(TOO_LARGE, "the frame is too large"),
            WsError::Utf8(_) => End::close(NOT_UTF8, "the frame is not UTF-8"),
            WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Gone,
            WsError::Protocol(_) => End::close(NOT_WEBSOCKET, "the frame is not WebSocket"),
            _ => End::Gone,
        }
    }

    /// Whether the server ends the session for a reason of its own, and not for what the client did or failed to do.
    pub fn is_by_server(&self) -> bool {
        matches!(self.code(), DRAINING | INTERNAL | TOKEN_EXPIRED | UNAVAILABLE | REVOKED)
    }

    /// The code that metrics count.
    pub fn code(&self) -> u16 {
        match self {
            End::Close(code, _) => *code,
            End::Gone => NO_CODE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_fails_is_no_verdict_on_the_token() {
        let failing = Error::new(Code::Unavailable, "the store cannot be read");
        let refused = Error::new(Code::Unauthenticated, "the token is not valid");
        assert_eq!((End::refused_token(&failing).code(), End::refused_token(&refused).code()), (4006, 4500));
        assert_eq!((End::revoked(&failing).code(), End::revoked(&refused).code()), (4006, 4504));
    }

    #[test]
    fn a_reason_that_says_when_to_come_back_is_json() {
        let of = |end| {
            let End::Close(code, reason) = end else { panic!("closes") };
            (code, serde_json::from_str::<serde_json::Value>(&reason).expect("JSON"))
        };
        let draining = serde_json::json!({"reason": "draining", "retry_after_ms": 250});
        assert_eq!(of(End::draining(250)), (1001, draining));
        let full = serde_json::json!({"reason": "too_many_connections", "retry_after_ms": 30_000});
        assert_eq!(of(End::no_room(&Error::new(Code::RateLimited, "full").retry_after(30_000))), (4503, full));
    }

    #[test]
    fn a_connection_that_was_cut_is_no_violation() {
        let cut = WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake);
        assert_eq!(End::of_websocket(&cut), End::Gone);
        let violation = WsError::Protocol(ProtocolError::NonZeroReservedBits);
        assert_eq!(End::of_websocket(&violation).code(), 1002);
        assert_eq!(End::of_websocket(&WsError::ConnectionClosed).code(), 1005);
    }
}
