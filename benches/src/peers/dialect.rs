//! What each server wants to hear.

use serde_json::Value;
use tokio::net::TcpStream;

use super::frames::Dialect;
use super::link::Link;
use super::nats;
use crate::publisher::Frame;
use crate::socket::upgrade;
use crate::target::Target;
use weft::cli::common::Failure;
use weft::clock;

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
        if self == Dialect::Nats {
            let mut link = self.connect(target, "maker").await?;
            link.queue_text(&nats::make_stream(&link.inbox));
            link.wait_for(nats::STREAM_MADE).await?;
        }
        Ok(())
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
            Dialect::Nats => {
                let welcome = link.wait_for("INFO ").await?;
                link.queue_text(&nats::connect(&link.inbox));
                link.wait_for("PONG").await?;
                welcome
            }
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
}

fn json(text: &[u8]) -> Result<Value, Failure> {
    Ok(serde_json::from_slice(text)?)
}
