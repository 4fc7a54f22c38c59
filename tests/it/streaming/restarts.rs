//! Messages that are begun anew while they are written: what the log makes of that, and that no reader has text of before
//! and after together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::runs::{AGENT, step};
use super::tokens::{Fold, delta, play, reader_without_credit, start};
use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, Server, Socket, accepted, has, refused, refused_with, token};

/// A delta that begins its message anew.
fn restart(thread: &str, run: &str, message: &str, text: &str) -> Value {
    let mut command = delta(thread, run, message, 0, text);
    command["data"]["restart"] = json!(true);
    command
}

fn close(message: &str) -> Value {
    step("t", "r", "agent_message", json!({"message": message}))
}

/// The message's text as it is closed, which is all that history has of it.
async fn closed_text(server: &Server, agent: &mut Socket, message: &str) -> Value {
    let closed = agent.ask(close(message)).await;
    accepted(&closed);
    let after = closed["seq"].as_u64().unwrap() - 1;
    let page = server.http("GET", &format!("/v1/threads/t/events?after={after}"), "scout", None).await.1;
    assert_eq!(page["events"].as_array().unwrap().len(), 1, "{page}");
    page["events"][0]["data"]["content"].clone()
}

on_both_logs!(a_message_begun_anew_drops_its_text_and_readers_see_that, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let mut reader = server.connect("scout").await;
    reader.subscribe("t", None).await;
    reader.recv_type("caught_up").await;
    for (command, to_char, seen) in [
        // Of a message that was not begun it is the beginning, and `false` is as absent.
        (restart("t", "r", "m", "The cat"), 7, json!({"message": "m", "from_char": 0, "text": "The cat"})),
        (restart("t", "r", "m", "The"), 3, json!({"message": "m", "from_char": 0, "text": "The", "restart": true})),
        (delta("t", "r", "m", 3, " dog"), 7, json!({"message": "m", "from_char": 3, "text": " dog"})),
        (restart("t", "r", "m", ""), 0, json!({"message": "m", "from_char": 0, "text": "", "restart": true})),
        (restart("t", "r", "m", ""), 0, json!({"message": "m", "from_char": 0, "text": "", "restart": true})),
        (delta("t", "r", "m", 0, "A c"), 3, json!({"message": "m", "from_char": 0, "text": "A c"})),
    ] {
        let answer = agent.ask(command).await;
        has(&answer, json!({"type": "published", "message": "m", "to_char": to_char, "duplicate": false}));
        assert_eq!(reader.recv_type("event").await["data"], seen);
    }
    let mut plain = delta("t", "r", "m", 3, "ow");
    plain["data"]["restart"] = json!(false);
    accepted(&agent.ask(plain).await);
    assert_eq!(reader.recv_type("event").await["data"], json!({"message": "m", "from_char": 3, "text": "ow"}));
    let page = server.http("GET", "/v1/threads/t/runs/r", "scout", None).await.1;
    has(&page["messages"][0], json!({"message": "m", "chars": 5}));
    assert_eq!(closed_text(&server, &mut agent, "m").await, "A cow");
    assert_eq!(reader.recv_type("event").await["data"]["content"], "A cow");
    let context = server.http("GET", "/v1/threads/t/context", "scout", None).await.1;
    assert_eq!(context.as_array().unwrap().len(), 1, "{context}");
    assert_eq!(context[0]["content"], "A cow");
    // As with any delta that comes late: what is there is a duplicate, more is refused.
    has(&agent.ask(restart("t", "r", "m", "A cow")).await, json!({"type": "published", "duplicate": true}));
    refused(&agent.ask(restart("t", "r", "m", "Another cow")).await, "run_order", "data.message");
    // The end of the run closes what was begun anew with the new text alone.
    for command in [delta("t", "r", "n", 0, "old text"), restart("t", "r", "n", "new")] {
        accepted(&agent.ask(command).await);
    }
    accepted(&agent.ask(step("t", "r", "agent_completed", json!({}))).await);
    let page = server.http("GET", "/v1/threads/t/events?after=2", "scout", None).await.1;
    assert_eq!(page["events"][0]["data"], json!({"message": "n", "content": "new"}));
    refused(&agent.ask(restart("t", "r", "n", "newer")).await, "run_order", "kind");
});

on_both_logs!(what_was_sent_together_is_judged_in_its_order_and_the_new_text_is_one_record, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    let sent = [
        delta("t", "r", "m", 0, "The"),
        delta("t", "r", "m", 3, " cat"),
        restart("t", "r", "m", "A "),
        delta("t", "r", "m", 2, "dog"),
        restart("t", "r", "m", "A c"),
        delta("t", "r", "m", 3, "ow"),
    ];
    let answers = play(&mut agent, &sent).await;
    let ends: Vec<_> = answers.iter().map(|it| it["to_char"].as_u64().unwrap_or_else(|| panic!("{it}"))).collect();
    assert_eq!(ends, [3, 7, 2, 5, 3, 5]);
    for pair in answers.chunks(2) {
        assert_eq!(pair[0]["event"], pair[1]["event"], "one record");
    }
    assert_ne!(answers[1]["event"], answers[2]["event"], "a restart begins a record");
    // A delta of the text before that comes after it, by another session.
    let mut other = server.connect_as("other", AGENT).await;
    let late = other.ask(delta("t", "r", "m", 7, " sat")).await;
    refused(&late, "run_order", "data.from_char");
    assert!(late["message"].as_str().unwrap().contains("from character 5"), "{late}");
    assert_eq!(closed_text(&server, &mut agent, "m").await, "A cow");
});

#[tokio::test]
async fn what_is_wrong_with_a_restart_is_named() {
    let server = Server::start(LogKind::embedded());
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    accepted(&agent.ask(delta("t", "r", "m", 0, "so far")).await);
    for (data, field) in [
        (json!({"message": "m", "from_char": 0, "text": "x", "restart": 1}), "data.restart"),
        (json!({"message": "m", "from_char": 0, "text": "x", "restart": "true"}), "data.restart"),
        (json!({"message": "m", "from_char": 0, "text": "x", "restart": null}), "data.restart"),
        (json!({"message": "m", "from_char": 6, "text": "x", "restart": true}), "data.from_char"),
        (json!({"message": "m", "text": "x", "restart": true}), "data.from_char"),
    ] {
        refused(&agent.ask(step("t", "r", "agent_token", data.clone())).await, "bad_request", field);
        let body = json!({"kind": "agent_token", "run": "r", "data": data});
        let (status, problem) =
            server.http_with("POST", "/v1/threads/t/events", &token("scout", AGENT), Some(body), &[]).await;
        assert_eq!((status, &problem["field"]), (400, &json!(field)), "{problem}");
    }
    let mut person = server.connect("scout").await;
    refused_with(&person.ask(restart("t", "r", "m", "mine")).await, "forbidden");
    let body = json!({"kind": "agent_token", "run": "r", "data": restart("t", "r", "m", "by HTTP")["data"]});
    let (status, answer) =
        server.http_with("POST", "/v1/threads/t/events", &token("scout", AGENT), Some(body), &[]).await;
    assert_eq!((status, &answer["to_char"], &answer["duplicate"]), (201, &json!(7), &json!(false)), "{answer}");
    assert_eq!(closed_text(&server, &mut agent, "m").await, "by HTTP");
}

on_both_logs!(who_joins_or_comes_back_gets_the_new_text_alone, |log| async move {
    let mut server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    for command in [
        delta("t", "r", "m", 0, "a long text of before"),
        restart("t", "r", "m", "ne"),
        delta("t", "r", "m", 2, "w"),
        delta("t", "r", "n", 0, "old"),
        restart("t", "r", "n", ""),
    ] {
        accepted(&agent.ask(command).await);
    }
    // A crash forgets nothing.
    server.kill();
    server.up();
    server.ready().await;
    let mut agent = server.connect_as("scout", AGENT).await;
    let mut reader = server.connect("scout").await;
    reader.subscribe("t", Some(0)).await;
    reader.recv_type("caught_up").await;
    let got = [reader.recv_type("event").await, reader.recv_type("event").await];
    let got: Vec<_> = got.iter().map(|it| &it["data"]).collect();
    let so_far =
        [json!({"message": "m", "from_char": 0, "text": "new"}), json!({"message": "n", "from_char": 0, "text": ""})];
    assert_eq!(got, so_far.iter().collect::<Vec<_>>());
    accepted(&agent.ask(delta("t", "r", "m", 3, "er")).await);
    assert_eq!(reader.recv_type("event").await["data"], json!({"message": "m", "from_char": 3, "text": "er"}));
    accepted(&agent.ask(restart("t", "r", "m", "newest")).await);
    let data = json!({"message": "m", "from_char": 0, "text": "newest", "restart": true});
    assert_eq!(reader.recv_type("event").await["data"], data);
});

#[tokio::test]
async fn deltas_of_two_texts_that_wait_for_a_reader_are_not_joined() {
    let (server, mut agent, mut reader) = reader_without_credit(LogKind::embedded()).await;
    // Deltas are handed out after they are answered, and to the reader before the witness, which came later.
    let mut witness = server.connect("scout").await;
    witness.subscribe("t", None).await;
    witness.recv_type("caught_up").await;
    let sent = [
        delta("t", "r", "m", 0, ""),
        restart("t", "r", "m", "ab"),
        delta("t", "r", "m", 2, "cd"),
        restart("t", "r", "m", "xyz"),
        delta("t", "r", "m", 3, "!"),
    ];
    for command in sent {
        accepted(&agent.ask(command).await);
    }
    Fold::default().read_up_to(&mut witness, "m", "xyz!").await;
    reader.send(&json!({"type": "credit", "events": 8})).await;
    let mut got = Vec::new();
    for _ in 0..3 {
        got.push(reader.recv_type("event").await["data"].clone());
    }
    assert_eq!(
        got,
        [
            json!({"message": "m", "from_char": 0, "text": ""}),
            json!({"message": "m", "from_char": 0, "text": "abcd", "restart": true}),
            json!({"message": "m", "from_char": 0, "text": "xyz!", "restart": true}),
        ]
    );
}

on_both_logs!(a_reader_that_lags_while_messages_are_begun_anew_ends_with_the_new_text, |log| async move {
    const MESSAGES: usize = 40;
    let (server, mut agent, mut reader) = reader_without_credit(log).await;
    // Of these the reader has six characters before it wants no more: the new texts are shorter, as long, longer, empty.
    let new = ["new", "as new", "much newer", ""];
    let names: Vec<String> = (0..new.len()).map(|n| format!("old{n}")).collect();
    let mut fold = Fold::default();
    for name in &names {
        accepted(&agent.ask(delta("t", "r", name, 0, "before")).await);
        reader.send(&json!({"type": "credit", "events": 1})).await;
        fold.read_up_to(&mut reader, name, "before").await;
    }
    // Far more than an outbox holds, with restarts before and after it is full.
    let text = "x".repeat(30_000);
    accepted(&agent.ask(restart("t", "r", &names[0], "not for long")).await);
    for n in 0..MESSAGES {
        accepted(&agent.ask(delta("t", "r", &format!("m{n}"), 0, &text)).await);
    }
    for (name, new) in names.iter().zip(new) {
        accepted(&agent.ask(restart("t", "r", name, "not this either")).await);
        accepted(&agent.ask(restart("t", "r", name, new)).await);
    }
    reader.send(&json!({"type": "credit", "events": 1_000})).await;
    for n in 0..MESSAGES {
        fold.read_up_to(&mut reader, &format!("m{n}"), &text).await;
    }
    for (name, new) in names.iter().zip(new) {
        fold.read_up_to(&mut reader, name, new).await;
    }
    assert!(server.metric("weft_lagged_total").await >= 1.0, "the outbox is bounded, so the reader must have lagged");
    for (name, new) in names.iter().zip(new) {
        accepted(&agent.ask(delta("t", "r", name, new.len(), "!")).await);
        fold.read_up_to(&mut reader, name, &format!("{new}!")).await;
    }
});

/// The text that a message has after so many restarts: each of another length, and each other at every character.
fn nth_text(n: usize) -> String {
    let letter = char::from(b'a' + (n % 26) as u8);
    format!("{n}:{}", letter.to_string().repeat(1 + n * 7 % 40))
}

/// Holds each text of a reader against those that the message ever had.
fn check(fold: &Fold) {
    let Some(text) = fold.texts.get("m").filter(|text| text.contains(':')) else { return };
    let n: usize = text.split(':').next().unwrap().parse().unwrap();
    assert!(nth_text(n).starts_with(text), "{text:?} of {:?}", nth_text(n));
}

on_both_logs!(who_subscribes_while_a_message_is_begun_anew_again_and_again_never_mixes_its_texts, |log| async move {
    const RESTARTS: usize = 400;
    let server = Server::start_unlimited(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    accepted(&agent.ask(delta("t", "r", "m", 0, &nth_text(0))).await);
    let done = Arc::new(AtomicBool::new(false));
    let mut stays = server.connect("scout").await;
    stays.subscribe("t", None).await;
    let last = nth_text(RESTARTS);
    let read_all = async |reader: &mut Socket, fold: &mut Fold| {
        while fold.texts.get("m").is_none_or(|text| *text != last) {
            fold.take(&reader.recv_type("event").await);
            check(fold);
        }
    };
    let writing = tokio::spawn({
        let done = done.clone();
        async move {
            for n in 1..=RESTARTS {
                let text = nth_text(n);
                let (head, rest) = text.split_at(text.len() / 2);
                let both = [restart("t", "r", "m", head), delta("t", "r", "m", head.len(), rest)];
                play(&mut agent, &both).await.iter().for_each(accepted);
            }
            done.store(true, Ordering::Relaxed);
            agent
        }
    });
    let mut joined = 0;
    let mut reader = server.connect("scout").await;
    while !done.load(Ordering::Relaxed) {
        let mut fold = Fold::default();
        reader.subscribe("t", None).await;
        reader.recv_type("caught_up").await;
        while fold.restarts < 2 && !done.load(Ordering::Relaxed) {
            fold.take(&reader.recv_type("event").await);
            check(&fold);
        }
        reader.send(&json!({"type": "unsubscribe", "id": 5, "thread": "t"})).await;
        while reader.recv().await["type"] != "unsubscribed" {}
        joined += 1;
    }
    assert!(joined > 1, "{joined}");
    let _agent = writing.await.unwrap();
    read_all(&mut stays, &mut Fold::default()).await;
    let mut fold = Fold::default();
    reader.subscribe("t", None).await;
    read_all(&mut reader, &mut fold).await;
    assert_eq!((fold.texts["m"].as_str(), fold.restarts), (&*last, 0), "all of it at once");
});

/// What comes up to and with the first AG-UI event of this type, without ids of events.
async fn agui_until(stream: &mut EventStream, last: &str) -> Vec<String> {
    let mut got = Vec::new();
    loop {
        let event = stream.next().await.unwrap_or_else(|| panic!("the end, after {got:?}")).json();
        let fields = [&event["type"], &event["messageId"], &event["delta"], &event["metadata"]["replaces"]];
        let fields: Vec<_> = fields.iter().filter_map(|it| it.as_str()).collect();
        got.push(fields.join(" "));
        if event["type"] == last {
            return got;
        }
    }
}

on_both_logs!(streams_have_the_new_text_alone_and_agui_as_a_message_that_replaces_the_other, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    start(&mut agent, "t", "r").await;
    accepted(&agent.ask(delta("t", "r", "m", 0, "The cat")).await);
    let mut stream = EventStream::of(&server, "t", "scout", "?after=1").await;
    let agui = async |query: &str| {
        let path = format!("/v1/threads/t/agui{query}");
        EventStream::open(&server, &path, &token("scout", AGENT), &[]).await.ok().unwrap()
    };
    let mut live = agui("?run=r").await;
    assert_eq!(stream.next().await.unwrap().json()["data"]["text"], "The cat");
    let begin = ["RUN_STARTED", "TEXT_MESSAGE_START r/m", "TEXT_MESSAGE_CONTENT r/m The cat"];
    assert_eq!(agui_until(&mut live, "TEXT_MESSAGE_CONTENT").await, begin);
    accepted(&agent.ask(restart("t", "r", "m", "A d")).await);
    let block = stream.next().await.unwrap();
    let data = json!({"message": "m", "from_char": 0, "text": "A d", "restart": true});
    assert_eq!((&block.id, &block.json()["data"]), (&None, &data));
    let anew = ["TEXT_MESSAGE_END r/m", "TEXT_MESSAGE_START r/m/1 r/m", "TEXT_MESSAGE_CONTENT r/m/1 A d"];
    assert_eq!(agui_until(&mut live, "TEXT_MESSAGE_CONTENT").await, anew);

    // Who comes back meanwhile finds it under the same id.
    let mut back = agui("?run=r&after=1").await;
    let so_far = ["RUN_STARTED", "TEXT_MESSAGE_START r/m/1 r/m", "TEXT_MESSAGE_CONTENT r/m/1 A d"];
    assert_eq!(agui_until(&mut back, "TEXT_MESSAGE_CONTENT").await, so_far);
    let mut again = EventStream::of(&server, "t", "scout", "?after=1").await;
    let data = json!({"message": "m", "from_char": 0, "text": "A d"});
    assert_eq!(again.next().await.unwrap().json()["data"], data);
    accepted(&agent.ask(delta("t", "r", "m", 3, "og")).await);
    accepted(&agent.ask(close("m")).await);
    let end = ["TEXT_MESSAGE_CONTENT r/m/1 og", "TEXT_MESSAGE_END r/m/1"];
    for stream in [&mut live, &mut back] {
        assert_eq!(agui_until(stream, "TEXT_MESSAGE_END").await, end);
    }
    // And so does who reads it from history alone.
    accepted(&agent.ask(step("t", "r", "agent_completed", json!({}))).await);
    let mut whole = agui("?run=r&after=0").await;
    let expected = ["RUN_STARTED", "TEXT_MESSAGE_START r/m/1 r/m", "TEXT_MESSAGE_CONTENT r/m/1 A dog"];
    assert_eq!(agui_until(&mut whole, "TEXT_MESSAGE_CONTENT").await, expected);
});
