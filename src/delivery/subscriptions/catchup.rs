//! From the store to the live feed: reads in the background, accepts what they bring, and attaches once the head is near.
//!
//! A session has at most [`READS`] reads under way, each of a chunk, one event or the text of one message, and starts none
//! while as many bytes as in a chunk wait to be sent. A chunk has [`CHUNK_BYTES`]; for a client that takes one after the other
//! of one thread without a pause each has twice as many as the last, up to [`MAX_CHUNK_BYTES`]: a read costs two threads of
//! the server that are woken, however much it brings. Where several subscriptions read, they take turns in small ones. The subscription with the highest priority waiting reads first, and
//! those in their handover before all others; [`class_of_turn`] gives the lower classes their share.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Subscriptions;
use super::pace::Step;
use super::reading::{CHUNK_BYTES, MAX_CHUNK_BYTES, Read, Wanted};
use super::replay::Replayed;
use super::subscription::{Admission, Stage, Subscription};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::delivery::fair_queue::{SubId, class_of_turn};
use crate::delivery::outbox::{Chunk, OpenText, ReadFor};
use crate::memory::Charge;
use crate::protocol::error::Error;
use crate::protocol::event::Priority;
use crate::protocol::frame::ServerFrame;
use crate::store::{EventRange, StoredEvent};

/// Events of one read of [`CHUNK_BYTES`].
const CHUNK_EVENTS: usize = 512;
/// A client that takes a chunk in less gets a larger one.
const KEEPS_UP: Duration = Duration::from_millis(20);
/// Reads that a session may have under way.
pub const READS: usize = 2;

/// The class in which subscriptions in their handover wait to read: live events of the whole session wait for them.
const HANDOVER_CLASS: usize = 0;
/// The class in which a subscription waits to read if it is not known what waits for it.
pub(super) const DEFAULT_CLASS: usize = 1;

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
            Ok(Chunk::Events { events, charge, next_ms }) => {
                if let Some(pace) = self.by_id.get_mut(&reader.sub).and_then(|sub| sub.pace.as_mut()) {
                    pace.read(next_ms, Instant::now());
                }
                self.accept_events(who, reader.sub, events, &charge)
            }
            Ok(Chunk::OpenText { texts, next }) => {
                self.accept_open_text(reader.sub, texts, next);
                Ok(())
            }
            Ok(Chunk::Requeued(found)) => {
                self.accept_requeued(who, reader.sub, found);
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

    fn accept_events(
        &mut self,
        who: &Principal,
        id: SubId,
        events: Vec<StoredEvent>,
        charge: &Arc<Charge>,
    ) -> Result<(), Error> {
        self.replayed.increment(events.len() as u64);
        for event in events {
            if self.accept_event(who, id, event, charge) == Accepted::Stop {
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

    fn accept_event(&mut self, who: &Principal, id: SubId, event: StoredEvent, charge: &Arc<Charge>) -> Accepted {
        let Some(sub) = self.by_id.get_mut(&id) else { return Accepted::Stop };
        let is_duplicate = event.seq <= sub.cursor;
        if is_duplicate {
            return Accepted::GoOn;
        }
        match sub.admit(event.seq, &event.kind, &event.frame) {
            Admission::Send => {
                let (seq, paced) = (event.seq, sub.pace.is_some());
                let replayed = Replayed::Event { id, seq, frame: event.frame, paced, charge: charge.clone() };
                self.push_replayed(id, Some(event.class), replayed);
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
        let needs_open_text = self.by_id.get(&id).is_some_and(|sub| sub.open_text.is_some());
        if needs_open_text {
            self.push_replayed(id, None, Replayed::CaughtUp(id));
            self.queue[HANDOVER_CLASS].push_front(id);
        } else {
            self.push_replayed(id, None, Replayed::Live(id));
        }
    }

    /// The text of some messages was read; `next` is where to go on if there are more.
    fn accept_open_text(&mut self, id: SubId, texts: Vec<OpenText>, next: Option<u64>) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let Some(progress) = &mut sub.open_text else { return };
        progress.read.extend(texts.iter().map(|text| (text.name.clone(), text.end)));
        let more = next.is_some();
        progress.next = next.unwrap_or(progress.next);
        if !more {
            // Of a message that is not among them any more, the event that closed it is on its way.
            sub.delivered = sub.open_text.take().map(|progress| Box::new(progress.read));
        }

        for OpenText { end, frame, .. } in texts {
            let Some(frame) = frame else { continue };
            let class = Priority::class(None);
            self.push_replayed(id, Some(class), Replayed::OpenText { id, restarts: end.restarts, frame });
        }
        if more {
            self.queue[HANDOVER_CLASS].push_front(id);
        } else {
            self.push_replayed(id, None, Replayed::Live(id));
        }
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
        if self.keeps_pace(who, id) {
            return Ok(());
        }
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
        self.sources.hub.attach(&sub.key, &self.outbox, id, &who.user, by_scope, sub.wants_deltas());
        sub.stage = Stage::Handover { to: sub.cursor };
        self.handovers += 1;

        let row = self.sources.store.thread(&who.tenant, &sub.thread)?.unwrap_or_default();
        sub.stage = Stage::Handover { to: row.head };
        let needs_open_text = row.writing > 0 && sub.wants_deltas();
        sub.open_text = needs_open_text.then(Box::default);
        if !needs_open_text {
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

    /// Whether the subscription replays at a pace, and is not to attach yet: it reads, waits, or ends.
    fn keeps_pace(&mut self, who: &Principal, id: SubId) -> bool {
        let Some(sub) = self.by_id.get_mut(&id) else { return false };
        let Some(pace) = &sub.pace else { return false };
        match pace.step(sub.cursor, Instant::now()) {
            Step::Read => self.enqueue(who, id),
            Step::Wait(due) => self.hold(id, Some(due)),
            Step::End => {
                self.hold(id, None);
                self.push_replayed(id, None, Replayed::Over(id));
            }
            Step::GoOn => {
                sub.pace = None;
                return false;
            }
        }
        true
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
        let allowed = credit.map_or(usize::MAX, |credit| usize::try_from(credit).unwrap_or(usize::MAX));
        while allowed > 0 && self.reads.iter().sum::<usize>() < READS && self.replay_bytes < self.chunk_bytes {
            if let Some(reader) = self.next_requeued() {
                let wanted = self.by_id.get_mut(&reader.sub).and_then(Subscription::wanted_requeued);
                if let Some(wanted) = wanted {
                    self.start_read(who, reader, wanted);
                }
                continue;
            }
            let Some(reader) = self.next_reader() else { return };
            let Some(sub) = self.by_id.get_mut(&reader.sub) else { continue };
            let now = Instant::now();
            let keeps_up = self.read_at.replace(now).is_some_and(|last| now - last < KEEPS_UP);
            let others_wait = self.queue.iter().any(|waiting| !waiting.is_empty());
            self.chunk_bytes =
                if keeps_up && !others_wait { (self.chunk_bytes * 2).min(MAX_CHUNK_BYTES) } else { CHUNK_BYTES };
            let wanted = sub.wanted(allowed, self.chunk_bytes);
            self.start_read(who, reader, wanted);
        }
    }

    fn start_read(&mut self, who: &Principal, reader: ReadFor, wanted: Wanted) {
        let Some(sub) = self.by_id.get(&reader.sub) else { return };
        let thread = sub.thread.clone();
        self.reads[reader.class] += 1;
        let (sources, outbox, who) = (self.sources.clone(), self.outbox.clone(), who.clone());
        Read { sources, outbox, who, thread, reader, wanted }.start();
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
    /// What its next read is for, with so many events allowed by flow control, and so many bytes in a chunk.
    fn wanted(&mut self, allowed: usize, bytes: usize) -> Wanted {
        if let Stage::Handover { to } = self.stage
            && self.cursor >= to
        {
            let from = self.open_text.as_ref().map_or(0, |progress| progress.next);
            return Wanted::OpenText { from, delivered: self.delivered.as_deref().cloned().unwrap_or_default() };
        }

        // In the handover all live events wait for what is read.
        let is_catching_up = self.stage == Stage::CatchingUp;
        let bytes = if is_catching_up { bytes } else { CHUNK_BYTES };
        let events = CHUNK_EVENTS * (bytes / CHUNK_BYTES);
        let limit = if let Some(filter) = &self.filter {
            // Many of them may be left out, and those need neither room nor credit. To read their words takes time of a worker.
            if filter.reads_words() { CHUNK_EVENTS / 8 } else { events }
        } else {
            let room = self.confirm().map_or(events, |confirm| confirm.room());
            room.clamp(1, events).min(allowed)
        };
        let range = EventRange { from: self.cursor + 1, limit, bytes, ..EventRange::all() };
        match &self.pace {
            Some(pace) => {
                let up_to_ms = pace.clock(Instant::now());
                Wanted::Due { range: EventRange { to: pace.last(), ..range }, up_to_ms }
            }
            None => Wanted::Events(range),
        }
    }
}
