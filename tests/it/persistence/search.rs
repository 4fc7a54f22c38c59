//! Search on a server: what was acknowledged is found at once, by those who may read it, also after kills and without the index.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weft::clock;

use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, accepted, eventually, has, publish, refused, token, token_of, weft};

/// Percent-encodes what stands in a query.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn search_as(server: &Server, token: &str, q: &str, more: &str) -> (u16, Value) {
    server.http_with("GET", &format!("/v1/search?q={}{more}", encoded(q)), token, None, &[]).await
}

/// What ada finds.
async fn search(server: &Server, q: &str, more: &str) -> Value {
    let (status, found) = search_as(server, &token("ada", ""), q, more).await;
    assert_eq!(status, 200, "{q}: {found}");
    found
}

/// The threads and seqs of hits, in their order.
fn places(found: &Value) -> Vec<(&str, u64)> {
    let hits = found["hits"].as_array().unwrap_or_else(|| panic!("{found}"));
    hits.iter().map(|hit| (hit["thread"].as_str().unwrap(), hit["seq"].as_u64().unwrap())).collect()
}

/// All that is found, page by page.
async fn all(server: &Server, q: &str, limit: usize) -> Vec<(String, u64)> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = search(server, q, &format!("&limit={limit}{cursor}")).await;
        found.extend(places(&page).into_iter().map(|(thread, seq)| (thread.to_owned(), seq)));
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return found,
        }
    }
}

/// Waits until all that came before this is looked at: after a start the index may have some way to go.
async fn until_complete(server: &Server) {
    let now = clock::rfc3339(clock::now_ms());
    let is_complete = async || *search(server, "anything ", "").await["complete_to"].as_str().unwrap() >= *now;
    eventually("searches are complete", is_complete).await;
}

on_both_logs!(what_was_acknowledged_is_found_at_once_and_after_a_start, |log| async move {
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for n in 0..60 {
        let seq = ada.say(&format!("t{}", n % 3), &format!("message number{n} of many")).await;
        let found = search(&server, &format!("number{n} "), "").await;
        assert_eq!(places(&found), [(&*format!("t{}", n % 3), seq)]);
    }
    assert_eq!(all(&server, "many ", 7).await.len(), 60);
    server.kill();
    server.up();
    server.ready().await;
    assert_eq!(all(&server, "many ", 100).await.len(), 60);
    server.stop().await;
    server.up();
    server.ready().await;
    assert_eq!(all(&server, "many ", 100).await.len(), 60);
});

#[tokio::test]
async fn a_hit_has_its_event_what_was_found_in_it_and_what_is_around_it() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 1..=5 {
        ada.say("t", &format!("Straße <b> no {n}")).await;
    }
    let found = search(&server, "strasse \"no 3\"", "&around=1").await;
    let hit = &found["hits"][0];
    has(hit, json!({"thread": "t", "seq": 3, "score": null}));
    has(&hit["event"], json!({"seq": 3, "kind": "user_message", "type": null, "from": "ada"}));
    has(
        &hit["highlights"][0],
        json!({"field": "text", "text": "Straße <b> no 3", "ranges": [[0, 6], [11, 15]],
            "marked": "<mark>Straße</mark> &lt;b&gt; <mark>no 3</mark>"}),
    );
    let around: Vec<&Value> = hit["around"].as_array().unwrap().iter().map(|event| &event["seq"]).collect();
    assert_eq!(around, [2, 4]);
    assert!(found["complete_to"].as_str().unwrap() >= hit["event"]["at"].as_str().unwrap(), "{found}");
    has(&found, json!({"partial": null, "corrected": null, "next": null}));

    let ranked = search(&server, "strasse ", "&order=relevance").await;
    assert!(ranked["hits"].as_array().unwrap().iter().all(|hit| hit["score"].as_f64().unwrap() > 0.0), "{ranked}");
}

#[tokio::test]
async fn a_hit_is_given_however_large_what_is_around_it_is() {
    let server = Server::start_unlimited(LogKind::embedded());
    let (status, _) =
        server.http("PUT", "/v1/threads/t", "ada", Some(json!({"title": "Long", "members": ["scout"]}))).await;
    assert_eq!(status, 201);
    let mut agent = server.connect_as("scout", "publish subscribe agent").await;
    let mut step = async |kind: &str, data: Value| {
        let mut command = publish("t", kind, data);
        command["run"] = json!("r1");
        accepted(&agent.ask(command).await);
    };
    step("agent_started", json!({"agent": "scout", "input": "write much"})).await;
    // Together they are more than an answer has room for.
    for message in ["m1", "m2", "m3", "m4", "m5"] {
        for part in 0..17 {
            let (from, text) = (part * 60_000, "x".repeat(60_000));
            step("agent_token", json!({"message": message, "from_char": from, "text": text})).await;
        }
        step("agent_message", json!({"message": message})).await;
    }
    let mut ada = server.connect("ada").await;
    let seq = ada.say("t", "a needle").await;
    ada.say("t", "the last one").await;

    let found = search(&server, "needle ", "&around=10").await;
    assert_eq!(places(&found), [("t", seq)]);
    let around: Vec<&Value> = found["hits"][0]["around"].as_array().unwrap().iter().map(|it| &it["seq"]).collect();
    assert_eq!(around, [seq - 4, seq - 3, seq - 2, seq - 1, seq + 1]);
}

#[tokio::test]
async fn words_fields_and_filters_find_what_they_name() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let (status, _) =
        server.http("PUT", "/v1/threads/t", "ada", Some(json!({"title": "Travel plans", "members": ["scout"]}))).await;
    assert_eq!(status, 201);
    assert_eq!(ada.say("t", "We are flying to Zürich tomorrow").await, 2);
    let mut agent = server.connect_as("scout", "publish subscribe agent").await;
    let mut step = async |kind: &str, data: Value| {
        let mut command = publish("t", kind, data);
        command["run"] = json!("r1");
        accepted(&agent.ask(command).await);
    };
    step("agent_started", json!({"agent": "scout", "input": "find hotels"})).await;
    step("tool_executing", json!({"tool": "web_search", "call": "c", "arguments": {"where": "Zurich", "n": 42}})).await;
    step("tool_completed", json!({"call": "c", "result": [{"name": "Hotel Krone"}]})).await;
    step("agent_token", json!({"message": "m", "from_char": 0, "text": "The Kro"})).await;
    step("agent_token", json!({"message": "m", "from_char": 7, "text": "nenhof has rooms"})).await;
    let unfinished = search(&server, "kronenhof ", "").await;
    step("agent_message", json!({"message": "m"})).await;
    assert_eq!(places(&unfinished), [], "a message is searched when all of it is there");

    let seqs = async |q: &str, more: &str| {
        let found = search(&server, q, more).await;
        places(&found).into_iter().map(|(_, seq)| seq).collect::<Vec<_>>()
    };
    for (q, more, expected) in [
        ("kronenhof ", "", vec![6]),
        ("zurich ", "", vec![4, 2]),
        ("ZÜRICH ", "", vec![4, 2]),
        ("Zu\u{308}rich ", "", vec![4, 2]),
        ("text:zurich ", "", vec![2]),
        ("arguments:zurich ", "", vec![4]),
        ("arguments:42 ", "", vec![4]),
        ("tool:search ", "", vec![4]),
        ("result:krone ", "", vec![5]),
        ("title:travel ", "", vec![1]),
        ("travels ", "", vec![1]),
        ("\"travels\"", "", vec![]),
        ("hotel ", "", vec![5, 3]),
        ("fly ", "", vec![2]),
        ("kron", "", vec![6, 5]),
        ("kro ", "", vec![]),
        ("kron* -rooms ", "", vec![5]),
        ("kronenhof OR tomorrow ", "", vec![6, 2]),
        ("\"flying to zurich\"", "", vec![2]),
        ("\"flying zurich\"", "", vec![]),
        ("zurich ", "&kind=user_message", vec![2]),
        ("zurich ", "&from=scout", vec![4]),
        ("zurich OR krone ", "&run=r1", vec![5, 4]),
        ("zurich ", "&thread=t", vec![4, 2]),
        ("zurich ", "&since=2999-01-01T00:00:00Z", vec![]),
        ("zurich ", "&until=2000-01-01T00:00:00Z", vec![]),
        ("zurich ", "&since=2000-01-01T00:00:00Z&until=2999-01-01T00:00:00Z", vec![4, 2]),
    ] {
        assert_eq!(seqs(q, more).await, expected, "{q} {more}");
    }

    let found = search(&server, "tomorow kroneh", "").await;
    assert_eq!((places(&found), &found["corrected"]), (vec![], &Value::Null), "no event has both");
    let found = search(&server, "flying tomorow ", "").await;
    assert_eq!((places(&found), &found["corrected"]), (vec![("t", 2)], &json!("flying tomorrow ")));
}

#[tokio::test]
async fn whatever_is_searched_for_has_an_answer_and_a_refusal_names_q() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let family = "👨‍👩‍👧‍👦";
    ada.say("t", &format!("{family} שָׁלוֹם \u{202e}abc\u{202c} 東京タワー café")).await;
    for q in [family, "שלום ", "שָׁלוֹם ", "\u{200f}abc ", "東京", "\"京タ\"", "cafe\u{301} ", "CAFÉ ", "caf*"]
    {
        let found = search(&server, q, "").await;
        assert_eq!(places(&found), [("t", 1)], "{q}");
        assert!(!found["hits"][0]["highlights"].as_array().unwrap().is_empty(), "{q}");
    }
    assert_eq!(places(&search(&server, "👨 ", "").await), [], "a family is not one of its members");

    let words = "w ".repeat(1_000);
    for (q, why) in [
        ("", "no word"),
        ("((((", "no word"),
        ("-abc", "without a minus"),
        ("a OR -b", "OR"),
        ("a-b*", "star"),
        (&*words, "64 words"),
        (&*"é".repeat(2_001), "2000 characters"),
    ] {
        let (status, answer) = search_as(&server, &token("ada", ""), q, "").await;
        refused(&answer, "bad_request", "q");
        assert_eq!(status, 400);
        assert!(answer["detail"].as_str().unwrap().contains(why), "{q:.20}: {answer}");
    }
    let (_, answer) = server.http("GET", "/v1/search", "ada", None).await;
    refused(&answer, "bad_request", "q");
    for (more, field) in [
        ("&order=best", "order"),
        ("&limit=101", "limit"),
        ("&around=11", "around"),
        ("&since=yesterday", "since"),
        ("&colour=red", "colour"),
    ] {
        refused(&search_as(&server, &token("ada", ""), "abc", more).await.1, "bad_request", field);
    }
    let (_, answer) = search_as(&server, &token("ada", ""), "abc", "&cursor=AAAA").await;
    refused(&answer, "cursor_invalid", "cursor");
}

#[tokio::test]
async fn who_may_not_read_a_thread_finds_nothing_of_it_from_that_moment_on() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "a secret").await;
    server.connect_as("bot", "publish agent").await.say("@user:ben", "a secret for ben").await;
    let found_by = async |user: &str, scope: &str| {
        let (status, found) = search_as(&server, &token(user, scope), "secret ", "").await;
        assert_eq!(status, 200, "{found}");
        places(&found).iter().map(|(thread, _)| (*thread).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(found_by("ada", "").await, ["t"]);
    assert_eq!(found_by("eve", "").await, [""; 0]);
    for _ in 0..20 {
        assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
        assert_eq!(found_by("ben", "").await, ["@user:ben", "t"]);
        assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
        assert_eq!(found_by("ben", "").await, ["@user:ben"]);
    }
    assert_eq!(found_by("root", "analyst").await, ["@user:ben", "t"]);
    let (status, answer) = search_as(&server, &token("eve", ""), "secret ", "&thread=t").await;
    assert_eq!(status, 404);
    refused(&answer, "not_found", "thread");
    let (status, _) = search_as(&server, &token("ada", "publish"), "secret ", "").await;
    assert_eq!(status, 403, "it needs a right to read");
    // Another tenant has neither the threads nor the words.
    let (_, found) = search_as(&server, &token_of("other", "ada"), "secre", "").await;
    has(&found, json!({"hits": [], "corrected": null}));
}

#[tokio::test]
async fn pages_go_on_where_the_last_one_ended_whatever_comes_meanwhile() {
    let server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..50 {
        ada.say("t", &format!("page {} of it", "page ".repeat(n % 5))).await;
    }
    for order in ["newest", "relevance"] {
        let whole = search(&server, "page ", &format!("&order={order}&limit=100")).await;
        let whole: Vec<u64> = places(&whole).into_iter().map(|(_, seq)| seq).collect();
        let (mut paged, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = search(&server, "page ", &format!("&order={order}&limit=7{cursor}")).await;
            paged.extend(places(&page).into_iter().map(|(_, seq)| seq));
            // New hits are not in a list that was begun before, or are where they belong.
            ada.say("t", "page").await;
            let Some(next) = page["next"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        let old: Vec<u64> = paged.iter().copied().filter(|seq| whole.contains(seq)).collect();
        assert_eq!(old, whole, "{order}");
        assert_eq!(paged.iter().collect::<BTreeSet<_>>().len(), paged.len(), "{order}: each once");
    }
}

/// Publishes until the connection is lost; gives the words that were acknowledged.
async fn write_until_lost(mut socket: Socket, round: usize, words: &tokio::sync::mpsc::Sender<String>) {
    for n in 0.. {
        let word = format!("w{round}x{n}");
        socket
            .send(&json!({"type": "publish", "id": n, "thread": format!("t{}", n % 5), "kind": "user_message",
            "data": {"content": format!("each {word}")}}))
            .await;
        match socket.next().await {
            Ok(answer) => accepted(&answer),
            Err(_) => return,
        }
        words.send(word).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_kills_while_it_is_indexed_every_acknowledged_event_is_found_once() {
    let mut server = Server::start_unlimited(LogKind::embedded());
    let mut acknowledged = Vec::new();
    let mut random = 5u64;
    for round in 0..8 {
        let socket = server.connect("ada").await;
        let (sender, mut words) = tokio::sync::mpsc::channel(1);
        let writing = tokio::spawn(async move { write_until_lost(socket, round, &sender).await });
        // The kill comes at a random moment, measured in answers: some are committed to the index by then, some are not.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        for _ in 0..(random >> 33) % 400 {
            acknowledged.push(words.recv().await.unwrap());
        }
        server.kill();
        while let Some(word) = words.recv().await {
            acknowledged.push(word);
        }
        // A send into a connection that is being lost may fail as well.
        drop(writing.await);
        server.up();
        server.ready().await;
    }
    until_complete(&server).await;
    let found = all(&server, "each ", 100).await;
    let distinct: BTreeSet<_> = found.iter().collect();
    assert_eq!(distinct.len(), found.len(), "each once");
    assert!(found.len() >= acknowledged.len());
    for word in acknowledged.iter().step_by(37) {
        assert_eq!(search(&server, &format!("{word} "), "").await["hits"].as_array().unwrap().len(), 1, "{word}");
    }
    let heads: u64 = {
        let threads = server.http("GET", "/v1/threads", "ada", None).await.1;
        threads["threads"].as_array().unwrap().iter().map(|thread| thread["head"].as_u64().unwrap()).sum()
    };
    assert_eq!(found.len() as u64, heads, "all that is there is found");
}

#[tokio::test]
async fn a_deleted_index_comes_back_and_search_can_be_off() {
    let mut server = Server::start_unlimited(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..300 {
        ada.say("t", &format!("number{n} of all")).await;
    }
    let before = all(&server, "all ", 100).await;
    assert_eq!(before.len(), 300);
    server.stop().await;
    std::fs::remove_dir_all(server.data().join("search")).unwrap();
    server.up();
    server.ready().await;
    until_complete(&server).await;
    assert_eq!(all(&server, "all ", 100).await, before);
    eventually("it is written", async || server.metric("weft_search_indexed_total").await >= 300.0).await;
    eventually("nothing is missing", async || server.metric("weft_search_lag_seconds").await == 0.0).await;
    server.stop().await;

    let off = Server::start_with(LogKind::embedded(), &["--search", "off"]);
    let (status, answer) = search_as(&off, &token("ada", ""), "x", "").await;
    assert_eq!((status, &answer["code"]), (404, &json!("not_found")));
    assert!(!off.data().join("search").exists());
    let output = weft().args(["serve", "--dev", "--search", "klingon"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("--search must be a language"), "{said}");
}

#[tokio::test]
async fn a_subscription_with_words_gets_each_match_as_it_is_committed_where_its_user_may_read() {
    let server = Server::start(LogKind::embedded());
    let (mut ada, mut ben) = (server.connect("ada").await, server.connect("ben").await);
    ada.say("t", "an old alarm").await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ben", "ada", None).await.0, 201);
    ada.say("t", "nothing").await;
    ben.subscribe_with("t", json!({"after": 0, "search": "alarms -false"})).await;
    let replayed = ben.events(1).await;
    has(&replayed[0], json!({"thread": "t", "seq": 1}));
    has(&ben.recv_type("caught_up").await, json!({"thread": "t", "seq": 3}));

    ada.say("t", "no match").await;
    ada.say("t", "a false alarm").await;
    ada.say("t", "ALARM!").await;
    has(&ben.events(1).await[0], json!({"seq": 6, "data": {"content": "ALARM!"}}));
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    ada.say("t", "an alarm that is not for ben").await;
    has(&ben.recv_type("error").await, json!({"code": "not_found", "thread": "t"}));
    ben.silent().await;

    let mut all = server.connect_as("root", "analyst").await;
    all.subscribe_with("*", json!({"all": true, "search": "alarm", "kinds": ["user_message"]})).await;
    ada.say("t", "alarmed").await;
    ada.say("u", "an alarm in a new thread").await;
    let found = all.events(2).await;
    assert_eq!(
        found.iter().map(|it| (it["thread"].as_str().unwrap(), it["seq"].as_u64().unwrap())).collect::<Vec<_>>(),
        [("t", 9), ("u", 1)]
    );

    let refusal = ada.ask(json!({"type": "subscribe", "thread": "t", "search": "(((("})).await;
    refused(&refusal, "bad_request", "search");
    let refusal = ada.ask(json!({"type": "subscribe", "thread": "t", "search": "é".repeat(2_001)})).await;
    refused(&refusal, "bad_request", "search");
}

#[tokio::test]
async fn the_command_shows_what_was_found() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        ada.say("t", &format!("searching number {n}")).await;
    }
    let run = |words: &[&str]| {
        let to = ["--url", &server.url, "--token", &token("ada", "")].map(str::to_owned);
        let output = weft().arg("search").args(words).args(to).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, found) = run(&["search", "-n", "--json"]);
    assert_eq!((code, &*found), (Some(2), ""), "a minus is an option, unless it is in quotes");
    let (code, found) = run(&["search -2", "--json", "--limit", "1"]);
    assert_eq!(code, Some(0), "{found}");
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(places(&found), [("t", 3)]);
    assert!(found["next"].is_string(), "{found}");
    let (_, found) = run(&["search", "2", "--around", "1"]);
    let lines: Vec<&str> = found.lines().collect();
    assert_eq!(lines.len(), 3, "{found}");
    assert!(lines[1].ends_with("t 2  ada: searching number 2"), "{found}");
    assert_eq!(run(&["elsewhere"]).1, "nothing was found\n");
}
