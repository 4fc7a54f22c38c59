//! How fast events are found by their words: how many a second get into the index, how long a search takes, and how long after
//! its publish an event is found.
//!
//! Beside it, in the same run, what tantivy takes with the same texts and questions: the library that the server's index is made
//! with. It has no users, no stems beside the words as they are, and gives no events.

mod raw;
mod texts;

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use self::raw::Raw;
use self::texts::{Random, Vocabulary};
use crate::fill;
use crate::report::{Figure, micros, millis};
use crate::target::{Target, progress};
use weft::cli::common::{Failure, segment};
use weft::client::Http;

const INDEXED: &str = "weft_search_indexed_total";
/// The index may be behind by so much: events a second that it takes at the least, and a beginning.
const SLOWEST: u64 = 1_000;
const BEGINS_WITHIN: Duration = Duration::from_secs(30);
/// Hits that are asked for.
const HITS: usize = 10;
/// Characters of a prefix.
const PREFIX: usize = 3;
/// How long an event may take to be found.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, clap::Args)]
pub struct SearchArgs {
    /// Events that are searched.
    #[arg(long, default_value_t = 200_000)]
    pub events: u64,
    /// Threads that they are in, all of one user.
    #[arg(long, default_value_t = 1_000)]
    pub threads: usize,
    /// Different words of their texts, by Zipf's law; 5 to 44 are a text.
    #[arg(long, default_value_t = 50_000)]
    pub words: usize,
    /// Searches of each kind.
    #[arg(long, default_value_t = 500)]
    pub searches: u64,
    /// Events that are published and then searched for, one at a time.
    #[arg(long, default_value_t = 200)]
    pub fresh: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Word,
    Words,
    Phrase,
    Prefix,
}

const KINDS: [(Kind, &str); 4] =
    [(Kind::Word, "one word"), (Kind::Words, "two words"), (Kind::Phrase, "a phrase"), (Kind::Prefix, "a prefix")];

/// What is searched for: words that stand in one of the texts.
struct Question {
    kind: Kind,
    words: Vec<String>,
}

impl Question {
    fn new(kind: Kind, text: &str, random: &mut Random) -> Question {
        let words: Vec<&str> = text.split(' ').collect();
        let at = random.below(words.len() as u64 - 1) as usize;
        let chosen = match kind {
            Kind::Word => vec![words[at].to_owned()],
            Kind::Words => vec![words[at].to_owned(), words[random.below(words.len() as u64) as usize].to_owned()],
            Kind::Phrase => vec![words[at].to_owned(), words[at + 1].to_owned()],
            Kind::Prefix => vec![words[at].chars().take(PREFIX).collect()],
        };
        Question { kind, words: chosen }
    }

    /// The best ten; of a prefix the newest, as somebody who types wants them.
    fn path(&self) -> String {
        let words = self.words.join(" ");
        let (q, order) = match self.kind {
            // The space says that the last word is whole.
            Kind::Word | Kind::Words => (format!("{words} "), "relevance"),
            Kind::Phrase => (format!("\"{words}\""), "relevance"),
            Kind::Prefix => (format!("{words}*"), "newest"),
        };
        format!("/v1/search?q={}&order={order}&limit={HITS}", segment(&q))
    }
}

pub async fn run(target: &Target, args: &SearchArgs) -> Result<Vec<Figure>, Failure> {
    if args.words < 2 || args.events == 0 {
        return Err("there must be an event, and two words".into());
    }
    // A tenant of its own: what other benches have published is not searched.
    let target = target.of_tenant(&target.name("search", 0));
    let vocabulary = Vocabulary::new(args.words);
    let (user, threads) = (target.name("reader", 0), fill::names(&target, "search", args.threads));
    if let Err(error) = target.http(&user).await?.get("/v1/search?q=nothing").await {
        return Err(format!("the server does not search: {error}").into());
    }

    progress(&format!("{} events, until they are in the index", args.events));
    let before = target.metric(INDEXED).await?;
    let begun = Instant::now();
    let data = |number| json!({"content": vocabulary.text(number)});
    fill::fill(&target, &user, &threads, args.events, data).await?;
    let within = BEGINS_WITHIN + Duration::from_secs(args.events / SLOWEST);
    target.metric_when(INDEXED, within, |now| now >= before + args.events as f64).await?;
    let indexed = args.events as f64 / begun.elapsed().as_secs_f64();

    progress("the same texts with tantivy bare");
    let folder = std::env::temp_dir().join(target.name("weft-bench-search", 0));
    let raw = Raw::index(&folder, (0..args.events as usize).map(|number| vocabulary.text(number as u64)))?;
    // Not before: a connection that asks for nothing ends.
    let mut http = target.http(&user).await?;
    let mut figures = vec![
        Figure::more("published and indexed", indexed, "events/s"),
        Figure::more("indexed by tantivy bare", raw.indexed, "events/s"),
    ];
    for (kind, name) in KINDS {
        progress(&format!("{} searches for {name}", args.searches));
        figures.extend(searches(&mut http, &raw, &vocabulary, args, kind, name).await?);
    }
    progress(&format!("{} events that are searched for once they are published", args.fresh));
    let found = fresh(&mut http, &threads[0], args.fresh).await?;
    figures.extend(percentiles("published to found", &found));
    Ok(figures)
}

/// The same questions to both, one after the other, in turns.
async fn searches(
    http: &mut Http,
    raw: &Raw,
    vocabulary: &Vocabulary,
    args: &SearchArgs,
    kind: Kind,
    name: &str,
) -> Result<Vec<Figure>, Failure> {
    let (mut weft, mut bare) = (micros()?, micros()?);
    let (mut random, mut partial) = (Random::new(kind as u64), 0u64);
    for _ in 0..args.searches {
        let question = Question::new(kind, &vocabulary.text(random.below(args.events)), &mut random);
        let path = question.path();
        let begun = Instant::now();
        let page = http.get(&path).await?;
        weft.record(begun.elapsed().as_micros() as u64)?;
        let begun = Instant::now();
        let hits = raw.ask(&question)?;
        bare.record(begun.elapsed().as_micros() as u64)?;
        partial += u64::from(page["partial"] == true);
        let found = page["hits"].as_array().map_or(0, Vec::len);
        // Stems find more, never less, up to what is asked for; a search that was broken off may have less.
        if hits == 0 || (found < hits && page["partial"] != true) {
            return Err(format!("{found} hits, and {hits} of tantivy bare, for {:?}", question.words).into());
        }
    }
    let mut figures = percentiles(name, &weft);
    figures.extend(percentiles(&format!("{name}, tantivy bare"), &bare));
    if partial > 0 {
        figures.push(Figure::less(&format!("{name}: broken off"), partial as f64, "searches"));
    }
    Ok(figures)
}

fn percentiles(name: &str, times: &Histogram<u64>) -> Vec<Figure> {
    let at = |quantile| millis(times.value_at_quantile(quantile));
    vec![Figure::less(&format!("{name}, P50"), at(0.5), "ms"), Figure::less(&format!("{name}, P99"), at(0.99), "ms")]
}

/// From the answer to each publish until a search has given its event.
async fn fresh(http: &mut Http, thread: &str, count: u64) -> Result<Histogram<u64>, Failure> {
    let mut times = micros()?;
    for number in 0..count {
        // A word that no other text has.
        let word = format!("fresh{number}");
        let event = json!({"kind": "user_message", "data": {"content": word}});
        let published = http.post(&format!("/v1/threads/{thread}/events"), &event).await?;
        let begun = Instant::now();
        let path = format!("/v1/search?q={}&limit=1", segment(&format!("\"{word}\"")));
        loop {
            let page = http.get(&path).await?;
            let elapsed = begun.elapsed();
            match &page["hits"][0]["seq"] {
                Value::Null if elapsed < PATIENCE => {}
                seq if *seq == published["seq"] => {
                    times.record(elapsed.as_micros() as u64)?;
                    break;
                }
                other => return Err(format!("{word} is {}, and {other} was found", published["seq"]).into()),
            }
        }
    }
    Ok(times)
}
