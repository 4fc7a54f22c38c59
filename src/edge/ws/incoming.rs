//! What is on its way in: commands that wait, publishes that are not answered yet, and records for the log.
//!
//! What waits is bounded: while [`MAX_IN_FLIGHT`] publishes are not answered, or [`MAX_WAITING`] commands or
//! [`MAX_WAITING_BYTES`] of them wait for those before them, the socket is not read.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::value::RawValue;
use tokio::task::AbortHandle;
use tokio::time::{Duration, Instant};

use super::plan::PendingSubscribe;
use crate::auth::Principal;
use crate::delivery::outbox::{Answer, Outbox};
use crate::ingest::coalesce::{Coalescer, PendingDelta, Waiter};
use crate::ingest::pending::OnVerdict;
use crate::ingest::submit::{AppendBatch, Submit};
use crate::projector::Verdict;
use crate::protocol::delta::Delta;
use crate::protocol::error::Error;

/// Publishes that may wait for their answer.
pub const MAX_IN_FLIGHT: usize = 8_192;
/// Commands that may wait for those before them, and bytes of them. What is read on meanwhile is for those that need not
/// wait; a frame that is read already may bring more.
pub const MAX_WAITING: usize = 1_024;
pub const MAX_WAITING_BYTES: usize = 16 << 10;
/// Commands refused for their rate for so long, without a pause, end the session.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// What counts as a pause.
const PAUSE: Duration = Duration::from_secs(1);

/// What a command has to wait for before it takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// Nothing: it has to do with no other command.
    Nothing,
    /// The commands before it that wait; not the answers of publishes.
    Commands,
    /// The commands before it that wait, and the answers of the publishes before it.
    Answers,
}

/// Commands in the order in which they take effect: each as soon as what it [`WaitsFor`] is there.
#[derive(Debug)]
pub struct CommandQueue<C> {
    /// Each with its size in bytes.
    backlog: VecDeque<(C, usize)>,
    /// The size of all of them.
    bytes: usize,
    in_flight: usize,
}

impl<C> Default for CommandQueue<C> {
    fn default() -> CommandQueue<C> {
        CommandQueue { backlog: VecDeque::new(), bytes: 0, in_flight: 0 }
    }
}

impl<C> CommandQueue<C> {
    /// Whether more commands may be read.
    pub fn may_read(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT && self.backlog.len() < MAX_WAITING && self.bytes < MAX_WAITING_BYTES
    }

    /// Whether a command that has just come may take effect before those that wait.
    pub fn may_pass(&self, waits_for: WaitsFor) -> bool {
        waits_for == WaitsFor::Nothing || self.backlog.is_empty()
    }

    /// Whether a command that is next must wait for the answers of publishes.
    pub fn holds(&self, waits_for: WaitsFor) -> bool {
        waits_for == WaitsFor::Answers && self.in_flight > 0
    }

    /// Publishes that are not answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Commands that wait.
    pub fn waiting(&self) -> usize {
        self.backlog.len()
    }

    pub fn publish_begins(&mut self) {
        self.in_flight += 1;
    }

    pub fn publish_ends(&mut self) {
        self.in_flight -= 1;
    }

    /// A command of so many bytes that has to wait, after all that wait already.
    pub fn push(&mut self, command: C, bytes: usize) {
        self.backlog.push_back((command, bytes));
        self.bytes += bytes;
    }

    /// The next command to try, with its size, if the bounds allow one.
    pub fn pop(&mut self) -> Option<(C, usize)> {
        if self.in_flight >= MAX_IN_FLIGHT {
            return None;
        }
        let (command, bytes) = self.backlog.pop_front()?;
        self.bytes -= bytes;
        Some((command, bytes))
    }

    /// That command still has to wait.
    pub fn put_back(&mut self, command: C, bytes: usize) {
        self.backlog.push_front((command, bytes));
        self.bytes += bytes;
    }

    #[cfg(test)]
    pub fn front(&self) -> Option<&C> {
        self.backlog.front().map(|(command, _)| command)
    }
}

/// Since when commands have been refused for their rate, without a pause. Pure: time comes in.
#[derive(Debug, Default)]
pub struct RefusalWindow {
    /// The first refusal and the last.
    refused: Option<(Instant, Instant)>,
}

impl RefusalWindow {
    /// A command is refused now. `true` if that has gone on for too long.
    pub fn refuse(&mut self, now: Instant) -> bool {
        let since = match self.refused {
            Some((first, last)) if now < last + PAUSE => first,
            _ => now,
        };
        self.refused = Some((since, now));
        now >= since + REFUSED_FOR
    }
}

/// A command that found nothing waits until this node is level with the log, and is then carried out once more.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub enum LevelWait {
    #[default]
    None,
    /// Until then no other command takes effect.
    Waiting,
    /// For the first of the commands that wait: what it finds now is final, or the error is its answer.
    Over(Result<(), Error>),
}

/// When commands came, and when this node was level with the log: what waits and came before that need not wait for it
/// again, however many commands there are.
#[derive(Debug, Default)]
pub struct LevelTimes {
    /// When the newest commands came.
    heard: Option<Instant>,
    /// When the question under way was asked.
    asked: Option<Instant>,
    /// The node has all that the log had at that time.
    level: Option<Instant>,
}

impl LevelTimes {
    pub fn heard(&mut self, now: Instant) {
        self.heard = Some(now);
    }

    pub fn asked(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    pub fn reached(&mut self) {
        self.level = self.asked;
    }

    /// Whether the node was level after every command had come that is here.
    pub fn cover_all(&self) -> bool {
        self.level.is_some() && self.level > self.heard
    }
}

/// Another service is being asked whose credential it is. It ends with the session: nobody is asked for one who has left.
pub struct Verification(pub AbortHandle);

impl Drop for Verification {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub struct Incoming {
    pub queue: CommandQueue<Box<RawValue>>,
    pub refusals: RefusalWindow,
    /// How many of the first commands that wait are not counted yet for the user's rate.
    pub uncounted: usize,
    /// The `subscribe` that waits for something; until it has begun, no other command takes effect.
    pub subscribing: Option<PendingSubscribe>,
    /// What the first command that waits needs to know is being looked up; no other takes effect before it.
    pub looking_up: bool,
    /// It was looked up, for the first command that waits.
    pub looked_up: bool,
    /// For the `connect` or `refresh` that is the first command that waits.
    pub verification: Option<Verification>,
    /// Who the first command that waits is from, if it is a `connect` or `refresh` and that was looked up.
    pub verified: Option<Box<Result<Principal, Error>>>,
    pub level: LevelWait,
    pub level_times: LevelTimes,
    /// How often a `subscribe` has waited for receipts, so that answers to an earlier one are known as such.
    pub attempts: u32,
    /// Once the server is going down: when the client is to come back, in milliseconds.
    pub drain: Option<u64>,
    /// Records for the log: those of what was read together are appended together.
    pub batch: AppendBatch,
    coalescer: Coalescer,
    outbox: Arc<Outbox>,
    /// W3C trace context of the upgrade request; every publish of the session gets it.
    traceparent: Option<Arc<str>>,
}

impl Incoming {
    pub fn new(submit: Arc<Submit>, outbox: Arc<Outbox>, traceparent: Option<&str>) -> Incoming {
        Incoming {
            queue: CommandQueue::default(),
            refusals: RefusalWindow::default(),
            uncounted: 0,
            subscribing: None,
            looking_up: false,
            looked_up: false,
            verification: None,
            verified: None,
            level: LevelWait::None,
            level_times: LevelTimes::default(),
            attempts: 0,
            drain: None,
            batch: AppendBatch::new(submit),
            coalescer: Coalescer::default(),
            outbox,
            traceparent: traceparent.map(Into::into),
        }
    }

    pub fn traceparent(&self) -> Option<Arc<str>> {
        self.traceparent.clone()
    }

    pub fn may_read(&self) -> bool {
        self.drain.is_none() && self.queue.may_read()
    }

    /// Whether everything that was accepted is answered.
    pub fn is_settled(&self) -> bool {
        self.queue.in_flight() == 0 && self.batch.is_empty()
    }

    /// An event was admitted, and is the next one in [`Incoming::batch`]. The session's deltas of the same run were published
    /// before it, and are in the log before it.
    pub fn publish_begins(&mut self, run: Option<&str>) {
        self.queue.publish_begins();
        self.flush_deltas(|delta| run.is_none_or(|run| *delta.run == *run));
    }

    /// A delta that was admitted: it may become one record with others of its message.
    pub fn publish_delta(&mut self, delta: PendingDelta) {
        self.queue.publish_begins();
        let ready = self.coalescer.add(delta, Instant::now());
        self.append_deltas(ready);
    }

    /// Deltas that were gathered become records now, if they are selected.
    pub fn flush_deltas(&mut self, selects: impl Fn(&Delta) -> bool) {
        let ready = self.coalescer.flush(selects);
        self.append_deltas(ready);
    }

    /// When deltas have been gathered for long enough.
    pub fn due(&self) -> Option<Instant> {
        self.coalescer.due()
    }

    /// Deltas that were gathered for long enough become records.
    pub fn flush_due_deltas(&mut self) {
        let Some(due) = self.coalescer.due() else { return };
        let now = Instant::now();
        if due <= now {
            let ready = self.coalescer.on_due(now);
            self.append_deltas(ready);
        }
    }

    fn append_deltas(&mut self, ready: Vec<PendingDelta>) {
        for mut delta in ready {
            let reply = reply_to_each(self.outbox.clone(), delta.message().into(), delta.take_waiters());
            delta.append(&mut self.batch, self.traceparent.as_deref(), reply);
        }
    }
}

/// Answers all who published a part of the delta.
fn reply_to_each(outbox: Arc<Outbox>, message: Box<str>, waiters: Vec<Waiter>) -> OnVerdict {
    Box::new(move |verdict: Verdict| {
        for Waiter { id, called, to_char } in waiters {
            let delta = Some((message.clone(), to_char));
            outbox.push_answer(Answer::Publish { id, thread: called, delta, verdict: verdict.clone() });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn refusals_for_ten_seconds_without_a_pause_are_too_many() {
        let (mut window, begin) = (RefusalWindow::default(), Instant::now());
        for tick in 0..20 {
            assert!(!window.refuse(begin + tick * 500 * MS), "{tick}");
        }
        assert!(!window.refuse(begin + 9_999 * MS));
        assert!(window.refuse(begin + 10_000 * MS));
    }

    #[test]
    fn a_second_without_a_refusal_begins_the_ten_anew() {
        let (mut window, begin) = (RefusalWindow::default(), Instant::now());
        for tick in 0..100 {
            assert!(!window.refuse(begin + tick * 1_000 * MS), "{tick}");
        }
        let mut window = RefusalWindow::default();
        assert!(!window.refuse(begin));
        for tick in 1..=10 {
            assert!(!window.refuse(begin + tick * 999 * MS), "{tick}");
        }
        assert!(window.refuse(begin + 11 * 999 * MS), "pauses of less than a second are none");
    }

    #[test]
    fn commands_keep_their_order_and_bound_what_is_in_flight() {
        let mut queue = CommandQueue::default();
        assert!(queue.may_pass(WaitsFor::Answers) && queue.may_read());
        queue.push("first", 1);
        queue.push("second", 1);
        let (first, bytes) = queue.pop().expect("a command waits");
        queue.put_back(first, bytes);
        let mut next = || queue.pop().map(|(command, _)| command);
        assert_eq!((next(), next(), next()), (Some("first"), Some("second"), None));

        for _ in 0..MAX_IN_FLIGHT {
            assert!(queue.may_read());
            queue.publish_begins();
        }
        queue.push("third", 1);
        assert_eq!((queue.may_read(), queue.pop()), (false, None));
        queue.publish_ends();
        assert_eq!((queue.pop(), queue.may_read()), (Some(("third", 1)), true));
    }

    #[test]
    fn only_what_waits_for_answers_is_held_by_a_publish_and_only_what_waits_for_nothing_passes_what_waits() {
        use WaitsFor::{Answers, Commands, Nothing};
        let mut queue = CommandQueue::default();
        queue.publish_begins();
        assert_eq!([Nothing, Commands, Answers].map(|it| queue.holds(it)), [false, false, true]);
        assert_eq!([Nothing, Commands, Answers].map(|it| queue.may_pass(it)), [true, true, true]);
        queue.push("subscribe", 1);
        assert_eq!([Nothing, Commands, Answers].map(|it| queue.may_pass(it)), [true, false, false]);
        queue.publish_ends();
        assert!(![Nothing, Commands, Answers].map(|it| queue.holds(it)).contains(&true));
    }

    #[test]
    fn the_node_is_level_for_commands_that_came_before_it_was_asked() {
        let (begin, mut times) = (Instant::now(), LevelTimes::default());
        times.heard(begin);
        assert!(!times.cover_all());
        times.asked(begin + Duration::from_millis(1));
        assert!(!times.cover_all(), "not answered yet");
        times.reached();
        assert!(times.cover_all());
        times.heard(begin + Duration::from_millis(2));
        assert!(!times.cover_all(), "a newer command came");
    }

    #[test]
    fn commands_that_wait_are_bounded_in_number_and_in_bytes() {
        let mut queue = CommandQueue::default();
        for _ in 0..MAX_WAITING {
            assert!(queue.may_read());
            queue.push((), 1);
        }
        assert!(!queue.may_read());
        assert!(queue.pop().is_some());
        assert!(queue.may_read());
        queue.push((), MAX_WAITING_BYTES);
        assert!(queue.pop().is_some());
        assert!(!queue.may_read(), "few, and large");
        while queue.pop().is_some() {}
        assert!(queue.may_read());
    }
}
