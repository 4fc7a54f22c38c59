//! Whether a publish takes longer when others publish as well: the mean for many users against the mean for one, each
//! publishing at the same rate. Where an idle disk or processor takes time to wake, that makes the many look better than they
//! are; so they are also compared with one user who publishes as much as all of them.
//!
//! One user and many are measured alternately, and only measurements of the same round are compared, since what else the
//! machine does changes from minute to minute. The figures are medians over the rounds.

use crate::latency::{Measured, Talk};
use crate::report::{Figure, median};
use crate::target::{Target, progress};
use weft::cli::common::Failure;

/// A user who only listens for longer would have to answer pings.
const LONGEST_SILENCE_SECONDS: u64 = 20;

#[derive(Debug, Clone, clap::Args)]
pub struct CrowdArgs {
    /// The many users, in pairs; the one has a partner who only listens.
    #[arg(long, default_value_t = 30)]
    pub users: usize,
    /// Publishes a second of each user. The one publishes at this rate, and then at that of all the many together.
    #[arg(long, default_value_t = 33)]
    pub rate: usize,
    /// Of one measurement.
    #[arg(long, default_value_t = 2)]
    pub seconds: u64,
    /// Rounds, each of one user and of many; the figures are their medians.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
}

impl Default for CrowdArgs {
    fn default() -> CrowdArgs {
        CrowdArgs { users: 30, rate: 33, seconds: 2, rounds: 5, payload: 256 }
    }
}

/// Means in milliseconds.
struct Means {
    published: f64,
    delivered: f64,
}

/// Measurements right after one another.
struct Round {
    one: Means,
    /// One user with the rate of all the many together.
    fast: Means,
    many: Means,
}

impl From<Measured> for Means {
    fn from(measured: Measured) -> Means {
        Means { published: measured.published.mean() / 1000.0, delivered: measured.delivered.mean() / 1000.0 }
    }
}

pub async fn run(target: &Target, args: &CrowdArgs) -> Result<Vec<Figure>, Failure> {
    let (users, each) = (args.users, args.rate);
    progress(&format!("one user and {users}, {each}/s each"));
    if users < 2 || users % 2 == 1 || each == 0 || args.rounds == 0 || args.seconds == 0 {
        return Err("--users must be even, and --rate, --rounds and --seconds at least 1".into());
    }
    if args.seconds > LONGEST_SILENCE_SECONDS {
        return Err(format!("--seconds must be at most {LONGEST_SILENCE_SECONDS}").into());
    }
    let mut rounds = Vec::new();
    for round in 0..args.rounds {
        let talk = |what, speakers: usize, rate| Talk {
            what,
            first: round * users / 2,
            pairs: speakers.div_ceil(2),
            speakers,
            rate,
            seconds: args.seconds,
            payload: args.payload,
        };
        rounds.push(Round {
            one: talk("alone", 1, each).measure(target).await?.into(),
            fast: talk("alone-fast", 1, each * users).measure(target).await?.into(),
            many: talk("crowd", users, each * users).measure(target).await?.into(),
        });
    }
    Ok(figures(args, &rounds))
}

fn figures(args: &CrowdArgs, rounds: &[Round]) -> Vec<Figure> {
    let (users, each, all) = (args.users, args.rate, args.users * args.rate);
    let mut figures = Vec::new();
    for (what, of) in [("published", (|it| it.published) as fn(&Means) -> f64), ("delivered", |it| it.delivered)] {
        let over = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value));
        let ratio = |to: &dyn Fn(&Round) -> f64| over(&|round| of(&round.many) / to(round));
        let against = format!("{what}: mean of {users} users / mean of one");
        figures.extend([
            Figure::less(&format!("{what} mean, one user {each}/s"), over(&|round| of(&round.one)), "ms"),
            Figure::less(&format!("{what} mean, one user {all}/s"), over(&|round| of(&round.fast)), "ms"),
            Figure::less(&format!("{what} mean, {users} users {each}/s each"), over(&|round| of(&round.many)), "ms"),
            Figure::less(&against, ratio(&|round| of(&round.one)), "times"),
            Figure::less(&format!("{against} with {all}/s"), ratio(&|round| of(&round.fast)), "times"),
        ]);
    }
    figures
}
