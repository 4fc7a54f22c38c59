//! Disks that fail for a while: what was answered is there, what was not is not claimed, and the log goes on by itself.

use serde_json::{Value, json};

use super::{UNLIMITED, doctor, numbers, publish_numbers};
use crate::support::faults::Faults;
use crate::support::{Server, eventually, publish};

async fn is_ready(server: &Server) -> bool {
    server.http("GET", "/readyz", "x", None).await.0 == 200
}

/// Publishes one event, and gives the answer.
async fn attempt(server: &Server, n: u64) -> Value {
    server.connect("ada").await.ask(publish("t", "x.load", json!({"n": n}))).await
}

/// The log fails, says so, and after the end of the fault takes events again without a restart.
async fn goes_on_after(fault: &str) {
    let (mut server, faults) = Faults::server(UNLIMITED);
    publish_numbers(&mut server.connect("ada").await, "t", 0..200).await;
    faults.begin(fault);
    let refused = attempt(&server, 777).await;
    // What was on its way to the disk at that moment may be there or not.
    assert!(refused["code"] == "unavailable" || refused["outcome"] == "unknown", "{refused}");
    eventually("readyz tells", async || !is_ready(&server).await).await;
    let (_, ready) = server.http("GET", "/readyz", "x", None).await;
    assert!(ready["log"]["error"].as_str().unwrap().contains("tried again"), "{ready}");
    faults.end(fault);
    eventually("the log goes on by itself", async || is_ready(&server).await).await;
    publish_numbers(&mut server.connect("ada").await, "t", 200..300).await;
    server.kill();
    server.up();

    let found = numbers(&server, "t").await;
    let answered: Vec<u64> = found.iter().copied().filter(|n| *n != 777).collect();
    assert_eq!(answered, (0..300).collect::<Vec<u64>>());
    // One whose outcome was not known may be there, once.
    assert!(found.len() <= 301, "{found:?}");
    server.stop().await;
    assert_eq!(doctor(server.data()), Vec::<String>::new());
}

#[tokio::test]
async fn after_failing_syncs_the_log_is_opened_again_and_goes_on() {
    goes_on_after("sync").await;
}

#[tokio::test]
async fn after_failing_writes_the_log_is_opened_again_and_goes_on() {
    goes_on_after("write").await;
}

#[tokio::test]
async fn after_a_full_disk_the_log_goes_on() {
    goes_on_after("full").await;
}
