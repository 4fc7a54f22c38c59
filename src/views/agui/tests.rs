use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::protocol::kinds::AGENT_TOKEN;

/// What AG-UI's clients hold a stream to.
#[derive(Default)]
struct Verifier {
    running: Option<String>,
    failed: bool,
    open: BTreeSet<(&'static str, String)>,
}

impl Verifier {
    fn check(&mut self, event: &Value) {
        let text = |field: &str| event[field].as_str().unwrap_or_else(|| panic!("no {field} in {event}")).to_owned();
        let kind = text("type");
        if kind == "RUN_STARTED" {
            assert_eq!(self.running, None, "{event}");
            (self.running, self.failed) = (Some(text("runId")), false);
            self.open.clear();
            return;
        }
        assert!(!self.failed, "after an error: {event}");
        if kind == "RUN_ERROR" {
            text("message");
            (self.running, self.failed) = (None, true);
            return;
        }
        let running = self.running.as_deref().unwrap_or_else(|| panic!("outside of a run: {event}"));
        let (what, field, place) = match &*kind {
            "RUN_FINISHED" => {
                assert_eq!(running, text("runId"));
                assert!(self.open.is_empty(), "{:?} is open at {event}", self.open);
                assert_ne!(event.get("result"), Some(&Value::Null), "absent, not null");
                self.running = None;
                return;
            }
            "CUSTOM" => return assert!(!event["value"].is_null() && !text("name").is_empty()),
            "TOOL_CALL_RESULT" => {
                text("content");
                return drop(text("messageId") + &text("toolCallId"));
            }
            "TEXT_MESSAGE_START" => ("text", "messageId", "start"),
            "TEXT_MESSAGE_CONTENT" => ("text", "messageId", "within"),
            "TEXT_MESSAGE_END" => ("text", "messageId", "end"),
            "TOOL_CALL_START" => ("call", "toolCallId", "start"),
            "TOOL_CALL_ARGS" => ("call", "toolCallId", "within"),
            "TOOL_CALL_END" => ("call", "toolCallId", "end"),
            "STEP_STARTED" => ("step", "stepName", "start"),
            "STEP_FINISHED" => ("step", "stepName", "end"),
            "REASONING_START" => ("span", "messageId", "start"),
            "REASONING_END" => ("span", "messageId", "end"),
            "REASONING_MESSAGE_START" => ("reasoning", "messageId", "start"),
            "REASONING_MESSAGE_CONTENT" => ("reasoning", "messageId", "within"),
            "REASONING_MESSAGE_END" => ("reasoning", "messageId", "end"),
            other => panic!("no event of AG-UI's: {other}"),
        };
        let it = (what, text(field));
        match place {
            "start" => assert!(self.open.insert(it), "open already: {event}"),
            "end" => assert!(self.open.remove(&it), "not open: {event}"),
            _ => assert!(self.open.contains(&it) && !text("delta").is_empty(), "not open, or empty: {event}"),
        }
    }
}

fn frame(seq: Option<u64>, kind: &str, run: Option<&str>, data: Value) -> String {
    let mut frame = json!({
        "type": "event", "thread": "t", "kind": kind, "event": format!("e{}", seq.unwrap_or(0)), "from": "scout",
        "at": "2026-01-01T00:00:00.000Z", "data": data,
    });
    seq.into_iter().for_each(|seq| frame["seq"] = json!(seq));
    run.into_iter().for_each(|run| frame["run"] = json!(run));
    frame.to_string()
}

/// A thread's frames; deltas have no seq.
#[derive(Default)]
struct Thread {
    frames: Vec<(Option<u64>, String)>,
    head: u64,
    /// Of each frame, how often its message had been begun anew.
    restarts: Vec<u32>,
    /// Of each message, by its run and its name, how often it was.
    restarted: BTreeMap<(String, String), u32>,
}

impl Lookup for Thread {
    fn event(&self, seq: u64) -> Option<ThreadEvent> {
        let (_, frame) = self.frames.iter().find(|(it, _)| *it == Some(seq))?;
        Some(ThreadEvent { frame: frame.clone(), privileged: true })
    }

    fn restarts(&self, run: &str, message: &str) -> u32 {
        self.restarted.get(&(run.to_owned(), message.to_owned())).copied().unwrap_or(0)
    }
}

impl Thread {
    fn add(&mut self, kind: &str, run: Option<&str>, data: Value) {
        self.head += 1;
        self.frames.push((Some(self.head), frame(Some(self.head), kind, run, data)));
        self.restarts.push(0);
    }

    fn of(&mut self, kind: &str, data: Value) {
        self.add(kind, Some("r"), data);
    }

    fn delta(&mut self, run: &str, message: &str, from_char: usize, text: &str) {
        let data = json!({"message": message, "from_char": from_char, "text": text});
        self.frames.push((None, frame(None, AGENT_TOKEN, Some(run), data)));
        self.restarts.push(self.restarts(run, message));
    }

    fn restart(&mut self, run: &str, message: &str, text: &str) {
        *self.restarted.entry((run.to_owned(), message.to_owned())).or_default() += 1;
        let data = json!({"message": message, "from_char": 0, "text": text, "restart": true});
        self.frames.push((None, frame(None, AGENT_TOKEN, Some(run), data)));
        self.restarts.push(self.restarts(run, message));
    }

    /// What a reader gets that wants the events after `after` and reads them from after `cursor` on. Who joins, and who
    /// wants them again, gets the texts that are being written.
    fn read(&self, only: Option<&str>, cursor: u64, after: u64, resumes: bool) -> Vec<Value> {
        let silent_to = (cursor < after).then_some(after);
        let mut mapper = Mapper::new("t", only.map(str::to_owned), silent_to, resumes);
        let (mut verifier, mut events) = (Verifier::default(), Vec::new());
        let mut lines = Vec::new();
        let live = self.index_after(after);
        for (_, frame) in self.frames[self.index_after(cursor)..live].iter().filter(|(seq, _)| seq.is_some()) {
            assert_eq!(mapper.event(frame, 0, self, &mut lines), Next::Continue);
        }
        let join = |frames, mapper: &mut Mapper, lines: &mut Vec<String>| {
            for (restarts, delta) in self.texts(frames) {
                assert_eq!(mapper.event(&delta, restarts, self, lines), Next::Continue);
            }
        };
        join(live, &mut mapper, &mut lines);
        for i in live..self.frames.len() {
            match mapper.event(&self.frames[i].1, self.restarts[i], self, &mut lines) {
                Next::Continue | Next::Waiting { .. } => {}
                Next::Ended => break,
                Next::Rejoin => join(i + 1, &mut mapper, &mut lines),
            }
        }
        for line in lines {
            let event: Value = serde_json::from_str(&line).expect("JSON");
            verifier.check(&event);
            events.push(event);
        }
        events
    }

    /// The messages that are being written after so many frames, each as one delta.
    fn texts(&self, frames: usize) -> Vec<(u32, String)> {
        let mut open: BTreeMap<(String, String), (u32, String)> = BTreeMap::new();
        for ((seq, frame), restarts) in self.frames[..frames].iter().zip(&self.restarts) {
            let frame: Value = serde_json::from_str(frame).expect("JSON");
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let key = (text(&frame["run"]), text(&frame["data"]["message"]));
            if seq.is_none() {
                let (of, so_far) = open.entry(key).or_default();
                if of != restarts {
                    (*of, *so_far) = (*restarts, String::new());
                }
                so_far.push_str(&text(&frame["data"]["text"]));
            } else if frame["kind"] == AGENT_MESSAGE {
                open.remove(&key);
            }
        }
        let delta = |((run, message), (restarts, text)): (&(String, String), &(u32, String))| {
            let data = json!({"message": message, "from_char": 0, "text": text});
            (*restarts, frame(None, AGENT_TOKEN, Some(run), data))
        };
        open.iter().map(delta).collect()
    }

    /// The index of the first frame after this seq.
    fn index_after(&self, seq: u64) -> usize {
        self.frames.iter().position(|(s, _)| *s == Some(seq)).map_or(0, |i| i + 1)
    }
}

/// The events without what is the same in all of them.
fn short(events: &[Value]) -> Vec<String> {
    let field = |event: &Value, name: &str| event[name].as_str().unwrap_or("").to_owned();
    let of = |event: &Value| {
        let what = ["runId", "stepName", "messageId", "toolCallId", "delta", "content", "name", "code"];
        let got: Vec<String> = what.iter().map(|name| field(event, name)).filter(|it| !it.is_empty()).collect();
        format!("{} {}", field(event, "type"), got.join(" ")).trim().to_owned()
    };
    events.iter().map(of).collect()
}

#[test]
fn a_run_is_emitted_from_its_beginning_to_its_end() {
    let mut t = Thread::default();
    t.add("user_message", None, json!({"content": "Where?"}));
    t.of("agent_started", json!({"agent": "scout"}));
    t.of("agent_thinking", json!({"content": "hm"}));
    t.of("tool_executing", json!({"tool": "map", "call": "c", "arguments": {"near": [1]}}));
    t.of("tool_completed", json!({"call": "c", "result": ["Soup"]}));
    t.delta("r", "m", 0, "No");
    t.delta("r", "m", 1, "oodles");
    t.of("agent_message", json!({"message": "m", "content": "Noodles!"}));
    t.add("x.note", None, json!([1]));
    t.of("agent_completed", json!({"output": {"eat": true}, "usage": {"in": 3}}));
    let events = t.read(None, 0, 0, false);
    assert_eq!(
        short(&events),
        [
            "RUN_STARTED r",
            "TEXT_MESSAGE_START e1 scout",
            "TEXT_MESSAGE_CONTENT e1 Where?",
            "TEXT_MESSAGE_END e1",
            "STEP_STARTED thinking",
            "REASONING_START e3",
            "REASONING_MESSAGE_START e3",
            "REASONING_MESSAGE_CONTENT e3 hm",
            "REASONING_MESSAGE_END e3",
            "REASONING_END e3",
            "STEP_FINISHED thinking",
            "TOOL_CALL_START r/calls/c",
            "TOOL_CALL_ARGS r/calls/c {\"near\":[1]}",
            "TOOL_CALL_END r/calls/c",
            "TOOL_CALL_RESULT e5 r/calls/c [\"Soup\"]",
            "TEXT_MESSAGE_START r/m scout",
            "TEXT_MESSAGE_CONTENT r/m No",
            "TEXT_MESSAGE_CONTENT r/m odles",
            "TEXT_MESSAGE_CONTENT r/m !",
            "TEXT_MESSAGE_END r/m",
            "CUSTOM x.note",
            "RUN_FINISHED r",
        ]
    );
    assert_eq!(events[1]["role"], "user");
    assert_eq!(events[20]["value"]["data"], json!([1]));
    let last = &events[21];
    assert_eq!((&last["result"]["eat"], &last["metadata"]["usage"]["in"]), (&json!(true), &json!(3)), "{last}");
    assert_eq!(last["timestamp"], 1_767_225_600_000_u64);
}

#[test]
fn who_comes_in_the_middle_finds_the_run_and_its_calls_open() {
    let mut t = Thread::default();
    t.of("agent_started", json!({"agent": "scout"}));
    t.of("tool_executing", json!({"tool": "map", "call": "done"}));
    t.of("tool_completed", json!({"call": "done"}));
    t.of("tool_executing", json!({"tool": "map", "call": "c", "arguments": "{}"}));
    t.of("agent_thinking", json!({}));
    t.delta("r", "m", 0, "so far");
    t.of("tool_completed", json!({"call": "c", "error": "no map"}));
    t.of("agent_cancelled", json!({"reason": "enough"}));
    let begin = ["RUN_STARTED r", "STEP_STARTED thinking", "REASONING_START e5"];
    let calls = ["TOOL_CALL_START r/calls/c", "TOOL_CALL_ARGS r/calls/c {}", "TOOL_CALL_END r/calls/c"];
    let rest = [
        "REASONING_END e5",
        "STEP_FINISHED thinking",
        "TEXT_MESSAGE_START r/m scout",
        "TEXT_MESSAGE_CONTENT r/m so far",
        "TOOL_CALL_RESULT e6 r/calls/c no map",
        "TEXT_MESSAGE_END r/m",
        "RUN_FINISHED r",
    ];
    let events = t.read(None, 0, 5, false);
    assert_eq!(short(&events), [&begin[..], &calls, &rest].concat());
    assert_eq!(events[10]["metadata"]["error"], "no map");
    assert_eq!(events[12]["outcome"], json!({"type": "cancelled"}));
    assert_eq!(short(&t.read(Some("r"), 0, 5, true)), [&begin[..], &rest].concat(), "who comes back has the calls");
}

#[test]
fn a_question_ends_one_run_and_its_answer_begins_the_next() {
    let mut t = Thread::default();
    t.of("agent_started", json!({"agent": "scout"}));
    t.delta("r", "m", 0, "Shall");
    t.of("agent_waiting", json!({"reason": "approval", "prompt": "Sure?", "expires_at": "2026-01-02T00:00:00Z"}));
    t.add("user_message", None, json!({"content": [{"type": "text", "text": "wait"}, {"type": "image"}]}));
    t.of("agent_resumed", json!({"answer": "yes"}));
    t.delta("r", "m", 5, " I");
    t.of("agent_message", json!({"message": "m", "content": "Shall I?"}));
    t.of("agent_waiting", json!({"reason": "again"}));
    t.of("agent_failed", json!({"code": "broken", "message": "it broke"}));
    let events = t.read(None, 0, 0, false);
    assert_eq!(
        short(&events),
        [
            "RUN_STARTED r",
            "TEXT_MESSAGE_START r/m scout",
            "TEXT_MESSAGE_CONTENT r/m Shall",
            "TEXT_MESSAGE_END r/m",
            "RUN_FINISHED r",
            "RUN_STARTED r",
            "TEXT_MESSAGE_START e3 scout",
            "TEXT_MESSAGE_CONTENT e3 wait",
            "TEXT_MESSAGE_END e3",
            "TEXT_MESSAGE_START r/m scout",
            "TEXT_MESSAGE_CONTENT r/m  I",
            "TEXT_MESSAGE_CONTENT r/m ?",
            "TEXT_MESSAGE_END r/m",
            "RUN_FINISHED r",
            "RUN_STARTED r",
            "RUN_ERROR broken",
        ]
    );
    let outcome = &events[4]["outcome"];
    assert_eq!((&outcome["type"], outcome["interrupts"].as_array().map(Vec::len)), (&json!("interrupt"), Some(1)));
    let interrupt = &outcome["interrupts"][0];
    let got = ["id", "reason", "message", "expiresAt"].map(|field| interrupt[field].as_str().unwrap_or(""));
    assert_eq!(got, ["e2", "approval", "Sure?", "2026-01-02T00:00:00Z"]);
    assert_eq!(events[5]["metadata"]["answer"], "yes");
    assert_eq!(events[6]["metadata"]["content"][1]["type"], "image");
    let mut mapper = Mapper::new("t", None, None, false);
    assert!(mapper.error(&Error::no_thread()).is_some() && mapper.error(&Error::no_thread()).is_none());
}

#[test]
fn an_agents_own_last_word_is_a_message_that_replaces_the_other() {
    let mut t = Thread::default();
    t.of("agent_started", json!({"agent": "scout"}));
    t.delta("r", "m", 0, "draft");
    t.add("agent_message", None, json!({"message": "m", "content": "final", "revised": true}));
    t.of("agent_message", json!({"message": "n", "content": "whole"}));
    let events = t.read(None, 0, 0, false);
    let got = short(&events);
    assert_eq!(
        got[2..6],
        [
            "TEXT_MESSAGE_CONTENT r/m draft",
            "TEXT_MESSAGE_END r/m",
            "TEXT_MESSAGE_START e2 scout",
            "TEXT_MESSAGE_CONTENT e2 final"
        ]
    );
    assert_eq!(events[4]["metadata"], json!({"replaces": "r/m"}));
    assert_eq!(got[7..], ["TEXT_MESSAGE_START r/n scout", "TEXT_MESSAGE_CONTENT r/n whole", "TEXT_MESSAGE_END r/n"]);
}

#[test]
fn a_message_that_is_begun_anew_goes_on_as_another_that_replaces_it() {
    let mut t = Thread::default();
    t.of("agent_started", json!({"agent": "scout"}));
    t.delta("r", "m", 0, "The cat");
    t.restart("r", "m", "The");
    t.delta("r", "m", 3, " dog");
    t.of("x.note", json!({}));
    t.restart("r", "m", "");
    t.delta("r", "m", 0, "A cow");
    t.of("agent_message", json!({"message": "m", "content": "A cow"}));
    let events = t.read(None, 0, 0, false);
    let got = [
        "RUN_STARTED r",
        "TEXT_MESSAGE_START r/m scout",
        "TEXT_MESSAGE_CONTENT r/m The cat",
        "TEXT_MESSAGE_END r/m",
        "TEXT_MESSAGE_START r/m/1 scout",
        "TEXT_MESSAGE_CONTENT r/m/1 The",
        "TEXT_MESSAGE_CONTENT r/m/1  dog",
        "CUSTOM x.note",
        "TEXT_MESSAGE_END r/m/1",
        "TEXT_MESSAGE_START r/m/2 scout",
        "TEXT_MESSAGE_CONTENT r/m/2 A cow",
        "TEXT_MESSAGE_END r/m/2",
    ];
    assert_eq!(short(&events), got);
    let replaced: Vec<_> = [1, 4, 9].map(|i| events[i]["metadata"]["replaces"].as_str()).into();
    assert_eq!(replaced, [None, Some("r/m"), Some("r/m/1")]);

    // Who comes in the middle gets it under the id that it has by then, and so does who comes after its end.
    let middle = t.read(None, 0, 2, true);
    let ids: Vec<_> = ["RUN_STARTED r", "TEXT_MESSAGE_START r/m/1 scout", "TEXT_MESSAGE_CONTENT r/m/1 The dog"].into();
    assert_eq!(short(&middle)[..3], ids);
    assert_eq!(middle[1]["metadata"], json!({"replaces": "r/m"}));
    let mut mapper = Mapper::new("t", None, None, false);
    let mut lines = Vec::new();
    // What was written in between was not seen: the event that closes it has the text, under an id of its own.
    for i in [0, 1, 7] {
        assert_eq!(mapper.event(&t.frames[i].1, t.restarts[i], &t, &mut lines), Next::Continue);
    }
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let end = ["TEXT_MESSAGE_END r/m", "TEXT_MESSAGE_START e3 scout", "TEXT_MESSAGE_CONTENT e3 A cow"];
    assert_eq!(short(&lines)[3..6], end);
    assert_eq!(lines[4]["metadata"], json!({"replaces": "r/m"}));
    let mut lines = Vec::new();
    let mut mapper = Mapper::new("t", None, None, false);
    for i in [0, 7] {
        assert_eq!(mapper.event(&t.frames[i].1, t.restarts[i], &t, &mut lines), Next::Continue);
    }
    let lines: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(short(&lines)[1..3], ["TEXT_MESSAGE_START r/m/2 scout", "TEXT_MESSAGE_CONTENT r/m/2 A cow"]);
    assert_eq!(lines[1]["metadata"], json!({"replaces": "r/m/1"}));
}

#[test]
fn of_runs_that_interleave_the_oldest_is_emitted_and_the_next_where_it_ends() {
    let mut t = Thread::default();
    t.add("agent_started", Some("a"), json!({"agent": "x"}));
    t.add("agent_started", Some("b"), json!({"agent": "y", "parent_run": "a"}));
    t.add("tool_executing", Some("b"), json!({"tool": "map", "call": "c"}));
    t.add("x.mine", Some("b"), json!({}));
    t.add("agent_waiting", Some("a"), json!({"reason": "ask"}));
    t.add("tool_completed", Some("b"), json!({"call": "c", "result": "ok"}));
    t.add("agent_resumed", Some("a"), json!({}));
    t.add("agent_completed", Some("b"), json!({"output": null}));
    t.add("agent_completed", Some("a"), json!({}));
    let whole = t.read(None, 0, 0, false);
    let got = [
        "RUN_STARTED a",
        "RUN_FINISHED a",
        "RUN_STARTED b",
        "TOOL_CALL_START b/calls/c",
        "TOOL_CALL_END b/calls/c",
        "TOOL_CALL_RESULT e6 b/calls/c ok",
        "RUN_FINISHED b",
        "RUN_STARTED a",
        "RUN_FINISHED a",
    ];
    assert_eq!(short(&whole), got);
    assert_eq!((&whole[2]["parentRunId"], whole[6].get("result")), (&json!("a"), None));
    let only = ["RUN_STARTED b", "TOOL_CALL_START b/calls/c", "TOOL_CALL_END b/calls/c", "CUSTOM x.mine"];
    assert_eq!(short(&t.read(Some("b"), 0, 0, false)), [&only[..], &got[5..7]].concat());
}

/// Kinds of events that runs have, and some that are of no run.
const KINDS: [&str; 13] = [
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "agent_message",
    "agent_waiting",
    "agent_resumed",
    "agent_completed",
    "agent_failed",
    "agent_cancelled",
    "x.own",
    "user_message",
    AGENT_TOKEN,
];

/// A thread as its runs allow it: acts that the projector would refuse are left out.
fn thread(acts: &[(usize, usize, usize)]) -> Thread {
    let mut t = Thread::default();
    let names = ["a", "b", "c"];
    // Whether each run was begun, is open, and waits; its calls; its messages by their characters.
    let mut runs: Vec<(bool, bool, bool)> = vec![Default::default(); 3];
    let mut calls = [(0, BTreeSet::new()), (0, BTreeSet::new()), (0, BTreeSet::new())];
    let mut messages: [BTreeMap<usize, Option<usize>>; 3] = Default::default();
    for &(run, kind, n) in acts {
        let (name, kind) = (names[run], KINDS[kind]);
        let (begun, open, waits) = &mut runs[run];
        let ending = matches!(kind, "agent_completed" | "agent_failed" | "agent_cancelled");
        let fits = match kind {
            "user_message" => true,
            "agent_started" => !*begun,
            "agent_waiting" => *open && !*waits,
            "agent_resumed" => *waits,
            _ => *open,
        };
        if !fits {
            continue;
        }
        let close = |t: &mut Thread, n: usize, chars: usize, revised: bool| {
            let mut data = json!({"message": format!("m{n}"), "content": "ü".repeat(chars)});
            if revised {
                data["revised"] = json!(true);
            }
            t.add("agent_message", Some(name), data);
        };
        if ending {
            let open = messages[run].iter_mut().filter_map(|(n, chars)| Some((*n, chars.take()?)));
            open.for_each(|(n, chars)| close(&mut t, n, chars, false));
            runs[run] = (true, false, false);
        }
        match kind {
            "agent_started" => runs[run] = (true, true, false),
            "agent_waiting" => runs[run].2 = true,
            "agent_resumed" => runs[run].2 = false,
            _ => {}
        }
        match kind {
            AGENT_TOKEN => {
                let chars = messages[run].entry(n).or_insert(Some(0));
                let Some(chars) = chars else { continue };
                if n == 3 && *chars > 0 {
                    t.restart(name, "m3", "ü");
                    *chars = 1;
                    continue;
                }
                t.delta(name, &format!("m{n}"), *chars, &"ü".repeat(n));
                *chars += n;
            }
            "agent_message" => match messages[run].get_mut(&n).and_then(Option::take) {
                Some(chars) => close(&mut t, n, chars, n == 2),
                None => t.add(kind, Some(name), json!({"content": "whole"})),
            },
            "tool_executing" => {
                let (next, executing) = &mut calls[run];
                executing.insert(*next);
                t.add(kind, Some(name), json!({"tool": "map", "call": format!("c{next}"), "arguments": n}));
                *next += 1;
            }
            "tool_completed" => {
                if let Some(call) = calls[run].1.pop_first() {
                    t.add(kind, Some(name), json!({"call": format!("c{call}"), "result": null}));
                }
            }
            "user_message" => t.add(kind, None, json!({"content": "hello"})),
            _ => t.add(kind, Some(name), json!({"reason": "because", "code": "x", "message": "y", "agent": "z"})),
        }
    }
    t
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_runs_interleave_and_wherever_it_begins_a_stream_is_well_formed(
        acts in proptest::collection::vec((0..3_usize, 0..KINDS.len(), 0..4_usize), 0..60),
        place in 0..60_u64,
        only in 0..4_usize,
        resumes: bool,
    ) {
        let t = thread(&acts);
        let only = ["a", "b", "c"].get(only).copied();
        let runs = |events: Vec<Value>| {
            let is_one = |it: &&Value| it["type"].as_str().is_some_and(|it| it.starts_with("RUN"));
            short(&events.iter().filter(is_one).cloned().collect::<Vec<_>>())
        };
        // Well-formed was seen on the way; and which runs are emitted does not depend on where the reading began.
        let whole = runs(t.read(only, 0, 0, false));
        let got = runs(t.read(only, 0, place.min(t.head), resumes));
        prop_assert!(whole.ends_with(&got), "{got:?} of {whole:?}");
        // A client appends what it gets: no text and no arguments come twice.
        let mut folded: BTreeMap<String, String> = BTreeMap::new();
        for event in t.read(only, 0, 0, false) {
            let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
            if text("type").ends_with("_CONTENT") || text("type") == "TOOL_CALL_ARGS" {
                folded.entry(text("messageId") + &text("toolCallId")).or_default().push_str(&text("delta"));
            }
        }
        for (_, frame) in &t.frames {
            let frame: Value = serde_json::from_str(frame).expect("JSON");
            let (run, data) = (frame["run"].as_str().unwrap_or_default(), &frame["data"]);
            let (named, called) = (data["message"].as_str(), data["call"].as_str());
            if let Some(got) = named.and_then(|named| folded.get(&text_id(run, named, t.restarts(run, named)))) && frame["kind"] == AGENT_MESSAGE {
                prop_assert!(data["content"].as_str().is_some_and(|whole| whole.starts_with(got)), "{got} of {data}");
            }
            if let Some(got) = called.and_then(|call| folded.get(&format!("{run}/calls/{call}"))) && frame["kind"] == "tool_executing" {
                prop_assert_eq!(got, &data["arguments"].to_string());
            }
        }
    }
}
