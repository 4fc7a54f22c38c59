//! From the store to the live feed.

use super::{Ready, Stage, Step, Subscriptions};
use crate::access;
use crate::error::{Code, Error};
use crate::event::Priority;
use crate::identity::Principal;
use crate::outbox::{Answer, SubId};
use crate::store::{EventRange, StoredEvent};
use crate::wire::ServerFrame;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

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
        sub.announce = true;
        let from = sub.cursor + 1;
        // Only told, not relied upon: without an answer from the store the notice names what is known to be missing.
        let to = self.ctx.store.head(&who.tenant, &sub.thread).unwrap_or(from).max(from);
        let frame = ServerFrame::Lagged { thread: sub.called(), from, to }.encode();
        self.replay.push(Some(id), None, Step::Notice { id, frame: frame.into() });
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
    pub fn next_replayed(&mut self, events: bool) -> Option<Ready> {
        loop {
            let step = if events { self.replay.pop() } else { self.replay.pop_in_order(is_notice) };
            match step? {
                Step::Event { id, seq, frame } => {
                    self.replay_bytes -= frame.len();
                    // What is left of a subscription that has ended is not wanted any more.
                    if let Some(frame) = self.dress(id, seq, &frame) {
                        return Some(Ready::Event { seq, frame });
                    }
                }
                Step::Notice { id, frame } if self.by_id.contains_key(&id) => return Some(Ready::Notice(frame)),
                Step::Notice { .. } => {}
                Step::Position { id, seq } => {
                    if let Some(frame) = self.by_id.get_mut(&id).and_then(|sub| sub.position(seq)) {
                        return Some(Ready::Notice(frame));
                    }
                }
                Step::Live(id) => {
                    if let Some(frame) = self.live(id) {
                        return Some(Ready::Notice(frame));
                    }
                }
            }
        }
    }

    /// The step is reached: the gate opens for this subscription.
    fn live(&mut self, id: SubId) -> Option<Utf8Bytes> {
        // One that was detached meanwhile is on its way once more.
        let sub = self.by_id.get_mut(&id).filter(|sub| matches!(sub.stage, Stage::Seam { .. }))?;
        self.seams -= 1;
        sub.stage = Stage::Live;
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
        events: Result<Vec<StoredEvent>, Error>,
    ) -> Result<(), (String, Error)> {
        self.reads[class] -= 1;
        events.and_then(|events| self.take(who, id, events)).or_else(|error| match self.drop_sub(id) {
            Some(thread) => Err((thread, error)),
            None => Ok(()),
        })
    }

    fn take(&mut self, who: &Principal, id: SubId, events: Vec<StoredEvent>) -> Result<(), Error> {
        let Some(sub) = self.by_id.get(&id) else { return Ok(()) };
        if events.is_empty() && self.ctx.store.head(&who.tenant, &sub.thread)? > sub.cursor {
            return Err(Error::new(Code::Internal, "the store lacks events that it should have"));
        }
        self.replayed.increment(events.len() as u64);
        for event in events {
            if !self.take_one(who, id, event) {
                return Ok(());
            }
        }
        let Some(sub) = self.by_id.get_mut(&id) else { return Ok(()) };
        match sub.stage {
            // While the client wants nothing, the others need not wait for this one's seam.
            Stage::Seam { to } if sub.cursor < to && self.paused => {
                self.detach(id);
                self.enqueue(who, id);
            }
            Stage::Seam { to } if sub.cursor < to => self.queue[0].push_front(id),
            Stage::Seam { .. } => self.replay.push(Some(id), None, Step::Live(id)),
            Stage::Behind => self.approach(who, id)?,
            Stage::Live | Stage::Held { .. } => {}
        }
        Ok(())
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
                self.bury(who, id, event.seq);
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
        let mut head = self.ctx.store.head(&who.tenant, &sub.thread)?;
        // Far behind there is no use in attaching: the outbox would only overflow.
        let near = head <= sub.cursor + room as u64;
        if near && (head <= sub.cursor || !self.paused) {
            self.ctx.hub.attach(&sub.key, &self.outbox, id, &who.user, access::reads_by_scope(who.scopes));
            // Looked up after attaching: what is committed from here on comes through the hub, a removal too.
            sub.stage = Stage::Seam { to: sub.cursor };
            self.seams += 1;
            head = self.ctx.store.head(&who.tenant, &sub.thread)?;
            sub.stage = Stage::Seam { to: head };
            self.ctx.may_read(who, &sub.thread)?;
            if head <= sub.cursor {
                // Live once the frames before this step are on their way.
                self.replay.push(Some(id), None, Step::Live(id));
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
        let row = self.ctx.store.thread(&who.tenant, &sub.thread).ok().flatten();
        let class = row.and_then(|row| row.class_behind(sub.cursor)).unwrap_or(1);
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
            let (ctx, outbox, who) = (self.ctx.clone(), self.outbox.clone(), who.clone());
            let (thread, from) = (sub.thread.clone(), sub.cursor + 1);
            tokio::task::spawn_blocking(move || {
                let range = EventRange { from, limit, bytes: CHUNK_BYTES, ..EventRange::all() };
                // The right is looked up after the read: what was committed after a removal is not handed out.
                let read = ctx.store.events(&who.tenant, &thread, range).map_err(Error::from);
                let events = read.and_then(|events| ctx.may_read(&who, &thread).map(|()| events));
                outbox.push_answer(Answer::Chunk { sub: (id, class), events });
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

/// Notices go out also while no events may.
fn is_notice(step: &Step) -> bool {
    matches!(step, Step::Notice { .. } | Step::Position { .. } | Step::Live(_))
}
