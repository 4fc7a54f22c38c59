//! How long it takes after a deploy until every client has what it missed: all were connected, all are disconnected, events
//! are published meanwhile, and all reconnect at once and resume.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::publisher::{Frame, Publisher};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::Socket;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

const CONNECTIONS: &str = "weft_connections";
/// Unanswered publishes to one thread, while the clients are disconnected.
const WINDOW: usize = 16;
/// How soon a client that was refused tries again, and how often.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const ATTEMPTS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug, Clone, clap::Args)]
pub struct ReconnectArgs {
    /// Clients, each a user of its own.
    #[arg(long, default_value_t = 5000)]
    pub clients: usize,
    /// Events that each client has missed.
    #[arg(long, default_value_t = 100)]
    pub missed: u64,
    /// Clients that read the same thread.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub together: u16,
    /// Handshakes under way at the same time; the server's accept queue has room for 4,096.
    #[arg(long, default_value_t = 1024)]
    pub at_once: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for ReconnectArgs {
    fn default() -> ReconnectArgs {
        ReconnectArgs { clients: 5000, missed: 100, together: 50, at_once: 1024, payload: 256 }
    }
}

/// A client that was connected.
struct Client {
    token: String,
    thread: String,
    /// The newest seq it has seen.
    seq: u64,
}

/// What all clients that come back share.
struct Return {
    target: Target,
    missed: u64,
    handshakes: Semaphore,
    refused: Cell<usize>,
}

pub async fn run(target: &Target, args: &ReconnectArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("reconnect, {} clients missed {}", args.clients, args.missed);
    progress(&name);
    if args.clients == 0 || args.missed == 0 || args.at_once == 0 {
        return Err("--clients, --missed and --at-once must be at least 1".into());
    }
    raise_open_files(args.clients + 200)?;
    let clients = once_connected(target, args).await?;
    publish_what_they_miss(target, args, &clients).await?;

    let shared = Rc::new(Return {
        target: target.clone(),
        missed: args.missed,
        handshakes: Semaphore::new(args.at_once),
        refused: Cell::new(0),
    });
    let begin = Instant::now();
    let mut coming = JoinSet::new();
    for client in clients {
        coming.spawn_local(come_back(shared.clone(), client));
    }
    let (sockets, times) = tokio::time::timeout(PATIENCE, all_caught_up(coming)).await??;
    let seconds = begin.elapsed().as_secs_f64();
    check_nothing_more(sockets).await?;

    let replayed = args.clients as f64 * args.missed as f64;
    let at = |quantile| millis(times.value_at_quantile(quantile)) / 1000.0;
    Ok(vec![
        Figure::less(&format!("{name}: all level after"), seconds, "s"),
        Figure::more(&format!("{name}: replayed"), replayed / seconds, "events/s"),
        Figure::less(&format!("{name}: refused"), shared.refused.get() as f64, "times").at_most(0.0),
        Figure::less(&format!("{name}: one client, P50"), at(0.5), "s"),
        Figure::less(&format!("{name}: one client, slowest"), at(1.0), "s"),
    ])
}

/// Connects all clients at the same time, and disconnects them.
async fn once_connected(target: &Target, args: &ReconnectArgs) -> Result<Vec<Client>, Failure> {
    let users: Vec<_> = (0..args.clients).map(|number| target.name("reconnect", number)).collect();
    let groups: Vec<_> = users.chunks(usize::from(args.together)).collect();
    let make =
        async |number: usize| target.thread(&thread(target, number), &owner(target, number), groups[number]).await;
    target.many(groups.len(), make).await?;

    let before = target.metric(CONNECTIONS).await?;
    let connect = async |number: usize| {
        let token = target.token(&users[number])?;
        let thread = thread(target, number / usize::from(args.together));
        let (socket, seq) = target.socket_with(&token).await?.subscribed(&thread).await?;
        Ok((socket, Client { token, thread, seq }))
    };
    let (sockets, clients): (Vec<_>, Vec<_>) = target.many(args.clients, connect).await?.into_iter().unzip();
    drop(sockets);
    target.down_to(CONNECTIONS, before).await?;
    Ok(clients)
}

fn thread(target: &Target, number: usize) -> String {
    target.name("reconnect-thread", number)
}

fn owner(target: &Target, number: usize) -> String {
    target.name("reconnect-owner", number)
}

async fn publish_what_they_miss(target: &Target, args: &ReconnectArgs, clients: &[Client]) -> Result<(), Failure> {
    let groups: Vec<_> = clients.chunks(usize::from(args.together)).collect();
    let publish = async |number: usize| {
        let frame = Frame::publish(&thread(target, number), args.payload, false);
        let mut publisher = Publisher::open(target, &owner(target, number), frame, WINDOW).await?;
        publisher.run(|sent| sent < args.missed, |_, _| ()).await?;
        let head = publisher.last_seq()?;
        match groups[number].iter().all(|client| client.seq + args.missed == head) {
            true => Ok(()),
            false => {
                Err(format!("the head is {head}, and not every client was {} events before it", args.missed).into())
            }
        }
    };
    tokio::time::timeout(PATIENCE, target.many(groups.len(), publish)).await??;
    Ok(())
}

/// Connects, resumes, and reads until it has caught up: every seq once, in order. Gives the time from the handshake on.
async fn come_back(shared: Rc<Return>, client: Client) -> Result<(Socket, Duration), Failure> {
    let permit = shared.handshakes.acquire().await?;
    let begin = Instant::now();
    let mut socket = connect(&shared, &client.token).await?;
    drop(permit);
    let Client { thread, seq: after, .. } = client;
    socket.queue_text(&format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}","after":{after}}}"#));
    let head = after + shared.missed;
    let (mut last, mut subscribed, mut caught_up) = (after, false, false);
    while !caught_up {
        socket
            .exchange(|reply| {
                match reply {
                    Reply::Subscribed { after: from } if from == after && !subscribed => subscribed = true,
                    Reply::Event { seq, .. } if subscribed && seq == last + 1 => last = seq,
                    Reply::CaughtUp { seq } if seq == head && last == head && !caught_up => caught_up = true,
                    other => return Err(format!("after seq {last} of {head} came {other:?}").into()),
                }
                Ok(())
            })
            .await?;
    }
    Ok((socket, begin.elapsed()))
}

/// Tries again when it is refused, as a client does, and counts the refusals.
async fn connect(shared: &Return, token: &str) -> Result<Socket, Failure> {
    for _ in 1..ATTEMPTS {
        if let Ok(socket) = shared.target.socket_with(token).await {
            return Ok(socket);
        }
        shared.refused.set(shared.refused.get() + 1);
        tokio::time::sleep(AGAIN_AFTER).await;
    }
    shared.target.socket_with(token).await
}

type Coming = JoinSet<Result<(Socket, Duration), Failure>>;

/// Keeps the connections open, as real clients do. Gives how long each client took.
async fn all_caught_up(mut coming: Coming) -> Result<(Vec<Socket>, Histogram<u64>), Failure> {
    let (mut sockets, mut times) = (Vec::new(), micros()?);
    while let Some(done) = coming.join_next().await {
        let (socket, time) = done??;
        sockets.push(socket);
        times.saturating_record(time.as_micros() as u64);
    }
    Ok((sockets, times))
}

/// Pings on each connection: no event may come before the pong.
async fn check_nothing_more(sockets: Vec<Socket>) -> Result<(), Failure> {
    for mut socket in sockets {
        socket.queue_text(r#"{"type":"ping","id":2}"#);
        let mut answered = false;
        while !answered {
            let asked = socket.exchange(|reply| match reply {
                Reply::Pong => {
                    answered = true;
                    Ok(())
                }
                other => Err(format!("after catching up came {other:?}").into()),
            });
            tokio::time::timeout(PATIENCE, asked).await??;
        }
    }
    Ok(())
}
