//! How long one publish takes, at a rate that does not wait for the server.
//!
//! Users talk in pairs, one thread a pair, both subscribed. Publishes are due at fixed moments, whatever the server does,
//! and time runs from the moment at which one was due: a stall counts for all that should have been sent meanwhile.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::{JoinSet, spawn_blocking};

use super::publisher::{Frame, number_in, number_of};
use super::reply::Reply;
use super::report::{Figure, micros, millis};
use super::socket::Reader;
use super::target::{Target, progress, raise_open_files};
use crate::cli::common::Failure;

const WARM_UP_SECONDS: u64 = 1;
const GRACE: Duration = Duration::from_secs(30);
/// A user who is silent for longer would have to answer pings, and nobody here does.
const LONGEST_SILENCE_SECONDS: usize = 10;

#[derive(Debug, Clone, clap::Args)]
pub struct LatencyArgs {
    /// Users, in pairs.
    #[arg(long, default_value_t = 30)]
    pub users: usize,
    /// Publishes a second, by all users in turn.
    #[arg(long, default_value_t = 1000)]
    pub rate: usize,
    #[arg(long, default_value_t = 10)]
    pub seconds: u64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for LatencyArgs {
    fn default() -> LatencyArgs {
        LatencyArgs { users: 30, rate: 1000, seconds: 10, payload: 256 }
    }
}

/// When which publish is due. The n-th is user n modulo users'.
#[derive(Debug, Clone, Copy)]
struct Plan {
    start: Instant,
    rate: u64,
    users: u64,
    total: u64,
}

impl Plan {
    fn due(&self, number: u64) -> Instant {
        self.start + Duration::from_nanos(number * 1_000_000_000 / self.rate)
    }

    fn by(&self, number: u64) -> u64 {
        number % self.users
    }

    /// How many publishes are this user's.
    fn of(&self, user: u64) -> u64 {
        (self.total + self.users - 1 - user) / self.users
    }

    fn counts(&self, number: u64) -> bool {
        number >= self.rate * WARM_UP_SECONDS
    }
}

struct Measured {
    published: Histogram<u64>,
    delivered: Histogram<u64>,
}

pub async fn run(target: &Target, args: &LatencyArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("{} users {}/s", args.users, args.rate);
    progress(&format!("latency, {name}"));
    if args.users < 2 || args.users % 2 == 1 || args.rate == 0 || args.users > args.rate * LONGEST_SILENCE_SECONDS {
        return Err(format!("users must be even, and each publish at least every {LONGEST_SILENCE_SECONDS} s").into());
    }
    raise_open_files(args.users + 100)?;
    let mut readers = Vec::new();
    let mut mouths = Vec::new();
    for pair in target.many(args.users / 2, async |pair| pair_up(target, args, &name, pair).await).await? {
        for (reader, writer, frame) in pair {
            readers.push(reader);
            mouths.push((writer, frame));
        }
    }

    let plan = Plan {
        start: Instant::now() + Duration::from_millis(200),
        rate: args.rate as u64,
        users: args.users as u64,
        total: args.rate as u64 * (args.seconds + WARM_UP_SECONDS),
    };
    let mut listeners = JoinSet::new();
    for (user, reader) in readers.into_iter().enumerate() {
        listeners.spawn_local(listen(reader, user as u64, plan));
    }
    // The mouths come back with the result: a writer that is dropped ends its connection, and answers are still to come.
    let talker = spawn_blocking(move || (talk(&mut mouths, plan), mouths));
    let patience = Duration::from_secs(args.seconds + WARM_UP_SECONDS) + GRACE;
    let measured = tokio::time::timeout(patience, gather(listeners)).await??;
    let (late, _mouths) = talker.await?;
    Ok(figures(&name, &measured, &late?))
}

fn figures(name: &str, measured: &Measured, late: &Histogram<u64>) -> Vec<Figure> {
    let at = |histogram: &Histogram<u64>, quantile| millis(histogram.value_at_quantile(quantile));
    vec![
        Figure::less(&format!("published P50, {name}"), at(&measured.published, 0.5), "ms"),
        Figure::less(&format!("published P99, {name}"), at(&measured.published, 0.99), "ms"),
        Figure::less(&format!("delivered P50, {name}"), at(&measured.delivered, 0.5), "ms"),
        Figure::less(&format!("delivered P99, {name}"), at(&measured.delivered, 0.99), "ms"),
        Figure::less(&format!("sent late P99, {name} (in the above)"), at(late, 0.99), "ms"),
    ]
}

type Voice = (Reader, OwnedWriteHalf, Frame);

/// Two users in a thread of their own, subscribed and silent.
async fn pair_up(target: &Target, args: &LatencyArgs, name: &str, pair: usize) -> Result<[Voice; 2], Failure> {
    let what = format!("latency-{}", name.split(' ').next().unwrap_or_default());
    let thread = target.name(&what, pair);
    let users = [target.name(&what, 2 * pair), target.name(&what, 2 * pair + 1)];
    target.thread(&thread, &users[0], &users[1..]).await?;
    let subscribe = format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}"}}"#);
    let mut voices = Vec::new();
    for user in &users {
        let mut socket = target.socket(user).await?;
        socket.queue_text(&subscribe);
        socket.wait_for(|reply| matches!(reply, Reply::CaughtUp { .. }).then_some(())).await?;
        voices.push((socket.reader, socket.writer, Frame::publish(&thread, args.payload, false)));
    }
    voices.try_into().map_err(|_| "a pair is two".into())
}

/// Reads until every event of the pair and every answer to this user has come.
async fn listen(mut reader: Reader, user: u64, plan: Plan) -> Result<Measured, Failure> {
    let mut measured = Measured { published: micros()?, delivered: micros()? };
    let (mut answers, mut events) = (plan.of(user), plan.of(user) + plan.of(user ^ 1));
    let mut last_seq = None;
    while answers > 0 || events > 0 {
        reader
            .read(|reply| match reply {
                Reply::Published { id, .. } => {
                    let number = number_of(id)?;
                    answers = answers.checked_sub(1).ok_or("one answer too many")?;
                    record(&mut measured.published, plan, number);
                    Ok(())
                }
                Reply::Event { seq, raw } => {
                    let number = number_in(raw).ok_or("an event that nobody here published")?;
                    if last_seq.is_some_and(|last: u64| seq != last + 1) {
                        return Err(format!("seq {seq} came after {last_seq:?}").into());
                    }
                    last_seq = Some(seq);
                    events = events.checked_sub(1).ok_or("one event too many")?;
                    if plan.by(number) != user {
                        record(&mut measured.delivered, plan, number);
                    }
                    Ok(())
                }
                other => Err(format!("{other:?} in the middle of a conversation").into()),
            })
            .await?;
    }
    Ok(measured)
}

fn record(histogram: &mut Histogram<u64>, plan: Plan, number: u64) {
    if plan.counts(number) {
        histogram.saturating_record(plan.due(number).elapsed().as_micros() as u64);
    }
}

async fn gather(mut listeners: JoinSet<Result<Measured, Failure>>) -> Result<Measured, Failure> {
    let mut all = Measured { published: micros()?, delivered: micros()? };
    while let Some(done) = listeners.join_next().await {
        let measured = done??;
        all.published.add(measured.published)?;
        all.delivered.add(measured.delivered)?;
    }
    Ok(all)
}

/// Publishes when it is due, from a thread of its own: tokio's timers count whole milliseconds, which is longer than what
/// is measured. Gives how late this thread itself was.
fn talk(mouths: &mut [(OwnedWriteHalf, Frame)], plan: Plan) -> Result<Histogram<u64>, Failure> {
    let mut late = micros()?;
    for number in 0..plan.total {
        let due = plan.due(number);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if plan.counts(number) {
            late.saturating_record(due.elapsed().as_micros() as u64);
        }
        let (writer, frame) = &mut mouths[plan.by(number) as usize];
        write_all(writer, frame.numbered(number), due)?;
    }
    Ok(late)
}

fn write_all(writer: &OwnedWriteHalf, mut bytes: &[u8], due: Instant) -> Result<(), Failure> {
    while !bytes.is_empty() {
        match writer.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock && due.elapsed() < GRACE => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_publish_is_somebodys() {
        let plan = Plan { start: Instant::now(), rate: 1000, users: 30, total: 11_007 };
        let counted: u64 = (0..30).map(|user| plan.of(user)).sum();
        assert_eq!(counted, plan.total);
        assert_eq!(plan.of(3), (0..plan.total).filter(|n| plan.by(*n) == 3).count() as u64);
    }
}
