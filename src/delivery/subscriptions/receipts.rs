//! What the client acknowledges: stored in the log, and what must be done when an acknowledgement does not come in time.

use tokio::time::{Duration, Instant};

use super::Subscriptions;
use super::confirm::{Confirm, Presence};
use super::receipt::Receipt;
use super::replay::Replayed;
use super::subscription::Stage;
use crate::auth::{Principal, scopes};
use crate::clock;
use crate::delivery::fair_queue::SubId;
use crate::delivery::outbox::Answer;
use crate::ingest::pending::OnVerdict;
use crate::log::{Append, Grant};
use crate::protocol::dead_letters::{UNACKNOWLEDGED, letter_of};
use crate::protocol::error::{Code, Error};
use crate::protocol::records::{DeadLetterRecord, TryRecord};
use crate::store::Store;

/// When a record that the log did not accept is tried again.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);
/// [`Subscriptions::on_due`] is not wanted more often.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Subscriptions {
    /// The client has everything of the thread up to `seq`.
    pub fn ack(&mut self, who: &Principal, thread: &str, seq: u64, name: Option<&str>) -> Result<(), Error> {
        let not_subscribed = || Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread");
        let id = *self.by_thread.get(thread).ok_or_else(not_subscribed)?;
        let sub = self.by_id.get_mut(&id).ok_or_else(not_subscribed)?;
        let receipt = sub.receipt.get_or_insert_with(|| Box::new(Receipt::unnamed(0, None)));
        if let Some(name) = name
            && *name != *receipt.name
        {
            let why = format!("the subscription to this thread does not have the name {name:.60}");
            return Err(Error::new(Code::NotFound, why).at("name"));
        }
        if seq > sub.cursor {
            // More than this session has sent, but another one may have sent it.
            let head = self.sources.store.head(&who.tenant, &sub.thread)?;
            if seq > head {
                let why = format!("`seq` ({seq}) is beyond the thread's head ({head})");
                return Err(Error::new(Code::CursorInvalid, why).at("seq"));
            }
        }

        if receipt.acked < seq {
            receipt.acked = seq;
            self.mark_changed(id);
        }
        self.settle(who, id, seq);
        self.ack_requeued(id, seq);
        Ok(())
    }

    /// Everything up to `seq` is done with: acknowledged, here or in another session.
    fn settle(&mut self, who: &Principal, id: SubId, seq: u64) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        receipt.place = receipt.place.max(seq);
        let Some(confirm) = &mut receipt.confirm else { return };
        confirm.ack(seq, Instant::now());
        let (deadline, has_room) = (confirm.deadline(), confirm.room() > 0);

        let waits_for_room = sub.stage == Stage::Held { until: None } && receipt.dead_lettering.is_none();
        if waits_for_room && has_room {
            sub.stage = Stage::CatchingUp;
            self.enqueue(who, id);
        }
        self.schedule(deadline);
    }

    pub(super) fn receipt_mut(&mut self, id: SubId) -> Option<&mut Receipt> {
        self.by_id.get_mut(&id)?.receipt.as_deref_mut()
    }

    // Records of receipts.

    fn mark_changed(&mut self, id: SubId) {
        let Some(receipt) = self.receipt_mut(id) else { return };
        receipt.is_changed = true;
        if receipt.must_be_stored() {
            self.changed.push(id);
        }
    }

    /// Records of the receipts that have changed, for the caller to append.
    pub fn changed_receipts(&mut self, who: &Principal) -> Vec<Append> {
        let mut batch = Vec::new();
        for id in std::mem::take(&mut self.changed) {
            let Some(sub) = self.by_id.get_mut(&id) else { continue };
            let Some(receipt) = &mut sub.receipt else { continue };
            // It may have been listed twice.
            if !receipt.must_be_stored() {
                continue;
            }
            receipt.is_changed = false;
            receipt.is_being_stored = true;
            let record = receipt.merged_record(&self.sources.store, (&who.tenant, &who.user), &sub.thread);

            let (outbox, thread) = (self.outbox.clone(), Box::from(&*sub.thread));
            let reply: OnVerdict =
                Box::new(move |verdict| outbox.push_answer(Answer::ReceiptStored { thread, stored: verdict.is_ok() }));
            batch.push(self.sources.submit.prepare_record(record.id, (&record).into(), reply));
        }
        batch
    }

    /// The log has accepted a receipt, or not.
    pub fn stored(&mut self, thread: &str, stored: bool) {
        let Some(id) = self.by_thread.get(thread).copied() else { return };
        let Some(receipt) = self.receipt_mut(id) else { return };
        receipt.is_being_stored = false;
        if !stored {
            receipt.is_changed = true;
            self.schedule(Some(Instant::now() + RETRY_AFTER));
        } else if receipt.is_changed {
            // It changed again while its record was on the way.
            self.changed.push(id);
        }
    }

    /// Writes the last receipt of a subscription that ends, so that the next session under its name knows what was sent.
    pub(super) fn store_on_leaving(&mut self, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        if !receipt.is_changed && !receipt.has_open_deliveries() {
            return;
        }
        let (Some((tenant, _)), Some(user)) = (sub.key.split_once('/'), &self.user) else { return };
        let record = receipt.merged_record(&self.sources.store, (tenant, user), &sub.thread);
        // The verdict is dropped: the subscription that could try again has ended.
        let last = self.sources.submit.prepare_record(record.id, (&record).into(), Box::new(drop));
        self.sources.submit.send(vec![last]);
    }

    // What is due.

    /// Does what is due: sends `position`, writes receipts again that the log did not accept, and begins rounds.
    pub fn on_due(&mut self, who: &Principal, client: Presence) {
        let now = Instant::now();
        self.due = None;

        let mut watched = Vec::new();
        for (id, sub) in &self.by_id {
            let owes_position = sub.filter.as_ref().is_some_and(|filter| filter.position_due().is_some());
            if owes_position || sub.receipt.is_some() || sub.pace.is_some() {
                watched.push(*id);
            }
        }
        for id in watched {
            self.check_position(id, now);
            self.retry_receipt(id);
            self.check_deadline(who, id, now, client);
            self.check_requeued(who, id, now, client);
        }
        self.due = self.due.map(|due| due.max(now + LOOK_EVERY));
    }

    fn check_position(&mut self, id: SubId, now: Instant) {
        let Some(sub) = self.by_id.get(&id) else { return };
        let Some(filter) = &sub.filter else { return };
        let Some(due) = filter.position_due() else { return };
        if due > now {
            self.schedule(Some(due));
        } else {
            let seq = sub.cursor;
            self.push_replayed(id, None, Replayed::Position { id, seq });
        }
    }

    fn retry_receipt(&mut self, id: SubId) {
        let must_be_stored = self.receipt_mut(id).is_some_and(|receipt| receipt.must_be_stored());
        if must_be_stored && !self.changed.contains(&id) {
            self.changed.push(id);
        }
    }

    /// Begins the next round, or goes on with a replay, when the pause before it is over. When the oldest event was not acknowledged in time, begins
    /// that pause, or gives the event up after its last attempt.
    fn check_deadline(&mut self, who: &Principal, id: SubId, now: Instant, client: Presence) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        if let Stage::Held { until: Some(until) } = sub.stage {
            if until > now {
                self.schedule(Some(until));
            } else {
                sub.stage = Stage::CatchingUp;
                self.enqueue(who, id);
            }
            return;
        }
        let Some(deadline) = sub.confirm().and_then(|confirm| confirm.deadline()) else { return };
        if deadline > now {
            self.schedule(Some(deadline));
            return;
        }

        self.merge_other_sessions(who, id);
        // That may have acknowledged the oldest event, so that the deadline is another one's.
        let Some(confirm) = self.receipt_mut(id).and_then(|receipt| receipt.confirm.as_mut()) else { return };
        let (Some(deadline), Some(oldest)) = (confirm.deadline(), confirm.oldest()) else { return };
        if deadline > now {
            self.schedule(Some(deadline));
            return;
        }
        confirm.prove(client);
        if confirm.is_exhausted(oldest) {
            self.dead_letter(who, id, oldest);
        } else {
            self.begin_round(id, oldest, now);
        }
    }

    /// Another session may have acknowledged under the same name.
    fn merge_other_sessions(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        if !receipt.is_durable() {
            return;
        }
        // If the store fails, only what this session knows counts.
        let row = self.sources.store.receipt(&who.tenant, &sub.thread, &who.user, &receipt.name);
        if let Ok(Some(row)) = row
            && row.place > receipt.place
        {
            receipt.merge(&row);
            self.settle(who, id, row.place);
        }
    }

    fn begin_round(&mut self, id: SubId, oldest: u64, now: Instant) {
        let Some(confirm) = self.receipt_mut(id).and_then(|receipt| receipt.confirm.as_mut()) else { return };
        let longest = confirm.restart(oldest - 1);
        // Between half of the pause and all of it, so that many sessions do not come back at once.
        let until = now + longest.mul_f64(0.5 + 0.5 * clock::random_share());
        self.redeliveries.increment(1);

        let Some(id) = self.renumber(id, oldest - 1, Stage::Held { until: Some(until) }) else { return };
        self.schedule(Some(until));
        // The attempts of a durable subscription outlive the session; without a name they could not be resumed.
        if self.receipt_mut(id).is_some_and(|receipt| receipt.is_durable()) {
            self.mark_changed(id);
        }
    }

    // Dead letters.

    /// The event was not acknowledged in any attempt: it becomes a dead letter, and the subscription waits until that is
    /// durable.
    pub(super) fn dead_letter(&mut self, who: &Principal, id: SubId, seq: u64) {
        let Some(id) = self.renumber(id, seq - 1, Stage::Held { until: None }) else { return };
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        receipt.dead_lettering = Some(seq);

        let attempts = receipt.confirm.as_ref().map_or(0, |confirm| confirm.progress().1);
        let tries = receipt.confirm.as_ref().map(|confirm| tries(confirm, who)).unwrap_or_default();
        // If the store fails, the letter is without it.
        let event = self.sources.store.event(&who.tenant, &sub.thread, seq).ok().flatten();
        let kind = event.map(|event| event.kind.to_string());
        let grant = reads_by(&self.sources.store, who, &sub.thread);
        let facts: [&[u8]; 5] = [
            UNACKNOWLEDGED.as_bytes(),
            sub.key.as_bytes(),
            who.user.as_bytes(),
            receipt.name.as_bytes(),
            &seq.to_be_bytes(),
        ];
        let record = DeadLetterRecord {
            id: clock::event_id(),
            letter: letter_of(&facts),
            reason: UNACKNOWLEDGED.into(),
            tenant: who.tenant.to_string(),
            thread: sub.thread.clone(),
            user: who.user.to_string(),
            name: receipt.is_durable().then(|| receipt.name.to_string()),
            seq,
            attempts,
            error: format!("sent {attempts} times and not acknowledged"),
            at: clock::rfc3339(clock::now_ms()),
            kind,
            round: 0,
            tries,
            grant,
        };

        let (outbox, thread) = (self.outbox.clone(), Box::from(&*sub.thread));
        let reply: OnVerdict = Box::new(move |verdict| {
            outbox.push_answer(Answer::DeadLettered { thread, seq, dead_lettered: verdict.is_ok() })
        });
        let append = self.sources.submit.prepare_record(record.id, (&record).into(), reply);
        self.sources.submit.send(vec![append]);
    }

    /// The dead letter is durable, and the subscription goes on after the event; or it is not, and is tried again.
    pub fn dead_lettered(&mut self, who: &Principal, thread: &str, seq: u64, dead_lettered: bool) {
        let Some(id) = self.by_thread.get(thread).copied() else { return };
        let Some(receipt) = self.receipt_mut(id) else { return };
        if receipt.dead_lettering != Some(seq) {
            return;
        }
        receipt.dead_lettering = None;
        let Some(confirm) = &mut receipt.confirm else { return };
        if dead_lettered {
            confirm.give_up(seq);
            receipt.place = receipt.place.max(seq);
            if let Some(id) = self.renumber(id, seq, Stage::CatchingUp) {
                self.mark_changed(id);
                self.enqueue(who, id);
            }
        } else {
            // When it is read again, its attempts are still used up.
            confirm.restart(seq - 1);
            self.hold(id, Some(Instant::now() + RETRY_AFTER));
        }
    }
}

/// By what right the user reads the thread, as a dead letter has it; None if it is neither of the usual ones.
pub(super) fn reads_by(store: &Store, who: &Principal, thread: &str) -> Option<String> {
    let grant = if scopes::reads_by_scope(who.scopes) {
        Grant::Scope
    } else if store.is_member(&who.tenant, thread, &who.user).ok()? {
        Grant::Member
    } else {
        return None;
    };
    Some(grant.as_str().to_owned())
}

/// When the oldest event was sent, as far as this session knows.
fn tries(confirm: &Confirm, who: &Principal) -> Vec<TryRecord> {
    let (now, now_ms) = (Instant::now(), clock::now_ms());
    let tried = |at: &Instant| TryRecord {
        at: clock::rfc3339(now_ms.saturating_sub(now.saturating_duration_since(*at).as_millis() as u64)),
        worker: Some(who.user.to_string()),
        reason: "not acknowledged".into(),
    };
    confirm.sent_at().iter().map(tried).collect()
}
