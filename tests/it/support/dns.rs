//! A DNS server on loopback, which says what the test says (RFC 1035, RFC 2782).

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

const A: u16 = 1;
const SRV: u16 = 33;

/// What a name has, with the seconds that it is good for.
#[derive(Clone)]
pub enum Records {
    A(u32, Vec<Ipv4Addr>),
    /// Priority, port and target.
    Srv(u32, Vec<(u16, u16, &'static str)>),
}

#[derive(Default)]
struct State {
    names: HashMap<String, Records>,
    asked: HashMap<String, usize>,
    silent: bool,
}

pub struct Dns {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    serving: JoinHandle<()>,
}

impl Dns {
    pub async fn start() -> Dns {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (address, state) = (socket.local_addr().unwrap(), Arc::<Mutex<State>>::default());
        let serving = tokio::spawn(serve(socket, state.clone()));
        Dns { address, state, serving }
    }

    pub fn set(&self, name: &str, records: Records) {
        self.state.lock().unwrap().names.insert(name.to_owned(), records);
    }

    /// From now on it answers nothing.
    pub fn fall_silent(&self) {
        self.state.lock().unwrap().silent = true;
    }

    pub fn asked(&self, name: &str) -> usize {
        self.state.lock().unwrap().asked.get(name).copied().unwrap_or(0)
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(socket: UdpSocket, state: Arc<Mutex<State>>) {
    let mut query = [0; 512];
    while let Ok((n, from)) = socket.recv_from(&mut query).await {
        let reply = {
            let mut state = state.lock().unwrap();
            let (name, kind, end) = question(&query[..n]);
            *state.asked.entry(name.clone()).or_default() += 1;
            (!state.silent).then(|| answer(&query[..end], kind, state.names.get(&name)))
        };
        if let Some(reply) = reply {
            socket.send_to(&reply, from).await.unwrap();
        }
    }
}

/// The name and the kind that a query asks for, and where that ends.
fn question(query: &[u8]) -> (String, u16, usize) {
    let (mut at, mut name) = (12, Vec::new());
    while query[at] > 0 {
        let end = at + 1 + usize::from(query[at]);
        name.push(String::from_utf8(query[at + 1..end].to_ascii_lowercase()).unwrap());
        at = end;
    }
    (name.join("."), u16::from_be_bytes([query[at + 1], query[at + 2]]), at + 5)
}

fn answer(question: &[u8], kind: u16, records: Option<&Records>) -> Vec<u8> {
    let (ttl, answers): (u32, Vec<Vec<u8>>) = match records {
        Some(Records::A(ttl, addresses)) if kind == A => {
            (*ttl, addresses.iter().map(|it| it.octets().to_vec()).collect())
        }
        Some(Records::Srv(ttl, services)) if kind == SRV => (*ttl, services.iter().map(service).collect()),
        _ => (0, Vec::new()),
    };
    // An answer, recursion available; and whether there is such a name.
    let flags: u16 = if records.is_some() { 0x8180 } else { 0x8183 };
    let mut reply = question[..2].to_vec();
    for word in [flags, 1, answers.len() as u16, 0, 0] {
        reply.extend(word.to_be_bytes());
    }
    reply.extend(&question[12..]);
    for data in answers {
        // The name is that of the question.
        reply.extend([0xc0, 0x0c]);
        reply.extend(kind.to_be_bytes());
        reply.extend(1u16.to_be_bytes());
        reply.extend(ttl.to_be_bytes());
        reply.extend((data.len() as u16).to_be_bytes());
        reply.extend(data);
    }
    reply
}

fn service((priority, port, target): &(u16, u16, &'static str)) -> Vec<u8> {
    let mut data = [priority.to_be_bytes(), 0u16.to_be_bytes(), port.to_be_bytes()].concat();
    for label in target.split('.') {
        data.push(label.len() as u8);
        data.extend(label.as_bytes());
    }
    data.push(0);
    data
}
