//! `weft demo`: a conversation of two people and an agent over real WebSockets, to be followed in a terminal.
//!
//! In the middle Ben's socket is dropped without a close frame; he reconnects and resumes after the last seq he saw. At the
//! end each reader must have seen 1…n, each once and in order, or the demo fails. One of the events is work of a queue, which a
//! worker takes, answers and settles.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::common::{Failure, Mint, Output, Style, mint};
use super::tail::summary;
use crate::client::{
    ClientEvent, ClientItem, ConsumeDraft, Http, PublishDraft, Resuming, SettleDraft, Start, Worker, WorkerItem,
};
use crate::clock;
use crate::protocol::kinds::{
    AGENT_COMPLETED, AGENT_MESSAGE, AGENT_STARTED, AGENT_THINKING, AGENT_TOKEN, TOOL_COMPLETED, TOOL_EXECUTING,
    USER_MESSAGE,
};

/// How long one event may take to reach a reader.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kind of what is put into a queue.
const REPORT: &str = "x.report_wanted";
/// Between two lines on a terminal, so that a person can follow.
const READING_PAUSE: Duration = Duration::from_millis(350);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the server is.
    #[arg(long, env = "WEFT_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The secret that the server verifies tokens with.
    #[arg(long, env = "WEFT_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: String,
    /// The tenant to play in.
    #[arg(long, default_value = "demo")]
    pub tenant: String,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mint = |sub: &str, scope: &str| mint(&args.jwt_secret, &args.tenant, sub, scope, 600);
    play(&args.url, &mint).await?;
    Ok(())
}

/// Plays the demo against the server at `url`; gives the thread it played in.
pub async fn play(url: &str, mint: Mint<'_>) -> Result<String, Failure> {
    let id = clock::random_id().simple().to_string();
    // A UUID has 32 digits; eight are enough to keep one demo apart from another.
    let thread = format!("demo-{}", &id[..8]);
    let mut demo = Demo::open(url, mint, &thread).await?;
    demo.question().await?;
    demo.work().await?;
    demo.answer().await?;
    demo.queue(url, mint).await?;
    demo.verify()?;
    demo.leave().await;
    Ok(thread)
}

struct DemoReader {
    name: &'static str,
    style: Style,
    events: Resuming,
    seen: Vec<u64>,
    /// The answer as far as it has been written.
    text: String,
    away: bool,
}

struct Demo {
    out: Output,
    thread: String,
    readers: Vec<DemoReader>,
    /// The newest seq that was published.
    head: u64,
}

const ADA: usize = 0;
const BEN: usize = 1;
const SCOUT: usize = 2;
const CAST: [(&str, Style, &str); 3] = [
    ("ada", Style::Cyan, "publish subscribe"),
    ("ben", Style::Magenta, "publish subscribe"),
    ("scout", Style::Yellow, "publish subscribe agent"),
];

impl Demo {
    async fn open(url: &str, mint: Mint<'_>, thread: &str) -> Result<Demo, Failure> {
        let out = Output::new();
        out.line(out.paint(Style::Bold, format_args!("thread {thread}: ada, ben and the agent scout")))?;
        let mut http = Http::connect(url, &mint(CAST[ADA].0, CAST[ADA].2)?).await?;
        http.put(&format!("/v1/threads/{thread}"), &json!({ "title": "The nightly import" })).await?;
        for member in [BEN, SCOUT] {
            http.put(&format!("/v1/threads/{thread}/members/{}", CAST[member].0), &json!({})).await?;
        }
        let made = http.get(&format!("/v1/threads/{thread}")).await?;
        let head = made["head"].as_u64().ok_or("the server sent no head for the new thread")?;

        let mut demo = Demo { out, thread: thread.to_owned(), readers: Vec::new(), head };
        for (name, style, scope) in CAST {
            let events = Resuming::connect(url, &mint(name, scope)?, thread, Start::After(0)).await?;
            demo.readers.push(DemoReader { name, style, events, seen: Vec::new(), text: String::new(), away: false });
        }
        demo.gather(1).await?;
        Ok(demo)
    }

    async fn question(&mut self) -> Result<(), Failure> {
        self.say(ADA, "The nightly import failed twice this week. Do you know why, Ben?").await?;
        self.say(BEN, "No. Scout, can you find out what the two nights have in common?").await
    }

    async fn work(&mut self) -> Result<(), Failure> {
        self.agent(AGENT_STARTED, json!({"agent": "scout", "input": "what do the two nights have in common?"})).await?;
        self.agent(AGENT_THINKING, json!({"content": "The logs first, then the changes."})).await?;
        let arguments = json!({"service": "import", "level": "error", "days": 7});
        self.agent(TOOL_EXECUTING, json!({"tool": "search_logs", "call": "c1", "arguments": arguments})).await?;
        self.cut_ben()?;
        let result = json!({"hits": 2, "message": "disk quota exceeded"});
        self.agent(TOOL_COMPLETED, json!({"call": "c1", "result": result})).await?;
        let arguments = json!({"path": "/srv/import"});
        self.agent(TOOL_EXECUTING, json!({"tool": "disk_usage", "call": "c2", "arguments": arguments})).await?;
        let result = json!({"used": "98%", "largest": "/srv/import/archive"});
        self.agent(TOOL_COMPLETED, json!({"call": "c2", "result": result})).await?;
        self.bring_ben_back().await
    }

    async fn answer(&mut self) -> Result<(), Failure> {
        let text = "Both nights ran out of disk: the archive in /srv/import is never pruned.";
        self.write("answer", text).await?;
        self.agent(AGENT_MESSAGE, json!({"message": "answer"})).await?;
        self.agent(AGENT_COMPLETED, json!({"output": "found the cause"})).await?;
        self.say(BEN, "I had lost my connection, and it's all here. I'll prune the archive.").await
    }

    /// Ada wants a report: work of a group, which whoever works for it takes, answers and settles.
    async fn queue(&mut self, url: &str, mint: Mint<'_>) -> Result<(), Failure> {
        // A group of this demo alone, so that it gets nothing but this.
        let group = format!("reports-of-{}", self.thread);
        let mut admin = Http::connect(url, &mint("root", "admin")?).await?;
        admin.put(&format!("/v1/groups/{group}"), &json!({ "kinds": [REPORT] })).await?;
        let wants = ConsumeDraft { group: group.clone(), credit: 1, lease_ms: None };
        let mut clerk = Worker::connect(url, &mint("clerk", "agent")?, wants).await?;
        self.publish(ADA, REPORT, json!({"content": "A report for Monday, please."}), None).await?;

        let late = |_| format!("the worker has got no work within {PATIENCE:?}");
        let WorkerItem::Work(work) = timeout(PATIENCE, clerk.next()).await.map_err(late)?? else {
            return Err("the worker has lost its connection".into());
        };
        let taken = format!("  ⚙   a worker of {group} takes #{}, attempt {}", self.head, work.attempt);
        self.out.line(self.out.paint(Style::Blue, taken))?;
        let answer = PublishDraft {
            thread: self.thread.clone(),
            kind: AGENT_MESSAGE.to_owned(),
            data: json!({"content": "Here it is: two nights, one full disk."}),
            parent: work.event["seq"].as_u64(),
            ..PublishDraft::default()
        };
        let refused = |not_done| format!("the worker was refused: {not_done:?}");
        let next = self.head + 1;
        self.head = clerk.publish(&answer).await.map_err(refused)?.seq.ok_or("the server sent no seq")?;
        let done = SettleDraft { delivery: work.delivery, outcome: "done", ..SettleDraft::default() };
        clerk.settle(&done).await.map_err(refused)?;
        self.gather(next).await?;
        self.out.line(self.out.paint(Style::Blue, "  ✓   and settles it: done"))?;

        clerk.close().await?;
        admin.delete(&format!("/v1/groups/{group}")).await?;
        self.say(ADA, "Thank you all.").await
    }

    /// The agent writes a message some words at a time, and all who are connected see it grow.
    async fn write(&mut self, message: &str, text: &str) -> Result<(), Failure> {
        let words: Vec<&str> = text.split_inclusive(' ').collect();
        let mut from_char = 0;
        for words in words.chunks(5) {
            let delta = words.concat();
            let to_char = from_char + delta.chars().count();
            let data = json!({"message": message, "from_char": from_char, "text": delta});
            self.send(SCOUT, AGENT_TOKEN, data, Some("run-1")).await?;
            let mut shown = None;
            for reader in &mut self.readers {
                shown = reader.read_text(to_char).await?.or(shown);
            }
            if let Some(event) = shown {
                self.show(&event).await?;
            }
            from_char = to_char;
        }
        Ok(())
    }

    async fn say(&mut self, who: usize, text: &str) -> Result<(), Failure> {
        self.publish(who, USER_MESSAGE, json!({ "content": text }), None).await
    }

    async fn agent(&mut self, kind: &str, data: Value) -> Result<(), Failure> {
        self.publish(SCOUT, kind, data, Some("run-1")).await
    }

    /// Publishes, and shows the event once everybody who is connected has it.
    async fn publish(&mut self, who: usize, kind: &str, data: Value, run: Option<&str>) -> Result<(), Failure> {
        let seq = self.send(who, kind, data, run).await?.ok_or("the server sent no seq")?;
        let next = self.head + 1;
        self.head = seq;
        self.gather(next).await
    }

    async fn send(&mut self, who: usize, kind: &str, data: Value, run: Option<&str>) -> Result<Option<u64>, Failure> {
        let draft = PublishDraft {
            thread: self.thread.clone(),
            kind: kind.to_owned(),
            data,
            run: run.map(str::to_owned),
            ..PublishDraft::default()
        };
        let late = |_| format!("{kind} by {} was not answered within {PATIENCE:?}", CAST[who].0);
        Ok(timeout(PATIENCE, self.readers[who].events.publish(draft)).await.map_err(late)??.seq)
    }

    /// Waits until every connected reader has seen the head, and shows the events from `from` on.
    async fn gather(&mut self, from: u64) -> Result<(), Failure> {
        let mut shown = Vec::new();
        for reader in self.readers.iter_mut().filter(|reader| !reader.away) {
            let events = reader.read_up_to(self.head).await?;
            if shown.is_empty() {
                shown = events;
            }
        }
        for event in shown.iter().filter(|event| event.seq >= Some(from)) {
            self.show(event).await?;
        }
        Ok(())
    }

    async fn show(&self, event: &ClientEvent) -> Result<(), Failure> {
        if self.out.is_terminal() {
            sleep(READING_PAUSE).await;
        }
        let out = &self.out;
        let style = self.readers.iter().find(|r| r.name == event.from).map_or(Style::Dim, |r| r.style);
        let here: Vec<_> = self.readers.iter().filter(|r| !r.away).map(|r| r.name).collect();
        let seen = out.paint(Style::Green, format_args!("seen by {}", here.join(" ")));
        out.line(format_args!("{}  {seen}", self.row(event, style)))?;
        Ok(())
    }

    fn row(&self, event: &ClientEvent, style: Style) -> String {
        // A delta has no seq.
        let seq = event.seq.map_or_else(|| "~".to_owned(), |seq| format!("#{seq}"));
        let from = self.out.paint(style, format_args!("{:<6}", event.from));
        let kind = self.out.paint(Style::Dim, format_args!("{:<15}", event.kind));
        format!("{seq:>4}  {from} {kind} {}", summary(&event.kind, &event.data))
    }

    fn cut_ben(&mut self) -> Result<(), Failure> {
        let ben = &mut self.readers[BEN];
        ben.events.cut();
        ben.away = true;
        let last = ben.seen.last().copied().unwrap_or_default();
        let line = format!("  ✂   ben's socket is cut, without a close; the last he saw is #{last}");
        self.out.line(self.out.paint(Style::Red, line))?;
        Ok(())
    }

    async fn bring_ben_back(&mut self) -> Result<(), Failure> {
        let head = self.head;
        let ben = &mut self.readers[BEN];
        let after = ben.seen.last().copied().unwrap_or_default();
        let missed = ben.read_up_to(head).await?;
        ben.away = false;
        let line = format!("  ↻   ben is back and resumes with \"after\": {after}");
        self.out.line(self.out.paint(Style::Green, line))?;
        for event in &missed {
            let row = self.row(event, self.readers[SCOUT].style);
            self.out.line(format_args!("{row}  {}", self.out.paint(Style::Green, "ben catches up")))?;
        }
        Ok(())
    }

    fn verify(&self) -> Result<(), Failure> {
        self.out.line("")?;
        for reader in &self.readers {
            if !reader.seen.iter().copied().eq(1..=self.head) {
                let name = reader.name;
                return Err(format!("{name} should have seen 1…{} but saw {:?}", self.head, reader.seen).into());
            }
            let name = self.out.paint(reader.style, reader.name);
            self.out.line(format_args!("{name} saw 1…{}, each once and in order", self.head))?;
        }
        Ok(())
    }

    /// Closes the connections. The demo is checked by now, so an error in closing does not fail it.
    async fn leave(self) {
        for reader in self.readers {
            if let Err(error) = reader.events.close().await {
                tracing::debug!(%error, "on leaving");
            }
        }
    }
}

impl DemoReader {
    async fn read_up_to(&mut self, seq: u64) -> Result<Vec<ClientEvent>, Failure> {
        let name = self.name;
        let late = |_| format!("{name} has not seen #{seq} within {PATIENCE:?}");
        let mut events = Vec::new();
        let reading = async {
            while self.seen.last().is_none_or(|last| *last < seq) {
                events.extend(self.read_one().await?.filter(|event| event.seq.is_some()));
            }
            Ok::<_, Failure>(())
        };
        timeout(PATIENCE, reading).await.map_err(late)??;
        Ok(events)
    }

    /// Reads until the text that is being written has so many characters; gives the newest delta.
    async fn read_text(&mut self, chars: usize) -> Result<Option<ClientEvent>, Failure> {
        let name = self.name;
        let late = |_| format!("{name} has not seen {chars} characters within {PATIENCE:?}");
        let reading = async {
            let mut newest = None;
            while self.text.chars().count() < chars {
                newest = self.read_one().await?.or(newest);
            }
            Ok::<_, Failure>(newest)
        };
        timeout(PATIENCE, reading).await.map_err(late)?
    }

    /// Reads one item; gives it if it is an event.
    async fn read_one(&mut self) -> Result<Option<ClientEvent>, Failure> {
        let ClientItem::Event(event) = self.events.next().await? else { return Ok(None) };
        match event.seq {
            Some(seq) => self.seen.push(seq),
            None => self.text.push_str(event.data["text"].as_str().unwrap_or_default()),
        }
        Ok(Some(*event))
    }
}
