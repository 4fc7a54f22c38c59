//! An orderly end: each client is asked to come back, each at its own time.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::on_both_logs;
use crate::support::{Server, has, seqs};

on_both_logs!(on_sigterm_each_client_is_told_a_time_of_its_own_to_come_back_and_resumes_then, |log| async move {
    const CLIENTS: u64 = 20;
    let mut server = Server::start(log);
    let members: Vec<String> = (0..CLIENTS).map(|n| format!("user-{n}")).collect();
    assert_eq!(server.http("PUT", "/v1/threads/t", "ada", Some(json!({"members": members}))).await.0, 201);
    let mut clients = Vec::new();
    let mut epochs = BTreeSet::new();
    for user in &members {
        let mut client = server.connect(user).await;
        epochs.insert(client.subscribe("t", Some(0)).await["epoch"].as_str().unwrap().to_owned());
        assert_eq!(seqs(&client.events(1).await), [1]);
        clients.push(client);
    }
    let mut ada = server.connect("ada").await;
    // On their way when the end comes: each gets it now or later.
    assert_eq!(ada.say("t", "before").await, 2);
    server.signal("TERM");
    let (mut waits, mut seen) = (BTreeSet::new(), Vec::new());
    for client in &mut clients {
        let mut last = 1;
        let code = loop {
            match client.next().await {
                Ok(frame) if frame["type"] == "event" => last = frame["seq"].as_u64().unwrap(),
                Ok(_) => {}
                Err(code) => break code,
            }
        };
        assert_eq!(code, 1001);
        let reason: Value = serde_json::from_str(&client.reason).unwrap();
        assert_eq!((&reason["reason"], reason.as_object().unwrap().len()), (&json!("draining"), 2), "{reason}");
        waits.insert(reason["retry_after_ms"].as_u64().unwrap());
        seen.push(last);
    }
    assert_eq!(waits.len() as u64, CLIENTS, "each at a time of its own: {waits:?}");
    assert!(*waits.first().unwrap() > 0 && waits.last().unwrap() - waits.first().unwrap() >= 500, "{waits:?}");
    assert!(*waits.last().unwrap() <= 60_000);
    assert!(server.ended().await.success());

    server.up();
    server.ready().await;
    assert_eq!(server.connect("ada").await.say("t", "after").await, 3);
    let epoch = epochs.first().unwrap();
    assert_eq!(epochs.len(), 1);
    for (user, last) in members.iter().zip(seen) {
        let mut client = server.connect(user).await;
        let subscribed = client.subscribe_with("t", json!({"after": last, "epoch": epoch})).await;
        has(&subscribed, json!({"recovered": true, "after": last}));
        let missing: Vec<u64> = (last + 1..=3).collect();
        assert_eq!(seqs(&client.events(missing.len()).await), missing);
    }
});
