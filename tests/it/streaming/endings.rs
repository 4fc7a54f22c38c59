//! The ends of many runs at once, each of which closes what its run has left open.

use serde_json::{Value, json};

use super::runs::{AGENT, step};
use crate::support::{LogKind, Server, Socket, accepted};

const RUNS: usize = 8;
const MESSAGES: usize = 7;
/// Of a message's text, and of each piece of it.
const MESSAGE: usize = 1_000_000;
const PIECE: usize = 50_000;
/// The bytes after which a commit ends, and what one record may add to that.
const COMMIT: usize = 8 << 20;

/// A run on a thread of its own that leaves as much text open as a thread may have.
async fn begin_and_write(agent: &mut Socket, thread: &str) {
    accepted(&agent.ask(step(thread, "r", "agent_started", json!({"agent": "scout"}))).await);
    let text = "x".repeat(PIECE);
    for message in 0..MESSAGES {
        let piece = |from: usize| {
            let data = json!({"message": format!("m{message}"), "from_char": from, "text": text});
            let mut command = step(thread, "r", "agent_token", data);
            command["id"] = json!(1_000_000 + from);
            command
        };
        let pieces: Vec<Value> = (0..MESSAGE).step_by(PIECE).map(piece).collect();
        for frame in pieces.chunks(4) {
            agent.send(&Value::Array(frame.to_vec())).await;
            for _ in frame {
                accepted(&agent.recv().await);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_with_much_open_text_that_end_in_one_array_are_several_commits_and_lose_nothing() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut agent = server.connect_as("scout", AGENT).await;
    let threads: Vec<String> = (0..RUNS).map(|n| format!("t{n}")).collect();
    for thread in &threads {
        begin_and_write(&mut agent, thread).await;
    }

    let commits = async || server.metric("weft_project_seconds_count").await;
    let before = commits().await;
    let ends = threads.iter().zip(0..).map(|(thread, id): (_, u64)| {
        let mut end = step(thread, "r", "agent_completed", json!({}));
        end["id"] = json!(id);
        end
    });
    agent.send(&ends.collect()).await;
    for _ in &threads {
        let ended = agent.recv().await;
        assert_eq!(ended["seq"], 2 + MESSAGES, "{ended}");
    }
    // They came to the log as one batch: without a bound they would be one commit.
    let least = (RUNS * MESSAGES * MESSAGE) / (2 * COMMIT);
    let made = commits().await - before;
    assert!(made >= least as f64, "{made} commits for {} bytes", RUNS * MESSAGES * MESSAGE);

    for thread in &threads {
        let (_, page) = server.http("GET", &format!("/v1/threads/{thread}/events"), "scout", None).await;
        let mut events = page["events"].as_array().unwrap().clone();
        // A page ends at 4 MiB.
        while events.len() < 2 + MESSAGES {
            let path = format!("/v1/threads/{thread}/events?after={}", events.len());
            events.extend(server.http("GET", &path, "scout", None).await.1["events"].as_array().unwrap().clone());
        }
        for closed in &events[1..=MESSAGES] {
            assert_eq!(closed["data"]["content"].as_str().unwrap().len(), MESSAGE, "{}", closed["seq"]);
        }
    }
}
