//! A server's frame, reduced to what the benches look at.

use serde_json::Value;

use weft::cli::common::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    Welcome,
    Subscribed {
        after: u64,
    },
    Published {
        id: u64,
        seq: u64,
    },
    /// A delta was published.
    DeltaPublished {
        id: u64,
    },
    /// A delta, with the length of its text, which is ASCII and needs no escapes.
    Delta {
        from_char: u64,
        text: usize,
    },
    /// `raw` is the whole frame.
    Event {
        seq: u64,
        raw: &'a [u8],
    },
    CaughtUp {
        seq: u64,
    },
    /// The reader lags; its events come from the store now.
    Lagged,
    /// A member of a thread has connected or disconnected.
    Presence,
    Pong,
    /// To a `consume`.
    Consuming,
    /// An event to work on, as it is in the frame.
    Work {
        delivery: &'a str,
        event: &'a [u8],
    },
    Settled,
}

impl Reply<'_> {
    /// The id and the seq of a publish that was answered, for a publisher that subscribed to nothing and gets nothing else.
    pub fn published(&self) -> Result<(u64, u64), Failure> {
        match self {
            Reply::Published { id, seq } => Ok((*id, *seq)),
            other => Err(format!("a publisher that subscribed to nothing got {other:?}").into()),
        }
    }

    /// Fails on an error frame, on a duplicate, and on what is not a frame of Weft.
    pub fn read(frame: &[u8]) -> Result<Reply<'_>, Failure> {
        match published(frame).or_else(|| event(frame)).or_else(|| presence(frame)).or_else(|| work(frame)) {
            Some(reply) => Ok(reply),
            None => parsed(frame),
        }
    }
}

/// Frames that are frequent are read without a parser, by the order in which the server writes their fields. The names of
/// threads need no escapes.
fn published(frame: &[u8]) -> Option<Reply<'_>> {
    let (id, rest) = number(frame.strip_prefix(br#"{"type":"published","id":"#)?)?;
    let rest = after_quote(rest.strip_prefix(br#","thread":""#)?)?;
    if rest.starts_with(br#","event":"#) {
        return rest.windows(18).any(|it| it == br#","duplicate":false"#).then_some(Reply::DeltaPublished { id });
    }
    let (seq, rest) = number(rest.strip_prefix(br#","seq":"#)?)?;
    rest.ends_with(br#","duplicate":false}"#).then_some(Reply::Published { id, seq })
}

fn event(frame: &[u8]) -> Option<Reply<'_>> {
    let rest = after_quote(frame.strip_prefix(br#"{"type":"event","thread":""#)?)?;
    if rest.starts_with(br#","kind":"agent_token""#) {
        return delta(rest);
    }
    let (seq, _) = number(rest.strip_prefix(br#","seq":"#)?)?;
    Some(Reply::Event { seq, raw: frame })
}

fn delta(frame: &[u8]) -> Option<Reply<'_>> {
    const FROM: &[u8] = br#","from_char":"#;
    let at = frame.windows(FROM.len()).position(|window| window == FROM)? + FROM.len();
    let (from_char, rest) = number(&frame[at..])?;
    let text = rest.strip_prefix(br#","text":""#)?;
    Some(Reply::Delta { from_char, text: text.iter().position(|byte| *byte == b'"')? })
}

fn presence(frame: &[u8]) -> Option<Reply<'_>> {
    let rest = after_quote(frame.strip_prefix(br#"{"type":"signal","thread":""#)?)?;
    rest.starts_with(br#","kind":"presence","#).then_some(Reply::Presence)
}

fn work(frame: &[u8]) -> Option<Reply<'_>> {
    const EVENT: &[u8] = br#","event":"#;
    if frame.starts_with(br#"{"type":"settled","#) {
        return Some(Reply::Settled);
    }
    let rest = frame.strip_prefix(br#"{"type":"work","delivery":""#)?;
    let quote = rest.iter().position(|byte| *byte == b'"')?;
    let at = rest.windows(EVENT.len()).position(|window| window == EVENT)? + EVENT.len();
    let event = rest[at..].strip_suffix(b"}")?;
    Some(Reply::Work { delivery: std::str::from_utf8(&rest[..quote]).ok()?, event })
}

fn after_quote(bytes: &[u8]) -> Option<&[u8]> {
    let quote = bytes.iter().position(|byte| *byte == b'"')?;
    Some(&bytes[quote + 1..])
}

fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let digits = bytes.iter().position(|byte| !byte.is_ascii_digit())?;
    // Nineteen digits always fit; no seq and no id of a bench has more.
    if digits == 0 || digits > 19 {
        return None;
    }
    let value = bytes[..digits].iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Some((value, &bytes[digits..]))
}

fn parsed(raw: &[u8]) -> Result<Reply<'_>, Failure> {
    let frame: Value = serde_json::from_slice(raw)?;
    let field = |name: &str| frame[name].as_u64().ok_or_else(|| Failure::from(format!("no {name} in {frame}")));
    match frame["type"].as_str() {
        Some("welcome") => Ok(Reply::Welcome),
        Some("subscribed") => Ok(Reply::Subscribed { after: field("after").unwrap_or_default() }),
        Some("published") if frame["duplicate"] == false => {
            Ok(Reply::Published { id: field("id")?, seq: field("seq")? })
        }
        Some("event") => Ok(Reply::Event { seq: field("seq")?, raw }),
        Some("caught_up") => Ok(Reply::CaughtUp { seq: field("seq")? }),
        Some("lagged") => Ok(Reply::Lagged),
        Some("signal") if frame["kind"] == "presence" => Ok(Reply::Presence),
        Some("pong") => Ok(Reply::Pong),
        Some("consuming") => Ok(Reply::Consuming),
        _ => Err(format!("the server answered {frame}").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_the_same_with_and_without_the_parser() {
        for (frame, want) in [
            (
                r#"{"type":"published","id":1000000007,"thread":"a-1","seq":8,"event":"e","duplicate":false}"#,
                Reply::Published { id: 1_000_000_007, seq: 8 },
            ),
            (r#"{"type":"caught_up","thread":"a-1","seq":12}"#, Reply::CaughtUp { seq: 12 }),
            (
                r#"{"type":"signal","thread":"a-1","kind":"presence","from":"u-1","data":{"online":true}}"#,
                Reply::Presence,
            ),
        ] {
            assert_eq!(Reply::read(frame.as_bytes()).unwrap(), want);
            assert_eq!(parsed(frame.as_bytes()).unwrap(), want);
        }
        let event = br#"{"type":"event","thread":"a-1","seq":9,"kind":"user_message","data":{}}"#;
        assert_eq!(super::event(event), Some(Reply::Event { seq: 9, raw: event }));
        assert_eq!(parsed(event).unwrap(), Reply::Event { seq: 9, raw: event });
    }

    #[test]
    fn presence_is_recognised_without_the_parser() {
        // Cut short, so that the parser would refuse it.
        let frame = br#"{"type":"signal","thread":"a-1","kind":"presence","from":"#;
        assert_eq!(Reply::read(frame).unwrap(), Reply::Presence);
    }

    #[test]
    fn errors_duplicates_and_unexpected_signals_fail() {
        for frame in [
            r#"{"type":"error","id":1,"code":"forbidden","message":"no","temporary":false}"#,
            r#"{"type":"published","id":1,"thread":"a","seq":8,"event":"e","duplicate":true}"#,
            r#"{"type":"published","id":1,"thread":"a"}"#,
            r#"{"type":"signal","thread":"a","kind":"typing","from":"u"}"#,
            "nonsense",
        ] {
            assert!(Reply::read(frame.as_bytes()).is_err(), "{frame}");
        }
    }
}
