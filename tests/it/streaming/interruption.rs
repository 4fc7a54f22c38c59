//! Runs whose agents, readers and nodes are interrupted: nobody sees it in the order of events.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::runs::{AGENT, step};
use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, accepted, eventually, seqs, token};

/// A number that looks random and is the same in every run.
fn scattered(n: u64, below: u64) -> u64 {
    let mut x = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 31;
    x.wrapping_mul(0xbf58_476d_1ce4_e5b9) % below
}

/// A long run, each event with its key; every fourth step writes a delta of a message instead.
fn long_run(events: usize) -> Vec<Value> {
    let mut run = vec![step("t", "r", "agent_started", json!({"agent": "scout"}))];
    let mut from_char = 0;
    for n in 0..events - 2 {
        run.push(match n % 4 {
            0 => step("t", "r", "tool_executing", json!({"tool": "map", "call": format!("c{n}")})),
            1 => step("t", "r", "tool_completed", json!({"call": format!("c{}", n - 1), "result": n})),
            2 => step("t", "r", "agent_thinking", json!({"content": format!("step {n}")})),
            _ => {
                let text = format!("word{n} ");
                from_char += text.len();
                let data = json!({"message": "m", "from_char": from_char - text.len(), "text": text});
                step("t", "r", "agent_token", data)
            }
        });
    }
    run.push(step("t", "r", "agent_completed", json!({})));
    for (n, command) in run.iter_mut().enumerate() {
        command["id"] = json!(1_000_000 + n);
        command["key"] = json!(format!("k{n}"));
    }
    run
}

/// The text that the deltas of a run make.
fn text_of(run: &[Value]) -> String {
    run.iter().filter(|it| it["kind"] == "agent_token").map(|it| it["data"]["text"].as_str().unwrap()).collect()
}

fn kinds_of<'a>(run: impl IntoIterator<Item = &'a Value>) -> Vec<&'a str> {
    run.into_iter().map(|it| it["kind"].as_str().unwrap()).collect()
}

on_both_logs!(an_agent_whose_connection_breaks_goes_on_by_key_and_its_readers_see_one_unbroken_run, |log| async move {
    let server = Server::start_unlimited(log);
    let run = long_run(300);
    let mut reader = server.connect_as("eva", "subscribe analyst").await;
    let mut agent = server.connect_as("scout", AGENT).await;
    accepted(&agent.ask(run[0].clone()).await);
    reader.subscribe("t", Some(0)).await;
    let (mut answered, mut broken) = (1, 0);
    while answered < run.len() {
        // A few answers are read, more commands are on their way, and then the network is gone.
        let sent = (answered + 40).min(run.len());
        agent.send(&Value::Array(run[answered..sent].to_vec())).await;
        let wanted = if sent == run.len() { sent - answered } else { scattered(broken, 30) as usize };
        let mut seen = BTreeMap::new();
        for _ in 0..wanted {
            let answer = agent.recv().await;
            accepted(&answer);
            seen.insert(answer["id"].as_u64().unwrap() as usize - 1_000_000, ());
        }
        // Sent again is all that has no answer, in order.
        answered = (answered..sent).find(|n| !seen.contains_key(n)).unwrap_or(sent);
        drop(agent);
        agent = server.connect_as("scout", AGENT).await;
        broken += 1;
    }
    assert!(broken > 8, "{broken}");
    let expected: Vec<&Value> = run.iter().filter(|it| it["kind"] != "agent_token").collect();
    let mut events = Vec::new();
    let mut text = String::new();
    while events.len() < expected.len() + 1 {
        let event = reader.recv_type("event").await;
        match event["seq"].is_u64() {
            true => events.push(event),
            false => text.push_str(event["data"]["text"].as_str().unwrap()),
        }
    }
    assert_eq!(seqs(&events), (1..=events.len() as u64).collect::<Vec<_>>());
    let closed = events.remove(events.len() - 2);
    assert_eq!((&closed["data"]["content"], &text), (&json!(text_of(&run)), &text_of(&run)));
    assert_eq!(kinds_of(&events), kinds_of(expected));
    let letters = server.admin("GET", "/v1/dead-letters").await.1;
    assert_eq!(letters["items"], json!([]), "what was sent again broke no order");
});

on_both_logs!(a_reader_that_loses_its_network_twenty_times_sees_each_event_of_a_run_once_in_order, |log| async move {
    const EVENTS: usize = 2_000;
    let server = Server::start_unlimited(log);
    let run = long_run(EVENTS);
    let kept = run.iter().filter(|it| it["kind"] != "agent_token").count() + 1;
    let mut agent = server.connect_as("scout", AGENT).await;
    accepted(&agent.ask(run[0].clone()).await);
    let rest = run[1..].to_vec();
    let total = rest.len();
    let playing = tokio::spawn(async move {
        for part in rest.chunks(50) {
            agent.send(&Value::Array(part.to_vec())).await;
            for _ in part {
                accepted(&agent.recv().await);
            }
        }
        total
    });
    let mut events: Vec<Value> = Vec::new();
    for life in 0..=20 {
        let mut reader = Socket::open(&server.url, &token("scout", "")).await;
        reader.subscribe("t", Some(events.len() as u64)).await;
        let until = if life == 20 { kept } else { (kept * (life + 1) / 21).max(events.len() + 1) };
        // Of a message in the making a new session gets all of the text first.
        let mut text = String::new();
        while events.len() < until {
            let event = reader.recv_type("event").await;
            if event["seq"].is_u64() {
                events.push(event);
            } else {
                assert_eq!(event["data"]["from_char"], text.len(), "{event}");
                text.push_str(event["data"]["text"].as_str().unwrap());
            }
        }
    }
    assert_eq!(playing.await.unwrap(), total);
    assert_eq!(seqs(&events), (1..=kept as u64).collect::<Vec<_>>());
    let closed = events.remove(kept - 2);
    assert_eq!(closed["data"]["content"], text_of(&run));
    assert_eq!(kinds_of(&events), kinds_of(run.iter().filter(|it| it["kind"] != "agent_token")));
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_that_race_to_end_resume_or_cancel_a_run_one_wins_and_both_show_the_same() {
    const ROUNDS: usize = 20;
    let log = LogKind::kafka();
    let nodes = [(); 2].map(|()| Server::start(log.clone()));
    let mut agents = Vec::new();
    for node in &nodes {
        agents.push(node.connect_as("scout", AGENT).await);
    }
    let rivals = [
        [("agent_completed", json!({"output": 0})), ("agent_failed", json!({"code": "broken", "message": "1"}))],
        [("agent_resumed", json!({"answer": 0})), ("agent_resumed", json!({"answer": 1}))],
        [("agent_cancelled", json!({"reason": "0"})), ("agent_completed", json!({"output": 1}))],
    ];
    for round in 0..ROUNDS {
        for (n, rivals) in rivals.iter().enumerate() {
            let run = format!("r{round}-{n}");
            accepted(&agents[0].ask(step("t", &run, "agent_started", json!({"agent": "scout"}))).await);
            let asked = agents[0].ask(step("t", &run, "agent_waiting", json!({"reason": "approval"}))).await;
            let [one, other] = &mut agents[..] else { unreachable!("two nodes") };
            let ask = |agent, (kind, data): &(&str, Value)| {
                let mut command = step("t", &run, kind, data.clone());
                if *kind == "agent_resumed" {
                    command["parent"] = asked["seq"].clone();
                }
                let agent: &mut Socket = agent;
                async move { agent.ask(command).await }
            };
            let (first, second) = tokio::join!(ask(one, &rivals[0]), ask(other, &rivals[1]));
            let won = [&first, &second].iter().filter(|answer| answer["type"] == "published").count();
            assert_eq!(won, 1, "{run}: {first} {second}");
            let lost = if first["type"] == "published" { &second } else { &first };
            let expected = if n == 1 { "conflict" } else { "run_order" };
            assert_eq!(lost["code"], expected, "{lost}");
        }
    }
    let mut pages = Vec::new();
    for node in &nodes {
        let head = async || node.http("GET", "/v1/threads/t", "scout", None).await.1["head"].clone();
        eventually("all events are there", async || head().await == json!(ROUNDS * 9)).await;
        let page = node.http("GET", "/v1/threads/t/events?limit=1000", "scout", None).await.1;
        let runs = node.http("GET", "/v1/threads/t/runs?limit=1000", "scout", None).await.1;
        pages.push((page, runs));
    }
    assert_eq!(pages[0], pages[1]);
}
