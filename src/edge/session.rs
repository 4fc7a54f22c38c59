//! One WebSocket session: one task that owns its socket, reads commands, and writes what its outbox holds.
//!
//! Invariants:
//! - commands take effect in the order sent: one that reads waits until the publishes before it are answered;
//! - every publish that was accepted is answered, also while the server drains;
//! - what waits is bounded: publishes in flight by [`MAX_IN_FLIGHT`] (beyond it the socket is not read), events by the
//!   outbox, replayed frames by the subscriptions. A socket that takes nothing is closed after 30 s.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll};
use std::time::Duration;

use std::future::Future;

use futures_util::{Sink, SinkExt, StreamExt};
use metrics::Counter;
use serde_json::value::RawValue;
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::Context;
use super::socket::Socket;
use super::subscriptions::{Subscriptions, may_read};
use crate::access;
use crate::command::{self, After, BadCommand, Command, Publish, Subscribe};
use crate::error::{Code, Error};
use crate::event;
use crate::identity::{Principal, jwt};
use crate::log::Append;
use crate::outbox::{Answer, EVENT_BYTES, Item, Outbox};
use crate::submit::{Draft, Verdict, draft};
use crate::wire::{Limits, Seqs, ServerFrame, error_frame};
use crate::{clock, telemetry};

/// Publishes that may wait for their answer; beyond that the socket is not read.
pub const MAX_IN_FLIGHT: usize = 8_192;
/// Answers that may wait for the socket; beyond that it is not read.
const MAX_ANSWERS: usize = 1_024;
/// Frames read before the writing side gets its turn.
const READS_PER_TURN: usize = 128;
/// Time for a `connect` frame.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Silence after which the server pings.
pub const PING_AFTER: Duration = Duration::from_secs(25);
/// Time for any frame after that ping.
const PONG_WITHIN: Duration = Duration::from_secs(10);
/// A socket that takes no byte for so long is a slow consumer.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// How long before a token's end `expiring` is sent, in seconds.
const EXPIRING_BEFORE: u64 = 60;
/// Time to write the last frames and the close frame.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// The limits as `welcome` tells them.
pub const LIMITS: Limits = Limits {
    frame_bytes: command::MAX_FRAME,
    data_bytes: command::MAX_DATA,
    commands: command::MAX_COMMANDS,
    publishes_in_flight: MAX_IN_FLIGHT,
    outbox_bytes: EVENT_BYTES,
};

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// We close, with this code and reason.
    Close(u16, &'static str),
    /// The client closed or is gone.
    Gone,
}

/// What the session's wait brought.
enum Wake {
    Frame(Result<Message, WsError>),
    GoOn,
    Timer,
    Stop(End),
}

pub struct Session {
    ctx: Arc<Context>,
    ws: WebSocketStream<Socket>,
    connection: String,
    traceparent: Option<String>,
    who: Option<Principal>,
    outbox: Arc<Outbox>,
    subs: Subscriptions,
    /// Answers made by the session itself, and those of the outbox, encoded.
    answers: VecDeque<Message>,
    /// Publishes read in this turn, not yet handed to the log.
    batch: Vec<Append>,
    in_flight: usize,
    /// Commands that wait until those before them have taken effect.
    backlog: VecDeque<Box<RawValue>>,
    /// The `subscribe` to `"*"` that waits for the list of threads.
    listing: Option<All>,
    reads: usize,
    replay_turn: bool,
    dirty: bool,
    draining: bool,
    timer: Pin<Box<Sleep>>,
    started: Instant,
    heard: Instant,
    pinged: Option<Instant>,
    told_expiring: bool,
    /// Since when the socket has taken nothing, and how much it had taken by then.
    stalled: Option<(Instant, u64)>,
    published: Counter,
    deliveries: Counter,
}

/// A `subscribe` to all threads, while its list is read.
struct All {
    id: i64,
    after: Option<BTreeMap<String, u64>>,
    last: Option<u64>,
    recovered: bool,
}

impl Session {
    pub fn new(
        ctx: Arc<Context>,
        ws: WebSocketStream<Socket>,
        who: Option<Principal>,
        traceparent: Option<String>,
    ) -> Session {
        let outbox = Arc::new(Outbox::default());
        let now = Instant::now();
        let deadline = if who.is_some() { PING_AFTER } else { CONNECT_WITHIN };
        Session {
            subs: Subscriptions::new(ctx.clone(), outbox.clone()),
            ctx,
            ws,
            connection: clock::random_id().simple().to_string(),
            traceparent,
            who,
            outbox,
            answers: VecDeque::new(),
            batch: Vec::new(),
            in_flight: 0,
            backlog: VecDeque::new(),
            listing: None,
            reads: 0,
            replay_turn: false,
            dirty: false,
            draining: false,
            timer: Box::pin(tokio::time::sleep_until(now + deadline)),
            started: now,
            heard: now,
            pinged: None,
            told_expiring: false,
            stalled: None,
            published: telemetry::commands("publish", "ok"),
            deliveries: telemetry::deliveries(),
        }
    }

    /// Serves the session until it ends, on either side.
    pub async fn run(mut self: Box<Session>) {
        let _open = self.ctx.enter(&self.outbox);
        if self.who.is_some() {
            self.welcome(None);
        }
        let end = loop {
            let wake = std::future::poll_fn(|cx| self.poll(cx)).await;
            let result = match wake {
                Wake::Frame(Ok(message)) => self.on_message(message),
                Wake::Frame(Err(error)) => Err(end_of(&error)),
                Wake::GoOn => self.on_answers(),
                Wake::Timer => self.on_timer(),
                Wake::Stop(end) => Err(end),
            };
            if let Err(end) = result {
                break end;
            }
        };
        // Boxed, so that a session that goes on does not keep room for its end.
        Box::pin(self.finish(end)).await;
    }

    /// The client offered no version of the protocol that we speak.
    pub async fn refuse_version(self: Box<Session>) {
        self.finish(End::Close(4502, "the subprotocol is weft.v1")).await;
    }

    /// Reads while there is something to read, then writes what waits, then sleeps.
    fn poll(&mut self, cx: &mut Task<'_>) -> Poll<Wake> {
        let mut more_to_read = false;
        if self.may_read() {
            if self.reads < READS_PER_TURN {
                match self.ws.poll_next_unpin(cx) {
                    Poll::Ready(Some(frame)) => {
                        self.reads += 1;
                        return Poll::Ready(Wake::Frame(frame));
                    }
                    Poll::Ready(None) => return Poll::Ready(Wake::Stop(End::Gone)),
                    Poll::Pending => {}
                }
            } else {
                more_to_read = true;
            }
        }
        self.reads = 0;
        if !self.batch.is_empty() {
            self.ctx.submit.send(std::mem::take(&mut self.batch));
        }
        match self.poll_write(cx) {
            Poll::Ready(Err(_)) => return Poll::Ready(Wake::Stop(End::Gone)),
            Poll::Ready(Ok(())) if self.outbox.poll_filled(cx, self.subs.gate_open()).is_ready() => {
                return Poll::Ready(Wake::GoOn);
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if more_to_read {
            return Poll::Ready(Wake::GoOn);
        }
        self.timer.as_mut().poll(cx).map(|()| Wake::Timer)
    }

    /// Whether more commands are wanted now.
    fn may_read(&self) -> bool {
        !self.draining && self.in_flight < MAX_IN_FLIGHT && self.answers.len() < MAX_ANSWERS && self.backlog.is_empty()
    }

    /// Writes frames for as long as the socket takes them. Ready: all is written.
    fn poll_write(&mut self, cx: &mut Task<'_>) -> Poll<Result<(), WsError>> {
        loop {
            let ready = Pin::new(&mut self.ws).poll_ready(cx)?;
            if ready.is_pending() {
                self.note_stall();
                return Poll::Pending;
            }
            let Some(frame) = self.next_frame() else { break };
            Pin::new(&mut self.ws).start_send(frame)?;
            self.dirty = true;
        }
        if self.dirty {
            if Pin::new(&mut self.ws).poll_flush(cx)?.is_pending() {
                self.note_stall();
                return Poll::Pending;
            }
            self.dirty = false;
        }
        self.stalled = None;
        Poll::Ready(Ok(()))
    }

    /// Answers first; then replayed and live events in turn, so that neither starves the other.
    fn next_frame(&mut self) -> Option<Message> {
        if let Some(frame) = self.answers.pop_front() {
            return Some(frame);
        }
        let who = self.who.as_ref()?;
        self.replay_turn = !self.replay_turn;
        if self.replay_turn
            && let Some(frame) = self.subs.next_replayed(who)
        {
            self.deliveries.increment(1);
            return Some(Message::Text(frame));
        }
        while self.subs.gate_open() {
            match self.outbox.pop_item() {
                Some(Item::Event { sub, seq, frame }) => {
                    if self.subs.pass(who, sub, seq) {
                        self.deliveries.increment(1);
                        return Some(Message::Text(frame));
                    }
                }
                Some(Item::Lagged { sub }) => self.subs.lagged(who, sub),
                Some(Item::Removed { sub }) => {
                    if let Some(thread) = self.subs.drop_sub(sub) {
                        let error = Error::new(
                            Code::NotFound,
                            "you are no longer a member of this thread: its subscription has ended",
                        );
                        return Some(text(error_frame(None, Some(&thread), &error)));
                    }
                }
                Some(Item::Joined { thread, before }) => {
                    // A failure here is one of the store; the thread is there again when the client resumes.
                    if !self.subs.contains(&thread)
                        && let Err(error) = self.subs.add(who, &thread, before)
                    {
                        return Some(text(error_frame(None, Some(&thread), &error)));
                    }
                }
                None => break,
            }
        }
        self.subs.next_replayed(who).map(Message::Text).inspect(|_| self.deliveries.increment(1))
    }

    fn note_stall(&mut self) {
        let written = self.ws.get_ref().written;
        if self.stalled.is_none_or(|(_, then)| then != written) {
            self.stalled = Some((Instant::now(), written));
        }
    }

    fn on_message(&mut self, message: Message) -> Result<(), End> {
        self.heard = Instant::now();
        self.pinged = None;
        match message {
            Message::Text(text) => self.on_text(&text),
            Message::Binary(_) => Err(End::Close(1003, "frames are JSON text")),
            Message::Close(_) => Err(End::Gone),
            // Pings are answered by the protocol layer with the next write.
            Message::Ping(_) => {
                self.dirty = true;
                Ok(())
            }
            Message::Pong(_) | Message::Frame(_) => Ok(()),
        }
    }

    fn on_text(&mut self, text: &str) -> Result<(), End> {
        match command::split(text) {
            None => Err(End::Close(4501, "the frame is neither a JSON object nor an array of them")),
            Some(Err(error)) => {
                self.refuse(None, &error);
                Ok(())
            }
            Some(Ok(commands)) => {
                let commands = commands.as_slice();
                for (i, command) in commands.iter().enumerate() {
                    if !self.on_command(command)? {
                        self.backlog.extend(commands[i..].iter().map(|&command| command.to_owned()));
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    /// Carries out a command; `false` if it has to wait until those before it have taken effect.
    fn on_command(&mut self, command: &RawValue) -> Result<bool, End> {
        let command = match command::parse(command.get()) {
            Ok(command) => command,
            Err(BadCommand { id, error }) => {
                self.refuse(id, &error);
                return Ok(true);
            }
        };
        if let Command::Publish(publish) = command {
            self.publish(&publish);
            return Ok(true);
        }
        if self.in_flight > 0 || self.listing.is_some() {
            return Ok(false);
        }
        let name = command.name();
        let (id, result) = match command {
            Command::Connect(connect) => return self.connect(connect.id, &connect.token).map(|()| true),
            Command::Refresh(refresh) => return self.refresh(refresh.id, &refresh.token).map(|()| true),
            Command::Subscribe(subscribe) => (subscribe.id, self.subscribe(subscribe)),
            Command::Unsubscribe(unsubscribe) => {
                (unsubscribe.id, self.unsubscribe(unsubscribe.id, &unsubscribe.thread))
            }
            Command::Ping(ping) => {
                self.answer(&ServerFrame::Pong { id: ping.id, at: &clock::rfc3339(clock::now_ms()) });
                (ping.id, Ok(()))
            }
            Command::Publish(_) => return Ok(true), // handled above
        };
        telemetry::commands(name, result.as_ref().map_or_else(|error| error.code.as_str(), |()| "ok")).increment(1);
        if let Err(error) = result {
            self.answers.push_back(text(error_frame(Some(id), None, &error)));
        }
        Ok(true)
    }

    fn answer(&mut self, frame: &ServerFrame<'_>) {
        self.answers.push_back(text(frame.encode()));
    }

    fn refuse(&mut self, id: Option<i64>, error: &Error) {
        telemetry::commands("invalid", error.code.as_str()).increment(1);
        self.answers.push_back(text(error_frame(id, None, error)));
    }

    fn who(&self) -> Result<&Principal, Error> {
        self.who.as_ref().ok_or_else(|| Error::new(Code::Unauthenticated, "connect first"))
    }

    fn welcome(&mut self, id: Option<i64>) {
        let Some(who) = &self.who else { return };
        let frame = ServerFrame::Welcome {
            id,
            connection: &self.connection,
            user: &who.user,
            tenant: &who.tenant,
            epoch: &self.ctx.epoch,
            heartbeat_ms: PING_AFTER.as_millis() as u64,
            expires_at: &clock::rfc3339(who.expires_at.saturating_mul(1000)),
            limits: LIMITS,
        };
        self.answers.push_back(text(frame.encode()));
        self.reset_timer();
    }

    fn connect(&mut self, id: i64, token: &str) -> Result<(), End> {
        if self.who.is_some() {
            self.refuse(Some(id), &Error::new(Code::Conflict, "the session is connected already; use refresh"));
            return Ok(());
        }
        self.who = Some(self.ctx.verifier.verify(token).map_err(|_| End::Close(4500, "the token is not valid"))?);
        telemetry::commands("connect", "ok").increment(1);
        self.welcome(Some(id));
        Ok(())
    }

    fn refresh(&mut self, id: i64, token: &str) -> Result<(), End> {
        let Some(old) = &self.who else {
            self.refuse(Some(id), &Error::new(Code::Unauthenticated, "connect first"));
            return Ok(());
        };
        let new = self.ctx.verifier.verify(token).map_err(|_| End::Close(4500, "the token is not valid"))?;
        if new.key != old.key {
            return Err(End::Close(4500, "the token is another user's"));
        }
        let expires_at = clock::rfc3339(new.expires_at.saturating_mul(1000));
        self.who = Some(new);
        self.told_expiring = false;
        self.reset_timer();
        telemetry::commands("refresh", "ok").increment(1);
        self.answer(&ServerFrame::Refreshed { id, expires_at: &expires_at });
        Ok(())
    }

    /// Checks a publish and puts it into the batch; whatever happens, it is answered.
    fn publish(&mut self, publish: &Publish<'_>) {
        match self.prepare(publish) {
            Ok(append) => {
                self.in_flight += 1;
                self.batch.push(append);
            }
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.answers.push_back(text(error_frame(Some(publish.id), None, &error)));
            }
        }
    }

    fn prepare(&self, publish: &Publish<'_>) -> Result<Append, Error> {
        let who = self.who()?;
        let class = event::classify(&publish.kind)?;
        event::check_data(class, publish.data)?;
        let grant = access::publish(who.scopes, class, || self.ctx.standing(who, &publish.thread))?;
        event::check_run(class, publish.run.as_deref())?;
        let mut event = draft(&who.tenant, &who.user, &publish.thread, &publish.kind, publish.data);
        event.key = publish.key.as_deref().map(Into::into);
        event.run = publish.run.as_deref().map(Into::into);
        event.parent = publish.parent;
        event.priority = publish.priority;
        let (outbox, id, thread) = (self.outbox.clone(), publish.id, Box::from(&*publish.thread));
        let reply = Box::new(move |verdict| outbox.push_answer(Answer::Publish { id, thread, verdict }));
        Ok(self.ctx.submit.prepare(&Draft { event, grant, traceparent: self.traceparent.clone() }, reply))
    }

    fn subscribe(&mut self, subscribe: Subscribe<'_>) -> Result<(), Error> {
        let who = self.who()?.clone();
        access::read(who.scopes)?;
        let recovered = subscribe.epoch.as_ref().is_none_or(|epoch| **epoch == *self.ctx.epoch);
        if subscribe.thread == "*" {
            let after = match subscribe.after {
                Some(After::Each(after)) => Some(after),
                _ => None,
            };
            return self.list_threads(&who, All { id: subscribe.id, after, last: subscribe.last, recovered });
        }
        if self.subs.contains(&subscribe.thread) {
            return Err(Error::new(Code::Conflict, "the session is subscribed to this thread already").at("thread"));
        }
        let row = self.ctx.store.thread(&who.tenant, &subscribe.thread)?.ok_or_else(Error::no_thread)?;
        may_read(&self.ctx, &who, &subscribe.thread)?;
        let after = match subscribe.after {
            Some(After::Seq(after)) => Some(after),
            _ => None,
        };
        let cursor = begin(row.head, after, subscribe.last, recovered).map_err(|error| error.at("after"))?;
        self.answer(&ServerFrame::Subscribed {
            id: subscribe.id,
            thread: &subscribe.thread,
            epoch: &self.ctx.epoch.clone(),
            head: Seqs::One(row.head),
            after: Seqs::One(cursor),
            recovered,
        });
        self.subs.add(&who, &subscribe.thread, cursor)
    }

    /// Follows the user first and lists the threads then: a thread joined in between is in the list, or announced, or both.
    fn list_threads(&mut self, who: &Principal, all: All) -> Result<(), Error> {
        if self.subs.all {
            return Err(Error::new(Code::Conflict, "the session is subscribed to \"*\" already").at("thread"));
        }
        self.subs.all = true;
        self.ctx.hub.follow(&who.key, &self.outbox);
        self.listing = Some(all);
        let (ctx, outbox, who) = (self.ctx.clone(), self.outbox.clone(), who.clone());
        tokio::task::spawn_blocking(move || outbox.push_answer(Answer::Threads(ctx.threads_with_heads(&who))));
        Ok(())
    }

    fn subscribe_all(&mut self, threads: Result<Vec<(String, u64)>, Error>) {
        let (Some(all), Some(who)) = (self.listing.take(), self.who.clone()) else {
            return;
        };
        let begun = threads.and_then(|threads| {
            let begin = |(thread, head): (String, u64)| {
                // With a list of cursors, a thread that is not in it is one the client has nothing of.
                let after = all.after.as_ref().map(|after| after.get(&thread).copied().unwrap_or(0));
                let cursor =
                    begin(head, after, all.last, all.recovered).map_err(|error| error.at(format!("after.{thread}")))?;
                Ok((thread, (head, cursor)))
            };
            threads.into_iter().map(begin).collect::<Result<BTreeMap<_, _>, Error>>()
        });
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.subs.all = false;
                self.ctx.hub.unfollow(&who.key, &self.outbox);
                self.refuse(Some(all.id), &error);
                return;
            }
        };
        self.answer(&ServerFrame::Subscribed {
            id: all.id,
            thread: "*",
            epoch: &self.ctx.epoch.clone(),
            head: Seqs::Each(begun.iter().map(|(thread, (head, _))| (thread.clone(), *head)).collect()),
            after: Seqs::Each(begun.iter().map(|(thread, (_, cursor))| (thread.clone(), *cursor)).collect()),
            recovered: all.recovered,
        });
        for thread in all.after.iter().flat_map(BTreeMap::keys).filter(|thread| !begun.contains_key(*thread)) {
            self.answers.push_back(text(error_frame(
                None,
                Some(thread),
                &Error::no_thread().at(format!("after.{thread}")),
            )));
        }
        for (thread, (_, cursor)) in begun {
            if !self.subs.contains(&thread)
                && let Err(error) = self.subs.add(&who, &thread, cursor)
            {
                self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
            }
        }
    }

    fn unsubscribe(&mut self, id: i64, thread: &str) -> Result<(), Error> {
        let key = self.who()?.key.clone();
        if thread == "*" && self.subs.all {
            self.subs.all = false;
            self.ctx.hub.unfollow(&key, &self.outbox);
            self.subs.clear();
        } else if !self.subs.remove(thread) {
            return Err(Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread"));
        }
        self.answer(&ServerFrame::Unsubscribed { id });
        Ok(())
    }

    /// Takes the answers that came in from elsewhere.
    fn on_answers(&mut self) -> Result<(), End> {
        while self.answers.len() < MAX_ANSWERS
            && let Some(answer) = self.outbox.pop_answer()
        {
            match answer {
                Answer::Publish { id, thread, verdict } => self.on_verdict(id, &thread, verdict),
                Answer::Threads(threads) => self.subscribe_all(threads),
                Answer::Drain => self.draining = true,
                Answer::Chunk { sub, events } => {
                    if let Some(who) = &self.who
                        && let Err((thread, error)) = self.subs.chunk(who, sub, events)
                    {
                        self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
                    }
                }
            }
        }
        if self.draining && self.in_flight == 0 && self.batch.is_empty() {
            return Err(End::Close(1001, "the server is going down: reconnect and resume"));
        }
        while self.in_flight == 0
            && self.listing.is_none()
            && let Some(command) = self.backlog.pop_front()
        {
            if !self.on_command(&command)? {
                self.backlog.push_front(command);
                break;
            }
        }
        Ok(())
    }

    fn on_verdict(&mut self, id: i64, thread: &str, verdict: Verdict) {
        self.in_flight -= 1;
        match verdict {
            Ok(it) => {
                self.published.increment(1);
                self.answer(&ServerFrame::Published {
                    id,
                    thread,
                    seq: it.seq,
                    event: it.event,
                    duplicate: it.duplicate,
                });
            }
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.answers.push_back(text(error_frame(Some(id), None, &error)));
            }
        }
    }

    fn on_timer(&mut self) -> Result<(), End> {
        let now = Instant::now();
        match &self.who {
            None if now >= self.started + CONNECT_WITHIN => return Err(End::Close(4004, "no connect in time")),
            None => {}
            Some(who) => {
                let wall = clock::now_s();
                if wall >= who.expires_at.saturating_add(jwt::LEEWAY) {
                    return Err(End::Close(4003, "the token has expired"));
                }
                if wall + EXPIRING_BEFORE >= who.expires_at && !self.told_expiring {
                    self.told_expiring = true;
                    let expires_at = clock::rfc3339(who.expires_at * 1000);
                    self.answer(&ServerFrame::Expiring { expires_at: &expires_at });
                }
            }
        }
        if self.stalled.is_some_and(|(since, _)| now >= since + STALLED_AFTER) {
            return Err(End::Close(4001, "the socket takes nothing"));
        }
        if !self.may_read() {
            // We do not listen now, so nothing can be heard.
            self.heard = now;
            self.pinged = None;
        }
        match self.pinged {
            Some(at) if now >= at + PONG_WITHIN => return Err(End::Close(4002, "no heartbeat")),
            None if now >= self.heard + PING_AFTER => {
                self.pinged = Some(now);
                self.answers.push_back(Message::Ping(Bytes::new()));
            }
            _ => {}
        }
        self.reset_timer();
        Ok(())
    }

    fn reset_timer(&mut self) {
        let deadline = self.next_deadline();
        self.timer.as_mut().reset(deadline);
    }

    /// When something is due next. What happens earlier than that only moves deadlines away, so looking then is enough.
    fn next_deadline(&self) -> Instant {
        let Some(who) = &self.who else {
            return self.started + CONNECT_WITHIN;
        };
        let beat = self.pinged.map_or(self.heard + PING_AFTER, |at| at + PONG_WITHIN);
        let expiry = if self.told_expiring {
            who.expires_at.saturating_add(jwt::LEEWAY)
        } else {
            who.expires_at.saturating_sub(EXPIRING_BEFORE)
        };
        let expiry = Instant::now() + Duration::from_secs(expiry.saturating_sub(clock::now_s()).clamp(1, 86_400));
        let stall = self.stalled.map_or(beat, |(since, _)| since + STALLED_AFTER);
        beat.min(expiry).min(stall)
    }

    /// Says goodbye, and leaves nothing behind.
    async fn finish(mut self: Box<Session>, end: End) {
        if let Some(who) = &self.who {
            self.ctx.hub.unfollow(&who.key, &self.outbox);
        }
        self.subs.clear();
        self.outbox.close();
        if !self.batch.is_empty() {
            self.ctx.submit.send(std::mem::take(&mut self.batch));
        }
        let code = match &end {
            End::Close(code, _) => *code,
            End::Gone => 1005,
        };
        telemetry::closed(code).increment(1);
        if let End::Close(code, reason) = end {
            let goodbye = async {
                while let Some(frame) = self.answers.pop_front() {
                    self.ws.feed(frame).await?;
                }
                self.ws.send(Message::Close(Some(CloseFrame { code: code.into(), reason: reason.into() }))).await
            };
            // A socket that takes nothing does not get its close frame either.
            drop(tokio::time::timeout(CLOSE_WITHIN, goodbye).await);
            self.ws.into_inner().linger().await;
        } else {
            // Sends the answer to the client's close frame, if that is what ended the session.
            drop(tokio::time::timeout(CLOSE_WITHIN, self.ws.flush()).await);
        }
    }
}

fn text(frame: String) -> Message {
    Message::Text(frame.into())
}

/// The close code for what the protocol layer found (RFC 6455, section 7.4.1).
fn end_of(error: &WsError) -> End {
    match error {
        WsError::Capacity(CapacityError::MessageTooLong { .. }) => End::Close(1009, "the frame is too large"),
        WsError::Utf8(_) => End::Close(1007, "the frame is not UTF-8"),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Gone,
        WsError::Protocol(_) => End::Close(1002, "the frame is not WebSocket"),
        _ => End::Gone,
    }
}

/// The seq a subscription begins behind.
fn begin(head: u64, after: Option<u64>, last: Option<u64>, recovered: bool) -> Result<u64, Error> {
    match after {
        // Another log's cursor says nothing about this one.
        _ if !recovered => Ok(head),
        Some(after) if after > head => {
            Err(Error::new(Code::CursorInvalid, format!("after is behind the thread's head, {head}")))
        }
        Some(after) => Ok(after),
        None => Ok(head - last.unwrap_or(0).min(head)),
    }
}
