//! A client of Weft: one WebSocket, commands out, frames in.
//!
//! [`Client`] is one connection. [`Resuming`] outlives connections: it reconnects and resumes after the last seq it has
//! seen, so that its reader gets each event once and in order. [`Worker`] takes work of a group, and outlives connections as
//! well. [`Http`] sends the requests that have no command.
//!
//! There is no TLS here: a server on another machine needs a proxy or a tunnel on this one that speaks it.

mod http;
mod reconnect;
mod resuming;
mod worker;

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header::AUTHORIZATION};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{self, Message};

pub use http::Http;
pub use resuming::{ClientItem, Resuming, Start};
pub use worker::{NotDone, Worker, WorkerItem};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a server is. Parses `http://host:port`, `ws://host:port` and `ws://host:port/v1/ws` alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    authority: String,
}

impl Address {
    /// `host:port`, as a socket or a `Host` header wants it.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    pub fn socket_url(&self) -> String {
        format!("ws://{}/v1/ws", self.authority)
    }
}

impl FromStr for Address {
    type Err = ClientError;

    fn from_str(url: &str) -> Result<Address, ClientError> {
        let refuse = || ClientError::Address(url.to_owned());
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("ws://")).ok_or_else(refuse)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() || authority.contains('@') || !matches!(path, "" | "v1/ws") {
            return Err(refuse());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Address { authority })
    }
}

/// Why a connection or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{0:?} is not an address such as http://127.0.0.1:8080 or ws://127.0.0.1:8080/v1/ws")]
    Address(String),
    #[error("the token has characters that cannot stand in a header")]
    Token,
    #[error("cannot connect to {to}: {source}")]
    Connect { to: String, source: std::io::Error },
    #[error("{}", refusal(*.status, .body))]
    Refused { status: u16, body: String },
    #[error("the connection was closed: {code}{}", detail(.reason))]
    Closed { code: u16, reason: String },
    #[error("the server has been silent for {0:?}")]
    Silent(Duration),
    #[error("the connection was lost: {0}")]
    Lost(Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Command(Box<ErrorFrame>),
    #[error("the server sent something unexpected: {0}")]
    Malformed(String),
    #[error("the server has another log now (epoch {0}): the cursor of the old one means nothing in it; start again")]
    OtherLog(String),
    #[error("events of {thread} are missing: after seq {after} came {seq}")]
    Hole { thread: String, after: u64, seq: u64 },
}

impl ClientError {
    /// Whether a new connection may succeed. Where not, something has to be changed first.
    pub fn reconnects(&self) -> bool {
        match self {
            ClientError::Connect { .. } | ClientError::Silent(_) | ClientError::Lost(_) => true,
            // Whatever the code, a server that says when to come back means it.
            ClientError::Closed { code, .. } => {
                matches!(code, 1001 | 1006 | 1011..=1013 | 4000..=4499) || self.retry_after().is_some()
            }
            ClientError::Refused { status, .. } => matches!(status, 408 | 429 | 500..=599),
            ClientError::Command(error) => error.temporary,
            _ => false,
        }
    }

    /// After what time the server asks the client to come back, if it does: a draining server gives each client its own.
    pub fn retry_after(&self) -> Option<Duration> {
        #[derive(Deserialize)]
        struct Advice {
            retry_after_ms: u64,
        }
        let ms = match self {
            ClientError::Closed { reason, .. } => serde_json::from_str::<Advice>(reason).ok()?.retry_after_ms,
            ClientError::Refused { body, .. } => serde_json::from_str::<Advice>(body).ok()?.retry_after_ms,
            ClientError::Command(error) => error.retry_after_ms?,
            _ => return None,
        };
        Some(Duration::from_millis(ms))
    }
}

/// The server's own words (RFC 9457) where the body has them: `not_found: there is no such thread`.
fn refusal(status: u16, body: &str) -> String {
    #[derive(Deserialize)]
    struct ProblemText {
        code: String,
        detail: String,
        field: Option<String>,
    }
    match serde_json::from_str(body) {
        Ok(ProblemText { code, detail, field }) => refusal_text(&code, &detail, field.as_deref()),
        Err(_) => format!("the server refused: HTTP {status}{}", detail(body)),
    }
}

fn refusal_text(code: &str, message: &str, field: Option<&str>) -> String {
    match field {
        Some(field) => format!("{code}: {message} ({field})"),
        None => format!("{code}: {message}"),
    }
}

fn detail(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

impl From<tungstenite::Error> for ClientError {
    fn from(error: tungstenite::Error) -> ClientError {
        match error {
            tungstenite::Error::Http(answer) => ClientError::Refused {
                status: answer.status().as_u16(),
                body: String::from_utf8_lossy(answer.body().as_deref().unwrap_or_default()).into_owned(),
            },
            other => ClientError::Lost(Box::new(other)),
        }
    }
}

/// What the server sends. Fields that this client does not know are ignored, and so are frames of other types.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientFrame {
    Welcome(Welcome),
    Subscribed(SubscribeAnswer),
    Event(ClientEvent),
    CaughtUp {
        thread: String,
        #[serde(default)]
        seq: u64,
    },
    Published(PublishAnswer),
    Position {
        thread: String,
        seq: u64,
    },
    Lagged {
        thread: String,
        from: u64,
        to: u64,
    },
    Signal {
        thread: String,
        kind: String,
        from: String,
        #[serde(default)]
        data: Value,
    },
    Expiring {
        expires_at: String,
    },
    Error(ErrorFrame),
    Refreshed {
        id: i64,
    },
    Unsubscribed {
        id: i64,
    },
    Pong {
        id: i64,
    },
    Consuming {
        id: i64,
    },
    Work(Box<ClientWork>),
    Settled {
        id: i64,
    },
    #[serde(other)]
    Unknown,
}

impl ClientFrame {
    /// The id of the command that this frame answers.
    fn answers(&self) -> Option<i64> {
        match self {
            ClientFrame::Published(published) => Some(published.id),
            ClientFrame::Subscribed(subscribed) => Some(subscribed.id),
            ClientFrame::Refreshed { id }
            | ClientFrame::Unsubscribed { id }
            | ClientFrame::Pong { id }
            | ClientFrame::Consuming { id }
            | ClientFrame::Settled { id } => Some(*id),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
pub struct Welcome {
    pub connection: String,
    pub user: String,
    pub tenant: String,
    pub epoch: String,
    pub heartbeat_ms: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct SubscribeAnswer {
    pub id: i64,
    pub thread: String,
    pub epoch: String,
    /// A number for one thread; for `"*"` each thread has its own.
    #[serde(default)]
    pub head: Value,
    #[serde(default)]
    pub after: Value,
    #[serde(default = "yes")]
    pub recovered: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Clone, Deserialize)]
pub struct PublishAnswer {
    pub id: i64,
    pub thread: String,
    /// None for a delta: it has a position in its message instead.
    pub seq: Option<u64>,
    #[serde(default)]
    pub duplicate: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientEvent {
    pub thread: String,
    /// None for a delta: it has a position in its message instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    #[serde(default)]
    pub from: String,
    #[serde(default)]
    pub at: String,
    #[serde(default)]
    pub data: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
}

/// An event to work on, while its lease lasts.
#[derive(Debug, Clone, Deserialize)]
pub struct ClientWork {
    pub delivery: String,
    pub group: String,
    pub attempt: u32,
    pub lease_ms: u64,
    pub event: Value,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ErrorFrame {
    pub id: Option<i64>,
    pub code: String,
    #[serde(default)]
    pub message: String,
    pub field: Option<String>,
    #[serde(default)]
    pub temporary: bool,
    pub retry_after_ms: Option<u64>,
    pub outcome: Option<String>,
}

impl fmt::Display for ErrorFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&refusal_text(&self.code, &self.message, self.field.as_deref()))
    }
}

/// An event to publish.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PublishDraft {
    pub thread: String,
    pub kind: String,
    pub data: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
}

/// What to subscribe to, and from where.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SubscribeDraft {
    pub thread: String,
    /// With thread `"*"`: those of the whole tenant.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    /// A seq; with thread `"*"` an object of thread to seq.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<String>,
}

/// What work to take.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConsumeDraft {
    pub group: String,
    /// How much at once.
    pub credit: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_ms: Option<u64>,
}

/// What became of a piece of work.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SettleDraft {
    pub delivery: String,
    /// `done`, `retry`, `reject` or `extend`.
    pub outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
}

#[derive(Serialize)]
struct CommandFrame<'a, T> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: i64,
    #[serde(flatten)]
    body: &'a T,
}

/// One connection, past its `welcome`. Dropping it closes the TCP connection alone; [`Client::close`] sends a close frame.
pub struct Client {
    socket: WebSocketStream<TcpStream>,
    welcome: Welcome,
    /// Frames that came before an answer that was waited for.
    waiting: VecDeque<ClientFrame>,
    next_id: i64,
}

impl Client {
    pub async fn connect(url: &str, token: &str) -> Result<Client, ClientError> {
        let address: Address = url.parse()?;
        let silent = |_| ClientError::Silent(CONNECT_TIMEOUT);
        tokio::time::timeout(CONNECT_TIMEOUT, Client::open(&address, token)).await.map_err(silent)?
    }

    async fn open(address: &Address, token: &str) -> Result<Client, ClientError> {
        let mut request = address.socket_url().into_client_request()?;
        let bearer = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ClientError::Token)?;
        request.headers_mut().insert(AUTHORIZATION, bearer);

        let refused = |source| ClientError::Connect { to: address.authority().to_owned(), source };
        let stream = TcpStream::connect(address.authority()).await.map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await?;
        match next_frame(&mut socket, CONNECT_TIMEOUT).await? {
            ClientFrame::Welcome(welcome) => Ok(Client { socket, welcome, waiting: VecDeque::new(), next_id: 1 }),
            ClientFrame::Error(error) => Err(ClientError::Command(Box::new(error))),
            other => Err(ClientError::Malformed(format!("{other:?} instead of a welcome"))),
        }
    }

    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Sends one command, or an array of them, unchanged.
    pub async fn send(&mut self, command: &impl Serialize) -> Result<(), ClientError> {
        let text = serde_json::to_string(command).map_err(|error| ClientError::Malformed(error.to_string()))?;
        Ok(self.socket.send(Message::text(text)).await?)
    }

    /// The next frame. Cancel-safe: no frame is lost when the future is dropped.
    pub async fn recv(&mut self) -> Result<ClientFrame, ClientError> {
        match self.waiting.pop_front() {
            Some(frame) => Ok(frame),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<ClientFrame, ClientError> {
        // Two missed heartbeats and some grace: a connection that broke without a FIN would never end by itself.
        let patience = Duration::from_millis(self.welcome.heartbeat_ms) * 2 + CONNECT_TIMEOUT;
        next_frame(&mut self.socket, patience).await
    }

    pub async fn publish(&mut self, draft: &PublishDraft) -> Result<PublishAnswer, ClientError> {
        match self.ask("publish", draft).await? {
            ClientFrame::Published(published) => Ok(published),
            other => Err(ClientError::Malformed(format!("{other:?} answers a publish"))),
        }
    }

    pub async fn subscribe(&mut self, subscription: &SubscribeDraft) -> Result<SubscribeAnswer, ClientError> {
        match self.ask("subscribe", subscription).await? {
            ClientFrame::Subscribed(subscribed) => Ok(subscribed),
            other => Err(ClientError::Malformed(format!("{other:?} answers a subscribe"))),
        }
    }

    /// From now on work of the group comes, as [`ClientFrame::Work`].
    pub async fn consume(&mut self, draft: &ConsumeDraft) -> Result<(), ClientError> {
        match self.ask("consume", draft).await? {
            ClientFrame::Consuming { .. } => Ok(()),
            other => Err(ClientError::Malformed(format!("{other:?} answers a consume"))),
        }
    }

    pub async fn settle(&mut self, draft: &SettleDraft) -> Result<(), ClientError> {
        match self.ask("settle", draft).await? {
            ClientFrame::Settled { .. } => Ok(()),
            other => Err(ClientError::Malformed(format!("{other:?} answers a settle"))),
        }
    }

    /// Sends a command and reads its answer; what comes before is kept for [`Client::recv`].
    async fn ask(&mut self, kind: &'static str, body: &impl Serialize) -> Result<ClientFrame, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&CommandFrame { kind, id, body }).await?;
        loop {
            match self.read().await? {
                ClientFrame::Error(error) if error.id == Some(id) => return Err(ClientError::Command(Box::new(error))),
                frame if frame.answers() == Some(id) => return Ok(frame),
                other => self.waiting.push_back(other),
            }
        }
    }

    pub async fn close(mut self) -> Result<(), ClientError> {
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        Ok(self.socket.close(Some(frame)).await?)
    }
}

async fn next_frame(socket: &mut WebSocketStream<TcpStream>, patience: Duration) -> Result<ClientFrame, ClientError> {
    loop {
        let next = tokio::time::timeout(patience, socket.next()).await;
        match next.map_err(|_| ClientError::Silent(patience))? {
            Some(Ok(Message::Text(text))) => {
                return serde_json::from_str(&text).map_err(|error| ClientError::Malformed(format!("{error}: {text}")));
            }
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                return Err(ClientError::Closed { code, reason });
            }
            // Pings, which the socket answers by itself.
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => {
                return Err(ClientError::Closed { code: 1006, reason: String::new() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_over_http_is_printed_in_the_server_s_words() {
        let text = |body: &str| ClientError::Refused { status: 404, body: body.to_owned() }.to_string();
        let problem = r#"{"title":"not_found","status":404,"code":"not_found","detail":"there is no such thread"}"#;
        assert_eq!(text(problem), "not_found: there is no such thread");
        let problem = r#"{"status":400,"code":"bad_request","detail":"limit must be 1 to 1000","field":"limit"}"#;
        assert_eq!(text(problem), "bad_request: limit must be 1 to 1000 (limit)");
        assert_eq!(text("<html>"), "the server refused: HTTP 404 (<html>)");
        assert_eq!(text(""), "the server refused: HTTP 404");
    }
}
