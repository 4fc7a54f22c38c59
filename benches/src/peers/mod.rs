//! Other servers under the same load as Weft, beside it in one table: rates, and the processor time that a message costs the
//! server, which a noisy disk cannot spoil. `scripts/bench-peers.sh` starts them; docs/PERFORMANCE.md says how each is set up.
//!
//! All of them are asked by the same client ([`link`]), which speaks the language of each ([`dialect`]). Each answer is checked
//! against what is open, and each reader must get each message once and in order.

mod dialect;
mod frames;
mod got;
mod link;
mod nats;

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use self::dialect::Resume;
use self::frames::Dialect;
use self::got::Got;
use self::link::Link;
use crate::publisher::{Frame, number_of};
use crate::report::Figure;
use crate::target::{Target, TargetArgs, progress, raise_open_files};
use weft::cli::common::Failure;

const WARM_UP: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(180);
const FILL_WINDOW: usize = 256;
/// Clock ticks of `/proc/PID/stat`, which Linux counts in hundredths of a second on every machine.
const TICKS: f64 = 100.0;

#[derive(Debug, clap::Args)]
pub struct PeersArgs {
    /// Which language the server speaks.
    #[arg(long, value_enum)]
    pub peer: Dialect,
    /// Its processes, whose processor time is counted.
    #[arg(long, value_delimiter = ',', required = true)]
    pub pids: Vec<u32>,
    /// How long publishes are counted.
    #[arg(long, default_value_t = 5)]
    pub seconds: u64,
    /// Readers of the fan-out.
    #[arg(long, default_value_t = 1_000)]
    pub readers: usize,
    /// Events of the fan-out.
    #[arg(long, default_value_t = 2_000)]
    pub events: u64,
    /// Messages that the reader misses before it reconnects.
    #[arg(long, default_value_t = 10_000)]
    pub missed: u64,
    /// How often it reconnects, from the same position.
    #[arg(long, default_value_t = 20)]
    pub reconnects: u64,
    /// Bytes of a message.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
    #[command(flatten)]
    pub target: TargetArgs,
}

pub async fn run(args: &PeersArgs) -> Result<Vec<Figure>, Failure> {
    raise_open_files(args.readers + 100)?;
    let peer = Peer { target: Target::new(&args.target)?, dialect: args.peer, args };
    peer.dialect.prepare(&peer.target).await?;
    let mut figures = Vec::new();
    for (clients, window) in [(1, 1), (1, 1024), (32, 16)] {
        figures.extend(peer.publish(clients, window).await?);
    }
    figures.extend(peer.fan_out().await?);
    figures.extend(peer.replay().await?);
    Ok(figures)
}

struct Peer<'a> {
    target: Target,
    dialect: Dialect,
    args: &'a PeersArgs,
}

impl Peer<'_> {
    /// Publishes that are answered, each client to a thread of its own that nobody reads.
    async fn publish(&self, clients: usize, window: usize) -> Result<Vec<Figure>, Failure> {
        let name = format!("{clients} × {window}");
        progress(&name);
        let what = format!("ack-{clients}x{window}");
        let mut publishers = self
            .target
            .many(clients, async |number| self.publisher(&self.target.name(&what, number), window).await)
            .await?;
        publishers = run_until(publishers, Instant::now() + WARM_UP).await?;
        let before: u64 = publishers.iter().map(|publisher| publisher.answered).sum();

        let measured = Measured::begin(&self.args.pids)?;
        publishers = run_until(publishers, Instant::now() + Duration::from_secs(self.args.seconds)).await?;
        let after: u64 = publishers.iter().map(|publisher| publisher.answered).sum();
        measured.figures(&name, "acks/s", after - before)
    }

    async fn fan_out(&self) -> Result<Vec<Figure>, Failure> {
        let name = format!("1 to {}", self.args.readers);
        progress(&name);
        let (thread, owner) = (self.target.name("fanout", 0), self.target.name("owner", 0));
        let users: Vec<_> = (0..self.args.readers).map(|number| self.target.name("reader", number)).collect();
        self.dialect.make_thread(&self.target, &thread, &owner, &users).await?;
        let links = self
            .target
            .many(users.len(), async |number| self.dialect.reader(&self.target, &users[number], &thread).await)
            .await?;
        let mut publisher = self.publisher_as(&owner, &thread, 64).await?;

        let measured = Measured::begin(&self.args.pids)?;
        let mut readers = JoinSet::new();
        for link in links {
            readers.spawn_local(read(link, 0, self.args.events));
        }
        let all = async {
            publisher.run(|sent| sent < self.args.events).await?;
            while let Some(done) = readers.join_next().await {
                done??;
            }
            Ok::<_, Failure>(())
        };
        tokio::time::timeout(PATIENCE, all).await??;
        measured.figures(&name, "deliveries/s", self.args.events * self.args.readers as u64)
    }

    /// A reader that was connected comes back and gets what it has missed, some times from the same position. From the connect
    /// until the last message is there.
    async fn replay(&self) -> Result<Vec<Figure>, Failure> {
        let missed = self.args.missed;
        let name = format!("{missed} missed");
        progress(&name);
        let (thread, user) = (self.target.name("replay", 0), self.target.name("returner", 0));
        let owner = self.target.name("replay-owner", 0);
        self.dialect.make_thread(&self.target, &thread, &owner, std::slice::from_ref(&user)).await?;
        let mut reader = self.dialect.reader(&self.target, &user, &thread).await?;
        let mut publisher = self.publisher_as(&owner, &thread, FILL_WINDOW).await?;
        publisher.run(|sent| sent < 1).await?;
        let mut last_seen = Vec::new();
        while last_seen.is_empty() {
            reader
                .exchange(|got| {
                    if let Got::Message { raw, .. } = got {
                        last_seen = raw.to_vec();
                    }
                    Ok(())
                })
                .await?;
        }
        let resume = Resume { thread, user, ..self.dialect.position(&reader, &publisher.last_answer, &last_seen)? };
        reader.hang_up().await?;
        tokio::time::timeout(PATIENCE, publisher.run(|sent| sent <= missed)).await??;

        let measured = Measured::begin(&self.args.pids)?;
        for _ in 0..self.args.reconnects {
            let back = async {
                let link = self.dialect.resumed(&self.target, &resume).await?;
                read(link, 1, missed + 1).await?.hang_up().await
            };
            tokio::time::timeout(PATIENCE, back).await??;
        }
        measured.figures(&name, "events/s", missed * self.args.reconnects)
    }

    async fn publisher(&self, thread: &str, window: usize) -> Result<Publisher, Failure> {
        self.publisher_as(thread, thread, window).await
    }

    async fn publisher_as(&self, user: &str, thread: &str, window: usize) -> Result<Publisher, Failure> {
        let link = self.dialect.connect(&self.target, user).await?;
        let frame = self.dialect.publish(&link, thread, self.args.payload);
        Ok(Publisher { link, frame, open: vec![None; window], next: 0, answered: 0, last_answer: Vec::new() })
    }
}

/// Reads the messages with these numbers, each once and in order.
async fn read(mut link: Link, from: u64, until: u64) -> Result<Link, Failure> {
    let mut next = from;
    while next < until {
        link.exchange(|got| match got {
            Got::Message { number, .. } if number == next => {
                next += 1;
                Ok(())
            }
            Got::Message { number, .. } => Err(format!("message {number} came, where {next} was due").into()),
            Got::Answer { .. } | Got::Other(_) => Ok(()),
        })
        .await?;
    }
    Ok(link)
}

async fn run_until(publishers: Vec<Publisher>, until: Instant) -> Result<Vec<Publisher>, Failure> {
    let mut running = JoinSet::new();
    for mut publisher in publishers {
        running.spawn_local(async move {
            publisher.run(|_| Instant::now() < until).await?;
            Ok::<_, Failure>(publisher)
        });
    }
    let mut publishers = Vec::new();
    let all = async {
        while let Some(done) = running.join_next().await {
            publishers.push(done??);
        }
        Ok::<_, Failure>(())
    };
    tokio::time::timeout(until + PATIENCE - Instant::now(), all).await??;
    Ok(publishers)
}

struct Publisher {
    link: Link,
    frame: Frame,
    /// The unanswered publishes, at their number modulo the window.
    open: Vec<Option<u64>>,
    next: u64,
    answered: u64,
    last_answer: Vec<u8>,
}

impl Publisher {
    /// Publishes while `more` of the number sent so far is true; then waits for the last answers.
    async fn run(&mut self, mut more: impl FnMut(u64) -> bool) -> Result<(), Failure> {
        let window = self.open.len() as u64;
        let mut sending = true;
        loop {
            while sending && self.open[(self.next % window) as usize].is_none() {
                sending = more(self.next);
                if sending {
                    self.open[(self.next % window) as usize] = Some(self.next);
                    self.link.queue(self.frame.numbered(self.next));
                    self.next += 1;
                }
            }
            if self.answered == self.next {
                return Ok(());
            }
            let Publisher { link, open, answered, last_answer, .. } = self;
            link.exchange(|got| {
                let Got::Answer { id, raw } = got else { return Ok(()) };
                let number = number_of(id)?;
                let slot = &mut open[(number % window) as usize];
                if slot.take() != Some(number) {
                    return Err(format!("publish {number} was answered twice, or never sent").into());
                }
                *answered += 1;
                last_answer.clear();
                last_answer.extend_from_slice(raw);
                Ok(())
            })
            .await?;
        }
    }
}

/// Time and processor time since a moment.
struct Measured<'a> {
    pids: &'a [u32],
    begin: Instant,
    ticks: u64,
}

impl Measured<'_> {
    fn begin(pids: &[u32]) -> Result<Measured<'_>, Failure> {
        Ok(Measured { pids, begin: Instant::now(), ticks: ticks(pids)? })
    }

    /// How many a second, and the server's processor time for each.
    fn figures(&self, name: &str, unit: &str, count: u64) -> Result<Vec<Figure>, Failure> {
        let seconds = self.begin.elapsed().as_secs_f64();
        let processor = (ticks(self.pids)? - self.ticks) as f64 / TICKS;
        Ok(vec![
            Figure::more(name, count as f64 / seconds, unit),
            Figure::less(&format!("{name}: CPU"), processor * 1e6 / count as f64, "µs"),
        ])
    }
}

/// User and system time of processes, with all their threads.
fn ticks(pids: &[u32]) -> Result<u64, Failure> {
    let mut sum = 0;
    for pid in pids {
        let stat =
            std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| format!("process {pid}: {error}"))?;
        // The name of the program, in parentheses, may have spaces.
        let (_, fields) = stat.rsplit_once(") ").ok_or("a /proc/PID/stat without a name")?;
        for field in fields.split(' ').skip(11).take(2) {
            sum += field.parse::<u64>()?;
        }
    }
    Ok(sum)
}
