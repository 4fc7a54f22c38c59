//! What a caller gets when something did not work: one type, one set of codes on every interface.

use std::borrow::Cow;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The error codes, the same over WebSocket and HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    BadRequest,
    Unauthenticated,
    Forbidden,
    NotFound,
    Conflict,
    TooLarge,
    RateLimited,
    QueueFull,
    RunOrder,
    CursorInvalid,
    CursorExpired,
    Unavailable,
    Timeout,
    Internal,
}

impl Code {
    pub fn as_str(self) -> &'static str {
        match self {
            Code::BadRequest => "bad_request",
            Code::Unauthenticated => "unauthenticated",
            Code::Forbidden => "forbidden",
            Code::NotFound => "not_found",
            Code::Conflict => "conflict",
            Code::TooLarge => "too_large",
            Code::RateLimited => "rate_limited",
            Code::QueueFull => "queue_full",
            Code::RunOrder => "run_order",
            Code::CursorInvalid => "cursor_invalid",
            Code::CursorExpired => "cursor_expired",
            Code::Unavailable => "unavailable",
            Code::Timeout => "timeout",
            Code::Internal => "internal",
        }
    }

    /// Whether the same request may work later, unchanged.
    pub fn temporary(self) -> bool {
        matches!(self, Code::RateLimited | Code::QueueFull | Code::Unavailable | Code::Timeout | Code::Internal)
    }

    /// The HTTP status that goes with the code.
    pub fn status(self) -> u16 {
        match self {
            Code::BadRequest | Code::CursorInvalid => 400,
            Code::Unauthenticated => 401,
            Code::Forbidden => 403,
            Code::NotFound => 404,
            Code::Conflict | Code::RunOrder => 409,
            Code::CursorExpired => 410,
            Code::TooLarge => 413,
            Code::RateLimited => 429,
            Code::QueueFull | Code::Unavailable => 503,
            Code::Timeout => 504,
            Code::Internal => 500,
        }
    }
}

/// A refusal: its code, a text for people, and where it is known, the field at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub code: Code,
    pub message: Cow<'static, str>,
    pub field: Option<Cow<'static, str>>,
    /// When to try again, if that is known.
    pub retry_after_ms: Option<u64>,
    /// The log did not answer in time: the publish may have happened. Sending it again with its key is safe.
    pub outcome_unknown: bool,
}

impl Error {
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Error {
        Error { code, message: message.into(), field: None, retry_after_ms: None, outcome_unknown: false }
    }

    /// A `bad_request` that names the field at fault.
    pub fn field(field: impl Into<Cow<'static, str>>, message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Code::BadRequest, message).at(field)
    }

    pub fn at(mut self, field: impl Into<Cow<'static, str>>) -> Error {
        self.field = Some(field.into());
        self
    }

    pub fn retry_after(mut self, ms: u64) -> Error {
        self.retry_after_ms = Some(ms);
        self
    }

    pub fn unknown_outcome(mut self) -> Error {
        self.outcome_unknown = true;
        self
    }

    /// The one answer for a ticket that is not good, whatever the reason.
    pub fn no_ticket() -> Error {
        Error::new(Code::Unauthenticated, "the ticket is used, expired or none of ours").at("ticket")
    }

    /// The one answer for a thread that does not exist and for one that the caller may not see.
    pub fn no_thread() -> Error {
        Error::new(Code::NotFound, "there is no such thread, or you are not a member of it").at("thread")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)?;
        if let Some(field) = &self.field {
            write!(f, " (field {field})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
