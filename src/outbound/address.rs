//! Where a service may be: addresses of the operator's choice, and never one that somebody else put into a name or an answer.
//!
//! - `https://` goes to public addresses. Hosts that `--private-hosts` names may have private ones as well.
//! - `http://` goes to private addresses alone: on the way to others anybody could change the answer.
//! - An address that the operator has written as such (`127.0.0.1`, and `localhost`) is configured by that.
//!
//! What counts is the address that a name resolves to. A connection is opened to the very address that was looked at, so
//! that a name which is bound to another one meanwhile leads nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;

/// Which addresses a service may be at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Public,
    Private,
    Either,
    /// This machine alone.
    Loopback,
    /// The address is in the URL itself.
    Literal,
}

impl Reach {
    pub fn allows(self, address: IpAddr) -> bool {
        let address = canonical(address);
        match self {
            Reach::Public => is_public(address),
            Reach::Private => is_private(address),
            Reach::Either => is_public(address) || is_private(address),
            Reach::Loopback => address.is_loopback(),
            Reach::Literal => true,
        }
    }
}

/// The URL of a service, which was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub url: Url,
    pub reach: Reach,
}

impl Target {
    /// A URL that the operator has configured. `private_hosts` are the names that may have private addresses.
    pub fn configured(text: &str, private_hosts: &[String]) -> Result<Target, String> {
        let url = parse(text)?;
        let https = url.scheme() == "https";
        let host = url.host_str().unwrap_or_default();
        let reach = match literal(host) {
            Some(address) if is_nobodys(address) => {
                return Err(format!("{text:.100}: {address} is no address of a service"));
            }
            Some(address) if !https && is_public(canonical(address)) => return Err(needs_https(text)),
            Some(_) => Reach::Literal,
            None if host == "localhost" => Reach::Loopback,
            None => by_name(host, https, private_hosts).ok_or_else(|| needs_https(text))?,
        };
        Ok(Target { url, reach })
    }

    /// A URL from an answer of a configured service. It may name the host that the answer came from, or one that would do by
    /// its name; addresses and `localhost` are the operator's to write.
    pub fn found(text: &str, from: &Target, private_hosts: &[String]) -> Result<Target, String> {
        let url = parse(text)?;
        let host = url.host_str().unwrap_or_default();
        if Some(host) == from.url.host_str() && url.scheme() == from.url.scheme() {
            return Ok(Target { url, reach: from.reach });
        }
        if host == "localhost" || literal(host).is_some() {
            return Err(format!("{text:.100}: not the host that it was found at, and not a name"));
        }
        let reach = by_name(host, url.scheme() == "https", private_hosts).ok_or_else(|| needs_https(text))?;
        Ok(Target { url, reach })
    }

    /// The host, and the port if that is none of the usual ones.
    pub fn label(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        self.url.port().map_or(host.to_owned(), |port| format!("{host}:{port}"))
    }
}

fn parse(text: &str) -> Result<Url, String> {
    let url =
        Url::parse(text).map_err(|_| format!("must be a URL such as https://auth.example/keys, not {text:.100}"))?;
    if !matches!(url.scheme(), "https" | "http") || !url.has_host() {
        return Err(format!("must begin with https:// or http://, not {text:.100}"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must have no user and no password in it".to_owned());
    }
    if url.fragment().is_some() {
        return Err(format!("must have no fragment: {text:.100}"));
    }
    Ok(url)
}

fn needs_https(text: &str) -> String {
    format!("{text:.100}: http:// is for private addresses alone: use https://, or name the host in --private-hosts")
}

/// An address in place of a host's name; in URLs those of IPv6 are in brackets.
pub fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Why a service cannot be at an address that the operator has written, if it cannot.
pub fn check_written(address: IpAddr, https: bool) -> Result<(), &'static str> {
    if is_nobodys(address) {
        return Err("that is no address of a service");
    }
    if !https && is_public(canonical(address)) {
        return Err("http:// is for private addresses alone");
    }
    Ok(())
}

/// Unspecified and multicast ones.
fn is_nobodys(address: IpAddr) -> bool {
    let address = canonical(address);
    address.is_unspecified() || address.is_multicast()
}

/// What a host that has a name may be; `None` if it must have `https`.
fn by_name(host: &str, https: bool, private_hosts: &[String]) -> Option<Reach> {
    let private = private_hosts.iter().any(|named| match named.strip_prefix("*.") {
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.') && rest.len() > 1),
        None => host.eq_ignore_ascii_case(named),
    });
    match (private, https) {
        (true, true) => Some(Reach::Either),
        (true, false) => Some(Reach::Private),
        (false, true) => Some(Reach::Public),
        (false, false) => None,
    }
}

/// An IPv4 address that is written as one of IPv6 is what it stands for.
fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return v4.into();
    }
    match v6.segments() {
        // NAT64 (RFC 6052).
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
            Ipv4Addr::new(a, b, c, d).into()
        }
        _ => address,
    }
}

/// Addresses of a network of one's own. Link-local ones are not among them: there, clouds answer with secrets.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || is_shared(v4),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local(),
    }
}

/// RFC 6598.
fn is_shared(address: Ipv4Addr) -> bool {
    let [a, b, ..] = address.octets();
    a == 100 && (64..128).contains(&b)
}

/// Addresses that are routed on the internet (the registries of RFC 6890).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let special = a == 0
                || a >= 224
                || v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_documentation()
                || is_shared(v4)
                || (a, b, c) == (192, 0, 0)
                || (a, b, c) == (192, 88, 99)
                || (a == 198 && matches!(b, 18 | 19));
            !special
        }
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

/// Global unicast, without Teredo, documentation and 6to4: the first and the last of them carry addresses within.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    (0x2000..0x4000).contains(&first) && !(first == 0x2001 && matches!(second, 0 | 0xdb8)) && first != 0x2002
}

/// A name that leads to no address that is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host} resolves to {address}, which is {what}: see --private-hosts")]
pub struct NotAllowed {
    host: String,
    address: IpAddr,
    what: &'static str,
}

impl Reach {
    /// Of what a name resolves to, the addresses that are allowed; an error if it resolves to others alone.
    pub fn keep_allowed(self, host: &str, found: &mut Vec<SocketAddr>) -> Result<(), NotAllowed> {
        let first = found.first().map(SocketAddr::ip);
        found.retain(|it| self.allows(it.ip()));
        match first {
            Some(address) if found.is_empty() => {
                let what = if is_public(canonical(address)) { "public" } else { "not public" };
                Err(NotAllowed { host: host.to_owned(), address, what })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn private_and_special_addresses_are_not_public_however_they_are_written() {
        for text in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "192.0.2.1",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
        ] {
            assert!(!Reach::Public.allows(address(text)), "{text}");
        }
        for text in ["1.1.1.1", "100.63.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8"] {
            assert!(Reach::Public.allows(address(text)) && !Reach::Private.allows(address(text)), "{text}");
        }
        for text in ["10.1.2.3", "127.0.0.1", "::1", "fd00::1", "100.64.0.1", "::ffff:192.168.0.1"] {
            assert!(Reach::Private.allows(address(text)) && Reach::Either.allows(address(text)), "{text}");
        }
        for text in ["169.254.169.254", "fe80::1", "0.0.0.0"] {
            assert!(!Reach::Either.allows(address(text)), "link-local ones are nobody's own: {text}");
        }
        assert!(Reach::Loopback.allows(address("::1")) && !Reach::Loopback.allows(address("10.0.0.1")));
    }

    #[test]
    fn a_configured_url_says_by_itself_where_it_may_lead() {
        let hosts = ["auth".to_owned(), "*.svc.local".to_owned()];
        let reach = |text: &str| Target::configured(text, &hosts).map(|target| target.reach);
        for (text, expected) in [
            ("https://auth.example/keys", Reach::Public),
            ("http://127.0.0.1:9000/keys", Reach::Literal),
            ("http://[::1]/keys", Reach::Literal),
            // The same address in another notation.
            ("http://0x7f.1/keys", Reach::Literal),
            ("http://localhost:9000/", Reach::Loopback),
            ("http://auth/keys", Reach::Private),
            ("https://auth/keys", Reach::Either),
            ("http://a.b.svc.local/keys", Reach::Private),
        ] {
            assert_eq!(reach(text), Ok(expected), "{text}");
        }
        for text in [
            "http://auth.example/keys",
            "http://8.8.8.8/",
            "http://svc.local/",
            "http://evilsvc.local/",
            "ftp://auth/",
            "https://user:pw@auth.example/",
            "https://auth.example/#x",
            "keys",
            "",
            "http://0.0.0.0/",
            "https://",
        ] {
            assert!(reach(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_an_answer_names_is_no_address_that_nobody_configured() {
        let from = Target::configured("http://127.0.0.1:9000/.well-known/openid-configuration", &[]).expect("good");
        let found = |text: &str| Target::found(text, &from, &[]).map(|target| target.reach);
        assert_eq!(found("http://127.0.0.1:9001/keys"), Ok(Reach::Literal));
        assert_eq!(found("https://keys.example/"), Ok(Reach::Public));
        for text in ["http://169.254.169.254/", "http://localhost/", "https://10.0.0.1/", "http://keys.example/"] {
            assert!(found(text).is_err(), "{text}");
        }
    }

    #[test]
    fn of_several_addresses_only_those_that_are_allowed_are_used() {
        let parse = |list: &[&str]| list.iter().map(|it| it.parse().expect("an address")).collect::<Vec<SocketAddr>>();
        let mut found = parse(&["169.254.169.254:80", "10.0.0.1:80", "8.8.8.8:80"]);
        assert_eq!(Reach::Private.keep_allowed("auth", &mut found), Ok(()));
        assert_eq!(found, parse(&["10.0.0.1:80"]));
        let why = Reach::Public.keep_allowed("auth.example", &mut found).expect_err("a private one").to_string();
        assert_eq!(why, "auth.example resolves to 10.0.0.1, which is not public: see --private-hosts");
        assert_eq!(Reach::Public.keep_allowed("auth.example", &mut Vec::new()), Ok(()), "that is another matter");
    }
}
