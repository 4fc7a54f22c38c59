//! A session's subscriptions: where each one stands, and how it comes from the store to the live feed.
//!
//! A subscription is a cursor. Behind the head it reads chunks from the store; when a chunk ends at the head it attaches to
//! the hub and reads once more what was committed meanwhile (the seam), and of messages that are being written what they
//! are by then; then it is live. While any subscription is in its
//! seam, live events wait in the outbox, so that order holds; what arrives twice is dropped by its seq. `lagged` is the
//! same road, taken again; so is a redelivery, under a new number, so that what is left of the round before is nobody's.
//!
//! [`catchup`] is that road; [`receipts`] is what the client acknowledges, and what must be done when it does not.

mod catchup;
mod confirm;
mod receipts;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use metrics::Counter;
use tokio::time::{Duration, Instant};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::fair_queue::FairQueue;
use super::outbox::{Outbox, SubId};
pub use super::subscriptions::catchup::{CHUNK_BYTES, READS};
pub use super::subscriptions::confirm::WINDOW;
pub use super::subscriptions::receipts::{Receipt, first_receipt};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::delivery::Delivery;
use crate::projector::CommittedEvent;
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::Priority;
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids;
use crate::protocol::ids::{ThreadAddress, log_key};
use crate::telemetry;

/// Subscriptions of one session, those of `"*"` included.
pub const MAX_SUBSCRIPTIONS: usize = 10_000;
/// `position` is sent at most so often.
const POSITION_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Reads from the store, not attached.
    CatchingUp,
    /// Reads nothing and is not attached: acknowledgements are awaited, or a dead letter's place in the log, or the time
    /// of the next attempt.
    Held {
        until: Option<Instant>,
    },
    /// Attached; reads up to the head of that moment.
    Handover {
        to: u64,
    },
    Live,
}

/// What a subscription has ready for the socket, in order.
enum Step {
    Event {
        id: SubId,
        seq: u64,
        frame: Utf8Bytes,
    },
    Notice {
        id: SubId,
        frame: Utf8Bytes,
    },
    /// What the client does not have of a message that is being written.
    Delta {
        id: SubId,
        piece: Delta,
    },
    /// All events before the live feed are sent, and only pieces are left.
    CaughtUp(SubId),
    /// How far events were left out.
    Position {
        id: SubId,
        seq: u64,
    },
    /// All before the live feed is sent.
    Live(SubId),
}

/// A frame ready for the socket.
pub enum OutFrame {
    /// A piece of a message has no seq.
    Event {
        seq: Option<u64>,
        frame: Utf8Bytes,
    },
    Notice(Utf8Bytes),
}

/// What the client wants of the events; those left out move the cursor all the same.
struct Filter {
    kinds: Kinds,
    /// When `position` was last sent.
    told: Instant,
    /// The newest seq that a frame has told.
    sent: u64,
    /// The newest seq that was left out.
    left_out: u64,
}

impl Filter {
    fn new(kinds: Kinds) -> Filter {
        Filter { kinds, told: Instant::now(), sent: 0, left_out: 0 }
    }

    /// Events were left out since the last frame.
    fn owes(&self) -> bool {
        self.left_out > self.sent
    }

    fn tell(&mut self, seq: u64) {
        self.sent = self.sent.max(seq);
    }

    /// Leaves an event out, and says when `position` is due.
    fn leave_out(&mut self, seq: u64) -> Instant {
        self.left_out = self.left_out.max(seq);
        self.told + POSITION_EVERY
    }
}

/// The kinds a client wants, if not all.
pub type Kinds = Arc<[String]>;

/// A subscription as it is asked for.
pub struct NewSubscription {
    pub address: ThreadAddress,
    /// The seq behind which it begins.
    pub cursor: u64,
    /// Asked for by its own name, not brought by `"*"`.
    pub named: bool,
    pub kinds: Option<Kinds>,
    pub receipt: Option<Receipt>,
}

/// Of messages that are being written, how many characters the client has.
type DeliveredText = HashMap<Arc<str>, u64>;

struct Subscription {
    thread: String,
    /// As the client calls it, if it is not the thread's name.
    called: Option<Box<str>>,
    /// `tenant/thread`.
    key: Arc<str>,
    /// The newest seq handed to the socket, or to come from there on.
    cursor: u64,
    stage: Stage,
    named: bool,
    /// `caught_up` is to be told.
    announce: bool,
    /// Counted among those present.
    present: bool,
    /// What is being written is to be told before it goes live.
    joins: bool,
    told: Option<Box<DeliveredText>>,
    filter: Option<Box<Filter>>,
    receipt: Option<Box<Receipt>>,
}

/// What `"*"` asks for each of its threads.
#[derive(Clone)]
pub struct Following {
    pub kinds: Option<Kinds>,
    /// The durable subscription, if it is one.
    pub name: Option<Box<str>>,
    pub confirm: bool,
}

pub struct Subscriptions {
    sources: Arc<Delivery>,
    outbox: Arc<Outbox>,
    /// The session's user, once there is a subscription.
    user: Option<Arc<str>>,
    by_id: HashMap<SubId, Subscription>,
    by_thread: HashMap<String, SubId>,
    next: SubId,
    /// The user (`tenant/user`) whose threads are followed, by `"*"`.
    following: Option<(Arc<str>, Following)>,
    /// Subscriptions with something to read, in turn, by the class of what waits for them.
    queue: [VecDeque<SubId>; Priority::CLASSES],
    picks: u32,
    /// Reads under way, by that class.
    reads: [usize; Priority::CLASSES],
    handovers: usize,
    /// What comes from the store, ready to be sent.
    replay: FairQueue<Step>,
    replay_bytes: usize,
    /// Whose receipts have changed.
    dirty: Vec<SubId>,
    /// The client wants no events now.
    pub paused: bool,
    /// Nothing is due earlier.
    due: Option<Instant>,
    replayed: Counter,
    redeliveries: Counter,
}

impl Subscriptions {
    pub fn new(sources: Arc<Delivery>, outbox: Arc<Outbox>) -> Subscriptions {
        Subscriptions {
            sources,
            outbox,
            user: None,
            by_id: HashMap::new(),
            by_thread: HashMap::new(),
            next: 0,
            following: None,
            queue: Default::default(),
            picks: 0,
            reads: [0; Priority::CLASSES],
            handovers: 0,
            replay: FairQueue::default(),
            replay_bytes: 0,
            dirty: Vec::new(),
            paused: false,
            due: None,
            replayed: telemetry::replayed_events(),
            redeliveries: telemetry::redeliveries(),
        }
    }

    pub fn contains(&self, thread: &str) -> bool {
        self.by_thread.contains_key(thread)
    }

    /// Live events must wait while a subscription is in its seam.
    pub fn gate_open(&self) -> bool {
        self.handovers == 0
    }

    /// Adds a subscription.
    pub fn add(&mut self, who: &Principal, wanted: NewSubscription) -> Result<(), Error> {
        if self.by_id.len() >= MAX_SUBSCRIPTIONS {
            let why = format!("a session has at most {MAX_SUBSCRIPTIONS} subscriptions");
            return Err(Error::new(Code::TooLarge, why).at("thread"));
        }
        let called = wanted.address.is_alias().then(|| wanted.address.called.into());
        let thread = wanted.address.name;
        let key: Arc<str> = log_key(&who.tenant, &thread).into();
        let present = !ids::is_reserved(&thread) && self.sources.store.is_member(&who.tenant, &thread, &who.user)?;
        let sub = Subscription {
            called,
            key: key.clone(),
            cursor: wanted.cursor,
            stage: Stage::CatchingUp,
            named: wanted.named,
            announce: true,
            joins: false,
            told: None,
            present,
            filter: wanted.kinds.map(|kinds| Box::new(Filter::new(kinds))),
            receipt: wanted.receipt.map(Box::new),
            thread,
        };
        self.user = Some(who.user.clone());
        let id = self.insert(sub);
        if self.by_id.get(&id).and_then(|sub| sub.receipt.as_ref()).is_some_and(|receipt| receipt.is_dirty()) {
            self.dirty.push(id);
        }
        let result = self.approach(who, id);
        match &result {
            Ok(()) if present => self.sources.hub.arrive(&key, &who.user),
            Ok(()) => {}
            Err(_) => {
                if let Some(sub) = self.by_id.get_mut(&id) {
                    sub.present = false;
                }
                self.drop_sub(id);
            }
        }
        result
    }

    fn insert(&mut self, sub: Subscription) -> SubId {
        let id = self.next;
        self.next += 1;
        self.by_thread.insert(sub.thread.clone(), id);
        self.by_id.insert(id, sub);
        id
    }

    /// Ends a subscription; `false` if there is none.
    pub fn remove(&mut self, thread: &str) -> bool {
        match self.by_thread.get(thread) {
            Some(&id) => self.drop_sub(id).is_some(),
            None => false,
        }
    }

    /// Ends a subscription by its number and returns its thread, as the client calls it.
    pub fn drop_sub(&mut self, id: SubId) -> Option<String> {
        self.keep_on_leaving(id);
        self.detach(id);
        let sub = self.by_id.remove(&id)?;
        self.by_thread.remove(&sub.thread);
        if sub.present
            && let Some(user) = &self.user
        {
            self.sources.hub.leave(&sub.key, user);
        }
        Some(sub.called.map_or(sub.thread, String::from))
    }

    /// The hub forgets the subscription, which is behind then.
    fn detach(&mut self, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        if matches!(sub.stage, Stage::Handover { .. }) {
            self.handovers -= 1;
        }
        if matches!(sub.stage, Stage::Handover { .. } | Stage::Live) {
            self.sources.hub.detach(&sub.key, &self.outbox, id);
        }
        sub.stage = Stage::CatchingUp;
    }

    /// Goes on under a new number from behind `cursor`: what is on its way under the old one is not sent.
    fn renumber(&mut self, id: SubId, cursor: u64, stage: Stage) -> Option<SubId> {
        self.detach(id);
        let mut sub = self.by_id.remove(&id)?;
        sub.cursor = cursor;
        sub.stage = stage;
        sub.told = None;
        let dirty = self.dirty.contains(&id);
        let id = self.insert(sub);
        if dirty {
            self.dirty.push(id);
        }
        Some(id)
    }

    /// Joins a thread once more behind `cursor`, so that all text that is being written is told again.
    pub fn restart(&mut self, who: &Principal, thread: &str, cursor: u64) -> Result<(), Error> {
        let Some(&id) = self.by_thread.get(thread) else { return Ok(()) };
        let Some(id) = self.renumber(id, cursor, Stage::CatchingUp) else { return Ok(()) };
        self.approach(who, id).inspect_err(|_| drop(self.drop_sub(id)))
    }

    /// Whether `"*"` is in force.
    pub fn follows(&self) -> bool {
        self.following.is_some()
    }

    /// From now on the session hears of threads that its user joins.
    pub fn follow(&mut self, who: &Principal, following: Following) {
        self.sources.hub.follow(&who.key, &self.outbox);
        self.following = Some((who.key.clone(), following));
    }

    fn unfollow(&mut self) {
        if let Some((user, _)) = self.following.take() {
            self.sources.hub.unfollow(&user, &self.outbox);
        }
    }

    /// The user became a member of a thread with the event behind `before`.
    pub fn joined(&mut self, who: &Principal, thread: String, before: u64) -> Result<(), (String, Error)> {
        let Some((_, following)) = &self.following else { return Ok(()) };
        if self.contains(&thread) {
            return Ok(());
        }
        let receipt =
            Receipt::wanted(following.name.as_deref(), None, before, following.confirm).map(Receipt::unwritten);
        let wanted = NewSubscription {
            address: ThreadAddress::named(thread.clone()),
            cursor: before,
            named: false,
            kinds: following.kinds.clone(),
            receipt,
        };
        self.add(who, wanted).map_err(|error| (thread, error))
    }

    /// Judges all subscriptions by a new token's rights; gives those that ended, with the reason.
    pub fn regrant(&mut self, who: &Principal) -> Vec<(String, Error)> {
        let by_scope = scopes::reads_by_scope(who.scopes);
        for (id, sub) in &self.by_id {
            // Before the look at the store: a removal that comes after it goes by the new right.
            self.sources.hub.regrant(&sub.key, &self.outbox, *id, by_scope);
        }
        let judge =
            |sub: &Subscription| scopes::read(who.scopes).and_then(|()| self.sources.rights.may_read(who, &sub.thread));
        let lost: Vec<_> = self.by_id.iter().filter_map(|(id, sub)| Some((*id, judge(sub).err()?))).collect();
        lost.into_iter().filter_map(|(id, error)| Some((self.drop_sub(id)?, error))).collect()
    }

    /// The user left the thread: its subscription ends and is returned as the client calls it.
    pub fn left(&mut self, who: &Principal, thread: &str) -> Option<String> {
        let id = *self.by_thread.get(thread)?;
        if scopes::reads_by_scope(who.scopes) { None } else { self.drop_sub(id) }
    }

    /// After that: with `"*"` a user that is a member again by now reads on from there.
    pub fn rejoin(&mut self, who: &Principal, thread: &str) -> Result<(), (String, Error)> {
        match self.sources.store.member(&who.tenant, thread, &who.user) {
            Ok(Some(member)) => self.joined(who, thread.to_owned(), member.since - 1),
            // A store that fails says so to whoever reads next.
            _ => Ok(()),
        }
    }

    /// Leaves nothing of the session behind but its receipts.
    pub fn close(&mut self) {
        self.unfollow();
        self.end(|_| true);
        self.outbox.close();
    }

    /// Ends the subscriptions that `"*"` brought, and leaves those made by name.
    pub fn unfollow_all(&mut self) {
        self.unfollow();
        self.end(|sub| !sub.named);
    }

    fn end(&mut self, which: impl Fn(&Subscription) -> bool) {
        let ids: Vec<SubId> = self.by_id.iter().filter(|(_, sub)| which(sub)).map(|(id, _)| *id).collect();
        for id in ids {
            self.drop_sub(id);
        }
    }

    /// A live event: the frame to send, if it is to be sent.
    pub fn live_event(&mut self, who: &Principal, id: SubId, event: &CommittedEvent) -> Option<OutFrame> {
        let sub = self.by_id.get_mut(&id)?;
        if sub.stage != Stage::Live || event.seq <= sub.cursor {
            return None;
        }
        if event.seq != sub.cursor + 1 {
            // Cannot happen while the hub delivers in order; if it ever does, the store has what is missing.
            tracing::error!(expected = sub.cursor + 1, event.seq, "a hole in the live feed");
            self.lagged(who, id);
            return None;
        }
        if let (Some(told), Some(message)) = (&mut sub.told, &event.closes) {
            told.remove(message);
        }
        if sub.is_plain() {
            sub.cursor = event.seq;
            return Some(OutFrame::Event { seq: Some(event.seq), frame: event.frame.clone() });
        }
        if !sub.wants(&event.kind) {
            sub.cursor = event.seq;
            return self.left_out(id).map(OutFrame::Notice);
        }
        if let Some(confirm) = sub.confirm() {
            if confirm.has(event.seq) {
                sub.cursor = event.seq;
                return None;
            }
            if confirm.room() == 0 {
                self.detach(id);
                self.hold(id, None);
                return None;
            }
            confirm.take(event.seq);
        }
        sub.cursor = event.seq;
        let frame = self.dress(id, event.seq, &event.frame)?;
        Some(OutFrame::Event { seq: Some(event.seq), frame })
    }

    /// A signal, if its subscription still is.
    pub fn signal(&self, id: SubId, frame: Utf8Bytes) -> Option<Utf8Bytes> {
        let sub = self.by_id.get(&id)?;
        Some(sub.rename(frame))
    }

    /// The frame as this subscription's client gets it, now.
    fn dress(&mut self, id: SubId, seq: u64, frame: &Utf8Bytes) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        if let Some(filter) = &mut sub.filter {
            filter.tell(seq);
        }
        let mut frame = sub.rename(frame.clone());
        if let Some(confirm) = sub.confirm() {
            let attempt = confirm.send(seq, Instant::now());
            let deadline = confirm.deadline();
            if let Some(attempt) = attempt {
                frame = event::with_attempt(&frame, attempt).into();
            }
            self.note_due(deadline);
        }
        Some(frame)
    }

    /// An event was left out: `position`, if it was not sent a moment ago.
    fn left_out(&mut self, id: SubId) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        let due = sub.filter.as_mut()?.leave_out(sub.cursor);
        if due <= Instant::now() {
            return sub.position(sub.cursor);
        }
        self.note_due(Some(due));
        None
    }

    fn note_due(&mut self, due: Option<Instant>) {
        self.due = [self.due, due].into_iter().flatten().min();
    }

    /// When [`Subscriptions::on_due`] wants to be called next.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

impl Subscription {
    fn called(&self) -> &str {
        self.called.as_deref().unwrap_or(&self.thread)
    }

    fn wants(&self, kind: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.kinds.iter().any(|wanted| wanted == kind))
    }

    fn rename(&self, frame: Utf8Bytes) -> Utf8Bytes {
        match &self.called {
            Some(called) => event::with_thread(&frame, &self.thread, called).into(),
            None => frame,
        }
    }

    fn confirm(&mut self) -> Option<&mut confirm::Confirm> {
        self.receipt.as_mut()?.confirm.as_mut()
    }

    /// Whether frames go out as they are, and nothing is kept about them.
    fn is_plain(&self) -> bool {
        self.filter.is_none() && self.receipt.is_none() && self.called.is_none()
    }

    /// `position`, if it is update that the client has everything up to `seq`.
    fn position(&mut self, seq: u64) -> Option<Utf8Bytes> {
        let filter = self.filter.as_mut().filter(|filter| filter.owes() && seq > filter.sent)?;
        filter.tell(seq);
        filter.told = Instant::now();
        Some(ServerFrame::Position { thread: self.called(), seq }.encode().into())
    }
}

/// However the session ends, also by a panic.
impl Drop for Subscriptions {
    fn drop(&mut self) {
        self.close();
    }
}
