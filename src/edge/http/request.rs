//! What a request says, read strictly.

use std::borrow::Cow;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use warp::Buf;
use warp::http::uri::Authority;
use warp::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use warp::hyper::body::Bytes;
use warp::hyper::upgrade::OnUpgrade;

use super::reply::{Reply, problem, problem_with};
use crate::auth::Principal;
use crate::clock;
use crate::edge::listener::ConnectionPermit;
use crate::edge::matcher::Params;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids;
use crate::protocol::ids::ThreadAddress;

/// Time for a whole body.
const BODY_WITHIN: Duration = Duration::from_secs(20);

/// A body as it arrives.
type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send + Sync>>;

/// A request as its handler gets it: of a user, or, on routes that ask for no token, of anyone.
pub struct Request<Who = Principal> {
    pub who: Who,
    pub headers: Arc<HeaderMap>,
    /// Present if the connection can change its protocol.
    pub upgrade: Option<OnUpgrade>,
    pub permit: Option<ConnectionPermit>,
    /// As it stands in the URL.
    query: String,
    params: Params,
    body: ByteStream,
}

/// A request without a user: none was authenticated.
pub type AnonymousRequest = Request<()>;

impl AnonymousRequest {
    pub fn new<B: Buf>(
        headers: HeaderMap,
        query: String,
        body: impl Stream<Item = Result<B, warp::Error>> + Send + Sync + 'static,
        upgrade: Option<OnUpgrade>,
        permit: Option<ConnectionPermit>,
    ) -> AnonymousRequest {
        let body = body.map(|chunk| chunk.map(|mut chunk| chunk.copy_to_bytes(chunk.remaining())));
        Request {
            who: (),
            headers: Arc::new(headers),
            upgrade,
            permit,
            query,
            params: Params::new(),
            body: Box::pin(body),
        }
    }

    pub fn with_params(self, params: Params) -> AnonymousRequest {
        Request { params, ..self }
    }

    /// The same request, of this user.
    pub fn of(self, who: Principal) -> Request {
        let Request { who: (), headers, upgrade, permit, query, params, body } = self;
        Request { who, headers, upgrade, permit, query, params, body }
    }
}

impl AnonymousRequest {
    /// The ticket of the query, for routes that take one; they read the whole query later.
    pub fn ticket(&self) -> Option<Cow<'_, str>> {
        form_urlencoded::parse(self.query.as_bytes()).find(|(name, _)| name == "ticket").map(|(_, ticket)| ticket)
    }
}

impl Request {
    /// The same request once more. Its body is not read twice, so this is for those that have none.
    pub fn again(&self) -> Request {
        Request {
            who: self.who.clone(),
            headers: self.headers.clone(),
            upgrade: None,
            permit: None,
            query: self.query.clone(),
            params: self.params.clone(),
            body: Box::pin(futures_util::stream::empty()),
        }
    }

    /// The thread that the path names.
    pub fn address(&self) -> Result<ThreadAddress, Error> {
        ThreadAddress::parse(&self.who.user, self.segment("thread")?)
    }
}

impl<Who> Request<Who> {
    /// The parameters of the query; see [`query`].
    pub fn query(&self, known: &[&'static str]) -> Result<Query<'_>, Error> {
        query(&self.query, known)
    }

    /// Refuses any query, on routes that have none.
    pub fn no_query(&self) -> Result<(), Error> {
        self.query(&[]).map(drop)
    }

    /// A parameter of the path, percent-decoded.
    pub fn segment(&self, field: &'static str) -> Result<String, Error> {
        let found = self.params.iter().find(|(name, _)| name == field);
        segment(field, found.map_or("", |(_, raw)| raw))
    }

    /// The thread that the path names, on routes about members and titles: reserved threads have neither.
    pub fn thread_id(&self) -> Result<String, Error> {
        let thread = self.segment("thread")?;
        ids::check_thread_id(&thread)?;
        Ok(thread)
    }

    /// A header's text, if it is there.
    pub fn header(&self, name: &'static str) -> Result<Option<&str>, Error> {
        header_text(&self.headers, name)
    }

    pub fn traceparent(&self) -> Result<Option<&str>, Error> {
        self.header("traceparent")
    }

    /// The length of the body, if the client has said it.
    pub fn body_bytes(&self) -> Option<usize> {
        self.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
    }

    /// The whole body, as text, of `most` bytes and within its time. A second call finds it empty.
    pub async fn body(&mut self, most: usize) -> Result<String, Error> {
        let body = std::mem::replace(&mut self.body, Box::pin(futures_util::stream::empty()));
        let read = tokio::time::timeout(BODY_WITHIN, read_body(body, most)).await;
        read.unwrap_or_else(|_| Err(Error::new(Code::Timeout, "the body did not arrive in time")))
    }
}

async fn read_body(mut stream: ByteStream, most: usize) -> Result<String, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| Error::new(Code::BadRequest, "the body was cut off"))?;
        if body.len() + chunk.len() > most {
            return Err(Error::new(Code::TooLarge, format!("the body is larger than {most} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    String::from_utf8(body).map_err(|_| Error::new(Code::BadRequest, "the body is not UTF-8"))
}

/// The refusal of a request that says nothing clear of whom it is for (RFC 9112, section 3.2), and of one whose body would
/// have to be decoded.
pub fn refuse_head(version: Version, headers: &HeaderMap) -> Option<Reply> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = (hosts.next(), hosts.next());
    let why = match host {
        (None, _) if version < Version::HTTP_11 => None,
        (None, _) => Some("there is no Host header"),
        (Some(_), Some(_)) => Some("there is more than one Host header"),
        (Some(host), None) => Authority::try_from(host.as_bytes()).err().map(|_| "the Host header is no host"),
    };
    if let Some(why) = why {
        return Some(problem(&Error::field("Host", why)));
    }

    let is_plain = |value: &HeaderValue| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity");
    if headers.get_all(header::CONTENT_ENCODING).iter().all(is_plain) {
        return None;
    }
    let error = Error::field("Content-Encoding", "bodies are taken as they are, without a Content-Encoding");
    let mut reply = problem_with(StatusCode::UNSUPPORTED_MEDIA_TYPE, &error);
    reply.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    Some(reply)
}

/// A header's text, if it is there.
pub fn header_text<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Error> {
    let text = |value: &'a header::HeaderValue| {
        value.to_str().map_err(|_| Error::field(name, format!("{name} is not ASCII text")))
    };
    headers.get(name).map(text).transpose()
}

/// A part of the path, percent-decoded.
fn segment(field: &'static str, raw: &str) -> Result<String, Error> {
    let text = percent_encoding::percent_decode_str(raw).decode_utf8();
    text.map(|text| text.into_owned()).map_err(|_| Error::field(field, format!("{field} is not UTF-8")))
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

pub struct Query<'a>(HashMap<&'static str, Cow<'a, str>>);

impl Query<'_> {
    pub fn text(&self, name: &'static str) -> Option<&str> {
        self.0.get(name).map(|value| &**value)
    }

    pub fn number(&self, name: &'static str) -> Result<Option<u64>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let number = text.parse();
        number
            .map(Some)
            .map_err(|_| Error::field(name, format!("{name} must be a whole number, 0 or more, not {text:.60}")))
    }

    /// A number from 1 to `most`.
    pub fn up_to(&self, name: &'static str, most: usize, unless_given: usize) -> Result<usize, Error> {
        let Some(text) = self.text(name) else { return Ok(unless_given) };
        match text.parse() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(Error::field(name, format!("{name} must be a whole number from 1 to {most}, not {text:.60}"))),
        }
    }

    /// A time, in milliseconds since the Unix epoch.
    pub fn time(&self, name: &'static str) -> Result<Option<u64>, Error> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let time = clock::parse_rfc3339(text);
        time.map(Some).ok_or_else(|| Error::field(name, format!("{name} must be RFC 3339, not {text:.60}")))
    }

    /// `limit`: 100 unless given, 1 to 1,000.
    pub fn limit(&self) -> Result<usize, Error> {
        self.up_to("limit", 1_000, 100)
    }

    /// One of the words that a parameter may be; the first of them unless given.
    pub fn one_of(&self, name: &'static str, words: &[&'static str]) -> Result<&'static str, Error> {
        let Some(text) = self.text(name) else { return Ok(words[0]) };
        let known = words.iter().find(|word| **word == text);
        known
            .copied()
            .ok_or_else(|| Error::field(name, format!("{name} must be {}, not {text:.60}", words.join(" or "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_names_what_is_wrong_and_repeats_it() {
        let known = ["limit", "after", "order"];
        let refused = |raw: &str| {
            let read = query(raw, &known).and_then(|query| {
                query.limit()?;
                query.number("after")?;
                query.one_of("order", &["asc", "desc"]).map(drop)
            });
            read.expect_err(raw).message.into_owned()
        };
        for sent in ["x", "0", "-1", "1001", "99999999999999999999999", "1.5", ""] {
            assert_eq!(
                refused(&format!("limit={sent}")),
                format!("limit must be a whole number from 1 to 1000, not {sent}")
            );
        }
        assert_eq!(refused("after=-1"), "after must be a whole number, 0 or more, not -1");
        assert_eq!(refused("order=up"), "order must be asc or desc, not up");
        assert_eq!(refused("limit=1&limit=2"), "limit is given twice");
        assert_eq!(refused("limt=1"), "unknown parameter limt");
    }

    #[test]
    fn a_query_that_says_nothing_means_what_is_documented() {
        let query = query("", &["limit", "after", "order"]).expect("nothing is wrong");
        assert_eq!((query.limit(), query.number("after")), (Ok(100), Ok(None)));
        assert_eq!(query.one_of("order", &["asc", "desc"]), Ok("asc"));
    }

    #[test]
    fn segments_are_percent_decoded_and_must_be_utf8() {
        assert_eq!(segment("user", "ada%40example.org"), Ok("ada@example.org".to_owned()));
        assert_eq!(segment("user", "%ff").expect_err("no UTF-8").field.as_deref(), Some("user"));
    }

    #[test]
    fn a_request_names_one_host_and_its_body_is_not_encoded() {
        let refused = |version, list: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in list {
                headers.append(*name, HeaderValue::from_static(value));
            }
            refuse_head(version, &headers).map(|reply| reply.status().as_u16())
        };
        let (new, old) = (Version::HTTP_11, Version::HTTP_10);
        for host in ["localhost", "weft.example:8080", "[::1]:80"] {
            assert_eq!(refused(new, &[("host", host)]), None, "{host}");
        }
        for host in ["", "a b", "a/b", "a,b@"] {
            assert_eq!(refused(new, &[("host", host)]), Some(400), "{host}");
        }
        assert_eq!((refused(new, &[]), refused(old, &[])), (Some(400), None));
        assert_eq!(refused(old, &[("host", "a"), ("host", "a")]), Some(400));
        for (encoding, status) in
            [("identity", None), ("gzip", Some(415)), ("", Some(415)), ("identity, br", Some(415))]
        {
            assert_eq!(refused(new, &[("host", "a"), ("content-encoding", encoding)]), status, "{encoding}");
        }
    }
}
