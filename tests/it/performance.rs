//! The benches are real clients over real sockets, and their figures are true: what they say was done, the server did.
//! How fast it went is no matter here.

use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::{LogKind, SECRET, Server, eventually, has, weft_bench};

/// Runs a bench against a server and gives its figures; a bench that finds an error, a close or a hole fails.
async fn bench(server: &Server, arguments: &str) -> Vec<Value> {
    let log = match server.log() {
        LogKind::Embedded => "embedded",
        LogKind::Kafka { .. } => "kafka",
    };
    let mut command = weft_bench();
    command.args(arguments.split(' ')).args(["--json", "--log", log, "--url", &server.url, "--jwt-secret", SECRET]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{arguments}: {said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["log"].as_str(), &report["failures"]), (Some(log), &Value::Array(Vec::new())), "{report}");
    let figures = report["figures"].as_array().unwrap().clone();
    for figure in &figures {
        let value = figure["value"].as_f64().unwrap();
        assert!(value.is_finite() && figure["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "{figure}");
        if let (Some(limit), Some(ratio)) = (figure["limit"].as_f64(), figure["ratio"].as_f64()) {
            let right = if figure["better"] == "more" { value / limit } else { limit / value };
            assert!((ratio / right - 1.0).abs() < 1e-9, "{figure}");
        }
    }
    figures
}

/// A figure by its name; it must be positive.
fn figure(figures: &[Value], name: &str, unit: &str) -> f64 {
    let figure = figures.iter().find(|figure| figure["name"] == name);
    let figure = figure.unwrap_or_else(|| panic!("no {name:?} in {figures:?}"));
    assert_eq!(figure["unit"], unit);
    let value = figure["value"].as_f64().unwrap();
    assert!(value > 0.0, "{figure}");
    value
}

/// How much a server's counters grew while a bench ran.
struct Counted<'a> {
    server: &'a Server,
    before: Vec<(&'static str, f64)>,
}

impl Counted<'_> {
    async fn from_now<'a>(server: &'a Server, names: &[&'static str]) -> Counted<'a> {
        let mut before = Vec::new();
        for name in names {
            before.push((*name, server.metric(name).await));
        }
        Counted { server, before }
    }

    async fn grew(&self, name: &str) -> f64 {
        let (_, before) = self.before.iter().find(|(known, _)| *known == name).unwrap();
        self.server.metric(name).await - before
    }
}

const EVENTS: &str = "weft_project_events_total";
const COMMANDS: &str = "weft_commands_total";
const DELIVERIES: &str = "weft_deliveries_total";
const REPLAYED: &str = "weft_replayed_events_total";
const LAGGED: &str = "weft_lagged_total";
const CONNECTIONS: &str = "weft_connections_total";

on_both_logs!(every_ack_that_the_ack_benches_count_is_an_event_of_the_server, |log| async move {
    let server = Server::start_unlimited(log);
    for (arguments, name) in [
        ("ack --clients 4 --window 64 --seconds 1", "ack 4x64"),
        ("ack --clients 2 --window 16 --seconds 1 --keys", "ack 2x16 keys"),
        ("one-at-a-time --seconds 1", "ack 1x1"),
    ] {
        let counted = Counted::from_now(&server, &[EVENTS, COMMANDS]).await;
        let figures = bench(&server, arguments).await;
        let acks = figure(&figures, name, "acks/s");
        let (p50, p99) =
            (figure(&figures, &format!("{name} P50"), "ms"), figure(&figures, &format!("{name} P99"), "ms"));
        assert!(p50 <= p99, "{p50} {p99}");
        let events = counted.grew(EVENTS).await;
        // Those of the warm-up and of the last moment are events as well.
        assert!(events >= acks, "{events} events for {acks} acks in a second");
        assert_eq!(counted.grew(COMMANDS).await, events, "each publish was answered, and became one event");
    }
});

on_both_logs!(the_latency_bench_publishes_at_its_rate_and_each_event_reaches_both_users, |log| async move {
    let server = Server::start(log);
    let counted = Counted::from_now(&server, &[EVENTS, DELIVERIES]).await;
    let figures = bench(&server, "latency --users 30 --rate 500 --seconds 1").await;
    for what in ["published", "delivered"] {
        let at = |quantile| figure(&figures, &format!("{what} {quantile}, 30 users 500/s"), "ms");
        assert!(at("P50") <= at("P99"));
    }
    // A second to warm up and one that counts; before that each pair's thread is made.
    assert_eq!(counted.grew(EVENTS).await, 1_000.0 + 15.0);
    // Both users of a pair get the event, whoever wrote it.
    assert_eq!(counted.grew(DELIVERIES).await, 1_000.0 * 2.0);
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_delivery_that_the_fanout_bench_counts_was_made_by_the_server() {
    let server = Server::start(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS, DELIVERIES]).await;
    let figures = bench(&server, "fanout --readers 200 --events 200").await;
    figure(&figures, "fanout to 200 readers", "deliveries/s");
    assert_eq!(counted.grew(EVENTS).await, 1.0 + 200.0, "the thread, and what was published");
    assert!(counted.grew(DELIVERIES).await >= 200.0 * 200.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_that_the_replay_bench_counts_came_from_the_store_once() {
    let server = Server::start_unlimited(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS, REPLAYED]).await;
    let figures = bench(&server, "replay --events 20000 --readers 2").await;
    figure(&figures, "replay to 2 readers", "events/s");
    let events = 1.0 + 20_000.0;
    assert_eq!(counted.grew(EVENTS).await, events, "the thread, and what was published");
    assert_eq!(counted.grew(REPLAYED).await, 2.0 * events);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_export_bench_counts_the_events_that_it_wrote() {
    let server = Server::start_unlimited(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS]).await;
    let figures = bench(&server, "export --events 20000").await;
    figure(&figures, "export as jsonl", "events/s");
    assert_eq!(counted.grew(EVENTS).await, 20_000.0, "all of which were counted, or the bench had failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_round_of_the_rounds_bench_is_published_and_delivered_before_the_next() {
    let server = Server::start(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS, DELIVERIES]).await;
    let figures = bench(&server, "rounds --rounds 20 --batch 8 --readers 3").await;
    figure(&figures, "20 rounds of 8 to 3 readers", "acks/s");
    assert_eq!(counted.grew(EVENTS).await, 1.0 + 20.0 * 8.0, "the thread, and what was published");
    assert_eq!(counted.grew(DELIVERIES).await, 20.0 * 8.0 * 3.0);
}

on_both_logs!(the_crowd_bench_lets_one_user_and_many_publish_at_their_rates, |log| async move {
    let server = Server::start(log);
    let counted = Counted::from_now(&server, &[EVENTS, COMMANDS]).await;
    let figures = bench(&server, "crowd --users 4 --rate 50 --seconds 1 --rounds 2").await;
    for what in ["published", "delivered"] {
        for of in ["one user 50/s", "one user 200/s", "4 users 50/s each"] {
            figure(&figures, &format!("{what} mean, {of}"), "ms");
        }
        figure(&figures, &format!("{what}: mean of 4 users / mean of one"), "times");
        figure(&figures, &format!("{what}: mean of 4 users / mean of one with 200/s"), "times");
    }
    // In each round a second to warm up and one that counts: of one user, of one as fast as all, and of all.
    let published = 2.0 * 2.0 * (50.0 + 200.0 + 200.0);
    assert_eq!(counted.grew(EVENTS).await, published + 2.0 * (1.0 + 1.0 + 2.0), "and a thread for each pair");
});

on_both_logs!(the_crowded_bench_counts_one_user_beside_a_thread_with_readers, |log| async move {
    let server = Server::start(log);
    let counted = Counted::from_now(&server, &[DELIVERIES]).await;
    let figures = bench(&server, "crowded --readers 50 --rate 20 --seconds 1").await;
    for quantile in ["P50", "P99"] {
        figure(&figures, &format!("published {quantile}, one at a time, alone"), "ms");
        figure(&figures, &format!("published {quantile}, one at a time, beside 50 readers 20/s"), "ms");
        figure(&figures, &format!("delivered {quantile} to 50 readers 20/s"), "ms");
    }
    assert_eq!(counted.grew(DELIVERIES).await, 50.0 * 20.0 * 2.0, "a second to warm up, and one that counts");
});

on_both_logs!(every_event_that_the_reconnect_bench_counts_was_replayed_to_its_client_once, |log| async move {
    let server = Server::start(log);
    let counted = Counted::from_now(&server, &[EVENTS, REPLAYED, CONNECTIONS]).await;
    let figures = bench(&server, "reconnect --clients 60 --missed 20 --together 25").await;
    let name = |what: &str| format!("reconnect, 60 clients missed 20: {what}");
    figure(&figures, &name("all level after"), "s");
    figure(&figures, &name("replayed"), "events/s");
    assert!(figure(&figures, &name("one client, P50"), "s") <= figure(&figures, &name("one client, slowest"), "s"));
    let rejection = figures.iter().find(|figure| figure["name"] == *name("refused")).unwrap();
    has(rejection, json!({"value": 0.0, "limit": 0.0}));
    assert_eq!(counted.grew(EVENTS).await, 3.0 * (1.0 + 20.0), "three threads, and what was published to each");
    assert_eq!(counted.grew(REPLAYED).await, 60.0 * 20.0);
    assert_eq!(counted.grew(CONNECTIONS).await, 60.0 + 3.0 + 60.0, "before, the publishers, and after");
});

on_both_logs!(the_slow_readers_of_the_slow_bench_lag_and_miss_nothing, |log| async move {
    let server = Server::start(log);
    let counted = Counted::from_now(&server, &[EVENTS, DELIVERIES, LAGGED]).await;
    let figures = bench(&server, "slow --readers 10 --slow 2 --rate 200 --payload 8000 --seconds 1 --rounds 1").await;
    for quantile in ["P50", "P99"] {
        figure(&figures, &format!("delivered {quantile} to 8 readers"), "ms");
        figure(&figures, &format!("delivered {quantile} to 8 beside 2 slow"), "ms");
        figure(&figures, &format!("{quantile} beside 2 slow / without"), "times");
    }
    figure(&figures, "memory, 10 readers", "MB");
    let got = figure(&figures, "2 slow: lagged", "times");
    assert!(got >= 2.0 && counted.grew(LAGGED).await >= got, "{got} times");
    let outbox = figures.iter().find(|figure| figure["name"] == "weft_outbox_bytes, 2 slow").unwrap();
    assert!(outbox["value"].as_f64() <= Some(10.0 * 0.262_144), "what may wait for ten sessions: {outbox}");
    // Before, with and after, each with a second to warm up; the bench itself has checked that each reader saw each once.
    assert_eq!(counted.grew(EVENTS).await, 1.0 + 3.0 * 2.0 * 200.0, "the thread, and what was published");
    assert_eq!(counted.grew(DELIVERIES).await, 10.0 * 3.0 * 2.0 * 200.0, "each to everyone, once");
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_idle_bench_holds_as_many_connections_as_it_says_and_lets_them_go() {
    let server = Server::start(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS, CONNECTIONS]).await;
    let figures = bench(&server, "idle --connections 200").await;
    // The figure is a difference of two measurements of memory, and of so few connections it may be nothing at all.
    assert_eq!(
        (figures[0]["name"].as_str(), figures[0]["unit"].as_str()),
        (Some("memory per connection, 200 idle"), Some("KB"))
    );
    assert_eq!(counted.grew(EVENTS).await, 200.0, "each has a thread of its own");
    assert_eq!(counted.grew(CONNECTIONS).await, 2.0 * 200.0, "one that made the thread, one that is idle");
    eventually("they are gone", async || server.metric("weft_connections").await == 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_promised_windows_users_and_readers_every_publish_is_answered_once_and_no_reader_misses_a_seq() {
    let server = Server::start_unlimited(LogKind::embedded());
    let counted = Counted::from_now(&server, &[EVENTS, COMMANDS]).await;
    let mut acks = 0.0;
    for (clients, window) in [(1, 1024), (32, 64)] {
        let arguments = format!("ack --clients {clients} --window {window} --seconds 1");
        let figures = bench(&server, &arguments).await;
        acks += figure(&figures, &format!("ack {clients}x{window}"), "acks/s");
    }
    assert!(counted.grew(EVENTS).await >= acks);
    assert_eq!(counted.grew(COMMANDS).await, counted.grew(EVENTS).await);
    let figures = bench(&server, "latency --users 1000 --rate 1000 --seconds 1").await;
    figure(&figures, "delivered P99, 1000 users 1000/s", "ms");
    let figures = bench(&server, "fanout --readers 1000 --events 100").await;
    figure(&figures, "fanout to 1000 readers", "deliveries/s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_that_cannot_do_its_work_fails_and_says_why() {
    let server = Server::start(LogKind::embedded());
    let mut command = weft_bench();
    command.args(["ack", "--seconds", "1", "--json", "--url", &server.url, "--jwt-secret", "another secret"]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "no figure of what was not done");
    assert!(String::from_utf8_lossy(&output.stderr).contains("401"), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grow_bench_shows_each_cost_at_each_size_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("grow");
    let run = async |more: &'static [&'static str]| {
        let mut command = weft_bench();
        command.args(["grow", "--threads", "1,30", "--partitions", "4", "--connections", "0,3", "--events", "2,200"]);
        command.args(["--operations", "2000", "--data"]).arg(&data).args(more);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!data.exists(), "its data is removed");
        String::from_utf8(output.stdout).unwrap()
    };

    let report: Value = serde_json::from_str(&run(&["--json"]).await).unwrap();
    let figures = report["figures"].as_array().unwrap();
    for size in ["1 threads", "30 threads", "4 partitions", "0 idle connections", "3 idle connections", "200 events"] {
        figure(figures, &format!("publish, {size}"), "µs");
        let clock = figure(figures, &format!("start, on the clock, {size}"), "ms");
        assert!(clock >= 1.0, "{size}: {clock}");
        for cost in ["subscribe", "page"] {
            let name = format!("{cost}, {size}");
            assert!(figures.iter().any(|figure| figure["name"] == *name && figure["unit"] == "µs"), "{name}");
        }
    }
    assert_eq!(figure(figures, "publish, 1 threads / fewest", "times"), 1.0);

    let table = run(&["--weft", env!("CARGO_BIN_EXE_weft")]).await;
    assert!(table.contains("publish, µs") && table.contains("30 threads"), "{table}");
    assert_eq!(table.lines().count(), 8, "{table}");
}
