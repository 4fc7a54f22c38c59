//! A command that works on one event: the event on its standard input, its answer on its standard output.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tokio::sync::mpsc::Sender;

use crate::client::ClientWork;

/// The most that a command may answer: what an event may hold.
const MAX_ANSWER: usize = 64 << 10;
/// Of what it writes to standard error, so much of the end is kept for its last line.
const MAX_COMPLAINT: usize = 8 << 10;
/// The most characters that a reason has.
const MAX_REASON: usize = 1_000;

/// It will never succeed with this event: EX_DATAERR of sysexits.h.
const EX_DATAERR: i32 = 65;

/// A command that runs, or has ended. Dropping it leaves it alone.
pub struct Job {
    /// The process, and the group of all that it starts.
    id: u32,
    ended: Arc<AtomicBool>,
}

/// A command that has ended.
pub struct Ended {
    /// What it worked on.
    pub delivery: String,
    pub result: io::Result<Run>,
}

pub struct Run {
    status: ExitStatus,
    /// What it wrote to standard output, without the white space at its end.
    answer: String,
    /// The last line that it wrote to standard error.
    complaint: Option<String>,
}

/// What is to become of the event.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done, with an answer that is to be published unless it is empty.
    Done(String),
    Retry(String),
    Reject(String),
}

/// Runs a command in a shell for one event; `ended` hears of its end.
pub fn start(command: &str, work: &ClientWork, ended: Sender<Ended>) -> io::Result<Job> {
    let text = |name: &str| match &work.event[name] {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut child = Command::new("sh")
        .args(["-c", command])
        .env("WEFT_GROUP", &work.group)
        .env("WEFT_THREAD", text("thread"))
        .env("WEFT_SEQ", text("seq"))
        .env("WEFT_ATTEMPT", work.attempt.to_string())
        .env("WEFT_DELIVERY", &work.delivery)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that Ctrl-C asks this command to finish, and not those that it runs to stop.
        .process_group(0)
        .spawn()?;

    let job = Job { id: child.id(), ended: Arc::default() };
    let (has_ended, delivery) = (job.ended.clone(), work.delivery.clone());
    let event = format!("{}\n", work.event);
    let follow = move || {
        let result = follow(&mut child, event);
        has_ended.store(true, Ordering::Release);
        // Whoever started it may have given up.
        ended.blocking_send(Ended { delivery, result }).unwrap_or(());
    };
    thread::Builder::new().name("job".to_owned()).spawn(follow).inspect_err(|_| job.terminate())?;
    Ok(job)
}

impl Job {
    /// Asks the command and all that it started to end.
    #[expect(unsafe_code, reason = "the standard library sends no signals")]
    pub fn terminate(&self) {
        let Ok(group) = i32::try_from(self.id) else { return };
        if !self.ended.load(Ordering::Acquire) {
            // SAFETY: it reads no memory. The group is the child's own, which was not waited for when `ended` was read.
            unsafe { libc::kill(-group, libc::SIGTERM) };
        }
    }
}

/// Writes the event and reads what the command says, all at once, so that neither side waits for the other; until it ends.
fn follow(child: &mut Child, event: String) -> io::Result<Run> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (answer, complaint) = thread::scope(|scope| {
        let writing = thread::Builder::new().spawn_scoped(scope, move || {
            // A command need not read it.
            stdin.map(|mut stdin| stdin.write_all(event.as_bytes()))
        });
        let complaining = thread::Builder::new().spawn_scoped(scope, move || stderr.map(read_complaint));
        let mut answer = Vec::new();
        let read = stdout.map_or(Ok(0), |stdout| stdout.take(MAX_ANSWER as u64 + 1).read_to_end(&mut answer));
        drop(writing?.join());
        let complaint = complaining?.join().ok().flatten().flatten();
        read.map(|_| (answer, complaint))
    })?;
    let status = child.wait()?;
    if answer.len() > MAX_ANSWER {
        return Err(io::Error::other(format!("its answer is larger than {MAX_ANSWER} bytes")));
    }
    let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
    Ok(Run { status, answer, complaint })
}

/// Passes on what a command writes to standard error; gives its last line.
fn read_complaint(mut stderr: impl Read) -> Option<String> {
    let (mut tail, mut chunk) = (Vec::new(), [0; 4 << 10]);
    loop {
        match stderr.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => {
                // Nobody may be there to read it.
                drop(io::stderr().write_all(&chunk[..n]));
                tail.extend_from_slice(&chunk[..n]);
                tail.drain(..tail.len().saturating_sub(MAX_COMPLAINT));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    last_line(&String::from_utf8_lossy(&tail))
}

fn last_line(text: &str) -> Option<String> {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(line.chars().take(MAX_REASON).collect())
}

/// What the end of a command means.
pub fn outcome(result: io::Result<Run>) -> Outcome {
    let run = match result {
        Ok(run) => run,
        Err(error) => return Outcome::Retry(error.to_string()),
    };
    let why = || run.complaint.clone().unwrap_or_else(|| ending(run.status));
    match run.status.code() {
        Some(0) => Outcome::Done(run.answer),
        Some(EX_DATAERR) => Outcome::Reject(why()),
        _ => Outcome::Retry(why()),
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the command ended with {code}"),
        (None, Some(signal)) => format!("the command was ended by signal {signal}"),
        (None, None) => "the command ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::sync::mpsc::channel;

    use super::*;

    fn run(command: &str, content: &str) -> Outcome {
        let event = json!({"thread": "t", "seq": 7, "data": {"content": content}});
        let work = ClientWork { delivery: "d".into(), group: "g".into(), attempt: 2, lease_ms: 1_000, event };
        let (sender, mut ended) = channel(1);
        start(command, &work, sender).expect("a shell");
        let ended = ended.blocking_recv().expect("it ends");
        assert_eq!(ended.delivery, "d");
        outcome(ended.result)
    }

    #[test]
    fn a_command_reads_the_event_and_knows_what_it_works_on() {
        let said = run("echo $WEFT_GROUP $WEFT_THREAD $WEFT_SEQ $WEFT_ATTEMPT $WEFT_DELIVERY; cat", "hi");
        let Outcome::Done(said) = said else { panic!("{said:?}") };
        let (variables, event) = said.split_once('\n').expect("two lines");
        assert_eq!(variables, "g t 7 2 d");
        assert_eq!(event, r#"{"data":{"content":"hi"},"seq":7,"thread":"t"}"#);
    }

    #[test]
    fn the_exit_code_says_what_becomes_of_the_event_and_the_last_line_of_stderr_why() {
        assert_eq!(run("true", ""), Outcome::Done(String::new()));
        assert_eq!(run("echo ' two'; echo words; echo", ""), Outcome::Done(" two\nwords".into()));
        assert_eq!(run("echo part; echo first >&2; echo last >&2; exit 75", ""), Outcome::Retry("last".into()));
        assert_eq!(run("exit 3", ""), Outcome::Retry("the command ended with 3".into()));
        assert_eq!(run("kill -9 $$", ""), Outcome::Retry("the command was ended by signal 9".into()));
        assert_eq!(run("echo no such order >&2; exit 65", ""), Outcome::Reject("no such order".into()));
    }

    #[test]
    fn a_command_that_reads_nothing_or_writes_too_much_holds_up_nobody() {
        let large = "x".repeat(1 << 20);
        assert_eq!(run("echo ok", &large), Outcome::Done("ok".into()));
        let answer = run("head -c 1000000 /dev/zero; exit 0", &large);
        assert_eq!(answer, Outcome::Retry("its answer is larger than 65536 bytes".into()));
        let Outcome::Retry(reason) = run("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", &large) else {
            panic!("it failed")
        };
        assert_eq!(reason.len(), MAX_REASON);
    }

    #[test]
    fn a_command_that_is_terminated_ends_with_all_that_it_started() {
        let event = json!({"thread": "t", "seq": 1});
        let work = ClientWork { delivery: "d".into(), group: "g".into(), attempt: 1, lease_ms: 1_000, event };
        let (sender, mut ended) = channel(1);
        // `sleep` holds the pipes as well, so that the end is only heard of once it is gone.
        let job = start("sleep 1000; true", &work, sender).expect("a shell");
        job.terminate();
        let ended = ended.blocking_recv().expect("it ends");
        assert_eq!(outcome(ended.result), Outcome::Retry("the command was ended by signal 15".into()));
    }
}
