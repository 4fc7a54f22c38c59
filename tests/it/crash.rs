//! Kills under load: what was answered is there, once and in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::on_both_logs;
use crate::support::{Server, Socket, publish, token};

const KILLS: usize = 20;
const WRITERS: usize = 3;

/// What a writer was answered: key → seq.
type Answers = BTreeMap<String, u64>;

on_both_logs!(after_twenty_kills_under_load_every_answered_event_is_there_once_and_in_order, |log| async move {
    let mut server = Server::start_unlimited(log);
    server.connect("ada").await.say("t", "begin").await;
    let mut random = 7u64;
    let mut answers: Vec<Arc<Mutex<Answers>>> = (0..WRITERS).map(|_| Arc::default()).collect();
    for round in 0..KILLS {
        let answered = Arc::new(tokio::sync::Semaphore::new(0));
        let writers: Vec<_> = answers
            .iter()
            .enumerate()
            .map(|(n, answers)| {
                tokio::spawn(write_until_lost(server.url.clone(), n, round, answers.clone(), answered.clone()))
            })
            .collect();
        // The kill comes at a random moment of the load, measured in answers.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let after = (random >> 33) as u32 % 2_000;
        drop(
            tokio::time::timeout(Duration::from_secs(20), answered.acquire_many(after))
                .await
                .expect("the load goes on"),
        );
        server.kill();
        for writer in writers {
            writer.await.unwrap();
        }
        server.up();
    }
    server.ready().await;
    let mut reader = server.connect("ada").await;
    let head = reader.subscribe("t", Some(0)).await["head"].as_u64().unwrap();
    let mut seqs_by_key = BTreeMap::new();
    for (n, event) in reader.events(head as usize).await.iter().enumerate() {
        assert_eq!(event["seq"], n as u64 + 1, "dense and in order");
        if let Some(key) = event["key"].as_str() {
            assert_eq!(seqs_by_key.insert(key.to_owned(), event["seq"].as_u64().unwrap()), None, "once");
        }
    }
    let mut answered = 0;
    for answers in &mut answers {
        for (key, seq) in answers.lock().await.iter() {
            assert_eq!(seqs_by_key.get(key), Some(seq), "{key} was answered");
            answered += 1;
        }
    }
    assert!(answered > KILLS, "the load was real: {answered} answers");
});

/// Publishes with a window until the connection is lost, and notes each answer.
async fn write_until_lost(
    url: String,
    writer: usize,
    round: usize,
    answers: Arc<Mutex<Answers>>,
    answered: Arc<tokio::sync::Semaphore>,
) {
    let Ok(mut socket) = Socket::raw(&url, &[("Authorization", &format!("Bearer {}", token("ada", "")))]).await else {
        return;
    };
    let mut n = 0u64;
    loop {
        let batch: Vec<Value> = (0..32)
            .map(|i| {
                let mut command = publish("t", "x.load", json!({"n": n + i}));
                command["id"] = json!(n + i);
                command["key"] = json!(format!("{writer}-{round}-{}", n + i));
                command
            })
            .collect();
        n += 32;
        use futures_util::SinkExt;
        if socket.ws.send(tokio_tungstenite::tungstenite::Message::text(Value::Array(batch).to_string())).await.is_err()
        {
            return;
        }
        let mut open = 32;
        while open > 0 {
            let Ok(frame) = socket.next().await else { return };
            if frame["type"] == "published" {
                let key = format!("{writer}-{round}-{}", frame["id"]);
                answers.lock().await.insert(key, frame["seq"].as_u64().unwrap());
                answered.add_permits(1);
                open -= 1;
            } else {
                assert_eq!(frame["type"], "welcome", "{frame}");
            }
        }
    }
}
