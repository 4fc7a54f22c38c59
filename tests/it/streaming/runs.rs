//! Runs: what agents may do in which order, and what readers get of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::on_threads;
use crate::on_both_logs;
use crate::support::{LogKind, Server, Socket, accepted, eventually, has, refused, refused_with, seqs, token};

pub const AGENT: &str = "publish subscribe agent";

pub fn step(thread: &str, run: &str, kind: &str, data: Value) -> Value {
    json!({"type": "publish", "thread": thread, "run": run, "kind": kind, "data": data})
}

/// The answer to the question with this seq.
pub fn answer_to(thread: &str, run: &str, question: &Value, data: Value) -> Value {
    let mut command = step(thread, run, "agent_resumed", data);
    command["parent"] = question.clone();
    command
}

/// One event of an agent, or of a person who talks to one.
#[derive(Debug, Clone)]
enum Act {
    Start { parent: Option<usize> },
    Think,
    Call { call: usize },
    Complete { call: usize },
    Wait,
    Resume { question: Question },
    AskToCancel,
    End { kind: &'static str },
}

/// Which question an answer names.
#[derive(Debug, Clone, Copy)]
enum Question {
    /// The newest of the run, open or not.
    Newest,
    /// The first one.
    First,
    /// None of them: the thread's first event.
    None,
}

const RUNS: usize = 3;
const ENDINGS: [&str; 3] = ["agent_completed", "agent_failed", "agent_cancelled"];

impl Act {
    fn event(&self) -> (&'static str, Value) {
        match self {
            Act::Start { parent: None } => ("agent_started", json!({"agent": "scout"})),
            Act::Start { parent: Some(run) } => {
                ("agent_started", json!({"agent": "scout", "parent_run": format!("r{run}")}))
            }
            Act::Think => ("agent_thinking", json!({})),
            Act::Call { call } => ("tool_executing", json!({"tool": "map", "call": format!("c{call}")})),
            Act::Complete { call } => ("tool_completed", json!({"call": format!("c{call}"), "result": 1})),
            Act::Wait => ("agent_waiting", json!({"reason": "approval"})),
            Act::Resume { .. } => ("agent_resumed", json!({"answer": "yes"})),
            Act::AskToCancel => ("agent_cancel_requested", json!({})),
            Act::End { kind: kind @ "agent_failed" } => (kind, json!({"code": "broken", "message": "it broke"})),
            Act::End { kind } => (kind, json!({})),
        }
    }
}

fn acts() -> impl Strategy<Value = Vec<(usize, Act)>> {
    let act = prop_oneof![
        4 => prop::option::weighted(0.4, 0..RUNS).prop_map(|parent| Act::Start { parent }),
        3 => Just(Act::Think),
        4 => (0..2usize).prop_map(|call| Act::Call { call }),
        4 => (0..2usize).prop_map(|call| Act::Complete { call }),
        2 => Just(Act::Wait),
        4 => prop::sample::select(vec![Question::Newest, Question::Newest, Question::First, Question::None])
            .prop_map(|question| Act::Resume { question }),
        1 => Just(Act::AskToCancel),
        2 => prop::sample::select(ENDINGS.to_vec()).prop_map(|kind| Act::End { kind }),
    ];
    prop::collection::vec((0..RUNS, act), 1..60)
}

/// The contract's table, written a second time.
#[derive(Default)]
struct Model {
    runs: BTreeMap<usize, Run>,
}

#[derive(Default)]
struct Run {
    ended: bool,
    /// The question that is open.
    waiting: Option<u64>,
    questions: Vec<u64>,
    answered: BTreeSet<u64>,
    parent: Option<usize>,
    begun: BTreeSet<usize>,
    done: BTreeSet<usize>,
}

impl Model {
    /// The seq that an answer names as its question.
    fn parent(&self, run: usize, question: Question) -> u64 {
        let questions = self.runs.get(&run).map_or(&[][..], |run| &run.questions);
        let named = match question {
            Question::Newest => questions.last(),
            Question::First => questions.first(),
            Question::None => None,
        };
        named.copied().unwrap_or(1)
    }

    /// `published`, or the code of the refusal; `head` is the thread's.
    fn judge(&mut self, run: usize, act: &Act, head: u64) -> &'static str {
        let named = if let Act::Resume { question } = act { self.parent(run, *question) } else { 0 };
        if named > head {
            return "bad_request";
        }
        let known = self.runs.contains_key(&run);
        if let Act::Start { parent } = act {
            let parent_open = parent.is_none_or(|parent| self.runs.get(&parent).is_some_and(|run| !run.ended));
            if known || !parent_open {
                return "run_order";
            }
            self.runs.insert(run, Run { parent: *parent, ..Run::default() });
            return "published";
        }
        let children = self.runs.values().filter(|child| child.parent == Some(run) && !child.ended).count();
        let Some(it) = self.runs.get_mut(&run) else { return "run_order" };
        if let Act::Resume { .. } = act
            && it.waiting != Some(named)
        {
            let late = it.answered.contains(&named);
            let answered = !it.ended && (it.waiting.is_some() || !it.answered.is_empty());
            return if late || answered { "conflict" } else { "run_order" };
        }
        let allowed = !it.ended
            && match act {
                Act::Call { call } => it.begun.insert(*call),
                Act::Complete { call } => it.begun.contains(call) && it.done.insert(*call),
                Act::Wait if it.waiting.is_some() => false,
                Act::Wait => {
                    it.waiting = Some(head + 1);
                    it.questions.push(head + 1);
                    true
                }
                Act::Resume { .. } => {
                    it.answered.extend(it.waiting.take());
                    true
                }
                Act::End { kind } => children == 0 && (*kind != "agent_completed" || it.begun == it.done),
                _ => true,
            };
        if allowed && matches!(act, Act::End { .. }) {
            it.ended = true;
            it.waiting = None;
        }
        if allowed { "published" } else { "run_order" }
    }
}

/// Plays the acts in one frame and holds each answer against the model; then the events, the refusals and the page of runs.
async fn plays_as_the_model_says(server: &Server, thread: &str, acts: &Vec<(usize, Act)>) {
    let mut agent = server.connect_as("scout", AGENT).await;
    let (mut model, mut head) = (Model::default(), 0);
    let (mut frame, mut verdicts) = (Vec::new(), Vec::new());
    for (id, (run, act)) in (0_u64..).zip(acts) {
        let (kind, data) = act.event();
        let mut command = step(thread, &format!("r{run}"), kind, data);
        command["id"] = json!(id);
        if let Act::Resume { question } = act {
            command["parent"] = json!(model.parent(*run, *question));
        }
        frame.push(command);
        let verdict = model.judge(*run, act, head);
        head += u64::from(verdict == "published");
        verdicts.push(verdict);
    }
    agent.send(&Value::Array(frame)).await;
    let mut answers: HashMap<u64, Value> = HashMap::new();
    while answers.len() < acts.len() {
        let answer = agent.recv().await;
        answers.insert(answer["id"].as_u64().unwrap_or_else(|| panic!("{answer}")), answer);
    }
    let (mut seq, mut refused) = (0, 0);
    for (id, (run, act)) in (0..).zip(acts) {
        let (expected, answer) = (verdicts[id as usize], &answers[&id]);
        let said = if answer["type"] == "published" { "published" } else { answer["code"].as_str().unwrap() };
        assert_eq!(said, expected, "{id}: {act:?} of r{run} in {acts:?}: {answer}");
        match expected {
            "published" => {
                seq += 1;
                assert_eq!(answer["seq"], seq, "seqs are dense over what is kept");
            }
            "run_order" => {
                refused += 1;
                assert!(answer["message"].as_str().unwrap().contains("expected"), "{answer}");
            }
            _ => {}
        }
    }
    let letters = server
        .http_with("GET", &format!("/v1/dead-letters?thread={thread}"), &token("root", "admin"), None, &[])
        .await
        .1;
    assert_eq!(letters["items"].as_array().unwrap().len(), refused, "{letters}");
    let (status, page) =
        server.http_with("GET", &format!("/v1/threads/{thread}/runs"), &token("root", "admin"), None, &[]).await;
    if seq == 0 {
        assert_eq!(status, 404);
        return;
    }
    let got: BTreeMap<&str, (bool, bool)> = page["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["run"].as_str().unwrap(), (!it["ended"].is_null(), it["state"] == "waiting")))
        .collect();
    let names: Vec<String> = model.runs.keys().map(|run| format!("r{run}")).collect();
    let expected =
        names.iter().map(|name| &**name).zip(model.runs.values().map(|run| (run.ended, run.waiting.is_some())));
    assert_eq!(got, expected.collect());
}

fn check(log: LogKind, cases: u32) {
    on_threads(log, cases, acts(), plays_as_the_model_says);
}

#[test]
fn every_event_of_an_agent_is_taken_or_refused_as_the_table_says() {
    check(LogKind::embedded(), 96);
}

#[test]
fn every_event_of_an_agent_is_taken_or_refused_as_the_table_says_on_kafka() {
    check(LogKind::kafka(), 12);
}

on_both_logs!(of_several_answers_at_once_the_first_wins_on_every_node_and_after_a_kill, |log| async move {
    let mut server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    let people: Vec<String> = (0..8).map(|n| format!("person{n}")).collect();
    let made = server.http("PUT", "/v1/threads/t", "scout", Some(json!({"members": people}))).await;
    assert_eq!(made.0, 201);
    accepted(&agent.ask(step("t", "r", "agent_started", json!({"agent": "scout"}))).await);
    let asked = agent.ask(step("t", "r", "agent_waiting", json!({"reason": "approval", "prompt": "Pay?"}))).await;
    let waiting = server.http("GET", "/v1/runs?state=waiting", "person0", None).await.1;
    assert_eq!(
        (&waiting["runs"][0]["run"], &waiting["runs"][0]["waiting"]["data"]["prompt"]),
        (&json!("r"), &json!("Pay?")),
        "{waiting}"
    );
    let mut answers = Vec::new();
    for person in &people {
        let mut socket = server.connect(person).await;
        let yes = answer_to("t", "r", &asked["seq"], json!({"answer": "yes"}));
        answers.push(async move {
            let answer = socket.ask(yes).await;
            (answer["type"].clone(), answer["code"].clone(), answer["message"].clone())
        });
    }
    let answers = futures_util::future::join_all(answers).await;
    let won: Vec<usize> = (0..answers.len()).filter(|n| answers[*n].0 == "published").collect();
    assert_eq!(won.len(), 1, "{answers:?}");
    let winner = &people[won[0]];
    for (_, code, message) in answers.iter().filter(|(kind, ..)| kind != "published") {
        assert_eq!(code, "conflict");
        assert!(message.as_str().unwrap().contains(winner.as_str()), "{message} names {winner}");
    }
    server.kill();
    server.up();
    let ask = async || server.http("GET", "/v1/runs/r", "person0", None).await;
    eventually("the run is there", async || ask().await.0 == 200).await;
    let run = ask().await.1;
    assert_eq!((&run["resumed"]["user"], &run["state"]), (&json!(winner), &json!("open")));
});

on_both_logs!(an_agent_reads_a_thread_while_it_has_an_open_run_there_and_hears_its_cancel_first, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    ada.say("t", "hello").await;
    let mut agent = server.connect_as("bot", "agent").await;
    let subscribe = |thread: &str, after: u64| json!({"type": "subscribe", "thread": thread, "after": after});
    refused_with(&agent.ask(subscribe("t", 0)).await, "not_found");
    accepted(&agent.ask(step("t", "r", "agent_started", json!({"agent": "bot"}))).await);
    assert_eq!(agent.ask(subscribe("t", 0)).await["type"], "subscribed");
    assert_eq!(seqs(&agent.events(2).await), [1, 2]);
    assert_eq!(agent.recv().await["type"], "caught_up");
    let bot = token("bot", "agent");
    let get = async |path: &str| server.http_with("GET", path, &bot, None, &[]).await;
    for path in
        ["/v1/threads/t/events", "/v1/threads/t/context", "/v1/threads/t/runs", "/v1/threads/t/runs/r", "/v1/runs/r"]
    {
        assert_eq!(get(path).await.0, 200, "{path}");
    }
    assert_eq!(get("/v1/runs").await.1["runs"][0]["run"], "r");
    // Another agent of the tenant does not work here.
    let other = token("other", "agent");
    assert_eq!(server.http_with("GET", "/v1/threads/t/events", &other, None, &[]).await.0, 404);

    // Without credit for more, events wait; the cancel does not.
    agent.send(&json!({"type": "credit", "events": 1})).await;
    agent.answers().await;
    for n in 0..20 {
        ada.say("t", &format!("message {n}")).await;
    }
    let asked = ada.ask(step("t", "r", "agent_cancel_requested", json!({"reason": "enough"}))).await;
    assert_eq!(agent.recv_type("event").await["seq"], 3);
    let signal = agent.recv_type("signal").await;
    let wanted = json!({"run": "r", "seq": asked["seq"]});
    assert_eq!(
        (&signal["kind"], &signal["thread"], &signal["data"]),
        (&json!("agent_cancel_requested"), &json!("t"), &wanted)
    );

    // With the run the right ends, after the event that says so.
    accepted(&agent.ask(step("t", "r", "agent_cancelled", json!({}))).await);
    agent.send(&json!({"type": "credit", "events": 100})).await;
    let events = agent.events(21).await;
    assert_eq!(events.last().unwrap()["kind"], "agent_cancelled", "{events:?}");
    let ended = agent.recv_type("error").await;
    refused_with(&ended, "not_found");
    assert_eq!(ended["thread"], "t");
    refused_with(&agent.ask(subscribe("t", 0)).await, "not_found");
    assert_eq!(get("/v1/threads/t/events").await.0, 404);
});

on_both_logs!(an_answer_counts_for_the_question_that_it_names_and_for_no_other, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    let mut ask = async |command: Value| agent.ask(command).await;
    accepted(&ask(step("t", "r", "agent_started", json!({"agent": "scout"}))).await);
    let question = |prompt: &str| step("t", "r", "agent_waiting", json!({"reason": "approval", "prompt": prompt}));
    let yes = |question: &Value| answer_to("t", "r", question, json!({"answer": "yes"}));

    refused(&ask(step("t", "r", "agent_resumed", json!({"answer": "yes"}))).await, "bad_request", "parent");
    let body = json!({"kind": "agent_resumed", "run": "r", "data": {"answer": "yes"}});
    let (status, problem) = server.http("POST", "/v1/threads/t/events", "scout", Some(body)).await;
    assert_eq!(status, 400, "{problem}");
    refused(&problem, "bad_request", "parent");
    refused_with(&ask(yes(&json!(1))).await, "run_order");

    let pay = ask(question("Pay 5?")).await["seq"].clone();
    refused_with(&ask(question("Two at a time?")).await, "run_order");
    refused(&ask(yes(&json!(1))).await, "conflict", "parent");
    let paid = ask(yes(&pay)).await["seq"].clone();
    let delete = ask(question("Delete everything?")).await["seq"].clone();
    let names = |answer: &Value, seq: &Value| answer["message"].as_str().unwrap().contains(&format!("seq {seq}"));
    let late = ask(yes(&pay)).await;
    refused(&late, "conflict", "parent");
    assert!(names(&late, &paid), "{late}");
    let body = json!({"kind": "agent_resumed", "run": "r", "data": {}, "parent": pay});
    assert_eq!(server.http("POST", "/v1/threads/t/events", "scout", Some(body)).await.0, 409);
    let run = server.http("GET", "/v1/threads/t/runs/r", "scout", None).await.1;
    assert_eq!((&run["state"], &run["waiting"]["seq"]), (&json!("waiting"), &delete), "it is still open: {run}");

    accepted(&ask(yes(&delete)).await);
    let third = ask(question("And then?")).await["seq"].clone();
    let late = ask(yes(&pay)).await;
    assert!(names(&late, &paid), "the answer to that question, not the newest one: {late}");
    accepted(&ask(step("t", "r", "agent_cancelled", json!({}))).await);
    refused_with(&ask(yes(&third)).await, "run_order");
    refused(&ask(yes(&pay)).await, "conflict", "parent");
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_comes_to_nothing_is_ended_once_and_a_question_whose_time_is_up_is_answered() {
    let server = Server::start_with(LogKind::embedded(), &["--run-stalled-after", "1s"]);
    let mut agent = server.connect_as("scout", AGENT).await;
    let soon = weft::clock::rfc3339(weft::clock::now_ms() + 1_500);
    // In one frame, so that none of them has stalled before all are there.
    let steps = [
        ("idle", "agent_started", json!({"agent": "scout"})),
        ("asks", "agent_started", json!({"agent": "scout"})),
        ("asks", "agent_waiting", json!({"reason": "approval", "expires_at": soon})),
        ("waits", "agent_started", json!({"agent": "scout"})),
        ("waits", "agent_waiting", json!({"reason": "approval"})),
    ];
    let frame = steps.into_iter().zip(900..).map(|((run, kind, data), id)| {
        let mut command = step("t", run, kind, data);
        command["id"] = json!(id);
        command
    });
    agent.send(&frame.collect()).await;
    for _ in 0..5 {
        accepted(&agent.recv().await);
    }
    agent.subscribe("t", Some(0)).await;
    let mut ends: Vec<Value> = agent.events(8).await;
    ends.retain(|event| event["from"] == "weft");
    ends.sort_by_key(|event| (event["run"].to_string(), event["seq"].as_u64()));
    let got: Vec<_> = ends
        .iter()
        .map(|it| (it["run"].as_str().unwrap(), it["kind"].as_str().unwrap(), it["from"].as_str().unwrap()))
        .collect();
    // Once it was answered for, nobody went on with that run either.
    assert_eq!(
        got,
        [("asks", "agent_resumed", "weft"), ("asks", "agent_failed", "weft"), ("idle", "agent_failed", "weft")]
    );
    has(&ends[0]["data"], json!({"answer": null, "expired": true}));
    assert_eq!(ends[2]["data"]["code"], "stalled");
    // Each names what it answers or ends: the question, the newest event of the run.
    let parents: Vec<_> = ends.iter().map(|it| it["parent"].as_u64().unwrap()).collect();
    assert_eq!(parents, [3, ends[0]["seq"].as_u64().unwrap(), 1]);
    let left = server.http("GET", "/v1/runs", "scout", None).await.1;
    assert_eq!((left["runs"].as_array().unwrap().len(), &left["runs"][0]["run"]), (1, &json!("waits")), "{left}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_both_find_a_run_stalled_end_it_once() {
    let log = LogKind::kafka();
    let nodes = [(); 2].map(|()| Server::start_with(log.clone(), &["--run-stalled-after", "1s"]));
    let mut agent = nodes[0].connect_as("scout", AGENT).await;
    for run in 0..20 {
        let started = agent.ask(step("t", &format!("r{run}"), "agent_started", json!({"agent": "scout"}))).await;
        accepted(&started);
    }
    for node in &nodes {
        let get = async |path| node.http("GET", path, "scout", None).await.1;
        eventually("there are runs", async || get("/v1/threads/t/runs").await["runs"][0].is_object()).await;
        eventually("all runs are ended", async || get("/v1/runs").await["runs"] == json!([])).await;
        let ended = get("/v1/threads/t/events?limit=1000").await;
        let failed = ended["events"].as_array().unwrap().iter().filter(|it| it["kind"] == "agent_failed");
        assert_eq!(failed.count(), 20, "{ended}");
    }
}

#[tokio::test]
async fn an_agent_hears_that_it_shall_stop_before_all_else_that_waits_for_it() {
    let server = Server::start(LogKind::embedded());
    let mut agent = server.connect_as("scout", AGENT).await;
    accepted(&agent.ask(step("t", "r", "agent_started", json!({"agent": "scout"}))).await);
    assert_eq!(agent.say("noise", "0").await, 1);
    for thread in ["noise", "t"] {
        agent.subscribe(thread, None).await;
        agent.recv_type("caught_up").await;
    }
    // Events are handed out after they are answered, and to the agent before the witness, which came later.
    let mut witness = server.connect("scout").await;
    witness.subscribe("t", None).await;
    witness.recv_type("caught_up").await;
    agent.send(&json!({"type": "credit", "events": 1})).await;
    assert_eq!(server.http("PUT", "/v1/threads/t/members/ada", "scout", None).await.0, 201);
    assert_eq!(agent.recv_type("event").await["kind"], "member_added");
    let mut other = server.connect("scout").await;
    for n in 1..=100 {
        other.say("noise", &n.to_string()).await;
    }
    let asked = server.connect("ada").await.ask(step("t", "r", "agent_cancel_requested", json!({}))).await;
    accepted(&asked);
    assert_eq!(witness.events(2).await[1]["kind"], "agent_cancel_requested");
    // Of eight turns one may be another thread's.
    agent.send(&json!({"type": "credit", "events": 2})).await;
    let got = agent.events(2).await;
    assert!(got.iter().any(|event| event["kind"] == "agent_cancel_requested"), "{got:?}");
}

on_both_logs!(
    a_hundred_agents_on_one_thread_and_one_agent_on_a_hundred_threads_keep_each_run_in_order,
    |log| async move {
        let server = Server::start_unlimited(log);
        let mut reader = server.connect_as("eva", "subscribe analyst").await;
        let play = async |mut socket: Socket, thread: String, run: String| {
            let kinds = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"];
            for kind in kinds {
                let data = json!({"agent": "scout", "tool": "map", "call": "c"});
                accepted(&socket.ask(step(&thread, &run, kind, data)).await);
            }
        };
        let mut all = Vec::new();
        for n in 0..100 {
            let agent = server.connect_as(&format!("agent{n}"), AGENT).await;
            all.push(play(agent, "shared".to_owned(), format!("r{n}")));
            let agent = server.connect_as("everywhere", AGENT).await;
            all.push(play(agent, format!("own{n}"), "r".to_owned()));
            if all.len() == 100 {
                futures_util::future::join_all(std::mem::take(&mut all)).await;
            }
        }
        reader.subscribe("shared", Some(0)).await;
        let mut runs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for event in reader.events(500).await {
            let name = |field: &str| event[field].as_str().unwrap().to_owned();
            runs.entry(name("run")).or_default().push(name("kind"));
        }
        assert_eq!(runs.len(), 100);
        for kinds in runs.values() {
            assert_eq!(kinds.join(" "), "agent_started agent_thinking tool_executing tool_completed agent_completed");
        }
        let (_, found) = server.http_with("GET", "/v1/runs/r", &token("eva", "subscribe analyst"), None, &[]).await;
        refused_with(&found, "conflict");
        let (_, own) = server.http("GET", "/v1/threads/own7/runs/r", "everywhere", None).await;
        assert_eq!((&own["state"], own["steps"].as_array().unwrap().len()), (&json!("completed"), 5), "{own}");
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_s_page_tells_its_steps_tools_times_and_end() {
    let server = Server::start(LogKind::embedded());
    let mut agent = server.connect_as("scout", AGENT).await;
    let mut ada = server.connect("ada").await;
    ada.say("t", "Book a table").await;
    let steps = [
        ("agent_started", json!({"agent": "scout", "input": {"for": 2}})),
        ("tool_executing", json!({"tool": "map", "call": "c1"})),
        ("tool_executing", json!({"tool": "phone", "call": "c2"})),
        ("tool_completed", json!({"call": "c1", "error": "no map"})),
    ];
    for (kind, data) in steps {
        accepted(&agent.ask(step("t", "r", kind, data)).await);
    }
    let asked = ada.ask(step("t", "r", "agent_cancel_requested", json!({"reason": "too late"}))).await;
    accepted(&asked);
    let rejection = ada.ask(step("t", "r", "agent_thinking", json!({}))).await;
    refused(&rejection, "forbidden", "kind");
    let open = server.http("GET", "/v1/runs/r", "ada", None).await.1;
    has(&open, json!({"state": "open", "executing": 1}));
    assert_eq!((&open["cancel"]["requested"]["user"], open["cancel"].get("acknowledged")), (&json!("ada"), None));
    for (kind, data) in [("tool_completed", json!({"call": "c2"})), ("agent_cancelled", json!({"reason": "asked to"}))]
    {
        accepted(&agent.ask(step("t", "r", kind, data)).await);
    }
    let run = server.http("GET", "/v1/threads/t/runs/r", "ada", None).await.1;
    has(&run, json!({"state": "cancelled", "agent": "scout", "thread": "t"}));
    assert_eq!((&run["cancel"]["acknowledged"]["seq"], &run["cancel"]["ended"]["seq"]), (&json!(7), &json!(8)));
    let tools: Vec<_> = run["tools"].as_array().unwrap().iter().map(|tool| (&tool["tool"], &tool["error"])).collect();
    assert_eq!(tools, [(&json!("map"), &json!("no map")), (&json!("phone"), &Value::Null)]);
    assert_eq!(run["steps"].as_array().unwrap().len(), 7);
    let total = run["timings"]["total_ms"].as_u64().unwrap();
    assert!(run["timings"]["queue_ms"].as_u64().unwrap() <= total, "{run}");
    assert_eq!(server.http("GET", "/v1/runs/r", "mallory", None).await.0, 404);
    assert_eq!(server.http("GET", "/v1/threads/t/runs", "mallory", None).await.0, 404);
    assert_eq!(server.http("GET", "/v1/runs?state=done", "ada", None).await.1["field"], "state");
}

#[tokio::test]
async fn data_that_the_projector_refuses_is_named_by_its_field_in_plain_words() {
    let server = Server::start(LogKind::embedded());
    let mut agent = server.connect_as("scout", AGENT).await;
    let cases = [
        ("agent_started", json!({"agent": "scout", "parent_run": 5}), "data.parent_run", "must be a string, not 5"),
        ("agent_started", json!({"agent": "scout"}), "", ""),
        ("tool_executing", json!({"call": "c", "tool": "map", "arguments": []}), "", ""),
        (
            "agent_waiting",
            json!({"reason": "ask", "expires_at": [1]}),
            "data.expires_at",
            "must be a string, not a list",
        ),
    ];
    for (kind, data, field, why) in cases {
        let answer = agent.ask(step("t", "r", kind, data)).await;
        if field.is_empty() {
            accepted(&answer);
        } else {
            refused(&answer, "bad_request", field);
            assert_eq!(answer["message"], format!("{field} {why}"), "{answer}");
        }
    }
}

#[tokio::test]
async fn a_message_s_data_is_an_object_and_no_list_of_its_fields() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for data in [json!(["hi"]), json!({"content": [["text"]]})] {
        let message = json!({"type": "publish", "thread": "t", "kind": "user_message", "data": data});
        refused(&ada.ask(message).await, "bad_request", "data.content");
    }
}

on_both_logs!(a_run_s_page_lists_the_messages_that_it_wrote_in_deltas, |log| async move {
    let server = Server::start(log);
    let mut agent = server.connect_as("scout", AGENT).await;
    let delta = |message: &str, from_char: u64, text: &str| {
        step("t", "r", "agent_token", json!({"message": message, "from_char": from_char, "text": text}))
    };
    let steps = [
        step("t", "r", "agent_started", json!({"agent": "scout"})),
        delta("zuerst", 0, "Nudeln, "),
        delta("zuerst", 8, "geöffnet"),
        step("t", "r", "agent_message", json!({"message": "zuerst", "content": "Other words"})),
        delta("dann", 0, "Und"),
    ];
    for step in &steps {
        accepted(&agent.ask(step.clone()).await);
    }
    let run = server.http("GET", "/v1/threads/t/runs/r", "scout", None).await.1;
    let [first, second] = run["messages"].as_array().unwrap().as_slice() else { panic!("{run}") };
    assert_eq!(
        (&first["message"], &first["from"], &first["chars"], &first["closed"]["seq"]),
        (&json!("zuerst"), &json!("scout"), &json!(16), &json!(2))
    );
    assert_eq!((&second["message"], &second["chars"], second.get("closed")), (&json!("dann"), &json!(3), None));
    assert!(
        run["heard_at"].as_str() >= second["began"].as_str() && run["heard_at"].as_str() >= run["last"]["at"].as_str()
    );
    let ms = |value: &Value| value.as_u64().unwrap();
    assert_eq!(ms(&run["timings"]["streaming_ms"]), ms(&first["ms"]) + ms(&second["ms"]));
    assert!(
        ms(&run["timings"]["queue_ms"]) + ms(&run["timings"]["streaming_ms"]) <= ms(&run["timings"]["total_ms"]),
        "{run}"
    );
    let ended = agent.ask(step("t", "r", "agent_completed", json!({}))).await;
    assert_eq!(ended["seq"], 4, "after the message that it closed");
    let run = server.http("GET", "/v1/runs/r", "scout", None).await.1;
    assert_eq!((&run["messages"][1]["closed"]["seq"], &run["ended"]["seq"]), (&json!(3), &json!(4)));
    assert_eq!(run["messages"].as_array().unwrap().len(), 2);
});
