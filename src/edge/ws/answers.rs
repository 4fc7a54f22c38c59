//! What each answer of the outbox does: verdicts on publishes, reads of the store, and what concerns the whole session.

use super::close::End;
use super::incoming::LevelWait;
use super::state::SessionState;
use crate::delivery::outbox::Answer;
use crate::projector::Verdict;
use crate::protocol::frame::ServerFrame;
use crate::telemetry;

impl SessionState {
    /// Collects the answers that came in from elsewhere, and carries out the commands that waited for them.
    pub fn on_answers(&mut self) -> Result<(), End> {
        while self.outgoing.has_room()
            && let Some(answer) = self.outgoing.feed.outbox.pop_answer()
        {
            self.on_answer(answer)?;
        }
        if let Some(retry_after_ms) = self.incoming.drain
            && self.incoming.is_settled()
        {
            return Err(End::draining(retry_after_ms));
        }
        self.on_backlog()
    }

    fn on_answer(&mut self, answer: Answer) -> Result<(), End> {
        match answer {
            Answer::Publish { id, thread, delta, verdict } => self.on_verdict(id, &thread, delta, verdict),
            Answer::Level(reached) => {
                if reached.is_ok() {
                    self.incoming.level_times.reached();
                }
                self.incoming.level = LevelWait::Over(reached);
            }
            Answer::Threads(threads) => self.on_threads(threads),
            Answer::LookedUp => (self.incoming.looking_up, self.incoming.looked_up) = (false, true),
            Answer::Verified(who) => {
                (self.incoming.looking_up, self.incoming.looked_up) = (false, true);
                (self.incoming.verification, self.incoming.verified) = (None, Some(who));
            }
            Answer::GoOn => self.on_turn(),
            Answer::FirstReceiptsStored { attempt, stored } => self.on_receipts(attempt, stored),
            Answer::Drain { retry_after_ms } => {
                self.incoming.drain = Some(retry_after_ms);
                self.incoming.flush_deltas(|_| true);
            }
            Answer::Revoked => self.check_revoked()?,
            Answer::Consuming { id, made } => self.on_group(id, made),
            Answer::Work(work) => self.on_work(*work),
            Answer::Settled { id, outcome, verdict } => self.on_settled(id, outcome, verdict),
            Answer::ReceiptStored { thread, stored } => self.outgoing.feed.subs.stored(&thread, stored),
            Answer::ToCancel { thread, signal } => {
                if let Some(signal) = self.outgoing.feed.subs.signal_of(&thread, signal) {
                    self.outgoing.signal(signal);
                }
            }
            Answer::Left { thread } => {
                let Some(who) = &self.who else { return Ok(()) };
                for (thread, error) in self.outgoing.feed.left(who, &thread) {
                    self.outgoing.ended(&thread, &error);
                }
            }
            Answer::DeadLettered { thread, seq, dead_lettered } => {
                let Some(who) = &self.who else { return Ok(()) };
                self.outgoing.feed.subs.dead_lettered(who, &thread, seq, dead_lettered);
            }
            Answer::Requeued { thread } => {
                let Some(who) = &self.who else { return Ok(()) };
                self.outgoing.feed.subs.requeued(who, &thread);
            }
            Answer::RequeuedRecorded { thread, recorded } => {
                let Some(who) = &self.who else { return Ok(()) };
                self.outgoing.feed.subs.requeued_recorded(who, &thread, recorded);
            }
            Answer::Chunk { sub, read } => {
                let Some(who) = &self.who else { return Ok(()) };
                if let Err((thread, error)) = self.outgoing.feed.subs.chunk(who, sub, read) {
                    self.outgoing.ended(&thread, &error);
                }
            }
        }
        Ok(())
    }

    /// `delta` is the message and where in it the delta ends, for a publish that was one.
    fn on_verdict(&mut self, id: i64, thread: &str, delta: Option<(Box<str>, u64)>, verdict: Verdict) {
        self.incoming.queue.publish_ends();
        let published = match verdict {
            Ok(published) => published,
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.outgoing.refuse(Some(id), &error);
                return;
            }
        };
        self.published.increment(1);
        self.outgoing.answer(&ServerFrame::Published {
            id,
            thread,
            seq: delta.is_none().then_some(published.seq),
            event: published.event,
            duplicate: published.duplicate,
            message: delta.as_ref().map(|(message, _)| &**message),
            to_char: delta.as_ref().map(|(_, to_char)| *to_char),
        });
    }
}
