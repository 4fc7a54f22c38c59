//! How long one publish takes, at a rate that does not depend on the server (open loop).
//!
//! Users talk in pairs, one thread a pair, both subscribed.

use hdrhistogram::Histogram;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::{JoinSet, spawn_blocking};

use crate::pace::{Plan, talk};
use crate::publisher::{Frame, number_in, number_of};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::Reader;
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

/// A user who is silent for longer would have to answer pings, which these do not.
const LONGEST_SILENCE_SECONDS: usize = 10;

#[derive(Debug, Clone, clap::Args)]
pub struct LatencyArgs {
    /// Users, in pairs.
    #[arg(long, default_value_t = 30)]
    pub users: usize,
    /// Publishes a second, of all users together, who take turns.
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

/// One conversation of all pairs at the same time.
pub struct Talk<'a> {
    /// Keeps its users and threads apart from those of others.
    pub what: &'a str,
    /// The number of its first pair.
    pub first: usize,
    pub pairs: usize,
    /// The users who publish, one after the other; the others only listen.
    pub speakers: usize,
    /// Publishes a second, of all of them.
    pub rate: usize,
    pub seconds: u64,
    pub payload: usize,
}

pub struct Measured {
    pub published: Histogram<u64>,
    pub delivered: Histogram<u64>,
    late: Histogram<u64>,
}

pub async fn run(target: &Target, args: &LatencyArgs) -> Result<Vec<Figure>, Failure> {
    let name = format!("{} users {}/s", args.users, args.rate);
    progress(&format!("latency, {name}"));
    if args.users < 2 || args.users % 2 == 1 || args.rate == 0 || args.users > args.rate * LONGEST_SILENCE_SECONDS {
        return Err(format!("--users must be even, and each publish at least every {LONGEST_SILENCE_SECONDS} s").into());
    }
    let talk = Talk {
        what: &format!("latency-{}", args.users),
        first: 0,
        pairs: args.users / 2,
        speakers: args.users,
        rate: args.rate,
        seconds: args.seconds,
        payload: args.payload,
    };
    let measured = talk.measure(target).await?;
    let at = |histogram: &Histogram<u64>, quantile| millis(histogram.value_at_quantile(quantile));
    Ok(vec![
        Figure::less(&format!("published P50, {name}"), at(&measured.published, 0.5), "ms"),
        Figure::less(&format!("published P99, {name}"), at(&measured.published, 0.99), "ms"),
        Figure::less(&format!("delivered P50, {name}"), at(&measured.delivered, 0.5), "ms"),
        Figure::less(&format!("delivered P99, {name}"), at(&measured.delivered, 0.99), "ms"),
        Figure::less(&format!("sent late P99, {name} (in the above)"), at(&measured.late, 0.99), "ms"),
    ])
}

impl Talk<'_> {
    pub async fn measure(&self, target: &Target) -> Result<Measured, Failure> {
        raise_open_files(2 * self.pairs + 100)?;
        let (mut readers, mut writers) = (Vec::new(), Vec::new());
        for pair in target.many(self.pairs, async |pair| self.pair_up(target, self.first + pair).await).await? {
            for (reader, writer, frame) in pair {
                readers.push(reader);
                writers.push((writer, frame));
            }
        }
        let plan = Plan::new(self.rate, self.speakers, self.seconds);
        let mut listeners = JoinSet::new();
        for (user, reader) in readers.into_iter().enumerate() {
            listeners.spawn_local(listen(reader, user as u64, plan));
        }
        // The thread gives the writers back: one that is dropped ends its connection, and answers are still to come.
        let talker = spawn_blocking(move || (talk(&mut writers, plan), writers));
        let mut measured = tokio::time::timeout(plan.patience(), gather(listeners)).await??;
        let (late, _writers) = talker.await?;
        measured.late = late?;
        Ok(measured)
    }

    /// Two users in a thread of their own, subscribed and silent.
    async fn pair_up(&self, target: &Target, pair: usize) -> Result<[Participant; 2], Failure> {
        let thread = target.name(self.what, pair);
        let users = [target.name(self.what, 2 * pair), target.name(self.what, 2 * pair + 1)];
        target.thread(&thread, &users[0], &users[1..]).await?;
        let mut participants = Vec::new();
        for user in &users {
            let (socket, _) = target.socket(user).await?.subscribed(&thread).await?;
            participants.push((socket.reader, socket.writer, Frame::publish(&thread, self.payload, false)));
        }
        participants.try_into().map_err(|_| "a pair is two".into())
    }
}

type Participant = (Reader, OwnedWriteHalf, Frame);

/// Reads until every event of the pair and every answer to this user has come.
async fn listen(mut reader: Reader, user: u64, plan: Plan) -> Result<Measured, Failure> {
    let mut measured = Measured::new()?;
    let (mut answers, mut events) = (plan.of(user), plan.of(user) + plan.of(user ^ 1));
    let mut last_seq = None;
    while answers > 0 || events > 0 {
        reader
            .read(|reply| match reply {
                Reply::Published { id, .. } => {
                    let number = number_of(id)?;
                    answers = answers.checked_sub(1).ok_or("one answer too many")?;
                    plan.record(&mut measured.published, number);
                    Ok(())
                }
                Reply::Event { seq, raw } => {
                    let number = number_in(raw).ok_or("an event that no user of this bench published")?;
                    if last_seq.is_some_and(|last: u64| seq != last + 1) {
                        return Err(format!("seq {seq} came after {last_seq:?}").into());
                    }
                    last_seq = Some(seq);
                    events = events.checked_sub(1).ok_or("one event too many")?;
                    if plan.by(number) != user {
                        plan.record(&mut measured.delivered, number);
                    }
                    Ok(())
                }
                other => Err(format!("{other:?} in the middle of a conversation").into()),
            })
            .await?;
    }
    Ok(measured)
}

impl Measured {
    fn new() -> Result<Measured, Failure> {
        Ok(Measured { published: micros()?, delivered: micros()?, late: micros()? })
    }
}

async fn gather(mut listeners: JoinSet<Result<Measured, Failure>>) -> Result<Measured, Failure> {
    let mut all = Measured::new()?;
    while let Some(done) = listeners.join_next().await {
        let measured = done??;
        all.published.add(measured.published)?;
        all.delivered.add(measured.delivered)?;
    }
    Ok(all)
}
