//! How the golden log of the present version is made: by a server that is asked for everything that puts a record into the
//! log, and then by records that no server writes at the moment, with times that are days apart.

use serde_json::{Value, json};
use uuid::Uuid;
use weft::clock;
use weft::ingest::admit::new_event;
use weft::log::embedded::EmbeddedLog;
use weft::log::{Grant, RULES, Record, Topic};
use weft::protocol::custom::KindRecord;
use weft::protocol::dead_letters::letter_of;
use weft::protocol::event::LogEvent;
use weft::protocol::ids::log_key;
use weft::protocol::records::LetterActRecord;
use weft::protocol::work::{
    Boost, GroupRecord, GroupSettings, Overflow, Settlement, WEBHOOK_GROUP, WorkLeasedRecord, WorkOrder,
    WorkOverflowedRecord, WorkPausedRecord, WorkSettledRecord,
};

use super::{Line, NEWEST, PARTITIONS, append, files, outcome, read_all};
use crate::connection::tickets;
use crate::support::{LogKind, Server, Socket, TENANT, eventually, publish, token, token_of};

const AGENT: &str = "publish subscribe agent";
/// A run is ended by the server after so long: longer than the others here take.
const STALLED: &str = "4s";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "writes the files of a new version, once"]
async fn the_golden_log_of_this_version_is_written() {
    let (log_file, expected_file) = files(NEWEST);
    assert!(!log_file.exists() && !expected_file.exists(), "{NEWEST} has its files already");

    let more = ["--partitions", "1", "--run-stalled-after", STALLED, "--rate-user", "0", "--rate-agent", "0"];
    let mut server = Server::start_with(LogKind::embedded(), &more);
    messages(&server).await;
    members(&server).await;
    reserved(&server).await;
    kinds(&server).await;
    tickets(&server).await;
    runs(&server).await;
    deltas(&server).await;
    receipts(&server).await;
    letters(&server).await;
    deliveries(&server).await;
    server_endings(&server).await;
    server.stop().await;

    let log = EmbeddedLog::open(&server.data().join("log"), PARTITIONS).unwrap();
    append(&log, by_hand());
    let entries: Vec<_> = read_all(&log).into_iter().flat_map(|(entries, _)| entries).collect();
    let lines: String = entries.iter().map(|entry| serde_json::to_string(&Line::of(entry)).unwrap() + "\n").collect();
    let folder = tempfile::tempdir().unwrap();
    let outcome = outcome(&log, &folder.path().join("store"));
    std::fs::write(log_file, lines).unwrap();
    std::fs::write(expected_file, serde_json::to_string_pretty(&outcome).unwrap() + "\n").unwrap();
}

/// A publish with further fields.
fn publish_with(thread: &str, kind: &str, data: Value, more: Value) -> Value {
    let mut command = publish(thread, kind, data);
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    command
}

async fn messages(server: &Server) {
    let mut ada = server.connect("ada").await;
    ada.say("talk", "hello").await;
    ada.send_text(
        "{\"type\":\"publish\",\"id\":900,\"thread\":\"talk\",\"kind\":\"user_message\",\n\
         \"data\": { \"content\" : [ {\"type\":\"text\",\"text\":\"d\\u00e9j\\u00e0 vu \u{1f600}\"} ],\n  \"n\": 1.50 }}",
    )
    .await;
    ada.recv_type("published").await;
    let keyed = |n: u64| publish_with("talk", "x.note", json!({"n": n}), json!({"key": "k1", "priority": "high"}));
    for n in [1, 1, 2] {
        ada.ask(keyed(n)).await;
    }
    ada.ask(publish_with("talk", "x.reply", json!([null, true]), json!({"parent": 2, "priority": "low"}))).await;
    ada.ask(publish_with("talk", "x.reply", json!({}), json!({"parent": 99}))).await;
    let traced = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let body = json!({"kind": "x.traced", "data": {}});
    server.http_with("POST", "/v1/threads/talk/events", &token("ada", ""), Some(body), &[traced]).await;
    let mut zoe = Socket::open(&server.url, &token_of("globex", "zoe")).await;
    zoe.say("talk", "another tenant's thread of the same name").await;
}

async fn members(server: &Server) {
    let wanted = json!({"title": "Planning", "members": ["ben", "cid"]});
    for title in ["Planning", "Plans", "Plans"] {
        let body = Some(json!({"title": title, "members": wanted["members"]}));
        server.http("PUT", "/v1/threads/plans", "ada", body).await;
    }
    server.http("PUT", "/v1/threads/talk/members/ben", "ada", None).await;
    server.http("PUT", "/v1/threads/talk/members/ben", "ada", None).await;
    server.http("DELETE", "/v1/threads/plans/members/cid", "cid", None).await;
    server.http("DELETE", "/v1/threads/plans/members/cid", "ada", None).await;
    server.connect("ben").await.say("talk", "I am here").await;
}

async fn reserved(server: &Server) {
    server.connect("ada").await.say("@me", "a note to myself").await;
    server.connect("ada").await.say("@user:ben", "a word").await;
    let mut crier = server.connect_as("crier", "publish broadcast").await;
    crier.ask(publish("@tenant", "user_message", json!({"content": "hear ye"}))).await;
    let mut scout = server.connect_as("scout", AGENT).await;
    scout.ask(publish("@user:ben", "agent_message", json!({"content": "done"}))).await;
    let (status, _) = server.admin("DELETE", "/v1/users/cid/sessions").await;
    assert_eq!(status, 200);
    let (status, _) = server.admin("DELETE", "/v1/users/cid/sessions").await;
    assert_eq!(status, 200);
}

/// A kind gets a schema, the same again and another; what breaks it does not get into the log.
async fn kinds(server: &Server) {
    let root = token("root", "admin");
    for schema in [json!({"type": "object"}), json!({"type": "object"}), json!({"required": ["n"]})] {
        let (status, answer) = server.http_with("PUT", "/v1/kinds/x.order", &root, Some(schema), &[]).await;
        assert!(status < 300, "{answer}");
    }
    let mut ada = server.connect("ada").await;
    ada.ask(publish("talk", "x.order", json!({"n": 1}))).await;
    ada.ask(publish("talk", "x.order", json!({}))).await;
}

/// One is used twice, by two who know it before either has it; one is not used.
async fn tickets(server: &Server) {
    let (used, _) = (tickets::get(server, "ada").await, tickets::get(server, "ada").await);
    let both = tokio::join!(tickets::enter(server, &used), tickets::enter(server, &used));
    assert!(both.0.is_ok() != both.1.is_ok(), "one gets in");
}

/// An agent at work on one run.
struct Worker {
    socket: Socket,
    run: &'static str,
}

impl Worker {
    async fn begin(server: &Server, run: &'static str, more: Value) -> Worker {
        let mut worker = Worker { socket: server.connect_as("scout", AGENT).await, run };
        let mut data = json!({"agent": "scout", "input": {"q": run}});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        worker.step("agent_started", data).await;
        worker
    }

    async fn step(&mut self, kind: &str, data: Value) -> Value {
        self.step_with(kind, data, json!({})).await
    }

    async fn step_with(&mut self, kind: &str, data: Value, more: Value) -> Value {
        let mut fields = json!({"run": self.run});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.socket.ask(publish_with("talk", kind, data, fields)).await
    }
}

async fn runs(server: &Server) {
    let mut ada = server.connect("ada").await;
    let mut ben = server.connect("ben").await;
    let of = |run: &str, kind: &str, data: Value| publish_with("talk", kind, data, json!({"run": run}));

    let mut first = Worker::begin(server, "first", json!({})).await;
    first.step("agent_started", json!({"agent": "scout"})).await;
    first.step("agent_thinking", json!({"content": "hm"})).await;
    first.step("tool_executing", json!({"tool": "search", "call": "c1", "arguments": {"q": 1}})).await;
    first.step("tool_executing", json!({"tool": "search", "call": "c1"})).await;
    first.step("tool_completed", json!({"call": "c2"})).await;
    first.step("agent_completed", json!({})).await;
    first.step("tool_completed", json!({"call": "c1", "result": [1, 2]})).await;
    let answer = |run: &str, question: &Value, data: Value| {
        publish_with("talk", "agent_resumed", data, json!({"run": run, "parent": question}))
    };
    ada.ask(answer("first", &json!(1), json!({"answer": "too early"}))).await;
    let may_i = first.step("agent_waiting", json!({"reason": "approval", "prompt": "May I?"})).await["seq"].clone();
    first.step("agent_waiting", json!({"reason": "approval"})).await;
    ada.ask(answer("first", &json!(1), json!({"answer": "to no question"}))).await;
    ada.ask(answer("first", &may_i, json!({"answer": "yes"}))).await;
    ben.ask(answer("first", &may_i, json!({"answer": "no"}))).await;
    let more = first.step("agent_waiting", json!({"reason": "approval", "prompt": "Once more?"})).await["seq"].clone();
    ada.ask(answer("first", &may_i, json!({"answer": "to the question before"}))).await;
    ben.ask(answer("first", &more, json!({"answer": {"approved": false}}))).await;
    let mut child = Worker::begin(server, "child", json!({"parent_run": "first"})).await;
    first.step("agent_completed", json!({})).await;
    Worker::begin(server, "orphan", json!({"parent_run": "nobody"})).await;
    child.step("agent_failed", json!({"code": "broken", "message": "it broke"})).await;
    first.step("agent_message", json!({"content": "the answer"})).await;
    first.step("agent_completed", json!({"output": {"n": 1}, "usage": {"tokens": 3}})).await;
    first.step("agent_thinking", json!({})).await;
    ada.ask(answer("first", &more, json!({"answer": "too late"}))).await;
    ada.ask(of("never", "agent_cancel_requested", json!({}))).await;

    let mut second = Worker::begin(server, "second", json!({})).await;
    let open = second.step("agent_waiting", json!({"reason": "approval"})).await["seq"].clone();
    ada.ask(of("second", "agent_cancel_requested", json!({"reason": "enough"}))).await;
    ben.ask(of("second", "agent_cancel_requested", json!({}))).await;
    second.step("agent_cancelled", json!({"reason": "as asked"})).await;
    ada.ask(answer("second", &open, json!({"answer": "the run is over"}))).await;
}

async fn deltas(server: &Server) {
    let mut writer = Worker::begin(server, "writer", json!({})).await;
    let delta = |message: &str, from: u64, text: &str| json!({"message": message, "from_char": from, "text": text});
    for (message, from, text) in [
        ("m", 0, "Hé"),
        ("m", 2, "llo"),
        ("m", 0, "Hé"),
        ("m", 4, "o wor"),
        ("m", 99, "hole"),
        ("n", 0, "no"),
        ("o", 0, "oh"),
    ] {
        writer.step("agent_token", delta(message, from, text)).await;
    }
    writer.step("agent_message", json!({"message": "m"})).await;
    writer.step("agent_message", json!({"message": "m"})).await;
    writer.step("agent_message", json!({"message": "m", "content": "something else"})).await;
    writer.step("agent_token", delta("m", 9, "more")).await;
    writer.step("agent_message", json!({"message": "n", "content": "yes", "model": "m1"})).await;
    writer.step("agent_message", json!({"message": "unknown"})).await;
    writer.step("agent_message", json!({"message": "unknown", "content": "a message of its own"})).await;
    writer.step("agent_token", delta("p", 0, "left open")).await;
    for (message, from, text, restart) in [
        ("q", 0, "a text of before", false),
        ("q", 0, "new", true),
        ("q", 9, "a hole by now", false),
        ("q", 3, "er", false),
        ("n", 0, "closed before", true),
    ] {
        let mut data = delta(message, from, text);
        data["restart"] = json!(restart);
        writer.step("agent_token", data).await;
    }
    writer.step("agent_completed", json!({})).await;
    writer.step("agent_token", delta("o", 2, " no")).await;
    writer.step("agent_token", delta("o", 0, "oh")).await;
}

async fn receipts(server: &Server) {
    let mut ben = server.connect("ben").await;
    ben.subscribe_with("talk", json!({"name": "desk", "after": 0})).await;
    ben.subscribe_with("plans", json!({"after": 0})).await;
    ben.ack("talk", 3).await;
    ben.ack("plans", 2).await;
    ben.answers().await;
    ben.leave().await;
    let mut ada = server.connect("ada").await;
    ada.subscribe_with("*", json!({"name": "all"})).await;
    ada.leave().await;
    let mut ada = server.connect("ada").await;
    let confirm = json!({"name": "worker", "after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 1});
    ada.subscribe_with("plans", confirm).await;
    eventually("a dead letter", async || {
        let (_, found) = server.admin("GET", "/v1/dead-letters?reason=unacknowledged").await;
        found["items"].as_array().is_some_and(|items| !items.is_empty())
    })
    .await;
    ada.leave().await;
}

/// What the server ends by itself.
/// Refused events whose letters are requeued too early, in time and too late, and discarded; and a delivery that was given up.
async fn letters(server: &Server) {
    let root = token("root", "admin");
    let mut scout = server.connect_as("scout", AGENT).await;
    let in_run =
        |kind: &str, data: Value| publish_with("letters", kind, data, json!({"run": "late", "key": data_key(kind)}));
    for n in 1..=3 {
        let thought = json!({"content": format!("thought {n}")});
        scout.ask(publish_with("letters", "agent_thinking", thought, json!({"run": "late"}))).await;
    }
    let (_, page) = server.admin("GET", "/v1/dead-letters?thread=letters").await;
    let mut ids: Vec<&str> = page["items"].as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    ids.reverse();
    let requeue = async |id: &str, note: &str| {
        let path = format!("/v1/dead-letters/{id}/requeue");
        server.http_with("POST", &path, &root, Some(json!({"note": note})), &[]).await.0
    };
    let discard = async |id: &str| server.admin("DELETE", &format!("/v1/dead-letters/{id}?note=of+no+use")).await.0;
    assert_eq!(requeue(ids[0], "too early").await, 409);
    scout.ask(in_run("agent_started", json!({"agent": "scout"}))).await;
    assert_eq!((requeue(ids[0], "now").await, requeue(ids[0], "once more").await), (200, 409));
    assert_eq!((requeue(ids[1], "").await, discard(ids[2]).await, discard(ids[2]).await), (200, 200, 409));
    scout.ask(in_run("agent_completed", json!({}))).await;

    let (_, page) = server.admin("GET", "/v1/dead-letters?reason=unacknowledged").await;
    assert_eq!(discard(page["items"][0]["id"].as_str().unwrap()).await, 200);
}

/// A delivery that is given up and requeued: it is tried in vain and given up again, then acknowledged at the second attempt;
/// and one that is requeued and discarded.
async fn deliveries(server: &Server) {
    server.connect("ada").await.say("parcels", "one").await;
    let reader = async |name: &str, attempts: u32| {
        let mut reader = server.connect("ada").await;
        let wanted = json!({"name": name, "confirm": true, "ack_within_ms": 1_000, "attempts": attempts});
        reader.subscribe_with("parcels", wanted).await;
        reader
    };
    let given_up = async |name: &str| {
        let mut first = server.connect("ada").await;
        let wanted = json!({"name": name, "after": 0, "confirm": true, "ack_within_ms": 1_000, "attempts": 1});
        first.subscribe_with("parcels", wanted).await;
        let mut id = String::new();
        eventually("it is given up", async || {
            let (_, page) = server.admin("GET", "/v1/dead-letters?thread=parcels").await;
            id = page["items"][0]["id"].as_str().unwrap_or_default().to_owned();
            !id.is_empty()
        })
        .await;
        first.leave().await;
        id
    };
    let requeue = async |id: &str| {
        let path = format!("/v1/dead-letters/{id}/requeue");
        server.http_with("POST", &path, &token("root", "admin"), Some(json!({})), &[]).await.0
    };
    let is = async |id: &str, field: &str, value: Value| {
        let path = format!("/v1/dead-letters/{id}");
        eventually("the letter is so", async || server.admin("GET", &path).await.1[field] == value).await;
    };

    let id = given_up("first").await;
    assert_eq!((requeue(&id).await, requeue(&id).await), (200, 409));
    let mut first = reader("first", 3).await;
    first.events(1).await;
    first.leave().await;
    is(&id, "attempts", json!(2)).await;
    // Fewer attempts are wanted than it has had.
    let first = reader("first", 1).await;
    is(&id, "state", json!("open")).await;
    first.leave().await;
    assert_eq!(requeue(&id).await, 200);
    let mut first = reader("first", 3).await;
    first.events(2).await;
    first.ack("parcels", 1).await;
    is(&id, "state", json!("done")).await;
    first.leave().await;

    let id = given_up("second").await;
    assert_eq!(requeue(&id).await, 200);
    assert_eq!(server.admin("DELETE", &format!("/v1/dead-letters/{id}")).await.0, 200);
}

fn data_key(kind: &str) -> String {
    format!("letters-{kind}")
}

async fn server_endings(server: &Server) {
    let mut asker = Worker::begin(server, "asker", json!({})).await;
    let soon = clock::rfc3339(clock::now_ms() + 500);
    asker.step("agent_waiting", json!({"reason": "approval", "expires_at": soon})).await;
    let mut idle = Worker::begin(server, "idle", json!({})).await;
    idle.step("agent_token", json!({"message": "m", "from_char": 0, "text": "and then"})).await;
    for run in ["asker", "idle"] {
        eventually("the run is ended", async || {
            let (_, page) = server.http("GET", &format!("/v1/threads/talk/runs/{run}"), "ada", None).await;
            page["state"] == "failed"
        })
        .await;
    }
}

/// Records with times and rights that a server does not give on purpose.
fn by_hand() -> Vec<Record> {
    const HOUR: u64 = 60 * 60 * 1_000;
    let now = clock::now_ms();
    let make = |at: u64, from: &str, thread: &str, kind: &str, data: Value, key: Option<&str>, grant| {
        let data = serde_json::value::to_raw_value(&data).unwrap();
        let event = LogEvent {
            at: clock::rfc3339(at).into(),
            key: key.map(Into::into),
            ..new_event(TENANT, from, thread, kind, &data)
        };
        Record {
            topic: Topic::Events,
            key: log_key(TENANT, thread),
            kind: kind.to_owned(),
            rules: RULES,
            grant,
            traceparent: None,
            value: serde_json::to_vec(&event).unwrap().into(),
        }
    };
    let note =
        |at: u64, n: u64, key: Option<&str>| make(at, "ada", "talk", "x.note", json!({"n": n}), key, Grant::Member);
    vec![
        make(now, "stranger", "talk", "x.note", json!({}), None, Grant::Member),
        make(now, "stranger", "talk", "x.note", json!({}), None, Grant::Scope),
        make(now, "ada", "talk", "thread_created", json!({"title": "again"}), None, Grant::Member),
        make(now, "ada", "nowhere", "thread_updated", json!({"title": "none"}), None, Grant::Scope),
        make(now, "ada", "talk", "member_added", json!({"user": "a b"}), None, Grant::Member),
        make(now, "ada", "@user:ben", "member_added", json!({"user": "ben"}), None, Grant::Scope),
        make(now, "ada", "talk", "sessions_revoked", json!({}), None, Grant::Scope),
        make(now, "ada", "talk", "agent_resumed", json!({"answer": "without a run"}), None, Grant::Scope),
        // A key is free after a day, and a record from the future moves log time by an hour.
        note(now, 1, Some("day")),
        note(now + 23 * HOUR, 2, Some("day")),
        note(now + 26 * HOUR, 3, Some("day")),
        note(now + 26 * HOUR, 4, None),
        note(now + 99 * HOUR, 5, Some("future")),
        note(now + 26 * HOUR, 6, Some("day")),
        note(now + 27 * HOUR, 7, Some("day")),
        note(now + 60 * HOUR, 8, None),
        note(now + 60 * HOUR, 9, Some("day")),
        note(now - 5 * HOUR, 10, Some("future")),
    ]
    .into_iter()
    .chain(work("workers", 0, now + 60 * HOUR))
    .chain(work(WEBHOOK_GROUP, 100, now + 60 * HOUR))
    .chain(work_side_by_side(now + 60 * HOUR))
    .chain(schemas(now + 60 * HOUR))
    .collect()
}

/// What version 7 of the rules brought: a schema that stays, one that goes again, and an event that breaks the first: it was
/// written by who did not check it.
fn schemas(now: u64) -> Vec<Record> {
    let record = |kind: &'static str, name: &'static str, schema: Option<&'static str>| {
        let schema = schema.map(|text| serde_json::from_str(text).unwrap());
        Record::from(&KindRecord {
            kind: kind.into(),
            id: clock::event_id(),
            tenant: TENANT.into(),
            name: name.into(),
            schema,
            by: "root".into(),
            at: clock::rfc3339(now).into(),
        })
    };
    let unchecked = serde_json::value::to_raw_value(&json!([])).unwrap();
    let event = new_event(TENANT, "ada", "talk", "x.kept", &unchecked);
    let event = Record {
        topic: Topic::Events,
        key: log_key(TENANT, "talk"),
        kind: "x.kept".to_owned(),
        rules: RULES,
        grant: Grant::Member,
        traceparent: None,
        value: serde_json::to_vec(&event).unwrap().into(),
    };
    vec![
        record("kind_deleted", "x.none", None),
        record("kind_set", "x.kept", Some(r#"{"type": "object"}"#)),
        record("kind_set", "x.kept", Some(r#"{"type": "object"}"#)),
        record("kind_set", "x.gone", Some(r#"{ "no such keyword": 1 }"#)),
        record("kind_deleted", "x.gone", None),
        record("kind_deleted", "x.gone", None),
        event,
    ]
}

/// A group, and who works on what for it: each outcome, and what is refused. Its leases have the numbers after `first`.
fn work(name: &str, first: u8, now: u64) -> Vec<Record> {
    let group = |kind: &str, settings: Option<GroupSettings>, if_absent| {
        Record::from(&GroupRecord {
            kind: kind.to_owned(),
            id: clock::event_id(),
            tenant: TENANT.to_owned(),
            group: name.to_owned(),
            settings,
            if_absent,
            by: "ada".to_owned(),
            at: clock::rfc3339(now),
        })
    };
    let lease = |lease: u8, group_id: u8, seq: u64, after: u64, attempt: u32| {
        Record::from(&WorkLeasedRecord {
            kind: "work_leased".to_owned(),
            id: Uuid::from_bytes([first + lease; 16]),
            tenant: TENANT.to_owned(),
            thread: "talk".to_owned(),
            group: name.to_owned(),
            group_id: Uuid::from_bytes([group_id; 16]),
            seq,
            event_kind: "user_message".to_owned(),
            after,
            parallel: false,
            attempt,
            attempts: 2,
            holder: "wim".to_owned(),
            at: clock::rfc3339(now),
            until: clock::rfc3339(now + 30_000 * u64::from(lease)),
        })
    };
    let settle = |lease: u8, outcome: Settlement, later: u64| {
        Record::from(&WorkSettledRecord {
            kind: "work_settled".to_owned(),
            id: clock::event_id(),
            tenant: TENANT.to_owned(),
            thread: "talk".to_owned(),
            group: name.to_owned(),
            lease: Uuid::from_bytes([first + lease; 16]),
            outcome,
            reason: Some("why".to_owned()),
            until: Some(clock::rfc3339(now + 60_000)),
            by: "wim".to_owned(),
            at: clock::rfc3339(now + later),
        })
    };
    vec![
        group("group_paused", None, false),
        group("group_set", Some(GroupSettings::default()), true),
        group("group_set", Some(GroupSettings { attempts: 2, ..GroupSettings::default() }), false),
        group("group_set", Some(GroupSettings::default()), true),
        group("group_paused", None, false),
        group("group_resumed", None, false),
        lease(1, 1, 1, 0, 1),
        lease(2, 1, 1, 0, 1),
        settle(2, Settlement::Done, 0),
        settle(1, Settlement::Done, 0),
        settle(1, Settlement::Done, 0),
        lease(3, 1, 2, 1, 1),
        settle(3, Settlement::Retry, 0),
        lease(8, 1, 3, 1, 1),
        lease(4, 1, 2, 1, 2),
        settle(4, Settlement::Lost, 0),
        lease(5, 1, 4, 2, 1),
        settle(5, Settlement::Reject, 0),
        lease(6, 1, 5, 4, 1),
        settle(6, Settlement::Extend, 0),
        settle(6, Settlement::Expired, 31_000),
        settle(6, Settlement::Done, 61_000),
        settle(6, Settlement::Expired, 61_000),
        lease(7, 2, 2, 0, 1),
        group("group_deleted", None, false),
    ]
}

/// What versions 5 and 6 of the rules brought, and that work is requeued: of a group of its own.
fn work_side_by_side(now: u64) -> Vec<Record> {
    const GROUP: &str = "beside";
    const GROUP_ID: [u8; 16] = [3; 16];
    let at = || clock::rfc3339(now + 62_000);
    let until = || clock::rfc3339(now + 120_000);
    let lease = |lease: u8, parallel: bool, seq: u64, after: u64, attempt: u32| {
        Record::from(&WorkLeasedRecord {
            kind: "work_leased".to_owned(),
            id: Uuid::from_bytes([100 + lease; 16]),
            tenant: TENANT.to_owned(),
            thread: "talk".to_owned(),
            group: GROUP.to_owned(),
            group_id: Uuid::from_bytes(GROUP_ID),
            seq,
            event_kind: "user_message".to_owned(),
            after,
            parallel,
            attempt,
            attempts: 2,
            holder: "wim".to_owned(),
            at: at(),
            until: until(),
        })
    };
    let settle = |lease: u8, outcome: Settlement| {
        Record::from(&WorkSettledRecord {
            kind: "work_settled".to_owned(),
            id: clock::event_id(),
            tenant: TENANT.to_owned(),
            thread: "talk".to_owned(),
            group: GROUP.to_owned(),
            lease: Uuid::from_bytes([100 + lease; 16]),
            outcome,
            reason: Some("why".to_owned()),
            until: Some(at()),
            by: "wim".to_owned(),
            at: at(),
        })
    };
    let overflow = |seq: u64, after: u64| {
        Record::from(&WorkOverflowedRecord {
            kind: "work_overflowed".to_owned(),
            id: clock::event_id(),
            tenant: TENANT.to_owned(),
            thread: "talk".to_owned(),
            group: GROUP.to_owned(),
            group_id: Uuid::from_bytes(GROUP_ID),
            seq,
            event_kind: "user_message".to_owned(),
            after,
            limit: 3,
            at: at(),
        })
    };
    let pause = |kind: &str, thread: &str| {
        Record::from(&WorkPausedRecord {
            kind: kind.to_owned(),
            id: clock::event_id(),
            tenant: TENANT.to_owned(),
            thread: thread.to_owned(),
            group: GROUP.to_owned(),
            group_id: Uuid::from_bytes(GROUP_ID),
            by: "root".to_owned(),
            at: at(),
        })
    };
    let requeue = |reason: &str, seq: u64, round: u32| {
        let seq = seq.to_be_bytes();
        let facts: [&[u8]; 5] = [b"work", TENANT.as_bytes(), b"talk", &GROUP_ID, &seq];
        Record::from(&LetterActRecord {
            kind: "letter_requeued".to_owned(),
            id: clock::event_id(),
            letter: letter_of(&facts),
            reason: reason.to_owned(),
            tenant: TENANT.to_owned(),
            thread: Some("talk".to_owned()),
            round,
            by: "root".to_owned(),
            note: None,
            attempt: None,
            at: at(),
        })
    };
    let settings = GroupSettings {
        limit: 3,
        overflow: Overflow::DeadLetter,
        order: WorkOrder::None,
        // New with version 6.
        boost: Boost { high_ms: 5_000, low_ms: 0 },
        ..GroupSettings::default()
    };
    let group = GroupRecord {
        kind: "group_set".to_owned(),
        id: clock::event_id(),
        tenant: TENANT.to_owned(),
        group: GROUP.to_owned(),
        settings: Some(settings),
        if_absent: false,
        by: "root".to_owned(),
        at: at(),
    };
    vec![
        Record::from(&group),
        // Several at a time, done in another order; one of them twice, and one that was done.
        lease(1, true, 2, 1, 1),
        lease(2, true, 1, 0, 1),
        lease(3, true, 1, 0, 1),
        lease(4, true, 4, 3, 1),
        settle(4, Settlement::Done),
        lease(5, true, 4, 3, 1),
        settle(1, Settlement::Retry),
        lease(6, true, 2, 1, 2),
        lease(7, false, 5, 0, 1),
        settle(6, Settlement::Lost),
        settle(2, Settlement::Reject),
        // Both are letters: work again, beside the rest; one is done, one fails again.
        requeue("attempts", 2, 0),
        requeue("attempts", 2, 0),
        requeue("rejected", 1, 0),
        lease(8, true, 2, 4, 1),
        settle(8, Settlement::Done),
        lease(9, true, 1, 4, 1),
        settle(9, Settlement::Reject),
        // What makes room, from the middle; what is begun does not.
        lease(10, true, 5, 4, 1),
        overflow(5, 4),
        overflow(7, 6),
        overflow(7, 6),
        settle(10, Settlement::Done),
        requeue("overflow", 7, 0),
        // In order again: what was requeued first.
        lease(11, false, 8, 2, 1),
        lease(12, false, 7, 2, 1),
        settle(12, Settlement::Done),
        pause("work_paused", "talk"),
        pause("work_paused", "talk"),
        pause("work_paused", "nowhere"),
        lease(13, false, 8, 2, 1),
        pause("work_resumed", "talk"),
        lease(14, false, 8, 2, 1),
        pause("work_paused", "talk"),
        settle(14, Settlement::Done),
    ]
}
