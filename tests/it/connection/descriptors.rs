//! A server that has used up its file descriptors.

use std::time::{Duration, Instant};

use rlimit::Resource;

use crate::support::{LogKind, Server, Socket, eventually, seqs, token};

/// How many files and sockets the server has open.
fn open_descriptors(server: &Server) -> u64 {
    std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count() as u64
}

/// Sets the soft limit, which may be raised again.
fn allow_descriptors(server: &Server, most: u64) {
    let (mut soft, mut hard) = (0, 0);
    let pid = server.pid() as i32;
    rlimit::prlimit(pid, Resource::NOFILE, None, Some((&mut soft, &mut hard))).unwrap();
    rlimit::prlimit(pid, Resource::NOFILE, Some((most.min(hard), hard)), None).unwrap();
}

/// Pauses of the server between failed attempts to accept: 5 ms, then twice as long each time, up to a second.
const FAILURES: usize = 9;
const PAUSES: Duration = Duration::from_millis(5 + 10 + 20 + 40 + 80 + 160 + 320 + 640);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_descriptors_a_server_serves_whom_it_has_lets_others_wait_without_spinning_and_recovers() {
    let server = Server::start(LogKind::embedded());
    let mut first = server.connect("ada").await;
    let mut second = server.connect("ada").await;
    assert_eq!(first.say("t", "before").await, 1);
    second.subscribe("t", Some(0)).await;
    allow_descriptors(&server, open_descriptors(&server));

    let begin = Instant::now();
    let url = server.url.clone();
    let waiting = tokio::spawn(async move { Socket::open(&url, &token("ben", "")).await });
    let failures = || server.errors().matches("cannot accept").count();
    eventually("it has tried again and again", async || failures() >= FAILURES).await;
    assert!(begin.elapsed() >= PAUSES, "it tries less and less often: {:?}", begin.elapsed());
    assert!(!waiting.is_finished(), "there is no descriptor for another connection");

    // Those that it has notice nothing.
    assert_eq!(first.say("t", "meanwhile").await, 2);
    assert_eq!(seqs(&second.events(2).await), [1, 2]);

    // One leaves, and the one that waits has its descriptor.
    second.leave().await;
    let mut ben = waiting.await.unwrap();
    ben.answers().await;
    first.answers().await;
    allow_descriptors(&server, 1_024);
    assert!(server.metric(r#"weft_connections_refused_total{reason="accept_failed"}"#).await >= FAILURES as f64);
    assert_eq!(server.connect("ada").await.say("t", "after").await, 3);
}
