//! One budget of memory: what requests and readers hold is bounded in sum, whoever does not fit is refused or waits, and
//! everybody else is served.

use std::collections::BTreeSet;

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::sse::EventStream;
use crate::support::{
    LogKind, Server, Socket, TENANT, accepted, claims, eventually, publish, refused_with, token, token_of,
};
use weft::auth::jwt::{Claims, mint};
use weft::memory::{MINIMUM, Plan};

const AGENT: &str = "publish subscribe agent";
/// The largest `data` there is, about.
const LARGE: usize = 60_000;

/// A server with the smallest budget.
fn small() -> Server {
    Server::start_with(LogKind::embedded(), &["--memory", "256MiB", "--rate-user", "0", "--rate-agent", "0"])
}

/// A metric's value for one part of the budget.
async fn part(server: &Server, metric: &str, part: &str) -> usize {
    let text = reqwest::get(format!("{}/metrics", server.url)).await.unwrap().text().await.unwrap();
    let series = format!("{metric}{{part=\"{part}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&series));
    value.unwrap_or_else(|| panic!("no {series}")).parse::<f64>().unwrap() as usize
}

/// What the process has had resident at most since it was last asked to forget that, in bytes.
struct Resident<'a> {
    server: &'a Server,
    before: usize,
}

impl Resident<'_> {
    fn from_now(server: &Server) -> Resident<'_> {
        std::fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").unwrap();
        Resident { server, before: status(server, "VmRSS:") }
    }

    /// By how much it has grown at most.
    fn grew(&self) -> usize {
        status(self.server, "VmHWM:").saturating_sub(self.before)
    }
}

fn status(server: &Server, name: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// Publishes commands in frames of three, which is as much as fits, and fails if one is refused.
async fn publish_all(socket: &mut Socket, commands: Vec<Value>) {
    for frame in commands.chunks(3) {
        let numbered = frame.iter().enumerate().map(|(id, command)| {
            let mut command = command.clone();
            command["id"] = json!(id);
            command
        });
        socket.send(&numbered.collect()).await;
        for _ in frame {
            accepted(&socket.recv().await);
        }
    }
}

fn step(thread: &str, run: &str, kind: &str, data: Value) -> Value {
    json!({"type": "publish", "thread": thread, "run": run, "kind": kind, "data": data})
}

/// A thread of so many large events, with these members.
async fn large_thread(server: &Server, thread: &str, members: &[&str], events: usize) {
    let mut socket = server.connect(members[0]).await;
    let path = format!("/v1/threads/{thread}");
    let made = server.http("PUT", &path, members[0], Some(json!({"members": members[1..]}))).await;
    assert_eq!(made.0, 201, "{}", made.1);
    let event = publish(thread, "x.load", json!({"text": "x".repeat(LARGE)}));
    publish_all(&mut socket, vec![event; events]).await;
}

/// A request whose answer is not read.
async fn ask(server: &Server, path: &str, token: &str) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    // The loopback's segments are larger than that buffer.
    socket2::SockRef::from(&socket).set_tcp_mss(1_460).unwrap();
    let mut stream = socket.connect(server.url.trim_start_matches("http://").parse().unwrap()).await.unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The status and the body of such an answer.
async fn answer(mut stream: TcpStream) -> (u16, Value) {
    socket2::SockRef::from(&stream).set_recv_buffer_size(4 << 20).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if status == 503 {
        assert!(head.to_ascii_lowercase().contains("\r\nretry-after: 1\r\n"), "{head}");
    }
    (status, serde_json::from_str(body).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_nobody_reads_take_no_more_than_their_part_and_others_are_served() {
    let server = small();
    let users = ["ada", "bob", "cleo", "dan"];
    large_thread(&server, "t", &users, 70).await;
    let budget = part(&server, "weft_memory_budget_bytes", "requests").await;
    assert_eq!(budget, Plan::of(MINIMUM).requests);

    // More than there is room for: 60 pages of 4 MiB.
    let resident = Resident::from_now(&server);
    let mut asked = Vec::new();
    for user in users {
        for _ in 0..15 {
            asked.push(ask(&server, "/v1/threads/t/events?limit=1000", &token(user, "")).await);
        }
    }
    eventually("some are refused", async || {
        let used = part(&server, "weft_memory_used_bytes", "requests").await;
        assert!(used <= budget, "{used} of {budget}");
        part(&server, "weft_memory_refused_total", "requests").await > 0
    })
    .await;

    // Another tenant reads, writes and gets its events meanwhile.
    let other = token_of("other", "eve");
    let mut socket = Socket::open(&server.url, &other).await;
    socket.say("u", "one").await;
    socket.subscribe("u", Some(0)).await;
    assert_eq!(socket.events(1).await[0]["data"]["content"], "one");
    let (status, page) = server.http_with("GET", "/v1/threads/u/events?limit=1", &other, None, &[]).await;
    assert_eq!((status, page["events"].as_array().unwrap().len()), (200, 1));

    eventually("all are answered or refused", async || part(&server, "weft_memory_waiting", "requests").await == 0)
        .await;
    let (mut right, mut refused) = (0, 0);
    for stream in asked {
        match answer(stream).await {
            (200, page) => {
                let events = page["events"].as_array().unwrap();
                assert!(events.len() > 60 && events[1]["data"]["text"].as_str().unwrap().len() == LARGE);
                right += 1;
            }
            (status, problem) => {
                assert_eq!(status, 503, "{problem}");
                refused_with(&problem, "unavailable");
                assert!(problem["retry_after_ms"].as_u64().unwrap() > 0);
                refused += 1;
            }
        }
    }
    assert!(right >= 6 && refused > 0, "{right} {refused}");
    eventually("all is given back", async || part(&server, "weft_memory_used_bytes", "requests").await == 0).await;
    // Without a budget it would be 240 MiB for the pages alone.
    assert!(resident.grew() < 160 << 20, "{} MiB", resident.grew() >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_of_a_run_costs_what_it_answers_however_large_its_steps_are() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut bot = server.connect_as("bot", AGENT).await;
    bot.say("t", "begin").await;
    accepted(&bot.ask(step("t", "r", "agent_started", json!({"agent": "a"}))).await);
    let large = step("t", "r", "agent_thinking", json!({"content": "x".repeat(LARGE)}));
    publish_all(&mut bot, vec![large; 600]).await;

    let resident = Resident::from_now(&server);
    let pages = (0..20).map(|_| server.http("GET", "/v1/threads/t/runs/r", "bot", None));
    for (status, page) in futures_util::future::join_all(pages).await {
        assert_eq!((status, page["steps"].as_array().unwrap().len(), &page["truncated"]), (200, 601, &Value::Null));
    }
    // Twenty times 36 MiB of steps.
    assert!(resident.grew() < 200 << 20, "{} MiB", resident.grew() >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_with_long_names_and_errors_has_a_page_of_four_mebibytes_and_says_that_there_is_more() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut bot = server.connect_as("bot", AGENT).await;
    bot.say("t", "begin").await;
    let mut steps = vec![step("t", "r", "agent_started", json!({"agent": "a"}))];
    for n in 0..60 {
        let call = format!("{n}-{}", "c".repeat(LARGE / 2));
        steps.push(step("t", "r", "tool_executing", json!({"tool": "map", "call": call})));
        steps.push(step("t", "r", "tool_completed", json!({"call": call, "error": "e".repeat(LARGE / 2)})));
    }
    steps.push(step("t", "r", "agent_failed", json!({"code": "x", "message": "gave up"})));
    publish_all(&mut bot, steps).await;

    let (status, page) = server.http("GET", "/v1/threads/t/runs/r", "bot", None).await;
    assert_eq!((status, &page["truncated"]), (200, &json!(true)));
    assert!((2 << 20..5 << 20).contains(&page.to_string().len()), "{}", page.to_string().len());
    assert_eq!(page["tools"][0]["error"].as_str().unwrap().len(), LARGE / 2);
    assert_eq!(page["error"]["message"], "gave up", "the end is there, although the steps are cut short");
}

/// All entries of a list, page by page; and how many pages there were.
async fn all_pages(server: &Server, path: &str, list: &str) -> (Vec<Value>, usize) {
    let (mut entries, mut pages, mut cursor) = (Vec::new(), 0, String::new());
    loop {
        let (status, page) = server.http("GET", &format!("{path}limit=1000{cursor}"), "bot", None).await;
        assert_eq!(status, 200, "{page}");
        assert!(page.to_string().len() < 5 << 20, "{} bytes", page.to_string().len());
        entries.extend(page[list].as_array().unwrap().clone());
        pages += 1;
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return (entries, pages),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_lists_end_at_four_mebibytes_and_lead_through_the_list_once() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut bot = server.connect_as("bot", AGENT).await;
    let mut commands = Vec::new();
    for n in 0..150 {
        let (thread, run) = (format!("t{n:03}"), format!("r{n:03}"));
        commands.push(publish(&thread, "x.made", json!({})));
        commands.push(step(&thread, &run, "agent_started", json!({"agent": "a"})));
        let question = json!({"reason": "ask", "prompt": "?".repeat(LARGE)});
        commands.push(step(&thread, &run, "agent_waiting", question));
    }
    publish_all(&mut bot, commands).await;

    let names = |entries: &[Value], field: &str| -> Vec<String> {
        entries.iter().map(|entry| entry[field].as_str().unwrap().to_owned()).collect()
    };
    let (threads, pages) = all_pages(&server, "/v1/threads?", "threads").await;
    let seen: BTreeSet<String> = names(&threads, "thread").into_iter().collect();
    assert!(pages > 2 && threads.len() == 150 && seen.len() == 150, "{pages} pages, {} threads", threads.len());

    let in_order: Vec<String> = (0..150).map(|n| format!("r{n:03}")).collect();
    for path in ["/v1/runs?", "/v1/runs?state=waiting&"] {
        let (runs, pages) = all_pages(&server, path, "runs").await;
        assert!(pages > 2, "{path}: {pages}");
        assert_eq!(names(&runs, "run"), in_order, "{path}: oldest first");
    }
    // Whoever reads by scope gets the same list.
    let analyst = token("ana", "analyst");
    let (_, page) = server.http_with("GET", "/v1/runs?state=waiting&limit=3", &analyst, None, &[]).await;
    assert_eq!(names(page["runs"].as_array().unwrap(), "run"), in_order[..3]);
}

/// What happens after this has a later time.
async fn later() {
    let now = weft::clock::now_ms();
    eventually("a millisecond has passed", async || weft::clock::now_ms() > now + 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_move_in_the_lists_of_open_ones_as_they_wait_go_on_and_end() {
    let server = Server::start(LogKind::embedded());
    let mut bot = server.connect_as("bot", AGENT).await;
    bot.say("t", "begin").await;
    for run in ["a", "b", "c"] {
        accepted(&bot.ask(step("t", run, "agent_started", json!({"agent": "a"}))).await);
        later().await;
    }
    let waits = step("t", "b", "agent_waiting", json!({"reason": "ask"}));
    let question = bot.ask(waits).await;
    accepted(&question);
    let analyst = token("ana", "analyst");
    let lists = async || {
        let mut lists = Vec::new();
        for (token, state) in [(&token("bot", ""), "open"), (&analyst, "open"), (&analyst, "waiting")] {
            let path = format!("/v1/runs?state={state}");
            let (_, page) = server.http_with("GET", &path, token, None, &[]).await;
            let runs = page["runs"].as_array().unwrap().iter().map(|run| run["run"].as_str().unwrap().to_owned());
            lists.push(runs.collect::<Vec<_>>().concat());
        }
        lists
    };
    assert_eq!(lists().await, ["acb", "acb", "b"], "what waits is listed by when it began to");
    let answer = json!({"answer": "yes"});
    let mut resumed = step("t", "b", "agent_resumed", answer);
    resumed["parent"] = question["seq"].clone();
    accepted(&bot.ask(resumed).await);
    assert_eq!(lists().await, ["abc", "abc", ""]);
    accepted(&bot.ask(step("t", "a", "agent_completed", json!({}))).await);
    later().await;
    accepted(&bot.ask(step("t", "b", "agent_waiting", json!({"reason": "again"}))).await);
    assert_eq!(lists().await, ["cb", "cb", "b"]);
    accepted(&bot.ask(step("t", "b", "agent_cancelled", json!({}))).await);
    assert_eq!(lists().await, ["c", "c", ""]);
    let (_, page) = server.http("GET", "/v1/threads/t/runs?limit=2", "bot", None).await;
    let runs = page["runs"].as_array().unwrap();
    assert_eq!((runs[0]["run"].as_str(), runs[1]["run"].as_str(), runs.len()), (Some("c"), Some("b"), 2));
    let cursor = page["next"].as_str().unwrap();
    let (_, page) = server.http("GET", &format!("/v1/threads/t/runs?limit=2&cursor={cursor}"), "bot", None).await;
    assert_eq!((page["runs"][0]["run"].as_str(), page.get("next")), (Some("a"), None), "{page}");
}

/// Writes messages of a mebibyte in pieces, and leaves them open.
async fn open_messages(bot: &mut Socket, thread: &str, messages: usize) {
    accepted(&bot.ask(step(thread, "r", "agent_started", json!({"agent": "a"}))).await);
    for message in 0..messages {
        let name = format!("m{message}");
        let pieces = (0..16).map(|n| {
            let letter = char::from(b'a' + n as u8).to_string();
            let data = json!({"message": name, "from_char": n * LARGE, "text": letter.repeat(LARGE)});
            step(thread, "r", "agent_token", data)
        });
        publish_all(bot, pieces.collect()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_while_long_messages_are_written_waits_for_memory_and_gets_every_text() {
    const JOINERS: usize = 40;
    let server = small();
    let mut bot = server.connect_as("bot", AGENT).await;
    bot.say("t", "begin").await;
    let users: Vec<String> = (0..4).map(|n| format!("u{n}")).collect();
    for user in &users {
        let (status, added) = server.http("PUT", &format!("/v1/threads/t/members/{user}"), "bot", None).await;
        assert_eq!(status, 201, "{added}");
    }
    open_messages(&mut bot, "t", 8).await;

    // None of them reads what it gets.
    let budget = Plan::of(MINIMUM).readers;
    let resident = Resident::from_now(&server);
    let mut joiners = Vec::new();
    for n in 0..JOINERS {
        let token = token(&users[n % users.len()], "");
        let mut joiner = Socket::open_with_small_buffer(&server.url, &token).await;
        joiner.send(&json!({"type": "subscribe", "id": 1, "thread": "t"})).await;
        joiners.push(joiner);
    }
    eventually("some wait", async || part(&server, "weft_memory_waiting", "readers").await > 0).await;

    // Another tenant's events come from the store and live.
    let mut other = Socket::open(&server.url, &token_of("other", "eve")).await;
    other.say("u", "one").await;
    other.subscribe("u", Some(0)).await;
    other.events(1).await;
    other.say("u", "two").await;
    assert_eq!(other.events(1).await[0]["data"]["content"], "two");

    // Each gets one delta for each message, with all of its text, and then what comes live.
    let whole: String = (0..16).map(|n| char::from(b'a' + n as u8).to_string().repeat(LARGE)).collect();
    let mut reading = Vec::new();
    for mut joiner in joiners {
        let whole = whole.clone();
        reading.push(tokio::spawn(async move {
            joiner.enlarge_buffer();
            let mut messages = BTreeSet::new();
            while messages.len() < 8 {
                let frame = joiner.recv_type("event").await;
                assert_eq!((&frame["kind"], frame["data"]["from_char"].as_u64()), (&json!("agent_token"), Some(0)));
                assert!(frame["data"]["text"] == *whole);
                messages.insert(frame["data"]["message"].as_str().unwrap().to_owned());
            }
            joiner
        }));
    }
    let mut joined = Vec::new();
    for reader in reading {
        joined.push(reader.await.unwrap());
        let used = part(&server, "weft_memory_used_bytes", "readers").await;
        assert!(used <= budget, "{used} of {budget}");
    }
    let more = json!({"message": "m3", "from_char": 16 * LARGE, "text": "more"});
    accepted(&bot.ask(step("t", "r", "agent_token", more)).await);
    for joiner in &mut joined {
        let frame = joiner.recv_type("event").await;
        assert_eq!((&frame["data"]["message"], &frame["data"]["text"]), (&json!("m3"), &json!("more")));
    }
    eventually("all is given back", async || part(&server, "weft_memory_used_bytes", "readers").await == 0).await;
    // Without a budget it would be 300 MiB for the texts alone, and as much for the frames.
    assert!(resident.grew() < 200 << 20, "{} MiB", resident.grew() >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_ag_ui_hold_no_texts_of_calls_and_messages_that_wait_for_a_run() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut bot = server.connect_as("bot", AGENT).await;
    bot.say("t", "begin").await;
    let text = "a".repeat(LARGE);
    let mut steps = Vec::new();
    for run in 0..20 {
        let run = format!("r{run:02}");
        steps.push(step("t", &run, "agent_started", json!({"agent": "a"})));
        for call in 0..16 {
            let data = json!({"tool": "map", "call": format!("c{call}"), "arguments": text});
            steps.push(step("t", &run, "tool_executing", data));
        }
    }
    publish_all(&mut bot, steps).await;

    // Each is sent the first run, and is to know what is open in the other nineteen.
    let resident = Resident::from_now(&server);
    let mut streams = Vec::new();
    for _ in 0..10 {
        let path = "/v1/threads/t/agui?after=0";
        streams.push(EventStream::open(&server, path, &token("bot", ""), &[]).await.unwrap());
    }
    for stream in &mut streams {
        loop {
            let event = stream.next().await.unwrap().json();
            if event["type"] == "TOOL_CALL_END" && event["toolCallId"] == "r00/calls/c15" {
                break;
            }
        }
    }
    accepted(&bot.ask(step("t", "r00", "agent_failed", json!({"code": "x", "message": "y"}))).await);
    for stream in &mut streams {
        let mut arguments = 0;
        loop {
            let event = stream.next().await.unwrap().json();
            match event["type"].as_str().unwrap() {
                "TOOL_CALL_ARGS" if event["toolCallId"].as_str().unwrap().starts_with("r01/") => {
                    assert!(event["delta"] == *text);
                    arguments += 1;
                }
                "TOOL_CALL_END" if event["toolCallId"] == "r01/calls/c15" => break,
                _ => {}
            }
        }
        assert_eq!(arguments, 16, "the next run is shown with all its calls");
    }
    // Ten times 18 MiB of arguments.
    assert!(resident.grew() < 120 << 20, "{} MiB", resident.grew() >> 20);
}

/// The beginning of a text frame with so much in it: its header, and a tenth of what follows.
fn begun_frame(text: &str) -> Vec<u8> {
    let mut bytes = vec![0x81, 0xff];
    bytes.extend((text.len() as u64).to_be_bytes());
    // Masked with zeros, which change nothing.
    bytes.extend([0; 4]);
    bytes.extend(&text.as_bytes()[..text.len() / 10]);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_are_begun_and_not_ended_take_no_more_than_their_users_part_and_others_are_served() {
    let server = small();
    let large =
        |id| json!({"type": "publish", "id": id, "thread": "t", "kind": "x.load", "data": {"text": "x".repeat(LARGE)}});
    let frame = json!([large(1), large(2), large(3)]).to_string();
    server.connect("ada").await.say("t", "one").await;
    let mut begun = Vec::new();
    let share = Plan::of(MINIMUM).frames / 8;
    for _ in 0..share / frame.len() + 10 {
        let mut socket = server.connect("ada").await;
        socket.ws.get_mut().write_all(&begun_frame(&frame)).await.unwrap();
        begun.push(socket);
    }
    eventually("some wait", async || part(&server, "weft_memory_waiting", "frames").await > 0).await;
    let used = part(&server, "weft_memory_used_bytes", "frames").await;
    assert!(0 < used && used <= share, "{used}");

    // Another user's large frame is taken meanwhile, and requests have memory of their own.
    assert_eq!(server.http("GET", "/v1/threads/t/events?limit=1000", "ada", None).await.0, 200);
    let mut bob = server.connect("bob").await;
    publish_all(&mut bob, vec![publish("u", "x.load", json!({"text": "x".repeat(LARGE)})); 3]).await;

    eventually("who has waited too long is refused", async || {
        part(&server, "weft_memory_waiting", "frames").await == 0
    })
    .await;
    let (mut refused, mut answered) = (0, 0);
    for mut socket in begun {
        // A socket that the server has closed takes it as well.
        drop(socket.ws.get_mut().write_all(&frame.as_bytes()[frame.len() / 10..]).await);
        match socket.ws.next().await.unwrap() {
            Ok(Message::Close(Some(close))) => {
                assert_eq!(u16::from(close.code), 4006, "{close}");
                refused += 1;
            }
            Ok(Message::Text(answer)) => {
                accepted(&serde_json::from_str(&answer).unwrap());
                answered += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 0 && answered >= share / frame.len(), "{refused} {answered}");
    eventually("all is given back", async || part(&server, "weft_memory_used_bytes", "frames").await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_frame_ends_in_time_and_before_the_user_is_known_there_is_none() {
    let server = small();
    let frame = format!("\"{}\"", "x".repeat(3 * LARGE));
    let mut slow = server.connect("ada").await;
    slow.ws.get_mut().write_all(&begun_frame(&frame)).await.unwrap();
    let mut unknown = Socket::raw(&server.url, &[]).await.unwrap();
    unknown.ws.get_mut().write_all(&begun_frame(&frame)).await.unwrap();
    assert_eq!(unknown.closed().await, 1009);
    assert!(unknown.reason.contains("16 KiB"), "{}", unknown.reason);

    // A byte now and then does not help.
    let mut every = tokio::time::interval(std::time::Duration::from_secs(1));
    let closed = async {
        loop {
            tokio::select! {
                frame = slow.ws.next() => match frame.unwrap().unwrap() {
                    Message::Close(Some(close)) => return close,
                    other => assert!(matches!(other, Message::Ping(_)), "{other:?}"),
                },
                _ = every.tick() => slow.ws.get_mut().write_all(b"x").await.unwrap(),
            }
        }
    };
    let close = tokio::time::timeout(crate::support::PATIENCE, closed).await.unwrap();
    assert_eq!(u16::from(close.code), 4002, "{close}");
    eventually("all is given back", async || part(&server, "weft_memory_used_bytes", "frames").await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_is_too_small_or_no_size_is_refused_by_name() {
    for (memory, why) in [("1MiB", "at least 256"), ("much", "a size such as 2GiB")] {
        let output = crate::support::weft().args(["serve", "--dev", "--memory", memory]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains("--memory") && said.contains(why), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_leaves_a_quarter_of_the_memory_to_others() {
    let server = small();
    let users = ["ada", "bob", "cleo", "dan"];
    large_thread(&server, "t", &users, 70).await;
    let mut asked = Vec::new();
    for user in users {
        for _ in 0..15 {
            asked.push(ask(&server, "/v1/threads/t/events?limit=1000", &token(user, "")).await);
        }
    }
    eventually("some are refused", async || part(&server, "weft_memory_refused_total", "requests").await > 0).await;
    let used = part(&server, "weft_memory_used_bytes", "requests").await;
    let limit = Plan::of(MINIMUM).requests;
    assert!(used <= limit - limit / 4, "{TENANT} has {used} of {limit}");

    // A large page of another tenant is made at once.
    let other = mint(crate::support::SECRET, &Claims { tenant: "other".into(), ..claims("eve", "") }).unwrap();
    let mut socket = Socket::open(&server.url, &other).await;
    publish_all(&mut socket, vec![publish("u", "x.load", json!({"text": "x".repeat(LARGE)})); 40]).await;
    let (status, page) = server.http_with("GET", "/v1/threads/u/events?limit=40", &other, None, &[]).await;
    assert_eq!((status, page["events"].as_array().map(Vec::len)), (200, Some(40)));
    drop(asked);
}
