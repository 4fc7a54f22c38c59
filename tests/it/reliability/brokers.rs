//! Kafka in production: brokers that want TLS and SASL, topics whose settings change, partitions that are added, records that
//! are deleted; and what a server says of all that.

use std::path::Path;
use std::process::Command;

use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewPartitions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::{Offset, TopicPartitionList};

use super::*;
use crate::support::SECRET;

/// The arguments that reach a secured broker.
fn credentials(broker: &Broker, password: &str, right_authority: bool) -> Vec<String> {
    let settings = [
        "security.protocol=SASL_SSL".to_owned(),
        "sasl.mechanism=SCRAM-SHA-512".to_owned(),
        "sasl.username=weft".to_owned(),
        format!("sasl.password={password}"),
        format!("ssl.ca.location={}", broker.authority(right_authority)),
    ];
    settings.into_iter().flat_map(|setting| ["--kafka-config".to_owned(), setting]).collect()
}

/// A server that is not expected to start: what it says.
async fn refusal(log: &LogKind, more: &[String]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = weft();
    command.args(["serve", "--listen", "127.0.0.1:0", "--jwt-secret", SECRET, "--data"]).arg(folder.path());
    command.args(log.arguments()).args(more);
    refusal_of(command).await
}

async fn refusal_of(mut command: Command) -> String {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = tokio::time::timeout(PATIENCE, output).await.expect("it ends").unwrap();
    assert!(!output.status.success(), "it started");
    String::from_utf8(output.stderr).unwrap()
}

fn admin() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", kafka::brokers()).create().unwrap()
}

async fn set_retention(topic: &str, ms: &str) {
    // What is not named goes back to the broker's default.
    let settings = AlterConfig::new(ResourceSpecifier::Topic(topic))
        .set("retention.ms", ms)
        .set("retention.bytes", "-1")
        .set("cleanup.policy", "delete");
    admin().alter_configs([&settings], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
}

fn on_shared_broker() -> (LogKind, String) {
    let prefix = fresh_prefix();
    (LogKind::Kafka { brokers: kafka::brokers().to_owned(), prefix: prefix.clone() }, prefix)
}

async fn readyz(server: &Server, purpose: &str) -> (u16, Value) {
    server.http("GET", &format!("/readyz?for={purpose}"), "x", None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_conversation_passes_over_tls_and_scram_and_outlives_a_restart() {
    let broker = Broker::secured();
    let log = LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() };
    let more = credentials(&broker, "weft-secret", true);
    let mut server = Server::start_with(log, &more.iter().map(String::as_str).collect::<Vec<_>>());
    let (mut ada, mut reader) = (server.connect("ada").await, server.connect("ada").await);
    assert_eq!(ada.say("t", "one").await, 1);
    reader.subscribe("t", Some(0)).await;
    assert_eq!(ada.say("t", "two").await, 2);
    assert_eq!(seqs(&reader.events(2).await), [1, 2]);
    server.stop().await;
    server.up();
    let mut ada = server.connect("ada").await;
    ada.subscribe("t", Some(1)).await;
    assert_eq!(ada.events(1).await[0]["data"]["content"], "two");
    assert_eq!(ada.say("t", "three").await, 3);
    assert!(!server.errors().contains("weft-secret"), "{}", server.errors());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_a_broker_turns_away_reads_why_and_at_which_address() {
    let broker = Broker::secured();
    let (with_tls, without_tls) = (broker.brokers(), broker.without_tls());
    let right = credentials(&broker, "weft-secret", true);
    let cases = [
        (&with_tls, credentials(&broker, "hunter2", true), &["authentication", "SASL", "invalid credentials"][..]),
        (&with_tls, credentials(&broker, "weft-secret", false), &["TLS", "certificate verify failed"]),
        (&with_tls, right[2..].to_vec(), &["security.protocol", "--kafka-config"]),
        (&without_tls, Vec::new(), &["security.protocol", "SASL authentication", "--kafka-config"]),
    ];
    for (brokers, more, words) in cases {
        let log = LogKind::Kafka { brokers: brokers.clone(), prefix: fresh_prefix() };
        let said = refusal(&log, &more).await;
        for word in words.iter().chain([&brokers.as_str()]) {
            assert!(said.contains(word), "{word} is not in: {said}");
        }
        assert!(!said.contains("hunter2") && !said.contains("weft-secret"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_librdkafka_come_from_flag_variable_and_file_and_wrong_ones_are_named_at_the_start() {
    let (log, _) = on_shared_broker();
    let refused = async |setting: &str| refusal(&log, &["--kafka-config".to_owned(), setting.to_owned()]).await;
    let said = refused("sasl.usrname=weft").await;
    assert!(said.contains("--kafka-config sasl.usrname"), "{said}");
    let said = refused("enable.idempotence=false").await;
    assert!(said.contains("enable.idempotence") && said.contains("Weft sets this itself"), "{said}");

    // The file asks for a broker that wants TLS; the variable takes that back, and names an unknown setting.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weft.toml");
    std::fs::write(&file, "[kafka_config]\nsecurity.protocol = \"SSL\"\n").unwrap();
    let command = |variable: &str| {
        let mut command = weft();
        command.args(["serve", "--listen", "127.0.0.1:0", "--jwt-secret", SECRET, "--data"]).arg(folder.path());
        command.args(log.arguments()).arg("--config").arg(&file).env("WEFT_KAFKA_CONFIG", variable);
        command
    };
    let said = refusal_of(command("")).await;
    assert!(said.contains(&format!("there is no TLS connection to Kafka at {}", kafka::brokers())), "{said}");
    let said = refusal_of(command("security.protocol=PLAINTEXT,no.such=1")).await;
    assert!(said.contains("no.such"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retention_that_becomes_finite_stops_readiness_for_writes_until_it_is_mended_and_a_start() {
    let (log, prefix) = on_shared_broker();
    let topic = format!("{prefix}events");
    let mut server = Server::start_with(log, &[]);
    server.ready().await;
    set_retention(&topic, "604800000").await;
    eventually("it is seen", async || readyz(&server, "write").await.0 == 503).await;
    let (status, parts) = readyz(&server, "read").await;
    let why = parts["log"]["error"].as_str().unwrap();
    assert!(status == 200 && why.contains("retention.ms=604800000") && why.contains(&topic), "{parts}");
    eventually("the metric says so", async || server.metric("weft_log_problem").await == 1.0).await;
    server.stop().await;

    let mut command = weft();
    command.args(["serve", "--listen", "127.0.0.1:0", "--jwt-secret", SECRET, "--data"]).arg(server.data());
    command.args(server.log().arguments());
    let said = refusal_of(command).await;
    assert!(said.contains("retention.ms=604800000") && said.contains("--add-config retention.ms=-1"), "{said}");
    set_retention(&topic, "-1").await;
    server.up();
    server.ready().await;
}

/// What `weft doctor` says of a node's data and its brokers: the exit code, and the checks.
fn doctor(data: &Path, log: &LogKind, more: &[&str]) -> (Option<i32>, Vec<Value>) {
    let mut command = weft();
    command.args(["doctor", "--json", "--data"]).arg(data).args(log.arguments()).args(more);
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let found: Value = serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{printed} {output:?}"));
    (output.status.code(), found["checks"].as_array().unwrap().clone())
}

fn texts(checks: &[Value], name: &str, field: &str) -> Vec<String> {
    let of = checks.iter().filter(|check| check["name"] == name);
    of.filter_map(|check| Some(format!("{} => {}", check[field].as_str()?, check["mend"].as_str().unwrap_or(""))))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_says_of_the_topics_what_is_wrong_what_may_become_so_and_how_to_mend_each() {
    let (log, prefix) = on_shared_broker();
    let mut server = Server::stopped_with(log.clone(), &["--partitions", "2"]);
    std::fs::create_dir_all(server.data()).unwrap();
    let (code, checks) = doctor(server.data(), &log, &[]);
    assert_eq!((code, texts(&checks, "topics", "found").len()), (Some(0), 1), "{checks:?}");
    assert!(texts(&checks, "topics", "found")[0].contains("there are none"), "{checks:?}");

    server.up();
    server.ready().await;
    server.connect("ada").await.say("t", "hello").await;
    server.stop().await;
    let (code, checks) = doctor(server.data(), &log, &[]);
    assert_eq!((code, texts(&checks, "topics", "found").len()), (Some(0), 3), "{checks:?}");
    assert!(texts(&checks, "topics", "found")[0].contains("events: 2 partitions, 1 replicas"), "{checks:?}");
    let warned = texts(&checks, "topics", "warning");
    assert!(
        warned.len() == 1 && warned[0].contains("1 replica:") && warned[0].contains("kafka-reassign"),
        "{warned:?}"
    );

    let (code, checks) = doctor(server.data(), &log, &["--partitions", "3"]);
    let wrong = texts(&checks, "topics", "wrong");
    assert!(code == Some(1) && wrong.len() == 1 && wrong[0].contains("start without --partitions"), "{wrong:?}");

    let topic = format!("{prefix}events");
    set_retention(&topic, "604800000").await;
    let (code, checks) = doctor(server.data(), &log, &[]);
    let wrong = texts(&checks, "topics", "wrong");
    assert!(code == Some(1) && wrong.len() == 1, "{checks:?}");
    assert!(
        wrong[0].contains("retention.ms=604800000") && wrong[0].contains("--add-config retention.ms=-1"),
        "{wrong:?}"
    );
    assert!(!server.data().join("log").exists(), "nothing was made");

    let away = LogKind::Kafka { brokers: "127.0.0.1:9".to_owned(), prefix };
    let (code, checks) = doctor(server.data(), &away, &[]);
    let wrong = texts(&checks, "brokers", "wrong");
    assert!(code == Some(1) && wrong.len() == 1 && wrong[0].contains("--brokers names them"), "{checks:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_are_deleted_from_the_topic_are_told_while_the_server_runs() {
    let (log, prefix) = on_shared_broker();
    let server = Server::start_with(log, &["--partitions", "1"]);
    server.ready().await;
    server.connect("ada").await.say("t", "gone").await;
    let topic = format!("{prefix}events");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&topic, 0, Offset::End).unwrap();
    admin().delete_records(&list, &AdminOptions::new()).await.unwrap();
    eventually("it is seen", async || readyz(&server, "write").await.0 == 503).await;
    let (status, parts) = readyz(&server, "read").await;
    let why = parts["log"]["error"].as_str().unwrap();
    assert!(status == 200 && why.contains("deleted") && why.contains(&topic) && why.contains("partition 0"), "{parts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_added_by_hand_are_left_alone_by_running_nodes_and_new_ones_and_the_group_tells_the_node() {
    let (log, prefix) = on_shared_broker();
    let mut server = Server::start_with(log.clone(), &["--partitions", "2", "--node", "weft-a"]);
    server.ready().await;
    let mut ada = server.connect("ada").await;
    for n in 0..20 {
        assert_eq!(ada.say(&format!("t{n}"), "before").await, 1);
    }
    let topic = format!("{prefix}events");
    let five = NewPartitions::new(&topic, 5);
    admin().create_partitions([&five], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    eventually("it is warned of", async || {
        let parts = server.http("GET", "/readyz", "x", None).await.1;
        parts["log"]["warnings"].to_string().contains("5 partitions")
    })
    .await;
    server.ready().await;
    for n in 0..20 {
        assert_eq!(ada.say(&format!("t{n}"), "while it runs").await, 2);
    }
    server.stop().await;
    server.up();
    server.ready().await;
    let other = Server::start_with(log.clone(), &["--partitions", "2"]);
    other.ready().await;
    let (mut ada, mut there) = (server.connect("ada").await, other.connect("ada").await);
    for n in 0..20 {
        let thread = format!("t{n}");
        assert_eq!(ada.say(&thread, "after the start").await, 3);
        there.subscribe(&thread, Some(0)).await;
        assert_eq!(seqs(&there.events(3).await), [1, 2, 3]);
    }
    let said = refusal(&log, &["--partitions".to_owned(), "5".to_owned()]).await;
    assert!(said.contains("the log has 2 partitions, but 5 are configured"), "{said}");

    let options = ["--bootstrap-server", kafka::brokers(), "--list"];
    let groups = kafka::tool("org.apache.kafka.tools.consumer.group.ConsumerGroupCommand", &options, "");
    let mine: Vec<&str> = groups.lines().filter(|name| name.starts_with(&prefix)).collect();
    assert!(mine.len() == 2 && mine.contains(&format!("{prefix}projector-weft-a").as_str()), "{mine:?}");

    // Nobody would ever read this.
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", kafka::brokers()).create().unwrap();
    producer.send(BaseRecord::to(&topic).partition(4).key("k").payload("lost")).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
    eventually("it is seen", async || readyz(&server, "write").await.0 == 503).await;
    let (_, parts) = readyz(&server, "write").await;
    assert!(parts["log"]["error"].as_str().unwrap().contains("4 (1)"), "{parts}");
    let said = refusal(&log, &["--partitions".to_owned(), "2".to_owned()]).await;
    assert!(said.contains("4 (1)") && said.contains(&topic), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_dead_broker_a_node_is_ready_for_reads_and_not_for_writes() {
    let broker = Broker::own();
    let server = Server::start(LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() });
    server.ready().await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "known").await;
    for purpose in ["read", "write"] {
        assert_eq!(readyz(&server, purpose).await.0, 200);
    }
    let (status, problem) = readyz(&server, "everything").await;
    assert_eq!(status, 400);
    refused(&problem, "bad_request", "for");

    broker.kill();
    eventually("it is seen", async || readyz(&server, "write").await.0 == 503).await;
    let (status, parts) = readyz(&server, "read").await;
    assert_eq!((status, &parts["ready"]), (200, &json!(true)), "{parts}");
    assert!(parts["log"]["error"].as_str().unwrap().contains(&broker.brokers()), "{parts}");
    assert_eq!(server.http("GET", "/readyz", "x", None).await.0, 503, "for both");
    let page = server.http("GET", "/v1/threads/t/events", "ada", None).await.1;
    assert_eq!(page["events"][0]["data"]["content"], "known", "{page}");
}
