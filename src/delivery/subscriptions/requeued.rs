//! Deliveries that were given up as dead letters and that somebody has requeued: a durable subscription with `confirm` is sent
//! them again, one at a time and beside everything else, since its cursor is beyond them.
//!
//! What is to be delivered stands in the store, made from the log; so any session under the name makes the delivery, on any
//! node. Each thing that becomes of it is a record: acknowledged (`letter_settled`), not acknowledged in time
//! (`letter_tried`), or given up again (the letter once more). Of two sessions that write about the same attempt the first
//! one counts, and both go on from what the store has by then.

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use super::Subscriptions;
use super::catchup::DEFAULT_CLASS;
use super::confirm::{ConfirmPolicy, Presence, longest_pause};
use super::reading::Wanted;
use super::receipts::{RETRY_AFTER, reads_by};
use super::redelivery::{Requeued, Sent, Step};
use super::replay::Replayed;
use super::subscription::Subscription;
use crate::auth::Principal;
use crate::clock;
use crate::delivery::fair_queue::SubId;
use crate::delivery::outbox::{Answer, ReadDelivery, ReadFor};
use crate::ingest::pending::OnVerdict;
use crate::log::Record;
use crate::protocol::dead_letters::UNACKNOWLEDGED;
use crate::protocol::error::Code;
use crate::protocol::event;
use crate::protocol::kinds::{LETTER_SETTLED, LETTER_TRIED};
use crate::protocol::records::{DeadLetterRecord, LetterActRecord, TryRecord};
use crate::store::deliveries::RequeuedDelivery;

const NOT_ACKNOWLEDGED: &str = "not acknowledged";

impl Subscription {
    fn requeued(&mut self) -> Option<&mut Requeued> {
        self.receipt.as_mut()?.requeued.as_deref_mut()
    }

    /// The read that brings what it is to be sent again.
    pub(super) fn wanted_requeued(&mut self) -> Option<Wanted> {
        let kinds = self.filter.as_ref().and_then(|filter| filter.kinds());
        let receipt = self.receipt.as_mut()?;
        let requeued = receipt.requeued.as_mut()?;
        (requeued.wanted, requeued.step) = (false, Step::Reading);
        Some(Wanted::Requeued { name: receipt.name.clone(), kinds })
    }

    /// The session ends: an attempt does not count that nobody was there to take, or that the server cuts short.
    pub(super) fn leave_requeued(&mut self, client: Presence, by_server: bool, now: Instant) {
        let Some(policy) = self.confirm().map(|confirm| confirm.policy()) else { return };
        let Some(requeued) = self.requeued() else { return };
        let is_cut_short = by_server && requeued.deadline(policy).is_some_and(|deadline| deadline > now);
        let was_there = requeued.sent.as_ref().is_some_and(|sent| client.is_after(sent.presence));
        if is_cut_short || !was_there {
            requeued.sent = None;
        }
    }
}

impl Subscriptions {
    /// Somebody has requeued a delivery to this user in the thread.
    pub fn requeued(&mut self, who: &Principal, thread: &str) {
        if let Some(id) = self.by_thread.get(thread).copied() {
            self.look_for_requeued(who, id);
        }
    }

    /// Looks whether the subscription is to be sent something again.
    pub(super) fn look_for_requeued(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = sub.receipt.as_mut().filter(|it| it.is_durable() && it.confirm.is_some()) else { return };
        let found = self.sources.store.requeued_deliveries(&who.tenant, &sub.thread, &who.user, &receipt.name);
        // If the store fails, the read will fail as well and say so.
        if found.is_ok_and(|found| found.is_empty()) {
            return;
        }
        if receipt.requeued.get_or_insert_default().look() {
            self.requeued.push_back(id);
        }
    }

    /// The subscription has another number: what was on its way under the old one is read once more.
    pub(super) fn requeued_renumbered(&mut self, id: SubId) {
        let Some(requeued) = self.by_id.get_mut(&id).and_then(Subscription::requeued) else { return };
        if matches!(requeued.step, Step::Reading | Step::Ready) {
            (requeued.wanted, requeued.step) = (true, Step::Idle);
        }
        if requeued.is_next() {
            self.requeued.push_back(id);
        }
    }

    /// Who reads next what it is to be sent again.
    pub(super) fn next_requeued(&mut self) -> Option<ReadFor> {
        while let Some(sub) = self.requeued.pop_front() {
            let requeued = self.by_id.get_mut(&sub).and_then(Subscription::requeued);
            if requeued.is_some_and(|requeued| requeued.is_next()) {
                return Some(ReadFor { sub, class: DEFAULT_CLASS });
            }
        }
        None
    }

    /// What the store has for it, if anything.
    pub(super) fn accept_requeued(&mut self, who: &Principal, id: SubId, found: Option<ReadDelivery>) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(policy) = sub.confirm().map(|confirm| confirm.policy()) else { return };
        let Some(requeued) = sub.requeued().filter(|it| it.step == Step::Reading) else { return };
        let Some(ReadDelivery { delivery, event, charge }) = found else {
            requeued.step = Step::Idle;
            return self.go_on_requeued(id);
        };
        if delivery.attempts >= policy.attempts {
            // An earlier session had the last attempt.
            return self.give_up_requeued(who, id, &delivery, None);
        }
        requeued.step = Step::Ready;
        let replayed = Replayed::Requeued { id, delivery, frame: event.frame, charge };
        self.push_replayed(id, Some(event.class), replayed);
    }

    /// It goes to the socket: the frame, unless it was acknowledged meanwhile.
    pub(super) fn prepare_requeued(
        &mut self,
        id: SubId,
        delivery: RequeuedDelivery,
        frame: Utf8Bytes,
    ) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        let frame = sub.rename(frame);
        let cursor = sub.cursor;
        let (policy, newest) = sub.confirm().map(|confirm| (confirm.policy(), confirm.progress().0))?;
        let requeued = sub.requeued().filter(|it| it.step == Step::Ready)?;

        let attempt = delivery.before.saturating_add(delivery.attempts).saturating_add(1);
        let presence = Presence { heard: Instant::now(), taken: self.written };
        (requeued.step, requeued.acked) = (Step::Sent, false);
        requeued.sent = Some(Sent { delivery, before: cursor.max(newest), presence });
        let deadline = requeued.deadline(policy);
        self.schedule(deadline);
        Some(event::with_attempt(&frame, attempt).into())
    }

    /// The client has acknowledged `seq`: that very event, or one that was sent after it, and so everything up to there.
    pub(super) fn ack_requeued(&mut self, id: SubId, seq: u64) {
        let Some(requeued) = self.by_id.get_mut(&id).and_then(Subscription::requeued) else { return };
        let is_for = |sent: &Sent| seq == sent.delivery.seq || seq > sent.before;
        if requeued.acked || !requeued.sent.as_ref().is_some_and(is_for) {
            return;
        }
        requeued.acked = true;
        // Otherwise when what is on its way has come to the log.
        if !matches!(requeued.step, Step::Recording { .. }) {
            self.settle_requeued(id);
        }
    }

    fn settle_requeued(&mut self, id: SubId) {
        let Some(record) = self.act_record(id, LETTER_SETTLED) else { return };
        self.record_requeued(id, record.id, (&record).into(), true);
    }

    /// What became of it is in the log, or was there before; or it could not be written.
    pub fn requeued_recorded(&mut self, who: &Principal, thread: &str, recorded: bool) {
        let Some(id) = self.by_thread.get(thread).copied() else { return };
        let Some(requeued) = self.by_id.get_mut(&id).and_then(Subscription::requeued) else { return };
        let Step::Recording { done } = requeued.step else { return };
        if recorded && done {
            (requeued.sent, requeued.acked, requeued.step) = (None, false, Step::Idle);
            return self.look_for_requeued(who, id);
        }
        if recorded && requeued.acked {
            return self.settle_requeued(id);
        }
        let attempts = requeued.sent.as_ref().map_or(0, |sent| sent.delivery.attempts + 1);
        // Between half of the pause and all of it, as between two rounds.
        let pause =
            if recorded { longest_pause(attempts).mul_f64(0.5 + 0.5 * clock::random_share()) } else { RETRY_AFTER };
        self.wait_requeued(id, Instant::now() + pause);
    }

    fn wait_requeued(&mut self, id: SubId, until: Instant) {
        let Some(requeued) = self.by_id.get_mut(&id).and_then(Subscription::requeued) else { return };
        requeued.step = Step::Waiting(until);
        self.schedule(Some(until));
    }

    fn go_on_requeued(&mut self, id: SubId) {
        let requeued = self.by_id.get_mut(&id).and_then(Subscription::requeued);
        if requeued.is_some_and(|requeued| requeued.is_next()) {
            self.requeued.push_back(id);
        }
    }

    /// Begins the next attempt when the pause before it is over; counts one that was not acknowledged in time.
    pub(super) fn check_requeued(&mut self, who: &Principal, id: SubId, now: Instant, client: Presence) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(policy) = sub.confirm().map(|confirm| confirm.policy()) else { return };
        let Some(requeued) = sub.requeued() else { return };
        let due = match requeued.step {
            Step::Waiting(until) => Some(until),
            _ => requeued.deadline(policy),
        };
        let Some(due) = due else { return };
        if due > now {
            return self.schedule(Some(due));
        }
        if matches!(requeued.step, Step::Waiting(_)) {
            requeued.step = Step::Idle;
            if requeued.acked {
                return self.settle_requeued(id);
            }
            return self.look_for_requeued(who, id);
        }
        self.end_attempt(who, id, policy, client);
    }

    /// The client has not acknowledged it in time.
    fn end_attempt(&mut self, who: &Principal, id: SubId, policy: ConfirmPolicy, client: Presence) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        let Some(requeued) = &mut receipt.requeued else { return };
        let Some(sent) = &requeued.sent else { return };
        let delivery = sent.delivery.clone();

        let known = self.sources.store.requeued_deliveries(&who.tenant, &sub.thread, &who.user, &receipt.name);
        let is_same = |it: &RequeuedDelivery| it.letter == delivery.letter && it.round == delivery.round;
        // If the store fails, what this session knows counts.
        let now = match known {
            Ok(known) => known.into_iter().find(is_same),
            Err(_) => Some(delivery.clone()),
        };
        let Some(now) = now else {
            // Another session has settled it, or somebody has discarded it.
            (requeued.sent, requeued.step) = (None, Step::Idle);
            return self.look_for_requeued(who, id);
        };
        self.redeliveries.increment(1);
        let was_there = client.is_after(sent.presence);
        if !was_there || now.attempts > delivery.attempts {
            let pause = longest_pause(now.attempts).mul_f64(0.5 + 0.5 * clock::random_share());
            return self.wait_requeued(id, Instant::now() + pause);
        }
        if delivery.attempts + 1 >= policy.attempts {
            let tried = tried(who, sent.presence.heard);
            return self.give_up_requeued(who, id, &delivery, Some(tried));
        }
        let Some(record) = self.act_record(id, LETTER_TRIED) else { return };
        self.record_requeued(id, record.id, (&record).into(), false);
    }

    /// The letter is open again: with one attempt more, if this session made it.
    fn give_up_requeued(&mut self, who: &Principal, id: SubId, delivery: &RequeuedDelivery, last: Option<TryRecord>) {
        let Some(sub) = self.by_id.get(&id) else { return };
        let Some(receipt) = &sub.receipt else { return };
        let store = &self.sources.store;
        // If the store fails, the letter is without it.
        let event = store.event(&who.tenant, &sub.thread, delivery.seq).ok().flatten();
        let sent = delivery.attempts + u32::from(last.is_some());
        let record = DeadLetterRecord {
            id: clock::event_id(),
            letter: Uuid::from_bytes(delivery.letter),
            reason: UNACKNOWLEDGED.into(),
            tenant: who.tenant.to_string(),
            thread: sub.thread.clone(),
            user: who.user.to_string(),
            name: Some(receipt.name.to_string()),
            seq: delivery.seq,
            attempts: u32::from(last.is_some()),
            error: format!("sent {sent} times and not acknowledged"),
            at: clock::rfc3339(clock::now_ms()),
            kind: event.map(|event| event.kind.to_string()),
            round: delivery.round,
            tries: last.into_iter().collect(),
            grant: reads_by(store, who, &sub.thread),
        };
        self.record_requeued(id, record.id, (&record).into(), true);
    }

    /// A record about what was sent last.
    fn act_record(&self, id: SubId, kind: &str) -> Option<LetterActRecord> {
        let sub = self.by_id.get(&id)?;
        let delivery = &sub.receipt.as_ref()?.requeued.as_ref()?.sent.as_ref()?.delivery;
        let is_try = kind == LETTER_TRIED;
        Some(LetterActRecord {
            kind: kind.to_owned(),
            id: clock::event_id(),
            letter: Uuid::from_bytes(delivery.letter),
            reason: UNACKNOWLEDGED.to_owned(),
            tenant: sub.key.split_once('/')?.0.to_owned(),
            thread: Some(sub.thread.clone()),
            round: delivery.round,
            by: self.user.as_ref()?.to_string(),
            note: is_try.then(|| NOT_ACKNOWLEDGED.to_owned()),
            attempt: is_try.then_some(delivery.attempts + 1),
            at: clock::rfc3339(clock::now_ms()),
        })
    }

    fn record_requeued(&mut self, id: SubId, record_id: Uuid, record: Record, done: bool) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let (outbox, thread) = (self.outbox.clone(), Box::from(&*sub.thread));
        if let Some(requeued) = sub.requeued() {
            requeued.step = Step::Recording { done };
        }
        let reply: OnVerdict = Box::new(move |verdict| {
            // Whoever was first has it, and what is not there needs no more.
            let is_settled = |code: Code| matches!(code, Code::Conflict | Code::NotFound);
            let recorded = verdict.as_ref().map_or_else(|refused| is_settled(refused.code), |_| true);
            outbox.push_answer(Answer::RequeuedRecorded { thread, recorded });
        });
        let append = self.sources.submit.prepare_record(record_id, record, reply);
        self.sources.submit.send(vec![append]);
    }

    /// The subscription ends: what is acknowledged is settled, and an attempt that is not over is counted.
    pub(super) fn requeued_on_leaving(&mut self, id: SubId) {
        let Some(requeued) = self.by_id.get_mut(&id).and_then(Subscription::requeued) else { return };
        let kind = match requeued.step {
            Step::Recording { done: true } => return,
            _ if requeued.acked => LETTER_SETTLED,
            Step::Sent => LETTER_TRIED,
            _ => return,
        };
        let Some(record) = self.act_record(id, kind) else { return };
        // The verdict is dropped: the subscription that could try again has ended.
        let last = self.sources.submit.prepare_record(record.id, (&record).into(), Box::new(drop));
        self.sources.submit.send(vec![last]);
    }
}

/// An attempt that was not acknowledged.
fn tried(who: &Principal, sent_at: Instant) -> TryRecord {
    let ago = Instant::now().saturating_duration_since(sent_at).as_millis() as u64;
    TryRecord {
        at: clock::rfc3339(clock::now_ms().saturating_sub(ago)),
        worker: Some(who.user.to_string()),
        reason: NOT_ACKNOWLEDGED.into(),
    }
}
