//! `POST /v1/events`: many publishes in one request, each with its own outcome.

use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::{LogKind, Server, eventually, has, refused_with, schemas, seqs, token};

const AGENT: &str = "publish subscribe agent";

/// What became of each event of a batch.
async fn send_as(server: &Server, token: &str, events: &[Value]) -> Vec<Value> {
    let (status, reply) = server.http_with("POST", "/v1/events", token, Some(json!({"events": events})), &[]).await;
    assert_eq!(status, 200, "{reply}");
    let items = reply["items"].as_array().unwrap().clone();
    assert_eq!(items.len(), events.len());
    items
}

async fn send(server: &Server, events: &[Value]) -> Vec<Value> {
    send_as(server, &token("ada", ""), events).await
}

/// The same where the events are not what the schema of a batch says.
async fn send_unchecked(server: &Server, events: &[Value]) -> Vec<Value> {
    let (url, body) = (format!("{}/v1/events", server.url), json!({"events": events}).to_string());
    let reply = reqwest::Client::new().post(url).bearer_auth(token("ada", "")).body(body).send().await.unwrap();
    assert_eq!(reply.status(), 200);
    let reply: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
    schemas::check("http.published-batch", &reply);
    reply["items"].as_array().unwrap().clone()
}

async fn refusal(server: &Server, body: Value, headers: &[(&str, &str)]) -> (u16, Value) {
    server.http_with("POST", "/v1/events", &token("ada", ""), Some(body), headers).await
}

fn event(thread: &str, n: usize) -> Value {
    json!({"thread": thread, "kind": "x.n", "data": n, "key": n.to_string()})
}

/// All events of a thread, oldest first.
async fn thread(server: &Server, thread: &str) -> Vec<Value> {
    let (mut events, mut after) = (Vec::new(), Some(0));
    while let Some(from) = after {
        let path = format!("/v1/threads/{thread}/events?limit=1000&after={from}");
        let (status, page) = server.http("GET", &path, "ada", None).await;
        assert_eq!(status, 200, "{page}");
        events.extend(page["events"].as_array().unwrap().iter().cloned());
        after = page["next"].as_u64();
    }
    events
}

/// Fails unless the thread has the events 0..n, each once and in order.
async fn has_each_once(server: &Server, name: &str, n: usize) {
    let events = thread(server, name).await;
    let data: Vec<Value> = events.iter().map(|event| event["data"].clone()).collect();
    assert_eq!(data, (0..n).map(|n| json!(n)).collect::<Vec<_>>());
    assert_eq!(seqs(&events), (1..=n as u64).collect::<Vec<_>>());
}

on_both_logs!(a_thousand_publishes_in_one_request_keep_their_order_and_sent_again_are_duplicates, |log| async move {
    let server = Server::start_unlimited(log);
    let events: Vec<Value> = (0..1_000).map(|n| event(if n % 2 == 0 { "even" } else { "odd" }, n / 2)).collect();
    let first = send(&server, &events).await;
    for (n, item) in first.iter().enumerate() {
        has(item, json!({"thread": events[n]["thread"], "seq": n / 2 + 1, "duplicate": false}));
    }
    let again = send(&server, &events).await;
    for (item, before) in again.iter().zip(&first) {
        has(item, json!({"seq": before["seq"], "event": before["event"], "duplicate": true}));
    }
    has_each_once(&server, "even", 500).await;
    has_each_once(&server, "odd", 500).await;
});

on_both_logs!(
    each_publish_of_a_batch_is_refused_in_the_words_of_a_single_one_and_the_others_are_not,
    |log| async move {
        let server = Server::start(log);
        assert_eq!(
            server.http("POST", "/v1/threads/other/events", "ben", Some(json!({"kind": "x.a", "data": 1}))).await.0,
            201
        );
        let bad = [
            json!({"kind": "user_message", "data": {}}),
            json!({"kind": "member_added", "data": {"user": "ben"}}),
            json!({"kind": "agent_message", "data": {"content": "x"}}),
            json!({"kind": "x.a"}),
            json!({"kind": "x.a", "data": 1, "colour": "red"}),
            json!({"kind": "x.a", "data": 1, "priority": "urgent"}),
            json!({"kind": "x.a", "data": "x".repeat(70_000)}),
            json!({"kind": "x.a", "data": 1, "parent": 0}),
            json!(["x.a", 1]),
        ];
        let mut events = vec![json!({"thread": "t", "kind": "x.n", "data": 0})];
        for body in &bad {
            let mut body = body.clone();
            if let Some(fields) = body.as_object_mut() {
                fields.insert("thread".into(), json!("t"));
            }
            events.push(body);
        }
        events.push(json!({"thread": "other", "kind": "x.a", "data": 1}));
        events.push(json!({"thread": ".t", "kind": "x.a", "data": 1}));
        events.push(json!({"thread": "t", "kind": "x.n", "data": 1}));

        let items = send_unchecked(&server, &events).await;
        let (last, refused) = items[1..].split_last().unwrap();
        has(&items[0], json!({"thread": "t", "seq": 1}));
        has(last, json!({"thread": "t", "seq": 2}));
        let paths = std::iter::repeat_n("/v1/threads/t/events", bad.len())
            .chain(["/v1/threads/other/events", "/v1/threads/.t/events"]);
        let bodies = bad.into_iter().chain([json!({"kind": "x.a", "data": 1}), json!({"kind": "x.a", "data": 1})]);
        for ((item, path), body) in refused.iter().zip(paths).zip(bodies) {
            let (_, problem) = server.http("POST", path, "ada", Some(body)).await;
            has(item, json!({"code": problem["code"], "message": problem["detail"], "temporary": false}));
            assert_eq!(item.get("field"), problem.get("field"), "{item}");
        }
        has_each_once(&server, "t", 2).await;
    }
);

#[tokio::test]
async fn a_key_counts_within_a_request_and_with_other_content_it_is_a_conflict() {
    let server = Server::start(LogKind::embedded());
    let with = |data: u64| json!({"thread": "t", "kind": "x.n", "data": data, "key": "k"});
    let items = send(&server, &[with(0), with(0), with(1)]).await;
    has(&items[0], json!({"seq": 1, "duplicate": false}));
    has(&items[1], json!({"seq": 1, "duplicate": true, "event": items[0]["event"]}));
    refused_with(&items[2], "conflict");
    has_each_once(&server, "t", 1).await;
}

#[tokio::test]
async fn a_run_is_written_in_one_request_and_judged_in_its_order() {
    let server = Server::start(LogKind::embedded());
    let act = |kind: &str, data: Value| json!({"thread": "@me", "kind": kind, "data": data, "run": "r"});
    let events = [
        act("agent_thinking", json!({})),
        act("agent_started", json!({"agent": "scout"})),
        act("agent_token", json!({"message": "m", "from_char": 0, "text": "Hé"})),
        act("agent_token", json!({"message": "m", "from_char": 2, "text": "llo"})),
        act("agent_message", json!({"message": "m"})),
        act("agent_completed", json!({})),
    ];
    let items = send_as(&server, &token("scout", AGENT), &events).await;
    refused_with(&items[0], "run_order");
    for (item, fields) in items[1..].iter().zip([
        json!({"seq": 1, "thread": "@me"}),
        json!({"message": "m", "to_char": 2}),
        json!({"message": "m", "to_char": 5}),
        json!({"seq": 2}),
        json!({"seq": 3}),
    ]) {
        has(item, fields);
    }
    assert!(items[2].get("seq").is_none(), "a delta has none");
    let (_, page) = server.http_with("GET", "/v1/threads/@me/events", &token("scout", AGENT), None, &[]).await;
    assert_eq!(page["events"][1]["data"]["content"], "Héllo");
}

#[tokio::test]
async fn what_is_over_the_tenant_s_rate_is_refused_from_there_on_and_repeating_the_rest_keeps_the_order() {
    // The bucket holds 272 KiB in any case: some of the events, and not all.
    let server = Server::start_with(LogKind::embedded(), &["--rate-tenant", "50000"]);
    let text = "x".repeat(40_000);
    let events: Vec<Value> = (0..12)
        .map(|n| json!({"thread": "t", "kind": "x.n", "data": {"n": n, "text": text}, "key": n.to_string()}))
        .collect();
    let items = send(&server, &events).await;
    let taken = items.iter().take_while(|item| item["seq"].is_u64()).count();
    assert!((1..12).contains(&taken), "{items:?}");
    for item in &items[taken..] {
        has(item, json!({"code": "rate_limited", "temporary": true}));
        assert!(item["retry_after_ms"].as_u64().unwrap() > 0);
    }
    let mut from = taken;
    eventually("all of them are in", async || {
        let items = send(&server, &events[from..]).await;
        from += items.iter().take_while(|item| item["duplicate"] == false).count();
        from == 12
    })
    .await;
    let events = thread(&server, "t").await;
    assert_eq!(
        events.iter().map(|it| it["data"]["n"].as_u64().unwrap()).collect::<Vec<_>>(),
        (0..12).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn a_request_that_a_kill_cut_off_is_sent_again_and_nothing_is_lost_or_doubled() {
    let mut server = Server::start_unlimited(LogKind::embedded());
    let events: Vec<Value> = (0..1_000).map(|n| event("t", n)).collect();
    let answered = send(&server, &events[..10]).await;
    let (url, body) = (format!("{}/v1/events", server.url), json!({"events": events}).to_string());
    let cut_off = tokio::spawn(reqwest::Client::new().post(url).bearer_auth(token("ada", "")).body(body).send());
    eventually("some of it is in the log", async || server.metric("weft_append_bytes_total").await > 10_000.0).await;
    server.kill();
    // Answered or not: what was, has to be there.
    drop(cut_off.await.unwrap());
    server.up();
    server.ready().await;
    let again = send(&server, &events).await;
    for (item, before) in again.iter().zip(&answered) {
        has(item, json!({"seq": before["seq"], "event": before["event"], "duplicate": true}));
    }
    has_each_once(&server, "t", 1_000).await;
}

#[tokio::test]
async fn a_request_holds_a_thousand_events_and_a_mebibyte_and_names_what_is_wrong_with_it() {
    let server = Server::start_unlimited(LogKind::embedded());
    let (status, problem) = refusal(&server, json!({"events": vec![event("t", 1); 1_001]}), &[]).await;
    assert_eq!((status, &problem["code"], &problem["field"]), (400, &json!("bad_request"), &json!("events")));
    for (body, field) in [
        (json!({"events": []}), json!("events")),
        (json!({"event": []}), json!("event")),
        (json!({"events": [event("t", 1)], "thread": "t"}), json!("thread")),
        (json!([event("t", 1)]), json!(null)),
    ] {
        let (status, problem) = refusal(&server, body.clone(), &[]).await;
        assert_eq!((status, &problem["field"]), (400, &field), "{body}: {problem}");
    }
    let (status, problem) = refusal(&server, json!({"events": [event("t", 1)]}), &[("Idempotency-Key", "k")]).await;
    assert_eq!((status, &problem["field"]), (400, &json!("Idempotency-Key")));

    let large = |n: usize| json!({"thread": "t", "kind": "x.n", "data": "x".repeat(n)});
    let (status, problem) = refusal(&server, json!({"events": vec![large(60_000); 18]}), &[]).await;
    assert_eq!((status, &problem["code"]), (413, &json!("too_large")), "{problem}");
    let items = send(&server, &vec![large(60_000); 17]).await;
    assert_eq!(items[16]["seq"], 17);
}

#[tokio::test]
async fn each_publish_of_a_batch_counts_as_a_command() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "5"]);
    let events: Vec<Value> = (0..20).map(|n| event("t", n)).collect();
    send(&server, &events).await;
    let (status, problem) = refusal(&server, json!({"events": events}), &[]).await;
    assert_eq!((status, &problem["code"]), (429, &json!("rate_limited")), "5 of 25 are left: {problem}");
    has_each_once(&server, "t", 20).await;
}
