//! What a request shows to be let in: a token or a session in its header, or a session in a cookie.
//!
//! A browser sends cookies with whatever any page asks of the server. So a cookie counts only for a page of the server's own
//! host, or of an origin that `--allow-origin` names: `*` names none.

use warp::http::{HeaderMap, header};

use super::http::request::header_text;
use super::origin::Origins;
use crate::auth::{Authenticator, Credential};
use crate::protocol::error::{Code, Error};

/// The cookie that has a session.
const COOKIE: &str = "weft_session";

/// The credential of `Authorization: Bearer …` or `Authorization: Session …`.
pub fn authorization(headers: &HeaderMap) -> Result<Credential<'_>, Error> {
    let refuse = |why| Error::new(Code::Unauthenticated, why).at("Authorization");
    let value = header_text(headers, "Authorization")?.ok_or_else(|| refuse("there is no Authorization header"))?;
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(Credential::token(token.trim())),
        Some((scheme, session)) if scheme.eq_ignore_ascii_case("session") => Ok(Credential::session(session.trim())),
        _ => Err(refuse("the Authorization header is neither Bearer <token> nor Session <session>")),
    }
}

/// The session of the cookie, if sessions let anybody in, there is one, and the page may use it.
pub fn cookie_that_counts<'a>(
    auth: &Authenticator,
    headers: &'a HeaderMap,
    origins: &Origins,
) -> Option<Credential<'a>> {
    auth.takes_sessions().then(|| cookie(headers, origins)).flatten()
}

fn cookie<'a>(headers: &'a HeaderMap, origins: &Origins) -> Option<Credential<'a>> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let (_, session) = pairs.find(|(name, _)| *name == COOKIE)?;
    let may = origins.may_use_cookies(headers);
    may.then(|| Credential::session(session.trim_matches('"')))
}

#[cfg(test)]
mod tests {
    use warp::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    fn text(credential: Credential<'_>) -> String {
        match credential {
            Credential::Token(text) => format!("token {text}"),
            Credential::Session(text) => format!("session {text}"),
        }
    }

    #[test]
    fn a_header_has_a_token_or_a_session() {
        let shown = |value| authorization(&headers(&[("authorization", value)])).map(text).map_err(|error| error.code);
        assert_eq!(shown("Bearer abc"), Ok("token abc".to_owned()));
        assert_eq!(shown("bearer  abc "), Ok("token abc".to_owned()));
        assert_eq!(shown("Session s1"), Ok("session s1".to_owned()));
        assert_eq!(shown("Basic abc"), Err(Code::Unauthenticated));
        assert_eq!(shown("abc"), Err(Code::Unauthenticated));
        assert!(authorization(&HeaderMap::new()).is_err());
    }

    #[test]
    fn a_cookie_counts_only_for_pages_that_may_use_it() {
        let shown = |named: &str, list: &[(&'static str, &'static str)]| {
            let mut all = headers(list);
            all.append("cookie", HeaderValue::from_static("a=b; weft_session=s1; c=d"));
            all.append("host", HeaderValue::from_static("weft.example"));
            cookie(&all, &Origins::new(vec![named.to_owned()])).map(text)
        };
        let s1 = Some("session s1".to_owned());
        let (own, app) = (("origin", "https://weft.example"), ("origin", "https://app.example"));
        assert_eq!(shown("https://app.example", &[own]), s1);
        assert_eq!(shown("https://app.example", &[app]), s1);
        assert_eq!(shown("https://app.example", &[("origin", "https://evil.example")]), None);
        assert_eq!(shown("*", &[app]), None, "everybody is nobody by name");
        assert_eq!(shown("*", &[own]), s1);
        assert_eq!(shown("https://app.example", &[]), None, "no browser says so little");
        // Pages of the server's own ask without an origin, and a page cannot write this header.
        assert_eq!(shown("https://app.example", &[("sec-fetch-site", "same-origin")]), s1);
        for site in ["same-site", "cross-site", "none"] {
            assert_eq!(shown("https://app.example", &[("sec-fetch-site", site)]), None, "{site}");
        }
        assert_eq!(shown("https://app.example", &[("origin", "null"), ("sec-fetch-site", "same-origin")]), None);
    }
}
