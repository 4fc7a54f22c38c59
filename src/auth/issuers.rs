//! Issuers whose keys are fetched: from the address of a set of keys (JWKS), or from the issuer's own description of itself
//! (OpenID Connect Discovery), which names that address.
//!
//! - A token is verified with what is in memory. One task fetches the set anew before it ages.
//! - A `kid` that the set does not have may be a new key: the set is fetched at once, at most every 30 s whoever asks.
//! - The last good set stays in use for as long as nothing better comes: an outage, or a page of HTML in its place, locks
//!   nobody out. What cannot be verified without a fetch that fails is `unavailable`, and no verdict on the token.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use reqwest::Url;
use reqwest::header::{CACHE_CONTROL, HeaderMap};
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::jwks::KeySet;
use crate::clock;
use crate::outbound::address::Target;
use crate::outbound::{CallError, Outbound, Request, Service, ServiceConfig};
use crate::protocol::error::{Code, Error};

/// Where an issuer describes itself, below its own address.
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// For one fetch.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest set, or description.
const MAX_BYTES: usize = 256 << 10;
/// How often the set is fetched for a `kid` that it does not have, and again after a failure.
const UNKNOWN_EVERY: Duration = Duration::from_secs(30);
/// How long whoever shows such a `kid` waits.
const WAIT: Duration = Duration::from_secs(2);
/// When the set is fetched anew if it does not say how long it is good for, and within which bounds it may say that.
const REFRESH: Duration = Duration::from_secs(300);
const REFRESH_BOUNDS: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3_600));
/// When it is tried again as long as there never was a set.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// An issuer as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerConfig {
    /// The `iss` of its tokens; without it, whatever a token says.
    pub issuer: Option<String>,
    /// Of its keys, or of its description.
    pub target: Target,
    private_hosts: Vec<String>,
}

impl IssuerConfig {
    /// Reads `URL` or `ISSUER=URL`. `default_issuer` is that of a URL alone which does not say it.
    pub fn parse(text: &str, default_issuer: Option<&str>, private_hosts: &[String]) -> Result<IssuerConfig, String> {
        let (issuer, url) = match text.find("=https://").or_else(|| text.find("=http://")) {
            Some(at) if !text[..at].contains('?') => (Some(&text[..at]), &text[at + 1..]),
            _ => (None, text),
        };
        let target = Target::configured(url, private_hosts)?;
        let described = url.strip_suffix(DISCOVERY);
        let issuer = issuer.or(described).or(default_issuer).map(str::to_owned);
        Ok(IssuerConfig { issuer, target, private_hosts: private_hosts.to_vec() })
    }

    fn describes_itself(&self) -> bool {
        self.target.url.path().ends_with(DISCOVERY)
    }
}

/// An issuer's description of itself, as far as Weft reads it.
#[derive(Deserialize)]
struct Description {
    issuer: String,
    jwks_uri: String,
}

pub struct Issuer {
    config: IssuerConfig,
    outbound: Arc<Outbound>,
    /// Who has the keys, or the description.
    service: Arc<Service>,
    /// Who has the keys, by what the description says.
    described: Mutex<Option<(Url, Arc<Service>)>>,
    keys: ArcSwapOption<KeySet>,
    fetches: Mutex<Fetches>,
    /// Somebody needs a fetch now.
    wanted: Notify,
    /// How many fetches are over.
    over: watch::Sender<u64>,
}

#[derive(Default)]
struct Fetches {
    /// How many have begun.
    begun: u64,
    /// When one was asked for because of a `kid` that is not there, and which it is.
    for_unknown: Option<(Instant, u64)>,
    /// Why the last one brought nothing, and when to ask again.
    failure: Option<(String, Duration)>,
}

/// What is known of a `kid`.
enum Looked {
    Known(Arc<KeySet>),
    Refused(Error),
    /// A fetch that is not over may bring it.
    Fetching,
}

impl Issuer {
    pub fn new(config: IssuerConfig, outbound: Arc<Outbound>) -> Result<Arc<Issuer>, String> {
        let name = if config.describes_itself() { "oidc" } else { "jwks" };
        let service = service(name, &config.target, &outbound)?;
        Ok(Arc::new(Issuer {
            config,
            outbound,
            service,
            described: Mutex::default(),
            keys: ArcSwapOption::empty(),
            fetches: Mutex::default(),
            wanted: Notify::new(),
            over: watch::channel(0).0,
        }))
    }

    /// The `iss` of its tokens.
    pub fn name(&self) -> Option<&str> {
        self.config.issuer.as_deref()
    }

    /// Whom it is fetched from, as far as that is known.
    pub fn services(&self) -> Vec<Arc<Service>> {
        let described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        let described = described.as_ref().map(|(_, service)| service.clone());
        std::iter::once(self.service.clone()).chain(described).collect()
    }

    fn fetches(&self) -> MutexGuard<'_, Fetches> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The set that has this key, if that can be said without waiting.
    pub fn keys_now(&self, kid: Option<&str>) -> Option<Result<Arc<KeySet>, Error>> {
        match self.look(kid, Instant::now()) {
            Looked::Known(keys) => Some(Ok(keys)),
            Looked::Refused(error) => Some(Err(error)),
            Looked::Fetching => None,
        }
    }

    /// The set that has this key; waits for a fetch that may bring it, but not for long.
    pub async fn keys(&self, kid: Option<&str>) -> Result<Arc<KeySet>, Error> {
        let until = Instant::now() + WAIT;
        let mut over = self.over.subscribe();
        loop {
            if let Some(known) = self.keys_now(kid) {
                return known;
            }
            if tokio::time::timeout_at(until, over.changed()).await.is_err() {
                return Err(unavailable("no answer came in time", FIRST_RETRY));
            }
        }
    }

    fn look(&self, kid: Option<&str>, now: Instant) -> Looked {
        if let Some(keys) = self.keys.load_full().filter(|keys| keys.has(kid)) {
            return Looked::Known(keys);
        }

        let mut fetches = self.fetches();
        let over = *self.over.borrow();
        // Once more: a fetch that was over only by now may have brought it.
        let keys = self.keys.load_full();
        let has_keys = keys.is_some();
        if let Some(keys) = keys.filter(|keys| keys.has(kid)) {
            return Looked::Known(keys);
        }
        // The first fetch is made for nobody, and is waited for by everybody.
        if !has_keys && fetches.begun > over {
            return Looked::Fetching;
        }
        if fetches.for_unknown.is_none_or(|(asked, _)| now >= asked + UNKNOWN_EVERY) {
            fetches.for_unknown = Some((now, fetches.begun + 1));
            self.wanted.notify_one();
        }
        match (fetches.for_unknown, &fetches.failure) {
            (Some((_, wanted)), _) if over < wanted => Looked::Fetching,
            (_, Some((why, retry_after))) => Looked::Refused(unavailable(why, *retry_after)),
            (_, None) => Looked::Refused(unknown(kid)),
        }
    }

    /// Fetches the set, and fetches it anew before it ages, for as long as the server lasts.
    pub async fn keep_fresh(self: Arc<Issuer>) {
        let mut failed = 0;
        loop {
            let this_one = {
                let mut fetches = self.fetches();
                fetches.begun += 1;
                fetches.begun
            };
            let fetched = self.fetch().await;
            let pause = match &fetched {
                Ok((_, good_for)) => {
                    failed = 0;
                    good_for.mul_f64(0.8 + clock::random_share() / 10.0)
                }
                Err(_) if self.keys.load().is_some() => UNKNOWN_EVERY,
                Err(_) => {
                    failed += 1;
                    (FIRST_RETRY * 2u32.pow(failed.min(6) - 1)).min(UNKNOWN_EVERY)
                }
            };
            let failure = fetched.as_ref().err().map(|error| (error.to_string(), error.retry_after()));
            match fetched {
                Ok((keys, _)) => self.keys.store(Some(Arc::new(keys))),
                Err(error) => {
                    tracing::warn!(%error, url = %self.config.target.url, "an issuer's keys were not fetched")
                }
            }
            self.fetches().failure = failure;
            self.over.send_replace(this_one);

            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    /// The set as it is now, and how long it is good for.
    async fn fetch(&self) -> Result<(KeySet, Duration), CallError> {
        let service = if self.config.describes_itself() { self.described().await? } else { self.service.clone() };
        service.call(Request::Get, |answer| Ok((KeySet::parse(&answer.body)?, good_for(&answer.headers)))).await
    }

    /// Who has the keys, as the issuer describes itself now; or as it did, if it does not answer.
    async fn described(&self) -> Result<Arc<Service>, CallError> {
        let read = |body: &[u8]| self.read_description(body);
        let asked = self.service.call(Request::Get, |answer| read(&answer.body)).await;
        let mut described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        match (asked, &*described) {
            (Ok(target), Some((url, service))) if target.url == *url => Ok(service.clone()),
            (Ok(target), _) => {
                let service = service("jwks", &target, &self.outbound).map_err(CallError::Unusable)?;
                *described = Some((target.url, service.clone()));
                Ok(service)
            }
            (Err(_), Some((_, service))) => Ok(service.clone()),
            (Err(error), None) => Err(error),
        }
    }

    /// Where the keys are. A description is only that of the issuer whose name leads to it (OpenID Connect Discovery 1.0,
    /// section 4.3).
    fn read_description(&self, body: &[u8]) -> Result<Target, String> {
        let description: Description = serde_json::from_slice(body)
            .map_err(|_| "it is no description of an issuer (OpenID Connect Discovery)".to_owned())?;
        if Some(&description.issuer) != self.config.issuer.as_ref() {
            return Err(format!("it describes the issuer {:.100}", description.issuer));
        }
        Target::found(&description.jwks_uri, &self.config.target, &self.config.private_hosts)
            .map_err(|why| format!("jwks_uri {why}"))
    }
}

fn service(name: &'static str, target: &Target, outbound: &Arc<Outbound>) -> Result<Arc<Service>, String> {
    let config = ServiceConfig {
        name,
        label: target.label(),
        target: target.clone(),
        timeout: TIMEOUT,
        deadline: TIMEOUT,
        // What fails is asked again later: how often is bounded as a whole.
        attempts: 1,
        max_calls: 1,
        max_bytes: MAX_BYTES,
    };
    Service::new(config, outbound.clone())
}

/// How long an answer is good for, as it says itself, within bounds.
fn good_for(headers: &HeaderMap) -> Duration {
    let directives = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let max_age = directives
        .flat_map(|value| value.split(','))
        .find_map(|directive| directive.trim().strip_prefix("max-age=")?.parse().ok().map(Duration::from_secs));
    max_age.unwrap_or(REFRESH).clamp(REFRESH_BOUNDS.0, REFRESH_BOUNDS.1)
}

fn unavailable(why: &str, retry_after: Duration) -> Error {
    let why = format!("the token cannot be verified now: its issuer's keys were not fetched: {why}");
    Error::new(Code::Unavailable, why).retry_after(retry_after.as_millis() as u64)
}

fn unknown(kid: Option<&str>) -> Error {
    let kid = kid.unwrap_or_default();
    Error::new(Code::Unauthenticated, format!("the token's key (`kid` {kid:.60}) is none of its issuer's")).at("token")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_is_named_beside_its_keys_or_by_where_it_describes_itself() {
        let parse = |text: &str| {
            let config = IssuerConfig::parse(text, Some("default"), &[]).expect(text);
            (
                config.issuer.expect("an issuer"),
                config.target.url.to_string(),
                config.target.url.path().ends_with(DISCOVERY),
            )
        };
        let own = |issuer: &str, url: &str, described| (issuer.to_owned(), url.to_owned(), described);
        assert_eq!(parse("https://a.example/keys"), own("default", "https://a.example/keys", false));
        assert_eq!(parse("us=https://a.example/keys"), own("us", "https://a.example/keys", false));
        assert_eq!(
            parse("https://a.example=https://a.example/keys?u=https://b"),
            own("https://a.example", "https://a.example/keys?u=https://b", false)
        );
        assert_eq!(parse("https://a.example/keys?u=https://b").0, "default");
        let described = format!("https://a.example/t{DISCOVERY}");
        assert_eq!(parse(&described), own("https://a.example/t", &described, true));
        assert!(IssuerConfig::parse("keys", None, &[]).is_err());
    }

    #[test]
    fn a_set_says_how_long_it_is_good_for_within_bounds() {
        let with = |value: &'static str| {
            good_for(&HeaderMap::from_iter([(CACHE_CONTROL, reqwest::header::HeaderValue::from_static(value))]))
                .as_secs()
        };
        assert_eq!(with("public, max-age=600, must-revalidate"), 600);
        assert_eq!(
            (with("max-age=0"), with("max-age=999999999"), with("no-store"), with("max-age=x")),
            (30, 3_600, 300, 300)
        );
        assert_eq!(good_for(&HeaderMap::new()), REFRESH);
    }
}
