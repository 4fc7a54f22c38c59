//! A session's subscriptions: where it stands in each of its threads, and how each comes from the store to the live feed.
//!
//! A subscription is a cursor in a thread: everything up to it is on its way to the client, or was passed over. It moves
//! through these stages:
//!
//! 1. **Catching up.** The cursor is far from the thread's head. It reads one chunk of events after the other from the store.
//! 2. **Handover.** The head is near. It attaches to the hub, looks up the head, and reads from the store up to there; then,
//!    if messages are being written, their text so far. What is committed from now on comes through the outbox and waits
//!    there.
//! 3. **Live.** Everything read from the store is sent. Events come through the outbox alone.
//! 4. **Lagging.** The outbox was full, so the hub has forgotten the subscription. It catches up again, as in 1.
//!
//! Besides, a subscription with `confirm` is **held** while too many events are not acknowledged, between two rounds of
//! redelivery, and until a dead letter is stored. It is not attached then, and catches up afterwards. One that replays at a pace
//! ([`pace`]) is held between events that are due, and is attached only when the replay is over.
//!
//! Invariants:
//! - Each subscription's events are sent in the order of their seqs, each once (but for redelivery), without a hole.
//! - While any subscription is in its handover, the session's live events wait. So nothing live goes out before what is
//!   older. A handover is short: its reads go before all others.
//! - What arrives from the store and from the hub as well is dropped once, by its seq.
//! - A redelivery goes on under a new [`SubId`], so whatever is still on its way from the round before is dropped.
//! - What is read and not sent yet is bounded, see [`catchup`].
//!
//! Files: [`subscription`] is one subscription, with [`filter`] (what it leaves out), [`receipt`] (how far its client
//! has come) and [`confirm`] (what is not acknowledged) and [`pace`] (when what is due). What the session does with them: [`catchup`] reads from the store
//! ([`reading`] is one such read), [`replay`] sends what was read, [`live`] sends what the hub brings, [`receipts`] stores what the client acknowledges,
//! [`requeued`] delivers again what was given up and requeued ([`redelivery`]: how far that has come).

mod catchup;
mod confirm;
mod filter;
mod live;
mod pace;
mod reading;
mod receipt;
mod receipts;
mod redelivery;
mod replay;
mod requeued;
mod subscription;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use metrics::Counter;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Utf8Bytes;

pub use self::catchup::READS;
pub use self::confirm::{ConfirmPolicy, Presence, WINDOW};
pub use self::filter::Choice;
pub use self::pace::NewPace;
pub use self::reading::CHUNK_BYTES;
pub use self::receipt::{Receipt, first_receipt};
pub use self::subscription::NewSubscription;

use self::filter::Filter;
use self::pace::Pace;
use self::replay::Replayed;
use self::subscription::{Stage, Subscription};
use super::fair_queue::{FairQueue, SubId};
use super::outbox::Outbox;
use super::sources::Sources;
use crate::auth::Principal;
use crate::auth::scopes;
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::Priority;
use crate::protocol::ids;
use crate::protocol::ids::{ThreadAddress, log_key};
use crate::telemetry;

/// Subscriptions of one session, those of `"*"` included.
pub const MAX_SUBSCRIPTIONS: usize = 10_000;
/// Of these, replays at a pace.
const MAX_PACED: usize = 100;

/// A frame ready for the socket.
pub enum OutFrame {
    Event(OutEvent),
    Notice(Utf8Bytes),
}

/// An event or a delta for the socket.
pub struct OutEvent {
    /// A delta has none.
    pub seq: Option<u64>,
    /// Of a delta, how often its message was begun anew before its text.
    pub restarts: u32,
    pub frame: Utf8Bytes,
}

impl OutFrame {
    fn event(seq: u64, frame: Utf8Bytes) -> OutFrame {
        OutFrame::Event(OutEvent { seq: Some(seq), restarts: 0, frame })
    }

    fn delta(restarts: u32, frame: Utf8Bytes) -> OutFrame {
        OutFrame::Event(OutEvent { seq: None, restarts, frame })
    }
}

/// What `"*"` asks for: which threads, and for each of them the rest.
#[derive(Clone)]
pub struct Following {
    /// All threads of the tenant, not the user's alone.
    pub all: bool,
    pub choice: Choice,
    /// The durable subscription, if it is one.
    pub name: Option<Box<str>>,
    /// How its deliveries are to be confirmed, if they are.
    pub confirm: Option<ConfirmPolicy>,
}

pub struct Subscriptions {
    sources: Arc<Sources>,
    outbox: Arc<Outbox>,
    /// The session's user, once there is a subscription.
    user: Option<Arc<str>>,
    by_id: HashMap<SubId, Subscription>,
    by_thread: HashMap<String, SubId>,
    next_id: SubId,
    /// With `"*"`: whose threads are followed, a user's (`tenant/user`) or a tenant's (`tenant`).
    following: Option<(Arc<str>, Following)>,
    /// Who wants to read from the store, by the highest class of priority that waits there.
    queue: [VecDeque<SubId>; Priority::CLASSES],
    read_turn: u32,
    /// Reads under way, by the class for which they were started.
    reads: [usize; Priority::CLASSES],
    /// How many subscriptions are in their handover.
    handovers: usize,
    /// What was read from the store, ready to be sent.
    replay: FairQueue<Replayed>,
    replay_bytes: usize,
    /// What a read brings at most, but for one event that is larger.
    chunk_bytes: usize,
    /// When the last read was started.
    read_at: Option<Instant>,
    /// Subscriptions whose receipts have changed.
    changed: Vec<SubId>,
    /// Subscriptions that want to read what was requeued for them.
    requeued: VecDeque<SubId>,
    /// Bytes that the socket was given before what is sent next.
    pub written: u64,
    /// No events may be sent now: the client has given no credit for more.
    pub out_of_credit: bool,
    /// Nothing is due earlier.
    due: Option<Instant>,
    replayed: Counter,
    redeliveries: Counter,
}

impl Subscriptions {
    pub(super) fn new(sources: Arc<Sources>, outbox: Arc<Outbox>) -> Subscriptions {
        Subscriptions {
            sources,
            outbox,
            user: None,
            by_id: HashMap::new(),
            by_thread: HashMap::new(),
            next_id: 0,
            following: None,
            queue: Default::default(),
            read_turn: 0,
            reads: [0; Priority::CLASSES],
            handovers: 0,
            replay: FairQueue::default(),
            replay_bytes: 0,
            chunk_bytes: CHUNK_BYTES,
            read_at: None,
            changed: Vec::new(),
            requeued: VecDeque::new(),
            written: 0,
            out_of_credit: false,
            due: None,
            replayed: telemetry::replayed_events(),
            redeliveries: telemetry::redeliveries(),
        }
    }

    pub fn contains(&self, thread: &str) -> bool {
        self.by_thread.contains_key(thread)
    }

    /// Whether any subscription is in its handover; live events wait then.
    pub fn in_handover(&self) -> bool {
        self.handovers > 0
    }

    // Beginning and end of one subscription.

    /// Adds a subscription.
    pub fn add(&mut self, who: &Principal, wanted: NewSubscription) -> Result<(), Error> {
        if self.by_id.len() >= MAX_SUBSCRIPTIONS {
            let why = format!("a session has at most {MAX_SUBSCRIPTIONS} subscriptions");
            return Err(Error::new(Code::TooLarge, why).at("thread"));
        }
        let paced = || self.by_id.values().filter(|sub| sub.pace.is_some()).count();
        if wanted.pace.is_some() && paced() >= MAX_PACED {
            let why = format!("a session has at most {MAX_PACED} replays at a pace at a time");
            return Err(Error::new(Code::TooLarge, why).at("replay"));
        }
        let called = wanted.address.is_alias().then(|| wanted.address.called.into());
        let thread = wanted.address.name;
        let key: Arc<str> = log_key(&who.tenant, &thread).into();
        let present = !ids::is_reserved(&thread) && self.sources.store.is_member(&who.tenant, &thread, &who.user)?;
        let is_changed = wanted.receipt.as_ref().is_some_and(Receipt::must_be_stored);

        self.user = Some(who.user.clone());
        let id = self.insert(Subscription {
            thread,
            called,
            key: key.clone(),
            cursor: wanted.cursor,
            stage: Stage::CatchingUp,
            named: wanted.named,
            needs_caught_up: true,
            open_text: None,
            present,
            delivered: None,
            filter: Filter::new(wanted.choice, Instant::now()).map(Box::new),
            receipt: wanted.receipt.map(Box::new),
            pace: wanted.pace.map(|pace| Box::new(Pace::new(pace))),
        });
        if is_changed {
            self.changed.push(id);
        }

        if let Err(error) = self.approach(who, id) {
            // The hub has not counted it, so it must not be counted out.
            if let Some(sub) = self.by_id.get_mut(&id) {
                sub.present = false;
            }
            self.end(id);
            return Err(error);
        }
        if present {
            self.sources.hub.arrive(&key, &who.user);
        }
        self.look_for_requeued(who, id);
        Ok(())
    }

    fn insert(&mut self, sub: Subscription) -> SubId {
        let id = self.next_id;
        self.next_id += 1;
        self.by_thread.insert(sub.thread.clone(), id);
        self.by_id.insert(id, sub);
        id
    }

    /// Ends a subscription; `false` if there is none.
    pub fn remove(&mut self, thread: &str) -> bool {
        match self.by_thread.get(thread) {
            Some(&id) => self.end(id).is_some(),
            None => false,
        }
    }

    /// Ends a subscription by its number and returns its thread, as the client calls it; `None` if it has ended already.
    fn end(&mut self, id: SubId) -> Option<String> {
        self.store_on_leaving(id);
        self.requeued_on_leaving(id);
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

    fn end_all(&mut self, which: impl Fn(&Subscription) -> bool) {
        let ids: Vec<SubId> = self.by_id.iter().filter(|(_, sub)| which(sub)).map(|(id, _)| *id).collect();
        for id in ids {
            self.end(id);
        }
    }

    /// The hub forgets the subscription, if it was attached; it catches up from here on.
    fn detach(&mut self, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        if matches!(sub.stage, Stage::Handover { .. }) {
            self.handovers -= 1;
        }
        if sub.stage.is_attached() {
            self.sources.hub.detach(&sub.key, &self.outbox, id);
        }
        sub.stage = Stage::CatchingUp;
    }

    /// Goes on after `cursor` under a new number, which it gives: what is on its way under the old one is not sent.
    fn renumber(&mut self, id: SubId, cursor: u64, stage: Stage) -> Option<SubId> {
        self.detach(id);
        let mut sub = self.by_id.remove(&id)?;
        sub.cursor = cursor;
        sub.stage = stage;
        sub.delivered = None;

        let was_changed = self.changed.contains(&id);
        let id = self.insert(sub);
        if was_changed {
            self.changed.push(id);
        }
        self.requeued_renumbered(id);
        Some(id)
    }

    /// Goes on after `cursor` once more, so that all text of messages that are being written is sent again.
    pub fn restart(&mut self, who: &Principal, thread: &str, cursor: u64) -> Result<(), Error> {
        let Some(&id) = self.by_thread.get(thread) else { return Ok(()) };
        let Some(id) = self.renumber(id, cursor, Stage::CatchingUp) else { return Ok(()) };
        let result = self.approach(who, id);
        if result.is_err() {
            self.end(id);
        }
        result
    }

    // Following all threads of the user, or of the tenant.

    /// Whether `"*"` is in force.
    pub fn follows(&self) -> bool {
        self.following.is_some()
    }

    /// From now on the session gets the threads that its user joins, or that are made in the tenant.
    pub fn follow(&mut self, who: &Principal, following: Following) {
        let whose = if following.all { &who.tenant } else { &who.key };
        self.sources.hub.follow(whose, &self.outbox);
        self.following = Some((whose.clone(), following));
    }

    fn unfollow(&mut self) {
        if let Some((whose, _)) = self.following.take() {
            self.sources.hub.unfollow(&whose, &self.outbox);
        }
    }

    /// Why `"*"` ends with these rights, if it does: it follows the tenant's threads, and the token does not allow that.
    fn loses_all(&self, who: &Principal) -> Option<Error> {
        let follows_tenant = self.following.as_ref().is_some_and(|(_, following)| following.all);
        if follows_tenant { scopes::read_all(who.scopes).err() } else { None }
    }

    /// Ends the subscriptions that `"*"` brought, and leaves those made by name.
    pub fn unfollow_all(&mut self) {
        self.unfollow();
        self.end_all(|sub| !sub.named);
    }

    /// A thread is among those that `"*"` follows, from the event after `before` on: its subscription begins there.
    pub fn joined(&mut self, who: &Principal, thread: String, before: u64) -> Result<(), (String, Error)> {
        let Some((_, following)) = &self.following else { return Ok(()) };
        if self.contains(&thread) {
            return Ok(());
        }
        let receipt = Receipt::wanted(following.name.as_deref(), None, before, following.confirm);
        let wanted = NewSubscription {
            address: ThreadAddress::named(thread.clone()),
            cursor: before,
            named: false,
            choice: following.choice.clone(),
            receipt: receipt.map(Receipt::unwritten),
            pace: None,
        };
        self.add(who, wanted).map_err(|error| (thread, error))
    }

    // Rights.

    /// Applies a new token's rights to all subscriptions; gives those that it may not read, with the reason, to be ended.
    pub fn regrant(&mut self, who: &Principal) -> Vec<(SubId, Error)> {
        // The hub first, the store afterwards: a removal that comes in between goes by the new right.
        let by_scope = scopes::reads_by_scope(who.scopes);
        for (id, sub) in &self.by_id {
            self.sources.hub.regrant(&sub.key, &self.outbox, *id, by_scope);
        }

        let mut lost = Vec::new();
        let loses_all = self.loses_all(who).is_some();
        for (id, sub) in &self.by_id {
            // It ends with `"*"`, and not for itself.
            if loses_all && !sub.named {
                continue;
            }
            let may_read = scopes::read(who.scopes).and_then(|()| self.sources.rights.may_read(who, &sub.thread));
            if let Err(error) = may_read {
                lost.push((*id, error));
            }
        }
        lost
    }

    /// Ends what the user's new rights do not allow: subscriptions, which it gives with their threads as the client calls
    /// them, and `"*"` as a whole if that was to all threads of the tenant.
    pub fn end_lost(&mut self, who: &Principal, lost: Vec<(SubId, Error)>) -> Vec<(String, Error)> {
        let mut ended = Vec::new();
        if let Some(error) = self.loses_all(who) {
            self.unfollow_all();
            ended.push((ids::ALL_THREADS.to_owned(), error));
        }
        for (id, error) in lost {
            if let Some(thread) = self.end(id) {
                ended.push((thread, error));
            }
        }
        ended
    }

    /// The user left the thread: its subscription ends, unless it reads by another right, and is returned as the client calls it.
    pub fn left(&mut self, who: &Principal, thread: &str) -> Option<String> {
        if scopes::reads_by_scope(who.scopes) {
            return None;
        }
        let id = *self.by_thread.get(thread)?;
        // If the store fails, the next read says so.
        if self.sources.rights.works_in(who, thread).unwrap_or(false) {
            // The hub has forgotten the subscription.
            self.detach(id);
            if self.approach(who, id).is_ok() {
                return None;
            }
        }
        self.end(id)
    }

    /// A run of the user's on the thread has ended. If that was all that the subscription was read by, it ends too, and is
    /// returned as the client calls it, with the reason.
    pub fn run_ended(&mut self, who: &Principal, id: SubId) -> Option<(String, Error)> {
        let sub = self.by_id.get(&id)?;
        let error = self.sources.rights.may_read(who, &sub.thread).err()?;
        self.end(id).map(|thread| (thread, error))
    }

    /// The frame of a signal about a thread, as the client calls the thread, if it is subscribed to that.
    pub fn signal_of(&self, thread: &str, signal: Utf8Bytes) -> Option<Utf8Bytes> {
        self.signal(*self.by_thread.get(thread)?, signal)
    }

    /// After that: with `"*"` a user that is a member again by now reads on from there.
    pub fn rejoin(&mut self, who: &Principal, thread: &str) -> Result<(), (String, Error)> {
        match self.sources.store.member(&who.tenant, thread, &who.user) {
            Ok(Some(member)) => self.joined(who, thread.to_owned(), member.since - 1),
            Ok(None) => Ok(()),
            // If the store fails, the next read says so.
            Err(_) => Ok(()),
        }
    }

    // The session's end.

    /// The session ends, by the server's own doing or not: receipts say which attempts count.
    pub fn leave(&mut self, client: Presence, by_server: bool) {
        let now = Instant::now();
        for confirm in self.by_id.values_mut().filter_map(Subscription::confirm) {
            confirm.leave(client, by_server, now);
        }
        self.by_id.values_mut().for_each(|sub| sub.leave_requeued(client, by_server, now));
        self.close();
    }

    /// Leaves nothing of the session but its receipts.
    pub fn close(&mut self) {
        self.unfollow();
        self.end_all(|_| true);
        self.outbox.close();
    }

    // Common to what is replayed and what is live.

    /// An event goes to the socket: the frame as this subscription's client gets it.
    fn prepare(&mut self, id: SubId, seq: u64, frame: &Utf8Bytes) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        if let Some(filter) = &mut sub.filter {
            filter.named(seq);
        }
        let frame = sub.rename(frame.clone());

        let Some(confirm) = sub.confirm() else { return Some(frame) };
        let attempt = confirm.send(seq, Instant::now(), self.written);
        let deadline = confirm.deadline();
        self.schedule(deadline);
        match attempt {
            Some(attempt) => Some(event::with_attempt(&frame, attempt).into()),
            None => Some(frame),
        }
    }

    /// Has [`Subscriptions::on_due`] called at that time at the latest.
    fn schedule(&mut self, due: Option<Instant>) {
        self.due = [self.due, due].into_iter().flatten().min();
    }

    /// When [`Subscriptions::on_due`] wants to be called next.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

/// However the session ends, also by a panic.
impl Drop for Subscriptions {
    fn drop(&mut self) {
        self.close();
    }
}
