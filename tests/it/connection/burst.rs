//! Bursts of commands: whatever can be read or written is, without waiting for a timer.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::on_both_logs;
use crate::support::{Server, Socket, has};

/// What only a hang exceeds. The server's next timer, its heartbeat, would come after 25 s.
const PROMPTLY: Duration = Duration::from_secs(10);

/// Sends frames, and gives the answers in the order in which they come. Fails if the server had to be woken by its
/// heartbeat.
async fn answers(socket: &mut Socket, frames: &[Value], count: usize) -> Vec<Value> {
    let (mut sink, mut stream) = (&mut socket.ws).split();
    let send = async {
        for frame in frames {
            sink.send(Message::text(frame.to_string())).await.unwrap();
        }
    };
    let receive = async {
        let mut answers = Vec::with_capacity(count);
        while answers.len() < count {
            match stream.next().await.unwrap().unwrap() {
                Message::Text(text) => answers.push(serde_json::from_str(&text).unwrap()),
                other => panic!("{other:?} after {} of {count} answers", answers.len()),
            }
        }
        answers
    };
    let both = async { tokio::join!(send, receive).1 };
    tokio::time::timeout(PROMPTLY, both).await.expect("all answers, without a heartbeat")
}

/// Frames of so many commands each, with ids from 1 on.
fn frames(frames: i64, each: i64, command: impl Fn(i64) -> Value) -> Vec<Value> {
    (0..frames).map(|frame| (frame * each + 1..=(frame + 1) * each).map(&command).collect()).collect()
}

fn assert_in_order(answers: &[Value], kind: &str) {
    for (answer, id) in answers.iter().zip(1..) {
        has(answer, json!({"type": kind, "id": id}));
    }
}

on_both_logs!(bursts_of_pings_are_answered_at_once_and_in_order, |log| async move {
    let server = Server::start_unlimited(log);
    for (count, each) in [(40, 100), (5, 1_000), (200, 30)] {
        let mut socket = server.connect("ada").await;
        let pings = frames(count, each, |id| json!({"type": "ping", "id": id}));
        assert_in_order(&answers(&mut socket, &pings, (count * each) as usize).await, "pong");
        // And the session goes on.
        socket.silent().await;
    }
});

on_both_logs!(a_burst_of_commands_that_are_refused_is_answered_at_once_and_in_order, |log| async move {
    let server = Server::start_unlimited(log);
    let mut socket = server.connect("ada").await;
    let subscribes = frames(5, 1_000, |id| json!({"type": "subscribe", "id": id, "thread": format!("none-{id}")}));
    assert_in_order(&answers(&mut socket, &subscribes, 5_000).await, "error");
    socket.silent().await;
});

on_both_logs!(commands_sent_while_a_burst_is_answered_do_not_wait_for_a_heartbeat, |log| async move {
    let server = Server::start_unlimited(log);
    let mut socket = server.connect("ada").await;
    socket.say("t", "so that the thread is there").await;
    // Each publish holds up the commands after it, but the pings, until it is in the log.
    let mixed = frames(20, 300, |id| match id % 100 {
        1 => json!({"type": "publish", "id": id, "thread": "t", "kind": "x.burst", "data": id}),
        n if n % 2 == 0 => json!({"type": "unsubscribe", "id": id, "thread": "none"}),
        _ => json!({"type": "ping", "id": id}),
    });
    let answers = answers(&mut socket, &mixed, 6_000).await;
    let ordered = |kind: &str| -> Vec<i64> {
        answers.iter().filter(|it| it["type"] == kind).map(|it| it["id"].as_i64().unwrap()).collect()
    };
    let of = |is: fn(i64) -> bool| (1..=6_000).filter(|id| is(id % 100)).collect::<Vec<i64>>();
    assert_eq!(ordered("published"), of(|n| n == 1));
    assert_eq!(ordered("error"), of(|n| n % 2 == 0));
    assert_eq!(ordered("pong"), of(|n| n != 1 && n % 2 == 1));
    socket.silent().await;
});

on_both_logs!(a_client_that_reads_only_later_gets_every_answer, |log| async move {
    let server = Server::start_unlimited(log);
    let mut socket = server.connect("ada").await;
    // More answers than the server holds for a socket; a refusal repeats the long name of the command.
    let commands = frames(30, 100, |id| json!({"type": "n".repeat(40), "id": id}));
    for frame in &commands {
        socket.send(frame).await;
    }
    assert_in_order(&answers(&mut socket, &[], 3_000).await, "error");
    socket.silent().await;
});
