//! What goes wrong around a server: a second node, a broker that stops, readers that stop, kills in the middle of a publish.
//! [`durable`], [`confirm`], [`dead_letters`], [`letter_acts`], [`requeued`] and [`flow`] are about readers that come back, fail, or take their time,
//! [`brokers`] about Kafka as it is run in production, [`level`] about two nodes and what one of them has answered, [`memory`]
//! about those that ask for much, [`plain`] about other programs that write to the log, [`panics`] and [`poison`] about
//! what is not to happen at all.

mod brokers;
mod confirm;
pub mod dead_letters;
mod durable;
mod flow;
pub mod letter_acts;
mod level;
mod memory;
mod panics;
mod plain;
mod poison;
mod requeued;

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use weft::delivery::outbox::EVENT_BYTES;

use crate::connection::tickets;
use crate::on_both_logs;
use crate::support::kafka::{self, Broker, fresh_prefix};
use crate::support::{
    LogKind, PATIENCE, Server, Socket, accepted, eventually, has, publish, refused, refused_with, seqs, token, weft,
};

const CONSUMER: &str = "org.apache.kafka.tools.consumer.ConsoleConsumer";

/// A server's answer to `GET /v1/threads/{thread}`.
async fn thread(server: &Server, thread: &str, user: &str) -> Value {
    server.http("GET", &format!("/v1/threads/{thread}"), user, None).await.1
}

/// How far members have come in a thread, as this one of them sees it.
async fn receipts(server: &Server, thread: &str, user: &str) -> Vec<Value> {
    let (status, page) = server.http("GET", &format!("/v1/threads/{thread}/receipts"), user, None).await;
    assert_eq!(status, 200, "{page}");
    page["receipts"].as_array().unwrap().clone()
}

/// Publishes so many events, a hundred at a time.
async fn write(mut socket: Socket, thread: &str, events: usize) {
    for _ in 0..events / 100 {
        let commands: Vec<Value> = (0..100)
            .map(|id| {
                let mut command = publish(thread, "x.load", json!({"n": id}));
                command["id"] = json!(id);
                command
            })
            .collect();
        socket.send(&Value::Array(commands)).await;
        for _ in 0..100 {
            accepted(&socket.recv().await);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_on_one_broker_serve_one_thread_in_one_order_with_one_set_of_keys_and_members() {
    const EVENTS: usize = 400;
    let log = LogKind::kafka();
    let (a, b) = (Server::start(log.clone()), Server::start(log));
    assert_ne!(a.data(), b.data());
    let members = json!({"members": ["ben", "cid"]});
    assert_eq!(a.http("PUT", "/v1/threads/t", "ada", Some(members)).await.0, 201);
    eventually("B knows the thread", async || b.http("GET", "/v1/threads/t", "ben", None).await.0 == 200).await;

    let mut readers = Vec::new();
    for (server, user) in [(&a, "ada"), (&a, "ben"), (&b, "ada"), (&b, "ben")] {
        let mut reader = server.connect(user).await;
        reader.subscribe("t", Some(0)).await;
        readers.push(reader);
    }
    tokio::join!(write(a.connect("ada").await, "t", EVENTS), write(b.connect("ben").await, "t", EVENTS));
    let total = 1 + 2 * EVENTS as u64;
    let mut seen: Vec<Vec<Value>> = Vec::new();
    for reader in &mut readers {
        seen.push(reader.events(total as usize).await);
    }
    assert_eq!(seqs(&seen[0]), (1..=total).collect::<Vec<_>>());
    for others in &seen[1..] {
        assert!(others == &seen[0], "every reader on either node gets the same frames");
    }
    for user in ["ada", "ben"] {
        let by = seen[0].iter().filter(|event| event["kind"] == "x.load" && event["from"] == user).count();
        assert_eq!(by, EVENTS, "each event of {user} once");
    }

    let keyed = |content: &str| {
        let mut command = publish("t", "user_message", json!({"content": content}));
        command["key"] = json!("k");
        command
    };
    let first = a.connect("ada").await.ask(keyed("once")).await;
    has(&first, json!({"seq": total + 1, "duplicate": false}));
    let again = b.connect("ada").await.ask(keyed("once")).await;
    has(&again, json!({"seq": first["seq"], "event": first["event"], "duplicate": true}));
    refused_with(&b.connect("ada").await.ask(keyed("twice")).await, "conflict");

    let mut cid = b.connect("cid").await;
    cid.subscribe("t", None).await;
    assert_eq!(cid.recv_type("caught_up").await["seq"], total + 1);
    assert_eq!(a.http("DELETE", "/v1/threads/t/members/cid", "ada", None).await.0, 200);
    assert_eq!(a.connect("ada").await.say("t", "without cid").await, total + 3);
    // Once ben has it on B, B has it from the log, and the removal before it.
    for reader in &mut readers[2..] {
        assert_eq!(seqs(&reader.events(3).await), [total + 1, total + 2, total + 3]);
    }
    let got = cid.recv().await;
    has(&got, json!({"type": "error", "thread": "t", "code": "not_found"}));
    cid.send(&json!({"type": "ping", "id": 1})).await;
    assert_eq!(cid.recv().await["type"], "pong", "nothing of the thread came in between");

    let (on_a, on_b) = (thread(&a, "t", "ada").await, thread(&b, "t", "ada").await);
    assert_eq!((on_a["head"].as_u64(), on_a["hash"].as_str().map(str::len)), (Some(total + 3), Some(64)), "{on_a}");
    assert_eq!(on_a, on_b, "one hash, one head, one epoch");
}

/// What Kafka's console consumer prints of a topic: partition, headers, key and value of so many records.
fn consumed(brokers: &str, topic: &str, records: usize) -> Vec<(u32, String, String, String)> {
    let count = records.to_string();
    let options = [
        "--bootstrap-server",
        brokers,
        "--topic",
        topic,
        "--from-beginning",
        "--max-messages",
        &count,
        "--property",
        "print.partition=true",
        "--property",
        "print.headers=true",
        "--property",
        "print.key=true",
    ];
    let out = kafka::tool(CONSUMER, &options, "");
    out.lines()
        .map(|line| {
            let mut columns = line.splitn(4, '\t').map(str::to_owned);
            let mut next = || columns.next().unwrap_or_else(|| panic!("four columns in {line:?}"));
            (next().trim_start_matches("Partition:").parse().unwrap(), next(), next(), next())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafkas_console_consumer_shows_each_event_as_readable_json_keyed_tenant_slash_thread() {
    let log = LogKind::kafka();
    let LogKind::Kafka { brokers, prefix } = log.clone() else { unreachable!("it is Kafka") };
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    ada.say("lunch", "Grüße, 世界").await;
    let mut note = publish("lunch", "x.note", json!({"n": [1, 2.5, null]}));
    note["key"] = json!("k1");
    note["priority"] = json!("high");
    assert_eq!(ada.ask(note).await["seq"], 2);
    assert_eq!(server.http("PUT", "/v1/threads/lunch/members/ben", "ada", None).await.0, 201);

    let ticket = tickets::get(&server, "ada").await;
    assert!(tickets::enter(&server, &ticket).await.is_ok());

    // Those of the ticket, and the record that names the log.
    let mut events = consumed(&brokers, &format!("{prefix}events"), 3 + 2 + 1);
    let of_ticket: Vec<_> = events.extract_if(.., |(.., key, _)| key.starts_with("ticket:")).collect();
    events.retain(|(_, headers, ..)| !headers.contains("weft-kind:log_created"));
    let digest = weft::protocol::tickets::owner("acme", "ada");
    let shown: Vec<Value> = of_ticket.iter().map(|(.., value)| serde_json::from_str(value).unwrap()).collect();
    for ((partition, headers, key, _), (value, kind)) in
        of_ticket.iter().zip(shown.iter().zip(["ticket_issued", "ticket_used"]))
    {
        assert_eq!((*partition, key.as_str()), (of_ticket[0].0, &*weft::protocol::tickets::log_key(&digest)));
        assert!(headers.contains(&format!("weft-kind:{kind}")), "{headers}");
        assert_eq!((&value["kind"], &value["hash"]), (&json!(kind), &shown[0]["hash"]));
        crate::support::schemas::check(&format!("log.{}", kind.replace('_', "-")), value);
    }
    assert_eq!((shown.len(), &shown[0]["user"]), (2, &json!("ada")), "{shown:?}");
    let wanted = [
        ("user_message", json!({"content": "Grüße, 世界"})),
        ("x.note", json!({"n": [1, 2.5, null]})),
        ("member_added", json!({"user": "ben"})),
    ];
    assert_eq!(events.len(), wanted.len(), "{events:?}");
    for ((partition, headers, key, value), (kind, data)) in events.iter().zip(wanted) {
        assert_eq!((*partition, key.as_str()), (events[0].0, "acme/lunch"), "a thread is in one partition");
        let headers: Vec<&str> = headers.split(',').collect();
        assert!(headers.contains(&format!("weft-kind:{kind}").as_str()), "{headers:?}");
        assert!(headers.contains(&format!("weft-version:{}", weft::log::RULES).as_str()), "{headers:?}");
        let event: Value = serde_json::from_str(value).unwrap();
        assert_eq!(
            (&event["tenant"], &event["thread"], &event["kind"], &event["from"], &event["data"]),
            (&json!("acme"), &json!("lunch"), &json!(kind), &json!("ada"), &data)
        );
        assert!(event["seq"].is_null(), "the log gives the order, the projector the number: {event}");
        assert!(weft::clock::parse_rfc3339(event["at"].as_str().unwrap()).is_some() && event["event"].is_string());
    }
    assert!(events[0].3.contains("Grüße, 世界"), "text is written as text: {}", events[0].3);
    assert!(events[1].3.contains(r#""key":"k1""#) && events[1].3.contains(r#""priority":"high""#), "{}", events[1].3);
}

/// Writes what the server wrote once more, into a partition of our choosing.
fn write_again(brokers: &str, topic: &str, partition: u32, key: &str, value: &str) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let header = |key, value| Header { key, value: Some(value) };
    let headers = OwnedHeaders::new()
        .insert(header("weft-kind", "user_message"))
        .insert(header("weft-version", "1"))
        .insert(header("weft-grant", "member"));
    let record = BaseRecord::to(topic).partition(partition as i32).key(key).payload(value).headers(headers);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_another_program_put_into_a_partition_not_its_keys_is_not_ours_and_stops_nobody() {
    let log = LogKind::kafka();
    let LogKind::Kafka { brokers, prefix } = log.clone() else { unreachable!("it is Kafka") };
    let topic = format!("{prefix}events");
    let server = Server::start_with(log, &["--partitions", "2"]);
    let mut command = publish("t", "user_message", json!({"content": "hello"}));
    command["key"] = json!("k");
    assert_eq!(server.connect("ada").await.ask(command).await["seq"], 1);
    let records = consumed(&brokers, &topic, 2);
    let (right, _, key, value) = records.into_iter().find(|(_, _, key, _)| key == "acme/t").unwrap();

    // A copy of it, a minute older, and one without a key: in the right partition they would be a repetition and an event.
    let mut copy: Value = serde_json::from_str(&value).unwrap();
    let at = weft::clock::parse_rfc3339(copy["at"].as_str().unwrap()).unwrap();
    copy["at"] = json!(weft::clock::rfc3339(at - 60_000));
    write_again(&brokers, &topic, 1 - right, &key, &copy.to_string());
    copy.as_object_mut().unwrap().remove("key");
    copy["event"] = json!(weft::clock::event_id());
    write_again(&brokers, &topic, 1 - right, &key, &copy.to_string());

    eventually("both are seen", async || server.metric("weft_foreign_records_total").await == 2.0).await;
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "and on it goes").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_taken_for_24_hours_of_log_time_and_free_after_that_and_one_record_from_the_future_changes_nothing() {
    const HOUR: u64 = 3_600_000;
    let log = LogKind::kafka();
    let LogKind::Kafka { brokers, prefix } = log.clone() else { unreachable!("it is Kafka") };
    let topic = format!("{prefix}events");
    let server = Server::start_with(log, &["--partitions", "1"]);
    let mut ada = server.connect("ada").await;
    let keyed = |content: &str| {
        let mut command = publish("t", "user_message", json!({"content": content}));
        command["key"] = json!("k");
        command
    };
    assert_eq!(ada.ask(keyed("first")).await["seq"], 1);
    let (partition, _, key, value) =
        consumed(&brokers, &topic, 2).into_iter().find(|(_, _, key, _)| key == "acme/t").unwrap();
    let first: Value = serde_json::from_str(&value).unwrap();
    let taken_at = weft::clock::parse_rfc3339(first["at"].as_str().unwrap()).unwrap();
    // Records of a node whose clock is ahead move the log's time; it takes two that agree.
    let mut ahead = first.clone();
    ahead.as_object_mut().unwrap().remove("key");
    let mut append_at = |at: u64, times: usize| {
        ahead["at"] = json!(weft::clock::rfc3339(at));
        for _ in 0..times {
            ahead["event"] = json!(weft::clock::event_id());
            write_again(&brokers, &topic, partition, &key, &ahead.to_string());
        }
    };
    let head = async || server.http("GET", "/v1/threads/t", "ada", None).await.1["head"].clone();

    // One alone moves nothing: the clock of its node may be wrong.
    append_at(taken_at + 48 * HOUR, 1);
    eventually("a record from the future is there", async || head().await == 2).await;
    let again = ada.ask(keyed("first")).await;
    has(&again, json!({"seq": 1, "duplicate": true, "event": first["event"]}));

    append_at(taken_at + 23 * HOUR, 2);
    eventually("23 hours have passed in the log", async || head().await == 4).await;
    let again = ada.ask(keyed("first")).await;
    has(&again, json!({"seq": 1, "duplicate": true, "event": first["event"]}));
    refused(&ada.ask(keyed("another")).await, "conflict", "key");

    append_at(taken_at + 25 * HOUR, 2);
    eventually("25 hours have passed in the log", async || head().await == 6).await;
    let later = ada.ask(keyed("another")).await;
    has(&later, json!({"seq": 7, "duplicate": false}));
    refused(&ada.ask(keyed("first")).await, "conflict", "key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_its_broker_is_silent_a_server_says_so_and_still_reads_and_afterwards_takes_the_same_key_once() {
    let broker = Broker::own();
    let server = Server::start(LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() });
    server.ready().await;
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "before").await, 1);
    let mut keyed = publish("t", "user_message", json!({"content": "meanwhile"}));
    keyed["key"] = json!("k");

    broker.pause();
    let answer = tokio::time::timeout(Duration::from_secs(10), ada.ask(keyed.clone())).await.expect("an answer");
    let got = (answer["type"].as_str(), answer["code"].as_str(), answer["outcome"].as_str());
    assert!(
        matches!(got, (Some("error"), Some("timeout"), Some("unknown")) | (Some("error"), Some("unavailable"), None)),
        "{answer}"
    );
    assert_eq!(answer["temporary"], true, "{answer}");

    let ready = async || server.http("GET", "/readyz", "x", None).await;
    eventually("the log is known to be away", async || ready().await.1["log"]["ok"] == false).await;
    let (status, parts) = ready().await;
    assert_eq!((status, &parts["ready"], &parts["store"]["ok"]), (503, &json!(false), &json!(true)), "{parts}");
    assert!(parts["log"]["error"].as_str().is_some_and(|why| why.contains("Kafka")), "{parts}");
    // How far it lags nobody knows now; the figure from before would be wrong.
    eventually("the lag is unknown", async || ready().await.1["projector"]["lag_records"].is_null()).await;
    eventually("the metric says so", async || server.metric("weft_lag_records").await.is_nan()).await;
    for (purpose, expected) in [("read", 200), ("write", 503)] {
        let (status, parts) = server.http("GET", &format!("/readyz?for={purpose}"), "x", None).await;
        assert_eq!(status, expected, "{purpose}: {parts}");
        assert_eq!(parts["ready_for"], json!({"read": true, "write": false}), "{parts}");
    }
    assert_eq!(server.http("GET", "/healthz", "x", None).await.0, 200, "alive, though not ready");

    // What is known to be away is refused at once, and never appears.
    let rejection = ada.ask(publish("t", "user_message", json!({"content": "refused"}))).await;
    has(&rejection, json!({"code": "unavailable", "temporary": true}));
    let body = json!({"kind": "user_message", "data": {"content": "refused"}});
    let (_, problem) = server.http("POST", "/v1/threads/t/events", "ada", Some(body)).await;
    refused_with(&problem, "unavailable");

    let page = server.http("GET", "/v1/threads/t/events", "ada", None).await.1;
    assert_eq!(page["events"][0]["data"]["content"], "before", "{page}");
    let mut reader = server.connect("ada").await;
    reader.subscribe("t", Some(0)).await;
    assert_eq!(seqs(&reader.events(1).await), [1]);
    assert_eq!(reader.recv_type("caught_up").await["seq"], 1);

    broker.resume();
    eventually("it is ready again", async || ready().await.0 == 200).await;
    eventually("the lag is known again", async || ready().await.1["projector"]["lag_records"] == 0).await;
    let mut last = Value::Null;
    eventually("the same key works", async || {
        last = ada.ask(keyed.clone()).await;
        last["type"] == "published"
    })
    .await;
    assert_eq!(last["seq"], 2, "{last}");
    assert_eq!(ada.say("t", "after").await, 3, "nothing else appeared");
    let events = reader.events(2).await;
    assert_eq!(seqs(&events), [2, 3]);
    has(&events[0], json!({"key": "k", "event": last["event"]}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_broker_is_down_does_not_start_and_says_why_and_starts_when_it_is_back() {
    let broker = Broker::own();
    let mut server = Server::start(LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() });
    assert_eq!(server.connect("ada").await.say("t", "kept").await, 1);
    server.stop().await;
    broker.stop();
    let output = weft()
        .args(["serve", "--listen", "127.0.0.1:0", "--jwt-secret", crate::support::SECRET, "--data"])
        .arg(server.data())
        .args(server.log().arguments())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the log is unavailable"), "{said}");
    assert!(output.stdout.is_empty(), "it did not say that it is up");
    broker.start();
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "and on").await, 2);
}

/// Publishes so many events, in arrays of a thousand, four of them under way at once.
async fn pour(writer: &mut Socket, thread: &str, events: u64) {
    let text = "x".repeat(140);
    let command = json!({"type": "publish", "id": 1, "thread": thread, "kind": "x.load", "data": {"text": text}});
    let commands = Value::Array(vec![command; 1_000]).to_string();
    let (mut sent, mut answered) = (0, 0);
    while answered < events {
        while sent < events && sent - answered < 4_000 {
            writer.send_text(&commands).await;
            sent += 1_000;
        }
        let frame = writer.recv().await;
        accepted(&frame);
        answered += 1;
    }
}

/// A queue without a bound would have to hold nearly a million frames of more than 300 bytes, each with what a queue needs
/// for it: more than 350 MB (the kernel's socket buffers take 10 MB at most). What may differ between the two
/// measurements has bounds of its own and is mostly full before the first one: RocksDB's memtables (64 MB of the store's; of
/// the log's 32 MB, and while a flush lasts up to three times that more), its block cache (64 MB) and the log's tail (16 MB).
const GROWTH: f64 = 150e6;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_reading_while_a_million_events_pass_costs_no_more_than_its_bound_and_then_gets_them_all() {
    const EVENTS: u64 = 1_000_000;
    const BEFORE: u64 = 300_000;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    pour(&mut writer, "t", BEFORE).await;
    let mut reader = server.connect("ada").await;
    assert_eq!(reader.subscribe("t", Some(BEFORE)).await["head"], BEFORE);
    reader.recv_type("caught_up").await;

    let memory = async || server.metric("process_resident_memory_bytes").await;
    let before = memory().await;
    let mut peak = before;
    for _ in 0..EVENTS / 50_000 {
        pour(&mut writer, "t", 50_000).await;
        peak = peak.max(memory().await);
        let waiting = server.metric("weft_outbox_bytes").await;
        assert!(waiting <= EVENT_BYTES as f64, "{waiting} bytes wait for one reader");
    }
    assert!(server.metric("weft_lagged_total").await >= 1.0, "the reader did lag");
    assert!(peak - before < GROWTH, "from {before} to {peak} bytes");

    let (mut expected, last) = (BEFORE + 1, BEFORE + EVENTS);
    while expected <= last {
        match reader.next().await {
            Ok(frame) => match frame["type"].as_str().unwrap() {
                "event" => {
                    assert_eq!(frame["seq"], expected);
                    expected += 1;
                }
                "lagged" => assert_eq!(frame["from"], expected),
                "caught_up" => {}
                other => panic!("{other}: {frame}"),
            },
            // On a slow machine it was given up: nothing taken for 30 s (such a socket takes no close frame either), or no
            // answer to a ping. Its client resumes.
            Err(code) => {
                assert!(matches!(code, 4001 | 4002 | 1006), "{code}");
                reader = server.connect("ada").await;
                reader.subscribe("t", Some(expected - 1)).await;
            }
        }
    }
    // The writer has answered no ping meanwhile.
    let mut writer = server.connect("ada").await;
    assert_eq!(writer.say("t", "the next one").await, last + 1);
    assert_eq!(seqs(&reader.events(1).await), [last + 1], "and it is live again");
}

/// The upgrade and nothing after it: who reads here sees pings, and nobody answers them.
async fn half_open(server: &Server, user: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    let request = format!(
        "GET /v1/ws HTTP/1.1\r\nHost: weft\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {}\r\n\r\n",
        token(user, "")
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream
}

/// The next frame as it is on the wire: its opcode and its payload.
async fn raw_frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let read = async {
        let first = stream.read_u8().await.unwrap();
        let length = match stream.read_u8().await.unwrap() {
            126 => usize::from(stream.read_u16().await.unwrap()),
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.unwrap();
        (first & 0x0f, payload)
    };
    tokio::time::timeout(PATIENCE, read).await.expect("a frame")
}

#[tokio::test]
async fn a_client_that_answers_no_ping_is_closed_4002_and_one_that_only_listens_stays() {
    const TEXT: u8 = 1;
    const CLOSE: u8 = 8;
    const PING: u8 = 9;
    let server = Server::start(LogKind::embedded());
    // First, so that whatever time the other one gets, this one had it before.
    let mut listener = server.connect("ada").await;
    let mut silent = half_open(&server, "ada").await;
    let end = async {
        assert_eq!(raw_frame(&mut silent).await.0, TEXT, "the welcome");
        assert_eq!(raw_frame(&mut silent).await, (PING, vec![]));
        let (opcode, payload) = raw_frame(&mut silent).await;
        (opcode, u16::from_be_bytes([payload[0], payload[1]]))
    };
    let mut pings = 0;
    let listen = async {
        // Reading is what answers pings.
        loop {
            match listener.ws.next().await {
                Some(Ok(Message::Ping(_))) => pings += 1,
                other => panic!("{other:?}"),
            }
        }
    };
    let end = tokio::select! {
        end = end => end,
        () = listen => unreachable!("it listens for ever"),
    };
    assert_eq!(end, (CLOSE, 4002));
    assert!(pings >= 1, "the listener was pinged as well");
    listener.answers().await;
}

on_both_logs!(publishes_cut_off_by_a_kill_and_sent_again_with_their_keys_are_in_effect_once, |log| async move {
    const ROUNDS: u64 = 5;
    const EVENTS: u64 = 2_000;
    let mut server = Server::start(log);
    server.connect("ada").await.say("t", "begin").await;
    for round in 0..ROUNDS {
        let commands: Vec<Value> = (0..EVENTS)
            .map(|n| {
                let mut command = publish("t", "x.load", json!({"n": n}));
                (command["id"], command["key"]) = (json!(n), json!(format!("{round}-{n}")));
                command
            })
            .collect();
        let frames: Vec<Value> = commands.chunks(1_000).map(|chunk| Value::Array(chunk.to_vec())).collect();
        let mut cut_off = server.connect("ada").await;
        for frame in &frames {
            cut_off.send(frame).await;
        }
        // Some answers are here, the others under way or not yet made.
        let mut got = BTreeMap::new();
        let mut note = |frame: Value| {
            accepted(&frame);
            got.insert(frame["id"].as_u64().unwrap(), frame["seq"].clone());
        };
        for _ in 0..=round * 20 {
            note(cut_off.recv().await);
        }
        server.kill();
        while let Ok(frame) = cut_off.next().await {
            note(frame);
        }
        server.up();
        server.ready().await;
        let mut again = server.connect("ada").await;
        for frame in &frames {
            again.send(frame).await;
        }
        for _ in 0..EVENTS {
            let answer = again.recv().await;
            accepted(&answer);
            if let Some(seq) = got.get(&answer["id"].as_u64().unwrap()) {
                assert_eq!((&answer["seq"], &answer["duplicate"]), (seq, &json!(true)), "{answer}");
            }
        }
    }
    let mut reader = server.connect("ada").await;
    assert_eq!(reader.subscribe("t", Some(0)).await["head"], 1 + ROUNDS * EVENTS);
    let events = reader.events((1 + ROUNDS * EVENTS) as usize).await;
    assert_eq!(seqs(&events), (1..=1 + ROUNDS * EVENTS).collect::<Vec<_>>());
    let mut keys: Vec<&str> = events.iter().filter_map(|event| event["key"].as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len() as u64, ROUNDS * EVENTS, "each key once");
});
