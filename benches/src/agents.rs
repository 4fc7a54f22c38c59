//! Agents at work: many runs at a time, each writing a message in deltas, with a reader of its own.
//!
//! A delta (a piece of a message) is due at a fixed moment, whatever the server does; its latency is the time from that
//! moment until its reader has it. Models give their tokens one by one or, over a network, some at a time: both are measured.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::{JoinSet, spawn_blocking};

use crate::pace::{Plan, write_all};
use crate::reply::Reply;
use crate::report::{Figure, micros, millis};
use crate::socket::{Reader, Socket, text_frame};
use crate::target::{Target, progress, raise_open_files};
use weft::cli::common::Failure;

/// Characters of a delta, about as many as a token has.
const CHARS: usize = 5;
/// Deltas that are published together, in the second measurement.
const BURST: usize = 10;
/// Runs that one agent's connection carries.
const RUNS_PER_AGENT: usize = 10;
/// Unanswered publishes, where nothing is merged.
const WINDOW: usize = 1_024;
/// The events of a run, without its deltas.
const EVENTS: [(&str, &str); 5] = [
    ("agent_started", r#"{"agent":"bench"}"#),
    ("agent_thinking", "{}"),
    ("tool_executing", r#"{"tool":"clock","call":"c","arguments":{"zone":"UTC"}}"#),
    ("tool_completed", r#"{"call":"c","result":"12:00"}"#),
    ("agent_completed", r#"{"output":"done","usage":{"input_tokens":100,"output_tokens":200}}"#),
];

#[derive(Debug, Clone, clap::Args)]
pub struct AgentsArgs {
    /// Runs at the same time.
    #[arg(long, default_value_t = 200)]
    pub runs: usize,
    /// Deltas of each run.
    #[arg(long, default_value_t = 200)]
    pub pieces: usize,
    /// Deltas a second of each run.
    #[arg(long, default_value_t = 50)]
    pub rate: usize,
    /// Runs whose events are published as fast as they are answered.
    #[arg(long, default_value_t = 20_000)]
    pub unmerged: usize,
}

impl Default for AgentsArgs {
    fn default() -> AgentsArgs {
        AgentsArgs { runs: 200, pieces: 200, rate: 50, unmerged: 20_000 }
    }
}

/// Deltas published, the records that they became, and bytes appended.
const METRICS: [&str; 3] = ["weft_pieces_received_total", "weft_pieces_appended_total", "weft_append_bytes_total"];

pub async fn run(target: &Target, args: &AgentsArgs) -> Result<Vec<Figure>, Failure> {
    if args.runs == 0 || args.rate == 0 || !args.pieces.is_multiple_of(args.rate) || args.pieces < 2 * args.rate {
        return Err("--pieces must be a multiple of --rate, and at least twice as many".into());
    }
    if !args.rate.is_multiple_of(BURST) {
        return Err(format!("--rate must be a multiple of {BURST}").into());
    }
    raise_open_files(2 * args.runs + 100)?;
    let mut figures = Vec::new();
    for burst in [1, BURST] {
        figures.extend(stream(target, args, burst).await?);
    }
    figures.push(unmerged(target, args.unmerged).await?);
    Ok(figures)
}

/// All runs at once, each publishing its deltas when they are due.
async fn stream(target: &Target, args: &AgentsArgs, burst: usize) -> Result<Vec<Figure>, Failure> {
    let name = format!("{} runs {}/s in {burst}s", args.runs, args.rate);
    progress(&format!("agents, {name}"));
    let what = format!("agents-{burst}");
    let threads: Vec<String> = (0..args.runs).map(|run| target.name(&what, run)).collect();
    let readers = target.many(args.runs, async |run| reader(target, &what, run).await).await?;
    let (writers, mut answers) = start_runs(target, args, &what, &threads).await?;

    let before = target.metrics(METRICS).await?;
    let plan = Plan::new(args.runs * args.rate / burst, args.runs, (args.pieces / args.rate - 1) as u64);
    let mut listeners = JoinSet::new();
    for (run, socket) in readers.into_iter().enumerate() {
        listeners.spawn_local(listen(socket, run as u64, plan, args.pieces, burst));
    }
    let talker = spawn_blocking(move || (talk(&writers, &threads, plan, burst), writers));
    let mut seconds = micros()?;
    let listening = async {
        while let Some(heard) = listeners.join_next().await {
            seconds.add(heard??)?;
        }
        Ok::<_, Failure>(())
    };
    let answering = async {
        while let Some(done) = answers.join_next().await {
            done??;
        }
        Ok(())
    };
    // At the same time, so that an answer that is an error ends the bench at once.
    tokio::time::timeout(plan.patience(), async { tokio::try_join!(listening, answering) }).await??;
    // Kept until here: a writer that is dropped ends its connection.
    let (talked, _writers) = talker.await?;
    talked?;
    let after = target.metrics(METRICS).await?;
    let [deltas, records, bytes] = [0, 1, 2].map(|n| after[n] - before[n]);
    let saved = Figure::more(&format!("pieces per record, {name}"), deltas / records, "times");
    let at = |quantile| millis(seconds.value_at_quantile(quantile));
    Ok(vec![
        Figure::less(&format!("piece at its reader P50, {name}"), at(0.5), "ms"),
        Figure::less(&format!("piece at its reader P99, {name}"), at(0.99), "ms"),
        saved,
        Figure::less(&format!("appended per piece, {name}"), bytes / deltas, "B"),
    ])
}

/// Connects the agents and publishes the events that come before the deltas of each run. Gives each agent's writer, and
/// the tasks that read the answers to the deltas.
async fn start_runs(
    target: &Target,
    args: &AgentsArgs,
    what: &str,
    threads: &[String],
) -> Result<(Vec<OwnedWriteHalf>, JoinSet<Result<(), Failure>>), Failure> {
    let mut writers = Vec::new();
    let mut answers = JoinSet::new();
    for agent in 0..args.runs.div_ceil(RUNS_PER_AGENT) {
        let mut socket = target.agent(&target.name(what, agent)).await?;
        let runs = agent * RUNS_PER_AGENT..args.runs.min((agent + 1) * RUNS_PER_AGENT);
        for run in runs.clone() {
            for (kind, data) in &EVENTS[..4] {
                socket.queue(&event(&threads[run], "r", kind, data));
            }
        }
        answered(&mut socket, runs.len() * 4).await?;

        let Socket { reader, writer, .. } = socket;
        writers.push(writer);
        answers.spawn_local(read_answers(reader, runs.len() * args.pieces));
    }
    Ok((writers, answers))
}

/// The reader of a run, on the run's own thread.
async fn reader(target: &Target, what: &str, run: usize) -> Result<Socket, Failure> {
    let (thread, user) = (target.name(what, run), target.name("reader", run));
    target.thread(&thread, &user, &[]).await?;
    Ok(target.socket(&user).await?.subscribed(&thread).await?.0)
}

fn event(thread: &str, run: &str, kind: &str, data: &str) -> Vec<u8> {
    let command =
        format!(r#"{{"type":"publish","id":1,"thread":"{thread}","kind":"{kind}","run":"{run}","data":{data}}}"#);
    text_frame(command.as_bytes())
}

/// Waits until so many events are answered.
async fn answered(socket: &mut Socket, count: usize) -> Result<(), Failure> {
    let mut left = count;
    while left > 0 {
        socket
            .exchange(|reply| match reply {
                Reply::Published { .. } => {
                    left = left.checked_sub(1).ok_or("one answer too many")?;
                    Ok(())
                }
                other => Err(format!("an agent that subscribed to nothing got {other:?}").into()),
            })
            .await?;
    }
    Ok(())
}

async fn read_answers(mut reader: Reader, mut left: usize) -> Result<(), Failure> {
    while left > 0 {
        reader
            .read(|reply| match reply {
                Reply::DeltaPublished { .. } => {
                    left = left.checked_sub(1).ok_or("one answer too many")?;
                    Ok(())
                }
                other => Err(format!("an agent that publishes deltas got {other:?}").into()),
            })
            .await?;
    }
    Ok(())
}

/// Publishes deltas when they are due, each run's burst in one write.
fn talk(writers: &[OwnedWriteHalf], threads: &[String], plan: Plan, burst: usize) -> Result<(), Failure> {
    for number in 0..plan.total {
        let due = plan.due(number);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let run = plan.by(number) as usize;
        let first = number as usize / threads.len() * burst;
        let mut frames = Vec::new();
        for delta in first..first + burst {
            let data = format!(r#"{{"message":"m","from_char":{},"text":"{delta:>CHARS$}"}}"#, delta * CHARS);
            frames.extend(event(&threads[run], "r", "agent_token", &data));
        }
        write_all(&writers[run / RUNS_PER_AGENT], &frames, due)?;
    }
    Ok(())
}

/// Reads until every delta of the run has come, in order.
async fn listen(
    mut socket: Socket,
    run: u64,
    plan: Plan,
    deltas: usize,
    burst: usize,
) -> Result<Histogram<u64>, Failure> {
    let mut seconds = micros()?;
    let (mut chars, runs) = (0, plan.speakers());
    while chars < deltas * CHARS {
        socket
            .exchange(|reply| match reply {
                // The events before the deltas.
                Reply::Event { .. } => Ok(()),
                Reply::Delta { from_char, text } => {
                    if from_char != chars as u64 {
                        return Err(format!("a delta from character {from_char} came after {chars} characters").into());
                    }
                    for delta in chars / CHARS..(chars + text) / CHARS {
                        plan.record(&mut seconds, (delta / burst) as u64 * runs + run);
                    }
                    chars += text;
                    Ok(())
                }
                other => Err(format!("a reader got {other:?}").into()),
            })
            .await?;
    }
    Ok(seconds)
}

/// Whole runs without deltas, one after the other, as fast as they are answered.
async fn unmerged(target: &Target, runs: usize) -> Result<Figure, Failure> {
    progress("agents, nothing merged");
    let mut socket = target.agent(&target.name("unmerged", 0)).await?;
    let threads: Vec<String> = (0..64).map(|n| target.name("unmerged", n)).collect();
    let (begin, total) = (Instant::now(), runs * EVENTS.len());
    let (mut sent, mut done) = (0, 0);
    while done < total {
        while sent < total && sent - done < WINDOW {
            let (run, step) = (sent / EVENTS.len(), sent % EVENTS.len());
            let (kind, data) = EVENTS[step];
            socket.queue(&event(&threads[run % threads.len()], &format!("r{run}"), kind, data));
            sent += 1;
        }
        socket
            .exchange(|reply| match reply {
                Reply::Published { .. } => {
                    done += 1;
                    Ok(())
                }
                other => Err(format!("an agent that subscribed to nothing got {other:?}").into()),
            })
            .await?;
    }
    let rate = total as f64 / begin.elapsed().max(Duration::from_micros(1)).as_secs_f64();
    Ok(Figure::more("agent events, nothing merged", rate, "/s"))
}
