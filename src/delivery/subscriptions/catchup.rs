//! From the store to the live feed.

use super::{DeliveredText, OutFrame, Stage, Step, Subscriptions};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::clock;
use crate::delivery::Delivery;
use crate::delivery::outbox::{Answer, Chunk, SubId};
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::Priority;
use crate::protocol::frame::ServerFrame;
use crate::protocol::kinds::AGENT_TOKEN;
use crate::store::{EventRange, StoredEvent};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

/// Events of one read from the store.
const CHUNK_EVENTS: usize = 512;
/// Bytes of one read from the store; two such reads at most are in memory for a session.
pub const CHUNK_BYTES: usize = 128 << 10;
/// Reads that a session may have under way.
pub const READS: usize = 2;

impl Subscriptions {
    /// The hub dropped the subscription because the outbox was full: it goes on from the store.
    pub fn lagged(&mut self, who: &Principal, id: SubId) {
        // A notice from before the subscription was attached anew says nothing.
        if self.by_id.get(&id).is_none_or(|sub| sub.stage != Stage::Live) {
            return;
        }
        self.detach(id);
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        let from = sub.cursor + 1;
        // Only told, not relied upon: without an answer from the store the notice names what is known to be missing.
        let to = self.sources.store.head(&who.tenant, &sub.thread).unwrap_or(from);
        // Otherwise only pieces of messages are missing: the next one brings them.
        if to >= from {
            sub.announce = true;
            let frame = ServerFrame::Lagged { thread: sub.called(), from, to }.encode();
            self.replay.push(Some(id), None, Step::Notice { id, frame: frame.into() });
        }
        self.enqueue(who, id);
    }

    /// The class of what comes next from the store.
    pub fn replay_class(&self) -> Option<usize> {
        self.replay.class()
    }

    /// Whether anything from the store is ready; without `events`, anything else.
    pub fn has_replay(&self, events: bool) -> bool {
        if events { !self.replay.is_empty() } else { self.replay.first_in_order(is_notice).is_some() }
    }

    /// The next frame from the store.
    pub fn next_replayed(&mut self, events: bool) -> Option<OutFrame> {
        loop {
            let step = if events { self.replay.pop() } else { self.replay.pop_in_order(is_notice) };
            match step? {
                Step::Event { id, seq, frame } => {
                    self.replay_bytes -= frame.len();
                    // What is left of a subscription that has ended is not wanted any more.
                    if let Some(frame) = self.dress(id, seq, &frame) {
                        return Some(OutFrame::Event { seq: Some(seq), frame });
                    }
                }
                Step::Delta { id, piece } => {
                    self.replay_bytes -= piece.text.len();
                    if let Some(sub) = self.by_id.get(&id) {
                        return Some(OutFrame::Event { seq: None, frame: sub.rename(piece.frame()) });
                    }
                }
                Step::CaughtUp(id) => {
                    if let Some(frame) = self.caught_up(id) {
                        return Some(OutFrame::Notice(frame));
                    }
                }
                Step::Notice { id, frame } if self.by_id.contains_key(&id) => return Some(OutFrame::Notice(frame)),
                Step::Notice { .. } => {}
                Step::Position { id, seq } => {
                    if let Some(frame) = self.by_id.get_mut(&id).and_then(|sub| sub.position(seq)) {
                        return Some(OutFrame::Notice(frame));
                    }
                }
                Step::Live(id) => {
                    if let Some(frame) = self.live(id) {
                        return Some(OutFrame::Notice(frame));
                    }
                }
            }
        }
    }

    /// The step is reached: the gate opens for this subscription.
    fn live(&mut self, id: SubId) -> Option<Utf8Bytes> {
        // One that was detached meanwhile is on its way once more.
        let sub = self.by_id.get_mut(&id).filter(|sub| matches!(sub.stage, Stage::Handover { .. }))?;
        self.handovers -= 1;
        sub.stage = Stage::Live;
        self.caught_up(id)
    }

    /// `caught_up`, if it is to be told.
    fn caught_up(&mut self, id: SubId) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id).filter(|sub| matches!(sub.stage, Stage::Handover { .. } | Stage::Live))?;
        let announced = std::mem::replace(&mut sub.announce, false);
        if let Some(filter) = sub.filter.as_mut().filter(|_| announced) {
            filter.tell(sub.cursor);
        }
        announced.then(|| ServerFrame::CaughtUp { thread: sub.called(), seq: sub.cursor }.encode().into())
    }

    /// Takes what a read brought. An error ends the subscription and is returned with its thread.
    pub fn chunk(
        &mut self,
        who: &Principal,
        (id, class): (SubId, usize),
        read: Result<Chunk, Error>,
    ) -> Result<(), (String, Error)> {
        self.reads[class] -= 1;
        let taken = read.and_then(|read| match read {
            Chunk::Events(events) => self.take(who, id, events),
            Chunk::Texts(pieces) => {
                self.take_texts(id, pieces);
                Ok(())
            }
        });
        taken.or_else(|error| match self.drop_sub(id) {
            Some(thread) => Err((thread, error)),
            None => Ok(()),
        })
    }

    fn take(&mut self, who: &Principal, id: SubId, events: Vec<StoredEvent>) -> Result<(), Error> {
        self.replayed.increment(events.len() as u64);
        for event in events {
            if !self.take_one(who, id, event) {
                return Ok(());
            }
        }
        let Some(sub) = self.by_id.get_mut(&id) else { return Ok(()) };
        match sub.stage {
            // While the client wants nothing, the others need not wait for this one's seam.
            Stage::Handover { to } if sub.cursor < to && self.paused => {
                self.detach(id);
                self.enqueue(who, id);
            }
            Stage::Handover { to } if sub.cursor < to => self.queue[0].push_front(id),
            Stage::Handover { .. } => self.end_handover(id),
            Stage::CatchingUp => self.approach(who, id)?,
            Stage::Live | Stage::Held { .. } => {}
        }
        Ok(())
    }

    /// All events are read. What is being written is told behind them, before anything comes live.
    fn end_handover(&mut self, id: SubId) {
        if self.by_id.get(&id).is_some_and(|sub| sub.joins) {
            self.replay.push(Some(id), None, Step::CaughtUp(id));
            self.queue[0].push_front(id);
        } else {
            self.replay.push(Some(id), None, Step::Live(id));
        }
    }

    fn take_texts(&mut self, id: SubId, pieces: Vec<Delta>) {
        let Some(sub) = self.by_id.get_mut(&id).filter(|sub| sub.joins) else { return };
        sub.joins = false;
        let told = pieces.iter().map(|piece| (piece.name.clone(), piece.to_char)).collect();
        sub.told = Some(Box::new(told));
        for piece in pieces {
            if piece.text.is_empty() && piece.from_char > 0 {
                continue;
            }
            self.replay_bytes += piece.text.len();
            self.replay.push(Some(id), Some(Priority::class(piece.priority)), Step::Delta { id, piece });
        }
        self.replay.push(Some(id), None, Step::Live(id));
    }

    /// A live piece: the frame to send, if it is to be sent.
    pub fn live_delta(&mut self, who: &Principal, id: SubId, piece: &Delta) -> Option<OutFrame> {
        let sub = self.by_id.get_mut(&id)?;
        if sub.stage != Stage::Live || !sub.wants(AGENT_TOKEN) {
            return None;
        }
        // From before it was attached: the store had it, or the event that closed the message.
        if piece.behind < sub.cursor {
            return None;
        }
        let told = sub.told.as_ref().and_then(|told| told.get(&piece.name)).copied();
        match told {
            // The message was closed while the subscription joined, and its event is on its way.
            None if piece.from_char > 0 => return None,
            Some(told) if piece.from_char > told => {
                // Cannot happen while the hub delivers in order; if it ever does, the store has what is missing.
                tracing::error!(told, piece.from_char, "a hole in a message");
                self.lagged(who, id);
                return None;
            }
            Some(told) if piece.to_char <= told => return None,
            _ => {}
        }
        let from_char = told.unwrap_or(0);
        let frame = if piece.from_char == from_char { piece.frame() } else { piece.rest(from_char).frame() };
        sub.told.get_or_insert_default().insert(piece.name.clone(), piece.to_char);
        Some(OutFrame::Event { seq: None, frame: sub.rename(frame) })
    }

    /// `false` if the subscription takes no more now.
    fn take_one(&mut self, who: &Principal, id: SubId, event: StoredEvent) -> bool {
        let Some(sub) = self.by_id.get_mut(&id) else { return false };
        if event.seq <= sub.cursor {
            return true;
        }
        if !sub.wants(&event.kind) {
            sub.cursor = event.seq;
            if let Some(filter) = &mut sub.filter {
                let due = filter.leave_out(event.seq);
                // A long way through events that are left out is told as it goes.
                self.note_due(Some(due));
            }
            return true;
        }
        if let Some(confirm) = sub.confirm() {
            if confirm.has(event.seq) {
                sub.cursor = event.seq;
                return true;
            }
            if confirm.oldest().is_none() && confirm.exhausted(event.seq) {
                self.dead_letter(who, id, event.seq);
                return false;
            }
            if confirm.room() == 0 {
                self.detach(id);
                self.hold(id, None);
                return false;
            }
            confirm.take(event.seq);
        }
        sub.cursor = event.seq;
        self.replay_bytes += event.frame.len();
        self.replay.push(Some(id), Some(event.class), Step::Event { id, seq: event.seq, frame: event.frame });
        true
    }

    /// Attaches once the head is near, and goes live if there is nothing to read; else has the store read.
    pub(super) fn approach(&mut self, who: &Principal, id: SubId) -> Result<(), Error> {
        let Some(sub) = self.by_id.get_mut(&id) else {
            return Ok(());
        };
        let room = sub.confirm().map_or(CHUNK_EVENTS, |confirm| confirm.room().min(CHUNK_EVENTS));
        if room == 0 {
            self.hold(id, None);
            return Ok(());
        }
        let mut head = self.sources.store.head(&who.tenant, &sub.thread)?;
        // Far behind there is no use in attaching: the outbox would only overflow.
        let near = head <= sub.cursor + room as u64;
        if near && (head <= sub.cursor || !self.paused) {
            let by_scope = scopes::reads_by_scope(who.scopes);
            self.sources.hub.attach(&sub.key, &self.outbox, id, &who.user, by_scope, sub.wants(AGENT_TOKEN));
            // Looked up after attaching: what is committed from here on comes through the hub, a removal too.
            sub.stage = Stage::Handover { to: sub.cursor };
            self.handovers += 1;
            let row = self.sources.store.thread(&who.tenant, &sub.thread)?.unwrap_or_default();
            head = row.head;
            sub.stage = Stage::Handover { to: head };
            sub.joins = row.writing > 0 && sub.wants(AGENT_TOKEN);
            if !sub.joins {
                sub.told = None;
            }
            self.sources.rights.may_read(who, &sub.thread)?;
            if head <= sub.cursor {
                // Live once the frames before this step are on their way.
                self.end_handover(id);
            } else {
                // The seam first: the other subscriptions wait for it.
                self.queue[0].push_front(id);
            }
            return Ok(());
        }
        self.enqueue(who, id);
        Ok(())
    }

    /// Puts the subscription among those that want to read, by the highest priority that waits for it.
    pub(super) fn enqueue(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get(&id) else { return };
        // A store that fails will say so to the read.
        let row = self.sources.store.thread(&who.tenant, &sub.thread).ok().flatten();
        let class = row.and_then(|row| row.class_after(sub.cursor)).unwrap_or(1);
        self.queue[class].push_back(id);
    }

    /// Starts reads while there is room for what they bring, and (with flow control) leave to send it.
    pub fn read_on(&mut self, who: &Principal, credit: Option<u64>) {
        let allowed = credit.map_or(CHUNK_EVENTS, |credit| usize::try_from(credit).unwrap_or(usize::MAX));
        while self.reads.iter().sum::<usize>() < READS && self.replay_bytes < CHUNK_BYTES && allowed > 0 {
            let Some((id, class)) = self.pick() else { return };
            let Some(sub) = self.by_id.get_mut(&id) else { continue };
            self.reads[class] += 1;
            let room = match &sub.filter {
                Some(_) => CHUNK_EVENTS,
                None => sub.confirm().map_or(CHUNK_EVENTS, |confirm| confirm.room().max(1)),
            };
            let limit = room.min(CHUNK_EVENTS).min(if sub.filter.is_some() { CHUNK_EVENTS } else { allowed });
            let (sources, outbox, who, thread) =
                (self.sources.clone(), self.outbox.clone(), who.clone(), sub.thread.clone());
            let told = matches!(sub.stage, Stage::Handover { to } if sub.cursor >= to).then(|| sub.told.clone());
            let range = EventRange { from: sub.cursor + 1, limit, bytes: CHUNK_BYTES, ..EventRange::all() };
            tokio::task::spawn_blocking(move || {
                let read = match told {
                    Some(told) => texts(&sources, &who, &thread, &told.unwrap_or_default()).map(Chunk::Texts),
                    None => events(&sources, &who, &thread, range).map(Chunk::Events),
                };
                // The right is looked up after the read: what was committed after a removal is not handed out.
                let read = read.and_then(|read| sources.rights.may_read(&who, &thread).map(|()| read));
                outbox.push_answer(Answer::Chunk { sub: (id, class), read });
            });
        }
    }

    /// Whose turn it is to read, and its class: those with the highest priority waiting; of eight turns one goes to those with
    /// the lowest, and one to those between. While something higher is read nobody else has one of the other six: its next
    /// read comes first.
    fn pick(&mut self) -> Option<(SubId, usize)> {
        let mut classes = (0..Priority::CLASSES).filter(|class| !self.queue[*class].is_empty());
        let highest = classes.next()?;
        let turn = (self.picks + 1) % 8;
        let other = match turn {
            0 => classes.next_back(),
            4 => classes.rev().nth(1),
            _ => None,
        };
        if other.is_none() && self.reads[..highest].iter().any(|reads| *reads > 0) {
            return None;
        }
        self.picks = turn;
        let class = other.unwrap_or(highest);
        self.queue[class].pop_front().map(|id| (id, class))
    }

    /// The subscription waits: for acknowledgements, or until a time.
    pub(super) fn hold(&mut self, id: SubId, until: Option<Instant>) {
        if let Some(sub) = self.by_id.get_mut(&id) {
            sub.stage = Stage::Held { until };
            self.note_due(until);
        }
    }
}

fn events(sources: &Delivery, who: &Principal, thread: &str, range: EventRange) -> Result<Vec<StoredEvent>, Error> {
    // Looked up first: what is committed meanwhile may be missing.
    let head = sources.store.head(&who.tenant, thread)?;
    let events = sources.store.events(&who.tenant, thread, range)?;
    if events.is_empty() && head >= range.from {
        return Err(Error::new(Code::Internal, "the store lacks events that it should have"));
    }
    Ok(events)
}

/// What is being written in the thread, as far as it was not told.
fn texts(sources: &Delivery, who: &Principal, thread: &str, told: &DeliveredText) -> Result<Vec<Delta>, Error> {
    let mut pieces = Vec::new();
    for key in sources.store.open_messages(&who.tenant, thread)? {
        let name = Delta::name(&key.run.run, &key.message);
        let from_char = told.get(&name).copied().unwrap_or(0);
        let text = sources.store.text_after(&key, from_char)?;
        // Looked up last: one that was closed meanwhile has no text, or not all of it, but an event that comes live.
        let Some(row) = sources.store.message(&key)?.filter(|row| row.closed.is_none()) else { continue };
        pieces.push(Delta {
            name,
            thread: thread.into(),
            run: key.run.run.into(),
            message: key.message.into(),
            event: Uuid::from_bytes(row.event),
            from: row.from.into(),
            at: clock::rfc3339(row.last_at).into(),
            priority: None,
            behind: 0,
            from_char,
            to_char: from_char + text.chars().count() as u64,
            text,
        });
    }
    Ok(pieces)
}

/// Notices go out also while no events may.
fn is_notice(step: &Step) -> bool {
    matches!(step, Step::Notice { .. } | Step::Position { .. } | Step::CaughtUp(_) | Step::Live(_))
}
