//! The examples do what they say, against a real server.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::Serving;
use crate::support::{LogKind, Server, Socket, token};

/// Where `scripts/setup.sh test` installs what the example needs.
fn python() -> PathBuf {
    let or_home = || std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let cache = std::env::var("WEFT_CACHE").or_else(|_| or_home().map(|cache| cache + "/weft")).unwrap();
    PathBuf::from(cache).join("tools/python-agent/bin/python")
}

/// The agent, once it takes work; it sends a token each so many seconds.
fn agent(server: &Server, delay: &str) -> Serving {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python-agent/agent.py"));
    command.args(["--url", &server.url, "--delay", delay]);
    command.env("WEFT_TOKEN", token("scout", "publish subscribe agent"));
    let agent = Serving::start(&mut command);
    agent.line("takes work of assistant");
    agent
}

/// A person asks, and sees what happens.
async fn ask(server: &Server, question: &str) -> Socket {
    let mut ada = server.connect("ada").await;
    ada.subscribe("t", None).await;
    assert_eq!(ada.say("t", question).await, 2);
    ada
}

async fn until(socket: &mut Socket, kind: &str) -> Value {
    loop {
        let event = socket.recv_type("event").await;
        if event["kind"] == kind {
            return event;
        }
    }
}

async fn events(server: &Server) -> Vec<Value> {
    let (status, page) = server.http("GET", "/v1/threads/t/events?after=2", "ada", None).await;
    assert_eq!(status, 200, "{page}");
    page["events"].as_array().unwrap().clone()
}

const ALL: [&str; 5] = ["agent_started", "tool_executing", "tool_completed", "agent_message", "agent_completed"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_agent_calls_a_tool_streams_its_answer_and_settles_its_work() {
    let server = Server::start(LogKind::embedded());
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({}))).await.0, 201);
    let agent = agent(&server, "0");
    let mut ada = ask(&server, "What is 2 + 3?").await;
    let first = until(&mut ada, "agent_token").await;
    assert_eq!((&first["data"]["from_char"], first.get("seq")), (&json!(0), None), "{first}");
    until(&mut ada, "agent_completed").await;
    agent.line("t 2 done");

    let events = events(&server).await;
    assert_eq!(events.iter().map(|event| event["kind"].as_str().unwrap()).collect::<Vec<_>>(), ALL);
    assert_eq!(events[2]["data"]["result"], 5);
    assert_eq!((&events[3]["data"]["content"], &events[3]["from"]), (&json!("The sum is 5."), &json!("scout")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_python_agent_that_is_killed_in_the_middle_of_its_answer_is_followed_by_one_that_goes_on() {
    let server = Server::start(LogKind::embedded());
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({}))).await.0, 201);
    // It is far from the end of its answer when it is killed.
    let first = agent(&server, "30");
    let mut ada = ask(&server, "What is 20 + 30?").await;
    until(&mut ada, "agent_token").await;
    drop(first);

    let second = agent(&server, "0");
    second.line("goes on with answer-2");
    until(&mut ada, "agent_completed").await;
    second.line("t 2 done");
    let events = events(&server).await;
    assert_eq!(events.iter().map(|event| event["kind"].as_str().unwrap()).collect::<Vec<_>>(), ALL, "each once");
    assert_eq!(events[3]["data"]["content"], "The sum is 50.");
}
