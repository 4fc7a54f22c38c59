//! HTTP, health, metrics, schemas and the command line.

mod analysts;
mod batch;
mod contract;
mod discovery;
mod examples;
mod full;
mod generated;
mod groups;
mod keys;
mod kinds;
mod replays;
mod schemas;
mod sessions;
mod webhook;
mod work;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::support::{LogKind, PATIENCE, SECRET, Server, Socket, TENANT, has, publish, seqs, token, weft};

#[tokio::test]
async fn a_publish_over_http_is_the_same_event_as_over_websocket() {
    let server = Server::start(LogKind::embedded());
    let body = json!({"kind": "user_message", "data": {"content": "hello", "more": [1]}, "priority": "high"});
    let (status, reply) = server.http("POST", "/v1/threads/t/events", "ada", Some(body.clone())).await;
    assert_eq!(status, 201, "{reply}");
    has(&reply, json!({"thread": "t", "seq": 1, "duplicate": false}));
    let (status, first) = server
        .http_with("POST", "/v1/threads/t/events", &token("ada", ""), Some(body.clone()), &[("Idempotency-Key", "k")])
        .await;
    assert_eq!(status, 201, "{first}");
    has(&first, json!({"seq": 2}));
    let (status, again) = server
        .http_with("POST", "/v1/threads/t/events", &token("ada", ""), Some(body), &[("Idempotency-Key", "k")])
        .await;
    assert_eq!(status, 200, "{again}");
    has(&again, json!({"seq": 2, "duplicate": true, "event": first["event"]}));
    let mut socket = server.connect("ada").await;
    socket.subscribe("t", Some(0)).await;
    let events = socket.events(2).await;
    assert_eq!(events[0]["data"], json!({"content": "hello", "more": [1]}));
    assert_eq!(
        (&events[0]["priority"], &events[0]["from"], &events[1]["key"]),
        (&json!("high"), &json!("ada"), &json!("k"))
    );
    let reply = socket.ask(publish("t", "user_message", json!({"content": "a reply"}))).await;
    assert_eq!(reply["seq"], 3);
}

#[tokio::test]
async fn pages_of_events_go_both_ways_filter_by_kind_and_say_where_to_go_on() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 1..=30 {
        ada.ask(publish("t", if n % 3 == 0 { "x.third" } else { "x.other" }, json!(n))).await;
    }
    let page = async |query: &str| {
        let (status, page) = server.http("GET", &format!("/v1/threads/t/events{query}"), "ada", None).await;
        assert_eq!(status, 200, "{page}");
        assert_eq!(page["head"], 30);
        (seqs(page["events"].as_array().unwrap()), page["next"].as_u64())
    };
    assert_eq!(page("").await, ((1..=30).collect(), None));
    assert_eq!(page("?limit=10").await, ((1..=10).collect(), Some(10)));
    assert_eq!(page("?limit=10&after=10").await, ((11..=20).collect(), Some(20)));
    assert_eq!(page("?limit=10&after=20").await, ((21..=30).collect(), None));
    assert_eq!(page("?limit=4&order=desc").await, (vec![30, 29, 28, 27], Some(27)));
    assert_eq!(page("?limit=4&order=desc&before=27").await, (vec![26, 25, 24, 23], Some(23)));
    assert_eq!(page("?after=5&before=9").await, (vec![6, 7, 8], None));
    assert_eq!(page("?before=1").await, (vec![], None));
    assert_eq!(page("?after=30").await, (vec![], None));
    assert_eq!(page("?kinds=x.third").await, ((1..=10).map(|n| n * 3).collect(), None));
    assert_eq!(page("?kinds=x.third,x.other&limit=2&after=3").await, (vec![4, 5], Some(5)));
    for (query, code, field) in [
        ("?limit=0", "bad_request", "limit"),
        ("?limit=1001", "bad_request", "limit"),
        ("?limit=x", "bad_request", "limit"),
        ("?after=-1", "bad_request", "after"),
        ("?after=31", "cursor_invalid", "after"),
        ("?order=up", "bad_request", "order"),
        ("?colour=red", "bad_request", "colour"),
        ("?limit=1&limit=2", "bad_request", "limit"),
    ] {
        let (status, body) = server.http("GET", &format!("/v1/threads/t/events{query}"), "ada", None).await;
        assert_eq!((status, &body["code"], &body["field"]), (400, &json!(code), &json!(field)), "{query}: {body}");
    }
}

#[tokio::test]
async fn an_analyst_lists_every_thread_of_the_tenant_page_by_page_and_nobody_else_does() {
    let server = Server::start(LogKind::embedded());
    for (user, thread) in [("ada", "Beta"), ("ben", "alpha"), ("cid", "9"), ("ada", "gamma"), ("ada", "@me")] {
        server.connect(user).await.say(thread, "hello").await;
    }
    Socket::open(&server.url, &crate::support::token_of("umbrella", "eve")).await.say("theirs", "hello").await;
    let page = async |user: &str, scope: &str, query: &str| {
        server.http_with("GET", &format!("/v1/threads?{query}"), &token(user, scope), None, &[]).await
    };
    let (mut all, mut query) = (Vec::new(), "all=true&limit=2".to_owned());
    loop {
        let (status, threads) = page("lou", "analyst", &query).await;
        assert_eq!(status, 200, "{threads}");
        all.extend(threads["threads"].as_array().unwrap().iter().map(|it| it["thread"].as_str().unwrap().to_owned()));
        let Some(next) = threads["next"].as_str() else { break };
        query = format!("all=true&limit=2&cursor={next}");
        assert_eq!(
            page("lou", "analyst", &format!("cursor={next}")).await.1["code"],
            "cursor_invalid",
            "another list's"
        );
    }
    assert_eq!(all, ["9", "Beta", "alpha", "gamma"], "by id, without those that exist by their name");
    let (status, problem) = page("ada", "publish subscribe", "all=true").await;
    assert_eq!((status, &problem["code"], &problem["field"]), (403, &json!("forbidden"), &json!("all")));
    assert_eq!(page("ada", "", "all=false").await.1["threads"].as_array().unwrap().len(), 2);
    assert_eq!(page("ada", "", "all=1").await.1["field"], "all");
}

#[tokio::test]
async fn threads_are_made_retitled_listed_and_shared() {
    let server = Server::start(LogKind::embedded());
    let (status, made) =
        server.http("PUT", "/v1/threads/t1", "ada", Some(json!({"title": "Plans", "members": ["ben"]}))).await;
    assert_eq!(status, 201, "{made}");
    has(&made, json!({"head": 1, "members": ["ada", "ben"], "title": "Plans"}));
    assert_eq!(made["hash"].as_str().unwrap().len(), 64);
    assert!(made["epoch"].is_string());
    let (status, same) =
        server.http("PUT", "/v1/threads/t1", "ben", Some(json!({"title": "Plans", "members": ["ada"]}))).await;
    assert_eq!((status, &same["head"]), (200, &json!(1)), "nothing to change, nothing written");
    let (status, retitled) =
        server.http("PUT", "/v1/threads/t1", "ben", Some(json!({"title": "Better plans", "members": ["cid"]}))).await;
    assert_eq!(status, 200, "{retitled}");
    has(&retitled, json!({"head": 3, "title": "Better plans"}));
    assert_eq!(retitled["members"], json!(["ada", "ben", "cid"]));
    assert_eq!(server.http("PUT", "/v1/threads/t1", "ada", None).await.0, 200, "an empty body asks for nothing");
    let (status, added) = server.http("PUT", "/v1/threads/t1/members/dan", "cid", None).await;
    assert_eq!(status, 201, "{added}");
    has(&added, json!({"seq": 4, "changed": true}));
    assert_eq!(server.http("PUT", "/v1/threads/t1/members/dan", "cid", None).await.0, 200);
    assert_eq!(server.http("DELETE", "/v1/threads/t1/members/dan", "dan", None).await.0, 200, "one may leave");
    assert_eq!(server.http("GET", "/v1/threads/t1", "dan", None).await.0, 404);
    for n in 2..=5 {
        server.connect("ada").await.say(&format!("t{n}"), "hello").await;
    }
    server.connect("ada").await.say("t1", "newest").await;
    let (mut all, mut cursor) = (Vec::new(), String::new());
    loop {
        let (status, page) = server.http("GET", &format!("/v1/threads?limit=2{cursor}"), "ada", None).await;
        assert_eq!(status, 200, "{page}");
        all.extend(page["threads"].as_array().unwrap().clone());
        let Some(next) = page["next"].as_str() else { break };
        cursor = format!("&cursor={next}");
        let foreign = server.http("GET", &format!("/v1/threads?limit=2{cursor}"), "ben", None).await;
        assert_eq!((foreign.0, &foreign.1["code"]), (400, &json!("cursor_invalid")), "another user's cursor");
    }
    let ids: Vec<&str> = all.iter().map(|thread| thread["thread"].as_str().unwrap()).collect();
    assert_eq!(ids[0], "t1", "newest activity first");
    let mut others = ids[1..].to_vec();
    others.sort();
    assert_eq!(others, ["t2", "t3", "t4", "t5"], "each once, over three pages");
    let times: Vec<&str> = all.iter().map(|thread| thread["last"]["at"].as_str().unwrap()).collect();
    assert!(times.is_sorted_by(|a, b| a >= b), "{times:?}");
    assert_eq!((&all[0]["title"], &all[0]["last"]["data"]["content"]), (&json!("Better plans"), &json!("newest")));
    has(&all[0], json!({"head": 6, "members": ["ada", "ben", "cid"]}));
}

#[tokio::test]
async fn refusals_over_http_are_problems_that_name_the_field() {
    let server = Server::start(LogKind::embedded());
    let cases = [
        ("POST", "/v1/threads/t/events", json!({"kind": "user_message"}), 400, "bad_request", "data"),
        (
            "POST",
            "/v1/threads/t/events",
            json!({"kind": "user_message", "data": {"content": "x"}, "colour": 1}),
            400,
            "bad_request",
            "colour",
        ),
        ("POST", "/v1/threads/t/events", json!({"kind": "member_added", "data": {}}), 400, "bad_request", "kind"),
        (
            "POST",
            "/v1/threads/t/events",
            json!({"kind": "x.big", "data": "x".repeat(70_000)}),
            413,
            "too_large",
            "data",
        ),
        ("POST", "/v1/threads/.bad/events", json!({"kind": "x.a", "data": 1}), 400, "bad_request", "thread"),
        ("PUT", "/v1/threads/t", json!({"titel": "x"}), 400, "bad_request", "titel"),
        ("PUT", "/v1/threads/t", json!({"members": ["a b"]}), 400, "bad_request", "members"),
        ("PUT", "/v1/threads/t", json!({"title": "x".repeat(600)}), 400, "bad_request", "title"),
    ];
    for (method, path, body, status, code, field) in cases {
        let (got, problem) = server.http(method, path, "ada", Some(body.clone())).await;
        assert_eq!(
            (got, &problem["code"], &problem["field"]),
            (status, &json!(code), &json!(field)),
            "{path} {problem}"
        );
        assert!(problem["detail"].is_string());
    }
    let (status, problem) = server.http("POST", "/v1/threads/t/events", "ada", Some(json!("x".repeat(300_000)))).await;
    assert_eq!(status, 413, "{problem}");
    has(&problem, json!({"code": "too_large"}));
    let (status, problem) = server.http("GET", "/v1/nothing", "ada", None).await;
    assert_eq!(status, 404, "{problem}");
    has(&problem, json!({"code": "not_found"}));
    assert_eq!(server.http("DELETE", "/v1/threads", "ada", None).await.0, 405);
    let reply = reqwest::get(format!("{}/v1/threads", server.url)).await.unwrap();
    assert_eq!(reply.headers()["www-authenticate"], "Bearer");
    assert_eq!(reply.headers()["content-type"], "application/problem+json");
}

#[tokio::test]
async fn health_shows_the_state_of_each_part_and_metrics_count_each_step() {
    let server = Server::start(LogKind::embedded());
    server.ready().await;
    let (status, ready) = server.http("GET", "/readyz", "x", None).await;
    assert_eq!(
        (status, &ready["ready"], &ready["log"]["ok"], &ready["store"]["ok"]),
        (200, &json!(true), &json!(true), &json!(true))
    );
    has(&ready["projector"], json!({"caught_up": true, "lag_records": 0}));
    assert_eq!(server.http("GET", "/healthz", "x", None).await.0, 200);
    let mut socket = server.connect("ada").await;
    socket.say("t", "one").await;
    socket.subscribe("t", Some(0)).await;
    socket.events(1).await;
    socket.say("t", "two").await;
    socket.ask(json!({"type": "nonsense"})).await;
    for (name, at_least) in [
        ("weft_connections", 1.0),
        ("weft_connections_total", 1.0),
        ("weft_commands_total", 4.0),
        ("weft_append_seconds_count", 2.0),
        ("weft_append_batch_records_count", 2.0),
        ("weft_project_seconds_count", 2.0),
        ("weft_project_events_total", 2.0),
        ("weft_publish_seconds_count", 2.0),
        ("weft_deliveries_total", 2.0),
        ("weft_replayed_events_total", 1.0),
        ("weft_http_requests_total", 3.0),
        ("process_resident_memory_bytes", 1e6),
    ] {
        let value = server.metric(name).await;
        assert!(value >= at_least, "{name} is {value}");
    }
}

#[tokio::test]
async fn dashboards_and_docs_name_every_metric_and_none_that_is_not_there() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let known: Vec<&str> = weft::telemetry::names().collect();
    for file in ["grafana/weft.json", "grafana/alerts.yml", "docs/OPERATIONS.md"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let mut found = 0;
        for word in
            text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| word.starts_with("weft_"))
        {
            let base =
                ["_bucket", "_count", "_sum"].iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
            assert!(known.contains(&word) || known.contains(&base), "{file} names {word}");
            found += 1;
        }
        assert!(found > 5, "{file} names metrics");
    }
    let dashboard = std::fs::read_to_string(root.join("grafana/weft.json")).unwrap();
    let operations = std::fs::read_to_string(root.join("docs/OPERATIONS.md")).unwrap();
    for name in known {
        assert!(operations.contains(name), "docs/OPERATIONS.md lacks {name}");
        assert!(dashboard.contains(name), "grafana/weft.json lacks {name}");
    }
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    run_command(weft().args(arguments))
}

fn run_command(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// A `weft serve` whose output a test reads.
struct Serving {
    child: Child,
    lines: mpsc::Receiver<String>,
    errors: Option<JoinHandle<String>>,
}

impl Serving {
    fn start(command: &mut Command) -> Serving {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        // More lines than the server prints.
        let (sender, lines) = mpsc::sync_channel(1_000);
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                // The test may have read enough.
                if sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            err.read_to_string(&mut text).unwrap();
            text
        });
        Serving { child, lines, errors: Some(errors) }
    }

    /// The words of the next line that begins with `first`.
    fn line(&self, first: &str) -> Vec<String> {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line begins with {first:?}"));
            if line.starts_with(first) {
                return line.split_whitespace().map(str::to_owned).collect();
            }
        }
    }

    /// SIGTERM: gives the exit code and what was logged.
    fn stop(mut self) -> (Option<i32>, String) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        (self.child.wait().unwrap().code(), self.errors.take().unwrap().join().unwrap())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_mints_tokens_lists_threads_and_follows_them() {
    let server = Server::start(LogKind::embedded());
    let (code, token, _) = run(&["token", "--jwt-secret", SECRET, "--sub", "ada", "--tenant", TENANT, "--ttl", "10m"]);
    assert_eq!((code, token.lines().count()), (0, 1), "a token and nothing else");
    let token = token.trim();
    assert_eq!(server.http_with("GET", "/v1/threads", token, None, &[]).await.0, 200);
    let mut ada = server.connect("ada").await;
    ada.say("t", "one").await;
    let (code, listed, said) = run(&["threads", "--url", &server.url, "--token", token, "--json"]);
    assert_eq!(code, 0, "{said}");
    assert!(listed.contains(r#""thread":"t""#) || listed.contains(r#""thread": "t""#), "{listed}");
    let mut tail = weft()
        .args(["tail", "t", "--url", &server.url, "--token", token, "--after", "0", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["seq"], 1);
    ada.say("t", "two").await;
    assert_eq!(next()["data"]["content"], "two");
    tail.kill().unwrap();
    tail.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_analyst_tails_every_thread_of_the_tenant() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("old", "one").await;
    let analyst = token("ana", "analyst");
    let mut tail = weft()
        .args(["tail", "*", "--all", "--after", "0", "--json", "--url", &server.url, "--token", &analyst])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    has(&next(), json!({"thread": "old", "seq": 1}));
    ada.say("new", "two").await;
    has(&next(), json!({"thread": "new", "seq": 1}));
    tail.kill().unwrap();
    tail.wait().unwrap();

    let tail = |token: &str, thread: &str| run(&["tail", thread, "--all", "--url", &server.url, "--token", token]);
    let (code, _, said) = tail(&analyst, "old");
    assert!(code == 2 && said.contains("--all goes with the thread \"*\""), "{said}");
    let (code, _, said) = tail(&token("ada", ""), "*");
    assert!(code == 1 && said.contains("forbidden"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_plays_against_a_running_server() {
    let server = Server::start(LogKind::embedded());
    let (code, said, errors) = run(&["demo", "--url", &server.url, "--jwt-secret", SECRET, "--tenant", TENANT]);
    assert_eq!(code, 0, "{said}{errors}");
    for kind in ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"] {
        assert!(said.contains(kind), "{kind} in {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_several_pages_is_one_table_or_one_list_as_json() {
    const THREADS: usize = 1_005;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..THREADS {
        ada.say(&format!("t{n}"), "hello").await;
    }
    let ada = token("ada", "");
    let threads = |more: &[&str]| run(&[&["threads", "--url", &server.url, "--token", &ada], more].concat());
    let (code, table, said) = threads(&[]);
    assert_eq!((code, table.lines().count()), (0, 1 + THREADS), "{said}");
    assert_eq!(table.matches("unread").count(), 1, "one header");
    let (_, listed, _) = threads(&["--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let names: HashSet<&str> =
        listed["threads"].as_array().unwrap().iter().map(|row| row["thread"].as_str().unwrap()).collect();
    assert_eq!(names.len(), THREADS);
    let (_, listed, _) = threads(&["--json", "--until", "1970-01-01T00:00:00Z"]);
    assert_eq!(listed, "{\"threads\":[]}\n");
    assert_eq!(threads(&["--until", "1970-01-01T00:00:00Z"]).1, "no thread is such\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_lists_runs_and_shows_one_as_a_waterfall() {
    let server = Server::start(LogKind::embedded());
    let agent_token = token("scout", "publish subscribe agent");
    let runs =
        |arguments: &[&str]| run(&[&["runs", "--url", &server.url, "--token", &agent_token], arguments].concat());
    let (code, said, _) = runs(&[]);
    assert_eq!((code, said.trim()), (0, "no run is open"));
    let mut agent = server.connect_as("scout", "publish subscribe agent").await;
    let steps = [
        ("r", "agent_started", json!({"agent": "scout"})),
        ("sub", "agent_started", json!({"agent": "helper", "parent_run": "r"})),
        ("r", "tool_executing", json!({"tool": "map", "call": "c1"})),
        ("r", "tool_completed", json!({"call": "c1", "error": "no map"})),
        ("r", "agent_token", json!({"message": "m", "from_char": 0, "text": "So"})),
        ("r", "agent_waiting", json!({"reason": "approval", "prompt": "Pay?"})),
    ];
    for (run, kind, data) in steps {
        let mut command = publish("t", kind, data);
        command["run"] = json!(run);
        assert_eq!(agent.ask(command).await["type"], "published");
    }
    let (code, listed, said) = runs(&["--state", "waiting"]);
    assert_eq!(code, 0, "{said}");
    assert!(listed.contains("Pay?") && listed.lines().count() == 2, "{listed}");
    assert_eq!(runs(&[]).1.lines().count(), 3, "two are open");
    let (_, listed, _) = runs(&["--thread", "t", "--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["runs"].as_array().unwrap().len(), 2, "{listed}");
    let (code, shown, said) = runs(&["r"]);
    assert_eq!(code, 0, "{said}");
    for wanted in [
        "agent scout",
        "state waiting",
        "!tool map (c1): no map",
        ">message m (2 characters)",
        ">waiting",
        "run sub (helper) open",
    ] {
        assert!(shown.contains(wanted), "{wanted} in {shown}");
    }
    assert!(shown.is_ascii() && shown.lines().all(|line| line.len() <= 100), "{shown}");
    let (_, same, _) = runs(&["r", "--thread", "t", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&same).unwrap()["tools"][0]["error"], "no map");
    assert_eq!(runs(&["nobody"]).0, 1);
    assert_eq!(runs(&["--state", "done"]).0, 2);
    assert_eq!(runs(&["r", "--state", "open"]).0, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_development_server_plays_the_demo_and_prints_a_token_that_works() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = weft();
    command.args(["serve", "--dev", "--demo", "--listen", "127.0.0.1:0", "--data"]).arg(folder.path().join("data"));
    let serving = Serving::start(&mut command);
    let thread = serving.line("thread ")[1].trim_end_matches(':').to_owned();
    let url = serving.line("address")[1].clone();
    let token = serving.line("token")[1].clone();
    let try_it = serving.line("try it").join(" ");
    assert!(try_it.contains(&token) && try_it.contains(&format!("tail --url {url} '{thread}' --after 0")), "{try_it}");

    let mut socket = Socket::open(&url, &token).await;
    socket.subscribe(&thread, Some(0)).await;
    assert_eq!(socket.events(1).await[0]["kind"], "thread_created");
    drop(socket);

    let (code, logged) = serving.stop();
    assert_eq!(code, Some(0), "{logged}");
    assert!(logged.contains("weft is up") && logged.contains("weft is down"), "{logged}");
    assert!(!logged.contains('\u{1b}'), "colours in a file: {logged:?}");
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("listen = \"127.0.0.1:0\"\ndata = \"of-the-file\"\njwt_secret = {SECRET:?}\n");
    std::fs::write(folder.path().join("weft.toml"), file).unwrap();
    let there = || {
        let mut names: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "weft.toml")
            .collect();
        names.sort();
        names
    };
    let start = |variable: Option<&str>, flag: Option<&str>| {
        let mut command = weft();
        command.arg("serve").current_dir(folder.path());
        command.envs(variable.map(|data| ("WEFT_DATA", data)));
        command.args(flag.map(|data| format!("--data={data}")));
        let serving = Serving::start(&mut command);
        let url = serving.line("weft is up on")[4].clone();
        assert_eq!(serving.stop().0, Some(0));
        url
    };
    assert!(!start(None, None).ends_with(":8080"), "the file beats the default");
    assert_eq!(there(), ["of-the-file"]);
    start(Some("of-the-environment"), None);
    assert_eq!(there(), ["of-the-environment", "of-the-file"]);
    start(Some("of-nothing"), Some("of-the-flag"));
    assert_eq!(there(), ["of-the-environment", "of-the-file", "of-the-flag"]);
}

#[test]
fn a_mistake_in_the_settings_is_named_by_file_line_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("other.toml");
    let refused = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let (code, _, said) = run(&["serve", "--config", file.to_str().unwrap()]);
        assert_eq!(code, 2, "{said}");
        said.trim_end().replace(file.to_str().unwrap(), "FILE")
    };
    assert_eq!(
        refused("# comment\n\npartitoins = 4\n"),
        "weft: FILE, line 3: unknown key `partitoins`; did you mean `partitions`?"
    );
    assert_eq!(
        refused("dev = true\npartitions = \"many\"\n"),
        "weft: FILE, line 2: `partitions` must be a whole number, at least 1, not \"many\""
    );
    assert!(refused("dev = true\nlog = \n").starts_with("weft: FILE, line 2: "));
    assert_eq!(
        refused("jwt_secret = \"short\""),
        "weft: FILE, line 1: `jwt_secret` must be at least 32 bytes long, and has 5"
    );
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    let refused = |arguments: &[&str]| {
        let (code, out, said) = run(arguments);
        assert_eq!((code, &*out), (2, ""), "{said}");
        said
    };
    let said = refused(&["serve", "--jwt-secret", "short"]);
    assert_eq!(said.trim_end(), "weft: --jwt-secret must be at least 32 bytes long, and has 5");
    let said = refused(&["serve", "--jwt-secret", SECRET, "--allow-origin", "app.example"]);
    assert!(said.contains("--allow-origin") && said.contains("https://app.example"), "{said}");
    let (code, _, said) = run_command(weft().args(["schemas", "--out", "/nowhere"]).env("WEFT_LOG_LEVEL", "loud"));
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("WEFT_LOG_LEVEL") && said.contains("debug") && said.contains("loud"), "{said}");
}

#[test]
fn a_token_that_no_server_would_accept_is_not_made() {
    let refused = |secret: &str, more: &[&str]| {
        let (code, out, said) = run(&[&["token", "--jwt-secret", secret], more].concat());
        assert_eq!((code, &*out), (2, ""), "{said}");
        assert!(!said.contains(secret), "the secret is not repeated: {said}");
        said
    };
    let said = refused(SECRET, &["--tenant", TENANT, "--sub", "a b"]);
    assert!(said.contains("--sub") && said.contains("'a b'"), "{said}");
    let said = refused(SECRET, &["--tenant", TENANT, "--sub", "weft"]);
    assert!(said.contains("--sub") && said.contains("server's own user"), "{said}");
    let said = refused(SECRET, &["--tenant", "a/b", "--sub", "ada"]);
    assert!(said.contains("--tenant"), "{said}");
    let said = refused(SECRET, &["--tenant", TENANT, "--sub", "ada", "--scope", "publish write"]);
    assert!(said.contains("--scope") && said.contains("there is no scope write"), "{said}");
    assert!(said.contains("publish, subscribe, agent, broadcast, analyst, admin"), "{said}");
    let said = refused("2short", &["--tenant", TENANT, "--sub", "ada"]);
    assert_eq!(said.trim_end(), "weft: --jwt-secret must be at least 32 bytes long, and has 6");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_the_server_is_printed_in_its_words() {
    let server = Server::start(LogKind::embedded());
    let ada = token("ada", "");
    let ask = |arguments: &[&str]| {
        let (code, _, said) = run(&[arguments, &["--url", &server.url]].concat());
        assert_eq!(code, 1, "{said}");
        assert!(!said.contains('{'), "no JSON: {said}");
        said
    };
    let said = ask(&["runs", "--thread", "nowhere", "--token", &ada]);
    assert!(said.starts_with("weft: not_found: "), "{said}");
    let said = ask(&["dead-letters", "--token", &ada]);
    assert!(said.starts_with("weft: forbidden: "), "{said}");
    let said = ask(&["threads", "--token", "nonsense"]);
    assert_eq!(said.trim_end(), "weft: unauthenticated: the token is not a JWT (token)");
    let said = ask(&["tail", "t", "--token", "nonsense"]);
    assert_eq!(said.trim_end(), "weft: unauthenticated: the token is not a JWT (token)");
}

#[test]
fn a_command_that_is_planned_says_so() {
    for line in [&["backup"][..], &["backup", "--help"], &["restore", "--data", "d"], &["completions", "bash"]] {
        let (code, out, said) = run(line);
        assert_eq!((code, &*out), (2, ""), "{said}");
        assert!(said.contains(&format!("`weft {}` is planned, and not there yet", line[0])), "{said}");
    }
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, 0);
    assert!(help.contains("Planned, not there yet: backup, restore"), "{help}");
}

#[test]
fn wrong_usage_exits_with_2_and_a_failure_with_1() {
    assert_eq!(run(&["dance"]).0, 2);
    assert_eq!(run(&["serve", "--partitions", "many"]).0, 2);
    let (code, _, said) = run(&["serve", "--listen", "127.0.0.1:0"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("--jwt-secret"), "{said}");
    let (code, _, said) = run(&["serve", "--dev", "--listen", "0.0.0.0:0"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("loopback"), "{said}");
    let (code, _, said) = run(&["tail", "t", "--url", "http://127.0.0.1:9", "--token", "bad"]);
    assert_eq!(code, 1, "{said}");
}
