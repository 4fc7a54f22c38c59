//! Whose event goes first when a client lets events wait.
//!
//! What holds: of eight turns six are the highest priority's, one the lowest's, one the one between; the turn is that of the
//! thread whose waiting events include that priority, and it gives its oldest. From the store the threads are read in the
//! same spirit, some events at a time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::caught_up;
use crate::support::{LogKind, Server, Socket, publish, seqs};

/// Publishes events of these priorities, all in one frame.
async fn write(writer: &mut Socket, thread: &str, priorities: &[&str]) {
    let command = |(n, priority): (usize, &&str)| {
        let mut command = publish(thread, "x.n", json!({"n": n}));
        command["id"] = json!(1_000_000 + n);
        command["priority"] = json!(priority);
        command
    };
    for part in priorities.iter().enumerate().map(command).collect::<Vec<_>>().chunks(1_000) {
        writer.send(&Value::Array(part.to_vec())).await;
        for _ in part {
            writer.recv_type("published").await;
        }
    }
}

async fn credit(reader: &mut Socket, events: u64) {
    reader.send(&json!({"type": "credit", "events": events})).await;
}

fn name_of(event: &Value) -> String {
    event["thread"].as_str().unwrap().to_owned()
}

/// Where in `order` the events of a thread are.
fn turns_of(order: &[String], thread: &str) -> Vec<usize> {
    (0..order.len()).filter(|at| order[*at] == thread).collect()
}

/// A thread's events must come in the order of their seqs, whatever goes before them.
fn assert_in_order(events: &[Value], begun: &BTreeMap<&str, u64>) {
    let mut last = begun.clone();
    for event in events {
        let seq = last.get_mut(event["thread"].as_str().unwrap()).unwrap();
        *seq += 1;
        assert_eq!(event["seq"], *seq, "{event}");
    }
}

/// A reader that is live in threads `a`, `b` and `c` and has no credit left. Each thread has one event, and `a` the one that
/// took the credit.
struct Waiting {
    _server: Server,
    writer: Socket,
    reader: Socket,
    /// It came after the reader and takes everything.
    witness: Socket,
    begun: BTreeMap<&'static str, u64>,
}

impl Waiting {
    /// Returns once so many events that were written wait for the reader. `published` does not say so, since events are handed
    /// out after it; but they are handed to readers in the order in which these came, so the witness has none before.
    async fn has(&mut self, written: usize) {
        self.witness.events(written).await;
    }
}

async fn waiting_reader() -> Waiting {
    let server = Server::start(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    let mut reader = server.connect("ada").await;
    for thread in ["a", "b", "c"] {
        writer.say(thread, "first").await;
        reader.subscribe(thread, None).await;
        caught_up(&mut reader, thread).await;
    }
    credit(&mut reader, 1).await;
    reader.answers().await;
    let mut witness = server.connect("ada").await;
    for thread in ["a", "b", "c"] {
        witness.subscribe(thread, None).await;
        caught_up(&mut witness, thread).await;
    }
    writer.say("a", "uses the credit").await;
    assert_eq!(seqs(&reader.events(1).await), [2]);
    assert_eq!(seqs(&witness.events(1).await), [2]);
    let begun = BTreeMap::from([("a", 2), ("b", 1), ("c", 1)]);
    Waiting { _server: server, writer, reader, witness, begun }
}

#[tokio::test]
async fn with_credit_the_thread_with_the_highest_priority_comes_first_in_its_own_order() {
    let mut it = waiting_reader().await;
    write(&mut it.writer, "a", &["low"; 8]).await;
    write(&mut it.writer, "b", &["normal"; 8]).await;
    write(&mut it.writer, "c", &["normal", "normal", "normal", "high", "normal"]).await;
    it.has(21).await;
    // While nothing may be sent, nothing is.
    it.reader.answers().await;
    credit(&mut it.reader, 21).await;
    let events = it.reader.events(21).await;
    assert_in_order(&events, &it.begun);
    let order: Vec<String> = events.iter().map(name_of).collect();
    // Up to its high event `c` goes before all others, who have two turns of eight among them.
    assert!(turns_of(&order, "c")[3] <= 5, "{order:?}");
    // What is left of `c` and all of `b` is of one priority and goes as it came; `a` has one turn of eight until then.
    let (low, normal) = (turns_of(&order, "a"), turns_of(&order, "b"));
    let before = low.iter().filter(|at| **at < normal[7]).count();
    assert!((1..=3).contains(&before), "{order:?}");
}

#[tokio::test]
async fn events_without_a_priority_are_normal() {
    let mut it = waiting_reader().await;
    write(&mut it.writer, "a", &["low"; 2]).await;
    for content in ["one", "two"] {
        it.writer.say("b", content).await;
    }
    write(&mut it.writer, "c", &["normal"; 2]).await;
    it.has(6).await;
    credit(&mut it.reader, 6).await;
    let events = it.reader.events(6).await;
    assert_in_order(&events, &it.begun);
    let order: Vec<String> = events.iter().filter(|event| event["thread"] != "a").map(name_of).collect();
    assert_eq!(order, ["b", "b", "c", "c"]);
    assert!(turns_of(&events.iter().map(name_of).collect::<Vec<_>>(), "b")[1] <= 2);
}

#[tokio::test]
async fn under_a_flood_of_high_priority_low_and_normal_have_a_turn_of_eight_each() {
    let mut it = waiting_reader().await;
    write(&mut it.writer, "c", &["high"; 100]).await;
    write(&mut it.writer, "a", &["low"; 30]).await;
    write(&mut it.writer, "b", &["normal"; 30]).await;
    // More of the flood, after all that waits.
    write(&mut it.writer, "c", &["high"; 100]).await;
    it.has(260).await;
    credit(&mut it.reader, 160).await;
    let events = it.reader.events(160).await;
    assert_in_order(&events, &it.begun);
    let order: Vec<String> = events.iter().map(name_of).collect();
    for thread in ["a", "b"] {
        let turns = turns_of(&order, thread);
        assert_eq!(turns.len(), 20, "{thread}: {turns:?}");
        assert!(turns.windows(2).all(|two| two[1] - two[0] == 8), "{thread}: {turns:?}");
    }
}

#[tokio::test]
async fn a_client_that_asks_for_one_event_at_a_time_gets_the_same_turns() {
    let mut it = waiting_reader().await;
    write(&mut it.writer, "c", &["high"; 200]).await;
    write(&mut it.writer, "a", &["low"; 30]).await;
    write(&mut it.writer, "b", &["normal"; 30]).await;
    it.has(260).await;
    let mut events = Vec::new();
    for n in 0..160 {
        credit(&mut it.reader, 1).await;
        events.extend(it.reader.events(1).await);
        // Other traffic on the socket takes nobody's turn.
        for _ in 0..n % 3 {
            it.reader.answers().await;
        }
    }
    assert_in_order(&events, &it.begun);
    let order: Vec<String> = events.iter().map(name_of).collect();
    for thread in ["a", "b"] {
        let turns = turns_of(&order, thread);
        assert!(turns.len() == 20 && turns.windows(2).all(|two| two[1] - two[0] == 8), "{thread}: {turns:?}");
    }
}

/// Events of each of three threads that are far longer than what is read at once: `a` is low, `b` normal, and `c` normal but
/// for its last.
const LONG: u64 = 6_000;

/// A server with these threads.
async fn long_threads() -> (Server, Socket) {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    write(&mut writer, "a", &["low"; LONG as usize]).await;
    write(&mut writer, "b", &["normal"; LONG as usize]).await;
    write(&mut writer, "c", &["normal"; LONG as usize - 1]).await;
    write(&mut writer, "c", &["high"]).await;
    (server, writer)
}

#[tokio::test]
async fn from_the_store_a_thread_of_low_priority_is_read_last_and_not_starved() {
    let (server, _writer) = long_threads().await;
    let begun = BTreeMap::from([("a", 0), ("b", 0), ("c", 0)]);
    for star in [true, false] {
        let mut reader = server.connect("ada").await;
        if star {
            reader.ask(json!({"type": "subscribe", "thread": "*", "after": {"a": 0, "b": 0, "c": 0}})).await;
        } else {
            // In one frame, so that all have begun before anything is read.
            let subscribe =
                |(id, thread): (u64, &str)| json!({"type": "subscribe", "id": id, "thread": thread, "after": 0});
            let commands: Vec<Value> = [(1, "a"), (2, "b"), (3, "c")].map(subscribe).to_vec();
            reader.send(&Value::Array(commands)).await;
        }
        let mut events = Vec::new();
        let mut order = Vec::new();
        while order.len() < 3 * LONG as usize {
            let event = reader.recv_type("event").await;
            order.push(name_of(&event));
            events.push(event);
        }
        assert_in_order(&events, &begun);
        let high = order.iter().rposition(|thread| thread == "c").unwrap();
        let low = turns_of(&order[..high], "a").len();
        // One read of eight is of the lowest priority.
        assert!((1..=LONG as usize / 2).contains(&low), "{low} events of low priority before the last one of high");
        let others = turns_of(&order, "b").len();
        assert_eq!(others, LONG as usize);
    }
}

#[tokio::test]
async fn from_the_store_each_credit_brings_one_event_in_its_threads_order_and_none_is_starved() {
    let (server, mut writer) = long_threads().await;
    let mut reader = server.connect("ada").await;
    credit(&mut reader, 1).await;
    reader.ask(json!({"type": "subscribe", "thread": "*", "after": {}})).await;
    let mut events = reader.events(1).await;
    for n in 0..239 {
        if n == 100 {
            write(&mut writer, "b", &["high"; 3]).await;
        }
        credit(&mut reader, 1).await;
        events.extend(reader.events(1).await);
    }
    assert_in_order(&events, &BTreeMap::from([("a", 0), ("b", 0), ("c", 0)]));
    let order: Vec<String> = events.iter().map(name_of).collect();
    let turns = ["a", "b", "c"].map(|thread| turns_of(&order, thread).len());
    assert!(turns[0] > 0, "low has its share: {turns:?}");
    assert!(turns[0] < turns[2] && turns[0] < turns[1], "and it is the smallest: {turns:?}");
    // No event comes without credit: what is next is the answer.
    reader.send(&json!({"type": "ping", "id": 99})).await;
    assert_eq!(reader.recv().await["type"], "pong");
}

#[tokio::test]
async fn a_thread_that_is_level_goes_live_while_others_of_mixed_priorities_are_still_replayed() {
    const EVENTS: u64 = 60_000;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    // Far more than the sockets' buffers hold, so that something always waits.
    let text = "x".repeat(400);
    let command = |n: u64| {
        let mut command = publish("long", "x.n", json!({"text": text}));
        (command["id"], command["priority"]) = (json!(1_000_000 + n), json!(["low", "high"][n as usize % 2]));
        command
    };
    for _ in 0..EVENTS / 400 {
        writer.send(&Value::Array((0..400).map(command).collect())).await;
        for _ in 0..400 {
            writer.recv_type("published").await;
        }
    }
    writer.say("short", "first").await;
    let mut reader = server.connect("ada").await;
    reader.subscribe("long", Some(0)).await;
    reader.subscribe("short", None).await;
    let mut replayed = 0;
    loop {
        let frame = reader.recv().await;
        match (frame["type"].as_str().unwrap(), frame["thread"].as_str().unwrap()) {
            ("caught_up", "short") => break,
            ("event", "long") => replayed += 1,
            other => panic!("{other:?}: {frame}"),
        }
    }
    assert!(replayed < EVENTS / 2, "only after {replayed} events of the other thread");
}
