//! Tickets are good on every node: one use, whichever node gave it, whichever takes it.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error as WsError;
use weft::clock;
use weft::log::Record;
use weft::projector::MAX_OPEN_TICKETS;
use weft::protocol::records::TicketIssuedRecord;
use weft::protocol::tickets::{LIFETIME, Ticket, owner};

use crate::on_both_logs;
use crate::persistence::rules::{append_to, open};
use crate::support::kafka::{Broker, fresh_prefix};
use crate::support::{LogKind, Server, Socket, TENANT, eventually, has, publish, refused, refused_with, token, weft};

/// A ticket of the user's.
pub async fn get(server: &Server, user: &str) -> String {
    let (status, given) = server.http("POST", "/v1/tickets", user, None).await;
    assert_eq!(status, 201, "{given}");
    given["ticket"].as_str().unwrap().to_owned()
}

/// The session that a ticket opens, or the status of the refusal.
pub async fn enter(server: &Server, ticket: &str) -> Result<Socket, u16> {
    match Socket::raw_at(&server.url, &format!("/v1/ws?ticket={ticket}"), &[]).await {
        Ok(socket) => Ok(socket),
        Err(WsError::Http(reply)) => Err(reply.status().as_u16()),
        Err(error) => panic!("{error}"),
    }
}

async fn status(server: &Server, ticket: &str) -> u16 {
    enter(server, ticket).await.err().unwrap_or(101)
}

/// The answer to a stream that is asked for with a ticket.
async fn stream(server: &Server, path: &str, ticket: &str) -> reqwest::Response {
    let url = format!("{}/v1/threads/t/{path}?after=0&ticket={ticket}", server.url);
    reqwest::get(url).await.unwrap()
}

async fn problem_of_stream(server: &Server, ticket: &str) -> Value {
    stream(server, "stream", ticket).await.json().await.unwrap()
}

fn two_nodes() -> [Server; 2] {
    let log = LogKind::kafka();
    [(); 2].map(|()| Server::start_unlimited(log.clone()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_node_gave_the_other_takes_at_once_on_every_way_in() {
    let nodes = two_nodes();
    nodes[0].connect("ada").await.say("t", "hello").await;
    for n in 0..60 {
        let (giver, taker) = (&nodes[n % 2], &nodes[(n + 1) % 2]);
        let ticket = get(giver, "ada").await;
        match n % 3 {
            0 => {
                let mut socket = enter(taker, &ticket).await.unwrap_or_else(|status| panic!("{status} in round {n}"));
                has(&socket.recv().await, json!({"type": "welcome", "user": "ada", "tenant": TENANT}));
            }
            1 => assert_eq!(stream(taker, "stream", &ticket).await.status(), StatusCode::OK, "round {n}"),
            _ => assert_eq!(stream(taker, "agui", &ticket).await.status(), StatusCode::OK, "round {n}"),
        }
        for node in [giver, taker] {
            assert_eq!(status(node, &ticket).await, 401, "used, in round {n}");
            assert_eq!(stream(node, "stream", &ticket).await.status(), StatusCode::UNAUTHORIZED);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_those_who_use_a_ticket_at_the_same_time_on_two_nodes_one_gets_in() {
    let nodes = two_nodes();
    for node in &nodes {
        node.ready().await;
    }
    for round in 0..25 {
        let ticket = get(&nodes[round % 2], "ada").await;
        // Both nodes know the ticket before the race: the log alone decides.
        let racers = (0..12).map(|n| status(&nodes[n % 2], &ticket));
        let mut statuses = join_all(racers).await;
        statuses.sort_unstable();
        assert_eq!(statuses, [[101].as_slice(), &[401; 11]].concat(), "round {round}");
    }
}

on_both_logs!(a_ticket_is_good_once_also_after_a_restart_and_after_a_rebuild, |log| async move {
    let mut server = Server::start(log.clone());
    let (used, unused) = (get(&server, "ada").await, get(&server, "ada").await);
    assert_eq!(status(&server, &used).await, 101);
    server.kill();
    server.up();
    server.ready().await;
    assert_eq!(status(&server, &used).await, 401);
    assert_eq!(status(&server, &unused).await, 101, "what nobody used is still good");
    assert_eq!(status(&server, &unused).await, 401);

    // One more is open in the rows that are compared.
    get(&server, "ben").await;
    server.stop().await;
    for arguments in [&["rebuild", "--check"][..], &["rebuild"]] {
        let output = weft().args(arguments).arg("--data").arg(server.data()).args(log.arguments()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    server.up();
    server.ready().await;
    for ticket in [&used, &unused] {
        assert_eq!(status(&server, ticket).await, 401);
    }
});

/// A ticket of ada's that was issued at this time, and its record.
fn issued(at: u64) -> (Ticket, Record) {
    let random = [(); 2].map(|()| clock::random_id().into_bytes());
    let ticket = Ticket::new(&owner(TENANT, "ada"), random);
    let record = TicketIssuedRecord {
        kind: "ticket_issued".into(),
        id: clock::event_id(),
        tenant: TENANT.into(),
        user: "ada".into(),
        hash: blake3::Hash::from_bytes(ticket.hash()).to_hex().to_string(),
        scopes: "publish subscribe".into(),
        iat_ms: None,
        exp: clock::now_s() + 3_600,
        at: clock::rfc3339(at),
        expires_at: clock::rfc3339(at + LIFETIME.as_millis() as u64),
    };
    (ticket, Record::from(&record))
}

on_both_logs!(an_expired_ticket_is_refused_and_used_up, |log| async move {
    let mut server = Server::stopped(log.clone());
    server.up();
    server.stop().await;
    let now = clock::now_ms();
    // The log's time is ahead, as two records of it agree: so the row of the expired ticket is not purged before its turn.
    let [(_, ahead), (_, ahead_too)] = [(); 2].map(|()| issued(now + 1_800_000));
    // Good for as long as this test may take.
    let (good, good_record) = issued(now);
    let (expired, expired_record) = issued(now - LIFETIME.as_millis() as u64);
    let writer = open(&log, server.data());
    append_to(&*writer, vec![ahead, ahead_too, good_record, expired_record]);
    writer.close();
    drop(writer);

    server.up();
    server.ready().await;
    for refused in [1.0, 1.0] {
        assert_eq!(status(&server, &expired.text()).await, 401);
        assert_eq!(server.metric("weft_project_refused_total").await, refused, "by the projector, the first time");
    }
    assert_eq!(status(&server, &good.text()).await, 101, "the record alone says how old a ticket is");
});

#[tokio::test]
async fn no_client_publishes_what_is_written_about_tickets() {
    let server = Server::start(LogKind::embedded());
    let mut admin = server.connect_as("root", "publish agent broadcast admin").await;
    let own = format!("ticket:{}", "0".repeat(32));
    for thread in ["t", "@me", "@tenant", own.as_str()] {
        for kind in ["ticket_issued", "ticket_used"] {
            refused(&admin.ask(publish(thread, kind, json!({}))).await, "bad_request", "kind");
            let path = format!("/v1/threads/{thread}/events");
            let body = Some(json!({"kind": kind, "data": {}}));
            let (_, problem) = server.http_with("POST", &path, &token("root", "admin"), body, &[]).await;
            refused(&problem, "bad_request", "kind");
        }
    }
    // A thread that is called like the key is a thread.
    assert_eq!(admin.say(&own, "hello").await, 1);
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(std::fs::read(&path).unwrap()),
        }
    }
    found
}

on_both_logs!(the_ticket_itself_is_neither_in_the_log_nor_in_the_store, |log| async move {
    let mut server = Server::start_verbose(log.clone(), &[]);
    let tickets = [get(&server, "ada").await, get(&server, "ada").await];
    assert_eq!(status(&server, &tickets[0]).await, 101);
    assert_eq!(status(&server, &tickets[0]).await, 401);
    server.stop().await;

    let mut texts = files(server.data());
    texts.push(server.errors().into_bytes());
    let log = open(&log, server.data());
    let starts: Vec<u64> = log.bounds().unwrap().iter().map(|it| it.start).collect();
    let entries = log.reader(&starts).unwrap().next(100, Duration::from_secs(5)).unwrap();
    let records: Vec<Record> = entries.into_iter().map(|entry| entry.record.unwrap()).collect();
    let kinds: Vec<&str> = records.iter().map(|record| record.kind.as_str()).collect();
    assert_eq!(kinds, ["ticket_issued", "ticket_issued", "ticket_used"], "who is refused at once writes nothing");
    texts.extend(records.iter().map(|record| record.value.to_vec()));
    log.close();

    let has = |what: &[u8]| texts.iter().any(|text| text.windows(what.len()).any(|part| part == what));
    for text in &tickets {
        let ticket = Ticket::parse(text).unwrap();
        let hash = blake3::Hash::from_bytes(ticket.hash()).to_hex();
        assert!(has(hash.as_bytes()), "the hash is what is looked for and found");
        // Of the ticket only the part that is not random may be there.
        let random = &text[text.len() - 40..];
        assert!(!has(random.as_bytes()), "{text}");
    }
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_has_100_open_tickets_over_all_nodes_and_takes_none_from_others() {
    let nodes = two_nodes();
    let mut given = Vec::new();
    for n in 0..MAX_OPEN_TICKETS {
        given.push(get(&nodes[n % 2], "ada").await);
    }
    for node in &nodes {
        let (status, problem) = node.http("POST", "/v1/tickets", "ada", None).await;
        assert_eq!(status, 503);
        refused_with(&problem, "queue_full");
        let wait = problem["retry_after_ms"].as_u64().unwrap();
        assert!((1..=30_000).contains(&wait), "until the oldest expires: {problem}");
        get(node, "ben").await;
    }
    assert_eq!(status(&nodes[0], &given[50]).await, 101);
    given.push(get(&nodes[1], "ada").await);
    assert_eq!(nodes[0].http("POST", "/v1/tickets", "ada", None).await.0, 503);
}

on_both_logs!(guesses_are_refused_and_the_log_does_not_grow_by_them, |log| async move {
    let server = Server::start_unlimited(log);
    let ticket = get(&server, "ada").await;
    let before = server.metric("weft_append_bytes_total").await;
    let ada = Ticket::parse(&ticket).unwrap().owner();
    for n in 0..50u8 {
        // Whose ticket it would be is right in every other one.
        let owner = if n % 2 == 0 { ada } else { [n; 16] };
        let guess = Ticket::new(&owner, [[n; 16], [7; 16]]).text();
        for guess in [guess.as_str(), &guess[1..], "guessed", ""] {
            assert_eq!(status(&server, guess).await, 401, "{guess}");
        }
    }
    assert_eq!(server.metric("weft_append_bytes_total").await, before);
    assert_eq!(status(&server, &ticket).await, 101);
    assert!(server.metric("weft_append_bytes_total").await > before, "a use is in the log");
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_log_is_down_tickets_are_unavailable_and_afterwards_as_good_as_before() {
    let broker = Broker::own();
    let server = Server::start(LogKind::Kafka { brokers: broker.brokers(), prefix: fresh_prefix() });
    server.ready().await;
    server.connect("ada").await.say("t", "hello").await;
    let (known, later) = (get(&server, "ada").await, get(&server, "ada").await);
    let unknown = Ticket::new(&owner(TENANT, "ada"), [[1; 16], [2; 16]]).text();

    broker.pause();
    let asked = async {
        tokio::join!(
            problem_of_stream(&server, &known),
            problem_of_stream(&server, &unknown),
            server.http("POST", "/v1/tickets", "ada", None)
        )
    };
    let (known, unknown, (status_of_new, new)) =
        tokio::time::timeout(Duration::from_secs(10), asked).await.expect("they are answered without the broker");
    assert_eq!(status_of_new, 503);
    for problem in [known, unknown, new] {
        refused_with(&problem, "unavailable");
        has(&problem, json!({"status": 503}));
        assert!(problem["retry_after_ms"].is_u64(), "{problem}");
    }

    broker.resume();
    eventually("a new ticket is given", async || server.http("POST", "/v1/tickets", "ada", None).await.0 == 201).await;
    // Whether it is still good depends on how long the broker took; that it is good once does not.
    let statuses = [status(&server, &later).await, status(&server, &later).await];
    assert!(statuses == [101, 401] || statuses == [401, 401], "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_use_counts_against_its_user_s_rate_and_one_that_is_refused_for_that_leaves_the_ticket_good() {
    let server = Server::start_with(LogKind::embedded(), &["--rate-user", "1"]);
    let begin = Instant::now();
    let ticket = get(&server, "ada").await;
    // The bucket holds five, and the ticket cost one.
    for _ in 0..4 {
        assert_eq!(server.http("GET", "/v1/threads", "ada", None).await.0, 200);
    }
    let mut refused = 0;
    eventually("the bucket has one again", async || match status(&server, &ticket).await {
        429 => {
            refused += 1;
            false
        }
        status => {
            assert_eq!(status, 101);
            true
        }
    })
    .await;
    assert!(refused > 0 || begin.elapsed() > Duration::from_secs(1), "it was empty before");
    assert_eq!(status(&server, &ticket).await, 401);
}

on_both_logs!(what_only_looks_like_a_ticket_s_record_is_a_dead_letter_and_reading_goes_on, |log| async move {
    let mut server = Server::stopped(log.clone());
    server.up();
    server.stop().await;
    let now = clock::now_ms();
    let issued = || issued(now);
    let (earlier_rules, other_key) = (issued(), issued());
    let (good, good_record) = issued();
    let ben = weft::protocol::tickets::log_key(&owner(TENANT, "ben"));
    let records = vec![
        Record { rules: 1, ..earlier_rules.1 },
        Record { key: ben, ..other_key.1 },
        Record { kind: "user_message".into(), ..issued().1 },
        good_record,
    ];
    let writer = open(&log, server.data());
    append_to(&*writer, records);
    writer.close();
    drop(writer);

    server.up();
    server.ready().await;
    let (_, letters) = server.admin("GET", "/v1/dead-letters?reason=unreadable").await;
    let errors: Vec<&str> = letters["items"].as_array().unwrap().iter().filter_map(|it| it["error"].as_str()).collect();
    assert_eq!(errors.len(), 3, "{letters}");
    for said in ["unknown field", "its user's tickets", "its kind is not"] {
        assert!(errors.iter().any(|error| error.contains(said)), "{said}: {errors:?}");
    }
    for (ticket, wanted) in [(&earlier_rules.0, 401), (&other_key.0, 401), (&good, 101)] {
        assert_eq!(status(&server, &ticket.text()).await, wanted);
    }
});
