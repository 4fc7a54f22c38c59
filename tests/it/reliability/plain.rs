//! Events that another language's plain producer writes into Kafka's topic, without any of Weft's headers.

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use weft::clock;

use super::dead_letters::{get, list, rebuilt, root_of};
use super::letter_acts::{discard, id_of, post};
use crate::log_contract::only_kafka::{create_topic, produce};
use crate::support::{LogKind, PATIENCE, Server, eventually, has, refused};

/// A producer as its own language's library sets it up, but for the partitioner, which is Java's.
struct Plain {
    producer: BaseProducer,
    topic: String,
}

impl Plain {
    fn new(log: &LogKind) -> Plain {
        let LogKind::Kafka { brokers, .. } = log else { unreachable!("it is Kafka") };
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers).set("partitioner", "murmur2_random");
        Plain { producer: config.create().unwrap(), topic: log.topic("events") }
    }

    fn send_with(&self, key: &str, value: &str, headers: &[(&str, &str)]) {
        let mut record = BaseRecord::to(&self.topic).key(key).payload(value);
        if !headers.is_empty() {
            let header = |headers: OwnedHeaders, (key, value): &(&str, &str)| {
                headers.insert(Header { key, value: Some(*value) })
            };
            record = record.headers(headers.iter().fold(OwnedHeaders::new(), header));
        }
        self.producer.send(record).map_err(|(error, _)| error).unwrap();
        self.producer.flush(PATIENCE).unwrap();
    }

    fn send(&self, event: &Value) {
        let key = format!("{}/{}", event["tenant"].as_str().unwrap(), event["thread"].as_str().unwrap());
        self.send_with(&key, &event.to_string(), &[]);
    }
}

fn event(thread: &str, content: &str) -> Value {
    json!({
        "tenant": "acme", "thread": thread, "kind": "user_message", "event": clock::event_id(), "from": "erp",
        "at": clock::rfc3339(clock::now_ms()), "data": {"content": content},
    })
}

fn changed(thread: &str, field: &str, value: Value) -> Value {
    let mut event = event(thread, "as it was");
    event[field] = value;
    event
}

async fn letters(server: &Server, count: usize) -> Vec<Value> {
    let acme = root_of("acme");
    eventually("the letters are there", async || list(server, &acme, "").await.len() == count).await;
    list(server, &acme, "").await
}

async fn head(server: &Server, thread: &str) -> Value {
    server.admin("GET", &format!("/v1/threads/{thread}")).await.1["head"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plain_producer_writes_is_an_event_and_what_no_client_could_publish_is_a_letter_with_its_field() {
    let log = LogKind::kafka();
    let mut server = Server::start(log.clone());
    server.ready().await;
    let (plain, acme) = (Plain::new(&log), root_of("acme"));
    // Of threads that nobody has written to, in partitions that may be empty.
    for n in 0..8 {
        plain.send(&event(&format!("new-{n}"), "from elsewhere"));
    }
    for n in 0..8 {
        eventually("it is a thread", async || head(&server, &format!("new-{n}")).await == 1).await;
    }
    let mut erp = server.connect("erp").await;
    erp.subscribe_with("new-0", json!({"after": 0})).await;
    has(&erp.events(1).await[0], json!({"seq": 1, "from": "erp", "data": {"content": "from elsewhere"}}));
    let mut system = changed("new-0", "kind", json!("system_message"));
    system["key"] = json!("k1");
    plain.send(&system);
    plain.send(&system);
    has(&erp.events(1).await[0], json!({"seq": 2, "kind": "system_message", "key": "k1"}));
    assert_eq!(erp.say("new-0", "and on").await, 3, "a key counts once");
    has(&erp.events(1).await[0], json!({"seq": 3}));

    let broken = [
        ("data", json!({"text": "no content"}), "data.content"),
        ("kind", json!("member_added"), "kind"),
        ("from", json!("weft"), "from"),
        ("data", json!({"content": "x".repeat(70_000)}), "data"),
    ];
    for (field, value, _) in &broken {
        plain.send(&changed("new-0", field, value.clone()));
    }
    plain.send_with("acme/new-0", r#"{"order": 7}"#, &[]);
    let found = letters(&server, 5).await;
    let of = |reason: &str| found.iter().filter(|it| it["reason"] == reason).cloned().collect::<Vec<Value>>();
    assert_eq!((of("schema").len(), of("unreadable").len()), (4, 1), "{found:?}");
    for (letter, (_, _, named)) in of("schema").iter().rev().zip(&broken) {
        assert!(letter["error"].as_str().unwrap().contains(named), "{named}: {letter}");
        has(letter, json!({"thread": "new-0", "state": "open", "attempts": 1, "topic": log.topic("events")}));
        assert!(letter["bytes"].is_string(), "{letter}");
    }
    has(&of("schema")[3], json!({"kind": "user_message", "user": "erp"}));
    assert_eq!(server.metric(r#"weft_dead_letters_total{reason="schema"}"#).await, 4.0);
    assert_eq!(head(&server, "new-0").await, 3, "none of it is in the thread");
    let (_, counts) = get(&server, &acme, "/counts").await;
    assert!(counts["reasons"].as_array().unwrap().contains(&json!({"reason": "schema", "count": 4})), "{counts}");

    let id = id_of(&of("schema")[3]).to_owned();
    for rehearse in [true, false] {
        let (_, said) = post(&server, &acme, &format!("/{id}/requeue"), json!({"rehearse": rehearse})).await;
        let said = said.to_string();
        assert!(said.contains("conflict") && said.contains("another one"), "{said}");
    }
    assert_eq!(discard(&server, &acme, &id).await.0, 200);
    refused(&discard(&server, &acme, &id).await.1, "conflict", "id");
    let left = letters(&server, 4).await;
    rebuilt(&mut server).await;
    assert_eq!(letters(&server, 4).await, left, "the same after a rebuild");
    assert_eq!(get(&server, &acme, &format!("/{id}")).await.1["state"], "discarded");
    assert_eq!(head(&server, "new-0").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_header_that_is_there_counts_and_a_key_in_another_partition_is_named() {
    let log = LogKind::kafka();
    let server = Server::start(log.clone());
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "hello").await, 1);
    let plain = Plain::new(&log);
    let send = |content: &str, headers: &[(&str, &str)]| {
        plain.send_with("acme/t", &event("t", content).to_string(), headers);
    };
    send("as a member, which erp is not", &[("weft-grant", "member")]);
    send(
        "by today's rules",
        &[("weft-version", "4"), ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")],
    );
    send("by earlier rules", &[("weft-version", "3")]);
    send("as the server", &[("weft-grant", "server")]);
    send("of its own kind", &[("weft-kind", "user_message")]);
    let LogKind::Kafka { brokers, .. } = &log else { unreachable!("it is Kafka") };
    let value = event("t", "misplaced").to_string();
    for partition in [0, 1] {
        // In one of them at least it does not belong.
        produce(brokers, &plain.topic, Some(partition), Some(b"acme/t"), Some(value.as_bytes()), None);
    }
    ada.subscribe_with("t", json!({"after": 1})).await;
    let contents: Vec<Value> = ada.events(2).await.iter().map(|it| it["data"]["content"].clone()).collect();
    assert_eq!(contents, ["by today's rules", "of its own kind"]);
    eventually("all are judged", async || list(&server, &root_of("acme"), "").await.len() >= 3).await;
    let found = list(&server, &root_of("acme"), "").await;
    assert!(found.iter().all(|it| it["reason"] == "unreadable"), "{found:?}");
    let errors: Vec<&str> = found.iter().map(|it| it["error"].as_str().unwrap()).collect();
    for said in ["weft-kind", "weft-version", "murmur2"] {
        assert!(errors.iter().any(|error| error.contains(said)), "{said}: {errors:?}");
    }
}

/// A log that was made under version 3: what lacked headers was foreign then, and stays so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_an_older_log_plain_events_count_from_the_first_record_of_these_rules_on() {
    let log = LogKind::kafka();
    let LogKind::Kafka { brokers, .. } = &log else { unreachable!("it is Kafka") };
    let topics = [("events", "delete"), ("receipts", "compact"), ("dead-letters", "delete")];
    let topics = topics.map(|(topic, policy)| (log.topic(topic), policy));
    let create = || topics.iter().for_each(|(topic, policy)| create_topic(topic, &[("cleanup.policy", policy)]));
    std::thread::scope(|scope| scope.spawn(create).join()).unwrap();
    let plain = Plain::new(&log);
    let marker = json!({
        "kind": "log_created", "epoch": "0123456789abcdef0123456789abcdef", "partitions": 1,
        "at": clock::rfc3339(clock::now_ms()),
    });
    let headers = OwnedHeaders::new()
        .insert(Header { key: "weft-kind", value: Some("log_created") })
        .insert(Header { key: "weft-version", value: Some("3") })
        .insert(Header { key: "weft-grant", value: Some("scope") });
    produce(brokers, &plain.topic, Some(0), Some(b"weft"), Some(marker.to_string().as_bytes()), Some(headers));
    plain.send(&event("t", "before the upgrade"));

    let mut server = Server::start_with(log.clone(), &["--partitions", "1"]);
    let acme = root_of("acme");
    let letter = letters(&server, 1).await.remove(0);
    has(&letter, json!({"reason": "unreadable", "error": "it has no header weft-version", "thread": "t"}));
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "the first of the new rules").await, 1);
    plain.send(&event("t", "after it"));
    eventually("it is an event", async || head(&server, "t").await == 2).await;
    rebuilt(&mut server).await;
    assert_eq!(list(&server, &acme, "").await, [letter], "what was foreign stays foreign");
    assert_eq!(head(&server, "t").await, 2);
    // Where it has read to there, the node knows without reading it again.
    server.stop().await;
    plain.send(&event("t", "while the server was down"));
    server.up();
    server.ready().await;
    eventually("it is an event", async || head(&server, "t").await == 3).await;
}
