//! Dead letters over HTTP: who sees them, page by page, and records in the log that nobody can read.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};
use weft::log::embedded::EmbeddedLog;

use crate::log_contract::only_kafka::produce;
use crate::support::{LogKind, SECRET, Server, claims, eventually, has, publish, refused, refused_with, token, weft};

pub fn root_of(tenant: &str) -> String {
    mint(SECRET, &Claims { tenant: tenant.into(), ..claims("root", "admin") }).unwrap()
}

pub(super) async fn get(server: &Server, token: &str, path: &str) -> (u16, Value) {
    server.http_with("GET", &format!("/v1/dead-letters{path}"), token, None, &[]).await
}

pub async fn list(server: &Server, token: &str, query: &str) -> Vec<Value> {
    let (status, page) = get(server, token, query).await;
    assert_eq!((status, page.get("next")), (200, None), "{page}");
    page["items"].as_array().unwrap().clone()
}

fn errors(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["error"].as_str().unwrap()).collect()
}

fn without_neighbours(mut letter: Value) -> Value {
    letter.as_object_mut().unwrap().remove("neighbours");
    letter
}

/// A server whose log holds, beside two events, records that nobody can read: seven of acme's, one of umbrella's, and one
/// of who knows whom. Twice somebody was sent an event five times in vain, in two threads.
async fn with_letters() -> Server {
    let mut server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for thread in ["t", "u"] {
        ada.say(thread, "nobody confirms this").await;
    }
    let all = json!({"name": "x", "confirm": true, "after": {"t": 0, "u": 0}});
    for round in 0..6 {
        let mut reader = server.connect("ada").await;
        let more = if round == 0 { all.clone() } else { json!({"name": "x", "confirm": true}) };
        reader.subscribe_with("*", more).await;
        if round < 5 {
            reader.events(2).await;
        } else {
            reader.recv_type("caught_up").await;
            reader.recv_type("caught_up").await;
        }
        let noted = async || {
            let mut at = Vec::new();
            for thread in ["t", "u"] {
                let path = format!("/v1/threads/{thread}/receipts");
                at.push(server.http("GET", &path, "ada", None).await.1["receipts"][0]["at"].clone());
            }
            at
        };
        let before = noted().await;
        reader.leave().await;
        if round < 5 {
            eventually("both attempts are noted", async || noted().await.iter().zip(&before).all(|(a, b)| a != b))
                .await;
        }
    }
    eventually("both are given up", async || list(&server, &root_of("acme"), "").await.len() == 2).await;
    drop(ada);
    server.stop().await;
    {
        let log = EmbeddedLog::open(&server.data().join("log"), 64).unwrap();
        for n in 0..7 {
            log.append_foreign(n, br#"{"tenant":"acme","what":"no event of ours"}"#).unwrap();
        }
        log.append_foreign(7, br#"{"tenant":"umbrella"}"#).unwrap();
        log.append_foreign(8, b"\xff\x00 garbage").unwrap();
        weft::log::Log::close(&log);
    }
    server.up();
    server.ready().await;
    server
}

#[tokio::test]
async fn an_admin_lists_the_own_tenants_dead_letters_newest_first_by_reason_and_thread() {
    let server = with_letters().await;
    let acme = root_of("acme");
    let all = list(&server, &acme, "").await;
    assert_eq!(all.len(), 10, "{all:?}");
    let at: Vec<u64> = all.iter().map(|it| weft::clock::parse_rfc3339(it["at"].as_str().unwrap()).unwrap()).collect();
    assert!(at.is_sorted_by(|newer, older| newer >= older), "{at:?}");
    let missed = list(&server, &acme, "?reason=unacknowledged").await;
    let mut threads: Vec<&str> = missed.iter().map(|it| it["thread"].as_str().unwrap()).collect();
    threads.sort_unstable();
    assert_eq!(threads, ["t", "u"]);
    assert!(missed.iter().all(|it| it["event"]["data"]["content"] == "nobody confirms this" && it["name"] == "x"));
    let t = list(&server, &acme, "?thread=t").await;
    assert_eq!((t.len(), &t[0]["seq"], &t[0]["user"]), (1, &json!(1), &json!("ada")), "{t:?}");
    assert_eq!(list(&server, &acme, "?thread=t&reason=unreadable").await, Vec::<Value>::new());
    assert_eq!(list(&server, &acme, "?thread=nowhere").await, Vec::<Value>::new());
    assert_eq!(list(&server, &acme, "?group=workers").await, Vec::<Value>::new());
    let unreadable = list(&server, &acme, "?reason=unreadable").await;
    assert_eq!(unreadable.len(), 8, "{unreadable:?}");
    let known: Vec<&Value> = unreadable.iter().filter(|it| it["bytes"].is_string()).collect();
    assert_eq!(known.len(), 7);
    for letter in &known {
        assert_eq!(
            STANDARD.decode(letter["bytes"].as_str().unwrap()).unwrap(),
            br#"{"tenant":"acme","what":"no event of ours"}"#
        );
        assert!(
            letter["partition"].as_u64().unwrap() < 7 && letter["topic"].is_string() && letter["size"] == 43,
            "{letter}"
        );
    }
    // Whose it is nobody can tell, so what it says is kept from everybody.
    let nobodys = unreadable.iter().find(|it| it["bytes"].is_null()).unwrap();
    has(nobodys, json!({"partition": 8, "size": 10}));
    let theirs = list(&server, &root_of("umbrella"), "").await;
    assert_eq!(theirs.len(), 2, "{theirs:?}");
    assert!(theirs.contains(nobodys) && theirs.iter().any(|it| it["partition"] == 7), "{theirs:?}");

    for letter in &all {
        let path = format!("/{}", letter["id"].as_str().unwrap());
        let (status, alone) = get(&server, &acme, &path).await;
        assert_eq!((status, without_neighbours(alone)), (200, letter.clone()));
        let (status, problem) = get(&server, &root_of("umbrella"), &path).await;
        if letter == nobodys {
            assert_eq!((status, &problem), (200, letter));
        } else {
            refused(&problem, "not_found", "id");
        }
        for scope in ["", "publish subscribe agent broadcast analyst"] {
            assert_eq!(get(&server, &token("ada", scope), &path).await.0, 403, "not even the own ones");
        }
    }
    for scope in ["", "publish subscribe agent broadcast analyst"] {
        let (_, problem) = get(&server, &token("ada", scope), "").await;
        refused_with(&problem, "forbidden");
    }
    for path in ["/nonsense", "/00000000-0000-0000-0000-000000000000"] {
        let (_, problem) = get(&server, &acme, path).await;
        refused_with(&problem, "not_found");
    }
}

#[tokio::test]
async fn dead_letters_go_page_by_page_each_once_also_with_a_filter_and_after_a_rebuild() {
    let mut server = with_letters().await;
    let acme = root_of("acme");
    let pages = async |server: &Server, filter: &str, limit: usize| {
        let (mut found, mut cursors) = (Vec::new(), Vec::<String>::new());
        loop {
            let cursor = cursors.last().map_or(String::new(), |cursor| format!("&cursor={cursor}"));
            let (status, page) = get(server, &acme, &format!("?limit={limit}{filter}{cursor}")).await;
            assert_eq!(status, 200, "{page}");
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= limit);
            found.extend(items.clone());
            match page["next"].as_str() {
                Some(next) => cursors.push(next.to_owned()),
                None => return (found, cursors),
            }
            assert!(cursors.len() <= 20, "it comes to an end");
        }
    };
    let all = list(&server, &acme, "").await;
    for limit in [1, 3, 10, 11] {
        assert_eq!(pages(&server, "", limit).await.0, all, "{limit} at a time");
    }
    let (unreadable, cursors) = pages(&server, "&reason=unreadable", 3).await;
    assert_eq!(unreadable, list(&server, &acme, "?reason=unreadable").await);
    assert_eq!(pages(&server, "&reason=unacknowledged", 1).await.0.len(), 2);
    let cursor = &cursors[0];
    let vice = token("vice", "admin");
    for (token, query, field, code) in [
        (&acme, format!("?cursor={cursor}"), "cursor", "cursor_invalid"),
        (&acme, format!("?reason=unacknowledged&cursor={cursor}"), "cursor", "cursor_invalid"),
        (&vice, format!("?reason=unreadable&cursor={cursor}"), "cursor", "cursor_invalid"),
        (&acme, "?cursor=nonsense".into(), "cursor", "cursor_invalid"),
        (&acme, "?limit=0".into(), "limit", "bad_request"),
        (&acme, "?limit=many".into(), "limit", "bad_request"),
        (&acme, "?colour=red".into(), "colour", "bad_request"),
        (&acme, "?reason=a&reason=b".into(), "reason", "bad_request"),
    ] {
        let (_, problem) = get(&server, token, &query).await;
        refused(&problem, code, field);
    }

    rebuilt(&mut server).await;
    assert_eq!(list(&server, &acme, "").await, all, "the same dead letters, ids and all");
    assert_eq!(server.connect("ada").await.say("t", "reading goes on").await, 2);
}

#[tokio::test]
async fn letters_that_are_alike_have_one_fingerprint_and_are_counted_by_it_and_by_their_reason() {
    let mut server = with_letters().await;
    let acme = root_of("acme");
    let mut scout = server.connect_as("scout", "publish subscribe agent").await;
    for run in ["r1", "r22"] {
        let thinking = publish("t", "agent_thinking", json!({"content": "hm"}));
        refused_with(&scout.ask(with(thinking, json!({"run": run}))).await, "run_order");
    }
    let done = with(publish("t", "agent_completed", json!({})), json!({"run": "r"}));
    refused_with(&scout.ask(done).await, "run_order");

    let thinking = list(&server, &acme, "?kind=agent_thinking").await;
    assert_eq!(thinking.len(), 2, "{thinking:?}");
    let fingerprint = thinking[0]["fingerprint"].as_str().unwrap();
    assert_eq!(thinking[1]["fingerprint"], fingerprint);
    for letter in &thinking {
        has(letter, json!({"reason": "run_order", "state": "open", "kind": "agent_thinking", "attempts": 1}));
        has(&letter["tries"][0], json!({"at": letter["at"], "worker": "scout", "reason": letter["error"]}));
    }
    assert_eq!(list(&server, &acme, &format!("?fingerprint={fingerprint}")).await, thinking);
    let (newer, older) = (thinking[0]["at"].as_str().unwrap(), thinking[1]["at"].as_str().unwrap());
    if newer != older {
        assert_eq!(list(&server, &acme, &format!("?kind=agent_thinking&since={newer}")).await, thinking[..1]);
        assert_eq!(list(&server, &acme, &format!("?kind=agent_thinking&until={newer}")).await, thinking[1..]);
    }
    for (query, field) in [("?since=yesterday", "since"), ("?until=1", "until"), ("?fingerprint=xyz", "fingerprint")] {
        refused(&get(&server, &acme, query).await.1, "bad_request", field);
    }

    let (status, counts) = get(&server, &acme, "/counts").await;
    assert_eq!((status, &counts["total"]), (200, &json!(13)), "{counts}");
    let of = |reason: &str| counts["reasons"].as_array().unwrap().iter().find(|it| it["reason"] == reason).unwrap();
    assert_eq!((&of("unreadable")["count"], &of("run_order")["count"]), (&json!(8), &json!(3)), "{counts}");
    let alike = counts["fingerprints"].as_array().unwrap().iter().find(|it| it["fingerprint"] == fingerprint).unwrap();
    has(alike, json!({"reason": "run_order", "kind": "agent_thinking", "count": 2, "oldest": older, "newest": newer}));
    // What nobody can tell whose it is counts with those that the tenant sees.
    assert_eq!(get(&server, &root_of("umbrella"), "/counts").await.1["total"], 2);
    let (_, first) = get(&server, &acme, "/counts?limit=1").await;
    assert_eq!((first["fingerprints"].as_array().unwrap().len(), &first["truncated"]), (1, &json!(true)), "{first}");

    rebuilt(&mut server).await;
    assert_eq!(get(&server, &acme, "/counts").await.1, counts, "the same after a rebuild");
}

#[tokio::test]
async fn a_letter_is_shown_with_the_events_around_it_and_with_each_attempt() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    let mut scout = server.connect_as("scout", "publish subscribe agent").await;
    for n in 1..=7 {
        assert_eq!(ada.say("t", &format!("m{n}")).await, n);
    }
    let thinking = publish("t", "agent_thinking", json!({"content": "hm"}));
    refused_with(&scout.ask(with(thinking, json!({"run": "r"}))).await, "run_order");
    for n in 8..=9 {
        assert_eq!(ada.say("t", &format!("m{n}")).await, n);
    }
    let mut slow = server.connect("ada").await;
    slow.subscribe_with("t", json!({"after": 7, "confirm": true, "ack_within_ms": 1_000, "attempts": 2})).await;
    let acme = root_of("acme");
    eventually("it is given up", async || list(&server, &acme, "?reason=unacknowledged").await.len() == 1).await;

    let seqs = |events: &Value| -> Vec<u64> {
        events.as_array().unwrap().iter().map(|event| event["seq"].as_u64().unwrap()).collect()
    };
    for (reason, before, after) in
        [("run_order", [3, 4, 5, 6, 7], vec![8, 9]), ("unacknowledged", [3, 4, 5, 6, 7], vec![9])]
    {
        let letter = &list(&server, &acme, &format!("?reason={reason}")).await[0];
        assert!(letter.get("neighbours").is_none(), "{letter}");
        let (_, alone) = get(&server, &acme, &format!("/{}", letter["id"].as_str().unwrap())).await;
        let neighbours = &alone["neighbours"];
        assert_eq!((seqs(&neighbours["before"]), seqs(&neighbours["after"])), (before.to_vec(), after), "{reason}");
    }
    let given_up = &list(&server, &acme, "?reason=unacknowledged").await[0];
    has(given_up, json!({"attempts": 2, "kind": "user_message", "seq": 8}));
    let tries = given_up["tries"].as_array().unwrap();
    assert_eq!(tries.len(), 2, "{given_up}");
    let at: Vec<u64> = tries.iter().map(|it| weft::clock::parse_rfc3339(it["at"].as_str().unwrap()).unwrap()).collect();
    assert!(at[1] >= at[0] + 1_000, "each at its own time: {given_up}");
    assert!(tries.iter().all(|it| it["worker"] == "ada"), "{given_up}");
}

pub(super) fn with(mut command: Value, more: Value) -> Value {
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    command
}

/// Checks the projections against the log, deletes them, and has them made anew.
pub async fn rebuilt(server: &mut Server) {
    server.stop().await;
    let check =
        weft().args(["rebuild", "--check", "--data"]).arg(server.data()).args(server.log().arguments()).output();
    let check = check.unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    std::fs::remove_dir_all(server.data().join("projections")).unwrap();
    server.up();
    server.ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_program_writes_into_the_topic_becomes_a_dead_letter_and_reading_goes_on() {
    let log = LogKind::kafka();
    let LogKind::Kafka { brokers, prefix } = log.clone() else { unreachable!("it is Kafka") };
    let topic = format!("{prefix}events");
    let mut server = Server::start(log);
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("x", "before").await, 1);
    let garbage = b"\xff\xfe garbage";
    produce(&brokers, &topic, None, Some(b"acme/x"), Some(garbage), None);
    produce(&brokers, &topic, None, None, Some(b"{\"secret\": 1}"), None);
    produce(&brokers, &topic, None, Some(b"acme/x"), None, None);
    produce(&brokers, &topic, None, Some(b"acme/x"), Some(&vec![b'x'; 100_000]), None);
    let acme = root_of("acme");
    eventually("all four are seen", async || get(&server, &acme, "").await.1["items"].as_array().unwrap().len() == 4)
        .await;
    assert_eq!(ada.say("x", "after").await, 2, "and reading goes on");
    assert_eq!(server.metric(r#"weft_dead_letters_total{reason="unreadable"}"#).await, 4.0);

    let letters = list(&server, &acme, "?reason=unreadable").await;
    assert_eq!(letters.len(), 4);
    for letter in &letters {
        has(letter, json!({"topic": topic, "attempts": 1}));
        assert!(letter["partition"].as_u64().unwrap() < 64 && letter["offset"].is_u64(), "{letter}");
        assert!(letter["user"].is_null() && letter["event"].is_null() && letter["seq"].is_null(), "{letter}");
        assert!(!letter["error"].as_str().unwrap().is_empty() && letter["at"].is_string(), "{letter}");
    }
    let sized = |size: u64| letters.iter().find(|it| it["size"] == size).unwrap_or_else(|| panic!("{letters:?}"));
    let bytes = |letter: &Value| STANDARD.decode(letter["bytes"].as_str().unwrap()).unwrap();
    let keyed = sized(garbage.len() as u64);
    assert_eq!((&keyed["thread"], bytes(keyed)), (&json!("x"), garbage.to_vec()), "{keyed}");
    assert_eq!(bytes(sized(0)), b"", "a tombstone is empty");
    assert_eq!(bytes(sized(100_000)), vec![b'x'; 64 << 10], "its first 64 KiB");
    let nobodys = sized(13);
    has(nobodys, json!({"thread": null, "bytes": null}));
    assert_eq!(
        list(&server, &root_of("umbrella"), "").await,
        std::slice::from_ref(nobodys),
        "and nothing else of acme's"
    );
    assert_eq!(errors(&list(&server, &acme, "?thread=x").await).len(), 3);

    rebuilt(&mut server).await;
    assert_eq!(list(&server, &acme, "").await, letters, "the same, in the same order");
    assert_eq!(server.connect("ada").await.say("x", "and on it goes").await, 3);
}
