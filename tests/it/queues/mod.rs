//! Work queues under everything that may go wrong: each event is settled once in effect, each thread's in its order, no two
//! workers at once. [`simulated`] has the rules alone, with nodes that are made up; [`competing`] the nodes themselves, in this
//! process; [`processes`] servers that are killed and stopped. [`fairness`] is about whose turn it is. What is checked is the same: [`ledger`] reads it off the log.

mod competing;
mod fairness;
mod ledger;
mod nodes;
mod processes;
mod simulated;

use serde_json::json;
use uuid::Uuid;
use weft::clock;
use weft::ingest::admit::new_event;
use weft::log::{Grant, RULES, Record, Topic};
use weft::protocol::event::Priority;
use weft::protocol::ids;

const GROUP: &str = "g";

/// An event's id and record, as a server writes it at this moment.
fn event(at: u64, tenant: &str, thread: &str, from: &str, kind: &str) -> (Uuid, Record) {
    event_with(at, tenant, thread, from, kind, None)
}

fn event_with(
    at: u64,
    tenant: &str,
    thread: &str,
    from: &str,
    kind: &str,
    priority: Option<Priority>,
) -> (Uuid, Record) {
    let data = serde_json::value::to_raw_value(&json!({"content": "do it"})).unwrap();
    let mut event = new_event(tenant, from, thread, kind, &data);
    event.at = clock::rfc3339(at).into();
    event.priority = priority;
    let (key, value) = (ids::log_key(tenant, thread), serde_json::to_vec(&event).unwrap().into());
    let (topic, kind, grant) = (Topic::Events, kind.to_owned(), Grant::Member);
    (event.event, Record { topic, key, kind, rules: RULES, grant, traceparent: None, value })
}
