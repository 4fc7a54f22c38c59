//! Records that the projector panics at. No data leads to a panic, so these tests make the projections impossible: a thread
//! whose newest seq is the last one that there is, so that the next one cannot be counted.

use serde_json::{Value, json};
use weft::store::Store;

use super::dead_letters::{get, list, rebuilt, root_of};
use crate::support::{LogKind, Server, TENANT, eventually, has, publish, refused_with};

/// Makes a thread of a stopped server one whose next event the projector panics at.
fn poison(server: &Server, thread: &str) {
    let store = Store::open(&server.data().join("projections")).unwrap();
    let mut row = store.thread(TENANT, thread).unwrap().unwrap();
    row.head = u64::MAX;
    let mut batch = store.batch();
    batch.put_thread(TENANT, thread, &row);
    store.commit(batch).unwrap();
    store.flush().unwrap();
}

/// Publishes to the threads in turn, all in one frame, so that they are projected in few batches; gives the answers in order.
async fn publish_in_turn(server: &Server, threads: &[&str], rounds: usize) -> Vec<Value> {
    let mut ada = server.connect("ada").await;
    let commands = (0..rounds * threads.len()).map(|n| {
        let mut command = publish(threads[n % threads.len()], "x.n", json!(n));
        command["id"] = json!(n);
        command
    });
    ada.send(&Value::Array(commands.collect())).await;
    let mut answers = Vec::new();
    while answers.len() < rounds * threads.len() {
        let answer = ada.recv().await;
        if answer["id"].is_u64() {
            answers.push(answer);
        }
    }
    answers.sort_by_key(|answer| answer["id"].as_u64());
    answers
}

#[tokio::test]
async fn a_record_that_the_projector_panics_at_is_a_dead_letter_and_stops_no_other_also_in_its_batch() {
    let mut server = Server::start(LogKind::embedded());
    for thread in ["poison", "a", "b"] {
        server.connect("ada").await.say(thread, "before").await;
    }
    server.stop().await;
    poison(&server, "poison");
    server.up();
    server.ready().await;

    let answers = publish_in_turn(&server, &["a", "poison", "b"], 10).await;
    for (n, answer) in answers.iter().enumerate() {
        match n % 3 {
            1 => refused_with(answer, "internal"),
            _ => assert_eq!(answer["seq"], 2 + n as u64 / 3, "{answer}"),
        }
    }
    let root = root_of("acme");
    let letters = list(&server, &root, "?reason=unreadable").await;
    assert_eq!(letters.len(), 10);
    for letter in &letters {
        has(letter, json!({"thread": "poison", "topic": "events"}));
        assert!(letter["error"].as_str().unwrap().starts_with("the projector failed at this record: "), "{letter}");
        assert_eq!(letter["fingerprint"], letters[0]["fingerprint"], "they are alike");
    }
    assert_eq!(server.metric("weft_poisoned_records_total").await, 10.0);
    assert!(server.metric("weft_panics_total").await >= 10.0);
    assert_eq!(get(&server, &root, "/counts").await.1["total"], 10);

    // A start reads on after them.
    server.stop().await;
    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("a", "and on it goes").await, 12);
    assert_eq!(list(&server, &root, "?reason=unreadable").await, letters);

    // What was wrong was the projections. Made anew, they have all events, and no dead letters.
    server.stop().await;
    std::fs::remove_dir_all(server.data().join("projections")).unwrap();
    server.up();
    server.ready().await;
    assert_eq!(list(&server, &root, "").await, Vec::<Value>::new());
    assert_eq!(server.connect("ada").await.say("poison", "all of it").await, 12);
    rebuilt(&mut server).await;
}

#[tokio::test]
async fn a_node_that_panics_at_a_record_at_which_others_do_not_differs_from_them_and_one_of_them_stops() {
    let kind = LogKind::kafka();
    let mut nodes = [Server::start(kind.clone()), Server::start(kind)];
    nodes[0].connect("ada").await.say("t", "before").await;
    eventually("both have it", async || nodes[1].http("GET", "/v1/threads/t", "ada", None).await.0 == 200).await;
    nodes[1].stop().await;
    poison(&nodes[1], "t");
    nodes[1].up();
    nodes[1].ready().await;
    let answers = publish_in_turn(&nodes[0], &["t"], 600).await;
    assert!(answers.iter().all(|answer| answer["type"] == "published"), "the other node has them");

    let stopped = async |node: &Server| {
        let (status, ready) = node.http("GET", "/readyz", "x", None).await;
        let why = ready["projector"]["error"].as_str().unwrap_or_default();
        status == 503 && why.contains("made different things")
    };
    eventually("one has stopped", async || stopped(&nodes[0]).await || stopped(&nodes[1]).await).await;
}
