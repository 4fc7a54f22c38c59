//! How long it takes after a deploy until every client has what it missed: all were connected, all are gone, events are
//! published meanwhile, and all come back at once and resume.

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
/// Unanswered publishes to one thread, while the clients are gone.
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

/// Someone who was here.
struct Client {
    token: String,
    thread: String,
    /// The newest seq that it has.
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
        return Err("without clients, missed events and handshakes there is nothing to measure".into());
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
    let (sockets, took) = tokio::time::timeout(PATIENCE, all_level(coming)).await??;
    let seconds = begin.elapsed().as_secs_f64();
    nothing_twice(sockets).await?;

    let replayed = args.clients as f64 * args.missed as f64;
    let at = |quantile| millis(took.value_at_quantile(quantile)) / 1000.0;
    Ok(vec![
        Figure::less(&format!("{name}: all level after"), seconds, "s"),
        Figure::more(&format!("{name}: replayed"), replayed / seconds, "events/s"),
        Figure::less(&format!("{name}: refused"), shared.refused.get() as f64, "times").at_most(0.0),
        Figure::less(&format!("{name}: one client, P50"), at(0.5), "s"),
        Figure::less(&format!("{name}: one client, slowest"), at(1.0), "s"),
    ])
}

/// All are subscribed at the same time, and then gone.
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
            false => Err(format!("the head is {head}, and not everyone was {} events before it", args.missed).into()),
        }
    };
    tokio::time::timeout(PATIENCE, target.many(groups.len(), publish)).await??;
    Ok(())
}

/// Connects, resumes, and reads until it is level: every seq once, in order. Gives how long that took, too.
async fn come_back(shared: Rc<Return>, client: Client) -> Result<(Socket, Duration), Failure> {
    let turn = shared.handshakes.acquire().await?;
    let begin = Instant::now();
    let mut socket = connect(&shared, &client.token).await?;
    drop(turn);
    let Client { thread, seq: after, .. } = client;
    socket.queue_text(&format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}","after":{after}}}"#));
    let head = after + shared.missed;
    let (mut last, mut subscribed, mut level) = (after, false, false);
    while !level {
        socket
            .exchange(|reply| {
                match reply {
                    Reply::Subscribed { after: behind } if behind == after && !subscribed => subscribed = true,
                    Reply::Event { seq, .. } if subscribed && seq == last + 1 => last = seq,
                    Reply::CaughtUp { seq } if seq == head && last == head && !level => level = true,
                    other => return Err(format!("behind seq {last} of {head} came {other:?}").into()),
                }
                Ok(())
            })
            .await?;
    }
    Ok((socket, begin.elapsed()))
}

/// Tries again when it is refused, as a client does, and counts that.
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

/// Their connections stay open, as those of real clients would.
async fn all_level(mut coming: Coming) -> Result<(Vec<Socket>, Histogram<u64>), Failure> {
    let (mut sockets, mut took) = (Vec::new(), micros()?);
    while let Some(done) = coming.join_next().await {
        let (socket, time) = done??;
        sockets.push(socket);
        took.saturating_record(time.as_micros() as u64);
    }
    Ok((sockets, took))
}

/// Asks each connection for a last answer: no event comes before it.
async fn nothing_twice(sockets: Vec<Socket>) -> Result<(), Failure> {
    for mut socket in sockets {
        socket.queue_text(r#"{"type":"ping","id":2}"#);
        let mut answered = false;
        while !answered {
            let asked = socket.exchange(|reply| match reply {
                Reply::Pong => {
                    answered = true;
                    Ok(())
                }
                other => Err(format!("once level came {other:?}").into()),
            });
            tokio::time::timeout(PATIENCE, asked).await??;
        }
    }
    Ok(())
}
