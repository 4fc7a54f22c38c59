//! A thread's runs as AG-UI's clients get them.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::runs::answer_to;
use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, eventually, token};

const AGENT: &str = "publish subscribe agent";

/// ada's stream of `t`.
async fn stream(server: &Server, query: &str) -> EventStream {
    let path = format!("/v1/threads/t/agui{query}");
    EventStream::open(server, &path, &token("ada", ""), &[]).await.unwrap_or_else(|refused| panic!("{refused:?}"))
}

/// A thread of ada's, and an agent on it.
async fn thread(log: LogKind) -> (Server, Socket, Socket) {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "Where shall we eat?").await, 1);
    let scout = server.connect_as("scout", AGENT).await;
    (server, ada, scout)
}

/// Publishes an event of a run; gives its seq, but for deltas.
async fn act(by: &mut Socket, run: &str, kind: &str, data: Value) -> u64 {
    let answer = by.ask(json!({"type": "publish", "thread": "t", "run": run, "kind": kind, "data": data})).await;
    accepted(&answer);
    answer["seq"].as_u64().unwrap_or(0)
}

async fn delta(by: &mut Socket, run: &str, from_char: u64, text: &str) {
    act(by, run, "agent_token", json!({"message": "m", "from_char": from_char, "text": text})).await;
}

/// An event without what is the same in all of them.
fn short(event: &Value) -> String {
    let what = ["type", "runId", "messageId", "toolCallId", "delta", "content", "code"];
    // Ids of events are as random as they are.
    let got = |name: &&str| event[name].as_str().filter(|it| it.len() != 36).map(str::to_owned);
    what.iter().filter_map(got).collect::<Vec<_>>().join(" ")
}

/// What comes up to and with the first event of this type; deltas that came apart are put together. The newest id stands for
/// the place that the stream has come to.
async fn until(stream: &mut EventStream, last: &str) -> (Vec<Value>, Option<u64>) {
    let (mut events, mut place): (Vec<Value>, _) = (Vec::new(), None);
    loop {
        let block = stream.next().await.unwrap_or_else(|| panic!("the end, after {events:?}"));
        assert_eq!(block.event, None, "AG-UI has no names of events: {block:?}");
        let event = block.json();
        place = block.id.map(|id| id.parse().unwrap()).or(place);
        let is_last = event["type"] == last;
        match events.last_mut() {
            Some(before) if event["delta"].is_string() && before["type"] == event["type"] => {
                let text = format!("{}{}", before["delta"].as_str().unwrap(), event["delta"].as_str().unwrap());
                before["delta"] = json!(text);
            }
            _ => events.push(event),
        }
        if is_last {
            return (events, place);
        }
    }
}

fn shorts(events: &[Value]) -> Vec<String> {
    events.iter().map(short).collect()
}

on_both_logs!(a_run_is_told_as_it_happens_and_again_from_its_history, |log| async move {
    let (server, mut ada, mut scout) = thread(log).await;
    let mut live = stream(&server, "?after=0").await;
    assert_eq!(live.reply.headers()["content-type"], "text/event-stream");
    act(&mut scout, "r", "agent_started", json!({"agent": "scout", "input": {"near": "here"}})).await;
    act(&mut scout, "r", "agent_thinking", json!({"content": "places"})).await;
    act(&mut scout, "r", "tool_executing", json!({"tool": "map", "call": "c", "arguments": {"near": "here"}})).await;
    act(&mut scout, "r", "tool_completed", json!({"call": "c", "result": "Noodles"})).await;
    for (at, text) in [(0, "Nood"), (4, "les, they "), (14, "are open.\n\ndata: x")] {
        delta(&mut scout, "r", at, text).await;
    }
    act(&mut scout, "r", "agent_message", json!({"message": "m"})).await;
    assert_eq!(ada.say("t", "Great").await, 7);
    let ended = act(&mut scout, "r", "agent_completed", json!({"output": {"eat": "Noodles"}})).await;
    let (events, place) = until(&mut live, "RUN_FINISHED").await;
    let got = [
        "RUN_STARTED r",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT Where shall we eat?",
        "TEXT_MESSAGE_END",
        "STEP_STARTED",
        "REASONING_START",
        "REASONING_MESSAGE_START",
        "REASONING_MESSAGE_CONTENT places",
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "STEP_FINISHED",
        "TOOL_CALL_START r/calls/c",
        "TOOL_CALL_ARGS r/calls/c {\"near\":\"here\"}",
        "TOOL_CALL_END r/calls/c",
        "TOOL_CALL_RESULT r/calls/c Noodles",
        "TEXT_MESSAGE_START r/m",
        "TEXT_MESSAGE_CONTENT r/m Noodles, they are open.\n\ndata: x",
        "TEXT_MESSAGE_END r/m",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT Great",
        "TEXT_MESSAGE_END",
        "RUN_FINISHED r",
    ];
    assert_eq!(shorts(&events), got);
    assert_eq!((place, &events[0]["threadId"], &events[1]["name"]), (Some(ended), &json!("t"), &json!("ada")));
    assert_eq!(
        (&events[0]["metadata"]["input"]["near"], &events[events.len() - 1]["result"]["eat"]),
        (&json!("here"), &json!("Noodles"))
    );
    let (again, place) = until(&mut stream(&server, "?after=0").await, "RUN_FINISHED").await;
    assert_eq!((shorts(&again), place), (shorts(&events), Some(ended)));
    let mut one = stream(&server, "?run=r").await;
    let (run, _) = until(&mut one, "RUN_FINISHED").await;
    assert_eq!(shorts(&run), [&got[..1], &got[4..]].concat(), "a run begins with itself");
    assert_eq!(one.next().await, None, "and the stream ends with it");
    // The stream that follows no run in particular goes on.
    act(&mut scout, "next", "agent_started", json!({"agent": "scout"})).await;
    act(&mut scout, "next", "agent_failed", json!({"code": "tired", "message": "too late"})).await;
    assert_eq!(shorts(&until(&mut live, "RUN_ERROR").await.0), ["RUN_STARTED next", "RUN_ERROR tired"]);
});

#[tokio::test]
async fn who_joins_in_the_middle_finds_text_and_calls_open_and_nothing_twice() {
    let (server, _ada, mut scout) = thread(LogKind::embedded()).await;
    act(&mut scout, "r", "agent_started", json!({"agent": "scout"})).await;
    act(&mut scout, "r", "tool_executing", json!({"tool": "map", "call": "c", "arguments": [1]})).await;
    delta(&mut scout, "r", 0, "Nood").await;
    let mut joined = stream(&server, "").await;
    let run = ["RUN_STARTED r"];
    let call = ["TOOL_CALL_START r/calls/c", "TOOL_CALL_ARGS r/calls/c [1]", "TOOL_CALL_END r/calls/c"];
    let text = ["TEXT_MESSAGE_START r/m", "TEXT_MESSAGE_CONTENT r/m Nood"];
    let (events, place) = until(&mut joined, "TEXT_MESSAGE_CONTENT").await;
    assert_eq!(
        (shorts(&events), place),
        ([&run[..], &call, &text].concat().into_iter().map(str::to_owned).collect(), Some(3))
    );
    let headers = [("Last-Event-ID", "3")];
    let back = EventStream::open(&server, "/v1/threads/t/agui?after=0&run=r", &token("ada", ""), &headers).await;
    let mut back = back.ok().unwrap();
    let (events, _) = until(&mut back, "TEXT_MESSAGE_CONTENT").await;
    assert_eq!(shorts(&events), [&run[..], &text].concat(), "the call was sent before");
    delta(&mut scout, "r", 4, "les").await;
    act(&mut scout, "r", "tool_completed", json!({"call": "c", "error": {"no": "map"}})).await;
    act(&mut scout, "r", "agent_cancelled", json!({"reason": "enough"})).await;
    let rest = [
        "TEXT_MESSAGE_CONTENT r/m les",
        "TOOL_CALL_RESULT r/calls/c {\"no\":\"map\"}",
        "TEXT_MESSAGE_END r/m",
        "RUN_FINISHED r",
    ];
    for stream in [&mut joined, &mut back] {
        let (events, place) = until(stream, "RUN_FINISHED").await;
        assert_eq!((shorts(&events), place), (rest.map(str::to_owned).to_vec(), Some(6)));
        assert_eq!(events[3]["outcome"], json!({"type": "cancelled"}));
    }
    assert_eq!(back.next().await, None);
}

#[tokio::test]
async fn a_question_ends_the_stream_of_its_run_which_goes_on_with_the_answer() {
    let (server, mut ada, mut scout) = thread(LogKind::embedded()).await;
    act(&mut scout, "r", "agent_started", json!({"agent": "scout"})).await;
    let mut first = stream(&server, "?run=r").await;
    let question = json!({"reason": "approval", "prompt": "Book?", "expires_at": "2099-01-01T00:00:00Z", "cost": 12});
    let asked = act(&mut scout, "r", "agent_waiting", question).await;
    let (events, place) = until(&mut first, "RUN_FINISHED").await;
    assert_eq!((shorts(&events), place), (vec!["RUN_STARTED r".to_owned(), "RUN_FINISHED r".to_owned()], Some(asked)));
    let interrupt = &events[1]["outcome"]["interrupts"][0];
    assert_eq!(
        (&events[1]["outcome"]["type"], &interrupt["reason"], &interrupt["message"], &interrupt["metadata"]["cost"]),
        (&json!("interrupt"), &json!("approval"), &json!("Book?"), &json!(12))
    );
    assert_eq!(first.next().await, None);
    let mut second = stream(&server, &format!("?run=r&after={asked}")).await;
    assert_eq!(interrupt["metadata"]["seq"], asked, "what an answer names as its `parent`");
    accepted(&ada.ask(answer_to("t", "r", &interrupt["metadata"]["seq"], json!({"answer": "yes"}))).await);
    let ended = act(&mut scout, "r", "agent_completed", json!({})).await;
    let (events, _) = until(&mut second, "RUN_FINISHED").await;
    assert_eq!(
        (shorts(&events), &events[0]["metadata"]["answer"]),
        (vec!["RUN_STARTED r".to_owned(), "RUN_FINISHED r".to_owned()], &json!("yes"))
    );
    assert_eq!((second.next().await, events[1].get("outcome")), (None, None));
    // What was answered is no end of the run's history.
    let mut whole = stream(&server, "?run=r").await;
    let mut runs = Vec::new();
    while let Some(block) = whole.next().await {
        runs.push(short(&block.json()));
    }
    assert_eq!(runs, ["RUN_STARTED r", "RUN_FINISHED r", "RUN_STARTED r", "RUN_FINISHED r"]);
    let over = reqwest::Client::new()
        .get(format!("{}/v1/threads/t/agui?run=r&after={ended}", server.url))
        .bearer_auth(token("ada", ""))
        .send()
        .await
        .unwrap();
    assert_eq!(over.status(), 204, "there is nothing to come back for");
    let (_, thread) = server.http("GET", "/v1/threads/t", "ada", None).await;
    assert_eq!(thread["epoch"], over.headers()["weft-epoch"].to_str().unwrap());
}

#[tokio::test]
async fn a_run_beside_the_told_one_is_taken_up_where_that_ends() {
    let (server, _ada, mut scout) = thread(LogKind::embedded()).await;
    let mut live = stream(&server, "").await;
    act(&mut scout, "a", "agent_started", json!({"agent": "scout"})).await;
    act(&mut scout, "b", "agent_started", json!({"agent": "scout"})).await;
    act(&mut scout, "b", "tool_executing", json!({"tool": "map", "call": "c"})).await;
    delta(&mut scout, "b", 0, "Hello").await;
    act(&mut scout, "a", "agent_completed", json!({})).await;
    let (events, _) = until(&mut live, "TEXT_MESSAGE_CONTENT").await;
    let got = [
        "RUN_STARTED a",
        "RUN_FINISHED a",
        "RUN_STARTED b",
        "TOOL_CALL_START b/calls/c",
        "TOOL_CALL_END b/calls/c",
        "TEXT_MESSAGE_START b/m",
        "TEXT_MESSAGE_CONTENT b/m Hello",
    ];
    assert_eq!(shorts(&events), got);
    delta(&mut scout, "b", 5, " you").await;
    act(&mut scout, "b", "agent_failed", json!({"code": "x", "message": "y"})).await;
    let (events, _) = until(&mut live, "RUN_ERROR").await;
    assert_eq!(shorts(&events), ["TEXT_MESSAGE_CONTENT b/m  you", "TEXT_MESSAGE_END b/m", "RUN_ERROR x"]);
}

#[tokio::test]
async fn what_cannot_be_streamed_is_refused_and_what_ends_a_stream_is_an_error_of_the_run() {
    let (server, _ada, mut scout) = thread(LogKind::embedded()).await;
    let refused = async |query: &str, user: &str, headers: &[(&str, &str)]| {
        let path = format!("/v1/threads/t/agui{query}");
        let (status, problem) = EventStream::open(&server, &path, &token(user, ""), headers).await.err().unwrap();
        (status, ["code", "field"].map(|field| problem[field].as_str().unwrap_or("").to_owned()))
    };
    let is = |status: u16, code: &str, field: &str| (status, [code.to_owned(), field.to_owned()]);
    assert_eq!(refused("?colour=red", "ada", &[]).await, is(400, "bad_request", "colour"));
    assert_eq!(refused("?after=x", "ada", &[]).await, is(400, "bad_request", "after"));
    assert_eq!(refused("?after=2", "ada", &[]).await, is(400, "cursor_invalid", "after"));
    assert_eq!(refused("", "ada", &[("Last-Event-ID", "2")]).await, is(400, "cursor_invalid", "Last-Event-ID"));
    assert_eq!(refused("?run=", "ada", &[]).await, is(400, "bad_request", "run"));
    assert_eq!(refused("?run=nowhere", "ada", &[]).await, is(404, "not_found", "run"));
    assert_eq!(refused("?run=nowhere", "eve", &[]).await, is(404, "not_found", "thread"));
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    let bens = EventStream::open(&server, "/v1/threads/t/agui", &token("ben", ""), &[]).await;
    let mut bens = bens.ok().unwrap();
    act(&mut scout, "r", "agent_started", json!({"agent": "scout"})).await;
    until(&mut bens, "RUN_STARTED").await;
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    let (events, _) = until(&mut bens, "RUN_ERROR").await;
    assert_eq!((events.len(), short(&events[0])), (1, "RUN_ERROR not_found".to_owned()));
    assert_eq!(bens.next().await, None);
}

/// Where `scripts/setup.sh test` installs AG-UI's own client.
fn packages() -> PathBuf {
    let or_home = || std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let cache = std::env::var("WEFT_CACHE").or_else(|_| or_home().map(|cache| cache + "/weft")).unwrap();
    PathBuf::from(cache).join("agui")
}

/// Reads a run with AG-UI's own client.
async fn with_client(server: &Server, query: &str) -> Value {
    let mut client = Command::new("node");
    client.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agui/client.mjs")).arg(packages());
    client.args([format!("{}/v1/threads/t/agui{query}", server.url), token("ada", "")]);
    let ran = tokio::task::spawn_blocking(move || client.output());
    let output = ran.await.unwrap().expect("node runs: `scripts/setup.sh test` installs it");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "`scripts/setup.sh test` installs what the client needs\n{err}");
    serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_of_agui_takes_a_run_as_its_own() {
    let (server, mut ada, mut scout) = thread(LogKind::embedded()).await;
    act(&mut scout, "r", "agent_started", json!({"agent": "scout"})).await;
    act(&mut scout, "r", "agent_thinking", json!({"content": "places"})).await;
    act(&mut scout, "r", "tool_executing", json!({"tool": "map", "call": "c", "arguments": {"near": "here"}})).await;
    delta(&mut scout, "r", 0, "Nood").await;
    let reading = with_client(&server, "?run=r&after=0");
    let acting = async {
        eventually("the client reads", async || server.metric("weft_streams").await == 1.0).await;
        ada.say("t", "Quick!").await;
        delta(&mut scout, "r", 4, "les").await;
        act(&mut scout, "r", "tool_completed", json!({"call": "c", "result": {"open": true}})).await;
        act(&mut scout, "r", "agent_message", json!({"message": "m"})).await;
        let parts = json!([{"type": "text", "text": "Or"}, {"type": "card"}]);
        act(&mut scout, "r", "agent_message", json!({"content": parts})).await;
        act(&mut ada, "r", "x.map", json!({"zoom": null})).await;
        act(&mut scout, "r", "agent_waiting", json!({"reason": "approval", "prompt": "Book?"})).await
    };
    let (read, asked) = tokio::join!(reading, acting);
    assert_eq!((read.get("error"), &read["warnings"]), (None, &json!([])), "{read}");
    let messages = read["messages"].as_array().unwrap();
    let said = |role: &str| -> Vec<&str> {
        messages.iter().filter(|it| it["role"] == role).filter_map(|it| it["content"].as_str()).collect()
    };
    assert_eq!(said("user"), ["Where shall we eat?", "Quick!"]);
    assert_eq!((said("tool"), said("reasoning")), (vec!["{\"open\":true}"], vec!["places"]));
    assert_eq!(said("assistant"), ["Noodles", "Or"], "{messages:?}");
    let call = messages.iter().find_map(|it| it["toolCalls"].get(0)).unwrap();
    assert_eq!(call["function"], json!({"name": "map", "arguments": "{\"near\":\"here\"}"}));
    assert_eq!(read["pendingInterrupts"][0]["message"], "Book?");
    let events = read["events"].as_array().unwrap();
    // What the client has verified is what was sent.
    let (mut sent, mut plain) = (Vec::new(), stream(&server, "?run=r&after=0").await);
    while let Some(block) = plain.next().await {
        sent.push(block.json());
    }
    let whole = |events: &[Value]| -> Vec<Value> {
        // Which deltas a text came in is a matter of when it was read.
        events.iter().filter(|it| it["messageId"] != "r/m").cloned().collect()
    };
    assert_eq!(whole(events), whole(&sent));
    assert!(events.iter().any(|it| it["type"] == "CUSTOM" && it["value"]["data"] == json!({"zoom": null})));

    let reading = with_client(&server, "?run=r&after=0");
    let answered = ada.ask(answer_to("t", "r", &json!(asked), json!({"answer": "yes"}))).await;
    assert_eq!(answered["seq"], asked + 1);
    act(&mut scout, "r", "agent_completed", json!({"output": {"booked": true}, "usage": {"input": 3}})).await;
    let read = reading.await;
    assert_eq!(
        (&read["result"], read.get("error"), &read["warnings"]),
        (&json!({"booked": true}), None, &json!([])),
        "{read}"
    );
    assert_eq!(read["pendingInterrupts"], json!([]));
}
