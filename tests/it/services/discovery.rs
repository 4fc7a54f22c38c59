//! Where services are: by DNS, by a file, and never where they must not be.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::auth_service::{AuthService, Behaviour, INTROSPECT, KEYS, Key};
use crate::support::dns::{Dns, Records};
use crate::support::{LogKind, SECRET, Server, eventually, weft};

const FIRST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Two instances of a service, at one port of two addresses.
async fn two() -> (AuthService, AuthService) {
    let first = AuthService::start().await;
    let second = AuthService::start_at((SECOND, first.address.port()).into()).await;
    (first, second)
}

/// A server that asks an auth service by this URL.
async fn server(url: &str, dns: &Dns, more: &[&str]) -> Server {
    let dns = dns.address.to_string();
    let mut arguments =
        vec!["--introspect-url", url, "--dns-server", &dns, "--private-hosts", "*.weft.test", "--rate-user", "0"];
    arguments.extend(more);
    let server = Server::start_with(LogKind::embedded(), &arguments);
    server.ready().await;
    server
}

async fn status(server: &Server, session: &str) -> u16 {
    let request = reqwest::Client::new().get(format!("{}/v1/threads", server.url));
    request.header("Authorization", format!("Session {session}")).send().await.unwrap().status().as_u16()
}

async fn dependency(server: &Server) -> Value {
    let (status, ready) = server.http("GET", "/readyz", "x", None).await;
    assert_eq!(status, 200, "{ready}");
    ready["dependencies"][0].clone()
}

#[tokio::test]
async fn a_name_is_followed_to_another_address_when_its_time_is_over_and_not_before() {
    let (dns, (first, second)) = (Dns::start().await, two().await);
    dns.set("auth.weft.test", Records::A(3, vec![FIRST]));
    let server = server(&format!("http://auth.weft.test:{}{INTROSPECT}", first.address.port()), &dns, &[]).await;
    first.log_in("s-0", "ada");
    let begin = Instant::now();
    assert_eq!(status(&server, "s-0").await, 200);
    dns.set("auth.weft.test", Records::A(1, vec![SECOND]));
    let mut n = 0;
    let mut gets_in = async || {
        n += 1;
        let session = format!("s-{n}");
        [&first, &second].iter().for_each(|it| it.log_in(&session, "ada"));
        assert_eq!(status(&server, &session).await, 200, "{session}");
    };
    eventually("calls go to the other address", async || {
        gets_in().await;
        second.asked(INTROSPECT) > 0
    })
    .await;
    assert!(begin.elapsed() >= Duration::from_secs(3), "it was good for 3 s: {:?}", begin.elapsed());

    // Where it was is good enough while nobody says where it is.
    dns.fall_silent();
    let asked = dns.asked("auth.weft.test");
    eventually("it is looked up again, in vain", async || {
        gets_in().await;
        dns.asked("auth.weft.test") > asked
    })
    .await;
    gets_in().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_fails_is_left_out_and_comes_back_and_nobody_is_refused_meanwhile() {
    let (dns, (first, mut second)) = (Dns::start().await, two().await);
    dns.set("auth.weft.test", Records::A(300, vec![FIRST, SECOND]));
    let server = server(&format!("http://auth.weft.test:{}{INTROSPECT}", first.address.port()), &dns, &[]).await;
    let mut n = 0;
    let mut all_get_in = async |calls: usize| {
        for _ in 0..calls {
            n += 1;
            [&first, &second].iter().for_each(|it| it.log_in(&format!("s-{n}"), "ada"));
            assert_eq!(status(&server, &format!("s-{n}")).await, 200, "s-{n}");
        }
    };
    all_get_in(20).await;
    assert_eq!((first.asked(INTROSPECT), second.asked(INTROSPECT)), (10, 10), "each has its turns");

    second.gone().await;
    all_get_in_without(&server, &first, 40).await;
    let now = dependency(&server).await;
    let breakers: Vec<_> = now["instances"].as_array().unwrap().iter().map(|it| it["breaker"].clone()).collect();
    assert_eq!((&now["breaker"], breakers.len()), (&"closed".into(), 2), "{now}");
    assert!(breakers.iter().any(|it| it != "closed"), "{now}");
    assert_eq!(server.metric("weft_outbound_instances").await, 2.0);

    second.back().await;
    let before = second.asked(INTROSPECT);
    let mut n = 1_000;
    eventually("it is called again", async || {
        n += 1;
        [&first, &second].iter().for_each(|it| it.log_in(&format!("s-{n}"), "ada"));
        assert_eq!(status(&server, &format!("s-{n}")).await, 200);
        second.asked(INTROSPECT) > before + 1
    })
    .await;
}

/// Sessions that only one instance knows get in.
async fn all_get_in_without(server: &Server, there: &AuthService, calls: usize) {
    for n in 0..calls {
        let session = format!("without-{n}");
        there.log_in(&session, "ada");
        assert_eq!(status(server, &session).await, 200, "{session}");
    }
}

#[tokio::test]
async fn a_service_record_has_hosts_and_ports_and_the_lowest_priority_is_called() {
    let (dns, first, second) = (Dns::start().await, AuthService::start().await, AuthService::start().await);
    let (near, far) = (first.address.port(), second.address.port());
    dns.set("_auth._tcp.weft.test", Records::Srv(300, vec![(20, far, "b.weft.test"), (10, near, "a.weft.test")]));
    dns.set("a.weft.test", Records::A(300, vec![FIRST]));
    dns.set("b.weft.test", Records::A(300, vec![FIRST]));
    let server = server(&format!("http://_auth._tcp.weft.test{INTROSPECT}"), &dns, &[]).await;
    for n in 0..5 {
        first.log_in(&format!("s-{n}"), "ada");
        assert_eq!(status(&server, &format!("s-{n}")).await, 200);
    }
    assert_eq!((first.asked(INTROSPECT), second.asked(INTROSPECT)), (5, 0));
    first.set(INTROSPECT, Behaviour::HangUp);
    let mut n = 0;
    eventually("the other one is called", async || {
        n += 1;
        second.log_in(&format!("t-{n}"), "ada");
        status(&server, &format!("t-{n}")).await == 200
    })
    .await;
}

#[tokio::test]
async fn a_file_says_where_a_service_is_and_is_read_again_when_it_has_changed() {
    let (dns, (first, second)) = (Dns::start().await, two().await);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("services");
    let port = first.address.port();
    std::fs::write(&file, format!("# the tests' own\nauth.weft.test 127.0.0.1:{port}\n")).unwrap();
    let hosts = file.to_str().unwrap();
    let server = server(&format!("http://auth.weft.test{INTROSPECT}"), &dns, &["--service-hosts", hosts]).await;
    first.log_in("s", "ada");
    assert_eq!(status(&server, "s").await, 200);

    std::fs::write(&file, format!("auth.weft.test {SECOND}:{port}\n")).unwrap();
    let mut n = 0;
    eventually("calls go to the other address", async || {
        n += 1;
        [&first, &second].iter().for_each(|it| it.log_in(&format!("s-{n}"), "ada"));
        assert_eq!(status(&server, &format!("s-{n}")).await, 200);
        second.asked(INTROSPECT) > 0
    })
    .await;
    assert_eq!(dns.asked("auth.weft.test"), 0, "the file goes before DNS");
}

#[tokio::test]
async fn a_name_that_is_not_there_yet_lets_nobody_in_and_is_found_once_it_is() {
    let (dns, service) = (Dns::start().await, AuthService::start().await);
    let server = server(&format!("http://auth.weft.test:{}{INTROSPECT}", service.address.port()), &dns, &[]).await;
    service.log_in("s", "ada");
    assert_eq!(status(&server, "s").await, 503);
    let now = dependency(&server).await;
    let why = now["last_error"].as_str().unwrap_or_default();
    assert!(now["ok"] == false && why.starts_with("auth.weft.test is not found"), "{now}");

    dns.set("auth.weft.test", Records::A(300, vec![FIRST]));
    eventually("it is found", async || status(&server, "s").await == 200).await;
    let now = dependency(&server).await;
    assert_eq!((&now["ok"], now["instances"].as_array().map(Vec::len)), (&true.into(), Some(1)), "{now}");
}

#[test]
fn a_file_of_services_that_cannot_be_read_is_refused_by_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("services");
    std::fs::write(&file, "auth 10.0.0.1\nkeys elsewhere\n").unwrap();
    let file = file.to_str().unwrap();
    let data = folder.path().join("data");
    let mut command = weft();
    command.args(["serve", "--jwt-secret", SECRET, "--listen", "127.0.0.1:0", "--service-hosts", file, "--data"]);
    let (code, _, said) = super::run_command(command.arg(data));
    assert_eq!(
        (code, said.trim_end()),
        (2, &*format!("weft: --service-hosts {file}: line 2: elsewhere is no address"))
    );
}

#[tokio::test]
async fn a_service_record_that_leads_to_another_domain_is_not_followed_by_tls() {
    let (dns, inside) = (Dns::start().await, AuthService::start().await);
    let port = inside.address.port();
    dns.set("_keys._tcp.public.test", Records::Srv(300, vec![(1, port, "keys.elsewhere.test")]));
    dns.set("keys.elsewhere.test", Records::A(300, vec![FIRST]));
    let (url, dns_server) = (format!("https://_keys._tcp.public.test{KEYS}"), dns.address.to_string());
    let arguments = ["--jwks-url", &url, "--dns-server", &dns_server, "--private-hosts", "*.public.test"];
    let server = Server::start_with(LogKind::embedded(), &arguments);
    server.ready().await;
    eventually("it was looked up", async || {
        let error = dependency(&server).await["last_error"].as_str().unwrap_or_default().to_owned();
        error == "_keys._tcp.public.test leads to keys.elsewhere.test, which is not in public.test"
    })
    .await;
    assert_eq!((dns.asked("keys.elsewhere.test"), inside.connections()), (0, 0));
}

#[tokio::test]
async fn a_name_that_is_bound_to_an_address_within_leads_nowhere() {
    let (dns, inside) = (Dns::start().await, AuthService::start().await);
    let port = inside.address.port();
    dns.set("keys.public.test", Records::A(1, vec![FIRST, Ipv4Addr::new(169, 254, 169, 254)]));
    let dns_server = dns.address.to_string();
    let url = format!("https://keys.public.test:{port}{KEYS}");
    let server = Server::start_with(LogKind::embedded(), &["--jwks-url", &url, "--dns-server", &dns_server]);
    server.ready().await;
    eventually("it was looked up", async || {
        let error = dependency(&server).await["last_error"].as_str().unwrap_or_default().to_owned();
        error.contains("keys.public.test resolves to 127.0.0.1, which is not public")
    })
    .await;
    assert_eq!(inside.connections(), 0);
    assert_eq!(dependency(&server).await["instances"], serde_json::json!([]));
    let token = Key::ed("k", 1).token("ada");
    assert_eq!(server.http_with("GET", "/v1/threads", &token, None, &[]).await.0, 503);
}
