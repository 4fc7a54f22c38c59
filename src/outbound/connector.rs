//! Connections to instances. Each client leads to one address, the very one that was looked at: a name is not resolved once more.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, Url};
use rustls::ClientConfig;
use rustls_platform_verifier::BuilderVerifierExt;

use super::discovery::Place;

/// Connections that are kept open for the next calls.
const IDLE_CONNECTIONS: usize = 4;
const IDLE_FOR: Duration = Duration::from_secs(30);

/// Makes clients.
#[derive(Default)]
pub struct Connector {
    /// With the certificates that the system trusts. They are many, and are read once for all clients.
    tls: OnceLock<Result<ClientConfig, String>>,
}

impl Connector {
    /// An error if there can be no connection by such a URL.
    pub fn check(&self, url: &Url) -> Result<(), String> {
        self.builder(url).map(drop)
    }

    fn builder(&self, url: &Url) -> Result<reqwest::ClientBuilder, String> {
        match url.scheme() {
            "https" => {
                let tls = self.tls.get_or_init(|| trusting().map_err(|error| format!("no TLS: {error}"))).clone()?;
                Ok(Client::builder().tls_backend_preconfigured(tls))
            }
            // It trusts nobody's certificate, and needs none.
            _ => Ok(Client::builder().tls_certs_only([])),
        }
    }

    /// The URL of one of a service's instances, and a client for it.
    pub fn connect(&self, service: &Url, place: &Place, patience: Duration) -> Result<(Url, Client), String> {
        let mut url = service.clone();
        let fits = url.set_host(Some(&place.host)).is_ok() && url.set_port(Some(place.address.port())).is_ok();
        if !fits {
            return Err(format!("{:.100} is no host", place.host));
        }
        let builder = self
            .builder(&url)?
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .retry(reqwest::retry::never())
            .referer(false)
            .user_agent(concat!("weft/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Fixed(place.address))
            .connect_timeout(patience)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_FOR);
        Ok((url, builder.build().map_err(|error| format!("no client: {error}"))?))
    }
}

fn trusting() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_platform_verifier()?.with_no_client_auth())
}

/// Any name leads to this address.
struct Fixed(SocketAddr);

impl Resolve for Fixed {
    fn resolve(&self, _: Name) -> Resolving {
        let address = self.0;
        Box::pin(async move { Ok(Box::new(std::iter::once(address)) as Addrs) })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_name_leads_to_the_address_that_was_looked_at_whatever_else_it_would_resolve_to() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        // The name of this machine, and one of nobody.
        for host in ["localhost", "auth.invalid"] {
            let service: Url = format!("http://{host}:1/keys").parse().expect("a URL");
            let place = Place { address, host: host.to_owned(), priority: 0 };
            let (url, client) = Connector::default().connect(&service, &place, Duration::from_secs(60)).expect("good");
            assert_eq!(url.as_str(), format!("http://{host}:{}/keys", address.port()));
            let answer = async {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut read = [0; 1024];
                let n = stream.read(&mut read).await.expect("a request");
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.expect("an answer");
                String::from_utf8_lossy(&read[..n]).into_owned()
            };
            let (answered, asked) = tokio::join!(client.get(url).send(), answer);
            assert!(answered.is_ok_and(|answer| answer.status() == 200));
            assert!(asked.contains(&format!("host: {host}:{}", address.port())), "{asked}");
        }
    }

    #[test]
    fn only_what_is_a_host_can_be_called() {
        let service: Url = "https://auth.example/keys".parse().expect("a URL");
        let place = |host: &str| Place { address: ([10, 0, 0, 1], 443).into(), host: host.to_owned(), priority: 0 };
        let connect = |host: &str| Connector::default().connect(&service, &place(host), Duration::from_secs(1));
        assert_eq!(connect("a/b").expect_err("no host"), "a/b is no host");
        assert_eq!(connect("auth-1.example").expect("a host").0.as_str(), "https://auth-1.example/keys");
    }
}
