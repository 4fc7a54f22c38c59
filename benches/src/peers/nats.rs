//! NATS's protocol: lines, and messages with their length. A publish to a subject of a stream is answered on the publisher's
//! inbox once JetStream has stored it.

use super::got::{Got, leading_number, message_or_other, said};
use weft::cli::common::Failure;

const STREAM: &str = "BENCH";
const INBOX: &str = "_INBOX.";
/// Where a consumer delivers to.
const DELIVER: &str = "deliver.";

/// How the answer begins that says that the stream is there.
pub(super) const STREAM_MADE: &str = r#"{"type":"io.nats.jetstream.api.v1.stream_create_response""#;

/// What a client says once the server has greeted it; `PONG` comes when that is taken.
pub(super) fn connect(inbox: &str) -> String {
    format!(
        "CONNECT {{\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true,\"lang\":\"bench\",\
         \"version\":\"1\",\"protocol\":1}}\r\nSUB {INBOX}{inbox}.* 1\r\nPING\r\n"
    )
}

/// Makes the stream that stores what is published: in files, and with all else as it is by default.
pub(super) fn make_stream(inbox: &str) -> String {
    let config = format!(r#"{{"name":"{STREAM}","subjects":["bench.*"],"storage":"file","num_replicas":1}}"#);
    format!("PUB $JS.API.STREAM.CREATE.{STREAM} {INBOX}{inbox}.stream {}\r\n{config}\r\n", config.len())
}

pub(super) fn publish(inbox: &str, thread: &str, data: &str) -> Vec<u8> {
    format!("PUB bench.{thread} {INBOX}{inbox}.1000000000 {}\r\n{data}\r\n", data.len()).into_bytes()
}

pub(super) fn subscribe(thread: &str) -> String {
    format!("SUB bench.{thread} 2\r\nPING\r\n")
}

/// An ordered consumer, as NATS's own clients make it: it keeps nothing and acknowledges nothing, with flow control.
pub(super) fn consume(inbox: &str, thread: &str, after: u64) -> String {
    let config = serde_json::json!({
        "stream_name": STREAM,
        "config": {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after + 1,
            "deliver_subject": format!("{DELIVER}{inbox}"),
            "filter_subject": format!("bench.{thread}"),
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "mem_storage": true,
            "num_replicas": 1,
            "flow_control": true,
            "idle_heartbeat": 5_000_000_000u64,
            "inactive_threshold": 5_000_000_000u64,
        },
    })
    .to_string();
    format!(
        "SUB {DELIVER}{inbox} 3\r\nPUB $JS.API.CONSUMER.CREATE.{STREAM} {INBOX}{inbox}.consumer {}\r\n{config}\r\n",
        config.len()
    )
}

/// Gives how many bytes are dealt with.
pub(super) fn read(
    bytes: &[u8],
    replies: &mut Vec<u8>,
    each: &mut impl FnMut(Got) -> Result<(), Failure>,
) -> Result<usize, Failure> {
    let mut at = 0;
    while let Some(length) = bytes[at..].windows(2).position(|two| two == b"\r\n") {
        let line = &bytes[at..at + length];
        let body = at + length + 2;
        if let Some(rest) = line.strip_prefix(b"MSG ") {
            let words = std::str::from_utf8(rest)?;
            let size = last_number(words)?;
            let Some(payload) = bytes.get(body..body + size) else { break };
            if bytes.len() < body + size + 2 {
                break;
            }
            message(words, payload, each)?;
            at = body + size + 2;
        } else if let Some(rest) = line.strip_prefix(b"HMSG ") {
            let words = std::str::from_utf8(rest)?;
            let size = last_number(words)?;
            if bytes.len() < body + size + 2 {
                break;
            }
            flow_control(words, &bytes[body..body + size], replies)?;
            at = body + size + 2;
        } else {
            match line {
                b"PING" => replies.extend_from_slice(b"PONG\r\n"),
                line if line.starts_with(b"-ERR") => return Err(said(line)),
                line => each(Got::Other(line))?,
            }
            at = body;
        }
    }
    Ok(at)
}

fn last_number(words: &str) -> Result<usize, Failure> {
    Ok(words.rsplit(' ').next().unwrap_or_default().parse()?)
}

fn message(words: &str, payload: &[u8], each: &mut impl FnMut(Got) -> Result<(), Failure>) -> Result<(), Failure> {
    let subject = words.split(' ').next().unwrap_or_default();
    let Some(answered) = subject.strip_prefix(INBOX) else { return message_or_other(payload, each) };
    if payload.starts_with(br#"{"error""#) || payload.windows(9).any(|window| window == br#""error":{"#) {
        return Err(said(payload));
    }
    match answered.rsplit('.').next() {
        Some("consumer" | "stream") | None => each(Got::Other(payload)),
        Some(number) => each(Got::Answer { id: leading_number(number.as_bytes()), raw: payload }),
    }
}

/// A message with headers is one of the server's: it waits until the reader has come so far, or is alive.
fn flow_control(words: &str, headers: &[u8], replies: &mut Vec<u8>) -> Result<(), Failure> {
    if !headers.starts_with(b"NATS/1.0 100") {
        return Err(said(headers));
    }
    // Subject, number of the subscription, subject to answer to, and two lengths.
    if let [_, _, reply, _, _] = words.split(' ').collect::<Vec<_>>()[..] {
        replies.extend_from_slice(format!("PUB {reply} 0\r\n\r\n").as_bytes());
    }
    Ok(())
}
