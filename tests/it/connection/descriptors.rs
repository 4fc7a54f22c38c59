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

/// The pauses before the one of 640 ms.
const PAUSES: Duration = Duration::from_millis(5 + 10 + 20 + 40 + 80 + 160 + 320);

/// More than what the server closes on its own, such as old files of its store.
const CROWD: usize = 16;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_descriptors_a_server_serves_whom_it_has_lets_others_wait_without_spinning_and_recovers() {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    let mut reader = server.connect("ada").await;
    assert_eq!(writer.say("t", "before").await, 1);
    reader.subscribe("t", Some(0)).await;
    let mut crowd = Vec::new();
    for n in 0..CROWD {
        crowd.push(server.connect(&format!("user-{n}")).await);
    }
    allow_descriptors(&server, open_descriptors(&server));

    // What cannot be accepted waits in the kernel, and the server tries less and less often.
    let begin = Instant::now();
    let mut waiting = Vec::new();
    for n in 0..CROWD {
        let (url, token) = (server.url.clone(), token(&format!("late-{n}"), ""));
        waiting.push(tokio::spawn(async move { Socket::open(&url, &token).await }));
    }
    eventually("it pauses for long", async || {
        server.errors().lines().any(|line| line.contains("cannot accept") && line.contains("640ms"))
    })
    .await;
    assert!(begin.elapsed() >= PAUSES, "{:?}", begin.elapsed());
    assert!(waiting.iter().any(|it| !it.is_finished()), "there are no descriptors for all of them");

    // Those that it has notice nothing.
    assert_eq!(writer.say("t", "meanwhile").await, 2);
    assert_eq!(seqs(&reader.events(2).await), [1, 2]);
    for one in &mut crowd {
        one.answers().await;
    }

    // As many leave as wait: each has a descriptor now.
    for one in crowd {
        one.leave().await;
    }
    for late in waiting {
        late.await.unwrap().answers().await;
    }
    writer.answers().await;
    allow_descriptors(&server, 1_024);
    assert!(server.metric(r#"weft_connections_refused_total{reason="accept_failed"}"#).await >= 1.0);
    assert_eq!(server.connect("ada").await.say("t", "after").await, 3);
}
