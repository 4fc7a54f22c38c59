//! What every test starts from: a real server process on a free port and a temporary folder, and a plain client that
//! shows what is on the wire. Nothing waits by sleeping; every wait is for something, with a limit that only a hang meets.

pub mod auth_service;
pub mod dns;
pub mod faults;
pub mod kafka;
pub mod schemas;
pub mod sse;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use weft::auth::jwt::{Claims, mint};

pub const SECRET: &str = "the tests' own secret, long enough for HS256";
pub const TENANT: &str = "acme";
/// What only a hang exceeds.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test body on both logs: `on_both_logs!(name, |log| async move { … })` makes `name::embedded` and `name::kafka`.
#[macro_export]
macro_rules! on_both_logs {
    ($(#[$attribute:meta])* $name:ident, $body:expr) => {
        mod $name {
            use super::*;
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn embedded() {
                let body: fn($crate::support::LogKind) -> _ = $body;
                body($crate::support::LogKind::embedded()).await
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn kafka() {
                let body: fn($crate::support::LogKind) -> _ = $body;
                body($crate::support::LogKind::kafka()).await
            }
        }
    };
}

/// Which log a server runs on.
#[derive(Debug, Clone)]
pub enum LogKind {
    Embedded,
    /// Brokers, and a prefix of topics that no other test uses.
    Kafka {
        brokers: String,
        prefix: String,
    },
}

impl LogKind {
    pub fn embedded() -> LogKind {
        LogKind::Embedded
    }

    pub fn kafka() -> LogKind {
        LogKind::Kafka { brokers: kafka::brokers().to_owned(), prefix: kafka::fresh_prefix() }
    }

    /// What a topic is called on the brokers.
    pub fn topic(&self, topic: &str) -> String {
        match self {
            LogKind::Kafka { prefix, .. } => format!("{prefix}{topic}"),
            LogKind::Embedded => panic!("the embedded log has no topics on brokers"),
        }
    }

    pub fn arguments(&self) -> Vec<String> {
        match self {
            LogKind::Embedded => vec!["--log".into(), "embedded".into()],
            LogKind::Kafka { brokers, prefix } => {
                ["--log", "kafka", "--brokers", brokers, "--topic-prefix", prefix].map(String::from).to_vec()
            }
        }
    }
}

/// Partitions of each topic that a server makes on a broker, if a test does not say otherwise.
pub const KAFKA_PARTITIONS: u32 = 8;

/// The binary under test.
pub fn weft() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    without_settings(&mut command);
    command
}

/// The benchmark, which `make test` builds beside the binary under test.
pub fn weft_bench() -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_weft")).with_file_name("weft-bench");
    assert!(path.exists(), "{} is missing: cargo build --release -p weft-bench", path.display());
    let mut command = Command::new(path);
    without_settings(&mut command);
    command
}

/// Settings of the machine must not reach the tests.
fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEFT_")) {
        command.env_remove(name);
    }
}

/// A server process.
pub struct Server {
    child: Option<Child>,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    /// The same of the operator's own address, if it has one.
    pub admin: Option<String>,
    log: LogKind,
    log_level: Option<&'static str>,
    more: Vec<String>,
    /// Variables of its environment.
    variables: Vec<(&'static str, PathBuf)>,
    /// What it has written to stderr.
    errors: Arc<Mutex<String>>,
    data: PathBuf,
    _folder: TempDir,
}

impl Server {
    pub fn start(log: LogKind) -> Server {
        Server::start_with(log, &[])
    }

    /// A server without a limit of rates, for a test whose users publish as fast as it takes.
    pub fn start_unlimited(log: LogKind) -> Server {
        Server::start_with(log, &["--rate-user", "0", "--rate-agent", "0"])
    }

    /// Starts a server with further arguments.
    pub fn start_with(log: LogKind, more: &[&str]) -> Server {
        Server::start_at_level(log, more, None)
    }

    /// The same; [`Server::errors`] has more to say.
    pub fn start_verbose(log: LogKind, more: &[&str]) -> Server {
        Server::start_at_level(log, more, Some("debug"))
    }

    fn start_at_level(log: LogKind, more: &[&str], log_level: Option<&'static str>) -> Server {
        let mut server = Server::stopped_with(log, more);
        server.log_level = log_level;
        server.up();
        server
    }

    /// A server that was never started.
    pub fn stopped(log: LogKind) -> Server {
        Server::stopped_with(log, &[])
    }

    pub fn stopped_with(log: LogKind, more: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let more: Vec<String> = more.iter().map(|it| (*it).to_owned()).collect();
        let (errors, variables) = (Arc::default(), Vec::new());
        let (url, log_level) = (String::new(), None);
        Server { child: None, url, admin: None, log, log_level, more, variables, errors, data, _folder: folder }
    }

    pub fn set_variable(&mut self, name: &'static str, value: &Path) {
        self.variables.push((name, value.to_owned()));
    }

    /// Starts the process, and returns once it listens.
    pub fn up(&mut self) {
        assert!(self.try_up(), "the server did not start: {}", self.errors());
    }

    /// The same with these arguments, in place of those from before.
    pub fn up_with(&mut self, more: &[&str]) {
        self.more = more.iter().map(|it| (*it).to_owned()).collect();
        self.up();
    }

    /// Starts the process, which refuses; gives what it says.
    pub fn refuses_to_start(&mut self) -> String {
        self.errors.lock().unwrap().clear();
        assert!(!self.try_up(), "it has started");
        self.errors()
    }

    fn command(&self) -> Command {
        let mut command = weft();
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(&self.data)
            .args(self.log.arguments())
            .args(&self.more)
            .envs(self.log_level.map(|level| ("WEFT_LOG_LEVEL", level)));
        if matches!(self.log, LogKind::Kafka { .. }) {
            // One broker has the topics of all tests.
            command.env("WEFT_PARTITIONS", KAFKA_PARTITIONS.to_string());
        }
        if !self.more.iter().any(|it| matches!(it.as_str(), "--jwt-key" | "--jwt-secret")) {
            command.args(["--jwt-secret", SECRET]);
        }
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)));
        command
    }

    /// Whether the process starts and listens. One that does not has ended.
    fn try_up(&mut self) -> bool {
        let mut child = self.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Read to the end, so that the server never waits for its own log.
        let (mut stderr, errors) = (BufReader::new(child.stderr.take().unwrap()), self.errors.clone());
        let reading = std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|n| n > 0) {
                errors.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(Ok(line)) = lines.next() else {
            reading.join().unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(1), "it says why and ends");
            return false;
        };
        self.url = line.split_whitespace().nth(4).unwrap_or_else(|| panic!("no address in {line:?}")).to_owned();
        let admin = line.split_once("metrics: ").and_then(|(_, rest)| rest.split_once("/metrics"));
        self.admin = admin.map(|(address, _)| address.to_owned());
        self.child = Some(child);
        true
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn log(&self) -> &LogKind {
        &self.log
    }

    /// What the server has written to stderr: its log.
    pub fn errors(&self) -> String {
        self.errors.lock().unwrap().clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the process to end by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let waited = tokio::task::spawn_blocking(move || child.wait().unwrap());
        tokio::time::timeout(PATIENCE, waited).await.expect("the server ends").unwrap()
    }

    /// SIGTERM, and the orderly end.
    pub async fn stop(&mut self) {
        self.signal("TERM");
        assert!(self.ended().await.success());
    }

    pub async fn connect(&self, user: &str) -> Socket {
        Socket::open(&self.url, &token(user, "")).await
    }

    pub async fn connect_as(&self, user: &str, scope: &str) -> Socket {
        Socket::open(&self.url, &token(user, scope)).await
    }

    /// A request with a user's token; gives the status and the body as JSON. The body is what its schema says.
    pub async fn http(&self, method: &str, path: &str, user: &str, body: Option<Value>) -> (u16, Value) {
        self.http_with(method, path, &token(user, ""), body, &[]).await
    }

    pub async fn http_with(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> (u16, Value) {
        let client = reqwest::Client::new();
        let mut request = client.request(method.parse().unwrap(), format!("{}{path}", self.url)).bearer_auth(token);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = &body {
            request = request.body(body.to_string());
        }
        let reply = request.send().await;
        let reply = reply.unwrap_or_else(|error| panic!("{method} {path}: {error:?}\n{}", self.errors()));
        let status = reply.status().as_u16();
        let text = reply.text().await.unwrap();
        let answer = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{method} {path}: {status} {text:?}"));
        schemas::check_body(method, path, status, &answer);
        if let Some(body) = body.filter(|_| status < 300) {
            schemas::check_request(method, path, &body);
        }
        (status, answer)
    }

    /// A request of the tenant's admin.
    pub async fn admin(&self, method: &str, path: &str) -> (u16, Value) {
        self.http_with(method, path, &token("root", "admin"), None, &[]).await
    }

    /// The sum of a metric's series.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = reqwest::get(format!("{}/metrics", self.url)).await.unwrap().text().await.unwrap();
        let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        text.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until `/readyz` says 200.
    pub async fn ready(&self) {
        eventually("the server is ready", async || self.http("GET", "/readyz", "x", None).await.0 == 200).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// The longest pause of [`eventually`].
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Asks again and again, at growing intervals, until something holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    let mut interval = Duration::from_millis(1);
    while !holds().await {
        assert!(begin.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(MAX_POLL_INTERVAL);
    }
}

/// Fails unless the value has these fields; `null` stands for one that is not there.
#[track_caller]
pub fn has(value: &Value, fields: Value) {
    for (name, wanted) in fields.as_object().unwrap() {
        assert_eq!(value[name], *wanted, "`{name}` of {value}");
    }
}

/// Fails unless the server took the publish.
#[track_caller]
pub fn accepted(answer: &Value) {
    assert_eq!(answer["type"], "published", "{answer}");
}

/// Fails unless the server refused the command or request with this code and names this field.
#[track_caller]
pub fn refused(answer: &Value, code: &str, field: &str) {
    refused_with(answer, code);
    assert_eq!(answer["field"], field, "{answer}");
}

/// Fails unless the server refused the command or request with this code.
#[track_caller]
pub fn refused_with(answer: &Value, code: &str) {
    assert_eq!(answer["code"], code, "{answer}");
    // A problem of HTTP has no type.
    assert!(answer.get("type").is_none_or(|frame_type| frame_type == "error"), "{answer}");
}

pub fn claims(user: &str, scope: &str) -> Claims {
    Claims {
        sub: user.into(),
        tenant: TENANT.into(),
        exp: weft::clock::now_s() + 3_600,
        scope: Some(scope.to_owned()).filter(|scope| !scope.is_empty()),
        ..Claims::default()
    }
}

/// A token of the tests' tenant; with an empty scope the default ones.
pub fn token(user: &str, scope: &str) -> String {
    mint(SECRET, &claims(user, scope)).unwrap()
}

pub fn token_of(tenant: &str, user: &str) -> String {
    mint(SECRET, &Claims { tenant: tenant.into(), ..claims(user, "") }).unwrap()
}

/// A WebSocket as it is on the wire: frames in, frames out, as JSON.
pub struct Socket {
    pub ws: WebSocketStream<MaybeTlsStream<TcpStream>>,
    next_id: i64,
    /// Frames that came while an answer was waited for.
    stash: VecDeque<Value>,
    /// What the server's close frame said.
    pub reason: String,
}

impl Socket {
    /// Connects with a token and takes the `welcome`.
    pub async fn open(url: &str, token: &str) -> Socket {
        let mut socket = Socket::raw(url, &[("Authorization", &format!("Bearer {token}"))]).await.unwrap();
        let welcome = socket.recv().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        socket
    }

    /// The same over a connection that takes a few kilobytes beyond what is read, so that whoever does not read is felt.
    pub async fn open_with_small_buffer(url: &str, token: &str) -> Socket {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 << 10).unwrap();
        // The loopback's segments are larger than that buffer.
        socket2::SockRef::from(&socket).set_tcp_mss(1_460).unwrap();
        let address = url.trim_start_matches("http://").parse().unwrap();
        let stream = MaybeTlsStream::Plain(socket.connect(address).await.unwrap());
        let mut request = format!("ws://{address}/v1/ws").into_client_request().unwrap();
        request.headers_mut().insert("Authorization", HeaderValue::try_from(format!("Bearer {token}")).unwrap());
        let (ws, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        let mut socket = Socket { ws, next_id: 1, stash: VecDeque::new(), reason: String::new() };
        let welcome = socket.recv().await;
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        socket
    }

    /// The connection takes more beyond what is read, so that reading on is fast.
    pub fn enlarge_buffer(&self) {
        let MaybeTlsStream::Plain(stream) = self.ws.get_ref() else { unreachable!("tests speak without TLS") };
        socket2::SockRef::from(stream).set_recv_buffer_size(4 << 20).unwrap();
    }

    /// Connects with these headers and nothing else.
    pub async fn raw(url: &str, headers: &[(&str, &str)]) -> Result<Socket, WsError> {
        Socket::raw_at(url, "/v1/ws", headers).await
    }

    /// The same, at a path with a query.
    pub async fn raw_at(url: &str, path: &str, headers: &[(&str, &str)]) -> Result<Socket, WsError> {
        let mut request = format!("{}{path}", url.replace("http://", "ws://")).into_client_request().unwrap();
        for (name, value) in headers {
            let name: tokio_tungstenite::tungstenite::http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
        }
        let (ws, _) = tokio_tungstenite::connect_async(request).await?;
        Ok(Socket { ws, next_id: 1, stash: VecDeque::new(), reason: String::new() })
    }

    pub async fn send(&mut self, command: &Value) {
        self.send_text(&command.to_string()).await;
    }

    pub async fn send_text(&mut self, text: &str) {
        self.ws.send(Message::text(text)).await.unwrap();
    }

    /// The next text frame, or how the connection ended.
    pub async fn next(&mut self) -> Result<Value, u16> {
        match self.stash.pop_front() {
            Some(frame) => Ok(frame),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<Value, u16> {
        // For the frame, and not for each of the server's pings in between.
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            let message = tokio::time::timeout_at(until, self.ws.next()).await.expect("a frame, or the end");
            match message {
                Some(Ok(Message::Text(text))) => {
                    let frame = serde_json::from_str(&text).unwrap();
                    schemas::check_frame(&frame);
                    return Ok(frame);
                }
                Some(Ok(Message::Close(close))) => {
                    let (code, reason) =
                        close.map_or((1005, String::new()), |it| (it.code.into(), it.reason.to_string()));
                    self.reason = reason;
                    return Err(code);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(1006),
            }
        }
    }

    /// The next frame. Who comes and goes is passed over, since it depends on the other sockets of a test.
    pub async fn recv(&mut self) -> Value {
        loop {
            let frame = self.recv_any().await;
            if frame["type"] != "signal" || frame["kind"] != "presence" {
                return frame;
            }
        }
    }

    /// The next frame, presence included.
    pub async fn recv_any(&mut self) -> Value {
        self.next().await.unwrap_or_else(|code| panic!("closed with {code}"))
    }

    /// The next frame of a type; others before it are passed over.
    pub async fn recv_type(&mut self, wanted: &str) -> Value {
        loop {
            let frame = self.recv().await;
            assert!(frame["type"] != "error" || wanted == "error", "{frame}");
            if frame["type"] == wanted {
                return frame;
            }
        }
    }

    /// How the connection ends; frames before that are passed over.
    pub async fn closed(&mut self) -> u16 {
        loop {
            if let Err(code) = self.next().await {
                return code;
            }
        }
    }

    /// Sends a command with an id of its own and gives the answer with that id; what comes before it stays to be read.
    pub async fn ask(&mut self, mut command: Value) -> Value {
        let id = self.next_id;
        self.next_id += 1;
        command["id"] = json!(id);
        self.send(&command).await;
        loop {
            let frame = self.read().await.unwrap_or_else(|code| panic!("closed with {code}"));
            if frame["id"] == json!(id) {
                if frame["type"] != "error" {
                    schemas::check_command(&command);
                }
                return frame;
            }
            self.stash.push_back(frame);
        }
    }

    /// The session lives: it answers a ping. Frames that come before stay to be read.
    pub async fn answers(&mut self) {
        let pong = self.ask(json!({"type": "ping"})).await;
        assert_eq!(pong["type"], "pong", "{pong}");
    }

    /// A durable subscription, or one with more than a cursor to it: gives the `subscribed`.
    pub async fn subscribe_with(&mut self, thread: &str, more: Value) -> Value {
        let mut command = json!({"type": "subscribe", "thread": thread});
        command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.ask(command).await;
        assert_eq!(answer["type"], "subscribed", "{answer}");
        answer
    }

    pub async fn ack(&mut self, thread: &str, seq: u64) {
        self.send(&json!({"type": "ack", "thread": thread, "seq": seq})).await;
    }

    /// Nothing waits to be read but the answer to a ping: whatever was before it has come.
    pub async fn silent(&mut self) {
        self.send(&json!({"type": "ping", "id": 777_777})).await;
        let frame = self.recv().await;
        has(&frame, json!({"type": "pong", "id": 777_777}));
    }

    /// Closes, and returns once the server has answered that.
    pub async fn leave(mut self) {
        // It may be closed already.
        drop(self.ws.close(None).await);
        self.closed().await;
    }

    /// Publishes a `user_message` and gives its seq.
    pub async fn say(&mut self, thread: &str, content: &str) -> u64 {
        let answer = self
            .ask(json!({"type": "publish", "thread": thread, "kind": "user_message", "data": {"content": content}}))
            .await;
        answer["seq"].as_u64().unwrap_or_else(|| panic!("{answer}"))
    }

    pub async fn subscribe(&mut self, thread: &str, after: Option<u64>) -> Value {
        self.subscribe_with(thread, after.map_or(json!({}), |after| json!({"after": after}))).await
    }

    /// The next `n` events.
    pub async fn events(&mut self, n: usize) -> Vec<Value> {
        let mut events = Vec::with_capacity(n);
        while events.len() < n {
            events.push(self.recv_type("event").await);
        }
        events
    }
}

/// The seqs of events.
pub fn seqs(events: &[Value]) -> Vec<u64> {
    events.iter().map(|event| event["seq"].as_u64().unwrap()).collect()
}

/// A publish without its id.
pub fn publish(thread: &str, kind: &str, data: Value) -> Value {
    json!({"type": "publish", "thread": thread, "kind": kind, "data": data})
}
