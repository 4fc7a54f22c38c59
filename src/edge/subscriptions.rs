//! A session's subscriptions: where each one stands, and how it comes from the store to the live feed.
//!
//! A subscription is a cursor. Behind the head it reads chunks from the store; when a chunk ends at the head it attaches to
//! the hub and reads once more what was committed meanwhile (the seam), then it is live. While any subscription is in its
//! seam, live events wait in the outbox, so that order holds; what arrives twice is dropped by its seq. `lagged` is the
//! same road, taken again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use metrics::Counter;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::edge::Context;
use crate::error::{Code, Error};
use crate::identity::Principal;
use crate::ids::log_key;
use crate::outbox::{Answer, Outbox, SubId};
use crate::store::{EventRange, StoredEvent};
use crate::wire::ServerFrame;
use crate::{access, telemetry};

/// Events of one read from the store.
const CHUNK_EVENTS: usize = 512;
/// Bytes of one read from the store; two such reads at most are in memory for a session.
const CHUNK_BYTES: usize = 128 << 10;
/// Subscriptions of one session, those of `"*"` included.
pub const MAX_SUBSCRIPTIONS: usize = 10_000;
/// Reads that a session may have under way.
const READS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Reads from the store, not attached.
    Behind,
    /// Attached; reads up to the head of that moment.
    Seam {
        to: u64,
    },
    Live,
}

/// What a subscription has ready for the socket, in order.
enum Step {
    Frame(SubId, Utf8Bytes),
    /// All before the live feed is sent.
    Live(SubId),
}

struct Subscription {
    thread: String,
    /// `tenant/thread`.
    key: Arc<str>,
    /// The newest seq handed to the socket, or to come from there on.
    cursor: u64,
    stage: Stage,
    /// Asked for by its own name.
    named: bool,
}

pub struct Subscriptions {
    ctx: Arc<Context>,
    outbox: Arc<Outbox>,
    by_id: HashMap<SubId, Subscription>,
    by_thread: HashMap<String, SubId>,
    next: SubId,
    /// The user (`tenant/user`) whose threads are followed, by `"*"`.
    following: Option<Arc<str>>,
    /// Subscriptions with something to read, in turn.
    queue: VecDeque<SubId>,
    reads: usize,
    seams: usize,
    /// What comes from the store, ready to be sent.
    replay: VecDeque<Step>,
    replay_bytes: usize,
    replayed: Counter,
}

impl Subscriptions {
    pub fn new(ctx: Arc<Context>, outbox: Arc<Outbox>) -> Subscriptions {
        Subscriptions {
            ctx,
            outbox,
            by_id: HashMap::new(),
            by_thread: HashMap::new(),
            next: 0,
            following: None,
            queue: VecDeque::new(),
            reads: 0,
            seams: 0,
            replay: VecDeque::new(),
            replay_bytes: 0,
            replayed: telemetry::replayed_events(),
        }
    }

    pub fn contains(&self, thread: &str) -> bool {
        self.by_thread.contains_key(thread)
    }

    /// Live events must wait while a subscription is in its seam.
    pub fn gate_open(&self) -> bool {
        self.seams == 0
    }

    /// Adds a subscription that begins behind `cursor`; `named` unless `"*"` brought it.
    pub fn add(&mut self, who: &Principal, thread: &str, cursor: u64, named: bool) -> Result<(), Error> {
        if self.by_id.len() >= MAX_SUBSCRIPTIONS {
            let why = format!("a session has at most {MAX_SUBSCRIPTIONS} subscriptions");
            return Err(Error::new(Code::TooLarge, why).at("thread"));
        }
        let id = self.next;
        self.next += 1;
        let key = log_key(&who.tenant, thread).into();
        self.by_thread.insert(thread.to_owned(), id);
        self.by_id.insert(id, Subscription { thread: thread.to_owned(), key, cursor, stage: Stage::Behind, named });
        let result = self.approach(who, id);
        if result.is_err() {
            self.drop_sub(id);
        }
        self.read_on(who);
        result
    }

    /// Ends a subscription; `false` if there is none.
    pub fn remove(&mut self, thread: &str) -> bool {
        match self.by_thread.get(thread) {
            Some(&id) => self.drop_sub(id).is_some(),
            None => false,
        }
    }

    /// Ends a subscription by its number and returns its thread.
    pub fn drop_sub(&mut self, id: SubId) -> Option<String> {
        let sub = self.by_id.remove(&id)?;
        self.by_thread.remove(&sub.thread);
        self.queue.retain(|queued| *queued != id);
        if matches!(sub.stage, Stage::Seam { .. }) {
            self.seams -= 1;
        }
        if sub.stage != Stage::Behind {
            self.ctx.hub.detach(&sub.key, &self.outbox, id);
        }
        Some(sub.thread)
    }

    /// Whether `"*"` is in force.
    pub fn follows(&self) -> bool {
        self.following.is_some()
    }

    /// From now on the session hears of threads that its user joins.
    pub fn follow(&mut self, who: &Principal) {
        self.ctx.hub.follow(&who.key, &self.outbox);
        self.following = Some(who.key.clone());
    }

    fn unfollow(&mut self) {
        if let Some(user) = self.following.take() {
            self.ctx.hub.unfollow(&user, &self.outbox);
        }
    }

    /// Judges all subscriptions by a new token's rights; gives those that ended, with the reason.
    pub fn regrant(&mut self, who: &Principal) -> Vec<(String, Error)> {
        let by_scope = access::reads_by_scope(who.scopes);
        for (id, sub) in &self.by_id {
            // Before the look at the store: a removal that comes after it goes by the new right.
            self.ctx.hub.regrant(&sub.key, &self.outbox, *id, by_scope);
        }
        let judge = |sub: &Subscription| access::read(who.scopes).and_then(|()| may_read(&self.ctx, who, &sub.thread));
        let lost: Vec<_> = self.by_id.iter().filter_map(|(id, sub)| Some((*id, judge(sub).err()?))).collect();
        lost.into_iter().filter_map(|(id, error)| Some((self.drop_sub(id)?, error))).collect()
    }

    /// Leaves nothing of the session behind.
    pub fn close(&mut self) {
        self.unfollow();
        self.queue.clear();
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

    /// A live event: `true` if it is to be sent.
    pub fn pass(&mut self, who: &Principal, id: SubId, seq: u64) -> bool {
        let Some(sub) = self.by_id.get_mut(&id) else {
            return false;
        };
        if seq <= sub.cursor {
            return false;
        }
        if seq != sub.cursor + 1 {
            // Cannot happen while the hub delivers in order; if it ever does, the store has what is missing.
            tracing::error!(expected = sub.cursor + 1, seq, "a hole in the live feed");
            self.ctx.hub.detach(&sub.key, &self.outbox, id);
            self.lagged(who, id);
            return false;
        }
        sub.cursor = seq;
        true
    }

    /// The hub dropped the subscription because the outbox was full: it goes on from the store.
    pub fn lagged(&mut self, who: &Principal, id: SubId) {
        let Some(sub) = self.by_id.get_mut(&id) else { return };
        sub.stage = Stage::Behind;
        let from = sub.cursor + 1;
        // Only told, not relied upon: without an answer from the store the notice names what is known to be missing.
        let to = self.ctx.store.head(&who.tenant, &sub.thread).unwrap_or(from).max(from);
        let frame = ServerFrame::Lagged { thread: &sub.thread, from, to }.encode();
        self.push_frame(id, frame.into());
        self.queue.push_back(id);
        self.read_on(who);
    }

    /// The next frame from the store.
    pub fn next_replayed(&mut self, who: &Principal) -> Option<Utf8Bytes> {
        loop {
            let frame = match self.replay.pop_front()? {
                Step::Frame(id, frame) => {
                    self.replay_bytes -= frame.len();
                    // What is left of a subscription that has ended is not wanted any more.
                    self.by_id.contains_key(&id).then_some(frame)
                }
                Step::Live(id) => self.live(id),
            };
            if self.replay.is_empty() && self.replay.capacity() > 64 {
                self.replay = VecDeque::new();
            }
            self.read_on(who);
            if frame.is_some() {
                return frame;
            }
        }
    }

    /// Takes what a read brought. An error ends the subscription and is returned with its thread.
    pub fn chunk(
        &mut self,
        who: &Principal,
        id: SubId,
        events: Result<Vec<StoredEvent>, Error>,
    ) -> Result<(), (String, Error)> {
        self.reads -= 1;
        let result = events.and_then(|events| self.take(who, id, events)).or_else(|error| match self.drop_sub(id) {
            Some(thread) => Err((thread, error)),
            None => Ok(()),
        });
        self.read_on(who);
        result
    }

    fn take(&mut self, who: &Principal, id: SubId, events: Vec<StoredEvent>) -> Result<(), Error> {
        let Some(sub) = self.by_id.get_mut(&id) else {
            return Ok(());
        };
        // Something to read was the reason to read.
        let last =
            events.last().ok_or_else(|| Error::new(Code::Internal, "the store lacks events that it should have"))?;
        sub.cursor = last.seq;
        let (stage, cursor) = (sub.stage, sub.cursor);
        self.replayed.increment(events.len() as u64);
        for event in events {
            self.push_frame(id, event.frame);
        }
        match stage {
            Stage::Seam { to } if cursor < to => self.queue.push_front(id),
            Stage::Seam { .. } | Stage::Live => self.go_live(id),
            Stage::Behind => self.approach(who, id)?,
        }
        Ok(())
    }

    /// Attaches once the head is near, and goes live if there is nothing to read; else has the store read.
    fn approach(&mut self, who: &Principal, id: SubId) -> Result<(), Error> {
        let Some(sub) = self.by_id.get_mut(&id) else {
            return Ok(());
        };
        let mut head = self.ctx.store.head(&who.tenant, &sub.thread)?;
        // Far behind there is no use in attaching: the outbox would only overflow.
        if head <= sub.cursor + CHUNK_EVENTS as u64 {
            self.ctx.hub.attach(&sub.key, &self.outbox, id, &who.user, access::reads_by_scope(who.scopes));
            // Looked up after attaching: what is committed from here on comes through the hub, a removal too.
            head = self.ctx.store.head(&who.tenant, &sub.thread)?;
            sub.stage = Stage::Seam { to: head };
            self.seams += 1;
            may_read(&self.ctx, who, &sub.thread)?;
        }
        if head <= sub.cursor {
            self.go_live(id);
        } else {
            // The seam first: the other subscriptions wait for it.
            self.queue.push_front(id);
        }
        Ok(())
    }

    /// Live once the frames before this step are on their way.
    fn go_live(&mut self, id: SubId) {
        self.replay.push_back(Step::Live(id));
    }

    /// The step is reached: the gate opens for this subscription.
    fn live(&mut self, id: SubId) -> Option<Utf8Bytes> {
        let sub = self.by_id.get_mut(&id)?;
        if matches!(sub.stage, Stage::Seam { .. }) {
            self.seams -= 1;
        }
        sub.stage = Stage::Live;
        Some(ServerFrame::CaughtUp { thread: &sub.thread, seq: sub.cursor }.encode().into())
    }

    fn push_frame(&mut self, id: SubId, frame: Utf8Bytes) {
        self.replay_bytes += frame.len();
        self.replay.push_back(Step::Frame(id, frame));
    }

    /// Starts reads while there is room for what they bring.
    fn read_on(&mut self, who: &Principal) {
        while self.reads < READS && self.replay_bytes < CHUNK_BYTES {
            let Some(id) = self.queue.pop_front() else { return };
            let Some(sub) = self.by_id.get(&id) else { continue };
            self.reads += 1;
            let (ctx, outbox, who) = (self.ctx.clone(), self.outbox.clone(), who.clone());
            let (thread, from) = (sub.thread.clone(), sub.cursor + 1);
            tokio::task::spawn_blocking(move || {
                let range = EventRange { from, limit: CHUNK_EVENTS, bytes: CHUNK_BYTES, ..EventRange::all() };
                // The right is looked up after the read: what was committed after a removal is not handed out.
                let read = ctx.store.events(&who.tenant, &thread, range).map_err(Error::from);
                let events = read.and_then(|events| may_read(&ctx, &who, &thread).map(|()| events));
                outbox.push_answer(Answer::Chunk { sub: id, events });
            });
        }
    }
}

/// However the session ends, also by a panic.
impl Drop for Subscriptions {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether the user may read the thread now.
pub fn may_read(ctx: &Context, who: &Principal, thread: &str) -> Result<(), Error> {
    if access::reads_by_scope(who.scopes) || ctx.store.is_member(&who.tenant, thread, &who.user)? {
        Ok(())
    } else {
        Err(Error::no_thread())
    }
}
