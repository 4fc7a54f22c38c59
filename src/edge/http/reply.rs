//! HTTP replies.

use bytes::Bytes;
use serde::Serialize;
use warp::http::{HeaderValue, Method, Response, StatusCode, header};

use super::meter::Meter;
use crate::memory;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::Problem;
use crate::protocol::json;

pub type Reply = Response<Bytes>;

/// Holds what a request has charged for as long as its answer is in memory, and gives back at once what it does not need.
pub fn charged(reply: Reply, meter: Meter) -> Reply {
    let mut charge = meter.into_charge();
    charge.shrink_to(reply.body().len());
    reply.map(|body| memory::charged(body, charge))
}

pub fn json<T: Serialize>(status: StatusCode, body: &T) -> Reply {
    raw_json(status, json::encode(body))
}

pub fn raw_json(status: StatusCode, body: String) -> Reply {
    with_type(status, "application/json", body)
}

pub fn with_type(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    // What was reserved for it and not needed would stay as long as the slowest client reads.
    let mut reply = Response::new(Bytes::from(body.into_boxed_str().into_string()));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// A refusal as RFC 9457 has it.
pub fn problem(error: &Error) -> Reply {
    let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    problem_with(status, error)
}

/// A refusal with another status than the one that goes with its code.
pub fn problem_with(status: StatusCode, error: &Error) -> Reply {
    let body = Problem { status: status.as_u16(), ..Problem::of(error) };
    let mut reply = with_type(status, "application/problem+json", json::encode(&body));
    let headers = reply.headers_mut();
    if error.code == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(ms) = error.retry_after_ms {
        headers.insert(header::RETRY_AFTER, ms.div_ceil(1000).into());
    }
    reply
}

/// The answer to a method that a path does not have.
pub fn method_not_allowed(method: &Method, path: &str, allowed: &[&Method]) -> Reply {
    let allowed = allowed.iter().map(|method| method.as_str()).collect::<Vec<_>>().join(", ");
    let why = format!("{path} does not have the method {:.20}; it has {allowed}", method.as_str());
    let mut reply = problem_with(StatusCode::METHOD_NOT_ALLOWED, &Error::new(Code::BadRequest, why));
    // Names of methods are ASCII.
    reply.headers_mut().extend(HeaderValue::try_from(allowed).ok().map(|allowed| (header::ALLOW, allowed)));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_method_is_answered_with_405_in_the_body_too_and_with_those_that_are_allowed() {
        let reply = method_not_allowed(&Method::PATCH, "/v1/threads/{thread}", &[&Method::GET, &Method::PUT]);
        assert_eq!((reply.status().as_u16(), reply.headers()["allow"].as_bytes()), (405, &b"GET, PUT"[..]));
        let body: serde_json::Value = serde_json::from_slice(reply.body()).expect("JSON");
        assert_eq!((&body["status"], &body["code"]), (&405.into(), &"bad_request".into()));
        assert_eq!(body["detail"], "/v1/threads/{thread} does not have the method PATCH; it has GET, PUT");
    }
}
