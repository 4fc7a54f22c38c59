//! What one thread has for its live readers and has not handed out yet, and who those readers are.
//!
//! What is committed waits here until the fan-out gets to the thread. It then takes a batch of what waits and hands it over
//! reader by reader, some readers at a time: whatever a batch has for a reader costs one lock and one wake.
//!
//! - A reader has a slot. It keeps that while a batch is handed out, so each batch passes each reader once: what a reader
//!   gets has no hole, wherever others come and go meanwhile.
//! - A batch is taken after all before it were handed out, so the thread's order is kept.
//! - What a reader that attaches meanwhile is not passed with was committed before it attached, and so is in the store.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::delivery::fair_queue::SubId;
use crate::delivery::outbox::{Filling, Outbox};
use crate::projector::{CommittedEvent, RunNotice};
use crate::protocol::delta::Delta;

/// Bytes that one batch has at most, but for one larger piece alone: a quarter of what an outbox holds, so that a session can
/// send one batch while the next is handed out.
const BATCH_BYTES: usize = 64 << 10;
/// With so many bytes waiting in the thread, signals to it are dropped.
const SIGNAL_BYTES: usize = 64 << 10;
/// What a piece costs beside its text.
const OVERHEAD: usize = 128;
/// Slots of readers that have left are kept up to this number.
const MIN_SLOTS: usize = 64;
/// With more slots than this there is an index of them. Most threads have few readers, and are looked through as fast.
const MAX_UNINDEXED: usize = 16;

/// Something for all readers of a thread.
pub enum Piece {
    Event(Arc<CommittedEvent>),
    Delta(Arc<Delta>),
    Signal {
        frame: Utf8Bytes,
        except: Except,
    },
    /// A user's lease on the thread's work is over.
    LeaseOver {
        user: Arc<str>,
    },
    /// Too much waited here, and was dropped: whoever comes to this reads it from the store.
    Cut,
}

/// Who does not get a signal.
pub enum Except {
    /// The session that sends it.
    Session(Arc<Outbox>),
    /// The user that it is about.
    User(Arc<str>),
}

impl Piece {
    fn cost(&self) -> usize {
        match self {
            Piece::Event(event) => event.frame.len() + OVERHEAD,
            Piece::Delta(delta) => delta.text.len() + OVERHEAD,
            Piece::Signal { frame, .. } => frame.len() + OVERHEAD,
            Piece::LeaseOver { .. } => OVERHEAD,
            Piece::Cut => 0,
        }
    }
}

/// A subscription that reads a thread live.
pub struct Reader {
    pub outbox: Arc<Outbox>,
    pub sub: SubId,
    pub user: Arc<str>,
    /// Reads by its scope, member or not.
    pub by_scope: bool,
    pub wants_deltas: bool,
}

/// What became of a batch at its readers.
#[derive(Default)]
pub struct Handed {
    pub signals: u64,
    /// Readers that have to catch up from the store.
    pub lagged: u64,
}

/// How much of the fan-out is done before others have their turn on the processor.
pub struct Effort {
    readers: usize,
    pieces: usize,
}

impl Effort {
    pub fn new(readers: usize, pieces: usize) -> Effort {
        Effort { readers, pieces }
    }

    pub fn is_spent(&self) -> bool {
        self.readers == 0 || self.pieces == 0
    }

    /// A turn costs something even where nobody reads.
    pub fn take_turn(&mut self) {
        self.take(1);
    }

    fn take(&mut self, pieces: usize) {
        self.readers = self.readers.saturating_sub(1);
        self.pieces = self.pieces.saturating_sub(pieces);
    }
}

#[derive(Default)]
pub struct Lane {
    readers: Readers,
    waiting: VecDeque<Piece>,
    waiting_bytes: usize,
    /// What is being handed out, to the readers from this slot on.
    batch: Vec<Piece>,
    batch_bytes: usize,
    next_slot: usize,
    /// Whether the fan-out knows that something waits here.
    pub in_turn: bool,
}

impl Lane {
    pub fn is_empty(&self) -> bool {
        self.readers.count == 0
    }

    pub fn attach(&mut self, reader: Reader) {
        self.readers.insert(reader);
    }

    pub fn detach(&mut self, outbox: &Arc<Outbox>, sub: SubId) {
        if let Some(slot) = self.readers.find(outbox, sub) {
            self.readers.remove_at(slot);
            self.tidy();
        }
    }

    pub fn reader_mut(&mut self, outbox: &Arc<Outbox>, sub: SubId) -> Option<&mut Reader> {
        let slot = self.readers.find(outbox, sub)?;
        self.readers.slots.get_mut(slot)?.as_mut()
    }

    /// Forgets the user's subscriptions, but for those that read by their scope.
    pub fn forget_member(&mut self, user: &str) {
        let slots = 0..self.readers.slots.len();
        for slot in slots {
            if self.readers.slots[slot].as_ref().is_some_and(|it| !it.by_scope && *it.user == *user) {
                self.readers.remove_at(slot);
            }
        }
        self.tidy();
    }

    /// Adds something for all readers; gives the bytes that it takes.
    pub fn push(&mut self, piece: Piece) -> usize {
        if matches!(piece, Piece::Signal { .. }) && self.waiting_bytes > SIGNAL_BYTES {
            return 0;
        }
        let cost = piece.cost();
        self.waiting_bytes += cost;
        self.waiting.push_back(piece);
        cost
    }

    /// If more waits than that, drops it all: the readers will get it from the store. Gives the bytes that are free now.
    pub fn cut(&mut self, most: usize) -> usize {
        if self.waiting_bytes <= most {
            return 0;
        }
        self.waiting = VecDeque::from([Piece::Cut]);
        std::mem::take(&mut self.waiting_bytes)
    }

    /// Hands out some of what waits, as far as the effort goes. Gives the bytes that are free now; afterwards `in_turn` says
    /// whether more is to be handed out.
    pub fn hand_out(&mut self, effort: &mut Effort, handed: &mut Handed) -> usize {
        effort.take_turn();
        if self.batch.is_empty() {
            self.take_batch();
        }
        while self.next_slot < self.readers.slots.len() && !effort.is_spent() {
            self.hand_to(self.next_slot, handed);
            self.next_slot += 1;
            effort.take(self.batch.len());
        }

        let mut freed = 0;
        if self.is_empty() {
            self.waiting.clear();
            freed += std::mem::take(&mut self.waiting_bytes);
        }
        if self.is_empty() || self.next_slot >= self.readers.slots.len() {
            self.batch.clear();
            freed += std::mem::take(&mut self.batch_bytes);
            self.tidy();
        }
        self.in_turn = !self.batch.is_empty() || !self.waiting.is_empty();
        freed
    }

    fn take_batch(&mut self) {
        self.next_slot = 0;
        while let Some(next) = self.waiting.front() {
            let cost = next.cost();
            if !self.batch.is_empty() && self.batch_bytes + cost > BATCH_BYTES {
                break;
            }
            self.batch_bytes += cost;
            self.waiting_bytes -= cost;
            self.batch.extend(self.waiting.pop_front());
        }
    }

    /// Hands the batch to the reader in a slot, and forgets that one if it cannot take all.
    fn hand_to(&mut self, slot: usize, handed: &mut Handed) {
        let Some(reader) = &self.readers.slots[slot] else { return };
        let batch = &self.batch;
        let kept = reader.outbox.fill(|filling| batch.iter().all(|piece| reader.take(filling, piece, handed)));
        match kept {
            Some(true) => {}
            Some(false) => {
                handed.lagged += 1;
                self.readers.remove_at(slot);
            }
            // Its session is gone.
            None => self.readers.remove_at(slot),
        }
    }

    /// Slots move only between two batches: within one, a reader that moved could be passed twice, or not at all.
    fn tidy(&mut self) {
        if !self.batch.is_empty() {
            return;
        }
        self.readers.compact();
        if self.waiting.is_empty() {
            // Most threads are quiet most of the time, and keep no memory for what may come.
            self.batch = Vec::new();
            self.waiting = VecDeque::new();
        }
    }
}

impl Reader {
    fn session(&self) -> Session {
        session(&self.outbox, self.sub)
    }

    /// Puts a piece into the reader's outbox; `false` if there was no room for it.
    fn take(&self, filling: &mut Filling<'_>, piece: &Piece, handed: &mut Handed) -> bool {
        match piece {
            Piece::Event(event) => {
                let fits = filling.event(self.sub, event);
                // Only who reads by a run of its own needs to look whether it still may.
                if fits
                    && !self.by_scope
                    && let Some(RunNotice::Ended { user }) = &event.run
                    && **user == *self.user
                {
                    filling.run_ended(self.sub);
                }
                fits
            }
            Piece::LeaseOver { user } => {
                if !self.by_scope && *user == self.user {
                    filling.run_ended(self.sub);
                }
                true
            }
            Piece::Delta(delta) => !self.wants_deltas || filling.delta(self.sub, delta),
            Piece::Signal { frame, except } => {
                let is_excepted = match except {
                    Except::Session(outbox) => Arc::ptr_eq(outbox, &self.outbox),
                    Except::User(user) => *user == self.user,
                };
                if !is_excepted && filling.signal(self.sub, frame) {
                    handed.signals += 1;
                }
                true
            }
            Piece::Cut => {
                filling.lagged(self.sub);
                false
            }
        }
    }
}

/// What tells a subscription from all others: the outbox lives at least as long as its reader here.
type Session = (usize, SubId);

fn session(outbox: &Arc<Outbox>, sub: SubId) -> Session {
    (Arc::as_ptr(outbox).addr(), sub)
}

/// The readers of one thread. To come or to go takes the same time however many there are.
#[derive(Default)]
struct Readers {
    slots: Vec<Option<Reader>>,
    free: Vec<u32>,
    count: usize,
    /// The slot of each, if there are many.
    index: Option<HashMap<Session, u32>>,
}

impl Readers {
    fn find(&self, outbox: &Arc<Outbox>, sub: SubId) -> Option<usize> {
        match &self.index {
            Some(index) => index.get(&session(outbox, sub)).map(|slot| *slot as usize),
            None => self.slots.iter().position(|it| it.as_ref().is_some_and(|it| it.session() == session(outbox, sub))),
        }
    }

    fn insert(&mut self, reader: Reader) {
        // It cannot be there already; if it ever were, it would get everything twice.
        if let Some(slot) = self.find(&reader.outbox, reader.sub) {
            self.remove_at(slot);
        }
        let key = reader.session();
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(reader);
                slot
            }
            None => {
                if self.slots.is_empty() {
                    // Most threads have one or two.
                    self.slots.reserve_exact(1);
                }
                self.slots.push(Some(reader));
                self.slots.len() as u32 - 1
            }
        };
        self.count += 1;
        match &mut self.index {
            Some(index) => drop(index.insert(key, slot)),
            None if self.slots.len() > MAX_UNINDEXED => self.make_index(),
            None => {}
        }
    }

    fn make_index(&mut self) {
        let slots = (0..).zip(&self.slots);
        let index = slots.filter_map(|(slot, reader)| Some((reader.as_ref()?.session(), slot)));
        self.index = Some(index.collect());
    }

    fn remove_at(&mut self, slot: usize) {
        if let Some(reader) = self.slots[slot].take() {
            if let Some(index) = &mut self.index {
                index.remove(&reader.session());
            }
            self.free.push(slot as u32);
            self.count -= 1;
        }
    }

    /// Gives up the slots of readers that have left, once they are more than half.
    fn compact(&mut self) {
        if self.slots.len() <= MIN_SLOTS.max(2 * self.count) {
            return;
        }
        self.slots.retain(Option::is_some);
        self.slots.shrink_to_fit();
        self.free = Vec::new();
        self.index = None;
        if self.slots.len() > MAX_UNINDEXED {
            self.make_index();
        }
    }
}
