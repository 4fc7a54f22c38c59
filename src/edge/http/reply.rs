//! HTTP replies, and the strict reading of what a request says.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use serde::Serialize;
use warp::Buf;
use warp::http::{HeaderMap, Response, StatusCode, header};
use warp::hyper::body::Bytes;

use crate::protocol::command::MAX_FRAME;
use crate::protocol::error::{Code, Error};
use crate::protocol::http::Problem;

pub type Reply = Response<String>;

pub fn json<T: Serialize>(status: StatusCode, body: &T) -> Reply {
    // What is serialised here has string keys only.
    raw_json(status, serde_json::to_string(body).unwrap_or_default())
}

pub fn raw_json(status: StatusCode, body: String) -> Reply {
    with_type(status, "application/json", body)
}

pub fn with_type(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    reply
}

/// A refusal as RFC 9457 has it.
pub fn problem(error: &Error) -> Reply {
    let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut reply = json(status, &Problem::of(error));
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/problem+json"));
    if error.code == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    }
    if let Some(ms) = error.retry_after_ms {
        headers.insert(header::RETRY_AFTER, ms.div_ceil(1000).into());
    }
    reply
}

/// The parameters of a query; one that is not in `known`, or there twice, is refused by name.
pub fn query<'a>(raw: &'a str, known: &[&'static str]) -> Result<Query<'a>, Error> {
    let mut found = HashMap::new();
    for (name, value) in form_urlencoded::parse(raw.as_bytes()) {
        let Some(name) = known.iter().find(|known| **known == name) else {
            return Err(Error::field(name.clone().into_owned(), format!("unknown parameter {name:.60}")));
        };
        if found.insert(*name, value).is_some() {
            return Err(Error::field(*name, format!("{name} is given twice")));
        }
    }
    Ok(Query(found))
}

pub struct Query<'a>(HashMap<&'static str, std::borrow::Cow<'a, str>>);

impl Query<'_> {
    pub fn text(&self, name: &'static str) -> Option<&str> {
        self.0.get(name).map(|value| &**value)
    }

    pub fn number(&self, name: &'static str) -> Result<Option<u64>, Error> {
        let parse = |text: &str| {
            text.parse().map_err(|_| Error::field(name, format!("{name} must be a whole number, 0 or more")))
        };
        self.text(name).map(parse).transpose()
    }

    /// A number from 1 to `most`.
    pub fn up_to(&self, name: &'static str, most: usize, unless_given: usize) -> Result<usize, Error> {
        match self.number(name)? {
            None => Ok(unless_given),
            Some(number) => usize::try_from(number)
                .ok()
                .filter(|number| (1..=most).contains(number))
                .ok_or_else(|| Error::field(name, format!("{name} must be 1 to {most}"))),
        }
    }

    /// `limit`: 100 unless given, 1 to 1,000.
    pub fn limit(&self) -> Result<usize, Error> {
        self.up_to("limit", 1_000, 100)
    }
}

/// A header's text, if it is there.
pub fn header_text<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Error> {
    let text = |value: &'a header::HeaderValue| {
        value.to_str().map_err(|_| Error::field(name, format!("{name} is not ASCII text")))
    };
    headers.get(name).map(text).transpose()
}

/// Time for a whole body.
const BODY_WITHIN: Duration = Duration::from_secs(20);

/// A whole body, as text, up to the limit and within its time.
pub async fn body<B: Buf, E>(stream: impl Stream<Item = Result<B, E>>) -> Result<String, Error> {
    let late = |_| Err(Error::new(Code::Timeout, "the body did not come in time"));
    tokio::time::timeout(BODY_WITHIN, read_body(stream)).await.unwrap_or_else(late)
}

async fn read_body<B: Buf, E>(stream: impl Stream<Item = Result<B, E>>) -> Result<String, Error> {
    let mut stream = std::pin::pin!(stream);
    let mut body = Vec::new();
    while let Some(chunk) = stream.next().await {
        let mut chunk = chunk.map_err(|_| Error::new(Code::BadRequest, "the body was cut off"))?;
        if body.len() + chunk.remaining() > MAX_FRAME {
            return Err(Error::new(Code::TooLarge, format!("the body is larger than {MAX_FRAME} bytes")));
        }
        let bytes: Bytes = chunk.copy_to_bytes(chunk.remaining());
        body.extend_from_slice(&bytes);
    }
    String::from_utf8(body).map_err(|_| Error::new(Code::BadRequest, "the body is not UTF-8"))
}

/// A part of the path, percent-decoded.
pub fn segment(field: &'static str, raw: &str) -> Result<String, Error> {
    let text = percent_encoding::percent_decode_str(raw).decode_utf8();
    text.map(|text| text.into_owned()).map_err(|_| Error::field(field, format!("{field} is not UTF-8")))
}
