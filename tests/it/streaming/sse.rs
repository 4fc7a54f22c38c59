//! A thread as Server-Sent Events.

use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};

use crate::on_both_logs;
use crate::support::sse::EventStream;
use crate::support::{LogKind, SECRET, Server, claims, eventually, has, publish, token, token_of};

/// Opens ada's stream of `t`, with what the client has seen last.
async fn resumed(server: &Server, query: &str, last: u64) -> EventStream {
    let path = format!("/v1/threads/t/stream{query}");
    let last = last.to_string();
    EventStream::open(server, &path, &token("ada", ""), &[("Last-Event-ID", &last)]).await.ok().unwrap()
}

on_both_logs!(a_stream_gives_a_threads_events_as_history_has_them_and_goes_on_live, |log| async move {
    let server = Server::start(log);
    let mut ada = server.connect("ada").await;
    for n in 1..=3 {
        assert_eq!(ada.say("t", &format!("line {n}\n\nid: 77\n")).await, n);
    }
    let mut stream = EventStream::of(&server, "t", "ada", "?after=0").await;
    let headers = stream.reply.headers();
    assert_eq!(
        (&headers["content-type"], &headers["x-accel-buffering"]),
        (&"text/event-stream".parse().unwrap(), &"no".parse().unwrap())
    );
    let mut blocks = Vec::new();
    for _ in 0..3 {
        blocks.push(stream.next().await.unwrap());
    }
    let mut keyed = publish("t", "x.live", json!({"n": [1, "ü", null]}));
    keyed["key"] = json!("k");
    assert_eq!(ada.ask(keyed).await["seq"], 4);
    blocks.push(stream.next().await.unwrap());
    let page = server.http("GET", "/v1/threads/t/events", "ada", None).await.1;
    let stored = page["events"].as_array().unwrap();
    assert_eq!(stored.len(), blocks.len(), "{page}");
    for (block, stored) in blocks.iter().zip(stored) {
        assert_eq!(&block.json(), stored);
        assert_eq!((&block.id, &block.event), (&Some(stored["seq"].to_string()), &None), "{block:?}");
    }
    assert_eq!(EventStream::of(&server, "t", "ada", "?after=2").await.seqs(2).await, [3, 4]);
    let mut from_the_head = EventStream::of(&server, "t", "ada", "").await;
    assert_eq!(ada.say("t", "only this").await, 5);
    assert_eq!(from_the_head.seqs(1).await, [5]);
    assert_eq!(stream.seqs(1).await, [5]);
    eventually("the one that was left is gone", async || server.metric("weft_streams").await == 2.0).await;
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_resumed_after_its_last_id_misses_nothing_and_repeats_nothing_while_others_publish() {
    const EVENTS: u64 = 3_000;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    assert_eq!(writer.say("t", "1").await, 1);
    let writing = tokio::spawn(async move {
        for n in 2..=EVENTS {
            assert_eq!(writer.say("t", &n.to_string()).await, n);
        }
    });
    let (mut last, mut turn) = (0, 0);
    while last < EVENTS {
        // The last id wins over where the stream began at first.
        let mut stream = resumed(&server, "?after=0", last).await;
        turn = (turn * 5 + 7) % 1_009;
        let some = (turn % 83 + 1).min(EVENTS - last);
        assert_eq!(stream.seqs(some as usize).await, (last + 1..=last + some).collect::<Vec<_>>());
        last += some;
    }
    writing.await.unwrap();
    // An empty one is none.
    let path = "/v1/threads/t/stream?after=2998";
    let mut stream = EventStream::open(&server, path, &token("ada", ""), &[("Last-Event-ID", "")]).await.ok().unwrap();
    assert_eq!(stream.seqs(2).await, [EVENTS - 1, EVENTS]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_not_read_costs_its_bound_and_gets_all_in_the_end() {
    const EVENTS: u64 = 400;
    let server = Server::start_unlimited(LogKind::embedded());
    let mut writer = server.connect("ada").await;
    let large = publish("t", "x.large", json!("x".repeat(60_000)));
    assert_eq!(writer.ask(large.clone()).await["seq"], 1);
    let mut slow = EventStream::of(&server, "t", "ada", "?after=0").await;
    for seq in 2..=EVENTS {
        assert_eq!(writer.ask(large.clone()).await["seq"], seq);
        if seq % 50 == 0 {
            let waiting = server.metric("weft_outbox_bytes").await;
            assert!(waiting <= weft::delivery::outbox::EVENT_BYTES as f64, "{waiting}");
        }
    }
    assert!(server.metric("weft_lagged_total").await >= 1.0, "24 MB are more than all buffers hold");
    assert_eq!(slow.seqs(EVENTS as usize).await, (1..=EVENTS).collect::<Vec<_>>());
    assert_eq!(writer.say("t", "live again").await, EVENTS + 1);
    assert_eq!(slow.seqs(1).await, [EVENTS + 1]);
}

#[tokio::test]
async fn a_silent_stream_gets_a_comment_within_fifteen_seconds() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    let begin = std::time::Instant::now();
    let mut stream = EventStream::of(&server, "t", "ada", "").await;
    for beats in 1..=2 {
        let block = stream.block().await.unwrap();
        assert!(block.comment.is_some() && block.id.is_none() && block.data.is_empty(), "{block:?}");
        let elapsed = begin.elapsed().as_secs_f64();
        assert!((14.0 * f64::from(beats)..16.0 * f64::from(beats) + 10.0).contains(&elapsed), "{elapsed} s");
    }
}

#[tokio::test]
async fn what_cannot_be_streamed_is_refused_as_a_problem_before_anything_is_sent() {
    let server = Server::start(LogKind::embedded());
    server.connect("ada").await.say("t", "hello").await;
    let refused = async |path: &str, token: &str, headers: &[(&str, &str)]| {
        let (status, problem) = EventStream::open(&server, path, token, headers).await.err().unwrap();
        let of = |field: &str| problem[field].as_str().unwrap_or("").to_owned();
        (status, of("code"), of("field"))
    };
    let is = |status: u16, code: &str, field: &str| (status, code.to_owned(), field.to_owned());
    let (ada, stream) = (&token("ada", ""), "/v1/threads/t/stream");
    assert_eq!(refused(&format!("{stream}?after=2"), ada, &[]).await, is(400, "cursor_invalid", "after"));
    assert_eq!(refused(stream, ada, &[("Last-Event-ID", "2")]).await, is(400, "cursor_invalid", "Last-Event-ID"));
    for last in ["x", "-1", "1.5"] {
        assert_eq!(refused(stream, ada, &[("Last-Event-ID", last)]).await, is(400, "bad_request", "Last-Event-ID"));
    }
    assert_eq!(refused(&format!("{stream}?after=x"), ada, &[]).await, is(400, "bad_request", "after"));
    assert_eq!(refused(&format!("{stream}?colour=red"), ada, &[]).await, is(400, "bad_request", "colour"));
    assert_eq!(refused("/v1/threads/a%20b/stream", ada, &[]).await, is(400, "bad_request", "thread"));
    assert_eq!(refused("/v1/threads/nowhere/stream", ada, &[]).await, is(404, "not_found", "thread"));
    assert_eq!(refused(stream, &token("eve", ""), &[]).await, is(404, "not_found", "thread"), "a stranger");
    assert_eq!(refused("/v1/threads/@user:ben/stream", ada, &[]).await, is(404, "not_found", "thread"));
    assert_eq!(refused(stream, &token_of("umbrella", "ada"), &[]).await, is(404, "not_found", "thread"));
    assert_eq!(refused(stream, &token("ada", "publish"), &[]).await, is(403, "forbidden", ""));
    assert_eq!(refused(stream, "nonsense", &[]).await.0, 401);
    assert_eq!(server.metric("weft_streams").await, 0.0);
}

#[tokio::test]
async fn who_is_removed_gets_nothing_more_and_is_told_by_an_event_named_error() {
    let server = Server::start(LogKind::embedded());
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": ["ben"]}))).await.0, 201);
    let mut ada = server.connect("ada").await;
    let mut bens = EventStream::of(&server, "t", "ben", "?after=0").await;
    assert_eq!(bens.seqs(1).await, [1]);
    assert_eq!(server.http("DELETE", "/v1/threads/t/members/ben", "ada", None).await.0, 200);
    ada.say("t", "without ben").await;
    let last = bens.next().await.unwrap();
    assert_eq!((last.event.as_deref(), last.id.as_deref()), (Some("error"), None));
    let problem = last.json();
    has(&problem, json!({"code": "not_found", "status": 404}));
    assert_eq!(bens.next().await, None, "and then it is over");
    assert_eq!(EventStream::open(&server, "/v1/threads/t/stream", &token("ben", ""), &[]).await.err().unwrap().0, 404);
}

#[tokio::test]
async fn a_stream_ends_with_its_token() {
    let server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    ada.say("t", "hello").await;
    // Expired, and within the leeway for three seconds more.
    let dying = mint(SECRET, &Claims { exp: weft::clock::now_s() - 27, ..claims("ada", "") }).unwrap();
    let mut stream = EventStream::open(&server, "/v1/threads/t/stream?after=0", &dying, &[]).await.ok().unwrap();
    assert_eq!(stream.seqs(1).await, [1]);
    let last = stream.next().await.unwrap();
    assert_eq!((last.event.as_deref(), &last.json()["code"]), (Some("error"), &json!("unauthenticated")));
    assert_eq!(stream.next().await, None);
}

#[tokio::test]
async fn a_drained_stream_is_told_when_to_come_back_and_resumes_then() {
    let mut server = Server::start(LogKind::embedded());
    let mut ada = server.connect("ada").await;
    assert_eq!(ada.say("t", "before").await, 1);
    let mut streams = Vec::new();
    for _ in 0..5 {
        let mut stream = EventStream::of(&server, "t", "ada", "?after=0").await;
        assert_eq!(stream.seqs(1).await, [1]);
        streams.push(stream);
    }
    server.signal("TERM");
    let mut waits = std::collections::BTreeSet::new();
    for stream in &mut streams {
        let last = stream.next().await.unwrap();
        waits.insert(last.retry.unwrap_or_else(|| panic!("no time in {last:?}")));
        assert_eq!((&last.data, stream.next().await), (&String::new(), None), "{last:?}");
    }
    assert_eq!(waits.len(), 5, "each at its own time: {waits:?}");
    assert!(waits.iter().all(|wait| (1..=60_000).contains(wait)), "{waits:?}");
    assert!(server.ended().await.success());
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "after").await, 2);
    assert_eq!(resumed(&server, "", 1).await.seqs(1).await, [2]);
}

#[tokio::test]
async fn the_own_inbox_is_streamed_by_the_name_that_its_user_calls_it() {
    let server = Server::start(LogKind::embedded());
    let mut stream = EventStream::of(&server, "@me", "ada", "?after=0").await;
    let mut agent = server.connect_as("bot", "agent publish").await;
    assert_eq!(agent.ask(publish("@user:ada", "x.note", json!("for ada"))).await["seq"], 1);
    let block = stream.next().await.unwrap();
    let event: Value = block.json();
    assert_eq!((&event["thread"], &event["data"], block.id.as_deref()), (&json!("@me"), &json!("for ada"), Some("1")));
}
