//! What the client acknowledges: stored in the log, and missed when it does not come.

use super::confirm::Confirm;
use super::{Stage, Step, Subscriptions};
use crate::auth::Principal;
use crate::clock;
use crate::delivery::outbox::{Answer, SubId};
use crate::ingest::pending::OnVerdict;
use crate::log::Append;
use crate::protocol::error::{Code, Error};
use crate::protocol::records::{DeadLetterRecord, ReceiptRecord, UNACKNOWLEDGED};
use crate::store::{ReceiptRow, Store};
use tokio::time::{Duration, Instant};

/// When what the log did not take is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How far the client has come with a subscription.
pub struct Receipt {
    /// The durable subscription; empty if it is none.
    name: Box<str>,
    /// Behind this the subscription goes on, whoever resumes it.
    place: u64,
    acked: u64,
    pub(super) confirm: Option<Confirm>,
    /// The log does not have it yet.
    dirty: bool,
    /// It is on its way there.
    writing: bool,
    /// The event that is to become a dead letter.
    dead_lettering: Option<u64>,
}

impl Receipt {
    /// What a subscription behind `cursor` needs: with a name it is durable, and goes on from its row or begins; without one
    /// only confirmation needs any.
    pub fn wanted(name: Option<&str>, row: Option<ReceiptRow>, cursor: u64, confirm: bool) -> Option<Receipt> {
        match name {
            Some(name) => Some(Receipt::new(name, row, cursor, confirm)),
            None => confirm.then(|| Receipt::unnamed(cursor, true)),
        }
    }

    /// Without a row it begins at the cursor.
    fn new(name: &str, row: Option<ReceiptRow>, cursor: u64, confirm: bool) -> Receipt {
        let row = row.unwrap_or(ReceiptRow { place: cursor, ..ReceiptRow::default() });
        Receipt {
            name: name.into(),
            place: row.place,
            acked: row.acked,
            confirm: confirm.then(|| Confirm::resume(&row, cursor)),
            dirty: false,
            writing: false,
            dead_lettering: None,
        }
    }

    /// A subscription without a name: what is acknowledged counts as read, and a new session begins where it likes.
    fn unnamed(cursor: u64, confirm: bool) -> Receipt {
        Receipt::new("", Some(ReceiptRow::default()), cursor, confirm)
    }

    /// The log does not have a durable one's beginning yet.
    pub fn unwritten(self) -> Receipt {
        Receipt { dirty: !self.name.is_empty(), ..self }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty
    }

    fn hear_of(&mut self, row: &ReceiptRow) {
        self.place = self.place.max(row.place);
        self.acked = self.acked.max(row.acked);
    }

    /// What to write. Another session of the user's may have come further: what is written last is all that compaction leaves.
    fn latest_note(&mut self, store: &Store, who: (&str, &str), thread: &str) -> ReceiptRecord {
        if let Ok(Some(row)) = store.receipt(who.0, thread, who.1, &self.name) {
            self.hear_of(&row);
        }
        self.note(who, thread)
    }

    fn note(&self, who: (&str, &str), thread: &str) -> ReceiptRecord {
        let (sent, attempts) = self.confirm.as_ref().map_or((0, 0), Confirm::progress);
        // What was sent without a name is nobody's to resume.
        let (sent, attempts) = if self.name.is_empty() { (0, 0) } else { (sent, attempts) };
        ReceiptRecord {
            id: clock::event_id(),
            tenant: who.0.to_owned(),
            thread: thread.to_owned(),
            user: who.1.to_owned(),
            name: self.name.to_string(),
            place: self.place,
            acked: self.acked,
            sent,
            attempts,
            at: clock::rfc3339(clock::now_ms()),
        }
    }
}

/// What is due is looked at no more often.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The record that a durable subscription begins with in a thread.
pub fn first_receipt(who: &Principal, thread: &str, name: &str, place: u64) -> ReceiptRecord {
    Receipt::new(name, None, place, false).note((&who.tenant, &who.user), thread)
}

impl Subscriptions {
    /// The client has everything of the thread up to `seq`.
    pub fn ack(&mut self, who: &Principal, thread: &str, seq: u64, name: Option<&str>) -> Result<(), Error> {
        let none = || Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread");
        let id = *self.by_thread.get(thread).ok_or_else(none)?;
        let Some(sub) = self.by_id.get_mut(&id) else { return Err(none()) };
        let cursor = sub.cursor;
        let receipt = sub.receipt.get_or_insert_with(|| Box::new(Receipt::unnamed(0, false)));
        if name.is_some_and(|name| *name != *receipt.name) {
            return Err(Error::new(Code::NotFound, "the subscription does not have this name").at("name"));
        }
        if seq > cursor {
            let head = self.sources.store.head(&who.tenant, &sub.thread)?;
            if seq > head {
                return Err(
                    Error::new(Code::CursorInvalid, format!("seq is behind the thread's head, {head}")).at("seq")
                );
            }
        }
        if receipt.acked < seq {
            receipt.acked = seq;
            self.mark_dirty(id);
        }
        self.settle(who, id, seq);
        Ok(())
    }

    /// Everything up to `seq` is done with: acknowledged, or given up.
    fn settle(&mut self, who: &Principal, id: SubId, seq: u64) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        receipt.place = receipt.place.max(seq);
        let Some(confirm) = &mut receipt.confirm else { return };
        confirm.ack(seq, Instant::now());
        let deadline = confirm.deadline();
        let waits = sub.stage == Stage::Held { until: None } && receipt.dead_lettering.is_none();
        if waits && confirm.room() > 0 {
            sub.stage = Stage::CatchingUp;
            self.enqueue(who, id);
        }
        self.note_due(deadline);
    }

    fn mark_dirty(&mut self, id: SubId) {
        if let Some(receipt) = self.by_id.get_mut(&id).and_then(|sub| sub.receipt.as_mut()) {
            receipt.dirty = true;
            if !receipt.writing {
                self.dirty.push(id);
            }
        }
    }

    /// Records of the receipts that have changed; one at a time for each subscription, so that many acknowledgements become
    /// few records.
    pub fn changed_receipts(&mut self, who: &Principal) -> Vec<Append> {
        let mut batch = Vec::new();
        for id in std::mem::take(&mut self.dirty) {
            let Some(sub) = self.by_id.get_mut(&id) else { continue };
            let Some(receipt) = &mut sub.receipt else { continue };
            if receipt.writing || !receipt.dirty {
                continue;
            }
            (receipt.dirty, receipt.writing) = (false, true);
            let note = receipt.latest_note(&self.sources.store, (&who.tenant, &who.user), &sub.thread);
            let (outbox, thread) = (self.outbox.clone(), Box::from(&*sub.thread));
            let reply: OnVerdict =
                Box::new(move |verdict| outbox.push_answer(Answer::ReceiptStored { thread, stored: verdict.is_ok() }));
            batch.push(self.sources.submit.prepare_record(note.id, (&note).into(), reply));
        }
        batch
    }

    /// The log has taken a receipt, or not.
    pub fn stored(&mut self, thread: &str, stored: bool) {
        let Some(id) = self.by_thread.get(thread).copied() else { return };
        let Some(receipt) = self.by_id.get_mut(&id).and_then(|sub| sub.receipt.as_mut()) else { return };
        receipt.writing = false;
        if !stored {
            receipt.dirty = true;
            self.note_due(Some(Instant::now() + RETRY_AFTER));
        } else if receipt.dirty {
            self.dirty.push(id);
        }
    }

    /// The subscription's last receipt, so that the next session knows what was sent.
    pub(super) fn keep_on_leaving(&mut self, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        let open = receipt.confirm.as_ref().is_some_and(Confirm::is_open) && !receipt.name.is_empty();
        if (receipt.dirty || open)
            && let Some((tenant, _)) = sub.key.split_once('/')
            && let Some(user) = &self.user
        {
            let note = receipt.latest_note(&self.sources.store, (tenant, user), &sub.thread);
            // Nobody is left to hear of it.
            let last = self.sources.submit.prepare_record(note.id, (&note).into(), Box::new(drop));
            self.sources.submit.send(vec![last]);
        }
    }

    /// What is due: positions to tell, receipts to send again, rounds to begin.
    pub fn on_due(&mut self, who: &Principal) {
        let now = Instant::now();
        self.due = None;
        let watched = |(id, sub): (&SubId, &super::Subscription)| {
            (sub.filter.as_ref().is_some_and(|filter| filter.owes()) || sub.receipt.is_some()).then_some(*id)
        };
        for id in self.by_id.iter().filter_map(watched).collect::<Vec<_>>() {
            self.tell_position(id, now);
            self.retry_receipt(id);
            self.look_after(who, id, now);
        }
        self.due = self.due.map(|due| due.max(now + LOOK_EVERY));
    }

    fn tell_position(&mut self, id: SubId, now: Instant) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(filter) = sub.filter.as_ref().filter(|filter| filter.owes()) else { return };
        let due = filter.told + super::POSITION_EVERY;
        if due > now {
            self.note_due(Some(due));
        } else {
            let seq = sub.cursor;
            self.replay.push(Some(id), None, Step::Position { id, seq });
        }
    }

    fn retry_receipt(&mut self, id: SubId) {
        let unsent = |receipt: &Receipt| receipt.dirty && !receipt.writing;
        let receipt = self.by_id.get(&id).and_then(|sub| sub.receipt.as_deref());
        if receipt.is_some_and(unsent) && !self.dirty.contains(&id) {
            self.dirty.push(id);
        }
    }

    /// Begins the next round when the oldest event was not acknowledged in time, and gives it up after the last.
    fn look_after(&mut self, who: &Principal, id: SubId, now: Instant) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        if let Stage::Held { until: Some(until) } = sub.stage {
            if until > now {
                self.note_due(Some(until));
            } else {
                sub.stage = Stage::CatchingUp;
                self.enqueue(who, id);
            }
            return;
        }
        let Some(deadline) = sub.confirm().and_then(|confirm| confirm.deadline()) else { return };
        if deadline > now {
            return self.note_due(Some(deadline));
        }
        self.hear_of_others(who, id);
        let Some(confirm) = self.by_id.get_mut(&id).and_then(|sub| sub.confirm()) else { return };
        match (confirm.deadline(), confirm.oldest()) {
            (Some(deadline), _) if deadline > now => self.note_due(Some(deadline)),
            (Some(_), Some(oldest)) if confirm.exhausted(oldest) => self.dead_letter(who, id, oldest),
            (Some(_), Some(oldest)) => self.begin_round(id, oldest, now),
            _ => {}
        }
    }

    /// Another session may have acknowledged under the same name.
    fn hear_of_others(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get(&id) else { return };
        let Some(name) = sub.receipt.as_ref().map(|receipt| &receipt.name).filter(|name| !name.is_empty()) else {
            return;
        };
        let known = sub.receipt.as_ref().map_or(0, |receipt| receipt.place);
        if let Ok(Some(row)) = self.sources.store.receipt(&who.tenant, &sub.thread, &who.user, name)
            && row.place > known
        {
            if let Some(receipt) = self.by_id.get_mut(&id).and_then(|sub| sub.receipt.as_mut()) {
                receipt.hear_of(&row);
            }
            self.settle(who, id, row.place);
        }
    }

    fn begin_round(&mut self, id: SubId, oldest: u64, now: Instant) {
        let Some(confirm) = self.by_id.get_mut(&id).and_then(|sub| sub.confirm()) else { return };
        let pause = confirm.restart(oldest - 1);
        // Between half of the pause and all of it, so that many sessions do not come back at once.
        let pause = pause.mul_f64(0.5 + 0.5 * clock::random_share());
        self.redeliveries.increment(1);
        if let Some(id) = self.renumber(id, oldest - 1, Stage::Held { until: Some(now + pause) }) {
            self.note_due(Some(now + pause));
            // Without a name there is nobody who could go on from there.
            if self.by_id.get(&id).and_then(|sub| sub.receipt.as_ref()).is_some_and(|it| !it.name.is_empty()) {
                self.mark_dirty(id);
            }
        }
    }

    /// Nobody acknowledged the event: it becomes a dead letter, and the subscription waits until that is durable.
    pub(super) fn dead_letter(&mut self, who: &Principal, id: SubId, seq: u64) {
        let Some(id) = self.renumber(id, seq - 1, Stage::Held { until: None }) else { return };
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = &mut sub.receipt else { return };
        receipt.dead_lettering = Some(seq);
        let attempts = receipt.confirm.as_ref().map_or(0, |confirm| confirm.progress().1);
        let facts: [&[u8]; 5] = [
            UNACKNOWLEDGED.as_bytes(),
            sub.key.as_bytes(),
            who.user.as_bytes(),
            receipt.name.as_bytes(),
            &seq.to_be_bytes(),
        ];
        let note = DeadLetterRecord {
            id: clock::event_id(),
            letter: DeadLetterRecord::letter_of(&facts),
            reason: UNACKNOWLEDGED.into(),
            tenant: who.tenant.to_string(),
            thread: sub.thread.clone(),
            user: who.user.to_string(),
            name: Some(receipt.name.to_string()).filter(|name| !name.is_empty()),
            seq,
            attempts,
            error: format!("sent {attempts} times and not acknowledged"),
            at: clock::rfc3339(clock::now_ms()),
        };
        let (outbox, thread) = (self.outbox.clone(), Box::from(&*sub.thread));
        let reply: OnVerdict = Box::new(move |verdict| {
            outbox.push_answer(Answer::DeadLettered { thread, seq, dead_lettered: verdict.is_ok() })
        });
        let record = self.sources.submit.prepare_record(note.id, (&note).into(), reply);
        self.sources.submit.send(vec![record]);
    }

    /// The dead letter is durable, and the subscription goes on behind it; or it is not, and is tried again.
    pub fn dead_lettered(&mut self, who: &Principal, thread: &str, seq: u64, dead_lettered: bool) {
        let Some(id) = self.by_thread.get(thread).copied() else { return };
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(receipt) = sub.receipt.as_mut().filter(|receipt| receipt.dead_lettering == Some(seq)) else { return };
        receipt.dead_lettering = None;
        let Some(confirm) = &mut receipt.confirm else { return };
        if dead_lettered {
            confirm.give_up(seq);
            receipt.place = receipt.place.max(seq);
            if let Some(id) = self.renumber(id, seq, Stage::CatchingUp) {
                self.mark_dirty(id);
                self.enqueue(who, id);
            }
        } else {
            // Read again, it is found exhausted again.
            confirm.restart(seq - 1);
            let until = Instant::now() + RETRY_AFTER;
            self.hold(id, Some(until));
        }
    }
}
