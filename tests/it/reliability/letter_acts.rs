//! What is done about dead letters: requeued, discarded, rehearsed; one or all that match; asked twice, on two nodes, after
//! a rebuild.

use serde_json::{Value, json};
use weft::log::embedded::EmbeddedLog;

use super::dead_letters::{get, list, rebuilt, root_of, with};
use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, eventually, has, publish, refused, refused_with, weft};

const AGENT: &str = "publish subscribe agent";

pub async fn post(server: &Server, token: &str, path: &str, body: Value) -> (u16, Value) {
    server.http_with("POST", &format!("/v1/dead-letters{path}"), token, Some(body), &[]).await
}

pub(super) async fn discard(server: &Server, token: &str, id: &str) -> (u16, Value) {
    server.http_with("DELETE", &format!("/v1/dead-letters/{id}?note=seen%20to"), token, None, &[]).await
}

fn in_run(thread: &str, run: &str, kind: &str, data: Value) -> Value {
    with(publish(thread, kind, data), json!({"run": run}))
}

/// An agent's thoughts in a run that has not begun: so many dead letters.
async fn too_early(scout: &mut Socket, thread: &str, run: &str, thoughts: std::ops::RangeInclusive<u64>) {
    for n in thoughts {
        let thought = in_run(thread, run, "agent_thinking", json!({"content": format!("thought {n}")}));
        refused_with(&scout.ask(thought).await, "run_order");
    }
}

async fn begin(scout: &mut Socket, thread: &str, run: &str) {
    assert_eq!(scout.ask(in_run(thread, run, "agent_started", json!({"agent": "scout"}))).await["type"], "published");
}

pub fn id_of(letter: &Value) -> &str {
    letter["id"].as_str().unwrap()
}

/// The contents of a thread's events of a kind, in order.
async fn contents(server: &Server, thread: &str, kind: &str) -> Vec<String> {
    let (_, page) = server.admin("GET", &format!("/v1/threads/{thread}/events?kinds={kind}&limit=1000")).await;
    let events = page["events"].as_array().unwrap();
    events.iter().map(|event| event["data"]["content"].as_str().unwrap().to_owned()).collect()
}

on_both_logs!(
    a_refused_event_appears_once_when_its_letter_is_requeued_and_one_that_fails_again_keeps_its_history,
    |log| async move {
        let mut server = Server::start(log);
        let root = root_of("acme");
        let mut scout = server.connect_as("scout", AGENT).await;
        let mut ada = server.connect("ada").await;
        ada.say("t", "hello").await;
        too_early(&mut scout, "t", "r", 1..=1).await;
        let letter = list(&server, &root, "").await.remove(0);
        let path = format!("/{}/requeue", id_of(&letter));

        // The run still has not begun.
        let (status, rehearsed) = post(&server, &root, &path, json!({"rehearse": true})).await;
        assert_eq!(status, 200, "{rehearsed}");
        has(&rehearsed, json!({"effect": "none", "code": "run_order", "message": letter["error"]}));
        assert_eq!(list(&server, &root, "").await, std::slice::from_ref(&letter), "a rehearsal does nothing");
        let (_, problem) = post(&server, &root, &path, json!({"note": "let us see"})).await;
        refused_with(&problem, "run_order");
        let again = list(&server, &root, "").await.remove(0);
        has(&again, json!({"id": letter["id"], "state": "open", "attempts": 2, "fingerprint": letter["fingerprint"]}));
        assert_eq!(again["tries"].as_array().unwrap().len(), 2, "{again}");
        has(&again["acts"][0], json!({"act": "requeued", "by": "root", "note": "let us see"}));

        begin(&mut scout, "t", "r").await;
        let (_, rehearsed) = post(&server, &root, &path, json!({"rehearse": true})).await;
        has(&rehearsed, json!({"effect": "append", "seq": 3, "thread": "t", "reason": "run_order"}));
        let (status, requeued) = post(&server, &root, &path, json!({})).await;
        assert_eq!((status, &requeued), (200, &rehearsed), "it does what the rehearsal said");
        let (_, page) = server.admin("GET", "/v1/threads/t/events?after=2").await;
        for field in ["event", "from", "at", "kind", "data", "run"] {
            assert_eq!(page["events"][0][field], letter["event"][field], "it is the event that was refused: {page}");
        }

        let (_, problem) = post(&server, &root, &path, json!({})).await;
        refused(&problem, "conflict", "id");
        assert!(problem["detail"].as_str().unwrap().contains("requeued by root"), "{problem}");
        refused(&discard(&server, &root, id_of(&letter)).await.1, "conflict", "id");
        assert_eq!(list(&server, &root, "").await, Vec::<Value>::new());
        has(&get(&server, &root, "/counts").await.1, json!({"total": 0, "reasons": [], "fingerprints": []}));
        let (_, done) = get(&server, &root, &format!("/{}", id_of(&letter))).await;
        has(&done, json!({"state": "done", "seq": 3, "attempts": 2}));
        assert_eq!(done["acts"].as_array().unwrap().len(), 2, "{done}");

        assert_eq!(ada.say("t", "and on it goes").await, 4);
        rebuilt(&mut server).await;
        assert_eq!(get(&server, &root, &format!("/{}", id_of(&letter))).await.1["acts"], done["acts"]);
        assert_eq!(contents(&server, "t", "agent_thinking").await, ["thought 1"]);
    }
);

on_both_logs!(
    all_that_match_are_requeued_page_by_page_in_the_order_of_their_threads_as_the_rehearsal_said,
    |log| async move {
        let server = Server::start(log);
        let root = root_of("acme");
        let mut scout = server.connect_as("scout", AGENT).await;
        for thread in ["a", "b", "c"] {
            too_early(&mut scout, thread, "r", 1..=6).await;
        }
        too_early(&mut scout, "a", "never begins", 7..=7).await;
        for thread in ["a", "b", "c"] {
            begin(&mut scout, thread, "r").await;
        }
        let fingerprint = list(&server, &root, "?thread=b").await[0]["fingerprint"].clone();
        let wanted = |rehearse: bool, more: Value| {
            let mut filter = json!({"kind": "agent_thinking"});
            filter.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"filter": filter, "rehearse": rehearse, "note": "the run has begun"})
        };

        let (_, only_b) =
            post(&server, &root, "/requeue", wanted(true, json!({"thread": "b", "fingerprint": fingerprint}))).await;
        assert_eq!(only_b["done"], 6, "{only_b}");
        let (_, rehearsed) = post(&server, &root, "/requeue?limit=1000", wanted(true, json!({}))).await;
        has(&rehearsed, json!({"rehearsed": true, "done": 18, "refused": 1}));
        assert_eq!(list(&server, &root, "").await.len(), 19, "a rehearsal does nothing");
        let (mut items, mut path, mut pages) = (Vec::new(), "/requeue?limit=5".to_owned(), 0);
        loop {
            let (status, page) = post(&server, &root, &path, wanted(false, json!({}))).await;
            assert_eq!(status, 200, "{page}");
            items.extend(page["items"].as_array().unwrap().clone());
            pages += 1;
            match page["next"].as_str() {
                Some(next) => path = format!("/requeue?limit=5&cursor={next}"),
                None => break,
            }
        }
        assert_eq!((items.len(), pages), (19, 4), "what fails again is not tried a second time");
        let by_id = |items: &[Value]| -> Vec<Value> {
            let mut items = items.to_vec();
            items.sort_by_key(|it| id_of(it).to_owned());
            items
        };
        // What failed again is younger than those that were there, and so comes up a second time at the end.
        items.truncate(19);
        assert_eq!(by_id(&items), by_id(rehearsed["items"].as_array().unwrap()), "it does what the rehearsal said");

        let thoughts: Vec<String> = (1..=6).map(|n| format!("thought {n}")).collect();
        for thread in ["a", "b", "c"] {
            assert_eq!(contents(&server, thread, "agent_thinking").await, thoughts, "{thread}");
        }
        let left = list(&server, &root, "").await;
        assert_eq!((left.len(), &left[0]["event"]["data"]["content"]), (1, &json!("thought 7")));
        let (_, counts) = get(&server, &root, "/counts").await;
        has(&counts, json!({"total": 1, "reasons": [{"reason": "run_order", "count": 1}]}));

        let (_, discarded) = post(&server, &root, "/discard", json!({"filter": {"reason": "run_order"}})).await;
        has(&discarded, json!({"rehearsed": false, "done": 1, "refused": 0}));
        assert_eq!(discarded["items"][0]["effect"], "discard");
        assert_eq!(get(&server, &root, "/counts").await.1["total"], 0);
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_that_are_asked_to_requeue_and_to_discard_at_the_same_time_one_does_it() {
    let log = LogKind::kafka();
    let nodes = [Server::start(log.clone()), Server::start(log)];
    let root = root_of("acme");
    let mut scout = nodes[0].connect_as("scout", AGENT).await;
    too_early(&mut scout, "t", "r", 1..=20).await;
    begin(&mut scout, "t", "r").await;
    eventually("both know all", async || {
        let known = [list(&nodes[0], &root, "").await.len(), list(&nodes[1], &root, "").await.len()];
        known == [20, 20]
    })
    .await;
    let mut appended = 0;
    for (n, letter) in list(&nodes[0], &root, "").await.iter().rev().enumerate() {
        let path = format!("/{}/requeue", id_of(letter));
        let other = async {
            match n % 2 {
                0 => post(&nodes[1], &root, &path, json!({})).await,
                _ => discard(&nodes[1], &root, id_of(letter)).await,
            }
        };
        let (one, other) = tokio::join!(post(&nodes[0], &root, &path, json!({})), other);
        let mut statuses = [one.0, other.0];
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 409], "{one:?} {other:?}");
        appended += usize::from(one.1["effect"] == "append") + usize::from(other.1["effect"] == "append");
    }
    let found = contents(&nodes[0], "t", "agent_thinking").await;
    assert_eq!(found.len(), appended);
    eventually("both nodes show the same", async || contents(&nodes[1], "t", "agent_thinking").await == found).await;
    for node in &nodes {
        eventually("none is left", async || list(node, &root, "").await.is_empty()).await;
        assert_eq!(get(node, &root, "/counts").await.1["total"], 0);
    }
}

#[tokio::test]
async fn what_cannot_be_read_can_be_discarded_by_its_own_tenant_and_not_requeued_and_stays_so_after_a_rebuild() {
    let mut server = Server::start(LogKind::embedded());
    server.ready().await;
    server.stop().await;
    {
        let log = EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
        for n in [0, 65, 129] {
            log.append_foreign(n, format!(r#"{{"tenant":"acme","n":{n}}}"#).as_bytes()).unwrap();
        }
        log.append_foreign(3, b"nobody's").unwrap();
        weft::log::Log::close(&log);
    }
    server.up();
    server.ready().await;
    let (acme, umbrella) = (root_of("acme"), root_of("umbrella"));
    let letters = list(&server, &acme, "").await;
    assert_eq!(letters.len(), 4);
    let (nobodys, own): (Vec<&Value>, Vec<&Value>) = letters.iter().partition(|it| it["bytes"].is_null());
    refused(&discard(&server, &acme, id_of(nobodys[0])).await.1, "forbidden", "id");
    refused(&discard(&server, &umbrella, id_of(own[0])).await.1, "not_found", "id");
    let (_, problem) = post(&server, &acme, &format!("/{}/requeue", id_of(own[0])), json!({})).await;
    refused(&problem, "conflict", "id");
    assert!(problem["detail"].as_str().unwrap().contains("cannot be read"), "{problem}");
    let (_, rehearsed) = post(&server, &acme, "/requeue", json!({"filter": {}, "rehearse": true})).await;
    has(&rehearsed, json!({"done": 0, "refused": 4}));

    for letter in &own {
        let (status, outcome) = discard(&server, &acme, id_of(letter)).await;
        assert_eq!((status, &outcome["effect"]), (200, &json!("discard")), "{outcome}");
        refused(&discard(&server, &acme, id_of(letter)).await.1, "conflict", "id");
    }
    assert_eq!(list(&server, &acme, "").await, [nobodys[0].clone()]);
    let shown = get(&server, &acme, &format!("/{}", id_of(own[0]))).await.1;
    has(&shown, json!({"state": "discarded", "error": own[0]["error"], "bytes": own[0]["bytes"]}));
    has(&shown["acts"][0], json!({"act": "discarded", "by": "root", "note": "seen to"}));

    // A rebuild may read what was done before what it was done about: the result is the same, row by row.
    rebuilt(&mut server).await;
    assert_eq!(list(&server, &acme, "").await, [nobodys[0].clone()]);
    assert_eq!(get(&server, &acme, &format!("/{}", id_of(own[0]))).await.1, shown);
    assert_eq!(get(&server, &acme, "/counts").await.1["total"], 1);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let server = Server::start(LogKind::embedded());
    let root = root_of("acme");
    for (path, body, code, field) in [
        ("/requeue", json!({}), "bad_request", "filter"),
        ("/requeue", json!({"filter": {"colour": "red"}}), "bad_request", "colour"),
        ("/discard", json!({"filter": {"since": "now"}}), "bad_request", "filter.since"),
        ("/discard", json!({"filter": {"fingerprint": "x"}}), "bad_request", "filter.fingerprint"),
        ("/discard", json!({"filter": {}, "note": "x".repeat(1_001)}), "bad_request", "note"),
        ("/requeue?limit=0", json!({"filter": {}}), "bad_request", "limit"),
        ("/requeue?cursor=x", json!({"filter": {}}), "cursor_invalid", "cursor"),
        ("/x/requeue", json!({}), "not_found", "id"),
        ("/00000000-0000-0000-0000-000000000000/requeue", json!({}), "not_found", "id"),
    ] {
        refused(&post(&server, &root, path, body).await.1, code, field);
    }
    has(
        &post(&server, &root, "/requeue", json!({"filter": {}})).await.1,
        json!({"done": 0, "refused": 0, "items": []}),
    );
}

/// Runs `weft dead-letters …` as the tenant's admin; gives its exit code, what it printed, and what went to standard error.
fn command(server: &Server, words: &[&str]) -> (i32, String, String) {
    let output = weft()
        .args(["dead-letters", "--url", &server.url, "--token", &root_of("acme")])
        .args(words)
        .env_remove("WEFT_TOKEN")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_lists_counts_shows_rehearses_requeues_and_discards() {
    let server = Server::start(LogKind::embedded());
    let mut scout = server.connect_as("scout", AGENT).await;
    too_early(&mut scout, "t", "r", 1..=3).await;
    too_early(&mut scout, "u", "never begins", 1..=1).await;
    let run = |words: &[&str]| command(&server, words);
    let as_json = |words: &[&str], code: i32| -> Value {
        let (status, said, error) = run(&[words, &["--json"]].concat());
        assert_eq!(status, code, "{words:?}: {error}");
        serde_json::from_str(&said).unwrap()
    };

    assert_eq!(as_json(&[], 0)["items"].as_array().unwrap().len(), 4);
    let of_t = as_json(&["list", "--thread", "t", "--reason", "run_order"], 0)["items"].clone();
    assert_eq!(of_t.as_array().unwrap().len(), 3);
    assert_eq!(as_json(&["counts"], 0)["total"], 4);
    let (_, counted, _) = run(&["counts"]);
    let fingerprint = of_t[0]["fingerprint"].as_str().unwrap();
    assert!(counted.contains(fingerprint) && counted.contains("run_order"), "{counted}");
    let id = id_of(&of_t[2]);
    let (code, shown, _) = run(&["show", id]);
    assert!(code == 0 && shown.contains(fingerprint) && shown.contains("thought 1"), "{shown}");

    begin(&mut scout, "t", "r").await;
    let rehearsed = as_json(&["requeue", "--all", "--rehearse"], 0);
    let (code, _, error) = run(&["requeue", "--kind", "agent_thinking", "--note", "it has begun"]);
    assert_eq!(code, 1, "one was refused: {error}");
    assert!(error.contains("1 of 4"), "{error}");
    assert_eq!(contents(&server, "t", "agent_thinking").await, ["thought 1", "thought 2", "thought 3"]);
    let effects: Vec<&Value> = rehearsed["items"].as_array().unwrap().iter().map(|it| &it["effect"]).collect();
    assert_eq!(effects, ["append", "append", "append", "none"], "as it was rehearsed");
    assert_eq!(as_json(&["show", id], 0)["acts"][0]["note"], "it has begun");
    assert_eq!(run(&["requeue", id]).0, 1, "it is done");

    let left = as_json(&["list"], 0)["items"][0].clone();
    assert_eq!(as_json(&["discard", id_of(&left), "--rehearse"], 0)["items"][0]["effect"], "discard");
    assert_eq!(run(&["discard", id_of(&left), "--note", "of no use"]).0, 0);
    assert_eq!(run(&[]).1.trim(), "no dead letters");
    assert_eq!(run(&["discard", "--all"]).0, 0);

    for wrong in [
        &["requeue"][..],
        &["show"],
        &["discard", id, "--all"],
        &["requeue", "--all", "--thread", "t"],
        &["list", "--rehearse"],
        &["counts", "--thread", "t"],
        &["list", id],
        &["dance"],
    ] {
        assert_eq!(run(wrong).0, 2, "{wrong:?}");
    }
}
