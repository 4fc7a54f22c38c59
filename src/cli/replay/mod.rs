//! `weft replay`: a thread again, at the pace at which it happened, or faster, or step by step.
//!
//! Events come in pages, and one page is held at a time. Keys are read beside them ([`keys`]).

mod keys;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use self::keys::{Key, Keys};
use super::common::{Failure, Output, Server, Stop, Style, printable, segment, when};
use super::tail::summary;
use crate::client::{ClientEvent, Http, PublishDraft, Resuming, Start};
use crate::clock;
use crate::protocol::command::{FASTEST, SLOWEST};
use crate::protocol::kinds::classify;

/// Events in a page.
const PAGE: u64 = 200;
/// Events that the arrow keys go back or forward by.
const SEEK: u64 = 10;

#[derive(Debug, clap::Args)]
pub struct Args {
    pub thread: String,
    #[command(flatten)]
    pub server: Server,
    /// How many times as fast as it happened.
    #[arg(long, default_value_t = 1.0, value_parser = speed)]
    pub speed: f64,
    /// The longest pause between two events.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub longest: Duration,
    /// Begin with this seq.
    #[arg(long, value_name = "SEQ", default_value_t = 1)]
    pub from: u64,
    /// End with this seq; or, an address (ws://… or http://…): publish the events to that server. May be given once for each.
    #[arg(long, value_name = "SEQ|URL", value_parser = destination)]
    pub to: Vec<Destination>,
    /// The token for that server; else the same.
    #[arg(long, env = "WEFT_TO_TOKEN", hide_env_values = true)]
    pub to_token: Option<String>,
    /// Wait before each event for the enter key, or a line of standard input.
    #[arg(long)]
    pub step: bool,
    /// One JSON object a line.
    #[arg(long)]
    pub json: bool,
}

/// Where a replay goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    Seq(u64),
    Server(String),
}

fn destination(text: &str) -> Result<Destination, String> {
    if ["ws://", "http://"].iter().any(|scheme| text.starts_with(scheme)) {
        return Ok(Destination::Server(text.to_owned()));
    }
    text.parse().map(Destination::Seq).map_err(|_| format!("{text:?} is neither a seq nor an address (ws://…)"))
}

fn speed(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(speed) if (SLOWEST..=FASTEST).contains(&speed) => Ok(speed),
        _ => Err(format!("{text:?} is no speed from {SLOWEST} to {FASTEST}")),
    }
}

impl Args {
    pub fn check(&self) -> Result<(), &'static str> {
        let servers = self.to.iter().filter(|it| matches!(it, Destination::Server(_))).count();
        match servers > 1 || self.to.len() - servers > 1 {
            true => Err("--to takes one seq and one address at most"),
            false => Ok(()),
        }
    }

    fn last(&self) -> u64 {
        let seq = self.to.iter().find_map(|it| if let Destination::Seq(seq) = it { Some(*seq) } else { None });
        seq.unwrap_or(u64::MAX)
    }

    fn server(&self) -> Option<&str> {
        self.to.iter().find_map(|it| if let Destination::Server(url) = it { Some(&**url) } else { None })
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut pages = Pages::open(&args).await?;
    let mut target = match args.server() {
        Some(url) => Some(Target::open(url, &args).await?),
        None => None,
    };
    // Whatever the replay waits for, it ends when it is asked to, and leaves the terminal as it was.
    let mut stop = Stop::new()?;
    tokio::select! {
        played = play(&args, &mut pages, target.as_mut()) => played?,
        () = stop.asked() => {}
    }
    match target {
        Some(target) => target.close().await,
        None => Ok(()),
    }
}

async fn play(args: &Args, pages: &mut Pages, mut target: Option<&mut Target>) -> Result<(), Failure> {
    let out = Output::new();
    let mut player = Player { speed: args.speed, longest: args.longest, paused: args.step, last_at: None };
    let mut keys = Keys::open(args.step);
    while let Some(event) = pages.next().await? {
        match player.wait(&event, &mut keys).await {
            Wait::Over => {}
            Wait::Seek(by) => {
                pages.seek(event.seq.unwrap_or_default(), by);
                continue;
            }
            Wait::Quit => break,
        }
        let text = if args.json { serde_json::to_string(&event)? } else { line(&out, &event) };
        if !out.line(text)? {
            break;
        }
        if let Some(target) = &mut target {
            target.publish(event).await?;
        }
    }
    Ok(())
}

fn line(out: &Output, event: &ClientEvent) -> String {
    let seq = event.seq.unwrap_or_default();
    let from = format!("{:<10}", printable(&event.from));
    let kind = out.paint(style_of(&event.kind), format_args!("{:<15}", printable(&event.kind)));
    format!("#{seq:<5} {} {from} {kind} {}", when(&event.at), summary(&event.kind, &event.data))
}

/// People, agents, tools, failures, and what is about the thread, at a glance.
fn style_of(kind: &str) -> Style {
    match kind {
        "user_message" => Style::Green,
        "agent_message" => Style::Cyan,
        "agent_failed" | "agent_cancelled" | "agent_cancel_requested" => Style::Red,
        "agent_waiting" | "agent_resumed" => Style::Yellow,
        _ if kind.starts_with("tool_") => Style::Magenta,
        _ if kind.starts_with("agent_") => Style::Blue,
        "system_message" => Style::Bold,
        _ => Style::Dim,
    }
}

/// The thread's events in order, read a page at a time.
struct Pages {
    http: Http,
    path: String,
    /// The seq after which the next page begins.
    after: u64,
    first: u64,
    last: u64,
    page: VecDeque<ClientEvent>,
    is_last_page: bool,
}

impl Pages {
    async fn open(args: &Args) -> Result<Pages, Failure> {
        let http = Http::connect(&args.server.url, &args.server.token).await?;
        let path = format!("/v1/threads/{}/events?limit={PAGE}", segment(&args.thread));
        let first = args.from.max(1);
        let (after, page) = (first - 1, VecDeque::new());
        Ok(Pages { http, path, after, first, last: args.last(), page, is_last_page: false })
    }

    async fn next(&mut self) -> Result<Option<ClientEvent>, Failure> {
        if self.page.is_empty() && !self.is_last_page {
            let mut page = self.http.get(&format!("{}&after={}", self.path, self.after)).await?;
            let next = page["next"].as_u64();
            self.page = serde_json::from_value(page["events"].take())?;
            self.is_last_page = next.is_none();
            self.after = next.unwrap_or(self.after);
        }
        Ok(self.page.pop_front().filter(|event| event.seq.is_some_and(|seq| seq <= self.last)))
    }

    /// Goes on so many events before or after the one with this seq.
    fn seek(&mut self, seq: u64, by: i64) {
        self.after = seq.saturating_add_signed(by).max(self.first) - 1;
        self.page.clear();
        self.is_last_page = false;
    }
}

/// What keeps the pace.
struct Player {
    speed: f64,
    longest: Duration,
    paused: bool,
    /// The time of the event before, in milliseconds.
    last_at: Option<u64>,
}

/// How a wait ended.
enum Wait {
    Over,
    /// So many events from here.
    Seek(i64),
    Quit,
}

impl Player {
    /// Waits until it is the event's turn, or somebody presses a key that says otherwise.
    async fn wait(&mut self, event: &ClientEvent, keys: &mut Keys) -> Wait {
        let at = clock::parse_rfc3339(&event.at);
        let begun = Instant::now();
        loop {
            let due = begun + self.pause(at);
            let key = tokio::select! {
                key = keys.next() => key,
                () = tokio::time::sleep_until(due), if !self.paused => break,
            };
            match key {
                Some(Key::Step) => break,
                Some(Key::Pause) => self.paused = !self.paused,
                Some(Key::Faster) => self.speed = (self.speed * 2.0).min(FASTEST),
                Some(Key::Slower) => self.speed = (self.speed / 2.0).max(SLOWEST),
                Some(Key::Back) => return self.seek(-(SEEK as i64)),
                Some(Key::Forward) => return self.seek(SEEK as i64),
                Some(Key::Quit) => return Wait::Quit,
                // No more keys come: with --step there is nothing to wait for.
                None if self.paused => return Wait::Quit,
                None => keys.close(),
            }
        }
        self.last_at = at.or(self.last_at);
        Wait::Over
    }

    fn seek(&mut self, by: i64) -> Wait {
        self.last_at = None;
        Wait::Seek(by)
    }

    /// How long after the event before it an event has its turn.
    fn pause(&self, at: Option<u64>) -> Duration {
        let (Some(at), Some(before)) = (at, self.last_at) else { return Duration::ZERO };
        let happened = Duration::from_millis(at.saturating_sub(before));
        happened.div_f64(self.speed).min(self.longest)
    }
}

/// Another server, which gets the events as publishes of the token's user, in a thread of the same name.
struct Target {
    publisher: Resuming,
    thread: String,
    /// What seqs of the thread are there.
    seqs: HashMap<u64, u64>,
    left_out: u64,
}

impl Target {
    async fn open(url: &str, args: &Args) -> Result<Target, Failure> {
        let token = args.to_token.as_deref().unwrap_or(&args.server.token);
        // The thread may not be there yet; the inbox always is.
        let publisher = Resuming::connect(url, token, "@me", Start::Now).await?;
        Ok(Target { publisher, thread: args.thread.clone(), seqs: HashMap::new(), left_out: 0 })
    }

    async fn publish(&mut self, event: ClientEvent) -> Result<(), Failure> {
        if classify(&event.kind).is_err() {
            // What only a server writes: who is a member there is not ours to say.
            self.left_out += 1;
            return Ok(());
        }
        let draft = PublishDraft {
            thread: self.thread.clone(),
            kind: event.kind,
            data: event.data,
            // Played twice, it is there once.
            key: event.event.map(|event| format!("replay-{event}")),
            run: event.run,
            parent: event.parent.and_then(|parent| self.seqs.get(&parent).copied()),
        };
        let published = self.publisher.publish(draft).await?;
        self.seqs.extend(event.seq.zip(published.seq));
        Ok(())
    }

    async fn close(self) -> Result<(), Failure> {
        if self.left_out > 0 {
            eprintln!("weft replay: {} events that only a server writes were left out", self.left_out);
        }
        Ok(self.publisher.close().await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_events_times_the_speed_and_no_pause_is_longer_than_allowed() {
        let player = |speed, last_at| Player { speed, longest: Duration::from_secs(10), paused: false, last_at };
        assert_eq!(player(4.0, Some(1_000)).pause(Some(3_000)), Duration::from_millis(500));
        assert_eq!(player(0.5, Some(1_000)).pause(Some(3_000)), Duration::from_secs(4));
        assert_eq!(player(1.0, Some(0)).pause(Some(86_400_000)), Duration::from_secs(10), "a night");
        assert_eq!(player(1.0, None).pause(Some(3_000)), Duration::ZERO, "the first");
        assert_eq!(player(1.0, Some(3_000)).pause(Some(1_000)), Duration::ZERO, "clocks of two nodes");
    }

    #[test]
    fn a_replay_goes_to_a_seq_or_to_a_server() {
        assert_eq!(destination("12"), Ok(Destination::Seq(12)));
        assert_eq!(destination("ws://h:1/v1/ws"), Ok(Destination::Server("ws://h:1/v1/ws".into())));
        assert!(destination("h:1").is_err() && speed("0").is_err() && speed("nan").is_err());
    }
}
