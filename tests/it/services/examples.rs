//! The examples do what they say, against a real server.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::Serving;
use crate::support::auth_service::{AuthService, Behaviour};
use crate::support::{LogKind, Server, Socket, token};

/// Where `scripts/setup.sh test` installs what an example needs.
pub(super) fn python(example: &str) -> PathBuf {
    let or_home = || std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let cache = std::env::var("WEFT_CACHE").or_else(|_| or_home().map(|cache| cache + "/weft")).unwrap();
    PathBuf::from(cache).join("tools").join(example).join("bin/python")
}

/// The agent, once it takes work; it sends a token each so many seconds.
fn agent(server: &Server, delay: &str) -> Serving {
    start(server, "python-agent", &["--delay", delay])
}

fn start(server: &Server, example: &str, arguments: &[&str]) -> Serving {
    let mut command = Command::new(python(example));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(example).join("agent.py"));
    command.args(["--url", &server.url]).args(arguments);
    command.env("WEFT_TOKEN", token("scout", "publish subscribe agent")).env("OPENAI_API_KEY", "of-the-model");
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

// The agent whose model is behind a chat completions endpoint.

const COMPLETIONS: &str = "/v1/chat/completions";

fn of_model(server: &Server, model: &AuthService) -> Serving {
    start(server, "openai-compatible", &["--endpoint", &model.url("/v1"), "--model", "of-the-tests"])
}

fn chunk(delta: Value, finish_reason: Option<&str>) -> String {
    let choice = json!({"index": 0, "delta": delta, "finish_reason": finish_reason});
    format!("data: {}\n\n", json!({"object": "chat.completion.chunk", "choices": [choice]}))
}

/// A whole answer of the model's, in these pieces.
fn says(pieces: &[&str]) -> Behaviour {
    let mut text: String = pieces.iter().map(|piece| chunk(json!({"content": piece}), None)).collect();
    text += &chunk(json!({}), Some("stop"));
    let usage = json!({"prompt_tokens": 20, "completion_tokens": 4});
    text += &format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage}));
    Behaviour::Events { text, ends: true }
}

/// It asks for a sum: the call comes in parts.
fn asks_for_a_sum() -> Behaviour {
    let part = |part: Value| chunk(json!({"tool_calls": [part]}), None);
    let text = [
        part(json!({"index": 0, "id": "call_0", "type": "function", "function": {"name": "add", "arguments": ""}})),
        part(json!({"index": 0, "function": {"arguments": "{\"a\": 2,"}})),
        part(json!({"index": 0, "function": {"arguments": " \"b\": 3}"}})),
        chunk(json!({}), Some("tool_calls")),
        "data: [DONE]\n\n".to_owned(),
    ];
    Behaviour::Events { text: text.concat(), ends: true }
}

async fn with_thread() -> (Server, AuthService) {
    let server = Server::start(LogKind::embedded());
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({}))).await.0, 201);
    (server, AuthService::start().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_of_a_chat_completions_endpoint_calls_the_tool_that_the_model_asks_for_and_streams_its_answer() {
    let (server, model) = with_thread().await;
    let sum = says(&["The sum", " is 5."]);
    model.set(COMPLETIONS, Behaviour::Every(2, Box::new(asks_for_a_sum()), Box::new(sum)));
    let agent = of_model(&server, &model);
    let mut ada = ask(&server, "What is 2 + 3?").await;
    assert_eq!(until(&mut ada, "agent_token").await["data"]["text"], "The sum");
    until(&mut ada, "agent_completed").await;
    agent.line("t 2 done");

    let events = events(&server).await;
    assert_eq!(events.iter().map(|event| event["kind"].as_str().unwrap()).collect::<Vec<_>>(), ALL);
    assert_eq!(events[1]["data"]["arguments"], json!({"a": 2, "b": 3}));
    assert_eq!(events[2]["data"]["result"], 5);
    assert_eq!((&events[3]["data"]["content"], &events[3]["from"]), (&json!("The sum is 5."), &json!("scout")));
    assert_eq!(events[4]["data"]["usage"], json!({"input_tokens": 20, "output_tokens": 4}));

    assert_eq!(model.authorization(), "Bearer of-the-model");
    let asked: Value = serde_json::from_str(&model.body()).unwrap();
    assert_eq!((&asked["model"], &asked["tools"][0]["function"]["name"]), (&json!("of-the-tests"), &json!("add")));
    let call = &events[1]["data"]["call"];
    let calls =
        [json!({"id": call, "type": "function", "function": {"name": "add", "arguments": "{\"a\": 2, \"b\": 3}"}})];
    let conversation = json!([
        {"role": "user", "content": "What is 2 + 3?", "name": "ada"},
        {"role": "assistant", "content": null, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call, "content": "5"},
    ]);
    assert_eq!(asked["messages"], conversation, "the model is told what was said and called");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_while_its_model_streams_is_followed_by_one_that_begins_the_message_anew() {
    let (server, model) = with_thread().await;
    model.set(COMPLETIONS, Behaviour::Events { text: chunk(json!({"content": "The s"}), None), ends: false });
    let first = of_model(&server, &model);
    let mut ada = ask(&server, "What is 2 + 3?").await;
    until(&mut ada, "agent_token").await;
    drop(first);

    model.set(COMPLETIONS, says(&["It is 5."]));
    let second = of_model(&server, &model);
    second.line("goes on with answer-2");
    until(&mut ada, "agent_completed").await;
    second.line("t 2 done");
    let events = events(&server).await;
    let kinds: Vec<&str> = events.iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["agent_started", "agent_message", "agent_completed"]);
    assert_eq!(events[1]["data"]["content"], "It is 5.");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_busy_or_breaks_off_is_asked_again_and_one_that_refuses_fails_the_run_with_its_reason() {
    let (server, model) = with_thread().await;
    let busy = Box::new(Behaviour::Answer(503, "{\"error\": \"busy\"}".to_owned()));
    let broken = Box::new(Behaviour::Events { text: chunk(json!({"content": "The s"}), None), ends: true });
    model.set(COMPLETIONS, Behaviour::Every(2, busy, broken));
    let agent = of_model(&server, &model);
    let mut ada = ask(&server, "What is 2 + 3?").await;
    agent.line("t 2 retry");
    agent.line("t 2 retry");
    let why = "{\"error\": {\"message\": \"there is no such model\"}}";
    model.set(COMPLETIONS, Behaviour::Answer(404, why.to_owned()));
    let failed = until(&mut ada, "agent_failed").await;
    agent.line("t 2 done");
    assert_eq!(failed["data"]["code"], "model_refused");
    assert_eq!(failed["data"]["message"], format!("the model's endpoint answers 404: {why}"));
}
