//! Where the instances of a service are:
//!
//! - a host that is an address is the one instance, and `localhost` is 127.0.0.1;
//! - one that `--service-hosts` names has the addresses of that file;
//! - one that begins with `_` is looked up in DNS as SRV (RFC 2782), and then each target's addresses;
//! - any other has the addresses that DNS says (A, or AAAA where there are none), each of them an instance.
//!
//! What DNS says is used for as long as it says so itself (TTL).

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use hickory_resolver::proto::rr::rdata::SRV;

use super::address::{Target, check_written, literal};
use super::hosts::Hosts;

/// How long a DNS server has for its answer, and how often it is asked.
const TIMEOUT: Duration = Duration::from_millis(500);
const ATTEMPTS: usize = 3;
/// Bounds of how long an answer is good for.
const GOOD_FOR: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// How long what the file says is.
const FILE_GOOD_FOR: Duration = Duration::from_secs(1);
/// The most instances of a service, and how many of the names of a service record are looked up at a time.
const MAX_INSTANCES: usize = 64;
const LOOKUPS: usize = 8;

/// Where one instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub address: SocketAddr,
    /// As it is called: for TLS, and in the `Host` header.
    pub host: String,
    /// The lowest ones are called first.
    pub priority: u16,
}

/// Why nothing was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("{0}")]
    NotAllowed(String),
    #[error("{0}")]
    NotFound(String),
}

/// How places are found.
pub struct Discovery {
    dns: Result<TokioResolver, String>,
    hosts: Option<PathBuf>,
}

impl Discovery {
    /// With the system's DNS unless a server is named. An error if the file cannot be used.
    pub fn new(dns_server: Option<SocketAddr>, hosts: Option<PathBuf>) -> Result<Discovery, String> {
        if let Some(path) = &hosts {
            Hosts::read(path)?;
        }
        let builder = match dns_server {
            Some(server) => {
                let mut named = NameServerConfig::udp_and_tcp(server.ip());
                named.connections.iter_mut().for_each(|connection| connection.port = server.port());
                let config = ResolverConfig::from_name_servers(vec![named]);
                Ok(TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()))
            }
            None => TokioResolver::builder_tokio(),
        };
        let dns = builder.and_then(|mut builder| {
            let options = builder.options_mut();
            options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
            (options.timeout, options.attempts) = (TIMEOUT, ATTEMPTS);
            // Each service keeps what is good for it. A name that is not there yet is asked for again.
            options.cache_size = 0;
            builder.build()
        });
        Ok(Discovery { dns: dns.map_err(|error| format!("no DNS: {error}")), hosts })
    }

    /// The places of a service, and how long they are good for.
    pub async fn find(&self, target: &Target) -> Result<(Vec<Place>, Duration), FindError> {
        let host = target.url.host_str().unwrap_or_default();
        let port = target.url.port_or_known_default().unwrap_or(443);
        let https = target.url.scheme() == "https";
        if let Some(address) = literal(host) {
            return Ok((vec![place((address, port), host, 0)], GOOD_FOR.1));
        }
        if let Some(found) = self.in_file(host, port, https).await? {
            return Ok((found, FILE_GOOD_FOR));
        }
        let (found, until) = match host {
            "localhost" => (vec![place((Ipv4Addr::LOCALHOST, port), host, 0)], Instant::now() + GOOD_FOR.1),
            _ if host.starts_with('_') => self.by_service(host, https).await?,
            _ => self.by_name(host, port, 0).await?,
        };
        let mut allowed: Vec<SocketAddr> = found.iter().map(|place| place.address).collect();
        target.reach.keep_allowed(host, &mut allowed).map_err(|error| FindError::NotAllowed(error.to_string()))?;
        let found = each_once(found.into_iter().filter(|place| allowed.contains(&place.address)).collect());
        if found.is_empty() {
            return Err(FindError::NotFound(format!("{host} has no address")));
        }
        Ok((found, until.saturating_duration_since(Instant::now()).clamp(GOOD_FOR.0, GOOD_FOR.1)))
    }

    fn dns(&self) -> Result<&TokioResolver, FindError> {
        self.dns.as_ref().map_err(|why| FindError::NotFound(why.clone()))
    }

    async fn by_name(&self, host: &str, port: u16, priority: u16) -> Result<(Vec<Place>, Instant), FindError> {
        let found = self.dns()?.lookup_ip(host).await.map_err(|error| not_found(host, &error))?;
        Ok((found.iter().map(|address| place((address, port), host, priority)).collect(), found.valid_until()))
    }

    async fn by_service(&self, name: &str, https: bool) -> Result<(Vec<Place>, Instant), FindError> {
        let found = self.dns()?.srv_lookup(name).await.map_err(|error| not_found(name, &error))?;
        let services = found.answers().iter().filter_map(|record| match &record.data {
            RData::SRV(service) => Some(service.clone()),
            _ => None,
        });
        let services: Vec<SRV> = services.take(MAX_INSTANCES).collect();
        let lookups = services.into_iter().map(|service| self.by_target(name, service, https));
        let mut lookups = futures_util::stream::iter(lookups).buffered(LOOKUPS);
        let (mut places, mut until, mut failed) = (Vec::new(), found.valid_until(), None);
        while let Some(found) = lookups.next().await {
            match found {
                Ok((found, good_until)) => {
                    places.extend(found);
                    until = until.min(good_until);
                }
                // One of them may be gone, and the others are there.
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if places.is_empty() => Err(error),
            _ => Ok((places, until)),
        }
    }

    /// Where the target of a service record is.
    async fn by_target(&self, name: &str, service: SRV, https: bool) -> Result<(Vec<Place>, Instant), FindError> {
        let host = service.target.to_ascii().trim_end_matches('.').to_ascii_lowercase();
        if host.is_empty() {
            return Err(FindError::NotFound(format!("{name} says that there is no such service")));
        }
        // A certificate is for the target's name. Whoever can answer in place of DNS has one for a name of their own.
        if https && !is_below(&host, domain(name)) {
            return Err(FindError::NotAllowed(format!(
                "{name} leads to {host:.100}, which is not in {}",
                domain(name)
            )));
        }
        self.by_name(&host, service.port, service.priority).await
    }

    /// The places that the file has for a host.
    async fn in_file(&self, host: &str, port: u16, https: bool) -> Result<Option<Vec<Place>>, FindError> {
        let Some(path) = self.hosts.clone() else { return Ok(None) };
        let read = tokio::task::spawn_blocking(move || Hosts::read(&path)).await;
        let hosts = read.unwrap_or_else(|_| Err("--service-hosts was not read".to_owned()));
        let Some(found) = hosts.map_err(FindError::NotFound)?.find(host, port) else { return Ok(None) };
        for address in &found {
            let checked = check_written(address.ip(), https);
            checked.map_err(|why| FindError::NotAllowed(format!("--service-hosts: {host} is at {address}: {why}")))?;
        }
        Ok(Some(each_once(found.into_iter().map(|address| place(address, host, 0)).collect())))
    }
}

/// Each address once, with its lowest priority; of too many always the same.
fn each_once(mut places: Vec<Place>) -> Vec<Place> {
    places.sort_by(|a, b| (a.address, a.priority, &a.host).cmp(&(b.address, b.priority, &b.host)));
    places.dedup_by_key(|place| place.address);
    places.sort_by_key(|place| place.priority);
    places.truncate(MAX_INSTANCES);
    places
}

/// The domain that a service record belongs to: what comes after the labels that begin with `_`.
fn domain(name: &str) -> &str {
    let mut rest = name;
    while rest.starts_with('_') {
        rest = rest.split_once('.').map_or("", |(_, rest)| rest);
    }
    rest.trim_end_matches('.')
}

fn is_below(host: &str, domain: &str) -> bool {
    !domain.is_empty() && host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn place(address: impl Into<SocketAddr>, host: &str, priority: u16) -> Place {
    Place { address: address.into(), host: host.to_owned(), priority }
}

fn not_found(name: &str, error: &impl std::fmt::Display) -> FindError {
    FindError::NotFound(format!("{name} is not found: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_localhost_and_what_is_in_the_file_need_no_lookup() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let hosts = folder.path().join("hosts");
        std::fs::write(&hosts, "there 10.0.0.1 10.0.0.1:80\nout 8.8.8.8\n").expect("a file");
        let discovery = Discovery { dns: Err("no DNS".to_owned()), hosts: Some(hosts) };
        let private = ["auth", "there", "out"].map(str::to_owned);
        let find = async |url: &str| {
            let target = Target::configured(url, &private).expect("a good URL");
            let found = discovery.find(&target).await.map_err(|error| error.to_string())?;
            Ok::<_, String>(found.0.iter().map(|it| it.address.to_string()).collect::<Vec<_>>())
        };
        let at = |address: &str| Ok(vec![address.to_owned()]);
        assert_eq!(find("http://127.0.0.1:9000/").await, at("127.0.0.1:9000"));
        assert_eq!(find("https://[::1]/").await, at("[::1]:443"));
        assert_eq!(find("http://localhost/").await, at("127.0.0.1:80"));
        assert_eq!(find("http://there/").await, at("10.0.0.1:80"));
        assert_eq!(find("https://out/").await, at("8.8.8.8:443"));
        assert_eq!(find("http://auth/").await, Err("no DNS".to_owned()));
        let why = "--service-hosts: out is at 8.8.8.8:80: http:// is for private addresses alone";
        assert_eq!(find("http://out/").await, Err(why.to_owned()));
    }

    #[test]
    fn a_service_record_leads_by_tls_to_its_own_domain_alone() {
        assert_eq!(domain("_auth._tcp.weft.example"), "weft.example");
        assert_eq!((domain("_auth"), domain("_a._tcp.b.")), ("", "b"));
        for (host, is_in) in [
            ("weft.example", true),
            ("a.b.weft.example", true),
            ("evilweft.example", false),
            ("weft.example.evil", false),
            ("example", false),
        ] {
            assert_eq!(is_below(host, "weft.example"), is_in, "{host}");
        }
        assert!(!is_below("evil.example", ""));
    }

    #[test]
    fn an_address_is_one_instance_however_often_it_is_named_and_too_many_are_always_the_same() {
        let at = |n: u8, priority: u16| place(([10, 0, 0, n], 80), "a", priority);
        assert_eq!(each_once(vec![at(2, 9), at(1, 5), at(2, 1), at(1, 5)]), [at(2, 1), at(1, 5)]);
        let mut all: Vec<_> = (0..100).map(|n| at(n, 0)).collect();
        let some = each_once(all.clone());
        all.reverse();
        assert_eq!((each_once(all), some.len()), (some, MAX_INSTANCES));
    }
}
