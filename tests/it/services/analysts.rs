//! An analyst at the command line: what there is, what was said since then, which runs have ended.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::run;
use crate::support::{LogKind, Server, accepted, publish, token};

fn rows(text: &str, field: &str) -> Vec<Value> {
    serde_json::from_str::<Value>(text).unwrap()[field].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_analyst_finds_threads_by_title_member_and_time() {
    let server = Server::start(LogKind::embedded());
    let analyst = token("ana", "analyst");
    for (thread, title, member) in
        [("t1", "The Harbour", "ben"), ("t2", "A bridge", "cid"), ("t3", "harbour two", "cid")]
    {
        let body = json!({"title": title, "members": [member]});
        assert_eq!(server.http("PUT", &format!("/v1/threads/{thread}"), "ada", Some(body)).await.0, 201);
    }
    let found = |more: &[&str]| {
        let server = ["threads", "--all", "--json", "--url", &server.url, "--token", &analyst];
        let (code, text, said) = run(&[&server, more].concat());
        assert_eq!(code, 0, "{said}");
        rows(&text, "threads").iter().map(|row| row["thread"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(found(&[]), ["t1", "t2", "t3"]);
    assert_eq!(found(&["--title", "HARBOUR"]), ["t1", "t3"]);
    assert_eq!(found(&["--title", "harbour", "--member", "cid"]), ["t3"]);
    assert_eq!(found(&["--since", "1h"]).len(), 3);
    assert_eq!(found(&["--until", "1h"]).len(), 0);
    assert_eq!(found(&["--until", "9999-01-01T00:00:00Z"]).len(), 3);

    let (code, _, said) = run(&["threads", "--all", "--url", &server.url, "--token", &token("ada", "")]);
    assert!(code == 1 && said.contains("forbidden"), "{said}");
    let (code, _, said) = run(&["threads", "--since", "soon", "--url", &server.url, "--token", &analyst]);
    assert!(code == 2 && said.contains("neither a time"), "{said}");

    // Lines of a table are no wider than the terminal.
    let long = "a very long title ".repeat(20);
    server.http("PUT", "/v1/threads/t1", "ada", Some(json!({"title": long}))).await;
    let (_, text, _) = super::run_command(
        crate::support::weft()
            .args(["threads", "--all", "--url", &server.url, "--token", &analyst])
            .env("COLUMNS", "80"),
    );
    assert!(text.lines().count() == 4 && text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(text.contains("Z"), "times have their zone: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_until_the_head_prints_what_is_asked_for_and_ends_by_itself() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    for n in 0..300 {
        ada.say(&format!("t{}", n % 3), "text").await;
    }
    accepted(&ada.ask(publish("t1", "x.note", json!({"n": 1}))).await);
    let parts = json!({"content": [{"type": "text", "text": "in two "}, {"type": "text", "text": "parts"}]});
    accepted(&ada.ask(publish("t2", "user_message", parts)).await);
    let analyst = token("ana", "analyst");
    let tail = |thread: &str, more: &[&str]| {
        let server = ["tail", thread, "--until-head", "--url", &server.url, "--token", &analyst];
        let (code, text, said) = run(&[&server, more].concat());
        assert_eq!(code, 0, "{said}");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(tail("*", &["--all"]).len(), 302);
    assert_eq!(tail("t1", &[]).len(), 101);
    assert_eq!(tail("*", &["--all", "--kinds", "x.note,x.other"]).len(), 1);
    assert_eq!(tail("t1", &["--since", "1h"]).len(), 101);
    assert_eq!(tail("t1", &["--since", "9999-01-01T00:00:00Z"]), [""; 0]);
    assert_eq!(tail("t1", &["--after", "99"]).len(), 2);
    let last = tail("t2", &["--last", "1"]);
    assert!(last.len() == 1 && last[0].ends_with("in two parts"), "{last:?}");
    // The date and the zone.
    let at = &server.http("GET", "/v1/threads/t2/events?order=desc&limit=1", "ada", None).await.1["events"][0]["at"];
    let at = at.as_str().unwrap();
    assert!(last[0].contains(&format!("{} {}Z", &at[..10], &at[11..19])), "{last:?}");
    assert_eq!(tail("*", &[]), [""; 0], "she is a member of none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_that_have_ended_are_listed_across_threads() {
    let server = Server::start(LogKind::embedded());
    let mut agent = server.connect_as("scout", "publish agent").await;
    for (thread, run, end) in [("t2", "r", "agent_completed"), ("t1", "r", "agent_failed"), ("t1", "open", "")] {
        let mut step = async |kind: &str, data: Value| {
            let command = json!({"type": "publish", "thread": thread, "run": run, "kind": kind, "data": data});
            accepted(&agent.ask(command).await);
        };
        step("agent_started", json!({"agent": "helper"})).await;
        if !end.is_empty() {
            step(end, json!({"code": "x", "message": "y"})).await;
        }
    }
    let list = |scope: &str, more: &[&str]| {
        let token = token("ana", scope);
        run(&[&["runs", "--state", "ended", "--url", &server.url, "--token", &token][..], more].concat())
    };
    let (code, text, said) = list("analyst", &["--json"]);
    assert_eq!(code, 0, "{said}");
    let runs = rows(&text, "runs");
    // Two that end in one millisecond have no order.
    assert!(runs.is_sorted_by_key(|row| row["ended"]["at"].to_string()), "the newest last: {text}");
    let found: BTreeSet<String> = runs
        .iter()
        .map(|row| format!("{} {} {} {}", row["thread"], row["run"], row["agent"], row["state"]).replace('"', ""))
        .collect();
    assert_eq!(found, BTreeSet::from(["t2 r helper completed", "t1 r helper failed"].map(str::to_owned)));
    let (_, table, _) = list("analyst", &[]);
    assert!(table.contains("ended") && table.lines().count() == 3, "{table}");
    let (code, _, said) = list("", &[]);
    assert!(code == 1 && said.contains("forbidden"), "{said}");
}
