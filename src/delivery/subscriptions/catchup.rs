//! From the store to the live feed: reads in the background, accepts what they bring, and attaches once the head is near.
//!
//! A session has at most [`READS`] reads under way, each of at most [`CHUNK_BYTES`] or one event, and starts none while so
//! many bytes wait to be sent. The subscription with the highest priority waiting reads first, and those in their handover
//! before all others; [`class_of_turn`] gives the lower classes their share.

use super::Subscriptions;
use super::replay::Replayed;
use super::subscription::{Admission, DeliveredText, Stage, Subscription};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::delivery::fair_queue::{SubId, class_of_turn};
use crate::delivery::outbox::{Answer, Chunk, ReadFor};
use crate::delivery::sources::Sources;
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::Priority;
use crate::protocol::frame::ServerFrame;
use crate::protocol::kinds::AGENT_TOKEN;
use crate::store::{EventRange, Store, StoredEvent};
use crate::{clock, panics};
use tokio::time::Instant;
use uuid::Uuid;

/// Events of one read from the store.
const CHUNK_EVENTS: usize = 512;
/// Bytes of one read from the store; two such reads at most are in memory for a session.
pub const CHUNK_BYTES: usize = 128 << 10;
/// Reads that a session may have under way.
pub const READS: usize = 2;

/// The class in which subscriptions in their handover wait to read: live events of the whole session wait for them.
const HANDOVER_CLASS: usize = 0;
/// The class in which a subscription waits to read if it is not known what waits for it.
const DEFAULT_CLASS: usize = 1;

/// What is read from the store.
enum Wanted {
    Events(EventRange),
    /// The text of messages that are being written, beyond what the client has.
    OpenText(DeliveredText),
}

/// What becomes of the other events of a chunk.
#[derive(PartialEq, Eq)]
enum Accepted {
    GoOn,
    /// The subscription cannot use them now: it has ended, or waits.
    Stop,
}

impl Subscriptions {
    /// The hub has forgotten the subscription because the outbox was full: it goes on from the store.
    pub fn lagged(&mut self, who: &Principal, id: SubId) {
        // If it has been detached since, it is catching up already.
        let is_live = self.by_id.get(&id).is_some_and(|sub| sub.stage == Stage::Live);
        if !is_live {
            return;
        }
        self.detach(id);
        let Some(sub) = self.by_id.get_mut(&id) else { return };

        let from = sub.cursor + 1;
        // For the notice alone: if the store does not answer, it names the event that is known to be missing.
        let to = self.sources.store.head(&who.tenant, &sub.thread).unwrap_or(from);
        // Otherwise only deltas are missing: the text that is read before it goes live again has them.
        if to >= from {
            sub.needs_caught_up = true;
            let frame = ServerFrame::Lagged { thread: sub.called(), from, to }.encode().into();
            self.push_replayed(id, None, Replayed::Notice { id, frame });
        }
        self.enqueue(who, id);
    }

    /// Accepts what a read brought. An error ends the subscription and is returned with its thread.
    pub fn chunk(
        &mut self,
        who: &Principal,
        reader: ReadFor,
        read: Result<Chunk, Error>,
    ) -> Result<(), (String, Error)> {
        self.reads[reader.class] -= 1;
        let accepted = match read {
            Ok(Chunk::Events(events)) => self.accept_events(who, reader.sub, events),
            Ok(Chunk::OpenText(deltas)) => {
                self.accept_open_text(reader.sub, deltas);
                Ok(())
            }
            Err(error) => Err(error),
        };
        let Err(error) = accepted else { return Ok(()) };
        match self.end(reader.sub) {
            Some(thread) => Err((thread, error)),
            // It had ended meanwhile.
            None => Ok(()),
        }
    }

    fn accept_events(&mut self, who: &Principal, id: SubId, events: Vec<StoredEvent>) -> Result<(), Error> {
        self.replayed.increment(events.len() as u64);
        for event in events {
            if self.accept_event(who, id, event) == Accepted::Stop {
                return Ok(());
            }
        }

        let Some(sub) = self.by_id.get(&id) else { return Ok(()) };
        match sub.stage {
            Stage::CatchingUp => self.approach(who, id)?,
            Stage::Handover { to } if sub.cursor >= to => self.end_events(id),
            // Without credit the handover would not end, and all others' live events would wait for it.
            Stage::Handover { .. } if self.out_of_credit => {
                self.detach(id);
                self.enqueue(who, id);
            }
            Stage::Handover { .. } => self.queue[HANDOVER_CLASS].push_front(id),
            Stage::Live | Stage::Held { .. } => {}
        }
        Ok(())
    }

    fn accept_event(&mut self, who: &Principal, id: SubId, event: StoredEvent) -> Accepted {
        let Some(sub) = self.by_id.get_mut(&id) else { return Accepted::Stop };
        let is_duplicate = event.seq <= sub.cursor;
        if is_duplicate {
            return Accepted::GoOn;
        }
        match sub.admit(event.seq, &event.kind) {
            Admission::Send => {
                self.push_replayed(id, Some(event.class), Replayed::Event { id, seq: event.seq, frame: event.frame });
                Accepted::GoOn
            }
            Admission::LeaveOut => {
                // So that on a long way through events that are left out `position` is sent now and then.
                let due = sub.filter.as_mut().map(|filter| filter.leave_out(event.seq));
                self.schedule(due);
                Accepted::GoOn
            }
            Admission::Acknowledged => Accepted::GoOn,
            Admission::NoRoom => {
                self.hold(id, None);
                Accepted::Stop
            }
            Admission::Exhausted => {
                self.dead_letter(who, id, event.seq);
                Accepted::Stop
            }
        }
    }

    /// In the handover all events are read. The text of messages that are being written comes after them, and before
    /// anything live.
    fn end_events(&mut self, id: SubId) {
        let needs_open_text = self.by_id.get(&id).is_some_and(|sub| sub.needs_open_text);
        if needs_open_text {
            self.push_replayed(id, None, Replayed::CaughtUp(id));
            self.queue[HANDOVER_CLASS].push_front(id);
        } else {
            self.push_replayed(id, None, Replayed::Live(id));
        }
    }

    fn accept_open_text(&mut self, id: SubId, deltas: Vec<Delta>) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        if !sub.needs_open_text {
            return;
        }
        sub.needs_open_text = false;
        let delivered: DeliveredText = deltas.iter().map(|delta| (delta.name.clone(), delta.to_char)).collect();
        sub.delivered = Some(Box::new(delivered));

        for delta in deltas {
            let adds_nothing = delta.text.is_empty() && delta.from_char > 0;
            if !adds_nothing {
                let class = Priority::class(delta.priority);
                self.push_replayed(id, Some(class), Replayed::OpenText { id, delta });
            }
        }
        self.push_replayed(id, None, Replayed::Live(id));
    }

    /// Decides how a subscription that catches up goes on: near the head it attaches, else it reads another chunk.
    ///
    /// It attaches first and looks up the head and the right to read afterwards. That order makes the handover exact:
    /// - what was committed before the lookup is in the store, and is read from there;
    /// - what is committed after it comes through the hub, since the subscription is attached by then;
    /// - what is committed in between comes both ways, and is dropped once by its seq.
    ///
    /// Likewise with the user's removal: either the lookup sees it, or the hub forgets the subscription and notifies the
    /// session.
    pub(super) fn approach(&mut self, who: &Principal, id: SubId) -> Result<(), Error> {
        let Some(sub) = self.by_id.get_mut(&id) else { return Ok(()) };
        let room = sub.confirm().map_or(CHUNK_EVENTS, |confirm| confirm.room().min(CHUNK_EVENTS));
        if room == 0 {
            self.hold(id, None);
            return Ok(());
        }

        // Far from the head there is no use in attaching: the outbox would only overflow. And without credit nothing is
        // read, so that the handover would not end.
        let head = self.sources.store.head(&who.tenant, &sub.thread)?;
        let is_at_head = head <= sub.cursor;
        let is_near = head <= sub.cursor + room as u64;
        if !is_at_head && (!is_near || self.out_of_credit) {
            self.enqueue(who, id);
            return Ok(());
        }

        let by_scope = scopes::reads_by_scope(who.scopes);
        self.sources.hub.attach(&sub.key, &self.outbox, id, &who.user, by_scope, sub.wants(AGENT_TOKEN));
        sub.stage = Stage::Handover { to: sub.cursor };
        self.handovers += 1;

        let row = self.sources.store.thread(&who.tenant, &sub.thread)?.unwrap_or_default();
        sub.stage = Stage::Handover { to: row.head };
        sub.needs_open_text = row.writing > 0 && sub.wants(AGENT_TOKEN);
        if !sub.needs_open_text {
            sub.delivered = None;
        }
        self.sources.rights.may_read(who, &sub.thread)?;

        if row.head <= sub.cursor {
            self.end_events(id);
        } else {
            self.queue[HANDOVER_CLASS].push_front(id);
        }
        Ok(())
    }

    /// Puts the subscription among those that want to read, by the highest priority that waits for it.
    pub(super) fn enqueue(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get(&id) else { return };
        // If the store fails here, the read will fail as well and say so.
        let row = self.sources.store.thread(&who.tenant, &sub.thread).ok().flatten();
        let class = row.and_then(|row| row.class_after(sub.cursor)).unwrap_or(DEFAULT_CLASS);
        self.queue[class].push_back(id);
    }

    /// Starts reads while there is room for what they bring, and (with flow control) credit to send it.
    pub fn read_on(&mut self, who: &Principal, credit: Option<u64>) {
        let allowed = credit.map_or(CHUNK_EVENTS, |credit| usize::try_from(credit).unwrap_or(usize::MAX));
        while allowed > 0 && self.reads.iter().sum::<usize>() < READS && self.replay_bytes < CHUNK_BYTES {
            let Some(reader) = self.next_reader() else { return };
            let Some(sub) = self.by_id.get_mut(&reader.sub) else { continue };
            let (wanted, thread) = (sub.wanted(allowed), sub.thread.clone());
            self.reads[reader.class] += 1;

            let (sources, outbox, who) = (self.sources.clone(), self.outbox.clone(), who.clone());
            tokio::task::spawn_blocking(move || {
                let read = panics::catch(|| read(&sources, &who, &thread, wanted)).flatten();
                outbox.push_answer(Answer::Chunk { sub: reader, read });
            });
        }
    }

    /// Who reads next. A subscription of the highest class that waits does not read while one of a higher class does, whose
    /// next read would have to wait for it; the shares of the lower classes are not affected by that.
    fn next_reader(&mut self) -> Option<ReadFor> {
        let waiting = std::array::from_fn(|class| !self.queue[class].is_empty());
        let highest = waiting.iter().position(|waits| *waits)?;
        let turn = self.read_turn.wrapping_add(1);
        let class = class_of_turn(turn, waiting)?;

        let a_higher_one_reads = self.reads[..highest].iter().any(|reads| *reads > 0);
        if class == highest && a_higher_one_reads {
            return None;
        }
        self.read_turn = turn;
        let sub = self.queue[class].pop_front()?;
        Some(ReadFor { sub, class })
    }

    /// The subscription reads nothing and gets nothing live: until that time, or until an acknowledgement makes room.
    pub(super) fn hold(&mut self, id: SubId, until: Option<Instant>) {
        self.detach(id);
        if let Some(sub) = self.by_id.get_mut(&id) {
            sub.stage = Stage::Held { until };
            self.schedule(until);
        }
    }
}

impl Subscription {
    /// What its next read is for, with so many events allowed by flow control.
    fn wanted(&mut self, allowed: usize) -> Wanted {
        if let Stage::Handover { to } = self.stage
            && self.cursor >= to
        {
            return Wanted::OpenText(self.delivered.as_deref().cloned().unwrap_or_default());
        }

        let limit = if self.filter.is_some() {
            // Many of them may be left out, and those need neither room nor credit.
            CHUNK_EVENTS
        } else {
            let room = self.confirm().map_or(CHUNK_EVENTS, |confirm| confirm.room());
            room.clamp(1, CHUNK_EVENTS).min(allowed)
        };
        Wanted::Events(EventRange { from: self.cursor + 1, limit, bytes: CHUNK_BYTES, ..EventRange::all() })
    }
}

/// Reads for a subscription. The right to read is looked up once more after the read, so that nothing committed after the
/// user's removal goes out.
fn read(sources: &Sources, who: &Principal, thread: &str, wanted: Wanted) -> Result<Chunk, Error> {
    sources.rights.read(who, thread, |head| match wanted {
        Wanted::Events(range) => events(&sources.store, who, thread, range, head).map(Chunk::Events),
        Wanted::OpenText(delivered) => open_text(&sources.store, who, thread, &delivered).map(Chunk::OpenText),
    })
}

/// `head` was looked up before: what is committed since may be missing, what is up to there may not.
fn events(
    store: &Store,
    who: &Principal,
    thread: &str,
    range: EventRange,
    head: u64,
) -> Result<Vec<StoredEvent>, Error> {
    let events = store.events(&who.tenant, thread, range)?;
    if events.is_empty() && head >= range.from {
        return Err(Error::new(Code::Internal, "the store lacks events that it should have"));
    }
    Ok(events)
}

/// The text of messages that are being written in the thread, beyond what the client has.
fn open_text(store: &Store, who: &Principal, thread: &str, delivered: &DeliveredText) -> Result<Vec<Delta>, Error> {
    let mut deltas = Vec::new();
    for key in store.open_messages(&who.tenant, thread)? {
        let name = Delta::name(&key.run.run, &key.message);
        let from_char = delivered.get(&name).copied().unwrap_or(0);
        let text = store.text_after(&key, from_char)?;
        // Looked up after the text: if the message was closed meanwhile, the text may be incomplete, but the event that closed
        // it comes live and has all of it.
        let Some(row) = store.message(&key)?.filter(|row| row.closed.is_none()) else { continue };
        deltas.push(Delta {
            name,
            thread: thread.into(),
            run: key.run.run.into(),
            message: key.message.into(),
            event: Uuid::from_bytes(row.event),
            from: row.from.into(),
            at: clock::rfc3339(row.last_at).into(),
            priority: None,
            head: 0,
            from_char,
            to_char: from_char + text.chars().count() as u64,
            text,
        });
    }
    Ok(deltas)
}
