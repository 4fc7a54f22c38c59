//! Pages of other origins (Fetch Standard, "CORS protocol"): who may open a WebSocket, and who may read answers.

use warp::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use super::http::reply::{Reply, problem, with_type};
use super::http::request::header_text;
use crate::protocol::error::{Code, Error};

/// What a page may send beside what every page may.
const REQUEST_HEADERS: &str = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, traceparent";
/// What a page may read beside what every page may.
const ANSWER_HEADERS: &str = "Allow, Retry-After, Weft-Epoch, Weft-Truncated, WWW-Authenticate";
/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";

/// The origins that the configuration names, beside the server's own; `*` is all of them.
pub struct Origins {
    named: Vec<String>,
    /// Whether the server takes cookies, and says so to pages of these origins.
    cookies: bool,
}

impl Origins {
    pub fn new(named: Vec<String>) -> Origins {
        Origins { named, cookies: false }
    }

    pub fn with_cookies(self, cookies: bool) -> Origins {
        Origins { cookies, ..self }
    }

    /// The origin of a request, if the configuration names it.
    fn named<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        let text = origin.to_str().ok()?;
        let named = self.named.iter().any(|named| named == "*" || named.eq_ignore_ascii_case(text));
        named.then_some(origin)
    }

    /// Refuses a page's WebSocket unless the page is of the server's own host or of an origin that is named: a browser lets
    /// any page open one.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let Some(origin) = header_text(headers, "Origin")? else { return Ok(()) };
        let own = is_own(origin, header_text(headers, "Host")?);
        if own || self.named(headers).is_some() { Ok(()) } else { Err(refusal(origin)) }
    }

    /// Whether the cookies that came along are those of a page that may use them: of the server's own host, or of an origin that
    /// is named, by its name. A browser says which page asks, but for what one of the server's own reads; then it says that.
    pub fn may_use_cookies(&self, headers: &HeaderMap) -> bool {
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        match text(header::ORIGIN) {
            Some(origin) => is_own(origin, text(header::HOST)) || self.is_named(origin),
            None => {
                !headers.contains_key(header::ORIGIN)
                    && headers.get("sec-fetch-site").is_some_and(|site| site == "same-origin")
            }
        }
    }

    /// Whether an origin is named as such, and not by `*`.
    fn is_named(&self, origin: &str) -> bool {
        self.named.iter().any(|named| named.eq_ignore_ascii_case(origin))
    }

    /// Lets a page read an answer, if its origin is named. The answer says that it depends on the origin in any case, so
    /// that no cache gives one page what was for another.
    pub fn open(&self, request: &HeaderMap, answer: &mut HeaderMap) {
        if self.named.is_empty() {
            return;
        }
        answer.append(header::VARY, HeaderValue::from_static("Origin"));
        if let Some(origin) = self.named(request) {
            // Never `*`: a page is let in by its name.
            answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(ANSWER_HEADERS));
            if self.cookies && origin.to_str().is_ok_and(|origin| self.is_named(origin)) {
                answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
            }
        }
    }

    /// The answer to a browser that asks what a page may do with a path that has these methods; to be opened as any other.
    pub fn preflight(&self, request: &HeaderMap, methods: &[&Method]) -> Reply {
        if self.named(request).is_none() {
            let origin = request.get(header::ORIGIN).and_then(|origin| origin.to_str().ok()).unwrap_or_default();
            return problem(&refusal(origin));
        }
        let methods = methods.iter().map(|method| method.as_str()).collect::<Vec<_>>().join(", ");
        let mut reply = with_type(StatusCode::NO_CONTENT, "", String::new());
        let headers = reply.headers_mut();
        headers.clear();
        // Names of methods are ASCII.
        headers.extend(HeaderValue::try_from(methods).ok().map(|it| (header::ACCESS_CONTROL_ALLOW_METHODS, it)));
        let fixed: [(HeaderName, &str); 3] = [
            (header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
            (header::VARY, "Access-Control-Request-Method, Access-Control-Request-Headers"),
        ];
        headers.extend(fixed.map(|(name, value)| (name, HeaderValue::from_static(value))));
        reply
    }
}

/// Whether a request is a browser's question before one of a page's own.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Whether an origin is of the host that was asked.
fn is_own(origin: &str, host: Option<&str>) -> bool {
    match (host, origin.split_once("://")) {
        (Some(host), Some((_, origin_host))) => origin_host.eq_ignore_ascii_case(host),
        _ => false,
    }
}

fn refusal(origin: &str) -> Error {
    Error::new(Code::Forbidden, format!("the origin {origin:.100} is not allowed")).at("Origin")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(HeaderName, &'static str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    fn origins(named: &[&str]) -> Origins {
        Origins::new(named.iter().map(|it| (*it).to_owned()).collect())
    }

    #[test]
    fn an_answer_names_the_one_origin_it_is_for_and_depends_on_it() {
        let opened = |named: &[&str], origin: &'static str| {
            let mut answer = HeaderMap::new();
            origins(named).open(&headers(&[(header::ORIGIN, origin)]), &mut answer);
            let get = |name: HeaderName| answer.get(name).map(|it| it.to_str().expect("ASCII").to_owned());
            (get(header::ACCESS_CONTROL_ALLOW_ORIGIN), get(header::VARY))
        };
        let (app, vary) = ("https://app.example", Some("Origin".to_owned()));
        assert_eq!(opened(&["https://b.example", app], app), (Some(app.to_owned()), vary.clone()));
        assert_eq!(opened(&["*"], app), (Some(app.to_owned()), vary.clone()), "by its name, not by *");
        assert_eq!(opened(&[app], "https://evil.example"), (None, vary));
        assert_eq!(opened(&[], app), (None, None));
    }

    #[test]
    fn only_pages_that_are_named_are_told_that_cookies_count_and_only_where_they_do() {
        let told = |named: &str, cookies: bool| {
            let mut answer = HeaderMap::new();
            let origins = origins(&[named]).with_cookies(cookies);
            origins.open(&headers(&[(header::ORIGIN, "https://app.example")]), &mut answer);
            answer.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS)
        };
        assert!(told("https://app.example", true));
        assert!(!told("https://app.example", false) && !told("*", true) && !told("https://b.example", true));
    }

    #[test]
    fn a_preflight_is_a_question_of_a_browser_and_no_other_options() {
        let asks = (header::ACCESS_CONTROL_REQUEST_METHOD, "PUT");
        let origin = (header::ORIGIN, "https://app.example");
        assert!(is_preflight(&Method::OPTIONS, &headers(&[asks.clone(), origin.clone()])));
        assert!(!is_preflight(&Method::OPTIONS, &headers(std::slice::from_ref(&origin))));
        assert!(!is_preflight(&Method::OPTIONS, &headers(std::slice::from_ref(&asks))));
        assert!(!is_preflight(&Method::PUT, &headers(&[asks, origin])));
    }
}
