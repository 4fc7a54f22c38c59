//! An auth service, or another one: real HTTP on a port of its own, which answers, or fails to, as the test says.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::claims;

pub const KEYS: &str = "/keys";
pub const DISCOVERY: &str = "/.well-known/openid-configuration";
pub const INTROSPECT: &str = "/introspect";

/// What a path does.
#[derive(Clone)]
pub enum Behaviour {
    /// Answers with a status and a body.
    Answer(u16, String),
    /// Answers from the sessions that are open.
    Introspect,
    /// The first, but each time after so many with the second.
    Every(usize, Box<Behaviour>, Box<Behaviour>),
    Redirect(String),
    /// Server-Sent Events; the stream ends with them, or stays open.
    Events {
        text: String,
        ends: bool,
    },
    /// Takes the request and says nothing.
    Hang,
    /// An answer of so many bytes.
    Giant(usize),
    /// One byte a second.
    Trickle,
    /// Closes without an answer.
    HangUp,
}

/// A request with a body.
#[derive(Debug, Clone)]
pub struct Told {
    /// The request line and the headers.
    pub head: String,
    pub body: String,
}

impl Told {
    pub fn header(&self, name: &str) -> String {
        header(&self.head, name).unwrap_or_default()
    }
}

fn header(head: &str, name: &str) -> Option<String> {
    let line = head.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:")));
    line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
}

#[derive(Default)]
struct State {
    paths: HashMap<String, Behaviour>,
    sessions: HashMap<String, Value>,
    asked: BTreeMap<String, usize>,
    connections: usize,
    /// The newest `Authorization` header, and the newest body.
    authorization: String,
    body: String,
    /// All requests with a body, as they came.
    told: Vec<Told>,
    /// What `Cache-Control` says, in seconds.
    max_age: Option<u64>,
}

pub struct AuthService {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    serving: Option<JoinHandle<()>>,
}

impl AuthService {
    pub async fn start() -> AuthService {
        AuthService::start_at(([127, 0, 0, 1], 0).into()).await
    }

    pub async fn start_at(address: SocketAddr) -> AuthService {
        let mut service = AuthService { address, state: Arc::default(), serving: None };
        service.set(INTROSPECT, Behaviour::Introspect);
        service.back().await;
        service
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Listens again, at the same address.
    pub async fn back(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let state = self.state.clone();
        self.serving = Some(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                state.lock().unwrap().connections += 1;
                connections.spawn(serve(stream, state.clone()));
            }
        }));
    }

    /// Nobody listens any more, and open connections are cut.
    pub async fn gone(&mut self) {
        let serving = self.serving.take().unwrap();
        serving.abort();
        assert!(serving.await.is_err());
    }

    pub fn set(&self, path: &str, behaviour: Behaviour) {
        self.state.lock().unwrap().paths.insert(path.to_owned(), behaviour);
    }

    /// Publishes these keys.
    pub fn publish(&self, keys: &[&Key]) {
        let keys: Vec<Value> = keys.iter().map(|key| key.public()).collect();
        self.set(KEYS, Behaviour::Answer(200, json!({"keys": keys}).to_string()));
    }

    /// For how many seconds answers are good, as they say.
    pub fn set_max_age(&self, seconds: u64) {
        self.state.lock().unwrap().max_age = Some(seconds);
    }

    /// How often a path was asked for.
    pub fn asked(&self, path: &str) -> usize {
        self.state.lock().unwrap().asked.get(path).copied().unwrap_or(0)
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    pub fn authorization(&self) -> String {
        self.state.lock().unwrap().authorization.clone()
    }

    pub fn body(&self) -> String {
        self.state.lock().unwrap().body.clone()
    }

    /// All that it was told, in order.
    pub fn told(&self) -> Vec<Told> {
        self.state.lock().unwrap().told.clone()
    }

    /// A session of a user of the tests' tenant, which is open from now on.
    pub fn log_in(&self, session: &str, user: &str) {
        self.log_in_with(session, user, json!({}));
    }

    pub fn log_in_with(&self, session: &str, user: &str, more: Value) {
        let mut said =
            json!({"active": true, "sub": user, "tenant": super::TENANT, "exp": weft::clock::now_s() + 3_600});
        said.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.state.lock().unwrap().sessions.insert(session.to_owned(), said);
    }

    pub fn log_out(&self, session: &str) {
        self.state.lock().unwrap().sessions.remove(session);
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut read = Vec::new();
    loop {
        let head = loop {
            if let Some(at) = read.windows(4).position(|it| it == b"\r\n\r\n") {
                break at + 4;
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer).await {
                Ok(n) if n > 0 => read.extend_from_slice(&buffer[..n]),
                _ => return,
            }
        };
        let text = String::from_utf8(read[..head].to_vec()).unwrap();
        let length: usize = header(&text, "content-length").map_or(0, |it| it.parse().unwrap());
        while read.len() < head + length {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer).await {
                Ok(n) if n > 0 => read.extend_from_slice(&buffer[..n]),
                _ => return,
            }
        }
        let body = String::from_utf8(read[head..head + length].to_vec()).unwrap();
        read.drain(..head + length);

        let path = text.split(' ').nth(1).unwrap().to_owned();
        let behaviour = {
            let mut state = state.lock().unwrap();
            let asked = state.asked.entry(path.clone()).or_default();
            *asked += 1;
            let asked = *asked;
            state.authorization = header(&text, "authorization").unwrap_or_default();
            state.body.clone_from(&body);
            if !body.is_empty() {
                state.told.push(Told { head: text.clone(), body: body.clone() });
            }
            match state.paths.get(&path).cloned().unwrap_or(Behaviour::Answer(404, "{}".to_owned())) {
                Behaviour::Every(n, _, then) if asked.is_multiple_of(n) => *then,
                Behaviour::Every(_, otherwise, _) => *otherwise,
                other => other,
            }
        };
        if !act(&mut stream, behaviour, &body, &state).await {
            return;
        }
    }
}

/// `false`: the connection is over.
async fn act(stream: &mut TcpStream, behaviour: Behaviour, body: &str, state: &Mutex<State>) -> bool {
    match behaviour {
        Behaviour::Answer(status, body) => {
            let max_age = state.lock().unwrap().max_age;
            let headers = max_age.map_or(String::new(), |it| format!("cache-control: public, max-age={it}\r\n"));
            answer(stream, status, &body, &headers).await
        }
        Behaviour::Introspect => {
            let asked: HashMap<_, _> = form_urlencoded::parse(body.as_bytes()).into_owned().collect();
            let said = state.lock().unwrap().sessions.get(&asked["token"]).cloned();
            answer(stream, 200, &said.unwrap_or(json!({"active": false})).to_string(), "").await
        }
        Behaviour::Redirect(to) => answer(stream, 302, "", &format!("location: {to}\r\n")).await,
        Behaviour::Events { text, ends } => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
            if stream.write_all(format!("{head}{text}").as_bytes()).await.is_ok() && !ends {
                std::future::pending::<()>().await;
            }
            false
        }
        Behaviour::Giant(bytes) => answer(stream, 200, &"x".repeat(bytes), "").await,
        Behaviour::Hang => {
            std::future::pending::<()>().await;
            false
        }
        Behaviour::Trickle => {
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n";
            let mut open = stream.write_all(head.as_bytes()).await.is_ok();
            while open {
                // The pace of the attack, and nothing that a test waits for.
                tokio::time::sleep(Duration::from_secs(1)).await;
                open = stream.write_all(b" ").await.is_ok();
            }
            false
        }
        Behaviour::HangUp => false,
        Behaviour::Every(..) => unreachable!("chosen before"),
    }
}

async fn answer(stream: &mut TcpStream, status: u16, body: &str, headers: &str) -> bool {
    let length = body.len();
    let reply = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
    stream.write_all(reply.as_bytes()).await.is_ok()
}

/// A key pair, by its name.
pub struct Key {
    pub kid: String,
    algorithm: Algorithm,
    key: EncodingKey,
}

impl Key {
    /// An Ed25519 key; one for each number.
    pub fn ed(kid: &str, number: u8) -> Key {
        // RFC 8410: what stands before the 32 bytes of a private key in PKCS #8.
        let mut der = vec![0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        der.extend([number; 32]);
        Key { kid: kid.to_owned(), algorithm: Algorithm::EdDSA, key: EncodingKey::from_ed_der(&der) }
    }

    pub fn rsa(kid: &str) -> Key {
        let key = EncodingKey::from_rsa_pem(include_bytes!("rsa-of-the-tests.pem")).unwrap();
        Key { kid: kid.to_owned(), algorithm: Algorithm::RS256, key }
    }

    fn public(&self) -> Value {
        let mut key = serde_json::to_value(Jwk::from_encoding_key(&self.key, self.algorithm).unwrap()).unwrap();
        key["kid"] = json!(self.kid);
        key["use"] = json!("sig");
        key
    }

    /// A token of a user of the tests' tenant.
    pub fn token(&self, user: &str) -> String {
        self.token_with(user, json!({}))
    }

    pub fn token_with(&self, user: &str, more: Value) -> String {
        self.sign(&self.kid, user, more)
    }

    /// Signed by this key, whatever it says of that.
    pub fn sign(&self, kid: &str, user: &str, more: Value) -> String {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(self.algorithm) };
        let mut all = serde_json::to_value(claims(user, "")).unwrap();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        jsonwebtoken::encode(&header, &all, &self.key).unwrap()
    }
}
