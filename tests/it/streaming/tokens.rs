//! Messages that agents write in deltas: what the log makes of them, and what readers have of them at any time.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::on_threads;
use super::runs::{AGENT, step};
use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, eventually, has, publish, refused, refused_with, seqs, token};

pub fn delta(thread: &str, run: &str, message: &str, from_char: usize, text: &str) -> Value {
    step(thread, run, "agent_token", json!({"message": message, "from_char": from_char, "text": text}))
}

pub async fn start(agent: &mut Socket, thread: &str, run: &str) {
    let answer = agent.ask(step(thread, run, "agent_started", json!({"agent": "scout"}))).await;
    accepted(&answer);
}

/// Publishes in one frame; gives the answers in the order of the commands.
pub async fn play(agent: &mut Socket, commands: &[Value]) -> Vec<Value> {
    let numbered: Vec<Value> = (0..)
        .zip(commands)
        .map(|(n, command)| {
            let mut command = command.clone();
            command["id"] = json!(1_000_000 + n);
            command
        })
        .collect();
    agent.send(&Value::Array(numbered)).await;
    let mut answers = vec![Value::Null; commands.len()];
    for _ in commands {
        let answer = loop {
            let frame = agent.recv().await;
            if frame["id"].is_u64() {
                break frame;
            }
        };
        let n = answer["id"].as_u64().unwrap() as usize - 1_000_000;
        answers[n] = answer;
    }
    answers
}

/// What a reader makes of deltas: each goes on where the text ends, or begins it anew.
#[derive(Default)]
pub struct Fold {
    pub texts: BTreeMap<String, String>,
    /// How many deltas came.
    deltas: usize,
    /// How many of them began their message anew.
    pub restarts: usize,
}

impl Fold {
    pub fn take(&mut self, event: &Value) {
        assert_eq!(event["kind"], "agent_token", "{event}");
        assert!(event.get("seq").is_none(), "a delta has no seq: {event}");
        let data = &event["data"];
        let text = self.texts.entry(data["message"].as_str().unwrap().to_owned()).or_default();
        if data["restart"] == true {
            text.clear();
            self.restarts += 1;
        }
        assert_eq!(data["from_char"], text.chars().count(), "no gap and no overlap: {event}");
        text.push_str(data["text"].as_str().unwrap());
        self.deltas += 1;
    }

    /// Reads up to the event that closes the message, or anything else with a seq, and gives that.
    pub async fn read(&mut self, reader: &mut Socket) -> Value {
        loop {
            let event = reader.recv_type("event").await;
            if event["seq"].is_u64() {
                return event;
            }
            self.take(&event);
        }
    }

    /// Reads until it has the text.
    pub async fn read_up_to(&mut self, reader: &mut Socket, message: &str, text: &str) {
        while self.texts.get(message).is_none_or(|so_far| so_far != text) {
            self.take(&reader.recv_type("event").await);
        }
    }
}

on_both_logs!(deltas_reach_readers_live_and_become_one_event_with_their_text, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let mut reader = server.connect("scout").await;
    reader.subscribe("t", None).await;
    let first = agent.ask(delta("t", "r", "m", 0, "Hé")).await;
    assert_eq!((&first["message"], &first["to_char"], first.get("seq")), (&json!("m"), &json!(2), None), "{first}");
    let event = reader.recv_type("event").await;
    has(
        &event,
        json!({"data": {"message": "m", "from_char": 0, "text": "Hé"}, "run": "r", "from": "scout", "event": first["event"]}),
    );
    let answers = play(&mut agent, &[delta("t", "r", "m", 2, "llo, "), delta("t", "r", "m", 7, "🌍!")]).await;
    assert_eq!(answers.iter().map(|it| it["to_char"].as_u64().unwrap()).collect::<Vec<_>>(), [7, 9]);
    assert_eq!(answers[0]["event"], answers[1]["event"], "they came together and are one record");
    assert_eq!(reader.recv_type("event").await["data"], json!({"message": "m", "from_char": 2, "text": "llo, 🌍!"}));
    let closed = agent.ask(step("t", "r", "agent_message", json!({"message": "m", "mood": "fine"}))).await;
    assert_eq!(closed["seq"], 2, "deltas take no seq: {closed}");
    let event = reader.recv_type("event").await;
    assert_eq!(event["data"], json!({"message": "m", "mood": "fine", "content": "Héllo, 🌍!"}));
    agent.ask(step("t", "r", "agent_completed", json!({}))).await;
    let page = server.http("GET", "/v1/threads/t/events", "scout", None).await.1;
    let kinds: Vec<_> = page["events"].as_array().unwrap().iter().map(|event| event["kind"].clone()).collect();
    assert_eq!(kinds, ["agent_started", "agent_message", "agent_completed"], "history has the message alone");
    assert_eq!(page["events"][1]["data"]["content"], "Héllo, 🌍!");
});

on_both_logs!(the_end_of_a_run_closes_what_it_left_open_in_the_order_it_was_begun, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    start(&mut agent, "t", "other").await;
    let deltas = [
        delta("t", "r", "z", 0, "begun first"),
        delta("t", "r", "a", 0, "begun"),
        delta("t", "other", "a", 0, "another run's"),
        delta("t", "r", "a", 5, " second"),
    ];
    for command in &deltas {
        accepted(&agent.ask(command.clone()).await);
    }
    let ended = agent.ask(step("t", "r", "agent_failed", json!({"code": "broken", "message": "it broke"}))).await;
    assert_eq!(ended["seq"], 5, "the messages come before the end: {ended}");
    let page = server.http("GET", "/v1/threads/t/events?after=2", "scout", None).await.1;
    let got: Vec<_> = page["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| {
            (it["kind"].as_str().unwrap(), it["data"]["message"].as_str().unwrap(), &it["data"]["content"], &it["run"])
        })
        .collect();
    let r = json!("r");
    assert_eq!(
        got,
        [
            ("agent_message", "z", &json!("begun first"), &r),
            ("agent_message", "a", &json!("begun second"), &r),
            ("agent_failed", "it broke", &Value::Null, &r)
        ]
    );
    let late = agent.ask(delta("t", "r", "a", 12, "!")).await;
    refused(&late, "run_order", "kind");
});

on_both_logs!(a_delta_sent_again_is_harmless_a_hole_is_run_order_and_a_dead_letter, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    let early = agent.ask(delta("t", "r", "m", 0, "x")).await;
    refused_with(&early, "run_order");
    start(&mut agent, "t", "r").await;
    for (from, text, to) in [(0, "abcdef", 6), (0, "abc", 3), (3, "def", 6), (4, "efgh", 8)] {
        let answer = agent.ask(delta("t", "r", "m", from, text)).await;
        has(&answer, json!({"type": "published", "to_char": to}));
        assert_eq!(answer["duplicate"], to <= 6 && (from, text) != (0, "abcdef"), "{answer}");
    }
    let hole = agent.ask(delta("t", "r", "m", 9, "x")).await;
    refused(&hole, "run_order", "data.from_char");
    assert!(hole["message"].as_str().unwrap().contains("from character 8"), "{hole}");
    let letters = server.admin("GET", "/v1/dead-letters?reason=run_order").await.1;
    let items = letters["items"].as_array().unwrap();
    assert_eq!(items.len(), 2, "{letters}");
    assert_eq!(items[0]["event"]["data"], json!({"message": "m", "from_char": 9, "text": "x"}));
    let close = step("t", "r", "agent_message", json!({"message": "m", "content": "abcdefgh"}));
    let closed = agent.ask(close.clone()).await;
    has(&closed, json!({"seq": 2, "duplicate": false}));
    // After a close whose answer was lost everything is sent again.
    let again = agent.ask(delta("t", "r", "m", 0, "abcdefgh")).await;
    has(&again, json!({"type": "published", "duplicate": true}));
    let again = agent.ask(close).await;
    has(&again, json!({"seq": 2, "event": closed["event"], "duplicate": true}));
    let other = agent.ask(step("t", "r", "agent_message", json!({"message": "m", "content": "else"}))).await;
    refused(&other, "conflict", "data.message");
    let more = agent.ask(delta("t", "r", "m", 8, "i")).await;
    refused(&more, "run_order", "data.message");
    let none = agent.ask(step("t", "r", "agent_message", json!({"message": "unknown"}))).await;
    refused(&none, "run_order", "data.message");
});

on_both_logs!(a_member_who_is_no_agent_cannot_close_an_agent_s_message, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ada", "scout", None).await.0, 201);
    agent.ask(delta("t", "r", "m", 0, "still ")).await;
    let mut ada = server.connect("ada").await;
    for data in [json!({"message": "m"}), json!({"message": "m", "content": "mine"})] {
        let rejection = ada.ask(step("t", "r", "agent_message", data)).await;
        refused(&rejection, "forbidden", "kind");
    }
    // An inbox is written to by whoever may, and that makes nobody an agent either.
    let mut inbox = server.connect_as("scout", AGENT).await;
    start(&mut inbox, "@user:ada", "r").await;
    inbox.ask(delta("@user:ada", "r", "m", 0, "for ada")).await;
    let rejection = ada.ask(step("@me", "r", "agent_message", json!({"message": "m", "content": "mine"}))).await;
    refused_with(&rejection, "forbidden");
    agent.ask(delta("t", "r", "m", 6, "open")).await;
    agent.ask(step("t", "r", "agent_message", json!({"message": "m"}))).await;
    let page = server.http("GET", "/v1/threads/t/events?after=2", "scout", None).await.1;
    let got: Vec<_> = page["events"].as_array().unwrap().iter().map(|it| &it["data"]["content"]).collect();
    assert_eq!(got, ["still open"]);
});

on_both_logs!(an_agent_that_gives_another_text_has_the_last_word_and_says_so, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let parts = |text: &str| json!([{"type": "text", "text": text}]);
    let cases = [
        (json!("draft"), Value::Null),
        (json!("final"), json!(true)),
        (parts("draft"), Value::Null),
        (parts("final"), json!(true)),
    ];
    for (n, (content, revised)) in cases.iter().enumerate() {
        let message = format!("m{n}");
        agent.ask(delta("t", "r", &message, 0, "draft")).await;
        // Without its run the message is still the one that this user writes.
        let close = publish("t", "agent_message", json!({"message": message, "content": content}));
        let closed = agent.ask(close).await;
        assert_eq!(closed["seq"], n + 2);
        let page = server.http("GET", &format!("/v1/threads/t/events?after={}", n + 1), "scout", None).await.1;
        let data = &page["events"][0]["data"];
        assert_eq!((&data["content"], &data["revised"]), (content, revised), "{data}");
    }
    agent.ask(step("t", "r", "agent_completed", json!({}))).await;
    let page = server.http("GET", "/v1/threads/t/events?kinds=agent_message", "scout", None).await.1;
    assert_eq!(page["events"].as_array().unwrap().len(), cases.len(), "the end closes none of them again");
});

on_both_logs!(who_joins_in_the_middle_gets_the_text_so_far_as_one_delta_and_then_the_rest, |log| async move {
    let mut server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    for n in 0..20 {
        agent.ask(delta("t", "r", "m", 2 * n, "ab")).await;
    }
    agent.ask(delta("t", "r", "n", 0, "")).await;
    // A crash forgets nothing.
    server.kill();
    server.up();
    server.ready().await;
    let mut agent = server.connect_as("scout", AGENT).await;
    let mut reader = server.connect("scout").await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(reader.recv_type("event").await["kind"], "agent_started");
    assert_eq!(reader.recv_type("caught_up").await["seq"], 1);
    let so_far = [reader.recv_type("event").await, reader.recv_type("event").await];
    let got: Vec<_> = so_far.iter().map(|it| &it["data"]).collect();
    let text = "ab".repeat(20);
    assert_eq!(
        got,
        [&json!({"message": "m", "from_char": 0, "text": text}), &json!({"message": "n", "from_char": 0, "text": ""})]
    );
    agent.ask(delta("t", "r", "m", 40, "!")).await;
    assert_eq!(reader.recv_type("event").await["data"], json!({"message": "m", "from_char": 40, "text": "!"}));
    agent.ask(step("t", "r", "agent_completed", json!({}))).await;
    let closed = reader.events(3).await;
    assert_eq!(seqs(&closed), [2, 3, 4]);
    assert_eq!(closed[0]["data"]["content"], format!("{text}!"));
    let mut later = server.connect("scout").await;
    later.subscribe("t", None).await;
    later.recv_type("caught_up").await;
    later.silent().await;
});

on_both_logs!(
    a_reader_that_wants_other_kinds_gets_no_deltas_and_one_that_wants_only_them_no_events,
    |log| async move {
        let server = Server::start(log);
        let mut agent = server.connect_as("scout", AGENT).await;
        start(&mut agent, "t", "r").await;
        agent.ask(delta("t", "r", "m", 0, "so far")).await;
        let mut without = server.connect("scout").await;
        let mut only = server.connect("scout").await;
        without.subscribe_with("t", json!({"kinds": ["agent_message"]})).await;
        only.subscribe_with("t", json!({"kinds": ["agent_token"]})).await;
        for reader in [&mut without, &mut only] {
            reader.recv_type("caught_up").await;
        }
        agent.ask(delta("t", "r", "m", 6, ", so good")).await;
        agent.ask(step("t", "r", "agent_message", json!({"message": "m"}))).await;
        assert_eq!(without.recv_type("event").await["data"]["content"], "so far, so good");
        let mut fold = Fold::default();
        fold.read_up_to(&mut only, "m", "so far, so good").await;
        assert_eq!(only.recv_type("position").await["seq"], 2);
    }
);

on_both_logs!(over_http_a_delta_is_answered_with_its_place_and_a_stream_has_it_without_an_id, |log| async move {
    let server = Server::start(log);
    let agent = token("scout", AGENT);
    let post = async |kind: &str, data: Value| {
        let body = json!({"kind": kind, "run": "r", "data": data});
        server.http_with("POST", "/v1/threads/t/events", &agent, Some(body), &[]).await
    };
    assert_eq!(post("agent_started", json!({"agent": "scout"})).await.0, 201);
    let mut stream = EventStream::of(&server, "t", "scout", "?after=0").await;
    let (status, first) = post("agent_token", json!({"message": "m", "from_char": 0, "text": "Hi"})).await;
    assert_eq!((status, &first["to_char"], first.get("seq")), (201, &json!(2), None), "{first}");
    let (status, again) = post("agent_token", json!({"message": "m", "from_char": 0, "text": "Hi"})).await;
    assert_eq!(status, 200, "{again}");
    has(&again, json!({"duplicate": true}));
    assert_eq!(stream.next().await.unwrap().id.as_deref(), Some("1"));
    let got = stream.next().await.unwrap();
    assert_eq!((&got.id, &got.json()["data"]["text"]), (&None, &json!("Hi")));
});

on_both_logs!(what_is_wrong_with_a_delta_is_named, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    for (data, field) in [
        (json!({"from_char": 0, "text": "x"}), "data.message"),
        (json!({"message": "", "from_char": 0, "text": "x"}), "data.message"),
        (json!({"message": "x".repeat(129), "from_char": 0, "text": "x"}), "data.message"),
        (json!({"message": "m", "text": "x"}), "data.from_char"),
        (json!({"message": "m", "from_char": -1, "text": "x"}), "data.from_char"),
        (json!({"message": "m", "from_char": u64::MAX, "text": "x"}), "data.from_char"),
        (json!({"message": "m", "from_char": 0}), "data.text"),
        (json!({"message": "m", "from_char": 0, "text": 1}), "data.text"),
        (json!({"message": "m", "from_char": 0, "text": "x", "more": 1}), "data.more"),
        (json!("x"), "data"),
    ] {
        let rejection = agent.ask(step("t", "r", "agent_token", data.clone())).await;
        refused(&rejection, "bad_request", field);
    }
    let mut command = delta("t", "r", "m", 0, "x");
    command["parent"] = json!(1);
    assert_eq!(agent.ask(command.clone()).await["field"], "parent");
    command.as_object_mut().unwrap().retain(|name, _| name != "parent" && name != "run");
    assert_eq!(agent.ask(command).await["field"], "run");
    let mut person = server.connect("ada").await;
    refused_with(&person.ask(delta("t", "r", "m", 0, "x")).await, "forbidden");
    let long = "x".repeat(60_000);
    for n in 0..18 {
        let answer = agent.ask(delta("t", "r", "long", n * long.len(), &long)).await;
        let expected = if n < 17 { "published" } else { "error" };
        assert_eq!(answer["type"], expected, "{n}: {answer}");
        if n == 17 {
            refused(&answer, "too_large", "data.text");
        }
    }
});

/// An agent whose run `r` has begun on `t`, and a reader who has seen that and wants no more.
pub async fn reader_without_credit(log: LogKind) -> (Server, Socket, Socket) {
    let server = Server::start_unlimited(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let mut reader = server.connect("scout").await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(reader.recv_type("event").await["kind"], "agent_started");
    (server, agent, reader)
}

#[tokio::test]
async fn a_reader_that_waits_gets_bigger_deltas_and_not_more() {
    const DELTAS: usize = 3_000;
    let (_server, mut agent, mut reader) = reader_without_credit(LogKind::embedded()).await;
    let word = "word ";
    let mut text = String::new();
    for chunk in 0..DELTAS / 100 {
        let deltas: Vec<Value> = (0..100).map(|n| delta("t", "r", "m", (chunk * 100 + n) * word.len(), word)).collect();
        let answers = play(&mut agent, &deltas).await;
        assert!(answers.iter().all(|it| it["type"] == "published"), "{answers:?}");
        text.push_str(&word.repeat(100));
    }
    reader.send(&json!({"type": "credit", "events": 8})).await;
    let mut fold = Fold::default();
    fold.read_up_to(&mut reader, "m", &text).await;
    assert!(fold.deltas <= 2, "{} deltas", fold.deltas);
}

on_both_logs!(a_reader_whose_outbox_is_full_of_deltas_goes_on_where_it_was_and_misses_none, |log| async move {
    const MESSAGES: usize = 40;
    let (server, mut agent, mut reader) = reader_without_credit(log).await;
    // One is got in part before the reader wants no more, and goes on.
    agent.ask(delta("t", "r", "m0", 0, "begun ")).await;
    reader.send(&json!({"type": "credit", "events": 1})).await;
    let mut fold = Fold::default();
    fold.read_up_to(&mut reader, "m0", "begun ").await;
    // Far more than an outbox holds.
    let text = "x".repeat(30_000);
    for n in 0..MESSAGES {
        let from = if n == 0 { 6 } else { 0 };
        accepted(&agent.ask(delta("t", "r", &format!("m{n}"), from, &text)).await);
    }
    reader.send(&json!({"type": "credit", "events": 1_000})).await;
    for n in 0..MESSAGES {
        let whole = if n == 0 { format!("begun {text}") } else { text.clone() };
        fold.read_up_to(&mut reader, &format!("m{n}"), &whole).await;
    }
    assert!(server.metric("weft_lagged_total").await >= 1.0, "the outbox is bounded, so the reader must have lagged");
    accepted(&agent.ask(delta("t", "r", "m1", text.len(), "!")).await);
    fold.read_up_to(&mut reader, "m1", &format!("{text}!")).await;
});

/// How a message of the fast agent is written: far more in all than what the kernel's buffers hold.
const FAST_MESSAGES: usize = 16;
const FAST_DELTAS: usize = 500;

/// The text of a fast agent's message.
fn fast_text(n: usize) -> String {
    format!("{n:04} {}", "some forty characters, again and again, ".repeat(40)).repeat(FAST_DELTAS)
}

/// Writes the messages one after the other, and closes all but the last.
async fn write_fast(agent: &mut Socket) {
    for n in 0..FAST_MESSAGES {
        let (text, message) = (fast_text(n), format!("m{n}"));
        let length = text.len() / FAST_DELTAS;
        let deltas: Vec<Value> =
            (0..FAST_DELTAS).map(|n| delta("t", "r", &message, n * length, &text[n * length..][..length])).collect();
        for some in deltas.chunks(100) {
            play(agent, some).await.iter().for_each(accepted);
        }
        if n + 1 < FAST_MESSAGES {
            accepted(&agent.ask(step("t", "r", "agent_message", json!({"message": message}))).await);
        }
    }
}

/// Reads all of it: of each closed message the event, and what came of it before; of the last one all of the text. Gives
/// how many connections that took.
async fn read_fast(server: &Server, user: &str, mut reader: Socket) -> usize {
    let (mut seq, mut fold, mut connections) = (1, Fold::default(), 1);
    let last_name = format!("m{}", FAST_MESSAGES - 1);
    let last_text = fast_text(FAST_MESSAGES - 1);
    while fold.texts.get(&last_name).is_none_or(|so_far| so_far.len() < last_text.len()) {
        let frame = match reader.next().await {
            Ok(frame) => frame,
            // On a slow machine a session that takes nothing for 30 s is given up. Its client resumes, with the texts so far.
            Err(code) => {
                assert!(matches!(code, 4001 | 4002 | 1006), "{code}");
                (reader, fold) = (server.connect_as(user, "analyst").await, Fold::default());
                reader.subscribe("t", Some(seq)).await;
                connections += 1;
                continue;
            }
        };
        match (frame["type"].as_str().unwrap(), frame["seq"].as_u64()) {
            ("event", Some(next)) => {
                assert_eq!(next, seq + 1, "{}", frame["kind"]);
                let message = frame["data"]["message"].as_str().unwrap();
                let whole = fast_text(seq as usize - 1);
                assert!(frame["data"]["content"] == *whole, "another text of {message}");
                assert!(
                    whole.starts_with(fold.texts.get(message).map_or("", |text| text)),
                    "other deltas of {message}"
                );
                seq = next;
            }
            ("event", None) => fold.take(&frame),
            ("lagged" | "caught_up" | "signal", _) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(fold.texts[&last_name] == last_text, "another text of the last message");
    assert_eq!(seq, FAST_MESSAGES as u64, "the start of the run and the closed messages");
    connections
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_faster_than_a_reader_that_does_not_read_slows_neither_the_others_nor_the_log() {
    let server = Arc::new(Server::start_unlimited(LogKind::embedded()));
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let mut stuck = Socket::open_with_small_buffer(&server.url, &token("stuck", "analyst")).await;
    stuck.subscribe("t", None).await;
    stuck.recv_type("caught_up").await;
    let mut reading = Vec::new();
    for user in ["ada", "ben"] {
        let mut reader = server.connect_as(user, "analyst").await;
        reader.subscribe("t", None).await;
        reader.recv_type("caught_up").await;
        let server = server.clone();
        reading.push(tokio::spawn(async move { read_fast(&server, user, reader).await }));
    }

    // Every delta is answered, and the others have all of it, before the one that is stuck has read a byte.
    write_fast(&mut agent).await;
    for reader in reading {
        assert_eq!(reader.await.unwrap(), 1, "without being cut off");
    }
    let sessions = server.admin("GET", "/v1/sessions?user=stuck").await.1;
    let waiting = sessions["sessions"][0]["outbox_bytes"].as_u64().unwrap_or_else(|| panic!("{sessions}"));
    assert!(waiting > 0, "its socket takes no more, so that something waits for it");

    // Now it reads, and gets all of it.
    stuck.enlarge_buffer();
    read_fast(&server, "stuck", stuck).await;
}

on_both_logs!(who_subscribes_while_messages_are_closed_gets_no_delta_behind_the_end_of_its_message, |log| async move {
    const MESSAGES: usize = 1_000;
    let server = Server::start_unlimited(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let mut reader = server.connect("scout").await;
    let writing = tokio::spawn(async move {
        for n in 0..MESSAGES {
            let message = format!("{n}");
            let close = step("t", "r", "agent_message", json!({"message": message}));
            let deltas = [delta("t", "r", &message, 0, "begun"), delta("t", "r", &message, 5, " and over"), close];
            assert!(play(&mut agent, &deltas).await.iter().all(|it| it["type"] == "published"));
        }
    });
    let mut joined = 0;
    while !writing.is_finished() {
        // The n-th message is closed by event n + 2.
        let mut seq = reader.subscribe("t", None).await["head"].as_u64().unwrap();
        let mut fold = Fold::default();
        let mut until = "caught_up";
        loop {
            let frame = reader.recv().await;
            match (frame["type"].as_str().unwrap(), frame["seq"].as_u64()) {
                ("event", Some(next)) => {
                    assert_eq!(next, seq + 1, "{frame}");
                    seq = next;
                }
                ("event", None) => {
                    let message: u64 = frame["data"]["message"].as_str().unwrap().parse().unwrap();
                    assert!(message + 2 > seq, "closed before {seq}: {frame}");
                    fold.take(&frame);
                }
                (what, _) if what == until && until == "caught_up" => {
                    // What is live by now comes before the answer.
                    reader.send(&json!({"type": "unsubscribe", "id": 5, "thread": "t"})).await;
                    until = "unsubscribed";
                }
                (what, _) if what == until => break,
                other => panic!("{other:?}: {frame}"),
            }
        }
        joined += 1;
    }
    writing.await.unwrap();
    assert!(joined > 1, "{joined}");
});

/// How a message is written: deltas that go back a little, leave a hole, or begin the message anew.
#[derive(Debug, Clone)]
struct Script {
    text: String,
    /// For each delta: characters that it repeats (or, negative, leaves out), its length, and whether it begins anew.
    deltas: Vec<(i64, usize, bool)>,
    /// Deltas sent together.
    together: usize,
    /// Closed by its own event, or by the end of the run.
    closes: bool,
}

fn scripts() -> impl Strategy<Value = Script> {
    let text = prop::collection::vec(
        prop_oneof![4 => prop::char::range('a', 'z'), 1 => prop::sample::select(vec!['é', '🌍', '"', '\\', '\n', '\u{301}'])],
        0..120,
    );
    let back = prop_oneof![3 => Just(0), 2 => 0..10i64, 1 => -3..0i64];
    let deltas = prop::collection::vec((back, 0..20usize, prop::bool::weighted(0.15)), 1..30);
    (text, deltas, 1..8usize, any::<bool>()).prop_map(|(text, deltas, together, closes)| Script {
        text: text.into_iter().collect(),
        deltas,
        together,
        closes,
    })
}

async fn every_reader_folds_the_text(server: &Server, thread: &str, script: &Script) {
    let mut chars: Vec<char> = script.text.chars().collect();
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, thread, "r").await;
    let mut live = server.connect("scout").await;
    live.subscribe(thread, None).await;
    live.recv_type("caught_up").await;
    let (mut written, mut commands, mut expected) = (0, Vec::new(), Vec::new());
    for (back, length, restart) in &script.deltas {
        if *restart {
            // Another text from here on, whose characters stand elsewhere.
            written = 0;
            chars.iter_mut().for_each(|c| *c = if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { 'z' });
            let by = chars.len() / 3;
            chars.rotate_left(by);
        }
        let from = if *restart { 0 } else { (written as i64 - back).clamp(0, chars.len() as i64) as usize };
        let to = (from + length).min(chars.len());
        let text: String = chars[from..to].iter().collect();
        let mut command = delta(thread, "r", "m", from, &text);
        if *restart {
            command["data"]["restart"] = json!(true);
        }
        commands.push(command);
        expected.push(from <= written);
        if from <= written {
            written = written.max(to);
        }
    }
    // A message that was never begun cannot be closed.
    let begun = expected.iter().any(|taken| *taken);
    let mut joins = None;
    for (n, part) in commands.chunks(script.together).enumerate() {
        let answers = play(&mut agent, part).await;
        for (answer, command) in answers.iter().zip(part) {
            let taken = expected.remove(0);
            let data = &command["data"];
            let to = data["from_char"].as_u64().unwrap() + data["text"].as_str().unwrap().chars().count() as u64;
            match taken {
                true => has(answer, json!({"type": "published", "to_char": to})),
                false => assert_eq!(answer["code"], "run_order", "{answer}"),
            }
        }
        if n == 1 {
            let mut reader = server.connect("scout").await;
            reader.subscribe(thread, None).await;
            joins = Some(reader);
        }
    }
    let whole: String = chars[..written].iter().collect();
    if script.closes && begun {
        agent.ask(step(thread, "r", "agent_message", json!({"message": "m"}))).await;
    } else {
        agent.ask(step(thread, "r", "agent_completed", json!({}))).await;
    }
    if !begun {
        return;
    }
    for (reader, joined) in
        [(Some(live), false), (joins, true)].iter_mut().filter_map(|(it, joined)| Some((it.as_mut()?, *joined)))
    {
        let mut fold = Fold::default();
        let closed = fold.read(reader).await;
        assert_eq!((&closed["kind"], &closed["data"]["content"]), (&json!("agent_message"), &json!(whole)), "{closed}");
        // Who joined while it was being closed may have got the event alone.
        let got = fold.texts.get("m").map_or("", |text| text);
        assert!(got == whole || (got.is_empty() && joined), "{got:?} of {whole:?}");
    }
}

fn check(log: LogKind, cases: u32) {
    on_threads(log, cases, scripts(), every_reader_folds_the_text);
}

#[test]
fn for_any_split_and_resend_the_deltas_fold_to_the_message() {
    check(LogKind::embedded(), 64);
}

#[test]
fn for_any_split_and_resend_the_deltas_fold_to_the_message_on_kafka() {
    check(LogKind::kafka(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_shows_the_same_deltas_and_the_same_message() {
    let log = LogKind::kafka();
    let nodes = [(); 2].map(|()| Server::start(log.clone()));
    let mut agent = nodes[0].connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    agent.ask(delta("t", "r", "m", 0, "one ")).await;
    let there = async || nodes[1].http("GET", "/v1/threads/t/runs/r", "scout", None).await.0 == 200;
    eventually("the other node has the run", there).await;
    let mut reader = nodes[1].connect("scout").await;
    reader.subscribe("t", None).await;
    let mut fold = Fold::default();
    fold.read_up_to(&mut reader, "m", "one ").await;
    // The agent goes on at the other node.
    let mut agent = nodes[1].connect_as("scout", AGENT).await;
    agent.ask(delta("t", "r", "m", 4, "two")).await;
    agent.ask(step("t", "r", "agent_completed", json!({}))).await;
    let closed = fold.read(&mut reader).await;
    assert_eq!((&fold.texts["m"], &closed["data"]["content"]), (&"one two".to_owned(), &json!("one two")));
    let mut pages = Vec::new();
    for node in &nodes {
        eventually("the run has ended", async || {
            node.http("GET", "/v1/threads/t/runs/r", "scout", None).await.1["state"] == "completed"
        })
        .await;
        let detail = node.http("GET", "/v1/threads/t", "scout", None).await.1;
        pages.push((node.http("GET", "/v1/threads/t/events", "scout", None).await.1, detail["hash"].clone()));
    }
    assert_eq!(pages[0], pages[1], "the event that closes the message is the same, hash included");
}
