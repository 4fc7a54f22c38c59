//! What benches fill a server with before they measure: events in many threads of one user, many in one request.

use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::target::Target;
use weft::cli::common::Failure;

/// Requests at the same time.
const AT_ONCE: usize = 4;
/// Events of a request, and about the most bytes of it: both less than what the server takes.
const EVENTS: usize = 500;
const BYTES: usize = 512 << 10;

/// Names of threads.
pub fn names(target: &Target, what: &str, count: usize) -> Vec<String> {
    (0..count.max(1)).map(|number| target.name(what, number)).collect()
}

/// Publishes so many events, one after the other to the next thread; `data` makes them of their numbers.
pub async fn fill(
    target: &Target,
    user: &str,
    threads: &[String],
    events: u64,
    data: impl Fn(u64) -> Value,
) -> Result<(), Failure> {
    let part = |first: usize| {
        let data = &data;
        async move {
            let mut http = target.http(user).await?;
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let mut numbers = (first as u64..events).step_by(AT_ONCE).peekable();
            while let Some(number) = numbers.next() {
                let data = data(number);
                bytes += data.to_string().len();
                let thread = &threads[(number / AT_ONCE as u64) as usize % threads.len()];
                batch.push(json!({"thread": thread, "kind": "user_message", "data": data}));
                if batch.len() == EVENTS || bytes >= BYTES || numbers.peek().is_none() {
                    let sent = std::mem::take(&mut batch);
                    bytes = 0;
                    let count = sent.len();
                    let answer = http.post("/v1/events", &json!({ "events": sent })).await?;
                    let published = |items: &Vec<Value>| items.iter().filter(|item| item["seq"].is_u64()).count();
                    if answer["items"].as_array().map(published) != Some(count) {
                        return Err(format!("not all events were published: {answer}").into());
                    }
                }
            }
            Ok::<_, Failure>(())
        }
    };
    try_join_all((0..AT_ONCE).map(part)).await.map(drop)
}
