//! What people do about dead letters: each act is a record in the letter's own partition, and the first one since the letter
//! failed counts.
//!
//! A letter that the projector made of a refused event is in that event's partition. To requeue it is one record there: it is
//! the act, and with it the event's turn comes again, so nothing can happen between the two, and the event appears once
//! however often and on however many nodes it is asked for. A letter that a session wrote is in the topic of dead letters, and
//! what is done about it as well.
//!
//! An `unreadable` letter may be from another partition than its acts. It can only be discarded, so the acts alone decide: one
//! that comes before its letter waits for it in the letter's row, and the row is the same in the end.

use uuid::Uuid;

use super::dead_letters::{again, keep_newest, read_value};
use super::deliveries::MAX_REQUEUED;
use super::judge::BatchState;
use super::rules;
use super::thread::Thread;
use super::transaction::EventRecord;
use super::{Published, RequeuedNotice, Verdict};
use crate::clock;
use crate::log::{Foreign, Grant, RULES, Record, Topic};
use crate::protocol::dead_letters::{
    ATTEMPTS, Fingerprint, OVERFLOW, REJECTED, SCHEMA, UNACKNOWLEDGED, UNREADABLE, WEBHOOK,
};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{LogEvent, Priority};
use crate::protocol::kinds::{LETTER_DISCARDED, LETTER_REQUEUED, LETTER_SETTLED, LETTER_TRIED};
use crate::protocol::letters::Effect;
use crate::protocol::records::LetterActRecord;
use crate::protocol::{ids, json};
use crate::store::dead_letters::{ActRow, DeadLetterRow, LetterState, TryRow};
use crate::store::{StoreError, WaitingRow};

/// What somebody does about a letter.
pub(super) struct Act {
    pub(super) what: What,
    pub(super) record: LetterActRecord,
    /// The version of the rules that it is judged by.
    rules: u16,
    /// Its time, in milliseconds.
    pub(super) at: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Requeue,
    Discard,
    /// What was requeued is done.
    Settle,
    /// What was requeued was tried, and will be again.
    Try,
}

/// By what a requeued event is judged.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    pub(super) partition: u32,
    pub(super) rules: u16,
    pub(super) at: u64,
    pub(super) key_time: u64,
}

/// Whether a record is an act.
pub(super) fn is_act(record: &Record) -> bool {
    let since = match what(&record.kind) {
        Some(What::Requeue | What::Discard | What::Settle) => rules::LETTERS_ARE_ACTED_ON,
        Some(What::Try) => rules::DELIVERIES_ARE_REQUEUED,
        None => return false,
    };
    record.rules >= since
}

fn what(kind: &str) -> Option<What> {
    match kind {
        LETTER_REQUEUED => Some(What::Requeue),
        LETTER_DISCARDED => Some(What::Discard),
        LETTER_SETTLED => Some(What::Settle),
        LETTER_TRIED => Some(What::Try),
        _ => None,
    }
}

/// The act in a record; or why the record is foreign.
pub(super) fn read(record: &Record) -> Result<Act, Foreign> {
    let read = || {
        let act: LetterActRecord = read_value(record)?;
        let names = ids::check_name("tenant", &act.tenant).and(ids::check_name("by", &act.by));
        let names = names.and(act.thread.as_deref().map_or(Ok(()), ids::check_thread));
        names.map_err(|error| error.to_string())?;
        let at = clock::parse_rfc3339(&act.at).ok_or("at is not RFC 3339")?;
        let what = what(&act.kind).filter(|_| act.kind == record.kind).ok_or("its kind is not the header's")?;
        let place = Record::from(&act);
        if (place.topic, &place.key) != (record.topic, &record.key) {
            return Err("it is not in its letter's partition".to_owned());
        }
        if act.attempt.is_some() != (what == What::Try) {
            return Err("attempt is of letter_tried".to_owned());
        }
        Ok(Act { what, record: act, rules: record.rules, at })
    };
    read().map_err(|why| Foreign::new(why, record))
}

/// What a requeue does with a letter; or why it cannot be requeued.
pub fn effect_of(row: &DeadLetterRow) -> Result<Effect, Error> {
    match &*row.reason {
        UNREADABLE => {
            let why =
                "the record cannot be read, so there is nothing to try again: whoever wrote it has to write it right";
            Err(Error::new(Code::Conflict, why).at("id"))
        }
        UNACKNOWLEDGED if row.name.is_some() => Ok(Effect::Deliver),
        UNACKNOWLEDGED => {
            let why = "the subscription had no name and ended with its session: nobody takes over what it was sent";
            Err(Error::new(Code::Conflict, why).at("id"))
        }
        ATTEMPTS | REJECTED | WEBHOOK | OVERFLOW => Ok(Effect::Work),
        SCHEMA => {
            let why = "the event is not what its kind has to be, and never will be: whoever wrote it has to write another one";
            Err(Error::new(Code::Conflict, why).at("id"))
        }
        _ if row.event.is_some() => Ok(Effect::Append),
        _ => Err(Error::new(Code::Conflict, "its event is not kept").at("id")),
    }
}

/// Whether nothing has been done about the letter since it failed so often.
pub fn check_open(row: &DeadLetterRow, round: u32) -> Result<(), Error> {
    if row.state == LetterState::Open && row.round == round {
        return Ok(());
    }
    let why = match row.acts.last() {
        Some(act) => {
            let done = if act.discarded { "discarded" } else { "requeued" };
            format!("it was {done} by {} at {}", act.by, clock::rfc3339(act.at))
        }
        None => "it is not as it was".to_owned(),
    };
    Err(Error::new(Code::Conflict, why).at("id"))
}

/// Whether the letter may be discarded: as [`check_open`], and so may a delivery that was requeued and is not done.
pub fn check_discardable(row: &DeadLetterRow, round: u32) -> Result<(), Error> {
    let is_waited_for = row.reason == UNACKNOWLEDGED && row.state == LetterState::Requeued;
    if is_waited_for && row.round == round { Ok(()) } else { check_open(row, round) }
}

impl Act {
    fn row(&self) -> ActRow {
        ActRow {
            discarded: self.what == What::Discard,
            by: self.record.by.clone(),
            at: self.at,
            note: self.record.note.clone(),
        }
    }

    pub(super) fn done(&self) -> Verdict {
        Ok(Published { seq: 0, event: self.record.id, duplicate: false })
    }

    /// Whether its letter may be in a partition that is read later.
    fn is_early(&self) -> bool {
        self.record.reason == UNREADABLE && self.what == What::Discard
    }

    /// What stands for a letter that has not come yet.
    fn early_row(&self) -> DeadLetterRow {
        let row = DeadLetterRow::open(UNREADABLE, None, self.at, 0, String::new());
        DeadLetterRow { thread: self.record.thread.clone(), ..row }
    }
}

impl BatchState<'_> {
    /// The letter that an act is about, if the act is the first since the letter failed.
    pub(super) fn letter_for(&self, act: &Act) -> Result<Result<DeadLetterRow, Error>, StoreError> {
        let LetterActRecord { tenant, letter, thread, round, reason, .. } = &act.record;
        let none = || Error::new(Code::NotFound, "there is no such dead letter").at("id");
        let Some(row) = self.dead_letters.row(&self.tx, tenant, letter.as_bytes())? else { return Ok(Err(none())) };
        if row.thread != *thread || row.reason != *reason {
            return Ok(Err(none()));
        }
        let checked = match act.what {
            What::Settle | What::Try if row.state == LetterState::Requeued && row.round == *round => Ok(()),
            What::Settle | What::Try => Err(Error::new(Code::Conflict, "it is not waited for").at("id")),
            What::Discard if act.rules >= rules::DELIVERIES_ARE_REQUEUED => check_discardable(&row, *round),
            What::Requeue | What::Discard => check_open(&row, *round),
        };
        Ok(checked.map(|()| row))
    }

    /// An act in the topic of dead letters.
    pub(super) fn act_on_delivery(&mut self, act: &Act) -> Result<Verdict, StoreError> {
        let row = match self.letter_for(act)? {
            Ok(row) => row,
            Err(refused) if refused.code == Code::NotFound && act.is_early() => act.early_row(),
            Err(refused) => return Ok(Err(refused)),
        };
        match act.what {
            What::Discard => self.close(act, row, LetterState::Discarded)?,
            What::Settle => self.close(act, row, LetterState::Done)?,
            What::Requeue => return self.requeue_delivery(act, row),
            What::Try => return self.tried(act, row),
        }
        Ok(act.done())
    }

    /// The event is to be delivered again to the subscription that did not acknowledge it.
    fn requeue_delivery(&mut self, act: &Act, row: DeadLetterRow) -> Result<Verdict, StoreError> {
        let refused = |why: &str| Ok(Err(Error::new(Code::Conflict, why.to_owned()).at("id")));
        let tenant = &act.record.tenant;
        if let Err(refused) = effect_of(&row) {
            return Ok(Err(refused));
        }
        if act.rules < rules::DELIVERIES_ARE_REQUEUED {
            return refused("to deliver an event again is planned");
        }
        if !self.dead_letters.deliveries.has_room(&self.tx, tenant, &row)? {
            return refused(&format!(
                "the subscription has {MAX_REQUEUED} events of this thread to be sent again: as many as may be"
            ));
        }
        let seq = row.seq.unwrap_or(0);
        if let (Some(user), Some(thread)) = (&row.user, &row.thread) {
            let user = ids::log_key(tenant, user);
            self.tx.commit.requeued.push(RequeuedNotice { user, thread: thread.clone() });
        }
        self.close(act, row, LetterState::Requeued)?;
        Ok(act.done().map(|published| Published { seq, ..published }))
    }

    /// The event is work of its group again.
    pub(super) fn requeue_work(&mut self, act: &Act, row: DeadLetterRow) -> Result<Verdict, StoreError> {
        let (Some(thread), Some(group), Some(seq)) = (&row.thread, &row.name, row.seq) else {
            return Ok(Err(Error::new(Code::Conflict, "it is not known whose work it was").at("id")));
        };
        let LetterActRecord { tenant, letter, by, .. } = &act.record;
        let class = Priority::class(None) as u8;
        let kind = row.kind.clone().unwrap_or_default();
        let waits = WaitingRow { kind, user: by.clone(), at: act.at, class };
        let place = (tenant.clone(), thread.clone(), group.clone());
        if let Err(refused) = self.works.requeue(&mut self.tx, *letter, place, (seq, &waits))? {
            return Ok(Err(refused));
        }
        self.close(act, row, LetterState::Requeued)?;
        Ok(act.done().map(|published| Published { seq, ..published }))
    }

    /// An attempt more at what was requeued. Of several sessions under one name the first to say so counts.
    fn tried(&mut self, act: &Act, mut row: DeadLetterRow) -> Result<Verdict, StoreError> {
        let LetterActRecord { tenant, letter, by, note, attempt, .. } = &act.record;
        let known = self.dead_letters.deliveries.attempts(&self.tx, tenant, (letter.as_bytes(), &row))?;
        if *attempt != Some(known + 1) {
            return Ok(Err(Error::new(Code::Conflict, "this attempt is counted already").at("id")));
        }
        row.attempts += 1;
        row.tries.push(TryRow { at: act.at, worker: Some(by.clone()), reason: note.clone().unwrap_or_default() });
        keep_newest(&mut row.tries);
        self.put_letter(act, row)?;
        Ok(act.done())
    }

    /// The letter is in no list any more, for now or for good.
    pub(super) fn close(&mut self, act: &Act, mut row: DeadLetterRow, state: LetterState) -> Result<(), StoreError> {
        row.state = state;
        if matches!(act.what, What::Requeue | What::Discard) {
            row.acts.push(act.row());
            keep_newest(&mut row.acts);
        }
        if act.what == What::Requeue {
            row.round += 1;
        }
        self.put_letter(act, row)
    }

    fn put_letter(&mut self, act: &Act, row: DeadLetterRow) -> Result<(), StoreError> {
        self.dead_letters.put(&mut self.tx, &act.record.tenant, *act.record.letter.as_bytes(), row)
    }

    /// The turn of a refused event comes again. It is appended, and the letter done with; or it is refused again, and the
    /// letter stays open with one attempt more.
    pub(super) fn requeue_event(
        &mut self,
        act: &Act,
        row: DeadLetterRow,
        turn: Turn,
        thread: &mut Thread,
    ) -> Result<Verdict, StoreError> {
        let head = thread.row.head;
        let verdict = self.judge_again(&row, turn, thread)?;
        match &verdict {
            Ok(published) => {
                let seq = Some(published.seq).filter(|seq| *seq > 0);
                self.close(act, DeadLetterRow { seq, ..row }, LetterState::Done)?;
            }
            Err(refused) => {
                let error = refused.message.to_string();
                let tried = TryRow { at: act.at, worker: row.user.clone(), reason: error.clone() };
                let failed = DeadLetterRow {
                    at: act.at,
                    attempts: 1,
                    fingerprint: Fingerprint::of(&row.reason, row.kind.as_deref(), &error).0,
                    error,
                    place: Some(head),
                    round: row.round + 1,
                    tries: vec![tried],
                    ..row.clone()
                };
                let mut failed = again(&row, failed);
                failed.acts.push(act.row());
                keep_newest(&mut failed.acts);
                self.put_letter(act, failed)?;
            }
        }
        Ok(verdict)
    }

    /// What becomes of a letter's event now.
    pub(super) fn judge_again(
        &mut self,
        row: &DeadLetterRow,
        turn: Turn,
        thread: &mut Thread,
    ) -> Result<Verdict, StoreError> {
        let Turn { partition, rules, at, key_time } = turn;
        let text = row.event.clone().unwrap_or_default();
        let event: LogEvent<'_> = match json::decode(&text) {
            Ok(event) => event,
            Err(error) => return Ok(Err(error)),
        };
        let grant = row.grant.as_deref().and_then(|grant| Grant::parse(grant.as_bytes())).unwrap_or(Grant::Member);
        let record = Record {
            topic: Topic::Events,
            key: ids::log_key(&event.tenant, &event.thread),
            kind: event.kind.to_string(),
            rules,
            grant,
            traceparent: None,
            value: text.clone().into_bytes().into(),
        };
        self.judge(&EventRecord { partition, record: &record, event: &event, at, key_time }, thread)
    }
}

/// The key of the thread that a letter's event goes to.
pub(super) fn thread_key(tenant: &str, row: &DeadLetterRow) -> Option<String> {
    row.thread.as_ref().map(|thread| ids::log_key(tenant, thread))
}

/// An act's record by a user, now.
pub fn record(
    kind: &str,
    id: Uuid,
    letter: Uuid,
    row: &DeadLetterRow,
    who: (&str, &str),
    note: Option<&str>,
) -> LetterActRecord {
    let (tenant, by) = who;
    LetterActRecord {
        kind: kind.to_owned(),
        id,
        letter,
        reason: row.reason.clone(),
        tenant: tenant.to_owned(),
        thread: row.thread.clone(),
        round: row.round,
        by: by.to_owned(),
        note: note.map(str::to_owned),
        attempt: None,
        at: clock::rfc3339(clock::now_ms()),
    }
}

/// A requeue of a delivery by a user, now, as it is judged.
pub(super) fn requeue_of(tenant: &str, letter: Uuid, row: &DeadLetterRow) -> Act {
    let record = record(LETTER_REQUEUED, clock::event_id(), letter, row, (tenant, ""), None);
    Act { what: What::Requeue, record, rules: RULES, at: clock::now_ms() }
}

#[cfg(test)]
mod tests {
    use super::super::dead_letters::ForeignSource;
    use super::super::rebuild::compare;
    use super::*;
    use crate::protocol::dead_letters::letter_of;
    use crate::store::Store;

    const AT: u64 = 1_700_000_000_000;

    enum Step {
        /// The unreadable record is read.
        Letter,
        /// Somebody discards it.
        Discard(&'static str),
    }

    fn letter() -> Uuid {
        letter_of(&[UNREADABLE.as_bytes(), b"events", &3u32.to_be_bytes(), &7u64.to_be_bytes()])
    }

    fn discard(by: &str) -> Act {
        let record = LetterActRecord {
            kind: LETTER_DISCARDED.to_owned(),
            id: clock::random_id(),
            letter: letter(),
            reason: UNREADABLE.to_owned(),
            tenant: "acme".to_owned(),
            thread: Some("t".to_owned()),
            round: 0,
            by: by.to_owned(),
            note: None,
            attempt: None,
            at: clock::rfc3339(AT),
        };
        Act { what: What::Discard, record, rules: RULES, at: AT }
    }

    /// The store after these steps, each in a commit of its own or all in one, and whether each act was the first.
    fn after(steps: &[Step], in_one: bool) -> (tempfile::TempDir, Store, Vec<bool>) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let mut first = Vec::new();
        let size = if in_one { steps.len() } else { 1 };
        for batch in steps.chunks(size) {
            let mut state = BatchState::new(&store, None);
            for step in batch {
                match step {
                    Step::Letter => {
                        let source = ForeignSource { topic: "events", partition: 3, offset: 7 };
                        let (key, value) = (Some("acme/t".into()), Some("garbage".into()));
                        let foreign =
                            Foreign { why: "it is no event".into(), key, value, at: Some(AT - 5), plain: None };
                        state.dead_letters.put_foreign(&mut state.tx, &source, &foreign, AT).expect("the store works");
                    }
                    Step::Discard(by) => {
                        first.push(state.act_on_delivery(&discard(by)).expect("the store works").is_ok());
                    }
                }
            }
            store.commit(state.tx.rows).expect("it commits");
        }
        (folder, store, first)
    }

    #[test]
    fn an_act_on_an_unreadable_record_that_is_read_before_it_comes_to_the_same() {
        use Step::{Discard, Letter};
        let (_folder, usual, first) = after(&[Letter, Discard("root"), Discard("vice")], false);
        assert_eq!(first, [true, false]);
        let row = usual.dead_letter("acme", letter().as_bytes()).expect("it is read").expect("it is there");
        assert_eq!((row.state, row.acts.len(), &*row.acts[0].by), (LetterState::Discarded, 1, "root"));
        assert_eq!(row.error, "it is no event");

        for steps in [
            [Letter, Discard("root"), Discard("vice")],
            [Discard("root"), Letter, Discard("vice")],
            [Discard("root"), Discard("vice"), Letter],
        ] {
            for in_one in [false, true] {
                let (_folder, store, first) = after(&steps, in_one);
                assert_eq!(first, [true, false]);
                compare(&usual, &store).expect("the same, row by row");
            }
        }
    }

    /// A delivery that was given up, by its seq.
    fn unacknowledged(state: &mut BatchState<'_>, seq: u64) -> Uuid {
        let letter = letter_of(&[UNACKNOWLEDGED.as_bytes(), &seq.to_be_bytes()]);
        let row = DeadLetterRow {
            thread: Some("t".to_owned()),
            user: Some("ada".to_owned()),
            name: Some("mail".to_owned()),
            seq: Some(seq),
            ..DeadLetterRow::open(UNACKNOWLEDGED, None, AT, 5, "sent 5 times".to_owned())
        };
        state.dead_letters.put(&mut state.tx, "acme", *letter.as_bytes(), row).expect("the store works");
        letter
    }

    fn act(what: What, letter: Uuid, round: u32, attempt: Option<u32>) -> Act {
        let reason = UNACKNOWLEDGED.to_owned();
        let record = LetterActRecord { letter, reason, round, attempt, ..discard("root").record };
        Act { what, record, rules: RULES, at: AT }
    }

    /// The code of a refusal.
    fn outcome(state: &mut BatchState<'_>, act: &Act) -> Option<Code> {
        state.act_on_delivery(act).expect("the store works").err().map(|refused| refused.code)
    }

    #[test]
    fn a_delivery_is_requeued_once_and_each_attempt_and_end_of_it_counts_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let mut state = BatchState::new(&store, None);
        let letter = unacknowledged(&mut state, 7);
        let conflict = Some(Code::Conflict);

        let early = Act { rules: rules::LETTERS_ARE_ACTED_ON, ..act(What::Requeue, letter, 0, None) };
        assert_eq!(outcome(&mut state, &early), conflict, "as it was judged then");
        assert_eq!(outcome(&mut state, &act(What::Requeue, letter, 0, None)), None);
        assert_eq!(outcome(&mut state, &act(What::Requeue, letter, 0, None)), conflict);
        assert_eq!(outcome(&mut state, &act(What::Requeue, letter, 1, None)), conflict, "it is waited for");
        let early = Act { rules: rules::LETTERS_ARE_ACTED_ON, ..act(What::Discard, letter, 1, None) };
        assert_eq!(outcome(&mut state, &early), conflict, "as it was judged then");

        for (attempt, first) in [(2, conflict), (1, None), (1, conflict), (2, None)] {
            assert_eq!(outcome(&mut state, &act(What::Try, letter, 1, Some(attempt))), first, "attempt {attempt}");
        }
        assert_eq!(outcome(&mut state, &act(What::Settle, letter, 0, None)), conflict, "that was another round");
        store.commit(state.tx.rows).expect("it commits");
        let list = store.requeued_deliveries("acme", "t", "ada", "mail").expect("it is read");
        let list: Vec<_> = list.iter().map(|it| (it.seq, it.round, it.before, it.attempts)).collect();
        assert_eq!(list, [(7, 1, 5, 2)]);

        let mut state = BatchState::new(&store, None);
        assert_eq!(outcome(&mut state, &act(What::Settle, letter, 1, None)), None);
        for what in [What::Settle, What::Discard, What::Requeue] {
            assert_eq!(outcome(&mut state, &act(what, letter, 1, None)), conflict);
        }
        store.commit(state.tx.rows).expect("it commits");
        assert_eq!(store.requeued_deliveries("acme", "t", "ada", "mail").expect("it is read"), []);
        let row = store.dead_letter("acme", letter.as_bytes()).expect("it is read").expect("it is there");
        assert_eq!((row.state, row.attempts, row.tries.len(), row.acts.len()), (LetterState::Done, 7, 2, 1));
    }

    #[test]
    fn what_one_subscription_is_to_be_sent_again_is_bounded_and_in_the_thread_s_order() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let mut state = BatchState::new(&store, None);
        let most = MAX_REQUEUED as u64;
        for seq in (1..=most).rev() {
            let letter = unacknowledged(&mut state, seq);
            assert_eq!(outcome(&mut state, &act(What::Requeue, letter, 0, None)), None, "{seq}");
        }
        let one_more = unacknowledged(&mut state, most + 1);
        assert_eq!(outcome(&mut state, &act(What::Requeue, one_more, 0, None)), Some(Code::Conflict));
        let first = letter_of(&[UNACKNOWLEDGED.as_bytes(), &1u64.to_be_bytes()]);
        assert_eq!(outcome(&mut state, &act(What::Discard, first, 1, None)), None);
        assert_eq!(outcome(&mut state, &act(What::Requeue, one_more, 0, None)), None, "there is room again");
        store.commit(state.tx.rows).expect("it commits");
        let list = store.requeued_deliveries("acme", "t", "ada", "mail").expect("it is read");
        assert!(list.iter().map(|it| it.seq).eq(2..=most + 1));
    }
}
