//! `weft replay`: a thread again, whole or in part, step by step, or into another server.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::run;
use crate::support::{LogKind, Server, accepted, has, publish, token, weft};

async fn conversation(server: &Server) {
    let mut ada = server.connect("ada").await;
    ada.say("t", "hello").await;
    server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await;
    let mut agent = server.connect_as("scout", "publish agent").await;
    let mut step = async |kind: &str, data: Value, parent: Option<u64>| {
        let mut command = publish("t", kind, data);
        command["run"] = json!("r");
        command["parent"] = json!(parent);
        accepted(&agent.ask(command).await);
    };
    step("agent_started", json!({"agent": "scout"}), Some(1)).await;
    step("agent_waiting", json!({"reason": "approval"}), None).await;
    step("agent_resumed", json!({"answer": "yes"}), Some(4)).await;
    step("agent_token", json!({"message": "m", "from_char": 0, "text": "in deltas"}), None).await;
    step("agent_message", json!({"message": "m"}), None).await;
    step("agent_completed", json!({}), None).await;
    // More than a page of them.
    for n in 0..250 {
        accepted(&ada.ask(publish("t", "x.note", json!(n))).await);
    }
}

fn seqs(lines: &str) -> Vec<u64> {
    lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_is_played_again_in_order_as_a_whole_and_in_part() {
    let server = Server::start_unlimited(LogKind::embedded());
    conversation(&server).await;
    let ada = token("ada", "");
    let replay = |more: &[&str]| {
        let server = ["replay", "t", "--speed", "100000", "--json", "--url", &server.url, "--token", &ada];
        run(&[&server, more].concat())
    };
    let (code, lines, said) = replay(&[]);
    assert_eq!((code, seqs(&lines)), (0, (1..=257).collect()), "{said}");
    assert_eq!(seqs(&replay(&["--from", "199", "--to", "203"]).1), (199..=203).collect::<Vec<_>>());
    assert_eq!(seqs(&replay(&["--from", "257"]).1), [257]);
    for (more, wrong) in [(&["--to", "1", "--to", "2"][..], "one seq"), (&["--to", "here"], "neither a seq")] {
        let (code, _, said) = replay(more);
        assert!(code == 2 && said.contains(wrong), "{said}");
    }
    let (code, _, said) = run(&["replay", "t", "--speed", "0", "--url", &server.url, "--token", &ada]);
    assert!(code == 2 && said.contains("no speed"), "{said}");
    let (code, _, said) = run(&["replay", "none", "--url", &server.url, "--token", &ada]);
    assert!(code == 1 && said.contains("not_found"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_step_each_line_of_input_plays_one_event() {
    let server = Server::start_unlimited(LogKind::embedded());
    conversation(&server).await;
    let mut replay = weft()
        .args(["replay", "t", "--step", "--json", "--url", &server.url, "--token", &token("ada", "")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Three events, ten further on, one more, back where it began, and no more.
    replay.stdin.take().unwrap().write_all(b"\n\n\nf\nbb\n").unwrap();
    let output = replay.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(seqs(std::str::from_utf8(&output.stdout).unwrap()), [1, 2, 3, 14, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_that_is_asked_to_end_ends_as_if_it_were_over() {
    let (here, there) = (Server::start_unlimited(LogKind::embedded()), Server::start_unlimited(LogKind::embedded()));
    conversation(&here).await;
    let agent = token("eve", "publish subscribe agent analyst");
    for signal in ["-INT", "-TERM"] {
        let mut replay = weft()
            .args(["replay", "t", "--step", "--url", &here.url, "--token", &agent, "--to", &there.url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Once the third event is printed, the second is done with, which no client can publish.
        let mut input = replay.stdin.take().unwrap();
        input.write_all(b"\n\n\n").unwrap();
        let printed = BufReader::new(replay.stdout.take().unwrap()).lines().take(3).filter(Result::is_ok).count();
        assert_eq!(printed, 3);
        assert!(Command::new("kill").args([signal, &replay.id().to_string()]).status().unwrap().success());
        let ended = replay.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{signal}: {said}");
        assert!(said.contains("1 events that only a server writes"), "{signal}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_is_played_into_another_server_once_however_often() {
    let (here, there) = (Server::start_unlimited(LogKind::embedded()), Server::start_unlimited(LogKind::embedded()));
    conversation(&here).await;
    // A seq more there than here.
    there.connect("eve").await.say("t", "before").await;
    let agent = token("eve", "publish subscribe agent analyst");
    for _ in 0..2 {
        let to = ["replay", "t", "--speed", "100000", "--url", &here.url, "--token", &agent, "--to", &there.url];
        let (code, _, said) = run(&to);
        assert!(code == 0 && said.contains("1 events that only a server writes"), "{said}");
    }
    let (_, page) = there.http_with("GET", "/v1/threads/t/events?limit=1000", &agent, None, &[]).await;
    let events = page["events"].as_array().unwrap();
    assert_eq!(events.len(), 1 + 256, "all but who was added");
    let kinds: Vec<&str> = events[1..8].iter().map(|event| event["kind"].as_str().unwrap()).collect();
    let expected = [
        "user_message",
        "agent_started",
        "agent_waiting",
        "agent_resumed",
        "agent_message",
        "agent_completed",
        "x.note",
    ];
    assert_eq!(kinds, expected);
    has(&events[2], json!({"parent": 2, "run": "r", "from": "eve"}));
    has(&events[4], json!({"parent": 4}));
    assert_eq!(events[5]["data"]["content"], "in deltas");
}
