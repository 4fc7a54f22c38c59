//! What each server wants to hear, and how it says that a publish is done and that a message is there.

use serde_json::Value;
use tokio::net::TcpStream;

use super::link::{Got, Link};
use super::nats;
use crate::publisher::{Frame, number_in};
use crate::socket::{CLOSE, PING, PONG, TEXT, closed, frame, scan, upgrade};
use crate::target::Target;
use weft::cli::common::Failure;
use weft::clock;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    Weft,
    /// NATS JetStream in its own protocol over TCP. Readers are plain subscriptions, one that comes back is a consumer.
    Nats,
    /// Socket.IO 4: `benches/peers/socketio.mjs`.
    SocketIo,
    /// Redis streams behind a relay: `benches/peers/relay.mjs`.
    Relay,
    /// Centrifugo's JSON protocol.
    Centrifugo,
}

/// Where a reader goes on.
#[derive(Debug, Default)]
pub struct Resume {
    pub thread: String,
    pub user: String,
    /// The last message that it had.
    pub at: String,
    /// What the server knows the reader or the history by, where that is needed.
    pub name: String,
}

impl Dialect {
    /// What a server needs before anybody publishes.
    pub async fn prepare(self, target: &Target) -> Result<(), Failure> {
        match self {
            Dialect::Nats => nats::make_stream(&mut self.connect(target, "maker").await?).await,
            _ => Ok(()),
        }
    }

    /// Only Weft has members.
    pub async fn make_thread(
        self,
        target: &Target,
        thread: &str,
        owner: &str,
        members: &[String],
    ) -> Result<(), Failure> {
        match self {
            Dialect::Weft => target.thread(thread, owner, members).await,
            _ => Ok(()),
        }
    }

    /// A connection that may publish.
    pub async fn connect(self, target: &Target, user: &str) -> Result<Link, Failure> {
        self.connect_as(target, user, None).await
    }

    /// `hello` is what Socket.IO's client says when it comes back.
    async fn connect_as(self, target: &Target, user: &str, hello: Option<&str>) -> Result<Link, Failure> {
        let mut stream = TcpStream::connect(target.authority()).await?;
        stream.set_nodelay(true)?;
        let headers = match self {
            Dialect::Weft => format!("Authorization: Bearer {}\r\n", target.token(user)?),
            _ => String::new(),
        };
        let path = match self {
            Dialect::Weft => "/v1/ws",
            Dialect::SocketIo => "/socket.io/?EIO=4&transport=websocket",
            Dialect::Relay => "/",
            Dialect::Centrifugo => "/connection/websocket",
            Dialect::Nats => "",
        };
        let rest = match self {
            Dialect::Nats => Vec::new(),
            _ => upgrade(&mut stream, target.authority(), path, &headers).await?,
        };
        let mut link = Link::new(stream, self, clock::random_id().simple().to_string(), rest);
        link.welcome = match self {
            Dialect::Weft => link.wait_for(r#"{"type":"welcome""#).await?,
            Dialect::SocketIo => {
                link.wait_for("0{").await?;
                link.queue_text(hello.unwrap_or("40"));
                match hello {
                    None => link.wait_for("40{").await?,
                    // What the client has missed comes before the welcome, and not at all if it is not known again.
                    Some(_) => Vec::new(),
                }
            }
            Dialect::Relay => Vec::new(),
            Dialect::Centrifugo => {
                link.queue_text(r#"{"id":1,"connect":{}}"#);
                link.wait_for(r#"{"id":1,"connect""#).await?
            }
            Dialect::Nats => nats::greet(&mut link).await?,
        };
        Ok(link)
    }

    /// A publish as bytes on the wire.
    pub fn publish(self, link: &Link, thread: &str, payload: usize) -> Frame {
        let data = Frame::data(payload);
        match self {
            Dialect::Weft => Frame::publish(thread, payload, false),
            Dialect::SocketIo => Frame::text(&format!(r#"421000000000["publish","{thread}",{data}]"#)),
            Dialect::Relay => Frame::text(&format!(r#"{{"id":1000000000,"publish":"{thread}","data":{data}}}"#)),
            Dialect::Centrifugo => {
                Frame::text(&format!(r#"{{"id":1000000000,"publish":{{"channel":"{thread}","data":{data}}}}}"#))
            }
            Dialect::Nats => Frame::of(nats::publish(&link.inbox, thread, &data)),
        }
    }

    /// A connection that gets a thread's messages from now on.
    pub async fn reader(self, target: &Target, user: &str, thread: &str) -> Result<Link, Failure> {
        let mut link = self.connect(target, user).await?;
        let (ask, answer) = match self {
            Dialect::Weft => {
                (format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}"}}"#), r#"{"type":"caught_up""#)
            }
            Dialect::SocketIo => (format!(r#"421["join","{thread}"]"#), "431["),
            Dialect::Relay => (format!(r#"{{"subscribe":"{thread}"}}"#), r#"{"subscribed""#),
            Dialect::Centrifugo => {
                (format!(r#"{{"id":2,"subscribe":{{"channel":"{thread}"}}}}"#), r#"{"id":2,"subscribe""#)
            }
            Dialect::Nats => (nats::subscribe(thread), "PONG"),
        };
        link.queue_text(&ask);
        let answer = link.wait_for(answer).await?;
        if self == Dialect::Centrifugo {
            link.welcome = answer;
        }
        Ok(link)
    }

    /// Where a reader goes on that has seen one message: by what it was welcomed with, how that publish was answered, and the
    /// message.
    pub fn position(self, reader: &Link, answer: &[u8], message: &[u8]) -> Result<Resume, Failure> {
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let (at, name) = match self {
            Dialect::Weft => (text(&json(message)?["seq"]), String::new()),
            Dialect::SocketIo => {
                let items = json(message.strip_prefix(b"42").unwrap_or(message))?;
                let last = items.as_array().and_then(|items| items.last()).map(text).unwrap_or_default();
                (last, text(&json(&reader.welcome[2..])?["pid"]))
            }
            Dialect::Relay => (text(&json(message)?["at"]), String::new()),
            Dialect::Centrifugo => {
                let offset = text(&json(message)?["push"]["pub"]["offset"]);
                (offset, text(&json(&reader.welcome)?["subscribe"]["epoch"]))
            }
            // A plain subscription knows no position; the publisher does.
            Dialect::Nats => (text(&json(answer)?["seq"]), String::new()),
        };
        Ok(Resume { at, name, ..Resume::default() })
    }

    /// A connection that gets a thread's messages from a position on.
    pub async fn resumed(self, target: &Target, resume: &Resume) -> Result<Link, Failure> {
        let Resume { thread, user, at, name } = resume;
        let hello = format!(r#"40{{"pid":"{name}","offset":"{at}"}}"#);
        let mut link = self.connect_as(target, user, Some(&hello)).await?;
        let ask = match self {
            Dialect::Weft => format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}","after":{at}}}"#),
            Dialect::SocketIo => return Ok(link),
            Dialect::Relay => format!(r#"{{"subscribe":"{thread}","after":"{at}"}}"#),
            Dialect::Centrifugo => format!(
                r#"{{"id":2,"subscribe":{{"channel":"{thread}","recover":true,"epoch":"{name}","offset":{at}}}}}"#
            ),
            Dialect::Nats => nats::consume(&link.inbox, thread, at.parse()?),
        };
        link.queue_text(&ask);
        Ok(link)
    }

    /// Cuts what came in into frames and calls `each` for what is in them; gives how many bytes are dealt with. What has to be
    /// answered at once is put to `replies`.
    pub fn read(
        self,
        bytes: &[u8],
        replies: &mut Vec<u8>,
        each: &mut impl FnMut(Got) -> Result<(), Failure>,
    ) -> Result<usize, Failure> {
        if self == Dialect::Nats {
            return nats::read(bytes, replies, each);
        }
        let mut one = |opcode: u8, payload: &[u8]| match opcode {
            TEXT => self.read_text(payload, replies, each),
            PING => {
                replies.extend_from_slice(&frame(PONG, payload));
                Ok(())
            }
            CLOSE => Err(closed(payload)),
            _ => Ok(()),
        };
        Ok(scan(bytes, &mut one)?.0)
    }

    fn read_text(
        self,
        text: &[u8],
        replies: &mut Vec<u8>,
        each: &mut impl FnMut(Got) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match self {
            Dialect::Weft => {
                if let Some(rest) = text.strip_prefix(br#"{"type":"published","id":"#) {
                    return each(Got::Answer { id: leading_number(rest), raw: text });
                }
                if text.starts_with(br#"{"type":"error""#) {
                    return Err(said(text));
                }
                message_or_other(text, each)
            }
            Dialect::SocketIo => match text {
                b"2" => {
                    replies.extend_from_slice(&frame(TEXT, b"3"));
                    Ok(())
                }
                [b'4', b'3', rest @ ..] => match leading_number(rest) {
                    // Not a publish.
                    1 => each(Got::Other(text)),
                    id => each(Got::Answer { id, raw: text }),
                },
                [b'4', b'4', ..] => Err(said(text)),
                _ => message_or_other(text, each),
            },
            Dialect::Relay => match text.strip_prefix(br#"{"id":"#) {
                Some(rest) if text.ends_with(br#""ok":true}"#) => {
                    each(Got::Answer { id: leading_number(rest), raw: text })
                }
                Some(_) => Err(said(text)),
                None => message_or_other(text, each),
            },
            Dialect::Centrifugo => {
                text.split(|byte| *byte == b'\n').try_for_each(|line| centrifugo(line, replies, each))
            }
            Dialect::Nats => Err("NATS sends no WebSocket frames here".into()),
        }
    }
}

/// One reply or push of Centrifugo.
fn centrifugo(
    line: &[u8],
    replies: &mut Vec<u8>,
    each: &mut impl FnMut(Got) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if line == b"{}" {
        replies.extend_from_slice(&frame(TEXT, b"{}"));
        return Ok(());
    }
    let Some(rest) = line.strip_prefix(br#"{"id":"#) else { return message_or_other(line, each) };
    let after = &rest[rest.iter().take_while(|byte| byte.is_ascii_digit()).count()..];
    if after.starts_with(br#","error""#) {
        return Err(said(line));
    }
    if after.starts_with(br#","publish""#) {
        return each(Got::Answer { id: leading_number(rest), raw: line });
    }
    each(Got::Other(line))?;
    // The messages that a client has missed come in the answer to its `subscribe`.
    if after.starts_with(br#","subscribe""#) {
        let answer = json(line)?;
        for missed in answer["subscribe"]["publications"].as_array().into_iter().flatten() {
            let number = missed["data"]["n"].as_u64().unwrap_or_default();
            each(Got::Message { number: crate::publisher::number_of(number)?, raw: &[] })?;
        }
    }
    Ok(())
}

pub(super) fn message_or_other(raw: &[u8], each: &mut impl FnMut(Got) -> Result<(), Failure>) -> Result<(), Failure> {
    each(match number_in(raw) {
        Some(number) => Got::Message { number, raw },
        None => Got::Other(raw),
    })
}

pub(super) fn leading_number(bytes: &[u8]) -> u64 {
    let digits = bytes.iter().take(19).take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'))
}

pub(super) fn said(text: &[u8]) -> Failure {
    format!("the server said {}", String::from_utf8_lossy(text)).into()
}

fn json(text: &[u8]) -> Result<Value, Failure> {
    Ok(serde_json::from_slice(text)?)
}
